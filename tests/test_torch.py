"""Compare gpuconv.torch with PyTorch's convolutions, and its gradients with finite differences."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpuconv.geometry import Geometry
from tests import reference, repeat, tiers
from tests.cases import CASES, draw, named_dtype
from tests.tiers import combinations

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
gpuconv_torch = pytest.importorskip("gpuconv.torch")
repeat.install_torch()

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")  # raised by PyTorch for its first dual number

FUNCTIONS = {"conv": gpuconv_torch.conv, "conv_transpose": gpuconv_torch.conv_transpose}
SETTINGS = {
    "plain": ((2, 2, 3, 4), (3, 2, 2, 3), {}),
    "strided": ((1, 2, 5, 4), (2, 2, 2, 3), {"stride": (2, 1), "padding": 1, "dilation": (1, 2)}),
    "groups": ((1, 4, 5), (4, 2, 3), {"padding": ((0, 2),), "groups": 2}),
    "flipped, channels_last": ((2, 3, 3, 2), (2, 2, 2, 2), {"layout": "channels_last", "flip": True}),
    "no batch": ((2, 4, 4), (2, 2, 3, 3), {"padding": "same"}),
    "padding mode": ((1, 2, 4, 3), (2, 2, 2, 3), {"padding": ((2, 1), (0, 2)), "stride": 2, "padding_mode": "reflect"}),
    "output padding": ((1, 2, 3), (2, 2, 2), {"stride": 3, "dilation": 2, "output_padding": 2}),
    "output shape": ((1, 2, 3), (2, 2, 2), {"stride": 3, "output_shape": 10}),
}
WAYS = [
    *(("conv", name) for name in SETTINGS if not name.startswith("output")),
    *(("conv_transpose", name) for name in SETTINGS if name not in ("plain", "no batch", "padding mode")),
]


def tensors(rng, *shapes, dtype="float64", needs=True):
    made = (torch.from_numpy(draw(rng, shape, dtype, False).astype(dtype)) for shape in shapes)
    return [tensor.requires_grad_(needs) for tensor in made]


def parts(name, function, rng, dtype):
    """Return a function of x, w and b with settings, and tensors for it."""
    x, w, settings = SETTINGS[name]
    call = FUNCTIONS[function]
    channels_last = settings.get("layout") == "channels_last"
    if function == "conv":
        filters = w[-1] if channels_last else w[0]
    else:
        filters = (w[-2] if channels_last else w[1]) * settings.get("groups", 1)
    return (lambda x, w, b: call(x, w, b, **settings)), tensors(rng, x, w, (filters,), dtype=dtype)


@pytest.mark.called_once("differences make hundreds of calls")
@combinations(way=WAYS, dtype=["float64", "complex128"], turns=["dtype"])
def test_gradients_and_their_gradients(way, dtype, rng):
    function, name = way
    call, inputs = parts(name, function, rng, dtype)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=not tiers.full)


@combinations(case=[case for case in CASES if len(case.x) <= 5], dtype=["float32", "complex64"], turns=["dtype"])
def test_values_and_gradients_are_exact(case, dtype, rng):
    x, w = (draw(rng, shape, dtype, True) for shape in (case.x, case.w))
    X, W = (torch.from_numpy(a.astype(dtype)).requires_grad_() for a in (x, w))  # noqa: N806
    y = gpuconv_torch.conv(X, W, **case.settings)
    exact = case.stride, case.padding, case.dilation, case.groups, case.flip
    np.testing.assert_array_equal(y.detach().numpy(), reference.forward(x, w, *exact))
    dy = draw(rng, tuple(y.shape), dtype, True)
    y.backward(torch.from_numpy(dy.astype(dtype)))
    np.testing.assert_array_equal(X.grad.numpy(), reference.data_grad(dy, w, case.x, *exact))
    np.testing.assert_array_equal(W.grad.numpy(), reference.weight_grad(dy, x, case.w, *exact))


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
@pytest.mark.parametrize(
    "shapes", [((2, 3, 9), (4, 3, 5)), ((2, 3, 6, 7), (4, 3, 3, 3)), ((1, 2, 4, 5, 6), (3, 2, 3, 3, 3))]
)
def test_padding_modes_are_pytorchs(shapes, mode, rng):
    x, w = (torch.from_numpy(draw(rng, shape, "float64", True)) for shape in shapes)
    mine, theirs = ([t.clone().requires_grad_() for t in (x, w)] for _ in range(2))
    rank = x.ndim - 2
    padded = torch.nn.functional.pad(theirs[0], [2, 3] * rank, mode)
    expected = getattr(torch.nn.functional, f"conv{rank}d")(padded, theirs[1], stride=2)
    y = gpuconv_torch.conv(*mine, stride=2, padding=((2, 3),) * rank, padding_mode=mode)
    for one in (y, expected):
        (one * one).sum().backward()
    for one, other in zip((y, *(t.grad for t in mine)), (expected, *(t.grad for t in theirs)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stride, padding, output_padding", [(1, 0, 0), (2, 1, 1), (3, 2, 2)])
def test_the_transposed_one_is_pytorchs(stride, padding, output_padding, rng):
    x, w, b = (torch.from_numpy(draw(rng, s, "float64", True)) for s in ((2, 4, 5, 6), (4, 3, 3, 2), (3,)))
    settings = {"stride": stride, "padding": padding, "output_padding": output_padding}
    mine = [t.clone().requires_grad_() for t in (x, w, b)]
    theirs = [t.clone().requires_grad_() for t in (x, w, b)]
    y, expected = (
        gpuconv_torch.conv_transpose(*mine, **settings),
        torch.nn.functional.conv_transpose2d(*theirs, **settings),
    )
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    for one in (y, expected):
        (one * one).sum().backward()
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0)


def test_a_step_of_training_is_pytorchs(rng):
    """There are two layers, and everything between them is PyTorch's."""
    x, target = torch.from_numpy(rng.standard_normal((4, 3, 8, 8))), torch.from_numpy(rng.standard_normal((4, 2, 8, 8)))
    start = [torch.from_numpy(rng.standard_normal(s)) for s in ((5, 3, 3, 3), (5,), (2, 5, 3, 3), (2,))]
    steps = []
    for conv in (gpuconv_torch.conv, torch.nn.functional.conv2d):
        weights = [w.clone().requires_grad_() for w in start]
        optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            hidden = torch.relu(conv(x, weights[0], weights[1], padding=1))
            loss = torch.nn.functional.mse_loss(conv(hidden, weights[2], weights[3], padding=1), target)
            loss.backward()
            optimizer.step()
        steps.append((loss, weights))
    torch.testing.assert_close(*steps)


