"""Plans: they are made once, their cache keys are complete, they do not depend on data, and they run safely."""

import contextlib
import itertools
import os
import sys
import threading
import tracemalloc
from unittest import mock

import numpy as np
import pytest

import gpuconv
from gpuconv import dtypes, execute, plan, workspace
from gpuconv.cpu import compiled
from gpuconv.geometry import Geometry
from tests import reference
from tests.backends import BACKENDS, on
from tests.cases import DIRECTIONS, channels_first, draw, laid_out, named_dtype
from tests.emulation import launcher
from tests.tiers import combinations

pytestmark = pytest.mark.called_once("it repeats calls itself")

ON_KERNELS = on("emulated", "cupy")
EMULATED = on("emulated")
X, W, Y = (2, 8, 7, 6), (16, 8, 3, 3), (2, 16, 7, 6)
PADDED = {"stride": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1)}


@pytest.fixture(autouse=True)
def _no_plans():
    gpuconv.clear_cache()
    yield
    gpuconv.clear_cache()


@contextlib.contextmanager
def no_plan_is_made():
    def made(description):
        raise AssertionError(f"a plan was made for {description}")

    with mock.patch.object(execute, "_made", made):
        yield


def computed(direction, x, w, dy, **options):
    if direction == "forward":
        return gpuconv.conv(x, w, **options)
    if direction == "data_grad":
        return gpuconv.conv_data_grad(dy, w, x.shape, **options)
    return gpuconv.conv_weight_grad(dy, x, w.shape, **options)


def exact(direction, x, w, dy, **settings):
    wide = [array.astype(complex if array.dtype.kind == "c" else float) for array in (x, w, dy)]
    settings = {**PADDED, **settings}
    if direction == "forward":
        return reference.forward(*wide[:2], **settings)
    if direction == "data_grad":
        return reference.data_grad(wide[2], wide[1], x.shape, **settings)
    return reference.weight_grad(wide[2], wide[0], w.shape, **settings)


def whole_numbers(rng, shapes=(X, W, Y), dtype="float32"):
    return [draw(rng, shape, dtype, True).astype(named_dtype(dtype)) for shape in shapes]


# ------------------------------------------------------------------------------------------------- made once


@pytest.mark.parametrize("direction, steps", [("forward", 4), ("data_grad", 6), ("weight_grad", 4)])
def test_a_small_call_is_a_handful_of_steps(direction, steps, rng):
    """The steps are zeros, the copy of x, the windows, and the product; data_grad also inspects w and rotates it."""
    arrays = whole_numbers(rng, ((1, 8, 16, 14), (8, 8, 3, 3), (1, 8, 16, 14)))
    computed(direction, *arrays, padding=1, algorithm="im2col")
    (made,) = execute._plans.values()
    assert made.size == steps
    assert len(repr(made).splitlines()) == 1 + steps + 2 * (direction == "data_grad")


def test_a_plan_prints_as_its_steps():
    text = repr(gpuconv.explain((2, 3, 9), (4, 3, 3), padding=1, backend="numpy", algorithm="im2col").plan)
    heading, *steps = text.splitlines()
    assert heading.startswith("im2col, 5 steps, ")
    assert [step.partition("(")[0].strip() for step in steps] == ["copyto", "copyto", "copyto", "matmul", "copyto"]
    assert steps[1].endswith("x@0 (2, 9, 1, 3), unsafe)")
    assert steps[3].startswith("  matmul(w@0 (1, 4, 9), workspace@")
    assert steps[4].startswith("  copyto(y@0 (2, 9, 1, 4), workspace@")
    winograd = repr(gpuconv.explain((2, 64, 56, 56), (64, 64, 3, 3), padding=1, backend="numpy").plan)
    assert "\n  if all(workspace@0 (2,)):\n  else:\n    steps that are planned when they are executed" in winograd


