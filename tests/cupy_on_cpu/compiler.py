"""NVRTC on the CPU: g++ compiles a source to a library, as in tests/emulation."""

import _thread
import ctypes
import re
import tempfile
from pathlib import Path

from tests.cupy_on_cpu import build
from tests.emulation import launcher, loader

SUCCESS, INVALID_OPTION, COMPILATION = 0, 5, 6
# The constructs of CUDA that a header cannot define.
DYNAMIC_SHARED = re.compile(r"extern\s+__shared__\s+([\w:<>\s]+?)\s*\b(\w+)\s*\[\s*\]\s*;")
PRIMITIVES = re.compile(r'#line 1 "primitives\.cuh"\n.*?(?=#line 1 ")', re.DOTALL)
TEMPLATE = re.compile(r"template\s*<[^{;]*$")

# The output of ptxas for a kernel, with fixed numbers.
PTXAS = """ptxas info    : Compiling entry function '{0}' for 'sm_90a'
ptxas info    : Function properties for {0}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 0 bytes smem
"""

_Texts = ctypes.POINTER(ctypes.c_char_p)
_COMPILE = ctypes.CFUNCTYPE(
    *(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, _Texts, ctypes.c_int, _Texts),
    *(ctypes.c_int, _Texts, _Texts),
)


def install(nvrtc):
    """Make the replacement of NVRTC compile by this module."""
    nvrtc.emulated_compiled.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p)
    nvrtc.emulated_lowered.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p)

    @_COMPILE
    def compile_program(program, source, name, count, options, expressions, expression, headers, names, contents):
        options = [options[i].decode() for i in range(count)]
        expressions = [expression[i].decode() for i in range(expressions)]
        headers = {names[i].decode(): contents[i].decode() for i in range(headers)}
        if unknown := [option for option in options if not _is_known(option)]:
            nvrtc.emulated_compiled(program, b"", 0, f"unrecognized options: {unknown}".encode())
            return INVALID_OPTION
        try:
            code = compiled(source.decode(), options, expressions, headers)
        except loader.BuildError as error:
            nvrtc.emulated_compiled(program, b"", 0, str(error).encode())
            return COMPILATION
        except BaseException as error:  # it would be lost, since the caller is not Python
            if isinstance(error, KeyboardInterrupt):
                _thread.interrupt_main()
            nvrtc.emulated_compiled(program, b"", 0, f"{type(error).__name__}: {error}".encode())
            return COMPILATION
        log = "".join(PTXAS.format(name) for name in loader.kernel_names(source.decode()))
        nvrtc.emulated_compiled(program, code, len(code), log.encode())
        for number, text in enumerate(expressions):
            nvrtc.emulated_lowered(program, text.encode(), f"expression_{number}".encode())
        return SUCCESS

    nvrtc.emulated_compiler(compile_program)
    return compile_program  # must be referenced as long as it may be called


def _is_known(option):
    return option.startswith(("-I", "-D", "-U", "-std", "--std", "-arch", "--gpu-architecture", "--include-path")) or (
        option.startswith(("--define-macro", "--device-as-default", "--ptxas-options", "-ftz", "-default-device"))
        or option in ("-G", "--device-debug", "-lineinfo", "--generate-line-info", "-w", "--use_fast_math")
    )


def compiled(source, options, expressions, headers):
    """Return the bytes of the library; for PTX, which cannot be run here, return a placeholder line."""
    if any("=compute_" in option for option in options):
        return b"// PTX of a source that is compiled by g++\n"
    if PRIMITIVES.search(source):
        text = PRIMITIVES.sub(lambda _: f'#line 1 "primitives.cuh"\n{_primitives()}', source, count=1)
        return loader.library_file(text, launcher.options.mode).read_bytes()
    text = DYNAMIC_SHARED.sub(r"\1* const \2 = static_cast<\1*>(emulated::emulated_dynamic_shared());", source)
    names = [name for name in loader.kernel_names(text) if not TEMPLATE.search(_before(text, name))]
    entries = [f"EMULATED_ENTRY({name})" for name in dict.fromkeys(names)]
    for number, expression in enumerate(expressions):
        entries += [f"static constexpr auto expression_{number} = &{expression};", f"EXPRESSION_ENTRY({number})"]
    return _built(text + '\n#line 1 "entries"\n' + "\n".join(entries) + "\n", _flags(options), headers)


def _primitives():
    return (loader.FOLDER / "primitives.hpp").read_text()


def _before(text, name):
    """Return the text before the declaration of a kernel, back to the end of the previous declaration."""
    declaration = re.search(rf"__global__[^;{{(]*?(?:__launch_bounds__\([^)]*\)\s*)?\b{name}\s*\(", text).start()
    return re.split(r"[;}]", text[:declaration])[-1]


def _flags(options):
    """Return the options that g++ accepts, in its spelling."""
    flags, taken = [], iter(options)
    for option in taken:
        if option in ("-I", "-D", "-U"):
            flags += [option, next(taken)]
        elif option.startswith(("-D", "-U")):
            flags.append(option)
        elif option.startswith("--define-macro="):
            flags.append("-D" + option.partition("=")[2])
        elif option.startswith(("-I", "--include-path=")):
            folder = option.removeprefix("-I").removeprefix("--include-path=")
            if not (Path(folder) / "cuda_runtime.h").exists():  # replaced by kernel_headers/
                flags.append("-I" + folder)
        elif "std=" in option:
            flags.append("-std=gnu++" + option.rpartition("c++")[2])
    return flags


def _built(text, flags, headers):
    """Return the library that g++ makes of a source of CuPy; CuPy caches it."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in {**headers, "kernels.cpp": text}.items():
            (Path(folder) / name).write_text(content)
        library = Path(folder) / "library.so"
        include = (
            "-include",
            build.folder() / "headers" / "cupy.hpp",
            f"-I{build.folder() / 'headers'}",
            f"-I{folder}",
        )
        loader.run("g++", *build.cupy_flags(), *flags, *include, "-shared", Path(folder) / "kernels.cpp", "-o", library)
        return library.read_bytes()
