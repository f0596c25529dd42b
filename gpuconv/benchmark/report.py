"""Text output of results: the table for the terminal and for Markdown, summaries, losses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from gpuconv.benchmark.compare import Change, Ratio, geometric_mean, ratios
from gpuconv.benchmark.results import OURS, UNSTEADY, Results, Row
from gpuconv.geometry import DIRECTIONS

WORST = 5
SIDES: tuple[Any, Any] = ("left", "right")
DISPENSABLE = ("GB/s", "noise", "error", "GFLOP/s", "N", "algorithm", "other")  # in order of omission


class Table:
    """A table of strings. Columns of numbers are aligned to the right."""

    def __init__(self, titles: Sequence[str], words: int) -> None:
        self.titles, self.words = list(titles), words  # the first ``words`` columns are not numbers
        self.lines: list[list[str]] = []

    def markdown(self) -> str:
        """Return the table in Markdown."""
        rule = ["---"] * self.words + ["--:"] * (len(self.titles) - self.words)
        return "\n".join("| " + " | ".join(line) + " |" for line in [self.titles, rule, *self.lines])

    def rich(self, width: int) -> Any:
        """Return the table for a terminal, with a gap between cases; columns that do not fit its width are omitted."""
        from rich import box
        from rich.table import Table as RichTable

        widths = [max(map(len, column)) for column in zip(self.titles, *self.lines, strict=True)]
        left_out: list[str] = []
        for title in DISPENSABLE:
            if sum(w + 2 for w, name in zip(widths, self.titles, strict=True) if name not in left_out) > width:
                left_out += [title] * (title in self.titles)
        shown = [number for number, title in enumerate(self.titles) if title not in left_out]
        made = RichTable(box=box.SIMPLE, padding=(0, 1, 0, 0), caption_justify="left")
        made.caption = f"omitted, since the terminal is too narrow: {', '.join(left_out)}" if left_out else None
        for number in shown:
            least = widths[number] if number else 12  # names may be broken
            made.add_column(self.titles[number], justify=SIDES[number >= self.words], min_width=least, overflow="fold")
        before = ""
        for line in self.lines:
            if made.row_count and line[0] != before:
                made.add_section()
            made.add_row(*(line[number] if number or line[0] != before else "" for number in shown))
            before = line[0]
        return made


def table(results: Results) -> Table:
    """Return a table of the rows of gpuconv, with the better time, the ratio and the verdict of each peer."""
    rows = [row for row in results.rows if row.by == OURS]
    peers = list(dict.fromkeys(row.by for row in results.rows if row.by != OURS))
    against = {(ratio.row.key, ratio.peer.by): ratio for ratio in ratios(results.rows)}
    several = {name: len({getattr(row, name) for row in rows}) > 1 for name in ("dtype", "layout", "backend")}
    on_gpu = any(row.host_seconds is not None for row in rows)
    titles = ["case", "N", "direction", *(name for name, shown in several.items() if shown), "algorithm"]
    words = len(titles)
    titles += ["ms", "noise", "GFLOP/s", "GB/s", "of limit", "error", *(["host us"] if on_gpu else [])]
    for name in peers:
        titles += [f"{name} ms", f"{name} / ours", "verdict"]
    made = Table(titles, words)
    for row in rows:
        line = [row.case, str(row.batch), row.direction]
        line += [getattr(row, name) for name, shown in several.items() if shown]
        line += [row.algorithm, *_figures(row, results.limit(row))]
        if on_gpu:
            line.append("" if row.host_seconds is None else f"{row.host_seconds * 1e6:.0f}")
        for name in peers:
            line += _against(against.get((row.key, name)))
        made.lines.append(line)
    return made


def _figures(row: Row, limit: float | None) -> list[str]:
    if not row.timed:
        state = "FAILED" if row.failure else "refused" if row.refusal else "WRONG" if row.wrong else "not timed"
        return [state, "", "", "", "", "" if row.error is None else f"{row.error:.1e}"]
    median, noise = row.summary
    return [
        milliseconds(median),
        f"{'~' if noise > UNSTEADY else ''}{noise:.0%}",
        f"{row.flops / median / 1e9:.1f}",
        f"{row.bytes / median / 1e9:.2f}",
        "" if limit is None else f"{limit / median:.0%}",
        f"{row.error:.1e}",
    ]


def _against(ratio: Ratio | None) -> list[str]:
    if ratio is None:
        return ["-", "", ""]
    return [milliseconds(ratio.peer.summary.median), f"{ratio.value:.2f}", ratio.verdict]


def milliseconds(seconds: float) -> str:
    """Return seconds as a number of milliseconds with at least three digits.

    >>> [milliseconds(seconds) for seconds in (1.2345, 0.012345, 0.0000123)]
    ['1234', '12.3', '0.0123']
    """
    ms = seconds * 1e3
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}" if ms >= 0.1 else f"{ms:.4f}"


def means(found: Sequence[Ratio]) -> Table:
    """Return the geometric mean ratio for each suite, direction and kind of row, and the number of each verdict."""
    titles = ["suite", "dtype", "layout", "algorithm", "peer", *DIRECTIONS]
    table = Table([*titles, "FAST", "SLOW", "other"], 5)
    groups: dict[tuple[str, ...], list[Ratio]] = {}
    for ratio in found:
        for suite in ratio.row.suites or (ratio.row.case,):
            row = ratio.row
            groups.setdefault((suite, row.dtype, row.layout, row.asked, ratio.peer.by), []).append(ratio)
    order = list(dict.fromkeys(suite for suite, *_ in groups))
    for key, members in sorted(groups.items(), key=lambda group: (order.index(group[0][0]), *group[0][1:])):
        verdicts = Counter(ratio.verdict for ratio in members)
        values = [[ratio.value for ratio in members if ratio.row.direction == direction] for direction in DIRECTIONS]
        line = [f"{geometric_mean(of):.2f}" if of else "-" for of in values]
        wins, losses = verdicts["FAST"], verdicts["SLOW"]
        table.lines.append([*key, *line, str(wins), str(losses), str(len(members) - wins - losses)])
    return table


def of_product(runs: Iterable[Results]) -> Table:
    """Return gpuconv's rate relative to that of a matrix product, as geometric means per suite and direction."""
    table = Table(["suite", "dtype", "layout", "algorithm", *DIRECTIONS], 4)
    groups: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for run in runs:
        for row in run.rows:
            limits = run.limits.get(row.backend)
            peak = limits.peaks.get(row.dtype) if limits else None
            if row.by != OURS or not row.timed or not peak:
                continue
            for suite in row.suites or (row.case,):
                kind = groups.setdefault((suite, row.dtype, row.layout, row.asked), {})
                kind.setdefault(row.direction, []).append(row.flops / row.summary.median / peak)
    for key, shares in groups.items():
        line = [f"{geometric_mean(shares[name]):.2f}" if name in shares else "-" for name in DIRECTIONS]
        table.lines.append([*key, *line])
    return table


