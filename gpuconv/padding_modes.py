"""Convolutions whose padding holds elements of x: padding_mode "circular", "reflect" and "replicate".

They are divided into blocks, which are convolutions without a padding mode, so that all algorithms compute them. The
blocks take at most a quarter of the workspace, and the sums of weight_grad another one; the rest is the algorithm's.

    forward      the inputs in the windows of a block of outputs, the padding included, are copied and convolved
    weight_grad  the same; the results of the blocks are added in order
    data_grad    the gradients of a block of inputs, and of the padding that repeats them, are computed; the latter are
                 added to the former, which is the adjoint of padding
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple, TypeAlias

import numpy

from gpuconv import dtypes
from gpuconv.arguments import Shape
from gpuconv.blocking import Blocks, Buffer, Buffers, channels_innermost, largest, largest_part, pieces
from gpuconv.geometry import Geometry, Slices, extents_of
from gpuconv.operands import Index, Operand, Result, in_place
from gpuconv.plan import Planner
from gpuconv.request import Request
from gpuconv.types import Direction
from gpuconv.views import View

SHARES = 4  # of the workspace, of which blocks take one at most

Compute: TypeAlias = Callable[..., None]  # forward, data_grad or weight_grad of an algorithm


class Segment(NamedTuple):
    """Consecutive positions of a padded axis, counted from the first input: position p holds ``origin + step * p``.

    The step is 1, -1 or, if all positions hold the same input, 0.
    """

    start: int
    stop: int
    origin: int
    step: int

    @property
    def extent(self) -> int:
        """The number of positions."""
        return self.stop - self.start

    @property
    def is_input(self) -> bool:
        """Whether the positions are inputs themselves, not padding."""
        return self.origin == 0 and self.step == 1

    def held(self, positions: Any) -> Any:
        """Return the inputs that positions hold: ints, or arrays of them."""
        return self.origin + self.step * positions

    def inputs(self, start: int = 0) -> slice:
        """Return the inputs that the positions hold, counted from one of them; a single one if it is repeated."""
        first = self.held(self.start) - start
        if self.step == 0:
            return slice(first, first + 1)
        end = first + self.step * self.extent
        return slice(first, None if end < 0 else end, self.step)

    def cut(self, extent: int) -> list[Segment]:
        """Return the segment in pieces of at most an extent."""
        return [self.within(slice(start, start + extent)) for start in range(self.start, self.stop, extent)]

    def within(self, positions: slice) -> Segment:
        """Return the part within a block of positions, which may be empty."""
        start = max(self.start, positions.start)
        return self._replace(start=start, stop=max(start, min(self.stop, positions.stop)))

    def holding(self, block: slice) -> Segment:
        """Return the part that holds inputs of a block, which may be empty."""
        if self.step == 0:
            return self if block.start <= self.origin < block.stop else self._replace(stop=self.start)
        first, last = sorted(self.step * (i - self.origin) for i in (block.start, block.stop - 1))
        return self.within(slice(first, last + 1))


def segments(geometry: Geometry, axis: int) -> list[Segment]:
    """Return the segments of a padded axis: first the input, then the padding at the low and at the high end."""
    n, (low, high) = geometry.input[axis], geometry.padding[axis]
    step, at_low, at_high = {
        "circular": (1, n, -n),
        "reflect": (-1, 0, 2 * (n - 1)),
        "replicate": (0, 0, n - 1),
    }[geometry.padding_mode]
    return [Segment(0, n, 0, 1), Segment(-max(low, 0), 0, at_low, step), Segment(n, n + max(high, 0), at_high, step)]


class Division(NamedTuple):
    """A division of a convolution into blocks, of outputs or, for data_grad, of inputs."""

    blocks: Blocks
    elements: int  # of workspace for a block, and for the sums of weight_grad
    filters: int  # of a group, whose weight_grad is added up at a time

    @classmethod
    def of(cls, geometry: Geometry, direction: Direction, budget: int) -> Division:
        """Return the division for a workspace of this many elements; a block has one output or input at least."""
        extents, buffers = geometry.output, partial(_of_outputs, geometry)
        if direction == "data_grad":
            extents, buffers = geometry.input, partial(_of_inputs, geometry)
        blocks = Blocks.fitting((*geometry.batch, *extents), budget // SHARES, buffers)
        filters, each = geometry.group_filters, 2 * geometry.channels * geometry.taps
        if direction != "weight_grad" or len(blocks) == 1:
            return cls(blocks, sum(blocks.sizes), filters)
        filters = largest(filters, budget // SHARES, each)
        return cls(blocks, sum(blocks.sizes) + filters * each, filters)

    def rest(self, planner: Planner) -> Planner:
        """Return the planner of the algorithm, with the rest of the workspace."""
        return replace(planner, limit=max(0, planner.limit - self.elements * planner.dtype.itemsize))


def request_of_blocks(request: Request) -> Request:
    """Return the request to the algorithm that computes the blocks; the same one without a padding mode."""
    if request.geometry.padding_mode == "zeros":
        return request
    division = Division.of(largest_part(request), request.direction, request.budget)
    reserved = division.elements * dtypes.accumulator(request.dtype).itemsize
    return request._replace(geometry=request.geometry.padded, reserved=reserved)


def forward(compute: Compute, x: Operand, w: Operand, y: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute y of a padded x."""
    division = Division.of(geometry, "forward", planner.budget)

    def some_outputs(index: Index, planner: Planner) -> None:
        part, images = _copied(x, index, geometry, planner)
        compute(images, w, y.part(index), part, division.rest(planner))

    planner.loop(division.blocks, some_outputs)


