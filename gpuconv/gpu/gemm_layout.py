"""How the matrices of an implicit GEMM lie in memory: which way the lines of their tiles go, and what moves at once.

Kernels move 16 bytes at a time where so many lie side by side and begin at a multiple of 16 bytes, wherever a line
begins; else one element at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from gpuconv.blocking import channels_innermost
from gpuconv.geometry import Geometry
from gpuconv.types import Direction
from gpuconv.views import View, merged

BYTES = 16  # of a chunk: what a thread moves at once
BY_TAP, MOST_TAPS = 4, 32  # in the place of axes: a bit for each tap says whether it is in the image


def together(view: View, length: int, others: Iterable[int]) -> int:
    """How many elements move at once along an axis of this length whose elements lie side by side.

    ``others`` are the axes along which lines begin elsewhere.
    """
    chunk = BYTES // view.itemsize
    steps = (view.steps[axis] for axis in others if view.shape[axis] > 1)
    return chunk if not view.address and math.gcd(chunk, length, *steps) == chunk else 1


def _channels_together(images: View) -> int:
    """The same along the channels of images."""
    if images.shape[-1] > 1 and images.steps[-1] != 1:
        return 1
    return together(images, images.shape[-1], range(images.ndim - 1))


def _positions_together(images: View) -> int:
    """The same along all positions of one image."""
    positions = merged(images.shape[1:-2], images.steps[1:-2])
    if positions is None or positions[1] != 1:
        return 1
    return together(images, positions[0], (0, -2, -1))


class Lines(NamedTuple):
    """Which way the lines of a tile go, and how many elements move at once; 0: each is converted on its way."""

    along_depth: bool
    vector: int


class GemmMatrices(NamedTuple):
    """The matrices of one direction of a convolution, as constants of its kernel."""

    left: Lines
    right: Lines
    result_along_rows: bool
    result_vector: int
    axes: int  # on which windows may reach over the image, or BY_TAP
    taps_innermost: bool  # whether the depth counts taps before channels


def matrices_of(direction: Direction, geometry: Geometry, first: View, second: View, result: View) -> GemmMatrices:
    """Those of views as the algorithms take them: x and w, dy and w, or dy and x; result: y, dx, or sums of dw."""
    if direction == "weight_grad":
        return _of_weight_grad(geometry, first, second, result)
    pointwise = geometry.is_pointwise
    unit_stride = set(geometry.stride) == {1}
    depth_axis, column_axis = (-2, -1) if direction == "forward" else (-1, -2)
    left = _lines(first, along_depth=channels_innermost(first), has_positions=pointwise)
    taps_innermost = not left.along_depth
    right = _weight_lines(second, depth_axis, column_axis, taps_innermost, direction == "forward" or unit_stride)
    along_rows = not channels_innermost(result)
    if along_rows:
        vector = _positions_together(result) if direction == "forward" or unit_stride else 1
    else:
        vector = _channels_together(result)
    leaves = not pointwise if direction == "data_grad" else geometry.reaches_beyond
    axes = BY_TAP if geometry.taps <= MOST_TAPS else geometry.rank
    return GemmMatrices(left, right, along_rows, vector, axes * leaves, taps_innermost)


def _of_weight_grad(geometry: Geometry, dy: View, x: View, sums: View) -> GemmMatrices:
    left = _lines(x, along_depth=not channels_innermost(x), has_positions=geometry.is_pointwise)
    right = _lines(dy, along_depth=not channels_innermost(dy), has_positions=True)
    vector = together(sums, sums.shape[-1], ())
    return GemmMatrices(left, right, False, vector, geometry.rank * geometry.reaches_beyond, False)


def _lines(images: View, along_depth: bool, has_positions: bool) -> Lines:
    """Of images: along their channels where these are innermost, else along their positions, if these are in a row."""
    if channels_innermost(images):
        return Lines(along_depth, _channels_together(images))
    return Lines(along_depth, _positions_together(images) if has_positions else 1)


def _weight_lines(w: View, depth_axis: int, column_axis: int, taps_innermost: bool, all_taps: bool) -> Lines:
    """Of weights; the depth counts the channels of one axis and the taps, all of which are in order or some."""
    taps = range(len(w.shape) - 3)
    inner = [axis for axis in taps if w.shape[axis] > 1] if taps_innermost else []
    depth_step = w.steps[inner[-1]] if inner else w.steps[depth_axis]
    if w.shape[column_axis] > 1 and abs(w.steps[column_axis]) < abs(depth_step):
        others = (*taps, -3, depth_axis)
        vector = together(w, w.shape[column_axis], others) if w.steps[column_axis] == 1 else 1
        return Lines(False, vector)
    if not inner:
        vector = together(w, w.shape[depth_axis], (*taps, -3, column_axis)) if w.steps[depth_axis] == 1 else 1
        return Lines(True, vector)
    axes = (depth_axis, *taps)
    depth = merged(tuple(w.shape[axis] for axis in axes), tuple(w.steps[axis] for axis in axes))
    if depth is None or depth[1] != 1 or not all_taps:
        return Lines(True, 1)
    return Lines(True, together(w, depth[0], (-3, column_axis)))
