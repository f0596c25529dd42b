"""Checks of arrays and options from callers. Shapes are checked in geometry.py, settings in settings.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy

from gpuconv import activations, dtypes
from gpuconv.arguments import Shape
from gpuconv.arrays import Array, Kind, kind_of
from gpuconv.types import Activation, GradientName

NEEDS: tuple[GradientName, ...] = get_args(GradientName)


def given(**arrays: Array | None) -> dict[str, Array]:
    """Return the optional arrays that are not None."""
    return {name: array for name, array in arrays.items() if array is not None}


def checked(**arrays: Array) -> tuple[Kind, numpy.dtype]:
    """Return the kind of the arrays and the dtype of the result; the error names the array that does not fit."""
    kind = kind_of(**arrays)
    for name, array in arrays.items():
        if not dtypes.supported(array.dtype):
            hint = ""
            if array.dtype.kind in "iub":
                hint = f"; {name}.astype('float64') keeps integers up to 2**53, 'float32' up to 2**24"
            raise TypeError(f"{name} must be one of {', '.join(dtypes.NAMES)}, not {array.dtype}{hint}")
    return kind, dtypes.promoted(*(array.dtype for array in arrays.values()))


def check_shape(name: str, array: Array, shape: Shape) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} must have the shape {shape}, but it has {array.shape}")


def check_gradient(dy: Array, shape: Shape, **shapes: Sequence[int]) -> None:
    """Raise ValueError unless dy has this shape, which the other arguments imply."""
    if dy.shape != shape:
        given = " and ".join(f"{name} {tuple(of)}" for name, of in shapes.items())
        raise ValueError(f"dy must have the shape {shape} that {given} give, but it has {dy.shape}")


def check_bias(b: Array | None, channels: int) -> None:
    if b is not None and b.shape != (channels,):
        raise ValueError(
            f"b must have one element for each of the {channels} output channels, shape ({channels},),"
            f" but it has {tuple(b.shape)}"
        )


def check_activation(activation: object, dtype: numpy.dtype) -> None:
    if activation is None:
        return
    if not isinstance(activation, str) or activation not in activations.NAMES:
        raise ValueError(f"activation must be None or one of {', '.join(activations.NAMES)}; got {activation!r}")
    if dtypes.is_complex(dtype):
        raise TypeError(f"activation={activation!r} needs a real dtype, but the result is {dtype.name}")


def check_derivative(activation: Activation | None, y: Array | None, dy: Array, dtype: numpy.dtype) -> None:
    """Check an activation of this dtype, and y, from which its derivative is computed."""
    check_activation(activation, dtype)
    if y is not None:
        checked(dy=dy, y=y)
        check_shape("y", y, dy.shape)
        if activation is not None and dtypes.is_complex(y.dtype):
            raise TypeError(f"activation={activation!r} needs a real y, not {y.dtype}")
    elif activation is not None:
        raise ValueError(
            f"activation={activation!r} needs y, the result of the forward call, to take its derivative from"
        )


def needed(needs: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of the gradients to compute."""
    try:
        names = (needs,) if isinstance(needs, str) else tuple(needs)
    except TypeError:
        raise TypeError(f"needs must be among {', '.join(NEEDS)}; got {needs!r}") from None
    for name in names:
        if name not in NEEDS:
            raise ValueError(f"needs must be among {', '.join(NEEDS)}; got {name!r}")
    return names


def check_out(out: Array | None, kind: Kind, dtype: numpy.dtype, shape: Shape, **inputs: Array) -> None:
    """Raise TypeError or ValueError unless out can hold a result of this dtype and shape."""
    if out is None:
        return
    kind_of(**inputs, out=out)
    if out.dtype != dtype:
        raise TypeError(f"out must have the dtype of the result, {dtype.name}, not {out.dtype}")
    check_shape("out", out, shape)
    if kind == "numpy" and not out.flags.writeable:
        raise ValueError("out must be writeable, but it is read-only")
    if _overlaps_itself(out):
        raise ValueError(f"out must not overlap itself (shape {out.shape}, strides {out.strides})")
    for name, array in inputs.items():
        if _share_memory(kind, array, out):
            raise ValueError(f"out must not overlap {name} in memory")


def _overlaps_itself(array: Array) -> bool:
    """Whether two elements share memory. This needs an axis whose stride is within the span of the faster axes."""
    covered = array.itemsize
    for step, size in sorted((abs(step), size) for step, size in zip(array.strides, array.shape, strict=True)):
        if size > 1:
            if step < covered:
                return _shares_bytes(array)
            covered += step * (size - 1)
    return False


def _shares_bytes(array: Array) -> bool:
    """Whether two elements share memory, by comparing the addresses of all elements."""
    places: Any = 0
    for axis, (step, size) in enumerate(zip(array.strides, array.shape, strict=True)):
        places = places + (numpy.arange(size) * step).reshape(-1, *(1,) * (array.ndim - axis - 1))
    return bool((numpy.diff(numpy.sort(places, axis=None)) < array.itemsize).any())


class _Addresses:
    """The address range of a CuPy array in the form of NumPy's array interface, which does not read the memory."""

    def __init__(self, array: Array) -> None:
        self.__array_interface__ = {
            "version": 3, "typestr": f"|V{array.itemsize}", "data": (array.data.ptr, True),
            "shape": array.shape, "strides": array.strides,
        }  # fmt: skip


def _share_memory(kind: Kind, array: Array, out: Array) -> bool:
    if kind == "cupy":  # whose own function would read all addresses on the device
        array, out = numpy.asarray(_Addresses(array)), numpy.asarray(_Addresses(out))
    if not numpy.may_share_memory(array, out):
        return False
    try:
        return numpy.shares_memory(array, out, max_work=10**6)  # type: ignore[arg-type]
    except numpy.exceptions.TooHardError:
        return True
