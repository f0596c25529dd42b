"""Compiled kernels: no spills, no more registers than recorded; and the report."""

import itertools
import json
from pathlib import Path

import pytest

import gpuconv
from gpuconv.cli import main
from gpuconv.geometry import DIRECTIONS
from gpuconv.gpu import compiler, kernels_folder, occupancy, report, sass
from tests import tiers
from tests.test_cuda import NVRTC

RECORDED = Path(__file__).parents[1] / "bench" / "kernels.json"


def recorded():
    return {
        report.CompiledKernel(**row).variant: report.CompiledKernel(**row) for row in json.loads(RECORDED.read_text())
    }


@NVRTC
@pytest.mark.parametrize("architecture", occupancy.ARCHITECTURES)
def test_kernels_neither_spill_nor_take_more_registers_than_recorded(architecture):
    """Each module is compiled for one architecture; ``gpuconv kernels`` compiles all modules for all architectures."""
    if architecture not in report.known(None):
        pytest.skip("this NVRTC does not know it")
    turn, turns = occupancy.ARCHITECTURES.index(architecture), len(occupancy.ARCHITECTURES)
    chosen = list(report.modules())[turn :: turns if tiers.full else 16 * turns]
    chosen = [module for module in chosen if report.is_meant_for(module, architecture)]
    assert chosen
    before = recorded()
    rows = list(report.rows(architecture, chosen))
    assert len(rows) >= len(chosen)
    for row in rows:
        assert isinstance(row, report.CompiledKernel), str(row)
        assert (row.spill_stores, row.spill_loads) == (0, 0), row
        ceiling = before[row.variant]
        if row.nvrtc == ceiling.nvrtc:
            assert row.registers <= ceiling.registers, (
                f"{row.kernel} takes {row.registers} registers, and {ceiling.registers} are recorded ({row}). To accept"
                " that: gpuconv kernels --sass --json bench/kernels.json, and say in the commit why it is worth them"
            )


def test_every_kernel_of_every_dtype_is_recorded():
    """The record has all architectures, tiles and both widths of offsets, and no obsolete kernel."""
    expected = {
        (kernel, architecture, dict(module.types)["First"], 64 if module.wide else 32, *dict(module.constants).values())
        for (module, kernels), architecture in itertools.product(report.modules().items(), occupancy.ARCHITECTURES)
        if report.is_meant_for(module, architecture)
        for kernel in kernels
    }
    found = {(*row.variant, row.threads) for row in recorded().values()}
    assert found == expected, "gpuconv kernels --sass --json bench/kernels.json writes the file anew"


def test_the_table_of_instructions_is_that_of_the_record():
    tile = report.EXAMPLE
    wanted = {"TILE_ROWS": tile.rows, "TILE_COLUMNS": tile.columns, "DEPTH": 32, "LEFT_VECTOR": 8, "RIGHT_VECTOR": 8}
    for direction in DIRECTIONS:
        (row,) = (
            row
            for row in recorded().values()
            if (row.kernel, row.arch, row.dtype) == (f"implicit_gemm_{direction}", "sm_80", "float16")
            and row.index_bits == 32
            and wanted.items() <= row.tile.items()
        )
        counts = (row.sass[name] for name in ("prologue", "loop", "epilogue", "divisions"))
        cells = " | ".join(map(str, (direction, *counts, row.registers)))
        assert f"| {cells} |" in (kernels_folder() / "README.md").read_text()


def test_the_list_of_convolutions_reaches_every_kernel_and_tile():
    from gpuconv.gpu import scatter
    from tests.profile import KERNELS

    kernels = {kernel for kernels in report.modules().values() for kernel in kernels}
    assert kernels == set(KERNELS)
    tiles = {module.constants for module in report.modules() if module.stem == "scatter"}
    assert tiles == {tuple(tile._asdict().items()) for tile in (scatter.ONE, scatter.FEW, scatter.MANY)}
    assert max(size for kernels in report.modules().values() for size in kernels.values()) > 36 << 10


