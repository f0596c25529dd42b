"""The tiers of the tests: the combinations of parameters with which a test runs.

``pytest`` runs a selection that every change must pass, ``pytest --full`` all combinations.
"""

import collections
import itertools

import pytest

from tests.backends import marks_of

full = False  # whether --full was given; conftest.py sets it before the tests are imported


def combinations(*, turns=(), where=None, **axes):
    """Parametrize a test with the product of the axes, restricted to combinations for which ``where`` is true.

    Without ``--full`` each combination of the other axes gets one combination of the axes named in ``turns``: the one
    whose values, and pairs of values with other axes, have occurred least often so far. If there are enough
    combinations, all pairs occur. An axis "arrays" has names of backends.
    """
    found = (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))
    chosen = [one for one in found if where is None or where(**one)]
    if not full:
        chosen = list(in_turns(chosen, turns))
    sets = [pytest.param(*one.values(), id=_id(one), marks=marks_of(one.get("arrays"))) for one in chosen]
    return pytest.mark.parametrize(tuple(axes), sets, indirect=["arrays"] if "arrays" in axes else [])


def compiles_much(arrays, **_):
    """Return whether a backend has time for the modules of all combinations: a plain run on a GPU has not."""
    return full or arrays != "cupy"


def in_turns(candidates, turns):
    """Return from each group of candidates that differ only in ``turns`` the one whose values occurred least so far."""
    groups, counts = collections.defaultdict(list), collections.Counter()
    for one in candidates:
        fixed = tuple(_text(value) for axis, value in one.items() if axis not in turns)
        groups[fixed].append((one, _counted(one, turns)))
    for group in groups.values():
        chosen, counted = min(group, key=lambda pair: sum(map(counts.__getitem__, pair[1])))
        counts.update(counted)
        yield chosen


def _counted(combination, turns):
    """Return each (axis, value) of an axis in ``turns``, and its pairs with the other axes."""
    values = [(axis, _text(value)) for axis, value in combination.items()]
    pairs = [(one, other) for one, other in itertools.combinations(values, 2) if one[0] in turns or other[0] in turns]
    return [value for value in values if value[0] in turns] + pairs


def _id(combination):
    return "-".join(map(_text, combination.values()))


def _text(value):
    if isinstance(value, tuple) and not hasattr(value, "name"):
        return "x".join(map(str, value))
    return str(getattr(value, "name", value))
