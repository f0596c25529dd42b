"""Tap by tap, by strided slices: the scatter-add on an array module, and what im2col falls back on.

One tap of the kernel at a time: all outputs meet the inputs that this tap shows them, which lie a stride apart, so
that a tap is one product and one addition to a strided slice. Nothing is unfolded. The sums of a block are formed in
the workspace, tap after tap in a fixed order, and stored once.

    forward      y[o]          += x[o * stride + t * dilation - low] w[t]
    data_grad    dx[o * stride + t * dilation - low] += dy[o] w[t]'
    weight_grad  dw[t]         += x[o * stride + t * dilation - low]' dy[o]

With one filter per channel there is nothing for a matrix product to do, and this is the faster way on NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from gpuconv.algorithms import cost
from gpuconv.algorithms.blocks import (
    Arrangement,
    Space,
    as_matrix,
    boxes,
    channels_innermost,
    copy_weights,
    fitting_box,
    largest,
    largest_part,
    lies_by_filters,
    pieces,
)
from gpuconv.algorithms.windows import inputs_seen, taps_of
from gpuconv.arguments import Shape
from gpuconv.backend import Array
from gpuconv.geometry import Direction, Geometry
from gpuconv.operands import MOST_TEMPORARIES, Index, Operand, Result, in_place
from gpuconv.request import Request
from gpuconv.workspace import Run, Team, shaped

# A tap passes over the whole block: smaller ones stay in the cache, larger ones make longer inner loops.
BLOCK_BYTES = 4 << 20
# Up to this many taps are added up one after the other.
ONE_RUN = 64
COUNTED_TAPS = 256  # of an axis, for the estimate


def why_not(request: Request) -> str | None:
    """A reason where one output (or input), with the weights of one filter of every group, does not fit the limit."""
    return request.lacks(least(largest_part(request), request.direction), "the sums and weights of one position")


def least(geometry: Geometry, direction: Direction) -> int:
    """Elements of workspace for one filter (or channel) of every group and one output (or input)."""
    channels, filters, sums = geometry.channels, geometry.filters, 3 + MOST_TEMPORARIES
    read = 1 + MOST_TEMPORARIES
    if direction == "forward":
        return channels * geometry.taps + read * channels + sums * geometry.groups
    if direction == "weight_grad":
        return 2 * channels * geometry.taps + (1 + read) * channels + sums * geometry.groups
    axes = zip(geometry.output, geometry.window, geometry.stride, strict=True)
    reaching = math.prod(min(m, (window - 1) // s + 1) for m, window, s in axes)
    return filters * geometry.taps + (read * reaching + 1) * filters + sums * geometry.groups


def nanoseconds(request: Request) -> float:
    """An estimate: products of the outputs that a tap shows some input, and their additions, tap by tap."""
    geometry, direction, is_complex = request.geometry, request.direction, request.is_complex
    met = math.prod(geometry.batch) * math.prod(_outputs_met(geometry))
    if geometry.group_channels == geometry.group_filters == 1:
        slowness = 4 if direction == "weight_grad" else 2 if geometry.layout == "channels_first" else 1
        called = 4 * geometry.taps * math.prod(geometry.batch) * cost.STEP
        return met * geometry.channels * cost.ADD * slowness + called
    product = 1.1 * cost.product(geometry.group_channels, geometry.group_filters, is_complex)  # one tap is short
    moved = geometry.filters if direction == "forward" else geometry.channels
    copied = geometry.channels + (geometry.filters if geometry.layout == "channels_first" else 0)
    # Where channels are innermost, those of a group lie side by side, and products and x are moved in such short runs.
    is_cut = geometry.layout == "channels_last" and geometry.groups > 1
    run = min(geometry.group_channels, geometry.group_filters) if is_cut else math.inf
    added = moved * (cost.added(moved) + 2 * cost.copied(run) * is_cut) + copied * cost.copied(run)
    # Taps that lie side by side are taken apart, and gradients of weights added to weights.
    moves_weights = direction == "weight_grad" or (geometry.layout == "channels_first" and geometry.taps > 1)
    around = 5 * cost.COPY * math.prod(geometry.w_shape) * moves_weights + 4 * geometry.taps * cost.STEP
    return met * (geometry.channels * geometry.group_filters * product + added) + around


def _outputs_met(geometry: Geometry) -> Iterator[float]:
    """For each axis, the number of (tap, output) pairs that meet an input; estimated where there are many taps."""
    axes = zip(
        geometry.input, geometry.output, geometry.kernel, geometry.stride, geometry.dilation, geometry.padding,
        strict=True,
    )  # fmt: skip
    for n, m, k, s, d, (low, _) in axes:
        taps = range(0, k, -(-k // COUNTED_TAPS))
        shifts = (t * d - low for t in taps)
        met = sum(max(0, min(m - 1, (n - 1 - shift) // s) - max(0, -(shift // s)) + 1) for shift in shifts)
        yield met * k / len(taps)


def forward(x: Operand, w: Operand, y: Result, geometry: Geometry, run: Run) -> None:
    """Adds to y what each tap of w makes of x."""
    xp, order = run.backend.xp, _order_of(x.view, geometry.group_channels)
    summed = not in_place(y.view, run.dtype)
    everything = (slice(None),) * len(geometry.batch)
    team = run.team(geometry, least(geometry, "forward"))
    block, sums = BLOCK_BYTES // run.dtype.itemsize, Space(summed, y.temporaries)
    sizes = _forward_sizes(geometry, run.budget, block, team, x.temporaries, sums)
    with run.workspace(sizes.weights) as (weight_space,):
        for filters in pieces(geometry.group_filters, sizes.pieces):
            weights = _loaded_weights(w, (..., filters), weight_space, run)

            def work(indices: Iterable[Index], filters: slice = filters, weights: Array = weights) -> None:
                with run.workspace(*sizes.spaces) as (slice_space, term_space, part_space, sums_space):
                    for index in indices:
                        target = y.view[(*index, slice(None), filters)]
                        total = shaped(sums_space, target.shape) if summed else target
                        xp.copyto(total, 0)
                        for taps in _runs_of_taps(geometry):
                            part = _part_of(xp, total, geometry, part_space)
                            for tap in taps:
                                into, seen = inputs_seen(tap, index, geometry)
                                images = _read(x, (*index[: len(everything)], *seen), order, slice_space, run)
                                if images.size:
                                    product = _product(xp, images, weights[tap], order, slice_space, term_space)
                                    meeting = part[(*everything, *into)]
                                    xp.add(meeting, product, out=meeting)
                            if part is not total:
                                xp.add(total, part, out=total)
                        y.finish(xp, total, filters)
                        if summed:
                            xp.copyto(target, total, casting="unsafe")

            run.spread(boxes((*geometry.batch, *geometry.output), sizes.box), work, team.workers)


def data_grad(dy: Operand, w: Operand, dx: Result, geometry: Geometry, run: Run) -> None:
    """Adds each tap's share of dy to the inputs that the tap read."""
    xp, order = run.backend.xp, _order_of(dy.view, geometry.group_filters)
    summed = not in_place(dx.view, run.dtype)
    w = w.part(w.view.swapaxes(-1, -2))
    gradients, sums = Space(not dy.is_plain(run.dtype), dy.temporaries), Space(summed, dx.temporaries)
    team, block = run.team(geometry, least(geometry, "data_grad")), BLOCK_BYTES // run.dtype.itemsize
    sizes = _data_grad_sizes(geometry, run.budget, block, team, gradients, sums)
    with run.workspace(sizes.weights) as (weight_space,):
        for channels in pieces(geometry.group_channels, sizes.pieces):
            weights = _loaded_weights(w, (..., channels), weight_space, run)

            def work(indices: Iterable[Index], channels: slice = channels, weights: Array = weights) -> None:
                with run.workspace(*sizes.spaces) as (dy_space, slice_space, term_space, part_space, sums_space):
                    for index in indices:
                        target = dx.view[(*index, slice(None), channels)]
                        total = shaped(sums_space, target.shape) if summed else target
                        xp.copyto(total, 0)
                        outputs = _outputs_reaching(index, geometry)
                        block = _loaded(dy, (*outputs, slice(None), slice(None)), dy_space, run)
                        for taps in _runs_of_taps(geometry) if block.size else ():
                            part = _part_of(xp, total, geometry, part_space)
                            for tap in taps:
                                into, source = _meeting(tap, index, outputs, geometry)
                                share = block[source]
                                if share.size:
                                    product = _product(xp, share, weights[tap], order, slice_space, term_space)
                                    xp.add(part[into], product, out=part[into])
                            if part is not total:
                                xp.add(total, part, out=total)
                        dx.finish(xp, total, channels)
                        if summed:
                            xp.copyto(target, total, casting="unsafe")

            run.spread(boxes((*geometry.batch, *geometry.input), sizes.box), work, team.workers)


