"""Calls made again: the same launches with other arrays, and nothing else; and only where nothing else was done."""

from unittest import mock

import numpy as np
import pytest

import gpuconv
import gpuconv.call
from gpuconv import replay
from tests import reference, standin
from tests.cases import DIRECTIONS, channels_first, laid_out, named_dtype
from tests.conftest import BACKENDS
from tests.emulation import launcher

pytestmark = pytest.mark.called_once("it repeats calls itself")

ON_KERNELS = pytest.mark.parametrize("arrays", BACKENDS[1:], indirect=True)
EMULATED = pytest.mark.parametrize("arrays", [BACKENDS[1]], indirect=True)
X, W, Y = (2, 8, 7, 6), (16, 8, 3, 3), (2, 16, 7, 6)
GEOMETRY = {"stride": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1)}


@pytest.fixture(autouse=True)
def _nothing_is_known():
    replay.clear()
    yield
    replay.clear()


def whole_numbers(rng, shape, dtype="float32"):
    return rng.integers(-3, 4, shape).astype(named_dtype(dtype))


def both(arrays, rng, direction, layout="channels_first", dtype="float32", **options):
    """The result of a call on new numbers, and the exact one."""
    given = {name: whole_numbers(rng, shape, dtype) for name, shape in (("x", X), ("w", W), ("dy", Y))}
    x, w, dy = (arrays.asarray(laid_out(a, layout, "w" if n == "w" else "x")) for n, a in given.items())
    options = {"padding": 1, "layout": layout, "algorithm": "implicit_gemm", **options}
    exact = {name: array.astype(float) for name, array in given.items()}
    if direction == "forward":
        result, expected = gpuconv.conv(x, w, **options), reference.forward(exact["x"], exact["w"], **GEOMETRY)
    elif direction == "data_grad":
        result = gpuconv.conv_data_grad(dy, w, x.shape, **options)
        expected = reference.data_grad(exact["dy"], exact["w"], X, **GEOMETRY)
    else:
        result = gpuconv.conv_weight_grad(dy, x, w.shape, **options)
        expected = reference.weight_grad(exact["dy"], exact["x"], W, **GEOMETRY)
    return channels_first(arrays.asnumpy(result), layout, "w" if direction == "weight_grad" else "x"), expected


def no_choice(*_, **__):
    raise AssertionError("a call that was made before chooses nothing")


@ON_KERNELS
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_second_call_is_nothing_but_launches(direction, dtype, layout, arrays, rng):
    first, expected = both(arrays, rng, direction, layout, dtype)
    np.testing.assert_array_equal(first, expected)
    with mock.patch.object(gpuconv.call, "choose", no_choice):
        for _ in range(2):
            result, expected = both(arrays, rng, direction, layout, dtype)
            np.testing.assert_array_equal(result, expected)


@EMULATED
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_same_kernels_are_launched(direction, arrays, rng):
    launched = []
    for _ in range(2):
        with launcher.using() as launches:
            both(arrays, rng, direction)
        launched.append([(launch.name, launch.grid) for launch in launches])
    assert launched[0] == launched[1]
    assert len(launched[0]) == (2 if direction == "weight_grad" else 1)


