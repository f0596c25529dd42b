"""The convolutions under PyTorch's autograd, on its CPU and CUDA tensors, without a copy.

    from gpuconv.torch import conv

    y = conv(x, w, b, padding=1)  # x, w and b are tensors
    y.sum().backward()

Each gradient is a convolution itself, so it has gradients in turn. CUDA tensors are computed on PyTorch's current
stream, into memory of PyTorch's allocator. torch.compile leaves the calls as they are: its graph breaks there. Autocast
leaves the dtypes as they are. The transforms of torch.func and forward-mode gradients are refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy

from gpuconv import dtypes
from gpuconv.backend import INSTALL_HINT, Array, Kind
from gpuconv.execute import Call, Source
from gpuconv.geometry import Direction, Geometry
from gpuconv.operands import ROLES, Role, has_channels_last_memory
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
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    layout: str = "channels_first",
    flip: bool = False,
    algorithm: str = "auto",
    precision: str | None = None,
    deterministic: bool | None = None,
) -> Tensor:
    """:func:`gpuconv.conv` of tensors, to be differentiated any number of times.

    Shapes, dtypes, errors and arguments are those of :func:`gpuconv.conv`. The tensors are dense and on one device, the
    CPU or a CUDA device, and so is y; where x has channels_last memory, y has. Gradients of complex tensors are as
    PyTorch has them: the adjoints.

    >>> import torch
    >>> x, w = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2, requires_grad=True)
    >>> conv(x, w).sum().backward()
    >>> w.grad
    tensor([[[[4., 4.],
              [4., 4.]]]])
    """
    geometry = {
        "stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "layout": layout, "flip": flip,
    }  # fmt: skip
    return _called("forward", x, w, b, geometry, algorithm, precision, deterministic)


def conv_transpose(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    layout: str = "channels_first",
    flip: bool = False,
    output_padding: Any = 0,
    algorithm: str = "auto",
    precision: str | None = None,
    deterministic: bool | None = None,
) -> Tensor:
    """:func:`gpuconv.conv_transpose` of tensors, like :func:`conv`.

    >>> import torch
    >>> conv_transpose(torch.ones(1, 1, 2), torch.ones(1, 1, 3), stride=2)
    tensor([[[1., 1., 2., 1., 1.]]])
    """
    geometry = {
        "stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "layout": layout, "flip": flip,
        "output_padding": output_padding,
    }  # fmt: skip
    return _called("data_grad", x, w, b, geometry, algorithm, precision, deterministic)


@torch.compiler.disable
def _called(
    direction: Direction, x: Tensor, w: Tensor, b: Tensor | None, geometry: dict[str, Any], *how: Any
) -> Tensor:
    """The convolution forwards or, transposed, as data_grad."""
    _check(x=x, w=w, b=b)
    infer = Geometry.infer if direction == "forward" else Geometry.infer_transposed
    problem = _Problem(infer(tuple(x.shape), tuple(w.shape), **geometry), *how)
    if direction == "forward":
        check_bias(b, problem.geometry.filters)
    else:
        check_bias(b, problem.geometry.channels)
        w = w.conj_physical() if w.is_complex() else w  # the transpose is the adjoint with that
    return problem.result(direction, x, w, b)


class _Problem(NamedTuple):
    """A convolution and how it is computed: what all its directions have in common."""

    geometry: Geometry
    algorithm: str
    precision: str | None
    deterministic: bool | None

    def result(self, direction: Direction, first: Tensor, second: Tensor, b: Tensor | None = None) -> Tensor:
        """The result of a direction, known to autograd where it has to be: its bookkeeping takes time."""
        if _has_gradients(first, second, b):
            return _Differentiable.apply(self, direction, first, second, b)  # type: ignore[no-any-return]
        return self.computed(direction, first, second, b)

    def computed(self, direction: Direction, first: Tensor, second: Tensor, b: Tensor | None) -> Tensor:
        """The same, unknown to autograd; w and x are conjugated in the gradients."""
        # PyTorch says nothing of numbers that overflow.
        with _on_stream_of(first.device) if first.is_cuda else numpy.errstate(over="ignore", invalid="ignore"):
            arrays = [_array(tensor) for tensor in (first, second, b) if tensor is not None]
            kind: Kind = "cupy" if first.is_cuda else "numpy"
            call = Call.of(self.geometry, kind, dtypes.promoted(*(array.dtype for array in arrays)), *self[1:])
            out = None
            if first.is_cuda:  # in memory of PyTorch's allocator, which knows until when streams use it
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
        """A tensor for the result; x and y in the order in which the array ``like`` lies."""
        geometry = self.geometry
        shape = geometry.shape_of(role)
        if role == "w" or not has_channels_last_memory(like.shape, like.strides, like.dtype.itemsize, geometry):
            return torch.empty(shape, dtype=dtype, device=device)
        channel = len(geometry.batch)
        memory = torch.empty((*shape[:channel], *shape[channel + 1 :], shape[channel]), device="meta")
        # Not a view, which PyTorch would not let its user change in place.
        return torch.empty_strided(shape, memory.movedim(-1, channel).stride(), dtype=dtype, device=device)

    def bias_grad(self, gradient: Tensor) -> Tensor:
        """The sum over all but the channels."""
        axis = gradient.ndim - 1 if self.geometry.layout == "channels_last" else len(self.geometry.batch)
        return gradient.sum([other for other in range(gradient.ndim) if other != axis])


class _Differentiable(torch.autograd.Function):
    """A direction as a function of its two operands and b. Each of its gradients is another direction."""

    @staticmethod
    def forward(
        ctx: Any, problem: _Problem, direction: Direction, first: Tensor, second: Tensor, b: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(first, second)
        ctx.problem, ctx.direction, ctx.bias = problem, direction, None if b is None else b.dtype
        return problem.computed(direction, first, second, b)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (first, second), problem, needs = ctx.saved_tensors, ctx.problem, ctx.needs_input_grad[2:]
        of_first, of_second = {
            "forward": (("data_grad", gradient, second), ("weight_grad", gradient, first)),
            "data_grad": (("forward", gradient, second), ("weight_grad", first, gradient)),
            "weight_grad": (("forward", second, gradient), ("data_grad", first, gradient)),
        }[ctx.direction]
        return (
            *(None, None),
            _cast(problem.result(*of_first), first.dtype) if needs[0] else None,
            _cast(problem.result(*of_second), second.dtype) if needs[1] else None,
            _cast(problem.bias_grad(gradient), ctx.bias) if needs[2] else None,
        )


def _cast(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient in an operand that was promoted."""
    if gradient.is_complex() and not dtype.is_complex:
        gradient = gradient.real
    return gradient.to(dtype)


