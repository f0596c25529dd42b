"""Convolution as a linear operator of SciPy or CuPy, and as a sparse matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, SupportsIndex

import numpy

from gpuconv import dtypes, padding_modes
from gpuconv.api import conv, conv_data_grad
from gpuconv.arguments import Shape
from gpuconv.arrays import Array, kind_of, moved
from gpuconv.geometry import Geometry
from gpuconv.operands import canonical
from gpuconv.types import Layout, Padding, PaddingMode, PerAxis
from gpuconv.validate import checked

_SPARSE_DTYPES = ("float32", "float64", "complex64", "complex128")


def linear_operator(
    w: Array,
    x_shape: Sequence[SupportsIndex],
    *,
    stride: PerAxis = 1,
    padding: Padding = 0,
    padding_mode: PaddingMode = "zeros",
    dilation: PerAxis = 1,
    groups: int = 1,
    layout: Layout = "channels_first",
    flip: bool = False,
) -> Any:
    """Return the convolution with `w` as a LinearOperator; its adjoint is :func:`gpuconv.conv_data_grad`.

    Parameters
    ----------
    w : array of shape ``(F, C/G, *kernel)``
        Filters. The operator refers to the array: it follows later changes of its elements.
    x_shape : sequence of int
        Shape of x, batch axes included.
    stride, padding, padding_mode, dilation, groups, layout, flip
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
        x_shape, w.shape, stride, padding, dilation, groups, layout, flip, padding_mode, x_name="x_shape"
    )
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
        names = "stride", "padding", "padding_mode", "dilation", "groups", "layout", "flip"
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


# ---------------------------------------------------------------------------------------- sparse matrix


def conv_matrix(
    w: Array,
    x_shape: Sequence[SupportsIndex],
    *,
    stride: PerAxis = 1,
    padding: Padding = 0,
    padding_mode: PaddingMode = "zeros",
    dilation: PerAxis = 1,
    groups: int = 1,
    layout: Layout = "channels_first",
    flip: bool = False,
) -> Any:
    """Return the convolution with `w` as a sparse matrix in CSR format.

    Parameters
    ----------
    w : array of shape ``(F, C/G, *kernel)``
        Filters of dtype float32, float64, complex64 or complex128, the dtypes of sparse matrices.
    x_shape : sequence of int
        Shape of x, batch axes included.
    stride, padding, padding_mode, dilation, groups, layout, flip
        As in :func:`gpuconv.conv`.

    Returns
    -------
    scipy.sparse.csr_array or cupyx.scipy.sparse.csr_matrix
        Matrix A of shape ``(y.size, x.size)`` with ``A @ x.ravel() == conv(x, w).ravel()``. It stores one entry for
        each product: none for taps on zeros of the padding, but one for each zero in `w`. With a padding mode, products
        of an output with the same element of x are one entry.

    Raises
    ------
    ValueError, TypeError
        As in :func:`gpuconv.conv`.
    ImportError
        If SciPy is not installed (``pip install 'gpuconv[sparse]'``).

    Examples
    --------
    >>> import numpy, gpuconv
    >>> A = gpuconv.conv_matrix(numpy.arange(1.0, 10).reshape(1, 1, 3, 3), (1, 1, 4, 4))
    >>> A.shape, A.nnz
    ((4, 16), 36)
    """
    kind = kind_of(w=w)
    if w.dtype.name not in _SPARSE_DTYPES:
        hint = "w.astype('float32') converts it"
        raise TypeError(
            f"w must be one of {', '.join(_SPARSE_DTYPES)} to become a sparse matrix, not {w.dtype}; {hint}"
        )
    geometry = Geometry.infer(
        x_shape, w.shape, stride, padding, dilation, groups, layout, flip, padding_mode, x_name="x_shape"
    )
    try:
        from scipy import sparse
    except ImportError:
        raise ImportError("conv_matrix needs SciPy: pip install 'gpuconv[sparse]'") from None
    weights = canonical(moved(w, "numpy"), "w", geometry).astype(dtypes.promoted(w.dtype), copy=False)
    shape = math.prod(geometry.y_shape), math.prod(geometry.x_shape)
    matrix = sparse.csr_array(_csr(weights, geometry), shape=shape)
    if geometry.padding_mode != "zeros":  # an output may read the same input through several taps
        matrix.sum_duplicates()
    if kind == "numpy":
        return matrix
    import cupyx.scipy.sparse

    arrays = matrix.data, matrix.indices, matrix.indptr
    with w.device:
        return cupyx.scipy.sparse.csr_matrix(tuple(moved(array, "cupy") for array in arrays), shape=shape)


