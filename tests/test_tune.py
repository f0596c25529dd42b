"""Results of tune are stored and used; damaged, foreign and wrong results are not."""

import contextlib
import json
import os
from unittest import mock

import numpy as np
import pytest

import gpuconv
from gpuconv import cli, tuned
from gpuconv.arrays import NUMPY
from gpuconv.cpu import compiled, winograd
from gpuconv.geometry import Geometry
from gpuconv.request import Request
from gpuconv.select import MODULES
from gpuconv.tuning import _candidates
from tests import reference
from tests.emulation.launcher import EMULATED

X, W = (2, 64, 56, 56), (64, 64, 3, 3)
FOLDER = tuned._folder.__wrapped__  # the library's function, which conftest.py replaces
FLOAT32 = np.dtype(np.float32)


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(tuned, "_folder", lambda backend: tmp_path / backend.name)
    gpuconv.clear_cache()
    yield
    gpuconv.clear_cache()


def test_answers_lie_in_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(tuned, "_folder", FOLDER)
    monkeypatch.setenv("GPUCONV_CACHE_DIR", str(tmp_path / "cache"))
    remember("scatter")
    assert tuned.path(NUMPY).parent == tmp_path / "cache" / "tuned" / "numpy"
    assert tuned.path(NUMPY).exists()
    assert explained().algorithm == "scatter"


def geometry():
    return Geometry.infer(X, W, padding=1)


def explained(direction="forward", dtype="float32"):
    return gpuconv.explain(X, W, padding=1, direction=direction, dtype=dtype, backend="numpy")


def remember(algorithm, direction="forward", dtype=FLOAT32):
    tuned.remember(NUMPY, direction, geometry(), dtype, algorithm)
    gpuconv.clear_cache()


def test_the_fastest_is_remembered_and_taken():
    found = gpuconv.tune(X, W, padding=1, backend="numpy", seconds=0.002)
    assert [one.direction for one in found] == ["forward", "data_grad", "weight_grad"]
    for one in found:
        assert one.fastest in one.seconds
        assert one.default in one.seconds
        assert one.geometry == geometry()
        assert min(one.seconds.values()) > 0
        assert not one.wrong
        explanation = explained(one.direction)
        assert explanation.algorithm == one.fastest
        assert "tune" in explanation.reason
    assert "tune" not in explained(dtype="float64").reason


def test_an_answer_counts_for_its_own_shapes_dtype_and_direction():
    remember("scatter")
    assert explained().algorithm == "scatter"
    assert explained("data_grad").algorithm != "scatter"
    assert explained(dtype="float64").algorithm != "scatter"
    other = gpuconv.explain((X[0] + 1, *X[1:]), W, padding=1, backend="numpy")
    assert other.algorithm != "scatter"
    x, w = np.ones(X, np.float32), np.ones(W, np.float32)
    exact = reference.forward(x, w, stride=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1))
    np.testing.assert_array_equal(gpuconv.conv(x, w, padding=1), exact)


def test_an_algorithm_that_cannot_is_not_taken():
    for name in ("depthwise", "no such algorithm"):
        remember(name)
        assert explained().algorithm not in ("depthwise", "no such algorithm")


@pytest.mark.called_once("the library is broken for some of its calls")
def test_a_wrong_result_is_never_taken():
    def wrong(x, w, y, geometry, planner):
        planner.copy(y.view, 0)

    with mock.patch.object(winograd, "forward", wrong):
        (found,) = gpuconv.tune(X, W, padding=1, directions="forward", backend="numpy", seconds=0.002)
    assert found.wrong == ("winograd",)
    assert "winograd" not in found.seconds
    assert found.default == "winograd"
    assert np.isnan(found.gain)
    assert explained().algorithm != "winograd"


class SetClock:
    """A clock that assigns given times to calls, in the order of their first use."""

    def __init__(self, *seconds):
        self.seconds, self.calls = seconds, []

    def running(self):
        return contextlib.nullcontext()

    def first(self, call):
        if call not in self.calls:
            self.calls.append(call)
        return self.seconds[self.calls.index(call)], call()

    def samples(self, call, count):
        assert count >= 1
        return [self.seconds[self.calls.index(call)]] * count


@pytest.mark.parametrize("other, fastest", [(0.90, "im2col"), (0.98, "winograd"), (1.5, "winograd")])
def test_another_algorithm_is_taken_where_it_is_faster_by_more_than_the_noise(other, fastest, monkeypatch):
    """Without Numba, the candidates for this layer are im2col, winograd, which is the default, and scatter."""
    monkeypatch.setattr(compiled, "version", lambda: None)
    monkeypatch.setattr("gpuconv.benchmark.timing.clock_for", lambda backend: SetClock(other, 1.0, 3.0))
    (found,) = gpuconv.tune(X, W, padding=1, directions="forward", backend="numpy", seconds=1)
    assert found.seconds == {"im2col": other, "winograd": 1.0, "scatter": 3.0}
    assert (found.default, found.fastest, explained().algorithm) == ("winograd", fastest, fastest)


