"""What only CuPy itself can show: its versions, streams, modules, compute types and memory. On a GPU, or emulated."""

import ctypes
import gc
import os
import threading
import weakref
from unittest import mock

import numpy as np
import pytest

import gpuconv
from gpuconv.backend import BackendError, matrix_products
from gpuconv.cuda import device

pytestmark = pytest.mark.gpu


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy")


def emulated(name):
    """A library of the emulated machine, which counts what a GPU does not tell."""
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
    """Pairs of views of one memory, and whether they have an element in common."""
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


def compute_type(cupy):
    return cupy._core.get_compute_type("f")


@pytest.mark.parametrize("capability, changes", [(75, False), (80, True), (90, True)])
def test_products_take_tf32_where_the_device_has_it(capability, changes, cupy):
    before = compute_type(cupy)
    with (
        mock.patch.object(device, "current", return_value=device.Device(capability, 40)),
        matrix_products("tf32"),
    ):
        assert (compute_type(cupy) == cupy._core._routines_linalg.COMPUTE_TYPE_TF32) is changes
    assert compute_type(cupy) == before


def test_a_thread_does_not_see_the_compute_type_of_another(cupy):
    """Products of one precision wait for those of another."""
    seen, is_tf32, may_go_on = [], threading.Event(), threading.Event()

    def with_tf32():
        with matrix_products("tf32"):
            is_tf32.set()
            may_go_on.wait(10)

    def with_ieee():
        with matrix_products("ieee"):
            seen.append(compute_type(cupy))

    threads = [threading.Thread(target=target) for target in (with_tf32, with_ieee)]
    threads[0].start()
    assert is_tf32.wait(10)
    threads[1].start()
    threads[1].join(0.2)
    may_go_on.set()
    for thread in threads:
        thread.join(10)
    assert seen == [compute_type(cupy)]
    assert seen != [cupy._core._routines_linalg.COMPUTE_TYPE_TF32]


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
    """Work waits in a stream until it is waited for: nothing is read too early, and nothing on another stream."""
    x, w = np.arange(80.0).reshape(1, 4, 20), np.arange(48.0).reshape(4, 4, 3)
    expected = gpuconv.conv(x, w)
    for algorithm in ("im2col", "direct", "implicit_gemm", "scatter", "fft", "winograd"):
        with cupy.cuda.Stream(non_blocking=True):
            found = gpuconv.conv(cupy.asarray(x), cupy.asarray(w), algorithm=algorithm).get()
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-9)


def test_memory_of_the_host_is_no_argument(cupy):
    """Where kernels are emulated, a pointer to the host is found out; on a GPU it would be an illegal address."""
    emulated("libcuda.so.1")
    host = np.ones(32, np.float32)
    kernel = cupy.RawKernel('extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2; }', "twice")
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="twice: argument 0 is no pointer to device memory"):
        kernel((1,), (32,), (np.uint64(host.ctypes.data),))
    assert (host == 1).all()


@pytest.mark.called_once("one call is counted")
@pytest.mark.parametrize("direction", ["forward", "data_grad", "weight_grad"])
@pytest.mark.parametrize("algorithm", ["im2col", "winograd", "fft"])
def test_the_host_waits_once_for_what_is_finite(algorithm, direction, cupy):
    """However many blocks are looked at: once for w where im2col asks for it, once for the result of a transform."""
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
