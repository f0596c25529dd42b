"""Invalid input: the exception and words of its message. Nothing is computed and out is unchanged."""

import operator

import numpy as np
import pytest

import gpuconv
from gpuconv.validate import _overlaps_itself

X, W, B = np.ones((2, 3, 9, 8)), np.ones((4, 3, 3, 3)), np.ones(4)
Y = np.ones((2, 4, 7, 6))
C = gpuconv.conv

BAD = {
    # shapes
    "channels": (lambda: C(X, np.ones((4, 2, 3, 3))), ValueError, "x has 3 channels but w expects 2 (x (2, 3, 9, 8), w (4, 2, 3, 3), groups=1)"),
    "channels_last channels": (lambda: C(np.ones((2, 9, 8, 3)), np.ones((3, 3, 2, 4)), layout="channels_last"), ValueError, "x has 3 channels but w expects 2"),
    "groups do not divide C": (lambda: C(X, W, groups=2), ValueError, "2 does not divide 3"),
    "groups do not divide F": (lambda: C(X, np.ones((4, 1, 3, 3)), groups=3), ValueError, "groups must divide the filters of w, but 3 does not divide 4"),
    "x of too few axes": (lambda: C(np.ones((9, 8)), W), ValueError, "x must have a channel axis and the 2 spatial axes of w"),
    "w of too few axes": (lambda: C(X, np.ones((4, 3))), ValueError, "w must have two channel axes and at least one spatial axis, got shape (4, 3)"),
    "kernel of extent 0": (lambda: C(X, np.ones((4, 3, 0, 3))), ValueError, "w must have a kernel extent of at least 1"),
    "a bare kernel": (lambda: C(X, W[0, 0]), ValueError, "; one filter of one channel is w[None, None]"),
    "a bare kernel, channels_last": (lambda: C(X, W[0, 0], layout="channels_last"), ValueError, "is w[..., None, None]"),
    "the shape of a bare kernel": (lambda: gpuconv.conv_weight_grad(Y, X, (3, 3)), ValueError, "w_shape must have two channel axes and at least one spatial axis, got shape (3, 3); one filter of one channel is w[None, None]"),
    "a bare image": (lambda: C(X[0, 0], W[:1, :1]), ValueError, "(x (9, 8), w (1, 1, 3, 3)); an image of one channel is x[None]"),
    "a bare image, channels_last": (lambda: C(X[0, 0], W[:1, :1], layout="channels_last"), ValueError, "is x[..., None]"),
    "TensorFlow's depthwise weight": (lambda: C(np.ones((2, 9, 8, 3)), np.ones((3, 4, 3, 2)), groups=3, layout="channels_last"), ValueError, "3 does not divide 2 (x (2, 9, 8, 3), w (3, 4, 3, 2), groups=3); if its last axes are channels and multiplier, pass w.reshape(3, 4, 1, 6)"),
    "TensorFlow's depthwise weight, divisible": (lambda: C(np.ones((2, 9, 8, 3)), np.ones((3, 4, 3, 3)), groups=3, layout="channels_last"), ValueError, "pass w.reshape(3, 4, 1, 9)"),
    "a kernel beyond x": (lambda: C(X, np.ones((4, 3, 3, 9))), ValueError, "would be empty on spatial axis 1: (8 + 0 + 0 - 1 * (9 - 1) - 1) // 1 + 1 = 0, from (input + low + high - dilation * (kernel - 1) - 1) // stride + 1 (x (2, 3, 9, 8), w (4, 3, 3, 9), groups=1); w spans 9 there, and the padded x 8"),
    "padding beyond memory": (lambda: C(X, W, padding=2**31 - 1), ValueError, "y would have the shape (2, 4, 4294967301, 4294967300), 1.5e+20 elements, more than memory can have"),
    "a stride beyond memory": (lambda: gpuconv.conv_transpose(Y, W, stride=2**31 - 1), ValueError, "y would have the shape (2, 3, 12884901885, 10737418238)"),
    "empty output": (lambda: C(X, W, dilation=9), ValueError, "(9 + 0 + 0 - 9 * (3 - 1) - 1) // 1 + 1 = -9"),
    "cropped away": (lambda: C(X, W, padding=-4), ValueError, "would be empty on spatial axis 0"),
    "empty x": (lambda: C(np.ones((2, 3, 0, 8)), W), ValueError, "would be empty on spatial axis 0: (0 + 0 + 0"),
    "bias": (lambda: C(X, W, np.ones(3)), ValueError, "b must have one element for each of the 4 output channels, shape (4,), but it has (3,)"),
    "bias of two axes": (lambda: C(X, W, np.ones((1, 4))), ValueError, "b must have"),
    "bias of transposed": (lambda: gpuconv.conv_transpose(Y, W, np.ones(4)), ValueError, "each of the 3 output channels"),
    "dy": (lambda: gpuconv.conv_data_grad(X, W, X.shape), ValueError, "dy must have the shape (2, 4, 7, 6) that x_shape (2, 3, 9, 8) and w (4, 3, 3, 3) give, but it has (2, 3, 9, 8)"),
    "dy of weight_grad": (lambda: gpuconv.conv_weight_grad(Y[:1], X, W.shape), ValueError, "dy must have the shape (2, 4, 7, 6)"),
    "dy of backward": (lambda: gpuconv.conv_backward(Y, X, W, padding=1), ValueError, "dy must have the shape (2, 4, 9, 8)"),
    "dy of transposed backward": (lambda: gpuconv.conv_transpose_backward(Y, Y, W), ValueError, "dy must have the shape (2, 3, 9, 8)"),
    "x_shape channels": (lambda: gpuconv.conv_data_grad(Y, W, (2, 5, 9, 8)), ValueError, "x_shape has 5 channels but w expects 3"),
    "w_shape channels": (lambda: gpuconv.conv_weight_grad(Y, X, (4, 2, 3, 3)), ValueError, "x has 3 channels but w_shape expects 2"),
    "x_shape no shape": (lambda: gpuconv.conv_data_grad(Y, W, 9), TypeError, "x_shape must be a shape"),
    "x_shape an array": (lambda: gpuconv.conv_data_grad(Y, W, X), TypeError, "x_shape must be a shape, not an array; that of this one is (2, 3, 9, 8)"),
    "channels_last data": (lambda: C(np.ones((2, 9, 8, 3)), np.ones((3, 3, 3, 4))), ValueError, "; they fit layout='channels_last'"),
    "data of neither layout": (lambda: C(np.ones((2, 9, 8, 5)), np.ones((3, 3, 3, 4))), ValueError, "x has 9 channels but w expects 3 (x (2, 9, 8, 5), w (3, 3, 3, 4), groups=1)"),
    "channels_last data without other axes alike": (lambda: C(np.ones((2, 9, 8, 6)), np.ones((5, 4, 6, 7))), ValueError, "; they fit layout='channels_last'"),
    "channels_first data without other axes alike": (lambda: C(np.ones((2, 6, 9, 8)), np.ones((7, 6, 5, 4)), layout="channels_last"), ValueError, "; they fit layout='channels_first'"),
    "channels_first data": (lambda: C(X, W, layout="channels_last"), ValueError, "; they fit layout='channels_first'"),
    "x_shape of floats": (lambda: gpuconv.conv_data_grad(Y, W, (2, 3, 9.0, 8)), TypeError, "x_shape must be"),
    "x_shape negative": (lambda: gpuconv.conv_data_grad(Y, W, (2, 3, -9, 8)), ValueError, "x_shape must have no negative extent"),
    "transposed channels": (lambda: gpuconv.conv_transpose(X, W), ValueError, "x has 3 channels but w expects 4"),
    "output_shape too large": (lambda: gpuconv.conv_transpose(Y, W, stride=2, output_shape=(15, 15)), ValueError, "output_shape must be 13 to 14 on spatial axis 1, of which conv makes 6; got 15 (x (2, 4, 7, 6), w (4, 3, 3, 3), groups=1)"),
    "output_shape too small": (lambda: gpuconv.conv_transpose(Y, W, stride=2, padding="same", output_shape=12), ValueError, "output_shape must be 13 to 14 on spatial axis 0"),
    "output_shape of one axis": (lambda: gpuconv.conv_transpose(Y, W, output_shape=(9,)), ValueError, "output_shape must be an int or one int per spatial axis: 2 expected"),
    "output_shape of all axes": (lambda: gpuconv.conv_transpose(Y, W, output_shape=(2, 4, 9, 8)), ValueError, "output_shape must have the 2 spatial extents only, got (2, 4, 9, 8); conv_data_grad(dy, w, x_shape) takes a whole shape"),
    "output_shape beside output_padding": (lambda: gpuconv.conv_transpose(Y, W, stride=2, output_padding=1, output_shape=16), ValueError, "output_padding must be 0 beside output_shape"),
    "output_shape of conv_transpose_backward": (lambda: gpuconv.conv_transpose_backward(X, Y, W, output_shape=10), ValueError, "output_shape must be 9 to 9 on spatial axis 0"),
    "transposed empty": (lambda: gpuconv.conv_transpose(Y, W, padding=9), ValueError, "(7 - 1) * 1 + 1 * (3 - 1) + 1 - 9 - 9 + 0 = -9"),
    # geometry values
    "stride 0": (lambda: C(X, W, stride=0), ValueError, "stride must be at least 1, got 0"),
    "stride of 3 axes": (lambda: C(X, W, stride=(1, 2, 3)), ValueError, "stride must be an int or one int per spatial axis: 2 expected"),
    "stride a float": (lambda: C(X, W, stride=1.0), TypeError, "stride must be made of ints, got 1.0"),
    "stride True": (lambda: C(X, W, stride=True), TypeError, "stride must be made of ints"),
    "stride None": (lambda: C(X, W, stride=None), TypeError, "stride must be made of ints, got None"),
    "stride a name": (lambda: C(X, W, stride="2"), TypeError, "stride must be an int"),
    "stride of floats": (lambda: C(X, W, stride=(1.5, 1)), TypeError, "stride must be made of ints, got 1.5"),
    "dilation -1": (lambda: C(X, W, dilation=(1, -1)), ValueError, "dilation must be at least 1"),
    "groups 0": (lambda: C(X, W, groups=0), ValueError, "groups must be at least 1"),
    "groups a float": (lambda: C(X, W, groups=1.0), TypeError, "groups must be made of ints"),
    "padding name": (lambda: C(X, W, padding="SAME"), ValueError, "valid, same, same_lower, full, causal; got 'SAME'"),
    "padding a float": (lambda: C(X, W, padding=0.5), TypeError, "padding must be made of ints, got 0.5"),
    "padding None": (lambda: C(X, W, padding=None), TypeError, "padding must be made of ints, got None"),
    "padding of 3 axes": (lambda: C(X, W, padding=(1, 1, 1)), ValueError, "padding must have one int or one (low, high) pair per spatial axis: 2 expected"),
    "padding of 1 axis": (lambda: C(X, W, padding=(1,)), ValueError, "per spatial axis: 2 expected, got (1,)"),
    "padding of nested axes": (lambda: C(X, W, padding=((1, 2), (3, 4), (5, 6))), ValueError, "2 expected, got ((1, 2), (3, 4), (5, 6))"),
    "padding of pairs, one short": (lambda: C(X, W, padding=((1, 2), (1,))), ValueError, "padding must be ints or (low, high) pairs throughout"),
    "padding mixed": (lambda: C(X, W, padding=(1, (1, 2))), ValueError, "padding must be ints or (low, high) pairs throughout"),
    "padding of triples": (lambda: C(X, W, padding=((1, 2, 3), (1, 2, 3))), ValueError, "padding must be ints or (low, high) pairs"),
    "bare pair in 1-D": (lambda: C(X[0], np.ones((4, 9, 3)), padding=(1, 2)), ValueError, "low and high of each axis are written ((1, 2),)"),
    "bare pairs in 2-D": (lambda: C(X, W, padding=(1, 1, 2, 2)), ValueError, "got (1, 1, 2, 2); low and high of each axis are written ((1, 1), (2, 2))"),
    "bare pairs in 1-D": (lambda: C(X[0], np.ones((4, 9, 3)), padding=((1, 2), (3, 4))), ValueError, "1 expected, got ((1, 2), (3, 4))"),
    "stride beyond any array": (lambda: C(X, W, stride=2**62), ValueError, "stride must be between -2147483647 and 2147483647"),
    "too many axes": (lambda: C(np.ones((1,) * 33), np.ones((1,) * 33)), ValueError, "w must have at most 28 spatial axes"),
    "causal in 2-D": (lambda: C(X, W, padding="causal"), ValueError, "padding='causal' is for one spatial axis"),
    "layout": (lambda: C(X, W, layout="NCHW"), ValueError, "layout must be one of channels_first, channels_last; got 'NCHW'"),
    "flip": (lambda: C(X, W, flip=1), TypeError, "flip must be True or False, got 1"),
    "output_padding": (lambda: gpuconv.conv_transpose(Y, W, stride=2, output_padding=2), ValueError, "output_padding must be less than max(stride, dilation) = 2, got 2"),
    "output_padding -1": (lambda: gpuconv.conv_transpose(Y, W, output_padding=-1), ValueError, "output_padding must be at least 0"),
    "output_padding beside same": (lambda: gpuconv.conv_transpose(Y, W, stride=2, padding="same", output_padding=1), ValueError, "output_padding must be 0 beside padding='same'"),
    "transposed full": (lambda: gpuconv.conv_transpose(Y, W, padding="full"), ValueError, "padding='full' has no meaning for a transposed convolution"),
    # options
    "algorithm": (lambda: C(X, W, algorithm="magic"), ValueError, f"algorithm must be one of auto, {', '.join(gpuconv.ALGORITHMS)}; got 'magic'"),
    "algorithm None": (lambda: C(X, W, algorithm=None), ValueError, "algorithm must be one of"),
    "precision": (lambda: C(X, W, precision="fp8"), ValueError, "precision must be one of ieee, tf32, tf32x3"),
    "deterministic": (lambda: C(X, W, deterministic=1), TypeError, "deterministic must be True, False or None"),
    "activation": (lambda: C(X, W, activation="gelu"), ValueError, "activation must be None or one of relu, leaky_relu, sigmoid, tanh; got 'gelu'"),
    "activation a callable": (lambda: C(X, W, activation=np.tanh), ValueError, "activation must be None or one of"),
    "activation of complex": (lambda: C(X, W + 0j, activation="relu"), TypeError, "activation='relu' needs a real dtype, but the result is complex128"),
    "activation without y": (lambda: gpuconv.conv_backward(Y, X, W, activation="relu"), ValueError, "activation='relu' needs y"),
    "y of another shape": (lambda: gpuconv.conv_backward(Y, X, W, activation="relu", y=X), ValueError, "y must have the shape (2, 4, 7, 6)"),
    "y complex": (lambda: gpuconv.conv_backward(Y, X, W, activation="relu", y=Y + 0j), TypeError, "activation='relu' needs a real y"),
    "y a list": (lambda: gpuconv.conv_backward(Y, X, W, activation="relu", y=[1]), TypeError, "y must be a numpy.ndarray"),
    "needs": (lambda: gpuconv.conv_backward(Y, X, W, needs=("dx", "dz")), ValueError, "needs must be among dx, dw, db; got 'dz'"),
    "needs one name": (lambda: gpuconv.conv_backward(Y, X, W, needs="dy"), ValueError, "needs must be among"),
    "needs a number": (lambda: gpuconv.conv_backward(Y, X, W, needs=1), TypeError, "needs must be among"),
    # kinds and dtypes
    "x a list": (lambda: C([[1.0]], W), TypeError, "x must be a numpy.ndarray or a cupy.ndarray, not list"),
    "w None": (lambda: C(X, None), TypeError, "w must be a numpy.ndarray or a cupy.ndarray, not NoneType"),
    "x None": (lambda: C(None, W), TypeError, "x must be a numpy.ndarray"),
    "dy None": (lambda: gpuconv.conv_backward(None, X, W), TypeError, "dy must be a numpy.ndarray"),
    "x masked": (lambda: C(np.ma.ones(X.shape), W), TypeError, "x must be a numpy.ndarray or a cupy.ndarray, not numpy.ma.MaskedArray; x.filled(0) is one, in which masked elements count as zeros"),
    "x a matrix": (lambda: C(np.matrix([[1.0]]), W), TypeError, "x must be a numpy.ndarray or a cupy.ndarray, not numpy.matrix"),
    "b a scalar": (lambda: C(X, W, 1.0), TypeError, "b must be a numpy.ndarray"),
    "x of ints": (lambda: C(X.astype(int), W), TypeError, "x must be one of float16, bfloat16, float32, float64, complex64, complex128, not int64; x.astype('float64') keeps integers up to 2**53, 'float32' up to 2**24"),
    "w of bools": (lambda: C(X, W > 0), TypeError, "w must be one of"),
    "x of long doubles": (lambda: C(X.astype(np.longdouble), W), TypeError, "x must be one of float16"),
    "x of objects": (lambda: C(X.astype(object), W), TypeError, "x must be one of float16"),
    "b of ints": (lambda: C(X, W, np.ones(4, int)), TypeError, "b must be one of"),
    # out
    "out shape": (lambda: C(X, W, out=np.empty((2, 4, 7, 7))), ValueError, "out must have the shape (2, 4, 7, 6), but it has (2, 4, 7, 7)"),
    "out dtype": (lambda: C(X, W, out=np.empty(Y.shape, np.float32)), TypeError, "out must have the dtype of the result, float64, not float32"),
    "out byte order": (lambda: C(X, W, out=np.empty(Y.shape, ">f8")), TypeError, "out must have the dtype of the result"),
    "out a list": (lambda: C(X, W, out=[]), TypeError, "out must be a numpy.ndarray"),
    "out masked": (lambda: C(X, W, out=np.ma.empty(Y.shape)), TypeError, "out must be a numpy.ndarray"),
    "out read-only": (lambda: C(X, W, out=np.broadcast_to(1.0, Y.shape)), ValueError, "out must be writeable"),
    "out over x": (lambda: C(X, W[:3], padding=1, out=X), ValueError, "out must not overlap x in memory"),
    "out over part of w": (lambda: gpuconv.conv_weight_grad(Y, X, W.shape, out=Y.reshape(-1)[:108].reshape(W.shape)), ValueError, "out must not overlap dy in memory"),
    "out over b": (lambda: C(X[:1, :, :3, :3], W, B, out=B.reshape(1, 4, 1, 1)), ValueError, "out must not overlap b in memory"),
    "out over itself": (lambda: C(X, W, out=np.lib.stride_tricks.as_strided(np.ones(9), Y.shape, (0, 8, 0, 0))), ValueError, "out must not overlap itself"),
    # others
    "matrix of half": (lambda: gpuconv.conv_matrix(W.astype(np.float16), X.shape), TypeError, "w must be one of float32, float64, complex64, complex128"),
    "matrix channels": (lambda: gpuconv.conv_matrix(W, (2, 5, 9, 8)), ValueError, "x_shape has 5 channels but w expects 3"),
    "explain direction": (lambda: gpuconv.explain(X.shape, W.shape, direction="backward"), ValueError, "direction must be one of forward, data_grad, weight_grad"),
    "explain dtype": (lambda: gpuconv.explain(X.shape, W.shape, dtype="int8"), TypeError, "dtype must be one of"),
    "explain channels": (lambda: gpuconv.explain((2, 5, 9, 8), W.shape), ValueError, "x_shape has 5 channels but w_shape expects 3"),
    "explain backend": (lambda: gpuconv.explain(X.shape, W.shape, backend="tpu"), ValueError, "backend must be one of auto, numpy, cupy"),
    "backend": (lambda: gpuconv.set_backend("tpu"), ValueError, "backend must be one of auto, numpy, cupy; got 'tpu'"),
    "backend context": (lambda: gpuconv.backend(1), ValueError, "backend must be one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_bad_input_is_refused_in_words(name):
    call, exception, phrase = BAD[name]
    with pytest.raises(exception) as caught:
        call()
    assert caught.type is exception
    assert phrase in str(caught.value)


@pytest.mark.parametrize(
    "x, layout, hint",
    [
        ((2, 9, 8, 5), "channels_first", ""),
        ((2, 9, 8, 2), "channels_first", ""),
        ((2, 9, 8, 3), "channels_first", "channels_last"),
    ],
)
def test_the_other_layout_is_named_where_the_shapes_fit_it(x, layout, hint):
    with pytest.raises(ValueError, match="x has 9 channels but w expects 3") as caught:
        C(np.ones(x), np.ones((3, 3, 3, 4)), layout=layout)
    assert str(caught.value).partition("they fit layout=")[2] == (repr(hint) if hint else "")


@pytest.mark.parametrize("function", [gpuconv.conv, gpuconv.conv_transpose])
def test_a_bool_is_no_int_even_where_the_int_is_known(function):
    x, w = np.ones((1, 1, 4)), np.ones((1, 1, 2))
    function(x, w, stride=1)
    with pytest.raises(TypeError, match="stride must be made of ints, got True"):
        function(x, w, stride=True)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 1, 3)])
