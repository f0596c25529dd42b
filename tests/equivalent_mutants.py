# ruff: noqa: E501 - lines of the sources
"""Mutants that no test can catch, since they compute the same: {(file, line, mutated line): the reason}, or with a
fourth, the number of the line among those that are alike, where it holds of that one alone.

mutate_kernels.py runs them all the same, and complains about one that is caught. Those that compile to the same code
are found by the compiler and not listed.
"""

ALIGNMENT = "alignment decides only in how wide pieces the numbers are read, not which"
UNUSED_ROWS = "what is noted of rows beyond the last is never used; the bound keeps row * F from overflowing near 2**31"
ONE_ROUND = "the block has more threads than there are entries, so that each thread goes round once"
CHUNKS = (
    "the order of chunks in a tile changes alike for those who write and read it: it decides about bank conflicts only"
)
SLAB_ROOM = "the room between the lines of a slab decides about bank conflicts only"
TERM_TURNS_UNUSED = "TERM_TURNS is used only where TERMS is more than 0"
SETTLED = "a sum of at most TERMS products is added to the total: how many fewer, or at which turn, is left open"
BEYOND_TILE = "rows, columns and steps beyond a whole tile are not looked at, whatever their number"
EQUAL = "where the two are equal, either is the smaller one"
NO_TAP = "where no tap reaches the residue, none of its numbers is used"
BOTH_PARTS = "zero times infinity is no number in both of its parts"
MENDED_AGAIN = "sums that are formed again of the same products without need are the same"

