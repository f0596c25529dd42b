"""The kernels beyond the tests of the matrix, emulated on the CPU and, if available, on a GPU."""

import math

import numpy as np
import pytest

import gpuconv
from gpuconv import workspace
from gpuconv.arrays import NUMPY
from gpuconv.geometry import Geometry
from gpuconv.gpu import direct, params, scatter, scatter_plain
from gpuconv.request import Request
from gpuconv.select import MODULES
from gpuconv.views import View
from tests import reference, tiers
from tests.backends import BACKENDS, arrays_of, on
from tests.cases import CASES, DIRECTIONS, GENERAL_KERNELS, KERNELS, draw, laid_out, named_dtype
from tests.emulation import launcher
from tests.test_matrix import assert_right
from tests.test_memory import assert_stays_within
from tests.tiers import combinations, compiles_much

ON_KERNELS = on("emulated", "cupy")
EMULATED = on("emulated")
KIB = 1024


@pytest.fixture
def plain(monkeypatch):
    """Add the reference kernels of scatter to the algorithms."""
    monkeypatch.setitem(MODULES, "scatter_plain", scatter_plain)


def gradients_of(algorithm, x, w, dy, **settings):
    return [
        gpuconv.conv_data_grad(dy, w, x.shape, algorithm=algorithm, **settings),
        gpuconv.conv_weight_grad(dy, x, w.shape, algorithm=algorithm, **settings),
    ]


# ------------------------------------------------------------------------------------------------- scatter


@combinations(
    arrays=BACKENDS[1:],
    case=[case for case in CASES if len(case.x) < 6],
    direction=DIRECTIONS[1:],
    dtype=["float16", "float32", "complex128"],
    turns=["dtype"],
)
def test_plain_twins_are_right(case, direction, dtype, arrays, plain):
    assert_right(arrays, case, "scatter_plain", direction, dtype, "channels_first")


@ON_KERNELS
def test_plain_twins_multiply_by_derivatives(arrays, rng, plain):
    """The derivative multiplies dy: the first operand, or the second one of weight_grad if transposed."""
    x, w = (draw(rng, shape, "float32", True).astype(np.float32) for shape in ((2, 4, 5, 6), (4, 4, 3, 3)))
    for function, backward in (
        (gpuconv.conv, gpuconv.conv_backward),
        (gpuconv.conv_transpose, gpuconv.conv_transpose_backward),
    ):
        y = function(x, w, activation="relu", algorithm="im2col")
        dy = draw(rng, y.shape, "float32", True).astype(np.float32)
        given = [arrays.asarray(array) for array in (dy, x, w)]
        for needs in ("dx", "dw") if backward is gpuconv.conv_backward else ("dw",):
            options = {"activation": "relu", "needs": needs}
            expected = getattr(backward(dy, x, w, y=y, **options, algorithm="im2col"), needs)
            found = backward(*given, y=arrays.asarray(y), **options, algorithm="scatter_plain")
            np.testing.assert_array_equal(arrays.asnumpy(getattr(found, needs)), expected)


# ResNet-50's 3x3 layers, with channels and extents divided by four.
RESNET = [((2, 16, 14, 14), 1), ((2, 32, 7, 7), 1), ((2, 64, 4, 4), 1), ((2, 32, 14, 14), 2), ((2, 64, 7, 7), 2)]


@pytest.mark.emulated
@pytest.mark.parametrize("x_shape, stride", RESNET)
def test_sums_are_formed_before_they_are_added_to_global_memory(x_shape, stride, plain):
    """Both gradients make at most an eighth of the atomic additions of the reference kernel."""
    channels = x_shape[1]
    x, w = np.ones(x_shape, np.float32), np.ones((channels, channels, 3, 3), np.float32)
    dy = gpuconv.conv(x, w, stride=stride, padding=1)
    counts = []
    for algorithm in ("scatter", "scatter_plain"):
        with arrays_of("emulated"), launcher.using() as launches:
            gradients_of(algorithm, x, w, dy, stride=stride, padding=1)
        counts.append([launch.global_atomics for launch in launches])
    for privatised, one_by_one in zip(*counts, strict=True):
        assert 0 < privatised <= one_by_one / 8


