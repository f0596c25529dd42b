"""The threads of the NumPy backend: distribution of the work, and restoration of the BLAS setting."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import threadpoolctl

import gpuconv
from gpuconv import threads
from tests import tiers

LAYER = {"padding": 1, "algorithm": "winograd"}


LIBRARIES = threadpoolctl.ThreadpoolController().select(user_api="blas").lib_controllers


def blas_threads():
    return [library.num_threads for library in LIBRARIES]


@pytest.fixture(autouse=True)
def left_as_found(small_in_threads):
    before = blas_threads()
    yield
    assert blas_threads() == before
    assert threads._blas.limits == []
    assert threads._helpers.busy == 0


@pytest.fixture
def xw(rng):
    return rng.standard_normal((4, 32, 28, 28), np.float32), rng.standard_normal((32, 32, 3, 3), np.float32)


def planned(x, w, **options):
    """Return the plan of a forward convolution as text, with the number of threads of each loop."""
    return str(gpuconv.explain(x.shape, w.shape, **options, backend="numpy").plan)


def test_every_task_is_done_once():
    done = []
    threads.spread(range(1000), lambda tasks: done.extend(tasks), 3)
    assert sorted(done) == list(range(1000))


def test_workers_compute_at_the_same_time_with_blas_held_to_one_thread():
    meeting = threading.Barrier(3, timeout=20)
    seen = []

    def worker(tasks):
        for task in tasks:
            meeting.wait()  # all threads must arrive before any continues
            seen.append((task, threading.get_ident(), *blas_threads()))

    threads.spread(range(3), worker, 3)
    assert len({thread for _, thread, *_ in seen}) == 3
    assert {count for _, _, *counts in seen for count in counts} == {1}


def test_one_worker_is_the_caller_with_blas_as_it_is():
    before, seen = blas_threads(), []
    threads.spread(
        range(3), lambda tasks: seen.extend((task, threading.get_ident(), blas_threads()) for task in tasks), 1
    )
    assert seen == [(task, threading.get_ident(), before) for task in range(3)]


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or threads.cores() < 2, reason="needs two cores and a thread's affinity"
)
def test_a_helper_leaves_the_core_of_its_caller_to_it(monkeypatch):
    allowed, both = os.sched_getaffinity(0), threading.Barrier(2, timeout=60)
    for core in allowed:
        monkeypatch.setattr(threads, "_core", lambda core=core: core)
        found = []

        def worker(tasks):
            for _ in tasks:
                both.wait()
                found.append((threading.current_thread().name, os.sched_getaffinity(0)))  # noqa: B023

        threads.spread(range(2), worker, 2)
        assert sorted(found) == [("MainThread", allowed), ("gpuconv", allowed - {core})]


def test_helpers_at_work_for_another_call_are_not_taken():
    inner = []

    def worker(tasks):
        for _ in tasks:
            threads.spread(range(2), lambda more: inner.extend((n, threading.get_ident()) for n in more), 2)

    threads.spread(range(2), worker, 2)
    assert sorted(n for n, _ in inner) == [0, 0, 1, 1]
    assert len({thread for _, thread in inner}) <= 2


def test_blas_is_held_in_any_thread():
    """This includes a thread that is not the first one, which threadpoolctl alone would silently ignore."""
    seen = []

    def in_thread():
        with threads._blas.held(1):
            seen.append(blas_threads())

    with threads._blas.held(1):
        pass
    for _ in range(2):
        thread = threading.Thread(target=in_thread)
        thread.start()
        thread.join()
    assert seen == [[1] * len(LIBRARIES)] * 2


@pytest.mark.parametrize("failing", ["the caller", "a helper", "all"])
def test_an_error_ends_the_work_and_is_raised(failing):
    caller, meeting, done = threading.get_ident(), threading.Barrier(2, timeout=20), []

    def worker(tasks):
        meeting.wait()
        is_caller = threading.get_ident() == caller
        for task in tasks:
            if failing == "all" or is_caller == (failing == "the caller"):
                raise ArithmeticError(failing)
            done.append(task)

    with pytest.raises(ArithmeticError, match=failing):
        threads.spread(iter(int, 1), worker, 2)  # endless tasks


def test_settings_of_numpy_errors_hold_in_every_thread():
    meeting = threading.Barrier(2, timeout=20)

    def worker(tasks):
        for _ in tasks:
            meeting.wait()
            np.float32(1) / np.zeros(1, np.float32)

    with np.errstate(divide="raise"), pytest.raises(FloatingPointError):
        threads.spread(range(2), worker, 2)
    with np.errstate(divide="ignore"):
        threads.spread(range(2), worker, 2)


@pytest.mark.called_once("each call may take other threads of the pool")
def test_no_more_threads_than_asked_for(xw, monkeypatch):
    seen, busy, product = set(), set(), np.matmul

    def spied(*arguments, **options):
        busy.add(threading.get_ident())
        seen.add((len(busy), *blas_threads()))
        try:
            return product(*arguments, **options)
        finally:
            busy.discard(threading.get_ident())

    gpuconv.clear_cache()
    monkeypatch.setattr(np, "matmul", spied)
    for number in (1, 2, 5):
        monkeypatch.setenv("GPUCONV_NUM_THREADS", str(number))
        seen.clear()
        gpuconv.conv(*xw, **LAYER)
        assert ("threads" in planned(*xw, **LAYER)) == (number > 1)
        assert 1 <= max(together for together, *_ in seen) <= number
        assert {count for _, *counts in seen for count in counts} <= {1}
    gpuconv.clear_cache()


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_a_number_of_threads_that_cannot_be_read_is_refused(value, monkeypatch):
    monkeypatch.setenv("GPUCONV_NUM_THREADS", value)
    with pytest.raises(ValueError, match=f"GPUCONV_NUM_THREADS must be a number of threads, at least 1; got '{value}'"):
        gpuconv.conv(np.ones((1, 1, 4)), np.ones((1, 1, 2)))


def test_without_threadpoolctl_one_python_thread_computes(xw, monkeypatch):
    y = gpuconv.conv(*xw, **LAYER)
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    monkeypatch.setattr(threads, "_blas", threads._Blas())
    assert threads.most(None) == threads.most(4) == 1
    monkeypatch.setenv("GPUCONV_NUM_THREADS", "4")
    np.testing.assert_allclose(gpuconv.conv(*xw, **LAYER), y, rtol=0, atol=1e-4)


def test_an_interpreter_that_has_no_more_threads_computes_alone(xw, monkeypatch):
    y = gpuconv.conv(*xw, **LAYER)

    def exhausted():
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threads, "_helpers", threads._Helpers())
    monkeypatch.setattr(threads, "_Helper", exhausted)
    monkeypatch.setenv("GPUCONV_NUM_THREADS", "2")
    assert "in 2 threads" in planned(*xw, **LAYER)
    np.testing.assert_array_equal(gpuconv.conv(*xw, **LAYER), y)


def test_while_the_interpreter_ends_the_caller_works_alone():
    script = """
