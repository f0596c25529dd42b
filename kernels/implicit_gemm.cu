// Implicit GEMM: a convolution is computed as a product of two matrices. The left one consists of windows and is never
// stored in memory; its tiles are gathered when they are needed.
//
//                  rows                       depth (reduction)           columns       left     right
//   forward        outputs (n, o)             taps and channels (t, c)    filters f     x        w
//   data_grad      inputs (n, i)              taps and filters (t, f)     channels c    dy       w
//   weight_grad    taps and channels (t, c)   outputs (n, o)              filters f     x        dy
//
// A thread block owns a tile of the result of one group. In the main loop it copies a tile of each matrix, DEPTH
// steps of the reduction long, to shared memory (tiles.cuh), while its warps multiply tiles copied earlier
// (products.cuh):
//
//     left    rows x DEPTH       right   DEPTH x columns       sums   rows x columns
//         . . .                      . . . . . .                   . . . . . .
//         . . .                      . . . . . .           +=      . . . . . .
//         . . .                                                    . . . . . .
//
// An element of the left matrix is found by adding the positions of its row and its step: the sum is a position in the
// image, or in the padding, where a predicate makes the element zero.
//
// data_grad handles each phase of the stride as a convolution of its own (polyphase decomposition). The inputs of a
// phase are a stride apart and are reached by the same taps, so a phase is a convolution of stride 1 whose taps run
// backwards. No zeros between outputs are multiplied, and every input is written once.
//
// weight_grad uses split-K: a block sums over one split of the outputs, and a second pass (split_sum.cu) adds the
// splits. So do forward and data_grad where tiles are too few for the device. The order of all additions is fixed by
// the shapes, in forward and data_grad by those of one image.
//
// Constants, in addition to those of tiles.cuh and products.cuh:
//   DIRECTION                   which kernel is compiled: 0 forward, 1 data_grad, 2 weight_grad
//   STAGES                      pipeline stages: tiles of each matrix in shared memory
//   LEFT_VECTOR, RIGHT_VECTOR   elements of a vectorised load; 0: each element is converted, see TileLoader
//   RESULT_VECTOR               elements of a vectorised store
//   AXES                        number of last axes on which a position is tested, 0 if windows never leave the image;
//                               4: one predicate bit for each tap (BY_TAP in tiles.cuh)
//   TAPS_INNERMOST              whether taps vary faster than channels (or filters) along the depth
//   HAS_BIAS, ACTIVATION        the epilogue; the activation by its number in common.cuh
//   FIRST_CONJUGATED, FIRST_DERIVATIVE, SECOND_CONJUGATED, SECOND_DERIVATIVE
//                               how elements of the operands are converted, if they are (Operand in common.cuh)

constexpr int FORWARD = 0, DATA_GRAD = 1, WEIGHT_GRAD = 2;
static_assert(DEPTH <= THREADS && (TERMS == 0 || TERMS % DEPTH == 0), "a thread for each step, and whole tiles in a sum");

constexpr int FLUSHES_AFTER = TERMS > 0 ? TERMS / DEPTH : 1;  // main-loop iterations between flushes of the accumulator
constexpr Options OPTIONS = {FIRST_CONJUGATED, FIRST_DERIVATIVE, SECOND_CONJUGATED, SECOND_DERIVATIVE, 0, HAS_BIAS, ACTIVATION, 0};

// How the predicates of the two matrices are tested. The right matrix has no padding: one bit stands for all taps.
constexpr int LEFT_TEST = AXES == 0 ? BY_TAP : AXES, RIGHT_TEST = BY_TAP;
template <class T> using LeftLoader = TileLoader<T, LEFT_VECTOR, LEFT_TEST, LeftTile, LEFT_ALONG_DEPTH>;
template <class T> using RightLoader = TileLoader<T, RIGHT_VECTOR, RIGHT_TEST, RightTile, RIGHT_ALONG_DEPTH>;

