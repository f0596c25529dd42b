"""A call allocates its result and at most GPUCONV_WORKSPACE_LIMIT in addition; measured by tracemalloc."""

import math
import os
import re
import tracemalloc
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, reject
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import gpuconv
from gpuconv import threads, workspace
from gpuconv.arrays import NUMPY
from gpuconv.cpu import compiled, im2col, winograd_plan
from gpuconv.geometry import Geometry
from gpuconv.request import Request
from gpuconv.select import MODULES, choose
from tests import tiers
from tests.cases import DIRECTIONS, NUMPY_ALGORITHMS, named_dtype
from tests.tiers import combinations

pytestmark = pytest.mark.called_once("it measures the memory of a single call")

MIB = 2**20


def of_threads(dtype=np.float32):
    """Return the bytes of threads for any arrays: those of the interpreter, and NumPy's buffers of 8,192 elements.

    A ufunc allocates a buffer for each of its three operands if inner loops are short, even without casts.
    """
    return threads.most(None) * of_a_thread(dtype)


def of_a_thread(dtype):
    return 64 * 1024 + 3 * 8192 * max(4, np.dtype(dtype).itemsize)


LAYERS = {
    "3x3": ((2, 32, 64, 64), (64, 32, 3, 3), {"padding": 1}),
    "3x3 of one large image": ((1, 16, 200, 200), (16, 16, 3, 3), {"padding": 1}),
    "3x3, large weight": ((1, 256, 14, 14), (256, 256, 3, 3), {"padding": 1}),
    "stride 2": ((2, 32, 64, 64), (64, 32, 3, 3), {"padding": 1, "stride": 2}),
    "dilation 4": ((1, 16, 128, 128), (16, 16, 3, 3), {"padding": 4, "dilation": 4}),
    "groups": ((2, 32, 64, 64), (64, 8, 3, 3), {"padding": 1, "groups": 4}),
    "depthwise": ((2, 64, 64, 64), (64, 1, 3, 3), {"padding": 1, "groups": 64}),
    "1x1": ((2, 128, 64, 64), (256, 128, 1, 1), {}),
    "1x1 stride 2": ((2, 128, 64, 64), (256, 128, 1, 1), {"stride": 2}),
    "stem": ((2, 3, 128, 128), (32, 3, 7, 7), {"padding": 3, "stride": 2}),
    "15x15": ((1, 8, 72, 64), (8, 8, 15, 15), {"padding": 7}),
    "1-D": ((2, 32, 8000), (32, 32, 9), {"padding": 4}),
    "3-D": ((1, 8, 24, 24, 24), (16, 8, 3, 3, 3), {"padding": 1}),
    "many groups": ((1, 512, 16, 16), (512, 1, 9, 9), {"padding": 4, "groups": 512}),
    "far taps": ((1, 64, 300, 300), (4, 64, 2, 2), {"dilation": 290}),
    "far padded taps": ((1, 64, 300, 300), (4, 64, 2, 2), {"dilation": 290, "padding": 3}),
    "patches": ((2, 3, 128, 128), (256, 3, 16, 16), {"stride": 16}),
}


def assert_stays_within(limit, result_bytes, call, slack=None, forget=gpuconv.clear_cache):
    """Assert that the peak memory of a call without its result is within a limit; ``forget`` is called before it.

    If the first call exceeds the limit, a second call decides, because the interpreter's table of strings occasionally
    grows by up to 2 MB.
    """
    bound = limit + (of_threads() if slack is None else slack)
    for _attempt in range(2):
        forget()
        tracemalloc.start()
        try:
            call()
            peak = tracemalloc.get_traced_memory()[1] - result_bytes
        finally:
            tracemalloc.stop()
        if peak <= bound:
            return
    assert peak <= bound, f"takes {peak} bytes beside its result"


