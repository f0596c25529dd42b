"""``gpuconv bench``: layers in every direction, verified first, then timed in turns with the peers."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import gpuconv
from gpuconv import dtypes, settings, workspace
from gpuconv.arguments import LAYOUTS, Layout
from gpuconv.arrays import Array, Backend
from gpuconv.benchmark import peers, timing
from gpuconv.benchmark.layers import Case
from gpuconv.benchmark.peers.worker import Worker
from gpuconv.benchmark.problem import Problem
from gpuconv.benchmark.results import OURS, Row
from gpuconv.benchmark.timing import GpuClock
from gpuconv.geometry import DIRECTIONS, Direction
from gpuconv.request import Request
from gpuconv.select import TRANSFORMS, choose, consent

Job: TypeAlias = tuple[Case, int, str]  # a layer, its batch size and dtype

DTYPES = (*dtypes.NAMES, "tf32")
TURNS = 4
SPIN_SECONDS = 0.15  # OpenBLAS's idle threads wait for 2^28 cycles before they sleep


def kind_and_precision(dtype: str) -> tuple[str, str]:
    """The arrays' dtype and the precision of their products, for one of DTYPES."""
    return ("float32", "tf32") if dtype == "tf32" else (dtype, "ieee")


@dataclass(frozen=True)
class Plan:
    """What is run of every layer."""

    place: Backend
    directions: Sequence[Direction] = DIRECTIONS
    dtypes: Sequence[str] = ()  # none: each layer's own
    layouts: Sequence[Layout] = LAYOUTS[:1]
    algorithms: Sequence[str] = ("auto",)
    batches: Sequence[int] = ()  # none: each layer's own for this backend
    peers: Sequence[str] = ()
    seconds: float = 0.5
    cold: bool | None = None  # None: the clock's own choice

    def jobs(self, cases: Iterable[Case]) -> list[Job]:
        """Each layer with each batch size and dtype."""
        on_gpu = self.place.kind == "cupy"
        return [
            (case, batch, dtype)
            for case in cases
            for batch in self.batches or (case.batches[on_gpu],)
            for dtype in self.dtypes or (case.dtype,)
        ]


@dataclass
class Side:
    """One of those who take turns: its row as far as it is known, and how it takes samples."""

    row: dict[str, object]
    take: Callable[[int], list[float]] = lambda number: []
    call: timing.Call | None = None  # where it runs in this process
    first: float = math.inf
    samples: list[float] = field(default_factory=list)