// Slots of rows, steps and columns in Tables. Coordinates that vary along the lines of a tile are in the order in which
// the tile loader reads them (TileLoader::slot); the others are in natural order.
DEVICE int row_slot(unsigned i) { return LEFT_ALONG_DEPTH ? i : LeftLoader<First>::slot(i); }
DEVICE int left_step_slot(unsigned i) { return LEFT_ALONG_DEPTH ? LeftLoader<First>::slot(i) : i; }
DEVICE int column_slot(unsigned i) { return RIGHT_ALONG_DEPTH ? i : RightLoader<First>::slot(i); }
DEVICE int right_step_slot(unsigned i) { return RIGHT_ALONG_DEPTH ? RightLoader<First>::slot(i) : i; }

// Coordinates of the rows, columns and steps of a block's tiles, in shared memory. The steps are double-buffered: one
// table for the tile that is being loaded, one for the next.
struct Tables {
    Coordinate<LEFT_TEST> row[TILE_ROWS], left_step[2][DEPTH];
    Coordinate<RIGHT_TEST> column[TILE_COLUMNS], right_step[2][DEPTH];
    Index result_row[TILE_ROWS];  // offset in the result of each row's first column
};
// The operand tiles of one pipeline stage.
struct Stage {
    LeftTile left;
    RightTile right;
};
// Dynamic shared memory: pipeline stages in the main loop, one staging buffer for each warp in the epilogue.
union Shared {
    Stage stages[STAGES];
    Sum staged[THREADS / 32][STAGED_LINES * STAGED_PITCH];
};

// Returns the dynamic shared memory of the block.
DEVICE Shared& shared_tiles() {
    DYNAMIC_SHARED(Shared, shared);
    return *shared;
}

// The part of the matrices that a block multiplies.
struct Extents {
    int rows, columns;  // of the tile; further ones do not exist
    Index depth;        // length of the reduction
};
DEVICE int at_most(Index count, int most) { return count < most ? int(count) : most; }

// A mixed-radix counter of four digits, of which the first varies fastest. advance() adds DEPTH without a division:
// `leap` holds the digits of DEPTH.
struct Counter {
    Index digit[4], leap[4];
    const Divisor* const radix[3];  // of the first three digits

    DEVICE Counter(Index start, const Divisor& a, const Divisor& b, const Divisor& c) : radix{&a, &b, &c} {
        set(digit, start);
        set(leap, DEPTH);
#pragma unroll
        for (int i = 0; i < 4; ++i) keep(leap[i]);
    }
    DEVICE void advance() {
#pragma unroll
        for (int i = 0; i < 4; ++i) digit[i] += leap[i];
#pragma unroll
        for (int i = 0; i < 3; ++i)
            if (digit[i] >= radix[i]->value) {
                digit[i] -= radix[i]->value;
                ++digit[i + 1];
            }
    }
    DEVICE void set(Index (&digits)[4], Index number) const {
#pragma unroll
        for (int i = 0; i < 3; ++i) digits[i] = take_digit(number, *radix[i]);
        digits[3] = number;
    }
};

// Whether a value is not NaN, and whether it is finite.
template <class T> DEVICE bool is_number(T v) { return v == v; }
template <class T> DEVICE bool is_number(Complex<T> v) { return is_number(v.real) && is_number(v.imag); }
template <class T> DEVICE bool is_finite(T v) { return v - v == 0; }
template <class T> DEVICE bool is_finite(Complex<T> v) { return is_finite(v.real) && is_finite(v.imag); }

