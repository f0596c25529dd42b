"""Compares gpuconv's NumPy backend with PyTorch on the CPU on ResNet-50's 3x3 layers at N=8 in float32.

    python bench/against_torch.py [--torch-python PYTHON] [--rounds 5] [--json FILE]

Each side runs in a process of its own and they take turns, so that neither's idle threads slow the other; PyTorch is
timed in both memory formats and its better one counts. Of every layer, direction and side the median of all samples is
printed, and the ratio of gpuconv's to PyTorch's. --torch-python names a Python that has PyTorch (default: this one).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

LAYERS = {
    # name: (channels in, out, extent, stride); kernels 3x3, padding 1, batch 8
    "64 @56": (64, 64, 56, 1),
    "128 s2 @56": (128, 128, 56, 2),
    "128 @28": (128, 128, 28, 1),
    "256 s2 @28": (256, 256, 28, 2),
    "256 @14": (256, 256, 14, 1),
    "512 s2 @14": (512, 512, 14, 2),
    "512 @7": (512, 512, 7, 1),
}
DIRECTIONS = ("forward", "data_grad", "weight_grad")
SIDES = ("gpuconv channels_first", "gpuconv channels_last", "torch channels_first", "torch channels_last")
BATCH = 8
TURN_SECONDS = 0.15


def gpuconv_calls(name, channels_last):
    import numpy as np

    import gpuconv

    channels, filters, extent, stride = LAYERS[name]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCH, channels, extent, extent), np.float32)
    w = rng.standard_normal((filters, channels, 3, 3), np.float32)
    settings = {"stride": stride, "padding": 1}
    if channels_last:
        x, w = np.moveaxis(x, 1, -1).copy(), w.transpose(2, 3, 1, 0).copy()
        settings["layout"] = "channels_last"
    dy = np.ones_like(gpuconv.conv(x, w, **settings))
    return {
        "forward": lambda: gpuconv.conv(x, w, **settings),
        "data_grad": lambda: gpuconv.conv_data_grad(dy, w, x.shape, **settings),
        "weight_grad": lambda: gpuconv.conv_weight_grad(dy, x, w.shape, **settings),
    }


def torch_calls(name, channels_last):
    import torch

    channels, filters, extent, stride = LAYERS[name]
    memory = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(BATCH, channels, extent, extent).to(memory_format=memory)
    w = torch.randn(filters, channels, 3, 3).to(memory_format=memory)
    settings = [stride] * 2, [1, 1], [1, 1], False, [0, 0], 1

    def backward(*mask):
        return torch.ops.aten.convolution_backward(dy, x, w, None, *settings, mask)

    dy = torch.randn_like(torch.conv2d(x, w, stride=stride, padding=1))
    return {
        "forward": lambda: torch.conv2d(x, w, stride=stride, padding=1),
        "data_grad": lambda: backward(True, False, False),
        "weight_grad": lambda: backward(False, True, False),
    }


def work(side):
    """A worker: reads "layer/direction" lines, answers each with samples in seconds."""
    library, memory = side.split()
    make = gpuconv_calls if library == "gpuconv" else torch_calls
    made = {}
    for line in sys.stdin:
        name, direction = line.strip().split("/")
        if name not in made:
            made.clear()
            made[name] = make(name, memory == "channels_last")
        call = made[name][direction]
        call()
        samples, end = [], time.perf_counter() + TURN_SECONDS
        while len(samples) < 3 or time.perf_counter() < end:
            start = time.perf_counter()
            call()
            samples.append(time.perf_counter() - start)
        print(json.dumps(samples), flush=True)


def versions(python, library):
    answer = subprocess.run(
        [python, "-c", f"import {library}; print({library}.__version__)"], capture_output=True, text=True
    )
    if answer.returncode:
        sys.exit(f"{python} cannot import {library}: install it there, or name another Python")
    return answer.stdout.strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return

    pythons = {side: options.torch_python if side.startswith("torch") else sys.executable for side in SIDES}
    found = {"gpuconv": versions(sys.executable, "gpuconv"), "torch": versions(options.torch_python, "torch")}
    workers = {
        side: subprocess.Popen(
            [python, __file__, "--worker", side], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for side, python in pythons.items()
    }
    from rich.progress import track

    from gpuconv.backend import cpu_name

    samples = {}
    for name in track(LAYERS, description="layers", transient=True):
        for _ in range(options.rounds):
            for direction in DIRECTIONS:
                for side, worker in workers.items():
                    worker.stdin.write(f"{name}/{direction}\n")
                    worker.stdin.flush()
                    samples.setdefault((name, direction, side), []).extend(json.loads(worker.stdout.readline()))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()

    print(
        f"gpuconv {found['gpuconv']} on NumPy against PyTorch {found['torch']}, {cpu_name()}, float32, N={BATCH}, 3x3"
    )
    print("milliseconds, median; ratio = gpuconv / the better PyTorch (below 1: gpuconv is faster)")
    print(
        f"{'layer':<12}{'direction':<13}"
        + "".join(f"{side:>24}" for side in SIDES)
        + f"{'ratio first':>13}{'ratio last':>12}"
    )
    rows = []
    for name in LAYERS:
        for direction in DIRECTIONS:
            medians = [statistics.median(samples[name, direction, side]) * 1e3 for side in SIDES]
            ratios = [mine / min(medians[2:]) for mine in medians[:2]]
            print(
                f"{name:<12}{direction:<13}"
                + "".join(f"{m:>24.2f}" for m in medians)
                + f"{ratios[0]:>13.2f}{ratios[1]:>12.2f}"
            )
            rows.append(
                {"layer": name, "direction": direction, "ms": dict(zip(SIDES, medians, strict=True)), "ratio": ratios}
            )
    print(f"largest ratio {max(max(row['ratio']) for row in rows):.2f}")
    if options.json:
        options.json.write_text(json.dumps({"cpu": cpu_name(), "versions": found, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
