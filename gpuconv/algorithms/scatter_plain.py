"""The scatter-add with one atomic addition for every product: the plain twin of scatter, to read and to compare with.

It is no algorithm that a caller may name. Tests and the benchmark put it among the others.
"""

from __future__ import annotations

import numpy

from gpuconv.algorithms import scatter
from gpuconv.algorithms.blocks import channels_innermost
from gpuconv.algorithms.scatter import THREADS
from gpuconv.backend import Array, Backend
from gpuconv.cuda import arguments, structs
from gpuconv.cuda.kernel import Kernel
from gpuconv.cuda.launch import blocks
from gpuconv.geometry import Direction, Geometry
from gpuconv.operands import Operand, Result
from gpuconv.workspace import Run


def why_not(
    geometry: Geometry, dtype: numpy.dtype, direction: Direction, backend: Backend, deterministic: bool
) -> str | None:
    """A reason on NumPy, for the forward direction, and wherever scatter has one."""
    if backend.launch is None or direction == "forward":
        return "it is a CUDA kernel for the gradients"
    return scatter.why_not(geometry, dtype, direction, backend, deterministic)


def data_grad(dy: Operand, w: Operand, dx: Result, geometry: Geometry, run: Run) -> None:
    """Adds each product of dy to the input that it came from, one by one."""
    scatter.add_to_images(_launch_data_grad, dy, w, dx, geometry, run)


def weight_grad(dy: Operand, x: Operand, dw: Result, geometry: Geometry, run: Run) -> None:
    """Adds each product of dy to the weight that it came from, one by one."""
    scatter.add_to_weights(_launch_weight_grad, dy, x, dw, geometry, run)


def _launch_data_grad(
    dy: Operand, gradients: Array, w: Operand, weights: Array, sums: Array, geometry: Geometry, run: Run
) -> None:
    _launch("scatter_data_grad_plain", dy, gradients, w, weights, sums, (sums, weights), geometry, run)


def _launch_weight_grad(
    dy: Operand, gradients: Array, x: Operand, images: Array, sums: Array, geometry: Geometry, run: Run
) -> None:
    _launch("scatter_weight_grad_plain", dy, gradients, x, images, sums, (images, sums), geometry, run)


def _launch(
    name: str,
    dy: Operand,
    gradients: Array,
    second: Operand,
    other: Array,
    sums: Array,
    images_and_weights: tuple[Array, Array],
    geometry: Geometry,
    run: Run,
) -> None:
    """One thread for each element of dy."""
    wide = arguments.is_wide(geometry, gradients, *images_and_weights)
    module = arguments.module("scatter", gradients, other, sums, run.dtype, wide, **scatter.ONE._asdict())
    options = structs.Options(dy.conjugate, second.conjugate, channels_innermost(gradients))
    run.launch(
        Kernel(module, name),
        blocks(gradients.size, THREADS),
        THREADS,
        (
            gradients,
            other,
            sums,
            *arguments.described(geometry, gradients, *images_and_weights, wide),
            options.struct(wide),
        ),
    )