def test_arrays_whose_elements_share_memory_are_recognised(shape, rng):
    memory = np.zeros(64)
    for _ in range(100):
        strides = tuple(8 * int(step) for step in rng.integers(0, 7, len(shape)))
        array = np.lib.stride_tricks.as_strided(memory, shape, strides)
        places = [sum(map(operator.mul, index, strides)) for index in np.ndindex(shape)]
        assert _overlaps_itself(array) == (len(set(places)) < len(places))


@pytest.mark.parametrize("padding, is_bare", [((1, 2), True), (((1, 2), (3, 4)), False), ((1, 2, 3), False)])
def test_a_pair_is_recognised_where_one_axis_is_padded(padding, is_bare):
    with pytest.raises(ValueError, match="1 expected") as caught:
        C(X[0], np.ones((4, 9, 3)), padding=padding)
    assert ("low and high of each axis are written" in str(caught.value)) == is_bare


@pytest.mark.parametrize(
    "variable, value",
    [
        ("GPUCONV_BACKEND", "gpu"),
        ("GPUCONV_DETERMINISTIC", "maybe"),
        ("GPUCONV_PRECISION", "double"),
        ("CUPY_TF32", "perhaps"),
        ("GPUCONV_WORKSPACE_LIMIT", "lots"),
        ("GPUCONV_WORKSPACE_LIMIT", "-1"),
        ("GPUCONV_WORKSPACE_LIMIT", "9" * 400),
        ("GPUCONV_WORKSPACE_LIMIT", "10 PiB"),
    ],
)
def test_a_variable_that_cannot_be_read_is_named_with_its_value(variable, value, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=variable) as caught:
        C(X, W)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", ["1048576", "1MiB", "1 mib", "1024KiB", "0.5MiB", "1GB", "64b", ""])
