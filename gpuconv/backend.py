"""Where a call computes: on NumPy or on CuPy, as the arrays, a context, the process or the environment ask.

CuPy is imported only when a caller hands in its arrays or asks for it by name, so that ``import gpuconv`` costs a
machine without a GPU nothing. The choice made by :func:`set_backend` is a plain module variable, seen by every
thread and notebook cell; the one made by ``with backend(...)`` is a context variable, seen by nobody else.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy

from gpuconv import settings, threads
from gpuconv.arguments import Shape
from gpuconv.cuda import device
from gpuconv.dtypes import native
from gpuconv.views import first_byte

Array: TypeAlias = Any  # numpy.ndarray or cupy.ndarray
Kind: TypeAlias = Literal["numpy", "cupy"]

# Before, launches read a garbage pointer for None (13), and views of over 2 GiB have offsets of 32 bits (14.0).
OLDEST_CUPY = (14, 1, 1)

INSTALL_HINT = "pip install 'gpuconv[cuda12]', or 'gpuconv[cuda13]' for a CUDA 13 driver"


class BackendError(RuntimeError):
    """The backend that was asked for cannot be used on this machine."""


class _Span:
    """All bytes from the first to the last that an array of NumPy reaches, as another one that keeps it alive."""

    def __init__(self, array: numpy.ndarray) -> None:
        place, is_read_only = array.__array_interface__["data"]
        size = array.itemsize + sum((n - 1) * abs(step) for n, step in zip(array.shape, array.strides, strict=True))
        place += first_byte(array.shape, array.strides)
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (size,), "data": (place, is_read_only)}
        self.array = array


def _numpy_memory(array: numpy.ndarray) -> Any:
    """What numpy.ndarray makes parts of an array from."""
    return array if array.flags.c_contiguous or not array.size else numpy.asarray(_Span(array))


class Backend(NamedTuple):
    """An array module, what prepares the launch of a CUDA kernel on its arrays, and on which device.

    ``launch(kernel, grid, block, arguments, shared_memory)`` checks the arguments, which may be views, and gives a
    function of arrays in their place; it is None where there are no kernels. ``memory(array)`` is what
    ``array(shape, dtype, memory, offset, strides)`` makes parts of an array from, at an offset in bytes from the lowest
    one. ``matmul(left, right, out, planner)`` plans products of matrices where the module's own is not taken.
    """

    name: str
    xp: Any
    launch: Callable[..., Callable[..., None]] | None
    device: Callable[[], device.Device] = lambda: device.MODEL
    memory: Callable[[Array], Any] = _numpy_memory
    array: Callable[..., Array] = numpy.ndarray
    matmul: Callable[..., None] | None = None

    @property
    def kind(self) -> Kind:
        """The kind of its arrays."""
        return "cupy" if self.name == "cupy" else "numpy"

    def is_captured(self) -> bool:
        """Whether a CUDA graph records what the current stream is given, instead of computing it now."""
        return self.name == "cupy" and self.xp.cuda.get_current_stream().is_capturing()


NUMPY = Backend("numpy", numpy, None)

_context: ContextVar[str | None] = ContextVar("gpuconv_backend", default=None)
_process: str | None = None


def _checked(name: str) -> str:
    choice = name.strip().lower() if isinstance(name, str) else name
    if choice not in settings.BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(settings.BACKENDS)}; got {name!r}")
    return choice


def set_backend(name: str | None) -> None:
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


def backend(name: str) -> contextlib.AbstractContextManager[None]:
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
def _within(name: str) -> Iterator[None]:
    token = _context.set(name)
    try:
        yield
    finally:
        _context.reset(token)


def _selected() -> tuple[str, str]:
    """The backend's name and what chose it."""
    name = _context.get()
    if name is not None:
        return name, "with backend(...)"
    if _process is not None:
        return _process, "set_backend"
    return settings.backend(), "GPUCONV_BACKEND" if os.environ.get("GPUCONV_BACKEND") else "the default"


def get_backend() -> str:
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
    return _selected()[0]


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
    """The CuPy backend, once CuPy has been seen to compute; BackendError where it cannot."""
    try:
        import cupy
    except ImportError as error:
        missing = importlib.util.find_spec("cupy") is None
        what = "is not installed" if missing else f"cannot be imported ({error})"
        raise BackendError(f"backend 'cupy' needs CuPy, which {what}: {INSTALL_HINT}") from error
    try:
        # Compiles and runs a kernel and multiplies matrices: finds a missing driver, device, NVRTC or cuBLAS.
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
    """The backend of this module; BackendError where it is too old."""
    from gpuconv.cuda import cublas, launch

    release = re.match(r"(\d+)\.(\d+)\.(\d+)", cupy.__version__)
    if release is not None and tuple(map(int, release.groups())) < OLDEST_CUPY:
        oldest = ".".join(map(str, OLDEST_CUPY))
        raise BackendError(
            f"gpuconv needs CuPy {oldest} or later, and CuPy {cupy.__version__} is installed: pip install --upgrade"
            f" 'cupy-cuda12x>={oldest}', or cupy-cuda13x"
        )
    return Backend("cupy", cupy, launch.prepared, device.current, _cupy_memory, _cupy_array, cublas.matmul)


def _cupy_memory(array: Array) -> Any:
    """A pointer to the lowest byte of an array of CuPy."""
    return array.data if array.flags.c_contiguous else array.data + first_byte(array.shape, array.strides)


