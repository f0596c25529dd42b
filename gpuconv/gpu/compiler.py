"""Compilation with NVRTC: from source to a cubin for one architecture. The machine needs the library, but no GPU.

CuPy's own compiler is not used, because it appends ``-arch=sm_90`` where ``sm_90a`` is required, and ``-ftz=true``.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any

from gpuconv.arrays import INSTALL_HINT, BackendError
from gpuconv.gpu.kernel import Module, source

OPTIONS = ("--std=c++17", "--ptxas-options=-v")  # the second writes registers and spills to the log

OLDEST = (12, 1)  # its PTX, 8.1, has vectorized float32 additions to memory

# Architectures whose specific features require the suffix "a".
_WITH_FEATURES = ("90", "100")


class CompileError(RuntimeError):
    """Raised when a kernel does not compile. ``log`` is the compiler's log, ``module`` the file and its constants."""

    def __init__(self, module: Module | str, architecture: str, log: str) -> None:
        super().__init__(f"{module} does not compile for {architecture}:\n{log.strip()}")
        self.module, self.architecture, self.log = module, architecture, log


def nvrtc() -> Any:
    """Return CuPy's NVRTC module; raise BackendError if the library cannot be loaded."""
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except Exception as error:
        raise BackendError(
            f"compiling kernels needs NVRTC, which cannot be loaded ({type(error).__name__}: {error}): {INSTALL_HINT}"
        ) from error
    return nvrtc


@lru_cache(maxsize=1)
def version() -> tuple[int, int]:
    """Return NVRTC's version; raise BackendError if it is too old."""
    major, minor = nvrtc().getVersion()
    if (major, minor) < OLDEST:
        raise BackendError(
            f"gpuconv needs NVRTC {OLDEST[0]}.{OLDEST[1]} or later, and {major}.{minor} was found: {INSTALL_HINT}"
        )
    return major, minor


@lru_cache(maxsize=16)
def architecture_for(capability: str) -> str:
    """Return the architecture to compile for, for example "sm_90a" for the compute capability "90".

    If NVRTC does not know the capability yet, it is PTX ("compute_...") of the newest older one.

    >>> architecture_for("86")
    'sm_86'
    """
    version()
    known = nvrtc().getSupportedArchs()
    if int(capability) in known:
        return f"sm_{capability}a" if capability in _WITH_FEATURES else f"sm_{capability}"
    older = [arch for arch in known if arch < int(capability)]
    if not older:
        raise BackendError(
            f"NVRTC {'.'.join(map(str, version()))} compiles for compute capability"
            f" {min(known) / 10} and later, but the device has {int(capability) / 10}"
        )
    return f"compute_{max(older)}"


def compiled(module: Module, architecture: str) -> tuple[bytes, str]:
    """Return the cubin (PTX for a ``compute_`` architecture) and the compiler's log."""
    return compiled_text(source(module), f"{module.stem}.cu", architecture, module)


def compiled_text(text: str, name: str, architecture: str, module: Module | None = None) -> tuple[bytes, str]:
    """Compile a source text; return the cubin (PTX for a ``compute_`` architecture) and the compiler's log."""
    compiler = nvrtc()
    program = compiler.createProgram(text, name, (), ())
    try:
        try:
            compiler.compileProgram(program, (f"--gpu-architecture={architecture}", *OPTIONS))
        except compiler.NVRTCError:
            raise CompileError(module or name, architecture, compiler.getProgramLog(program)) from None
        log = compiler.getProgramLog(program)
        if architecture.startswith("compute_"):
            return compiler.getPTX(program).rstrip(b"\0"), log
        return _whole(compiler.getCUBIN(program)), log
    finally:
        compiler.destroyProgram(program)


def _whole(cubin: bytes) -> bytes:
    """Return the cubin with its last byte, a 0, which CuPy removes as if it terminated a string."""
    return cubin.ljust(elf_size(cubin), b"\0")


def elf_size(cubin: bytes) -> int:
    """Return the size of an ELF file in bytes, according to its headers."""
    program_headers, section_headers = struct.unpack_from("<QQ", cubin, 0x20)
    program_header, programs, section_header, sections = struct.unpack_from("<HHHH", cubin, 0x36)
    return int(max(program_headers + program_header * programs, section_headers + section_header * sections))
