"""The layers and thread blocks of depthwise: how memory is accessed, and which outputs a block computes.

A block is chosen by the sectors of global memory that all blocks read and write, and by how well they occupy a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import numpy

from gpuconv import dtypes
from gpuconv.arguments import Shape
from gpuconv.geometry import Geometry
from gpuconv.gpu import params, structs
from gpuconv.gpu.launch import blocks
from gpuconv.operands import Operand
from gpuconv.request import Request
from gpuconv.views import View, merged

THREADS = 256
SECTOR = 32  # bytes of global memory that are transferred together
VECTOR_BYTES = 16  # of a load
SHARED_MEMORY = 48 << 10  # bytes of a block, which every architecture permits without an attribute of the kernel
TAPS = (7, 5, 4, 3, 1)  # of the slide axis, which a thread has in registers: the first that divides their number
ENOUGH_BLOCKS = 256  # to occupy a large GPU
TRAFFIC = 1.1  # smaller boxes are preferred up to this ratio of the memory traffic to the least possible


class Axes(NamedTuple):
    """The three spatial axes of the kernels: the axis of the convolution that each stands for, or None.

    The middle one is the slide axis. It is the last but one axis of the convolution, or the last one if the other has
    one output or does not exist.
    """

    order: tuple[int | None, ...]

    @classmethod
    def of(cls, geometry: Geometry) -> Axes:
        order = (*(None,) * (structs.AXES - geometry.rank), *range(geometry.rank))
        first, middle, last = order
        is_one = middle is None or geometry.output[middle] == 1
        return cls((first, last, middle) if is_one else (first, middle, last))

    def geometry(self, geometry: Geometry) -> Geometry:
        """Return the convolution with three spatial axes."""
        return replace(
            geometry,
            input=self._lift(geometry.input, 1),
            kernel=self._lift(geometry.kernel, 1),
            stride=self._lift(geometry.stride, 1),
            dilation=self._lift(geometry.dilation, 1),
            padding=self._lift(geometry.padding, (0, 0)),
        )

    def _lift(self, values: tuple[Any, ...], fill: Any) -> tuple[Any, ...]:
        return tuple(fill if axis is None else values[axis] for axis in self.order)

    def weights(self, w: View) -> View:
        """Return a view of weights (*kernel, G, C/G, F/G) with three axes of taps."""
        kept = [axis for axis in self.order if axis is not None]
        index = tuple(None if axis is None else slice(None) for axis in self.order)
        return w.transpose(*kept, *range(len(kept), w.ndim))[(*index, ...)]

    def images(self, images: View) -> View:
        """Return a view of images (N, *spatial, G, channels) with three spatial axes, and one group of all channels."""
        kept = [axis + 1 for axis in self.order if axis is not None]
        index = tuple(None if axis is None else slice(None) for axis in self.order)
        ordered = images.transpose(0, *kept, images.ndim - 2, images.ndim - 1)[(slice(None), *index, ...)]
        return ordered.reshape(*ordered.shape[:-2], 1, math.prod(ordered.shape[-2:]))


class Block(NamedTuple):
    """What a thread block owns: images, groups, outputs and, in weight_grad, columns of taps; and the inputs read."""

    images: int
    groups: int
    outputs: Shape
    columns: int
    region: Shape


class Layer(NamedTuple):
    """The shapes of a convolution with three spatial axes, and how its kernel accesses memory."""

    images: int
    groups: int
    channels: int  # of a group
    filters: int
    input: Shape
    output: Shape
    kernel: Shape
    stride: Shape
    dilation: Shape
    itemsizes: Shape  # of x and of y or dy, in global memory
    stored: int  # bytes of an element in shared memory
    sums: int
    is_gradient: bool  # whether it is weight_grad
    innermost: bool  # whether channels are innermost in memory
    vector: int = 1  # elements of a load
    together: int = 1  # channels of a thread

    @property
    def window(self) -> Shape:
        """The extents of the window of one output."""
        return tuple(d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True))

    @property
    def is_linear(self) -> bool:
        """Whether a block owns whole planes that are contiguous."""
        return self.vector > 1 == self.together

    @property
    def strip(self) -> int:
        """Outputs of a thread: fewer where it has several channels, since their sums are in registers.

        It is odd where neighbouring threads may compute neighbouring strips, to avoid bank conflicts.
        """
        return 7 if self.together == 1 else 4

    @property
    def is_wide(self) -> bool:
        """Whether a strip reaches positions that need 64 bits, beyond the last output."""
        return self.strip * self.stride[1] >= params.NARROW

    @property
    def taps_together(self) -> int:
        """Taps of the slide axis that share the rows that they read."""
        if self.stride[1] != 1 or self.dilation[1] != 1:
            return 1
        return next(taps for taps in TAPS if self.kernel[1] % taps == 0)

    @property
    def columns(self) -> int:
        """Columns of taps: a thread of weight_grad owns the sums of one."""
        return math.prod(self.kernel) // self.taps_together

    @property
    def weights(self) -> int:
        return math.prod(self.kernel) * self.groups * self.channels * self.filters

    @property
    def _bytes(self) -> tuple[int, int]:
        """Bytes of a group of x, and of y or dy, at one position."""
        return self.channels * self.itemsizes[0], self.filters * self.itemsizes[1]

    @property
    def operand_bytes(self) -> int:
        """Bytes of x and of y or dy."""
        x, y = self._bytes
        return self.images * self.groups * (x * math.prod(self.input) + y * math.prod(self.output))

    def strips(self, block: Block) -> Shape:
        """Return the extents of the strips of a block."""
        depth, rows, columns = block.outputs
        return depth, blocks(rows, self.strip), columns

    def channel_blocks(self, block: Block) -> int:
        return blocks(self.groups, block.groups)

    def boxes(self, block: Block) -> int:
        """Return the number of boxes of outputs of all images."""
        return blocks(self.images, block.images) * math.prod(map(blocks, self.output, block.outputs))

    def offsets(self, block: Block) -> tuple[int, int]:
        """Return where the second and the third array begin in shared memory, in bytes."""
        x = block.images * block.groups * self.channels * math.prod(block.region) * self.stored
        second = _aligned_size(x)
        if self.is_gradient:
            return second, second
        return second, second + _aligned_size(self.weights // self.groups * block.groups * self.sums)

    def shared_bytes(self, block: Block) -> int:
        """Return the bytes of shared memory of a block."""
        second, third = self.offsets(block)
        results = block.images * block.groups * self.filters * math.prod(block.outputs)
        if self.is_gradient:
            table = THREADS * self.taps_together * self.together * self.sums
            return max(second + results * self.stored, table)
        return third + results * self.itemsizes[1] * self.is_linear

    def traffic(self, block: Block) -> float:
        """Return the bytes that are read and written, relative to the least possible."""
        x, y = self._bytes
        x_moved = x * _read(self, block.outputs) * self._waste(block, 0, block.region[2])
        y_moved = y * math.prod(self.output) * self._waste(block, 1, block.outputs[2])
        w = 0 if self.is_gradient else self.weights * self.itemsizes[0]
        moved = self.images * self.groups * (x_moved + y_moved) + w * self.boxes(block)
        return moved / (self.operand_bytes + w)

    def _waste(self, block: Block, operand: int, width: int) -> float:
        """Return the ratio of the sectors that runs of contiguous bytes of x (0) or y (1) touch to these bytes.

        A run consists of some groups of a position, or of the positions of a part of a row. Longer ones waste little.
        """
        group, itemsize = self._bytes[operand], self.itemsizes[operand]
        run = block.groups * group if self.innermost else itemsize
        if not self.innermost or block.groups == self.groups:
            if width == (self.input, self.output)[operand][2]:
                return 1
            run *= width
        if self.innermost and self.groups * group % SECTOR == block.groups * group % SECTOR == 0:
            return 1
        return 1 + (SECTOR - itemsize) / run

    def time(self, block: Block) -> float:
        """Return an estimate of the time, in units of that of the least traffic on an occupied GPU."""
        strips = block.images * block.groups * self.filters // self.together * math.prod(self.strips(block))
        grid = self.channel_blocks(block) * self.boxes(block)
        busy = strips * (block.columns if self.is_gradient else 1)
        return self.traffic(block) * max(1, ENOUGH_BLOCKS / grid) * max(1, THREADS / busy)


@lru_cache(maxsize=1024)
def chosen(layer: Layer) -> Block:
    """Return the block with the least estimated time among those with little more than the least memory traffic."""
    traffic = {block: layer.traffic(block) for block in _candidates(layer)}
    limit = max(TRAFFIC, min(traffic.values()))
    fitting = (block for block, ratio in traffic.items() if ratio <= limit)
    return min(fitting, key=lambda block: (layer.time(block), -block.outputs[2], layer.shared_bytes(block)))


def _candidates(layer: Layer) -> Iterator[Block]:
    """Yield blocks that fit shared memory. Only blocks of whole planes have several images."""
    sizes = [[n] if layer.is_linear else _sizes(n) for n in layer.output]
    for outputs in product(*sizes):
        region = layer.input if layer.is_linear else _region(layer, outputs)
        for images in _doubled(1, layer.images if outputs == layer.output else 1):
            for groups in _doubled(_fewest_groups(layer), layer.groups):
                columns = min(layer.columns, max(1, THREADS * layer.together // _pairs(layer, groups)))
                block = Block(images, groups, outputs, columns, region)
                if layer.shared_bytes(block) > SHARED_MEMORY or _pairs(layer, groups) > THREADS * layer.together:
                    break
                yield block


def _pairs(layer: Layer, groups: int) -> int:
    """Return the pairs of a channel and a filter whose sums a block of weight_grad has, else 1."""
    return groups * layer.channels * layer.filters if layer.is_gradient else 1


def _fewest_groups(layer: Layer) -> int:
    """Return the number of groups of which blocks have a multiple: those of a sector or of a vector, if possible."""
    if layer.innermost:
        return min(layer.groups, max(layer.vector, SECTOR // layer.itemsizes[0])) if layer.together > 1 else 1
    if not layer.is_linear:
        return 1
    planes = zip(
        (layer.channels * math.prod(layer.input), layer.filters * math.prod(layer.output)), layer.itemsizes, strict=True
    )
    return min(layer.groups, math.lcm(*(SECTOR // math.gcd(SECTOR, plane * size) for plane, size in planes)))


def _doubled(first: int, last: int) -> Iterator[int]:
    """Yield first, 2 first, 4 first and so on, and the last number in place of the first one beyond it."""
    while first < last:
        yield first
        first *= 2
    yield last


def _sizes(extent: int) -> list[int]:
    """Return the sizes of boxes of which 1, 2, 3, 4, 8, 16 and so on cover an extent."""
    counts = {3, *(1 << bits for bits in range(extent.bit_length() + 1))}
    return sorted({blocks(extent, count) for count in counts}, reverse=True)


def _region(layer: Layer, outputs: Shape) -> Shape:
    """Return how many inputs a box of outputs reads on each axis."""
    axes = zip(layer.input, outputs, layer.stride, layer.window, strict=True)
    return tuple(min(n, (size - 1) * stride + window) for n, size, stride, window in axes)


def _read(layer: Layer, outputs: Shape) -> int:
    """Return how many inputs of a plane all boxes read: where windows overlap, some are read by two boxes."""
    read = 1
    for axis, region in enumerate(_region(layer, outputs)):
        boxes, overlap = blocks(layer.output[axis], outputs[axis]), layer.window[axis] - layer.stride[axis]
        read *= min(boxes * region, layer.input[axis] + (boxes - 1) * max(0, overlap))
    return read


def _aligned_size(size: int) -> int:
    return blocks(size, VECTOR_BYTES) * VECTOR_BYTES


def stored_dtype(sums: numpy.dtype, *operands: Operand) -> numpy.dtype:
    """Return the dtype of images in shared memory: the one that operands without derivatives share, or else sums."""
    found = {sums if operand.activation is not None else operand.view.dtype for operand in operands}
    return found.pop() if len(found) == 1 else sums


def layer_of(
    geometry: Geometry, images: tuple[View, View], w: View, dtypes: tuple[numpy.dtype, numpy.dtype], is_gradient: bool
) -> Layer:
    """Return the layer of these arrays with the widest vectors that are possible.

    The images are x, and y or dy. The dtypes are those of images in shared memory, and of sums.
    """
    (x, y), (stored, sums) = images, dtypes
    groups, channels, filters = w.shape[-3:]
    plain = Layer(
        images=x.shape[0],
        groups=groups,
        channels=channels,
        filters=filters,
        input=geometry.input,
        output=geometry.output,
        kernel=geometry.kernel,
        stride=geometry.stride,
        dilation=geometry.dilation,
        itemsizes=(x.itemsize, y.itemsize),
        stored=stored.itemsize,
        sums=sums.itemsize,
        is_gradient=is_gradient,
        innermost=_is_innermost(x),
    )
    for vector, together in _vectors(plain, x, y):
        layer = plain._replace(vector=vector, together=together)
        # Whole planes begin at the first input, so no input may be cropped there.
        is_whole = not layer.is_linear or min(low for low, _ in geometry.padding) >= 0
        if is_whole and next(_candidates(layer), None) is not None:
            return layer
    return plain


def _vectors(layer: Layer, x: View, y: View) -> Iterator[tuple[int, int]]:
    """Yield the possible elements of a load and channels of a thread, the most first."""
    if not layer.innermost:
        vector = VECTOR_BYTES // x.itemsize
        widest = VECTOR_BYTES // min(x.itemsize, y.itemsize)  # of a load of either, or a store of y
        if vector > 1 and _has_contiguous_planes(x, widest) and _has_contiguous_planes(y, widest):
            yield vector, 1
    elif layer.channels == layer.filters == 1:
        for size in (VECTOR_BYTES, VECTOR_BYTES // 2):
            vector = size // max(layer.itemsizes)
            together = min(vector, VECTOR_BYTES // layer.sums)
            if together > 1 and _is_aligned(x, vector) and _is_aligned(y, vector):
                yield vector, together


def _is_innermost(images: View) -> bool:
    """Return whether the channels of (N, *spatial, 1, channels) are closer together in memory than its positions."""
    steps = [abs(step) for step, size in zip(images.steps[1:4], images.shape[1:4], strict=True) if size > 1]
    return images.shape[-1] > 1 and abs(images.steps[-1]) <= min(steps, default=abs(images.steps[-1]))


def _is_aligned(images: View, width: int) -> bool:
    """Return whether all channels of a position are vectors of this width, in elements."""
    others = [step for step, size in zip(images.steps[:-1], images.shape[:-1], strict=True) if size > 1]
    is_run = images.steps[-1] == 1 and images.shape[-1] % width == 0
    return is_run and not images.address % (width * images.itemsize) and not any(step % width for step in others)


def _has_contiguous_planes(images: View, width: int) -> bool:
    """Return whether the planes of all channels of an image are one run of vectors of this width, in elements."""
    planes = merged((images.shape[-1], *images.shape[1:4]), (images.steps[-1], *images.steps[1:4]))
    if planes is None or planes[1] != 1 or planes[0] % width or images.address:
        return False
    return images.shape[0] == 1 or images.steps[0] % width == 0


@lru_cache(maxsize=1024)
def least_bytes(request: Request) -> int:
    """Return the shared memory of a block with one output of one group."""
    geometry, parts = request.geometry, [request.geometry]
    if request.direction == "data_grad":
        parts = [phase.geometry for phase in geometry.phases if phase.geometry is not None]
    return max((_least_of(part, request) for part in parts), default=0)


def _least_of(geometry: Geometry, request: Request) -> int:
    item, lifted = dtypes.accumulator(request.dtype).itemsize, Axes.of(geometry).geometry(geometry)
    layer = Layer(
        images=1,
        groups=1,
        channels=geometry.group_channels,
        filters=geometry.group_filters,
        input=lifted.input,
        output=lifted.output,
        kernel=lifted.kernel,
        stride=lifted.stride,
        dilation=lifted.dilation,
        itemsizes=(item, item),
        stored=item,
        sums=item,
        is_gradient=request.direction == "weight_grad",
        innermost=False,
    )
    one = (1, 1, 1)
    return layer.shared_bytes(Block(1, 1, one, 1, _region(layer, one)))
