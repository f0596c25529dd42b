"""The kernels that Numba compiles for NumPy arrays: values, NaN and Inf, threads, fork, their cache, and failures."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import gpuconv
from gpuconv.arrays import NUMPY
from gpuconv.cpu import banded, compiled, depthwise, slices, vector_plan
from gpuconv.geometry import DIRECTIONS, Geometry
from gpuconv.request import Request
from gpuconv.select import MODULES
from gpuconv.settings import DEFAULT_WORKSPACE_LIMIT
from tests import reference
from tests.calls import ACTIVATIONS, LYINGS
from tests.cases import LAYOUTS, case, channels_first, draw, laid_out
from tests.tiers import combinations

pytest.importorskip("numba")

# Fewer groups than a vector has lanes, as many, and more; one and several channels and filters. Rows with and without
# outputs of which all taps read inside; numbers of taps that are compiled for, and others; rows that read only padding.
CASES = (
    case("one vector", (2, 16, 9, 11), (16, 1, 3, 3), padding=1, groups=16),
    case("overlapping vectors", (1, 21, 6, 10), (21, 1, 3, 3), padding=1, groups=21),
    case("many vectors", (1, 101, 7, 7), (101, 1, 3, 3), padding=1, groups=101),
    case("less than a vector", (2, 5, 8, 9), (5, 1, 3, 3), padding=1, groups=5),
    case("stride 2", (2, 20, 11, 12), (20, 1, 3, 3), stride=2, padding=1, groups=20),
    case("5x5 stride 2", (1, 17, 13, 14), (17, 1, 5, 5), stride=2, padding=2, groups=17),
    case("7x7", (1, 18, 8, 13), (18, 1, 7, 7), padding=3, groups=18),
    case("6 taps", (1, 16, 3, 13), (16, 1, 2, 6), padding=((1, 0), (2, 3)), groups=16),
    case("9 taps, stride 3", (1, 16, 5, 31), (16, 1, 1, 9), stride=(1, 3), padding=(0, 4), groups=16),
    case("dilated", (1, 19, 9, 12), (19, 1, 3, 3), padding=2, dilation=2, groups=19),
    case("padding beyond the kernel", (1, 16, 4, 6), (16, 1, 2, 2), padding=3, groups=16),
    case("cropped", (1, 16, 8, 9), (16, 1, 3, 3), padding=((-1, -2), (-2, 0)), groups=16),
    case("multiplier", (2, 17, 6, 7), (51, 1, 3, 3), padding=1, groups=17),
    case("groups of channels", (2, 54, 7, 8), (36, 3, 3, 3), padding=1, groups=18),
    case("groups of channels, stride 2", (1, 64, 9, 9), (64, 4, 3, 3), stride=2, padding=1, groups=16),
    case("a few groups of channels", (1, 8, 6, 9), (12, 4, 3, 3), padding=1, groups=2),
    case("one channel", (2, 1, 8, 9), (3, 1, 3, 3), padding=1),
    case("one group", (2, 5, 8, 9), (101, 5, 3, 3), padding=1),
    case("one group, stride 2", (1, 3, 15, 16), (16, 3, 7, 7), stride=2, padding=3),
    case("large groups", (1, 40, 5, 6), (34, 20, 3, 3), padding=1, groups=2),
    case("1-D", (2, 20, 40), (20, 1, 5), padding=2, groups=20),
    case("3-D", (1, 16, 4, 5, 7), (16, 1, 3, 3, 3), padding=1, groups=16),
    case("3-D stride 2", (2, 18, 5, 6, 7), (18, 1, 2, 3, 3), stride=2, padding=1, groups=18),
)
FEW = [one for one in CASES if one.name in ("overlapping vectors", "9 taps, stride 3", "groups of channels")]


def is_worth_compiling(one, algorithm, dtype):
    """Return whether to test kernels for other numbers of taps in a dtype: not in float64, to save minutes."""
    others_compile_it = (one.w[-1], one.stride[-1]) == (3, 1) or one.w[-1] not in (2, 3, 5, 7)
    return algorithm == "direct" or dtype != "float64" or others_compile_it


def is_applicable(one, algorithm, limit=DEFAULT_WORKSPACE_LIMIT):
    """Return whether an algorithm computes every direction of a case."""
    requests = (Request(one.geometry(), np.dtype("float32"), direction, NUMPY, limit=limit) for direction in DIRECTIONS)
    return not any(map(MODULES[algorithm].why_not, requests))


@pytest.fixture
def only_compiled(monkeypatch):
    """Let the algorithm fail where it would not use a compiled kernel."""
    for module in (banded, slices):
        for direction in DIRECTIONS:
            monkeypatch.setattr(module, direction, None)


def operands(one, rng, dtype="float64", integers=True):
    """Return x, w and dy in channels_first."""
    x, w = draw(rng, one.x, dtype, integers), draw(rng, one.w, dtype, integers)
    return x, w, draw(rng, reference.forward(x, w, **one.settings).shape, dtype, integers)


def expected(x, w, dy, settings):
    """Return y, dx and dw in float64."""
    return (
        reference.forward(x, w, **settings),
        reference.data_grad(dy, w, x.shape, **settings),
        reference.weight_grad(dy, x, w.shape, **settings),
    )


def results(x, w, dy, settings, layout="channels_first", dtype="float64", algorithm="depthwise"):
    """Return y, dx and dw in channels_first."""
    x, w, dy = (laid_out(a.astype(dtype), layout, role) for a, role in ((x, "x"), (w, "w"), (dy, "x")))
    axes = "channels_last" if layout == "channels_last" else "channels_first"
    options = settings | {"algorithm": algorithm, "layout": axes}
    y = gpuconv.conv(x, w, **options)
    dx = gpuconv.conv_data_grad(dy, w, x.shape, **options)
    dw = gpuconv.conv_weight_grad(dy, x, w.shape, **options)
    return channels_first(y, axes), channels_first(dx, axes), channels_first(dw, axes, "w")


def assert_equal(found, exact):
    for one, other in zip(found, exact, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.usefixtures("only_compiled")
@combinations(
    case=CASES,
    algorithm=["depthwise", "direct"],
    layout=LAYOUTS,
    dtype=["float64", "float32", "float16"],
    where=lambda case, algorithm, dtype, **_: (
        is_applicable(case, algorithm) and is_worth_compiling(case, algorithm, dtype)
    ),
    turns=["layout", "dtype"],
)
def test_values_are_exact_on_small_integers(case, algorithm, layout, dtype, rng):
    arrays = operands(case, rng)
    exact = [array.astype(dtype) for array in expected(*arrays, case.settings)]
    assert_equal(results(*arrays, case.settings, layout, dtype, algorithm), exact)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_steps_of_direct_do_not_increase_with_the_groups(direction):
    def steps(groups):
        shapes = (1, 6, 6, 8 * groups), (3, 3, 8, 16 * groups)
        options = {"padding": 1, "groups": groups, "layout": "channels_last", "direction": direction}
        return gpuconv.explain(*shapes, algorithm="direct", backend="numpy", **options).plan.size

    assert steps(40) == steps(4)


@pytest.mark.usefixtures("only_compiled")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("algorithm, kilobytes", [("depthwise", 40), ("depthwise", 200), ("direct", 150)])
def test_small_workspaces_cut_a_layer_into_pieces(algorithm, kilobytes, layout, rng, monkeypatch):
    """The sums of weight_grad do not fit at once, nor do blocks of more than a few rows."""
    one = case("", (2, 16, 30, 31), (16, 1, 3, 3), padding=1, groups=16)
    monkeypatch.setenv("GPUCONV_WORKSPACE_LIMIT", f"{kilobytes}KiB")
    monkeypatch.setattr(vector_plan, "SUM_BYTES", 4 << 10)
    assert is_applicable(one, algorithm, kilobytes << 10)
    arrays = operands(one, rng)
    assert_equal(results(*arrays, one.settings, layout, "float32", algorithm), expected(*arrays, one.settings))


@pytest.mark.usefixtures("only_compiled")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("algorithm", ["depthwise", "direct"])
def test_long_sums_are_within_the_bound(algorithm, dtype, layout, rng):
    one = case("", (4, 16, 60, 70), (16, 1, 9, 3), padding=(4, 1), groups=16)
    if algorithm == "direct":
        one = case("", (4, 9, 30, 40), (18, 9, 7, 7), padding=3)
    arrays = operands(one, rng, dtype, integers=False)
    absolute = expected(*map(np.abs, arrays), one.settings)
    exact, found = expected(*arrays, one.settings), results(*arrays, one.settings, layout, dtype, algorithm)
    for result, value, size, direction in zip(found, exact, absolute, DIRECTIONS, strict=True):
        terms = one.geometry().reduction_length(direction)
        eps = np.finfo(dtype).eps
        assert np.all(np.abs(result - value) <= eps * np.abs(value) + 2 * np.sqrt(terms) * eps * size)


@pytest.mark.usefixtures("only_compiled")
@pytest.mark.parametrize("one", FEW, ids=str)
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh"])
def test_bias_activation_and_derivative(activation, layout, one, rng):
    x, w, dy = operands(one, rng)
    b = draw(rng, (one.w[0],), "float64", True)
    function, derivative = ACTIVATIONS[activation]
    y = function(reference.forward(x, w, **one.settings) + b.reshape(-1, 1, 1))
    exact = expected(x, w, dy * derivative(y), one.settings)[1:]
    x, w, dy = (laid_out(a, layout, role) for a, role in ((x, "x"), (w, "w"), (dy, "x")))
    options = one.settings | {"algorithm": "depthwise", "layout": layout, "activation": activation}
    found = gpuconv.conv(x, w, b, **options)
    np.testing.assert_allclose(channels_first(found, layout), y, rtol=1e-14, atol=1e-14)
    gradients = gpuconv.conv_backward(dy, x, w, y=found, **options)
    np.testing.assert_allclose(channels_first(gradients.dx, layout), exact[0], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(channels_first(gradients.dw, layout, "w"), exact[1], rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("only_compiled")
@pytest.mark.parametrize("lying", LYINGS)
@pytest.mark.parametrize("algorithm", ["depthwise", "direct"])
@pytest.mark.parametrize("one", FEW, ids=str)
def test_operands_and_results_may_lie_in_any_way_in_memory(one, algorithm, lying, rng):
    arrays = operands(one, rng)
    x, w, dy = (LYINGS[lying](array) for array in arrays)
    for array in (x, w, dy):
        array.flags.writeable = False
    y, dx, dw = expected(*arrays, one.settings)
    options = one.settings | {"algorithm": algorithm}
    for function, inputs, exact in (
        (gpuconv.conv, (x, w), y),
        (gpuconv.conv_data_grad, (dy, w, x.shape), dx),
        (gpuconv.conv_weight_grad, (dy, x, w.shape), dw),
    ):
        out = LYINGS[lying](np.full_like(exact, np.nan))
        assert function(*inputs, **options, out=out) is out
        np.testing.assert_array_equal(out, exact)


def test_batch_axes_that_cannot_be_merged(rng):
    one = case("", (6, 16, 7, 9), (16, 1, 3, 3), padding=1, groups=16)
    x, w, dy = operands(one, rng)
    y, dx, dw = expected(x, w, dy, one.settings)
    x, y, dx, dy = (a.reshape(2, 3, *a.shape[1:]).swapaxes(0, 1) for a in (x, y, dx, dy))  # a copy, then a view of it
    options = one.settings | {"algorithm": "depthwise"}
    np.testing.assert_array_equal(gpuconv.conv(x, w, **options), y)
    np.testing.assert_array_equal(gpuconv.conv_data_grad(dy, w, x.shape, **options), dx)
    np.testing.assert_array_equal(gpuconv.conv_weight_grad(dy, x, w.shape, **options), dw)


@pytest.mark.usefixtures("only_compiled")
@combinations(
    case=FEW,
    place=[0, 1, 2],
    algorithm=["depthwise", "direct"],
    value=[np.nan, np.inf],
    layout=["channels_first", "channels_last"],
    turns=["value", "layout"],
)
def test_nonfinite_elements_reach_exactly_what_a_direct_sum_reaches(case, place, algorithm, value, layout, rng):
    """The padding is not read, so an infinite weight, too, spreads to nothing else."""
    arrays = operands(case, rng)
    is_bad = np.zeros(arrays[place].shape, bool)
    is_bad.reshape(-1)[rng.integers(is_bad.size, size=3)] = True
    finite = [np.where(is_bad, 0, array) if number == place else array for number, array in enumerate(arrays)]
    reaching = [is_bad if number == place else np.ones_like(array) for number, array in enumerate(arrays)]
    with np.errstate(invalid="ignore"):
        given = [np.where(is_bad, value, array) if number == place else array for number, array in enumerate(arrays)]
        found = results(*given, case.settings, layout, algorithm=algorithm)
    of_results = (0, 1), (1, 2), (0, 2)
    for which, result, direct, count in zip(
        of_results, found, expected(*finite, case.settings), expected(*reaching, case.settings), strict=True
    ):
        reached = (count > 0) & (place in which)
        np.testing.assert_array_equal(result[~reached], direct[~reached])
        # An infinite element times a zero is NaN.
        assert not np.isfinite(result[reached]).any()


@pytest.mark.usefixtures("only_compiled")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_denormal_numbers_are_kept(dtype, rng):
    one = case("", (1, 16, 5, 9), (16, 1, 3, 3), padding=1, groups=16)
    x, w, dy = operands(one, rng)
    tiny = float(np.finfo(dtype).smallest_subnormal)
    y, _, dw = results(x * tiny, w, dy, one.settings, "channels_last", dtype)
    exact, _, exact_dw = expected(x, w, dy, one.settings)
    assert_equal((y, dw), (exact * tiny, exact_dw * tiny))


@pytest.mark.usefixtures("only_compiled", "small_in_threads")
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("algorithm", ["depthwise", "direct"])
def test_the_bits_are_the_same_with_any_number_of_threads(algorithm, layout, rng, monkeypatch):
    one = case("", (3, 40, 64, 60), (40, 1, 3, 3), stride=1, padding=1, groups=40)
    if algorithm == "direct":
        one = case("", (3, 18, 40, 60), (36, 18, 3, 3), padding=1)
    arrays = operands(one, rng, "float32", integers=False)
    bits = []
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("GPUCONV_NUM_THREADS", threads)
        found = results(*arrays, one.settings, layout, "float32", algorithm)
        bits.append([array.tobytes() for array in found])
    assert bits[0] == bits[1] == bits[2]


@pytest.mark.usefixtures("only_compiled")
def test_threads_may_compute_at_the_same_time(rng):
    arrays = {one: operands(one, rng) for one in FEW}
    found = {}

    def compute(one, number):
        found[one, number] = results(*arrays[one], one.settings, LAYOUTS[number % len(LAYOUTS)])

    threads = [threading.Thread(target=compute, args=(one, number)) for one in FEW for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(threads)
    for (one, _), values in found.items():
        assert_equal(values, expected(*arrays[one], one.settings))


def in_process(script, folder=None, **variables):
    """Run a script in a new process with a cache folder and all warnings as errors; return its lines."""
    environment = os.environ | variables
    if folder:
        environment["GPUCONV_CACHE_DIR"] = str(folder)
    environment.pop("NUMBA_CACHE_DIR", None)
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


LAYER = """
import os, sys, numpy, gpuconv
from gpuconv.cpu import compiled
x, w = numpy.ones((1, 6, 7, 16), "f4"), numpy.ones((3, 3, 1, 16), "f4")
def layer():
    y = gpuconv.conv(x, w, padding=1, groups=16, layout="channels_last", algorithm="depthwise")
    assert y[0, 3, 3, 5] == 9 and y[0, 0, 0, 5] == 4
