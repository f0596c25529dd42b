"""Views: parts of arrays, described by shape and strides without data. Plans are made of views."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy

from gpuconv.arguments import Shape

_ALL = (slice(None),) * 64


class View:
    """A part of one of the memories of a plan: an array without the address of its memory.

    It can be indexed, transposed and reshaped like an array. None of these operations copies.
    """

    __slots__ = ("base", "dtype", "memory", "offset", "shape", "strides")

    def __init__(
        self, memory: int, offset: int, shape: Shape, strides: Shape, dtype: numpy.dtype, base: int = 0
    ) -> None:
        self.memory = memory  # number of the memory
        self.offset = offset  # bytes from the beginning of the memory to the first element
        self.shape, self.strides, self.dtype = shape, strides, dtype
        self.base = base  # address of the memory, modulo 16

    def __repr__(self) -> str:
        return f"memory {self.memory}, byte {self.offset}: {self.dtype.name} {self.shape}, strides {self.strides}"

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def steps(self) -> Shape:
        """The strides in elements."""
        return tuple(step // self.itemsize for step in self.strides)

    @property
    def address(self) -> int:
        """The address of the first element, modulo 16."""
        return (self.base + self.offset) % 16

    @property
    def is_aligned(self) -> bool:
        """Whether every element is aligned for its dtype."""
        steps = (step for step, size in zip(self.strides, self.shape, strict=True) if size > 1)
        return not any(place % self.dtype.alignment for place in (self.address, *steps))

    def strided(self, shape: Shape, strides: Shape) -> View:
        """Return the view that begins at the same element, with another shape and other strides."""
        return View(self.memory, self.offset, shape, strides, self.dtype, self.base)

    def shaped(self, shape: Shape) -> View:
        """Return the beginning of a flat contiguous view in this shape."""
        return self.strided(shape, contiguous_strides(shape, self.dtype))

    def flat(self) -> View | None:
        """Return all elements in memory order as a flat view if they are contiguous, else None."""
        order = sorted(range(self.ndim), key=lambda axis: -self.strides[axis])
        run = merged([self.shape[axis] for axis in order], [self.strides[axis] for axis in order])
        is_dense = run is not None and (run[0] == 1 or run[1] == self.itemsize)
        return self.strided((self.size,), (self.itemsize,)) if is_dense else None

    def transpose(self, *axes: Any) -> View:
        order = axes[0] if len(axes) == 1 and not isinstance(axes[0], int) else axes
        return self.strided(tuple(self.shape[axis] for axis in order), tuple(self.strides[axis] for axis in order))

    def swapaxes(self, one: int, other: int) -> View:
        order = list(range(self.ndim))
        order[one], order[other] = order[other], order[one]
        return self.transpose(order)

    def __getitem__(self, index: Any) -> View:
        """Return the part that slices, ints, None and an Ellipsis select, as in NumPy."""
        parts = index if type(index) is tuple else (index,)
        if Ellipsis in parts:
            place = parts.index(Ellipsis)
            missing = len(self.shape) + 1 + parts.count(None) - len(parts)
            parts = (*parts[:place], *_ALL[:missing], *parts[place + 1 :])
        shape, strides, offset, axis = [], [], self.offset, 0
        for part in parts:
            if part is None:
                shape.append(1)
                strides.append(0)
                continue
            size, step = self.shape[axis], self.strides[axis]
            axis += 1
            if type(part) is slice:
                start, stop, by = part.indices(size)
                shape.append(len(range(start, stop, by)))
                strides.append(by * step)
                offset += start * step
            else:
                offset += (part if part >= 0 else part + size) * step
        shape += self.shape[axis:]
        strides += self.strides[axis:]
        return View(self.memory, offset, tuple(shape), tuple(strides), self.dtype, self.base)

    def reshape(self, *shape: Any) -> View:
        """Return the view in another shape; ValueError if that needs a copy."""
        wanted = list(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        if -1 in wanted:
            wanted[wanted.index(-1)] = self.size // -math.prod(wanted)
        if not self.size:
            return self.strided(tuple(wanted), contiguous_strides(wanted, self.dtype))
        runs = _runs(self.shape, self.strides)
        extent, step = runs.pop() if runs else (1, self.itemsize)
        strides, covered = [], 1
        for size in reversed(wanted):
            if covered == extent and size > 1 and runs:
                (extent, step), covered = runs.pop(), 1
            strides.append(covered * step)
            covered *= size
            if extent % covered:
                raise ValueError(f"{self} cannot be seen as {tuple(wanted)} without a copy")
        return self.strided(tuple(wanted), tuple(reversed(strides)))


def _runs(shape: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """Return the extents and strides of the fewest axes that are equivalent to these."""
    runs: list[tuple[int, int]] = []
    for size, step in zip(shape, strides, strict=True):
        if runs and runs[-1][1] == size * step and size > 1:
            runs[-1] = (runs[-1][0] * size, step)
        elif size > 1:
            runs.append((size, step))
    return runs


def merged(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int] | None:
    """Return the extent and stride of one axis that is equivalent to these axes, or None."""
    runs = _runs(shape, strides) or [(1, 0)]
    return runs[0] if len(runs) == 1 else None


def is_contiguous(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> bool:
    """Return whether an array with these strides, in bytes, is C-contiguous."""
    return 0 in shape or merged(shape, strides) in ((1, 0), (math.prod(shape), itemsize))


def contiguous_strides(shape: Sequence[int], dtype: numpy.dtype) -> Shape:
    """Return the strides, in bytes, of a C-contiguous array."""
    strides, step = [], dtype.itemsize
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def first_byte(shape: Shape, strides: Shape) -> int:
    """Return the offset in bytes from the first element of an array to its lowest address."""
    return sum((size - 1) * step for size, step in zip(shape, strides, strict=True) if step < 0 and size)
