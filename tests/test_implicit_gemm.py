"""Algorithm implicit_gemm beyond the tests of the matrix: every tile, accumulation, launches."""

import collections
import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import gpuconv
from gpuconv import dtypes, execute
from gpuconv.execute import Call
from gpuconv.geometry import Geometry
from gpuconv.gpu import gemm_choice, gemm_packing, gemm_plan, implicit_gemm, kernels_folder, params
from gpuconv.gpu.device import MODEL, Device
from gpuconv.gpu.gemm_choice import TileChoice
from gpuconv.operands import Operand
from gpuconv.views import View
from tests import reference
from tests.backends import BACKENDS, marks_of, on
from tests.cases import DIRECTIONS, channels_first, draw, laid_out, named_dtype
from tests.emulation import launcher
from tests.tiers import combinations, compiles_much
from tests.tolerances import assert_within, direct_bound

ON_KERNELS = on("emulated", "cupy")
EMULATED = on("emulated")
CHECKED_TOO = [pytest.param(name, marks=marks_of(name)) for name in ("checked", *BACKENDS[1:])]
TWO_LAYOUTS = ["channels_first", "channels_last"]
BOTH_LAYOUTS = pytest.mark.parametrize("layout", TWO_LAYOUTS)

# The kinds of multiplication: dtype and precision.
KINDS = {
    "float16": ("float16", "ieee"),
    "bfloat16": ("bfloat16", "ieee"),
    "float32": ("float32", "ieee"),
    "tf32": ("float32", "tf32"),
    "tf32x3": ("float32", "tf32x3"),
    "float64": ("float64", "ieee"),
    "complex64": ("complex64", "ieee"),
    "complex128": ("complex128", "ieee"),
}
TILES = [
    (kind, tile)
    for kind, (name, precision) in KINDS.items()
    for tile in gemm_plan._products(
        *[Operand(View(0, 0, (), (), named_dtype(name)))] * 2,
        *(1, dtypes.accumulator(named_dtype(name)), precision, MODEL),
    ).tiles
]
TURING = Device(75, 72)
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def without_packing(monkeypatch):
    """Read operands where they are, so that all loads of tiles are tested; tests/test_gemm_packing.py tests packing."""
    monkeypatch.setattr(gemm_packing, "packed_channels", lambda *_: (0, 0))
    gpuconv.clear_cache()
    yield
    gpuconv.clear_cache()


class Problem:
    """A convolution with its data and exact results, in channels_first terms."""

    def __init__(self, x, w, dtype, integers=True, seed=0, positive=False, **settings):
        rng = np.random.default_rng(seed)
        rank, dilation = len(x) - 2, settings.get("dilation", 1)
        self.settings = {
            "stride": (settings.get("stride", 1),) * rank,
            "padding": ((settings.get("padding", 0),) * 2,) * rank,
            "dilation": dilation if isinstance(dilation, tuple) else (dilation,) * rank,
            "groups": settings.get("groups", 1),
        }
        self.dtype = dtype
        self.geometry = Geometry.infer(x, w, **self.settings)
        self.x, self.w = (draw(rng, shape, dtype, integers) for shape in (x, w))
        self.dy = draw(rng, self.geometry.y_shape, dtype, integers)
        if positive:
            self.x, self.w, self.dy = (abs(a).astype(a.dtype) for a in (self.x, self.w, self.dy))

    def exact(self, direction, magnitudes=False):
        x, w, dy = (abs(a) if magnitudes else a for a in (self.x, self.w, self.dy))
        if direction == "forward":
            return reference.forward(x, w, **self.settings)
        if direction == "data_grad":
            return reference.data_grad(dy, w, self.x.shape, **self.settings)
        return reference.weight_grad(dy, x, self.w.shape, **self.settings)

    def computed(self, arrays, direction, layout="channels_first", **options):
        dtype = named_dtype(self.dtype)
        x, w, dy = (
            arrays.asarray(laid_out(a.astype(dtype), layout, role))
            for a, role in ((self.x, "x"), (self.w, "w"), (self.dy, "x"))
        )
        options = {**self.settings, "layout": layout, "algorithm": "implicit_gemm", **options}
        if direction == "forward":
            result = gpuconv.conv(x, w, **options)
        elif direction == "data_grad":
            result = gpuconv.conv_data_grad(dy, w, x.shape, **options)
        else:
            result = gpuconv.conv_weight_grad(dy, x, w.shape, **options)
        return channels_first(arrays.asnumpy(result), layout, "w" if direction == "weight_grad" else "x")

    def bound(self, direction):
        terms = self.geometry.reduction_length(direction)
        return direct_bound(self.exact(direction), self.exact(direction, True), terms, self.dtype)


@contextlib.contextmanager
def forced(tile, splits=1):
    """Enter a context in which a given tile is used instead of the chosen one."""

    def chosen(problem):
        return TileChoice(tile, min(splits, problem.most_splits), 0.0)

    gpuconv.clear_cache()
    with mock.patch.object(gemm_choice, "chosen", chosen):
        yield
    gpuconv.clear_cache()


@contextlib.contextmanager
def planned():
    """Enter a context whose value lists the constants of launched kernels, without duplicates by repeated calls."""
    found = []
    original = implicit_gemm.planned

    def plan(*arguments):
        made = original(*arguments)
        if dict(made.module.constants) not in found:
            found.append(dict(made.module.constants))
        return made

    execute.clear()
    with mock.patch.object(implicit_gemm, "planned", plan):
        yield found


# ------------------------------------------------------------------------------------------------- results