@pytest.mark.called_once("it counts what kernels do")
@EMULATED
def test_four_neighbours_are_added_at_once_where_they_lie_side_by_side(arrays, monkeypatch):
    """This requires channels_last float32 arrays that are aligned to 16 bytes."""
    chosen = []
    monkeypatch.setattr(
        scatter.structs.Options, "struct", lambda self, wide: chosen.append(self.fours) or original(self, wide)
    )
    x, w = np.ones((1, 5, 5, 12), np.float32), np.ones((3, 3, 12, 16), np.float32)
    dy = gpuconv.conv(x, w, layout="channels_last", algorithm="im2col")
    results = gradients_of("scatter", x, w, dy, layout="channels_last")
    assert chosen == [True, True]
    room = np.zeros((1, 5, 5, 13), np.float32)
    out = room[..., 1:]
    gpuconv.conv_data_grad(dy, w, x.shape, layout="channels_last", algorithm="scatter", out=out)
    assert chosen[2:] == [False]
    np.testing.assert_array_equal(out, results[0])
    gradients_of("scatter", x, w.astype(float), dy.astype(float), layout="channels_last")
    assert chosen[3:] == [False, False]


original = scatter.structs.Options.struct


@EMULATED
@pytest.mark.parametrize("channels, width", [(8, 16), (7, 4)])
def test_blocks_add_to_the_same_elements_atomically_in_fours_where_they_can(channels, width, arrays, rng):
    """Two blocks of outputs reach the same inputs, and two splits of outputs contribute to the same weights."""
    x, dy = (
        draw(rng, shape, "float32", True).astype(np.float32) for shape in ((1, 20, 18, channels), (1, 18, 16, channels))
    )
    w = draw(rng, (3, 3, channels, channels), "float32", True).astype(np.float32)
    expected = gradients_of("direct", x, w, dy, layout="channels_last")
    with launcher.using(mode="checked", profiled=True) as launches:
        found = gradients_of("scatter", x, w, dy, layout="channels_last")
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    for launch in launches:
        assert launch.grid > 1
        assert {access.width for access in launch.accesses if access.kind == "atomic"} == {width}


@pytest.mark.called_once("it counts what kernels do")
@EMULATED
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_zeros_are_not_added_and_all_else_is(dtype, layout, arrays, rng):
    """One channel in four has nonzero sums, in all four positions; then none has."""
    x, dy = (laid_out(draw(rng, (1, 8, 6, 6), dtype, True).astype(dtype) + 4, layout) for _ in range(2))
    w = laid_out(draw(rng, (8, 8, 3, 3), dtype, True).astype(dtype) + 4, layout, "w")
    settings = {"padding": 1, "layout": layout}
    channel_of_w, channel_of_dy = (1, 1) if layout == "channels_first" else (2, 3)
    for turn in range(4):
        others = [channel for channel in range(8) if channel % 4 != turn]
        sparse_w, sparse_dy = w.copy(), dy.copy()
        np.moveaxis(sparse_w, channel_of_w, 0)[others] = 0
        np.moveaxis(sparse_dy, channel_of_dy, 0)[others] = 0
        expected = gpuconv.conv_backward(dy, x, sparse_w, **settings, algorithm="direct").dx
        found = gpuconv.conv_data_grad(dy, sparse_w, x.shape, **settings, algorithm="scatter")
        np.testing.assert_array_equal(found, expected)
        expected = gpuconv.conv_weight_grad(sparse_dy, x, w.shape, **settings, algorithm="direct")
        found = gpuconv.conv_weight_grad(sparse_dy, x, w.shape, **settings, algorithm="scatter")
        np.testing.assert_array_equal(found, expected)
    with launcher.using() as launches:
        for gradient in gradients_of("scatter", x, w, np.zeros_like(dy), **settings):
            assert not gradient.any()
    assert [launch.global_atomics for launch in launches] == [0, 0]


