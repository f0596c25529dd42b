"""data_grad with a stride: dy is unfolded once for all phases of the stride (polyphase decomposition).

A phase consists of the inputs i = u * stride + phase. Each phase is reached by different taps, but from outputs around
the same u. All outputs around u that any phase reads are therefore one row of a matrix. Each phase multiplies its part
of every row by its own taps (Geometry.phases); the results are inputs a stride apart:

    dx[u * stride + phase] = cols(dy)[u, outputs of the phase] w[taps of the phase]

For a kernel of 3 and a stride of 2 in two dimensions, four outputs are read for each u; phases computed separately
would read nine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from gpuconv.arguments import Shape
from gpuconv.blocking import Arrangement, Buffer, Buffers, Places, Share, copy_weights, lies_by_filters
from gpuconv.cpu.unfold import BLOCK_BYTES, SHORT_PRODUCT, Unfolding, order_of, smallest
from gpuconv.geometry import AxisPhase, Geometry
from gpuconv.operands import Index, Operand, Result
from gpuconv.plan import Planner
from gpuconv.views import View


class Stretch(NamedTuple):
    """Adjacent outputs: the first in a row of the matrix, the first among those of a phase, and their number."""

    row: int
    own: int
    length: int


class PhaseRun(NamedTuple):
    """Adjacent phases of an axis that read the same outputs around u."""

    inputs: slice  # of the first phase
    taps: tuple[slice, ...]  # of each phase
    seen: slice


class PhaseProduct(NamedTuple):
    """Phases that read the same outputs and are one product, and where these outputs are in a row of the matrix."""

    runs: tuple[PhaseRun, ...]
    stretches: tuple[Stretch, ...]

    @property
    def widths(self) -> Shape:
        """The number of phases on each axis."""
        return tuple(len(run.taps) for run in self.runs)


class PhaseProducts(NamedTuple):
    """The phases that any tap reaches, and a forward convolution of dy that reads all outputs that they read."""

    gathered: Geometry
    parts: tuple[PhaseProduct, ...]

    @property
    def widest(self) -> int:
        """The largest number of phases of a part."""
        return max(math.prod(part.widths) for part in self.parts)


@lru_cache(maxsize=1024)
def products_of(geometry: Geometry) -> PhaseProducts | None:
    """Return how phases share outputs; None if there is only one phase, or if the outputs of phases interleave."""
    reached = [[of for of in geometry.axis_phases(axis) if of.reaching] for axis in range(geometry.rank)]
    axes = [_runs(phases) for phases in reached]
    if not all(axes) or math.prod(map(len, reached)) == 1:
        return None
    kernel = tuple(max(run.seen.stop for run in runs) for runs in axes)
    padding = []
    extents = zip(kernel, geometry.input, geometry.stride, geometry.output, strict=True)
    for phases, (extent, n, s, m) in zip(reached, extents, strict=True):
        low, span = max(of.padding[0] for of in phases), (extent - 1) * phases[0].dilation
        padding.append((low, -(-n // s) + span - low - m))
    gathered = replace(
        geometry,
        channels=geometry.filters,
        filters=geometry.channels,
        input=geometry.output,
        kernel=kernel,
        stride=(1,) * geometry.rank,
        padding=tuple(padding),
        dilation=tuple(phases[0].dilation for phases in reached),
    )
    parts = (PhaseProduct(runs, tuple(_stretches(runs, kernel))) for runs in product(*axes))
    return PhaseProducts(gathered, tuple(parts))


def _runs(phases: Sequence[AxisPhase]) -> list[PhaseRun]:
    """Return the phases of an axis, grouped by the outputs that they read; [] if the outputs of phases interleave."""
    alike: list[list[PhaseRun]] = []
    most = max((of.padding[0] for of in phases), default=0)
    for phase in phases:
        # Tap t of a phase reads output u + t * dilation - low.
        first, between = divmod(most - phase.padding[0], phase.dilation)
        if between:
            return []
        run = PhaseRun(phase.inputs, (phase.taps,), slice(first, first + phase.reaching))
        if alike and _are_alike(alike[-1], run):
            alike[-1].append(run)
        else:
            alike.append([run])
    return [runs[0]._replace(taps=tuple(run.taps[0] for run in runs)) for runs in alike]


def _are_alike(before: Sequence[PhaseRun], run: PhaseRun) -> bool:
    """Return whether a phase is adjacent to others, has as many inputs, and reads the same outputs."""
    first = before[0]
    is_next = run.inputs.start == first.inputs.start + len(before)
    lengths = {len(range(of.inputs.start, of.inputs.stop, of.inputs.step)) for of in (first, run)}
    return is_next and len(lengths) == 1 and run.seen == first.seen


def _stretches(runs: tuple[PhaseRun, ...], kernel: Shape) -> Iterator[Stretch]:
    """Yield the unfolded outputs that phases read, as stretches of adjacent outputs."""
    extents, axis = [run.seen.stop - run.seen.start for run in runs], len(kernel) - 1
    while axis and extents[axis] == kernel[axis]:
        axis -= 1
    length = math.prod(extents[axis:])
    for number, lead in enumerate(Places(tuple(extents[:axis]))):
        row = 0
        for extent, run, step in zip(kernel, runs, (*lead, *(0,) * (len(kernel) - axis)), strict=True):
            row = row * extent + run.seen.start + step
        yield Stretch(row, number * length, length)


def data_grad(dy: Operand, w: Operand, dx: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute ``dx[u * stride + phase] = cols(dy)[u] w``, phase by phase for each block of u."""
    shared = products_of(geometry)
    assert shared is not None
    gathered, team = shared.gathered, planner.team(geometry, smallest(geometry, "data_grad"))
    for phase in geometry.phases:
        if phase.geometry is None:
            dx.part((*(slice(None) for _ in geometry.batch), *phase.inputs)).fill(planner)
    stack = math.prod(gathered.output) >= SHORT_PRODUCT
    order = order_of(dy.view, dx.view, gathered, stack, taps_first=True)
    weights_of_channel = geometry.filters * geometry.taps  # of every group
    share = Share.of(geometry.group_channels, weights_of_channel, planner)
    has_terms = any(len(part.stretches) > 1 for part in shared.parts)

    def sums_and_terms(outputs: int) -> Buffers:
        size = outputs * geometry.groups * share.at_once * shared.widest
        return Buffer(size, True, dx.temporaries), Buffer(size, has_terms)

    unfolding = Unfolding(dy, gathered, order, planner)
    most = team.share(math.prod((*gathered.batch, *gathered.output)))
    blocks = unfolding.blocks(share.rest(planner, team.shares, BLOCK_BYTES), most, sums_and_terms)
    own_order = _order(len(geometry.batch), geometry.rank, order.by_rows, stack)

    def some_channels(channels: slice, weight_space: View, planner: Planner) -> None:
        weights = _weights(w, channels, shared, own_order, weight_space, planner)

        def some_inputs(index: Index, buffers: list[View], planner: Planner) -> None:
            patch_space, cols_space, sums_space, term_space = buffers
            cols = unfolding.cols(index, patch_space, cols_space, planner)
            for part, own in zip(shared.parts, weights, strict=True):
                target = _inputs(dx.view[..., channels], part, index, geometry)
                extents = tuple(axis.stop - axis.start for axis in index)
                block, sums = own_order.images.empty((*extents, *part.widths, *target.shape[-2:]), sums_space)
                _add_up(_factors(cols, own, part, order.by_rows), sums, term_space, planner)
                dx.finish(block, planner, channels)
                planner.copy(target, block[tuple(slice(0, size) for size in target.shape[: len(extents)])])

        blocks.loop(some_inputs, planner, team.workers)

    share.loop(some_channels, planner)


