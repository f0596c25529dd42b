"""Compare linear_operator with conv and its adjoint and with conv_matrix; use it in solvers."""

import pickle
import sys

import numpy as np
import pytest
from scipy.sparse.linalg import cg, lsmr, lsqr

import gpuconv
from tests.cases import CASES, draw, laid_out
from tests.tiers import combinations


@combinations(
    case=CASES,
    dtype=["float32", "complex128"],
    layout=["channels_first", "channels_last"],
    turns=["dtype", "layout"],
)
def test_operator_is_the_matrix(case, dtype, layout, rng):
    x, w = (laid_out(draw(rng, s, dtype, True).astype(dtype), layout, r) for s, r in ((case.x, "x"), (case.w, "w")))
    settings = {**case.settings, "layout": layout}
    operator, matrix = (make(w, x.shape, **settings) for make in (gpuconv.linear_operator, gpuconv.conv_matrix))
    assert operator.shape == matrix.shape
    assert operator.dtype == matrix.dtype == dtype
    y = matrix @ x.ravel()
    np.testing.assert_array_equal(operator @ x.ravel(), y)
    np.testing.assert_array_equal(operator.H @ y, matrix.conj().T @ y)
    vectors = rng.integers(-3, 4, (x.size, 3)).astype(dtype)
    np.testing.assert_array_equal(operator @ vectors, matrix @ vectors)
    vectors = rng.integers(-3, 4, (y.size, 3)).astype(dtype)
    np.testing.assert_array_equal(operator.H @ vectors, matrix.conj().T @ vectors)


@pytest.mark.parametrize("batch", [(), (2, 3), (0,)])
@pytest.mark.parametrize("vectors", [0, 1, 2])
def test_batch_axes_and_any_number_of_vectors(batch, vectors, rng):
    w = rng.integers(-3, 4, (3, 2, 2)).astype(float)
    operator, matrix = gpuconv.linear_operator(w, (*batch, 2, 5)), gpuconv.conv_matrix(w, (*batch, 2, 5))
    x = rng.integers(-3, 4, (matrix.shape[1], vectors)).astype(float)
    np.testing.assert_array_equal(operator @ x, matrix @ x)


def test_other_vectors_are_promoted(rng):
    w = rng.integers(-3, 4, (2, 1, 3)).astype(np.float32)
    operator, x = gpuconv.linear_operator(w, (1, 8)), rng.integers(-3, 4, 8)
    assert (operator @ x.astype(np.float16)).dtype == np.float32
    np.testing.assert_array_equal(operator @ (x + 2**24), gpuconv.conv_matrix(w, (1, 8)) @ (x + 2**24))
    assert (operator @ x.astype(complex)).dtype == complex
    np.testing.assert_array_equal(operator.H @ (operator @ (1j * x)), 1j * (operator.H @ (operator @ x.astype(float))))


@pytest.mark.parametrize("dtype", ["clongdouble", "longdouble", "object", "U1"])
def test_vectors_that_conv_refuses_are_refused(dtype):
    operator = gpuconv.linear_operator(np.ones((1, 1, 3)), (1, 4))
    with pytest.raises(TypeError, match="x must be one of float16"):
        operator @ np.ones(4).astype(dtype)
    with pytest.raises(TypeError, match="dy must be one of float16"):
        operator.rmatvec(np.ones(2).astype(dtype))


def test_it_can_be_pickled():
    operator = pickle.loads(pickle.dumps(gpuconv.linear_operator(np.ones((1, 1, 2)), (1, 3), stride=2)))
    np.testing.assert_array_equal(operator @ np.ones(3), [2])


def test_it_follows_w():
    w = np.ones((1, 1, 2))
    operator = gpuconv.linear_operator(w, (1, 3))
    w[...] = 2
    np.testing.assert_array_equal(operator @ np.ones(3), [4, 4])


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("solver", [lsqr, lsmr])
def test_least_squares_find_x(solver, dtype, rng):
    w = draw(rng, (5, 2, 3, 3), dtype, False).astype(dtype)
    x = draw(rng, (2, 6, 7), dtype, False).astype(dtype).ravel()
    operator = gpuconv.linear_operator(w, (2, 6, 7), padding=1)  # more outputs than inputs
    found = solver(operator, operator @ x, atol=1e-12, btol=1e-12)[0]
    np.testing.assert_allclose(found, x, rtol=0, atol=1e-8 * np.abs(x).max())


def test_conjugate_gradients_find_x(rng):
    operator = gpuconv.linear_operator(draw(rng, (5, 2, 3), "float64", False), (2, 9), padding=1)
    x = rng.standard_normal(18)
    normal = operator.H @ operator
    found, failed = cg(normal, normal @ x, rtol=1e-12)
    assert not failed
    np.testing.assert_allclose(found, x, rtol=0, atol=1e-8 * np.abs(x).max())


def test_missing_scipy_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(ImportError, match=r"gpuconv\[sparse\]"):
        gpuconv.linear_operator(np.ones((1, 1, 3)), (1, 1, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_operator_on_a_gpu(dtype, rng):
    import cupy
    from cupyx.scipy.sparse.linalg import LinearOperator, lsmr

    w, x = draw(rng, (4, 3, 3, 3), dtype, True).astype(dtype), draw(rng, (2, 3, 6, 5), dtype, True).astype(dtype)
    on_cpu, on_gpu = (gpuconv.linear_operator(a, x.shape, padding=1) for a in (w, cupy.asarray(w)))
    assert isinstance(on_gpu, LinearOperator)
    y = on_cpu @ x.ravel()
    np.testing.assert_array_equal((on_gpu @ cupy.asarray(x.ravel())).get(), y)
    np.testing.assert_array_equal((on_gpu.H @ cupy.asarray(y)).get(), on_cpu.H @ y)
    if dtype == "float32":  # CuPy's lsmr accepts only real numbers
        found = lsmr(on_gpu, cupy.asarray(y), atol=1e-6, btol=1e-6)[0]
        np.testing.assert_allclose(found.get(), x.ravel(), rtol=0, atol=1e-2)
