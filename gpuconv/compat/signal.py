"""The functions convolve, correlate, convolve2d and correlate2d of scipy.signal, with their arguments and results.

Existing code changes one import::

    from gpuconv.compat.signal import convolve  # was: from scipy.signal import convolve

Arrays are of NumPy or CuPy; lists and numbers become arrays of NumPy, or of CuPy next to one of CuPy. SciPy is not
needed; if it is installed, its transforms are used. The dtype of a result is NumPy's ``result_type``. What differs from
SciPy:

* Integers are exact with every method, modulo 2 to the number of bits. Booleans (a logical "or" of "and") and float16
  are accepted with any number of axes.
* ``method="fft"`` and "auto" confine NaN and Inf to the results that they reach, without a warning.
* The two-dimensional functions may use transforms, whose errors are relative to the largest result.
* Empty arrays are refused, except an empty in1 with ``mode="same"``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy

import gpuconv
from gpuconv import dtypes, settings, threads
from gpuconv.arrays import Array, kind_of, module_of, moved
from gpuconv.backends import backend_for
from gpuconv.cpu import fft
from gpuconv.types import Algorithm

Mode: TypeAlias = Literal["full", "same", "valid"]
Method: TypeAlias = Literal["auto", "direct", "fft"]
Boundary: TypeAlias = Literal["fill", "pad", "wrap", "circular", "symm", "symmetric"]
Parts: TypeAlias = list[tuple[int, int]]  # for each axis the first element and the number of elements
Pads: TypeAlias = list[tuple[int, int]]

MODES, METHODS = ("full", "same", "valid"), ("auto", "direct", "fft")
BOUNDARIES = {
    "fill": "fill", "pad": "fill", "wrap": "wrap", "circular": "wrap", "symm": "symmetric", "symmetric": "symmetric",
}  # fmt: skip

EXACT = 2.0**45  # sums of products below this are exact when rounded, even if computed by transforms in float64
COPIES = 5  # arrays of the padded extents that a convolution by transforms allocates
LONGEST = 1 << 16  # a 1-D transform; longer signals are faster in tiles, which the caches hold
FEW_TAPS, FEW_PRODUCTS = 11, 1 << 16  # up to which numpy.convolve is the fastest; it has a loop for 11 taps
SMALL = 1 << 19  # elements, of which one thread computes the transform
MOST_TAPS = 500  # of a direct convolution on a GPU: an estimate from the traffic of transforms

# Nanoseconds on NumPy, measured on two cores: a call of gpuconv.conv; a product, for each byte of an element; the same
# of numpy.convolve, and an output; a call of transforms; n log2(n) of a transform in 1-D, and else for each byte.
CONV_CALL, CONV_PRODUCT, CONVOLVE_PRODUCT, CONVOLVE_OUTPUT = 45e3, 0.04, 0.02, 4.0
FFT_CALL, FFT_LINE, FFT_BYTE = 60e3, 1.2, 0.14


def convolve(in1: Any, in2: Any, mode: Mode = "full", method: Method = "auto") -> Array:
    """Convolve two N-dimensional arrays, as scipy.signal.convolve does.

    Parameters
    ----------
    in1, in2 : array_like of N dimensions
        Arrays of one kind, real or complex, floating-point, integer or boolean. They are never modified.
    mode : {"full", "same", "valid"}, default "full"
        Part of the convolution that is returned: all of it, extents n1 + n2 - 1; its centre with the shape of `in1`;
        or what needs no zeros around the larger array, which must be as large as the other on every axis.
    method : {"auto", "direct", "fft"}, default "auto"
        Sums of products, products of transforms, or the one with the smaller estimated time.

    Returns
    -------
    array
        Convolution, in the common dtype of the arguments. Two numbers give their product.

    Raises
    ------
    ValueError
        If the numbers of dimensions differ, an array is empty, a value is not permitted, or with ``mode="valid"`` no
        array is as large as the other on every axis.
    TypeError
        If arrays of NumPy and CuPy are mixed.

    See Also
    --------
    gpuconv.conv : Convolution with channels, filters and strides.

    Examples
    --------
    >>> convolve([1, 2, 3], [0, 1, 0.5])
    array([0. , 1. , 2.5, 4. , 1.5])
    >>> convolve([1, 2, 3], [0, 1, 0.5], mode="same")
    array([1. , 2.5, 4. ])
    """
    in1, in2 = _arrays(in1, in2)
    if in1.ndim == in2.ndim == 0:
        return in1 * in2
    return _convolved(in1, in2, mode, method, _parts(in1, in2, mode))


def correlate(in1: Any, in2: Any, mode: Mode = "full", method: Method = "auto") -> Array:
    """Cross-correlate two N-dimensional arrays, as scipy.signal.correlate does.

    Parameters
    ----------
    in1, in2, mode, method
        As in :func:`convolve`.

    Returns
    -------
    array
        Convolution of `in1` with the conjugate of the reversed `in2`.

    Raises
    ------
    ValueError, TypeError
        As in :func:`convolve`.

    Examples
    --------
    >>> correlate([1, 2, 3], [0, 1, 0.5])
    array([0.5, 2. , 3.5, 3. , 0. ])
    """
    in1, in2 = _arrays(in1, in2)
    in2 = _reversed(in2).conj()
    if in1.ndim == in2.ndim == 0:
        return in1 * in2
    return _convolved(in1, in2, mode, method, _parts(in1, in2, mode))


def convolve2d(in1: Any, in2: Any, mode: Mode = "full", boundary: Boundary = "fill", fillvalue: complex = 0) -> Array:
    """Convolve two 2-dimensional arrays, as scipy.signal.convolve2d does.

    Parameters
    ----------
    in1, in2 : array_like of 2 dimensions
        As in :func:`convolve`.
    mode : {"full", "same", "valid"}, default "full"
        As in :func:`convolve`.
    boundary : {"fill", "wrap", "symm"}, default "fill"
        What surrounds `in1`: `fillvalue`, its periodic repetition, or its reflection, in which the edge occurs twice.
        "pad", "circular" and "symmetric" are other names of these.
    fillvalue : scalar, default 0
        Value around `in1`, converted to the dtype of the result.

    Returns
    -------
    array of 2 dimensions
        Convolution, in the common dtype of the arguments.

    Raises
    ------
    ValueError, TypeError
        As in :func:`convolve`.

    Examples
    --------
    >>> convolve2d([[1, 2], [3, 4]], [[1, 1]], boundary="wrap")
    array([[3, 3, 3],
           [7, 7, 7]])
    """
    in1, in2 = _images(in1, in2)
    return _bounded(in1, in2, mode, _parts(in1, in2, mode), boundary, fillvalue)


def correlate2d(in1: Any, in2: Any, mode: Mode = "full", boundary: Boundary = "fill", fillvalue: complex = 0) -> Array:
    """Cross-correlate two 2-dimensional arrays, as scipy.signal.correlate2d does.

    Parameters
    ----------
    in1, in2, mode, boundary, fillvalue
        As in :func:`convolve2d`.

    Returns
    -------
    array of 2 dimensions
        Convolution of `in1` with the conjugate of the reversed `in2`. For an even extent of `in2`, ``mode="same"``
        returns the part that begins one element later than that of :func:`correlate`. If ``mode="valid"`` and `in2` is
        the larger one, `in1` is conjugated instead. Both are as in SciPy.

    Raises
    ------
    ValueError, TypeError
        As in :func:`convolve`.

    Examples
    --------
    >>> correlate2d([[1, 2], [3, 4]], [[1, 10]], mode="same")
    array([[21,  2],
           [43,  4]])
    """
    in1, in2 = _images(in1, in2)
    in2 = _reversed(in2)
    parts = _parts(in1, in2, mode)
    if mode == "same":
        parts = [(k // 2, length) for k, (_, length) in zip(in2.shape, parts, strict=True)]
    if mode == "valid" and in1.size < in2.size:
        in1 = in1.conj()
    else:
        in2 = in2.conj()
    return _bounded(in1, in2, mode, parts, boundary, fillvalue)


# --------------------------------------------------------------------------------------------- arguments


def _arrays(in1: Any, in2: Any) -> tuple[Array, Array]:
    """Return the arguments as arrays of one kind."""
    cupy = sys.modules.get("cupy")
    if cupy is None or not any(isinstance(a, cupy.ndarray) for a in (in1, in2)):
        return numpy.asarray(in1), numpy.asarray(in2)
    in1, in2 = (a if isinstance(a, numpy.ndarray) else cupy.asarray(a) for a in (in1, in2))
    kind_of(in1=in1, in2=in2)
    return in1, in2


def _images(in1: Any, in2: Any) -> tuple[Array, Array]:
    in1, in2 = _arrays(in1, in2)
    if not in1.ndim == in2.ndim == 2:
        raise ValueError(f"in1 and in2 must have 2 dimensions, but their shapes are {in1.shape} and {in2.shape}")
    return in1, in2


def _reversed(array: Array) -> Array:
    return array[(slice(None, None, -1),) * array.ndim]


def _parts(in1: Array, in2: Array, mode: str) -> Parts:
    """Return for each axis the first element of the full convolution that a mode returns, and how many it returns."""
    if in1.ndim != in2.ndim:
        raise ValueError(
            f"in1 and in2 must have the same number of dimensions, but their shapes are {in1.shape} and {in2.shape}"
        )
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
    if not in2.size or (not in1.size and mode != "same"):
        raise ValueError(f"in1 and in2 must not be empty, but their shapes are {in1.shape} and {in2.shape}")
    axes = list(zip(in1.shape, in2.shape, strict=True))
    if mode == "full":
        return [(0, n + k - 1) for n, k in axes]
    if mode == "same":
        return [((k - 1) // 2, n) for n, k in axes]
    if not all(n >= k for n, k in axes) and not all(n <= k for n, k in axes):
        raise ValueError(
            "with mode='valid' one of in1 and in2 must be as large as the other on every axis, but their shapes are"
            f" {in1.shape} and {in2.shape}"
        )
    return [(min(axis) - 1, abs(axis[0] - axis[1]) + 1) for axis in axes]


# ------------------------------------------------------------------------------------------ the boundary


def _bounded(in1: Array, in2: Array, mode: str, parts: Parts, boundary: str, fillvalue: complex) -> Array:
    """Compute a part of a convolution for which in1 continues beyond its boundary."""
    if boundary not in BOUNDARIES:
        raise ValueError(f"boundary must be one of {', '.join(BOUNDARIES)}; got {boundary!r}")
    if numpy.size(fillvalue) != 1:
        raise ValueError(f"fillvalue must be one number, got {fillvalue!r}")
    kind = BOUNDARIES[boundary]
    if mode != "valid" and in1.size and (kind != "fill" or numpy.any(fillvalue)):
        in1 = in1.astype(numpy.result_type(in1, in2), copy=False)
        in1 = _extended(in1, _padding(in1, in2, parts), kind, fillvalue)
        mode, parts = "valid", [(k - 1, length) for k, (_, length) in zip(in2.shape, parts, strict=True)]
    return _convolved(in1, in2, mode, "auto", parts)


def _extended(image: Array, pads: Pads, kind: str, fillvalue: complex) -> Array:
    """Return an image with elements beyond its boundary, of any number."""
    xp = module_of(kind_of(in1=image))
    if kind == "fill":
        return xp.pad(image, pads, constant_values=numpy.asarray(fillvalue).astype(image.dtype).reshape(())[()])
    for axis, (low, high) in enumerate(pads):
        n = image.shape[axis]
        places = xp.arange(-low, n + high) % (n if kind == "wrap" else 2 * n)
        image = image.take(xp.minimum(places, 2 * n - 1 - places) if kind == "symmetric" else places, axis)
    return image


# ------------------------------------------------------------------------------------------- convolutions


def _convolved(in1: Array, in2: Array, mode: str, method: str, parts: Parts) -> Array:
    """Compute a part of a convolution, on the backend in force."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    kind = kind_of(in1=in1, in2=in2)
    backend = backend_for(kind)
    in1, in2 = moved(in1, backend.kind), moved(in2, backend.kind)
    x, w = (in1, in2) if in1.size >= in2.size else (in2, in1)
    dtype = numpy.result_type(in1.dtype, in2.dtype)
    if not in1.size:
        return moved(backend.xp.empty(in1.shape, dtype), kind)
    is_line = backend.kind == "numpy" and x.ndim == 1 and method != "fft" and (mode != "same" or x is in1)
    is_short = is_line and (w.size <= FEW_TAPS or x.size * w.size <= FEW_PRODUCTS)
    way = None if is_short else _fastest(x, w, dtype, method, is_line)
    if way is None:
        return moved(numpy.convolve(in1, in2, mode), kind)  # type: ignore[call-overload]
    padding = _padding(x, w, parts)
    if dtypes.supported(dtype):
        y = way(x.astype(dtype, copy=False), w.astype(dtype, copy=False), padding)
    elif dtype.kind in "biu" and _largest(x) * _largest(w) * w.size < EXACT:
        y = backend.xp.rint(way(x.astype(float), w.astype(float), padding)).astype(numpy.int64)
    else:
        y = _by_taps(x.astype(dtype, copy=False), w.astype(dtype, copy=False), padding)
    return moved(y.astype(dtype, copy=False), kind)


