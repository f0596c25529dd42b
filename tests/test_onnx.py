"""Compute ONNX's own tests with gpuconv.compat.onnx, and compare every attribute with the reference."""

import contextlib
import functools
import importlib
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from tests import reference, tiers
from tests.cases import draw, named_dtype
from tests.tiers import combinations

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
from onnx import helper, inliner, numpy_helper, parser  # noqa: E402
from onnx.backend.test.case import node as node_cases  # noqa: E402
from onnx.backend.test.loader import load_model_tests  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

from gpuconv.compat.onnx import OPS  # noqa: E402

NAMES = {"Conv", "ConvTranspose"}
VERSIONS = (1, 11, 22, onnx.defs.onnx_opset_version())
LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"
LIGHT_MODELS = sorted(path.stem for path in LIGHT.glob("*.onnx")) if tiers.full else ["light_resnet50"]
NOT_REPRODUCED = {  # whatever computes the convolutions
    "light_densenet121": "the evaluator's BatchNormalization deviates from that of onnxruntime",
    "light_squeezenet": "the evaluator's Softmax is that of operator set 13, for every model",
}


@pytest.fixture
def ran(monkeypatch):
    """The names of the operators of gpuconv that have run, in order."""
    names = []

    def counted(operator):
        run = operator._run

        @functools.wraps(run)
        def counting(self, *inputs, **attributes):
            names.append(operator.__name__)
            return run(self, *inputs, **attributes)

        return counting

    for operator in OPS:
        monkeypatch.setattr(operator, "_run", counted(operator))
    return names


def operators(model):
    return [node.op_type for node in model.graph.node if node.op_type in NAMES]


def cases_of_nodes():
    """Yield ONNX's tests of single operators that have a convolution, or a function that consists of some."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other libraries
        for name in ("conv", "convtranspose", "causal_conv_with_state"):
            with contextlib.suppress(ModuleNotFoundError):  # in an older version
                importlib.import_module(f"{node_cases.__name__}.{name}")
    for case in node_cases._NodeTestCases:
        if operators(case.model):
            yield pytest.param(case, case.model, case.data_sets, id=case.name)


def cases_of_models():
    """Yield the models in the package that have a convolution, with their inputs and outputs."""
    for kind in ("pytorch-converted", "pytorch-operator", "simple"):
        for case in sorted(load_model_tests(kind=kind), key=lambda case: case.name):
            model = onnx.load(Path(case.model_dir, "model.onnx"))
            if operators(model):
                folders = Path(case.model_dir).glob("test_data_set_*")
                sets = [[arrays_in(folder, "input"), arrays_in(folder, "output")] for folder in folders]
                yield pytest.param(case, model, sets, id=case.name)


def names_of_inputs(evaluator):
    """Return the inputs of a model; older ones list their constants, too."""
    return [name for name in evaluator.input_names if name not in evaluator.rt_inits_]


def arrays_in(folder, kind):
    return [array_in(folder / f"{kind}_{number}.pb") for number in range(len(list(folder.glob(f"{kind}_*.pb"))))]


def array_in(path):
    return numpy_helper.to_array(onnx.load_tensor(path))


def assert_similar(found, expected, rtol, atol):
    """Assert what ONNX asserts of a backend, and that NaN fails."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol, equal_nan=False)


@pytest.mark.parametrize("case, model, sets", [*cases_of_nodes(), *cases_of_models()])
def test_onnxs_own_tests(case, model, sets, ran):
    evaluator = ReferenceEvaluator(model, new_ops=OPS)
    assert sets
    names = names_of_inputs(evaluator)
    for inputs, outputs in sets:
        found = evaluator.run(None, dict(zip(names, inputs, strict=True)))
        for one, expected in zip(found, outputs, strict=True):
            assert_similar(one, expected, case.rtol, case.atol)
    assert ran == operators(model) * len(sets)


@pytest.mark.called_once("they are large")
@pytest.mark.parametrize("name", LIGHT_MODELS)
def test_onnxs_networks(name, ran):
    if name in NOT_REPRODUCED:
        pytest.skip(NOT_REPRODUCED[name])
    model = onnx.load(LIGHT / f"{name}.onnx")
    evaluator = ReferenceEvaluator(model, new_ops=OPS)
    (name_of_input,) = names_of_inputs(evaluator)
    image = np.arange(3 * 224 * 224).reshape(1, 3, 224, 224) / (3 * 224 * 224)
    (found,) = evaluator.run(None, {name_of_input: image.astype(np.float32)})
    assert_similar(found, array_in(LIGHT / f"{name}_output_0.pb"), rtol=2e-3, atol=1e-7)
    assert ran == operators(model)


