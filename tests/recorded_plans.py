"""The record of the plans of many calls: ``python -m tests.recorded_plans``

A plan determines the speed of a call, its memory and the last bits of its result. A change of the sources that should
not affect these must not change ``plans.json``; the effect of any other change is visible there call by call. No
convolution is computed. The program writes the record and prints the choices of ``auto`` that change. With words as
arguments it prints the plans of the calls whose names contain them.

    python -m tests.recorded_plans winograd "resnet50 3x3 256 @14"
"""

import contextlib
import functools
import hashlib
import itertools
import json
import random
import sys
import types
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np

import gpuconv
from gpuconv import select, threads
from gpuconv.arrays import NUMPY
from gpuconv.benchmark import layers
from gpuconv.cpu import compiled, fft, im2col
from gpuconv.execute import Call, Description, plan_for
from gpuconv.gpu import gemm_plan, implicit_gemm
from gpuconv.gpu.device import Device
from gpuconv.operands import ROLES
from gpuconv.plan import Branch, Deferred, Loop, Step
from gpuconv.request import Request
from gpuconv.select import MODULES
from gpuconv.views import contiguous_strides
from tests.cases import CASES, DIRECTIONS, DTYPES, KERNELS, case, named_dtype
from tests.emulation.launcher import EMULATED

RECORD = Path(__file__).parent / "plans.json"
BATCH = 4
LIMITS = (64 << 20, 1 << 20, 20 << 10)  # bytes
ACTIVATIONS = "", "relu", "leaky_relu", "sigmoid", "tanh"
DEVICES = Device(75, 72), Device(80, 108), Device(90, 132), Device(120, 170)
# Each algorithm plans one in this many of the benchmarked layers; planning all those of scatter would take seconds.
ONE_IN = {"im2col": 4, "winograd": 2, "fft": 16, "depthwise": 2, "scatter": 1000, "implicit_gemm": 4, "direct": 8}
WITHOUT_NUMBA = "without Numba"
ON_NUMPY = [name for name in gpuconv.ALGORITHMS if name != "implicit_gemm"]
GROUPS = (
    *(("numpy", algorithm) for algorithm in ON_NUMPY),
    *(("emulated", algorithm) for algorithm in KERNELS),
    ("choice", "numpy"),
    ("choice", "emulated"),
    ("choice", "tiles"),
    *(("limits numpy", algorithm) for algorithm in ON_NUMPY),
    *(("limits emulated", algorithm) for algorithm in KERNELS),
    (WITHOUT_NUMBA, "depthwise"),
    (f"{WITHOUT_NUMBA} limits numpy", "depthwise"),
    (WITHOUT_NUMBA, "choice"),
)
# Convolutions computed by several threads, planned for workspaces of 16 KiB to 16 MiB.
SQUEEZED = (
    case("few channels", (4, 3, 96, 100), (32, 3, 5, 5), stride=2, padding=2),
    case("few channels, an edge unseen", (4, 3, 96, 96), (32, 3, 3, 3), stride=2),
    case("long lines", (1, 3, 240, 150), (24, 3, 7, 7), stride=2, padding=3),
    case("1x1 of few channels", (8, 8, 64, 64), (64, 8, 1, 1)),
    case("3x3 shared", (2, 32, 28, 28), (32, 32, 3, 3), padding=1),
    case("3x3 of many channels", (4, 320, 7, 7), (256, 320, 3, 3), padding=1),
    case("padding beyond the kernel", (4, 16, 24, 24), (64, 16, 3, 3), padding=8),
    case("3x3 stride 2 and 3", (4, 32, 60, 62), (64, 32, 3, 3), stride=(2, 3), padding=1),
    case("patches shared", (8, 3, 96, 96), (64, 3, 4, 4), stride=4),
    case("dilated", (4, 32, 33, 33), (32, 32, 3, 3), padding=2, dilation=2),
    case("depthwise shared", (8, 64, 28, 28), (64, 1, 5, 5), padding=2, groups=64),
    case("grouped", (16, 32, 14, 14), (64, 8, 3, 3), padding=1, groups=4),
    case("large kernel", (1, 4, 60, 60), (6, 4, 21, 21), padding=10),
    case("1-D shared", (2, 16, 1000), (32, 16, 9), padding=4),
    case("3-D shared", (2, 8, 16, 16, 16), (16, 8, 3, 3, 3), padding=1),
)
SQUEEZES = tuple(1 << bits for bits in range(14, 25))  # bytes


