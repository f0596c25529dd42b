"""Convolution as a linear operator for the solvers of SciPy and CuPy: ``gpuconv.linear_operator``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy

from gpuconv.arguments import Shape
from gpuconv.arrays import Array
from gpuconv.conv import conv, conv_data_grad
from gpuconv.geometry import Geometry
from gpuconv.validate import checked


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
    """Return the convolution with `w` as a LinearOperator; its adjoint is :func:`gpuconv.conv_data_grad`.

    Parameters
    ----------
    w : array of shape ``(F, C/G, *kernel)``
        Filters. The operator refers to the array: it follows later changes of its elements.
    x_shape : sequence of int
        Shape of x, batch axes included.
    stride, padding, dilation, groups, layout, flip
        As in :func:`gpuconv.conv`.

    Returns
    -------
    LinearOperator
        Operator A of shape ``(y.size, x.size)`` with ``A @ x.ravel() == conv(x, w).ravel()``, and the dtype of `w`. It
        is a ``scipy.sparse.linalg.LinearOperator`` for a NumPy `w` and one of ``cupyx.scipy.sparse.linalg`` for a CuPy
        `w`, with matvec, rmatvec, matmat and rmatmat. It stores no matrix.

    Raises
    ------
    ValueError, TypeError
        As in :func:`gpuconv.conv`.
    ImportError
        If SciPy is not installed (``pip install 'gpuconv[sparse]'``).

    Notes
    -----
    Vectors of integers are converted to float64. All other vectors are promoted with `w` as by :func:`gpuconv.conv`.

    Examples
    --------
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
    products = _Products(w, geometry)
    return _class_of(kind)(
        (math.prod(geometry.y_shape), math.prod(geometry.x_shape)),
        matvec=products.matvec,
        rmatvec=products.rmatvec,
        matmat=products.matmat,
        rmatmat=products.rmatmat,
        dtype=dtype,
    )


class _Products(NamedTuple):
    """Products of a LinearOperator, as bound methods that can be pickled with it."""

    w: Array
    geometry: Geometry

    def matmat(self, x: Array) -> Array:
        """Return ``(y.size, K)`` for ``(x.size, K)``; the K vectors form a batch."""
        y = conv(_batch(x, self.geometry.x_shape), self.w, **self._settings())
        return y.reshape(x.shape[1], math.prod(self.geometry.y_shape)).T

    def rmatmat(self, y: Array) -> Array:
        dy = _batch(y, self.geometry.y_shape)
        dx = conv_data_grad(dy, self.w, (y.shape[1], *self.geometry.x_shape), **self._settings())
        return dx.reshape(y.shape[1], math.prod(self.geometry.x_shape)).T

    def matvec(self, x: Array) -> Array:
        return self.matmat(x.reshape(-1, 1)).reshape(-1)

    def rmatvec(self, y: Array) -> Array:
        return self.rmatmat(y.reshape(-1, 1)).reshape(-1)

    def _settings(self) -> dict[str, Any]:
        names = "stride", "padding", "dilation", "groups", "layout", "flip"
        return {name: getattr(self.geometry, name) for name in names}


def _batch(vectors: Array, shape: Shape) -> Array:
    """Return the columns as a batch of arrays; integers become float64, as in products of NumPy with floats."""
    if vectors.dtype.kind in "iub":
        vectors = vectors.astype(numpy.float64)
    return vectors.T.reshape(vectors.shape[1], *shape)


def _class_of(kind: str) -> Any:
    try:
        if kind == "cupy":
            from cupyx.scipy.sparse.linalg import LinearOperator
        else:
            from scipy.sparse.linalg import LinearOperator
    except ImportError:
        raise ImportError("linear_operator needs SciPy: pip install 'gpuconv[sparse]'") from None
    return LinearOperator
