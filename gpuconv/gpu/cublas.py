"""Matrix products on a GPU, by cuBLAS on matrices where they lie.

CuPy's own matmul makes contiguous copies of stacks of matrices and of results, where cuBLAS takes any matrix one axis
of which has its elements side by side; and its precision is set for the whole process.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy

from gpuconv.arguments import Shape
from gpuconv.plan import Planner
from gpuconv.views import View

NAMES = ("tf32", "float32", "float64", "complex64", "complex128")

TF32_CAPABILITY = 80  # 8.0, the first that has TensorFloat-32

# cudaDataType and cublasComputeType_t of NVIDIA's documentation.
_TYPES = {"f": 0, "d": 1, "F": 4, "D": 5}
_COMPUTE_TYPES = {"f": 68, "d": 70, "F": 68, "D": 70}
_COMPUTE_TF32 = 77
_AS_IT_LIES, _TRANSPOSED = 0, 1  # cublasOperation_t
_DEFAULT_ALGORITHM = -1


class Matrix(NamedTuple):
    """How cuBLAS, which has matrices column by column, reads the transpose of one."""

    operation: int
    step: int  # elements from one column to the next


class Product(NamedTuple):
    """The numbers of a call of cuBLAS."""

    rows: int
    columns: int
    terms: int
    left: Any  # Matrix
    right: Any  # Matrix
    result_step: int
    stack: int  # of so many products
    apart: Shape  # elements from one left matrix, right matrix and result to the next
    type: int
    compute_type: int


def matmul(left: Any, right: Any, out: View, planner: Planner) -> None:
    """Steps that form the products of stacks of matrices, as numpy.matmul does; operands are views or arrays."""
    result = _matrix(out)
    if result is None:
        raise ValueError(f"no axis of {out} has its elements side by side, so cuBLAS cannot write it")
    if result.operation == _TRANSPOSED:
        left, right, out = right.swapaxes(-1, -2), left.swapaxes(-1, -2), out.swapaxes(-1, -2)
    stack = out.shape[:-2]
    left, right = (_readable(_stacked(operand, stack), planner) for operand in (left, right))
    first, count, apart = _together(stack, [_steps(operand)[:-2] for operand in (left, right, out)])
    numbers = Product(
        rows=out.shape[-2],
        columns=out.shape[-1],
        terms=left.shape[-1],
        left=_matrix(left),
        right=_matrix(right),
        result_step=result.step,
        stack=count,
        apart=apart,
        type=_TYPES[out.dtype.char],
        compute_type=_compute_type(out.dtype, planner),
    )
    for index in product(*map(range, stack[:first])):
        planner.call(partial(multiply, numbers), left[index], right[index], out=out[index])


def multiply(numbers: Product, left: Any, right: Any, out: Any) -> None:
    """A call of cuBLAS: the transpose of the result is that of the right matrices times that of the left ones."""
    from cupy.cuda import cublas, get_cublas_handle

    n, kind, (one, zero) = numbers, numbers.type, _ADDRESSES[numbers.type]
    shape = get_cublas_handle(), n.right.operation, n.left.operation, n.columns, n.rows, n.terms
    first, second, to = (right.data.ptr, kind, n.right.step), (left.data.ptr, kind, n.left.step), out.data.ptr
    how = n.compute_type, _DEFAULT_ALGORITHM
    if n.stack == 1:
        cublas.gemmEx(*shape, one, *first, *second, zero, to, kind, n.result_step, *how)
        return
    left_apart, right_apart, apart = n.apart
    operands = *first, right_apart, *second, left_apart
    cublas.gemmStridedBatchedEx(*shape, one, *operands, zero, to, kind, n.result_step, apart, n.stack, *how)


def of_squares(extent: int, name: str) -> Callable[..., None]:
    """A function ``f(left, right, out)`` of square C-contiguous matrices of a dtype, or of float32 by TF32."""
    matrix = Matrix(_AS_IT_LIES, extent)
    dtype = numpy.dtype("float32" if name == "tf32" else name)
    compute_type = _COMPUTE_TF32 if name == "tf32" else _COMPUTE_TYPES[dtype.char]
    sizes = (extent, extent, extent, matrix, matrix, extent, 1, ())
    return partial(multiply, Product(*sizes, _TYPES[dtype.char], compute_type))


_SCALARS = {number: numpy.array([1, 0], kind) for kind, number in _TYPES.items()}
_ADDRESSES = {number: (two.ctypes.data, two.ctypes.data + two.itemsize) for number, two in _SCALARS.items()}


def _compute_type(dtype: numpy.dtype, planner: Planner) -> int:
    """TF32 for float32 where it is asked for and there is one."""
    if planner.precision == "tf32" and dtype.char == "f" and planner.backend.device().capability >= TF32_CAPABILITY:
        return _COMPUTE_TF32
    return _COMPUTE_TYPES[dtype.char]


def _steps(operand: Any) -> Shape:
    """Strides in elements; 0 along axes of one element."""
    return tuple(
        0 if size == 1 else step // operand.dtype.itemsize
        for size, step in zip(operand.shape, operand.strides, strict=True)
    )


def _matrix(operand: Any) -> Matrix | None:
    """How cuBLAS reads the transposes of the last two axes, None where neither has its elements side by side."""
    (rows, columns), (down, along) = operand.shape[-2:], _steps(operand)[-2:]
    if along in (0, 1) and (along or columns == 1) and (rows == 1 or down >= columns):
        return Matrix(_AS_IT_LIES, max(down, columns))
    if down in (0, 1) and (down or rows == 1) and (columns == 1 or along >= rows):
        return Matrix(_TRANSPOSED, max(along, rows))
    return None


def _stacked(operand: Any, stack: Shape) -> Any:
    """The operand with the axes of the stack, along which the same matrix may be there again and again."""
    missing = len(stack) + 2 - len(operand.shape)
    shape, strides = (1,) * missing + operand.shape, (0,) * missing + operand.strides
    strides = tuple(0 if size == 1 else step for size, step in zip(shape, strides, strict=True))
    if isinstance(operand, View):
        return operand.strided((*stack, *shape[-2:]), strides)
    return type(operand)((*stack, *shape[-2:]), operand.dtype, operand.data, strides)


def _readable(operand: Any, planner: Planner) -> Any:
    """The operand, or a copy of it that cuBLAS can read."""
    if _matrix(operand) is not None:
        return operand
    steps = _steps(operand)
    own = tuple(1 if step == 0 else size for size, step in zip(operand.shape[:-2], steps, strict=False))
    (space,) = planner.workspace(math.prod((*own, *operand.shape[-2:])), dtype=operand.dtype)
    copy = space.shaped((*own, *operand.shape[-2:]))
    planner.copy(copy, operand[tuple(map(slice, own))])
    return _stacked(copy, operand.shape[:-2])


def _together(stack: Shape, steps: list[Shape]) -> tuple[int, int, Shape]:
    """The first axis of the stack from which on one call covers the rest.

    With it come the number of its products, and each operand's step from one to the next.
    """
    count, apart = 1, (0,) * len(steps)
    for axis in reversed(range(len(stack))):
        here = tuple(step[axis] for step in steps)
        if count > 1 and stack[axis] > 1 and here != tuple(step * count for step in apart):
            return axis + 1, count, apart
        if count == 1:
            apart = here
        count *= stack[axis]
    return 0, count, apart