@combinations(
    arrays=BACKENDS,
    direction=DIRECTIONS,
    dtype=["float16", "float32"],
    layout=["channels_first", "channels_last", "channels_last_memory"],
    turns=["dtype", "layout"],
)
def test_later_calls_make_no_plan(direction, dtype, layout, arrays, rng):
    options = {"padding": 1, "layout": "channels_last" if layout == "channels_last" else "channels_first"}
    options["algorithm"] = "im2col" if arrays.name == "numpy" else "implicit_gemm"
    for number in range(3):
        given = whole_numbers(rng, dtype=dtype)
        lying = [arrays.asarray(laid_out(a, layout, role)) for a, role in zip(given, "xwx", strict=True)]
        x, w, dy = lying
        with no_plan_is_made() if number else contextlib.nullcontext():
            if direction == "forward":
                result = gpuconv.conv(x, w, **options)
            elif direction == "data_grad":
                result = gpuconv.conv_data_grad(dy, w, x.shape, **options)
            else:
                result = gpuconv.conv_weight_grad(dy, x, w.shape, **options)
        role = "w" if direction == "weight_grad" else "x"
        np.testing.assert_array_equal(
            channels_first(arrays.asnumpy(result), layout, role), exact(direction, *given).astype(result.dtype)
        )


@EMULATED
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_launch_is_a_step(direction, arrays, rng):
    launched = []
    for _ in range(2):
        with launcher.using() as launches:
            computed(direction, *whole_numbers(rng), padding=1, algorithm="implicit_gemm")
        launched.append([(launch.name, launch.grid) for launch in launches])
    assert launched[0] == launched[1]
    (made,) = execute._plans.values()
    assert made.size == len(launched[0]) == (2 if direction == "weight_grad" else 1)


# ------------------------------------------------------------------------------------------------- found by


def _unaligned(array):
    memory = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    memory[...] = array
    return memory


def _read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def _with_gaps(array):
    larger = np.full((*array.shape[:-1], 2 * array.shape[-1]), 7, array.dtype)
    larger[..., ::2] = array
    return larger[..., ::2]


ROUNDED = 1 + 2.0**-12  # not representable in TF32
# Arrays with the values of x and other memory layouts or dtypes.
LYING = {
    "as it is": np.ascontiguousarray,
    "Fortran order": np.asfortranarray,
    "gaps": _with_gaps,
    "backwards": lambda array: np.ascontiguousarray(array[..., ::-1])[..., ::-1],
    "channels innermost": lambda array: laid_out(array, "channels_last_memory"),
    "unaligned": _unaligned,
    "the other byte order": lambda array: array.astype(array.dtype.newbyteorder()),
    "read-only": _read_only,
    "a slice of a larger array": lambda array: np.pad(array, 1)[(slice(1, -1),) * array.ndim],
    "one image for all": lambda array: np.broadcast_to(array[:1], array.shape),
    "float64": lambda array: array.astype(np.float64),
    "float16": lambda array: array.astype(np.float16),
    "complex64": lambda array: (array * (1 - 2j)).astype(np.complex64),
}


@on("numpy", "emulated")
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_plan_runs_on_arrays_that_lie_otherwise(direction, arrays, rng):
    """Every pair is tested in both orders, for the first operand and the second."""
    makers = [*LYING.values()]
    algorithm = "im2col" if arrays.name == "numpy" else "implicit_gemm"
    for first, second in itertools.combinations(makers, 2):
        for make in (first, second, first):
            x, w, dy = whole_numbers(rng)
            if direction == "data_grad":
                dy = make(dy)
            else:
                x = make(x)
            result = computed(direction, x, w, dy, padding=1, algorithm=algorithm)
            np.testing.assert_array_equal(result, exact(direction, x, w, dy))
    assert len(execute._plans) <= 2 * len(makers)


