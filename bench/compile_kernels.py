"""Compiles the kernels that suites and tests need, on all cores: python bench/compile_kernels.py [--arch sm_90a]

What is compiled goes to the cache (GPUCONV_CACHE_DIR), where calls find it. The architecture is the GPU's at hand.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from gpuconv import dtypes
from gpuconv.algorithms import implicit_gemm
from gpuconv.backend import BackendError, cupy_backend
from gpuconv.benchmark import layers
from gpuconv.cuda import arguments, compiler, report
from gpuconv.cuda.cache import cubin_path
from gpuconv.cuda.device import MODEL
from gpuconv.geometry import DIRECTIONS
from tests.cases import CASES

LAYOUTS = ("channels_first", "channels_last")


def architecture():
    """That of the current device."""
    return compiler.architecture_for(cupy_backend().xp.cuda.Device().compute_capability)


def modules():
    """The modules of the report, of every layer of the suites at a GPU's batch size, and of the tests' cases."""
    cases = dict.fromkeys(case for cases in layers.suites().values() for case in cases)
    tested = [(case.geometry(layout), dtype) for case in CASES for layout in LAYOUTS for dtype in dtypes.available()]
    tested = [(geometry, dtype) for geometry, dtype in tested if not arguments.why_not(geometry)]
    of_layers = [
        plan.module
        for case in cases
        for layout in LAYOUTS
        for dtype in dtypes.available()
        if dtype.name != "complex128"  # which the campaign does not time
        for precision in (("ieee", "tf32") if dtype.name == "float32" else ("ieee",))
        for direction in DIRECTIONS
        for plan in implicit_gemm.plans(case.geometry(case.batches[1], layout), dtype, direction, MODEL, precision)[:1]
    ]
    narrow = report.launched(tested)
    wide = [module._replace(wide=True) for module in narrow if dict(module.types)["First"] == "float32"]
    return list(dict.fromkeys([*report.modules(), *of_layers, *narrow, *wide]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", help="such as sm_90a (default that of the GPU at hand)")
    options = parser.parse_args()
    try:
        arch = options.arch or architecture()
    except BackendError as error:
        sys.exit(f"without a GPU --arch must name the architecture: {error}")
    start = time.perf_counter()
    wanted = modules()
    print(f"{len(wanted)} modules found in {time.perf_counter() - start:.1f} s", flush=True)
    start = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        paths = list(pool.map(lambda module: cubin_path(module, arch), wanted))
    print(f"{len(paths)} modules for {arch} in {time.perf_counter() - start:.1f} s, in {paths[0].parent}")


if __name__ == "__main__":
    main()
