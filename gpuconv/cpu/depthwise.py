"""depthwise on NumPy: groups of one or a few channels, by kernels that Numba compiles (depthwise_kernels.py).

Vectors run along the groups. Images whose groups are contiguous, such as those of channels_last with one channel per
group, are read and written in place. Others are copied to blocks of the workspace, which fit in the cache, and the
results back. data_grad is the forward convolution of dy, once for each phase of the stride. In weight_grad every task
sums a block of the outputs, and these sums are added in a fixed order.

Without Numba, rows are multiplied by banded matrices (banded.py), which requires one channel and one filter per group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy

from gpuconv import dtypes
from gpuconv.arguments import Shape
from gpuconv.arrays import Backend
from gpuconv.blocking import Blocks, Buffer, Buffers, pieces
from gpuconv.cpu import banded, compiled, cost_model, slices
from gpuconv.cpu.windows import region_elements
from gpuconv.geometry import Geometry
from gpuconv.operands import MOST_TEMPORARIES, Index, Operand, Result, in_place
from gpuconv.plan import Body, Planner
from gpuconv.request import Request
from gpuconv.types import Direction
from gpuconv.views import View, is_contiguous, merged

AXES = 3  # of the kernels
MOST_CHANNELS = 16  # of a group, and filters; larger groups are matrix products
# Numbers of taps of the last axis, and strides, for which kernels are compiled; data_grad has phases of fewer taps.
UNROLLED = *((taps, 1) for taps in (1, 2, 3, 4, 5, 7)), *((taps, 2) for taps in (3, 5, 7))
VECTOR_BYTES = 64
VECTORS = 4  # whose groups are copied together
BLOCK_BYTES = 512 << 10  # of copies of x and y
SUM_BYTES = 256 << 10  # of x and dy that a task of weight_grad reads
SUMS = 4  # weight_grad: x and dy of a task are at least this many times as large as its sums
FAR_BYTES = 8 << 20  # of x and y, from which on x is prefetched
SLOWNESS = 2  # of a multiply-add, compared with a matrix product
# Nanoseconds, of float32, as in cost_model.py.
PRODUCT, PRODUCT_OF_GROUPS = 0.06, 0.085  # a multiply-add
READ, COPY = 0.3, 1.3  # an element that is read or written in place, or copied in another order


class Piece(NamedTuple):
    """A piece of a convolution with three spatial axes, for a kernel. Strides count elements."""

    input: Shape
    output: Shape
    kernel: Shape
    stride: Shape
    dilation: Shape
    low: Shape  # padding before the first input
    x: Shape  # strides of images, of the three axes, and of channels
    y: Shape  # strides of images, of the three axes, and of filters
    groups: int
    channels: int  # of a group
    filters: int  # of a group
    row: int  # stride of filters in w, which is (*kernel[:2], channels, kernel[2], filters, groups), and in b
    is_far: bool  # whether the arrays are larger than the cache, so that inputs are prefetched


@dataclass(frozen=True)
class _Lifted:
    """A convolution with one batch axis and three spatial axes, and its arrays in the order of axes of the kernels."""

    geometry: Geometry
    dtype: numpy.dtype  # of sums
    rank: int  # of the convolution

    @classmethod
    def of(cls, geometry: Geometry, dtype: numpy.dtype) -> _Lifted:
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
        return cls(lifted, dtype, geometry.rank)

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

    def images(self, view: View) -> View:
        """Return images (*batch, *spatial, G, channels) with one batch axis and three spatial axes."""
        batch = view.ndim - self.rank - 2
        one = view.reshape(math.prod(view.shape[:batch]), *view.shape[batch:])
        return one[(slice(None), *(None,) * (AXES - self.rank), ...)]

    def weight(self, view: View) -> View:
        """Return a weight (*kernel, G, C/G, F/G) as (T, R, C/G, S, F/G, G)."""
        return view[(*(None,) * (AXES - self.rank), ...)].transpose(0, 1, 4, 2, 5, 3)

    def is_in_place(self, view: View) -> bool:
        """Return whether vectors can be loaded from images, or stored in them."""
        return in_place(view, self.dtype) and view.strides[-2] == view.itemsize and view.shape[-2] >= self.lanes

    def block(self, space: View, shape: Shape) -> View:
        """Return a block of images (N, D, H, W, G, channels) in the workspace, with groups for at least one vector."""
        *places, groups, channels = shape
        return space.shaped((*places, channels, max(self.lanes, groups))).swapaxes(-1, -2)

    def inputs(self, box: Shape, groups: int) -> int:
        """Return the number of elements of the inputs that a block of outputs of some groups reads."""
        return region_elements(replace(self.geometry, channels=groups * self.geometry.group_channels), box)

    def some_groups(self, limit: float) -> list[slice]:
        """Return parts of the groups. A block of each, for one output at least, has at most ``limit`` elements."""
        one = (1,) * (AXES + 1)
        each = self.inputs(one, 1) + self.geometry.group_filters
        size = self.lanes * (VECTORS if 2 * VECTORS * self.lanes * each <= limit else 1)
        cuts = [*range(0, self.geometry.groups - size + 1, size)][1:]  # the last part is longer
        return [slice(*ends) for ends in zip([0, *cuts], [*cuts, self.geometry.groups], strict=True)]

    def rows_of_a_slice(self, groups: int) -> int:
        """Return the number of rows of outputs of which weight_grad forms one sum, over some groups."""
        geometry = self.geometry
        row = geometry.output[-1] * (geometry.group_filters + geometry.group_channels * math.prod(geometry.stride[1:]))
        return max(1, max(SUM_BYTES // self.dtype.itemsize, SUMS * self.weights) // (row * groups))

    def kernel(self, name: str, *images: View | None) -> Callable[..., None] | None:
        """Return a kernel, or None if Numba fails or the batch axes cannot be merged without a copy."""
        for view in images:
            batch = 0 if view is None else view.ndim - self.rank - 2
            if view is not None and merged(view.shape[:batch], view.strides[:batch]) is None:
                return None
        taps, stride, dilation = (
            axes[-1] for axes in (self.geometry.kernel, self.geometry.stride, self.geometry.dilation)
        )
        is_unrolled = (taps, stride) in UNROLLED and (dilation == 1 or taps == 1)
        constants = (taps, stride) if is_unrolled else (0, 0)
        return compiled.kernel("depthwise_kernels", name, constants, self.dtype)

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
            (*x.steps[:4], x.steps[5]),
            (*y.steps[:4], y.steps[5]),
            x.shape[4],
            geometry.group_channels,
            geometry.group_filters,
            self.groups,
            geometry.bytes(self.dtype.itemsize) > FAR_BYTES,
        )

    def loaded(self, x: Operand, index: Index, groups: slice, space: View, planner: Planner) -> tuple[View, Shape]:
        """Return the inputs of a block of outputs, in place or copied, and the position of the first one."""
        if x.is_plain(self.dtype) and self.is_in_place(x.view):
            return x.view[index[0], ..., groups, :], (0,) * AXES
        region = self.geometry.inputs_in_windows(index[1:])
        inside = [
            slice(max(0, first), min(end, n)) for (first, end), n in zip(region, self.geometry.input, strict=True)
        ]
        inside = [slice(axis.start, max(axis.start, axis.stop)) for axis in inside]
        return self.copied(x, (index[0], *inside, groups), space, planner), tuple(axis.start for axis in inside)

    def copied(self, images: Operand, index: Index, space: View, planner: Planner) -> View:
        """Return a copy of images in the workspace; groups that fill the vector are zeros."""
        shape = images.view[index].shape
        block = self.block(space, shape)
        if shape[-2] < self.lanes:
            planner.copy(block, 0)
        if math.prod(shape):
            images.read(index, block[..., : shape[-2], :], planner)
        return block


def why_not(request: Request) -> str | None:
    """Return a reason if neither compiled kernels nor banded matrices are applicable, else None."""
    geometry, dtype = request.geometry, dtypes.accumulator(request.dtype)
    refused = _not_compiled(geometry, dtype, request.backend)
    if geometry.groups == 1 < geometry.group_channels:
        refused = f"it requires several groups, or one channel, not one group of {geometry.group_channels} channels"
    if refused is None and _least(geometry, request.direction, dtype) <= request.budget:
        return None
    reason = banded.why_not(request)
    return refused or reason if reason else None


def _not_compiled(geometry: Geometry, dtype: numpy.dtype, backend: Backend) -> str | None:
    """Return a reason if there is no compiled kernel for a convolution, whatever its workspace."""
    channels, filters = geometry.group_channels, geometry.group_filters
    if max(channels, filters) > MOST_CHANNELS:
        return f"a group may have at most {MOST_CHANNELS} channels and filters, not {channels} and {filters}"
    if geometry.rank > AXES:
        return f"its kernels have at most {AXES} spatial axes, not {geometry.rank}"
    if backend.name != "numpy":
        return "Numba compiles for NumPy arrays"
    return compiled.why_not(dtype)


def _is_compiled(geometry: Geometry, direction: Direction, planner: Planner) -> bool:
    refused = _not_compiled(geometry, planner.dtype, planner.backend)
    return refused is None and _least(geometry, direction, planner.dtype) <= planner.budget


def _least(geometry: Geometry, direction: Direction, dtype: numpy.dtype) -> int:
    """Return the elements of workspace for weights, bias, and blocks of one output."""
    lifted = _Lifted.of(geometry, dtype)
    most = 2 * lifted.lanes
    block = (1 + MOST_TEMPORARIES) * (lifted.inputs((1,) * (AXES + 1), most) + most * geometry.group_filters)
    weights = lifted.weights * (4 if direction == "weight_grad" else 1)
    return 2 * (weights + geometry.group_filters * lifted.groups + block)


def nanoseconds(request: Request) -> float:
    """Estimate the time with compiled kernels if there are any, else with banded matrices."""
    geometry, dtype = request.geometry, dtypes.accumulator(request.dtype)
    if _not_compiled(geometry, dtype, request.backend) or _least(geometry, request.direction, dtype) > request.budget:
        return banded.nanoseconds(request)
    return _nanoseconds(request)


def advice(request: Request, nanoseconds: float) -> str | None:
    """Return how long a convolution would take with Numba if that is missing and less than so many nanoseconds."""
    geometry, missing = request.geometry, compiled.missing()
    is_small = max(geometry.group_channels, geometry.group_filters) <= MOST_CHANNELS
    suits = is_small and geometry.groups > 1 and geometry.rank <= AXES
    if missing is None or not suits or dtypes.is_complex(request.dtype) or _nanoseconds(request) >= nanoseconds:
        return None
    return f"with Numba, depthwise would take {_nanoseconds(request) / 1e6:.2g} ms (estimate)"


def _nanoseconds(request: Request) -> float:
    """Estimate the time of compiled kernels to multiply and add, and to read or copy x and y."""
    geometry, dtype = request.geometry, dtypes.accumulator(request.dtype)
    lifted = _Lifted.of(geometry, dtype)
    is_one = geometry.group_channels == geometry.group_filters == 1
    products = geometry.multiply_adds() * lifted.groups / geometry.groups
    products *= PRODUCT if is_one else PRODUCT_OF_GROUPS
    if request.direction == "weight_grad":
        products *= 1.5
    if geometry.layout == "channels_first":
        each = COPY
    else:
        each = READ if is_one and dtype == request.dtype and geometry.groups >= lifted.lanes else COPY / 2
    inputs, outputs = math.prod(geometry.input) * geometry.channels, math.prod(geometry.output) * geometry.filters
    moved = 1.0 * math.prod(geometry.batch) * (inputs + outputs)
    if request.direction == "data_grad" and set(geometry.stride) != {1}:
        moved *= 2.5  # for each phase dy is read, and parts of cache lines of dx are written
    return (products + moved * each) * dtype.itemsize / 4 + 4 * cost_model.STEP


def forward(x: Operand, w: Operand, y: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute ``y[o, f] = sum over taps t and channels c of x[o * stride + t * dilation - low, c] w[t, c, f]``."""
    if not _is_compiled(geometry, "forward", planner):
        banded.forward(x, w, y, geometry, planner)
    elif (tasks := _tasks(x, w, y, geometry, planner)) is None:
        slices.forward(x, w, y, geometry, planner)
    else:
        planner.loop(tasks, _planned, planner.team(geometry, slowness=SLOWNESS).workers)


