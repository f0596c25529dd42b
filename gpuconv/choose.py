"""Which algorithm computes a convolution, and why.

An algorithm says what it can do (``why_not``). What ``algorithm="auto"`` takes among those that can is decided here:
what gpuconv.tune has found fastest for just this convolution, else on NumPy the least of their own estimates
(``nanoseconds``), and on a GPU rules with their reasons. A named algorithm is taken or refused with its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import ModuleType
from typing import Any, get_args

import numpy

from gpuconv import dtypes, settings, tuned
from gpuconv.algorithms import depthwise, direct, fft, im2col, implicit_gemm, scatter, winograd
from gpuconv.backend import Backend, backend_named
from gpuconv.geometry import DIRECTIONS, Direction, Geometry

MODULES: dict[str, ModuleType] = {
    "im2col": im2col,
    "winograd": winograd,
    "fft": fft,
    "depthwise": depthwise,
    "implicit_gemm": implicit_gemm,
    "scatter": scatter,
    "direct": direct,
}
ALGORITHMS: tuple[str, ...] = tuple(MODULES)

# What multiplies transforms of its operands: its error is bounded by the largest result, not element by element.
TRANSFORMS: tuple[str, ...] = ("winograd", "fft")

# Where an algorithm does nothing but launch kernels, so that a call can be made again from its launches.
LAUNCHES_ONLY: dict[str, tuple[Direction, ...]] = {
    "implicit_gemm": DIRECTIONS,
    "direct": ("forward", "data_grad"),
}
# Where all that it does to arrays of NumPy is done by functions of the array module, which can be called again.
ON_TAPE: tuple[str, ...] = ("im2col", "winograd", "depthwise", "scatter")


@dataclass(frozen=True)
class Explanation:
    """What would compute a convolution, and why; ``str()`` of it is a short report."""

    algorithm: str
    reason: str
    refused: tuple[tuple[str, str], ...]  # (algorithm, reason), of all that were not taken
    direction: Direction
    backend: str
    dtype: str
    geometry: Geometry
    candidates: tuple[str, ...] = ()  # how the algorithm could do it, the way that is taken first

    def __str__(self) -> str:
        g = self.geometry
        gflop = g.flops(is_complex=self.dtype.startswith("complex")) / 1e9
        lines = [
            f"{self.direction} of x {g.x_shape}, w {g.w_shape} -> y {g.y_shape}, {self.dtype} on {self.backend}",
            f"  stride {g.stride}, padding {g.padding}, dilation {g.dilation}, groups {g.groups}, {g.layout}",
            f"  {gflop:.3g} GFLOP in sums of {g.reduction_length(self.direction)} products",
            f"takes {self.algorithm}: {self.reason}",
            *(f"  {'by' if number == 0 else 'or'} {candidate}" for number, candidate in enumerate(self.candidates)),
            *(f"not {name}: {reason}" for name, reason in self.refused),
        ]
        return "\n".join(lines)


@lru_cache(maxsize=4096)
def choose(
    geometry: Geometry, dtype: numpy.dtype, direction: Direction, backend: Backend, algorithm: str, deterministic: bool
) -> Explanation:
    """The algorithm by name, by what was measured, or by rule; ValueError where the named one cannot do it."""
    check_name(algorithm)
    if algorithm == "auto":
        answer = tuned.recalled(backend, geometry, dtype, direction)
        if answer not in able(geometry, dtype, direction, backend, deterministic):
            return untuned(geometry, dtype, direction, backend, deterministic)
        reason = "the fastest on this machine, as gpuconv tune has found"
        return _explained(answer, reason, geometry, dtype, direction, backend, deterministic)
    if reason := MODULES[algorithm].why_not(geometry, dtype, direction, backend, deterministic):
        raise ValueError(f"algorithm={algorithm!r} cannot compute this {direction}: {reason}")
    return _explained(algorithm, "asked for by name", geometry, dtype, direction, backend, deterministic)


def untuned(
    geometry: Geometry, dtype: numpy.dtype, direction: Direction, backend: Backend, deterministic: bool = True
) -> Explanation:
    """The algorithm by rule: on NumPy that of the least estimate."""
    names = able(geometry, dtype, direction, backend, deterministic)
    if backend.launch is None:
        expected = estimates(names, geometry, dtype, direction)
        name = min(names, key=expected.__getitem__)
        reason = f"{_milliseconds(expected[name])}, the least"
    else:
        name, reason = next((name, reason) for name, reason in _preferences(geometry, direction) if name in names)
    return _explained(name, reason, geometry, dtype, direction, backend, deterministic)


def _explained(
    name: str,
    reason: str,
    geometry: Geometry,
    dtype: numpy.dtype,
    direction: Direction,
    backend: Backend,
    deterministic: bool,
) -> Explanation:
    """The choice of an algorithm with its reason, and those of the others."""
    refused = []
    for other, module in MODULES.items():
        if other == name:
            continue
        why = module.why_not(geometry, dtype, direction, backend, deterministic)
        if why is None and backend.launch is None:
            why = _milliseconds(estimates([other], geometry, dtype, direction)[other])
        refused.append((other, why or f"it can, but {name} goes first here"))
    return Explanation(name, reason, tuple(refused), direction, backend.name, dtype.name, geometry)


def able(
    geometry: Geometry, dtype: numpy.dtype, direction: Direction, backend: Backend, deterministic: bool
) -> list[str]:
    """The algorithms that can compute it."""
    return [
        name
        for name, module in MODULES.items()
        if module.why_not(geometry, dtype, direction, backend, deterministic) is None
    ]


def estimates(names: Sequence[str], geometry: Geometry, dtype: numpy.dtype, direction: Direction) -> dict[str, float]:
    """Nanoseconds of one core on NumPy, by the algorithms' own estimates."""
    return {name: MODULES[name].nanoseconds(geometry, direction, dtypes.is_complex(dtype)) for name in names}


