"""Runs of tests on mutants, each mutant in a separate process; used by mutate_kernels.py and mutate_python.py."""

import argparse
import collections
import contextlib
import functools
import gc
import itertools
import json
import os
import signal
import time
import traceback
import warnings

import pytest


class Session:
    """A pytest plugin that calls ``work`` with itself after the collection, instead of running the tests."""

    def __init__(self, work):
        self.work = work
        self.items = []
        self.reports = []

    def pytest_runtestloop(self, session):
        self.items = session.items
        self.work(self)
        return True

    def pytest_runtest_logreport(self, report):
        self.reports.append(report)

    def first_failure(self, items, seconds=0):
        """Run tests until one fails; return its name and message, or None. The process ends if one takes too long."""
        for item, following in itertools.zip_longest(items, items[1:]):
            signal.alarm(seconds)
            item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
            signal.alarm(0)
            failed = next((report for report in self.reports if report.failed), None)
            self.reports.clear()
            if failed:
                return name_of(item), failed.longreprtext
        return None

    def check_baseline(self, items):
        """Raise RuntimeError if a test fails on the unchanged sources, because such a test catches no mutant."""
        if failed := answered(*in_child(lambda: self.first_failure(items))):
            raise RuntimeError(f"the tests fail on the sources as they are: {': '.join(failed)}")


def with_tests(arguments, work):
    """Let pytest collect tests and call ``work`` with the Session that has them."""
    session = Session(work)
    options = "--hypothesis-profile=mutants", "-s", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:terminal"
    status = pytest.main([*options, *arguments], plugins=[session])
    if not session.items or status == pytest.ExitCode.INTERNAL_ERROR:
        raise RuntimeError(f"pytest ended with status {int(status)} before the work was done: see above")


def name_of(item):
    """Return the name of a test: its node id relative to the folder of the tests."""
    return item.nodeid.removeprefix("tests/")


def in_child(function):
    """Call a function in a forked process, which inherits all imports; return its process id and its answer."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warning about forking a process with threads, which BLAS has
        child = os.fork()
    if child == 0:
        os.setpgid(0, 0)  # one process group with all processes that tests start
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.write(writer, json.dumps(function()).encode())
        except BaseException:  # even if a test ends the run, this process must not continue the caller's work
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writer)
    return child, os.fdopen(reader, "rb")


def answered(child, answer):
    """Return the answer of a forked process; raise RuntimeError if it ended without one."""
    with answer:
        text = answer.read()
    os.waitpid(child, 0)
    if not text:
        raise RuntimeError("a process that ran tests ended before it was done: see above")
    return json.loads(text)


def in_children(verdict, todo, jobs, done):
    """Call ``verdict(mutant, likely)`` for each mutant, ``jobs`` at a time, then ``done(mutant, kind, by, seconds)``.

    ``likely`` has the names of tests that caught other mutants of the file, those of the nearest lines first.
    """
    running = {}
    todo = iter(todo)
    killers = collections.defaultdict(dict)  # by file: tests, and the line of the last mutant that each caught
    gc.freeze()  # otherwise the garbage collector of each child would copy shared memory
    while True:
        while len(running) < jobs and (mutant := next(todo, None)) is not None:
            likely = nearest(killers[mutant.file], mutant.line)
            child, answer = in_child(functools.partial(verdict, mutant, likely))
            running[child] = mutant, answer, time.monotonic()
        if not running:
            return
        child, status = os.wait()
        if child not in running:  # it was not started here
            continue
        mutant, answer, start = running.pop(child)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # processes that tests started and did not end
        with answer:
            text = answer.read()
        if os.waitstatus_to_exitcode(status) > 0:
            raise RuntimeError(f"the verdict of {mutant.file}:{mutant.line} {mutant.after} failed: see above")
        ended = f"the process was ended by {signal.Signals(status & 0x7F).name}" if os.WIFSIGNALED(status) else ""
        kind, by = json.loads(text) if text else ("caught", ended)
        if kind == "caught":
            killers[mutant.file][by] = mutant.line
        done(mutant, kind, by, round(time.monotonic() - start, 1))


def nearest(line_of, line):
    """Return the twelve tests that caught the mutants nearest to a line."""
    return sorted(line_of, key=lambda name: abs(line_of[name] - line))[:12]


def stands(entry, names):
    """Return whether a recorded verdict exists and is valid: the test that caught the mutant still exists."""
    if entry is None or entry["verdict"] == "survived":
        return False
    return entry["verdict"] != "caught" or entry["by"] in names or "::" not in entry["by"]


def write(path, head, entries):
    """Write a record with one line per mutant, so that the change of one mutant is the change of one line."""
    lines = ",\n".join(json.dumps(item) for item in entries)
    scratch = path.with_suffix(".part")
    scratch.write_text(f'{json.dumps(head)[:-1]}, "mutants": [\n{lines}\n]}}\n')
    os.replace(scratch, path)


def row(name, count):
    """Return a line of a table: the number of mutants of a place by verdict, and the score."""
    caught, survived = count["caught"], count["survived"]
    total = caught + survived + count["equivalent"]
    score = f"{100 * caught / (caught + survived):.1f} %" if caught + survived else "-"
    return f"| {name} | {total} | {caught} | {count['equivalent']} | {survived} | {score} |"


def table(entries, place_of):
    """Return counts and score, for each place and in total."""
    counts = collections.defaultdict(collections.Counter)
    for item in entries:
        counts[place_of(item)][item["verdict"]] += 1
    everything = sum(counts.values(), collections.Counter())
    lines = ["| where | mutants | caught | equivalent | survived | score |", "|---|--:|--:|--:|--:|--:|"]
    return "\n".join([*lines, *(row(name, count) for name, count in counts.items()), row("**all**", everything)])


def positive(text):
    """Return an option's value as a positive int."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be an int of at least 1, got {text!r}")
    return int(text)


def progress():
    """Return a progress bar without a thread, because processes are forked while it is shown."""
    from rich.progress import MofNCompleteColumn, Progress, TextColumn

    counts = MofNCompleteColumn(), TextColumn("{task.fields[survived]} survived")
    return Progress(*Progress.get_default_columns(), *counts, auto_refresh=False)
