"""Calls that mypy must accept, and calls that it must reject; mypy checks this file, which is never run.

A wrong call is marked ``type: ignore`` with its error, and mypy reports unused ``ignore`` comments
(warn_unused_ignores). The check therefore fails if a correct call is rejected or a wrong one accepted.
"""

from typing import Any

import numpy

import gpuconv

X: numpy.ndarray = numpy.ones((2, 3, 8, 8), numpy.float32)
W: numpy.ndarray = numpy.ones((4, 3, 3, 3), numpy.float32)
Y: numpy.ndarray = numpy.ones((2, 4, 8, 8), numpy.float32)


def right() -> list[Any]:
    y: numpy.ndarray = gpuconv.conv(X, W, padding="same")
    strided = gpuconv.conv(X, W, stride=(2, numpy.int64(1)), padding=((1, 1), (0, 2)), dilation=[1, 2])
    dx: numpy.ndarray = gpuconv.conv_data_grad(Y, W, X.shape, padding=1, algorithm="im2col")
    dw = gpuconv.conv_weight_grad(Y, X, W.shape, padding=1, precision="tf32", deterministic=True)
    gradients = gpuconv.conv_backward(Y, X, W, padding=1, needs=("dx", "db"))
    activated = gpuconv.conv(X, W, numpy.ones(4), activation="relu", layout="channels_first", out=y)
    wide = gpuconv.conv_transpose(Y, W, stride=2, output_padding=1)
    wide = gpuconv.conv_transpose(Y, W, stride=2, output_shape=(17, 18))
    explanation = gpuconv.explain((2, 3, 8, 8), (4, 3, 3, 3), dtype="bfloat16", direction="data_grad", backend="numpy")
    tuned = gpuconv.tune(X.shape, W.shape, dtype=numpy.float64, directions=["forward"])
    with gpuconv.backend("numpy"):
        operator = gpuconv.linear_operator(W, X.shape, padding="full")
    return [strided, dx, dw, gradients, activated, wide, explanation, tuned, operator]


def wrong() -> list[Any]:
    return [
        gpuconv.conv([[1.0]], W),  # type: ignore[type-var]
        gpuconv.conv(X, W, padding="smae"),  # type: ignore[arg-type]
        gpuconv.conv(X, W, stride=1.5),  # type: ignore[arg-type]
        gpuconv.conv(X, W, layout="NCHW"),  # type: ignore[arg-type]
        gpuconv.conv(X, W, activation="gelu"),  # type: ignore[arg-type]
        gpuconv.conv(X, W, algorithm="winnograd"),  # type: ignore[arg-type]
        gpuconv.conv(X, W, precision="tf16"),  # type: ignore[arg-type]
        gpuconv.conv_backward(Y, X, W, needs="dy"),  # type: ignore[arg-type]
        gpuconv.conv_data_grad(Y, W, X),  # type: ignore[arg-type]
        gpuconv.explain((1, 1, 4, 4), (1, 1, 3, 3), direction="backward"),  # type: ignore[arg-type]
        gpuconv.tune((1, 1, 4, 4), (1, 1, 3, 3), dtype="int8"),  # type: ignore[arg-type]
        gpuconv.backend("cuda"),  # type: ignore[arg-type]
    ]
