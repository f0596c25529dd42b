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

constexpr int CHUNK = 16 / sizeof(Element);  // elements in 16 bytes

// The unsigned type of the size of Index. A negative position becomes larger than every extent in it, so that one
// comparison tests both bounds.
template <int BYTES> struct UnsignedOf { using Type = unsigned; };
template <> struct UnsignedOf<8> { using Type = unsigned long long; };
using Unsigned = UnsignedOf<sizeof(Index)>::Type;

// A tile of LINES lines of LENGTH elements each, with swizzled chunks. Where a line has fewer than eight chunks,
// several lines share 128 bytes, which are all banks, and these lines have the same swizzle. TURN is 2 where a warp
// reads single elements of four lines and two chunks at once, otherwise 1. place() returns the index in `elements` of
// element i of a line.
template <int LINES, int LENGTH_, int TURN> struct __align__(16) Tile {
    static constexpr int LENGTH = LENGTH_, CHUNKS = LENGTH / CHUNK, TURNS = CHUNKS < 8 ? CHUNKS : 8;
    static_assert(LENGTH % CHUNK == 0 && CHUNKS % TURNS == 0 && (TURNS & (TURNS - 1)) == 0, "a line is whole chunks");
    Element elements[LINES * LENGTH];

    DEVICE static int place(int line, int i) {
        const int chunk = i / CHUNK ^ line % 8 / (8 / TURNS) * TURN % TURNS;
        return (line * CHUNKS + chunk) * CHUNK + i % CHUNK;
    }
    DEVICE const Element& at(int line, int i) const { return elements[place(line, i)]; }
};

// COUNT elements, aligned for vectorised loads and stores.
template <class T, int COUNT> struct __align__(COUNT * sizeof(T) % 16 == 0 ? 16 : COUNT * sizeof(T)) Numbers {
    T v[COUNT];
};

// Spot: the coordinate of a row, a column or a step in an operand, with a predicate. The element of the matrix at a
// row and a step has the sum of their offsets. If the operand is read through windows, meets() returns whether that
// element is in bounds, that is in the image and not in the padding. stand() sets the coordinate's position.
//
// With AXES from 1 to 3 a coordinate has a position on each of the last AXES axes, and the sum of the positions of
// row and step must be in the image.
template <int AXES> struct __align__(AXES == 1 ? 2 * sizeof(Index) : 16) Spot {
    static constexpr int ROOM = AXES == 2 ? 3 : AXES;  // two axes are padded to three, for 16-byte loads
    Index offset, at[ROOM];

    DEVICE bool meets(const Spot& other, const Index (&extent)[3]) const {
        bool within = true;
#pragma unroll
        for (int axis = 0; axis < AXES; ++axis)
            within &= Unsigned(at[axis] + other.at[axis]) < Unsigned(extent[3 - AXES + axis]);
        return within;
    }
    DEVICE void stand(const Index (&position)[3], unsigned) {
#pragma unroll
        for (int axis = 0; axis < ROOM; ++axis) at[axis] = axis < AXES ? position[3 - AXES + axis] : 0;
    }
};
// Without axes every element is in bounds.
template <> struct Spot<0> {
    Index offset;

    DEVICE bool meets(const Spot&, const Index (&)[3]) const { return true; }
    DEVICE void stand(const Index (&)[3], unsigned) {}
};
// For at most 32 taps: a row has one predicate bit for each tap, set if the tap is in the image, and a step has the
// bit of its tap. So the test is one AND.
constexpr int BY_TAP = 4;
template <> struct __align__(sizeof(Index) == 4 ? 8 : 16) Spot<BY_TAP> {
    Index offset;
    unsigned taps;

    DEVICE bool meets(const Spot& other, const Index (&)[3]) const { return (taps & other.taps) != 0; }
    DEVICE void stand(const Index (&)[3], unsigned bits) { taps = bits; }
};
// Returns the predicate bit of a tap.
DEVICE unsigned bit(Index tap) { return 1u << (tap & 31); }

// Below sm_80 there is no cp.async: these functions do nothing, and Mover loads through registers.
#if __CUDA_ARCH__ >= 800
constexpr bool COPIES_ASYNC = true;
#else
constexpr bool COPIES_ASYNC = false;
template <int BYTES> DEVICE void copy_async(void*, const void*, int) {}
DEVICE void copy_async_commit() {}
template <int PENDING> DEVICE void copy_async_wait() {}
#endif

