"""Types of the arguments of public functions, for editors and type checkers: names, settings, arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, SupportsIndex, TypeAlias, TypeVar

import numpy

Layout: TypeAlias = Literal["channels_first", "channels_last"]
PaddingName: TypeAlias = Literal["valid", "same", "same_lower", "full", "causal"]
PaddingMode: TypeAlias = Literal["zeros", "circular", "reflect", "replicate"]
Direction: TypeAlias = Literal["forward", "data_grad", "weight_grad"]
Activation: TypeAlias = Literal["relu", "leaky_relu", "sigmoid", "tanh"]
Algorithm: TypeAlias = Literal["auto", "im2col", "winograd", "fft", "depthwise", "implicit_gemm", "scatter", "direct"]
Precision: TypeAlias = Literal["ieee", "tf32", "tf32x3"]
BackendName: TypeAlias = Literal["auto", "numpy", "cupy"]
DtypeName: TypeAlias = Literal["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
GradientName: TypeAlias = Literal["dx", "dw", "db"]

PerAxis: TypeAlias = SupportsIndex | Sequence[SupportsIndex]
Padding: TypeAlias = PaddingName | SupportsIndex | Sequence[SupportsIndex | Sequence[SupportsIndex]]
DtypeLike: TypeAlias = DtypeName | numpy.dtype[Any] | type[Any]


class AnyArray(Protocol):
    """Protocol of numpy.ndarray and cupy.ndarray, which tensors and lists do not satisfy."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def strides(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...


# The array type of a call: its arguments and its result are all of NumPy or all of CuPy.
A = TypeVar("A", bound=AnyArray)
