"""The machine, versions and settings that affect the execution of a call: ``gpuconv.show_config``."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform

import numpy

from gpuconv import settings, threads
from gpuconv.arrays import NUMPY, Backend, BackendError
from gpuconv.backends import cupy_backend, driver_devices, selected
from gpuconv.cpu import compiled
from gpuconv.version import __version__


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
    """Return the machine and the software versions of a backend."""
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
    """Return the values that :func:`show_config` prints, by name."""
    name, source = selected()
    facts = {
        **build(NUMPY),
        "Python": platform.python_version(),
        "Numba": _numba_facts(),
        "CUDA devices (driver)": str(driver_devices()),
        "CuPy": _cupy_facts(),
        "backend": f"{name} (from {source})",
    }
    for variable, default in settings.DEFAULTS.items():
        facts[variable] = os.environ.get(variable) or f"unset ({default})"
    return facts


def _numba_facts() -> str:
    found, missing = compiled.version(), compiled.missing()
    if found is None:
        return "not installed (it compiles kernels for depthwise, grouped and small layers)"
    return f"{found} (unused: {missing})" if missing else found


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
    """Return the name of the processor, as the operating system reports it."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
