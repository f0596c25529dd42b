"""Workspace: the memory that a call takes beside its result, bounded and used again by the next call."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy

from gpuconv.backend import Array, Backend

if TYPE_CHECKING:
    from gpuconv.cuda.kernel import Kernel
    from gpuconv.replay import Recorder

_ALIGNMENT = 64  # bytes: a cache line

_kept = threading.local()  # the NumPy buffer of this thread between calls; CuPy's memory pool keeps its own
_generation = 0  # clear_cache() cannot reach the buffers of other threads, so it makes them stale


@dataclass(frozen=True)
class Run:
    """What an algorithm works with: where it computes, how exactly, and how much memory it may take."""

    backend: Backend
    dtype: numpy.dtype  # of sums
    limit: int  # bytes
    precision: str = "ieee"  # of float32 products
    recorder: Recorder | None = None  # of what the algorithm does, for the next call of the kind

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

    @contextlib.contextmanager
    def workspace(self, *sizes: int) -> Iterator[list[Array]]:
        """Flat arrays of these many elements, uninitialised, valid within the context."""
        item = self.dtype.itemsize
        steps = [-(-size * item // _ALIGNMENT) * _ALIGNMENT for size in sizes]
        total = sum(steps)
        xp = self.backend.xp
        buffer = _taken(total) if xp is numpy else xp.empty(total, numpy.uint8)
        arrays, start = [], 0
        for size, step in zip(sizes, steps, strict=True):
            arrays.append(buffer[start : start + size * item].view(self.dtype))
            start += step
        if self.recorder is not None:
            self.recorder.took(arrays)
        try:
            yield arrays
        finally:
            if xp is numpy and buffer.size <= self.limit:
                _kept.buffer, _kept.generation = buffer, _generation


def _taken(size: int) -> Array:
    """This thread's buffer, out of reach of a nested call until it is put back, or a larger one in its place."""
    buffer, _kept.buffer = getattr(_kept, "buffer", None), None
    if buffer is not None and (buffer.size < size or _kept.generation != _generation):
        buffer = None
    return numpy.empty(size, numpy.uint8) if buffer is None else buffer


def shaped(flat: Array, shape: tuple[int, ...]) -> Array:
    """The beginning of a flat array in this shape."""
    return flat[: math.prod(shape)].reshape(shape)


def clear() -> None:
    """Releases the buffer of this thread now, and those of other threads at their next call."""
    global _generation
    _generation += 1
    _kept.buffer = None
