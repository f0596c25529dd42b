"""Geometry: sizes, every form of padding, transposed sizes, phases of the stride, operation counts."""

import itertools

import numpy as np
import pytest

from gpuconv.geometry import Geometry

INFER = Geometry.infer


def test_output_extent_counts_the_positions_of_the_window():
    for n, k, s, d, low, high in itertools.product(range(1, 7), (1, 2, 3), (1, 2, 3), (1, 2), (0, 2), (-1, 0, 1)):
        window = d * (k - 1) + 1
        starts = range(0, n + low + high - window + 1, s)
        if starts:
            geometry = INFER((1, 1, n), (1, 1, k), stride=s, dilation=d, padding=((low, high),))
            assert geometry.output == (len(starts),)
        else:
            with pytest.raises(ValueError, match="would be empty"):
                INFER((1, 1, n), (1, 1, k), stride=s, dilation=d, padding=((low, high),))


@pytest.mark.parametrize(
    "padding, expected",
    [
        (2, ((2, 2), (2, 2))),
        (np.int64(2), ((2, 2), (2, 2))),
        ((1, 2), ((1, 1), (2, 2))),
        ([1, 2], ((1, 1), (2, 2))),
        (np.array([1, 2]), ((1, 1), (2, 2))),
        (((1, 2), (3, 4)), ((1, 2), (3, 4))),
        ([[1, 2], [3, 4]], ((1, 2), (3, 4))),
        (np.array([[1, 2], [3, 4]]), ((1, 2), (3, 4))),
        (-1, ((-1, -1), (-1, -1))),
        ("valid", ((0, 0), (0, 0))),
        ("full", ((2, 2), (6, 6))),
    ],
)
def test_padding_forms(padding, expected):
    assert INFER((1, 1, 20, 20), (1, 1, 3, 4), dilation=(1, 2), padding=padding).padding == expected


