"""Algorithm fft: tiles and segments that fit the workspace, and numbers whose squares overflow."""

from unittest import mock

import numpy as np
import pytest

import gpuconv
from gpuconv.arrays import NUMPY
from gpuconv.cpu import fft, im2col
from gpuconv.geometry import DIRECTIONS, Geometry
from gpuconv.request import Request
from tests import reference
from tests.tolerances import assert_within, bound_of

# Kernels for which a workspace of this many bytes cannot hold a tile, with settings of the reference.
LONG = (
    (16_000, (2, 2, 2000), (3, 2, 900), {"stride": (1,), "padding": ((7, 450),), "dilation": (1,)}),
    (16_000, (1, 1, 2400), (2, 1, 300), {"stride": (1,), "padding": ((-20, 5),), "dilation": (3,), "flip": True}),
    (
        24_000,
        (1, 4, 60, 90),
        (4, 2, 41, 35),
        {"stride": (1, 1), "padding": ((5, 20), (3, 9)), "dilation": (1, 1), "groups": 2},
    ),
)


def results(direction, x, w, dy, **options):
    """Return the result of gpuconv by fft, the exact result, and that for absolute values."""
    settings = {name: value for name, value in options.items() if name != "algorithm"}
    x64, w64, dy64 = (array.astype(np.float64) for array in (x, w, dy))
    if direction == "forward":
        found, exact = gpuconv.conv(x, w, **options), lambda f: reference.forward(f(x64), f(w64), **settings)
    elif direction == "data_grad":
        found = gpuconv.conv_data_grad(dy, w, x.shape, **options)
        exact = lambda f: reference.data_grad(f(dy64), f(w64), x.shape, **settings)  # noqa: E731
    else:
        found = gpuconv.conv_weight_grad(dy, x, w.shape, **options)
        exact = lambda f: reference.weight_grad(f(dy64), f(x64), w.shape, **settings)  # noqa: E731
    return found, exact(np.positive), exact(np.abs)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("limit, x_shape, w_shape, settings", LONG)
def test_kernels_without_room_are_cut_into_segments(limit, x_shape, w_shape, settings, direction, monkeypatch, rng):
    monkeypatch.setenv("GPUCONV_WORKSPACE_LIMIT", str(limit))
    geometry = Geometry.infer(x_shape, w_shape, **settings)
    tiles = []
    original = fft._Tiling.of
    with mock.patch.object(fft._Tiling, "of", lambda *given: tiles.append(original(*given)) or tiles[-1]):
        x, w, dy = (rng.standard_normal(shape, np.float32) for shape in (x_shape, w_shape, geometry.y_shape))
        found, exact, magnitude = results(direction, x, w, dy, **settings, algorithm="fft")
    assert tiles
    assert all(np.prod(tiling.tile.taps) < geometry.taps for tiling in tiles)
    assert_within(found, exact, bound_of("fft", exact, magnitude, 1, "float32"))


@pytest.mark.parametrize("algorithm, dtype", [("fft", "float32"), ("fft", "complex64"), ("winograd", "float32")])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_large_finite_numbers_are_computed_once(direction, dtype, algorithm):
    """Overflow of the squares and sums of finite results must not cause recomputation, as NaN and Inf do."""
    x, w, dy = (np.ones(shape, dtype) for shape in ((1, 32, 14, 14), (64, 32, 3, 3), (1, 64, 12, 12)))
    large = {"forward": w, "data_grad": w, "weight_grad": dy}[direction]
    large *= np.float32(1e33)  # spectra stay finite
    unused = mock.Mock(side_effect=AssertionError("computed again"))
    with mock.patch.object(im2col, direction, unused):
        if direction == "forward":
            found = gpuconv.conv(x, w, algorithm=algorithm)
        elif direction == "data_grad":
            found = gpuconv.conv_data_grad(dy, w, x.shape, algorithm=algorithm)
        else:
            found = gpuconv.conv_weight_grad(dy, x, w.shape, algorithm=algorithm)
    with np.errstate(over="ignore", invalid="ignore"):
        assert not np.isfinite(found.sum(dtype=dtype))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(
        found.max().real, {"forward": 288e33, "data_grad": 576e33, "weight_grad": 144e33}[direction], 1e-4
    )


def test_tiles_of_a_volume_overlap_little():
    """The transformed elements are at most 1.6 times those of a single tile for the whole volume."""
    geometry = Geometry.infer((1, 64, 256, 256), (1, 1, 32, 32, 32), padding="same")
    request = Request(geometry, np.dtype("float32"), "forward", NUMPY)
    tile = fft._cut(fft._Correlation.of(request), request.budget).tile
    tiles = [-(-m // step) for m, step in zip(geometry.output, fft._steps(tile, geometry), strict=True)]
    assert tile.taps == geometry.kernel
    assert np.prod(tiles) * np.prod(tile.extent) <= 1.6 * 96 * 288 * 288
