"""The choice of tiles by implicit_gemm, its explanation, and the matrices in arrays; from shapes only."""

import re
import runpy
from pathlib import Path

import numpy as np

import gpuconv
from gpuconv.geometry import Geometry
from gpuconv.gpu import gemm_plan, gemm_table, gemm_tiles, implicit_gemm
from gpuconv.gpu.device import MODEL, Device
from gpuconv.gpu.gemm_layout import BY_TAP, Lines, matrices_of
from gpuconv.operands import contiguous
from gpuconv.request import Request
from gpuconv.select import choose
from gpuconv.views import View
from tests.backends import on
from tests.cases import DIRECTIONS, named_dtype

EMULATED = on("emulated")
TURING = Device(75, 72)
REPOSITORY = Path(__file__).parents[1]


def test_matrices_lie_as_their_arrays_do():
    """Copies of 16, 8 or 4 bytes run along contiguous elements that begin at multiples of their size."""
    half = np.float16
    cases = {
        # direction, layout, channels, filters, kernel, extent: left, right, (along rows, vector)
        ("forward", "channels_last", 16, 24, 3, 8): ((True, 8), (False, 8), (False, 8)),
        ("forward", "channels_last", 12, 20, 3, 8): ((True, 4), (False, 4), (False, 4)),
        ("forward", "channels_last", 6, 7, 3, 8): ((True, 2), (False, 1), (False, 1)),
        ("forward", "channels_first", 16, 24, 3, 8): ((False, 1), (True, 8), (True, 8)),
        ("forward", "channels_first", 16, 24, 1, 8): ((False, 8), (True, 8), (True, 8)),
        ("forward", "channels_first", 16, 24, 1, 14): ((False, 4), (True, 8), (True, 4)),
        ("forward", "channels_first", 16, 24, 1, 7): ((False, 1), (True, 8), (True, 1)),
        ("data_grad", "channels_last", 16, 24, 3, 8): ((True, 8), (True, 8), (False, 8)),
        ("data_grad", "channels_first", 16, 24, 3, 8): ((False, 1), (True, 1), (True, 8)),
        ("data_grad", "channels_first", 16, 24, 1, 8): ((False, 8), (False, 8), (True, 8)),
        ("weight_grad", "channels_last", 16, 24, 3, 8): ((False, 8), (False, 8), (False, 8)),
        ("weight_grad", "channels_first", 16, 24, 3, 8): ((True, 1), (True, 8), (False, 8)),
        ("weight_grad", "channels_first", 16, 24, 1, 8): ((True, 8), (True, 8), (False, 8)),
    }
    for (direction, layout, channels, filters, kernel, n), (left, right, result) in cases.items():
        first = layout == "channels_first"
        geometry = Geometry.infer(
            (2, channels, n, n) if first else (2, n, n, channels),
            (filters, channels, kernel, kernel) if first else (kernel, kernel, channels, filters),
            padding=kernel // 2,
            layout=layout,
        )
        x, w, y = (contiguous(role, np.dtype(half), geometry) for role in ("x", "w", "y"))
        given = {"forward": (x, w, y), "data_grad": (y, w, x), "weight_grad": (y, x, w)}[direction]
        found = matrices_of(direction, geometry, *given)
        assert (found.left, found.right) == (Lines(*left), Lines(*right)), (direction, layout, kernel, n)
        assert (found.result_along_rows, found.result_vector) == result
        assert found.axes == (0 if kernel == 1 else 2 if direction == "weight_grad" else BY_TAP)
        first = given[0]
        shifted = View(first.memory, first.offset, first.shape, first.strides, first.dtype, base=8)
        moved = matrices_of(direction, geometry, shifted, *given[1:])
        before, after = (found.right, moved.right) if direction == "weight_grad" else (found.left, moved.left)
        assert after.vector == min(4, before.vector)


def test_windows_that_stay_within_the_image_need_no_look():
    pads = {"padding": 1}, {"padding": ((0, 0), (0, 1))}
    for kernel, look in (((3, 3), BY_TAP), ((4, 8), BY_TAP), ((3, 11), 2)):
        for settings, axes in (({}, 0), (pads[0], look), (pads[1], look), ({"padding": -1}, 0)):
            geometry = Geometry.infer((1, 8, 19, 19), (8, 8, *kernel), **settings)
            views = [contiguous(role, np.dtype(np.float32), geometry) for role in ("x", "w", "y")]
            assert matrices_of("forward", geometry, *views).axes == axes
            assert matrices_of("data_grad", geometry, views[2], views[1], views[0]).axes == look


