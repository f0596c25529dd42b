"""Algorithm depthwise: convolutions of one or a few channels per group, whose operands are read from memory once.

On a GPU, CUDA kernels (kernels/depthwise.cu) load the region of x that a block of outputs reads into shared memory.
data_grad is the forward convolution of dy, once for each phase of the stride. weight_grad has partial sums that
split_sum adds in a fixed order. All directions give the same bits at every call.

On NumPy, and for more than three spatial axes, gpuconv/cpu/depthwise.py computes it.
"""

from __future__ import annotations

import math

import numpy

from gpuconv.arguments import Shape
from gpuconv.arrays import Backend
from gpuconv.cpu import depthwise as on_cpu
from gpuconv.geometry import Geometry
from gpuconv.gpu import params, split_sum, structs
from gpuconv.gpu.depthwise_layer import (
    ENOUGH_BLOCKS,
    SHARED_MEMORY,
    THREADS,
    Axes,
    Block,
    Layer,
    chosen,
    layer_of,
    least_bytes,
    stored_dtype,
)
from gpuconv.gpu.kernel import Kernel, Module
from gpuconv.gpu.launch import blocks
from gpuconv.operands import Operand, Result
from gpuconv.plan import Planner
from gpuconv.request import Request
from gpuconv.views import View

MOST_CHANNELS = 16  # of a group; larger groups fill tiles of a matrix product
MOST_PHASES = 64  # of the stride in data_grad, each of which is a launch
# weight_grad: the number of splits is limited by their number and by their partial sums, which should be a fraction of
# the operands.
MOST_SPLITS = 1024
PARTIAL_SUMS = 0.2


def why_not(request: Request) -> str | None:
    """Return a reason unless groups are small, and a block's shared memory and the workspace suffice; else None."""
    geometry = request.geometry
    if not _has_kernels(geometry, request.backend):
        return on_cpu.why_not(request)
    channels, filters = geometry.group_channels, geometry.group_filters
    if channels > (MOST_CHANNELS if geometry.groups > 1 else 1):
        found = f"{geometry.groups} of {channels}"
        return f"it requires groups of at most {MOST_CHANNELS} channels, or one channel, not {found}"
    if request.direction == "data_grad":
        phases = math.prod(map(min, geometry.stride, geometry.input))
        if phases > MOST_PHASES:
            return f"it launches a kernel for each phase of the stride, and {phases} are more than {MOST_PHASES}"
    pairs = channels * filters
    if request.direction == "weight_grad" and pairs > THREADS:
        return f"a block of {THREADS} threads sums all pairs of a channel and a filter in a group, not {pairs}"
    least = least_bytes(request)
    if least > SHARED_MEMORY:
        return f"the inputs of one output need {least} bytes of shared memory, but a block has {SHARED_MEMORY}"
    if request.direction == "weight_grad":
        return request.lacks(4 * pairs * geometry.taps, "the sums of one group")
    return None


def _has_kernels(geometry: Geometry, backend: Backend) -> bool:
    return backend.launch is not None and geometry.rank <= structs.AXES


def nanoseconds(request: Request) -> float:
    """Return the estimated time on NumPy."""
    return on_cpu.nanoseconds(request)


