"""What an algorithm reads and writes: every array as a view with one order of axes, whatever its layout.

    x   (*batch, *input, G, C/G)        w   (*kernel, G, C/G, F/G)        y   (*batch, *output, G, F/G)

Layouts, flipped kernels and memory orders end here: they are strides of these views, and no algorithm knows of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy

from gpuconv import activations
from gpuconv.arguments import Shape
from gpuconv.geometry import Geometry
from gpuconv.plan import Planner
from gpuconv.types import Activation
from gpuconv.views import View, contiguous_strides, is_contiguous

MOST_TEMPORARIES = 3  # that reading an operand or finishing a result takes

Role: TypeAlias = Literal["x", "w", "y", "b"]
Index: TypeAlias = tuple[Any, ...]  # slices of a canonical view, an Ellipsis among them


# What each direction reads and writes, and which of a convolution's arrays that is.
ARRAYS = {
    "forward": ("x", "w", "y"),
    "data_grad": ("dy", "w", "dx"),
    "weight_grad": ("dy", "x", "dw"),
    "bias_grad": ("dy", "b", "db"),
}
ROLES: dict[str, Any] = {direction: tuple(name[-1] for name in names) for direction, names in ARRAYS.items()}


def canonical(array: Any, role: Role, geometry: Geometry) -> Any:
    """The view of x, w or y (or of its gradient) with the order of axes above; of a bias, (G, channels / G)."""
    if role == "b":
        return array.reshape(geometry.groups, -1)
    if role == "w":
        return _canonical_weight(array, geometry)
    if geometry.layout == "channels_first":
        channel = len(geometry.batch)
        array = array.transpose(*range(channel), *range(channel + 1, array.ndim), channel)
    return array.reshape(*array.shape[:-1], geometry.groups, array.shape[-1] // geometry.groups)


def _canonical_weight(w: Any, geometry: Geometry) -> Any:
    rank, groups = geometry.rank, geometry.groups
    if geometry.layout == "channels_first":
        split = w.reshape(groups, geometry.group_filters, *w.shape[1:])  # (G, F/G, C/G, *kernel)
        w = split.transpose(*range(3, rank + 3), 0, 2, 1)
    else:
        w = w.reshape(*w.shape[:-1], groups, geometry.group_filters).swapaxes(-3, -2)
    return w[(slice(None, None, -1),) * rank] if geometry.flip else w


def _groups_index(groups: slice, role: Role) -> Index:
    return (..., groups, slice(None), slice(None)) if role == "w" else (..., groups, slice(None))


def contiguous(role: Role, dtype: numpy.dtype, geometry: Geometry) -> View:
    """The canonical view of a C-contiguous x, w or y, with one batch axis."""
    flat = replace(geometry, batch=(math.prod(geometry.batch),))
    shape = flat.shape_of(role)
    view: View = canonical(View(0, 0, shape, contiguous_strides(shape, dtype), dtype), role, flat)
    return view


def has_channels_last_memory(shape: Shape, strides: Shape, itemsize: int, geometry: Geometry) -> bool:
    """Whether a channels_first array lies in memory as a contiguous channels_last one (and not as both)."""
    if geometry.layout == "channels_last" or is_contiguous(shape, strides, itemsize):
        return False
    channel = len(geometry.batch)
    shape, strides = ((*axes[:channel], *axes[channel + 1 :], axes[channel]) for axes in (shape, strides))
    return is_contiguous(shape, strides, itemsize)


def in_place(view: View, dtype: numpy.dtype) -> bool:
    """Whether sums of this dtype can be read from, or formed in, an array's own memory."""
    return view.dtype == dtype and view.is_aligned


@dataclass(frozen=True)
class Operand:
    """An array to read, in pieces, in the dtype of the sums."""

    view: View
    conjugate: bool = False
    y: View | None = None  # the canonical view of y, where the derivative of an activation multiplies what is read
    activation: Activation | None = None

    def is_plain(self, dtype: numpy.dtype) -> bool:
        """Whether a piece can be used where it lies."""
        return in_place(self.view, dtype) and not self.conjugate and self.activation is None

    @property
    def temporaries(self) -> int:
        """How many arrays of a piece's size a read takes for itself, beside the one that it fills."""
        return 0 if self.activation is None else MOST_TEMPORARIES

    def read(self, index: Index, into: View, planner: Planner) -> None:
        """Puts the piece into an array of its shape."""
        planner.copy(into, self.view[index])
        if self.conjugate:
            planner.call(planner.xp.conjugate, into, out=into)
        if self.y is not None:
            planner.call(activations.apply_derivative, into, self.y[index], self.activation, planner.xp)

    def of_groups(self, groups: slice, role: Role) -> Operand:
        """The operand as far as some of the groups go."""
        return self.seen(lambda view: view[_groups_index(groups, role)])

    def of_images(self, images: Any) -> Operand:
        """The operand as far as some images go: an index of its first axes."""
        return self.seen(lambda view: view[images])

    def of_channels(self, channels: slice) -> Operand:
        """The operand as far as some channels of every group go."""
        return self.seen(lambda view: view[..., channels])

    def part(self, view: View) -> Operand:
        """The same with another view of the array."""
        return replace(self, view=view)

    def seen(self, arrange: Callable[[View], View]) -> Operand:
        """The same with its elements in another arrangement."""
        return replace(self, view=arrange(self.view), y=None if self.y is None else arrange(self.y))


@dataclass(frozen=True)
class Result:
    """An array to write, in pieces; each element is written once, after bias and activation."""

    view: View
    bias: View | None = None  # (G, channels / G), in the dtype of the sums
    activation: Activation | None = None

    @property
    def temporaries(self) -> int:
        """How many arrays of a block's size finishing it takes."""
        return 1 if self.activation == "leaky_relu" else 0

    def finish(self, block: View, planner: Planner, filters: slice = slice(None)) -> None:
        """Adds the bias to a block of sums, the last axes of which are (G, filters), and activates it, in place."""
        if self.bias is not None:
            planner.call(planner.xp.add, block, self.bias[:, filters], out=block)
        if self.activation is not None:
            planner.call(activations.apply, block, self.activation, planner.xp)

    def store(self, block: View, target: View, planner: Planner, filters: slice = slice(None)) -> None:
        """Finishes a block of sums and puts it into a part of the result, unless it lies there."""
        self.finish(block, planner, filters)
        if block is not target:
            planner.copy(target, block)

    def fill(self, planner: Planner) -> None:
        """What every element is that no product reaches."""
        planner.copy(self.view, 0)
        if self.bias is not None or self.activation == "sigmoid":
            (flat,) = planner.workspace(math.prod(self.view.shape[-2:]))
            block = flat.shaped(self.view.shape[-2:])
            planner.copy(block, 0)
            self.finish(block, planner)
            planner.copy(self.view, block)

    def with_plain_bias(self, planner: Planner) -> Result:
        """The same with the bias where algorithms can read it: C-contiguous, in the dtype of the sums."""
        bias = self.bias
        if bias is None or (in_place(bias, planner.dtype) and is_contiguous(bias.shape, bias.strides, bias.itemsize)):
            return self
        (flat,) = planner.workspace(bias.size)
        planner.copy(flat.shaped(bias.shape), bias)
        return replace(self, bias=flat.shaped(bias.shape))

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
