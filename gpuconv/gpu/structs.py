"""The structs that kernels take by value: one description for NumPy, which fills them, and for CUDA, which reads them.

Extents and strides are of type Index: 32 bits wide, or 64 where a tensor needs it.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple, TypeAlias

import numpy

AXES = 3  # kernels see three spatial axes; fewer are lifted by axes of extent 1 in front

# Struct, field, how many (0: one, not an array), and whether the field is an Index or a plain int.
_FIELDS: dict[str, tuple[tuple[str, int, bool], ...]] = {
    "Convolution": (
        *((name, 0, True) for name in ("N", "G", "C", "F")),  # images, groups, and channels and filters of a group
        *((name, AXES, True) for name in ("input", "output", "kernel", "stride", "dilation", "low")),
    ),
    "Images": (("batch", 0, True), ("axis", AXES, True), ("group", 0, True), ("channel", 0, True)),
    "Weights": (("axis", AXES, True), ("group", 0, True), ("channel", 0, True), ("filter", 0, True)),
    "Boxes": (("outputs", AXES, False), ("taps", AXES, False), ("region", AXES, False)),
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
    """The dtype of Index."""
    return numpy.dtype(numpy.int64 if wide else numpy.int32)


@cache
def dtype_of(name: str, wide: bool) -> numpy.dtype:
    """The struct as NumPy sees it."""
    index, plain = index_dtype(wide), numpy.dtype(numpy.int32)
    fields = [
        (field, index if is_index else plain, (count,) if count else ())
        for field, count, is_index in _FIELDS[name]
    ]  # fmt: skip
    return numpy.dtype(fields, align=True)


def struct(name: str, wide: bool, *values: Value) -> numpy.ndarray:
    """The struct with these values, in the order of its fields: an array without axes, as CuPy passes by value."""
    value = numpy.array(values, dtype_of(name, wide))
    value.setflags(write=False)
    return value


class Options(NamedTuple):
    """The choices that a kernel is launched with. Activations are numbered as in activations.NAMES, from 1 on."""

    first_conjugated: bool
    first_derivative: int  # of the activation that the first operand is multiplied by
    second_conjugated: bool
    second_derivative: int
    channels_innermost: bool  # of the array that decides which elements the threads of a warp meet
    has_bias: bool = False
    activation: int = 0
    fours: bool = False  # whether results may be added to four at a time

    def struct(self, wide: bool) -> numpy.ndarray:
        """What the kernel takes."""
        return struct("Options", wide, *self)


def text() -> str:
    """The structs as CUDA sees them."""
    lines = []
    for name, fields in _FIELDS.items():
        members = (
            f"{'Index' if is_index else 'int'} {field}{f'[{count}]' if count else ''};"
            for field, count, is_index in fields
        )
        lines.append(f"struct {name} {{ {' '.join(members)} }};")
    return "\n".join(lines)
