"""Operands and results of algorithms: views with one order of axes for all layouts.

    x   (*batch, *input, G, C/G)        w   (*kernel, G, C/G, F/G)        y   (*batch, *output, G, F/G)

Layouts, flipped kernels and memory orders are expressed by the strides of these views, so that algorithms need no code
of their own for them.
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

MOST_TEMPORARIES = 3  # of reading an operand or finishing a result

Role: TypeAlias = Literal["x", "w", "y", "b"]
Index: TypeAlias = tuple[Any, ...]  # of a canonical view: slices and ints, possibly with an Ellipsis


# The arrays that each direction reads and writes, and their roles: x, w, y or b.
ARRAYS = {
    "forward": ("x", "w", "y"),
    "data_grad": ("dy", "w", "dx"),
    "weight_grad": ("dy", "x", "dw"),
    "bias_grad": ("dy", "b", "db"),
}
ROLES: dict[str, Any] = {direction: tuple(name[-1] for name in names) for direction, names in ARRAYS.items()}


def canonical(array: Any, role: Role, geometry: Geometry) -> Any:
    """Return the view of x, w, y or their gradients in the order of axes above; for a bias, (G, channels / G)."""
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
    """Return the canonical view of a C-contiguous x, w or y with one batch axis."""
    flat = replace(geometry, batch=(math.prod(geometry.batch),))
    shape = flat.shape_of(role)
    view: View = canonical(View(0, 0, shape, contiguous_strides(shape, dtype), dtype), role, flat)
    return view


def has_channels_last_memory(shape: Shape, strides: Shape, itemsize: int, geometry: Geometry) -> bool:
    """Return whether the memory of a channels_first array is contiguous as channels_last (and not as both)."""
    if geometry.layout == "channels_last" or is_contiguous(shape, strides, itemsize):
        return False
    channel = len(geometry.batch)
    shape, strides = ((*axes[:channel], *axes[channel + 1 :], axes[channel]) for axes in (shape, strides))
    return is_contiguous(shape, strides, itemsize)


def in_place(view: View, dtype: numpy.dtype) -> bool:
    """Return whether sums of this dtype can be read from, or computed in, an array's own memory."""
    return view.dtype == dtype and view.is_aligned


@dataclass(frozen=True)
class Operand:
    """An array that is read in pieces, in the dtype of the sums."""

    view: View
    conjugate: bool = False
    y: View | None = None  # the canonical view of y, if the data is multiplied by the derivative of an activation
    activation: Activation | None = None

    def is_plain(self, dtype: numpy.dtype) -> bool:
        """Return whether a piece can be used in place."""
        return in_place(self.view, dtype) and not self.conjugate and self.activation is None

    @property
    def temporaries(self) -> int:
        """The number of arrays of a piece's size that a read allocates beside the one that it fills."""
        return 0 if self.activation is None else MOST_TEMPORARIES

    def read(self, index: Index, into: View, planner: Planner) -> None:
        """Read the piece into an array of its shape."""
        planner.copy(into, self.view[index])
        if self.conjugate:
            planner.call(planner.xp.conjugate, into, out=into)
        if self.y is not None:
            planner.call(activations.apply_derivative, into, self.y[index], self.activation, planner.xp)

    def packed(self, shape: Shape, planner: Planner) -> Operand:
        """Return a contiguous copy in workspace, padded with zeros to a shape."""
        (space,) = planner.workspace(math.prod(shape), dtype=self.view.dtype)
        block = space.shaped(shape)
        if shape != self.view.shape:
            planner.copy(block, 0)
        planner.copy(block[tuple(map(slice, self.view.shape))], self.view)
        return Operand(block)

    def of_groups(self, groups: slice, role: Role) -> Operand:
        """Return the operand restricted to some groups."""
        return self.seen(lambda view: view[_groups_index(groups, role)])

    def of_images(self, images: Any) -> Operand:
        """Return the operand restricted to some images, given by an index of its first axes."""
        return self.seen(lambda view: view[images])

    def of_channels(self, channels: slice) -> Operand:
        """Return the operand restricted to some channels of every group."""
        return self.seen(lambda view: view[..., channels])

    def part(self, view: View) -> Operand:
        """Return the operand with another view of the array."""
        return replace(self, view=view)

    def seen(self, arrange: Callable[[View], View]) -> Operand:
        """Return the operand with its views rearranged by ``arrange``."""
        return replace(self, view=arrange(self.view), y=None if self.y is None else arrange(self.y))


@dataclass(frozen=True)
class Result:
    """An array that is written in pieces; each element is written once, after bias and activation."""

    view: View
    bias: View | None = None  # (G, channels / G), in the dtype of the sums
    activation: Activation | None = None

    @property
    def temporaries(self) -> int:
        """The number of arrays of a block's size that :meth:`finish` allocates."""
        return 1 if self.activation == "leaky_relu" else 0

    def finish(self, block: View, planner: Planner, filters: slice = slice(None)) -> None:
        """Add the bias to a block of sums with last axes (G, filters), and apply the activation, in place."""
        if self.bias is not None:
            planner.call(planner.xp.add, block, self.bias[:, filters], out=block)
        if self.activation is not None:
            planner.call(activations.apply, block, self.activation, planner.xp)

    def store(self, block: View, target: View, planner: Planner, filters: slice = slice(None)) -> None:
        """Finish a block of sums and copy it into a part of the result, unless it is there already."""
        self.finish(block, planner, filters)
        if block is not target:
            planner.copy(target, block)

    def fill(self, planner: Planner) -> None:
        """Set every element to its value without any product: the bias, after the activation."""
        planner.copy(self.view, 0)
        if self.bias is not None or self.activation == "sigmoid":
            (flat,) = planner.workspace(math.prod(self.view.shape[-2:]))
            block = flat.shaped(self.view.shape[-2:])
            planner.copy(block, 0)
            self.finish(block, planner)
            planner.copy(self.view, block)

    def with_plain_bias(self, planner: Planner) -> Result:
        """Return the result with a bias that algorithms can read: C-contiguous, in the dtype of the sums."""
        bias = self.bias
        if bias is None or (in_place(bias, planner.dtype) and is_contiguous(bias.shape, bias.strides, bias.itemsize)):
            return self
        (flat,) = planner.workspace(bias.size)
        planner.copy(flat.shaped(bias.shape), bias)
        return replace(self, bias=flat.shaped(bias.shape))

    def of_groups(self, groups: slice, role: Role) -> Result:
        """Return the result restricted to some groups."""
        bias = None if self.bias is None else self.bias[groups]
        return replace(self, view=self.view[_groups_index(groups, role)], bias=bias)

    def of_channels(self, channels: slice) -> Result:
        """Return the result restricted to some channels of every group."""
        bias = None if self.bias is None else self.bias[:, channels]
        return replace(self, view=self.view[..., channels], bias=bias)

    def part(self, index: Index) -> Result:
        """Return the part of the result at this index."""
        return replace(self, view=self.view[index])
