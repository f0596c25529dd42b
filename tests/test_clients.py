"""Run the changes of gpuconv/compat/README.md on small copies of the calling conventions of the programs.

``python -m tests.clients`` runs them on the programs themselves.
"""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from tests import backends, reference
from tests.cases import draw
from tests.clients import run_page

GEOMETRIES = [((1, 1), (0, 0)), ((2, 1), (1, 2))]  # strides and paddings


@pytest.fixture
def install(monkeypatch):
    """Provide a function that registers a module with given contents, and the packages that contain it."""

    def register(name, **contents):
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            package = sys.modules[parent] if parent in made else register(parent)
            setattr(package, child, module)
        made.add(name)
        return module

    made = set()
    return register


@pytest.fixture
def integers(rng):
    return lambda *shape: rng.integers(-3, 4, shape).astype(float)


def geometry(stride, pad):
    """Return the arguments of the reference."""
    return stride, [(p, p) for p in pad], (1,) * len(stride)


class Variable:
    def __init__(self, data):
        self.data = data

    @property
    def shape(self):
        return self.data.shape

    def sum(self, axis):
        return Variable(self.data.sum(axis))


class Function:
    """A function on arrays that remembers its arguments, as those of DeZero do."""

    def __init__(self, stride, pad, outsize=None):
        self.stride, self.pad, self.outsize = stride, pad, outsize

    def __call__(self, *arguments):
        self.inputs = [a if isinstance(a, Variable) else Variable(a) for a in arguments]
        return Variable(self.forward(*(variable.data for variable in self.inputs)))


class Conv2d(Function):
    def backward(self, gy):
        x, w, b = self.inputs
        gx = Deconv2d(self.stride, self.pad, x.shape[2:])(gy, w, None)
        return gx, Conv2DGradW(self)(x, gy), None if b.data is None else gy.sum((0, 2, 3))


class Deconv2d(Function):
    def backward(self, gy):
        x, w, b = self.inputs
        gx = Conv2d(self.stride, self.pad)(gy, w, None)
        return gx, Conv2DGradW(self)(gy, x), None if b.data is None else gy.sum((0, 2, 3))


class Conv2DGradW(Function):
    def __init__(self, function):
        super().__init__(function.stride, function.pad)
        self.kernel_size = function.inputs[1].shape[2:]


@backends.on("numpy", "cupy")
@pytest.mark.parametrize("stride, pad", GEOMETRIES)
def test_dezero(stride, pad, arrays, integers, install):
    install("dezero.functions_conv", Conv2d=Conv2d, Deconv2d=Deconv2d, Conv2DGradW=Conv2DGradW, conv2d="conv2d")
    functions = install("dezero.functions")
    run_page("DeZero")
    assert functions.conv2d_simple == "conv2d"
    x, w, b, b_x = integers(2, 3, 8, 7), integers(4, 3, 3, 2), integers(4), integers(3)
    y = reference.forward(x, w, *geometry(stride, pad))
    dy = integers(*y.shape)
    dx = reference.data_grad(dy, w, x.shape, *geometry(stride, pad))
    dw = reference.weight_grad(dy, x, w.shape, *geometry(stride, pad))
    bias_of_x, bias_of_y = b_x.reshape(-1, 1, 1), b.reshape(-1, 1, 1)

    convolve, transpose = Conv2d(stride, pad), Deconv2d(stride, pad, x.shape[2:])
    on_device = [arrays.asarray(array) for array in (x, w, b, dy, b_x)]
    found = convolve(*on_device[:3]), *convolve.backward(Variable(on_device[3]))
    found += transpose(on_device[3], on_device[1], on_device[4]), *transpose.backward(Variable(on_device[0]))
    expected = y + bias_of_y, dx, dw, dy.sum((0, 2, 3)), dx + bias_of_x, y, dw, x.sum((0, 2, 3))
    for result, exact in zip(found, expected, strict=True):
        np.testing.assert_array_equal(arrays.asnumpy(result.data), exact)


