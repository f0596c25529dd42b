"""The emulator detects planted bugs: changed lines of correct kernels (planted_bugs.py).

The correct kernel has no report and the right result in every schedule. The changed one is detected as often as stated,
and the report of checked mode has the error and its location.
"""

import itertools
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from gpuconv.gpu import kernels_folder, scatter_plain
from gpuconv.gpu.kernel import files_of
from gpuconv.select import MODULES
from tests import planted_bugs, tiers
from tests.backends import arrays_of
from tests.emulation import launcher
from tests.emulation.edited import edited, replaced
from tests.emulation.loader import EmulationError
from tests.emulation.planted import kernel, launch
from tests.planted_bugs import BUGS, Shipped, Small
from tests.test_matrix import BY_NAME, computed, exact
from tests.tiers import combinations

pytestmark = pytest.mark.emulated

# The order of threads and blocks, and whether asynchronous copies take place as late as possible.
SCHEDULES = (("natural", True), ("natural", False), ("reverse", True), ("random", True), ("random", False))


def outcomes(bug, source, mode):
    """Return for each schedule the report of the emulator, "wrong result" or None."""
    found = []
    for number, (order, late_copies) in enumerate(SCHEDULES):
        how = {"mode": mode, "order": order, "late_copies": late_copies, "seed": itertools.count(number)}
        try:
            with launcher.using(**how):
                right = run(bug.place, source, how)
            found.append(None if right else "wrong result")
        except EmulationError as error:
            found.append(str(error))
    return found


def run(place, source, how):
    """Run the kernel with this source and return whether its result is right."""
    if isinstance(place, Shipped):
        with (
            edited(place.file, source),
            arrays_of("emulated") as arrays,
            mock.patch.dict(MODULES, scatter_plain=scatter_plain),
        ):
            case = BY_NAME[place.case]
            result = computed(arrays, case, place.algorithm, place.direction, place.dtype, place.layout, integers=True)
        return np.array_equal(result, exact(place.case, place.dtype, place.direction, True))
    x = np.arange(1, place.inputs + 1, dtype=np.float32)
    expected = place.expected(x)
    y = np.zeros(len(expected), np.float32)
    launch(source, (x, y), block=place.block, **how)
    return np.array_equal(y, expected)


def sources(bug):
    """Return the correct source, the wrong one, and its name in reports."""
    if isinstance(bug.place, Shipped):
        right = (kernels_folder() / bug.place.file).read_text()
        return right, replaced(bug.place.file, bug.place.kernel, bug.right, bug.wrong)
    assert bug.place.body.count(bug.right) == 1
    twins = bug.place.body, bug.place.body.replace(bug.right, bug.wrong)
    return tuple(kernel("const float* x, float* y", body) for body in twins)


def is_small(bug, mode):
    """Return whether a bug is tested; a plain run omits package kernels in checked mode, which compile for seconds."""
    return tiers.full or mode == "fast" or isinstance(bug.place, Small)


@combinations(bug=BUGS, mode=["fast", "checked"], where=is_small, turns=["mode"])
def test_the_right_kernel_is_silent_in_every_schedule(bug, mode):
    right, _ = sources(bug)
    assert outcomes(bug, right, mode) == [None] * len(SCHEDULES)


@combinations(bug=BUGS, mode=["checked", "fast"], where=is_small, turns=["mode"])
def test_what_is_stated_is_found_and_checked_mode_names_the_line(bug, mode):
    _, wrong = sources(bug)
    found = outcomes(bug, wrong, mode)
    assert summary(found) == getattr(bug, mode)
    if mode == "checked" and "reported" in bug.checked:
        places = [place for text in bug.lines for place in places_of(text, bug, wrong)]
        for report in found:
            assert bug.words in report
            assert any(re.search(rf"{re.escape(place)}\b", report) for place in places), f"{places} in\n{report}"


def places_of(text, bug, source):
    """Return the lines with this text, as they are named in reports."""
    if isinstance(bug.place, Shipped):
        stem = bug.place.algorithm.removesuffix("_plain")
        files = {name: (kernels_folder() / name).read_text() for name in files_of(stem)} | {bug.place.file: source}
    else:
        files = {"planted.cu": source}
    places = [
        f"{name}:{number}"
        for name, content in files.items()
        for number, line in enumerate(content.splitlines(), 1)
        if text in line
    ]
    assert places, f"no line has {text!r}"
    return places


def summary(found):
    reported = sum(outcome not in (None, "wrong result") for outcome in found)
    wrong = found.count("wrong result")
    parts = [
        f"{name} {count}/{len(found)}" for name, count in (("reported", reported), ("wrong result", wrong)) if count
    ]
    return ", ".join(parts) or "no"


def test_most_twins_are_shipped_kernels():
    shipped = [bug for bug in BUGS if isinstance(bug.place, Shipped)]
    assert len(shipped) >= len(BUGS) / 2
    assert len({bug.name for bug in BUGS}) == len(BUGS)


def test_a_wrong_swizzle_shows_in_the_profile():
    bug = next(bug for bug in BUGS if "swizzle" in bug.name)
    costs = []
    for source in sources(bug):
        x, y = np.zeros(256, np.float32), np.zeros(128, np.float32)
        launched = launch(source, (x, y), mode="checked", profiled=True)
        costs += [access.cost / access.requests for access in launched.accesses if access.width == 16]
    assert costs == [4, 8]


def test_the_table_in_the_readme_is_what_is_stated():
    readme = (Path(__file__).parent / "README.md").read_text()
    assert planted_bugs.table() in readme, f"tests/README.md should have\n{planted_bugs.table()}"
