"""Make the golden vectors on a GPU: ``python -m tests.golden.make_golden``.

Each kernel of primitives.cu runs once. The results are written to the folder of this file, or to a given folder, with
the device, the driver, the versions and the date. The tests compare the emulator with the committed vectors.
"""

import argparse
import datetime
import sys
import tempfile
from pathlib import Path

import numpy as np

import gpuconv
from gpuconv.arrays import BackendError
from gpuconv.backends import cupy_backend
from gpuconv.benchmark.results import commit
from gpuconv.gpu import compiler, kernels_folder, report
from tests.golden import vectors


def source():
    """Return the source for the compiler of a GPU."""
    files = (kernels_folder() / "primitives.cuh", vectors.FOLDER / "primitives.cu")
    return "".join(f'#line 1 "{path.name}"\n{path.read_text()}' for path in files)


def on_gpu(cupy):
    """Return a function that launches kernels on the current device, and the facts about that device."""
    device = cupy.cuda.Device()
    architecture = compiler.architecture_for(device.compute_capability)
    cubin, log = compiler.compiled_text(source(), "primitives.cu", architecture)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "primitives.cubin"
        path.write_bytes(cubin)
        module = cupy.RawModule(path=str(path))
        functions = {name: module.get_function(name) for name in report.parsed(log)}

    def launch(name, arguments):
        given = [cupy.asarray(a) if isinstance(a, np.ndarray) else a for a in arguments]
        functions[name]((1,), (32,), tuple(given))
        for array, result in zip(arguments, given, strict=True):
            if isinstance(array, np.ndarray):
                array[...] = result.get()

    properties = cupy.cuda.runtime.getDeviceProperties(device.id)
    about = {
        "device": properties["name"].decode(),
        "architecture": architecture,
        "driver": cupy.cuda.runtime.driverGetVersion(),
        "runtime": cupy.cuda.runtime.runtimeGetVersion(),
        "nvrtc": ".".join(map(str, compiler.version())),
        "cupy": cupy.__version__,
        "gpuconv": gpuconv.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    return launch, set(functions), about


def made(launch, kernels):
    """Return the results of the kernels that the architecture supports, as vectors.write expects them."""
    results = {}
    for vector in vectors.VECTORS:
        if vector.kernel in kernels:
            inputs = vector.inputs()
            results[vector.kernel] = inputs, vectors.computed(vector, inputs, launch)
    return results


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.golden.make_golden", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=vectors.FOLDER, help="default: tests/golden")
    folder = parser.parse_args().folder
    try:
        cupy = cupy_backend().xp
    except BackendError as error:
        sys.exit(f"golden vectors are made on a GPU: {error}")
    launch, kernels, about = on_gpu(cupy)
    path = folder / f"{about['device'].replace(' ', '-')}.npz"
    results = made(launch, kernels)
    vectors.write(path, results, about)
    print(f"{path}: {len(results)} of {len(vectors.VECTORS)} kernels; {about}")


if __name__ == "__main__":
    main()
