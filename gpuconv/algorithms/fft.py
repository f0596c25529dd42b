"""fft: large kernels by products of spectra, in time that hardly depends on their extent.

A correlation of x with w is, frequency by frequency, the product of their spectra, the second one conjugated:

    forward      y[o]  = sum over t of x[o + t * dilation - low] w[t]      Y = X conj(FFT(conj(w)))
    data_grad    the same of dy, with w rotated by 180 degrees
    weight_grad  dw[t] = sum over o of x[o + t * dilation - low] dy[o]     the same of x, with dy in the place of w

It is a circular correlation of tiles: L inputs give those L - window + 1 outputs whose windows do not reach round the
end (overlap and save, Stockham 1966). L has small primes only; among the tiles that fit the workspace those are taken
that need the least time. NaN and Inf would spread over a tile: what holds some is computed again by im2col.

On NumPy the transforms are those of SciPy where it is installed, which are faster, and else NumPy's.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
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
    if problem.extent(request.budget) is not None:
        return None
    return request.lacks(problem.shares * min(map(problem.elements, problem.extents())), "the smallest tiles")


def nanoseconds(request: Request) -> float:
    """An estimate: the transforms of x, w and y, and the products of spectra."""
    problem = _Problem.of(request)
    extent = problem.extent(request.budget)
    assert extent is not None
    return problem.nanoseconds(extent, request.budget // problem.shares)


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
        weights = tiling.of_w(w.of_groups(groups, "w").of_channels(filters))
        images, results = x.of_groups(groups, "x"), y.of_groups(groups, "y").of_channels(filters)
        for image, start in tiling.tiles():
            if not tiling.store(tiling.sums(images, weights, image, start), results, image, start):
                nonfinite.add(image)

    def work(parts: Iterable[_Part]) -> None:
        with tiling.threads():
            for part in parts:
                compute(*part)

    run.spread(tiling.parts(), work, tiling.workers)
    return nonfinite


def _weight_grad(dy: Operand, x: Operand, dw: Result, geometry: Geometry, run: Run) -> None:
    tiling = _Tiling.of(geometry, "weight_grad", max(x.temporaries, dy.temporaries), run)

    def compute(groups: slice, filters: slice) -> None:
        images, gradients = x.of_groups(groups, "x"), dy.of_groups(groups, "y").of_channels(filters)
        sums = tiling.spectra(dw.of_groups(groups, "w").of_channels(filters).view)
        for number, (image, start) in enumerate(tiling.tiles()):
            tiling.add(sums, images, tiling.of_dy(gradients, image, start), image, start, number == 0)
        for channel in range(sums.shape[0]):
            dw.view[..., groups, channel, filters] = tiling.lags(sums[channel])

    def work(parts: Iterable[_Part]) -> None:
        with tiling.threads():
            for part in parts:
                compute(*part)

    run.spread(tiling.parts(), work, tiling.workers)


class _Problem(NamedTuple):
    """What decides the tiles of a correlation."""

    geometry: Geometry
    direction: Direction  # data_grad is a forward convolution
    is_complex: bool
    temporaries: int  # of reading x or dy

    @classmethod
    def of(cls, request: Request) -> _Problem:
        """That of a request, for operands that need all temporaries that there are."""
        geometry, direction = request.geometry, request.direction
        if direction == "data_grad":
            (residue,) = geometry.residues
            assert residue.geometry is not None
            geometry, direction = residue.geometry, "forward"
        return cls(geometry, direction, request.is_complex, MOST_TEMPORARIES)

    @property
    def shares(self) -> int:
        """Into how many parts the workspace is divided, however many threads there are."""
        return max(1, min(SHARES, self.geometry.groups * self.geometry.group_filters))

    def elements(self, extent: Shape, filters: int = 1) -> int:
        """Of all arrays of a part of one group: spectra of weights, and what is alive at the same time beside them."""
        channels, read = self.geometry.group_channels, 3 + self.temporaries  # an array, its spectrum, and another one
        if self.direction == "weight_grad":
            beside = max(read * filters, filters + read)
        else:
            beside = max(read, 3 * filters, (channels > 1) * (filters + read))
        size = math.prod(extent) if self.is_complex else math.prod(extent[:-1]) * (extent[-1] + 2)
        return size * (channels * filters + beside)

    def nanoseconds(self, extent: Shape, share: int) -> float:
        """An estimate for tiles of this extent, where the filters of a part have so many elements of workspace."""
        geometry, size = self.geometry, math.prod(extent)
        passes = -(-geometry.group_filters // max(1, share // self.elements(extent)))  # over x
        steps = (length - window + 1 for length, window in zip(extent, geometry.window, strict=True))
        tiles = math.prod((*geometry.batch, *(-(-m // step) for m, step in zip(geometry.output, steps, strict=True))))
        weights = geometry.channels * geometry.group_filters
        spectra = tiles * (passes * geometry.channels + geometry.filters) + weights
        transforms = spectra * math.log2(2 * size) * cost.FOURIER
        products = tiles * weights / 2 * cost.MULTIPLY
        called = tiles * passes * (80 + 10 * geometry.group_channels) * cost.STEP
        return (transforms + products) * size * (1 + self.is_complex) + called

    def extents(self) -> Iterator[Shape]:
        """Extents of tiles: along each axis all of the outputs, a half of them, a quarter and so on."""
        axes = (_lengths(m, window) for m, window in zip(self.geometry.output, self.geometry.window, strict=True))
        return product(*axes)

    def extent(self, budget: int) -> Shape | None:
        """The extent that takes the least time of those for which there is room; None where there is none."""
        return _extent(self, budget // self.shares)


@lru_cache(maxsize=1024)
def _extent(problem: _Problem, share: int) -> Shape | None:
    fitting = (extent for extent in problem.extents() if problem.elements(extent) <= share)
    # Of tiles that take as long, those whose last axes are long lie best in memory.
    return min(
        fitting, key=lambda extent: (problem.nanoseconds(extent, share), [-n for n in reversed(extent)]), default=None
    )


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


class _Part(NamedTuple):
    """Groups, and filters of each of them, that are done at once."""

    groups: slice
    filters: slice


@dataclass(frozen=True)
class _Tiling:
    """A convolution cut into tiles of inputs, and into groups and filters that memory has room for."""

    geometry: Geometry
    run: Run
    extent: Shape  # L of each axis
    groups: int
    filters: int
    workers: int
    transforms: Any  # the module of them

    @classmethod
    def of(cls, geometry: Geometry, direction: Direction, temporaries: int, run: Run) -> _Tiling:
        problem = _Problem(geometry, direction, run.dtype.kind == "c", temporaries)
        extent = problem.extent(run.budget)
        assert extent is not None
        workers = min(run.threads, problem.shares)
        share = run.budget // workers
        filters = largest_fitting(geometry.group_filters, share, lambda filters: problem.elements(extent, filters))
        groups = largest(geometry.groups, share, problem.elements(extent, filters))
        if groups == geometry.groups and workers > 1:  # something for each of them
            groups = -(-geometry.groups // workers)
        if geometry.groups == 1 and filters == geometry.group_filters:
            filters = -(-geometry.group_filters // workers)
        return cls(geometry, run, extent, groups, filters, workers, _transforms(run.backend.xp))

    def threads(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which transforms take the threads that parts leave idle."""
        if self.transforms is self.run.backend.xp.fft:
            return contextlib.nullcontext()
        return self.transforms.set_workers(max(1, self.run.threads // self.workers))  # type: ignore[no-any-return]

    @property
    def axes(self) -> tuple[int, ...]:
        return tuple(range(-self.geometry.rank, 0))

    @property
    def steps(self) -> Shape:
        """Outputs of a tile."""
        return tuple(size - window + 1 for size, window in zip(self.extent, self.geometry.window, strict=True))

    def parts(self) -> list[_Part]:
        geometry = self.geometry
        return [
            _Part(groups, filters)
            for groups in pieces(geometry.groups, self.groups)
            for filters in pieces(geometry.group_filters, self.filters)
        ]

    def tiles(self) -> Iterator[tuple[Shape, Shape]]:
        """Images, and the first output of each tile."""
        starts = [range(0, m, step) for m, step in zip(self.geometry.output, self.steps, strict=True)]
        return ((image, start) for image in numpy.ndindex(*self.geometry.batch) for start in product(*starts))

    def of_x(self, x: Operand, channel: int, image: Shape, start: Shape) -> Array:
        """The spectrum (G, *L) of the inputs of a channel that a tile's outputs see."""
        into, seen = [], []
        geometry = self.geometry
        for first, size, (low, _), n in zip(start, self.extent, geometry.padding, geometry.input, strict=True):
            begin, end = max(0, first - low), min(n, first - low + size)
            seen.append(slice(begin, max(begin, end)))
            into.append(slice(begin - first + low, max(begin, end) - first + low))
        return self._spectrum(x, (*image, *seen, slice(None), channel), x.view.shape[-2:-1], tuple(into))

    def of_dy(self, dy: Operand, image: Shape, start: Shape) -> Array:
        """The conjugate spectrum (G, F, *L) of a tile's outputs."""
        seen, into = self._outputs(start)
        return self._spectrum(dy, (*image, *seen), dy.view.shape[-2:], into, conjugate=True)

    def of_w(self, w: Operand) -> Array:
        """The conjugate spectra (C, G, F, *L) of weights, as far apart as dilation has them."""
        spectra = self.spectra(w.view)
        for channel in range(spectra.shape[0]):
            of_channel = self._spectrum(
                w, (..., channel, slice(None)), spectra.shape[1:3], self._taps(), conjugate=True
            )
            spectra[channel] = of_channel
        return spectra

    def spectra(self, w: Array) -> Array:
        """Memory (C, G, F, *L) for the spectra of weights, or of their gradients."""
        groups, channels, filters = w.shape[-3:]
        extent = self.extent if self.run.dtype.kind == "c" else (*self.extent[:-1], self.extent[-1] // 2 + 1)
        dtype = numpy.result_type(self.run.dtype, numpy.complex64)
        return self.run.backend.xp.empty((channels, groups, filters, *extent), dtype)

    def _outputs(self, start: Shape) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The outputs of a tile, and where they are in it."""
        ends = [min(m, o + step) for m, o, step in zip(self.geometry.output, start, self.steps, strict=True)]
        outputs = tuple(slice(first, end) for first, end in zip(start, ends, strict=True))
        return outputs, tuple(slice(0, axis.stop - axis.start) for axis in outputs)

    def _taps(self) -> tuple[slice, ...]:
        return tuple(
            slice(0, window, d) for window, d in zip(self.geometry.window, self.geometry.dilation, strict=True)
        )

    def _spectrum(
        self, operand: Operand, index: Any, channels: Shape, into: tuple[slice, ...], conjugate: bool = False
    ) -> Array:
        xp = self.run.backend.xp
        block = xp.zeros((*channels, *self.extent), self.run.dtype)
        target = block[(..., *into)]
        if target.size:
            operand.read(xp, index, target.transpose(*range(len(channels), block.ndim), *range(len(channels))))
        if self.run.dtype.kind != "c":
            spectrum = self.transforms.rfftn(block, axes=self.axes)
        else:
            block = xp.conjugate(block, out=block) if conjugate else block
            spectrum = self.transforms.fftn(block, axes=self.axes)
        return xp.conjugate(spectrum, out=spectrum) if conjugate else spectrum

    def sums(self, x: Operand, weights: Array, image: Shape, start: Shape) -> Array:
        """The spectrum (G, F, *L) of a tile: the products of x and the weights, added up over channels."""
        xp = self.run.backend.xp
        total = xp.multiply(self.of_x(x, 0, image, start)[:, None], weights[0])
        for channel in range(1, weights.shape[0]):
            total += xp.multiply(self.of_x(x, channel, image, start)[:, None], weights[channel])
        return total

    def add(self, sums: Array, x: Operand, gradients: Array, image: Shape, start: Shape, is_first: bool) -> None:
        """Adds the products of a tile to the spectra (C, G, F, *L) of dw, or puts them there."""
        xp = self.run.backend.xp
        for channel in range(sums.shape[0]):
            inputs = self.of_x(x, channel, image, start)[:, None]
            if is_first:
                xp.multiply(inputs, gradients, out=sums[channel])
            else:
                sums[channel] += xp.multiply(inputs, gradients)

    def _inverse(self, spectrum: Array) -> Array:
        if self.run.dtype.kind == "c":
            return self.transforms.ifftn(spectrum, axes=self.axes)
        return self.transforms.irfftn(spectrum, s=self.extent, axes=self.axes)

    def store(self, spectrum: Array, y: Result, image: Shape, start: Shape) -> bool:
        """Finishes a tile's outputs and puts them into y; whether they are finite."""
        outputs, inside = self._outputs(start)
        block = self._inverse(spectrum)[(..., *inside)]
        finite = is_finite(block)
        block = block.transpose(*range(2, block.ndim), 0, 1)
        y.finish(self.run.backend.xp, block)
        y.view[(*image, *outputs)] = block
        return finite

    def lags(self, spectrum: Array) -> Array:
        """dw (*kernel, G, F) of a channel, of its spectrum (G, F, *L)."""
        block = self._inverse(spectrum)[(..., *self._taps())]
        return block.transpose(*range(2, block.ndim), 0, 1)


def _transforms(xp: Any) -> Any:
    """The module that transforms arrays of xp."""
    if xp is numpy:
        with contextlib.suppress(ImportError):
            import scipy.fft

            return scipy.fft
    return xp.fft


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