@ON_KERNELS
@pytest.mark.parametrize("outputs", [15, 16, 17, 31, 32, 33, 63, 64, 65])
@pytest.mark.parametrize("channels", [1, 4, 36])
def test_chunks_of_outputs_and_filters_may_be_cut_anywhere(channels, outputs, arrays, rng):
    """Extents around the depths of all tiles are tested, for sums over outputs and for sums over filters."""
    x, w, dy = (
        draw(rng, shape, "float32", True).astype(np.float32)
        for shape in ((1, 2, outputs + 2), (outputs, channels, 3), (1, channels, outputs))
    )
    expected = gpuconv.conv_weight_grad(dy, x, (channels, 2, 3), algorithm="im2col")
    x, w, dy = (arrays.asarray(array) for array in (x, w, dy))
    found = gpuconv.conv_weight_grad(dy, x, (channels, 2, 3), algorithm="scatter")
    np.testing.assert_array_equal(arrays.asnumpy(found), expected)
    found = gpuconv.conv_data_grad(dy.swapaxes(1, 2), w, (1, channels, channels + 2), algorithm="scatter")
    expected = gpuconv.conv_data_grad(
        *(arrays.asnumpy(array) for array in (dy.swapaxes(1, 2), w)), (1, channels, channels + 2), algorithm="im2col"
    )
    np.testing.assert_array_equal(arrays.asnumpy(found), expected)


@ON_KERNELS
def test_outputs_beyond_a_box_belong_to_the_next(arrays, rng):
    """In complex128 this layer has several boxes of outputs on its first axis."""
    w, dy = (draw(rng, shape, "complex128", True) for shape in ((3, 2, 2, 3, 2), (2, 3, 5, 5, 7)))
    expected = gpuconv.conv_data_grad(dy, w, (2, 2, 4, 5, 6), padding=1, algorithm="im2col")
    given = arrays.asarray(dy), arrays.asarray(w)
    found = gpuconv.conv_data_grad(*given, (2, 2, 4, 5, 6), padding=1, algorithm="scatter")
    np.testing.assert_array_equal(arrays.asnumpy(found), expected)


@ON_KERNELS
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("channels", [3, 7, 33, 36])
def test_infinity_stays_within_the_channels(channels, layout, arrays):
    """Tiles are padded with zeros, and infinity times zero is NaN."""
    x, dy = (laid_out(np.ones((2, channels, *extent), np.float32), layout) for extent in ((5, 6), (3, 4)))
    w = laid_out(np.ones((channels, channels, 3, 3), np.float32), layout, "w")
    settings = {"layout": layout}
    for values in (x, dy):
        values.reshape(-1)[7] = np.inf  # of one image
    given = [arrays.asarray(array) for array in (x, w, dy)]
    for one, other in zip(
        gradients_of("scatter", *given, **settings), gradients_of("direct", *given, **settings), strict=True
    ):
        assert np.isinf(arrays.asnumpy(other)).any()
        np.testing.assert_array_equal(arrays.asnumpy(one), arrays.asnumpy(other))


def test_boxes_fit_shared_memory_and_cover_the_outputs():
    """Large and small layers, and extremes of windows, strides and dilations are tested."""
    for x_shape, w_shape, settings in (
        ((1, 64, 56, 56), (64, 64, 3, 3), {"padding": 1}),
        ((1, 512, 7, 7), (512, 512, 3, 3), {"padding": 1}),
        ((1, 3, 224, 224), (64, 3, 7, 7), {"padding": 3, "stride": 2}),
        ((1, 96, 56, 56), (96, 1, 7, 7), {"padding": 3, "groups": 96}),
        ((1, 4, 300, 300), (4, 4, 31, 31), {"padding": 15}),
        ((1, 40, 900, 900), (40, 40, 3, 3), {"dilation": 400}),
        ((1, 8, 20, 30, 40), (8, 8, 3, 3, 3), {"stride": (1, 2, 3)}),
        ((1, 2, 100_000), (2, 2, 5), {"dilation": 20_000}),
        ((1, 2, 100_000), (2, 2, 5), {"stride": 20_000}),
    ):
        geometry = Geometry.infer(x_shape, w_shape, **settings)
        for itemsize in (4, 8, 16):
            for wide in (False, True):
                tile = scatter.tile_for(geometry.group_channels, itemsize)
                box = scatter._boxes(geometry, tile, itemsize, wide)
                assert math.prod(box.outputs) <= tile.TILE_OUTPUTS
                assert min(box.outputs) >= 1
                assert min(box.taps) >= 1
                assert math.prod(box.region) * tile.ROW * itemsize < scatter.SHARED_MEMORY
    layer = Geometry.infer((1, 64, 56, 56), (64, 64, 3, 3), padding=1)
    assert math.prod(scatter._boxes(layer, scatter.MANY, 4, False).outputs) >= 56


