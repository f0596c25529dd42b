"""The convolution layer of Stanford's CS231n assignments, under its names.

x is (N, C, H, W), w (F, C, HH, WW), b (F,), and ``conv_param`` is ``{"stride": s, "pad": p}``. Every stride and padding
is supported. The functions whose names end in ``_naive`` and ``_fast`` in the assignments are the same ones here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import gpuconv
from gpuconv.arrays import Array
from gpuconv.compat import named

Cache: TypeAlias = tuple[Array, Array, Array, Mapping[str, Any]]


def conv_forward(x: Array, w: Array, b: Array, conv_param: Mapping[str, Any]) -> tuple[Array, Cache]:
    """Compute the forward pass of a convolutional layer.

    Parameters
    ----------
    x : array of shape (N, C, H, W)
        Input.
    w : array of shape (F, C, HH, WW)
        Filters.
    b : array of shape (F,)
        Bias.
    conv_param : mapping
        ``"stride"``, and ``"pad"``, the zeros on each side.

    Returns
    -------
    out : array of shape (N, F, 1 + (H + 2 pad - HH) // stride, 1 + (W + 2 pad - WW) // stride)
        Result.
    cache : tuple
        Argument of :func:`conv_backward`.

    Raises
    ------
    ValueError, TypeError
        As in :func:`gpuconv.conv`, or if conv_param lacks a key.

    Examples
    --------
    >>> import numpy
    >>> x, w, b = numpy.ones((2, 3, 5, 5)), numpy.ones((4, 3, 3, 3)), numpy.zeros(4)
    >>> y, cache = conv_forward(x, w, b, {"stride": 2, "pad": 0})
    >>> y.shape
    (2, 4, 2, 2)
    """
    geometry = _geometry(x, w, conv_param)
    with named(padding="pad"):
        return gpuconv.conv(x, w, b, **geometry), (x, w, b, conv_param)


def conv_backward(dout: Array, cache: Cache) -> tuple[Array, Array, Array]:
    """Compute the backward pass of a convolutional layer.

    Parameters
    ----------
    dout : array of the shape of out
        Gradient with respect to the result of :func:`conv_forward`.
    cache : tuple
        Second result of :func:`conv_forward`.

    Returns
    -------
    dx, dw, db : array
        Gradients with respect to x, w and b.

    Raises
    ------
    ValueError, TypeError
        As in :func:`gpuconv.conv_backward`.

    Examples
    --------
    >>> import numpy
    >>> x, w, b = numpy.ones((2, 3, 5, 5)), numpy.ones((4, 3, 3, 3)), numpy.zeros(4)
    >>> y, cache = conv_forward(x, w, b, {"stride": 2, "pad": 0})
    >>> [gradient.shape for gradient in conv_backward(y, cache)]
    [(2, 3, 5, 5), (4, 3, 3, 3), (4,)]
    """
    x, w, _, conv_param = cache
    geometry = _geometry(x, w, conv_param)
    with named(dy="dout", padding="pad"):
        dx, dw, db = gpuconv.conv_backward(dout, x, w, **geometry)
    return dx, dw, db


def _geometry(x: Array, w: Array, conv_param: Mapping[str, Any]) -> dict[str, Any]:
    for name, array in (("x", x), ("w", w)):
        if getattr(array, "ndim", 4) != 4:
            raise ValueError(f"{name} must have 4 axes, but it has the shape {array.shape}")
    if not isinstance(conv_param, Mapping):
        raise TypeError(f"conv_param must be a dict with 'stride' and 'pad', got {conv_param!r}")
    for key in ("stride", "pad"):
        if key not in conv_param:
            raise ValueError(f"conv_param must have 'stride' and 'pad', got {dict(conv_param)}")
    return {"stride": conv_param["stride"], "padding": conv_param["pad"]}


conv_forward_naive = conv_forward_fast = conv_forward
conv_backward_naive = conv_backward_fast = conv_backward
