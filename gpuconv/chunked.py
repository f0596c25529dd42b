"""One block of a convolution of chunked arrays: what it reads, and the call of gpuconv that computes it.

gpuconv.dask and gpuconv.cubed divide results into blocks. :meth:`Geometry.part` is the convolution of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy

import gpuconv
from gpuconv import activations
from gpuconv.arrays import kind_of, module_of
from gpuconv.geometry import Geometry, Slices
from gpuconv.types import Activation

T = TypeVar("T")


def conv(part: Geometry, x: Any, w: Any, b: Any, *, dtype: numpy.dtype, how: dict[str, Any]) -> Any:
    return gpuconv.conv(x.astype(dtype, copy=False), w, b, **_settings(part), **how)


def conv_data_grad(part: Geometry, dy: Any, w: Any, *, dtype: numpy.dtype, how: dict[str, Any]) -> Any:
    if not dy.size:
        return module_of(kind_of(dy=dy)).zeros(part.x_shape, dtype)
    dx = gpuconv.conv_data_grad(dy.astype(dtype, copy=False), w, part.x_shape, **_settings(part), **how)
    return dx.astype(dtype, copy=False)


def conv_transpose(part: Geometry, x: Any, w: Any, b: Any, *, dtype: numpy.dtype, how: dict[str, Any]) -> Any:
    if x.size:
        return gpuconv.conv_transpose(x, w, b, output_shape=part.input, **_settings(part), **how)
    xp = module_of(kind_of(x=x))
    y = xp.zeros(part.x_shape, dtype)
    if b is not None:
        y += b.reshape(arranged(part, (), -1, (1,) * part.rank))
    if how["activation"] is not None:
        activations.apply(y, how["activation"], xp)
    return y


def conv_weight_grad(part: Geometry, dy: Any, x: Any, *, sums: numpy.dtype, how: dict[str, Any]) -> Any:
    """Return a part of dw in the dtype of sums."""
    if not dy.size:
        return module_of(kind_of(dy=dy)).zeros(part.w_shape, sums)
    dy, x = (array.astype(sums, copy=False) for array in (dy, x))
    return gpuconv.conv_weight_grad(dy, x, part.w_shape, **_settings(part), **how)


def conv_transpose_weight_grad(part: Geometry, x: Any, dy: Any, *, sums: numpy.dtype, how: dict[str, Any]) -> Any:
    return conv_weight_grad(part, x, dy, sums=sums, how=how).conj()


def derived(dy: Any, y: Any, activation: Activation, dtype: numpy.dtype) -> Any:
    """Return dy multiplied by the derivative of the activation at y."""
    gradient = dy.astype(dtype)
    activations.apply_derivative(gradient, y, activation, module_of(kind_of(dy=dy)))
    return gradient


def cast(dtype: numpy.dtype, array: Any) -> Any:
    return array.astype(dtype, copy=False)


def _settings(part: Geometry) -> dict[str, Any]:
    names = "stride", "padding", "dilation", "groups", "layout", "flip"
    return {name: getattr(part, name) for name in names}


def arranged(geometry: Geometry, batch: Sequence[T], channels: T, spatial: Sequence[T]) -> tuple[T, ...]:
    """Return something for each axis of x or y in the order of the axes."""
    if geometry.layout == "channels_first":
        return (*batch, channels, *spatial)
    return (*batch, *spatial, channels)


def inputs_read(geometry: Geometry, outputs: Slices) -> Slices:
    """Return the inputs in the windows of a block of outputs."""
    windows = zip(geometry.inputs_in_windows(outputs), geometry.input, strict=True)
    return tuple(slice(min(max(start, 0), n), min(max(stop, 0), n)) for (start, stop), n in windows)
