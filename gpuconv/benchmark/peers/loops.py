"""The textbook algorithm: Python loops over images, filters and outputs, with a NumPy product inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy

from gpuconv.benchmark.problem import Problem
from gpuconv.types import Direction

FORMS = ("channels_first",)
MOST_STEPS = 500_000  # these take seconds


def about() -> str:
    """Return the version of NumPy, which computes the products."""
    return f"loops with NumPy {numpy.__version__}"


def why_not(problem: Problem, direction: Direction, form: str) -> str | None:
    """Return why the loops cannot compute a problem, or take too long for it; otherwise None."""
    geometry = problem.geometry
    if problem.transposed or geometry.groups > 1 or max(geometry.dilation) > 1:
        return "the loops do not support dilation, groups or transposed convolutions"
    if min(end for pair in geometry.padding for end in pair) < 0 or problem.dtype.name in ("float16", "bfloat16"):
        return "the loops do not support negative padding or half precision"
    if problem.dy.size > MOST_STEPS:
        return f"{problem.dy.size:.2g} steps of a Python loop"
    return None


def call(problem: Problem, direction: Direction, form: str) -> Callable[[], Any]:
    """Return the function with the loops of a direction."""
    functions: dict[Direction, Callable[[Problem], Any]] = {
        "forward": _forward,
        "data_grad": _data_grad,
        "weight_grad": _weight_grad,
    }
    return lambda: functions[direction](problem)


def array(result: Any, problem: Problem) -> Any:
    """Return the result unchanged."""
    return result


def _padded(problem: Problem) -> Any:
    return numpy.pad(problem.x, ((0, 0), (0, 0), *problem.geometry.padding))


def _steps(problem: Problem) -> Iterator[tuple[tuple[int, ...], tuple[Any, ...]]]:
    """Yield the index of every output, with the window of padded x that it depends on."""
    g = problem.geometry
    for output in product(*map(range, problem.dy.shape)):
        places = zip(output[2:], g.stride, g.kernel, strict=True)
        yield output, (output[0], slice(None), *(slice(o * s, o * s + k) for o, s, k in places))


def _forward(problem: Problem) -> Any:
    x, y = _padded(problem), numpy.zeros_like(problem.dy)
    for output, window in _steps(problem):
        y[output] = numpy.sum(x[window] * problem.w[output[1]])
    return y


def _data_grad(problem: Problem) -> Any:
    wide = numpy.zeros_like(_padded(problem))
    for output, window in _steps(problem):
        wide[window] += problem.dy[output] * numpy.conjugate(problem.w[output[1]])
    axes = zip(problem.geometry.padding, problem.geometry.input, strict=True)
    return wide[(slice(None), slice(None), *(slice(low, low + n) for (low, _), n in axes))]


def _weight_grad(problem: Problem) -> Any:
    x, dw = _padded(problem), numpy.zeros_like(problem.w)
    for output, window in _steps(problem):
        dw[output[1]] += problem.dy[output] * numpy.conjugate(x[window])
    return dw
