"""Supported dtypes, the dtype of a result, and the dtype of sums.

bfloat16 comes from ml_dtypes. NumPy does not know it: its kind is 'V', ``finfo`` and ``einsum`` refuse it, and
``result_type`` has no rule for it. It is recognised by its name, so that ml_dtypes need not be installed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, get_args

import numpy

from gpuconv.types import DtypeName

NAMES: tuple[DtypeName, ...] = get_args(DtypeName)
_HALVES = ("float16", "bfloat16")


@lru_cache(maxsize=256)
def supported(dtype: Any) -> bool:
    """Whether arrays of this dtype are accepted, in any byte order."""
    return str(dtype.name) in NAMES


def named(name: Any, argument: str = "dtype") -> numpy.dtype:
    """Return the dtype that a caller names; TypeError if it is not supported."""
    if isinstance(name, str) and name == "bfloat16":
        try:
            import ml_dtypes
        except ImportError:
            raise TypeError(f"{argument}='bfloat16' needs ml_dtypes (pip install ml_dtypes)") from None
        name = ml_dtypes.bfloat16
    try:
        if name is None:
            raise TypeError
        dtype: numpy.dtype = numpy.dtype(name)
    except TypeError:
        raise TypeError(f"{argument} must be one of {', '.join(NAMES)}; got {name!r}") from None
    if not supported(dtype):
        raise TypeError(f"{argument} must be one of {', '.join(NAMES)}; got {dtype.name}")
    return native(dtype)


def available() -> list[numpy.dtype]:
    """Return all supported dtypes; bfloat16 is among them only if ml_dtypes is installed."""
    found = []
    for name in NAMES:
        try:
            found.append(named(name))
        except TypeError:
            continue
    return found


def native(dtype: numpy.dtype) -> numpy.dtype:
    """Return the dtype in the byte order of the machine."""
    return dtype if dtype.name == "bfloat16" else dtype.newbyteorder("=")


@lru_cache(maxsize=256)
def promoted(*dtypes: numpy.dtype) -> numpy.dtype:
    """Return the dtype of a result: NumPy's ``result_type``, where bfloat16 counts as float32 next to others."""
    kinds = {native(dtype) for dtype in dtypes}
    if len(kinds) == 1:
        return kinds.pop()
    return numpy.result_type(*(numpy.float32 if dtype.name == "bfloat16" else dtype for dtype in kinds))


@lru_cache(maxsize=64)
def accumulator(dtype: numpy.dtype) -> numpy.dtype:
    """Return the dtype in which sums are accumulated: float32 at least."""
    return numpy.dtype(numpy.float32) if dtype.name in _HALVES else dtype


def is_complex(dtype: Any) -> bool:
    return str(dtype.kind) == "c"


def epsilon(dtype: numpy.dtype) -> float:
    """Return the distance from 1 to the next number, for complex dtypes that of the real part."""
    return 2.0**-7 if dtype.name == "bfloat16" else float(numpy.finfo(dtype).eps)