# The smaller of the numbers of channels and filters, by how much the larger one exceeds a tile's columns, extents with
# more outputs than a tile's rows, and the width of copies, if 16 bytes are as many elements.
SIZES = {
    "in chunks": (32, 8, (16, 9), 8),
    "by fours": (28, 4, (14, 10), 4),
    "by twos": (30, 2, (14, 9), 2),
    "one by one": (29, 3, (13, 11), 1),
}


@combinations(
    arrays=BACKENDS[1:],
    kind=KINDS,
    tile=dict.fromkeys(tile for _, tile in TILES),
    direction=DIRECTIONS,
    sizes=SIZES,
    layout=TWO_LAYOUTS,
    where=lambda kind, tile, **_: (kind, tile) in TILES,
    turns=["kind", "direction", "sizes", "layout"],
)
def test_every_tile_is_exact(kind, tile, direction, sizes, layout, arrays):
    """Rows and columns do not fill the last tile, and the depth does not fill the last main-loop iteration."""
    dtype, precision = KINDS[kind]
    few, more, extent, width = SIZES[sizes]
    many = tile.columns + more
    channels, filters = (many, few) if direction == "data_grad" else (few, many)
    problem = Problem((2, channels, *extent), (filters, channels, 3, 3), dtype, padding=1)
    with forced(tile, splits=3), planned() as constants:
        result = problem.computed(arrays, direction, layout, precision=precision)
    np.testing.assert_array_equal(result, problem.exact(direction).astype(result.dtype))
    (found,) = constants
    assert (found["TILE_ROWS"], found["WARP_COLUMNS"]) == (tile.rows, tile.warp_columns)
    chunk = 16 // np.dtype(result.dtype).itemsize
    assert max(found["LEFT_VECTOR"], found["RIGHT_VECTOR"], found["RESULT_VECTOR"]) == min(chunk, width)


@combinations(
    arrays=BACKENDS[1:],
    kind=KINDS,
    direction=DIRECTIONS,
    rank=[1, 2, 3],
    groups_and_stride=[(1, 1), (3, 1), (1, 2), (2, 3)],
    layout=TWO_LAYOUTS,
    where=lambda arrays, kind, **_: compiles_much(arrays) or kind in ("float16", "tf32x3"),
    turns=["rank", "groups_and_stride", "layout"],
)
def test_random_numbers_stay_within_their_bound(kind, direction, rank, groups_and_stride, layout, arrays):
    dtype, precision = KINDS[kind]
    groups, stride = groups_and_stride
    problem = Problem(
        *((2, 8 * groups, *(7, 9, 8)[:rank]), (16 * groups, 8, *(3, 2, 3)[:rank]), dtype, False),
        padding=1,
        groups=groups,
        stride=stride,
    )
    result = problem.computed(arrays, direction, layout, precision=precision)
    bound = problem.bound(direction)
    if kind == "tf32":
        bound = bound + 2.0**-10 * problem.exact(direction, magnitudes=True)
    assert_within(result, problem.exact(direction), (2 if kind == "tf32x3" else 1) * bound)


@ON_KERNELS
@pytest.mark.parametrize("kernel", [(32,), (33,), (4, 8), (3, 11), (2, 4, 4), (4, 3, 3)])
@pytest.mark.parametrize("direction", ["forward", "data_grad"])
def test_windows_of_32_taps_and_more_are_exact(direction, kernel, arrays):
    """Up to 32 taps have one bit each for whether they are in bounds; for more taps positions are compared."""
    problem = Problem(
        (2, 9, *(9, 13, 5)[: len(kernel)]), (12, 9, *kernel), "float32", padding=16 if kernel[0] > 9 else 3
    )
    with planned() as constants:
        result = problem.computed(arrays, direction)
    np.testing.assert_array_equal(result, problem.exact(direction))
    taps = np.prod(kernel)
    assert [c["AXES"] for c in constants] == [4 if taps <= 32 else len(kernel)]


@combinations(
    arrays=BACKENDS[1:],
    dtype=["float16", "float32"],
    layout=TWO_LAYOUTS,
    direction=["forward", "weight_grad"],
    where=lambda arrays, dtype, **_: compiles_much(arrays) or dtype == "float16",
)
def test_elements_that_no_window_reads_have_no_influence(direction, dtype, layout, arrays):
    """Tiles that the work does not fill load none of them, since zero times NaN is NaN."""
    problem = Problem((1, 5, 7, 7), (7, 5, 1, 1), dtype, stride=2, padding=1)
    expected = problem.exact(direction)
    problem.x[:, :, ::2] = problem.x[:, :, :, ::2] = np.nan
    np.testing.assert_array_equal(problem.computed(arrays, direction, layout), expected.astype(dtype))


@ON_KERNELS
@BOTH_LAYOUTS
def test_tf32_rounds_to_the_nearest(layout, arrays):
    """For positive numbers the error of rounding is at most 1e-4; that of truncation would be 6e-4."""
    problem = Problem((1, 16, 12, 12), (16, 16, 3, 3), "float32", False, positive=True, padding=1)
    exact = problem.exact("forward")
    for precision, most in (("tf32", 2e-4), ("tf32x3", 4e-6), ("ieee", 1e-6)):
        error = abs(problem.computed(arrays, "forward", layout, precision=precision) - exact) / exact
        assert (error <= most).all()
        assert precision != "tf32" or error.max() > 1e-5, "TF32 was not used"