// Mover: the tile loader. It fills a tile with elements of an operand of type T. A thread copies one unit of
// neighbouring elements of a line at a time: the same unit of every PACE-th line.
//
// Vectors of VECTOR elements, which are contiguous in global memory and aligned to their size, are copied
// asynchronously (cp.async) if they have at least 4 bytes. Single 16-bit elements, elements that are converted
// (VECTOR is 0), and all elements below sm_80 are loaded to registers: fetch() starts the loads, and deposit() stores
// them to shared memory after the products of the iteration.
template <class T, int VECTOR, int AXES, class Matrix, int LINES, int LENGTH> struct Mover {
    static constexpr bool ASYNC = COPIES_ASYNC && VECTOR * sizeof(Element) >= 4;
    static constexpr int UNIT = ASYNC ? VECTOR : sizeof(Element) < 4 ? 4 / sizeof(Element) : 1;
    static constexpr int UNITS = LENGTH / UNIT, PACE = THREADS / UNITS, ROUNDS = (LINES + PACE - 1) / PACE;
    static constexpr int SPOTS = ASYNC ? 1 : UNIT;  // coordinates of a unit that are tested: one for a vector
    static constexpr int ORDERS = PACE < 8 && ROUNDS > 1 ? 8 / PACE : 1;  // different swizzles of this thread's lines
    static_assert(UNITS * UNIT == LENGTH && PACE * UNITS == THREADS, "threads share the units of lines evenly");

    Spot<AXES> mine[SPOTS];
    bool exists[SPOTS];
    int places[ORDERS];  // indices of this thread's unit in its first lines, one for each swizzle
    Element held[ASYNC ? 1 : ROUNDS][UNIT];

    DEVICE Mover() {
#pragma unroll
        for (int order = 0; order < ORDERS; ++order)
            places[order] = Matrix::place(threadIdx.x / UNITS + order * PACE, unit());
    }
    DEVICE static int unit() { return threadIdx.x % UNITS * UNIT; }
    DEVICE Element* address(Matrix& to, int round) const {
        return to.elements + (places[round % ORDERS] + round / ORDERS * ORDERS * PACE * LENGTH);
    }

    // Returns the slot of the table that holds the coordinate of element i of a line. The order is such that a warp
    // reads consecutive slots.
    DEVICE static int shelf(int i) { return i % UNIT * UNITS + i / UNIT; }

    // Loads the coordinates of this thread's unit from the table of coordinates along the lines, of which `count`
    // exist.
    DEVICE void face(const Spot<AXES>* along, int count) {
#pragma unroll
        for (int i = 0; i < SPOTS; ++i) {
            exists[i] = unit() + i < count;
            mine[i] = along[shelf(unit() + i)];
        }
    }

    // Returns the predicate of element i of the unit: whether it exists and is in bounds. With BY_TAP a coordinate that
    // does not exist has no tap bits, so meets() is enough.
    DEVICE bool sees(int i, const Spot<AXES>& there, bool is_line, const Index (&extent)[3]) const {
        const bool both = AXES == BY_TAP || (exists[i] & is_line);
        return both & mine[i].meets(there, extent);
    }

    // Starts to load a tile of `count` lines. Elements of further lines, and those in the padding, become zeros.
    DEVICE void fetch(Matrix& to, const Operand<T>& from, const Spot<AXES>* lines, int count, const Index (&extent)[3]) {
#pragma unroll
        for (int round = 0; round < ROUNDS; ++round) {
            const int line = threadIdx.x / UNITS + round * PACE;
            if (LINES % PACE != 0 && line >= LINES) continue;
            const Spot<AXES> there = lines[line];
            if constexpr (ASYNC) {
                // If the predicate is false, cp.async reads no byte, so the address need not be valid.
                const bool seen = sees(0, there, line < count, extent);
                copy_async<VECTOR * sizeof(Element)>(address(to, round), from.values + (mine[0].offset + there.offset),
                                                     seen ? VECTOR * sizeof(Element) : 0);
            } else {
#pragma unroll
                for (int i = 0; i < UNIT; ++i) {
                    const bool seen = sees(i, there, line < count, extent);
                    const Index at = mine[i].offset + there.offset;
                    held[round][i] = Element{};
                    if (seen) held[round][i] = element(from, at);
                }
            }
        }
    }

    // Stores the elements that fetch() loaded to registers; asynchronous copies need nothing.
    DEVICE void deposit(Matrix& to) const {
        if constexpr (!ASYNC) {
#pragma unroll
            for (int round = 0; round < ROUNDS; ++round) {
                const int line = threadIdx.x / UNITS + round * PACE;
                if (LINES % PACE != 0 && line >= LINES) continue;
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
