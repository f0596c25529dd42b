"""Replacements of modules of CuPy that are linked with NVIDIA's runtime, which would find no device.

Sorting and random numbers are computed by NumPy; all other functions raise an error.
"""

import ctypes
import importlib.machinery
import types

import numpy as np

NOT_SUPPORTED = 801  # cudaErrorNotSupported


class _Refusal:
    """A class that can also stand for a function; a call raises CuPy's error for unsupported functions."""

    def __new__(cls, *arguments, **options):
        from cupy_backends.cuda.api import runtime

        raise runtime.CUDARuntimeError(NOT_SUPPORTED)


def refusing(name):
    """Return a module in which every name is a :class:`_Refusal`."""
    module = types.ModuleType(name)

    def attribute(name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Refusal

    module.__getattr__ = attribute
    return module


def thrust():
    """Return a replacement of cupy.cuda.thrust that uses NumPy."""
    module = refusing("cupy.cuda.thrust")
    module.available = True
    module.get_build_version = lambda: 200800
    module.sort, module.argsort, module.lexsort = _sort, _argsort, _lexsort
    return module


def _array(pointer, dtype, shape):
    """Return device memory as a NumPy array, after all work has finished."""
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


def generator_api():
    """Return a replacement of cupy.random._generator_api that draws NumPy's numbers instead of cuRAND's."""
    module = refusing("cupy.random._generator_api")
    module.Generator, module.init_curand = _Generator, lambda *_: None
    return module


class _Generator:
    """A replacement of cupy.random.Generator."""

    def __init__(self, bit_generator):
        self.bit_generator = bit_generator
        self._numpy = np.random.default_rng(int(bit_generator._seed))

    def __getattr__(self, name):
        import cupy

        draw = getattr(self._numpy, name)
        return lambda *arguments, **options: cupy.asarray(draw(*arguments, **options))


class _Made:
    """A loader of an existing module."""

    def __init__(self, module):
        self.module = module

    def create_module(self, spec):
        return self.module

    def exec_module(self, module):
        pass


MODULES = {
    "cupy.cuda.thrust": thrust,
    "cupy.cuda.jitify": lambda: refusing("cupy.cuda.jitify"),
    "cupy.random._generator_api": generator_api,
}


def spec(name):
    """Return the import specification of one of MODULES."""
    return importlib.machinery.ModuleSpec(name, _Made(MODULES[name]()))
