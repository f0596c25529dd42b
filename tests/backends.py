"""The backends that tests run on: their names, their arrays, and the conversion of results."""

import contextlib
import ctypes
import os
from unittest import mock

import numpy as np
import pytest

import gpuconv
from gpuconv import execute
from gpuconv.arrays import NUMPY
from gpuconv.backends import cupy_backend
from gpuconv.gpu import params
from tests.emulation import launcher, loader


def devices_by_driver():
    """Return the number of CUDA devices that the driver reports, without gpuconv, whose answer is under test."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    return 0 if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) else count.value


HAS_GPU = devices_by_driver() > 0
IS_CUPY_ON_CPU = "GPUCONV_CUPY_ON_CPU" in os.environ
NO_GPU = "the driver reports no CUDA device"
NO_EMULATION = loader.why_not()
BACKENDS = ("numpy", "emulated", *(["cupy"] if HAS_GPU else []))
MARKS = {"emulated": pytest.mark.emulated, "checked": pytest.mark.checked, "cupy": pytest.mark.gpu}
ON_CPU = {"emulated", "checked", *(["cupy"] if IS_CUPY_ON_CPU else [])}  # their kernels run on the CPU


def marks_of(backend):
    """Return the marks of a test on a backend, which name what it needs of the machine."""
    return [MARKS[backend]] if backend in MARKS else []


def on(*backends):
    """Parametrize ``arrays`` of a test with backends."""
    chosen = [pytest.param(name, marks=marks_of(name)) for name in backends if name in BACKENDS]
    return pytest.mark.parametrize("arrays", chosen, indirect=True)


def backend_of(item):
    """Return the backend of a test, according to its parameter or its markers."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    marked = (name for name, mark in MARKS.items() if item.get_closest_marker(mark.name))
    return params.get("arrays") or next(marked, "numpy")


def why_not(item):
    """Return why this machine cannot run a test, according to its markers, or None."""
    if item.get_closest_marker("gpu") and not HAS_GPU:
        return NO_GPU
    if item.get_closest_marker("emulated") or item.get_closest_marker("checked"):
        return NO_EMULATION
    return None


class NumpyArrays:
    """Arrays of a backend: conversion from NumPy and to NumPy."""

    name = "numpy"
    xp = np
    backend = NUMPY

    def asarray(self, array):
        return array

    def asnumpy(self, array):
        assert type(array) is np.ndarray
        return array

    def varied(self, wide=True):
        """Enter a context that changes everything that may differ between calls."""
        return contextlib.nullcontext()


class EmulatedArrays(NumpyArrays):
    """NumPy arrays, with the CUDA kernels emulated on the CPU."""

    name = "emulated"
    backend = launcher.EMULATED

    @contextlib.contextmanager
    def varied(self, wide=True):
        """Enter a context with orders of threads and blocks other than natural, early copies, and 64-bit offsets."""
        order = ("reverse", "random")[next(launcher.options.seed) % 2]
        with launcher.using(order=order, late_copies=False), _wide(wide):
            yield


def in_memory(array):
    """Return the axes of an array in decreasing order of their strides."""
    return np.argsort([-abs(step) for step in array.strides], kind="stable")


class CupyArrays(NumpyArrays):
    name = "cupy"

    def __init__(self):
        import cupy

        self.xp = cupy
        self.backend = cupy_backend()

    def asarray(self, array):
        memory = in_memory(array)
        return self.xp.asarray(np.ascontiguousarray(array.transpose(memory))).transpose(np.argsort(memory))

    def asnumpy(self, array):
        assert isinstance(array, self.xp.ndarray)
        memory = in_memory(array)
        return array.transpose(memory).get().transpose(np.argsort(memory))  # avoids a copy kernel

    def varied(self, wide=True):
        """Enter a context with 64-bit offsets."""
        return _wide(wide)


@contextlib.contextmanager
def _wide(wide):
    """Enter a context with 64-bit offsets, also for calls whose plans are cached."""
    with mock.patch.object(params, "is_wide", return_value=True) if wide else contextlib.nullcontext():
        execute.clear()
        yield
        execute.clear()


@contextlib.contextmanager
def arrays_of(backend):
    """Enter a context with the arrays of a backend; "checked" is "emulated" with every access checked.

    Fails if the driver reports a device and CuPy does not work.
    """
    if backend == "numpy":
        yield NumpyArrays()
    elif backend == "cupy":
        yield CupyArrays()
    else:
        mode = "checked" if backend == "checked" else launcher.options.mode
        with (
            mock.patch.object(gpuconv.execute, "backend_for", return_value=launcher.EMULATED),
            launcher.using(order="natural", mode=mode),
        ):
            yield EmulatedArrays()