def weight_grad(dy: Operand, x: Operand, dw: Result, geometry: Geometry, run: Run) -> None:
    """Adds to each tap of dw the products of dy with what the tap read."""
    xp, order = run.backend.xp, _by_groups(len(geometry.batch) + geometry.rank)
    team = run.team(geometry, least(geometry, "weight_grad"))
    everything = (slice(None),) * len(geometry.batch)
    summed = not in_place(dw.view, run.dtype) or as_matrix(dw.view[(0,) * geometry.rank], 1, 1) is None
    block = BLOCK_BYTES // run.dtype.itemsize
    sizes = _weight_grad_sizes(geometry, run.budget, block, team, x.temporaries, dy.temporaries, summed)
    *own, dy_size, sums_size = sizes.spaces
    with run.workspace(dy_size, sums_size) as (dy_space, sums_space):
        for filters in pieces(geometry.group_filters, sizes.pieces):
            target = dw.view[..., filters]
            total = _lying_like(target, sums_space) if summed else target
            xp.copyto(total, 0)
            for index in boxes((*geometry.batch, *geometry.output), sizes.box):
                gradients = _loaded(dy, (*index, slice(None), filters), dy_space, run)

                def work(
                    taps: Iterable[Shape],
                    index: Index = index,
                    gradients: Array = gradients,
                    total: Array = total,
                ) -> None:
                    with run.workspace(*own) as (slice_space, gradient_space, term_space):
                        for tap in taps:
                            meeting, seen = inputs_seen(tap, index, geometry)
                            images = _read(x, (*index[: len(everything)], *seen), order, slice_space, run)
                            if images.size:
                                rows = _as_rows(xp, images, order, slice_space).swapaxes(-1, -2)
                                share = _as_rows(xp, gradients[(*everything, *meeting)], order, gradient_space)
                                term = xp.matmul(rows, share, out=_lying_like(total[tap], term_space))
                                xp.add(total[tap], term, out=total[tap])

                run.spread(list(taps_of(geometry)), work, team.workers)
            if summed:
                xp.copyto(target, total, casting="unsafe")


