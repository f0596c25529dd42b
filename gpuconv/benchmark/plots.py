"""Plots of results: the speed of each layer, relative to peers if there are any, and the roofline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpuconv.benchmark import compare
from gpuconv.benchmark.results import OURS, Results, Row
from gpuconv.geometry import DIRECTIONS


def check_format(path: Path) -> None:
    """Raise ValueError if a plot cannot be saved in the format of this file."""
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise ValueError(
            f"cannot plot to {path.name}: the name must end in one of {', '.join('.' + f for f in formats)}"
        )


def paths(path: Path) -> tuple[Path, Path]:
    """Return the files that ``--plot path`` writes."""
    return path.with_stem(f"{path.stem}-layers"), path.with_stem(f"{path.stem}-roofline")


def plot(results: Results, path: Path) -> None:
    """Draw both plots and save them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for draw, file in zip((_layers, _roofline), paths(path), strict=True):
        figure = draw(results, pyplot)
        figure.savefig(file, dpi=150)
        pyplot.close(figure)


def _title(results: Results, rows: Sequence[Row]) -> str:
    kinds = ", ".join(dict.fromkeys(row.dtype for row in rows))
    source = f"commit {results.commit[:7]}" if results.commit else "installed from a wheel"
    return f"{results.device}, {kinds}, {results.date[:10]}, {source}"


def _layers(results: Results, pyplot: Any) -> Any:
    """Return a figure with a panel per direction, a row per layer in the order of the table, and a dot per measurement.

    A dot is the time of the peer divided by that of gpuconv; without peers it is the time of gpuconv.
    """
    found = compare.ratios(results.rows)
    dots = [(ratio.row, ratio.peer.by, ratio.value) for ratio in found]
    if not found:
        dots = [(row, row.by, 1e3 * row.summary.median) for row in results.rows if row.timed]
    layers = list(dict.fromkeys((row.case, row.spec, row.dtype) for row, _, _ in dots))
    directions = [direction for direction in DIRECTIONS if any(row.direction == direction for row, _, _ in dots)]
    size = (3.5 + 3 * len(directions), 2 + 0.22 * len(layers))
    figure, panels = pyplot.subplots(
        1, len(directions), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    kinds = list(dict.fromkeys((by, row.layout) for row, by, _ in dots))
    peers = list(dict.fromkeys(by for by, _ in kinds))
    for direction, axes in zip(directions, panels[0], strict=True):
        for by, layout in kinds:
            members = [dot for dot in dots if (dot[1], dot[0].layout, dot[0].direction) == (by, layout, direction)]
            axes.scatter(
                [value for _, _, value in members],
                [layers.index((row.case, row.spec, row.dtype)) for row, _, _ in members],
                color=f"C{peers.index(by)}",
                marker="o" if layout == "channels_first" else "x",
                s=18,
                label=f"{by}, gpuconv in {layout}" if found else layout,
            )
        axes.set_xscale("log")
        _label(axes.xaxis)
        axes.set_title(direction, fontsize=10)
        axes.grid(alpha=0.3)
        if found:
            axes.axvline(1, color="0.3", linewidth=1)
    panels[0][0].set_yticks(range(len(layers)), [case for case, _, _ in layers], fontsize=8)
    panels[0][0].set_ylim(len(layers) - 0.5, -0.5)
    label = "time of the peer / time of gpuconv: above 1 gpuconv is faster" if found else "milliseconds"
    panels[0][len(directions) // 2].set_xlabel(label)
    figure.suptitle(_title(results, [row for row, _, _ in dots]), fontsize=11)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _label(axis: Any) -> None:
    """Label a logarithmic axis at 1, 1.5, 2, 3, 5 and 7 times powers of 10."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def _roofline(results: Results, pyplot: Any) -> Any:
    """Return a figure with the rate of every layer at its arithmetic intensity, below the roofline of its dtype.

    The names of the layers are along the top.
    """
    rows = [row for row in results.rows if row.timed and row.by == OURS]
    fastest: dict[tuple[str, ...], Row] = {}
    for row in rows:  # only the fastest of all layouts and algorithms is shown
        key = row.contest
        if key not in fastest or row.summary.median < fastest[key].summary.median:
            fastest[key] = row
    shown = sorted(fastest.values(), key=_intensity)
    names = dict.fromkeys((row.case, row.dtype, _intensity(row)) for row in shown)
    figure, axes = pyplot.subplots(figsize=(max(9.0, 2 + 0.19 * len(names)), 7), layout="constrained")
    for direction in DIRECTIONS:
        members = [row for row in shown if row.direction == direction]
        axes.scatter(
            [_intensity(row) for row in members],
            [row.flops / row.summary.median / 1e9 for row in members],
            s=18,
            color=f"C{DIRECTIONS.index(direction)}",
            label=direction,
            zorder=3,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    _roofs(results, shown, axes)
    _names_along_the_top(axes, list(names))
    axes.set_xlabel("FLOP per byte, each tensor once")
    axes.set_ylabel("GFLOP/s of the direct algorithm (higher is better)")
    axes.grid(alpha=0.3)
    _label(axes.xaxis)
    _label(axes.yaxis)
    figure.suptitle(f"gpuconv, the faster of its layouts\n{_title(results, shown)}", fontsize=11)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def _intensity(row: Row) -> float:
    return row.flops / row.bytes


def _roofs(results: Results, rows: Sequence[Row], axes: Any) -> None:
    low, high = axes.get_xlim()
    bottom = axes.get_ylim()[0]
    for place, limits in results.limits.items():
        kinds = dict.fromkeys(row.dtype for row in rows if row.backend == place and row.dtype in limits.peaks)
        for number, kind in enumerate(kinds):
            bandwidth, peak = limits.bandwidth / 1e9, limits.peaks[kind] / 1e9
            places = sorted({low, min(max(peak / bandwidth, low), high), high})
            roof = [min(x * bandwidth, peak) for x in places]
            label = f"{kind}: copy {bandwidth:.0f} GB/s, product {peak:.0f} GFLOP/s"
            axes.plot(places, roof, color="0.3", linestyle=("-", "--", ":", "-.")[number % 4], label=label)
    axes.set_xlim(low, high)
    axes.set_ylim(bottom=bottom)


def _names_along_the_top(axes: Any, names: Sequence[tuple[str, str, float]]) -> None:
    """Draw equidistant names in the order of their intensity, each with a thin line down to its position."""
    low, high = map(math.log10, axes.get_xlim())
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top * (top / bottom) ** 0.12)  # room for the lines
    for number, (name, _, intensity) in enumerate(names):
        at = (number + 0.5) / len(names)
        place = (math.log10(intensity) - low) / (high - low)
        axes.plot([place, at], [0.9, 1.0], transform=axes.transAxes, color="0.6", linewidth=0.5, zorder=1)
        axes.plot([place, place], [0, 0.9], transform=axes.transAxes, color="0.9", linewidth=0.5, zorder=0)
        axes.text(at, 1.005, name, transform=axes.transAxes, rotation=90, ha="center", va="bottom", fontsize=7)
