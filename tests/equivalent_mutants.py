# ruff: noqa: E501 - lines of the sources
"""Mutants that no test can catch, since they compute the same: {(file, line, mutated line): the reason}.

mutate_kernels.py runs them all the same, and complains about one that is caught. Those that compile to the same code
are found by the compiler and not listed.
"""

ALIGNMENT = "alignment decides only in how wide pieces the numbers are read, not which"
UNUSED_ROWS = "what is noted of rows beyond the last is never used; the bound keeps row * F from overflowing near 2**31"
ONE_ROUND = "the block has more threads than there are entries, so that each thread goes round once"

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
}
