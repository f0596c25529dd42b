"""Rows of a benchmark, and the files that store them."""

from __future__ import annotations

import csv
import datetime
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import gpuconv
from gpuconv.benchmark.limits import Limits
from gpuconv.benchmark.timing import Summary
from gpuconv.config import config
from gpuconv.types import Direction

SCHEMA = 2
OURS = "gpuconv"
UNSTEADY = 0.1  # rows with more noise than this are marked

DEFINITIONS = {
    "samples": "seconds of each call, alternating with the peers; the first call and a warm-up call before each group"
    " are excluded",
    "method": "wall clock on a CPU; on a GPU events around a call that is issued ahead of the device, or, if a side"
    " takes less than 20 us, a CUDA graph of 20 calls (then with warm caches)",
    "cold": "whether caches were emptied before each sample",
    "dtype": "tf32 is float32 whose products may be rounded to TensorFloat-32; a CPU does not round them",
    "noise": "interquartile range over median; a row above 10 % is unsteady (~)",
    "flops": "real operations of the direct algorithm: 2 for each product, 8 for complex ones, in every direction",
    "bytes": "x, w and y, each once",
    "limit": "the larger of flops over the rate of a matrix product of this dtype and bytes over that of a copy, as"
    " measured here; its share of the median is shown, above 100 % where caches hold the arrays or fewer operations do",
    "error": "the largest error divided by the largest element of the float64 result, among the checked elements",
    "of_bound": "the largest ratio of an error to its bound; a result above 1 is wrong and not timed. Peers get the"
    " bound of Winograd and Fourier methods",
    "ratio": "the peer's median over gpuconv's, of the peer's faster memory format: above 1 gpuconv is faster",
    "verdict": "FAST or SLOW if medians differ by more than 2 % and the quartile ranges do not overlap; SAME within"
    " 2 %; otherwise AMBIGUOUS",
}


@dataclass(frozen=True)
class Row:
    """The measurement of one library for one layer in one direction."""

    case: str
    suites: Sequence[str]
    spec: str  # as --case accepts it
    batch: int
    direction: Direction
    dtype: str  # or "tf32"
    backend: str
    flops: int
    bytes: int
    by: str  # "gpuconv" or the name of a peer
    layout: str
    asked: str  # "auto" or the name of an algorithm; "" for a peer
    algorithm: str  # the one that was used
    command: str  # measures this row only
    refusal: str | None = None
    failure: str | None = None  # an unexpected error
    first_seconds: float | None = None
    host_seconds: float | None = None  # for which a call to a GPU occupies the host
    error: float | None = None
    of_bound: float | None = None
    checked: int = 0
    samples: Sequence[float] = ()
    method: str = ""

    @property
    def wrong(self) -> bool:
        return self.refusal is None and not (self.of_bound is not None and self.of_bound <= 1)

    @property
    def timed(self) -> bool:
        return bool(self.samples)

    @property
    def summary(self) -> Summary:
        return Summary.of(self.samples)

    @property
    def contest(self) -> tuple[str, str, str, str]:
        """What rows of different libraries for the same problem have in common."""
        return self.spec, self.direction, self.dtype, self.backend

    @property
    def key(self) -> tuple[str, ...]:
        """What rows of the same measurement in different runs have in common."""
        return (*self.contest, self.by, self.layout, self.asked)


@dataclass
class Results:
    """One run: the machine, its limits, and the rows so far."""

    machine: dict[str, Any]
    limits: dict[str, Limits] = field(default_factory=dict)  # by backend
    rows: list[Row] = field(default_factory=list)
    command: str = ""
    cold: bool = False
    complete: bool = False
    not_reached: list[str] = field(default_factory=list)  # layers by suite and dtype
    spent: dict[str, float] = field(default_factory=dict)
    date: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    )
    commit: str | None = None
    schema: int = SCHEMA

    @property
    def device(self) -> str:
        """The name of the device that computed."""
        on_gpu = any(row.backend == "cupy" for row in self.rows)
        return str(self.machine["GPU" if on_gpu else "CPU"])

    def limit(self, row: Row) -> float | None:
        """Return the minimum seconds for a row according to the measured limits; None if they are missing."""
        limits = self.limits.get(row.backend)
        return limits.seconds(row.flops, row.bytes, row.dtype) if limits else None


def write_json(path: Path, results: Results) -> None:
    """Write results to a temporary file and rename it, so that an interruption leaves the old or the new file."""
    document = {"schema": SCHEMA, "definitions": DEFINITIONS, **asdict(results)}
    document["limits"] = {place: limits._asdict() for place, limits in results.limits.items()}
    for row in document["rows"]:
        row["samples"] = [float(f"{sample:.4g}") for sample in row["samples"]]
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    rows = ",\n".join(json.dumps(row) for row in document.pop("rows"))
    beside.write_text(json.dumps(document, indent=1)[:-2] + f',\n "rows": [\n{rows}\n]\n}}\n')
    os.replace(beside, path)


def read_json(path: Path) -> Results:
    """Return the results that :func:`write_json` wrote; raise ValueError if the file is anything else."""
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{path} is not JSON") from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else None
        raise ValueError(f"{path} is not a result of gpuconv bench with schema {SCHEMA}, but {found!r}")
    document.pop("definitions")
    document["rows"] = [Row(**row) for row in document["rows"]]
    document["limits"] = {place: Limits(**limits) for place, limits in document["limits"].items()}
    return Results(**document)


def write_csv(path: Path, results: Results) -> None:
    """Write one line per row, with the median and the noise instead of the samples."""
    names = [name.name for name in fields(Row) if name.name not in ("samples", "suites")]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "suites", "samples", "median_seconds", "noise", "limit_seconds"])
        for row in results.rows:
            summary = row.summary if row.timed else ("", "")
            values = [getattr(row, name) for name in names]
            writer.writerow([*values, " ".join(row.suites), len(row.samples), *summary, results.limit(row)])


def _blas_kernels() -> str | None:
    """Return OpenBLAS's name of the CPU whose kernels NumPy's matrix products use; None if it is unknown."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return None
    return next((library["architecture"] for library in threadpool_info() if "architecture" in library), None)


FOLDERS = ("GPUCONV_CACHE_DIR", "GPUCONV_DUMP")  # not recorded: the paths do not affect a result


def machine() -> dict[str, Any]:
    """Return versions, devices and, if nvidia-smi reports them, clocks and power limit; no folders."""
    facts: dict[str, Any] = {name: value for name, value in config().items() if name not in FOLDERS}
    if kernels := _blas_kernels():  # CPUs of one name may use different ones; OPENBLAS_CORETYPE sets them
        facts["CPU"] += f" with {kernels} kernels"
    query = (
        "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,power.draw,temperature.gpu,ecc.mode.current"
    )
    facts["GPU"] = "none"
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
        values = dict(zip(query.split(","), answer.stdout.splitlines()[0].split(", "), strict=True))
        facts["GPU"] = values.pop("name")
        facts["nvidia-smi"] = values
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
        pass  # no NVIDIA driver, or one that does not report these values
    return facts


def commit() -> str | None:
    """Return the commit of the checkout, followed by "+" if files differ from it; None for an installed wheel."""
    folder = Path(gpuconv.__file__).parent.parent
    if not (folder / ".git").exists():
        return None
    try:
        head, changed = (
            subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("+" if changed.strip() else "")
