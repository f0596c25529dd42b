"""The special cases of im2col, forced on small convolutions with unusual parameters; exact for small integers."""

from unittest import mock

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import gpuconv
from gpuconv import execute
from gpuconv.cpu import col2im, lines, phases
from gpuconv.geometry import Geometry
from tests import reference, tiers
from tests.cases import channels_first, draw, laid_out, named_dtype
from tests.test_random import convolutions, limited

TAKEN = {"lines": 0, "col2im": 0, "phases": 0}


def counted(name, function):
    def call(*arguments):
        TAKEN[name] += 1
        function(*arguments)

    return call


@st.composite
def over_lines(draw_from):
    """Draw convolutions whose kernel extends over several adjacent lines of the image."""
    x = (draw_from(st.integers(1, 3)), draw_from(st.integers(1, 3)), *(draw_from(st.integers(5, 12)) for _ in range(2)))
    w = (draw_from(st.integers(1, 5)), x[1], draw_from(st.integers(3, 5)), draw_from(st.integers(1, 4)))
    settings = {
        "stride": (draw_from(st.integers(1, 4)), draw_from(st.integers(1, 3))),
        "padding": tuple((draw_from(st.integers(0, 3)), draw_from(st.integers(-1, 3))) for _ in range(2)),
        "dilation": (1, draw_from(st.integers(1, 2))),
        "groups": 1,
        "flip": draw_from(st.booleans()),
    }
    try:
        Geometry.infer(x, w, **settings)
    except ValueError:
        assume(False)
    return x, w, settings


@hypothesis_settings(max_examples=1000 if tiers.full else 60)
@given(
    st.one_of(convolutions(), over_lines()),
    st.sampled_from(["float32", "float16", "complex64", "float64"]),
    st.sampled_from(["channels_first", "channels_last", "channels_last_memory"]),
    st.sampled_from([20_000, 10**7]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def exact_on_small_integers(convolution, dtype, layout, limit, few, seed):
    x_shape, w_shape, settings = convolution
    rng = np.random.default_rng(seed)
    x, w = draw(rng, x_shape, dtype, True), draw(rng, w_shape, dtype, True)
    y = reference.forward(x, w, **settings)
    dy = draw(rng, y.shape, dtype, True)
    exact = (
        y,
        reference.data_grad(dy, w, x_shape, **settings),
        reference.weight_grad(dy, x, w_shape, **settings),
    )
    x, w, dy = (laid_out(a.astype(named_dtype(dtype)), layout, r) for a, r in ((x, "x"), (w, "w"), (dy, "x")))
    axes = "channels_last" if layout == "channels_last" else "channels_first"
    options = {**settings, "algorithm": "im2col", "layout": axes}
    execute.clear()
    with (
        limited(limit),
        mock.patch.object(lines, "LONG", 1),
        mock.patch.object(lines, "forward", counted("lines", lines.forward)),
        mock.patch.object(lines, "weight_grad", counted("lines", lines.weight_grad)),
        mock.patch.object(col2im, "FEW", 8 * few),
        mock.patch.object(col2im, "data_grad", counted("col2im", col2im.data_grad)),
        mock.patch.object(phases, "data_grad", counted("phases", phases.data_grad)),
    ):
        results = gpuconv.conv(x, w, **options), *gpuconv.conv_backward(dy, x, w, needs=("dx", "dw"), **options)[:2]
    for result, expected, role in zip(results, exact, "xxw", strict=True):
        np.testing.assert_array_equal(channels_first(result, layout, role), expected.astype(named_dtype(dtype)))


def test_they_are_taken_and_exact_on_small_integers():
    exact_on_small_integers()
    assert min(TAKEN.values()) > 5


@pytest.mark.called_once("it counts steps")
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_a_stem_takes_them(layout):
    x, w = np.ones((2, 3, 128, 120), np.float32), np.ones((16, 3, 7, 7), np.float32)
    x, w = laid_out(x, layout), laid_out(w, layout, "w")
    options = {"stride": 2, "padding": 3, "layout": layout, "algorithm": "im2col"}
    before = dict(TAKEN)
    with (
        mock.patch.object(lines, "forward", counted("lines", lines.forward)),
        mock.patch.object(lines, "weight_grad", counted("lines", lines.weight_grad)),
        mock.patch.object(col2im, "data_grad", counted("col2im", col2im.data_grad)),
    ):
        y = gpuconv.conv(x, w, **options)
        gpuconv.conv_backward(y, x, w, **options)
    assert {**before, "lines": before["lines"] + 2, "col2im": before["col2im"] + 1} == TAKEN


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "seen", "products"),
    [
        ((3, 3), 2, 1, (2, 2), 5),  # of nine; one phase reads a column of the four outputs: two products
        ((4, 4), 2, 1, (3, 3), 8),  # of sixteen taps
        ((16,), 8, 4, (3,), 2),  # four phases read two of the outputs, four the other two
        ((2, 2), 2, (1, 0), (2, 1), 2),  # padding shifts the rows of one phase; columns are together
        ((3,), (2,), 0, (2,), 2),
    ],
)
def test_phases_share_the_outputs_around_them(kernel, stride, padding, seen, products):
    shapes = (1, 4, *(16,) * len(kernel)), (8, 4, *kernel)
    plan = phases.products_of(Geometry.infer(*shapes, stride=stride, padding=padding))
    assert plan.gathered.kernel == seen
    assert sum(len(part.stretches) for part in plan.parts) == products


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"),
    [((3, 3), 1, 1), ((3,), 2, 2), ((5,), 2, 3)],
)
def test_phases_that_share_nothing_stand_alone(kernel, stride, dilation):
    """There is one phase, or the outputs of different phases are interleaved."""
    shapes = (1, 4, *(32,) * len(kernel)), (8, 4, *kernel)
    assert phases.products_of(Geometry.infer(*shapes, stride=stride, dilation=dilation)) is None
