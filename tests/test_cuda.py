"""Sources of kernels, the compiler, the cache on disk, and launches. Only one test needs a GPU."""

import errno
import math
import operator
import os
import re
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import gpuconv
from gpuconv import settings
from gpuconv.arrays import INSTALL_HINT, Backend
from gpuconv.gpu import cache, compiler, cublas, direct, kernels_folder, launch, structs
from gpuconv.gpu.kernel import CUDA_TYPES, Kernel, Module, check_arguments, parameters, source
from gpuconv.plan import WORKSPACE, Planner, Scope
from tests.cases import DTYPES


def why_no_nvrtc():
    try:
        compiler.nvrtc()
    except gpuconv.BackendError as error:
        return str(error)
    return None


NVRTC = pytest.mark.skipif(why_no_nvrtc() is not None, reason=str(why_no_nvrtc()))


def module_of(stem, dtype="float32", wide=False, **constants):
    sums = "float32" if dtype in ("float16", "bfloat16") else dtype
    types = (("First", dtype), ("Second", dtype), ("Result", dtype), ("Sum", sums))
    return Module(stem, types, wide, tuple(constants.items()))


DIRECT = module_of("direct", THREADS=direct.THREADS)


# ------------------------------------------------------------------------------------------------- compiling


def test_all_ptx_is_in_one_file_and_nothing_is_included():
    for path in kernels_folder().glob("*.cu*"):
        text = path.read_text()
        assert "#include" not in text
        assert path.name == "primitives.cuh" or "asm" not in text


@NVRTC
def test_a_compile_error_holds_the_log_the_file_and_the_constants():
    lacking = module_of("direct", "complex128", TILE=3)
    with pytest.raises(gpuconv.CompileError, match=r"direct\.cu with First=complex128.* TILE=3") as caught:
        compiler.compiled(lacking, "sm_80")
    assert re.search(r"direct.cu\(\d+\): error.*THREADS", caught.value.log)
    assert caught.value.log.strip() in str(caught.value)
    assert (caught.value.module, caught.value.architecture) == (lacking, "sm_80")


@NVRTC
@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_86", "sm_90a", "sm_120"])
def test_a_cubin_has_all_its_bytes(architecture):
    """CuPy drops the last byte, which is part of a header in some cubins; a driver may refuse these without it."""
    if int(architecture[3:].rstrip("a")) not in compiler.nvrtc().getSupportedArchs():
        pytest.skip("this NVRTC does not know it")
    text = 'extern "C" __global__ void add_one(float* x) { x[threadIdx.x] += 1; }'
    cubin, _ = compiler.compiled_text(text, "add_one.cu", architecture)
    assert len(cubin) == compiler.elf_size(cubin)
    assert cubin.startswith(b"\x7fELF")


@pytest.mark.parametrize("found, is_taken", [((12, 0), False), ((12, 1), True), ((13, 0), True), ((11, 8), False)])
def test_a_compiler_that_is_too_old_is_refused(found, is_taken, monkeypatch):
    nvrtc = types.SimpleNamespace(getVersion=lambda: found, getSupportedArchs=lambda: (80, 90))
    monkeypatch.setattr(compiler, "nvrtc", lambda: nvrtc)
    gpuconv.clear_cache()
    try:
        if is_taken:
            assert compiler.architecture_for("90") == "sm_90a"
        else:
            with pytest.raises(
                gpuconv.BackendError, match=rf"needs NVRTC 12.1 or later, and {found[0]}\.{found[1]} was found"
            ):
                compiler.architecture_for("90")
    finally:
        gpuconv.clear_cache()


def test_a_missing_compiler_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    with pytest.raises(gpuconv.BackendError) as caught:
        compiler.nvrtc()
    assert INSTALL_HINT in str(caught.value)
    assert "compiling kernels needs NVRTC" in str(caught.value)


@pytest.mark.parametrize(
    "capability, architecture",
    [("75", "sm_75"), ("90", "sm_90a"), ("100", "sm_100a"), ("120", "sm_120"), ("121", "compute_120")],
)
def test_architectures(capability, architecture, monkeypatch):
    nvrtc = types.SimpleNamespace(getVersion=lambda: (12, 9), getSupportedArchs=lambda: (75, 80, 90, 100, 120))
    monkeypatch.setattr(compiler, "nvrtc", lambda: nvrtc)
    gpuconv.clear_cache()
    try:
        assert compiler.architecture_for(capability) == architecture
    finally:
        gpuconv.clear_cache()


