"""Selection of the backend: by the arrays of a call, a context, the process or the environment.

The choice made by :func:`set_backend` is a module variable, which all threads and notebook cells share; the one made by
``with backend(...)`` is a context variable, which belongs to one thread or task.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import numpy

from gpuconv import settings
from gpuconv.arguments import Shape
from gpuconv.arrays import INSTALL_HINT, NUMPY, Array, Backend, BackendError, Kind, module_of
from gpuconv.gpu import cublas, device, launch
from gpuconv.types import BackendName
from gpuconv.views import first_byte

# In older versions, launches read a garbage pointer for None (13), and views over 2 GiB have 32-bit offsets (14.0).
OLDEST_CUPY = (14, 1, 1)

_context: ContextVar[BackendName | None] = ContextVar("gpuconv_backend", default=None)
_process: BackendName | None = None


def _checked(name: str) -> BackendName:
    choice = name.strip().lower() if isinstance(name, str) else name
    if choice not in settings.BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(settings.BACKENDS)}; got {name!r}")
    return choice


def set_backend(name: BackendName | None) -> None:
    """Set the backend of this process.

    Parameters
    ----------
    name : {"auto", "numpy", "cupy", None}
        None restores the choice by GPUCONV_BACKEND.

    Raises
    ------
    ValueError
        If the name is another one.

    Examples
    --------
    >>> set_backend("numpy")
    >>> get_backend()
    'numpy'
    >>> set_backend(None)
    """
    global _process
    _process = None if name is None else _checked(name)


def backend(name: BackendName) -> contextlib.AbstractContextManager[None]:
    """Return a context in which a backend is in force, for this thread or task only.

    Parameters
    ----------
    name : {"auto", "numpy", "cupy"}
        The backend. It takes precedence over :func:`set_backend` and GPUCONV_BACKEND.

    Returns
    -------
    context manager
        For a ``with`` statement.

    Raises
    ------
    ValueError
        If the name is another one.

    Examples
    --------
    >>> with backend("numpy"):
    ...     get_backend()
    'numpy'
    """
    return _within(_checked(name))


@contextlib.contextmanager
def _within(name: BackendName) -> Iterator[None]:
    token = _context.set(name)
    try:
        yield
    finally:
        _context.reset(token)


def selected() -> tuple[BackendName, str]:
    """Return the name of the backend in force and the setting that selected it."""
    name = _context.get()
    if name is not None:
        return name, "with backend(...)"
    if _process is not None:
        return _process, "set_backend"
    return settings.backend(), "GPUCONV_BACKEND" if os.environ.get("GPUCONV_BACKEND") else "the default"


def get_backend() -> BackendName:
    """Return the name of the backend in force.

    Returns
    -------
    str
        ``"auto"``, ``"numpy"`` or ``"cupy"``.

    Raises
    ------
    ValueError
        If GPUCONV_BACKEND decides and has another value.

    Examples
    --------
    >>> with backend("numpy"):
    ...     get_backend()
    'numpy'
    """
    return selected()[0]


def array_module() -> Any:
    """Return the module with which a script should make its arrays, so that it runs on both backends.

    Returns
    -------
    module
        ``numpy`` or ``cupy``. ``"auto"`` gives ``cupy`` if a GPU can be used, else ``numpy``.

    Raises
    ------
    ValueError
        If GPUCONV_BACKEND decides and has another value.
    BackendError
        If ``"cupy"`` is in force and cannot be used, or if the driver reports a device that CuPy cannot use.

    Examples
    --------
    >>> with backend("numpy"):
    ...     array_module().__name__
    'numpy'
    """
    name = get_backend()
    if name == "numpy":
        return numpy
    if name == "cupy":
        return cupy_backend().xp
    if importlib.util.find_spec("cupy") is None:
        if driver_devices():
            warnings.warn(
                f"this machine has a CUDA device, but CuPy is not installed: {INSTALL_HINT}",
                RuntimeWarning,
                stacklevel=2,
            )
        return numpy
    try:
        return cupy_backend().xp
    except BackendError as error:
        if driver_devices():
            raise BackendError(f"{error}; set GPUCONV_BACKEND=numpy to compute on the CPU") from error
        return numpy


@lru_cache(maxsize=1)
def cupy_backend() -> Backend:
    """Return the CuPy backend; raise BackendError if CuPy cannot compute on this machine."""
    try:
        import cupy
    except ImportError as error:
        missing = importlib.util.find_spec("cupy") is None
        what = "is not installed" if missing else f"cannot be imported ({error})"
        raise BackendError(f"backend 'cupy' needs CuPy, which {what}: {INSTALL_HINT}") from error
    try:
        # Compile and run a kernel and multiply matrices, to detect a missing driver, device, NVRTC or cuBLAS.
        square = cupy.arange(4).astype("float32").reshape(2, 2) + 1
        working = int((square @ square).sum()) == 54
    except Exception as error:
        raise BackendError(
            f"backend 'cupy' needs an NVIDIA GPU that CuPy {cupy.__version__} can use, but it cannot"
            f" ({type(error).__name__}: {error}); the driver reports {driver_devices()} device(s)."
            f" If CUDA's libraries are missing: {INSTALL_HINT}"
        ) from error
    if not working:
        raise BackendError(f"CuPy {cupy.__version__} computes wrong sums on this machine's GPU")
    return _cupy(cupy)


@lru_cache(maxsize=1)
def _cupy(cupy: Any) -> Backend:
    """Return the backend of this module; raise BackendError if it is too old."""
    release = re.match(r"(\d+)\.(\d+)\.(\d+)", cupy.__version__)
    if release is not None and tuple(map(int, release.groups())) < OLDEST_CUPY:
        oldest = ".".join(map(str, OLDEST_CUPY))
        raise BackendError(
            f"gpuconv needs CuPy {oldest} or later, and CuPy {cupy.__version__} is installed: pip install --upgrade"
            f" 'cupy-cuda12x>={oldest}', or cupy-cuda13x"
        )
    return Backend("cupy", cupy, launch.prepared, device.current, _cupy_memory, _cupy_array, cublas.matmul)


def _cupy_memory(array: Array) -> Any:
    """Return a pointer to the lowest byte of a CuPy array."""
    return array.data if array.flags.c_contiguous else array.data + first_byte(array.shape, array.strides)


def _cupy_array(shape: Shape, dtype: numpy.dtype, memory: Any, offset: int, strides: Shape) -> Array:
    """Return a part of a CuPy array, at an offset from the lowest byte."""
    return module_of("cupy").ndarray(shape, dtype, memory + offset, strides)


def driver_devices() -> int:
    """Return the number of CUDA devices that the driver reports, without CuPy; 0 without a driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def backend_for(kind: Kind) -> Backend:
    """Return the backend that computes a call whose arrays are of this kind."""
    name = get_backend()
    if name == "numpy" or (name == "auto" and kind == "numpy"):
        return NUMPY
    if name == "cupy":
        return cupy_backend()
    return _cupy(module_of("cupy"))


def backend_named(name: str | None) -> Backend:
    """Return the backend with this name, None for the one in force; "auto" is CuPy if a GPU can be used."""
    name = selected()[0] if name is None else _checked(name)
    if name == "auto":
        name = array_module().__name__
    return NUMPY if name == "numpy" else cupy_backend()