def test_algorithms_that_their_estimates_rule_out_are_not_tried():
    request = Request(geometry(), FLOAT32, "forward", NUMPY)
    estimates = {name: module.nanoseconds(request) for name, module in MODULES.items() if not module.why_not(request)}
    assert estimates["fft"] > 4 * min(estimates.values())
    found = _candidates(request)
    assert found == [name for name in MODULES if estimates.get(name, np.inf) <= 4 * min(estimates.values())]
    assert len(found) > 1
    assert "fft" in _candidates(request._replace(backend=EMULATED))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"answers": 3}', '{"answers": {"a": 3}}', "\xff\xfe"])
def test_a_damaged_file_is_passed_over_with_a_warning_and_replaced(content):
    before = explained()
    remember("scatter")
    tuned.path(NUMPY).write_text(content, encoding="latin-1")
    gpuconv.clear_cache()
    with pytest.warns(RuntimeWarning, match="are ignored"):
        assert explained() == before
    gpuconv.clear_cache()
    with pytest.warns(RuntimeWarning, match="are ignored"):
        tuned.remember(NUMPY, "forward", geometry(), FLOAT32, "scatter")
    gpuconv.clear_cache()
    assert explained().algorithm == "scatter"


def test_another_machine_library_or_build_has_another_file():
    remember("scatter")
    facts = json.loads(tuned.path(NUMPY).read_text())["build"]
    assert facts["gpuconv"] == gpuconv.__version__
    assert np.__version__ in facts["NumPy"]
    for name in facts:
        with mock.patch.object(tuned, "build", return_value={**facts, name: "another"}):
            gpuconv.clear_cache()
            assert explained().algorithm != "scatter"


def test_what_cannot_be_written_leaves_the_old_file():
    remember("scatter")
    content = tuned.path(NUMPY).read_text()
    with mock.patch.object(os, "replace", side_effect=OSError("no room")), pytest.raises(OSError, match="no room"):
        remember("im2col")
    assert tuned.path(NUMPY).read_text() == content
    assert [path.name for path in tuned.path(NUMPY).parent.iterdir()] == [tuned.path(NUMPY).name]


def test_answers_of_several_calls_are_kept():
    remember("scatter")
    remember("winograd", "data_grad")
    assert explained().algorithm == "scatter"
    assert explained("data_grad").algorithm == "winograd"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"directions": ("forward", "backward")}, "directions must be among .*'backward'"),
        ({"backend": "jax"}, "backend must be one of .*'jax'"),
        ({"seconds": 0}, "seconds must be more than 0"),
        ({"stride": 0}, "stride"),
        ({"layout": "NCHW"}, "layout"),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        gpuconv.tune(X, W, padding=1, **options)


@pytest.mark.parametrize(
    "case", ["n=1 c=4 h=12 w=12 k=4 r=3 s=3 pad=1", "n=1 c=4 h=6 w=6 k=2 r=2 s=2 stride=2 transposed=1"]
)
def test_the_command_tunes_and_writes(case, capsys, tmp_path):
    file = tmp_path / "tuned.json"
    options = ["tune", "--case", case, "--seconds", "0.001", "--layout", "channels_last", "--backend", "numpy"]
    assert cli.main([*options, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("channels_last") == 3
    assert str(tuned.path(NUMPY)) in printed
    rows = json.loads(file.read_text())["rows"]
    assert [row["direction"] for row in rows] == ["forward", "data_grad", "weight_grad"]
    assert all(row["seconds"][row["fastest"]] > 0 for row in rows)


@pytest.mark.called_once("the library is broken for some of its calls")
def test_the_command_fails_where_a_result_is_wrong(capsys):
    def wrong(x, w, y, geometry, planner):
        planner.copy(y.view, 0)

    options = [
        "tune",
        "--case",
        "n=1 c=64 h=28 w=28 k=64 r=3 s=3 pad=1",
        "--direction",
        "forward",
        "--seconds",
        "0.001",
    ]
    with mock.patch.object(winograd, "forward", wrong):
        assert cli.main([*options, "--backend", "numpy"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG: winograd" in printed
    assert "times as fast as winograd" not in printed


@pytest.mark.called_once("the library is broken for some of its calls")
def test_nothing_is_remembered_where_all_are_wrong():
    def wrong(x, w, y, geometry, planner):
        planner.copy(y.view, 0)

    with contextlib.ExitStack() as patched:
        for module in MODULES.values():
            patched.enter_context(mock.patch.object(module, "forward", wrong))
        (found,) = gpuconv.tune(X, W, padding=1, directions="forward", backend="numpy", seconds=0.002)
    assert found.fastest == found.default
    assert found.default in found.wrong
    assert np.isnan(found.gain)
    assert not tuned.path(NUMPY).exists()
