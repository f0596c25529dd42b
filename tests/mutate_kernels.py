"""Do the tests notice when a kernel is wrong? ``python -m tests.mutate_kernels``

Edits the CUDA sources by rule, at every place where a rule fits, one place at a time, and runs the kernels' tests on
each edited text until one fails: on the CPU, fast mode first, then with every access checked. The score is the share of
caught mutants among all but those that are equivalent (EQUIVALENT says why, for each). mutations.json holds the
verdicts with hashes of the sources; a run that is interrupted goes on where it stopped, and after a change of the
kernels or the tests only what the change may have touched runs again.

    python -m tests.mutate_kernels                      all of them, on all cores
    python -m tests.mutate_kernels --sample 60 --seed 7 those that 60 seconds allow, drawn at random; changes no file

Exit status 1 where a mutant survives, or, for a sample, where the verdicts of mutations.json are not of these sources.
"""

import argparse
import collections
import datetime
import functools
import gc
import json
import os
import random
import re
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # one process for each core

import pytest
from _pytest.runner import runtestprotocol

from gpuconv.cuda import report
from tests.backends import backend_of
from tests.emulation import launcher, loader
from tests.emulation.edited import edited
from tests.equivalent_mutants import EQUIVALENT
from tests.mutants import FILES, TRIED_BY, Mutant, hashes, mutants, read

RESULTS = Path(__file__).parent / "mutations.json"
SAME_CODE = "the compiler makes the same code of it"
SECONDS = 5.0  # that a launch may take: mutated loops may never end
MANY = 20  # tests that most mutants do not survive

# ------------------------------------------------------------------------------------------------- running tests


class Session:
    """A pytest plugin: collects the kernels' tests once, and then runs mutants in the place of tests."""

    def __init__(self, work):
        self.work = work
        self.items = []

    def pytest_runtestloop(self, session):
        caught = collections.Counter(entry["by"] for entry in recorded().values())
        of_kernels = [item for item in session.items if backend_of(item) in ("emulated", "checked")]
        self.items = sorted(of_kernels, key=lambda item: (backend_of(item) == "checked", -caught[name_of(item)]))
        session.items[:] = self.items
        self.work(self.items)
        return True


def algorithm_of(item):
    """That which a test runs, or None, if it runs several or others than the public ones."""
    if Path(item.fspath).stem == "test_implicit_gemm":
        return "implicit_gemm"
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return params.get("algorithm", "scatter_plain" if "plain" in item.originalname else None)


def concerns(item, mutant):
    """Whether a test may notice: it runs the kernel, or a kernel of the file."""
    params, algorithm = item.callspec.params if hasattr(item, "callspec") else {}, algorithm_of(item)
    runs = {algorithm.removesuffix("_plain")} if algorithm else {"direct", "scatter"}
    if runs.isdisjoint(TRIED_BY[mutant.file]):
        return False
    if mutant.where.endswith("_plain") and algorithm in ("scatter", "direct"):
        return False
    if mutant.where != mutant.file and algorithm == "scatter_plain" and not mutant.where.endswith("_plain"):
        return False
    return "direction" not in params or mutant.where == mutant.file or params["direction"] in mutant.where


def verdict(items, mutant, tried_first):
    """("caught", the test), ("equivalent", the reason), ("not compiled", the error) or ("survived", "")."""
    rank = {name: number for number, name in enumerate(tried_first)}
    chosen = [item for item in items if concerns(item, mutant)]
    first = sorted((item for item in chosen if name_of(item) in rank), key=lambda item: rank[name_of(item)])
    rest = [item for item in chosen if name_of(item) not in rank]
    kind, by = first_failure([*first, *rest[:MANY]], mutant)
    if kind == "survived" and same_code(mutant):
        return "equivalent", SAME_CODE
    return first_failure(rest[MANY:], mutant) if kind == "survived" else (kind, by)


def name_of(item):
    return item.nodeid.rpartition("/")[2]


