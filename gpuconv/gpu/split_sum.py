"""Second pass of split-K: adds the partial sums of all splits in a fixed order (kernels/split_sum.cu)."""

from __future__ import annotations

from collections.abc import Sequence

from gpuconv.blocking import channels_innermost
from gpuconv.gpu import params, structs
from gpuconv.gpu.kernel import Kernel
from gpuconv.gpu.launch import blocks
from gpuconv.operands import Result
from gpuconv.plan import Planner
from gpuconv.views import View, contiguous_strides

THREADS = 256
# Threads that share an element of weight_grad where it has many splits: few weights would leave most of a GPU idle.
ROWS = 8
MANY_SPLITS = 32


def memory_order(images: View) -> tuple[int, ...]:
    """Return the axes of images (N, *spatial, G, channels) from the slowest one on, with innermost channels or not."""
    *spatial, groups, channels = range(1, images.ndim)
    return (0, *spatial, groups, channels) if channels_innermost(images) else (0, groups, channels, *spatial)


def weight_order(rank: int) -> tuple[int, ...]:
    """Return the axes of weights (*kernel, G, C/G, F/G) of this rank from the slowest one on: groups come first."""
    return (rank, *range(rank), rank + 1, rank + 2)


def partial_sums(space: View, target: View) -> View:
    """Return the partial sums of the first split in a flat workspace, as a view with the axes of images."""
    order = memory_order(target)
    strides = contiguous_strides([target.shape[axis] for axis in order], space.dtype)
    return space.strided(target.shape, tuple(strides[order.index(axis)] for axis in range(target.ndim)))


def add_splits(
    partial: View, result: Result, order: Sequence[int], planner: Planner, totals: tuple[View, bool] | None = None
) -> None:
    """Plan a launch that adds partial sums, then the bias, and applies the activation.

    ``partial`` holds contiguous sums for each split, in this order of the result's axes. ``totals`` are sums without
    the epilogue, and whether those of earlier images are in them; they are updated. Without them, the splits are added
    one after another, as a block that is not split adds its chunks.
    """
    target = result.view
    total, accumulate = totals or (partial[: target.size], False)
    wide = max(partial.size, params.reach(target.shape, target)) >= params.NARROW
    splits = partial.size // target.size
    rows = ROWS if totals and splits >= MANY_SPLITS else 1
    epilogue = {"HAS_BIAS": int(result.bias is not None), "ACTIVATION": params.number(result.activation)}
    types = partial.dtype, partial.dtype, target.dtype, planner.dtype
    module = params.module("split_sum", types, wide, **epilogue, ROWS=rows, THREADS=THREADS)
    bias_steps = {target.ndim - 1: 1, target.ndim - 2: target.shape[-1]}  # of a contiguous bias (G, channels)
    fastest_first = tuple(reversed(order))
    unused = (0,) * (structs.RANK - target.ndim)
    extents = (*(target.shape[axis] for axis in fastest_first), *(1 for _ in unused))
    steps = (*(target.steps[axis] for axis in fastest_first), *unused)
    of_bias = (*(bias_steps.get(axis, 0) for axis in fastest_first), *unused)
    divisors = [structs.divisor(extent) for extent in extents[:-1]]
    elements = structs.struct("Elements", wide, divisors, steps, of_bias, target.size, splits, int(accumulate))
    grid = blocks(target.size, THREADS // rows)
    planner.launch(Kernel(module, "split_sum"), grid, THREADS, (partial, total, result.bias, target, elements))
