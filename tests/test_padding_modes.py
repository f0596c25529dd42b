"""padding_mode "circular", "reflect" and "replicate": all directions, algorithms, dtypes, layouts and backends."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import gpuconv
from gpuconv.arrays import NUMPY
from gpuconv.geometry import Geometry
from gpuconv.padding_modes import request_of_blocks
from gpuconv.request import Request
from gpuconv.select import MODULES, TRANSFORMS
from tests import reference, tiers
from tests.backends import BACKENDS, arrays_of
from tests.cases import DIRECTIONS, DTYPES, LAYOUTS, case, channels_first, draw, is_on, laid_out, named_dtype
from tests.emulation.launcher import EMULATED
from tests.test_memory import assert_stays_within
from tests.test_random import EMULATED as KERNELS
from tests.test_random import convolutions, limited
from tests.tiers import combinations, compiles_much
from tests.tolerances import assert_within, bound_of, direct_bound

MODES = ("circular", "reflect", "replicate")
CASES = (
    case("3x3", (3, 3, 7, 6), (4, 3, 3, 3), padding=1),
    case("longest padding", (2, 2, 5, 4), (3, 2, 2, 3), padding=(4, 3)),
    case("strides", (2, 4, 9, 8), (6, 2, 3, 2), stride=(2, 3), padding=((2, 1), (0, 3)), groups=2),
    case("crops and pads", (2, 3, 7, 6), (4, 3, 3, 3), stride=2, padding=((-1, 2), (2, -2))),
    case("padding beyond the kernel", (1, 2, 6, 5), (3, 2, 1, 2), stride=(3, 1), padding=3),
    case("depthwise", (2, 5, 6, 7), (5, 1, 3, 3), padding=1, groups=5, flip=True),
    case("1-D dilated", (2, 3, 11), (4, 3, 4), stride=3, padding=((6, 4),), dilation=2),
    case("3-D", (1, 2, 4, 5, 3), (3, 2, 3, 2, 3), stride=(1, 2, 1), padding=((1, 1), (2, 0), (1, 2))),
)


def is_possible(case, algorithm, dtype, limit, mode, arrays):
    """Return whether an algorithm computes a case; implicit_gemm, which has many modules, gets few cases."""
    if not is_on(arrays, algorithm) or (algorithm == "implicit_gemm" and case.name not in ("3x3", "strides")):
        return False
    geometry, place = (
        Geometry.infer(case.x, case.w, **case.settings, padding_mode=mode),
        EMULATED if arrays != "numpy" else NUMPY,
    )
    requests = (
        request_of_blocks(Request(geometry, named_dtype(dtype), direction, place, False, limit))
        for direction in DIRECTIONS
    )
    return not any(map(MODULES[algorithm].why_not, requests))


def compiles_few(arrays, algorithm):
    """Return whether a plain run on a GPU, which has no time for the modules of all combinations, runs an algorithm."""
    return compiles_much(arrays) or algorithm in ("im2col", "direct")


@combinations(
    arrays=BACKENDS,
    case=CASES,
    algorithm=gpuconv.ALGORITHMS,
    mode=MODES,
    dtype=DTYPES,
    layout=LAYOUTS,
    limit=(10**7, 20_000),
    where=lambda arrays, layout, **one: is_possible(arrays=arrays, **one) and compiles_few(arrays, one["algorithm"]),
    turns=("arrays", "mode", "dtype", "layout", "limit"),
)
def test_every_direction_pads_and_folds(case, algorithm, mode, dtype, layout, limit, arrays, rng):
    settings = {**case.settings, "padding_mode": mode}
    x, w = draw(rng, case.x, dtype, True), draw(rng, case.w, dtype, True)
    y = reference.forward(x, w, **settings)
    dy = draw(rng, y.shape, dtype, True)
    compare(arrays, (x, w, dy), settings, dtype, layout, limit, algorithm)


def compare(arrays, operands, settings, dtype, layout, limit, algorithm):
    """Compare y, dx and dw with the reference, exactly if the algorithm adds products of integers."""
    x, w, dy = operands
    bias = np.arange(len(w)) % 5 - 2.0
    given = [laid_out(a.astype(named_dtype(dtype)), layout, r) for a, r in ((x, "x"), (w, "w"), (dy, "x"))]
    x_given, w_given, dy_given = map(arrays.asarray, given)
    axes = "channels_last" if layout == "channels_last" else "channels_first"
    options = {**settings, "layout": axes, "algorithm": algorithm}
    b = arrays.asarray(bias.astype(named_dtype(dtype)))
    with limited(limit), arrays.varied():
        results = (
            gpuconv.conv(x_given, w_given, b, **options),
            *gpuconv.conv_backward(dy_given, x_given, w_given, needs=("dx", "dw"), **options)[:2],
        )
    (y, dx, dw), sizes = (
        (
            reference.forward(f(x), f(w), **settings) + f(bias).reshape(-1, *(1,) * (x.ndim - 2)),
            reference.data_grad(f(dy), f(w), x.shape, **settings),
            reference.weight_grad(f(dy), f(x), w.shape, **settings),
        )
        for f in (np.positive, np.abs)
    )
    for found, exact, size, role in zip(results, (y, dx, dw), sizes, ("x", "x", "w"), strict=True):
        assert found.dtype == named_dtype(dtype)
        found = channels_first(arrays.asnumpy(found), layout, role)
        if algorithm in TRANSFORMS:
            assert_within(found, exact, bound_of(algorithm, exact, size, 1, dtype))
        else:
            np.testing.assert_array_equal(found, exact.astype(named_dtype(dtype)))


@st.composite
def padded_convolutions(draw_from):
    """Draw a convolution and a padding mode that permits its padding."""
    x, w, settings = draw_from(convolutions())
    settings["padding_mode"] = draw_from(st.sampled_from(MODES))
    try:
        Geometry.infer(x, w, **settings)
    except ValueError:
        assume(False)
    return x, w, settings


@hypothesis_settings(max_examples=1000 if tiers.full else 60)
@given(
    padded_convolutions(),
    st.sampled_from(DTYPES),
    st.sampled_from(LAYOUTS),
    st.sampled_from([("numpy", "im2col"), ("numpy", "scatter"), *KERNELS[:2]]),
    st.sampled_from([1, 3000, 30_000, 10**7]),
    st.integers(0, 2**32 - 1),
)
def test_any_convolution_is_exact_on_small_integers(convolution, dtype, layout, place, limit, seed):
    x_shape, w_shape, settings = convolution
    backend, algorithm = place
    rng = np.random.default_rng(seed)
    x, w = draw(rng, x_shape, dtype, True), draw(rng, w_shape, dtype, True)
    dy = draw(rng, reference.forward(x, w, **settings).shape, dtype, True)
    with arrays_of(backend) as arrays:
        compare(arrays, (x, w, dy), settings, dtype, layout, limit, algorithm)


@combinations(arrays=BACKENDS, mode=MODES, dtype=("float16", "float32"), limit=(10**7, 20_000), turns=("mode", "limit"))
def test_each_result_is_rounded_once(mode, dtype, limit, arrays, rng):
    """The gradients of the padding are added to those of the inputs before they become half precision."""
    settings = {"stride": (1, 1), "padding": ((3, 3), (2, 4)), "dilation": (1, 1), "padding_mode": mode}
    x, w = draw(rng, (2, 8, 9, 10), dtype, False), draw(rng, (6, 8, 5, 5), dtype, False)
    dy = draw(rng, reference.forward(x, w, **settings).shape, dtype, False)
    x_given, w_given, dy_given = (arrays.asarray(a.astype(dtype)) for a in (x, w, dy))
    with limited(limit):
        dx, dw, _ = gpuconv.conv_backward(dy_given, x_given, w_given, algorithm="im2col", **settings)
    for found, compute, terms in (
        (dx, lambda f: reference.data_grad(f(dy), f(w), x.shape, **settings), 6 * 25),
        (dw, lambda f: reference.weight_grad(f(dy), f(x), w.shape, **settings), dy.size // 6),
    ):
        exact = compute(np.positive)
        assert_within(arrays.asnumpy(found), exact, direct_bound(exact, compute(np.abs), terms, dtype))


def test_circular_convolution_is_the_product_of_the_spectra(rng):
    x, w = rng.integers(-3, 4, (12, 10)).astype(float), rng.integers(-3, 4, (5, 4)).astype(float)
    y = gpuconv.conv(x[None], w[None, None], padding=((4, 0), (3, 0)), padding_mode="circular", flip=True)
    product = np.fft.fft2(x) * np.fft.fft2(w, x.shape)
    np.testing.assert_allclose(y[0], np.fft.ifft2(product).real, rtol=0, atol=1e-12)
    rolled = gpuconv.conv(x[None], np.ones((1, 1, 1, 1)), padding=((-3, 3), (2, -2)), padding_mode="circular")
    np.testing.assert_array_equal(rolled[0], np.roll(x, (-3, 2), (0, 1)))


@pytest.mark.parametrize("mode", MODES)
def test_matrix_and_operator_are_the_convolution(mode, rng):
    settings = {"stride": (2, 1), "padding": ((3, 2), (1, 3)), "groups": 2, "padding_mode": mode}
    x, w = draw(rng, (2, 4, 5, 6), "complex128", True), draw(rng, (4, 2, 3, 3), "complex128", True)
    y = gpuconv.conv(x, w, **settings)
    matrix, operator = (make(w, x.shape, **settings) for make in (gpuconv.conv_matrix, gpuconv.linear_operator))
    assert matrix.has_canonical_format
    dx = gpuconv.conv_data_grad(y, w, x.shape, **settings)
    for made in (matrix, operator):
        np.testing.assert_array_equal(made @ x.ravel(), y.ravel())
        np.testing.assert_array_equal(made.conj().T @ y.ravel() if made is matrix else made.H @ y.ravel(), dx.ravel())


@pytest.mark.parametrize("mode", MODES)
def test_nan_and_inf_reach_what_they_reach_in_a_padded_x(mode, rng):
    x, w = rng.standard_normal((1, 8, 12, 12)), rng.standard_normal((8, 8, 3, 3))
    x[0, 1, 1, 0], x[0, 2, 11, 5] = np.nan, np.inf
    options = {"padding": 2, "padding_mode": mode}
    with np.errstate(invalid="ignore"):
        y = reference.forward(x, w, (1, 1), ((2, 2), (2, 2)), (1, 1), padding_mode=mode)
        results = [gpuconv.conv(x, w, algorithm=name, **options) for name in ("auto", "im2col", "scatter")]
    for found in results:
        np.testing.assert_array_equal(np.isfinite(found), np.isfinite(y))
        assert not np.isfinite(found).all()


LAYERS = {  # x, w, padding, algorithm, dtype
    "blocks of rows": ((2, 16, 160, 160), (16, 16, 3, 3), 1, "auto", "float32"),
    "half precision": ((2, 16, 160, 160), (16, 16, 3, 3), 1, "im2col", "float16"),
    "long padding": ((1, 8, 60, 60), (8, 8, 3, 3), 59, "im2col", "float32"),
    "padding longer than x": ((1, 4, 20, 30), (4, 4, 3, 3), 100, "scatter", "float32"),
    "large weight": ((1, 200, 510), (3, 200, 500), 2, "fft", "float32"),
}


@pytest.mark.called_once("it measures the memory of a single call")
@combinations(
    layer=LAYERS,
    mode=MODES,
    direction=DIRECTIONS,
    memory=("channels_first", "channels_last_memory"),
    turns=("memory", "mode"),
    where=lambda layer, mode, **_: layer != "padding longer than x" or mode == "replicate",
)
def test_memory_stays_within_the_limit(layer, mode, direction, memory, monkeypatch):
    x_shape, w_shape, padding, algorithm, dtype = LAYERS[layer]
    limit = 2**21 if layer == "large weight" else 2**20
    monkeypatch.setenv("GPUCONV_WORKSPACE_LIMIT", str(limit))
    x, w = (laid_out(np.full(shape, 1 / 64, dtype), memory) for shape in (x_shape, w_shape))
    options = {"padding": padding, "padding_mode": mode, "algorithm": algorithm}
    y = laid_out(gpuconv.conv(x, w, **options), memory)
    result, call = {
        "forward": (y, lambda: gpuconv.conv(x, w, **options)),
        "data_grad": (x, lambda: gpuconv.conv_data_grad(y, w, x.shape, **options)),
        "weight_grad": (w, lambda: gpuconv.conv_weight_grad(y, x, w.shape, **options)),
    }[direction]
    assert_stays_within(limit, result.nbytes, call)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_small_blocks_leave_the_workspace_to_the_algorithm(direction):
    """A deep layer has as many steps, but for those that pad or fold, as the convolution of the padded x."""
    options = {"backend": "numpy", "direction": direction, "algorithm": "winograd"}
    padded = gpuconv.explain((8, 512, 16, 16), (512, 512, 3, 3), **options)
    found = gpuconv.explain((8, 512, 14, 14), (512, 512, 3, 3), padding=1, padding_mode="circular", **options)
    assert found.plan.size <= 1.5 * padded.plan.size


def test_long_padding_takes_few_blocks(monkeypatch):
    monkeypatch.setenv("GPUCONV_WORKSPACE_LIMIT", "4MiB")
    options = {"backend": "numpy", "direction": "data_grad", "algorithm": "im2col"}
    for extent, padding, mode, most in ((64, 64, "circular", 500), (32, 200, "replicate", 3000)):
        shapes = (1, 16, extent, extent), (16, 16, 3, 3)
        assert gpuconv.explain(*shapes, padding=padding, padding_mode=mode, **options).plan.size <= most


def test_an_algorithm_that_lacks_what_the_padded_x_takes_says_so(monkeypatch):
    shapes, options = ((1, 4, 40, 40), (4, 4, 9, 9)), {"padding": 4, "padding_mode": "reflect", "backend": "numpy"}
    geometry = Geometry.infer(*shapes, padding=4, padding_mode="reflect").padded
    assert geometry == Geometry.infer((1, 4, 48, 48), shapes[1])
    request = Request(geometry, np.dtype("f4"), "forward", NUMPY)
    refuses = MODULES["fft"].why_not
    least = next(limit for limit in range(2000, 2**22, 16) if refuses(request._replace(limit=limit)) is None)
    monkeypatch.setenv("GPUCONV_WORKSPACE_LIMIT", str(least))
    with pytest.raises(ValueError, match=f"LIMIT is {least} bytes, of which .* bytes are for the padded x"):
        gpuconv.explain(*shapes, **options, algorithm="fft")
    assert "padding ((4, 4), (4, 4)) reflect, dilation" in str(gpuconv.explain(*shapes, **options))
    monkeypatch.setenv("GPUCONV_WORKSPACE_LIMIT", "1000")
    reason = gpuconv.explain(*shapes, **options, algorithm="im2col").reason
    assert "LIMIT is 1000 bytes, of which 1296 bytes are for the padded x" in reason


BAD = {
    "name": ({"padding_mode": "wrap"}, "padding_mode must be one of zeros, circular, reflect, replicate; got 'wrap'"),
    "circular": (
        {"padding": 5, "padding_mode": "circular"},
        r"at most the extent of x with padding_mode='circular', but on spatial axis 0 it is \(5, 5\) .* extent is 4",
    ),
    "reflect": ({"padding": ((0, 0), (1, 5)), "padding_mode": "reflect"}, r"extent of x - 1 .* axis 1 it is \(1, 5\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_padding_that_a_mode_cannot_fill_is_refused(name):
    options, message = BAD[name]
    x, w = np.ones((1, 1, 4, 5)), np.ones((1, 1, 2, 2))
    with pytest.raises(ValueError, match=message):
        gpuconv.conv(x, w, **options)


def test_an_empty_x_is_refused():
    with pytest.raises(ValueError, match="padding must be at most 0 for an extent of 0"):
        gpuconv.conv(np.ones((1, 1, 0)), np.ones((1, 1, 1)), padding=2, padding_mode="replicate")


def test_without_positive_padding_every_mode_is_the_same():
    geometries = {Geometry.infer((1, 1, 5), (1, 1, 3), padding=-1, padding_mode=mode) for mode in ("zeros", *MODES)}
    assert len(geometries) == 1
