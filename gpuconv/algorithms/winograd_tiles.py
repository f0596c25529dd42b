"""The steps of winograd: into tiles, a matrix product at each point, out of tiles; and the transforms of weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeAlias

import numpy

from gpuconv.algorithms import winograd_plan as plan
from gpuconv.algorithms.blocks import as_matrix, pieces
from gpuconv.algorithms.finite import is_finite_block
from gpuconv.algorithms.winograd_plan import APART, SLICES, WEIGHTS, Unit
from gpuconv.arguments import Shape
from gpuconv.backend import Array
from gpuconv.geometry import Direction, Geometry
from gpuconv.operands import Index, Operand, Result, in_place
from gpuconv.workspace import Run, shaped

# The points of F(m, r) beside infinity. 1/sqrt(2) and sqrt(2) in the place of 1 and 2 make the error a fourth.
POINTS = {1: (), 2: (0.0, 1.0, -1.0), 4: (0.0, 2**-0.5, -(2**-0.5), 2**0.5, -(2**0.5))}
PAGE = 4096  # bytes
FEW_WEIGHTS = 1 << 16  # of a tap, up to which copying them in another order is quick


class Matrices(NamedTuple):
    """y = AT [(G w) * (BT x)]: m outputs of r taps."""

    AT: Array  # (m, a)
    G: Array  # (a, r)
    BT: Array  # (a, a)


@lru_cache(maxsize=64)
def matrices(m: int, r: int, dtype: numpy.dtype) -> Matrices:
    """Those of F(m, r), a = m + r - 1, by Toom and Cook.

    In float64 until the end, since the points are irrational.
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
    return Matrices(AT.astype(dtype), G.astype(dtype), BT.astype(dtype))


# Has the tasks of a step done: by the caller, or by several threads that each call the worker.
_Share: TypeAlias = Callable[[Iterable[Any], Callable[[Iterator[Any]], None]], None]


def _alone(tasks: Iterable[Any], worker: Callable[[Iterator[Any]], None]) -> None:
    worker(iter(tasks))


class _Images(NamedTuple):
    """x, or dy, and how it becomes tiles: windows of some length, m apart, times a matrix, along either axis."""

    operand: Operand
    rows: Array  # (a, length)
    columns: Array
    low: tuple[int, int]  # zeros before the images
    inside: tuple[slice, slice]  # of the operand


class _Taps(NamedTuple):
    """A weight as it lies in memory."""

    view: Array  # (*kernel, C, F), or F before C
    swapped: bool
    steps: tuple[int, int]  # -1 where an axis of the kernel is turned round
    lines: Array | None  # (R, S, C * F), if that takes no copy


