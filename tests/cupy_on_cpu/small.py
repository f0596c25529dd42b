"""Run a program of the GPU campaign on a small scale: ``python -m tests.cupy_on_cpu.small PROGRAM [ARGUMENTS]``.

Layers and matrices are tiny and samples few, but everything else is the same as on a GPU, so that bugs are found before
they cost time on a GPU. PyTorch for the CPU is the peer; it computes on the memory of the emulated device.
"""

import contextlib
import ctypes
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy

from gpuconv import cli
from gpuconv.benchmark import layers, limits, timing

LAYERS = 1  # of each suite
SMALLER = {
    "bench/micro.py": {"ADDITIONS": 2**12, "EXTENT": 64, "BATCH": 1},
    "bench/short_matrix.py": {"DTYPES": ("float32",)},
    "bench/tune_tiles.py": {"DTYPES": ("float16",), "CANDIDATES": 1},
}


def tiny(case):
    """Return a layer of the same kind with few channels and small images."""
    groups = min(case.groups, 2)
    depthwise = case.groups == case.channels
    channels = groups if depthwise else groups * min(case.channels // case.groups, 2)
    filters = groups if depthwise else groups * min(case.filters // case.groups, 2)
    windows = (dilation * (k - 1) + 1 for dilation, k in zip(case.dilation, case.kernel, strict=True))
    extent = tuple(min(n, window + 4) for n, window in zip(case.input, windows, strict=True))
    return replace(case, channels=channels, filters=filters, groups=groups, input=extent, batches=(1, 1))


@contextlib.contextmanager
def small():
    """Enter a context in which suites have one tiny layer each and limits are measured quickly."""
    suites = {name: tuple(map(tiny, cases[:LAYERS])) for name, cases in layers.suites().items()}
    with (
        mock.patch.object(layers, "suites", return_value=suites),
        mock.patch.dict(limits.EXTENT, cupy=32),
        mock.patch.dict(limits.COPY_BYTES, cupy=2**16),
        mock.patch.multiple(timing, ENOUGH=2, MOST=2, REPEATS=2),
        torch_on_the_device(),
    ):
        yield


@contextlib.contextmanager
def torch_on_the_device():
    """Enter a context in which PyTorch for the CPU exchanges arrays with CuPy and computes on them at once."""
    if importlib.util.find_spec("torch") is None:
        yield
        return
    import cupy
    import torch

    def tensor_of(array):
        cupy.cuda.runtime.deviceSynchronize()
        reach = sum((n - 1) * step for n, step in zip(array.shape, array.strides, strict=True)) + array.itemsize
        memory = (ctypes.c_char * (reach if array.size else 0)).from_address(array.data.ptr)
        return torch.from_numpy(numpy.ndarray(array.shape, array.dtype, memory, 0, array.strides))

    from_dlpack = cupy.from_dlpack
    with (
        mock.patch.object(torch, "from_dlpack", tensor_of),
        mock.patch.object(
            cupy,
            "from_dlpack",
            lambda x: cupy.asarray(x.numpy()) if isinstance(x, torch.Tensor) else from_dlpack(x),
        ),
        mock.patch.multiple(torch.cuda, ExternalStream=lambda pointer: None, set_stream=lambda stream: None),
    ):
        yield


def main():
    program, *arguments = sys.argv[1:]
    sys.argv = [program, *arguments]
    with small():
        sys.exit(cli.main(arguments) if program == "gpuconv" else run(program))


def run(program):
    """Run the main function of a file with its SMALLER constants; it can import the files next to it."""
    sys.path.insert(0, str(Path(program).parent))
    spec = importlib.util.spec_from_file_location(Path(program).stem, program)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in SMALLER.get(program, {}).items():
        setattr(module, name, value)
    return module.main()


if __name__ == "__main__":
    main()