def evaluated(operator, X, W, B=None, version=22, **attributes):  # noqa: N803
    """Return the result of a model of one operator."""
    inputs = {"X": X, "W": W} | ({} if B is None else {"B": B})
    dtype = helper.np_dtype_to_tensor_dtype(X.dtype)
    *values, result = (helper.make_tensor_value_info(name, dtype, None) for name in (*inputs, "Y"))
    graph = helper.make_graph([helper.make_node(operator, [*inputs], ["Y"], **attributes)], "g", values, [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)])
    return ReferenceEvaluator(model, new_ops=OPS).run(None, inputs)[0]


def split(total, auto_pad):
    """Return the halves of a padding; SAME_UPPER has the larger one at the end."""
    return (total // 2, (total + 1) // 2) if auto_pad == "SAME_UPPER" else ((total + 1) // 2, total // 2)


def settings_of(attributes, rank):
    """Return strides, dilations, (start, end) of each axis and the group of a node."""
    ones, pads = [1] * rank, attributes.get("pads", [0] * 2 * rank)
    pairs = list(zip(pads[:rank], pads[rank:], strict=True))
    return attributes.get("strides", ones), attributes.get("dilations", ones), pairs, attributes.get("group", 1)


def expected_conv(x, w, attributes):
    """Compute Conv as the specification has it."""
    strides, dilations, pads, group = settings_of(attributes, x.ndim - 2)
    auto_pad = attributes.get("auto_pad", "NOTSET")
    if auto_pad.startswith("SAME"):
        axes = zip(x.shape[2:], w.shape[2:], strides, dilations, strict=True)
        totals = [max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0) for n, k, s, d in axes]
        pads = [split(total, auto_pad) for total in totals]
    return reference.forward(x, w, strides, pads, dilations, group)


def expected_conv_transpose(x, w, attributes):
    """Compute ConvTranspose as the specification has it: the sums without padding, then what of them is returned."""
    strides, dilations, pads, group = settings_of(attributes, x.ndim - 2)
    auto_pad, extra = attributes.get("auto_pad", "NOTSET"), attributes.get("output_padding", [0] * len(pads))
    axes = list(zip(x.shape[2:], w.shape[2:], strides, dilations, strict=True))
    sums = [s * (n - 1) + d * (k - 1) + 1 for n, k, s, d in axes]
    whole = reference.data_grad(
        x, w, (len(x), w.shape[1] * group, *sums), strides, [(0, 0)] * len(pads), dilations, group
    )
    sizes = [n + more - sum(pair) for n, more, pair in zip(sums, extra, pads, strict=True)]
    if auto_pad.startswith("SAME") or "output_shape" in attributes:
        sizes = attributes.get("output_shape", [n * s for n, _, s, _ in axes])
        totals = [n + more - size for n, more, size in zip(sums, extra, sizes, strict=True)]
        pads = [split(max(total, 0), auto_pad) for total in totals]
    y = np.zeros((*whole.shape[:2], *sizes))
    kept = whole[(..., *(slice(low, low + size) for (low, _), size in zip(pads, sizes, strict=True)))]
    y[tuple(map(slice, kept.shape))] = kept
    return y


