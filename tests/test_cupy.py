"""Properties that need CuPy: versions, streams, modules, compute types and memory. On a GPU, or emulated."""

import ctypes
import gc
import os
import weakref
from unittest import mock

import numpy as np
import pytest

import gpuconv
from gpuconv import workspace
from gpuconv.arrays import BackendError
from gpuconv.backends import cupy_backend
from gpuconv.geometry import Geometry
from gpuconv.gpu import cublas, device
from gpuconv.request import Request
from gpuconv.select import MODULES
from tests.cases import DIRECTIONS, laid_out

pytestmark = pytest.mark.gpu


@pytest.fixture
def cupy():
    import cupy

    return cupy


def emulated(name):
    """Return a library of the emulated device, which has counters that a GPU lacks."""
    folder = os.environ.get("GPUCONV_CUPY_ON_CPU")
    if folder is None:
        pytest.skip("a GPU does not tell")
    return ctypes.CDLL(os.path.join(folder, "lib", name))


@pytest.mark.parametrize("version", ["13.6.0", "14.0.0", "14.1.0"])
@pytest.mark.parametrize("forced", ["auto", "cupy"])
def test_a_cupy_that_is_too_old_is_refused(version, forced, cupy, monkeypatch):
    gpuconv.clear_cache()
    monkeypatch.setattr(cupy, "__version__", version)
    with (
        gpuconv.backend(forced),
        pytest.raises(BackendError, match=f"needs CuPy 14.1.1 or later, and CuPy {version} is installed: pip install"),
    ):
        gpuconv.conv(cupy.ones((1, 1, 3)), cupy.ones((1, 1, 2)))


def test_kernels_are_unloaded_with_the_cache(cupy, monkeypatch):
    loaded = weakref.WeakSet()

    class Module(cupy.cuda.Module):
        def __init__(self):
            loaded.add(self)

    gpuconv.clear_cache()
    monkeypatch.setattr(cupy.cuda, "Module", Module)
    x, w = cupy.ones((1, 1, 4)), cupy.ones((1, 1, 2))
    gpuconv.conv(x, w, algorithm="direct")
    assert len(loaded) == 1
    gpuconv.clear_cache()
    gc.collect()
    assert len(loaded) == 0


def overlapping(xp):
    """Yield pairs of views of the same memory, and whether they have an element in common."""
    memory = xp.zeros((8, 16))
    yield memory, memory[2:], True
    yield memory[:4], memory[4:], False
    yield memory[:, ::2], memory[:, 1::2], False
    yield memory[::-1], memory[:1], True
    yield memory[:, 4:6], memory[:, 6:9], False
    yield memory[:, 4:7], memory[:, 6:9], True
    yield memory[:0], memory, False


@pytest.mark.parametrize("number", range(7))
def test_out_that_overlaps_is_found_without_the_device(number, cupy):
    from gpuconv.validate import check_out

    x, out, overlaps = list(overlapping(cupy))[number]
    with mock.patch.object(cupy, "shares_memory", side_effect=AssertionError("which reads all addresses")):
        if overlaps:
            with pytest.raises(ValueError, match="out must not overlap x in memory"):
                check_out(out, "cupy", out.dtype, out.shape, x=x)
        else:
            check_out(out, "cupy", out.dtype, out.shape, x=x)


@pytest.mark.parametrize(
    "capability, precision, dtype, taken",
    [
        (90, "ieee", "float32", 68),
        (90, "tf32", "float32", 77),
        (90, "tf32x3", "float32", 68),
        (80, "tf32", "float32", 77),
        (75, "tf32", "float32", 68),
        (90, "tf32", "complex64", 68),
        (90, "tf32", "float64", 70),
    ],
)
def test_products_take_tf32_where_the_device_has_it(capability, precision, dtype, taken, cupy, monkeypatch):
    """The compute type of each product is checked; CuPy's setting, which is global to the process, is unchanged."""
    monkeypatch.setattr(device, "_device", lambda number: device.Device(capability, 40))
    cublas, seen, before = cupy.cuda.cublas, [], cupy._core.get_compute_type("f")
    for name in ("gemmEx", "gemmStridedBatchedEx"):
        original = getattr(cublas, name)
        spy = lambda *a, original=original: (seen.append(a[-2]), original(*a))[1]  # noqa: E731
        monkeypatch.setattr(cublas, name, spy)
    x, w = cupy.ones((2, 8, 12, 12), dtype), cupy.ones((8, 8, 3, 3), dtype)
    for algorithm in ("im2col", "winograd"):
        if algorithm == "im2col" or dtype != "complex64":
            gpuconv.conv(x, w, algorithm=algorithm, precision=precision)
    assert set(seen) == {taken}
    assert cupy._core.get_compute_type("f") == before


