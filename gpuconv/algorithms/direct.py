"""direct: every sum by one thread of a CUDA kernel (kernels/direct.cu), gathered in a fixed order.

The plain twin of the faster kernels: it accepts every convolution of one to three axes, in every direction, takes
arrays of any strides and mixed dtypes as they are, and gives the same bits at every call.
"""

from __future__ import annotations

import math

from gpuconv.algorithms.blocks import channels_innermost, largest, pieces
from gpuconv.backend import Array
from gpuconv.cuda import arguments, structs
from gpuconv.cuda.kernel import Kernel
from gpuconv.cuda.launch import blocks
from gpuconv.geometry import Geometry
from gpuconv.operands import Operand, Result
from gpuconv.request import Request
from gpuconv.workspace import Run, shaped

THREADS = 128
# weight_grad: as many threads as keep a large GPU busy, unless slices of the outputs would be too short or too many:
# one thread adds all slices of a weight.
MOST_THREADS = 1 << 18
SHORTEST_SLICE = 64
MOST_SLICES = 1024


def why_not(request: Request) -> str | None:
    """A reason on NumPy, and for more than three spatial axes."""
    if reason := arguments.why_not_here(request.geometry, request.backend):
        return reason
    if request.direction != "weight_grad":
        return None
    sums = 4 * request.geometry.channels * request.geometry.taps  # those of a slice, and of all, in half of the limit
    return request.lacks(sums, "the sums of a filter of every group")


def forward(x: Operand, w: Operand, y: Result, geometry: Geometry, run: Run) -> None:
    """y[o] = sum over taps t and channels c of x[o * stride + t * dilation - low, c] w[t, c]."""
    for (images,), (target,) in arguments.image_pieces([x], [y.view], geometry, run):
        _gather("direct_forward", images, w, target, y, (target, images.view, w.view), geometry, run)


def data_grad(dy: Operand, w: Operand, dx: Result, geometry: Geometry, run: Run) -> None:
    """dx[i] = sum over the taps t and outputs o with o * stride + t * dilation - low = i of dy[o] w[t]'."""
    for (gradients,), (target,) in arguments.image_pieces([dy], [dx.view], geometry, run):
        _gather("direct_data_grad", gradients, w, target, dx, (gradients.view, target, w.view), geometry, run)


def _gather(
    name: str,
    images: Operand,
    w: Operand,
    target: Array,
    result: Result,
    y_x_w: tuple[Array, Array, Array],
    geometry: Geometry,
    run: Run,
) -> None:
    """One thread for each element of the target."""
    wide = arguments.is_wide(geometry, *y_x_w)
    options = arguments.options(images, w, channels_innermost(target), bias=result.bias, activation=result.activation)
    module = arguments.module("direct", images.view.dtype, w.view.dtype, target.dtype, run.dtype, wide, THREADS=THREADS)
    run.launch(
        Kernel(module, name),
        blocks(target.size, THREADS),
        THREADS,
        (
            *(images.view, images.y, w.view, result.bias, target),
            *arguments.described(geometry, *y_x_w, wide),
            options.struct(wide),
        ),
    )


def weight_grad(dy: Operand, x: Operand, dw: Result, geometry: Geometry, run: Run) -> None:
    """dw[t, c] = sum over outputs o of x[o * stride + t * dilation - low, c] dy[o], slice by slice of the outputs."""
    filters = dw.view.shape[-1]
    for part in pieces(filters, largest(filters, run.budget // 4, dw.view.size // filters)):
        _weight_grad(dy.of_channels(part), x, dw.view[..., part], geometry, run)


def _weight_grad(dy: Operand, x: Operand, dw: Array, geometry: Geometry, run: Run) -> None:
    """The same of some filters."""
    slices = _slices(geometry, dw.size, run.budget)
    with run.workspace(slices * dw.size, dw.size) as (partial_space, total_space):
        partial, total = shaped(partial_space, (slices, dw.size)), shaped(total_space, (dw.size,))
        total[...] = 0
        for (gradients, images), _ in arguments.image_pieces([dy, x], [], geometry, run):
            _sum_slices(gradients, images, partial, total, dw, geometry, run)
        *kernel, groups, channels, filters = dw.shape
        rank = len(kernel)
        by_groups = total.reshape(groups, *kernel, channels, filters)
        dw[...] = by_groups.transpose(*range(1, rank + 1), 0, rank + 1, rank + 2)


def _sum_slices(
    gradients: Operand, images: Operand, partial: Array, total: Array, weights: Array, geometry: Geometry, run: Run
) -> None:
    """One thread for each weight and slice of the outputs, then one for each weight."""
    y_x_w = gradients.view, images.view, weights
    wide = arguments.is_wide(geometry, *y_x_w)
    index = structs.index_dtype(wide).type
    slices = partial.shape[0]
    length = blocks(gradients.view.shape[0] * math.prod(geometry.output), slices)
    options = arguments.options(gradients, images, channels_innermost=False)
    module = arguments.module(
        "direct", gradients.view.dtype, images.view.dtype, partial.dtype, run.dtype, wide, THREADS=THREADS
    )
    run.launch(
        Kernel(module, "direct_weight_grad"),
        blocks(partial.size, THREADS),
        THREADS,
        (
            *(gradients.view, gradients.y, images.view, images.y, partial),
            *arguments.described(geometry, *y_x_w, wide)[:-1],
            *(index(slices), index(length), options.struct(wide)),
        ),
    )
    run.launch(
        Kernel(module, "direct_weight_grad_sum"),
        blocks(total.size, THREADS),
        THREADS,
        (partial, total, index(slices), index(total.size)),
    )


def _slices(geometry: Geometry, weights: int, budget: int) -> int:
    """How many slices of the outputs have sums of their own: a matter of the shapes, and of the workspace."""
    outputs = math.prod((*geometry.batch, *geometry.output))
    room = min(budget // 2, arguments.NARROW) // weights - 1
    return max(1, min(MOST_SLICES, outputs // SHORTEST_SLICE, MOST_THREADS // weights, room))
