"""Execution plans: the steps of a call, and the planner with which algorithms add them.

An algorithm operates on views as if they were arrays, and calls the planner where it would call NumPy. Nothing is
computed during planning. A plan depends only on its Description (gpuconv/execute.py, which also executes plans).

    planner.call(xp.add, total, term, out=total)         a step: a function, views in place of arrays, constants
    planner.matmul(cols, weights, sums)                  products of matrices
    planner.loop(blocks, body, workers)                  the steps of body(block, planner) for each block, in threads
    planner.choose(is_finite, w, yes, no)                steps that depend on data
    planner.launch(kernel, grid, block, arguments)       a step that launches a kernel

If a loop would have more steps than a plan may hold, the steps of each task are planned when the task is executed, and
discarded afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy

from gpuconv.arguments import Shape
from gpuconv.arrays import Backend
from gpuconv.geometry import Geometry
from gpuconv.gpu.kernel import Kernel
from gpuconv.views import View, contiguous_strides

T = TypeVar("T")

# Numbers of the memories of a plan: 0 is the first operand, 1 the y of its activation, 2 and 3 are those of the second
# operand; then follow these. Higher numbers belong to the threads of loops and to deferred steps.
BIAS, RESULT, WORKSPACE = 4, 5, 6
_ALIGNMENT = 64  # bytes: a cache line
_SMALL = 16 << 20  # multiply-adds, below which one thread is about as fast as two
_TASK = 64 << 20  # multiply-adds of a task: a millisecond, compared with which the time to start it is negligible
_TASKS, _SHORT_TASK = 16, 16 << 20  # up to this many tasks may be as short as this, so that every core has some
_SHARES = 4  # minimum
FEWEST, LEAST = 256, 64  # minimum positions of a task if there are many, and if there are few

Body: TypeAlias = Callable[["Planner"], None]


class Step(NamedTuple):
    """A function call, with views in place of arrays."""

    function: Callable[..., Any]
    inputs: tuple[Any, ...]
    out: View | None = None
    name: str = ""  # in the text of a plan, if it is not the name of the function


class Deferred(NamedTuple):
    """Steps that are planned each time they are executed, with a memory of their own."""

    body: Body
    planner: Planner

    def planned(self) -> Scope:
        """Plan the steps; return them with the size of their memory."""
        scope = Scope(self.planner.scope.memory + 1, self.planner.most_steps)
        self.body(replace(self.planner, scope=scope))
        return scope


class Branch(NamedTuple):
    """Steps to execute if a predicate holds for an array (``yes``), and a fallback for the other case (``no``)."""

    question: Callable[[Any], bool]
    view: View
    yes: Steps
    no: Deferred


class Loop(NamedTuple):
    """Parts that may run concurrently and in any order, each on one of several workers with its own workspace."""

    parts: Iterable[Steps]  # can be iterated repeatedly
    number: int  # of parts
    workers: int
    memory: int  # number of the memory that contains the workspaces of the workers
    start: int  # offset of the first workspace in bytes
    size: int  # bytes of each workspace


Steps: TypeAlias = Sequence[Step | Loop | Branch | Deferred]


class Scope:
    """Steps under construction, and the part of a memory that contains their workspace."""

    def __init__(self, memory: int, room: int, start: int = 0) -> None:
        self.steps: list[Step | Loop | Branch | Deferred] = []
        self.memory, self.top, self.most = memory, start, start
        self.count, self.room = 0, room  # number of steps, those of loops included, and its maximum
        self.has_deferred = False  # whether steps of a loop are deferred, which will have a memory of their own

    def take(self, elements: int, dtype: numpy.dtype) -> View:
        """Allocate workspace and return a flat view of it."""
        view = View(self.memory, self.top, (elements,), (dtype.itemsize,), dtype)
        self.top += -(-elements * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        self.most = max(self.most, self.top)
        return view

    def note(self, step: Step | Loop | Branch, count: int = 1) -> None:
        """Append a step that counts as this many."""
        self.steps.append(step)
        self.count += count


class NewArray(NamedTuple):
    """A new array for a result, C-contiguous for some order of its axes."""

    memory: Shape
    dtype: numpy.dtype
    axes: Shape | None = None  # the axis of the memory for each axis of the array; None: the same

    def empty(self, xp: Any) -> Any:
        """Return the uninitialized array."""
        array = xp.empty(self.memory, self.dtype)
        return array if self.axes is None else array.transpose(self.axes)

    @property
    def view(self) -> View:
        """The view that represents the array."""
        view = View(RESULT, 0, self.memory, contiguous_strides(self.memory, self.dtype), self.dtype)
        return view if self.axes is None else view.transpose(self.axes)


class Plan(NamedTuple):
    """The execution plan of a call."""

    algorithm: str
    names: Sequence[str]  # of the memories before the workspace
    steps: Steps
    size: int  # number of steps, those of loops included
    space: int  # bytes of workspace
    result: NewArray
    holds_blas: bool = False  # whether BLAS would otherwise use several threads for its products
    is_silent: bool = False  # whether warnings about overflow and invalid values are suppressed
    has_temporaries: bool = False  # besides the workspace, which then has at most `space` bytes

    def __repr__(self) -> str:
        heading = f"{self.algorithm}, {self.size} steps, {self.space} bytes of workspace"
        return "\n".join((heading, *_lines(self.steps, self.names, "  ")))


def _lines(steps: Steps, names: Sequence[str], indent: str) -> Iterator[str]:
    """Yield the steps as text, a line for each; of a loop, only the first part."""
    for step in steps:
        if isinstance(step, Step):
            given = [_text(value, names) for value in step.inputs]
            if step.out is not None:
                given.append(f"out={_text(step.out, names)}")
            yield f"{indent}{step.name or _text(step.function, names)}({', '.join(given)})"
        elif isinstance(step, Loop):
            yield f"{indent}in {step.workers} threads, {step.number} parts, of which the first is:"
            yield from _lines(next(iter(step.parts)), names, indent + "  ")
        elif isinstance(step, Branch):
            yield f"{indent}if {step.question.__name__}({_text(step.view, names)}):"
            yield from _lines(step.yes, names, indent + "  ")
            yield f"{indent}else:"
            yield from _lines([step.no], names, indent + "  ")
        else:
            yield f"{indent}steps that are planned when they are executed"


def _text(value: Any, names: Sequence[str]) -> str:
    """Return a view as the name of its memory, its offset in bytes and its shape, and any other value by its name."""
    if isinstance(value, View):
        name = names[value.memory] if value.memory < WORKSPACE else "workspace" + "'" * (value.memory - WORKSPACE)
        return f"{name}@{value.offset} {value.shape}"
    if isinstance(value, partial):
        return _text(value.func, names)
    if hasattr(value, "shape"):
        return f"{type(value).__name__} {value.shape}"
    return str(getattr(value, "__name__", value))


def _are_same(value: Any, view: View) -> bool:
    """Whether a value is a view of the same elements."""
    return isinstance(value, View) and _place(value) == _place(view)


def _place(view: View) -> tuple[Any, ...]:
    return view.memory, view.offset, view.shape, view.strides, view.dtype


class _DeferredParts:
    """The parts of a loop, one for each task, each planned when it is executed."""

    def __init__(self, tasks: Collection[T], body: Callable[[T, Planner], None], planner: Planner) -> None:
        self._tasks, self._body, self._planner = tasks, body, planner

    def __iter__(self) -> Iterator[Steps]:
        return ((Deferred(partial(self._body, task), self._planner),) for task in self._tasks)


@dataclass(frozen=True)
class Planner:
    """The context of an algorithm: backend, dtype of sums, workspace limit, threads, and the scope for its steps."""

    backend: Backend
    dtype: numpy.dtype  # of sums
    limit: int  # bytes
    scope: Scope
    most_steps: int  # that a deferred task may plan at a time
    precision: str = "ieee"  # of float32 products
    threads: int = 1  # that may be used
    is_share: bool = False  # whether it was made by share(), for one thread of another planner

    @property
    def xp(self) -> Any:
        """The array module whose functions are called by steps."""
        return self.backend.xp

    @property
    def budget(self) -> int:
        """The limit as a number of elements of the dtype of the sums."""
        return self.limit // self.dtype.itemsize

    # Steps.

    def call(self, function: Callable[..., Any], *inputs: Any, out: View | None = None) -> None:
        """Add a step: a function that writes into ``out``, or into its first input if ``out`` is None."""
        into = inputs[0] if out is None else out
        if not isinstance(into, View) or into.size:
            # An input that is also the result becomes one array with it: CuPy copies inputs that overlap the result.
            inputs = tuple(out if out is not None and _are_same(value, out) else value for value in inputs)
            self.scope.note(Step(function, inputs, out))

    def matmul(self, left: Any, right: Any, out: View) -> None:
        """Add steps for products of matrices or of stacks of matrices, given as views or arrays."""
        if self.backend.matmul is None:
            self.call(self.xp.matmul, left, right, out=out)
        elif out.size:
            self.backend.matmul(left, right, out, self)

    def copy(self, into: View, values: Any) -> None:
        """Add a step that copies a view or a number into a view and converts it to the dtype of that."""
        self.call(self.xp.copyto, into, values, "unsafe")

    def launch(self, kernel: Kernel, grid: int, block: int, arguments: Sequence[Any], shared_memory: int = 0) -> None:
        """Add a step that launches ``grid`` thread blocks, if any; the backend must have kernels."""
        assert self.backend.launch is not None
        if grid:
            function = self.backend.launch(kernel, grid, block, arguments, shared_memory)
            self.scope.note(Step(function, tuple(arguments), name=f"{kernel.name}<<<{grid}, {block}>>>"))

    def choose(self, question: Callable[[Any], bool], view: View, yes: Body, no: Body) -> None:
        """Add the steps of ``yes`` and ``no``; a predicate of an array selects between them on execution."""
        scope = Scope(self.scope.memory, self.scope.room - self.scope.count, self.scope.top)
        yes(replace(self, scope=scope))
        self.scope.most = max(self.scope.most, scope.most)
        later = Deferred(no, replace(self, scope=Scope(self.scope.memory, 0)))  # not with the scope of the branch
        self.scope.note(Branch(question, view, scope.steps, later), 1 + scope.count)

    def loop(self, tasks: Collection[T], body: Callable[[T, Planner], None], workers: int = 1) -> None:
        """Add the steps of ``body(task, planner)`` for each task, which are distributed to at most ``workers`` workers.

        Workspace that a task allocates is valid until the task ends. With several workers, no result may depend on
        which of them executes a task, or when.
        """
        scope, workers = self.scope, min(workers, self.threads, len(tasks))
        memory, start = (scope.memory + 1, 0) if workers > 1 else (scope.memory, scope.top)
        parts: list[Steps] = []
        count, most = 0, start
        for task in tasks:
            part = Scope(memory, scope.room - scope.count - count, start)
            body(task, replace(self, scope=part))
            parts.append(part.steps)
            count, most = count + part.count, max(most, part.most)
            scope.has_deferred |= part.has_deferred
            if scope.count + count + part.count * (len(tasks) - len(parts)) > scope.room:
                planner = replace(self, scope=Scope(memory, 0))
                scope.has_deferred = True
                scope.note(Loop(_DeferredParts(tasks, body, planner), len(tasks), workers, scope.memory, scope.top, 0))
                return
        if workers > 1:
            scope.note(Loop(parts, len(parts), workers, scope.memory, scope.top, most), count)
            scope.most = max(scope.most, scope.top + workers * most)
        else:
            for steps in parts:
                scope.steps += steps
            scope.count, scope.most = scope.count + count, max(scope.most, most)

    # Workspace and threads.

    def workspace(self, *sizes: int, dtype: numpy.dtype | None = None) -> list[View]:
        """Return uninitialized flat views with these numbers of elements, valid until the task of the loop ends."""
        return [self.scope.take(size, dtype or self.dtype) for size in sizes]

    def team(self, geometry: Geometry, least: int = 0, slowness: float = 1) -> Team:
        """Return the team for a convolution; ``least`` is the minimum workspace of each thread, in elements.

        ``slowness`` is the time of a multiply-add relative to that in a long matrix product.
        """
        work = int(slowness * geometry.multiply_adds())
        if work < _SMALL or self.is_share:
            return Team()
        # Independent of the number of threads, because the bits of a product may depend on where it is divided.
        tasks = max(2, min(_TASKS, work // _SHORT_TASK), work // _TASK)
        most = max(1, self.budget // 2 // max(1, least))  # the other half is for shared workspace
        workers = min(self.threads, tasks, most)
        return Team(workers, tasks, min(max(workers, _SHARES), most))

    def share(self, limit: int) -> Planner:
        """Return a planner for one thread, with a part of the limit."""
        return replace(self, limit=limit, threads=1, is_share=True)


class Team(NamedTuple):
    """The number of threads for a computation, and the number of tasks into which it should be divided."""

    workers: int = 1
    tasks: int = 1
    shares: int = 1  # parts of memory, for sums that should have the same bits with any number of threads

    def share(self, positions: int) -> int:
        """Return the number of positions of a task: an even share, but not so few that products become slow.

        If there are few positions in total, each of two threads still gets some.
        """
        fewest = max(LEAST, min(FEWEST, -(-positions // 2)))
        return max(fewest, -(-positions // self.tasks))


def is_small(geometry: Geometry, slowness: float = 1) -> bool:
    """Whether a convolution is computed by one thread, even if more are available; see Planner.team."""
    return int(slowness * geometry.multiply_adds()) < _SMALL
