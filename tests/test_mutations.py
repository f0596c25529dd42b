"""Mutants of the kernels: rules apply where they should, and the recorded verdicts are of the current kernels."""

import collections
import json
import re
from pathlib import Path

import pytest

from tests import mutate_kernels
from tests.emulation import loader
from tests.equivalent_mutants import EQUIVALENT
from tests.mutants import FILES, RULES, mutants, read
from tests.mutate_kernels import RESULTS

RUN_AGAIN = "run python -m tests.mutate_kernels, and commit what it writes"


@pytest.fixture(scope="module")
def everything():
    return mutants()


def code_of(file):
    return re.sub(r"//.*", "", read(file))


def test_every_rule_is_applied_at_every_place_where_it_fits(everything):
    found = collections.Counter(mutant.rule for mutant in everything)
    assert set(found) == set(RULES)
    barriers = sum(code_of(file).count("__syncthreads();") for file in FILES)
    # Every atomic addition of these files; those of the primitives are in PTX or in the emulator.
    atomics = sum(len(re.findall(r"(?<!void )\batomic_add\(", code_of(file))) for file in FILES)
    assert (found["barrier dropped"], found["atomic addition made plain"]) == (barriers, atomics)
    for term in (" * conv.stride[axis]", " * conv.dilation[axis]", " - conv.low[axis]"):
        sites = sum(code_of(file).count(term) for file in FILES)
        dropped = [m for m in everything if m.rule == "term dropped" and m.before.count(term) > m.after.count(term)]
        assert sites == len(dropped) > 2


def test_mutants_change_one_line_of_code(everything):
    assert len({mutant.identity for mutant in everything}) == len(everything) > 1000
    for mutant in everything:
        before, after = (text.splitlines() for text in (read(mutant.file), mutant.text))
        changed = [i for i, (one, other) in enumerate(zip(before, after, strict=True), 1) if one != other]
        assert changed == [mutant.line]
        assert before[mutant.line - 1].partition("//")[2] == after[mutant.line - 1].partition("//")[2]
        assert (before[mutant.line - 1].strip(), after[mutant.line - 1].strip()) == (mutant.before, mutant.after)


@pytest.mark.parametrize("file", FILES)
def test_code_is_compared_in_modules_that_have_the_file(file):
    modules = mutate_kernels.modules_with(file)
    line = max(read(file).splitlines(), key=len)
    assert modules
    assert all(line in loader.emulated_source(module) for module in modules)


def test_mutants_know_their_kernel(everything):
    wheres = {(mutant.file, mutant.before): mutant.where for mutant in everything}
    for file, line, where in (
        ("direct.cu", "if (i >= splits * weights) return;", "direct_weight_grad"),
        ("split_sum.cu", "if (row > 0 || i >= elements.count) return;", "split_sum"),
        ("tiles.cuh", "exists[i] = unit() + i < along.count;", "tiles.cuh"),
        (
            "common.cuh",
            "DEVICE bool inside(Index i, Index extent) { return Unsigned(i) < Unsigned(extent); }",
            "common.cuh",
        ),
        ("direct.cu", "remainder -= back_remainder;", "direct.cu"),
    ):
        assert wheres[file, line] == where


def test_verdicts_are_of_these_kernels_and_at_least_95_percent_are_caught(everything):
    content = json.loads(RESULTS.read_text())
    assert mutate_kernels.is_current(content), RUN_AGAIN
    verdicts = {entry["id"]: entry for entry in content["mutants"]}
    assert set(verdicts) == {mutant.identity for mutant in everything}, RUN_AGAIN
    counts = collections.Counter(entry["verdict"] for entry in verdicts.values())
    assert set(counts) <= {"caught", "survived", "equivalent", "not compiled"}
    assert counts["caught"] >= 0.95 * (counts["caught"] + counts["survived"])
    for entry in verdicts.values():
        assert entry["by"] or entry["verdict"] == "survived"


def test_each_equivalent_mutant_has_a_reason(everything):
    verdicts = mutate_kernels.recorded()
    assert {mutant.identity for mutant in everything} <= set(verdicts), RUN_AGAIN
    places = collections.defaultdict(set)
    for mutant in everything:
        for stated in (mutate_kernels.key(mutant), mutate_kernels.place(mutant)):
            places[stated].add(verdicts[mutant.identity]["verdict"])
    for stated, reason in EQUIVALENT.items():
        assert len(reason) > 20
        assert places[stated] == {"equivalent"}, stated
    for entry in verdicts.values():
        if entry["verdict"] == "equivalent":
            assert entry["by"] == mutate_kernels.SAME_CODE or entry["by"] in EQUIVALENT.values()


def test_the_table_in_the_readme_is_that_of_the_verdicts():
    table = mutate_kernels.table(json.loads(RESULTS.read_text())["mutants"])
    assert table in (Path(__file__).parent / "README.md").read_text(), f"tests/README.md should have\n{table}"


def test_scores_leave_out_what_is_equivalent_or_does_not_compile():
    verdicts = ["caught"] * 19 + ["survived"] + ["equivalent"] * 5 + ["not compiled"] * 7
    entries = [{"where": "direct_forward", "verdict": verdict} for verdict in verdicts]
    entries += [{"where": "common.cuh", "verdict": "caught"}]
    assert mutate_kernels.table(entries).splitlines()[2:] == [
        "| `direct_forward` | 25 | 19 | 5 | 1 | 95.0 % |",
        "| common.cuh, shared | 1 | 1 | 0 | 0 | 100.0 % |",
        "| **all** | 26 | 20 | 5 | 1 | 95.2 % |",
    ]
