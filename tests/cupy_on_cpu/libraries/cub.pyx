# cython: language_level=3
# In the place of cupy.cuda.cub, which NVIDIA's runtime is linked into: CuPy does without it.
from cupy._core.core cimport _ndarray_base

available = False


cdef _refuse():
    from cupy_backends.cuda.api import runtime
    raise runtime.CUDARuntimeError(801)  # cudaErrorNotSupported


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    _refuse()


cpdef cub_reduction(_ndarray_base arr, op, axis=None, dtype=None, _ndarray_base out=None, keepdims=False):
    return None  # which CuPy takes for "not by cub"


cpdef cub_scan(_ndarray_base arr, op):
    return None


cpdef bint _cub_device_segmented_reduce_axis_compatible(tuple axes, Py_ssize_t rank, str order) except -1:
    return False
