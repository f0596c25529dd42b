"""Compare every case, algorithm, direction, dtype, layout and backend with the float64 reference."""

import functools
import zlib

import numpy as np
import pytest

import gpuconv
from gpuconv.geometry import Geometry
from gpuconv.select import TRANSFORMS
from tests import reference, tiers
from tests.backends import BACKENDS, CupyArrays, NumpyArrays
from tests.cases import (
    CASES,
    DIRECTIONS,
    DTYPES,
    LAYOUTS,
    channels_first,
    compiles_little,
    draw,
    is_taken,
    laid_out,
    named_dtype,
)
from tests.tiers import combinations
from tests.tolerances import assert_within, bound_of

BY_NAME = {case.name: case for case in CASES}


@functools.cache
def data(name, dtype, integers):
    """Return x, w and dy of a case in the wide dtype of the reference."""
    case = BY_NAME[name]
    rng = np.random.default_rng(zlib.crc32(f"{name} {dtype} {integers}".encode()))
    outputs = [
        reference.output_extent(n, k, s, d, *p)
        for n, k, s, d, p in zip(case.x[2:], case.w[2:], case.stride, case.dilation, case.padding, strict=True)
    ]
    shapes = case.x, case.w, (case.x[0], case.w[0], *outputs)
    return tuple(draw(rng, shape, dtype, integers) for shape in shapes)


@functools.cache
def exact(name, dtype, direction, integers, magnitudes=False):
    """Return the exact result of a direction; with ``magnitudes``, that for absolute values."""
    case = BY_NAME[name]
    x, w, dy = data(name, dtype, integers)
    if magnitudes:
        x, w, dy = np.abs(x), np.abs(w), np.abs(dy)
    if direction == "forward":
        return reference.forward(x, w, **case.settings)
    if direction == "data_grad":
        return reference.data_grad(dy, w, case.x, **case.settings)
    return reference.weight_grad(dy, x, case.w, **case.settings)


def computed(arrays, case, algorithm, direction, dtype, layout, integers):
    """Return the result of a direction as a channels_first NumPy array, and as the backend returned it."""
    axes = "channels_last" if layout == "channels_last" else "channels_first"
    geometry = {**case.settings, "layout": axes, "algorithm": algorithm}
    x, w, dy = (
        arrays.asarray(laid_out(array.astype(named_dtype(dtype)), layout, role))
        for array, role in zip(data(case.name, dtype, integers), ("x", "w", "x"), strict=True)
    )
    if direction == "forward":
        result = gpuconv.conv(x, w, **geometry)
    elif direction == "data_grad":
        result = gpuconv.conv_data_grad(dy, w, x.shape, **geometry)
    else:
        result = gpuconv.conv_weight_grad(dy, x, w.shape, **geometry)
    assert result.dtype == named_dtype(dtype)
    read = x if direction == "forward" else dy
    if layout == "channels_last_memory" and direction != "weight_grad" and not read.flags.c_contiguous:
        assert result.transpose(0, *range(2, len(result.shape)), 1).flags.c_contiguous
    else:
        assert result.flags.c_contiguous
    return channels_first(arrays.asnumpy(result), layout, "w" if direction == "weight_grad" else "x")


def is_tested(arrays, algorithm, dtype, **one):
    """In a plain run, most cases use two dtypes of algorithms with many kernels on the CPU, and none on a GPU."""
    if not is_taken(arrays=arrays, algorithm=algorithm, dtype=dtype, **one):
        return False
    if tiers.full or arrays == "numpy" or compiles_little(algorithm=algorithm, arrays=arrays, **one):
        return True
    return arrays == "emulated" and dtype in ("float16", "float32")


@combinations(
    arrays=BACKENDS,
    case=CASES,
    algorithm=gpuconv.ALGORITHMS,
    direction=DIRECTIONS,
    dtype=DTYPES,
    layout=LAYOUTS,
    where=is_tested,
    turns=("dtype", "layout"),
)
def test_result_is_right(case, algorithm, direction, dtype, layout, arrays):
    """Small integers are exact (rounded once in half precision) except by transforms; others are within the bound."""
    assert_right(arrays, case, algorithm, direction, dtype, layout)


def assert_right(arrays, case, algorithm, direction, dtype, layout):
    integers = computed(arrays, case, algorithm, direction, dtype, layout, integers=True)
    with arrays.varied(wide=algorithm not in ("implicit_gemm", "depthwise") or dtype == "float32"):
        result = computed(arrays, case, algorithm, direction, dtype, layout, integers=False)
    exactly = exact(case.name, dtype, direction, True)
    if algorithm in TRANSFORMS:
        assert_within(integers, exactly, bound(case, algorithm, direction, dtype, True))
    else:
        np.testing.assert_array_equal(integers, exactly.astype(named_dtype(dtype)))
    assert_within(result, exact(case.name, dtype, direction, False), bound(case, algorithm, direction, dtype, False))


def bound(case, algorithm, direction, dtype, integers):
    terms = Geometry.infer(case.x, case.w, **case.settings).reduction_length(direction)
    both = (exact(case.name, dtype, direction, integers, magnitudes) for magnitudes in (False, True))
    return bound_of(algorithm, *both, terms, dtype)


@pytest.mark.gpu
@combinations(
    case=CASES,
    algorithm=gpuconv.ALGORITHMS,
    direction=DIRECTIONS,
    dtype=DTYPES,
    where=lambda **one: is_taken(arrays="cupy", **one),
    turns=("algorithm", "direction", "dtype"),
)
def test_gpu_agrees_with_cpu(case, algorithm, direction, dtype):
    """Each is within the bound of the exact result, so their difference is within twice the bound."""
    cupy, numpy = CupyArrays(), NumpyArrays()
    on_gpu = computed(cupy, case, algorithm, direction, dtype, "channels_first", integers=False)
    on_cpu = computed(numpy, case, "im2col", direction, dtype, "channels_first", integers=False)
    exactly = exact(case.name, dtype, direction, False)
    assert_within(on_gpu, on_cpu.astype(exactly.dtype), 2 * bound(case, algorithm, direction, dtype, False))
