"""How long a call takes: on the CPU by the wall clock, on a GPU between events or as a CUDA graph."""

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
PATIENCE = 4  # a row may take this many times its seconds to get enough samples
SHORT = 20e-6  # seconds below which a GPU's calls are timed as a graph of
REPEATS = 20


class Summary(NamedTuple):
    """What a row shows of its samples."""

    median: float  # seconds
    noise: float  # the interquartile range over the median

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary:
        low, median, high = numpy.percentile(samples, [25, 50, 75])
        return cls(float(median), float((high - low) / median) if median else 0.0)


def count(estimate: float, seconds: float) -> int:
    """How many samples to take of a call of about this length: 30 to 100 in this time.

    Where 30 take more than four times as long, as many as fit, one at least.
    """
    if estimate <= 0:
        return MOST
    fitting = math.floor(PATIENCE * seconds / estimate)
    return max(1, min(fitting, max(ENOUGH, min(MOST, math.floor(seconds / estimate)))))


class Clock:
    """The wall clock. With ``cold`` the caches are emptied before each sample, by writing elsewhere."""

    method = "wall clock"

    def __init__(self, *, cold: bool = False) -> None:
        self._elsewhere = numpy.zeros(2 * last_cache_bytes() if cold else 0, numpy.uint8)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """A context in which everything is timed."""
        yield

    def first(self, call: Call) -> tuple[float, Any]:
        """The seconds of one call till its result is there, and the result."""
        start = time.perf_counter()
        result = call()
        return time.perf_counter() - start, result

    def samples(self, call: Call, number: int) -> list[float]:
        """The seconds of each of so many calls, after one that is not counted."""
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
    """Events on a stream of its own, which is kept busy while the host prepares the call.

    What keeps it busy empties the L2 cache, or for warm samples multiplies small matrices. So the host's time is not
    in the samples, unless the call itself waits for the device.
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
        """The seconds that a call keeps the host, while its work goes on on the device."""
        taken = []
        for _ in range(4):  # the first is a warm-up
            self._stream.synchronize()
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        self._stream.synchronize()
        return float(numpy.median(taken[1:]))

    def graph(self, call: Call) -> Any:
        """Calls recorded as a CUDA graph; its replay, as one sample each. None where they cannot be recorded."""
        call()
        self._stream.synchronize()
        try:
            self._stream.begin_capture()
            try:
                for _ in range(REPEATS):
                    call()
            finally:
                graph = self._stream.end_capture()
        except Exception:  # whatever CuPy, the driver or a peer says: the call needs the host
            return None
        return graph

    def replays(self, graph: Any, number: int) -> list[float]:
        """The seconds of one call, of so many replays."""
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
        """How much other work lets the host be ahead of the device by one call."""
        (once,) = self._between_events(lambda: [self._delay() for _ in range(10)], 1, lambda: None)
        return max(1, math.ceil((1.5 * self.host(call) + 20e-6) / max(once / 10, 1e-6)))


def clock_for(place: Backend, *, cold: bool | None = None) -> Clock:
    """What times a backend's calls; by default a GPU's L2 cache is emptied before each sample, a CPU's are not."""
    if place.name == "cupy":
        return GpuClock(place.xp, cold=cold is not False)
    return Clock(cold=bool(cold))


def last_cache_bytes() -> int:
    """The size of the CPU's last cache, 64 MiB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(path.read_text().strip().removesuffix("K")) * 1024)
    return max(sizes, default=64 * 2**20)
