"""Make the build: CuPy's wheel, its module of the runtime recompiled, and replacements of NVIDIA's libraries.

Five modules of the wheel are linked with NVIDIA's runtime. cupy_backends.cuda.api.runtime is compiled from CuPy's
source against the libcudart of libraries/; the other four are replaced (libraries/cub.pyx, replaced.py). All other
libraries are loaded by name, and those of libraries/ are found first.
"""

import concurrent.futures
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

from gpuconv import settings
from tests.emulation import loader

HERE = Path(__file__).parent
LIBRARIES = HERE / "libraries"
FOLDER = "GPUCONV_CUPY_ON_CPU"  # the environment variable with the folder of the build
# The module sitecustomize of the build, which every Python process of a command imports at startup.
AT_THE_START = """from tests.cupy_on_cpu import install

install.install()
"""
TOOLS = ("cython>=3.1", "nvidia-cuda-runtime-cu12>=12.9,<13")
COMPILED = {"runtime": "cupy_backends.cuda.api.runtime", "cub": "cupy.cuda.cub"}

# The replaced libraries by soname: the prefix of their functions, and their status for "not supported".
SONAMES = {
    "libcudart.so.12": ("cuda", None),
    "libcuda.so.1": ("cu", 801),
    "libnvrtc.so.12": ("nvrtc", 11),
    "libcublas.so.12": ("cublas", 15),
    "libcublasLt.so.12": ("cublasLt", 15),
    "libcufft.so.11": ("cufft", 16),
    "libcurand.so.10": ("curand", 199),
    "libcusparse.so.12": ("cusparse", 10),
    "libcusolver.so.11": ("cusolver", 9),
    "libnvJitLink.so.12": ("nvJitLink", 1),
}


# Flags for CuPy's sources, which were not written for g++.
OF_CUPY = ("-std=gnu++17", "-w", "-fpermissive", "-mf16c", "-O1", "-g0")


class BuildError(RuntimeError):
    """The reason why there is no build, in one line."""


def cupy_flags():
    """Return the flags with which g++ compiles CuPy's sources."""
    return (*loader.KERNEL, *OF_CUPY, *loader.machine_flags())


def folder():
    """Return the folder of the build that this process uses."""
    return Path(os.environ[FOLDER])


def version_at_hand():
    """Return the version of the installed CuPy."""
    try:
        return importlib.metadata.version("cupy-cuda12x")
    except importlib.metadata.PackageNotFoundError:
        raise BuildError("cupy-cuda12x is not installed, so a version must be named: --cupy 14.2.0") from None


def place(version):
    """Return the folder of a build; its name depends on the versions of CuPy, Python and g++, and on our sources."""
    sources = [path for path in HERE.rglob("*") if path.suffix in (".cpp", ".hpp", ".h", ".pyx")]
    sources += [HERE / "build.py", *(loader.FOLDER / name for name in ("parameter.hpp", "launch.hpp", "cuda.hpp"))]
    flags = cupy_flags()  # g++ silently ignores a precompiled header that was made with other flags
    key = _key(version, sys.version, loader.compiler(), *flags, *_texts(sources))
    return settings.cache_folder() / "cupy_on_cpu" / f"{version}-{key}"


def caches(target, mode):
    """Return the folder for the kernel caches of a build.

    The keys of CuPy's and gpuconv's caches depend on their own sources, but not on compiler.py and tests/emulation.
    """
    sources = [HERE / "compiler.py", *loader.FOLDER.iterdir()]
    return target.with_name(f"{target.name}-{_key(mode, *_texts(path for path in sources if path.is_file()))}")


def _texts(paths):
    return [path.read_text() for path in sorted(paths)]


def _key(*parts):
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def made(version):
    """Return the folder of the build for a version of CuPy, which is made if it is missing."""
    if reason := loader.why_not():
        raise BuildError(reason)
    target = place(version)
    if target.exists():
        check(target)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        work, result = Path(scratch) / "work", Path(scratch) / "result"
        work.mkdir()
        result.mkdir()
        _make(version, work, result)
        try:
            os.replace(result, target)
        except OSError:  # another process has made it meanwhile
            check(target)
    return target


