"""Timing of calls: on the CPU by the wall clock, on a GPU between events or as a CUDA graph."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from gpuconv.arrays import Backend

Call = Callable[[], Any]

ENOUGH, MOST = 30, 100  # samples
PATIENCE = 4  # a row may take this many times its seconds to reach ENOUGH samples
SHORT = 20e-6  # seconds; shorter calls on a GPU are timed as a CUDA graph
REPEATS = 20  # calls in such a graph


class Summary(NamedTuple):
    """The statistics of samples that a row shows."""

    median: float  # seconds
    noise: float  # the interquartile range over the median

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary:
        low, median, high = numpy.percentile(samples, [25, 50, 75])
        return cls(float(median), float((high - low) / median) if median else 0.0)


def count(estimate: float, seconds: float) -> int:
    """Return how many samples to take of a call, given its estimated and the available seconds: 30 to 100.

    If 30 samples take more than four times the available seconds, return the number that fits in four times the
    available seconds, at least 1.
    """
    if estimate <= 0:
        return MOST
    fitting = math.floor(PATIENCE * seconds / estimate)
    return max(1, min(fitting, max(ENOUGH, min(MOST, math.floor(seconds / estimate)))))


class Clock:
    """Timing by the wall clock. With ``cold`` the caches are emptied before each sample by writing to another array."""

    method = "wall clock"

    def __init__(self, *, cold: bool = False) -> None:
        self._elsewhere = numpy.zeros(2 * last_cache_bytes() if cold else 0, numpy.uint8)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Enter a context in which calls can be timed."""
        yield

    def first(self, call: Call) -> tuple[float, Any]:
        """Return the seconds until the result of one call is available, and the result."""
        start = time.perf_counter()
        result = call()
        return time.perf_counter() - start, result

    def samples(self, call: Call, number: int) -> list[float]:
        """Return the seconds of each of a number of calls, after one warm-up call."""
        call()
        taken = []
        for _ in range(number):
            if self._elsewhere.size:
                self._elsewhere += 1
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        return taken


class GpuClock(Clock):
    """Timing by events on a separate stream, which is kept busy while the host prepares the call.

    The work that keeps it busy empties the L2 cache, or multiplies small matrices for warm samples. The samples
    therefore exclude the time of the host, unless the call itself waits for the device.
    """

    method = "events"

    def __init__(self, xp: Any, *, cold: bool = True) -> None:
        self._xp = xp
        self._stream = xp.cuda.Stream(non_blocking=True)
        if cold:
            properties = xp.cuda.runtime.getDeviceProperties(xp.cuda.Device().id)
            elsewhere = xp.zeros(2 * int(properties["l2CacheSize"]), numpy.uint8)
            self._delay: Call = lambda: elsewhere.fill(1)
        else:
            small = xp.ones((1024, 1024), numpy.float32)
            self._delay = lambda: xp.matmul(small, small)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with self._stream:
            yield
            self._stream.synchronize()

    def first(self, call: Call) -> tuple[float, Any]:
        self._stream.synchronize()
        start = time.perf_counter()
        result = call()
        self._stream.synchronize()
        return time.perf_counter() - start, result

    def samples(self, call: Call, number: int) -> list[float]:
        delays = self._delays_that_hide(call)

        def hidden() -> None:
            for _ in range(delays):
                self._delay()

        return self._between_events(call, number, hidden)

    def host(self, call: Call) -> float:
        """Return the seconds for which a call occupies the host; its work on the device may still be in progress."""
        taken = []
        for _ in range(4):  # the first is a warm-up
            self._stream.synchronize()
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        self._stream.synchronize()
        return float(numpy.median(taken[1:]))

    def graph(self, call: Call) -> Any:
        """Return a CUDA graph of REPEATS calls, or None if they cannot be captured."""
        call()
        self._stream.synchronize()
        try:
            self._stream.begin_capture()
            try:
                for _ in range(REPEATS):
                    call()
            finally:
                graph = self._stream.end_capture()
        except Exception:  # of any kind, from CuPy, the driver or a peer: the call needs the host
            return None
        return graph

    def replays(self, graph: Any, number: int) -> list[float]:
        """Return the seconds of one call for each of a number of replays."""
        graph.launch(self._stream)
        taken = self._between_events(lambda: graph.launch(self._stream), number, lambda: None)
        return [seconds / REPEATS for seconds in taken]

    def _between_events(self, call: Call, number: int, before_each: Call) -> list[float]:
        pairs = [(self._xp.cuda.Event(), self._xp.cuda.Event()) for _ in range(number)]
        for before, after in pairs:
            before_each()
            before.record()
            call()
            after.record()
        self._stream.synchronize()
        return [float(self._xp.cuda.get_elapsed_time(before, after)) / 1e3 for before, after in pairs]

    def _delays_that_hide(self, call: Call) -> int:
        """Return how many delays keep the device busy while the host prepares one call."""
        (once,) = self._between_events(lambda: [self._delay() for _ in range(10)], 1, lambda: None)
        return max(1, math.ceil((1.5 * self.host(call) + 20e-6) / max(once / 10, 1e-6)))


def clock_for(place: Backend, *, cold: bool | None = None) -> Clock:
    """Return the clock of a backend; by default the cache of a GPU is emptied before each sample, that of a CPU not."""
    if place.name == "cupy":
        return GpuClock(place.xp, cold=cold is not False)
    return Clock(cold=bool(cold))


def last_cache_bytes() -> int:
    """Return the bytes of the largest cache of the CPU, or 64 MiB if the system does not report them."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(path.read_text().strip().removesuffix("K")) * 1024)
    return max(sizes, default=64 * 2**20)
