"""Correct kernels and variants with a bug: one line is changed, and the emulator must detect it.

The kernels are shipped ones, run on a convolution of cases.py, and small ones for features that shipped kernels do not
use yet. test_planted_bugs.py runs them in all schedules. The table in tests/README.md is generated from this file.
"""

from typing import NamedTuple

import numpy as np


class Shipped(NamedTuple):
    """A kernel of the package and a convolution that shows the bug."""

    file: str
    kernel: str  # the kernel or function that contains the line
    algorithm: str
    direction: str
    case: str
    dtype: str = "float32"
    layout: str = "channels_first"


class Small(NamedTuple):
    """A kernel ``small(const float* x, float* y)`` of one block; y is compared with the expected function of x."""

    body: str
    inputs: int  # numbers of x: 1, 2, 3 ...
    expected: object  # a function of x
    block: int = 32


class Bug(NamedTuple):
    name: str  # the defect
    place: Shipped | Small
    right: str  # the line, or the part of it to change
    wrong: str
    fast: str  # how it is detected: "reported", "wrong result" or "no", and in how many of the schedules
    checked: str
    words: str = ""  # of the report in checked mode
    lines: tuple[str, ...] = ()  # texts of source lines, of which the report names one or more


DATA_GRAD = Shipped("scatter.cu", "scatter_data_grad", "scatter", "data_grad", "many channels")
WEIGHT_GRAD = Shipped("scatter.cu", "scatter_weight_grad", "scatter", "weight_grad", "3x3")
PIPELINE = Shipped("implicit_gemm.cu", "multiply", "implicit_gemm", "forward", "many channels")
FORWARD = Shipped("direct.cu", "direct_forward", "direct", "forward", "3x3")

TWO_STAGES = """__shared__ float tile[2][32];
const int lane = threadIdx.x;
copy_async<4>(&tile[0][lane], &x[lane]);
copy_async_commit();
float sum = 0;
for (int k = 0; k < 4; ++k) {
    if (k < 3) copy_async<4>(&tile[(k + 1) % 2][lane], &x[32 * (k + 1) + lane]);
    copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();  // the stage is whole
    sum += tile[k % 2][31 - lane];
    __syncthreads();  // the stage has been read
}
copy_async_wait<0>();
y[lane] = sum;"""
TWO_STAGES = Small(TWO_STAGES, 128, lambda x: x.reshape(4, 32).sum(0)[::-1])

NEIGHBOURS = """__shared__ float tile[64];
tile[threadIdx.x] = x[threadIdx.x];
__syncwarp();
y[threadIdx.x] = tile[threadIdx.x ^ 1];"""
NEIGHBOURS = Small(NEIGHBOURS, 64, lambda x: x.reshape(-1, 2)[:, ::-1].reshape(-1), 64)

ROWS_OF_MATRICES = """__shared__ __align__(128) unsigned short tile[32][2][8];
const int row = threadIdx.x, swizzle = row / 4 % 2;  // every other four rows have their halves exchanged
for (int i = 0; i < 8; ++i) tile[row][swizzle][i] = (unsigned short)(x[8 * row + i]);
for (int i = 0; i < 8; ++i) tile[row][1 - swizzle][i] = 0;
__syncwarp();
unsigned r[4];
load_matrices(r, tile[row][swizzle]);
for (int m = 0; m < 4; ++m) y[4 * row + m] = r[m] & 0xffff;"""
ROWS_OF_MATRICES = Small(ROWS_OF_MATRICES, 256, lambda x: x.reshape(4, 8, 4, 2)[..., 0].transpose(1, 2, 0).reshape(-1))

# a has 1 + 3/4096 in its first row and column, which rounds up to 1 + 4/4096; b consists of ones.
PRODUCT = """const int lane = threadIdx.x;
float d[4] = {};
const float first = lane == 0 ? 1 + x[2] / 4096 : 0;
const unsigned a[4] = {to_tf32(first), 0, 0, 0}, b[2] = {to_tf32(1), to_tf32(1)};
multiply_16x8x8_tf32(d, a, b);
y[lane] = d[0];"""
PRODUCT = Small(PRODUCT, 64, lambda x: np.where(np.arange(32) < 4, np.float32(1 + 4 / 4096), 0))

