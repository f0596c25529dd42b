"""db: the sum of dy over all axes except the channels."""

from __future__ import annotations

import math

import numpy

from gpuconv import dtypes
from gpuconv.arguments import Shape
from gpuconv.blocking import Blocks, Buffer, Buffers
from gpuconv.operands import Index, Operand
from gpuconv.plan import Planner
from gpuconv.views import View


def bias_grad(dy: Operand, db: View, planner: Planner) -> None:
    """Compute db; dy is summed in blocks if it is read through an activation."""
    positions, (groups, channels) = dy.view.shape[:-2], dy.view.shape[-2:]
    axes = tuple(range(len(positions)))
    # The rounding errors of long float32 sums of similar terms drift; float64 costs little here.
    sums = dtypes.promoted(planner.dtype, numpy.dtype(numpy.float64))
    total, term = (
        space.shaped((groups, channels)) for space in planner.workspace(*(groups * channels,) * 2, dtype=sums)
    )
    if dy.activation is None:
        planner.call(planner.xp.sum, dy.view, axes, sums, out=total)
    else:
        planner.copy(total, 0)

        def buffers_of(box: Shape) -> Buffers:
            return [Buffer(groups * channels * math.prod(box), True, dy.temporaries)]

        def some_positions(index: Index, buffers: list[View], planner: Planner) -> None:
            (space,) = buffers
            block = space.shaped(dy.view[index].shape)
            dy.read(index, block, planner)
            planner.call(planner.xp.sum, block, axes, sums, out=term)
            planner.call(planner.xp.add, total, term, out=total)

        Blocks.fitting(positions, planner.budget, buffers_of).loop(some_positions, planner)
    planner.copy(db, total.reshape(groups * channels))
