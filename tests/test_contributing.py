"""The example of CONTRIBUTING.md is a complete algorithm."""

import re
import types
from pathlib import Path
from unittest import mock

import pytest

import gpuconv
from gpuconv.select import MODULES
from tests import test_matrix
from tests.cases import CASES, DIRECTIONS, why_not

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"


@pytest.fixture(scope="module", autouse=True)
def _registered():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    module = types.ModuleType("gpuconv.cpu.pointwise")
    exec(code, module.__dict__)
    with mock.patch.dict(MODULES, pointwise=module):
        yield
    gpuconv.clear_cache()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout, dtype", [("channels_first", "float16"), ("channels_last", "complex64")])
def test_the_example_of_an_algorithm_is_right(direction, layout, dtype, arrays):
    taken = [case for case in CASES if why_not(case, "pointwise", direction) is None]
    assert len(taken) > 1
    for case in taken:
        test_matrix.assert_right(arrays, case, "pointwise", direction, dtype, layout)


def test_it_is_refused_with_its_reason():
    with pytest.raises(ValueError, match="it requires kernels of one element without stride, padding and groups"):
        gpuconv.explain((1, 2, 4, 4), (3, 2, 3, 3), algorithm="pointwise", backend="numpy")


def test_auto_weighs_it_by_its_estimate():
    explanation = gpuconv.explain((1, 8, 4, 4), (8, 8, 1, 1), backend="numpy")
    assert "pointwise" in str(explanation)
    assert "ms on one core (estimate)" in dict(explanation.refused).get("pointwise", explanation.reason)
