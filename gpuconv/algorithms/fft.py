"""fft: large kernels by products of spectra, in time that hardly depends on their extent.

A correlation of x with w is, frequency by frequency, the product of their spectra, the second one conjugated:

    forward      y[o]  = sum over t of x[o + t * dilation - low] w[t]      Y = X conj(FFT(conj(w)))
    data_grad    the same of dy, with w turned round
    weight_grad  dw[t] = sum over o of x[o + t * dilation - low] dy[o]     the same of x, with dy in the place of w

It is a circular correlation of tiles: L inputs give those L - window + 1 outputs whose windows do not reach round the
end (overlap and save, Stockham 1966). L has small primes only, and is as large as saves time and as memory allows. NaN
and Inf would spread over a tile: what holds some is done again by im2col.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import numpy

from gpuconv.algorithms import containment, cost
from gpuconv.algorithms.blocks import largest, pieces
from gpuconv.algorithms.finite import has_finite_square
from gpuconv.arguments import Shape
from gpuconv.backend import Array, Backend
from gpuconv.geometry import Direction, Geometry
from gpuconv.operands import Operand, Result
from gpuconv.workspace import Run


def why_not(
    geometry: Geometry, dtype: numpy.dtype, direction: Direction, backend: Backend, deterministic: bool
) -> str | None:
    """A reason for strides, of whose outputs most would be computed in vain."""
    if set(geometry.stride) != {1}:
        return f"it is for stride 1, not {geometry.stride}"
    return None


def nanoseconds(geometry: Geometry, direction: Direction, is_complex: bool) -> float:
    """An estimate: the transforms of x, w and y, and the products of spectra."""
    extent = _extents(geometry)[0]
    size = math.prod(extent)
    steps = (length - window + 1 for length, window in zip(extent, geometry.window, strict=True))
    tiles = math.prod((*geometry.batch, *(-(-m // step) for m, step in zip(geometry.output, steps, strict=True))))
    weights = geometry.channels * geometry.group_filters
    transforms = tiles * (geometry.channels + geometry.filters) + weights
    doublings = math.log2(2 * size)
    elements = transforms * doublings * cost.FOURIER + tiles * weights / 2 * cost.MULTIPLY
    return elements * size * (1 + is_complex) + 50 * tiles * cost.STEP


def forward(x: Operand, w: Operand, y: Result, geometry: Geometry, run: Run) -> None:
    """Y = X conj(FFT(conj(w)))."""
    containment.forward(_forward, x, w, y, geometry, run)


def data_grad(dy: Operand, w: Operand, dx: Result, geometry: Geometry, run: Run) -> None:
    """The forward convolution of dy with w turned round, C and F exchanged."""
    containment.data_grad(_forward, dy, w, dx, geometry, run)


def weight_grad(dy: Operand, x: Operand, dw: Result, geometry: Geometry, run: Run) -> None:
    """DW = X conj(FFT(conj(dy)))."""
    containment.weight_grad(_weight_grad, dy, x, dw, geometry, run)


def _forward(x: Operand, w: Operand, y: Result, geometry: Geometry, run: Run) -> set[Shape]:
    tiling, spoilt = _Tiling.of(geometry, run), set[Shape]()

    def work(parts: Iterable[_Part]) -> None:
        for groups, filters in parts:
            part = w.of_groups(groups, "w")
            weights = tiling.of_w(part.part(part.view[..., filters]))
            images, results = x.of_groups(groups, "x"), y.of_groups(groups, "y").of_channels(filters)
            for image, start in tiling.tiles():
                sums = _sum_of_products(tiling.of_x(images, image, start), weights, run.backend.xp)
                if not tiling.store(sums, results, image, start):
                    spoilt.add(image)

    run.spread(tiling.parts(), work, run.threads)
    return spoilt


def _weight_grad(dy: Operand, x: Operand, dw: Result, geometry: Geometry, run: Run) -> None:
    tiling, xp = _Tiling.of(geometry, run), run.backend.xp

    def work(parts: Iterable[_Part]) -> None:
        for groups, filters in parts:
            images, gradients = x.of_groups(groups, "x"), dy.of_groups(groups, "y").of_channels(filters)
            sums = None
            for image, start in tiling.tiles():
                inputs = tiling.of_x(images, image, start)[:, :, None]
                terms = xp.multiply(inputs, tiling.of_dy(gradients, image, start)[:, None])
                if sums is None:
                    sums = terms
                else:
                    sums += terms
            dw.view[..., groups, :, filters] = tiling.lags(sums)

    run.spread(tiling.parts(), work, run.threads)


def _sum_of_products(images: Array, weights: Array, xp: Any) -> Array:
    """images (G, C, *L) times weights (G, C, F, *L), added up over C."""
    sums = xp.multiply(images[:, 0, None], weights[:, 0])
    for channel in range(1, images.shape[1]):
        sums += xp.multiply(images[:, channel, None], weights[:, channel])
    return sums


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

    @classmethod
    def of(cls, geometry: Geometry, run: Run) -> _Tiling:
        return cls(geometry, run, *_sizes(geometry, run.budget, run.threads))

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
        starts = (range(0, m, step) for m, step in zip(self.geometry.output, self.steps, strict=True))
        return product(numpy.ndindex(*self.geometry.batch), product(*starts))

    def of_x(self, x: Operand, image: Shape, start: Shape) -> Array:
        """The spectrum (G, C, *L) of the inputs that a tile's outputs see."""
        into, seen = [], []
        geometry = self.geometry
        for first, size, (low, _), n in zip(start, self.extent, geometry.padding, geometry.input, strict=True):
            begin, end = max(0, first - low), min(n, first - low + size)
            seen.append(slice(begin, max(begin, end)))
            into.append(slice(begin - first + low, max(begin, end) - first + low))
        return self._spectrum(x, (*image, *seen), x.view.shape[-2:], tuple(into))

    def of_dy(self, dy: Operand, image: Shape, start: Shape) -> Array:
        """The conjugate spectrum (G, F, *L) of a tile's outputs."""
        ends = (min(m, o + step) for m, o, step in zip(self.geometry.output, start, self.steps, strict=True))
        seen = tuple(slice(first, end) for first, end in zip(start, ends, strict=True))
        into = tuple(slice(0, axis.stop - axis.start) for axis in seen)
        return self._spectrum(dy, (*image, *seen), dy.view.shape[-2:], into, conjugate=True)

    def of_w(self, w: Operand) -> Array:
        """The conjugate spectrum (G, C, F, *L) of weights, as far apart as dilation has them."""
        return self._spectrum(w, (...,), w.view.shape[-3:], self._taps(), conjugate=True)

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
            spectrum = xp.fft.rfftn(block, axes=self.axes)
        else:
            spectrum = xp.fft.fftn(xp.conjugate(block, out=block) if conjugate else block, axes=self.axes)
        return xp.conjugate(spectrum, out=spectrum) if conjugate else spectrum

    def _inverse(self, spectrum: Array) -> Array:
        xp = self.run.backend.xp
        if self.run.dtype.kind == "c":
            return xp.fft.ifftn(spectrum, axes=self.axes)
        return xp.fft.irfftn(spectrum, s=self.extent, axes=self.axes)

    def store(self, spectrum: Array, y: Result, image: Shape, start: Shape) -> bool:
        """Finishes a tile's outputs and puts them into y; whether they are finite."""
        xp = self.run.backend.xp
        ends = (min(m, o + step) for m, o, step in zip(self.geometry.output, start, self.steps, strict=True))
        outputs = tuple(slice(first, end) for first, end in zip(start, ends, strict=True))
        inside = tuple(slice(0, axis.stop - axis.start) for axis in outputs)
        block = xp.ascontiguousarray(self._inverse(spectrum)[(..., *inside)])
        finite = has_finite_square(block)
        block = block.transpose(*range(2, block.ndim), 0, 1)
        y.finish(xp, block)
        y.view[(*image, *outputs)] = block
        return finite

    def lags(self, spectrum: Array) -> Array:
        """dw (*kernel, G, C, F) of its spectrum (G, C, F, *L)."""
        block = self._inverse(spectrum)[(..., *self._taps())]
        return block.transpose(*range(3, block.ndim), 0, 1, 2)


