"""bias_grad: db by a CUDA kernel (kernels/bias_grad.cu) that reads dy once, in a fixed order of additions.

Only views whose positions have one stride are read by the kernel; others are summed by the array module
(gpuconv/cpu/bias_grad.py).
"""

from __future__ import annotations

import numpy

from gpuconv import dtypes
from gpuconv.blocking import channels_innermost
from gpuconv.cpu import bias_grad as by_array_module
from gpuconv.geometry import Geometry
from gpuconv.gpu import params, structs
from gpuconv.gpu.kernel import Kernel
from gpuconv.gpu.launch import blocks
from gpuconv.operands import Operand
from gpuconv.plan import Planner
from gpuconv.views import View, merged

THREADS = 256
LANES = 32  # channels of a block at most, if they are innermost; a warp then reads them side by side
FEWEST_ROWS = 32  # otherwise a warp reads this many positions side by side
TERMS = 4  # positions of a chunk for each thread
BLOCKS = 2048  # enough to fill a large GPU: splits are added until there are as many
MOST_SPLITS = 1024  # which the second pass adds


def bias_grad(dy: Operand, db: View, geometry: Geometry, planner: Planner) -> None:
    """Compute db of the shape (channels,)."""
    if not dy.view.size:
        planner.copy(db, 0)
        return
    axes, y = len(geometry.batch), dy.y
    shape, steps = dy.view.shape[:-2], dy.view.steps[:-2]
    images, positions = merged(shape[:axes], steps[:axes]), merged(shape[axes:], steps[axes:])
    is_read_alike = y is None or (y.strides, y.dtype) == (dy.view.strides, dy.view.dtype)
    if images is None or positions is None or not is_read_alike:
        by_array_module.bias_grad(dy, db, planner)
    else:
        _launch(dy, db, images, positions, planner)


def _launch(dy: Operand, db: View, images: tuple[int, int], positions: tuple[int, int], planner: Planner) -> None:
    """Plan both passes for images and positions that are one axis each, of an extent and a step."""
    groups, group_channels = dy.view.shape[-2:]
    channels, sums = groups * group_channels, dtypes.promoted(planner.dtype, numpy.dtype(numpy.float64))
    lanes, rows = _block(dy.view, channels, positions[0])
    tiles, chunks = blocks(channels, lanes), images[0] * blocks(positions[0], rows * TERMS)
    room = planner.limit // sums.itemsize // channels
    length = blocks(chunks, max(1, min(blocks(BLOCKS, tiles), chunks, MOST_SPLITS, room)))
    splits = blocks(chunks, length)
    extents = (images[0], positions[0] + rows * TERMS, groups, group_channels)
    steps = (images[1], positions[1], *dy.view.steps[-2:])
    wide = sum(extent * abs(step) for extent, step in zip(extents, steps, strict=True)) >= params.NARROW
    index = structs.index_dtype(wide).type
    kinds = dy.view.dtype, dy.view.dtype, db.dtype, sums
    module = params.module("bias_grad", kinds, wide, LANES=lanes, ROWS=rows, CHUNK=rows * TERMS, THREADS=THREADS)
    (partial,) = planner.workspace(splits * channels, dtype=sums)
    derivative = params.number(dy.activation)
    numbers = map(index, (images[0], positions[0], channels, group_channels, length, *steps, derivative))
    planner.launch(Kernel(module, "bias_grad"), tiles * splits, THREADS, (dy.view, dy.y, partial, *numbers))
    planner.launch(Kernel(module, "bias_grad_sum"), tiles, THREADS, (partial, db, index(splits), index(channels)))


def _block(images: View, channels: int, positions: int) -> tuple[int, int]:
    """Return the threads of a block along the channels and along the positions."""
    most = LANES if channels_innermost(images) else THREADS // max(FEWEST_ROWS, _power_of_two(positions))
    lanes = max(1, min(most, _power_of_two(channels)))
    return lanes, THREADS // lanes


def _power_of_two(number: int) -> int:
    """Return the smallest power of two that is not less than a number."""
    return 1 << (number - 1).bit_length()