import sys
from gpuconv.threads import spread
def total():
    done = []
    spread(range(9), done.extend, 2)
    return sum(done)
class Last:
    def __del__(self, is_finalizing=sys.is_finalizing, total=total, print=print):
        print(is_finalizing(), total(), flush=True)
last = Last()
print(total())
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["36", "True", "36"], done.stderr


# Layers of each algorithm that several threads compute together.
LAYERS = {
    "winograd": [((3, 32, 56, 56), (32, 32, 3, 3)), ((5, 128, 14, 14), (128, 128, 3, 3))],
    "im2col": [((3, 32, 30, 30), (64, 32, 3, 3)), ((9, 256, 7, 7), (64, 256, 3, 3)), ((4, 3, 60, 60), (64, 3, 7, 7))],
    "scatter": [((3, 32, 30, 30), (32, 32, 3, 3)), ((9, 64, 9, 9), (64, 64, 3, 3))],
    "depthwise": [((4, 96, 28, 28), (96, 1, 7, 7)), ((3, 64, 57, 59), (64, 1, 5, 5))],
    "fft": [((2, 4, 48, 48), (4, 4, 15, 15)), ((3, 8, 32, 32), (4, 8, 9, 9))],
}


def drawn(algorithm, rng):
    """Return layers of an algorithm with their arrays and options."""
    for x_shape, w_shape in LAYERS[algorithm]:
        groups = x_shape[1] // w_shape[1]
        options = {"padding": w_shape[-1] // 2, "algorithm": algorithm, "groups": groups}
        yield rng.standard_normal(x_shape, np.float32), rng.standard_normal(w_shape, np.float32), options


@pytest.mark.parametrize("algorithm", LAYERS)
def test_results_are_the_same_bits_at_any_number_of_threads(algorithm, rng, monkeypatch):
    for x, w, options in drawn(algorithm, rng):
        results = []
        for number in (1, 2, 3, 4):
            monkeypatch.setenv("GPUCONV_NUM_THREADS", str(number))
            assert ("threads" in planned(x, w, **options)) == (number > 1)
            y = gpuconv.conv(x, w, **options)
            results.append((y, *gpuconv.conv_backward(y, x, w, **options)))
        for others in results[1:]:
            for one, other in zip(results[0], others, strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("algorithm", LAYERS)
def test_calls_from_many_threads_at_once(algorithm, rng, monkeypatch):
    """The same layer and different ones, with limited workspaces, with and without cached plans."""
    monkeypatch.setenv("GPUCONV_WORKSPACE_LIMIT", "16MiB")
    problems = []
    for x, w, options in [*drawn(algorithm, rng), *drawn(algorithm, rng)]:
        y = gpuconv.conv(x, w, **options)
        problems.append((x, w, y, gpuconv.conv_backward(y, x, w, **options), options))

    def hammer(number):
        for repeat in range(6 if tiers.full else 2):
            x, w, y, gradients, options = problems[(number + repeat) % len(problems)]
            np.testing.assert_array_equal(gpuconv.conv(x, w, **options), y)
            for one, other in zip(gpuconv.conv_backward(y, x, w, **options), gradients, strict=True):
                np.testing.assert_array_equal(one, other)
            if repeat == 1:
                gpuconv.clear_cache()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(hammer, range(8 if tiers.full else 4)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_computes_and_has_its_blas_back(xw, monkeypatch):
    monkeypatch.setenv("GPUCONV_NUM_THREADS", "3")
    y, before = gpuconv.conv(*xw, **LAYER), blas_threads()

    def child():
        try:
            same = bool((gpuconv.conv(*xw, **LAYER) == y).all())
            os._exit(0 if same and blas_threads() == before and threads._helpers.busy == 0 else 1)
        except BaseException:
            os._exit(2)

    exits = []

    def worker(tasks):  # within a call, while BLAS is limited and a helper thread is active
        for _ in tasks:
            pid = os.fork()
            if pid == 0:
                child()
            exits.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    threads.spread(range(2), worker, 2)
    assert exits == [0, 0]


@pytest.mark.parametrize("count, found", [(5, 5), (None, 1)])
def test_cores_where_the_system_does_not_say_which_are_the_process_s(count, found, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    assert threads.cores() == found


def test_cores_are_those_of_this_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", {0: (1, 4, 7)}.__getitem__, raising=False)
    assert threads.cores() == 3


@pytest.mark.parametrize(
    "dtype, extent, expected", [("float64", 32, False), ("complex128", 32, True), ("complex128", 8, False)]
)
def test_blas_is_held_where_it_would_use_threads(dtype, extent, expected):
    """In complex products BLAS uses threads from 2**12 multiply-adds, which may take a hundred times longer."""
    explanation = gpuconv.explain((1, 1, extent, extent), (1, 1, 7, 7), padding=3, dtype=dtype, algorithm="im2col")
    assert explanation.plan.holds_blas is expected