BOTH = {
    "nothing": ((2, 3, 6, 5), (4, 3, 3, 2), {}),
    "1-D": ((2, 2, 9), (3, 2, 4), {"strides": [2], "pads": [2, 1], "kernel_shape": [4]}),
    "3-D": ((1, 2, 4, 5, 3), (2, 2, 2, 3, 1), {"strides": [2, 1, 3], "pads": [1, 0, 0, 0, 2, 0]}),
    "4-D": ((1, 2, 3, 2, 3, 3), (2, 2, 2, 2, 1, 2), {"pads": [0, 1, 0, 0, 1, 0, 0, 0]}),
    "group": ((2, 4, 6, 5), (6, 2, 3, 3), {"group": 2, "dilations": [2, 1], "auto_pad": "NOTSET"}),
    "VALID": ((1, 3, 6, 7), (2, 3, 3, 2), {"auto_pad": "VALID", "strides": [2, 3]}),
    "SAME_UPPER": ((1, 3, 6, 7), (2, 3, 4, 2), {"auto_pad": "SAME_UPPER", "strides": [2, 1]}),
    "SAME_LOWER": ((1, 3, 6, 7), (2, 3, 4, 2), {"auto_pad": "SAME_LOWER", "strides": [1, 1]}),
    "SAME_UPPER dilated": ((1, 2, 9), (2, 2, 4), {"auto_pad": "SAME_UPPER", "strides": [2], "dilations": [3]}),
    "SAME_LOWER dilated": ((1, 2, 9), (2, 2, 4), {"auto_pad": "SAME_LOWER", "strides": [3], "dilations": [2]}),
    "SAME_UPPER strided far": ((1, 2, 8, 3), (2, 2, 1, 2), {"auto_pad": "SAME_UPPER", "strides": [4, 3]}),
    "SAME_LOWER strided far": ((1, 2, 8, 3), (2, 2, 1, 2), {"auto_pad": "SAME_LOWER", "strides": [4, 3]}),
}
TRANSPOSED = {
    "output_padding": ((1, 2, 4, 3), (2, 3, 3, 2), {"strides": [3, 2], "output_padding": [2, 1], "pads": [1, 0, 0, 1]}),
    "dilated output_padding": ((1, 2, 4), (2, 3, 3), {"dilations": [3], "output_padding": [2]}),
    "SAME output_padding": ((1, 2, 4), (2, 3, 3), {"auto_pad": "SAME_UPPER", "strides": [2], "output_padding": [1]}),
    "output_shape": ((2, 4, 3, 4), (4, 3, 3, 2), {"strides": [2, 3], "output_shape": [6, 8], "group": 2}),
    "VALID output_shape": ((1, 2, 3, 4), (2, 3, 3, 4), {"output_shape": [4, 4], "auto_pad": "VALID"}),
    "SAME_UPPER output_shape": ((1, 2, 3, 4), (2, 3, 3, 4), {"output_shape": [4, 4], "auto_pad": "SAME_UPPER"}),
    "SAME_LOWER output_shape": ((1, 2, 3, 4), (2, 3, 3, 4), {"output_shape": [4, 4], "auto_pad": "SAME_LOWER"}),
    "long output_shape": ((1, 2, 3), (2, 3, 2), {"strides": [4], "output_shape": [13], "auto_pad": "SAME_UPPER"}),
    "pads beside output_shape": ((1, 2, 3), (2, 3, 2), {"strides": [2], "output_shape": [5], "pads": [2, 1]}),
    "output_padding in output_shape": (
        (1, 2, 3),
        (2, 3, 2),
        {"strides": [3], "output_shape": [7], "output_padding": [2]},
    ),
}


