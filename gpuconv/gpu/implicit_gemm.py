"""Algorithm implicit_gemm: a tiled matrix product whose tiles are gathered on load (kernels/implicit_gemm.cu).

No matrix is stored in memory except the sums of weight_grad's splits of the outputs (split-K), which a second kernel
adds in a fixed order. All directions therefore give the same bits at every call; in forward and data_grad, the bits of
an image do not depend on the other images of the batch. Half precision, float64 and, if TF32 is permitted, float32 are
multiplied on tensor cores.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import numpy

from gpuconv import dtypes
from gpuconv.blocking import largest, pieces
from gpuconv.geometry import DIRECTIONS, Geometry
from gpuconv.gpu import gemm_packing, gemm_tiles, gemm_windows, params, structs
from gpuconv.gpu.device import Device
from gpuconv.gpu.gemm_layout import matrices_of
from gpuconv.gpu.gemm_tiles import GemmProblem, GemmTile, Products, TileChoice, Work
from gpuconv.gpu.kernel import Kernel, Module
from gpuconv.gpu.launch import blocks
from gpuconv.operands import ROLES, Operand, Result, contiguous
from gpuconv.plan import Planner
from gpuconv.request import Request
from gpuconv.types import Activation, Direction
from gpuconv.views import View, contiguous_strides

SMALLEST = 32  # rows and columns of the smallest tile
FEWEST_ITERATIONS = 4  # main-loop iterations of a split, below which it is not profitable


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
    channels, _ = _packed_channels(Arrays(direction, geometry, first, w, result.view, planner.dtype), planner)
    chunks = params.Images([first], [result.view], geometry, planner, [channels])
    if channels:
        geometry = gemm_packing.packed_geometry(direction, geometry, channels)
        *kernel, groups, _, filters = w.view.shape
        sizes = (channels, filters) if direction == "forward" else (w.view.shape[-2], channels)
        w = gemm_packing.packed(w, (*kernel, groups, *sizes), planner)

    def some_images(number: int, planner: Planner) -> None:
        (images,), (target,) = chunks.read(number, planner)
        y_x_w = (target, images.view, w.view) if direction == "forward" else (images.view, target, w.view)
        wide = params.is_wide(geometry, *y_x_w)
        epilogue = Epilogue(result.bias is not None, result.activation)
        arrays = Arrays(direction, geometry, images, w, target, planner.dtype, epilogue)
        plan = planned(arrays, planner.precision, planner.backend.device(), wide)
        _, y_at, x_at, _ = params.described(geometry, *y_x_w, wide)
        w_at = params.weight_strides(w.view if direction == "forward" else w.view.swapaxes(-1, -2), wide)
        tile = plan.choice.tile
        for windows in gemm_windows.launches(direction, geometry, target.shape[0]):
            planner.launch(
                Kernel(plan.module, f"implicit_gemm_{direction}"),
                windows.blocks(tile),
                tile.threads,
                (
                    *(images.view, images.y, w.view, result.bias, target),
                    *(windows.struct(tile, wide), y_at, x_at, w_at),
                ),
                plan.shared_bytes,
            )

    planner.loop(range(len(chunks)), some_images)


def weight_grad(dy: Operand, x: Operand, dw: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute ``dw = x' dy`` with split-K: a row for each tap and channel, a term for each output."""

    def some_filters(part: slice, planner: Planner) -> None:
        weights, gradients = dw.view[..., part], dy.of_channels(part)
        (total,) = planner.workspace(weights.size)
        arrays = Arrays("weight_grad", geometry, gradients, x, weights, planner.dtype)
        images = params.Images([gradients, x], [], geometry, planner, _packed_channels(arrays, planner))
        planner.loop(range(len(images)), partial(_add_splits, images, total, weights, geometry))

    filters = dw.view.shape[-1]
    at_once = largest(filters, planner.budget // 2, dw.view.size // filters)
    planner.loop(list(pieces(filters, at_once)), some_filters)


def _add_splits(
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
    convolution, dy_at, x_at, dw_at = params.described(geometry, *y_x_w, wide)
    index, threads = structs.index_dtype(wide).type, plan.choice.tile.threads
    tiles = _weight_tiles(plan, geometry, weights.shape[-1], wide)
    (partial,) = planner.workspace(plan.choice.splits * weights.size)
    planner.launch(
        Kernel(plan.module, "implicit_gemm_weight_grad"),
        plan.blocks,
        threads,
        (gradients.view, gradients.y, images.view, images.y, partial, convolution, dy_at, x_at, tiles),
        plan.shared_bytes,
    )
    planner.launch(
        Kernel(plan.module, "implicit_gemm_weight_grad_sum"),
        blocks(weights.size, threads),
        threads,
        (partial, total, weights, tiles, dw_at, index(weights.size), index(number > 0)),
    )


def _weight_tiles(plan: GemmPlan, geometry: Geometry, filters: int, wide: bool) -> numpy.ndarray:
    """Return the struct that describes the tiles of weight_grad and its splits of the outputs."""
    tile, work = plan.choice.tile, plan.problem.work
    counts = blocks(work.columns, tile.columns), blocks(work.rows, tile.rows), geometry.groups
    divisors = map(structs.divisor, (*counts, geometry.group_channels, filters))
    axes = ([structs.divisor(n) for n in params.lift(extents, 1)] for extents in (geometry.kernel, geometry.output))
    return structs.struct("WeightTiles", wide, *divisors, *axes, plan.choice.splits, plan.length)


def plans(
    geometry: Geometry,
    dtype: numpy.dtype,
    direction: Direction,
    device: Device,
    precision: str = "ieee",
    limit: int = 64 << 20,
) -> list[GemmPlan]:
    """Return the plans for contiguous arrays, one for each tile; the first one is the one that is used."""
    first, second, result = (contiguous(role, dtype, geometry) for role in ROLES[direction])
    sums = dtypes.accumulator(dtype)
    room = limit // (sums.itemsize * math.prod(result.shape)) - 1
    arrays = Arrays(direction, geometry, Operand(first), Operand(second), result, sums)
    problem = _problem(arrays, precision, device, room)
    return [_made(arrays, problem, choice, wide=False) for choice in gemm_tiles.ranked(problem)]


# ------------------------------------------------------------------------------------------------- plans


class Epilogue(NamedTuple):
    """What is applied to the sums before they are stored."""

    has_bias: bool = False
    activation: Activation | None = None


class Arrays(NamedTuple):
    """A direction of a convolution, the memory layout of its arrays, and the epilogue."""

    direction: Direction
    geometry: Geometry
    first: Operand
    second: Operand
    result: View
    sums: numpy.dtype
    epilogue: Epilogue = Epilogue()


class GemmPlan(NamedTuple):
    """The launch parameters, which depend only on shapes and memory layouts."""

    problem: GemmProblem
    choice: TileChoice
    module: Module
    blocks: int
    shared_bytes: int
    length: int  # outputs of a split of weight_grad

    @property
    def kernels(self) -> dict[str, int]:
        """The kernels that are launched, with the bytes of their dynamic shared memory."""
        direction = DIRECTIONS[dict(self.module.constants)["DIRECTION"]]
        found = {f"implicit_gemm_{direction}": self.shared_bytes}
        if direction == "weight_grad":
            found["implicit_gemm_weight_grad_sum"] = 0
        return found


def planned(arrays: Arrays, precision: str, device: Device, wide: bool, room: int = 0) -> GemmPlan:
    """Return the plan to use; ``room`` is the number of splits for whose sums there is workspace."""
    problem = _problem(arrays, precision, device, room)
    return _made(arrays, problem, gemm_tiles.chosen(problem), wide)


def _made(arrays: Arrays, problem: GemmProblem, choice: TileChoice, wide: bool) -> GemmPlan:
    work, _, products, *_ = problem
    row_tiles, length = blocks(work.rows, choice.tile.rows), 0
    if arrays.direction == "weight_grad":
        length = blocks(work.depth, choice.splits * products.depth) * products.depth
        choice = choice._replace(splits=blocks(work.depth, length))
    tiles = row_tiles * blocks(work.columns, choice.tile.columns)
    return GemmPlan(
        problem,
        choice,
        _module(arrays, problem, choice.tile, wide),
        tiles * work.groups * work.phases * choice.splits,
        gemm_tiles.shared_bytes(problem, choice.tile),
        length,
    )


def _problem(arrays: Arrays, precision: str, device: Device, room: int) -> GemmProblem:
    direction, geometry, first, second, result, sums, _ = arrays
    if direction == "weight_grad":
        left, right, result = second, first, View(0, 0, result.shape, contiguous_strides(result.shape, sums), sums)
    else:
        left, right = first, second
    work = _work(direction, geometry, first.view.shape[0], result)
    longest = work.depth if direction == "weight_grad" else geometry.reduction_length(direction)
    products = _products(left, right, longest, sums, precision, device)
    matrices = matrices_of(direction, geometry, first.view, second.view, result)
    if not left.is_plain(products.element):
        matrices = matrices._replace(left=matrices.left._replace(vector=0))
    if not right.is_plain(products.element):
        matrices = matrices._replace(right=matrices.right._replace(vector=0))
    if direction != "weight_grad":
        return GemmProblem(work, matrices, products, device, most_splits=1)
    most = max(1, min(room, work.depth // (FEWEST_ITERATIONS * products.depth)))
    enough = blocks(work.depth, gemm_tiles.TENSOR_TERMS)  # splits with which no accumulator has to be flushed
    if products.terms != gemm_tiles.TENSOR_TERMS or enough > most:
        return GemmProblem(work, matrices, products, device, most)
    return GemmProblem(work, matrices, products._replace(terms=0), device, most, enough)


def _work(direction: Direction, geometry: Geometry, images: int, result: View) -> Work:
    if direction == "weight_grad":
        *kernel, groups, channels, filters = result.shape
        return Work(math.prod(kernel) * channels, filters, groups, images * math.prod(geometry.output))
    groups, columns = result.shape[-2:]
    if direction == "forward":
        return Work(images * math.prod(geometry.output), columns, groups, geometry.reduction_length(direction))
    longest = math.prod(blocks(n, s) for n, s in zip(geometry.input, geometry.stride, strict=True))
    phases = math.prod(map(min, geometry.input, geometry.stride))
    # Each tap belongs to one phase.
    return Work(images * longest, columns, groups, blocks(geometry.taps * geometry.group_filters, phases), phases)


def _packed_channels(arrays: Arrays, planner: Planner) -> tuple[int, int]:
    """Return the number of channels of packed copies of the images among the operands, 0 for no copy.

    Only products on tensor cores are fast enough to wait for loads of single elements.
    """
    axes = len(arrays.geometry.batch)

    def one_image(view: View) -> View:
        return view[(0,) * axes].reshape(1, *view.shape[axes:])

    first, second, result = arrays.first.seen(one_image), arrays.second, arrays.result
    if arrays.direction == "weight_grad":
        second = second.seen(one_image)
    else:
        result = one_image(result)
    alone = arrays._replace(first=first, second=second, result=result)
    problem = _problem(alone, planner.precision, planner.backend.device(), room=1)
    if not problem.products.tensor_products:
        return 0, 0
    left_loads, right_loads = gemm_packing.loads(arrays.direction, arrays.geometry)
    left, right = problem.matrices.left, problem.matrices.right
    if arrays.direction == "weight_grad":
        found = (
            gemm_packing.packed_channels(first.view, right, right_loads, pads=False),
            gemm_packing.packed_channels(second.view, left, left_loads, pads=False),
        )
        sizes = [view.size // view.shape[-1] * n for view, n in zip((first.view, second.view), found, strict=True)]
        sizes = [sum(sizes)]
    else:
        found = gemm_packing.packed_channels(first.view, left, left_loads, pads=True), 0
        sizes = [view.size // first.view.shape[-1] * found[0] for view in (first.view, second.view)]
    fits = all(size * first.view.itemsize <= planner.limit // 2 for size in sizes)
    return found if fits else (0, 0)


def _products(
    first: Operand, second: Operand, depth: int, sums: numpy.dtype, precision: str, device: Device
) -> Products:
    """Return how to multiply: on tensor cores if they lose no accuracy, or only as much as the precision permits."""
    tensor_products, element = 0, sums
    if device.capability >= 80:
        halves = first.view.dtype == second.view.dtype != dtypes.accumulator(first.view.dtype)
        # The derivative of ReLU is 0 or 1. A product with any other derivative would be rounded to half precision.
        exact = {first.activation, second.activation} <= {None, "relu"}
        if halves and exact:
            tensor_products, element = 1, first.view.dtype
        elif sums == numpy.float32 and precision == "tf32":
            tensor_products = 1
        elif sums == numpy.float32 and precision == "tf32x3" and gemm_tiles.is_split_faster(device):
            tensor_products = 3
        elif sums == numpy.float64:
            tensor_products = 1
    if tensor_products and element.itemsize < 8:
        most = gemm_tiles.SPLIT_TERMS if tensor_products == 3 else gemm_tiles.TENSOR_TERMS
        return Products(element, tensor_products, most * (depth > most))
    return Products(element, tensor_products, gemm_tiles.PLAIN_TERMS)


def _module(arrays: Arrays, problem: GemmProblem, tile: GemmTile, wide: bool) -> Module:
    _, matrices, products, *_ = problem
    constants = {
        "DIRECTION": DIRECTIONS.index(arrays.direction),
        "TILE_ROWS": tile.rows,
        "TILE_COLUMNS": tile.columns,
        "WARP_ROWS": tile.warp_rows,
        "WARP_COLUMNS": tile.warp_columns,
        "DEPTH": products.depth,
        "STAGES": gemm_tiles.stages(problem),
        "TERMS": products.terms,
        "TENSOR_PRODUCTS": products.tensor_products,
        "LEFT_ALONG_DEPTH": int(matrices.left.along_depth),
        "LEFT_VECTOR": matrices.left.vector,
        "RIGHT_ALONG_DEPTH": int(matrices.right.along_depth),
        "RIGHT_VECTOR": matrices.right.vector,
        "RESULT_ALONG_ROWS": int(matrices.result_along_rows),
        "RESULT_VECTOR": matrices.result_vector,
        "AXES": matrices.axes,
        "TAPS_INNERMOST": int(matrices.taps_innermost),
        "THREADS": tile.threads,
        **_conversions(arrays),
    }
    of_arrays = arrays.first.view.dtype, arrays.second.view.dtype, arrays.result.dtype
    return params.module("implicit_gemm", (*of_arrays, arrays.sums, products.element), wide, **constants)


def _conversions(arrays: Arrays) -> dict[str, int]:
    """Return the constants of the epilogue and of the conversion of operands."""
    first, second, (has_bias, activation) = arrays.first, arrays.second, arrays.epilogue
    return {
        "HAS_BIAS": int(has_bias),
        "ACTIVATION": params.number(activation),
        "FIRST_CONJUGATED": int(first.conjugate),
        "FIRST_DERIVATIVE": params.number(first.activation),
        "SECOND_CONJUGATED": int(second.conjugate),
        "SECOND_DERIVATIVE": params.number(second.activation),
    }
