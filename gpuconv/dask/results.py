"""Results as Dask arrays: their chunks, the part of each input that a block depends on, and the tasks."""

from __future__ import annotations

import itertools
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import dask.array as da
import numpy
from dask.array.core import PerformanceWarning, normalize_chunks

from gpuconv import chunked, dtypes, padding_modes
from gpuconv.arguments import Shape
from gpuconv.chunked import arranged, inputs_read
from gpuconv.dask.graph import Chunks, TaskLayer, only_key, slices
from gpuconv.geometry import Geometry, Slices, extents_of
from gpuconv.types import Activation

FOLDER = str(Path(__file__).parent.parent)
AT_ONCE = 8  # parts of dw that are added at a time
MUCH = 1.0  # elements of halos for each element of a result, beyond which chunks are called small
ENOUGH = 0.25  # the same with the chunks that are advised


def forward(
    compute: Callable[..., Any], x: da.Array, others: list[Any], geometry: Geometry, dtype: numpy.dtype
) -> da.Array:
    """Return y, of which ``compute(its convolution, part of x, w, b)`` gives a block of outputs."""
    images, outputs = x.chunks[: len(geometry.batch)], _outputs_at(_spatial(x, geometry), geometry)
    _check_chunks(x, geometry, "forward")
    layer = TaskLayer("forward", [x, *others], compute, geometry, dtype)
    parts = layer.gathered(x, _parts(geometry, images, geometry.channels, _read_by_outputs(geometry, outputs)))
    for index, batch, block in _blocks(images, outputs, geometry):
        part = geometry.part(extents_of(batch), inputs_read(geometry, block), block)
        layer.add((layer.name, *index), partial(compute, part), parts[index], *map(only_key, others))
    return layer.array(arranged(geometry, images, (geometry.filters,), outputs), dtype)


def transposed(
    compute: Callable[..., Any], dy: da.Array, others: list[Any], geometry: Geometry, dtype: numpy.dtype
) -> da.Array:
    """Return dx or its like, of which ``compute(its convolution, part of dy, w, b)`` gives a block of inputs."""
    images, inputs = dy.chunks[: len(geometry.batch)], _inputs_at(_spatial(dy, geometry), geometry)
    _check_chunks(dy, geometry, "data_grad")
    layer = TaskLayer("data_grad", [dy, *others], compute, geometry, dtype)
    parts = layer.gathered(dy, _parts(geometry, images, geometry.filters, _read_by_inputs(geometry, inputs)))
    for index, batch, block in _blocks(images, inputs, geometry):
        part = geometry.part(extents_of(batch), block, geometry.outputs_of_windows(block))
        layer.add((layer.name, *index), partial(compute, part), parts[index], *map(only_key, others))
    return layer.array(arranged(geometry, images, (geometry.channels,), inputs), dtype)


def data_grad(dy: da.Array, w: da.Array, geometry: Geometry, dtype: numpy.dtype, how: dict[str, Any]) -> da.Array:
    """Return dx. With a padding mode it is computed for the padded x, in the dtype of sums, and then folded."""
    if geometry.padding_mode == "zeros":
        return transposed(partial(chunked.conv_data_grad, dtype=dtype, how=how), dy, [w], geometry, dtype)
    sums = dtypes.accumulator(dtype)
    padded = transposed(partial(chunked.conv_data_grad, dtype=sums, how=how), dy, [w], _of_padded(geometry), sums)
    return _folded(padded, geometry).astype(dtype)


def weight_grad(
    compute: Callable[..., Any], dy: da.Array, x: da.Array, geometry: Geometry, dtype: numpy.dtype
) -> da.Array:
    """Return dw, the sum of ``compute(its convolution, block of dy, part of x)``, added in a fixed order."""
    images, outputs = dy.chunks[: len(geometry.batch)], _spatial(dy, geometry)
    layer = TaskLayer("weight_grad", [dy, x], compute, geometry, dtype)
    gradients = layer.gathered(dy, _parts(geometry, images, geometry.filters, list(map(slices, outputs))))
    inputs = layer.gathered(x, _parts(geometry, images, geometry.channels, _read_by_outputs(geometry, outputs)))
    keys = []
    for index, batch, block in _blocks(images, outputs, geometry):
        part = geometry.part(extents_of(batch), inputs_read(geometry, block), block)
        keys.append(layer.add((f"{layer.name}-part", *index), partial(compute, part), gradients[index], inputs[index]))
    while len(keys) > 1:
        groups = [keys[start : start + AT_ONCE] for start in range(0, len(keys), AT_ONCE)]
        keys = [layer.add((f"{layer.name}-sum", len(layer.tasks)), sum, group) for group in groups]
    shape = geometry.w_shape
    layer.add((layer.name, *(0,) * len(shape)), partial(chunked.cast, dtype), keys[0])
    return layer.array(tuple((extent,) for extent in shape), dtype)


