"""The cuDNN convolution functions that CuPy had until version 13, with their names and arguments.

Existing code changes one import::

    from gpuconv.compat import cupy_cudnn as cudnn  # was: from cupy import cudnn

Every convolution function writes into an array of the caller and returns None. Arrays are of CuPy or NumPy, real or
complex, with one to three spatial axes and any strides. In layout 0 x is (N, C, *spatial), W (F, C/G, *kernel) and y
(N, F, *output); in layout 1 x is (N, *spatial, C), W (F, *kernel, C/G) and y (N, *output, F). ``d_layout`` is the
layout of x and y, ``w_layout`` that of W. pad, stride and dilation are ints, or one int per spatial axis.

``tensor_core`` is "never", "always", which permits TensorFloat-32, or "auto", which reads GPUCONV_PRECISION.
``deterministic`` is that of :func:`gpuconv.conv`. ``auto_tune`` has no effect: no call measures algorithms, and results
of ``gpuconv tune`` are used in any case. (After cupyx/cudnn.pyx of CuPy 13.6.)
"""

from __future__ import annotations

import importlib
import importlib.util
import numbers
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import gpuconv
from gpuconv import settings
from gpuconv.arrays import INSTALL_HINT, Array, kind_of
from gpuconv.compat import named
from gpuconv.execute import Call, Source
from gpuconv.geometry import Geometry
from gpuconv.types import Precision
from gpuconv.validate import check_bias, check_gradient, check_out, checked, given

CUDNN_TENSOR_NCHW = 0
CUDNN_TENSOR_NHWC = 1

PRECISIONS: dict[str, Precision | None] = {"auto": None, "always": "tf32", "never": "ieee"}
PACKAGES = ("cupy", "cupyx", "cupy.cuda")  # programs import a module cudnn from these


def convolution_forward(
    x: Array,
    W: Array,  # noqa: N803
    b: Array | None,
    y: Array,
    pad: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    auto_tune: bool = False,
    tensor_core: str = "auto",
    d_layout: int = CUDNN_TENSOR_NCHW,
    w_layout: int = CUDNN_TENSOR_NCHW,
) -> None:
    """Write the convolution of x with W, plus b, into y.

    Parameters
    ----------
    x : array of shape (N, C, *spatial)
        Input.
    W : array of shape (F, C/G, *kernel)
        Filters.
    b : array of F elements, or None
        Bias, in any shape.
    y : array of shape (N, F, *output)
        Receives the result.
    pad, stride, dilation : int or sequence of int
        One value for all spatial axes, or one for each.
    groups : int, default 1
        Number of groups.
    auto_tune, tensor_core, d_layout, w_layout
        See above.

    Raises
    ------
    ValueError
        If shapes do not fit, or a value is not permitted; y is unchanged then.
    TypeError
        If an argument has another kind or dtype; y is unchanged then.

    Examples
    --------
    >>> import numpy
    >>> x, W, y = numpy.ones((2, 3, 8, 8)), numpy.ones((4, 3, 3, 3)), numpy.empty((2, 4, 8, 8))
    >>> convolution_forward(x, W, None, y, pad=(1, 1), stride=(1, 1))
    >>> y[0, 0, 0, :3]
    array([12., 18., 18.])
    """
    images, filters = _channels_first(d_layout, "d_layout"), _channels_first(w_layout, "w_layout")
    _check_ranks(x=x, W=W, y=y)
    if b is not None:
        kind_of(x=x, b=b)
        b = b.reshape(-1)
    with named(w="W", padding="pad", out="y"):
        gpuconv.conv(
            images(x), filters(W), b, out=images(y), precision=_precision(tensor_core),
            stride=stride, padding=pad, dilation=dilation, groups=groups,
        )  # fmt: skip


