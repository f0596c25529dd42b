"""lines: im2col along the last axis only, where x has few channels, as in the first layer of a network.

Each line of x is laid out as the windows that a line of outputs sees in it: a matrix with a row for every tap of the
last axis and channel. The lines that a kernel reaches over lie one after the other, so that the windows of a line of
outputs are a matrix as they lie, and those of the next line overlap them: nothing is copied for each tap of the other
axis, which with few channels takes longer than to multiply.

    lines[h, s, c, q] = x[h, q * stride + s * dilation - low, c]
    forward      y[p, q]     = sum over r, s and c of lines[p * stride - low + r, s, c, q] w[r, s, c]
    weight_grad  dw[r, s, c] = sum over p and q of lines[p * stride - low + r, s, c, q] dy[p, q]
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from itertools import product

import numpy

from gpuconv.algorithms.blocks import Arrangement, channels_innermost, pieces
from gpuconv.algorithms.windows import read_tap
from gpuconv.arguments import Shape
from gpuconv.backend import Array
from gpuconv.geometry import Geometry
from gpuconv.operands import Operand, Result, in_place
from gpuconv.workspace import Run, shaped

FEW = 64  # rows of a line's matrix: taps of the last axis times channels
LONG = 56  # outputs of a line, from which on its products are worth their call
FEW_WEIGHTS = 1 << 16  # of which a line's products are added up
BLOCK_BYTES = 1 << 20  # of lines, which should stay in the cache
SEEN = 1 << 16  # elements of the lines that a line of outputs sees: with more, each would be laid out again and again
SLICES = 8  # of weight_grad's sum


def suits(geometry: Geometry) -> bool:
    """Whether windows of a line are few and long, and a kernel reaches over several lines that lie side by side."""
    if geometry.rank != 2 or geometry.groups > 1 or geometry.dilation[0] > 1:
        return False
    few = geometry.kernel[1] * geometry.channels <= FEW and math.prod(geometry.w_shape) <= FEW_WEIGHTS
    are_long = geometry.output[1] >= LONG and geometry.kernel[0] * _line(geometry) <= SEEN
    return few and geometry.kernel[0] > 2 and are_long


def elements(geometry: Geometry) -> int:
    """Of all lines laid out."""
    return math.prod(geometry.batch) * _lines_seen(geometry.output[0], geometry) * _line(geometry)


def pays(images: Operand, results: Operand | Result, geometry: Geometry, run: Run, products: int = 0) -> bool:
    """Whether it suits, with nothing to be made of what is read or written, and there is room.

    ``products``: elements that each line makes in weight_grad.
    """
    plain = not images.temporaries and not results.temporaries
    return suits(geometry) and plain and _rows(geometry, _budget(geometry, run), products) > 0


def forward(x: Operand, w: Operand, y: Result, geometry: Geometry, run: Run) -> None:
    """y = lines(x) w, some lines of outputs of one image at a time."""
    xp, team, by_rows = run.backend.xp, run.team(geometry), channels_innermost(y.view)
    weights_order = Arrangement((2, 0, 1, 3, 4), 3, 1) if by_rows else Arrangement((2, 4, 0, 1, 3), 1, 3)
    results_order = Arrangement((2, 0, 1, 3), 1, 1) if by_rows else Arrangement((2, 0, 3, 1), 1, 1)
    size, each = _rows(geometry, _budget(geometry, run), 0), math.prod(geometry.w_shape)
    copies = not (in_place(y.view, run.dtype) and results_order.matrix(y.view[(0,) * len(geometry.batch)]) is not None)
    with run.workspace(each * weights_order.copies(w, run)) as (weight_space,):
        weights = weights_order.load(w, (...,), weight_space, run)[:, None]

        def work(tasks: Iterable[tuple[Shape, slice]]) -> None:
            room = _lines_seen(size, geometry) * _line(geometry), copies * size * geometry.output[1] * geometry.filters
            with run.workspace(*room) as (lines_space, sums_space):
                for image, rows in tasks:
                    windows = _windows(x.of_images(image), rows, geometry, lines_space, run)
                    target = y.view[(*image, rows)]
                    block, sums = results_order.place(target, sums_space, run)
                    xp.matmul(*((windows.swapaxes(-1, -2), weights) if by_rows else (weights, windows)), out=sums)
                    y.finish(xp, block)
                    if block is not target:
                        xp.copyto(target, block, casting="unsafe")

        rows = list(pieces(geometry.output[0], size))
        run.spread(list(product(numpy.ndindex(*geometry.batch), rows)), work, team.workers)


def weight_grad(dy: Operand, x: Operand, dw: Result, geometry: Geometry, run: Run) -> None:
    """dw = lines(x)' dy: products of single lines, which are added up in slices, in the same order in any thread."""
    xp, team, weights = run.backend.xp, run.team(geometry), math.prod(geometry.w_shape)
    gradients_order = Arrangement((2, 0, 1, 3), 1, 1)
    size = max(1, min(_rows(geometry, _budget(geometry, run), weights), BLOCK_BYTES // 4 // weights))
    tasks = list(product(numpy.ndindex(*geometry.batch), pieces(geometry.output[0], size)))
    slices = list(pieces(len(tasks), -(-len(tasks) // SLICES)))
    shape = 1, math.prod(geometry.kernel) * geometry.channels, geometry.filters
    copies = gradients_order.copies(dy.of_images((0,) * len(geometry.batch)), run)
    line_results = copies * geometry.output[1] * geometry.filters
    room = _lines_seen(size, geometry) * _line(geometry), size * line_results, size * weights, weights
    with run.workspace(*(weights,) * len(slices)) as spaces:
        totals = [shaped(space, shape) for space in spaces]

        def work(numbers: Iterable[int]) -> None:
            with run.workspace(*room) as (lines_space, dy_space, product_space, term_space):
                for number in numbers:
                    for image, rows in tasks[slices[number]]:
                        windows = _windows(x.of_images(image), rows, geometry, lines_space, run)
                        gradients = gradients_order.load(dy, (*image, rows), dy_space, run)
                        products = shaped(product_space, (1, rows.stop - rows.start, *shape[1:]))
                        xp.matmul(windows, gradients, out=products)
                        is_first = (image, rows) == tasks[slices[number].start]
                        sums = xp.sum(products, 1, out=totals[number] if is_first else shaped(term_space, shape))
                        if not is_first:
                            xp.add(totals[number], sums, out=totals[number])

        run.spread(range(len(slices)), work, team.workers)
        for term in totals[1:]:
            xp.add(totals[0], term, out=totals[0])
        xp.copyto(dw.view[:, :, 0], totals[0].reshape(*geometry.kernel, geometry.channels, -1), casting="unsafe")


def _windows(image: Operand, rows: slice, geometry: Geometry, space: Array, run: Run) -> Array:
    """The windows of some lines of outputs: (1, lines, taps * channels, outputs of a line)."""
    step, kernel = geometry.stride[0], geometry.kernel
    seen = slice(rows.start * step, (rows.stop - 1) * step + kernel[0])  # lines, the padding before x among them
    lines = shaped(space, (seen.stop - seen.start, kernel[1], geometry.channels, geometry.output[1]))
    unfolded = _unfolded(geometry)
    for tap in range(kernel[1]):
        into = lines[:, tap, None].transpose(0, 3, 1, 2)
        read_tap(image, (0, tap), (seen, slice(0, geometry.output[1])), unfolded, into, run)
    line, item = lines.strides[0], lines.itemsize
    return run.backend.xp.lib.stride_tricks.as_strided(
        lines,
        (1, rows.stop - rows.start, kernel[0] * kernel[1] * geometry.channels, geometry.output[1]),
        (0, step * line, geometry.output[1] * item, item),
    )


@lru_cache(maxsize=256)
def _unfolded(geometry: Geometry) -> Geometry:
    """One image whose outputs are windows of single lines, of all lines of x with the padding before and behind."""
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
    """Elements of a line's matrix."""
    return geometry.kernel[1] * geometry.channels * geometry.output[1]


def _lines_seen(rows: int, geometry: Geometry) -> int:
    return (rows - 1) * geometry.stride[0] + geometry.kernel[0]


def _budget(geometry: Geometry, run: Run) -> int:
    """Elements that each thread may take, beside the sums of slices and a term of each thread."""
    shares = run.team(geometry).shares
    return (run.budget - (SLICES + shares) * math.prod(geometry.w_shape)) // shares


@lru_cache(maxsize=256)
def _rows(geometry: Geometry, budget: int, products: int) -> int:
    """How many lines of outputs are done at a time; 0 where the budget has no room for one."""
    line, results = _line(geometry), geometry.output[1] * geometry.filters
    first, further = _lines_seen(1, geometry) * line + results, geometry.stride[0] * line + results
    if first + products > budget:
        return 0
    fitting = 1 + (budget - first - products) // (further + products)
    return min(geometry.output[0], fitting, 1 + max(0, BLOCK_BYTES // 4 - first) // further)
