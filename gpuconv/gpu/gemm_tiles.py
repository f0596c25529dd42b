"""The tiles of implicit GEMM, and which of them a convolution takes: that with the least time by a model.

The model counts, for the busiest multiprocessor, the clocks that its units need for its tiles: multiplying, reading
shared memory, copying tiles from the L2 cache, and issuing the instructions that find the elements; the unit that needs
most decides. A multiprocessor with few warps waits for its own results, and every block begins and ends with clocks in
which it multiplies nothing. What the model does not know (clocks, caches, how well the parts overlap) is the same for
all tiles of a kind, so it ranks tiles, and is no promise of a speed.
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
TENSOR_TERMS = 4096  # of a sum on tensor cores, which cut off what does not fit
SPLIT_TERMS = 512  # the same of tf32x3, three products in the place of one
PLAIN_TERMS = 128  # so that equal terms, too, whose roundings all go one way, stay within the bound of a direct sum
ASYNCHRONOUS_STAGES, STAGES = 4, 2


class GemmTile(NamedTuple):
    """What a block computes, and what each of its warps does."""

    rows: int
    columns: int
    warp_rows: int
    warp_columns: int

    @property
    def threads(self) -> int:
        return WARP * (self.rows // self.warp_rows) * (self.columns // self.warp_columns)


class Products(NamedTuple):
    """How a block multiplies: the dtype of its tiles, and on tensor cores how many products make one (0: without)."""

    element: numpy.dtype
    tensor_products: int
    terms: int  # of a sum before it is added to a total; 0: all

    @property
    def depth(self) -> int:
        """Steps of a tile."""
        size = self.element.itemsize
        return {2: 32, 4: 16, 8: 16}[size] if self.tensor_products else {4: 16, 8: 8, 16: 4}[size]

    @property
    def tiles(self) -> tuple[GemmTile, ...]:
        """The tiles there are."""
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
# Totals take as many registers as sums.
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
    """What there is to do: rows and columns of one group (and residue), and how many steps each sum has, on average."""

    rows: int
    columns: int
    groups: int
    depth: int
    residues: int = 1  # of the stride


class GemmProblem(NamedTuple):
    """What a tile is chosen by."""

    work: Work
    matrices: GemmMatrices
    products: Products
    device: Device
    most_slices: int  # that the depth may be cut into
    least_slices: int = 1

    @property
    def key(self) -> Any:
        """What a measurement is found by: all but how many slices the workspace has room for."""
        products = (self.products.element.name, *self.products[1:])
        return gemm_table.tuples((self.device, self.work, self.matrices, products))


class TileChoice(NamedTuple):
    """A tile, in how many slices the depth is cut, and the microseconds that it takes, by the model or measured."""

    tile: GemmTile
    slices: int
    microseconds: float
    source: str = "the model"  # or the result under bench/results that measured it

    def __str__(self) -> str:
        tile, cut = self.tile, f" in {self.slices} slices" if self.slices > 1 else ""
        warps = f"{tile.warp_rows}x{tile.warp_columns}"
        return f"tiles of {tile.rows}x{tile.columns}, {warps} a warp{cut}: {self.microseconds:.3g} us by {self.source}"


def chosen(problem: GemmProblem) -> TileChoice:
    """The tile that the table of measurements names, or else the fastest by the model."""
    return ranked(problem)[0]


def ranked(problem: GemmProblem) -> list[TileChoice]:
    """Every tile with the best number of slices for it: the measured one if there is one, then by the model."""
    found = []
    measured = gemm_table.measured().get(problem.key)
    if measured is not None:
        slices = min(measured["slices"], problem.most_slices)
        found.append(TileChoice(GemmTile(*measured["tile"]), slices, measured["microseconds"], measured["source"]))
    return found + sorted(_modelled(problem), key=lambda choice: choice.microseconds)


def _modelled(problem: GemmProblem) -> Iterator[TileChoice]:
    least, most = problem.least_slices, problem.most_slices
    for tile in problem.products.tiles:
        if _blocks_at_once(problem, tile) == 0:
            continue
        steps = (n << bits for bits in range(most.bit_length() + 1) for n in (2, 3))
        options = {least, *(max(least, min(most, slices)) for slices in steps)}
        microseconds, slices = min((_microseconds(problem, tile, slices), slices) for slices in options)
        yield TileChoice(tile, slices, microseconds)


def is_split_faster(device: Device) -> bool:
    """Whether tf32x3 is faster than float32: on GeForce, tensor cores are not three times as fast as the others."""
    rates = _rates(device.capability)
    return rates["tensor 4"] / 3 > rates["plain 4"]


def stages(problem: GemmProblem) -> int:
    """Tiles in shared memory at a time: more where copies go on by themselves."""
    _, matrices, products, device, *_ = problem
    most = max(matrices.left.vector, matrices.right.vector) * products.element.itemsize
    return ASYNCHRONOUS_STAGES if device.capability >= 80 and most >= 4 else STAGES


def shared_bytes(problem: GemmProblem, tile: GemmTile) -> int:
    """Dynamic shared memory of a block: its tiles and, later in their place, the slabs in which sums leave."""
    _, matrices, products, *_ = problem
    size = products.element.itemsize
    tiles = stages(problem) * products.depth * (tile.rows + tile.columns) * size
    if matrices.result_along_rows:
        lines, length = 16 if products.tensor_products else 32, tile.warp_rows + 4
    else:
        lines, length = 16, tile.warp_columns + 8
    return max(tiles, tile.threads // WARP * lines * length * max(4, size))


# ------------------------------------------------------------------------------------------------- the model

# Fused multiply-adds of a multiprocessor in a clock, by compute capability; a later one counts as the last before it.
# From NVIDIA's data sheets; mma.sync reaches 0.63 of what sm_90 can do (arXiv 2501.12084).
_RATES = {
    75: {"plain 4": 64, "plain 8": 2},
    80: {"tensor 2": 1024, "tensor 4": 512, "tensor 8": 64, "plain 4": 64, "plain 8": 32},
    86: {"tensor 2": 512, "tensor 4": 256, "tensor 8": 2, "plain 4": 128, "plain 8": 2},
    90: {"tensor 2": 1290, "tensor 4": 645, "tensor 8": 128, "plain 4": 128, "plain 8": 64},
    120: {"tensor 2": 512, "tensor 4": 256, "tensor 8": 2, "plain 4": 128, "plain 8": 2},
}
_SHARED_BYTES = 128  # that a multiprocessor reads in a clock
_L2_BYTES = 40
_ISSUED = 4 * WARP  # instructions of single threads in a clock
_INSTRUCTIONS_OF_VECTOR, _INSTRUCTIONS_OF_ELEMENT = 20, 11  # to find and copy it
_TABLES = 4 << 10  # static shared memory, about
_BUSY_WARPS = 2.0  # beside which a warp's own waiting counts as much as its work
_START_AND_END = 1500.0  # clocks of a block
_CLOCKS = 1700.0  # in a microsecond
_LAUNCH = 3.0  # microseconds


def _microseconds(problem: GemmProblem, tile: GemmTile, slices: int) -> float:
    work, _, products, device, *_ = problem
    turns = blocks(work.depth, slices * products.depth)
    tiles = blocks(work.rows, tile.rows) * blocks(work.columns, tile.columns)
    busiest = blocks(tiles * work.groups * work.residues * slices, device.multiprocessors)
    at_once = min(busiest, _blocks_at_once(problem, tile))
    waiting = 1 + _BUSY_WARPS / (at_once * tile.threads / WARP)
    clocks = busiest * turns * _clocks_of_turn(problem, tile) * waiting
    clocks += blocks(busiest, at_once) * (_START_AND_END + at_once * _clocks_of_end(tile, products))
    total = clocks / _CLOCKS
    if slices > 1:
        sums = work.rows * work.columns * work.groups * products.element.itemsize * 2
        total += _LAUNCH + slices * sums / (_L2_BYTES * device.multiprocessors * _CLOCKS)
    return total


def _clocks_of_turn(problem: GemmProblem, tile: GemmTile) -> float:
    """What the busiest unit needs for one tile of each matrix."""
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
    """Blocks that a multiprocessor has room for, by registers about as many as the compiler takes."""
    _, _, products, device, *_ = problem
    sums = tile.rows * tile.columns // tile.threads * max(1, products.element.itemsize // 4)
    registers = min(255, sums * (2 if products.terms else 1) + 90)
    memory = shared_bytes(problem, tile) + _TABLES
    return occupancy.blocks(_architecture(device.capability), registers, tile.threads, memory)


@cache
def _architecture(capability: int) -> str:
    """The last one that is known up to a compute capability."""
    numbers = {int("".join(filter(str.isdigit, name))): name for name in occupancy.ARCHITECTURES}
    return numbers[max(number for number in numbers if number <= max(capability, min(numbers)))]
