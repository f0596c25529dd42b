"""What people would use in the place of gpuconv, on the same numbers.

A peer is a module with ``FORMS`` (the layouts in which it is measured), ``about()`` (its version), ``why_not(problem,
direction, form)`` and ``call(problem, direction, form)``, a function whose result ``array(result, problem)`` gives as a
channels_first array of the problem's array module.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from types import ModuleType

from gpuconv.arrays import Backend

# name: what it needs, and where it computes
PEERS = {
    "torch": ("torch", "numpy cupy"),
    "scipy": ("scipy", "numpy"),
    "loops": ("numpy", "numpy"),
    "cupyx": ("cupy", "cupy"),
}


def module(name: str) -> ModuleType:
    """The module of a peer."""
    return importlib.import_module(f"gpuconv.benchmark.peers.{name}")


def checked(names: Sequence[str], place: Backend) -> list[str]:
    """These peers; ValueError where one is not installed or computes elsewhere than on this backend."""
    for name in names:
        needed, kinds = PEERS[name]
        if place.kind not in kinds:
            raise ValueError(f"the peer {name} computes on {kinds} alone, not on {place.name}")
        if importlib.util.find_spec(needed) is None:
            raise ValueError(f"the peer {name} needs {needed}: pip install {needed}")
    return list(names)


def reason(error: Exception) -> str:
    """What a peer's error says, in one line."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
