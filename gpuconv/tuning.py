"""Measurement of the fastest algorithm on this machine, with the result stored on disk: ``gpuconv.tune``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, SupportsIndex

import numpy

from gpuconv import dtypes, execute, select, settings, tuned
from gpuconv.arrays import Backend
from gpuconv.backends import backend as within
from gpuconv.backends import backend_named
from gpuconv.geometry import DIRECTIONS, Geometry
from gpuconv.request import Request
from gpuconv.types import BackendName, Direction, DtypeLike, Layout, Padding, PerAxis

if TYPE_CHECKING:
    from gpuconv.benchmark.problem import Problem
    from gpuconv.benchmark.timing import Clock

TURNS, MOST_SAMPLES = 5, 20
PROMISING = 4  # an algorithm is tried if its estimate is at most this many times the smallest one
MARGIN = 0.97  # of the default's time, which a faster algorithm must not exceed: smaller gains are within the noise


class Tuned(NamedTuple):
    """Result of :func:`tune` for one direction of a convolution.

    Attributes
    ----------
    geometry : Geometry
        The convolution.
    direction : str
        ``"forward"``, ``"data_grad"`` or ``"weight_grad"``.
    dtype, backend : str
        Names of the dtype and of the backend.
    default : str
        The algorithm that ``"auto"`` takes without tuning.
    fastest : str
        The fastest algorithm with correct results; `default` if none is faster than that by more than 3 %.
    seconds : dict of str to float
        Median time of each algorithm that was timed.
    wrong : tuple of str
        Algorithms whose results exceeded their error bound. They are never taken.
    """

    geometry: Geometry
    direction: Direction
    dtype: str
    backend: str
    default: str  # used without tuning
    fastest: str  # of those with correct results; the default if there are none
    seconds: dict[str, float]  # median of each algorithm that was timed
    wrong: tuple[str, ...] = ()  # algorithms whose results exceeded their error bound

    @property
    def gain(self) -> float:
        """Time of the default divided by that of the fastest; NaN if one of them was wrong and not timed."""
        return self.seconds.get(self.default, math.nan) / self.seconds.get(self.fastest, math.nan)


def tune(
    x_shape: Sequence[SupportsIndex],
    w_shape: Sequence[SupportsIndex],
    *,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
    layout: Layout = "channels_first",
    flip: bool = False,
    dtype: DtypeLike = "float32",
    directions: Direction | Sequence[Direction] = DIRECTIONS,
    backend: BackendName | None = None,
    seconds: float = 0.3,
) -> list[Tuned]:
    """Time the algorithms that can compute a convolution, and store the fastest for ``algorithm="auto"``.

    Parameters
    ----------
    x_shape, w_shape : sequence of int
        Shapes of x and w.
    stride, padding, dilation, groups, layout, flip
        As in :func:`gpuconv.conv`.
    dtype : dtype or str, default "float32"
        Dtype of all arrays.
    directions : str or sequence of str, default all three
        Of ``"forward"``, ``"data_grad"`` and ``"weight_grad"``.
    backend : {None, "auto", "numpy", "cupy"}, default None
        Where to compute. None selects the backend in force.
    seconds : float, default 0.3
        Time, in seconds, for which each algorithm is timed in each direction: less for fast ones, which are called at
        most 100 times, and more for one whose five calls take longer.

    Returns
    -------
    list of Tuned
        One for each direction.

    Raises
    ------
    ValueError
        If shapes do not fit, or a value is not permitted.
    TypeError
        If dtype or another argument is of the wrong kind.
    BackendError
        If the backend cannot be used.

    Notes
    -----
    Only algorithms with a fixed order of additions are tried, on NumPy those whose estimated time is at most four times
    the smallest estimate. Each result is first compared with a float64 reference; one that exceeds its error bound is
    not taken. The algorithms are timed in turns. An answer applies to exactly these shapes, this dtype and layout, on
    this machine with this version of gpuconv and build of NumPy or CuPy. It is stored in the folder of
    GPUCONV_CACHE_DIR. A call with a padding mode uses the answer for the padded x. An ordinary call never times
    anything.

    Examples
    --------
    >>> (found,) = tune((1, 8, 32, 32), (8, 8, 3, 3), padding=1, directions="forward", backend="numpy", seconds=0.01)
    >>> found.fastest in found.seconds
    True
    """
    if isinstance(directions, str):
        directions = (directions,)
    for direction in directions:
        if direction not in DIRECTIONS:
            raise ValueError(f"directions must be among {', '.join(DIRECTIONS)}; got {direction!r}")
    if not seconds > 0:
        raise ValueError(f"seconds must be more than 0, got {seconds!r}")
    kind = dtypes.named(dtype)
    geometry = Geometry.infer(
        x_shape, w_shape, stride, padding, dilation, groups, layout, flip, x_name="x_shape", w_name="w_shape"
    )
    return tuned_geometry(geometry, kind, directions, backend_named(backend), seconds)  # type: ignore[arg-type]


def tuned_geometry(
    geometry: Geometry, dtype: numpy.dtype, directions: Sequence[Direction], backend: Backend, seconds: float
) -> list[Tuned]:
    """Tune a geometry; its batch axes are timed as one."""
    from gpuconv.benchmark.problem import Problem
    from gpuconv.benchmark.timing import clock_for

    batch = int(numpy.prod(geometry.batch, dtype=int))
    problem = Problem(replace(geometry, layout="channels_first", batch=(batch,)), dtype, backend.xp)
    clock = clock_for(backend)
    with within(backend.kind), clock.running():
        found = [_tuned(problem, geometry, direction, backend, clock, seconds) for direction in directions]
    execute.clear()
    return found


def _tuned(
    problem: Problem, geometry: Geometry, direction: Direction, backend: Backend, clock: Clock, seconds: float
) -> Tuned:
    """Time the algorithms alternately, and store the fastest."""
    request = Request(geometry, problem.dtype, direction, backend, limit=settings.workspace_limit())
    default = select.untuned(request).algorithm
    calls, counts, samples, wrong = {}, {}, {}, []
    for name in _candidates(request):
        call = problem.call(direction, geometry.layout, name)
        result = clock.first(call)[1]
        if problem.verdict(result, direction, geometry.layout, loose=name in select.TRANSFORMS).right:
            once = clock.first(call)[0]
            calls[name], samples[name] = call, list[float]()
            counts[name] = max(1, min(MOST_SAMPLES, int(seconds / TURNS / max(once, 1e-9))))
        else:
            wrong.append(name)
    for _ in range(TURNS):
        for name, call in calls.items():
            samples[name] += clock.samples(call, counts[name])
    medians = {name: float(numpy.median(taken)) for name, taken in samples.items()}
    fastest = min(medians, key=medians.__getitem__, default=default)
    if default in medians and medians[fastest] > MARGIN * medians[default]:
        fastest = default
    if medians:
        tuned.remember(backend, direction, geometry, problem.dtype, fastest)
    return Tuned(geometry, direction, problem.dtype.name, backend.name, default, fastest, medians, tuple(wrong))


def _candidates(request: Request) -> list[str]:
    """Return the applicable algorithms with a fixed order of additions that their estimates do not exclude."""
    able = select.able(request)
    if request.backend.launch is not None:
        return able
    estimates = {name: select.estimate(name, request) for name in able}
    return [name for name in able if estimates[name] <= PROMISING * min(estimates.values())]
