"""The kernels of bias_grad: every layout and dtype against the reference, and what they read and launch."""

import numpy as np
import pytest

import gpuconv
from gpuconv import execute
from gpuconv.gpu import bias_grad, params
from tests.backends import BACKENDS, arrays_of, on
from tests.cases import DTYPES, LAYOUTS, draw, laid_out, named_dtype
from tests.emulation import launcher
from tests.tiers import combinations
from tests.tolerances import assert_within, direct_bound

ON_KERNELS = on("emulated", "cupy")
SECTOR = 32
# The shape of dy: short and long positions, one and several blocks of channels, several images in a split.
SHAPES = {
    "few": (1, 3, 5),
    "several blocks of channels": (2, 70, 9, 8),
    "several chunks": (3, 5, 17, 13),
    "one channel": (1, 1, 4163),
    "many images": (300, 2, 3),
    "3-D": (2, 33, 2, 3, 4),
    "one position": (40, 3, 1),
    "several splits": (1, 130, 40, 41),
}


def db(arrays, dy, layout="channels_first", **options):
    """Return db as a NumPy array. dy is channels_first; x and w are of any shapes that fit."""
    x, w = np.ones((len(dy), 1, *dy.shape[2:]), dy.dtype), np.ones((dy.shape[1], 1, *[1] * (dy.ndim - 2)), dy.dtype)
    y = options.pop("y", None)
    given = [arrays.asarray(laid_out(a, layout, role)) for a, role in ((dy, "x"), (x, "x"), (w, "w"))]
    if y is not None:
        options["y"] = arrays.asarray(y)
    axes = "channels_last" if layout == "channels_last" else "channels_first"
    return arrays.asnumpy(gpuconv.conv_backward(*given, needs="db", layout=axes, **options).db)


def summed(dy):
    return dy.sum((0, *range(2, dy.ndim)))


def launches():
    """Return the number of blocks of the kernel's launch in the plan of db, in a list; [] if there is none."""
    (text,) = [str(plan) for plan in execute._plans.values() if plan.algorithm == "bias_grad"]
    found = [line for line in text.splitlines() if "bias_grad<<<" in line]
    return [int(line.partition("<<<")[2].partition(",")[0]) for line in found]


@combinations(
    arrays=["emulated", *(["cupy"] if "cupy" in BACKENDS else []), "checked"],
    shape=SHAPES,
    layout=LAYOUTS,
    dtype=DTYPES,
    where=lambda arrays, dtype, **_: arrays != "checked" or dtype in ("float32", "complex64"),
    turns=("dtype", "layout"),
)
def test_sums_are_right(shape, layout, dtype, arrays):
    """Small integers exactly, rounded once; random numbers within the bound."""
    for integers in (True, False):
        dy = draw(np.random.default_rng(3), SHAPES[shape], dtype, integers)
        found, exact = db(arrays, dy.astype(named_dtype(dtype)), layout), summed(dy)
        if integers:
            np.testing.assert_array_equal(found, exact.astype(named_dtype(dtype)))
        else:
            assert_within(found, exact, direct_bound(exact, summed(np.abs(dy)), dy.size // dy.shape[1], dtype))
    assert launches()


@ON_KERNELS
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "sigmoid", "tanh"])
def test_dy_is_multiplied_by_the_derivative(activation, layout, dtype, arrays):
    """y is read by the kernel if it lies in memory as dy does; else the product is formed before."""
    rng = np.random.default_rng(5)
    dy, y = (draw(rng, (2, 5, 9, 8), dtype, False).astype(named_dtype(dtype)) for _ in range(2))
    y = np.abs(y) / 8 if activation == "sigmoid" else y
    wide = [array.astype(np.float64) for array in (dy, y)]
    slope = {
        "relu": lambda y: np.where(y > 0, 1.0, 0.0),
        "leaky_relu": lambda y: np.where(y > 0, 1.0, 0.01),
        "sigmoid": lambda y: y * (1 - y),
        "tanh": lambda y: 1 - y * y,
    }[activation](wide[1])
    exact, magnitude = summed(wide[0] * slope), summed(np.abs(wide[0] * slope))
    for lying in (laid_out(y, layout, "x"), np.asfortranarray(laid_out(y, layout, "x"))):
        gpuconv.clear_cache()
        found = db(arrays, dy, layout, activation=activation, y=lying)
        assert_within(found, exact, 4 * direct_bound(exact, magnitude, 144, dtype))
        assert bool(launches()) == (lying.strides == laid_out(y, layout, "x").strides)


