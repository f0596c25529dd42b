"""Algorithm direct: one thread of a CUDA kernel (kernels/direct.cu) computes each sum, in a fixed order.

It is the reference kernel of the faster ones. It accepts every convolution of one to three axes in every direction, and
arrays of any strides and mixed dtypes without a copy. Its results have the same bits at every call. On NumPy,
gpuconv/cpu/direct.py computes it.
"""

from __future__ import annotations

import math
from functools import partial

from gpuconv.blocking import channels_innermost, largest, pieces
from gpuconv.cpu import direct as on_cpu
from gpuconv.geometry import Geometry
from gpuconv.gpu import params, split_sum, structs
from gpuconv.gpu.kernel import Kernel
from gpuconv.gpu.launch import blocks
from gpuconv.operands import Operand, Result
from gpuconv.plan import Planner
from gpuconv.request import Request
from gpuconv.views import View

THREADS = 128
# weight_grad splits the sum over the outputs (split-K) into enough threads to fill a large GPU, unless the splits would
# be too short or too many.
MOST_THREADS = 1 << 18
SHORTEST_SPLIT = 64
MOST_SPLITS = 1024


def why_not(request: Request) -> str | None:
    """Return a reason for more than three spatial axes, or if weight_grad lacks workspace; else None."""
    if request.backend.launch is None:
        return on_cpu.why_not(request)
    if reason := params.why_not_here(request.geometry, request.backend):
        return reason
    if request.direction != "weight_grad":
        return None
    sums = 4 * request.geometry.channels * request.geometry.taps  # of a split, and totals, in half of the limit
    return request.lacks(sums, "the sums of one filter of each group")


def nanoseconds(request: Request) -> float:
    """Return the estimated time on NumPy."""
    return on_cpu.nanoseconds(request)


def forward(x: Operand, w: Operand, y: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute ``y[o] = sum over taps t and channels c of x[o * stride + t * dilation - low, c] w[t, c]``."""
    if planner.backend.launch is None:
        on_cpu.forward(x, w, y, geometry, planner)
        return
    _gather("forward", x, w, y, geometry, planner)


def data_grad(dy: Operand, w: Operand, dx: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute ``dx[i] = sum of dy[o] w[t]'`` over taps t and outputs o with ``o * stride + t * dilation - low = i``."""
    if planner.backend.launch is None:
        on_cpu.data_grad(dy, w, dx, geometry, planner)
        return
    _gather("data_grad", dy, w, dx, geometry, planner)


def _gather(direction: str, first: Operand, w: Operand, result: Result, geometry: Geometry, planner: Planner) -> None:
    """Plan launches with one thread for each element of the result."""
    pieces = params.Images([first], [result.view], geometry, planner)

    def some_images(number: int, planner: Planner) -> None:
        (images,), (target,) = pieces.read(number, planner)
        y_x_w = (target, images.view, w.view) if direction == "forward" else (images.view, target, w.view)
        wide = params.is_wide(geometry, *y_x_w)
        options = params.options(images, w, channels_innermost(target), bias=result.bias, activation=result.activation)
        dtypes = images.view.dtype, w.view.dtype, target.dtype, planner.dtype
        module = params.module("direct", dtypes, wide, THREADS=THREADS)
        planner.launch(
            Kernel(module, f"direct_{direction}"),
            blocks(target.size, THREADS),
            THREADS,
            (
                *(images.view, images.y, w.view, result.bias, target),
                *params.described(geometry, *y_x_w, wide),
                options.struct(wide),
            ),
        )

    planner.loop(range(len(pieces)), some_images)


def weight_grad(dy: Operand, x: Operand, dw: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute ``dw[t, c] = sum over outputs o of x[o * stride + t * dilation - low, c] dy[o]`` with split-K."""
    if planner.backend.launch is None:
        on_cpu.weight_grad(dy, x, dw, geometry, planner)
        return

    def some_filters(part: slice, planner: Planner) -> None:
        weights, gradients = dw.view[..., part], dy.of_channels(part)
        (total,) = planner.workspace(weights.size)
        images = params.Images([gradients, x], [], geometry, planner)
        planner.loop(range(len(images)), partial(_add_outputs, images, total, weights, geometry))

    filters = dw.view.shape[-1]
    at_once = largest(filters, planner.budget // 4, dw.view.size // filters)
    planner.loop(list(pieces(filters, at_once)), some_filters)


def _add_outputs(
    pieces: params.Images, total: View, weights: View, geometry: Geometry, number: int, planner: Planner
) -> None:
    """Plan two launches: one thread for each weight and split of the outputs, then the sums of the splits."""
    (gradients, images), _ = pieces.read(number, planner)
    y_x_w = gradients.view, images.view, weights
    wide = params.is_wide(geometry, *y_x_w)
    index = structs.index_dtype(wide).type
    splits = _splits(geometry, weights.size, planner.budget)
    length = blocks(gradients.view.shape[0] * math.prod(geometry.output), splits)
    options = params.options(gradients, images, channels_innermost=False)
    (sums,) = planner.workspace(splits * weights.size)
    dtypes = gradients.view.dtype, images.view.dtype, sums.dtype, planner.dtype
    module = params.module("direct", dtypes, wide, THREADS=THREADS)
    planner.launch(
        Kernel(module, "direct_weight_grad"),
        blocks(sums.size, THREADS),
        THREADS,
        (
            *(gradients.view, gradients.y, images.view, images.y, sums),
            *params.described(geometry, *y_x_w, wide)[:-1],
            *(index(splits), index(length), options.struct(wide)),
        ),
    )
    order = split_sum.weight_order(geometry.rank)
    split_sum.add_splits(sums, Result(weights), order, planner, (total, number > 0))


def _splits(geometry: Geometry, weights: int, budget: int) -> int:
    """Return the number of splits of the outputs, which depends only on the shapes and the workspace."""
    outputs = math.prod((*geometry.batch, *geometry.output))
    room = min(budget // 2, params.NARROW) // weights - 1
    return max(1, min(MOST_SPLITS, outputs // SHORTEST_SPLIT, MOST_THREADS // weights, room))
