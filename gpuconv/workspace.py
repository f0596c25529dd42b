"""Workspace: the memory that a call takes beside its result, bounded and used again by the next call."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy

from gpuconv import threads
from gpuconv.backend import Array, Backend, address

if TYPE_CHECKING:
    from gpuconv.cuda.kernel import Kernel
    from gpuconv.geometry import Geometry
    from gpuconv.replay import Recorder
    from gpuconv.tape import Tape

T = TypeVar("T")

_ALIGNMENT = 64  # bytes: a cache line
_LARGE = 256 << 20  # bytes of a buffer that nobody has asked for
_MOST_KEPT = 8  # buffers, of calls that were at work at the same time
_SMALL = 8 << 20  # multiplications and additions that one thread does faster than two
_TASK = 64 << 20  # of a task: a millisecond, beside which to start one takes no time
_TASKS, _SHORT_TASK = 16, 16 << 20  # up to so many tasks they may be shorter, so that every core has some
_SHARES = 4  # at the least

# Buffers between calls; CuPy's memory pool keeps its own. Any thread takes the last one or adds one, in one step of the
# interpreter.
_kept: list[Array] = []


class Arena:
    """One buffer for all NumPy workspaces of a call, which its threads take and give back in any order.

    It has so many bytes as soon as the first is asked for, whatever that needs, so that calls of every size find their
    pages in use; the system gives memory to pages that are written, not to a buffer.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._buffer: Array | None = None
        self._taken: list[tuple[int, int, int]] = []  # (start, stop, address) of what is in use, in order

    def take(self, size: int) -> Array:
        """Bytes of the first gap that is large enough; from elsewhere if there is none."""
        with self._lock:
            if self._buffer is None:
                self._buffer = buffer(size, self._size)
            start = 0
            for number, (begin, end, _) in enumerate((*self._taken, (self._buffer.size, 0, 0))):
                if begin - start >= size > 0:
                    part = self._buffer[start : start + size]
                    self._taken.insert(number, (start, start + size, address(part)))
                    return part
                start = end
        return numpy.empty(size, numpy.uint8)

    def give_back(self, part: Array) -> None:
        """Lets others have it; with the last part the buffer waits for the next call."""
        with self._lock:
            place = address(part)
            self._taken = [taken for taken in self._taken if taken[2] != place]
            if not self._taken and self._buffer is not None:
                keep(self._buffer)
                self._buffer = None


def buffer(size: int, limit: int) -> Array:
    """So many bytes, or as many as calls of this limit usually have: what was kept last, or a new one."""
    size = max(size, min(limit, _LARGE))
    if _kept:
        with contextlib.suppress(IndexError):  # another thread may have been faster
            kept = _kept.pop()
            if kept.size == size:
                return kept
            del kept  # before another one is made beside it
    return numpy.empty(size, numpy.uint8)


def keep(buffer: Array) -> None:
    """Keeps a buffer for the next call."""
    if len(_kept) < _MOST_KEPT:
        _kept.append(buffer)


@dataclass(frozen=True)
class Run:
    """What an algorithm works with: where it computes, how exactly, and how much memory it may take."""

    backend: Backend
    dtype: numpy.dtype  # of sums
    limit: int  # bytes
    precision: str = "ieee"  # of float32 products
    thread_limit: int | None = None  # None: the cores that this process may use
    recorder: Recorder | Tape | None = None  # of what the algorithm does, for the next call of the kind
    arena: Arena = field(default_factory=lambda: Arena(0))  # of NumPy workspaces
    is_share: bool = False  # of another one, for one of its threads

    @property
    def budget(self) -> int:
        """Elements of the dtype of the sums that fit into the limit."""
        return self.limit // self.dtype.itemsize

    def launch(self, kernel: Kernel, grid: int, block: int, arguments: Sequence[Any], shared_memory: int = 0) -> None:
        """Runs a kernel, on a backend that has them."""
        assert self.backend.launch is not None
        self.backend.launch(kernel, grid, block, arguments, shared_memory)
        if self.recorder is not None:
            self.recorder.launched(kernel, grid, block, arguments, shared_memory)

    def holds(self, question: Callable[[Array], bool], array: Array) -> bool:
        """The answer to a question about what an array holds, on which depends what is done."""
        answer = question(array)
        if self.recorder is not None:
            self.recorder.asked(question, array, answer)
        return answer

    def silence(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which nothing is said of numbers that overflow, or are none."""
        if self.recorder is not None:
            self.recorder.silenced()
        return numpy.errstate(over="ignore", invalid="ignore")

    @contextlib.contextmanager
    def workspace(self, *sizes: int) -> Iterator[list[Array]]:
        """Flat arrays of these many elements, uninitialised, valid within the context."""
        item = self.dtype.itemsize
        steps = [-(-size * item // _ALIGNMENT) * _ALIGNMENT for size in sizes]
        total = sum(steps)
        on_numpy = self.backend.name == "numpy"
        buffer = self.arena.take(total) if on_numpy else self.backend.xp.empty(total, numpy.uint8)
        arrays, start = [], 0
        for size, step in zip(sizes, steps, strict=True):
            arrays.append(buffer[start : start + size * item].view(self.dtype))
            start += step
        if self.recorder is not None:
            self.recorder.took(arrays)
        try:
            yield arrays
        finally:
            if self.recorder is not None:
                self.recorder.gave_back(len(arrays))
            if on_numpy:
                self.arena.give_back(buffer)

    @cached_property
    def threads(self) -> int:
        """How many threads may compute."""
        return threads.most(self.thread_limit) if self.backend.name == "numpy" else 1

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

    def spread(self, tasks: Iterable[T], worker: Callable[[Iterator[T]], None], workers: int) -> None:
        """Has a worker in each of so many threads take tasks and do them: threads.spread, within what the call may."""
        spread = threads.spread if self.recorder is None else self.recorder.spread
        spread(tasks, worker, min(workers, self.threads))

    def share(self, team: Team) -> Run:
        """What one of the team works with."""
        return replace(self, limit=self.limit // team.shares, thread_limit=1, is_share=True)


def is_small(geometry: Geometry) -> bool:
    """Whether a convolution is done by one thread, however many there are."""
    return geometry.multiply_adds() < _SMALL


FEWEST, LEAST = 256, 64  # positions of a task: where there are many, and where there are few


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


def shaped(flat: Array, shape: tuple[int, ...]) -> Array:
    """The beginning of a flat array in this shape."""
    return flat[: math.prod(shape)].reshape(shape)


def clear() -> None:
    """Releases all buffers that are kept."""
    _kept.clear()