@on("numpy", "emulated")
def test_no_plan_runs_for_another_call(arrays, rng, monkeypatch):
    """The variants: flags, activation, conjugation, layout, out, bias, limit, threads, determinism, algorithm."""
    square, kernel = (2, 8, 8, 8), (8, 8, 3, 3)  # valid in both layouts, and for all directions

    def variants(x, w, dy):
        b = np.arange(8, dtype=x.dtype)
        z = exact("forward", x, w, dy)
        out = np.empty(square, x.dtype)
        forward = {"padding": 1}
        yield gpuconv.conv(x, w, **forward), z
        yield gpuconv.conv(x, w, flip=True, **forward), exact("forward", x, w[:, :, ::-1, ::-1], dy)
        yield gpuconv.conv(x, w, b, **forward), z + b[:, None, None]
        yield gpuconv.conv(x, w, b[::-1], **forward), z + b[::-1, None, None]
        yield gpuconv.conv(x, w, out=out, **forward), z
        yield gpuconv.conv(x, w, out=out.transpose(0, 1, 3, 2), **forward), z
        yield gpuconv.conv(x, x[:, :, :3, :3].reshape(2, 8, 3, 3), **forward), exact("forward", x, x[:, :, :3, :3], dy)
        if x.dtype.kind != "c":
            yield gpuconv.conv(x, w, activation="relu", **forward), np.maximum(z, 0)
            dx, dw, db = gpuconv.conv_backward(dy, x, w, activation="relu", y=dy, **forward)
            through = np.maximum(dy, 0)
            yield dx, exact("data_grad", x, w, through)
            yield dw, exact("weight_grad", x, w, through)
            yield db, through.sum((0, 2, 3))
            yield gpuconv.conv_backward(dy, x, w, needs="db", padding=1).db, dy.sum((0, 2, 3))
        yield gpuconv.conv_data_grad(dy, w, square, **forward), exact("data_grad", x, w, dy)
        yield gpuconv.conv_transpose(dy, w, **forward), exact("data_grad", x, w.conj(), dy)
        last = gpuconv.conv(x, w.transpose(2, 3, 1, 0), layout="channels_last", **forward)
        yield last, channels_first_of(x, w)
        for name, value in (
            ("GPUCONV_WORKSPACE_LIMIT", "3000"),
            ("GPUCONV_WORKSPACE_LIMIT", "0"),
            ("GPUCONV_NUM_THREADS", "1"),
            ("GPUCONV_NUM_THREADS", "3"),
            ("GPUCONV_DETERMINISTIC", "0"),
            ("GPUCONV_PRECISION", "tf32"),
        ):
            monkeypatch.setenv(name, value)
            yield gpuconv.conv(x, w, **forward), z
            monkeypatch.delenv(name)
        for algorithm in gpuconv.ALGORITHMS:
            with contextlib.suppress(ValueError):  # the variant is not supported
                yield np.rint(gpuconv.conv(x, w, algorithm=algorithm, **forward)), z

    def channels_first_of(x, w):
        seen = exact("forward", np.moveaxis(x, -1, 1), w, np.moveaxis(x, -1, 1))
        return np.moveaxis(seen, 1, -1)

    for order in (1, -1, 1):
        for dtype in ("float32", "complex64")[::order]:
            x, w, dy = whole_numbers(rng, (square, kernel, square), dtype)
            for number, (result, expected) in enumerate(variants(x, w, dy)):
                assert result.dtype == x.dtype
                np.testing.assert_array_equal(result, expected, err_msg=f"variant {number} of {dtype}")
        gpuconv.clear_cache() if order == -1 else None


@EMULATED
def test_products_are_as_precise_as_now_asked_for(arrays, monkeypatch):
    x, w = np.full(X, ROUNDED, np.float32), np.ones(W, np.float32)
    first = gpuconv.conv(x, w, padding=1, algorithm="implicit_gemm")
    monkeypatch.setenv("GPUCONV_PRECISION", "tf32")
    assert (gpuconv.conv(x, w, padding=1, algorithm="implicit_gemm") < first).all()
    monkeypatch.setenv("GPUCONV_PRECISION", "tf64")
    with pytest.raises(ValueError, match="GPUCONV_PRECISION must be one of"):
        gpuconv.conv(x, w, padding=1, algorithm="implicit_gemm")
    monkeypatch.delenv("GPUCONV_PRECISION")
    np.testing.assert_array_equal(gpuconv.conv(x, w, padding=1, algorithm="implicit_gemm"), first)


