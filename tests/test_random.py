"""Random convolutions: geometries drawn by hypothesis, small integers, exact equality."""

import numpy as np
from hypothesis import assume, given, reject
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import gpuconv
from gpuconv.geometry import Geometry
from tests import reference, tiers
from tests.backends import NO_EMULATION, arrays_of
from tests.cases import DTYPES, LAYOUTS, channels_first, draw, laid_out, named_dtype
from tests.tolerances import assert_within, bound_of


@st.composite
def convolutions(draw_from, transformable=False):
    """Draw shapes and settings of a valid convolution of 1 to 3 axes, with any padding that does not crop all of x.

    With ``transformable`` winograd accepts them: kernel extents of 3 or 1, stride 1, and dilations that divide extents
    and padding.
    """
    rank = draw_from(st.integers(1, 2 if transformable else 3))

    def per_axis(strategy):
        return tuple(draw_from(strategy) for _ in range(rank))

    groups = draw_from(st.integers(1, 3))
    extent, kernel = per_axis(st.integers(1, 8)), per_axis(st.integers(1, 4))
    if transformable:
        extent, kernel = per_axis(st.integers(1, 20)), per_axis(st.sampled_from([3, 3, 1]))
        assume(3 in kernel)
    x = (draw_from(st.integers(1, 3)), groups * draw_from(st.integers(1, 3)), *extent)
    w = (groups * draw_from(st.integers(1, 3)), x[1] // groups, *kernel)
    padding = per_axis(st.tuples(st.integers(-3, 4), st.integers(-3, 4)))
    dilation = per_axis(st.integers(1, 3))
    if transformable:
        extent = tuple(n * d for n, d in zip(extent, dilation, strict=True))
        padding = tuple((low * d, high * d) for (low, high), d in zip(padding, dilation, strict=True))
        x = (*x[:2], *extent)
    for n, (low, high) in zip(extent, padding, strict=True):
        assume(n + min(low, 0) + min(high, 0) > 0)
    settings = {
        "stride": per_axis(st.integers(1, 1 if transformable else 4)),
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "flip": draw_from(st.booleans()),
    }
    try:
        Geometry.infer(x, w, **settings)
    except ValueError:
        assume(False)
    return x, w, settings


def depthwise(x_shape, w_shape, groups):
    """Return shapes with one channel and one filter per group, and rows of several tiles."""
    return (x_shape[0], groups, *x_shape[2:-1], 4 * x_shape[-1]), (groups, 1, *w_shape[2:])


EMULATED = [] if NO_EMULATION else [("emulated", name) for name in ("scatter", "direct", "depthwise")]


@hypothesis_settings(max_examples=1000 if tiers.full else 30)
@given(
    convolutions(),
    st.sampled_from(DTYPES),
    st.sampled_from(LAYOUTS),
    st.sampled_from([("numpy", name) for name in ("im2col", "scatter", "depthwise")] + EMULATED * 2),
    st.sampled_from([1, 3000, 30_000, 10**7]),
    st.integers(0, 2**32 - 1),
)
def test_any_convolution_is_exact_on_small_integers(convolution, dtype, layout, place, limit, seed):
    x_shape, w_shape, settings = convolution
    backend, algorithm = place
    if algorithm == "depthwise":
        x_shape, w_shape = depthwise(x_shape, w_shape, settings["groups"])
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


@hypothesis_settings(max_examples=500 if tiers.full else 20)
@given(
    convolutions(transformable=True),
    st.sampled_from(["float16", "bfloat16", "float32", "float64"]),
    st.sampled_from(LAYOUTS),
    st.sampled_from([30_000, 300_000, 10**7]),
    st.integers(0, 2**32 - 1),
)
def test_any_convolution_by_winograd_is_within_its_bound(convolution, dtype, layout, limit, seed):
    x_shape, w_shape, settings = convolution
    rng = np.random.default_rng(seed)
    x, w = draw(rng, x_shape, dtype, False), draw(rng, w_shape, dtype, False)
    dy = draw(rng, reference.forward(x, w, **settings).shape, dtype, False)
    given_arrays = [laid_out(a.astype(named_dtype(dtype)), layout, r) for a, r in ((x, "x"), (w, "w"), (dy, "x"))]
    axes = "channels_last" if layout == "channels_last" else "channels_first"
    options = {**settings, "algorithm": "winograd", "layout": axes}
    with limited(limit):
        results = (
            gpuconv.conv(*given_arrays[:2], **options),
            *gpuconv.conv_backward(given_arrays[2], *given_arrays[:2], needs=("dx", "dw"), **options)[:2],
        )
    exact, magnitude = (
        (
            reference.forward(size(x), size(w), **settings),
            reference.data_grad(size(dy), size(w), x_shape, **settings),
            reference.weight_grad(size(dy), size(x), w_shape, **settings),
        )
        for size in (np.positive, np.abs)
    )
    for result, expected, largest, role in zip(results, exact, magnitude, ("x", "x", "w"), strict=True):
        found = channels_first(result, layout, role)
        assert_within(found, expected, bound_of("winograd", expected, largest, 1, dtype))


class limited:  # noqa: N801
    """A context with a GPUCONV_WORKSPACE_LIMIT, which some algorithms refuse; a fixture would apply to all examples."""

    def __init__(self, limit):
        self.limit = limit

    def __enter__(self):
        import os

        os.environ["GPUCONV_WORKSPACE_LIMIT"] = str(self.limit)

    def __exit__(self, _, error, __):
        import os

        del os.environ["GPUCONV_WORKSPACE_LIMIT"]
        if isinstance(error, ValueError) and "GPUCONV_WORKSPACE_LIMIT is" in str(error):
            reject()
