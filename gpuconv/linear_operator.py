"""Convolution as a linear operator, for the solvers of SciPy and of CuPy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gpuconv import dtypes
from gpuconv.backend import Array
from gpuconv.call import checked
from gpuconv.conv import conv, conv_data_grad
from gpuconv.geometry import Geometry


def linear_operator(
    w: Array,
    x_shape: Sequence[int],
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    layout: str = "channels_first",
    flip: bool = False,
) -> Any:
    """The LinearOperator A with ``A @ x.ravel() == conv(x, w).ravel()``; its adjoint is :func:`conv_data_grad`.

    A is a scipy.sparse.linalg.LinearOperator for a NumPy w, and one of cupyx.scipy.sparse.linalg for a CuPy w, of shape
    (y.size, x.size) and of w's dtype. It has matvec, rmatvec, matmat and rmatmat, keeps no matrix, and follows w when w
    is written to. Vectors of ints are taken as w's dtype; others are promoted with it, as by :func:`gpuconv.conv`,
    which has the other arguments and the errors. Needs SciPy (``pip install 'gpuconv[sparse]'``).

    >>> import numpy, gpuconv
    >>> from scipy.sparse.linalg import lsqr
    >>> A = gpuconv.linear_operator(numpy.array([[[1.0, 2.0]]]), (1, 1, 4))
    >>> A @ numpy.array([1.0, 0.0, 0.0, 1.0])
    array([1., 0., 2.])
    >>> A.H @ numpy.array([1.0, 0.0, 2.0])
    array([1., 2., 2., 4.])
    """
    kind, dtype = checked(w=w)
    geometry = Geometry.infer(
        x_shape, w.shape, stride=stride, padding=padding, dilation=dilation, groups=groups, layout=layout, flip=flip,
        x_name="x_shape",
    )  # fmt: skip
    settings: dict[str, Any] = {
        "stride": geometry.stride, "padding": geometry.padding, "dilation": geometry.dilation, "groups": groups,
        "layout": layout, "flip": flip,
    }  # fmt: skip
    x_size, y_size = math.prod(geometry.x_shape), math.prod(geometry.y_shape)

    def readable(vectors: Array) -> Array:
        return vectors if dtypes.supported(vectors.dtype) else vectors.astype(dtype)

    def forward(vectors: Array) -> Array:
        """(x.size, K) to (y.size, K); the K vectors are a batch."""
        x = readable(vectors).T.reshape(vectors.shape[1], *geometry.x_shape)
        return conv(x, w, **settings).reshape(vectors.shape[1], y_size).T

    def adjoint(vectors: Array) -> Array:
        dy = readable(vectors).T.reshape(vectors.shape[1], *geometry.y_shape)
        dx = conv_data_grad(dy, w, (vectors.shape[1], *geometry.x_shape), **settings)
        return dx.reshape(vectors.shape[1], x_size).T

    return _class_of(kind)(
        (y_size, x_size),
        matvec=lambda x: forward(x.reshape(-1, 1)).reshape(-1),
        rmatvec=lambda y: adjoint(y.reshape(-1, 1)).reshape(-1),
        matmat=forward,
        rmatmat=adjoint,
        dtype=dtype,
    )


def _class_of(kind: str) -> Any:
    try:
        if kind == "cupy":
            from cupyx.scipy.sparse.linalg import LinearOperator
        else:
            from scipy.sparse.linalg import LinearOperator
    except ImportError:
        raise ImportError("linear_operator needs SciPy: pip install 'gpuconv[sparse]'") from None
    return LinearOperator
