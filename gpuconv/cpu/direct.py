"""direct on NumPy: vectors of filters share an input, by kernels that Numba compiles (vector_plan.py).

There is no unfolded matrix in memory. This is faster than a matrix product where that would be narrow or short: small
layers, few channels, and groups of about as many filters as a vector has lanes.
"""

from __future__ import annotations

import math

from gpuconv import dtypes
from gpuconv.cpu import cost_model, slices, vector_plan
from gpuconv.geometry import Geometry
from gpuconv.operands import Operand, Result
from gpuconv.plan import Planner
from gpuconv.request import Request

PRODUCT = 0.025  # nanoseconds of a float32 multiply-add with many filters, as in cost_model.py
GRADIENT, FAR = 2, 1.6  # times as slow: weight_grad; with weights beyond the cache
FAR_BYTES = 1 << 20


def why_not(request: Request) -> str | None:
    """Return a reason without Numba, for more than three spatial axes, or if the workspace does not suffice."""
    geometry, dtype = request.geometry, dtypes.accumulator(request.dtype)
    if reason := vector_plan.not_compiled(geometry, dtype, request.backend):
        return reason
    return request.lacks(vector_plan.least(geometry, request.direction, dtype, True), "weights and one output")


def nanoseconds(request: Request) -> float:
    """Estimate the time to multiply and add, and to copy results and weights."""
    geometry, dtype = request.geometry, dtypes.accumulator(request.dtype)
    lanes = geometry.group_channels if request.direction == "data_grad" else geometry.group_filters
    padded = vector_plan.padded(lanes, dtype)
    each = PRODUCT * (1 + vector_plan.padded(1, dtype) / padded)  # twice as slow with one vector
    if request.direction == "weight_grad":
        each *= GRADIENT
    if math.prod(geometry.w_shape) * dtype.itemsize > FAR_BYTES * geometry.groups:
        each *= FAR
    products = geometry.multiply_adds() * padded / lanes * each
    written = geometry.filters * math.prod(geometry.output)
    if request.direction == "data_grad":
        written = geometry.channels * math.prod(geometry.input)
    moved = 3 if geometry.layout == "channels_first" else 1
    copied = cost_model.COPY * (moved * math.prod(geometry.batch) * written + 2 * moved * math.prod(geometry.w_shape))
    phases = math.prod(geometry.stride) if request.direction == "data_grad" else 1
    steps = (2 + 3 * geometry.groups * phases) * cost_model.STEP
    return (products + copied) * dtype.itemsize / 4 + steps


def forward(x: Operand, w: Operand, y: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute ``y[o] = sum over taps t and channels c of x[o * stride + t * dilation - low, c] w[t, c]``."""
    if not vector_plan.forward(x, w, y, geometry, planner, shared=True):
        slices.forward(x, w, y, geometry, planner)


def data_grad(dy: Operand, w: Operand, dx: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute dx, the transpose of forward."""
    if not vector_plan.data_grad(dy, w, dx, geometry, planner, shared=True):
        slices.data_grad(dy, w, dx, geometry, planner)


def weight_grad(dy: Operand, x: Operand, dw: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute ``dw[t, c] = sum over outputs o of x[o * stride + t * dilation - low, c] dy[o]``."""
    if not vector_plan.weight_grad(dy, x, dw, geometry, planner, shared=True):
        slices.weight_grad(dy, x, dw, geometry, planner)