OPERANDS = {  # shapes of the left operand, the right operand and the result of products
    "dense": ((3, 4, 5), (3, 5, 6), (3, 4, 6)),
    "one for all": ((4, 5), (3, 5, 6), (3, 4, 6)),
    "two axes": ((2, 3, 4, 5), (2, 3, 5, 6), (2, 3, 4, 6)),
    "one for some": ((2, 1, 4, 5), (1, 3, 5, 6), (2, 3, 4, 6)),
    "a row": ((1, 5), (5, 6), (1, 6)),
    "a column": ((4, 5), (5, 1), (4, 1)),
    "one number": ((3, 1, 5), (3, 5, 1), (3, 1, 1)),
    "one term": ((3, 4, 1), (3, 1, 6), (3, 4, 6)),
}
LAYOUTS = {  # views of a larger array, and whether cuBLAS can read or write them in place
    "contiguous": (lambda a: a, True),
    "transposed": (lambda a: a.swapaxes(-1, -2).copy().swapaxes(-1, -2), True),
    "of longer rows": (lambda a: a[..., 1:-1], True),
    "of longer columns": (lambda a: a[..., 1:-1, :], True),
    "with gaps": (lambda a: a[..., ::2, ::2], False),
    "backwards": (lambda a: a[..., ::-1], False),
    "every other one": (lambda a: a[::2] if a.ndim > 2 else a, True),
    "other axes first": (lambda a: a.swapaxes(0, -2).copy().swapaxes(0, -2), True),
}


@pytest.mark.parametrize("dtype", ["float32", "complex128"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operands", OPERANDS)
def test_products_are_formed_where_matrices_lie(operands, layout, dtype, cupy):
    """Only operands that cuBLAS cannot read are copied."""
    view, is_taken = LAYOUTS[layout]
    rng = np.random.default_rng(0)
    made = []
    for shape in OPERANDS[operands]:
        larger = rng.integers(-3, 4, tuple(2 * size + 2 for size in shape)).astype(dtype)
        lying = view(cupy.asarray(larger))
        lying = lying[tuple(slice(size) for size in shape)]
        made.append(lying)
    left, right, out = made
    if _is_written(out):
        steps, run = planned_product(left, right, out)
        run()
        np.testing.assert_array_equal(out.get(), np.matmul(left.get(), right.get()))
        copies = sum(step.function is cupy.copyto for step in steps)
        assert copies == 0 or not is_taken
    else:
        with pytest.raises(ValueError, match=r"no axis of .* is contiguous"):
            planned_product(left, right, out)


def _is_written(out):
    """Return whether one of the last two axes is contiguous, and the stride of the other one is at least its extent."""
    (rows, columns), (down, along) = out.shape[-2:], out.strides[-2:]
    item, axes = out.itemsize, [(rows, down, columns, along), (columns, along, rows, down)]
    return any((n == 1 or step == item) and (m == 1 or over >= n * item) for n, step, m, over in axes)


def planned_product(left, right, out):
    """Return the steps of a product, and a function that runs them."""
    from gpuconv.execute import _Memory, execute
    from gpuconv.plan import WORKSPACE, Planner, Scope
    from gpuconv.views import View, first_byte

    backend, scope = cupy_backend(), Scope(WORKSPACE, 64)
    views = [
        View(i, -first_byte(a.shape, a.strides), a.shape, a.strides, a.dtype) for i, a in enumerate((left, right, out))
    ]
    cublas.matmul(*views, Planner(backend, out.dtype, 1 << 20, scope, 64))

    def run():
        space = backend.memory(backend.xp.empty(scope.most, np.uint8))
        memories = [*map(backend.memory, (left, right, out)), None, None, None, space]
        execute([_Memory(backend, memories, None)], [scope.steps])

    return scope.steps, run


def test_tensors_are_computed_on_the_stream_of_pytorch(cupy):
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("gpuconv.torch")
    ours = cupy.cuda.Stream(non_blocking=True)
    theirs = mock.Mock(spec=["cuda_stream"], cuda_stream=ours.ptr)
    with (
        mock.patch.object(torch.cuda, "current_stream", return_value=theirs),
        module._on_stream_of(torch.device("cuda", 0)),
    ):
        assert cupy.cuda.get_current_stream().ptr == ours.ptr
    assert cupy.cuda.get_current_stream().ptr != ours.ptr


def test_a_call_on_a_stream_of_its_own_needs_no_other(cupy):
    """The emulator defers work until it is waited for, so data read too early or on another stream would be wrong."""
    x, w = np.arange(80.0).reshape(1, 4, 20), np.arange(48.0).reshape(4, 4, 3)
    expected = gpuconv.conv(x, w)
    for algorithm in ("im2col", "direct", "implicit_gemm", "scatter", "fft", "winograd"):
        with cupy.cuda.Stream(non_blocking=True):
            found = gpuconv.conv(cupy.asarray(x), cupy.asarray(w), algorithm=algorithm).get()
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-9)


@pytest.mark.called_once("what is recorded may not wait")
def test_what_a_graph_writes_belongs_to_nobody_else(cupy):
    """Otherwise the memory pool would reuse the workspace of weight_grad for arrays allocated after the capture."""
    shapes = (2, 16, 30, 30), (16, 16, 3, 3)
    options = {"padding": 1, "algorithm": "implicit_gemm"}
    space = gpuconv.explain(*shapes, direction="weight_grad", backend="cupy", **options).plan.space
    assert space > 0, "the call needs no memory beside its result"
    rng = np.random.default_rng(22)
    x, dy = (rng.integers(-3, 4, shapes[0]).astype(np.float32) for _ in range(2))
    with cupy.cuda.Stream(non_blocking=True) as stream:
        given = cupy.asarray(dy), cupy.asarray(x), shapes[1]
        gpuconv.conv_weight_grad(*given, **options)
        stream.begin_capture()
        dw = gpuconv.conv_weight_grad(*given, **options)
        graph = stream.end_capture()
        others = [cupy.zeros(space, np.uint8) for _ in range(8)]
        given[1][...] *= 2
        graph.launch(stream)
        found = dw.get()
        assert not any(other.any() for other in others)
    np.testing.assert_array_equal(found, gpuconv.conv_weight_grad(dy, 2 * x, shapes[1], padding=1))
    gpuconv.clear_cache()
    assert not workspace._in_graphs


def test_memory_of_the_host_is_no_argument(cupy):
    """The emulator reports a pointer to host memory as an argument; on a GPU it would be an illegal address."""
    emulated("libcuda.so.1")
    host = np.ones(32, np.float32)
    kernel = cupy.RawKernel('extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2; }', "twice")
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="twice: argument 0 is no pointer to device memory"):
        kernel((1,), (32,), (np.uint64(host.ctypes.data),))
    assert (host == 1).all()


