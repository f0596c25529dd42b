"""Each result is right for calls in any order, on changing data, settings and threads, and after failures."""

import contextlib
import itertools
import os
from unittest import mock

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

import gpuconv
import gpuconv.execute
from gpuconv import threads, workspace
from gpuconv.arrays import NUMPY
from gpuconv.geometry import DIRECTIONS, Geometry
from gpuconv.operands import Operand
from gpuconv.request import Request
from gpuconv.select import MODULES
from tests import tiers
from tests.backends import NO_EMULATION
from tests.calls import ACTIVATIONS, FUNCTIONS, LYINGS, Call, Settings, Together
from tests.cases import NUMPY_ALGORITHMS
from tests.emulation import launcher

# x, w and settings of the reference. There are few of them, so that calls reuse the plans of others.
CONVOLUTIONS = (
    ((2, 4, 9, 8), (6, 4, 3, 3), {"stride": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1)}),
    ((2, 4, 9, 8), (6, 4, 3, 3), {"stride": (2, 3), "padding": ((0, 1), (2, 0)), "dilation": (1, 2)}),
    ((1, 6, 12, 10), (6, 1, 5, 3), {"stride": (1, 1), "padding": ((2, 2), (-1, 3)), "dilation": (1, 1), "groups": 6}),
    ((3, 2, 40), (4, 2, 7), {"stride": (1,), "padding": ((3, 3),), "dilation": (1,)}),
)
KERNEL_ALGORITHMS = ("auto", "im2col", "direct", "implicit_gemm")


def able(x_shape, w_shape, settings):
    """Return the algorithms on NumPy that accept a convolution if the workspace is large enough."""
    geometry, dtype = Geometry.infer(x_shape, w_shape, **settings), np.dtype("float32")
    requests = [Request(geometry, dtype, direction, NUMPY) for direction in DIRECTIONS]
    return ("auto", *(name for name in NUMPY_ALGORITHMS if not any(map(MODULES[name].why_not, requests))))


def drawn(draw, on_kernels):
    """Draw a call of one of the convolutions."""
    x, w, settings = draw(st.sampled_from(CONVOLUTIONS))
    lyings = tuple(LYINGS)[:5]
    return Call(
        function=draw(st.sampled_from(FUNCTIONS)),
        x=x,
        w=w,
        settings=settings,
        dtype=draw(st.sampled_from(("float32", "float64"))),
        algorithm=draw(st.sampled_from(KERNEL_ALGORITHMS if on_kernels else able(x, w, settings))),
        activation=draw(st.sampled_from(tuple(ACTIVATIONS))),
        has_bias=draw(st.booleans()),
        lying=draw(st.sampled_from(lyings[:2] if on_kernels else lyings)),
        out=draw(st.sampled_from((None, None, *lyings))),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


class RaisingArray(np.ndarray):
    """An array of a user's subclass whose functions raise."""

    def __array_ufunc__(self, *_, **__):
        raise RuntimeError("no function may be called with this")


class Sequences(RuleBasedStateMachine):
    """Calls, and changes between them. Its variables last from one call to the next."""

    computed = 0  # calls of all sequences whose results were compared

    def __init__(self):
        super().__init__()
        self.environment = mock.patch.dict(os.environ)
        self.environment.start()
        self.on_kernels = False
        gpuconv.clear_cache()

    def teardown(self):
        self.environment.stop()
        gpuconv.clear_cache()

    def place(self):
        """Draw where calls are computed."""
        backend = launcher.EMULATED if self.on_kernels else gpuconv.execute.backend_for("numpy")
        return mock.patch.object(gpuconv.execute, "backend_for", return_value=backend)

    @rule(data=st.data(), order=st.lists(st.integers(0, 2), min_size=3, max_size=9))
    def calls_in_turns(self, data, order):
        """Make three calls in any order, each time with other data."""
        calls = [drawn(data.draw, self.on_kernels) for _ in range(3)]
        with self.place():
            for time, number in enumerate(order):
                call = calls[number]
                Sequences.computed += call._replace(seed=call.seed + time).run()

    @rule(data=st.data())
    def calls_at_the_same_time(self, data):
        calls = [drawn(data.draw, self.on_kernels) for _ in range(3)]
        if not self.on_kernels:  # the emulator runs one kernel at a time
            Sequences.computed += Together(tuple(calls)).run()

    @rule(data=st.data(), place=st.sampled_from(("buffer", "read")), number=st.integers(0, 3))
    def memory_runs_out(self, data, place, number):
        """Make an allocation in a call fail: the call raises the error, or ends before that allocation and is right."""
        call = drawn(data.draw, self.on_kernels)
        owner, name = {"buffer": (workspace, "take"), "read": (Operand, "read")}[place]
        original, count = getattr(owner, name), itertools.count()

        def failing(*arguments):
            if next(count) == number:
                raise MemoryError
            return original(*arguments)

        with self.place(), mock.patch.object(owner, name, failing), contextlib.suppress(MemoryError):
            call.run()

    @rule(data=st.data())
    def an_array_of_another_class_is_refused(self, data):
        call = drawn(data.draw, self.on_kernels)
        (first, *others), options = call.given(*call.drawn())
        with self.place(), pytest.raises(TypeError, match=r"must be a numpy\.ndarray or a cupy\.ndarray"):
            getattr(gpuconv, call.function)(first.view(RaisingArray), *others, **options)

    @rule(
        limit=st.sampled_from(("0", "20KiB", "300KiB", "64MiB", "64MiB")),
        number=st.sampled_from(("1", "2", "5")),
        on_kernels=st.sampled_from((False, False, True)),
        clear=st.booleans(),
    )
    def other_settings(self, limit, number, on_kernels, clear):
        Settings(limit, number, clear).run()
        self.on_kernels = on_kernels and NO_EMULATION is None

    @invariant()
    def nothing_is_held(self):
        """Assert that between calls the BLAS threads are restored and no helper thread is active."""
        assert threads._blas.limits == []
        assert threads._blas.limit is None
        assert threads._helpers.busy == 0


@pytest.mark.called_once("repeating would clear the plans that the calls share")
def test_every_call_of_a_sequence_is_right(monkeypatch):
    monkeypatch.setattr(Sequences, "computed", 0)
    with launcher.using(order="natural") if NO_EMULATION is None else contextlib.nullcontext():
        run_state_machine_as_test(
            Sequences,
            settings=hypothesis.settings(
                max_examples=100 if tiers.full else 12,
                stateful_step_count=15,
                deadline=None,
                derandomize=True,
                suppress_health_check=list(hypothesis.HealthCheck),
            ),
        )
    assert Sequences.computed > 100  # hypothesis draws at least 180
