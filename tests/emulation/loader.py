"""From a kernel's source to a library of the CPU: g++, and a cache of what it built.

Fast mode is fast to compile and to run; what it finds, guard pages and unset memory find. Checked mode lets the
compiler call the hooks of checks.cpp at every load and store.
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
    "-fno-var-tracking",  # of which lines need nothing
    "-gdwarf-4",  # with version 5 addr2line may name the wrong file
    "-fno-gnu-unique",
    "-fno-strict-aliasing",
    "-fno-stack-protector",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
)
# Unset local variables hold a pattern, not what lay there before by luck.
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
    "fast": ("-Og",),  # with -O2 kernels run a sixth faster, but take half as long again to compile
    "optimized": ("-O2",),
    "debug": ("-O0", "-g3"),  # to step through
    "checked": (
        "-O1",
        "-fno-tree-sra",  # else a float4 is loaded in four parts, and its alignment goes unchecked
        "-fsanitize=thread,undefined,float-cast-overflow",
        "-fno-sanitize=vptr",
        "--param=tsan-instrument-func-entry-exit=0",
    ),
}


class BuildError(RuntimeError):
    """What g++ said of a source that it does not compile."""


class EmulationError(RuntimeError):
    """What a launch did wrong: one line for each report, with source lines."""


def why_not():
    """The reason why kernels cannot run on this machine's CPU, or None."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"kernels run on the CPU of x86-64 Linux only, and this is {platform.machine()} {sys.platform}"
    for program in ("g++", "nm", "addr2line"):
        if shutil.which(program) is None:
            return f"running kernels on the CPU needs {program}, which is not installed"
    return None


@functools.cache
def machine_flags():
    """Fused multiply-adds, where the processor has them: a GPU has them too."""
    with open("/proc/cpuinfo") as facts:
        flags = next((line.split() for line in facts if line.startswith("flags")), [])
    return ("-march=x86-64-v3",) if {"avx2", "fma", "bmi2", "movbe"} <= set(flags) else ()


@functools.cache
def compiler():
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def run(*command):
    done = subprocess.run(command, capture_output=True, encoding="utf-8")  # in which g++ quotes
    if done.returncode:
        raise BuildError(f"{' '.join(map(str, command[:3]))} ... failed:\n{done.stderr}")
    return done.stdout


def _built(parts, build):
    """The library of these parts, built now if it is not there: written under another name, and renamed."""
    import fcntl  # which only the systems have that run kernels

    key = hashlib.sha256("\0".join((*parts, *machine_flags(), compiler())).encode()).hexdigest()[:24]
    folder = settings.cache_folder() / "emulation"
    path = folder / f"{key}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{key[:2]}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until another thread or process has built it
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                build(Path(scratch))
                os.replace(Path(scratch) / "library.so", path)
    return path


@functools.cache
def runtime():
    """The emulator itself, loaded."""
    parts = ("scheduler.cpp", "launch.cpp", "checks.cpp", "profile.cpp", "instructions.cpp")
    names = ("parameter.hpp", "cuda.hpp", "launch.hpp", "runtime.hpp", *parts)
    flags = (*COMMON, "-g", "-O2", "-Wextra", "-shared", "-Wl,-Bsymbolic")

    def build(folder):
        sources = (FOLDER / name for name in parts)
        run("g++", *flags, *machine_flags(), "-o", folder / "library.so", *sources)

    path = _built((*flags, *((FOLDER / name).read_text() for name in names)), build)
    library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)  # kernels find its functions wherever it lies
    library.emulated_library.restype = ctypes.c_void_p
    library.emulated_report.restype = ctypes.c_char_p
    library.emulated_profile.restype = ctypes.c_char_p
    library.emulated_global_atomics.restype = ctypes.c_uint64
    return library


def library_file(text, mode):
    """The library of the kernels of one source text, compiled in one mode."""
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
    """The library of a source text."""
    return Library(library_file(text, mode), mode)


class Parameter(ctypes.Structure):
    """A parameter of a kernel, as cuda.hpp has it."""

    _fields_ = tuple((name, ctypes.c_uint) for name in ("bytes", "is_pointer", "is_constant", "element"))


class Library:
    """A library of kernels, compiled in one mode."""

    def __init__(self, path, mode):
        self.path, self.mode = path, mode
        self._library = ctypes.CDLL(path)
        self.handle = self._register()

    def kernel(self, name):
        """The address of the function that calls a kernel, and the kernel's parameters, one of 0 bytes at the end."""
        parameters = getattr(self._library, f"emulated_parameters_{name}")
        parameters.restype = ctypes.POINTER(Parameter)
        return ctypes.cast(getattr(self._library, f"emulated_call_{name}"), ctypes.c_void_p), parameters()

    def static_memory(self, name):
        """The bytes of shared memory that a kernel declares."""
        return sum(size for _, size, array in self._arrays if re.match(rf"{name}\b", array))

    def _register(self):
        """Tells the runtime where the library lies, and where its shared arrays are: statics of functions."""
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
        """The text of a report with its addresses as source lines."""
        return re.sub(r"\{(0x[0-9a-f]+)\}", lambda match: self._line(int(match[1], 16)), text)

    def _line(self, offset):
        """The kernel's line, and in brackets that of the innermost function that it calls there."""
        frames = self.frames(offset)
        kernels = [line for line in frames if ".cu:" in line]
        outermost = kernels[-1] if kernels else frames[0]
        return outermost if outermost == frames[0] else f"{outermost} ({frames[0]})"

    def frames(self, offset):
        """The source lines of the instruction before an address, from the innermost function outwards."""
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
    """Where the library of a function begins in memory."""
    info = _DlInfo()
    found = ctypes.CDLL(None).dladdr(ctypes.cast(function, ctypes.c_void_p), ctypes.byref(info))
    assert found, "dladdr knows every loaded function"
    return info.base


def kernel_names(text):
    """The kernels that a source defines."""
    return re.findall(r"__global__[^;{(]*?(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(", text)


@functools.cache
def library_for(module, mode):
    """The library of a module of the package."""
    return library_of(emulated_source(module), mode)


def emulated_source(module):
    """The text of a module with the CPU's primitives in it."""
    return source(module, (FOLDER / "primitives.hpp").read_text())