def first_failure(items, mutant):
    """Runs tests on a mutant until one fails: ("caught", its name), ("not compiled", the error) or ("survived", "")."""
    with edited(mutant.file, mutant.text), launcher.using(seconds=SECONDS):
        for item, following in zip(items, [*items[1:], None], strict=True):
            for outcome in runtestprotocol(item, nextitem=following, log=False):
                if outcome.failed and "BuildError" in outcome.longreprtext:
                    error = re.search(r"error: .*", outcome.longreprtext)
                    return "not compiled", error[0] if error else "?"
                if outcome.failed:
                    return "caught", name_of(item)
    return "survived", ""


def check_baseline(items):
    """RuntimeError unless every test passes on the kernels as they are: what fails anyway catches nothing."""
    unchanged = Mutant(FILES[0], 0, "", "", "", "", read(FILES[0]), "")
    child, answer = in_child(lambda: first_failure(items, unchanged))
    os.waitpid(child, 0)
    with answer:
        kind, by = json.loads(answer.read() or '["stopped", "?"]')
    if kind != "survived":
        raise RuntimeError(f"the tests fail on the kernels as they are: {kind}: {by}")


def same_code(mutant):
    """Whether a compiler that optimizes makes the same library of it, of every module of these dtypes."""
    modules = [module for module in report.modules() if module.stem in TRIED_BY[mutant.file]]

    def code(module):
        return loader.library_file(loader.emulated_source(module), "optimized").read_bytes()

    built = [code(module) for module in modules]
    with edited(mutant.file, mutant.text):
        return all(code(module) == before for module, before in zip(modules, built, strict=True))