def check(target):
    """Raise BuildError if a file that was built here has changed."""
    try:
        digests = json.loads((target / "digests.json").read_text())
        damaged = [name for name, digest in digests.items() if _digest(target / name) != digest]
    except (OSError, ValueError):
        damaged = ["digests.json"]
    if damaged:
        raise BuildError(f"the build of CuPy for the CPU is damaged ({', '.join(damaged)}): remove {target}")


def _digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def _make(version, work, result):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        source = pool.submit(_source, version, work)
        _install(version, work, result)
        tools, source = work / "tools", source.result()
        jobs = {stem: pool.submit(_extension, stem, source, tools, work) for stem in COMPILED}
        jobs |= {path.stem: pool.submit(_library, path, tools, work) for path in sorted(LIBRARIES.glob("*.cpp"))}
        headers = pool.submit(_headers, result)
        objects = {name: job.result() for name, job in jobs.items()}
        headers.result()
    (result / "lib").mkdir()
    needed = _needed(result / "site", source, objects["runtime"])
    for soname in SONAMES:
        _link(soname, objects.get(soname.partition(".")[0]), needed[soname], work, result / "lib")
    for stem in COMPILED:
        cudart = result / "lib" / "libcudart.so.12"
        _run("g++", "-shared", objects[stem], cudart, "-Wl,-rpath,$ORIGIN", "-o", result / "lib" / f"{stem}.so")
    (result / "site" / "sitecustomize.py").write_text(AT_THE_START)
    ours = [path for name in ("lib", "headers") for path in sorted((result / name).iterdir())]
    ours.append(result / "site" / "sitecustomize.py")
    digests = {str(path.relative_to(result)): _digest(path) for path in ours}
    (result / "digests.json").write_text(json.dumps(digests))


def _install(version, work, result):
    """Install CuPy with its requirements except NumPy, and the tools."""
    site = result / "site"
    _pip("install", "--no-deps", "--target", site, f"cupy-cuda12x=={version}")
    (metadata,) = site.glob("cupy_cuda12x-*.dist-info/METADATA")
    needs = re.findall(r"^Requires-Dist: ([^;\n]+)$", metadata.read_text(), re.MULTILINE)
    _pip("install", "--no-deps", "--target", site, *(need for need in needs if not need.startswith("numpy")))
    _pip("install", "--target", work / "tools", *TOOLS)


def _source(version, work):
    """Download and extract CuPy's source; its installer is told not to compile anything."""
    environment = {**os.environ, "CUPY_INSTALL_USE_STUB": "1"}
    _pip("download", "--no-deps", "--no-binary", "cupy", "-d", work, f"cupy=={version}", env=environment)
    with tarfile.open(work / f"cupy-{version}.tar.gz") as archive:
        archive.extractall(work, filter="data")
    source = work / f"cupy-{version}"
    shutil.copy(LIBRARIES / "cub.pyx", source / "cupy" / "cuda" / "cub.pyx")
    return source


def _extension(stem, source, tools, work):
    """Compile a module of CuPy and return the object file."""
    name = COMPILED[stem]
    code, made_object = work / f"{stem}.cpp", work / f"{stem}.o"
    settings_of_cupy = {
        "CUPY_USE_CUDA_PYTHON": False,
        "CUPY_CUFFT_STATIC": False,
        "CUPY_CYTHON_VERSION": "",
        "CUPY_CUDA_VERSION": 12090,
        "CUPY_HIP_VERSION": 0,
    }
    script = f"""
from Cython.Compiler.Main import CompilationOptions, compile
options = CompilationOptions(
    language_level=3, cplus=True, include_path=["."], output_file={str(code)!r}, compile_time_env={settings_of_cupy!r},
    compiler_directives={{"embedsignature": True, "c_api_binop_methods": True, "binding": False}},
)
raise SystemExit(compile({name.replace(".", "/") + ".pyx"!r}, options, full_module_name={name!r}).num_errors)
"""
    _run(sys.executable, "-c", script, cwd=source, env={**os.environ, "PYTHONPATH": str(tools)})
    include = (
        f"-I{sysconfig.get_paths()['include']}",
        f"-I{source}/cupy_backends",
        f"-I{source}/cupy_backends/cuda/api",
    )
    include += (f"-I{source}", f"-I{source}/cupy", f"-I{source}/cupy/_core/include")
    _run(
        "g++", "-std=c++17", "-O1", "-g0", "-fPIC", "-w", *include, *_host_headers(tools), "-c", code, "-o", made_object
    )
    return made_object


