"""Cutting a convolution into blocks that fit a workspace, and seeing a block as a matrix without a copy."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias

from gpuconv.arguments import Shape
from gpuconv.geometry import Geometry
from gpuconv.operands import Index, Operand, in_place
from gpuconv.plan import Planner
from gpuconv.request import Request
from gpuconv.views import View, merged

# Blocks of fewer outputs are not worth their overhead, where fewer groups at a time make them longer.
FEWEST_OUTPUTS = 64
COPIED = 1 << 18  # weights that a thread copies at a time


class Arrangement(NamedTuple):
    """An order of axes in which an array becomes a stack of matrices: the axes before the last two groups stay."""

    axes: tuple[int, ...]
    row_axes: int
    column_axes: int

    @property
    def turned(self) -> Arrangement:
        """With rows and columns exchanged."""
        rows = len(self.axes) - self.column_axes
        lead = rows - self.row_axes
        axes = (*self.axes[:lead], *self.axes[rows:], *self.axes[lead:rows])
        return Arrangement(axes, self.column_axes, self.row_axes)

    def matrix(self, view: View) -> View | None:
        """The view as matrices where that takes no copy, else None."""
        return as_matrix(view.transpose(self.axes), self.row_axes, self.column_axes)

    def empty(self, shape: tuple[int, ...], flat: View) -> tuple[View, View]:
        """An array of this shape on workspace memory, and the same memory as matrices."""
        ordered = tuple(shape[axis] for axis in self.axes)
        columns = len(ordered) - self.column_axes
        rows = columns - self.row_axes
        memory = flat.shaped(ordered)
        matrix = memory.reshape(*ordered[:rows], math.prod(ordered[rows:columns]), math.prod(ordered[columns:]))
        return memory.transpose(_inverse(self.axes)), matrix

    def copies(self, operand: Operand, planner: Planner) -> bool:
        """Whether loading the operand takes room in the workspace."""
        return not operand.is_plain(planner.dtype) or self.matrix(operand.view) is None

    def load(self, operand: Operand, index: Index, flat: View, planner: Planner) -> View:
        """A piece of an operand as matrices: where it lies if that will do, else read into the workspace."""
        piece = operand.view[index]
        matrix = self.matrix(piece) if operand.is_plain(planner.dtype) else None
        if matrix is None:
            block, matrix = self.empty(piece.shape, flat)
            operand.read(index, block, planner)
        return matrix

    def place(self, target: View, flat: View, planner: Planner) -> tuple[View, View]:
        """Where matrix products that belong in target may be formed: target itself if that will do, else workspace."""
        matrix = self.matrix(target) if in_place(target, planner.dtype) else None
        return (target, matrix) if matrix is not None else self.empty(target.shape, flat)


def lies_by_filters(w: View) -> bool:
    """Whether w (*kernel, G, C/G, F/G) has its filters farther apart in memory than its channels."""
    step_c, step_f = map(abs, w.strides[-2:])
    return bool(step_f > step_c)


def copy_weights(w: Operand, into: View, planner: Planner) -> None:
    """Reads w into an array of its shape, by all threads."""
    by_filters = lies_by_filters(w.view)

    def copy(part: slice, planner: Planner) -> None:
        outer = (..., part) if by_filters else (..., part, slice(None))
        w.read(outer, into[outer], planner)

    extent = w.view.shape[-1 if by_filters else -2]
    planner.loop(list(pieces(extent, max(1, COPIED * extent // w.view.size))), copy, planner.threads)


def _inverse(axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(axes)), key=axes.__getitem__))


def largest(extent: int, limit: int, each: int) -> int:
    """How many of these, where each takes so much, fit the limit, evened out over the pieces; at least 1."""
    return _evened(extent, limit // each if each else extent)


def largest_fitting(extent: int, limit: float, cost: Callable[[int], float]) -> int:
    """The largest number up to an extent whose cost is within the limit, evened out over the pieces; at least 1."""
    return _evened(extent, bisect_right(range(1, extent + 1), limit, key=cost))


def _evened(extent: int, size: int) -> int:
    pieces = max(1, -(-extent // max(1, size)))
    return max(1, -(-extent // pieces))


def channels_innermost(images: View) -> bool:
    """Whether (*positions, G, C/G) lies in memory with its channels closer together than its pixels."""
    channel = images.strides[-1] if images.shape[-1] > 1 else images.strides[-2]
    return bool(abs(channel) < abs(images.strides[-3]))


def group_parts(geometry: Geometry, budget: int) -> tuple[tuple[slice, Geometry], ...]:
    """The groups, in as many parts as it takes for a few outputs of all of a part's channels to fit the budget."""
    size = _groups_at_once(geometry, budget)
    return tuple((groups, _part_of(geometry, groups.stop - groups.start)) for groups in pieces(geometry.groups, size))


