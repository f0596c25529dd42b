"""The public functions: convolution forward and backward on NumPy and CuPy arrays.

Every function takes the same road. The arrays are checked; a :class:`Geometry` is inferred from their shapes, where
every error about a shape is raised; an algorithm is chosen; it reads operands and writes a result. Axis names are
those of gpuconv/geometry.py: N batch, C in-channels, F out-channels (filters), spatial axes, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy

from gpuconv import activations, dtypes, geometry as geometry_module, settings, workspace
from gpuconv.activations import Activation
from gpuconv.algorithms.blocks import Space, boxes, fitting_box
from gpuconv.backend import Array, Backend, Kind, backend_for, device_of, kind_of, matrix_products, module_of, moved
from gpuconv.choose import MODULES, check_name, choose, consent
from gpuconv.geometry import Direction, Geometry, Shape
from gpuconv.operands import Operand, Result, Role, canonical

NEEDS = ("dx", "dw", "db")


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
    "valid", "same", "same_lower", "full", "causal"; negative numbers crop. flip=False is cross-correlation, what deep
    learning calls convolution; flip=True is true convolution. activation: None, "relu", "leaky_relu" (slope 0.01),
    "sigmoid" or "tanh". dtypes: float16, bfloat16, float32, float64, complex64, complex128, promoted to a common one;
    sums are formed in float32 at least. out: an array that receives y and is returned.

    Raises ValueError for shapes and values, TypeError for kinds and dtypes, BackendError where a backend that was
    asked for cannot be used. No input is modified, and out is untouched unless all checks have passed.

    >>> import numpy, gpuconv
    >>> x, w = numpy.ones((1, 1, 3, 3)), numpy.ones((1, 1, 2, 2))
    >>> gpuconv.conv(x, w)
    array([[[[4., 4.],
             [4., 4.]]]])
    """
    kind, dtype = _checked(x=x, w=w, **_given(b=b))
    geometry = Geometry.infer(
        x.shape, w.shape, stride=stride, padding=padding, dilation=dilation, groups=groups, layout=layout, flip=flip
    )
    _check_bias(b, geometry.filters)
    _check_activation(activation, dtype)
    call = _Call(geometry, kind, dtype, algorithm, precision, deterministic)
    call.check_out(out, geometry.y_shape, x=x, w=w, **_given(b=b))
    return call.compute("forward", _Source(x, "x"), _Source(w, "w"), "y", out=out, bias=b, activation=activation)


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
    kind, dtype = _checked(dy=dy, w=w)
    geometry = Geometry.infer(
        x_shape, w.shape, stride=stride, padding=padding, dilation=dilation, groups=groups, layout=layout, flip=flip,
        x_name="x_shape",
    )  # fmt: skip
    _check_shape("dy", dy, geometry.y_shape)
    call = _Call(geometry, kind, dtype, algorithm, precision, deterministic)
    call.check_out(out, geometry.x_shape, dy=dy, w=w)
    return call.compute("data_grad", _Source(dy, "y"), _Source(w, "w", conjugate=True), "x", out=out)


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
    kind, dtype = _checked(dy=dy, x=x)
    geometry = Geometry.infer(
        x.shape, w_shape, stride=stride, padding=padding, dilation=dilation, groups=groups, layout=layout, flip=flip,
        w_name="w_shape",
    )  # fmt: skip
    _check_shape("dy", dy, geometry.y_shape)
    call = _Call(geometry, kind, dtype, algorithm, precision, deterministic)
    call.check_out(out, geometry.w_shape, dy=dy, x=x)
    return call.compute("weight_grad", _Source(dy, "y"), _Source(x, "x", conjugate=True), "w", out=out)


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
    kind, dtype = _checked(dy=dy, x=x, w=w)
    geometry = Geometry.infer(
        x.shape, w.shape, stride=stride, padding=padding, dilation=dilation, groups=groups, layout=layout, flip=flip
    )
    needed = _check_backward(kind, dtype, dy, geometry.y_shape, activation, y, needs)
    call = _Call(geometry, kind, dtype, algorithm, precision, deterministic)
    gradient = _Source(dy, "y", y=y if activation else None, activation=activation)
    return Gradients(
        dx=call.compute("data_grad", gradient, _Source(w, "w", conjugate=True), "x") if "dx" in needed else None,
        dw=call.compute("weight_grad", gradient, _Source(x, "x", conjugate=True), "w") if "dw" in needed else None,
        db=call.bias_grad(gradient) if "db" in needed else None,
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
    kind, dtype = _checked(x=x, w=w, **_given(b=b))
    geometry = Geometry.infer_transposed(
        x.shape, w.shape, stride=stride, padding=padding, dilation=dilation, groups=groups, layout=layout, flip=flip,
        output_padding=output_padding,
    )  # fmt: skip
    _check_bias(b, geometry.channels)
    _check_activation(activation, dtype)
    call = _Call(geometry, kind, dtype, algorithm, precision, deterministic)
    call.check_out(out, geometry.x_shape, x=x, w=w, **_given(b=b))
    return call.compute("data_grad", _Source(x, "y"), _Source(w, "w"), "x", out=out, bias=b, activation=activation)


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
    kind, dtype = _checked(dy=dy, x=x, w=w)
    geometry = Geometry.infer_transposed(
        x.shape, w.shape, stride=stride, padding=padding, dilation=dilation, groups=groups, layout=layout, flip=flip,
        output_padding=output_padding,
    )  # fmt: skip
    needed = _check_backward(kind, dtype, dy, geometry.x_shape, activation, y, needs)
    call = _Call(geometry, kind, dtype, algorithm, precision, deterministic)
    gradient = _Source(dy, "x", y=y if activation else None, activation=activation)
    return Gradients(
        dx=call.compute("forward", gradient, _Source(w, "w", conjugate=True), "y") if "dx" in needed else None,
        dw=call.compute("weight_grad", _Source(x, "y", conjugate=True), gradient, "w") if "dw" in needed else None,
        db=call.bias_grad(gradient) if "db" in needed else None,
    )


def clear_cache() -> None:
    """Forgets cached plans and releases the workspaces kept for the next call."""
    geometry_module.clear_cache()
    choose.cache_clear()
    workspace.clear()


class _Source(NamedTuple):
    """An array that a call reads, the role that it plays in the geometry, and what to make of its elements."""

    array: Array
    role: Role
    conjugate: bool = False
    y: Array | None = None
    activation: Activation | None = None

    def operand(self, geometry: Geometry, backend: Backend, dtype: numpy.dtype) -> Operand:
        return Operand(
            canonical(moved(self.array, backend.name), self.role, geometry),
            self.conjugate and dtypes.is_complex(dtype),
            None if self.y is None else canonical(moved(self.y, backend.name), self.role, geometry),
            self.activation,
        )


class _Call:
    """One call of a public function: where and how it computes. Settings are read, and refused, here."""

    def __init__(
        self,
        geometry: Geometry,
        kind: Kind,
        dtype: numpy.dtype,
        algorithm: str,
        precision: str | None,
        deterministic: bool | None,
    ) -> None:
        self.geometry, self.kind, self.dtype = geometry, kind, dtype
        check_name(algorithm)
        self.algorithm = algorithm
        self.deterministic = consent(algorithm, deterministic)
        self.precision = settings.precision(precision)
        self.limit = settings.workspace_limit()
        self.backend = backend_for(kind)

    def check_out(self, out: Array | None, shape: Shape, **inputs: Array) -> None:
        """TypeError or ValueError unless out can take a result of this shape."""
        if out is None:
            return
        kind_of(**inputs, out=out)
        if out.dtype != self.dtype:
            raise TypeError(f"out must have the dtype of the result, {self.dtype.name}, not {out.dtype}")
        _check_shape("out", out, shape)
        if self.kind == "numpy" and not out.flags.writeable:
            raise ValueError("out must be writeable, but it is read-only")
        if _overlaps_itself(out):
            raise ValueError(f"out must not overlap itself (shape {out.shape}, strides {out.strides})")
        for name, array in inputs.items():
            if _share_memory(self.kind, array, out):
                raise ValueError(f"out must not overlap {name} in memory")

    def compute(
        self,
        direction: Direction,
        first: _Source,
        second: _Source,
        role: Role,
        *,
        out: Array | None = None,
        bias: Array | None = None,
        activation: Activation | None = None,
    ) -> Array:
        """Runs one direction. first and second are what the algorithms take: x and w, dy and w, or dy and x."""
        geometry, backend, sums = self.geometry, self.backend, dtypes.accumulator(self.dtype)
        algorithm = choose(geometry, self.dtype, direction, backend, self.algorithm, self.deterministic).algorithm
        shape = {"x": geometry.x_shape, "w": geometry.w_shape, "y": geometry.y_shape}[role]
        with device_of(first.array), matrix_products(backend, self.precision):
            channels_last = role != "w" and _has_channels_last_memory(first.array, geometry)
            target = out
            if out is None or backend.name != self.kind:
                target = _empty(backend.xp, shape, self.dtype, channels_last, geometry)
            if bias is not None:
                bias = moved(bias, backend.name).astype(sums).reshape(geometry.groups, -1)
            result = Result(canonical(target, role, geometry), bias, activation)
            operands = [source.operand(geometry, backend, self.dtype) for source in (first, second)]
            run = workspace.Run(backend, sums, self.limit)
            if all(operand.view.size for operand in operands) and result.view.size:
                getattr(MODULES[algorithm], direction)(*operands, result, geometry, run)
            else:
                result.fill(backend.xp)
            return self._returned(target, out, channels_last)

    def bias_grad(self, gradient: _Source) -> Array:
        """db: the sum of the gradient over all but the channels."""
        xp = self.backend.xp
        # Long sums of like terms drift in float32; float64 costs little here.
        sums = dtypes.promoted(self.dtype, numpy.dtype(numpy.float64))
        with device_of(gradient.array):
            operand = gradient.operand(self.geometry, self.backend, self.dtype)
            view, positions = operand.view, tuple(range(operand.view.ndim - 2))
            if gradient.activation is None:
                total = xp.sum(view, axis=positions, dtype=sums)
            else:
                total = xp.zeros(view.shape[-2:], sums)
                run = workspace.Run(self.backend, dtypes.accumulator(self.dtype), self.limit)
                channels = math.prod(view.shape[-2:])
                read = Space(temporaries=operand.temporaries)
                box, spaces = fitting_box(view.shape[:-2], run.budget, lambda box: [(channels * math.prod(box), read)])
                with run.workspace(*spaces) as (space,):
                    for index in boxes(view.shape[:-2], box):
                        block = workspace.shaped(space, view[index].shape)
                        operand.read(xp, index, block)
                        total += xp.sum(block, axis=positions, dtype=sums)
            return self._returned(total.reshape(-1).astype(self.dtype), None, False)

    def _returned(self, result: Array, out: Array | None, channels_last: bool) -> Array:
        """The result as the kind of array that came in, in out where there is one."""
        if self.backend.name == self.kind:
            return result
        if out is None:
            out = _empty(module_of(self.kind), result.shape, self.dtype, channels_last, self.geometry)
        out[...] = moved(result, self.kind)
        return out


def _given(**arrays: Array | None) -> dict[str, Array]:
    """Those optional arrays that were given."""
    return {name: array for name, array in arrays.items() if array is not None}


def _checked(**arrays: Array) -> tuple[Kind, numpy.dtype]:
    """The kind of these arrays and the dtype of the result, or an error that names the array that does not fit."""
    kind = kind_of(**arrays)
    for name, array in arrays.items():
        if not dtypes.supported(array.dtype):
            hint = f"; {name}.astype('float32') makes one of it" if array.dtype.kind in "iub" else ""
            raise TypeError(f"{name} must be one of {', '.join(dtypes.NAMES)}, not {array.dtype}{hint}")
    return kind, dtypes.promoted(*(array.dtype for array in arrays.values()))


def _check_shape(name: str, array: Array, shape: Shape) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} must have the shape {shape}, but it has {array.shape}")


