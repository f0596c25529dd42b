"""Tiles of implicit GEMM, and the performance model that selects the fastest one for a convolution.

The model counts the clock cycles that the busiest multiprocessor needs for its tiles in each of its units:
multiplication, reads of shared memory, copies of tiles from the L2 cache, and instructions that compute addresses of
elements. The slowest unit determines the time. A multiprocessor with few warps stalls on the latency of its own
results, and each block has a prologue and an epilogue without multiplications. The effects that the model omits (clock
rates, caches, how well the units overlap) are the same for all tiles of a kind. The model therefore ranks tiles, but
does not predict speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy

from gpuconv.gpu import gemm_table, occupancy
from gpuconv.gpu.device import Device
from gpuconv.gpu.gemm_layout import BYTES, GemmMatrices
from gpuconv.gpu.launch import blocks

WARP = 32
# The number of terms after which an accumulator is flushed to a total.
TENSOR_TERMS = 4096  # tensor cores truncate during accumulation
SPLIT_TERMS = 512  # tf32x3 computes three products for one
PLAIN_TERMS = 128  # sums of equal terms, whose rounding errors have one sign, stay within the bound of a direct sum
ASYNCHRONOUS_STAGES, STAGES = 4, 2


class GemmTile(NamedTuple):
    """The tile of a thread block, and the part of it that each warp computes."""

    rows: int
    columns: int
    warp_rows: int
    warp_columns: int

    @property
    def threads(self) -> int:
        return WARP * (self.rows // self.warp_rows) * (self.columns // self.warp_columns)


class Products(NamedTuple):
    """How a block multiplies: dtype of its tiles, and tensor-core products for each product (0: no tensor cores)."""

    element: numpy.dtype
    tensor_products: int
    terms: int  # after which an accumulator is flushed to a total; 0: never

    @property
    def depth(self) -> int:
        """The extent of a tile along the reduction axis."""
        size = self.element.itemsize
        return {2: 32, 4: 16, 8: 16}[size] if self.tensor_products else {4: 16, 8: 8, 16: 4}[size]

    @property
    def tiles(self) -> tuple[GemmTile, ...]:
        """The available tiles."""
        if not self.tensor_products:
            return _PLAIN_TILES[self.element.itemsize]
        if self.element.itemsize == 8:
            return _DOUBLE_TENSOR_TILES
        return _SETTLING_TENSOR_TILES if self.terms else _TENSOR_TILES


_TENSOR_TILES = (
    GemmTile(256, 128, 64, 64),
    GemmTile(128, 256, 64, 64),
    GemmTile(128, 128, 64, 64),
    GemmTile(128, 128, 64, 32),
    GemmTile(128, 64, 64, 32),
    GemmTile(64, 128, 32, 64),
    GemmTile(64, 64, 32, 32),
    GemmTile(128, 32, 32, 32),
    GemmTile(32, 128, 32, 32),
    GemmTile(32, 32, 16, 16),
)
# Totals take as many registers as accumulators, so the largest warp tiles are excluded.
_SETTLING_TENSOR_TILES = tuple(tile for tile in _TENSOR_TILES if tile.warp_rows * tile.warp_columns <= 64 * 32)
_DOUBLE_TENSOR_TILES = (GemmTile(64, 64, 32, 32), GemmTile(32, 32, 16, 16))
_PLAIN_TILES = {
    4: (
        GemmTile(128, 128, 32, 64),
        GemmTile(128, 64, 32, 64),
        GemmTile(64, 128, 32, 64),
        GemmTile(64, 64, 32, 32),
        GemmTile(32, 32, 16, 32),
    ),
    8: (GemmTile(64, 64, 32, 32), GemmTile(32, 64, 16, 32), GemmTile(32, 32, 16, 32)),
    16: (GemmTile(64, 64, 16, 32), GemmTile(32, 32, 16, 32)),
}


class Work(NamedTuple):
    """Problem size: rows and columns of one group (and phase of the stride), and the average length of a sum."""

    rows: int
    columns: int
    groups: int
    depth: int
    phases: int = 1  # phases of the stride


class GemmProblem(NamedTuple):
    """Everything by which a tile is selected."""

    work: Work
    matrices: GemmMatrices
    products: Products
    device: Device
    most_splits: int  # bounds of the number of splits of the depth (split-K)
    least_splits: int = 1

    @property
    def key(self) -> Any:
        """The key of a measurement: everything but the bounds of the number of splits, which vary with workspace."""
        products = (self.products.element.name, *self.products[1:])
        return gemm_table.tuples((self.device, self.work, self.matrices, products))


class TileChoice(NamedTuple):
    """A tile, the number of splits of the depth, and the time in microseconds, modelled or measured."""

    tile: GemmTile
    splits: int
    microseconds: float
    source: str = "the model"  # or the result under bench/results that measured it

    def __str__(self) -> str:
        tile, cut = self.tile, f" in {self.splits} splits" if self.splits > 1 else ""
        warps = f"{tile.warp_rows}x{tile.warp_columns}"
        return f"tiles of {tile.rows}x{tile.columns}, {warps} a warp{cut}: {self.microseconds:.3g} us by {self.source}"


def chosen(problem: GemmProblem) -> TileChoice:
    """Return the tile in the table of measurements, or else the fastest according to the model."""
    return ranked(problem)[0]


def ranked(problem: GemmProblem) -> list[TileChoice]:
    """Return every tile with its best number of splits: first the measured one, if any, then all by modelled time."""
    found = []
    measured = gemm_table.measured().get(problem.key)
    if measured is not None:
        splits = min(measured["splits"], problem.most_splits)
        found.append(TileChoice(GemmTile(*measured["tile"]), splits, measured["microseconds"], measured["source"]))
    return found + sorted(_modelled(problem), key=lambda choice: choice.microseconds)


def _modelled(problem: GemmProblem) -> Iterator[TileChoice]:
    least, most = problem.least_splits, problem.most_splits
    for tile in problem.products.tiles:
        if _blocks_at_once(problem, tile) == 0:
            continue
        steps = (n << bits for bits in range(most.bit_length() + 1) for n in (2, 3))
        options = {least, *(max(least, min(most, splits)) for splits in steps)}
        microseconds, splits = min((_microseconds(problem, tile, splits), splits) for splits in options)
        yield TileChoice(tile, splits, microseconds)


def is_split_faster(device: Device) -> bool:
    """Whether tf32x3 is faster than float32. On GeForce it is not: tensor cores are less than three times as fast."""
    rates = _rates(device.capability)
    return rates["tensor 4"] / 3 > rates["plain 4"]


def stages(problem: GemmProblem) -> int:
    """Return the number of tiles in shared memory at a time (pipeline stages): more if copies are asynchronous."""
    _, matrices, products, device, *_ = problem
    most = max(matrices.left.vector, matrices.right.vector) * products.element.itemsize
    return ASYNCHRONOUS_STAGES if device.capability >= 80 and most >= 4 else STAGES


def shared_bytes(problem: GemmProblem, tile: GemmTile) -> int:
    """Return the dynamic shared memory of a block: its tiles, whose memory the epilogue reuses as staging buffer."""
    _, matrices, products, *_ = problem
    size = products.element.itemsize
    tiles = stages(problem) * products.depth * (tile.rows + tile.columns) * size
    if matrices.result_along_rows:
        lines, length = 16 if products.tensor_products else 32, tile.warp_rows + 4
    else:
        lines, length = 16, tile.warp_columns + 8
    return max(tiles, tile.threads // WARP * lines * length * max(4, size))


# ------------------------------------------------------------------------------------------------- the model

# Fused multiply-adds per clock cycle of a multiprocessor, by compute capability. A newer one uses the last before it.
# From NVIDIA's data sheets; mma.sync reaches 0.63 of the peak of sm_90 (arXiv 2501.12084).
_RATES = {
    75: {"plain 4": 64, "plain 8": 2},
    80: {"tensor 2": 1024, "tensor 4": 512, "tensor 8": 64, "plain 4": 64, "plain 8": 32},
    86: {"tensor 2": 512, "tensor 4": 256, "tensor 8": 2, "plain 4": 128, "plain 8": 2},
    90: {"tensor 2": 1290, "tensor 4": 645, "tensor 8": 128, "plain 4": 128, "plain 8": 64},
    120: {"tensor 2": 512, "tensor 4": 256, "tensor 8": 2, "plain 4": 128, "plain 8": 2},
}
_SHARED_BYTES = 128  # that a multiprocessor reads per clock cycle
_L2_BYTES = 40
_ISSUED = 4 * WARP  # instructions of single threads per clock cycle
_INSTRUCTIONS_OF_VECTOR, _INSTRUCTIONS_OF_ELEMENT = 20, 11  # to compute its address and copy it
_TABLES = 4 << 10  # bytes of static shared memory, approximately
_BUSY_WARPS = 2.0  # with this many warps, latency doubles the time
_START_AND_END = 1500.0  # clock cycles of prologue and epilogue of a block
_CLOCKS = 1700.0  # per microsecond
_LAUNCH = 3.0  # microseconds


def _microseconds(problem: GemmProblem, tile: GemmTile, splits: int) -> float:
    work, _, products, device, *_ = problem
    iterations = blocks(work.depth, splits * products.depth)
    tiles = blocks(work.rows, tile.rows) * blocks(work.columns, tile.columns)
    busiest = blocks(tiles * work.groups * work.phases * splits, device.multiprocessors)
    at_once = min(busiest, _blocks_at_once(problem, tile))
    waiting = 1 + _BUSY_WARPS / (at_once * tile.threads / WARP)
    clocks = busiest * iterations * _clocks_of_iteration(problem, tile) * waiting
    clocks += blocks(busiest, at_once) * (_START_AND_END + at_once * _clocks_of_end(tile, products))
    total = clocks / _CLOCKS
    if splits > 1:
        sums = work.rows * work.columns * work.groups * products.element.itemsize * 2
        total += _LAUNCH + splits * sums / (_L2_BYTES * device.multiprocessors * _CLOCKS)
    return total


def _clocks_of_iteration(problem: GemmProblem, tile: GemmTile) -> float:
    """Return the clock cycles of the slowest unit in one main-loop iteration: one tile of each matrix."""
    _, matrices, products, device, *_ = problem
    size, depth = products.element.itemsize, products.depth
    multiplying = tile.rows * tile.columns * depth * max(1, products.tensor_products) / _rate(products, device)
    warps = tile.threads // WARP
    reading = warps * (tile.warp_rows + tile.warp_columns) * depth * size / _SHARED_BYTES
    copying = (tile.rows + tile.columns) * depth * size / _L2_BYTES
    sides = (tile.rows, matrices.left), (tile.columns, matrices.right)
    finding = sum(extent * depth * _instructions(lines.vector, size) / _ISSUED for extent, lines in sides)
    return max(multiplying, reading, copying, finding)


def _instructions(vector: int, size: int) -> float:
    return _INSTRUCTIONS_OF_VECTOR * size / BYTES if vector > 1 else _INSTRUCTIONS_OF_ELEMENT


def _clocks_of_end(tile: GemmTile, products: Products) -> float:
    return tile.rows * tile.columns * products.element.itemsize / _L2_BYTES


@cache
def _rates(capability: int) -> dict[str, int]:
    return _RATES[max(known for known in _RATES if known <= max(capability, 75))]


def _rate(products: Products, device: Device) -> float:
    complex_products = 4 if products.element.kind == "c" else 1
    size = products.element.itemsize // (2 if complex_products > 1 else 1)
    kind = "tensor" if products.tensor_products else "plain"
    return _rates(device.capability)[f"{kind} {size}"] / complex_products


def _blocks_at_once(problem: GemmProblem, tile: GemmTile) -> int:
    """Return how many blocks fit a multiprocessor, by an estimate of the registers that the compiler uses."""
    _, _, products, device, *_ = problem
    sums = tile.rows * tile.columns // tile.threads * max(1, products.element.itemsize // 4)
    registers = min(255, sums * (2 if products.terms else 1) + 90)
    memory = shared_bytes(problem, tile) + _TABLES
    return occupancy.blocks(_architecture(device.capability), registers, tile.threads, memory)


@cache
def _architecture(capability: int) -> str:
    """Return the newest known architecture up to a compute capability."""
    numbers = {int("".join(filter(str.isdigit, name))): name for name in occupancy.ARCHITECTURES}
    return numbers[max(number for number in numbers if number <= max(capability, min(numbers)))]
