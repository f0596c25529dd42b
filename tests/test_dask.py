"""Compare gpuconv.dask with the same calls on whole arrays, for any chunks and schedulers."""

import itertools
import os
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import gpuconv
from gpuconv.geometry import Geometry
from tests import backends, tiers
from tests.cases import draw, laid_out
from tests.test_random import convolutions
from tests.tolerances import assert_within, direct_bound

dask = pytest.importorskip("dask", reason="Dask is not installed")
import dask.array as da  # noqa: E402
from dask.array.core import PerformanceWarning  # noqa: E402

import gpuconv.dask  # noqa: E402

MODES = ("zeros", "circular", "reflect", "replicate")
pytestmark = pytest.mark.filterwarnings("ignore:small chunks")


@pytest.fixture(autouse=True)
def _threads():
    with dask.config.set(scheduler="threads", num_workers=3):
        yield


@st.composite
def chunks(draw_from, shape):
    """Draw chunks of each axis, of one element or more."""
    axes = []
    for extent in shape:
        cuts = draw_from(st.sets(st.integers(1, max(1, extent - 1)), max_size=4)) if extent > 1 else set()
        bounds = [0, *sorted(cuts), extent]
        axes.append(tuple(stop - start for start, stop in itertools.pairwise(bounds)))
    return tuple(axes)