@pytest.mark.gpu
def test_each_device_has_plans_of_its_own(rng):
    """Kernels are loaded once per device, and run on the device of the arrays, independently of the current device."""
    import cupy

    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("there is one device")
    for device in (0, 1, 0):
        x, w, _ = whole_numbers(rng)
        with cupy.cuda.Device(device):
            given = cupy.asarray(x), cupy.asarray(w)
        y = gpuconv.conv(*given, padding=1, algorithm="implicit_gemm")
        assert y.device.id == device
        np.testing.assert_array_equal(y.get(), exact("forward", x, w, np.empty(y.shape)))
    assert len(execute._plans) == 2


@EMULATED
def test_sources_are_written_from_now_on(arrays, rng, monkeypatch, tmp_path):
    for folder in (None, tmp_path):
        if folder:
            monkeypatch.setenv("GPUCONV_DUMP", str(folder))
        computed("forward", *whole_numbers(rng), padding=1, algorithm="implicit_gemm")
    assert len(list(tmp_path.glob("implicit_gemm-*.cu"))) == 1


@EMULATED
def test_an_out_that_no_kernel_can_write_is_filled_by_a_copy(arrays, rng):
    for _ in range(3):
        x, w, dy = whole_numbers(rng)
        out = _unaligned(np.zeros(Y, np.float32))
        with launcher.using(mode="checked"):  # it checks the alignment of every store
            assert gpuconv.conv(x, w, padding=1, algorithm="implicit_gemm", out=out) is out
        np.testing.assert_array_equal(out, exact("forward", x, w, dy))


