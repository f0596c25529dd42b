"""Compare the emulator's instructions with those of GPUs by golden vectors; test how these are made."""

import types
from pathlib import Path

import numpy as np
import pytest

from gpuconv.gpu import compiler, report
from tests.emulation import launcher, loader
from tests.golden import make_golden, vectors
from tests.golden.vectors import VECTORS
from tests.test_cuda import NVRTC

BY_KERNEL = {vector.kernel: vector for vector in VECTORS}
COMMITTED = [
    pytest.param(path, kernel, id=f"{path.stem}-{kernel}")
    for path in vectors.files()
    for kernel in vectors.read(path)[0]
] or [pytest.param(None, None, marks=pytest.mark.skip(reason="no GPU has made golden vectors yet"))]


def emulated(mode="checked"):
    """Return a function that launches kernels of primitives.cu on the CPU."""
    primitives = (loader.FOLDER / "primitives.hpp").read_text()
    text = (vectors.FOLDER / "primitives.cu").read_text()
    library = loader.library_of(
        f'#define __CUDA_ARCH__ 900\n#line 1 "primitives.hpp"\n{primitives}\n#line 1 "primitives.cu"\n{text}', mode
    )

    def launch(name, arguments):
        with launcher.using(mode=mode):
            launcher.run(library, name, 1, 32, arguments)

    return launch


@pytest.mark.emulated
@pytest.mark.parametrize("path, kernel", COMMITTED)
def test_the_emulator_computes_what_the_gpu_did(path, kernel):
    inputs, golden = vectors.read(path)[0][kernel]
    found = vectors.computed(BY_KERNEL[kernel], inputs, emulated())
    differ = vectors.differences(BY_KERNEL[kernel], found, golden)
    assert differ.size == 0, f"at {differ[:5]} of {golden.size}: {found[differ[:5]]} and not {golden[differ[:5]]}"


@pytest.mark.gpu
def test_the_gpu_at_hand_agrees_with_the_emulator():
    import cupy

    on_gpu, kernels, _ = make_golden.on_gpu(cupy)
    on_cpu = emulated()
    wrong = {}
    for kernel, (inputs, golden) in make_golden.made(on_gpu, kernels).items():
        differ = vectors.differences(BY_KERNEL[kernel], vectors.computed(BY_KERNEL[kernel], inputs, on_cpu), golden)
        if differ.size:
            wrong[kernel] = differ
    assert not wrong


def test_every_primitive_has_a_vector():
    assert {name for vector in VECTORS for name in vector.functions} == set(vectors.declared())
    assert set(vectors.unconfirmed()) <= set(vectors.declared())


@pytest.mark.emulated
def test_what_is_made_is_read_again_and_compared(tmp_path):
    """All steps run with the emulator instead of a GPU; a different result is detected."""
    launch = emulated()
    results = make_golden.made(launch, set(BY_KERNEL))
    assert set(results) == set(BY_KERNEL)
    vectors.write(tmp_path / "device.npz", results, {"device": "none", "driver": 1})
    again, about = vectors.read(tmp_path / "device.npz")
    assert about == {"device": "none", "driver": 1}
    assert set(again) == set(results)
    assert (tmp_path / "device.npz").stat().st_size < 1 << 20
    for kernel, (inputs, golden) in again.items():
        vector = BY_KERNEL[kernel]
        found = vectors.computed(vector, inputs, launch)
        assert vectors.differences(vector, found, golden).size == 0
        place = golden.size // 3
        other = golden.view(f"u{golden.itemsize}").copy()
        other[place] ^= 1
        assert list(vectors.differences(vector, found, other.view(golden.dtype))) == [place]


@pytest.mark.emulated
@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector.kernel)
def test_vectors_would_tell_a_wrong_instruction(vector):
    """Each result depends on its inputs: other inputs, or no launch, give another result."""
    launch = emulated("fast")
    inputs = vector.inputs()
    result = vectors.computed(vector, inputs, launch)
    assert vectors.differences(vector, result, vector.result()).size > result.size // 4
    for i in range(len(inputs)):
        changed = [np.roll(array, 1) if i == j else array for j, array in enumerate(inputs)]
        assert vectors.differences(vector, vectors.computed(vector, changed, launch), result).size > 0


