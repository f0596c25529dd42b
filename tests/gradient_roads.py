"""The three roads to a gradient on a GPU, by what they move: ``python -m tests.gradient_roads``.

Tiles of a matrix product (implicit_gemm), one sum by each thread (direct), or sums that are added where they belong
(scatter): for a few small layers, float32 and channels_last, what the kernels read and write of global memory, in KiB
of whole 32-byte sectors, and how many atomic additions they make. Counted on the CPU in checked mode, without caches;
time is not measured. Prints the table of kernels/README.md.
"""

import collections
import itertools

import numpy as np

import gpuconv
from tests.backends import arrays_of
from tests.emulation import launcher

ROADS = ("implicit_gemm", "direct", "scatter")
SECTOR = 32  # bytes

# x and w of channels_last layers: ResNet-50's with channels and extents divided by four, and a depthwise one.
LAYERS = {
    "3x3, 32 @14": ((2, 14, 14, 32), (3, 3, 32, 32), {"padding": 1}),
    "3x3, 32 @14, stride 2": ((2, 14, 14, 32), (3, 3, 32, 32), {"padding": 1, "stride": 2}),
    "1x1, 64 to 16 @14": ((2, 14, 14, 64), (1, 1, 64, 16), {}),
    "depthwise 3x3, 36 @14": ((2, 14, 14, 36), (3, 3, 1, 36), {"padding": 1, "groups": 36}),
}


def moved(algorithm, direction, x_shape, w_shape, settings):
    """(KiB read, KiB written, atomic additions) of a gradient's kernels."""
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
    """The row of a layer and a gradient."""
    found = [moved(road, direction, *LAYERS[layer]) for road in ROADS]
    kib = " | ".join(f"{read:,.0f} | {written:,.0f}" for read, written, _ in found)
    return f"| {layer} | {direction} | {kib} | {found[-1][-1]:,} |"


def table():
    """A row for each layer and gradient."""
    cells = " | ".join(f"`{road}` reads | writes" for road in ROADS)
    head = [f"| layer | gradient | {cells} | atomic additions |", "|---|---|" + "--:|" * (2 * len(ROADS) + 1)]
    return "\n".join([*head, *(row(*one) for one in itertools.product(LAYERS, ("dx", "dw")))])


if __name__ == "__main__":
    print(table())
