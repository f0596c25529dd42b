"""Steps of winograd: transforms into tiles, a matrix product at each point, and transforms of products and weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy

from gpuconv.arguments import Shape
from gpuconv.arrays import Array
from gpuconv.blocking import as_matrix, pieces
from gpuconv.cpu import winograd_plan as plan
from gpuconv.cpu.finite import is_finite_block, note
from gpuconv.cpu.winograd_plan import APART, SLICES, WEIGHTS, Unit
from gpuconv.geometry import Geometry
from gpuconv.operands import Index, Operand, Result, in_place
from gpuconv.plan import Planner, Team, is_small
from gpuconv.types import Direction
from gpuconv.views import View

# The finite points of F(m, r). With 1/sqrt(2) and sqrt(2) instead of 1 and 2 the error is a fourth.
POINTS = {1: (), 2: (0.0, 1.0, -1.0), 4: (0.0, 2**-0.5, -(2**-0.5), 2**0.5, -(2**0.5))}
PAGE = 4096  # bytes
FEWER = 8  # steps are short: several threads pay only from this many times as many multiply-adds on as elsewhere
FEW_WEIGHTS = 1 << 16  # of a tap, up to which copying them in another order is fast


def has_threads(geometry: Geometry) -> bool:
    """Whether several threads are faster than one; groups are computed one after the other."""
    return not is_small(geometry, 1 / (FEWER * geometry.groups))


class Transforms(NamedTuple):
    """The matrices of ``y = AT [(G w) * (BT x)]``: m outputs of r taps."""

    AT: Array  # (m, a)
    G: Array  # (a, r)
    BT: Array  # (a, a)


@lru_cache(maxsize=64)
def matrices(m: int, r: int, dtype: numpy.dtype) -> Transforms:
    """Return the matrices of F(m, r), a = m + r - 1, by the Toom-Cook method.

    They are computed in float64 and converted at the end, since the points are irrational.
    """
    points, a = POINTS[m], m + r - 1
    AT, G, BT = numpy.zeros((m, a)), numpy.zeros((a, r)), numpy.zeros((a, a))
    for j, p in enumerate(points):
        others = [q for q in points if q != p]
        AT[:, j] = [p**i for i in range(m)]
        G[j] = [p**k / math.prod(p - q for q in others) for k in range(r)]
        BT[j, : len(points)] = numpy.poly(others)[::-1]
    AT[-1, -1] = G[-1, -1] = 1
    BT[-1] = numpy.atleast_1d(numpy.poly(points))[::-1]
    return Transforms(AT.astype(dtype), G.astype(dtype), BT.astype(dtype))


class _Images(NamedTuple):
    """x or dy, and its transform into tiles: windows of some length, m apart, times a matrix, along either axis."""

    operand: Operand
    rows: Array  # (a, length); rows and columns are the same in every call
    columns: Array
    low: tuple[int, int]  # zeros before the images
    inside: tuple[slice, slice]  # of the operand


class _Taps(NamedTuple):
    """A weight in its memory order."""

    view: View  # (*kernel, C, F), or F before C
    swapped: bool
    steps: tuple[int, int]  # -1 if an axis of the kernel is reversed
    lines: View | None  # (R, S, C * F), or None if that would need a copy


@dataclass(frozen=True)
class Tiling:
    """One group of a convolution in tiles."""

    geometry: Geometry
    dtype: numpy.dtype
    xp: Any
    rows: plan.Axis
    columns: plan.Axis
    sizes: plan.Sizes
    blocks: Sequence[Sequence[Unit]]

    @classmethod
    def of(cls, geometry: Geometry, direction: Direction, planner: Planner, temporaries: int) -> Tiling:
        # The shares of the team determine the blocks, so that bits do not depend on the number of threads.
        team = planner.team(geometry) if has_threads(geometry) else Team()
        dtype = planner.dtype
        sizes = plan.sizes(geometry, direction, planner.budget, team.shares, dtype.itemsize, temporaries)
        sizes = sizes._replace(workers=min(sizes.workers, team.workers))
        blocks = plan.blocks(geometry, sizes.unit, sizes.block)
        return cls(geometry, dtype, planner.xp, *plan.axes(geometry), sizes, blocks)

    @property
    def points(self) -> int:
        return self.rows.a * self.columns.a

    def forward(self, x: Operand, w: Operand, y: Result, flags: View, planner: Planner) -> None:
        """Compute y, and set the flags of images with non-finite results to 0."""
        images = self._x(x)

        def some_filters(filters: slice, planner: Planner) -> None:
            weights = self._transformed(w.part(w.view[..., filters]), planner)
            self._forward(images, weights, y.of_channels(filters), flags, planner)

        planner.loop(list(pieces(y.view.shape[-1], self.sizes.filters)), some_filters)

    def _forward(self, images: _Images, weights: View, y: Result, flags: View, planner: Planner) -> None:
        def through(block: Sequence[Unit], planner: Planner) -> None:
            V, M = self._tiles(block, weights.shape[1:], planner)
            self._share(block, partial(self._into, images, V), planner)
            self._share(self._some_points(), partial(self._multiply, V, weights, M), planner)
            self._share(block, partial(self._out, M, y, flags), planner)

        planner.loop(self.blocks, through, 1 if self.sizes.shared else self.sizes.workers)

    def weight_grad(self, dy: Operand, x: Operand, dw: Result, planner: Planner) -> None:
        """Compute dw."""
        images = self._x(x)

        def some_filters(filters: slice, planner: Planner) -> None:
            self._weight_grad(self._dy(dy.of_channels(filters)), images, dw.view[..., 0, :, filters], planner)

        planner.loop(list(pieces(dw.view.shape[-1], self.sizes.filters)), some_filters)

    def _weight_grad(self, gradients: _Images, images: _Images, dw: View, planner: Planner) -> None:
        taps = self._as_taps(dw)
        channels = taps.view.shape[-2:]
        parts = list(pieces(len(self.blocks), -(-len(self.blocks) // (1 if self.sizes.shared else SLICES))))
        lines = taps.lines if len(parts) == 1 and dw.dtype == self.dtype else None
        (space,) = planner.workspace(0 if lines is not None else len(parts) * dw.size)
        all_sums = space.shaped((len(parts), *self.kernel, math.prod(channels)))
        sums = [lines] if lines is not None else [all_sums[number] for number in range(len(parts))]

        def through(number: int, planner: Planner) -> None:
            (sum_space,) = planner.workspace(self.points * math.prod(channels))
            E = sum_space.shaped((self.points, *channels))

            def add_block(at: int, planner: Planner) -> None:
                block = self.blocks[at]
                V, D = self._tiles(block, dw.shape[-2:], planner)
                self._share(block, partial(self._into, images, V), planner)
                self._share(block, partial(self._into, gradients, D), planner)
                factors = (D, V) if taps.swapped else (V, D)
                accumulate = partial(self._accumulate, *factors, E, at > parts[number].start)
                self._share(self._some_points(E[0].size), accumulate, planner)

            planner.loop(range(parts[number].start, parts[number].stop), add_block)
            points = E.shaped((self.rows.a, self.columns.a, math.prod(channels)))
            weights = list(pieces(points.shape[2], WEIGHTS))
            self._share(weights, partial(self._back, points, taps, sums[number]), planner)

        planner.loop(range(len(parts)), through, 1 if self.sizes.shared else self.sizes.workers)
        if lines is None:
            for term in sums[1:]:
                planner.call(self.xp.add, sums[0], term, out=sums[0])
            planner.copy(taps.view, sums[0].shaped(taps.view.shape))

    def _share(self, tasks: Sequence[Any], step: Callable[[Any, Planner], None], planner: Planner) -> None:
        """Plan a step of a block, for all threads if they share the block, else for the thread that computes it."""
        planner.loop(tasks, step, self.sizes.workers if self.sizes.shared else 1)

    # Memory of tiles.

    def _tiles(self, block: Sequence[Unit], channels: Sequence[int], planner: Planner) -> list[View]:
        """Return workspace for tiles (a, a, tiles, channels) of a block, for each of these numbers of channels."""
        most = max(block[-1].tiles.stop for block in self.blocks)
        spaces = planner.workspace(*(self.points * most * number for number in channels))
        shape = self.rows.a, self.columns.a, block[-1].tiles.stop
        return [space.shaped((*shape, number)) for space, number in zip(spaces, channels, strict=True)]

    def _by_rows(self, tiles: View, unit: Unit) -> View:
        """Return the tiles of a unit as (a, rows of tiles, tiles of a row, a, channels)."""
        part = tiles[:, :, unit.tiles]
        return part.reshape(*part.shape[:2], -1, self.columns.tiles, part.shape[-1]).transpose(0, 2, 3, 1, 4)

    # Transforms into tiles.

    def _x(self, x: Operand) -> _Images:
        rows, columns = self._matrices("BT")
        return _Images(x, rows, columns, (self.rows.low, self.columns.low), (self.rows.inputs, self.columns.inputs))

    def _dy(self, dy: Operand) -> _Images:
        rows, columns = (matrix.swapaxes(0, 1) for matrix in self._matrices("AT"))
        return _Images(dy, rows, columns, (0, 0), (slice(0, self.rows.output), slice(0, self.columns.output)))

    def _into(self, images: _Images, tiles: View, unit: Unit, planner: Planner) -> None:
        """Transform a unit of images into its tiles."""
        channels, column = tiles.shape[-1], self.columns
        width = (column.tiles - 1) * column.m + images.columns.shape[1]
        before, inside = images.low[1], images.inside[1].stop - images.inside[1].start
        shape = self.rows.a, self.sizes.unit, width, channels
        copied = 2 * (self.sizes.unit * self.rows.m + self.rows.r - 1) * inside * channels + APART * channels
        space, lines_space = planner.workspace(math.prod(shape), copied)
        U = space.shaped(shape)
        for beside in (U[:, :, :before], U[:, :, before + inside :]):
            planner.copy(beside, 0)
        lines_of = U.reshape(*shape[:2], -1)[..., before * channels : (before + inside) * channels]
        windows = U.strided(
            (*shape[:2], column.tiles, images.columns.shape[1], channels),
            (*U.strides[:2], column.m * U.strides[2], *U.strides[2:]),
        )
        self._rows_into(images, unit, lines_of, lines_space, planner)
        count = unit.rows.stop - unit.rows.start
        planner.matmul(images.columns, windows[:, :count], self._by_rows(tiles, unit))

    def _rows_into(self, images: _Images, unit: Unit, U: View, space: View, planner: Planner) -> None:
        """Multiply windows of rows by the matrix of rows, into U (a, rows of tiles, columns * channels)."""
        m, length = self.rows.m, images.rows.shape[1]
        low, extent, top = images.low[0], images.inside[0].stop - images.inside[0].start, images.inside[0].start
        start = min(extent, max(0, unit.rows.start * m - low))
        stop = max(start, min(extent, (unit.rows.stop - 1) * m - low + length))
        lines = self._lines(images, unit.image, slice(top + start, top + stop), space, planner)
        # Windows in bounds are one product; at the edges, columns of the matrix without a line are omitted.
        first = min(max(unit.rows.start, -(-low // m)), unit.rows.stop)
        last = max(first, min(unit.rows.stop, (extent + low - length) // m + 1))
        if first < last:
            shape, step = (last - first, length, lines.shape[1]), lines.strides[0]
            windows = lines[first * m - low - start :].strided(shape, (m * step, *lines.strides))
            target = U[:, first - unit.rows.start : last - unit.rows.start].transpose(1, 0, 2)
            planner.matmul(images.rows, windows, target)
        for row in (*range(unit.rows.start, first), *range(last, unit.rows.stop)):
            origin = row * m - low
            begin, end = max(start, origin), min(stop, origin + length)
            target = U[:, row - unit.rows.start]
            if begin < end:
                part = images.rows[:, begin - origin : end - origin]
                planner.matmul(part, lines[begin - start : end - start], target)
            else:
                planner.copy(target, 0)

    def _lines(self, images: _Images, image: Shape, rows: slice, space: View, planner: Planner) -> View:
        """Return lines (rows, columns * channels) of an image, in place if possible, else copied to the workspace."""
        index = self._index(image, rows, images.inside[1])
        piece = images.operand.view[index]
        lines = self._as_lines(piece) if images.operand.is_plain(self.dtype) else None
        if lines is None:
            block = space.shaped(piece.shape)
            self._read(images.operand, index, block, space[block.size :], planner)
            lines = block.shaped((rows.stop - rows.start, math.prod(piece.shape[-3:])))
        return lines

    def _read(self, images: Operand, index: Index, block: View, space: View, planner: Planner) -> None:
        """Read a block (*pixels, 1, C) of images.

        If the channels of a pixel are multiples of a page apart, they share few cache lines and evict each other. Such
        a block is first copied in its memory order, with the channels closer together.
        """
        channels = block.shape[-1]
        if block.size and images.view.strides[-1] % PAGE == 0 and channels > 1:
            pixels = block.size // channels
            staged = space.shaped((channels, pixels + APART))[:, :pixels]
            staged = staged.reshape(channels, *block.shape[:-1]).transpose(*range(1, block.ndim), 0)
            images.read(index, staged, planner)
            planner.copy(block, staged)
        else:
            images.read(index, block, planner)

    def _index(self, image: Shape, rows: slice, columns: slice) -> Index:
        return (*image, columns) if self.geometry.rank == 1 else (*image, rows, columns)

    def _as_lines(self, piece: View) -> View | None:
        lines = as_matrix(piece[None] if self.geometry.rank == 1 else piece, 1, 3)
        return lines if lines is not None and lines.strides[1] == lines.itemsize else None

    # Products at the points.

    def _some_points(self, term: int = 0) -> list[slice]:
        """Return ranges of points that are computed by one product each; a point has a term of ``term`` elements."""
        most = plan.points_at_once(self.points, term)
        if self.sizes.shared:
            most = min(most, -(-self.points // (9 * self.sizes.workers)))
        return list(pieces(self.points, most))

    def _multiply(self, V: View, weights: View, M: View, points: slice, planner: Planner) -> None:
        factors, products = (tiles.reshape(-1, *tiles.shape[2:])[points] for tiles in (V, M))
        planner.matmul(factors, weights[points], products)

    def _accumulate(self, V: View, D: View, E: View, add: bool, points: slice, planner: Planner) -> None:
        """Compute ``E = V' D``, or ``E += V' D`` if ``add``; E is (a * a, C, F)."""
        V, D = (tiles.reshape(-1, *tiles.shape[2:])[points] for tiles in (V, D))
        (space,) = planner.workspace(E[0].size * plan.points_at_once(self.points, E[0].size))
        sums = E[points]
        terms = space.shaped(sums.shape) if add else sums
        planner.matmul(V.swapaxes(1, 2), D, terms)
        if add:
            planner.call(self.xp.add, sums, terms, out=sums)

    # Transforms out of tiles.

    def _out(self, M: View, y: Result, flags: View, unit: Unit, planner: Planner) -> None:
        """Transform a unit of products into y, and set the flag of its image to 0 if a result is non-finite."""
        (row, column), F = (self.rows, self.columns), M.shape[-1]
        AT_rows, AT_columns = self._matrices("AT")
        shape, width = (row.a, self.sizes.unit, column.tiles * column.m * F), column.output * F
        space, lines_space = planner.workspace(math.prod(shape), self.sizes.unit * row.m * width)
        Z, count = space.shaped(shape), unit.rows.stop - unit.rows.start
        tiles = Z[:, :count].reshape(row.a, count, column.tiles, column.m, F)
        planner.matmul(AT_columns, self._by_rows(M, unit), tiles)
        kept = Z[:, :count, :width].transpose(1, 0, 2)
        outputs = slice(unit.rows.start * row.m, min(row.output, unit.rows.stop * row.m))
        target = y.view[self._index(unit.image, outputs, slice(None))]
        lines, block = self._as_lines(target) if in_place(target, self.dtype) else None, target
        if lines is None:
            block = lines_space.shaped(target.shape)
            lines = block.shaped((outputs.stop - outputs.start, width))
        full, rest = divmod(outputs.stop - outputs.start, row.m)
        planner.matmul(AT_rows, kept[:full], lines[: full * row.m].reshape(full, row.m, width))
        if rest:
            planner.matmul(AT_rows[:rest], kept[full], lines[full * row.m :])
        note(flags[unit.image], lines, is_finite_block, planner)
        y.store(block, target, planner)

    # Transforms of weights along columns and along rows: less work than with the Kronecker product of the matrices.

    @property
    def kernel(self) -> tuple[int, int]:
        return self.rows.r, self.columns.r

    def _as_taps(self, w: View, swap: bool = True) -> _Taps:
        """Return w (*kernel, C, F) in its memory order; C and F keep their order unless ``swap``."""
        rank = self.geometry.rank
        steps = tuple(-1 if step < 0 else 1 for step in w.strides[:rank])
        view = w[tuple(slice(None, None, step) for step in steps)]
        swapped = swap and view.strides[-1] > view.strides[-2]
        view = view.swapaxes(-1, -2) if swapped else view
        lines = as_matrix(view[None] if rank == 1 else view, 1, 2)
        return _Taps(view, swapped, (steps[0] if rank == 2 else 1, steps[-1]), lines)

    def _transformed(self, w: Operand, planner: Planner) -> View:
        """G w G' as (a * a, C, F)."""
        view = w.view[..., 0, :, :]
        # Swapped factors make matrix products slower, but exchanging the axes of many weights takes even longer.
        taps = self._as_taps(view, swap=view.shape[-1] * view.shape[-2] > FEW_WEIGHTS)
        lines = taps.lines if w.is_plain(self.dtype) else None
        channels = taps.view.shape[-2:]
        sizes = self.points * math.prod(channels), 0 if lines is not None else taps.view.size
        weight_space, copy_space = planner.workspace(*sizes)
        if lines is None:
            w.part(taps.view).read((...,), copy_space.shaped(taps.view.shape), planner)
            lines = copy_space.shaped((*self.kernel, math.prod(channels)))
        weights = weight_space.shaped((self.rows.a, self.columns.a, math.prod(channels)))
        forth = partial(self._forth, lines, taps, weights)
        planner.loop(list(pieces(lines.shape[2], WEIGHTS)), forth, self.sizes.workers)
        weights = weights.shaped((self.points, *channels))
        return weights.swapaxes(-1, -2) if taps.swapped else weights

    def _forth(self, lines: View, taps: _Taps, weights: View, part: slice, planner: Planner) -> None:
        """Compute ``weights = G w G'``: (a, a, C * F) from w (R, S, C * F)."""
        rows, columns = self._G(taps.steps)
        (space,) = planner.workspace(self.rows.r * self.columns.a * min(WEIGHTS, lines.shape[2]))
        half = space.shaped((self.rows.r, self.columns.a, part.stop - part.start))
        planner.matmul(columns, lines[:, :, part], half)
        planner.matmul(rows, half.swapaxes(0, 1), weights[:, :, part].swapaxes(0, 1))

    def _back(self, points: View, taps: _Taps, lines: View, part: slice, planner: Planner) -> None:
        """Compute ``dw = G' points G`` (R, S, C * F), the transpose of _forth."""
        rows, columns = (G.swapaxes(0, 1) for G in self._G(taps.steps))
        (space,) = planner.workspace(self.rows.r * self.columns.a * min(WEIGHTS, lines.shape[2]))
        half = space.shaped((self.rows.r, self.columns.a, part.stop - part.start))
        planner.matmul(rows, points[:, :, part].swapaxes(0, 1), half.swapaxes(0, 1))
        planner.matmul(columns, half, lines[:, :, part])

    def _G(self, steps: tuple[int, int]) -> list[Array]:
        return [G[:, ::step] for G, step in zip(self._matrices("G"), steps, strict=True)]

    def _matrices(self, name: str) -> list[Array]:
        """Return the matrices of this name for rows and columns."""
        axes = (getattr(matrices(axis.m, axis.r, self.dtype), name) for axis in (self.rows, self.columns))
        return [self.xp.asarray(matrix) for matrix in axes]
