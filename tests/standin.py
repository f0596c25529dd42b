"""A stand-in for CuPy on machines without a GPU: NumPy arrays in a wrapper that NumPy itself cannot touch.

Code written for NumPy alone does not survive it. Its functions take its own arrays only, as CuPy's do; whatever NumPy
function is applied to such an array raises TypeError, as it does for CuPy's; and it offers no name, and no argument,
that CuPy does not have. It proves nothing about numbers on a GPU: the tests marked gpu do.
"""

import contextlib
import importlib.machinery
import sys
import types

import numpy as np

from gpuconv.backend import NUMPY, Backend
from gpuconv.views import first_byte
from tests.emulation import launcher


class ndarray:  # noqa: N801
    __array_ufunc__ = None

    def __init__(self, array, dtype=None, memptr=None, strides=None):
        """Of an array of NumPy; or, as CuPy has it, of a shape, a dtype, a pointer and strides."""
        if memptr is not None:
            array = np.ndarray(array, dtype, memptr.memory, memptr.offset, strides)
        self._array = array

    def __array__(self, *_, **__):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Use `.get()`")

    shape = property(lambda self: self._array.shape)
    strides = property(lambda self: self._array.strides)
    dtype = property(lambda self: self._array.dtype)
    ndim = property(lambda self: self._array.ndim)
    size = property(lambda self: self._array.size)
    itemsize = property(lambda self: self._array.itemsize)
    nbytes = property(lambda self: self._array.nbytes)
    flags = property(lambda self: types.SimpleNamespace(c_contiguous=self._array.flags.c_contiguous))
    device = property(lambda self: Device(0))
    data = property(lambda self: MemoryPointer(self._array))

    def get(self):
        return np.ascontiguousarray(self._array)

    real = property(lambda self: ndarray(self._array.real))
    imag = property(lambda self: ndarray(self._array.imag))

    def __float__(self):
        return float(self._array)

    def __bool__(self):
        return bool(self._array)

    def __int__(self):
        return int(self._array)

    def __getitem__(self, index):
        return ndarray(np.asarray(self._array[index]))

    def __setitem__(self, index, value):
        self._array[index] = _inner(value)

    def __iadd__(self, other):
        self._array += _inner(other)
        return self

    def __imul__(self, other):
        self._array *= _inner(other)
        return self


def _inner(value):
    if isinstance(value, (ndarray, Device)):
        return value._array
    if isinstance(value, np.ndarray) and value.ndim:
        raise TypeError(f"Unsupported type {type(value)}")
    return value


def _method(name):
    def method(self, *arguments, **options):
        return ndarray(np.asarray(getattr(self._array, name)(*map(_inner, arguments), **options)))

    return method


for _name in (
    *("transpose", "reshape", "swapaxes", "astype", "view", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__"),
    *("__rmul__", "__matmul__", "__neg__", "__le__", "__eq__", "sum", "dot", "max", "min"),
):
    setattr(ndarray, _name, _method(_name))


class MemoryPointer:
    """A place in the memory of an array, which reaches from its first element, or what lies lower, to the last."""

    def __init__(self, array, offset=None):
        self.memory = NUMPY.memory(array)
        self.offset = -first_byte(array.shape, array.strides) if offset is None else offset
        self.ptr = array.__array_interface__["data"][0]
        self._array = array

    def __add__(self, offset):
        moved = MemoryPointer(self._array, self.offset + offset)
        moved.ptr = self.ptr + offset
        return moved


def prepared(kernel, grid, block, given, shared_memory=0):
    """What the stand-in has in the place of gpuconv.cuda.launch.prepared."""
    launch = launcher.prepared(kernel, grid, block, given, shared_memory)
    return lambda *given: launch(*(array._array if isinstance(array, ndarray) else array for array in given))


class Device:
    def __init__(self, number=0):
        self.id = number

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def _function(name, module=np):
    def function(*arguments, **options):
        inner = {key: _inner(value) for key, value in options.items()}
        result = getattr(module, name)(*map(_inner, arguments), **inner)
        return options["out"] if options.get("out") is not None else ndarray(np.asarray(result))

    return function


def _as_strided(x, shape, strides):
    return ndarray(np.lib.stride_tricks.as_strided(_inner(x), shape, strides))


def empty(shape, dtype=float):
    """New memory, filled with NaN so that what nobody sets is noticed."""
    array = np.empty(shape, dtype)
    array.reshape(-1).view(np.uint8)[...] = 0xFF
    return ndarray(array)


def asarray(value):
    return value if isinstance(value, ndarray) else ndarray(np.array(value))


def _copyto(target, source, casting="same_kind", where=True):
    np.copyto(_inner(target), _inner(source), casting, _inner(where))


def backend(module):
    """Where kernels that take the stand-in's arrays run on the CPU."""
    return Backend("cupy", module, prepared)


@contextlib.contextmanager
def installed():
    """The stand-in as ``import cupy`` finds it."""
    module = types.ModuleType("cupy")
    module.__version__ = "stand-in"
    module.__spec__ = importlib.machinery.ModuleSpec("cupy", None)
    module.ndarray, module.asarray = ndarray, asarray
    module.may_share_memory = lambda a, b: np.may_share_memory(_inner(a), _inner(b))
    module.shares_memory = lambda a, b: np.shares_memory(_inner(a), _inner(b))
    module.empty = empty
    module.copyto = _copyto
    module.lib = types.SimpleNamespace(stride_tricks=types.SimpleNamespace(as_strided=_as_strided))
    transforms = ("rfftn", "irfftn", "fftn", "ifftn")
    module.fft = types.SimpleNamespace(**{name: _function(name, np.fft) for name in transforms})
    types_of_products = types.SimpleNamespace(COMPUTE_TYPE_TF32=7, COMPUTE_TYPE_DEFAULT=1)
    module._core = types.SimpleNamespace(
        get_compute_type=lambda _: 1, set_compute_type=lambda *_: None, _routines_linalg=types_of_products
    )
    for name in (
        *("zeros", "arange", "matmul", "dot", "add", "multiply", "maximum", "tanh", "exp", "negative", "divide"),
        *("ascontiguousarray", "conjugate", "isfinite", "sum", "all"),
    ):
        setattr(module, name, _function(name))
    before = sys.modules.get("cupy")
    sys.modules["cupy"] = module
    try:
        yield module
    finally:
        if before is None:
            del sys.modules["cupy"]
        else:
            sys.modules["cupy"] = before
