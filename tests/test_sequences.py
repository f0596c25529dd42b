"""Calls in any order, on changing data, settings and threads, with failures among them: each result is right."""

import contextlib
import functools
import itertools
import os
import threading
from unittest import mock

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

import gpuconv
import gpuconv.execute
from gpuconv import threads, workspace
from gpuconv.backend import NUMPY
from gpuconv.choose import MODULES
from gpuconv.geometry import DIRECTIONS, Geometry
from gpuconv.operands import Operand
from gpuconv.request import Request
from tests import reference, tiers
from tests.backends import NO_EMULATION
from tests.cases import NUMPY_ALGORITHMS
from tests.emulation import launcher
from tests.tolerances import assert_within, bound_of

# x, w and the settings that the reference takes. Few of them, so that calls meet the plans of others.
CONVOLUTIONS = (
    ((2, 4, 9, 8), (6, 4, 3, 3), {"stride": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1)}),
    ((2, 4, 9, 8), (6, 4, 3, 3), {"stride": (2, 3), "padding": ((0, 1), (2, 0)), "dilation": (1, 2)}),
    ((1, 6, 12, 10), (6, 1, 5, 3), {"stride": (1, 1), "padding": ((2, 2), (-1, 3)), "dilation": (1, 1), "groups": 6}),
    ((3, 2, 40), (4, 2, 7), {"stride": (1,), "padding": ((3, 3),), "dilation": (1,)}),
)
KERNEL_ALGORITHMS = ("auto", "im2col", "direct", "implicit_gemm")
ACTIVATIONS = {
    None: (np.positive, np.ones_like),
    "relu": (lambda z: np.maximum(z, 0), lambda y: (y > 0) * 1.0),
    "leaky_relu": (lambda z: np.where(z > 0, z, 0.01 * z), lambda y: np.where(y > 0, 1, 0.01)),
    "sigmoid": (lambda z: 1 / (1 + np.exp(-z)), lambda y: y * (1 - y)),
    "tanh": (np.tanh, lambda y: 1 - y * y),
}
LYINGS = ("contiguous", "channels_last", "reversed", "strided", "transposed")


def laid(array, lying):
    """The same values in other memory."""
    if lying == "channels_last":
        return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1)
    if lying == "reversed":
        return np.ascontiguousarray(array[..., ::-1])[..., ::-1]
    if lying == "transposed":
        return np.ascontiguousarray(array.T).T
    if lying == "strided":
        larger = np.full((*array.shape[:-1], 2 * array.shape[-1]), np.nan, array.dtype)
        larger[..., ::2] = array
        return larger[..., ::2]
    return np.ascontiguousarray(array)