def _fastest(x: Array, w: Array, dtype: numpy.dtype, method: str, is_line: bool) -> Callable[..., Array] | None:
    """Return the function with the smallest estimated time, None for numpy.convolve."""
    if method == "fft":
        return _by_transforms
    if not isinstance(x, numpy.ndarray):
        return _by_transforms if method == "auto" and w.size > MOST_TAPS else _direct
    products = x.size * w.size * dtype.itemsize
    real_ones = 2 if dtype.kind == "c" else 1  # a complex product consists of four, of half the size
    times: dict[Callable[..., Array] | None, float] = {_direct: CONV_CALL + CONV_PRODUCT * products * real_ones}
    if is_line:
        times[None] = (CONVOLVE_OUTPUT * x.size + CONVOLVE_PRODUCT * products) * real_ones
    if method == "auto":
        size = math.prod(_smooth(x, w))
        step = FFT_LINE if x.ndim == 1 else FFT_BYTE * dtype.itemsize
        times[_by_transforms] = FFT_CALL + step * size * math.log2(size)
    return min(times, key=times.__getitem__)


def _direct(x: Array, w: Array, padding: Pads) -> Array:
    """Compute sums of products."""
    algorithm: Algorithm = "im2col" if isinstance(x, numpy.ndarray) else "auto"  # which has no transforms on a GPU
    return gpuconv.conv(x[None], w[None, None], padding=padding, flip=True, algorithm=algorithm)[0]