@combinations(
    arrays=BACKENDS[1:],
    kind=["tf32x3", "float16", "float32", "complex64"],
    direction=DIRECTIONS,
    turns=["direction"],
)
def test_sums_of_100_000_positive_terms_stay_within_the_bound(direction, kind, arrays):
    """Tensor cores truncate sums, always towards zero, so long sums must be flushed to a second accumulator."""
    dtype, precision = KINDS[kind]
    terms = 100_000
    if direction == "weight_grad":
        problem = Problem((1, 2, terms), (3, 2, 1), dtype, False, positive=True)
    else:
        channels = (3, terms) if direction == "data_grad" else (terms, 3)
        problem = Problem((1, channels[0], 4), (channels[1], channels[0], 1), dtype, False, positive=True)
    if dtype in ("float16", "bfloat16"):  # the sum must not overflow, and its rounding must not hide the error
        problem.x, problem.w, problem.dy = (
            (a / 2**7).astype(named_dtype(dtype)).astype(float) for a in (problem.x, problem.w, problem.dy)
        )
    result = problem.computed(arrays, direction, precision=precision)
    bound = problem.bound(direction)
    if kind == "tf32":
        bound = bound + 2.0**-10 * problem.exact(direction, magnitudes=True)
    assert_within(result, problem.exact(direction), bound * (2 if kind == "tf32x3" else 1))


@ON_KERNELS
@pytest.mark.parametrize("direction", ["forward", "data_grad"])
def test_more_than_32_taps_are_found_by_their_positions(direction, arrays):
    problem = Problem((1, 2, 7, 9, 11), (2, 2, 4, 3, 3), "float32", dilation=(1, 2, 3), padding=2)
    np.testing.assert_array_equal(problem.computed(arrays, direction), problem.exact(direction))


@pytest.mark.parametrize("arrays", CHECKED_TOO, indirect=True)
@pytest.mark.parametrize("kernel", [(4, 8), (4, 3, 3)], ids=["32 taps", "36 taps"])
def test_infinite_weights_of_many_taps_meet_no_zeros_beyond_dy(kernel, arrays):
    """Sums that become NaN are recomputed without the products with padding."""
    dilation = (1, 2, 3)[: len(kernel)]
    problem = Problem((1, 2, 9, 19, 11)[: len(kernel) + 2], (1, 2, *kernel), "float32", dilation=dilation, padding=2)
    problem.w[:] = 1
    problem.dy[:] = 1
    problem.w[0, 1][(1,) * len(kernel)] = np.inf  # beside the first tap, which other rows see
    expected = problem.exact("data_grad")
    assert np.isinf(expected).any()
    assert np.isfinite(expected).any()
    np.testing.assert_array_equal(problem.computed(arrays, "data_grad"), expected)


@ON_KERNELS
def test_weights_alone_are_conjugated_where_both_operands_are_converted(arrays):
    """The gradient of a transposed convolution; dy, of another dtype than the sums, is read element by element."""
    problem = Problem((1, 3, 6, 5), (4, 3, 3, 2), "complex64")
    x, w = (arrays.asarray(array.astype(np.complex128)) for array in (problem.dy, problem.w))
    dy = arrays.asarray(problem.x.astype(np.complex64))
    dx = gpuconv.conv_transpose_backward(dy, x, w, needs="dx", algorithm="implicit_gemm").dx
    expected = reference.forward(problem.x, problem.w.conj(), **problem.settings)
    np.testing.assert_array_equal(arrays.asnumpy(dx), expected)


def test_long_sums_on_tensor_cores_are_cut_into_pieces():
    """The accumulator is flushed every 4,096 terms; up to that length no registers for totals are needed.

    It is flushed every 512 terms, where splits end, if one image fills less than an eighth of the device.
    """
    half = named_dtype("float16")
    for channels, extent, terms in ((4096, 9999, 0), (4104, 9999, 4096), (4104, 99, 512), (513, 99, 512), (512, 99, 0)):
        geometry = Geometry.infer((1, channels, extent), (8, channels, 1))
        (plan, *_) = gemm_plan.plans(geometry, half, "forward", MODEL)
        assert dict(plan.module.constants)["TERMS"] == terms


def test_splits_of_weight_grad_are_short_enough_to_need_no_totals():
    """Each split has at most 4,096 terms, if the workspace can hold the sums of that many splits."""
    geometry = Geometry.infer((2, 64, 100, 100), (64, 64, 3, 3), padding=1)
    for limit, terms in ((64 << 20, 0), (64 * 64 * 9 * 4 * 3, 4096)):
        for plan in gemm_plan.plans(geometry, named_dtype("float16"), "weight_grad", MODEL, limit=limit):
            assert dict(plan.module.constants)["TERMS"] == terms
            assert (plan.length <= 4096) == (terms == 0)
            assert plan.length * plan.choice.splits >= 2 * 100 * 100


@ON_KERNELS
@pytest.mark.parametrize("precision, factor", [("ieee", 1), ("tf32x3", 2)])
@pytest.mark.parametrize("terms", [512, 4096])
def test_equal_terms_stay_within_the_bound(terms, precision, factor, arrays):
    """All roundings have the same direction."""
    x, w = np.full((1, terms, 4), 0.1, np.float32), np.full((2, terms, 1), 0.7, np.float32)
    exact = reference.forward(x.astype(float), w.astype(float), (1,), ((0, 0),), (1,))
    given = arrays.asarray(x), arrays.asarray(w)
    result = arrays.asnumpy(gpuconv.conv(*given, algorithm="implicit_gemm", precision=precision))
    assert_within(result, exact, factor * direct_bound(exact, exact, terms, "float32"))


LARGEST = np.finfo(np.float32).max
ROUNDED_TO_INFINITY = np.uint32(0x7F7FF000).view(np.float32)  # the least number that TF32 would round to Inf
SIGNALING = np.uint32(0x7F800001).view(np.float32)  # NaN whose mantissa bits are all below those of TF32


