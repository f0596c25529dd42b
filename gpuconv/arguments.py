"""Conversion of shapes, strides and paddings, as callers write them, to one form each.

Equal settings become equal tuples, so that a Geometry made of them can be a key.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias, get_args

from gpuconv.types import Layout, PaddingMode, PaddingName

Shape: TypeAlias = tuple[int, ...]
Pairs: TypeAlias = tuple[tuple[int, int], ...]

LAYOUTS: tuple[Layout, ...] = get_args(Layout)
# NumPy's arrays have 64 axes, and a view of windows has two for every spatial one.
MOST_AXES = 28

# Beyond this no array has an extent; products of these fit the 64 bits of a stride.
LARGEST = 2**31 - 1

PADDING_NAMES: tuple[PaddingName, ...] = get_args(PaddingName)
PADDING_MODES: tuple[PaddingMode, ...] = get_args(PaddingMode)


_PLAIN = frozenset((int, bool, str))


def are_plain(values: Iterable[object]) -> bool:
    """Whether all values are of Python's own types, so that equal values mean the same."""
    for value in values:
        if type(value) is tuple:
            for item in value:
                if type(item) is not int:
                    return False
        elif type(value) not in _PLAIN:
            return False
    return True


def shape_of(value: Any, name: str) -> Shape:
    """Return a caller's shape as a tuple of Python ints."""
    if getattr(value, "ndim", 1) != 1:
        raise TypeError(f"{name} must be a shape, not an array; that of this one is {value.shape}")
    try:
        shape = tuple(integer(extent, name) for extent in value)
    except TypeError:
        raise TypeError(f"{name} must be a shape, a sequence of ints, not {value!r}") from None
    if any(extent < 0 for extent in shape):
        raise ValueError(f"{name} must have no negative extent, got {shape}")
    return shape


def integer(value: object, name: str) -> int:
    """Return an int, or what NumPy accepts as one; bool is refused."""
    try:
        if isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be made of ints, got {value!r}") from None
    if abs(number) > LARGEST:
        raise ValueError(f"{name} must be between -{LARGEST} and {LARGEST}, got {value!r}")
    return number


def _is_sequence(value: object) -> bool:
    if isinstance(value, (str, bytes, dict, set)) or getattr(value, "ndim", None) == 0:
        return False
    return hasattr(value, "__len__") and hasattr(value, "__iter__")


def per_axis(value: object, rank: int, name: str, minimum: int) -> Shape:
    """Return an int, or one int per axis, as one int per axis."""
    if _is_sequence(value):
        items: Shape = tuple(integer(item, name) for item in value)  # type: ignore[attr-defined]
        if len(items) != rank:
            raise ValueError(f"{name} must be an int or one int per spatial axis: {rank} expected, got {value!r}")
    elif isinstance(value, (str, bytes, dict, set)):
        raise TypeError(f"{name} must be an int or one int per spatial axis, got {value!r}")
    else:
        items = (integer(value, name),) * rank
    if any(item < minimum for item in items):
        raise ValueError(f"{name} must be at least {minimum}, got {value!r}")
    return items


def _padding(value: object, rank: int) -> Pairs | str:
    """Return the padding as (low, high) for every axis, or the name of a rule."""
    if isinstance(value, str):
        if value not in PADDING_NAMES:
            raise ValueError(
                f"padding must be an int, one int or (low, high) per axis, or one of {', '.join(PADDING_NAMES)};"
                f" got {value!r}"
            )
        return value
    if not _is_sequence(value):
        size = integer(value, "padding")
        return ((size, size),) * rank
    items = tuple(value)  # type: ignore[arg-type, var-annotated]
    if len(items) != rank:
        is_flat = len(items) == 2 * rank and not any(_is_sequence(item) for item in items)
        pairs_of_axes = tuple(zip(items[::2], items[1::2], strict=False))
        hint = f"; low and high of each axis are written {pairs_of_axes}" if is_flat else ""
        raise ValueError(
            f"padding must have one int or one (low, high) pair per spatial axis: {rank} expected, got {value!r}{hint}"
        )
    if not any(_is_sequence(item) for item in items):
        return tuple((integer(item, "padding"),) * 2 for item in items)
    pairs = []
    for item in items:
        if not _is_sequence(item) or len(item) != 2:
            raise ValueError(f"padding must be ints or (low, high) pairs throughout, got {value!r}")
        pairs.append((integer(item[0], "padding"), integer(item[1], "padding")))
    return tuple(pairs)


class Settings(NamedTuple):
    """The settings of a convolution in one form each, so that equal convolutions are equal keys."""

    stride: Shape
    padding: Pairs | str  # or the name of a rule
    dilation: Shape
    groups: int
    layout: Layout
    flip: bool
    padding_mode: PaddingMode


def geometry_settings(w_shape: Shape, w_name: str, *written: Any) -> Settings:
    """Return the settings that a caller has written, in the order of :class:`Settings`."""
    stride, padding, dilation, groups, layout, flip, padding_mode = written
    rank = len(w_shape) - 2
    if rank > MOST_AXES:
        raise ValueError(f"{w_name} must have at most {MOST_AXES} spatial axes, got shape {w_shape}")
    if rank < 1:
        hint = f"; one filter of one channel is {with_axes(w_name, 2, layout)}" if w_shape else ""
        raise ValueError(
            f"{w_name} must have two channel axes and at least one spatial axis, got shape {w_shape}{hint}"
        )
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")
    if not isinstance(flip, bool) and type(flip).__name__ not in ("bool", "bool_"):
        raise TypeError(f"flip must be True or False, got {flip!r}")
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"padding_mode must be one of {', '.join(PADDING_MODES)}; got {padding_mode!r}")
    count = integer(groups, "groups")
    if count < 1:
        raise ValueError(f"groups must be at least 1, got {groups!r}")
    return Settings(
        per_axis(stride, rank, "stride", minimum=1),
        _padding(padding, rank),
        per_axis(dilation, rank, "dilation", minimum=1),
        count,
        layout,
        bool(flip),
        padding_mode,
    )


def with_axes(name: str, number: int, layout: object) -> str:
    """Return the expression that adds channel axes to an array without any."""
    name, axes = name.removesuffix("_shape"), ", ".join(["None"] * number)
    return f"{name}[..., {axes}]" if layout == "channels_last" else f"{name}[{axes}]"
