"""Convolution functions for PyTorch tensors, differentiable by autograd, on CPU and CUDA tensors without a copy.

Examples
--------
>>> import torch
>>> from gpuconv.torch import conv
>>> x, w = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2, requires_grad=True)
>>> conv(x, w).sum().backward()
>>> w.grad
tensor([[[[4., 4.],
          [4., 4.]]]])

Notes
-----
Each gradient is a convolution, so it has gradients itself. CUDA tensors are computed on PyTorch's current stream, into
memory of PyTorch's allocator. torch.compile breaks its graph at the calls. Autocast does not change their dtypes. The
transforms of torch.func and forward-mode gradients are refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy

from gpuconv import dtypes
from gpuconv.arrays import INSTALL_HINT, Array, Kind
from gpuconv.execute import Call, Source
from gpuconv.geometry import Geometry
from gpuconv.operands import ROLES, Role, has_channels_last_memory
from gpuconv.types import Algorithm, Direction, Layout, Padding, PaddingMode, PerAxis, Precision
from gpuconv.validate import check_bias

try:
    import torch
    from torch.autograd.forward_ad import unpack_dual
except ImportError:
    raise ImportError("gpuconv.torch needs PyTorch: pip install 'gpuconv[torch]'") from None

Tensor: TypeAlias = torch.Tensor


def conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
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
) -> Tensor:
    """Convolve tensors, as :func:`gpuconv.conv` does arrays; differentiable any number of times.

    Parameters
    ----------
    x : Tensor of shape ``(..., C, *spatial)``
        Input. All tensors are dense and on one device, the CPU or a CUDA device.
    w : Tensor of shape ``(F, C/G, *kernel)``
        Filters.
    b : Tensor of shape ``(F,)``, optional
        Bias.
    stride, padding, padding_mode, dilation, groups, layout, flip
        As in :func:`gpuconv.conv`.
    algorithm, precision, deterministic
        As in :func:`gpuconv.conv`.

    Returns
    -------
    Tensor of shape ``(..., F, *output)``
        y on the device of `x`, in channels_last memory if `x` is. Gradients of complex tensors are the adjoints, as
        PyTorch defines them.

    Raises
    ------
    ValueError, TypeError, BackendError
        As in :func:`gpuconv.conv`.

    Examples
    --------
    >>> import torch
    >>> conv(torch.ones(1, 1, 3), torch.ones(1, 1, 2))
    tensor([[[2., 2.]]])
    """
    geometry = {
        "stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "layout": layout, "flip": flip,
        "padding_mode": padding_mode,
    }  # fmt: skip
    return _called("forward", x, w, b, geometry, algorithm, precision, deterministic)


def conv_transpose(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
    layout: Layout = "channels_first",
    flip: bool = False,
    output_padding: PerAxis = 0,
    output_shape: PerAxis | None = None,
    algorithm: Algorithm = "auto",
    precision: Precision | None = None,
    deterministic: bool | None = None,
) -> Tensor:
    """Compute the transposed convolution of tensors, as :func:`gpuconv.conv_transpose` does of arrays.

    Parameters
    ----------
    x : Tensor of shape ``(..., C_in, *spatial)``
        Input.
    w : Tensor of shape ``(C_in, C_out/G, *kernel)``
        Filters.
    b : Tensor of shape ``(C_out,)``, optional
        Bias.
    stride, padding, dilation, groups, layout, flip, output_padding, output_shape
        As in :func:`gpuconv.conv_transpose`.
    algorithm, precision, deterministic
        As in :func:`gpuconv.conv`.

    Returns
    -------
    Tensor of shape ``(..., C_out, *output)``
        y, as for :func:`conv`.

    Raises
    ------
    ValueError, TypeError, BackendError
        As in :func:`gpuconv.conv`.

    Examples
    --------
    >>> import torch
    >>> conv_transpose(torch.ones(1, 1, 2), torch.ones(1, 1, 3), stride=2)
    tensor([[[1., 1., 2., 1., 1.]]])
    """
    geometry = {
        "stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "layout": layout, "flip": flip,
        "output_padding": output_padding, "output_shape": output_shape,
    }  # fmt: skip
    return _called("data_grad", x, w, b, geometry, algorithm, precision, deterministic)


@torch.compiler.disable
def _called(
    direction: Direction, x: Tensor, w: Tensor, b: Tensor | None, geometry: dict[str, Any], *how: Any
) -> Tensor:
    """Compute the convolution forward or, transposed, as data_grad."""
    _check(x=x, w=w, b=b)
    infer = Geometry.infer if direction == "forward" else Geometry.infer_transposed
    convolution = _Convolution(infer(tuple(x.shape), tuple(w.shape), **geometry), *how)
    if direction == "forward":
        check_bias(b, convolution.geometry.filters)
    else:
        check_bias(b, convolution.geometry.channels)
        w = w.conj_physical() if w.is_complex() else w  # data_grad, the adjoint, conjugates it again
    return convolution.result(direction, x, w, b)


class _Convolution(NamedTuple):
    """A convolution and its settings, which all its directions have in common."""

    geometry: Geometry
    algorithm: str
    precision: str | None
    deterministic: bool | None

    def result(self, direction: Direction, first: Tensor, second: Tensor, b: Tensor | None = None) -> Tensor:
        """Return the result of a direction. Autograd records it only if a gradient is needed, since that takes time."""
        if _has_gradients(first, second, b):
            return _Differentiable.apply(self, direction, first, second, b)  # type: ignore[no-any-return]
        return self.computed(direction, first, second, b)

    def computed(self, direction: Direction, first: Tensor, second: Tensor, b: Tensor | None) -> Tensor:
        """Return the result of a direction without autograd; w and x are conjugated in the gradients."""
        # PyTorch does not warn about overflow.
        with _on_stream_of(first.device) if first.is_cuda else numpy.errstate(over="ignore", invalid="ignore"):
            arrays = [_array(tensor) for tensor in (first, second, b) if tensor is not None]
            kind: Kind = "cupy" if first.is_cuda else "numpy"
            call = Call.of(self.geometry, kind, dtypes.promoted(*(array.dtype for array in arrays)), *self[1:])
            out = None
            if first.is_cuda:  # from PyTorch's allocator, which tracks how long streams use its memory
                out = self._empty(ROLES[direction][2], getattr(torch, call.dtype.name), first.device, arrays[0])
            result = call.compute(
                direction,
                Source(arrays[0]),
                Source(arrays[1], conjugate=direction != "forward"),
                out=None if out is None else _array(out),
                bias=None if b is None else arrays[2],
            )
            return _tensor(result) if out is None else out

    def _empty(self, role: Role, dtype: torch.dtype, device: torch.device, like: Array) -> Tensor:
        """Return an empty tensor for the result; x and y have the memory order of the array ``like``."""
        geometry = self.geometry
        shape = geometry.shape_of(role)
        if role == "w" or not has_channels_last_memory(like.shape, like.strides, like.dtype.itemsize, geometry):
            return torch.empty(shape, dtype=dtype, device=device)
        channel = len(geometry.batch)
        memory = torch.empty((*shape[:channel], *shape[channel + 1 :], shape[channel]), device="meta")
        # Not a view, because PyTorch would not let the user modify a view in place.
        return torch.empty_strided(shape, memory.movedim(-1, channel).stride(), dtype=dtype, device=device)

    def bias_grad(self, gradient: Tensor) -> Tensor:
        """Return the sum over all axes except that of the channels."""
        axis = gradient.ndim - 1 if self.geometry.layout == "channels_last" else len(self.geometry.batch)
        return gradient.sum([other for other in range(gradient.ndim) if other != axis])


class _Differentiable(torch.autograd.Function):
    """The autograd function of a direction, of its two operands and b. Each of its gradients is another direction."""

    @staticmethod
    def forward(
        ctx: Any, convolution: _Convolution, direction: Direction, first: Tensor, second: Tensor, b: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(first, second)
        ctx.convolution, ctx.direction, ctx.bias = convolution, direction, None if b is None else b.dtype
        return convolution.computed(direction, first, second, b)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (first, second), convolution, needs = ctx.saved_tensors, ctx.convolution, ctx.needs_input_grad[2:]
        of_first, of_second = {
            "forward": (("data_grad", gradient, second), ("weight_grad", gradient, first)),
            "data_grad": (("forward", gradient, second), ("weight_grad", first, gradient)),
            "weight_grad": (("forward", second, gradient), ("data_grad", first, gradient)),
        }[ctx.direction]
        return (
            *(None, None),
            _cast(convolution.result(*of_first), first.dtype) if needs[0] else None,
            _cast(convolution.result(*of_second), second.dtype) if needs[1] else None,
            _cast(convolution.bias_grad(gradient), ctx.bias) if needs[2] else None,
        )


def _cast(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient with respect to an operand that was promoted."""
    if gradient.is_complex() and not dtype.is_complex:
        gradient = gradient.real
    return gradient.to(dtype)