@ON_KERNELS
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, SIGNALING, LARGEST, -LARGEST, ROUNDED_TO_INFINITY])
@pytest.mark.parametrize("operand", ["x", "w"])
def test_three_products_are_infinite_where_one_is(operand, value, arrays):
    """The low part of a number that is already TF32 is 0, and 0 times Inf is NaN."""
    x, w = np.ones((1, 8, 16), np.float32), np.ones((16, 8, 1), np.float32)
    (x if operand == "x" else w)[0, 3, 0] = value
    with np.errstate(invalid="ignore"):
        expected = reference.forward(x.astype(float), w.astype(float), (1,), ((0, 0),), (1,)).astype(np.float32)
    given = arrays.asarray(x), arrays.asarray(w)
    result = arrays.asnumpy(gpuconv.conv(*given, algorithm="implicit_gemm", precision="tf32x3"))
    np.testing.assert_allclose(result, expected, rtol=1e-6)


@ON_KERNELS
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, LARGEST, -LARGEST, ROUNDED_TO_INFINITY])
def test_the_largest_numbers_are_not_rounded_to_infinity_in_tf32(value, arrays):
    """Other weights of data_grad are 0, and 0 times Inf is NaN."""
    w = np.zeros((4, 8, 3), np.float32)
    w[:, :, 1], w[0, 0, 0] = 1, value
    dy = np.full((1, 4, 16), 2.0**-100, np.float32)
    options = {"padding": 1, "algorithm": "implicit_gemm", "precision": "tf32"}
    result = arrays.asnumpy(gpuconv.conv_data_grad(arrays.asarray(dy), arrays.asarray(w), (1, 8, 16), **options))
    with np.errstate(invalid="ignore"):
        expected = reference.data_grad(dy.astype(float), w.astype(float), (1, 8, 16), (1,), ((1, 1),), (1,))
    np.testing.assert_allclose(result, expected.astype(np.float32), rtol=1e-3)


@combinations(arrays=["checked"], precision=["tf32", "tf32x3"])
def test_products_in_tf32_do_nothing_forbidden(precision, arrays):
    x, w = np.ones((1, 8, 16), np.float32), np.ones((16, 8, 1), np.float32)
    result = gpuconv.conv(x, w, algorithm="implicit_gemm", precision=precision)
    np.testing.assert_array_equal(result, np.full_like(result, 8))


@pytest.mark.parametrize("capability, taken", [(80, 3), (86, 0), (89, 0), (90, 3), (120, 0)])
def test_three_products_are_taken_where_they_are_faster(capability, taken):
    """The tensor cores of GeForce GPUs compute fewer than three times the products of the other units."""
    geometry = Geometry.infer((8, 64, 14, 14), (64, 64, 3, 3), padding=1)
    device = Device(capability, 80)
    (plan, *_) = gemm_plan.plans(geometry, named_dtype("float32"), "forward", device, "tf32x3")
    assert dict(plan.module.constants)["TENSOR_PRODUCTS"] == taken


def test_partial_sums_are_counted_with_32_bits(monkeypatch):
    """Splits of large weights could have more elements, if the workspace had room for them."""
    monkeypatch.setenv("GPUCONV_WORKSPACE_LIMIT", "64GiB")
    geometry = Geometry.infer((96, 512, 224, 224), (512, 512, 3, 3), padding=1)
    call = Call.of(geometry, "numpy", named_dtype("float16"), "implicit_gemm", None, None)
    call = call._replace(backend=launcher.EMULATED)
    plan = execute.contiguous_plan(call, "weight_grad")
    assert 0 < plan.space // 4 <= params.NARROW


def test_a_warp_meets_before_it_multiplies():
    """The lanes may diverge while copying, and PTX requires all of them for an .aligned instruction."""
    text = (kernels_folder() / "products.cuh").read_text()
    for name in ("TensorProducts", "DoubleProducts"):
        body = text[text.index(f"struct {name} ") :]
        body = body[body.index("DEVICE void add(") :]
        assert body[: body.index("multiply")].count("__syncwarp();") == 1


@ON_KERNELS
@pytest.mark.parametrize("role", ["x", "w", "out"])
def test_complex_numbers_may_lie_where_floats_do(role, arrays):
    """The address is 8 modulo 16, where the two float64 are aligned."""
    rng = np.random.default_rng(3)
    x, w = (rng.integers(-3, 4, shape) + 1j * rng.integers(-3, 4, shape) for shape in ((2, 4, 9), (8, 4, 3)))
    expected = gpuconv.conv(x, w, algorithm="direct" if arrays.name == "emulated" else "auto")
    given = {"x": x, "w": w, "out": np.zeros(expected.shape, complex)}
    for name, array in given.items():
        floats = arrays.xp.zeros(2 * array.size + 1)
        start = int(name == role)
        given[name] = floats[start : start + 2 * array.size].view(np.complex128).reshape(array.shape)
        given[name][...] = arrays.asarray(array)
    with launcher.using(mode="checked", order="natural") if arrays.name == "emulated" else contextlib.nullcontext():
        gpuconv.conv(**given, algorithm="implicit_gemm")
    np.testing.assert_array_equal(arrays.asnumpy(given["out"]), expected)


@combinations(
    arrays=BACKENDS[1:],
    kind=["float16", "float32", "tf32"],
    direction=["forward", "data_grad"],
    layout=TWO_LAYOUTS,
    where=lambda arrays, kind, **_: compiles_much(arrays) or kind == "float16",
    turns=["direction", "layout"],
)
def test_a_sample_alone_gives_the_same_bits_as_in_a_batch(direction, kind, layout, arrays):
    """Another batch size may have another tile, but the order of summation is the same."""
    dtype, precision = KINDS[kind]
    problem = Problem((32, 24, 9, 8), (40, 24, 3, 3), dtype, False, padding=1, stride=2)
    whole = problem.computed(arrays, direction, layout, precision=precision)
    x, dy = problem.x, problem.dy
    for size in (1, 2, 7):
        problem.x, problem.dy = x[:size], dy[:size]
        part = problem.computed(arrays, direction, layout, precision=precision)
        np.testing.assert_array_equal(part, whole[:size])
    for tile in [tile for name, tile in TILES if name == kind][::4]:
        with forced(tile):
            np.testing.assert_array_equal(problem.computed(arrays, direction, layout, precision=precision), whole[:7])


