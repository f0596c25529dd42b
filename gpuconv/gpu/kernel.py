"""Kernels: file, function and compile-time constants; generation of the source and checks of the arguments.

The source is one text without an ``#include``: primitives.cuh, the constants and structs, common.cuh, further headers
of the file, and the file.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy

from gpuconv import settings
from gpuconv.activations import LEAKY_SLOPE
from gpuconv.dtypes import native
from gpuconv.gpu import kernels_folder, structs

CUDA_TYPES = {
    "float16": "half",
    "bfloat16": "bfloat16",
    "float32": "float",
    "float64": "double",
    "complex64": "Complex<float>",
    "complex128": "Complex<double>",
}

_HEADERS = {"implicit_gemm": ("tiles.cuh", "products.cuh")}  # in addition to common.cuh


class Module(NamedTuple):
    """A file of kernels and the constants with which it is compiled."""

    stem: str
    types: tuple[tuple[str, str], ...]  # (alias, name of a dtype)
    wide: bool  # whether Index has 64 bits
    constants: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        types = ", ".join(f"{alias}={dtype}" for alias, dtype in self.types)
        constants = ", ".join(f"{name}={value}" for name, value in self.constants)
        return f"{self.stem}.cu with {types}, {64 if self.wide else 32}-bit Index, {constants}"


class Kernel(NamedTuple):
    """One function of a module."""

    module: Module
    name: str


class Parameter(NamedTuple):
    """A parameter of a kernel, as its source declares it."""

    type: str  # "float", "Convolution", or what a pointer points to
    name: str
    is_pointer: bool
    is_constant: bool  # whether it points to const


@lru_cache(maxsize=256)
def source(module: Module, primitives: str | None = None) -> str:
    """Return the text that is compiled; ``primitives`` replaces primitives.cuh."""
    constants = [
        *(f"using {alias} = {CUDA_TYPES[dtype]};" for alias, dtype in module.types),
        f"using Index = {'long long' if module.wide else 'int'};",
        f"constexpr double LEAKY_SLOPE = {LEAKY_SLOPE!r};",
        *(f"constexpr int {name} = {value};" for name, value in module.constants),
        structs.text(),
    ]
    parts = {
        "primitives.cuh": _read("primitives.cuh") if primitives is None else primitives,
        "constants": "\n".join(constants) + "\n",
        **{name: _read(name) for name in files_of(module.stem)},
    }
    return "".join(f'#line 1 "{name}"\n{part}' for name, part in parts.items())


def files_of(stem: str) -> tuple[str, ...]:
    """Return the files that follow the primitives and constants in a source, in order; the kernels' own is the last."""
    return ("common.cuh", *_HEADERS.get(stem, ()), f"{stem}.cu")


def dump(module: Module) -> None:
    """Write the source to the folder GPUCONV_DUMP, if it is set."""
    folder = settings.dump_folder()
    if folder is None:
        return
    text = source(module)
    path = folder / f"{module.stem}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.cu"
    if not os.path.exists(path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        except OSError as error:
            raise ValueError(f"GPUCONV_DUMP must name a folder to write to; got {str(folder)!r} ({error})") from error


@lru_cache(maxsize=64)
def _read(name: str) -> str:
    return (kernels_folder() / name).read_text()


@lru_cache(maxsize=64)
def parameters(stem: str, name: str) -> tuple[Parameter, ...]:
    """Return the parameters of a kernel, parsed from its source."""
    match = re.search(rf"__global__[^;{{]*?\b{name}\s*\(([^)]*)\)", _read(f"{stem}.cu"))
    if match is None:
        raise ValueError(f"{stem}.cu has no kernel {name}")
    found = []
    for declaration in match[1].split(","):
        words = re.fullmatch(r"\s*(const\s+)?(\w+)\s*(\*?)\s*(?:__restrict__\s+)?(\w+)\s*", declaration)
        if words is None:
            raise ValueError(f"{stem}.cu: cannot read the parameter {declaration.strip()!r} of {name}")
        found.append(Parameter(words[2], words[4], bool(words[3]), bool(words[1])))
    return tuple(found)


def check_arguments(kernel: Kernel, arguments: Sequence[Any]) -> None:
    """Raise TypeError unless the arguments match the parameters of the kernel; CUDA itself accepts any bytes."""
    module, expected = kernel.module, parameters(kernel.module.stem, kernel.name)
    if len(arguments) != len(expected):
        raise TypeError(f"{kernel.name} takes {len(expected)} arguments, but {len(arguments)} were given")
    for parameter, argument in zip(expected, arguments, strict=True):
        if argument is None and parameter.is_pointer and parameter.is_constant:  # only inputs are optional
            continue
        is_value = isinstance(argument, (numpy.generic, numpy.ndarray)) and argument.ndim == 0
        found = getattr(argument, "dtype", None)
        if is_value == parameter.is_pointer or not _is_of_type(found, parameter.type, module):
            kind = "an array" if parameter.is_pointer else "a value"
            given = type(argument).__name__ if found is None else f"{'a value' if is_value else 'an array'} of {found}"
            raise TypeError(f"{kernel.name} takes {kind} of {parameter.type} for {parameter.name}, but got {given}")


def _is_of_type(dtype: numpy.dtype | None, type_name: str, module: Module) -> bool:
    if dtype is None:
        return False
    if type_name in structs.NAMES:
        return bool(dtype == structs.dtype_of(type_name, module.wide))
    if type_name == "Index":
        return bool(dtype == structs.index_dtype(module.wide))
    return bool(dtype.name == dict(module.types)[type_name] and dtype == native(dtype))
