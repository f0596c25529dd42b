"""Compile the kernels that the layers of suites need, on all cores.

    python bench/compile_kernels.py [--dtype NAMES] [SUITE ...]

Compiled modules are stored in the cache (GPUCONV_CACHE_DIR), where calls find them. Modules are compiled in the order
in which the suites need them, so that an interruption loses only the last ones.
"""

import argparse
import sys
import time

import ahead

from gpuconv import dtypes, execute
from gpuconv.arguments import LAYOUTS
from gpuconv.arrays import BackendError
from gpuconv.backends import cupy_backend
from gpuconv.benchmark import layers, run
from gpuconv.geometry import DIRECTIONS
from gpuconv.gpu import report


def modules(cases, names):
    """Yield the modules that ``auto`` launches for layers at the batch size of a GPU, each once, as they are found."""
    found = {}
    backend = report.recording(cupy_backend(), found)
    for case, batch, dtype in run.Schedule(backend, dtypes=names).jobs(cases):
        kind, precision = run.kind_and_precision(dtype)
        for layout in LAYOUTS:
            before = len(found)
            call = execute.Call.of(case.geometry(batch, layout), "cupy", dtypes.named(kind), "auto", precision, None)
            for direction in DIRECTIONS:
                execute.contiguous_plan(call._replace(backend=backend), direction)
            yield from list(found)[before:]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", nargs="*", default=list(layers.suites()), help="default all")
    parser.add_argument("--dtype", default=",".join(run.DTYPES), help="default %(default)s")
    options = parser.parse_args()
    start, jobs = time.perf_counter(), []
    try:
        with ahead.compiling() as compiled:
            for module in modules(layers.selected(options.suite, ()), options.dtype.split(",")):
                jobs.append(compiled(module))
            for job in jobs:
                job.result()
    except BackendError as error:
        sys.exit(f"compile_kernels.py needs a GPU: {error}")
    except KeyboardInterrupt:
        sys.exit(f"interrupted: {sum(job.done() and not job.cancelled() for job in jobs)} modules were compiled")
    print(f"{len(jobs)} modules in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
