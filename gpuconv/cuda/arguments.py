"""What kernels are given: operands as images with one batch axis, and the structs that describe them.

Kernels take any strides, so layouts, flips, zero and negative strides need no copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy

from gpuconv.activations import NAMES, Activation
from gpuconv.algorithms.blocks import largest, merged, pieces
from gpuconv.arguments import Shape
from gpuconv.backend import Array, Backend
from gpuconv.cuda import structs
from gpuconv.cuda.kernel import Module
from gpuconv.geometry import Geometry
from gpuconv.operands import Operand
from gpuconv.workspace import Run, shaped

# Kernels count with 32 bits up to here; a block's own positions come on top.
NARROW = 2**31 - 2**16


def why_not(geometry: Geometry) -> str | None:
    """The reason why no kernel can do a convolution."""
    if geometry.rank > structs.AXES:
        return f"kernels take 1 to {structs.AXES} spatial axes, and this has {geometry.rank}"
    return None


def why_not_here(geometry: Geometry, backend: Backend) -> str | None:
    """The reason why an algorithm that is nothing but kernels cannot do it on a backend."""
    if backend.launch is None:
        return "it is a CUDA kernel, and NumPy's arrays are computed on the CPU"
    return why_not(geometry)


def image_pieces(
    operands: Sequence[Operand], results: Sequence[Array], geometry: Geometry, run: Run
) -> Iterator[tuple[list[Operand], list[Array]]]:
    """Operands and results as views (N, *spatial, G, channels), for as many images at a time as it takes.

    All at once, as a rule. Batch axes that lie in memory in no one order are taken one index at a time. Kernels
    multiply by an activation's derivative as they read; where y lies in memory another way, or has another dtype, the
    product is formed before, in at most half of the workspace.
    """
    count = len(operands)
    ys = [operand.view if operand.y is None else operand.y for operand in operands]
    for views in _flat_batches(geometry, *(operand.view for operand in operands), *ys, *results):
        flat = [
            replace(operand, view=view, y=None if operand.y is None else y)
            for operand, view, y in zip(operands, views, views[count:], strict=False)
        ]
        targets = views[2 * count :]
        apart = [o.y is not None and (o.y.strides, o.y.dtype) != (o.view.strides, o.view.dtype) for o in flat]
        elements = [math.prod(o.view.shape[1:]) * is_apart for o, is_apart in zip(flat, apart, strict=True)]
        cost = sum(size * (1 + o.temporaries) for size, o in zip(elements, flat, strict=True))
        images = flat[0].view.shape[0]
        at_once = largest(images, run.budget // 2, cost)
        with run.workspace(*(at_once * size for size in elements)) as spaces:
            for piece in pieces(images, at_once):
                read = [
                    _formed(o, piece, space, run) if is_apart else o.of_images(piece)
                    for o, is_apart, space in zip(flat, apart, spaces, strict=True)
                ]
                yield read, [target[piece] for target in targets]


def _formed(operand: Operand, images: slice, space: Array, run: Run) -> Operand:
    if run.recorder is not None:
        run.recorder.lose()
    block = shaped(space, operand.view[images].shape)
    operand.read(run.backend.xp, (images,), block)
    return Operand(block)


def options(
    first: Operand,
    second: Operand,
    channels_innermost: bool,
    *,
    bias: Array | None = None,
    activation: Activation | None = None,
    fours: bool = False,
) -> structs.Options:
    """How a kernel reads its operands, which elements the threads of a warp meet, and what becomes of the sums."""
    reading = (first.conjugate, number(first.activation), second.conjugate, number(second.activation))
    return structs.Options(*reading, channels_innermost, bias is not None, number(activation), fours)


def number(activation: Activation | None) -> int:
    """The number by which kernels know an activation."""
    return 0 if activation is None else 1 + NAMES.index(activation)


def _flat_batches(geometry: Geometry, *views: Array) -> Iterator[list[Array]]:
    """The views with all batch axes merged into one, or one index at a time of the axes that do not merge."""
    axes = len(geometry.batch)
    if axes == 0:
        yield [view[None] for view in views]
        return
    first = next(
        axis
        for axis in range(axes)  # the last one merges with nothing, and so always
        if all(merged(view.shape[axis:axes], view.strides[axis:axes]) is not None for view in views)
    )
    for index in numpy.ndindex(geometry.batch[:first]):
        yield [view[index].reshape(-1, *view.shape[axes:]) for view in views]


def is_wide(geometry: Geometry, y: Array, x: Array, w: Array) -> bool:
    """Whether an index or an offset may not fit into 32 bits, for views with these strides."""
    # Windows that begin in the padding reach further than x itself.
    padded = (n + abs(low) + abs(high) for n, (low, high) in zip(geometry.input, geometry.padding, strict=True))
    reaches = _reach(y.shape, y), _reach((x.shape[0], *padded, *x.shape[-2:]), x), _reach(w.shape, w)
    return max(*reaches, geometry.largest_index) >= NARROW


def _reach(shape: Shape, view: Array) -> int:
    return sum(n * abs(step) for n, step in zip(shape, _steps(view), strict=True))


@lru_cache(maxsize=4096)
def module(
    stem: str,
    first: numpy.dtype,
    second: numpy.dtype,
    result: numpy.dtype,
    sums: numpy.dtype,
    wide: bool,
    element: numpy.dtype | None = None,
    **constants: int,
) -> Module:
    """The module for arrays of these dtypes; ``element`` is that of tiles, where a kernel has them."""
    dtypes = {"First": first, "Second": second, "Result": result, "Sum": sums, "Element": element}
    types = tuple((alias, dtype.name) for alias, dtype in dtypes.items() if dtype is not None)
    return Module(stem, types, wide, tuple(constants.items()))


def _steps(view: Array) -> Shape:
    """Strides in elements."""
    return tuple(step // view.itemsize for step in view.strides)


def described(geometry: Geometry, y: Array, x: Array, w: Array, wide: bool) -> tuple[numpy.ndarray, ...]:
    """Convolution and the strides of y, x and w, as every kernel takes them; extents are those of the views.

    y is a view (N, *output, G, F/G), x (N, *input, G, C/G), w (*kernel, G, C/G, F/G).
    """
    return (
        _convolution(geometry, y.shape[0], *w.shape[-3:], wide),
        _image_strides(_steps(y), wide),
        _image_strides(_steps(x), wide),
        _weight_strides(_steps(w), wide),
    )


@lru_cache(maxsize=4096)
def _convolution(
    geometry: Geometry, images: int, groups: int, channels: int, filters: int, wide: bool
) -> numpy.ndarray:
    low = tuple(low for low, _ in geometry.padding)
    ones = (geometry.input, geometry.output, geometry.kernel, geometry.stride, geometry.dilation)
    axes = (*(lift(extents, 1) for extents in ones), lift(low, 0))
    return structs.struct("Convolution", wide, images, groups, channels, filters, *axes)


@lru_cache(maxsize=4096)
def _image_strides(steps: Shape, wide: bool) -> numpy.ndarray:
    batch, *axes, group, channel = steps
    return structs.struct("Images", wide, batch, lift(tuple(axes), 0), group, channel)


@lru_cache(maxsize=4096)
def _weight_strides(steps: Shape, wide: bool) -> numpy.ndarray:
    *axes, group, channel, filters = steps
    return structs.struct("Weights", wide, lift(tuple(axes), 0), group, channel, filters)


def lift(values: Shape, fill: int) -> Shape:
    """Values of one to three axes as those of three."""
    return (fill,) * (structs.AXES - len(values)) + values
