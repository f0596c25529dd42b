"""Properties of the public functions other than values: batch axes, memory order, out, activations, dtypes, needs."""

import ml_dtypes
import numpy as np
import pytest

import gpuconv
from gpuconv import activations
from gpuconv.select import TRANSFORMS
from tests import reference
from tests.backends import BACKENDS
from tests.cases import DIRECTIONS, EXACT_ALGORITHMS, GENERAL_ALGORITHMS, draw, is_on, laid_out, named_dtype
from tests.tiers import combinations, compiles_much
from tests.tolerances import assert_within, bound_of, epsilon

ONE = ((1, 1), (1, 1))
SETTINGS = {"stride": (1, 1), "padding": ONE, "dilation": (1, 1)}


@pytest.fixture
def xwb(rng):
    return (
        draw(rng, (2, 3, 6, 7), "float64", True),
        draw(rng, (4, 3, 3, 3), "float64", True),
        draw(rng, (4,), "float64", True),
    )


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (2, 1, 2), (0,), (2, 0)])
def test_batch_axes_come_back(batch, layout, arrays, rng):
    x, w = draw(rng, (*batch, 4, 5, 6), "float32", True), draw(rng, (4, 2, 3, 3), "float32", True)
    count = int(np.prod(batch, dtype=int))
    flat = x.reshape(count, 4, 5, 6)
    y = reference.forward(flat, w, **SETTINGS, groups=2)
    dy = draw(rng, y.shape, "float32", True)
    expected = (
        y.reshape(*batch, 4, 5, 6),
        reference.data_grad(dy, w, flat.shape, **SETTINGS, groups=2).reshape(*batch, 4, 5, 6),
        reference.weight_grad(dy, flat, w.shape, **SETTINGS, groups=2),
        dy.sum((0, 2, 3)),
    )
    dy = dy.reshape(*batch, 4, 5, 6)
    if layout == "channels_last":
        x, dy = np.moveaxis(x, -3, -1), np.moveaxis(dy, -3, -1)
        w = laid_out(w, layout, "w")
        expected = (*(np.moveaxis(a, -3, -1) for a in expected[:2]), laid_out(expected[2], layout, "w"), expected[3])
    x, w, dy = (arrays.asarray(np.ascontiguousarray(a.astype(np.float32))) for a in (x, w, dy))
    results = (
        gpuconv.conv(x, w, padding=1, groups=2, layout=layout),
        *gpuconv.conv_backward(dy, x, w, padding=1, groups=2, layout=layout),
    )
    for result, exact in zip(results, expected, strict=True):
        np.testing.assert_array_equal(arrays.asnumpy(result), exact)


VIEWS = {
    "negative strides": lambda a: a[..., ::-1, ::-1],
    "Fortran order": lambda a: np.asfortranarray(a),
    "steps": lambda a: np.repeat(np.repeat(a, 2, -1), 2, 0)[::2, ..., ::2],
    "swapped axes": lambda a: np.swapaxes(np.swapaxes(a, 0, 3).copy(), 0, 3),
    "other byte order": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "inside a larger array": lambda a: np.pad(a, 1)[1:-1, 1:-1, 1:-1, 1:-1],
}


@combinations(arrays=["numpy", "emulated"], name=VIEWS, algorithm=GENERAL_ALGORITHMS, where=is_on)
def test_any_strides_are_taken_and_come_back_contiguous(name, algorithm, arrays, xwb):
    x, w, b = xwb
    view = VIEWS[name]
    x, w = view(x), view(w)
    y = gpuconv.conv(x, w, b, padding=1, algorithm=algorithm)
    dy = view(y.copy())
    dx, dw, db = gpuconv.conv_backward(dy, x, w, padding=1, algorithm=algorithm)
    for result, exact in (
        (y, lambda x, w, _: reference.forward(x, w, **SETTINGS) + b[:, None, None]),
        (dx, lambda x, w, dy: reference.data_grad(dy, w, x.shape, **SETTINGS)),
        (dw, lambda x, w, dy: reference.weight_grad(dy, x, w.shape, **SETTINGS)),
    ):
        numbers = [a.astype(float) for a in (x, w, dy)]
        if algorithm in TRANSFORMS:
            magnitude = exact(*map(abs, numbers))
            assert_within(result, exact(*numbers), bound_of(algorithm, exact(*numbers), magnitude, 1, "float64"))
        else:
            np.testing.assert_array_equal(result, exact(*numbers))
    for result in (y, dx, dw, db):
        assert result.flags.c_contiguous
        assert result.dtype.isnative