@backends.on("numpy", "cupy")
@pytest.mark.parametrize("stride, pad", [(1, 0), (2, 1)])
def test_deep_learning_from_scratch(stride, pad, arrays, integers):
    x, w, b = integers(2, 3, 8, 7), integers(4, 3, 3, 2), integers(4)
    window = geometry((stride, stride), (pad, pad))
    layer = run_page("Deep Learning from Scratch")["Convolution"](
        arrays.asarray(w.astype("f")), arrays.asarray(b.astype("f")), stride, pad
    )
    y = layer.forward(arrays.asarray(x))  # float64, as the layers before it return
    np.testing.assert_array_equal(arrays.asnumpy(y), reference.forward(x, w, *window) + b.reshape(-1, 1, 1))
    dout = integers(*y.shape)
    dx = layer.backward(arrays.asarray(dout))
    np.testing.assert_array_equal(arrays.asnumpy(dx), reference.data_grad(dout, w, x.shape, *window))
    np.testing.assert_array_equal(arrays.asnumpy(layer.dW), reference.weight_grad(dout, x, w.shape, *window))
    np.testing.assert_array_equal(arrays.asnumpy(layer.db), dout.sum((0, 2, 3)))
    assert {array.dtype.name for array in (y, dx, layer.dW, layer.db)} == {"float32"}


