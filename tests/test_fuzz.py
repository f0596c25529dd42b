"""The search for failing calls finds planted bugs and prints a test that reproduces them."""

from unittest import mock

import pytest

import gpuconv
from gpuconv.cpu import im2col
from tests import calls, fuzz

pytestmark = pytest.mark.called_once("it plants faults that only some calls have")


def wrong_for_5_filters(original):
    def forward(x, w, y, geometry, planner):
        original(x, w, y, geometry, planner)
        if geometry.filters >= 5:
            planner.call(planner.xp.multiply, y.view, 2.0, out=y.view)

    return forward


def test_a_planted_fault_is_found_made_small_and_printed_as_a_test():
    with mock.patch.object(im2col, "forward", wrong_for_5_filters(im2col.forward)):
        (backend, steps), error = next(
            found for seed in range(20) if (found := fuzz.failure(seed, lambda number: None))
        )
        text = fuzz.as_test(backend, steps)
        scope = {}
        exec(text, scope)
        with pytest.raises(AssertionError, match="bound"):
            scope["test_found_by_search"]()
    assert "bound" in error
    assert len(steps) <= 2
    scope["test_found_by_search"]()


def test_a_call_that_is_wrong_when_it_is_repeated_is_found():
    """Example: a former bug omitted derivatives from cached calls."""
    step = calls.Call("conv", (1, 1, 3), (1, 1, 1), {"stride": (1,), "padding": ((0, 0),), "dilation": (1,)})
    original, made = gpuconv.conv, []

    def conv(*arguments, **options):
        result = original(*arguments, **options)
        made.append(result)
        return result if len(made) == 1 else made[0]

    calls.run("numpy", [step, step._replace(seed=1)])
    with mock.patch.object(gpuconv, "conv", conv), pytest.raises(AssertionError, match="bound"):
        calls.run("numpy", [step, step._replace(seed=1)])
