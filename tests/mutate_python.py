"""Mutation testing of gpuconv's Python: ``python -m tests.mutate_python``

Places in gpuconv/ are drawn at random, in proportion to the size of each file, and cosmic-ray edits them one at a time.
All tests run once under coverage. The tests that run the line of a mutant are then run on it until one fails: the
record of plans, and for TRIED seconds others, the fastest of each test function first. Only functions are edited: in a
forked process, which inherits all imports and the collected tests, they run the edited code. For each caught mutant the
record also says whether its test catches it alone, without the tests that ran before it in that process.

    python -m tests.cupy_on_cpu python -m tests.mutate_python               all, recorded in python_mutations.json
    python -m tests.cupy_on_cpu python -m tests.mutate_python --sample 60   recorded mutants, for 60 seconds

Recorded mutants are first run again with the tests that caught them. An interrupted run can be resumed. The exit status
is 1 if a mutant survives for which equivalent_python.py has no reason or, for a sample, if a mutant is not caught
again.
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

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # there is one process per core

import coverage

import gpuconv
from tests import mutation_runs, python_mutants
from tests.backends import why_not
from tests.equivalent_python import EQUIVALENT
from tests.mutation_runs import answered, in_child, in_children, name_of, positive, progress, stands, with_tests

RESULTS = Path(__file__).parent / "python_mutations.json"
DRAWN = 1040  # mutants: a few of them cannot be run
SEED = 0  # draws them
TRIED = 40.0  # seconds of tests per mutant
PLANS = "test_recorded_plans.py::"  # the tests that catch most mutants
SLOWEST = 60  # time limit of a test in seconds, because mutated loops may not terminate
MEMORY = 4 << 30  # bytes that a test may allocate


def collected(work):
    """Collect all tests of a plain run and call ``work`` with them."""
    for module in pkgutil.walk_packages(gpuconv.__path__, "gpuconv."):
        # Cubed imports zarr, which has a plugin that pytest must import itself.
        if not module.name.endswith(("__main__", "gpuconv.cubed")):
            importlib.import_module(module.name)
    globs = (f"--doctest-glob={pages}" for pages in ("README.md", "gpuconv/guide/*.md"))
    with_tests(("--doctest-modules", "--doctest-ignore-import-errors", *globs), work)


class Observed:
    """The lines that each test runs, and its time; failing tests are omitted.

    The tests run as on a mutant, on code that is compiled from the current texts.
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
        """Run tests under coverage and return the seconds of each test that passes."""
        limit_memory()
        for file in python_mutants.files():
            live.run(file, (python_mutants.ROOT / file).read_text())
        observer = coverage.Coverage(
            path, include=[f"{python_mutants.ROOT}/gpuconv/*"], config_file=False, messages=False
        )
        observer.start()
        seconds = {}
        for item in items:
            live.forget("gpuconv")  # otherwise only the first of several tests would run cached functions
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
        """Return the tests that run a mutant's line: likely ones, plans, the fastest of each function, others."""
        lines = self.tests_of_line.get(mutant.file, {})
        begun = max((line for line in lines if line <= mutant.line), default=0)  # a statement may have several lines
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
    """Limit the memory that tests can allocate from now on to MEMORY."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))


def verdict(session, tests, live, mutant, likely):
    """Return ("caught", test), ("survived", "") or ("not run", reason)."""
    limit_memory()
    try:
        live.run(mutant.file, mutant.text)
    except ValueError as error:  # code with other free variables cannot replace that of an existing nested function
        return "not run", str(error)
    failure = session.first_failure(list(tests(mutant, likely)), SLOWEST)
    return ("survived", "") if failure is None else ("caught", failure[0])


def run_again(session, live, killers, mutants, jobs, done):
    """Run each mutant with only the test in ``killers`` that caught it; other tests preceded it at that time."""
    in_children(
        functools.partial(verdict, session, lambda mutant, likely: [killers[mutant.identity]], live),
        mutants,
        jobs,
        done,
    )


def recorded():
    """Return the verdicts of python_mutations.json by identity."""
    if not RESULTS.exists():
        return {}
    return {entry["id"]: judged(entry) for entry in json.loads(RESULTS.read_text())["mutants"]}


def key(entry):
    """Return the key of a mutant in EQUIVALENT."""
    return entry["file"], entry["where"], entry["before"], entry["after"]


def entry_of(mutant, kind, by, seconds):
    entry = mutant._asdict() | {"id": mutant.identity, "verdict": kind, "by": by, "seconds": seconds}
    del entry["text"], entry["identity"]
    return judged(entry)


def judged(entry):
    """Return an entry with "equivalent" or "survived" depending on whether EQUIVALENT has a reason."""
    if entry["verdict"] not in ("survived", "equivalent"):
        return entry
    reason = EQUIVALENT.get(key(entry))
    return entry | ({"verdict": "equivalent", "by": reason} if reason else {"verdict": "survived", "by": ""})


def table(entries):
    """Return counts and score of each folder of the package."""
    return mutation_runs.table(entries, lambda entry: f"`{Path(entry['file']).parent}/`")


def full(options):
    """Run the mutants without a valid verdict and write python_mutations.json.

    A recorded verdict is valid if its test exists and, for tests that caught their mutant alone, catches it again.
    """
    mutants = {mutant.identity: mutant for mutant in python_mutants.drawn(DRAWN, SEED)}
    verdicts = {
        name: judged(entry | {"file": mutants[name].file, "line": mutants[name].line})  # the line may have changed
        for name, entry in recorded().items()
        if name in mutants
    }
    head = {"seed": SEED, "date": datetime.date.today().isoformat()}

    def write():
        mutation_runs.write(RESULTS, head, [verdicts[name] for name in mutants if name in verdicts])

    def work(session):
        live = python_mutants.Live()
        observed = Observed(session, live, options.jobs)

        def confirmed(mutant, kind, by, seconds):
            if kind != "caught":
                del verdicts[mutant.identity]

        alone = {name: observed.items.get(entry["by"]) for name, entry in verdicts.items() if entry.get("alone")}
        again = [mutants[name] for name, item in alone.items() if item]
        run_again(session, live, alone, again, options.jobs, confirmed)
        print(f"{len(again)} recorded mutants have run again")
        todo = [mutant for name, mutant in mutants.items() if not stands(verdicts.get(name), observed.items)]
        todo.sort(key=lambda mutant: mutant.identity in verdicts)  # those without a verdict first
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
    """Print counts, survivors and unused reasons; return the exit status."""
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
    """Run recorded mutants again that a test catches alone."""
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
        os.environ["HOME"] = home  # a mutant may use a folder other than that of GPUCONV_CACHE_DIR
        sys.exit((sample if options.sample else full)(options))


if __name__ == "__main__":
    main()
