"""Which algorithm computes a convolution, and why.

An algorithm says what it can do (``why_not``). What ``algorithm="auto"`` takes among those that can is decided here:
what gpuconv.tune has found fastest for just this convolution, else on NumPy the least of their own estimates
(``nanoseconds``), and on a GPU rules with their reasons. A named algorithm is taken or refused with its reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

from gpuconv import settings, tuned
from gpuconv.cpu import depthwise, fft, im2col, winograd
from gpuconv.gpu import direct, implicit_gemm, scatter
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

# What multiplies transforms of its operands: its error is bounded by the largest result, not element by element.
TRANSFORMS: tuple[str, ...] = ("winograd", "fft")


class Choice(NamedTuple):
    """An algorithm, and why it is taken."""

    algorithm: str
    reason: str


def choose(request: Request, algorithm: str) -> Choice:
    """The algorithm by name, by what was measured, or by rule; ValueError where the named one cannot do it."""
    check_name(algorithm)
    if algorithm != "auto":
        if reason := MODULES[algorithm].why_not(request):
            raise ValueError(f"algorithm={algorithm!r} cannot compute this {request.direction}: {reason}")
        return Choice(algorithm, "asked for by name")
    answer = tuned.recalled(request.backend, request.geometry, request.dtype, request.direction)
    if answer in MODULES and MODULES[answer].why_not(request) is None:
        return Choice(answer, "the fastest on this machine, as gpuconv tune has found")
    return untuned(request)


def untuned(request: Request) -> Choice:
    """The algorithm by rule: on NumPy that of the least estimate."""
    names = able(request)
    if request.backend.launch is None:
        expected = {name: MODULES[name].nanoseconds(request) for name in names}
        name = min(names, key=expected.__getitem__)
        return Choice(name, f"{_milliseconds(expected[name])}, the least")
    return next(choice for choice in _preferences(request) if choice.algorithm in names)


def able(request: Request) -> list[str]:
    """The algorithms that can compute it."""
    return [name for name, module in MODULES.items() if module.why_not(request) is None]


def refused(request: Request, taken: str) -> Iterator[tuple[str, str]]:
    """The algorithms that are not taken, each with the reason."""
    for name, module in MODULES.items():
        if name == taken:
            continue
        reason = module.why_not(request)
        if reason is None and request.backend.launch is None:
            reason = _milliseconds(module.nanoseconds(request))
        yield name, reason or f"it can, but {taken} goes first here"


def _milliseconds(nanoseconds: float) -> str:
    milliseconds = nanoseconds / 1e6
    return f"{milliseconds:{'.2g' if milliseconds < 10 else '.0f'}} ms of one core by its estimate"


def _preferences(request: Request) -> list[Choice]:
    """Algorithms from the most wanted on where there are kernels, each with the reason; the last accepts everything."""
    wanted = []
    if implicit_gemm.fills_a_tile(request.geometry, request.direction):
        wanted.append(Choice("implicit_gemm", "there is enough of each group to fill half a tile or more"))
    elif request.geometry.groups > 1:
        wanted.append(
            Choice("direct", "groups of few channels leave most of a tile empty, and are too many for products")
        )
    wanted.append(Choice("im2col", "one matrix product does all filters at once"))
    return wanted


def check_name(algorithm: object) -> None:
    """ValueError unless it is "auto" or the name of an algorithm."""
    if algorithm != "auto" and (not isinstance(algorithm, str) or algorithm not in MODULES):
        raise ValueError(f"algorithm must be one of auto, {', '.join(ALGORITHMS)}; got {algorithm!r}")


def consent(algorithm: str, deterministic: bool | None) -> bool:
    """Whether additions must have a fixed order: naming an algorithm consents to its own, unless the caller insists."""
    required = settings.deterministic(deterministic)
    return required if algorithm == "auto" else bool(deterministic)
