"""A call made again on NumPy: the functions that it came to the first time, on the arrays of the new one.

Finding out what to do takes longer than to do it where there is little to compute, and keeps other threads waiting
where there is much. What a call does follows from its settings and from how its arrays lie in memory; so a tape stands
in the place of numpy and writes down each function with its arguments: as parts of the caller's arrays, of the result
and of the workspace. The next call of the kind is a look-up, some views, and those functions, on as many threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain, count, pairwise
from typing import Any, NamedTuple, TypeVar

import numpy

from gpuconv import threads, workspace
from gpuconv.arguments import Shape
from gpuconv.backend import Array, address

T = TypeVar("T")

SILENCE = partial(numpy.errstate, over="ignore", invalid="ignore")
# Functions that do nothing but write into their last argument, ``out``.
_WRITERS = ("matmul", "add", "multiply", "maximum", "conjugate", "tanh", "sum")
_STEP_BYTES = 1 << 10  # about what a step takes
_ALIGNMENT = 64  # bytes: where each workspace begins


class View(NamedTuple):
    """A part of an array, or of the workspace."""

    whole: int  # its number among the arrays of the call, the workspace of all, and that of a thread
    shape: Shape
    dtype: numpy.dtype
    offset: int  # bytes
    strides: Shape


class Step(NamedTuple):
    """A function, with views in the place of arrays."""

    function: Callable[..., Any]
    values: tuple[Any, ...]
    out: View | None = None  # where it writes, if that is no plain argument
    is_question: bool = False  # the further steps are right where it answers True

    def run(self, wholes: Sequence[Array]) -> None:
        values = [
            numpy.ndarray(value[1], value[2], wholes[value[0]], value[3], value[4]) if type(value) is View else value
            for value in self.values
        ]
        if self.out is None:
            answer = self.function(*values)
            if self.is_question and not answer:
                raise _GoesAnotherWayError
        else:
            whole, shape, dtype, offset, strides = self.out
            self.function(*values, out=numpy.ndarray(shape, dtype, wholes[whole], offset, strides))


class _GoesAnotherWayError(Exception):
    """The arrays hold something that other steps are for."""


class Shared(NamedTuple):
    """Tasks for several threads, each of which has a part of the workspace, and first makes some steps of its own."""

    workers: int
    first: Sequence[Step]
    tasks: Sequence[Sequence[Step]]
    base: int  # bytes of the buffer before the parts
    size: int  # bytes of a part

    def run(self, wholes: Sequence[Array]) -> None:
        numbers = count()

        def work(tasks: Iterator[Sequence[Step]]) -> None:
            mine = wholes[-1][self.base + next(numbers) * self.size :] if self.size else None
            own = (*wholes, mine)
            for steps in chain((self.first,), tasks):
                for step in steps:
                    step.run(own)

        threads.spread(self.tasks, work, self.workers)


class Replay(NamedTuple):
    """All that a call does."""

    steps: Sequence[Step | Shared]
    orders: Sequence[Shape | None]  # of the axes of each array, in which it is contiguous, unless it is so as it lies
    space: int  # bytes of workspace
    limit: int
    size: int  # steps in all
    is_silent: bool  # about numbers that overflow, or are none
    empty: Callable[[], Array]

    def run(self, xp: Any, arrays: list[Array | None]) -> Array | None:
        """Does it; the last of the arrays is the result, None for a new one. None where it goes another way now."""
        if arrays[-1] is None:
            arrays[-1] = self.empty()
        buffer = workspace.buffer(self.space, self.limit) if self.space else None
        in_order = zip(arrays, self.orders, strict=True)
        contiguous = (array if array is None or order is None else array.transpose(order) for array, order in in_order)
        wholes = [*contiguous, buffer]
        try:
            with SILENCE() if self.is_silent else nullcontext():
                for step in self.steps:
                    step.run(wholes)
        except _GoesAnotherWayError:
            return None
        if buffer is not None:
            workspace.keep(buffer)
        return arrays[-1]


class _Scene:
    """What one thread has done, and the workspaces that it has."""

    def __init__(self, whole: int, outer: _Scene | None = None) -> None:
        self.whole, self.outer = whole, outer
        self.steps: list[Any] = []
        self.spaces: list[tuple[int, int, int]] = []  # (address, bytes, offset)
        self.top = self.most = 0

    def took(self, workspaces: Sequence[Array]) -> None:
        for space in workspaces:
            self.spaces.append((address(space), space.nbytes, self.top))
            self.top += -(-space.nbytes // _ALIGNMENT) * _ALIGNMENT
        self.most = max(self.most, self.top)

    def gave_back(self, number: int) -> None:
        for _ in range(number):
            self.top = self.spaces.pop()[2]

    def place(self, where: int) -> tuple[int, int] | None:
        """The workspace and the offset in it that an address is in, if it is in one."""
        for start, size, offset in reversed(self.spaces):
            if 0 <= where - start < size:
                return self.whole, offset + where - start
        return self.outer.place(where) if self.outer is not None else None


class Tape:
    """numpy for one call, which writes down what it does."""

    lib = numpy.lib

    def __init__(self, arrays: Sequence[Array | None], limit: int) -> None:
        """``limit``: how many bytes it may take; a call of more steps is not made again."""
        self._wholes = arrays
        self._most_steps = limit // _STEP_BYTES
        self._constants: list[Array] = []
        self._views: dict[View, View] = {}
        self._main = _Scene(len(arrays))
        self._local = threading.local()
        self._local.scene = self._main
        self._count = 0
        self._is_silent = False
        self._orders = [None if array is None or array.flags.c_contiguous else _order(array) for array in arrays]
        dense = (
            array is None or array.flags.c_contiguous or array.transpose(order).flags.c_contiguous
            for array, order in zip(arrays, self._orders, strict=True)
        )
        self._is_whole = all(dense) and _are_apart(arrays)

    @property
    def _scene(self) -> _Scene:
        scene: _Scene = self._local.scene
        return scene

    # What stands in the place of numpy.

    def __getattr__(self, name: str) -> Any:
        """A function of numpy, written down if it is known to write nowhere but into its last argument."""
        function = getattr(numpy, name)
        if name in _WRITERS:
            return partial(self._written, function)
        self.lose()
        return function

    def copyto(self, into: Array, values: Any, casting: Any = "same_kind", where: Any = True) -> None:
        """numpy.copyto."""
        numpy.copyto(into, values, casting, where)
        self._note(numpy.copyto, (into, values, casting, where))

    def asarray(self, constant: Array) -> Array:
        """An array that is the same in every call."""
        self._constants.append(constant)
        return constant

    def _written(self, function: Callable[..., Any], *inputs: Any, out: Array) -> Array:
        result = function(*inputs, out=out)
        self._note(function, inputs, out)
        return result

    # What an algorithm says beside.

    def asked(self, question: Callable[[Array], bool], array: Array, answer: bool) -> None:
        """A question on which depends what is done."""
        if not answer:
            self.lose()
        self._note(question, (array,), is_question=True)

    def silenced(self) -> None:
        """What follows says nothing of numbers that overflow, or are none."""
        self._is_silent = True

    def took(self, workspaces: Sequence[Array]) -> None:
        """Workspaces."""
        self._scene.took(workspaces)

    def gave_back(self, number: int) -> None:
        """The last of them."""
        self._scene.gave_back(number)

    def spread(self, tasks: Iterable[T], worker: Callable[[Iterator[T]], None], workers: int) -> None:
        """threads.spread."""
        if workers == 1:
            worker(iter(tasks))
            return
        outer = self._scene
        first: list[list[Any]] = []
        done: dict[int, list[Step]] = {}
        sizes: list[int] = []

        def work(mine: Iterator[tuple[int, T]]) -> None:
            self._local.scene = scene = _Scene(self._main.whole + 1, outer)

            def marked() -> Iterator[T]:
                first.append(scene.steps)
                for number, task in mine:
                    scene.steps = []
                    if self._is_whole:
                        done[number] = scene.steps
                    yield task
                scene.steps = []

            try:
                worker(marked())
            finally:
                if scene.steps:  # after the last task
                    self.lose()
                sizes.append(scene.most)
                self._local.scene = outer

        threads.spread(enumerate(tasks), work, workers)
        size = max(sizes)
        outer.steps.append(Shared(workers, first[0], [done[number] for number in sorted(done)], outer.top, size))
        outer.most = max(outer.most, outer.top + workers * size)

    def lose(self) -> None:
        """Something has happened that is not written down."""
        self._is_whole = False
        self._main.steps = []

    def replay(self, limit: int, dtype: numpy.dtype, empty: Callable[[], Array]) -> Replay | None:
        """What makes the call again, if all of it is written down; ``empty`` makes its result."""
        scene = self._main
        if not self._is_whole:
            return None
        return Replay(scene.steps, self._orders, scene.most, limit, self._count, self._is_silent, empty)

    def _note(
        self, function: Callable[..., Any], inputs: Sequence[Any], out: Any = None, is_question: bool = False
    ) -> None:
        self._count += 1
        if self._count > self._most_steps:
            self.lose()
        if self._is_whole:
            values = tuple(map(self._value, inputs))
            self._scene.steps.append(Step(function, values, None if out is None else self._value(out), is_question))

    def _value(self, value: Any) -> Any:
        """A view in the place of an array, unless that is always the same."""
        if not isinstance(value, numpy.ndarray):
            return value
        where = address(value)
        place = self._scene.place(where)
        if place is None:
            for number, whole in enumerate(self._wholes):
                if whole is not None and 0 <= where - address(whole) < whole.nbytes:
                    place = number, where - address(whole)
        if place is not None:
            view = View(place[0], value.shape, value.dtype, place[1], value.strides)
            return self._views.setdefault(view, view)
        if not any(0 <= where - address(constant) < constant.nbytes for constant in self._constants):
            self.lose()
        return value


def _order(array: Array) -> Shape:
    """The axes from the one that steps furthest on."""
    return tuple(sorted(range(array.ndim), key=lambda axis: -array.strides[axis]))


def _are_apart(arrays: Sequence[Array | None]) -> bool:
    """Whether none of the arrays overlap, so that every part is a part of one of them."""
    spans = sorted((address(array), array.nbytes) for array in arrays if array is not None)
    return all(start + size <= after for (start, size), (after, _) in pairwise(spans))
