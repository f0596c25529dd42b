"""Split-K: exact; in forward and data_grad with the bits that one block computes, and only where devices are idle."""

import numpy as np
import pytest

import gpuconv
from gpuconv import execute
from gpuconv.gpu import gemm_model, gemm_plan
from gpuconv.gpu.device import MODEL
from gpuconv.gpu.gemm_plan import plans
from tests.backends import BACKENDS, on
from tests.cases import channels_first, laid_out, named_dtype
from tests.emulation import launcher
from tests.test_implicit_gemm import KINDS, TWO_LAYOUTS, Problem
from tests.tiers import combinations, compiles_much

EMULATED = on("emulated")
GATHERED = ["forward", "data_grad"]
# x, w and settings of layers with few outputs and long sums: groups, strides with phases, more than 32 taps, 1-D, 3-D.
LAYERS = {
    "3x3": ((1, 66, 4, 5), (70, 66, 3, 3), {"padding": 1}),
    "groups and stride": ((2, 128, 5, 4), (272, 64, 3, 3), {"padding": 1, "stride": 2, "groups": 2}),
    "large window": ((1, 12, 7, 6), (13, 12, 7, 7), {"padding": 3}),
    "1-D": ((2, 180, 9), (190, 180, 3), {"dilation": 2}),
    "3-D": ((1, 30, 3, 4, 3), (28, 30, 3, 3, 3), {"padding": 1}),
}


@pytest.fixture(params=["packed", "as they are"])
def always_split(request, monkeypatch):
    """Divide sums wherever that is possible, as if launches took no time, with and without packed copies of images."""
    monkeypatch.setattr(gemm_model, "LAUNCH", -1e6)
    if request.param == "as they are":
        monkeypatch.setattr(gemm_model, "copying", lambda *_: 1e9)
    yield
    execute.clear()


def called(problem, arrays, direction, layout="channels_first", **options):
    """Return the result of a call, without the plans of earlier calls, and whether its sums are divided."""
    execute.clear()
    with launcher.using() as launches:
        result = problem.computed(arrays, direction, layout, **options)
    return result, "split_sum" in [launch.name for launch in launches]


@pytest.mark.usefixtures("always_split")
@combinations(
    arrays=BACKENDS[1:],
    kind=KINDS,
    direction=GATHERED,
    layer=LAYERS,
    layout=TWO_LAYOUTS,
    where=lambda arrays, kind, **_: compiles_much(arrays) or kind in ("float16", "tf32x3"),
    turns=["direction", "layer", "layout"],
)
def test_sums_of_splits_are_exact(kind, direction, layer, layout, arrays):
    dtype, precision = KINDS[kind]
    x, w, settings = LAYERS[layer]
    problem = Problem(x, w, dtype, **settings)
    result, is_divided = called(problem, arrays, direction, layout, precision=precision)
    np.testing.assert_array_equal(result, problem.exact(direction).astype(result.dtype))
    if arrays.name == "emulated":
        assert is_divided


@pytest.mark.usefixtures("always_split")
@EMULATED
@pytest.mark.parametrize("always_split", ["as they are"], indirect=True)
@pytest.mark.parametrize(
    ("kind", "weight", "channels"),
    [
        ("float16", 1, 70),
        ("tf32x3", 1, 70),
        ("float32", 1, 70),
        ("float32", np.inf, 70),
        ("complex64", np.inf, 70),
        ("float32", 1, 600),  # so many splits that several threads would share those of weight_grad
    ],
)
@pytest.mark.parametrize("direction", GATHERED)
def test_splits_have_the_bits_of_one_block(kind, weight, channels, direction, arrays, monkeypatch):
    """So an image has the same bits alone, where it is divided, and in a batch, where it need not be."""
    dtype, precision = KINDS[kind]
    problem = Problem((1, channels, 4, 4), (72, channels, 3, 3), dtype, integers=False, padding=1)
    problem.w[0, 0, 0, 0] = problem.w[5, 3, 2, 2] = weight
    divided, is_divided = called(problem, arrays, direction, precision=precision)
    assert is_divided
    monkeypatch.setattr(gemm_plan, "MOST_SPLITS", 1)
    whole, is_divided = called(problem, arrays, direction, precision=precision)
    assert not is_divided
    np.testing.assert_array_equal(divided, whole)
    assert np.isfinite(whole).any()


