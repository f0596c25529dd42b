"""The choices of auto on NumPy by the algorithms' estimates, compared with the times of ``gpuconv tune``."""

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import gpuconv
from gpuconv import dtypes, select
from gpuconv import geometry as geometry_module
from gpuconv.arrays import NUMPY
from gpuconv.benchmark import layers
from gpuconv.benchmark.compare import geometric_mean
from gpuconv.cpu import compiled, slices
from gpuconv.geometry import DIRECTIONS
from gpuconv.request import Request

SWEEPS = sorted((Path(__file__).parent.parent / "bench" / "results").glob("*/sweep.json"))


def losses(rows):
    """Return the time of auto's choice divided by that of the fastest algorithm, with the row."""
    for row in rows:
        case = layers.parsed(row["spec"])
        geometry = case.geometry(case.batches[0], row["layout"])
        taken = select.untuned(Request(geometry, dtypes.named(row["dtype"]), row["direction"], NUMPY)).algorithm
        if taken in row["seconds"]:
            yield row["seconds"][taken] / min(row["seconds"].values()), row


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda path: path.parent.name)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_estimates_lose_little_against_a_sweep(direction, sweep, monkeypatch):
    """The choice is among the algorithms that existed when the sweep was measured, with Numba if it was installed."""
    recorded = json.loads(sweep.read_text())
    monkeypatch.setattr(compiled, "version", lambda: recorded["machine"].get("Numba"))
    rows = [row for row in recorded["rows"] if row["direction"] == direction]
    measured = {name for row in rows for name in row["seconds"]}
    monkeypatch.setattr(select, "MODULES", {name: select.MODULES[name] for name in measured})
    found = list(losses(rows))
    assert len(found) > 100
    assert len(found) > 0.95 * len(rows)
    assert geometric_mean(loss for loss, _ in found) < 1.05


@pytest.mark.parametrize(
    "extent, kernel, axes, dtype, fastest",
    [
        (1000, 1000, 1, "float64", "fft"),
        (512, 7, 2, "float32", "im2col"),
        (512, 7, 2, "float64", "im2col"),
        (64, 3, 3, "float32", "im2col"),
        (64, 7, 3, "float64", "fft"),
    ],
)
def test_one_channel_is_not_computed_by_kernels_whose_lanes_are_channels(
    extent, kernel, axes, fastest, dtype, monkeypatch
):
    """On the machine of cost_model.py with Numba, they take 2 to 12 times as long as the fastest algorithm."""
    monkeypatch.setattr(compiled, "version", lambda: "0.68.1")
    shapes = (1, 1, *(extent,) * axes), (1, 1, *(kernel,) * axes)
    assert gpuconv.explain(*shapes, padding="same", dtype=dtype, backend="numpy").algorithm == fastest


def test_a_sweep_has_the_compiled_kernels():
    assert any("Numba" in json.loads(sweep.read_text())["machine"] for sweep in SWEEPS)


@pytest.mark.parametrize("name", ["im2col", "fft", "scatter"])
def test_for_a_named_algorithm_only_its_own_reasons_are_asked(name, monkeypatch):
    for other, module in select.MODULES.items():
        if other != name:
            monkeypatch.setattr(module, "why_not", mock.Mock(side_effect=AssertionError(other)))
        monkeypatch.setattr(module, "nanoseconds", mock.Mock(side_effect=AssertionError(other)), raising=False)
    x, w = np.ones((1, 2, 6, 5)), np.ones((3, 2, 3, 3))
    np.testing.assert_allclose(gpuconv.conv(x, w, algorithm=name), 18)


class ShortRange:
    """A range that fails if it is iterated over and long."""

    def __init__(self, *given):
        self.numbers = range(*given)

    def __len__(self):
        return len(self.numbers)

    def __iter__(self):
        assert len(self.numbers) < 10**4, "a loop over taps"
        return iter(self.numbers)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_choice_takes_no_step_for_each_tap(direction, monkeypatch):
    """There are 10**9 taps, and the workspace limit is no reason to refuse."""
    monkeypatch.setenv("GPUCONV_WORKSPACE_LIMIT", "1000GiB")
    for module in (geometry_module, slices):
        monkeypatch.setattr(module, "range", ShortRange, raising=False)
    for channels in (1, 5):
        found = gpuconv.explain(
            (1, channels, 1_100_000_000), (1, channels, 10**9), direction=direction, backend="numpy"
        )
        assert found.algorithm in gpuconv.ALGORITHMS


def test_there_is_a_sweep():
    assert SWEEPS
