"""Calls of the public functions, described by plain values, and their expected results."""

import os
import threading
from typing import NamedTuple
from unittest import mock

import numpy as np

import gpuconv
from tests import reference
from tests.backends import arrays_of
from tests.cases import channels_first, draw, laid_out, named_dtype
from tests.tolerances import assert_within, bound_of, epsilon

FUNCTIONS = ("conv", "conv_data_grad", "conv_weight_grad", "conv_backward", "conv_transpose", "conv_transpose_backward")
ACTIVATIONS = {
    None: (np.positive, np.ones_like),
    "relu": (lambda z: np.maximum(z, 0), lambda y: (y > 0) * 1.0),
    "leaky_relu": (lambda z: np.where(z > 0, z, 0.01 * z), lambda y: np.where(y > 0, 1, 0.01)),
    "sigmoid": (lambda z: 1 / (1 + np.exp(-z)), lambda y: y * (1 - y)),
    "tanh": (np.tanh, lambda y: 1 - y * y),
}


def _strided(array):
    larger = np.full((*array.shape[:-1], 2 * array.shape[-1]), np.nan, array.dtype)
    larger[..., ::2] = array
    return larger[..., ::2]


def _misaligned(array):
    memory = np.empty(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    memory[...] = array
    return memory


# Functions that return the same values with another memory layout.
LYINGS = {
    "contiguous": np.ascontiguousarray,
    "channels_last": lambda array: np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1),
    "reversed": lambda array: np.ascontiguousarray(array[..., ::-1])[..., ::-1],
    "strided": _strided,
    "transposed": lambda array: np.ascontiguousarray(array.T).T,
    "misaligned": _misaligned,
}


NARROWER = {"float32": "float16", "float64": "float32", "complex64": "float32", "complex128": "float64"}


