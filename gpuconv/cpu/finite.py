"""Checks whether arrays contain NaN or Inf."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy

from gpuconv import dtypes
from gpuconv.arrays import Array
from gpuconv.operands import in_place
from gpuconv.plan import Body, Planner
from gpuconv.views import View


def is_finite(array: Array) -> bool:
    """Return whether an array contains neither NaN nor Inf.

    If its sum is finite, so is every element. Otherwise the sum may have overflowed, and max and min decide.
    """
    with numpy.errstate(over="ignore", invalid="ignore"):
        total = array.sum(dtype=dtypes.accumulator(dtypes.native(array.dtype)))
        return bool(total - total == 0) or _has_finite_extremes(array)


def is_finite_block(block: Array) -> bool:
    """Return the same as is_finite for a contiguous block in the dtype of the sums, but faster."""
    flat = block.reshape(-1)
    with numpy.errstate(over="ignore", invalid="ignore"):
        square = flat.dot(flat)
        return bool(square - square == 0) or _has_finite_extremes(flat)


def if_finite(view: View, yes: Body, no: Body, planner: Planner) -> None:
    """Plan ``yes`` for the case that an array is finite when the plan runs, and ``no`` for the other case."""
    flat = view.flat() if in_place(view, planner.dtype) else None
    question, seen = (is_finite, view) if flat is None else (is_finite_block, flat)
    planner.choose(question, seen, yes, no)


def note(flag: View, block: View, question: Callable[[Array], bool], planner: Planner) -> None:
    """Plan a step that sets the flag to 0 if a block is non-finite: on NumPy, if ``question(block)`` is false.

    On a GPU the device decides, since otherwise the host would wait for the answer for every block.
    """
    if planner.backend.kind == "cupy":
        planner.call(_note_on_device, flag, block, planner.xp)
    else:
        planner.call(_note, flag, block, question)


def _note(flag: Array, block: Array, question: Callable[[Array], bool]) -> None:
    if not question(block):
        flag[...] = 0


def _note_on_device(flag: Array, block: Array, xp: Any) -> None:
    for part in (block.real, block.imag) if block.dtype.kind == "c" else (block,):
        for extreme in (part.max(), part.min()):  # both are NaN if an element is
            xp.logical_and(flag, xp.isfinite(extreme), out=flag)


def _has_finite_extremes(array: Array) -> bool:
    """Return whether max and min are finite; both are NaN if an element is."""
    if array.dtype.kind == "c":
        return _has_finite_extremes(array.real) and _has_finite_extremes(array.imag)
    return math.isfinite(float(array.max())) and math.isfinite(float(array.min()))
