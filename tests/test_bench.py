"""``gpuconv bench``: layers, verification, alternating measurement, files and comparison."""

import csv
import importlib.util
import json
import math
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gpuconv import dtypes
from gpuconv.arrays import NUMPY
from gpuconv.backends import cupy_backend
from gpuconv.benchmark import compare, layers, limits, plots, reference, report, results, run, timing
from gpuconv.benchmark.command import FILES
from gpuconv.benchmark.peers.worker import Worker
from gpuconv.benchmark.problem import Problem
from gpuconv.cli import main
from gpuconv.cpu import depthwise
from gpuconv.geometry import DIRECTIONS, Geometry

SUITES = (
    *("quick", "resnet50", "vgg16", "mobilenet", "convnext", "replknet", "large", "unet3d", "audio1d", "stems"),
    *("grouped", "dilated", "transposed", "patch", "jsense", "deepbench", "small", "tiny", "course", "videovae"),
)
SMALL = "n=2 c=4 h=9 w=8 k=6 r=3 s=3 pad=1"
DEPTHWISE = "n=1 c=8 h=10 w=10 k=8 r=3 s=3 groups=8"
ROOT = Path(__file__).parent.parent
HAS_TORCH = importlib.util.find_spec("torch") is not None


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setenv("GPUCONV_BACKEND", "numpy")


@pytest.fixture
def _quick_limits(monkeypatch):
    """Replace the measured roofline by constants, to save time."""
    monkeypatch.setattr(limits, "measured", lambda place, names, clock: limits.Limits(1e9, dict.fromkeys(names, 1e10)))


@pytest.fixture
def bench(tmp_path, _quick_limits):
    """A function that runs ``gpuconv bench`` with arguments and returns its results and status."""

    def ran(*words):
        path = tmp_path / "bench.json"
        status = main(["bench", *words, "--seconds", "0", "--json", str(path)])
        return results.read_json(path), status

    return ran


# Layers


def test_there_are_the_suites_that_people_know_each_with_layers_that_exist():
    assert tuple(layers.suites()) == SUITES
    for suite, cases in layers.suites().items():
        assert len(cases) >= 6, suite
        assert len({case.name for case in cases}) == len(cases), suite
        assert len({case.text(1) + case.dtype for case in cases}) == len(cases), suite
        for case in cases:
            assert len(case.source) > 10
            assert re.search(r"\d{4}|\w+/\w+", case.source), case.source  # a year, or a repository
            for batch in case.batches:
                geometry = case.geometry(batch)
                assert geometry.multiply_adds() > 0
            assert dtypes.named(case.dtype).name == case.dtype


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_a_layer_written_out_is_the_same_layer(layout):
    for cases in layers.suites().values():
        for case in cases:
            again = layers.parsed(case.text(3))
            assert again.geometry(3, layout) == case.geometry(3, layout)
            assert again.transposed == case.transposed
            assert again.batches == (3, 3)


def test_layers_have_the_extents_that_their_papers_have():
    every = {case.name: case for cases in layers.suites().values() for case in cases}

    def output(name):
        geometry = every[name].geometry(1)
        return geometry.x_shape if every[name].transposed else geometry.y_shape

    assert output("resnet50 stem 7x7 s2 3>64 @224") == (1, 64, 112, 112)
    assert output("resnet50 3x3 s2 128 @56") == (1, 128, 28, 28)
    assert output("unet up 2x2 s2 256>128 @100") == (1, 128, 200, 200)
    assert output("unet3d 3x3x3 256 @8") == (1, 256, 8, 8, 8)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("c=3 w=9 k=4 s=3 pad=causal dilation=2", "n=1 c=3 w=9 k=4 s=3 pad=causal dilation=2"),
        ("c=3 h=9 w=8 k=4 r=3 s=2 stride_h=2 pad_w=1", "n=1 c=3 h=9 w=8 k=4 r=3 s=2 stride=2,1 pad=0,1"),
        ("c=3 h=9 w=9 k=4 r=3 s=3 pad=0:1,2 p=8 q=11", "n=1 c=3 h=9 w=9 k=4 r=3 s=3 pad=0:1,2"),
        ("c=4 d=5 h=6 w=7 k=4 t=2 r=2 s=2 stride=2,1,1", "n=1 c=4 d=5 h=6 w=7 k=4 t=2 r=2 s=2 stride=2,1,1"),
        (
            "c=4 h=5 w=5 k=2 r=3 s=3 stride=2 transposed=1 output_padding=1",
            "n=1 c=4 h=5 w=5 k=2 r=3 s=3 stride=2 transposed=1 output_padding=1",
        ),
    ],
)
def test_cases_are_spelt_in_the_words_of_cutlass_profiler(text, expected):
    assert layers.parsed(text).text(1) == expected


