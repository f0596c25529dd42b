"""Plans of implicit GEMM: the matrices, products, tile and compile-time constants of a convolution."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy

from gpuconv import dtypes
from gpuconv.geometry import DIRECTIONS, Geometry
from gpuconv.gpu import gemm_choice, gemm_model, gemm_tiles, params
from gpuconv.gpu.device import Device
from gpuconv.gpu.gemm_choice import TileChoice
from gpuconv.gpu.gemm_layout import matrices_of
from gpuconv.gpu.gemm_tiles import GemmProblem, GemmTile, Products, Work
from gpuconv.gpu.kernel import Module
from gpuconv.gpu.launch import blocks
from gpuconv.gpu.split_sum import partial_sums
from gpuconv.operands import ROLES, Operand, contiguous
from gpuconv.types import Activation, Direction
from gpuconv.views import View, contiguous_strides

FEWEST_ITERATIONS = 4  # main-loop iterations of a split of weight_grad, below which it is not profitable
MOST_SPLITS = 64  # of forward and data_grad
TERMS_OF_SPLIT = 512  # of a split of forward and data_grad on tensor cores
SMALL_TILE = 64  # rows and columns of a tile


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
    shared_bytes: int
    length: int  # steps of a split of the depth; 0 in forward and data_grad if there is one

    @property
    def kernels(self) -> dict[str, int]:
        """The kernels that are launched, with the bytes of their dynamic shared memory."""
        direction = DIRECTIONS[dict(self.module.constants)["DIRECTION"]]
        return {f"implicit_gemm_{direction}": self.shared_bytes}


def plans(
    geometry: Geometry,
    dtype: numpy.dtype,
    direction: Direction,
    device: Device,
    precision: str = "ieee",
    limit: int = 64 << 20,
) -> list[GemmPlan]:
    """Return the plans for contiguous arrays: the one that is used, and then one for each other tile."""
    first, second, result = (contiguous(role, dtype, geometry) for role in ROLES[direction])
    sums = dtypes.accumulator(dtype)
    room = limit // (sums.itemsize * math.prod(result.shape)) - 1
    arrays = Arrays(direction, geometry, Operand(first), Operand(second), result, sums)
    used, problem = planned(arrays, precision, device, False, room), problem_of(arrays, precision, device, room)
    others = (choice for choice in gemm_choice.ranked(problem) if choice != used.choice)
    return [used, *(_made(arrays, problem, choice, wide=False) for choice in others)]


def planned(arrays: Arrays, precision: str, device: Device, wide: bool, room: int) -> GemmPlan:
    """Return the plan to use; ``room`` is the number of splits for whose sums there is workspace."""
    problem = problem_of(arrays, precision, device, room)
    choice = gemm_choice.chosen(problem)
    splits = 1 if arrays.direction == "weight_grad" else _splits(arrays, problem)
    if 1 < splits <= min(room, MOST_SPLITS):
        space = View(0, 0, (arrays.result.size,), (arrays.sums.itemsize,), arrays.sums)
        partial = arrays._replace(result=partial_sums(space, arrays.result), epilogue=Epilogue())
        divided = problem_of(partial, precision, device, room)._replace(most_splits=splits, least_splits=splits)
        faster = gemm_choice.chosen(divided)
        if faster.microseconds < choice.microseconds:
            return _made(partial, divided, faster, wide)
    return _made(arrays, problem, choice, wide)


def _splits(arrays: Arrays, problem: GemmProblem) -> int:
    """Return the number of splits of forward or data_grad in which no accumulator is flushed.

    Adding these splits in order is what a block does that computes them all. So the bits of a result do not depend on
    whether there are splits, and this may depend on the number of images.
    """
    terms = problem.products.terms
    return blocks(_longest(arrays.direction, arrays.geometry), terms) if terms else 1


def _longest(direction: Direction, geometry: Geometry) -> int:
    """Return the length of the longest sum of forward or data_grad."""
    if direction == "forward":
        return geometry.reduction_length(direction)
    taps = (max(phase.reaching for phase in geometry.axis_phases(axis)) for axis in range(geometry.rank))
    return math.prod(taps) * geometry.group_filters


def _made(arrays: Arrays, problem: GemmProblem, choice: TileChoice, wide: bool) -> GemmPlan:
    work, length = problem.work, problem.products.terms if choice.splits > 1 else 0
    if arrays.direction == "weight_grad":
        depth = gemm_tiles.depth(problem, choice.tile)
        length = blocks(work.depth, choice.splits * depth) * depth
        choice = choice._replace(splits=blocks(work.depth, length))
    return GemmPlan(
        problem,
        choice,
        _module(arrays, problem, choice.tile, wide),
        gemm_tiles.shared_bytes(problem, choice.tile),
        length,
    )


def problem_of(arrays: Arrays, precision: str, device: Device, room: int) -> GemmProblem:
    """Return everything by which a tile is selected; ``room`` is the number of splits whose sums fit the workspace."""
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
        images = max(1, first.view.shape[0])
        if products.tensor_products and products.element.itemsize < 8 and not _fills(work, images, device):
            products = products._replace(terms=TERMS_OF_SPLIT * (_longest(direction, geometry) > TERMS_OF_SPLIT))
        return GemmProblem(work, matrices, products, device, most_splits=1)
    most = max(1, min(room, work.depth // (FEWEST_ITERATIONS * products.depth)))
    enough = blocks(work.depth, gemm_tiles.TENSOR_TERMS)  # splits with which no accumulator has to be flushed
    if products.terms != gemm_tiles.TENSOR_TERMS or enough > most:
        return GemmProblem(work, matrices, products, device, most)
    return GemmProblem(work, matrices, products._replace(terms=0), device, most, enough)


def _fills(work: Work, images: int, device: Device) -> bool:
    """Return whether one image has a tile for every eighth multiprocessor, and so needs no splits of the depth."""
    tiles = blocks(work.rows // images, SMALL_TILE) * blocks(work.columns, SMALL_TILE)
    return 8 * tiles * work.groups * work.phases >= device.multiprocessors


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
        elif sums == numpy.float32 and precision == "tf32x3" and gemm_model.is_split_faster(device):
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
        "DEPTH": gemm_tiles.depth(problem, tile),
        "STAGES": gemm_tiles.stages(problem, tile),
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
        **_conversions(arrays),
        "THREADS": tile.threads,
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
