"""Compare conv_matrix with conv: A @ x.ravel() == y.ravel()."""

import numpy as np
import pytest

import gpuconv
from gpuconv.operators import index_dtype
from tests.cases import CASES, draw, laid_out
from tests.tiers import combinations


@combinations(
    case=CASES,
    dtype=["float32", "complex128"],
    layout=["channels_first", "channels_last"],
    turns=["dtype", "layout"],
)
def test_matrix_is_the_convolution(case, dtype, layout, rng):
    x, w = (laid_out(draw(rng, s, dtype, True).astype(dtype), layout, r) for s, r in ((case.x, "x"), (case.w, "w")))
    settings = {**case.settings, "layout": layout}
    A = gpuconv.conv_matrix(w, x.shape, **settings)  # noqa: N806
    y = gpuconv.conv(x, w, **settings)
    assert A.format == "csr"
    assert A.dtype == dtype
    A.check_format()
    assert A.has_sorted_indices
    np.testing.assert_array_equal(A @ x.ravel(), y.ravel())
    np.testing.assert_array_equal(A.conj().T @ y.ravel(), gpuconv.conv_data_grad(y, w, x.shape, **settings).ravel())


@pytest.mark.parametrize("batch", [(), (2, 3), (0,)])
def test_batch_axes_repeat_the_matrix(batch, rng):
    x, w = rng.integers(-3, 4, (*batch, 2, 5)).astype(float), rng.integers(-3, 4, (3, 2, 2)).astype(float)
    A = gpuconv.conv_matrix(w, x.shape)  # noqa: N806
    np.testing.assert_array_equal(A @ x.ravel(), gpuconv.conv(x, w).ravel())


def test_zeros_of_w_are_stored():
    assert gpuconv.conv_matrix(np.zeros((1, 1, 3, 3)), (4, 1, 4, 4)).nnz == 4 * 36


def test_missing_scipy_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r"gpuconv\[sparse\]"):
        gpuconv.conv_matrix(np.ones((1, 1, 3)), (1, 1, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_matrix_on_a_gpu(dtype, rng):
    import cupy

    x, w = draw(rng, (2, 3, 6, 5), dtype, True).astype(dtype), draw(rng, (4, 3, 3, 3), dtype, True).astype(dtype)
    A = gpuconv.conv_matrix(cupy.asarray(w), x.shape, padding=1)  # noqa: N806
    np.testing.assert_array_equal((A @ cupy.asarray(x).ravel()).get(), gpuconv.conv(x, w, padding=1).ravel())


def test_indices_are_as_wide_as_the_largest_needs():
    assert index_dtype(2**31 - 1) is np.int32
    assert index_dtype(2**31) is np.int64