def _by_transforms(x: Array, w: Array, padding: Pads) -> Array:
    """Compute products of transforms, of whole arrays if they fit the workspace limit, else in tiles."""
    xp = module_of(kind_of(x=x))
    dtype, extents = dtypes.accumulator(x.dtype), _smooth(x, w)
    size = math.prod(extents)
    is_long = x.ndim == 1 and size > LONGEST and xp is numpy
    if not is_long and COPIES * size * dtype.itemsize <= settings.workspace_limit():
        workers = threads.most(settings.num_threads()) if size > SMALL else 1
        forward, inverse = fft.transforms_of(xp, dtypes.is_complex(dtype), extents, workers)
        with numpy.errstate(over="ignore", invalid="ignore"):
            spectrum = forward(x.astype(dtype, copy=False), s=extents)
            spectrum *= forward(w.astype(dtype, copy=False), s=extents)
            y = inverse(spectrum)
        if xp.isfinite(y[(0,) * y.ndim]):  # else NaN and Inf have spread over the result
            inside = (slice(k - 1 - low, n + high) for n, k, (low, high) in zip(x.shape, w.shape, padding, strict=True))
            return y[tuple(inside)].astype(x.dtype)
    return gpuconv.conv(x[None], w[None, None], padding=padding, flip=True, algorithm="fft")[0]


