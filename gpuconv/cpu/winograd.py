"""winograd: kernels of extent 3 and stride 1 with fewer products, as matrix products on views of x.

A tile of m x m outputs depends on a x a inputs, a = m + 2. If polynomials are multiplied at a points instead of
coefficient by coefficient, m outputs of three taps take a products along each axis:

    forward      y  = AT [ (G w G') * (BT x B) ] A         * at each point: a matrix product over channels
    data_grad    the same of dy, with w rotated by 180 degrees
    weight_grad  dw = G' [ sum over tiles of (BT x B)' * (A dy A') ] G         the transpose of forward

(Winograd 1980; Lavin and Gray 2015, arXiv:1509.09308.) Nothing is unfolded: each transform is a product of a small
matrix with a strided view whose innermost axis is long, and is stored in the layout that the next step reads.

    x rows --BT--> U (a, tile rows, columns, C) --BT--> V (a * a, tiles, C) --w--> M (a * a, tiles, F)
                                   y rows <--AT-- Z (a, tile rows, columns, F) <--AT--

Tiles are computed in units of a few rows of tiles of one image, and units in blocks. If there are many tiles, a thread
computes all steps of a block, so that the block stays in its cache; if there are few, all threads share each step, so
that the products remain long. NaN and Inf would spread over a tile, so non-finite results are recomputed by im2col.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache, partial

from gpuconv.arguments import Shape
from gpuconv.blocking import pieces
from gpuconv.cpu import containment, cost_model
from gpuconv.cpu.winograd_plan import axes, least, sizes
from gpuconv.cpu.winograd_tiles import Tiling, has_threads
from gpuconv.geometry import Geometry
from gpuconv.operands import MOST_TEMPORARIES, Operand, Result
from gpuconv.plan import Planner, is_small
from gpuconv.request import Request
from gpuconv.views import View


def why_not(request: Request) -> str | None:
    """Return a reason except for real 1-D and 2-D convolutions of kernel extent 3 and stride 1.

    Dilations must divide the extents and the low padding, and the workspace must suffice for a row of tiles.
    """
    geometry = request.geometry
    if geometry.rank > 2:
        return f"it requires one or two spatial axes, not {geometry.rank}"
    if 3 not in geometry.kernel or not set(geometry.kernel) <= {1, 3}:
        return f"it requires kernels of extent 3, not {geometry.kernel}"
    if set(geometry.stride) != {1}:
        return f"it requires stride 1, not {geometry.stride}"
    if not _is_even(geometry):
        return f"it requires dilations that divide extents and padding, not {geometry.dilation}"
    if request.is_complex:
        return f"it requires a real dtype, not {request.dtype.name}"
    tiled = _tiled(request)
    return request.lacks(least(tiled.geometry, tiled.direction), "a row of tiles")


def _tiled(request: Request) -> Request:
    """Return the request for the convolution that is cut into tiles."""
    return request._replace(geometry=_undilated(request.geometry)).as_forward()


def nanoseconds(request: Request) -> float:
    """Estimate the time of the products at all points, and of the transforms into and out of tiles and of weights."""
    # Whether lines of x can be read in place.
    is_whole = request.geometry.groups == math.prod(_steps(request.geometry)) == 1
    geometry, direction = _tiled(request).geometry, _tiled(request).direction
    rows, columns = axes(geometry)
    points, tiles = rows.a * columns.a, math.prod(geometry.batch) * rows.tiles * columns.tiles
    weights = geometry.channels * geometry.group_filters
    lines = rows.a * columns.m  # elements of a half-transformed tile
    cut = sizes(geometry, direction, request.budget, 1, 4, MOST_TEMPORARIES)
    passes = -(-geometry.group_filters // cut.filters)  # passes over x
    into = passes * geometry.channels * cost_model.transform(geometry.group_channels, is_whole)
    out = geometry.filters * cost_model.transform(geometry.group_filters, is_whole)
    # Transformed weights do not fit in the cache.
    transformed = tiles * (points + lines) * (into + out) + 4 * points * weights * cost_model.TRANSFORM
    product = cost_model.product(geometry.group_channels, geometry.group_filters)
    if geometry.rank == 1:  # a line is not cut into blocks, and does not stay in the cache
        transformed *= 6
    images = math.prod((*geometry.batch, geometry.channels, *geometry.input))
    results = math.prod((*geometry.batch, geometry.filters, *geometry.output))
    exchanged = cost_model.exchanged(images + results) if geometry.layout == "channels_first" else 0
    steps = 45 * geometry.groups * cost_model.STEP
    nanoseconds = tiles * points * weights * product + transformed + exchanged + steps
    is_alone = not (has_threads(geometry) or is_small(geometry))
    return nanoseconds * (cost_model.ALONE if is_alone else 1)


def forward(x: Operand, w: Operand, y: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute ``y = AT [ (G w G') * (BT x B) ] A``, tile by tile."""
    apart, plain = partial(_every_dth, geometry=geometry), _undilated(geometry)
    containment.forward(_forward, x.seen(apart), w, replace(y, view=apart(y.view)), plain, planner)


