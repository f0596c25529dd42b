"""Building libraries ahead: what tests will launch is found before they run, and built meanwhile by another process.

``python -m tests.emulation.ahead`` is that process: it reads modules, one a line.
"""

import ast
import contextlib
import inspect
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from gpuconv.cuda.kernel import Module
from tests.emulation import launcher, loader

REPOSITORY = Path(__file__).parents[2]


@contextlib.contextmanager
def building():
    """Gives a function that has the library of a module built, in its turn, while this lasts."""
    import fcntl  # which only the systems have that run kernels

    loader.runtime()  # of which two processes would build one each
    command = (sys.executable, "-m", __name__)
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, text=True, bufsize=1) as process:
        fcntl.fcntl(process.stdin, fcntl.F_SETPIPE_SZ, 1 << 20)  # room for all, so that nobody waits
        yield lambda module: print(repr(tuple(module)), file=process.stdin)
        process.terminate()


def rehearse(tests, arrays_of, build):
    """Has built what tests launch, as far as they get where kernels compute nothing and nothing is compared.

    ``arrays_of`` makes their arrays.
    """
    seen = set()

    def remember(kernel, grid, block, arguments, shared_memory=0):
        if kernel.module not in seen:
            seen.add(kernel.module)
            build(kernel.module)
        return lambda *arguments: None

    idle = launcher.EMULATED._replace(launch=remember)
    with (
        mock.patch.object(launcher, "EMULATED", idle),
        mock.patch.object(np.testing, "assert_array_equal"),
        arrays_of("emulated") as arrays,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        for test in tests:
            given = {**test.callspec.params, "arrays": arrays, "rng": np.random.default_rng(0)}
            names = inspect.signature(test.obj).parameters
            if set(names) <= set(given):
                with contextlib.suppress(Exception, pytest.skip.Exception):
                    test.obj(**{name: given[name] for name in names})


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    for line in sys.stdin:
        with contextlib.suppress(loader.BuildError):  # the test that launches it will say what is wrong
            loader.library_file(loader.emulated_source(Module(*ast.literal_eval(line))), "fast")
