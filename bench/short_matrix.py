"""Run every kernel on a few small convolutions, for compute-sanitizer.

    compute-sanitizer python bench/short_matrix.py

Memory is allocated by the driver, without a pool, so that an access beyond an array is also beyond its allocation.
Results are compared with the float64 reference. A GPU is required.
"""

import sys

from gpuconv import dtypes, settings
from gpuconv.arrays import BackendError
from gpuconv.backends import backend_named
from gpuconv.benchmark.check import GEOMETRIES
from gpuconv.benchmark.problem import Problem
from gpuconv.geometry import DIRECTIONS
from gpuconv.gpu import direct, implicit_gemm, scatter, scatter_plain
from gpuconv.request import Request
from gpuconv.select import MODULES

KERNELS = {"implicit_gemm": implicit_gemm, "direct": direct, "scatter": scatter, "scatter_plain": scatter_plain}
DTYPES = ("float16", "float32", "complex64")


def main():
    try:
        place = backend_named(None)
    except BackendError as error:
        sys.exit(f"short_matrix.py needs a GPU: {error}")
    MODULES.update(KERNELS)
    place.xp.cuda.set_allocator(None)
    count = wrong = 0
    for geometry in GEOMETRIES:
        for dtype in map(dtypes.named, DTYPES):
            problem = Problem(geometry, dtype, place.xp)
            for direction in DIRECTIONS:
                for name, module in KERNELS.items():
                    if (name, direction) in (("scatter", "forward"), ("scatter_plain", "forward")):
                        continue  # has no kernel
                    if module.why_not(Request(geometry, dtype, direction, place, False, settings.workspace_limit())):
                        continue
                    verdict = problem.verdict(problem.call(direction, algorithm=name)(), direction)
                    count += 1
                    if not verdict.right:
                        wrong += 1
                        print(f"wrong: {name}, {direction}, {dtype}, {geometry}", flush=True)
    print(f"{count} results, {wrong} wrong")
    sys.exit(1 if wrong or not count else 0)


if __name__ == "__main__":
    main()
