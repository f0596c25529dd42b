// Products of two tiles, (rows x depth) times (depth x columns), accumulated in registers, and the part of the epilogue
// that brings the sums into the order of the result.
//
// Each warp of a block owns a warp tile of WARP_ROWS x WARP_COLUMNS sums. To limit the error of long sums, the
// accumulator is flushed to a second-level accumulator `total` after every TERMS terms (never, if TERMS is 0). In the
// epilogue a warp writes its sums, a few rows or columns at a time, to a staging buffer in shared memory, and reads
// them in the memory order of the result.
//
// gpuconv/gpu/kernel.py puts these definitions in front of this file, in addition to those for tiles.cuh:
//   TILE_ROWS, TILE_COLUMNS               extents of a block's tile
//   WARP_ROWS, WARP_COLUMNS               extents of a warp's part of it
//   DEPTH                                 steps of the reduction in a tile
//   TERMS                                 terms of a sum between two flushes of the accumulator
//   LEFT_ALONG_DEPTH, RIGHT_ALONG_DEPTH   whether the lines of a tile run along the depth
//   RESULT_ALONG_ROWS                     whether rows, not columns, are contiguous in the result
//   TENSOR_PRODUCTS                       tensor-core products that make one product: 3 for tf32x3, otherwise 1;
//                                         0 without tensor cores

constexpr int WARP_TILES_ACROSS = TILE_COLUMNS / WARP_COLUMNS;
static_assert(TILE_ROWS / WARP_ROWS * WARP_TILES_ACROSS * 32 == THREADS, "warps share the tile evenly");

// Fragments are read element by element where ldmatrix cannot transpose, which are 32-bit elements of tiles along
// rows or columns, and always for float64. Such tiles need the other swizzle (TURN in tiles.cuh).
constexpr bool SINGLE = TENSOR_PRODUCTS > 0 && sizeof(Element) > 2;
constexpr int LEFT_TURN = SINGLE && (!LEFT_ALONG_DEPTH || sizeof(Element) == 8) ? 2 : 1;
constexpr int RIGHT_TURN = SINGLE && (!RIGHT_ALONG_DEPTH || sizeof(Element) == 8) ? 2 : 1;

constexpr int LEFT_LINES = LEFT_ALONG_DEPTH ? TILE_ROWS : DEPTH, LEFT_LENGTH = LEFT_ALONG_DEPTH ? DEPTH : TILE_ROWS;
constexpr int RIGHT_LINES = RIGHT_ALONG_DEPTH ? TILE_COLUMNS : DEPTH, RIGHT_LENGTH = RIGHT_ALONG_DEPTH ? DEPTH : TILE_COLUMNS;
using LeftTile = Tile<LEFT_LINES, LEFT_LENGTH, LEFT_TURN>;
using RightTile = Tile<RIGHT_LINES, RIGHT_LENGTH, RIGHT_TURN>;

// The first row and column of the warp tile in the block's tile.
DEVICE int warp_row() { return threadIdx.x / 32 / WARP_TILES_ACROSS * WARP_ROWS; }
DEVICE int warp_column() { return threadIdx.x / 32 % WARP_TILES_ACROSS * WARP_COLUMNS; }

// Flushes the accumulator: total += accumulator, and accumulator = 0.
template <class T, int ROWS, int COLUMNS, int COUNT>
DEVICE void flush(T (&total)[ROWS][COLUMNS][COUNT], T (&accumulator)[ROWS][COLUMNS][COUNT]) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
            for (int e = 0; e < COUNT; ++e) {
                add(total[i][j][e], accumulator[i][j][e]);
                accumulator[i][j][e] = T{};
            }
}

// ---------------------------------------------------------------------------------------------- one product at a time
//
// The lanes of a warp form a grid of 4 x 8. A lane loads 16 bytes at once: some steps of one of its rows if the tile
// runs along the depth, otherwise some of its rows of one step. So the rows of a lane are LANES apart in the first
// case, and come in chunks of neighbours in the second. The same holds for its columns.