LOG = """ptxas info    : 68 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_90a'
ptxas info    : Function properties for first
ptxas         .     40 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
ptxas info    : Compile time = 60.377 ms
ptxas info    : Compiling entry function 'second' for 'sm_90a'
ptxas info    : Function properties for second
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 85 registers, used 1 barriers, 6976 bytes smem, 384 bytes cmem[0]
"""


def test_the_compiler_s_report_is_read():
    assert report.parsed(LOG) == {
        "first": {"spill_stores": 12, "spill_loads": 16, "registers": 255, "static": 0},
        "second": {"spill_stores": 0, "spill_loads": 0, "registers": 85, "static": 6976},
    }
    with pytest.raises(RuntimeError, match="cannot read"):
        report.parsed(LOG.replace("Used 85", "Has 85"))


# Blocks per multiprocessor according to cuda_occupancy.h of CUDA 13.0: registers, threads, bytes of shared memory.
BLOCKS = {
    "sm_75": {(24, 128, 0): 8, (96, 128, 4096): 5, (128, 256, 20000): 2, (255, 64, 48000): 1},
    "sm_80": {(24, 64, 0): 32, (96, 128, 4096): 5, (64, 256, 20000): 4, (255, 64, 48000): 3},
    "sm_86": {(24, 64, 0): 16, (96, 128, 4096): 5, (64, 128, 20000): 4, (128, 128, 48000): 2},
    "sm_87": {(24, 64, 0): 16, (96, 128, 4096): 5, (64, 128, 20000): 7, (128, 128, 48000): 3},
    "sm_89": {(24, 64, 0): 24, (96, 128, 4096): 5, (64, 128, 20000): 4, (128, 128, 48000): 2},
    "sm_90a": {(24, 64, 0): 32, (96, 128, 4096): 5, (64, 128, 20000): 8, (168, 128, 48000): 3},
    "sm_100a": {(24, 64, 0): 32, (96, 128, 4096): 5, (64, 128, 20000): 8, (168, 128, 48000): 3},
    "sm_120": {(24, 64, 0): 24, (96, 128, 4096): 5, (64, 128, 20000): 4, (128, 128, 48000): 2},
}


@pytest.mark.parametrize("architecture", BLOCKS)
def test_occupancy_is_that_of_cuda_s_own_calculator(architecture):
    assert tuple(BLOCKS) == occupancy.ARCHITECTURES
    found = {case: occupancy.blocks(architecture, *case) for case in BLOCKS[architecture]}
    assert found == BLOCKS[architecture]


def test_occupancy_of_whole_and_of_odd_blocks():
    assert repr(occupancy.blocks("sm_90a", registers=16, threads=160, shared_bytes=0)) == "12"
    assert occupancy.occupancy("sm_90a", registers=32, threads=1024, shared_bytes=0) == 1.0
    assert occupancy.occupancy("sm_90a", registers=32, threads=1023, shared_bytes=0) == 1.0


@pytest.mark.parametrize("wide", [False, True])
def test_a_row_for_each_kernel_that_is_launched(wide, monkeypatch):
    module = next(module for module in report.modules() if module.stem == "direct")._replace(wide=wide)
    monkeypatch.setattr(compiler, "compiled", lambda module, architecture: (b"", LOG))
    monkeypatch.setattr(compiler, "version", lambda: (12, 9))
    monkeypatch.setattr(report.time, "perf_counter", iter([100.0, 102.5]).__next__)
    (row,) = report._rows_of(module, "sm_90a", {"second": 100})
    assert (row.kernel, row.index_bits, row.compile_seconds) == ("second", 64 if wide else 32, 2.5)
    assert row.dynamic_shared_bytes == 100
    assert f"{64 if wide else 32}-bit Index" in str(module)


# ------------------------------------------------------------------------------------------------- the command


ROW = report.CompiledKernel("k", "sm_80", "float32", 32, {"WIDTH": 4}, 128, 64, 0, 0, 4096, 4096, 0, 1.0, 0.25, "12.9")


