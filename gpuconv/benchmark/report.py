"""Tables and plots of benchmark rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpuconv.benchmark.run import Row
from gpuconv.geometry import DIRECTIONS


def table(rows: Sequence[Row]) -> Any:
    """A rich table of the rows."""
    from rich.table import Table

    made = Table(title=None)
    made.add_column("case", no_wrap=True)
    made.add_column("direction", no_wrap=True)
    made.add_column("algorithm", no_wrap=True)
    for title in ("median ms", "noise", "GFLOP/s", "GB/s", "error"):
        made.add_column(title, justify="right", no_wrap=True)
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None and before.case != row.case:
            made.add_section()
        made.add_row(row.case if before is None or before.case != row.case else "", *cells(row))
    return made


def cells(row: Row) -> tuple[str, ...]:
    """A row's columns behind its case."""
    if not row.right:
        return row.direction, row.algorithm, "WRONG", "", "", "", f"{row.error:.1e}"
    median = row.timing.median
    return (
        row.direction,
        row.algorithm,
        f"{median * 1e3:.2f}",
        f"{row.timing.noise:.0%}",
        f"{row.flops / median / 1e9:.1f}",
        f"{row.bytes / median / 1e9:.2f}",
        f"{row.error:.1e}",
    )


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Bars of GFLOP/s for every case and direction."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys(row.case for row in rows))
    directions = [direction for direction in DIRECTIONS if any(row.direction == direction for row in rows)]
    figure, axes = pyplot.subplots(figsize=(9, 2 + 0.21 * len(directions) * len(cases)), layout="constrained")
    height = 0.8 / len(directions)
    for number, direction in enumerate(directions):
        chosen = [row for row in rows if row.direction == direction and row.right]
        places = [cases.index(row.case) + (number - (len(directions) - 1) / 2) * height for row in chosen]
        rates = [row.flops / row.timing.median / 1e9 for row in chosen]
        color = f"C{DIRECTIONS.index(direction)}"
        bars = axes.barh(places, rates, height, label=direction, color=color)
        axes.bar_label(bars, [f"{rate:.3g}" for rate in rates], padding=3, fontsize=7)
    axes.set_yticks(range(len(cases)), cases, fontsize=8)
    axes.margins(x=0.1)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xlabel("GFLOP/s of the direct algorithm (higher is better)")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(directions), frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def check_format(path: Path) -> None:
    """ValueError where a plot cannot have this file's format."""
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise ValueError(
            f"cannot plot to {path.name}: the name must end in one of {', '.join('.' + f for f in formats)}"
        )
