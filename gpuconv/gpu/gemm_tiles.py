"""Tiles of implicit GEMM, and everything by which one is selected for a convolution (gemm_choice.py)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy

from gpuconv.gpu import gemm_table
from gpuconv.gpu.device import Device
from gpuconv.gpu.gemm_layout import GemmMatrices

WARP = 32
# The number of terms after which an accumulator is flushed to a total.
TENSOR_TERMS = 4096  # tensor cores truncate during accumulation
SPLIT_TERMS = 512  # tf32x3 computes three products for one
PLAIN_TERMS = 128  # sums of equal terms, whose rounding errors have one sign, stay within the bound of a direct sum
ASYNCHRONOUS_STAGES, DEEP_STAGES, STAGES = 4, 3, 2


class GemmTile(NamedTuple):
    """The tile of a thread block, and the part of it that each warp computes."""

    rows: int
    columns: int
    warp_rows: int
    warp_columns: int
    is_deep: bool = False  # whether it has twice as many steps of the reduction as others

    @property
    def name(self) -> str:
        """The extents, for reports and the names of tests."""
        extents = f"{self.rows}x{self.columns}x{self.warp_rows}x{self.warp_columns}"
        return f"{extents}-deep" if self.is_deep else extents

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
        """The extent along the reduction axis of a tile that is not deep."""
        size = self.element.itemsize
        return {2: 32, 4: 16, 8: 16}[size] if self.tensor_products else {4: 16, 8: 8, 16: 4}[size]

    @property
    def tiles(self) -> tuple[GemmTile, ...]:
        """The available tiles."""
        if not self.tensor_products:
            return _PLAIN_TILES[self.element.itemsize]
        if self.element.itemsize == 8:
            return _DOUBLE_TENSOR_TILES
        if self.tensor_products == 3:
            return _SPLIT_TENSOR_TILES
        tiles = _TENSOR_TILES if self.element.itemsize > 2 else _TENSOR_TILES + _DEEP_TILES
        # Totals take as many registers as accumulators, so the largest warp tiles are excluded.
        return tuple(tile for tile in tiles if not self.terms or tile.warp_rows * tile.warp_columns <= 64 * 32)


_TENSOR_TILES = (
    GemmTile(256, 128, 64, 64),
    GemmTile(128, 256, 64, 64),
    GemmTile(128, 128, 64, 64),
    GemmTile(128, 128, 64, 32),
    GemmTile(256, 64, 64, 32),
    GemmTile(128, 64, 64, 32),
    GemmTile(64, 128, 32, 64),
    GemmTile(64, 64, 32, 32),
    GemmTile(128, 32, 32, 32),
    GemmTile(32, 128, 32, 32),
    GemmTile(128, 16, 32, 16),  # for groups of 16 filters
    GemmTile(32, 32, 16, 16),
)
# Half precision only: fewer instructions for each product, and more shared memory.
_DEEP_TILES = (
    GemmTile(256, 128, 64, 64, is_deep=True),
    GemmTile(128, 128, 64, 64, is_deep=True),
    GemmTile(128, 64, 64, 32, is_deep=True),
    GemmTile(64, 64, 32, 32, is_deep=True),
)
# For tf32x3, whose operands are in registers three times: larger parts of a warp would spill.
_SPLIT_TENSOR_TILES = (GemmTile(128, 64, 32, 32), GemmTile(64, 64, 32, 32), GemmTile(32, 32, 16, 16))
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


def depth(problem: GemmProblem, tile: GemmTile) -> int:
    """Return the extent of a tile along the reduction axis."""
    return problem.products.depth * (2 if tile.is_deep else 1)


def loads_asynchronously(problem: GemmProblem) -> tuple[bool, bool]:
    """Return whether the tiles of the left and of the right matrix are copied asynchronously."""
    size, has_copies = problem.products.element.itemsize, problem.device.capability >= 80
    left, right = (has_copies and lines.vector * size >= 4 for lines in problem.matrices[:2])
    return left, right


def stages(problem: GemmProblem, tile: GemmTile) -> int:
    """Return the number of tiles in shared memory at a time (pipeline stages): more if copies are asynchronous."""
    if not any(loads_asynchronously(problem)):
        return STAGES
    return DEEP_STAGES if tile.is_deep else ASYNCHRONOUS_STAGES


def shared_bytes(problem: GemmProblem, tile: GemmTile) -> int:
    """Return the dynamic shared memory of a block: its tiles, whose memory the epilogue reuses as staging buffer."""
    size = problem.products.element.itemsize
    tiles = stages(problem, tile) * depth(problem, tile) * (tile.rows + tile.columns) * size
    if problem.matrices.result_along_rows:
        lines, length = 16 if problem.products.tensor_products else 32, tile.warp_rows + 4
    else:
        lines, length = 16, tile.warp_columns + 8
    return max(tiles, tile.threads // WARP * lines * length * max(4, size))
