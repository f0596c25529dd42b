// Tiles of a matrix in shared memory: their swizzled layout, and the loader that fills them from an operand.
//
// A tile consists of lines. A line runs in the direction in which elements are contiguous in global memory, if there is
// one: along the depth (the reduction) of the product, or along its rows (or columns). A warp reads elements of
// neighbouring lines at once. To avoid bank conflicts the 16-byte chunks of each line are swizzled:
//
//     line 0    0 1 2 3 4 5 6 7        chunk c of line l is stored at c ^ l
//     line 1    1 0 3 2 5 4 7 6
//     line 2    2 3 0 1 6 7 4 5
//     ...
//
// gpuconv/gpu/kernel.py puts these definitions in front of this file, in addition to those for common.cuh:
//   Element   element type of both tiles
//   THREADS   threads of a block
//   TENSOR_PRODUCTS   see products.cuh

constexpr int CHUNK = 16 / sizeof(Element);  // elements in 16 bytes

// A tile of LINES lines of LENGTH elements each, with swizzled chunks. Where a line has fewer than eight chunks,
// several lines share 128 bytes, which are all banks, and these lines have the same swizzle. TURN is 2 where a warp
// reads single elements of four lines and two chunks at once, otherwise 1. place() returns the index in `elements` of
// element i of a line.
template <int LINES_, int LENGTH_, int TURN> struct __align__(16) Tile {
    static constexpr int LINES = LINES_, LENGTH = LENGTH_, CHUNKS = LENGTH / CHUNK, TURNS = CHUNKS < 8 ? CHUNKS : 8;
    static_assert(LENGTH % CHUNK == 0 && CHUNKS % TURNS == 0 && (TURNS & (TURNS - 1)) == 0, "a line is whole chunks");
    Element elements[LINES * LENGTH];

    DEVICE static int place(int line, int i) {
        const int chunk = i / CHUNK ^ line % 8 / (8 / TURNS) * TURN % TURNS;
        return (line * CHUNKS + chunk) * CHUNK + i % CHUNK;
    }
    DEVICE const Element& at(int line, int i) const { return elements[place(line, i)]; }
};

// The coordinate of a row, a column or a step in an operand, with a predicate. The element of the matrix at a row and
// a step has the sum of their offsets. in_bounds() returns whether it is in the image and not in the padding. set()
// sets the position and the predicate bits.
//
// With AXES from 1 to 3 a coordinate has a position on each of the last AXES axes, and the sum of the positions of
// row and step must be in the image.
template <int AXES> struct __align__(AXES == 1 ? 2 * sizeof(Index) : 16) Coordinate {
    static constexpr int ROOM = AXES == 2 ? 3 : AXES;  // two axes are padded to three, for 16-byte loads
    Index offset, at[ROOM];

    DEVICE bool in_bounds(const Coordinate& other, const Index (&extent)[3]) const {
        bool within = true;
#pragma unroll
        for (int axis = 0; axis < AXES; ++axis)
            within &= inside(at[axis] + other.at[axis], extent[3 - AXES + axis]);
        return within;
    }
    DEVICE void set(const Index (&position)[3], unsigned) {
#pragma unroll
        for (int axis = 0; axis < ROOM; ++axis) at[axis] = axis < AXES ? position[3 - AXES + axis] : 0;
    }
};
// For at most 32 taps: a row has one predicate bit for each tap, set if the tap is in the image, and a step has the
// bit of its tap. So the test is one AND. Where every tap of every window is in the image, one bit stands for all. A
// coordinate that does not exist has no bits.
constexpr int BY_TAP = 4;
template <> struct __align__(sizeof(Index) == 4 ? 8 : 16) Coordinate<BY_TAP> {
    Index offset;
    unsigned taps;

    DEVICE bool in_bounds(const Coordinate& other, const Index (&)[3]) const { return (taps & other.taps) != 0; }
    DEVICE void set(const Index (&)[3], unsigned bits) { taps = bits; }
};
// Returns the predicate bit of a tap.
DEVICE unsigned bit(Index tap) { return 1u << (tap & 31); }

// A table of coordinates in shared memory, of which the first `count` exist.
template <int AXES> struct Coordinates {
    const Coordinate<AXES>* table;
    int count;
};

// Below sm_80 there is no cp.async: these functions do nothing, and TileLoader loads through registers.
#if __CUDA_ARCH__ >= 800
constexpr bool COPIES_ASYNC = true;
#else
constexpr bool COPIES_ASYNC = false;
template <int BYTES> DEVICE void copy_async(void*, const void*, int) {}
DEVICE void copy_async_commit() {}
template <int PENDING> DEVICE void copy_async_wait() {}
#endif