def test_only_what_is_needed_is_computed(rng, monkeypatch):
    x, w, b = tensors(rng, (2, 3, 5, 5), (4, 3, 3, 3), (4,), needs=False)
    computed = []
    problem = gpuconv_torch._Convolution
    original = problem.computed
    monkeypatch.setattr(problem, "computed", lambda *a: computed.append(a[1]) or original(*a))
    for needs, expected in (
        ((x,), ["data_grad"]),
        ((w,), ["weight_grad"]),
        ((b,), []),
        ((x, w), ["data_grad", "weight_grad"]),
    ):
        for tensor in (x, w, b):
            tensor.requires_grad_(any(tensor is one for one in needs))
        y = gpuconv_torch.conv(x, w, b)
        computed.clear()
        y.sum().backward()
        assert computed == expected
    x, w, b = (tensor.detach() for tensor in (x, w, b))
    assert not gpuconv_torch.conv(x, w, b).requires_grad


def test_forward_mode_is_refused_not_ignored():
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        x = torch.autograd.forward_ad.make_dual(X, X)
        for call in (lambda: gpuconv_torch.conv(x, W), lambda: gpuconv_torch.conv_transpose(x, W.movedim(0, 1))):
            with pytest.raises(NotImplementedError, match="jvp"):
                call()


