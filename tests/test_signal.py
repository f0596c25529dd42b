"""Compare the functions of scipy.signal with SciPy's."""

import re

import numpy as np
import pytest
import scipy.signal
from hypothesis import given
from hypothesis import strategies as st

from gpuconv.arrays import kind_of
from gpuconv.backends import backend
from gpuconv.compat import signal
from tests import backends
from tests.cases import wide
from tests.tiers import combinations
from tests.tolerances import assert_within, bound_of

BACKENDS = [name for name in backends.BACKENDS if name != "emulated"]  # no kernel computes arrays of NumPy
SHAPES = (
    ((9,), (4,)), ((5,), (8,)), ((1,), (1,)), ((300,), (120,)), ((120,), (300,)), ((6, 7), (3, 4)), ((3, 4), (6, 7)),
    ((5, 3), (2, 6)), ((1, 9), (3, 1)), ((40, 36), (17, 20)), ((5, 6, 4), (2, 3, 3)), ((2, 3, 3), (5, 6, 4)),
)  # fmt: skip
DTYPES = (
    ("float64", "float64"), ("float32", "complex64"), ("complex128", "complex128"), ("int32", "int8"),
    ("uint8", "uint8"), ("uint64", "uint64"), ("int64", "float32"), ("bool", "int16"),
)  # fmt: skip


def drawn(rng, shape, dtype):
    """Return small integers; of a signed dtype, they are in part negative."""
    values = rng.integers(-3, 4, shape)
    return (values + 1j * rng.integers(-3, 4, shape) if np.dtype(dtype).kind == "c" else values).astype(dtype)


def is_ordered(sizes, mode):
    """Return whether one of two arrays is as large as the other on every axis, as "valid" requires."""
    first, second = sizes
    return mode != "valid" or all(map(int.__ge__, first, second)) or all(map(int.__le__, first, second))


@combinations(
    arrays=BACKENDS,
    sizes=SHAPES,
    mode=signal.MODES,
    method=signal.METHODS,
    function=["convolve", "correlate"],
    dtypes=DTYPES,
    turns=["arrays", "dtypes", "function", "method"],
    where=lambda sizes, mode, **_: is_ordered(sizes, mode),
)
def test_results_are_those_of_scipy(arrays, sizes, mode, method, function, dtypes, rng):
    in1, in2 = (drawn(rng, shape, dtype) for shape, dtype in zip(sizes, dtypes, strict=True))
    given = arrays.asarray(in1), arrays.asarray(in2)
    expected = getattr(scipy.signal, function)(in1, in2, mode, "direct")
    found = getattr(signal, function)(*given, mode, method)
    assert kind_of(found=found) == kind_of(given=given[0])
    found = arrays.asnumpy(found)
    assert found.dtype == expected.dtype
    if method == "direct" or found.dtype.kind in "iu":
        np.testing.assert_array_equal(found, expected)
    else:
        magnitude = scipy.signal.convolve(abs(in1).astype(float), abs(in2).astype(float), "full", "direct")
        bound = bound_of("fft", expected.astype(wide(found.dtype)), magnitude, 1, found.dtype)
        assert_within(found, expected.astype(wide(found.dtype)), bound)
    for array, before in zip(given, (in1, in2), strict=True):
        np.testing.assert_array_equal(arrays.asnumpy(array), before)


@combinations(
    arrays=BACKENDS,
    sizes=[sizes for sizes in SHAPES if len(sizes[0]) == 2],
    mode=signal.MODES,
    boundary=[("fill", 0), ("pad", 7), ("wrap", 0), ("symm", 5)],
    function=["convolve2d", "correlate2d"],
    dtypes=DTYPES,
    turns=["arrays", "dtypes", "function"],
    where=lambda sizes, mode, **_: is_ordered(sizes, mode),
)
def test_boundaries_are_those_of_scipy(arrays, sizes, mode, boundary, function, dtypes, rng):
    in1, in2 = (drawn(rng, shape, dtype) for shape, dtype in zip(sizes, dtypes, strict=True))
    expected = getattr(scipy.signal, function)(in1, in2, mode, *boundary)
    found = getattr(signal, function)(arrays.asarray(in1), arrays.asarray(in2), mode, *boundary)
    found = arrays.asnumpy(found)
    assert found.dtype == expected.dtype
    sums = np.abs(in1).astype(float).sum() * np.abs(in2).astype(float).max() + 7 * in2.size * 5
    assert_within(found, expected, 1e-7 * sums if found.dtype.kind in "fc" else 0)


