"""A small call made again on NumPy: the functions that it came to the first time, on the arrays of the new one.

Where there is little to compute, finding out what to do takes many times as long as doing it. What a call does follows
from its settings and from how its arrays lie in memory; so a tape stands in the place of numpy and writes down each
function with its arguments: as parts of the caller's arrays, of the result and of the workspace. The next call of the
kind is a look-up, some views, and those functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy

from gpuconv import workspace
from gpuconv.arguments import Shape
from gpuconv.backend import Array, address

# Functions that do nothing but write into their last argument, ``out``.
_WRITERS = ("matmul", "add", "multiply", "maximum", "conjugate", "tanh")


class View(NamedTuple):
    """A part of an array, or of the workspace."""

    whole: int  # its number among the arrays of the call; the workspace is the last
    shape: Shape
    dtype: numpy.dtype
    offset: int  # bytes
    strides: Shape

    def of(self, wholes: Sequence[Array]) -> Array:
        return numpy.ndarray(self.shape, self.dtype, wholes[self.whole], self.offset, self.strides)


class Step(NamedTuple):
    """A function, and which of the values it takes."""

    function: Callable[..., Any]
    values: tuple[int, ...]
    out: int | None = None  # where it writes, if that is no plain argument
    expected: bool | None = None  # its answer, where the further steps depend on that


class Replay(NamedTuple):
    """All that a call does."""

    values: tuple[Any, ...]  # views, and what is always the same
    steps: tuple[Step, ...]
    space: int  # bytes of the buffer for workspaces
    empty: Callable[[], Array]

    def run(self, xp: Any, arrays: list[Array | None]) -> Array | None:
        """Does it; the last of the arrays is the result, None for a new one. None where it goes another way now."""
        if arrays[-1] is None:
            arrays[-1] = self.empty()
        buffer = workspace.buffer(self.space) if self.space else None
        wholes = (*arrays, buffer)
        values = [value.of(wholes) if type(value) is View else value for value in self.values]
        for function, numbers, out, expected in self.steps:
            arguments = [values[number] for number in numbers]
            answer = function(*arguments) if out is None else function(*arguments, out=values[out])
            if expected is not None and answer != expected:
                return None
        if buffer is not None:
            workspace.keep(buffer)
        return arrays[-1]


class Tape:
    """numpy for one call, which writes down what it does."""

    lib = numpy.lib

    def __init__(self, arrays: Sequence[Array | None]) -> None:
        self._wholes = list(arrays)
        self._buffer: Array | None = None
        self._values: dict[tuple[type, Any], int] = {}
        self._steps: list[Step] = []
        self._is_whole = all(array is None or array.flags.c_contiguous for array in arrays) and _are_apart(arrays)

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

    def asked(self, question: Callable[[Array], bool], array: Array, answer: bool) -> None:
        """A question on which depends what is done."""
        self._note(question, (array,), expected=answer)

    def took(self, workspaces: Sequence[Array]) -> None:
        """Workspaces: parts of one buffer, unless that had no room for them."""
        for space in filter(len, workspaces):
            if self._buffer is None:
                self._buffer = space.base
            elif space.base is not self._buffer:
                self.lose()

    def lose(self) -> None:
        """Something has happened that is not written down."""
        self._is_whole = False

    def replay(self, limit: int, dtype: numpy.dtype, empty: Callable[[], Array]) -> Replay | None:
        """What makes the call again, if all of it is written down; ``empty`` makes its result."""
        if not self._is_whole:
            return None
        size = 0 if self._buffer is None else self._buffer.size
        return Replay(tuple(value for _, value in self._values), tuple(self._steps), size, empty)

    def _written(self, function: Callable[..., Any], *inputs: Any, out: Array) -> Array:
        result = function(*inputs, out=out)
        self._note(function, inputs, out)
        return result

    def _note(
        self, function: Callable[..., Any], inputs: Sequence[Any], out: Any = None, expected: bool | None = None
    ) -> None:
        if self._is_whole:
            values = tuple(map(self._number, inputs))
            self._steps.append(Step(function, values, None if out is None else self._number(out), expected))

    def _number(self, value: Any) -> int:
        """The number of a value, which is a constant unless it is an array."""
        if isinstance(value, numpy.ndarray):
            view = self._view(value)
            if view is None:
                self.lose()
            value = view
        return self._values.setdefault((type(value), value), len(self._values))  # True is no 1

    def _view(self, array: Array) -> View | None:
        """An array as a part of one that the next call has too; None if it is no such part."""
        place = address(array)
        for number, whole in enumerate((*self._wholes, self._buffer)):
            if whole is not None and 0 <= (offset := place - address(whole)) < whole.nbytes:
                return View(number, array.shape, array.dtype, offset, array.strides)
        return None


def _are_apart(arrays: Sequence[Array | None]) -> bool:
    """Whether none of the arrays overlap, so that every part is a part of one of them."""
    spans = sorted((address(array), array.nbytes) for array in arrays if array is not None)
    return all(start + size <= after for (start, size), (after, _) in pairwise(spans))
