"""Compare gpuconv.compat.signal.convolve with the better method of scipy.signal.convolve, timed alternately.

    python bench/signal_functions.py

The output is a Markdown table. The mode is "same", and method="auto" of gpuconv is compared with "direct" and "fft" of
SciPy.
"""

from functools import partial

import numpy as np
import scipy.signal
from fft_signals import seconds

from gpuconv.arrays import NUMPY
from gpuconv.compat import signal
from gpuconv.config import build

EXTENTS = {
    1: ((100, 1000, 10_000, 100_000, 1_000_000), (3, 30, 100, 1000, 10_000)),
    2: ((32, 128, 512, 1024), (3, 7, 15, 31, 101)),
    3: ((16, 32, 64, 96), (3, 7, 15)),
}
DTYPES = ("float32", "float64", "complex64", "complex128")
TURNS, SECONDS = 5, 0.05  # seconds for all turns of one function
MOST_PRODUCTS = {1: 3e9, 2: 1e8, 3: 1e8}  # of direct sums by SciPy, which are far slower than its transforms beyond


def measured(x, w):
    """Return the median seconds of gpuconv, and of SciPy's methods fft and direct."""
    methods = ("fft", "direct") if x.size * w.size <= MOST_PRODUCTS[x.ndim] else ("fft",)
    calls = [
        partial(signal.convolve, x, w, "same"),
        *(partial(scipy.signal.convolve, x, w, "same", method) for method in methods),
    ]
    results = [call() for call in calls]
    assert np.abs(results[0] - results[1]).max() <= 1e3 * np.finfo(x.dtype).eps * np.abs(results[1]).max()
    numbers = [max(1, round(SECONDS / TURNS / seconds(call, 1))) for call in calls]
    turns = [[seconds(call, number) for call, number in zip(calls, numbers, strict=True)] for _ in range(TURNS)]
    return np.median(turns, axis=0)


def main():
    print(", ".join(f"{name} {value}" for name, value in {**build(NUMPY), "SciPy": scipy.__version__}.items()))
    print()
    print("| signal | kernel | dtype | gpuconv auto \N{MICRO SIGN}s | SciPy fft | SciPy direct | gpuconv / better |")
    print("|---|---|---|--:|--:|--:|--:|")
    rng = np.random.default_rng(0)
    cases = [(n, k, axes) for axes, (signals, kernels) in EXTENTS.items() for n in signals for k in kernels if k <= n]
    for n, k, axes in cases:
        for dtype in DTYPES:
            x, w = (rng.standard_normal((extent,) * axes).astype(dtype) for extent in (n, k))
            ours, *theirs = measured(x, w)
            times = " | ".join(f"{time * 1e6:.0f}" for time in (ours, *theirs)) + " |" * (2 - len(theirs))
            print(f"| {n}^{axes} | {k}^{axes} | {dtype} | {times} | {ours / min(theirs):.2f} |", flush=True)


if __name__ == "__main__":
    main()