// Returns the index in the warp tile of the i-th row (or column) of a lane.
template <bool ALONG_DEPTH, int LANES> DEVICE int index_of(int lane, int i) {
    return ALONG_DEPTH ? lane + i * LANES : (i / CHUNK * LANES + lane) * CHUNK + i % CHUNK;
}

// Loads operands to registers: part[k][i] = element (index_of(first + i), k0 + k).
template <bool ALONG_DEPTH, int LANES, class T, int STEPS, int COUNT, class Matrix>
DEVICE void read_part(T (&part)[STEPS][COUNT], const Matrix& tile, int origin, int lane, int first, int k0) {
    using Chunk = Numbers<T, CHUNK>;
    if constexpr (ALONG_DEPTH) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int line = origin + index_of<true, LANES>(lane, first + i);
            const Chunk chunk = *reinterpret_cast<const Chunk*>(&tile.at(line, k0));
#pragma unroll
            for (int k = 0; k < STEPS; ++k) part[k][i] = chunk.v[k];
        }
    } else {
#pragma unroll
        for (int k = 0; k < STEPS; ++k)
#pragma unroll
            for (int i = 0; i < COUNT; i += CHUNK) {
                const int at = origin + index_of<false, LANES>(lane, first + i);
                const Chunk chunk = *reinterpret_cast<const Chunk*>(&tile.at(k0 + k, at));
#pragma unroll
                for (int j = 0; j < CHUNK; ++j) part[k][i + j] = chunk.v[j];
            }
    }
}

// The product of two tiles without tensor cores, one multiply-add at a time. A lane owns ROWS x COLUMNS sums.
template <class T> struct PlainProducts {
    static constexpr int LANE_ROWS = 4, LANE_COLUMNS = 8, FOUR = 4;
    static constexpr int ROWS = WARP_ROWS / LANE_ROWS, COLUMNS = WARP_COLUMNS / LANE_COLUMNS;  // of a lane
    static constexpr int STEPS = LEFT_ALONG_DEPTH || RIGHT_ALONG_DEPTH ? CHUNK : 1;
    static constexpr int STAGED_ROWS = FOUR * LANE_ROWS, STAGED_COLUMNS = FOUR * LANE_COLUMNS;

    T accumulator[ROWS][COLUMNS][1], total[ROWS][COLUMNS][1];

    DEVICE static int lane_row() { return threadIdx.x % 32 / LANE_COLUMNS; }
    DEVICE static int lane_column() { return threadIdx.x % LANE_COLUMNS; }

    DEVICE void add(const LeftTile& left, const RightTile& right) {
#pragma unroll
        for (int k = 0; k < DEPTH; k += STEPS) {
            T b[STEPS][COLUMNS];
            read_part<RIGHT_ALONG_DEPTH, LANE_COLUMNS>(b, right, warp_column(), lane_column(), 0, k);
#pragma unroll
            for (int i = 0; i < ROWS; i += FOUR) {
                T a[STEPS][FOUR];
                read_part<LEFT_ALONG_DEPTH, LANE_ROWS>(a, left, warp_row(), lane_row(), i, k);
#pragma unroll
                for (int step = 0; step < STEPS; ++step)
#pragma unroll
                    for (int u = 0; u < FOUR; ++u)
#pragma unroll
                        for (int j = 0; j < COLUMNS; ++j) add_product(accumulator[i + u][j][0], a[step][u], b[step][j]);
            }
        }
    }
    DEVICE void flush() { ::flush(total, accumulator); }

    template <class Put> DEVICE void stage(int number, Put put) const {
#pragma unroll
        for (int i = 0; i < (RESULT_ALONG_ROWS ? ROWS : FOUR); ++i)
#pragma unroll
            for (int j = 0; j < (RESULT_ALONG_ROWS ? FOUR : COLUMNS); ++j) {
                const int u = RESULT_ALONG_ROWS ? i : FOUR * number + i, v = RESULT_ALONG_ROWS ? FOUR * number + j : j;
                put(index_of<LEFT_ALONG_DEPTH, LANE_ROWS>(lane_row(), u),
                    index_of<RIGHT_ALONG_DEPTH, LANE_COLUMNS>(lane_column(), v), total[u][v][0]);
            }
    }
};

