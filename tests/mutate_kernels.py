"""Mutation testing of the kernels: ``python -m tests.mutate_kernels``

The CUDA sources are edited by rules, at every place where a rule applies, one place at a time. The tests of the kernels
run on each edited text until one fails: on the CPU, first in fast mode, then with every access checked. The score is
the share of caught mutants among all mutants except equivalent ones (EQUIVALENT has the reason for each).
mutations.json has the verdicts and hashes of the sources. An interrupted run can be resumed. After a change of the
kernels or the tests, the mutants of changed functions and structs run again, and so do those whose test no longer
exists.

    python -m tests.mutate_kernels                      all mutants, on all cores
    python -m tests.mutate_kernels --sample 60 --seed 7 mutants drawn at random for 60 seconds; changes no file

The exit status is 1 if a mutant survives or, for a sample, if the verdicts of mutations.json are of other sources.
"""

import argparse
import collections
import contextlib
import datetime
import functools
import json
import os
import random
import re
import sys
import time
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # there is one process per core

from gpuconv.geometry import DIRECTIONS
from gpuconv.gpu import report
from tests import mutation_runs
from tests.backends import backend_of
from tests.emulation import launcher, loader
from tests.emulation.edited import edited
from tests.equivalent_mutants import EQUIVALENT
from tests.mutants import FILES, TRIED_BY, hashes, mutants, read
from tests.mutation_runs import in_children, name_of, positive, progress, stands, with_tests

RESULTS = Path(__file__).parent / "mutations.json"
SAME_CODE = "the compiler makes the same code of it"
SECONDS = 5.0  # time limit of a launch, because mutated loops may not terminate
MANY = 20  # tests that most mutants do not pass
FEW = 6  # tests that a mutant passes which is stated to be equivalent

# ------------------------------------------------------------------------------------------------- running tests


def in_order(items):
    """Return the tests of the kernels, ordered by the number of mutants that they caught, checked mode last."""
    caught = collections.Counter(entry["by"] for entry in recorded().values())
    of_kernels = [item for item in items if backend_of(item) in ("emulated", "checked")]
    return sorted(of_kernels, key=lambda item: (backend_of(item) == "checked", -caught[name_of(item)]))


def algorithm_of(item):
    """Return the algorithm that a test runs, or None if it runs several or other than public ones."""
    stem = Path(item.fspath).stem.removeprefix("test_")
    if stem in ("bias_grad", "depthwise"):
        return stem
    if stem in ("implicit_gemm", "gemm_packing", "split_sum"):
        return "implicit_gemm"
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return params.get("algorithm", "scatter_plain" if "plain" in item.originalname else None)


def concerns(item, mutant):
    """Return whether a test may catch a mutant: it runs the kernel, or a kernel of the file."""
    params, algorithm = item.callspec.params if hasattr(item, "callspec") else {}, algorithm_of(item)
    runs = {algorithm.removesuffix("_plain")} if algorithm else {"direct", "scatter"}
    if runs.isdisjoint(TRIED_BY[mutant.file]):
        return False
    if mutant.where.endswith("_plain") and algorithm in ("scatter", "direct"):
        return False
    if mutant.where != mutant.file and algorithm == "scatter_plain" and not mutant.where.endswith("_plain"):
        return False
    directions = [direction for direction in DIRECTIONS if direction in mutant.where]
    return "direction" not in params or not directions or params["direction"] in directions


def verdict(session, items, hints, mutant, likely):
    """Return ("caught", test), ("equivalent", reason), ("not compiled", error) or ("survived", "")."""
    tried_first = dict.fromkeys((*hints.get((mutant.file, mutant.after), ()), *likely))
    rank = {name: number for number, name in enumerate(tried_first)}
    chosen = [item for item in items if concerns(item, mutant)]
    first = sorted((item for item in chosen if name_of(item) in rank), key=lambda item: rank[name_of(item)])
    rest = [item for item in chosen if name_of(item) not in rank]
    if reason(mutant):
        kind, by = tried(session, [*first, *rest[:FEW]], mutant)
        return ("equivalent", reason(mutant)) if kind == "survived" else (kind, by)
    kind, by = tried(session, [*first, *rest[:MANY]], mutant)
    if kind == "survived" and same_code(mutant):
        return "equivalent", SAME_CODE
    return tried(session, rest[MANY:], mutant) if kind == "survived" else (kind, by)