class Drawn:
    """One call of a function, and what it should give."""

    def __init__(self, draw, on_kernels):
        self.x_shape, self.w_shape, self.settings = draw(st.sampled_from(CONVOLUTIONS))
        self.function = draw(st.sampled_from(("conv", "conv_data_grad", "conv_weight_grad", "conv_backward")))
        self.algorithm = draw(st.sampled_from(KERNEL_ALGORITHMS if on_kernels else self.able()))
        self.activation = draw(st.sampled_from(tuple(ACTIVATIONS)))
        self.dtype = draw(st.sampled_from(("float32", "float64")))
        self.lying = draw(st.sampled_from(LYINGS[:2] if on_kernels else LYINGS))
        self.out_lying = draw(st.sampled_from((None, None, *LYINGS)))
        self.has_bias = draw(st.booleans())
        self.rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        self.take_other_data()

    def able(self):
        """The algorithms that do not refuse it, but for a limit."""
        geometry, dtype = Geometry.infer(self.x_shape, self.w_shape, **self.settings), np.dtype("float32")
        requests = [Request(geometry, dtype, direction, NUMPY) for direction in DIRECTIONS]
        names = [name for name in NUMPY_ALGORITHMS if not any(map(MODULES[name].why_not, requests))]
        return ("auto", *names)

    def take_other_data(self):
        y_shape = _y_shape(self.x_shape, self.w_shape, self.settings)
        shapes = self.x_shape, self.w_shape, y_shape, self.w_shape[:1], y_shape
        self.x, self.w, self.dy, self.b, self.y = (
            (self.rng.standard_normal(shape) / 2).astype(self.dtype) for shape in shapes
        )
        self.exact = functools.cache(self.compute_exact)

    def given(self):
        x, w, dy, y = (laid(array, self.lying) for array in (self.x, self.w, self.dy, self.y))
        options = {**self.settings, "algorithm": self.algorithm}
        if self.function == "conv":
            return (x, w, self.b if self.has_bias else None), {**options, "activation": self.activation}
        if self.function == "conv_data_grad":
            return (dy, w, self.x_shape), options
        if self.function == "conv_weight_grad":
            return (dy, x, self.w_shape), options
        return (dy, x, w), {**options, "activation": self.activation, "y": y}

    def call(self):
        """The results, as a tuple."""
        arguments, options = self.given()
        if self.out_lying is not None and self.function != "conv_backward":
            shape = self.exact()[0][0].shape
            options["out"] = laid(np.full(shape, np.nan, self.dtype), self.out_lying)
        before = [array.copy() for array in arguments if isinstance(array, np.ndarray)]
        result = getattr(gpuconv, self.function)(*arguments, **options)
        for array, copy in zip((a for a in arguments if isinstance(a, np.ndarray)), before, strict=True):
            np.testing.assert_array_equal(array, copy)
        if "out" in options:
            assert result is options["out"]
        return result if self.function == "conv_backward" else (result,)

    def compute_exact(self):
        """The exact results, and the same of absolute values."""
        x, w, dy, b, y = (array.astype(np.float64) for array in (self.x, self.w, self.dy, self.b, self.y))
        function, derivative = ACTIVATIONS[self.activation]
        if self.function == "conv":
            bias = b.reshape(-1, *(1,) * (x.ndim - 2)) * self.has_bias
            z = reference.forward(x, w, **self.settings) + bias
            return [(function(z), reference.forward(abs(x), abs(w), **self.settings) + abs(bias))]
        if self.function == "conv_backward":
            dy = dy * derivative(y)
        dx = [reference.data_grad(f(dy), f(w), self.x_shape, **self.settings) for f in (np.positive, np.abs)]
        dw = [reference.weight_grad(f(dy), f(x), self.w_shape, **self.settings) for f in (np.positive, np.abs)]
        db = [f(dy).sum((0, *range(2, dy.ndim))) for f in (np.positive, np.abs)]
        return {"conv_data_grad": [dx], "conv_weight_grad": [dw]}.get(self.function, [dx, dw, db])

    def check(self, results):
        # Twice the bound: derivatives of activations and their products are rounded, too.
        transforms = "fft" if self.algorithm == "auto" else self.algorithm
        for result, (exact, magnitude) in zip(results, self.exact(), strict=True):
            terms = max(self.dy.size // self.w_shape[0], self.w.size)
            assert_within(result, exact, 2 * bound_of(transforms, exact, magnitude, terms, self.dtype))

    def is_refused(self, error):
        return isinstance(error, ValueError) and "cannot compute this" in str(error)


def _y_shape(x_shape, w_shape, settings):
    extents = (
        reference.output_extent(n, k, s, d, *padding)
        for n, k, s, d, padding in zip(
            x_shape[2:], w_shape[2:], settings["stride"], settings["dilation"], settings["padding"], strict=True
        )
    )
    return (x_shape[0], w_shape[0], *extents)


class RaisingArray(np.ndarray):
    """An array of a class of the user's, whose functions raise."""

    def __array_ufunc__(self, *_, **__):
        raise RuntimeError("no function may be called with this")


class Sequences(RuleBasedStateMachine):
    """Calls, and changes between them. Its variables last from one call to the next."""

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
        """Where calls are computed."""
        backend = launcher.EMULATED if self.on_kernels else gpuconv.execute.backend_for("numpy")
        return mock.patch.object(gpuconv.execute, "backend_for", return_value=backend)

    @rule(data=st.data(), order=st.lists(st.integers(0, 2), min_size=3, max_size=9))
    def calls_in_turns(self, data, order):
        """Three calls in any order, each time with other data."""
        calls = [Drawn(data.draw, self.on_kernels) for _ in range(3)]
        with self.place():
            for number in order:
                calls[number].take_other_data()
                try:
                    calls[number].check(calls[number].call())
                except ValueError as error:
                    if not calls[number].is_refused(error):
                        raise

    @rule(data=st.data())
    def calls_at_the_same_time(self, data):
        calls = [Drawn(data.draw, self.on_kernels) for _ in range(3)]
        errors = []

        def work(drawn):
            try:
                drawn.check(drawn.call())
            except BaseException as error:
                if not drawn.is_refused(error):
                    errors.append(error)

        if self.on_kernels:  # the emulator runs one kernel at a time
            return
        workers = [threading.Thread(target=work, args=(drawn,)) for drawn in calls]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if errors:
            raise errors[0]

    @rule(data=st.data(), place=st.sampled_from(("buffer", "read")), number=st.integers(0, 3))
    def memory_runs_out(self, data, place, number):
        """In the middle of a call: it raises that, or never came so far and is right."""
        drawn = Drawn(data.draw, self.on_kernels)
        owner, name = {"buffer": (workspace, "take"), "read": (Operand, "read")}[place]
        original, count = getattr(owner, name), itertools.count()

        def failing(*arguments):
            if next(count) == number:
                raise MemoryError
            return original(*arguments)

        with self.place(), mock.patch.object(owner, name, failing):
            try:
                drawn.check(drawn.call())
            except MemoryError:
                pass
            except ValueError as error:
                if not drawn.is_refused(error):
                    raise

    @rule(data=st.data())
    def an_array_of_another_class_is_refused(self, data):
        drawn = Drawn(data.draw, self.on_kernels)
        (first, *others), options = drawn.given()
        with self.place(), pytest.raises(TypeError, match=r"must be a numpy\.ndarray or a cupy\.ndarray"):
            getattr(gpuconv, drawn.function)(first.view(RaisingArray), *others, **options)

    @rule(
        limit=st.sampled_from(("0", "20KiB", "300KiB", "64MiB", "64MiB")),
        number=st.sampled_from(("1", "2", "5")),
        on_kernels=st.sampled_from((False, False, True)),
        clear=st.booleans(),
    )
    def other_settings(self, limit, number, on_kernels, clear):
        os.environ["GPUCONV_WORKSPACE_LIMIT"] = limit
        os.environ["GPUCONV_NUM_THREADS"] = number
        self.on_kernels = on_kernels and NO_EMULATION is None
        if clear:
            gpuconv.clear_cache()

    @invariant()
    def nothing_is_held(self):
        """Between calls BLAS has its threads back, and no helper is at work."""
        assert threads._blas.limits == []
        assert threads._blas.limit is None
        assert threads._helpers.busy == 0


@pytest.mark.called_once("repeating would clear the plans that the calls share")
def test_every_call_of_a_sequence_is_right():
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