// Main loop: adds the product of left and right to the accumulators in `products`. Each call of steps.set() computes
// the coordinates of the next DEPTH steps of the reduction. On return all tiles have been read, so the epilogue may
// reuse the shared memory.
template <class T, class U, class Steps>
DEVICE void multiply(Products& products, Stage* stages, Tables& tables, const Operand<T>& left, const Operand<U>& right,
                     Steps& steps, const Extents& extents, const Index (&image)[3]) {
    __syncthreads();  // the coordinates of rows and columns are set
    const Coordinates<LEFT_TEST> rows = {tables.row, extents.rows};
    const Coordinates<RIGHT_TEST> columns = {tables.column, extents.columns};
    LeftLoader<T> left_loader(rows);
    RightLoader<U> right_loader(columns);

    // Software pipeline: the coordinates of a tile's steps are computed STAGES iterations before it is multiplied, and
    // it is loaded in the next iteration. The iterations with i < 0 fill the pipeline.
    const Index iterations = ceil_div(extents.depth, DEPTH);
    for (Index i = -STAGES; i < iterations; ++i) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();  // this iteration's tiles and the next steps are set; the tiles of the last one have been read
        const Index next = i + STAGES - 1;
        const int now = Unsigned(next) % 2;
        Stage& coming = stages[Unsigned(next) % STAGES];
        const bool loads = inside(next, iterations);
        if (loads) {
            const int count = at_most(extents.depth - next * DEPTH, DEPTH);
            left_loader.load(coming.left, left, rows, {tables.left_step[now], count}, image);
            right_loader.load(coming.right, right, columns, {tables.right_step[now], count}, image);
        }
        steps.set(tables.left_step[1 - now], tables.right_step[1 - now]);
        if (i >= 0) {
            const Stage& ready = stages[Unsigned(i) % STAGES];
            products.add(ready.left, ready.right);
            if (TERMS > 0 && (i + 1) % FLUSHES_AFTER == 0) products.flush();
        }
        if (loads) {
            left_loader.store(coming.left);
            right_loader.store(coming.right);
        }
        copy_async_commit();
    }
    products.flush();
    __syncthreads();  // all tiles have been read
}

// Epilogue: adds the bias, applies the activation, rounds once and stores RESULT_VECTOR results at a time, where the
// row and the column exist. Returns whether none of the sums that this thread stored was NaN.
template <class To>
DEVICE bool store(const Products& products, Shared& shared, const Tables& tables, const Extents& extents, To* result,
                  Index column_step, const Sum* bias) {
    bool numbers = true;
    const auto finish_and_store = [&](int row, int column, const Numbers<Sum, RESULT_VECTOR>& sums) {
        if (row >= extents.rows || column >= extents.columns) return;
        Numbers<To, RESULT_VECTOR> finished;
#pragma unroll
        for (int i = 0; i < RESULT_VECTOR; ++i) {
            Sum sum = sums.v[i];
            numbers = numbers && is_number(sum);
            if (HAS_BIAS) add(sum, bias[RESULT_ALONG_ROWS ? column : column + i]);
            finished.v[i] = Converted<To>::from(activated(sum, ACTIVATION));
        }
        *reinterpret_cast<Numbers<To, RESULT_VECTOR>*>(result + (tables.result_row[row] + column * column_step)) = finished;
    };
    store_sums<RESULT_VECTOR>(products, shared.staged[threadIdx.x / 32], finish_and_store);
    return numbers;
}

// ---------------------------------------------------------------------------------------------- forward, data_grad
// The windows of both directions, with the phases of the stride, are described by a struct that the host makes
// (gemm_windows.py). Along an axis, the window of row u has its origin at phase.origin + u * window_step in the image,
// and its taps are tap_stride apart. Its k-th tap is tap phase.first_tap + k * tap_step of w, and row u is at
// phase.start + u * result_step in the result.

// Computes the coordinates of the steps of forward and data_grad. A step is a tap and a channel of the images; thread i
// owns step i of each tile.
struct WindowSteps {
    Counter counter;
    Index left_offset[4], right_offset[4], tap_stride[3];  // strides that belong to each digit
    Index remaining;

    static constexpr int CHANNEL = TAPS_INNERMOST ? 3 : 0, FIRST_TAP = TAPS_INNERMOST ? 0 : 1;