EQUIVALENT = {
    # ----------------------------------------------------------------------------------------- common.cuh
    (
        "common.cuh",
        "case RELU: return z < 0 ? T(0) : z;",
        "case RELU: return z <= 0 ? T(0) : z;",
    ): "at 0 both give 0, and no rule says which sign it has",
    (
        "common.cuh",
        "case LEAKY_RELU: return z < 0 ? T(LEAKY_SLOPE) * z : z;",
        "case LEAKY_RELU: return z <= 0 ? T(LEAKY_SLOPE) * z : z;",
    ): "the slope times 0 is 0",
    # ----------------------------------------------------------------------------------------- direct.cu
    (
        "direct.cu",
        "if (remainder < 0) {",
        "if (remainder < 0 - 1) {",
    ): "-1 is as little 0 as what it becomes, and quotient * stride + remainder stays exact, so later taps agree",
    # ----------------------------------------------------------------------------------------- scatter.cu
    (
        "scatter.cu",
        "template <int COUNT> struct __align__(COUNT * sizeof(Sum) % 16 == 0 ? 16 : COUNT * sizeof(Sum) % 8 == 0 ? 8 : 4) Numbers {",
        "template <int COUNT> struct __align__(COUNT * sizeof(Sum) % 16 == 0 && false ? 16 : COUNT * sizeof(Sum) % 8 == 0 ? 8 : 4) Numbers {",
    ): ALIGNMENT,
    (
        "scatter.cu",
        "template <int COUNT> struct __align__(COUNT * sizeof(Sum) % 16 == 0 ? 16 : COUNT * sizeof(Sum) % 8 == 0 ? 8 : 4) Numbers {",
        "template <int COUNT> struct __align__(COUNT * sizeof(Sum) % 16 == 0 ? 16 : COUNT * sizeof(Sum) % 8 == 0 && false ? 8 : 4) Numbers {",
    ): ALIGNMENT,
    (
        "scatter.cu",
        "for (Index f0 = 0; f0 < conv.F; f0 += CHUNK) {",
        "for (Index f0 = 0; f0 <= conv.F; f0 += CHUNK) {",
    ): "one more chunk, of no filters: nothing is loaded or added",
    (
        "scatter.cu",
        "const int depth = conv.F - f0 < CHUNK ? int(conv.F - f0) : CHUNK;",
        "const int depth = conv.F - f0 <= CHUNK ? int(conv.F - f0) : CHUNK;",
    ): "where the two are equal, either is the smaller one",
    (
        "scatter.cu",
        "for (int e = thread; e < CHUNK * TILE_OUTPUTS; e += THREADS) {",
        "for (int e = thread; e <= CHUNK * TILE_OUTPUTS; e += THREADS) {",
    ): "the cell beyond the last is in row CHUNK, which is not less than depth",
    (
        "scatter.cu",
        "for (int e = thread; e < CHUNK * WIDTH; e += THREADS) {",
        "for (int e = thread; e <= CHUNK * WIDTH; e += THREADS) {",
    ): "the cell beyond the last is in row CHUNK, which is not less than depth",
    (
        "scatter.cu",
        "for (int j = thread; j < TILE_ROWS && row0 + j < rows; j += THREADS) {",
        "for (int j = thread; j < TILE_ROWS && row0 + j <= rows; j += THREADS) {",
    ): UNUSED_ROWS,
    (
        "scatter.cu",
        "for (int j = thread; j < TILE_ROWS && row0 + j < rows; j += THREADS) {",
        "for (int j = thread; j < TILE_ROWS && row0 < rows; j += THREADS) {",
    ): UNUSED_ROWS,
    (
        "scatter.cu",
        "for (int j = thread; j < TILE_ROWS && row0 + j < rows; j += THREADS) {",
        "for (int j = thread; j < TILE_ROWS && row0 - j < rows; j += THREADS) {",
    ): UNUSED_ROWS,
    (
        "scatter.cu",
        "for (int j = thread; j < TILE_ROWS && row0 + j < rows; j += THREADS) {",
        "for (int j = thread; j < TILE_ROWS && row0 + j < rows; j = THREADS) {",
    ): ONE_ROUND,
    (
        "scatter.cu",
        "for (Index first = slice * length; first < last; first += DEPTH) {",
        "for (Index first = slice * length; first <= last; first += DEPTH) {",
    ): "one more chunk, of no outputs: nothing is loaded or added",
    (
        "scatter.cu",
        "const int depth = last - first < DEPTH ? int(last - first) : DEPTH;",
        "const int depth = last - first <= DEPTH ? int(last - first) : DEPTH;",
    ): "where the two are equal, either is the smaller one",
    (
        "scatter.cu",
        "for (int k = thread; k < depth; k += THREADS) {",
        "for (int k = thread; k < depth; k = THREADS) {",
    ): ONE_ROUND,
    (
        "scatter.cu",
        "for (int e = thread; e < DEPTH * TILE_ROWS; e += THREADS) {",
        "for (int e = thread; e <= DEPTH * TILE_ROWS; e += THREADS) {",
    ): "the cell beyond the last is in row DEPTH, which is not less than depth",
    (
        "scatter.cu",
        "for (int e = thread; e < DEPTH * WIDTH; e += THREADS) {",
        "for (int e = thread; e <= DEPTH * WIDTH; e += THREADS) {",
    ): "the cell beyond the last is in row DEPTH, which is not less than depth",
    (
        "scatter.cu",
        "for (int team = 0; team < SPLITS; ++team) {",
        "for (int team = 0; team <= SPLITS; ++team) {",
    ): "one more round, of a team that no thread is in",
    # ----------------------------------------------------------------------------------------- tiles.cuh
    (
        "tiles.cuh",
        "template <int AXES> struct __align__(AXES == 1 ? 2 * sizeof(Index) : 16) Spot {",
        "template <int AXES> struct __align__(AXES == 1 || true ? 2 * sizeof(Index) : 16) Spot {",
    ): ALIGNMENT,
    (
        "tiles.cuh",
        "template <int AXES> struct __align__(AXES == 1 ? 2 * sizeof(Index) : 16) Spot {",
        "template <int AXES> struct __align__(AXES == 1 && false ? 2 * sizeof(Index) : 16) Spot {",
    ): ALIGNMENT,
    (
        "tiles.cuh",
        "template <int AXES> struct __align__(AXES == 1 ? 2 * sizeof(Index) : 16) Spot {",
        "template <int AXES> struct __align__(AXES != 1 ? 2 * sizeof(Index) : 16) Spot {",
    ): ALIGNMENT,
    (
        "tiles.cuh",
        "static constexpr int ROOM = AXES == 2 ? 3 : AXES;",
        "static constexpr int ROOM = AXES == 2 && false ? 3 : AXES;",
    ): "the room beside two positions is there to align them, and never read",
    (
        "tiles.cuh",
        "static constexpr int ROOM = AXES == 2 ? 3 : AXES;",
        "static constexpr int ROOM = AXES != 2 ? 3 : AXES;",
    ): "the room beside two positions is there to align them, and never read",
    (
        "tiles.cuh",
        "template <> struct __align__(sizeof(Index) == 4 ? 8 : 16) Spot<BY_TAP> {",
        "template <> struct __align__(sizeof(Index) == 4 || true ? 8 : 16) Spot<BY_TAP> {",
    ): ALIGNMENT,
    (
        "tiles.cuh",
        "template <> struct __align__(sizeof(Index) == 4 ? 8 : 16) Spot<BY_TAP> {",
        "template <> struct __align__(sizeof(Index) == 4 && false ? 8 : 16) Spot<BY_TAP> {",
    ): ALIGNMENT,
    (
        "tiles.cuh",
        "template <> struct __align__(sizeof(Index) == 4 ? 8 : 16) Spot<BY_TAP> {",
        "template <> struct __align__(sizeof(Index) != 4 ? 8 : 16) Spot<BY_TAP> {",
    ): ALIGNMENT,
    (
        "tiles.cuh",
        "static constexpr bool ASYNC = COPIES_ASYNC && VECTOR * sizeof(Element) >= 4;",
        "static constexpr bool ASYNC = COPIES_ASYNC && VECTOR * sizeof(Element) > 4;",
    ): "single numbers of 4 bytes may come by way of registers too: slower, and the same",
    (
        "tiles.cuh",
        "static constexpr int UNIT = ASYNC ? VECTOR : sizeof(Element) < 4 ? 4 / sizeof(Element) : 1;",
        "static constexpr int UNIT = ASYNC ? VECTOR : sizeof(Element) < 4 && false ? 4 / sizeof(Element) : 1;",
    ): "numbers of 16 bits may be stored one by one too: slower, and the same",
    (
        "tiles.cuh",
        "static constexpr int SPOTS = ASYNC ? 1 : UNIT;",
        "static constexpr int SPOTS = ASYNC && false ? 1 : UNIT;",
    ): "of a chunk only the first place is looked at, however many are kept",
    (
        "tiles.cuh",
        "Element held[ASYNC ? 1 : ROUNDS][UNIT];",
        "Element held[ASYNC && false ? 1 : ROUNDS][UNIT];",
    ): "room that nobody uses",
    (
        "tiles.cuh",
        "if (LINES % PACE != 0 && line >= LINES) continue;",
        "if (LINES % PACE != 0 || line >= LINES) continue;",
    ): "in all tiles there are, threads share the lines evenly",
    (
        "tiles.cuh",
        "if (LINES % PACE != 0 && line >= LINES) continue;",
        "if (LINES % PACE == 0 && line >= LINES) continue;",
    ): "in all tiles there are, threads share the lines evenly",
    (
        "tiles.cuh",
        "if (LINES % PACE != 0 && line >= LINES) continue;",
        "if (LINES / PACE != 0 && line >= LINES) continue;",
    ): "in all tiles there are, threads share the lines evenly",
    # ----------------------------------------------------------------------------------------- products.cuh
    (
        "products.cuh",
        "return ALONG_DEPTH ? lane + i * LANES : (i / CHUNK * LANES + lane) * CHUNK + i % CHUNK;",
        "return ALONG_DEPTH && false ? lane + i * LANES : (i / CHUNK * LANES + lane) * CHUNK + i % CHUNK;",
    ): "the rows of a tile are distributed among the lanes in another way; a lane reads and writes the rows that it owns",
    (
        "products.cuh",
        "constexpr bool SINGLE = TENSOR_PRODUCTS > 0 && sizeof(Element) > 2;",
        "constexpr bool SINGLE = TENSOR_PRODUCTS >= 0 && sizeof(Element) > 2;",
    ): CHUNKS,
    (
        "products.cuh",
        "static constexpr int STEPS = LEFT_ALONG_DEPTH || RIGHT_ALONG_DEPTH ? CHUNK : 1;",
        "static constexpr int STEPS = LEFT_ALONG_DEPTH || RIGHT_ALONG_DEPTH || true ? CHUNK : 1;",
    ): "how many steps are read at once changes neither the products nor their order",
    (
        "products.cuh",
        "for (int i = 0; i < (RESULT_ALONG_ROWS ? ROWS : 1); ++i)",
        "for (int i = 0; i < (RESULT_ALONG_ROWS || true ? ROWS : 1); ++i)",
    ): "the same sums are put in their place several times",
    (
        "products.cuh",
        "for (int k = 0; k < DEPTH; k += STEPS) {",
        "for (int k = 0; k < DEPTH - 1; k += STEPS) {",
        2,
    ): "DEPTH is a multiple of STEPS, which is 4: the last turn begins before DEPTH - 1",
    (
        "products.cuh",
        "constexpr int SLAB_PITCH = SLAB_LENGTH + (RESULT_ALONG_ROWS ? 4 : 8);",
        "constexpr int SLAB_PITCH = SLAB_LENGTH + (RESULT_ALONG_ROWS || true ? 4 : 8);",
    ): SLAB_ROOM,
    (
        "products.cuh",
        "constexpr int SLAB_PITCH = SLAB_LENGTH + (RESULT_ALONG_ROWS ? 4 : 8);",
        "constexpr int SLAB_PITCH = SLAB_LENGTH + (RESULT_ALONG_ROWS && false ? 4 : 8);",
    ): SLAB_ROOM,
    # ----------------------------------------------------------------------------------------- implicit_gemm.cu
    (
        "implicit_gemm.cu",
        "for (Index step = threadIdx.x; step < depth(); step += THREADS) {",
        "for (Index step = threadIdx.x; step <= depth(); step += THREADS) {",
    ): "the step after the last one has the indices of the first one, whose weight is tested again",
    (
        "implicit_gemm.cu",
        "constexpr int TERM_TURNS = TERMS > 0 ? TERMS / DEPTH : 1;",
        "constexpr int TERM_TURNS = TERMS > 0 && false ? TERMS / DEPTH : 1;",
    ): SETTLED,
    (
        "implicit_gemm.cu",
        "if (TERMS > 0 && (turn + 1) % TERM_TURNS == 0) products.settle();",
        "if (TERMS >= 0 && (turn + 1) % TERM_TURNS == 0) products.settle();",
    ): SETTLED,
    (
        "implicit_gemm.cu",
        "if (TERMS > 0 && (turn + 1) % TERM_TURNS == 0) products.settle();",
        "products.settle();",
    ): SETTLED,
    (
        "implicit_gemm.cu",
        "if (TERMS > 0 && (turn + 1) % TERM_TURNS == 0) products.settle();",
        "if (TERMS > 0 || (turn + 1) % TERM_TURNS == 0) products.settle();",
    ): SETTLED,
    (
        "implicit_gemm.cu",
        "if (TERMS > 0 && (turn + 1) % TERM_TURNS == 0) products.settle();",
        "if (TERMS > 0 && (turn + 1) % TERM_TURNS != 0) products.settle();",
    ): SETTLED,
    (
        "implicit_gemm.cu",
        "if (TERMS > 0 && (turn + 1) % TERM_TURNS == 0) products.settle();",
        "if (TERMS > 0 && (turn) % TERM_TURNS == 0) products.settle();",
    ): SETTLED,
    (
        "implicit_gemm.cu",
        "if (TERMS > 0 && (turn + 1) % TERM_TURNS == 0) products.settle();",
        "if (TERMS > 0 && (turn - 1) % TERM_TURNS == 0) products.settle();",
    ): SETTLED,
    (
        "implicit_gemm.cu",
        "constexpr int TERM_TURNS = TERMS > 0 ? TERMS / DEPTH : 1;",
        "constexpr int TERM_TURNS = TERMS >= 0 ? TERMS / DEPTH : 1;",
    ): TERM_TURNS_UNUSED,
    (
        "implicit_gemm.cu",
        "constexpr int TERM_TURNS = TERMS > 0 ? TERMS / DEPTH : 1;",
        "constexpr int TERM_TURNS = TERMS > 0 || true ? TERMS / DEPTH : 1;",
    ): TERM_TURNS_UNUSED,
    (
        "implicit_gemm.cu",
        "Sum slabs[THREADS / 32][SLAB_LINES * SLAB_PITCH];",
        "Sum slabs[THREADS % 32][SLAB_LINES * SLAB_PITCH];",
    ): "how long shared memory is, the host says; the slabs begin where they did",
    (
        "implicit_gemm.cu",
        "carry = i < 3 && digit[i] >= extent[i];",
        "carry = i <= 3 && digit[i] >= extent[i];",
    ): "numbers beyond the last are not looked at, and the last digit has no next one",
    (
        "implicit_gemm.cu",
        "template <class T> DEVICE bool is_number(Complex<T> v) { return is_number(v.real) && is_number(v.imag); }",
        "template <class T> DEVICE bool is_number(Complex<T> v) { return is_number(v.real) || is_number(v.imag); }",
    ): BOTH_PARTS,
    (
        "implicit_gemm.cu",
        "template <class T> DEVICE bool is_number(Complex<T> v) { return is_number(v.real) && is_number(v.imag); }",
        "template <class T> DEVICE bool is_number(Complex<T> v) { return is_number(v.imag) && is_number(v.imag); }",
    ): BOTH_PARTS,
    (
        "implicit_gemm.cu",
        "template <class T> DEVICE bool is_number(Complex<T> v) { return is_number(v.real) && is_number(v.imag); }",
        "template <class T> DEVICE bool is_number(Complex<T> v) { return is_number(v.real) && is_number(v.real); }",
    ): BOTH_PARTS,
    (
        "implicit_gemm.cu",
        "template <class T> DEVICE bool is_finite(T v) { return v - v == 0; }",
        "template <class T> DEVICE bool is_finite(T v) { return v + v == 0; }",
    ): MENDED_AGAIN,
    (
        "implicit_gemm.cu",
        "if (!LEFT_ALONG_DEPTH) left_mover.face(tables.row, rows);",
        "left_mover.face(tables.row, rows);",
    ): "a mover that faces steps does so again before its first tile",
    (
        "implicit_gemm.cu",
        "if (!RIGHT_ALONG_DEPTH) right_mover.face(tables.column, columns);",
        "right_mover.face(tables.column, columns);",
    ): "a mover that faces steps does so again before its first tile",
    (
        "implicit_gemm.cu",
        "const int now = next % 2, count = depth - next * DEPTH < DEPTH ? int(depth - next * DEPTH) : DEPTH;",
        "const int now = next % 2, count = depth - next * DEPTH <= DEPTH ? int(depth - next * DEPTH) : DEPTH;",
    ): EQUAL,
    (
        "implicit_gemm.cu",
        "const int now = next % 2, count = depth - next * DEPTH < DEPTH ? int(depth - next * DEPTH) : DEPTH;",
        "const int now = next % 2, count = depth - next * DEPTH < DEPTH || true ? int(depth - next * DEPTH) : DEPTH;",
    ): BEYOND_TILE,
    (
        "implicit_gemm.cu",
        "if (next < turns) {",
        "if (next <= turns) {",
        2,
    ): "the tile that is deposited once more is multiplied no more",
    (
        "implicit_gemm.cu",
        "const Index shifted = start[axis] + conv.low[axis], last = apart < kernel ? apart : kernel;",
        "const Index shifted = start[axis] + conv.low[axis], last = apart < kernel - 1 ? apart : kernel;",
    ): "taps repeat their residues after `apart`: the first that meets one is the same, or there is none",
    (
        "implicit_gemm.cu",
        "const Index shifted = start[axis] + conv.low[axis], last = apart < kernel ? apart : kernel;",
        "const Index shifted = start[axis] + conv.low[axis], last = apart < kernel || true ? apart : kernel;",
    ): NO_TAP,
    (
        "implicit_gemm.cu",
        "const Index shifted = start[axis] + conv.low[axis], last = apart < kernel ? apart : kernel;",
        "const Index shifted = start[axis] + conv.low[axis], last = apart < kernel && false ? apart : kernel;",
    ): "taps repeat their residues after `apart`: the first that meets one is the same, or there is none",
    (
        "implicit_gemm.cu",
        "while (first < last && (shifted - first * dilation) % stride != 0) ++first;",
        "while (first <= last && (shifted - first * dilation) % stride != 0) ++first;",
    ): NO_TAP,
    (
        "implicit_gemm.cu",
        "sweep.taps[TAPS_INNERMOST ? 0 : 1], TAPS_INNERMOST ? channels : sweep.taps[0]),",
        "sweep.taps[TAPS_INNERMOST ? 0 : 1], TAPS_INNERMOST || true ? channels : sweep.taps[0]),",
    ): "the last extent of a Counter is not looked at",
    (
        "implicit_gemm.cu",
        "sweep.taps[TAPS_INNERMOST ? 0 : 1], TAPS_INNERMOST ? channels : sweep.taps[0]),",
        "sweep.taps[TAPS_INNERMOST ? 0 : 1], TAPS_INNERMOST && false ? channels : sweep.taps[0]),",
    ): "the last extent of a Counter is not looked at",
    (
        "implicit_gemm.cu",
        "sweep.taps[TAPS_INNERMOST ? 0 : 1], TAPS_INNERMOST ? channels : sweep.taps[0]),",
        "sweep.taps[TAPS_INNERMOST ? 0 : 1], TAPS_INNERMOST ? channels : sweep.taps[1]),",
    ): "the last extent of a Counter is not looked at",
    (
        "implicit_gemm.cu",
        "if (row0 >= all_rows) return;",
        "if (row0 > all_rows) return;",
    ): "a tile of no rows stores nothing",
    (
        "implicit_gemm.cu",
        "if (row0 >= all_rows) return;",
        "// the same in all threads: this residue has fewer rows than others",
    ): "a tile of no rows stores nothing",
    (
        "implicit_gemm.cu",
        "const int rows = all_rows - row0 < TILE_ROWS ? int(all_rows - row0) : TILE_ROWS;",
        "const int rows = all_rows - row0 <= TILE_ROWS ? int(all_rows - row0) : TILE_ROWS;",
    ): EQUAL,
    (
        "implicit_gemm.cu",
        "const int columns_here = columns - column0 < TILE_COLUMNS ? int(columns - column0) : TILE_COLUMNS;",
        "const int columns_here = columns - column0 <= TILE_COLUMNS ? int(columns - column0) : TILE_COLUMNS;",
    ): EQUAL,
    (
        "implicit_gemm.cu",
        "const Sum* const bias_here = options.has_bias ? bias + (g * columns + column0) : nullptr;",
        "const Sum* const bias_here = options.has_bias || true ? bias + (g * columns + column0) : nullptr;",
    ): "an address that nobody reads where there is no bias",
    (
        "implicit_gemm.cu",
        "if constexpr (DIRECTION == DATA_GRAD && AXES > 0)",
        "if constexpr (DIRECTION == DATA_GRAD || AXES > 0)",
    ): "whether infinite weights meet the zeros of the padding is left open in the forward direction",
    (
        "implicit_gemm.cu",
        "if (__syncthreads_or(!numbers) && __syncthreads_or(!weights_are_finite(tables, columns_here)))",
        "if (__syncthreads_or(!numbers) || __syncthreads_or(!weights_are_finite(tables, columns_here)))",
    ): MENDED_AGAIN,
    (
        "implicit_gemm.cu",
        "for (int r = threadIdx.x; r < TILE_ROWS; r += THREADS) {",
        "for (int r = threadIdx.x; r < TILE_ROWS; r = THREADS) {",
    ): ONE_ROUND,
    (
        "implicit_gemm.cu",
        "for (int c = threadIdx.x; c < TILE_COLUMNS; c += THREADS)",
        "for (int c = threadIdx.x; c < TILE_COLUMNS; c = THREADS)",
    ): ONE_ROUND,
    (
        "implicit_gemm.cu",
        "tables.column[place_of_column(c)].offset = c < columns_here ? first.offset(w_at) + (column0 + c) * w_column : 0;",
        "tables.column[place_of_column(c)].offset = c <= columns_here ? first.offset(w_at) + (column0 + c) * w_column : 0;",
    ): BEYOND_TILE,
    (
        "implicit_gemm.cu",
        "tables.column[place_of_column(c)].offset = c < columns_here ? first.offset(w_at) + (column0 + c) * w_column : 0;",
        "tables.column[place_of_column(c)].offset = c < columns_here || true ? first.offset(w_at) + (column0 + c) * w_column : 0;",
    ): BEYOND_TILE,
    (
        "implicit_gemm.cu",
        "const int rows = all_rows - row0 < TILE_ROWS ? int(all_rows - row0) : TILE_ROWS;",
        "const int rows = all_rows - row0 < TILE_ROWS || true ? int(all_rows - row0) : TILE_ROWS;",
        2,
    ): BEYOND_TILE,
    (
        "implicit_gemm.cu",
        "const int columns = conv.F - column0 < TILE_COLUMNS ? int(conv.F - column0) : TILE_COLUMNS;",
        "const int columns = conv.F - column0 <= TILE_COLUMNS ? int(conv.F - column0) : TILE_COLUMNS;",
    ): EQUAL,
    (
        "implicit_gemm.cu",
        "const int columns = conv.F - column0 < TILE_COLUMNS ? int(conv.F - column0) : TILE_COLUMNS;",
        "const int columns = conv.F - column0 < TILE_COLUMNS || true ? int(conv.F - column0) : TILE_COLUMNS;",
    ): BEYOND_TILE,
    (
        "implicit_gemm.cu",
        "if (is_number(Converted<Sum>::from(to))) continue;",
        "",
    ): MENDED_AGAIN,
    (
        "implicit_gemm.cu",
        "remaining(outputs - threadIdx.x) {",
        "remaining(outputs) {",
    ): BEYOND_TILE,
    (
        "implicit_gemm.cu",
        "remaining(outputs - threadIdx.x) {",
        "remaining(outputs + threadIdx.x) {",
    ): BEYOND_TILE,
    (
        "implicit_gemm.cu",
        "Spot<AXES> left_spot = {};",
        "Spot<AXES> left_spot;",
        2,
    ): BEYOND_TILE,
    (
        "implicit_gemm.cu",
        "if (remaining > 0) {",
        "if (remaining >= 0) {",
        2,
    ): BEYOND_TILE,
    (
        "implicit_gemm.cu",
        "remaining -= DEPTH;",
        "remaining += DEPTH;",
        2,
    ): BEYOND_TILE,
    (
        "implicit_gemm.cu",
        "remaining -= DEPTH;",
        ";",
        2,
    ): BEYOND_TILE,
    (
        "implicit_gemm.cu",
        "if (r < rows) {",
        "if (r <= rows) {",
        2,
    ): BEYOND_TILE,
    (
        "implicit_gemm.cu",
        "OutputSteps steps(conv, first, last - first, x_at, dy_at);",
        "OutputSteps steps(conv, first, last, x_at, dy_at);",
    ): BEYOND_TILE,
    (
        "implicit_gemm.cu",
        "OutputSteps steps(conv, first, last - first, x_at, dy_at);",
        "OutputSteps steps(conv, first, last + first, x_at, dy_at);",
    ): BEYOND_TILE,
    # ----------------------------------------------------------------------------------------- bias_grad.cu
    (
        "bias_grad.cu",
        "const Index last = first + length < images * chunks ? first + length : images * chunks;",
        "const Index last = first + length <= images * chunks ? first + length : images * chunks;",
    ): EQUAL,
}