def _runs_of_taps(geometry: Geometry) -> Iterator[list[Shape]]:
    """The taps, in runs about as many as they are long where there are many.

    Adding up K terms in runs keeps the rounding of like terms, which drifts one way, to the order of sqrt(K).
    """
    taps = list(taps_of(geometry))
    length = len(taps) if len(taps) <= ONE_RUN else math.isqrt(len(taps))
    return (taps[start : start + length] for start in range(0, len(taps), length))


def _part_of(xp: Any, total: Array, geometry: Geometry, space: Array) -> Array:
    """Where a run of taps is added up: in the total, where there is one run, else in a part that begins at 0."""
    if geometry.taps <= ONE_RUN:
        return total
    part = shaped(space, total.shape)
    xp.copyto(part, 0)
    return part


def _product(xp: Any, images: Array, weight: Array, order: Arrangement, slice_space: Array, term_space: Array) -> Array:
    """images (*box, G, I) times weight (G, I, J): the box's (*box, G, J), in the workspace."""
    term, matrix = order.empty((*images.shape[:-1], weight.shape[-1]), term_space)
    if weight.shape[-2] == 1:
        return xp.multiply(images, weight[:, 0], out=term)
    xp.matmul(_as_rows(xp, images, order, slice_space), weight, out=matrix)
    return term


