"""Which tests a run has."""

import collections
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ahead, selection
from tests.cases import CASES, DIRECTIONS, DTYPES, LAYOUTS
from tests.conftest import LEFT_OUT, LONG, arrays_of


@pytest.mark.parametrize("name, dtypes", [("implicit_gemm", DTYPES), ("im2col", selection.FEW_DTYPES)])
def test_on_a_gpu_each_case_runs_once_and_each_combination_has_a_case(name, dtypes):
    combinations = list(itertools.product(DIRECTIONS, dtypes, LAYOUTS))
    cases, found = collections.Counter(), set()
    for case, combination in itertools.product(CASES, combinations):
        chosen = dict(zip(("direction", "dtype", "layout"), combination, strict=True))
        if selection._on_cupy(None, {"case": case, "algorithm": name, **chosen}, {}):
            cases[case.name] += 1
            found.add(combination)
    assert cases == dict.fromkeys((case.name for case in CASES), 1)
    assert found == set(combinations)


def test_a_run_on_a_gpu_compiles_few_modules(request):
    """Each takes NVRTC a second or more. CuPy's own are counted where they are loaded."""
    tests, found = request.config.stash.get(LEFT_OUT, ()), set()
    if len(tests) < LONG:
        pytest.skip("not all tests were selected")
    ahead.find_modules(tests, "emulated", arrays_of, found.add)
    assert 150 < len(found) <= 250


def test_a_run_goes_on_where_another_ended(tmp_path):
    passed, root = tmp_path / "passed.txt", Path(__file__).parents[1]
    words = "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "each_case", "--done", str(passed)
    for said, status in (("2 passed", 0), ("4 deselected", 5)):
        run = subprocess.run([sys.executable, *words], cwd=root, capture_output=True, text=True)
        assert run.returncode == status, run.stdout
        assert said in run.stdout
        assert passed.read_text().count("each_case_runs_once") == 2
