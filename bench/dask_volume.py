"""Filter a volume on disk that exceeds the memory of the workers, and differentiate the filters, by gpuconv.dask.

    python bench/dask_volume.py [--extent N] [--memory MIB] [--plot FILE] [--markdown FILE]

A float32 volume of N x N x N voxels (default 800) in a Zarr store is convolved with two kernels of 5x5x5 (forward: y is
stored). Then the gradients of the sum of y^2 / 2 are computed from the stored y (backward: dx is stored, dw returned).
One worker process does this, and two, each on a core of its own and with a limit of its memory (default 900 MiB). A
smaller volume in memory is compared and timed with the same calls on whole arrays, on one thread too. The script prints
a table and draws the memory of the workers over time; its exit status is 1 if a result is wrong.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

os.environ.update(GPUCONV_NUM_THREADS="1", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")  # of the workers, too

import dask
import dask.array as da
import numpy as np
from distributed import Client, LocalCluster, progress
from distributed.diagnostics import MemorySampler
from matplotlib.figure import Figure

import gpuconv
import gpuconv.dask
from gpuconv.arrays import NUMPY
from gpuconv.config import build
from gpuconv.dask.results import halos
from gpuconv.geometry import Geometry

KERNELS = np.random.default_rng(0).standard_normal((2, 1, 5, 5, 5)).astype(np.float32)
CHUNK, PADDING = 160, 2
IN_MEMORY, TURNS = 320, 3  # the extent of the volume that is compared with whole arrays
DIRECTIONS = "forward", "backward"


class Row(NamedTuple):
    """The costs of a direction with a number of workers."""

    workers: int
    direction: str
    seconds: float
    halo: float  # bytes read from other chunks for each byte of the result
    tasks: int
    peak: float  # MiB of the worker that took most


def store(extent, folder):
    """Store a volume of random numbers, one chunk at a time."""
    chunks = (1, *(CHUNK,) * 3)
    volume = da.random.default_rng(0).standard_normal((1, *(extent,) * 3), chunks=chunks, dtype=np.float32)
    written(volume, folder).compute(scheduler="synchronous")


def written(array, folder):
    """Return the task that stores an array, uncompressed, as random numbers cannot be compressed."""
    return array.to_zarr(str(folder), compute=False, mode="w", compressors=None)


def halo_of(extent, direction):
    """Return the bytes that are read from other chunks for each byte of the result."""
    geometry = Geometry.infer((1, *(extent,) * 3), KERNELS.shape, padding=PADDING)
    chunks = da.core.normalize_chunks((CHUNK,) * 3, (extent,) * 3)
    return halos(chunks, geometry, "forward" if direction == "forward" else "data_grad")


def computed(direction, folder):
    """Return the tasks of a direction, from disk to disk."""
    x = da.from_zarr(str(folder / "x"))
    if direction == "forward":
        return [written(gpuconv.dask.conv(x, KERNELS, padding=PADDING), folder / "y")]
    y = da.from_zarr(str(folder / "y"))
    dx, dw, _ = gpuconv.dask.conv_backward(y, x, KERNELS, padding=PADDING, needs=("dx", "dw"))
    return [written(dx, folder / "dx"), dw]


def memory():
    """Return the largest memory of this process so far, in MiB (on Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def prepare(cores, dask_worker):
    """Let all threads of a worker run on its core only, and compile the kernels before anything is timed."""
    core = cores[dask_worker.name]
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {core})
    x = np.ones((1, 16, 16, 16), np.float32)
    gpuconv.conv_backward(gpuconv.conv(x, KERNELS, padding=PADDING), x, KERNELS, padding=PADDING)


def measured(workers, extent, limit, folder):
    """Return the rows of a number of workers, and their memory over time."""
    rows, sampler = [], MemorySampler()
    with (
        LocalCluster(
            n_workers=workers, threads_per_worker=1, memory_limit=f"{limit}MiB", dashboard_address=None
        ) as cluster,
        Client(cluster) as client,
    ):
        client.run(prepare, dict(enumerate(sorted(os.sched_getaffinity(0)))))
        for direction in DIRECTIONS:
            (optimized,) = dask.optimize(computed(direction, folder))
            tasks = len(set().union(*(one.__dask_graph__() for one in optimized)))
            with sampler.sample(direction, interval=0.2):
                start = time.perf_counter()
                futures = client.compute(computed(direction, folder))
                progress(futures, notebook=False)
                client.gather(futures)
                seconds = time.perf_counter() - start
            print()
            peak = max(client.run(memory).values())
            rows.append(Row(workers, direction, seconds, halo_of(extent, direction), tasks, peak))
    return rows, sampler.samples