def convolution_backward_filter(
    x: Array,
    gy: Array,
    gW: Array,  # noqa: N803
    pad: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    deterministic: bool | None = None,
    auto_tune: bool = False,
    tensor_core: str = "auto",
    d_layout: int = CUDNN_TENSOR_NCHW,
    w_layout: int = CUDNN_TENSOR_NCHW,
) -> None:
    """Write the gradient with respect to W into gW; for complex arrays the adjoint.

    Parameters
    ----------
    x : array of shape (N, C, *spatial)
        Input.
    gy : array of shape (N, F, *output)
        Gradient with respect to y.
    gW : array of shape (F, C/G, *kernel)
        Receives the result.
    pad, stride, dilation, groups
        As in :func:`convolution_forward`.
    deterministic, auto_tune, tensor_core, d_layout, w_layout
        See above.

    Raises
    ------
    ValueError, TypeError
        As in :func:`convolution_forward`.

    Examples
    --------
    >>> import numpy
    >>> x, gy, gW = numpy.ones((2, 3, 8, 8)), numpy.ones((2, 4, 6, 6)), numpy.empty((4, 3, 3, 3))
    >>> convolution_backward_filter(x, gy, gW, pad=(0, 0), stride=(1, 1))
    >>> float(gW[0, 0, 0, 0])
    72.0
    """
    images, filters = _channels_first(d_layout, "d_layout"), _channels_first(w_layout, "w_layout")
    _check_ranks(x=x, gy=gy, gW=gW)
    out = filters(gW)
    with named(dy="gy", y="gy", w_shape="gW", padding="pad", out="gW"):
        gpuconv.conv_weight_grad(
            images(gy), images(x), out.shape, out=out, deterministic=deterministic, precision=_precision(tensor_core),
            stride=stride, padding=pad, dilation=dilation, groups=groups,
        )  # fmt: skip


def convolution_backward_data(
    W: Array,  # noqa: N803
    x: Array,
    b: Array | None,
    y: Array,
    pad: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    deterministic: bool | None = None,
    auto_tune: bool = False,
    tensor_core: str = "auto",
    d_layout: int = CUDNN_TENSOR_NCHW,
    w_layout: int = CUDNN_TENSOR_NCHW,
) -> None:
    """Write the gradient with respect to the input of a convolution, plus b, into y; for complex arrays the adjoint.

    This is a transposed convolution of x (N, F, *output) to y (N, C, *spatial).

    Parameters
    ----------
    W : array of shape (F, C/G, *kernel)
        Filters.
    x : array of shape (N, F, *output)
        Gradient with respect to the result of the convolution.
    b : array of C elements, or None
        Bias, in any shape.
    y : array of shape (N, C, *spatial)
        Receives the result.
    pad, stride, dilation, groups
        As in :func:`convolution_forward`.
    deterministic, auto_tune, tensor_core, d_layout, w_layout
        See above.

    Raises
    ------
    ValueError, TypeError
        As in :func:`convolution_forward`.

    Examples
    --------
    >>> import numpy
    >>> W, x, y = numpy.ones((4, 3, 3, 3)), numpy.ones((2, 4, 6, 6)), numpy.empty((2, 3, 8, 8))
    >>> convolution_backward_data(W, x, numpy.arange(3.0), y, pad=(0, 0), stride=(1, 1))
    >>> y[0, :, 0, 0]
    array([4., 5., 6.])
    """
    images, filters = _channels_first(d_layout, "d_layout"), _channels_first(w_layout, "w_layout")
    _check_ranks(W=W, x=x, y=y)
    dy, w, dx = images(x), filters(W), images(y)
    with named(dy="x", w="W", x_shape="y", y="x", padding="pad", out="y"):
        kind, dtype = checked(dy=dy, w=w, **given(b=b))
        geometry = Geometry.infer(
            dx.shape, w.shape, stride=stride, padding=pad, dilation=dilation, groups=groups, x_name="x_shape"
        )
        check_gradient(dy, geometry.y_shape, x_shape=dx.shape, w=w.shape)
        b = None if b is None else b.reshape(-1)
        check_bias(b, geometry.channels)
        call = Call.of(geometry, kind, dtype, "auto", _precision(tensor_core), deterministic)
        check_out(dx, kind, dtype, geometry.x_shape, dy=dy, w=w, **given(b=b))
    call.compute("data_grad", Source(dy), Source(w, conjugate=True), out=dx, bias=b)