# Tensors as arrays.


# The dtypes that conv accepts, with their names in gpuconv.
DTYPES = {getattr(torch, name): name for name in dtypes.NAMES}
INTS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _check(**tensors: Tensor | None) -> None:
    """Raise TypeError or ValueError unless the tensors can be viewed as arrays and are on one device."""
    device = None
    for name, tensor in tensors.items():
        if tensor is None and name == "b":
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
        if tensor.layout is not torch.strided or tensor.is_nested or not (tensor.is_cpu or tensor.is_cuda):
            layout = "nested" if tensor.is_nested else tensor.layout
            raise TypeError(f"{name} must be dense and on the CPU or a CUDA device, not {layout} on {tensor.device}")
        if tensor.dtype not in DTYPES:
            hint = f"; {name}.float() converts it" if tensor.dtype in INTS else ""
            raise TypeError(f"{name} must be one of {', '.join(dtypes.NAMES)}, not {tensor.dtype}{hint}")
        if device is not None and tensor.device != device:
            raise ValueError(f"tensors must be on one device, but x is on {device} and {name} on {tensor.device}")
        device = tensor.device


def _has_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd needs to record a function of these tensors, in reverse or forward mode."""
    backwards = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and ((backwards and tensor.requires_grad) or unpack_dual(tensor).tangent is not None):
            return True
    return False


@contextlib.contextmanager
def _on_stream_of(device: torch.device) -> Iterator[None]:
    """Return a context in which CuPy computes on a CUDA device, on PyTorch's current stream there."""
    try:
        import cupy
    except ImportError:
        raise ImportError(f"CUDA tensors need CuPy: {INSTALL_HINT}") from None
    stream = torch.cuda.current_stream(device)
    with cupy.cuda.Device(device.index), cupy.cuda.Stream.from_external(_Stream(stream.cuda_stream)):
        yield


class _Stream(NamedTuple):
    """A stream of PyTorch with the stream protocol of CUDA's libraries, which older versions of PyTorch lack."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        """Return the version of the protocol and the stream."""
        return 0, self.pointer


def _array(tensor: Tensor) -> Array:
    """Return the memory of a tensor as a NumPy or CuPy array; conjugated or negated views are resolved."""
    if tensor.dtype == torch.bfloat16:  # neither NumPy nor CuPy accepts it from other libraries
        return _array(tensor.detach().view(torch.int16)).view(dtypes.named("bfloat16"))
    if tensor.is_cuda:
        import cupy

        return cupy.from_dlpack(tensor.detach().resolve_conj().resolve_neg())
    try:
        return tensor.numpy(force=True)
    except RuntimeError:
        raise TypeError(
            "tensors must own their memory: transforms of torch.func and tracing are not supported"
        ) from None


def _tensor(array: Array) -> Tensor:
    """Return the memory of a NumPy array as a tensor."""
    if array.dtype.kind == "V":  # bfloat16
        return _tensor(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)
