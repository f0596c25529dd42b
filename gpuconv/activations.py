"""The activations that may follow a convolution, and their derivatives as functions of their results."""

from __future__ import annotations

from typing import Any, get_args

import numpy

from gpuconv.arrays import Array
from gpuconv.types import Activation

NAMES: tuple[Activation, ...] = get_args(Activation)
LEAKY_SLOPE = 0.01


def apply(z: Array, name: Activation, xp: Any) -> None:
    """Replace z by activation(z), in place. NaN stays NaN."""
    if name == "relu":
        xp.maximum(z, 0, out=z)
    elif name == "leaky_relu":
        xp.maximum(z, LEAKY_SLOPE * z, out=z)
    elif name == "tanh":
        xp.tanh(z, out=z)
    else:
        # 1 / (1 + exp(-z)). If exp overflows, the quotient is 0, which is correct.
        with numpy.errstate(over="ignore"):
            xp.multiply(z, -1, out=z)  # NumPy 2.4's negative is wrong in place for some strides
            xp.exp(z, out=z)
        xp.add(z, 1, out=z)
        xp.divide(1, z, out=z)


def apply_derivative(dy: Array, y: Array, name: Activation, xp: Any) -> None:
    """Replace dy by dy * activation'(z), in place, where y = activation(z)."""
    y = y.astype(dy.dtype, copy=False)
    if name == "relu":
        xp.copyto(dy, 0, where=y <= 0)
    elif name == "leaky_relu":
        xp.copyto(dy, LEAKY_SLOPE * dy, where=y <= 0)
    elif name == "tanh":
        dy *= 1 - y * y
    else:
        dy *= y * (1 - y)