def test_deterministic_refuses_the_kernels_that_scatter_and_nothing_else():
    geometry = Geometry.infer((1, 2, 5, 5), (3, 2, 3, 3))
    backend = launcher.EMULATED
    reason = scatter.why_not(Request(geometry, np.dtype("float32"), "data_grad", backend, True))
    assert reason == "its additions have no fixed order on a GPU, but deterministic=True requires one"
    assert scatter.why_not(Request(geometry, np.dtype("float32"), "data_grad", backend, False)) is None
    assert direct.why_not(Request(geometry, np.dtype("float32"), "data_grad", backend, True)) is None


# ------------------------------------------------------------------------------------------------- arrays


VIEWS = {
    "reversed": lambda xp, a: a[..., ::-1, ::-1],
    "every other element": lambda xp, a: xp.repeat(xp.repeat(a, 2, -1), 2, 0)[::2, ..., ::2],
    "axes in another order": lambda xp, a: xp.ascontiguousarray(a.transpose(3, 1, 0, 2)).transpose(2, 1, 3, 0),
    "one channel repeated": lambda xp, a: xp.broadcast_to(a[:, :1], a.shape),
    "inside a larger array": lambda xp, a: xp.pad(a, 1)[1:-1, 1:-1, 1:-1, 1:-1],
}


@ON_KERNELS
@pytest.mark.parametrize("algorithm", GENERAL_KERNELS)
@pytest.mark.parametrize("name", VIEWS)
def test_views_are_read_where_they_lie(name, algorithm, arrays, rng):
    x, w = (draw(rng, shape, "float32", True) for shape in ((2, 3, 6, 7), (4, 3, 3, 3)))
    given = [VIEWS[name](arrays.xp, arrays.xp.asarray(a.astype(np.float32))) for a in (x, w)]
    x, w = (arrays.asnumpy(a).astype(float) for a in given)
    settings = {"stride": (2, 1), "padding": ((1, 1), (0, 2)), "dilation": (1, 1)}
    y = gpuconv.conv(*given, algorithm=algorithm, **settings)
    exactly = reference.forward(x, w, **settings)
    np.testing.assert_array_equal(arrays.asnumpy(y), exactly)
    dy = VIEWS[name](arrays.xp, y)
    exact_dy = arrays.asnumpy(dy).astype(float)
    dx, dw = gradients_of(algorithm, *given, dy, **settings)
    np.testing.assert_array_equal(arrays.asnumpy(dx), reference.data_grad(exact_dy, w, x.shape, **settings))
    np.testing.assert_array_equal(arrays.asnumpy(dw), reference.weight_grad(exact_dy, x, w.shape, **settings))


@combinations(
    arrays=BACKENDS[1:],
    algorithm=GENERAL_KERNELS,
    activation=[None, "relu"],
    where=lambda arrays, algorithm, activation: compiles_much(arrays) or activation == "relu",
)
def test_batch_axes_in_no_one_order_are_taken_one_by_one(activation, algorithm, arrays, rng):
    x, w = (draw(rng, shape, "float32", True) for shape in ((3, 2, 2, 4, 5), (3, 2, 2, 2)))
    b = arrays.asarray(np.ones(3, np.float32))
    straight = [arrays.asarray(a.astype(np.float32)) for a in (x, w)]
    swapped = arrays.xp.ascontiguousarray(straight[0].swapaxes(0, 1)).swapaxes(0, 1)
    y = gpuconv.conv(*straight, b, activation=activation, algorithm=algorithm)
    np.testing.assert_array_equal(
        arrays.asnumpy(gpuconv.conv(swapped, straight[1], b, activation=activation, algorithm=algorithm)),
        arrays.asnumpy(y),
    )
    dy = arrays.xp.ascontiguousarray(y.swapaxes(0, 1)).swapaxes(0, 1)
    options = {"activation": activation, "algorithm": algorithm, "y": y}
    for one, other in zip(
        gpuconv.conv_backward(dy, swapped, straight[1], **options),
        gpuconv.conv_backward(y, *straight, **options),
        strict=True,
    ):
        np.testing.assert_array_equal(arrays.asnumpy(one), arrays.asnumpy(other))