@NVRTC
@pytest.mark.emulated
def test_the_program_takes_the_way_to_a_gpu(tmp_path, monkeypatch, capsys):
    """A fake CuPy runs the kernels on the CPU."""
    launch = emulated("fast")

    class RawModule:
        def __init__(self, path):
            assert Path(path).read_bytes().startswith(b"\x7fELF")

        def get_function(self, name):
            return lambda grid, block, given: launch(name, [getattr(array, "memory", array) for array in given])

    runtime = types.SimpleNamespace(
        getDeviceProperties=lambda device: {"name": b"Some GPU"},
        driverGetVersion=lambda: 13000,
        runtimeGetVersion=lambda: 12090,
    )
    device = types.SimpleNamespace(id=0, compute_capability="90")
    cuda = types.SimpleNamespace(Device=lambda: device, runtime=runtime)
    cupy = types.SimpleNamespace(RawModule=RawModule, asarray=OnGpu, cuda=cuda, __version__="14")
    monkeypatch.setattr(make_golden, "cupy_backend", lambda: types.SimpleNamespace(xp=cupy))
    monkeypatch.setattr("sys.argv", ["make_golden", str(tmp_path)])
    make_golden.main()
    results, about = vectors.read(tmp_path / "Some-GPU.npz")
    assert set(results) == set(BY_KERNEL)
    assert (about["device"], about["architecture"], about["driver"]) == ("Some GPU", "sm_90a", 13000)
    for kernel, (inputs, result) in make_golden.made(launch, set(BY_KERNEL)).items():
        assert vectors.differences(BY_KERNEL[kernel], results[kernel][1], result).size == 0
        assert [array.tobytes() for array in results[kernel][0]] == [array.tobytes() for array in inputs]
    assert f"{len(VECTORS)} of {len(VECTORS)} kernels" in capsys.readouterr().out


class OnGpu:
    """An array of the fake CuPy above."""

    def __init__(self, array):
        self.memory = array.copy()

    def get(self):
        return self.memory


def test_any_nan_equals_any_other_and_nothing_else():
    vector = BY_KERNEL["float_to_half"]
    nan, infinity = np.array([0x7E00, 0x7FFF, 0xFE01], np.uint16), np.array([0x7C00] * 3, np.uint16)
    assert vectors.differences(vector, nan, nan[::-1].copy()).size == 0
    assert vectors.differences(vector, nan, infinity).size == 3
    assert vectors.differences(
        BY_KERNEL["load_matrices_from_rows"], nan.astype(np.uint32), nan[::-1].astype(np.uint32)
    ).size


# The PTX instructions that the compiled functions must contain; NVRTC does not compile functions without a caller.
INSTRUCTIONS = {
    "sm_75": ("ldmatrix", ".trans"),
    "sm_80": ("cp.async.ca", "cp.async.cg", "wait_group", ".bf16.bf16", ".tf32", ".f64.f64"),
    "sm_90a": ("red.global.add.v4.f32", "red.global.add.v2.f32"),
}


@NVRTC
def test_every_primitive_compiles_where_it_is_offered():
    """For older architectures the unsupported primitives are omitted; the newest architecture supports all."""
    counts = {}
    for architecture in INSTRUCTIONS:
        _, log = compiler.compiled_text(make_golden.source(), "primitives.cu", architecture)
        counts[architecture] = len(report.parsed(log))
        ptx, _ = compiler.compiled_text(make_golden.source(), "primitives.cu", architecture.replace("sm_", "compute_"))
        for instructions in INSTRUCTIONS.values():
            for instruction in instructions:
                assert instruction.encode() in ptx
            if instructions is INSTRUCTIONS[architecture]:
                break
    assert counts == {"sm_75": 10, "sm_80": len(VECTORS), "sm_90a": len(VECTORS)}
