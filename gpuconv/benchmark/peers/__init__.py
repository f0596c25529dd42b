"""Peers: other libraries that compute the same results, measured on the same numbers.

A peer is a module with ``FORMS`` (the layouts in which it is measured), ``about()`` (its version), ``why_not(problem,
direction, form)`` (the reason why it cannot compute a problem, or None) and ``call(problem, direction, form)``, which
returns a function without arguments. ``array(result, problem)`` converts the result of that function to a
channels_first array of the problem's array module.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from types import ModuleType

from gpuconv.arrays import Backend

# name: the module that it needs, and the backends on which it computes
PEERS = {
    "torch": ("torch", "numpy cupy"),
    "scipy": ("scipy", "numpy"),
    "loops": ("numpy", "numpy"),
    "cupyx": ("cupy", "cupy"),
}


def module(name: str) -> ModuleType:
    """Return the module of a peer."""
    return importlib.import_module(f"gpuconv.benchmark.peers.{name}")


def checked(names: Sequence[str], place: Backend) -> list[str]:
    """Return the peers; raise ValueError if one is not installed or does not compute on this backend."""
    for name in names:
        needed, kinds = PEERS[name]
        if place.kind not in kinds:
            raise ValueError(f"the peer {name} computes on {kinds} alone, not on {place.name}")
        if importlib.util.find_spec(needed) is None:
            raise ValueError(f"the peer {name} needs {needed}: pip install {needed}")
    return list(names)


def reason(error: Exception) -> str:
    """Return the message of a peer's error as one line."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