@EMULATED
@pytest.mark.parametrize("algorithm", GENERAL_KERNELS)
def test_arrays_that_kernels_cannot_address_are_copied(algorithm, arrays, rng):
    """These are arrays with unaligned elements, as operands and as results."""
    x, w = (draw(rng, shape, "float32", True).astype(np.float32) for shape in ((2, 3, 5, 5), (4, 3, 3, 3)))
    y = gpuconv.conv(x, w, algorithm=algorithm)
    dx, dw = gradients_of(algorithm, x, w, y)
    odd = [misaligned(a) for a in (x, w, y)]
    np.testing.assert_array_equal(gpuconv.conv(*odd[:2], algorithm=algorithm), y)
    for one, other in zip(gradients_of(algorithm, *odd), (dx, dw), strict=True):
        np.testing.assert_array_equal(one, other)
    out = misaligned(np.zeros_like(dx))
    assert gpuconv.conv_data_grad(y, w, x.shape, algorithm=algorithm, out=out) is out
    np.testing.assert_array_equal(out, dx)


@EMULATED
@pytest.mark.parametrize("shift", [1, 4])
def test_results_that_are_not_aligned_are_added_up_elsewhere(shift, arrays, rng):
    """For NumPy complex64 is aligned at a multiple of 4 bytes, but atomic additions need a multiple of 8."""
    x, w = (draw(rng, shape, "complex64", True).astype(np.complex64) for shape in ((2, 3, 5, 5), (4, 3, 3, 3)))
    dy = gpuconv.conv(x, w, algorithm="direct")
    dx, dw = gradients_of("direct", x, w, dy)
    out = misaligned(np.zeros_like(dx), shift)
    np.testing.assert_array_equal(gpuconv.conv_data_grad(dy, w, x.shape, algorithm="scatter", out=out), dx)
    out = misaligned(np.zeros_like(dw), shift)
    np.testing.assert_array_equal(gpuconv.conv_weight_grad(dy, x, w.shape, algorithm="scatter", out=out), dw)


EXTREME = {
    "strides": ((1, 2, 3, 2, 3), (2, 2, 1, 2, 2), {"stride": (2**28, 1, 2**30)}),
    "dilation": ((1, 1, 4), (2, 1, 1), {"dilation": 2**31 - 2, "padding": ((-1, 0),)}),
    "dilation and padding": ((1, 1, 4), (2, 1, 2), {"dilation": 2**30, "padding": ((2**30, 0),)}),
    "stride after a crop": ((1, 1, 4), (2, 1, 2), {"padding": ((-2, 0),), "stride": 2**31 - 1}),
}


