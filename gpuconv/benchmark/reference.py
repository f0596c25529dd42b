"""A convolution that is right by looking at it: float64, one tap at a time, one einsum per tap.

It shares nothing with the algorithms, so that they can be held against it. Arrays are channels_first with one batch
axis, float64 or complex128, NumPy's or CuPy's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy

from gpuconv.backend import Array
from gpuconv.dtypes import accumulator, epsilon, is_complex
from gpuconv.geometry import Direction, Geometry


def exact(direction: Direction, first: Array, second: Array, geometry: Geometry, xp: Any = numpy) -> Array:
    """The result of a direction: of x and w, dy and w, or dy and x."""
    if direction == "forward":
        return _forward(first, second, geometry, xp)
    if direction == "data_grad":
        return _data_grad(first, second, geometry, xp)
    return _weight_grad(first, second, geometry, xp)


def bound(
    direction: Direction, first: Array, second: Array, geometry: Geometry, dtype: numpy.dtype, xp: Any = numpy
) -> Array:
    """How far a direct algorithm may be from the exact result, elementwise.

    One rounding of the result and a random walk of the roundings of K products, eps |y| + 2 sqrt(K) eps sum|x||w|; a
    complex product has four real ones.
    """
    result = xp.abs(exact(direction, first, second, geometry, xp))
    size = exact(direction, xp.abs(first), xp.abs(second), geometry, xp)
    factor = (8 if is_complex(dtype) else 2) * math.sqrt(geometry.reduction_length(direction))
    return epsilon(dtype) * result + factor * epsilon(accumulator(dtype)) * size


def _taps(geometry: Geometry) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Every tap, in the order of w's memory, with the slices of padded x that it meets."""
    for tap in product(*(range(k) for k in geometry.kernel)):
        place = tuple(k - 1 - t for k, t in zip(geometry.kernel, tap, strict=True)) if geometry.flip else tap
        axes = zip(place, geometry.dilation, geometry.stride, geometry.output, strict=True)
        yield tap, tuple(slice(t * d, t * d + (m - 1) * s + 1, s) for t, d, s, m in axes)


def _room(geometry: Geometry) -> list[tuple[int, int]]:
    return [(max(low, 0), max(high, 0)) for low, high in geometry.padding]


def _padded(x: Array, geometry: Geometry, xp: Any) -> Array:
    x = xp.pad(x, [(0, 0), (0, 0), *_room(geometry)])
    crops = (
        slice(max(-low, 0), size - max(-high, 0))
        for (low, high), size in zip(geometry.padding, x.shape[2:], strict=True)
    )
    return x[(slice(None), slice(None), *crops)]


def _grouped(images: Array, groups: int) -> Array:
    """(N, C, *spatial) as (G, N, positions, C/G)."""
    n, channels = images.shape[:2]
    split = images.reshape(n, groups, channels // groups, -1)
    return split.transpose(1, 0, 3, 2)


def _ungrouped(images: Array, extent: tuple[int, ...]) -> Array:
    groups, n, _, channels = images.shape
    return images.transpose(1, 0, 3, 2).reshape(n, groups * channels, *extent)


def _tap_weight(w: Array, tap: tuple[int, ...], groups: int) -> Array:
    """w of one tap as (G, 1, C/G, F/G)."""
    at = w[(slice(None), slice(None), *tap)]
    return at.reshape(groups, 1, at.shape[0] // groups, at.shape[1]).swapaxes(-1, -2)


def _forward(x: Array, w: Array, geometry: Geometry, xp: Any) -> Array:
    padded = _padded(x, geometry, xp)
    y: Any = 0
    for tap, seen in _taps(geometry):
        images = _grouped(padded[(slice(None), slice(None), *seen)], geometry.groups)
        y = y + xp.matmul(images, _tap_weight(w, tap, geometry.groups))
    return _ungrouped(y, geometry.output)


def _data_grad(dy: Array, w: Array, geometry: Geometry, xp: Any) -> Array:
    room = _room(geometry)
    extent = [n + low + high for n, (low, high) in zip(geometry.input, room, strict=True)]
    begin = [max(-low, 0) for low, _ in geometry.padding]
    dx = xp.zeros((dy.shape[0], geometry.channels, *extent), numpy.result_type(dy.dtype, w.dtype))
    gradients = _grouped(dy, geometry.groups)
    for tap, seen in _taps(geometry):
        weight = xp.conjugate(_tap_weight(w, tap, geometry.groups)).swapaxes(-1, -2)
        share = _ungrouped(xp.matmul(gradients, weight), geometry.output)
        place = (slice(axis.start + b, axis.stop + b, axis.step) for axis, b in zip(seen, begin, strict=True))
        dx[(slice(None), slice(None), *place)] += share
    inside = (slice(low, low + n) for (low, _), n in zip(room, geometry.input, strict=True))
    return dx[(slice(None), slice(None), *inside)]


def _weight_grad(dy: Array, x: Array, geometry: Geometry, xp: Any) -> Array:
    padded = xp.conjugate(_padded(x, geometry, xp))
    dw = xp.zeros((geometry.filters, geometry.group_channels, *geometry.kernel), numpy.result_type(dy.dtype, x.dtype))
    gradients = _grouped(dy, geometry.groups).swapaxes(-1, -2)
    for tap, seen in _taps(geometry):
        images = _grouped(padded[(slice(None), slice(None), *seen)], geometry.groups)
        part = xp.matmul(gradients, images).sum(axis=1)  # (G, F/G, C/G), summed over the images
        dw[(slice(None), slice(None), *tap)] = part.reshape(geometry.filters, geometry.group_channels)
    return dw
