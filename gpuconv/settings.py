"""The environment variables that calls read, and the arguments that take precedence over them.

All of them are read at each call, so that a change takes effect at once. A value that cannot be read is a ValueError
that names the variable, the value and the permitted values.
"""

from __future__ import annotations

import os
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy

from gpuconv.types import BackendName, Precision

Name = TypeVar("Name", bound=str)

BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

DEFAULTS = {
    "GPUCONV_BACKEND": "auto",
    "GPUCONV_DETERMINISTIC": "1",
    "GPUCONV_PRECISION": "ieee",
    "GPUCONV_WORKSPACE_LIMIT": "64MiB",  # DEFAULT_WORKSPACE_LIMIT
    "GPUCONV_NUM_THREADS": "the cores that this process may use",
    "GPUCONV_CACHE_DIR": "the user's cache folder",
    "GPUCONV_DUMP": "nowhere",
}

DEFAULT_WORKSPACE_LIMIT = 64 << 20

# os.environ takes a microsecond to say that a variable is unset, and a call asks for six. Its own dictionary is faster.
_ENVIRONMENT: Any = getattr(os.environ, "_data", os.environ)
_KEYS = {variable: getattr(os.environ, "encodekey", str)(variable) for variable in (*DEFAULTS, "CUPY_TF32")}

_BOOLEANS = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def _read(variable: str) -> str | None:
    """Return the variable in lower case without surrounding spaces; None if it is unset or empty."""
    if _KEYS[variable] not in _ENVIRONMENT:
        return None
    return os.environ[variable].strip().lower() or None


def _choice(variable: str, choices: tuple[Name, ...]) -> Name | None:
    value = _read(variable)
    if value is not None and value not in choices:
        raise ValueError(f"{variable} must be one of {', '.join(choices)}; got {os.environ[variable]!r}")
    return value  # type: ignore[return-value]


def _boolean(variable: str) -> bool | None:
    value = _read(variable)
    if value is None:
        return None
    if value not in _BOOLEANS:
        raise ValueError(f"{variable} must be one of {', '.join(_BOOLEANS)}; got {os.environ[variable]!r}")
    return _BOOLEANS[value]


def backend() -> BackendName:
    """Return GPUCONV_BACKEND."""
    return _choice("GPUCONV_BACKEND", BACKENDS) or "auto"


def deterministic(argument: bool | None) -> bool:
    """Return the argument if it is given, else GPUCONV_DETERMINISTIC."""
    if argument is None:
        value = _boolean("GPUCONV_DETERMINISTIC")
        return True if value is None else value
    if not isinstance(argument, (bool, numpy.bool_)):
        raise TypeError(f"deterministic must be True, False or None, got {argument!r}")
    return bool(argument)


def precision(argument: str | None) -> str:
    """Return the argument, else GPUCONV_PRECISION, else "tf32" if CUPY_TF32 is set, else "ieee"."""
    if argument is None:
        named = _choice("GPUCONV_PRECISION", PRECISIONS)
        return named or ("tf32" if _boolean("CUPY_TF32") else DEFAULTS["GPUCONV_PRECISION"])
    if argument not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, or None; got {argument!r}")
    return argument


def workspace_limit() -> int:
    """Return GPUCONV_WORKSPACE_LIMIT in bytes."""
    value = _read("GPUCONV_WORKSPACE_LIMIT") or DEFAULTS["GPUCONV_WORKSPACE_LIMIT"].lower()
    limit = _byte_count(value)
    if limit is None:
        raise ValueError(
            "GPUCONV_WORKSPACE_LIMIT must be a number of bytes, alone or with KiB, MiB, GiB, KB, MB or GB behind it;"
            f" got {os.environ['GPUCONV_WORKSPACE_LIMIT']!r}"
        )
    return limit


@lru_cache(maxsize=32)
def _byte_count(value: str) -> int | None:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?i?b|)", value)
    if not match or match[2] not in _UNITS or len(match[1]) > 30:
        return None
    return int(float(match[1]) * _UNITS[match[2]])


def num_threads() -> int | None:
    """Return GPUCONV_NUM_THREADS, or None if it is unset."""
    value = _read("GPUCONV_NUM_THREADS")
    if value is None:
        return None
    if not value.isdecimal() or int(value) == 0:
        raise ValueError(
            f"GPUCONV_NUM_THREADS must be a number of threads, at least 1; got {os.environ['GPUCONV_NUM_THREADS']!r}"
        )
    return int(value)


def cache_folder() -> Path:
    """Return GPUCONV_CACHE_DIR, else the folder of gpuconv in the user's cache folder."""
    named = _folder("GPUCONV_CACHE_DIR")
    if named is not None:
        return named
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gpuconv"


def dump_folder() -> Path | None:
    """Return GPUCONV_DUMP, the folder for the final sources of kernels, or None if it is unset."""
    return _folder("GPUCONV_DUMP")


def _folder(variable: str) -> Path | None:
    if _KEYS[variable] not in _ENVIRONMENT or not (value := os.environ[variable].strip()):
        return None
    try:
        path = Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{variable} must name a folder; got {value!r} ({error})") from None
    if os.path.isfile(path):
        raise ValueError(f"{variable} must name a folder, but {value!r} is a file")
    return path
