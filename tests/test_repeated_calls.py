"""A repeated call gives the same bits as the first call, also after calls with other data."""

import itertools

import numpy as np
import pytest

import gpuconv
from gpuconv import execute
from tests import repeat
from tests.cases import GROUPED, NUMPY_ALGORITHMS, ORDINARY, accepts


@pytest.mark.called_once("it repeats calls itself")
@pytest.mark.parametrize(
    "algorithm", [name for name in NUMPY_ALGORITHMS if accepts(name, ORDINARY) or accepts(name, GROUPED)]
)
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "sigmoid", "tanh"])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_repeated_backward_call_applies_the_derivative(transposed, activation, algorithm, rng):
    groups = 1 if accepts(algorithm, ORDINARY) else GROUPED.groups
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


@pytest.mark.called_once("it repeats calls itself")
def test_plans_of_the_same_limit_are_the_same(monkeypatch, rng):
    """The limit determines the blocks, which determine the order of additions."""
    monkeypatch.setenv("GPUCONV_WORKSPACE_LIMIT", "30000")
    x, dy = rng.standard_normal((2, 2, 36, 12)), rng.standard_normal((2, 4, 30, 12))
    settings = {"padding": ((-2, 0), (8, -4)), "dilation": 2, "groups": 2, "algorithm": "winograd"}
    first, second, third = (gpuconv.conv_weight_grad(dy, x, (4, 1, 3, 3), **settings) for _ in range(3))
    np.testing.assert_array_equal(second, first)
    np.testing.assert_array_equal(third, first)


def test_a_result_of_other_bits_is_noticed():
    calls = itertools.count()

    def conv(x):
        return x + next(calls)

    with pytest.raises(AssertionError, match=r"the third call gave other bits than the second call"):
        repeat.repeated(conv)(np.ones(3))


def test_a_changed_input_is_noticed():
    def conv(x):
        x += 1
        return x.copy()

    with pytest.raises(AssertionError, match=r"a call changed an input"):
        repeat.repeated(conv)(np.ones(3))


def test_a_step_that_a_later_call_leaves_out_is_noticed(monkeypatch, rng):
    class Forgetful(dict):
        def get(self, description):
            plan = super().get(description)
            return plan and plan._replace(steps=plan.steps[:-1])

    monkeypatch.setattr(execute, "_plans", Forgetful())
    x, w = rng.standard_normal((2, 3, 8, 8)), rng.standard_normal((4, 3, 3, 3))
    with pytest.raises(AssertionError, match="gave other bits than the second call"):
        gpuconv.conv(x, w, activation="tanh", algorithm="im2col")


def test_other_data_lie_as_their_own():
    larger = np.zeros((4, 6, 10), np.float32)
    for array in (larger, larger[:, ::-2, 1::3], larger.T, np.broadcast_to(larger[:1], (3, 6, 10)), larger[:0]):
        other = repeat.twin(array)
        assert (other.shape, other.strides, other.dtype) == (array.shape, array.strides, array.dtype)
        assert other.flags.writeable == array.flags.writeable
        addresses = [of.__array_interface__["data"][0] for of in (array, other)]
        assert not array.size or (addresses[0] - addresses[1]) % repeat.ALIGNMENT == 0
        assert not array.size or other.any()
