"""The windows of x unfolded into a matrix, a block of outputs at a time.

A block lies in memory the way x does: with a row of ``cols`` per output where the channels of x are innermost, with
a column per output where space is. So neither memory order is ever transposed.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from gpuconv.algorithms.blocks import (
    Arrangement,
    Space,
    channels_innermost,
    copy_weights,
    fitting_box,
    largest,
    lies_by_filters,
)
from gpuconv.algorithms.windows import reaches_beyond, read_tap, region_elements, sliding, taps_of, windows_of
from gpuconv.arguments import Shape
from gpuconv.backend import Array
from gpuconv.geometry import Direction, Geometry
from gpuconv.operands import Index, Operand
from gpuconv.workspace import Run, Team

# Larger blocks make longer products, smaller ones stay in the cache.
BLOCK_BYTES = 8 << 20
# Below this many outputs per image, the images of a block share one product, and the result is copied into place.
SHORT_PRODUCT = 256


class Order(NamedTuple):
    """How x's windows (*batch, *output, *kernel, G, C/G), y and w lie as matrices, G of them in a stack."""

    by_rows: bool  # a row of cols per output, else a column
    windows: Arrangement
    images: Arrangement
    weights: Arrangement

    def load_weights(self, w: Operand, flat: Array, run: Run) -> Array:
        """w as matrices: where it lies, else copied by all threads, what lies side by side staying so."""
        if not self.weights.copies(w, run):
            return self.weights.load(w, (...,), flat, run)
        turn = self.by_rows == lies_by_filters(w.view)
        block, matrix = (self.weights.turned if turn else self.weights).empty(w.view.shape, flat)
        copy_weights(w, block, run)
        return matrix.swapaxes(-1, -2) if turn else matrix


@lru_cache(maxsize=64)
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


def order_of(x: Array, y: Array, geometry: Geometry, stack: bool, taps_first: bool = False) -> Order:
    """By rows where the channels of x are innermost; with one channel in a group, where the filters of y are.

    By rows cols have all channels of a tap side by side; by columns all taps of a channel, as w has, or as told.
    """
    by_rows = channels_innermost(y if geometry.group_channels == 1 < geometry.group_filters else x)
    return _order(len(geometry.batch), geometry.rank, by_rows, stack, taps_first)


class Reading(NamedTuple):
    """What reading windows of x takes: cols, unless they are a matrix as they lie, and a patch."""

    cols: Space
    patch: Space


def reading(x: Operand, order: Order, geometry: Geometry, run: Run) -> Reading:
    """What reading the windows of this x takes."""
    if not x.is_plain(run.dtype) or reaches_beyond(geometry):
        return Reading(Space(), Space(True, x.temporaries))
    unfolded = order.windows.matrix(sliding(run.backend.xp, x.view, geometry, geometry.output))
    return Reading(Space(unfolded is None), Space(False))


def smallest(geometry: Geometry, direction: Direction) -> int:
    """Elements of workspace for one output, and one filter of every group, by one thread: at most 20 K.

    K is how many products the sums of all groups have, C * T * R * S, or F * T * R * S for data_grad. Weights take K,
    windows K and 4 K more where they are read with an activation, weight_grad's sums of slices 8 K and their terms K
    for each of 4 threads: 18 K, and what the sums of one output take.
    """
    return 20 * (geometry.filters if direction == "data_grad" else geometry.channels) * geometry.taps


class Sizes(NamedTuple):
    """The filters (or channels) per group and the block of outputs done at once, and the elements of each workspace."""

    pieces: int
    box: Shape
    weights: int
    block: tuple[int, ...]  # patch, cols, a block of y or dy, and terms of one of y
    tap_by_tap: bool = False  # cols are read tap by tap, without a patch


@lru_cache(maxsize=1024)
def forward_sizes(
    geometry: Geometry,
    budget: int,
    block: int,
    team: Team,
    reading: Reading,
    per_filter: int,
    sums: Space,
    terms: Space,
    wide: int = 1,
) -> Sizes:
    """Those of a forward convolution that takes so much for the weights of a filter of every group.

    ``wide`` is how many results of a filter an output stands for.
    """
    filters = largest(geometry.group_filters, budget // 2, per_filter)
    limit = min((budget - per_filter * filters) // team.shares, block)
    most = team.share(math.prod((*geometry.batch, *geometry.output)))
    return box_sizes(geometry, limit, most, filters, per_filter * filters, reading, sums, terms, wide)


def box_sizes(
    geometry: Geometry,
    limit: int,
    most: float,
    filters: int,
    weights: int,
    reading: Reading,
    images: Space,
    terms: Space,
    wide: int = 1,
) -> Sizes:
    def parts(box: Shape) -> tuple[tuple[int, Space], ...]:
        outputs = math.prod(box)
        return (
            (region_elements(geometry, box), reading.patch),
            (outputs * geometry.channels * geometry.taps, reading.cols),
            (outputs * geometry.groups * filters * wide, images),
            (outputs * geometry.groups * filters * wide, terms),
        )

    def parts_tap_by_tap(box: Shape) -> tuple[tuple[int, Space], ...]:
        tap = math.prod(box) * geometry.channels, Space(False, reading.patch.temporaries)
        return (tap, *parts(box)[1:])

    extents = (*geometry.batch, *geometry.output)
    box, spaces = fitting_box(extents, limit, parts, most)
    if reading.patch.needed and spaces[0] > spaces[1]:  # far more lies between the taps than under them
        box, spaces = fitting_box(extents, limit, parts_tap_by_tap, most)
        return Sizes(filters, box, weights, spaces, True)
    return Sizes(filters, box, weights, spaces)


def unfold(
    x: Operand,
    index: Index,
    geometry: Geometry,
    order: Order,
    tap_by_tap: bool,
    patch_space: Array,
    cols_space: Array,
    run: Run,
) -> Array:
    """cols: the windows of a block of outputs as matrices."""
    if tap_by_tap:
        sizes = (axis.stop - axis.start for axis in index)
        shape = (*sizes, *geometry.kernel, geometry.groups, geometry.group_channels)
        block, cols = order.windows.empty(shape, cols_space)
        for tap in taps_of(geometry):
            read_tap(x, tap, index, geometry, block[(..., *tap, slice(None), slice(None))], run)
        return cols
    windows = windows_of(x, index, geometry, order.images, patch_space, run)
    lying = order.windows.matrix(windows)
    if lying is not None:
        return lying
    block, cols = order.windows.empty(windows.shape, cols_space)
    run.backend.xp.copyto(block, windows)
    return cols
