"""Mutants of the Python code: they are drawn and run correctly."""

import collections
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("cosmic_ray", reason='pip install -e ".[mutation]" has the tool that edits the sources')
pytest.importorskip("coverage")

from gpuconv.cpu.fft import _count
from gpuconv.dtypes import supported
from gpuconv.geometry import Geometry
from tests import mutate_python, python_mutants
from tests.equivalent_python import EQUIVALENT
from tests.mutation_runs import answered, in_child

SHAPES = (1, 1, 8, 8), (1, 1, 3, 3)
FEW = [f"gpuconv/{name}.py" for name in ("cpu/fft", "select", "dtypes")]


@pytest.fixture(scope="module")
def drawn():
    return list(python_mutants.drawn(20, 1, FEW))


def edited(file, before, after):
    """Return a mutant with a given edit."""
    text = (python_mutants.ROOT / file).read_text()
    assert text.count(before) == 1
    return python_mutants.Mutant(file, 0, "", "", before, after, text.replace(before, after), "")


def in_a_process(mutant, function):
    """Return the result of a function in a process that runs a mutant."""

    def run():
        python_mutants.Live().run(mutant.file, mutant.text)
        return function()

    return answered(*in_child(run))


def test_mutants_are_edits_inside_functions(drawn):
    assert drawn == list(python_mutants.drawn(20, 1, FEW)) != list(python_mutants.drawn(20, 2, FEW))
    files = collections.Counter(mutant.file for mutant in drawn)
    assert files[FEW[0]] > files[FEW[1]] > 0
    assert set(FEW) < set(python_mutants.files())
    assert not any("benchmark" in file or file.endswith("cli.py") for file in python_mutants.files())
    assert len({(mutant.file, mutant.line, mutant.after) for mutant in drawn}) == len(drawn) in range(20, 20 + len(FEW))
    for mutant in drawn:
        before, after = (python_mutants.ROOT / mutant.file).read_text().splitlines(), mutant.text.splitlines()
        assert before[: mutant.line - 1] == after[: mutant.line - 1]
        assert mutant.before != mutant.after
        assert f"def {mutant.where.partition('.')[0]}(" in "\n".join(before[: mutant.line])


def test_a_mutant_of_the_record_is_found_again(drawn):
    for mutant in drawn[::5]:
        entry = mutate_python.entry_of(mutant, "caught", "test_x.py::test_x", 1.0)
        assert python_mutants.found(entry) == mutant
        assert python_mutants.found(entry | {"id": "of another function"}) is None


@pytest.mark.parametrize(
    "file, before, after, function, right, wrong",
    [
        ("cpu/fft.py", "return -(-extent // size)", "return extent // size", lambda: _count(7, 2), 4, 3),
        (
            "dtypes.py",
            "return str(dtype.name) in NAMES",
            "return False",
            lambda: supported(np.dtype("f4")),
            True,
            False,
        ),
        ("geometry.py", "return math.prod(self.kernel)", "return 0", lambda: Geometry.infer(*SHAPES).taps, 9, 0),
    ],
    ids=["function", "kept results", "property"],
)
def test_every_function_that_exists_runs_the_edited_text(file, before, after, function, right, wrong):
    assert function() == right
    assert in_a_process(edited(f"gpuconv/{file}", before, after), function) == wrong
    assert function() == right


def test_at_least_95_percent_of_the_recorded_mutants_are_caught():
    """There are at least 1,000 mutants, from every file; at most one in twenty is equivalent, each with a reason."""
    entries = mutate_python.recorded().values()
    verdicts = collections.Counter(entry["verdict"] for entry in entries)
    counted = verdicts["caught"] + verdicts["survived"] + verdicts["equivalent"]
    assert set(verdicts) <= {"caught", "survived", "equivalent", "not run"}
    assert counted >= 1000
    assert verdicts["caught"] >= 0.95 * (counted - verdicts["equivalent"])
    assert verdicts["equivalent"] <= 0.05 * counted
    caught_by_tests = [entry for entry in entries if entry["verdict"] == "caught" and "::" in entry["by"]]
    assert sum(entry["alone"] for entry in caught_by_tests) > 0.9 * len(caught_by_tests)
    stated = {mutate_python.key(entry) for entry in entries if entry["verdict"] == "equivalent"}
    assert stated == set(EQUIVALENT)
    assert all(len(reason) > 20 for reason in EQUIVALENT.values())


def test_the_table_in_the_readme_is_that_of_the_record():
    table = mutate_python.table(mutate_python.recorded().values())
    assert table in (python_mutants.ROOT / "tests/README.md").read_text(), f"tests/README.md should have\n{table}"


def test_a_reason_makes_a_survivor_equivalent_and_nothing_else():
    survivor = {"file": "f", "where": "w", "before": "b", "after": "a", "verdict": "survived", "by": ""}
    stated = survivor | {"verdict": "equivalent", "by": "a reason that is no longer stated"}
    with mock.patch.dict(EQUIVALENT, {mutate_python.key(survivor): "it changes nothing"}):
        found = [mutate_python.judged(entry) for entry in (survivor, stated, survivor | {"verdict": "caught"})]
    assert [entry["verdict"] for entry in found] == ["equivalent", "equivalent", "caught"]
    assert found[1]["by"] == "it changes nothing"
    assert mutate_python.judged(stated) == survivor
