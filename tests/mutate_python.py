"""Do the tests notice when the Python of gpuconv is wrong? ``python -m tests.mutate_python``

Draws places of gpuconv/ at random, of each file as many as its size asks for, and has cosmic-ray edit them, one at a
time. All tests run once under coverage; a mutant then meets those that run its line: the record of plans, and for TRIED
seconds others, the fastest of each test function first, until one fails. What is edited lies inside functions: a forked
process has them run the edited code, with all that was imported and collected before. The record also says of each
caught mutant whether its test catches it alone, without the tests that came before it in that process.

    python -m tests.cupy_on_cpu python -m tests.mutate_python               all, into python_mutations.json
    python -m tests.cupy_on_cpu python -m tests.mutate_python --sample 60   recorded ones, as many as 60 seconds allow

A run that is interrupted goes on where it stopped. Exit status 1 where mutants survive for which equivalent_python.py
has no reason, or, for a sample, where a mutant is not caught again.
"""

import argparse
import collections
import datetime
import functools
import importlib
import json
import os
import pkgutil
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # one process for each core

import coverage

import gpuconv
from tests import mutation_runs, python_mutants
from tests.backends import why_not
from tests.equivalent_python import EQUIVALENT
from tests.mutation_runs import answered, in_child, in_children, name_of, positive, progress, stands, with_tests

RESULTS = Path(__file__).parent / "python_mutations.json"
DRAWN = 1040  # mutants: a few of them cannot be run
SEED = 0  # draws them
TRIED = 40.0  # seconds of tests that a mutant meets
PLANS = "test_recorded_plans.py::"  # which notice most
SLOWEST = 60  # seconds that a test may take: mutated loops may never end
MEMORY = 4 << 30  # bytes that it may allocate