@lru_cache(maxsize=1024)
def _sizes(geometry: Geometry, budget: int, threads: int) -> tuple[Shape, int, int]:
    """The extent of tiles, and the groups and filters of a part."""
    channels = geometry.group_channels

    def elements(extent: Shape, filters: int) -> int:
        """Of all arrays of a part of one group: inputs, weights and sums, and the transforms' own."""
        return math.prod((*extent[:-1], extent[-1] + 2)) * (4 * channels + 4 * channels * filters + 5 * filters)

    share = budget // threads
    extents = _extents(geometry)
    extent = next((extent for extent in extents if elements(extent, 1) <= share), extents[-1])
    filters = largest(geometry.group_filters, share - elements(extent, 0), elements(extent, 1) - elements(extent, 0))
    groups = largest(geometry.groups, share, elements(extent, filters))
    if groups == geometry.groups and threads > 1:  # something for each of them
        groups = -(-geometry.groups // threads)
    if geometry.groups == 1 and filters == geometry.group_filters:
        filters = -(-geometry.group_filters // threads)
    return extent, groups, filters


def _extents(geometry: Geometry) -> list[Shape]:
    """Extents of tiles, those first that take the fewest steps: from all of x down to a few windows."""
    found = []
    for halvings in range(16):
        steps = tuple(-(-m // 2**halvings) for m in geometry.output)
        extent = tuple(smooth(step + window - 1) for step, window in zip(steps, geometry.window, strict=True))
        tiles = math.prod(
            -(-m // (size - window + 1))
            for m, size, window in zip(geometry.output, extent, geometry.window, strict=True)
        )
        size = math.prod(extent)
        found.append((tiles * size * math.log2(2 * size), extent))
        if max(steps) == 1:
            break
    return [extent for _, extent in sorted(found)]


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