    DEVICE WindowSteps(const Windows& windows, const Phase* const (&phase)[3], const Images& images_at, const Weights& w_at,
                       Index step, Index remaining)
        : counter(step, TAPS_INNERMOST ? phase[2]->taps : windows.channels, phase[TAPS_INNERMOST ? 1 : 2]->taps,
                  phase[TAPS_INNERMOST ? 0 : 1]->taps),
          remaining(remaining) {
        left_offset[CHANNEL] = images_at.channel;
        right_offset[CHANNEL] = w_at.channel;
#pragma unroll
        for (int axis = 0; axis < 3; ++axis) {
            tap_stride[axis] = windows.axis[axis].tap_stride;
            left_offset[FIRST_TAP + 2 - axis] = tap_stride[axis] * images_at.axis[axis];
            right_offset[FIRST_TAP + 2 - axis] = windows.axis[axis].tap_step * w_at.axis[axis];
        }
    }
    DEVICE void set(Coordinate<LEFT_TEST>* left, Coordinate<RIGHT_TEST>* right) {
        if (threadIdx.x >= DEPTH) return;
        Coordinate<LEFT_TEST> left_at = {};
        Coordinate<RIGHT_TEST> right_at = {};
        if (remaining > 0) {
            compute(left_at, right_at);
            counter.advance();
            remaining -= DEPTH;
        }
        left[left_step_slot(threadIdx.x)] = left_at;
        right[right_step_slot(threadIdx.x)] = right_at;
    }
    // Computes the coordinates of the current step, which are zeros before.
    DEVICE void compute(Coordinate<LEFT_TEST>& left_at, Coordinate<RIGHT_TEST>& right_at) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            left_at.offset += counter.digit[i] * left_offset[i];
            right_at.offset += counter.digit[i] * right_offset[i];
        }
        const Index tap[3] = {counter.digit[FIRST_TAP + 2], counter.digit[FIRST_TAP + 1], counter.digit[FIRST_TAP]};
        left_at.set({tap[0] * tap_stride[0], tap[1] * tap_stride[1], tap[2] * tap_stride[2]}, bit_of(tap));
        right_at.taps = 1;
    }
    DEVICE unsigned bit_of(const Index (&tap)[3]) const {
        if (AXES != BY_TAP) return 1;
        return bit((tap[0] * counter.radix[FIRST_TAP + 1]->value + tap[1]) * counter.radix[FIRST_TAP]->value + tap[2]);
    }
};

// Computes one tile of result[row, column] = sum over taps and channels of images[row, tap, channel]
// w[tap, channel, column], which is forward and each phase of data_grad. With split-K it is the sum over one split of
// the steps, and the result is a partial sum for split_sum.cu. Blocks: column tiles vary fastest, then groups, row
// tiles, phases and splits.
struct Gather {
    const Operand<First> images;
    const Operand<Second> w;
    const Sum* const bias;
    Result* result;
    const Windows& windows;
    const Images &images_at, &result_at;
    const Weights& w_at;

    // Set by tile().
    const Phase* phase[3];
    Index g, row0, column0, first_step;
    Extents extents;

    DEVICE void tile() {
        Index block = blockIdx.x;
        column0 = take_digit(block, windows.column_tiles) * TILE_COLUMNS;
        g = take_digit(block, windows.groups);
        row0 = take_digit(block, windows.row_tiles) * TILE_ROWS;
        Index rows = windows.images, depth = windows.channels.value;
        for (int axis = 2; axis >= 0; --axis) {
            const Axis& windows_along = windows.axis[axis];
            phase[axis] = &windows_along.phase[take_digit(block, windows_along.phases)];
            rows *= phase[axis]->rows.value;
            depth *= phase[axis]->taps.value;
        }
        if (row0 >= rows) return;  // the same in all threads: this phase has fewer rows than others
        const Index split = block;
        first_step = split * windows.split_length;
        const Index rest = depth > first_step ? depth - first_step : 0;
        extents = {at_most(rows - row0, TILE_ROWS), at_most(windows.columns - column0, TILE_COLUMNS),
                   rest < windows.split_length ? rest : windows.split_length};
        result += split * windows.split_step;

        Shared& shared = shared_tiles();
        __shared__ Tables tables;
        set(tables);
        const Index image[3] = {windows.axis[0].extent, windows.axis[1].extent, windows.axis[2].extent};
        Products products = {};
        WindowSteps steps(windows, phase, images_at, w_at, first_step + threadIdx.x, extents.depth - threadIdx.x);
        multiply(products, shared.stages, tables, images, w, steps, extents, image);
        const Sum* const bias_here = HAS_BIAS ? bias + (g * windows.columns + column0) : nullptr;
        const bool numbers = store(products, shared, tables, extents, result, result_at.channel, bias_here);
        if constexpr (DIRECTION == DATA_GRAD && AXES > 0)
            if (__syncthreads_or(!numbers) && __syncthreads_or(!weights_are_finite(tables)))
                recompute(tables, bias_here, image);
    }

