"""``gpuconv bench``, ``gpuconv bench compare`` and ``gpuconv tune``: their options and their output."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import re
import shlex
import signal
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gpuconv
from gpuconv import dtypes, settings, tuned
from gpuconv.arguments import LAYOUTS
from gpuconv.arrays import Backend
from gpuconv.backends import backend_named
from gpuconv.benchmark import compare, layers, limits, peers, report, results, run
from gpuconv.geometry import DIRECTIONS
from gpuconv.select import MODULES
from gpuconv.tuning import Tuned, tuned_geometry

SAVE_SECONDS = 10  # the interval between two updates of the JSON file
DEFAULT_SUITE = "quick"
WIDE = 400  # columns if the output is not a terminal, so that no line is broken
# Options that name output files, and --resume. They do not affect the results.
FILES = re.compile(r" --(json|csv|markdown|plot)[ =]('[^']*'|\S+)| --resume")


def add_bench(commands: Any) -> None:
    """Declare ``gpuconv bench``."""
    bench = commands.add_parser(
        "bench",
        help="verify and time real layers on this machine, together with other libraries",
        description="Runs real layers in every direction: verifies each result against a float64 reference, then\n"
        "times it. 'gpuconv bench compare A.json B.json' compares two results.",
        epilog="\n".join(
            textwrap.fill(f"{name}: {text}.", 100, subsequent_indent="    ")
            for name, text in results.DEFINITIONS.items()
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    some = _add_layers(bench)
    bench.add_argument("--algorithm", **some, metavar="NAME", help=f"one of auto, {', '.join(MODULES)} (default auto)")
    bench.add_argument(
        "--peer", **some, metavar="NAME", help=f"one of {', '.join(peers.PEERS)}; timed alternately with gpuconv"
    )
    caches = bench.add_mutually_exclusive_group()
    caches.add_argument(
        "--cold", action="store_true", default=None, help="empty caches before each call (default on a GPU)"
    )
    caches.add_argument("--warm", action="store_false", dest="cold", help="leave caches as they are (default on a CPU)")
    bench.add_argument(
        "--seconds", type=_seconds, default=0.5, metavar="S",
        help="time for 30 to 100 samples of a row, at most 4 times that (default 0.5)",
    )  # fmt: skip
    bench.add_argument(
        "--list", action="store_true", help="show suites, layers, where their numbers are from, and peers"
    )
    bench.add_argument("--json", type=Path, metavar="FILE", help="write machine, definitions and every sample")
    bench.add_argument(
        "--resume", action="store_true", help="keep what the --json file has of this command, and measure the rest"
    )
    bench.add_argument("--csv", type=Path, metavar="FILE", help="write a line for each row")
    bench.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    bench.add_argument("--plot", type=Path, metavar="FILE", help="draw FILE-time and FILE-roofline, as PNG, SVG or PDF")
    bench.set_defaults(run=bench_command)


def _add_layers(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Declare the options that select layers and backend; return the settings of options that take several names."""
    some: dict[str, Any] = {"action": "append", "default": [], "type": _names}
    parser.add_argument(
        "suite", nargs="*", help=f"suites of layers, or all (default {DEFAULT_SUITE}); gpuconv bench --list shows them"
    )
    parser.add_argument(
        "--case", action="append", default=[], metavar="CASE",
        help="layers whose names contain this text, or a specification: 'n=32 c=64 h=56 w=56 k=64 r=3 s=3 pad=1'",
    )  # fmt: skip
    parser.add_argument("--direction", **some, metavar="NAME", help=f"one of {', '.join(DIRECTIONS)} (default all)")
    parser.add_argument("--dtype", **some, metavar="NAME", help="such as float16,tf32 (default the layer's own)")
    parser.add_argument(
        "--layout", **some, metavar="NAME", help=f"one of {', '.join(LAYOUTS)} (default: the first; with peers both)"
    )
    parser.add_argument(
        "--backend", choices=settings.BACKENDS, help="where to compute (default as GPUCONV_BACKEND says)"
    )
    parser.add_argument("--batch", **some, metavar="N", help="batch sizes (default the layer's own for the backend)")
    return some


def add_tune(commands: Any) -> None:
    """Declare ``gpuconv tune``."""
    parser = commands.add_parser(
        "tune",
        help="find the fastest algorithm for layers on this machine, and store it",
        description="Times the algorithms that can compute each layer, compares their results with a float64 reference,"
        " and stores the fastest, which algorithm='auto' then uses for these shapes on this machine.",
    )
    _add_layers(parser)
    parser.add_argument(
        "--seconds", type=_seconds, default=0.3, metavar="S", help="time for each algorithm (default 0.3)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the machine and every time")
    parser.set_defaults(run=tune_command)


