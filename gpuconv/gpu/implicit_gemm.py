"""Algorithm implicit_gemm: a tiled matrix product whose tiles are gathered on load (kernels/implicit_gemm.cu).

No matrix is stored in memory except the sums of splits of the reduction (split-K), which a second kernel adds in a
fixed order, and copies of images whose elements would be loaded one by one (gemm_packing.py). All directions therefore
give the same bits at every call; in forward and data_grad, the bits of an image do not depend on the other images of
the batch. Half precision, float64 and, if TF32 is permitted, float32 are multiplied on tensor cores.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy

from gpuconv.blocking import largest, pieces
from gpuconv.geometry import Geometry
from gpuconv.gpu import gemm_packing, gemm_windows, params, split_sum, structs
from gpuconv.gpu.gemm_plan import Arrays, Epilogue, GemmPlan, planned
from gpuconv.gpu.gemm_plan import plans as plans  # of which explain lists the tiles
from gpuconv.gpu.kernel import Kernel
from gpuconv.gpu.launch import blocks
from gpuconv.operands import Operand, Result
from gpuconv.plan import Planner
from gpuconv.request import Request
from gpuconv.types import Direction
from gpuconv.views import View

SMALLEST = 32  # rows and columns of the smallest tile


def why_not(request: Request) -> str | None:
    """Return a reason on NumPy, for more than three spatial axes, or if weight_grad lacks workspace; else None."""
    geometry = request.geometry
    if reason := params.why_not_here(geometry, request.backend):
        return reason
    if request.direction != "weight_grad":
        return None
    return request.lacks(2 * geometry.channels * geometry.taps, "the sums of one filter of each group")


def fills_a_tile(geometry: Geometry, direction: Direction) -> bool:
    """Whether one image uses at least half of the smallest tile, or all of its columns.

    The number of images is ignored, so that a single image is computed as it is in a batch.
    """
    rows, columns = geometry.group_channels, geometry.group_filters
    if direction == "weight_grad":
        rows *= geometry.taps
    else:
        extents = geometry.output if direction == "forward" else geometry.input
        rows, columns = math.prod(extents), columns if direction == "forward" else rows
    return columns >= SMALLEST or 2 * min(rows, SMALLEST) * columns >= SMALLEST**2


def forward(x: Operand, w: Operand, y: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute ``y = x w``: a row for each output, a term for each tap and channel."""
    _gather("forward", x, w, y, geometry, planner)