def _host_headers(tools):
    return (f"-I{HERE / 'host_headers'}", "-isystem", tools / "nvidia" / "cuda_runtime" / "include")


def _library(path, tools, work):
    """Compile a library of libraries/ and return the object file."""
    flags = ("-std=c++17", "-O3", "-fPIC", "-Wall", *loader.machine_flags())
    include = (f"-I{loader.FOLDER}", *_host_headers(tools))
    _run("g++", *flags, *include, "-c", path, "-o", work / f"{path.stem}.o")
    return work / f"{path.stem}.o"


def _needed(site, source, runtime):
    """Return the functions that CuPy calls, by library."""
    needed = {soname: set() for soname in SONAMES}
    needed["libcudart.so.12"] |= {name for name in _undefined(runtime) if name.startswith("cuda")}
    for module in site.rglob("*.so"):
        for name in _undefined(module):
            function, _, soname = name.partition("@")
            if soname in needed:
                needed[soname].add(function)
    for path in source.glob("cupy_backends/cuda/**/*.p[xy]*"):  # functions that are loaded by name
        for soname, (prefix, _) in SONAMES.items():
            if f"'{prefix}'" in path.read_text():
                names = re.findall(r"\.get\(f?'(\w+)(?:\{version\})?'\)", path.read_text())
                needed[soname] |= {prefix + name + end for name in names for end in ("", "_v2")}
    return needed


def _undefined(path):
    return re.findall(r" U (\S+)", _run("nm", "--undefined-only", *(("-D",) if path.suffix == ".so" else ()), path))


def _link(soname, made_object, needed, work, folder):
    """Link a library; functions that CuPy calls and that the library lacks return "not supported"."""
    _, status = SONAMES[soname]
    defined = _run("nm", "--defined-only", made_object).split() if made_object else ()
    lines = ['extern "C" {', "int emulated_refusal();"]
    for name in sorted(needed.difference(defined)):
        if re.search(r"Get(Error|Status)(String|Name)", name):
            lines.append(f'const char* {name}() {{ return "not supported"; }}')
        else:
            lines.append(f"int {name}() {{ return {status or 'emulated_refusal()'}; }}")
    refusals, versions = work / "refusals.cpp", work / "versions.map"
    refusals.write_text("\n".join([*lines, "}"]))
    versions.write_text(f"{soname} {{ global: *; }};\n")
    needs = () if soname == "libcudart.so.12" else (folder / "libcudart.so.12", "-Wl,-rpath,$ORIGIN")
    flags = ("-shared", "-fPIC", "-w", f"-Wl,-soname,{soname}", f"-Wl,--version-script={versions}")
    own = (made_object,) if made_object else ()
    _run("g++", *flags, refusals, *own, *needs, "-o", folder / soname)


def _headers(result):
    """Copy the headers and precompile cupy.hpp, which is included before every source of CuPy."""
    headers = result / "headers"
    shutil.copytree(HERE / "kernel_headers", headers)
    for name in ("parameter.hpp", "cuda.hpp"):
        shutil.copy(loader.FOLDER / name, headers)
    _run("g++", *cupy_flags(), "-x", "c++-header", headers / "cupy.hpp", "-o", headers / "cupy.hpp.gch")


def _run(*command, **how):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **how)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["nothing"]
        if any("Failed to establish a new connection" in line or "connection broken by" in line for line in said):
            raise BuildError("building CuPy for the CPU needs the package index, which cannot be reached")
        errors = [line for line in said if "rror" in line] or said
        name = Path(str(command[0])).name
        raise BuildError(f"building CuPy for the CPU failed: {name} says {errors[-1].strip()}")
    return done.stdout


def _pip(command, *arguments, **how):
    _run(sys.executable, "-m", "pip", command, "--quiet", "--disable-pip-version-check", *arguments, **how)
