"""In a process of a command: the build in front of what ``import cupy`` would find."""

import ctypes
import importlib.util
import sys
from importlib.machinery import ExtensionFileLoader
from pathlib import Path

from tests.cupy_on_cpu import build, replaced

_kept = []  # what the libraries call


class _Finder:
    """Finds the modules of CuPy that are not the wheel's."""

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
    """Whether it is a build of PyTorch with CUDA: libraries of ours have the names of some that it is linked with."""
    found = importlib.util.find_spec(package)
    return (
        found is not None and found.has_location and (Path(found.origin).parent / "lib" / "libtorch_cuda.so").exists()
    )


def _load():
    """Our libraries, by the names under which CuPy looks for NVIDIA's, and the functions of Python that they call."""
    _kept.append(None)  # once, whatever comes of it
    lib = build.folder() / "lib"
    libraries = {soname: ctypes.CDLL(str(lib / soname), mode=ctypes.RTLD_GLOBAL) for soname in build.SONAMES}
    from tests.cupy_on_cpu import compiler, modules

    _kept.append(compiler.install(libraries["libnvrtc.so.12"]))
    _kept.append(modules.install(libraries["libcuda.so.1"]))
