"""The public functions: convolution forward and backward on NumPy and CuPy arrays.

Every function takes the same road. The arrays are checked; a :class:`Geometry` is inferred from their shapes, where
every error about a shape is raised; and a :class:`Call` computes, by a plan that it finds or makes
(gpuconv/execute.py). Axis names are those of gpuconv/geometry.py: N batch, C in-channels, F out-channels (filters),
spatial axes, G groups.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple, SupportsIndex

from gpuconv import execute, workspace
from gpuconv.arrays import Array
from gpuconv.cpu import compiled
from gpuconv.execute import Call, Source
from gpuconv.geometry import Geometry
from gpuconv.types import A, Activation, Algorithm, GradientName, Layout, Padding, PaddingMode, PerAxis, Precision
from gpuconv.validate import (
    check_activation,
    check_bias,
    check_derivative,
    check_gradient,
    check_out,
    checked,
    given,
    needed,
)


class Gradients(NamedTuple):
    """Gradients of a convolution; None for those that were not requested."""

    dx: Array | None
    dw: Array | None
    db: Array | None


def conv(
    x: A,
    w: A,
    b: A | None = None,
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
    out: A | None = None,
) -> A:
    """Convolve `x` with `w`, add the bias `b` and apply an activation.

    Parameters
    ----------
    x : array of shape ``(..., C, *spatial)``
        Input, with any number of batch axes, including none. With ``layout="channels_last"`` its shape is
        ``(..., *spatial, C)``. Arrays may have any strides and are never modified.
    w : array of shape ``(F, C/G, *kernel)``
        Filters. ``w.ndim - 2`` is the number of spatial axes, at most 28. With ``layout="channels_last"`` its shape is
        ``(*kernel, C/G, F)``.
    b : array of shape ``(F,)``, optional
        Bias.
    stride : int or sequence of int, default 1
        One value for all spatial axes, or one for each, at least 1.
    padding : int, sequence or str, default 0
        Elements added at both ends of each spatial axis: one int, one int per axis, or one ``(low, high)`` pair per
        axis. Negative values crop. Or one of ``"valid"`` (none), ``"same"`` (output extent ``ceil(input / stride)``,
        the odd element at the high end), ``"same_lower"`` (at the low end, as SciPy's mode "same" has it for even
        kernels), ``"full"`` (``dilation * (kernel - 1)`` at both ends) and ``"causal"`` (one spatial axis; the same at
        the low end only).
    padding_mode : {"zeros", "circular", "reflect", "replicate"}, default "zeros"
        Values of the padding: zeros; x continued periodically; x mirrored at its first and last elements, which are not
        repeated; or these elements. Positive padding is at most the extent of `x` for "circular", and less than it for
        "reflect". Negative padding crops what is so continued.
    dilation : int or sequence of int, default 1
        Distance between taps, written as `stride` is.
    groups : int, default 1
        Number G of independent convolutions of C/G channels and F/G filters each.
    layout : {"channels_first", "channels_last"}, default "channels_first"
        Order of the axes. It does not prescribe the order in memory: a channels_first `x` whose channels are innermost
        in memory gives such a `y`; all other results are C-contiguous.
    flip : bool, default False
        False computes a cross-correlation, which deep learning calls convolution; True computes a convolution.
    activation : {None, "relu", "leaky_relu", "sigmoid", "tanh"}, default None
        Function applied to the sum, for real dtypes. The slope of "leaky_relu" is 0.01.
    algorithm : str, default "auto"
        ``"auto"`` or one of ``gpuconv.ALGORITHMS``. The errors of ``"fft"`` and ``"winograd"`` are relative to the
        largest result, so that zeros may become tiny numbers of any sign; ``"im2col"`` avoids that.
    precision : {None, "ieee", "tf32", "tf32x3"}, default None
        Permits TensorFloat-32 products of float32 arrays on a GPU. None reads GPUCONV_PRECISION.
    deterministic : bool, optional
        True for the same bits on every call; False permits ``"auto"`` to add in any order. None reads
        GPUCONV_DETERMINISTIC.
    out : array of the shape and dtype of the result, optional
        Receives the result and is returned. It is untouched if an argument is refused.

    Returns
    -------
    array of shape ``(..., F, *output)``
        `y`, with ``layout="channels_last"`` of shape ``(..., *output, F)``. Its dtype is the common dtype of the
        arguments: float16, bfloat16, float32, float64, complex64 or complex128. Sums are accumulated in float32 at
        least.

    Raises
    ------
    ValueError
        If shapes do not fit, or a value is not permitted.
    TypeError
        If an argument is not an array of NumPy or CuPy, or has another dtype.
    BackendError
        If a backend was requested that cannot be used.
    CompileError
        If a CUDA kernel does not compile.

    See Also
    --------
    conv_backward : The gradients dx, dw and db.
    explain : The algorithm that a call would use.

    Notes
    -----
    For one group and one spatial axis, with o the output position and t the tap::

        y[n, f, o] = activation(b[f] + sum over c, t of x[n, c, o * stride + t * dilation - low] * w[f, c, t])

    The output extent of each axis is ``(input + low + high - dilation * (kernel - 1) - 1) // stride + 1``.

    Examples
    --------
    >>> import numpy, gpuconv
    >>> x, w = numpy.ones((1, 1, 3, 3)), numpy.ones((1, 1, 2, 2))
    >>> gpuconv.conv(x, w)
    array([[[[4., 4.],
             [4., 4.]]]])
    >>> gpuconv.conv(numpy.array([[[1.0, 2.0, 4.0]]]), numpy.ones((1, 1, 3)), padding=1, padding_mode="circular")
    array([[[7., 7., 7.]]])
    """
    kind, dtype = checked(x=x, w=w, **given(b=b))
    geometry = Geometry.infer(x.shape, w.shape, stride, padding, dilation, groups, layout, flip, padding_mode)
    check_bias(b, geometry.filters)
    check_activation(activation, dtype)
    call = Call.of(geometry, kind, dtype, algorithm, precision, deterministic)
    check_out(out, kind, dtype, geometry.y_shape, x=x, w=w, **given(b=b))
    return call.compute("forward", Source(x), Source(w), out=out, bias=b, activation=activation)


def conv_data_grad(
    dy: A,
    w: A,
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
    out: A | None = None,
) -> A:
    """Compute dx, the gradient of :func:`conv` with respect to `x`.

    Parameters
    ----------
    dy : array of the shape of y
        Gradient with respect to the result of :func:`conv`.
    w : array of shape ``(F, C/G, *kernel)``
        Filters.
    x_shape : sequence of int
        Shape of `x`, batch axes included.
    stride, padding, padding_mode, dilation, groups, layout, flip
        As in :func:`conv`.
    algorithm, precision, deterministic
        As in :func:`conv`.
    out : array of the shape and dtype of the result, optional
        Receives the result and is returned.

    Returns
    -------
    array of shape `x_shape`
        Gradient dx, with its channels innermost in memory if those of a channels_first `dy` are, else C-contiguous.

    Raises
    ------
    ValueError, TypeError, BackendError
        As in :func:`conv`.

    Notes
    -----
    The gradient is the adjoint of the convolution in x, ``<conv(x, w), dy> == <x, dx>``. A complex `w` is therefore
    conjugated::

        dx[n, c, i] = sum over f and o * stride + t * dilation - low == i of dy[n, f, o] * conj(w[f, c, t])

    With a padding mode, the gradients of padded positions are added to those of the elements that they repeat.

    Examples
    --------
    >>> import numpy, gpuconv
    >>> gpuconv.conv_data_grad(numpy.ones((1, 1, 2, 2)), numpy.ones((1, 1, 2, 2)), (1, 1, 3, 3))
    array([[[[1., 2., 1.],
             [2., 4., 2.],
             [1., 2., 1.]]]])
    """
    kind, dtype = checked(dy=dy, w=w)
    geometry = Geometry.infer(
        x_shape, w.shape, stride, padding, dilation, groups, layout, flip, padding_mode, x_name="x_shape"
    )
    check_gradient(dy, geometry.y_shape, x_shape=geometry.x_shape, w=w.shape)
    call = Call.of(geometry, kind, dtype, algorithm, precision, deterministic)
    check_out(out, kind, dtype, geometry.x_shape, dy=dy, w=w)
    return call.compute("data_grad", Source(dy), Source(w, conjugate=True), out=out)


def conv_weight_grad(
    dy: A,
    x: A,
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
    out: A | None = None,
) -> A:
    """Compute dw, the gradient of :func:`conv` with respect to `w`.

    Parameters
    ----------
    dy : array of the shape of y
        Gradient with respect to the result of :func:`conv`.
    x : array of shape ``(..., C, *spatial)``
        Input.
    w_shape : sequence of int
        Shape of `w`.
    stride, padding, padding_mode, dilation, groups, layout, flip
        As in :func:`conv`.
    algorithm, precision, deterministic
        As in :func:`conv`.
    out : array of the shape and dtype of the result, optional
        Receives the result and is returned.

    Returns
    -------
    array of shape `w_shape`
        Gradient dw, C-contiguous.

    Raises
    ------
    ValueError, TypeError, BackendError
        As in :func:`conv`.

    Notes
    -----
    The gradient is the adjoint of the convolution in w, ``<conv(x, w), dy> == <w, dw>``. A complex `x` is therefore
    conjugated::

        dw[f, c, t] = sum over n, o of dy[n, f, o] * conj(x[n, c, o * stride + t * dilation - low])

    Examples
    --------
    >>> import numpy, gpuconv
    >>> gpuconv.conv_weight_grad(numpy.ones((1, 1, 2, 2)), numpy.arange(9.0).reshape(1, 1, 3, 3), (1, 1, 2, 2))
    array([[[[ 8., 12.],
             [20., 24.]]]])
    """
    kind, dtype = checked(dy=dy, x=x)
    geometry = Geometry.infer(
        x.shape, w_shape, stride, padding, dilation, groups, layout, flip, padding_mode, w_name="w_shape"
    )
    check_gradient(dy, geometry.y_shape, x=x.shape, w_shape=geometry.w_shape)
    call = Call.of(geometry, kind, dtype, algorithm, precision, deterministic)
    check_out(out, kind, dtype, geometry.w_shape, dy=dy, x=x)
    return call.compute("weight_grad", Source(dy), Source(x, conjugate=True), out=out)


def conv_backward(
    dy: A,
    x: A,
    w: A,
    *,
    stride: PerAxis = 1,
    padding: Padding = 0,
    padding_mode: PaddingMode = "zeros",
    dilation: PerAxis = 1,
    groups: int = 1,
    layout: Layout = "channels_first",
    flip: bool = False,
    activation: Activation | None = None,
    y: A | None = None,
    needs: GradientName | Sequence[GradientName] = ("dx", "dw", "db"),
    algorithm: Algorithm = "auto",
    precision: Precision | None = None,
    deterministic: bool | None = None,
) -> Gradients:
    """Compute the gradients of :func:`conv` with respect to `x`, `w` and `b`.

    Parameters
    ----------
    dy : array of the shape of y
        Gradient with respect to the result of :func:`conv`, after the activation if there is one.
    x : array of shape ``(..., C, *spatial)``
        Input.
    w : array of shape ``(F, C/G, *kernel)``
        Filters.
    stride, padding, padding_mode, dilation, groups, layout, flip
        As in :func:`conv`.
    activation : {None, "relu", "leaky_relu", "sigmoid", "tanh"}, default None
        Activation of the forward call.
    y : array, optional
        Result of the forward call. It is required with an activation, whose derivative is computed from it.
    needs : str or sequence of str, default ("dx", "dw", "db")
        Names of the gradients to compute.
    algorithm, precision, deterministic
        As in :func:`conv`.

    Returns
    -------
    Gradients
        Named tuple ``(dx, dw, db)`` of arrays with the shapes of `x`, `w` and ``(F,)``; None for a gradient that is not
        in `needs`.

    Raises
    ------
    ValueError, TypeError, BackendError
        As in :func:`conv`.

    Examples
    --------
    >>> import numpy, gpuconv
    >>> x, w = numpy.ones((2, 3, 8, 8)), numpy.ones((4, 3, 3, 3))
    >>> dx, dw, db = gpuconv.conv_backward(numpy.ones((2, 4, 6, 6)), x, w)
    >>> dx.shape, dw.shape, db
    ((2, 3, 8, 8), (4, 3, 3, 3), array([72., 72., 72., 72.]))
    """
    kind, dtype = checked(dy=dy, x=x, w=w)
    geometry = Geometry.infer(x.shape, w.shape, stride, padding, dilation, groups, layout, flip, padding_mode)
    check_gradient(dy, geometry.y_shape, x=x.shape, w=w.shape)
    check_derivative(activation, y, dy, dtype)
    names = needed(needs)
    call = Call.of(geometry, kind, dtype, algorithm, precision, deterministic)
    gradient = Source(dy, y=y if activation else None, activation=activation)
    return Gradients(
        dx=call.compute("data_grad", gradient, Source(w, conjugate=True)) if "dx" in names else None,
        dw=call.compute("weight_grad", gradient, Source(x, conjugate=True)) if "dw" in names else None,
        db=call.compute("bias_grad", gradient) if "db" in names else None,
    )


def conv_transpose(
    x: A,
    w: A,
    b: A | None = None,
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
    out: A | None = None,
) -> A:
    """Compute the transposed convolution of `x` with `w`, add the bias `b` and apply an activation.

    Parameters
    ----------
    x : array of shape ``(..., C_in, *spatial)``
        Input.
    w : array of shape ``(C_in, C_out/G, *kernel)``
        Filters, with ``layout="channels_last"`` of shape ``(*kernel, C_out/G, C_in)``.
    b : array of shape ``(C_out,)``, optional
        Bias.
    stride : int or sequence of int, default 1
        As in :func:`conv`.
    padding : int, sequence or str, default 0
        Padding of the convolution that is transposed: it shortens the output. Of the names ``"valid"``, ``"same"`` and
        ``"same_lower"`` are permitted; with the last two the output extent is ``input * stride``.
    dilation, groups, layout, flip
        As in :func:`conv`.
    output_padding : int or sequence of int, default 0
        Elements that are appended at the high end of each axis, at least 0 and less than ``max(stride, dilation)``; 0
        with ``"same"`` and ``"same_lower"``. Where no tap reaches, the sum is the bias. Keras and JAX append
        ``max(stride - kernel, 0)`` to the output of "valid".
    output_shape : int or sequence of int, optional
        Spatial extents of the result, instead of `output_padding`: those of which :func:`conv` with the same arguments
        makes the extents of `x`, at most ``stride`` different ones on each axis. `output_padding` must be 0 then.
    activation, algorithm, precision, deterministic, out
        As in :func:`conv`.

    Returns
    -------
    array of shape ``(..., C_out, *output)``
        Result y.

    Raises
    ------
    ValueError, TypeError, BackendError
        As in :func:`conv`.

    Notes
    -----
    The function is the transpose of :func:`conv` as a linear map, without the complex conjugate. The output extent of
    each axis is ``(input - 1) * stride + dilation * (kernel - 1) + 1 - low - high + output_padding``.

    Examples
    --------
    >>> import numpy, gpuconv
    >>> gpuconv.conv_transpose(numpy.ones((1, 1, 2)), numpy.ones((1, 1, 3)), stride=2)
    array([[[1., 1., 2., 1., 1.]]])
    >>> gpuconv.conv_transpose(numpy.ones((1, 1, 2)), numpy.ones((1, 1, 3)), stride=2, output_shape=6)
    array([[[1., 1., 2., 1., 1., 0.]]])
    """
    kind, dtype = checked(x=x, w=w, **given(b=b))
    geometry = Geometry.infer_transposed(
        x.shape, w.shape, stride, padding, dilation, groups, layout, flip, output_padding, output_shape
    )
    check_bias(b, geometry.channels)
    check_activation(activation, dtype)
    call = Call.of(geometry, kind, dtype, algorithm, precision, deterministic)
    check_out(out, kind, dtype, geometry.x_shape, x=x, w=w, **given(b=b))
    return call.compute("data_grad", Source(x), Source(w), out=out, bias=b, activation=activation)


def conv_transpose_backward(
    dy: A,
    x: A,
    w: A,
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
    y: A | None = None,
    needs: GradientName | Sequence[GradientName] = ("dx", "dw", "db"),
    algorithm: Algorithm = "auto",
    precision: Precision | None = None,
    deterministic: bool | None = None,
) -> Gradients:
    """Compute the gradients of :func:`conv_transpose` with respect to `x`, `w` and `b`.

    Parameters
    ----------
    dy : array of the shape of y
        Gradient with respect to the result of :func:`conv_transpose`, after the activation if there is one.
    x : array of shape ``(..., C_in, *spatial)``
        Input.
    w : array of shape ``(C_in, C_out/G, *kernel)``
        Filters.
    stride, padding, dilation, groups, layout, flip, output_padding, output_shape
        As in :func:`conv_transpose`.
    activation, y, needs
        As in :func:`conv_backward`.
    algorithm, precision, deterministic
        As in :func:`conv`.

    Returns
    -------
    Gradients
        Named tuple ``(dx, dw, db)``. The gradients are adjoints, as in :func:`conv_backward`.

    Raises
    ------
    ValueError, TypeError, BackendError
        As in :func:`conv`.

    Examples
    --------
    >>> import numpy, gpuconv
    >>> x, w = numpy.ones((1, 2, 4, 4)), numpy.ones((2, 3, 2, 2))
    >>> gradients = gpuconv.conv_transpose_backward(numpy.ones((1, 3, 8, 8)), x, w, stride=2)
    >>> gradients.dx.shape, gradients.dw.shape, gradients.db
    ((1, 2, 4, 4), (2, 3, 2, 2), array([64., 64., 64.]))
    """
    kind, dtype = checked(dy=dy, x=x, w=w)
    geometry = Geometry.infer_transposed(
        x.shape, w.shape, stride, padding, dilation, groups, layout, flip, output_padding, output_shape
    )
    check_gradient(dy, geometry.x_shape, x=x.shape, w=w.shape)
    check_derivative(activation, y, dy, dtype)
    names = needed(needs)
    call = Call.of(geometry, kind, dtype, algorithm, precision, deterministic)
    gradient = Source(dy, y=y if activation else None, activation=activation)
    return Gradients(
        dx=call.compute("forward", gradient, Source(w, conjugate=True)) if "dx" in names else None,
        dw=call.compute("weight_grad", Source(x, conjugate=True), gradient) if "dw" in names else None,
        db=call.compute("bias_grad", gradient) if "db" in names else None,
    )


def clear_cache() -> None:
    """Drop cached plans and loaded kernels, and free their workspaces.

    Compiled kernels and the results of :func:`tune` stay on disk, in the folder of GPUCONV_CACHE_DIR. A CUDA graph that
    has recorded calls must not be launched any more, because it uses these kernels and workspaces.

    Examples
    --------
    >>> import gpuconv
    >>> gpuconv.clear_cache()
    """
    execute.clear()
    workspace.clear()
    compiled.clear()
    for path, module in list(sys.modules.items()):
        if path.partition(".")[0] == "gpuconv":
            for cached in vars(module).values():
                if hasattr(cached, "cache_clear"):
                    cached.cache_clear()
