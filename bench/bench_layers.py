"""Three layers for pytest-benchmark: ``pytest bench -n 0 --benchmark-only``."""

import pytest

import gpuconv
from gpuconv import dtypes
from gpuconv.benchmark.layers import selected
from gpuconv.benchmark.problem import Problem
from gpuconv.geometry import DIRECTIONS

NAMES = ("resnet50 3x3 128 @28", "resnet50 1x1 64>256 @56", "mobilenetv2 dw 3x3 144 @56")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", NAMES)
def bench_layer(name, direction, benchmark):
    xp = gpuconv.array_module()
    (case,) = selected((), (name,))
    on_gpu = xp.__name__ == "cupy"
    call = Problem.of(case, case.batches[on_gpu], dtypes.named("float32"), xp).call(direction)

    def finished():
        call()
        if on_gpu:
            xp.cuda.get_current_stream().synchronize()

    benchmark(finished)
