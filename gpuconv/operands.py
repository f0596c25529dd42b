"""What an algorithm reads and writes: every array as a view with one order of axes, whatever its layout.

    x   (*batch, *input, G, C/G)        w   (*kernel, G, C/G, F/G)        y   (*batch, *output, G, F/G)

Layouts, flipped kernels and memory orders end here: they are strides of these views, and no algorithm knows of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy

from gpuconv import activations
from gpuconv.backend import Array
from gpuconv.geometry import Geometry

MOST_TEMPORARIES = 3  # that reading an operand or finishing a result takes

Role: TypeAlias = Literal["x", "w", "y"]
Index: TypeAlias = tuple[Any, ...]  # slices of a canonical view, an Ellipsis among them


def canonical(array: Array, role: Role, geometry: Geometry) -> Array:
    """The view of x, w or y (or of its gradient) with the order of axes above."""
    if role == "w":
        return _canonical_weight(array, geometry)
    if geometry.layout == "channels_first":
        channel = len(geometry.batch)
        array = array.transpose(*range(channel), *range(channel + 1, array.ndim), channel)
    return array.reshape(*array.shape[:-1], geometry.groups, array.shape[-1] // geometry.groups)


def _canonical_weight(w: Array, geometry: Geometry) -> Array:
    rank, groups = geometry.rank, geometry.groups
    if geometry.layout == "channels_first":
        split = w.reshape(groups, geometry.group_filters, *w.shape[1:])  # (G, F/G, C/G, *kernel)
        w = split.transpose(*range(3, rank + 3), 0, 2, 1)
    else:
        w = w.reshape(*w.shape[:-1], groups, geometry.group_filters).swapaxes(-3, -2)
    return w[(slice(None, None, -1),) * rank] if geometry.flip else w


def _groups_index(groups: slice, role: Role) -> Index:
    return (..., groups, slice(None), slice(None)) if role == "w" else (..., groups, slice(None))


def in_place(view: Array, dtype: numpy.dtype) -> bool:
    """Whether sums of this dtype can be read from, or formed in, an array's own memory."""
    return bool(view.dtype == dtype and getattr(view.flags, "aligned", True))


@dataclass(frozen=True)
class Operand:
    """An array to read, in pieces, in the dtype of the sums."""

    view: Array
    conjugate: bool = False
    y: Array | None = None  # the canonical view of y, where the derivative of an activation multiplies what is read
    activation: activations.Activation | None = None

    def is_plain(self, dtype: numpy.dtype) -> bool:
        """Whether a piece can be used where it lies."""
        return in_place(self.view, dtype) and not self.conjugate and self.activation is None

    @property
    def temporaries(self) -> int:
        """How many arrays of a piece's size a read takes for itself, beside the one that it fills."""
        return 0 if self.activation is None else MOST_TEMPORARIES

    def read(self, xp: Any, index: Index, into: Array) -> None:
        """Puts the piece into an array of its shape."""
        xp.copyto(into, self.view[index], casting="unsafe")
        if self.conjugate:
            xp.conjugate(into, out=into)
        if self.activation is not None:
            activations.apply_derivative(xp, self.activation, into, self.y[index].astype(into.dtype, copy=False))  # type: ignore[index]

    def of_groups(self, groups: slice, role: Role) -> Operand:
        """The operand as far as some of the groups go."""
        y = None if self.y is None else self.y[_groups_index(groups, role)]
        return replace(self, view=self.view[_groups_index(groups, role)], y=y)

    def of_images(self, images: Any) -> Operand:
        """The operand as far as some images go: an index of its first axes."""
        return replace(self, view=self.view[images], y=None if self.y is None else self.y[images])

    def of_channels(self, channels: slice) -> Operand:
        """The operand as far as some channels of every group go."""
        return replace(self, view=self.view[..., channels], y=None if self.y is None else self.y[..., channels])

    def part(self, view: Array) -> Operand:
        """The same with another view of the array."""
        return replace(self, view=view)

    def seen(self, arrange: Callable[[Array], Array]) -> Operand:
        """The same with its elements in another arrangement."""
        return replace(self, view=arrange(self.view), y=None if self.y is None else arrange(self.y))


@dataclass(frozen=True)
class Result:
    """An array to write, in pieces; each element is written once, after bias and activation."""

    view: Array
    bias: Array | None = None  # (G, channels / G), in the dtype of the sums
    activation: activations.Activation | None = None

    @property
    def temporaries(self) -> int:
        """How many arrays of a block's size finishing it takes."""
        return 1 if self.activation == "leaky_relu" else 0

    def finish(self, xp: Any, block: Array, filters: slice = slice(None)) -> None:
        """Adds the bias to a block of sums, the last axes of which are (G, filters), and activates it, in place."""
        if self.bias is not None:
            xp.add(block, self.bias[:, filters], out=block)
        activations.apply(xp, self.activation, block)

    def fill(self, xp: Any) -> None:
        """What every element is that no product reaches."""
        xp.copyto(self.view, 0)
        if self.bias is not None or self.activation == "sigmoid":
            block = xp.zeros(self.view.shape[-2:], self.view.dtype if self.bias is None else self.bias.dtype)
            self.finish(xp, block)
            self.view[...] = block

    def of_groups(self, groups: slice, role: Role) -> Result:
        """The result as far as some of the groups go."""
        bias = None if self.bias is None else self.bias[groups]
        return replace(self, view=self.view[_groups_index(groups, role)], bias=bias)

    def of_channels(self, channels: slice) -> Result:
        """The result as far as some channels of every group go."""
        bias = None if self.bias is None else self.bias[:, channels]
        return replace(self, view=self.view[..., channels], bias=bias)

    def part(self, index: Index) -> Result:
        """The result as far as this index goes."""
        return replace(self, view=self.view[index])
