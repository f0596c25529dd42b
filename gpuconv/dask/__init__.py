"""Convolutions of Dask arrays with chunks of NumPy or CuPy, which may be larger than one memory or machine.

The functions are those of :mod:`gpuconv`, with the same arguments and, on small integers, exactly the same results.
They are lazy: each returns a Dask array. Every block of a result is computed by one call of gpuconv on exactly the part
of the input that it depends on, so that any stride, padding and chunking is right.

    forward      the windows of a block of outputs: a slice of x, and zeros where they reach beyond it
    data_grad    all outputs whose windows meet a block of inputs: a slice of dy. Each element of dx is computed once.
    weight_grad  a part of the sum for each block of dy; the parts are added in a tree of fixed order

Examples
--------
>>> import dask.array as da
>>> import gpuconv.dask
>>> x, w = da.ones((4, 3, 64, 64), chunks=(1, 3, 32, 32)), da.ones((8, 3, 3, 3), chunks=-1)
>>> y = gpuconv.dask.conv(x, w, padding=1, stride=2)
>>> y.shape, y.chunks[2]
((4, 8, 32, 32), (16, 16))
>>> float(y.sum())
866400.0
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, SupportsIndex

import numpy

from gpuconv import chunked, dtypes, settings
from gpuconv.api import Gradients
from gpuconv.geometry import Geometry
from gpuconv.select import check_name, consent
from gpuconv.types import Activation, Algorithm, GradientName, Layout, Padding, PaddingMode, PerAxis, Precision
from gpuconv.validate import (
    check_activation,
    check_bias,
    check_derivative,
    check_gradient,
    check_shape,
    checked,
    needed,
)

try:
    import dask.array as da
except ImportError:
    raise ImportError("gpuconv.dask needs Dask: pip install 'gpuconv[dask]'") from None

from gpuconv.dask import results


def conv(
    x: Any,
    w: Any,
    b: Any = None,
    *,
    stride: PerAxis = 1,
    padding: Padding = 0,
    padding_mode: PaddingMode = "zeros",
    dilation: PerAxis = 1,
    groups: int = 1,
    layout: Layout = "channels_first",
    flip: bool = False,
    activation: Activation | None = None,
    algorithm: Algorithm = "auto",
    precision: Precision | None = None,
    deterministic: bool | None = None,
) -> da.Array:
    """Convolve a Dask array, as :func:`gpuconv.conv` does one of NumPy or CuPy.

    Parameters
    ----------
    x : dask.array.Array of shape ``(..., C, *spatial)``
        Input, with any chunks.
    w : array of shape ``(F, C/G, *kernel)``
        Filters: a Dask array, which becomes one chunk, or one of the kind of the chunks of `x`.
    b : array of shape ``(F,)``, optional
        Bias, like `w`.
    stride, padding, padding_mode, dilation, groups, layout, flip, activation
        As in :func:`gpuconv.conv`.
    algorithm, precision, deterministic
        As in :func:`gpuconv.conv`, for each block.

    Returns
    -------
    dask.array.Array of shape ``(..., F, *output)``
        `y`, not computed yet. Each chunk of `x` has at most one chunk
        of `y`, of the outputs whose windows are centred in it.

    Raises
    ------
    ValueError, TypeError
        As in :func:`gpuconv.conv`; ValueError also if the extents of chunks are unknown.

    Warns
    -----
    dask.array.core.PerformanceWarning
        If more elements are read from neighbouring chunks than the result has, with chunks that would be better.

    Examples
    --------
    >>> x, w = da.arange(6.0, chunks=2)[None, None], numpy.array([[[1.0, 1.0]]])
    >>> y = conv(x, w, padding=((0, 1),), padding_mode="circular")
    >>> y.compute()
    array([[[1., 3., 5., 7., 9., 5.]]])
    """
    x, w, b, dtype = _arrays(x=x, w=w, b=b)
    geometry = Geometry.infer(x.shape, w.shape, stride, padding, dilation, groups, layout, flip, padding_mode)
    check_bias(b, geometry.filters)
    check_activation(activation, dtype)
    x, geometry = results.padded(x, geometry)
    how = _how(algorithm, precision, deterministic, activation=activation)
    return results.forward(partial(chunked.conv, dtype=dtype, how=how), x, [w, b], geometry, dtype)


def conv_data_grad(
    dy: Any,
    w: Any,
    x_shape: Sequence[SupportsIndex],
    *,
    stride: PerAxis = 1,
    padding: Padding = 0,
    padding_mode: PaddingMode = "zeros",
    dilation: PerAxis = 1,
    groups: int = 1,
    layout: Layout = "channels_first",
    flip: bool = False,
    algorithm: Algorithm = "auto",
    precision: Precision | None = None,
    deterministic: bool | None = None,
) -> da.Array:
    """Compute dx of a Dask array, as :func:`gpuconv.conv_data_grad` does.

    Parameters
    ----------
    dy : dask.array.Array of the shape of y
        Gradient with respect to the result of :func:`conv`, with any chunks.
    w : array of shape ``(F, C/G, *kernel)``
        Filters, as in :func:`conv`.
    x_shape : sequence of int
        Shape of `x`, batch axes included.
    stride, padding, padding_mode, dilation, groups, layout, flip, algorithm, precision, deterministic
        As in :func:`gpuconv.conv`.

    Returns
    -------
    dask.array.Array of shape `x_shape`
        Gradient dx. Each chunk of `dy` has at most one chunk of `dx`.

    Raises
    ------
    ValueError, TypeError
        As in :func:`conv`.

    Examples
    --------
    >>> conv_data_grad(da.ones((1, 1, 4), chunks=2), numpy.ones((1, 1, 2)), (1, 1, 5)).compute()
    array([[[1., 2., 2., 2., 1.]]])
    """
    dy, w, _, dtype = _arrays(dy=dy, w=w)
    geometry = Geometry.infer(
        x_shape, w.shape, stride, padding, dilation, groups, layout, flip, padding_mode, x_name="x_shape"
    )
    check_gradient(dy, geometry.y_shape, x_shape=geometry.x_shape, w=w.shape)
    how = _how(algorithm, precision, deterministic)
    return results.data_grad(dy, w, geometry, dtype, how)


def conv_weight_grad(
    dy: Any,
    x: Any,
    w_shape: Sequence[SupportsIndex],
    *,
    stride: PerAxis = 1,
    padding: Padding = 0,
    padding_mode: PaddingMode = "zeros",
    dilation: PerAxis = 1,
    groups: int = 1,
    layout: Layout = "channels_first",
    flip: bool = False,
    algorithm: Algorithm = "auto",
    precision: Precision | None = None,
    deterministic: bool | None = None,
) -> da.Array:
    """Compute dw of Dask arrays, as :func:`gpuconv.conv_weight_grad` does.

    Parameters
    ----------
    dy : dask.array.Array of the shape of y
        Gradient with respect to the result of :func:`conv`, with any chunks.
    x : dask.array.Array of shape ``(..., C, *spatial)``
        Input, with any chunks.
    w_shape : sequence of int
        Shape of `w`.
    stride, padding, padding_mode, dilation, groups, layout, flip, algorithm, precision, deterministic
        As in :func:`gpuconv.conv`.

    Returns
    -------
    dask.array.Array of shape `w_shape`
        Gradient dw, in one chunk. Its bits depend on the chunks of `dy`, not on the number of workers.

    Raises
    ------
    ValueError, TypeError
        As in :func:`conv`.

    Examples
    --------
    >>> conv_weight_grad(da.ones((1, 1, 4), chunks=2), da.arange(5.0, chunks=5)[None, None], (1, 1, 2)).compute()
    array([[[ 6., 10.]]])
    """
    dy, x, _, dtype = _arrays(dy=dy, x=x)
    geometry = Geometry.infer(
        x.shape, w_shape, stride, padding, dilation, groups, layout, flip, padding_mode, w_name="w_shape"
    )
    check_gradient(dy, geometry.y_shape, x=x.shape, w_shape=geometry.w_shape)
    how = _how(algorithm, precision, deterministic)
    return results.weight_grad(
        partial(chunked.conv_weight_grad, sums=dtypes.accumulator(dtype), how=how),
        dy,
        *results.padded(x, geometry),
        dtype,
    )


def conv_backward(
    dy: Any,
    x: Any,
    w: Any,
    *,
    stride: PerAxis = 1,
    padding: Padding = 0,
    padding_mode: PaddingMode = "zeros",
    dilation: PerAxis = 1,
    groups: int = 1,
    layout: Layout = "channels_first",
    flip: bool = False,
    activation: Activation | None = None,
    y: Any = None,
    needs: GradientName | Sequence[GradientName] = ("dx", "dw", "db"),
    algorithm: Algorithm = "auto",
    precision: Precision | None = None,
    deterministic: bool | None = None,
) -> Gradients:
    """Compute the gradients of :func:`conv`, as :func:`gpuconv.conv_backward` does.

    Parameters
    ----------
    dy : dask.array.Array of the shape of y
        Gradient with respect to the result of :func:`conv`, with any chunks.
    x : dask.array.Array of shape ``(..., C, *spatial)``
        Input, with any chunks.
    w : array of shape ``(F, C/G, *kernel)``
        Filters, as in :func:`conv`.
    stride, padding, padding_mode, dilation, groups, layout, flip, activation
        As in :func:`gpuconv.conv_backward`.
    y : dask.array.Array, optional
        Result of the forward call, which an activation requires.
    needs
        As in :func:`gpuconv.conv_backward`.
    algorithm, precision, deterministic
        As in :func:`gpuconv.conv`, for each block.

    Returns
    -------
    Gradients
        Named tuple ``(dx, dw, db)`` of Dask arrays; None for a gradient that is not in `needs`. Computed together by
        ``dask.compute(dx, dw, db)``, they read each chunk once.

    Raises
    ------
    ValueError, TypeError
        As in :func:`conv`.

    Examples
    --------
    >>> x, w = da.ones((2, 3, 8), chunks=4), numpy.ones((4, 3, 3))
    >>> dx, dw, db = conv_backward(conv(x, w), x, w)
    >>> dx.shape, dw.shape, db.compute()
    ((2, 3, 8), (4, 3, 3), array([108., 108., 108., 108.]))
    """
    dy, x, w, dtype = _arrays(dy=dy, x=x, w=w)
    geometry = Geometry.infer(x.shape, w.shape, stride, padding, dilation, groups, layout, flip, padding_mode)
    check_gradient(dy, geometry.y_shape, x=x.shape, w=w.shape)
    dy, names = _through(activation, y, dy, dtype), needed(needs)
    how = _how(algorithm, precision, deterministic)
    return Gradients(
        dx=results.data_grad(dy, w, geometry, dtype, how) if "dx" in names else None,
        dw=results.weight_grad(
            partial(chunked.conv_weight_grad, sums=dtypes.accumulator(dtype), how=how),
            dy,
            *results.padded(x, geometry),
            dtype,
        )
        if "dw" in names
        else None,
        db=results.bias_grad(dy, geometry, dtype) if "db" in names else None,
    )


def conv_transpose(
    x: Any,
    w: Any,
    b: Any = None,
    *,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
    layout: Layout = "channels_first",
    flip: bool = False,
    output_padding: PerAxis = 0,
    output_shape: PerAxis | None = None,
    activation: Activation | None = None,
    algorithm: Algorithm = "auto",
    precision: Precision | None = None,
    deterministic: bool | None = None,
) -> da.Array:
    """Compute the transposed convolution of a Dask array, as :func:`gpuconv.conv_transpose` does.

    Parameters
    ----------
    x : dask.array.Array of shape ``(..., C_in, *spatial)``
        Input, with any chunks.
    w : array of shape ``(C_in, C_out/G, *kernel)``
        Filters, as in :func:`conv`.
    b : array of shape ``(C_out,)``, optional
        Bias, like `w`.
    stride, padding, dilation, groups, layout, flip, output_padding, output_shape, activation
        As in :func:`gpuconv.conv_transpose`.
    algorithm, precision, deterministic
        As in :func:`gpuconv.conv`, for each block.

    Returns
    -------
    dask.array.Array of shape ``(..., C_out, *output)``
        Result. Each chunk of `x` has at most one chunk of it.

    Raises
    ------
    ValueError, TypeError
        As in :func:`conv`.

    Examples
    --------
    >>> conv_transpose(da.ones((1, 1, 4), chunks=2), numpy.ones((1, 1, 3)), stride=2).compute()
    array([[[1., 1., 2., 1., 2., 1., 2., 1., 1.]]])
    """
    x, w, b, dtype = _arrays(x=x, w=w, b=b)
    geometry = Geometry.infer_transposed(
        x.shape, w.shape, stride, padding, dilation, groups, layout, flip, output_padding, output_shape
    )
    check_bias(b, geometry.channels)
    check_activation(activation, dtype)
    how = _how(algorithm, precision, deterministic, activation=activation)
    return results.transposed(partial(chunked.conv_transpose, dtype=dtype, how=how), x, [w, b], geometry, dtype)


def conv_transpose_backward(
    dy: Any,
    x: Any,
    w: Any,
    *,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
    layout: Layout = "channels_first",
    flip: bool = False,
    output_padding: PerAxis = 0,
    output_shape: PerAxis | None = None,
    activation: Activation | None = None,
    y: Any = None,
    needs: GradientName | Sequence[GradientName] = ("dx", "dw", "db"),
    algorithm: Algorithm = "auto",
    precision: Precision | None = None,
    deterministic: bool | None = None,
) -> Gradients:
    """Compute the gradients of :func:`conv_transpose`, as :func:`gpuconv.conv_transpose_backward` does.

    Parameters
    ----------
    dy : dask.array.Array of the shape of y
        Gradient with respect to the result of :func:`conv_transpose`, with any chunks.
    x : dask.array.Array of shape ``(..., C_in, *spatial)``
        Input, with any chunks.
    w : array of shape ``(C_in, C_out/G, *kernel)``
        Filters, as in :func:`conv`.
    stride, padding, dilation, groups, layout, flip, output_padding, output_shape, activation
        As in :func:`gpuconv.conv_transpose_backward`.
    y : dask.array.Array, optional
        Result of the forward call, which an activation requires.
    needs
        As in :func:`gpuconv.conv_transpose_backward`.
    algorithm, precision, deterministic
        As in :func:`gpuconv.conv`, for each block.

    Returns
    -------
    Gradients
        Named tuple ``(dx, dw, db)`` of Dask arrays; None for a gradient that is not in `needs`.

    Raises
    ------
    ValueError, TypeError
        As in :func:`conv`.

    Examples
    --------
    >>> x, w = da.ones((1, 2, 4, 4), chunks=2), numpy.ones((2, 3, 2, 2))
    >>> gradients = conv_transpose_backward(da.ones((1, 3, 8, 8), chunks=3), x, w, stride=2)
    >>> gradients.dx.shape, gradients.dw.shape, gradients.db.compute()
    ((1, 2, 4, 4), (2, 3, 2, 2), array([64., 64., 64.]))
    """
    dy, x, w, dtype = _arrays(dy=dy, x=x, w=w)
    geometry = Geometry.infer_transposed(
        x.shape, w.shape, stride, padding, dilation, groups, layout, flip, output_padding, output_shape
    )
    check_gradient(dy, geometry.x_shape, x=x.shape, w=w.shape)
    dy, names = _through(activation, y, dy, dtype), needed(needs)
    how = _how(algorithm, precision, deterministic)
    return Gradients(
        dx=results.forward(partial(chunked.conv, dtype=dtype, how=how), dy, [w.conj(), None], geometry, dtype)
        if "dx" in names
        else None,
        dw=results.weight_grad(
            partial(chunked.conv_transpose_weight_grad, sums=dtypes.accumulator(dtype), how=how), x, dy, geometry, dtype
        )
        if "dw" in names
        else None,
        db=results.bias_grad(dy, geometry, dtype) if "db" in names else None,
    )


def _arrays(**arrays: Any) -> tuple[Any, Any, Any, numpy.dtype]:
    """Return the first array, two others as Dask arrays, w and b of them in one chunk, and the dtype of the result."""
    for name, array in arrays.items():
        if array is None and name == "b":
            continue
        if isinstance(array, da.Array):
            if any(map(math.isnan, array.shape)):
                raise ValueError(
                    f"{name} must have chunks of known extents, which {name}.compute_chunk_sizes() determines;"
                    f" its shape is {array.shape}"
                )
        elif name not in ("w", "b"):
            raise TypeError(f"{name} must be a Dask array, not {type(array).__name__}; dask.array.from_array makes one")
    known = {name: getattr(array, "_meta", array) for name, array in arrays.items() if array is not None or name != "b"}
    _, dtype = checked(**known)
    first, *others = (_whole(array) if name in ("w", "b") else array for name, array in arrays.items())
    return (first, *others, *(None,) * (2 - len(others)), dtype)


def _whole(array: Any) -> Any:
    """Return weights or a bias as a Dask array of one chunk, which each worker receives once."""
    if array is None:
        return None
    return array.rechunk(-1) if isinstance(array, da.Array) else da.from_array(array, chunks=-1)


def _how(algorithm: Algorithm, precision: Precision | None, deterministic: bool | None, **more: Any) -> dict[str, Any]:
    """Return the options of each block, which are checked while the graph is built."""
    check_name(algorithm)
    consent(algorithm, deterministic)
    settings.precision(precision)
    return {**more, "algorithm": algorithm, "precision": precision, "deterministic": deterministic}


def _through(activation: Activation | None, y: Any, dy: da.Array, dtype: numpy.dtype) -> da.Array:
    """Return dy, with an activation multiplied by its derivative at y."""
    if y is not None:
        _arrays(dy=dy, y=y)
        check_shape("y", y, dy.shape)
    check_derivative(activation, None if y is None else y._meta, dy._meta, dtype)
    return dy if activation is None else results.through(activation, y, dy, dtype)