def geometries(layout, one_in=1):
    """Yield names and geometries: those of the tests, and one in ``one_in`` of the benchmarked layers."""
    yield from ((one.name, one.geometry(layout)) for one in (*CASES, *SQUEEZED))
    chosen = [one for one in layers.selected(["all"], []) if is_drawn(one.name, one_in)]
    yield from ((layer.name, layer.geometry(BATCH, layout)) for layer in chosen)


def calls_of(where, what):
    """Return the calls of a group: names, and functions that return the text of the plan."""
    if where.startswith(WITHOUT_NUMBA):
        where = where.removeprefix(WITHOUT_NUMBA).strip() or ("choice" if what == "choice" else "numpy")
        what = "numpy" if where == "choice" else what
    if where == "choice":
        return tiles() if what == "tiles" else choices(NUMPY if what == "numpy" else EMULATED)
    if where.startswith("limits"):
        return squeezed(NUMPY if where == "limits numpy" else EMULATED, what)
    return plans(NUMPY if where == "numpy" else EMULATED, what)


def plans(backend, algorithm):
    """Yield plans of an algorithm; other settings are drawn by the name of the call, independently of other calls."""
    one_in = ONE_IN.get(algorithm, 4)
    both = zip(geometries("channels_first", one_in), geometries("channels_last", one_in), strict=True)
    dtypes = [name for name in DTYPES if algorithm != "winograd" or not name.startswith("complex")]
    for pair, direction in itertools.product(both, DIRECTIONS):
        rng = random.Random(f"{pair[0][0]} {direction} {algorithm}")
        kind, threads, (name, geometry) = named_dtype(rng.choice(dtypes)), rng.choice((1, 3)), rng.choice(pair)
        geometry = replace(geometry, batch=rng.choice((geometry.batch, geometry.batch, (2, *geometry.batch), ())))
        limit = rng.choice(LIMITS if geometry.multiply_adds() < 1 << 20 else LIMITS[:2])
        if MODULES[algorithm].why_not(Request(geometry, kind, direction, backend, False, limit)) is None:
            precision = rng.choice(("ieee", "tf32", "tf32x3"))
            call = Call(geometry, "numpy", kind, backend, algorithm, False, precision, limit, threads)
            words = name, direction, kind.name, geometry.layout, f"{len(geometry.batch)} batch axes"
            yield ", ".join((*words, f"{limit >> 10} KiB")), functools.partial(plan_text, call, direction, rng)


def squeezed(backend, algorithm):
    """Yield plans of small convolutions for many workspace limits."""
    # forward of scatter has no kernel; its plan is that of NumPy.
    directions = DIRECTIONS if (backend, algorithm) != (EMULATED, "scatter") else DIRECTIONS[1:]
    for one, direction in itertools.product(SQUEEZED, directions):
        rng = random.Random(f"{one.name} {direction} {algorithm}")
        layout, dtype = rng.choice(("channels_first", "channels_last")), rng.choice(("float32", "float16", "float64"))
        call = Call(one.geometry(layout), "numpy", named_dtype(dtype), backend, algorithm, False, "ieee", 0, 3)
        yield f"{one.name}, {direction}, {layout}, {dtype}", functools.partial(squeezed_text, call, direction)


def squeezed_text(call, direction):
    texts = []
    with mock.patch.object(gpuconv.plan, "_SMALL", 1 << 19):  # so that all of them have several threads
        for limit in SQUEEZES:
            request = Request(call.geometry, call.dtype, direction, call.backend, False, limit)
            reason = MODULES[call.algorithm].why_not(request)
            texts.append(reason or plan_text(call._replace(limit=limit), direction))
    return "\n".join((f"{sum(map(len, texts))} characters", *texts))