@dataclass(frozen=True)
class Tiling:
    """One group of a convolution in tiles."""

    geometry: Geometry
    run: Run
    rows: plan.Axis
    columns: plan.Axis
    sizes: plan.Sizes
    blocks: Sequence[Sequence[Unit]]

    @classmethod
    def of(cls, geometry: Geometry, direction: Direction, run: Run, temporaries: int) -> Tiling:
        team = run.team(geometry)  # its shares decide the blocks, lest bits depend on the number of threads
        sizes = plan.sizes(geometry, direction, run.budget, team.shares, run.dtype.itemsize, temporaries)
        sizes = sizes._replace(workers=min(sizes.workers, team.workers))
        return cls(geometry, run, *plan.axes(geometry), sizes, plan.blocks(geometry, sizes.unit, sizes.block))

    @property
    def points(self) -> int:
        return self.rows.a * self.columns.a

    def forward(self, x: Operand, w: Operand, y: Result) -> set[Shape]:
        """Computes y; the images that NaN or Inf is in."""
        images, spoilt = self._x(x), set[Shape]()
        for filters in pieces(y.view.shape[-1], self.sizes.filters):
            with self._transformed(w.part(w.view[..., filters])) as weights:
                self._forward(images, weights, y.of_channels(filters), spoilt)
            del weights  # before the next ones are made
        return spoilt

    def _forward(self, images: _Images, weights: Array, y: Result, spoilt: set[Shape]) -> None:
        def through(blocks: Iterable[Sequence[Unit]], share: _Share) -> None:
            with self._room(*weights.shape[1:]) as spaces:
                for block in blocks:
                    V, M = self._tiles(block, spaces, weights.shape[1:])
                    share(block, partial(self._into, images, V))
                    share(self._some_points(), partial(self._multiply, V, weights, M))
                    share(block, partial(self._out, M, y, spoilt))

        self._spread(self.blocks, through)

    def weight_grad(self, dy: Operand, x: Operand, dw: Result) -> None:
        """Computes dw."""
        images = self._x(x)
        for filters in pieces(dw.view.shape[-1], self.sizes.filters):
            self._weight_grad(self._dy(dy.of_channels(filters)), images, dw.view[..., 0, :, filters])

    def _weight_grad(self, gradients: _Images, images: _Images, dw: Array) -> None:
        run, taps = self.run, self._as_taps(dw)
        channels = taps.view.shape[-2:]
        parts = list(pieces(len(self.blocks), -(-len(self.blocks) // (1 if self.sizes.shared else SLICES))))
        lines = taps.lines if len(parts) == 1 and dw.dtype == run.dtype else None
        with run.workspace(0 if lines is not None else len(parts) * dw.size) as (space,):
            sums = [lines] if lines is not None else list(space.reshape(len(parts), *self.kernel, -1))

            def through(numbers: Iterator[int], share: _Share) -> None:
                room = run.workspace(self.points * math.prod(channels))
                with self._room(*dw.shape[-2:]) as spaces, room as (sum_space,):
                    E = sum_space.reshape(self.points, *channels)
                    for number in numbers:
                        for block in self.blocks[parts[number]]:
                            V, D = self._tiles(block, spaces, dw.shape[-2:])
                            share(block, partial(self._into, images, V))
                            share(block, partial(self._into, gradients, D))
                            factors = (D, V) if taps.swapped else (V, D)
                            add = block is not self.blocks[parts[number].start]
                            share(self._some_points(E[0].size), partial(self._accumulate, *factors, E, add))
                        points = E.reshape(self.rows.a, self.columns.a, -1)
                        share(list(pieces(points.shape[2], WEIGHTS)), partial(self._back, points, taps, sums[number]))

            self._spread(range(len(parts)), through)
            if lines is None:
                xp = run.backend.xp
                for term in sums[1:]:
                    xp.add(sums[0], term, out=sums[0])
                xp.copyto(taps.view, sums[0].reshape(taps.view.shape), casting="unsafe")

    def _spread(self, tasks: Sequence[Any], through: Callable[[Iterator[Any], _Share], None]) -> None:
        """Takes tasks through all steps: each thread its own, or one after the other, with all threads at each step."""
        run = self.run
        if self.sizes.shared:
            through(iter(tasks), partial(run.spread, workers=self.sizes.workers))
        else:
            run.spread(tasks, lambda mine: through(mine, _alone), workers=self.sizes.workers)

    # What tiles lie in.

    def _room(self, *channels: int) -> contextlib.AbstractContextManager[list[Array]]:
        """Workspace for the tiles of a block, once for each of these numbers of channels."""
        most = max(block[-1].tiles.stop for block in self.blocks)
        return self.run.workspace(*(self.points * most * number for number in channels))

    def _tiles(self, block: Sequence[Unit], spaces: Sequence[Array], channels: Sequence[int]) -> list[Array]:
        """Tiles (a, a, tiles, channels) of a block."""
        shape = self.rows.a, self.columns.a, block[-1].tiles.stop
        return [shaped(space, (*shape, number)) for space, number in zip(spaces, channels, strict=True)]

    def _by_rows(self, tiles: Array, unit: Unit) -> Array:
        """The tiles of a unit as (a, rows of tiles, tiles of a row, a, channels)."""
        part = tiles[:, :, unit.tiles]
        return part.reshape(*part.shape[:2], -1, self.columns.tiles, part.shape[-1]).transpose(0, 2, 3, 1, 4)

    # Into tiles.

    def _x(self, x: Operand) -> _Images:
        rows, columns = self._matrices("BT")
        return _Images(x, rows, columns, (self.rows.low, self.columns.low), (self.rows.inputs, self.columns.inputs))

    def _dy(self, dy: Operand) -> _Images:
        rows, columns = (matrix.swapaxes(0, 1) for matrix in self._matrices("AT"))
        return _Images(dy, rows, columns, (0, 0), (slice(0, self.rows.output), slice(0, self.columns.output)))

    def _into(self, images: _Images, tiles: Array, units: Iterable[Unit]) -> None:
        """Brings units of images into their tiles."""
        xp, channels, column = self.run.backend.xp, tiles.shape[-1], self.columns
        width = (column.tiles - 1) * column.m + images.columns.shape[1]
        before, inside = images.low[1], images.inside[1].stop - images.inside[1].start
        shape = self.rows.a, self.sizes.unit, width, channels
        copied = 2 * (self.sizes.unit * self.rows.m + self.rows.r - 1) * inside * channels + APART * channels
        with self.run.workspace(math.prod(shape), copied) as (space, lines_space):
            U = space.reshape(shape)
            for beside in (U[:, :, :before], U[:, :, before + inside :]):
                xp.copyto(beside, 0)
            lines_of = U.reshape(*shape[:2], -1)[..., before * channels : (before + inside) * channels]
            windows = xp.lib.stride_tricks.as_strided(
                U,
                (*shape[:2], column.tiles, images.columns.shape[1], channels),
                (*U.strides[:2], column.m * U.strides[2], *U.strides[2:]),
            )
            for unit in units:
                self._rows_into(images, unit, lines_of, lines_space)
                count = unit.rows.stop - unit.rows.start
                xp.matmul(images.columns, windows[:, :count], out=self._by_rows(tiles, unit))

    def _rows_into(self, images: _Images, unit: Unit, U: Array, space: Array) -> None:
        """The first half: windows of rows, times the matrix, into U (a, rows of tiles, columns * channels)."""
        xp, m, length = self.run.backend.xp, self.rows.m, images.rows.shape[1]
        low, extent, top = images.low[0], images.inside[0].stop - images.inside[0].start, images.inside[0].start
        start = min(extent, max(0, unit.rows.start * m - low))
        stop = max(start, min(extent, (unit.rows.stop - 1) * m - low + length))
        lines = self._lines(images, unit.image, slice(top + start, top + stop), space)
        # Windows inside the image are one product; over its edges, columns of the matrix that have no line drop out.
        first = min(max(unit.rows.start, -(-low // m)), unit.rows.stop)
        last = max(first, min(unit.rows.stop, (extent + low - length) // m + 1))
        if first < last:
            shape, step = (last - first, length, lines.shape[1]), lines.strides[0]
            windows = xp.lib.stride_tricks.as_strided(
                lines[first * m - low - start :], shape, (m * step, *lines.strides)
            )
            target = U[:, first - unit.rows.start : last - unit.rows.start].transpose(1, 0, 2)
            xp.matmul(images.rows, windows, out=target)
        for row in (*range(unit.rows.start, first), *range(last, unit.rows.stop)):
            origin = row * m - low
            begin, end = max(start, origin), min(stop, origin + length)
            target = U[:, row - unit.rows.start]
            if begin < end:
                part = images.rows[:, begin - origin : end - origin]
                xp.matmul(part, lines[begin - start : end - start], out=target)
            else:
                xp.copyto(target, 0)

    def _lines(self, images: _Images, image: Shape, rows: slice, space: Array) -> Array:
        """Lines (rows, columns * channels) of an image: where they lie if that will do, else in the workspace."""
        index = self._index(image, rows, images.inside[1])
        piece = images.operand.view[index]
        lines = self._as_lines(piece) if images.operand.is_plain(self.run.dtype) else None
        if lines is None:
            block = shaped(space, piece.shape)
            self._read(images.operand, index, block, space[block.size :])
            lines = block.reshape(rows.stop - rows.start, math.prod(piece.shape[-3:]))
        return lines

    def _read(self, images: Operand, index: Index, block: Array, space: Array) -> None:
        """Reads a block (*pixels, 1, C) of images.

        Where the channels of a pixel lie apart by multiples of a page they share few lines of the cache, and drive each
        other out: such a block is first copied as it lies, with the channels less far apart.
        """
        xp, channels = self.run.backend.xp, block.shape[-1]
        if block.size and images.view.strides[-1] % PAGE == 0 and channels > 1:
            pixels = block.size // channels
            staged = shaped(space, (channels, pixels + APART))[:, :pixels]
            staged = staged.reshape(channels, *block.shape[:-1]).transpose(*range(1, block.ndim), 0)
            images.read(xp, index, staged)
            xp.copyto(block, staged)
        else:
            images.read(xp, index, block)

    def _index(self, image: Shape, rows: slice, columns: slice) -> Index:
        return (*image, columns) if self.geometry.rank == 1 else (*image, rows, columns)

    def _as_lines(self, piece: Array) -> Array | None:
        lines = as_matrix(piece[None] if self.geometry.rank == 1 else piece, 1, 3)
        return lines if lines is not None and lines.strides[1] == lines.itemsize else None

    # At the points.

    def _some_points(self, term: int = 0) -> list[slice]:
        """The points that are done by one product of stacks, where each takes a term of so many elements."""
        most = plan.points_at_once(self.points, term)
        if self.sizes.shared:
            most = min(most, -(-self.points // (9 * self.sizes.workers)))
        return list(pieces(self.points, most))

    def _multiply(self, V: Array, weights: Array, M: Array, parts: Iterable[slice]) -> None:
        factors, products = (tiles.reshape(-1, *tiles.shape[2:]) for tiles in (V, M))
        for points in parts:
            self.run.backend.xp.matmul(factors[points], weights[points], out=products[points])

    def _accumulate(self, V: Array, D: Array, E: Array, add: bool, parts: Iterable[slice]) -> None:
        """E (a * a, C, F) = or += V' D."""
        xp = self.run.backend.xp
        V, D = (tiles.reshape(-1, *tiles.shape[2:]) for tiles in (V, D))
        V = V.swapaxes(1, 2)
        with self.run.workspace(E[0].size * plan.points_at_once(self.points, E[0].size)) as (space,):
            for points in parts:
                if add:
                    terms = xp.matmul(V[points], D[points], out=shaped(space, E[points].shape))
                    xp.add(E[points], terms, out=E[points])
                else:
                    xp.matmul(V[points], D[points], out=E[points])

    # Out of tiles.

    def _out(self, M: Array, y: Result, spoilt: set[Shape], units: Iterable[Unit]) -> None:
        """Brings units of products into y, and notes the images that NaN or Inf is in."""
        xp, (row, column), F = self.run.backend.xp, (self.rows, self.columns), M.shape[-1]
        AT_rows, AT_columns = self._matrices("AT")
        shape, width = (row.a, self.sizes.unit, column.tiles * column.m * F), column.output * F
        copied = self.sizes.unit * row.m * width
        with self.run.workspace(math.prod(shape), copied) as (space, lines_space):
            Z = space.reshape(shape)
            for unit in units:
                count = unit.rows.stop - unit.rows.start
                tiles = Z[:, :count].reshape(row.a, count, column.tiles, column.m, F)
                xp.matmul(AT_columns, self._by_rows(M, unit), out=tiles)
                kept = Z[:, :count, :width].transpose(1, 0, 2)
                outputs = slice(unit.rows.start * row.m, min(row.output, unit.rows.stop * row.m))
                target = y.view[self._index(unit.image, outputs, slice(None))]
                lines, block = self._as_lines(target) if in_place(target, self.run.dtype) else None, target
                if lines is None:
                    block = shaped(lines_space, target.shape)
                    lines = block.reshape(outputs.stop - outputs.start, width)
                full, rest = divmod(outputs.stop - outputs.start, row.m)
                xp.matmul(AT_rows, kept[:full], out=lines[: full * row.m].reshape(full, row.m, width))
                if rest:
                    xp.matmul(AT_rows[:rest], kept[full], out=lines[full * row.m :])
                if not self.run.holds(is_finite_block, lines):
                    spoilt.add(unit.image)
                y.finish(xp, block)
                if block is not target:
                    xp.copyto(target, block, casting="unsafe")

    # Weights, transformed along columns and along rows: less work than by the Kronecker product of the matrices.

    @property
    def kernel(self) -> tuple[int, int]:
        return self.rows.r, self.columns.r

    def _as_taps(self, w: Array, swap: bool = True) -> _Taps:
        """w (*kernel, C, F) as it lies in memory, but for the order of C and F where that should not be swapped."""
        rank = self.geometry.rank
        steps = tuple(-1 if step < 0 else 1 for step in w.strides[:rank])
        view = w[tuple(slice(None, None, step) for step in steps)]
        swapped = swap and bool(view.strides[-1] > view.strides[-2])
        view = view.swapaxes(-1, -2) if swapped else view
        lines = as_matrix(view[None] if rank == 1 else view, 1, 2)
        return _Taps(view, swapped, (steps[0] if rank == 2 else 1, steps[-1]), lines)

    @contextlib.contextmanager
    def _transformed(self, w: Operand) -> Iterator[Array]:
        """G w G' as (a * a, C, F)."""
        view = w.view[..., 0, :, :]
        # Swapped factors make matrix products slower, but to exchange the axes of many weights takes even longer.
        run, taps = self.run, self._as_taps(view, swap=view.shape[-1] * view.shape[-2] > FEW_WEIGHTS)
        lines = taps.lines if w.is_plain(run.dtype) else None
        channels = taps.view.shape[-2:]
        sizes = self.points * math.prod(channels), 0 if lines is not None else taps.view.size
        with run.workspace(*sizes) as (weight_space, copy_space):
            if lines is None:
                copy = copy_space.reshape(taps.view.shape)
                w.part(taps.view).read(run.backend.xp, (...,), copy)
                lines = copy.reshape(*self.kernel, -1)
            weights = weight_space.reshape(self.rows.a, self.columns.a, -1)
            run.spread(
                list(pieces(lines.shape[2], WEIGHTS)), partial(self._forth, lines, taps, weights), self.sizes.workers
            )
            weights = weights.reshape(self.points, *channels)
            yield weights.swapaxes(-1, -2) if taps.swapped else weights

    def _forth(self, lines: Array, taps: _Taps, weights: Array, parts: Iterable[slice]) -> None:
        """weights (a, a, C * F) = G w G', w being (R, S, C * F)."""
        xp, (rows, columns) = self.run.backend.xp, self._G(taps.steps)
        with self.run.workspace(self.rows.r * self.columns.a * min(WEIGHTS, lines.shape[2])) as (space,):
            for part in parts:
                half = shaped(space, (self.rows.r, self.columns.a, part.stop - part.start))
                xp.matmul(columns, lines[:, :, part], out=half)
                xp.matmul(rows, half.swapaxes(0, 1), out=weights[:, :, part].swapaxes(0, 1))

    def _back(self, points: Array, taps: _Taps, lines: Array, parts: Iterable[slice]) -> None:
        """The transpose of _forth: dw (R, S, C * F) = G' points G."""
        xp, (rows, columns) = self.run.backend.xp, (G.swapaxes(0, 1) for G in self._G(taps.steps))
        with self.run.workspace(self.rows.r * self.columns.a * min(WEIGHTS, lines.shape[2])) as (space,):
            for part in parts:
                half = shaped(space, (self.rows.r, self.columns.a, part.stop - part.start))
                xp.matmul(rows, points[:, :, part].swapaxes(0, 1), out=half.swapaxes(0, 1))
                xp.matmul(columns, half, out=lines[:, :, part])

    def _G(self, steps: tuple[int, int]) -> list[Array]:
        return [G[:, ::step] for G, step in zip(self._matrices("G"), steps, strict=True)]

    def _matrices(self, name: str) -> list[Array]:
        """The matrices of this name for rows and columns."""
        axes = (getattr(matrices(axis.m, axis.r, self.run.dtype), name) for axis in (self.rows, self.columns))
        return [self.run.backend.xp.asarray(matrix) for matrix in axes]
