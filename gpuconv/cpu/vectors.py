"""Vectors of 64 bytes for kernels that Numba compiles: one AVX-512 register, two of AVX2, four of 128 bits.

LLVM keeps a Vector in registers. Numba vectorizes only innermost loops by itself, so that sums over the taps of a
convolution would be loaded and stored for every tap.

Indices count elements from the first element of an array, in its memory, and are not checked.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from gpuconv.cpu.vector_plan import VECTOR_BYTES


class Vector(types.Type):
    """The Numba type of a vector of elements of one type."""

    def __init__(self, item: Any) -> None:
        self.lanes = VECTOR_BYTES * 8 // item.bitwidth
        self.item = item
        super().__init__(f"Vector({item})")


@register_model(Vector)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, ir.VectorType(manager[kind.item].get_value_type(), kind.lanes))


def _place(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    """Return the address of the element that the first two arguments, an array and an index, name."""
    kind = signature.args[0]
    return builder.gep(context.make_array(kind)(context, builder, arguments[0]).data, [arguments[1]])


def _vector_place(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    kind = context.get_value_type(Vector(signature.args[0].dtype))
    return builder.bitcast(_place(context, builder, signature, arguments), kind.as_pointer())


@intrinsic
def load(typing: Any, array: Any, index: Any) -> Any:
    """Return the elements that begin at an index as a Vector."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = _vector_place(context, builder, signature, arguments)
        return builder.load(place, align=array.dtype.bitwidth // 8)

    return Vector(array.dtype)(array, types.intp), code


@intrinsic
def splat(typing: Any, array: Any, index: Any) -> Any:
    """Return a Vector of which every element is the one at an index."""
    kind = Vector(array.dtype)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = builder.load(_place(context, builder, signature, arguments))
        unset = ir.Constant(ir.VectorType(value.type, kind.lanes), ir.Undefined)
        first = ir.Constant(ir.VectorType(ir.IntType(32), kind.lanes), [0] * kind.lanes)
        return builder.shuffle_vector(
            builder.insert_element(unset, value, ir.Constant(ir.IntType(32), 0)), unset, first
        )

    return kind(array, types.intp), code


@intrinsic
def store(typing: Any, array: Any, index: Any, vector: Any) -> Any:
    """Store a Vector in the elements that begin at an index."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = _vector_place(context, builder, signature, arguments)
        builder.store(arguments[2], place, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), code


@intrinsic
def zero(typing: Any, array: Any) -> Any:
    """Return a Vector of zeros of the dtype of an array."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(context.get_value_type(signature.return_type), None)

    return Vector(array.dtype)(array), code


@intrinsic
def multiply_add(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """Return ``a * b + c``, rounded once if the processor has such an instruction."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b, c = arguments
        return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))

    return c(a, b, c), code


@intrinsic
def add(typing: Any, a: Any, b: Any) -> Any:
    """Return ``a + b``."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fadd(*arguments)

    return a(a, b), code