@ON_KERNELS
def test_views_are_read_where_they_lie_or_copied(arrays):
    """Positions of one stride, negative and zero too, are read by the kernel."""
    dy = np.random.default_rng(7).integers(-3, 4, (4, 6, 8, 9)).astype(np.float32)
    views = {
        "reversed": (lambda a: a[::-1, ::-1, ::-1, ::-1], True),
        "broadcast": (lambda a: np.broadcast_to(a[:1, :, :1, :1], a.shape), True),
        "transposed": (lambda a: a[:, :, :, :8].swapaxes(2, 3), False),
    }
    w = arrays.asarray(np.ones((6, 1, 1, 1), np.float32))
    for view, is_read in views.values():
        gpuconv.clear_cache()
        x = arrays.asarray(np.ones((4, 1, *view(dy).shape[2:]), np.float32))
        found = arrays.asnumpy(gpuconv.conv_backward(view(arrays.asarray(dy)), x, w, needs="db").db)
        np.testing.assert_array_equal(found, summed(view(dy)))
        assert bool(launches()) == is_read


@ON_KERNELS
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_offsets_may_have_64_bits(layout, arrays, monkeypatch):
    """And threads and blocks any order."""
    monkeypatch.setattr(params, "NARROW", 0)
    dy = np.random.default_rng(13).integers(-3, 4, SHAPES["several blocks of channels"]).astype(np.float32)
    with arrays.varied(wide=False):
        np.testing.assert_array_equal(db(arrays, dy, layout), summed(dy))
        (plan,) = (plan for plan in execute._plans.values() if plan.algorithm == "bias_grad")
        assert plan.steps[0].inputs[3].dtype == np.int64


@ON_KERNELS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_are_channels(layout, arrays):
    dy = np.random.default_rng(11).integers(-3, 4, (2, 6, 5, 4)).astype(np.float32)
    x, w = np.ones((2, 3, 5, 4), np.float32), np.ones((6, 1, 1, 1), np.float32)
    given = [arrays.asarray(laid_out(a, layout, role)) for a, role in ((dy, "x"), (x, "x"), (w, "w"))]
    axes = "channels_last" if layout == "channels_last" else "channels_first"
    found = gpuconv.conv_backward(*given, groups=3, needs="db", layout=axes).db
    np.testing.assert_array_equal(arrays.asnumpy(found), summed(dy))
    assert launches()


@on("emulated")
def test_long_sums_do_not_drift(arrays):
    dy = np.full((1, 1, 300_000), 0.1, np.float32)
    np.testing.assert_allclose(db(arrays, dy), [300_000 * float(np.float32(0.1))], rtol=1e-7)


@on("emulated")
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_there_are_enough_blocks_and_little_workspace(layout, arrays, monkeypatch):
    """Of 16 channels, too, there are blocks for all multiprocessors; the limit bounds the number of splits."""
    for limit, least, most in (("64MiB", 390, 2048), ("2000", 1, 2000 // 8)):
        monkeypatch.setenv("GPUCONV_WORKSPACE_LIMIT", limit)
        gpuconv.clear_cache()
        dy = np.random.default_rng(9).integers(-3, 4, (8, 16, 56, 56)).astype(np.float32)
        np.testing.assert_array_equal(db(arrays, dy, layout), summed(dy))
        (grid,) = launches()
        assert least <= grid <= most


@pytest.mark.emulated
@pytest.mark.called_once("what one call reads is counted")
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("shape", [(4, 64, 28, 28), (2, 32, 14, 16)])
def test_dy_is_read_once(layout, shape):
    """Whole 32-byte sectors, with the partial sums: at most 1.15 times the bytes of dy."""
    dy = np.ones(shape, np.float32)
    with arrays_of("emulated") as arrays, launcher.using(mode="checked", profiled=True, order="natural") as launched:
        db(arrays, dy, layout)
    read = sum(
        one.cost for launch in launched for one in launch.accesses if (one.memory, one.kind) == ("global", "read")
    )
    assert dy.nbytes <= read * SECTOR <= 1.15 * dy.nbytes


def test_the_block_fits_the_channels_and_positions():
    for channels, lanes in ((2, 2), (3, 4), (32, 32), (70, 32)):
        view = execute.View(0, 0, (2, 5, 1, channels), (20 * channels, 4 * channels, 4 * channels, 4), np.dtype("f4"))
        assert bias_grad._block(view, channels, 5) == (lanes, 256 // lanes)
    for positions, rows in ((1, 32), (33, 64), (49, 64), (200, 256), (5000, 256)):
        view = execute.View(0, 0, (2, positions, 1, 70), (280 * positions, 4, 4, 4 * positions), np.dtype("f4"))
        assert bias_grad._block(view, 70, positions) == (256 // rows, rows)
        assert bias_grad._block(view, 1, positions) == (1, 256)
