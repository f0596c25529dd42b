"""A peer in a separate process: ``python -m gpuconv.benchmark.peers.worker NAME cold|warm``.

Two thread pools in one process slow each other down, because idle threads spin. A CPU peer therefore runs in this
process, alternating with gpuconv. Each line of the standard input is a request in JSON, each line of the standard
output is its answer. The process is stopped (SIGSTOP) while it has no request. Parent and worker draw the same random
numbers; a result is passed to the parent in a file, to be verified.
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

PR_SET_PDEATHSIG = 1  # from linux/prctl.h


class Worker:
    """The worker process, as the parent controls it."""

    def __init__(self, name: str, *, cold: bool = False) -> None:
        command = [sys.executable, "-m", __spec__.name, name, "cold" if cold else "warm"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._name = name
        self._folder = tempfile.TemporaryDirectory(prefix="gpuconv-")

    def first(self, case: str, dtype: str, direction: Direction, form: str) -> tuple[float, numpy.ndarray]:
        """Return the seconds and the result of the first call; raise ValueError with the reason if the peer refuses."""
        path = Path(self._folder.name) / "result.npy"
        answer = self._asked(case=case, dtype=dtype, direction=direction, form=form, result=str(path))
        if "refusal" in answer:
            raise ValueError(answer["refusal"])
        return answer["seconds"], numpy.load(path)

    def samples(self, form: str, number: int) -> list[float]:
        """Return the seconds of each of a number of calls of the function that ``first`` called in this form."""
        samples: list[float] = self._asked(form=form, number=number)["samples"]
        return samples

    def close(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # from data that the dead process has not read
                pipe.close()
        self._folder.cleanup()

    def _signal(self, name: str) -> None:
        if hasattr(signal, name):  # Windows has neither SIGCONT nor SIGSTOP
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
    """Answer requests until the end of the standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # if the parent is interrupted, it kills this process
    if sys.platform == "linux":  # if the parent is killed, the kernel kills this process, even while it is stopped
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    peer, clock = peers.module(name), Clock(cold=cold)
    problem, of = None, None
    calls: dict[str, Call] = {}
    answers = sys.stdout
    sys.stdout = sys.stderr  # the output of a peer must not be taken for an answer
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
