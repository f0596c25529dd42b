"""PyTorch: oneDNN on the CPU; on a GPU cuDNN with ``benchmark=True``, and TF32 only if it is requested.

On a GPU it reads the same memory as gpuconv, through DLPack, on the same stream.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import torch

from gpuconv.benchmark.problem import Problem
from gpuconv.types import Direction

FORMS = ("channels_first", "channels_last")


def about() -> str:
    """Return the version of PyTorch and, if available, that of cuDNN."""
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return f"PyTorch {torch.__version__}" + (f", cuDNN {cudnn}" if cudnn else "")


def why_not(problem: Problem, direction: Direction, form: str) -> str | None:
    """Return why PyTorch cannot compute a problem, or None; its channels_last needs two or three spatial axes."""
    if problem.geometry.rank > 3:
        return "PyTorch convolves one to three axes"
    if problem.transposed and not _symmetric(problem):
        return "PyTorch pads a transposed convolution by the same on both sides"
    if problem.geometry.rank == 1 and form == "channels_last":
        return "PyTorch has no channels_last for one spatial axis"
    return None


def call(problem: Problem, direction: Direction, form: str) -> Callable[[], Any]:
    """Return the operator behind torch.conv or one of its gradients, on tensors in a memory format."""
    if problem.xp is not numpy:
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = problem.precision == "tf32"
        torch.cuda.set_stream(torch.cuda.ExternalStream(problem.xp.cuda.get_current_stream().ptr))
    x, w, dy = (_tensor(array, form) for array in (problem.x, problem.w, problem.dy))
    geometry, extra = problem.geometry, _output_padding(problem)
    same = _symmetric(problem)
    padding = [low for low, _ in geometry.padding] if same else [0] * geometry.rank
    around = [] if same else [end for pair in reversed(geometry.padding) for end in pair]
    options = [list(geometry.stride), padding, list(geometry.dilation), problem.transposed, extra, geometry.groups]

    def padded() -> Any:
        return torch.nn.functional.pad(x, around) if around else x

    def forward() -> Any:
        if problem.transposed:
            stride, low, dilation, _, more, groups = options
            return getattr(torch, f"conv_transpose{geometry.rank}d")(x, w, None, stride, low, more, groups, dilation)
        return getattr(torch, f"conv{geometry.rank}d")(padded(), w, None, *options[:3], geometry.groups)

    if direction == "forward":
        return forward
    if problem.dtype.kind == "c":  # no operator computes the gradients of complex convolutions; autograd does
        target = (x if direction == "data_grad" else w).requires_grad_()
        y = forward()
        return lambda: torch.autograd.grad(y, target, dy, retain_graph=True)[0]
    if direction == "weight_grad":
        return lambda: torch.ops.aten.convolution_backward(dy, padded(), w, None, *options, [False, True, False])[1]
    wide = padded()
    inside = (..., *(slice(low, low + n) for (low, _), n in zip(geometry.padding, geometry.input, strict=True)))

    def data_grad() -> Any:
        dx = torch.ops.aten.convolution_backward(dy, wide, w, None, *options, [True, False, False])[0]
        return dx[inside] if around else dx

    return data_grad


def _output_padding(problem: Problem) -> list[int]:
    return list(problem.settings["output_padding"]) if problem.transposed else [0] * problem.geometry.rank


def _symmetric(problem: Problem) -> bool:
    pairs = zip(problem.geometry.padding, _output_padding(problem), strict=True)
    return all(low == high + extra and low >= 0 for (low, high), extra in pairs)


def array(result: Any, problem: Problem) -> Any:
    """Return the result as an array of the problem's array module."""
    result = result.detach().contiguous()
    if problem.xp is not numpy:
        whole = result.view(torch.int16) if result.dtype == torch.bfloat16 else result
        return problem.xp.from_dlpack(whole).view(problem.dtype)
    return result.float().numpy() if result.dtype == torch.bfloat16 else result.numpy()


def _tensor(array: Any, form: str) -> Any:
    if array.dtype.name == "bfloat16":
        tensor = torch.from_dlpack(array.view(numpy.int16)).view(torch.bfloat16)
    else:
        tensor = torch.from_dlpack(array)
    if form == "channels_last":
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return tensor.contiguous(memory_format=formats[tensor.ndim])
    return tensor