def test_correlate2d_is_that_of_scipy_where_it_differs_from_correlate(rng):
    small, large = (drawn(rng, shape, "complex128") for shape in ((2, 3), (4, 6)))
    for mode in signal.MODES:
        expected = scipy.signal.correlate2d(small, large, mode)
        np.testing.assert_array_equal(signal.correlate2d(small, large, mode).round(), expected)


extents = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3)


@given(extents, st.sampled_from(signal.MODES), st.booleans(), st.integers(0, 2**32))
def test_large_integers_are_exact(extents, mode, correlates, seed):
    rng, sizes = np.random.default_rng(seed), tuple(zip(*extents, strict=True))
    if not is_ordered(sizes, mode):
        mode = "same"
    in1, in2 = (rng.integers(-(2**62), 2**62, shape) for shape in sizes)
    name = "correlate" if correlates else "convolve"
    expected = getattr(scipy.signal, name)(in1, in2, mode, "direct")  # modulo 2**64
    for method in signal.METHODS:
        np.testing.assert_array_equal(getattr(signal, name)(in1, in2, mode, method), expected)


def test_integers_overflow_as_in_scipy():
    for value, dtype in ((200, "uint8"), (-50_000, "int32"), (60_000, "uint32")):
        in1, in2 = np.full((20, 20), value, dtype), np.full((9, 9), abs(value), dtype)
        expected = scipy.signal.convolve(in1, in2, method="direct")
        np.testing.assert_array_equal(signal.convolve(in1, in2), expected)
    least = np.full((3, 3), np.iinfo(np.int64).min)
    np.testing.assert_array_equal(
        signal.convolve(least, least + 1), scipy.signal.convolve(least, least + 1, method="direct")
    )


@pytest.mark.parametrize("method", signal.METHODS)
def test_booleans_float16_and_long_doubles(method, rng):
    for shape in ((40,), (8, 9), (200, 150)):
        picture, taps = rng.integers(0, 2, shape).astype(bool), np.ones((3,) * len(shape), bool)
        found = signal.convolve(picture, taps, method=method)
        counts = scipy.signal.convolve(picture.astype(int), taps.astype(int), method="direct")
        np.testing.assert_array_equal(found, counts > 0, strict=True)
    halves, taps = rng.integers(-3, 4, (8, 9)).astype("float16"), np.ones((3, 3), "float16")
    expected = scipy.signal.convolve(halves.astype(float), taps.astype(float), method="direct")
    np.testing.assert_array_equal(signal.convolve(halves, taps, method=method).round(), expected.astype("float16"))
    wide = rng.standard_normal((6, 7)).astype(np.longdouble)
    expected = scipy.signal.convolve(wide, wide[:3, :2], method="direct")
    np.testing.assert_allclose(signal.convolve(wide, wide[:3, :2], method=method), expected, 0, 1e-17, strict=True)


@combinations(arrays=BACKENDS, method=["auto", "fft"], turns=["method"])
def test_nan_reaches_only_its_own_results(arrays, method, rng):
    in1, in2 = rng.standard_normal((60, 50)), rng.standard_normal((30, 30))
    in1[59, 49] = np.nan
    found = arrays.asnumpy(signal.convolve(arrays.asarray(in1), arrays.asarray(in2), "full", method))
    expected = scipy.signal.convolve(in1, in2, "full", "direct")
    np.testing.assert_allclose(found, expected, 0, 1e-10, equal_nan=True)


@pytest.mark.parametrize("limit", ["64MiB", "100KB"])
def test_long_signals_and_small_workspaces(limit, rng, monkeypatch):
    monkeypatch.setenv("GPUCONV_WORKSPACE_LIMIT", limit)
    for shape, taps in (((80_000,), (500,)), ((200, 190), (40, 35))):
        in1, in2 = rng.standard_normal(shape), rng.standard_normal(taps)
        expected = scipy.signal.convolve(in1, in2, "same", "fft")
        for method in ("auto", "fft"):
            np.testing.assert_allclose(signal.convolve(in1, in2, "same", method), expected, 0, 1e-11, strict=True)


