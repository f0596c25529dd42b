"""Search for calls that fail: ``python -m tests.fuzz --minutes 5 --seed 0``

Sequences of calls are drawn: shapes, settings, dtypes, memory layouts, algorithms, workspace limits, numbers of
threads, repeated calls with other data, cleared caches between calls, and concurrent calls. Each result is compared
with the independent reference. A failure is shrunk by hypothesis and printed as a test. The exit status is 1 if there
is a failure.
"""

import argparse
import contextlib
import itertools
import sys
import time
import traceback
import warnings

import hypothesis
from hypothesis import strategies as st

from gpuconv.arguments import PADDING_MODES
from gpuconv.geometry import Geometry
from tests import calls
from tests.backends import NO_EMULATION
from tests.calls import ACTIVATIONS, FUNCTIONS, LYINGS, NARROWER, Call, Settings, Together
from tests.cases import DTYPES, KERNELS, NUMPY_ALGORITHMS
from tests.test_random import convolutions, depthwise

BACKENDS = ("numpy", "numpy", "numpy", *([] if NO_EMULATION else ["emulated"]))
EXAMPLES = 50  # sequences between two checks of the time


def empty(x, w):
    """Yield shapes without images, without channels, and without filters."""
    yield (0, *x[1:]), w
    yield (x[0], 0, *x[2:]), (w[0], 0, *w[2:])
    yield x, (0, *w[1:])


def with_padding_mode(x, w, settings, mode):
    """Return the settings with a padding mode, or without one if the padding is too long for it."""
    try:
        Geometry.infer(x, w, **settings, padding_mode=mode)
    except ValueError:
        return settings
    return {**settings, "padding_mode": mode}


@st.composite
def call(draw, backend):
    """Draw a call of an algorithm that the backend has."""
    algorithm = draw(st.sampled_from(("auto", *(NUMPY_ALGORITHMS if backend == "numpy" else KERNELS))))
    x, w, settings = draw(convolutions(transformable=algorithm == "winograd"))
    if algorithm == "depthwise":
        x, w = depthwise(x, w, settings["groups"])
    x, w = draw(st.sampled_from([(x, w)] * 20 + list(empty(x, w))))
    dtype = draw(st.sampled_from(DTYPES))
    is_complex = dtype.startswith("complex")
    function = draw(st.sampled_from(FUNCTIONS))
    if "transpose" not in function:
        settings = draw(
            st.sampled_from((settings, with_padding_mode(x, w, settings, draw(st.sampled_from(PADDING_MODES)))))
        )
    may_differ = dtype in NARROWER and function != "conv_transpose_backward"  # its db has the dtype of x
    return Call(
        function=function,
        x=x,
        w=w,
        settings=settings,
        dtype=dtype,
        narrow=draw(st.sampled_from((None, None, None, "x", "w"))) if may_differ else None,
        layout=draw(st.sampled_from(("channels_first", "channels_last"))),
        algorithm=algorithm,
        activation=None if is_complex else draw(st.sampled_from(tuple(ACTIVATIONS))),
        has_bias=draw(st.booleans()),
        lying=draw(st.sampled_from(tuple(LYINGS))),
        out=draw(st.sampled_from((None, None, *LYINGS))),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@st.composite
def sequences(draw):
    """Draw a backend and steps: a few calls, repeated with the same or other data, and changes of settings."""
    backend = draw(st.sampled_from(BACKENDS))
    few = draw(st.lists(call(backend), min_size=1, max_size=3))
    same = st.sampled_from(few)
    again = st.builds(lambda one, seed: one._replace(seed=seed), same, st.integers(0, 2**32 - 1))
    settings = st.builds(
        Settings,
        st.sampled_from(("0", "2000", "20KiB", "300KiB", "64MiB")),
        st.sampled_from(("1", "2", "5")),
        st.booleans(),
    )
    steps = [same, again, again, again, settings]
    if backend == "numpy":  # the emulator runs one kernel at a time
        steps.append(st.builds(Together, st.lists(again, min_size=2, max_size=4).map(tuple)))
    return backend, draw(st.lists(st.one_of(steps), min_size=2, max_size=10))


def failure(seed, count):
    """Return the smallest failing sequence of those drawn by a seed, and its error, or None; add calls to ``count``."""
    last = None

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        verbosity=hypothesis.Verbosity.quiet,
    )
    @hypothesis.given(sequences())
    def each_call_is_right(sequence):
        nonlocal last
        last = sequence  # hypothesis runs the smallest failure last
        count(calls.run(*sequence))

    try:
        each_call_is_right()
    except Exception:
        return last, traceback.format_exc()
    return None


def as_test(backend, steps):
    """Return the text of a test that fails as the sequence does."""
    lines = "".join(f"            {step!r},\n" for step in steps)
    mark = "" if backend == "numpy" else f"@pytest.mark.{backend}\n"
    return (
        "import pytest\n\nfrom tests.calls import Call, Settings, Together, run\n\n\n"
        f"{mark}"
        '@pytest.mark.called_once("what is kept from call to call is under test")\n'
        f'def test_found_by_search():\n    run(\n        "{backend}",\n        [\n{lines}        ],\n    )\n'
    )


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=1, metavar="M", help="default 1")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default 0")
    options = parser.parse_args()
    end, made, found = time.monotonic() + 60 * options.minutes, 0, None

    def count(number):
        nonlocal made
        made += number

    warnings.simplefilter("error")
    with contextlib.suppress(KeyboardInterrupt):
        for number in itertools.count():
            found = failure(options.seed * 1_000_003 + number, count)
            if found or time.monotonic() > end:
                break
    print(f"seed {options.seed}: {made} calls were right, beside those that were refused")
    if found:
        sequence, error = found
        print(f"{error}\n{as_test(*sequence)}")
    sys.exit(1 if found or not made else 0)


if __name__ == "__main__":
    main()
