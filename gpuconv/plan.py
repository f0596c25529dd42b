"""Plans: what a call does, as a list of steps; and the planner to which algorithms describe them.

An algorithm works with views, as if they were arrays, and calls the planner where it would call NumPy. Nothing is
computed meanwhile. A plan depends on nothing but its description (gpuconv/execute.py), which also runs it.

    planner.call(xp.add, total, term, out=total)         a step: a function, views in the place of arrays, constants
    planner.matmul(cols, weights, sums)                  products of matrices
    planner.loop(blocks, body, workers)                  the steps of body(block, planner) for each block, by threads
    planner.choose(is_finite, w, yes, no)                steps that depend on data
    planner.launch(kernel, grid, block, arguments)       a step that launches a kernel

Where a loop would have more steps than a plan may hold, the steps of each task are planned when its turn comes, and
forgotten afterwards.
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

# The memories of a plan by their numbers: 0 the first operand, 1 the y of its activation, 2 and 3 those of the second
# one, then these. Further ones belong to the threads of loops and to deferred steps.
BIAS, RESULT, WORKSPACE = 4, 5, 6
_ALIGNMENT = 64  # bytes: a cache line
_SMALL = 8 << 20  # multiplications and additions that one thread does faster than two
_TASK = 64 << 20  # of a task: a millisecond, beside which to start one takes no time
_TASKS, _SHORT_TASK = 16, 16 << 20  # up to so many tasks they may be shorter, so that every core has some
_SHARES = 4  # at the least
FEWEST, LEAST = 256, 64  # positions of a task: where there are many, and where there are few

Body: TypeAlias = Callable[["Planner"], None]


class Step(NamedTuple):
    """A function to call, with views in the place of arrays."""

    function: Callable[..., Any]
    inputs: tuple[Any, ...]
    out: View | None = None
    name: str = ""  # in the text of a plan, where it is not the function's


class Deferred(NamedTuple):
    """Steps that are planned each time that they are needed, with a memory of their own."""

    body: Body
    planner: Planner

    def planned(self) -> Scope:
        """The steps, and how much memory they take."""
        scope = Scope(self.planner.scope.memory + 1, self.planner.most_steps)
        self.body(replace(self.planner, scope=scope))
        return scope


class Branch(NamedTuple):
    """Steps that are right where a question about an array is answered with yes, and others for where it is not."""

    question: Callable[[Any], bool]
    view: View
    yes: Steps
    no: Deferred


class Loop(NamedTuple):
    """Parts that may run in any order and at the same time, each by one of several workers with its own workspace."""

    parts: Iterable[Steps]  # again and again
    number: int  # of parts
    workers: int
    memory: int  # in which the workspaces of the workers lie
    start: int  # bytes before the first of them
    size: int  # bytes of each


Steps: TypeAlias = Sequence[Step | Loop | Branch | Deferred]


class Scope:
    """Steps in the making, and the part of a memory in which they have their workspace."""

    def __init__(self, memory: int, room: int, start: int = 0) -> None:
        self.steps: list[Step | Loop | Branch | Deferred] = []
        self.memory, self.top, self.most = memory, start, start
        self.count, self.room = 0, room  # of steps, those of loops included; and how many there may be

    def take(self, elements: int, dtype: numpy.dtype) -> View:
        """A flat view of workspace."""
        view = View(self.memory, self.top, (elements,), (dtype.itemsize,), dtype)
        self.top += -(-elements * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        self.most = max(self.most, self.top)
        return view

    def note(self, step: Step | Loop | Branch, count: int = 1) -> None:
        """Adds a step that stands for so many."""
        self.steps.append(step)
        self.count += count


class NewArray(NamedTuple):
    """An array that is made for a result: C-contiguous, or so with its axes in another order."""

    memory: Shape
    dtype: numpy.dtype
    axes: Shape | None = None  # which axis of the memory is each of the array's

    def empty(self, xp: Any) -> Any:
        """The array."""
        array = xp.empty(self.memory, self.dtype)
        return array if self.axes is None else array.transpose(self.axes)

    @property
    def view(self) -> View:
        """The view that stands for it."""
        view = View(RESULT, 0, self.memory, contiguous_strides(self.memory, self.dtype), self.dtype)
        return view if self.axes is None else view.transpose(self.axes)


class Plan(NamedTuple):
    """What a call does."""

    algorithm: str
    names: Sequence[str]  # of the memories before the workspace
    steps: Steps
    size: int  # steps, those of loops included
    space: int  # bytes of workspace
    result: NewArray
    holds_blas: bool = False  # whether BLAS would share its products among threads of its own
    is_silent: bool = False  # about numbers that overflow, or are none
    has_temporaries: bool = False  # beside its workspace, which then takes no more than its own bytes

    def __repr__(self) -> str:
        heading = f"{self.algorithm}, {self.size} steps, {self.space} bytes of workspace"
        return "\n".join((heading, *_lines(self.steps, self.names, "  ")))


def _lines(steps: Steps, names: Sequence[str], indent: str) -> Iterator[str]:
    """Steps as text, a line for each; of the parts of a loop only the first."""
    for step in steps:
        if isinstance(step, Step):
            given = [_text(value, names) for value in step.inputs]
            if step.out is not None:
                given.append(f"out={_text(step.out, names)}")
            yield f"{indent}{step.name or _text(step.function, names)}({', '.join(given)})"
        elif isinstance(step, Loop):
            yield f"{indent}in {step.workers} threads, {step.number} parts, the first of which is:"
            yield from _lines(next(iter(step.parts)), names, indent + "  ")
        elif isinstance(step, Branch):
            yield f"{indent}if {step.question.__name__}({_text(step.view, names)}):"
            yield from _lines(step.yes, names, indent + "  ")
            yield f"{indent}else:"
            yield from _lines([step.no], names, indent + "  ")
        else:
            yield f"{indent}what is planned when it is needed"


def _text(value: Any, names: Sequence[str]) -> str:
    """A view as the name of its memory, the byte at which it begins, and its shape."""
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
    """A part for each of many tasks, planned when its turn comes."""

    def __init__(self, tasks: Collection[T], body: Callable[[T, Planner], None], planner: Planner) -> None:
        self._tasks, self._body, self._planner = tasks, body, planner

    def __iter__(self) -> Iterator[Steps]:
        return ((Deferred(partial(self._body, task), self._planner),) for task in self._tasks)


@dataclass(frozen=True)
class Planner:
    """What an algorithm is given: where and how it computes, how much memory it may take, and where its steps go."""

    backend: Backend
    dtype: numpy.dtype  # of sums
    limit: int  # bytes
    scope: Scope
    most_steps: int  # that a deferred task may plan at a time
    precision: str = "ieee"  # of float32 products
    threads: int = 1  # that may compute
    is_share: bool = False  # of another one, for one of its threads

    @property
    def xp(self) -> Any:
        """The array module, whose functions steps call."""
        return self.backend.xp

    @property
    def budget(self) -> int:
        """Elements of the dtype of the sums that fit into the limit."""
        return self.limit // self.dtype.itemsize

    # Steps.

    def call(self, function: Callable[..., Any], *inputs: Any, out: View | None = None) -> None:
        """A function that writes into ``out``, or into its first input."""
        into = inputs[0] if out is None else out
        if not isinstance(into, View) or into.size:
            # An input that is the result is one array with it: of two arrays in one memory CuPy would copy one.
            inputs = tuple(out if out is not None and _are_same(value, out) else value for value in inputs)
            self.scope.note(Step(function, inputs, out))

    def matmul(self, left: Any, right: Any, out: View) -> None:
        """Products of matrices, or of stacks of them, of views and arrays."""
        if self.backend.matmul is None:
            self.call(self.xp.matmul, left, right, out=out)
        elif out.size:
            self.backend.matmul(left, right, out, self)

    def copy(self, into: View, values: Any) -> None:
        """Elements of a view, or a number, in the dtype of another."""
        self.call(self.xp.copyto, into, values, "unsafe")

    def launch(self, kernel: Kernel, grid: int, block: int, arguments: Sequence[Any], shared_memory: int = 0) -> None:
        """A launch of ``grid`` blocks of threads, if any, on a backend that has kernels."""
        assert self.backend.launch is not None
        if grid:
            function = self.backend.launch(kernel, grid, block, arguments, shared_memory)
            self.scope.note(Step(function, tuple(arguments), name=f"{kernel.name}<<<{grid}, {block}>>>"))

    def choose(self, question: Callable[[Any], bool], view: View, yes: Body, no: Body) -> None:
        """The steps of ``yes`` or of ``no``, as a question about an array is answered when the plan runs."""
        scope = Scope(self.scope.memory, self.scope.room - self.scope.count, self.scope.top)
        yes(replace(self, scope=scope))
        self.scope.most = max(self.scope.most, scope.most)
        later = Deferred(no, replace(self, scope=Scope(self.scope.memory, 0)))  # without the steps that it is among
        self.scope.note(Branch(question, view, scope.steps, later), 1 + scope.count)

    def loop(self, tasks: Collection[T], body: Callable[[T, Planner], None], workers: int = 1) -> None:
        """The steps of ``body(task, planner)`` for each task, which several workers may share.

        What a task takes of the workspace is valid until it ends. With several workers, no result may depend on which
        of them does a task, or when.
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
            if scope.count + count + part.count * (len(tasks) - len(parts)) > scope.room:
                planner = replace(self, scope=Scope(memory, 0))
                scope.note(Loop(_DeferredParts(tasks, body, planner), len(tasks), workers, scope.memory, scope.top, 0))
                return
        if workers > 1:
            scope.note(Loop(parts, len(parts), workers, scope.memory, scope.top, most), count)
            scope.most = max(scope.most, scope.top + workers * most)
        else:
            for steps in parts:
                scope.steps += steps
            scope.count, scope.most = scope.count + count, max(scope.most, most)

    # Workspace, and who shares it.

    def workspace(self, *sizes: int, dtype: numpy.dtype | None = None) -> list[View]:
        """Flat views of these many elements, uninitialised, valid until the task of a loop ends that takes them."""
        return [self.scope.take(size, dtype or self.dtype) for size in sizes]

    def team(self, geometry: Geometry, least: int = 0) -> Team:
        """Who computes a convolution; ``least``: elements that each of several threads needs at the least."""
        if is_small(geometry) or self.is_share:
            return Team()
        work = geometry.multiply_adds()
        # However many threads there are: the bits of a product may depend on where it is cut.
        tasks = max(2, min(_TASKS, work // _SHORT_TASK), work // _TASK)
        most = max(1, self.budget // 2 // max(1, least))  # the other half is for what they share
        workers = min(self.threads, tasks, most)
        return Team(workers, tasks, min(max(workers, _SHARES), most))

    def share(self, limit: int) -> Planner:
        """The same within a part of the limit, for one thread."""
        return replace(self, limit=limit, threads=1, is_share=True)


class Team(NamedTuple):
    """How many threads compute something, and into how many tasks it should be cut for them."""

    workers: int = 1
    tasks: int = 1
    shares: int = 1  # of memory, for sums that should have the same bits at any number of threads

    def share(self, positions: int) -> int:
        """Of so many outputs, or inputs, those of a task: an even share, but not so few that products get slow.

        Where there are few at all, two threads still have some each.
        """
        fewest = max(LEAST, min(FEWEST, -(-positions // 2)))
        return max(fewest, -(-positions // self.tasks))


def is_small(geometry: Geometry) -> bool:
    """Whether a convolution is done by one thread, however many there are."""
    return geometry.multiply_adds() < _SMALL
