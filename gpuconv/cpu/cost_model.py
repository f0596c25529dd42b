"""What NumPy takes for the parts of a convolution: the measure by which algorithms are compared.

Nanoseconds of one core of an AMD EPYC with AVX-512 and NumPy 2.4 (OpenBLAS), in float32. On other machines they differ;
it is their proportions that decide, and these differ less. bench/results has the times of all algorithms beside each
other on a machine without AVX-512 (sweep.json), and tests/test_choice.py holds the choice against them.
"""

from __future__ import annotations

PRODUCT = 0.022  # a multiplication and addition in a long matrix product
COPY = 0.4  # an element that is copied in another order
ADD = 0.5  # an element that a tap multiplies and adds, or adds
ACCUMULATE = 2.5  # an element of a product that is added to a plane
FOURIER = 0.9  # an element of a transform, for each doubling of its length
MULTIPLY = 10.0  # two complex elements of spectra multiplied and added
TRANSFORM = 0.32  # an element that a small matrix makes: 0.25 with AVX-512, 0.5 without
STEP = 2000  # a function called, and what Python does for it
COMPLEX = 4  # times as long for a product of complex numbers


def product(depth: int, width: int, is_complex: bool = False) -> float:
    """A multiplication and addition of sums of this length, so many of which share their factors."""
    return PRODUCT * (1 + 4 / max(1, min(depth, width))) * (COMPLEX if is_complex else 1)


def copied(run: float) -> float:
    """An element copied in another order, so many of which lie side by side."""
    return COPY * (1 + 8 / run)


def transform(run: int, is_whole: bool) -> float:
    """An element that a small matrix makes, so many of which lie side by side, whole lines of them or parts."""
    return TRANSFORM * (1 + (64 if is_whole else 96) / run)


def exchanged(elements: int) -> float:
    """So many elements copied with their channels to the other side of their pixels."""
    return 2.5 * COPY * elements


def added(run: int) -> float:
    """An element added to others, so many of which lie side by side."""
    return ADD * (1 + 64 / run)
