"""gpuconv: convolution forward and backward for plain NumPy and CuPy arrays."""

__version__ = "0.1.0"

from gpuconv.backend import BackendError, array_module, backend, get_backend, set_backend, show_config
from gpuconv.choose import ALGORITHMS
from gpuconv.conv import (
    Gradients,
    clear_cache,
    conv,
    conv_backward,
    conv_data_grad,
    conv_transpose,
    conv_transpose_backward,
    conv_weight_grad,
)
from gpuconv.cuda.compiler import CompileError
from gpuconv.explanation import Explanation, explain
from gpuconv.linear_operator import linear_operator
from gpuconv.sparse import conv_matrix
from gpuconv.tune import Tuned, tune

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
