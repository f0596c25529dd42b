"""Compare SigPy's code for CuPy's cuDNN with its code for the CPU. SigPy is a library for MRI."""

import importlib.util
import sys
import warnings

import numpy as np
import pytest

from gpuconv.compat import cupy_cudnn
from tests.cases import draw
from tests.tiers import combinations

for needed in ("sigpy", "cupy"):
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def sigpy():
    """SigPy, imported while cupy.cudnn exists."""
    import cupy

    if int(cupy.__version__.split(".")[0]) < 14:
        pytest.skip(f"CuPy {cupy.__version__} has its own cupy.cudnn")
    if sys.modules.get("torch", cupy) is None:
        pytest.skip(
            "PyTorch with CUDA is blocked (tests/cupy_on_cpu), and SciPy, which SigPy calls, takes it for imported"
        )
    cupy_cudnn.install()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of other libraries
            import sigpy

        if not hasattr(sigpy.config, "cudnn_enabled"):
            pytest.skip(f"SigPy {sigpy.__version__} has no code for cuDNN any more")
        assert sigpy.config.cudnn_enabled
        yield sigpy
    finally:
        cupy_cudnn.uninstall()


def of_data_and_filter(function, data, filt, out):
    """Return the arguments of a function of SigPy."""
    return {
        "convolve": (data, filt),
        "convolve_data_adjoint": (out, filt, data.shape),
        "convolve_filter_adjoint": (out, data, filt.shape),
    }[function]


def through_cudnn(sigpy, function, *given, **how):
    """Run SigPy's code for arrays on a GPU with NumPy arrays."""
    call = getattr(sigpy.conv, f"_{function}_cuda")
    if not np.iscomplexobj(given[0]):
        return call(*given, **how)
    if function != "convolve":
        given = given[0], given[1].conj(), *given[2:]
    return sigpy.conv._complex(call, *given, **how)


@combinations(
    function=["convolve", "convolve_data_adjoint", "convolve_filter_adjoint"],
    rank=[1, 2, 3],
    mode=["full", "valid"],
    strides=[(1, 1, 1), (2, 2, 2), (1, 2, 3)],
    multi_channel=[False, True],
    dtype=["float64", "complex128"],
    turns=["strides", "multi_channel", "dtype"],
)
def test_its_convolutions_are_its_own(rank, mode, strides, multi_channel, function, dtype, sigpy, rng):
    data, filt = (draw(rng, s[: rank + 2], dtype, True) for s in ((2, 3, 7, 6, 5), (4, 3, 3, 2, 3)))
    if not multi_channel:
        data, filt = data[:, 0], filt[0, 0]
    how = {"mode": mode, "strides": strides[:rank], "multi_channel": multi_channel}
    out = draw(rng, sigpy.convolve(data, filt, **how).shape, dtype, True)
    given = of_data_and_filter(function, data, filt, out)
    expected, found = getattr(sigpy, function)(*given, **how), through_cudnn(sigpy, function, *given, **how)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected.round())  # small integers, SigPy's perhaps by transforms


@pytest.mark.gpu
@pytest.mark.parametrize("function", ["convolve", "convolve_data_adjoint", "convolve_filter_adjoint"])
def test_on_a_gpu(function, sigpy, rng):
    import cupy

    data, filt = (draw(rng, shape, "complex128", True) for shape in ((2, 3, 7, 6), (4, 3, 3, 2)))
    out = draw(rng, sigpy.convolve(data, filt, multi_channel=True).shape, "complex128", True)
    given = of_data_and_filter(function, data, filt, out)
    on_gpu = [cupy.asarray(a) if isinstance(a, np.ndarray) else a for a in given]
    expected = getattr(sigpy, function)(*given, multi_channel=True)
    found = getattr(sigpy, function)(*on_gpu, multi_channel=True).get()
    np.testing.assert_array_equal(found, expected.round())  # small integers, SigPy's perhaps by transforms
