"""Three layers for pytest-benchmark: ``pytest bench --benchmark-only``."""

import numpy as np
import pytest

import gpuconv
from gpuconv.benchmark.layers import BY_NAME
from gpuconv.benchmark.run import default_batch, prepared
from gpuconv.geometry import DIRECTIONS

LAYERS = ("resnet 3x3 128 @28", "resnet 1x1 64>256 @56", "mobilenet depthwise 3x3 144 @56")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", LAYERS)
def bench_layer(name, direction, benchmark):
    xp = gpuconv.array_module()
    geometry = BY_NAME[name].geometry(default_batch(xp))
    rng = np.random.default_rng(0)
    arrays = (
        xp.asarray(rng.standard_normal(shape, np.float32))
        for shape in (geometry.x_shape, geometry.w_shape, geometry.y_shape)
    )
    _, call = prepared(direction, geometry, *arrays)

    def finished():
        result = call()
        if xp is not np:
            xp.cuda.get_current_stream().synchronize()
        return result

    benchmark(finished)
