"""Kernel arguments: operands as images with one batch axis, and the structs that describe them.

Kernels accept any strides, so layouts, flips, zero and negative strides need no copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy

from gpuconv.activations import NAMES
from gpuconv.arguments import Shape
from gpuconv.arrays import Backend
from gpuconv.blocking import Places, largest, pieces
from gpuconv.geometry import Geometry
from gpuconv.gpu import structs
from gpuconv.gpu.kernel import Module
from gpuconv.operands import Operand
from gpuconv.plan import Planner
from gpuconv.types import Activation
from gpuconv.views import View, merged

# Bound of 32-bit indices in kernels. The positions within a block, which are added to an index, still fit.
NARROW = 2**31 - 2**16


def why_not(geometry: Geometry) -> str | None:
    """Return the reason why no kernel is applicable to a convolution, or None."""
    if geometry.rank > structs.AXES:
        return f"kernels take 1 to {structs.AXES} spatial axes, not {geometry.rank}"
    return None


def why_not_here(geometry: Geometry, backend: Backend) -> str | None:
    """Return the reason why an algorithm that consists of kernels is not applicable on a backend, or None."""
    if backend.launch is None:
        return "it is a CUDA kernel, but NumPy arrays are computed on the CPU"
    return why_not(geometry)


class Images:
    """Operands and results as views (N, *spatial, G, channels), in chunks of as many images as fit the workspace.

    Usually there is one chunk. Batch axes that cannot be merged are processed one index at a time. Kernels multiply by
    an activation's derivative on load. If y has other strides or another dtype than the operand, the product is
    computed beforehand, in at most half of the workspace or for one image at a time. Operands may also be packed
    (gemm_packing.py): ``channels`` has the number of channels of each one's copy, 0 for none.
    """

    def __init__(
        self,
        operands: list[Operand],
        results: list[View],
        geometry: Geometry,
        planner: Planner,
        channels: Sequence[int] = (0, 0),
    ) -> None:
        axes = len(geometry.batch)
        self._operands, self._results, self._axes = operands, results, axes
        views = [*results, *(view for operand in operands for view in (operand.view, operand.y) if view is not None)]
        split = next(a for a in range(axes + 1) if all(merged(v.shape[a:axes], v.strides[a:axes]) for v in views))
        self._batches = Places(geometry.batch[:split])
        flat = [self._flat(operand, self._batches[0]) for operand in operands]
        self._formed = [o.y is not None and (o.y.strides, o.y.dtype) != (o.view.strides, o.view.dtype) for o in flat]
        self._packed = channels
        each = [math.prod(o.view.shape[1:]) * formed for o, formed in zip(flat, self._formed, strict=True)]
        cost = sum(size * (1 + o.temporaries) for size, o in zip(each, flat, strict=True))
        cost += sum(math.prod(o.view.shape[1:-1]) * most for o, most in zip(flat, channels, strict=False))
        self.are_copied = cost > 0
        images = flat[0].view.shape[0]
        self._pieces = list(pieces(images, largest(images, planner.budget // 2, cost)))

    def __len__(self) -> int:
        return len(self._batches) * len(self._pieces)

    def read(self, number: int, planner: Planner) -> tuple[list[Operand], list[View]]:
        """Return the operands and results of a chunk."""
        batch, piece = divmod(number, len(self._pieces))
        index, some = self._batches[batch], self._pieces[piece]
        read = [self._flat(operand, index).of_images(some) for operand in self._operands]
        for place, operand in enumerate(read):
            if self._formed[place]:
                (space,) = planner.workspace(operand.view.size)
                block = space.shaped(operand.view.shape)
                operand.read((...,), block, planner)
                read[place] = Operand(block)
            elif channels := self._packed[place]:
                read[place] = operand.packed((*operand.view.shape[:-1], channels), planner)
        return read, [self._flat_view(view, index)[some] for view in self._results]

    def _flat(self, operand: Operand, index: Shape) -> Operand:
        return operand.seen(lambda view: self._flat_view(view, index))

    def _flat_view(self, view: View, index: Shape) -> View:
        """Return the images at an index of the batch axes that are not merged."""
        return view[index].reshape(-1, *view.shape[self._axes :])


def options(
    first: Operand,
    second: Operand,
    channels_innermost: bool,
    *,
    bias: View | None = None,
    activation: Activation | None = None,
    fours: bool = False,
) -> structs.Options:
    """Return the options of a launch: how operands are read, which elements a warp accesses, and the epilogue."""
    reading = (first.conjugate, number(first.activation), second.conjugate, number(second.activation))
    return structs.Options(*reading, channels_innermost, bias is not None, number(activation), fours)


def number(activation: Activation | None) -> int:
    """Return the number that stands for an activation in kernels, 0 for none."""
    return 0 if activation is None else 1 + NAMES.index(activation)


def is_wide(geometry: Geometry, y: View, x: View, w: View) -> bool:
    """Whether 64-bit indices are required: an index or offset may not fit 32 bits, for views with these strides."""
    # Windows of forward reach into the padding of x, and those of data_grad as far beyond y as a kernel is long.
    padded = (n + abs(low) + abs(high) for n, (low, high) in zip(geometry.input, geometry.padding, strict=True))
    windows = (n + d * (k - 1) for n, d, k in zip(geometry.output, geometry.dilation, geometry.kernel, strict=True))
    reaches = (
        reach((y.shape[0], *windows, *y.shape[-2:]), y),
        reach((x.shape[0], *padded, *x.shape[-2:]), x),
        reach(w.shape, w),
    )
    return max(*reaches, geometry.largest_index) >= NARROW


def reach(shape: Shape, view: View) -> int:
    """Return a bound of the offsets, in elements, of a view's strides along axes of these extents."""
    return sum(n * abs(step) for n, step in zip(shape, view.steps, strict=True))