"""


def test_kernels_are_kept_in_the_cache_folder(tmp_path):
    script = f"{LAYER}layer()\n(kernel,) = compiled._kernels.values()\nprint(sum(kernel.stats.cache_hits.values()))"
    assert in_process(script, tmp_path) == ["0"]
    assert list((tmp_path / "numba").rglob("*.nbi"))
    assert in_process(script, tmp_path) == ["1"]
    for file in tmp_path.rglob("*.nb[ic]"):
        file.write_bytes(b"damaged")
    assert in_process(script, tmp_path) == ["0"]


def test_a_cache_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").touch()
    script = f"{LAYER}layer()\nprint(len(compiled._kernels), compiled._failure)"
    before = set(Path(gpuconv.__file__).parent.rglob("*.nbi"))
    assert in_process(script, tmp_path / "file" / "folder") == ["1", "None"]
    assert set(Path(gpuconv.__file__).parent.rglob("*.nbi")) == before


def test_the_cache_of_a_caller_s_own_functions_is_not_moved():
    script = f"{LAYER}import numba\nbefore = numba.config.CACHE_DIR\nlayer()\nassert numba.config.CACHE_DIR == before"
    in_process(script)


def test_other_layers_do_not_import_numba():
    script = """
import sys, numpy, gpuconv
gpuconv.conv(numpy.ones((1, 20, 9, 9)), numpy.ones((4, 20, 3, 3)))
gpuconv.explain((1, 16, 9, 9), (16, 1, 3, 3), groups=16)
assert "numba" not in sys.modules
"""
    in_process(script)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_process_computes():
    script = f"""{LAYER}