def test_numbers_lists_and_empty_signals():
    for function in ("convolve", "correlate"):
        mine, theirs = getattr(signal, function), getattr(scipy.signal, function)
        np.testing.assert_array_equal(mine(2, 3j), theirs(2, 3j), strict=True)
        np.testing.assert_array_equal(mine([1, 2, 3], [4, 5]), theirs([1, 2, 3], [4, 5]), strict=True)
        empty, taps = np.zeros((0, 3), "float32"), np.ones((2, 2))
        np.testing.assert_array_equal(mine(empty, taps, "same"), theirs(empty, taps, "same", "direct"), strict=True)
    assert signal.convolve2d(np.zeros((0, 3)), taps, "same", "wrap").shape == (0, 3)


def test_fill_values_are_converted_to_the_dtype_of_the_result():
    ints, taps = [[1, 2], [3, 4]], [[1, 1]]
    for image, value in ((ints, 2.7), (np.array(ints, "complex64"), 1 + 2j), (np.array(ints, float), [5.5])):
        expected = scipy.signal.convolve2d(image, taps, fillvalue=value)
        np.testing.assert_array_equal(signal.convolve2d(image, taps, fillvalue=value), expected, strict=True)


def test_a_forced_backend_of_numpy_changes_nothing():
    with backend("numpy"):
        assert signal.convolve([1.0, 2.0], [3.0]).tolist() == [3, 6]


@pytest.mark.gpu
def test_four_axes_and_mixed_arrays(rng):
    import cupy

    in1, in2 = drawn(rng, (3, 4, 3, 5), "float64"), drawn(rng, (2, 2, 3, 2), "float64")
    expected = scipy.signal.convolve(in1, in2, "same", "direct")
    for method in signal.METHODS:
        found = signal.convolve(cupy.asarray(in1), cupy.asarray(in2), "same", method)
        np.testing.assert_array_equal(found.get().round(), expected)
    assert signal.convolve(cupy.ones(3), [1.0, 1.0]).get().tolist() == [1, 2, 2, 1]
    with pytest.raises(TypeError, match=r"in1 is a cupy.ndarray and in2 a numpy.ndarray"):
        signal.convolve(cupy.ones(3), np.ones(2))


ONES = np.ones((4, 3))


@pytest.mark.parametrize(
    "function, arguments, phrase",
    [
        ("convolve", (ONES, ONES[0]), "same number of dimensions, but their shapes are (4, 3) and (3,)"),
        ("correlate", (ONES, 1), "same number of dimensions"),
        ("convolve", (ONES, ONES, "circular"), "mode must be one of full, same, valid; got 'circular'"),
        ("correlate", (ONES, ONES, 0), "mode must be one of full, same, valid; got 0"),
        ("convolve", (ONES, ONES, "full", "fast"), "method must be one of auto, direct, fft; got 'fast'"),
        ("correlate", (ONES, ONES.T, "valid"), "as large as the other on every axis, but their shapes are (4, 3)"),
        ("convolve", (ONES, ONES[:0]), "must not be empty, but their shapes are (4, 3) and (0, 3)"),
        ("convolve", (ONES[:0], ONES), "must not be empty"),
        ("convolve2d", (ONES[0], ONES[0]), "must have 2 dimensions, but their shapes are (3,) and (3,)"),
        ("correlate2d", (ONES, ONES, "full", "reflect"), "boundary must be one of fill, pad, wrap"),
        ("convolve2d", (ONES, ONES, "full", "fill", [1, 2]), "fillvalue must be one number, got [1, 2]"),
        ("convolve2d", (ONES, ONES[:0]), "must not be empty"),
    ],
)
def test_bad_input_is_refused_in_words(function, arguments, phrase):
    with pytest.raises(ValueError, match=re.escape(phrase)):
        getattr(signal, function)(*arguments)
