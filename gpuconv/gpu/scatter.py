"""Algorithm scatter: the products of each output gradient are added to the inputs and weights that they belong to.

On a GPU, CUDA kernels (kernels/scatter.cu) use atomic additions, after each block has accumulated in registers and in
shared memory. Blocks run in any order, so the additions have no fixed order. Sums are accumulated in float32 at least:
float16 and bfloat16 results are rounded once, from a workspace.

On NumPy, and in the forward direction, it computes tap by tap with strided slices (gpuconv/cpu/slices.py), in a fixed
order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import numpy

from gpuconv import dtypes
from gpuconv.arguments import Shape
from gpuconv.blocking import Blocks, Buffer, Buffers, channels_innermost, largest, pieces
from gpuconv.cpu import slices
from gpuconv.geometry import Geometry
from gpuconv.gpu import params, structs
from gpuconv.gpu.kernel import Kernel
from gpuconv.gpu.launch import blocks
from gpuconv.operands import Operand, Result, in_place
from gpuconv.plan import Planner
from gpuconv.request import Request
from gpuconv.views import View

THREADS = 128
SHARED_MEMORY = 48 << 10  # bytes of a block without opt-in
PAD = 4  # padding of the rows of a tile, as in scatter.cu
# weight_grad: enough blocks to fill a large GPU, unless their splits would have fewer than this many chunks of outputs.
MOST_BLOCKS = 1024
FEWEST_CHUNKS = 8


class ScatterTile(NamedTuple):
    """Compile-time constants of scatter.cu."""

    WIDTH: int  # channels (data_grad) or filters (weight_grad) of a tile
    ROW: int  # elements from one position of data_grad's region to the next, chosen to reduce bank conflicts
    TILE_OUTPUTS: int
    CHUNK: int  # filters that data_grad loads at a time
    TILE_ROWS: int  # taps times channels
    DEPTH: int  # outputs that weight_grad loads at a time
    THREADS: int = THREADS


ONE, FEW, MANY = (
    ScatterTile(1, 1, 256, 8, 16, 64),
    ScatterTile(4, 4, 256, 8, 64, 32),
    ScatterTile(32, 36, 64, 16, 64, 16),
)


def tile_for(channels: int, itemsize: int) -> ScatterTile:
    """Return the tile for this many channels of a group; the widest one does not fit with elements of 16 bytes."""
    if channels == 1:
        return ONE
    return FEW if channels <= 8 or itemsize > 8 else MANY


def why_not(request: Request) -> str | None:
    """Return the reason why the algorithm is not applicable, or None.

    On a GPU the additions have no fixed order, kernels take one to three axes, and half precision needs workspace.
    """
    geometry = request.geometry
    if request.backend.launch is None:
        return slices.why_not(request)
    if request.deterministic:
        return "its additions have no fixed order on a GPU, but deterministic=True requires one"
    if reason := params.why_not(geometry):
        return reason
    if request.direction == "forward":
        return slices.why_not(request)
    if request.dtype == dtypes.accumulator(request.dtype):
        return None  # sums are formed in the result's own memory
    if request.direction == "data_grad":
        image = 2 * geometry.groups * math.prod(geometry.input)  # with a temporary for an activation
        return request.lacks(image, "the sums of one image and one channel of each group")
    return request.lacks(geometry.channels * geometry.taps, "the sums of one filter of each group")


def nanoseconds(request: Request) -> float:
    """Return the estimated time on NumPy."""
    return slices.nanoseconds(request)


def forward(x: Operand, w: Operand, y: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute y by adding the products of x with each tap of w."""
    slices.forward(x, w, y, geometry, planner)