def test_without_gradients_autograd_is_left_out():
    W.requires_grad_()
    try:
        with torch.no_grad():
            assert gpuconv_torch.conv(X, W).grad_fn is None
        with torch.inference_mode():
            assert gpuconv_torch.conv(X, W).is_inference()
        assert gpuconv_torch.conv(X, W).grad_fn is not None
    finally:
        W.requires_grad_(False)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_channels_last_memory_is_kept(rank, rng):
    x = torch.from_numpy(rng.standard_normal((2, *(5,) * rank, 3))).movedim(-1, 1).requires_grad_()
    w = torch.from_numpy(rng.standard_normal((4, 3, *(3,) * rank))).requires_grad_()
    y = gpuconv_torch.conv(x, w, padding=1)
    assert y.movedim(1, -1).is_contiguous()
    assert not y.is_contiguous()
    y.backward(torch.ones_like(y))
    assert x.grad.movedim(1, -1).is_contiguous()
    t = gpuconv_torch.conv_transpose(y, w, padding=1)
    assert t.movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"])
def test_dtypes(dtype, rng):
    x, w, dy = (draw(rng, s, "float64", True) for s in ((2, 3, 6, 5), (4, 3, 3, 3), (2, 4, 4, 3)))
    X, W = (torch.from_numpy(a).to(getattr(torch, dtype)).requires_grad_() for a in (x, w))  # noqa: N806
    y = gpuconv_torch.conv(X, W)
    assert y.dtype is X.dtype
    exact = (1, 1), ((0, 0),) * 2, (1, 1)
    rounded = torch.from_numpy(reference.forward(x, w, *exact)).to(y.dtype)
    torch.testing.assert_close(y.detach(), rounded, rtol=0, atol=0)
    y.backward(torch.from_numpy(dy).to(y.dtype))
    assert X.grad.dtype is W.grad.dtype is y.dtype
    rounded = torch.from_numpy(reference.weight_grad(dy, x, w.shape, *exact)).to(y.dtype)
    torch.testing.assert_close(W.grad, rounded, rtol=0, atol=0)


def test_mixed_dtypes_have_gradients_of_their_own(rng):
    x = torch.from_numpy(rng.standard_normal((1, 2, 6))).requires_grad_()
    (w,) = tensors(rng, (3, 2, 3), dtype="complex64")
    b = torch.ones(3, requires_grad=True)
    y = gpuconv_torch.conv(x, w, b)
    assert y.dtype is torch.complex128
    y.abs().sum().backward()
    assert (x.grad.dtype, w.grad.dtype, b.grad.dtype) == (torch.float64, torch.complex64, torch.float32)


def test_conjugated_negated_expanded_and_detached_tensors(rng):
    x, w = tensors(rng, (2, 2, 5, 4), (3, 2, 2, 2), dtype="complex128", needs=False)
    expected = gpuconv_torch.conv(x.conj().resolve_conj(), w.imag.resolve_neg().contiguous())
    torch.testing.assert_close(gpuconv_torch.conv(x.conj(), w.conj().imag.neg()), expected, rtol=0, atol=0)
    x = torch.ones(1, 1, 1).expand(2, 2, 4).requires_grad_()
    w = torch.ones(1, 2, 2, requires_grad=True)
    gpuconv_torch.conv(x, w).sum().backward()  # the gradient of a sum is an expanded tensor
    assert w.grad.tolist() == [[[6, 6], [6, 6]]]
    assert x.grad.sum() == 24


def test_gradients_of_complex_weights_are_ready_for_an_optimizer(rng):
    """They have no lazy conjugation, which Adam and gradient clipping refuse."""
    x, w = tensors(rng, (1, 2, 5, 5), (2, 3, 3, 3), dtype="complex64")
    gpuconv_torch.conv_transpose(x, w).abs().sum().backward()
    assert not x.grad.is_conj()
    assert not w.grad.is_conj()
    torch.nn.utils.clip_grad_norm_([x, w], 1.0)
    torch.optim.AdamW([x, w]).step()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_results_can_be_changed_in_place(memory_format, rng):
    x, w = tensors(rng, (2, 3, 5, 5), (4, 3, 3, 3))
    y = gpuconv_torch.conv(x.detach().contiguous(memory_format=memory_format), w)
    torch.relu_(y).sum().backward()
    expected = torch.autograd.grad(torch.relu(torch.nn.functional.conv2d(x, w)).sum(), w)[0]
    torch.testing.assert_close(w.grad, expected)


