"""``gpuconv bench``: verify layers in every direction, then time them, alternating with the peers."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import gpuconv
from gpuconv import dtypes, settings, workspace
from gpuconv.arguments import LAYOUTS
from gpuconv.arrays import Array, Backend
from gpuconv.benchmark import peers, timing
from gpuconv.benchmark.layers import Case
from gpuconv.benchmark.peers.worker import Worker
from gpuconv.benchmark.problem import Problem, Verdict
from gpuconv.benchmark.results import OURS, Row
from gpuconv.benchmark.timing import GpuClock
from gpuconv.geometry import DIRECTIONS
from gpuconv.request import Request
from gpuconv.select import TRANSFORMS, choose, consent
from gpuconv.types import Direction, Layout

Job: TypeAlias = tuple[Case, int, str]  # a layer, its batch size and dtype

DTYPES = (*dtypes.NAMES, "tf32")
TURNS = 4
SPIN_SECONDS = 0.15  # idle threads of OpenBLAS spin for 2^28 cycles before they sleep


def kind_and_precision(dtype: str) -> tuple[str, str]:
    """Return the dtype of the arrays and the precision of their products, for one of DTYPES."""
    return ("float32", "tf32") if dtype == "tf32" else (dtype, "ieee")


@dataclass(frozen=True)
class Schedule:
    """The measurements to make for every layer."""

    place: Backend
    directions: Sequence[Direction] = DIRECTIONS
    dtypes: Sequence[str] = ()  # empty: the dtype of each layer
    layouts: Sequence[Layout] = LAYOUTS[:1]
    algorithms: Sequence[str] = ("auto",)
    batches: Sequence[int] = ()  # empty: the batch size of each layer for this backend
    peers: Sequence[str] = ()
    seconds: float = 0.5
    cold: bool | None = None  # None: the default of the clock

    def jobs(self, cases: Iterable[Case]) -> list[Job]:
        """Return every combination of layer, batch size and dtype."""
        on_gpu = self.place.kind == "cupy"
        return [
            (case, batch, dtype)
            for case in cases
            for batch in self.batches or (case.batches[on_gpu],)
            for dtype in self.dtypes or (case.dtype,)
        ]


@dataclass
class Contender:
    """One of the implementations that are timed alternately: its row so far, and the function that takes samples."""

    row: dict[str, object]
    take: Callable[[int], list[float]] = lambda number: []
    call: timing.Call | None = None  # None if it runs in another process
    first: float = math.inf
    samples: list[float] = field(default_factory=list)


class Bench:
    """The execution of a schedule. ``spent`` has the seconds of each activity."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.clock = timing.clock_for(schedule.place, cold=schedule.cold)
        self.spent = dict.fromkeys(("first calls", "verifying", "peers", "measuring"), 0.0)
        self._workers: dict[str, Worker] = {}
        self._quiet = False  # whether the idle threads of this process have stopped spinning

    def rows(self, jobs: Iterable[Job]) -> Iterator[list[Row]]:
        """Yield the rows of one layer and direction at a time, those of gpuconv before those of the peers."""
        try:
            with self.clock.running():
                for job in jobs:
                    yield from self._layer(*job)
        finally:
            for worker in self._workers.values():
                worker.close()

    def _layer(self, case: Case, batch: int, dtype: str) -> Iterator[list[Row]]:
        place = self.schedule.place
        kind, precision = kind_and_precision(dtype)
        try:
            problem = Problem.of(case, batch, dtypes.named(kind), place.xp, precision)
        except (MemoryError, ValueError) as error:
            raise ValueError(f"the arrays of {case.name} at N={batch} cannot be made: {error}") from None
        for direction in self.schedule.directions:
            known = {
                "case": case.name,
                "suites": case.suites,
                "spec": case.text(batch),
                "batch": batch,
                "direction": direction,
                "dtype": dtype,
                "backend": place.name,
                "flops": problem.geometry.flops(is_complex=dtypes.is_complex(problem.dtype)),
                "bytes": problem.geometry.bytes(problem.dtype.itemsize),
            }
            contenders = [
                self._ours(problem, direction, layout, algorithm, known)
                for layout in self.schedule.layouts
                for algorithm in self.schedule.algorithms
            ]
            contenders += [
                self._peer(problem, direction, name, form, known)
                for name in self.schedule.peers
                for form in peers.module(name).FORMS
            ]
            method = self._measure([contender for contender in contenders if math.isfinite(contender.first)])
            yield [Row(**contender.row, samples=tuple(contender.samples), method=method) for contender in contenders]  # type: ignore[arg-type]
        del problem
        if place.kind == "cupy":  # the next layer may need all the memory
            gpuconv.clear_cache()
            place.xp.get_default_memory_pool().free_all_blocks()

    def _ours(
        self, problem: Problem, direction: Direction, layout: Layout, algorithm: str, known: dict[str, object]
    ) -> Contender:
        geometry, place = problem.geometry, self.schedule.place
        inner = problem.inner(direction)[0]
        contender = Contender({**known, "by": OURS, "layout": layout, "asked": algorithm, "algorithm": algorithm})
        contender.row["command"] = self._command(known, layout, algorithm)
        try:
            lying = replace(geometry, layout=layout)
            conditions = consent(algorithm, None), settings.workspace_limit()
            choice = choose(Request(lying, problem.dtype, inner, place, *conditions), algorithm)
        except ValueError as error:
            contender.row["refusal"] = str(error)
            return contender
        contender.row["algorithm"] = choice.algorithm
        contender.call = problem.call(direction, layout, algorithm)
        try:
            seconds, result = self.clock.first(contender.call)
        except Exception as error:  # of any kind: the other rows are still useful
            contender.row["failure"] = f"{type(error).__name__}: {error}"
            if place.kind == "cupy":
                place.xp.cuda.runtime.deviceSynchronize()  # raises if the device is no longer usable
            return contender
        self.spent["first calls"] += seconds
        loose = choice.algorithm in TRANSFORMS
        self._verify(contender, seconds, lambda: problem.verdict(result, direction, layout, loose=loose))
        if isinstance(self.clock, GpuClock):
            contender.row["host_seconds"] = self.clock.host(contender.call)
        contender.take = lambda number: self.clock.samples(contender.call, number)  # type: ignore[arg-type]
        return contender

    def _peer(
        self, problem: Problem, direction: Direction, name: str, form: str, known: dict[str, object]
    ) -> Contender:
        start = time.perf_counter()
        contender = Contender({**known, "by": name, "layout": form, "asked": "", "algorithm": ""})
        contender.row["command"] = f"{self._command(known, LAYOUTS[0], 'auto')} --peer {name}"
        try:
            if self.schedule.place.kind == "numpy":
                worker = self._worker(name)
                seconds, result = worker.first(str(known["spec"]), problem.dtype.name, direction, form)
                contender.take = lambda number: worker.samples(form, number)
            else:
                seconds, result = self._in_process(contender, problem, direction, name, form)
        except ValueError as error:
            contender.row["refusal"] = str(error)
            return contender
        finally:
            self.spent["peers"] += time.perf_counter() - start
        self._verify(contender, seconds, lambda: problem.verdict(result, direction, loose=True))
        if not math.isfinite(contender.first):
            contender.row["refusal"] = f"the error of its result is {contender.row['of_bound']:.2g} times the bound"
        return contender

    def _worker(self, name: str) -> Worker:
        if name not in self._workers:
            self._workers[name] = Worker(name, cold=bool(self.schedule.cold))
        return self._workers[name]

    def _in_process(
        self, contender: Contender, problem: Problem, direction: Direction, name: str, form: str
    ) -> tuple[float, Array]:
        peer = peers.module(name)
        if reason := peer.why_not(problem, direction, form):
            raise ValueError(reason)
        try:
            contender.call = call = peer.call(problem, direction, form)
            seconds, result = self.clock.first(call)
            found = peer.array(result, problem)
        except Exception as error:  # any error of a peer is a refusal
            raise ValueError(peers.reason(error)) from error
        contender.take = lambda number: self.clock.samples(call, number)
        return seconds, found

    def _verify(self, contender: Contender, seconds: float, judge: Callable[[], Verdict]) -> None:
        start = time.perf_counter()
        verdict = judge()
        contender.row |= {"first_seconds": seconds, **verdict._asdict()}
        if verdict.right:
            contender.first = seconds
        self.spent["verifying"] += time.perf_counter() - start

    def _measure(self, contenders: list[Contender]) -> str:
        """Take samples of all contenders, alternating between them, and return the method."""
        for contender in contenders:
            contender.samples = self._taken(contender, 1)
        if recorded := self._graphs(contenders):
            return recorded
        numbers = [timing.count(contender.samples[0], self.schedule.seconds) for contender in contenders]
        turns = 1 if len(contenders) < 2 else TURNS
        for turn in range(turns):
            for contender, number in zip(contenders, numbers, strict=True):
                if share := (number - 1) * (turn + 1) // turns - (number - 1) * turn // turns:
                    contender.samples += self._taken(contender, share)
        return self.clock.method

    def _graphs(self, contenders: list[Contender]) -> str:
        """Take samples of all contenders as CUDA graphs if one call is short and all can be captured.

        Returns the method, or "" if no samples were taken.
        """
        clock = self.clock
        if not isinstance(clock, GpuClock) or not any(contender.samples[0] < timing.SHORT for contender in contenders):
            return ""
        try:
            graphs = [clock.graph(contender.call) for contender in contenders if contender.call]
            if any(graph is None for graph in graphs):
                return ""
            for contender in contenders:
                contender.samples = []
            for _ in range(TURNS):
                for contender, graph in zip(contenders, graphs, strict=True):
                    contender.samples += clock.replays(graph, -(-timing.ENOUGH // TURNS))
            return "graph"
        finally:
            workspace.clear()  # it was kept for the graphs

    def _taken(self, contender: Contender, number: int) -> list[float]:
        start = time.perf_counter()
        elsewhere = contender.call is None
        if elsewhere and not self._quiet:
            time.sleep(SPIN_SECONDS)
        self._quiet = elsewhere
        samples = contender.take(number)
        self.spent["measuring" if contender.row["by"] == OURS else "peers"] += time.perf_counter() - start
        return samples

    def _command(self, known: dict[str, object], layout: str, algorithm: str) -> str:
        words = ["gpuconv", "bench", "--case", str(known["spec"]), "--direction", str(known["direction"])]
        words += ["--dtype", str(known["dtype"]), "--layout", layout, "--algorithm", algorithm]
        return shlex.join([*words, "--backend", self.schedule.place.kind])
