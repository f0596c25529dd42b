"""Plans of convolutions by the kernels that Numba compiles (vector_kernels.py), for depthwise and direct on NumPy.

Vectors have the lanes of one of two things:

    depthwise   groups: one channel of x, and one filter of y, of several groups
    direct      filters: one channel of x, ``shared`` by several filters of a group. In the terms of depthwise, these
                filters are groups, all of which read the same channels, and the groups are filters of each of them

Images whose lanes are contiguous are written, and for depthwise read, in place. Others are copied to blocks of the
workspace, which fit in the cache, and the results back. data_grad is the forward convolution of dy, once for each phase
of the stride. In weight_grad every task sums a block of the outputs, and these sums are added in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy

from gpuconv.arguments import Shape
from gpuconv.arrays import Backend
from gpuconv.blocking import Blocks, Buffer, Buffers, pieces
from gpuconv.cpu import compiled
from gpuconv.cpu.windows import in_bounds, region_elements
from gpuconv.geometry import Geometry
from gpuconv.operands import MOST_TEMPORARIES, Index, Operand, Result, in_place
from gpuconv.plan import Body, Planner
from gpuconv.types import Direction
from gpuconv.views import View, is_contiguous, merged

AXES = 3  # of the kernels
# Numbers of taps of the last axis, and strides, for which depthwise has kernels; data_grad has phases of fewer taps.
UNROLLED = *((taps, 1) for taps in (1, 2, 3, 4, 5, 7)), *((taps, 2) for taps in (3, 5, 7))
VECTOR_BYTES = 64
VECTORS = 4  # whose lanes are copied together
BLOCK_BYTES = 512 << 10  # of copies of x and y
SUM_BYTES = 256 << 10  # of x and dy of which weight_grad forms one sum
SUMS = 4  # they are at least this many times as large as the sum
MANY_CHANNELS = 8  # read one after the other
REUSED = 64  # multiply-adds of an element from which on it is worth a copy that lies at a cache line
SLOWNESS = 4  # of a multiply-add of depthwise, compared with a matrix product


class Piece(NamedTuple):
    """A piece of a convolution with three spatial axes, for a kernel. Strides count elements."""

    input: Shape
    output: Shape
    kernel: Shape
    stride: Shape
    dilation: Shape
    low: Shape  # padding before the first input
    x: Shape  # strides of images, of the three axes, of channels, and of groups if lanes share an input, else 0
    y: Shape  # strides of images, of the three axes, and of filters
    lanes: int  # groups, or filters of a group if they share an input
    channels: int  # of a group
    filters: int  # of a group
    row: int  # lanes of a row of w, which is (filters, *kernel, channels, lanes), and of b


@dataclass(frozen=True)
class _Lifted:
    """A convolution with one batch axis and three spatial axes, and its arrays in the order of axes of the kernels."""

    geometry: Geometry
    dtype: numpy.dtype  # of sums
    rank: int  # of the convolution
    shared: bool  # whether all groups read the same channels

    @classmethod
    def of(cls, geometry: Geometry, dtype: numpy.dtype, shared: bool) -> _Lifted:
        if shared:
            lanes, groups = max(1, geometry.group_filters), geometry.groups
            geometry = replace(geometry, groups=lanes, channels=lanes * geometry.group_channels, filters=lanes * groups)
        more = (1,) * (AXES - geometry.rank)
        lifted = replace(
            geometry,
            batch=(math.prod(geometry.batch),),
            input=more + geometry.input,
            kernel=more + geometry.kernel,
            stride=more + geometry.stride,
            dilation=more + geometry.dilation,
            padding=((0, 0),) * len(more) + geometry.padding,
        )
        return cls(lifted, dtype, geometry.rank, shared)

    @property
    def lanes(self) -> int:
        """The number of elements of a vector."""
        return VECTOR_BYTES // self.dtype.itemsize

    @property
    def groups(self) -> int:
        """The number of groups of the weights, which fill at least one vector."""
        return max(self.lanes, self.geometry.groups)

    @property
    def weights(self) -> int:
        """The number of elements of the weights."""
        return self.geometry.taps * self.geometry.group_channels * self.geometry.group_filters * self.groups

    @property
    def reserved(self) -> int:
        """The number of elements of the weights and of the bias."""
        return self.weights + self.geometry.group_filters * self.groups

    @property
    def least(self) -> int:
        """The number of elements of the smallest block: copies for one output, of up to two vectors."""
        groups = 2 * self.lanes
        copied = self.inputs((1,) * (AXES + 1), groups) + groups * self.geometry.group_filters
        return (1 + MOST_TEMPORARIES) * copied

    def images(self, view: View) -> View:
        """Return images (*batch, *spatial, G, channels) with one batch axis and three spatial axes."""
        batch = view.ndim - self.rank - 2
        one = view.reshape(math.prod(view.shape[:batch]), *view.shape[batch:])
        return one[(slice(None), *(None,) * (AXES - self.rank), ...)]

    def outputs(self, view: View) -> View:
        """Return y or dy (*batch, *spatial, G, F/G) with one batch axis, three spatial axes, lanes and filters."""
        return self.images(view.swapaxes(-1, -2) if self.shared else view)

    def weight(self, view: View) -> View:
        """Return a weight (*kernel, G, C/G, F/G) as (filters, T, R, S, channels, lanes)."""
        return view[(*(None,) * (AXES - self.rank), ...)].transpose(
            *((3, 0, 1, 2, 4, 5) if self.shared else (5, 0, 1, 2, 4, 3))
        )

    def is_in_place(self, view: View) -> bool:
        """Return whether vectors can be loaded from images, or stored in them."""
        return in_place(view, self.dtype) and view.strides[-2] == view.itemsize and view.shape[-2] >= self.lanes

    def copies(self, x: Operand) -> bool:
        """Return whether x must be copied."""
        return not x.is_plain(self.dtype) or not (self.shared or self.is_in_place(x.view))

    def is_scattered(self, x: View) -> bool:
        """Return whether many channels, which forward reads one after the other, lie far apart."""
        return self.shared and self.geometry.group_channels >= MANY_CHANNELS and abs(x.strides[-1]) > x.itemsize

    def block(self, space: View, shape: Shape) -> View:
        """Return a block of images (N, D, H, W, G, channels) in the workspace, with groups for at least one vector."""
        *places, groups, channels = shape
        return space.shaped((*places, channels, max(self.lanes, groups))).swapaxes(-1, -2)

    def inputs(self, box: Shape, groups: int) -> int:
        """Return the number of elements of the inputs that a block of outputs of some groups reads."""
        channels = self.geometry.group_channels * (self.geometry.group_filters if self.shared else groups)
        return region_elements(replace(self.geometry, channels=channels), box)

    def is_whole(self, limit: float) -> bool:
        """Return whether a row of outputs of all filters, which share an input, has at most ``limit`` elements."""
        return self.shared and self.geometry.output[-1] * self.geometry.group_filters * self.groups <= limit

    def parts(self, copies_x: bool, copies_y: bool, limit: float) -> list[slice]:
        """Return parts of the groups. A block of each, for one output at least, has at most ``limit`` elements."""
        if self.is_whole(limit) or not (copies_y or (copies_x and not self.shared)):
            return [slice(0, self.geometry.groups)]
        one = (1,) * (AXES + 1)
        each = self.inputs(one, 1) + self.geometry.group_filters
        size = self.lanes * (VECTORS if 2 * VECTORS * self.lanes * each <= limit else 1)
        cuts = [*range(0, self.geometry.groups - size + 1, size)][1:]  # the last part is longer
        return [slice(*ends) for ends in zip([0, *cuts], [*cuts, self.geometry.groups], strict=True)]

    def rows_of_a_slice(self, groups: int) -> int:
        """Return the number of rows of outputs of which weight_grad forms one sum, over some groups."""
        geometry = self.geometry
        channels = geometry.group_channels * (geometry.group_filters if self.shared else groups)
        inputs = channels * math.prod(geometry.stride[1:])
        row = geometry.output[-1] * (geometry.group_filters * groups + inputs)
        return max(1, max(SUM_BYTES // self.dtype.itemsize, SUMS * self.weights) // row)

    def kernel(self, name: str, *images: View | None) -> Callable[..., None] | None:
        """Return a kernel, or None if Numba fails or the batch axes cannot be merged without a copy."""
        for view in images:
            batch = 0 if view is None else view.ndim - self.rank - 2
            if view is not None and merged(view.shape[:batch], view.strides[:batch]) is None:
                return None
        geometry = self.geometry
        taps, stride, dilation = geometry.kernel[-1], geometry.stride[-1], geometry.dilation[-1]
        is_unrolled = not self.shared and (taps, stride) in UNROLLED and (dilation == 1 or taps == 1)
        constants = (taps, stride) if is_unrolled else (0, 0)
        return compiled.kernel(name, (*constants, int(self.shared)), self.dtype)

    def piece(self, x: View, y: View, index: Index, start: Shape) -> Piece:
        """Return the block of outputs ``y`` at an index, of inputs ``x`` that begin at ``start``."""
        geometry = self.geometry
        axes = zip(geometry.padding, index[1:], geometry.stride, start, strict=True)
        return Piece(
            x.shape[1:4],
            y.shape[1:4],
            geometry.kernel,
            geometry.stride,
            geometry.dilation,
            tuple(low - outputs.start * s + first for (low, _), outputs, s, first in axes),
            (*x.steps[:4], x.steps[5], x.steps[4] if self.shared else 0),
            (*y.steps[:4], y.steps[5]),
            y.shape[4],
            geometry.group_channels,
            geometry.group_filters,
            self.groups,
        )

    def loaded(self, x: Operand, index: Index, space: View, planner: Planner, copies: bool) -> tuple[View, Shape]:
        """Return the inputs of a block of outputs, in place or copied, and the position of the first one.

        ``index``: the index of the outputs, followed by their groups.
        """
        outputs, groups = index[:-1], slice(None) if self.shared else index[-1]
        if not copies:
            return x.view[outputs[0], ..., groups, :], (0,) * AXES
        inside = in_bounds(self.geometry.inputs_in_windows(outputs[1:]), self.geometry)
        seen, start = (outputs[0], *inside, groups), tuple(axis.start for axis in inside)
        if not self.shared:
            return self.copied(x, seen, space, planner), start
        block = space.shaped(x.view[seen].shape)
        if block.size:
            x.read(seen, block, planner)
        return block, start

    def copied(self, images: Operand, index: Index, space: View, planner: Planner) -> View:
        """Return a copy of images in the workspace; groups that fill the vector are zeros."""
        shape = images.view[index].shape
        block = self.block(space, shape)
        if shape[-2] < self.lanes:
            planner.copy(block, 0)
        if math.prod(shape):
            images.read(index, block[..., : shape[-2], :], planner)
        return block


def not_compiled(geometry: Geometry, dtype: numpy.dtype, backend: Backend) -> str | None:
    """Return a reason if there is no kernel for sums of a dtype, on a backend, whatever the workspace; else None."""
    if geometry.rank > AXES:
        return f"its kernels have at most {AXES} spatial axes, not {geometry.rank}"
    if backend.name != "numpy":
        return "Numba compiles for NumPy arrays"
    return compiled.why_not(dtype)


def least(geometry: Geometry, direction: Direction, dtype: numpy.dtype, shared: bool) -> int:
    """Return the elements of workspace for weights, bias, and blocks of one output."""
    if direction == "data_grad":
        geometry = replace(geometry, channels=geometry.filters, filters=geometry.channels)
    lifted = _Lifted.of(geometry, dtype, shared)
    if direction == "weight_grad":
        return 8 * lifted.weights + 4 * lifted.least
    return 2 * (lifted.reserved + 2 * lifted.least)


def padded(lanes: int, dtype: numpy.dtype) -> int:
    """Return the number of lanes of the vectors that a convolution fills, which may overlap."""
    of_vector = VECTOR_BYTES // dtype.itemsize
    return of_vector * -(-lanes // of_vector)


def forward(x: Operand, w: Operand, y: Result, geometry: Geometry, planner: Planner, *, shared: bool) -> bool:
    """Plan the kernels of the forward convolution; return False if there are none."""
    return _loop([_Problem(x, w, y, geometry)], [], geometry, planner, shared)


def data_grad(dy: Operand, w: Operand, dx: Result, geometry: Geometry, planner: Planner, *, shared: bool) -> bool:
    """Plan the kernels of the convolutions of dy that give each phase of the stride; return False if there are none."""
    problems: list[_Problem] = []
    unreached: list[Body] = []
    for phase in geometry.phases:
        part = dx.part((..., *phase.inputs, slice(None), slice(None)))
        if phase.geometry is None:
            unreached.append(part.fill)
        else:
            taps = w.view[phase.taps][(slice(None, None, -1),) * geometry.rank].swapaxes(-1, -2)
            problems.append(_Problem(dy, w.part(taps), part, phase.geometry))
    return _loop(problems, unreached, geometry, planner, shared)


class _Problem(NamedTuple):
    """A forward convolution."""

    x: Operand
    w: Operand
    y: Result
    geometry: Geometry


def _loop(problems: list[_Problem], others: list[Body], geometry: Geometry, planner: Planner, shared: bool) -> bool:
    """Plan the tasks of convolutions, of which a geometry consists, and others; return False if there is no kernel."""
    lifted = [_Lifted.of(problem.geometry, planner.dtype, shared) for problem in problems]
    room = planner.budget - sum(one.reserved for one in lifted)
    least = max((one.least for one in lifted), default=1)
    team = planner.team(geometry, 2 * least, _slowness(shared))
    share = room // 2 // team.shares, -(-team.workers // max(1, len(problems)))
    tasks = others
    for problem, one in zip(problems, lifted, strict=True):
        more = _tasks(problem, one, share, planner)
        if more is None:
            return False
        tasks = tasks + more
    planner.loop(tasks, _planned, team.workers)
    return True


def _slowness(shared: bool) -> float:
    return 1 if shared else SLOWNESS


def _planned(task: Body, planner: Planner) -> None:
    task(planner)


def _tasks(problem: _Problem, lifted: _Lifted, share: tuple[int, int], planner: Planner) -> list[Body] | None:
    """Copy weights and bias for the kernels; return the tasks, or None without a kernel.

    ``share``: elements of workspace for a task, and the number of threads that compute the convolution.
    """
    x, w, y, _ = problem
    geometry = lifted.geometry
    kernel = lifted.kernel("forward", x.view, x.y, y.view)
    if kernel is None:
        return None
    x, y = x.seen(lifted.images), replace(y, view=lifted.outputs(y.view))
    weights, bias = _weights(w, lifted, planner), _bias(y, lifted, planner)
    copies_x, copies_y = lifted.copies(x) or lifted.is_scattered(x.view), not lifted.is_in_place(y.view)
    limit = min(share[0], BLOCK_BYTES // planner.dtype.itemsize)
    parts = lifted.parts(copies_x, copies_y, limit)
    most = max(part.stop - part.start for part in parts)

    def buffers_of(box: Shape) -> Buffers:
        groups = max(most, lifted.lanes)
        return (
            Buffer(lifted.inputs(box, groups), copies_x, x.temporaries * copies_x),
            Buffer(math.prod(box) * groups * geometry.group_filters, copies_y, y.temporaries),
        )

    outputs = (*geometry.batch, *geometry.output)
    # The bits of a result do not depend on the blocks, so that every thread may compute one.
    blocks = Blocks.fitting(outputs, limit, buffers_of, math.ceil(math.prod(outputs) / share[1]))

    def some_outputs(groups: slice, index: Index, planner: Planner) -> None:
        x_space, y_space = planner.workspace(*blocks.sizes)
        images, start = lifted.loaded(x, (*index, groups), x_space, planner, copies_x)
        target = y.view[(*index, groups)]
        block = lifted.block(y_space, target.shape) if copies_y else target
        piece = lifted.piece(images, block, index, start)
        arrays = block, images, weights[..., groups], bias[:, groups]
        planner.call(kernel, *map(_first, arrays), piece, math.prod(block.shape[:3]))
        result = block[..., : target.shape[-2], :] if copies_y else target
        replace(y, bias=None).store(result, target, planner)

    return [partial(some_outputs, groups, index) for index in blocks for groups in parts]


def _first(view: View) -> View:
    """Return the view of the first element, which kernels reach the others from."""
    return view.strided((1,), (view.itemsize,))


def _weights(w: Operand, lifted: _Lifted, planner: Planner) -> View:
    """Return the weights (filters, T, R, S, channels, lanes), in place if they are contiguous there and seldom read."""
    w = w.seen(lifted.weight)
    shape = (*w.view.shape[:-1], lifted.groups)
    is_there = w.is_plain(planner.dtype) and is_contiguous(w.view.shape, w.view.strides, w.view.itemsize)
    outputs = math.prod((*lifted.geometry.batch, *lifted.geometry.output))
    if is_there and shape == w.view.shape and not (lifted.shared and outputs >= 4 * REUSED):
        return w.view
    (space,) = planner.workspace(lifted.weights)
    weights = space.shaped(shape)
    if shape != w.view.shape:
        planner.copy(weights, 0)
    w.read((...,), weights[..., : w.view.shape[-1]], planner)
    return weights


def _bias(y: Result, lifted: _Lifted, planner: Planner) -> View:
    """Return the bias (filters, lanes), zeros if there is none."""
    (space,) = planner.workspace(lifted.geometry.group_filters * lifted.groups)
    bias = space.shaped((lifted.geometry.group_filters, lifted.groups))
    planner.copy(bias, 0)
    if y.bias is not None:
        planner.copy(bias[:, : lifted.geometry.groups], y.bias if lifted.shared else y.bias.swapaxes(0, 1))
    return bias


def weight_grad(dy: Operand, x: Operand, dw: Result, geometry: Geometry, planner: Planner, *, shared: bool) -> bool:
    """Plan the kernels of weight_grad; return False if there are none."""
    lifted = _Lifted.of(geometry, planner.dtype, shared)
    kernel = lifted.kernel("weight_grad", x.view, x.y, dy.view, dy.y)
    if kernel is None:
        return False
    geometry = lifted.geometry
    x, dy, target = x.seen(lifted.images), dy.seen(lifted.outputs), lifted.weight(dw.view)
    team = planner.team(geometry, 2 * lifted.least, _slowness(shared))
    limit = min(planner.budget // 2 // team.shares, BLOCK_BYTES // planner.dtype.itemsize)
    aligns = lifted.is_whole(limit) and geometry.taps * geometry.group_channels >= REUSED
    copies = lifted.copies(x), aligns or not dy.is_plain(planner.dtype) or not lifted.is_in_place(dy.view)
    parts = lifted.parts(*copies, limit)
    most = max(lifted.lanes, *(part.stop - part.start for part in parts))

    def buffers_of(box: Shape) -> Buffers:
        return (
            Buffer(lifted.inputs(box, most), copies[0], x.temporaries * copies[0]),
            Buffer(math.prod(box) * most * geometry.group_filters, copies[1], dy.temporaries * copies[1]),
        )

    outputs = (*geometry.batch, *geometry.output)
    rows = lifted.rows_of_a_slice(most)
    fitting = max(1, planner.budget // 4 // lifted.weights)  # sums of slices
    largest = min(math.ceil(math.prod(outputs) / team.tasks), fitting * rows * outputs[-1])
    blocks = Blocks.fitting(outputs, limit, buffers_of, largest)
    each = -(-math.prod(blocks.box[:-1]) // rows)  # slices of a block
    at_once = max(1, fitting // each)  # blocks
    # A sum of few slices into an array in another order would take NumPy many times as long as a copy.
    is_there = in_place(target, planner.dtype) and target.strides[-1] == target.itemsize
    sum_space, total_space, term_space = planner.workspace(
        min(at_once, len(blocks)) * each * lifted.weights,
        target.size * (not is_there),
        target.size * (at_once < len(blocks)),
    )
    total, term = target if is_there else total_space.shaped(target.shape), term_space.shaped(target.shape)

    def some_blocks(run: slice, planner: Planner) -> None:
        sums = sum_space.shaped((run.stop - run.start, each, *target.shape[:-1], lifted.groups))

        def some_outputs(task: tuple[slice, int], planner: Planner) -> None:
            groups, number = task
            index = blocks[run.start + number]
            x_space, dy_space = planner.workspace(*blocks.sizes)
            images, start = lifted.loaded(x, (*index, groups), x_space, planner, copies[0])
            gradients = dy.view[(*index, groups)]
            if copies[1]:
                gradients = lifted.copied(dy, (*index, groups), dy_space, planner)
            units = math.prod(gradients.shape[:3])
            unused = sums[number, -(-units // rows) :, ..., groups]
            planner.copy(unused, 0)
            arrays = sums[number, 0, ..., groups], images, gradients
            planner.call(kernel, *map(_first, arrays), lifted.piece(images, gradients, index, start), rows, units)

        tasks = [(groups, number) for number in range(run.stop - run.start) for groups in parts]
        planner.loop(tasks, some_outputs, team.workers)
        slices = sums.reshape(-1, *sums.shape[2:])[..., : target.shape[-1]]
        planner.call(planner.xp.sum, slices, 0, out=term if run.start else total)
        if run.start:
            planner.call(planner.xp.add, total, term, out=total)

    planner.loop(list(pieces(len(blocks), at_once)), some_blocks)
    if not is_there:
        planner.copy(target, total)
    return True
