"""col2im: the transpose of im2col, for data_grad of x with few channels, as in the first layer of a network.

One matrix product computes all that a block of outputs contributes to dx; its taps are accumulated one by one:

    dcols[t, c, o] = sum over f of w[t, c, f] dy[o, f]          dx[o * stride + t * dilation - low, c] += dcols[t, c, o]

The inputs of each phase of the stride, which are a stride apart in x, are stored contiguously in a plane of their own,
so that every addition covers long contiguous runs. Finally the planes are interleaved into dx. With one product per
phase, as im2col does otherwise, each product would have only as many columns as x has channels, and gathering its
operands would take longer than the multiplication.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from gpuconv.arguments import Shape
from gpuconv.blocking import Arrangement, Blocks, Places, largest
from gpuconv.cpu import cost_model
from gpuconv.geometry import Geometry
from gpuconv.operands import Index, Operand, Result
from gpuconv.plan import Planner
from gpuconv.views import View

BLOCK_BYTES = 1 << 20  # of dcols, which should fit in the cache
MOST_TAPS = 64  # accumulated one by one: the rounding errors of more similar terms would drift
FEW = 8  # channels


def suits(geometry: Geometry) -> bool:
    """Return whether the algorithm is applicable: x has few channels compared with y."""
    few = geometry.group_channels <= min(FEW, geometry.group_filters // 2)
    return few and 1 < geometry.taps <= MOST_TAPS


def nanoseconds(geometry: Geometry, is_complex: bool) -> float:
    """Estimate the time of one product and of the additions of its elements."""
    product = cost_model.product(geometry.group_filters, geometry.group_channels * geometry.taps, is_complex)
    added = geometry.reduction_length("weight_grad") * geometry.channels * geometry.taps
    steps = geometry.taps * math.prod(geometry.batch) * cost_model.STEP
    return geometry.multiply_adds() * product + added * cost_model.ACCUMULATE + steps


def pays(dy: Operand, dx: Result, geometry: Geometry, planner: Planner) -> bool:
    """Return whether the algorithm is applicable and its planes fit the workspace."""
    return suits(geometry) and _sizes(geometry, *_room(dy, dx, geometry, planner)) is not None


def _room(dy: Operand, dx: Result, geometry: Geometry, planner: Planner) -> tuple[int, int, int]:
    """Return the elements for each thread beside the weights, and the temporaries of reading dy and of finishing dx."""
    shared = planner.budget - math.prod(geometry.w_shape)
    return shared // planner.team(geometry).shares, dy.temporaries, dx.temporaries


def data_grad(dy: Operand, w: Operand, dx: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute ``dx[o * stride + t * dilation - low, c] += dcols[t, c, o]``, image by image."""
    rank, team = geometry.rank, planner.team(geometry)
    sizes = _sizes(geometry, *_room(dy, dx, geometry, planner))
    assert sizes is not None
    weights_order = Arrangement((rank, *range(rank), rank + 1, rank + 2), rank + 1, 1)
    images_order = Arrangement((rank, rank + 1, *range(rank)), 1, rank)
    (weight_space,) = planner.workspace(math.prod(geometry.w_shape) * weights_order.copies(w, planner))
    weights = weights_order.load(w, (...,), weight_space, planner)

    def some_image(image: Shape, planner: Planner) -> None:
        planes_space, dcols_space, dy_space = planner.workspace(*sizes.spaces)
        planes = planes_space.shaped((*geometry.stride, geometry.groups, geometry.group_channels, *sizes.planes))
        planner.copy(planes, 0)

        def some_outputs(index: Index, planner: Planner) -> None:
            gradients = images_order.load(dy, (*image, *index), dy_space, planner)
            dcols = dcols_space.shaped((geometry.groups, weights.shape[1], gradients.shape[2]))
            planner.matmul(weights, gradients, dcols)
            _add(dcols, index, planes, sizes, geometry, planner)

        planner.loop(Blocks(geometry.output, sizes.box), some_outputs)
        for phase in Places(tuple(map(min, geometry.stride, geometry.input))):
            _store(planes, phase, dx.part(image), sizes, geometry, planner)

    planner.loop(Places(geometry.batch), some_image, team.workers)


def _add(dcols: View, index: Index, planes: View, sizes: _Sizes, geometry: Geometry, planner: Planner) -> None:
    """Accumulate the contributions of a block of outputs in the planes, tap by tap."""
    extents = tuple(axis.stop - axis.start for axis in index)
    by_tap = dcols.reshape(geometry.groups, *geometry.kernel, geometry.group_channels, *extents)
    for tap in Places(geometry.kernel):
        phase, into = [], []
        for axis, (t, outputs, before) in enumerate(zip(tap, index, sizes.before, strict=True)):
            start, plane = divmod(geometry.position(axis, 0, t), geometry.stride[axis])
            phase.append(plane)
            into.append(slice(outputs.start + start + before, outputs.stop + start + before))
        target = planes[(*phase, slice(None), slice(None), *into)]
        planner.call(planner.xp.add, target, by_tap[(slice(None), *tap)], out=target)


def _store(planes: View, phase: Shape, dx: Result, sizes: _Sizes, geometry: Geometry, planner: Planner) -> None:
    """Store the plane of one phase of the stride in dx."""
    axes = zip(phase, geometry.input, geometry.stride, sizes.before, strict=True)
    inside = [slice(before, before + len(range(start, n, s))) for start, n, s, before in axes]
    block = planes[(*phase, slice(None), slice(None), *inside)]
    block = block.transpose(*range(2, block.ndim), 0, 1)
    dx.finish(block, planner)
    into = tuple(slice(start, None, s) for start, s in zip(phase, geometry.stride, strict=True))
    planner.copy(dx.view[into], block)


class _Sizes(NamedTuple):
    """The extents of a plane, its elements before the first input, a block of outputs, and the workspace."""

    planes: Shape
    before: Shape
    box: Shape
    spaces: tuple[int, int, int]


def _sizes(geometry: Geometry, budget: int, read: int, finished: int) -> _Sizes | None:
    """Return the sizes, or None if the planes do not fit the budget."""
    planes, before = [], []
    axes = zip(
        geometry.input, geometry.output, geometry.window, geometry.stride, geometry.padding, strict=True
    )  # fmt: skip
    for n, m, window, s, (low, _) in axes:
        first = max(0, -(-low // s))
        planes.append(first + max(-(-n // s), (window - 1 - low) // s + m))
        before.append(first)
    all_planes = math.prod((*geometry.stride, geometry.channels, *planes))
    rows, row = geometry.output[0], math.prod(geometry.output[1:])
    each = row * (geometry.channels * geometry.taps + (1 + read) * geometry.filters)
    if all_planes * (1 + finished) + each > budget // 2:
        return None
    size = largest(rows, min(budget // 2, BLOCK_BYTES // 4), each)
    outputs = size * row
    spaces = all_planes, outputs * geometry.channels * geometry.taps, outputs * geometry.filters
    return _Sizes(tuple(planes), tuple(before), (size, *geometry.output[1:]), spaces)
