"""Packed copies of images for implicit_gemm: exact, alike alone and in a batch, within the workspace, and only if useful."""

import numpy as np
import pytest

import gpuconv
from gpuconv import execute
from gpuconv.geometry import Geometry
from gpuconv.gpu import gemm_packing
from gpuconv.gpu.gemm_layout import Lines, matrices_of
from gpuconv.operands import contiguous
from tests.backends import BACKENDS, on
from tests.cases import DIRECTIONS, named_dtype
from tests.test_implicit_gemm import KINDS, Problem, planned
from tests.tiers import combinations

EMULATED = on("emulated")
# x, w and settings of layers whose images are packed: a stem, odd channels, groups, one and three axes.
LAYERS = {
    "stem": ((2, 3, 15, 14), (8, 3, 7, 7), {"stride": 2, "padding": 3}),
    "odd channels": ((2, 5, 9, 7), (6, 5, 3, 3), {"padding": 1}),
    "groups": ((2, 12, 7, 7), (8, 6, 3, 3), {"padding": 1, "groups": 2}),
    "1-D": ((3, 4, 31), (8, 4, 9), {"padding": 4, "dilation": 1}),
    "3-D": ((1, 4, 5, 6, 5), (4, 4, 3, 3, 3), {"padding": 1}),
}


@combinations(
    arrays=BACKENDS[1:],
    kind=[kind for kind in KINDS if kind not in ("float32", "complex64", "complex128")],
    direction=DIRECTIONS,
    layer=LAYERS,
    turns=["direction", "layer"],
)
def test_packed_images_give_exact_results(kind, direction, layer, arrays):
    """Copies are at least two elements wide, and those of 16-bit numbers are asynchronous."""
    dtype, precision = KINDS[kind]
    x, w, settings = LAYERS[layer]
    problem = Problem(x, w, dtype, **settings)
    with planned() as constants:
        result = problem.computed(arrays, direction, precision=precision)
    np.testing.assert_array_equal(result, problem.exact(direction).astype(result.dtype))
    packs = direction != "weight_grad" or problem.geometry.group_channels % 2 == 0
    if packs and named_dtype(dtype).itemsize < 8:
        assert constants[0]["LEFT_VECTOR"] >= 2
        assert constants[0]["LEFT_ALONG_DEPTH"] == (direction != "weight_grad")


@EMULATED
@pytest.mark.parametrize("direction", ["forward", "data_grad"])
def test_an_image_alone_is_packed_as_in_a_batch(direction, arrays):
    """It returns the same bits."""
    problem = Problem((5, 3, 9, 8), (40, 3, 5, 5), "float16", integers=False, padding=2)
    batch = problem.computed(arrays, direction)
    problem.x, problem.dy = problem.x[3:4], problem.dy[3:4]
    np.testing.assert_array_equal(problem.computed(arrays, direction), batch[3:4])


@EMULATED
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("limit", "is_packed"), [("2KiB", False), ("12KiB", True), ("64MiB", True)])
def test_copies_stay_within_the_workspace(direction, limit, is_packed, arrays, monkeypatch):
    """Where not even one image fits half of the limit, images are read where they are."""
    monkeypatch.setenv("GPUCONV_WORKSPACE_LIMIT", limit)
    problem = Problem((7, 4, 11, 13), (4, 4, 3, 3), "float16", padding=1)
    execute.clear()
    with planned() as constants:
        result = problem.computed(arrays, direction)
    np.testing.assert_array_equal(result, problem.exact(direction).astype(result.dtype))
    (plan,) = execute._plans.values()
    assert plan.space <= gpuconv.settings.workspace_limit() + 4 * 64  # arrays are aligned to 64 bytes
    assert (constants[0]["LEFT_VECTOR"] > 1) == is_packed


@EMULATED
def test_special_values_of_padded_channels_do_not_appear(arrays):
    """Channels that fill a vector are zeros in both operands, so that infinite weights multiply none of them."""
    problem = Problem((1, 3, 8, 8), (4, 3, 7, 7), "float16", padding=3)
    problem.w[0] = np.inf
    problem.x[:] = 1
    result = problem.computed(arrays, "forward")
    assert np.isposinf(result[0, 0, 3, 3])
    assert np.isfinite(result[0, 1:]).all()


def test_packing_is_profitable_if_elements_are_loaded_often():
    """A pointwise layer needs many filters. Vectors of 8 bytes are wide enough, and so are innermost channels."""
    half = named_dtype("float16")
    cases = {  # x, w, settings: the channels of a group after packing
        ((1, 64, 56, 56), (64, 64, 3, 3), ()): 64,
        ((1, 62, 56, 56), (64, 62, 3, 3), ()): 64,
        ((1, 64, 56, 56), (64, 64, 3, 3), (("stride", 2),)): 0,
        ((1, 3, 224, 224), (64, 3, 7, 7), (("stride", 2), ("padding", 3))): 4,
        ((1, 512, 7, 7), (2048, 512, 1, 1), ()): 512,
        ((1, 512, 7, 7), (256, 512, 1, 1), ()): 0,
        ((1, 512, 14, 14), (1024, 512, 1, 1), ()): 0,
        ((1, 56, 56, 64), (3, 3, 64, 64), (("layout", "channels_last"),)): 0,
        ((1, 56, 56, 3), (3, 3, 3, 64), (("layout", "channels_last"),)): 4,
    }
    for (x, w, settings), channels in cases.items():
        geometry = Geometry.infer(x, w, **dict(settings))
        views = [contiguous(role, half, geometry) for role in ("x", "w", "y")]
        lines, (often, _) = matrices_of("forward", geometry, *views).left, gemm_packing.loads("forward", geometry)
        assert gemm_packing.packed_channels(views[0], lines, often, pads=True) == channels, (x, w)
        assert gemm_packing.packed_channels(views[0], Lines(True, 0), often, pads=True) == 0  # converted elements