@combinations(
    name=[*BOTH, *TRANSPOSED],
    operator=["Conv", "ConvTranspose"],
    version=VERSIONS,
    dtype=["float16", "bfloat16", "float32", "float64"],
    has_bias=[False, True],
    turns=["version", "dtype", "has_bias"],
    where=lambda name, operator, version, dtype, **_: (
        (name in BOTH or operator == "ConvTranspose") and (dtype != "bfloat16" or version >= 22)
    ),
)
def test_attributes(name, operator, version, dtype, has_bias, ran, rng):
    x_shape, w_shape, attributes = {**BOTH, **TRANSPOSED}[name]
    if name in BOTH and operator == "ConvTranspose":  # the axes of C and M / group of W are exchanged
        group = attributes.get("group", 1)
        w_shape = (x_shape[1], w_shape[0] // group, *w_shape[2:])
    x, w = (draw(rng, shape, dtype, True) for shape in (x_shape, w_shape))
    y = {"Conv": expected_conv, "ConvTranspose": expected_conv_transpose}[operator](x, w, attributes)
    B = None  # noqa: N806
    if has_bias:
        b = rng.integers(-3, 4, y.shape[1]).astype(float)
        y, B = y + b.reshape(-1, *(1,) * (y.ndim - 2)), b.astype(named_dtype(dtype))  # noqa: N806
    X, W = (array.astype(named_dtype(dtype)) for array in (x, w))  # noqa: N806
    found = evaluated(operator, X, W, B, version, **attributes)
    assert found.dtype == named_dtype(dtype)
    np.testing.assert_array_equal(found.astype(float), y.astype(found.dtype).astype(float))
    assert ran == [operator]


@pytest.mark.gpu
@pytest.mark.parametrize("operator", ["Conv", "ConvTranspose"])
def test_on_a_gpu(operator, monkeypatch, rng):
    monkeypatch.setenv("GPUCONV_BACKEND", "cupy")
    x, w = (draw(rng, shape, "float32", True) for shape in ((2, 3, 6, 5), (3, 3, 3, 2)))
    attributes = {"auto_pad": "SAME_LOWER", "strides": [2, 1]}
    y = {"Conv": expected_conv, "ConvTranspose": expected_conv_transpose}[operator](x, w, attributes)
    found = evaluated(operator, x.astype("f"), w.astype("f"), **attributes)
    assert type(found) is np.ndarray
    np.testing.assert_array_equal(found, y)


def test_in_a_subgraph_and_in_an_inlined_function(ran):
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17, "own" : 1]>
        g (bool c, float[1, 1, N] x, float[1, 1, K] w) => (float[1, 1, M] y) {
            z = own.twice (x, w)
            y = If (c) <then_branch = t () => (float[1, 1, M] a) { a = Conv <pads = [1, 0]> (z, w) },
                        else_branch = e () => (float[1, 1, M] b) { b = Identity (z) }>
        }
        <domain: "own", opset_import: ["" : 17]>
        twice (x, w) => (y) { a = Conv (x, w)  y = ConvTranspose (a, w) }
    """)
    x, w = np.array([[[1, 2, 3]]], "float32"), np.array([[[1, 2]]], "float32")
    evaluator = ReferenceEvaluator(inliner.inline_local_functions(model), new_ops=OPS)
    (y,) = evaluator.run(None, {"c": np.array(True), "x": x, "w": w})
    np.testing.assert_array_equal(y, [[[10, 41, 50]]])
    assert ran == ["Conv", "ConvTranspose", "Conv"]


X, W, B = np.ones((2, 4, 6, 6)), np.ones((4, 4, 3, 3)), np.ones(4)
ERRORS = {
    "auto_pad": ({"auto_pad": "SAME"}, "auto_pad must be one of NOTSET, VALID, SAME_UPPER, SAME_LOWER; got 'SAME'"),
    "pads": (
        {"auto_pad": "VALID", "pads": [0] * 4},
        r"pads must be absent beside auto_pad='VALID', got \[0, 0, 0, 0\]",
    ),
    "pads' number": ({"pads": [1, 1]}, r"pads must have a start and an end for each of 2 spatial axes, got \[1, 1\]"),
    "negative pads": ({"pads": [1, 1, -1, 1]}, "pads must be at least 0"),
    "kernel_shape": ({"kernel_shape": [3, 2]}, r"kernel_shape must be that of W, \(3, 3\), but it is \(3, 2\)"),
    "kernel_shape's rank": ({"kernel_shape": [3]}, r"kernel_shape must be that of W, \(3, 3\), but it is \(3,\)"),
    "strides": ({"strides": [1]}, "strides must be an int or one int per spatial axis: 2 expected"),
    "dilations": ({"dilations": [1, 0]}, "dilations must be at least 1"),
    "group": ({"group": 3}, "group must divide the channels of X, but 3 does not divide 4"),
    "channels": ({"X": X[:, :3]}, "X has 3 channels but W expects 4"),
    "axes": ({"X": X[0]}, r"X and W must have equally many axes, at least 3 \(X \(4, 6, 6\), W \(4, 4, 3, 3\)\)"),
    "batches": ({"X": X[None]}, "X and W must have equally many axes"),
    "no spatial axis": ({"X": X[..., 0, 0], "W": W[..., 0, 0]}, "at least 3"),
    "B": ({"B": B[:3]}, "B must have one element for each of the 4 output channels"),
}
ERRORS_OF_TRANSPOSED = {
    "output_padding": ({"output_padding": [1, 1]}, r"output_padding must be less than max\(strides, dilations\) = 1"),
    "output_padding's number": ({"output_padding": [0]}, "output_padding must be an int or one int per spatial axis"),
    "output_shape": ({"output_shape": [8, 9]}, "output_shape must be less than 9 on spatial axis 1, .* got 9"),
    "output_shape of all axes": ({"output_shape": [2, 4, 8, 8]}, "output_shape must be an int or one int per spatial"),
    "no output": ({"pads": [4, 0, 4, 0]}, "Y would be empty on spatial axis 0"),
}


@pytest.mark.parametrize(
    "operator, change, message",
    [(op, *e) for op in ("Conv", "ConvTranspose") for e in ERRORS.values()]
    + [("ConvTranspose", *e) for e in ERRORS_OF_TRANSPOSED.values()],
)
def test_what_onnx_does_not_permit(operator, change, message):
    with pytest.raises(ValueError, match=message):
        evaluated(operator, **({"X": X, "W": W, "B": B} | change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"W": W.astype("f")}, r"X, W and B must have the same dtype: .* \(X float64, W float32, B float64\)"),
        ({"X": X + 0j, "W": W + 0j, "B": B + 0j}, "float16, bfloat16, float32 or float64"),
        ({"X": X.astype(int)}, "X must be one of float16"),
    ],
)
def test_dtypes_that_onnx_does_not_permit(change, message):
    with pytest.raises(TypeError, match="Issues with types") as caught:
        evaluated("Conv", **({"X": X, "W": W, "B": B} | change))
    with pytest.raises(TypeError, match=message):
        raise caught.value.__cause__


def test_the_extra_is_named_where_onnx_is_not_installed():
    code = "import sys; sys.modules['onnx'] = None; import gpuconv; import gpuconv.compat.onnx"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: gpuconv.compat.onnx needs onnx: pip install 'gpuconv[onnx]'" in ran.stderr