def _check_bias(b: Array | None, channels: int) -> None:
    if b is not None and b.shape != (channels,):
        raise ValueError(f"b must have one element for each of the {channels} output channels, shape ({channels},), but it has {b.shape}")


def _check_activation(activation: object, dtype: numpy.dtype) -> None:
    if activation is None:
        return
    if not isinstance(activation, str) or activation not in activations.NAMES:
        raise ValueError(f"activation must be None or one of {', '.join(activations.NAMES)}; got {activation!r}")
    if dtypes.is_complex(dtype):
        raise TypeError(f"activation={activation!r} needs a real dtype, but the result is {dtype.name}")


def _check_backward(
    kind: Kind,
    dtype: numpy.dtype,
    dy: Array,
    shape: Shape,
    activation: Activation | None,
    y: Array | None,
    needs: str | Sequence[str],
) -> tuple[str, ...]:
    """What is needed, once dy, y and the activation have been found to fit."""
    _check_shape("dy", dy, shape)
    _check_activation(activation, dtype)
    if y is not None:
        _checked(dy=dy, y=y)
        _check_shape("y", y, shape)
        if activation is not None and dtypes.is_complex(y.dtype):
            raise TypeError(f"activation={activation!r} needs a real y, not {y.dtype}")
    elif activation is not None:
        raise ValueError(f"activation={activation!r} needs y, the result of the forward call, to take its derivative from")
    return _checked_needs(needs)