class _Order(NamedTuple):
    """Memory order of the inputs and taps of a part.

    The inputs are (*batch, *u, *phases, G, C/G), the taps (*kernel, *phases, G, F/G, C/G).
    """

    by_rows: bool
    images: Arrangement
    weights: Arrangement


def _order(batch: int, rank: int, by_rows: bool, stack: bool) -> _Order:
    positions = tuple(range(batch + rank))
    phases, of_weights = tuple(range(batch + rank, batch + 2 * rank)), tuple(range(rank, 2 * rank))
    group, kernel = batch + 2 * rank, tuple(range(rank))
    if by_rows:
        return _Order(
            True,
            Arrangement((group, *positions, *phases, group + 1), batch + rank, rank + 1),
            Arrangement((2 * rank, *kernel, 2 * rank + 1, *of_weights, 2 * rank + 2), rank + 1, rank + 1),
        )
    stacked = positions[:batch] if stack else ()
    columns = positions[len(stacked) :]
    return _Order(
        False,
        Arrangement((*stacked, group, *phases, group + 1, *columns), rank + 1, len(columns)),
        Arrangement((2 * rank, *of_weights, 2 * rank + 2, *kernel, 2 * rank + 1), rank + 1, rank + 1),
    )


def _weights(
    w: Operand, channels: slice, shared: PhaseProducts, order: _Order, space: View, planner: Planner
) -> list[View]:
    """Return the taps of each part, rotated by 180 degrees, as matrices; contiguous elements of w stay contiguous."""
    turn = order.by_rows == (not lies_by_filters(w.view))
    lying = order.weights.turned if turn else order.weights
    weights, start = [], 0
    for part in shared.parts:
        kernel = tuple(run.seen.stop - run.seen.start for run in part.runs)
        everything, backwards = (slice(None),) * len(kernel), (slice(None, None, -1),) * len(kernel)
        groups, extent, filters = w.view[..., channels, :].shape[-3:]
        block, matrix = lying.empty((*kernel, *part.widths, groups, filters, extent), space[start:])
        weights.append(matrix.swapaxes(-1, -2) if turn else matrix)
        start += block.size
        for place in Places(part.widths):
            taps = (run.taps[number] for run, number in zip(part.runs, place, strict=True))
            turned = w.view[(*taps, slice(None), channels)][backwards].swapaxes(-1, -2)
            copy_weights(w.part(turned), block[(*everything, *place)], planner)
    return weights


