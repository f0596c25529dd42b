"""DeZero's functions on gpuconv and their gradients equal the reference: ``python -m tests.clients dezero``."""

import numpy as np
import pytest
from dezero import Variable, functions

from tests import reference

WAYS = [((1, 1), (0, 0)), ((2, 1), (1, 2))]


def integers(*shape):
    return np.random.default_rng(shape).integers(-3, 4, shape).astype(float)


@pytest.mark.parametrize("stride, pad", WAYS)
@pytest.mark.parametrize("function", [functions.conv2d, functions.conv2d_simple])
def test_convolutions(function, stride, pad):
    x, w, b = (Variable(integers(*shape)) for shape in ((2, 3, 8, 7), (4, 3, 3, 2), (4,)))
    geometry = stride, [(p, p) for p in pad], (1, 1)
    y = function(x, w, b, stride, pad)
    np.testing.assert_array_equal(y.data, reference.forward(x.data, w.data, *geometry) + b.data.reshape(-1, 1, 1))
    y.grad = Variable(integers(*y.shape))
    dy = y.grad.data
    y.backward(create_graph=True)
    np.testing.assert_array_equal(x.grad.data, reference.data_grad(dy, w.data, x.shape, *geometry))
    np.testing.assert_array_equal(w.grad.data, reference.weight_grad(dy, x.data, w.shape, *geometry))
    np.testing.assert_array_equal(b.grad.data, dy.sum((0, 2, 3)))
    dx = x.grad
    w.cleargrad()
    (dx * dx).backward()  # and the gradient of a gradient
    np.testing.assert_array_equal(w.grad.data, reference.weight_grad(dy, 2 * dx.data, w.shape, *geometry))


@pytest.mark.parametrize("stride, pad", WAYS)
@pytest.mark.parametrize("extra", [0, 1])
def test_deconvolutions(stride, pad, extra):
    x, w, b = (Variable(integers(*shape)) for shape in ((2, 4, 5, 4), (4, 3, 3, 2), (3,)))
    geometry = stride, [(p, p) for p in pad], (1, 1)
    size = [(n - 1) * s + k - 2 * p for n, s, k, p in zip(x.shape[2:], stride, w.shape[2:], pad, strict=True)]
    size[0] += extra * (stride[0] - 1)
    y = functions.deconv2d(x, w, b, stride, pad, tuple(size) if extra else None)
    expected = reference.data_grad(x.data, w.data, (2, 3, *size), *geometry) + b.data.reshape(-1, 1, 1)
    np.testing.assert_array_equal(y.data, expected)
    dy = integers(*y.shape)
    y.grad = Variable(dy)
    y.backward()
    np.testing.assert_array_equal(x.grad.data, reference.forward(dy, w.data, *geometry))
    np.testing.assert_array_equal(w.grad.data, reference.weight_grad(x.data, dy, w.shape, *geometry))
    np.testing.assert_array_equal(b.grad.data, dy.sum((0, 2, 3)))