// ---------------------------------------------------------------------------------------------- tensor cores
// primitives.cuh says which elements of a fragment a lane holds. g = lane / 4, t = lane % 4.

#if __CUDA_ARCH__ >= 800
DEVICE int lane() { return threadIdx.x % 32; }

// Loads the fragments of 16 rows (left) or of two times 8 columns (right), STEPS steps at a time, with ldmatrix. The
// swizzle of a line is that of the line 8 further on, so a lane computes only PLACES addresses, in the constructor.
//
// A load is four 8x8 matrices of 16-bit elements (8x4 of 32 bits), two along i (rows or columns) and two along k
// (steps). Their order is (i, k) = (0, 0) (1, 0) (0, 1) (1, 1) if LEFT, otherwise (0, 0) (0, 1) (1, 0) (1, 1).
template <bool ALONG_DEPTH, bool LEFT, int COUNT, int STEPS, class Matrix> struct MatrixReader {
    static constexpr int PLACES = ALONG_DEPTH ? DEPTH / STEPS : COUNT;
    int places[PLACES];

    DEVICE explicit MatrixReader(int origin) {
        const int low = lane() / 8 % 2, high = lane() / 16, in_line = lane() % 8;
        const int i = LEFT ? low : high, k = LEFT ? high : low;
#pragma unroll
        for (int p = 0; p < PLACES; ++p) {
            places[p] = ALONG_DEPTH ? Matrix::place(origin + 8 * i + in_line, STEPS * p + CHUNK * k)
                                    : Matrix::place(8 * k + in_line, origin + 16 * p + CHUNK * i);
            keep(places[p]);
        }
    }
    DEVICE void read(unsigned (&part)[4], const Matrix& tile, int number, int step) const {
        if constexpr (ALONG_DEPTH)
            load_matrices(part, tile.elements + (places[step] + 16 * number * Matrix::LENGTH));
        else
            load_matrices_transposed(part, tile.elements + (places[number] + STEPS * step * Matrix::LENGTH));
    }
};

// Loads fragments element by element, because ldmatrix does not transpose 32-bit elements. The warp tile begins at a
// multiple of 32 along the lines, or has only 16 elements along them. So the bits 8 and 16 of the index are 0 before
// the swizzle; since the swizzle is an XOR, adding 8 or 16 to the index is an XOR of the swizzled address.
template <bool LEFT, int COUNT, int STEPS, class Matrix> struct SingleReader {
    static_assert(COUNT == 1 || COUNT % 2 == 0, "warps begin at multiples of 32");
    int first;

    DEVICE explicit SingleReader(int origin) : first(Matrix::place(lane() % 4, origin + lane() / 4)) {}
    DEVICE void read(unsigned (&part)[4], const Matrix& tile, int number, int step) const {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int i = LEFT ? e % 2 : e / 2, k = LEFT ? e / 2 : e % 2;
            const int place = (first ^ (8 * i + 16 * (number % 2))) + 32 * (number / 2);
            part[e] = __float_as_uint(tile.elements[place + (STEPS * step + 4 * k) * Matrix::LENGTH]);
        }
    }
};

template <bool FIRST, class A, class B> struct Selected { using Type = A; };
template <class A, class B> struct Selected<false, A, B> { using Type = B; };