BUGS = (
    # --------------------------------------------------------------------------------------------- races
    Bug(
        "`+=` instead of an atomic addition",
        Shipped("scatter.cu", "scatter_data_grad_plain", "scatter_plain", "data_grad", "3x3"),
        "atomic_add(dx + i.offset(dx_at), product);",
        "add(dx[i.offset(dx_at)], product);",
        "no",
        "reported 5/5",
        "race: ",
        ("add(dx[i.offset(dx_at)], product);",),
    ),
    Bug(
        "no barrier after a tile is stored",
        DATA_GRAD,
        "__syncthreads();  // the tiles are whole",
        "",
        "wrong result 5/5",
        "reported 5/5",
        "tile",
        ("dy_tile[f][j] =", "w_tile[f][c] =", "ROWS> a =", "COLUMNS> b ="),
    ),
    Bug(
        "no barrier before a tile is stored again",
        DATA_GRAD,
        "__syncthreads();  // the tables and the region are set, and the tiles of the last chunk have been read",
        "",
        "wrong result 5/5",
        "reported 5/5",
        "race: ",
        (
            "dy_tile[f][j] =",
            "w_tile[f][c] =",
            "ROWS> a =",
            "COLUMNS> b =",
            "region_row[j] = exists",
        ),
    ),
    Bug(
        "no barrier in a block's reduction",
        WEIGHT_GRAD,
        "__syncthreads();  // the team before has added its sums (and total is set)",
        "",
        "no",
        "reported 5/5",
        "total",
        ("Numbers<Sum, COUNT> numbers = *to;", "*to = numbers;", "total[e / WIDTH][e % WIDTH] = Sum{};"),
    ),
    Bug(
        "no `__syncwarp()`",
        NEIGHBOURS,
        "__syncwarp();",
        "",
        "wrong result 5/5",
        "reported 5/5",
        "shared tile",
        ("y[threadIdx.x] = tile[threadIdx.x ^ 1];", "tile[threadIdx.x] = x[threadIdx.x];"),
    ),
    Bug(
        "a shuffle taken for a barrier",
        NEIGHBOURS,
        "__syncwarp();",
        "__shfl_sync(~0u, 1, 0);",
        "no",
        "reported 5/5",
        "race: ",
        ("y[threadIdx.x] = tile[threadIdx.x ^ 1];",),
    ),
    Bug(
        "two blocks write one element",
        Shipped("direct.cu", "direct_weight_grad", "direct", "weight_grad", "several slices"),
        "partial[i] = sum;",
        "partial[i % weights] = sum;",
        "wrong result 5/5",
        "reported 5/5",
        "race: write of partial",
        ("partial[i % weights] = sum;",),
    ),
    # --------------------------------------------------------------------------------------------- bounds
    Bug(
        "no test for the end of the grid",
        FORWARD,
        "if (i >= conv.N * conv.G * conv.F * conv.output[0] * conv.output[1] * conv.output[2]) return;",
        "",
        "reported 5/5",
        "reported 5/5",
        "out of bounds: ",
        ("add_product(sum, x[", "result[at] ="),
    ),
    Bug(
        "no test for a row in the padding",
        FORWARD,
        "if (!inside(h, conv.input[1])) continue;",
        "",
        "reported 5/5",
        "reported 5/5",
        "out of bounds: read of 4 bytes ",
        ("add_product(sum, x[",),
    ),
    Bug(
        "a row too far in a shared array",
        DATA_GRAD,
        "&dy_tile[f][output_of_thread]",
        "&dy_tile[f + 1][output_of_thread]",
        "wrong result 5/5",
        "reported 5/5",
        "array index out of bounds",
        ("&dy_tile[f + 1][output_of_thread]",),
    ),
    Bug(
        "past the end of a row, within the shared array",
        WEIGHT_GRAD,
        "&x_tile[k][row_of_thread]",
        "&x_tile[k][row_of_thread + 12]",
        "wrong result 5/5",
        "reported 5/5",
        "array index out of bounds",
        ("&x_tile[k][row_of_thread + 12]",),
    ),
    # --------------------------------------------------------------------------------------------- sums
    Bug(
        "a tail's stale rows are added",
        DATA_GRAD,
        "for (int f = 0; f < depth; ++f)",
        "for (int f = 0; f < CHUNK; ++f)",
        "wrong result 5/5",
        "wrong result 5/5",
    ),
    Bug(
        "sums that were not cleared",
        DATA_GRAD,
        "Sum sum[THREAD_OUTPUTS][THREAD_CHANNELS] = {};",
        "Sum sum[THREAD_OUTPUTS][THREAD_CHANNELS];",
        "wrong result 5/5",
        "wrong result 5/5",
    ),
    Bug(
        "an operand not rounded to TF32",
        PRODUCT,
        "{to_tf32(first), 0, 0, 0}",
        "{__float_as_uint(first), 0, 0, 0}",
        "wrong result 5/5",
        "wrong result 5/5",
    ),
    Bug(
        "an index that overflows",
        Small(
            """const int stride = 1 << 30;
const long long offset = (long long)(threadIdx.x) * stride;
y[threadIdx.x] = float(offset >> 28) * x[0];""",
            1,
            lambda x: 4 * np.arange(32),
        ),
        "(long long)(threadIdx.x) * stride",
        "int(threadIdx.x) * stride",
        "wrong result 5/5",
        "reported 5/5",
        "undefined: integer overflow of *",
        ("int(threadIdx.x) * stride",),
    ),
    # --------------------------------------------------------------------------------------------- divergence
    Bug(
        "a barrier that only some threads meet",
        DATA_GRAD,
        "__syncthreads();  // the tiles are whole",
        "if (thread < 64) __syncthreads();  // the tiles are whole",
        "reported 5/5",
        "reported 5/5",
        "diverged barrier: ",
        ("if (thread < 64) __syncthreads();",),
    ),
    Bug(
        "a return before a barrier",
        DATA_GRAD,
        "if (row >= 0) add_to_row(",
        "if (row < 0) return; add_to_row(",
        "reported 5/5",
        "reported 5/5",
        "wait: threads",
        ("__syncthreads();",),
    ),
    Bug(
        "a shuffle after a return",
        Small(
            """if (threadIdx.x == 3) y[threadIdx.x] = 0;
y[threadIdx.x] = __shfl_xor_sync(~0u, x[threadIdx.x], 1);""",
            32,
            lambda x: x.reshape(-1, 2)[:, ::-1].reshape(-1),
        ),
        "y[threadIdx.x] = 0;",
        "return;",
        "reported 5/5",
        "reported 5/5",
        "deadlock: ",
        ("__shfl_xor_sync(",),
    ),
    Bug(
        "a lane that skips a matrix product",
        PRODUCT,
        "multiply_16x8x8_tf32(d, a, b);",
        "if (lane != 5) multiply_16x8x8_tf32(d, a, b);",
        "reported 5/5",
        "reported 5/5",
        "wait in mma.m16n8k8.tf32 at",
        ("if (lane != 5) multiply_16x8x8_tf32(d, a, b);",),
    ),
    # --------------------------------------------------------------------------------------------- instructions
    Bug(
        "a vector that is not aligned",
        WEIGHT_GRAD,
        "__shared__ __align__(16) Sum x_tile[DEPTH][TILE_ROWS + PAD];",
        "__shared__ __align__(16) Sum x_tile[DEPTH][TILE_ROWS + PAD - 1];",
        "reported 5/5",
        "reported 5/5",
        "misaligned",
        ("ROWS> a =",),
    ),
    Bug(
        "matrix rows read where they are not (swizzle)",
        ROWS_OF_MATRICES,
        "load_matrices(r, tile[row][swizzle]);",
        "load_matrices(r, tile[row][0]);",
        "wrong result 5/5",
        "wrong result 5/5",
    ),
    Bug(
        "no barrier after an asynchronous copy",
        TWO_STAGES,
        "__syncthreads();  // the stage is whole",
        "",
        "wrong result 5/5",
        "reported 5/5",
        "tile",
        ("sum += tile[k % 2][31 - lane];",),
    ),
    Bug(
        "one group of copies too few is waited for",
        TWO_STAGES,
        "copy_async_wait<1>();",
        "copy_async_wait<2>();",
        "wrong result 3/5",
        "reported 5/5",
        "while an asynchronous copy into it is under way",
        ("sum += tile[k % 2][31 - lane];",),
    ),
    Bug(
        "a copy into the stage that is being read",
        TWO_STAGES,
        "copy_async<4>(&tile[(k + 1) % 2][lane]",
        "copy_async<4>(&tile[k % 2][lane]",
        "wrong result 5/5",
        "reported 5/5",
        "tile",
        ("copy_async<4>(&tile[k % 2][lane]", "sum += tile[k % 2][31 - lane];"),
    ),
    Bug(
        "a pipeline without its barrier",
        PIPELINE,
        "__syncthreads();  // this iteration's",
        "// this iteration's",
        "reported 5/5",
        "reported 5/5",
        "of shared tables",
        ("const Coordinate<AXES> there =", "steps.set(tables.left_step[1 - now]"),
    ),
    Bug(
        "the tile that is multiplied is filled again",
        PIPELINE,
        "Stage& coming = stages[Unsigned(next) % STAGES];",
        "Stage& coming = stages[Unsigned(i + STAGES) % STAGES];",
        "wrong result 5/5",
        "reported 5/5",
        "while an asynchronous copy into it is under way",
        ("const Chunk chunk =",),
    ),
    Bug(
        "one table of steps in the place of two",
        PIPELINE,
        "steps.set(tables.left_step[1 - now], tables.right_step[1 - now]);",
        "steps.set(tables.left_step[now], tables.right_step[now]);",
        "reported 5/5",
        "reported 5/5",
        "read of shared tables",
        ("const Coordinate<AXES> there =", "unit_at[i] = along.table[slot(unit() + i)];"),
    ),
    Bug(
        "sums that are stored before their staging buffer is full",
        PIPELINE._replace(file="products.cuh", kernel="store_sums"),
        "__syncwarp();  // the buffer is full",
        "",
        "wrong result 5/5",
        "reported 5/5",
        "race: ",
        ("*reinterpret_cast<const Numbers<Sum, VECTOR>*>(&staged[", "staged[line * STAGED_PITCH + "),
    ),
    Bug(
        "what lies in the padding, copied all the same",
        PIPELINE._replace(file="tiles.cuh", kernel="load"),
        "present ? VECTOR * sizeof(Element) : 0);",
        "VECTOR * sizeof(Element));",
        "reported 5/5",
        "reported 5/5",
        "out of bounds: read of 4 bytes",
        ("w_at}.tile();",),
    ),
    Bug(
        "a copy from outside the image, not zero-filled",
        Small(
            """__shared__ float tile[32];
const int i = threadIdx.x - 1;
copy_async<4>(&tile[threadIdx.x], i < 0 ? x : x + i, i < 0 ? 0 : 4);
copy_async_commit();
copy_async_wait<0>();
y[threadIdx.x] = tile[threadIdx.x];""",
            31,
            lambda x: np.concatenate([[0], x]),
        ),
        "i < 0 ? x : x + i, i < 0 ? 0 : 4",
        "x + i",
        "reported 1/5, wrong result 4/5",
        "reported 5/5",
        "out of bounds: read of 4 bytes 4 bytes before x",
        ("copy_async<4>(&tile[threadIdx.x], x + i);",),
    ),
)


def table():
    """Return the rows of the table in tests/README.md."""
    lines = ["| defect | in | fast mode | checked mode |", "|---|---|---|---|"]
    for bug in BUGS:
        where = f"`{bug.place.kernel}`" if isinstance(bug.place, Shipped) else "a small kernel"
        lines.append(f"| {bug.name} | {where} | {bug.fast} | {bug.checked} |")
    return "\n".join(lines)
