"""NaN and Inf stay where they belong in algorithms that multiply transforms.

A transform mixes what lies near each other, and would spread NaN to results that no direct sum takes it to. Those
are recognised, since they are not finite, and computed again by im2col: images of y and dx, or the whole of dw.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from gpuconv.algorithms import im2col
from gpuconv.algorithms.finite import is_finite
from gpuconv.arguments import Shape
from gpuconv.geometry import Geometry
from gpuconv.operands import Operand, Result
from gpuconv.workspace import Run

# Computes y, and gives the images (indices of the batch axes) that are not finite.
Forward = Callable[[Operand, Operand, Result, Geometry, Run], set[Shape]]


def forward(compute: Forward, x: Operand, w: Operand, y: Result, geometry: Geometry, run: Run) -> None:
    """Computes y."""
    for image in _spoilt(compute, x, w, y, geometry, run):
        im2col.forward(x.of_images(image), w, y.part(image), replace(geometry, batch=()), run)


def data_grad(compute: Forward, dy: Operand, w: Operand, dx: Result, geometry: Geometry, run: Run) -> None:
    """Computes dx, for a stride of 1: the forward convolution of dy with w turned round, C and F exchanged."""
    turned, inverse = as_forward(w, geometry)
    for image in _spoilt(compute, dy, turned, dx, inverse, run):
        im2col.data_grad(dy.of_images(image), w, dx.part(image), replace(geometry, batch=()), run)


def as_forward(w: Operand, geometry: Geometry) -> tuple[Operand, Geometry]:
    """The weight and the geometry by which a forward convolution of dy gives dx, for a stride of 1."""
    return w.part(w.view[(slice(None, None, -1),) * geometry.rank].swapaxes(-1, -2)), geometry.inverse


def weight_grad(
    compute: Callable[[Operand, Operand, Result, Geometry, Run], None],
    dy: Operand,
    x: Operand,
    dw: Result,
    geometry: Geometry,
    run: Run,
) -> None:
    """Computes dw."""
    with run.silence():
        compute(dy, x, dw, geometry, run)
    if not run.holds(is_finite, dw.view):
        im2col.weight_grad(dy, x, dw, geometry, run)


def _spoilt(compute: Forward, x: Operand, w: Operand, y: Result, geometry: Geometry, run: Run) -> list[Shape]:
    with run.silence():  # im2col will say it
        return sorted(compute(x, w, y, geometry, run))