@ON_KERNELS
@pytest.mark.parametrize("algorithm", ["implicit_gemm", "direct"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_bias_activation_and_out_are_those_of_the_call(dtype, algorithm, arrays, rng):
    """A bias of half precision is converted anew, and one with steps is made contiguous."""
    for step in (1, 2, 1, 2):
        for given in (False, True, False, True):
            x, w, b = (whole_numbers(rng, shape, dtype) for shape in (X, W, (16 * step,)))
            z = reference.forward(x.astype(float), w.astype(float), **GEOMETRY) + b[::step, None, None].astype(float)
            out = arrays.asarray(np.zeros(Y, dtype)) if given else None
            y = gpuconv.conv(
                arrays.asarray(x),
                arrays.asarray(w),
                arrays.asarray(b)[::step],
                padding=1,
                activation="relu",
                algorithm=algorithm,
                out=out,
            )
            assert (y is out) == given
            np.testing.assert_array_equal(arrays.asnumpy(y), np.maximum(z, 0))


@ON_KERNELS
def test_what_lies_otherwise_is_another_call(arrays, rng):
    """By alignment, strides, dtype, and the order in memory that the result takes from its operand."""
    w = whole_numbers(rng, W)
    room = 3
    for beyond in (0, 1, 2, 0, 1):
        larger = whole_numbers(rng, (*X[:3], X[3] + room))
        x = larger[..., beyond : beyond + X[3]]
        for view in (arrays.asarray(larger)[..., beyond : beyond + X[3]], arrays.asarray(np.ascontiguousarray(x))):
            y = gpuconv.conv(view, arrays.asarray(w), padding=1, algorithm="implicit_gemm")
            expected = reference.forward(x.astype(float), w.astype(float), **GEOMETRY)
            np.testing.assert_array_equal(arrays.asnumpy(y), expected)
        last = gpuconv.conv(
            arrays.asarray(laid_out(x, "channels_last_memory")),
            arrays.asarray(w),
            padding=1,
            algorithm="implicit_gemm",
        )
        np.testing.assert_array_equal(arrays.asnumpy(last), expected)
        assert last.strides[1] == last.itemsize


@ON_KERNELS
def test_where_an_array_begins_decides_how_it_is_read(arrays, rng):
    """At a multiple of 16 bytes in chunks, elsewhere one by one."""
    w = whole_numbers(rng, W)
    for beyond in (0, 1, 0, 1):
        buffer = whole_numbers(rng, (np.prod(X) + 1,))
        x = arrays.asarray(buffer)[beyond : beyond + np.prod(X)].reshape((2, 7, 6, 8))
        on_device = arrays.asarray(laid_out(w, "channels_last", "w"))
        y = gpuconv.conv(x, on_device, padding=1, layout="channels_last", algorithm="implicit_gemm")
        expected = reference.forward(channels_first(arrays.asnumpy(x), "channels_last").astype(float), w, **GEOMETRY)
        np.testing.assert_array_equal(channels_first(arrays.asnumpy(y), "channels_last"), expected)


@EMULATED
def test_an_out_that_no_kernel_can_write_is_filled_by_a_copy(arrays, rng):
    for _ in range(3):
        x, w = whole_numbers(rng, X), whole_numbers(rng, W)
        out = np.zeros(np.prod(Y) * 4 + 1, np.uint8)[1:].view(np.float32).reshape(Y)
        with launcher.using(mode="checked"):  # which looks at the alignment of every store
            gpuconv.conv(x, w, padding=1, algorithm="implicit_gemm", out=out)
        np.testing.assert_array_equal(out, reference.forward(x.astype(float), w.astype(float), **GEOMETRY))


@ON_KERNELS
def test_one_array_in_two_places_is_not_remembered(arrays, rng):
    """Nobody could tell which of the two a kernel was given."""

    def product(dy, x):
        return arrays.asnumpy(gpuconv.conv_weight_grad(dy, x, (8, 8, 1, 1), algorithm="implicit_gemm"))

    for same in (True, False, True, False):
        x, dy = (whole_numbers(rng, X) for _ in range(2))
        on_device = arrays.asarray(x)
        result = product(on_device, on_device) if same else product(arrays.asarray(dy), on_device)
        expected = np.einsum("nfhw,nchw->fc", x if same else dy, x)[..., None, None]
        np.testing.assert_array_equal(result, expected)


@ON_KERNELS
@pytest.mark.parametrize("y_dtype", ["float32", "float64"])
def test_derivatives_come_from_the_y_of_the_call(y_dtype, arrays, rng):
    """Where y has another dtype, the product with the derivative is formed before, which no launch repeats."""
    for _ in range(3):
        x, w, dy, y = (whole_numbers(rng, shape) for shape in (X, W, Y, Y))
        gradients = gpuconv.conv_backward(
            *map(arrays.asarray, (dy, x, w)),
            padding=1,
            activation="relu",
            y=arrays.asarray(y.astype(y_dtype)),
            algorithm="implicit_gemm",
        )
        through = np.where(y > 0, dy, 0).astype(float)
        dx, dw, db = map(arrays.asnumpy, gradients)
        np.testing.assert_array_equal(dx, reference.data_grad(through, w.astype(float), X, **GEOMETRY))
        np.testing.assert_array_equal(dw, reference.weight_grad(through, x.astype(float), W, **GEOMETRY))
        np.testing.assert_array_equal(db, through.sum((0, 2, 3)))


@EMULATED
def test_the_environment_decides_every_call(arrays, rng, monkeypatch):
    """The precision and the workspace limit of now, not those of the first call."""
    both(arrays, rng, "forward")
    monkeypatch.setenv("GPUCONV_PRECISION", "tf32")
    x = np.full(X, 1 + 2.0**-12, np.float32)
    call = {"padding": 1, "algorithm": "implicit_gemm"}
    rounded = gpuconv.conv(x, np.ones(W, np.float32), **call)
    monkeypatch.setenv("GPUCONV_PRECISION", "ieee")
    assert (gpuconv.conv(x, np.ones(W, np.float32), **call) > rounded).all()
    monkeypatch.setenv("GPUCONV_PRECISION", "tf64")
    with pytest.raises(ValueError, match="GPUCONV_PRECISION must be one of"):
        gpuconv.conv(x, np.ones(W, np.float32), **call)
    monkeypatch.delenv("GPUCONV_PRECISION")
    both(arrays, rng, "weight_grad")
    monkeypatch.setenv("GPUCONV_WORKSPACE_LIMIT", str(2 * 4 * W[1] * 9))  # the sums of one filter, and of a slice
    with launcher.using() as launches:
        both(arrays, rng, "weight_grad")
    assert len(launches) == 2 * W[0]  # filter by filter


@pytest.mark.parametrize("arrays", [BACKENDS[2]], indirect=True)
def test_each_device_has_calls_of_its_own(arrays, rng):
    """Kernels are loaded once for each."""
    both(arrays, rng, "forward")
    with mock.patch.object(standin.ndarray, "device", property(lambda array: standin.Device(1))):
        both(arrays, rng, "forward")
    assert len(replay._known) == 2


@EMULATED
def test_sources_are_written_from_now_on(arrays, rng, monkeypatch, tmp_path):
    both(arrays, rng, "forward")
    monkeypatch.setenv("GPUCONV_DUMP", str(tmp_path))
    both(arrays, rng, "forward")
    assert len(list(tmp_path.glob("implicit_gemm-*.cu"))) == 1


@EMULATED
def test_wrong_arguments_are_refused_as_at_the_first_call(arrays):
    x, w = np.ones(X, np.float32), np.ones(W, np.float32)
    gpuconv.conv(x, w, stride=1, padding=(1, 1), algorithm="implicit_gemm")
    for settings in ({"stride": True}, {"stride": 1.0}, {"padding": (1, True)}, {"groups": True}, {"flip": 0}):
        with pytest.raises(TypeError):
            gpuconv.conv(x, w, **{"stride": 1, "padding": (1, 1), **settings}, algorithm="implicit_gemm")
    with pytest.raises(ValueError, match="out must not overlap x"):
        gpuconv.conv(x, np.ones((8, 8, 3, 3), np.float32), padding=1, algorithm="implicit_gemm", out=x)


@EMULATED
def test_calls_are_forgotten(arrays, rng, monkeypatch):
    both(arrays, rng, "forward")
    assert len(replay._known) == 1
    gpuconv.clear_cache()
    assert not replay._known
    monkeypatch.setattr(replay, "_MOST", 3)
    for channels in range(1, 6):
        gpuconv.conv(np.ones((1, channels, 5)), np.ones((4, channels, 3)), algorithm="implicit_gemm")
        assert len(replay._known) <= 3


@EMULATED
@pytest.mark.parametrize("flip, algorithm", [(True, "implicit_gemm"), (False, "scatter")])
def test_other_calls_go_the_long_way(flip, algorithm, arrays, rng):
    """Kernels begin at the other end of a flipped array; and scatter sets its sums to zero before it launches."""
    w, dy = (whole_numbers(rng, shape) for shape in (W, Y))
    for _ in range(2):
        dx = gpuconv.conv_data_grad(dy, w, X, padding=1, flip=flip, algorithm=algorithm, deterministic=False)
        w_seen = w[:, :, ::-1, ::-1] if flip else w
        np.testing.assert_array_equal(dx, reference.data_grad(dy.astype(float), w_seen.astype(float), X, **GEOMETRY))
        assert not any(replay._known.values())
        w += 1
