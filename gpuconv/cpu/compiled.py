"""Kernels for NumPy arrays that Numba compiles when a call first needs them.

Numba is optional. Without it, and if it fails, algorithms compute with NumPy alone. Compiled code is kept on disk, in
the folder of GPUCONV_CACHE_DIR. Kernels release the interpreter's lock and run in the threads of gpuconv.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy

from gpuconv import settings

OLDEST_NUMBA = (0, 61)

_lock = threading.RLock()
_kernels: dict[tuple[Any, ...], Callable[..., None]] = {}
_failure: str | None = None  # the reason why Numba is not used any more


def why_not(dtype: numpy.dtype) -> str | None:
    """Return a reason if there are no compiled kernels for sums of this dtype, else None."""
    if dtype not in (numpy.float32, numpy.float64):
        return f"kernels compiled by Numba compute in float32 or float64, not {dtype}"
    return _failure or missing()


@lru_cache(maxsize=1)
def version() -> str | None:
    """Return the version of Numba, or None if it is not installed."""
    try:
        return None if importlib.util.find_spec("numba") is None else importlib.metadata.version("numba")
    except importlib.metadata.PackageNotFoundError:  # something else has this name
        return None


def missing() -> str | None:
    """Return a reason if Numba is not installed or too old, else None."""
    found = version()
    if found is None:
        return "it requires Numba, which is not installed (pip install numba)"
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or tuple(map(int, numbers.groups())) < OLDEST_NUMBA:
        return f"it requires Numba {'.'.join(map(str, OLDEST_NUMBA))} or later, not {found}"
    return None


def kernel(name: str, constants: tuple[int, ...], dtype: numpy.dtype) -> Callable[..., None] | None:
    """Return a kernel of vector_kernels.py, or None, after a warning, if Numba fails."""
    global _failure
    key = name, constants, dtype
    if found := _kernels.get(key):  # without waiting for the compilation of another kernel
        return found
    with _lock:
        if key not in _kernels and _failure is None:
            try:
                _kernels[key] = _compiled(*key)
            except Exception as error:  # an import, the compiler or LLVM may fail in any way
                _failure = f"Numba failed: {type(error).__name__}: {error}"
                warnings.warn(f"gpuconv computes without compiled kernels, because {_failure}", stacklevel=2)
        return _kernels.get(key)


def clear() -> None:
    """Drop the kernels; the next call loads them from the disk."""
    with _lock:
        _kernels.clear()


def _compiled(name: str, constants: tuple[int, ...], dtype: numpy.dtype) -> Callable[..., None]:
    import numba

    if numba.config.DISABLE_JIT:
        raise RuntimeError("NUMBA_DISABLE_JIT is set")
    kernels = importlib.import_module("gpuconv.cpu.vector_kernels")  # which imports Numba
    signature = kernels.signature(name, numba.from_dtype(dtype))
    function = getattr(kernels, name)(*constants)
    try:
        with _cache_in(settings.cache_folder() / "numba" / _digest(), numba.config):
            return numba.njit([signature], nogil=True, cache=True)(function)  # type: ignore[no-any-return]
    except Exception:  # the folder is read-only, full or damaged
        return numba.njit([signature], nogil=True)(function)  # type: ignore[no-any-return]


@contextlib.contextmanager
def _cache_in(folder: Path, config: Any) -> Iterator[None]:
    """Return a context in which Numba caches in a folder. What the caller compiles later is not affected."""
    folder.mkdir(parents=True, exist_ok=True)  # if that fails, Numba would cache in the folder of its sources
    before, config.CACHE_DIR = config.CACHE_DIR, str(folder)
    try:
        yield
    finally:
        config.CACHE_DIR = before


@lru_cache(maxsize=1)
def _digest() -> str:
    """Return a hash of the sources of the kernels; Numba itself compares only those of their own file."""
    names = "vector_kernels", "vectors", "vector_plan"  # which has the type of an argument
    sources = (Path(__file__).with_name(f"{name}.py").read_bytes() for name in names)
    return hashlib.sha256(b"\0".join(sources)).hexdigest()[:16]


if hasattr(os, "register_at_fork"):  # a fork waits for the compiler, whose locks nobody would release in the child
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
