"""Small calls made again on NumPy: the same functions on other arrays, and nothing else."""

import threading
from unittest import mock

import numpy as np
import pytest

import gpuconv
import gpuconv.call
from gpuconv import replay
from tests import reference
from tests.cases import CASES, DIRECTIONS, channels_first, draw, laid_out, named_dtype

pytestmark = pytest.mark.called_once("it repeats calls itself")

X, W, Y = (1, 8, 16, 16), (8, 8, 3, 3), (1, 8, 16, 16)
GEOMETRY = {"stride": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1)}


@pytest.fixture(autouse=True)
def _nothing_is_known():
    replay.clear()
    yield
    replay.clear()


def no_choice(*_, **__):
    raise AssertionError("a call that was made before chooses nothing")


NOTHING_IS_CHOSEN = mock.patch.object(gpuconv.call, "choose", no_choice)


def computed(direction, x, w, dy, **options):
    if direction == "forward":
        return gpuconv.conv(x, w, **options)
    if direction == "data_grad":
        return gpuconv.conv_data_grad(dy, w, x.shape, **options)
    return gpuconv.conv_weight_grad(dy, x, w.shape, **options)


def expected(direction, x, w, dy, **settings):
    if direction == "forward":
        return reference.forward(x, w, **settings)
    if direction == "data_grad":
        return reference.data_grad(dy, w, x.shape, **settings)
    return reference.weight_grad(dy, x, w.shape, **settings)


def whole_numbers(rng, dtype="float32"):
    return [draw(rng, shape, dtype, True).astype(named_dtype(dtype)) for shape in (X, W, Y)]


