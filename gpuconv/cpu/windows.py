"""The windows of x that a block of outputs reads, with zeros out of bounds."""

from __future__ import annotations

import math

from gpuconv.arguments import Shape
from gpuconv.blocking import Arrangement
from gpuconv.geometry import Geometry
from gpuconv.operands import Index, Operand
from gpuconv.plan import Planner
from gpuconv.views import View


def region_elements(geometry: Geometry, box: Shape) -> int:
    """Return the elements of x, padding included, from the first to the last that a block of outputs reads."""
    batch = len(geometry.batch)
    axes = zip(box[batch:], geometry.stride, geometry.window, strict=True)
    return math.prod(box[:batch]) * geometry.channels * math.prod((size - 1) * s + window for size, s, window in axes)


def in_bounds(region: tuple[tuple[int, int], ...], geometry: Geometry) -> list[slice]:
    """Return the part of a region of x, given by its first and end positions, that is in bounds."""
    axes = zip(region, geometry.input, strict=True)
    return [slice(min(max(start, 0), n), max(min(stop, n), 0)) for (start, stop), n in axes]


def windows_of(
    x: Operand, index: Index, geometry: Geometry, order: Arrangement, patch_space: View, planner: Planner
) -> View:
    """Return the windows (*batch, *outputs, *kernel, G, C/G) of a block of outputs, in the dtype of the sums.

    They are a view of x if possible, else of a patch in the workspace, whose memory order is ``order``.
    """
    batch = len(geometry.batch)
    region = geometry.inputs_in_windows(index[batch:])
    inside = in_bounds(region, geometry)
    seen = (*index[:batch], *inside)
    is_inside = all((axis.start, axis.stop) == ends for axis, ends in zip(inside, region, strict=True))
    in_place = is_inside and x.is_plain(planner.dtype)
    source = x.view[seen] if in_place else _patch(x, seen, region, order, patch_space, planner)
    return sliding(source, geometry, tuple(axis.stop - axis.start for axis in index[batch:]))


def _patch(
    x: Operand, inside: Index, region: tuple[tuple[int, int], ...], order: Arrangement, space: View, planner: Planner
) -> View:
    piece = x.view[inside]
    batch = len(inside) - len(region)
    shape = (*piece.shape[:batch], *(stop - start for start, stop in region), *piece.shape[-2:])
    patch, _ = order.empty(shape, space)
    if piece.shape != shape:
        planner.copy(patch, 0)
    if piece.size:
        ends = zip(inside[batch:], region, strict=True)
        middle = (slice(axis.start - start, axis.stop - start) for axis, (start, _) in ends)
        x.read(inside, patch[(*(slice(None),) * batch, *middle)], planner)
    return patch


def read_tap(x: Operand, tap: Shape, index: Index, geometry: Geometry, into: View, planner: Planner) -> None:
    """Copy the inputs that a block of outputs reads through one tap into an array (*batch, *outputs, G, C/G).

    Unlike windows_of, it does not read the inputs between taps, which with dilation may be far more.
    """
    batch = len(geometry.batch)
    outputs, seen = meeting(tap, index[batch:], all_inputs(geometry), geometry)
    if any(axis != slice(0, size) for axis, size in zip(outputs, into.shape[batch:-2], strict=True)):
        planner.copy(into, 0)
    if all(axis.start < axis.stop for axis in outputs):
        x.read((*index[:batch], *seen), into[(*(slice(None),) * batch, *outputs)], planner)


def meeting(tap: Shape, outputs: Index, inputs: Index, geometry: Geometry) -> tuple[Index, Index]:
    """Return the outputs of a block that read inputs of another block through a tap, and these inputs, as slices."""
    meeting, seen = [], []
    for axis, (t, block, region) in enumerate(zip(tap, outputs, inputs, strict=True)):
        found = geometry.outputs_reading(axis, t, block, region)
        first, last = (geometry.position(axis, o, t) - region.start for o in (found.start, found.stop - 1))
        meeting.append(slice(found.start - block.start, found.stop - block.start) if found else slice(0, 0))
        seen.append(slice(first, last + 1, geometry.stride[axis]) if found else slice(0, 0))
    return tuple(meeting), tuple(seen)


def all_inputs(geometry: Geometry) -> Index:
    """Return all spatial positions of x as a block."""
    return tuple(slice(0, n) for n in geometry.input)


def sliding(source: View, geometry: Geometry, outputs: Shape) -> View:
    """Return the overlapping windows of a region of x as a view of it."""
    batch, rank = len(geometry.batch), geometry.rank
    spatial = source.strides[batch : batch + rank]
    steps = (s * step for s, step in zip(geometry.stride, spatial, strict=True))
    taps = (d * step for d, step in zip(geometry.dilation, spatial, strict=True))
    return source.strided(
        (*source.shape[:batch], *outputs, *geometry.kernel, *source.shape[-2:]),
        (*source.strides[:batch], *steps, *taps, *source.strides[-2:]),
    )