def add_compare(commands: Any) -> None:
    """Declare ``gpuconv bench compare``."""
    parser = commands.add_parser(
        "bench compare",
        help="compare two results row by row, from their samples",
        description="Reports for every row whether B is FAST (faster than A), SLOW, SAME or AMBIGUOUS: "
        + results.DEFINITIONS["verdict"] + ".",
    )  # fmt: skip
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument(
        "--fail-slower",
        type=_percent,
        metavar="5%",
        help="exit status 1 if gpuconv is SLOW by more than this, or wrong",
    )
    parser.set_defaults(run=compare_command)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value < 3600:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 3600, got {text!r}")
    return value


def _percent(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / 100
    except ValueError:
        value = -1
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be a percentage such as 5%, got {text!r}")
    return value


def _chosen(option: str, given: Sequence[Sequence[str]], known: Sequence[str]) -> list[str]:
    """Return the names given for an option, without repetition.

    Raises ValueError with the nearest names if one is unknown.
    """
    names = list(dict.fromkeys(name for part in given for name in part))
    for name in names:
        if name not in known:
            raise ValueError(f"--{option} must be a known name, not {name!r} ({layers.nearest(name, known)})")
    return names


def _batches(given: Sequence[Sequence[str]]) -> list[int]:
    texts = [text for part in given for text in part]
    for text in texts:
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"--batch must be an int of at least 1, got {text!r}")
    return list(dict.fromkeys(map(int, texts)))


def tune_command(options: argparse.Namespace) -> int:
    """Run ``gpuconv tune``."""
    where = backend_named(options.backend)
    check_writable(options.json)
    schedule = run.Schedule(
        where,
        _chosen("direction", options.direction, DIRECTIONS) or DIRECTIONS,  # type: ignore[arg-type]
        _chosen("dtype", options.dtype, dtypes.NAMES),
        _chosen("layout", options.layout, LAYOUTS) or LAYOUTS[:1],  # type: ignore[arg-type]
        batches=_batches(options.batch),
    )
    cases = layers.selected(options.suite or (() if options.case else (DEFAULT_SUITE,)), options.case)
    found: list[dict[str, Any]] = []
    try:
        for case, batch, dtype in schedule.jobs(cases):
            for layout in schedule.layouts:
                geometry = case.geometry(batch, layout)
                for one in tuned_geometry(geometry, dtypes.named(dtype), schedule.directions, where, options.seconds):
                    print(_tuned_line(case.name, layout, one), flush=True)
                    found.append({"case": case.name, "spec": case.text(batch), "layout": layout, **one._asdict()})
    finally:
        if options.json:
            facts = {"machine": results.machine(), "commit": results.commit()}
            rows = [{name: value for name, value in row.items() if name != "geometry"} for row in found]
            options.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    print(f"stored in {tuned.path(where)}")
    return 1 if any(row["wrong"] for row in found) else 0


def _tuned_line(name: str, layout: str, one: Tuned) -> str:
    times = ", ".join(f"{algorithm} {taken * 1e3:.3g} ms" for algorithm, taken in one.seconds.items())
    verdict = one.fastest
    if one.fastest != one.default and one.default not in one.wrong:
        verdict += f", {one.gain:.2f} times as fast as {one.default}"
    wrong = f"; WRONG: {', '.join(one.wrong)}" if one.wrong else ""
    return f"{name:<36} {one.direction:<11} {layout:<14} {verdict}  ({times}{wrong})"


