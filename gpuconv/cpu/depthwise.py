"""depthwise on NumPy: groups of one or a few channels, by kernels that Numba compiles (vector_plan.py).

Vectors run along the groups. Without Numba, rows are multiplied by banded matrices (banded.py), which requires one
channel and one filter per group.
"""

from __future__ import annotations

import math

from gpuconv import dtypes
from gpuconv.cpu import banded, compiled, cost_model, slices, vector_plan
from gpuconv.geometry import Geometry
from gpuconv.operands import Operand, Result
from gpuconv.plan import Planner, is_small
from gpuconv.request import Request
from gpuconv.types import Direction

MOST_CHANNELS = 16  # of a group, and filters; larger groups are matrix products
# Nanoseconds, of float32, as in cost_model.py.
PRODUCT, GRADIENT = 0.032, 1.4  # a multiply-add; times as long in weight_grad
READ, STRIDED = 0.1, 0.3  # an element that is read or written in place, with a stride
COPY, GATHER = 1.4, 0.72  # an element that is copied to channels_last, or within that layout


def why_not(request: Request) -> str | None:
    """Return a reason if neither compiled kernels nor banded matrices are applicable, else None."""
    geometry, dtype = request.geometry, dtypes.accumulator(request.dtype)
    is_dense = geometry.groups == 1 < geometry.group_channels
    if _is_compiled(geometry, request.direction, request) and not is_dense:
        return None
    reason = banded.why_not(request)
    if reason and is_dense:
        return f"it requires several groups, or one channel, not one group of {geometry.group_channels} channels"
    return reason and (vector_plan.not_compiled(geometry, dtype, request.backend) or _unsuitable(geometry) or reason)


def _unsuitable(geometry: Geometry) -> str | None:
    """Return a reason unless groups are small."""
    channels, filters = geometry.group_channels, geometry.group_filters
    if max(channels, filters) <= MOST_CHANNELS:
        return None
    return f"a group may have at most {MOST_CHANNELS} channels and filters, not {channels} and {filters}"


def _is_compiled(geometry: Geometry, direction: Direction, place: Planner | Request) -> bool:
    """Return whether kernels compute a convolution under the conditions of a planner or a request."""
    dtype = dtypes.accumulator(place.dtype)
    refused = vector_plan.not_compiled(geometry, dtype, place.backend) or _unsuitable(geometry)
    return refused is None and vector_plan.least(geometry, direction, dtype, False) <= place.budget


def nanoseconds(request: Request) -> float:
    """Estimate the time with compiled kernels if there are any, else with banded matrices."""
    is_compiled = _is_compiled(request.geometry, request.direction, request)
    return _nanoseconds(request) if is_compiled else banded.nanoseconds(request)


def advice(request: Request, nanoseconds: float) -> str | None:
    """Return how long a convolution would take with Numba if that is missing and less than so many nanoseconds."""
    geometry, missing = request.geometry, compiled.missing()
    suits = geometry.groups > 1 and geometry.rank <= vector_plan.AXES and not dtypes.is_complex(request.dtype)
    if missing is None or not suits or _unsuitable(geometry) or _nanoseconds(request) >= nanoseconds:
        return None
    return f"with Numba, depthwise would take {_nanoseconds(request) / 1e6:.2g} ms (estimate)"


def _nanoseconds(request: Request) -> float:
    """Estimate the time of compiled kernels to multiply and add, to read or copy x and y, and of calls."""
    geometry, dtype = request.geometry, dtypes.accumulator(request.dtype)
    padded = vector_plan.padded(geometry.groups, dtype)
    products = geometry.multiply_adds() * padded / geometry.groups * PRODUCT
    if request.direction == "weight_grad":
        products *= GRADIENT
    is_plain = geometry.layout == "channels_last" and dtype == request.dtype
    each = READ
    if not is_plain:
        each = COPY * padded / geometry.groups  # lanes without a group are copied as well
    elif geometry.group_channels * geometry.group_filters > 1:
        each = GATHER
    if request.direction == "data_grad" and set(geometry.stride) != {1}:
        each += STRIDED  # for each phase dy is read, and parts of cache lines of dx are written
    inputs, outputs = math.prod(geometry.input) * geometry.channels, math.prod(geometry.output) * geometry.filters
    moved = 1.0 * math.prod(geometry.batch) * (inputs + outputs)
    others_are_alone = is_small(geometry) and not is_small(geometry, vector_plan.SLOWNESS)
    return (products + moved * each) / (cost_model.ALONE if others_are_alone else 1) + 10 * cost_model.STEP


def forward(x: Operand, w: Operand, y: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute ``y[o, f] = sum over taps t and channels c of x[o * stride + t * dilation - low, c] w[t, c, f]``."""
    if not _is_compiled(geometry, "forward", planner):
        banded.forward(x, w, y, geometry, planner)
    elif not vector_plan.forward(x, w, y, geometry, planner, shared=False):
        slices.forward(x, w, y, geometry, planner)


def data_grad(dy: Operand, w: Operand, dx: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute dx, the transpose of forward."""
    if not _is_compiled(geometry, "data_grad", planner):
        banded.data_grad(dy, w, dx, geometry, planner)
    elif not vector_plan.data_grad(dy, w, dx, geometry, planner, shared=False):
        slices.data_grad(dy, w, dx, geometry, planner)


def weight_grad(dy: Operand, x: Operand, dw: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute ``dw[t, c, f] = sum over outputs o of x[o * stride + t * dilation - low, c] dy[o, f]``."""
    if not _is_compiled(geometry, "weight_grad", planner):
        banded.weight_grad(dy, x, dw, geometry, planner)
    elif not vector_plan.weight_grad(dy, x, dw, geometry, planner, shared=False):
        slices.weight_grad(dy, x, dw, geometry, planner)
