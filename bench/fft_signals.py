"""Compare single-channel convolutions by algorithm="fft" with scipy.signal.fftconvolve, timed alternately.

    python bench/fft_signals.py

The output is a Markdown table.
"""

import time

import numpy as np
import scipy
import scipy.signal

import gpuconv
from gpuconv.arrays import NUMPY
from gpuconv.config import build

SIGNALS = (
    ((1 << 16,), (4000,)),
    ((1 << 21,), (1000,)),
    ((1 << 21,), (100_000,)),
    ((512, 512), (33, 33)),
    ((2048, 2048), (63, 63)),
    ((32, 96, 96), (9, 9, 9)),
    ((64, 256, 256), (32, 32, 32)),
)
TURNS, SECONDS = 7, 0.2


def seconds(call, number):
    start = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - start) / number


def measured(x, w, mode):
    """Return the median seconds of SciPy and of gpuconv, after a check that their results agree."""

    def theirs():
        return scipy.signal.fftconvolve(x, w, mode)

    def ours():
        return gpuconv.conv(x[None], w[None, None], padding=mode, flip=True, algorithm="fft")[0]

    if mode == "valid":  # for "same" and an even kernel SciPy pads the other end
        expected, found = theirs(), ours()
        assert np.abs(found - expected).max() <= 100 * np.finfo(x.dtype).eps * np.abs(expected).max()
    numbers = [max(1, round(SECONDS / TURNS / seconds(call, 1))) for call in (theirs, ours)]
    turns = [
        [seconds(call, number) for call, number in zip((theirs, ours), numbers, strict=True)] for _ in range(TURNS)
    ]
    return np.median(turns, axis=0)


def main():
    print(", ".join(f"{name} {value}" for name, value in {**build(NUMPY), "SciPy": scipy.__version__}.items()))
    print()
    print("| signal | kernel | dtype | mode | SciPy ms | gpuconv ms | gpuconv / SciPy |")
    print("|---|---|---|---|--:|--:|--:|")
    rng = np.random.default_rng(0)
    for signal, kernel in SIGNALS:
        for dtype in (np.float32, np.float64):
            x, w = (rng.standard_normal(shape).astype(dtype) for shape in (signal, kernel))
            for mode in ("valid", "same"):
                theirs, ours = measured(x, w, mode)
                sizes = (" x ".join(map(str, shape)) for shape in (signal, kernel))
                times = f"{theirs * 1e3:.1f} | {ours * 1e3:.1f} | {ours / theirs:.2f}"
                print(f"| {' | '.join(sizes)} | {np.dtype(dtype)} | {mode} | {times} |", flush=True)


if __name__ == "__main__":
    main()
