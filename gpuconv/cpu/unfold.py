"""The windows of x unfolded into a matrix, a block of outputs at a time.

A block has the memory order of x: ``cols`` has a row per output if the channels of x are innermost, and a column per
output if a spatial axis is. So neither memory order is transposed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from gpuconv.arguments import Shape
from gpuconv.blocking import (
    Arrangement,
    Blocks,
    Buffer,
    Buffers,
    Places,
    channels_innermost,
    copy_weights,
    lies_by_filters,
)
from gpuconv.cpu.windows import read_tap, region_elements, sliding, windows_of
from gpuconv.geometry import Geometry
from gpuconv.operands import Index, Operand
from gpuconv.plan import Planner
from gpuconv.types import Direction
from gpuconv.views import View

# Larger blocks have longer products, smaller blocks stay in the cache.
BLOCK_BYTES = 8 << 20
# Below this many outputs per image, the images of a block share one product, and the result is copied into place.
SHORT_PRODUCT = 256


class Order(NamedTuple):
    """Arrangements of the windows (*batch, *output, *kernel, G, C/G) of x, of y and of w as stacks of G matrices."""

    by_rows: bool  # a row of cols per output, else a column
    windows: Arrangement
    images: Arrangement
    weights: Arrangement

    def load_weights(self, w: Operand, flat: View, planner: Planner) -> View:
        """Return w as matrices, in place if possible, else copied by all threads.

        A copy keeps contiguous elements contiguous.
        """
        if not self.weights.copies(w, planner):
            return self.weights.load(w, (...,), flat, planner)
        turn = self.by_rows == lies_by_filters(w.view)
        block, matrix = (self.weights.turned if turn else self.weights).empty(w.view.shape, flat)
        copy_weights(w, block, planner)
        return matrix.swapaxes(-1, -2) if turn else matrix


def _order(batch: int, rank: int, by_rows: bool, stack: bool, taps_first: bool) -> Order:
    positions = tuple(range(batch + rank))
    kernel = tuple(range(batch + rank, batch + 2 * rank))
    taps = tuple(range(rank))
    if by_rows:
        return Order(
            True,
            Arrangement((kernel[-1] + 1, *positions, *kernel, kernel[-1] + 2), batch + rank, rank + 1),
            Arrangement((batch + rank, *positions, batch + rank + 1), batch + rank, 1),
            Arrangement((rank, *taps, rank + 1, rank + 2), rank + 1, 1),
        )
    stacked = positions[:batch] if stack else ()
    columns, channel = positions[len(stacked) :], kernel[-1] + 2
    of_cols = (*kernel, channel) if taps_first else (channel, *kernel)
    return Order(
        False,
        Arrangement((*stacked, kernel[-1] + 1, *of_cols, *columns), rank + 1, len(columns)),
        Arrangement((*stacked, batch + rank, batch + rank + 1, *columns), 1, len(columns)),
        Arrangement((rank, rank + 2, rank + 1, *taps), 1, rank + 1),
    )


def order_of(x: View, y: View, geometry: Geometry, stack: bool, taps_first: bool = False) -> Order:
    """Return the order, by rows if the channels of x are innermost (with one channel per group, the filters of y).

    By rows, the channels of a tap are adjacent in cols; by columns, the taps of a channel, as in w, unless taps_first.
    """
    by_rows = channels_innermost(y if geometry.group_channels == 1 < geometry.group_filters else x)
    return _order(len(geometry.batch), geometry.rank, by_rows, stack, taps_first)


def smallest(geometry: Geometry, direction: Direction) -> int:
    """Return the elements of workspace for one output and one filter of every group on one thread: at most 20 K.

    K is the number of products in the sums of all groups: C * T * R * S, or F * T * R * S for data_grad. Weights take
    K; windows take K, and 4 K more if they are read with an activation; the partial sums of the splits of weight_grad
    take 8 K, and their terms K for each of 4 threads. This makes 18 K, and the sums of one output are added.
    """
    return 20 * (geometry.filters if direction == "data_grad" else geometry.channels) * geometry.taps


class Unfolding:
    """The windows of x as matrices ``cols``, a block of outputs at a time."""

    def __init__(self, x: Operand, geometry: Geometry, order: Order, planner: Planner) -> None:
        self.x, self.geometry, self.order = x, geometry, order
        self._needs_patch = not x.is_plain(planner.dtype) or geometry.reaches_beyond
        lying = None if self._needs_patch else order.windows.matrix(sliding(x.view, geometry, geometry.output))
        self._needs_cols = lying is None
        self._is_by_tap = False  # cols are read tap by tap, without a patch

    def blocks(self, limit: int, most: float, rest: Callable[[int], Buffers]) -> Blocks:
        """Return blocks that fit the limit; their buffers are a patch, cols, and ``rest`` of the number of outputs."""
        geometry, extents = self.geometry, (*self.geometry.batch, *self.geometry.output)

        def buffers(box: Shape) -> Buffers:
            outputs = math.prod(box)
            patch = outputs * geometry.channels if self._is_by_tap else region_elements(geometry, box)
            temporaries = self.x.temporaries if self._needs_patch else 0
            cols = outputs * geometry.channels * geometry.taps
            return (
                Buffer(patch, self._needs_patch and not self._is_by_tap, temporaries),
                Buffer(cols, self._needs_cols),
                *rest(outputs),
            )

        blocks = Blocks.fitting(extents, limit, buffers, most)
        if self._needs_patch and blocks.sizes[0] > blocks.sizes[1]:  # far more inputs are between the taps than at them
            self._is_by_tap = True
            blocks = Blocks.fitting(extents, limit, buffers, most)
        return blocks

    def cols(self, index: Index, patch_space: View, cols_space: View, planner: Planner) -> View:
        """Return the windows of a block of outputs as matrices."""
        x, geometry, order = self.x, self.geometry, self.order
        if self._is_by_tap:
            sizes = (axis.stop - axis.start for axis in index)
            shape = (*sizes, *geometry.kernel, geometry.groups, geometry.group_channels)
            block, cols = order.windows.empty(shape, cols_space)

            def read(tap: Shape, planner: Planner) -> None:
                read_tap(x, tap, index, geometry, block[(..., *tap, slice(None), slice(None))], planner)

            planner.loop(Places(geometry.kernel), read)
            return cols
        windows = windows_of(x, index, geometry, order.images, patch_space, planner)
        lying = order.windows.matrix(windows)
        if lying is not None:
            return lying
        block, cols = order.windows.empty(windows.shape, cols_space)
        planner.copy(block, windows)
        return cols