def _parts(geometry: Geometry, images: Chunks, channels: int, spatial: list[list[slice]]) -> tuple[list[slice], ...]:
    """Return the parts of every axis that blocks read: their images, all channels, and parts of the spatial axes."""
    return arranged(geometry, list(map(slices, images)), [slice(0, channels)], spatial)


def _read_by_outputs(geometry: Geometry, outputs: Chunks) -> list[list[slice]]:
    """Return the parts of the spatial axes of x that blocks of outputs read."""
    return _along_axes(geometry, outputs, partial(inputs_read, geometry))


def _read_by_inputs(geometry: Geometry, inputs: Chunks) -> list[list[slice]]:
    """Return the parts of the spatial axes of dy that blocks of inputs read."""
    return _along_axes(geometry, inputs, geometry.outputs_of_windows)


def _along_axes(geometry: Geometry, chunks: Chunks, read: Callable[[Slices], Slices]) -> list[list[slice]]:
    """Return what blocks with these chunks read on each axis, where ``read`` gives that on all axes."""
    return [[read((block,) * geometry.rank)[axis] for block in slices(chunks[axis])] for axis in range(geometry.rank)]


def bias_grad(dy: da.Array, geometry: Geometry, dtype: numpy.dtype) -> da.Array:
    """Return the sum over all axes except that of the channels."""
    axes = arranged(geometry, [True] * len(geometry.batch), False, [True] * geometry.rank)
    sums = dtypes.promoted(dtypes.accumulator(dtype), numpy.dtype(numpy.float64))
    return dy.sum(tuple(itertools.compress(range(dy.ndim), axes)), dtype=sums).astype(dtype)


def through(activation: Activation, y: da.Array, dy: da.Array, dtype: numpy.dtype) -> da.Array:
    """Return dy multiplied by the derivative of the activation, in the dtype of sums."""
    sums = dtypes.accumulator(dtype)
    meta = dy._meta.astype(sums)
    return da.map_blocks(chunked.derived, dy, y.rechunk(dy.chunks), activation, sums, dtype=sums, meta=meta)


def padded(x: da.Array, geometry: Geometry) -> tuple[da.Array, Geometry]:
    """Return x with the padding of a mode, and the convolution of it."""
    if geometry.padding_mode == "zeros":
        return x, geometry
    ends = [(max(low, 0), max(high, 0)) for low, high in geometry.padding]
    first = _first_axis(geometry)
    others = x.ndim - first - geometry.rank
    names = {"circular": "wrap", "reflect": "reflect", "replicate": "edge"}
    x = da.pad(x, [*[(0, 0)] * first, *ends, *[(0, 0)] * others], names[geometry.padding_mode])
    return x, _of_padded(geometry)


def _of_padded(geometry: Geometry) -> Geometry:
    """Return the convolution of the x that a padding mode has padded; what was negative still crops."""
    extents = tuple(
        n + max(low, 0) + max(high, 0) for n, (low, high) in zip(geometry.input, geometry.padding, strict=True)
    )
    crops = tuple((min(low, 0), min(high, 0)) for low, high in geometry.padding)
    return replace(geometry, input=extents, padding=crops, padding_mode="zeros")


def _folded(dx: da.Array, geometry: Geometry) -> da.Array:
    """Return the gradient of x from that of the padded x: that of the padding is added to what it holds."""
    for axis in range(geometry.rank):
        at, low = _first_axis(geometry) + axis, max(geometry.padding[axis][0], 0)
        inside, *ends = padding_modes.segments(geometry, axis)
        total = _taken(dx, at, slice(low, low + inside.extent))
        chunks = total.chunks[at]
        for end in ends:
            terms = _taken(dx, at, slice(end.start + low, end.stop + low))
            if not end.extent:
                continue
            if end.step == 0:
                terms = terms.sum(at, keepdims=True)
            start, stop = end.inputs().start, end.inputs().start + terms.shape[at]
            if end.step < 0:
                terms, start, stop = _taken(terms, at, slice(None, None, -1)), start - end.extent + 1, start + 1
            parts = [slice(0, start), slice(start, stop), slice(stop, None)]
            before, held, behind = (_taken(total, at, part) for part in parts)
            total = da.concatenate([before, held + terms, behind], at)
        dx = total.rechunk({at: chunks})
    return dx


