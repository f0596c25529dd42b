"""The error bounds of results."""

import math

import numpy as np

from gpuconv.select import TRANSFORMS
from tests.cases import named_dtype


def epsilon(dtype):
    dtype = named_dtype(dtype)
    return 2.0**-7 if dtype.name == "bfloat16" else float(np.finfo(dtype).eps)


def direct_bound(exact, magnitude, terms, dtype):
    """Return the elementwise bound: one rounding of the result, and the rounding of a sum of ``terms`` products.

    ``magnitude`` is the same sum over the absolute values, sum |x| |w|. A random walk of K roundings has the length
    sqrt(K). Blocked sums stay within twice that length, and a complex product has four real ones.
    """
    factor = 8 if named_dtype(dtype).kind == "c" else 2
    return epsilon(dtype) * np.abs(exact) + factor * math.sqrt(terms) * epsilon(_accumulator(dtype)) * magnitude


def bound_of(algorithm, exact, magnitude, terms, dtype):
    """Return the bound of an algorithm; for products of transforms it is relative to the largest of all results."""
    if algorithm not in TRANSFORMS:
        return direct_bound(exact, magnitude, terms, dtype)
    return epsilon(dtype) * np.abs(exact) + 16 * epsilon(_accumulator(dtype)) * magnitude.max(initial=0)


def _accumulator(dtype):
    dtype = named_dtype(dtype)
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype


def assert_within(result, exact, bound):
    """Assert that every element is finite and within its bound."""
    result = result.astype(exact.dtype)
    assert result.shape == exact.shape
    error = np.abs(result - exact)
    within = error <= bound
    assert np.isfinite(result).all(), "the result is not finite"
    if not error.size:
        return
    worst = np.unravel_index(np.argmax(error - bound), error.shape)
    assert within.all(), (
        f"at {worst}: {result[worst]} but exactly {exact[worst]}, bound {np.broadcast_to(bound, error.shape)[worst]}"
    )