def tried(session, items, mutant):
    """Run tests on a mutant until one fails; return ("caught", test), ("not compiled", error) or ("survived", "")."""
    with edited(mutant.file, mutant.text), launcher.using(seconds=SECONDS):
        failure = session.first_failure(items)
    if failure is None:
        return "survived", ""
    name, text = failure
    if "BuildError" in text:
        error = re.search(r"error: .*", text)
        return "not compiled", error[0] if error else "?"
    return "caught", name


def modules_with(file):
    """Return the compiled modules whose source has a file."""
    stems = TRIED_BY[file] if file.endswith(".cuh") else (Path(file).stem,)
    return [module for module in report.modules() if module.stem in stems]


def same_code(mutant):
    """Return whether an optimizing compiler makes the same library of the mutant, for all modules with its file."""
    modules = modules_with(mutant.file)

    def code(module):
        return loader.library_file(loader.emulated_source(module), "optimized").read_bytes()

    built = [code(module) for module in modules]
    with edited(mutant.file, mutant.text), contextlib.suppress(loader.BuildError):  # a module that no test uses
        return all(code(module) == before for module, before in zip(modules, built, strict=True))
    return False


# ------------------------------------------------------------------------------------------------- results


def key(mutant):
    """Return the key of a mutant in EQUIVALENT: its file, and the line before and after, without comments."""
    return mutant.file, mutant.before.partition("  //")[0], mutant.after.partition("  //")[0]


def place(mutant):
    """Return the key with the number of the line among equal lines of the file."""
    before = mutant.before
    return *key(mutant), sum(line.strip() == before for line in read(mutant.file).splitlines()[: mutant.line])


def reason(mutant):
    """Return why a mutant is equivalent, or None."""
    return EQUIVALENT.get(key(mutant)) or EQUIVALENT.get(place(mutant))


def recorded():
    """Return the verdicts of mutations.json by identity."""
    if not RESULTS.exists():
        return {}
    return {entry["id"]: entry for entry in json.loads(RESULTS.read_text())["mutants"]}


def entry(mutant, kind, by, seconds):
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


def killers_of(entries, names):
    """Return the tests that caught mutants, by file and mutated line; they are likely to catch them again.

    A test that no longer exists is replaced by the most similar ones: the same function, and most values in common.
    """
    by_function = collections.defaultdict(list)
    for name in names:
        by_function[name.partition("[")[0]].append(name)

    @functools.cache
    def likely(killer):
        values = collections.Counter(re.split(r"[\[\]-]", killer))
        others = by_function[killer.partition("[")[0]]
        return sorted(others, key=lambda name: -(values & collections.Counter(re.split(r"[\[\]-]", name))).total())[:3]

    return {(item["file"], item["after"]): likely(item["by"]) for item in entries if item["verdict"] == "caught"}


def write(everything, verdicts):
    """Write one line per mutant, so that the change of one mutant is the change of one line."""
    entries = [verdicts[mutant.identity] for mutant in everything if mutant.identity in verdicts]
    head = {"sources": hashes(), "date": datetime.date.today().isoformat(), "complete": len(entries) == len(everything)}
    mutation_runs.write(RESULTS, head, entries)


def is_current(content):
    """Return whether recorded verdicts are those of the current kernels."""
    return content["complete"] and content["sources"] == hashes()


def table(entries):
    """Return counts and score of each kernel and of the code that kernels share."""
    return mutation_runs.table(
        entries, lambda item: f"{item['where']}, shared" if item["where"] in FILES else f"`{item['where']}`"
    )


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.mutate_kernels", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--sample",
        type=positive,
        metavar="SECONDS",
        help="as many as this time allows, drawn at random, after the tests have passed on the kernels as they are",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sample (default 0)")
    parser.add_argument(
        "--jobs", type=positive, default=len(os.sched_getaffinity(0)), metavar="N", help="default: all cores"
    )
    options = parser.parse_args()
    if loader.why_not():
        parser.error(loader.why_not())
    everything = mutants()
    run = sample if options.sample else full
    sys.exit(run(everything, options))


