"""Packed copies of images, which implicit_gemm loads in vectors where it could load only elements of the images.

Windows of channels_first images begin at any position, and images of three channels have no aligned vectors. Each
element is then copied to shared memory by instructions of its own, once for every tap and every tile of the other
matrix. A packed copy has its channels innermost. In forward and data_grad, which sum over these channels, they are
padded with zeros to a multiple of four.
"""

from __future__ import annotations

import math
from dataclasses import replace

from gpuconv.arguments import Shape
from gpuconv.blocking import channels_innermost
from gpuconv.geometry import Geometry
from gpuconv.gpu.gemm_layout import BYTES, Lines
from gpuconv.operands import Operand
from gpuconv.plan import Planner
from gpuconv.types import Direction
from gpuconv.views import View

MULTIPLE = 4  # to which channels are padded
TILE = 128  # rows and columns of a tile, for the estimate
# Instructions of a thread for a copy to shared memory, counted in SASS, and those that take as long as to pack an
# element, which is read and written in global memory once more (a model; nothing has been measured).
COPY, PACK = 8, 24


def loads(direction: Direction, geometry: Geometry) -> tuple[float, float]:
    """Return how often an element of the images in the left and in the right matrix is loaded, on average."""
    inputs, outputs, taps = math.prod(geometry.input), math.prod(geometry.output), geometry.taps
    by_columns = -(-geometry.group_filters // TILE)
    if direction == "forward":
        return taps * outputs / inputs * by_columns, 0.0
    if direction == "data_grad":
        return taps * inputs / math.prod(geometry.stride) / outputs * -(-geometry.group_channels // TILE), 0.0
    return taps * outputs / inputs * by_columns, -(-taps * geometry.group_channels // TILE)


def packed_channels(images: View, lines: Lines, loads: float, pads: bool) -> int:
    """Return the number of channels of a group after packing, or 0 if packing is not profitable.

    The number of images has no influence, so that an image alone is summed in the order that it has in a batch.
    """
    channels, chunk = images.shape[-1], BYTES // images.itemsize
    padded = -(-channels // MULTIPLE) * MULTIPLE if pads else channels
    if lines.vector == 0 or channels == 0 or (channels_innermost(images) and padded == channels):
        return 0
    saved = loads * COPY * (1 / lines.vector - padded / channels / math.gcd(chunk, padded))
    return padded if saved > PACK else 0


def packed_geometry(direction: Direction, geometry: Geometry, channels: int) -> Geometry:
    """Return the geometry of forward or data_grad with this number of channels of a group of the images."""
    if direction == "forward":
        return replace(geometry, channels=geometry.groups * channels)
    return replace(geometry, filters=geometry.groups * channels)


def packed(operand: Operand, shape: Shape, planner: Planner) -> Operand:
    """Return a contiguous copy of an operand, padded with zeros to a shape."""
    (space,) = planner.workspace(math.prod(shape), dtype=operand.view.dtype)
    block = space.shaped(shape)
    if shape != operand.view.shape:
        planner.copy(block, 0)
    planner.copy(block[tuple(map(slice, operand.view.shape))], operand.view)
    return Operand(block)
