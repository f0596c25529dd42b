"""The threads of the NumPy backend: tasks on every core that this process may use.

NumPy computes on one core, but for matrix products, which BLAS spreads over threads of its own. What lies between the
products, copies and transforms, takes as long as they do. So the tasks of an algorithm go to several Python threads
(NumPy lets go of the interpreter's lock while it computes), and BLAS keeps to one thread meanwhile: two kinds of
threads at once would wait for each other.

The setting of BLAS counts for the whole process. It is changed when the first call needs it and restored when the
last one has ended, through threadpoolctl; where that is missing BLAS keeps its threads, and Python takes one.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

MOST = 256  # threads of a pool, which starts them when they are needed
FEW = 1 << 18  # multiplications and additions that BLAS would not share


class _Blas:
    """The BLAS libraries of this process, and how many threads those who are computing let them have."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.limits: list[int] = []
        self.limit: int | None = None  # the least of them, once it has been set
        self.before: list[int] = []  # the threads of each library when nobody limits them
        self._libraries: list[Any] | None = None  # None: not looked for yet

    def libraries(self) -> list[Any]:
        """Those that are loaded, by threadpoolctl; none without it."""
        if self._libraries is None:
            try:
                from threadpoolctl import ThreadpoolController
            except ImportError:
                self._libraries = []
            else:
                self._libraries = ThreadpoolController().select(user_api="blas").lib_controllers
        return self._libraries

    @contextlib.contextmanager
    def held(self, limit: int) -> Iterator[None]:
        """A context in which no library takes more threads than this."""
        with self.lock:
            if not self.limits:
                self.before = [library.num_threads for library in self.libraries()]
            self.limits.append(limit)
            self.set()
        try:
            yield
        finally:
            with self.lock:
                self.limits.remove(limit)
                self.set()

    def set(self) -> None:
        """Gives every library the threads that all let it have, where that has changed."""
        limit = min(self.limits, default=None)
        if limit == self.limit:
            return
        self.limit = limit
        for library, threads in zip(self.libraries(), self.before, strict=True):
            # Newer threadpoolctl lets only the thread that was first set OpenBLAS, and passes over others in silence,
            # lest they fight. Here they do not: the lock and the limits are all calls' together.
            set_num_threads = getattr(library, "_real_set_num_threads", library.set_num_threads)
            set_num_threads(threads if limit is None else min(threads, limit))


class _Helpers:
    """The threads beside those that call: for all calls of the process together."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pool = ThreadPoolExecutor(MOST, "gpuconv")
        self.busy = 0

    def take(self, wanted: int, most: int) -> int:
        """How many of the wanted ones are idle; they are the caller's until it gives them back."""
        with self.lock:
            taken = max(0, min(wanted, most - 1 - self.busy))
            self.busy += taken
        return taken

    def give_back(self, helpers: int) -> None:
        with self.lock:
            self.busy -= helpers


_blas, _helpers = _Blas(), _Helpers()


def _begin_anew() -> None:
    """In a forked child: it has none of the threads, nobody who computes, and BLAS as it was at that moment."""
    global _blas, _helpers
    parent, _blas, _helpers = _blas, _Blas(), _Helpers()
    if parent.limits:
        parent.limits = []
        parent.set()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def most(limit: int | None) -> int:
    """How many threads a call may take: its limit, or where there is none the cores that this process may use.

    1 where nothing can hold BLAS to one thread.
    """
    return (limit or cores()) if _blas.libraries() else 1


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def held_blas() -> contextlib.AbstractContextManager[None]:
    """A context for a call that is not small, in which BLAS takes no threads of its own.

    They would go on waiting for more work long after theirs, and keep Python's threads from the cores. Where nothing
    can hold BLAS, its threads are all there are.
    """
    return _blas.held(1)


class _Tasks(Iterator[T]):
    """Tasks that several workers take, each of them once."""

    def __init__(self, tasks: Iterable[T]) -> None:
        self._tasks = iter(tasks)
        self._lock = threading.Lock()

    def __next__(self) -> T:
        with self._lock:
            return next(self._tasks)

    def close(self) -> None:
        """Leaves no task for anyone."""
        with self._lock:
            self._tasks = iter(())


def spread(tasks: Iterable[T], worker: Callable[[Iterator[T]], None], workers: int) -> None:
    """Has tasks done by so many workers at most, each in a thread of its own, the caller's among them.

    ``worker(tasks)`` does the tasks that it takes from an iterator; who takes which is left to chance, so no result may
    depend on it. Coarse tasks only: to start a helper takes 20 to 100 microseconds. Helpers that other calls of this
    process have at work are theirs, so there may be fewer, or none. An error ends the work of all, and is raised here.
    """
    wanted = min(workers, len(tasks)) if isinstance(tasks, Sized) else workers
    helpers = _helpers.take(wanted - 1, workers) if wanted > 1 else 0
    if not helpers:
        worker(iter(tasks))
        return
    shared = _Tasks(tasks)

    def help_out() -> None:
        with contextlib.closing(shared):
            worker(shared)

    try:
        with _blas.held(1):
            started = [future for _ in range(helpers) if (future := _started(help_out))]
            try:
                with contextlib.closing(shared):
                    worker(shared)
            finally:
                errors = [future.exception() for future in started]
    finally:
        _helpers.give_back(helpers)
    for error in filter(None, errors):
        raise error


def _started(work: Callable[[], None]) -> Future[None] | None:
    """Work in a thread of its own, with a copy of this one's context (numpy.errstate is there), or None."""
    try:
        return _helpers.pool.submit(contextvars.copy_context().run, work)
    except RuntimeError:  # no more threads can be had, or the interpreter is about to end
        return None
