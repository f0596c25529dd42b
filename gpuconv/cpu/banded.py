"""depthwise without compiled kernels: products of rows of x with banded matrices, for one filter per channel.

With one channel per group there is no sum over channels, so the reduction of a matrix product must be along the image:
m adjacent outputs of a row depend on the same L = (m - 1) * stride + window inputs. The taps of each channel become a
matrix T, and the convolution becomes one of m filters of width L at a stride of m * stride, which im2col computes:

    T[r, j * stride + s * dilation, j] = w[r, s]        r: taps of all axes except the last, s: of the last

    forward      y[o, j]  = sum over r and l of x[r, l] T[r, l, j]
    data_grad    the same of dy, with w rotated by 180 degrees, for stride 1
    weight_grad  dw[r, s] = sum over j of the gradient in T[r, j * stride + s * dilation, j]

Most elements of T are zero, but a product is still several times as fast as multiplying and adding tap by tap, where
every tap is a pass through memory. NaN and Inf times these zeros would be NaN, so non-finite operands are computed tap
by tap (slices.py). So is data_grad with a stride, where few taps reach each input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

from gpuconv.blocking import pieces
from gpuconv.cpu import containment, cost_model, im2col, slices
from gpuconv.cpu.finite import if_finite
from gpuconv.cpu.unfold import smallest
from gpuconv.geometry import Geometry
from gpuconv.operands import Operand, Result
from gpuconv.plan import Body, Planner, Team
from gpuconv.request import Request
from gpuconv.views import View

FEWEST, MOST = 7, 16  # outputs of a row that are computed at once: m
BLOCK_BYTES = 1 << 20  # of windows, which should fit in the cache
SUM_BYTES = 2 << 20  # of windows and sums of weight_grad
CHUNKS = 16  # of the channels, shared by threads


def why_not(request: Request) -> str | None:
    """Return a reason unless a group has one channel and one filter and the workspace suffices."""
    geometry = request.geometry
    channels, filters = geometry.group_channels, geometry.group_filters
    if not channels == filters == 1:
        return f"it requires one channel and one filter per group, not {channels} and {filters}"
    if (reason := slices.why_not(request)) or _is_tap_by_tap(request):
        return reason
    return request.lacks(max(map(_least, _parts(request.as_forward().geometry))), "the matrices of one channel")


def _is_tap_by_tap(request: Request) -> bool:
    return request.direction == "data_grad" and set(request.geometry.stride) != {1}


def nanoseconds(request: Request) -> float:
    """Estimate the time to copy the windows of tiles and to multiply them by the matrices of taps."""
    if _is_tap_by_tap(request):
        return slices.nanoseconds(request)
    geometry = request.as_forward().geometry
    images = geometry.channels * math.prod(geometry.batch)
    product = 4 * cost_model.PRODUCT * (cost_model.COMPLEX if request.is_complex else 1)  # a short product
    windows = sum(part.windows * (1.4 * cost_model.COPY + part.m * product) for part in _parts(geometry))
    planes = math.prod(geometry.input) + math.prod(geometry.output) if geometry.layout == "channels_last" else 0
    return images * windows + cost_model.exchanged(images * planes)


@dataclass(frozen=True)
class _Part:
    """Outputs start to start + tiles * m of every row, in tiles of m."""

    geometry: Geometry
    start: int
    tiles: int
    m: int

    @property
    def length(self) -> int:
        """L: the number of inputs that a tile reads."""
        return (self.m - 1) * self.geometry.stride[-1] + self.geometry.window[-1]

    @property
    def bands(self) -> int:
        """The number of elements of T of one channel."""
        return math.prod(self.geometry.kernel[:-1]) * self.length * self.m

    @property
    def windows(self) -> int:
        """The number of elements of the windows of one channel of one image."""
        return math.prod((*self.geometry.output[:-1], self.tiles, *self.geometry.kernel[:-1], self.length))

    def of(self, groups: int) -> Geometry:
        """Return the convolution of this many channels whose filters are the outputs of a tile."""
        geometry, step, (low, _) = self.geometry, self.geometry.stride[-1], self.geometry.padding[-1]
        low -= self.start * step
        high = (self.tiles - 1) * self.m * step + self.length - low - geometry.input[-1]
        return replace(
            geometry,
            channels=groups,
            filters=groups * self.m,
            groups=groups,
            kernel=(*geometry.kernel[:-1], self.length),
            stride=(*geometry.stride[:-1], self.m * step),
            padding=(*geometry.padding[:-1], (low, high)),
            dilation=(*geometry.dilation[:-1], 1),
        )

    def shaped(self, flat: View, groups: int) -> View:
        """Return workspace as T of this many channels: (G, *kernel except the last axis, L, m)."""
        return flat.shaped((groups, *self.geometry.kernel[:-1], self.length, self.m))

    def diagonals(self, bands: View) -> View:
        """Return the view of the taps in T: (G, *kernel, m)."""
        along_length, along_m = bands.strides[-2:]
        return bands.strided(
            (*bands.shape[:-2], self.geometry.kernel[-1], self.m),
            (
                *bands.strides[:-2],
                self.geometry.dilation[-1] * along_length,
                self.geometry.stride[-1] * along_length + along_m,
            ),
        )

    def outputs(self, view: View) -> View:
        """Return the part's outputs of a view (*batch, *output, G, 1), with the outputs of a tile as filters."""
        part = view[..., self.start : self.start + self.tiles * self.m, :, 0]
        return part.reshape(*part.shape[:-2], self.tiles, self.m, part.shape[-1]).swapaxes(-1, -2)


