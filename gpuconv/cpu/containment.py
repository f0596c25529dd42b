"""Non-finite fallback of algorithms that multiply transforms.

A transform mixes neighbouring elements, and would spread NaN to results whose direct sum does not contain it. Such
results are detected, since they are non-finite, and recomputed by im2col: images of y and dx, or the whole of dw.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy

from gpuconv.arguments import Shape
from gpuconv.blocking import Places
from gpuconv.cpu import im2col
from gpuconv.cpu.finite import if_finite
from gpuconv.geometry import Geometry
from gpuconv.operands import Operand, Result
from gpuconv.plan import Planner
from gpuconv.views import View

# Computes y, and sets the flags of images with non-finite results to 0. The flags have the shape of the batch.
Forward = Callable[[Operand, Operand, Result, Geometry, View, Planner], None]


def forward(compute: Forward, x: Operand, w: Operand, y: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute y, and recompute its non-finite images by im2col."""

    def again(image: Shape, planner: Planner) -> None:
        im2col.forward(x.of_images(image), w, y.part(image), replace(geometry, batch=()), planner)

    _computed(partial(compute, x, w, y, geometry), again, geometry, planner)


def data_grad(compute: Forward, dy: Operand, w: Operand, dx: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute dx for stride 1, and recompute its non-finite images by im2col.

    This is the forward convolution of dy with w rotated by 180 degrees, C and F exchanged.
    """
    turned, inverse = as_forward(w, geometry)

    def again(image: Shape, planner: Planner) -> None:
        im2col.data_grad(dy.of_images(image), w, dx.part(image), replace(geometry, batch=()), planner)

    _computed(partial(compute, dy, turned, dx, inverse), again, geometry, planner)


def as_forward(w: Operand, geometry: Geometry) -> tuple[Operand, Geometry]:
    """Return the weight and the geometry of the forward convolution of dy that gives dx, for stride 1."""
    return w.part(w.view[(slice(None, None, -1),) * geometry.rank].swapaxes(-1, -2)), geometry.inverse


def weight_grad(
    compute: Callable[[Operand, Operand, Result, Geometry, Planner], None],
    dy: Operand,
    x: Operand,
    dw: Result,
    geometry: Geometry,
    planner: Planner,
) -> None:
    """Compute dw, and recompute it by im2col if it is non-finite."""
    compute(dy, x, dw, geometry, planner)
    if_finite(dw.view, _nothing, partial(im2col.weight_grad, dy, x, dw, geometry), planner)


def _computed(
    compute: Callable[[View, Planner], None],
    again: Callable[[Shape, Planner], None],
    geometry: Geometry,
    planner: Planner,
) -> None:
    """Compute all images, and compute those that are non-finite again."""
    images = Places(geometry.batch)
    (flat,) = planner.workspace(len(images), dtype=numpy.dtype(bool))
    flags = flat.shaped(geometry.batch)
    planner.copy(flags, 1)
    compute(flags, planner)

    def again_unless_finite(image: Shape, planner: Planner) -> None:
        planner.choose(planner.xp.all, flags[image], _nothing, partial(again, image))

    planner.choose(planner.xp.all, flags, _nothing, lambda planner: planner.loop(images, again_unless_finite))


def _nothing(planner: Planner) -> None:
    """Plan no steps."""
