"""``gpuconv bench``: every layer in every direction, first verified, then timed."""

from __future__ import annotations

import datetime
import json
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy

import gpuconv
from gpuconv.backend import Array, config
from gpuconv.benchmark import reference
from gpuconv.benchmark.layers import CPU_BATCH, GPU_BATCH, Layer
from gpuconv.benchmark.timing import Timing, measure
from gpuconv.geometry import DIRECTIONS, Direction, Geometry

SCHEMA = 1
DTYPE = numpy.dtype(numpy.float32)


@dataclass(frozen=True)
class Row:
    """One layer in one direction. Rates count the operations of the direct algorithm and each tensor once."""

    case: str
    direction: Direction
    algorithm: str
    x_shape: tuple[int, ...]
    w_shape: tuple[int, ...]
    error: float  # the largest, over the largest element of the exact result
    of_bound: float  # the largest error over its bound; wrong above 1
    samples: tuple[float, ...]  # seconds; none where the result is wrong
    flops: int
    bytes: int

    @property
    def right(self) -> bool:
        return self.of_bound <= 1

    @property
    def timing(self) -> Timing:
        return Timing(self.samples)


def default_batch(xp: Any) -> int:
    return CPU_BATCH if xp is numpy else GPU_BATCH


def rows(
    layers: Iterable[Layer], directions: Sequence[Direction] = DIRECTIONS, *, xp: Any, batch: int, seconds: float
) -> Iterator[Row]:
    """A row for each layer and direction, as soon as it has been measured."""
    for layer in layers:
        geometry = layer.geometry(batch)
        rng = numpy.random.default_rng(0)
        x, w, dy = (
            xp.asarray(rng.standard_normal(shape, DTYPE))
            for shape in (geometry.x_shape, geometry.w_shape, geometry.y_shape)
        )
        for direction in directions:
            yield _row(layer, direction, geometry, x, w, dy, xp, seconds)


def _row(
    layer: Layer, direction: Direction, geometry: Geometry, x: Array, w: Array, dy: Array, xp: Any, seconds: float
) -> Row:
    operands, call = prepared(direction, geometry, x, w, dy)
    error, of_bound = deviation(call(), direction, *operands, geometry, DTYPE, xp)
    explanation = gpuconv.explain(
        geometry.x_shape, geometry.w_shape, stride=geometry.stride, padding=geometry.padding,
        dilation=geometry.dilation, groups=geometry.groups, direction=direction, backend=xp.__name__,
    )  # fmt: skip
    return Row(
        layer.name,
        direction,
        explanation.algorithm,
        geometry.x_shape,
        geometry.w_shape,
        error,
        of_bound,
        measure(call, xp, seconds).samples if of_bound <= 1 else (),
        geometry.flops(),
        geometry.bytes(DTYPE.itemsize),
    )


def prepared(
    direction: Direction, geometry: Geometry, x: Array, w: Array, dy: Array, **options: Any
) -> tuple[tuple[Array, Array], Callable[[], Array]]:
    """The two arrays that a direction reads, and the call that computes it."""
    options |= {
        "stride": geometry.stride,
        "padding": geometry.padding,
        "dilation": geometry.dilation,
        "groups": geometry.groups,
        "flip": geometry.flip,
    }
    if direction == "forward":
        return (x, w), lambda: gpuconv.conv(x, w, **options)
    if direction == "data_grad":
        return (dy, w), lambda: gpuconv.conv_data_grad(dy, w, geometry.x_shape, **options)
    return (dy, x), lambda: gpuconv.conv_weight_grad(dy, x, geometry.w_shape, **options)


def deviation(
    result: Array, direction: Direction, first: Array, second: Array, geometry: Geometry, dtype: numpy.dtype, xp: Any
) -> tuple[float, float]:
    """The largest error over the largest exact element, and the largest over its bound; NaN counts as infinite."""
    wide = numpy.dtype(numpy.complex128 if dtype.kind == "c" else numpy.float64)
    first, second = first.astype(wide), second.astype(wide)
    exact = reference.exact(direction, first, second, geometry, xp)
    error = xp.abs(result.astype(wide) - exact)
    if not bool(xp.isfinite(error).all()):
        return numpy.inf, numpy.inf
    bound = reference.bound(direction, first, second, geometry, dtype, xp)
    largest = float(xp.abs(exact).max())
    if bool(((bound == 0) & (error > 0)).any()):
        return float(error.max()) / (largest or 1.0), numpy.inf
    of_bound = error / xp.where(bound > 0, bound, 1)  # the error is 0 where the bound is
    return float(error.max()) / (largest or 1.0), float(of_bound.max())


def document(results: Sequence[Row], batch: int) -> dict[str, Any]:
    """What ``--json`` writes: where, when and with what, and every sample."""
    return {
        "schema": SCHEMA,
        "machine": config(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "batch": batch,
        "dtype": DTYPE.name,
        "definitions": {
            "samples": "seconds per call: wall clock on a CPU, between two events on a GPU; one warm-up call before",
            "flops": "2 * N * F * output * C / groups * kernel, of the direct algorithm, in every direction",
            "bytes": "x, w and y, each once",
            "error": "largest error over the largest element of a float64 reference",
            "of_bound": "largest error over its bound, elementwise; a row above 1 is wrong and not timed",
        },
        "rows": [asdict(row) for row in results],
    }


def write_json(path: Path, results: Sequence[Row], batch: int) -> None:
    path.write_text(json.dumps(document(results, batch), indent=1) + "\n")


def commit() -> str | None:
    """The commit of the checkout that runs, None where it runs from a wheel."""
    folder = Path(gpuconv.__file__).parent.parent
    if not (folder / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
