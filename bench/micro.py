"""Run micro-benchmarks of the operations of which the kernels consist.

    python bench/micro.py --json FILE

Measured are a copy, a matrix product of every dtype, the host time of a launch and of a repeated call, scalar and
four-element atomic additions to many or few distinct cells, a transposition, and every algorithm on the layers of the
suite quick. Each result is verified before it is timed. A GPU is required.
"""

import argparse
import datetime
import json
import sys
from pathlib import Path

import numpy

import gpuconv
from gpuconv.arrays import BackendError
from gpuconv.backends import backend_named
from gpuconv.benchmark import command, layers, limits, results, run, timing
from gpuconv.gpu import scatter_plain
from gpuconv.gpu.kernel import Kernel, Module
from gpuconv.select import MODULES

THREADS, COLUMNS = 256, 32
ADDITIONS = 2**26
EXTENT = 8192  # rows of the transposed matrix
SUITE = "quick"
BATCH = 32
TYPES = tuple((alias, "float32") for alias in ("First", "Second", "Sum", "Result", "Bias"))


def kernel(name):
    """Return a kernel of micro.cu."""
    constants = (("THREADS", THREADS), ("COLUMNS", COLUMNS))
    return Kernel(Module("../bench/micro", TYPES, False, constants), name)


def atomic_additions(place, clock):
    """Yield the additions per second to float32 cells of global memory."""
    xp = place.xp
    blocks = max(1, min(ADDITIONS // THREADS, 8 * 132 * 4))
    for name, each in (("add_one", 1), ("add_four", 4)):
        for cells in (ADDITIONS, 4096, 4):
            to = xp.zeros(cells, numpy.float32)
            given = [to, numpy.int32(ADDITIONS), numpy.int32(cells)]

            launch = place.launch(kernel(name), blocks, THREADS, given)

            def call(launch=launch, given=given):
                launch(*given)

            call()
            if not bool((to == ADDITIONS // cells).all()):
                raise ArithmeticError(f"{name} into {cells} cells is wrong")
            seconds = numpy.median(clock.samples(call, timing.ENOUGH))
            yield f"atomic additions, {each} at a time, {cells} cells", ADDITIONS / seconds, "1/s"


def launch_cost(place, clock):
    """Yield the host seconds of a launch as plans make it, and the seconds per launch of 100 launches in a row."""
    given = [place.xp.zeros(1, numpy.float32)]
    launch = place.launch(kernel("nothing"), 1, THREADS, given)

    def call():
        launch(*given)

    call()
    if isinstance(clock, timing.GpuClock):
        yield "launch, host", clock.host(call), "s"
    yield "launch, one of 100 in a row", min(clock.samples(lambda: [call() for _ in range(100)], 10)) / 100, "s"


def repeated_calls(place, clock):
    """Yield the host seconds of calls with a cached plan, and of a launch alone."""
    if not isinstance(clock, timing.GpuClock):
        return
    x, dy = (place.xp.ones((8, 64, 14, 14), numpy.float16) for _ in range(2))
    w = place.xp.ones((64, 64, 3, 3), numpy.float16)
    calls = {
        "forward": lambda: gpuconv.conv(x, w, padding=1),
        "data_grad": lambda: gpuconv.conv_data_grad(dy, w, x.shape, padding=1),
        "weight_grad": lambda: gpuconv.conv_weight_grad(dy, x, w.shape, padding=1),
        "backward, without db": lambda: gpuconv.conv_backward(dy, x, w, padding=1, needs=("dx", "dw")),
    }
    given = [place.xp.zeros(1, numpy.float32)]
    launch = place.launch(kernel("nothing"), 1, THREADS, given)
    calls["launch alone"] = lambda: launch(*given)
    for name, call in calls.items():
        call()
        yield f"repeated call, host, {name}", min(clock.host(call) for _ in range(5)), "s"


def transposition(place, clock):
    """Yield the bytes per second that a transposition reads and writes."""
    xp = place.xp
    x = xp.arange(EXTENT * EXTENT, dtype=numpy.float32).reshape(EXTENT, EXTENT)
    y = xp.zeros_like(x)

    given = [x, y, numpy.int32(EXTENT)]
    launch = place.launch(kernel("transpose"), (EXTENT // COLUMNS) ** 2, THREADS, given)

    def call():
        launch(*given)

    call()
    if not bool((y == x.T).all()):
        raise ArithmeticError("the transposition is wrong")
    yield "transposition", 2 * x.nbytes / numpy.median(clock.samples(call, timing.ENOUGH)), "B/s"


def ceilings(place, clock):
    """Yield the limits that ``gpuconv bench`` measures."""
    found = limits.measured(place, run.DTYPES, clock)
    yield "copy", found.bandwidth, "B/s"
    for name in run.DTYPES:
        if name in found.peaks:
            yield f"matrix product, {name}", found.peaks[name], "FLOP/s"


def algorithms(place, clock):
    """Yield the seconds of every algorithm on a few layers, and the speedup of scatter over its reference kernel."""
    MODULES["scatter_plain"] = scatter_plain
    names = ("im2col", "implicit_gemm", "direct", "scatter", "scatter_plain")
    plan = run.Schedule(place, dtypes=("float32",), algorithms=names, batches=(BATCH,), seconds=0.02)
    for rows in run.Bench(plan).rows(plan.jobs(layers.selected((SUITE,), ()))):
        timed = {row.algorithm: row.summary.median for row in rows if row.timed}
        for row in rows:
            name = f"{row.case}, {row.direction}"
            if row.wrong:
                raise ArithmeticError(f"{name}, {row.algorithm}: {row.of_bound} times its bound")
            if row.timed:
                yield f"{name}, {row.algorithm}", row.summary.median, "s"
        if row.direction != "forward":  # forward has no scatter-add
            yield f"{name}, scatter_plain / scatter", timed["scatter_plain"] / timed["scatter"], "times"


PARTS = (launch_cost, repeated_calls, ceilings, transposition, atomic_additions, algorithms)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="written anew after each part")
    options = parser.parse_args()
    command.check_writable(options.json)
    try:
        place = backend_named(None)
    except BackendError as error:
        sys.exit(f"micro.py needs a GPU: {error}")
    if place.launch is None:
        sys.exit("micro.py needs a GPU: NumPy's arrays are computed on the CPU")
    clock = timing.clock_for(place)
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    document = {"machine": results.machine(), "commit": results.commit(), "date": date, "rows": [], "failures": []}
    for part in PARTS:
        try:
            with clock.running():
                for name, value, unit in part(place, clock):
                    print(f"{name:<70} {value:12.4g} {unit}", flush=True)
                    document["rows"].append({"name": name, "value": float(value), "unit": unit})
        except Exception as error:  # the following parts may still succeed
            print(f"{part.__name__}: {type(error).__name__}: {error}", file=sys.stderr)
            document["failures"].append(f"{part.__name__}: {type(error).__name__}: {error}")
        if options.json:
            options.json.write_text(json.dumps(document, indent=1) + "\n")
    sys.exit(1 if document["failures"] else 0)


if __name__ == "__main__":
    main()
