"""Graphs of tasks: Dask arrays whose blocks are computed from parts of other Dask arrays."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import dask.array as da
import numpy
from dask.array.utils import meta_from_array
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph

from gpuconv.arguments import Shape

Key: TypeAlias = tuple[Any, ...]
Chunks: TypeAlias = tuple[Shape, ...]  # extents of the chunks of every axis


class TaskLayer:
    """A layer of a graph: tasks that compute blocks from parts of Dask arrays.

    The parts are put together along one axis after the other, so that a block of three axes takes ten tasks and not one
    for each of its 26 neighbours. Slices are taken where the chunks are, and only they move between workers.
    """

    def __init__(self, direction: str, sources: Sequence[Any], *of: Any) -> None:
        token = tokenize(sources, *of)
        self.name, self.halo, self.joined = (f"gpuconv-{kind}-{token}" for kind in (direction, "halo", "joined"))
        self.sources = [source for source in sources if source is not None]
        self.tasks: dict[Key, Any] = {}

    def gathered(self, array: da.Array, parts: Sequence[list[slice]]) -> dict[Shape, Key]:
        """Return the keys of all blocks, by their index; ``parts`` are the parts of each axis that blocks read."""
        keys: dict[Shape, Key] = {}
        for index in itertools.product(*(range(len(chunks)) for chunks in array.chunks)):
            keys[index] = (array.name, *index)
        for axis, blocks in enumerate(parts):
            chunks = slices(array.chunks[axis])
            if blocks != chunks:
                keys = self._along(axis, [list(_pieces(chunks, block)) for block in blocks], keys)
        return keys

    def _along(self, axis: int, blocks: list[list[_Piece]], keys: dict[Shape, Key]) -> dict[Shape, Key]:
        """Return the keys of blocks that are made of pieces along an axis."""
        found = {}
        for before, after in dict.fromkeys((index[:axis], index[axis + 1 :]) for index in keys):
            for number, pieces in enumerate(blocks):
                parts = [self._slice(keys[(*before, piece.chunk, *after)], axis, piece) for piece in pieces]
                if len(parts) > 1:
                    parts = [self.add((self.joined, len(self.tasks)), partial(_joined, axis), parts)]
                found[(*before, number, *after)] = parts[0]
        return found

    def _slice(self, key: Key, axis: int, piece: _Piece) -> Key:
        if piece.is_whole:
            return key
        return self.add((self.halo, len(self.tasks)), partial(_sliced, axis, piece.inside), key)

    def add(self, key: Key, function: Callable[..., Any], *arguments: Any) -> Key:
        """Add a task; return its key."""
        self.tasks[key] = (function, *arguments)
        return key

    def array(self, chunks: Chunks, dtype: numpy.dtype) -> da.Array:
        """Return the Dask array with these chunks, which the layer computes."""
        graph = HighLevelGraph.from_collections(self.name, self.tasks, dependencies=self.sources)
        return da.Array(graph, self.name, chunks, meta=meta_from_array(self.sources[0]._meta, len(chunks), dtype))


class _Piece(NamedTuple):
    """The part of a chunk of an axis that a block takes."""

    chunk: int  # number of the chunk
    inside: slice  # of the chunk
    is_whole: bool


def _pieces(chunks: list[slice], block: slice) -> Iterator[_Piece]:
    """Yield the parts of the chunks of an axis in a block; an empty part of a chunk if the block is empty."""
    if block.start == block.stop:
        yield _Piece(0, slice(0, 0), False)
        return
    first = bisect.bisect_right(chunks, block.start, key=lambda chunk: chunk.start) - 1
    for number in range(first, len(chunks)):
        chunk = chunks[number]
        inside = slice(max(chunk.start, block.start) - chunk.start, min(chunk.stop, block.stop) - chunk.start)
        yield _Piece(number, inside, inside == slice(0, chunk.stop - chunk.start))
        if chunk.stop >= block.stop:
            return


def slices(chunks: Shape) -> list[slice]:
    """Return the chunks of an axis as slices of it."""
    bounds = itertools.accumulate(chunks, initial=0)
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


def _sliced(axis: int, inside: slice, array: Any) -> Any:
    return array[(slice(None),) * axis + (inside,)]


def _joined(axis: int, parts: list[Any]) -> Any:
    return numpy.concatenate(parts, axis)


def only_key(array: Any) -> Key | None:
    """Return the key of an array of one chunk."""
    return None if array is None else (array.name, *(0,) * array.ndim)
