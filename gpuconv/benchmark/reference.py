"""Reference convolution in float64: one matrix product per tap, simple enough to be verified by reading.

It shares no code with the algorithms, so that they can be compared with it. Arrays are channels_first with one batch
axis, of dtype float64 or complex128, of NumPy or CuPy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import numpy

from gpuconv.arrays import Array
from gpuconv.dtypes import accumulator, epsilon, is_complex
from gpuconv.geometry import Geometry
from gpuconv.types import Direction


def exact(direction: Direction, first: Array, second: Array, geometry: Geometry, xp: Any = numpy) -> Array:
    """Return the result of a direction, computed from x and w, dy and w, or dy and x."""
    if direction == "forward":
        return _forward(first, second, geometry, xp)
    if direction == "data_grad":
        return _data_grad(first, second, geometry, xp)
    return _weight_grad(first, second, geometry, xp)


class Part(NamedTuple):
    """The indices of a part of a result: images, groups, and filters and channels of each group; None for all."""

    images: numpy.ndarray | None = None
    groups: numpy.ndarray | None = None
    filters: numpy.ndarray | None = None
    channels: numpy.ndarray | None = None

    def of_images(self, array: Array, groups: int, inner: numpy.ndarray | None, xp: Any) -> Array:
        """Return this part of x or y; ``inner`` is the channels of x or the filters of y."""
        array = array.reshape(len(array), groups, -1, *array.shape[2:])
        array = _taken(_taken(_taken(array, self.images, 0, xp), self.groups, 1, xp), inner, 2, xp)
        return array.reshape(len(array), -1, *array.shape[3:])

    def of_weight(self, w: Array, groups: int, xp: Any) -> Array:
        """Return this part of w."""
        w = w.reshape(groups, -1, *w.shape[1:])
        w = _taken(_taken(_taken(w, self.groups, 0, xp), self.filters, 1, xp), self.channels, 2, xp)
        return w.reshape(-1, *w.shape[2:])


def _taken(array: Array, index: numpy.ndarray | None, axis: int, xp: Any) -> Array:
    return array if index is None else xp.take(array, xp.asarray(index), axis)


MOST_PRODUCTS, LEAST_RESULTS = 2 * 10**8, 10_000


def part_of(geometry: Geometry, direction: Direction) -> Part:
    """Return the part of a result that about 200 million products give, at least 10,000 elements, or all of it.

    Spatial axes and taps are complete, so the borders are included. On the other axes the first and the last index are
    included, and the rest is drawn at random.
    """
    groups, filters, channels = geometry.groups, geometry.group_filters, geometry.group_channels
    sizes = {"images": math.prod(geometry.batch), "groups": groups, "filters": filters, "channels": channels}
    del sizes[{"forward": "channels", "data_grad": "filters", "weight_grad": "images"}[direction]]  # summed over
    shape = {"forward": geometry.y_shape, "data_grad": geometry.x_shape, "weight_grad": geometry.w_shape}[direction]
    results = math.prod(shape)
    wanted = max(LEAST_RESULTS, results * MOST_PRODUCTS // max(geometry.multiply_adds(), 1))
    rng = numpy.random.default_rng(0)
    chosen: dict[str, numpy.ndarray | None] = {}
    for name, size in sizes.items():
        count = min(size, max(2, -(-size * wanted // results)))
        if count < size:
            drawn = rng.choice(numpy.arange(1, size - 1), count - 2, replace=False)
            chosen[name] = numpy.array([0, *sorted(drawn), size - 1])
            results = results * count // size
    return Part(**chosen)


class Exact(NamedTuple):
    """A part of a result in float64 or complex128, and the sums of the absolute values of its products."""

    part: Part
    value: Array
    size: Array

    @property
    def largest(self) -> float:
        return float(abs(self.value).max())


def exact_part(direction: Direction, first: Array, second: Array, geometry: Geometry, xp: Any = numpy) -> Exact:
    """Return the part of a direction's result that :func:`part_of` selects; the arrays may have any dtype."""
    part = part_of(geometry, direction)
    inside, outside = (geometry.groups, part.channels, xp), (geometry.groups, part.filters, xp)
    wide = numpy.dtype(numpy.complex128 if is_complex(first.dtype) else numpy.float64)
    if direction == "weight_grad":
        first, second = part.of_images(first, *outside), part.of_images(second, *inside)
    else:
        first = part.of_images(first, *(inside if direction == "forward" else outside))
        second = part.of_weight(second, geometry.groups, xp)
    first, second = first.astype(wide), second.astype(wide)
    groups = geometry.groups if part.groups is None else len(part.groups)
    filters = geometry.group_filters if part.filters is None else len(part.filters)
    channels = geometry.group_channels if part.channels is None else len(part.channels)
    images = math.prod(geometry.batch) if part.images is None else len(part.images)
    smaller = replace(geometry, batch=(images,), groups=groups, filters=filters * groups, channels=channels * groups)
    value = exact(direction, first, second, smaller, xp)
    return Exact(part, value, exact(direction, xp.abs(first), xp.abs(second), smaller, xp))


def bound(expected: Exact, direction: Direction, geometry: Geometry, dtype: numpy.dtype, xp: Any = numpy) -> Array:
    """Return the elementwise error bound of a direct algorithm.

    The bound is one rounding of the result plus a random walk of the roundings of K products:
    eps |y| + 2 sqrt(K) eps sum|x||w|. A complex product has four real ones.
    """
    factor = (8 if is_complex(dtype) else 2) * math.sqrt(geometry.reduction_length(direction))
    return epsilon(dtype) * xp.abs(expected.value) + factor * epsilon(accumulator(dtype)) * expected.size


def loose_bound(expected: Exact, dtype: numpy.dtype, xp: Any = numpy) -> Array:
    """Return the error bound of a Winograd or Fourier algorithm: eps |y| + 16 eps times the largest sum|x||w|."""
    return epsilon(dtype) * xp.abs(expected.value) + 16 * epsilon(accumulator(dtype)) * expected.size.max()


def deviation(error: Array, bound: Array, expected: Exact, xp: Any = numpy) -> tuple[float, float]:
    """Return the largest error divided by the largest exact element, and the largest ratio of an error to its bound.

    NaN counts as infinite.
    """
    if not bool(xp.isfinite(error).all()):
        return math.inf, math.inf
    relative = float(error.max()) / (expected.largest or 1.0)
    if bool(((bound == 0) & (error > 0)).any()):
        return relative, math.inf
    return relative, float((error / xp.where(bound > 0, bound, 1)).max())  # where the bound is 0, so is the error


def _taps(geometry: Geometry) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Yield every tap, in the order of w's memory, with the slices of padded x that it reads."""
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
    """Return images (N, C, *spatial) as an array (G, N, positions, C/G)."""
    n, channels = images.shape[:2]
    split = images.reshape(n, groups, channels // groups, -1)
    return split.transpose(1, 0, 3, 2)


def _ungrouped(images: Array, extent: tuple[int, ...]) -> Array:
    groups, n, _, channels = images.shape
    return images.transpose(1, 0, 3, 2).reshape(n, groups * channels, *extent)


def _tap_weight(w: Array, tap: tuple[int, ...], groups: int) -> Array:
    """Return w of one tap as an array (G, 1, C/G, F/G)."""
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
