"""What kernels are chosen by: the current device's compute capability and multiprocessors."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple


class Device(NamedTuple):
    """A GPU, as far as the choice of a kernel goes."""

    capability: int  # 90 for 9.0
    multiprocessors: int


# In the place of a GPU where there is none: an H200, by its data sheet.
MODEL = Device(90, 132)


def current() -> Device:
    """CuPy's current device."""
    import cupy

    return _device(int(cupy.cuda.Device().id))


@cache
def _device(number: int) -> Device:
    import cupy

    device = cupy.cuda.Device(number)
    return Device(int(device.compute_capability), int(device.attributes["MultiProcessorCount"]))
