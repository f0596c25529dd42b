"""lines: im2col along the last axis only, for x with few channels, as in the first layer of a network.

Each line of x is unfolded into the windows of a line of outputs: a matrix with a row for each tap of the last axis and
each channel. The unfolded lines are contiguous in memory, so that the windows of a line of outputs, over all lines of
a kernel, are a matrix in place, and those of the next line overlap them. Nothing is copied for each tap of the other
axis; with few channels, such copies would take longer than the multiplication.

    lines[h, s, c, q] = x[h, q * stride + s * dilation - low, c]
    forward      y[p, q]     = sum over r, s and c of lines[p * stride - low + r, s, c, q] w[r, s, c]
    weight_grad  dw[r, s, c] = sum over p and q of lines[p * stride - low + r, s, c, q] dy[p, q]
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

from gpuconv.arguments import Shape
from gpuconv.blocking import Arrangement, Places, channels_innermost, pieces
from gpuconv.cpu.windows import read_tap
from gpuconv.geometry import Geometry
from gpuconv.operands import Operand, Result, in_place
from gpuconv.plan import Planner
from gpuconv.views import View

FEW = 64  # rows of a line's matrix: taps of the last axis times channels
LONG = 56  # fewest outputs of a line for which its products are worth their overhead
FEW_WEIGHTS = 1 << 16  # the most weights: weight_grad sums products of this size, one per line
BLOCK_BYTES = 1 << 20  # of lines, which should fit in the cache
SEEN = 1 << 16  # elements of the lines that a line of outputs reads: with more, lines would be unfolded repeatedly
SLICES = 8  # splits of the sum of weight_grad


def suits(geometry: Geometry) -> bool:
    """Return whether the algorithm is applicable.

    The matrix of a line must have few, long rows, and a kernel must span several adjacent lines.
    """
    if geometry.rank != 2 or geometry.groups > 1 or geometry.dilation[0] > 1:
        return False
    few = geometry.kernel[1] * geometry.channels <= FEW and math.prod(geometry.w_shape) <= FEW_WEIGHTS
    are_long = geometry.output[1] >= LONG and geometry.kernel[0] * _line(geometry) <= SEEN
    return few and geometry.kernel[0] > 2 and are_long


def elements(geometry: Geometry) -> int:
    """Return the number of elements of all unfolded lines."""
    return math.prod(geometry.batch) * _lines_seen(geometry.output[0], geometry) * _line(geometry)


def pays(images: Operand, results: Operand | Result, geometry: Geometry, planner: Planner, products: int = 0) -> bool:
    """Return whether it is applicable, reads and writes need no temporaries, and the workspace suffices.

    ``products``: elements of the product of each line in weight_grad.
    """
    plain = not images.temporaries and not results.temporaries
    return suits(geometry) and plain and _rows(geometry, _budget(geometry, planner), products) > 0


def forward(x: Operand, w: Operand, y: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute ``y = lines(x) w``, some lines of outputs of one image at a time."""
    team, by_rows = planner.team(geometry), channels_innermost(y.view)
    weights_order = Arrangement((2, 0, 1, 3, 4), 3, 1) if by_rows else Arrangement((2, 4, 0, 1, 3), 1, 3)
    results_order = Arrangement((2, 0, 1, 3), 1, 1) if by_rows else Arrangement((2, 0, 3, 1), 1, 1)
    size, each = _rows(geometry, _budget(geometry, planner), 0), math.prod(geometry.w_shape)
    in_y = in_place(y.view, planner.dtype) and results_order.matrix(y.view[(0,) * len(geometry.batch)]) is not None
    room = _lines_seen(size, geometry) * _line(geometry), 0 if in_y else size * geometry.output[1] * geometry.filters
    (weight_space,) = planner.workspace(each * weights_order.copies(w, planner))
    weights = weights_order.load(w, (...,), weight_space, planner)[:, None]

    def some_lines(task: tuple[Shape, slice], planner: Planner) -> None:
        image, rows = task
        lines_space, sums_space = planner.workspace(*room)
        windows = _windows(x.of_images(image), rows, geometry, lines_space, planner)
        target = y.view[(*image, rows)]
        block, sums = results_order.place(target, sums_space, planner)
        factors = (windows.swapaxes(-1, -2), weights) if by_rows else (weights, windows)
        planner.matmul(*factors, sums)
        y.store(block, target, planner)

    rows = list(pieces(geometry.output[0], size))
    planner.loop(list(product(Places(geometry.batch), rows)), some_lines, team.workers)


