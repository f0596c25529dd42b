"""Workspace: the memory that a call uses in addition to its result. On NumPy it is kept for the next call."""

from __future__ import annotations

from typing import Any

import numpy

from gpuconv.arrays import Backend

_LINE = 64  # bytes of a cache line
_MOST_KEPT = 8  # buffers, one for each of several concurrent calls

# Buffers kept between calls; CuPy has its own memory pool. Threads need no lock, because pop and append are atomic in
# the interpreter.
_kept: list[Any] = []
_in_graphs: list[Any] = []  # memory of CuPy that CUDA graphs use whenever they are launched


def take(backend: Backend, size: int, limit: int) -> Any:
    """Return a buffer of at least ``size`` bytes; on NumPy the kept one if it has at most ``limit`` bytes."""
    if backend.name != "numpy":
        return new(backend, size)
    try:
        kept = _kept.pop()
    except IndexError:  # there is none, or another thread was faster
        return new(backend, size)
    if size <= kept.size <= max(size, limit):
        return kept
    del kept  # free it before another one is allocated
    return new(backend, size)


def new(backend: Backend, size: int) -> Any:
    """Return a new buffer. NumPy's arrays may begin inside a cache line, where vectors would lie in two lines."""
    if backend.name != "numpy":
        return backend.memory(backend.xp.empty(size, numpy.uint8))
    memory = numpy.empty(size + _LINE - 1, numpy.uint8)
    start = -memory.ctypes.data % _LINE
    return memory[start : start + size]


def give_back(backend: Backend, memory: Any) -> None:
    """Keep the buffer for the next call."""
    if backend.name == "numpy" and len(_kept) < _MOST_KEPT:
        _kept.append(memory)


def keep_for_graphs(memories: list[Any]) -> None:
    """Keep the memory of a call that a CUDA graph has recorded; the pool would reuse it otherwise."""
    _in_graphs.extend(memory for memory in memories if memory is not None)


def clear() -> None:
    """Release all kept buffers."""
    _kept.clear()
    _in_graphs.clear()
