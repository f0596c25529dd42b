"""Compiling ahead: what tests will launch is found before they run, and compiled while the first of them do.

For a GPU threads compile it by NVRTC, for the CPU another process by g++: ``python -m tests.ahead``, which reads
modules, one a line.
"""

import ast
import contextlib
import inspect
import os
import signal
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from gpuconv import dtypes, execute
from gpuconv.algorithms import direct, scatter, scatter_plain
from gpuconv.backend import cupy_backend
from gpuconv.cuda import arguments, cache, compiler, report
from gpuconv.cuda.kernel import Module
from tests import selection
from tests.cases import CASES
from tests.emulation import loader

REPOSITORY = Path(__file__).parents[1]


@contextlib.contextmanager
def for_gpu():
    """Gives a function that has a module compiled for the device at hand while this lasts, and returns the job."""
    architecture = compiler.architecture_for(cupy_backend().xp.cuda.Device().compute_capability)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            yield lambda module: pool.submit(cache.cubin_path, module, architecture)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def for_cpu():
    """Gives a function that has a module compiled for the CPU while this lasts."""
    import fcntl  # which only the systems have that run kernels

    loader.runtime()  # of which two processes would build one each
    command = (sys.executable, "-m", __name__)
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, text=True, bufsize=1) as process:
        fcntl.fcntl(process.stdin, fcntl.F_SETPIPE_SZ, 1 << 20)  # room for all, so that nobody waits
        try:
            yield lambda module: print(repr(tuple(module)), file=process.stdin)
        finally:
            process.terminate()


def find_modules(tests, backend, arrays_of, found):
    """Calls ``found`` with the modules that tests launch; ``arrays_of(backend)`` makes their arrays."""
    for module in of_cases():
        found(module)
    _rehearse([test for test in tests if _has_others(test)], backend, arrays_of, found)


def of_cases():
    """The modules of direct and scatter in all cases, with 32-bit and 64-bit offsets."""
    convolutions = [(case.geometry(), dtype) for case in CASES for dtype in dtypes.available()]
    possible = [(geometry, dtype) for geometry, dtype in convolutions if not arguments.why_not(geometry)]
    for module in report.launched(possible, [direct, scatter, scatter_plain]):
        yield module
        yield module._replace(wide=True)


def _has_others(test):
    params, is_of_matrix = selection.parameters(test), test.path.name in selection.MATRIX
    return is_of_matrix and "arrays" in params and params.get("algorithm") in (None, selection.MANY_MODULES)


def _rehearse(tests, backend, arrays_of, found):
    """Runs tests as far as they get where kernels compute nothing and nothing is compared."""
    modules = {}
    with (
        arrays_of(backend) as arrays,
        mock.patch.object(execute, "backend_for", return_value=report.recording(arrays.backend, modules)),
        mock.patch.object(np.testing, "assert_array_equal"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        for test in tests:
            given = {**test.callspec.params, "arrays": arrays, "rng": np.random.default_rng(0)}
            names, before = inspect.signature(test.obj).parameters, len(modules)
            if set(names) <= set(given):
                with contextlib.suppress(Exception, pytest.skip.Exception, pytest.fail.Exception):
                    test.obj(**{name: given[name] for name in names})
            for module in list(modules)[before:]:
                found(module)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    for line in sys.stdin:
        with contextlib.suppress(loader.BuildError):  # the test that launches it will say what is wrong
            loader.library_file(loader.emulated_source(Module(*ast.literal_eval(line))), "fast")
