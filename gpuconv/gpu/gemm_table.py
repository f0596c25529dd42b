"""Tiles of implicit GEMM selected by measurements on a GPU: gemm_table.json, written by bench/tune_tiles.py.

An entry applies to exactly one device and one problem. The model of gemm_tiles.py selects the tiles of all others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".json")


def entry(key: Any, tile: Iterable[int], splits: int, microseconds: float, source: str) -> dict[str, Any]:
    """Return the entry of a measurement; ``source`` names the result under bench/results."""
    device, work, matrices, products = key
    return {
        "device": device,
        "work": work,
        "matrices": matrices,
        "products": products,
        "tile": list(tile),
        "splits": splits,
        "microseconds": round(microseconds, 2),
        "source": source,
    }


@cache
def measured() -> dict[Any, dict[str, Any]]:
    """Return the entries of the file by their keys."""
    return {tuples([e[part] for part in ("device", "work", "matrices", "products")]): e for e in read()}


def read() -> list[dict[str, Any]]:
    """Return the entries in the order of the file."""
    entries: list[dict[str, Any]] = json.loads(FILE.read_text())
    return entries


def write(entries: Iterable[dict[str, Any]]) -> None:
    """Overwrite the file, one entry per line."""
    FILE.write_text("[" + ",".join(f"\n{json.dumps(e)}" for e in entries) + "\n]\n")
    measured.cache_clear()


def tuples(value: Any) -> Any:
    return tuple(map(tuples, value)) if isinstance(value, (list, tuple)) else value
