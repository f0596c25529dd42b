"""The backends that tests run on, what the report says of them, and the seeds."""

import collections
import contextlib
import ctypes
import os
import sys
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import gpuconv
from gpuconv import execute, tuned
from gpuconv.backend import NUMPY, cupy_backend
from gpuconv.choose import MODULES
from gpuconv.cuda import arguments
from gpuconv.geometry import Geometry
from gpuconv.request import Request
from tests import ahead, repeat, selection
from tests.cases import named_dtype
from tests.cupy_on_cpu import loaded
from tests.emulation import launcher, loader
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
LONG = 2000  # tests from which on kernels are compiled ahead
DONE = pytest.StashKey()  # the names of tests that an earlier run has passed
TOO_MANY = pytest.StashKey()  # whether a GPU would have compiled more modules than a run may
LEFT_OUT = pytest.StashKey()  # the tests that need a GPU that is not there


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


def in_memory(array):
    """The axes of an array from the one with the largest steps on."""
    return np.argsort([-abs(step) for step in array.strides], kind="stable")


class CupyArrays(NumpyArrays):
    name = "cupy"

    def __init__(self):
        import cupy

        self.xp = cupy
        self.backend = cupy_backend()

    def asarray(self, array):
        memory = in_memory(array)
        return self.xp.asarray(np.ascontiguousarray(array.transpose(memory))).transpose(np.argsort(memory))

    def asnumpy(self, array):
        assert isinstance(array, self.xp.ndarray)
        memory = in_memory(array)
        return array.transpose(memory).get().transpose(np.argsort(memory))  # without a kernel that copies

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


@pytest.fixture(autouse=True)
def _working_device(request):
    """An illegal access is reported by the test that made it; no later test of the process could pass."""
    yield
    if "cupy" not in sys.modules or "GPUCONV_CUPY_ON_CPU" in os.environ or not HAS_GPU:
        return
    try:
        sys.modules["cupy"].cuda.runtime.deviceSynchronize()
    except Exception as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)  # xdist says which test it was, and starts another worker
        pytest.exit(f"the device computes nothing any more after {request.node.nodeid}: {error}")


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
    parser.addoption("--whole", action="store_true", help="on CuPy all tests, not some of those that need many kernels")
    parser.addoption(
        "--done", type=Path, metavar="FILE", help="leave out tests that FILE names; it gets those that pass"
    )
    parser.addoption("--draw", type=int, metavar="N", help=f"of the tests in {', '.join(selection.MATRIX)} run N only")
    parser.addoption("--draw-seed", default="0", help="draws which ones (default 0)")


def pytest_configure(config):
    launcher.options.mode = config.getoption("--kernels")
    if (path := config.getoption("done")) is not None:
        config.stash[DONE] = selection.done(config, path)
    if launcher.options.mode == "debug":
        launcher.options.seconds = 86400.0  # of someone who thinks at a breakpoint


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    _deselect(config, items, selection.needless(items, config.getoption("whole")))
    for item in items:
        item.user_properties.append(("backend", selection.backend_of(item)))
        if NO_EMULATION and (item.get_closest_marker("emulated") or item.get_closest_marker("checked")):
            item.add_marker(pytest.mark.skip(reason=NO_EMULATION))
    needs_a_gpu = [] if HAS_GPU else [item for item in items if item.get_closest_marker("gpu")]
    if "gpu" in config.option.markexpr:  # which asks for them
        for item in needs_a_gpu:
            item.add_marker(pytest.mark.skip(reason=NO_GPU))
    else:
        config.stash[LEFT_OUT] = needs_a_gpu
        _deselect(config, items, needs_a_gpu)
    if (number := config.getoption("draw")) is not None:
        _deselect(config, items, selection.undrawn(items, number, config.getoption("draw_seed")))
    done = set(config.stash.get(DONE, ()))
    _deselect(config, items, [item for item in items if item.nodeid in done])
    items.sort(key=selection.turn)


def _deselect(config, items, others):
    if others:
        config.hook.pytest_deselected(items=others)
        dropped = set(others)
        items[:] = [item for item in items if item not in dropped]


@pytest.fixture(scope="session", autouse=True)
def _kernels_compiled_ahead(request):
    """Of a long run: what tests will launch is compiled while the first tests run."""
    items, is_first = request.session.items, os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0"
    with contextlib.ExitStack() as stack:
        if len(items) > LONG and is_first:
            for backend, compiling in _compilers():
                tests = [item for item in items if selection.parameters(item).get("arrays") == backend]
                if tests:
                    ahead.find_modules(tests, backend, arrays_of, stack.enter_context(compiling()))
        yield


def _compilers():
    """What compiles ahead, by backend."""
    if not NO_EMULATION and launcher.options.mode == "fast":
        yield "emulated", ahead.for_cpu
    if HAS_GPU:
        yield "cupy", ahead.for_gpu


def pytest_report_header():
    gpu = f"cupy on {devices_by_driver()} device(s)" if HAS_GPU else f"no cupy: {NO_GPU}"
    kernels = f"no kernels on the CPU: {NO_EMULATION}" if NO_EMULATION else "kernels on the CPU (emulated)"
    python = f"Python {sys.version.split()[0]}"
    return f"gpuconv backends: numpy {np.__version__}, {kernels}, {gpu}; {python}"


def pytest_sessionfinish(session):
    """A run on a GPU stays affordable: where it is emulated, the kernels that it would compile are counted."""
    is_counted = loaded.FOLDER in os.environ and not session.config.getoption("whole")
    if is_counted and loaded.counts()["gpuconv"] > loaded.MOST:
        session.config.stash[TOO_MANY] = True
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    counts = collections.Counter()
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            counts[dict(getattr(report, "user_properties", [])).get("backend"), outcome] += 1
    terminalreporter.section("tests per backend")
    for backend in ("numpy", "emulated", "checked", "cupy"):
        line = ", ".join(f"{counts[backend, outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
        left_out = len(config.stash.get(LEFT_OUT, ())) if backend == "cupy" else 0
        terminalreporter.write_line(f"{backend:<9} {line}" + (f", {left_out} left out: {NO_GPU}" if left_out else ""))
    if loaded.FOLDER in os.environ:
        ours, others = loaded.counts().values()
        terminalreporter.write_line(
            f"a GPU would have compiled {ours} modules of gpuconv, without --whole at most {loaded.MOST},"
            f" and {others} of CuPy"
        )
        if config.stash.get(TOO_MANY, False):
            terminalreporter.write_line("the run fails for it: selection.py selects too many", red=True)
    if missing := vectors.unconfirmed():
        terminalreporter.write_line(
            f"{len(missing)} of {len(vectors.declared())} device functions were never compared with a GPU"
            f" (tests/golden): {', '.join(dict.fromkeys(name.partition('(')[0] for name in missing))}"
        )