class Bench:
    """Runs a plan; ``spent`` says what the time went into."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.clock = timing.clock_for(plan.place, cold=plan.cold)
        self.spent = dict.fromkeys(("first calls", "verifying", "peers", "measuring"), 0.0)
        self._workers: dict[str, Worker] = {}
        self._quiet = False  # whether this process has had time to come to rest

    def rows(self, jobs: Iterable[Job]) -> Iterator[list[Row]]:
        """The rows of one layer in one direction after the other, gpuconv's first, then the peers'."""
        try:
            with self.clock.running():
                for job in jobs:
                    yield from self._layer(*job)
        finally:
            for worker in self._workers.values():
                worker.close()

    def _layer(self, case: Case, batch: int, dtype: str) -> Iterator[list[Row]]:
        place = self.plan.place
        kind, precision = kind_and_precision(dtype)
        try:
            problem = Problem.of(case, batch, dtypes.named(kind), place.xp, precision)
        except (MemoryError, ValueError) as error:
            raise ValueError(f"the arrays of {case.name} at N={batch} cannot be made: {error}") from None
        for direction in self.plan.directions:
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
            sides = [
                self._ours(problem, direction, layout, algorithm, known)
                for layout in self.plan.layouts
                for algorithm in self.plan.algorithms
            ]
            sides += [
                self._peer(problem, direction, name, form, known)
                for name in self.plan.peers
                for form in peers.module(name).FORMS
            ]
            method = self._measure([side for side in sides if math.isfinite(side.first)])
            yield [Row(**side.row, samples=tuple(side.samples), method=method) for side in sides]  # type: ignore[arg-type]
        del problem
        if place.kind == "cupy":  # the next layer may need all memory
            gpuconv.clear_cache()
            place.xp.get_default_memory_pool().free_all_blocks()

    def _ours(
        self, problem: Problem, direction: Direction, layout: Layout, algorithm: str, known: dict[str, object]
    ) -> Side:
        geometry, place = problem.geometry, self.plan.place
        inner = problem.inner(direction)[0]
        side = Side({**known, "by": OURS, "layout": layout, "asked": algorithm, "algorithm": algorithm})
        side.row["command"] = self._command(known, layout, algorithm)
        try:
            lying = replace(geometry, layout=layout)
            conditions = consent(algorithm, None), settings.workspace_limit()
            choice = choose(Request(lying, problem.dtype, inner, place, *conditions), algorithm)
        except ValueError as error:
            side.row["refusal"] = str(error)
            return side
        side.row["algorithm"] = choice.algorithm
        side.call = problem.call(direction, layout, algorithm)
        try:
            seconds, result = self.clock.first(side.call)
        except Exception as error:  # whatever it is, the rows before and after are worth having
            side.row["failure"] = f"{type(error).__name__}: {error}"
            if place.kind == "cupy":
                place.xp.cuda.runtime.deviceSynchronize()  # raises where the device computes nothing any more
            return side
        self.spent["first calls"] += seconds
        loose = choice.algorithm in TRANSFORMS
        self._verify(side, problem, result, direction, layout, seconds, loose=loose)
        if isinstance(self.clock, GpuClock):
            side.row["host_seconds"] = self.clock.host(side.call)
        side.take = lambda number: self.clock.samples(side.call, number)  # type: ignore[arg-type]
        return side

    def _peer(self, problem: Problem, direction: Direction, name: str, form: str, known: dict[str, object]) -> Side:
        start = time.perf_counter()
        side = Side({**known, "by": name, "layout": form, "asked": "", "algorithm": ""})
        side.row["command"] = f"{self._command(known, LAYOUTS[0], 'auto')} --peer {name}"
        try:
            if self.plan.place.kind == "numpy":
                worker = self._worker(name)
                seconds, result = worker.first(str(known["spec"]), problem.dtype.name, direction, form)
                side.take = lambda number: worker.samples(form, number)
            else:
                seconds, result = self._in_process(side, problem, direction, name, form)
        except ValueError as error:
            side.row["refusal"] = str(error)
            return side
        finally:
            self.spent["peers"] += time.perf_counter() - start
        self._verify(side, problem, result, direction, "channels_first", seconds, loose=True)
        if not math.isfinite(side.first):
            side.row["refusal"] = f"its result is off by {side.row['of_bound']:.2g} times the bound"
        return side

    def _worker(self, name: str) -> Worker:
        if name not in self._workers:
            self._workers[name] = Worker(name, cold=bool(self.plan.cold))
        return self._workers[name]

    def _in_process(
        self, side: Side, problem: Problem, direction: Direction, name: str, form: str
    ) -> tuple[float, Array]:
        peer = peers.module(name)
        if reason := peer.why_not(problem, direction, form):
            raise ValueError(reason)
        try:
            side.call = call = peer.call(problem, direction, form)
            seconds, result = self.clock.first(call)
            found = peer.array(result, problem)
        except Exception as error:  # whatever another library says is its reason
            raise ValueError(peers.reason(error)) from error
        side.take = lambda number: self.clock.samples(call, number)
        return seconds, found

    def _verify(
        self, side: Side, problem: Problem, result: Array, direction: Direction, layout: Layout, seconds: float,
        *, loose: bool,
    ) -> None:  # fmt: skip
        start = time.perf_counter()
        verdict = problem.verdict(result, direction, layout, loose=loose)
        side.row |= {"first_seconds": seconds, **verdict._asdict()}
        if verdict.right:
            side.first = seconds
        self.spent["verifying"] += time.perf_counter() - start

    def _measure(self, sides: list[Side]) -> str:
        """Samples of all sides, in turns; what took them."""
        for side in sides:
            side.samples = self._taken(side, 1)
        if recorded := self._graphs(sides):
            return recorded
        numbers = [timing.count(side.samples[0], self.plan.seconds) for side in sides]
        turns = 1 if len(sides) < 2 else TURNS
        for turn in range(turns):
            for side, number in zip(sides, numbers, strict=True):
                if share := (number - 1) * (turn + 1) // turns - (number - 1) * turn // turns:
                    side.samples += self._taken(side, share)
        return self.clock.method

    def _graphs(self, sides: list[Side]) -> str:
        """Samples of all sides as CUDA graphs where one is short and all can be recorded, else "" and none."""
        clock = self.clock
        if not isinstance(clock, GpuClock) or not any(side.samples[0] < timing.SHORT for side in sides):
            return ""
        try:
            graphs = [clock.graph(side.call) for side in sides if side.call]
            if any(graph is None for graph in graphs):
                return ""
            for side in sides:
                side.samples = []
            for _ in range(TURNS):
                for side, graph in zip(sides, graphs, strict=True):
                    side.samples += clock.replays(graph, -(-timing.ENOUGH // TURNS))
            return "graph"
        finally:
            workspace.clear()  # which was kept for the graphs

    def _taken(self, side: Side, number: int) -> list[float]:
        start = time.perf_counter()
        elsewhere = side.call is None
        if elsewhere and not self._quiet:
            time.sleep(SPIN_SECONDS)
        self._quiet = elsewhere
        samples = side.take(number)
        self.spent["measuring" if side.row["by"] == OURS else "peers"] += time.perf_counter() - start
        return samples

    def _command(self, known: dict[str, object], layout: str, algorithm: str) -> str:
        words = ["gpuconv", "bench", "--case", str(known["spec"]), "--direction", str(known["direction"])]
        words += ["--dtype", str(known["dtype"]), "--layout", layout, "--algorithm", algorithm]
        return shlex.join([*words, "--backend", self.plan.place.kind])