    // Sets the coordinates of the tile's rows and columns; those that do not exist stay zero.
    DEVICE void set(Tables& tables) const {
#pragma unroll 1
        for (int r = threadIdx.x; r < TILE_ROWS; r += THREADS) {
            Coordinate<LEFT_TEST> at = {};
            if (r < extents.rows) {
                Index number = row0 + r;
                Place from = {0, g}, to = {0, g, column0};
#pragma unroll
                for (int axis = 2; axis >= 0; --axis) {
                    const Index u = take_digit(number, phase[axis]->rows);
                    from.at[axis] = phase[axis]->origin + u * windows.axis[axis].window_step;
                    to.at[axis] = phase[axis]->start + u * windows.axis[axis].result_step;
                }
                from.n = to.n = number;
                at.offset = from.offset(images_at);
                at.set(from.at, taps_seen(from.at));
                tables.result_row[r] = to.offset(result_at);
            }
            tables.row[row_slot(r)] = at;
        }
        const WeightPlace first = {g, 0, column0, {phase[0]->first_tap, phase[1]->first_tap, phase[2]->first_tap}};
#pragma unroll 1
        for (int c = threadIdx.x; c < TILE_COLUMNS; c += THREADS) {
            Coordinate<RIGHT_TEST> at = {};
            if (c < extents.columns) at = {first.offset(w_at) + c * w_at.filter, 1};
            tables.column[column_slot(c)] = at;
        }
    }

    // Returns the predicate bits of a window with this origin: the bit of a tap is set if the tap is inside the image.
    DEVICE unsigned taps_seen(const Index (&origin)[3]) const {
        unsigned bits = 1;
        if constexpr (AXES == BY_TAP) {
            Index count = 1;  // of the taps of the axes so far
#pragma unroll
            for (int axis = 2; axis >= 0; --axis) {
                const unsigned of_inner_axes = bits;
                bits = 0;
#pragma unroll 1
                for (Index tap = 0; tap < phase[axis]->taps.value; ++tap)
                    if (inside(origin[axis] + tap * windows.axis[axis].tap_stride, windows.axis[axis].extent))
                        bits |= of_inner_axes << tap * count;
                count *= phase[axis]->taps.value;
            }
        }
        return bits;
    }

    // Non-finite fallback of data_grad. The main loop takes dy as zero beyond the outputs. If the weight is Inf or
    // NaN, such a product is NaN, although it is no part of the convolution. So where a sum is NaN and the tile has
    // non-finite weights, recompute() computes it again from the products that exist.

    // Computes the coordinates of a step of this block.
    DEVICE void compute_step(Index step, Coordinate<LEFT_TEST>& left_at, Coordinate<RIGHT_TEST>& right_at) const {
        left_at = {};
        right_at = {};
        WindowSteps(windows, phase, images_at, w_at, first_step + step, 0).compute(left_at, right_at);
    }

    // Whether all weights of the tile's columns that this thread tests are finite.
    DEVICE bool weights_are_finite(const Tables& tables) const {
        Coordinate<LEFT_TEST> left_at;
        Coordinate<RIGHT_TEST> right_at;
        for (Index step = threadIdx.x; step < extents.depth; step += THREADS) {
            compute_step(step, left_at, right_at);
            for (int c = 0; c < extents.columns; ++c)
                if (!is_finite(w[tables.column[column_slot(c)].offset + right_at.offset])) return false;
        }
        return true;
    }

