"""Gradients are adjoints, for real and complex numbers: <conv(x, w), dy> == <x, dx> == <w, dw>, without a reference."""

import numpy as np
import pytest

import gpuconv
from gpuconv.select import TRANSFORMS
from tests import tiers
from tests.backends import BACKENDS
from tests.cases import CASES, draw, is_taken, laid_out, named_dtype
from tests.tiers import combinations
from tests.tolerances import epsilon

CASES_IN_TURNS = combinations(
    arrays=BACKENDS,
    case=CASES,
    algorithm=[name for name in gpuconv.ALGORITHMS if tiers.full or name != "implicit_gemm"],  # has many modules
    dtype=("float64", "complex128"),
    layout=("channels_first", "channels_last"),
    where=lambda arrays, case, **one: (
        is_taken(case=case, arrays=arrays, **one) and (tiers.compiles_much(arrays) or CASES.index(case) % 2 == 0)
    ),
    turns=("arrays", "dtype", "layout"),
)


def inner(a, b):
    """Return the inner product <a, b>, which conjugates b."""
    return (a.astype(np.complex128) * np.conj(b)).sum()


def assert_same(one, other, algorithm, magnitude):
    """Assert equality; for products of transforms, equality up to rounding relative to the sum of absolute products."""
    assert abs(one - other) <= (16 * epsilon("float64") * magnitude if algorithm in TRANSFORMS else 0)


def absolute_products(x, w, dy, settings):
    """Return the sum of |x| |w| |dy| over all products of a convolution and its gradients."""
    y = gpuconv.conv(abs(x), abs(w), **{**settings, "algorithm": "im2col"})
    return (y * abs(dy)).sum()


@CASES_IN_TURNS
def test_gradients_are_adjoints(case, algorithm, dtype, layout, arrays, rng):
    x, w = (laid_out(draw(rng, s, dtype, True), layout, r) for s, r in ((case.x, "x"), (case.w, "w")))
    x, w = arrays.asarray(x), arrays.asarray(w)
    settings = {**case.settings, "layout": layout, "algorithm": algorithm}
    y = gpuconv.conv(x, w, **settings)
    dy = arrays.asarray(draw(rng, y.shape, dtype, True))
    dx, dw, db = (arrays.asnumpy(g) for g in gpuconv.conv_backward(dy, x, w, **settings))
    x, w, y, dy = (arrays.asnumpy(a) for a in (x, w, y, dy))
    magnitude = absolute_products(x, w, dy, settings)
    assert_same(inner(y, dy), inner(x, dx), algorithm, magnitude)
    assert_same(inner(y, dy), inner(w, dw), algorithm, magnitude)
    channels = -1 if layout == "channels_last" else 1
    np.testing.assert_array_equal(db, np.moveaxis(dy, channels, 0).reshape(db.size, -1).sum(1))


@CASES_IN_TURNS
def test_transposed_convolution_is_the_transpose_and_has_its_adjoints(case, algorithm, dtype, layout, arrays, rng):
    settings = {**case.settings, "layout": layout, "algorithm": algorithm}
    # The x of a transposed convolution has the shape of the y of the convolution that it transposes.
    v, w = (laid_out(draw(rng, s, dtype, True), layout, r) for s, r in ((case.x, "x"), (case.w, "w")))
    v, w = arrays.asarray(v), arrays.asarray(w)
    forward = gpuconv.conv(v, w, **settings)
    x = arrays.asarray(draw(rng, forward.shape, dtype, True))
    spare = []
    for axis, n in enumerate(case.x[2:]):
        reach = case.dilation[axis] * (case.w[2:][axis] - 1) + 1
        outputs = forward.shape[axis + (1 if layout == "channels_last" else 2)]
        spare.append(n - ((outputs - 1) * case.stride[axis] + reach - sum(case.padding[axis])))
    y = gpuconv.conv_transpose(x, w, output_padding=spare, **settings)
    assert y.shape == v.shape
    transposed, plain = (arrays.asnumpy(a) for a in (y, forward))
    dy = arrays.asarray(draw(rng, y.shape, dtype, True))
    gradients = gpuconv.conv_transpose_backward(dy, x, w, output_padding=spare, **settings)
    dx, dw, db = (arrays.asnumpy(g) for g in gradients)
    v, x, w, dy = (arrays.asnumpy(a) for a in (v, x, w, dy))
    assert_same((plain * x).sum(), (v * transposed).sum(), algorithm, absolute_products(v, w, x, settings))
    magnitude = absolute_products(dy, w, x, settings)
    assert_same(inner(transposed, dy), inner(x, dx), algorithm, magnitude)
    assert_same(inner(transposed, dy), inner(w, dw), algorithm, magnitude)
    channels = -1 if layout == "channels_last" else 1
    np.testing.assert_array_equal(db, np.moveaxis(dy, channels, 0).reshape(db.size, -1).sum(1))


