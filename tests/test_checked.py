"""Kernels on the CPU with every access checked: races, bounds, unset memory, alignment, overflow, copies in flight.

Slower, and so on fewer of the matrix's tests: every case, algorithm, direction and dtype, each in one of the layouts,
in turns, and of implicit_gemm every seventh; and the plain twins of scatter. Run by ``pytest -m checked``.
"""

import itertools
import zlib

import pytest

from gpuconv.algorithms import scatter_plain
from gpuconv.choose import MODULES
from gpuconv.cuda import kernels_folder
from tests import gradient_roads
from tests.cases import CASES, DIRECTIONS, DTYPES, LAYOUTS
from tests.conftest import arrays_of
from tests.emulation import launcher
from tests.selection import KERNELS
from tests.test_matrix import assert_right

pytestmark = pytest.mark.checked

COMBINATIONS = [
    (case, algorithm, direction, dtype)
    for number, (case, algorithm, direction, dtype) in enumerate(
        itertools.product(CASES, (*KERNELS, "scatter_plain"), DIRECTIONS, DTYPES)
    )
    if not (direction == "forward" and "scatter" in algorithm)  # which has no kernel
    if algorithm != "implicit_gemm" or number % 7 == 0  # whose many modules take long to compile
]


@pytest.fixture(autouse=True)
def _checked():
    with launcher.using(mode="checked"):
        yield


@pytest.fixture
def arrays():
    with arrays_of("emulated") as made:
        yield made


@pytest.mark.parametrize(
    "case, algorithm, direction, dtype", COMBINATIONS, ids=lambda value: getattr(value, "name", value)
)
def test_kernels_do_nothing_forbidden(case, algorithm, direction, dtype, arrays, monkeypatch):
    """In the natural order with 32-bit offsets, and in another one with 64-bit offsets."""
    monkeypatch.setitem(MODULES, "scatter_plain", scatter_plain)
    arrays.skip_where_refused(case, algorithm, dtype, direction)
    layout = LAYOUTS[zlib.crc32(f"{case.name} {algorithm} {dtype}".encode()) % 3]
    assert_right(arrays, case, algorithm, direction, dtype, layout)


def test_the_table_of_the_roads_to_a_gradient_is_what_the_emulator_counts():
    assert gradient_roads.table() in (kernels_folder() / "README.md").read_text()
