"""fft: large kernels by products of spectra, in a time that hardly depends on the kernel extent.

A correlation of x with w is the product of their spectra at each frequency, the second one conjugated:

    forward      y[o]  = sum over t of x[o + t * dilation - low] w[t]      Y = X conj(FFT(conj(w)))
    data_grad    the same of dy, with w rotated by 180 degrees
    weight_grad  dw[t] = sum over o of x[o + t * dilation - low] dy[o]     the same of x, with dy in place of w

The correlation of each tile is circular: L inputs give the L - window + 1 outputs whose windows do not wrap around
(overlap-save, Stockham 1966). L has small prime factors only. Tiles are chosen by an estimate of time among those that
fit the workspace. If no tile fits for the whole kernel, the kernel is cut into segments: in forward and data_grad the
products of spectra are summed over segments, as over channels; in weight_grad each segment is computed by itself. NaN
and Inf would spread over a tile, so non-finite results are recomputed by im2col.

NumPy arrays are transformed by scipy.fft if SciPy is installed, since it is faster, else by numpy.fft.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from typing import Any, NamedTuple

import numpy

from gpuconv import dtypes
from gpuconv.arguments import Shape
from gpuconv.arrays import Array
from gpuconv.blocking import Blocks, Places, largest, largest_fitting, pieces
from gpuconv.cpu import containment, cost_model
from gpuconv.cpu.finite import is_finite, note
from gpuconv.geometry import Geometry
from gpuconv.operands import MOST_TEMPORARIES, Index, Operand, Result
from gpuconv.plan import Planner
from gpuconv.request import Request
from gpuconv.types import Direction
from gpuconv.views import View

DOUBLE = 0.6  # of the time in float32, where that of products of matrices doubles and counts as 1
SHARES = 4  # of the workspace, for parts that are computed concurrently


def why_not(request: Request) -> str | None:
    """Return a reason if a stride is not 1, as most outputs would be discarded, or if no tile fits the workspace."""
    if set(request.geometry.stride) != {1}:
        return f"it requires stride 1, not {request.geometry.stride}"
    correlation = _Correlation.of(request)
    if _cut(correlation, request.budget) is not None:
        return None
    return request.lacks(min(map(correlation.elements, correlation.segmented())), "the smallest tiles")


def nanoseconds(request: Request) -> float:
    """Estimate the time of the transforms of x, w and y and of the products of spectra."""
    correlation = _Correlation.of(request)
    cut = _cut(correlation, request.budget)
    assert cut is not None
    doubles = DOUBLE if dtypes.accumulator(request.dtype).char in "dD" else 1
    return doubles * correlation.nanoseconds(cut.tile, request.budget // cut.shares)


def forward(x: Operand, w: Operand, y: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute ``Y = X conj(FFT(conj(w)))``."""
    containment.forward(_forward, x, w, y, geometry, planner)


