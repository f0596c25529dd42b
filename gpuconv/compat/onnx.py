"""ONNX's operators Conv and ConvTranspose, for the reference evaluator of the package onnx.

The evaluator computes a model on NumPy arrays, to check an export or to look at intermediate results. It takes other
implementations of operators as ``new_ops``::

    from onnx.reference import ReferenceEvaluator
    from gpuconv.compat.onnx import OPS

    (y,) = ReferenceEvaluator("model.onnx", new_ops=OPS).run(None, {"x": x})

OPS has both operators, for every version of the operator set (Conv and ConvTranspose 1, 11 and 22), with every
attribute, any number of spatial axes up to 28, and the dtypes float16, bfloat16, float32 and float64.

Examples
--------
>>> import numpy
>>> from onnx import parser
>>> from onnx.reference import ReferenceEvaluator
>>> model = parser.parse_model('''
...     <ir_version: 8, opset_import: ["" : 17]>
...     edges (float[1, 1, N] x, float[1, 1, 3] w) => (float[1, 1, M] y) { y = Conv <auto_pad = "SAME_UPPER"> (x, w) }
... ''')
>>> x, w = numpy.array([[[1, 2, 4, 8]]], "float32"), numpy.array([[[-1, 0, 1]]], "float32")
>>> ReferenceEvaluator(model, new_ops=OPS).run(None, {"x": x, "w": w})
[array([[[ 2.,  3.,  6., -4.]]], dtype=float32)]

Notes
-----
The evaluator has NumPy arrays only. With ``GPUCONV_BACKEND=cupy``, or inside ``with gpuconv.backend("cupy")``, the two
operators compute on the GPU and return NumPy arrays.

The evaluator does not use ``new_ops`` inside functions of a model; ``onnx.inliner.inline_local_functions`` replaces
calls of these functions by their nodes. A TypeError of an operator is the cause of one that the evaluator raises.

All versions of an operator are computed in one way. Where ONNX's text is not clear, or the evaluator's own operators
differ from it, this is the way of onnxruntime 1.32:

- ConvTranspose splits an odd total padding as of version 11, since version 1 contradicts itself.
- With output_shape, pads are ignored, and NOTSET and VALID split the total padding as SAME_LOWER does.
- An output_shape may exceed the unpadded result by less than the stride. What is added at the end is zero, or B.
- Negative pads, and pads beside an auto_pad other than NOTSET, are refused.

In two cases onnxruntime 1.32 differs from the text or from the evaluator, and this module does not. If a stride is
larger than the kernel, SAME_UPPER and SAME_LOWER never crop the input of Conv, and they give ConvTranspose the extents
``input * stride``, with what is missing added at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy

import gpuconv
from gpuconv import dtypes
from gpuconv.arguments import Pairs, Shape, per_axis
from gpuconv.compat import named
from gpuconv.types import PaddingName
from gpuconv.validate import checked, given

try:
    from onnx.reference.op_run import OpRun
except ImportError:
    raise ImportError("gpuconv.compat.onnx needs onnx: pip install 'gpuconv[onnx]'") from None

Ints: TypeAlias = Sequence[int]

# auto_pad, and the padding of gpuconv that has its meaning; pads have that of NOTSET.
PADDINGS: dict[str, PaddingName | None] = {
    "NOTSET": None,
    "VALID": "valid",
    "SAME_UPPER": "same",
    "SAME_LOWER": "same_lower",
}
NAMES = {
    "x": "X", "w": "W", "b": "B", "y": "Y",
    "stride": "strides", "padding": "pads", "dilation": "dilations", "groups": "group",
}  # fmt: skip


class Conv(OpRun):
    """The operator Conv: :func:`gpuconv.conv` with the attributes of ONNX."""

    op_domain = ""

    def _run(
        self,
        X: numpy.ndarray,  # noqa: N803
        W: numpy.ndarray,  # noqa: N803
        B: numpy.ndarray | None = None,  # noqa: N803
        **attributes: Any,
    ) -> tuple[numpy.ndarray]:
        """Return Y (N, M, *output), of X (N, C, *spatial), W (M, C / group, *kernel) and B (M,)."""
        node = Attributes(**attributes)
        node.check(X, W, B)
        padding = PADDINGS[node.auto_pad] or node.explicit_padding(W.ndim - 2)
        with named(**NAMES):
            return (gpuconv.conv(X, W, B, padding=padding, **node.settings(W.ndim - 2)),)


class ConvTranspose(OpRun):
    """The operator ConvTranspose: :func:`gpuconv.conv_transpose` with the attributes of ONNX."""

    op_domain = ""

    def _run(
        self,
        X: numpy.ndarray,  # noqa: N803
        W: numpy.ndarray,  # noqa: N803
        B: numpy.ndarray | None = None,  # noqa: N803
        **attributes: Any,
    ) -> tuple[numpy.ndarray]:
        """Return Y (N, M, *output), of X (N, C, *spatial), W (C, M / group, *kernel) and B (M,)."""
        node = Attributes(**attributes)
        node.check(X, W, B)
        extra = per_axis(node.output_padding or 0, W.ndim - 2, "output_padding", minimum=0)
        padding = node.padding_of_extents(X.shape[2:], W.shape[2:], extra) or node.explicit_padding(W.ndim - 2)
        with named(**NAMES):
            settings = node.settings(W.ndim - 2)
            return (gpuconv.conv_transpose(X, W, B, padding=padding, output_padding=extra, **settings),)


OPS: list[type[OpRun]] = [Conv, ConvTranspose]


class Attributes(NamedTuple):
    """The attributes of a node of either operator. What a model does not set has the default or is None."""

    auto_pad: str = "NOTSET"
    dilations: Ints | None = None
    group: int = 1
    kernel_shape: Ints | None = None
    output_padding: Ints | None = None
    output_shape: Ints | None = None
    pads: Ints | None = None
    strides: Ints | None = None

    def check(self, X: numpy.ndarray, W: numpy.ndarray, B: numpy.ndarray | None) -> None:  # noqa: N803
        """Raise TypeError or ValueError for what ONNX does not permit and gpuconv would compute."""
        arrays = {"X": X, "W": W, **given(B=B)}
        _, dtype = checked(**arrays)
        if dtypes.is_complex(dtype) or any(array.dtype.name != dtype.name for array in arrays.values()):
            found = ", ".join(f"{name} {array.dtype.name}" for name, array in arrays.items())
            raise TypeError(f"X, W and B must have the same dtype: float16, bfloat16, float32 or float64 ({found})")
        if X.ndim != W.ndim or W.ndim < 3:
            raise ValueError(f"X and W must have equally many axes, at least 3 (X {X.shape}, W {W.shape})")
        if self.kernel_shape and tuple(self.kernel_shape) != W.shape[2:]:
            raise ValueError(f"kernel_shape must be that of W, {W.shape[2:]}, but it is {tuple(self.kernel_shape)}")
        if self.auto_pad not in PADDINGS:
            raise ValueError(f"auto_pad must be one of {', '.join(PADDINGS)}; got {self.auto_pad!r}")
        if self.pads and self.auto_pad != "NOTSET":
            raise ValueError(f"pads must be absent beside auto_pad={self.auto_pad!r}, got {list(self.pads)}")

    def settings(self, rank: int) -> dict[str, Any]:
        """Return the settings of gpuconv that both operators have."""
        return {
            "stride": per_axis(self.strides or 1, rank, "strides", minimum=1),
            "dilation": per_axis(self.dilations or 1, rank, "dilations", minimum=1),
            "groups": self.group,
        }

    def explicit_padding(self, rank: int) -> Pairs:
        """Return pads, the starts on all axes and then the ends, as one pair for each axis."""
        pads = tuple(self.pads or (0,) * 2 * rank)
        if len(pads) != 2 * rank:
            raise ValueError(f"pads must have a start and an end for each of {rank} spatial axes, got {list(pads)}")
        if min(pads) < 0:
            raise ValueError(f"pads must be at least 0, got {list(pads)}")
        return tuple(zip(pads[:rank], pads[rank:], strict=True))

    def padding_of_extents(self, extents: Shape, kernel: Shape, extra: Shape) -> Pairs | None:
        """Return the padding of a transposed convolution if output_shape or auto_pad set the extents of the result."""
        if not self.output_shape and not self.auto_pad.startswith("SAME"):
            return None
        stride, dilation, _ = self.settings(len(kernel)).values()
        wanted: Ints = tuple(n * s for n, s in zip(extents, stride, strict=True))
        if self.output_shape:
            wanted = per_axis(self.output_shape, len(kernel), "output_shape", minimum=1)
        pairs = []
        for axis, (size, n, k, s, d) in enumerate(zip(wanted, extents, kernel, stride, dilation, strict=True)):
            unpadded = s * (n - 1) + d * (k - 1) + 1
            if size >= unpadded + s:
                raise ValueError(
                    f"output_shape must be less than {unpadded + s} on spatial axis {axis}, where the unpadded result"
                    f" has {unpadded} elements and less than the stride {s} may be appended; got {size}"
                )
            pairs.append(_split(unpadded + extra[axis] - size, self.auto_pad))
        return tuple(pairs)


def _split(total: int, auto_pad: str) -> tuple[int, int]:
    """Return the start and the end of a total padding; a negative one appends elements at the end."""
    if total < 0:
        return 0, total
    if auto_pad == "SAME_UPPER":
        return total // 2, total - total // 2
    return total - total // 2, total // 2