@lru_cache(maxsize=1024)
def _parts(geometry: Geometry) -> tuple[_Part, ...]:
    """Return tiles of an extent that divides a row; otherwise tiles of the largest extent and one of the rest."""
    row = geometry.output[-1]
    m = next((m for m in range(MOST, FEWEST - 1, -1) if row % m == 0), min(MOST, row))
    parts = [_Part(geometry, 0, row // m, m)]
    if row % m:
        parts.append(_Part(geometry, row - row % m, 1, row % m))
    return tuple(parts)


def forward(x: Operand, w: Operand, y: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute ``y[o, j] = sum over r and l of x[r, l] T[r, l, j]``."""
    by_rows, by_taps = (partial(way, x, w, y, geometry) for way in (_forward, slices.forward))
    _if_finite([x.view, x.y, w.view], by_rows, by_taps, planner)


def data_grad(dy: Operand, w: Operand, dx: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute dx: the forward convolution of dy with w rotated by 180 degrees; with a stride, tap by tap."""
    by_taps = partial(slices.data_grad, dy, w, dx, geometry)
    if set(geometry.stride) == {1}:
        turned, inverse = containment.as_forward(w, geometry)
        _if_finite([dy.view, dy.y, w.view], partial(_forward, dy, turned, dx, inverse), by_taps, planner)
    else:
        by_taps(planner)


def _if_finite(views: Sequence[View | None], by_rows: Body, by_taps: Body, planner: Planner) -> None:
    """Plan ``by_rows`` if all arrays are finite, else ``by_taps``."""
    first, *others = views
    way = partial(_if_finite, others, by_rows, by_taps) if others else by_rows
    if first is None:
        way(planner)
    else:
        if_finite(first, way, by_taps, planner)


def _forward(x: Operand, w: Operand, y: Result, geometry: Geometry, planner: Planner) -> None:
    parts, chunks, limit = _work(geometry, planner, BLOCK_BYTES)

    def some_channels(groups: slice, planner: Planner) -> None:
        band_space, tap_space = planner.workspace(*_spaces(parts, chunks))
        number = groups.stop - groups.start
        taps = tap_space.shaped((number, *geometry.kernel))
        w.part(w.view[..., groups, 0, 0]).read((...,), taps.transpose(*range(1, taps.ndim), 0), planner)
        images, results = x.of_groups(groups, "x"), y.of_groups(groups, "y")

        def some_outputs(part: _Part, planner: Planner) -> None:
            bands = part.shaped(band_space, number)
            planner.copy(bands, 0)
            planner.copy(part.diagonals(bands), taps[..., None])
            outputs = replace(results, view=part.outputs(results.view))
            im2col.forward(images, Operand(_as_weight(bands)), outputs, part.of(number), planner.share(limit))

        planner.loop(parts, some_outputs)

    planner.loop(chunks, some_channels, _team(geometry, planner).workers)


def weight_grad(dy: Operand, x: Operand, dw: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute ``dw[r, s] = sum over j of the gradient in T[r, j * stride + s * dilation, j]``."""
    parts, chunks, limit = _work(geometry, planner, SUM_BYTES)
    band_size, tap_size = _spaces(parts, chunks)

    def some_channels(groups: slice, planner: Planner) -> None:
        band_space, total_space, term_space = planner.workspace(band_size, tap_size, tap_size)
        number = groups.stop - groups.start
        total, term = (space.shaped((number, *geometry.kernel)) for space in (total_space, term_space))
        images, gradients = x.of_groups(groups, "x"), dy.of_groups(groups, "y")

        def some_outputs(part: _Part, planner: Planner) -> None:
            bands, outputs = part.shaped(band_space, number), gradients.seen(part.outputs)
            im2col.weight_grad(outputs, images, Result(_as_weight(bands)), part.of(number), planner.share(limit))
            sums = total if part is parts[0] else term
            planner.call(planner.xp.sum, part.diagonals(bands), -1, out=sums)
            if sums is term:
                planner.call(planner.xp.add, total, term, out=total)

        planner.loop(parts, some_outputs)
        planner.copy(dw.view[..., groups, 0, 0], total.transpose(*range(1, total.ndim), 0))

    planner.loop(chunks, some_channels, _team(geometry, planner).workers)


def _work(geometry: Geometry, planner: Planner, most: int) -> tuple[tuple[_Part, ...], list[slice], int]:
    """Return the parts, the chunks of channels, and the bytes of workspace that im2col may use in each thread."""
    parts, team = _parts(geometry), _team(geometry, planner)
    limit = planner.limit // team.shares // 2
    fitting = min(BLOCK_BYTES, limit) // planner.dtype.itemsize // max(max(part.windows, part.bands) for part in parts)
    size = max(1, min(fitting, -(-geometry.groups // CHUNKS)))
    return parts, list(pieces(geometry.groups, size)), min(most, limit)


def _team(geometry: Geometry, planner: Planner) -> Team:
    return planner.team(geometry, max(map(_least, _parts(geometry))))


def _least(part: _Part) -> int:
    """Return the elements that a thread needs for one channel; half of them are for im2col."""
    matrices = part.bands + 2 * part.geometry.taps
    return 2 * max(matrices, smallest(part.of(1), "weight_grad"))


def _spaces(parts: Sequence[_Part], chunks: Sequence[slice]) -> tuple[int, int]:
    """Return the elements of T and of the taps of a chunk of channels."""
    groups = chunks[0].stop - chunks[0].start
    return groups * max(part.bands for part in parts), groups * parts[0].geometry.taps


def _as_weight(bands: View) -> View:
    """Return T as a weight of im2col: (*kernel except the last axis, L, G, 1, m)."""
    return bands.transpose(*range(1, bands.ndim - 1), 0, bands.ndim - 1)[..., None, :]