// The tensor-core instruction of an element type, its steps, the reader of its fragments, and its operands: what the
// instruction takes, converted from COUNT registers of a fragment.
template <class T> struct Fragments {  // half, bfloat16
    static constexpr int STEPS = 16;

    template <int COUNT> struct Operand {
        unsigned bits[COUNT];

        DEVICE void set(const unsigned (&from)[COUNT]) {
#pragma unroll
            for (int e = 0; e < COUNT; ++e) bits[e] = from[e];
        }
    };

    template <bool ALONG_DEPTH, bool LEFT, int COUNT, class Matrix>
    using Reader = MatrixReader<ALONG_DEPTH, LEFT, COUNT, STEPS, Matrix>;
    DEVICE static void multiply(float (&d)[4], const Operand<4>& a, const Operand<2>& b) {
        multiply_16x8x16(d, a.bits, b.bits, T{});
    }
};
// The reader of float: ldmatrix for tiles along the depth, otherwise element by element.
template <bool ALONG_DEPTH, bool LEFT, int COUNT, class Matrix> struct FloatReader
    : MatrixReader<ALONG_DEPTH, LEFT, COUNT, 8, Matrix> {
    using MatrixReader<ALONG_DEPTH, LEFT, COUNT, 8, Matrix>::MatrixReader;
};
template <bool LEFT, int COUNT, class Matrix> struct FloatReader<false, LEFT, COUNT, Matrix>
    : SingleReader<LEFT, COUNT, 8, Matrix> {
    using SingleReader<LEFT, COUNT, 8, Matrix>::SingleReader;
};
template <> struct Fragments<float> {  // rounded to TF32
    static constexpr int STEPS = 8;

    template <bool ALONG_DEPTH, bool LEFT, int COUNT, class Matrix> using Reader = FloatReader<ALONG_DEPTH, LEFT, COUNT, Matrix>;

    template <int COUNT> struct Rounded {
        unsigned bits[COUNT];

        DEVICE void set(const unsigned (&from)[COUNT]) {
#pragma unroll
            for (int e = 0; e < COUNT; ++e) bits[e] = to_tf32(__uint_as_float(from[e]));
        }
    };

    // Splits a float into the sum of two TF32 numbers, `large` and `small`, for tf32x3; the remainder is negligible.
    // `finite` is `large`, or 0 for NaN and Inf, because products of Inf with the small parts of others, most of which
    // are 0, would be NaN.
    template <int COUNT> struct Parts {
        unsigned large[COUNT], finite[COUNT], small[COUNT];

        DEVICE void set(const unsigned (&bits)[COUNT]) {
#pragma unroll
            for (int e = 0; e < COUNT; ++e) {
                const float v = __uint_as_float(bits[e]);
                const bool is_finite = fabsf(v) <= LARGEST;
                large[e] = v == v ? to_tf32(v) : NOT_A_NUMBER;  // the TF32 bits of a NaN may be those of Inf
                finite[e] = is_finite ? large[e] : 0;
                small[e] = to_tf32(is_finite ? v - __uint_as_float(large[e]) : 0);
            }
        }
    };
    static constexpr float LARGEST = 0x1.fffffep127f;
    static constexpr unsigned NOT_A_NUMBER = 0x7fffffff;

    template <int COUNT> using Operand = typename Selected<TENSOR_PRODUCTS == 3, Parts<COUNT>, Rounded<COUNT>>::Type;

    DEVICE static void multiply(float (&d)[4], const Rounded<4>& a, const Rounded<2>& b) {
        multiply_16x8x8_tf32(d, a.bits, b.bits);
    }
    DEVICE static void multiply(float (&d)[4], const Parts<4>& a, const Parts<2>& b) {
        multiply_16x8x8_tf32(d, a.small, b.finite);
        multiply_16x8x8_tf32(d, a.finite, b.small);
        multiply_16x8x8_tf32(d, a.large, b.large);
    }
};

