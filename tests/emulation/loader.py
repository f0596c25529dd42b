"""Compilation of kernels to libraries for the CPU by g++, with a cache of the libraries.

Fast mode is fast to compile and to run; it detects errors by guard pages and by memory filled with NaN. In checked mode
the compiler inserts a call of the hooks of checks.cpp at every load and store.
"""

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from gpuconv import settings
from gpuconv.gpu.kernel import source

FOLDER = Path(__file__).parent

COMMON = (
    "-std=c++17",
    "-fPIC",
    "-g1",
    "-fno-var-tracking",  # source lines do not need it
    "-gdwarf-4",  # with version 5 addr2line may name the wrong file
    "-fno-gnu-unique",
    "-fno-strict-aliasing",
    "-fno-stack-protector",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
)
# Uninitialized local variables hold a pattern, not a previous value that may be right by chance.
KERNEL = (
    *COMMON,
    "-fvisibility=hidden",
    "-ftrivial-auto-var-init=pattern",
    "-fstack-clash-protection",  # large local arrays meet the stack's guard page, not the next stack
    "-ffp-contract=fast",
    "-Wno-unused-function",
    "-Wno-attributes",
)
MODES = {
    "fast": ("-Og",),  # with -O2 kernels run a sixth faster, but compile half as long again
    "optimized": ("-O2",),
    "debug": ("-O0", "-g3"),  # for a debugger
    "checked": (
        "-O1",
        "-fno-tree-sra",  # else a float4 is loaded in four parts, and its alignment goes unchecked
        "-fsanitize=thread,undefined,float-cast-overflow",
        "-fno-sanitize=vptr",
        "--param=tsan-instrument-func-entry-exit=0",
    ),
}


class BuildError(RuntimeError):
    """The errors of g++ for a source that does not compile."""


class EmulationError(RuntimeError):
    """The errors of a launch: one line per report, with source lines."""