def worst(found: Iterable[Ratio]) -> list[Ratio]:
    """Return the five rows with the lowest ratio, out of those in which gpuconv is slower."""
    return sorted((ratio for ratio in found if ratio.value < 1), key=lambda ratio: ratio.value)[:WORST]


def losses(found: Sequence[Ratio]) -> list[str]:
    """Return one line for each of the worst rows, with the command that reproduces it."""
    return [
        f"{ratio.value:.2f} of {ratio.peer.by}'s speed: {ratio.row.case}, {ratio.row.direction}, {ratio.row.dtype},"
        f" {ratio.row.layout}\n    {ratio.row.command} --peer {ratio.peer.by}"
        for ratio in worst(found)
    ]


def refusals(rows: Iterable[Row]) -> list[str]:
    """Return one line for each reason why rows were refused, with the library and the number of rows."""
    counts = Counter(
        (row.by, row.layout if row.by != OURS else row.algorithm, row.refusal) for row in rows if row.refusal
    )
    return [f"{by} ({how}) refused {number}: {why}" for (by, how, why), number in counts.items()]


def notes(found: Results, compared: Sequence[Ratio]) -> list[str]:
    """Return the lines below the tables: losses, refusals, the time spent, and what is missing."""
    lost = losses(compared)
    spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in found.spent.items())
    return [
        *(["the rows that lose most:", *lost] if lost else []),
        *refusals(found.rows),
        f"spent: {spent}",
        *([] if found.complete else ["interrupted: these are not all rows", *found.not_reached]),
    ]


def markdown(found: Results) -> str:
    """Return the machine, the tables and the notes in Markdown."""
    compared = ratios(found.rows)
    parts = [
        f"{found.device}, gpuconv {found.machine['gpuconv']}, commit {found.commit}, {found.date}",
        table(found).markdown(),
        *([means(compared).markdown()] if compared else []),
        "\n".join(f"- {line}" for line in notes(found, compared)),
    ]
    return "\n\n".join(parts) + "\n"


def changed(found: Sequence[Change]) -> Table:
    """Return the table that ``compare`` prints, with one line per row."""
    table = Table(["case", "direction", "dtype", "by", "layout", "before ms", "now ms", "now / before", "verdict"], 5)
    for change in found:
        row = change.after or change.before
        assert row is not None
        times = [
            milliseconds(side.summary.median) if side is not None and side.timed else "-"
            for side in (change.before, change.after)
        ]
        slowdown = "" if change.slowdown != change.slowdown else f"{change.slowdown:.2f}"
        who = row.algorithm if row.by == OURS else row.by
        table.lines.append([row.case, row.direction, row.dtype, who, row.layout, *times, slowdown, change.verdict])
    return table
