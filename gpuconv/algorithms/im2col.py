"""im2col: the windows of x laid out as a matrix, and one matrix product for all filters.

Works in blocks of outputs, so that the unfolded windows never exist as a whole, and accepts every convolution.
Each direction is a product with unfolded windows ``cols``, K = C / G * T * R * S long:

    forward      y  = cols(x) w         over blocks of outputs
    data_grad    dx = cols(dy) w        with w turned round; for each residue of the stride with some of the taps
                 cols(dx) = dy w'       where windows do not overlap
    weight_grad  dw = cols(x)' dy       summed over blocks of outputs
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice

from gpuconv.algorithms import col2im, cost, lines, residues, slices
from gpuconv.algorithms.blocks import Space, boxes, fitting_box, largest, largest_part, pieces
from gpuconv.algorithms.finite import is_finite
from gpuconv.algorithms.unfold import (
    BLOCK_BYTES,
    SHORT_PRODUCT,
    Reading,
    Sizes,
    box_sizes,
    forward_sizes,
    order_of,
    reading,
    smallest,
    unfold,
)
from gpuconv.algorithms.windows import reaches_beyond, sliding
from gpuconv.arguments import Shape
from gpuconv.backend import Array
from gpuconv.geometry import Direction, Geometry
from gpuconv.operands import Index, Operand, Result, in_place
from gpuconv.request import Request
from gpuconv.workspace import Run, Team, is_small, shaped

# Of weight_grad's outputs or channels where threads share it, and how many make one of them worth while.
SLICES, SHORT_SLICE, FEW_CHANNELS = 8, 512, 128
LONGEST = 1 << 16  # sum of a product of weight_grad: more terms that are alike would drift


def why_not(request: Request) -> str | None:
    """None: im2col accepts everything."""
    return None


def exceeds(request: Request) -> str | None:
    """A note where the smallest piece may take more than the limit allows."""
    part = largest_part(request)
    pieces = [smallest(part, request.direction)]
    if request.direction == "data_grad":
        pieces.append(slices.least(part, "data_grad"))  # which takes over where w is not finite
    return request.lacks(max(pieces), "its smallest piece")


def nanoseconds(request: Request) -> float:
    """An estimate: products, and windows copied out of x, or of dy, and for data_grad weights."""
    geometry, direction, is_complex = request.geometry, request.direction, request.is_complex
    if direction == "data_grad" and col2im.suits(geometry):
        return col2im.nanoseconds(geometry, is_complex)
    width = geometry.group_channels if direction == "data_grad" else geometry.group_filters
    product = cost.product(geometry.reduction_length(direction), width, is_complex)
    run = geometry.group_channels if geometry.layout == "channels_last" and geometry.groups > 1 else math.inf
    weights = math.prod(geometry.w_shape) if direction == "data_grad" and not geometry.is_pointwise else 0
    copied = _unfolded(geometry, direction) * cost.copied(run) + 2 * cost.COPY * weights
    return geometry.multiply_adds() * product + copied


def _unfolded(geometry: Geometry, direction: Direction) -> int:
    """Elements of the windows that are unfolded, of x or of dy."""
    if geometry.is_pointwise:
        return 0
    if direction != "data_grad":
        windows = geometry.reduction_length("weight_grad") * geometry.channels * geometry.taps
        return lines.elements(geometry) if lines.suits(geometry) else windows
    if _lie_apart(geometry):
        return math.prod(geometry.y_shape)
    shared = None if _has_many_residues(geometry) else residues.plan(geometry)
    seen = geometry if shared is None else shared.gathered
    return seen.reduction_length("weight_grad") * geometry.filters * seen.taps


def forward(x: Operand, w: Operand, y: Result, geometry: Geometry, run: Run) -> None:
    """y[o] = sum over taps t and channels c of x[o * stride + t * dilation - low, c] w[t, c]."""
    if lines.pays(x, y, geometry, run):
        lines.forward(x, w, y, geometry, run)
        return
    xp = run.backend.xp
    order = order_of(x.view, y.view, geometry, math.prod(geometry.output) >= SHORT_PRODUCT)
    team = run.team(geometry, smallest(geometry, "forward"))
    sizes = forward_sizes(
        geometry,
        run.budget,
        BLOCK_BYTES // run.dtype.itemsize,
        team,
        reading(x, order, geometry, run),
        per_filter=geometry.channels * geometry.taps if order.weights.copies(w, run) else 0,
        sums=Space(not in_place(y.view, run.dtype) or order.images.matrix(y.view) is None, y.temporaries),
        terms=Space(False),
    )
    with run.workspace(sizes.weights) as (weight_space,):
        for filters in pieces(geometry.group_filters, sizes.pieces):
            weights = order.load_weights(w.part(w.view[..., filters]), weight_space, run)

            def work(indices: Iterable[Index], filters: slice = filters, weights: Array = weights) -> None:
                with run.workspace(*sizes.block) as (patch_space, cols_space, sums_space, _):
                    for index in indices:
                        cols = unfold(x, index, geometry, order, sizes.tap_by_tap, patch_space, cols_space, run)
                        target = y.view[(*index, slice(None), filters)]
                        block, sums = order.images.place(target, sums_space, run)
                        xp.matmul(*((cols, weights) if order.by_rows else (weights, cols)), out=sums)
                        y.finish(xp, block, filters)
                        if block is not target:
                            xp.copyto(target, block, casting="unsafe")

            run.spread(boxes((*geometry.batch, *geometry.output), sizes.box), work, team.workers)


def data_grad(dy: Operand, w: Operand, dx: Result, geometry: Geometry, run: Run) -> None:
    """dx[i] = sum over the taps t and outputs o with o * stride + t * dilation - low = i of dy[o] w[t]'."""
    if geometry.is_pointwise:
        _data_grad_by_residues(dy, w, dx, geometry, run)
    elif _lie_apart(geometry):
        _data_grad_apart(dy, w, dx, geometry, run)
    elif col2im.pays(dy, dx, geometry, run):
        col2im.data_grad(dy, w, dx, geometry, run)
    # By residues, NaN and Inf in w would meet zeros beyond dy, and NaN spread where none belongs.
    elif _has_many_residues(geometry) or not run.holds(is_finite, w.view):
        slices.data_grad(dy, w, dx, geometry, run)
    elif residues.plan(geometry) is not None:
        residues.data_grad(dy, w, dx, geometry, run)
    else:
        _data_grad_by_residues(dy, w, dx, geometry, run)


