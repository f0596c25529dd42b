"""A call made again: the launches that it came to the first time, with the arrays of the new one.

What a call checks, chooses and describes to its kernels follows from its settings and from how its arrays lie in
memory. So where an algorithm does nothing but launch kernels, its launches are remembered by these; the next call of
the kind is a look-up, a result, workspace, and the launches.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy

from gpuconv.backend import Array, Backend, address

if TYPE_CHECKING:
    from gpuconv import tape
    from gpuconv.cuda.kernel import Kernel

T = TypeVar("T")

_MOST = 1 << 15  # steps of calls that are remembered; then all are forgotten
_ALIGNMENT = 64  # bytes: where each workspace begins

_known: dict[Hashable, Replay | tape.Replay | None] = {}
_remembered = 0  # steps


class Launch(NamedTuple):
    """One kernel with all but the arrays that differ from call to call."""

    again: Callable[[Sequence[Any]], None]
    arguments: tuple[Any, ...]
    arrays: tuple[tuple[int, int], ...]  # (which argument, which array: those of the call, then workspaces)


class Replay(NamedTuple):
    """A call's launches and workspaces, and what makes its result where the caller brings none."""

    launches: tuple[Launch, ...]
    spaces: tuple[int, ...]  # elements of each
    dtype: numpy.dtype  # of workspaces
    empty: Callable[[], Array]

    @property
    def size(self) -> int:
        """How many launches."""
        return len(self.launches)

    def run(self, xp: Any, arrays: list[Array | None]) -> Array:
        """Makes the launches; the last one of the arrays is the result, None for a new one."""
        if arrays[-1] is None:
            arrays[-1] = self.empty()
        result = arrays[-1]
        if self.spaces:
            arrays += self._taken(xp)
        for launch in self.launches:
            arguments = list(launch.arguments)
            for argument, array in launch.arrays:
                arguments[argument] = arrays[array]
            launch.again(arguments)
        return result

    def _taken(self, xp: Any) -> list[Array]:
        chunk = _ALIGNMENT // self.dtype.itemsize
        starts = [0]
        for size in self.spaces:
            starts.append(starts[-1] + -(-size // chunk) * chunk)
        buffer = xp.empty(starts[-1], self.dtype)
        return [buffer[start : start + size] for start, size in zip(starts, self.spaces, strict=False)]


class Recorder:
    """Listens to a call, and knows in the end whether its launches are all that it came to."""

    def __init__(self, backend: Backend, arrays: Sequence[Array | None]) -> None:
        self._backend = backend
        self._addresses = [None if array is None else address(array) for array in arrays]
        self._launches: list[Launch] = []
        self._spaces: list[int] = []
        self._is_whole = True

    def launched(self, kernel: Kernel, grid: int, block: int, arguments: Sequence[Any], shared_memory: int) -> None:
        """A launch, of which every array must begin where one of the call or a workspace does."""
        arrays = []
        for number, argument in enumerate(arguments):
            if isinstance(argument, numpy.generic) or getattr(argument, "ndim", 0) == 0:
                continue
            place = address(argument)
            if place not in self._addresses:
                self.lose()
                return
            arrays.append((number, self._addresses.index(place)))
        holes = {number for number, _ in arrays}
        constant = tuple(None if number in holes else argument for number, argument in enumerate(arguments))
        self._launches.append(Launch(self._again(kernel, grid, block, shared_memory), constant, tuple(arrays)))

    def _again(self, kernel: Kernel, grid: int, block: int, shared_memory: int) -> Callable[[Sequence[Any]], None]:
        if self._backend.again is not None:
            return self._backend.again(kernel, grid, block, shared_memory)
        assert self._backend.launch is not None
        return partial(self._backend.launch, kernel, grid, block, shared_memory=shared_memory)

    def took(self, workspaces: Sequence[Array]) -> None:
        """Workspaces; those that are given back before others are taken count like the others."""
        taken = [space for space in workspaces if space.size]
        self._addresses += map(address, taken)
        self._spaces += [space.size for space in taken]

    def asked(self, question: Callable[[Array], bool], array: Array, answer: bool) -> None:
        """A question on which depends what is done."""
        self.lose()

    def gave_back(self, number: int) -> None:
        """The last of them."""

    def spread(self, tasks: Iterable[T], worker: Callable[[Iterator[T]], None], workers: int) -> None:
        """Kernels are launched by one thread."""
        worker(iter(tasks))

    def silenced(self) -> None:
        """Kernels say nothing of numbers that overflow."""

    def lose(self) -> None:
        """Something has happened that is no launch."""
        self._is_whole = False

    def replay(self, limit: int, dtype: numpy.dtype, empty: Callable[[], Array]) -> Replay | None:
        """What makes the call again, if that was all and its workspaces stay within the limit together."""
        places = [place for place in self._addresses if place is not None]
        are_distinct = len(set(places)) == len(places)  # else nobody could tell which of them a kernel was given
        if self._is_whole and are_distinct and sum(self._spaces) * dtype.itemsize <= limit:
            return Replay(tuple(self._launches), tuple(self._spaces), dtype, empty)
        return None


def remember(key: Hashable, replay: Replay | tape.Replay | None) -> None:
    """Remembers what makes a call again, None where nothing does."""
    global _remembered
    if _remembered >= _MOST:
        clear()
    _known[key] = replay
    _remembered += 1 if replay is None else replay.size


def is_known(key: Hashable) -> bool:
    """Whether there was a call of this kind."""
    return key in _known


def known(key: Hashable) -> Replay | tape.Replay | None:
    """What was remembered for a call of this kind."""
    return _known.get(key)


def clear() -> None:
    """Forgets all."""
    global _remembered
    _known.clear()
    _remembered = 0
