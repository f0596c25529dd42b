"""Whether NaN or Inf is in an array."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy

from gpuconv import dtypes
from gpuconv.backend import Array
from gpuconv.operands import in_place
from gpuconv.plan import Body, Planner
from gpuconv.views import View


def is_finite(array: Array) -> bool:
    """Whether neither NaN nor Inf is in an array.

    If its sum is finite, so is every element. Otherwise the sum may have overflowed, and max and min decide.
    """
    with numpy.errstate(over="ignore", invalid="ignore"):
        total = array.sum(dtype=dtypes.accumulator(dtypes.native(array.dtype)))
        return bool(total - total == 0) or _has_finite_extremes(array)


def is_finite_block(block: Array) -> bool:
    """The same of a contiguous block in the dtype of the sums, quicker."""
    flat = block.reshape(-1)
    with numpy.errstate(over="ignore", invalid="ignore"):
        square = flat.dot(flat)
        return bool(square - square == 0) or _has_finite_extremes(flat)


def if_finite(view: View, yes: Body, no: Body, planner: Planner) -> None:
    """The steps of ``yes`` where neither NaN nor Inf is in an array when the plan runs, else of ``no``."""
    flat = view.flat() if in_place(view, planner.dtype) else None
    question, seen = (is_finite, view) if flat is None else (is_finite_block, flat)
    planner.choose(question, seen, yes, no)


def note(flag: Array, block: Array, question: Callable[[Array], bool]) -> None:
    """Makes the flag 0 where the answer is no for a block."""
    if not question(block):
        flag[...] = 0


def _has_finite_extremes(array: Array) -> bool:
    """Whether max and min are finite; both are NaN if an element is."""
    if array.dtype.kind == "c":
        return _has_finite_extremes(array.real) and _has_finite_extremes(array.imag)
    return math.isfinite(float(array.max())) and math.isfinite(float(array.min()))
