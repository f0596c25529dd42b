"""Compiles the kernels that the suites need, on all cores: python bench/compile_kernels.py [--arch sm_90a]

What is compiled goes to the cache (GPUCONV_CACHE_DIR), where calls find it. The architecture is the GPU's at hand.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from gpuconv import dtypes
from gpuconv.backend import BackendError, cupy_backend
from gpuconv.benchmark import layers
from gpuconv.cuda import compiler, report
from gpuconv.cuda.cache import cubin_path


def architecture():
    """That of the current device."""
    return compiler.architecture_for(cupy_backend().xp.cuda.Device().compute_capability)


def modules():
    """The modules that the kernels' algorithms launch for every layer and dtype, and for those of the report."""
    cases = dict.fromkeys(case for cases in layers.suites().values() for case in cases)
    wanted = [(case.geometry(1), dtype) for case in cases for dtype in dtypes.available()]
    return list(dict.fromkeys([*report.modules(), *report.launched(wanted)]))


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
