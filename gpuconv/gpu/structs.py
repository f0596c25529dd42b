"""The structs that kernels take by value: one description for NumPy, which fills them, and for CUDA, which reads them.

Extents and strides are of type Index, which has 32 bits, or 64 bits if a tensor requires them.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple, TypeAlias

import numpy

AXES = 3  # kernels have three spatial axes; if there are fewer, axes of extent 1 are put in front

# Struct, field, length of the array (0: not an array), and whether the type is Index (else int).
_FIELDS: dict[str, tuple[tuple[str, int, bool], ...]] = {
    "Convolution": (
        *((name, 0, True) for name in ("N", "G", "C", "F")),  # images, groups, and channels and filters of a group
        *((name, AXES, True) for name in ("input", "output", "kernel", "stride", "dilation", "low")),
    ),
    "Images": (("batch", 0, True), ("axis", AXES, True), ("group", 0, True), ("channel", 0, True)),
    "Weights": (("axis", AXES, True), ("group", 0, True), ("channel", 0, True), ("filter", 0, True)),
    "Boxes": (("outputs", AXES, False), ("taps", AXES, False), ("region", AXES, False)),
    # What a block of depthwise.cu owns: images, groups, outputs, columns of taps, the region of x that they read, the
    # offsets of the second and third array in its shared memory in bytes, and the order of taps and filters in memory.
    "Block": (
        *((name, 0, False) for name in ("images", "groups", "columns", "second", "third", "taps_innermost")),
        *((name, AXES, False) for name in ("outputs", "region")),
    ),
    # Extents of three axes and of the channels, and the factors by which a kernel divides by them.
    "Items": (("extent", AXES + 1, False), ("factor", AXES + 1, False)),
    "Options": tuple(
        (name, 0, False)
        for name in (
            *("first_conjugated", "first_derivative", "second_conjugated", "second_derivative"),
            *("channels_innermost", "has_bias", "activation", "fours"),
        )
    ),
}

NAMES = tuple(_FIELDS)

Value: TypeAlias = int | tuple[int, ...]


def index_dtype(wide: bool) -> numpy.dtype:
    """Return the dtype of Index: 64-bit if ``wide``, else 32-bit."""
    return numpy.dtype(numpy.int64 if wide else numpy.int32)


@cache
def dtype_of(name: str, wide: bool) -> numpy.dtype:
    """Return the NumPy dtype of a struct."""
    index, plain = index_dtype(wide), numpy.dtype(numpy.int32)
    fields = [
        (field, index if is_index else plain, (count,) if count else ())
        for field, count, is_index in _FIELDS[name]
    ]  # fmt: skip
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


def text() -> str:
    """Return the declarations of the structs in CUDA."""
    lines = []
    for name, fields in _FIELDS.items():
        members = (
            f"{'Index' if is_index else 'int'} {field}{f'[{count}]' if count else ''};"
            for field, count, is_index in fields
        )
        lines.append(f"struct {name} {{ {' '.join(members)} }};")
    return "\n".join(lines)
