"""Convolutions that nobody thought of: geometries drawn by hypothesis, small integers, exact equality."""

import numpy as np
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import gpuconv
from gpuconv.geometry import Geometry
from tests import reference
from tests.cases import DTYPES, LAYOUTS, NUMPY_ALGORITHMS, channels_first, draw, laid_out, named_dtype
from tests.conftest import NO_EMULATION, arrays_of


@st.composite
def convolutions(draw_from):
    """Shapes and settings of a valid convolution of 1 to 3 axes, with any padding that leaves something of x."""
    rank = draw_from(st.integers(1, 3))

    def per_axis(strategy):
        return tuple(draw_from(strategy) for _ in range(rank))

    groups = draw_from(st.integers(1, 3))
    extent, kernel = per_axis(st.integers(1, 8)), per_axis(st.integers(1, 4))
    x = (draw_from(st.integers(1, 3)), groups * draw_from(st.integers(1, 3)), *extent)
    w = (groups * draw_from(st.integers(1, 3)), x[1] // groups, *kernel)
    padding = per_axis(st.tuples(st.integers(-3, 4), st.integers(-3, 4)))
    for n, (low, high) in zip(extent, padding, strict=True):
        assume(n + min(low, 0) + min(high, 0) > 0)
    settings = {
        "stride": per_axis(st.integers(1, 4)),
        "padding": padding,
        "dilation": per_axis(st.integers(1, 3)),
        "groups": groups,
        "flip": draw_from(st.booleans()),
    }
    try:
        Geometry.infer(x, w, **settings)
    except ValueError:
        assume(False)
    return x, w, settings


EMULATED = [] if NO_EMULATION else [("emulated", name) for name in ("scatter", "direct")]


@hypothesis_settings(max_examples=600)
@given(
    convolutions(),
    st.sampled_from(DTYPES),
    st.sampled_from(LAYOUTS),
    st.sampled_from([("numpy", name) for name in NUMPY_ALGORITHMS] + EMULATED * 2),
    st.sampled_from([1, 3000, 10**7]),
    st.integers(0, 2**32 - 1),
)
def test_any_convolution_is_exact_on_small_integers(convolution, dtype, layout, place, limit, seed):
    x_shape, w_shape, settings = convolution
    backend, algorithm = place
    rng = np.random.default_rng(seed)
    x, w = draw(rng, x_shape, dtype, True), draw(rng, w_shape, dtype, True)
    y = reference.forward(x, w, **settings)
    dy = draw(rng, y.shape, dtype, True)
    b, c = draw(rng, w_shape[:1], dtype, True), draw(rng, x_shape[1:2], dtype, True)
    exact = (
        y + b.reshape(-1, *(1,) * (y.ndim - 2)),
        reference.data_grad(dy, np.conj(w), x_shape, **settings) + c.reshape(-1, *(1,) * (y.ndim - 2)),
        reference.data_grad(dy, w, x_shape, **settings),
        reference.weight_grad(dy, x, w_shape, **settings),
        dy.sum((0, *range(2, dy.ndim))),
    )
    given_arrays = [laid_out(a.astype(named_dtype(dtype)), layout, r) for a, r in ((x, "x"), (w, "w"), (dy, "x"))]
    options = {
        **settings,
        "algorithm": algorithm,
        "layout": "channels_last" if layout == "channels_last" else "channels_first",
    }
    b, c = (a.astype(named_dtype(dtype)) for a in (b, c))
    spare = [
        n + low + high - (m - 1) * s - d * (k - 1) - 1
        for n, (low, high), m, s, d, k in zip(
            x_shape[2:],
            settings["padding"],
            y.shape[2:],
            settings["stride"],
            settings["dilation"],
            w_shape[2:],
            strict=True,
        )
    ]
    with limited(limit), arrays_of(backend) as arrays, arrays.varied():
        results = (
            gpuconv.conv(*given_arrays[:2], b, **options),
            gpuconv.conv_transpose(given_arrays[2], given_arrays[1], c, output_padding=spare, **options),
            *gpuconv.conv_backward(given_arrays[2], *given_arrays[:2], **options),
        )
    for result, expected, role in zip(results, exact, ("x", "x", "x", "w", "b"), strict=True):
        if role != "b":
            result = channels_first(result, layout, role)
        np.testing.assert_array_equal(result, expected.astype(named_dtype(dtype)))


class limited:  # noqa: N801
    """GPUCONV_WORKSPACE_LIMIT for a while; a fixture would be shared by all examples."""

    def __init__(self, limit):
        self.limit = limit

    def __enter__(self):
        import os

        os.environ["GPUCONV_WORKSPACE_LIMIT"] = str(self.limit)

    def __exit__(self, *_):
        import os

        del os.environ["GPUCONV_WORKSPACE_LIMIT"]