// The tile loader. It fills a tile with elements of an operand of type T. A thread copies one unit of neighbouring
// elements of a line at a time: the same unit of every PACE-th line.
//
// Vectors of VECTOR elements, which are contiguous in global memory and aligned to their size, are copied
// asynchronously (cp.async) if they have at least 4 bytes. Single 16-bit elements, elements that are converted
// (VECTOR is 0), and all elements below sm_80 are loaded to registers: load() starts the loads, and store() writes
// them to shared memory after the products of the iteration.
//
// The lines of a tile are fixed during the main loop if LINES_FIXED: they are rows or columns, and the elements along
// them are steps. Otherwise the lines are steps. A thread keeps the coordinates that are fixed in registers, except
// those of lines whose elements are loaded one by one, which are too many, and without tensor cores, where sums take
// most registers.
template <class T, int VECTOR, int AXES, class Matrix, bool LINES_FIXED> struct TileLoader {
    static constexpr bool ASYNC = COPIES_ASYNC && VECTOR * sizeof(Element) >= 4;
    static constexpr int LINES = Matrix::LINES, UNIT = ASYNC ? VECTOR : sizeof(Element) < 4 ? 4 / sizeof(Element) : 1;
    static constexpr int UNITS = Matrix::LENGTH / UNIT, PACE = THREADS / UNITS, ROUNDS = (LINES + PACE - 1) / PACE;
    static constexpr int PLACES = ASYNC ? 1 : UNIT;  // coordinates of a unit: one for a vector
    static constexpr bool KEEPS_LINES = ASYNC && LINES_FIXED && TENSOR_PRODUCTS > 0;
    static constexpr int ORDERS = PACE < 8 && ROUNDS > 1 ? 8 / PACE : 1;  // different swizzles of this thread's lines
    static_assert(UNITS * UNIT == Matrix::LENGTH && PACE * UNITS == THREADS, "threads share the units of lines evenly");

    Coordinate<AXES> unit_at[PLACES], line_at[KEEPS_LINES ? ROUNDS : 1];
    bool exists[PLACES];
    int places[ORDERS];  // indices of this thread's unit in its first lines, one for each swizzle
    Element held[ASYNC ? 1 : ROUNDS][UNIT];

    DEVICE explicit TileLoader(const Coordinates<AXES>& fixed) {
#pragma unroll
        for (int order = 0; order < ORDERS; ++order) keep(places[order] = Matrix::place(line(order), unit()));
        if (!LINES_FIXED) read_unit(fixed);
        if (KEEPS_LINES)
#pragma unroll
            for (int round = 0; round < ROUNDS; ++round)
                if (is_line(round)) line_at[round] = fixed.table[line(round)];
    }
    DEVICE static int unit() { return threadIdx.x % UNITS * UNIT; }
    DEVICE static int line(int round) { return threadIdx.x / UNITS + round * PACE; }
    DEVICE static bool is_line(int round) { return LINES % PACE == 0 || line(round) < LINES; }
    DEVICE Element* address(Matrix& to, int round) const {
        return to.elements + (places[round % ORDERS] + round / ORDERS * ORDERS * PACE * Matrix::LENGTH);
    }

    // Returns the slot of the table that holds the coordinate of element i of a line. The order is such that a warp
    // reads consecutive slots.
    DEVICE static int slot(unsigned i) { return i % UNIT * UNITS + i / UNIT; }

    // Loads the coordinates of this thread's unit from those along the lines.
    DEVICE void read_unit(const Coordinates<AXES>& along) {
#pragma unroll
        for (int i = 0; i < PLACES; ++i) {
            exists[i] = unit() + i < along.count;
            unit_at[i] = along.table[slot(unit() + i)];
        }
    }

    // Returns whether element i of the unit exists in a line and is in bounds.
    DEVICE bool is_present(int i, const Coordinate<AXES>& there, bool line_exists, const Index (&extent)[3]) const {
        return (AXES == BY_TAP || (exists[i] & line_exists)) & unit_at[i].in_bounds(there, extent);
    }

    // Starts to load a tile. Elements of lines and units that do not exist, and those in the padding, become zeros.
    DEVICE void load(Matrix& to, const Operand<T>& from, const Coordinates<AXES>& fixed, const Coordinates<AXES>& steps,
                     const Index (&extent)[3]) {
        if (LINES_FIXED) read_unit(steps);
        const Coordinates<AXES>& lines = LINES_FIXED ? fixed : steps;
#pragma unroll
        for (int round = 0; round < ROUNDS; ++round) {
            if (!is_line(round)) continue;
            const Coordinate<AXES> there = KEEPS_LINES ? line_at[round] : lines.table[line(round)];
            const bool line_exists = line(round) < lines.count;
            if constexpr (ASYNC) {
                // If the predicate is false, cp.async reads no byte, so the address need not be valid.
                const bool present = is_present(0, there, line_exists, extent);
                copy_async<VECTOR * sizeof(Element)>(address(to, round), from.values + (unit_at[0].offset + there.offset),
                                                     present ? VECTOR * sizeof(Element) : 0);
            } else {
#pragma unroll
                for (int i = 0; i < UNIT; ++i) {
                    held[round][i] = Element{};
                    if (is_present(i, there, line_exists, extent))
                        held[round][i] = element(from, unit_at[i].offset + there.offset);
                }
            }
        }
    }

    // Stores the elements that load() loaded to registers; asynchronous copies need nothing.
    DEVICE void store(Matrix& to) const {
        if constexpr (!ASYNC) {
#pragma unroll
            for (int round = 0; round < ROUNDS; ++round) {
                if (!is_line(round)) continue;
                Numbers<Element, UNIT> numbers;
#pragma unroll
                for (int i = 0; i < UNIT; ++i) numbers.v[i] = held[round][i];
                *reinterpret_cast<Numbers<Element, UNIT>*>(address(to, round)) = numbers;
            }
        }
    }

    // Loads one element. VECTOR is 0 where it has to be converted, conjugated or multiplied by a derivative.
    DEVICE static Element element(const Operand<T>& from, Index at) {
        if constexpr (VECTOR > 0)
            return from.values[at];
        else
            return Converted<Element>::from(from[at]);
    }
};
