"""Partition of a convolution for winograd: axes into tiles, rows of tiles into units, units into blocks.

A unit is some rows of tiles of one image, which are transformed at once. A block is some units, which share the
products at each point.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from gpuconv.arguments import Shape
from gpuconv.blocking import Places, most_within, pieces
from gpuconv.geometry import Geometry
from gpuconv.operands import MOST_TEMPORARIES
from gpuconv.types import Direction

# Fewest outputs along an axis for which tiles of 4 waste little.
WIDE = 12
# Tiles of a block: fewer make short products, more do not stay in the cache. The later numbers are used if the first
# leaves too few blocks for each thread to have some of its own, or exceeds the workspace.
TILES = 128, 96, 64, 32
BLOCKS = 8
UNIT_BYTES = 1 << 20  # of a half-transformed unit
APART = 16  # elements between copied channels, so that they are not a multiple of a page apart
WEIGHTS = 1 << 13  # weights of a tap that are transformed at a time
TERM = 1 << 16  # elements of the products of weight_grad that are added at a time
FILTERS = 32  # computed at a time: with fewer, x would be transformed too often
SLICES = 8  # the most splits of the sum of weight_grad; they are added in order for any number of threads


class Axis(NamedTuple):
    """A spatial axis in tiles of m outputs; a 1-D convolution has a single row."""

    m: int
    r: int  # taps
    tiles: int
    inputs: slice  # of x, without those that negative padding crops
    low: int  # zeros before them
    output: int

    @property
    def a(self) -> int:
        """The number of points, and of inputs that a tile reads."""
        return self.m + self.r - 1


@lru_cache(maxsize=1024)
def axes(geometry: Geometry) -> tuple[Axis, Axis]:
    """Return the axes of rows and columns."""
    found = [Axis(1, 1, 1, slice(0, 1), 0, 1)] * (2 - geometry.rank)
    of_geometry = zip(geometry.input, geometry.kernel, geometry.padding, geometry.output, strict=True)
    for n, k, (low, high), output in of_geometry:
        m = 1 if k == 1 else 4 if output >= WIDE else 2
        inputs = slice(max(0, -low), n - max(0, -high))
        found.append(Axis(m, k, -(-output // m), inputs, max(0, low), output))
    return found[0], found[1]


class Unit(NamedTuple):
    """Some rows of tiles of one image, and the positions of these tiles in the block."""

    image: Shape  # its index on the batch axes
    rows: slice
    tiles: slice


class Sizes(NamedTuple):
    """The sizes of the parts into which the work is divided."""

    filters: int  # computed at a time
    unit: int  # rows of tiles
    block: int  # units
    shared: bool  # whether all threads work on one block, step by step
    workers: int


class _Room(NamedTuple):
    """The elements of workspace for one group."""

    geometry: Geometry
    direction: Direction
    temporaries: int  # of lines that are read or finished

    def lines(self, unit: int, filters: int) -> int:
        """Return the elements of U or Z, and of lines copied twice."""
        rows, columns = axes(self.geometry)
        width, channels = columns.tiles * columns.m + columns.r - 1, max(self.geometry.group_channels, filters)
        copied = (2 + self.temporaries) * (unit * rows.m + rows.r - 1)
        return (unit * rows.a + copied) * width * channels + APART * channels

    def weights(self, filters: int) -> int:
        """Return the elements of half-transformed weights."""
        rows, columns = axes(self.geometry)
        return rows.r * columns.a * min(WEIGHTS, self.geometry.group_channels * filters)

    def term(self, filters: int) -> int:
        """Return the elements of products of weight_grad before they are added."""
        weights = self.geometry.group_channels * filters
        return 0 if self.direction == "forward" else weights * points_at_once(self.points, weights)

    def tiles(self, unit: int, block: int, filters: int) -> int:
        columns, channels = axes(self.geometry)[1], self.geometry.group_channels
        return block * unit * columns.tiles * self.points * (channels + filters)

    @property
    def points(self) -> int:
        rows, columns = axes(self.geometry)
        return rows.a * columns.a

    def together(self, filters: int, unit: int = 1, block: int = 1, workers: int = 1) -> int:
        """Return the elements if threads share a block."""
        own = self.lines(unit, filters) + self.weights(filters) + self.term(filters)
        weights = self.geometry.group_channels * filters * (self.points + self.geometry.taps)
        return weights + self.tiles(unit, block, filters) + workers * own

    def alone(self, filters: int, unit: int, block: int, workers: int) -> int:
        """Return the elements if each thread has a block of its own."""
        weights = self.geometry.group_channels * filters
        own = self.lines(unit, filters) + self.weights(filters) + self.tiles(unit, block, filters)
        if self.direction == "forward":
            return weights * (self.points + self.geometry.taps) + workers * own
        own += weights * self.points + self.term(filters)
        return SLICES * self.geometry.taps * weights + workers * own


def least(geometry: Geometry, direction: Direction) -> int:
    """Return the elements of workspace for one row of tiles and the fewest filters worth transforming x for."""
    return _Room(geometry, direction, MOST_TEMPORARIES).together(min(FILTERS, geometry.group_filters))


@lru_cache(maxsize=1024)
def sizes(
    geometry: Geometry, direction: Direction, budget: int, threads: int, itemsize: int, temporaries: int
) -> Sizes:
    (rows, columns), room = axes(geometry), _Room(geometry, direction, temporaries)
    filters = most_within(geometry.group_filters, budget, room.together)
    workers = most_within(threads, budget, lambda workers: room.together(filters, workers=workers))
    line = rows.a * (columns.tiles * columns.m + columns.r - 1) * max(geometry.group_channels, filters)
    unit = min(
        most_within(rows.tiles, UNIT_BYTES // itemsize, lambda unit: unit * line),
        most_within(rows.tiles, budget, lambda unit: room.together(filters, unit, 1, workers)),
    )
    units = math.prod(geometry.batch) * -(-rows.tiles // unit)
    for tiles_of_block in TILES:
        block = max(1, min(units, -(-tiles_of_block // (unit * columns.tiles))))
        if -(-units // block) >= BLOCKS and room.alone(filters, unit, block, threads) <= budget:
            return Sizes(filters, unit, block, False, threads)
    unit = -(-unit // 2)  # if threads share a block, the workspace of each thread leaves less for the block
    units = math.prod(geometry.batch) * -(-rows.tiles // unit)
    block = most_within(units, budget, lambda block: room.together(filters, unit, block, workers))
    # Longer blocks are worth more than additional threads, each of which needs workspace of its own.
    if workers > 1 and 2 * block < most_within(units, budget, lambda block: room.together(filters, unit, block)):
        return sizes(geometry, direction, budget, workers // 2, itemsize, temporaries)
    return Sizes(filters, unit, block, True, workers)


def points_at_once(points: int, term: int) -> int:
    return max(1, min(points, TERM // term)) if term else points


def blocks(geometry: Geometry, unit: int, block: int) -> tuple[tuple[Unit, ...], ...]:
    """Return all units, in blocks."""
    rows, columns = axes(geometry)
    places = [(image, part) for image in Places(geometry.batch) for part in pieces(rows.tiles, unit)]
    blocks = []
    for part in pieces(len(places), block):
        units, start = [], 0
        for image, lines in places[part]:
            stop = start + (lines.stop - lines.start) * columns.tiles
            units.append(Unit(image, lines, slice(start, stop)))
            start = stop
        blocks.append(tuple(units))
    return tuple(blocks)
