"""``gpuconv check``: compare every available algorithm with the float64 reference."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import numpy

from gpuconv import dtypes, settings
from gpuconv.arrays import NUMPY, Backend, BackendError
from gpuconv.backends import cupy_backend, driver_devices
from gpuconv.benchmark.problem import Problem
from gpuconv.geometry import DIRECTIONS, Geometry
from gpuconv.request import Request
from gpuconv.select import MODULES, TRANSFORMS
from gpuconv.types import Direction

GEOMETRIES = tuple(
    Geometry.infer(x, w, **settings)
    for x, w, settings in (
        ((2, 8, 13, 12), (12, 8, 3, 3), {"padding": 1}),
        ((2, 8, 13, 12), (12, 8, 1, 1), {}),
        ((2, 3, 17, 16), (8, 3, 7, 7), {"padding": 3, "stride": 2}),
        ((2, 4, 12, 11), (4, 4, 2, 4), {"padding": ((0, 1), (2, 1)), "stride": (2, 3)}),
        ((2, 4, 15, 14), (6, 4, 3, 3), {"padding": 2, "dilation": 2}),
        ((1, 4, 16, 15), (4, 4, 3, 2), {"stride": 2, "dilation": (3, 2), "padding": ((-1, 3), (2, -2))}),
        ((2, 6, 9, 10), (9, 2, 3, 3), {"groups": 3, "padding": "same"}),
        ((2, 8, 11, 12), (8, 1, 3, 3), {"groups": 8, "padding": 1, "stride": 2}),
        ((3, 3, 4, 4), (5, 3, 3, 3), {"padding": "full", "flip": True}),
        ((2, 6, 50), (4, 6, 5), {"padding": "causal", "dilation": 2}),
        ((1, 4, 6, 7, 8), (5, 4, 3, 2, 3), {"padding": 1, "stride": (1, 2, 1)}),
    )
)


class Outcome(NamedTuple):
    """The results of all geometries for one algorithm, direction, dtype and backend."""

    backend: str
    algorithm: str
    direction: Direction
    dtype: str
    right: int
    refused: int
    worst: float  # the largest ratio of an error to its bound
    wrong: tuple[Geometry, ...]


def backends() -> tuple[list[Backend], str]:
    """Return the available backends, and why CuPy is unavailable, or an empty string.

    Raises BackendError if the driver reports a device that CuPy cannot use.
    """
    try:
        return [NUMPY, cupy_backend()], ""
    except BackendError as error:
        if driver_devices():
            raise
        return [NUMPY], str(error)


def outcomes(places: list[Backend]) -> Iterator[Outcome]:
    """Yield one outcome per backend, algorithm, direction and dtype, unless the algorithm refuses every geometry."""
    for place, (name, module), direction, dtype in product(places, MODULES.items(), DIRECTIONS, dtypes.available()):
        outcome = _outcome(place, name, module, direction, dtype)
        if outcome.refused < len(GEOMETRIES):
            yield outcome


def _outcome(place: Backend, name: str, module: Any, direction: Direction, dtype: numpy.dtype) -> Outcome:
    refused, worst, wrong = 0, 0.0, []
    for geometry in GEOMETRIES:
        if module.why_not(Request(geometry, dtype, direction, place, False, settings.workspace_limit())):
            refused += 1
            continue
        problem = Problem(geometry, dtype, place.xp)
        verdict = problem.verdict(problem.call(direction, algorithm=name)(), direction, loose=name in TRANSFORMS)
        worst = max(worst, verdict.of_bound)
        if not verdict.right:
            wrong.append(geometry)
    right = len(GEOMETRIES) - refused - len(wrong)
    return Outcome(place.name, name, direction, dtype.name, right, refused, worst, tuple(wrong))
