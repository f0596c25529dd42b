"""A pretended GPU for programs that need one: NumPy's arrays, the kernels on the CPU, and what CuPy has for timing.

Where the stand-in shows that the library keeps to CuPy's arrays, this lets whole programs run that time and compare.
"""

import contextlib
import importlib.machinery
import importlib.util
import sys
import time
import types
from unittest import mock

import numpy as np

import gpuconv.execute
from gpuconv.backend import Backend
from gpuconv.benchmark import command
from tests.emulation import launcher


class Event:
    def __init__(self):
        self.time = None

    def record(self):
        self.time = time.perf_counter()


class Graph:
    def launch(self, stream):
        assert stream.capturing is False


class Stream:
    """Runs at once; what is captured has run as well, and replays take no time."""

    ptr = 0
    capturing = False

    def __init__(self, non_blocking=False):
        assert non_blocking

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def synchronize(self):
        assert not self.capturing, "a stream that captures cannot be waited for"

    def begin_capture(self):
        self.capturing = True

    def end_capture(self):
        self.capturing = False
        return Graph()


def elapsed_milliseconds(before, after):
    return (after.time - before.time) * 1e3


def module():
    """What CuPy is here."""
    pool = types.SimpleNamespace(free_all_blocks=lambda: None)
    products = types.SimpleNamespace(COMPUTE_TYPE_TF32=7, COMPUTE_TYPE_DEFAULT=1)
    made = types.ModuleType("cupy")
    made.__spec__ = importlib.machinery.ModuleSpec("cupy", None)
    made.__version__ = "pretended"
    made.ndarray = ()  # arrays are NumPy's
    made.__getattr__ = lambda name: getattr(np, name)
    made.get_default_memory_pool = lambda: pool
    made._core = types.SimpleNamespace(
        get_compute_type=lambda _: 1, set_compute_type=lambda *_: None, _routines_linalg=products
    )
    made.cuda = types.SimpleNamespace(
        Event=Event,
        Stream=Stream,
        Device=lambda: types.SimpleNamespace(id=0),
        get_elapsed_time=elapsed_milliseconds,
        get_current_stream=lambda: Stream(non_blocking=True),
        set_allocator=lambda allocator: None,
        runtime=types.SimpleNamespace(
            getDeviceCount=lambda: 1,
            getDeviceProperties=lambda number: {"name": b"pretended GPU", "major": 9, "minor": 0, "l2CacheSize": 2**16},
            driverGetVersion=lambda: 0,
            runtimeGetVersion=lambda: 0,
        ),
    )
    return made


@contextlib.contextmanager
def gpu():
    """While it lasts, calls and ``gpuconv bench`` compute on this."""
    cupy = module()
    place = Backend("cupy", cupy, launcher.prepared)
    with (
        mock.patch.dict(sys.modules, {"cupy": cupy}),
        mock.patch.object(gpuconv.execute, "backend_for", return_value=place),
        mock.patch.object(command, "backend_named", return_value=place),
        mock.patch.object(sys.modules["gpuconv.backend"], "backend_named", return_value=place),
        launcher.using(order="natural"),
        _torch_without_streams(),
    ):
        yield place


@contextlib.contextmanager
def _torch_without_streams():
    """PyTorch for the CPU, as the peer that shares memory and stream with CuPy."""
    if importlib.util.find_spec("torch") is None:
        yield
        return
    import torch

    with mock.patch.multiple(torch.cuda, ExternalStream=lambda pointer: None, set_stream=lambda stream: None):
        yield