def bench_command(options: argparse.Namespace) -> int:
    """Run ``gpuconv bench``."""
    if options.list:
        _print_list()
        return 0
    missing = [name for name in ("rich", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"needs {' and '.join(missing)}: pip install 'gpuconv[bench]'")
    with gpuconv.backend(options.backend) if options.backend else contextlib.nullcontext():
        return bench(options, backend_named(None))


def bench(options: argparse.Namespace, place: Backend) -> int:
    """Run the benchmark that the options select on a backend, and write its output."""
    from gpuconv.benchmark import plots

    cases = layers.selected(options.suite or (() if options.case else (DEFAULT_SUITE,)), options.case)
    peer_names = peers.checked(_chosen("peer", options.peer, list(peers.PEERS)), place)
    schedule = run.Schedule(
        place,
        _chosen("direction", options.direction, DIRECTIONS) or DIRECTIONS,  # type: ignore[arg-type]
        _chosen("dtype", options.dtype, run.DTYPES),
        _chosen("layout", options.layout, LAYOUTS) or (LAYOUTS if peer_names else LAYOUTS[:1]),  # type: ignore[arg-type]
        _chosen("algorithm", options.algorithm, ("auto", *MODULES)) or ("auto",),
        _batches(options.batch),
        peer_names,
        options.seconds,
        options.cold,
    )
    drawn = plots.paths(options.plot) if options.plot else ()
    files = [path for path in (options.json, options.csv, options.markdown, *drawn) if path]
    for path in files:
        check_writable(path)
    if options.resume and not options.json:
        raise ValueError("--resume needs --json FILE, the results of the earlier run")
    if len({path.resolve() for path in files}) < len(files):
        raise ValueError(f"each file is written by one option: {', '.join(map(str, files))}")
    if options.plot:
        plots.check_format(options.plot)
    with _terminated_is_interrupted():
        found = _run(schedule, cases, options)
    if options.json:
        results.write_json(options.json, found)
    _print_results(found)
    if options.csv:
        results.write_csv(options.csv, found)
    if options.markdown:
        options.markdown.write_text(report.markdown(found))
    if options.plot and any(row.timed for row in found.rows):
        plots.plot(found, options.plot)
    wrong = [row for row in found.rows if row.wrong]
    for row in wrong:
        what = row.failure or f"{row.of_bound:.3g} times the bound"
        print(f"gpuconv bench: wrong result: {row.case}, {row.direction}, {row.layout}: {what}", file=sys.stderr)
    if not found.complete:
        raise KeyboardInterrupt
    return 1 if wrong else 0


def _run(schedule: run.Schedule, cases: Sequence[layers.Case], options: argparse.Namespace) -> results.Results:
    """Run a schedule and return its results, which are partial if the run was interrupted."""
    facts = results.machine() | {f"peer {name}": peers.module(name).about() for name in schedule.peers}
    command = FILES.sub("", shlex.join(["gpuconv", *sys.argv[1:]]))
    found = results.Results(facts, command=command, commit=results.commit())
    found.cold = schedule.place.kind == "cupy" if schedule.cold is None else schedule.cold
    if options.resume and options.json.exists():
        found.rows = _earlier(options.json, found, schedule)
    print(f"{'commit':<10} {found.commit or 'installed from a wheel'}")
    for name in (
        "gpuconv",
        "CPU",
        "cores",
        "NumPy",
        "CuPy",
        "GPU",
        "nvidia-smi",
        *(f"peer {n}" for n in schedule.peers),
    ):
        if name in facts:
            print(f"{name:<10} {facts[name]}")
    jobs = schedule.jobs(cases)
    todo = _missing(jobs, found.rows, schedule)
    started = saved = time.perf_counter()
    bench = run.Bench(schedule)
    try:
        with bench.clock.running():
            names = dict.fromkeys(dtype for _, _, dtype in jobs)
            found.limits[schedule.place.name] = limit = limits.measured(schedule.place, list(names), bench.clock)
        peaks = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in limit.peaks.items())
        print(f"{'limits':<10} copy {limit.bandwidth / 1e9:.1f} GB/s; product of {peaks}\n", flush=True)
        with _progress(len(todo) * len(schedule.directions)) as advance:
            for rows in bench.rows(todo):
                found.rows += rows
                advance(f"{rows[0].case} {rows[0].direction}")
                if options.json and time.perf_counter() - saved > SAVE_SECONDS:
                    results.write_json(options.json, found)
                    saved = time.perf_counter()
        found.complete = True
    except KeyboardInterrupt:
        pass
    except Exception:
        if options.json:
            results.write_json(options.json, found)
        raise
    left = Counter(
        f"{suite}, {dtype}"
        for case, _, dtype in _missing(jobs, found.rows, schedule)
        for suite in case.suites or ("given",)
    )
    found.not_reached = [f"{name}: {number} layers" for name, number in left.items()]
    found.spent = {name: round(seconds, 3) for name, seconds in bench.spent.items()}
    found.spent["all"] = round(time.perf_counter() - started, 3)
    return found