def _as_rows(xp: Any, images: Array, order: Arrangement, space: Array) -> Array:
    """images (*box, G, I) as matrices (G, positions, I), copied where they do not lie so."""
    rows = order.matrix(images)
    if rows is None:
        block, rows = order.empty(images.shape, space)
        xp.copyto(block, images)
    return rows


def _loaded_weights(w: Operand, index: Index, space: Array, run: Run) -> Array:
    """Some of the weights (*kernel, G, I, J), where they lie if each tap is a matrix there, else in the workspace."""
    piece = w.view[index]
    if w.is_plain(run.dtype) and as_matrix(piece[(0,) * (piece.ndim - 3)], 1, 1) is not None:
        return piece
    block = _lying_like(piece, space)
    copy_weights(w.part(piece), block, run)
    return block


def _lying_like(weights: Array, space: Array) -> Array:
    """Workspace in the shape of weights, tap after tap, with the channels and filters of a tap as they lie."""
    *taps, channels, filters = weights.shape
    if lies_by_filters(weights):
        return shaped(space, (*taps, filters, channels)).swapaxes(-1, -2)
    return shaped(space, weights.shape)


def _loaded(operand: Operand, index: Index, space: Array, run: Run) -> Array:
    """A piece of an operand in the dtype of the sums: where it lies if that will do."""
    piece = operand.view[index]
    if operand.is_plain(run.dtype):
        return piece
    block = shaped(space, piece.shape)
    if block.size:
        operand.read(run.backend.xp, index, block)
    return block


def _read(images: Operand, index: Index, order: Arrangement, space: Array, run: Run) -> Array:
    """The same for images, which lie in the workspace in the order in which they are multiplied."""
    piece = images.view[index]
    if images.is_plain(run.dtype) or not piece.size:
        return piece
    block, _ = order.empty(piece.shape, space)
    images.read(run.backend.xp, index, block)
    return block


def _order_of(images: Array, channels: int) -> Arrangement:
    """How blocks of these images lie: matrices (G, positions, I) for products, their own order for multiplications."""
    positions = images.ndim - 2
    if channels == 1 and channels_innermost(images):
        return Arrangement(tuple(range(images.ndim)), positions, 2)
    return _by_groups(positions)


@lru_cache(maxsize=16)
def _by_groups(positions: int) -> Arrangement:
    return Arrangement((positions, *range(positions), positions + 1), positions, 1)


