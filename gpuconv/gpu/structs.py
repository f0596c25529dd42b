"""The structs that kernels take by value: one description for NumPy, which fills them, and for CUDA, which reads them.

Extents and strides are of type Index, which has 32 bits, or 64 bits if a tensor requires them.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple, TypeAlias

import numpy

AXES = 3  # kernels have three spatial axes; if there are fewer, axes of extent 1 are put in front
RANK = AXES + 3  # axes of an image or of weights
MOST_PHASES = 8  # phases of the stride, per axis, of one launch of implicit_gemm

# Struct, then name, type and length of each field; length 0: not an array.
_FIELDS: dict[str, tuple[tuple[str, str, int], ...]] = {
    "Convolution": (
        *((name, "Index", 0) for name in ("N", "G", "C", "F")),  # images, groups, and channels and filters of a group
        *((name, "Index", AXES) for name in ("input", "output", "kernel", "stride", "dilation", "low")),
    ),
    "Images": (("batch", "Index", 0), ("axis", "Index", AXES), ("group", "Index", 0), ("channel", "Index", 0)),
    "Weights": (("axis", "Index", AXES), ("group", "Index", 0), ("channel", "Index", 0), ("filter", "Index", 0)),
    "Boxes": (("outputs", "int", AXES), ("taps", "int", AXES), ("region", "int", AXES)),
    # What a block of depthwise.cu owns: images, groups, outputs, columns of taps, the region of x that they read, the
    # offsets of the second and third array in its shared memory in bytes, and the order of taps and filters in memory.
    "Block": (
        *((name, "int", 0) for name in ("images", "groups", "columns", "second", "third", "taps_innermost")),
        *((name, "int", AXES) for name in ("outputs", "region")),
    ),
    "Options": tuple(
        (name, "int", 0)
        for name in (
            *("first_conjugated", "first_derivative", "second_conjugated", "second_derivative"),
            *("channels_innermost", "has_bias", "activation", "fours"),
        )
    ),
    "Divisor": (("value", "Index", 0), ("multiplier", "unsigned", 0), ("shift", "int", 0)),
    "Items": (("extent", "Divisor", AXES + 1),),  # extents of three axes and of the channels
    "Phase": (
        *(("rows", "Divisor", 0), ("taps", "Divisor", 0)),
        *(("origin", "Index", 0), ("first_tap", "Index", 0), ("start", "Index", 0)),
    ),
    "Axis": (
        *((name, "Index", 0) for name in ("extent", "window_step", "tap_stride", "tap_step", "result_step")),
        *(("phases", "Divisor", 0), ("phase", "Phase", MOST_PHASES)),
    ),
    "Windows": (
        *((name, "Divisor", 0) for name in ("column_tiles", "groups", "row_tiles", "channels")),
        *((name, "Index", 0) for name in ("columns", "images", "split_length", "split_step")),
        ("axis", "Axis", AXES),
    ),
    "WeightTiles": (
        *((name, "Divisor", 0) for name in ("column_tiles", "row_tiles", "groups", "channels")),
        *(("kernel", "Divisor", AXES), ("output", "Divisor", AXES), ("splits", "Index", 0), ("length", "Index", 0)),
    ),
    "Elements": (
        *(("extent", "Divisor", RANK - 1), ("step", "Index", RANK), ("bias_step", "Index", RANK)),
        *(("count", "Index", 0), ("splits", "Index", 0), ("accumulate", "int", 0)),
    ),
}

NAMES = tuple(_FIELDS)

Value: TypeAlias = "int | tuple[Value, ...] | list[Value]"


def index_dtype(wide: bool) -> numpy.dtype:
    """Return the dtype of Index: 64-bit if ``wide``, else 32-bit."""
    return numpy.dtype(numpy.int64 if wide else numpy.int32)


@cache
def dtype_of(name: str, wide: bool) -> numpy.dtype:
    """Return the NumPy dtype of a struct, or of one of its types: Index, int or unsigned."""
    if name not in _FIELDS:
        return {"Index": index_dtype(wide), "int": numpy.dtype("int32"), "unsigned": numpy.dtype("uint32")}[name]
    fields = [(field, dtype_of(kind, wide), (count,) if count else ()) for field, kind, count in _FIELDS[name]]
    return numpy.dtype(fields, align=True)


def struct(name: str, wide: bool, *values: Value) -> numpy.ndarray:
    """Return a struct with these values, in the order of its fields, as a 0-d array, which CuPy passes by value."""
    value = numpy.array(values, dtype_of(name, wide))
    value.setflags(write=False)
    return value


class Options(NamedTuple):
    """Options of a launch. Activations are numbered in the order of activations.NAMES, from 1 on; 0 is none."""

    first_conjugated: bool
    first_derivative: int  # number of the activation whose derivative multiplies the first operand
    second_conjugated: bool
    second_derivative: int
    channels_innermost: bool  # of the array that determines which elements the threads of a warp access
    has_bias: bool = False
    activation: int = 0
    fours: bool = False  # whether additions to results are vectorized by 4

    def struct(self, wide: bool) -> numpy.ndarray:
        """Return the struct that the kernel takes."""
        return struct("Options", wide, *self)


def divisor(value: int) -> Value:
    """Return a Divisor: the numbers by which a kernel divides 0 to ``2**31 - 1`` without a division.

    The quotient is ``n * multiplier >> shift`` (Granlund and Montgomery, Division by invariant integers using
    multiplication, 1994). Kernels with 64-bit indices divide.
    """
    if not 0 < value < 2**31:
        return value, 0, 0
    shift = 31 + (value - 1).bit_length()
    return value, (1 << shift) // value + 1, shift


def text() -> str:
    """Return the declarations of the structs in CUDA."""
    lines = []
    for name, fields in _FIELDS.items():
        members = (f"{kind} {field}{f'[{count}]' if count else ''};" for field, kind, count in fields)
        lines.append(f"struct {name} {{ {' '.join(members)} }};")
    return "\n".join(lines)
