"""scipy.signal.correlate, called for each image and filter, with the channels as an additional axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpuconv.benchmark.problem import Problem
from gpuconv.types import Direction

FORMS = ("channels_first",)
MOST_PRODUCTS = 4 * 10**9  # these take seconds


def about() -> str:
    """Return the version of SciPy."""
    import scipy

    return f"SciPy {scipy.__version__}"


def why_not(problem: Problem, direction: Direction, form: str) -> str | None:
    """Return why correlate cannot compute a problem, or takes too long for it; otherwise None."""
    geometry = problem.geometry
    if max(geometry.stride) > 1 or max(geometry.dilation) > 1:
        return "correlate has no stride and no dilation"
    if geometry.groups > 1:
        return "correlate has no groups"
    if problem.transposed:
        return "correlate has no transpose"
    if any(not 0 <= end < size for pair, size in zip(geometry.padding, geometry.window, strict=True) for end in pair):
        return "padding as wide as the kernel, or negative"
    if problem.dtype.name in ("float16", "bfloat16"):
        return "correlate has no half precision"
    if geometry.multiply_adds() > MOST_PRODUCTS:
        return f"{geometry.multiply_adds():.2g} products would take many seconds"
    return None


def call(problem: Problem, direction: Direction, form: str) -> Callable[[], Any]:
    """Return the correlations, computed directly or by Fourier transforms, as SciPy chooses."""
    import scipy.signal

    return correlations(problem, direction, scipy.signal.correlate, "auto")


def correlations(
    problem: Problem, direction: Direction, correlate: Callable[..., Any], method: str
) -> Callable[[], Any]:
    """Return a direction as correlations of padded volumes with kernels, computed by ``correlate``."""
    xp, x, w, dy, geometry = problem.xp, problem.x, problem.w, problem.dy, problem.geometry
    spatial = tuple(range(2, x.ndim))

    def correlated(volumes: Any, kernels: Any, around: Any) -> Any:
        volumes = xp.pad(volumes, [(0, 0), (0, 0), *around])
        rows = [[correlate(v, k, mode="valid", method=method)[0] for k in kernels] for v in volumes]
        return xp.stack([xp.stack(row) for row in rows])

    if direction == "forward":
        return lambda: correlated(x, xp.conjugate(w), geometry.padding)
    if direction == "data_grad":
        axes = zip(geometry.padding, geometry.window, strict=True)
        around = [(window - 1 - low, window - 1 - high) for (low, high), window in axes]
        return lambda: correlated(dy, xp.flip(w.swapaxes(0, 1), spatial), around)
    # correlate conjugates its second argument. data_grad needs the conjugate of w, weight_grad that of x.
    return lambda: xp.conjugate(correlated(x.swapaxes(0, 1), dy.swapaxes(0, 1), geometry.padding)).swapaxes(0, 1)


def array(result: Any, problem: Problem) -> Any:
    """Return the result unchanged."""
    return result