def plan_text(call, direction, rng=None):
    """Return the plan of a call with C-contiguous arrays, or with memory layouts drawn by a generator.

    For a loop that is planned during execution, the text contains the first two parts.
    """
    first, second, result = (layout_of(call, role, rng) for role in ROLES[direction])
    is_drawn, is_transposed = rng is not None, rng is not None and direction == "data_grad" and rng.random() < 0.5
    is_forward = direction == "forward" or is_transposed
    # Joined, so that the name is not the same object as an equal string in the sources, as with a caller's string.
    activation = "".join(rng.choice(ACTIVATIONS)) if is_drawn and call.dtype.kind != "c" else ""
    y = layout_of(call, ROLES[direction][0], rng) if activation and not is_forward else None
    channels = call.geometry.channels if is_transposed else call.geometry.filters
    has_bias = is_drawn and is_forward and rng.random() < 0.5
    bias = ((channels,), (call.dtype.itemsize,), call.dtype, 0) if has_bias else None
    description = Description(
        call,
        direction,
        (False, activation if y else None),
        (not is_forward, None),
        activation or None if is_forward else None,
        (first, y, second, None, bias, result if is_drawn and rng.random() < 0.3 else None),
        first[:2],
        None,
        None,
    )
    plan = plan_for(description)
    heading = f"{plan.algorithm}, {plan.size} steps, {plan.space} bytes of workspace"
    return "\n".join((heading, str(plan.result), str(plan[6:]), *steps_text(plan.steps)))


def layout_of(call, role, rng=None):
    """Return shape, strides, dtype and address (modulo 16 for kernels) of an array; a generator draws some of them."""
    shape = call.geometry.shape_of(role)
    strides, place = contiguous_strides(shape, call.dtype), 0
    if rng is not None:
        turned = rng.randrange(len(shape)) if rng.random() < 0.2 else None
        strides = tuple(-step if axis == turned else step for axis, step in enumerate(strides))
        place = rng.choice((0, 0, 0, 1 if call.backend.launch is None else call.dtype.itemsize % 16))
    return shape, strides, call.dtype, place


def steps_text(steps, indent="  "):
    """Return one line per step."""
    for step in steps:
        if isinstance(step, Step):
            inputs = ["the result" if step.out is not None and value is step.out else value for value in step.inputs]
            yield f"{indent}{text(step.name or step.function)} {text(inputs)} -> {text(step.out)}"
            if step.name:
                yield f"{indent}  {text(step.function)}"
        elif isinstance(step, Deferred):
            yield f"{indent}planned later"
            yield from steps_text(step.planned().steps, indent + "  ")
        elif isinstance(step, Loop):
            yield f"{indent}{step.workers} threads, {step.number} parts, workspace {step[3:]}"
            some = step.parts if isinstance(step.parts, list) else itertools.islice(step.parts, 2)
            for part in some:
                yield from steps_text(part, indent + "  ")
        elif isinstance(step, Branch):
            yield f"{indent}whether {step.question.__name__} {text(step.view)}"
            yield from steps_text(step.yes, indent + "  ")
            yield from steps_text([step.no], indent + "  ")


def text(value):
    """Return the text of an input or a function of a step."""
    if isinstance(value, functools.partial):
        return f"{text(value.func)}({text(value.args)}; {text(sorted(value.keywords.items()))})"
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return ", ".join(map(text, value))
    if isinstance(value, (np.ndarray, np.generic)):
        return f"{value.dtype} {value.tolist()}" if value.ndim == 0 else digest_of(value.tobytes())
    if callable(value) or isinstance(value, types.ModuleType):
        return getattr(value, "__name__", type(value).__name__)
    return str(value)


def choices(backend):
    """Yield the choices of ``auto``, with the reasons against all other algorithms."""
    one_in = 1 if backend is NUMPY else 4
    for pair in zip(geometries("channels_first", one_in), geometries("channels_last", one_in), strict=True):
        rng = random.Random(pair[0][0])
        name, geometry = rng.choice(pair)
        dtype, limit, deterministic = rng.choice(DTYPES), rng.choice(LIMITS), rng.random() < 0.5
        request = functools.partial(Request, backend=backend, deterministic=deterministic, limit=limit)
        requests = [request(geometry, named_dtype(dtype), direction) for direction in DIRECTIONS]
        words = name, dtype, geometry.layout, f"{limit >> 10} KiB"
        yield ", ".join(words), functools.partial(choice_text, requests)


