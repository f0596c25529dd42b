"""Measure the tiles of implicit GEMM on the layers of suites.

    python bench/tune_tiles.py --json FILE [SUITE ...]

The fastest tiles according to the model are measured. Each result is verified before it is timed. Measurements are
written after every layer and dtype, and a later run of the same commit resumes there. With --table FILE ... the fastest
tiles of such files are written to gpuconv/gpu/gemm_table.json, which takes precedence over the model; this needs no
GPU.
"""

import argparse
import contextlib
import datetime
import itertools
import json
import sys
from pathlib import Path
from unittest import mock

import ahead
import numpy

from gpuconv import dtypes, execute, files, settings
from gpuconv.arrays import BackendError
from gpuconv.backends import backend_named
from gpuconv.benchmark import command, layers, results, run, timing
from gpuconv.benchmark.problem import Problem
from gpuconv.geometry import DIRECTIONS
from gpuconv.gpu import gemm_choice, gemm_plan, gemm_table, implicit_gemm
from gpuconv.request import Request

SUITES = ("resnet50",)
DTYPES = ("float16", "tf32", "float32")
CANDIDATES = 4  # plans per problem, the fastest ones by the model
CLEAR = 1.03  # how much faster than the model's choice a tile must be to go into the table


@contextlib.contextmanager
def taking(choice):
    """Enter a context in which implicit GEMM uses this choice of tile."""
    execute.clear()
    with mock.patch.object(gemm_choice, "chosen", return_value=choice):
        yield
    execute.clear()


def candidates(case, problem, place):
    """Yield each layout and direction of a layer with its fastest plans according to the model."""
    limit = settings.workspace_limit()
    for layout in ("channels_last", "channels_first"):
        geometry = case.geometry(case.batches[1], layout)
        for direction in DIRECTIONS:
            inner = problem.inner(direction)[0]
            if not implicit_gemm.why_not(Request(geometry, problem.dtype, inner, place, limit=limit)):
                given = geometry, problem.dtype, inner, place.device(), problem.precision, limit
                yield layout, direction, gemm_plan.plans(*given)[:CANDIDATES]


def measured(case, dtype, place, clock, seconds):
    """Yield a row for each direction, layout and tile of a layer."""
    kind, precision = run.kind_and_precision(dtype)
    problem = Problem.of(case, case.batches[1], dtypes.named(kind), place.xp, precision)
    found = list(candidates(case, problem, place))
    with ahead.compiling() as compiled:
        for job in [compiled(plan.module) for *_, plans in found for plan in plans]:
            job.result()
    for layout, direction, plans in found:
        for number, plan in enumerate(plans):
            with taking(plan.choice):
                call = problem.call(direction, layout, "implicit_gemm")
                if not problem.verdict(call(), direction, layout).right:
                    raise ArithmeticError(f"{plan.choice} is wrong for {direction} of {case.name}, {layout}, {dtype}")
                samples = clock.samples(call, timing.count(clock.first(call)[0], seconds))
            yield {
                "layer": case.name,
                "batch": case.batches[1],
                "direction": direction,
                "layout": layout,
                "dtype": dtype,
                "tile": list(plan.choice.tile),
                "splits": plan.choice.splits,
                "by_model": number == 0,
                "model_us": plan.choice.microseconds,
                "us": float(numpy.median(samples)) * 1e6,
                "gflop": case.geometry(case.batches[1]).flops(is_complex=problem.dtype.kind == "c") / 1e9,
                "key": plan.problem.key,
            }


def table(paths):
    """Yield table entries for the fastest tiles in files, if they are clearly faster than the choice of the model."""
    best = {}
    for path in map(Path, paths):
        for row in json.loads(path.read_text())["rows"]:
            problem = json.dumps(row["key"])
            best.setdefault(problem, []).append((row["us"], row["by_model"], row, path))
    for rows in best.values():
        fastest = min(rows, key=lambda entry: entry[0])
        model = next(us for us, by_model, *_ in rows if by_model)
        if fastest[0] * CLEAR <= model:
            _, _, row, path = fastest
            yield gemm_table.entry(
                row["key"], row["tile"], row["splits"], row["us"], f"bench/results/{path.parent.name}"
            )


def earlier(path, commit):
    """Return the rows that an earlier run of the same commit wrote."""
    before = json.loads(path.read_text()) if path.exists() and path.stat().st_size else {}
    return before["rows"] if before and before["commit"] == commit else []


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="default resnet50")
    parser.add_argument("--dtype", default=",".join(DTYPES), help="default %(default)s")
    parser.add_argument("--seconds", type=float, default=0.01, help="of one tile (default %(default)s)")
    parser.add_argument("--json", type=Path, help="where the measurements go")
    parser.add_argument("--table", nargs="+", metavar="FILE", help="measurements that fill the table of the package")
    options = parser.parse_args()
    if options.table:
        entries = list(table(options.table))
        gemm_table.write(entries)
        print(f"{len(entries)} entries in {gemm_table.FILE.name}")
        return
    if not options.json:
        parser.error("--json must name a file to write to")
    command.check_writable(options.json)
    try:
        place = backend_named(None)
    except BackendError as error:
        sys.exit(f"tune_tiles.py needs a GPU: {error}")
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    facts = {"machine": results.machine(), "commit": results.commit(), "date": date}
    rows = earlier(options.json, facts["commit"])
    there = {(row["layer"], row["dtype"]) for row in rows}
    jobs = itertools.product(layers.selected(options.suites or SUITES, ()), options.dtype.split(","))
    todo = [(case, dtype) for case, dtype in jobs if (case.name, dtype) not in there]
    clock = timing.clock_for(place)
    try:
        with clock.running():
            for number, (case, dtype) in enumerate(todo, 1):
                rows += list(measured(case, dtype, place, clock, options.seconds))
                files.write(options.json, f"{json.dumps({**facts, 'rows': rows}, indent=1)}\n".encode())
                print(f"{case.name}, {dtype}: {len(rows)} rows, {len(todo) - number} layers left", flush=True)
    except KeyboardInterrupt:
        sys.exit("interrupted: these are not all layers")


if __name__ == "__main__":
    main()
