"""Other programs' own tests of convolutions, run on gpuconv: ``python -m tests.clients [NAME ...]``.

Each program is changed by the code of its section in gpuconv/compat/README.md. A run fails if a test fails, or if fewer
tests than stated pass through gpuconv. Programs that are not installed are skipped.
"""

import doctest
import importlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import gpuconv

HERE = Path(__file__).parent


class Suite(NamedTuple):
    """Tests of a program.

    These are the section of its change, the arguments of pytest, how many tests must call gpuconv, and its functions
    that the section calls.
    """

    heading: str
    tests: tuple[str, ...]
    least: int
    functions: tuple[str, ...] = ("gpuconv.conv", "gpuconv.conv_transpose", "gpuconv.conv_weight_grad")


SUITES = {
    "nengo": Suite(
        "Nengo",
        ("--pyargs", "nengo.builder.tests.test_transforms_conv", "nengo.tests.test_transforms_conv"),
        180,
    ),
    "keras": Suite(
        "Keras with the NumPy backend",
        ("--pyargs", "keras.src.ops.nn_test", "keras.src.layers.convolutional", "-k", "conv and not lora"),
        250,
    ),  # the tests of lora need another backend of Keras
    "pylops": Suite(
        "PyLops",
        ("test_convolve.py", "-k", "not (Convolve3D and float64)"),  # which take ten seconds
        28,
        ("gpuconv.compat.signal.convolve", "gpuconv.compat.signal.correlate"),
    ),
    "dezero": Suite("DeZero", ("--noconftest", str(HERE / "dezero_values.py")), 8),  # the package has no tests
}


def page(heading):
    """Return the code of a section of gpuconv/compat/README.md."""
    text = (Path(gpuconv.__file__).parent / "compat" / "README.md").read_text()
    section = text.partition(f"\n### {heading}\n")[2].partition("\n### ")[0]
    if examples := doctest.DocTestParser().get_examples(section):
        return "".join(example.source for example in examples)
    return section.partition("```python\n")[2].partition("```")[0]


def run_page(heading):
    """Execute the code of a section, and return the names that it defines."""
    names = {}
    exec(compile(page(heading), f"compat/README.md, {heading}", "exec"), names)
    return names


class Watch:
    """A plugin of pytest that counts the tests that passed, and those of them that called one of some functions."""

    def __init__(self, functions):
        self.calls = self.before = self.passed = self.served = 0
        for path in functions:
            module, _, name = path.rpartition(".")
            module = importlib.import_module(module)
            setattr(module, name, self.counted(getattr(module, name)))

    def counted(self, function):
        def call(*arguments, **options):
            self.calls += 1
            return function(*arguments, **options)

        return call

    def pytest_runtest_setup(self):
        self.before = self.calls

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            self.passed += 1
            self.served += self.calls > self.before


def run(name):
    """Run the tests of a program in this process and in the current folder, and return whether they hold."""
    suite = SUITES[name]
    watch = Watch(suite.functions)
    os.environ["KERAS_BACKEND"] = "numpy"
    vars(np).setdefault("int", int)  # which DeZero 0.0.13 uses
    run_page(suite.heading)
    status = pytest.main(["-q", "-p", "no:cacheprovider", "-c", os.devnull, "-W", "ignore", *suite.tests], [watch])
    print(f"{name} {importlib.metadata.version(name)}: {watch.passed} tests passed, {watch.served} of them on gpuconv")
    return status == 0 and watch.served >= suite.least


def why_not(name, folder):
    """Return why the tests of a program cannot run, or None; PyLops has its tests in the source distribution only."""
    if importlib.util.find_spec(name) is None:
        return "it is not installed"
    if name != "pylops":
        return None
    if importlib.util.find_spec("gpuconv.compat.signal") is None:
        return "gpuconv.compat.signal does not exist"
    pinned = f"{name}=={importlib.metadata.version(name)}"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        name,
        "--dest",
        folder,
        pinned,
    ]
    if subprocess.run(pip).returncode:
        return "its source distribution, which has the tests, cannot be downloaded"
    (archive,) = Path(folder).glob("*.tar.gz")
    with tarfile.open(archive) as files:
        (member,) = (each for each in files.getnames() if each.endswith("/pytests/test_convolve.py"))
        Path(folder, "test_convolve.py").write_bytes(files.extractfile(member).read())
    return None


def run_elsewhere(name):
    """Run the tests of a program in a new process and a new folder, and return whether they hold."""
    with tempfile.TemporaryDirectory() as folder:
        if reason := why_not(name, folder):
            print(f"{name}: skipped, {reason}")
            return True
        command = [sys.executable, "-c", f"from tests import clients; raise SystemExit(not clients.run({name!r}))"]
        environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
        return subprocess.run(command, cwd=folder, env=environment).returncode == 0


def main(names):
    failed = [name for name in names or SUITES if not run_elsewhere(name)]
    return f"failed: {', '.join(failed)}" if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
