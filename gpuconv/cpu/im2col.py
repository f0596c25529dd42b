"""im2col: the windows of x laid out as a matrix, and one matrix product for all filters.

It works in blocks of outputs, so that the im2col matrix never exists as a whole, and accepts every convolution.
Each direction is a product with the unfolded windows ``cols``, of K = C / G * T * R * S elements each:

    forward      y  = cols(x) w         over blocks of outputs
    data_grad    dx = cols(dy) w        with w rotated by 180 degrees; for each phase of the stride with its taps
                 cols(dx) = dy w'       if windows do not overlap
    weight_grad  dw = cols(x)' dy       summed over blocks of outputs
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

from gpuconv.arguments import Shape
from gpuconv.blocking import Buffer, Buffers, Share, largest, largest_part, pieces
from gpuconv.cpu import col2im, cost_model, lines, phases, slices
from gpuconv.cpu.finite import if_finite
from gpuconv.cpu.unfold import BLOCK_BYTES, SHORT_PRODUCT, Unfolding, order_of, smallest
from gpuconv.cpu.windows import sliding
from gpuconv.geometry import Geometry, Phase
from gpuconv.operands import Index, Operand, Result, in_place
from gpuconv.plan import Planner, Team, is_small
from gpuconv.request import Request
from gpuconv.types import Direction
from gpuconv.views import View

# Splits of the outputs or channels in weight_grad for several threads, and the fewest outputs and channels of a split.
SLICES, SHORT_SLICE, FEW_CHANNELS = 8, 512, 128
# Calls of Python, and nanoseconds to add an element of the sum of a split, and of an image of several groups.
STEPS, SUM, SUM_OF_GROUPS = 6, 0.15, 4.8
LONGEST = 1 << 16  # sum in a product of weight_grad: the rounding errors of more similar terms would drift


def why_not(request: Request) -> str | None:
    """Return None, since im2col accepts everything."""
    return None


def exceeds(request: Request) -> str | None:
    """Return a note if the smallest piece may exceed the limit."""
    part = largest_part(request)
    pieces = [smallest(part, request.direction)]
    if request.direction == "data_grad":
        pieces.append(slices.least(part, "data_grad"))  # the fallback if w is non-finite
    return request.lacks(max(pieces), "its smallest piece")


def nanoseconds(request: Request) -> float:
    """Estimate the time of products, copies of windows and weights, sums of the splits of weight_grad, and calls."""
    if request.direction == "data_grad" and col2im.suits(request.geometry):
        return col2im.nanoseconds(request.geometry, request.is_complex)
    if set(request.geometry.stride) == {1}:
        request = request.as_forward()
    geometry, direction, is_complex = request.geometry, request.direction, request.is_complex
    width = geometry.group_channels if direction == "data_grad" else geometry.group_filters
    product = cost_model.product(geometry.reduction_length(direction), width, is_complex)
    run = geometry.group_channels if geometry.layout == "channels_last" and geometry.groups > 1 else math.inf
    weights = math.prod(geometry.w_shape) if direction == "data_grad" and not geometry.is_pointwise else 0
    copied = _unfolded(geometry, direction) * cost_model.copied(run) + 2 * cost_model.COPY * weights
    matrices = geometry.groups * math.prod(geometry.batch) if geometry.groups > 1 else 0
    sums = math.prod(geometry.w_shape) * _sums(geometry) if direction == "weight_grad" else 0
    around = sums + matrices * cost_model.MATRIX + STEPS * cost_model.STEP
    return geometry.multiply_adds() * product + copied + around


def _sums(geometry: Geometry) -> float:
    """Return the nanoseconds to add the terms of an element of dw."""
    nanoseconds = 0 if is_small(geometry) else SUM * SLICES
    if geometry.groups > 1 and geometry.layout == "channels_first":
        nanoseconds += SUM_OF_GROUPS * math.prod(geometry.batch)
    return nanoseconds


def _unfolded(geometry: Geometry, direction: Direction) -> int:
    """Return the number of elements of the unfolded windows of x or dy."""
    if geometry.is_pointwise:
        return 0
    if direction != "data_grad":
        windows = geometry.reduction_length("weight_grad") * geometry.channels * geometry.taps
        return lines.elements(geometry) if lines.suits(geometry) else windows
    if _lie_apart(geometry):
        return math.prod(geometry.y_shape)
    shared = None if _has_many_phases(geometry) else phases.products_of(geometry)
    seen = geometry if shared is None else shared.gathered
    return seen.reduction_length("weight_grad") * geometry.filters * seen.taps


def forward(x: Operand, w: Operand, y: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute ``y[o] = sum over taps t and channels c of x[o * stride + t * dilation - low, c] w[t, c]``."""
    if lines.pays(x, y, geometry, planner):
        lines.forward(x, w, y, geometry, planner)
        return
    order = order_of(x.view, y.view, geometry, math.prod(geometry.output) >= SHORT_PRODUCT)
    team = planner.team(geometry, smallest(geometry, "forward"))
    per_filter = geometry.channels * geometry.taps if order.weights.copies(w, planner) else 0
    share = Share.of(geometry.group_filters, per_filter, planner)
    needs_sums = not in_place(y.view, planner.dtype) or order.images.matrix(y.view) is None
    unfolding = Unfolding(x, geometry, order, planner)

    def sums_of(outputs: int) -> Buffers:
        return [Buffer(outputs * geometry.groups * share.at_once, needs_sums, y.temporaries)]

    most = team.share(geometry.reduction_length("weight_grad"))
    blocks = unfolding.blocks(share.rest(planner, team.shares, BLOCK_BYTES), most, sums_of)

    def some_filters(filters: slice, weight_space: View, planner: Planner) -> None:
        weights = order.load_weights(w.part(w.view[..., filters]), weight_space, planner)

        def some_outputs(index: Index, buffers: list[View], planner: Planner) -> None:
            patch_space, cols_space, sums_space = buffers
            cols = unfolding.cols(index, patch_space, cols_space, planner)
            target = y.view[(*index, slice(None), filters)]
            block, sums = order.images.place(target, sums_space, planner)
            planner.matmul(*((cols, weights) if order.by_rows else (weights, cols)), sums)
            y.store(block, target, planner, filters)

        blocks.loop(some_outputs, planner, team.workers)

    share.loop(some_filters, planner)


