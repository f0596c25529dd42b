"""A repeated call does what the first one did: the same bits, for other data too."""

import numpy as np
import pytest

import gpuconv
from tests.cases import NUMPY_ALGORITHMS


@pytest.mark.parametrize("algorithm", NUMPY_ALGORITHMS)
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "sigmoid", "tanh"])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_repeated_backward_call_applies_the_derivative(transposed, activation, algorithm, rng):
    groups = 8 if algorithm == "depthwise" else 1
    w = rng.standard_normal((8, 8 // groups, 3, 3)) / 10
    forward = gpuconv.conv_transpose if transposed else gpuconv.conv
    backward = gpuconv.conv_transpose_backward if transposed else gpuconv.conv_backward
    options = {"padding": 1, "groups": groups, "algorithm": algorithm, "activation": activation}
    for _ in range(3):
        x, dy = rng.standard_normal((2, 2, 8, 12, 12))
        y = forward(x, w, **options)
        repeated = backward(dy, x, w, **options, y=y)
        gpuconv.clear_cache()
        first = backward(dy, x, w, **options, y=y)
        for one, other in zip(repeated, first, strict=True):
            np.testing.assert_array_equal(one, other)


def test_calls_that_cannot_be_recorded_keep_their_limit(monkeypatch, rng):
    """The limit decides the blocks, and they decide the order of additions."""
    monkeypatch.setenv("GPUCONV_WORKSPACE_LIMIT", "30000")
    x, dy = rng.standard_normal((2, 2, 36, 12)), rng.standard_normal((2, 4, 30, 12))
    settings = {"padding": ((-2, 0), (8, -4)), "dilation": 2, "groups": 2, "algorithm": "winograd"}
    first, second, third = (gpuconv.conv_weight_grad(dy, x, (4, 1, 3, 3), **settings) for _ in range(3))
    np.testing.assert_array_equal(second, first)
    np.testing.assert_array_equal(third, first)