def _earlier(path: Path, found: results.Results, schedule: run.Schedule) -> list[results.Row]:
    """Return the rows of the layers that an earlier run completed.

    Raises ValueError if that run had another command, commit or machine.
    """
    earlier = results.read_json(path)
    for name in ("command", "commit"):
        before, now = getattr(earlier, name), getattr(found, name)
        if before != now:
            raise ValueError(f"--resume requires the same {name} as {path}: it was {before!r} and is now {now!r}")
    for name in {*earlier.machine, *found.machine} - {"nvidia-smi"}:  # its clocks and temperatures change
        before, now = earlier.machine.get(name), found.machine.get(name)
        if before != now:
            raise ValueError(
                f"--resume requires the same machine as {path}: its {name} was {before!r} and is now {now!r}"
            )
    whole = _whole(earlier.rows, schedule)
    return [row for row in earlier.rows if (row.case, row.spec, row.dtype) in whole]


def _missing(jobs: Sequence[run.Job], rows: Sequence[results.Row], schedule: run.Schedule) -> list[run.Job]:
    """Return the jobs that lack rows in some direction."""
    whole = _whole(rows, schedule)
    return [(case, batch, dtype) for case, batch, dtype in jobs if (case.name, case.text(batch), dtype) not in whole]


def _whole(rows: Sequence[results.Row], schedule: run.Schedule) -> set[tuple[str, str, str]]:
    """Return the case, specification and dtype of the layers that have rows in every direction."""
    directions: dict[tuple[str, str, str], set[str]] = {}
    for row in rows:
        directions.setdefault((row.case, row.spec, row.dtype), set()).add(row.direction)
    return {layer for layer, found in directions.items() if found >= set(schedule.directions)}


@contextlib.contextmanager
def _terminated_is_interrupted() -> Iterator[None]:
    """Convert SIGTERM, which ``timeout`` sends, to KeyboardInterrupt, so that the results so far are kept."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<50}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda text: progress.update(task, advance=1, description=text)


def _print_results(found: results.Results) -> None:
    from rich.console import Console

    table = report.table(found)
    console = Console(width=None if sys.stdout.isatty() else WIDE)
    if table.lines:
        console.print(table.rich(console.width))
    compared = compare.ratios(found.rows)
    if compared:
        print("the peer's time over gpuconv's, geometric means (above 1 gpuconv is faster), and verdicts:")
        console.print(report.means(compared).rich(console.width))
    for line in report.notes(found, compared):
        print(line)


def _print_list() -> None:
    for suite, cases in layers.suites().items():
        print(f"{suite}: {len(cases)} layers")
        source = ""
        for case in cases:
            if case.source != source:
                source = case.source
                print(f"    from {source}")
            print(f"    {case.name:<44} {case.text(case.batches[0])}")
    print("\npeers")
    for name, (needed, kinds) in peers.PEERS.items():
        state = "installed" if importlib.util.find_spec(needed) else f"not installed: pip install {needed}"
        print(f"    {name:<8} on {kinds.replace(' ', ' and ')}; {state}")


def compare_command(options: argparse.Namespace) -> int:
    """Run ``gpuconv bench compare``."""
    from rich.console import Console

    before, after = results.read_json(options.before), results.read_json(options.after)
    for line in compare.differences(before, after):
        print(f"differs: {line}")
    changes = compare.changes(before, after)
    console = Console(width=None if sys.stdout.isatty() else WIDE)
    console.print(report.changed(changes).rich(console.width))
    counts = Counter(change.verdict for change in changes)
    print(", ".join(f"{number} {name}" for name, number in counts.items()) or "no rows")
    if options.fail_slower is None:
        return 0
    most = 1 + options.fail_slower
    slower = [change for change in changes if change.ours and change.verdict == "SLOW" and change.slowdown > most]
    failed = [change for change in changes if change.verdict == "WRONG"] + slower
    for change in failed:
        row = change.after
        assert row is not None
        what = "wrong" if change.verdict == "WRONG" else f"{change.slowdown - 1:.0%} slower"
        print(f"gpuconv bench compare: {what}: {row.case}, {row.direction}, {row.by}, {row.layout}", file=sys.stderr)
    return 1 if failed else 0


def check_writable(path: Path | None) -> None:
    """Raise ValueError if a file cannot be written, before the run rather than after it."""
    if path is None:
        return
    existed = path.exists()
    if existed and not path.is_file():
        raise ValueError(f"cannot write {path}: it is not a regular file")
    try:
        with path.open("a"):
            pass
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None
    if not existed:
        path.unlink()