// The product of two tiles on tensor cores, for all types except float64. A warp owns ROWS x COLUMNS fragments
// of 16x8 sums.
template <class T> struct TensorProducts {
    using Fragment = Fragments<T>;
    static constexpr int ROWS = WARP_ROWS / 16, COLUMNS = WARP_COLUMNS / 8;  // fragments of a warp
    static constexpr int STEPS = Fragment::STEPS;
    static constexpr int STAGED_ROWS = 16, STAGED_COLUMNS = 16;

    using LeftReader = typename Fragment::template Reader<LEFT_ALONG_DEPTH, true, ROWS, LeftTile>;
    using RightReader = typename Fragment::template Reader<RIGHT_ALONG_DEPTH, false, COLUMNS / 2, RightTile>;

    float accumulator[ROWS][COLUMNS][4], total[ROWS][COLUMNS][4];
    const LeftReader left_reader = LeftReader(warp_row());
    const RightReader right_reader = RightReader(warp_column());

    // The fragments of the next steps are loaded while the current ones are multiplied. The lanes may have diverged
    // in the tile loader; ldmatrix and mma need a converged warp.
    DEVICE void add(const LeftTile& left, const RightTile& right) {
        __syncwarp();
        unsigned a[2][ROWS][4], b[2][COLUMNS / 2][4];
        read(a[0], b[0], left, right, 0);
#pragma unroll
        for (int k = 0; k < DEPTH / STEPS; ++k) {
            if (k + 1 < DEPTH / STEPS) read(a[(k + 1) % 2], b[(k + 1) % 2], left, right, k + 1);
            typename Fragment::template Operand<4> of_rows[ROWS];  // each fragment is converted once
#pragma unroll
            for (int i = 0; i < ROWS; ++i) of_rows[i].set(a[k % 2][i]);
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) {
                const unsigned (&two)[4] = b[k % 2][j / 2];
                typename Fragment::template Operand<2> of_columns;
                of_columns.set({two[j % 2 * 2], two[j % 2 * 2 + 1]});
#pragma unroll
                for (int i = 0; i < ROWS; ++i) Fragment::multiply(accumulator[i][j], of_rows[i], of_columns);
            }
        }
    }
    DEVICE void read(unsigned (&a)[ROWS][4], unsigned (&b)[COLUMNS / 2][4], const LeftTile& left, const RightTile& right,
                     int step) const {
#pragma unroll
        for (int i = 0; i < ROWS; ++i) left_reader.read(a[i], left, i, step);
#pragma unroll
        for (int j = 0; j < COLUMNS / 2; ++j) right_reader.read(b[j], right, j, step);
    }
    DEVICE void flush() {
        if constexpr (TERMS > 0) ::flush(total, accumulator);
    }

    template <class Put> DEVICE void stage(int number, Put put) const {
        const float (&sums)[ROWS][COLUMNS][4] = TERMS > 0 ? total : accumulator;
#pragma unroll
        for (int i = 0; i < (RESULT_ALONG_ROWS ? ROWS : 1); ++i)
#pragma unroll
            for (int j = 0; j < (RESULT_ALONG_ROWS ? 2 : COLUMNS); ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int u = RESULT_ALONG_ROWS ? i : number, v = RESULT_ALONG_ROWS ? 2 * number + j : j;
                    put(16 * u + lane() / 4 + e / 2 * 8, 8 * v + lane() % 4 * 2 + e % 2, sums[u][v][e]);
                }
    }
};

// Loads element (8 number + lane / 4, k + lane % 4) of a warp tile, where k is a multiple of 4. Index bits that are 0
// in the first address may be set by an XOR of the swizzled address, as in SingleReader.
template <bool ALONG_DEPTH, class Matrix> struct DoubleReader {
    int first;

    DEVICE explicit DoubleReader(int origin)
        : first(ALONG_DEPTH ? Matrix::place(origin + lane() / 4, lane() % 4)
                            : Matrix::place(lane() % 4, origin + lane() / 4)) {}
    DEVICE double read(const Matrix& tile, int number, int k) const {
        const int place = ALONG_DEPTH ? (first ^ k) + 8 * number * Matrix::LENGTH
                                      : (first ^ 8 * (number % 2)) + 16 * (number / 2) + k * Matrix::LENGTH;
        return tile.elements[place];
    }
};

