"""The command line: output, files and exit status, also from an installed wheel."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

import gpuconv
from gpuconv.benchmark import check, limits
from gpuconv.cli import main
from gpuconv.geometry import DIRECTIONS
from gpuconv.gpu import kernels_folder, scatter

ROOT = Path(__file__).parent.parent
QUICK = ["bench", "--case", "n=1 c=4 h=9 w=9 k=4 r=3 s=3", "--seconds", "0"]


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setenv("GPUCONV_BACKEND", "numpy")
    monkeypatch.setitem(limits.EXTENT, "numpy", 64)  # makes the measurement of limits fast
    monkeypatch.setitem(limits.COPY_BYTES, "numpy", 2**20)


@pytest.fixture
def few_geometries(monkeypatch):
    """Use the first geometry, one with stride 2, and the depthwise one; .ci/run checks all geometries."""
    monkeypatch.setattr(check, "GEOMETRIES", [check.GEOMETRIES[number] for number in (0, 2, 7)])


def test_check_holds_every_algorithm_against_the_reference(few_geometries, capsys):
    assert main(["check"]) == 0
    printed = capsys.readouterr().out
    for algorithm in ("im2col", "winograd", "fft", "depthwise", "scatter"):
        for direction in DIRECTIONS:
            assert f"numpy  {algorithm:<8} {direction:<12} float32     ok" in printed
    assert "implicit_gemm" not in printed  # it needs kernels
    assert " 0 wrong" in printed


@pytest.mark.called_once("the library is broken for some of its calls")
@pytest.mark.parametrize("wrong_value", [1.0, np.nan])
def test_check_answers_1_where_a_result_is_wrong(wrong_value, few_geometries, monkeypatch, capsys):
    original = scatter.weight_grad

    def wrong(dy, x, dw, geometry, planner):
        original(dy, x, dw, geometry, planner)
        first = dw.view[(0,) * dw.view.ndim]
        planner.call(planner.xp.add, first, wrong_value, out=first)

    monkeypatch.setattr(scatter, "weight_grad", wrong)
    assert main(["check"]) == 1
    printed = capsys.readouterr().out
    assert "numpy  scatter  weight_grad  float32     WRONG" in printed
    assert "numpy  scatter  forward      float32     ok" in printed


def test_info_and_version(capsys):
    assert main(["info"]) == 0
    assert "numpy (from GPUCONV_BACKEND)" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"gpuconv {gpuconv.__version__}\n"


def test_explain_says_which_algorithm_and_why_not_the_others(capsys):
    assert main(["explain", "8,64,56,56", "64,64,3,3", "--padding", "1", "--direction", "forward"]) == 0
    printed = capsys.readouterr().out
    assert "y (8, 64, 56, 56), float32 on numpy" in printed
    assert "uses winograd: " in printed
    assert "not scatter: " in printed
    assert main(["explain", "(1, 4, 9)", "4,1,3", "--groups", "4", "--padding", "2:0", "--stride", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("uses ") == 3
    assert printed.count(" ms on one core (estimate), the smallest") == 3
    assert "padding ((2, 0),)" in printed


@pytest.mark.parametrize(
    "arguments, phrase",
    [
        ([], "the following arguments are required: COMMAND"),
        (["benhc"], "invalid choice: 'benhc'"),
        (["bench", "--cases"], "unrecognized arguments: --cases"),
        (["bench", "resnet5"], "there is no suite 'resnet5' (nearest: resnet50, "),
        (["bench", "resnet50", "--case", "5x5"], "no layer of resnet50 has '5x5' in its name (nearest: "),
        (["bench", "--case", "n=1 c=3 hh=9"], "a case must not have 'hh' (nearest: h"),
        (["bench", "--case", "n=1 c=3 h=9 w=9 k=4 r=3"], "a case needs s too"),
        (["bench", "--case", "n=1 c=3 h=9 w=9 k=4 r=3 s=3 p=8"], "p must be 7 according to the other words, not 8"),
        (["bench", "--case", "c=3 w=9 k=4 s=13"], "y would be empty on spatial axis 0"),
        (["bench", "--case", "c=3 w=9 k=4 s=3 pad=some"], "pad must be ints, LOW:HIGH or one of valid, same"),
        (["bench", "--peer", "pytorch"], "--peer must be a known name, not 'pytorch' (nearest: torch)"),
        (["bench", "--peer", "cupyx"], "the peer cupyx computes on cupy alone, not on numpy"),
        (["bench", "--algorithm", "im2cool"], "--algorithm must be a known name, not 'im2cool' (nearest: im2col)"),
        (["bench", "--dtype", "float23"], "--dtype must be a known name, not 'float23' (nearest: float32"),
        (["bench", "--direction", "backward"], "--direction must be a known name, not 'backward' (nearest: forward"),
        (
            ["bench", "--layout", "channels_lst"],
            "--layout must be a known name, not 'channels_lst' (nearest: channels_last",
        ),
        (["bench", "--batch", "0"], "--batch must be an int of at least 1, got '0'"),
        (["bench", "--batch", "x"], "--batch must be an int of at least 1, got 'x'"),
        (["bench", "--seconds", "-1"], "must be a number from 0 to 3600, got '-1'"),
        (["bench", "--seconds", "soon"], "must be a number from 0 to 3600, got 'soon'"),
        (["bench", "--cold", "--warm"], "not allowed with argument --cold"),
        (["bench", "--json", "/nowhere/b.json"], "cannot write /nowhere/b.json: No such file or directory"),
        (["bench", "--csv", "/nowhere/b.csv"], "cannot write /nowhere/b.csv: No such file or directory"),
        (["bench", "--json", "/dev/null"], "cannot write /dev/null: it is not a regular file"),
        (["bench", "--json", "b", "--csv", "b"], "each file is written by one option: b, b"),
        (["bench", "--case", ""], "a case must be part of a layer's name, or NAME=VALUE words; got ''"),
        (["bench", "--case", "c=3 w=9 k=4 s=3 transposed=2"], "transposed must be 0 or 1, got '2'"),
        (["bench", "--plot", "b.xyz"], "cannot plot to b.xyz: the name must end in one of .eps"),
        (["bench", "compare", "a.json", "b.json"], "cannot read a.json: No such file or directory"),
        (["bench", "compare", "a", "b", "--fail-slower", "much"], "must be a percentage such as 5%, got 'much'"),
        (["explain", "8,64", "a,b"], "must be ints with commas between them, got 'a,b'"),
        (["explain", "8,3,9,9", "4,2,3,3"], "x_shape has 3 channels but w_shape expects 2"),
        (["explain", "8,3,9,9", "4,3,3,3", "--padding", "1:2:3"], "must be LOW:HIGH for every axis"),
        (["explain", "8,3,9,9", "4,3,3,3", "--padding", "everywhere"], "must be ints with commas"),
    ],
)
def test_bad_options_get_one_line_and_status_2(arguments, phrase, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    answer = capsys.readouterr()
    assert status == 2
    assert phrase in answer.err
    assert answer.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_bad_variable_gets_one_line_and_status_2(monkeypatch, capsys):
    monkeypatch.setenv("GPUCONV_BACKEND", "tpu")
    assert main(QUICK) == 2
    assert "GPUCONV_BACKEND must be one of auto, numpy, cupy; got 'tpu'" in capsys.readouterr().err


def test_missing_extras_are_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(QUICK) == 2
    assert "needs rich and matplotlib: pip install 'gpuconv[bench]'" in capsys.readouterr().err


def test_kernels_are_found_from_the_checkout():
    assert (kernels_folder() / "README.md").is_file()


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """A wheel made from an sdist, which was made from the checkout."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(folder), "-t"]
    subprocess.run([*build, "sdist"], cwd=ROOT, check=True, capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(sdist, folder / "unpacked")
    (unpacked,) = (folder / "unpacked").iterdir()
    subprocess.run([*build, "wheel"], cwd=unpacked, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def test_the_distributions_hold_what_they_should(distributions):
    sdist, wheel = distributions
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"kernels/README.md", "tests/test_cli.py", "bench/train_digits.py", "LICENSE", "CHANGELOG.md"} <= inside
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"gpuconv/kernels/README.md", "gpuconv/py.typed", "gpuconv/cpu/im2col.py"} <= names
    assert not any(name.startswith(("tests/", "bench/", "kernels/", "gpuconv/guide/")) for name in names)


def test_bench_runs_from_a_wheel_outside_the_checkout(distributions, tmp_path):
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, str(distributions[1])], check=True)
    environment = {**os.environ, "PYTHONPATH": str(site), "GPUCONV_BACKEND": "numpy"}

    def run(*command):
        return subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout

    where = run(sys.executable, "-c", "import gpuconv, gpuconv.gpu as c; print(gpuconv.__file__, c.kernels_folder())")
    assert where.split() == [str(site / "gpuconv" / "__init__.py"), str(site / "gpuconv" / "kernels")]
    script = str(site / "bin" / "gpuconv")
    assert "weight_grad" in run(sys.executable, script, *QUICK, "--json", "b.json")
    assert "resnet50: 23 layers" in run(sys.executable, script, "bench", "--list")
    assert json.loads((tmp_path / "b.json").read_text())["commit"] is None


def test_the_documented_commands_are_the_ones_that_ci_runs():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    for command in ('pip install ".[bench]" && gpuconv bench', 'pip install -e ".[test]" && pytest'):
        assert command in readme
        for part in command.split(" && "):
            assert part in ci
