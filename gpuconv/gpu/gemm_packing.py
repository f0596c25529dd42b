"""Packed copies of images, which implicit_gemm loads in vectors where it could load only elements of the images.

Windows of channels_first images begin at any position, and images of three channels have no aligned vectors. Each
element is then copied to shared memory by instructions of its own, once for every tap and every tile of the other
matrix. A packed copy has its channels innermost. In forward and data_grad, which sum over these channels, they are
padded with zeros to a multiple of four. Images are packed where the model (gemm_model.py) predicts a shorter time,
including that of the copies.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from gpuconv.arguments import Shape
from gpuconv.blocking import channels_innermost
from gpuconv.geometry import Geometry
from gpuconv.gpu import gemm_choice, gemm_model
from gpuconv.gpu.device import Device
from gpuconv.gpu.gemm_plan import Arrays, problem_of
from gpuconv.operands import Operand
from gpuconv.types import Direction
from gpuconv.views import View, contiguous_strides

MULTIPLE = 4  # to which channels are padded
# The number of images for which times are compared. That of the call has no influence, so that an image alone is
# summed in the order that it has in a batch.
IMAGES = 32


def packed_channels(arrays: Arrays, precision: str, device: Device, limit: int) -> tuple[int, int]:
    """Return the number of channels of a group of packed copies of both operands, 0 for no copy.

    The copies of one image take at most half of the limit in bytes, those of weights a quarter.
    """
    alone = _one_image(arrays)
    options = list(product(_options(alone, alone.first), _options(alone, alone.second)))
    # Without tensor cores products take longer than any load.
    if len(options) == 1 or not problem_of(alone, precision, device, room=1).products.tensor_products:
        return 0, 0
    possible = [channels for channels in options if _bytes(alone, channels) <= limit // 2]
    return min(possible, key=lambda channels: _microseconds(alone, channels, precision, device))


def _one_image(arrays: Arrays) -> Arrays:
    """Return the arrays with the first image only."""
    axes, is_gather = len(arrays.geometry.batch), arrays.direction != "weight_grad"

    def first_of(view: View) -> View:
        return view[(0,) * axes].reshape(1, *view.shape[axes:])

    first, result = arrays.first.seen(first_of), arrays.result
    if is_gather:
        return arrays._replace(first=first, result=first_of(result))
    return arrays._replace(first=first, second=arrays.second.seen(first_of))


def _options(arrays: Arrays, operand: Operand) -> tuple[int, ...]:
    """Return 0, and the number of channels of a packed copy if there may be one."""
    is_gather, channels = arrays.direction != "weight_grad", operand.view.shape[-1]
    if not operand.is_plain(operand.view.dtype) or (is_gather and operand is arrays.second):
        return (0,)
    padded = -(-channels // MULTIPLE) * MULTIPLE if is_gather else channels
    return (0,) if channels_innermost(operand.view) and padded == channels else (0, padded)


def packed(arrays: Arrays, channels: tuple[int, int]) -> Arrays:
    """Return the arrays with contiguous views in the place of those that are packed; also weights are, with images."""
    first, second = (_packed(one, n) for one, n in zip((arrays.first, arrays.second), channels, strict=True))
    arrays = arrays._replace(first=first, second=second)
    if arrays.direction == "weight_grad" or not channels[0]:
        return arrays
    second = Operand(_contiguous(arrays.second.view, packed_weights(arrays.direction, arrays.second.view, channels[0])))
    return arrays._replace(second=second, geometry=packed_geometry(arrays.direction, arrays.geometry, channels[0]))


def _packed(operand: Operand, channels: int) -> Operand:
    view = operand.view
    return Operand(_contiguous(view, (*view.shape[:-1], channels))) if channels else operand


def _contiguous(view: View, shape: Shape) -> View:
    return View(0, 0, shape, contiguous_strides(shape, view.dtype), view.dtype)


def packed_weights(direction: Direction, w: View, channels: int) -> Shape:
    """Return the shape of packed weights (*kernel, G, C/G, F/G), where the images have this number of channels."""
    *rest, inputs, filters = w.shape
    return (*rest, channels, filters) if direction == "forward" else (*rest, inputs, channels)


def packed_geometry(direction: Direction, geometry: Geometry, channels: int) -> Geometry:
    """Return the geometry of forward or data_grad with this number of channels of a group of the images."""
    if direction == "forward":
        return replace(geometry, channels=geometry.groups * channels)
    return replace(geometry, filters=geometry.groups * channels)


def _bytes(arrays: Arrays, channels: tuple[int, int]) -> int:
    """Return the bytes of the copies of one image, or twice those of weights, if that is more."""
    made = packed(arrays, channels)
    images = sum(
        one.view.size * one.view.itemsize
        for one, n in zip((made.first, made.second), channels, strict=True) if n
    )  # fmt: skip
    is_gather = arrays.direction != "weight_grad" and channels[0] > 0
    return max(images, 2 * made.second.view.size * made.second.view.itemsize * is_gather)


def _microseconds(arrays: Arrays, channels: tuple[int, int], precision: str, device: Device) -> float:
    """Return the time of IMAGES images and of their copies, according to the model."""
    made = packed(arrays, channels)
    copied = 0.0
    for before, after, n in zip(arrays[2:4], made[2:4], channels, strict=True):
        if n:
            moved = IMAGES * (before.view.size + after.view.size) * before.view.itemsize
            copied += gemm_model.copying(moved, device)
    problem = problem_of(made, precision, device, room=1)
    if arrays.direction == "weight_grad":
        work = problem.work._replace(depth=IMAGES * problem.work.depth)
        problem = problem._replace(work=work, most_splits=IMAGES)
    else:
        problem = problem._replace(work=problem.work._replace(rows=IMAGES * problem.work.rows))
    return copied + min(choice.microseconds for choice in gemm_choice.modelled(problem))
