"""cupyx.scipy.signal.correlate on a GPU, by Fourier transforms: CuPy's function for arrays of several axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpuconv.benchmark.peers import scipy
from gpuconv.benchmark.problem import Problem
from gpuconv.types import Direction

FORMS = scipy.FORMS
why_not, array = scipy.why_not, scipy.array


def about() -> str:
    """Return the version of CuPy."""
    import cupy

    return f"CuPy {cupy.__version__}"


def call(problem: Problem, direction: Direction, form: str) -> Callable[[], Any]:
    """Return the correlations of the peer scipy, computed by the function of cupyx."""
    import cupyx.scipy.signal

    return scipy.correlations(problem, direction, cupyx.scipy.signal.correlate, "fft")
