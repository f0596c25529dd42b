"""Measure suites on a CPU together with PyTorch, several times each, and keep the median run.

    python bench/cpu_campaign.py OUT

Results are written to OUT/<device>-<date>-<commit>/SUITE.json; such a folder belongs in bench/results. The median run
is the one with the median geometric mean of all ratios. The kernels of OpenBLAS are part of the name of the device:
with those for CPUs without AVX-512, which OPENBLAS_CORETYPE=Haswell selects, it counts as another device. A suite whose
file exists is skipped, so that an interrupted campaign can be resumed. ``textbook`` is the layer on which the peer
loops is measured.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from gpuconv.benchmark import compare, report, results

SUITES = (
    *("resnet50", "vgg16", "audio1d", "unet3d", "transposed", "dilated", "large", "mobilenet", "convnext", "textbook"),
    *("quick", "stems", "grouped", "replknet", "patch", "jsense", "deepbench", "small", "tiny", "course"),
    "videovae",
)
IN_FLOAT64 = "textbook", "quick", "resnet50", "course"  # also
TEXTBOOK = ["--case", "n=8 c=16 h=32 w=32 k=32 r=3 s=3 pad=1", "--peer", "loops,scipy,torch"]


def measured(suite, seconds):
    """Run a suite in a separate process and return the results."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.json"
        words = TEXTBOOK if suite == "textbook" else [suite, "--peer", "torch"]
        options = ["--layout", "channels_last,channels_first", "--backend", "numpy", "--seconds", str(seconds)]
        if suite in IN_FLOAT64:
            options += ["--dtype", "float32,float64"]
        if suite == "small":
            options += ["--batch", "1,8"]
        subprocess.run(
            [sys.executable, "-m", "gpuconv", "bench", *words, *options, "--json", str(file)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return results.read_json(file)


def overall(run):
    return compare.geometric_mean(ratio.value for ratio in compare.ratios(run.rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--suite", nargs="+", default=SUITES, metavar="NAME")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="of each suite (default 3)")
    parser.add_argument("--seconds", type=float, default=0.1, metavar="S", help="of each row (default 0.1)")
    options = parser.parse_args()
    commit, device = (results.commit() or "wheel")[:7], results.machine()["CPU"]
    for suite in options.suite:
        found = list(options.out.glob(f"*-{commit}/{suite}.json"))
        if found:
            print(f"{suite}: {found[0]} is there")
            continue
        runs = sorted((measured(suite, options.seconds) for _ in range(options.runs)), key=overall)
        kept = runs[len(runs) // 2]
        name = re.sub("[^0-9A-Za-z]+", "-", device)
        folder = options.out / f"{name}-{kept.date[:10]}-{commit}"
        folder.mkdir(parents=True, exist_ok=True)
        results.write_json(folder / f"{suite}.json", kept)
        print(f"{suite}: {', '.join(f'{overall(run):.3f}' for run in runs)}, the median is kept")
        print(report.means(compare.ratios(kept.rows)).markdown(), flush=True)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).parent.parent))
    sys.exit(main())