def data_grad(dy: Operand, w: Operand, dx: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute ``dx[i] = sum over taps t and outputs o with o * stride + t * dilation - low = i of dy[o] w[t]'``."""
    if geometry.is_pointwise:
        _data_grad_by_phases(dy, w, dx, geometry, planner)
    elif _lie_apart(geometry):
        _data_grad_apart(dy, w, dx, geometry, planner)
    elif col2im.pays(dy, dx, geometry, planner):
        col2im.data_grad(dy, w, dx, geometry, planner)
    elif _has_many_phases(geometry):
        slices.data_grad(dy, w, dx, geometry, planner)
    else:
        # A product per phase would multiply NaN and Inf in w by the zero padding of dy, and so spread NaN.
        by_phases = _data_grad_by_phases if phases.products_of(geometry) is None else phases.data_grad
        by_taps = partial(slices.data_grad, dy, w, dx, geometry)
        if_finite(w.view, partial(by_phases, dy, w, dx, geometry), by_taps, planner)


def _lie_apart(geometry: Geometry) -> bool:
    """Return whether all windows are in bounds and do not overlap."""
    axes = zip(geometry.stride, geometry.window, geometry.output, strict=True)
    return not geometry.reaches_beyond and all(s >= k or m == 1 for s, k, m in axes)


def _has_many_phases(geometry: Geometry) -> bool:
    """Return whether computing tap by tap takes fewer steps than computing each phase of the stride."""
    return math.prod(min(s, n) for s, n in zip(geometry.stride, geometry.input, strict=True)) > 4 * geometry.taps


def _data_grad_by_phases(dy: Operand, w: Operand, dx: Result, geometry: Geometry, planner: Planner) -> None:
    backwards = (slice(None, None, -1),) * geometry.rank

    def part(phase: Phase, planner: Planner) -> None:
        inputs = dx.part((*(slice(None) for _ in geometry.batch), *phase.inputs))
        if phase.geometry is None:
            inputs.fill(planner)
        else:
            taps = w.part(w.view[phase.taps][backwards].swapaxes(-1, -2))
            forward(dy, taps, inputs, phase.geometry, planner)

    planner.loop(geometry.phases, part)


def _data_grad_apart(dy: Operand, w: Operand, dx: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute ``cols(dx) = dy w'`` for windows that do not overlap, as in patch embeddings and their transposes."""
    order = order_of(dy.view, dy.view, geometry, stack=False)
    team = planner.team(geometry, smallest(geometry, "data_grad"))
    per_channel = geometry.filters * geometry.taps if order.weights.copies(w, planner) else 0
    share = Share.of(geometry.group_channels, per_channel, planner)
    copies_dy, extents = order.images.copies(dy, planner), (*geometry.batch, *geometry.output)

    def buffers_of(box: Shape) -> Buffers:
        outputs = math.prod(box)
        return (
            Buffer(outputs * geometry.filters, copies_dy, dy.temporaries),
            Buffer(outputs * geometry.groups * share.at_once * geometry.taps, True, dx.temporaries),
        )

    blocks = share.blocks(extents, buffers_of, team, BLOCK_BYTES, planner)
    leaves_gaps = not _covers(geometry)
    cropped = (slice(-low, None) for low, _ in geometry.padding)
    inputs = dx.view[(*(slice(None) for _ in geometry.batch), *cropped)]
    windows = sliding(inputs, geometry, geometry.output)

    def some_channels(channels: slice, weight_space: View, planner: Planner) -> None:
        weights = order.load_weights(w.part(w.view[..., channels, :]), weight_space, planner).swapaxes(-1, -2)

        def some_outputs(index: Index, buffers: list[View], planner: Planner) -> None:
            dy_space, cols_space = buffers
            if leaves_gaps:
                dx.of_channels(channels).part(_inputs_of(index, geometry)).fill(planner)
            sums = order.images.load(dy, index, dy_space, planner)
            target = windows[(*index, ..., channels)]
            block, cols = order.windows.empty(target.shape, cols_space)
            planner.matmul(*((sums, weights) if order.by_rows else (weights, sums)), cols)
            dx.store(block, target, planner, channels)

        blocks.loop(some_outputs, planner, team.workers)

    share.loop(some_channels, planner)


def _inputs_of(index: Index, geometry: Geometry) -> Index:
    """Return the inputs from a block of outputs up to the next block, for windows that do not overlap."""
    batch, inputs = len(geometry.batch), []
    for axis, (outputs, n, m) in enumerate(zip(index[batch:], geometry.input, geometry.output, strict=True)):
        start = geometry.position(axis, outputs.start, 0) if outputs.start else 0
        inputs.append(slice(start, geometry.position(axis, outputs.stop, 0) if outputs.stop < m else n))
    return (*index[:batch], *inputs)


def _covers(geometry: Geometry) -> bool:
    """Return whether windows that do not overlap cover all of x."""
    axes = zip(geometry.input, geometry.output, geometry.kernel, geometry.stride, strict=True)
    whole = all(n == (m - 1) * s + k and (s == k or m == 1) for n, m, k, s in axes)
    return whole and not any(map(any, geometry.padding))


def weight_grad(dy: Operand, x: Operand, dw: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute ``dw[t, c] = sum over outputs o of x[o * stride + t * dilation - low, c] dy[o]``."""
    if lines.pays(x, dy, geometry, planner, math.prod(geometry.w_shape)):
        lines.weight_grad(dy, x, dw, geometry, planner)
        return
    team = planner.team(geometry, smallest(geometry, "weight_grad"))
    if not _has_short_slices(geometry, planner):
        _weight_grad(dy, x, dw, geometry, planner, team)
        return

    # Each task computes some channels, so that no sum is split and no matrix product becomes shorter.
    def some_channels(channels: slice, planner: Planner) -> None:
        part = replace(geometry, channels=geometry.groups * (channels.stop - channels.start))
        result = dw.part((..., channels, slice(None)))
        _weight_grad(dy, x.of_channels(channels), result, part, planner.share(planner.limit // team.shares), Team())

    size = max(FEW_CHANNELS, -(-geometry.group_channels // SLICES))
    planner.loop(list(pieces(geometry.group_channels, size)), some_channels, team.workers)


def _has_short_slices(geometry: Geometry, planner: Planner) -> bool:
    """Return whether splits of the outputs would be short or have large sums, and splits of the channels would not."""
    weights = math.prod(geometry.w_shape)
    if is_small(geometry):
        return False
    is_short = _slices(geometry) == 1 or _slices(geometry) * weights > planner.budget // 4
    return is_short and geometry.group_channels >= 2 * FEW_CHANNELS


def _slices(geometry: Geometry) -> int:
    """Return the number of splits of the outputs with their own partial sums, for any number of threads."""
    slices = 1 if is_small(geometry) else SLICES
    while slices > 1 and geometry.reduction_length("weight_grad") < slices * SHORT_SLICE:
        slices //= 2
    return slices


def _weight_grad(dy: Operand, x: Operand, dw: Result, geometry: Geometry, planner: Planner, team: Team) -> None:
    """Compute dw in splits of the outputs, whose partial sums are added in order for any number of threads."""
    add, order = planner.xp.add, order_of(x.view, dy.view, geometry, stack=False)
    copies_dy = order.images.copies(dy, planner)
    per_filter, copies = geometry.channels * geometry.taps, _slices(geometry) + team.shares
    filters_at_once = largest(geometry.group_filters, planner.budget // 2, copies * per_filter)
    weights = per_filter * filters_at_once
    # Each block adds a whole dw to the sum, so a block must be large enough to be worth this addition.
    limit = (planner.budget - copies * weights) // team.shares
    limit = min(limit, max(BLOCK_BYTES // planner.dtype.itemsize, 4 * weights))
    most = min(LONGEST, -(-geometry.reduction_length("weight_grad") // _slices(geometry)))
    unfolding = Unfolding(x, geometry, order, planner)

    def gradients_of(outputs: int) -> Buffers:
        return [Buffer(outputs * geometry.groups * filters_at_once, copies_dy, dy.temporaries)]

    blocks = unfolding.blocks(limit, most, gradients_of)
    slices = min(_slices(geometry), len(blocks))

    def some_filters(filters: slice, planner: Planner) -> None:
        first, *others = planner.workspace(*(weights,) * slices)
        target = dw.view[..., filters]
        block, total = order.weights.place(target, first, planner)
        totals = [total, *(space.shaped(total.shape) for space in others)]

        def some_outputs(number: int, planner: Planner) -> None:
            begin, end = (len(blocks) * end // slices for end in (number, number + 1))

            def products(at: int, planner: Planner) -> None:
                term_space, patch_space, cols_space, dy_space = planner.workspace(weights, *blocks.sizes)
                index = blocks[at]
                cols = unfolding.cols(index, patch_space, cols_space, planner)
                sums = order.images.load(dy, (*index, slice(None), filters), dy_space, planner)
                factors = (cols.swapaxes(-1, -2), sums) if order.by_rows else (sums, cols.swapaxes(-1, -2))
                term = totals[number] if at == begin else term_space.shaped(total.shape)
                planner.matmul(*factors, term)
                if at > begin:
                    planner.call(add, totals[number], term, out=totals[number])

            planner.loop(range(begin, end), products)

        planner.loop(range(slices), some_outputs, team.workers)
        for term in totals[1:]:
            planner.call(add, total, term, out=total)
        if block is not target:
            planner.copy(target, block)

    planner.loop(list(pieces(geometry.group_filters, filters_at_once)), some_filters)
