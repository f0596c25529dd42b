"""Fixtures, options, seeds, and the lines of the report about the backends."""

import collections
import functools
import os
import sys
import tempfile
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings

import gpuconv
from gpuconv import execute, plan, tuned
from gpuconv.cpu import vector_plan
from tests import backends, parts, repeat, tiers
from tests.backends import BACKENDS, HAS_GPU, IS_CUPY_ON_CPU, NO_EMULATION, NO_GPU
from tests.cupy_on_cpu import loaded
from tests.emulation import launcher, loader
from tests.golden import vectors

repeat.install()
settings.register_profile(
    "gpuconv", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("gpuconv")
# Hypothesis need not shrink the failure of a mutant.
settings.register_profile("mutants", settings.get_profile("gpuconv"), phases=(Phase.explicit, Phase.generate))

TOO_MANY = pytest.StashKey()  # whether a GPU would have compiled more modules than permitted


@pytest.fixture(params=[pytest.param(name, marks=backends.marks_of(name)) for name in BACKENDS])
def arrays(request):
    """Provide the arrays of each backend; calls compute on this backend during the test."""
    with backends.arrays_of(request.param) as made:
        yield made


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    """Remove environment variables and cached calls, so that they do not affect a test."""
    for variable in {*gpuconv.settings.DEFAULTS, "CUPY_TF32"} - {"GPUCONV_CACHE_DIR"}:
        monkeypatch.delenv(variable, raising=False)
    gpuconv.set_backend(None)
    execute.clear()  # also removes the plans of other tests


@pytest.fixture
def small_in_threads(monkeypatch):
    """Let several threads compute small convolutions as well."""
    monkeypatch.setattr(plan, "_SMALL", 1 << 19)


@pytest.fixture(autouse=True)
def _repeated_calls(request):
    """Repeat every call (tests/repeat.py) unless the test forbids it; with emulated kernels only in some tests."""
    backend = dict(request.node.user_properties).get("backend", "numpy")
    seed, every = request.config.getoption("repeat_seed"), request.config.getoption("repeat_every")
    drawn = zlib.crc32(f"{seed} {request.node.nodeid}".encode()) % every == 0
    if request.node.get_closest_marker("called_once") or (backend in backends.ON_CPU and not drawn):
        yield
        return
    with repeat.repeating(adds_atomically=backend != "numpy"):
        yield


@pytest.fixture(autouse=True)
def _working_device(request):
    """Report an illegal access in the test that made it, because all later tests of the process would fail."""
    yield
    if "cupy" not in sys.modules or IS_CUPY_ON_CPU or not HAS_GPU:
        return
    try:
        sys.modules["cupy"].cuda.runtime.deviceSynchronize()
    except Exception as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)  # xdist names the test and starts another worker
        pytest.exit(f"the device is unusable after {request.node.nodeid}: {error}")


@pytest.fixture(autouse=True)
def _few_compiled_kernels(request, monkeypatch):
    """Let tests of other things compile few kernels for a number of taps, since Numba takes seconds for each."""
    if request.path.name not in ("test_compiled.py", "test_recorded_plans.py"):
        monkeypatch.setattr(vector_plan, "UNROLLED", ((3, 1),))


@pytest.fixture
def rng():
    return np.random.default_rng(2024)


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="every combination of what the tests go through")
    parser.addoption(
        "--kernels",
        choices=loader.MODES,
        default=launcher.options.mode,
        help="how kernels are compiled for the CPU (default fast)",
    )
    parser.addoption(
        "--repeat-every",
        type=int,
        default=10,
        help="of N tests of emulated kernels one repeats its calls (default 10)",
    )
    parser.addoption("--repeat-seed", default="0", help="draws which one (default 0)")
    parts.add_options(parser)


def pytest_configure(config):
    _tune_elsewhere(config)
    tiers.full = config.getoption("full")
    parts.configure(config)
    launcher.options.mode = config.getoption("--kernels")
    if launcher.options.mode == "debug":
        launcher.options.seconds = 86400.0  # time for a breakpoint


def _tune_elsewhere(config):
    """Use a separate folder for results of ``tune``, so that those of the machine are neither used nor changed."""
    folder = tempfile.TemporaryDirectory(prefix="gpuconv-tuned-")
    config.add_cleanup(folder.cleanup)
    elsewhere = functools.wraps(tuned._folder)(lambda backend: Path(folder.name, backend.name))
    patch = mock.patch.object(tuned, "_folder", elsewhere)
    patch.start()
    config.add_cleanup(patch.stop)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Record the backend of each test, and run tests that need few kernels first, as they find most errors per time."""
    for item in items:
        item.user_properties.append(("backend", backends.backend_of(item)))
    items.sort(key=lambda item: (backends.backend_of(item) != "numpy", item.path.name in parts.MATRIX))
    parts.select(config, items)


def pytest_runtest_setup(item):
    if reason := backends.why_not(item):
        pytest.skip(reason)


def pytest_report_header():
    gpu = f"cupy on {backends.devices_by_driver()} device(s)" if HAS_GPU else f"no cupy: {NO_GPU}"
    kernels = f"no kernels on the CPU: {NO_EMULATION}" if NO_EMULATION else "kernels on the CPU (emulated)"
    python = f"Python {sys.version.split()[0]}"
    return f"gpuconv backends: numpy {np.__version__}, {kernels}, {gpu}; {python}"


def pytest_sessionfinish(session):
    """On an emulated GPU, limit the number of kernels that a run on a GPU would compile."""
    is_counted = loaded.FOLDER in os.environ and not session.config.getoption("full")
    if is_counted and loaded.counts()["gpuconv"] > loaded.MOST:
        session.config.stash[TOO_MANY] = True
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    counts, reasons = collections.Counter(), collections.defaultdict(collections.Counter)
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            backend = dict(getattr(report, "user_properties", [])).get("backend")
            counts[backend, outcome] += 1
            if outcome == "skipped":
                reasons[backend][report.longrepr[2].removeprefix("Skipped: ")] += 1
    terminalreporter.section("tests per backend")
    for backend in ("numpy", "emulated", "checked", "cupy"):
        line = ", ".join(f"{counts[backend, outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
        terminalreporter.write_line(f"{backend:<9} {line}")
        for reason, number in reasons[backend].most_common():
            terminalreporter.write_line(f"{'':<9} {number} skipped: {reason}")
    if loaded.FOLDER in os.environ:
        ours, others = loaded.counts().values()
        terminalreporter.write_line(
            f"a GPU would have compiled {ours} modules of gpuconv, without --full at most {loaded.MOST},"
            f" and {others} of CuPy"
        )
        if config.stash.get(TOO_MANY, False):
            terminalreporter.write_line("the run fails for it: the tests of a plain run need too many", red=True)
    if missing := vectors.unconfirmed():
        terminalreporter.write_line(
            f"{len(missing)} of {len(vectors.declared())} device functions were never compared with a GPU"
            f" (tests/golden): {', '.join(dict.fromkeys(name.partition('(')[0] for name in missing))}"
        )
