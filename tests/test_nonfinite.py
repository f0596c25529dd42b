"""NaN and Inf propagate to exactly the same results as in a direct convolution."""

import numpy as np
import pytest

import gpuconv
from gpuconv.geometry import Geometry
from tests import reference, tiers
from tests.backends import BACKENDS
from tests.cases import CASES, KERNELS, LAYOUTS, accepts, channels_first, compiles_little, is_on, is_taken, laid_out
from tests.tiers import combinations

# (direction, the array with the NaN), and whether products of the NaN with zeros of the padding are permitted, which is
# unspecified. If so, all results of the same filter or channel may be NaN, and those that it reaches must be.
PLACES = {
    ("forward", "x"): False,
    ("forward", "w"): True,
    ("data_grad", "dy"): False,
    ("data_grad", "w"): True,
    ("weight_grad", "x"): False,
    ("weight_grad", "dy"): True,
}


def run(direction, arrays, case):
    """Return the result of the reference; arrays are x, w and dy by name."""
    x, w, dy = arrays["x"], arrays["w"], arrays["dy"]
    if direction == "forward":
        return reference.forward(x, w, **case.settings)
    if direction == "data_grad":
        return reference.data_grad(dy, w, case.x, **case.settings)
    return reference.weight_grad(dy, x, case.w, **case.settings)


def is_tested(arrays, algorithm, **one):
    """Return whether a combination is tested; algorithms without kernels are the same as on NumPy."""
    if algorithm == "auto":
        return True
    if (
        arrays == "numpy"
        or tiers.full
        or (algorithm in KERNELS and compiles_little(algorithm=algorithm, arrays=arrays, **one))
    ):
        return is_taken(arrays=arrays, algorithm=algorithm, dtype="float64", **one)
    return False


@pytest.mark.filterwarnings("ignore:invalid value")
@combinations(
    arrays=BACKENDS,
    case=[case for case in CASES if len(case.x) < 6],
    algorithm=["auto", *gpuconv.ALGORITHMS],
    place=PLACES,
    layout=LAYOUTS,
    value=[np.nan, np.inf, -np.inf],
    where=is_tested,
    turns=("place", "layout", "value"),
)
def test_nonfinite_elements_stay_where_they_belong(case, algorithm, place, layout, value, arrays, rng):
    axes = "channels_last" if layout == "channels_last" else "channels_first"
    settings = {**case.settings, "algorithm": algorithm, "layout": axes}
    ones = {"x": np.ones(case.x), "w": np.ones(case.w)}
    ones["dy"] = np.ones_like(reference.forward(ones["x"], ones["w"], **case.settings))
    direction, name = place
    element = tuple(int(rng.integers(n)) for n in ones[name].shape)
    marked = np.zeros_like(ones[name])
    marked[element] = 1
    reached = run(direction, {**ones, name: marked}, case) != 0
    poisoned = {**ones, name: np.where(marked == 1, value, 1.0)}
    x, w, dy = (arrays.asarray(laid_out(poisoned[key], layout, key)) for key in ("x", "w", "dy"))
    if direction == "forward":
        result = gpuconv.conv(x, w, **settings)
    elif direction == "data_grad":
        result = gpuconv.conv_data_grad(dy, w, x.shape, **settings)
    else:
        result = gpuconv.conv_weight_grad(dy, x, w.shape, **settings)
    result = channels_first(arrays.asnumpy(result), layout, "w" if direction == "weight_grad" else "x")
    nonfinite = ~np.isfinite(result)
    if not PLACES[place]:
        np.testing.assert_array_equal(nonfinite, reached)
    else:
        assert nonfinite[reached].all()
        channel = 0 if direction == "weight_grad" else 1
        others = tuple(axis for axis in range(reached.ndim) if axis != channel)
        assert not nonfinite.any(others)[~may_be_reached(direction, element, case)].any()


def may_be_reached(direction, element, case):
    """Return which filters (channels for data_grad) of the result have products with this element of w or dy."""
    filters, channels = case.w[0], case.x[1]
    f = element[0] if direction != "weight_grad" else element[1]
    if direction != "data_grad":
        return np.arange(filters) == f
    group = f // (filters // case.groups)
    return np.arange(channels) == group * (channels // case.groups) + element[1]


def accepts_one_axis(algorithm, **one):
    return is_on(algorithm=algorithm, **one) and (
        algorithm == "auto" or accepts(algorithm, Geometry.infer((1, 1, 5), (1, 1, 3)))
    )


@combinations(arrays=BACKENDS, algorithm=["auto", *gpuconv.ALGORITHMS], where=accepts_one_axis)
def test_inf_in_w_meets_no_zeros_beyond_dy(algorithm, arrays):
    dy, w = arrays.asarray(np.ones((1, 1, 3))), arrays.asarray(np.array([[[1.0, 2.0, np.inf]]]))
    for dx in (
        gpuconv.conv_data_grad(dy, w, (1, 1, 5), algorithm=algorithm),
        gpuconv.conv_transpose(dy, w, algorithm=algorithm),
    ):
        np.testing.assert_array_equal(arrays.asnumpy(dx), [[[1, 3, np.inf, np.inf, np.inf]]])


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "sigmoid", "tanh"])
def test_nan_passes_through_activations(name):
    x = np.array([[1.0, np.nan, -1.0]])
    y = gpuconv.conv(x, np.ones((1, 1, 1)), activation=name)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(x))
