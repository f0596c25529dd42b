"""Views have the same geometry as NumPy's views of arrays, without the arrays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuconv.blocking import as_matrix
from gpuconv.views import View, first_byte, is_contiguous


def _random_index(data, view):
    parts = []
    for size in view.shape:
        kind = data.draw(st.sampled_from(["all", "slice", "new", "int"]))
        if kind == "new":
            parts.append(None)
        if kind == "int" and size:
            parts.append(data.draw(st.integers(-size, size - 1)))
        else:
            ends = st.none() | st.integers(-size - 1, size + 1)
            step = data.draw(st.sampled_from([None, 1, 2, -1, -2]))
            parts.append(slice(None) if kind != "slice" else slice(data.draw(ends), data.draw(ends), step))
    cut = data.draw(st.integers(0, len(parts)))
    return tuple(parts[:cut]) if data.draw(st.booleans()) else (..., *parts[len(parts) - cut :])


@given(st.data())
def test_views_are_what_numpy_makes_of_arrays(data):
    """After any operations the first element, the shape and the relevant strides are the same."""
    whole = np.zeros(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)), np.float32)
    place = whole.__array_interface__["data"][0]
    array, view = whole, View(0, 0, whole.shape, whole.strides, whole.dtype)
    for _ in range(data.draw(st.integers(1, 4))):
        what = data.draw(st.sampled_from(["index", "transpose", "reshape"]))
        if what == "index":
            index = _random_index(data, view)
            array, view = array[index if Ellipsis in index else (*index, ...)], view[index]
        elif what == "transpose":
            axes = data.draw(st.permutations(range(array.ndim)))
            array, view = array.transpose(axes), view.transpose(*axes)
        elif array.size:
            shape = data.draw(st.sampled_from(_factorings(array.size)))
            try:
                seen = np.reshape(array, shape, copy=False)
            except ValueError:
                with pytest.raises(ValueError, match="without a copy"):
                    view.reshape(*shape)
                continue
            array, view = seen, view.reshape(*shape)
        assert view.shape == array.shape
        if array.size:
            assert view.offset == array.__array_interface__["data"][0] - place
            steps = zip(view.strides, array.strides, array.shape, strict=True)
            assert all(mine == numpys for mine, numpys, size in steps if size > 1)
            assert view.is_aligned


def _factorings(size):
    found = [(size,), (1, size), (size, 1)]
    for first in range(2, size):
        if size % first == 0:
            found.append((first, size // first))
            found += [(first, second, -1) for second in range(2, size) if (size // first) % second == 0]
    return found


def test_shapes_and_axes_are_given_one_by_one_or_as_a_tuple():
    array = np.zeros((2, 3, 4))
    view = View(0, 0, array.shape, array.strides, array.dtype)
    for axes in ((2, 0, 1), (1, 0, 2)):
        for found in (view.transpose(axes), view.transpose(*axes)):
            assert (found.shape, found.strides) == (array.transpose(axes).shape, array.transpose(axes).strides)
    for shape in ((6, 4), (24,), (2, 12), (1, 2, 3, 4, 1)):
        for found in (view.reshape(shape), view.reshape(*shape)):
            assert found.shape == shape
    flat = View(0, 0, (4,), (8,), np.dtype("f8"))
    assert (flat.transpose(0).shape, flat.reshape(4).shape) == ((4,), (4,))
    one = View(0, 0, (1, 1), (99, -7), np.dtype("f8"))
    assert one.reshape(1, 1, 1).shape == (1, 1, 1)
    assert one.reshape(()).shape == ()


@pytest.mark.parametrize(
    "shape, steps, is_one_piece",
    [
        ((2, 3), (3, 1), True),
        ((2, 3), (4, 1), False),
        ((2, 3), (1, 2), False),
        ((2, 1), (1, 99), True),
        ((0, 3), (99, -5), True),
        ((1, 1), (-1, 9), True),
        ((), (), True),
    ],
)
def test_what_is_contiguous(shape, steps, is_one_piece):
    assert is_contiguous(shape, tuple(8 * step for step in steps), 8) == is_one_piece


def test_where_memory_begins():
    for array in (np.zeros((3, 4))[::-1], np.zeros((3, 4))[:, ::-2], np.zeros((3, 4)).T, np.zeros((0, 4))[::-1]):
        low = np.lib.array_utils.byte_bounds(array)[0] if array.size else array.__array_interface__["data"][0]
        assert array.__array_interface__["data"][0] + first_byte(array.shape, array.strides) == low


@pytest.mark.parametrize(
    "shape, steps, is_taken",
    [
        ((3, 4), (4, 1), True),
        ((3, 4), (9, 1), True),
        ((3, 4), (1, 3), True),
        ((3, 4), (1, 7), True),
        ((3, 4), (3, 1), False),  # rows overlap
        ((3, 4), (1, 2), False),
        ((3, 4), (2, 8), False),
        ((3, 4), (0, 1), False),
        ((3, 4), (-4, 1), False),
        ((1, 4), (99, 5), True),  # the stride of an axis of one element is irrelevant
        ((1, 4), (-7, 1), True),
        ((3, 1), (5, 99), True),
        ((3, 1), (1, -7), True),
        ((1, 4), (99, -1), False),
    ],
)
def test_matrices_that_blas_reads_without_a_copy(shape, steps, is_taken):
    view = View(0, 0, shape, tuple(8 * step for step in steps), np.dtype("f8"))
    matrix = as_matrix(view, 1, 1)
    assert (matrix is not None) == is_taken
    if is_taken:
        assert matrix.shape == shape
