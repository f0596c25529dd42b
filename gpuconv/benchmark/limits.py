"""Limits of the machine, for the roofline: the measured rates of a copy and of matrix products.

The roofline model is Williams, Waterman and Patterson 2009, doi:10.1145/1498765.1498785.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy

from gpuconv import dtypes
from gpuconv.arrays import Array, Backend
from gpuconv.benchmark.timing import Clock
from gpuconv.gpu import cublas

COPY_BYTES = {"numpy": 2**28, "cupy": 2**31}
EXTENT = {"numpy": 2048, "cupy": 8192}  # of the square matrices
SAMPLES = 5


class Limits(NamedTuple):
    """Bytes per second of a copy, reads plus writes, and operations per second of a matrix product, by dtype."""

    bandwidth: float
    peaks: dict[str, float]

    def seconds(self, flops: int, moved: int, dtype: str) -> float | None:
        """Return the minimum seconds for a number of operations and bytes; None if the dtype was not measured."""
        peak = self.peaks.get(dtype)
        return None if peak is None else max(flops / peak, moved / self.bandwidth)


def measured(place: Backend, names: Sequence[str], clock: Clock) -> Limits:
    """Return the limits of a backend for dtypes, which may include "tf32"."""
    peaks = {}
    for name in names:
        with contextlib.suppress(TypeError, ValueError, RuntimeError, NotImplementedError):  # CuPy lacks some dtypes
            peaks[name] = product_rate(place, name, clock)
    return Limits(bandwidth(place, clock), peaks)


def bandwidth(place: Backend, clock: Clock) -> float:
    """Return the bytes per second that a copy reads and writes, of the fastest sample."""
    source = place.xp.ones(COPY_BYTES[place.kind] // 8, numpy.float64)
    target = place.xp.empty_like(source)
    seconds = min(clock.samples(lambda: place.xp.copyto(target, source), SAMPLES))
    return float(2 * source.nbytes / seconds)


def product_rate(place: Backend, name: str, clock: Clock) -> float:
    """Return the operations per second of a product of random square matrices, of the fastest sample.

    NumPy has no fast product in half precision. There the rate of float32 is used, in which gpuconv computes.
    """
    dtype = dtypes.named("float32" if name == "tf32" else name)
    if place.kind == "numpy":
        dtype = dtypes.accumulator(dtype)
    n = EXTENT[place.kind]
    rng = place.xp.random.default_rng(0)
    a, b = (_square(rng, n, dtype) for _ in range(2))
    c = place.xp.empty((n, n), dtype)

    multiply = cublas.of_squares(n, name) if name in cublas.NAMES and place.kind == "cupy" else place.xp.matmul
    seconds = min(clock.samples(lambda: multiply(a, b, out=c), SAMPLES))
    return (8 if dtypes.is_complex(dtype) else 2) * n**3 / seconds


def _square(rng: Any, n: int, dtype: numpy.dtype) -> Array:
    values = rng.standard_normal((n, n), dtype=numpy.float32)
    return (values + 1j * values.T if dtypes.is_complex(dtype) else values).astype(dtype)