def is_possible(layer, algorithm, dtype, direction, limit, **_):
    """Return whether an algorithm computes a layer within a limit; fft of few taps in chunks of spectra is too slow."""
    x_shape, w_shape, settings = LAYERS[layer]
    geometry = Geometry.infer(x_shape, w_shape, **settings)
    request = Request(geometry, np.dtype(dtype), direction, NUMPY, limit=limit * MIB)
    return (algorithm != "fft" or geometry.taps >= 100) and MODULES[algorithm].why_not(request) is None


@combinations(
    layer=LAYERS,
    algorithm=NUMPY_ALGORITHMS,
    dtype=["float32", "float16", "complex64"],
    direction=DIRECTIONS,
    memory=["channels_first", "channels_last"],
    limit=[1, 4],
    where=is_possible,
    turns=["dtype", "direction", "memory", "limit"],
)
def test_memory_stays_within_the_limit(layer, dtype, algorithm, direction, memory, limit, monkeypatch):
    monkeypatch.setenv("GPUCONV_WORKSPACE_LIMIT", f"{limit}MiB")
    x_shape, w_shape, settings = LAYERS[layer]
    x, w = np.full(x_shape, 1 / 64, dtype), np.full(w_shape, 1 / 64, dtype)
    if memory == "channels_last":
        x = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    y = gpuconv.conv(x, w, **settings)
    result, call = {
        "forward": (y, lambda: gpuconv.conv(x, w, algorithm=algorithm, **settings)),
        "data_grad": (x, lambda: gpuconv.conv_data_grad(y, w, x_shape, algorithm=algorithm, **settings)),
        "weight_grad": (w, lambda: gpuconv.conv_weight_grad(y, x, w_shape, algorithm=algorithm, **settings)),
    }[direction]
    assert_stays_within(limit * MIB, result.nbytes, call, of_threads(dtype))


@pytest.mark.parametrize("limit", [64, 1])
def test_memory_of_activations_mixed_dtypes_and_transposed_calls(limit, monkeypatch):
    monkeypatch.setenv("GPUCONV_WORKSPACE_LIMIT", f"{limit}MiB")
    x, w = np.ones((2, 16, 160, 160), named_dtype("bfloat16")), np.ones((16, 16, 3, 3), np.float32)
    b = np.ones(16, np.float32)
    settings = {"padding": 1, "activation": "sigmoid"}
    y = gpuconv.conv(x, w, b, **settings)
    t = gpuconv.conv_transpose(x, w, b, stride=2, **settings)
    for size, call in (
        (y.nbytes, lambda: gpuconv.conv(x, w, b, **settings)),
        (y.nbytes, lambda: gpuconv.conv_backward(y, x, w, y=y, needs="dx", **settings)),
        (w.nbytes, lambda: gpuconv.conv_backward(y, x, w, y=y, needs="dw", **settings)),
        (b.nbytes, lambda: gpuconv.conv_backward(y, x, w, y=y, needs="db", **settings)),
        (t.nbytes, lambda: gpuconv.conv_transpose(x, w, b, stride=2, **settings)),
        (y.nbytes, lambda: gpuconv.conv_transpose_backward(t, x, w, y=t, needs="dx", stride=2, **settings)),
        (w.nbytes, lambda: gpuconv.conv_transpose_backward(t, x, w, y=t, needs="dw", stride=2, **settings)),
        (b.nbytes, lambda: gpuconv.conv_transpose_backward(t, x, w, y=t, needs="db", stride=2, **settings)),
    ):
        assert_stays_within(limit * MIB, size, call)


def test_memory_of_unaligned_arrays(monkeypatch):
    monkeypatch.setenv("GPUCONV_WORKSPACE_LIMIT", "1MiB")
    x = np.zeros(4 * 64 * 64 * 64 * 4 + 1, np.uint8)[1:].view(np.float32).reshape(4, 64, 64, 64)
    w = np.ones((64, 64, 1, 1), np.float32)
    assert_stays_within(MIB, x.nbytes, lambda: gpuconv.conv(x, w))
    y = np.ones(x.shape, np.float32)
    assert_stays_within(MIB, 0, lambda: gpuconv.conv(y, w, out=x))
    assert (x == 64).all()