def get_max_workspace_size() -> int:
    """Return GPUCONV_WORKSPACE_LIMIT, the bytes that a call may allocate in addition to its result.

    Returns
    -------
    int
        Bytes.

    Examples
    --------
    >>> get_max_workspace_size()
    67108864
    """
    return settings.workspace_limit()


def set_max_workspace_size(size: int) -> None:
    """Set GPUCONV_WORKSPACE_LIMIT for this process.

    Parameters
    ----------
    size : int
        Bytes, at least 0.

    Raises
    ------
    ValueError
        If size is not an int of at least 0.
    """
    if isinstance(size, bool) or not isinstance(size, numbers.Integral) or size < 0:
        raise ValueError(f"size must be a number of bytes, at least 0; got {size!r}")
    os.environ["GPUCONV_WORKSPACE_LIMIT"] = str(int(size))


def install() -> None:
    """Register this module as cupy.cudnn, cupyx.cudnn and cupy.cuda.cudnn, for libraries that import these.

    Raises
    ------
    ImportError
        If CuPy is not installed.
    RuntimeError
        If CuPy has a module of this name, which is not replaced.
    """
    try:
        packages: list[Any] = [importlib.import_module(package) for package in PACKAGES]
    except ImportError:
        raise ImportError(f"install() needs CuPy: {INSTALL_HINT}") from None
    this = sys.modules[__name__]
    for package in packages:
        if not _is_free(package):
            place = f"{package.__name__}.cudnn"
            raise RuntimeError(f"CuPy {packages[0].__version__} has {place}, which install() does not replace")
    for package in packages:
        sys.modules[f"{package.__name__}.cudnn"] = this
        package.cudnn = this


def uninstall() -> None:
    """Undo :func:`install`; without effect if it was not called."""
    this = sys.modules[__name__]
    for name in PACKAGES:
        if sys.modules.get(f"{name}.cudnn") is this:
            del sys.modules[f"{name}.cudnn"]
        package = sys.modules.get(name)
        if getattr(package, "cudnn", None) is this:
            delattr(package, "cudnn")


def _is_free(package: Any) -> bool:
    """Return whether a package of CuPy has no module cudnn, or has this module as cudnn."""
    place = f"{package.__name__}.cudnn"
    found = sys.modules.get(place) or getattr(package, "cudnn", None)
    if found is None:
        return importlib.util.find_spec(place) is None
    return found is sys.modules[__name__]


def _channels_first(layout: int, name: str) -> Callable[[Array], Array]:
    """Return a function that gives views of arrays in a layout with channels on the second axis."""
    if layout == CUDNN_TENSOR_NCHW:
        return lambda array: array
    if layout == CUDNN_TENSOR_NHWC:
        return lambda array: array.transpose(0, array.ndim - 1, *range(1, array.ndim - 1))
    raise ValueError(f"{name} must be {CUDNN_TENSOR_NCHW} (NCHW) or {CUDNN_TENSOR_NHWC} (NHWC), got {layout!r}")


def _check_ranks(**arrays: Array) -> None:
    kind_of(**arrays)
    ranks = {array.ndim for array in arrays.values()}
    if len(ranks) > 1 or not ranks <= {3, 4, 5}:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(f"{', '.join(arrays)} must have as many axes as each other, 3, 4 or 5 ({shapes})")


def _precision(tensor_core: str) -> Precision | None:
    if tensor_core not in tuple(PRECISIONS):
        raise ValueError(f"tensor_core must be one of {', '.join(PRECISIONS)}; got {tensor_core!r}")
    return PRECISIONS[tensor_core]
