"""Compares gpuconv's NumPy backend with the textbook: four nested loops with a NumPy product inside.

    python bench/against_loops.py

x is (8, 16, 32, 32), w (32, 16, 3, 3), stride 1, padding 1, float32. The loops run once in each direction, and their
results must agree with gpuconv's; gpuconv's time is the median of 30 calls made in between.
"""

import itertools
import statistics
import time

import numpy as np

import gpuconv

SETTINGS = {"stride": 1, "padding": 1}


def forward(x, w):
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    y = np.zeros((len(x), len(w), *x.shape[2:]), x.dtype)
    for n, f, i, j in itertools.product(*map(range, y.shape)):
        y[n, f, i, j] = np.sum(padded[n, :, i : i + 3, j : j + 3] * w[f])
    return y


def data_grad(dy, w, x_shape):
    padded = np.zeros((*x_shape[:2], x_shape[2] + 2, x_shape[3] + 2), dy.dtype)
    for n, f, i, j in itertools.product(*map(range, dy.shape)):
        padded[n, :, i : i + 3, j : j + 3] += dy[n, f, i, j] * w[f]
    return padded[:, :, 1:-1, 1:-1]


def weight_grad(dy, x, w_shape):
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    dw = np.zeros(w_shape, dy.dtype)
    for n, f, i, j in itertools.product(*map(range, dy.shape)):
        dw[f] += dy[n, f, i, j] * padded[n, :, i : i + 3, j : j + 3]
    return dw


def seconds(call):
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def main():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((8, 16, 32, 32), np.float32), rng.standard_normal((32, 16, 3, 3), np.float32)
    dy = rng.standard_normal((8, 32, 32, 32), np.float32)
    pairs = {
        "forward": (lambda: forward(x, w), lambda: gpuconv.conv(x, w, **SETTINGS)),
        "data_grad": (lambda: data_grad(dy, w, x.shape), lambda: gpuconv.conv_data_grad(dy, w, x.shape, **SETTINGS)),
        "weight_grad": (
            lambda: weight_grad(dy, x, w.shape),
            lambda: gpuconv.conv_weight_grad(dy, x, w.shape, **SETTINGS),
        ),
    }
    for direction, (loops, ours) in pairs.items():
        samples = [seconds(ours)[0] for _ in range(15)]
        theirs, expected = seconds(loops)
        samples += [seconds(ours)[0] for _ in range(15)]
        np.testing.assert_allclose(ours(), expected, rtol=1e-3, atol=1e-2)
        mine = statistics.median(samples)
        print(f"{direction:<12} loops {theirs:7.2f} s   gpuconv {mine * 1e3:6.2f} ms   {theirs / mine:6.0f} times")


if __name__ == "__main__":
    main()