def test_real_x_with_complex_w_gives_complex_dx(rng):
    x, w = draw(rng, (2, 3, 8), "float64", True), draw(rng, (4, 3, 3), "complex128", True)
    y = gpuconv.conv(x, w)
    dy = draw(rng, y.shape, "complex128", True)
    dx = gpuconv.conv_data_grad(dy, w, x.shape)
    assert dx.dtype == np.complex128
    assert inner(y, dy) == inner(x, dx)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "sigmoid", "tanh"])
def test_gradients_are_the_slopes_of_the_forward_function(name, rng):
    """Compare with a directional derivative by central differences in float64, for conv and conv_transpose."""
    x, w, b = (rng.standard_normal(s) for s in ((2, 3, 6, 5), (3, 4, 3, 2), (4,)))
    for forward, backward, weight in (
        (gpuconv.conv, gpuconv.conv_backward, w.swapaxes(0, 1)),
        (gpuconv.conv_transpose, gpuconv.conv_transpose_backward, w),
    ):
        settings = {"stride": 2, "padding": 1, "activation": name}
        y = forward(x, weight, b, **settings)
        dy = rng.standard_normal(y.shape)
        gradients = backward(dy, x, weight, y=y, **settings)
        steps = [rng.standard_normal(a.shape) for a in (x, weight, b)]
        h = 1e-6
        ahead = forward(x + h * steps[0], weight + h * steps[1], b + h * steps[2], **settings)
        behind = forward(x - h * steps[0], weight - h * steps[1], b - h * steps[2], **settings)
        slope = ((ahead - behind) / (2 * h) * dy).sum()
        promised = sum((g * step).sum() for g, step in zip(gradients, steps, strict=True))
        assert abs(slope - promised) <= 1e-6 * (1 + abs(slope))


def test_transposed_of_half_precision(rng):
    x, w, b = (draw(rng, s, "bfloat16", True) for s in ((1, 2, 5, 5), (2, 3, 3, 3), (3,)))
    exact = gpuconv.conv_transpose(x, w, b, stride=2, padding=1)
    bfloat16 = named_dtype("bfloat16")
    y = gpuconv.conv_transpose(x.astype(bfloat16), w.astype(bfloat16), b.astype(bfloat16), stride=2, padding=1)
    np.testing.assert_array_equal(y, exact.astype(bfloat16))


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("padding", [0, ((1, 0), (2, 1)), "same"])
def test_transposed_convolution_to_a_given_shape_is_data_grad(padding, layout, rng):
    settings = {"stride": (2, 3), "padding": padding, "layout": layout}
    for shape in ((9, 11), (10, 12)):
        x = rng.integers(-3, 4, (2, 3, *shape) if layout == "channels_first" else (2, *shape, 3)).astype(float)
        w = rng.integers(-3, 4, (4, 3, 3, 2) if layout == "channels_first" else (3, 2, 3, 4)).astype(float)
        y = gpuconv.conv(x, w, **settings)
        found = gpuconv.conv_transpose(y, w, **settings, output_shape=shape)
        np.testing.assert_array_equal(found, gpuconv.conv_data_grad(y, w, x.shape, **settings))
        gradients = gpuconv.conv_transpose_backward(x, y, w, **settings, output_shape=shape)
        np.testing.assert_array_equal(gradients.dx, y)
        np.testing.assert_array_equal(gradients.dw, gpuconv.conv_weight_grad(y, x, w.shape, **settings))