def collected(work):
    """Collects all tests of a plain run, and calls ``work`` with them."""
    for module in pkgutil.walk_packages(gpuconv.__path__, "gpuconv."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    globs = (f"--doctest-glob={pages}" for pages in ("README.md", "gpuconv/guide/*.md"))
    with_tests(("--doctest-modules", "--doctest-ignore-import-errors", *globs), work)


class Observed:
    """Which tests run which lines, and how long each takes; those that fail are left out.

    They run as they do on a mutant, on code that is compiled from the texts as they are.
    """

    def __init__(self, session, live, jobs):
        items = [item for item in session.items if not why_not(item)]
        self.seconds, self.tests_of_line = {}, {}
        with tempfile.TemporaryDirectory() as folder:
            shares = [items[i::jobs] for i in range(jobs)]
            running = [
                in_child(functools.partial(self._run, session, live, share, str(Path(folder, str(i)))))
                for i, share in enumerate(shares)
            ]
            for i, process in enumerate(running):
                self.seconds |= answered(*process)
                self._add_lines(str(Path(folder, str(i))))
        self.items = {name_of(item): item for item in items if name_of(item) in self.seconds}
        for item in items:
            if name_of(item) not in self.items:
                print(f"fails under coverage, and catches nothing: {item.nodeid}", file=sys.stderr)

    def _run(self, session, live, items, path):
        """Runs tests under coverage: the seconds of each that passes."""
        limit_memory()
        for file in python_mutants.files():
            live.run(file, (python_mutants.ROOT / file).read_text())
        observer = coverage.Coverage(
            path, include=[f"{python_mutants.ROOT}/gpuconv/*"], config_file=False, messages=False
        )
        observer.start()
        seconds = {}
        for item in items:
            live.forget("gpuconv")  # or only the first of several tests would run what is remembered
            observer.switch_context(name_of(item))
            start = time.monotonic()
            if session.first_failure([item], SLOWEST) is None:
                seconds[name_of(item)] = time.monotonic() - start
        observer.stop()
        observer.save()
        return seconds

    def _add_lines(self, path):
        data = coverage.CoverageData(path)
        data.read()
        for file in data.measured_files():
            lines = self.tests_of_line.setdefault(os.path.relpath(file, python_mutants.ROOT), {})
            for line, names in data.contexts_by_lineno(file).items():
                lines.setdefault(line, set()).update(name for name in names if name in self.seconds)

    def tests(self, mutant, likely):
        """Those that run a mutant's line: likely ones, plans, then the fastest of each test function, then others."""
        lines = self.tests_of_line.get(mutant.file, {})
        begun = max((line for line in lines if line <= mutant.line), default=0)  # of a statement of several lines
        reached = lines.get(begun, ())
        by_speed = sorted(reached, key=self.seconds.__getitem__)
        fastest = {}
        for name in by_speed:
            fastest.setdefault(name.partition("[")[0], name)
        first = dict.fromkeys(name for name in (*likely, *by_speed) if name in likely or name.startswith(PLANS))
        yield from (self.items[name] for name in first if name in reached)
        spent = 0.0
        for name in dict.fromkeys((*fastest.values(), *by_speed)):
            if spent > TRIED:
                return
            if name not in first:
                yield self.items[name]
                spent += self.seconds[name]


def limit_memory():
    """What tests allocate beyond MEMORY is refused from now on."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))


def verdict(session, tests, live, mutant, likely):
    """("caught", the test), ("survived", "") or ("not run", the reason)."""
    limit_memory()
    try:
        live.run(mutant.file, mutant.text)
    except ValueError as error:  # a nested function that uses other variables cannot be given to one that exists
        return "not run", str(error)
    failure = session.first_failure(list(tests(mutant, likely)), SLOWEST)
    return ("survived", "") if failure is None else ("caught", failure[0])


def run_again(session, live, killers, mutants, jobs, done):
    """Runs mutants with the one test that caught each, by identity in ``killers``: other tests came before it then."""
    in_children(
        functools.partial(verdict, session, lambda mutant, likely: [killers[mutant.identity]], live),
        mutants,
        jobs,
        done,
    )


def recorded():
    """The verdicts of python_mutations.json by identity."""
    if not RESULTS.exists():
        return {}
    return {entry["id"]: judged(entry) for entry in json.loads(RESULTS.read_text())["mutants"]}


def key(entry):
    """What EQUIVALENT knows a mutant by."""
    return entry["file"], entry["where"], entry["before"], entry["after"]


def entry_of(mutant, kind, by, seconds):
    entry = mutant._asdict() | {"id": mutant.identity, "verdict": kind, "by": by, "seconds": seconds}
    del entry["text"], entry["identity"]
    return judged(entry)


def judged(entry):
    """An entry that says "equivalent" where EQUIVALENT has a reason, and "survived" where it has none."""
    if entry["verdict"] not in ("survived", "equivalent"):
        return entry
    reason = EQUIVALENT.get(key(entry))
    return entry | ({"verdict": "equivalent", "by": reason} if reason else {"verdict": "survived", "by": ""})


def table(entries):
    """Counts and score, for each folder of the package."""
    return mutation_runs.table(entries, lambda entry: f"`{Path(entry['file']).parent}/`")


def full(options):
    """Runs what has no verdict that stands, and writes python_mutations.json."""
    mutants = {mutant.identity: mutant for mutant in python_mutants.drawn(DRAWN, SEED)}
    verdicts = {
        name: judged(entry | {"file": mutants[name].file, "line": mutants[name].line})  # which may have moved
        for name, entry in recorded().items()
        if name in mutants
    }
    head = {"seed": SEED, "date": datetime.date.today().isoformat()}

    def write():
        mutation_runs.write(RESULTS, head, [verdicts[name] for name in mutants if name in verdicts])

    def work(session):
        live = python_mutants.Live()
        observed = Observed(session, live, options.jobs)
        todo = [mutant for name, mutant in mutants.items() if not stands(verdicts.get(name), observed.items)]
        todo.sort(key=lambda mutant: mutant.identity in verdicts)  # first a record without gaps
        with progress() as bar:
            task = bar.add_task("mutants", total=len(todo), survived=0)

            def done(mutant, kind, by, seconds):
                verdicts[mutant.identity] = entry_of(mutant, kind, by, seconds)
                survived = sum(entry["verdict"] == "survived" for entry in verdicts.values())
                write()
                bar.update(task, advance=1, survived=survived, refresh=True)

            in_children(functools.partial(verdict, session, observed.tests, live), todo, options.jobs, done)

        def known(mutant, kind, by, seconds):
            verdicts[mutant.identity]["alone"] = kind == "caught"

        killers = {name: observed.items.get(entry["by"]) for name, entry in verdicts.items() if "alone" not in entry}
        again = [mutants[name] for name, item in killers.items() if item]
        run_again(session, live, killers, again, options.jobs, known)

    collected(work)
    write()
    return conclusion(verdicts.values())


def conclusion(entries):
    """Prints counts, survivors, and reasons that nothing needs: the exit status."""
    print(table(entries))
    print(f"beside {sum(entry['verdict'] == 'not run' for entry in entries)} edits that cannot be run")
    survivors = [entry for entry in entries if entry["verdict"] == "survived"]
    for entry in survivors:
        print(f"survived: {entry['file']}:{entry['line']} {entry['before']}  ->  {entry['after']}")
    needless = set(EQUIVALENT) - {key(entry) for entry in entries if entry["verdict"] == "equivalent"}
    for stated in needless:
        print(f"equivalent_python.py has a reason for what does not survive: {stated}")
    return 1 if survivors or needless else 0


def sample(options):
    """Runs recorded mutants again that one test catches without others before it."""
    entries = [entry for entry in recorded().values() if entry.get("alone")]
    drawn = random.Random(options.seed).sample(entries, len(entries))
    counts, changed = collections.Counter(), []

    def work(session):
        items = {name_of(item): item for item in session.items if not why_not(item)}
        live = python_mutants.Live()
        start = time.monotonic()
        killers = {}

        def in_time():
            for entry in drawn:
                if time.monotonic() - start > options.sample:
                    return
                mutant = python_mutants.found(entry) if entry["by"] in items else None
                counts["found" if mutant else "gone"] += 1
                if mutant:
                    killers[mutant.identity] = items[entry["by"]]
                    yield mutant

        def done(mutant, kind, by, seconds):
            counts[kind] += 1
            if kind != "caught":
                changed.append((mutant, kind))

        run_again(session, live, killers, in_time(), options.jobs, done)
        session.check_baseline(list(dict.fromkeys(killers.values())))

    collected(work)
    print(
        f"seed {options.seed}: {counts['caught']} mutants caught again;"
        f" of {counts['gone']} the code or the test has changed"
    )
    for mutant, kind in changed:
        print(f"{kind}, but was caught before: {mutant.file}:{mutant.line} {mutant.before}  ->  {mutant.after}")
    if counts["gone"] > counts["found"] / 4:
        print("the record is of other code: run python -m tests.mutate_python, and commit what it writes")
        return 1
    return 1 if changed or not counts["caught"] else 0


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.mutate_python", description=__doc__.split("\n\n")[0])
    parser.add_argument("--sample", type=positive, metavar="SECONDS", help="recorded ones, as many as this time allows")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sample (default 0)")
    parser.add_argument(
        "--jobs", type=positive, default=len(os.sched_getaffinity(0)), metavar="N", help="default: all cores"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gpuconv-home-") as home:
        os.environ["HOME"] = home  # a mutant may take another folder than that of GPUCONV_CACHE_DIR
        sys.exit((sample if options.sample else full)(options))


if __name__ == "__main__":
    main()
