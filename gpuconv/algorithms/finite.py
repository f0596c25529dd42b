"""Whether NaN or Inf is in an array, in one pass over it; numbers too large to be added up count as such."""

from __future__ import annotations

import numpy

from gpuconv import dtypes
from gpuconv.backend import Array


def has_finite_sum(array: Array) -> bool:
    """False where there is NaN or Inf."""
    with numpy.errstate(over="ignore", invalid="ignore"):
        total = array.sum(dtype=dtypes.accumulator(dtypes.native(array.dtype)))
        return bool(total - total == 0)


def has_finite_square(block: Array) -> bool:
    """The same of a contiguous block, quicker."""
    flat = block.reshape(-1)
    with numpy.errstate(over="ignore", invalid="ignore"):
        square = flat.dot(flat)
        return bool(square - square == 0)
