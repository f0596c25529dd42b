"""A performance model of implicit GEMM, by which tiles are ranked.

It counts the clock cycles that the busiest multiprocessor needs for its tiles in each of its units: multiplication,
shared memory, copies of tiles from the L2 cache, and the issue of instructions. The slowest unit determines the time
of the main loop. A multiprocessor with few warps stalls on the latency of its own results, and each block has a
prologue and an epilogue. The numbers of instructions are counted in SASS (``gpuconv kernels --sass``); the rates are
from data sheets and published measurements. Nothing in it has been measured by this project on a GPU. The effects that
it omits (clock rates, hits in caches, how well the units overlap) are similar for all tiles, so it ranks tiles better
than it predicts time.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from gpuconv.gpu import gemm_tiles, occupancy
from gpuconv.gpu.device import Device
from gpuconv.gpu.gemm_tiles import WARP, GemmProblem, GemmTile, Products
from gpuconv.gpu.launch import blocks


class Rates(NamedTuple):
    """What a multiprocessor does in a clock cycle."""

    tensor: dict[int, float]  # fused multiply-adds on tensor cores, by the bytes of an element
    plain: dict[int, float]  # other fused multiply-adds
    l2_bytes: float  # that it reads from the L2 cache if all multiprocessors do
    memory_bytes: float  # that it reads or writes in global memory if all multiprocessors do


# By compute capability; a newer one has the rates of the last before it. From NVIDIA's data sheets, with accumulation
# in float32, which is half as fast on GeForce (8.6, 8.9, 12.0) as on other GPUs. mma.sync reaches 0.63 of the peak of
# 9.0 (arXiv 2501.12084).
_RATES = {
    75: Rates({}, {4: 64, 8: 2}, 17, 5),
    80: Rates({2: 1024, 4: 512, 8: 64}, {4: 64, 8: 32}, 30, 13),
    86: Rates({2: 256, 4: 128, 8: 2}, {4: 128, 8: 2}, 17, 7),
    89: Rates({2: 256, 4: 128, 8: 2}, {4: 128, 8: 2}, 17, 3),
    90: Rates({2: 1290, 4: 645, 8: 128}, {4: 128, 8: 64}, 27, 20),
    120: Rates({2: 256, 4: 128, 8: 2}, {4: 128, 8: 2}, 17, 4),
}
SHARED_BYTES = 128  # that a multiprocessor reads or writes in a clock cycle
ISSUED = 4  # instructions of warps that it issues in a clock cycle
# Instructions of a thread for a vector and for an element that it copies to shared memory, and of an iteration of the
# main loop beside copies, products and loads of their operands.
VECTOR, ELEMENT, ITERATION = 8, 11, 75
CONVERSION = {1: 5, 3: 16}  # instructions that convert an element for one product of TF32, and for the three of tf32x3
PROLOGUE, OUTPUT = 400, 3.5  # instructions of a thread: before the main loop, and for a sum in the epilogue
LATENCY = 800  # clock cycles until the first tile has come from global memory
BARRIER = 30  # clock cycles of the barrier of an iteration, in which other blocks continue
TABLES = 5 << 10  # bytes of static shared memory, approximately
BUSY_WARPS = 2.0  # with this many warps, latency doubles the time
CLOCKS = 1700.0  # in a microsecond
LAUNCH = 3.0  # microseconds


class Clocks(NamedTuple):
    """Clock cycles of a main-loop iteration of one block in each unit of a multiprocessor."""

    products: float
    shared_memory: float
    l2_cache: float
    instructions: float

    @property
    def limit(self) -> str:
        """The name of the slowest unit."""
        return max(zip(self, self._fields, strict=True))[1].replace("_", " ")


def microseconds(problem: GemmProblem, tile: GemmTile, splits: int) -> float:
    """Return the time of a launch, and of the second pass if there are several splits of the depth."""
    work, _, products, device, *_ = problem
    iterations = blocks(work.depth, splits * gemm_tiles.depth(problem, tile))
    tiles = blocks(work.rows, tile.rows) * blocks(work.columns, tile.columns)
    busiest = blocks(tiles * work.groups * work.phases * splits, device.multiprocessors)
    at_once = min(busiest, blocks_at_once(problem, tile))
    waiting = 1 + BUSY_WARPS / (at_once * tile.threads / WARP)
    clocks = busiest * iterations * (max(clocks_of_iteration(problem, tile)) * waiting + BARRIER / at_once)
    clocks += blocks(busiest, at_once) * LATENCY + busiest * _clocks_of_ends(tile, products, device)
    total = clocks / CLOCKS
    if splits > 1:
        sums = work.rows * work.columns * work.groups * work.phases * products.element.itemsize * 2
        total += LAUNCH + splits * sums / (_rates(device).l2_bytes * device.multiprocessors * CLOCKS)
    return total


def clocks_of_iteration(problem: GemmProblem, tile: GemmTile) -> Clocks:
    """Return the clock cycles of a main-loop iteration: one tile of each matrix."""
    products, device, depth = problem.products, problem.device, gemm_tiles.depth(problem, tile)
    size, warps, extent = products.element.itemsize, tile.threads // WARP, tile.rows + tile.columns
    read = warps * (tile.warp_rows + tile.warp_columns)
    issued = warps * (ITERATION + _instructions(products, tile, depth)) + _copies(problem, tile, depth)
    return Clocks(
        products=tile.rows * tile.columns * depth * max(1, products.tensor_products) / _rate(products, device),
        shared_memory=(read + extent) * depth * size / SHARED_BYTES,
        l2_cache=extent * depth * size / _rates(device).l2_bytes,
        instructions=issued / ISSUED,
    )


def _instructions(products: Products, tile: GemmTile, depth: int) -> float:
    """Return the instructions of a warp for the products of an iteration, and to load their operands."""
    size, sums = products.element.itemsize, tile.warp_rows * tile.warp_columns
    if products.tensor_products:
        of_one = 8 * 8 * 4 if size == 8 else 16 * 8 * 32 / size  # multiply-adds of an instruction
        elements = (tile.warp_rows + tile.warp_columns) * depth
        converted = CONVERSION[products.tensor_products] * elements / WARP if size == 4 else 0
        return sums * depth * products.tensor_products / of_one + elements * size / 512 + converted
    lanes = tile.warp_rows / 4 + tile.warp_columns / 8  # rows and columns of a lane, which loads 16 bytes at a time
    return sums * depth / WARP * (4 if products.element.kind == "c" else 1) + lanes * depth * size / 16


def _copies(problem: GemmProblem, tile: GemmTile, depth: int) -> float:
    """Return the instructions of all warps that copy the tiles of an iteration to shared memory."""
    sides = (tile.rows, problem.matrices.left), (tile.columns, problem.matrices.right)
    is_asynchronous = gemm_tiles.loads_asynchronously(problem)
    return sum(
        extent * depth / WARP * (VECTOR / lines.vector if fast else ELEMENT)
        for (extent, lines), fast in zip(sides, is_asynchronous, strict=True)
    )


def copying(moved: int, device: Device) -> float:
    """Return the microseconds of a launch that moves a number of bytes from and to global memory."""
    return LAUNCH + moved / (_rates(device).memory_bytes * device.multiprocessors * CLOCKS)


def _clocks_of_ends(tile: GemmTile, products: Products, device: Device) -> float:
    """Return the clock cycles of the prologue and the epilogue of a block."""
    sums = tile.rows * tile.columns
    instructions = (tile.threads * PROLOGUE + sums * OUTPUT) / WARP / ISSUED
    return instructions + sums * products.element.itemsize / _rates(device).l2_bytes


def is_split_faster(device: Device) -> bool:
    """Whether tf32x3 is faster than float32. On GeForce it is not: tensor cores are less than three times as fast."""
    rates = _rates(device)
    return rates.tensor.get(4, 0) / 3 > rates.plain[4]


def _rates(device: Device) -> Rates:
    return _RATES[max(known for known in _RATES if known <= max(device.capability, 75))]


def _rate(products: Products, device: Device) -> float:
    """Return the multiply-adds of an element type in a clock cycle."""
    size, rates = products.element.itemsize, _rates(device)
    if products.tensor_products:
        return rates.tensor[size]
    return rates.plain[size // 2] / 4 if products.element.kind == "c" else rates.plain[size]


def blocks_at_once(problem: GemmProblem, tile: GemmTile) -> int:
    """Return how many blocks fit a multiprocessor, by an estimate of the registers that the compiler uses."""
    products = problem.products
    sums = tile.rows * tile.columns // tile.threads * max(1, products.element.itemsize // 4)
    registers = min(255, sums * (2 if products.terms else 1) + 100)
    memory = gemm_tiles.shared_bytes(problem, tile) + TABLES
    return occupancy.blocks(_architecture(problem.device.capability), registers, tile.threads, memory)


@cache
def _architecture(capability: int) -> str:
    """Return the newest known architecture up to a compute capability."""
    numbers = {int("".join(filter(str.isdigit, name))): name for name in occupancy.ARCHITECTURES}
    return numbers[max(number for number in numbers if number <= max(capability, min(numbers)))]