def why_not():
    """Return the reason why kernels cannot run on this machine's CPU, or None."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"kernels run on the CPU of x86-64 Linux only, and this is {platform.machine()} {sys.platform}"
    for program in ("g++", "nm", "addr2line"):
        if shutil.which(program) is None:
            return f"running kernels on the CPU needs {program}, which is not installed"
    return None


@functools.cache
def machine_flags():
    """Return the flags that enable fused multiply-adds, as on a GPU, if the processor has them."""
    with open("/proc/cpuinfo") as facts:
        flags = next((line.split() for line in facts if line.startswith("flags")), [])
    return ("-march=x86-64-v3",) if {"avx2", "fma", "bmi2", "movbe"} <= set(flags) else ()


@functools.cache
def compiler():
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def run(*command):
    done = subprocess.run(command, capture_output=True, encoding="utf-8")  # g++ prints quotation marks in UTF-8
    if done.returncode:
        raise BuildError(f"{' '.join(map(str, command[:3]))} ... failed:\n{done.stderr}")
    return done.stdout


def _built(parts, build):
    """Return the path of the library with these parts; if it is missing, it is built elsewhere, then renamed."""
    import fcntl  # missing on systems that cannot run kernels

    key = hashlib.sha256("\0".join((*parts, *machine_flags(), compiler())).encode()).hexdigest()[:24]
    folder = settings.cache_folder() / "emulation"
    path = folder / f"{key}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{key[:2]}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # waits until another thread or process has built it
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                build(Path(scratch))
                os.replace(Path(scratch) / "library.so", path)
    return path


@functools.cache
def runtime():
    """Return the loaded library of the emulator itself."""
    parts = ("scheduler.cpp", "launch.cpp", "checks.cpp", "profile.cpp", "instructions.cpp")
    names = ("parameter.hpp", "cuda.hpp", "launch.hpp", "runtime.hpp", *parts)
    flags = (*COMMON, "-g", "-O2", "-Wextra", "-shared", "-Wl,-Bsymbolic")

    def build(folder):
        sources = (FOLDER / name for name in parts)
        run("g++", *flags, *machine_flags(), "-o", folder / "library.so", *sources)

    path = _built((*flags, *((FOLDER / name).read_text() for name in names)), build)
    library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)  # kernels resolve its functions by their names
    library.emulated_library.restype = ctypes.c_void_p
    library.emulated_report.restype = ctypes.c_char_p
    library.emulated_profile.restype = ctypes.c_char_p
    library.emulated_global_atomics.restype = ctypes.c_uint64
    return library


def library_file(text, mode):
    """Return the path of the library of the kernels of a source text, compiled in a mode."""
    entries = "".join(f"EMULATED_ENTRY({name})\n" for name in kernel_names(text))
    content = f'{text}\n#line 1 "entries"\n{entries}'
    flags = (*KERNEL, *MODES[mode])

    def build(folder):
        (folder / "kernels.cpp").write_text(content)
        where = f"-ffile-prefix-map={folder}=."
        header = FOLDER / "cuda.hpp"
        command = ("g++", *flags, where, *machine_flags(), "-include", header, "-c", folder / "kernels.cpp")
        run(*command, "-o", folder / "kernels.o")
        run("g++", "-shared", "-o", folder / "library.so", folder / "kernels.o")

    return _built((content, *flags, Path(runtime()._name).name), build)


def library_of(text, mode):
    """Return the library of a source text."""
    return Library(library_file(text, mode), mode)


class Parameter(ctypes.Structure):
    """A parameter of a kernel; the struct of parameter.hpp."""

    _fields_ = tuple((name, ctypes.c_uint) for name in ("bytes", "is_pointer", "is_constant", "element"))


class Library:
    """A library of kernels, compiled in one mode."""

    def __init__(self, path, mode):
        self.path, self.mode = path, mode
        self._library = ctypes.CDLL(path)
        self.handle = self._register()

    def kernel(self, name):
        """Return the address of the function that calls a kernel, and the parameters, terminated by one of 0 bytes."""
        parameters = getattr(self._library, f"emulated_parameters_{name}")
        parameters.restype = ctypes.POINTER(Parameter)
        return ctypes.cast(getattr(self._library, f"emulated_call_{name}"), ctypes.c_void_p), parameters()

    def static_memory(self, name):
        """Return the bytes of shared memory that a kernel declares."""
        return sum(size for _, size, array in self._arrays if re.match(rf"{name}\b", array))

    def _register(self):
        """Register the addresses of the library and of its shared arrays (static variables) with the runtime."""
        self._arrays, self.names, end = [], [], 0
        for line in run("nm", "-C", "-S", "--defined-only", self.path).splitlines():
            address, size, kind, name = re.fullmatch(r"(\w+) (?:(\w+) )?(\w) (.*)", line).groups()
            end = max(end, int(address, 16) + int(size or "0", 16))
            if name.startswith("emulated_call_"):
                self.names.append(name.removeprefix("emulated_call_"))
            if kind in "bBdDuV" and size and "::" in name and not name.startswith(("guard", "emulated")):
                self._arrays.append((int(address, 16), int(size, 16), name))
        base = _base_of(getattr(self._library, f"emulated_call_{self.names[0]}"))
        count = len(self._arrays)
        offsets, sizes = ((ctypes.c_size_t * count)(*(array[i] for array in self._arrays)) for i in (0, 1))
        names = (ctypes.c_char_p * count)(*(array[2].rpartition("::")[2].encode() for array in self._arrays))
        low, high = ctypes.c_size_t(base), ctypes.c_size_t(base + end)
        checked = int(self.mode == "checked")
        return ctypes.c_void_p(runtime().emulated_library(low, high, checked, count, offsets, sizes, names))

    def located(self, text):
        """Return the text of a report with its addresses replaced by source lines."""
        return re.sub(r"\{(0x[0-9a-f]+)\}", lambda match: self._line(int(match[1], 16)), text)

    def _line(self, offset):
        """Return the line of the kernel, and in parentheses that of the innermost function called there."""
        frames = self.frames(offset)
        kernels = [line for line in frames if ".cu:" in line]
        outermost = kernels[-1] if kernels else frames[0]
        return outermost if outermost == frames[0] else f"{outermost} ({frames[0]})"

    def frames(self, offset):
        """Return the source lines of the instruction before an address, from the innermost function outwards."""
        return _frames(self.path, offset - 1)


@functools.cache
def _frames(path, offset):
    frames = run("addr2line", "-i", "-e", path, hex(offset)).splitlines()
    lines = [Path(frame.split(" (")[0]).name for frame in frames]
    return [line for line in lines if not line.startswith(("cuda.hpp", "primitives.hpp", "entries", "?"))] or ["?"]


class _DlInfo(ctypes.Structure):
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _base_of(function):
    """Return the base address of the library that contains a function."""
    info = _DlInfo()
    found = ctypes.CDLL(None).dladdr(ctypes.cast(function, ctypes.c_void_p), ctypes.byref(info))
    assert found, "dladdr knows every loaded function"
    return info.base


def kernel_names(text):
    """Return the names of the kernels that a source defines."""
    return re.findall(r"__global__[^;{(]*?(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(", text)


@functools.cache
def library_for(module, mode):
    """Return the library of a module of the package."""
    return library_of(emulated_source(module), mode)


def emulated_source(module):
    """Return the source of a module with the primitives for the CPU."""
    return source(module, (FOLDER / "primitives.hpp").read_text())