// The product of two tiles of float64 on tensor cores. A warp owns ROWS x COLUMNS fragments of 8x8 sums.
template <class T> struct DoubleProducts {
    static constexpr int ROWS = WARP_ROWS / 8, COLUMNS = WARP_COLUMNS / 8, STEPS = 4;
    static constexpr int STAGED_ROWS = 16, STAGED_COLUMNS = 16;

    T accumulator[ROWS][COLUMNS][2], total[ROWS][COLUMNS][2];
    const DoubleReader<LEFT_ALONG_DEPTH, LeftTile> left_reader = DoubleReader<LEFT_ALONG_DEPTH, LeftTile>(warp_row());
    const DoubleReader<RIGHT_ALONG_DEPTH, RightTile> right_reader =
        DoubleReader<RIGHT_ALONG_DEPTH, RightTile>(warp_column());

    DEVICE void add(const LeftTile& left, const RightTile& right) {
        __syncwarp();  // mma needs a converged warp, as above
#pragma unroll
        for (int k = 0; k < DEPTH; k += STEPS) {
            T a[ROWS], b[COLUMNS];
#pragma unroll
            for (int i = 0; i < ROWS; ++i) a[i] = left_reader.read(left, i, k);
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) b[j] = right_reader.read(right, j, k);
#pragma unroll
            for (int i = 0; i < ROWS; ++i)
#pragma unroll
                for (int j = 0; j < COLUMNS; ++j) multiply_8x8x4(accumulator[i][j], a[i], b[j]);
        }
    }
    DEVICE void flush() { ::flush(total, accumulator); }

    template <class Put> DEVICE void stage(int number, Put put) const {
#pragma unroll
        for (int i = 0; i < (RESULT_ALONG_ROWS ? ROWS : 2); ++i)
#pragma unroll
            for (int j = 0; j < (RESULT_ALONG_ROWS ? 2 : COLUMNS); ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int u = RESULT_ALONG_ROWS ? i : 2 * number + i, v = RESULT_ALONG_ROWS ? 2 * number + j : j;
                    put(8 * u + lane() / 4, 8 * v + lane() % 4 * 2 + e, total[u][v][e]);
                }
    }
};
#endif

// Products: the struct that the constants select.
template <bool ON_TENSOR_CORES, class T> struct Chosen {
    using Products = PlainProducts<T>;
};
#if __CUDA_ARCH__ >= 800
template <class T> struct Chosen<true, T> {
    using Products = TensorProducts<T>;
};
template <> struct Chosen<true, double> {
    using Products = DoubleProducts<double>;
};
#endif
using Products = Chosen<(TENSOR_PRODUCTS > 0), Element>::Products;

// ---------------------------------------------------------------------------------------------- epilogue
// The lines of the staging buffer of a warp are sums that are contiguous in the result. They are padded to STAGED_PITCH,
// so that the stores of a warp have no bank conflicts.

constexpr int STAGED_LINES = RESULT_ALONG_ROWS ? Products::STAGED_COLUMNS : Products::STAGED_ROWS;
constexpr int STAGED_LENGTH = RESULT_ALONG_ROWS ? WARP_ROWS : WARP_COLUMNS;
constexpr int STAGED_PARTS = RESULT_ALONG_ROWS ? WARP_COLUMNS / STAGED_LINES : WARP_ROWS / STAGED_LINES;
constexpr int STAGED_PITCH = STAGED_LENGTH + (RESULT_ALONG_ROWS ? 4 : 8);

// Calls store(row, column, sums) for every VECTOR sums of the warp that are contiguous in the result, with the row and
// column of the first, in the block's tile. One part of the sums after another passes through the staging buffer.
template <int VECTOR, class Store> DEVICE void store_sums(const Products& products, Sum* staged, Store store) {
    constexpr int UNITS = STAGED_LENGTH / VECTOR, ROUNDS = STAGED_LINES * UNITS / 32;
    static_assert(ROUNDS * 32 == STAGED_LINES * UNITS, "the lanes of a warp share the units evenly");
#pragma unroll
    for (int number = 0; number < STAGED_PARTS; ++number) {
        products.stage(number, [&](int row, int column, Sum sum) {
            const int line = (RESULT_ALONG_ROWS ? column : row) - number * STAGED_LINES;
            staged[line * STAGED_PITCH + (RESULT_ALONG_ROWS ? row : column)] = sum;
        });
        __syncwarp();  // the buffer is full
#pragma unroll ROUNDS < 8 ? ROUNDS : 4
        for (int round = 0; round < ROUNDS; ++round) {
            const int unit = threadIdx.x % 32 + 32 * round, line = unit / UNITS, first = unit % UNITS * VECTOR;
            const Numbers<Sum, VECTOR> sums =
                *reinterpret_cast<const Numbers<Sum, VECTOR>*>(&staged[line * STAGED_PITCH + first]);
            const int across = number * STAGED_LINES + line;
            store(warp_row() + (RESULT_ALONG_ROWS ? first : across), warp_column() + (RESULT_ALONG_ROWS ? across : first), sums);
        }
        __syncwarp();  // the buffer has been read
    }
}