@pytest.mark.checked
@combinations(algorithm=GENERAL_KERNELS, steps=EXTREME, where=lambda algorithm, steps: tiers.full or steps == "strides")
def test_extreme_steps_overflow_nowhere(steps, algorithm):
    """Checked mode detects overflow of the integers in kernels."""
    x_shape, w_shape, settings = EXTREME[steps]
    x, w = np.ones(x_shape), np.ones(w_shape)
    y = gpuconv.conv(x, w, **settings)
    expected = [y, *gpuconv.conv_backward(y, x, w, **settings, needs=("dx", "dw"))[:2]]
    with arrays_of("emulated"), launcher.using(mode="checked"):
        results = [gpuconv.conv(x, w, algorithm="direct", **settings), *gradients_of(algorithm, x, w, y, **settings)]
    for one, other in zip(results, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@combinations(
    arrays=BACKENDS[1:],
    algorithm=KERNELS,
    dtype_and_activation=[("complex64", None), ("float32", "relu"), ("float64", None)],
    where=lambda arrays, dtype_and_activation, algorithm: compiles_much(arrays) or dtype_and_activation[0] != "float64",
)
def test_transposed_convolutions_are_those_of_numpy(dtype_and_activation, algorithm, arrays, rng):
    """They use the kernels of the opposite direction: forward with conjugate and derivative, data_grad with a bias."""
    dtype, activation = dtype_and_activation
    settings = {"stride": 2, "padding": 1, "groups": 2, "activation": activation}
    x, w, b = (draw(rng, shape, dtype, True).astype(dtype) for shape in ((2, 6, 4, 5), (6, 2, 3, 3), (4,)))
    y = gpuconv.conv_transpose(x, w, b, **settings, algorithm="im2col")
    dy = draw(rng, y.shape, dtype, True).astype(dtype)
    expected = y, *gpuconv.conv_transpose_backward(dy, x, w, y=y, **settings, algorithm="im2col")
    x, w, b, dy = (arrays.asarray(array) for array in (x, w, b, dy))
    result = gpuconv.conv_transpose(x, w, b, **settings, algorithm=algorithm)
    gradients = gpuconv.conv_transpose_backward(dy, x, w, y=result, **settings, algorithm=algorithm)
    for one, other in zip((result, *gradients), expected, strict=True):
        np.testing.assert_array_equal(arrays.asnumpy(one), other)


@ON_KERNELS
@pytest.mark.parametrize("algorithm", GENERAL_KERNELS)
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_derivatives_at_zero_are_those_of_numpy(activation, algorithm, arrays):
    y, w = np.array([[[-1, -0.0, 0.0, 1]]], np.float32), np.full((1, 1, 1), 3, np.float32)
    dy = np.full_like(y, 2)
    options = {"activation": activation, "needs": "dx"}
    expected = gpuconv.conv_backward(dy, y, w, y=y, **options, algorithm="im2col").dx
    assert expected[0, 0, 1] == expected[0, 0, 2] != expected[0, 0, 3]
    given = [arrays.asarray(array) for array in (dy, y, w)]
    found = gpuconv.conv_backward(*given, y=given[1], **options, algorithm=algorithm).dx
    np.testing.assert_array_equal(arrays.asnumpy(found), expected)


def misaligned(array, shift=1):
    memory = np.empty(array.nbytes + 8, np.uint8)[shift : shift - 8].view(array.dtype).reshape(array.shape)
    memory[...] = array
    return memory


# ------------------------------------------------------------------------------------------------- order and offsets


@ON_KERNELS
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_sample_alone_gives_the_same_bits_as_in_a_batch(dtype, arrays, rng):
    x, w = (draw(rng, shape, dtype, False) for shape in ((5, 6, 9, 8), (4, 6, 3, 3)))
    x, w = (arrays.asarray(a.astype(named_dtype(dtype))) for a in (x, w))
    y = gpuconv.conv(x, w, padding=1, algorithm="direct")
    dx = gpuconv.conv_data_grad(y, w, x.shape, padding=1, algorithm="direct")
    for n in range(5):
        alone = gpuconv.conv(x[n], w, padding=1, algorithm="direct")
        np.testing.assert_array_equal(arrays.asnumpy(alone), arrays.asnumpy(y)[n])
        alone = gpuconv.conv_data_grad(y[n], w, x.shape[1:], padding=1, algorithm="direct")
        np.testing.assert_array_equal(arrays.asnumpy(alone), arrays.asnumpy(dx)[n])


def strided(shape, steps):
    """Return a view with these strides, in elements."""
    return View(0, 0, shape, tuple(4 * step for step in steps), np.dtype(np.float32))


@pytest.mark.parametrize(
    "x_shape, w_shape, settings, wide",
    [
        ((1, 1, 2**31 - 2**17), (1, 1, 3), {}, False),
        ((1, 1, 2**31 - 2**15), (1, 1, 3), {}, True),
        ((2, 1, 2**30), (1, 1, 3), {}, True),
        ((1, 1, 2**29), (5, 1, 3), {}, True),
        ((1, 2**16, 1), (2**16, 2**16, 1), {}, True),
        ((1, 1, 8), (1, 1, 3), {"padding": 2**30}, True),
        ((1, 1, 2**30), (1, 1, 2), {"dilation": 2**29, "padding": 2**30}, True),
        ((256, 256, 56, 56), (256, 256, 3, 3), {"padding": 1}, False),
    ],
)
def test_geometry_knows_when_32_bits_are_too_few(x_shape, w_shape, settings, wide):
    geometry = Geometry.infer(x_shape, w_shape, **settings)
    assert (geometry.largest_index >= params.NARROW) == wide


@pytest.mark.parametrize(
    "steps, padding, wide",
    [
        ((24, 8, 1, 0, 1), 0, False),
        ((2**31, 8, 1, 0, 1), 0, True),
        ((24, -(2**30), 1, 0, 1), 0, True),
        ((24, 2**24, 1, 0, 1), 0, False),
        ((24, 2**24, 1, 0, 1), 100, True),  # windows begin in the padding
    ],
)
def test_strides_may_need_64_bits(steps, padding, wide):
    geometry = Geometry.infer((2, 1, 3, 8), (1, 1, 1, 1), padding=padding)
    x = strided((2, 3, 8, 1, 1), steps)
    y = strided((2, 3 + 2 * padding, 8 + 2 * padding, 1, 1), (10**5, 300, 1, 1, 1))
    assert params.is_wide(geometry, y, x, strided((1, 1, 1, 1, 1), (1, 1, 1, 1, 1))) == wide


@pytest.mark.parametrize("taps, wide", [(1, False), (3, True)])
def test_strides_of_dy_may_need_64_bits_where_windows_reach_beyond_it(taps, wide):
    geometry = Geometry.infer((1, 1, 1 + taps), (1, 1, taps))
    y, x, w = (strided((*extents, 1, 1), steps) for extents, steps in (
        ((1, 2), (8, 2**29, 1, 1)), ((1, 1 + taps), (8, 1, 1, 1)), ((taps,), (1, 1, 1))
    ))  # fmt: skip
    assert params.is_wide(geometry, y, x, w) == wide


# ------------------------------------------------------------------------------------------------- memory


LAYERS = {
    "3x3": ((4, 8, 20, 20), (16, 8, 3, 3), {"padding": 1}),
    "groups": ((4, 8, 20, 20), (16, 2, 3, 3), {"groups": 4}),
    "one large image": ((1, 8, 60, 60), (4, 8, 3, 3), {"padding": 1}),
    "weights": ((1, 48, 3, 3), (64, 48, 3, 3), {"padding": 1}),
}


@pytest.mark.called_once("it measures the memory of a single call")
@combinations(
    arrays=["emulated"],
    layer=LAYERS,
    algorithm=GENERAL_KERNELS,
    dtype=["float16", "float32"],
    activation=[None, "sigmoid", "leaky_relu"],
    turns=["dtype", "activation"],
)
def test_kernels_stay_within_the_workspace_limit(layer, algorithm, dtype, activation, arrays, monkeypatch):
    """Measured by tracemalloc; allocations of the emulator are not made by Python. Plans are in host memory."""
    limit = 64 * KIB
    slack = (72 if activation == "leaky_relu" else 40) * KIB  # NumPy's buffers for the derivative
    monkeypatch.setenv("GPUCONV_WORKSPACE_LIMIT", str(limit))
    x_shape, w_shape, settings = LAYERS[layer]
    x, w = np.full(x_shape, 1 / 64, dtype), np.full(w_shape, 1 / 64, dtype)
    y = gpuconv.conv(x, w, activation=activation, **settings)
    options = {**settings, "activation": activation, "y": y, "algorithm": algorithm}
    transposed = {**settings, "activation": activation, "algorithm": algorithm}
    t = gpuconv.conv_transpose(y, w, **transposed)
    calls = {
        "transposed": (t.nbytes, lambda: gpuconv.conv_transpose(y, w, **transposed)),
        "forward": (y.nbytes, lambda: gpuconv.conv(x, w, algorithm="direct", activation=activation, **settings)),
        "dx": (x.nbytes, lambda: gpuconv.conv_backward(y, x, w, needs="dx", **options)),
        "dw": (w.nbytes, lambda: gpuconv.conv_backward(y, x, w, needs="dw", **options)),
    }
    for result_bytes, call in calls.values():
        call()  # makes the plan
        assert_stays_within(limit, result_bytes, call, slack, forget=workspace.clear)


@EMULATED
@pytest.mark.parametrize("limit", ["1000", "2000", "20000"])
@pytest.mark.parametrize("algorithm", GENERAL_KERNELS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_small_workspaces_change_no_result(dtype, algorithm, limit, arrays, monkeypatch, rng):
    x, w, b = (draw(rng, shape, dtype, True) for shape in ((3, 4, 7, 8), (6, 2, 3, 3), (6,)))
    x, w, b = (a.astype(dtype) for a in (x, w, b))
    settings = {"padding": 1, "groups": 2, "activation": "relu", "algorithm": algorithm}

    def results():
        y = gpuconv.conv(x, w, b, **settings)
        t = gpuconv.conv_transpose(y, w, x[0, :, 0, 0].copy(), **settings)
        return y, t, *gpuconv.conv_backward(y, x, w, y=y, **settings)

    expected = results()
    monkeypatch.setenv("GPUCONV_WORKSPACE_LIMIT", limit)
    for one, other in zip(results(), expected, strict=True):
        np.testing.assert_array_equal(one, other)


# ------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("algorithm", GENERAL_KERNELS)
def test_kernels_run_on_the_current_stream(algorithm):
    """On a stream other than the default, a call reads the result of the preceding operation."""
    import cupy

    x, w = cupy.zeros((8, 16, 64, 64), cupy.float32), cupy.ones((16, 16, 3, 3), cupy.float32)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        x += 1
        y = gpuconv.conv(x, w, algorithm=algorithm)
        dx = gpuconv.conv_data_grad(y, w, x.shape, algorithm=algorithm)
        x[...] = 7
        stream.synchronize()
    assert (y == 144).all()
    assert (dx[:, :, 2:-2, 2:-2] == 144 * 144).all()


@pytest.mark.gpu
def test_out_of_memory_is_cupy_s_error_and_leaves_inputs_as_they_were():
    import cupy

    x, w = cupy.ones((1, 1, 2**20), cupy.float32), cupy.ones((2**17, 1, 1), cupy.float32)
    with pytest.raises(cupy.cuda.memory.OutOfMemoryError):
        gpuconv.conv(x, w, algorithm="direct")
    assert (x == 1).all()
    assert (gpuconv.conv(x, w[:2], algorithm="direct") == 1).all()


@pytest.mark.gpu
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_more_than_2_to_the_31_elements(direction):
    """The tensors need 64-bit offsets. Only samples are checked, because a complete check would take minutes."""
    import cupy

    if cupy.cuda.Device().mem_info[1] < 16 << 30:
        pytest.skip("the device has less than 16 GiB of memory")
    x, w = cupy.ones((1, 2, 2**30 + 2**20), cupy.float16), cupy.ones((1, 2, 3), cupy.float16)
    if direction == "forward":
        y = gpuconv.conv(x, w, algorithm="direct")
        assert float(y[0, 0, -1]) == 6
        assert float(y.max()) == float(y.min()) == 6
    elif direction == "data_grad":
        dy = cupy.ones((1, 1, x.shape[2] - 2), cupy.float16)
        dx = gpuconv.conv_data_grad(dy, w, x.shape, algorithm="direct")
        assert float(dx[0, 1, -1]) == 1
        assert float(dx[:, :, 2:-2].min()) == float(dx.max()) == 3
    else:
        dy = cupy.zeros((1, 1, x.shape[2] - 2), cupy.float16)
        dy[0, 0, -5:] = 1
        dw = gpuconv.conv_weight_grad(dy, x, w.shape, algorithm="direct")
        assert (dw == 5).all()


def test_the_plain_kernels_are_for_gradients_on_a_gpu():
    geometry = Geometry.infer((1, 2, 5, 5), (3, 2, 3, 3))
    for backend, direction, allowed in (
        (NUMPY, "data_grad", False),
        (launcher.EMULATED, "forward", False),
        (launcher.EMULATED, "data_grad", True),
        (launcher.EMULATED, "weight_grad", True),
    ):
        reason = scatter_plain.why_not(Request(geometry, np.dtype("f4"), direction, backend, deterministic=False))
        assert reason == (None if allowed else "it is a CUDA kernel that computes gradients")
