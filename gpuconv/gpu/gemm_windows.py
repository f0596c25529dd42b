"""The windows of an implicit GEMM: tables by which its kernels compute coordinates without a division.

Along an axis, the window of row u begins at ``origin + u * window_step`` in the images, and its taps are ``tap_stride``
apart. Its k-th tap is tap ``first_tap + k * tap_step`` of w, and row u is at ``start + u * result_step`` in the result.
In data_grad each phase of the stride has windows of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import numpy

from gpuconv.blocking import pieces
from gpuconv.geometry import AxisPhase, Geometry
from gpuconv.gpu import structs
from gpuconv.gpu.gemm_tiles import GemmTile
from gpuconv.gpu.launch import blocks
from gpuconv.gpu.structs import divisor
from gpuconv.types import Direction


class WindowPhase(NamedTuple):
    """The windows of one phase of the stride along an axis."""

    rows: int
    taps: int
    origin: int
    first_tap: int
    start: int


class WindowAxis(NamedTuple):
    """The windows along an axis, of all phases or of those of one launch."""

    extent: int  # of the images
    window_step: int
    tap_stride: int
    tap_step: int
    result_step: int
    phases: tuple[WindowPhase, ...]

    def parts(self) -> Iterator[WindowAxis]:
        """Yield the axis with as many phases as fit a launch, until all phases have been yielded."""
        for part in pieces(len(self.phases), structs.MOST_PHASES):
            yield self._replace(phases=self.phases[part])


class Windows(NamedTuple):
    """The windows of one launch of forward or data_grad."""

    axes: tuple[WindowAxis, ...]
    images: int
    groups: int
    channels: int  # of a group of the images
    columns: int  # channels of a group of the result
    splits: int = 1  # of the reduction
    split_length: int = 0  # steps of a split, if there are several

    @property
    def depth(self) -> int:
        """The length of the longest reduction."""
        return self.channels * math.prod(max(phase.taps for phase in axis.phases) for axis in self.axes)

    def tiles(self, tile: GemmTile) -> tuple[int, int]:
        """Return the number of column tiles, and of row tiles of the first phase, which is the longest."""
        rows = self.images * math.prod(axis.phases[0].rows for axis in self.axes)
        return blocks(self.columns, tile.columns), blocks(rows, tile.rows)

    def blocks(self, tile: GemmTile) -> int:
        """Return the number of thread blocks."""
        return math.prod((*self.tiles(tile), self.groups, *(len(axis.phases) for axis in self.axes), self.splits))

    def struct(self, tile: GemmTile, elements: int, wide: bool) -> numpy.ndarray:
        """Return the struct that the kernels take, for a result of this many elements."""
        column_tiles, row_tiles = self.tiles(tile)
        divisors = map(divisor, (column_tiles, self.groups, row_tiles, self.channels))
        axes = [_axis(axis) for axis in (_SINGLE,) * (structs.AXES - len(self.axes)) + self.axes]
        split = (self.split_length, elements) if self.splits > 1 else (self.depth, 0)
        return structs.struct("Windows", wide, *divisors, self.columns, self.images, *split, axes)


_SINGLE = WindowAxis(1, 1, 1, 1, 1, (WindowPhase(1, 1, 0, 0, 0),))  # an axis of one position and one tap


def _axis(axis: WindowAxis) -> structs.Value:
    unused = (WindowPhase(0, 0, 0, 0, 0),) * (structs.MOST_PHASES - len(axis.phases))
    phases: list[structs.Value] = [(divisor(n), divisor(taps), *rest) for n, taps, *rest in axis.phases + unused]
    return *axis[:-1], divisor(len(axis.phases)), phases


def launches(direction: Direction, geometry: Geometry, images: int) -> Iterator[Windows]:
    """Yield the windows of each launch of forward or data_grad: one, unless a stride exceeds MOST_PHASES."""
    channels, columns = geometry.group_channels, geometry.group_filters
    axes = [_outputs(geometry, axis) for axis in range(geometry.rank)]
    if direction == "data_grad":
        channels, columns = columns, channels
        axes = [_inputs(geometry, axis) for axis in range(geometry.rank)]
    for parts in product(*(axis.parts() for axis in axes)):
        yield Windows(parts, images, geometry.groups, channels, columns)


def _outputs(geometry: Geometry, axis: int) -> WindowAxis:
    """Return the windows of forward: rows are outputs."""
    phase = WindowPhase(geometry.output[axis], geometry.kernel[axis], -geometry.padding[axis][0], 0, 0)
    return WindowAxis(geometry.input[axis], geometry.stride[axis], geometry.dilation[axis], 1, 1, (phase,))


def _inputs(geometry: Geometry, axis: int) -> WindowAxis:
    """Return the windows of data_grad: rows are the inputs of a phase, and taps lead to lower and lower outputs."""
    phases = geometry.axis_phases(axis)
    stride, reach, apart = geometry.stride[axis], phases[0].dilation, phases[0].taps.step
    return WindowAxis(geometry.output[axis], 1, -reach, apart, stride, tuple(map(_phase, phases)))


def _phase(phase: AxisPhase) -> WindowPhase:
    origin = phase.dilation * (phase.reaching - 1) - phase.padding[0]
    rows = len(range(phase.inputs.start, phase.inputs.stop, phase.inputs.step))
    return WindowPhase(rows, phase.reaching, origin, phase.taps.start, phase.inputs.start)