    // Recomputes the results of the tile that are NaN, one thread for each. Sums are divided as the main loop divides
    // them, so that they do not depend on the number of splits.
    DEVICE void recompute(const Tables& tables, const Sum* bias_here, const Index (&image)[3]) const {
        Coordinate<LEFT_TEST> left_at;
        Coordinate<RIGHT_TEST> right_at;
        for (int e = threadIdx.x; e < TILE_ROWS * TILE_COLUMNS; e += THREADS) {
            const int r = e / TILE_COLUMNS, c = e % TILE_COLUMNS;
            if (r >= extents.rows || c >= extents.columns) continue;
            Result& to = result[tables.result_row[r] + c * result_at.channel];
            if (is_number(Converted<Sum>::from(to))) continue;
            const Coordinate<LEFT_TEST>& row = tables.row[row_slot(r)];
            const Index column = tables.column[column_slot(c)].offset;
            Sum total = {}, sum = {};
            for (Index step = 0; step < extents.depth; ++step) {
                compute_step(step, left_at, right_at);
                if (row.in_bounds(left_at, image))
                    add_product(sum, images[row.offset + left_at.offset], w[column + right_at.offset]);
                if (TERMS > 0 && (step + 1) % TERMS == 0) {
                    add(total, sum);
                    sum = Sum{};
                }
            }
            add(total, sum);
            finish(&to, 0, total, bias_here, c, OPTIONS);
        }
    }
};

// y = conv(x, w) with bias and activation. A block computes a tile of TILE_ROWS outputs x TILE_COLUMNS filters of one
// group of y; a thread owns the accumulators that the warp's product gives it (products.cuh).
extern "C" __global__ void __launch_bounds__(THREADS, 1)
implicit_gemm_forward(const First* x_values, const First* x_y, const Second* w_values, const Sum* bias, Result* y,
                      Windows windows, Images x_at, Images y_at, Weights w_at) {
    if constexpr (DIRECTION == FORWARD) {
        const Operand<First> x = {x_values, x_y, FIRST_CONJUGATED, FIRST_DERIVATIVE};
        const Operand<Second> w = {w_values, nullptr, SECOND_CONJUGATED, IDENTITY};
        Gather{x, w, bias, y, windows, x_at, y_at, w_at}.tile();
    }
}

// dx = gradient of the convolution for x, with bias and activation. A block computes a tile of TILE_ROWS inputs, of
// one phase of the stride, x TILE_COLUMNS channels of one group of dx; a thread owns the accumulators that the warp's
// product gives it. w_at has the strides of channels and filters exchanged.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
implicit_gemm_data_grad(const First* dy_values, const First* dy_y, const Second* w_values, const Sum* bias, Result* dx,
                        Windows windows, Images dy_at, Images dx_at, Weights w_at) {
    if constexpr (DIRECTION == DATA_GRAD) {
        const Operand<First> dy = {dy_values, dy_y, FIRST_CONJUGATED, FIRST_DERIVATIVE};
        const Operand<Second> w = {w_values, nullptr, SECOND_CONJUGATED, IDENTITY};
        Gather{dy, w, bias, dx, windows, dy_at, dx_at, w_at}.tile();
    }
}

// ---------------------------------------------------------------------------------------------- weight_grad

// Computes the coordinates of the steps of weight_grad. A step is an output, from `first` on; thread i owns step i of
// each tile.
struct OutputSteps {
    Counter counter;
    Index left_offset[4], right_offset[4], left_first, stride[3], low[3];  // left_first: x offset of output 0's window
    Index remaining;

    DEVICE OutputSteps(const Convolution& conv, const Divisor (&output)[3], Index first, Index outputs, const Images& x_at,
                       const Images& dy_at)
        : counter(first + threadIdx.x, output[2], output[1], output[0]), left_first(0), remaining(outputs - threadIdx.x) {
        left_offset[3] = x_at.batch;
        right_offset[3] = dy_at.batch;
#pragma unroll
        for (int axis = 0; axis < 3; ++axis) {
            stride[axis] = conv.stride[axis];
            low[axis] = conv.low[axis];
            left_offset[2 - axis] = stride[axis] * x_at.axis[axis];
            right_offset[2 - axis] = dy_at.axis[axis];
            left_first -= low[axis] * x_at.axis[axis];
        }
    }
    DEVICE void set(Coordinate<LEFT_TEST>* left, Coordinate<RIGHT_TEST>* right) {
        if (threadIdx.x >= DEPTH) return;
        Coordinate<LEFT_TEST> left_at = {};
        Coordinate<RIGHT_TEST> right_at = {};
        if (remaining > 0) {
            left_at.offset = left_first;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                left_at.offset += counter.digit[i] * left_offset[i];
                right_at.offset += counter.digit[i] * right_offset[i];
            }
            left_at.set({counter.digit[2] * stride[0] - low[0], counter.digit[1] * stride[1] - low[1],
                         counter.digit[0] * stride[2] - low[2]}, 1);
            right_at.taps = 1;
            counter.advance();
            remaining -= DEPTH;
        }
        left[left_step_slot(threadIdx.x)] = left_at;
        right[right_step_slot(threadIdx.x)] = right_at;
    }
};