def data_grad(dy: Operand, w: Operand, dx: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute dx: the forward convolution of dy with w rotated by 180 degrees, C and F exchanged."""
    containment.data_grad(_forward, dy, w, dx, geometry, planner)


def weight_grad(dy: Operand, x: Operand, dw: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute ``DW = X conj(FFT(conj(dy)))``."""
    containment.weight_grad(_weight_grad, dy, x, dw, geometry, planner)


def _forward(x: Operand, w: Operand, y: Result, geometry: Geometry, flags: View, planner: Planner) -> None:
    tiling = _Tiling.of(geometry, "forward", x.temporaries, planner)

    def some_filters(part: tuple[slice, slice], planner: Planner) -> None:
        groups, filters = part
        weights = w.of_groups(groups, "w").of_channels(filters)
        tiling.forward(x.of_groups(groups, "x"), weights, y.of_groups(groups, "y").of_channels(filters), flags, planner)

    planner.loop(tiling.parts(), some_filters, tiling.workers)


def _weight_grad(dy: Operand, x: Operand, dw: Result, geometry: Geometry, planner: Planner) -> None:
    tiling = _Tiling.of(geometry, "weight_grad", max(x.temporaries, dy.temporaries), planner)

    def some_filters(part: tuple[slice, slice], planner: Planner) -> None:
        groups, filters = part
        gradients, result = dy.of_groups(groups, "y").of_channels(filters), dw.of_groups(groups, "w")
        tiling.weight_grad(gradients, x.of_groups(groups, "x"), result.of_channels(filters).view, planner)

    planner.loop(tiling.parts(), some_filters, tiling.workers)


class _Tile(NamedTuple):
    """The numbers of inputs and taps, along each axis, that are transformed at once."""

    extent: Shape  # L
    taps: Shape  # of a segment of the kernel: all taps if there is room


class _Cut(NamedTuple):
    """The tile of a correlation, and the number of shares into which the workspace is divided for several threads."""

    tile: _Tile
    shares: int


class _Correlation(NamedTuple):
    """Everything that determines the tiles of a correlation."""

    geometry: Geometry
    direction: Direction  # data_grad is a forward convolution
    is_complex: bool
    temporaries: int  # of reading x or dy
    copies: int  # arrays that a transform allocates beside its input

    @classmethod
    def of(cls, request: Request) -> _Correlation:
        """Return the correlation of a request, for operands that need MOST_TEMPORARIES."""
        forward = request.as_forward()
        copies = _copies(request.backend.xp)
        return cls(forward.geometry, forward.direction, request.is_complex, MOST_TEMPORARIES, copies)

    def elements(self, tile: _Tile, filters: int = 1) -> int:
        """Return the elements of all arrays that are alive at once, for one group and this many of its filters.

        The temporaries of reads and transforms are counted in addition to the spectra. The memory that transforms use
        outside of arrays, a few lines for each thread, is not counted.
        """
        channels, read = self.geometry.group_channels, max(self.copies, self.temporaries)
        if self.direction == "weight_grad":  # all sums, dy and x
            arrays = channels * filters + filters + 1 + read * filters
        elif tile.taps == self.geometry.kernel:  # all weights; sums and x
            arrays = channels * filters + filters + 1 + max(self.copies * filters, self.temporaries)
        else:  # sums, weights and x
            arrays = 2 * filters + 1 + max(self.copies * filters, self.temporaries)
        size = math.prod(tile.extent) if self.is_complex else math.prod(tile.extent[:-1]) * (tile.extent[-1] + 2)
        return size * arrays

    def nanoseconds(self, tile: _Tile, share: int) -> float:
        """Estimate the time for this tile; ``share`` is the number of elements that a part may use."""
        geometry, size = self.geometry, math.prod(tile.extent)
        tiles = math.prod((*geometry.batch, *map(_count, geometry.output, _steps(tile, geometry))))
        segments = math.prod(map(_count, geometry.kernel, tile.taps))
        passes = _count(geometry.group_filters, max(1, share // self.elements(tile)))  # passes over x
        weights = geometry.channels * geometry.group_filters
        spectra = tiles * (passes * segments * geometry.channels + geometry.filters)
        spectra += weights * (1 if segments == 1 else tiles * segments)
        transforms = spectra * math.log2(2 * size) * cost_model.FOURIER
        products = tiles * segments * weights / 2 * cost_model.MULTIPLY
        called = tiles * passes * segments * (80 + 10 * geometry.group_channels) * cost_model.STEP
        return (transforms + products) * size * (1 + self.is_complex) + called

    def whole(self) -> Iterator[_Tile]:
        """Return tiles for the whole kernel: on each axis for all outputs, half of them, a quarter and so on."""
        axes = map(_lengths, self.geometry.output, self.geometry.window)
        return (_Tile(extent, self.geometry.kernel) for extent in product(*axes))

    def segmented(self) -> Iterator[_Tile]:
        """Return tiles for segments of the kernel, with at most as many outputs as the window of a segment is wide."""
        axes = map(_segments, self.geometry.output, self.geometry.kernel, self.geometry.dilation)
        return (_Tile(*zip(*axes_of, strict=True)) for axes_of in product(*axes))


@lru_cache(maxsize=1024)
def _cut(correlation: _Correlation, budget: int) -> _Cut | None:
    """Return the fastest tiles that fit the budget, or None.

    The number of shares does not depend on the number of threads, so the tiles do not either. The kernel is cut only if
    no tile fits for the whole kernel.
    """
    shares = max(1, min(SHARES, correlation.geometry.groups * correlation.geometry.group_filters))

    def cost(cut: _Cut) -> tuple[float, list[int]]:
        """Return the time with two threads; ties are decided by long last axes, which have the best memory order."""
        nanoseconds = correlation.nanoseconds(cut.tile, budget // cut.shares) / min(cut.shares, 2)
        return nanoseconds, [-n for n in cut.tile.extent[::-1]]

    for tiles in (correlation.whole, correlation.segmented):
        cuts = (_Cut(tile, number) for number in range(shares, 0, -1) for tile in tiles())
        fitting = [cut for cut in cuts if correlation.elements(cut.tile) <= budget // cut.shares]
        if fitting:
            return min(fitting, key=cost)
    return None


def _steps(tile: _Tile, geometry: Geometry) -> Shape:
    """Return the extents of the outputs of a tile."""
    axes = zip(tile.extent, tile.taps, geometry.dilation, strict=True)
    return tuple(length - d * (k - 1) for length, k, d in axes)


def _count(extent: int, size: int) -> int:
    return -(-extent // size)


def _lengths(outputs: int, window: int) -> tuple[int, ...]:
    """Return lengths of tiles along an axis, down to one with fewer outputs than an eighth of the window."""
    lengths = []
    for halvings in range(outputs.bit_length()):
        step = -(-outputs // 2**halvings)
        lengths.append(smooth(step + window - 1))
        if 8 * step < window:
            break
    return tuple(dict.fromkeys(lengths))


def _segments(outputs: int, kernel: int, dilation: int) -> tuple[tuple[int, int], ...]:
    """Return lengths of tiles along an axis and the taps of their segments.

    The segments have all taps, half of them and so on down to 16.
    """
    found = []
    for halvings in range(kernel.bit_length()):
        taps = -(-kernel // 2**halvings)
        window = dilation * (taps - 1) + 1
        found.append((smooth(min(outputs, window) + window - 1), taps))
        if taps <= 16:
            break
    return tuple(found)


class _Space(NamedTuple):
    """Memory shared by a spectrum and the block of which it is the transform."""

    block: View  # (*channels, *L)
    spectrum: View  # (*channels, *L), with a last extent of L // 2 + 1 for real numbers


@dataclass(frozen=True)
class _Tiling:
    """A convolution cut into tiles of inputs, and into groups and filters that fit the workspace."""

    geometry: Geometry
    dtype: numpy.dtype
    xp: Any
    tile: _Tile
    groups: int
    filters: int
    workers: int
    transforms: tuple[Callable[..., Any], Callable[..., Any]]  # forward and inverse

    @classmethod
    def of(cls, geometry: Geometry, direction: Direction, temporaries: int, planner: Planner) -> _Tiling:
        xp, is_complex = planner.xp, dtypes.is_complex(planner.dtype)
        correlation = _Correlation(geometry, direction, is_complex, temporaries, _copies(xp))
        cut = _cut(correlation, planner.budget)
        assert cut is not None
        tile, workers = cut.tile, min(planner.threads, cut.shares)
        share = planner.budget // workers
        filters = largest_fitting(geometry.group_filters, share, lambda filters: correlation.elements(tile, filters))
        groups = largest(geometry.groups, share, correlation.elements(tile, filters))
        if groups == geometry.groups and workers > 1:  # a part for each worker
            groups = _count(geometry.groups, workers)
        if geometry.groups == 1 and filters == geometry.group_filters:
            filters = _count(geometry.group_filters, workers)
        transforms = transforms_of(xp, is_complex, tile.extent, max(1, planner.threads // workers))
        return cls(geometry, planner.dtype, xp, tile, groups, filters, workers, transforms)

    def parts(self) -> list[tuple[slice, slice]]:
        """Return the groups, and the filters of each of them, that are computed at a time."""
        filters = list(pieces(self.geometry.group_filters, self.filters))
        return [(groups, some) for groups in pieces(self.geometry.groups, self.groups) for some in filters]

    def _over_tiles(self, body: Callable[[Shape, Index, Planner], None], planner: Planner) -> None:
        """Plan ``body`` for the outputs of every tile of every image."""
        images, blocks = Places(self.geometry.batch), Blocks(self.geometry.output, _steps(self.tile, self.geometry))

        def some_outputs(number: int, planner: Planner) -> None:
            image, block = divmod(number, len(blocks))
            body(images[image], blocks[block], planner)

        planner.loop(range(len(images) * len(blocks)), some_outputs)

    @property
    def _segments(self) -> Blocks:
        """The segments of the kernel."""
        return Blocks(self.geometry.kernel, self.tile.taps)

    def forward(self, x: Operand, w: Operand, y: Result, flags: View, planner: Planner) -> None:
        """Compute y, and set the flags of images with non-finite results to 0."""
        groups, channels, filters = w.view.shape[-3:]
        segments, is_whole = self._segments, self.tile.taps == self.geometry.kernel
        spaces = self._spaces((groups, filters), channels if is_whole else 1, planner)

        def transform_weights(channel: int, planner: Planner) -> None:
            self._read_w(w, channel, segments[0], spaces[channel], planner)

        if is_whole:  # the weights are the same for all tiles
            planner.loop(range(channels), transform_weights)

        def some_outputs(image: Shape, outputs: Index, planner: Planner) -> None:
            (total,), (inputs,) = (self._spaces(of, 1, planner) for of in ((groups, filters), (groups,)))

            def add(number: int, planner: Planner) -> None:
                segment, channel = divmod(number, channels)
                weights = spaces[channel if is_whole else 0]
                if not is_whole:
                    self._read_w(w, channel, segments[segment], weights, planner)
                self._read_x(x, channel, (image, outputs, segments[segment]), inputs, planner)
                self._add(total.spectrum, inputs, weights, number == 0, planner)

            planner.loop(range(len(segments) * channels), add)
            inside = tuple(slice(0, axis.stop - axis.start) for axis in outputs)
            block = self._invert(total, inside, planner)
            note(flags[image], block, is_finite, planner)
            block = block.transpose(*range(2, block.ndim), 0, 1)
            y.store(block, y.view[(*image, *outputs)], planner)

        self._over_tiles(some_outputs, planner)

    def weight_grad(self, dy: Operand, x: Operand, dw: View, planner: Planner) -> None:
        """Compute dw, one segment of the kernel at a time."""
        groups, channels, filters = dw.shape[-3:]

        def some_taps(segment: Index, planner: Planner) -> None:
            sums = self._spaces((groups, filters), channels, planner)

            def some_outputs(image: Shape, outputs: Index, planner: Planner) -> None:
                (gradients,), (inputs,) = (self._spaces(of, 1, planner) for of in ((groups, filters), (groups,)))
                inside = tuple(slice(0, axis.stop - axis.start) for axis in outputs)
                self._transform(dy, (*image, *outputs), inside, gradients, True, planner)
                is_first = not any((*image, *(axis.start for axis in outputs)))

                def add(channel: int, planner: Planner) -> None:
                    self._read_x(x, channel, (image, outputs, segment), inputs, planner)
                    self._add(sums[channel].spectrum, inputs, gradients, is_first, planner)

                planner.loop(range(channels), add)

            self._over_tiles(some_outputs, planner)

            def store(channel: int, planner: Planner) -> None:
                block = self._invert(sums[channel], self._spread_taps(segment), planner)
                planner.copy(dw[(*segment, slice(None), channel)], block.transpose(*range(2, block.ndim), 0, 1))

            planner.loop(range(channels), store)

        planner.loop(self._segments, some_taps)

    # Steps.

    def _spaces(self, channels: Shape, number: int, planner: Planner) -> list[_Space]:
        """Return workspace for this many spectra of these channels."""
        extent = self.tile.extent
        half = extent if dtypes.is_complex(self.dtype) else (*extent[:-1], extent[-1] // 2 + 1)
        spectra, spaces = numpy.result_type(self.dtype, numpy.complex64), []
        for flat in planner.workspace(*(math.prod((*channels, *half)),) * number, dtype=spectra):
            block = View(flat.memory, flat.offset, (1,), (self.dtype.itemsize,), self.dtype)
            spaces.append(_Space(block.shaped((*channels, *extent)), flat.shaped((*channels, *half))))
        return spaces

    def _read_x(
        self, x: Operand, channel: int, at: tuple[Shape, Index, Index], space: _Space, planner: Planner
    ) -> None:
        """Compute the spectrum (G, *L) of some inputs of a channel.

        They are the inputs that the outputs of a tile read through a segment of the kernel.
        """
        into, seen, g, (image, outputs, segment) = [], [], self.geometry, at
        axes = zip(outputs, self.tile.extent, segment, g.input, strict=True)
        for axis, (output, size, taps, n) in enumerate(axes):
            first = g.position(axis, output.start, taps.start)
            begin, end = max(0, first), min(n, first + size)
            seen.append(slice(begin, max(begin, end)))
            into.append(slice(begin - first, max(begin, end) - first))
        self._transform(x, (*image, *seen, slice(None), channel), tuple(into), space, False, planner)

    def _read_w(self, w: Operand, channel: int, segment: Index, space: _Space, planner: Planner) -> None:
        """Compute the conjugate spectrum (G, F, *L) of a segment of the dilated weights of a channel."""
        index = (*segment, slice(None), channel, slice(None))
        self._transform(w, index, self._spread_taps(segment), space, True, planner)

    def _spread_taps(self, segment: Index) -> Index:
        """Return the positions of the taps of a segment in a tile."""
        axes = zip(segment, self.geometry.dilation, strict=True)
        return tuple(slice(0, d * (taps.stop - taps.start - 1) + 1, d) for taps, d in axes)

    def _transform(
        self, operand: Operand, index: Index, into: Index, space: _Space, conjugate: bool, planner: Planner
    ) -> None:
        """Compute the spectrum of a piece of an operand, padded with zeros, in the memory of its block."""
        block, rank = space.block, self.geometry.rank
        channels = range(block.ndim - rank)
        planner.copy(block, 0)
        target = block[(..., *into)]
        if target.size:
            operand.read(index, target.transpose(*range(len(channels), block.ndim), *channels), planner)
        if conjugate and dtypes.is_complex(self.dtype):
            planner.call(self.xp.conjugate, block, out=block)
        planner.call(_transform, space.spectrum, block, self.transforms[0], conjugate, self.xp)

    def _add(self, total: View, inputs: _Space, weights: _Space, is_first: bool, planner: Planner) -> None:
        """Accumulate the product of two spectra in ``total``, or store it if it is the first."""
        factors = inputs.spectrum[:, None], weights.spectrum
        if is_first:
            planner.call(self.xp.multiply, *factors, out=total)
        else:
            planner.call(_add_product, total, *factors)

    def _invert(self, space: _Space, inside: Index, planner: Planner) -> View:
        """Return a part of the inverse transform of a spectrum, in the memory of its block."""
        block = space.block.shaped(space.block[(..., *inside)].shape)
        planner.call(_invert, block, space.spectrum, self.transforms[1], inside)
        return block


def _transform(spectrum: Array, block: Array, transform: Any, conjugate: bool, xp: Any) -> None:
    """Compute ``spectrum = transform(block)``, conjugated or not; the two may share memory."""
    found = transform(block)
    if conjugate:
        xp.conjugate(found, out=spectrum)
    else:
        spectrum[...] = found


def _add_product(total: Array, inputs: Array, weights: Array) -> None:
    """Compute ``total += inputs * weights``."""
    total += inputs * weights


def _invert(block: Array, spectrum: Array, transform: Any, inside: Index) -> None:
    """Store a part of ``transform(spectrum)`` in ``block``; the two may share memory."""
    block[...] = transform(spectrum)[(..., *inside)]


def transforms_of(xp: Any, is_complex: bool, extent: Shape, workers: int) -> tuple[Any, Any]:
    """Return the forward and inverse transforms of tiles; SciPy uses ``workers`` threads, which parts leave idle."""
    module, options = xp.fft, dict[str, Any](axes=tuple(range(-len(extent), 0)))
    if xp is numpy and _has_scipy():
        import scipy.fft

        module, options = scipy.fft, {**options, "workers": workers}
    if is_complex:
        return partial(module.fftn, **options), partial(module.ifftn, **options)
    return partial(module.rfftn, **options), partial(module.irfftn, s=extent, **options)


@lru_cache(maxsize=1)
def _has_scipy() -> bool:
    """Return whether SciPy is installed; it is imported only when it is needed for a transform."""
    return bool(sys.modules["scipy"] if "scipy" in sys.modules else importlib.util.find_spec("scipy"))


def _copies(xp: Any) -> int:
    """Return how many arrays a transform allocates beside its input, including its result: measured, rounded up.

    NumPy transforms float32 in double precision. The number for CuPy is a guess on the high side.
    """
    return 2 if xp is numpy and _has_scipy() else 6


@lru_cache(maxsize=4096)
def smooth(size: int) -> int:
    """Return the smallest number >= size with no prime factors other than 2, 3 and 5; size is at least 1."""
    best = 1 << (size - 1).bit_length()
    fives = 1
    while fives < best:
        threes = fives
        while threes < best:
            twos = threes << (-(-size // threes) - 1).bit_length()
            best = min(best, twos)
            threes *= 3
        fives *= 5
    return best
