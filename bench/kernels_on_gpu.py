"""Times the CUDA kernels on a GPU, layer by layer: the scatter-add against its plain twin, the gather and im2col.

    python bench/kernels_on_gpu.py [--batch 32] [--seconds 0.2] [--case WORDS] [--json FILE]

Every result is verified against a float64 reference before it is timed, between two events on the stream; a wrong one
is marked and not timed. Where a layer is so small that the GPU waits for launches, the time is the host's. float32
arrays in channels_first and channels_last memory. Prints a Markdown table of medians in milliseconds and of two
ratios: plain twin over scatter, and im2col over the better of scatter and direct.
"""

import argparse
import datetime
import json
import sys
from pathlib import Path

import numpy
from rich.progress import track

import gpuconv
from gpuconv.algorithms import scatter_plain
from gpuconv.backend import BackendError, config, cupy_backend
from gpuconv.benchmark.layers import GPU_BATCH, LAYERS
from gpuconv.benchmark.run import commit, deviation, prepared
from gpuconv.benchmark.timing import measure
from gpuconv.choose import MODULES
from gpuconv.geometry import DIRECTIONS

ALGORITHMS = ("im2col", "direct", "scatter_plain", "scatter")
MEMORIES = ("channels_first", "channels_last")


def channels_last_memory(array):
    """The same channels_first array with its channels innermost in memory."""
    axes = (0, *range(2, array.ndim), 1)
    back = (0, array.ndim - 1, *range(1, array.ndim - 1))
    return array.transpose(axes).copy().transpose(back)


def rows_of(layer, memory, batch, seconds, xp):
    """What each algorithm takes for each direction of a layer."""
    geometry = layer.geometry(batch)
    rng = numpy.random.default_rng(0)
    x, w, dy = (
        xp.asarray(rng.standard_normal(shape, numpy.float32))
        for shape in (geometry.x_shape, geometry.w_shape, geometry.y_shape)
    )
    if memory == "channels_last":
        x, dy = channels_last_memory(x), channels_last_memory(dy)
    for direction in DIRECTIONS:
        row = {"case": layer.name, "memory": memory, "direction": direction, "samples": {}, "of_bound": {}}
        for algorithm in ALGORITHMS:
            if algorithm.startswith("scatter") and direction == "forward":
                continue
            operands, call = prepared(direction, geometry, x, w, dy, algorithm=algorithm)
            _, of_bound = deviation(call(), direction, *operands, geometry, x.dtype, xp)
            row["of_bound"][algorithm] = of_bound
            row["samples"][algorithm] = measure(call, xp, seconds).samples if of_bound <= 1 else ()
        yield row


def medians(row):
    return {name: float(numpy.median(samples)) * 1e3 for name, samples in row["samples"].items() if samples}


def table(rows):
    """The rows in Markdown."""
    lines = [
        "| layer | memory | direction | im2col | direct | plain scatter | scatter | plain / scatter | im2col / best |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        ms = medians(row)
        cells = [f"{ms[name]:.3f}" if name in ms else "WRONG" if name in row["samples"] else "" for name in ALGORITHMS]
        kernels = [ms[name] for name in ("direct", "scatter") if name in ms]
        privatised = f"{ms['scatter_plain'] / ms['scatter']:.1f}" if {"scatter_plain", "scatter"} <= ms.keys() else ""
        against = f"{ms['im2col'] / min(kernels):.2f}" if kernels and "im2col" in ms else ""
        lines.append(f"| {' | '.join([row['case'], row['memory'], row['direction'], *cells, privatised, against])} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=GPU_BATCH)
    parser.add_argument(
        "--seconds", type=float, default=0.2, help="for each algorithm, at least 5 and at most 50 calls"
    )
    parser.add_argument("--case", default="", help="only layers whose name has these words")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    try:
        xp = cupy_backend().xp
    except BackendError as error:
        sys.exit(f"this needs a GPU: {error}")
    MODULES["scatter_plain"] = scatter_plain
    layers = [layer for layer in LAYERS if options.case in layer.name]
    rows = []
    for layer in track(layers, description="layers", transient=True):
        for memory in MEMORIES:
            rows += rows_of(layer, memory, options.batch, options.seconds, xp)
            gpuconv.clear_cache()
            xp.get_default_memory_pool().free_all_blocks()
    machine = config()
    print(f"{machine['CuPy']}, commit {commit()}, float32, N={options.batch}\n")
    print(table(rows))
    if options.json:
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        document = {"machine": machine, "date": date, "commit": commit(), "batch": options.batch, "rows": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    if any(bound > 1 for row in rows for bound in row["of_bound"].values()):
        sys.exit("some results are wrong: see the table")


if __name__ == "__main__":
    main()