def compared(extent):
    """Compare gpuconv.dask on one thread with calls on whole arrays; return ratios of times, and whether it is right.

    The first ratio of a direction is for results that remain in blocks, the second for results in one array.
    """
    x = np.random.default_rng(1).integers(-3, 4, (1, *(extent,) * 3)).astype(np.float32)
    w = np.rint(KERNELS)
    y = gpuconv.conv(x, w, padding=PADDING)
    lazy_x, lazy_y = (da.from_array(array, chunks=(-1, *(CHUNK,) * 3)) for array in (x, y))
    needs = {"padding": PADDING, "needs": ("dx", "dw")}
    pairs = {
        "forward": (lambda: [gpuconv.conv(x, w, padding=PADDING)], [gpuconv.dask.conv(lazy_x, w, padding=PADDING)]),
        "backward": (
            lambda: gpuconv.conv_backward(y, x, w, **needs)[:2],
            gpuconv.dask.conv_backward(lazy_y, lazy_x, w, **needs)[:2],
        ),
    }
    ratios, is_right = {}, True
    with dask.config.set(scheduler="threads", num_workers=1):
        for direction, (whole, lazy) in pairs.items():
            ways = whole, lambda lazy=lazy: dask.persist(*lazy), lambda lazy=lazy: dask.compute(*lazy)
            turns = [[seconds(way) for way in ways] for _ in range(TURNS)]
            ratios[direction] = [statistics.median(turn[way] / turn[0] for turn in turns) for way in (1, 2)]
            for one, other in zip(dask.compute(*lazy), whole(), strict=True):
                is_right = is_right and bool(np.abs(one - other).max() <= 1e-5 * np.abs(other).max())
    return ratios, is_right


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def table(rows):
    lines = [
        "| workers | direction | seconds | halo bytes per byte of the result | tasks | peak MiB of a worker |",
        "|--:|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        lines.append(
            f"| {row.workers} | {row.direction} | {row.seconds:.1f} | {row.halo:.2f} | {row.tasks} | {row.peak:.0f} |"
        )
    return "\n".join(lines)


def draw(path, curves, limit):
    """Draw the memory of all workers over time."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    for workers, samples in curves.items():
        start = min(when for curve in samples.values() for when, _ in curve)
        for number, (direction, curve) in enumerate(zip(DIRECTIONS, samples.values(), strict=True)):
            times, sizes = zip(*curve, strict=True)
            label = f"{workers} worker{'s' * (workers > 1)}, {direction}"
            axes.plot(
                [t - start for t in times],
                [size / 2**20 for size in sizes],
                f"C{workers - 1}{'-:'[number]}",
                label=label,
            )
        axes.axhline(workers * limit, color=f"C{workers - 1}", linewidth=0.6)
        axes.text(0, workers * limit, f" limit of {workers}", va="bottom", fontsize="small")
    axes.set(xlabel="seconds", ylabel="memory of all workers, MiB", ylim=(0, 2.3 * limit))
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--extent", type=int, default=800, metavar="N", help="voxels along each axis (default 800)")
    parser.add_argument("--memory", type=int, default=900, metavar="MIB", help="limit of each worker (default 900)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draws the memory of the workers")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="writes the table")
    options = parser.parse_args()
    size = 4 * options.extent**3 / 2**20
    text = [", ".join(f"{name} {value}" for name, value in {**build(NUMPY), "Dask": dask.__version__}.items())]
    text.append(f"x {options.extent}^3 float32, {size:.0f} MiB; y {2 * size:.0f} MiB; chunks of {CHUNK}^3")
    extent = min(options.extent, IN_MEMORY)
    ratios, is_right = compared(extent)
    if not is_right:
        print("gpuconv.dask differs from the call on whole arrays")
        return 1
    words = ", ".join(f"{direction} {blocks:.2f} ({one:.2f})" for direction, (blocks, one) in ratios.items())
    text.append(
        f"{extent}^3 voxels in memory, on one thread: time of gpuconv.dask divided by that of whole arrays, with the"
        f" result in blocks (and copied into one array): {words}"
    )
    rows, curves = [], {}
    with tempfile.TemporaryDirectory() as folder:
        store(options.extent, Path(folder, "x"))
        for workers in (1, 2):
            found, curves[workers] = measured(workers, options.extent, options.memory, Path(folder))
            rows += found
    text.append(table(rows))
    for one, two in zip(rows[:2], rows[2:], strict=True):
        text.append(f"{one.direction}: two workers are {one.seconds / two.seconds:.2f} times as fast as one")
    print("\n\n".join(text))
    if options.markdown:
        options.markdown.write_text("\n\n".join(text) + "\n")
    if options.plot:
        draw(options.plot, curves, options.memory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