// Returns the coordinate of a row: channels vary fastest, then taps.
DEVICE WeightPlace take_row(Index number, const WeightTiles& tiles) {
    WeightPlace at = {};
    at.c = take_digit(number, tiles.channels);
    at.tap[2] = take_digit(number, tiles.kernel[2]);
    at.tap[1] = take_digit(number, tiles.kernel[1]);
    at.tap[0] = number;
    return at;
}

// First pass of weight_grad: partial[split][g][tap][c][f] = sum over outputs [split * length, (split + 1) * length)
// of all N M P Q. A block computes a tile of TILE_ROWS taps and channels x TILE_COLUMNS filters of one group, for one
// split; a thread owns the accumulators that the warp's product gives it. Blocks: column tiles vary fastest, then row
// tiles, groups and splits.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
implicit_gemm_weight_grad(const First* dy_values, const First* dy_y, const Second* x_values, const Second* x_y,
                          Sum* partial, Convolution conv, Images dy_at, Images x_at, WeightTiles tiles) {
    if constexpr (DIRECTION == WEIGHT_GRAD) {
        Shared& shared = shared_tiles();
        __shared__ Tables tables;
        const Operand<First> dy = {dy_values, dy_y, FIRST_CONJUGATED, FIRST_DERIVATIVE};
        const Operand<Second> x = {x_values, x_y, SECOND_CONJUGATED, SECOND_DERIVATIVE};

        Index block = blockIdx.x;
        const Index column0 = take_digit(block, tiles.column_tiles) * TILE_COLUMNS;
        const Index row0 = take_digit(block, tiles.row_tiles) * TILE_ROWS;
        const Index g = take_digit(block, tiles.groups), split = block;
        const Index all_rows = conv.kernel[0] * conv.kernel[1] * conv.kernel[2] * conv.C;
        const Index outputs = conv.N * conv.output[0] * conv.output[1] * conv.output[2];
        const Index first = split * tiles.length, last = split == tiles.splits - 1 ? outputs : first + tiles.length;
        const Extents extents = {at_most(all_rows - row0, TILE_ROWS), at_most(conv.F - column0, TILE_COLUMNS), last - first};

#pragma unroll 1
        for (int r = threadIdx.x; r < TILE_ROWS; r += THREADS) {
            Coordinate<LEFT_TEST> row = {};
            if (r < extents.rows) {
                const WeightPlace at = take_row(row0 + r, tiles);
                Place shift = {0, g, at.c};
                for (int axis = 0; axis < 3; ++axis) shift.at[axis] = at.tap[axis] * conv.dilation[axis];
                row.offset = shift.offset(x_at);
                row.set(shift.at, 1);
                tables.result_row[r] = ((split * conv.G + g) * all_rows + row0 + r) * conv.F + column0;
            }
            tables.row[row_slot(r)] = row;
        }
#pragma unroll 1
        for (int c = threadIdx.x; c < TILE_COLUMNS; c += THREADS) {
            Coordinate<RIGHT_TEST> column = {};
            if (c < extents.columns) column = {g * dy_at.group + (column0 + c) * dy_at.channel, 1};
            tables.column[column_slot(c)] = column;
        }

        Products products = {};
        OutputSteps steps(conv, tiles.output, first, extents.depth, x_at, dy_at);
        multiply(products, shared.stages, tables, x, dy, steps, extents, conv.input);
        store(products, shared, tables, extents, partial, 1, nullptr);
    }
}