@pytest.mark.parametrize("channels_last", [False, True])
def test_memory_of_pytorchs_lies_as_x_does_and_is_no_view(channels_last):
    """Results on a GPU are written into such memory."""
    like = np.empty((2, 4, 5, 3)).transpose(0, 3, 1, 2) if channels_last else np.empty((2, 3, 4, 5))
    problem = gpuconv_torch._Convolution(Geometry.infer((2, 3, 4, 5), (6, 3, 1, 1)), "auto", None, None)
    y = problem._empty("y", torch.float32, torch.device("cpu"), like)
    assert not y._is_view()
    assert y.shape == (2, 6, 4, 5)
    assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [3, 48])  # for one thread, and for several
def test_nothing_is_said_of_numbers_that_overflow(size):
    x = torch.full((4, 16, size, size), 6e4, dtype=torch.float16)
    assert gpuconv_torch.conv(x, torch.ones(32, 16, 3, 3, dtype=torch.float16)).isinf().all()


@pytest.mark.called_once("it counts arrays")
def test_no_tensor_is_copied(rng, monkeypatch):
    x, w = tensors(rng, (2, 3, 5, 5), (4, 3, 3, 3), needs=False)
    seen = []
    original = gpuconv_torch._array
    monkeypatch.setattr(gpuconv_torch, "_array", lambda tensor: seen.append((tensor, original(tensor))) or seen[-1][1])
    gpuconv_torch.conv(x, w)
    assert [array.ctypes.data for _, array in seen] == [tensor.data_ptr() for tensor in (x, w)]
    y = np.ones(3, named_dtype("bfloat16"))
    assert gpuconv_torch._tensor(y).data_ptr() == y.ctypes.data
    half = torch.ones(3, dtype=torch.bfloat16)
    assert original(half).ctypes.data == half.data_ptr()


@pytest.mark.called_once("torch.compile would compile the repeating function")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # raised by PyTorch at graph breaks
def test_under_compile_the_values_are_right(rng):
    x, w = tensors(rng, (2, 3, 5, 5), (4, 3, 3, 3))
    compiled = torch.compile(lambda x, w: 2 * torch.relu(gpuconv_torch.conv(x + 1, w)), backend="eager")
    y, expected = compiled(x, w), 2 * torch.relu(torch.nn.functional.conv2d(x + 1, w))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(one.sum(), w)[0] for one in (y, expected)))
    itself = torch.compile(gpuconv_torch.conv, backend="eager")
    torch.testing.assert_close(itself(x, w, padding=1), torch.nn.functional.conv2d(x, w, padding=1))


def test_the_example_of_the_guide_runs():
    page = (Path(__file__).parents[1] / "gpuconv/guide/pytorch.md").read_text()
    (example,) = re.findall(r"```python\n(import torch\n.*?)```", page, re.DOTALL)
    names = {}
    exec(example, names)
    y = torch.nn.functional.conv2d(names["x"], names["w"], padding=1)
    torch.testing.assert_close(names["w"].grad, torch.autograd.grad(y.square().mean(), names["w"])[0])