def same_padding(extents, kernel, strides):
    """Return the padding that TensorFlow calls same: the odd element at the high end."""
    totals = [max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in zip(extents, kernel, strides, strict=True)]
    return [(total // 2, total - total // 2) for total in totals]


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("groups, is_transpose", [(1, False), (2, False), (1, True)])
@pytest.mark.parametrize("extents, kernel, strides", [((9,), (4,), (3,)), ((8, 7), (3, 2), (2, 1))])
def test_nengo(extents, kernel, strides, groups, is_transpose, padding, channels_last, integers, install):
    operators = install("nengo.builder.transforms", GeneralConvInc=type("GeneralConvInc", (), {}))
    run_page("Nengo")
    ends = same_padding(extents, kernel, strides) if padding == "same" else [(0, 0)] * len(kernel)
    x, w = integers(1, 4, *extents), integers(6, 4 // groups, *kernel)
    if is_transpose:
        y = integers(*reference.forward(x, w, strides, ends, (1,) * len(kernel)).shape)
        given, expected = y, reference.data_grad(y, w, x.shape, strides, ends, (1,) * len(kernel))
    else:
        given, expected = x, reference.forward(x, w, strides, ends, (1,) * len(kernel), groups)

    def shaped(array):
        shape = np.moveaxis(array[0], 0, -1).shape if channels_last else array[0].shape
        return SimpleNamespace(shape=shape, spatial_shape=array.shape[2:])

    def flat(array):
        return (np.moveaxis(array[0], 0, -1) if channels_last else array[0]).ravel()

    operator = operators.GeneralConvInc()
    operator.W, operator.X, operator.Y, operator.is_transpose = "W", "X", "Y", is_transpose
    operator.conv = SimpleNamespace(
        input_shape=shaped(given), output_shape=shaped(expected), channels_last=channels_last,
        strides=strides, padding=padding, groups=groups,
    )  # fmt: skip
    filters = np.moveaxis(w, (0, 1), (-2, -1)) if is_transpose else np.moveaxis(w, (0, 1), (-1, -2))
    signals = {"W": filters, "X": flat(given), "Y": np.ones(expected.size)}
    operator.make_step(signals, 0.001, None)()
    np.testing.assert_array_equal(signals["Y"], 1 + flat(expected))


def keras_padding(input_shape, kernel_shape, strides, padding, output_padding, dilation_rate):
    """Return the zeros on each side of the input, spread by the strides, with which Keras convolves it."""
    assert padding == "valid" or output_padding is None
    ends = []
    for k, s in zip(kernel_shape[:-2], strides, strict=True):
        reach = dilation_rate * (k - 1)
        if padding == "valid":
            ends.append((reach, reach + (max(s - reach - 1, 0) if output_padding is None else output_padding)))
        else:
            low = max(reach + 1 - s, 0) // 2
            ends.append((reach - low, s - 1 + low))
    return ends


@pytest.fixture
def keras(install):
    standardize = SimpleNamespace(standardize_data_format=lambda name: name or "channels_last")
    install("keras.src.backend", **vars(standardize))
    install("keras.src.backend.common.backend_utils", compute_conv_transpose_padding_args_for_jax=keras_padding)
    nn = install("keras.src.backend.numpy.nn", convert_to_tensor=np.asarray)
    run_page("Keras with the NumPy backend")
    return nn


@pytest.mark.parametrize("data_format", [None, "channels_first"])
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("groups", [1, 2, "depthwise"])
def test_keras(groups, padding, data_format, keras, integers):
    strides, kernel, number = (2, 1), (3, 2), 4 if groups == "depthwise" else groups
    x, w = integers(2, 4, 8, 7), integers(8, 4 // number, *kernel)
    ends = same_padding(x.shape[2:], kernel, strides) if padding == "same" else [(0, 0), (0, 0)]
    expected = reference.forward(x, w, strides, ends, (1, 1), number)
    filters = np.moveaxis(w, (0, 1), (-1, -2))
    call = keras.conv
    if groups == "depthwise":
        call, filters = keras.depthwise_conv, filters.reshape(*kernel, 4, 2)
    x, expected = (a if data_format else np.moveaxis(a, 1, -1) for a in (x, expected))
    np.testing.assert_array_equal(call(x, filters, strides, padding, data_format), expected)


@pytest.mark.parametrize("data_format", [None, "channels_first"])
@pytest.mark.parametrize(
    "padding, output_padding, extents", [("same", None, (8, 21)), ("valid", None, (9, 21)), ("valid", 1, (10, 21))]
)
def test_keras_transposed(padding, output_padding, extents, data_format, keras, integers):
    strides, kernel = (2, 3), (3, 2)
    y, w = integers(2, 4, 4, 7), integers(4, 3, *kernel)
    ends = same_padding(extents, kernel, strides) if padding == "same" else [(0, 0), (0, 0)]
    expected = reference.data_grad(y, w, (2, 3, *extents), strides, ends, (1, 1))
    y, expected = (a if data_format else np.moveaxis(a, 1, -1) for a in (y, expected))
    filters = np.moveaxis(w, (0, 1), (-1, -2))
    found = keras.conv_transpose(y, filters, strides, padding, output_padding, data_format)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("groups, stride, padding, dilation", [(1, 1, 0, 1), (2, 2, 1, 2)])
def test_torch_nn_grad(rank, groups, stride, padding, dilation, integers):
    torch = pytest.importorskip("torch")
    names = run_page("`torch.nn.grad` on arrays")
    x, w = integers(2, 4, *(8, 7, 6)[:rank]), integers(6, 4 // groups, *(3, 2, 3)[:rank])
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    extents = [
        (n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for n, k in zip(x.shape[2:], w.shape[2:], strict=True)
    ]
    dy = integers(2, 6, *extents)
    for name, given in ((f"conv{rank}d_input", (x.shape, w, dy)), (f"conv{rank}d_weight", (x, w.shape, dy))):
        theirs = [torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in given]
        expected = getattr(torch.nn.grad, name)(*theirs, **how).numpy()
        np.testing.assert_array_equal(names[name](*given, **how), expected)


@pytest.fixture
def pylops(install):
    pytest.importorskip("gpuconv.compat.signal")
    from scipy import signal

    backend = install("pylops.utils.backend", convolve=None, correlate=None, fftconvolve=signal.fftconvolve)
    run_page("PyLops")
    return backend


@pytest.mark.parametrize("mode", ["same", "full"])
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_pylops(mode, dtype, pylops, rng):
    from scipy import signal

    x, h = draw(rng, (8, 7), dtype, True), draw(rng, (3, 4), dtype, True)
    for name in ("convolve", "correlate"):
        found, expected = (getattr(module, name)(x, h, mode=mode, method="direct") for module in (pylops, signal))
        np.testing.assert_array_equal(found, expected)
    assert pylops.cp_convolve is pylops.convolve
    assert pylops.cp_correlate is pylops.correlate


@pytest.mark.parametrize("axis, shape, is_ours", [(0, (3, 1), True), (-1, (1, 4), True), (0, (3, 7), False)])
def test_pylops_along_one_axis(axis, shape, is_ours, pylops, rng):
    from scipy import signal

    x, h = draw(rng, (8, 7), "float64", True), draw(rng, shape, "float64", True)
    found = pylops.fftconvolve(x, h, mode="same", axes=axis)
    expected = signal.fftconvolve(x, h, mode="same", axes=axis)
    np.testing.assert_array_equal(found if is_ours else found.round(), expected.round())
