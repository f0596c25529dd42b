"""Runs a program of the GPU campaign without a GPU: ``python -m tests.dry_run PROGRAM [ARGUMENTS]``.

The kernels run on the CPU and layers and matrices are tiny, but everything else is what runs on a GPU, so that no bug
in it costs a GPU's minutes. PyTorch on the CPU stands in as the peer.
"""

import contextlib
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

from gpuconv import cli
from gpuconv.benchmark import layers, limits
from gpuconv.cuda import report
from tests import pretend
from tests.test_golden import BY_KERNEL, emulated

LAYERS = 1  # of each suite
SMALLER = {
    "bench/micro.py": {"ADDITIONS": 2**14, "EXTENT": 64, "BATCH": 1},
    "bench/compile_kernels.py": {"architecture": lambda: "sm_90a", "modules": lambda: list(report.modules())[::8]},
    "tests/golden/make_golden.py": {
        "cupy_backend": lambda: pretend.Backend("cupy", None, None),
        "on_gpu": lambda cupy: (emulated("fast"), set(BY_KERNEL), {"device": "pretended GPU"}),
    },
}


def tiny(case):
    """A layer of the same kind, with few channels and small images."""
    groups = min(case.groups, 2)
    depthwise = case.groups == case.channels
    channels = groups if depthwise else groups * min(case.channels // case.groups, 2)
    filters = groups if depthwise else groups * min(case.filters // case.groups, 2)
    windows = (dilation * (k - 1) + 1 for dilation, k in zip(case.dilation, case.kernel, strict=True))
    extent = tuple(min(n, window + 4) for n, window in zip(case.input, windows, strict=True))
    return replace(case, channels=channels, filters=filters, groups=groups, input=extent, batches=(1, 1))


@contextlib.contextmanager
def small():
    """Suites of one tiny layer each, limits in no time."""
    suites = {name: tuple(map(tiny, cases[:LAYERS])) for name, cases in layers.suites().items()}
    with (
        mock.patch.object(layers, "suites", return_value=suites),
        mock.patch.dict(limits.EXTENT, cupy=32),
        mock.patch.dict(limits.COPY_BYTES, cupy=2**16),
    ):
        yield


def main():
    program, *arguments = sys.argv[1:]
    sys.argv = [program, *arguments]
    with small():
        if program == "bench/compile_kernels.py":  # which needs CuPy's compiler, and no GPU
            run(program)
        with pretend.gpu():
            sys.exit(cli.main(arguments) if program == "gpuconv" else run(program))


def run(program):
    """The main function of a file, with what makes it small."""
    spec = importlib.util.spec_from_file_location(Path(program).stem, program)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in SMALLER.get(program, {}).items():
        setattr(module, name, value)
    sys.exit(module.main())


if __name__ == "__main__":
    main()
