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
PITCH = "the space between the lines of a staging buffer decides about bank conflicts only"
UNUSED = "FLUSHES_AFTER is used only where TERMS is more than 0"
FLUSHED = "a sum of at most TERMS products is added to the total: how many fewer, or in which iteration, is left open"
BEYOND_TILE = "rows, columns and steps beyond a whole tile are not looked at, whatever their number"
EQUAL = "where the two are equal, either is the smaller one"
BOTH_PARTS = "zero times infinity is no number in both of its parts"
RECOMPUTED = "sums that are formed again of the same products without need are the same"
MORE_ROWS = "a row further on is read, but no output and tap of the strip meet there"
LOADED = "more inputs are loaded than needed, but none beyond the image or the region"
WHOLE_VECTORS = "the length is a multiple of a vector of several elements, so none begins at its last element"

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
        "for (Index first = split * length; first < last; first += DEPTH) {",
        "for (Index first = split * length; first <= last; first += DEPTH) {",
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
        "for (int team = 0; team < TEAMS; ++team) {",
        "for (int team = 0; team <= TEAMS; ++team) {",
    ): "one more round, of a team that no thread is in",
    # ----------------------------------------------------------------------------------------- tiles.cuh
    (
        "tiles.cuh",
        "static constexpr bool KEEPS_LINES = ASYNC && LINES_FIXED && TENSOR_PRODUCTS > 0;",
        "static constexpr bool KEEPS_LINES = ASYNC && LINES_FIXED && TENSOR_PRODUCTS >= 0;",
    ): "the registers have the coordinates of the table",
    (
        "tiles.cuh",
        "if (!is_line(round)) continue;",
        "",
        2,
    ): "threads share the lines of single elements evenly in all tiles",
    (
        "tiles.cuh",
        "const Coordinate<AXES> there = KEEPS_LINES ? line_at[round] : lines.table[line(round)];",
        "const Coordinate<AXES> there = KEEPS_LINES && false ? line_at[round] : lines.table[line(round)];",
    ): "the registers have the coordinates of the table",
    (
        "tiles.cuh",
        "static constexpr int LINES = LINES_, LENGTH = LENGTH_, CHUNKS = LENGTH / CHUNK, TURNS = CHUNKS < 8 ? CHUNKS : 8;",
        "static constexpr int LINES = LINES_, LENGTH = LENGTH_, CHUNKS = LENGTH / CHUNK, TURNS = CHUNKS <= 8 ? CHUNKS : 8;",
    ): "where the two are equal, either is the smaller one",
    (
        "tiles.cuh",
        "static constexpr int LINES = LINES_, LENGTH = LENGTH_, CHUNKS = LENGTH / CHUNK, TURNS = CHUNKS < 8 ? CHUNKS : 8;",
        "static constexpr int LINES = LINES_, LENGTH = LENGTH_, CHUNKS = LENGTH / CHUNK, TURNS = CHUNKS < 8 - 1 ? CHUNKS : 8;",
    ): "the number of chunks is a power of two",
    (
        "tiles.cuh",
        "static constexpr int ROOM = AXES == 2 ? 3 : AXES;",
        "static constexpr int ROOM = AXES == 2 || true ? 3 : AXES;",
    ): "space that is not used",
    (
        "tiles.cuh",
        "static constexpr int LINES = Matrix::LINES, UNIT = ASYNC ? VECTOR : sizeof(Element) < 4 ? 4 / sizeof(Element) : 1;",
        "static constexpr int LINES = Matrix::LINES, UNIT = ASYNC ? VECTOR : sizeof(Element) <= 4 ? 4 / sizeof(Element) : 1;",
    ): "4 bytes are one element of 4 bytes",
    (
        "tiles.cuh",
        "static constexpr int LINES = Matrix::LINES, UNIT = ASYNC ? VECTOR : sizeof(Element) < 4 ? 4 / sizeof(Element) : 1;",
        "static constexpr int LINES = Matrix::LINES, UNIT = ASYNC ? VECTOR : sizeof(Element) < 4 - 1 ? 4 / sizeof(Element) : 1;",
    ): "no element has 3 bytes",
    (
        "tiles.cuh",
        "static constexpr int ORDERS = PACE < 8 && ROUNDS > 1 ? 8 / PACE : 1;",
        "static constexpr int ORDERS = PACE <= 8 && ROUNDS > 1 ? 8 / PACE : 1;",
    ): "a pace of 8 gives one swizzle either way",
    (
        "tiles.cuh",
        "static constexpr int ORDERS = PACE < 8 && ROUNDS > 1 ? 8 / PACE : 1;",
        "static constexpr int ORDERS = PACE < 8 - 1 && ROUNDS > 1 ? 8 / PACE : 1;",
    ): "the pace is a power of two",
    (
        "tiles.cuh",
        "static constexpr int ORDERS = PACE < 8 && ROUNDS > 1 ? 8 / PACE : 1;",
        "static constexpr int ORDERS = PACE < 8 && ROUNDS >= 1 ? 8 / PACE : 1;",
    ): "a thread with one line has one swizzle, however many it computes",
    (
        "tiles.cuh",
        "Coordinate<AXES> unit_at[PLACES], line_at[KEEPS_LINES ? ROUNDS : 1];",
        "Coordinate<AXES> unit_at[PLACES], line_at[KEEPS_LINES || true ? ROUNDS : 1];",
    ): "registers that are not used take no room",
    (
        "tiles.cuh",
        "if (!LINES_FIXED) read_unit(fixed);",
        "read_unit(fixed);",
    ): "a loader that reads the unit of each tile does so again before the first",
    (
        "tiles.cuh",
        "template <int AXES> struct __align__(AXES == 1 ? 2 * sizeof(Index) : 16) Coordinate {",
        "template <int AXES> struct __align__(AXES == 1 || true ? 2 * sizeof(Index) : 16) Coordinate {",
    ): ALIGNMENT,
    (
        "tiles.cuh",
        "template <int AXES> struct __align__(AXES == 1 ? 2 * sizeof(Index) : 16) Coordinate {",
        "template <int AXES> struct __align__(AXES == 1 && false ? 2 * sizeof(Index) : 16) Coordinate {",
    ): ALIGNMENT,
    (
        "tiles.cuh",
        "template <int AXES> struct __align__(AXES == 1 ? 2 * sizeof(Index) : 16) Coordinate {",
        "template <int AXES> struct __align__(AXES != 1 ? 2 * sizeof(Index) : 16) Coordinate {",
    ): ALIGNMENT,
    (
        "tiles.cuh",
        "template <> struct __align__(sizeof(Index) == 4 ? 8 : 16) Coordinate<BY_TAP> {",
        "template <> struct __align__(sizeof(Index) == 4 || true ? 8 : 16) Coordinate<BY_TAP> {",
    ): ALIGNMENT,
    (
        "tiles.cuh",
        "template <> struct __align__(sizeof(Index) == 4 ? 8 : 16) Coordinate<BY_TAP> {",
        "template <> struct __align__(sizeof(Index) == 4 && false ? 8 : 16) Coordinate<BY_TAP> {",
    ): ALIGNMENT,
    (
        "tiles.cuh",
        "template <> struct __align__(sizeof(Index) == 4 ? 8 : 16) Coordinate<BY_TAP> {",
        "template <> struct __align__(sizeof(Index) != 4 ? 8 : 16) Coordinate<BY_TAP> {",
    ): ALIGNMENT,
    (
        "tiles.cuh",
        "static constexpr int LINES = Matrix::LINES, UNIT = ASYNC ? VECTOR : sizeof(Element) < 4 ? 4 / sizeof(Element) : 1;",
        "static constexpr int LINES = Matrix::LINES, UNIT = ASYNC ? VECTOR : sizeof(Element) < 4 && false ? 4 / sizeof(Element) : 1;",
    ): "numbers of 16 bits may be stored one by one too: slower, and the same",
    (
        "tiles.cuh",
        "static constexpr int PLACES = ASYNC ? 1 : UNIT;",
        "static constexpr int PLACES = ASYNC && false ? 1 : UNIT;",
    ): "of a vector only the first coordinate is used, however many are kept",
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
        "static constexpr bool ASYNC = COPIES_ASYNC && VECTOR * sizeof(Element) >= 4;",
        "static constexpr bool ASYNC = COPIES_ASYNC && VECTOR * sizeof(Element) > 4;",
    ): "single numbers of 4 bytes may come by way of registers too: slower, and the same",
    (
        "tiles.cuh",
        "Element held[ASYNC ? 1 : ROUNDS][UNIT];",
        "Element held[ASYNC && false ? 1 : ROUNDS][UNIT];",
    ): "room that nobody uses",
    # ----------------------------------------------------------------------------------------- products.cuh
    (
        "products.cuh",
        "for (int i = 0; i < ROWS; i += FOUR) {",
        "for (int i = 0; i < ROWS - 1; i += FOUR) {",
    ): "a lane has a multiple of four rows",
    (
        "products.cuh",
        "T accumulator[ROWS][COLUMNS][2], total[ROWS][COLUMNS][2];",
        "T accumulator[COLUMNS][ROWS][2], total[ROWS][COLUMNS][2];",
    ): "all warp tiles of float64 are square",
    (
        "products.cuh",
        "T accumulator[ROWS][COLUMNS][2], total[ROWS][COLUMNS][2];",
        "T accumulator[ROWS][COLUMNS][2], total[COLUMNS][ROWS][2];",
    ): "all warp tiles of float64 are square",
    (
        "products.cuh",
        "constexpr int STAGED_PITCH = STAGED_LENGTH + (RESULT_ALONG_ROWS ? 4 : 8);",
        "constexpr int STAGED_PITCH = STAGED_LENGTH + (RESULT_ALONG_ROWS || true ? 4 : 8);",
    ): PITCH,
    (
        "products.cuh",
        "constexpr int STAGED_PITCH = STAGED_LENGTH + (RESULT_ALONG_ROWS ? 4 : 8);",
        "constexpr int STAGED_PITCH = STAGED_LENGTH + (RESULT_ALONG_ROWS && false ? 4 : 8);",
    ): PITCH,
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
    # ----------------------------------------------------------------------------------------- implicit_gemm.cu
    (
        "implicit_gemm.cu",
        "WeightPlace at = {};",
        "WeightPlace at;",
    ): "the filter and the group of a row are not used",
    (
        "implicit_gemm.cu",
        "if (r < extents.rows) {",
        "if (r <= extents.rows) {",
        2,
    ): BEYOND_TILE,
    (
        "implicit_gemm.cu",
        "constexpr int LEFT_TEST = AXES == 0 ? BY_TAP : AXES, RIGHT_TEST = BY_TAP;",
        "constexpr int LEFT_TEST = AXES == 0 && false ? BY_TAP : AXES, RIGHT_TEST = BY_TAP;",
    ): "without axes the test is whether row and step exist, which a bit says otherwise",
    (
        "implicit_gemm.cu",
        "for (int c = 0; c < extents.columns; ++c)",
        "for (int c = 0; c <= extents.columns; ++c)",
    ): RECOMPUTED,
    (
        "implicit_gemm.cu",
        "for (int e = threadIdx.x; e < TILE_ROWS * TILE_COLUMNS; e += THREADS) {",
        "for (int e = threadIdx.x; e <= TILE_ROWS * TILE_COLUMNS; e += THREADS) {",
    ): "the row beyond the tile does not exist",
    (
        "implicit_gemm.cu",
        "DEVICE int at_most(Index count, int most) { return count < most ? int(count) : most; }",
        "DEVICE int at_most(Index count, int most) { return count < most || true ? int(count) : most; }",
    ): BEYOND_TILE,
    (
        "implicit_gemm.cu",
        "for (int c = threadIdx.x; c < TILE_COLUMNS; c += THREADS) {",
        "for (int c = threadIdx.x; c < TILE_COLUMNS; c = THREADS) {",
    ): ONE_ROUND,
    (
        "implicit_gemm.cu",
        "const Index rest = depth > first_step ? depth - first_step : 0;",
        "const Index rest = depth >= first_step ? depth - first_step : 0;",
    ): "the difference of equal numbers is 0",
    (
        "implicit_gemm.cu",
        "const Index rest = depth > first_step ? depth - first_step : 0;",
        "const Index rest = depth > first_step || true ? depth - first_step : 0;",
    ): "a reduction of negative length has no iteration that loads or multiplies",
    (
        "implicit_gemm.cu",
        "rest < windows.split_length ? rest : windows.split_length};",
        "rest <= windows.split_length ? rest : windows.split_length};",
    ): EQUAL,
    (
        "implicit_gemm.cu",
        "for (int i = 0; i < 4; ++i) keep(leap[i]);",
        "for (int i = 0; i <= 4; ++i) keep(leap[i]);",
    ): "keep() changes no value",
    (
        "implicit_gemm.cu",
        "for (int i = 0; i < 4; ++i) keep(leap[i]);",
        "for (int i = 0; i < 4 - 1; ++i) keep(leap[i]);",
    ): "keep() changes no value",
    (
        "implicit_gemm.cu",
        "if constexpr (DIRECTION == DATA_GRAD && AXES > 0)",
        "if constexpr (DIRECTION == DATA_GRAD && AXES >= 0)",
    ): RECOMPUTED,
    (
        "implicit_gemm.cu",
        "constexpr int FLUSHES_AFTER = TERMS > 0 ? TERMS / DEPTH : 1;",
        "constexpr int FLUSHES_AFTER = TERMS > 0 && false ? TERMS / DEPTH : 1;",
    ): FLUSHED,
    (
        "implicit_gemm.cu",
        "constexpr int FLUSHES_AFTER = TERMS > 0 ? TERMS / DEPTH : 1;",
        "constexpr int FLUSHES_AFTER = TERMS >= 0 ? TERMS / DEPTH : 1;",
    ): UNUSED,
    (
        "implicit_gemm.cu",
        "constexpr int FLUSHES_AFTER = TERMS > 0 ? TERMS / DEPTH : 1;",
        "constexpr int FLUSHES_AFTER = TERMS > 0 || true ? TERMS / DEPTH : 1;",
    ): UNUSED,
    (
        "implicit_gemm.cu",
        "if (TERMS > 0 && (i + 1) % FLUSHES_AFTER == 0) products.flush();",
        "if (TERMS >= 0 && (i + 1) % FLUSHES_AFTER == 0) products.flush();",
    ): FLUSHED,
    (
        "implicit_gemm.cu",
        "if (TERMS > 0 && (i + 1) % FLUSHES_AFTER == 0) products.flush();",
        "products.flush();",
    ): FLUSHED,
    (
        "implicit_gemm.cu",
        "if (TERMS > 0 && (i + 1) % FLUSHES_AFTER == 0) products.flush();",
        "if (TERMS > 0 || (i + 1) % FLUSHES_AFTER == 0) products.flush();",
    ): FLUSHED,
    (
        "implicit_gemm.cu",
        "if (TERMS > 0 && (i + 1) % FLUSHES_AFTER == 0) products.flush();",
        "if (TERMS > 0 && (i + 1) % FLUSHES_AFTER != 0) products.flush();",
    ): FLUSHED,
    (
        "implicit_gemm.cu",
        "if (TERMS > 0 && (i + 1) % FLUSHES_AFTER == 0) products.flush();",
        "if (TERMS > 0 && (i) % FLUSHES_AFTER == 0) products.flush();",
    ): FLUSHED,
    (
        "implicit_gemm.cu",
        "if (TERMS > 0 && (i + 1) % FLUSHES_AFTER == 0) products.flush();",
        "if (TERMS > 0 && (i - 1) % FLUSHES_AFTER == 0) products.flush();",
    ): FLUSHED,
    (
        "implicit_gemm.cu",
        "Sum staged[THREADS / 32][STAGED_LINES * STAGED_PITCH];",
        "Sum staged[THREADS % 32][STAGED_LINES * STAGED_PITCH];",
    ): "the host determines how long shared memory is; the buffers begin where they did",
    (
        "implicit_gemm.cu",
        "DEVICE int at_most(Index count, int most) { return count < most ? int(count) : most; }",
        "DEVICE int at_most(Index count, int most) { return count <= most ? int(count) : most; }",
    ): EQUAL,
    (
        "implicit_gemm.cu",
        "const Sum* const bias_here = HAS_BIAS ? bias + (g * windows.columns + column0) : nullptr;",
        "const Sum* const bias_here = HAS_BIAS || true ? bias + (g * windows.columns + column0) : nullptr;",
    ): "an address that nobody reads where there is no bias",
    (
        "implicit_gemm.cu",
        "if (__syncthreads_or(!numbers) && __syncthreads_or(!weights_are_finite(tables)))",
        "if (__syncthreads_or(!numbers) || __syncthreads_or(!weights_are_finite(tables)))",
    ): RECOMPUTED,
    (
        "implicit_gemm.cu",
        "if (row0 >= rows) return;",
        "if (row0 > rows) return;",
    ): "a tile of no rows stores nothing",
    (
        "implicit_gemm.cu",
        "if (row0 >= rows) return;",
        "// the same in all threads: this phase has fewer rows than others",
    ): "a tile of no rows stores nothing",
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
    ): RECOMPUTED,
    (
        "implicit_gemm.cu",
        "if constexpr (DIRECTION == DATA_GRAD && AXES > 0)",
        "if constexpr (DIRECTION == DATA_GRAD || AXES > 0)",
    ): "whether infinite weights meet the zeros of the padding is left open in the forward direction",
    (
        "implicit_gemm.cu",
        "for (int r = threadIdx.x; r < TILE_ROWS; r += THREADS) {",
        "for (int r = threadIdx.x; r < TILE_ROWS; r = THREADS) {",
    ): ONE_ROUND,
    (
        "implicit_gemm.cu",
        "if (is_number(Converted<Sum>::from(to))) continue;",
        "",
    ): RECOMPUTED,
    # ----------------------------------------------------------------------------------------- bias_grad.cu
    (
        "bias_grad.cu",
        "const Index last = first + length < images * chunks ? first + length : images * chunks;",
        "const Index last = first + length <= images * chunks ? first + length : images * chunks;",
    ): EQUAL,
    # ---------------------------------------------------------------------------------------------- split_sum.cu
    (
        "split_sum.cu",
        "if constexpr (ROWS > 1) {",
        "if constexpr (ROWS >= 1) {",
    ): "with one row its sum is stored in shared memory, too, and not read",
    # ---------------------------------------------------------------------------------------------- depthwise.cu
    (
        "depthwise.cu",
        "DEVICE Index smaller(Index a, Index b) { return a < b ? a : b; }",
        "DEVICE Index smaller(Index a, Index b) { return a <= b ? a : b; }",
    ): EQUAL,
    (
        "depthwise.cu",
        "part.first.at[axis] = first < 0 ? 0 : first;",
        "part.first.at[axis] = first <= 0 ? 0 : first;",
    ): "where it is 0, either is 0",
    (
        "depthwise.cu",
        "part.count.at[axis] = count < 0 ? 0 : int(count);",
        "part.count.at[axis] = count <= 0 ? 0 : int(count);",
    ): "where it is 0, either is 0",
    (
        "depthwise.cu",
        "for (int i = threadIdx.x * VECTOR; i < length; i += THREADS * VECTOR)",
        "for (int i = threadIdx.x * VECTOR; i < length - 1; i += THREADS * VECTOR)",
    ): WHOLE_VECTORS,
    (
        "depthwise.cu",
        "for (int i = threadIdx.x * WIDTH; i < length; i += THREADS * WIDTH)",
        "for (int i = threadIdx.x * WIDTH; i < length - 1; i += THREADS * WIDTH)",
    ): WHOLE_VECTORS,
    (
        "depthwise.cu",
        "if (o.at[1] + STRIP <= outputs.count.at[1]) {",
        "if (o.at[1] + STRIP < outputs.count.at[1]) {",
    ): "output by output, a strip has the same products in the same order",
    (
        "depthwise.cu",
        "const Index last = first + (outputs.count.at[axis] - 1) * conv.stride[axis]",
        "const Index last = first + (outputs.count.at[axis]) * conv.stride[axis]",
    ): LOADED,
    (
        "depthwise.cu",
        "const Index last = first + (outputs.count.at[axis] - 1) * conv.stride[axis]",
        "const Index last = first + (outputs.count.at[axis] + 1) * conv.stride[axis]",
    ): LOADED,
    (
        "depthwise.cu",
        "+ (conv.kernel[axis] - 1) * conv.dilation[axis];",
        "+ (conv.kernel[axis]) * conv.dilation[axis];",
    ): LOADED,
    (
        "depthwise.cu",
        "+ (conv.kernel[axis] - 1) * conv.dilation[axis];",
        "+ (conv.kernel[axis] + 1) * conv.dilation[axis];",
    ): LOADED,
    (
        "common.cuh",
        "template <class T, int COUNT> struct __align__(COUNT * sizeof(T) % 16 == 0 ? 16 : COUNT * sizeof(T)) Numbers {",
        "template <class T, int COUNT> struct __align__(COUNT * sizeof(T) % 16 == 0 && false ? 16 : COUNT * sizeof(T)) Numbers {",
    ): ALIGNMENT,
    (
        "depthwise.cu",
        "for (int j = 0; j < STRIP + TAPS - 1; ++j) {",
        "for (int j = 0; j <= STRIP + TAPS - 1; ++j) {",
    ): MORE_ROWS,
    (
        "depthwise.cu",
        "for (int j = 0; j < STRIP + TAPS - 1; ++j) {",
        "for (int j = 0; j < STRIP + TAPS; ++j) {",
    ): MORE_ROWS,
    (
        "depthwise.cu",
        "for (int j = 0; j < STRIP + TAPS - 1; ++j) {",
        "for (int j = 0; j < STRIP + TAPS + 1; ++j) {",
    ): MORE_ROWS,
    (
        "depthwise.cu",
        "for (int j = 0; j < COUNT + TAPS - 1; ++j) {",
        "for (int j = 0; j <= COUNT + TAPS - 1; ++j) {",
    ): MORE_ROWS,
    (
        "depthwise.cu",
        "for (int j = 0; j < COUNT + TAPS - 1; ++j) {",
        "for (int j = 0; j < COUNT + TAPS; ++j) {",
    ): MORE_ROWS,
    (
        "depthwise.cu",
        "for (int j = 0; j < COUNT + TAPS - 1; ++j) {",
        "for (int j = 0; j < COUNT + TAPS + 1; ++j) {",
    ): MORE_ROWS,
    (
        "depthwise.cu",
        "if (!x.read(values, TAPS > 1 ? j : j * step)) continue;",
        "if (!x.read(values, TAPS > 1 && false ? j : j * step)) continue;",
    ): "the step is 1 where there are several taps",
    (
        "depthwise.cu",
        "const int channels = int(conv.C), source = CHANNELS > 1 ? o.channel : o.channel / int(conv.F) * channels;",
        "const int channels = int(conv.C), source = CHANNELS > 1 && false ? o.channel : o.channel / int(conv.F) * channels;",
    ): "where threads compute several channels, each group has one channel and one filter",
    (
        "depthwise.cu",
        "Place start = {};",
        "Place start;",
    ): "of a start only the position is used, which is set",
    (
        "depthwise.cu",
        "const bool is_owner = owner < owners && share < shares && owned.column < all_columns",
        "const bool is_owner = owner <= owners && share < shares && owned.column < all_columns",
    ): "a further owner has a column of another block; with several columns of blocks there is one share, behind which none is read",
    (
        "depthwise.cu",
        "const bool is_owner = owner < owners && share < shares && owned.column < all_columns",
        "const bool is_owner = owner < owners && share < shares && owned.column <= all_columns",
    ): "the sums of a column beyond the last one are not read",
}