@pytest.mark.parametrize("size", [1, 100, 1 << 20])
def test_the_workspace_begins_at_a_cache_line(size):
    workspace.clear()
    taken = [workspace.take(NUMPY, size, 0) for _ in range(10)]
    assert {memory.ctypes.data % 64 for memory in taken} == {0}
    assert {memory.size for memory in taken} == {size}


def test_the_workspace_is_used_again(rng):
    x, w = rng.standard_normal((4, 16, 64, 64), np.float32), rng.standard_normal((16, 16, 3, 3), np.float32)
    y = gpuconv.conv(x, w)
    tracemalloc.start()
    try:
        gpuconv.conv(x, w)
        assert tracemalloc.get_traced_memory()[1] <= y.nbytes + of_threads()
    finally:
        tracemalloc.stop()


def test_a_limit_below_the_smallest_piece_still_computes(monkeypatch, rng):
    x, w = rng.integers(-3, 4, (2, 8, 20, 20)).astype(float), rng.integers(-3, 4, (8, 8, 3, 3)).astype(float)
    y = gpuconv.conv(x, w)
    gradients = gpuconv.conv_backward(y, x, w)
    monkeypatch.setenv("GPUCONV_WORKSPACE_LIMIT", "0")
    for algorithm in ("auto", "im2col"):
        np.testing.assert_array_equal(gpuconv.conv(x, w, algorithm=algorithm), y)
        for one, other in zip(gpuconv.conv_backward(y, x, w, algorithm=algorithm), gradients, strict=True):
            np.testing.assert_array_equal(one, other)
    refusal = r"it needs \d+ bytes of workspace .*, but GPUCONV_WORKSPACE_LIMIT is 0 bytes"
    for algorithm in ("winograd", "fft", "scatter"):
        with pytest.raises(ValueError, match=refusal):
            gpuconv.conv(x, w, algorithm=algorithm)
    assert re.search(refusal, gpuconv.explain(x.shape, w.shape, backend="numpy").reason)


