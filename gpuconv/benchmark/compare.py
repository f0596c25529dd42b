"""Comparison of samples by medians and quartiles, and ``gpuconv bench compare``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy

from gpuconv.benchmark.results import OURS, Results, Row

Verdict: TypeAlias = Literal["FAST", "SLOW", "SAME", "AMBIGUOUS"]

MARGIN = 0.02  # medians whose relative difference is at most this are the same


def verdict(samples: Sequence[float], other: Sequence[float]) -> Verdict:
    """Return how samples compare with other samples, by medians and quartiles.

    SAME: the medians differ by at most 2 %. FAST: they differ by more, and the upper quartile is below the lower
    quartile of the other samples. SLOW: the reverse. AMBIGUOUS: otherwise. With fewer than five samples the minimum and
    the maximum are used instead of the quartiles.

    >>> verdict([1.0, 1.1, 1.0, 1.1, 1.0], [2.0, 2.1, 2.2, 2.0, 2.1])
    'FAST'
    >>> verdict([1.0, 1.2, 1.0, 2.1, 2.0], [1.9, 1.0, 1.4, 1.3, 2.2])
    'AMBIGUOUS'
    """
    low, median, high = _box(samples)
    other_low, other_median, other_high = _box(other)
    if abs(math.log(median / other_median)) <= math.log1p(MARGIN):
        return "SAME"
    if high < other_low:
        return "FAST"
    return "SLOW" if low > other_high else "AMBIGUOUS"


def _box(samples: Sequence[float]) -> tuple[float, float, float]:
    ends = [25, 50, 75] if len(samples) >= 5 else [0, 50, 100]
    low, median, high = numpy.percentile(samples, ends)
    return float(low), float(median), float(high)


class Ratio(NamedTuple):
    """Comparison of a row of gpuconv with the row of a peer, in the peer's faster memory format."""

    row: Row
    peer: Row
    value: float  # the peer's median over ours: above 1 gpuconv is faster
    verdict: Verdict


def ratios(rows: Sequence[Row]) -> list[Ratio]:
    """Return the ratio of each timed row of gpuconv to each peer that was timed for the same problem."""
    peers: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.by != OURS and row.timed:
            peers.setdefault((*row.contest, row.by), []).append(row)
    names = dict.fromkeys(key[-1] for key in peers)
    found = []
    for row in rows:
        if row.by == OURS and row.timed:
            for name in names:
                if forms := peers.get((*row.contest, name)):
                    best = min(forms, key=lambda form: form.summary.median)
                    value = best.summary.median / row.summary.median
                    found.append(Ratio(row, best, value, verdict(row.samples, best.samples)))
    return found


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean, or NaN if there are no values."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


class Change(NamedTuple):
    """Comparison of one row of two results."""

    before: Row | None
    after: Row | None
    verdict: str  # of ``after`` relative to ``before``, or which one is missing, or WRONG
    slowdown: float  # median of ``after`` divided by that of ``before``; NaN if one is missing

    @property
    def ours(self) -> bool:
        row = self.after or self.before
        return row is not None and row.by == OURS


def changes(before: Results, after: Results) -> list[Change]:
    """Return the comparison of every row that is in either result, in the order of the first."""
    old, new = ({row.key: row for row in results.rows} for results in (before, after))
    found = []
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        if b is not None and b.wrong:
            found.append(Change(a, b, "WRONG", math.nan))
        elif a is None or b is None:
            found.append(Change(a, b, "ONLY BEFORE" if b is None else "ONLY NOW", math.nan))
        elif a.timed and b.timed:
            slowdown = b.summary.median / a.summary.median
            found.append(Change(a, b, verdict(b.samples, a.samples), slowdown))
        elif a.timed or b.timed:
            found.append(Change(a, b, "NOT TIMED" if a.timed else "ONLY NOW", math.nan))
    return found


def differences(before: Results, after: Results) -> list[str]:
    """Return the facts that differ between two results and may explain a change: machine, versions, method."""
    facts = {name: (before.machine.get(name), after.machine.get(name)) for name in before.machine | after.machine}
    facts |= {"cold caches": (before.cold, after.cold), "complete": (before.complete, after.complete)}
    facts.pop("nvidia-smi", None)  # clocks and temperature always differ
    return [f"{name}: {old} before, {new} now" for name, (old, new) in facts.items() if old != new]