# Tensors as arrays.


# What conv takes, with the names that gpuconv has for them.
DTYPES = {getattr(torch, name): name for name in dtypes.NAMES}
INTS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _check(**tensors: Tensor | None) -> None:
    """TypeError or ValueError unless these are tensors that arrays can be made of, on one device."""
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
            hint = f"; {name}.float() makes one of it" if tensor.dtype in INTS else ""
            raise TypeError(f"{name} must be one of {', '.join(dtypes.NAMES)}, not {tensor.dtype}{hint}")
        if device is not None and tensor.device != device:
            raise ValueError(f"tensors must be on one device, but x is on {device} and {name} on {tensor.device}")
        device = tensor.device


def _has_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd has to know of a function of these, backwards or forwards."""
    backwards = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and ((backwards and tensor.requires_grad) or unpack_dual(tensor).tangent is not None):
            return True
    return False


@contextlib.contextmanager
def _on_stream_of(device: torch.device) -> Iterator[None]:
    """Has CuPy compute on a CUDA device, in PyTorch's current stream there."""
    try:
        import cupy
    except ImportError:
        raise ImportError(f"CUDA tensors need CuPy: {INSTALL_HINT}") from None
    stream = torch.cuda.current_stream(device)
    with cupy.cuda.Device(device.index), cupy.cuda.Stream.from_external(_Stream(stream.cuda_stream)):
        yield


class _Stream(NamedTuple):
    """A stream of PyTorch by the protocol of CUDA's libraries, which PyTorch's own class has had for a short time."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        """The protocol's version and the stream."""
        return 0, self.pointer


def _array(tensor: Tensor) -> Array:
    """The memory of a tensor as an array of NumPy or CuPy; conjugated or negated views are resolved."""
    if tensor.dtype == torch.bfloat16:  # which neither takes from other libraries
        return _array(tensor.detach().view(torch.int16)).view(dtypes.named("bfloat16"))
    if tensor.is_cuda:
        import cupy

        return cupy.from_dlpack(tensor.detach().resolve_conj().resolve_neg())
    try:
        return tensor.numpy(force=True)
    except RuntimeError:
        raise TypeError("tensors must have memory of their own: no transforms of torch.func, no tracing") from None


def _tensor(array: Array) -> Tensor:
    """The memory of a NumPy array as a tensor."""
    if array.dtype.kind == "V":  # bfloat16
        return _tensor(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)
