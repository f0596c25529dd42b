"""How long a call takes: samples until there are enough of them, their median and their noise."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy

LEAST_SAMPLES, MOST_SAMPLES = 5, 50


class Timing(NamedTuple):
    """Seconds of every sample."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(numpy.median(self.samples))

    @property
    def noise(self) -> float:
        """The interquartile range over the median."""
        low, high = numpy.percentile(self.samples, [25, 75])
        return float((high - low) / self.median)


def measure(call: Callable[[], Any], xp: Any, seconds: float) -> Timing:
    """Calls once to warm up, then for this long, but 5 times at least and 50 at most.

    On the CPU it is the wall clock's time; on a GPU that between two events around the call, which is the device's
    where the device has enough to do, and the host's where it waits for the next launch.
    """
    once = _cpu_seconds if xp is numpy else _gpu_seconds
    once(call, xp)
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < LEAST_SAMPLES or (len(samples) < MOST_SAMPLES and time.perf_counter() < end):
        samples.append(once(call, xp))
    return Timing(tuple(samples))


def _cpu_seconds(call: Callable[[], Any], xp: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _gpu_seconds(call: Callable[[], Any], xp: Any) -> float:
    before, after = xp.cuda.Event(), xp.cuda.Event()
    before.record()
    call()
    after.record()
    after.synchronize()
    return float(xp.cuda.get_elapsed_time(before, after)) / 1e3