def _outputs_reaching(index: Index, geometry: Geometry) -> Index:
    """The outputs whose windows meet a block of inputs; batch axes as they are."""
    batch = len(geometry.batch)
    outputs = []
    axes = zip(index[batch:], geometry.stride, geometry.window, geometry.padding, geometry.output, strict=True)
    for inputs, s, window, (low, _), m in axes:
        first = max(0, -(-(inputs.start + low - window + 1) // s))
        outputs.append(slice(first, max(first, min(m, (inputs.stop - 1 + low) // s + 1))))
    return (*index[:batch], *outputs)


def _meeting(tap: tuple[int, ...], index: Index, outputs: Index, geometry: Geometry) -> tuple[Index, Index]:
    """Where a tap takes a block of outputs to in a block of inputs: slices of the inputs and of the outputs."""
    batch = len(geometry.batch)
    into, source = [slice(None)] * batch, [slice(None)] * batch
    for axis, t in enumerate(tap):
        s, inputs, block = geometry.stride[axis], index[batch + axis], outputs[batch + axis]
        shift = t * geometry.dilation[axis] - geometry.padding[axis][0]  # input = output * s + shift
        first = max(block.start, -(-(inputs.start - shift) // s))
        last = min(block.stop - 1, (inputs.stop - 1 - shift) // s)
        count = max(0, last - first + 1)
        start = first * s + shift - inputs.start
        into.append(slice(start, start + (count - 1) * s + 1, s) if count else slice(0, 0))
        source.append(slice(first - block.start, first - block.start + count) if count else slice(0, 0))
    return tuple(into), tuple(source)


class _Sizes(NamedTuple):
    """The filters (or channels) per group and the block done at once, and the elements of each workspace."""

    pieces: int
    box: Shape
    spaces: tuple[int, ...]  # of each thread
    weights: int = 0


@lru_cache(maxsize=1024)
def _forward_sizes(geometry: Geometry, budget: int, block: int, team: Team, temporaries: int, sums: Space) -> _Sizes:
    weights = geometry.channels * geometry.taps  # per filter of each group
    filters = largest(geometry.group_filters, budget // 2, weights)

    def parts(box: Shape) -> tuple[tuple[int, Space], ...]:
        outputs = math.prod(box)
        terms = outputs * geometry.groups * filters
        return (
            (outputs * geometry.channels, Space(True, temporaries)),
            (terms, Space()),
            (terms, Space(geometry.taps > ONE_RUN)),
            (terms, sums),
        )

    limit, extents = min((budget - weights * filters) // team.shares, block), (*geometry.batch, *geometry.output)
    return _Sizes(filters, *fitting_box(extents, limit, parts, team.share(math.prod(extents))), weights * filters)


@lru_cache(maxsize=1024)
def _data_grad_sizes(geometry: Geometry, budget: int, block: int, team: Team, gradients: Space, sums: Space) -> _Sizes:
    weights = geometry.filters * geometry.taps  # per channel of each group
    channels = largest(geometry.group_channels, budget // 2, weights)
    batch = len(geometry.batch)

    def parts(box: Shape) -> tuple[tuple[int, Space], ...]:
        axes = list(zip(box[batch:], geometry.stride, geometry.window, geometry.output, strict=True))
        reaching = math.prod(box[:batch]) * math.prod(
            min(m, (size + window - 2) // s + 1) for size, s, window, m in axes
        )
        of_tap = math.prod(box[:batch]) * math.prod(min(m, (size - 1) // s + 1) for size, s, _, m in axes)
        terms = math.prod(box) * geometry.groups * channels
        return (
            (reaching * geometry.filters, gradients),
            (of_tap * geometry.filters, Space()),
            (of_tap * geometry.groups * channels, Space()),
            (terms, Space(geometry.taps > ONE_RUN)),
            (terms, sums),
        )

    limit, extents = min((budget - weights * channels) // team.shares, block), (*geometry.batch, *geometry.input)
    return _Sizes(channels, *fitting_box(extents, limit, parts, team.share(math.prod(extents))), weights * channels)


@lru_cache(maxsize=1024)
def _weight_grad_sizes(
    geometry: Geometry, budget: int, block: int, team: Team, temporaries: int, dy_temporaries: int, summed: bool
) -> _Sizes:
    weights = geometry.channels * geometry.taps  # per filter of each group
    filters = largest(geometry.group_filters, budget // 2, (1 + summed) * weights + team.shares * geometry.channels)

    def parts(box: Shape) -> tuple[tuple[int, Space], ...]:
        outputs = math.prod(box)
        return (
            (outputs * geometry.channels, Space(True, temporaries)),
            (outputs * geometry.groups * filters, Space()),
            (outputs * geometry.groups * filters, Space(True, dy_temporaries)),
        )

    term, total = geometry.channels * filters, summed * weights * filters
    limit = min((budget - total) // team.shares - term, block)
    box, (of_tap, of_share, of_dy) = fitting_box((*geometry.batch, *geometry.output), limit, parts)
    return _Sizes(filters, box, (of_tap, of_share, term, of_dy, total))
