"""The windows of x that a block of outputs sees, with zeros where they reach beyond x."""

from __future__ import annotations

import math
from typing import Any

from gpuconv.algorithms.blocks import Arrangement
from gpuconv.arguments import Shape
from gpuconv.backend import Array
from gpuconv.geometry import Geometry
from gpuconv.operands import Index, Operand
from gpuconv.workspace import Run


def reaches_beyond(geometry: Geometry) -> bool:
    """Whether a window reaches beyond x, at either end of some axis."""
    axes = zip(geometry.input, geometry.padding, geometry.output, geometry.stride, geometry.window, strict=True)
    return any(low > 0 or (m - 1) * s + window - low > n for n, (low, _), m, s, window in axes)


def region_elements(geometry: Geometry, box: Shape) -> int:
    """Elements of x, padding included, that a block of outputs sees."""
    batch = len(geometry.batch)
    axes = zip(box[batch:], geometry.stride, geometry.window, strict=True)
    return math.prod(box[:batch]) * geometry.channels * math.prod((size - 1) * s + window for size, s, window in axes)


def windows_of(x: Operand, index: Index, geometry: Geometry, order: Arrangement, patch_space: Array, run: Run) -> Array:
    """The windows (*batch, *outputs, *kernel, G, C/G) of a block of outputs, in the dtype of the sums.

    A view of x where it can be, else of a patch in the workspace, whose axes lie in memory as ``order`` says.
    """
    batch = len(geometry.batch)
    region, inside = [], []
    axes = zip(index[batch:], geometry.stride, geometry.window, geometry.padding, geometry.input, strict=True)
    for outputs, s, window, (low, _), n in axes:
        start, stop = outputs.start * s - low, (outputs.stop - 1) * s + window - low
        region.append((start, stop))
        inside.append(slice(min(max(start, 0), n), max(min(stop, n), 0)))
    seen = (*index[:batch], *inside)
    if x.is_plain(run.dtype) and all(
        (axis.start, axis.stop) == ends for axis, ends in zip(inside, region, strict=True)
    ):
        source = x.view[seen]
    else:
        source = _patch(x, seen, region, order, patch_space, run)
    return sliding(run.backend.xp, source, geometry, tuple(axis.stop - axis.start for axis in index[batch:]))


def _patch(
    x: Operand, inside: Index, region: list[tuple[int, int]], order: Arrangement, space: Array, run: Run
) -> Array:
    piece = x.view[inside]
    batch = len(inside) - len(region)
    shape = (*piece.shape[:batch], *(stop - start for start, stop in region), *piece.shape[-2:])
    patch, _ = order.empty(shape, space)
    if piece.shape != shape:
        patch[...] = 0
    if piece.size:
        middle = (
            slice(axis.start - start, axis.stop - start)
            for axis, (start, _) in zip(inside[batch:], region, strict=True)
        )
        x.read(run.backend.xp, inside, patch[(*(slice(None),) * batch, *middle)])
    return patch


def sliding(xp: Any, source: Array, geometry: Geometry, outputs: Shape) -> Array:
    """The overlapping windows of a region of x, as a view of it."""
    batch, rank = len(geometry.batch), geometry.rank
    spatial = source.strides[batch : batch + rank]
    steps = (s * step for s, step in zip(geometry.stride, spatial, strict=True))
    taps = (d * step for d, step in zip(geometry.dilation, spatial, strict=True))
    return xp.lib.stride_tricks.as_strided(
        source,
        (*source.shape[:batch], *outputs, *geometry.kernel, *source.shape[-2:]),
        (*source.strides[:batch], *steps, *taps, *source.strides[-2:]),
    )
