"""Print the times that the model of implicit GEMM predicts for ResNet-50 on GPUs, and the unit that limits each.

    python bench/gemm_limits.py

The table is in kernels/README.md. It is a model (gpuconv/gpu/gemm_model.py), not a measurement.
"""

import math
from typing import NamedTuple

from gpuconv import dtypes
from gpuconv.benchmark import layers
from gpuconv.gpu import gemm_model, gemm_plan
from gpuconv.gpu.device import Device

DTYPE, BATCH = "float16", 32


class Gpu(NamedTuple):
    """A GPU according to its data sheet."""

    device: Device
    clocks: float  # per microsecond
    bandwidth: float  # bytes per microsecond


GPUS = {
    "H200": Gpu(Device(90, 132), 1830, 4.8e6),
    "A100 80 GB": Gpu(Device(80, 108), 1410, 2.0e6),
    "RTX 3090": Gpu(Device(86, 82), 1695, 0.936e6),
    "RTX 4090": Gpu(Device(89, 128), 2520, 1.008e6),
}


def predicted(geometry, gpu):
    """Return the microseconds of forward and the unit that limits them."""
    dtype = dtypes.named(DTYPE)
    plan, *_ = gemm_plan.plans(geometry, dtype, "forward", gpu.device)
    computing = plan.choice.microseconds * gemm_model.CLOCKS / gpu.clocks
    moving = sum(math.prod(geometry.shape_of(role)) for role in "xwy") * dtype.itemsize / gpu.bandwidth
    limit = gemm_model.clocks_of_iteration(plan.problem, plan.choice.tile).limit
    return (moving, "memory") if moving > computing else (computing, limit)


def table():
    """Return the table in Markdown."""
    lines = [f"| layer | {' | '.join(GPUS)} |", f"|---|{'--:|' * len(GPUS)}"]
    for case in layers.suites()["resnet50"]:
        geometry = case.geometry(BATCH, "channels_last")
        found = (predicted(geometry, gpu) for gpu in GPUS.values())
        cells = " | ".join(f"{microseconds:.0f} us, {limit}" for microseconds, limit in found)
        lines.append(f"| {case.name.removeprefix('resnet50 ')} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
