"""Overhead of the interfaces around gpuconv for a tiny call, for pytest-benchmark: ``pytest bench/bench_clients.py``.

"bare autograd.Function" is the minimum that autograd requires: gpuconv.conv inside a Function that saves nothing.
"""

import numpy as np
import pytest

import gpuconv
from gpuconv.compat import cupy_cudnn

X, W, Y = np.ones((1, 8, 16, 16), "f"), np.ones((8, 8, 3, 3), "f"), np.empty((1, 8, 16, 16), "f")


def through_gpuconv():
    return lambda: gpuconv.conv(X, W, padding=1, out=Y)


def through_cupy_cudnn():
    return lambda: cupy_cudnn.convolution_forward(X, W, None, Y, (1, 1), (1, 1), (1, 1), 1)


def through_linear_operator():
    operator, x = gpuconv.linear_operator(W, X.shape, padding=1), X.ravel()
    return lambda: operator.matvec(x)


def through_torch(needs=True):
    torch = pytest.importorskip("torch")
    from gpuconv.torch import conv

    x, w = torch.from_numpy(X), torch.from_numpy(W.copy()).requires_grad_(needs)
    return lambda: conv(x, w, padding=1)


def through_a_bare_function():
    torch = pytest.importorskip("torch")

    class Bare(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            return torch.from_numpy(gpuconv.conv(x.numpy(), w.detach().numpy(), padding=1))

    x, w = torch.from_numpy(X), torch.from_numpy(W.copy()).requires_grad_()
    return lambda: Bare.apply(x, w)


WAYS = {
    "gpuconv": through_gpuconv,
    "cupy_cudnn": through_cupy_cudnn,
    "linear_operator": through_linear_operator,
    "torch without gradients": lambda: through_torch(needs=False),
    "torch": through_torch,
    "bare autograd.Function": through_a_bare_function,
}


@pytest.mark.parametrize("way", WAYS)
def bench_clients(way, benchmark):
    benchmark(WAYS[way]())
