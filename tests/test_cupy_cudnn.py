"""Compare the convolutions with the names and arguments of CuPy 13 with the reference."""

import functools
import importlib
import importlib.util
import itertools
import sys
import types

import numpy as np
import pytest

import gpuconv
from gpuconv import settings
from gpuconv.compat import cupy_cudnn
from tests import reference, tiers
from tests.backends import BACKENDS
from tests.cases import CASES, draw, named_dtype
from tests.tiers import combinations

# cuDNN pads both ends equally and does not flip kernels.
CASES_OF_CUDNN = [
    case for case in CASES if len(case.x) <= 5 and not case.flip and all(low == high >= 0 for low, high in case.padding)
]


def in_layout(array, layout):
    """Return an array (N, C, *spatial) or (F, C/G, *kernel) in layout 0 or 1."""
    return np.ascontiguousarray(np.moveaxis(array, 1, -1)) if layout else array


def from_layout(array, layout):
    return np.moveaxis(array, -1, 1) if layout else array


@combinations(
    arrays=BACKENDS,
    case=CASES_OF_CUDNN,
    dtype=["float32", "complex128"],
    d_layout=[0, 1],
    w_layout=[0, 1],
    turns=["arrays", "dtype", "d_layout", "w_layout"],
)
def test_results_are_written_into_the_callers_array(case, dtype, d_layout, w_layout, arrays, rng):
    geometry = case.geometry()
    wide = "complex128" if dtype.startswith("complex") else "float64"
    x, w, dy = (draw(rng, shape, wide, True) for shape in (case.x, case.w, geometry.y_shape))
    exact = case.stride, case.padding, case.dilation, case.groups
    given = [low for low, _ in case.padding], case.stride, case.dilation, case.groups
    layouts = {"d_layout": d_layout, "w_layout": w_layout}

    def made(array, layout):
        return arrays.asarray(in_layout(array, layout).astype(named_dtype(dtype)))

    X, W, DY = made(x, d_layout), made(w, w_layout), made(dy, d_layout)  # noqa: N806
    b = rng.integers(-3, 4, case.w[0]).astype(float).reshape(1, -1, *(1,) * (len(case.x) - 2))
    out = made(np.full(dy.shape, np.nan), d_layout)
    result = cupy_cudnn.convolution_forward(X, W, made(b, 0), out, *given, **layouts)
    assert result is None
    np.testing.assert_array_equal(from_layout(arrays.asnumpy(out), d_layout), reference.forward(x, w, *exact) + b)

    out = made(np.full(w.shape, np.nan), w_layout)
    assert cupy_cudnn.convolution_backward_filter(X, DY, out, *given, **layouts) is None
    np.testing.assert_array_equal(
        from_layout(arrays.asnumpy(out), w_layout), reference.weight_grad(dy, x, w.shape, *exact)
    )

    b = rng.integers(-3, 4, case.x[1]).astype(float)
    out = made(np.full(x.shape, np.nan), d_layout)
    assert cupy_cudnn.convolution_backward_data(W, DY, made(b, 0), out, *given, **layouts) is None
    expected = reference.data_grad(dy, w, x.shape, *exact) + b.reshape(-1, *(1,) * (x.ndim - 2))
    np.testing.assert_array_equal(from_layout(arrays.asnumpy(out), d_layout), expected)


# The parameters of TestConvolutionForward, -BackwardFilter and -BackwardData of CuPy 13's test_cudnn.py. Their arrays
# contain zeros; these do not.
IN_ALL = {
    "tensor_core": ("always", "auto", "never"),
    "dilate": (1, 2),
    "groups": (1, 2),
    "max_workspace_size": (0, 1 << 22),
    "auto_tune": (True, False),
}
IN_ONE = {
    "convolution_forward": {"ndim": (2,), "bias": (True, False), "layout": (0, 1)},
    "convolution_backward_filter": {"ndim": (2, 3), "deterministic": (True, False)},
    "convolution_backward_data": {"ndim": (2, 3), "deterministic": (True, False), "bias": (True, False)},
}