ALIASES = "First", "Second", "Result", "Sum", "Element"


def module(stem: str, dtypes: Sequence[numpy.dtype], wide: bool, **constants: int) -> Module:
    """Return the module for the dtypes of the operands, the result, the sums and, if a kernel has them, the tiles."""
    types = tuple((alias, dtype.name) for alias, dtype in zip(ALIASES, dtypes, strict=False))
    return Module(stem, types, wide, tuple(constants.items()))


def described(geometry: Geometry, y: View, x: View, w: View, wide: bool) -> tuple[numpy.ndarray, ...]:
    """Return the structs that every kernel takes: the convolution, and the strides of y, x and w.

    Extents are those of the views: y is a view (N, *output, G, F/G), x (N, *input, G, C/G), w (*kernel, G, C/G, F/G).
    """
    return (
        _convolution(geometry, y.shape[0], w.shape[-3:], wide),
        image_strides(y, wide),
        image_strides(x, wide),
        weight_strides(w, wide),
    )


def _convolution(geometry: Geometry, images: int, channels: Shape, wide: bool) -> numpy.ndarray:
    low = tuple(low for low, _ in geometry.padding)
    ones = (geometry.input, geometry.output, geometry.kernel, geometry.stride, geometry.dilation)
    axes = (*(lift(extents, 1) for extents in ones), lift(low, 0))
    return structs.struct("Convolution", wide, images, *channels, *axes)


def image_strides(images: View, wide: bool) -> numpy.ndarray:
    """Return the struct with the strides of a view (N, *spatial, G, channels)."""
    batch, *axes, group, channel = images.steps
    return structs.struct("Images", wide, batch, lift(tuple(axes), 0), group, channel)


def weight_strides(w: View, wide: bool) -> numpy.ndarray:
    """Return the struct with the strides of a view (*kernel, G, C/G, F/G)."""
    *axes, group, channel, filters = w.steps
    return structs.struct("Weights", wide, lift(tuple(axes), 0), group, channel, filters)


def lift(values: Shape, fill: int) -> Shape:
    """Return the values of one to three axes as those of three, with ``fill`` in front."""
    return (fill,) * (structs.AXES - len(values)) + values
