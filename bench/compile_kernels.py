"""Compiles what the layers of suites need, on all cores: python bench/compile_kernels.py [--dtype NAMES] [SUITE ...]

What is compiled goes to the cache (GPUCONV_CACHE_DIR), where calls find it. Modules are compiled in the order in which
the suites need them, so that an interruption loses the last ones.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from gpuconv import dtypes, execute
from gpuconv.arguments import LAYOUTS
from gpuconv.backend import BackendError, cupy_backend
from gpuconv.benchmark import layers, run
from gpuconv.cuda import cache, compiler
from gpuconv.geometry import DIRECTIONS


def modules(cases, names):
    """The modules that ``auto`` launches for these layers at a GPU's batch size, each once, as they are found."""
    found = {}

    def remember(kernel, *_):
        found.setdefault(kernel.module)
        return lambda *_: None  # nothing runs the plan

    backend = cupy_backend()._replace(launch=remember)
    for case, batch, dtype in run.Plan(backend, dtypes=names).jobs(cases):
        kind, precision = ("float32", "tf32") if dtype == "tf32" else (dtype, "ieee")
        for layout in LAYOUTS:
            before = len(found)
            call = execute.Call.of(case.geometry(batch, layout), "cupy", dtypes.named(kind), "auto", precision, None)
            for direction in DIRECTIONS:
                execute.contiguous_plan(call._replace(backend=backend), direction)
            yield from list(found)[before:]


def compiled(wanted):
    """Compiles these modules, on all cores; how many were reached, and of how many."""
    architecture = compiler.architecture_for(cupy_backend().xp.cuda.Device().compute_capability)
    jobs = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for module in wanted:
                jobs.append(pool.submit(cache.cubin_path, module, architecture))
            for job in jobs:
                job.result()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
    return sum(not job.cancelled() for job in jobs), len(jobs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", nargs="*", default=list(layers.suites()), help="default all")
    parser.add_argument("--dtype", default=",".join(run.DTYPES), help="default %(default)s")
    options = parser.parse_args()
    start = time.perf_counter()
    try:
        done, found = compiled(modules(layers.selected(options.suite, ()), options.dtype.split(",")))
    except BackendError as error:
        sys.exit(f"compile_kernels.py needs a GPU: {error}")
    print(f"{done} of {found} modules compiled in {time.perf_counter() - start:.1f} s")
    sys.exit(done < found)


if __name__ == "__main__":
    main()