@pytest.fixture
def compiled(monkeypatch):
    """The rows that the command receives instead of compiling."""
    rows = []
    monkeypatch.setattr(
        report, "rows", lambda architecture, **_: [r for r in rows if getattr(r, "arch", "sm_80") == architecture]
    )
    monkeypatch.setattr(report, "known", lambda asked: list(asked or ("sm_80", "sm_90a")))
    monkeypatch.setattr(compiler, "version", lambda: (12, 9))
    return rows


def test_the_command_prints_ranges_and_writes_every_row(compiled, tmp_path, capsys):
    compiled += [ROW, ROW._replace(dtype="float64", registers=90, occupancy=0.25), ROW._replace(arch="sm_90a")]
    assert main(["kernels", "--json", str(tmp_path / "kernels.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "NVRTC 12.9"
    assert [line.split() for line in lines[3:]] == [
        ["k", "sm_80", "2", "64-90", "0", "4.0", "25-100", "%", "<=", "0.2", "s"],
        ["k", "sm_90a", "1", "64", "0", "4.0", "100", "%", "<=", "0.2", "s"],
    ]
    written = json.loads((tmp_path / "kernels.json").read_text())
    assert [report.CompiledKernel(**row) for row in written] == compiled
    assert {"kernel", "arch", "registers", "spill_stores", "spill_loads", "shared_bytes", "occupancy"} <= set(
        written[0]
    )


def test_instructions_are_counted_on_request(compiled, capsys, monkeypatch):
    first, second = (sass.Counts(prologue, 221, 900, 32, 13)._asdict() for prologue in (700, 750))
    compiled += [ROW._replace(sass=first), ROW._replace(sass=second), ROW._replace(kernel="other")]
    monkeypatch.setattr(sass, "nvdisasm", lambda: "/bin/true")
    assert main(["kernels", "--arch", "sm_80", "--sass"]) == 0
    expected = "k sm_80 float32: prologue 700-750, loop 221, epilogue 900, products 32, divisions 13"
    assert capsys.readouterr().out.splitlines()[-1] == expected
    monkeypatch.setattr(sass, "nvdisasm", lambda: None)
    assert main(["kernels", "--sass"]) == 2
    assert "--sass needs nvdisasm: pip install nvidia-cuda-nvdisasm" in capsys.readouterr().err


@pytest.mark.parametrize(
    "row, words",
    [
        (ROW._replace(spill_stores=4), "k spills on sm_80"),
        (compiler.CompileError(next(iter(report.modules())), "sm_80", "error: it is wrong"), "error: it is wrong"),
    ],
)
def test_spills_and_compile_errors_end_with_status_1(row, words, compiled, capsys):
    compiled.append(row)
    assert main(["kernels", "--arch", "sm_80"]) == 1
    assert words in capsys.readouterr().err


@NVRTC
@pytest.mark.parametrize("arch", ["sm_90", "sm_80,nonsense", "80", ""])
def test_an_unknown_architecture_is_refused(arch, capsys):
    assert main(["kernels", "--arch", arch]) == 2
    assert "--arch must be one of sm_75, sm_80, " in capsys.readouterr().err


def test_a_missing_compiler_ends_with_status_2_and_the_extra(monkeypatch, capsys):
    def missing():
        raise gpuconv.BackendError("no NVRTC: pip install 'gpuconv[cuda12]'")

    monkeypatch.setattr(compiler, "nvrtc", missing)
    assert main(["kernels"]) == 2
    assert "gpuconv[cuda12]" in capsys.readouterr().err


@NVRTC
def test_one_module_is_compiled_and_reported():
    (module, *_) = (m for m in report.modules() if dict(m.types)["First"] == "float32" and m.stem == "direct")
    rows = list(report.rows("sm_80", [module]))
    assert {row.kernel for row in rows} == set(report.modules()[module])
    for row in rows:
        assert (row.arch, row.dtype, row.threads) == ("sm_80", "float32", 128)
        assert 16 <= row.registers <= 255
        assert 0 < row.occupancy <= 1
        assert row.compile_seconds > 0
        assert row.shared_bytes == row.static_shared_bytes + row.dynamic_shared_bytes