def test_a_layer_of_two_suites_runs_once_and_counts_for_both():
    cases = layers.selected(["quick", "resnet50"], [])
    assert len({case.name for case in cases}) == len(cases)
    (stem,) = [case for case in cases if case.name == "resnet50 stem 7x7 s2 3>64 @224"]
    assert stem.suites == ("quick", "resnet50")
    every = layers.selected(["all"], [])
    assert {suite for case in every for suite in case.suites} == set(SUITES)
    assert {case.name for case in every} == {case.name for cases in layers.suites().values() for case in cases}


# Verification


PROBLEMS = [
    pytest.param(layers.parsed(text), dtypes.named(dtype), id=f"{text} {dtype}")
    for text, dtype in (
        (SMALL, "float32"),
        ("n=3 c=6 w=30 k=4 s=5 stride=2 pad=2 groups=2", "complex64"),
        ("n=2 c=6 h=6 w=5 k=4 r=3 s=3 stride=2 groups=2 transposed=1 output_padding=1", "complex64"),
        ("n=2 c=2 d=4 h=5 w=6 k=3 t=2 r=3 s=2 pad=0:1,1,0", "float64"),
        ("n=2 c=4 h=6 w=6 k=4 r=3 s=3 pad=1", "bfloat16"),
    )
]


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case, dtype", PROBLEMS)
def test_one_wrong_element_anywhere_that_is_checked_is_noticed(case, dtype, direction, part, monkeypatch):
    if part:
        monkeypatch.setattr(reference, "MOST_PRODUCTS", 1)
        monkeypatch.setattr(reference, "LEAST_RESULTS", 1)
    problem = Problem.of(case, case.batches[0], dtype)
    for layout in ("channels_first", "channels_last"):
        result = problem.call(direction, layout)()
        verdict = problem.verdict(result, direction, layout)
        assert verdict.right
        assert 0 < verdict.checked <= result.size
        assert part or verdict.checked == result.size
        for corner in (0, -1):  # the first and the last element are always checked
            for bad in (np.nan, np.inf, 100):
                broken = result.copy()
                broken[(corner,) * result.ndim] += np.array(bad).astype(dtype)
                assert not problem.verdict(broken, direction, layout).right
                assert not problem.verdict(broken, direction, layout, loose=True).right


def test_of_large_results_ten_thousand_elements_are_checked_with_their_borders():
    case = layers.parsed("n=16 c=64 h=28 w=28 k=128 r=3 s=3 pad=1")
    geometry = case.geometry(16)
    for direction in DIRECTIONS:
        part = reference.part_of(geometry, direction)
        problem = Problem.of(case, 16, np.dtype(np.float32))
        exact = problem.exact(direction)
        full = {"forward": geometry.y_shape, "data_grad": geometry.x_shape, "weight_grad": geometry.w_shape}[direction]
        assert 10_000 <= exact.value.size < math.prod(full)
        assert exact.value.shape[2:] == full[2:]  # whole images, whole kernels
        for chosen, size in zip(part, (16, 1, 128, 64), strict=True):
            if chosen is not None:
                assert {0, size - 1} <= set(chosen)
                assert len(set(chosen)) == len(chosen)


def test_a_part_of_the_exact_result_is_that_part(monkeypatch):
    problem = Problem(Geometry.infer((3, 8, 7, 6), (12, 4, 3, 3), groups=2, padding=1), np.dtype(np.float64))
    whole = {direction: problem.exact(direction).value for direction in DIRECTIONS}
    monkeypatch.setattr(reference, "MOST_PRODUCTS", 1)
    monkeypatch.setattr(reference, "LEAST_RESULTS", 30)
    for direction in DIRECTIONS:
        inner, first, second = problem.inner(direction)
        exact = reference.exact_part(inner, first, second, problem.geometry)
        if direction == "weight_grad":
            expected = exact.part.of_weight(whole[direction], 2, np)
        else:
            channels = exact.part.filters if direction == "forward" else exact.part.channels
            expected = exact.part.of_images(whole[direction], 2, channels, np)
        assert 30 <= exact.value.size < whole[direction].size
        np.testing.assert_allclose(exact.value, expected, rtol=1e-13, atol=1e-13)


