"""Memory layout of the matrices of an implicit GEMM: the direction of the lines of a tile, and the vector width.

Kernels load and store 16, 8 or 4 bytes at a time: the largest size by which every line is aligned and of which it
consists. Where not even two elements of 16 bits are contiguous and aligned, they are loaded one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from gpuconv.blocking import channels_innermost
from gpuconv.geometry import Geometry
from gpuconv.types import Direction
from gpuconv.views import View, merged

BYTES = 16  # of the longest vector: what a thread loads or stores at a time
# BY_TAP replaces the number of axes: a bit mask of at most MOST_TAPS taps tells which of them are in bounds.
BY_TAP, MOST_TAPS = 4, 32


def together(view: View, length: int, others: Iterable[int]) -> int:
    """Return the vector width, in elements, along a contiguous axis of this length.

    ``others`` are the other axes; their strides determine where lines begin.
    """
    steps = (view.steps[axis] for axis in others if view.shape[axis] > 1)
    return math.gcd(BYTES // view.itemsize, length, view.address // view.itemsize, *steps)


def _channels_together(images: View) -> int:
    """Return the vector width along the channels of images."""
    if images.shape[-1] > 1 and images.steps[-1] != 1:
        return 1
    return together(images, images.shape[-1], range(images.ndim - 1))


def _positions_together(images: View) -> int:
    """Return the vector width along all positions of one image."""
    positions = merged(images.shape[1:-2], images.steps[1:-2])
    if positions is None or positions[1] != 1:
        return 1
    return together(images, positions[0], (0, -2, -1))


class Lines(NamedTuple):
    """The direction of the lines of a tile and the vector width. Width 0: each element is converted on load."""

    along_depth: bool
    vector: int


class GemmMatrices(NamedTuple):
    """Layout of the matrices of one direction of a convolution, as compile-time constants of its kernel."""

    left: Lines
    right: Lines
    result_along_rows: bool
    result_vector: int
    axes: int  # number of axes on which windows may be out of bounds, or BY_TAP
    taps_innermost: bool  # whether taps vary faster than channels along the depth


def matrices_of(direction: Direction, geometry: Geometry, first: View, second: View, result: View) -> GemmMatrices:
    """Return the matrices of canonical views: x and w, dy and w, or dy and x; the result is y, dx, or sums of dw."""
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
    """Return the lines of images: along the channels if these are innermost, else along contiguous positions."""
    if channels_innermost(images):
        return Lines(along_depth, _channels_together(images))
    return Lines(along_depth, _positions_together(images) if has_positions else 1)


def _weight_lines(w: View, depth_axis: int, column_axis: int, taps_innermost: bool, all_taps: bool) -> Lines:
    """Return the lines of weights, whose depth consists of one axis of channels and the taps.

    ``all_taps`` tells whether the depth contains all taps in order, or only some of them.
    """
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