def _taken(array: da.Array, axis: int, part: slice) -> da.Array:
    return array[(slice(None),) * axis + (part,)]


def _first_axis(geometry: Geometry) -> int:
    """Return the first spatial axis of x and y."""
    return len(geometry.batch) + (geometry.layout == "channels_first")


def _spatial(array: da.Array, geometry: Geometry) -> Chunks:
    """Return the chunks of the spatial axes."""
    first = _first_axis(geometry)
    chunks: Chunks = array.chunks[first : first + geometry.rank]
    return chunks


def _outputs_at(chunks: Chunks, geometry: Geometry) -> Chunks:
    """Return chunks of outputs for the spatial chunks of x: the outputs whose windows are centred in each."""
    found = []
    for axis, extents in enumerate(chunks):
        before, stride = _centre(geometry, axis, 0), geometry.stride[axis]
        bounds = (-(-(bound - before) // stride) for bound in itertools.accumulate(extents[:-1]))
        found.append(_between(bounds, geometry.output[axis]))
    return tuple(found)


def _inputs_at(chunks: Chunks, geometry: Geometry) -> Chunks:
    """Return chunks of inputs for the spatial chunks of dy: up to the centres of the windows of its outputs."""
    found = []
    for axis, extents in enumerate(chunks):
        bounds = (_centre(geometry, axis, bound) for bound in itertools.accumulate(extents[:-1]))
        found.append(_between(bounds, geometry.input[axis]))
    return tuple(found)


def _centre(geometry: Geometry, axis: int, output: int) -> int:
    """Return the input in the centre of the window of an output."""
    centre: int = geometry.position(axis, output, 0) + (geometry.window[axis] - 1) // 2
    return centre


def _between(bounds: Iterable[int], extent: int) -> Shape:
    """Return the extents of the chunks of an axis between bounds, without empty ones unless all of it is empty."""
    ends = [0, *(min(max(bound, 0), extent) for bound in bounds), extent]
    return tuple(stop - start for start, stop in itertools.pairwise(ends) if stop > start) or (0,)


def _blocks(images: Chunks, spatial: Chunks, geometry: Geometry) -> Iterator[tuple[Shape, Slices, Slices]]:
    """Yield the index of each block of an array with these chunks, its images, and its spatial part."""
    batch = len(images)
    axes = [list(enumerate(slices(chunks))) for chunks in (*images, *spatial)]
    for block in itertools.product(*axes):
        numbers, parts = zip(*block, strict=True)
        yield arranged(geometry, numbers[:batch], 0, numbers[batch:]), parts[:batch], parts[batch:]


def _check_chunks(array: da.Array, geometry: Geometry, direction: str) -> None:
    """Warn if much of what the blocks of a result read lies in several of them; name chunks that are large enough."""
    chunks = _spatial(array, geometry)
    found = halos(chunks, geometry, direction)
    if found <= MUCH:
        return
    extents, size = tuple(map(sum, chunks)), tuple(map(max, chunks))
    while size != extents and halos(_cut(extents, size), geometry, direction) > ENOUGH:
        size = tuple(min(2 * chunk, extent) for chunk, extent in zip(size, extents, strict=True))
    warnings.warn(
        f"small chunks: for each byte of the result {found:.2g} bytes are read from other chunks;"
        f" with chunks of {size} on the spatial axes, {halos(_cut(extents, size), geometry, direction):.2g}",
        PerformanceWarning,
        stacklevel=_outside(),
    )


def _outside() -> int:
    """Return the level of the first caller outside gpuconv, counted from the caller of this function."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(FOLDER):
        frame, level = frame.f_back, level + 1
    return level


def _cut(extents: Shape, size: Shape) -> Chunks:
    """Return chunks of a size for these extents."""
    return normalize_chunks(size, extents)  # type: ignore[no-any-return]


def halos(chunks: Chunks, geometry: Geometry, direction: str) -> float:
    """Return how many elements are read from other chunks for each element of the result."""
    if direction == "forward":
        results, channels = _outputs_at(chunks, geometry), geometry.channels
        parts = _read_by_outputs(geometry, results)
    else:
        results, channels = _inputs_at(chunks, geometry), geometry.filters
        parts = _read_by_inputs(geometry, results)
    elements: int = math.prod(sum(part.stop - part.start for part in axis) for axis in parts)
    extents = math.prod(sum(axis) for axis in chunks)
    others = geometry.channels + geometry.filters - channels
    return max(0, elements - extents) * channels / max(1, math.prod(sum(axis) for axis in results) * others)
