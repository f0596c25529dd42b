"""Precedence of the build in ``import cupy``, in a process of a command."""

import ctypes
import importlib.util
import sys
from importlib.machinery import ExtensionFileLoader
from pathlib import Path

from tests.cupy_on_cpu import build, replaced

_kept = []  # objects that the libraries call and that must stay referenced


class _Finder:
    """Finder of the modules of CuPy that are not taken from the wheel."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("cupy", "cupy_backends", "cupyx") and not _kept:
            _load()
        if name in replaced.MODULES:
            return replaced.spec(name)
        for stem, compiled in build.COMPILED.items():
            if name == compiled:
                file = str(build.folder() / "lib" / f"{stem}.so")
                return importlib.util.spec_from_file_location(name, file, loader=ExtensionFileLoader(name, file))
        return None


def install():
    sys.meta_path.insert(0, _Finder())
    if _wants_nvidias_libraries("torch"):
        sys.modules["torch"] = None  # as if it were not installed


def _wants_nvidias_libraries(package):
    """Return whether this is a PyTorch with CUDA: it is linked with libraries whose names the replacements have."""
    found = importlib.util.find_spec(package)
    return (
        found is not None and found.has_location and (Path(found.origin).parent / "lib" / "libtorch_cuda.so").exists()
    )


def _load():
    """Load the replacements under the names of NVIDIA's libraries, and register the Python functions that they call."""
    _kept.append(None)  # only one attempt, even if it fails
    lib = build.folder() / "lib"
    libraries = {soname: ctypes.CDLL(str(lib / soname), mode=ctypes.RTLD_GLOBAL) for soname in build.SONAMES}
    from tests.cupy_on_cpu import compiler, modules

    _kept.append(compiler.install(libraries["libnvrtc.so.12"]))
    _kept.append(modules.install(libraries["libcuda.so.1"]))