def _milliseconds(nanoseconds: float) -> str:
    milliseconds = nanoseconds / 1e6
    return f"{milliseconds:{'.2g' if milliseconds < 10 else '.0f'}} ms of one core by its estimate"


def _preferences(geometry: Geometry, direction: Direction) -> list[tuple[str, str]]:
    """Algorithms from the most wanted on where there are kernels, each with the reason; the last accepts everything."""
    wanted = []
    if implicit_gemm.fills_a_tile(geometry, direction):
        wanted.append(("implicit_gemm", "there is enough of each group to fill half a tile or more"))
    elif geometry.groups > 1:
        wanted.append(("direct", "groups of few channels leave most of a tile empty, and are too many for products"))
    wanted.append(("im2col", "one matrix product does all filters at once"))
    return wanted


def check_name(algorithm: object) -> None:
    """ValueError unless it is "auto" or the name of an algorithm."""
    if algorithm != "auto" and (not isinstance(algorithm, str) or algorithm not in MODULES):
        raise ValueError(f"algorithm must be one of auto, {', '.join(ALGORITHMS)}; got {algorithm!r}")


def explain(
    x_shape: Sequence[int],
    w_shape: Sequence[int],
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    layout: str = "channels_first",
    flip: bool = False,
    dtype: Any = "float32",
    direction: Direction = "forward",
    backend: str | None = None,
    algorithm: str = "auto",
    precision: str | None = None,
    deterministic: bool | None = None,
) -> Explanation:
    """Which algorithm would compute this convolution, and why each other one would not.

    ``backend`` is "numpy" or "cupy"; None stands for the one in force. The other arguments are those of
    :func:`gpuconv.conv`.

    >>> explanation = explain((8, 64, 56, 56), (64, 64, 3, 3), padding=1, backend="numpy")
    >>> explanation.algorithm
    'winograd'
    >>> "ms of one core by its estimate, the least" in explanation.reason
    True
    """
    if direction not in get_args(Direction):
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}; got {direction!r}")
    if backend is not None and backend not in settings.BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(settings.BACKENDS)}; got {backend!r}")
    kind = dtypes.named(dtype)
    geometry = Geometry.infer(
        x_shape, w_shape, stride=stride, padding=padding, dilation=dilation, groups=groups, layout=layout, flip=flip,
        x_name="x_shape", w_name="w_shape",
    )  # fmt: skip
    check_name(algorithm)
    permitted = settings.precision(precision)
    where = backend_named(backend)
    explanation = choose(geometry, kind, direction, where, algorithm, consent(algorithm, deterministic))
    plans = getattr(MODULES[explanation.algorithm], "plans", None)
    if plans is None:
        return explanation
    found = plans(geometry, kind, direction, where.device(), permitted, settings.workspace_limit())
    return replace(explanation, candidates=tuple(str(plan.choice) for plan in found))


def consent(algorithm: str, deterministic: bool | None) -> bool:
    """Whether additions must have a fixed order: naming an algorithm consents to its own, unless the caller insists."""
    required = settings.deterministic(deterministic)
    return required if algorithm == "auto" else bool(deterministic)