def forward(x: Operand, w: Operand, y: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute ``y[o, q] = sum over t, c of x[o * stride + t * dilation - low, c] w[t, c, q]``, c in the group of q."""
    if _has_kernels(geometry, planner.backend):
        _forward(x, w, y, geometry, planner)
    else:
        on_cpu.forward(x, w, y, geometry, planner)


def data_grad(dy: Operand, w: Operand, dx: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute dx: for each phase of the stride, the forward convolution of dy with the taps that reach it, reversed."""
    if not _has_kernels(geometry, planner.backend):
        on_cpu.data_grad(dy, w, dx, geometry, planner)
        return
    for phase in geometry.phases:
        part = dx.part((..., *phase.inputs, slice(None), slice(None)))
        if phase.geometry is None:
            part.fill(planner)
        else:
            taps = w.view[phase.taps][(slice(None, None, -1),) * geometry.rank].swapaxes(-1, -2)
            _forward(dy, w.part(taps), part, phase.geometry, planner)


def _forward(x: Operand, w: Operand, y: Result, geometry: Geometry, planner: Planner) -> None:
    """Plan launches with one thread block for each box of outputs."""
    axes = Axes.of(geometry)
    lifted, weights = axes.geometry(geometry), w.part(axes.weights(w.view))
    pieces = params.Images([x], [y.view], geometry, planner)

    def some_images(number: int, planner: Planner) -> None:
        (images,), (target,) = pieces.read(number, planner)
        images, target = images.seen(axes.images), axes.images(target)
        stored = stored_dtype(planner.dtype, images, weights)
        layer = layer_of(lifted, (images.view, target), weights.view, (stored, planner.dtype), is_gradient=False)
        block = chosen(layer)
        wide = layer.is_wide or params.is_wide(lifted, target, images.view, weights.view)
        options = params.options(images, weights, layer.innermost, bias=y.bias, activation=y.activation)
        dtypes = images.view.dtype, weights.view.dtype, target.dtype, planner.dtype, stored
        planner.launch(
            Kernel(_module(layer, dtypes, wide), "depthwise_forward"),
            layer.channel_blocks(block) * layer.boxes(block),
            THREADS,
            (
                *(images.view, images.y, weights.view, y.bias, target),
                *params.described(lifted, target, images.view, weights.view, wide),
                _block(layer, block, weights.view, wide),
                _items(block.region, blocks(block.groups * layer.channels, layer.vector), wide),
                _items(layer.strips(block), block.groups * layer.filters // layer.together, wide),
                options.struct(wide),
            ),
            layer.shared_bytes(block),
        )

    planner.loop(range(len(pieces)), some_images)


def weight_grad(dy: Operand, x: Operand, dw: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute ``dw[t, c, q] = sum over outputs o of x[o * stride + t * dilation - low, c] dy[o, q]`` with split-K."""
    if not _has_kernels(geometry, planner.backend):
        on_cpu.weight_grad(dy, x, dw, geometry, planner)
        return
    axes = Axes.of(geometry)
    lifted, weights = axes.geometry(geometry), axes.weights(dw.view)
    pieces = params.Images([dy, x], [], geometry, planner)
    (total,) = planner.workspace(weights.size)

    def some_images(number: int, planner: Planner) -> None:
        (gradients, images), _ = pieces.read(number, planner)
        operands = gradients.seen(axes.images), images.seen(axes.images)
        _add_splits(operands, weights, total, lifted, (number, len(pieces)), planner)

    planner.loop(range(len(pieces)), some_images)


def _add_splits(
    operands: tuple[Operand, Operand],
    weights: View,
    total: View,
    geometry: Geometry,
    chunk: tuple[int, int],
    planner: Planner,
) -> None:
    """Plan the sums of the splits and their total, for one chunk of the images; one launch if there is one split."""
    dy, x = operands
    stored = stored_dtype(planner.dtype, dy, x)
    layer = layer_of(geometry, (x.view, dy.view), weights, (stored, planner.dtype), is_gradient=True)
    block = chosen(layer)
    wide = layer.is_wide or params.is_wide(geometry, dy.view, x.view, weights)
    index = structs.index_dtype(wide).type
    splits = _splits(layer, block, min(planner.budget // 2, params.NARROW) // weights.size - 1)
    length = blocks(layer.boxes(block), splits)
    splits = blocks(layer.boxes(block), length)
    stores_result = splits == chunk[1] == 1
    (partial,) = planner.workspace(1 if stores_result else splits * weights.size)
    dtypes = dy.view.dtype, x.view.dtype, weights.dtype, planner.dtype, stored
    module = _module(layer, dtypes, wide)
    convolution, dy_at, x_at, dw_at = params.described(geometry, dy.view, x.view, weights, wide)
    planner.launch(
        Kernel(module, "depthwise_weight_grad"),
        layer.channel_blocks(block) * blocks(layer.columns, block.columns) * splits,
        THREADS,
        (
            *(dy.view, dy.y, x.view, x.y, partial, weights),
            *(convolution, dy_at, x_at, dw_at, _block(layer, block, weights, wide)),
            _items(block.outputs, blocks(block.groups * layer.filters, layer.vector), wide),
            _items(block.region, blocks(block.groups * layer.channels, layer.vector), wide),
            _items(layer.strips(block), 1, wide),
            *(index(length), index(stores_result), params.options(dy, x, layer.innermost).struct(wide)),
        ),
        layer.shared_bytes(block),
    )
    if not stores_result:
        order = (3, 4, 5, 0, 1, 2) if _has_innermost_taps(weights) else (0, 1, 2, 3, 4, 5)
        split_sum.add_splits(partial, Result(weights), order, planner, (total, chunk[0] > 0))


def _splits(layer: Layer, block: Block, room: int) -> int:
    """Return the number of splits, which depends only on the shapes and on the workspace."""
    sums = 2 * layer.weights * layer.sums  # bytes of a split, which are written and read
    worthwhile = int(PARTIAL_SUMS * layer.operand_bytes / sums)
    wanted = blocks(2 * ENOUGH_BLOCKS, layer.channel_blocks(block) * blocks(layer.columns, block.columns))
    return max(1, min(wanted, layer.boxes(block), MOST_SPLITS, worthwhile, room))


def _module(layer: Layer, dtypes: tuple[numpy.dtype, ...], wide: bool) -> Module:
    constants = {"VECTOR": layer.vector, "CHANNELS": layer.together, "STRIP": layer.strip, "TAPS": layer.taps_together}
    return params.module("depthwise", dtypes, wide, **constants, THREADS=THREADS)


def _items(extents: Shape, channels: int, wide: bool) -> numpy.ndarray:
    """Return the struct of these extents."""
    return structs.struct("Items", wide, [structs.divisor(extent) for extent in (*extents, channels)])


def _block(layer: Layer, block: Block, weights: View, wide: bool) -> numpy.ndarray:
    """Return the struct of a block."""
    numbers = block.images, block.groups, block.columns, *layer.offsets(block), _has_innermost_taps(weights)
    return structs.struct("Block", wide, *numbers, block.outputs, block.region)


def _has_innermost_taps(weights: View) -> bool:
    """Return whether the taps of weights (*kernel, G, C/G, F/G) are closer together in memory than its filters."""
    steps = [abs(step) if size > 1 else 0 for step, size in zip(weights.steps, weights.shape, strict=True)]
    taps, filters = [step for step in steps[: structs.AXES] if step], steps[-1] or steps[-3]
    return min(taps, default=0) < filters