def choice_text(requests):
    chosen = [select.choose(request, "auto") for request in requests]
    lines = [", ".join(choice.algorithm for choice in chosen)]
    for request, choice in zip(requests, chosen, strict=True):
        lines += [choice.reason, *map(": ".join, select.refused(request, choice.algorithm))]
        if request.backend is NUMPY:
            lines += [f"{name} {MODULES[name].nanoseconds(request):.6g} ns" for name in select.able(request)]
        lines.append(str(im2col.exceeds(request)))
    return "\n".join(lines)


def tiles():
    """Yield the candidate tiles of implicit_gemm, with their times according to the model."""
    for name, geometry in geometries("channels_first", 2):
        rng = random.Random(name)
        dtype, precision, device = rng.choice(DTYPES), rng.choice(("ieee", "tf32", "tf32x3")), rng.choice(DEVICES)
        if implicit_gemm.why_not(Request(geometry, named_dtype(dtype), "forward", EMULATED)) is None:
            words = name, dtype, precision, f"sm_{device.capability}"
            yield ", ".join(words), functools.partial(tiles_text, geometry, dtype, precision, device)


def tiles_text(geometry, dtype, precision, device):
    arguments = geometry, named_dtype(dtype)
    found = [gemm_plan.plans(*arguments, direction, device, precision) for direction in DIRECTIONS]
    lines = (f"{plan.choice} {plan.module} {plan[3:]} {plan.kernels}" for plans in found for plan in plans)
    return "\n".join((str(found[0][0].choice), *lines))


def digest_of(content):
    return hashlib.sha256(content).hexdigest()[:8]


def is_drawn(name, one_in):
    """Return whether a name is one of those drawn, one in so many; a new name does not change those drawn before."""
    return int(digest_of(name.encode()), 16) % one_in == 0


def short(whole):
    """Return the first line of a text, and the digest of the whole text."""
    return f"{whole.partition(chr(10))[0]}; {digest_of(whole.encode())}"


@contextlib.contextmanager
def as_on_any_machine(where):
    """Enter the context of a group, independent of tuning and of installed packages: SciPy, threadpoolctl, Numba."""
    numba = None if where.startswith(WITHOUT_NUMBA) else "1000.0"
    with (
        mock.patch.object(select.tuned, "recalled", return_value=None),
        mock.patch.object(fft, "_has_scipy", return_value=True),
        mock.patch.object(threads, "most", lambda limit: limit or 1),
        mock.patch.object(compiled, "version", return_value=numba),
        mock.patch.object(compiled, "kernel", kernel_of),
    ):
        gpuconv.clear_cache()
        yield
    gpuconv.clear_cache()


def kernel_of(name, constants, dtype):
    """Return the name of a compiled kernel in its place."""
    return types.SimpleNamespace(__name__=f"{name}{constants} of {dtype}")


def found(where, what, one_in=1):
    """Return the lines of the record for a group, or for one in so many of its calls, by the names of the calls."""
    with as_on_any_machine(where):
        some = ((name, made) for name, made in calls_of(where, what) if is_drawn(name, one_in))
        return {f"{where} {what}: {name}": short(made()) for name, made in some}


def main(words):
    if words:
        for where, what in GROUPS:
            with as_on_any_machine(where):
                for name, made in calls_of(where, what):
                    if all(word in f"{where} {what}: {name}" for word in words):
                        print(f"{where} {what}: {name}", made(), sep="\n", end="\n\n")
        return
    record, before = {}, json.loads(RECORD.read_text())
    for group in GROUPS:
        record |= found(*group)
    for name, line in record.items():
        was, now = (text.partition(";")[0] for text in (before.get(name, ""), line))
        if name.startswith("choice") and was != now:
            print(f"{name}: {was} -> {now}")
    RECORD.write_text(json.dumps(record, indent=0) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
