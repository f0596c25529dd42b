"""Selection of the algorithm of a convolution, with reasons.

Each algorithm tells whether it is applicable (``why_not``). Among the applicable ones, ``algorithm="auto"`` selects the
one that gpuconv.tune has found fastest for exactly this convolution. Otherwise it selects the smallest estimated time
(``nanoseconds``) on NumPy, and follows rules with reasons on a GPU. A named algorithm is used, or refused with the
reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

from gpuconv import settings, tuned
from gpuconv.cpu import fft, im2col, winograd
from gpuconv.gpu import depthwise, direct, implicit_gemm, scatter
from gpuconv.request import Request

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

# Algorithms that multiply transforms of the operands: the largest result bounds their error, not each element.
TRANSFORMS: tuple[str, ...] = ("winograd", "fft")


class Choice(NamedTuple):
    """An algorithm and the reason why it is used."""

    algorithm: str
    reason: str


def choose(request: Request, algorithm: str) -> Choice:
    """Return the algorithm by name, measurement or rule; raise ValueError if the named one is not applicable."""
    check_name(algorithm)
    if algorithm != "auto":
        if reason := MODULES[algorithm].why_not(request):
            raise ValueError(f"algorithm={algorithm!r} cannot compute this {request.direction}: {reason}")
        return Choice(algorithm, "requested by name")
    answer = tuned.recalled(request.backend, request.geometry, request.dtype, request.direction)
    if answer in MODULES and MODULES[answer].why_not(request) is None:
        return Choice(answer, "the fastest on this machine, as measured by gpuconv tune")
    return untuned(request)


def untuned(request: Request) -> Choice:
    """Return the algorithm by rule: on NumPy the one with the smallest estimate."""
    names = able(request)
    if request.backend.launch is None:
        expected = {name: estimate(name, request) for name in names}
        name = min(names, key=expected.__getitem__)
        return Choice(name, f"{_milliseconds(expected[name])}, the smallest")
    return next(choice for choice in _preferences(request) if choice.algorithm in names)


def estimate(algorithm: str, request: Request) -> float:
    """Return the estimated nanoseconds of an algorithm on NumPy: 0 without channels, filters or images."""
    return MODULES[algorithm].nanoseconds(request) if request.geometry.multiply_adds() else 0.0


def able(request: Request) -> list[str]:
    """Return the applicable algorithms."""
    return [name for name, module in MODULES.items() if module.why_not(request) is None]


def refused(request: Request, taken: str) -> Iterator[tuple[str, str]]:
    """Yield the algorithms that are not used, each with the reason."""
    for name, module in MODULES.items():
        if name == taken:
            continue
        reason = module.why_not(request)
        if reason is None and request.backend.launch is None:
            reason = _milliseconds(estimate(name, request))
        yield name, reason or f"it is applicable, but {taken} is preferred here"


def _milliseconds(nanoseconds: float) -> str:
    milliseconds = nanoseconds / 1e6
    return f"{milliseconds:{'.2g' if milliseconds < 10 else '.0f'}} ms on one core (estimate)"


def _preferences(request: Request) -> list[Choice]:
    """Return algorithms for GPUs in order of preference, each with the reason; the last one accepts everything."""
    geometry, wanted = request.geometry, []
    if implicit_gemm.fills_a_tile(geometry, request.direction):
        wanted.append(Choice("implicit_gemm", "each group fills half a tile or more"))
    else:
        if geometry.group_channels == 1:
            reason = "groups of one channel are limited by memory traffic, and it reads each element once"
        else:
            reason = "groups of few channels leave most of a tile empty, and it reads each element once"
        wanted.append(Choice("depthwise", reason))
        if geometry.groups > 1:
            reason = "groups of few channels leave most of a tile empty, and there are too many for one product each"
            wanted.append(Choice("direct", reason))
    wanted.append(Choice("im2col", "one matrix product computes all filters at once"))
    return wanted


def check_name(algorithm: object) -> None:
    """Raise ValueError unless it is "auto" or the name of an algorithm."""
    if algorithm != "auto" and (not isinstance(algorithm, str) or algorithm not in MODULES):
        raise ValueError(f"algorithm must be one of auto, {', '.join(ALGORITHMS)}; got {algorithm!r}")


def consent(algorithm: str, deterministic: bool | None) -> bool:
    """Whether additions must have a fixed order. A named algorithm may use any, unless ``deterministic`` is True."""
    required = settings.deterministic(deterministic)
    return required if algorithm == "auto" else bool(deterministic)
