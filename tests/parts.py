"""Parts of a run: tests drawn at random, and tests that did not pass in an earlier run."""

import random
from pathlib import Path

import pytest

# Files with many similar tests, over cases, layouts, dtypes and kernels.
MATRIX = tuple(
    f"test_{name}.py"
    for name in (
        *("matrix", "adjoint", "nonfinite", "implicit_gemm", "kernels", "checked"),
        *("padding_modes", "signal", "onnx"),
    )
)
DONE = pytest.StashKey()  # the names of tests that passed in an earlier run


def add_options(parser):
    parser.addoption(
        "--done", type=Path, metavar="FILE", help="leave out tests that FILE names; tests that pass are appended to it"
    )
    parser.addoption("--draw", type=int, metavar="N", help=f"of the tests in {', '.join(MATRIX)} run N only")
    parser.addoption("--draw-seed", default="0", help="draws which ones (default 0)")


def configure(config):
    if (path := config.getoption("done")) is not None:
        config.stash[DONE] = done(config, path)


def select(config, items):
    """Remove the tests from ``items`` that the options exclude."""
    names = set(config.stash.get(DONE, ()))
    left_out = {item for item in items if item.nodeid in names}
    if (number := config.getoption("draw")) is not None:
        left_out |= undrawn(items, number, config.getoption("draw_seed"))
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def undrawn(items, number, seed):
    """Return all tests of the files of MATRIX except ``number`` tests drawn at random."""
    of_matrix = [item for item in items if item.path.name in MATRIX]
    return set(of_matrix) - set(random.Random(seed).sample(of_matrix, min(number, len(of_matrix))))


def done(config, path):
    """Return the names of passed tests in a file; tests that pass from now on are appended to it.

    Workers of xdist receive the names from the process that started them, because a worker that replaces another must
    select the same tests.
    """
    if hasattr(config, "workerinput"):
        return config.workerinput["done"]
    names = path.read_text().splitlines() if path.exists() else []
    config.pluginmanager.register(_Done(path, names))
    return names


class _Done:
    def __init__(self, path, names):
        self.path, self.names = path, names
        self.passed = set()  # up to the end of their calls

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node):
        node.workerinput["done"] = self.names

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            self.passed.add(report.nodeid)
        if report.when == "teardown" and report.passed and report.nodeid in self.passed:  # the device still works
            with self.path.open("a") as file:
                print(report.nodeid, file=file)
