"""The kernels of depthwise beyond the tests of the matrix: memory traffic, boxes, views, padding, splits, refusals."""

import math

import numpy as np
import pytest

import gpuconv
from gpuconv.arrays import NUMPY
from gpuconv.geometry import Geometry
from gpuconv.gpu import depthwise, params
from gpuconv.gpu.kernel import Kernel
from gpuconv.operands import ROLES, Operand, Result, contiguous
from gpuconv.plan import WORKSPACE, Planner, Scope
from gpuconv.request import Request
from gpuconv.select import choose
from tests import reference, tiers
from tests.backends import BACKENDS, arrays_of, on
from tests.cases import DIRECTIONS, channels_first, draw, laid_out, named_dtype, wide
from tests.emulation import launcher
from tests.test_kernels import VIEWS as GENERAL_VIEWS
from tests.test_profile import source_line
from tests.tiers import combinations, compiles_much
from tests.tolerances import assert_within, direct_bound

ON_KERNELS = on("emulated", "cupy")
EMULATED = on("emulated")
SECTOR = 32
BOTH_LAYOUTS = ("channels_first", "channels_last")
EXTENTS = (56, 40, 28, 20, 14, 10, 7)
MOST_TRAFFIC = {"forward": 1.15, "data_grad": 1.15, "weight_grad": 1.5}


def results_of(arrays, x, w, dy, **options):
    """Return y, dx and dw as channels_first NumPy arrays. The arrays given are channels_first."""
    layout = options.get("layout", "channels_first")
    x, w, dy = (arrays.asarray(laid_out(a, layout, role)) for a, role in ((x, "x"), (w, "w"), (dy, "x")))
    options["algorithm"] = "depthwise"
    found = (
        gpuconv.conv(x, w, **options),
        gpuconv.conv_data_grad(dy, w, x.shape, **options),
        gpuconv.conv_weight_grad(dy, x, w.shape, **options),
    )
    return [channels_first(arrays.asnumpy(a), layout, role) for a, role in zip(found, "xxw", strict=True)]


def exact(x, w, dy, **settings):
    """Return the results of the reference, in float64 or complex128."""
    geometry = Geometry.infer(x.shape, w.shape, **settings)
    names = ("stride", "padding", "dilation", "groups", "flip")
    settings = {name: getattr(geometry, name) for name in names}
    x, w, dy = (array.astype(wide(array.dtype)) for array in (x, w, dy))
    return (
        reference.forward(x, w, **settings),
        reference.data_grad(dy, w, x.shape, **settings),
        reference.weight_grad(dy, x, w.shape, **settings),
    )


