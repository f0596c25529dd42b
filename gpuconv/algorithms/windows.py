"""The windows of x that a block of outputs sees, with zeros where they reach beyond x."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
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
    """Elements of x, padding included, from the first to the last that a block of outputs sees."""
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
    is_inside = all((axis.start, axis.stop) == ends for axis, ends in zip(inside, region, strict=True))
    source = x.view[seen] if is_inside and x.is_plain(run.dtype) else _patch(x, seen, region, order, patch_space, run)
    return sliding(run.backend.xp, source, geometry, tuple(axis.stop - axis.start for axis in index[batch:]))


def _patch(
    x: Operand, inside: Index, region: list[tuple[int, int]], order: Arrangement, space: Array, run: Run
) -> Array:
    piece = x.view[inside]
    batch = len(inside) - len(region)
    shape = (*piece.shape[:batch], *(stop - start for start, stop in region), *piece.shape[-2:])
    patch, _ = order.empty(shape, space)
    if piece.shape != shape:
        run.backend.xp.copyto(patch, 0)
    if piece.size:
        ends = zip(inside[batch:], region, strict=True)
        middle = (slice(axis.start - start, axis.stop - start) for axis, (start, _) in ends)
        x.read(run.backend.xp, inside, patch[(*(slice(None),) * batch, *middle)])
    return patch


def read_tap(x: Operand, tap: Shape, index: Index, geometry: Geometry, into: Array, run: Run) -> None:
    """Puts what one tap shows a block of outputs into an array (*batch, *outputs, G, C/G).

    Unlike windows_of it reads nothing between the taps, which under dilation may be far more than they are.
    """
    batch = len(geometry.batch)
    meeting, seen = inputs_seen(tap, index, geometry)
    if any(axis != slice(0, size) for axis, size in zip(meeting, into.shape[batch:-2], strict=True)):
        run.backend.xp.copyto(into, 0)
    if all(axis.start < axis.stop for axis in meeting):
        x.read(run.backend.xp, (*index[:batch], *seen), into[(*(slice(None),) * batch, *meeting)])


def taps_of(geometry: Geometry) -> Iterator[Shape]:
    """Every tap of the kernel."""
    return product(*(range(k) for k in geometry.kernel))


def inputs_seen(tap: Shape, index: Index, geometry: Geometry) -> tuple[Index, Index]:
    """Which of a block's outputs a tap shows some input, and those inputs: slices of the spatial axes."""
    batch = len(geometry.batch)
    meeting, seen = [], []
    for axis, t in enumerate(tap):
        s, n, outputs = geometry.stride[axis], geometry.input[axis], index[batch + axis]
        shift = t * geometry.dilation[axis] - geometry.padding[axis][0]  # input = output * s + shift
        first = max(outputs.start, -(shift // s))
        last = min(outputs.stop - 1, (n - 1 - shift) // s)
        count = max(0, last - first + 1)
        start = first * s + shift
        meeting.append(slice(first - outputs.start, first - outputs.start + count) if count else slice(0, 0))
        seen.append(slice(start, start + (count - 1) * s + 1, s) if count else slice(0, 0))
    return tuple(meeting), tuple(seen)


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
