"""Cache of compiled kernels on disk, so that a process compiles only kernels that no earlier process has compiled.

An entry is one file, ``<key>-<digest>.cubin``. The key is a hash of the compiler's input, the digest a hash of the
content. An entry that is truncated, damaged or of other origin does not match its digest; it is ignored and compiled
again. Entries are written under a temporary name and renamed. If two processes write the same entry, the last one
wins, which does no harm because both write the same content.
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
    """Return the file of the compiled module; compile the module if the cache has no valid entry."""
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
    except OSError:  # with a read-only or full folder, the next process compiles again
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
    """Return a temporary folder of this process, for cubins that cannot be written to the cache."""
    folder = tempfile.mkdtemp(prefix="gpuconv-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
