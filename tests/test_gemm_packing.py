"""Packed copies of images for implicit_gemm: exact, as in a batch, within the workspace, and only if useful."""

import numpy as np
import pytest

import gpuconv
from gpuconv import execute
from gpuconv.geometry import Geometry
from gpuconv.gpu import gemm_model, gemm_packing
from gpuconv.gpu.device import Device
from gpuconv.gpu.gemm_plan import Arrays
from gpuconv.operands import ROLES, Operand, contiguous
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


@pytest.fixture
def always_packed(monkeypatch):
    """Pack images wherever that is possible, as if copies took no time and single elements very long."""
    monkeypatch.setattr(gemm_model, "copying", lambda moved, device: -1e9)
    gpuconv.clear_cache()
    yield
    gpuconv.clear_cache()


@pytest.mark.usefixtures("always_packed")
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


@pytest.mark.usefixtures("always_packed")
@EMULATED
@pytest.mark.parametrize("direction", ["forward", "data_grad"])
def test_an_image_alone_is_packed_as_in_a_batch(direction, arrays):
    """It returns the same bits."""
    problem = Problem((5, 3, 9, 8), (40, 3, 5, 5), "float16", integers=False, padding=2)
    batch = problem.computed(arrays, direction)
    problem.x, problem.dy = problem.x[3:4], problem.dy[3:4]
    np.testing.assert_array_equal(problem.computed(arrays, direction), batch[3:4])


@pytest.mark.usefixtures("always_packed")
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


@pytest.mark.usefixtures("always_packed")
@EMULATED
def test_copies_leave_room_for_the_sums_of_weights(arrays, monkeypatch):
    """Totals and the sums of one split take nearly all of the limit."""
    monkeypatch.setenv("GPUCONV_WORKSPACE_LIMIT", "20KiB")
    problem = Problem((7, 4, 11, 13), (64, 4, 3, 3), "float16", padding=1)
    execute.clear()
    result = problem.computed(arrays, "weight_grad")
    np.testing.assert_array_equal(result, problem.exact("weight_grad").astype(result.dtype))
    (plan,) = execute._plans.values()
    assert plan.space <= gpuconv.settings.workspace_limit() + 4 * 64


@pytest.mark.usefixtures("always_packed")
@EMULATED
def test_special_values_of_padded_channels_do_not_appear(arrays):
    """Channels that fill a vector are zeros in both operands, so that infinite weights multiply none of them."""
    problem = Problem((1, 3, 8, 8), (4, 3, 7, 7), "float16", padding=3)
    problem.w[0] = np.inf
    problem.x[:] = 1
    result = problem.computed(arrays, "forward")
    assert np.isposinf(result[0, 0, 3, 3])
    assert np.isfinite(result[0, 1:]).all()


def test_images_are_packed_where_the_model_predicts_a_shorter_time():
    """data_grad of channels_first layers loads weights one by one, too; other layers wait for the L2 cache."""
    half, h200, rtx = named_dtype("float16"), Device(90, 132), Device(86, 82)
    layers = {
        # x, w, direction, device: the channels of packed copies
        ((256, 14, 14), (256, 256, 3, 3), "data_grad", h200): (256, 0),
        ((256, 14, 14), (256, 256, 3, 3), "data_grad", rtx): (0, 0),
        ((256, 14, 14), (256, 256, 3, 3), "forward", h200): (0, 0),
        ((512, 7, 7), (512, 512, 3, 3), "weight_grad", h200): (0, 512),
        ((64, 56, 56), (64, 64, 1, 1), "data_grad", h200): (0, 0),
    }
    for (x, w, direction, device), channels in layers.items():
        found = []
        for images in (1, 32):
            geometry = Geometry.infer((images, *x), w, padding=w[-1] // 2)
            first, second, result = (contiguous(role, half, geometry) for role in ROLES[direction])
            arrays = Arrays(direction, geometry, Operand(first), Operand(second), result, np.dtype(np.float32))
            found.append(gemm_packing.packed_channels(arrays, "ieee", device, 1 << 30))
            converted = arrays._replace(first=Operand(first, conjugate=True), second=Operand(second, conjugate=True))
            assert gemm_packing.packed_channels(converted, "ieee", device, 1 << 30) == (0, 0)
        assert found == [channels] * 2, (x, w, direction)