@hypothesis_settings(max_examples=300 if tiers.full else 25)
@given(
    convolutions(),
    st.sampled_from(MODES),
    st.sampled_from(["channels_first", "channels_last"]),
    st.tuples(*[st.sampled_from(["float16", "float32", "float64", "complex128"])] * 3),
    st.data(),
)
def test_any_chunks_give_the_results_of_the_whole_arrays(convolution, mode, layout, dtypes, data):
    x_shape, w_shape, settings = convolution
    try:
        geometry = Geometry.infer(x_shape, w_shape, **settings, padding_mode=mode)
    except ValueError:
        assume(False)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    shapes = {"x": x_shape, "w": w_shape, "y": geometry.y_shape}
    x, w, dy = (
        laid_out(draw(rng, shapes[role], dtype, True).astype(dtype), layout, role)
        for role, dtype in zip("xwy", dtypes, strict=True)
    )
    b, c = (rng.integers(-3, 4, n).astype(dtypes[0]) for n in (geometry.filters, geometry.channels))
    parts = [da.from_array(array, chunks=data.draw(chunks(array.shape))) for array in (x, dy)]
    options = {**settings, "layout": layout, "algorithm": "im2col"}
    extents = {"output_shape": geometry.input}

    def results(module, x, dy):
        yield module.conv(x, w, b, padding_mode=mode, **options)
        yield from module.conv_backward(dy, x, w, padding_mode=mode, **options)
        if mode == "zeros":
            yield module.conv_transpose(dy, w, c, **options, **extents)
            yield from module.conv_transpose_backward(x, dy, w, **options, **extents)

    for found, expected in zip(results(gpuconv.dask, *parts), results(gpuconv, x, dy), strict=True):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_array_equal(found.compute(), expected)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_adjoints(mode, rng):
    x, w = (draw(rng, shape, "complex128", True) for shape in ((2, 3, 11, 9), (4, 3, 3, 2)))
    settings = {"stride": (2, 1), "padding": ((2, 1), (0, 3)), "padding_mode": mode, "algorithm": "im2col"}
    lazy = da.from_array(x, chunks=(1, 2, 4, 3))
    y = gpuconv.dask.conv(lazy, w, **settings)
    dy = draw(rng, y.shape, "complex128", True)
    dx, dw, _ = gpuconv.dask.conv_backward(da.from_array(dy, chunks=(2, 1, 2, 5)), lazy, w, **settings)
    product = np.vdot(dy, y.compute())
    assert product == np.vdot(dx.compute(), x) == np.vdot(dw.compute(), w)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_activations_and_their_derivatives(activation, rng):
    x, w, b = (rng.standard_normal(shape) for shape in ((2, 3, 9, 8), (4, 3, 3, 3), (4,)))
    options = {"padding": 1, "activation": activation, "algorithm": "im2col"}
    y = gpuconv.conv(x, w, b, **options)
    dy = rng.standard_normal(y.shape)
    whole = gpuconv.conv_backward(dy, x, w, y=y, **options)
    X = da.from_array(x, chunks=4)  # noqa: N806
    Y = gpuconv.dask.conv(X, w, b, **options)  # noqa: N806
    found = gpuconv.dask.conv_backward(da.from_array(dy, chunks=3), X, w, y=Y, **options)
    for one, other in zip((Y, *found), (y, *whole), strict=True):
        np.testing.assert_allclose(one.compute(), other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_sums_of_many_blocks_are_rounded_once(dtype, rng):
    x, w = draw(rng, (4, 3, 30, 28), dtype, False), draw(rng, (5, 3, 3, 3), dtype, False)
    dy = draw(rng, (4, 5, 28, 26), dtype, False)
    given = [da.from_array(array.astype(dtype), chunks=(1, 2, 7, 9)) for array in (dy, x)]
    found = gpuconv.dask.conv_weight_grad(*given, w.shape, algorithm="im2col")
    assert found.dtype == dtype
    exact, magnitude = (gpuconv.conv_weight_grad(f(dy), f(x), w.shape) for f in (np.positive, np.abs))
    assert_within(found.compute(), exact, direct_bound(exact, magnitude, dy.size // 5, dtype))
    bits = {found.compute(num_workers=number).tobytes() for number in (1, 2, 5)}
    assert len(bits) == 1


@backends.on("numpy", "cupy")
def test_chunks_of_each_kind(arrays, rng):
    x, w = draw(rng, (2, 3, 9, 8), "float32", True).astype("f"), draw(rng, (4, 3, 3, 3), "float32", True).astype("f")
    y = gpuconv.conv(x, w, padding=1, stride=2)
    parts = [da.from_array(arrays.asarray(array), chunks=4, asarray=False) for array in (x, y)]
    weights = arrays.asarray(w)
    Y = gpuconv.dask.conv(parts[0], weights, padding=1, stride=2)  # noqa: N806
    gradients = gpuconv.dask.conv_backward(parts[1], parts[0], weights, padding=1, stride=2)
    expected = y, *gpuconv.conv_backward(y, x, w, padding=1, stride=2)
    for one, other in zip((Y, *gradients), expected, strict=True):
        assert type(one._meta) is arrays.xp.ndarray
        np.testing.assert_array_equal(arrays.asnumpy(one.compute(scheduler="synchronous")), other)


def never(block):
    raise AssertionError("computed while the graph is built")


def test_nothing_is_computed_while_the_graph_is_built():
    x = da.zeros((2, 3, 12, 12), chunks=(1, 3, 5, 4)).map_blocks(never, meta=np.empty((0,) * 4))
    w = da.ones((4, 3, 3, 3), chunks=2).map_blocks(never, meta=np.empty((0,) * 4))
    y = gpuconv.dask.conv(x, w, padding=1, padding_mode="circular")
    gradients = gpuconv.dask.conv_backward(y, x, w, padding=1, padding_mode="reflect")
    layers = {name.rpartition("-")[0] for array in (y, *gradients) for name in array.dask.layers}
    assert {"gpuconv-forward", "gpuconv-data_grad", "gpuconv-weight_grad"} <= layers
    assert y.chunks == ((1, 1), (4,), (5, 5, 2), (4, 4, 4))
    with pytest.raises(AssertionError, match="while the graph"):
        y.compute()


def test_small_chunks_are_named_with_better_ones():
    w = np.ones((1, 1, 9, 9), np.float32)
    with pytest.warns(PerformanceWarning, match=r"of the result .* chunks of \((\d+), \1\)") as caught:
        gpuconv.dask.conv(da.zeros((1, 100, 100), chunks=3, dtype="f"), w, padding=4)
    better = int(str(caught[0].message).partition("chunks of (")[2].partition(",")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gpuconv.dask.conv(da.zeros((1, 100, 100), chunks=better, dtype="f"), w, padding=4)
    with pytest.warns(PerformanceWarning) as caught:
        gpuconv.dask.conv_data_grad(da.zeros((1, 100, 100), chunks=3, dtype="f"), w, (1, 100, 100), padding=4)
    assert caught[0].filename == __file__


def test_empty_chunks_and_extents():
    x, w = np.arange(6.0)[None, None], np.ones((1, 1, 3))
    dy = da.ones((1, 1, 4), chunks=((1,), (1,), (3, 0, 1, 0)))
    found = gpuconv.dask.conv_backward(dy, da.from_array(x, chunks=2), w)
    for one, other in zip(found, gpuconv.conv_backward(np.ones((1, 1, 4)), x, w), strict=True):
        np.testing.assert_array_equal(one.compute(), other)
    assert gpuconv.dask.conv_data_grad(da.ones((1, 4, 2)), np.ones((4, 3, 3)), (1, 3, 0), padding=2).shape == (1, 3, 0)


def test_a_name_is_that_of_one_result():
    x, dy = da.ones((1, 1, 9), chunks=3, dtype="f"), da.ones((1, 1, 7), chunks=3, dtype="f")
    names = {gpuconv.dask.conv_backward(dy, x, np.ones((1, 1, 3), dtype)).dw.name for dtype in ("f4", "f8", "f4")}
    assert len(names) == 2
    x = da.from_array(np.ones((1, 1, 100), "f"), chunks=25)
    dx = gpuconv.dask.conv_data_grad(x, np.ones((1, 1, 5)), x.shape, padding=2, padding_mode="circular")
    assert dx.chunks[2] == (25, 25, 25, 25)


X, W = da.zeros((1, 3, 8), chunks=2), np.zeros((4, 3, 3))
BAD = {
    "plain x": (lambda: gpuconv.dask.conv(np.zeros((1, 3, 8)), W), TypeError, "x must be a Dask array, not ndarray"),
    "plain dy": (lambda: gpuconv.dask.conv_backward(np.zeros((1, 4, 6)), X, W), TypeError, "dy must be a Dask array"),
    "list": (lambda: gpuconv.dask.conv(X, [[[1.0]]]), TypeError, "w must be"),
    "unknown": (
        lambda: gpuconv.dask.conv(X[:, :, da.arange(8, chunks=2) > 3], W),
        ValueError,
        "x must have chunks of known",
    ),
    "channels": (lambda: gpuconv.dask.conv(X, W[:, :2]), ValueError, "x has 3 channels but w expects 2"),
    "no w": (lambda: gpuconv.dask.conv(X, None), TypeError, "w must be"),
    "algorithm": (lambda: gpuconv.dask.conv(X, W, algorithm="wgmma"), ValueError, "algorithm must be one of"),
    "precision": (lambda: gpuconv.dask.conv(X, W, precision="int8"), ValueError, "precision must be"),
    "dy": (lambda: gpuconv.dask.conv_data_grad(X, W, (1, 3, 9)), ValueError, "dy must have the shape"),
    "y": (lambda: gpuconv.dask.conv_backward(gpuconv.dask.conv(X, W), X, W, activation="relu"), ValueError, "needs y"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_the_extra_is_named_where_dask_is_not_installed():
    code = "import sys; sys.modules['dask'] = None; import gpuconv; import gpuconv.dask"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: gpuconv.dask needs Dask: pip install 'gpuconv[dask]'" in ran.stderr


def slow(block):
    time.sleep(0.05)
    return block


@pytest.mark.called_once("the calls run in other processes")
def test_two_processes_of_which_one_is_killed(rng, monkeypatch):
    distributed = pytest.importorskip("distributed", reason="distributed is not installed")
    monkeypatch.setenv("GPUCONV_NUM_THREADS", "1")
    x, w = rng.integers(-3, 4, (4, 3, 40, 40)).astype(float), rng.integers(-3, 4, (4, 3, 3, 3)).astype(float)
    y = gpuconv.conv(x, w, padding=1)
    expected = y, *gpuconv.conv_backward(y, x, w, padding=1)
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, memory_limit=0) as cluster,
        distributed.Client(cluster) as client,
    ):
        X = da.from_array(x, chunks=(1, 3, 11, 40)).map_blocks(slow)  # noqa: N806
        Y = gpuconv.dask.conv(X, w, padding=1)  # noqa: N806
        arrays = client.persist([Y, *gpuconv.dask.conv_backward(Y, X, w, padding=1)])
        time.sleep(0.3)
        os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL)
        for found, exact in zip(client.compute(arrays, sync=True), expected, strict=True):
            np.testing.assert_array_equal(found, exact)