def test_broadcast_and_read_only_arrays_and_memmaps_are_taken(tmp_path, xwb):
    x, w, b = xwb
    ones = np.broadcast_to(1.0, x.shape)
    np.testing.assert_array_equal(
        gpuconv.conv(ones, w), reference.forward(np.ones(x.shape), w, (1, 1), ((0, 0),) * 2, (1, 1))
    )
    x.setflags(write=False)
    np.save(tmp_path / "w.npy", w)
    mapped = np.load(tmp_path / "w.npy", mmap_mode="r")
    y = gpuconv.conv(x, mapped, b)
    assert type(y) is np.ndarray
    np.testing.assert_array_equal(y, gpuconv.conv(x, w, b))


def test_inputs_are_not_modified(xwb):
    x, w, b = xwb
    before = [a.copy() for a in xwb]
    y = gpuconv.conv(x, w, b, padding=1, activation="sigmoid")
    dy = np.ones_like(y)
    gpuconv.conv_backward(dy, x, w, padding=1, activation="sigmoid", y=y)
    for array, copy in zip((*xwb, dy), (*before, np.ones_like(y)), strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_out_of_any_strides_receives_the_result(layout, arrays, rng):
    x, w = draw(rng, (2, 3, 6, 7), "float32", True), draw(rng, (4, 3, 3, 3), "float32", True)
    x, w = (np.ascontiguousarray(laid_out(a, layout, role).astype(np.float32)) for a, role in ((x, "x"), (w, "w")))
    x, w = arrays.asarray(x), arrays.asarray(w)
    y = gpuconv.conv(x, w, padding=1, layout=layout)
    dy = y
    for compute in (
        lambda out: gpuconv.conv(x, w, padding=1, layout=layout, out=out),
        lambda out: gpuconv.conv_data_grad(dy, w, x.shape, padding=1, layout=layout, out=out),
        lambda out: gpuconv.conv_weight_grad(dy, x, w.shape, padding=1, layout=layout, out=out),
        lambda out: gpuconv.conv_transpose(dy, w, padding=1, layout=layout, out=out),
    ):
        expected = arrays.asnumpy(compute(None))
        room = np.full([2 * n + 1 for n in expected.shape], np.nan, np.float32)
        steps = tuple(slice(1, None, 2) if axis % 2 else slice(-2, None, -2) for axis in range(expected.ndim))
        if arrays.name == "cupy":
            room = arrays.xp.asarray(room)
            out = room[steps]
        else:
            out = arrays.asarray(room[steps])
        assert compute(out) is out
        np.testing.assert_array_equal(arrays.asnumpy(out), expected)
        everything = arrays.asnumpy(room) if arrays.name == "cupy" else room
        assert np.isfinite(everything).sum() == expected.size, "wrote outside out"


def test_backward_computes_what_is_needed(xwb):
    x, w, _ = xwb
    dy = gpuconv.conv(x, w)
    whole = gpuconv.conv_backward(dy, x, w)
    for needs in ((), "dx", ("dw",), ["db", "dx"], ("dx", "dw", "db")):
        part = gpuconv.conv_backward(dy, x, w, needs=needs)
        wanted = (needs,) if isinstance(needs, str) else needs
        for name in ("dx", "dw", "db"):
            if name in wanted:
                np.testing.assert_array_equal(getattr(part, name), getattr(whole, name))
            else:
                assert getattr(part, name) is None


ACTIVATIONS = {
    "relu": (lambda z: np.maximum(z, 0), lambda y: np.where(y > 0, 1.0, 0.0)),
    "leaky_relu": (lambda z: np.where(z > 0, z, 0.01 * z), lambda y: np.where(y > 0, 1.0, 0.01)),
    "sigmoid": (lambda z: 1 / (1 + np.exp(-z)), lambda y: y * (1 - y)),
    "tanh": (np.tanh, lambda y: 1 - y * y),
}


@pytest.mark.parametrize("name", list(filter(None, ACTIVATIONS)))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_activations_are_applied_in_place_at_any_stride(name, dtype, rng):
    for stride in range(1, 18):
        given = rng.standard_normal((100, stride)).astype(dtype)[:, 0]
        expected = ACTIVATIONS[name][0](given.astype(np.float64))
        activations.apply(given, name, np)
        np.testing.assert_allclose(given, expected, rtol=1e-5)


@combinations(
    arrays=BACKENDS,
    name=ACTIVATIONS,
    dtype=["float16", "bfloat16", "float32", "float64"],
    algorithm=GENERAL_ALGORITHMS,
    where=lambda arrays, dtype, algorithm, name: (
        is_on(arrays, algorithm) and (compiles_much(arrays) or dtype == "float32")
    ),
    turns=["dtype"],
)
def test_activation_and_its_derivative(name, dtype, algorithm, arrays, rng):
    function, derivative = ACTIVATIONS[name]
    x, w, b = (draw(rng, shape, dtype, False) for shape in ((2, 3, 6, 7), (4, 3, 3, 3), (4,)))
    z = reference.forward(x, w, **SETTINGS) + b[:, None, None]
    magnitude = reference.forward(abs(x), abs(w), **SETTINGS) + abs(b[:, None, None])
    given = [arrays.asarray(a.astype(named_dtype(dtype))) for a in (x, w, b)]
    y = gpuconv.conv(*given, padding=1, activation=name, algorithm=algorithm)
    rounding = 4 * epsilon(named_dtype(dtype)) + 16 * epsilon(
        np.dtype(np.float32 if dtype != "float64" else np.float64)
    )
    # Every activation here has a slope of at most 1.
    assert_within(arrays.asnumpy(y), function(z), bound_of(algorithm, z, magnitude, 28, dtype) + rounding)

    exact_y = arrays.asnumpy(y).astype(np.float64)
    dy = draw(rng, z.shape, dtype, False)
    g = dy * derivative(exact_y)
    gradients = gpuconv.conv_backward(
        arrays.asarray(dy.astype(named_dtype(dtype))), *given[:2], padding=1, activation=name, y=y, algorithm=algorithm
    )
    for gradient, exact, size, terms in (
        (
            gradients.dx,
            reference.data_grad(g, w, x.shape, **SETTINGS),
            reference.data_grad(abs(g), abs(w), x.shape, **SETTINGS),
            36,
        ),
        (
            gradients.dw,
            reference.weight_grad(g, x, w.shape, **SETTINGS),
            reference.weight_grad(abs(g), abs(x), w.shape, **SETTINGS),
            84,
        ),
        (gradients.db, g.sum((0, 2, 3)), abs(g).sum((0, 2, 3)), 84),
    ):
        assert_within(arrays.asnumpy(gradient), exact, bound_of(algorithm, exact, size, terms, dtype))


def test_sigmoid_is_accurate_and_silent_far_out():
    x = np.array([[-1000.0, -80.0, -20.0, 0.0, 20.0, 1000.0]], np.float32)
    y = gpuconv.conv(x, np.ones((1, 1, 1), np.float32), activation="sigmoid")
    np.testing.assert_allclose(y[0], [0, 1.8048514e-35, 2.0611537e-09, 0.5, 1, 1], rtol=1e-6)


def test_bias_and_activation_reach_what_no_tap_reaches(arrays):
    x, w, b = (arrays.asarray(a) for a in (np.ones((1, 1, 2)), np.ones((1, 2, 1)), np.array([3.0, -1.0])))
    y = gpuconv.conv_transpose(x, w, b, stride=3, output_padding=2, padding=((-1, -1),), activation="relu")
    np.testing.assert_array_equal(arrays.asnumpy(y), [[[3, 4, 3, 3, 4, 3, 3, 3], [0] * 8]])


@combinations(
    arrays=["numpy", "emulated"],
    dtypes=[
        ("float16", "float32", "float32"),
        ("float16", "float64", "float64"),
        ("float32", "complex64", "complex64"),
        ("float64", "complex64", "complex128"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("bfloat16", "float16", "float32"),
        ("bfloat16", "float32", "float32"),
        ("bfloat16", "float64", "float64"),
        ("bfloat16", "complex64", "complex64"),
        ("bfloat16", "complex128", "complex128"),
    ],
    algorithm=EXACT_ALGORITHMS,
    where=lambda arrays, algorithm, dtypes: (
        is_on(arrays, algorithm) and (arrays != "numpy" or algorithm != "direct" or "complex" not in dtypes[2])
    ),
    turns=["algorithm"],
)
def test_dtypes_are_promoted(dtypes, algorithm, arrays, rng):
    one, other, result = dtypes
    x, w = draw(rng, (2, 3, 5, 5), one, True), draw(rng, (4, 3, 3, 3), other, True)
    given = x.astype(named_dtype(one)), w.astype(named_dtype(other))
    y = gpuconv.conv(*given, algorithm=algorithm)
    no_padding = {**SETTINGS, "padding": ((0, 0), (0, 0))}
    assert y.dtype == named_dtype(result)
    exact = reference.forward(x, w, **no_padding)
    np.testing.assert_array_equal(y, exact.astype(y.dtype))
    gradients = gpuconv.conv_backward(y, *given, algorithm=algorithm)
    assert {g.dtype for g in gradients} == {named_dtype(result)}
    np.testing.assert_array_equal(
        gradients.dx, reference.data_grad(y.astype(exact.dtype), w, x.shape, **no_padding).astype(y.dtype)
    )


def test_bias_takes_part_in_promotion_but_y_of_backward_does_not():
    x, w = np.ones((1, 1, 4), np.float32), np.ones((1, 1, 2), np.float32)
    assert gpuconv.conv(x, w, np.ones(1)).dtype == np.float64
    y = gpuconv.conv(x, w).astype(np.float64)
    assert gpuconv.conv_backward(y.astype(np.float32), x, w, y=y, activation="relu").dx.dtype == np.float32


def test_half_precision_sums_are_formed_in_float32():
    # 4096 + 1 rounds to 4096 in float16, and 256 + 1 to 256 in bfloat16.
    for dtype in (np.float16, ml_dtypes.bfloat16):
        x = np.full((1, 2, 3000), 1, dtype)
        ones = np.ones((1, 2, 3000), dtype)
        assert gpuconv.conv(x, ones)[0, 0, 0] == dtype(6000)
        dw = gpuconv.conv_weight_grad(np.ones((1, 1, 3000), dtype), x, (1, 2, 1))
        assert (dw == dtype(3000)).all()
        db = gpuconv.conv_backward(np.ones((1, 1, 3000), dtype), x, np.ones((1, 2, 1), dtype), needs="db").db
        assert db[0] == dtype(3000)


def test_long_sums_of_like_terms_do_not_drift():
    dy = np.full((1, 1, 4_000_000), 0.1, np.float32)
    x, w = np.ones((1, 1, 4_000_000), np.float32), np.ones((1, 1, 1), np.float32)
    exact = 4_000_000 * float(np.float32(0.1))
    gradients = gpuconv.conv_backward(dy, x, w)
    bound = 2 * np.sqrt(4_000_000) * epsilon(np.dtype(np.float32)) * exact
    assert abs(gradients.db[0] - exact) <= bound
    assert abs(gradients.dw[0, 0, 0] - exact) <= bound


@combinations(
    arrays=BACKENDS,
    algorithm=GENERAL_ALGORITHMS,
    where=lambda arrays, algorithm: is_on(arrays, algorithm) and (algorithm != "scatter" or arrays == "numpy"),
)
def test_the_same_call_gives_the_same_bits(algorithm, arrays, rng):
    """The exception is the kernels of scatter, whose additions have no fixed order."""
    x, w = rng.standard_normal((2, 8, 9, 10), np.float32), rng.standard_normal((8, 8, 3, 3), np.float32)
    x, w = arrays.asarray(x), arrays.asarray(w)
    y = gpuconv.conv(x, w, algorithm=algorithm)
    first = gpuconv.conv_backward(y, x, w, algorithm=algorithm)
    for _ in range(3):
        with arrays.varied():
            results = gpuconv.conv_backward(y, x, w, algorithm=algorithm)
        for again, before in zip(results, first, strict=True):
            np.testing.assert_array_equal(arrays.asnumpy(again), arrays.asnumpy(before))


def test_zero_channels_and_filters_give_bias_and_zeros():
    y = gpuconv.conv(np.ones((2, 0, 4)), np.ones((3, 0, 2)), np.arange(3.0))
    np.testing.assert_array_equal(y, np.broadcast_to(np.arange(3.0)[:, None], (2, 3, 3)))
    gradients = gpuconv.conv_backward(np.ones((2, 0, 3)), np.ones((2, 4, 4)), np.ones((0, 4, 2)))
    np.testing.assert_array_equal(gradients.dx, np.zeros((2, 4, 4)))
    assert gradients.dw.shape == (0, 4, 2)


def test_flip_is_true_convolution():
    x, w = np.arange(6.0).reshape(1, 6), np.array([[[1.0, 2.0, 4.0]]])
    np.testing.assert_array_equal(gpuconv.conv(x, w, flip=True, padding="full")[0], np.convolve(x[0], w[0, 0]))


def test_nothing_is_left_of_a_call_after_clear_cache(rng):
    x, w = rng.standard_normal((2, 8, 30, 30)), rng.standard_normal((8, 8, 3, 3))
    y = gpuconv.conv(x, w)
    gpuconv.clear_cache()
    np.testing.assert_array_equal(gpuconv.conv(x, w), y)


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_the_bias_gradient_of_an_empty_batch_is_zero(activation):
    x, w, y = np.ones((0, 2, 8)), np.ones((3, 2, 3)), np.ones((0, 3, 6))
    np.testing.assert_array_equal(gpuconv.conv_backward(y, x, w, activation=activation, y=y).db, np.zeros(3))


@pytest.mark.parametrize("images, channels, filters", [(1, 0, 2), (1, 2, 0), (0, 2, 2), (0, 0, 0)])
@pytest.mark.parametrize("kernel, stride", [((3, 3), 1), ((1, 1), 1), ((3, 3), 2), ((7, 7), 1)])
def test_without_channels_filters_or_images_each_sum_is_zero(images, channels, filters, kernel, stride):
    """Every algorithm accepts or refuses it with a reason. The name of an activation may be any equal string."""
    x, w = np.ones((images, channels, 9, 9)), np.ones((filters, channels, *kernel))
    extents = [(9 - extent) // stride + 1 for extent in kernel]
    y = gpuconv.conv(x, w, stride=stride, activation="".join(("sig", "moid")))
    np.testing.assert_array_equal(y, np.full((images, filters, *extents), 0.5))
    dx, dw, db = gpuconv.conv_backward(np.ones_like(y), x, w, stride=stride)
    np.testing.assert_array_equal(dx, np.zeros_like(x))
    np.testing.assert_array_equal(dw, np.zeros_like(w))
    np.testing.assert_array_equal(db, np.full(filters, images * np.prod(extents)))
    for direction in DIRECTIONS:
        explanation = gpuconv.explain(x.shape, w.shape, stride=stride, direction=direction, backend="numpy")
        assert explanation.algorithm == "im2col"
        assert len(explanation.refused) == len(gpuconv.ALGORITHMS) - 1


@pytest.mark.parametrize("algorithm", ["auto", "im2col", "fft"])
def test_the_gradient_of_an_empty_extent_is_empty(algorithm):
    dx = gpuconv.conv_data_grad(np.ones((1, 1, 4)), np.ones((1, 1, 3)), (1, 1, 0), padding=3, algorithm=algorithm)
    assert dx.shape == (1, 1, 0)


@pytest.mark.parametrize("extent", [2, 3, 4, 5])
def test_same_lower_is_the_mode_same_of_scipy(extent, rng):
    signal = pytest.importorskip("scipy.signal")
    x, w = rng.integers(-9, 9, 11).astype(float), rng.integers(-9, 9, extent).astype(float)
    y = gpuconv.conv(x[None, None], w[None, None], padding="same_lower", flip=True, algorithm="im2col")[0, 0]
    np.testing.assert_array_equal(y, signal.convolve(x, w, "same", method="direct"))