def _inputs(images: View, part: PhaseProduct, index: Index, geometry: Geometry) -> View:
    """Return the inputs (*batch, *u, *phases, G, C/G) of a part in a block of u, as far as they exist."""
    batch, rank = len(geometry.batch), geometry.rank
    ranges = (
        range(run.inputs.start, run.inputs.stop, run.inputs.step)[positions]
        for run, positions in zip(part.runs, index[batch:], strict=True)
    )
    first = images[(*index[:batch], *(slice(found.start, found.stop, found.step) for found in ranges))]
    return first.strided(
        (*first.shape[:-2], *part.widths, *first.shape[-2:]),
        (*first.strides[:-2], *images.strides[batch : batch + rank], *first.strides[-2:]),
    )


def _factors(cols: View, weights: View, part: PhaseProduct, by_rows: bool) -> Iterator[tuple[View, View]]:
    """Yield the part of cols that a phase reads and its taps, as matrices for each stretch of outputs."""
    channels = (weights.shape[-2] if by_rows else weights.shape[-1]) // sum(one.length for one in part.stretches)
    for row, own, length in part.stretches:
        seen = slice(row * channels, (row + length) * channels)
        taps = slice(own * channels, (own + length) * channels)
        yield (cols[..., seen], weights[..., taps, :]) if by_rows else (weights[..., taps], cols[..., seen, :])


def _add_up(factors: Iterable[tuple[View, View]], sums: View, space: View, planner: Planner) -> None:
    """Store the sum of products of matrices in ``sums``."""
    for number, pair in enumerate(factors):
        term = sums if number == 0 else space.shaped(sums.shape)
        planner.matmul(*pair, term)
        if number:
            planner.call(planner.xp.add, sums, term, out=sums)