def in_child(function):
    """Calls a function in a process of its own, which takes along what it remembers: its number, and its answer."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking beside threads, which BLAS has
        child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.write(writer, json.dumps(function()).encode())
        os._exit(0)
    os.close(writer)
    return child, os.fdopen(reader, "rb")


def in_children(items, todo, hints, jobs, done):
    """The verdict of each mutant, from a process of its own: ``done(mutant, kind, by, seconds)`` as they come."""
    running = {}
    todo = iter(todo)
    killers = collections.defaultdict(dict)  # what caught a mutant may well catch its neighbours: where it last did
    gc.freeze()  # or each child's collector would copy the memory that they share
    while True:
        while len(running) < jobs and (mutant := next(todo, None)) is not None:
            line_of, line = killers[mutant.file], mutant.line
            nearest = sorted(line_of, key=lambda name: abs(line_of[name] - line))[:12]
            first = list(dict.fromkeys((*hints.get((mutant.file, mutant.after), ()), *nearest)))
            child, answer = in_child(functools.partial(verdict, items, mutant, first))
            running[child] = mutant, answer, time.monotonic()
        if not running:
            return
        child, status = os.wait()
        mutant, answer, start = running.pop(child)
        with answer:
            text = answer.read()
        kind, by = json.loads(text) if text else ("caught", f"the process ended with status {status}")
        if kind == "caught":
            killers[mutant.file][by] = mutant.line
        done(mutant, kind, by, round(time.monotonic() - start, 1))


# ------------------------------------------------------------------------------------------------- results


def key(mutant):
    """What EQUIVALENT knows a mutant by: its file, and the line before and after, without comments."""
    return mutant.file, mutant.before.partition("  //")[0], mutant.after.partition("  //")[0]


def place(mutant):
    """The same and, since a file may have a line several times, the how manieth it is."""
    before = mutant.before
    return *key(mutant), sum(line.strip() == before for line in read(mutant.file).splitlines()[: mutant.line])


def reason(mutant):
    """Why a mutant is equivalent, or None."""
    return EQUIVALENT.get(key(mutant)) or EQUIVALENT.get(place(mutant))


def recorded():
    """The verdicts of mutations.json by identity."""
    if not RESULTS.exists():
        return {}
    return {entry["id"]: entry for entry in json.loads(RESULTS.read_text())["mutants"]}


def entry(mutant, kind, by, seconds):
    if kind == "survived" and reason(mutant):
        kind, by = "equivalent", reason(mutant)
    return {
        "id": mutant.identity,
        "file": mutant.file,
        "line": mutant.line,
        "where": mutant.where,
        "rule": mutant.rule,
        "after": mutant.after,
        "verdict": kind,
        "by": by,
        "seconds": seconds,
    }


def killers_of(entries):
    """What caught mutants, by file and mutated line: with other sources too, they may well catch them again."""
    return {(item["file"], item["after"]): [item["by"]] for item in entries if item["verdict"] == "caught"}


def write(everything, verdicts):
    """One line for each mutant, so that a change of one is a change of one line."""
    entries = [verdicts[mutant.identity] for mutant in everything if mutant.identity in verdicts]
    head = {"sources": hashes(), "date": datetime.date.today().isoformat(), "complete": len(entries) == len(everything)}
    lines = ",\n".join(json.dumps(item, ensure_ascii=False) for item in entries)
    scratch = RESULTS.with_suffix(".part")
    scratch.write_text(f'{json.dumps(head)[:-1]}, "mutants": [\n{lines}\n]}}\n')
    os.replace(scratch, RESULTS)


def is_current(content):
    """Whether recorded verdicts are of the kernels as they are."""
    return content["complete"] and content["sources"] == hashes()


def table(entries):
    """Counts and score, for each kernel and for what kernels share."""
    counts = collections.defaultdict(collections.Counter)
    for item in entries:
        name = f"`{item['where']}`" if item["where"] not in FILES else f"{item['where']}, shared"
        counts[name][item["verdict"]] += 1
        counts["all"][item["verdict"]] += 1
    lines = ["| where | mutants | caught | equivalent | survived | score |", "|---|--:|--:|--:|--:|--:|"]
    for name, count in counts.items():
        if name == "all":
            continue
        lines.append(row(name, count))
    return "\n".join([*lines, row("**all**", counts["all"])])


def row(name, count):
    caught, survived = count["caught"], count["survived"]
    total = caught + survived + count["equivalent"]
    score = f"{100 * caught / (caught + survived):.1f} %" if caught + survived else "-"
    return f"| {name} | {total} | {caught} | {count['equivalent']} | {survived} | {score} |"


def _positive(text):
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be an int of at least 1, got {text!r}")
    return int(text)


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.mutate_kernels", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--sample",
        type=_positive,
        metavar="SECONDS",
        help="as many as this time allows, drawn at random, after the tests have passed on the kernels as they are",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sample (default 0)")
    parser.add_argument(
        "--jobs", type=_positive, default=len(os.sched_getaffinity(0)), metavar="N", help="default: all cores"
    )
    options = parser.parse_args()
    if loader.why_not():
        parser.error(loader.why_not())
    everything = mutants()
    run = sample if options.sample else full
    sys.exit(run(everything, options))


def full(everything, options):
    """Runs what has no verdict yet, and writes mutations.json."""
    verdicts = recorded()
    hints = killers_of(verdicts.values())
    known = [mutant for mutant in everything if mutant.identity in verdicts]
    for mutant in known:  # a reason may have been added, or taken away
        old = verdicts[mutant.identity]
        old["line"] = mutant.line
        if old["verdict"] == "survived" and reason(mutant):
            verdicts[mutant.identity] = entry(mutant, "survived", "", old.get("seconds", 0))
    print(f"{len(everything)} mutants, {len(known)} of them have a verdict")

    def work(items):
        names = {name_of(item) for item in items}
        todo = [mutant for mutant in everything if not stands(verdicts.get(mutant.identity), names)]
        check_baseline(items)
        with progress() as bar:
            task = bar.add_task("mutants", total=len(todo), survived=0)

            def done(mutant, kind, by, seconds):
                verdicts[mutant.identity] = entry(mutant, kind, by, seconds)
                survived = sum(
                    verdicts[m.identity]["verdict"] == "survived" for m in everything if m.identity in verdicts
                )
                write(everything, verdicts)
                bar.update(task, advance=1, survived=survived, refresh=True)

            in_children(items, todo, hints, options.jobs, done)

    run_pytest(work)
    write(everything, verdicts)
    entries = [verdicts[mutant.identity] for mutant in everything if mutant.identity in verdicts]
    print(table(entries))
    print(f"beside {sum(item['verdict'] == 'not compiled' for item in entries)} edits that do not compile")
    print(f"{sum(item['seconds'] for item in entries) / 60:.0f} minutes of one core")
    return conclusion(everything, entries)


def stands(entry, names):
    """Whether a recorded verdict, if any, stands: what caught the mutant is still among the tests."""
    if entry is None or entry["verdict"] == "survived":
        return False
    return entry["verdict"] != "caught" or entry["by"] in names or "::" not in entry["by"]


def conclusion(everything, entries):
    """Lists survivors, and reasons that fit no mutant or one that is caught."""
    survivors = [item for item in entries if item["verdict"] == "survived"]
    for item in survivors:
        print(f"survived: {item['file']}:{item['line']} {item['rule']}: {item['after']}")
    used = {stated(mutant) for mutant in everything for stated in (key, place)}
    needless = [stated for stated in EQUIVALENT if stated not in used]
    for stated in needless:
        print(f"equivalent_mutants.py has a reason for what is no mutant: {stated}")
    verdicts = {item["id"]: item["verdict"] for item in entries}
    wrong = [m for m in everything if reason(m) and verdicts.get(m.identity) == "caught"]
    for mutant in wrong:
        print(f"said to be equivalent, but caught: {mutant.file}:{mutant.line}: {mutant.after}")
    return 1 if survivors or needless or wrong or len(entries) < len(everything) else 0


def sample(everything, options):
    """Runs some, and holds their verdicts against those recorded."""
    if not is_current(json.loads(RESULTS.read_text())):
        print("mutations.json is not of these kernels: run python -m tests.mutate_kernels, and commit what it writes")
        return 1
    verdicts = recorded()
    drawn = random.Random(options.seed).sample(everything, len(everything))
    counts, changed = collections.Counter(), []

    def work(items):
        caught_by = {mutant: entry["by"] for mutant, entry in verdicts.items() if entry["verdict"] == "caught"}
        items = [item for item in items if name_of(item) in caught_by.values()]
        names = {name_of(item) for item in items}
        check_baseline(items)
        start = time.monotonic()

        def in_time():
            for mutant in drawn:
                if time.monotonic() - start > options.sample:
                    return
                if caught_by.get(mutant.identity) in names:
                    yield mutant

        def done(mutant, kind, by, seconds):
            counts[kind] += 1
            if kind != "caught":
                changed.append((mutant, kind))

        in_children(items, in_time(), killers_of(verdicts.values()), options.jobs, done)

    run_pytest(work)
    print(f"seed {options.seed}: {counts['caught']} mutants caught again")
    for mutant, kind in changed:
        print(f"{kind}, but was caught before: {mutant.file}:{mutant.line} {mutant.rule}: {mutant.after}")
    return 1 if changed or not counts["caught"] else 0


def run_pytest(work):
    """Collects the tests, and lets ``work`` have them."""
    here = Path(__file__).parent
    names = "matrix", "kernels", "checked", "profile", "conv", "nonfinite", "implicit_gemm"
    files = (here / f"test_{name}.py" for name in names)
    arguments = ["-s", "-m", "not gpu", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:terminal"]
    session = Session(work)
    status = pytest.main([*arguments, *map(str, files)], plugins=[session])
    if not session.items:
        raise RuntimeError(f"pytest ended with status {int(status)} before it ran a test")


def progress():
    """A progress bar that needs no thread: processes are forked beside it."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[survived]} survived"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, auto_refresh=False)


if __name__ == "__main__":
    main()
