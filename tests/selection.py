"""Selects the tests of a run: of those that need kernels of their own some, with ``--whole`` all on CuPy."""

import collections
import random

import numpy as np
import pytest

import gpuconv
from gpuconv.cuda import kernels_folder
from tests.cases import CASES, DIRECTIONS, DTYPES, LAYOUTS, in_turn

KERNELS = tuple(name for name in gpuconv.ALGORITHMS if (kernels_folder() / f"{name}.cu").exists())
KERNELS_ONLY = ("direct", "implicit_gemm")  # algorithms that NumPy does not have
MANY_MODULES, OF_MANY_MODULES = "implicit_gemm", "test_implicit_gemm.py"  # has kernels for every layout and dtype
FEW_DTYPES = ("float16", "float32", "complex64")  # on CuPy, of algorithms without kernels of ours
# Files of tests that go through cases, layouts, dtypes and kernels: many tests of a kind.
MATRIX = ("test_matrix.py", "test_adjoint.py", "test_nonfinite.py", "test_implicit_gemm.py", "test_kernels.py")


def parameters(item):
    """What a test is called with."""
    return item.callspec.params if hasattr(item, "callspec") else {}


def backend_of(item):
    """The backend that a test runs on."""
    if "arrays" in parameters(item):
        return parameters(item)["arrays"]
    names = {"emulated": "emulated", "checked": "checked", "gpu": "cupy"}
    return next((name for marker, name in names.items() if item.get_closest_marker(marker)), "numpy")


def needless(items, whole):
    """The tests that a run does without."""
    rules = {"numpy": _on_numpy, "emulated": _emulated, "checked": _all, "cupy": _all if whole else _on_cupy}
    counts = collections.Counter()
    return [item for item in items if not rules[backend_of(item)](item, parameters(item), counts)]


def turn(item):
    """What tests are sorted by: what needs no kernels comes first, the time to compile those of later tests."""
    return parameters(item).get("arrays") != "numpy", item.path.name in MATRIX


def undrawn(items, number, seed):
    """All tests of the files of MATRIX but ``number``, which are drawn at random."""
    of_matrix = [item for item in items if item.path.name in MATRIX]
    drawn = set(random.Random(seed).sample(of_matrix, min(number, len(of_matrix))))
    return [item for item in of_matrix if item not in drawn]


def done(config, path):
    """The names of the tests that a file says have passed; from now on those that pass are added to it.

    Workers of xdist are told by the process that started them: one that replaces another must select the same tests.
    """
    if hasattr(config, "workerinput"):
        return config.workerinput["done"]
    names = path.read_text().splitlines() if path.exists() else []
    config.pluginmanager.register(_Done(path, names))
    return names


class _Done:
    def __init__(self, path, names):
        self.path, self.names = path, names

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node):
        node.workerinput["done"] = self.names

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            with self.path.open("a") as file:
                print(report.nodeid, file=file)


def _all(*_):
    return True


def _on_numpy(item, params, counts):
    """fft reads every layout alike; NaN and Inf, without kernels of our own, take turns."""
    if params.get("algorithm") in KERNELS_ONLY:
        return False
    if not {"case", "layout"} <= set(params):
        return True
    case, layout = params["case"], params["layout"]
    if params.get("algorithm") == "fft" and not in_turn(case, layout, params.get("dtype", "float64")):
        return False
    turn = CASES.index(case) + LAYOUTS.index(layout)
    return "value" not in params or (np.nan, np.inf, -np.inf).index(params["value"]) == turn % 3


def _emulated(item, params, counts):
    """Algorithms without kernels of ours repeat NumPy's tests: every fifth case runs."""
    if {"case", "layout"} <= set(params) and _has_variants(params):
        if params["algorithm"] not in KERNELS and CASES.index(params["case"]) % 5:
            return False
        return in_turn(params["case"], params["layout"], params.get("dtype", "float64"))
    return _is_nth(item, params, counts)


def _on_cupy(item, params, counts):
    """By algorithms of many kernels, CuPy's too, a case runs in one combination of layout, dtype and direction."""
    dtypes = DTYPES if params.get("algorithm") in (None, *KERNELS) else FEW_DTYPES
    if params.get("dtype", "float32") not in dtypes:
        return False
    if "case" not in params or "algorithm" not in params:
        return _is_nth(item, params, counts)
    if "layout" in params and not _has_variants(params):
        return in_turn(params["case"], params["layout"], params.get("dtype", "float64"))
    axes = {"layout": LAYOUTS, "dtype": dtypes, "direction": DIRECTIONS, "value": (np.nan, np.inf, -np.inf)}
    turn, turns = CASES.index(params["case"]), 1
    for name, values in axes.items():
        if name in params:
            turn += turns * values.index(params[name])
            turns *= len(values)
    return turn % turns == 0


def _has_variants(params):
    """Whether the algorithm has kernels for every layout and dtype, CuPy's or ours."""
    return params.get("algorithm") == MANY_MODULES or params.get("algorithm") not in (None, *KERNELS)


def _is_nth(item, params, counts):
    """Whether a test is the first of every n that differ by their kernels."""
    backend, marker, n = backend_of(item), item.get_closest_marker("every_nth"), 1
    if marker is not None:
        n = marker.args[0]
    elif params.get("algorithm") == MANY_MODULES:
        n = 3
    if backend == "cupy" and (item.path.name == OF_MANY_MODULES or params.get("algorithm") == MANY_MODULES):
        n *= 5
    if n > 1:
        counts[backend, item.originalname] += 1
    return n == 1 or counts[backend, item.originalname] % n == 1