layer()
child = os.fork()
if child == 0:
    layer()
    gpuconv.conv(x, w[:, :2], groups=16, layout="channels_last", algorithm="depthwise")
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert in_process(script, PYTHONWARNINGS="ignore") == ["7"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_fork_waits_for_the_compiler():
    """In the child nobody would release the locks of a compiler at work."""
    script = f"""{LAYER}
import threading, time
begun, done = threading.Event(), []
def work():
    with compiled._lock:
        begun.set()
        time.sleep(0.3)
        done.append(1)
thread = threading.Thread(target=work)
thread.start()
begun.wait()
child = os.fork()
if child == 0:
    layer()
    os._exit(7 + len(done))
thread.join()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert in_process(script, PYTHONWARNINGS="ignore") == ["8"]


@pytest.fixture
def no_numba(monkeypatch):
    """Run a test as without Numba."""
    monkeypatch.setattr(compiled, "version", lambda: None)
    monkeypatch.setattr(compiled, "_compiled", None)
    gpuconv.clear_cache()
    yield
    gpuconv.clear_cache()


@pytest.mark.usefixtures("no_numba")
@combinations(
    case=[case for case in CASES if case.x[1] == case.w[0] == case.groups],
    layout=LAYOUTS,
    dtype=["float64", "float32"],
    turns=["layout", "dtype"],
)
def test_without_numba_other_code_computes(case, layout, dtype, rng):
    arrays = operands(case, rng)
    assert_equal(results(*arrays, case.settings, layout, dtype), expected(*arrays, case.settings))


@pytest.mark.usefixtures("no_numba")
@pytest.mark.parametrize(
    "version, words",
    [(None, "not installed"), ("0.60.0", "0.61 or later, not 0.60.0"), ("unknown", "0.61 or later, not unknown")],
)
def test_messages_say_that_numba_is_missing(version, words, rng, monkeypatch):
    monkeypatch.setattr(compiled, "version", lambda: version)
    one = next(one for one in CASES if one.name == "groups of channels")
    with pytest.raises(ValueError, match=f"requires Numba.*{words}"):
        results(*operands(one, rng), one.settings)
    slow = gpuconv.explain((8, 64, 56, 56), (64, 1, 3, 3), padding=1, groups=64, backend="numpy")
    assert "with Numba, depthwise would take" in str(slow)
    assert ("not installed" if version is None else f"{version} (unused: ") in gpuconv.config.config()["Numba"]


@pytest.mark.called_once("it warns once in a process")
@pytest.mark.parametrize("one", FEW, ids=str)
def test_if_numba_fails_other_code_computes_after_one_warning(one, rng, monkeypatch):
    def fail(*_):
        raise SystemError("LLVM")

    monkeypatch.setattr(compiled, "_compiled", fail)
    monkeypatch.setattr(compiled, "_kernels", {})
    monkeypatch.setattr(compiled, "_failure", None)
    gpuconv.clear_cache()
    x, w, dy = operands(one, rng)
    y, dx, dw = expected(x, w, dy, one.settings)
    with pytest.warns(UserWarning, match="without compiled kernels, because Numba failed: SystemError: LLVM"):
        np.testing.assert_array_equal(gpuconv.conv(x, w, **one.settings, algorithm="depthwise"), y)
    np.testing.assert_array_equal(gpuconv.conv_data_grad(dy, w, x.shape, **one.settings), dx)
    np.testing.assert_array_equal(gpuconv.conv_weight_grad(dy, x, w.shape, **one.settings), dw)
    gpuconv.clear_cache()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_if_numba_fails_every_direction_falls_back(direction, rng, monkeypatch):
    """Also in groups of several channels, which nothing else of this algorithm computes."""
    one = next(one for one in CASES if one.name == "groups of channels, stride 2")
    monkeypatch.setattr(compiled, "kernel", lambda *_: None)
    gpuconv.clear_cache()
    arrays = operands(one, rng)
    number = DIRECTIONS.index(direction)
    np.testing.assert_array_equal(results(*arrays, one.settings)[number], expected(*arrays, one.settings)[number])
    gpuconv.clear_cache()


def test_complex_numbers_have_no_compiled_kernels():
    request = Request(Geometry.infer((1, 16, 9, 9), (16, 1, 3, 3), groups=16), np.dtype("complex64"), "forward", NUMPY)
    assert depthwise.why_not(request) is None  # by banded matrices
    request = request._replace(geometry=Geometry.infer((1, 32, 9, 9), (16, 2, 3, 3), groups=16))
    assert "float32 or float64, not complex64" in depthwise.why_not(request)