def test_arrays_of_the_host_are_operands_of_nothing(cupy):
    """This holds for CuPy's kernels, whose arguments are structs, and for cuBLAS."""
    emulated("libcuda.so.1")
    host = np.ones((4, 4), np.float32)
    memory = cupy.cuda.UnownedMemory(host.ctypes.data, host.nbytes, host, 0)
    x = cupy.ndarray((4, 4), "f", cupy.cuda.MemoryPointer(memory, 0))
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="argument 0 is no pointer to device memory"):
        x + 1
    with pytest.raises(cupy.cuda.cublas.CUBLASError, match="EXECUTION_FAILED"):
        x @ x


def test_an_event_is_no_later_work_of_its_stream(cupy):
    """Waiting for an event does not perform work that was queued after it, so the data are still old."""
    emulated("libcudart.so.12")
    x, stream, event = cupy.zeros(4, "f"), cupy.cuda.Stream(non_blocking=True), cupy.cuda.Event()
    with stream:
        x.fill(1)
        event.record(stream)
        x.fill(2)
    event.synchronize()
    memory = np.ctypeslib.as_array(ctypes.cast(x.data.ptr, ctypes.POINTER(ctypes.c_float)), (4,))  # current contents
    assert (memory == 1).all()
    stream.synchronize()
    assert (memory == 2).all()


def test_writes_beyond_an_allocation_are_found(cupy):
    """This includes the padding of allocations to 256 bytes."""
    emulated("libcuda.so.1")
    kernel = cupy.RawKernel('extern "C" __global__ void set(float* x) { x[threadIdx.x] = 1; }', "set")
    x = cupy.ndarray(100, "f", cupy.cuda.MemoryPointer(cupy.cuda.Memory(400), 0))
    kernel((1,), (100,), (x,))
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="set: argument 0: written beyond its end"):
        kernel((1,), (101,), (x,))


