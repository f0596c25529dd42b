"""The build of CuPy for the CPU: errors are reported in one line. Its computations are tested by tests marked gpu."""

import importlib.metadata
import json
import os
import re
import sys

import pytest

from tests.cupy_on_cpu import __main__, build, install
from tests.emulation import loader


def refused(arguments, monkeypatch):
    """Return the error message of the command."""
    monkeypatch.setattr(__main__, "driver_devices", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["cupy_on_cpu", *arguments])
    with pytest.raises(SystemExit) as refusal:
        __main__.main()
    assert isinstance(refusal.value.code, str)
    assert "\n" not in refusal.value.code
    return refusal.value.code


def test_a_machine_with_a_gpu_needs_no_emulation(monkeypatch):
    monkeypatch.setattr(__main__, "driver_devices", lambda: 1)
    monkeypatch.setattr(sys, "argv", ["cupy_on_cpu", "pytest"])
    with pytest.raises(SystemExit, match="the driver reports a CUDA device: CuPy computes on it"):
        __main__.main()


@pytest.mark.skipif(loader.why_not() is not None, reason=str(loader.why_not()))
def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(loader.shutil, "which", lambda name: None if name == "g++" else f"/usr/bin/{name}")
    assert refused(["--cupy", "14.2.0"], monkeypatch) == "running kernels on the CPU needs g++, which is not installed"


def test_a_version_must_be_named_where_cupy_is_not_installed(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert refused([], monkeypatch).startswith("cupy-cuda12x is not installed, so a version must be named")


@pytest.mark.skipif(loader.why_not() is not None, reason=str(loader.why_not()))
@pytest.mark.parametrize(
    "said, line",
    [
        ("ERROR: No matching distribution found for cupy-cuda12x==99.0", "No matching distribution found"),
        ("noise\nerror: cython is not to be had\nmore noise", "cython is not to be had"),
        ("", "nothing"),
    ],
)
def test_what_fails_while_building_is_said_in_one_line(said, line, monkeypatch, tmp_path):
    """The version does not exist, or tools are missing."""
    monkeypatch.setenv("GPUCONV_CACHE_DIR", str(tmp_path))
    script = f"import sys; sys.stderr.write({said!r}); sys.exit(1)"
    monkeypatch.setattr(build, "_pip", lambda *_, **__: build._run(sys.executable, "-c", script))
    text = refused(["--cupy", "99.0"], monkeypatch)
    assert re.fullmatch(rf"building CuPy for the CPU failed: python\S* says .*{line}.*", text)
    assert not any((tmp_path / "cupy_on_cpu").iterdir()), "something was left"


@pytest.mark.skipif(loader.why_not() is not None, reason=str(loader.why_not()))
def test_a_package_index_that_cannot_be_reached_is_said(monkeypatch, tmp_path):
    """The error is recognised in the output of pip, whose last line says that no such version exists."""
    monkeypatch.setenv("GPUCONV_CACHE_DIR", str(tmp_path))
    for variable, value in {
        "INDEX_URL": "http://127.0.0.1:9/simple",
        "RETRIES": "1",
        "CONFIG_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(f"PIP_{variable}", value)
    for variable in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(variable, raising=False)
    text = refused(["--cupy", "99.0"], monkeypatch)
    assert text == "building CuPy for the CPU needs the package index, which cannot be reached"


@pytest.mark.skipif(loader.why_not() is not None, reason=str(loader.why_not()))
@pytest.mark.parametrize("damage", ["cut short", "missing", "no list"])
def test_a_damaged_build_is_found(damage, monkeypatch, tmp_path):
    monkeypatch.setenv("GPUCONV_CACHE_DIR", str(tmp_path))
    folder = build.place("14.2.0")
    (folder / "lib").mkdir(parents=True)
    library, digests = folder / "lib" / "libcuda.so.1", folder / "digests.json"
    library.write_bytes(b"whole")
    digests.write_text(json.dumps({"lib/libcuda.so.1": build._digest(library)}))
    assert build.made("14.2.0") == folder
    if damage == "cut short":
        library.write_bytes(b"who")
    elif damage == "missing":
        library.unlink()
    else:
        digests.write_text("{")
    name = "digests.json" if damage == "no list" else "lib/libcuda.so.1"
    expected = f"the build of CuPy for the CPU is damaged ({name}): remove {folder}"
    assert refused(["--cupy", "14.2.0"], monkeypatch) == expected


@pytest.mark.parametrize(
    "files, wants",
    [
        (("__init__.py", "lib/libtorch_cuda.so"), True),
        (("__init__.py", "lib/libtorch_cpu.so"), False),
        (("lib/libtorch_cuda.so",), False),  # files left by an uninstallation are not a package
        ((), False),
    ],
)
def test_a_pytorch_with_cuda_is_not_loaded_beside_our_libraries(files, wants, monkeypatch, tmp_path):
    for name in files:
        path = tmp_path / "a_torch" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert install._wants_nvidias_libraries("a_torch") == wants
