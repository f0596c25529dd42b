"""Calls do what the record says of them: a change that should change none changes no plan."""

import json

import pytest

import gpuconv
from gpuconv.geometry import Geometry
from tests import recorded_plans


@pytest.mark.parametrize("where, what", recorded_plans.GROUPS)
def test_plans_are_those_of_the_record(where, what):
    prefix = f"{where} {what}: "
    record = json.loads(recorded_plans.RECORD.read_text())
    before = {name: line for name, line in record.items() if name.startswith(prefix)}
    after = recorded_plans.found(where, what)
    pairs = {name: (before.get(name), after.get(name)) for name in before | after}
    changed = [f"{name}\n  {old}\n  {new}" for name, (old, new) in pairs.items() if old != new]
    some = "\n".join(changed[:5])
    assert not changed, (
        f"{len(changed)} of {len(before)} calls do something else now, among them\n{some}\n"
        "If they should: python -m tests.recorded_plans writes them anew"
    )


def test_the_record_tells_plans_apart():
    """By the number of steps, by the place of a view, and by its strides."""
    geometry = Geometry.infer((2, 8, 9, 9), (8, 8, 3, 3), padding=1)
    call = gpuconv.execute.Call(
        *(geometry, "numpy", recorded_plans.named_dtype("float32"), recorded_plans.NUMPY),
        *("im2col", True, "ieee", 64 << 20, 1),
    )
    calls = call, call._replace(limit=1 << 14), call._replace(geometry=Geometry.infer((2, 8, 9, 9), (8, 8, 3, 3)))
    texts = [recorded_plans.plan_text(one, "forward") for one in (*calls, call)]
    assert len(set(map(recorded_plans.short, texts))) == 3
    assert recorded_plans.short(texts[0]) == recorded_plans.short(texts[3])
    lying = calls[0]._replace(geometry=Geometry.infer((2, 9, 9, 8), (3, 3, 8, 8), padding=1, layout="channels_last"))
    assert recorded_plans.plan_text(lying, "forward") not in texts
