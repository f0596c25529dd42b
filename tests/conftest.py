"""The backends that tests run on, what the report says of them, and the seeds."""

import collections
import contextlib
import ctypes
import os
import random
import sys
import zlib
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import gpuconv
import gpuconv.execute
from gpuconv import dtypes, execute, tuned
from gpuconv.algorithms import direct, scatter, scatter_plain
from gpuconv.backend import NUMPY, cupy_backend
from gpuconv.choose import MODULES
from gpuconv.cuda import arguments, kernels_folder
from gpuconv.cuda import report as compile_report
from gpuconv.geometry import Geometry
from gpuconv.request import Request
from tests import repeat
from tests.cases import CASES, LAYOUTS, in_turn, named_dtype
from tests.emulation import ahead, launcher, loader
from tests.golden import vectors

repeat.install()
settings.register_profile(
    "gpuconv", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("gpuconv")


def devices_by_driver():
    """How many CUDA devices the driver reports; asked here without gpuconv, whose answer is under test."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    return 0 if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) else count.value


HAS_GPU = devices_by_driver() > 0
NO_GPU = "the driver reports no CUDA device"
NO_EMULATION = loader.why_not()
# Backends whose kernels run on the CPU.
EMULATED = ("emulated", "checked", *(["cupy"] if "GPUCONV_CUPY_ON_CPU" in os.environ else []))
LEFT_OUT = pytest.StashKey()  # how many tests need a GPU that is not there


class NumpyArrays:
    """How tests make a backend's arrays, look at its results, and name its algorithms."""

    name = "numpy"
    xp = np
    backend = NUMPY

    def asarray(self, array):
        return array

    def asnumpy(self, array):
        assert type(array) is np.ndarray
        return array

    def skip_where_refused(self, case, algorithm, dtype, direction="forward"):
        """Skips a test of what an algorithm says it cannot do here."""
        geometry = Geometry.infer(case.x, case.w, **case.settings)
        reason = MODULES[algorithm].why_not(
            Request(geometry, named_dtype(dtype), direction, self.backend, False, gpuconv.settings.workspace_limit())
        )
        if reason:
            pytest.skip(reason)

    def varied(self, wide=True):
        """A context in which what may differ from call to call does."""
        return contextlib.nullcontext()


class EmulatedArrays(NumpyArrays):
    """NumPy's arrays, and the CUDA kernels run on the CPU."""

    name = "emulated"
    backend = launcher.EMULATED

    @contextlib.contextmanager
    def varied(self, wide=True):
        """Other orders of threads and blocks than the natural one, early copies, and 64-bit offsets."""
        order = ("reverse", "random")[next(launcher.options.seed) % 2]
        with launcher.using(order=order, late_copies=False), _wide(wide):
            yield


class CupyArrays(NumpyArrays):
    name = "cupy"

    def __init__(self):
        import cupy

        self.xp = cupy
        self.backend = cupy_backend()

    def asarray(self, array):
        memory = np.argsort([-abs(step) for step in array.strides], kind="stable")
        return self.xp.asarray(np.ascontiguousarray(array.transpose(memory))).transpose(np.argsort(memory))

    def asnumpy(self, array):
        assert isinstance(array, self.xp.ndarray)
        return array.get()

    def varied(self, wide=True):
        """64-bit offsets."""
        return _wide(wide)


@contextlib.contextmanager
def _wide(wide):
    """64-bit offsets, for calls that were made before too."""
    with mock.patch.object(arguments, "is_wide", return_value=True) if wide else contextlib.nullcontext():
        execute.clear()
        yield
        execute.clear()


@contextlib.contextmanager
def arrays_of(backend):
    """Arrays of the backend with this name. Where the driver reports a device and CuPy does not work, this fails."""
    if backend == "numpy":
        yield NumpyArrays()
    elif backend == "emulated":
        with (
            mock.patch.object(gpuconv.execute, "backend_for", return_value=launcher.EMULATED),
            launcher.using(order="natural"),
        ):
            yield EmulatedArrays()
    else:
        yield CupyArrays()


BACKENDS = (
    "numpy",
    pytest.param("emulated", marks=pytest.mark.emulated),
    pytest.param("cupy", marks=pytest.mark.gpu),
)
# For tests of what only NumPy's arrays can be: @NUMPY_ARRAYS in the place of all backends.
NUMPY_ARRAYS = pytest.mark.parametrize("arrays", BACKENDS[:2], indirect=True)


@pytest.fixture(params=BACKENDS)
def arrays(request):
    """Arrays of each backend in turn, on which calls compute for the time of the test."""
    with arrays_of(request.param) as made:
        yield made


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    """No variable of the machine decides a test."""
    for variable in {*gpuconv.settings.DEFAULTS, "CUPY_TF32"} - {"GPUCONV_CACHE_DIR"}:
        monkeypatch.delenv(variable, raising=False)
    gpuconv.set_backend(None)
    execute.clear()  # nor does a call of another one


@pytest.fixture(autouse=True)
def _repeated_calls(request):
    """Every call is repeated (tests/repeat.py), unless a test says why not; where kernels are emulated some are."""
    backend = dict(request.node.user_properties).get("backend", "numpy")
    seed, every = request.config.getoption("repeat_seed"), request.config.getoption("repeat_every")
    drawn = zlib.crc32(f"{seed} {request.node.nodeid}".encode()) % every == 0
    if request.node.get_closest_marker("called_once") or (backend in EMULATED and not drawn):
        yield
        return
    with repeat.repeating(adds_atomically=backend != "numpy"):
        yield


@pytest.fixture(scope="session", autouse=True)
def _tuned_elsewhere(tmp_path_factory):
    """What the machine's owner has had tuned decides no test, and tests leave it as it is."""
    folder = tmp_path_factory.mktemp("tuned")
    with mock.patch.object(tuned, "_folder", lambda backend: folder / backend.name):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(2024)


def pytest_addoption(parser):
    parser.addoption(
        "--kernels",
        choices=loader.MODES,
        default=launcher.options.mode,
        help="how kernels are compiled for the CPU (default fast)",
    )
    parser.addoption(
        "--repeat-every", type=int, default=10, help="of N tests of emulated kernels one repeats its calls (default 10)"
    )
    parser.addoption("--repeat-seed", default="0", help="draws which one (default 0)")
    parser.addoption("--draw", type=int, metavar="N", help=f"of the tests in {', '.join(MATRIX)} run N only")
    parser.addoption("--draw-seed", default="0", help="draws which ones (default 0)")


# Files of tests that go through cases, layouts, dtypes and kernels: many tests of a kind.
MATRIX = ("test_matrix.py", "test_adjoint.py", "test_nonfinite.py", "test_implicit_gemm.py", "test_kernels.py")


def pytest_configure(config):
    launcher.options.mode = config.getoption("--kernels")
    if launcher.options.mode == "debug":
        launcher.options.seconds = 86400.0  # of someone who thinks at a breakpoint


KERNELS = tuple(name for name in gpuconv.ALGORITHMS if (kernels_folder() / f"{name}.cu").exists())
KERNELS_ONLY = ("direct", "implicit_gemm")  # algorithms that NumPy does not have
IN_TURNS = "implicit_gemm"  # has kernels for every layout, which take long to compile: each case takes one in its turn


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    needless, counts, left_out = [], collections.Counter(), 0
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        backend = params.get("arrays", "numpy")
        for marker in ("emulated", "checked", "gpu"):
            if item.get_closest_marker(marker) and "arrays" not in params:
                backend = {"gpu": "cupy"}.get(marker, marker)
        if backend == "numpy" and params.get("algorithm") in KERNELS_ONLY:
            needless.append(item)
        if not (_in_turn(item, backend, params, counts) and _has_its_value(backend, params)):
            needless.append(item)
        item.user_properties.append(("backend", backend))
        if item.get_closest_marker("gpu") and not HAS_GPU:
            if "gpu" in config.option.markexpr:  # which asks for them
                item.add_marker(pytest.mark.skip(reason=NO_GPU))
            else:
                left_out += 1
                needless.append(item)
        if NO_EMULATION and (item.get_closest_marker("emulated") or item.get_closest_marker("checked")):
            item.add_marker(pytest.mark.skip(reason=NO_EMULATION))
    config.stash[LEFT_OUT] = left_out
    _deselect(config, items, needless)
    if (most := config.getoption("draw")) is not None:
        of_matrix = [item for item in items if item.path.name in MATRIX]
        drawn = set(random.Random(config.getoption("draw_seed")).sample(of_matrix, min(most, len(of_matrix))))
        _deselect(config, items, [item for item in of_matrix if item not in drawn])
    if _is_long(items):  # what needs no kernel comes first: the time to compile some
        items.sort(key=lambda item: not hasattr(item, "callspec") or item.callspec.params.get("arrays") != "numpy")


def _deselect(config, items, needless):
    if needless:
        config.hook.pytest_deselected(items=needless)
        dropped = set(needless)
        items[:] = [item for item in items if item not in dropped]


def _in_turn(item, backend, params, counts):
    """Whether a test runs on the CPU: of those that would compile many kernels, some.

    Of those, too, that run no kernel on the emulated backend: they repeat NumPy's. fft reads every layout alike.
    """
    if backend == "numpy" and params.get("algorithm") == "fft" and {"case", "layout"} <= set(params):
        return in_turn(params["case"], params["layout"], params.get("dtype", "float64"))
    if backend != "emulated":
        return True
    marker, has_many_modules = item.get_closest_marker("every_nth"), params.get("algorithm") == IN_TURNS
    has_no_kernel = params.get("algorithm") not in (None, *KERNELS)
    if {"case", "layout"} <= set(params) and (has_many_modules or has_no_kernel):
        if has_no_kernel and CASES.index(params["case"]) % 5:
            return False
        return in_turn(params["case"], params["layout"], params.get("dtype", "float64"))
    if marker is None and not has_many_modules:
        return True
    counts[backend, item.originalname] += 1
    return counts[backend, item.originalname] % (marker.args[0] if marker else 3) == 1


def _has_its_value(backend, params):
    """Whether it is the turn of this NaN or Inf: without kernels of our own, each case and layout has one of them."""
    if backend != "numpy" or not {"case", "layout", "value"} <= set(params):
        return True
    turn = CASES.index(params["case"]) + LAYOUTS.index(params["layout"])
    return (np.nan, np.inf, -np.inf).index(params["value"]) == turn % 3


def _is_long(items):
    return not NO_EMULATION and launcher.options.mode == "fast" and len(items) > 5000


@pytest.fixture(scope="session", autouse=True)
def _libraries_built_ahead(request):
    """Of a long run: a second core compiles kernels that tests will launch while the first tests run."""
    items = request.session.items
    if not _is_long(items):
        yield
        return
    with ahead.building() as build:
        convolutions = [(case.geometry(), dtype) for case in CASES for dtype in dtypes.available()]
        possible = [(geometry, dtype) for geometry, dtype in convolutions if not arguments.why_not(geometry)]
        for module in compile_report.launched(possible, [direct, scatter, scatter_plain]):
            build(module)
            build(module._replace(wide=True))
        tests = [item for item in items if item.get_closest_marker("emulated") and _has_modules_of_its_own(item)]
        ahead.rehearse(tests, arrays_of, build)
        yield


def _has_modules_of_its_own(item):
    """Beside those of direct and scatter in all cases."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    is_of_cases = "case" in params and params.get("algorithm", IN_TURNS) != IN_TURNS
    return params.get("arrays") == "emulated" and not is_of_cases


def pytest_report_header():
    gpu = f"cupy on {devices_by_driver()} device(s)" if HAS_GPU else f"no cupy: {NO_GPU}"
    kernels = f"no kernels on the CPU: {NO_EMULATION}" if NO_EMULATION else "kernels on the CPU (emulated)"
    python = f"Python {sys.version.split()[0]}"
    return f"gpuconv backends: numpy {np.__version__}, {kernels}, {gpu}; {python}"


def pytest_terminal_summary(terminalreporter, config):
    counts = collections.Counter()
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            counts[dict(getattr(report, "user_properties", [])).get("backend"), outcome] += 1
    terminalreporter.section("tests per backend")
    for backend in ("numpy", "emulated", "checked", "cupy"):
        line = ", ".join(f"{counts[backend, outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
        left_out = config.stash.get(LEFT_OUT, 0) if backend == "cupy" else 0
        terminalreporter.write_line(f"{backend:<9} {line}" + (f", {left_out} left out: {NO_GPU}" if left_out else ""))
    if missing := vectors.unconfirmed():
        terminalreporter.write_line(
            f"{len(missing)} of {len(vectors.declared())} device functions were never compared with a GPU"
            f" (tests/golden): {', '.join(dict.fromkeys(name.partition('(')[0] for name in missing))}"
        )
