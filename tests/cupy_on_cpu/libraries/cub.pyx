# cython: language_level=3
# Replaces cupy.cuda.cub, which is linked with NVIDIA's runtime. CuPy does not require it.
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
    return None  # tells CuPy that cub did not compute the result


cpdef cub_scan(_ndarray_base arr, op):
    return None


cpdef bint _cub_device_segmented_reduce_axis_compatible(tuple axes, Py_ssize_t rank, str order) except -1:
    return False
