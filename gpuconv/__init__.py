"""gpuconv: convolution forward and backward for plain NumPy and CuPy arrays."""

from gpuconv.api import (
    Gradients,
    clear_cache,
    conv,
    conv_backward,
    conv_data_grad,
    conv_transpose,
    conv_transpose_backward,
    conv_weight_grad,
)
from gpuconv.arrays import BackendError
from gpuconv.backends import array_module, backend, get_backend, set_backend
from gpuconv.config import show_config
from gpuconv.explanation import Explanation, explain
from gpuconv.gpu.compiler import CompileError
from gpuconv.operators import conv_matrix, linear_operator
from gpuconv.select import ALGORITHMS
from gpuconv.tuning import Tuned, tune
from gpuconv.version import __version__ as __version__

__all__ = [
    "ALGORITHMS",
    "BackendError",
    "CompileError",
    "Explanation",
    "Gradients",
    "Tuned",
    "array_module",
    "backend",
    "clear_cache",
    "conv",
    "conv_backward",
    "conv_data_grad",
    "conv_matrix",
    "conv_transpose",
    "conv_transpose_backward",
    "conv_weight_grad",
    "explain",
    "get_backend",
    "linear_operator",
    "set_backend",
    "show_config",
    "tune",
]
