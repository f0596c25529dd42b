"""Compare the layers of the course and the articles with textbook loops."""

import itertools

import numpy as np
import pytest

from gpuconv.compat import cs231n, nhwc


def loops(x, w, b, s, p):
    """Compute forward and backward for NCHW by the four nested loops of textbooks."""
    (n, _, h, wide), (f, _, hh, ww) = x.shape, w.shape
    padded = np.pad(x, ((0, 0), (0, 0), (p[0], p[0]), (p[1], p[1])))
    outputs = (h + 2 * p[0] - hh) // s[0] + 1, (wide + 2 * p[1] - ww) // s[1] + 1
    y = np.zeros((n, f, *outputs))
    for i, j, k, m in itertools.product(range(n), range(f), range(outputs[0]), range(outputs[1])):
        y[i, j, k, m] = (padded[i, :, k * s[0] : k * s[0] + hh, m * s[1] : m * s[1] + ww] * w[j]).sum() + b[j]

    def backward(dy):
        dx, dw = np.zeros_like(padded), np.zeros_like(w)
        for i, j, k, m in itertools.product(range(n), range(f), range(outputs[0]), range(outputs[1])):
            window = np.s_[i, :, k * s[0] : k * s[0] + hh, m * s[1] : m * s[1] + ww]
            dx[window] += dy[i, j, k, m] * w[j]
            dw[j] += dy[i, j, k, m] * padded[window]
        return dx[:, :, p[0] : p[0] + h, p[1] : p[1] + wide], dw, dy.sum((0, 2, 3))

    return y, backward


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("pad", [0, 1, 2])
def test_cs231n_equals_the_loops(stride, pad, rng):
    x, w, b = (rng.integers(-3, 4, s).astype(float) for s in ((2, 3, 8, 7), (4, 3, 4, 3), (4,)))
    y, cache = cs231n.conv_forward(x, w, b, {"stride": stride, "pad": pad})
    exact, backward = loops(x, w, b, (stride, stride), (pad, pad))
    np.testing.assert_array_equal(y, exact)
    dout = rng.integers(-3, 4, y.shape).astype(float)
    for mine, theirs in zip(cs231n.conv_backward(dout, cache), backward(dout), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_cs231n_has_the_names_of_the_assignments():
    assert cs231n.conv_forward_naive is cs231n.conv_forward_fast is cs231n.conv_forward
    assert cs231n.conv_backward_naive is cs231n.conv_backward_fast is cs231n.conv_backward


def test_cs231n_refuses_what_it_cannot_read():
    x, w, b = np.ones((2, 3, 5, 5)), np.ones((4, 3, 3, 3)), np.ones(4)
    with pytest.raises(ValueError, match="conv_param must have 'stride' and 'pad'"):
        cs231n.conv_forward(x, w, b, {"stride": 1})
    with pytest.raises(TypeError, match="conv_param must be a dict with 'stride' and 'pad', got None"):
        cs231n.conv_forward(x, w, b, None)
    with pytest.raises(TypeError, match=r"pad must be made of ints, got 1\.5"):
        cs231n.conv_forward(x, w, b, {"stride": 1, "pad": 1.5})
    with pytest.raises(ValueError, match="dout must have the shape"):
        cs231n.conv_backward(x, (x, w, b, {"stride": 1, "pad": 0}))
    with pytest.raises(ValueError, match="x must have 4 axes"):
        cs231n.conv_forward(x[0], w, b, {"stride": 1, "pad": 0})


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 3)])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 3), (5, 3), (2, 4)])
def test_nhwc_equals_the_loops(kernel, stride, padding, rng):
    x, w, b = (rng.integers(-3, 4, s).astype(float) for s in ((2, 7, 8, 3), (*kernel, 3, 4), (1, 1, 1, 4)))
    pads = [int(np.ceil(((s - 1) * n - s + k) / 2)) for s, n, k in zip(stride, x.shape[1:3], kernel, strict=True)]
    if padding == "valid":
        pads = [0, 0]
    channels_first = np.moveaxis(x, -1, 1), w.transpose(3, 2, 0, 1), b.reshape(-1)
    exact, backward = loops(*channels_first, stride, pads)
    y = nhwc.conv_forward(x, w, b, None, padding, stride)
    np.testing.assert_array_equal(y, np.moveaxis(exact, 1, -1))
    if padding == "same" and all(k % 2 for k in kernel):
        assert y.shape[1:3] == x.shape[1:3]
    dz = rng.integers(-3, 4, y.shape).astype(float)
    dx, dw, db = nhwc.conv_backward(dz, x, w, b, padding, stride)
    theirs = backward(np.moveaxis(dz, -1, 1))
    np.testing.assert_array_equal(dx, np.moveaxis(theirs[0], 1, -1))
    np.testing.assert_array_equal(dw, theirs[1].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(db, theirs[2].reshape(1, 1, 1, 4))


def test_nhwc_takes_activations_as_callables_names_and_none(rng):
    x, w, b = rng.standard_normal((1, 5, 5, 2)), rng.standard_normal((3, 3, 2, 3)), rng.standard_normal((1, 1, 1, 3))
    z = nhwc.conv_forward(x, w, b, None)
    np.testing.assert_array_equal(nhwc.conv_forward(x, w, b, lambda z: np.maximum(z, 0)), np.maximum(z, 0))
    np.testing.assert_array_equal(nhwc.conv_forward(x, w, b, "relu"), np.maximum(z, 0))


@pytest.mark.parametrize(
    "change, exception, phrase",
    [
        ({"padding": "full"}, ValueError, "padding must be 'same' or 'valid', got 'full'"),
        ({"stride": (1, 1, 1)}, ValueError, "stride must be"),
        ({"b": np.ones(3)}, ValueError, "b must have the shape (1, 1, 1, 5), but it has (3,)"),
        ({"activation": "gelu"}, ValueError, "activation must be a callable"),
        ({"A_prev": np.ones((5, 5, 2))}, ValueError, "A_prev must have 4 axes"),
        ({"W": [1]}, TypeError, "W must be a numpy.ndarray"),
        ({"W": np.ones((3, 3, 4, 5))}, ValueError, "A_prev has 2 channels but W expects 4"),
        ({"A_prev": np.ones((1, 5, 5, 2), int)}, TypeError, "A_prev must be one of float16"),
        ({"A_prev": np.ma.ones((1, 5, 5, 2))}, TypeError, "A_prev must be a numpy.ndarray"),
        ({"b": [[[[1, 2, 3]]]]}, TypeError, "b must be a numpy.ndarray"),
    ],
)
def test_nhwc_refuses_bad_input_in_words(change, exception, phrase):
    arguments = {
        "A_prev": np.ones((1, 5, 5, 2)),
        "W": np.ones((3, 3, 2, 5)),
        "b": np.ones((1, 1, 1, 5)),
        "activation": None,
    }
    with pytest.raises(exception) as caught:
        nhwc.conv_forward(**{**arguments, **change})
    assert phrase in str(caught.value)