def _cupy_array(shape: Shape, dtype: numpy.dtype, memory: Any, offset: int, strides: Shape) -> Array:
    """A part of such an array."""
    return module_of("cupy").ndarray(shape, dtype, memory + offset, strides)


def driver_devices() -> int:
    """How many CUDA devices the driver reports, asked without CuPy; 0 without a driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def kind_of(**arrays: Array) -> Kind:
    """Whether these arguments are NumPy's or CuPy's arrays; TypeError or ValueError, by name, where they do not fit."""
    if set(map(type, arrays.values())) == {numpy.ndarray}:
        return "numpy"
    kinds = {name: _kind(name, array) for name, array in arrays.items()}
    (first, kind), *others = kinds.items()
    for name, other in others:
        if other != kind:
            raise TypeError(
                f"arrays of a call must be of one kind, but {first} is a {kind}.ndarray and {name} a {other}.ndarray"
            )
    if kind == "cupy":
        devices = [array.device.id for array in arrays.values()]
        for name, device in zip(kinds, devices, strict=True):
            if device != devices[0]:
                raise ValueError(
                    f"arrays of a call must be on one device, but {first} is on {devices[0]} and {name} on {device}"
                )
    return kind


def _kind(name: str, array: Array) -> Kind:
    if type(array) in (numpy.ndarray, numpy.memmap):
        return "numpy"
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, getattr(cupy, "ndarray", ())):
        return "cupy"
    found = f"{type(array).__module__}.{type(array).__qualname__}".removeprefix("builtins.")
    raise TypeError(
        f"{name} must be a numpy.ndarray or a cupy.ndarray, not {found}; numpy.asarray({name}) may make one of it"
    )


def backend_for(kind: Kind) -> Backend:
    """The backend that computes a call whose arrays are of this kind."""
    name = get_backend()
    if name == "numpy" or (name == "auto" and kind == "numpy"):
        return NUMPY
    if name == "cupy":
        return cupy_backend()
    return _cupy(module_of("cupy"))


def moved(array: Array, kind: str) -> Array:
    """The array as NumPy's or CuPy's, itself where it is one already."""
    if isinstance(array, numpy.ndarray):
        if kind == "numpy":
            return array
        import cupy

        return cupy.asarray(array.astype(array.dtype.newbyteorder("="), copy=False))
    return array if kind == "cupy" else array.get()


def backend_named(name: str | None) -> Backend:
    """The backend with this name, None for the one in force; "auto" is CuPy's where a GPU can be used."""
    name = _selected()[0] if name is None else _checked(name)
    if name == "auto":
        name = array_module().__name__
    return NUMPY if name == "numpy" else cupy_backend()


def module_of(kind: Kind) -> Any:
    """numpy or cupy, for a kind that arrays of this process have."""
    return numpy if kind == "numpy" else sys.modules["cupy"]


def address(array: Array) -> int:
    """Where an array's first element lies in its memory."""
    return int(array.__array_interface__["data"][0] if isinstance(array, numpy.ndarray) else array.data.ptr)


def addressable(array: Array) -> Array:
    """The array, or a copy where kernels cannot read and write it: in the machine's byte order, and aligned.

    Complex numbers, too, are moved as a whole; NumPy calls them aligned where their parts are.
    """
    is_aligned = address(array) % array.itemsize == 0
    if is_aligned and array.dtype.isnative and not any(s % array.itemsize for s in array.strides):
        return array
    return array.astype(native(array.dtype))


def device_of(array: Array) -> contextlib.AbstractContextManager[Any]:
    """A context in which the array's device is the current one."""
    return contextlib.nullcontext() if isinstance(array, numpy.ndarray) else array.device  # type: ignore[no-any-return]


def show_config() -> None:
    """Print versions, the backend in force and its origin, devices, and environment variables.

    Examples
    --------
    >>> show_config()  # doctest: +ELLIPSIS
    gpuconv...
    """
    for name, value in config().items():
        print(f"{name:<26}{value}")


def build(place: Backend) -> dict[str, str]:
    """The machine and the versions of what computes on a backend."""
    from gpuconv import __version__

    if place.name != "numpy":
        return {"gpuconv": __version__, place.name: place.xp.__version__, "device": str(place.device())}
    blas = numpy.show_config(mode="dicts")["Build Dependencies"]["blas"]  # type: ignore[index, call-overload]
    return {
        "gpuconv": __version__,
        "NumPy": f"{numpy.__version__} ({blas['name']} {blas.get('version', '')})",
        "CPU": cpu_name(),
        "cores": str(threads.cores()),
    }


def config() -> dict[str, str]:
    """What :func:`show_config` prints, by name."""
    name, source = _selected()
    facts = {
        **build(NUMPY),
        "Python": platform.python_version(),
        "CUDA devices (driver)": str(driver_devices()),
        "CuPy": _cupy_facts(),
        "backend": f"{name} (from {source})",
    }
    for variable, default in settings.DEFAULTS.items():
        facts[variable] = os.environ.get(variable) or f"unset ({default})"
    return facts


def _cupy_facts() -> str:
    if importlib.util.find_spec("cupy") is None:
        return "not installed"
    try:
        cupy = cupy_backend().xp
    except BackendError as error:
        return f"not usable: {error}"
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    device = f"{properties['name'].decode()}, compute capability {properties['major']}.{properties['minor']}"
    driver, runtime = cupy.cuda.runtime.driverGetVersion(), cupy.cuda.runtime.runtimeGetVersion()
    return f"{cupy.__version__} on {device} (driver API {driver}, runtime {runtime})"


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
