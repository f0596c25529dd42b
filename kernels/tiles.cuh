// Tiles of a matrix in shared memory: where their elements lie, and how they come there from an operand.
//
// A tile has lines, of elements that lie side by side in the operand's memory where anything does: either along the
// depth of the product, or along its rows (or columns). What a warp reads at once are elements of neighbouring lines;
// so that these lie in different banks, every line keeps its chunks of 16 bytes in an order of its own:
//
//     line 0    0 1 2 3 4 5 6 7        chunk c of line l is kept at c ^ l
//     line 1    1 0 3 2 5 4 7 6
//     line 2    2 3 0 1 6 7 4 5
//     ...
//
// The loader puts in front of this file, beside what common.cuh is given:
//   Element   of both tiles
//   THREADS   of a block

constexpr int CHUNK = 16 / sizeof(Element);  // elements of 16 bytes

template <int BYTES> struct UnsignedOf { using Type = unsigned; };
template <> struct UnsignedOf<8> { using Type = unsigned long long; };
using Unsigned = UnsignedOf<sizeof(Index)>::Type;  // of which negative positions are the largest

// A line of fewer than eight chunks shares its 128 bytes, which are all banks, with others: they take the same order.
// TURN is 2 where single elements of four lines and of two chunks are read at once, else 1.
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

// COUNT numbers that are read or written at once.
template <class T, int COUNT> struct __align__(COUNT * sizeof(T) % 16 == 0 ? 16 : COUNT * sizeof(T)) Numbers {
    T v[COUNT];
};

// Where a row, a column or a step of the depth lies in an operand: its offset in memory and, for an operand that is
// seen through windows, what says whether an element of the matrix, where a row and a step meet, is in the image or in
// the padding. Its offset is the sum of theirs.
//
// With AXES 1 to 3 they have positions on the last AXES axes, whose sums must be within the image.
template <int AXES> struct __align__(AXES == 1 ? 2 * sizeof(Index) : 16) Spot {
    static constexpr int ROOM = AXES == 2 ? 3 : AXES;  // spots of two axes, too, are read 16 bytes at once
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
// All are in the image.
template <> struct Spot<0> {
    Index offset;

    DEVICE bool meets(const Spot&, const Index (&)[3]) const { return true; }
    DEVICE void stand(const Index (&)[3], unsigned) {}
};
// A row has the bits of those of at most 32 taps that are in the image, a step that of its tap.
constexpr int BY_TAP = 4;
template <> struct __align__(sizeof(Index) == 4 ? 8 : 16) Spot<BY_TAP> {
    Index offset;
    unsigned taps;

    DEVICE bool meets(const Spot& other, const Index (&)[3]) const { return (taps & other.taps) != 0; }
    DEVICE void stand(const Index (&)[3], unsigned bits) { taps = bits; }
};
DEVICE unsigned bit(Index tap) { return 1u << (tap & 31); }

#if __CUDA_ARCH__ >= 800
constexpr bool COPIES_ASYNC = true;
#else
constexpr bool COPIES_ASYNC = false;
template <int BYTES> DEVICE void copy_async(void*, const void*, int) {}
DEVICE void copy_async_commit() {}
template <int PENDING> DEVICE void copy_async_wait() {}
#endif

// Fills tiles with elements of an operand of type T: a unit of neighbouring elements of a line at a time, the same unit
// of every PACE-th line by each thread.
//
// VECTOR elements side by side in the operand's memory, at a multiple of their size, are copied as they are while the
// block goes on. Single elements of 16 bits, and what has to be converted (VECTOR is 0), come by way of registers:
// fetch() starts the loads, and deposit() stores what they brought.
template <class T, int VECTOR, int AXES, class Matrix, int LINES, int LENGTH> struct Mover {
    static constexpr bool ASYNC = COPIES_ASYNC && VECTOR * sizeof(Element) >= 4;
    static constexpr int UNIT = ASYNC ? VECTOR : sizeof(Element) < 4 ? 4 / sizeof(Element) : 1;
    static constexpr int UNITS = LENGTH / UNIT, PACE = THREADS / UNITS, ROUNDS = (LINES + PACE - 1) / PACE;
    static constexpr int SPOTS = ASYNC ? 1 : UNIT;  // of a unit that need a look
    static constexpr int ORDERS = PACE < 8 && ROUNDS > 1 ? 8 / PACE : 1;  // of chunks, that this thread's lines have
    static_assert(UNITS * UNIT == LENGTH && PACE * UNITS == THREADS, "threads share the units of lines evenly");

    Spot<AXES> mine[SPOTS];
    bool exists[SPOTS];
    int places[ORDERS];  // of this thread's unit in its first lines
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

    // Where the spot of a place along the lines is kept, so that what a warp reads at once lies side by side.
    DEVICE static int shelf(int i) { return i % UNIT * UNITS + i / UNIT; }

    // Takes the spots along the lines, `count` of which exist: those of this thread's unit.
    DEVICE void face(const Spot<AXES>* along, int count) {
#pragma unroll
        for (int i = 0; i < SPOTS; ++i) {
            exists[i] = unit() + i < count;
            mine[i] = along[shelf(unit() + i)];
        }
    }

    // Whether an element is there to be copied. Spots with no taps do not exist, and need no other look.
    DEVICE bool sees(int i, const Spot<AXES>& there, bool is_line, const Index (&extent)[3]) const {
        const bool both = AXES == BY_TAP || (exists[i] & is_line);
        return both & mine[i].meets(there, extent);
    }

    // Starts to bring a tile of `count` lines; the elements of the others, and those in the padding, are zeros.
    DEVICE void fetch(Matrix& to, const Operand<T>& from, const Spot<AXES>* lines, int count, const Index (&extent)[3]) {
#pragma unroll
        for (int round = 0; round < ROUNDS; ++round) {
            const int line = threadIdx.x / UNITS + round * PACE;
            if (LINES % PACE != 0 && line >= LINES) continue;
            const Spot<AXES> there = lines[line];
            if constexpr (ASYNC) {
                // Of an element that is not seen no byte is read, wherever it would lie.
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

    DEVICE static Element element(const Operand<T>& from, Index at) {
        if constexpr (VECTOR > 0)
            return from.values[at];
        else
            return Converted<Element>::from(from[at]);
    }
};
