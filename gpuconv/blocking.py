"""Division of a convolution into blocks that fit a workspace, and views of blocks as matrices without a copy."""

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
from gpuconv.plan import Planner, Team
from gpuconv.request import Request
from gpuconv.views import View, merged

# Fewer groups are computed at a time if blocks would otherwise have fewer outputs, which are not worth their overhead.
FEWEST_OUTPUTS = 64
COPIED = 1 << 18  # weights that a thread copies at a time


class Arrangement(NamedTuple):
    """An order of axes in which an array becomes a stack of matrices.

    The last ``column_axes`` are merged into columns, the ``row_axes`` before them into rows; the other axes remain.
    """

    axes: tuple[int, ...]
    row_axes: int
    column_axes: int

    @property
    def turned(self) -> Arrangement:
        """The arrangement with rows and columns exchanged."""
        rows = len(self.axes) - self.column_axes
        lead = rows - self.row_axes
        axes = (*self.axes[:lead], *self.axes[rows:], *self.axes[lead:rows])
        return Arrangement(axes, self.column_axes, self.row_axes)

    def matrix(self, view: View) -> View | None:
        """Return the view as matrices if that needs no copy, else None."""
        return as_matrix(view.transpose(self.axes), self.row_axes, self.column_axes)

    def empty(self, shape: tuple[int, ...], flat: View) -> tuple[View, View]:
        """Return an array of this shape in workspace memory, and the same memory as matrices."""
        ordered = tuple(shape[axis] for axis in self.axes)
        columns = len(ordered) - self.column_axes
        rows = columns - self.row_axes
        memory = flat.shaped(ordered)
        matrix = memory.reshape(*ordered[:rows], math.prod(ordered[rows:columns]), math.prod(ordered[columns:]))
        return memory.transpose(_inverse(self.axes)), matrix

    def copies(self, operand: Operand, planner: Planner) -> bool:
        """Return whether loading the operand needs workspace."""
        return not operand.is_plain(planner.dtype) or self.matrix(operand.view) is None

    def load(self, operand: Operand, index: Index, flat: View, planner: Planner) -> View:
        """Return a piece of an operand as matrices, in place if possible, else copied to the workspace."""
        piece = operand.view[index]
        matrix = self.matrix(piece) if operand.is_plain(planner.dtype) else None
        if matrix is None:
            block, matrix = self.empty(piece.shape, flat)
            operand.read(index, block, planner)
        return matrix

    def place(self, target: View, flat: View, planner: Planner) -> tuple[View, View]:
        """Return memory for the matrix products to be stored in target, and the same memory as matrices.

        It is target itself if possible, else workspace.
        """
        matrix = self.matrix(target) if in_place(target, planner.dtype) else None
        return (target, matrix) if matrix is not None else self.empty(target.shape, flat)


def lies_by_filters(w: View) -> bool:
    """Return whether the filters of w (*kernel, G, C/G, F/G) are farther apart in memory than its channels."""
    step_c, step_f = map(abs, w.strides[-2:])
    return bool(step_f > step_c)


