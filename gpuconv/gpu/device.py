"""The properties of the current device by which kernels are selected: compute capability and multiprocessors."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple


class Device(NamedTuple):
    """The properties of a GPU that affect the selection of kernels."""

    capability: int  # 90 for 9.0
    multiprocessors: int


# Used on machines without a GPU: an H200, according to its data sheet.
MODEL = Device(90, 132)


def current() -> Device:
    """Return the properties of CuPy's current device."""
    import cupy

    return _device(int(cupy.cuda.Device().id))


@cache
def _device(number: int) -> Device:
    import cupy

    device = cupy.cuda.Device(number)
    return Device(int(device.compute_capability), int(device.attributes["MultiProcessorCount"]))
