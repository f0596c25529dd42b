"""The plans of calls agree with the record, so unintended changes of plans are detected."""

import functools
import json

import numpy as np
import pytest

from gpuconv.plan import Step
from gpuconv.views import View
from tests import recorded_plans, tiers

pytest.importorskip("ml_dtypes")


@pytest.mark.parametrize("where, what", recorded_plans.GROUPS)
def test_plans_are_those_of_the_record(where, what):
    """In a plain run, one in three calls of the record is planned."""
    before = json.loads(recorded_plans.RECORD.read_text())
    after = recorded_plans.found(where, what, 1 if tiers.full else 3)
    changed = [f"{name}\n  {before.get(name)}\n  {new}" for name, new in after.items() if before.get(name) != new]
    some = "\n".join(changed[:5])
    assert after
    assert not changed, (
        f"{len(changed)} of {len(after)} calls do something else now, among them\n{some}\n"
        "If they should: python -m tests.recorded_plans writes them anew"
    )


def test_the_record_has_every_group_and_nothing_else():
    names = list(json.loads(recorded_plans.RECORD.read_text()))
    assert {name.partition(": ")[0] for name in names} == {" ".join(group) for group in recorded_plans.GROUPS}
    calls = 0
    for group in recorded_plans.GROUPS:
        with recorded_plans.as_on_any_machine(group[0]):
            calls += sum(1 for _ in recorded_plans.calls_of(*group))
    assert calls == len(names) > 2000


@pytest.mark.parametrize(
    "other",
    [
        View(6, 64, (2, 3), (24, 8), np.dtype("f8")),
        View(6, 0, (2, 3), (24, -8), np.dtype("f8")),
        View(6, 0, (2, 3), (24, 8), np.dtype("i8")),
        View(7, 0, (2, 3), (24, 8), np.dtype("f8")),
        View(6, 0, (3, 2), (24, 8), np.dtype("f8")),
    ],
)
def test_a_step_is_told_from_one_on_another_view(other):
    view = View(6, 0, (2, 3), (24, 8), np.dtype("f8"))
    steps = [Step(np.copyto, (view, 0)), Step(np.copyto, (other, 0))]
    one, another = (list(recorded_plans.steps_text([step])) for step in steps)
    assert one != another


def test_a_step_is_told_from_one_with_other_options():
    lines = [
        list(recorded_plans.steps_text([Step(functools.partial(np.fft.fft, n=n, axis=axis), ())]))
        for n, axis in ((4, 0), (5, 0), (4, 1))
    ]
    assert len({str(line) for line in lines}) == 3