def test_same_padding_gives_ceil_of_n_over_stride_and_is_never_negative():
    for n, k, s, d in itertools.product(range(1, 12), range(1, 6), range(1, 5), (1, 2, 3)):
        for name in ("same", "same_lower"):
            geometry = INFER((1, 1, n), (1, 1, k), stride=s, dilation=d, padding=name)
            low, high = geometry.padding[0]
            assert geometry.output == (-(-n // s),)
            assert min(low, high) >= 0
            assert (high - low if name == "same" else low - high) in (0, 1)


def test_causal_padding_is_all_at_the_low_end():
    assert INFER((1, 2, 9), (1, 2, 3), dilation=2, padding="causal").padding == ((4, 0),)
    with pytest.raises(ValueError, match="one spatial axis"):
        INFER((1, 2, 9, 9), (1, 2, 3, 3), padding="causal")


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_shapes_come_back(layout):
    x, w = ((2, 5, 6, 9, 8), (4, 3, 3, 2)) if layout == "channels_first" else ((2, 5, 9, 8, 6), (3, 2, 3, 4))
    geometry = INFER(x, w, groups=2, layout=layout)
    assert (geometry.batch, geometry.channels, geometry.filters) == ((2, 5), 6, 4)
    assert (geometry.x_shape, geometry.w_shape) == (x, w)
    assert geometry.y_shape == ((2, 5, 4, 7, 7) if layout == "channels_first" else (2, 5, 7, 7, 4))


def test_transposed_extent_is_what_the_forward_convolution_undoes():
    for n, k, s, d, low, high in itertools.product((1, 3), (1, 2, 3), (1, 2, 3), (1, 2), (-1, 0, 1), (0, 1)):
        for extra in range(max(s, d)):
            size = (n - 1) * s + d * (k - 1) + 1 - low - high + extra
            if size < 1:
                continue
            geometry = Geometry.infer_transposed(
                (1, 2, n), (2, 3, k), stride=s, dilation=d, padding=((low, high),), output_padding=extra
            )
            assert geometry.x_shape == (1, 3, size)
            assert geometry.y_shape == (1, 2, n)


def test_transposed_same_padding_gives_n_times_stride():
    for n, k, s, d in itertools.product((1, 2, 5), range(1, 6), range(1, 5), (1, 2, 3)):
        for name in ("same", "same_lower"):
            transposed = Geometry.infer_transposed((1, 1, n), (1, 1, k), stride=s, dilation=d, padding=name)
            assert transposed.input == (n * s,)
            forward = INFER((1, 1, n * s), (1, 1, k), stride=s, dilation=d, padding=name)
            assert transposed.padding[0][0] == forward.padding[0][0]


def test_transposed_output_shapes_are_those_of_which_conv_makes_x():
    paddings = ("valid", "same", "same_lower", ((1, 0),), ((-1, 1),))
    for k, s, d, padding, size in itertools.product((1, 2, 3), (1, 2, 3), (1, 2), paddings, range(1, 12)):
        try:
            forward = INFER((1, 3, size), (2, 3, k), stride=s, dilation=d, padding=padding)
        except ValueError:
            continue  # it would be empty
        for n in range(5):
            x, w, settings = (1, 2, n), (2, 3, k), {"stride": s, "dilation": d, "padding": padding}
            if n == forward.output[0]:
                assert Geometry.infer_transposed(x, w, **settings, output_shape=size) == forward
            else:
                with pytest.raises(ValueError, match=r"output_shape must be .* on spatial axis 0, of which conv makes"):
                    Geometry.infer_transposed(x, w, **settings, output_shape=size)


def test_transposed_valid_padding_is_none():
    valid, none = (
        Geometry.infer_transposed((1, 1, 5, 4), (1, 1, 3, 2), stride=2, padding=padding) for padding in ("valid", 0)
    )
    assert valid == none


def test_equal_convolutions_are_equal_keys():
    one = INFER((2, 3, 8, 8), (4, 3, 3, 3), padding=1, stride=[1, 1])
    other = INFER([2, 3, 8, 8], (4, 3, 3, 3), padding=((1, 1), (1, 1)), dilation=np.int32(1))
    assert one == other
    assert hash(one) == hash(other)
    assert one != INFER((2, 3, 8, 8), (4, 3, 3, 3), padding=1, flip=True)


def test_phases_cover_every_input_once_and_every_product_once():
    for n, k, s, d, low, high in itertools.product((1, 4, 9), (1, 2, 4), (1, 2, 4), (1, 2, 3), (-1, 0, 3), (-1, 2)):
        try:
            geometry = INFER((1, 1, n), (1, 1, k), stride=s, dilation=d, padding=((low, high),))
        except ValueError:
            continue
        products = set()
        inputs = []
        for phase in geometry.phases:
            covered = range(n)[phase.inputs[0]]
            inputs += covered
            if phase.geometry is None:
                continue
            assert phase.geometry.output == (len(covered),)
            taps = list(range(k)[phase.taps[0]])[::-1]
            for u, i in enumerate(covered):
                for j, tap in enumerate(taps):
                    o = u + j * phase.geometry.dilation[0] - phase.geometry.padding[0][0]
                    if 0 <= o < geometry.output[0]:
                        products.add((i, tap, o))
        assert sorted(inputs) == list(range(n))
        everything = {
            (o * s + t * d - low, t, o)
            for o in range(geometry.output[0])
            for t in range(k)
            if 0 <= o * s + t * d - low < n
        }
        assert products == everything


def test_reduction_length_is_the_largest_number_of_products():
    geometry = INFER((2, 4, 9, 9), (6, 2, 3, 3), stride=2, padding=1, groups=2)
    assert geometry.reduction_length("forward") == 2 * 9
    assert geometry.reduction_length("data_grad") == 3 * 4
    assert geometry.reduction_length("weight_grad") == 2 * 25


def test_flops_and_bytes():
    geometry = INFER((8, 64, 56, 56), (128, 64, 3, 3), padding=1)
    assert geometry.flops() == 2 * 8 * 128 * 56 * 56 * 64 * 9
    assert geometry.flops(is_complex=True) == 4 * geometry.flops()
    assert geometry.bytes(4) == 4 * (8 * 64 * 56 * 56 + 128 * 64 * 9 + 8 * 128 * 56 * 56)