@functools.cache
def arrays_of_cupys_shapes(dilate, groups, ndim, layout):
    """Return x, w and dy, then the results of the three functions."""
    rng, channels, filters = np.random.default_rng(13), (4 if layout else 3) * groups, (4 if layout else 2) * groups
    shapes = (2, channels, *(3,) * ndim), (filters, channels // groups, *(3,) * ndim), (2, filters, *(2,) * ndim)
    x, w, dy = (draw(rng, shape, "float64", True) for shape in shapes)
    exact = (2,) * ndim, ((dilate, dilate),) * ndim, (dilate,) * ndim, groups
    y, dw, dx = (
        reference.forward(x, w, *exact),
        reference.weight_grad(dy, x, w.shape, *exact),
        reference.data_grad(dy, w, x.shape, *exact),
    )
    return (x, w, dy), (y, dw, dx)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("function", IN_ONE)
def test_what_the_tests_of_cupy_13_go_through(function, dtype, arrays, monkeypatch):
    monkeypatch.setenv("GPUCONV_WORKSPACE_LIMIT", "8MiB")  # restored afterwards
    names, values = zip(*{**IN_ALL, **IN_ONE[function]}.items(), strict=True)
    every = 1 if tiers.full else 29  # coprime to the numbers of values
    for chosen in itertools.islice(itertools.product(*values), None, None, every):
        how = dict(zip(names, chosen, strict=True))
        dilate, groups, ndim, layout = how.pop("dilate"), how.pop("groups"), how.pop("ndim"), how.pop("layout", 0)
        (x, w, dy), results = arrays_of_cupys_shapes(dilate, groups, ndim, layout)
        first, second, channels = {
            "convolution_forward": (x, w, w.shape[0]),
            "convolution_backward_filter": (x, dy, 0),
            "convolution_backward_data": (w, dy, x.shape[1]),
        }[function]
        expected = results[list(IN_ONE).index(function)]
        given = [arrays.asarray(in_layout(a, layout).astype(dtype)) for a in (first, second)]
        if channels:
            b = np.arange(channels) - 2.0
            with_bias = how.pop("bias")
            given.append(arrays.asarray(b.astype(dtype)) if with_bias else None)
            expected = expected + with_bias * b.reshape(-1, *(1,) * ndim)
        out = arrays.asarray(np.full(in_layout(expected, layout).shape, np.nan, dtype))
        cupy_cudnn.set_max_workspace_size(how.pop("max_workspace_size"))
        if layout:
            how |= {"d_layout": layout, "w_layout": layout}
        getattr(cupy_cudnn, function)(*given, out, (dilate,) * ndim, (2,) * ndim, (dilate,) * ndim, groups, **how)
        np.testing.assert_array_equal(from_layout(arrays.asnumpy(out), layout), expected)


def test_views_with_any_strides():
    x, w, memory = np.arange(96.0).reshape(2, 2, 4, 6)[:, :, ::-1, ::2], np.ones((3, 2, 2, 2)), np.zeros((3, 6, 1, 2))
    y = memory.transpose(1, 0, 3, 2)[::3]
    cupy_cudnn.convolution_forward(x, w, None, y, 0, 2)
    np.testing.assert_array_equal(y, reference.forward(x, w, (2, 2), ((0, 0),) * 2, (1, 1)))
    assert not memory[:, 1:3].any()


@pytest.mark.parametrize("dtype, of_b", [("float16", "float16"), ("float16", "float32"), ("float32", "complex64")])
def test_a_bias_is_added_before_sums_are_rounded(dtype, of_b, rng):
    x, w = draw(rng, (2, 5, 6), dtype, False).astype(dtype), draw(rng, (5, 8, 3), dtype, False).astype(dtype)
    b = draw(rng, (8,), of_b, False).astype(of_b)
    y = np.empty((2, 8, 8), np.result_type(dtype, of_b))
    cupy_cudnn.convolution_backward_data(w, x, b, y, 0, 1)
    np.testing.assert_array_equal(y, gpuconv.conv_transpose(x, w, b))


def test_the_workspace_is_the_librarys(monkeypatch):
    monkeypatch.setenv("GPUCONV_WORKSPACE_LIMIT", "3MiB")
    assert cupy_cudnn.get_max_workspace_size() == 3 << 20
    cupy_cudnn.set_max_workspace_size(np.int64(5))
    assert settings.workspace_limit() == cupy_cudnn.get_max_workspace_size() == 5
    cupy_cudnn.set_max_workspace_size(2**63 - 1)
    assert cupy_cudnn.get_max_workspace_size() >= 2**63 - 1
    for wrong in (-1, 1.5, "8MiB", True):
        with pytest.raises(ValueError, match="size must be a number of bytes, at least 0"):
            cupy_cudnn.set_max_workspace_size(wrong)


X, W, B, Y = np.ones((2, 4, 6, 6)), np.ones((3, 4, 3, 3)), np.ones(3), np.ones((2, 3, 4, 4))
ERRORS = {
    "axes": (
        lambda: cupy_cudnn.convolution_forward(X[0], W, B, Y, 0, 1),
        ValueError,
        r"x, W, y must have .* \(x \(4, 6, 6\)",
    ),
    "rank": (lambda: cupy_cudnn.convolution_forward(X[0, 0], W[0, 0], B, Y[0, 0], 0, 1), ValueError, "3, 4 or 5"),
    "list": (lambda: cupy_cudnn.convolution_forward(X.tolist(), W, B, Y, 0, 1), TypeError, "x must be"),
    "list y": (lambda: cupy_cudnn.convolution_forward(X, W, B, Y.tolist(), 0, 1), TypeError, "y must be"),
    "list b": (lambda: cupy_cudnn.convolution_forward(X, W, [1.0] * 3, Y, 0, 1), TypeError, "b must be"),
    "channels": (
        lambda: cupy_cudnn.convolution_forward(X[:, :2], W, B, Y, 0, 1),
        ValueError,
        r"x has 2 channels but W expects 4",
    ),
    "y's shape": (
        lambda: cupy_cudnn.convolution_forward(X, W, B, Y, 1, 1),
        ValueError,
        r"y must have the shape \(2, 3, 6, 6\)",
    ),
    "y's dtype": (
        lambda: cupy_cudnn.convolution_forward(X, W, B, Y.astype("f"), 0, 1),
        TypeError,
        "y must have the dtype",
    ),
    "y is x": (
        lambda: cupy_cudnn.convolution_forward(X, W[:, :, 1:2, 1:2], B, X[:, :3], 0, 1),
        ValueError,
        "y must not overlap x",
    ),
    "b": (lambda: cupy_cudnn.convolution_forward(X, W, B[:2], Y, 0, 1), ValueError, "b must have one element"),
    "pad": (lambda: cupy_cudnn.convolution_forward(X, W, B, Y, 0.5, 1), TypeError, "pad must be"),
    "d_layout": (
        lambda: cupy_cudnn.convolution_forward(X, W, B, Y, 0, 1, d_layout=2),
        ValueError,
        r"d_layout must be 0 \(NCHW\)",
    ),
    "w_layout": (
        lambda: cupy_cudnn.convolution_forward(X, W, B, Y, 0, 1, w_layout=None),
        ValueError,
        "w_layout must be",
    ),
    "tensor_core": (
        lambda: cupy_cudnn.convolution_forward(X, W, B, Y, 0, 1, tensor_core="no"),
        ValueError,
        "tensor_core must be one of auto",
    ),
    "gy's shape": (
        lambda: cupy_cudnn.convolution_backward_filter(X, Y[:, :, 1:], W, 0, 1),
        ValueError,
        r"gy must have the shape \(2, 3, 4, 4\) that x \(2, 4, 6, 6\) and gW \(3, 4, 3, 3\) give",
    ),
    "gW's channels": (lambda: cupy_cudnn.convolution_backward_filter(X, Y, W[:, :2], 0, 1), ValueError, "gW expects 2"),
    "gW's dtype": (
        lambda: cupy_cudnn.convolution_backward_filter(X, Y, W.astype("f"), 0, 1),
        TypeError,
        "gW must have the dtype",
    ),
    "gradient's shape": (
        lambda: cupy_cudnn.convolution_backward_data(W, Y[:, :, 1:], None, X, 0, 1),
        ValueError,
        r"x must have the shape \(2, 3, 4, 4\) that y \(2, 4, 6, 6\) and W \(3, 4, 3, 3\) give",
    ),
    "data's channels": (
        lambda: cupy_cudnn.convolution_backward_data(W, Y, None, X[:, :3], 0, 1),
        ValueError,
        "y has 3 channels but W expects 4",
    ),
    "data's b": (
        lambda: cupy_cudnn.convolution_backward_data(W, Y, B, X, 0, 1),
        ValueError,
        "b must have one element for each of the 4 output channels",
    ),
    "b in y": (
        lambda: cupy_cudnn.convolution_backward_data(W, Y, X[0, :, 0, 0], X, 0, 1),
        ValueError,
        "y must not overlap b",
    ),
    "no output": (
        lambda: cupy_cudnn.convolution_backward_data(W, Y, None, X[:, :, :2], 0, 1),
        ValueError,
        "x would be empty on spatial axis 0",
    ),
    "tensor_core's kind": (
        lambda: cupy_cudnn.convolution_forward(X, W, B, Y, 0, 1, tensor_core=["auto"]),
        ValueError,
        "tensor_core must be one of auto",
    ),
    "data's dtype": (
        lambda: cupy_cudnn.convolution_backward_data(W, Y, np.ones(4, complex), X, 0, 1),
        TypeError,
        "y must have the dtype of the result, complex128",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument_and_nothing_is_written(name):
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        call()
    assert all((array == 1).all() for array in (X, W, B, Y))


@pytest.fixture
def cupy_without_cudnn(monkeypatch):
    """Packages like those of CuPy 14, as far as install() uses them."""
    for name in ("cupy", "cupyx", "cupy.cuda"):
        package = types.ModuleType(name)
        package.__path__, package.__version__ = [], "14.2.0"
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setattr(sys.modules["cupy"], "cuda", sys.modules["cupy.cuda"], raising=False)
    yield sys.modules["cupy"]
    for name in ("cupy.cudnn", "cupyx.cudnn", "cupy.cuda.cudnn"):
        sys.modules.pop(name, None)


def test_install_puts_the_module_where_programs_look(cupy_without_cudnn):
    cupy_cudnn.install()
    cupy_cudnn.install()  # a second call is permitted
    from cupy import cudnn

    assert cudnn is cupy_cudnn
    for name in ("cupy.cudnn", "cupyx.cudnn", "cupy.cuda.cudnn"):
        assert importlib.import_module(name) is cupy_cudnn
        assert importlib.util.find_spec(name) is not None  # some libraries test for the module in this way
    cupy_cudnn.uninstall()
    cupy_cudnn.uninstall()
    for name in ("cupy.cudnn", "cupyx.cudnn", "cupy.cuda.cudnn"):
        with pytest.raises(ImportError):
            importlib.import_module(name)
    assert not hasattr(cupy_without_cudnn, "cudnn")


def test_the_real_one_is_left_alone(cupy_without_cudnn, tmp_path):
    (tmp_path / "cudnn.py").write_text("real = True\n")
    cupy_without_cudnn.__path__.append(str(tmp_path))
    with pytest.raises(RuntimeError, match=r"CuPy 14\.2\.0 has cupy\.cudnn, which install\(\) does not replace"):
        cupy_cudnn.install()
    assert importlib.import_module("cupy.cudnn").real
    assert "cupyx.cudnn" not in sys.modules
    cupy_cudnn.uninstall()
    assert importlib.import_module("cupy.cudnn").real


@pytest.mark.parametrize("is_imported", [False, True])
def test_another_stand_in_is_left_alone(is_imported, cupy_without_cudnn, monkeypatch):
    other = types.ModuleType("cudnn")  # without __spec__
    if is_imported:
        monkeypatch.setitem(sys.modules, "cupyx.cudnn", other)
    else:
        sys.modules["cupyx"].cudnn = other
    with pytest.raises(RuntimeError, match=r"CuPy 14\.2\.0 has cupyx\.cudnn"):
        cupy_cudnn.install()
    assert not hasattr(cupy_without_cudnn, "cudnn")


def test_uninstall_leaves_what_others_have_put_there(cupy_without_cudnn):
    cupy_cudnn.install()
    del cupy_without_cudnn.cudnn
    other = sys.modules["cupyx"].cudnn = types.ModuleType("cudnn")
    del sys.modules["cupy.cuda.cudnn"]
    cupy_cudnn.uninstall()
    assert sys.modules["cupyx"].cudnn is other
    assert not hasattr(sys.modules["cupy.cuda"], "cudnn")
    assert not {"cupy.cudnn", "cupyx.cudnn", "cupy.cuda.cudnn"} & set(sys.modules)


def test_install_without_cupy_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match=r"install\(\) needs CuPy: pip install 'gpuconv\[cuda12\]'"):
        cupy_cudnn.install()
