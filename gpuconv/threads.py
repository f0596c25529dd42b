"""Threads of the NumPy backend.

NumPy computes on one core, except matrix products, for which BLAS has threads of its own. Copies and transforms between
the products take as long as the products. Algorithms therefore distribute their tasks to Python threads (NumPy releases
the interpreter's lock while it computes), and BLAS is limited to one thread during the call, since two kinds of threads
would wait for each other.

The number of threads of BLAS is a setting of the process. threadpoolctl changes it when the first call starts and
restores it when the last one ends. Without threadpoolctl BLAS keeps its threads, and Python uses one.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")

# Returns the core that runs the calling thread.
_core = getattr(ctypes.PyDLL(None), "sched_getcpu", None) if hasattr(os, "sched_setaffinity") else None

MOST = 256  # threads of a call
FEW, FEW_COMPLEX = 1 << 18, 1 << 12  # multiply-adds, up to which BLAS would not use several threads


class _Blas:
    """The BLAS libraries of this process, and the number of threads to which running calls limit them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.limits: list[int] = []
        self.limit: int | None = None  # the smallest of them, once it has been set
        self.before: list[int] = []  # the threads of each library without a limit
        self._libraries: list[Any] | None = None  # None: not searched for yet

    def libraries(self) -> list[Any]:
        """Return the loaded BLAS libraries that threadpoolctl finds; an empty list without threadpoolctl."""
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
        """Return a context in which no library uses more threads than this."""
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
        """Set every library to the smallest limit, if it has changed."""
        limit = min(self.limits, default=None)
        if limit == self.limit:
            return
        self.limit = limit
        for library, threads in zip(self.libraries(), self.before, strict=True):
            # Newer versions of threadpoolctl let only the first thread set OpenBLAS and silently ignore the others, to
            # avoid conflicts. There are none here, since all calls share the lock and the limits.
            set_num_threads = getattr(library, "_real_set_num_threads", library.set_num_threads)
            set_num_threads(threads if limit is None else min(threads, limit))


class _Helper(threading.Thread):
    """A helper thread. It runs one function at a time, on other cores than its caller if there are any."""

    def __init__(self) -> None:
        super().__init__(name="gpuconv", daemon=True)
        self._work: SimpleQueue[tuple[Callable[[], None], Future[None]]] = SimpleQueue()
        self._cores: set[int] = set()
        self.start()

    def run(self) -> None:
        while True:
            work, future = self._work.get()
            try:
                future.set_result(work())
            except BaseException as error:  # of any kind: the caller raises it
                future.set_exception(error)
            del work, future  # which refer to arrays

    def begin(self, work: Callable[[], None], cores: set[int]) -> Future[None]:
        """Run a function on some cores, or any if there are none, in a copy of this context (and numpy.errstate)."""
        if cores and cores != self._cores and self.native_id:
            with contextlib.suppress(OSError):  # a core was taken from this process in the meantime
                os.sched_setaffinity(self.native_id, cores)
            self._cores = cores
        future: Future[None] = Future()
        self._work.put((partial(contextvars.copy_context().run, work), future))
        return future


def _other_cores() -> set[int]:
    """Return the cores that the calling thread may use, except the one that runs it; none if the system cannot tell.

    On a virtual machine, Linux does not see that a core is idle which the host has suspended, and would wake a helper
    on the core of its caller. It would wait there for the caller, or the caller for it.
    """
    return set() if _core is None else os.sched_getaffinity(0) - {_core()}


class _Helpers:
    """The helper threads of all calls of this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.idle: list[_Helper] = []
        self.busy = 0

    def take(self, wanted: int, most: int) -> list[_Helper]:
        """Reserve idle helpers, at most as many as wanted, and return them; the caller returns them later."""
        taken: list[_Helper] = []
        if sys.is_finalizing():  # threads do not run any more
            return taken
        with self.lock:
            for _ in range(min(wanted, min(most, MOST) - 1 - self.busy)):
                try:
                    taken.append(self.idle.pop() if self.idle else _Helper())
                except RuntimeError:  # no more threads can be started
                    break
            self.busy += len(taken)
        return taken

    def give_back(self, helpers: list[_Helper]) -> None:
        with self.lock:
            self.idle += helpers
            self.busy -= len(helpers)


_blas, _helpers = _Blas(), _Helpers()


def _begin_anew() -> None:
    """Reset the state in a forked child, which has no helper threads and no running calls."""
    global _blas, _helpers
    parent, _blas, _helpers = _blas, _Blas(), _Helpers()
    if parent.limits:
        parent.limits = []
        parent.set()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def most(limit: int | None) -> int:
    """Return the number of threads that a call may use: its limit, or the cores that this process may use.

    It is 1 if nothing can limit BLAS to one thread.
    """
    return (limit or cores()) if _blas.libraries() else 1


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def held_blas() -> contextlib.AbstractContextManager[None]:
    """Return a context for a call that is not small, in which BLAS uses one thread.

    BLAS threads spin for some time after their work and would keep Python's threads from the cores. If nothing can
    limit BLAS, its threads are the only ones.
    """
    return _blas.held(1)


class _Tasks(Iterator[T]):
    """An iterator of tasks that several workers share; each task is taken once."""

    def __init__(self, tasks: Iterable[T]) -> None:
        self._tasks = iter(tasks)
        self._lock = threading.Lock()

    def __next__(self) -> T:
        with self._lock:
            return next(self._tasks)

    def close(self) -> None:
        """Drop the remaining tasks."""
        with self._lock:
            self._tasks = iter(())


def spread(tasks: Iterable[T], worker: Callable[[Iterator[T]], None], workers: int) -> None:
    """Run tasks on at most this many workers, each in a thread; the calling thread is one of them.

    ``worker(tasks)`` runs the tasks that it takes from an iterator. Which worker takes which task is not determined, so
    no result may depend on it. Tasks should be coarse: a helper takes 20 to 100 microseconds to start. Helpers that
    other calls use are not available, so there may be fewer workers. An error stops all workers and is raised here.
    """
    wanted = min(workers, len(tasks)) if isinstance(tasks, Sized) else workers
    helpers = _helpers.take(wanted - 1, workers) if wanted > 1 else []
    if not helpers:
        worker(iter(tasks))
        return
    shared = _Tasks(tasks)

    def help_out() -> None:
        with contextlib.closing(shared):
            worker(shared)

    started: list[Future[None]] = []
    try:
        with _blas.held(1):
            try:
                cores = _other_cores()
                started += (helper.begin(help_out, cores) for helper in helpers)
                with contextlib.closing(shared):
                    worker(shared)
            finally:
                errors = [_error(future) for future in started]
    finally:
        _helpers.give_back(helpers)
    for error in filter(None, errors):
        raise error


def _error(future: Future[None]) -> BaseException | None:
    """Wait until a helper has finished, and return its error, or that of the wait (an interrupt)."""
    try:
        return future.exception()
    except BaseException as interrupt:
        return _error(future) or interrupt