def data_grad(dy: Operand, w: Operand, dx: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute dx: for each phase of the stride, the forward convolution of dy with the taps that reach it, reversed."""
    if not _is_compiled(geometry, "data_grad", planner):
        banded.data_grad(dy, w, dx, geometry, planner)
        return
    tasks: list[Body] = []
    for phase in geometry.phases:
        part = dx.part((..., *phase.inputs, slice(None), slice(None)))
        if phase.geometry is None:
            tasks.append(part.fill)
            continue
        taps = w.view[phase.taps][(slice(None, None, -1),) * geometry.rank].swapaxes(-1, -2)
        more = _tasks(dy, w.part(taps), part, phase.geometry, planner)
        if more is None:
            slices.data_grad(dy, w, dx, geometry, planner)
            return
        tasks += more
    planner.loop(tasks, _planned, planner.team(geometry, slowness=SLOWNESS).workers)


def _planned(task: Body, planner: Planner) -> None:
    task(planner)


def _tasks(x: Operand, w: Operand, y: Result, geometry: Geometry, planner: Planner) -> list[Body] | None:
    """Copy weights and bias for the kernels; return the tasks of a forward convolution, or None without a kernel."""
    lifted = _Lifted.of(geometry, planner.dtype)
    kernel = lifted.kernel("forward", x.view, x.y, y.view)
    if kernel is None:
        return None
    x, y = x.seen(lifted.images), replace(y, view=lifted.images(y.view))
    weights, bias = _weights(w, lifted, planner), _bias(y, lifted, planner)
    copies_x, copies_y = not x.is_plain(planner.dtype) or not lifted.is_in_place(x.view), not lifted.is_in_place(y.view)
    team = planner.team(geometry, slowness=SLOWNESS)
    room = planner.budget - lifted.weights - bias.size
    limit = min(room // 2 // team.shares, BLOCK_BYTES // planner.dtype.itemsize)
    parts = lifted.some_groups(limit) if copies_x or copies_y else [slice(0, geometry.groups)]
    most = max(part.stop - part.start for part in parts)

    def buffers_of(box: Shape) -> Buffers:
        groups = max(most, lifted.lanes)
        return (
            Buffer(lifted.inputs(box, groups), copies_x, x.temporaries * copies_x),
            Buffer(math.prod(box) * groups * geometry.group_filters, copies_y, y.temporaries),
        )

    outputs = (*lifted.geometry.batch, *lifted.geometry.output)
    # The bits of a result do not depend on the blocks, so that every thread may compute one.
    share = math.ceil(math.prod(outputs) / team.workers)
    blocks = Blocks.fitting(outputs, limit, buffers_of, share)

    def some_outputs(groups: slice, index: Index, planner: Planner) -> None:
        x_space, y_space = planner.workspace(*blocks.sizes)
        images, start = lifted.loaded(x, index, groups, x_space, planner)
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
    """Return the weights (T, R, C/G, S, F/G, G), contiguous, in place if they are so there."""
    w = w.seen(lifted.weight)
    shape = (*w.view.shape[:-1], lifted.groups)
    if w.is_plain(planner.dtype) and is_contiguous(shape, w.view.strides, w.view.itemsize) and shape == w.view.shape:
        return w.view
    (space,) = planner.workspace(lifted.weights)
    weights = space.shaped(shape)
    if shape != w.view.shape:
        planner.copy(weights, 0)
    w.read((...,), weights[..., : w.view.shape[-1]], planner)
    return weights


def _bias(y: Result, lifted: _Lifted, planner: Planner) -> View:
    """Return the bias (F/G, G), zeros if there is none."""
    (space,) = planner.workspace(lifted.geometry.group_filters * lifted.groups)
    bias = space.shaped((lifted.geometry.group_filters, lifted.groups))
    planner.copy(bias, 0)
    if y.bias is not None:
        planner.copy(bias[:, : lifted.geometry.groups], y.bias.swapaxes(0, 1))
    return bias


def weight_grad(dy: Operand, x: Operand, dw: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute ``dw[t, c, f] = sum over outputs o of x[o * stride + t * dilation - low, c] dy[o, f]``."""
    if not _is_compiled(geometry, "weight_grad", planner):
        banded.weight_grad(dy, x, dw, geometry, planner)
        return
    lifted = _Lifted.of(geometry, planner.dtype)
    kernel = lifted.kernel("weight_grad", x.view, x.y, dy.view, dy.y)
    if kernel is None:
        slices.weight_grad(dy, x, dw, geometry, planner)
        return
    x, dy, target = x.seen(lifted.images), dy.seen(lifted.images), lifted.weight(dw.view)
    copies = tuple(not side.is_plain(planner.dtype) or not lifted.is_in_place(side.view) for side in (x, dy))
    team = planner.team(geometry, slowness=SLOWNESS)
    room = planner.budget // 2 // team.shares
    limit = min(room, BLOCK_BYTES // planner.dtype.itemsize)
    parts = lifted.some_groups(limit) if any(copies) else [slice(0, geometry.groups)]
    most = max(lifted.lanes, *(part.stop - part.start for part in parts))

    def buffers_of(box: Shape) -> Buffers:
        return (
            Buffer(lifted.inputs(box, most), copies[0], x.temporaries * copies[0]),
            Buffer(math.prod(box) * most * geometry.group_filters, copies[1], dy.temporaries * copies[1]),
        )

    outputs = (*lifted.geometry.batch, *lifted.geometry.output)
    blocks = Blocks.fitting(outputs, limit, buffers_of, math.ceil(math.prod(outputs) / team.tasks))
    rows = lifted.rows_of_a_slice(most)
    each = -(-math.prod(blocks.box[:-1]) // rows)  # slices of a block
    at_once = max(1, planner.budget // 2 // (each * lifted.weights) - 1)  # blocks
    is_there = in_place(dw.view, planner.dtype)
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
            images, start = lifted.loaded(x, index, groups, x_space, planner)
            gradients = dy.view[(*index, groups)]
            if copies[1]:
                gradients = lifted.copied(dy, (*index, groups), dy_space, planner)
            units = math.prod(gradients.shape[:3])
            unused = sums[number, -(-units // rows) :]
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