def weight_grad(compute: Compute, dy: Operand, x: Operand, dw: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute dw of a padded x."""
    division = Division.of(geometry, "weight_grad", planner.budget)
    blocks = division.blocks

    def some_outputs(number: int, dy: Operand, dw: Result, planner: Planner) -> None:
        part, images = _copied(x, blocks[number], geometry, planner)
        part = replace(part, filters=part.groups * dw.view.shape[-1])
        compute(dy.seen(lambda view: view[blocks[number]]), images, dw, part, division.rest(planner))

    def some_filters(filters: slice, planner: Planner) -> None:
        gradients, result = dy.of_channels(filters), dw.of_channels(filters)
        shape = result.view.shape
        total, term = (space.shaped(shape) for space in planner.workspace(*(math.prod(shape),) * 2))

        def add(number: int, planner: Planner) -> None:
            some_outputs(number, gradients, Result(term if number else total), planner)
            if number:
                planner.call(planner.xp.add, total, term, out=total)

        planner.loop(range(len(blocks)), add)
        result.store(total, result.view, planner)

    if len(blocks) == 1:
        some_outputs(0, dy, dw, planner)
    else:
        planner.loop(list(pieces(geometry.group_filters, division.filters)), some_filters)


def data_grad(compute: Compute, dy: Operand, w: Operand, dx: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute dx, the gradient of an x that was padded."""
    division = Division.of(geometry, "data_grad", planner.budget)
    axes = [segments(geometry, axis) for axis in range(geometry.rank)]

    def some_inputs(index: Index, planner: Planner) -> None:
        images, inputs = index[: len(geometry.batch)], index[len(geometry.batch) :]
        target = dx.view[index]
        total = target
        if not in_place(target, planner.dtype):
            total = _images(target, extents_of(images), extents_of(inputs), planner)

        def add(runs: tuple[list[Segment], ...], planner: Planner) -> None:
            positions = tuple(slice(min(s.start for s in run), max(s.stop for s in run)) for run in runs)
            outputs = geometry.outputs_of_windows(positions)
            part = geometry.part(extents_of(images), positions, outputs)
            gradients = _images(target, part.batch, part.input, planner)
            if all(extents_of(outputs)):
                gradient = dy.seen(lambda view: view[(*images, *outputs)])
                compute(gradient, w, Result(gradients), part, division.rest(planner))
            else:
                planner.copy(gradients, 0)

            def fold(segments: tuple[Segment, ...], planner: Planner) -> None:
                _add(gradients[_at(segments, positions)], segments, inputs, total, planner)

            planner.loop(list(product(*runs)), fold)

        planner.loop(list(product(*map(_runs, axes, inputs))), add)
        dx.store(total, target, planner)

    planner.loop(division.blocks, some_inputs)


def _runs(parts: list[Segment], block: slice) -> list[list[Segment]]:
    """Return the segments of an axis that hold inputs of a block, in runs without gaps.

    The first segment of the first run is the block itself, and no other segment is longer than it.
    """
    inputs, *padding = (segment.holding(block) for segment in parts)
    first, others = [inputs], []
    for segment in padding:
        if segment.extent > inputs.extent:
            others += [[piece] for piece in segment.cut(inputs.extent)]
        elif segment.extent and (segment.stop == inputs.start or segment.start == inputs.stop):
            first.append(segment)
        elif segment.extent:
            others.append([segment])
    return [first, *others]


def _add(terms: View, axes: tuple[Segment, ...], inputs: Slices, total: View, planner: Planner) -> None:
    """Add gradients of positions to those of the inputs that they hold.

    The gradients of the inputs themselves, which are the first ones, are copied.
    """
    if all(segment.is_input for segment in axes):
        planner.copy(total, terms)
        return
    held = (segment.inputs(block.start) for segment, block in zip(axes, inputs, strict=True))
    target = total[(..., *held, slice(None), slice(None))]
    batch = total.ndim - len(axes) - 2
    repeated = tuple(batch + axis for axis, segment in enumerate(axes) if segment.step == 0)
    if repeated:
        (flat,) = planner.workspace(target.size)
        sums = flat.shaped(target.shape)
        planner.call(planner.xp.sum, terms, repeated, out=sums[_without(repeated, target.ndim)])
        terms = sums
    planner.call(planner.xp.add, target, terms, out=target)


def _without(axes: Sequence[int], rank: int) -> Index:
    """Return the index that drops axes, whose extent is 1."""
    return tuple(0 if axis in axes else slice(None) for axis in range(rank))


def _of_outputs(geometry: Geometry, box: Shape) -> Buffers:
    """Return the buffer of a block of outputs: the padded x in its windows."""
    batch = len(geometry.batch)
    axes = zip(box[batch:], geometry.stride, geometry.window, strict=True)
    return [Buffer(math.prod((*box[:batch], *((m - 1) * s + window for m, s, window in axes))) * geometry.channels)]


def _of_inputs(geometry: Geometry, box: Shape) -> Buffers:
    """Return the buffers of a block of inputs: its gradients with those of a run, and the sums of them."""
    batch, size = len(geometry.batch), math.prod(box) * geometry.channels
    runs = (n + sum(min(max(end, 0), n) for end in ends) for n, ends in zip(box[batch:], geometry.padding, strict=True))
    is_repeated = geometry.padding_mode == "replicate"
    return [Buffer(math.prod((*box[:batch], *runs)) * geometry.channels), Buffer(size), Buffer(size, is_repeated)]


def _images(like: View, batch: Shape, extents: Shape, planner: Planner, dtype: numpy.dtype | None = None) -> View:
    """Return workspace for images with these batch and spatial extents, and with the memory order of other images."""
    groups = like.shape[-2:]
    (flat,) = planner.workspace(math.prod((*batch, *extents, *groups)), dtype=dtype)
    if channels_innermost(like):
        return flat.shaped((*batch, *extents, *groups))
    first, last = len(batch), len(batch) + 2
    view = flat.shaped((*batch, *groups, *extents))
    return view.transpose(*range(first), *range(last, view.ndim), *range(first, last))


def _copied(x: Operand, index: Index, geometry: Geometry, planner: Planner) -> tuple[Geometry, Operand]:
    """Copy the padded x in the windows of a block of outputs; return the convolution of the copy, and the copy."""
    images, outputs = index[: len(geometry.batch)], index[len(geometry.batch) :]
    positions = tuple(slice(start, stop) for start, stop in geometry.inputs_in_windows(outputs))
    part = geometry.part(extents_of(images), positions, outputs)
    block = _images(x.view, part.batch, part.input, planner, x.view.dtype)
    held = ([segment.within(p) for segment in segments(geometry, axis)] for axis, p in enumerate(positions))

    def copy(axes: tuple[Segment, ...], planner: Planner) -> None:
        inputs = (segment.inputs() for segment in axes)
        planner.copy(block[_at(axes, positions)], x.view[(*images, *inputs)])

    planner.loop(list(product(*([segment for segment in axis if segment.extent] for axis in held))), copy)
    return part, x.part(block)


def _at(axes: Sequence[Segment], positions: Sequence[slice]) -> Index:
    """Return the index of segments in a block of positions."""
    inside = (slice(s.start - p.start, s.stop - p.start) for s, p in zip(axes, positions, strict=True))
    return (..., *inside, slice(None), slice(None))