def _groups_at_once(geometry: Geometry, budget: int) -> int:
    per_output = 3 * max(geometry.group_channels, geometry.group_filters) * geometry.taps  # windows, weights and sums
    return largest(geometry.groups, budget // FEWEST_OUTPUTS, per_output)


def largest_part(request: Request) -> Geometry:
    """The convolution of as many groups as are computed at once."""
    return _part_of(request.geometry, _groups_at_once(request.geometry, request.budget))


def _part_of(geometry: Geometry, groups: int) -> Geometry:
    channels, filters = groups * geometry.group_channels, groups * geometry.group_filters
    return replace(geometry, groups=groups, channels=channels, filters=filters)


class Buffer(NamedTuple):
    """A part of the workspace of a block."""

    elements: int
    needed: bool = True  # or what belongs there is used where it lies
    temporaries: int = 0  # arrays of its size that are allocated and freed beside it


Buffers: TypeAlias = Sequence[Buffer]


class Share(NamedTuple):
    """Some filters (or channels) at a time: as many as have their weights in half of the workspace."""

    extent: int
    at_once: int
    size: int  # elements of these weights

    @classmethod
    def of(cls, extent: int, each: int, planner: Planner) -> Share:
        """As many as fit, where the weights of each take so many elements."""
        at_once = largest(extent, planner.budget // 2, each)
        return cls(extent, at_once, each * at_once)

    def rest(self, planner: Planner, shares: int, most: int) -> int:
        """Elements of workspace that each of several threads has beside the weights, up to so many bytes."""
        return min((planner.budget - self.size) // shares, most // planner.dtype.itemsize)

    def loop(self, body: Callable[[slice, View, Planner], None], planner: Planner) -> None:
        """The steps of ``body(filters, space, planner)`` for some filters after the other, with space for weights."""

        def some(part: slice, planner: Planner) -> None:
            (space,) = planner.workspace(self.size)
            body(part, space, planner)

        planner.loop(list(pieces(self.extent, self.at_once)), some)


def pieces(extent: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most this size."""
    return (slice(start, min(start + size, extent)) for start in range(0, extent, size))


class Places(Sequence[Shape]):
    """Every index of an array with these extents, in order; not stored, for there may be many."""

    def __init__(self, extents: Shape) -> None:
        self.extents = extents

    def __len__(self) -> int:
        return math.prod(self.extents)

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        place = []
        for extent in reversed(self.extents):
            number, axis = divmod(number, extent)
            place.append(axis)
        return tuple(reversed(place))


class Blocks(Places):
    """Consecutive blocks of positions, as slices, each of at most the extents of a box; and the workspace of each."""

    def __init__(self, positions: Shape, box: Shape, sizes: Shape = ()) -> None:
        super().__init__(tuple(-(-extent // size) for extent, size in zip(positions, box, strict=True)))
        self.positions, self.box, self.sizes = positions, box, sizes

    @classmethod
    def fitting(
        cls, positions: Shape, limit: float, buffers: Callable[[Shape], Buffers], most: float = math.inf
    ) -> Blocks:
        """Blocks whose buffers, as elements of workspace, fit a limit; as long as possible on the last axes first.

        ``most`` is how many positions a block may have. At the least it is one.
        """

        def cost(box: Shape) -> float:
            if math.prod(box) > most:
                return math.inf
            return sum(elements * (needed + temporaries) for elements, needed, temporaries in buffers(box))

        box = [1] * len(positions)
        for axis in reversed(range(len(positions))):
            before, after = tuple(box[:axis]), tuple(box[axis + 1 :])
            cost_of = partial(_with_extent, cost, before, after)
            box[axis] = largest_fitting(positions[axis], limit, cost_of)
            if box[axis] < positions[axis]:
                break
        sizes = tuple(buffer.elements * buffer.needed for buffer in buffers(tuple(box)))
        return cls(positions, tuple(box), sizes)

    def __getitem__(self, number: Any) -> Any:
        axes = zip(super().__getitem__(number), self.box, self.positions, strict=True)
        return tuple(slice(axis * size, min((axis + 1) * size, extent)) for axis, size, extent in axes)

    def loop(self, body: Callable[[Index, list[View], Planner], None], planner: Planner, workers: int = 1) -> None:
        """The steps of ``body(block, buffers, planner)`` for each block."""

        def some(index: Index, planner: Planner) -> None:
            body(index, planner.workspace(*self.sizes), planner)

        planner.loop(self, some, workers)


def _with_extent(cost: Callable[[Shape], float], before: Shape, after: Shape, extent: int) -> float:
    return cost((*before, extent, *after))


def as_matrix(view: View, row_axes: int, column_axes: int) -> View | None:
    """The view with its last axes merged into rows and columns, or None where BLAS would need a copy of it.

    The axes before them stay: a stack of matrices.
    """
    lead = view.ndim - row_axes - column_axes
    middle = lead + row_axes
    rows = merged(view.shape[lead:middle], view.strides[lead:middle])
    columns = merged(view.shape[middle:], view.strides[middle:])
    if rows is None or columns is None:
        return None
    (m, row_step), (k, column_step), item = rows, columns, view.itemsize
    by_rows = (k == 1 or column_step == item) and (m == 1 or row_step >= k * item)
    by_columns = (m == 1 or row_step == item) and (k == 1 or column_step >= m * item)
    return view.reshape(*view.shape[:lead], m, k) if by_rows or by_columns else None
