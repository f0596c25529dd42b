"""Occupancy: the threads of a multiprocessor that a kernel can use, given the registers and shared memory of a block.

The limits are those of CUDA's occupancy calculator (cuda_occupancy.h of CUDA 13.0). Of the memory that L1 cache and
shared memory have in common, shared memory gets as much as is permitted.
"""

from __future__ import annotations

from typing import NamedTuple

_REGISTERS = 65536  # of a multiprocessor, in four partitions; allocated to warps in units of 256
_PARTS, _REGISTER_UNIT = 4, 256


class _Limits(NamedTuple):
    """The resources of a multiprocessor."""

    threads: int
    blocks: int
    shared_bytes: int
    reserved: int  # bytes of shared memory that the system reserves for each block
    unit: int  # allocation unit of shared memory in bytes


_KIB = 1024
_LIMITS = {
    "sm_75": _Limits(1024, 16, 64 * _KIB, 0, 256),
    "sm_80": _Limits(2048, 32, 164 * _KIB, _KIB, 128),
    "sm_86": _Limits(1536, 16, 100 * _KIB, _KIB, 128),
    "sm_87": _Limits(1536, 16, 164 * _KIB, _KIB, 128),
    "sm_89": _Limits(1536, 24, 100 * _KIB, _KIB, 128),
    "sm_90a": _Limits(2048, 32, 228 * _KIB, _KIB, 128),
    "sm_100a": _Limits(2048, 32, 228 * _KIB, _KIB, 128),
    "sm_120": _Limits(1536, 24, 100 * _KIB, _KIB, 128),
}
ARCHITECTURES = tuple(_LIMITS)


def blocks(architecture: str, registers: int, threads: int, shared_bytes: int) -> int:
    """Return how many blocks of a kernel fit a multiprocessor at a time.

    >>> blocks("sm_90a", registers=128, threads=128, shared_bytes=48 * 1024)
    4
    """
    limits = _LIMITS[architecture]
    warps = _rounded_up(threads, 32) // 32
    of_a_warp = _rounded_up(registers * 32, _REGISTER_UNIT)
    by_registers = _REGISTERS // _PARTS // of_a_warp * _PARTS // warps
    of_a_block = _rounded_up(shared_bytes + limits.reserved, limits.unit)
    by_memory = limits.shared_bytes // of_a_block if of_a_block else limits.blocks
    return min(limits.blocks, limits.threads // (32 * warps), by_registers, by_memory)


def occupancy(architecture: str, registers: int, threads: int, shared_bytes: int) -> float:
    """Return the fraction of a multiprocessor's threads that these blocks use.

    >>> occupancy("sm_90a", registers=128, threads=128, shared_bytes=48 * 1024)
    0.25
    """
    warps = _rounded_up(threads, 32) // 32
    return blocks(architecture, registers, threads, shared_bytes) * warps * 32 / _LIMITS[architecture].threads


def _rounded_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