@pytest.mark.usefixtures("always_split")
@pytest.mark.parametrize("always_split", ["as they are"], indirect=True)
@pytest.mark.parametrize("layout", TWO_LAYOUTS)
@pytest.mark.parametrize("mode", ["fast", "checked"])
@EMULATED
def test_bias_and_activation_follow_the_sum(mode, layout, arrays):
    problem = Problem((2, 120, 3, 4), (20, 60, 3, 3), "float16", padding=1, groups=2)
    b = np.arange(20) - 10
    options = {**problem.settings, "layout": layout, "algorithm": "implicit_gemm", "activation": "relu"}
    given = [arrays.asarray(laid_out(a.astype(np.float16), layout, role)) for a, role in zip(
        (problem.x, problem.w), ("x", "w"), strict=True
    )]  # fmt: skip
    execute.clear()
    with launcher.using(mode=mode) as launches:
        y = gpuconv.conv(*given, arrays.asarray(b.astype(np.float32)), **options)
    expected = np.maximum(problem.exact("forward") + b[:, None, None], 0)
    np.testing.assert_array_equal(channels_first(arrays.asnumpy(y), layout), expected.astype(np.float16))
    assert "split_sum" in [launch.name for launch in launches]


@pytest.mark.usefixtures("always_split")
@pytest.mark.parametrize("always_split", ["as they are"], indirect=True)
@EMULATED
@pytest.mark.parametrize(("limit", "splits"), [("4KiB", False), ("64MiB", True)])
def test_splits_need_workspace(limit, splits, arrays, monkeypatch):
    monkeypatch.setenv("GPUCONV_WORKSPACE_LIMIT", limit)
    problem = Problem((1, 66, 4, 5), (70, 66, 3, 3), "float32", padding=1)
    result, is_divided = called(problem, arrays, "forward")
    np.testing.assert_array_equal(result, problem.exact("forward").astype(np.float32))
    assert is_divided == splits
    (plan,) = execute._plans.values()
    assert plan.space <= gpuconv.settings.workspace_limit() + 64


def test_only_idle_devices_are_given_splits():
    """One image of 14x14 leaves most of an H200 idle; 64 of them, or one of 56x56, do not."""
    for x, w, splits in (
        ((1, 256, 14, 14), (256, 256, 3, 3), 5),
        ((64, 256, 14, 14), (256, 256, 3, 3), 1),
        ((1, 64, 112, 112), (64, 64, 3, 3), 1),
        ((1, 512, 7, 7), (512, 512, 1, 1), 1),
    ):
        geometry = gpuconv.geometry.Geometry.infer(x, w, padding=w[-1] // 2)
        plan, *_ = plans(geometry, named_dtype("float16"), "forward", MODEL)
        assert plan.choice.splits == splits, x
        assert plan.length == (512 if splits > 1 else 0)


@combinations(
    algorithm=["direct", "implicit_gemm", "depthwise"],
    dtype=["float32", "complex64"],
    mode=["fast", "checked"],
    where=lambda algorithm, dtype, mode: mode == "fast" or algorithm == "direct",
    turns=["dtype", "mode"],
)
@EMULATED
def test_threads_share_the_splits_of_a_weight(algorithm, dtype, mode, arrays, rng):
    """The batch axes of x cannot be merged, so the sums of later images are added to those of earlier ones."""
    x = rng.integers(-3, 4, (2, 3, 2100, 4)).astype(dtype).transpose(1, 0, 3, 2)
    dy = rng.integers(-3, 4, (3, 2, 20, 2098)).astype(dtype)
    expected = gpuconv.conv_weight_grad(dy, x, (20, 2, 3), groups=2, algorithm="im2col")
    given = arrays.asarray(dy), arrays.asarray(x)
    with launcher.using(mode=mode) as launches:
        dw = gpuconv.conv_weight_grad(*given, (20, 2, 3), groups=2, algorithm=algorithm)
    np.testing.assert_array_equal(arrays.asnumpy(dw), expected)
    sums = [launch.grid for launch in launches if launch.name == "split_sum"]
    assert sums[:3] == [4] * 3  # a block for 32 of 120 weights
