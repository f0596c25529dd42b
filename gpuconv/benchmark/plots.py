"""Two pictures of results: time against size, with peers as lines, and the roofline with every layer on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpuconv.benchmark.results import OURS, Results, Row
from gpuconv.geometry import DIRECTIONS


def check_format(path: Path) -> None:
    """ValueError where a plot cannot have this file's format."""
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise ValueError(
            f"cannot plot to {path.name}: the name must end in one of {', '.join('.' + f for f in formats)}"
        )


def paths(path: Path) -> tuple[Path, Path]:
    """The files that ``--plot path`` writes."""
    return path.with_stem(f"{path.stem}-time"), path.with_stem(f"{path.stem}-roofline")


def plot(results: Results, path: Path) -> None:
    """Draws both."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for draw, file in zip((_times, _roofline), paths(path), strict=True):
        figure = draw(results, pyplot)
        figure.savefig(file, dpi=150)
        pyplot.close(figure)


def _title(results: Results, rows: Sequence[Row]) -> str:
    kinds = ", ".join(dict.fromkeys(row.dtype for row in rows))
    return f"{results.device}, {kinds}, {results.date[:10]}, commit {(results.commit or 'of a wheel')[:7]}"


def _times(results: Results, pyplot: Any) -> Any:
    """A panel for each direction; the layers stand side by side, from the smallest to the largest."""
    rows = [row for row in results.rows if row.timed]
    layers = sorted({(row.flops, row.case, row.spec, row.dtype) for row in rows})
    place = {layer[2:]: number for number, layer in enumerate(layers)}
    width = max(7.0, 2 + 0.28 * len(layers))
    directions = [direction for direction in DIRECTIONS if any(row.direction == direction for row in rows)]
    size = (width, 3 + 2.7 * len(directions))
    figure, panels = pyplot.subplots(len(directions), 1, figsize=size, sharex=True, squeeze=False, layout="constrained")
    panels = panels[:, 0]
    peers = sorted({row.by for row in rows} - {OURS})
    lines = list(dict.fromkeys((row.by, row.layout) for row in rows))
    for direction, axes in zip(directions, panels, strict=True):
        for by, layout in lines:
            members = [row for row in rows if (row.by, row.layout, row.direction) == (by, layout, direction)]
            members.sort(key=lambda row: place[row.spec, row.dtype])
            first = layout == "channels_first"
            axes.plot(
                [place[row.spec, row.dtype] for row in members],
                [row.summary.median * 1e3 for row in members],
                color="C0" if by == OURS else f"C{1 + peers.index(by)}",
                marker="o" if first else "s",
                linestyle="-" if first else "--",
                label=f"{by}, {layout}",
                markersize=4,
                linewidth=1,
            )
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylabel(f"{direction}, ms")
        axes.grid(alpha=0.3)
    labels = [f"{case} ({flops / 1e9:.2g})" for flops, case, _, _ in layers]
    panels[-1].set_xticks(range(len(layers)), labels, rotation=90, fontsize=8)
    panels[-1].set_xlabel("layer (GFLOP of the direct algorithm)")
    figure.suptitle(f"median milliseconds, lower is better\n{_title(results, rows)}", fontsize=11)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _roofline(results: Results, pyplot: Any) -> Any:
    """Every layer of gpuconv at its intensity, under the roof of its dtype; layers are named along the top."""
    from matplotlib.ticker import LogLocator

    rows = [row for row in results.rows if row.timed and row.by == OURS]
    fastest: dict[tuple[str, ...], Row] = {}
    for row in rows:  # of both layouts and all algorithms the best
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
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
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
    """Names at equal distances, in the order of their intensity, each with a thin line down to its place."""
    low, high = map(math.log10, axes.get_xlim())
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top * (top / bottom) ** 0.12)  # room for the lines
    for number, (name, _, intensity) in enumerate(names):
        at = (number + 0.5) / len(names)
        place = (math.log10(intensity) - low) / (high - low)
        axes.plot([place, at], [0.9, 1.0], transform=axes.transAxes, color="0.6", linewidth=0.5, zorder=1)
        axes.plot([place, place], [0, 0.9], transform=axes.transAxes, color="0.9", linewidth=0.5, zorder=0)
        axes.text(at, 1.005, name, transform=axes.transAxes, rotation=90, ha="center", va="bottom", fontsize=7)