def data_grad(dy: Operand, w: Operand, dx: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute dx: the forward convolution of dy with w rotated by 180 degrees, C and F exchanged."""
    apart, plain = partial(_every_dth, geometry=geometry), _undilated(geometry)
    containment.data_grad(_forward, dy.seen(apart), w, replace(dx, view=apart(dx.view)), plain, planner)


def weight_grad(dy: Operand, x: Operand, dw: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute ``dw = G' [ sum over tiles of (BT x B)' * (A dy A') ] G``."""
    apart, plain = partial(_every_dth, geometry=geometry), _undilated(geometry)
    containment.weight_grad(_weight_grad, dy.seen(apart), x.seen(apart), dw, plain, planner)


# With dilation d, every d-th pixel belongs to one convolution of dilation 1. If d divides all extents, these d
# convolutions have the same geometry, and are computed as d interleaved images.


def _is_even(geometry: Geometry) -> bool:
    of_axes = zip(geometry.input, geometry.output, geometry.padding, _steps(geometry), strict=True)
    return not any(n % d or m % d or low % d for n, m, (low, _), d in of_axes)


def _steps(geometry: Geometry) -> Shape:
    """Return the dilation of each axis, or 1 if the axis has only one tap."""
    return tuple(d if k > 1 else 1 for d, k in zip(geometry.dilation, geometry.kernel, strict=True))


@lru_cache(maxsize=1024)
def _undilated(geometry: Geometry) -> Geometry:
    steps = _steps(geometry)
    if set(steps) == {1}:
        return replace(geometry, dilation=steps)
    return replace(
        geometry,
        batch=(*geometry.batch, *steps),
        input=tuple(n // d for n, d in zip(geometry.input, steps, strict=True)),
        padding=tuple((low // d, high // d) for (low, high), d in zip(geometry.padding, steps, strict=True)),
        dilation=(1,) * geometry.rank,
    )


def _every_dth(view: View, geometry: Geometry) -> View:
    """Return images (*batch, *positions, G, C) as (*batch, *steps, *positions of each, G, C)."""
    steps, batch, rank = _steps(geometry), len(geometry.batch), geometry.rank
    if set(steps) == {1}:
        return view
    extents = view.shape[batch : batch + rank]
    split = [part for n, d in zip(extents, steps, strict=True) for part in (n // d, d)]
    apart = view.reshape(*view.shape[:batch], *split, *view.shape[-2:])
    positions = range(batch, batch + 2 * rank)
    return apart.transpose(*range(batch), *positions[1::2], *positions[::2], apart.ndim - 2, apart.ndim - 1)


def _forward(x: Operand, w: Operand, y: Result, geometry: Geometry, flags: View, planner: Planner) -> None:
    tiling = Tiling.of(geometry, "forward", planner, max(x.temporaries, y.temporaries))

    def group(part: slice, planner: Planner) -> None:
        tiling.forward(x.of_groups(part, "x"), w.of_groups(part, "w"), y.of_groups(part, "y"), flags, planner)

    planner.loop(list(pieces(geometry.groups, 1)), group)


def _weight_grad(dy: Operand, x: Operand, dw: Result, geometry: Geometry, planner: Planner) -> None:
    tiling = Tiling.of(geometry, "weight_grad", planner, max(x.temporaries, dy.temporaries))

    def group(part: slice, planner: Planner) -> None:
        tiling.weight_grad(dy.of_groups(part, "y"), x.of_groups(part, "x"), dw.of_groups(part, "w"), planner)

    planner.loop(list(pieces(geometry.groups, 1)), group)
