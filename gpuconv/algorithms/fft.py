"""fft: large kernels by products of spectra, in time that hardly depends on their extent.

A correlation of x with w is, frequency by frequency, the product of their spectra, the second one conjugated:

    forward      y[o]  = sum over t of x[o + t * dilation - low] w[t]      Y = X conj(FFT(conj(w)))
    data_grad    the same of dy, with w rotated by 180 degrees
    weight_grad  dw[t] = sum over o of x[o + t * dilation - low] dy[o]     the same of x, with dy in the place of w

It is a circular correlation of tiles: L inputs give those L - window + 1 outputs whose windows do not reach round the
end (overlap and save, Stockham 1966). L has small primes only. Tiles are chosen by an estimate of time among those that
fit the workspace. If no tile fits for the whole kernel, the kernel is cut into segments: in forward and data_grad the
products of spectra are summed over segments, as over channels; in weight_grad each segment is computed by itself. NaN
and Inf would spread over a tile: what holds some is computed again by im2col.

NumPy arrays are transformed by scipy.fft where SciPy is installed, since it is faster, else by numpy.fft.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import numpy

from gpuconv.algorithms import containment, cost
from gpuconv.algorithms.blocks import largest, largest_fitting, pieces
from gpuconv.algorithms.finite import is_finite
from gpuconv.arguments import Shape
from gpuconv.backend import Array
from gpuconv.geometry import Direction, Geometry
from gpuconv.operands import MOST_TEMPORARIES, Operand, Result
from gpuconv.request import Request
from gpuconv.workspace import Run

SHARES = 4  # of the workspace, where several parts are computed at the same time


def why_not(request: Request) -> str | None:
    """A reason for strides, of whose outputs most would be computed in vain, and for tiles beyond the workspace."""
    if set(request.geometry.stride) != {1}:
        return f"it is for stride 1, not {request.geometry.stride}"
    problem = _Problem.of(request)
    if _cut(problem, request.budget) is not None:
        return None
    return request.lacks(min(map(problem.elements, problem.segmented())), "the smallest tiles")


def nanoseconds(request: Request) -> float:
    """An estimate: the transforms of x, w and y, and the products of spectra."""
    problem = _Problem.of(request)
    cut = _cut(problem, request.budget)
    assert cut is not None
    return problem.nanoseconds(cut.tile, request.budget // cut.shares)


def forward(x: Operand, w: Operand, y: Result, geometry: Geometry, run: Run) -> None:
    """Y = X conj(FFT(conj(w)))."""
    containment.forward(_forward, x, w, y, geometry, run)


def data_grad(dy: Operand, w: Operand, dx: Result, geometry: Geometry, run: Run) -> None:
    """The forward convolution of dy with w rotated, C and F exchanged."""
    containment.data_grad(_forward, dy, w, dx, geometry, run)


def weight_grad(dy: Operand, x: Operand, dw: Result, geometry: Geometry, run: Run) -> None:
    """DW = X conj(FFT(conj(dy)))."""
    containment.weight_grad(_weight_grad, dy, x, dw, geometry, run)


def _forward(x: Operand, w: Operand, y: Result, geometry: Geometry, run: Run) -> set[Shape]:
    tiling, nonfinite = _Tiling.of(geometry, "forward", x.temporaries, run), set[Shape]()

    def compute(groups: slice, filters: slice) -> None:
        weights = _Weights(tiling, w.of_groups(groups, "w").of_channels(filters))
        images, results = x.of_groups(groups, "x"), y.of_groups(groups, "y").of_channels(filters)
        for image, start in tiling.tiles():
            if not tiling.store(tiling.sums(images, weights, image, start), results, image, start):
                nonfinite.add(image)

    tiling.spread(compute)
    return nonfinite


def _weight_grad(dy: Operand, x: Operand, dw: Result, geometry: Geometry, run: Run) -> None:
    tiling = _Tiling.of(geometry, "weight_grad", max(x.temporaries, dy.temporaries), run)

    def compute(groups: slice, filters: slice) -> None:
        images, gradients = x.of_groups(groups, "x"), dy.of_groups(groups, "y").of_channels(filters)
        part = dw.of_groups(groups, "w").of_channels(filters).view
        sums = tiling.spectra(part)
        for segment in tiling.segments():
            for number, (image, start) in enumerate(tiling.tiles()):
                of_dy = tiling.of_dy(gradients, image, start)
                for channel in range(sums.shape[0]):
                    tiling.add(sums[channel], (images, channel, image, start, segment), of_dy, number == 0)
                del of_dy  # before the next one is computed
            for channel in range(sums.shape[0]):
                part[(*segment, slice(None), channel)] = tiling.lags(sums[channel], segment)

    tiling.spread(compute)


class _Tile(NamedTuple):
    """How many inputs and taps, along each axis, are transformed at once."""

    extent: Shape  # L
    taps: Shape  # of a segment of the kernel: all of them where there is room


class _Cut(NamedTuple):
    """How a correlation is cut up, and into how many parts the workspace is divided for several threads."""

    tile: _Tile
    shares: int


class _Problem(NamedTuple):
    """What decides the tiles of a correlation."""

    geometry: Geometry
    direction: Direction  # data_grad is a forward convolution
    is_complex: bool
    temporaries: int  # of reading x or dy
    copies: int  # that a transform takes beside what it transforms

    @classmethod
    def of(cls, request: Request) -> _Problem:
        """That of a request, for operands that need all temporaries that there are."""
        forward = request.as_forward()
        copies = _copies(request.backend.xp)
        return cls(forward.geometry, forward.direction, request.is_complex, MOST_TEMPORARIES, copies)

    def elements(self, tile: _Tile, filters: int = 1) -> int:
        """Elements of all arrays that are alive at once, for one group and so many of its filters.

        What transforms take outside of arrays, a few lines for each thread, is not among them.
        """
        channels, transformed = self.geometry.group_channels, 1 + self.copies
        read = 1 + max(self.copies, self.temporaries)
        if self.direction == "weight_grad":  # all sums; dy, or its spectrum and x
            arrays = channels * filters + max(read * filters, filters + read, 2 * filters + 1)
        elif tile.taps == self.geometry.kernel:  # all weights; one of them, or x and sums
            arrays = channels * filters + max(transformed * filters, read, (channels > 1) * (filters + read))
        else:  # sums; weights, or their spectrum and x
            arrays = filters + max(transformed * filters, filters + read)
        size = math.prod(tile.extent) if self.is_complex else math.prod(tile.extent[:-1]) * (tile.extent[-1] + 2)
        return size * arrays

    def nanoseconds(self, tile: _Tile, share: int) -> float:
        """An estimate for this tile; ``share`` is how many elements a part may take."""
        geometry, size = self.geometry, math.prod(tile.extent)
        tiles = math.prod((*geometry.batch, *map(_count, geometry.output, _steps(tile, geometry))))
        segments = math.prod(map(_count, geometry.kernel, tile.taps))
        passes = _count(geometry.group_filters, max(1, share // self.elements(tile)))  # over x
        weights = geometry.channels * geometry.group_filters
        spectra = tiles * (passes * segments * geometry.channels + geometry.filters)
        spectra += weights * (1 if segments == 1 else tiles * segments)
        transforms = spectra * math.log2(2 * size) * cost.FOURIER
        products = tiles * segments * weights / 2 * cost.MULTIPLY
        called = tiles * passes * segments * (80 + 10 * geometry.group_channels) * cost.STEP
        return (transforms + products) * size * (1 + self.is_complex) + called

    def whole(self) -> Iterator[_Tile]:
        """Tiles for the whole kernel: along each axis of all the outputs, a half of them, a quarter and so on."""
        axes = map(_lengths, self.geometry.output, self.geometry.window)
        return (_Tile(extent, self.geometry.kernel) for extent in product(*axes))

    def segmented(self) -> Iterator[_Tile]:
        """Tiles for segments of the kernel, with as many outputs as a segment is wide."""
        axes = map(_segments, self.geometry.output, self.geometry.kernel, self.geometry.dilation)
        return (_Tile(*zip(*axes_of, strict=True)) for axes_of in product(*axes))


@lru_cache(maxsize=1024)
def _cut(problem: _Problem, budget: int) -> _Cut | None:
    """The fastest tiles that fit the budget, or None.

    The number of shares does not depend on the number of threads, so the tiles do not either. The kernel is cut only if
    no tile fits for the whole kernel.
    """
    shares = max(1, min(SHARES, problem.geometry.groups * problem.geometry.group_filters))

    def cost(cut: _Cut) -> tuple[float, list[int]]:
        """Its time with two threads; of those that take as long, long last axes lie best in memory."""
        nanoseconds = problem.nanoseconds(cut.tile, budget // cut.shares) / min(cut.shares, 2)
        return nanoseconds, [-n for n in cut.tile.extent[::-1]]

    for tiles in (problem.whole, problem.segmented):
        cuts = (_Cut(tile, number) for number in range(shares, 0, -1) for tile in tiles())
        fitting = [cut for cut in cuts if problem.elements(cut.tile) <= budget // cut.shares]
        if fitting:
            return min(fitting, key=cost)
    return None


def _steps(tile: _Tile, geometry: Geometry) -> Shape:
    """Outputs of a tile."""
    axes = zip(tile.extent, tile.taps, geometry.dilation, strict=True)
    return tuple(length - d * (k - 1) for length, k, d in axes)


def _count(extent: int, size: int) -> int:
    return -(-extent // size)


@lru_cache(maxsize=4096)
def _lengths(outputs: int, window: int) -> tuple[int, ...]:
    """Lengths of tiles along an axis; the last ones compute an eighth of what they transform."""
    lengths = []
    for halvings in range(outputs.bit_length()):
        step = -(-outputs // 2**halvings)
        lengths.append(smooth(step + window - 1))
        if 8 * step < window:
            break
    return tuple(dict.fromkeys(lengths))


@lru_cache(maxsize=4096)
def _segments(outputs: int, kernel: int, dilation: int) -> tuple[tuple[int, int], ...]:
    """Lengths of tiles along an axis and the taps of their segments: all taps, a half of them and so on down to 16."""
    found = []
    for halvings in range(kernel.bit_length()):
        taps = -(-kernel // 2**halvings)
        window = dilation * (taps - 1) + 1
        found.append((smooth(min(outputs, window) + window - 1), taps))
        if taps <= 16:
            break
    return tuple(found)


@dataclass(frozen=True)
class _Tiling:
    """A convolution cut into tiles of inputs, and into groups and filters that memory has room for."""

    geometry: Geometry
    run: Run
    tile: _Tile
    groups: int
    filters: int
    workers: int
    transforms: Any  # the module of them

    @classmethod
    def of(cls, geometry: Geometry, direction: Direction, temporaries: int, run: Run) -> _Tiling:
        xp = run.backend.xp
        problem = _Problem(geometry, direction, run.dtype.kind == "c", temporaries, _copies(xp))
        cut = _cut(problem, run.budget)
        assert cut is not None
        tile, workers = cut.tile, min(run.threads, cut.shares)
        share = run.budget // workers
        filters = largest_fitting(geometry.group_filters, share, lambda filters: problem.elements(tile, filters))
        groups = largest(geometry.groups, share, problem.elements(tile, filters))
        if groups == geometry.groups and workers > 1:  # something for each of them
            groups = _count(geometry.groups, workers)
        if geometry.groups == 1 and filters == geometry.group_filters:
            filters = _count(geometry.group_filters, workers)
        return cls(geometry, run, tile, groups, filters, workers, _transforms(xp))

    @property
    def xp(self) -> Any:
        return self.run.backend.xp

    @property
    def axes(self) -> tuple[int, ...]:
        return tuple(range(-self.geometry.rank, 0))

    @property
    def steps(self) -> Shape:
        """Outputs of a tile."""
        return _steps(self.tile, self.geometry)

    def spread(self, compute: Callable[[slice, slice], None]) -> None:
        """Has the parts computed, each of some groups and of some filters of each of them, by all threads."""

        def work(parts: Iterable[tuple[slice, slice]]) -> None:
            with self._idle_threads():
                for groups, filters in parts:
                    compute(groups, filters)

        filters = list(pieces(self.geometry.group_filters, self.filters))
        parts = [(groups, some) for groups in pieces(self.geometry.groups, self.groups) for some in filters]
        self.run.spread(parts, work, self.workers)

    def _idle_threads(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which transforms take the threads that parts leave idle."""
        if self.transforms is self.xp.fft:
            return contextlib.nullcontext()
        return self.transforms.set_workers(max(1, self.run.threads // self.workers))  # type: ignore[no-any-return]

    def tiles(self) -> Iterator[tuple[Shape, Shape]]:
        """Images, and the first output of each tile."""
        starts = [range(0, m, step) for m, step in zip(self.geometry.output, self.steps, strict=True)]
        return ((image, start) for image in numpy.ndindex(*self.geometry.batch) for start in product(*starts))

    def segments(self) -> Iterator[tuple[slice, ...]]:
        """The taps, so many at a time."""
        return product(*(pieces(k, size) for k, size in zip(self.geometry.kernel, self.tile.taps, strict=True)))

    def of_x(self, x: Operand, channel: int, image: Shape, start: Shape, segment: tuple[slice, ...]) -> Array:
        """The spectrum (G, *L) of the inputs of a channel that a segment of the kernel meets for a tile's outputs."""
        into, seen = [], []
        geometry = self.geometry
        axes = zip(
            start, self.tile.extent, segment, geometry.dilation, geometry.padding, geometry.input, strict=True
        )  # fmt: skip
        for output, size, taps, d, (low, _), n in axes:
            first = output + taps.start * d - low
            begin, end = max(0, first), min(n, first + size)
            seen.append(slice(begin, max(begin, end)))
            into.append(slice(begin - first, max(begin, end) - first))
        return self._spectrum(x, (*image, *seen, slice(None), channel), x.view.shape[-2:-1], tuple(into))

    def of_dy(self, dy: Operand, image: Shape, start: Shape) -> Array:
        """The conjugate spectrum (G, F, *L) of a tile's outputs."""
        seen, into = self._outputs(start)
        return self._spectrum(dy, (*image, *seen), dy.view.shape[-2:], into, conjugate=True)

    def of_w(self, w: Operand, channel: int, segment: tuple[slice, ...]) -> Array:
        """The conjugate spectrum (G, F, *L) of a segment of the weights of a channel, as dilation spreads them."""
        index = (*segment, slice(None), channel, slice(None))
        return self._spectrum(
            w, index, (w.view.shape[-3], w.view.shape[-1]), self._spread_taps(segment), conjugate=True
        )

    def spectra(self, w: Array) -> Array:
        """Memory (C, G, F, *L) for the spectra of weights, or of their gradients."""
        groups, channels, filters = w.shape[-3:]
        extent = self.tile.extent
        if self.run.dtype.kind != "c":
            extent = (*extent[:-1], extent[-1] // 2 + 1)
        dtype = numpy.result_type(self.run.dtype, numpy.complex64)
        return self.xp.empty((channels, groups, filters, *extent), dtype)

    def _outputs(self, start: Shape) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The outputs of a tile, and where they are in it."""
        ends = [min(m, o + step) for m, o, step in zip(self.geometry.output, start, self.steps, strict=True)]
        outputs = tuple(slice(first, end) for first, end in zip(start, ends, strict=True))
        return outputs, tuple(slice(0, axis.stop - axis.start) for axis in outputs)

    def _spread_taps(self, segment: tuple[slice, ...]) -> tuple[slice, ...]:
        """Where the taps of a segment are in a tile."""
        axes = zip(segment, self.geometry.dilation, strict=True)
        return tuple(slice(0, d * (taps.stop - taps.start - 1) + 1, d) for taps, d in axes)

    def _spectrum(
        self, operand: Operand, index: Any, channels: Shape, into: tuple[slice, ...], conjugate: bool = False
    ) -> Array:
        xp = self.xp
        block = xp.zeros((*channels, *self.tile.extent), self.run.dtype)
        target = block[(..., *into)]
        if target.size:
            operand.read(xp, index, target.transpose(*range(len(channels), block.ndim), *range(len(channels))))
        if self.run.dtype.kind != "c":
            spectrum = self.transforms.rfftn(block, axes=self.axes)
        else:
            block = xp.conjugate(block, out=block) if conjugate else block
            spectrum = self.transforms.fftn(block, axes=self.axes)
        return xp.conjugate(spectrum, out=spectrum) if conjugate else spectrum

    def sums(self, x: Operand, weights: _Weights, image: Shape, start: Shape) -> Array:
        """The spectrum (G, F, *L) of a tile: products of x and the weights, added up over taps and channels."""
        total = None
        for segment, channel in product(self.segments(), range(x.view.shape[-1])):
            read, of_w = (x, channel, image, start, segment), weights.spectrum(channel, segment)
            if total is None:
                total = self.xp.multiply(self.of_x(*read)[:, None], of_w)
            else:
                self.add(total, read, of_w, False)
            del of_w  # before the next one is computed
        return total

    def add(self, total: Array, read: tuple[Any, ...], spectrum: Array, is_first: bool) -> None:
        """Adds the product of this spectrum and that of inputs, which of_x reads, or puts it there."""
        inputs = self.of_x(*read)[:, None]
        if is_first:
            self.xp.multiply(inputs, spectrum, out=total)
        else:
            total += self.xp.multiply(inputs, spectrum)

    def _inverse(self, spectrum: Array) -> Array:
        if self.run.dtype.kind == "c":
            return self.transforms.ifftn(spectrum, axes=self.axes)
        return self.transforms.irfftn(spectrum, s=self.tile.extent, axes=self.axes)

    def store(self, spectrum: Array, y: Result, image: Shape, start: Shape) -> bool:
        """Finishes a tile's outputs and puts them into y; whether they are finite."""
        outputs, inside = self._outputs(start)
        block = self._inverse(spectrum)[(..., *inside)]
        finite = is_finite(block)
        block = block.transpose(*range(2, block.ndim), 0, 1)
        y.finish(self.xp, block)
        y.view[(*image, *outputs)] = block
        return finite

    def lags(self, spectrum: Array, segment: tuple[slice, ...]) -> Array:
        """dw (*taps, G, F) of a segment and a channel, of its spectrum (G, F, *L)."""
        block = self._inverse(spectrum)[(..., *self._spread_taps(segment))]
        return block.transpose(*range(2, block.ndim), 0, 1)


class _Weights:
    """The conjugate spectra of weights: kept for all tiles where the kernel is whole."""

    def __init__(self, tiling: _Tiling, w: Operand) -> None:
        self._tiling, self._w, self._kept = tiling, w, None
        if tiling.tile.taps == tiling.geometry.kernel:
            self._kept = tiling.spectra(w.view)
            (segment,) = tiling.segments()
            for channel in range(w.view.shape[-2]):
                self._kept[channel] = tiling.of_w(w, channel, segment)

    def spectrum(self, channel: int, segment: tuple[slice, ...]) -> Array:
        """That of a segment of the kernel and a channel: (G, F, *L)."""
        if self._kept is not None:
            return self._kept[channel]
        return self._tiling.of_w(self._w, channel, segment)


def _transforms(xp: Any) -> Any:
    """The module that transforms arrays of xp."""
    if xp is numpy and _has_scipy():
        import scipy.fft

        return scipy.fft
    return xp.fft


@lru_cache(maxsize=1)
def _has_scipy() -> bool:
    """Whether SciPy is installed; it is not imported before something is transformed."""
    return bool(sys.modules["scipy"] if "scipy" in sys.modules else importlib.util.find_spec("scipy"))


def _copies(xp: Any) -> int:
    """Arrays that a transform takes beside what it transforms, its result among them: measured, and rounded up.

    NumPy transforms float32 in double precision; what CuPy takes is a guess from above.
    """
    return 2 if xp is numpy and _has_scipy() else 6


@lru_cache(maxsize=4096)
def smooth(size: int) -> int:
    """The smallest number of no primes but 2, 3 and 5 that is not below this one."""
    best = 1 << max(0, size - 1).bit_length()
    fives = 1
    while fives < best:
        threes = fives
        while threes < best:
            twos = threes << max(0, -(-size // threes) - 1).bit_length()
            best = min(best, twos)
            threes *= 3
        fives *= 5
    return best
