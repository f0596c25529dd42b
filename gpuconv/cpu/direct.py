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

# Nanoseconds of float32, as in cost_model.py.
PRODUCT, GRADIENT = 0.024, 0.018  # a multiply-add; in weight_grad
EDGES = 8  # outputs that take as long in weight_grad as the two ends of a row
FAR, FAR_GRADIENT = 1.2, 2.5  # times as slow: with weights of a group beyond the cache; in weight_grad
FAR_BYTES = 1 << 20
TAP = 0.4  # of a product: the time of a tap for any number of channels
READ, WRITE, COPY = 0.56, 0.1, 0.35  # an element of an input, of a result with all lanes of its vectors; to copy it
COLLECT, SPREAD = 0.73, 4  # in channels_first, an element of an input; of a result, to copy it with a stride


def why_not(request: Request) -> str | None:
    """Return a reason without Numba, for more than three spatial axes, or if the workspace does not suffice."""
    geometry, dtype = request.geometry, dtypes.accumulator(request.dtype)
    if reason := vector_plan.not_compiled(geometry, dtype, request.backend):
        return reason
    return request.lacks(vector_plan.least(geometry, request.direction, dtype, True), "weights and one output")


def nanoseconds(request: Request) -> float:
    """Estimate the time to multiply and add, to read inputs, to write or copy results and weights, and of calls."""
    geometry, dtype = request.geometry, dtypes.accumulator(request.dtype)
    is_gradient, is_transposed = request.direction == "weight_grad", request.direction == "data_grad"
    inputs, outputs = math.prod(geometry.input) * geometry.channels, math.prod(geometry.output) * geometry.filters
    lanes = geometry.group_filters
    if is_transposed:
        inputs, outputs, lanes = outputs, inputs, geometry.group_channels
    vectors = vector_plan.padded(1, dtype) * (2 if is_gradient else 1)  # whose sums are computed together
    padded = -(-lanes // vectors) * vectors / lanes
    each = (
        GRADIENT * (1 + EDGES / geometry.output[-1]) if is_gradient else PRODUCT * (1 + TAP / geometry.group_channels)
    )
    if math.prod(geometry.w_shape) * dtype.itemsize > FAR_BYTES * geometry.groups:
        each *= FAR_GRADIENT if is_gradient else FAR
    is_last = geometry.layout == "channels_last"
    is_strided = is_transposed and set(geometry.stride) != {1}
    is_there = is_last and lanes >= vector_plan.padded(1, dtype) and not is_strided
    copied = 0 if is_there else COPY if is_last or not is_strided else SPREAD
    written = outputs * padded * (WRITE + copied)
    weights = math.prod(geometry.w_shape) * (padded * COPY + (0 if is_last else 3 * COPY))
    moved = 1.0 * math.prod(geometry.batch) * (inputs * (READ if is_last else COLLECT) + written) + weights
    return geometry.multiply_adds() * padded * each + moved + 8 * cost_model.STEP


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