@combinations(
    arrays=BACKENDS[1:],
    kind_and_shape=[
        ("float16", (32, 32)),
        ("float32", (32, 32)),
        ("float32", (64, 128)),
        ("float64", (32, 32)),
        ("float64", (64, 64)),
        ("complex128", (32, 32)),
    ],
    layout=TWO_LAYOUTS,
    where=lambda arrays, kind_and_shape, layout: compiles_much(arrays) or kind_and_shape[0] == "float16",
    turns=["layout"],
)
def test_tiles_that_lack_one_row_column_and_step_are_exact(kind_and_shape, layout, arrays):
    """Groups, biases and other orders of blocks are included; writes beyond a block's part would hit another part."""
    kind, shape = kind_and_shape
    rows, columns = shape[0] - 1, shape[1] - 1
    problem = Problem((1, 2 * columns, rows), (2 * columns, columns, 1), kind, groups=2)
    x, w, b = (a.astype(kind) for a in (problem.x, problem.w, np.arange(2 * columns) % 7 - 3))
    y = problem.exact("forward") + b[:, None]
    with forced(next(tile for name, tile in TILES if name == kind and tile[:2] == shape), splits=2):
        for _ in range(2):
            for direction in DIRECTIONS:
                with arrays.varied():
                    result = problem.computed(arrays, direction, layout)
                np.testing.assert_array_equal(result, problem.exact(direction).astype(kind))
            given = (arrays.asarray(laid_out(a, layout, role)) for a, role in ((x, "x"), (w, "w")))
            with arrays.varied():
                found = gpuconv.conv(*given, arrays.asarray(b), groups=2, layout=layout, algorithm="implicit_gemm")
            np.testing.assert_array_equal(channels_first(arrays.asnumpy(found), layout), y.astype(kind))


@ON_KERNELS
@BOTH_LAYOUTS
@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_biases_are_those_of_their_columns_in_every_tile(kind, layout, arrays):
    """Groups have more filters than a tile has columns, contiguous in memory or not."""
    problem = Problem((2, 8, 5, 4), (144, 4, 3, 3), kind, groups=2, padding=1)
    x, w, b = (a.astype(kind) for a in (problem.x, problem.w, np.arange(144) % 11 - 5))
    given = [arrays.asarray(laid_out(a, layout, role)) for a, role in ((x, "x"), (w, "w"))]
    with forced(next(tile for name, tile in TILES if name == kind and tile.columns == 32)):
        y = gpuconv.conv(*given, arrays.asarray(b), **problem.settings, layout=layout, algorithm="implicit_gemm")
    expected = problem.exact("forward") + b.reshape(-1, 1, 1)
    np.testing.assert_array_equal(channels_first(arrays.asnumpy(y), layout), expected.astype(kind))


@ON_KERNELS
@BOTH_LAYOUTS
def test_each_column_has_its_bias(layout, arrays):
    """There are columns of several tiles, in groups, and vectorised stores."""
    problem = Problem((1, 2 * 40, 33), (2 * 72, 40, 1), "float32", groups=2)
    x, w, b = (a.astype(np.float32) for a in (problem.x, problem.w, np.arange(144)))
    given = (arrays.asarray(laid_out(a, layout, role)) for a, role in ((x, "x"), (w, "w")))
    with forced(next(tile for name, tile in TILES if name == "float32" and tile[:2] == (32, 32))):
        y = gpuconv.conv(*given, arrays.asarray(b), groups=2, layout=layout, algorithm="implicit_gemm")
    np.testing.assert_array_equal(channels_first(arrays.asnumpy(y), layout), problem.exact("forward") + b[:, None])


@ON_KERNELS
@BOTH_LAYOUTS
@pytest.mark.parametrize("stride, dilation", [((1, 1, 1), (2, 1, 3)), ((2, 1, 3), (1, 2, 2)), ((3, 2, 2), (2, 3, 1))])
def test_each_axis_has_its_stride_padding_and_dilation(stride, dilation, layout, arrays):
    settings = {"stride": stride, "padding": ((1, 2), (0, 3), (2, 1)), "dilation": dilation, "groups": 1}
    rng = np.random.default_rng(5)
    x, w = draw(rng, (2, 32, 7, 8, 9), "float32", True), draw(rng, (32, 32, 2, 3, 2), "float32", True)
    dy = draw(rng, reference.forward(x, w, **settings).shape, "float32", True)
    given = [
        arrays.asarray(laid_out(a.astype(np.float32), layout, role)) for a, role in ((x, "x"), (w, "w"), (dy, "x"))
    ]
    options = {**settings, "layout": layout, "algorithm": "implicit_gemm"}
    dx, dw, _ = gpuconv.conv_backward(given[2], *given[:2], **options)
    for result, exact, role in (
        (gpuconv.conv(*given[:2], **options), reference.forward(x, w, **settings), "x"),
        (dx, reference.data_grad(dy, w, x.shape, **settings), "x"),
        (dw, reference.weight_grad(dy, x, w.shape, **settings), "w"),
    ):
        np.testing.assert_array_equal(channels_first(arrays.asnumpy(result), layout, role), exact)


