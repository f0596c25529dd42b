"""The combinations of parameters of tests, and the tests of a run."""

import collections
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

import gpuconv
from tests import mutation_runs, parts, test_matrix, tiers
from tests.backends import HAS_GPU
from tests.cases import CASES, DIRECTIONS, DTYPES, LAYOUTS, is_on, is_taken


def of_matrix():
    """Return the combinations of the matrix in this run."""
    (mark,) = (mark for mark in test_matrix.test_result_is_right.pytestmark if mark.name == "parametrize")
    names, sets = mark.args
    return [dict(zip(names, one.values, strict=True)) for one in sets]


def test_in_turns_every_pair_of_values_occurs():
    axes = {"case": range(40), "dtype": DTYPES, "layout": LAYOUTS}
    product = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    chosen = list(tiers.in_turns(product, ["dtype", "layout"]))
    assert [one["case"] for one in chosen] == list(range(40))
    counts = collections.Counter((one["dtype"], one["layout"]) for one in chosen)
    assert len(counts) == 18
    assert set(counts.values()) <= {2, 3}


def test_one_axis_takes_turns_along_another():
    candidates = [{"case": case, "dtype": dtype} for case in range(9) for dtype in DTYPES[:3]]
    chosen = [one["dtype"] for one in tiers.in_turns(candidates, ["dtype"])]
    assert collections.Counter(chosen) == dict.fromkeys(DTYPES[:3], 3)


def test_the_matrix_has_each_case_with_each_algorithm_and_direction():
    found = {(one["arrays"], one["case"].name, one["algorithm"], one["direction"]) for one in of_matrix()}
    for arrays, case, algorithm, direction in itertools.product(
        ("numpy", "emulated"), CASES, gpuconv.ALGORITHMS, DIRECTIONS
    ):
        taken = is_taken(case, algorithm, arrays, direction)
        assert ((arrays, case.name, algorithm, direction) in found) == taken


# How many of the cases an algorithm computes, at least. With fewer than FEW, dtypes and layouts have not enough turns.
CASES_OF = {
    "im2col": 55,
    "scatter": 53,
    "direct": 53,
    "implicit_gemm": 53,
    "fft": 30,
    "winograd": 10,
    "depthwise": 8,
}
FEW = 8


def test_no_algorithm_refuses_most_cases():
    """This detects a rule that starts to refuse everything."""
    counts = collections.Counter((one["arrays"], one["algorithm"], one["direction"]) for one in of_matrix())
    assert set(CASES_OF) == set(gpuconv.ALGORITHMS)
    for arrays, algorithm, direction in itertools.product(("numpy", "emulated"), CASES_OF, DIRECTIONS):
        if is_on(arrays, algorithm):
            assert counts[arrays, algorithm, direction] >= CASES_OF[algorithm], (arrays, algorithm, direction)


def test_the_matrix_has_all_pairs():
    """Pairs of dtypes, layouts, algorithms, directions, backends (not complex winograd); cases with the first two."""
    axes = {
        "arrays": ("numpy", "emulated"),
        "algorithm": gpuconv.ALGORITHMS,
        "direction": DIRECTIONS,
        "dtype": DTYPES,
        "layout": LAYOUTS,
    }
    for one, other in itertools.combinations(axes, 2):
        pairs = {(combination[one], combination[other]) for combination in of_matrix()}
        missing = set(itertools.product(axes[one], axes[other])) - pairs
        missing = {pair for pair in missing if CASES_OF.get(pair[0], FEW) >= FEW}
        kernels_only = {("numpy", "direct"), ("numpy", "implicit_gemm")}
        assert missing <= kernels_only | {("winograd", "complex64"), ("winograd", "complex128")}
    for axis in ("dtype", "layout"):
        pairs = {(combination["case"].name, combination[axis]) for combination in of_matrix()}
        assert pairs == set(itertools.product((case.name for case in CASES), axes[axis]))


def test_the_table_of_tiers_has_the_counts_of_a_whole_run(request):
    """The counts agree within 10 %, since they depend on the installed packages."""
    some = request.config.option.markexpr or request.config.args != request.config.getini("testpaths")
    if some or tiers.full or HAS_GPU:
        pytest.skip("it counts the tests of a plain run of all files, without a GPU")
    items = request.session.items
    checked = [item for item in items if item.get_closest_marker("checked")]
    for tier, found in (("plain", items), ("of it, checked", checked)):
        stated = int(table_of_tiers()[tier][2].replace(",", ""))
        assert abs(len(found) - stated) <= 0.1 * stated, (tier, len(found))
    assert len(items) <= 6000


def test_the_table_of_tiers_has_the_scores_of_the_records():
    tests = Path(__file__).parent
    scores = []
    for record in ("mutations.json", "python_mutations.json"):
        entries = json.loads((tests / record).read_text())["mutants"]
        scores.append(mutation_runs.table(entries, lambda entry: entry["file"]).rpartition("| ")[2].strip(" |"))
    assert table_of_tiers()["plain"][5] == "kernels {}, Python {}".format(*scores)


def table_of_tiers():
    """Return the cells of each tier's row in tests/README.md."""
    text = (Path(__file__).parent / "README.md").read_text().partition("## Tiers")[2].partition("\n\nSeconds")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()]
    return {row[0]: row for row in rows}


def test_a_run_goes_on_where_another_ended(tmp_path):
    passed, root = tmp_path / "passed.txt", Path(__file__).parents[1]
    words = (
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        f"--done={passed}",
        "tests/test_views.py::test_where_memory_begins",
    )
    for said, status in (("1 passed", 0), ("1 deselected", 5)):
        run = subprocess.run([sys.executable, *words], cwd=root, capture_output=True, text=True)
        assert run.returncode == status, run.stdout
        assert said in run.stdout
        assert len(passed.read_text().splitlines()) == 1


def test_a_test_that_breaks_the_device_has_not_passed(tmp_path):
    """Its call passes, and the check of the device after it fails."""
    noted = parts._Done(tmp_path / "passed", [])
    for name, teardown in (("right", "passed"), ("breaking", "failed")):
        for when, outcome in (("setup", "passed"), ("call", "passed"), ("teardown", teardown)):
            noted.pytest_runtest_logreport(pytest.TestReport(name, ("", 0, ""), {}, outcome, None, when))
    assert (tmp_path / "passed").read_text() == "right\n"
