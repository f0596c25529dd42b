"""A request to an algorithm: one direction of a convolution, and the conditions under which it is computed."""

from __future__ import annotations

from typing import NamedTuple

import numpy

from gpuconv import dtypes, settings
from gpuconv.arrays import Backend
from gpuconv.geometry import Geometry
from gpuconv.types import Direction

# On NumPy, 1 / PLAN_SHARE of the limit is reserved for the plan of a call (gpuconv/plan.py).
PLAN_SHARE = 64


class Request(NamedTuple):
    """A direction of a convolution and its conditions. Algorithms refuse it (``why_not``) and estimate its time."""

    geometry: Geometry
    dtype: numpy.dtype  # of the result
    direction: Direction
    backend: Backend
    deterministic: bool = True  # whether additions must have a fixed order
    limit: int = settings.DEFAULT_WORKSPACE_LIMIT  # bytes: GPUCONV_WORKSPACE_LIMIT
    reserved: int = 0  # bytes of it that a padding mode takes (gpuconv/padding_modes.py)

    def as_forward(self) -> Request:
        """Return the forward convolution of dy that gives dx, for stride 1; other directions are unchanged."""
        if self.direction != "data_grad":
            return self
        return self._replace(geometry=self.geometry.inverse, direction="forward")

    @property
    def is_complex(self) -> bool:
        """Whether the dtype is complex."""
        return dtypes.is_complex(self.dtype)

    def lacks(self, elements: int, purpose: str) -> str | None:
        """Return a reason if this many elements exceed the budget, else None."""
        if elements <= self.budget:
            return None
        needed = elements * dtypes.accumulator(self.dtype).itemsize
        padded = f", of which {_bytes(self.reserved)} are for the padded x" if self.reserved else ""
        return (
            f"it needs {_bytes(needed)} of workspace for {purpose}, but GPUCONV_WORKSPACE_LIMIT is"
            f" {_bytes(self.limit)}{padded}"
        )

    @property
    def budget(self) -> int:
        """The number of elements, in the dtype of sums, that an algorithm may use as workspace."""
        room = max(0, workspace_of(self.limit, self.backend) - self.reserved)
        return room // dtypes.accumulator(self.dtype).itemsize


def _bytes(number: int) -> str:
    return f"{number / 2**20:.1f} MiB" if number >= 2**20 else f"{number} bytes"


def workspace_of(limit: int, backend: Backend) -> int:
    """Return the bytes of workspace that a limit permits; on NumPy less than the limit, since plans use some."""
    return limit if backend.launch is not None else limit - limit // PLAN_SHARE