@st.composite
def convolutions(draw, algorithm):
    """Draw wide and deep convolutions for an algorithm, whose smallest chunks are large but which are computed fast."""
    rank = draw(st.integers(1, 2 if algorithm == "winograd" else 3))
    groups, stride, dilation = (draw(st.sampled_from(of)) for of in ((1, 1, 1, 2, 8, 64), (1, 1, 2, 3), (1, 1, 2, 5)))
    channels, filters = (groups * draw(st.sampled_from((1, 2, 3, 16, 64, 256, 1024))) for _ in range(2))
    if algorithm in ("winograd", "fft"):
        stride = 1
    if algorithm == "depthwise":
        groups = filters = channels
    kernel = [draw(st.sampled_from((1, 2, 3, 3, 3, 5, 11))) for _ in range(rank)]
    extent = [draw(st.sampled_from((1, 3, 4, 8, 16))) for _ in range(rank)]
    extent[draw(st.integers(0, rank - 1))] = draw(st.sampled_from((16, 256, 1024, 4096, 16384, 65536)))
    if algorithm == "winograd":
        kernel, dilation = [3] * rank, 1
    elif draw(st.integers(0, 5)) == 0:
        kernel[-1] = draw(st.sampled_from((64, 1000, 20000)))
    x_shape, w_shape = (
        (draw(st.sampled_from((1, 1, 8, 500))), channels, *extent),
        (filters, channels // groups, *kernel),
    )
    settings = {"stride": stride, "dilation": dilation, "padding": draw(st.sampled_from((0, 1, 2, "same")))}
    try:
        geometry = Geometry.infer(x_shape, w_shape, **settings, groups=groups)
    except ValueError:  # y would be empty
        reject()
    assume(geometry.multiply_adds() <= 10**8)
    assume(max(map(math.prod, (x_shape, w_shape, geometry.y_shape))) <= 10**7)
    return x_shape, w_shape, {**settings, "groups": groups}


@pytest.mark.parametrize("algorithm", ["auto", *(NUMPY_ALGORITHMS if tiers.full else [])])
@hypothesis_settings(
    max_examples=100 if tiers.full else 10, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow]
)
@given(
    st.data(),
    st.sampled_from(DIRECTIONS),
    st.sampled_from(("float32", "float32", "float16", "complex64")),
    st.sampled_from((None, None, "tanh", "leaky_relu")),
    st.booleans(),
    st.sampled_from((1, 1, 2, 4, 8, 16, 32, 64)),
)
def test_every_algorithm_keeps_the_limit_or_refuses(
    algorithm, data, direction, dtype, activation, channels_last, limit
):
    x_shape, w_shape, settings = data.draw(convolutions(algorithm))
    assume(activation is None or dtype != "complex64")
    geometry = Geometry.infer(x_shape, w_shape, **settings)
    environment = {"GPUCONV_WORKSPACE_LIMIT": f"{limit}MiB", "GPUCONV_NUM_THREADS": "2"}
    with mock.patch.dict(os.environ, environment):
        request = Request(geometry, np.dtype(dtype), direction, NUMPY, limit=limit * MIB)
        taken = choose(request, "auto").algorithm if algorithm == "auto" else algorithm
        assume(MODULES[taken].why_not(request) is None)
        assume(MODULES[taken].nanoseconds(request) < 5e8)
        assume(taken != "im2col" or im2col.exceeds(request) is None)
        x, w, y = (np.full(shape, 1 / 64, dtype) for shape in (x_shape, w_shape, geometry.y_shape))
        if channels_last:
            x, y = (np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1) for array in (x, y))
        options = {**settings, "algorithm": algorithm, "activation": activation}
        needs, result = {"forward": ("", y), "data_grad": ("dx", x), "weight_grad": ("dw", w)}[direction]

        def call():
            if direction == "forward":
                return gpuconv.conv(x, w, **options)
            return gpuconv.conv_backward(y, x, w, **options, y=y, needs=needs)

        assert_stays_within(limit * MIB, result.nbytes, call, 2 * of_a_thread(dtype))


@pytest.mark.parametrize(
    "limit, x_shape, w_shape, direction",
    [
        (64, (1, 512, 8, 8192), (512, 512, 3, 3), "forward"),
        (64, (1, 512, 8, 8192), (512, 512, 3, 3), "weight_grad"),
        (64, (1, 64, 6, 65536), (64, 64, 3, 3), "data_grad"),
        (4, (1, 256, 16, 512), (256, 256, 3, 3), "forward"),
    ],
)
def test_winograd_refuses_a_row_of_tiles_beyond_the_limit(limit, x_shape, w_shape, direction, monkeypatch):
    monkeypatch.setenv("GPUCONV_WORKSPACE_LIMIT", f"{limit}MiB")
    monkeypatch.setattr(compiled, "version", lambda: None)
    found = gpuconv.explain(x_shape, w_shape, padding=1, direction=direction, backend="numpy")
    assert found.algorithm == "im2col"
    assert re.search(r"it needs [\d.]+ MiB of workspace for a row of tiles", dict(found.refused)["winograd"])


@pytest.mark.parametrize("threads", [1, 2, 4, 8])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_winograd_takes_many_weights_through_few_blocks(direction, threads):
    """Each block reads all transformed weights, so the share of the threads must leave enough space for a block."""
    geometry = Geometry.infer((8, 512, 14, 14), (512, 512, 3, 3), padding=1)
    part = "weight_grad" if direction == "weight_grad" else "forward"
    sizes = winograd_plan.sizes(geometry, part, (63 << 20) // 4, threads, 4, 0)
    rows, _ = winograd_plan.axes(geometry)
    assert sizes.filters == 512
    assert -(-8 * -(-rows.tiles // sizes.unit) // sizes.block) <= 2