def _lie_apart(geometry: Geometry) -> bool:
    """Whether windows lie inside x and do not overlap."""
    axes = zip(geometry.stride, geometry.window, geometry.output, strict=True)
    return not reaches_beyond(geometry) and all(s >= k or m == 1 for s, k, m in axes)


def _has_many_residues(geometry: Geometry) -> bool:
    """Whether taking taps one at a time is fewer steps than taking residues of the stride."""
    return math.prod(min(s, n) for s, n in zip(geometry.stride, geometry.input, strict=True)) > 4 * geometry.taps


def _data_grad_by_residues(dy: Operand, w: Operand, dx: Result, geometry: Geometry, run: Run) -> None:
    backwards = (slice(None, None, -1),) * geometry.rank
    for residue in geometry.residues:
        part = dx.part((*(slice(None) for _ in geometry.batch), *residue.inputs))
        if residue.geometry is None:
            part.fill(run.backend.xp)
        else:
            taps = w.part(w.view[residue.taps][backwards].swapaxes(-1, -2))
            forward(dy, taps, part, residue.geometry, run)


def _data_grad_apart(dy: Operand, w: Operand, dx: Result, geometry: Geometry, run: Run) -> None:
    """Windows that do not overlap, as in patch embeddings and their transposes: each is a product of its own."""
    xp, order = run.backend.xp, order_of(dy.view, dy.view, geometry, stack=False)
    team = run.team(geometry, smallest(geometry, "data_grad"))
    sizes = _apart_sizes(
        geometry,
        run.budget,
        BLOCK_BYTES // run.dtype.itemsize,
        team,
        order.weights.copies(w, run),
        Space(order.images.copies(dy, run), dy.temporaries),
        dx.temporaries,
    )
    leaves_gaps = not _covers(geometry)
    cropped = (slice(-low, None) for low, _ in geometry.padding)
    inputs = dx.view[(*(slice(None) for _ in geometry.batch), *cropped)]
    windows = sliding(xp, inputs, geometry, geometry.output)
    with run.workspace(sizes.weights) as (weight_space,):
        for channels in pieces(geometry.group_channels, sizes.pieces):
            taps = w.part(w.view[..., channels, :])
            weights = order.load_weights(taps, weight_space, run).swapaxes(-1, -2)

            def work(indices: Iterable[Index], channels: slice = channels, weights: Array = weights) -> None:
                with run.workspace(*sizes.block) as (dy_space, cols_space):
                    for index in indices:
                        if leaves_gaps:
                            dx.of_channels(channels).part(_inputs_of(index, geometry)).fill(xp)
                        sums = order.images.load(dy, index, dy_space, run)
                        target = windows[(*index, ..., channels)]
                        block, cols = order.windows.empty(target.shape, cols_space)
                        xp.matmul(*((sums, weights) if order.by_rows else (weights, sums)), out=cols)
                        dx.finish(xp, block, channels)
                        xp.copyto(target, block, casting="unsafe")

            run.spread(boxes((*geometry.batch, *geometry.output), sizes.box), work, team.workers)


