"""The choice of a tile of implicit GEMM: by a measurement, or else by the performance model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from gpuconv.gpu import gemm_model, gemm_table, gemm_tiles
from gpuconv.gpu.gemm_tiles import GemmProblem, GemmTile


class TileChoice(NamedTuple):
    """A tile, the number of splits of the depth, and the time in microseconds, modelled or measured."""

    tile: GemmTile
    splits: int
    microseconds: float
    source: str = "the model"  # or the result under bench/results that measured it

    def __str__(self) -> str:
        tile, cut = self.tile, f" in {self.splits} splits" if self.splits > 1 else ""
        warps = f"{tile.warp_rows}x{tile.warp_columns} a warp{', deep' if tile.is_deep else ''}"
        return f"tiles of {tile.rows}x{tile.columns}, {warps}{cut}: {self.microseconds:.3g} us by {self.source}"


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
    return found + sorted(modelled(problem), key=lambda choice: choice.microseconds)


def modelled(problem: GemmProblem) -> Iterator[TileChoice]:
    """Yield every tile that fits the device, with its best number of splits."""
    least, most = problem.least_splits, problem.most_splits
    for tile in problem.products.tiles:
        is_loadable = not tile.is_deep or all(gemm_tiles.loads_asynchronously(problem))  # elements take registers
        if not is_loadable or gemm_model.blocks_at_once(problem, tile) == 0:
            continue
        steps = (n << bits for bits in range(most.bit_length() + 1) for n in (2, 3))
        options = {least, *(max(least, min(most, splits)) for splits in steps)}
        microseconds, splits = min((gemm_model.microseconds(problem, tile, splits), splits) for splits in options)
        yield TileChoice(tile, splits, microseconds)