def full(everything, options):
    """Run the mutants without a verdict and write mutations.json."""
    verdicts = recorded()
    known = [mutant for mutant in everything if mutant.identity in verdicts]
    for mutant in known:  # a reason may have been added or removed
        old = verdicts[mutant.identity]
        old["line"] = mutant.line
        if old["verdict"] == "survived" and reason(mutant):
            verdicts[mutant.identity] = entry(mutant, "equivalent", reason(mutant), old["seconds"])
    print(f"{len(everything)} mutants, {len(known)} of them have a verdict")

    def work(session):
        items = in_order(session.items)
        names = {name_of(item) for item in items}
        todo = [mutant for mutant in everything if not stands(verdicts.get(mutant.identity), names)]
        order = (None, "survived", "caught")  # mutants without a verdict first, so that the record is complete early
        todo.sort(key=lambda mutant: order.index(verdicts.get(mutant.identity, {}).get("verdict")))
        hints = killers_of(verdicts.values(), names)
        session.check_baseline(items)
        with progress() as bar:
            task = bar.add_task("mutants", total=len(todo), survived=0)

            def done(mutant, kind, by, seconds):
                verdicts[mutant.identity] = entry(mutant, kind, by, seconds)
                survived = sum(
                    verdicts[m.identity]["verdict"] == "survived" for m in everything if m.identity in verdicts
                )
                write(everything, verdicts)
                bar.update(task, advance=1, survived=survived, refresh=True)

            in_children(functools.partial(verdict, session, items, hints), todo, options.jobs, done)

    with_kernel_tests(work)
    write(everything, verdicts)
    entries = [verdicts[mutant.identity] for mutant in everything if mutant.identity in verdicts]
    print(table(entries))
    print(f"beside {sum(item['verdict'] == 'not compiled' for item in entries)} edits that do not compile")
    print(f"{sum(item['seconds'] for item in entries) / 60:.0f} minutes of one core")
    return conclusion(everything, entries)


def conclusion(everything, entries):
    """Print survivors, and reasons that apply to no mutant or to a caught one; return the exit status."""
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
    """Run a sample of the mutants and compare the verdicts with the recorded ones."""
    if not is_current(json.loads(RESULTS.read_text())):
        print("mutations.json is not of these kernels: run python -m tests.mutate_kernels, and commit what it writes")
        return 1
    verdicts = recorded()
    drawn = random.Random(options.seed).sample(everything, len(everything))
    counts, changed = collections.Counter(), []

    def work(session):
        caught_by = {mutant: entry["by"] for mutant, entry in verdicts.items() if entry["verdict"] == "caught"}
        items = [item for item in in_order(session.items) if name_of(item) in caught_by.values()]
        names = {name_of(item) for item in items}
        session.check_baseline(items)
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

        hints = killers_of(verdicts.values(), names)
        in_children(functools.partial(verdict, session, items, hints), in_time(), options.jobs, done)

    with_kernel_tests(work)
    print(f"seed {options.seed}: {counts['caught']} mutants caught again")
    for mutant, kind in changed:
        print(f"{kind}, but was caught before: {mutant.file}:{mutant.line} {mutant.rule}: {mutant.after}")
    return 1 if changed or not counts["caught"] else 0


def with_kernel_tests(work):
    """Collect the tests that run kernels and call ``work`` with them."""
    here = Path(__file__).parent
    names = (
        *("matrix", "kernels", "checked", "profile", "conv", "nonfinite"),
        *("implicit_gemm", "gemm_packing", "split_sum", "bias_grad", "depthwise"),
    )
    with_tests(["-m", "not gpu", *(str(here / f"test_{name}.py") for name in names)], work)


if __name__ == "__main__":
    main()
