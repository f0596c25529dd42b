"""Counts of the machine instructions (SASS) of compiled kernels, by NVIDIA's disassembler ``nvdisasm``.

The counts are static: an instruction counts once, whether it lies in a loop or is skipped. The main loop of a kernel is
the shortest loop that contains most of its products; what lies before it is the prologue, what lies behind it the
epilogue.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

INSTALL_HINT = "pip install nvidia-cuda-nvdisasm, or put the nvdisasm of a CUDA toolkit on the path"

_KERNEL = re.compile(r"^\.text\.(\w+):")
_LABEL = re.compile(r"^(\.L\w+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?(\w[\w.]*)(?:[^;]*`\((\.L\w+)\))?")
_PRODUCTS = (re.compile(r"[HDI]G?MMA"), re.compile(r"[DF]FMA"))  # of tensor cores; where there are none, others
_DIVISION = re.compile(r"I2F[\w.]*\.RP")  # begins the division of integers by a value that is not a constant


class Counts(NamedTuple):
    """Instructions of a kernel."""

    prologue: int
    loop: int  # of one iteration of the main loop; 0 without products in a loop
    epilogue: int
    products: int  # of the main loop
    divisions: int  # of integers, in the whole kernel


def nvdisasm() -> str | None:
    """Return the path of the disassembler, or None."""
    if found := shutil.which("nvdisasm"):
        return found
    package = find_spec("nvidia")
    folders = package.submodule_search_locations if package and package.submodule_search_locations else ()
    return next((str(path) for folder in folders for path in sorted(Path(folder).glob("*/bin/nvdisasm*"))), None)


def counted(cubin: bytes) -> dict[str, Counts]:
    """Return the counts of each kernel of a cubin; RuntimeError without a disassembler."""
    program = nvdisasm()
    if program is None:
        raise RuntimeError(f"counting instructions needs nvdisasm: {INSTALL_HINT}")
    with tempfile.TemporaryDirectory() as folder:  # Windows lets no other program open a temporary file
        file = Path(folder, "kernels.cubin")
        file.write_bytes(cubin)
        text = subprocess.run([program, "-c", str(file)], check=True, capture_output=True, text=True).stdout
    return counts_of(text)


def counts_of(text: str) -> dict[str, Counts]:
    """Return the counts of each kernel in the text of a disassembler."""
    return {name: _counts(lines) for name, lines in _kernels(text)}


def _kernels(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the names of the kernels and their lines."""
    name, lines = "", list[str]()
    for line in text.splitlines():
        if match := _KERNEL.match(line):
            if name:
                yield name, lines
            name, lines = match[1], []
        lines.append(line)
    if name:
        yield name, lines


def _counts(lines: list[str]) -> Counts:
    places, opcodes, jumps = dict[str, int](), list[str](), list[tuple[int, str]]()
    for line in lines:
        if label := _LABEL.match(line):
            places[label[1]] = len(opcodes)
        elif found := _INSTRUCTION.match(line):
            if found[1].startswith("BRA") and found[2]:
                jumps.append((len(opcodes), found[2]))
            opcodes.append(found[1])
    end = max((place for place, opcode in enumerate(opcodes) if opcode == "EXIT"), default=-1) + 1  # then padding
    divisions = sum(bool(_DIVISION.match(opcode)) for opcode in opcodes[:end])
    loops = [(places[label], at + 1) for at, label in jumps if places.get(label, at + 1) <= at < end]
    kind = next((kind for kind in _PRODUCTS if any(map(kind.match, opcodes))), _PRODUCTS[-1])
    products = {loop: sum(bool(kind.match(opcode)) for opcode in opcodes[slice(*loop)]) for loop in loops}
    start, stop = max(loops, key=lambda loop: (products[loop], loop[0] - loop[1]), default=(end, end))
    if not products.get((start, stop)):
        return Counts(end, 0, 0, 0, divisions)
    return Counts(start, stop - start, end - stop, products[start, stop], divisions)