def _inputs_of(index: Index, geometry: Geometry) -> Index:
    """The inputs from a block of outputs to the next one, where windows do not overlap."""
    batch, inputs = len(geometry.batch), []
    axes = zip(index[batch:], geometry.input, geometry.output, geometry.stride, geometry.padding, strict=True)
    for outputs, n, m, s, (low, _) in axes:
        start = outputs.start * s - low if outputs.start else 0
        inputs.append(slice(start, outputs.stop * s - low if outputs.stop < m else n))
    return (*index[:batch], *inputs)


def _covers(geometry: Geometry) -> bool:
    """Whether windows that do not overlap leave nothing of x out."""
    axes = zip(geometry.input, geometry.output, geometry.kernel, geometry.stride, strict=True)
    whole = all(n == (m - 1) * s + k and (s == k or m == 1) for n, m, k, s in axes)
    return whole and not any(map(any, geometry.padding))


def weight_grad(dy: Operand, x: Operand, dw: Result, geometry: Geometry, run: Run) -> None:
    """dw[t, c] = sum over outputs o of x[o * stride + t * dilation - low, c] dy[o]."""
    if lines.pays(x, dy, geometry, run, math.prod(geometry.w_shape)):
        lines.weight_grad(dy, x, dw, geometry, run)
        return
    team = run.team(geometry, smallest(geometry, "weight_grad"))
    if not _has_short_slices(geometry, run):
        _weight_grad(dy, x, dw, geometry, run, team)
        return
    # Each task has some channels: their sums are whole, and no matrix product gets shorter than it is.
    share = run.share(team)

    def work(parts: Iterable[slice]) -> None:
        for channels in parts:
            part = replace(geometry, channels=geometry.groups * (channels.stop - channels.start))
            _weight_grad(dy, x.of_channels(channels), dw.part((..., channels, slice(None))), part, share, Team())

    size = max(FEW_CHANNELS, -(-geometry.group_channels // SLICES))
    run.spread(list(pieces(geometry.group_channels, size)), work, team.workers)


def _has_short_slices(geometry: Geometry, run: Run) -> bool:
    """Whether slices of the outputs would be short, or their sums large, and slices of the channels would not."""
    weights = math.prod(geometry.w_shape)
    if is_small(geometry):
        return False
    is_short = _slices(geometry) == 1 or _slices(geometry) * weights > run.budget // 4
    return is_short and geometry.group_channels >= 2 * FEW_CHANNELS


def _slices(geometry: Geometry) -> int:
    """How many slices of the outputs have sums of their own, however many threads there are."""
    slices = 1 if is_small(geometry) else SLICES
    while slices > 1 and geometry.reduction_length("weight_grad") < slices * SHORT_SLICE:
        slices //= 2
    return slices


def _weight_grad(dy: Operand, x: Operand, dw: Result, geometry: Geometry, run: Run, team: Team) -> None:
    """The outputs in slices, which are added up in order, however many threads there are."""
    xp, order = run.backend.xp, order_of(x.view, dy.view, geometry, stack=False)
    gradients = Space(order.images.copies(dy, run), dy.temporaries)
    sizes = _weight_grad_sizes(
        geometry, run.budget, BLOCK_BYTES // run.dtype.itemsize, team, reading(x, order, geometry, run), gradients
    )
    extents = (*geometry.batch, *geometry.output)
    count = math.prod(-(-extent // size) for extent, size in zip(extents, sizes.box, strict=True))
    with run.workspace(*(sizes.weights,) * min(_slices(geometry), count)) as total_spaces:
        for filters in pieces(geometry.group_filters, sizes.pieces):
            target = dw.view[..., filters]
            block, total = order.weights.place(target, total_spaces[0], run)
            totals = [total, *(shaped(space, total.shape) for space in total_spaces[1:])]

            def work(numbers: Iterable[int], filters: slice = filters, totals: Sequence[Array] = totals) -> None:
                with run.workspace(sizes.weights, *sizes.block) as (term_space, patch_space, cols_space, dy_space, _):
                    for number in numbers:
                        total, is_first = totals[number], True
                        ends = (count * end // len(totals) for end in (number, number + 1))
                        for index in islice(boxes(extents, sizes.box), *ends):
                            cols = unfold(x, index, geometry, order, sizes.tap_by_tap, patch_space, cols_space, run)
                            sums = order.images.load(dy, (*index, slice(None), filters), dy_space, run)
                            factors = (cols.swapaxes(-1, -2), sums) if order.by_rows else (sums, cols.swapaxes(-1, -2))
                            if is_first:
                                xp.matmul(*factors, out=total)
                            else:
                                xp.add(total, xp.matmul(*factors, out=shaped(term_space, total.shape)), out=total)
                            is_first = False

            run.spread(range(len(totals)), work, team.workers)
            for term in totals[1:]:
                xp.add(total, term, out=total)
            if block is not target:
                xp.copyto(target, block, casting="unsafe")


@lru_cache(maxsize=1024)
def _weight_grad_sizes(
    geometry: Geometry, budget: int, block: int, team: Team, reading: Reading, gradients: Space
) -> Sizes:
    per_filter, copies = geometry.channels * geometry.taps, _slices(geometry) + team.shares
    filters = largest(geometry.group_filters, budget // 2, copies * per_filter)
    # Each block adds a whole dw to the sum: it should be worth that.
    limit = (budget - copies * per_filter * filters) // team.shares
    limit = min(limit, max(block, 4 * per_filter * filters))
    most = min(LONGEST, -(-geometry.reduction_length("weight_grad") // _slices(geometry)))
    return box_sizes(geometry, limit, most, filters, per_filter * filters, reading, gradients, Space(False))


@lru_cache(maxsize=1024)
def _apart_sizes(
    geometry: Geometry, budget: int, block: int, team: Team, copies_weights: bool, gradients: Space, temporaries: int
) -> Sizes:
    per_channel = geometry.filters * geometry.taps if copies_weights else 0
    channels = largest(geometry.group_channels, budget // 2, per_channel)

    def parts(box: Shape) -> tuple[tuple[int, Space], ...]:
        outputs = math.prod(box)
        return (
            (outputs * geometry.filters, gradients),
            (outputs * geometry.groups * channels * geometry.taps, Space(True, temporaries)),
        )

    limit = min((budget - per_channel * channels) // team.shares, block)
    extents = (*geometry.batch, *geometry.output)
    box, spaces = fitting_box(extents, limit, parts, team.share(math.prod(extents)))
    return Sizes(channels, box, per_channel * channels, spaces)