def weight_grad(dy: Operand, x: Operand, dw: Result, geometry: Geometry, planner: Planner) -> None:
    """Compute ``dw = lines(x)' dy``: products of single lines, accumulated in splits in a fixed order."""
    xp, weights = planner.xp, math.prod(geometry.w_shape)
    gradients_order = Arrangement((2, 0, 1, 3), 1, 1)
    size = max(1, min(_rows(geometry, _budget(geometry, planner), weights), BLOCK_BYTES // 4 // weights))
    tasks = list(product(Places(geometry.batch), pieces(geometry.output[0], size)))
    slices = list(pieces(len(tasks), -(-len(tasks) // SLICES)))
    shape = 1, math.prod(geometry.kernel) * geometry.channels, geometry.filters
    copies = gradients_order.copies(dy.of_images((0,) * len(geometry.batch)), planner)
    line_results = copies * geometry.output[1] * geometry.filters
    room = _lines_seen(size, geometry) * _line(geometry), size * line_results, size * weights, weights
    totals = [space.shaped(shape) for space in planner.workspace(*(weights,) * len(slices))]

    def some_slice(number: int, planner: Planner) -> None:
        def some_lines(at: int, planner: Planner) -> None:
            image, rows = tasks[at]
            lines_space, dy_space, product_space, term_space = planner.workspace(*room)
            windows = _windows(x.of_images(image), rows, geometry, lines_space, planner)
            gradients = gradients_order.load(dy, (*image, rows), dy_space, planner)
            products = product_space.shaped((1, rows.stop - rows.start, *shape[1:]))
            planner.matmul(windows, gradients, products)
            is_first = at == slices[number].start
            term = totals[number] if is_first else term_space.shaped(shape)
            planner.call(xp.sum, products, 1, out=term)
            if not is_first:
                planner.call(xp.add, totals[number], term, out=totals[number])

        planner.loop(range(slices[number].start, slices[number].stop), some_lines)

    planner.loop(range(len(slices)), some_slice, planner.team(geometry).workers)
    for term in totals[1:]:
        planner.call(xp.add, totals[0], term, out=totals[0])
    planner.copy(dw.view[:, :, 0], totals[0].reshape(*geometry.kernel, geometry.channels, -1))


def _windows(image: Operand, rows: slice, geometry: Geometry, space: View, planner: Planner) -> View:
    """Return the windows of some lines of outputs: (1, lines, taps * channels, outputs of a line)."""
    step, kernel = geometry.stride[0], geometry.kernel
    seen = slice(rows.start * step, (rows.stop - 1) * step + kernel[0])  # lines, including the padding before x
    lines = space.shaped((seen.stop - seen.start, kernel[1], geometry.channels, geometry.output[1]))
    unfolded = _unfolded(geometry)
    for tap in range(kernel[1]):
        into = lines[:, tap, None].transpose(0, 3, 1, 2)
        read_tap(image, (0, tap), (seen, slice(0, geometry.output[1])), unfolded, into, planner)
    line, item = lines.strides[0], lines.itemsize
    return lines.strided(
        (1, rows.stop - rows.start, kernel[0] * kernel[1] * geometry.channels, geometry.output[1]),
        (0, step * line, geometry.output[1] * item, item),
    )


def _unfolded(geometry: Geometry) -> Geometry:
    """Return the geometry of one image with windows of single lines: all lines of x, and the padding at both ends."""
    before = geometry.padding[0][0]
    behind = _lines_seen(geometry.output[0], geometry) - before - geometry.input[0]
    return replace(
        geometry,
        batch=(),
        kernel=(1, geometry.kernel[1]),
        stride=(1, geometry.stride[1]),
        padding=((before, behind), geometry.padding[1]),
        dilation=(1, geometry.dilation[1]),
    )


def _line(geometry: Geometry) -> int:
    """Return the number of elements of a line's matrix."""
    return geometry.kernel[1] * geometry.channels * geometry.output[1]


def _lines_seen(rows: int, geometry: Geometry) -> int:
    return (rows - 1) * geometry.stride[0] + geometry.kernel[0]


def _budget(geometry: Geometry, planner: Planner) -> int:
    """Return the elements that each thread may use, beside the sums of the splits and a term of each thread."""
    shares = planner.team(geometry).shares
    return (planner.budget - (SLICES + shares) * math.prod(geometry.w_shape)) // shares


def _rows(geometry: Geometry, budget: int, products: int) -> int:
    """Return how many lines of outputs are computed at a time; 0 if the budget does not suffice for one."""
    line, results = _line(geometry), geometry.output[1] * geometry.filters
    first, further = _lines_seen(1, geometry) * line + results, geometry.stride[0] * line + results
    if first + products > budget:
        return 0
    fitting = 1 + (budget - first - products) // (further + products)
    return min(geometry.output[0], fitting, 1 + max(0, BLOCK_BYTES // 4 - first) // further)
