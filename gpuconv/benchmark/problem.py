"""A convolution with its arrays: the calls that compute it, and the error of a result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy

from gpuconv import api
from gpuconv.arrays import Array
from gpuconv.benchmark import reference
from gpuconv.benchmark.layers import Case
from gpuconv.geometry import Geometry
from gpuconv.types import Direction, Layout

SEED = 0


class Verdict(NamedTuple):
    """The error of a result. The result is right if every element is within its bound."""

    error: float  # the largest error divided by the largest exact element
    of_bound: float  # the largest ratio of an error to its bound
    checked: int  # the number of elements that were compared

    @property
    def right(self) -> bool:
        return self.of_bound <= 1


class Problem:
    """A convolution or transposed convolution, channels_first with one batch axis, with random x, w and dy.

    ``geometry`` is the convolution, or for a transposed convolution the one that it transposes. Exact results are
    computed on first use and cached.
    """

    def __init__(
        self,
        geometry: Geometry,
        dtype: numpy.dtype,
        xp: Any = numpy,
        *,
        precision: str = "ieee",
        transposed: bool = False,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.geometry, self.dtype, self.xp = geometry, dtype, xp
        self.precision, self.transposed = precision, transposed
        self.settings = settings or {
            "stride": geometry.stride,
            "padding": geometry.padding,
            "dilation": geometry.dilation,
            "groups": geometry.groups,
            "flip": geometry.flip,
        }
        rng = xp.random.default_rng(SEED)
        shapes = geometry.x_shape, geometry.w_shape, geometry.y_shape
        inner, self.w, outer = (_random(rng, shape, dtype) for shape in shapes)
        self.x, self.dy = (outer, inner) if transposed else (inner, outer)
        self._exact: dict[Direction, reference.Exact] = {}

    @classmethod
    def of(cls, case: Case, batch: int, dtype: numpy.dtype, xp: Any = numpy, precision: str = "ieee") -> Problem:
        """Return the problem of a layer at a batch size."""
        options = {"precision": precision, "transposed": case.transposed, "settings": case.settings()}
        return cls(case.geometry(batch), dtype, xp, **options)  # type: ignore[arg-type]

    def call(
        self, direction: Direction, layout: Layout = "channels_first", algorithm: str = "auto"
    ) -> Callable[[], Any]:
        """Return the public call that computes a direction, on arrays with the memory layout ``layout``."""
        x, w, dy = self.x, self.w, self.dy
        if layout == "channels_last":
            x, w, dy = _channels_last(x, (0,)), _channels_last(w, (), (1, 0)), _channels_last(dy, (0,))
        options = {**self.settings, "layout": layout, "algorithm": algorithm, "precision": self.precision}
        if self.transposed:
            if direction == "forward":
                return lambda: api.conv_transpose(x, w, **options)
            if direction == "data_grad":
                return lambda: api.conv_transpose_backward(dy, x, w, needs="dx", **options).dx
            return lambda: api.conv_transpose_backward(dy, x, w, needs="dw", **options).dw
        if direction == "forward":
            return lambda: api.conv(x, w, **options)
        if direction == "data_grad":
            return lambda: api.conv_data_grad(dy, w, x.shape, **options)
        return lambda: api.conv_weight_grad(dy, x, w.shape, **options)

    def inner(self, direction: Direction) -> tuple[Direction, Array, Array]:
        """Return the direction of ``geometry`` that computes a direction of this problem, and its two operands.

        A transposed convolution is data_grad without the conjugate. Its gradients are the adjoints of that operation.
        """
        if not self.transposed:
            operands = {"forward": (self.x, self.w), "data_grad": (self.dy, self.w), "weight_grad": (self.dy, self.x)}
            return direction, *operands[direction]
        conjugate = self.xp.conjugate
        if direction == "forward":
            return "data_grad", self.x, conjugate(self.w)
        if direction == "data_grad":
            return "forward", self.dy, conjugate(self.w)
        return "weight_grad", conjugate(self.x), conjugate(self.dy)

    def exact(self, direction: Direction) -> reference.Exact:
        """Return the exact result, or the part of a large one that :func:`reference.part_of` selects."""
        if direction not in self._exact:
            inner, first, second = self.inner(direction)
            self._exact[direction] = reference.exact_part(inner, first, second, self.geometry, self.xp)
        return self._exact[direction]

    def verdict(
        self, result: Array, direction: Direction, layout: Layout = "channels_first", *, loose: bool = False
    ) -> Verdict:
        """Compare a result with the exact one; ``loose`` permits the errors of Winograd and Fourier methods."""
        xp, geometry, expected = self.xp, self.geometry, self.exact(direction)
        inner = self.inner(direction)[0]
        if layout == "channels_last":
            result = _channels_first(result, inner == "weight_grad")
        if inner == "weight_grad":
            found = expected.part.of_weight(result, geometry.groups, xp)
        else:
            channels = expected.part.filters if inner == "forward" else expected.part.channels
            found = expected.part.of_images(result, geometry.groups, channels, xp)
        error = xp.abs(found.astype(expected.value.dtype) - expected.value)
        bound = reference.bound(expected, inner, geometry, self.dtype, xp)
        if loose:
            bound = xp.maximum(bound, reference.loose_bound(expected, self.dtype, xp))
        if self.precision == "tf32" and self.dtype == numpy.float32:
            bound = bound + 2.0**-10 * expected.size
        return Verdict(*reference.deviation(error, bound, expected, xp), int(error.size))


def _random(rng: Any, shape: tuple[int, ...], dtype: numpy.dtype) -> Array:
    """Return standard normal numbers; real and imaginary parts of complex numbers are drawn independently."""
    drawn = numpy.dtype(numpy.float64 if dtype in (numpy.float64, numpy.complex128) else numpy.float32)
    values = rng.standard_normal(shape, dtype=drawn)
    if dtype.kind == "c":
        return (values + 1j * rng.standard_normal(shape, dtype=drawn)).astype(dtype, copy=False)
    return values.astype(dtype, copy=False)


def _channels_last(array: Array, before: tuple[int, ...], after: tuple[int, ...] = (1,)) -> Array:
    """Return a contiguous copy whose axes are ``before``, the spatial axes, then ``after``."""
    return array.transpose((*before, *range(2, array.ndim), *after)).copy()


def _channels_first(array: Array, weight: bool) -> Array:
    spatial = array.ndim - 2
    if weight:
        return array.transpose((spatial + 1, spatial, *range(spatial)))
    return array.transpose((0, spatial + 1, *range(1, spatial + 1)))
