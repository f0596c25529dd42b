"""Memory traffic of the three algorithms for gradients on a GPU: ``python -m tests.gradient_roads``.

The algorithms are tiles of a matrix product (implicit_gemm), one sum per thread (direct), and sums that are added to
their destinations (scatter). For a few small layers in float32 and channels_last, the global memory that the kernels
read and write is counted in KiB of whole 32-byte sectors, and so are their atomic additions. They are counted on the
CPU in checked mode, without caches; time is not measured. The output is the table of kernels/README.md.
"""

import collections
import itertools

import numpy as np

import gpuconv
from tests.backends import arrays_of
from tests.emulation import launcher

ROADS = ("implicit_gemm", "direct", "scatter")
SECTOR = 32  # bytes

# Shapes of x and w of channels_last layers: those of ResNet-50 with channels and extents divided by four, and a
# depthwise layer.
LAYERS = {
    "3x3, 32 @14": ((2, 14, 14, 32), (3, 3, 32, 32), {"padding": 1}),
    "3x3, 32 @14, stride 2": ((2, 14, 14, 32), (3, 3, 32, 32), {"padding": 1, "stride": 2}),
    "1x1, 64 to 16 @14": ((2, 14, 14, 64), (1, 1, 64, 16), {}),
    "depthwise 3x3, 36 @14": ((2, 14, 14, 36), (3, 3, 1, 36), {"padding": 1, "groups": 36}),
}


def moved(algorithm, direction, x_shape, w_shape, settings):
    """Return (KiB read, KiB written, atomic additions) of the kernels of a gradient."""
    settings = {**settings, "layout": "channels_last", "algorithm": algorithm}
    x, w = np.ones(x_shape, np.float32), np.ones(w_shape, np.float32)
    dy = np.ones(gpuconv.conv(x, w, **{**settings, "algorithm": "im2col"}).shape, np.float32)
    with arrays_of("emulated"), launcher.using(mode="checked", profiled=True, order="natural") as launches:
        if direction == "dx":
            gpuconv.conv_data_grad(dy, w, x.shape, **settings)
        else:
            gpuconv.conv_weight_grad(dy, x, w.shape, **settings)
    sectors = collections.Counter()
    for access in (access for launch in launches for access in launch.accesses if access.memory == "global"):
        sectors[access.kind] += access.cost
    written = sectors["write"] + sectors["atomic"]
    return *(n * SECTOR / 1024 for n in (sectors["read"], written)), sum(one.global_atomics for one in launches)


def row(layer, direction):
    """Return the row of a layer and a gradient."""
    found = [moved(road, direction, *LAYERS[layer]) for road in ROADS]
    kib = " | ".join(f"{read:,.0f} | {written:,.0f}" for read, written, _ in found)
    return f"| {layer} | {direction} | {kib} | {found[-1][-1]:,} |"


def table():
    """Return a table with a row for each layer and gradient."""
    cells = " | ".join(f"`{road}` reads | writes" for road in ROADS)
    head = [f"| layer | gradient | {cells} | atomic additions |", "|---|---|" + "--:|" * (2 * len(ROADS) + 1)]
    return "\n".join([*head, *(row(*one) for one in itertools.product(LAYERS, ("dx", "dw")))])


if __name__ == "__main__":
    print(table())
