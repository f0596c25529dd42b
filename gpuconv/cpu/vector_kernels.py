"""Kernels of the algorithms depthwise and direct on NumPy, compiled by Numba.

    forward      y[o, f]     = b[f] + sum over taps t and channels c of x[o * stride + t * dilation - low, c] w[f, t, c]
    weight_grad  dw[f, t, c] = sum over outputs o of x[o * stride + t * dilation - low, c] dy[o, f]

Each element of w, b, y stands for the lanes of vectors, which are contiguous in memory; the last vector may overlap the
one before it. For depthwise the lanes are groups, which x has, too, and f are the filters of a group. For direct the
lanes are the filters of a group, which share an element of x, and f are groups, each with channels of its own.
Registers hold the sums of four adjacent outputs of a row, or of three taps. The padding is not read, so that no element
is multiplied by its zeros.

For depthwise, the number of taps along the last axis and the stride are constants of a kernel, with which LLVM loads an
input once for all outputs that read it. Kernels for 0 taps accept any number of taps, stride and dilation. The
functions share these tuples of numbers:

    axis    taps, stride and dilation of the last axis, and whether lanes share an element of x
    lines   the number of lines of taps along the last axis that read inside; their places in x and w. For depthwise,
            each channel has lines of its own
    place   places in x and y, and what a function needs beside, such as a range of filters or outputs
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
from numba import njit, types

from gpuconv.cpu.vector_plan import VECTOR_BYTES, Piece
from gpuconv.cpu.vectors import add, load, multiply_add, splat, store, zero


def signature(name: str, item: Any) -> Any:
    """Return the type of a kernel: arrays, the first of them writable, a Piece, and numbers of rows."""
    number = types.int64
    axes, x, y = (types.UniTuple(number, count) for count in (3, 6, 5))
    piece = types.NamedTuple((*(axes,) * 6, x, y, *(number,) * 4), Piece)
    arrays, numbers = {"forward": (3, 1), "weight_grad": (2, 2)}[name]
    return types.void(item[::1], *(types.Array(item, 1, "C", readonly=True),) * arrays, piece, *(number,) * numbers)


@njit(nogil=True, inline="always")
def inputs(x, index, shared):
    """Return the inputs of all lanes: the element at an index in each of them, or the elements from there on."""
    return splat(x, index) if shared else load(x, index)


@njit(nogil=True, inline="always")
def unaligned(piece, array):
    """Return how many lanes before lane 0 a cache line begins; 0 if there are few vectors.

    Vectors that begin there lie in one cache line each; only the first is moved to lane 0, and overlaps the second.
    """
    lanes = VECTOR_BYTES // array.itemsize
    return array.ctypes.data // array.itemsize % lanes if piece.lanes >= 6 * lanes else 0


@njit(nogil=True, inline="always")
def taps_within(start, dilation, taps, extent):
    """Return the first tap that reads inside, and the end of these taps; tap 0 reads at ``start``."""
    if start >= 0 and start + (taps - 1) * dilation < extent:
        return 0, taps
    first = -(start // dilation) if start < 0 else 0
    return first, max(first, min(taps, (extent - 1 - start) // dilation + 1))


@njit(nogil=True, inline="always")
def outputs_within(piece, axis):
    """Return the first output of a row of which all taps read inside, and the end of these; none if they are few."""
    taps, stride, dilation, _ = axis
    first = min(piece.output[2], max(0, (piece.low[2] + stride - 1) // stride))
    reach = (taps - 1) * dilation
    end = max(first, min(piece.output[2], (piece.input[2] - 1 - reach + piece.low[2]) // stride + 1))
    return first, end if end - first >= 4 else first


@njit(nogil=True, inline="always")
def row_of(piece, row):
    """Return image, and position along the first two axes, of a row of outputs, and of the inputs of its first taps."""
    rest, o = divmod(row, piece.output[1])
    n, m = divmod(rest, piece.output[0])
    return n, m, o, m * piece.stride[0] - piece.low[0], o * piece.stride[1] - piece.low[1]


@njit(nogil=True, inline="always")
def lines_within(piece, axis, d, h, places, weights):
    """Fill in the lines of a row whose first taps read at ``d`` and ``h``; return their number."""
    taps, _, _, shared = axis
    t_first, t_end = taps_within(d, piece.dilation[0], piece.kernel[0], piece.input[0])
    r_first, r_end = taps_within(h, piece.dilation[1], piece.kernel[1], piece.input[1])
    count = 0
    for t in range(t_first, t_end):
        for r in range(r_first, r_end):
            of_row = (d + t * piece.dilation[0]) * piece.x[1] + (h + r * piece.dilation[1]) * piece.x[2]
            for c in range(1 if shared else piece.channels):
                places[count] = of_row + c * piece.x[4]
                weights[count] = ((t * piece.kernel[1] + r) * taps * piece.channels + c) * piece.row
                count += 1
    return count


@njit(nogil=True, inline="always")
def loops(piece, axis, first, end):
    """Return two loops, over some taps of a line, and over channels if lines have all of them, the longer one inside.

    Each is a range, and its steps in pixels of x, in elements of x, and in elements of w.
    """
    taps = first, end, axis[2], 0, piece.channels * piece.row
    if not axis[3]:
        return (0, 1, 0, 0, 0), taps
    channels = 0, piece.channels, 0, piece.x[4], piece.row
    return (taps, channels) if piece.channels > axis[0] else (channels, taps)


@njit(nogil=True, inline="always")
def four_outputs(arrays, piece, axis, lines, place, g):
    """Compute four adjacent outputs of which all taps read inside, for one vector and some filters."""
    y, x, w, bias = arrays
    taps, stride, _, shared = axis
    count, places, weights = lines
    read, written, f_first, f_end = place
    pixel, size = piece.x[3], piece.kernel[0] * piece.kernel[1] * taps * piece.channels * piece.row
    outer, inner = loops(piece, axis, 0, taps)
    for f in range(f_first, f_end):
        v0, v1, v2, v3 = zero(x), zero(x), zero(x), zero(x)
        for line in range(count):
            for i in range(outer[0], outer[1]):
                a = read + f * piece.x[5] + places[line] + i * outer[2] * pixel + i * outer[3] + (0 if shared else g)
                b = f * size + weights[line] + i * outer[4] + g
                for k in range(inner[0], inner[1]):
                    v, p, e = load(w, b + k * inner[4]), k * inner[2], a + k * inner[3]
                    v0 = multiply_add(inputs(x, e + p * pixel, shared), v, v0)
                    v1 = multiply_add(inputs(x, e + (p + stride) * pixel, shared), v, v1)
                    v2 = multiply_add(inputs(x, e + (p + 2 * stride) * pixel, shared), v, v2)
                    v3 = multiply_add(inputs(x, e + (p + 3 * stride) * pixel, shared), v, v3)
        v, a = load(bias, f * piece.row + g), written + f * piece.y[4] + g
        store(y, a, add(v0, v))
        store(y, a + piece.y[3], add(v1, v))
        store(y, a + 2 * piece.y[3], add(v2, v))
        store(y, a + 3 * piece.y[3], add(v3, v))


@njit(nogil=True, inline="always")
def inner_outputs(arrays, piece, axis, lines, place, block):
    """Compute the outputs of a row of which all taps read inside, four at a time, for four vectors."""
    x, stride = arrays[1], axis[1]
    read, written, f_first, f_end, first, end = place
    lanes = VECTOR_BYTES // x.itemsize
    for tile in range(first, end, 4):
        q = min(tile, end - 4)
        of_tile = read + q * stride * piece.x[3], written + q * piece.y[3], f_first, f_end
        for lane in range(block, min(block + 4 * lanes, piece.lanes), lanes):
            g = max(0, min(lane, piece.lanes - lanes))
            four_outputs(arrays, piece, axis, lines, of_tile, g)


@njit(nogil=True, inline="always")
def one_output(arrays, piece, axis, lines, place, part):
    """Compute an output with the taps that read inside, for four vectors and one filter."""
    y, x, w, bias = arrays
    taps, _, _, shared = axis
    count, places, weights = lines
    read, written, s_first, s_end = place
    block, f = part
    lanes, last = VECTOR_BYTES // x.itemsize, piece.lanes - VECTOR_BYTES // x.itemsize
    size = piece.kernel[0] * piece.kernel[1] * taps * piece.channels * piece.row
    g0, g1 = max(0, min(block, last)), min(block + lanes, last)
    g2, g3 = min(block + 2 * lanes, last), min(block + 3 * lanes, last)
    v0, v1, v2, v3 = zero(x), zero(x), zero(x), zero(x)
    outer, inner = loops(piece, axis, s_first, s_end)
    for line in range(count):
        for i in range(outer[0], outer[1]):
            for k in range(inner[0], inner[1]):
                pixels, elements = i * outer[2] + k * inner[2], i * outer[3] + k * inner[3]
                a = read + f * piece.x[5] + places[line] + pixels * piece.x[3] + elements
                b = f * size + weights[line] + i * outer[4] + k * inner[4]
                v0 = multiply_add(inputs(x, a + (0 if shared else g0), shared), load(w, b + g0), v0)
                v1 = multiply_add(inputs(x, a + (0 if shared else g1), shared), load(w, b + g1), v1)
                v2 = multiply_add(inputs(x, a + (0 if shared else g2), shared), load(w, b + g2), v2)
                v3 = multiply_add(inputs(x, a + (0 if shared else g3), shared), load(w, b + g3), v3)
    a, b = written + f * piece.y[4], f * piece.row
    store(y, a + g0, add(v0, load(bias, b + g0)))
    store(y, a + g1, add(v1, load(bias, b + g1)))
    store(y, a + g2, add(v2, load(bias, b + g2)))
    store(y, a + g3, add(v3, load(bias, b + g3)))


@njit(nogil=True, inline="always")
def outer_outputs(arrays, piece, axis, lines, place, block):
    """Compute the other outputs of a row, one at a time, for four vectors at once."""
    read, written, f_first, f_end, first, end = place
    taps, stride, dilation, _ = axis
    for output in range(piece.output[2] - (end - first)):
        q = output if output < first else output + end - first
        s_first, s_end = taps_within(q * stride - piece.low[2], dilation, taps, piece.input[2])
        of_output = read + q * stride * piece.x[3], written + q * piece.y[3], s_first, s_end
        for f in range(f_first, f_end):
            one_output(arrays, piece, axis, lines, of_output, (block, f))


def forward(taps: int, stride: int, shared: int) -> Callable[..., None]:
    """Return the kernel of the forward convolution, which computes a number of rows of outputs."""

    def vector_forward(y, x, w, bias, piece, rows):
        axis = (
            taps if taps else piece.kernel[2],
            stride if taps else piece.stride[2],
            1 if taps else piece.dilation[2],
            shared,
        )
        first, end = outputs_within(piece, axis)
        places = numpy.empty(piece.kernel[0] * piece.kernel[1] * (1 if shared else piece.channels), numpy.int64)
        weights = numpy.empty(places.size, numpy.int64)
        arrays, four = (y, x, w, bias), 4 * VECTOR_BYTES // x.itemsize
        blocks = -(-piece.lanes // four)
        for number in range(piece.filters * blocks * rows if shared else rows):
            part, row = divmod(number, rows)
            f, g = part // blocks, part % blocks * four
            f_first, f_end, g_first, g_end = f, f + 1, g, min(g + four, piece.lanes)
            if not shared:
                f_first, f_end, g_first, g_end = 0, piece.filters, -unaligned(piece, x), piece.lanes
            n, m, o, d, h = row_of(piece, row)
            lines = lines_within(piece, axis, d, h, places, weights), places, weights
            read = n * piece.x[0] - piece.low[2] * piece.x[3]
            written = n * piece.y[0] + m * piece.y[1] + o * piece.y[2]
            place = read, written, f_first, f_end, first, end
            for block in range(g_first, g_end, four):
                inner_outputs(arrays, piece, axis, lines, place, block)
                outer_outputs(arrays, piece, axis, lines, place, block)

    return vector_forward


@njit(nogil=True, inline="always")
def term(piece, axis, c, k):
    """Return where a term of a line reads, along the last axis and in x: a tap, or a channel of a tap if shared."""
    s = k
    if axis[3]:
        s, c = divmod(k, piece.channels)
    return s * axis[2], s * axis[2] * piece.x[3] + c * piece.x[4]


@njit(nogil=True, inline="always")
def term_sums(arrays, piece, axis, rows, place, terms):
    """Return the sums of three terms of a line over rows of outputs, each for two vectors."""
    x, dy = arrays
    _, stride, _, shared = axis
    count, positions = rows
    t, r, f, g, g_next, first, end = place
    (s0, a0), (s1, a1), (s2, a2) = terms
    step = stride * piece.x[3]
    of_x, of_next = (f * piece.x[5], 0) if shared else (g, g_next - g)
    v0, v1, v2, u0, u1, u2 = zero(x), zero(x), zero(x), zero(x), zero(x), zero(x)
    for row in range(count):
        n, m, o, d, h = positions[row]
        d, h = d + t * piece.dilation[0], h + r * piece.dilation[1]
        if d < 0 or d >= piece.input[0] or h < 0 or h >= piece.input[1]:
            continue
        a = of_x + n * piece.x[0] + d * piece.x[1] + h * piece.x[2] - piece.low[2] * piece.x[3]
        b = f * piece.y[4] + n * piece.y[0] + m * piece.y[1] + o * piece.y[2]
        for tile in range(first, end, 4):
            for q in range(tile, tile + 4):
                e, v, u = a + q * step, load(dy, b + q * piece.y[3] + g), load(dy, b + q * piece.y[3] + g_next)
                v0 = multiply_add(inputs(x, e + a0, shared), v, v0)
                v1 = multiply_add(inputs(x, e + a1, shared), v, v1)
                v2 = multiply_add(inputs(x, e + a2, shared), v, v2)
                u0 = multiply_add(inputs(x, e + a0 + of_next, shared), u, u0)
                u1 = multiply_add(inputs(x, e + a1 + of_next, shared), u, u1)
                u2 = multiply_add(inputs(x, e + a2 + of_next, shared), u, u2)
        for output in range(piece.output[2] - (end - first)):
            q = output if output < first else output + end - first
            e, v, u = a + q * step, load(dy, b + q * piece.y[3] + g), load(dy, b + q * piece.y[3] + g_next)
            at = q * stride - piece.low[2]
            if 0 <= at + s0 < piece.input[2]:
                v0 = multiply_add(inputs(x, e + a0, shared), v, v0)
                u0 = multiply_add(inputs(x, e + a0 + of_next, shared), u, u0)
            if 0 <= at + s1 < piece.input[2]:
                v1 = multiply_add(inputs(x, e + a1, shared), v, v1)
                u1 = multiply_add(inputs(x, e + a1 + of_next, shared), u, u1)
            if 0 <= at + s2 < piece.input[2]:
                v2 = multiply_add(inputs(x, e + a2, shared), v, v2)
                u2 = multiply_add(inputs(x, e + a2 + of_next, shared), u, u2)
    return v0, v1, v2, u0, u1, u2


@njit(nogil=True, inline="always")
def weight_sums(dw, arrays, piece, axis, rows, place):
    """Store the sums of all taps, channels and filters of two vectors over some rows of outputs."""
    at, g, g_next, first, end = place
    taps, _, _, shared = axis
    terms = taps * piece.channels if shared else taps
    apart = 1 if shared else piece.channels  # that are not terms of one line
    step = piece.row * apart
    lines = piece.kernel[0] * piece.kernel[1]
    for line in range(piece.filters * lines * apart):
        rest, c = divmod(line, apart)
        f, of_taps = divmod(rest, lines)
        t, r = divmod(of_taps, piece.kernel[1])
        of_line = t, r, f, g, g_next, first, end
        e = at + (rest * taps * piece.channels + c) * piece.row
        for k0 in range(0, terms, 3):
            k1, k2 = min(k0 + 1, terms - 1), min(k0 + 2, terms - 1)
            three = term(piece, axis, c, k0), term(piece, axis, c, k1), term(piece, axis, c, k2)
            v0, v1, v2, u0, u1, u2 = term_sums(arrays, piece, axis, rows, of_line, three)
            store(dw, e + k0 * step + g, v0)
            store(dw, e + k1 * step + g, v1)
            store(dw, e + k2 * step + g, v2)
            store(dw, e + k0 * step + g_next, u0)
            store(dw, e + k1 * step + g_next, u1)
            store(dw, e + k2 * step + g_next, u2)


def weight_grad(taps: int, stride: int, shared: int) -> Callable[..., None]:
    """Return the kernel of weight_grad, which stores the sums over each ``most`` of a number of rows of outputs."""

    def vector_weight_grad(dw, x, dy, piece, most, rows):
        axis = (
            taps if taps else piece.kernel[2],
            stride if taps else piece.stride[2],
            1 if taps else piece.dilation[2],
            shared,
        )
        lanes, last = VECTOR_BYTES // x.itemsize, piece.lanes - VECTOR_BYTES // x.itemsize
        size = piece.kernel[0] * piece.kernel[1] * piece.channels * axis[0] * piece.filters * piece.row
        first, end = outputs_within(piece, axis)
        end -= (end - first) % 4
        positions = numpy.empty((min(most, rows), 5), numpy.int64)
        for start in range(0, rows, most):
            count = min(most, rows - start)
            for row in range(count):
                positions[row] = row_of(piece, start + row)
            for block in range(-unaligned(piece, dy), piece.lanes, 2 * lanes):
                place = start // most * size, max(0, min(block, last)), min(block + lanes, last), first, end
                weight_sums(dw, (x, dy), piece, axis, (count, positions), place)

    return vector_weight_grad