def test_nothing_may_be_off_where_the_bound_is_zero():
    expected = reference.Exact(reference.Part(), np.zeros(3), np.zeros(3))
    assert reference.deviation(np.zeros(3), np.zeros(3), expected) == (0, 0)
    assert reference.deviation(np.array([0, 1e-300, 0]), np.zeros(3), expected)[1] == math.inf
    assert reference.deviation(np.array([0, np.nan, 0]), np.ones(3), expected)[1] == math.inf


def test_a_wrong_result_is_never_timed(bench, monkeypatch, capsys):
    original = depthwise.forward

    def wrong(x, w, y, geometry, planner):
        original(x, w, y, geometry, planner)
        planner.copy(y.view[..., :1], 7)

    monkeypatch.setattr(depthwise, "forward", wrong)
    found, status = bench("--case", DEPTHWISE, "--algorithm", "depthwise")
    assert status == 1
    assert [(row.direction, row.wrong, row.timed) for row in found.rows] == [
        ("forward", True, False),
        ("data_grad", False, True),
        ("weight_grad", False, True),
    ]
    answer = capsys.readouterr()
    assert "WRONG" in answer.out
    assert f"wrong result: {DEPTHWISE}, forward" in answer.err


def test_an_error_in_one_row_leaves_the_others(bench, monkeypatch, capsys):
    def failing(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(depthwise, "data_grad", failing)
    found, status = bench("--case", DEPTHWISE, "--algorithm", "depthwise")
    assert status == 1
    assert [(row.wrong, row.timed) for row in found.rows] == [(False, True), (True, False), (False, True)]
    answer = capsys.readouterr()
    assert "FAILED" in answer.out
    assert f"wrong result: {DEPTHWISE}, data_grad, channels_first: MemoryError: no room" in answer.err


@pytest.mark.usefixtures("_quick_limits")
def test_arrays_that_no_machine_has_room_for_are_an_error_with_the_layer_s_name(capsys):
    assert main(["bench", "--case", "n=1000000 c=1000000 w=900000 k=4 s=3"]) == 2
    assert "the arrays of n=1000000 c=1000000 w=900000 k=4 s=3 at N=1000000 cannot be made" in capsys.readouterr().err


# Timing


def test_timing_nothing_takes_two_microseconds_at_most():
    assert np.median(timing.Clock().samples(lambda: None, 100)) <= 2e-6


@pytest.mark.parametrize(
    "estimate, seconds, expected", [(1e-6, 0.5, 100), (0.01, 0.5, 50), (0.05, 0.5, 30), (0.2, 0.5, 10), (9, 0.5, 1)]
)
def test_thirty_to_a_hundred_samples_or_as_many_as_the_limit_allows(estimate, seconds, expected):
    assert timing.count(estimate, seconds) == expected


def test_before_each_cold_sample_more_is_written_than_the_caches_hold():
    clock = timing.Clock(cold=True)
    seen = []
    clock.samples(lambda: seen.append(int(clock._elsewhere[-1])), 3)
    assert seen == [0, 1, 2, 3]  # the first call is not counted
    assert (clock._elsewhere == 3).all()
    assert clock._elsewhere.nbytes >= 2 * timing.last_cache_bytes() > 2**16
    assert timing.Clock()._elsewhere.size == 0


def test_the_summary_is_the_median_and_the_interquartile_range():
    summary = timing.Summary.of((4.0, 1.0, 2.0, 3.0, 100.0))
    assert summary.median == 3
    assert summary.noise == pytest.approx((4 - 2) / 3)


def test_limits_are_what_this_machine_does(monkeypatch):
    monkeypatch.setitem(limits.EXTENT, "numpy", 256)
    monkeypatch.setitem(limits.COPY_BYTES, "numpy", 2**24)
    found = limits.measured(NUMPY, ("float32", "complex64", "bfloat16"), timing.Clock())
    assert set(found.peaks) == {"float32", "complex64", "bfloat16"}
    assert min(found.bandwidth, *found.peaks.values()) > 1e8
    assert found.seconds(10**9, 0, "float32") == 1e9 / found.peaks["float32"]
    assert found.seconds(0, 10**9, "float32") == 1e9 / found.bandwidth
    assert found.seconds(1, 1, "float64") is None


# Rows and files


def test_bench_verifies_times_prints_and_writes(bench, tmp_path, capsys):
    files = {name: tmp_path / f"b.{name}" for name in ("csv", "md", "png")}
    words = ["--csv", files["csv"], "--markdown", files["md"], "--plot", files["png"]]
    words += ["--layout", "channels_first,channels_last", "--dtype", "float32,tf32"]
    found, status = bench("--case", SMALL, "--case", DEPTHWISE, *map(str, words))
    assert status == 0
    printed = capsys.readouterr().out
    algorithms = {row.algorithm for row in found.rows}
    for part in ("NumPy", "limits", "noise", "GFLOP/s", "GB/s", "of limit", "error", *algorithms, *DIRECTIONS):
        assert part in printed
    assert "im2col" in algorithms
    assert found.complete
    assert set(found.spent) == {"first calls", "verifying", "peers", "measuring", "all"}
    assert [(row.spec, row.dtype, row.direction, row.layout) for row in found.rows] == [
        (spec, dtype, direction, layout)
        for spec in (SMALL, DEPTHWISE)
        for dtype in ("float32", "tf32")
        for direction in DIRECTIONS
        for layout in ("channels_first", "channels_last")
    ]
    for row in found.rows:
        assert 0 < row.of_bound <= 1
        assert row.checked > 0
        assert len(row.samples) >= 1
        assert min(row.samples) > 0
        assert row.first_seconds > 0
        assert row.flops == layers.parsed(row.spec).geometry(row.batch).flops()
    for path in plots.paths(files["png"]):
        assert path.read_bytes().startswith(b"\x89PNG")
    with files["csv"].open() as file:
        lines = list(csv.DictReader(file))
    assert [line["spec"] for line in lines] == [row.spec for row in found.rows]
    assert float(lines[0]["median_seconds"]) == pytest.approx(found.rows[0].summary.median, rel=1e-3)
    assert files["md"].read_text().count("\n| ") >= len(found.rows)


def test_the_files_of_a_run_are_not_in_its_command():
    command = "gpuconv bench quick --json '/a b/c.json' --peer torch --plot=x.png --csv c.csv --seconds 1"
    assert FILES.sub("", command) == "gpuconv bench quick --peer torch --seconds 1"


def test_a_row_s_command_gives_that_row_alone(bench):
    found, _ = bench("--case", "dw 3x3 144 @56", "--batch", "1", "--direction", "forward,weight_grad")
    row = found.rows[-1]
    words = shlex.split(row.command)
    assert words[:2] == ["gpuconv", "bench"]
    again, _ = bench(*words[2:])
    assert [r.key for r in again.rows] == [row.key]
    assert all(
        peer.command == f"{row.command} --peer loops" for peer in bench(*words[2:], "--peer", "loops")[0].rows[1:]
    )


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_what_was_measured_before_an_interruption_is_kept(how, tmp_path):
    path = tmp_path / "b.json"
    code = f"""
import signal
from gpuconv import cli
from gpuconv.benchmark import command, limits
command.SAVE_SECONDS = 0
limits.EXTENT["numpy"], limits.COPY_BYTES["numpy"] = 64, 2**20
signal.signal(signal.SIGINT, signal.default_int_handler)  # where tests run in the background it is ignored
exit(cli.main(["bench", "resnet50", "--seconds", "0.05", "--json", {str(path)!r}]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 300
    while time.monotonic() < end and not path.exists():
        time.sleep(0.05)
    assert path.exists(), "no row was measured in time"
    process.send_signal(how)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted: these are not all rows" in printed
    found = results.read_json(path)
    assert not found.complete
    assert 0 < len(found.rows) < 69
    assert not list(tmp_path.glob(".*"))


def test_an_interrupted_run_is_resumed(bench, tmp_path, monkeypatch):
    """A layer that is recorded in some directions only is measured again; no row is duplicated or lost."""
    case = layers.parsed(SMALL)
    twins = {"small": (replace(case, name="one"), replace(case, name="other"))}  # with the same specification
    monkeypatch.setattr(layers, "suites", lambda: twins)
    given = ("small", "--batch", "1", "--dtype", "float32,float64", "--resume")
    whole, _ = bench(*given)
    assert len(whole.rows) == 12
    results.write_json(tmp_path / "bench.json", replace(whole, rows=whole.rows[:8], complete=False))
    resumed, _ = bench(*given)
    assert resumed.complete
    assert [(row.case, *row.key) for row in resumed.rows] == [(row.case, *row.key) for row in whole.rows]
    assert resumed.rows[:6] == whole.rows[:6]
    assert resumed.rows[6] != whole.rows[6]
    again, _ = bench(*given)
    assert again.rows == resumed.rows
    assert all(set(run.limits["numpy"].peaks) == {"float32", "float64"} for run in (whole, resumed, again))


@pytest.mark.parametrize("name", ["command", "commit", "machine"])
def test_only_the_same_run_is_resumed(name, bench, capsys, tmp_path):
    path = tmp_path / "bench.json"
    whole, _ = bench("--case", SMALL)
    other = {**whole.machine, "NumPy": "1.0"} if name == "machine" else "another"
    results.write_json(path, replace(whole, **{name: other}))
    before = path.read_text()
    assert main(["bench", "--case", SMALL, "--seconds", "0", "--json", str(path), "--resume"]) == 2
    assert f"--resume requires the same {name} as {path}: " in capsys.readouterr().err
    assert path.read_text() == before


def test_files_of_another_schema_are_refused(tmp_path):
    path = tmp_path / "old.json"
    for text, phrase in (('{"schema": 1}', "schema 2, but 1"), ("[]", "schema 2, but None"), ("{", "is not JSON")):
        path.write_text(text)
        with pytest.raises(ValueError, match=phrase):
            results.read_json(path)


# Peers


def test_the_loops_of_books_and_scipy_agree_and_refuse_with_a_reason(bench, capsys):
    pytest.importorskip("scipy")
    found, status = bench("--case", SMALL, "--case", DEPTHWISE, "--peer", "loops,scipy")
    assert status == 0
    for row in found.rows:
        if row.by == "gpuconv" or row.spec == SMALL:
            assert row.timed
            assert row.of_bound <= 1
        else:
            assert "groups" in row.refusal
            assert not row.timed
    assert {row.layout for row in found.rows if row.by == "gpuconv"} == {"channels_first", "channels_last"}
    printed = capsys.readouterr().out
    assert "loops ms" in printed
    assert "scipy (channels_first) refused 3: correlate has no groups" in printed


@pytest.mark.skipif(not HAS_TORCH, reason="PyTorch is not installed")
def test_pytorch_computes_the_same():
    worker = Worker("torch")
    for text, dtype in (
        (SMALL, "float32"),
        ("n=2 c=4 h=9 w=8 k=6 r=3 s=3 pad=1 stride=2 dilation=2 groups=2", "float64"),
        ("n=2 c=4 w=20 k=4 s=3 pad=causal groups=4", "float32"),
        ("n=2 c=4 h=6 w=5 k=6 r=4 s=3 stride=2 pad=1 transposed=1 output_padding=1", "float32"),
        ("n=2 c=4 h=6 w=5 k=6 r=4 s=3 stride=2 pad=1 transposed=1 output_padding=1", "complex64"),
        ("n=1 c=2 d=5 h=5 w=5 k=2 t=2 r=3 s=3", "complex64"),
        (SMALL, "bfloat16"),
    ):
        problem = Problem.of(layers.parsed(text), layers.parsed(text).batches[0], dtypes.named(dtype))
        # Without instructions for bfloat16 PyTorch accumulates gradients in bfloat16, beyond the bounds used here.
        for direction in DIRECTIONS[:1] if dtype == "bfloat16" else DIRECTIONS:
            _, result = worker.first(text, dtype, direction, "channels_first")
            assert problem.verdict(result, direction, loose=True).right, (text, direction)
            if problem.geometry.rank == 1:
                with pytest.raises(ValueError, match="no channels_last for one spatial axis"):
                    worker.first(text, dtype, direction, "channels_last")
            else:
                _, result = worker.first(text, dtype, direction, "channels_last")
                assert problem.verdict(result, direction, loose=True).right, (text, direction)
    worker.close()


@pytest.mark.skipif(not HAS_TORCH, reason="PyTorch is not installed")
def test_pytorch_is_measured_in_both_formats(bench):
    found, status = bench("--case", SMALL, "--peer", "torch", "--direction", "forward")
    assert status == 0
    assert [(row.by, row.layout, row.timed) for row in found.rows] == [
        ("gpuconv", "channels_first", True),
        ("gpuconv", "channels_last", True),
        ("torch", "channels_first", True),
        ("torch", "channels_last", True),
    ]


def test_a_peer_that_is_off_is_refused_and_not_timed(bench, monkeypatch, capsys):
    original = Worker.first

    def off(*arguments):
        seconds, result = original(*arguments)
        result[(0,) * result.ndim] += 1
        return seconds, result

    monkeypatch.setattr(Worker, "first", off)
    found, status = bench("--case", SMALL, "--peer", "loops", "--direction", "forward")
    assert status == 0
    assert [(row.by, row.timed, row.wrong) for row in found.rows[1:]] == [
        ("gpuconv", True, False),
        ("loops", False, False),
    ]
    assert "times the bound" in found.rows[-1].refusal
    assert "loops (channels_first) refused 1: the error of its result is" in capsys.readouterr().out


def test_a_peer_s_process_that_dies_is_an_error():
    worker = Worker("loops")
    seconds, result = worker.first(SMALL, "float32", "forward", "channels_first")
    assert 0 < seconds < 10
    assert Problem.of(layers.parsed(SMALL), 2, np.dtype(np.float32)).verdict(result, "forward", loose=True).right
    assert len(worker.samples("channels_first", 3)) == 3
    worker._process.kill()
    with pytest.raises((RuntimeError, BrokenPipeError)):
        worker.samples("channels_first", 3)
    worker.close()


# A GPU


@pytest.mark.gpu
@pytest.mark.called_once("what is recorded may not wait")
@pytest.mark.parametrize(
    "short, algorithms, method",
    [
        (0, ("direct", "scatter"), "events"),
        (1e9, ("direct", "scatter"), "graph"),
        (1e9, ("direct", "im2col"), "events"),  # CuPy cannot multiply matrices during a capture
    ],
)
def test_on_a_gpu_all_sides_are_timed_by_events_or_all_as_graphs(short, algorithms, method, monkeypatch):
    monkeypatch.setattr(timing, "SHORT", short)
    monkeypatch.setenv("GPUCONV_BACKEND", "cupy")
    has_peer = HAS_TORCH and importlib.import_module("torch").cuda.is_available()
    peers = ("torch",) if has_peer else ()
    bench = run.Bench(run.Schedule(cupy_backend(), ("data_grad",), algorithms=algorithms, peers=peers, seconds=0))
    (rows,) = bench.rows(bench.schedule.jobs([layers.parsed(SMALL)]))
    assert [row.by for row in rows] == ["gpuconv"] * 2 + ["torch"] * 2 * has_peer
    for row in rows:
        assert row.refusal is None
        assert row.method == method
        assert row.backend == "cupy"
        assert len(row.samples) == (1 if method == "events" else timing.ENOUGH + 2)
        assert (row.host_seconds is None) == (row.by == "torch")


@pytest.mark.gpu
def test_what_cannot_be_recorded_is_timed_by_events():
    clock = timing.clock_for(cupy_backend(), cold=False)
    assert clock.graph(lambda: None) is not None
    assert clock.graph(clock._stream.synchronize) is None
    assert len(clock.samples(lambda: None, 3)) == 3


def test_the_campaign_knows_its_stages():
    answer = subprocess.run(["bench/gpu_campaign.sh", "/nowhere", "benhc"], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 2
    assert "no run or stage benhc; there are correctness (facts tests golden" in answer.stderr


def test_the_readmes_show_what_the_results_say():
    answer = subprocess.run([sys.executable, "bench/report.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr


# Comparison


@pytest.mark.parametrize(
    "mine, other, expected",
    [
        ([1.0] * 9, [1.0] * 9, "SAME"),
        ([1.0] * 9, [1.019] * 9, "SAME"),
        ([1.0] * 9, [1.03] * 9, "FAST"),
        ([1.03] * 9, [1.0] * 9, "SLOW"),
        ([1, 2, 1, 2, 1, 2, 2], [1, 1, 2, 1, 2, 1, 1], "AMBIGUOUS"),
        ([1.0, 1.01], [1.3, 1.2], "FAST"),
        ([1.0, 2.0], [1.4, 1.5], "AMBIGUOUS"),
    ],
)
def test_the_verdict_comes_from_the_samples(mine, other, expected):
    assert compare.verdict(mine, other) == expected


def row_of(**changes):
    known = {
        "case": "c", "suites": ("quick",), "spec": SMALL, "batch": 2, "direction": "forward", "dtype": "float32",
        "backend": "numpy", "flops": 10**6, "bytes": 10**5, "by": "gpuconv", "layout": "channels_first",
        "asked": "auto", "algorithm": "im2col", "command": "gpuconv bench", "error": 1e-7, "of_bound": 0.1,
        "samples": (1e-3,) * 9,
    }  # fmt: skip
    return results.Row(**{**known, **changes})


def test_ratios_are_against_the_peer_s_faster_format_and_their_mean_is_geometric():
    rows = [
        row_of(),
        row_of(by="torch", samples=(8e-3,) * 9),
        row_of(by="torch", layout="channels_last", samples=(4e-3,) * 9),
        row_of(by="loops", refusal="no", samples=()),
        row_of(direction="data_grad", samples=(2e-3,) * 9),
        row_of(direction="data_grad", by="torch", samples=(1e-3,) * 9),
    ]
    found = compare.ratios(rows)
    assert [(r.row.direction, r.value, r.verdict) for r in found] == [
        ("forward", 4.0, "FAST"),
        ("data_grad", 0.5, "SLOW"),
    ]
    assert compare.geometric_mean([4, 0.25]) == 1
    assert report.means(found).lines == [
        ["quick", "float32", "channels_first", "auto", "torch", "4.00", "0.50", "-", "1", "1", "0"]
    ]
    assert [r.row.direction for r in report.worst(found)] == ["data_grad"]


def test_compare_says_what_changed_and_fails_when_asked_to(tmp_path, capsys):
    machine = {"CPU": "one", "GPU": "none", "gpuconv": "0"}
    before = results.Results(machine, rows=[row_of(), row_of(direction="data_grad"), row_of(direction="weight_grad")])
    slower = row_of(samples=(1.04e-3,) * 9)
    wrong = row_of(direction="weight_grad", of_bound=math.inf, samples=())
    after = replace(before, rows=[slower, before.rows[1]], machine={**machine, "CPU": "two"})
    for name, found in (("a", before), ("b", after), ("c", replace(before, rows=[*before.rows[:2], wrong]))):
        results.write_json(tmp_path / f"{name}.json", found)
    a, b, c = (str(tmp_path / f"{name}.json") for name in "abc")
    assert main(["bench", "compare", a, a, "--fail-slower", "0%"]) == 0
    assert "3 SAME" in capsys.readouterr().out
    assert main(["bench", "compare", a, b]) == 0
    printed = capsys.readouterr().out
    assert "1 SLOW, 1 SAME, 1 ONLY BEFORE" in printed
    assert "differs: CPU: one before, two now" in printed
    peers_slower = replace(before, rows=[row_of(by="torch", asked="", samples=(2e-3,) * 9)])
    peers = replace(before, rows=[row_of(by="torch", asked="")])
    for name, found in (("d", peers), ("e", peers_slower)):
        results.write_json(tmp_path / f"{name}.json", found)
    assert main(["bench", "compare", *(str(tmp_path / f"{name}.json") for name in "de"), "--fail-slower", "5%"]) == 0
    assert "1 SLOW" in capsys.readouterr().out
    assert main(["bench", "compare", a, b, "--fail-slower", "5%"]) == 0
    assert main(["bench", "compare", a, b, "--fail-slower", "3%"]) == 1
    assert "4% slower: c, forward" in capsys.readouterr().err
    assert main(["bench", "compare", a, c, "--fail-slower", "3%"]) == 1
    assert "wrong: c, weight_grad" in capsys.readouterr().err
    assert json.loads((tmp_path / "a.json").read_text())["schema"] == results.SCHEMA
