"""A peer in a process of its own: ``python -m gpuconv.benchmark.peers.worker NAME cold|warm``.

Two pools of threads in one process slow each other, since idle threads wait by spinning. So a CPU peer runs here and
takes turns with gpuconv: each line that comes in is a request in JSON, each line that goes out is its answer. While it
is not its turn, the process is stopped. Parent and worker draw the same random numbers; a result goes through a file to
be verified.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy

from gpuconv import dtypes
from gpuconv.benchmark import peers
from gpuconv.benchmark.layers import parsed
from gpuconv.benchmark.problem import Problem
from gpuconv.benchmark.timing import Call, Clock
from gpuconv.types import Direction

PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class Worker:
    """The parent's side of it."""

    def __init__(self, name: str, *, cold: bool = False) -> None:
        command = [sys.executable, "-m", __spec__.name, name, "cold" if cold else "warm"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._name = name
        self._folder = tempfile.TemporaryDirectory(prefix="gpuconv-")

    def first(self, case: str, dtype: str, direction: Direction, form: str) -> tuple[float, numpy.ndarray]:
        """The seconds of the first call, and its result; ValueError with the reason where the peer refuses."""
        path = Path(self._folder.name) / "result.npy"
        answer = self._asked(case=case, dtype=dtype, direction=direction, form=form, result=str(path))
        if "refusal" in answer:
            raise ValueError(answer["refusal"])
        return answer["seconds"], numpy.load(path)

    def samples(self, form: str, number: int) -> list[float]:
        """The seconds of each of so many calls of what ``first`` called in this form."""
        samples: list[float] = self._asked(form=form, number=number)["samples"]
        return samples

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # of what a dead process did not read
                pipe.close()
        self._folder.cleanup()

    def _signal(self, name: str) -> None:
        if hasattr(signal, name):  # Windows has neither
            self._process.send_signal(getattr(signal, name))

    def _asked(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._signal("SIGCONT")
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of the peer {self._name} ended with status {self._process.wait()}")
        self._signal("SIGSTOP")
        answer: dict[str, Any] = json.loads(line)
        return answer


def work(name: str, *, cold: bool) -> None:
    """Answers requests until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process when it is interrupted
    if sys.platform == "linux":  # and where the parent is killed, the system does, which wakes a stopped process too
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    peer, clock = peers.module(name), Clock(cold=cold)
    problem, of = None, None
    calls: dict[str, Call] = {}
    answers = sys.stdout
    sys.stdout = sys.stderr  # what a peer prints is no answer
    for line in sys.stdin:
        request = json.loads(line)
        form = request["form"]
        if "number" in request:
            answer: dict[str, Any] = {"samples": clock.samples(calls[form], request["number"])}
        else:
            wanted = request["case"], request["dtype"]
            if of != wanted:
                calls.clear()
                problem, of = _problem(*wanted), wanted
            assert problem is not None
            answer = _prepared(peer, problem, request, calls, clock)
        print(json.dumps(answer), file=answers, flush=True)


def _problem(text: str, dtype: str) -> Problem:
    case = parsed(text)
    return Problem.of(case, case.batches[0], dtypes.named(dtype))


def _prepared(
    peer: Any, problem: Problem, request: dict[str, Any], calls: dict[str, Any], clock: Clock
) -> dict[str, Any]:
    direction, form = request["direction"], request["form"]
    if reason := peer.why_not(problem, direction, form):
        return {"refusal": reason}
    try:
        calls[form] = peer.call(problem, direction, form)
        seconds, result = clock.first(calls[form])
    except (RuntimeError, ValueError, TypeError, MemoryError, NotImplementedError) as error:
        return {"refusal": peers.reason(error)}
    found = peer.array(result, problem)
    numpy.save(request["result"], found.astype(numpy.float32) if found.dtype.itemsize == 2 else found)
    return {"seconds": seconds}


if __name__ == "__main__":
    work(sys.argv[1], cold=sys.argv[2] == "cold")