def test_workspace_limits_that_can_be_read(value, monkeypatch):
    monkeypatch.setenv("GPUCONV_WORKSPACE_LIMIT", value)
    np.testing.assert_array_equal(C(X, W), np.full(Y.shape, 27.0))


@pytest.mark.parametrize("value", ["1", "0", "true", "FALSE", " yes ", "No", "on", "off"])
def test_booleans_that_can_be_read(value, monkeypatch):
    monkeypatch.setenv("GPUCONV_DETERMINISTIC", value)
    C(X, W)


def test_out_and_inputs_are_untouched_when_a_call_is_refused():
    out = np.full(Y.shape, 5.0)
    x, w = X.copy(), W.copy()
    for bad in (
        {"stride": 2},
        {"algorithm": "magic"},
        {"activation": "gelu"},
        {"precision": "x"},
        {"deterministic": "x"},
    ):
        with pytest.raises((ValueError, TypeError)):
            C(x, w, out=out, **bad)
    assert (out == 5).all()
    assert (x == X).all()
    assert (w == W).all()


def test_out_whose_elements_interlace_is_taken():
    out = np.lib.stride_tricks.as_strided(np.zeros(20), (1, 3, 2), (0, 16, 24))
    np.testing.assert_array_equal(C(np.ones((1, 3, 2)), np.ones((3, 3, 1)), out=out), np.full((1, 3, 2), 3.0))


def test_interleaved_arrays_do_not_overlap():
    room = np.ones((2, 3, 9, 16))
    x, out = room[..., ::2], room[..., 1::2]
    w = np.ones((3, 3, 1, 1))
    assert C(x, w, out=out) is out
    assert (out == 3).all()
    assert (x == 1).all()
