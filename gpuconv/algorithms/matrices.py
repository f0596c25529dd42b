"""How the matrices of an implicit GEMM lie in memory: which way the lines of their tiles go, and what moves at once.

Kernels move 16 bytes at a time where so many lie side by side and begin at a multiple of 16 bytes, wherever a line
begins; else one element at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy
from numpy.lib.stride_tricks import as_strided

from gpuconv.algorithms.blocks import merged
from gpuconv.arguments import Shape
from gpuconv.backend import Array, address
from gpuconv.geometry import Direction, Geometry
from gpuconv.operands import Role, canonical

BYTES = 16  # of a chunk: what a thread moves at once
BY_TAP, MOST_TAPS = 4, 32  # in the place of axes: a bit for each tap says whether it is in the image


class View(NamedTuple):
    """A canonical view without its array: (N, *positions, G, channels) of images, (*kernel, G, C/G, F/G) of weights."""

    shape: Shape
    strides: Shape  # in bytes
    dtype: numpy.dtype
    beyond: int  # bytes from a multiple of 16 bytes

    @classmethod
    def of(cls, array: Array) -> View:
        """That of a canonical array."""
        return cls(array.shape, array.strides, array.dtype, address(array) % BYTES)

    @classmethod
    def contiguous(cls, role: Role, dtype: numpy.dtype, geometry: Geometry) -> View:
        """That of a C-contiguous x, w or y in the layout of the geometry, with one batch axis."""
        flat = replace(geometry, batch=(math.prod(geometry.batch),))
        shape = {"x": flat.x_shape, "w": flat.w_shape, "y": flat.y_shape}[role]
        strides = [dtype.itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        view = canonical(as_strided(numpy.empty(1, dtype), shape, strides), role, flat)
        return cls(view.shape, view.strides, dtype, 0)

    @property
    def steps(self) -> Shape:
        """Strides in elements."""
        return tuple(stride // self.dtype.itemsize for stride in self.strides)

    @property
    def channels_innermost(self) -> bool:
        """Of images: whether channels lie closer together than positions."""
        channel = self.steps[-1] if self.shape[-1] > 1 else self.steps[-2]
        return abs(channel) < abs(self.steps[-3])

    def together(self, length: int, others: Iterable[int]) -> int:
        """How many elements move at once along an axis of this length whose elements lie side by side.

        ``others`` are the axes along which lines begin elsewhere.
        """
        chunk = BYTES // self.dtype.itemsize
        steps = (self.steps[axis] for axis in others if self.shape[axis] > 1)
        return chunk if not self.beyond and math.gcd(chunk, length, *steps) == chunk else 1

    def channels_together(self) -> int:
        """Of images, along their channels."""
        if self.shape[-1] > 1 and self.steps[-1] != 1:
            return 1
        return self.together(self.shape[-1], range(len(self.shape) - 1))

    def positions_together(self) -> int:
        """Of images, along all positions of one image."""
        positions = merged(self.shape[1:-2], self.steps[1:-2])
        if positions is None or positions[1] != 1:
            return 1
        return self.together(positions[0], (0, -2, -1))


class Lines(NamedTuple):
    """Which way the lines of a tile go, and how many elements move at once; 0: each is converted on its way."""

    along_depth: bool
    vector: int


class Matrices(NamedTuple):
    """The matrices of one direction of a convolution, as constants of its kernel."""

    left: Lines
    right: Lines
    result_along_rows: bool
    result_vector: int
    axes: int  # on which windows may reach over the image, or BY_TAP
    taps_innermost: bool  # whether the depth counts taps before channels


def matrices_of(direction: Direction, geometry: Geometry, first: View, second: View, result: View) -> Matrices:
    """Those of views as the algorithms take them: x and w, dy and w, or dy and x; result: y, dx, or sums of dw."""
    if direction == "weight_grad":
        return _of_weight_grad(geometry, first, second, result)
    pointwise = geometry.is_pointwise
    unit_stride = set(geometry.stride) == {1}
    depth_axis, column_axis = (-2, -1) if direction == "forward" else (-1, -2)
    left = _lines(first, along_depth=first.channels_innermost, has_positions=pointwise)
    taps_innermost = not left.along_depth
    right = _weight_lines(second, depth_axis, column_axis, taps_innermost, direction == "forward" or unit_stride)
    along_rows = not result.channels_innermost
    if along_rows:
        vector = result.positions_together() if direction == "forward" or unit_stride else 1
    else:
        vector = result.channels_together()
    leaves = not pointwise if direction == "data_grad" else _leaves(geometry)
    axes = BY_TAP if geometry.taps <= MOST_TAPS else geometry.rank
    return Matrices(left, right, along_rows, vector, axes * leaves, taps_innermost)


def _of_weight_grad(geometry: Geometry, dy: View, x: View, sums: View) -> Matrices:
    left = _lines(x, along_depth=not x.channels_innermost, has_positions=geometry.is_pointwise)
    right = _lines(dy, along_depth=not dy.channels_innermost, has_positions=True)
    vector = sums.together(sums.shape[-1], ())
    return Matrices(left, right, False, vector, geometry.rank * _leaves(geometry), False)


def _lines(images: View, along_depth: bool, has_positions: bool) -> Lines:
    """Of images: along their channels where these are innermost, else along their positions, if these are in a row."""
    if images.channels_innermost:
        return Lines(along_depth, images.channels_together())
    return Lines(along_depth, images.positions_together() if has_positions else 1)


def _weight_lines(w: View, depth_axis: int, column_axis: int, taps_innermost: bool, all_taps: bool) -> Lines:
    """Of weights; the depth counts the channels of one axis and the taps, all of which are in order or some."""
    taps = range(len(w.shape) - 3)
    inner = [axis for axis in taps if w.shape[axis] > 1] if taps_innermost else []
    depth_step = w.steps[inner[-1]] if inner else w.steps[depth_axis]
    if w.shape[column_axis] > 1 and abs(w.steps[column_axis]) < abs(depth_step):
        others = (*taps, -3, depth_axis)
        vector = w.together(w.shape[column_axis], others) if w.steps[column_axis] == 1 else 1
        return Lines(False, vector)
    if not inner:
        vector = w.together(w.shape[depth_axis], (*taps, -3, column_axis)) if w.steps[depth_axis] == 1 else 1
        return Lines(True, vector)
    axes = (depth_axis, *taps)
    depth = merged(tuple(w.shape[axis] for axis in axes), tuple(w.steps[axis] for axis in axes))
    if depth is None or depth[1] != 1 or not all_taps:
        return Lines(True, 1)
    return Lines(True, w.together(depth[0], (-3, column_axis)))


def _leaves(geometry: Geometry) -> bool:
    """Whether a window may reach over the image."""
    axes = zip(
        geometry.input, geometry.output, geometry.kernel, geometry.stride, geometry.dilation, geometry.padding,
        strict=True,
    )  # fmt: skip
    return any(low > 0 or (m - 1) * s + (k - 1) * d - low >= n for n, m, k, s, d, (low, _) in axes)