def _csr(w: Array, geometry: Geometry) -> tuple[Array, Array, Array]:
    """Return data, indices and indptr for w ``(*kernel, G, C/G, F/G)``, with the columns of each row in order."""
    seen, valid = _inputs_seen(geometry)  # (outputs, terms of a row): the input that each product reads
    counts = valid.sum(axis=1)
    images = math.prod(geometry.batch)
    x_size, y_size = (math.prod(shape[len(geometry.batch) :]) for shape in (geometry.x_shape, geometry.y_shape))
    rows = numpy.arange(y_size).reshape(geometry.y_shape[len(geometry.batch) :])
    # The axes of w in the order of the inputs of a row, then (G, F/G).
    if geometry.layout == "channels_first":
        rows, w = numpy.moveaxis(rows, 0, -1), numpy.moveaxis(w, -2, 0)
    else:
        w = w.swapaxes(-3, -2)
    rows = rows.reshape(-1, geometry.groups, geometry.group_filters)
    channel_step = 1 if geometry.layout == "channels_last" else math.prod(geometry.input)

    lengths = numpy.empty(y_size, numpy.int64)
    lengths[rows] = counts[:, None, None]
    entries = images * int(lengths.sum())
    index = index_dtype(max(entries, images * x_size))
    indptr = numpy.zeros(images * y_size + 1, index)
    numpy.cumsum(numpy.tile(lengths, images), out=indptr[1:])
    data, indices = numpy.empty(entries, w.dtype), numpy.empty(entries, index)
    w = w.reshape(-1, geometry.groups, geometry.group_filters)
    within = numpy.arange(counts.sum()) - numpy.repeat(numpy.cumsum(counts) - counts, counts)
    for group in range(geometry.groups if images else 0):
        columns = (seen + group * geometry.group_channels * channel_step)[valid]
        for f in range(geometry.group_filters):
            slots = numpy.repeat(indptr[rows[:, group, f]], counts) + within
            values = numpy.broadcast_to(w[:, group, f], valid.shape)[valid]
            for image in range(images):
                data[slots + image * (entries // images)] = values
                indices[slots + image * (entries // images)] = columns + image * x_size
    return data, indices, indptr


def index_dtype(largest: int) -> Any:
    """Return the dtype of indices and of positions of entries, for values up to ``largest``."""
    return numpy.int32 if largest < 2**31 else numpy.int64


def _inputs_seen(geometry: Geometry) -> tuple[Array, Array]:
    """Return for each output and term the index of its input within an image (group 0), and whether it exists."""
    rank = geometry.rank
    channels_last = geometry.layout == "channels_last"
    steps = numpy.cumprod((geometry.channels if channels_last else 1, *geometry.input[:0:-1]))[::-1]
    index: Any = 0
    valid: Any = True
    for axis in range(rank):
        o, t = numpy.arange(geometry.output[axis])[:, None], numpy.arange(geometry.kernel[axis])
        i = _held(geometry, axis, geometry.position(axis, o, t))
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = i.shape
        index = index + (i * steps[axis]).reshape(shape)
        valid = valid & ((i >= 0) & (i < geometry.input[axis])).reshape(shape)
    channel = numpy.arange(geometry.group_channels) * (1 if channels_last else math.prod(geometry.input))
    if channels_last:
        index = index[..., None] + channel
        valid = numpy.broadcast_to(valid[..., None], index.shape)
    else:
        # Channels before taps: (*outputs, C/G, *kernel).
        order = (*range(rank), 2 * rank, *range(rank, 2 * rank))
        index = (index[..., None] + channel).transpose(order)
        valid = numpy.broadcast_to(valid[..., None], (*valid.shape, geometry.group_channels)).transpose(order)
    outputs = math.prod(geometry.output)
    return index.reshape(outputs, -1), valid.reshape(outputs, -1)


def _held(geometry: Geometry, axis: int, positions: Array) -> Array:
    """Return the inputs that positions of a padded axis hold; none for positions of zeros, which are out of bounds."""
    if geometry.padding_mode == "zeros":
        return positions
    parts = padding_modes.segments(geometry, axis)
    return numpy.select(
        [(part.start <= positions) & (positions < part.stop) for part in parts],
        [part.held(positions) for part in parts],
    )
