"""The public functions: convolution forward and backward on NumPy and CuPy arrays.

Every function takes the same road. The arrays are checked; a :class:`Geometry` is inferred from their shapes, where
every error about a shape is raised; and a :class:`Call` computes, by a plan that it finds or makes
(gpuconv/execute.py). Axis names are those of gpuconv/geometry.py: N batch, C in-channels, F out-channels (filters),
spatial axes, G groups.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from gpuconv import execute, workspace
from gpuconv.activations import Activation
from gpuconv.backend import Array
from gpuconv.execute import Call, Source
from gpuconv.geometry import Geometry
from gpuconv.validate import (
    NEEDS,
    check_activation,
    check_backward,
    check_bias,
    check_gradient,
    check_out,
    checked,
    given,
)


class Gradients(NamedTuple):
    """The gradients of a convolution; None for what was not asked for."""

    dx: Array | None
    dw: Array | None
    db: Array | None


def conv(
    x: Array,
    w: Array,
    b: Array | None = None,
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    layout: str = "channels_first",
    flip: bool = False,
    activation: Activation | None = None,
    algorithm: str = "auto",
    precision: str | None = None,
    deterministic: bool | None = None,
    out: Array | None = None,
) -> Array:
    """The convolution y of x with w, plus b, through the activation.

    x is (..., C, *spatial) with any number of batch axes, w (F, C/G, *kernel), b (F,), and y (..., F, *output) with
    output = (input + low + high - dilation * (kernel - 1) - 1) // stride + 1 on each of any number of spatial axes.
    With layout="channels_last" x is (..., *spatial, C), w (*kernel, C/G, F), y (..., *output, F). The layout names
    axes, not memory: y takes the memory order of x.

    stride, dilation: an int, or one per spatial axis. padding: an int, one per axis, a (low, high) pair per axis, or
    "valid", "same", "same_lower", "full", "causal"; negative numbers crop. groups: that many convolutions side by side,
    each of C/G channels and F/G filters. flip=False is cross-correlation, what deep learning calls convolution;
    flip=True is true convolution. activation: None, "relu", "leaky_relu" (slope 0.01), "sigmoid" or "tanh".

    dtypes: float16, bfloat16, float32, float64, complex64, complex128, promoted to a common one; sums are formed in
    float32 at least. algorithm: "auto" or one of gpuconv.ALGORITHMS. precision: "ieee", or "tf32" or "tf32x3" to permit
    TensorFloat-32 products of float32 arrays on a GPU; None leaves it to GPUCONV_PRECISION. deterministic: True for the
    same bits every time, False to let "auto" add in any order; None leaves it to GPUCONV_DETERMINISTIC. out: an array
    that receives y and is returned.

    Raises ValueError for shapes and values, TypeError for kinds and dtypes, BackendError where a backend that was
    asked for cannot be used. No input is modified, and out is untouched unless all checks have passed.

    >>> import numpy, gpuconv
    >>> x, w = numpy.ones((1, 1, 3, 3)), numpy.ones((1, 1, 2, 2))
    >>> gpuconv.conv(x, w)
    array([[[[4., 4.],
             [4., 4.]]]])
    """
    kind, dtype = checked(x=x, w=w, **given(b=b))
    geometry = Geometry.infer(
        x.shape, w.shape, stride=stride, padding=padding, dilation=dilation, groups=groups, layout=layout, flip=flip
    )
    check_bias(b, geometry.filters)
    check_activation(activation, dtype)
    call = Call.of(geometry, kind, dtype, algorithm, precision, deterministic)
    check_out(out, kind, dtype, geometry.y_shape, x=x, w=w, **given(b=b))
    return call.compute("forward", Source(x), Source(w), out=out, bias=b, activation=activation)


def conv_data_grad(
    dy: Array,
    w: Array,
    x_shape: Sequence[int],
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    layout: str = "channels_first",
    flip: bool = False,
    algorithm: str = "auto",
    precision: str | None = None,
    deterministic: bool | None = None,
    out: Array | None = None,
) -> Array:
    """dx, the gradient of :func:`conv` in x, from the gradient dy in y.

    dy has the shape of y, and dx the shape ``x_shape``, batch axes included. It is the adjoint of the convolution,
    <conv(x, w), dy> == <x, dx>, so w is conjugated where it is complex. dx takes the memory order of dy. The other
    arguments and the errors are those of :func:`conv`.

    >>> import numpy, gpuconv
    >>> gpuconv.conv_data_grad(numpy.ones((1, 1, 2, 2)), numpy.ones((1, 1, 2, 2)), (1, 1, 3, 3))
    array([[[[1., 2., 1.],
             [2., 4., 2.],
             [1., 2., 1.]]]])
    """
    kind, dtype = checked(dy=dy, w=w)
    geometry = Geometry.infer(
        x_shape, w.shape, stride=stride, padding=padding, dilation=dilation, groups=groups, layout=layout, flip=flip,
        x_name="x_shape",
    )  # fmt: skip
    check_gradient(dy, geometry.y_shape, x_shape=geometry.x_shape, w=w.shape)
    call = Call.of(geometry, kind, dtype, algorithm, precision, deterministic)
    check_out(out, kind, dtype, geometry.x_shape, dy=dy, w=w)
    return call.compute("data_grad", Source(dy), Source(w, conjugate=True), out=out)


def conv_weight_grad(
    dy: Array,
    x: Array,
    w_shape: Sequence[int],
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    layout: str = "channels_first",
    flip: bool = False,
    algorithm: str = "auto",
    precision: str | None = None,
    deterministic: bool | None = None,
    out: Array | None = None,
) -> Array:
    """dw, the gradient of :func:`conv` in w, from the gradient dy in y.

    dy has the shape of y, and dw the shape ``w_shape``. It is the adjoint in w, <conv(x, w), dy> == <w, dw>, so x is
    conjugated where it is complex. The other arguments and the errors are those of :func:`conv`.

    >>> import numpy, gpuconv
    >>> gpuconv.conv_weight_grad(numpy.ones((1, 1, 2, 2)), numpy.arange(9.0).reshape(1, 1, 3, 3), (1, 1, 2, 2))
    array([[[[ 8., 12.],
             [20., 24.]]]])
    """
    kind, dtype = checked(dy=dy, x=x)
    geometry = Geometry.infer(
        x.shape, w_shape, stride=stride, padding=padding, dilation=dilation, groups=groups, layout=layout, flip=flip,
        w_name="w_shape",
    )  # fmt: skip
    check_gradient(dy, geometry.y_shape, x=x.shape, w_shape=geometry.w_shape)
    call = Call.of(geometry, kind, dtype, algorithm, precision, deterministic)
    check_out(out, kind, dtype, geometry.w_shape, dy=dy, x=x)
    return call.compute("weight_grad", Source(dy), Source(x, conjugate=True), out=out)


def conv_backward(
    dy: Array,
    x: Array,
    w: Array,
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    layout: str = "channels_first",
    flip: bool = False,
    activation: Activation | None = None,
    y: Array | None = None,
    needs: str | Sequence[str] = NEEDS,
    algorithm: str = "auto",
    precision: str | None = None,
    deterministic: bool | None = None,
) -> Gradients:
    """dx, dw and db of :func:`conv`, from the gradient dy in y.

    With an activation, dy is the gradient behind it, and y, the result of :func:`conv`, is required: the derivative is
    applied from it. ``needs`` names what to compute, one name or several of "dx", "dw", "db"; the rest is None.
    The other arguments and the errors are those of :func:`conv`.

    >>> import numpy, gpuconv
    >>> x, w = numpy.ones((2, 3, 8, 8)), numpy.ones((4, 3, 3, 3))
    >>> dx, dw, db = gpuconv.conv_backward(numpy.ones((2, 4, 6, 6)), x, w)
    >>> dx.shape, dw.shape, db
    ((2, 3, 8, 8), (4, 3, 3, 3), array([72., 72., 72., 72.]))
    """
    kind, dtype = checked(dy=dy, x=x, w=w)
    geometry = Geometry.infer(
        x.shape, w.shape, stride=stride, padding=padding, dilation=dilation, groups=groups, layout=layout, flip=flip
    )
    needed = check_backward(kind, dtype, dy, geometry.y_shape, activation, y, needs, x=x.shape, w=w.shape)
    call = Call.of(geometry, kind, dtype, algorithm, precision, deterministic)
    gradient = Source(dy, y=y if activation else None, activation=activation)
    return Gradients(
        dx=call.compute("data_grad", gradient, Source(w, conjugate=True)) if "dx" in needed else None,
        dw=call.compute("weight_grad", gradient, Source(x, conjugate=True)) if "dw" in needed else None,
        db=call.compute("bias_grad", gradient) if "db" in needed else None,
    )


def conv_transpose(
    x: Array,
    w: Array,
    b: Array | None = None,
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    layout: str = "channels_first",
    flip: bool = False,
    output_padding: Any = 0,
    activation: Activation | None = None,
    algorithm: str = "auto",
    precision: str | None = None,
    deterministic: bool | None = None,
    out: Array | None = None,
) -> Array:
    """The transposed convolution y of x with w, plus b, through the activation.

    x is (..., C_in, *spatial), w (C_in, C_out/G, *kernel), b (C_out,), and y (..., C_out, *output) with output =
    (input - 1) * stride + dilation * (kernel - 1) + 1 - low - high + output_padding; with layout="channels_last" w is
    (*kernel, C_out/G, C_in). It is the transpose of :func:`conv` (its data_grad without the conjugate). padding takes
    away what conv's would have added, or is "valid", "same" or "same_lower" (output = input * stride);
    output_padding, less than max(stride, dilation), lengthens the high end. Where no tap reaches, y is b. The other
    arguments and the errors are those of :func:`conv`.

    >>> import numpy, gpuconv
    >>> gpuconv.conv_transpose(numpy.ones((1, 1, 2)), numpy.ones((1, 1, 3)), stride=2)
    array([[[1., 1., 2., 1., 1.]]])
    """
    kind, dtype = checked(x=x, w=w, **given(b=b))
    geometry = Geometry.infer_transposed(
        x.shape, w.shape, stride=stride, padding=padding, dilation=dilation, groups=groups, layout=layout, flip=flip,
        output_padding=output_padding,
    )  # fmt: skip
    check_bias(b, geometry.channels)
    check_activation(activation, dtype)
    call = Call.of(geometry, kind, dtype, algorithm, precision, deterministic)
    check_out(out, kind, dtype, geometry.x_shape, x=x, w=w, **given(b=b))
    return call.compute("data_grad", Source(x), Source(w), out=out, bias=b, activation=activation)


def conv_transpose_backward(
    dy: Array,
    x: Array,
    w: Array,
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    layout: str = "channels_first",
    flip: bool = False,
    output_padding: Any = 0,
    activation: Activation | None = None,
    y: Array | None = None,
    needs: str | Sequence[str] = NEEDS,
    algorithm: str = "auto",
    precision: str | None = None,
    deterministic: bool | None = None,
) -> Gradients:
    """dx, dw and db of :func:`conv_transpose`, from the gradient dy in y: the adjoints, as in :func:`conv_backward`.

    >>> import numpy, gpuconv
    >>> x, w = numpy.ones((1, 2, 4, 4)), numpy.ones((2, 3, 2, 2))
    >>> gradients = gpuconv.conv_transpose_backward(numpy.ones((1, 3, 8, 8)), x, w, stride=2)
    >>> gradients.dx.shape, gradients.dw.shape, gradients.db
    ((1, 2, 4, 4), (2, 3, 2, 2), array([64., 64., 64.]))
    """
    kind, dtype = checked(dy=dy, x=x, w=w)
    geometry = Geometry.infer_transposed(
        x.shape, w.shape, stride=stride, padding=padding, dilation=dilation, groups=groups, layout=layout, flip=flip,
        output_padding=output_padding,
    )  # fmt: skip
    needed = check_backward(kind, dtype, dy, geometry.x_shape, activation, y, needs, x=x.shape, w=w.shape)
    call = Call.of(geometry, kind, dtype, algorithm, precision, deterministic)
    gradient = Source(dy, y=y if activation else None, activation=activation)
    return Gradients(
        dx=call.compute("forward", gradient, Source(w, conjugate=True)) if "dx" in needed else None,
        dw=call.compute("weight_grad", Source(x, conjugate=True), gradient) if "dw" in needed else None,
        db=call.compute("bias_grad", gradient) if "db" in needed else None,
    )


def clear_cache() -> None:
    """Forgets plans, loaded kernels and all else that was kept for later calls, and releases their workspaces.

    A CUDA graph that has recorded calls must not be launched any more: it uses these kernels and workspaces. Compiled
    kernels and what gpuconv.tune has found stay on disk, in the folder of GPUCONV_CACHE_DIR.
    """
    execute.clear()
    workspace.clear()
    for path, module in list(sys.modules.items()):
        if path.partition(".")[0] == "gpuconv":
            for cached in vars(module).values():
                if hasattr(cached, "cache_clear"):
                    cached.cache_clear()
