"""Compare gpuconv.cubed with the same calls on whole arrays."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import gpuconv
from gpuconv.geometry import Geometry
from tests import tiers
from tests.cases import laid_out
from tests.test_random import convolutions

cubed = pytest.importorskip("cubed", reason="Cubed is not installed")

import gpuconv.cubed  # noqa: E402


def chunks(shape):
    return st.tuples(*(st.integers(1, extent) for extent in shape))


@hypothesis_settings(max_examples=100 if tiers.full else 12)
@given(convolutions(), st.sampled_from(["channels_first", "channels_last"]), st.data())
def test_any_chunks_give_the_results_of_the_whole_arrays(convolution, layout, data):
    x_shape, w_shape, settings = convolution
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    shapes = {"x": x_shape, "w": w_shape, "y": Geometry.infer(x_shape, w_shape, **settings).y_shape}
    x, w, dy = (laid_out(rng.integers(-3, 4, shapes[role]).astype(float), layout, role) for role in "xwy")
    b = rng.integers(-3, 4, w_shape[0]).astype(float)
    options = {**settings, "layout": layout, "algorithm": "im2col"}
    parts = [cubed.from_array(array, chunks=data.draw(chunks(array.shape))) for array in (x, dy)]
    for found, expected in (
        (gpuconv.cubed.conv(parts[0], w, b, **options), gpuconv.conv(x, w, b, **options)),
        (
            gpuconv.cubed.conv_data_grad(parts[1], w, x.shape, **options),
            gpuconv.conv_data_grad(dy, w, x.shape, **options),
        ),
    ):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_array_equal(found.compute(), expected)


def test_empty_arrays():
    for shape, filters in (((0, 3, 5, 5), 4), ((2, 0, 5, 5), 4), ((2, 3, 0, 5), 4), ((2, 3, 5, 5), 0)):
        x, w = np.ones(shape), np.ones((filters, shape[1], 3, 3))
        found = gpuconv.cubed.conv(cubed.from_array(x, chunks=tuple(max(1, n) for n in shape)), w, padding=2)
        np.testing.assert_array_equal(found.compute(), gpuconv.conv(x, w, padding=2))


def test_a_task_that_exceeds_its_memory_is_refused_before_anything_is_computed():
    spec = cubed.Spec(allowed_mem="50MB")
    x = cubed.from_array(np.zeros((1, 8, 8)), chunks=(1, 4, 4), spec=spec)
    y = gpuconv.cubed.conv(x, np.ones((1, 1, 3, 3)))
    with pytest.raises(ValueError, match="Projected blockwise memory"):  # of which the workspace is 64 MiB
        y.compute()


def test_bad_input():
    x, w = cubed.from_array(np.zeros((1, 8)), chunks=(1, 4)), np.zeros((4, 3, 3))
    with pytest.raises(TypeError, match="x must be a Cubed array, not ndarray"):
        gpuconv.cubed.conv(np.zeros((3, 8)), w)
    with pytest.raises(ValueError, match="x has 1 channels but w expects 3"):
        gpuconv.cubed.conv(x, w)
    with pytest.raises(ValueError, match="dy must have the shape"):
        gpuconv.cubed.conv_data_grad(x, w, (3, 8))


def test_the_extra_is_named_where_cubed_is_not_installed():
    code = "import sys; sys.modules['cubed'] = None; import gpuconv; import gpuconv.cubed"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: gpuconv.cubed needs Cubed: pip install 'gpuconv[cubed]'" in ran.stderr