@pytest.mark.called_once("one call is counted")
@pytest.mark.parametrize("direction", ["forward", "data_grad", "weight_grad"])
@pytest.mark.parametrize("algorithm", ["im2col", "winograd", "fft"])
def test_the_host_waits_once_for_what_is_finite(algorithm, direction, cupy):
    """For any number of blocks: once for w in im2col, if needed, and once for the result of a transform."""
    reads = emulated("libcudart.so.12").emulated_reads
    x, w = cupy.ones((8, 16, 40, 40), "f"), cupy.ones((16, 16, 3, 3), "f")
    dy = cupy.ones((8, 16, 40, 40), "f")
    options = {"padding": 1, "algorithm": algorithm}
    before = reads()
    if direction == "forward":
        gpuconv.conv(x, w, **options)
    elif direction == "data_grad":
        gpuconv.conv_data_grad(dy, w, x.shape, **options)
    else:
        gpuconv.conv_weight_grad(dy, x, w.shape, **options)
    assert reads() - before <= 1


@pytest.mark.called_once("one call is looked at")
@pytest.mark.parametrize("limit", ["64MiB", "250KiB", "100KiB"])
@pytest.mark.parametrize("layout, dtype", [("channels_first", "float32"), ("channels_last", "float16")])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("algorithm", ["im2col", "winograd", "fft", "depthwise", "direct", "implicit_gemm", "scatter"])
def test_the_workspace_limit_holds_on_a_gpu(algorithm, direction, layout, dtype, limit, cupy, monkeypatch):
    """The peak of allocations, without the result, is measured by hooks of CuPy's memory pool."""
    monkeypatch.setenv("GPUCONV_WORKSPACE_LIMIT", limit)
    groups = 16 if algorithm == "depthwise" else 1
    shapes = (3, 16, 20, 20), (16, 16 // groups, 3, 3), (3, 16, 20, 20)
    x, w, dy = (cupy.asarray(laid_out(np.ones(s, dtype), layout, r)) for s, r in zip(shapes, "xwx", strict=True))
    options = {"padding": 1, "groups": groups, "layout": layout, "algorithm": algorithm}
    call = {
        "forward": lambda: gpuconv.conv(x, w, **options),
        "data_grad": lambda: gpuconv.conv_data_grad(dy, w, x.shape, **options),
        "weight_grad": lambda: gpuconv.conv_weight_grad(dy, x, w.shape, **options),
    }[direction]
    geometry = Geometry.infer(x.shape, w.shape, padding=1, groups=groups, layout=layout)
    request = Request(geometry, np.dtype(dtype), direction, cupy_backend(), False, gpuconv.settings.workspace_limit())
    if reason := MODULES[algorithm].why_not(request):
        pytest.skip(reason)
    result = call()  # compiles kernels and makes tables
    with Allocations() as allocations:
        call()
    beside = allocations.most - result.nbytes
    assert beside <= gpuconv.settings.workspace_limit() + allocations.count * 512  # each is rounded up to 512


def test_the_emulated_device_divides_complex_numbers(cupy):
    """The division needs absolute values of floating-point numbers, and C has abs only for integers."""
    a, b = 0.5 + 1e-19j, 0.75 - 2e-19j
    for dtype in ("complex64", "complex128"):
        found = cupy.asarray(a, dtype) / cupy.asarray(b, dtype)
        np.testing.assert_allclose(found.get(), a / b, rtol=1e-6)


@pytest.mark.called_once("one call is looked at")
def test_what_is_added_in_place_is_not_copied(cupy):
    """CuPy copies an input that shares memory with the result, unless they are the same object."""
    x, w = cupy.ones((3, 16, 20, 20), "float32"), cupy.ones((16, 16, 3, 3), "float32")
    gpuconv.conv(x, w, padding=1, algorithm="scatter")
    with Allocations() as allocations:
        gpuconv.conv(x, w, padding=1, algorithm="scatter")
    assert allocations.count == 2  # the result and the workspace


class Allocations:
    """The peak of allocated device memory in bytes, and the number of allocations."""

    def __init__(self):
        import cupy

        class Hook(cupy.cuda.MemoryHook):
            name = "allocations"

            def malloc_postprocess(hook, **about):  # noqa: N805
                self.now += about["mem_size"]
                self.most, self.count = max(self.most, self.now), self.count + 1

            def free_preprocess(hook, **about):  # noqa: N805
                self.now -= about["mem_size"]

        self.hook, self.now, self.most, self.count = Hook(), 0, 0, 0

    def __enter__(self):
        self.hook.__enter__()
        return self

    def __exit__(self, *error):
        self.hook.__exit__(*error)
