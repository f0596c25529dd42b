"""Which algorithm computes a convolution, and why.

An algorithm says what it can do (``why_not``). What ``algorithm="auto"`` takes among those that can is decided here:
what gpuconv.tune has found fastest for just this convolution, else on NumPy the least of their own estimates
(``nanoseconds``), and on a GPU rules with their reasons. A named algorithm is taken or refused with its reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple, get_args

from gpuconv import dtypes, settings, tuned
from gpuconv.algorithms import depthwise, direct, fft, im2col, implicit_gemm, scatter, winograd
from gpuconv.backend import backend_named
from gpuconv.geometry import DIRECTIONS, Direction, Geometry
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


class Choice(NamedTuple):
    """An algorithm, and why it is taken."""

    algorithm: str
    reason: str


@lru_cache(maxsize=4096)
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


def _refused(request: Request, taken: str) -> Iterator[tuple[str, str]]:
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
    permitted, limit = settings.precision(precision), settings.workspace_limit()
    where = backend_named(backend)
    request = Request(geometry, kind, direction, where, consent(algorithm, deterministic), limit)
    choice = choose(request, algorithm)
    plans = getattr(MODULES[choice.algorithm], "plans", None)
    found = plans(geometry, kind, direction, where.device(), permitted, limit) if plans is not None else ()
    note = im2col.exceeds(request) if choice.algorithm == "im2col" else None
    return Explanation(
        choice.algorithm,
        f"{choice.reason}; {note}" if note else choice.reason,
        refused=tuple(_refused(request, choice.algorithm)),
        direction=direction,
        backend=where.name,
        dtype=kind.name,
        geometry=geometry,
        candidates=tuple(str(plan.choice) for plan in found),
    )


def consent(algorithm: str, deterministic: bool | None) -> bool:
    """Whether additions must have a fixed order: naming an algorithm consents to its own, unless the caller insists."""
    required = settings.deterministic(deterministic)
    return required if algorithm == "auto" else bool(deterministic)