@ON_KERNELS
@pytest.mark.parametrize(
    "dtype, value",
    [
        ("float16", np.inf),
        ("float32", np.inf),
        ("complex64", np.inf),
        ("complex64", complex(0, np.inf)),
        ("complex64", complex(-np.inf, 0)),
    ],
)
@pytest.mark.parametrize(
    "places", [[(5, 7, 0, 2)], [(5, 7, 0, 0), (23, 39, 2, 2)], [...]], ids=["one", "two", "everywhere"]
)
def test_infinite_weights_meet_no_zeros_beyond_dy(dtype, value, places, arrays):
    """A tile with a NaN is recomputed if weights are infinite, and only then."""
    for stride in (1, 2):
        problem = Problem((2, 40, 9, 8), (24, 40, 3, 3), dtype, padding=1, stride=stride)
        for place in places:
            problem.w[place] = value
        if not np.iscomplexobj(problem.dy):
            problem.dy = abs(problem.dy) + 1  # products and sums of infinities are never NaN
        problem.dy[1, 3, 1, 1] = np.nan
        with np.errstate(invalid="ignore"):
            expected = problem.exact("data_grad").astype(named_dtype(dtype))
            for layout in ("channels_first", "channels_last"):
                result = problem.computed(arrays, "data_grad", layout)
                np.testing.assert_array_equal(np.isnan(result), np.isnan(expected))
                np.testing.assert_array_equal(result[~np.isnan(expected)], expected[~np.isnan(expected)])


@pytest.mark.parametrize("arrays", [pytest.param("checked", marks=pytest.mark.checked)], indirect=True)
def test_weights_are_looked_at_within_their_bounds(arrays):
    """A NaN in dy causes the inspection of the weights; infinite weights cause recomputation of the sums."""
    problem = Problem((1, 8, 5, 5), (8, 8, 3, 3), "float32", padding=1)
    problem.w[3, 5, 0, 2], problem.dy[0, 3, 1, 1] = np.inf, np.nan
    with np.errstate(invalid="ignore"):
        expected = problem.exact("data_grad")
    np.testing.assert_array_equal(problem.computed(arrays, "data_grad"), expected.astype(np.float32))


@ON_KERNELS
def test_splits_of_groups_are_kept_apart(arrays):
    problem = Problem((3, 16, 9, 8), (16, 8, 3, 3), "float32", padding=1, groups=2)
    with forced(next(tile for name, tile in TILES if name == "float32" and tile[:2] == (32, 32)), splits=3):
        result = problem.computed(arrays, "weight_grad")
    np.testing.assert_array_equal(result, problem.exact("weight_grad").astype(np.float32))


@ON_KERNELS
@pytest.mark.parametrize(
    "extent, stride",
    [((1, 5), (3, 2)), ((5, 1), (2, 3)), ((1, 2, 7), (2, 3, 3)), ((2,), (5,)), ((5, 3), (2, 2)), ((5, 3), (2, 5))],
)
def test_inputs_fewer_than_the_stride_are_all_written(extent, stride, arrays):
    rank, rng = len(extent), np.random.default_rng(3)
    settings = {"stride": stride, "padding": ((1, 2),) * rank, "dilation": (2, 1, 1)[:rank], "groups": 1}
    x, w = draw(rng, (2, 40, *extent), "float32", True), draw(rng, (24, 40, *(2,) * rank), "float32", True)
    y = reference.forward(x, w, **settings)
    found = gpuconv.conv_data_grad(
        *(arrays.asarray(a.astype(np.float32)) for a in (y, w)), x.shape, algorithm="implicit_gemm", **settings
    )
    np.testing.assert_array_equal(arrays.asnumpy(found), reference.data_grad(y, w, x.shape, **settings))