X, W = torch.ones(2, 3, 5, 5), torch.ones(4, 3, 3, 3)
ERRORS = {
    "array": (lambda: gpuconv_torch.conv(X.numpy(), W), TypeError, r"x must be a torch\.Tensor, not ndarray"),
    "b": (lambda: gpuconv_torch.conv(X, W, [1.0] * 4), TypeError, r"b must be a torch\.Tensor, not list"),
    "ints": (lambda: gpuconv_torch.conv(X, W.int()), TypeError, r"w must be one of float16, .*, not torch.int32; w\.float\(\) converts it"),
    "float8": (lambda: gpuconv_torch.conv(X.to(torch.float8_e5m2), W), TypeError, "x must be one of .* not torch.float8_e5m2$"),
    "complex32": (lambda: gpuconv_torch.conv(X.to(torch.complex32), W), TypeError, "x must be one of .* not torch.complex32$"),
    "quantized": (lambda: gpuconv_torch.conv(torch.quantize_per_tensor(X, 0.1, 0, torch.qint8), W), TypeError, "x must be one of .* not torch.qint8$"),
    "nested": (lambda: gpuconv_torch.conv(torch.nested.nested_tensor([X[0]]), W), TypeError, "x must be dense .* not nested on cpu"),
    "sparse": (lambda: gpuconv_torch.conv(X.to_sparse(), W), TypeError, r"x must be dense .* not torch\.sparse_coo on cpu"),
    "meta": (lambda: gpuconv_torch.conv(X, W.to("meta")), TypeError, "w must be dense and on the CPU or a CUDA device, not .* on meta"),
    "channels": (lambda: gpuconv_torch.conv(X[:, :2], W), ValueError, "x has 2 channels but w expects 3"),
    "b's shape": (lambda: gpuconv_torch.conv(X, W, torch.ones(3)), ValueError, r"b must have one element for each of the 4 .* but it has \(3,\)"),
    "transposed": (lambda: gpuconv_torch.conv_transpose(X, W), ValueError, "x has 3 channels but w expects 4"),
    "algorithm": (lambda: gpuconv_torch.conv(X, W, algorithm="best"), ValueError, "algorithm must be one of auto"),
    "vmap": (lambda: torch.vmap(lambda x: gpuconv_torch.conv(x, W))(X), TypeError, "tensors must own their memory"),
    "jvp": (lambda: torch.func.jvp(lambda x: gpuconv_torch.conv(x, W), (X,), (X,)), RuntimeError, "functorch transforms"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")  # raised by PyTorch for its unfinished features
@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name):
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        call()


def test_without_pytorch_the_extra_is_named():
    code = "import sys; sys.modules['torch'] = None; import gpuconv; import gpuconv.torch"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: gpuconv.torch needs PyTorch: pip install 'gpuconv[torch]'" in ran.stderr


WITH_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="this PyTorch has no CUDA")


@pytest.mark.gpu
@WITH_CUDA
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "complex64"])
def test_on_a_gpu(dtype, rng):
    shapes = (2, 3, 9, 8), (4, 3, 3, 3), (4,)
    on_cpu = [
        torch.from_numpy(draw(rng, s, "float64", True)).to(getattr(torch, dtype)).requires_grad_() for s in shapes
    ]
    on_gpu = [tensor.detach().cuda().requires_grad_() for tensor in on_cpu]
    with torch.cuda.stream(torch.cuda.Stream()):
        ys = [gpuconv_torch.conv(*given, stride=2, padding=1) for given in (on_cpu, on_gpu)]
        for y in ys:
            y.real.sum().backward()
        torch.cuda.current_stream().synchronize()
    assert ys[1].is_cuda
    torch.testing.assert_close(ys[1].cpu(), ys[0], rtol=0, atol=0)
    for one, other in zip(on_gpu, on_cpu, strict=True):
        torch.testing.assert_close(one.grad.cpu(), other.grad, rtol=0, atol=0)


@pytest.mark.gpu
@WITH_CUDA
def test_memory_outlives_the_launch(rng):
    """Tensors are deleted right after the call, on a separate stream, and the allocator reuses their memory."""
    w = torch.from_numpy(draw(rng, (64, 64, 3, 3), "float32", True).astype("float32")).cuda()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for value in range(1, 20):
            y = gpuconv_torch.conv(torch.full((8, 64, 56, 56), float(value), device="cuda"), w)
            torch.full((8, 64, 56, 56), -1.0, device="cuda")
            expected = value * w.sum((1, 2, 3))
            assert (y == expected[:, None, None]).all()


@pytest.mark.gpu
@WITH_CUDA
def test_tensors_on_two_devices():
    with pytest.raises(ValueError, match="tensors must be on one device, but x is on cuda:0 and w on cpu"):
        gpuconv_torch.conv(X.cuda(), W)