def _checked_needs(needs: str | Sequence[str]) -> tuple[str, ...]:
    try:
        names = (needs,) if isinstance(needs, str) else tuple(needs)
    except TypeError:
        raise TypeError(f"needs must be names out of {', '.join(NEEDS)}; got {needs!r}") from None
    for name in names:
        if name not in NEEDS:
            raise ValueError(f"needs must be names out of {', '.join(NEEDS)}; got {name!r}")
    return names


def _has_channels_last_memory(array: Array, geometry: Geometry) -> bool:
    """Whether a channels_first array lies in memory as a contiguous channels_last one (and not as both)."""
    if geometry.layout == "channels_last" or array.flags.c_contiguous:
        return False
    channel = len(geometry.batch)
    return array.transpose(*range(channel), *range(channel + 1, array.ndim), channel).flags.c_contiguous


def _empty(xp: Any, shape: Shape, dtype: numpy.dtype, channels_last: bool, geometry: Geometry) -> Array:
    """A new array of this shape; with channels_last, a channels_first one with channels_last memory."""
    if not channels_last:
        return xp.empty(shape, dtype)
    channel = len(geometry.batch)
    memory = xp.empty((*shape[:channel], *shape[channel + 1 :], shape[channel]), dtype)
    return memory.transpose(*range(channel), len(shape) - 1, *range(channel, len(shape) - 1))


def _overlaps_itself(array: Array) -> bool:
    """Whether two elements may be one: some axis steps back into what the faster ones cover."""
    covered = array.itemsize
    for step, size in sorted((abs(step), size) for step, size in zip(array.strides, array.shape, strict=True)):
        if size > 1:
            if step < covered:
                return array.size > 0
            covered += step * (size - 1)
    return False


def _share_memory(kind: Kind, array: Array, out: Array) -> bool:
    if kind == "cupy":
        import cupy

        return bool(cupy.may_share_memory(array, out) and cupy.shares_memory(array, out))
    if not numpy.may_share_memory(array, out):
        return False
    try:
        return numpy.shares_memory(array, out, max_work=10**6)
    except numpy.exceptions.TooHardError:
        return True