@ON_KERNELS
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_gradients_of_a_transposed_convolution_are_conjugated_and_activated_right(dtype, arrays):
    """forward and weight_grad then read what data_grad and weight_grad otherwise read as their first operand."""
    rng, settings = np.random.default_rng(4), {"stride": 2, "padding": 1}
    x, w = draw(rng, (2, 40, 5, 4), dtype, True).astype(dtype), draw(rng, (40, 24, 3, 3), dtype, True).astype(dtype)
    activation = "relu" if dtype == "float32" else None
    y = gpuconv.conv_transpose(x, w, activation=activation, algorithm="im2col", **settings)
    dy = draw(rng, y.shape, dtype, True).astype(dtype)
    expected = gpuconv.conv_transpose_backward(dy, x, w, activation=activation, y=y, algorithm="im2col", **settings)
    found = gpuconv.conv_transpose_backward(
        *map(arrays.asarray, (dy, x, w)),
        activation=activation,
        y=arrays.asarray(y),
        algorithm="implicit_gemm",
        **settings,
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(arrays.asnumpy(one), other)


@combinations(
    arrays=BACKENDS[1:],
    activation=["relu", "leaky_relu", "sigmoid", "tanh"],
    dtype=["float16", "float32"],
    where=lambda arrays, activation, dtype: (
        compiles_much(arrays) or (activation, dtype) in (("relu", "float16"), ("sigmoid", "float32"))
    ),
)
def test_derivatives_are_multiplied_in_as_operands_are_read(dtype, activation, arrays):
    """In half precision on tensor cores this requires that the product with the derivative is exact."""
    problem = Problem((2, 8, 7, 6), (16, 8, 3, 3), dtype, False, padding=1)
    x, w = (a.astype(dtype) for a in (problem.x, problem.w))
    y = gpuconv.conv(x, w, padding=1, activation=activation, algorithm="im2col")
    dy = draw(np.random.default_rng(1), y.shape, dtype, False).astype(dtype)
    expected = gpuconv.conv_backward(
        *(a.astype(float) for a in (dy, x, w)), padding=1, activation=activation, y=y.astype(float), algorithm="im2col"
    )
    with planned() as constants:
        found = gpuconv.conv_backward(
            *map(arrays.asarray, (dy, x, w)),
            padding=1,
            activation=activation,
            y=arrays.asarray(y),
            algorithm="implicit_gemm",
        )
    on_tensor_cores = dtype == "float16" and activation == "relu"
    assert {c["TENSOR_PRODUCTS"] for c in constants} == {int(on_tensor_cores)}
    problem.dy = dy.astype(float)
    for name, direction in (("dx", "data_grad"), ("dw", "weight_grad")):
        exact, terms = getattr(expected, name), problem.geometry.reduction_length(direction)
        bound = direct_bound(exact, problem.exact(direction, magnitudes=True), terms, dtype)
        assert_within(arrays.asnumpy(getattr(found, name)), exact, bound)  # no derivative here exceeds 1


@ON_KERNELS
@pytest.mark.parametrize("shape", [(2, 8, 16), (2, 8, 5, 6), (1, 8, 4, 5, 3)])
def test_transposed_convolution_adds_bias_and_activates(shape, arrays):
    """At positions that no tap reaches, the result is the activation of the bias."""
    rank = len(shape) - 2
    rng = np.random.default_rng(3)
    x, w, b = (draw(rng, s, "float32", True).astype(np.float32) for s in (shape, (8, 12, *(2,) * rank), (12,)))
    settings = {"stride": 3, "padding": 1, "output_padding": 1, "activation": "leaky_relu"}
    expected = gpuconv.conv_transpose(x, w, b, **settings, algorithm="im2col")
    result = gpuconv.conv_transpose(*map(arrays.asarray, (x, w, b)), **settings, algorithm="implicit_gemm")
    np.testing.assert_array_equal(arrays.asnumpy(result), expected)


@combinations(
    arrays=BACKENDS[1:],
    dtype=["float16", "float32"],
    where=lambda arrays, dtype: compiles_much(arrays) or dtype == "float16",
)
def test_any_strides_and_alignment_are_read_and_written_as_they_lie(dtype, arrays):
    """Views of larger arrays, reversed, strided and broadcast; copied in chunks only if all of them are aligned."""
    problem = Problem((2, 16, 8, 8), (16, 16, 3, 3), dtype, padding=1)
    x, w = (arrays.asarray(a.astype(dtype)) for a in (problem.x, problem.w))
    expected = problem.exact("forward").astype(dtype)
    xp = arrays.xp

    def inside(a, room):
        larger = xp.zeros((*a.shape[:-1], a.shape[-1] + room), dtype)
        view = larger[..., 1 : 1 + a.shape[-1]]
        view[...] = a
        return view

    last = laid_out(problem.x.astype(dtype), "channels_last"), laid_out(problem.w.astype(dtype), "channels_last", "w")
    last = tuple(map(arrays.asarray, last))
    for layout, views in {
        "channels_first": (inside(x, 7), inside(w, 1), x[:, :, ::-1][:, :, ::-1], xp.repeat(x, 2, 3)[..., ::2]),
        "channels_last": (inside(last[0], 7), inside(last[1], 8), inside(last[0], 8), last[0]),
    }.items():
        for view in views:
            is_w = (
                view.shape == (w.shape if layout == "channels_first" else last[1].shape)
                and view.ndim == 4
                and view.shape[0] != 2
            )
            pair = (x, w) if layout == "channels_first" else last
            given = (pair[0], view) if is_w else (view, pair[1])
            result = gpuconv.conv(*given, padding=1, layout=layout, algorithm="implicit_gemm")
            np.testing.assert_array_equal(channels_first(arrays.asnumpy(result), layout), expected)
            out = inside(result, 3)
            out[...] = 0
            gpuconv.conv(*given, padding=1, layout=layout, algorithm="implicit_gemm", out=out)
            np.testing.assert_array_equal(channels_first(arrays.asnumpy(out), layout), expected)


@ON_KERNELS
def test_unmerged_batch_axes_add_up_in_the_weights(arrays):
    """Batch axes that cannot be merged are processed in separate launches, whose sums are accumulated."""
    rng = np.random.default_rng(5)
    x, dy = (draw(rng, shape, "float32", True).astype(np.float32) for shape in ((2, 3, 2, 4, 9), (2, 3, 2, 5, 7)))
    w_shape = (5, 4, 3)
    expected = gpuconv.conv_weight_grad(dy, x, w_shape, algorithm="im2col")
    swapped = [arrays.asarray(np.ascontiguousarray(a.swapaxes(0, 2))).swapaxes(0, 2) for a in (dy, x)]
    execute.clear()
    with mock.patch.object(implicit_gemm, "_add_outputs", wraps=implicit_gemm._add_outputs) as added:
        result = gpuconv.conv_weight_grad(*swapped, w_shape, algorithm="implicit_gemm")
    assert added.call_count > 1
    np.testing.assert_array_equal(arrays.asnumpy(result), expected)


# ------------------------------------------------------------------------------------------------- launches


@pytest.mark.called_once("it counts launches")
@EMULATED
@pytest.mark.parametrize("groups, stride, extent", [(1, 1, (9,)), (4, 2, (9, 8)), (8, 3, (7, 6, 5))])
def test_groups_phases_and_ranks_take_one_launch(groups, stride, extent, arrays):
    """weight_grad takes two launches: its splits, and their sum. So do the others if they have splits."""
    rank = len(extent)
    problem = Problem((2, 8, *extent), (16, 8 // groups, *(3,) * rank), "float32", stride=stride, groups=groups)
    for direction in DIRECTIONS:
        with launcher.using() as launches:
            problem.computed(arrays, direction)
        sums = ["split_sum"] * (direction == "weight_grad")
        assert [launch.name for launch in launches] == [f"implicit_gemm_{direction}", *sums]


@pytest.mark.called_once("it counts launches")
@EMULATED
@pytest.mark.parametrize("limit", ["1728", "100KiB", "1MiB", "64MiB"])
def test_the_sums_of_splits_stay_within_the_workspace(limit, arrays, monkeypatch):
    """Filters are computed in chunks if even one split and the totals exceed the workspace."""
    monkeypatch.setenv("GPUCONV_WORKSPACE_LIMIT", limit)
    problem = Problem((4, 24, 20, 20), (40, 24, 3, 3), "float32", padding=1)
    execute.clear()
    with launcher.using() as launches:
        result = problem.computed(arrays, "weight_grad")
    (plan,) = execute._plans.values()
    np.testing.assert_array_equal(result, problem.exact("weight_grad").astype(np.float32))
    assert 0 < plan.space <= gpuconv.settings.workspace_limit() + 2 * 64  # two arrays are aligned to 64
    assert len(launches) == 2 * {"1728": 40, "100KiB": 1, "1MiB": 1, "64MiB": 1}[limit]


@EMULATED
@BOTH_LAYOUTS
@pytest.mark.parametrize("direction", ["forward", "data_grad"])
def test_threads_that_have_no_line_load_nothing(direction, layout, arrays):
    """A tile of 16 columns has fewer lines than threads."""
    problem = Problem((1, 16, 9, 8), (16, 16, 3, 3), "float16", padding=1)
    with forced(next(tile for _, tile in TILES if tile[:2] == (128, 16))), launcher.using(mode="checked"):
        result = problem.computed(arrays, direction, layout)
    np.testing.assert_array_equal(result, problem.exact(direction).astype(np.float16))


@combinations(
    arrays=["emulated"],
    kind=KINDS,
    direction=DIRECTIONS,
    sizes=SIZES,
    layout=TWO_LAYOUTS,
    turns=["direction", "sizes", "layout"],
)
def test_inner_loops_meet_no_bank_conflicts(kind, direction, sizes, layout, arrays):
    """No access of the main loop has bank conflicts, except one warp's writes of the coordinates of the next steps."""
    dtype, precision = KINDS[kind]
    few, more, *_ = SIZES[sizes]
    many = 64 + more
    channels, filters = (many, few) if direction == "data_grad" else (few, many)
    problem = Problem((1, channels, 8, 8 - few % 2), (filters, channels, 3, 3), dtype, padding=1)
    tile = [tile for name, tile in TILES if name == kind][-2:][0]
    with forced(tile), launcher.using(mode="checked", profiled=True) as launches:
        problem.computed(arrays, direction, layout, precision=precision)
    lines = (kernels_folder() / "implicit_gemm.cu").read_text().splitlines()
    first, last = (
        next(i for i, text in enumerate(lines, 1) if words in text) for words in ("i < iterations", "_commit")
    )
    found = collections.Counter()
    for access in launches[0].accesses:
        file, _, number = access.line.partition(":")
        if access.memory == "shared" and file == "implicit_gemm.cu" and first <= int(number) <= last:
            found[access.kind] += access.requests
            assert access.cost == access.least, f"{access}: {lines[int(number) - 1]}"
    assert found["read"] > 100
    assert found["write"] > 10


@EMULATED
@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_without_tensor_cores_halves_are_added_up_in_float32(direction, dtype, arrays):
    """This is the case on sm_75, which lacks tensor cores for some dtypes, and asynchronous copies."""
    problem = Problem((2, 16, 6, 6), (16, 16, 3, 3), dtype, False, padding=1)
    turing = arrays.backend._replace(device=lambda: TURING)
    with mock.patch.object(gpuconv.execute, "backend_for", return_value=turing), planned() as constants:
        result = problem.computed(arrays, direction)
    assert [(c["TENSOR_PRODUCTS"], c["STAGES"]) for c in constants] == [(0, 2)]
    assert_within(result, problem.exact(direction), problem.bound(direction))


# ------------------------------------------------------------------------------------------------- on a GPU


def all_directions(x, w, dy):
    options = {"padding": 1, "algorithm": "implicit_gemm"}
    return [
        gpuconv.conv(x, w, **options),
        gpuconv.conv_data_grad(dy, w, x.shape, **options),
        gpuconv.conv_weight_grad(dy, x, w.shape, **options),
    ]


@pytest.mark.gpu
@pytest.mark.called_once("what is recorded may not wait")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_calls_are_recorded_in_a_graph_after_a_warm_one(dtype):
    import cupy

    problem = Problem((2, 16, 9, 8), (24, 16, 3, 3), dtype, padding=1)
    x, w, dy = (cupy.asarray(a.astype(dtype)) for a in (problem.x, problem.w, problem.dy))
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.get_current_stream().synchronize()
    with stream:
        all_directions(x, w, dy)
        stream.begin_capture()
        results = all_directions(x, w, dy)
        graph = stream.end_capture()
        x *= -1  # the graph reads the current contents at each launch
        graph.launch(stream)
        stream.synchronize()
    problem.x = -problem.x
    for direction, result in zip(DIRECTIONS, results, strict=True):
        np.testing.assert_array_equal(cupy.asnumpy(result), problem.exact(direction).astype(dtype))


@pytest.mark.gpu
def test_threads_with_streams_of_their_own_do_not_meet():
    import cupy

    def work(seed):
        problem = Problem((2, 16 + seed, 9, 8), (24, 16 + seed, 3, 3), "float32", padding=1, seed=seed)
        with cupy.cuda.Stream(non_blocking=True) as stream:
            given = [cupy.asarray(a.astype(np.float32)) for a in (problem.x, problem.w, problem.dy)]
            for _ in range(20):
                results = all_directions(*given)
            stream.synchronize()
            for direction, result in zip(DIRECTIONS, results, strict=True):
                np.testing.assert_array_equal(cupy.asnumpy(result), problem.exact(direction))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