def _by_taps(x: Array, w: Array, padding: Pads) -> Array:
    """Add up the products of x with one element of w after the other, in the arithmetic of any dtype."""
    axes = list(zip(x.shape, w.shape, padding, strict=True))
    y = module_of(kind_of(x=x)).zeros([n + low + high - k + 1 for n, k, (low, high) in axes], x.dtype)
    for tap in numpy.ndindex(w.shape):
        firsts = [k - 1 - t - low for t, (_, k, (low, _)) in zip(tap, axes, strict=True)]  # which y[0] reads
        bounds = [(max(0, -first), min(m, n - first)) for m, n, first in zip(y.shape, x.shape, firsts, strict=True)]
        outputs = tuple(slice(start, max(start, stop)) for start, stop in bounds)
        inputs = tuple(slice(o.start + first, o.stop + first) for o, first in zip(outputs, firsts, strict=True))
        y[outputs] += x[inputs] * w[tap]
    return y


def _smooth(x: Array, w: Array) -> tuple[int, ...]:
    """Return the extents of transforms that hold the whole convolution."""
    return tuple(fft.smooth(n + k - 1) for n, k in zip(x.shape, w.shape, strict=True))


def _padding(x: Array, w: Array, parts: Parts) -> Pads:
    """Return the zeros before and behind x for which these parts of the convolution with w are "valid"."""
    axes = zip(x.shape, w.shape, parts, strict=True)
    return [(k - 1 - start, start + length - n) for n, k, (start, length) in axes]


def _largest(array: Array) -> int:
    """Return the largest absolute value of integers or booleans."""
    return max(int(array.max()), -int(array.min()))
