"""Compiled kernels on disk, so that a process compiles only what no process before it has.

An entry is one file, ``<key>-<digest>.cubin``: the key says what it was made from, the digest what it holds. So an
entry that was cut short, damaged or put there by someone else is not taken, and is made again. Entries are written
under another name and renamed, and whoever writes last wins: both wrote the same.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

from gpuconv import files, settings
from gpuconv.gpu import compiler
from gpuconv.gpu.kernel import Module, source


def cubin_path(module: Module, architecture: str) -> Path:
    """The file of the compiled module, which is compiled now if no sound one is there."""
    parts = (source(module), architecture, *compiler.OPTIONS, *map(str, compiler.version()))
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    folder = settings.cache_folder() / "kernels"
    found = _sound_entry(folder, key)
    if found is not None:
        return found
    cubin, _ = compiler.compiled(module, architecture)
    name = f"{key}-{_digest(cubin)}.cubin"
    try:
        return files.write(folder / name, cubin)
    except OSError:  # a folder that is read-only, or full, only costs the next process its time
        return files.write(_own_folder() / name, cubin)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _sound_entry(folder: Path, key: str) -> Path | None:
    with contextlib.suppress(OSError):
        for path in sorted(folder.glob(f"{key}-*.cubin")):
            if path.stem == f"{key}-{_digest(path.read_bytes())}":
                return path
    return None


@lru_cache(maxsize=1)
def _own_folder() -> Path:
    """A folder of this process, for cubins that the cache could not take."""
    folder = tempfile.mkdtemp(prefix="gpuconv-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