def copy_weights(w: Operand, into: View, planner: Planner) -> None:
    """Copy w into an array of its shape, on all threads."""
    by_filters = lies_by_filters(w.view)

    def copy(part: slice, planner: Planner) -> None:
        outer = (..., part) if by_filters else (..., part, slice(None))
        w.read(outer, into[outer], planner)

    extent = w.view.shape[-1 if by_filters else -2]
    planner.loop(list(pieces(extent, max(1, COPIED * extent // w.view.size))), copy, planner.threads)


def _inverse(axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(axes)), key=axes.__getitem__))


def largest(extent: int, limit: int, each: int) -> int:
    """Return how many items of size ``each`` fit the limit, balanced over the pieces of an extent; at least 1."""
    return _evened(extent, limit // each if each else extent)


def most_within(extent: int, limit: float, cost: Callable[[int], float]) -> int:
    """Return the largest number, from 1 to an extent, whose cost is within the limit; 1 if there is none."""
    return max(1, bisect_right(range(1, extent + 1), limit, key=cost))


def largest_fitting(extent: int, limit: float, cost: Callable[[int], float]) -> int:
    """Return the same, evened out over the chunks of the extent."""
    return _evened(extent, most_within(extent, limit, cost))


def _evened(extent: int, size: int) -> int:
    pieces = max(1, -(-extent // max(1, size)))
    return max(1, -(-extent // pieces))


def channels_innermost(images: View) -> bool:
    """Return whether the channels of (*positions, G, C/G) are closer together in memory than its pixels."""
    channel = images.strides[-1] if images.shape[-1] > 1 else images.strides[-2]
    return bool(abs(channel) < abs(images.strides[-3]))


def group_parts(geometry: Geometry, budget: int) -> tuple[tuple[slice, Geometry], ...]:
    """Return the groups in parts, with the geometry of each part.

    The parts are so small that, if possible, FEWEST_OUTPUTS outputs of all channels of a part fit the budget.
    """
    size = _groups_at_once(geometry, budget)
    return tuple((groups, _part_of(geometry, groups.stop - groups.start)) for groups in pieces(geometry.groups, size))


def _groups_at_once(geometry: Geometry, budget: int) -> int:
    per_output = 3 * max(geometry.group_channels, geometry.group_filters) * geometry.taps  # windows, weights and sums
    return largest(geometry.groups, budget // FEWEST_OUTPUTS, per_output)


def largest_part(request: Request) -> Geometry:
    """Return the convolution of as many groups as are computed at once."""
    return _part_of(request.geometry, _groups_at_once(request.geometry, request.budget))


def _part_of(geometry: Geometry, groups: int) -> Geometry:
    channels, filters = groups * geometry.group_channels, groups * geometry.group_filters
    return replace(geometry, groups=groups, channels=channels, filters=filters)


class Buffer(NamedTuple):
    """A part of the workspace of a block."""

    elements: int
    needed: bool = True  # False if the data is used in place
    temporaries: int = 0  # arrays of its size that are allocated and freed in addition


Buffers: TypeAlias = Sequence[Buffer]


class Share(NamedTuple):
    """A partition of filters (or channels): as many at a time as have weights that fit half of the workspace."""

    extent: int
    at_once: int
    size: int  # elements of these weights

    @classmethod
    def of(cls, extent: int, each: int, planner: Planner) -> Share:
        """Return the partition for filters (or channels) with ``each`` elements of weights."""
        at_once = largest(extent, planner.budget // 2, each)
        return cls(extent, at_once, each * at_once)

    def rest(self, planner: Planner, shares: int, most: int) -> int:
        """Return the elements of workspace for each of ``shares`` threads beside the weights, up to ``most`` bytes."""
        return min((planner.budget - self.size) // shares, most // planner.dtype.itemsize)

    def blocks(
        self, positions: Shape, buffers_of: Callable[[Shape], Buffers], team: Team, most: int, planner: Planner
    ) -> Blocks:
        """Return blocks whose buffers fit beside the weights in every thread, up to ``most`` bytes."""
        limit = self.rest(planner, team.shares, most)
        return Blocks.fitting(positions, limit, buffers_of, team.share(math.prod(positions)))

    def loop(self, body: Callable[[slice, View, Planner], None], planner: Planner) -> None:
        """Plan ``body(filters, space, planner)`` for each part of the filters, with space for their weights."""

        def some(part: slice, planner: Planner) -> None:
            (space,) = planner.workspace(self.size)
            body(part, space, planner)

        planner.loop(list(pieces(self.extent, self.at_once)), some)


def pieces(extent: int, size: int) -> Iterator[slice]:
    """Return consecutive slices of at most this size."""
    return (slice(start, min(start + size, extent)) for start in range(0, extent, size))


class Places(Sequence[Shape]):
    """All indices of an array with these extents, last axis fastest; computed on demand, since there may be many."""

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
    """Consecutive blocks of positions, as slices, of at most the extents of a box; and the workspace of a block."""

    def __init__(self, positions: Shape, box: Shape, sizes: Shape = ()) -> None:
        super().__init__(tuple(-(-extent // size) for extent, size in zip(positions, box, strict=True)))
        self.positions, self.box, self.sizes = positions, box, sizes

    @classmethod
    def fitting(
        cls, positions: Shape, limit: float, buffers: Callable[[Shape], Buffers], most: float = math.inf
    ) -> Blocks:
        """Return blocks whose buffers, in elements of workspace, fit a limit; the last axes are extended first.

        ``most`` is the largest number of positions of a block. A block has at least one position.
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
        """Plan ``body(block, buffers, planner)`` for each block."""

        def some(index: Index, planner: Planner) -> None:
            body(index, planner.workspace(*self.sizes), planner)

        planner.loop(self, some, workers)


def _with_extent(cost: Callable[[Shape], float], before: Shape, after: Shape, extent: int) -> float:
    return cost((*before, extent, *after))


def as_matrix(view: View, row_axes: int, column_axes: int) -> View | None:
    """Return the view with its last axes merged into rows and columns, or None if BLAS would need a copy of it.

    The axes before them remain: the result is a stack of matrices.
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
