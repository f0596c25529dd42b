"""data_grad of a stride: what all its residues see of dy, unfolded once for all of them.

The inputs i = u * stride + residue are reached by other taps for each residue, but from outputs around the same u. So
the outputs around u that any residue sees are one row of a matrix; each residue multiplies its part of every row by
its own taps (Geometry.residues), and what it gets are the inputs that lie a stride apart:

    dx[u * stride + residue] = cols(dy)[u, outputs of the residue] w[taps of the residue]

Under a kernel of 3 and a stride of 2, four outputs are read for each u in two dimensions, where residues on their own
would read nine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy

from gpuconv.algorithms.blocks import Space, boxes, pieces
from gpuconv.algorithms.unfold import BLOCK_BYTES, SHORT_PRODUCT, Order, forward_sizes, order_of, reading, unfold
from gpuconv.arguments import Shape
from gpuconv.backend import Array
from gpuconv.geometry import Geometry
from gpuconv.operands import Index, Operand, Result
from gpuconv.workspace import Run, shaped


class Stretch(NamedTuple):
    """Outputs that lie side by side: the first in a row of the matrix, the first of a residue's own, and how many."""

    row: int
    own: int
    length: int


class Part(NamedTuple):
    """A residue: its inputs, its taps of w, and where what it sees lies in a row of the matrix."""

    inputs: tuple[slice, ...]
    taps: tuple[slice, ...]
    stretches: tuple[Stretch, ...]


class Plan(NamedTuple):
    """The residues that any tap reaches, and a forward convolution of dy that sees what all of them see."""

    gathered: Geometry
    parts: tuple[Part, ...]


@lru_cache(maxsize=1024)
def plan(geometry: Geometry) -> Plan | None:
    """How residues share what they see; None where there is one, or where they see outputs that lie between others'."""
    found = [(residue, residue.geometry) for residue in geometry.residues if residue.geometry is not None]
    if len(found) < 2:
        return None
    kernel, padding, firsts = [], [], []
    for axis in range(geometry.rank):
        apart = found[0][1].dilation[axis]
        lows = [of.padding[axis][0] for _, of in found]  # tap t of a residue meets output u + t * apart - low
        if any((max(lows) - low) % apart for low in lows):
            return None
        firsts.append([(max(lows) - low) // apart for low in lows])
        count = max(first + of.kernel[axis] for first, (_, of) in zip(firsts[-1], found, strict=True))
        positions = -(-geometry.input[axis] // geometry.stride[axis])
        kernel.append(count)
        padding.append((max(lows), positions + (count - 1) * apart - max(lows) - geometry.output[axis]))
    parts = tuple(
        Part(residue.inputs, residue.taps, tuple(_stretches(first, of.kernel, tuple(kernel))))
        for first, (residue, of) in zip(zip(*firsts, strict=True), found, strict=True)
    )
    return Plan(replace(found[0][1], kernel=tuple(kernel), padding=tuple(padding)), parts)


def _stretches(first: Shape, extents: Shape, kernel: Shape) -> Iterator[Stretch]:
    """A box among the taps of a kernel, as stretches of taps."""
    axis = len(kernel) - 1
    while axis and extents[axis] == kernel[axis]:
        axis -= 1
    length = math.prod(extents[axis:])
    for number, lead in enumerate(numpy.ndindex(*extents[:axis])):
        row = 0
        for extent, begin, step in zip(kernel, first, (*lead, *(0,) * (len(kernel) - axis)), strict=True):
            row = row * extent + begin + step
        yield Stretch(row, number * length, length)


def data_grad(dy: Operand, w: Operand, dx: Result, geometry: Geometry, run: Run) -> None:
    """dx[u * stride + residue] = cols(dy)[u] w, for the residues of a block of u one after the other."""
    shared = plan(geometry)
    assert shared is not None
    xp, team, gathered = run.backend.xp, run.team(geometry), shared.gathered
    for residue in geometry.residues:
        if residue.geometry is None:
            dx.part((*(slice(None) for _ in geometry.batch), *residue.inputs)).fill(xp)
    stack = math.prod(gathered.output) >= SHORT_PRODUCT
    order = order_of(dy.view, dx.view, gathered, stack, taps_first=True)
    sizes = forward_sizes(
        gathered,
        run.budget,
        BLOCK_BYTES // run.dtype.itemsize,
        team,
        reading(dy, order, gathered, run),
        per_filter=geometry.filters * geometry.taps,
        sums=Space(True, dx.temporaries),
        terms=Space(any(len(part.stretches) > 1 for part in shared.parts)),
    )
    with run.workspace(sizes.weights) as (weight_space,):
        for channels in pieces(geometry.group_channels, sizes.pieces):
            weights = _weights(w, channels, shared, order, weight_space, run)

            def work(indices: Iterable[Index], channels: slice = channels, weights: Sequence[Array] = weights) -> None:
                with run.workspace(*sizes.block) as (patch_space, cols_space, sums_space, term_space):
                    for index in indices:
                        cols = unfold(dy, index, gathered, order, sizes.tap_by_tap, patch_space, cols_space, run)
                        for part, own in zip(shared.parts, weights, strict=True):
                            inputs, kept = _inputs(part, index, geometry)
                            target = dx.view[(*inputs, slice(None), channels)]
                            extents = (axis.stop - axis.start for axis in index)
                            block, sums = order.images.empty((*extents, *target.shape[-2:]), sums_space)
                            _multiply(xp, cols, own, part, order.by_rows, sums, term_space)
                            dx.finish(xp, block, channels)
                            xp.copyto(target, block[kept], casting="unsafe")

            run.spread(boxes((*geometry.batch, *gathered.output), sizes.box), work, team.workers)


def _weights(w: Operand, channels: slice, shared: Plan, order: Order, space: Array, run: Run) -> list[Array]:
    """The taps of each residue, turned round, as matrices."""
    weights, start = [], 0
    for part in shared.parts:
        taps = w.view[(*part.taps, ..., channels, slice(None))]
        turned = taps[(slice(None, None, -1),) * len(part.taps)].swapaxes(-1, -2)
        weights.append(order.load_weights(w.part(turned), space[start:], run))
        start += taps.size
    return weights


def _inputs(part: Part, index: Index, geometry: Geometry) -> tuple[Index, Index]:
    """The inputs of a residue in a block of u, and which u of the block have one."""
    batch, inputs, kept = len(geometry.batch), [], []
    for positions, own in zip(index[batch:], part.inputs, strict=True):
        found = range(own.start, own.stop, own.step)[positions]
        inputs.append(slice(found.start, found.stop, found.step))
        kept.append(slice(0, len(found)))
    return (*index[:batch], *inputs), (*(slice(None),) * batch, *kept)


def _multiply(xp: Any, cols: Array, weights: Array, part: Part, by_rows: bool, sums: Array, space: Array) -> None:
    """sums = the part of cols that a residue sees, times its taps."""
    channels = (weights.shape[-2] if by_rows else weights.shape[-1]) // sum(one.length for one in part.stretches)
    for number, (row, own, length) in enumerate(part.stretches):
        seen = slice(row * channels, (row + length) * channels)
        taps = slice(own * channels, (own + length) * channels)
        factors = (cols[..., seen], weights[..., taps, :]) if by_rows else (weights[..., taps], cols[..., seen, :])
        if number == 0:
            xp.matmul(*factors, out=sums)
        else:
            xp.add(sums, xp.matmul(*factors, out=shaped(space, sums.shape)), out=sums)