def chosen(x, w, dtype="float16", direction="forward", device=MODEL, **settings):
    geometry = Geometry.infer(x, w, **settings)
    return gemm_plan.plans(geometry, named_dtype(dtype), direction, device)[0]


def test_much_work_takes_large_tiles_and_little_work_small_ones():
    """All multiprocessors must have work; for this weight_grad divides its outputs into splits (split-K)."""
    layer = {"padding": 1, "layout": "channels_last"}
    much = chosen((256, 56, 56, 256), (3, 3, 256, 256), **layer).choice.tile
    assert (much.rows, much.columns) == (256, 128)
    little = chosen((1, 7, 7, 64), (3, 3, 64, 64), **layer).choice.tile
    assert (little.rows, little.columns) == (32, 32)
    groups = chosen((8, 56, 56, 512), (3, 3, 16, 512), groups=32, **layer).choice.tile
    assert groups.columns == 16
    few_weights = chosen((32, 56, 56, 64), (3, 3, 64, 64), direction="weight_grad", **layer)
    assert few_weights.choice.splits * 9 >= MODEL.multiprocessors  # 9 tiles of at most 64x64
    many_weights = chosen((1, 7, 7, 2048), (3, 3, 2048, 2048), direction="weight_grad", **layer)
    assert many_weights.choice.splits == 1


def test_splits_cover_the_work_and_blocks_fit_the_device():
    for device, most in ((TURING, 64 << 10), (Device(86, 84), 99 << 10), (MODEL, 227 << 10)):
        for dtype in ("float16", "float32", "float64", "complex64", "complex128"):
            for direction in DIRECTIONS:
                geometry = Geometry.infer((8, 64, 28, 28), (96, 64, 3, 3), padding=1, stride=2)
                plans = gemm_plan.plans(geometry, named_dtype(dtype), direction, device)
                assert plans == sorted(plans, key=lambda plan: plan.choice.microseconds)
                for plan in plans:
                    assert plan.shared_bytes + (5 << 10) <= most
                    assert plan.choice.microseconds > 0
                    constants = dict(plan.module.constants)
                    assert device.capability >= 80 or constants["TENSOR_PRODUCTS"] == 0
                    splits = plan.choice.splits
                    assert plan.length * splits >= 8 * 14 * 14 * (direction == "weight_grad")
                    assert plan.length * (splits - 1) < 8 * 14 * 14


def test_measurements_go_before_the_model(monkeypatch):
    """Measurements must be for the same problem and kind of device."""
    geometry = Geometry.infer((4, 64, 14, 14), (64, 64, 3, 3), padding=1)
    half = named_dtype("float16")
    best, *others = gemm_plan.plans(geometry, half, "forward", MODEL)
    slower = others[-1]
    entry = gemm_table.entry(best.problem.key, slower.choice.tile, 1, 7.25, "bench/results/a-GPU")
    monkeypatch.setattr(gemm_table, "measured", lambda: {best.problem.key: entry})
    first, second, *_ = gemm_plan.plans(geometry, half, "forward", MODEL)
    assert first.choice == (slower.choice.tile, 1, 7.25, "bench/results/a-GPU")
    assert str(first.choice).endswith(" a warp: 7.25 us by bench/results/a-GPU")
    assert second.choice == best.choice
    for other in (
        gemm_plan.plans(geometry, half, "data_grad", MODEL),
        gemm_plan.plans(geometry, half, "forward", Device(90, 114)),
        gemm_plan.plans(Geometry.infer((5, 64, 14, 14), (64, 64, 3, 3), padding=1), half, "forward", MODEL),
    ):
        assert other[0].choice.source == "the model"


def test_the_table_tells_products_apart():
    geometry, precisions = Geometry.infer((4, 64, 14, 14), (64, 64, 3, 3), padding=1), ("ieee", "tf32", "tf32x3")
    arguments = [(named_dtype("float32"), precision) for precision in precisions]
    arguments += [(named_dtype(dtype), "ieee") for dtype in ("float16", "bfloat16", "float64")]
    best = (gemm_plan.plans(geometry, dtype, "forward", MODEL, how)[0] for dtype, how in arguments)
    assert len({plan.problem.key for plan in best}) == 6


