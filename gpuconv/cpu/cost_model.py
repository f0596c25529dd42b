"""Costs of the parts of a convolution on NumPy, by which algorithms are compared.

The unit is nanoseconds of one core of an AMD EPYC with AVX-512 and NumPy 2.4 (OpenBLAS), in float32. Other machines
differ, but the choice depends only on the ratios, which differ less. bench/results has the times of all algorithms on
a machine without AVX-512 (sweep.json), and tests/test_choice.py compares the choice with them.
"""

from __future__ import annotations

PRODUCT = 0.022  # a multiply-add in a long matrix product
COPY = 0.4  # an element copied in another order
ADD = 0.5  # an element that is multiplied by a tap and added, or only added
ACCUMULATE = 2  # an element of a product that is added to a plane of col2im
FOURIER = 0.9  # an element of a Fourier transform, for each doubling of its length
MULTIPLY = 10.0  # a multiply-add of two complex elements of spectra
TRANSFORM = 0.25  # an element of a product with a small matrix
STEP = 1600  # a function call, with the overhead of Python
MATRIX = 500  # a matrix product in a stack of products
ALONE = 1.6  # ratio of the time with one thread to that with several, of a convolution that has few tasks
COMPLEX = 4  # ratio of a complex product to a real one


def product(depth: int, width: int, is_complex: bool = False) -> float:
    """Return the cost of a multiply-add in sums of length ``depth``, of which ``width`` share their factors."""
    return PRODUCT * (1 + 6 / max(1, min(depth, width))) * (COMPLEX if is_complex else 1)


def copied(run: float) -> float:
    """Return the cost of copying an element in another order, in contiguous runs of this length."""
    return COPY * (1 + 3.5 / run)


def transform(run: int, is_whole: bool) -> float:
    """Return the cost of an element of a product with a small matrix, in contiguous runs of this length.

    ``is_whole``: whether the runs make up whole lines, which can be read in place.
    """
    return TRANSFORM * (1 + (22 if is_whole else 96) / run)


def exchanged(elements: int) -> float:
    """Return the cost of copying elements between channels_first and channels_last."""
    return 3.2 * COPY * elements


def added(run: int) -> float:
    """Return the cost of adding an element to another, in contiguous runs of this length."""
    return ADD * (1 + 64 / run)