@pytest.mark.parametrize("algorithm", ["im2col", "scatter"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_case_can_be_made_again(direction, case, algorithm, rng):
    dtype = ("float32", "float16", "complex64", "bfloat16", "float64")[CASES.index(case) % 5]
    layout = ("channels_first", "channels_last")[CASES.index(case) % 2]
    geometry = case.geometry()
    for _ in range(3):
        arrays = [draw(rng, shape, dtype, True) for shape in (case.x, case.w, geometry.y_shape)]
        x, w, dy = (laid_out(a.astype(named_dtype(dtype)), layout, role) for a, role in zip(arrays, "xwx", strict=True))
        result = computed(direction, x, w, dy, **case.settings, algorithm=algorithm, layout=layout)
        exact = expected(direction, *arrays, **case.settings)
        role = "w" if direction == "weight_grad" else "x"
        np.testing.assert_array_equal(channels_first(result, layout, role), exact.astype(named_dtype(dtype)))


def test_a_repeated_call_is_a_handful_of_functions():
    """Zeros, x among them, the windows, and the product; data_grad asks about w, and turns it round."""
    x, w, dy = (np.ones(shape, np.float32) for shape in (X, W, Y))
    for direction, steps in (("forward", 4), ("data_grad", 6), ("weight_grad", 4)):
        replay.clear()
        computed(direction, x, w, dy, padding=1)
        (known,) = replay._known.values()
        assert len(known.steps) == steps


@pytest.mark.parametrize("layout", ["channels_first", "channels_last", "channels_last_memory"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_nothing_is_chosen_again(direction, layout, rng):
    with np.errstate(all="raise"):
        for again in (False, True, True):
            x, w, dy = whole_numbers(rng)
            lying = [laid_out(array, layout, role) for array, role in ((x, "x"), (w, "w"), (dy, "x"))]
            with NOTHING_IS_CHOSEN if again else mock.patch.object(replay, "_MOST", 100):
                axes = "channels_last" if layout == "channels_last" else "channels_first"
                result = computed(direction, *lying, padding=1, layout=axes)
            exact = expected(direction, *(array.astype(float) for array in (x, w, dy)), **GEOMETRY)
            role = "w" if direction == "weight_grad" else "x"
            np.testing.assert_array_equal(channels_first(result, layout, role), exact)


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "sigmoid", "tanh"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_bias_activation_and_out_are_those_of_the_call(dtype, activation, rng):
    for given in (False, True, False, True):
        x, w, _ = whole_numbers(rng, dtype)
        b = draw(rng, (8,), dtype, True).astype(dtype)
        out = np.zeros(Y, dtype) if given else None
        y = gpuconv.conv(x, w, b, padding=1, activation=activation, out=out)
        replay.clear() if given else None
        once = gpuconv.conv(x, w, b, padding=1, activation=activation)
        assert (y is out) == given
        np.testing.assert_array_equal(y, once)
    z = reference.forward(x.astype(float), w.astype(float), **GEOMETRY) + b[:, None, None].astype(float)
    if activation in (None, "relu"):
        np.testing.assert_array_equal(y, z if activation is None else np.maximum(z, 0))


def test_gradients_behind_an_activation_are_those_of_the_call(rng):
    for _ in range(3):
        x, w, dy = whole_numbers(rng)
        y = np.maximum(gpuconv.conv(x, w, padding=1), 0)
        dx, dw, _ = gpuconv.conv_backward(dy, x, w, padding=1, activation="relu", y=y)
        numbers = x.astype(float), w.astype(float), np.where(y > 0, dy, 0).astype(float)
        np.testing.assert_array_equal(dx, expected("data_grad", *numbers, **GEOMETRY))
        np.testing.assert_array_equal(dw, expected("weight_grad", *numbers, **GEOMETRY))


def test_nan_in_w_goes_its_own_way(rng):
    """data_grad by residues would take it to inputs that it does not belong to."""
    _, w, dy = whole_numbers(rng)
    dy[..., :2, :] = 0
    for value in (1.0, np.nan, 2.0, np.inf, 3.0):
        w[0, 0, 0, 0] = value
        replay.clear() if value == 2.0 else None
        with np.errstate(invalid="ignore"):
            dx = gpuconv.conv_data_grad(dy, w, X, padding=1)
            np.testing.assert_array_equal(dx, gpuconv.conv_data_grad(dy, w, X, padding=1, algorithm="scatter"))
    assert np.isfinite(dx).all()


def test_arrays_that_share_memory_are_not_taken_for_one_another(rng):
    """x and w of the same memory, then of their own."""
    both = whole_numbers(rng)[1]
    for x, w in ((both, both), (both, both + 1), (both + 1, both), (both, both)):
        y = gpuconv.conv(x, w, padding=1)
        np.testing.assert_array_equal(y, reference.forward(x.astype(float), w.astype(float), **GEOMETRY))


def test_views_of_larger_arrays_are_read_where_they_lie(rng):
    for step in (1, 2, -1, 1, 2, -1):
        larger = rng.integers(-3, 4, (3, *X[1:3], 2 * X[3])).astype(np.float32)
        w = whole_numbers(rng)[1]
        for x in (larger[1:2, ..., :16], np.ascontiguousarray(larger)[1:2].reshape(1, 16, 16, 16)[:, 8:]):
            y = gpuconv.conv(x[..., ::step, :], w, padding=1)
            exact = reference.forward(x[..., ::step, :].astype(float), w.astype(float), **GEOMETRY)
            np.testing.assert_array_equal(y, exact)


def test_settings_make_another_call(monkeypatch, rng):
    x, w, _ = whole_numbers(rng)
    gpuconv.conv(x, w, padding=1)
    for number, (name, value) in enumerate(
        (("GPUCONV_WORKSPACE_LIMIT", "32KiB"), ("GPUCONV_PRECISION", "tf32")), start=2
    ):
        monkeypatch.setenv(name, value)
        y = gpuconv.conv(x, w, padding=1)
        np.testing.assert_array_equal(y, reference.forward(x.astype(float), w.astype(float), **GEOMETRY))
        assert len(replay._known) == number
    gpuconv.clear_cache()
    assert not replay._known


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    "x_shape, w_shape, options",
    [
        ((4, 64, 32, 32), (64, 64, 3, 3), {"algorithm": "winograd"}),
        ((4, 64, 32, 32), (64, 64, 3, 3), {"algorithm": "im2col"}),
        ((8, 32, 32, 32), (32, 32, 3, 3), {"algorithm": "scatter", "stride": 2}),
        ((8, 96, 28, 28), (96, 1, 5, 5), {"algorithm": "depthwise", "groups": 96}),
        ((16, 3, 64, 64), (32, 3, 7, 7), {"stride": 2, "algorithm": "im2col"}),
        ((8, 256, 7, 7), (256, 256, 1, 1), {"algorithm": "im2col"}),
        ((4, 128, 32, 32), (64, 128, 2, 2), {"algorithm": "im2col", "stride": 2}),
    ],
    ids=["winograd", "im2col", "scatter", "depthwise", "stem", "1x1", "patches"],
)
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_calls_on_several_threads_are_made_again_with_the_same_bits(
    layout, x_shape, w_shape, options, direction, monkeypatch, rng
):
    monkeypatch.setenv("GPUCONV_NUM_THREADS", "3")
    y_shape = gpuconv.conv(np.zeros(x_shape, np.float32), np.zeros(w_shape, np.float32), **options).shape
    replay.clear()
    for _ in range(3):
        arrays = (rng.standard_normal(shape, dtype=np.float32) for shape in (x_shape, w_shape, y_shape))
        lying = [laid_out(array, layout, role) for array, role in zip(arrays, "xwx", strict=True)]
        again = computed(direction, *lying, layout=layout, **options)
        assert any(replay._known.values())
        known = dict(replay._known)
        replay.clear()
        np.testing.assert_array_equal(again, computed(direction, *lying, layout=layout, **options))
        replay._known.update(known)


def test_calls_of_more_steps_than_the_limit_has_room_for_are_not_made_again(monkeypatch, rng):
    monkeypatch.setenv("GPUCONV_WORKSPACE_LIMIT", "128KiB")
    x, w, _ = whole_numbers(rng)
    for _ in range(2):
        y = gpuconv.conv(x, w, padding=1)
        np.testing.assert_array_equal(y, reference.forward(x.astype(float), w.astype(float), **GEOMETRY))
    assert not any(replay._known.values())


def test_only_so_many_steps_are_remembered(monkeypatch, rng):
    monkeypatch.setattr(replay, "_MOST", 20)
    x, w, _ = whole_numbers(rng)
    for rows in range(3, 16):
        gpuconv.conv(np.ascontiguousarray(x[:, :, :rows]), w, padding=1)
        assert sum(known.size for known in replay._known.values()) <= 20 + 8


def test_many_threads_make_calls_again(rng):
    x, w, dy = whole_numbers(rng)
    numbers = [x.astype(float), w.astype(float), dy.astype(float)]
    exact = {direction: expected(direction, *numbers, **GEOMETRY) for direction in DIRECTIONS}
    wrong = []

    def work(seed):
        for turn in range(60):
            direction = DIRECTIONS[(seed + turn) % 3]
            factor = np.float32(1 + (seed + turn) % 4)
            scaled = (x * factor, w, dy) if direction != "data_grad" else (x, w, dy * factor)
            if not np.array_equal(computed(direction, *scaled, padding=1), exact[direction] * factor):
                wrong.append((seed, turn, direction))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
