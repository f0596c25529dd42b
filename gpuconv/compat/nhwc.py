"""The channels-last convolution layer of many courses and articles, under its names and with its padding.

A_prev is (m, h, w, c_prev), W (kh, kw, c_prev, c_new), b (1, 1, 1, c_new). ``padding="same"`` has the meaning that it
has in those articles, not that of :func:`gpuconv.conv`: ceil(((s - 1) h - s + k) / 2) zeros on both sides and an output
of (h - k + 2 p) // s + 1, so that odd kernels keep the size at any stride. dZ is the gradient before the activation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gpuconv
from gpuconv.activations import NAMES
from gpuconv.arguments import per_axis
from gpuconv.arrays import Array, kind_of
from gpuconv.compat import named


def conv_forward(
    A_prev: Array,  # noqa: N803
    W: Array,  # noqa: N803
    b: Array,
    activation: Callable[[Array], Array] | str | None,
    padding: str = "same",
    stride: tuple[int, int] = (1, 1),
) -> Array:
    """Compute the forward pass of a convolutional layer.

    Parameters
    ----------
    A_prev : array of shape (m, h, w, c_prev)
        Input.
    W : array of shape (kh, kw, c_prev, c_new)
        Filters.
    b : array of shape (1, 1, 1, c_new)
        Bias.
    activation : callable, str or None
        Applied to the convolution Z: a function of an array, or a name that :func:`gpuconv.conv` accepts.
    padding : {"same", "valid"}, default "same"
        See above.
    stride : tuple of int, default (1, 1)
        Stride of both axes.

    Returns
    -------
    array of shape (m, h_new, w_new, c_new)
        ``activation(Z)``.

    Raises
    ------
    ValueError, TypeError
        As in :func:`gpuconv.conv`.

    Examples
    --------
    >>> import numpy
    >>> A, W, b = numpy.ones((1, 5, 5, 3)), numpy.ones((3, 3, 3, 16)), numpy.zeros((1, 1, 1, 16))
    >>> conv_forward(A, W, b, lambda z: numpy.maximum(z, 0)).shape
    (1, 5, 5, 16)
    """
    geometry = _geometry(A_prev, W, padding, stride)
    _check_bias(b, W)
    if activation is not None and not callable(activation) and activation not in NAMES:
        raise ValueError(f"activation must be a callable, None or one of {', '.join(NAMES)}; got {activation!r}")
    fused: Any = None if callable(activation) else activation
    with named(x="A_prev", w="W"):
        z = gpuconv.conv(A_prev, W, b.reshape(-1), activation=fused, **geometry)
    return activation(z) if callable(activation) else z


def conv_backward(
    dZ: Array,  # noqa: N803
    A_prev: Array,  # noqa: N803
    W: Array,  # noqa: N803
    b: Array,
    padding: str = "same",
    stride: tuple[int, int] = (1, 1),
) -> tuple[Array, Array, Array]:
    """Compute the backward pass of a convolutional layer.

    Parameters
    ----------
    dZ : array of shape (m, h_new, w_new, c_new)
        Gradient with respect to the convolution, before the activation.
    A_prev, W, b : array
        As in :func:`conv_forward`.
    padding : {"same", "valid"}, default "same"
        As in :func:`conv_forward`.
    stride : tuple of int, default (1, 1)
        As in :func:`conv_forward`.

    Returns
    -------
    dA_prev, dW, db : array
        Gradients, with the shapes of A_prev, W and b.

    Raises
    ------
    ValueError, TypeError
        As in :func:`gpuconv.conv_backward`.

    Examples
    --------
    >>> import numpy
    >>> A, W, b = numpy.ones((1, 5, 5, 3)), numpy.ones((3, 3, 3, 16)), numpy.zeros((1, 1, 1, 16))
    >>> [gradient.shape for gradient in conv_backward(numpy.ones((1, 5, 5, 16)), A, W, b)]
    [(1, 5, 5, 3), (3, 3, 3, 16), (1, 1, 1, 16)]
    """
    geometry = _geometry(A_prev, W, padding, stride)
    _check_bias(b, W)
    with named(x="A_prev", w="W", dy="dZ"):
        dx, dw, db = gpuconv.conv_backward(dZ, A_prev, W, **geometry)
    return dx, dw, db.reshape(b.shape)  # type: ignore[union-attr]


def _geometry(A_prev: Array, W: Array, padding: str, stride: Any) -> dict[str, Any]:  # noqa: N803
    for name, array in (("A_prev", A_prev), ("W", W)):
        kind_of(**{name: array})
        if len(array.shape) != 4:
            raise ValueError(f"{name} must have 4 axes, but it has the shape {array.shape}")
    steps = per_axis(stride, 2, "stride", minimum=1)
    if padding == "valid":
        pads = [(0, 0), (0, 0)]
    elif padding == "same":
        sizes = (-(-((s - 1) * n - s + k) // 2) for s, n, k in zip(steps, A_prev.shape[1:3], W.shape[:2], strict=True))
        pads = [(size, size) for size in sizes]
    else:
        raise ValueError(f"padding must be 'same' or 'valid', got {padding!r}")
    return {"stride": steps, "padding": pads, "layout": "channels_last"}


def _check_bias(b: Array, W: Array) -> None:  # noqa: N803
    kind_of(b=b)
    if b.shape != (1, 1, 1, W.shape[-1]):
        raise ValueError(f"b must have the shape (1, 1, 1, {W.shape[-1]}), but it has {b.shape}")
