"""Launches of kernels on the CPU: with the same arguments as on a GPU, on NumPy arrays."""

import contextlib
import ctypes
import functools
import itertools
import os
import threading
import types
from typing import NamedTuple

import numpy as np

from gpuconv.arrays import Backend
from gpuconv.gpu.kernel import parameters
from gpuconv.gpu.launch import check
from tests.emulation import loader

ORDERS = ("natural", "reverse", "random")
SECONDS = 30.0  # the time limit of a launch
STATIC_MEMORY = 48 << 10  # bytes of shared memory that a kernel may declare
SHARED_MEMORY = 227 << 10  # bytes that a block may use in total, on sm_90

_one_at_a_time = threading.Lock()  # all threads share the state of the runtime


class Options:
    """The options of launches: mode, order of threads and blocks, time of asynchronous copies, time limit.

    If ``order`` is None, the launches cycle through the three orders. ``launches`` lists the launches, with their
    atomic operations and, if they are profiled (in checked mode), with their memory accesses.
    """

    def __init__(self):
        self.mode = os.environ.get("GPUCONV_KERNELS_ON_CPU", "fast")
        self.order, self.late_copies, self.seconds = None, True, SECONDS
        self.profiled = False
        self.seed = itertools.count(1)
        self.launches = []


options = Options()


@contextlib.contextmanager
def using(**changes):
    """Enter a context with other options; its value is the list of the launches made in it."""
    before = {name: getattr(options, name) for name in (*changes, "launches")}
    options.launches = []
    for name, value in changes.items():
        setattr(options, name, value)
    try:
        yield options.launches
    finally:
        for name, value in before.items():
            setattr(options, name, value)


class Access(NamedTuple):
    """The cost of an instruction's memory requests, in wavefronts (shared) or sectors (global); see profile.cpp."""

    line: str  # "scatter.cu:27"
    memory: str  # "shared" or "global"
    kind: str  # "read", "write" or "atomic"
    width: int  # bytes of one lane
    requests: int
    cost: int
    least: int  # the cost without bank conflicts, or in the fewest sectors that hold the bytes


class Launch(NamedTuple):
    """The record of a launch."""

    name: str
    grid: int | tuple
    order: str
    global_atomics: int
    accesses: list[Access]


class _Argument(ctypes.Structure):
    _fields_ = (
        ("memory", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
        ("origin", ctypes.c_ssize_t),
        ("name", ctypes.c_char_p),
        ("slot", ctypes.c_int),
        ("read_only", ctypes.c_int),
        ("element", ctypes.c_size_t),
    )


class LaunchOptions(ctypes.Structure):
    _fields_ = (
        ("order", ctypes.c_int),
        ("seed", ctypes.c_uint64),
        ("late_copies", ctypes.c_int),
        ("profiled", ctypes.c_int),
        ("seconds", ctypes.c_double),
    )


def prepared(kernel, grid, block, arguments, shared_memory=0):
    """Return a function that launches a kernel; the emulator's replacement of gpuconv.gpu.launch.prepared."""
    check(kernel, grid, arguments)
    return functools.partial(_launch, kernel, grid, block, shared_memory)


def _launch(kernel, grid, block, shared_memory, *arguments):
    """Run a kernel of the package; raise EmulationError with its errors and their source lines."""
    __tracebackhide__ = True
    library = loader.library_for(kernel.module, options.mode)
    names = parameters(kernel.module.stem, kernel.name)
    run(library, kernel.name, grid, block, arguments, shared_memory, [(p.name, p.is_constant) for p in names])


def run(library, name, grid, block, arguments, shared_memory=0, names=None):
    """Run a kernel of any library. ``names`` has the name of each parameter, and whether it is read-only."""
    __tracebackhide__ = True
    entry, declared = library.kernel(name)
    sizes = [parameter.bytes for parameter in itertools.takewhile(lambda one: one.bytes, declared)]
    names = names or [(f"argument {i}", False) for i in range(len(arguments))]
    assert len(arguments) == len(sizes) == len(names), f"{name} takes {len(sizes)} arguments"
    slots, given, kept = (ctypes.c_void_p * max(1, len(arguments)))(), [], []
    for i, (argument, size, (label, is_constant)) in enumerate(zip(arguments, sizes, names, strict=True)):
        if isinstance(argument, np.ndarray) and argument.ndim:
            low, high = np.lib.array_utils.byte_bounds(argument)
            origin = argument.__array_interface__["data"][0] - low
            given.append(_Argument(low, high - low, origin, label.encode(), i, is_constant, _element(argument.dtype)))
            continue
        value = b"\0" * 8 if argument is None else argument.tobytes()
        assert len(value) == size, f"{name}: {label} has {size} bytes, and {len(value)} were given"
        kept.append(_aligned(value))
        slots[i] = ctypes.addressof(kept[-1])
    static = library.static_memory(name)
    limits = (static, STATIC_MEMORY, "kernel declares"), (static + shared_memory, SHARED_MEMORY, "block has")
    for taken, most, what in limits:
        if taken > most:
            raise loader.EmulationError(f"{name} takes more than the {most} bytes of shared memory that a {what}")
    number = next(options.seed)
    order = ORDERS.index(options.order) if options.order else number % len(ORDERS)
    how = LaunchOptions(order, number, options.late_copies, options.profiled, options.seconds)
    grids, blocks = ((ctypes.c_uint * 3)(*((d, 1, 1) if isinstance(d, int) else d)) for d in (grid, block))
    array = (_Argument * len(given))(*given)
    runtime = loader.runtime()
    shared = ctypes.c_size_t(shared_memory)
    with _one_at_a_time:
        count = runtime.emulated_launch(
            library.handle, entry, grids, blocks, shared, slots, array, len(given), ctypes.byref(how)
        )
        atomics, accesses = runtime.emulated_global_atomics(), _accesses(library, runtime.emulated_profile().decode())
        options.launches.append(Launch(name, grid, ORDERS[order], atomics, accesses))
        reports = [library.located(runtime.emulated_report(i).decode()) for i in range(count)]
    if reports:
        raise loader.EmulationError(f"{name}, {ORDERS[order]} order:\n" + "\n".join(reports))


def _accesses(library, text):
    accesses = []
    for line in text.splitlines():
        offset, memory, kind, *counts = line.split()
        frames = library.frames(int(offset, 16))
        where = next((frame for frame in frames if ".cu:" in frame), frames[0])
        accesses.append(Access(where, memory, kind, *map(int, counts)))
    return accesses


def _element(dtype):
    """Return the bytes of a floating-point number or of the real part of a complex one; 0 for other numbers."""
    return {"f": dtype.itemsize, "c": dtype.itemsize // 2, "V": dtype.itemsize}.get(dtype.kind, 0)


def _aligned(value):
    """Return a copy of the bytes in memory that is aligned for any struct."""
    memory = (ctypes.c_char * (len(value) + 64))()
    aligned = (ctypes.c_char * len(value)).from_buffer(memory, -ctypes.addressof(memory) % 64)
    aligned.raw = value
    return aligned


class _Numpy(types.ModuleType):
    """NumPy, except that new memory is filled with NaN, so that missing writes are detected."""

    def __getattr__(self, name):
        return getattr(np, name)

    @staticmethod
    def empty(shape, dtype=float):
        array = np.empty(shape, dtype)
        array.reshape(-1).view(np.uint8)[...] = 0xFF
        return array


EMULATED = Backend("emulated", _Numpy("numpy"), prepared)