class Call(NamedTuple):
    """One call. Shapes and settings are those of the convolution in channels_first; the seed draws the data."""

    function: str
    x: tuple
    w: tuple
    settings: dict
    dtype: str = "float32"
    narrow: str | None = None  # the operand, "x" or "w", whose dtype is NARROWER than that of the others
    layout: str = "channels_first"
    algorithm: str = "auto"
    activation: str | None = None
    has_bias: bool = False
    lying: str = "contiguous"
    out: str | None = None  # the memory layout of out=, or None
    seed: int = 0

    def run(self):
        """Call the function and compare its results; return 1, or 0 if the call is refused, which is also correct."""
        arrays = self.drawn()
        arguments, options = self.given(*arrays)
        exact = self.exact(*arrays)
        gives_all = self.function.endswith("backward")
        roles = "xwb" if gives_all else "w" if self.function == "conv_weight_grad" else "x"
        if self.out is not None and not gives_all:
            empty = np.full(exact[0][0].shape, np.nan).astype(named_dtype(self.dtype))
            options["out"] = LYINGS[self.out](laid_out(empty, self.layout, roles))
        before = [array.copy() for array in arguments if isinstance(array, np.ndarray)]
        try:
            result = getattr(gpuconv, self.function)(*arguments, **options)
        except ValueError as error:
            if "cannot compute this" in str(error):
                return 0
            raise
        for array, copy in zip((a for a in arguments if isinstance(a, np.ndarray)), before, strict=True):
            np.testing.assert_array_equal(array, copy, "an input was modified")
        assert "out" not in options or result is options["out"]
        results = result if gives_all else (result,)
        for found, (value, magnitude), role in zip(results, exact, roles, strict=True):
            assert found.dtype == named_dtype(self.dtype)
            self.compare(found if role == "b" else channels_first(found, self.layout, role), value, magnitude)
        return 1

    def drawn(self):
        """Return x, w, dy, b and y in the wide dtype of the reference, with values that the dtype represents."""
        rng, y_shape = np.random.default_rng(self.seed), self.y_shape
        bias = self.x[1] if self.function == "conv_transpose" else self.w[0]
        y = self.x if self.function == "conv_transpose_backward" else y_shape
        shapes = {"x": self.x, "w": self.w, "dy": y_shape, "b": (bias,), "y": y}
        return [draw(rng, shape, self.dtype_of(name), False) for name, shape in shapes.items()]

    def dtype_of(self, name):
        return NARROWER[self.dtype] if name == self.narrow else self.dtype

    @property
    def y_shape(self):
        extents = (
            reference.output_extent(n, k, s, d, *padding)
            for n, k, s, d, padding in zip(
                *(self.x[2:], self.w[2:], self.settings["stride"], self.settings["dilation"]),
                self.settings["padding"],
                strict=True,
            )
        )
        return (self.x[0], self.w[0], *extents)

    def given(self, x, w, dy, b, y):
        """Return the arguments of the call."""
        x, w, dy, y = (
            LYINGS[self.lying](laid_out(array.astype(named_dtype(self.dtype_of(name))), self.layout, role))
            for name, array, role in (("x", x, "x"), ("w", w, "w"), ("dy", dy, "x"), ("y", y, "x"))
        )
        bias = b.astype(named_dtype(self.dtype)) if self.has_bias else None
        options = {**self.settings, "layout": self.layout, "algorithm": self.algorithm}
        if self.function == "conv":
            return (x, w, bias), {**options, "activation": self.activation}
        if self.function == "conv_transpose":
            return (dy, w, bias), {**options, "activation": self.activation, "output_padding": self.output_padding}
        if self.function == "conv_transpose_backward":
            options["output_padding"] = self.output_padding
            return (x, dy, w), {**options, "activation": self.activation, "y": y}
        if self.function == "conv_data_grad":
            return (dy, w, x.shape), options
        if self.function == "conv_weight_grad":
            return (dy, x, w.shape), options
        return (dy, x, w), {**options, "activation": self.activation, "y": y}

    @property
    def output_padding(self):
        """Return by how much the extents of x exceed the smallest ones that give y."""
        settings = self.settings
        return [
            n + sum(padding) - (m - 1) * s - d * (k - 1) - 1
            for n, padding, m, s, d, k in zip(
                *(self.x[2:], settings["padding"], self.y_shape[2:], settings["stride"], settings["dilation"]),
                self.w[2:],
                strict=True,
            )
        ]

    def exact(self, x, w, dy, b, y):
        """Return the exact results, each with the result for absolute values."""
        function, derivative = ACTIVATIONS[self.activation]
        if self.function in ("conv", "conv_transpose"):
            bias = b.reshape(-1, *(1,) * (x.ndim - 2)) * self.has_bias
            if self.function == "conv":
                z, sizes = (reference.forward(f(x), f(w), **self.settings) for f in (np.positive, np.abs))
            else:
                z, sizes = (
                    reference.data_grad(f(dy), f(np.conj(w)), self.x, **self.settings) for f in (np.positive, np.abs)
                )
            return [(function(z + bias), sizes + abs(bias))]
        if self.function == "conv_transpose_backward":  # x and dy are exchanged
            x = x * derivative(y)
            dx = [reference.forward(f(x), f(np.conj(w)), **self.settings) for f in (np.positive, np.abs)]
            dw = [np.conj(reference.weight_grad(f(dy), f(x), self.w, **self.settings)) for f in (np.positive, np.abs)]
            return [dx, dw, [f(x).sum((0, *range(2, x.ndim))) for f in (np.positive, np.abs)]]
        if self.function == "conv_backward":
            dy = dy * derivative(y)
        dx = [reference.data_grad(f(dy), f(w), self.x, **self.settings) for f in (np.positive, np.abs)]
        dw = [reference.weight_grad(f(dy), f(x), self.w, **self.settings) for f in (np.positive, np.abs)]
        db = [f(dy).sum((0, *range(2, dy.ndim))) for f in (np.positive, np.abs)]
        return {"conv_data_grad": [dx], "conv_weight_grad": [dw]}.get(self.function, [dx, dw, db])

    def compare(self, found, exact, magnitude):
        """Assert that results are within twice the bound, since derivatives of activations are rounded too."""
        algorithm = "fft" if self.algorithm == "auto" else self.algorithm
        sums = [self.y_shape, self.x] if self.function == "conv_transpose_backward" else [self.y_shape]
        terms = max(1, int(np.prod(self.w)), *(int(np.prod((shape[0], *shape[2:]))) for shape in sums))
        bound = 2 * bound_of(algorithm, exact, magnitude, terms, self.dtype)
        if self.activation is not None:
            bound = bound + 4 * epsilon(self.dtype)
        assert_within(found, exact, bound)


class Settings(NamedTuple):
    """The settings of later calls."""

    limit: str
    threads: str
    clear: bool  # whether the caches are cleared

    def run(self):
        os.environ["GPUCONV_WORKSPACE_LIMIT"] = self.limit
        os.environ["GPUCONV_NUM_THREADS"] = self.threads
        if self.clear:
            gpuconv.clear_cache()
        return 0


class Together(NamedTuple):
    """Calls by several threads at the same time."""

    calls: tuple

    def run(self):
        computed, errors = [], []

        def work(call):
            try:
                computed.append(call.run())
            except BaseException as error:
                errors.append(error)

        workers = [threading.Thread(target=work, args=(call,)) for call in self.calls]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if errors:
            raise errors[0]
        return sum(computed)


def run(backend, steps):
    """Run steps in sequence on a backend, with empty caches at the start; return the number of calls not refused."""
    with mock.patch.dict(os.environ), arrays_of(backend):
        gpuconv.clear_cache()
        computed = sum(step.run() for step in steps)
        gpuconv.clear_cache()
    return computed