# ------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("algorithm", ["im2col", "winograd", "fft", "depthwise"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_data_decide_is_decided_by_every_call(direction, algorithm, rng):
    """NaN and Inf use a fallback, which is reported; it does not affect the next call."""
    groups = 8 if algorithm == "depthwise" else 1
    shapes = (2, 8, 12, 12), (8, 8 // groups, 3, 3), (2, 8, 12, 12)
    for value in (1.0, np.nan, 2.0, np.inf, 3.0):
        x, w, dy = whole_numbers(rng, shapes)
        holds_it = w if direction == "data_grad" and algorithm in ("im2col", "depthwise") else x
        (dy if direction == "data_grad" and holds_it is x else holds_it)[0, 0, 0, 0] = value
        with np.errstate(invalid="ignore", over="raise"):
            before = np.geterr()
            results = [
                computed(direction, x, w, dy, padding=1, groups=groups, algorithm=name)
                for name in (algorithm, "scatter")
            ]
            assert np.geterr() == before
        places = [np.isfinite(result) for result in results]
        np.testing.assert_array_equal(*places)
        assert places[0].all() == np.isfinite(value)
        np.testing.assert_allclose(*(result[places[0]] for result in results), atol=1e-4 * 72)


def test_numbers_that_are_none_are_reported_by_the_fallback(rng):
    x, w, _ = whole_numbers(rng, ((2, 8, 12, 12), (8, 8, 3, 3), Y))
    x[0, 0, 0, 0], x[0, 0, 0, 1] = np.inf, -np.inf
    for _ in range(3):
        with np.errstate(invalid="raise"), pytest.raises(FloatingPointError):
            gpuconv.conv(x, w, padding=1, algorithm="winograd")
        assert np.geterr()["invalid"] != "raise"


# ------------------------------------------------------------------------------------------------- how it runs


def frames_at(function):
    """Return a wrapper of a function, and the list of the numbers of gpuconv's frames on the stack of each call."""
    depths = []

    def counting(*arguments, **options):
        frame, depth = sys._getframe(1), 0
        while frame is not None:
            depth += frame.f_globals["__name__"].partition(".")[0] == "gpuconv"
            frame = frame.f_back
        depths.append(depth)
        return function(*arguments, **options)

    return counting, depths


@pytest.mark.parametrize("limit", ["64MiB", "200KiB"])
@pytest.mark.parametrize(
    "shapes, options",
    [
        (((1, 8, 16, 16), (8, 8, 3, 3)), {}),
        (((8, 64, 28, 28), (64, 64, 3, 3)), {"algorithm": "winograd"}),
        (((8, 64, 28, 28), (64, 64, 3, 3)), {"algorithm": "im2col"}),
        (((4, 32, 28, 28), (32, 1, 5, 5)), {"algorithm": "depthwise", "groups": 32}),
        (((4, 16, 28, 28), (16, 16, 3, 3)), {"algorithm": "scatter"}),
        (((4, 3, 64, 64), (16, 3, 7, 7)), {"algorithm": "im2col"}),
    ],
)
def test_few_frames_are_alive_at_a_matrix_product(shapes, options, limit, rng, monkeypatch):
    """There are at most five, in first and later calls, in every thread, and in loops planned during execution."""
    monkeypatch.setenv("GPUCONV_NUM_THREADS", "2")
    monkeypatch.setenv("GPUCONV_WORKSPACE_LIMIT", limit)
    monkeypatch.setattr(compiled, "version", lambda: None)  # with Numba, depthwise has no products
    gpuconv.clear_cache()
    counting, depths = frames_at(np.matmul)
    x, w = whole_numbers(rng, shapes)
    padding = w.shape[-1] // 2
    dy = np.ones((x.shape[0], w.shape[0], *x.shape[2:]), np.float32)
    with mock.patch.object(np, "matmul", counting):
        for direction, _ in itertools.product(DIRECTIONS, range(3)):
            with contextlib.suppress(ValueError):  # the limit may be too small
                computed(direction, x, w, dy, padding=padding, **options)
            assert depths or limit != "64MiB", direction
            assert all(2 <= depth <= 5 for depth in depths), direction
            depths.clear()
    gpuconv.clear_cache()


@EMULATED
def test_few_frames_are_alive_at_a_launch(arrays, rng):
    counting, depths = frames_at(launcher._launch)
    with mock.patch.object(launcher, "_launch", counting):
        for direction, _ in itertools.product(DIRECTIONS, range(2)):
            computed(direction, *whole_numbers(rng), padding=1, algorithm="implicit_gemm")
    assert set(depths) == {3}


LAYERS = {
    "winograd": ((4, 64, 32, 32), (64, 64, 3, 3), {"algorithm": "winograd", "padding": 1}),
    "im2col": ((4, 64, 32, 32), (64, 64, 3, 3), {"algorithm": "im2col", "padding": 1}),
    "scatter": ((8, 32, 32, 32), (32, 32, 3, 3), {"algorithm": "scatter", "stride": 2}),
    "depthwise": ((8, 96, 28, 28), (96, 1, 5, 5), {"algorithm": "depthwise", "groups": 96}),
    "stem": ((16, 3, 64, 64), (32, 3, 7, 7), {"algorithm": "im2col", "stride": 2}),
    "1x1": ((8, 256, 7, 7), (256, 256, 1, 1), {"algorithm": "im2col"}),
    "patches": ((4, 128, 32, 32), (64, 128, 2, 2), {"algorithm": "im2col", "stride": 2}),
    "fft": ((2, 4, 500), (4, 4, 90), {"algorithm": "fft"}),
}


@pytest.mark.usefixtures("small_in_threads")
@combinations(layer=LAYERS, direction=DIRECTIONS, layout=["channels_first", "channels_last"], turns=["layout"])
def test_plans_of_any_size_give_the_same_bits(layer, direction, layout, monkeypatch, rng):
    """Loops may be stored in the plan or planned by every call, and there may be any number of threads."""
    x_shape, w_shape, options = LAYERS[layer]
    y_shape = Geometry.infer(x_shape, w_shape, **{k: v for k, v in options.items() if k != "algorithm"}).y_shape
    arrays = [rng.standard_normal(shape, dtype=np.float32) for shape in (x_shape, w_shape, y_shape)]
    lying = [laid_out(array, layout, role) for array, role in zip(arrays, "xwx", strict=True)]
    bits = []
    for threads, most in (("1", 1 << 13), ("3", 1 << 13), ("2", 20), ("2", 0)):
        monkeypatch.setenv("GPUCONV_NUM_THREADS", threads)
        monkeypatch.setattr(execute, "MOST_STEPS", most)
        gpuconv.clear_cache()
        for _ in range(2):
            bits.append(computed(direction, *lying, layout=layout, **options).tobytes())
        (made,) = execute._plans.values()
        assert made.size <= most + 8
    assert len(set(bits)) == 1
    assert not workspace._in_graphs  # no graph uses the memory of steps that were planned later


# ------------------------------------------------------------------------------------------------- how much is kept


def test_the_plan_of_a_call_keeps_within_its_limit(monkeypatch, rng):
    """The limit is on workspace and steps, at less than a KiB each; long loops are planned during execution."""
    x, w, _ = whole_numbers(rng, ((2, 8, 40, 40), (8, 8, 3, 3), Y))
    for limit in (0, 20_000, 100_000, 10**6, 64 << 20):
        monkeypatch.setenv("GPUCONV_WORKSPACE_LIMIT", str(limit))
        y = gpuconv.conv(x, w, padding=1, algorithm="im2col")
        np.testing.assert_array_equal(y, exact("forward", x, w, y))
        made = list(execute._plans.values())[-1]
        if limit >= 100_000:
            assert made.space + made.size * execute.STEP_BYTES <= limit
        else:
            assert made.size <= 8


@pytest.mark.parametrize(
    "shapes, options",
    [(((8, 64, 56, 56), (64, 64, 3, 3)), {}), (((4, 3, 64, 64), (8, 3, 7, 7)), {"algorithm": "scatter"})],
)
def test_a_step_takes_less_than_a_kibibyte(shapes, options):
    explained = gpuconv.explain(*shapes, padding=1, backend="numpy", **options)
    assert explained.plan.size > 100
    tracemalloc.start()
    try:
        made = explained.plan
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken <= made.size * execute.STEP_BYTES


def test_only_so_many_plans_are_kept(monkeypatch, rng):
    """The newest plans are kept."""
    monkeypatch.setattr(execute, "MOST_KEPT", 60)
    _, w, _ = whole_numbers(rng)
    for columns in range(3, 30):
        gpuconv.conv(np.ones((1, 8, 5, columns), np.float32), w)
        kept = [made.size + execute.OF_A_PLAN for made in execute._plans.values()]
        assert 1 <= len(kept) <= 6
        assert list(execute._plans)[-1].call.geometry.input == (5, columns)
    with no_plan_is_made():
        gpuconv.conv(np.ones((1, 8, 5, 29), np.float32), w)


def caches():
    """Yield every cached function and every container of the modules of gpuconv."""
    for path, module in list(sys.modules.items()):
        if path.partition(".")[0] == "gpuconv":
            for name, value in list(vars(module).items()):
                if hasattr(value, "cache_info") and value.__module__ == path:
                    yield f"{path}.{name}", value.cache_info().currsize
                elif isinstance(value, (dict, list, set)) and not name.startswith("__"):
                    yield f"{path}.{name}", len(value)


def test_clear_cache_clears_every_cache_there_is(rng):
    gpuconv.clear_cache()
    before = dict(caches())
    x, w, dy = whole_numbers(rng)
    for direction, algorithm in itertools.product(DIRECTIONS, ("im2col", "winograd", "fft", "scatter")):
        computed(direction, x, w, dy, padding=1, algorithm=algorithm)
    gpuconv.conv_backward(dy, x, w, padding=1)
    gpuconv.explain(X, W, backend="numpy")
    during = dict(caches())
    assert len({name for name in during if during[name] > before.get(name, 0)}) > 12
    gpuconv.clear_cache()
    after = dict(caches())
    assert {name: size for name, size in after.items() if size > before.get(name, 0)} == {}
    assert not execute._plans
    assert not workspace._kept


# ------------------------------------------------------------------------------------------------- safe


def test_an_exception_in_the_middle_leaves_nothing_behind(rng):
    x, w, _ = whole_numbers(rng, ((8, 32, 28, 28), (32, 32, 3, 3), (8, 32, 28, 28)))
    expected = gpuconv.conv(x, w, padding=1, algorithm="winograd")
    errors = np.geterr()
    for step in (0, 3, 40):
        countdown = itertools.count(-step)

        def failing(*arguments, countdown=countdown, **options):
            if next(countdown) == 0:
                raise MemoryError("no room")
            return np.matmul(*arguments, **options)

        gpuconv.clear_cache()
        with mock.patch.object(np, "matmul", failing), pytest.raises(MemoryError, match="no room"):
            gpuconv.conv(x, w, padding=1, algorithm="winograd")
        assert np.geterr() == errors
        gpuconv.clear_cache()
        np.testing.assert_array_equal(gpuconv.conv(x, w, padding=1, algorithm="winograd"), expected)


def test_an_algorithm_that_fails_while_it_plans_leaves_no_plan(rng):
    x, w, dy = whole_numbers(rng)
    with mock.patch.object(plan.Planner, "copy", side_effect=MemoryError), pytest.raises(MemoryError):
        gpuconv.conv(x, w, padding=1, algorithm="im2col")
    assert not execute._plans
    np.testing.assert_array_equal(gpuconv.conv(x, w, padding=1), exact("forward", x, w, dy))


def test_many_threads_share_plans(rng):
    """Another thread clears the plans meanwhile."""
    shapes = (1, 8, 16, 16), (8, 8, 3, 3), (1, 8, 16, 16)
    x, w, dy = whole_numbers(rng, shapes)
    expected = {direction: exact(direction, x, w, dy) for direction in DIRECTIONS}
    wrong, is_done = [], threading.Event()

    def work(seed):
        for turn in range(60):
            direction = DIRECTIONS[(seed + turn) % 3]
            factor = np.float32(1 + (seed + turn) % 4)
            scaled = (x * factor, w, dy) if direction != "data_grad" else (x, w, dy * factor)
            if not np.array_equal(computed(direction, *scaled, padding=1), expected[direction] * factor):
                wrong.append((seed, turn, direction))

    def forget():
        while not is_done.wait(0.002):
            gpuconv.clear_cache()

    forgetful, workers = threading.Thread(target=forget), [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in (forgetful, *workers):
        thread.start()
    for worker in workers:
        worker.join()
    is_done.set()
    forgetful.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_runs_the_plans_of_its_parent(rng):
    x, w, _ = whole_numbers(rng, ((8, 32, 28, 28), (32, 32, 3, 3), Y))
    expected = gpuconv.conv(x, w, padding=1)
    child = os.fork()
    if child == 0:
        try:
            with no_plan_is_made():
                os._exit(0 if np.array_equal(gpuconv.conv(x, w, padding=1), expected) else 1)
        except BaseException:
            os._exit(2)  # the child process must not continue with the tests
    assert os.waitpid(child, 0)[1] == 0


def test_arrays_may_share_memory_with_one_another(rng):
    """x shares memory with w, and x with dy; then all inputs are read-only."""
    memory = rng.integers(-3, 4, 2000).astype(np.float32)
    for start in (0, 1, 0):
        x, w = memory[start : start + 512].reshape(1, 8, 8, 8), memory[start + 100 : start + 676].reshape(8, 8, 3, 3)
        dy = memory[start + 7 : start + 519].reshape(1, 8, 8, 8)
        for array in (x, w, dy):
            array.flags.writeable = False
        for direction in DIRECTIONS:
            result = computed(direction, x, w, dy, padding=1)
            np.testing.assert_array_equal(result, exact(direction, x, w, dy))
        np.testing.assert_array_equal(computed("weight_grad", x, w, x, padding=1), exact("weight_grad", x, w, x))


def test_dtypes_of_other_libraries_are_read_where_they_lie(rng):
    """bfloat16 does not support the buffer protocol."""
    kinds = [dtype for dtype in dtypes.available() if dtype.name == "bfloat16"]
    for dtype in kinds:
        for step in (1, -1, 1):
            x, w, dy = (array.astype(dtype)[..., ::step] for array in whole_numbers(rng))
            for _ in range(2):
                y = gpuconv.conv(x, w, padding=1)
                np.testing.assert_array_equal(y.astype(float), exact("forward", x, w, dy))
