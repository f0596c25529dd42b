"""What the layers around gpuconv add to a tiny call, for pytest-benchmark: ``pytest bench/bench_clients.py``."""

import numpy as np
import pytest

import gpuconv
from gpuconv.compat import cupy_cudnn

X, W, Y = np.ones((1, 8, 16, 16), "f"), np.ones((8, 8, 3, 3), "f"), np.empty((1, 8, 16, 16), "f")


def through_gpuconv():
    gpuconv.conv(X, W, padding=1, out=Y)


def through_cupy_cudnn():
    cupy_cudnn.convolution_forward(X, W, None, Y, (1, 1), (1, 1), (1, 1), 1)


def through_linear_operator():
    operator, x = gpuconv.linear_operator(W, X.shape, padding=1), X.ravel()
    return lambda: operator.matvec(x)


def through_torch():
    torch = pytest.importorskip("torch")
    from gpuconv.torch import conv

    x, w = torch.from_numpy(X), torch.from_numpy(W).requires_grad_()
    return lambda: conv(x, w, padding=1)


@pytest.mark.parametrize("way", ["gpuconv", "cupy_cudnn", "linear_operator", "torch"])
def bench_clients(way, benchmark):
    call = {
        "gpuconv": lambda: through_gpuconv,
        "cupy_cudnn": lambda: through_cupy_cudnn,
        "linear_operator": through_linear_operator,
        "torch": through_torch,
    }[way]()
    benchmark(call)
