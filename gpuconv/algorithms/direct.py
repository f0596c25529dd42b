"""direct: every sum by one thread of a CUDA kernel (kernels/direct.cu), gathered in a fixed order.

The plain twin of the faster kernels: it accepts every convolution of one to three axes, in every direction, takes
arrays of any strides and mixed dtypes as they are, and gives the same bits at every call.
"""

from __future__ import annotations

import math

import numpy

from gpuconv import activations
from gpuconv.algorithms.blocks import channels_innermost
from gpuconv.backend import Array, Backend
from gpuconv.cuda import arguments, structs
from gpuconv.cuda.kernel import Kernel
from gpuconv.cuda.launch import blocks
from gpuconv.geometry import Direction, Geometry
from gpuconv.operands import Operand, Result
from gpuconv.workspace import Run

THREADS = 128
# weight_grad: as many threads as keep a large GPU busy, unless their slices of the outputs would be shorter than this.
MOST_THREADS = 1 << 18
SHORTEST_SLICE = 64


def why_not(
    geometry: Geometry, dtype: numpy.dtype, direction: Direction, backend: Backend, deterministic: bool
) -> str | None:
    """A reason on NumPy, and for more than three spatial axes."""
    if backend.launch is None:
        return "it is a CUDA kernel, and NumPy's arrays are computed on the CPU"
    return arguments.why_not(geometry)


def forward(x: Operand, w: Operand, y: Result, geometry: Geometry, run: Run) -> None:
    """y[o] = sum over taps t and channels c of x[o * stride + t * dilation - low, c] w[t, c]."""
    for (images,), (target,) in arguments.image_pieces([x], [y.view], geometry, run):
        wide = arguments.is_wide(geometry, target, images, w.view)
        described = arguments.described(geometry, target, images, w.view, wide)
        _gather("direct_forward", x, images, w, target, y, described, wide, run)


def data_grad(dy: Operand, w: Operand, dx: Result, geometry: Geometry, run: Run) -> None:
    """dx[i] = sum over the taps t and outputs o with o * stride + t * dilation - low = i of dy[o] w[t]'."""
    for (gradients,), (target,) in arguments.image_pieces([dy], [dx.view], geometry, run):
        wide = arguments.is_wide(geometry, gradients, target, w.view)
        described = arguments.described(geometry, gradients, target, w.view, wide)
        _gather("direct_data_grad", dy, gradients, w, target, dx, described, wide, run)


def _gather(
    name: str,
    first: Operand,
    images: Array,
    w: Operand,
    target: Array,
    result: Result,
    described: tuple[numpy.ndarray, ...],
    wide: bool,
    run: Run,
) -> None:
    """One thread for each element of the target."""
    options = structs.Options(
        first.conjugate,
        w.conjugate,
        channels_innermost(target),
        has_bias=result.bias is not None,
        activation=0 if result.activation is None else 1 + activations.NAMES.index(result.activation),
    )
    module = arguments.module("direct", images, w.view, target, run.dtype, wide, THREADS=THREADS)
    run.launch(
        Kernel(module, name),
        blocks(target.size, THREADS),
        THREADS,
        (images, w.view, result.bias, target, *described, options.struct(wide)),
    )


def weight_grad(dy: Operand, x: Operand, dw: Result, geometry: Geometry, run: Run) -> None:
    """dw[t, c] = sum over outputs o of x[o * stride + t * dilation - low, c] dy[o], slice by slice of the outputs."""
    weights, xp = dw.view.size, run.backend.xp
    slices = _slices(geometry, run.budget)
    with run.workspace(slices * weights, weights, weights) as (partial_space, term_space, total_space):
        partial = partial_space[: slices * weights].reshape(slices, weights)
        term, total = term_space[:weights], total_space[:weights]
        total[...] = 0
        for (gradients, images), _ in arguments.image_pieces([dy, x], [], geometry, run):
            wide = arguments.is_wide(geometry, gradients, images, dw.view)
            described = arguments.described(geometry, gradients, images, dw.view, wide)
            length = blocks(gradients.shape[0] * math.prod(geometry.output), slices)
            index = structs.index_dtype(wide).type
            options = structs.Options(dy.conjugate, x.conjugate, False)
            module = arguments.module("direct", gradients, images, partial, run.dtype, wide, THREADS=THREADS)
            run.launch(
                Kernel(module, "direct_weight_grad"),
                blocks(slices * weights, THREADS),
                THREADS,
                (gradients, images, partial, *described[:-1], index(slices), index(length), options.struct(wide)),
            )
            total += xp.sum(partial, axis=0, out=term)
        *kernel, groups, channels, filters = dw.view.shape
        rank = len(kernel)
        by_groups = total.reshape(groups, *kernel, channels, filters)
        dw.view[...] = by_groups.transpose(*range(1, rank + 1), 0, rank + 1, rank + 2)


def _slices(geometry: Geometry, budget: int) -> int:
    """How many slices of the outputs have sums of their own: a matter of the shapes, and of the workspace."""
    weights = geometry.filters * geometry.group_channels * geometry.taps
    outputs = math.prod((*geometry.batch, *geometry.output))
    room = min(budget // 2, arguments.NARROW) // weights - 2
    return max(1, min(outputs // SHORTEST_SLICE, MOST_THREADS // weights, room))
