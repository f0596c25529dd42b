"""Measure the host time of first and later calls: small calls on NumPy, and calls with empty launches.

    python bench/host_time.py

This is the time that a call takes in addition to its array functions and launches.
"""

import statistics
import time
from unittest import mock

import numpy as np

import gpuconv
from gpuconv import execute
from gpuconv.arrays import NUMPY, Backend
from gpuconv.config import build

SMALL = ((1, 8, 16, 16), (8, 8, 3, 3))
LAYER = ((8, 64, 14, 14), (64, 64, 3, 3))  # computed by implicit_gemm: one launch, or two for weight_grad
FIRST, LATER, TURNS = 15, 2000, 5


def calls(x_shape, w_shape):
    """Return a call of each direction."""
    rng = np.random.default_rng(0)
    y_shape = (x_shape[0], w_shape[0], *x_shape[2:])
    x, w, dy = (rng.standard_normal(shape, dtype=np.float32) for shape in (x_shape, w_shape, y_shape))
    return {
        "forward": lambda: gpuconv.conv(x, w, padding=1),
        "data_grad": lambda: gpuconv.conv_data_grad(dy, w, x_shape, padding=1),
        "weight_grad": lambda: gpuconv.conv_weight_grad(dy, x, w_shape, padding=1),
    }


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def medians(call):
    """Return the median seconds of first calls, after clear_cache, and of later calls."""
    first = []
    for _ in range(FIRST):
        gpuconv.clear_cache()
        first.append(seconds(call))
    later = [[seconds(call) for _ in range(LATER)] for _ in range(TURNS)]
    return statistics.median(first), min(map(statistics.median, later))


def main():
    print(", ".join(f"{name} {value}" for name, value in build(NUMPY).items()))
    print("\n| call | direction | first, ms | later, us |\n|---|---|--:|--:|")
    empty = Backend("emulated", np, lambda *_: lambda *__: None)
    for name, shapes, backend in (("small, on NumPy", SMALL, NUMPY), ("empty launches", LAYER, empty)):
        with mock.patch.object(execute, "backend_for", return_value=backend):
            for direction, call in calls(*shapes).items():
                first, later = medians(call)
                print(f"| {name} | {direction} | {first * 1e3:.2f} | {later * 1e6:.0f} |")


if __name__ == "__main__":
    main()