@NVRTC
def test_a_device_newer_than_the_compiler_gets_ptx():
    text, _ = compiler.compiled(DIRECT, "compute_80")
    assert text.startswith(b"//")
    assert b".target sm_80" in text
    assert b"\0" not in text


# ------------------------------------------------------------------------------------------------- the cache


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The list of compilations, with a separate cache and a fake compiler."""
    calls = []

    def compiled(module, architecture):
        calls.append((module, architecture))
        return f"cubin {len(calls)}".encode() * 100, "log"

    monkeypatch.setenv("GPUCONV_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "compiled", compiled)
    monkeypatch.setattr(compiler, "version", lambda: (12, 9))
    return calls


def test_a_module_is_compiled_once(made, tmp_path):
    path = cache.cubin_path(DIRECT, "sm_90a")
    assert path.parent == tmp_path / "kernels"
    assert path.read_bytes() == b"cubin 1" * 100
    assert cache.cubin_path(DIRECT, "sm_90a") == path
    assert len(made) == 1
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_source_architecture_options_and_compiler_make_another_entry(made, monkeypatch):
    paths = {cache.cubin_path(DIRECT, "sm_90a"), cache.cubin_path(DIRECT, "sm_80")}
    paths.add(cache.cubin_path(DIRECT._replace(wide=True), "sm_80"))
    monkeypatch.setattr(compiler, "version", lambda: (13, 0))
    paths.add(cache.cubin_path(DIRECT, "sm_80"))
    monkeypatch.setattr(compiler, "OPTIONS", (*compiler.OPTIONS, "-lineinfo"))
    paths.add(cache.cubin_path(DIRECT, "sm_80"))
    assert len(paths) == len(made) == 5


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:50]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"someone else's" * 50),
        lambda path: path.rename(path.with_name(path.name.replace("-", "-0", 1))),
    ],
    ids=["cut short", "empty", "foreign", "renamed"],
)
def test_a_damaged_entry_is_made_again(damage, made):
    path = cache.cubin_path(DIRECT, "sm_90a")
    damage(path)
    again = cache.cubin_path(DIRECT, "sm_90a")
    assert len(made) == 2
    assert again.read_bytes() == b"cubin 2" * 100
    assert cache.cubin_path(DIRECT, "sm_90a").read_bytes() == b"cubin 2" * 100
    assert len(made) == 2


@pytest.mark.parametrize("step", ["mkdir", "write", "replace"])
def test_a_folder_that_takes_nothing_only_costs_time(step, made, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    real = os.replace
    if step == "mkdir":
        (tmp_path / "kernels").write_text("a file where the folder should be")
    elif step == "write":
        monkeypatch.setattr(cache.tempfile, "mkstemp", _only_outside(tmp_path, cache.tempfile.mkstemp, refuse))
    else:
        monkeypatch.setattr(os, "replace", lambda a, b: refuse() if str(tmp_path / "kernels") in str(b) else real(a, b))
    for count in (1, 2):
        path = cache.cubin_path(DIRECT, "sm_90a")
        assert path.read_bytes() == f"cubin {count}".encode() * 100
        assert tmp_path not in path.parents
    if step == "replace":
        assert list((tmp_path / "kernels").iterdir()) == []


def _only_outside(folder, real, refuse):
    return lambda dir=None, **rest: refuse() if dir and folder in (dir, *dir.parents) else real(dir=dir, **rest)


def test_an_interrupted_write_leaves_nothing(made, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.cubin_path(DIRECT, "sm_90a")
    assert list((tmp_path / "kernels").iterdir()) == []


@pytest.mark.parametrize(
    "system, variables, folder",
    [
        ("linux", {}, "home/.cache/gpuconv"),
        ("linux", {"XDG_CACHE_HOME": "/caches"}, "/caches/gpuconv"),
        ("darwin", {"XDG_CACHE_HOME": "/caches"}, "home/Library/Caches/gpuconv"),
        ("win32", {}, "home/AppData/Local/gpuconv"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/gpuconv"),
        ("linux", {"GPUCONV_CACHE_DIR": "/own", "XDG_CACHE_HOME": "/caches"}, "/own"),
    ],
)
def test_the_cache_folder_is_among_the_user_s_caches(system, variables, folder, monkeypatch):
    for name in ("GPUCONV_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(settings.sys, "platform", system)
    monkeypatch.setattr(settings.Path, "home", lambda: Path("home"))
    assert settings.cache_folder() == Path(folder)


def test_the_cache_folder_must_be_a_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPUCONV_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"GPUCONV_CACHE_DIR must name a folder, but '.*file' is a file"):
        cache.cubin_path(DIRECT, "sm_90a")


@pytest.mark.parametrize("name", ["x" * 300, "/proc/gpuconv", "/dev/null/gpuconv"])
def test_a_cache_folder_that_cannot_be_only_costs_time(name, made, monkeypatch):
    monkeypatch.setenv("GPUCONV_CACHE_DIR", name)
    assert cache.cubin_path(DIRECT, "sm_90a").read_bytes() == b"cubin 1" * 100


@pytest.mark.parametrize("variable", ["GPUCONV_CACHE_DIR", "GPUCONV_DUMP"])
def test_a_home_that_is_unknown_is_named(variable, device, given, monkeypatch):
    monkeypatch.setenv(variable, "~nobody-by-this-name/kernels")
    with pytest.raises(ValueError, match=f"{variable} must name a folder; got '~nobody-by-this-name/kernels'"):
        launched(given, 1)


@pytest.mark.parametrize("name", ["/proc/gpuconv", "/dev/null/gpuconv"])
def test_a_dump_that_cannot_be_written_is_an_error(name, device, given, monkeypatch):
    monkeypatch.setenv("GPUCONV_DUMP", name)
    with pytest.raises(ValueError, match=f"GPUCONV_DUMP must name a folder to write to; got '{name}'"):
        launched(given, 1)


# ------------------------------------------------------------------------------------------------- the launch


@pytest.fixture
def device(made, monkeypatch):
    """A fake CuPy that records what was loaded and launched."""
    seen = types.SimpleNamespace(loaded=[], launched=[], asked_for=[], current=0, static_memory=0)

    class Function:
        def __init__(self, name):
            self.name, self.most, self.ptr = name, (48 << 10) - seen.static_memory, self

        def __call__(self, grid, block, given, shared_mem):
            assert shared_mem <= self.most
            seen.launched.append((self.name, grid, block, given, shared_mem))

    class Driver:
        CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 1, 8

        def funcGetAttribute(self, attribute, function):  # noqa: N802
            assert attribute == 1
            return seen.static_memory

        def funcSetAttribute(self, function, attribute, size):  # noqa: N802
            assert attribute == 8
            seen.asked_for.append(size)
            function.most = size

    class Module:
        def load_file(self, path):
            seen.loaded.append((path, seen.current))

        def get_function(self, name):
            return Function(name)

    def new_device(number=None):
        return types.SimpleNamespace(id=seen.current if number is None else number, compute_capability="90")

    cuda = types.SimpleNamespace(Device=new_device, Module=Module, driver=Driver())
    cupy = types.SimpleNamespace(cuda=cuda)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(compiler, "architecture_for", lambda capability: f"sm_{capability}a")
    gpuconv.clear_cache()
    yield seen
    gpuconv.clear_cache()


@pytest.fixture
def given():
    """Return the arguments of direct_forward."""
    geometry = structs.struct("Convolution", False, 1, 1, 1, 1, *[(1, 1, 1)] * 5, (0, 0, 0))
    images = structs.struct("Images", False, 1, (1, 1, 1), 1, 1)
    weights = structs.struct("Weights", False, (1, 1, 1), 1, 1, 1)
    options = structs.Options(False, 0, False, 0, False).struct(False)
    x, w, y = (np.ones((1, 1, 1), np.float32) for _ in range(3))
    return [x, None, w, None, y, geometry, images, images, weights, options]


FORWARD = Kernel(DIRECT, "direct_forward")


def launched(given, grid=5, shared_memory=0):
    launch.prepared(FORWARD, grid, 128, given, shared_memory)(*given)


def test_a_launch_that_is_prepared_is_made_again_with_other_arguments(device, given):
    again = launch.prepared(FORWARD, 5, 128, given, 60_000)
    assert device.launched == []
    for arguments in (given, given[::-1]):  # arguments are not checked again
        again(*arguments)
        assert device.launched.pop() == ("direct_forward", (5,), (128,), tuple(arguments), 60_000)
    assert len(device.loaded) == 1


def test_a_kernel_is_loaded_once_for_each_device(device, made, given):
    for _ in range(3):
        launched(given, shared_memory=64)
    assert device.launched == [("direct_forward", (5,), (128,), tuple(given), 64)] * 3
    assert len(device.loaded) == len(made) == 1
    device.current = 1
    launched(given)
    assert len(device.loaded) == 2
    assert len(made) == 1


@pytest.mark.parametrize("static_memory, asked_for", [(0, [60_000, 90_000]), (36 << 10, [20_000, 60_000, 90_000])])
def test_more_shared_memory_is_asked_for_once(static_memory, asked_for, device, given):
    device.static_memory = static_memory
    sizes = [64, 20_000, 64, 60_000, 60_000, 90_000, 60_000]
    for size in sizes:
        launched(given, shared_memory=size)
    assert [size for *_, size in device.launched] == sizes
    assert device.asked_for == asked_for


def test_a_grid_of_no_blocks_is_not_launched(device, given):
    scope = Scope(WORKSPACE, 8)
    planner = Planner(Backend("cupy", None, launch.prepared), np.dtype(np.float32), 0, scope, 8)
    planner.launch(FORWARD, 0, 128, given)
    assert not scope.steps
    planner.launch(FORWARD, 1, 128, given)
    assert len(scope.steps) == 1


def test_a_grid_beyond_what_cuda_takes_is_refused(device, given):
    with pytest.raises(
        ValueError, match="direct_forward needs 2147483648 thread blocks, but a grid has at most 2147483647"
    ):
        launched(given, 2**31)


WRONG_ARGUMENTS = {
    "another dtype": (0, np.ones((1, 1, 1)), "takes an array of First for x_values, but got an array of float64"),
    "a value for an array": (4, np.float32(1), "takes an array of Result for y, but got a value of float32"),
    "an array for a struct": (
        5,
        np.ones(3, np.int32),
        "takes a value of Convolution for conv, but got an array of int32",
    ),
    "a Python number": (9, 3, "takes a value of Options for options, but got int"),
    "another struct": (6, structs.struct("Weights", False, (1, 1, 1), 1, 1, 1), "takes a value of Images for y_at"),
    "64 bits for 32": (6, structs.struct("Images", True, 1, (1, 1, 1), 1, 1), "takes a value of Images for y_at"),
    "the other byte order": (
        0,
        np.ones((1, 1, 1), ">f4"),
        "takes an array of First for x_values, but got an array of >f4",
    ),
    "nothing for a result": (4, None, "takes an array of Result for y, but got NoneType"),
    "nothing for a value": (9, None, "takes a value of Options for options, but got NoneType"),
}


@pytest.mark.parametrize("name", WRONG_ARGUMENTS)
def test_arguments_are_held_against_the_kernel_s_source(name, device, given):
    place, wrong, words = WRONG_ARGUMENTS[name]
    given[place] = wrong
    with pytest.raises(TypeError) as caught:
        launched(given, 1)
    assert f"direct_forward {words}" in str(caught.value)
    assert device.launched == []


def test_the_number_of_arguments_is_checked(given):
    with pytest.raises(TypeError, match="direct_forward takes 10 arguments, but 9 were given"):
        check_arguments(FORWARD, given[:-1])
    with pytest.raises(ValueError, match=r"direct\.cu has no kernel direct_backward"):
        check_arguments(Kernel(DIRECT, "direct_backward"), given)


def test_parameters_are_read_from_the_source():
    found = parameters("scatter", "scatter_weight_grad")
    assert [p.name for p in found if p.is_pointer] == ["dy_values", "dy_y", "x_values", "x_y", "dw"]
    assert [p.is_constant for p in found[:5]] == [True] * 4 + [False]
    assert [p.type for p in found[5:]] == ["Convolution", "Images", "Images", "Weights", "Index", "Index", "Options"]


def test_sources_are_dumped_where_a_folder_is_named(device, given, tmp_path, monkeypatch):
    launched(given, 1)
    monkeypatch.setenv("GPUCONV_DUMP", str(tmp_path / "dump"))
    for _ in range(2):
        launched(given, 1)
    (path,) = (tmp_path / "dump").iterdir()
    assert path.name.startswith("direct-")
    assert path.read_text() == source(DIRECT)
    assert "using Sum = float;" in path.read_text()


def test_structs_are_the_same_to_numpy_and_to_cuda():
    """Fields are compared here; sizes are compared at every launch on the CPU."""
    text = structs.text()
    for name in structs.NAMES:
        for wide in (False, True):
            dtype = structs.dtype_of(name, wide)
            declared = text.partition(f"struct {name} {{")[2].partition("}")[0]
            fields = [one.split()[-1].partition("[")[0] for one in declared.split(";")[:-1]]
            assert list(dtype.names) == fields
    assert structs.dtype_of("Images", True).itemsize == 2 * structs.dtype_of("Images", False).itemsize == 48


def test_all_dtypes_have_a_cuda_type():
    assert tuple(CUDA_TYPES) == DTYPES


@pytest.mark.gpu
def test_a_cubin_from_disk_runs_in_another_process(tmp_path):
    import subprocess

    program = (
        "import cupy, gpuconv;"
        "print(float(gpuconv.conv(cupy.ones((1, 2, 5), 'f4'), cupy.ones((1, 2, 3), 'f4'), algorithm='direct').sum()))"
    )
    environment = {**os.environ, "GPUCONV_CACHE_DIR": str(tmp_path)}
    entries = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == "18.0", done.stderr
        entries.append([(path.name, path.stat().st_mtime_ns) for path in (tmp_path / "kernels").iterdir()])
    assert len(entries[0]) == 1
    assert entries[0] == entries[1]


@pytest.mark.parametrize(
    "programs, sections, size",
    [((64, 56, 3), (100, 64, 2), 232), ((64, 56, 1), (100, 64, 2), 228), ((9, 1, 4), (2, 3, 4), 14)],
)
def test_the_size_of_an_elf_file_is_where_its_last_headers_end(programs, sections, size):
    header = bytearray(64)
    struct.pack_into("<QQ", header, 0x20, programs[0], sections[0])
    struct.pack_into("<HHHH", header, 0x36, *programs[1:], *sections[1:])
    assert compiler.elf_size(bytes(header)) == size


def test_values_of_structs_are_read_only():
    assert not structs.struct("Boxes", False, (1, 2, 3), (4, 5, 6), (7, 8, 9)).flags.writeable


@pytest.mark.parametrize("stack", [(), (4,), (2, 3), (1, 3), (2, 1, 3), (3, 2, 2)])
def test_products_that_lie_evenly_apart_are_one_call(stack, rng):
    """On the axes from the returned one on, the offset of every matrix is its index times a constant step."""
    for _ in range(200):
        steps = [tuple(int(step) for step in rng.choice([0, 1, 2, 3, 6], len(stack))) for _ in range(2)]
        steps = [tuple(s if n > 1 else 0 for s, n in zip(step, stack, strict=True)) for step in steps]
        axis, count, apart = cublas._together(stack, steps)
        assert count == math.prod(stack[axis:])
        for step, each in zip(steps, apart, strict=True):
            places = [sum(map(operator.mul, index, step[axis:])) for index in np.ndindex(*stack[axis:])]
            assert places == [number * each for number in range(count)]
        if axis:  # no further axis can be merged
            larger = [
                [sum(map(operator.mul, index, step[axis - 1 :])) for index in np.ndindex(*stack[axis - 1 :])]
                for step in steps
            ]
            assert any(
                places != [number * each for number in range(len(places))]
                for places, each in zip(larger, apart, strict=True)
            )
