"""The backends that tests run on, what the report says of them, and the seeds."""

import collections
import ctypes
import sys

import numpy as np
import pytest
from hypothesis import settings

import gpuconv

import standin

settings.register_profile("gpuconv", deadline=None, derandomize=True)
settings.load_profile("gpuconv")


def devices_by_driver():
    """How many CUDA devices the driver reports; asked here without gpuconv, whose answer is under test."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    return 0 if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) else count.value


HAS_GPU = devices_by_driver() > 0
NO_GPU = "the driver reports no CUDA device"


class NumpyArrays:
    """How tests make a backend's arrays and look at its results."""

    name = "numpy"
    xp = np

    def asarray(self, array):
        return array

    def asnumpy(self, array):
        assert type(array) is np.ndarray
        return array


class StandinArrays:
    name = "stand-in"

    def __init__(self, module):
        self.xp = module

    def asarray(self, array):
        # Strides are kept: a stand-in array lies in memory as the NumPy array does.
        return standin.ndarray(array)

    def asnumpy(self, array):
        assert isinstance(array, standin.ndarray)
        return array._array


class CupyArrays:
    name = "cupy"

    def __init__(self):
        import cupy

        self.xp = cupy

    def asarray(self, array):
        memory = np.argsort([-abs(step) for step in array.strides], kind="stable")
        return self.xp.asarray(np.ascontiguousarray(array.transpose(memory))).transpose(np.argsort(memory))

    def asnumpy(self, array):
        assert isinstance(array, self.xp.ndarray)
        return array.get()


@pytest.fixture(
    params=["numpy", "stand-in", pytest.param("cupy", marks=[pytest.mark.gpu])],
    scope="module",
)
def arrays(request):
    """Arrays of each backend in turn. Where the driver reports a device and CuPy does not work, this fails."""
    if request.param == "numpy":
        yield NumpyArrays()
    elif request.param == "stand-in":
        with standin.installed() as module:
            yield StandinArrays(module)
    else:
        yield CupyArrays()
    gpuconv.clear_cache()


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    """No variable of the machine decides a test."""
    for variable in (*gpuconv.settings.DEFAULTS, "CUPY_TF32"):
        monkeypatch.delenv(variable, raising=False)
    gpuconv.set_backend(None)


@pytest.fixture
def rng():
    return np.random.default_rng(2024)


def pytest_collection_modifyitems(items):
    for item in items:
        backend = item.callspec.params.get("arrays", "numpy") if hasattr(item, "callspec") else "numpy"
        item.user_properties.append(("backend", "cupy" if item.get_closest_marker("gpu") else backend))
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_report_header():
    gpu = f"cupy on {devices_by_driver()} device(s)" if HAS_GPU else f"no cupy: {NO_GPU}"
    return f"gpuconv backends: numpy {np.__version__}, stand-in for cupy, {gpu}; Python {sys.version.split()[0]}"


def pytest_terminal_summary(terminalreporter):
    counts = collections.Counter()
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            counts[dict(getattr(report, "user_properties", [])).get("backend"), outcome] += 1
    terminalreporter.section("tests per backend")
    for backend in ("numpy", "stand-in", "cupy"):
        line = ", ".join(f"{counts[backend, outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
        terminalreporter.write_line(f"{backend:<9} {line}")
