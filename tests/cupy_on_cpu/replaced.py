"""Modules of CuPy that NVIDIA's runtime is linked into, which would find no device: NumPy sorts, the rest refuses."""

import ctypes
import importlib.machinery
import types

import numpy as np


class _Refusal:
    """A class, and a function, that raises CuPy's own error for what is not supported."""

    def __new__(cls, *arguments, **options):
        from cupy_backends.cuda.api import runtime

        raise runtime.CUDARuntimeError(runtime.cudaErrorNotSupported)


def refusing(name):
    """A module that has nothing but refusals."""
    module = types.ModuleType(name)

    def attribute(name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Refusal

    module.__getattr__ = attribute
    return module


def thrust():
    """cupy.cuda.thrust, by NumPy."""
    module = refusing("cupy.cuda.thrust")
    module.available = True
    module.get_build_version = lambda: 200800
    module.sort, module.argsort, module.lexsort = _sort, _argsort, _lexsort
    return module


def _array(pointer, dtype, shape):
    """The device's memory as an array of NumPy, once all work is done."""
    from cupy.cuda import runtime

    runtime.deviceSynchronize()
    dtype = np.dtype(dtype)
    memory = (ctypes.c_char * (dtype.itemsize * int(np.prod(shape)))).from_address(pointer)
    return np.frombuffer(memory, dtype).reshape(shape)


def _sort(dtype, data, _keys, shape):
    _array(data, dtype, tuple(shape)).sort(axis=-1, kind="stable")


def _argsort(dtype, indices, data, _keys, shape):
    values = _array(data, dtype, tuple(shape))
    order = np.argsort(values, axis=-1, kind="stable")
    _array(indices, np.uintp, tuple(shape))[...] = order
    values[...] = np.take_along_axis(values, order, -1)


def _lexsort(dtype, indices, keys, count, length):
    _array(indices, np.uintp, (length,))[...] = np.lexsort(_array(keys, dtype, (count, length)))


class _Made:
    """A loader of a module that is there already."""

    def __init__(self, module):
        self.module = module

    def create_module(self, spec):
        return self.module

    def exec_module(self, module):
        pass


MODULES = {
    "cupy.cuda.thrust": thrust,
    "cupy.cuda.jitify": lambda: refusing("cupy.cuda.jitify"),
    "cupy.random._generator_api": lambda: refusing("cupy.random._generator_api"),
}


def spec(name):
    """How a module of these is imported."""
    return importlib.machinery.ModuleSpec(name, _Made(MODULES[name]()))