def drawn(rng, x_shape, filters, kernel, dtype="float32", **settings):
    """Return small integers as x, w and dy, and the settings with the groups, by default one for each channel."""
    settings.setdefault("groups", x_shape[1])
    w_shape = (filters, x_shape[1] // settings["groups"], *kernel)
    y_shape = Geometry.infer(x_shape, w_shape, **settings).y_shape
    return [draw(rng, shape, dtype, True).astype(named_dtype(dtype)) for shape in (x_shape, w_shape, y_shape)], settings


# ------------------------------------------------------------------------------------------------- traffic


# Lines with bank conflicts in shared memory: the largest ratio of wavefronts to those without, and the reason.
CONFLICTS = {
    "const Numbers<T, CHANNELS> values": (
        2.5,
        "lanes beyond the end of a row of channels_first continue in another strip",
    ),
    "Numbers<Result, CHANNELS>*>(to": (3, "as above"),
    "weights[(tap": (16, "weights are read in the order of memory, and stored by filters; this is once for each block"),
    "Numbers<Sum, CHANNELS>*>(to": (
        4,
        "sums of neighbouring shares are taps times pairs apart; once for each block",
    ),
    "add(sum, table": (16, "neighbouring threads add taps, as they lie in dw, and the table is by pairs; as above"),
}


def is_counted(extent, taps, dtype, layout, **_):
    """Few combinations in a plain run, because each dtype, layout and kernel extent needs a compilation."""
    few = taps == 5 and extent in (28, 10)
    return tiers.full or (few and (dtype, layout) in (("float32", "channels_last"), ("float16", "channels_first")))


@pytest.mark.emulated
@pytest.mark.called_once("what one call reads and writes is counted")
@combinations(
    extent=EXTENTS,
    taps=[3, 5, 7],
    direction=DIRECTIONS,
    dtype=["float32", "float16"],
    layout=BOTH_LAYOUTS,
    where=is_counted,
)
def test_elements_are_moved_once_and_without_bank_conflicts(extent, taps, direction, dtype, layout):
    """x, w and y take few more sectors than their bytes fill; with the partial sums of dw at most half as many more."""
    x, y, w = (
        in_sectors(np.ones(shape, dtype), layout, role)
        for shape, role in (((2, 16, extent, extent), "x"), ((2, 16, extent, extent), "x"), ((16, 1, taps, taps), "w"))
    )
    options = {"padding": taps // 2, "groups": 16, "layout": layout, "algorithm": "depthwise"}
    call = {
        "forward": lambda: gpuconv.conv(x, w, out=y, **options),
        "data_grad": lambda: gpuconv.conv_data_grad(y, w, x.shape, out=x, **options),
        "weight_grad": lambda: gpuconv.conv_weight_grad(y, x, w.shape, out=w, **options),
    }[direction]
    with arrays_of("emulated"), launcher.using(mode="checked", profiled=True, order="natural") as launches:
        call()
    accesses = [one for launch in launches for one in launch.accesses]
    sectors = sum(one.cost for one in accesses if one.memory == "global")
    assert 1 <= SECTOR * sectors / (x.nbytes + w.nbytes + y.nbytes) <= MOST_TRAFFIC[direction]
    for line in {one.line for one in accesses if one.memory == "shared"}:
        here = [one for one in accesses if (one.line, one.memory) == (line, "shared")]
        most = next((most for words, (most, _) in CONFLICTS.items() if words in source_line(line)), 1)
        assert sum(one.cost for one in here) <= most * sum(one.least for one in here), f"{line}: {source_line(line)}"


def in_sectors(array, layout, role):
    """Return an array in memory that begins at a sector, as all arrays of a GPU do."""
    array = laid_out(array, layout, role)
    memory = np.empty(array.nbytes + SECTOR, np.uint8)
    first = -memory.ctypes.data % SECTOR
    copy = memory[first : first + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


# ------------------------------------------------------------------------------------------------- values


@ON_KERNELS
@pytest.mark.parametrize("layout", BOTH_LAYOUTS)
@pytest.mark.parametrize(
    "x_shape, filters, kernel, settings",
    [
        ((5, 24, 7, 7), 24, (3, 3), {"padding": 1}),  # several images and vectors of channels
        ((1, 8, 70, 60), 8, (5, 5), {"padding": 2}),  # several boxes
        ((2, 3, 9, 8), 12, (3, 4), {"padding": (1, 2), "flip": True}),  # four filters per channel
        ((2, 4, 9, 11), 4, (9, 2), {"padding": 4, "dilation": (1, 3)}),  # more taps than share the rows they read
        ((1, 4, 12, 13), 4, (2, 2), {"stride": (3, 5), "padding": ((5, 1), (0, 3))}),  # phases without taps
        ((1, 16, 40), 16, (31,), {"padding": "same"}),
        ((2, 8, 5, 6, 7), 8, (3, 3, 3), {"padding": 1}),
        ((1, 4, 3, 40), 4, (2, 20), {"padding": ((-1, 0), (30, 40))}),
        ((6, 12, 20, 20), 20, (3, 3), {"padding": 1, "groups": 4}),  # three channels and five filters in a group
        ((3, 32, 8, 8), 32, (5, 3), {"padding": 1, "groups": 2, "stride": (1, 2)}),
        ((40, 4, 3, 4, 3), 4, (2, 3, 2), {}),  # several images in a block
        ((1, 8, 3, 4), 8, (3, 3), {"padding": 30}),  # boxes that lie in the padding
        ((1, 4, 7, 6, 5), 4, (3, 2, 3), {"padding": 1, "stride": (2, 1, 3)}),
        ((1, 8, 15, 13, 14), 8, (3, 3, 3), {"padding": 1}),  # several boxes on the first axis
        ((1, 4, 20, 8, 20), 4, (5, 1, 1), {}),  # several boxes on the second axis, whose extents are smaller
        ((1, 8, 36, 36), 8, (31, 31), {}),  # blocks of weight_grad for some of the columns of taps
    ],
)
def test_results_are_right(x_shape, filters, kernel, settings, layout, arrays, rng):
    given, settings = drawn(rng, x_shape, filters, kernel, **settings)
    found = results_of(arrays, *given, **settings, layout=layout)
    for one, expected in zip(found, exact(*given, **settings), strict=True):
        np.testing.assert_array_equal(one, expected)


@combinations(arrays=["checked"], layout=BOTH_LAYOUTS)
def test_the_last_block_does_nothing_forbidden(layout, arrays, rng):
    """In channels_last a block of weight_grad has 16 groups, and the last one 8."""
    given, settings = drawn(rng, (1, 40, 9, 10), 40, (3, 3), padding=1)
    for one, expected in zip(
        results_of(arrays, *given, **settings, layout=layout), exact(*given, **settings), strict=True
    ):
        np.testing.assert_array_equal(one, expected)


VIEWS = {
    **GENERAL_VIEWS,
    "one element further": lambda xp, a: xp.concatenate([a.ravel()[:1], a.ravel()])[1:].reshape(a.shape),
}


@ON_KERNELS
@pytest.mark.parametrize("name", VIEWS)
def test_views_are_read_where_they_lie(name, arrays, rng):
    given, settings = drawn(rng, (2, 4, 6, 8), 4, (3, 3), padding=1)
    x, w, dy = (VIEWS[name](arrays.xp, arrays.xp.asarray(a)) for a in given)
    options = {**settings, "algorithm": "depthwise"}
    results = (
        gpuconv.conv(x, w, **options),
        gpuconv.conv_data_grad(dy, w, x.shape, **options),
        gpuconv.conv_weight_grad(dy, x, w.shape, **options),
    )
    for found, expected in zip(results, exact(*map(arrays.asnumpy, (x, w, dy)), **settings), strict=True):
        np.testing.assert_array_equal(arrays.asnumpy(found), expected)


@combinations(
    arrays=BACKENDS[1:],
    dtype=["float32", "float16", "complex64"],
    layout=BOTH_LAYOUTS,
    filters=[8, 16],  # one of each channel, or two: threads compute several channels, or one
    where=lambda arrays, dtype, layout, filters: compiles_much(arrays) or (dtype == "float16") == (filters == 8),
    turns=["layout"],
)
def test_bias_activation_derivative_and_conjugate_are_fused(filters, layout, dtype, arrays, rng):
    """Transposed convolutions conjugate complex operands. If y is not laid out as dy, the product is formed before."""
    activation = None if dtype == "complex64" else "relu"
    given, settings = drawn(rng, (3, 8, 8, 7), filters, (3, 3), dtype, padding=1)
    x, w, dy = (laid_out(a, layout, role) for a, role in zip(given, "xwx", strict=True))
    b = draw(rng, (filters,), dtype, True).astype(dtype)
    c = draw(rng, (8,), dtype, True).astype(dtype)
    options = {**settings, "layout": layout, "activation": activation}
    y = gpuconv.conv(x, w, b, **options, algorithm="im2col")
    t = gpuconv.conv_transpose(dy, w, c, **options, algorithm="im2col")
    given = [arrays.asarray(a) for a in (x, w, b, c, dy, y, t, np.asfortranarray(y))]

    def results(x, w, b, c, dy, y, t, y_elsewhere, algorithm):
        named = {**options, "algorithm": algorithm}
        return (
            gpuconv.conv(x, w, b, **named),
            gpuconv.conv_transpose(dy, w, c, **named),
            *gpuconv.conv_backward(dy, x, w, y=y, **named)[:2],
            *gpuconv.conv_backward(dy, x, w, y=y_elsewhere, **named)[:2],
            *gpuconv.conv_transpose_backward(x, dy, w, y=t, **named)[:2],
        )

    for found, expected in zip(results(*given, "depthwise"), results(*given, "direct"), strict=True):
        np.testing.assert_array_equal(arrays.asnumpy(found), arrays.asnumpy(expected))


@ON_KERNELS
@pytest.mark.parametrize("layout", BOTH_LAYOUTS)
def test_padding_has_no_products_with_infinite_weights(layout, arrays):
    """And outputs beyond the end of a strip have none with infinite inputs."""
    x, w = np.ones((2, 4, 6, 5), np.float32), np.ones((4, 1, 3, 3), np.float32)
    w[:, :, 0, 0], dy = np.inf, np.ones((2, 4, 6, 5), np.float32)
    y, dx, _ = results_of(arrays, x, w, dy, padding=1, groups=4, layout=layout)
    assert np.isfinite(y[:, :, 0]).all()
    assert np.isfinite(y[:, :, :, 0]).all()
    assert np.isinf(y[:, :, 1:, 1:]).all()
    assert np.isfinite(dx[:, :, -1]).all()
    assert np.isfinite(dx[:, :, :, -1]).all()
    x[:, :, -1] = np.inf
    dy[:, :, -1] = 0
    *_, dw = results_of(arrays, x, np.ones_like(w), dy, padding=1, groups=4, layout=layout)
    assert np.isfinite(dw[:, :, 0]).all()


@EMULATED
@pytest.mark.parametrize(
    "x_dtype, dtype, mode",
    [
        ("float16", "float32", "checked"),
        ("float32", "float16", "fast"),
        ("float32", "complex64", "fast"),
        ("complex64", "float32", "fast"),
    ],
)
def test_operands_may_have_different_dtypes(x_dtype, dtype, mode, arrays, rng):
    """The planes of x are whole vectors of 16 bytes, and those of dy are not whole vectors of as many elements."""
    (x, w, dy), settings = drawn(rng, (2, 4, 14, 14), 4, (3, 3), padding=1, stride=2)
    given = x.astype(x_dtype), w.astype(dtype), dy.astype(dtype)
    with launcher.using(mode=mode):
        found = results_of(arrays, *given, **settings)
    for one, expected in zip(found, exact(*given, **settings), strict=True):
        np.testing.assert_array_equal(one, expected)


@ON_KERNELS
def test_sums_of_half_precision_are_rounded_once(arrays, rng):
    x, w, dy = (
        draw(rng, shape, "float16", False).astype(np.float16)
        for shape in ((64, 8, 14, 14), (8, 1, 3, 3), (64, 8, 14, 14))
    )
    for layout in BOTH_LAYOUTS:
        dw = results_of(arrays, x, w, dy, padding=1, groups=8, layout=layout)[2]
        expected = exact(x, w, dy, padding=1, groups=8)[2]
        magnitude = exact(*map(np.abs, (x, w, dy)), padding=1, groups=8)[2]
        assert_within(dw, expected, direct_bound(expected, magnitude, 64 * 14 * 14, "float16"))


# ------------------------------------------------------------------------------------------------- order and splits


@ON_KERNELS
@pytest.mark.parametrize("layout", BOTH_LAYOUTS)
def test_an_image_alone_gives_the_same_bits_as_in_a_batch(layout, arrays, rng):
    """A batch has other boxes, several images of which are in a block."""
    x, w, dy = (
        draw(rng, shape, "float32", False).astype(np.float32) for shape in ((7, 8, 9, 8), (8, 1, 5, 5), (7, 8, 9, 8))
    )
    together = results_of(arrays, x, w, dy, padding=2, groups=8, layout=layout)
    for n in range(7):
        alone = results_of(arrays, x[n : n + 1], w, dy[n : n + 1], padding=2, groups=8, layout=layout)
        for one, other in zip(alone[:2], together[:2], strict=True):
            np.testing.assert_array_equal(one[0], other[n])


def launches_of(geometry, direction, limit=64 << 20):
    """Return the kernels, grids, arguments and shared memory of the launches of a plan, and its workspace."""
    found = []

    def remember(kernel: Kernel, grid, block, arguments, shared_memory=0):
        found.append((kernel, grid, arguments, shared_memory))
        return lambda *_: None

    backend = launcher.EMULATED._replace(launch=remember)
    planner = Planner(backend, np.dtype(np.float32), limit, Scope(WORKSPACE, 1000), 1000)
    first, second, result = (contiguous(role, np.dtype(np.float32), geometry) for role in ROLES[direction])
    getattr(depthwise, direction)(Operand(first), Operand(second), Result(result), geometry, planner)
    return found, planner.scope.most


@pytest.mark.parametrize("layout", BOTH_LAYOUTS)
def test_splits_fill_a_gpu_within_the_workspace(layout):
    """With less workspace there are fewer splits, and one split writes dw itself."""
    x, w = ((32, 32, 56, 56), (32, 1, 3, 3)) if layout == "channels_first" else ((32, 56, 56, 32), (3, 3, 1, 32))
    geometry = Geometry.infer(x, w, padding=1, groups=32, layout=layout)
    grids = []
    for limit in (64 << 20, 20 << 10, 4 << 10):
        launches, space = launches_of(geometry, "weight_grad", limit)
        assert space <= limit
        grids.append(launches[0][1])
        assert len(launches) == (1 if limit == 4 << 10 else 2)
    assert grids[0] >= depthwise.ENOUGH_BLOCKS > grids[1] > grids[2]


@EMULATED
@pytest.mark.parametrize("limit", ["2000", "20000"])
def test_small_workspaces_change_no_result(limit, arrays, monkeypatch, rng):
    """The derivative of another layout is formed for a few images at a time, whose sums are added to the total."""
    given, settings = drawn(rng, (5, 4, 7, 8), 8, (3, 3), padding=1)
    x, w, dy = given
    y = np.asfortranarray(dy)
    options = {**settings, "algorithm": "depthwise", "activation": "relu", "y": y}
    expected = gpuconv.conv_backward(dy, x, w, **options)
    monkeypatch.setenv("GPUCONV_WORKSPACE_LIMIT", limit)
    for one, other in zip(gpuconv.conv_backward(dy, x, w, **options), expected, strict=True):
        np.testing.assert_array_equal(one, other)


# ------------------------------------------------------------------------------------------------- boxes and refusals


LAYERS = (
    ((32, 96, 56, 56), (96, 1, 7, 7), {"padding": 3}),
    ((1, 32, 112, 112), (32, 1, 3, 3), {"padding": 1}),
    ((8, 960, 7, 7), (960, 1, 5, 5), {"padding": 2}),
    ((1, 8, 300, 300), (8, 1, 31, 31), {"padding": 15}),
    ((1, 36, 56, 56), (36, 1, 3, 3), {"stride": 2}),
    ((2, 16, 30, 28, 26), (16, 1, 3, 3, 3), {"padding": 1}),
    ((4, 64, 100_000), (64, 1, 4), {"padding": ((3, 0),)}),
    ((2, 8, 65, 65), (8, 1, 3, 3), {"padding": 12, "dilation": 12}),
    ((2, 3, 40, 40), (30, 1, 3, 3), {}),
    ((400, 8, 4, 4), (8, 1, 3, 3), {"padding": 200}),  # few inputs and many outputs
)


@pytest.mark.parametrize("layer", LAYERS)
def test_boxes_fit_shared_memory_and_cover_the_outputs(layer):
    x_shape, w_shape, settings = layer
    for layout in BOTH_LAYOUTS:
        if layout == "channels_last":
            x_shape, w_shape = (x_shape[0], *x_shape[2:], x_shape[1]), (*w_shape[2:], w_shape[1], w_shape[0])
        geometry = Geometry.infer(x_shape, w_shape, **settings, groups=layer[0][1], layout=layout)
        for direction in DIRECTIONS:
            for kernel, grid, arguments, shared_memory in launches_of(geometry, direction)[0]:
                assert shared_memory <= depthwise.SHARED_MEMORY
                if kernel.name == "split_sum":
                    continue
                block, conv = (next(a for a in arguments if has_field(a, field)) for field in ("region", "stride"))
                boxes = -(-int(conv["N"]) // block["images"]) * math.prod(-(-conv["output"] // block["outputs"]))
                blocks = grid / -(-int(conv["G"]) // block["groups"])
                if kernel.name == "depthwise_forward":
                    assert blocks == boxes
                else:
                    columns = math.prod(conv["kernel"]) // dict(kernel.module.constants)["TAPS"]
                    splits, length = blocks / -(-columns // block["columns"]), arguments[-3]
                    assert splits == -(-boxes // length)


def has_field(argument, field):
    names = getattr(argument, "dtype", None) and argument.dtype.names
    return bool(names) and field in names


@pytest.mark.parametrize(
    "x_shape, w_shape, settings, direction, limit, reason",
    [
        (
            (1, 34, 9, 9),
            (2, 17, 3, 3),
            {"groups": 2},
            "forward",
            64 << 20,
            "it requires groups of at most 16 channels, or one channel, not 2 of 17",
        ),
        (
            (1, 2, 9, 9),
            (2, 2, 3, 3),
            {},
            "forward",
            64 << 20,
            "it requires groups of at most 16 channels, or one channel, not 1 of 2",
        ),
        (
            (1, 4, 9, 9),
            (1028, 1, 3, 3),
            {"groups": 4},
            "weight_grad",
            64 << 20,
            "a block of 256 threads sums all pairs of a channel and a filter in a group, not 257",
        ),
        (
            (1, 1, 90, 90),
            (1, 1, 3, 3),
            {"stride": 9},
            "data_grad",
            64 << 20,
            "it launches a kernel for each phase of the stride, and 81 are more than 64",
        ),
        (
            (1, 1, 90_000),
            (1, 1, 3),
            {"dilation": 20_000},
            "forward",
            64 << 20,
            "the inputs of one output need 160032 bytes of shared memory, but a block has 49152",
        ),
        (
            (1, 2, 90, 90),
            (2, 1, 31, 31),
            {"groups": 2},
            "weight_grad",
            15_000,
            "it needs 15376 bytes of workspace for the sums of one group, but GPUCONV_WORKSPACE_LIMIT is 15000 bytes",
        ),
    ],
)
def test_refusals_state_the_rule_and_the_numbers(x_shape, w_shape, settings, direction, limit, reason):
    geometry = Geometry.infer(x_shape, w_shape, **settings)
    request = Request(geometry, np.dtype(np.float32), direction, launcher.EMULATED, True, limit)
    assert depthwise.why_not(request) == reason


def test_auto_takes_it_for_small_groups():
    for channels, groups, expected in ((8, 8, "depthwise"), (8, 4, "depthwise"), (34, 2, "direct"), (8, 1, "im2col")):
        geometry = Geometry.infer((2, channels, 9, 9), (8, channels // groups, 3, 3), groups=groups)
        request = Request(geometry, np.dtype(np.float32), "forward", launcher.EMULATED)
        assert choose(request, "auto").algorithm == expected
    on_numpy = Request(Geometry.infer((2, 8, 9, 9), (136, 1, 3, 3), groups=8), np.dtype(np.float32), "forward", NUMPY)
    assert depthwise.why_not(on_numpy) == "a group may have at most 16 channels and filters, not 1 and 17"


@ON_KERNELS
def test_more_than_three_axes_are_computed_by_rows(arrays, rng):
    given, settings = drawn(rng, (2, 3, 4, 3, 5, 4), 3, (2, 2, 2, 2), padding=1)
    for one, expected in zip(results_of(arrays, *given, **settings), exact(*given, **settings), strict=True):
        np.testing.assert_array_equal(one, expected)


@pytest.mark.checked
def test_extreme_strides_overflow_nowhere():
    """The outputs of a strip beyond the last one are not computed at positions that 32 bits do not hold."""
    x, w = np.ones((1, 1, 3, 2, 3)), np.ones((1, 1, 1, 2, 2))
    options = {"stride": (2**28, 1, 2**30), "algorithm": "depthwise"}
    with arrays_of("checked"):
        y = gpuconv.conv(x, w, **options)
        dw = gpuconv.conv_weight_grad(y, x, w.shape, **options)
    assert (y == 4).all()
    assert (dw == 4).all()


@ON_KERNELS
def test_offsets_may_have_64_bits(arrays, monkeypatch, rng):
    monkeypatch.setattr(params, "NARROW", 0)
    given, settings = drawn(rng, (2, 8, 9, 8), 8, (3, 3), padding=1)
    for layout in BOTH_LAYOUTS:
        found = results_of(arrays, *given, **settings, layout=layout)
        for one, expected in zip(found, exact(*given, **settings), strict=True):
            np.testing.assert_array_equal(one, expected)
