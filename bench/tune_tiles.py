"""Times every tile of implicit GEMM on the layers of suites: python bench/tune_tiles.py --json FILE [SUITE ...]

Each result is verified before it is timed; what was measured is written after every layer and dtype, and at an
interrupt. With --table FILE ..., such files' fastest tiles become gpuconv/algorithms/gemm_table.json, which goes before
the model; that needs no GPU.
"""

import argparse
import contextlib
import datetime
import json
import sys
from pathlib import Path
from unittest import mock

import numpy

from gpuconv import dtypes, execute, settings
from gpuconv.algorithms import gemm_table, gemm_tiles, implicit_gemm
from gpuconv.backend import BackendError, backend_named
from gpuconv.benchmark import command, layers, results, timing
from gpuconv.benchmark.problem import Problem
from gpuconv.geometry import DIRECTIONS
from gpuconv.request import Request

SUITES = ("resnet50",)
DTYPES = ("float16", "tf32", "float32")
CANDIDATES = 4  # the fastest by the model
CLEAR = 1.03  # how much faster than the model's choice a tile must be to go into the table


@contextlib.contextmanager
def taking(choice):
    """A tile in the place of the one that would be taken."""
    execute.clear()
    with mock.patch.object(gemm_tiles, "chosen", return_value=choice):
        yield
    execute.clear()


def measured(case, dtype, place, clock, seconds):
    """A row for each direction, layout and tile of a layer."""
    precision = "tf32" if dtype == "tf32" else "ieee"
    kind = dtypes.named("float32" if dtype == "tf32" else dtype)
    batch = case.batches[1]
    problem = Problem.of(case, batch, kind, place.xp, precision)
    for layout in ("channels_last", "channels_first"):
        geometry = case.geometry(batch, layout)
        for direction in DIRECTIONS:
            inner = problem.inner(direction)[0]
            if implicit_gemm.why_not(Request(geometry, kind, inner, place, limit=settings.workspace_limit())):
                continue
            given = geometry, kind, inner, place.device(), precision, settings.workspace_limit()
            for number, plan in enumerate(implicit_gemm.plans(*given)[:CANDIDATES]):
                with taking(plan.choice):
                    call = problem.call(direction, layout, "implicit_gemm")
                    verdict = problem.verdict(call(), direction, layout)
                    if not verdict.right:
                        raise ArithmeticError(
                            f"{plan.choice} is wrong for {direction} of {case.name}, {layout}, {dtype}"
                        )
                    samples = clock.samples(call, timing.count(clock.first(call)[0], seconds))
                yield {
                    "layer": case.name,
                    "batch": batch,
                    "direction": direction,
                    "layout": layout,
                    "dtype": dtype,
                    "tile": list(plan.choice.tile),
                    "slices": plan.choice.slices,
                    "by_model": number == 0,
                    "model_us": plan.choice.microseconds,
                    "us": float(numpy.median(samples)) * 1e6,
                    "gflop": case.geometry(batch).flops(is_complex=kind.kind == "c") / 1e9,
                    "key": gemm_table.key(plan.problem),
                }


def table(paths):
    """The entries of these files' fastest tiles, where they are clearly faster than the model's."""
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
                row["key"], row["tile"], row["slices"], row["us"], f"bench/results/{path.parent.name}"
            )


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
    clock, rows = timing.clock_for(place), []
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    facts = {"machine": results.machine(), "commit": results.commit(), "date": date}

    def save():
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")

    with contextlib.suppress(KeyboardInterrupt), clock.running():
        for case in layers.selected(options.suites or SUITES, ()):
            for dtype in options.dtype.split(","):
                rows += measured(case, dtype, place, clock, options.seconds)
                save()
                print(f"{case.name}, {dtype}: {len(rows)} rows", flush=True)
    save()


if __name__ == "__main__":
    main()
