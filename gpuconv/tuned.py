"""The results of gpuconv.tune, stored on disk: the fastest algorithms on this machine.

The cache folder contains a file for each machine, version of the library and build of NumPy or CuPy. A file is written
under a temporary name and renamed, so that a reader sees the old file or the new one. A damaged file is ignored with a
warning, and replaced when the next result is stored.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy

from gpuconv import files, settings
from gpuconv.arrays import Backend
from gpuconv.config import build
from gpuconv.geometry import Geometry
from gpuconv.gpu.device import Device
from gpuconv.types import Direction


def recalled(backend: Backend, geometry: Geometry, dtype: numpy.dtype, direction: Direction) -> str | None:
    """Return the fastest algorithm for this convolution, or None if it has not been tuned."""
    if not _folder(backend).exists():
        return None
    return _answers(path(backend)).get(_key(geometry, dtype, direction))


def remember(backend: Backend, direction: Direction, geometry: Geometry, dtype: numpy.dtype, algorithm: str) -> None:
    """Store a result in the file; the other results in it are kept."""
    place = path(backend)
    _answers.cache_clear()
    answers = {**_answers(place), _key(geometry, dtype, direction): algorithm}
    files.write(place, json.dumps({"build": build(backend), "answers": answers}, indent=1).encode())
    _answers.cache_clear()


def path(backend: Backend) -> Path:
    """Return the file for this machine and this backend."""
    return _folder(backend) / f"{_digest(backend, backend.device())}.json"


def _folder(backend: Backend) -> Path:
    return settings.cache_folder() / "tuned" / backend.name


@lru_cache(maxsize=16)
def _digest(backend: Backend, device: Device) -> str:
    return hashlib.sha256(json.dumps(build(backend), sort_keys=True).encode()).hexdigest()[:16]


def _key(geometry: Geometry, dtype: numpy.dtype, direction: Direction) -> str:
    return f"{direction} {dtype.name} {geometry}"


@lru_cache(maxsize=8)
def _answers(place: Path) -> Mapping[str, str]:
    try:
        text = place.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        return _passed_over(place, str(error))
    try:
        answers = json.loads(text)["answers"]
        if all(isinstance(part, str) for answer in answers.items() for part in answer):
            return dict(answers)
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    return _passed_over(place, "it is not a file that gpuconv tune writes")


def _passed_over(place: Path, reason: str) -> Mapping[str, str]:
    warnings.warn(f"tuned answers in {place} are ignored: {reason}", RuntimeWarning, stacklevel=2)
    return {}