def data_grad(dy: Operand, w: Operand, dx: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute ``dx = dy w'`` for each phase of the stride: a row for each input, a term for each tap reaching it."""
    _gather("data_grad", dy, w, dx, geometry, planner)


def _gather(
    direction: Direction, first: Operand, w: Operand, result: Result, geometry: Geometry, planner: Planner
) -> None:
    """Plan launches with one thread block for each tile of the result."""
    epilogue = Epilogue(result.bias is not None, result.activation)
    arrays = Arrays(direction, geometry, first, w, result.view, planner.dtype, epilogue)
    channels = gemm_packing.packed_channels(arrays, planner.precision, planner.backend.device(), planner.limit)
    chunks = params.Images([first], [result.view], geometry, planner, channels)
    if channels[0]:
        w = w.packed(gemm_packing.packed_weights(direction, w.view, channels[0]), planner)
        geometry = gemm_packing.packed_geometry(direction, geometry, channels[0])

    def some_images(number: int, planner: Planner) -> None:
        (images,), (target,) = chunks.read(number, planner)
        _add_products(arrays._replace(first=images, second=w, geometry=geometry, result=target), result, planner)

    planner.loop(range(len(chunks)), some_images)


def _add_products(arrays: Arrays, result: Result, planner: Planner) -> None:
    """Plan the launches for a chunk of the images: the products and, with split-K, the sums of the splits."""
    direction, geometry, images, w, target, *_ = arrays
    y_x_w = (target, images.view, w.view) if direction == "forward" else (images.view, target, w.view)
    wide = params.is_wide(geometry, *y_x_w)
    room = min(planner.budget // 4, params.NARROW) // target.size
    plan = planned(arrays, planner.precision, planner.backend.device(), wide, room)
    splits, into, sums, bias = plan.choice.splits, target, target, result.bias
    if splits > 1:
        (into,) = planner.workspace(splits * target.size)
        sums, bias = split_sum.partial_sums(into, target), None
    images_at, sums_at = (params.image_strides(view, wide) for view in (images.view, sums))
    w_at = params.weight_strides(w.view if direction == "forward" else w.view.swapaxes(-1, -2), wide)
    tile = plan.choice.tile
    for windows in gemm_windows.launches(direction, geometry, target.shape[0]):
        windows = windows._replace(splits=splits, split_length=plan.length)
        planner.launch(
            Kernel(plan.module, f"implicit_gemm_{direction}"),
            windows.blocks(tile),
            tile.threads,
            (
                *(images.view, images.y, w.view, bias, into),
                *(windows.struct(tile, target.size, wide), images_at, sums_at, w_at),
            ),
            plan.shared_bytes,
        )
    if splits > 1:
        split_sum.add_splits(into, replace(result, view=target), split_sum.memory_order(target), planner)


def weight_grad(dy: Operand, x: Operand, dw: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute ``dw = x' dy`` with split-K: a row for each tap and channel, a term for each output."""

    def some_filters(part: slice, planner: Planner) -> None:
        weights, gradients = dw.view[..., part], dy.of_channels(part)
        (total,) = planner.workspace(weights.size)
        arrays = Arrays("weight_grad", geometry, gradients, x, weights, planner.dtype)
        # Copies take half of the workspace, so the totals and the sums of a split must fit the other half.
        limit = planner.limit if 4 * weights.size <= planner.budget else 0
        channels = gemm_packing.packed_channels(arrays, planner.precision, planner.backend.device(), limit)
        images = params.Images([gradients, x], [], geometry, planner, channels)
        planner.loop(range(len(images)), partial(_add_outputs, images, total, weights, geometry))

    filters = dw.view.shape[-1]
    at_once = largest(filters, planner.budget // 2, dw.view.size // filters)
    planner.loop(list(pieces(filters, at_once)), some_filters)


def _add_outputs(
    pieces: params.Images, total: View, weights: View, geometry: Geometry, number: int, planner: Planner
) -> None:
    """Plan two launches: the sums of the splits, then their total, to which that of earlier images is added."""
    (gradients, images), _ = pieces.read(number, planner)
    y_x_w = gradients.view, images.view, weights
    wide = params.is_wide(geometry, *y_x_w)
    arrays = Arrays("weight_grad", geometry, gradients, images, weights, planner.dtype)
    budget = planner.budget // 2 if pieces.are_copied else planner.budget
    room = max(1, min(budget, params.NARROW) // weights.size - 1)  # one is for the totals
    plan = planned(arrays, planner.precision, planner.backend.device(), wide, room)
    convolution, dy_at, x_at, _ = params.described(geometry, *y_x_w, wide)
    tile, work = plan.choice.tile, plan.problem.work
    tiles = blocks(work.columns, tile.columns), blocks(work.rows, tile.rows), geometry.groups
    (partial,) = planner.workspace(plan.choice.splits * weights.size)
    planner.launch(
        Kernel(plan.module, "implicit_gemm_weight_grad"),
        math.prod(tiles) * plan.choice.splits,
        tile.threads,
        (
            *(gradients.view, gradients.y, images.view, images.y, partial),
            *(convolution, dy_at, x_at, _weight_tiles(tiles, plan, geometry, wide)),
        ),
        plan.shared_bytes,
    )
    order = split_sum.weight_order(geometry.rank)
    split_sum.add_splits(partial, Result(weights), order, planner, (total, number > 0))


def _weight_tiles(tiles: tuple[int, ...], plan: GemmPlan, geometry: Geometry, wide: bool) -> numpy.ndarray:
    """Return the struct that describes the tiles of weight_grad and its splits of the outputs."""
    divisors = map(structs.divisor, (*tiles, geometry.group_channels))
    axes = ([structs.divisor(n) for n in params.lift(extents, 1)] for extents in (geometry.kernel, geometry.output))
    return structs.struct("WeightTiles", wide, *divisors, *axes, plan.choice.splits, plan.length)
