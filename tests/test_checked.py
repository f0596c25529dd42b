"""Kernels on the CPU with every access checked: races, bounds, unset memory, alignment, overflow, copies in flight."""

import zlib

import pytest

from gpuconv.gpu import kernels_folder, scatter_plain
from gpuconv.select import MODULES
from tests import gradient_roads, tiers
from tests.cases import CASES, DIRECTIONS, DTYPES, KERNELS, LAYOUTS, is_taken
from tests.test_matrix import assert_right
from tests.tiers import combinations

# Combinations of a plain run: they differ in what kernels do. There are few dtypes, because each needs a compilation.
PLAIN = {
    ("direct", "float32"): ("3-D strided", "many channels", "depthwise stride 2"),
    ("depthwise", "float32"): ("depthwise",),
    ("scatter", "float32"): (
        "3x3",
        "padding beyond stride",
        "many channels",
        "several boxes",
        "taps further apart than a block reaches",
        "3-D taps further apart than a block reaches",
    ),
    ("scatter_plain", "complex64"): ("3x3", "3-D strided"),
    ("scatter_plain", "complex128"): ("3x3",),
    ("implicit_gemm", "complex64"): ("depthwise stride 2",),
    ("implicit_gemm", "float16"): ("dilation with stride", "3-D strided"),
    ("implicit_gemm", "bfloat16"): ("many channels",),
    ("implicit_gemm", "float64"): ("several boxes",),
}


def is_checked(case, algorithm, direction, dtype, **one):
    name = algorithm.removesuffix("_plain")
    if name == "scatter" and direction == "forward":  # it has no kernel
        return False
    if not tiers.full and case.name not in PLAIN.get((algorithm, dtype), ()):
        return False
    return is_taken(case, name, direction=direction, dtype=dtype, **one)


@combinations(
    arrays=["checked"],
    case=CASES,
    algorithm=(*KERNELS, "scatter_plain"),
    direction=DIRECTIONS,
    dtype=DTYPES,
    where=is_checked,
)
def test_kernels_do_nothing_forbidden(case, algorithm, direction, dtype, arrays, monkeypatch):
    """Kernels run in the natural order with 32-bit offsets, and in another order with 64-bit offsets."""
    monkeypatch.setitem(MODULES, "scatter_plain", scatter_plain)
    layout = LAYOUTS[zlib.crc32(f"{case.name} {algorithm} {dtype}".encode()) % 3]
    assert_right(arrays, case, algorithm, direction, dtype, layout)


@pytest.mark.checked
@pytest.mark.called_once("what one call reads and writes is counted")
@combinations(gradient=["dx", "dw"], layer=gradient_roads.LAYERS, turns=["layer"])
def test_the_table_of_the_roads_to_a_gradient_is_what_the_emulator_counts(layer, gradient):
    assert gradient_roads.row(layer, gradient) in (kernels_folder() / "README.md").read_text()
