"""Which backend computes: by arrays, context, process and environment."""

import importlib
import re
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest

import gpuconv
from gpuconv import backends, config, dtypes
from gpuconv.backends import cupy_backend
from gpuconv.execute import Call
from gpuconv.geometry import Geometry
from gpuconv.select import MODULES
from tests import reference, tiers
from tests.backends import HAS_GPU

X, W = np.ones((1, 2, 5, 5)), np.ones((3, 2, 3, 3))
PLAIN = (1, 1), ((0, 0), (0, 0)), (1, 1)  # stride, padding, dilation
Y = reference.forward(X, W, *PLAIN)
GRADIENTS = (
    reference.data_grad(Y, W, X.shape, *PLAIN),
    reference.weight_grad(Y, X, W.shape, *PLAIN),
    Y.sum((0, 2, 3)),
)


@pytest.fixture(params=[pytest.param("cupy", marks=pytest.mark.gpu)])
def cupy(request):
    """The module cupy."""
    return importlib.import_module(request.param)


@pytest.fixture
def broken_cupy(monkeypatch):
    """A CuPy that can be imported and then fails, as it does without a driver."""

    def fail(*_):
        raise OSError("CUDA driver version is insufficient")

    cupy_backend.cache_clear()
    monkeypatch.setitem(
        sys.modules, "cupy", types.SimpleNamespace(__version__="15.0.0", arange=fail, ndarray=type("ndarray", (), {}))
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    yield
    cupy_backend.cache_clear()


@pytest.fixture
def no_cupy(monkeypatch):
    cupy_backend.cache_clear()
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    yield
    cupy_backend.cache_clear()


def test_the_processor_has_the_name_that_the_system_gives_it():
    source = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", source.read_text(), re.MULTILINE) if source.exists() else []
    if not names:
        pytest.skip("this system does not list processors in /proc/cpuinfo")
    assert config.cpu_name() == names[0].strip()


def test_the_default_is_auto():
    assert gpuconv.get_backend() == "auto"


@pytest.mark.parametrize(
    "value, name", [("numpy", "numpy"), ("NumPy", "numpy"), (" CUPY ", "cupy"), ("", "auto"), ("Auto", "auto")]
)
def test_the_variable_is_read_at_the_call_whatever_its_case(value, name, monkeypatch):
    monkeypatch.setenv("GPUCONV_BACKEND", value)
    assert gpuconv.get_backend() == name


def test_precedence_is_context_then_process_then_environment(monkeypatch):
    monkeypatch.setenv("GPUCONV_BACKEND", "cupy")
    assert gpuconv.get_backend() == "cupy"
    gpuconv.set_backend("numpy")
    assert gpuconv.get_backend() == "numpy"
    with gpuconv.backend("auto"):
        assert gpuconv.get_backend() == "auto"
        with gpuconv.backend("cupy"):
            assert gpuconv.get_backend() == "cupy"
        assert gpuconv.get_backend() == "auto"
    assert gpuconv.get_backend() == "numpy"
    gpuconv.set_backend(None)
    assert gpuconv.get_backend() == "cupy"


def test_the_environment_is_not_looked_at_when_another_decides(monkeypatch):
    monkeypatch.setenv("GPUCONV_BACKEND", "nonsense")
    with gpuconv.backend("numpy"):
        np.testing.assert_array_equal(gpuconv.conv(X, W), Y)
    gpuconv.set_backend("numpy")
    np.testing.assert_array_equal(gpuconv.conv(X, W), Y)
    gpuconv.set_backend(None)
    with pytest.raises(ValueError, match="GPUCONV_BACKEND must be one of auto, numpy, cupy; got 'nonsense'"):
        gpuconv.conv(X, W)


def test_a_context_is_left_when_its_body_raises():
    with pytest.raises(KeyError), gpuconv.backend("numpy"):
        raise KeyError
    assert gpuconv.get_backend() == "auto"


def test_threads_see_the_process_but_not_each_others_contexts():
    seen = {}
    inside, done = threading.Event(), threading.Event()

    def other():
        inside.wait()
        seen["other"] = gpuconv.get_backend()
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    gpuconv.set_backend("numpy")
    with gpuconv.backend("cupy"):
        inside.set()
        done.wait()
        seen["mine"] = gpuconv.get_backend()
    thread.join()
    assert seen == {"other": "numpy", "mine": "cupy"}


def test_calls_from_many_threads_do_not_disturb_each_other(rng):
    x = [rng.integers(-3, 4, (2, 8, 12 + i, 12)).astype(np.float32) for i in range(8)]
    w = rng.integers(-3, 4, (8, 8, 3, 3)).astype(np.float32)
    expected = [gpuconv.conv(a, w) for a in x]
    wrong = []

    def work(i):
        for _ in range(60 if tiers.full else 20):
            if not np.array_equal(gpuconv.conv(x[i], w), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_arrays_of_two_kinds_are_refused(cupy):
    with pytest.raises(TypeError, match=r"x is a numpy.ndarray and w a cupy.ndarray"):
        gpuconv.conv(X, cupy.asarray(W))
    with pytest.raises(TypeError, match=r"b a numpy.ndarray"):
        gpuconv.conv(cupy.asarray(X), cupy.asarray(W), np.ones(3))
    with pytest.raises(TypeError, match=r"out a numpy.ndarray"):
        gpuconv.conv(cupy.asarray(X), cupy.asarray(W), out=np.empty_like(Y))
    with pytest.raises(TypeError, match=r"y a numpy.ndarray"):
        gpuconv.conv_backward(*map(cupy.asarray, (Y, X, W)), y=Y, activation="relu")


def test_arrays_of_two_devices_are_refused(cupy):
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("there is one device")
    x = cupy.asarray(X)
    with cupy.cuda.Device(1):
        w = cupy.asarray(W)
    with pytest.raises(ValueError, match="x is on 0 and w on 1"):
        gpuconv.conv(x, w)


def test_auto_computes_where_the_arrays_live(cupy):
    assert type(gpuconv.conv(X, W)) is np.ndarray
    y = gpuconv.conv(cupy.asarray(X), cupy.asarray(W))
    assert isinstance(y, cupy.ndarray)
    np.testing.assert_array_equal(y.get(), Y)


@pytest.mark.parametrize("forced", ["numpy", "cupy"])
@pytest.mark.parametrize("given", ["numpy", "cupy"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_forced_backend_computes_and_the_kind_that_came_in_comes_back(
    forced, given, channels_last, cupy, monkeypatch
):
    used = []
    for module in MODULES.values():
        for name in ("forward", "data_grad", "weight_grad"):
            original = getattr(module, name)
            monkeypatch.setattr(
                module, name, lambda *a, original=original: (used.append(a[-1].backend.name), original(*a))
            )
    xp = cupy if given == "cupy" else np
    x = xp.moveaxis(xp.ones((1, 5, 5, 2)), -1, 1) if channels_last else xp.asarray(X)

    def look(array):
        assert isinstance(array, xp.ndarray)
        return array.get() if given == "cupy" else array

    monkeypatch.setenv("GPUCONV_BACKEND", forced)
    y, w = xp.asarray(Y), xp.asarray(W)
    found = gpuconv.conv(x, w, activation="relu")
    np.testing.assert_array_equal(look(found), Y)
    assert xp.moveaxis(found, 1, -1).flags.c_contiguous == channels_last
    out = xp.full((1, 3, 3, 6), np.nan)[..., ::2]
    assert gpuconv.conv(x, w, out=out) is out
    np.testing.assert_array_equal(look(out), Y)
    gradients = gpuconv.conv_backward(y, x, w, activation="relu", y=y)
    for gradient, expected in zip(gradients, GRADIENTS, strict=True):
        np.testing.assert_array_equal(look(gradient), expected)
    assert set(used) == {forced}


def test_other_byte_orders_reach_a_forced_gpu(cupy):
    with gpuconv.backend("cupy"):
        np.testing.assert_array_equal(gpuconv.conv(X.astype(">f8"), W), Y)


def test_forced_cupy_without_cupy_names_the_extra(no_cupy):
    for call in (lambda: gpuconv.conv(X, W), gpuconv.array_module):
        with (
            gpuconv.backend("cupy"),
            pytest.raises(gpuconv.BackendError, match=r"not installed: pip install 'gpuconv\[cuda12\]'"),
        ):
            call()
    assert issubclass(gpuconv.BackendError, RuntimeError)


def test_forced_cupy_without_a_device_says_what_was_found(broken_cupy):
    with gpuconv.backend("cupy"), pytest.raises(gpuconv.BackendError, match="CUDA driver version is insufficient"):
        gpuconv.conv(X, W)


def test_bfloat16_names_the_package_that_has_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(TypeError, match=r"dtype='bfloat16' needs ml_dtypes \(pip install ml_dtypes\)"):
        dtypes.named("bfloat16")
    assert "bfloat16" not in [dtype.name for dtype in dtypes.available()]


@pytest.mark.parametrize("name", dtypes.NAMES)
def test_the_resolution_of_a_dtype(name):
    """The resolution is the smallest power of 2 that changes 1 when it is added."""
    dtype = dtypes.named(name)
    one, eps = np.ones(1, dtype), dtypes.epsilon(dtype)
    assert one + np.array([eps], dtype) != one
    assert one + np.array([eps / 2], dtype) == one


@pytest.mark.parametrize(
    "system, library, answers, count",
    [
        ("linux", "libcuda.so.1", (0, 0), 2),
        ("win32", "nvcuda.dll", (0, 0), 2),
        ("linux", "libcuda.so.1", (100, 0), 0),
        ("linux", "libcuda.so.1", (0, 3), 0),
        ("linux", None, (0, 0), 0),
    ],
    ids=["Linux", "Windows", "no device", "no count", "no driver"],
)
def test_the_driver_is_asked_for_its_devices(system, library, answers, count, monkeypatch):
    class Driver:
        def __init__(self, name):
            if name != library:
                raise OSError(name)

        def cuInit(self, flags):  # noqa: N802
            assert flags == 0
            return answers[0]

        def cuDeviceGetCount(self, count):  # noqa: N802
            count._obj.value = 2
            return answers[1]

    monkeypatch.setattr(backends.sys, "platform", system)
    monkeypatch.setattr(backends.ctypes, "CDLL", Driver)
    assert backends.driver_devices() == count


def test_array_module_is_numpy_without_a_gpu(no_cupy, monkeypatch):
    monkeypatch.setattr(backends, "driver_devices", lambda: 0)
    assert gpuconv.array_module() is np


def test_array_module_is_numpy_where_neither_driver_nor_cupy_see_a_gpu(broken_cupy, monkeypatch):
    monkeypatch.setattr(backends, "driver_devices", lambda: 0)
    assert gpuconv.array_module() is np


def test_a_device_that_cupy_cannot_use_is_not_passed_over_in_silence(broken_cupy, monkeypatch):
    monkeypatch.setattr(backends, "driver_devices", lambda: 1)
    with pytest.raises(gpuconv.BackendError, match="set GPUCONV_BACKEND=numpy"):
        gpuconv.array_module()


def test_a_device_without_cupy_is_worth_a_warning(no_cupy, monkeypatch):
    monkeypatch.setattr(backends, "driver_devices", lambda: 1)
    with pytest.warns(RuntimeWarning, match="CuPy is not installed"):
        assert gpuconv.array_module() is np


def test_array_module_is_cupy_where_it_works(cupy):
    assert gpuconv.array_module() is cupy
    with gpuconv.backend("numpy"):
        assert gpuconv.array_module() is np


@pytest.mark.gpu
def test_array_module_on_a_gpu():
    import cupy

    assert gpuconv.array_module() is cupy


def test_scatter_on_a_gpu_needs_consent_to_its_order(cupy):
    x, w = cupy.asarray(X), cupy.asarray(W)
    np.testing.assert_array_equal(gpuconv.conv(x, w, algorithm="scatter").get(), Y)
    with pytest.raises(ValueError, match="no fixed order on a GPU"):
        gpuconv.conv(x, w, algorithm="scatter", deterministic=True)
    gpuconv.conv(X, W, algorithm="scatter", deterministic=True)


@pytest.mark.parametrize(
    "environment, argument, wanted",
    [
        ({}, None, "ieee"),
        ({"CUPY_TF32": "1"}, None, "tf32"),
        ({"CUPY_TF32": "1"}, "ieee", "ieee"),
        ({"GPUCONV_PRECISION": "tf32"}, None, "tf32"),
        ({"GPUCONV_PRECISION": "ieee", "CUPY_TF32": "1"}, None, "ieee"),
        ({}, "tf32", "tf32"),
        ({"CUPY_TF32": "1"}, "tf32x3", "tf32x3"),
    ],
)
def test_what_decides_the_precision(environment, argument, wanted, monkeypatch):
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    geometry = Geometry.infer((1, 1, 4), (1, 1, 2))
    assert Call.of(geometry, "numpy", np.dtype("f"), "auto", argument, None).precision == wanted


def test_show_config_tells_what_decides(capsys, monkeypatch):
    monkeypatch.setenv("GPUCONV_WORKSPACE_LIMIT", "1MiB")
    with gpuconv.backend("numpy"):
        gpuconv.show_config()
    text = capsys.readouterr().out
    for fact in (
        gpuconv.__version__,
        np.__version__,
        "numpy (from with backend(...))",
        "1MiB",
        "GPUCONV_PRECISION",
        "CuPy",
    ):
        assert fact in text


def test_import_loads_nothing_heavy():
    code = """
import sys, gpuconv, gpuconv.compat.cs231n, gpuconv.compat.nhwc
import numpy
gpuconv.conv(numpy.ones((1, 1, 4)), numpy.ones((1, 1, 2)))
heavy = {"cupy", "scipy", "dask", "torch", "onnx", "matplotlib", "rich", "sklearn", "ml_dtypes"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
def test_the_cupy_installed_here_is_reported_as_unusable():
    pytest.importorskip("cupy")
    cupy_backend.cache_clear()
    with gpuconv.backend("cupy"), pytest.raises(gpuconv.BackendError, match=r"the driver reports 0 device\(s\)"):
        gpuconv.conv(X, W)


@pytest.mark.called_once("its first call is the one under test")
@pytest.mark.parametrize("given", ["numpy", "cupy"])
def test_the_first_call_on_a_forced_backend_may_bring_an_out(given, cupy, monkeypatch):
    monkeypatch.setenv("GPUCONV_BACKEND", "cupy")
    make = cupy.asarray if given == "cupy" else np.asarray
    for _ in range(2):
        out = make(np.full(Y.shape, np.nan))
        assert gpuconv.conv(make(X), make(W), out=out) is out
        np.testing.assert_array_equal(out.get() if given == "cupy" else out, Y)
