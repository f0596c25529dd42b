"""Convolution tap by tap with strided slices: scatter-add on an array module, and the fallback of im2col.

The inputs that all outputs read through one tap of the kernel are a stride apart, so that a tap is one product and one
addition to a strided slice. Nothing is unfolded. The sums of a block are accumulated in the workspace, tap by tap in a
fixed order, and stored once.

    forward      y[o]          += x[o * stride + t * dilation - low] w[t]
    data_grad    dx[o * stride + t * dilation - low] += dy[o] w[t]'
    weight_grad  dw[t]         += x[o * stride + t * dilation - low]' dy[o]

With one filter per channel, elementwise multiplications take the place of matrix products, which is faster on NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from gpuconv.arguments import Shape
from gpuconv.blocking import (
    Arrangement,
    Blocks,
    Buffer,
    Buffers,
    Places,
    Share,
    as_matrix,
    channels_innermost,
    copy_weights,
    largest,
    largest_part,
    lies_by_filters,
    pieces,
)
from gpuconv.cpu import cost_model
from gpuconv.cpu.windows import all_inputs, meeting
from gpuconv.geometry import Geometry
from gpuconv.operands import MOST_TEMPORARIES, Index, Operand, Result, in_place
from gpuconv.plan import Planner
from gpuconv.request import Request
from gpuconv.types import Direction
from gpuconv.views import View

# Each tap passes over the whole block: smaller blocks stay in the cache, larger blocks have longer inner loops.
BLOCK_BYTES = 4 << 20
# Up to this many taps are accumulated in one run.
ONE_RUN = 64
COUNTED_TAPS = 256  # of an axis, in the estimate


def why_not(request: Request) -> str | None:
    """Return a reason if one output (or input), with the weights of one filter of every group, exceeds the limit."""
    return request.lacks(least(largest_part(request), request.direction), "the sums and weights of one position")


def least(geometry: Geometry, direction: Direction) -> int:
    """Return the elements of workspace for one filter (or channel) of every group and one output (or input)."""
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
    """Estimate the time of products and additions, tap by tap, for the outputs that read an input in bounds."""
    geometry, direction, is_complex = request.geometry, request.direction, request.is_complex
    met = math.prod(geometry.batch) * math.prod(_outputs_met(geometry))
    if geometry.group_channels == geometry.group_filters == 1:
        slowness = 4 if direction == "weight_grad" else 2 if geometry.layout == "channels_first" else 1
        called = 4 * geometry.taps * math.prod(geometry.batch) * cost_model.STEP
        return met * geometry.channels * cost_model.ADD * slowness + called
    product = 1.1 * cost_model.product(geometry.group_channels, geometry.group_filters, is_complex)  # one tap is short
    moved = geometry.filters if direction == "forward" else geometry.channels
    copied = geometry.channels + (geometry.filters if geometry.layout == "channels_first" else 0)
    # If channels are innermost, products and x are copied in runs of the channels of one group.
    is_cut = geometry.layout == "channels_last" and geometry.groups > 1
    run = min(geometry.group_channels, geometry.group_filters) if is_cut else math.inf
    added = copied * cost_model.copied(run)
    if direction != "weight_grad" or geometry.layout == "channels_first":
        added += moved * (cost_model.added(moved) + 2 * cost_model.copied(run) * is_cut)
    # Weights are copied if their taps are contiguous, and dw is accumulated tap by tap.
    moves_weights = direction == "weight_grad" or (geometry.layout == "channels_first" and geometry.taps > 1)
    around = 5 * cost_model.COPY * math.prod(geometry.w_shape) * moves_weights
    called = (4 * geometry.taps + 4) * cost_model.STEP
    return met * (geometry.channels * geometry.group_filters * product + added) + around + called


def _outputs_met(geometry: Geometry) -> Iterator[float]:
    """Yield for each axis the number of (tap, output) pairs that read an input; estimated if there are many taps."""
    for axis, (n, m, k) in enumerate(zip(geometry.input, geometry.output, geometry.kernel, strict=True)):
        taps = range(0, k, -(-k // COUNTED_TAPS))
        met = sum(len(geometry.outputs_reading(axis, t, slice(0, m), slice(0, n))) for t in taps)
        yield met * k / len(taps)


def forward(x: Operand, w: Operand, y: Result, geometry: Geometry, planner: Planner) -> None:
    """Accumulate the products of x with each tap of w in y."""
    order = _order_of(x.view, geometry.group_channels)
    summed = not in_place(y.view, planner.dtype)
    batch, everything = len(geometry.batch), (slice(None),) * len(geometry.batch)
    team = planner.team(geometry, least(geometry, "forward"))
    per_filter = geometry.channels * geometry.taps  # weights of one filter of every group
    share = Share.of(geometry.group_filters, per_filter, planner)

    def buffers_of(box: Shape) -> Buffers:
        outputs = math.prod(box)
        terms = outputs * geometry.groups * share.at_once
        return (
            Buffer(outputs * geometry.channels, True, x.temporaries),
            Buffer(terms),
            Buffer(terms, geometry.taps > ONE_RUN),
            Buffer(terms, summed, y.temporaries),
        )

    blocks = share.blocks((*geometry.batch, *geometry.output), buffers_of, team, BLOCK_BYTES, planner)

    def some_filters(filters: slice, weight_space: View, planner: Planner) -> None:
        weights = _loaded_weights(w, (..., filters), weight_space, planner)

        def some_outputs(index: Index, buffers: list[View], planner: Planner) -> None:
            slice_space, term_space, part_space, sums_space = buffers
            target = y.view[(*index, slice(None), filters)]

            def add(tap: Shape, part: View, planner: Planner) -> None:
                outputs, seen = meeting(tap, index[batch:], all_inputs(geometry), geometry)
                images = _loaded(x, (*index[:batch], *seen), slice_space, planner, order)
                if images.size:
                    sums = part[(*everything, *outputs)]
                    product = _product(images, weights[tap], order, slice_space, term_space, planner)
                    planner.call(planner.xp.add, sums, product, out=sums)

            total = sums_space.shaped(target.shape) if summed else target
            _add_up(add, total, part_space, geometry, planner)
            y.store(total, target, planner, filters)

        blocks.loop(some_outputs, planner, team.workers)

    share.loop(some_filters, planner)


def data_grad(dy: Operand, w: Operand, dx: Result, geometry: Geometry, planner: Planner) -> None:
    """Accumulate the products of dy with each tap of w in the inputs that the tap reads."""
    order = _order_of(dy.view, geometry.group_filters)
    summed = not in_place(dx.view, planner.dtype)
    w = w.part(w.view.swapaxes(-1, -2))
    team = planner.team(geometry, least(geometry, "data_grad"))
    batch, everything = len(geometry.batch), (slice(None),) * len(geometry.batch)
    per_channel = geometry.filters * geometry.taps  # weights of one channel of every group
    share = Share.of(geometry.group_channels, per_channel, planner)

    def buffers_of(box: Shape) -> Buffers:
        axes = list(zip(box[batch:], geometry.stride, geometry.window, geometry.output, strict=True))
        images, terms = math.prod(box[:batch]), math.prod(box) * geometry.groups * share.at_once
        reaching = images * math.prod(min(m, (size + window - 2) // s + 1) for size, s, window, m in axes)
        of_tap = images * math.prod(min(m, (size - 1) // s + 1) for size, s, _, m in axes)
        return (
            Buffer(reaching * geometry.filters, not dy.is_plain(planner.dtype), dy.temporaries),
            Buffer(of_tap * geometry.filters),
            Buffer(of_tap * geometry.groups * share.at_once),
            Buffer(terms, geometry.taps > ONE_RUN),
            Buffer(terms, summed, dx.temporaries),
        )

    blocks = share.blocks((*geometry.batch, *geometry.input), buffers_of, team, BLOCK_BYTES, planner)

    def some_channels(channels: slice, weight_space: View, planner: Planner) -> None:
        weights = _loaded_weights(w, (..., channels), weight_space, planner)

        def some_inputs(index: Index, buffers: list[View], planner: Planner) -> None:
            dy_space, slice_space, term_space, part_space, sums_space = buffers
            target = dx.view[(*index, slice(None), channels)]
            outputs = (*index[:batch], *geometry.outputs_of_windows(index[batch:]))
            block = _loaded(dy, (*outputs, slice(None), slice(None)), dy_space, planner)

            def add(tap: Shape, part: View, planner: Planner) -> None:
                source, into = meeting(tap, outputs[batch:], index[batch:], geometry)
                gradients, sums = block[(*everything, *source)], part[(*everything, *into)]
                if gradients.size:
                    product = _product(gradients, weights[tap], order, slice_space, term_space, planner)
                    planner.call(planner.xp.add, sums, product, out=sums)

            total = sums_space.shaped(target.shape) if summed else target
            _add_up(add, total, part_space, geometry, planner)
            dx.store(total, target, planner, channels)

        blocks.loop(some_inputs, planner, team.workers)

    share.loop(some_channels, planner)


def weight_grad(dy: Operand, x: Operand, dw: Result, geometry: Geometry, planner: Planner) -> None:
    """Accumulate the products of dy with the inputs that each tap reads in that tap of dw."""
    order = _by_groups(len(geometry.batch) + geometry.rank)
    team = planner.team(geometry, least(geometry, "weight_grad"))
    batch, everything = len(geometry.batch), (slice(None),) * len(geometry.batch)
    summed = not in_place(dw.view, planner.dtype) or as_matrix(dw.view[(0,) * geometry.rank], 1, 1) is None
    per_filter = geometry.channels * geometry.taps  # weights of one filter of every group
    each = (1 + summed) * per_filter + team.shares * geometry.channels
    filters_at_once = largest(geometry.group_filters, planner.budget // 2, each)
    term, sums = geometry.channels * filters_at_once, summed * per_filter * filters_at_once

    def buffers_of(box: Shape) -> Buffers:
        outputs = math.prod(box)
        return (
            Buffer(outputs * geometry.channels, True, x.temporaries),
            Buffer(outputs * geometry.groups * filters_at_once),
            Buffer(outputs * geometry.groups * filters_at_once, True, dy.temporaries),
        )

    extents = (*geometry.batch, *geometry.output)
    limit = min((planner.budget - sums) // team.shares - term, BLOCK_BYTES // planner.dtype.itemsize)
    blocks = Blocks.fitting(extents, limit, buffers_of)
    *own, dy_size = blocks.sizes

    def some_filters(filters: slice, planner: Planner) -> None:
        dy_space, sums_space = planner.workspace(dy_size, sums)
        target = dw.view[..., filters]
        total = _lying_like(target, sums_space) if summed else target
        planner.copy(total, 0)

        def some_outputs(index: Index, planner: Planner) -> None:
            gradients = _loaded(dy, (*index, slice(None), filters), dy_space, planner)

            def add(tap: Shape, planner: Planner) -> None:
                slice_space, gradient_space, term_space = planner.workspace(*own, term)
                outputs, seen = meeting(tap, index[batch:], all_inputs(geometry), geometry)
                images = _loaded(x, (*index[:batch], *seen), slice_space, planner, order)
                if images.size:
                    rows = _as_rows(images, order, slice_space, planner).swapaxes(-1, -2)
                    share = _as_rows(gradients[(*everything, *outputs)], order, gradient_space, planner)
                    products = _lying_like(total[tap], term_space)
                    planner.matmul(rows, share, products)
                    planner.call(planner.xp.add, total[tap], products, out=total[tap])

            planner.loop(Places(geometry.kernel), add, team.workers)

        planner.loop(blocks, some_outputs)
        if summed:
            planner.copy(target, total)

    planner.loop(list(pieces(geometry.group_filters, filters_at_once)), some_filters)


def _add_up(
    add: Callable[[Shape, View, Planner], None], total: View, space: View, geometry: Geometry, planner: Planner
) -> None:
    """Compute the sum over all taps in ``total``; K taps, if many, are summed in about sqrt(K) runs of equal length.

    The rounding errors of similar terms drift in one direction; summing in runs keeps them of the order of sqrt(K).
    """
    taps = Places(geometry.kernel)
    planner.copy(total, 0)
    if len(taps) <= ONE_RUN:
        planner.loop(taps, lambda tap, planner: add(tap, total, planner))
        return
    part = space.shaped(total.shape)

    def some_taps(run: slice, planner: Planner) -> None:
        planner.copy(part, 0)
        planner.loop(range(run.start, run.stop), lambda number, planner: add(taps[number], part, planner))
        planner.call(planner.xp.add, total, part, out=total)

    planner.loop(list(pieces(len(taps), math.isqrt(len(taps)))), some_taps)


def _product(
    images: View, weight: View, order: Arrangement, slice_space: View, term_space: View, planner: Planner
) -> View:
    """Return images (*box, G, I) times weight (G, I, J) as an array (*box, G, J) in the workspace."""
    term, matrix = order.empty((*images.shape[:-1], weight.shape[-1]), term_space)
    if weight.shape[-2] == 1:
        planner.call(planner.xp.multiply, images, weight[:, 0], out=term)
    else:
        rows = _as_rows(images, order, slice_space, planner)
        planner.matmul(rows, weight, matrix)
    return term


def _as_rows(images: View, order: Arrangement, space: View, planner: Planner) -> View:
    """Return images (*box, G, I) as matrices (G, positions, I), copied unless they have this form in place."""
    rows = order.matrix(images)
    if rows is None:
        block, rows = order.empty(images.shape, space)
        planner.copy(block, images)
    return rows


def _loaded_weights(w: Operand, index: Index, space: View, planner: Planner) -> View:
    """Return weights (*kernel, G, I, J), in place if each tap is a matrix there, else copied to the workspace."""
    piece = w.view[index]
    if w.is_plain(planner.dtype) and as_matrix(piece[(0,) * (piece.ndim - 3)], 1, 1) is not None:
        return piece
    block = _lying_like(piece, space)
    copy_weights(w.part(piece), block, planner)
    return block


def _lying_like(weights: View, space: View) -> View:
    """Return workspace in the shape of weights, tap by tap, with channels and filters in their memory order."""
    *taps, channels, filters = weights.shape
    if lies_by_filters(weights):
        return space.shaped((*taps, filters, channels)).swapaxes(-1, -2)
    return space.shaped(weights.shape)


def _loaded(operand: Operand, index: Index, space: View, planner: Planner, order: Arrangement | None = None) -> View:
    """Return a piece of an operand in the dtype of the sums, in place if possible, else copied in this order."""
    piece = operand.view[index]
    if operand.is_plain(planner.dtype) or not piece.size:
        return piece
    block = space.shaped(piece.shape) if order is None else order.empty(piece.shape, space)[0]
    operand.read(index, block, planner)
    return block


def _order_of(images: View, channels: int) -> Arrangement:
    """Return the memory order of blocks of these images.

    It is that of matrices (G, positions, I) for matrix products, and that of the images for multiplications.
    """
    positions = images.ndim - 2
    if channels == 1 and channels_innermost(images):
        return Arrangement(tuple(range(images.ndim)), positions, 2)
    return _by_groups(positions)


def _by_groups(positions: int) -> Arrangement:
    return Arrangement((positions, *range(positions), positions + 1), positions, 1)