def test_the_table_of_measurements_is_written_and_read(tmp_path, monkeypatch):
    (plan, *_) = gemm_plan.plans(Geometry.infer((1, 8, 9), (8, 8, 3)), named_dtype("float32"), "weight_grad", MODEL)
    entry = gemm_table.entry(plan.problem.key, plan.choice.tile, 2, 3.14159, "bench/results/a-GPU")
    monkeypatch.setattr(gemm_table, "FILE", tmp_path / "table.json")
    gemm_table.write([entry])
    found = gemm_table.measured()[plan.problem.key]
    assert (found["tile"], found["splits"], found["microseconds"]) == (list(plan.choice.tile), 2, 3.14)
    gemm_table.measured.cache_clear()


def test_the_table_of_predicted_limits_is_that_of_the_model():
    limits = runpy.run_path(str(REPOSITORY / "bench" / "gemm_limits.py"))
    table = limits["table"]()
    assert table in (REPOSITORY / "kernels" / "README.md").read_text(), f"kernels/README.md should have\n{table}"


def test_every_entry_of_the_table_names_a_committed_result():
    for entry in gemm_table.read():
        assert (REPOSITORY / entry["source"]).is_dir(), entry


@EMULATED
def test_auto_takes_it_where_half_a_tile_is_filled(arrays):
    """auto chooses depthwise for groups of few channels, but im2col for a matrix product with few channels."""
    cases = {
        ((4, 64, 14, 14), (64, 64, 3, 3), 1): ("implicit_gemm",) * 3,
        ((4, 64, 14, 14), (4, 64, 3, 3), 1): ("im2col", "implicit_gemm", "im2col"),
        ((4, 3, 14, 14), (64, 3, 7, 7), 1): ("implicit_gemm", "im2col", "implicit_gemm"),
        ((4, 64, 14, 14), (64, 1, 3, 3), 64): ("depthwise",) * 3,
        ((4, 64, 1, 1), (64, 64, 1, 1), 1): ("implicit_gemm",) * 3,
        ((4, 8, 1, 1), (8, 8, 1, 1), 1): ("im2col",) * 3,
    }
    for (x, w, groups), expected in cases.items():
        for images in (1, x[0], 100 * x[0]):  # the choice does not depend on the batch size
            geometry = Geometry.infer((images, *x[1:]), w, padding=w[-1] // 2, groups=groups)
            requests = [Request(geometry, np.dtype("f4"), direction, arrays.backend) for direction in DIRECTIONS]
            assert tuple(choose(request, "auto").algorithm for request in requests) == expected, (x, w)


def test_a_tile_is_filled_by_the_positions_of_the_result():
    """These are positions of x in data_grad, many for a large stride, and positions of y in forward, few of them."""
    geometry = Geometry.infer((1, 16, 6, 6), (16, 16, 3, 3), stride=4, padding=1)
    assert [implicit_gemm.fills_a_tile(geometry, direction) for direction in DIRECTIONS] == [False, True, True]


@EMULATED
def test_explain_lists_the_tiles_with_their_times(arrays, monkeypatch):
    monkeypatch.setattr("gpuconv.explanation.backend_named", lambda _: arrays.backend)
    explanation = gpuconv.explain((8, 64, 56, 56), (64, 64, 3, 3), padding=1, dtype="float16", backend="cupy")
    assert re.search(
        r"\n  implicit_gemm_forward<<<\d+, \d+>>>\(x@0 .*, y@0 \(8, 56, 56, 1, 64\), ", repr(explanation.plan)
    )
    text = str(explanation)
    lines = text.splitlines()
    start = lines.index("uses implicit_gemm: each group fills half a tile or more")
    pattern = r"  (by|or) tiles of \d+x\d+, \d+x\d+ a warp: [\d.]+ us by the model"
    assert lines[start + 1].startswith("  by ")
    last = lines.index(next(line for line in lines if line.startswith("not im2col: ")))
    assert last - start - 1 == len(gemm_tiles._TENSOR_TILES) == 12  # deep tiles load vectors only
    assert all(re.fullmatch(pattern, line) for line in lines[start + 1 : last])
    assert all(line.startswith("  or ") for line in lines[start + 2 : last])