def data_grad(dy: Operand, w: Operand, dx: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute dx by adding each product of dy and w to the input that it belongs to."""
    if planner.backend.launch is None:
        slices.data_grad(dy, w, dx, geometry, planner)
    else:
        add_to_images(_launch_data_grad, dy, w, dx, geometry, planner)


def weight_grad(dy: Operand, x: Operand, dw: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute dw by adding each product of dy and x to the weight that it belongs to."""
    if planner.backend.launch is None:
        slices.weight_grad(dy, x, dw, geometry, planner)
    else:
        add_to_weights(_launch_weight_grad, dy, x, dw, geometry, planner)


def add_to_images(
    launch: Callable[..., None], dy: Operand, w: Operand, dx: Result, geometry: Geometry, planner: Planner
) -> None:
    """Plan launches that add to zeros: dx itself, or a workspace for some images and channels at a time."""
    pieces_of_images = params.Images([dy], [dx.view], geometry, planner)

    def some_images(number: int, planner: Planner) -> None:
        (gradients,), (target,) = pieces_of_images.read(number, planner)
        if in_place(target, planner.dtype):
            planner.copy(target, 0)
            launch(gradients, w, target, geometry, planner)
            _finish(dx, target, planner)
            return
        images, *extent, groups, channels = target.shape
        each = math.prod(extent) * groups * (1 + dx.temporaries)
        at_once = largest(channels, planner.budget // 2, each)
        size = largest(images, planner.budget // 2, each * at_once)
        (space,) = planner.workspace(size * math.prod(extent) * groups * at_once)

        def some_channels(task: tuple[slice, slice], planner: Planner) -> None:
            some, part = task
            place = target[some][..., part]
            sums = _like(place, space)
            planner.copy(sums, 0)
            launch(gradients.of_images(some), w.part(w.view[..., part, :]), sums, geometry, planner)
            dx.store(sums, place, planner, part)

        planner.loop(list(product(pieces(images, size), pieces(channels, at_once))), some_channels)

    planner.loop(range(len(pieces_of_images)), some_images)


def _finish(result: Result, target: View, planner: Planner) -> None:
    """Plan bias and activation in blocks, since the temporaries of a whole array may not fit the workspace."""

    def buffers_of(box: Shape) -> Buffers:
        return [Buffer(math.prod((*box, *target.shape[-2:])), False, result.temporaries)]

    blocks = Blocks.fitting(target.shape[:-2], planner.budget, buffers_of)
    planner.loop(blocks, lambda index, planner: result.finish(target[index], planner))


def _like(view: View, space: View) -> View:
    """Return workspace in the shape of the view, with the channels innermost if the view has them so."""
    if channels_innermost(view):
        return space.shaped(view.shape)
    images, *extent, groups, channels = view.shape
    first = space.shaped((images, groups, channels, *extent))
    return first.transpose(0, *range(3, first.ndim), 1, 2)


def add_to_weights(
    launch: Callable[..., None], dy: Operand, x: Operand, dw: Result, geometry: Geometry, planner: Planner
) -> None:
    """Plan launches that add to zeros: dw itself, or a workspace for some filters at a time."""
    filters = dw.view.shape[-1]
    per_filter = dw.view.size // filters
    summed = not in_place(dw.view, planner.dtype)
    at_once = largest(filters, planner.budget // 2, per_filter) if summed else filters

    def some_filters(part: slice, planner: Planner) -> None:
        (space,) = planner.workspace(per_filter * at_once * summed)
        place = dw.view[..., part]
        sums = space.shaped(place.shape) if summed else place
        planner.copy(sums, 0)
        pieces_of_images = params.Images([dy.of_channels(part), x], [], geometry, planner)

        def some_images(number: int, planner: Planner) -> None:
            (gradients, images), _ = pieces_of_images.read(number, planner)
            launch(gradients, images, sums, geometry, planner)

        planner.loop(range(len(pieces_of_images)), some_images)
        if summed:
            planner.copy(place, sums)

    planner.loop(list(pieces(filters, at_once)), some_filters)


def _launch_data_grad(dy: Operand, w: Operand, sums: View, geometry: Geometry, planner: Planner) -> None:
    y_x_w = dy.view, sums, w.view
    wide = params.is_wide(geometry, *y_x_w)
    images, *_, groups, channels = sums.shape
    tile = tile_for(channels, planner.dtype.itemsize)
    box = _boxes(geometry, tile, planner.dtype.itemsize, wide)
    tiles = blocks(channels, tile.WIDTH)
    for extents, sizes in ((geometry.output, box.outputs), (geometry.kernel, box.taps)):
        tiles *= math.prod(map(blocks, params.lift(extents, 1), sizes))
    options = params.options(dy, w, channels_innermost(dy.view), fours=_in_fours(sums, channels))
    module = params.module("scatter", (dy.view.dtype, w.view.dtype, sums.dtype, planner.dtype), wide, **tile._asdict())
    planner.launch(
        Kernel(module, "scatter_data_grad"),
        images * groups * tiles,
        THREADS,
        (
            *(dy.view, dy.y, w.view, sums),
            *params.described(geometry, *y_x_w, wide),
            structs.struct("Boxes", wide, *box),
            options.struct(wide),
        ),
        math.prod(box.region) * tile.ROW * planner.dtype.itemsize,
    )


def _launch_weight_grad(dy: Operand, x: Operand, sums: View, geometry: Geometry, planner: Planner) -> None:
    y_x_w = dy.view, x.view, sums
    wide = params.is_wide(geometry, *y_x_w)
    *kernel, groups, channels, filters = sums.shape
    tile = tile_for(filters, planner.dtype.itemsize)
    tiles = groups * blocks(math.prod(kernel) * channels, tile.TILE_ROWS) * blocks(filters, tile.WIDTH)
    outputs = x.view.shape[0] * math.prod(geometry.output)
    wanted = min(blocks(MOST_BLOCKS, tiles), blocks(outputs, FEWEST_CHUNKS * tile.DEPTH))
    length = blocks(outputs, wanted * tile.DEPTH) * tile.DEPTH
    splits = blocks(outputs, length)
    index = structs.index_dtype(wide).type
    options = params.options(dy, x, channels_innermost(x.view), fours=_in_fours(sums, filters))
    module = params.module("scatter", (dy.view.dtype, x.view.dtype, sums.dtype, planner.dtype), wide, **tile._asdict())
    planner.launch(
        Kernel(module, "scatter_weight_grad"),
        tiles * splits,
        THREADS,
        (
            *(dy.view, dy.y, x.view, x.y, sums),
            *params.described(geometry, *y_x_w, wide),
            *(index(splits), index(length), options.struct(wide)),
        ),
    )


def _in_fours(sums: View, channels: int) -> bool:
    """Whether additions can be vectorized by 4: only for float32, with channels contiguous and aligned to 16 bytes."""
    return bool(
        sums.dtype == numpy.float32
        and channels % 4 == 0
        and sums.strides[-1] == 4
        and sums.address == 0
        and all(step % 16 == 0 for step, size in zip(sums.strides[:-1], sums.shape[:-1], strict=True) if size > 1)
    )


class Boxes(NamedTuple):
    """The extents of the outputs and taps of a block, and of the region of x that they reach."""

    outputs: Shape
    taps: Shape
    region: Shape


@lru_cache(maxsize=1024)
def _boxes(geometry: Geometry, tile: ScatterTile, itemsize: int, wide: bool) -> Boxes:
    """Return the box with the most outputs per block whose region fits shared memory; on a tie, the smallest region.

    If not even the region of one output fits, as with a large dilation, a block computes fewer taps.
    """
    index = structs.index_dtype(wide).itemsize
    tiles = tile.CHUNK * (tile.TILE_OUTPUTS + 2 * PAD + tile.WIDTH) * itemsize + tile.TILE_OUTPUTS * (index + 4) + 64
    positions = (SHARED_MEMORY - tiles) // (tile.ROW * itemsize)
    output, taps = (list(params.lift(extents, 1)) for extents in (geometry.output, geometry.kernel))
    stride, dilation = (params.lift(steps, 1) for steps in (geometry.stride, geometry.dilation))

    def region(outputs: Any) -> Shape:
        axes = zip(outputs, stride, taps, dilation, strict=True)
        return tuple((m - 1) * s + (k - 1) * d + 1 for m, s, k, d in axes)

    while math.prod(region((1, 1, 1))) > positions:
        axis = max(range(structs.AXES), key=lambda axis: (taps[axis] - 1) * dilation[axis])
        taps[axis] = -(-taps[axis] // 2)
    candidates = (
        (m, p, q)
        for m, p in product(_sizes(output[0], tile.TILE_OUTPUTS), _sizes(output[1], tile.TILE_OUTPUTS))
        for q in _sizes(output[2], tile.TILE_OUTPUTS // (m * p))
    )
    fitting = (box for box in candidates if math.prod(region(box)) <= positions)
    outputs = max(fitting, key=lambda box: (_use(box, output), -math.prod(region(box))))
    return Boxes(outputs, tuple(taps), region(outputs))


def _sizes(extent: int, most: int) -> list[int]:
    """Return the sizes to try: for each number of pieces of the extent, the smallest size that gives it."""
    sizes = {blocks(extent, blocks(extent, size)) for size in range(1, min(extent, most) + 1)}
    return [size for size in sorted(sizes) if size <= most]


def _use(box: Shape, output: Any) -> float:
    """Return the average number of outputs of a block; blocks at the end of an axis may have fewer."""
    return float(math.prod(n / blocks(n, m) for n, m in zip(output, box, strict=True)))
