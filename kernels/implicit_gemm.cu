// Implicit GEMM: a convolution is computed as a product of two matrices. The left one has windows as its rows and is
// never stored in memory; its tiles are gathered when they are needed.
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
// data_grad handles one phase of the stride after another (polyphase decomposition; a phase is called `residue` in
// the code). The inputs of a phase are a stride apart and are reached by the same taps, so a phase is a convolution
// of stride 1 whose taps run backwards. No zeros between outputs are multiplied, and every input is written once.
//
// weight_grad uses split-K (a split is called `slice` in the code): a block sums over one split of the outputs, and a
// second pass adds the splits. The order of all additions is fixed by the shapes, in forward and data_grad by those of
// one image.
//
// Constants, in addition to those of tiles.cuh and products.cuh:
//   DIRECTION                   which kernel is compiled: 0 forward, 1 data_grad, 2 weight_grad
//   STAGES                      pipeline stages: tiles of each matrix in shared memory
//   LEFT_VECTOR, RIGHT_VECTOR   elements of a vectorised load; 0: each element is converted, see Mover in tiles.cuh
//   RESULT_VECTOR               elements of a vectorised store
//   AXES                        number of last axes on which a position is tested, 0 if windows never leave the image;
//                               4: one predicate bit for each tap (BY_TAP in tiles.cuh)
//   TAPS_INNERMOST              whether taps vary faster than channels (or filters) along the depth

constexpr int FORWARD = 0, DATA_GRAD = 1, WEIGHT_GRAD = 2;
static_assert(DEPTH <= THREADS && (TERMS == 0 || TERMS % DEPTH == 0), "a thread for each step, and whole tiles in a sum");

constexpr int TERM_TURNS = TERMS > 0 ? TERMS / DEPTH : 1;  // main-loop iterations between flushes of the accumulator

// The loaders of the two tiles. The right matrix has no padding, so its loader tests no positions.
template <class T> using LeftMover = Mover<T, LEFT_VECTOR, AXES, LeftTile, LEFT_LINES, LEFT_LENGTH>;
template <class T> using RightMover = Mover<T, RIGHT_VECTOR, 0, RightTile, RIGHT_LINES, RIGHT_LENGTH>;

// Indices of rows, steps and columns in Tables. Coordinates that vary along the lines of a tile are in the order that
// the tile loader reads them in (Mover::shelf); the others are in natural order.
DEVICE int place_of_row(int i) { return LEFT_ALONG_DEPTH ? i : LeftMover<First>::shelf(i); }
DEVICE int place_of_left_step(int i) { return LEFT_ALONG_DEPTH ? LeftMover<First>::shelf(i) : i; }
DEVICE int place_of_column(int i) { return RIGHT_ALONG_DEPTH ? i : RightMover<First>::shelf(i); }
DEVICE int place_of_right_step(int i) { return RIGHT_ALONG_DEPTH ? RightMover<First>::shelf(i) : i; }

// Coordinates of the rows, columns and steps of a block's tiles, in shared memory. The steps are double-buffered: one
// table for the tile that is being loaded, one for the next.
struct Tables {
    Spot<AXES> row[TILE_ROWS], left_step[2][DEPTH];
    Spot<0> column[TILE_COLUMNS], right_step[2][DEPTH];
    Index result_row[TILE_ROWS];  // offset in the result of each row's first column
};
// The operand tiles of one pipeline stage.
struct Stage {
    LeftTile left;
    RightTile right;
};
// Dynamic shared memory: pipeline stages in the main loop, one staging buffer (slab) for each warp in the epilogue.
union Shared {
    Stage stages[STAGES];
    Sum slabs[THREADS / 32][SLAB_LINES * SLAB_PITCH];
};

// Returns the dynamic shared memory of the block.
DEVICE Shared& shared_tiles() {
    DYNAMIC_SHARED(Shared, shared);
    return *shared;
}

// A mixed-radix counter of four digits with the given extents, of which the first varies fastest. advance() adds DEPTH
// without a division; spell() splits a number into its digits, and `leap` holds the digits of DEPTH.
struct Counter {
    Index digit[4], leap[4], extent[4];

    DEVICE Counter(Index start, Index a, Index b, Index c, Index d) : extent{a, b, c, d} {
        spell(digit, start);
        spell(leap, DEPTH);
    }
    DEVICE void advance() {
        Index carry = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            digit[i] += leap[i] + carry;
            carry = i < 3 && digit[i] >= extent[i];
            if (carry) digit[i] -= extent[i];
        }
    }
    DEVICE void spell(Index (&digits)[4], Index number) const {
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            digits[i] = number % extent[i];
            number /= extent[i];
        }
        digits[3] = number;
    }
};

// Whether a value is not NaN, and whether it is finite.
template <class T> DEVICE bool is_number(T v) { return v == v; }
template <class T> DEVICE bool is_number(Complex<T> v) { return is_number(v.real) && is_number(v.imag); }
template <class T> DEVICE bool is_finite(T v) { return v - v == 0; }
template <class T> DEVICE bool is_finite(Complex<T> v) { return is_finite(v.real) && is_finite(v.imag); }

// Main loop: adds the product of left and right over `depth` steps of the reduction to the accumulators in
// `products`. Each call of steps.set() computes the coordinates of the next DEPTH steps. A `turn` is one iteration.
// On return all tiles have been read, so the epilogue may reuse the shared memory.
template <class T, class U, class Steps>
DEVICE void multiply(Products& products, Stage* stages, Tables& tables, const Operand<T>& left, const Operand<U>& right,
                     Steps& steps, Index depth, int rows, int columns, const Index (&extent)[3]) {
    LeftMover<T> left_mover;
    RightMover<U> right_mover;
    steps.set(tables.left_step[0], tables.right_step[0]);
    __syncthreads();  // the tables are set
    if (!LEFT_ALONG_DEPTH) left_mover.face(tables.row, rows);
    if (!RIGHT_ALONG_DEPTH) right_mover.face(tables.column, columns);

    // Software pipeline: a tile is loaded STAGES - 1 iterations before it is multiplied. The iterations with turn < 0
    // fill the pipeline.
    const Index turns = ceil_div(depth, DEPTH);
    for (Index turn = 1 - STAGES; turn < turns; ++turn) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();  // this turn's tiles and the next tables are complete; those of the last turn have been read
        const Index next = turn + STAGES - 1;
        Stage& coming = stages[next % STAGES];
        if (next < turns) {
            const int now = next % 2, count = depth - next * DEPTH < DEPTH ? int(depth - next * DEPTH) : DEPTH;
            if (LEFT_ALONG_DEPTH) left_mover.face(tables.left_step[now], count);
            if (RIGHT_ALONG_DEPTH) right_mover.face(tables.right_step[now], count);
            left_mover.fetch(coming.left, left, LEFT_ALONG_DEPTH ? tables.row : tables.left_step[now],
                             LEFT_ALONG_DEPTH ? rows : count, extent);
            right_mover.fetch(coming.right, right, RIGHT_ALONG_DEPTH ? tables.column : tables.right_step[now],
                              RIGHT_ALONG_DEPTH ? columns : count, extent);
            steps.set(tables.left_step[1 - now], tables.right_step[1 - now]);
        }
        if (turn >= 0) {
            products.add(stages[turn % STAGES].left, stages[turn % STAGES].right);
            if (TERMS > 0 && (turn + 1) % TERM_TURNS == 0) products.settle();
        }
        if (next < turns) {
            left_mover.deposit(coming.left);
            right_mover.deposit(coming.right);
        }
        copy_async_commit();
    }
    products.settle();
    __syncthreads();  // all tiles have been read
}

// Epilogue: adds the bias, applies the activation, rounds once and stores VECTOR results at a time, where the row and
// the column exist. Returns whether none of the sums that this thread stored was NaN.
template <int VECTOR, class To>
DEVICE bool store(const Products& products, Shared& shared, const Tables& tables, int rows, int columns, To* result,
                  Index column_step, const Sum* bias, const Options& options) {
    bool numbers = true;
    store_sums<VECTOR>(products, shared.slabs[threadIdx.x / 32], [&](int row, int column, const Numbers<Sum, VECTOR>& sums) {
        if (row >= rows || column >= columns) return;
        Numbers<To, VECTOR> finished;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            Sum sum = sums.v[i];
            numbers = numbers && is_number(sum);
            if (options.has_bias) add(sum, bias[RESULT_ALONG_ROWS ? column : column + i]);
            finished.v[i] = Converted<To>::from(activated(sum, options.activation));
        }
        *reinterpret_cast<Numbers<To, VECTOR>*>(result + (tables.result_row[row] + column * column_step)) = finished;
    });
    return numbers;
}

// ---------------------------------------------------------------------------------------------- forward, data_grad

// Iteration over the taps of the windows that the rows are, for each axis. The window of row u has its origin at
// origin + u * step in the image, and its taps are `jump` apart (the tap stride).
struct Sweep {
    Index rows[3], origin[3], step[3], jump[3], taps[3];
    Index first_tap[3], tap_step[3];  // tap k of the window is tap first_tap + k * tap_step of w
    Index start[3], spread[3];        // row u is at start + u * spread in the result (spread: the output stride)
};

// The windows of forward: rows are outputs.
DEVICE Sweep sweep_of_outputs(const Convolution& conv) {
    Sweep sweep;
    for (int axis = 0; axis < 3; ++axis) {
        sweep.rows[axis] = conv.output[axis];
        sweep.origin[axis] = -conv.low[axis];
        sweep.step[axis] = conv.stride[axis];
        sweep.jump[axis] = conv.dilation[axis];
        sweep.taps[axis] = conv.kernel[axis];
        sweep.first_tap[axis] = sweep.start[axis] = 0;
        sweep.tap_step[axis] = sweep.spread[axis] = 1;
    }
    return sweep;
}

DEVICE Index common_divisor(Index a, Index b) {
    while (b != 0) {
        const Index rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

// The windows of data_grad for one phase of the stride: rows are the inputs start, start + stride, ... of every axis.
// Tap t connects input i with output (i + low - t * dilation) / stride where that is an integer. That holds for at
// most one of the first `apart` taps, and for every `apart`-th tap from there on.
DEVICE Sweep sweep_of_residue(const Convolution& conv, const Index (&start)[3]) {
    Sweep sweep;
    for (int axis = 0; axis < 3; ++axis) {
        const Index stride = conv.stride[axis], dilation = conv.dilation[axis], kernel = conv.kernel[axis];
        const Index common = common_divisor(stride, dilation), apart = stride / common;
        const Index shifted = start[axis] + conv.low[axis], last = apart < kernel ? apart : kernel;
        Index first = 0;
        while (first < last && (shifted - first * dilation) % stride != 0) ++first;
        sweep.rows[axis] = ceil_div(conv.input[axis] - start[axis], stride);
        sweep.taps[axis] = first < last ? ceil_div(kernel - first, apart) : 0;
        sweep.origin[axis] = (shifted - first * dilation) / stride;
        sweep.step[axis] = 1;
        sweep.jump[axis] = -(dilation / common);
        sweep.first_tap[axis] = first;
        sweep.tap_step[axis] = apart;
        sweep.start[axis] = start[axis];
        sweep.spread[axis] = stride;
    }
    return sweep;
}

// Computes the coordinates of the steps of forward and data_grad. A step is a tap and a channel of the images; thread i
// owns step i of each tile.
struct SweepSteps {
    Counter counter;
    Index left_offset[4], right_offset[4], jump[3];  // strides that belong to each digit
    Index remaining;

    static constexpr int CHANNEL = TAPS_INNERMOST ? 3 : 0, FIRST_TAP = TAPS_INNERMOST ? 0 : 1;

    DEVICE SweepSteps(const Sweep& sweep, Index channels, const Images& images_at, const Weights& w_at, Index w_channel)
        : counter(threadIdx.x, TAPS_INNERMOST ? sweep.taps[2] : channels, sweep.taps[TAPS_INNERMOST ? 1 : 2],
                  sweep.taps[TAPS_INNERMOST ? 0 : 1], TAPS_INNERMOST ? channels : sweep.taps[0]),
          remaining(sweep.taps[0] * sweep.taps[1] * sweep.taps[2] * channels - threadIdx.x) {
        left_offset[CHANNEL] = images_at.channel;
        right_offset[CHANNEL] = w_channel;
#pragma unroll
        for (int axis = 0; axis < 3; ++axis) {
            jump[axis] = sweep.jump[axis];
            left_offset[FIRST_TAP + 2 - axis] = sweep.jump[axis] * images_at.axis[axis];
            right_offset[FIRST_TAP + 2 - axis] = sweep.tap_step[axis] * w_at.axis[axis];
        }
    }
    DEVICE void set(Spot<AXES>* left, Spot<0>* right) {
        if (threadIdx.x >= DEPTH) return;
        Spot<AXES> left_spot = {};
        Spot<0> right_spot = {};
        if (remaining > 0) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                left_spot.offset += counter.digit[i] * left_offset[i];
                right_spot.offset += counter.digit[i] * right_offset[i];
            }
            const Index tap[3] = {counter.digit[FIRST_TAP + 2], counter.digit[FIRST_TAP + 1], counter.digit[FIRST_TAP]};
            const Index number = (tap[0] * counter.extent[FIRST_TAP + 1] + tap[1]) * counter.extent[FIRST_TAP] + tap[2];
            left_spot.stand({tap[0] * jump[0], tap[1] * jump[1], tap[2] * jump[2]}, bit(number));
            counter.advance();
            remaining -= DEPTH;
        }
        left[place_of_left_step(threadIdx.x)] = left_spot;
        right[place_of_right_step(threadIdx.x)] = right_spot;
    }
};

// Computes one tile of result[row, column] = sum over taps and channels of images[row, tap, channel]
// w[tap, channel, column], which is forward and each phase of data_grad.
struct Gather {
    const Operand<First> images;
    const Operand<Second> w;
    const Sum* bias;
    Result* result;
    const Sweep sweep;
    const Index channels, columns, N;
    const Index (&extent)[3];  // of the images
    const Images &images_at, &result_at;
    const Weights& w_at;
    const Index w_channel, w_column;
    const Options& options;

    DEVICE void tile(Index g, Index row0, Index column0) const {
        Shared& shared = shared_tiles();
        __shared__ Tables tables;
        const Index all_rows = N * sweep.rows[0] * sweep.rows[1] * sweep.rows[2];
        if (row0 >= all_rows) return;  // the same in all threads: this residue has fewer rows than others
        const int rows = all_rows - row0 < TILE_ROWS ? int(all_rows - row0) : TILE_ROWS;
        const int columns_here = columns - column0 < TILE_COLUMNS ? int(columns - column0) : TILE_COLUMNS;
        set(tables, g, row0, rows, column0, columns_here);

        Products products = {};
        if (depth() > 0) {
            SweepSteps steps(sweep, channels, images_at, w_at, w_channel);
            multiply(products, shared.stages, tables, images, w, steps, depth(), rows, columns_here, extent);
        } else {
            __syncthreads();  // the tables are set
        }
        const Sum* const bias_here = options.has_bias ? bias + (g * columns + column0) : nullptr;
        const bool numbers = store<RESULT_VECTOR>(products, shared, tables, rows, columns_here, result, result_at.channel,
                                                  bias_here, options);
        if constexpr (DIRECTION == DATA_GRAD && AXES > 0)
            if (__syncthreads_or(!numbers) && __syncthreads_or(!weights_are_finite(tables, columns_here)))
                mend(tables, rows, columns_here, bias_here);
    }

    // The length of the reduction.
    DEVICE Index depth() const { return sweep.taps[0] * sweep.taps[1] * sweep.taps[2] * channels; }

    // Sets the coordinates of the tile's rows and columns; those that do not exist stay zero.
    DEVICE void set(Tables& tables, Index g, Index row0, int rows, Index column0, int columns_here) const {
        for (int r = threadIdx.x; r < TILE_ROWS; r += THREADS) {
            Spot<AXES> spot = {};
            if (r < rows) {
                Place from = place_of(row0 + r, sweep.rows, 1, 1, false), to = from;
                from.g = to.g = g;
                for (int axis = 0; axis < 3; ++axis) {
                    to.at[axis] = sweep.start[axis] + from.at[axis] * sweep.spread[axis];
                    from.at[axis] = sweep.origin[axis] + from.at[axis] * sweep.step[axis];
                }
                spot.offset = from.offset(images_at);
                spot.stand(from.at, taps_seen(from.at));
                tables.result_row[r] = to.offset(result_at) + column0 * result_at.channel;
            }
            tables.row[place_of_row(r)] = spot;
        }
        const WeightPlace first = {g, 0, 0, {sweep.first_tap[0], sweep.first_tap[1], sweep.first_tap[2]}};
        for (int c = threadIdx.x; c < TILE_COLUMNS; c += THREADS)
            tables.column[place_of_column(c)].offset = c < columns_here ? first.offset(w_at) + (column0 + c) * w_column : 0;
    }

    // Returns the predicate bits of a window with this origin: the bit of a tap is set if the tap is inside the image.
    DEVICE unsigned taps_seen(const Index (&begin)[3]) const {
        unsigned bits = 0;
        if constexpr (AXES == BY_TAP)
            for (Index step = 0; step < depth(); step += channels) {
                const Place tap = tap_and_channel(step);
                bool seen = true;
                for (int axis = 0; axis < 3; ++axis)
                    seen = seen && inside(begin[axis] + tap.at[axis] * sweep.jump[axis], extent[axis]);
                if (seen) bits |= bit(step / channels);
            }
        return bits;
    }

    // Non-finite fallback of data_grad. The main loop takes dy as zero beyond the outputs. If the weight is Inf or
    // NaN, such a product is NaN, although it is no part of the convolution. So where a sum is NaN and the tile has
    // non-finite weights, mend() recomputes it from the products that exist.

    // Whether all weights of the tile's columns that this thread tests are finite.
    DEVICE bool weights_are_finite(const Tables& tables, int columns_here) const {
        for (Index step = threadIdx.x; step < depth(); step += THREADS) {
            const Place at = tap_and_channel(step);
            for (int c = 0; c < columns_here; ++c)
                if (!is_finite(w[tables.column[place_of_column(c)].offset + offset_in_w(at)])) return false;
        }
        return true;
    }

    // Recomputes the results of the tile that are NaN, one thread for each.
    DEVICE void mend(const Tables& tables, int rows, int columns_here, const Sum* bias_here) const {
        for (int e = threadIdx.x; e < rows * columns_here; e += THREADS) {
            const int r = e / columns_here, c = e % columns_here;
            Result& to = result[tables.result_row[r] + c * result_at.channel];
            if (is_number(Converted<Sum>::from(to))) continue;
            Sum sum = {};
            for (Index step = 0; step < depth(); ++step) {
                const Place at = tap_and_channel(step);
                Place shift = at;
                for (int axis = 0; axis < 3; ++axis) shift.at[axis] *= sweep.jump[axis];
                Spot<AXES> spot = {shift.offset(images_at)};
                spot.stand(shift.at, bit(step / channels));
                const Spot<AXES>& row = tables.row[place_of_row(r)];
                if (row.meets(spot, extent))
                    add_product(sum, images[row.offset + spot.offset],
                                w[tables.column[place_of_column(c)].offset + offset_in_w(at)]);
            }
            finish(&to, 0, sum, bias_here, c, options);
        }
    }

    // Returns the tap and the channel of a step, in the order with channels innermost.
    DEVICE Place tap_and_channel(Index step) const { return place_of(step, sweep.taps, 1, channels, true); }

    // Returns the offset in w of a tap and channel, relative to the first tap of a column.
    DEVICE Index offset_in_w(const Place& at) const {
        Index offset = at.channel * w_channel;
        for (int axis = 0; axis < 3; ++axis) offset += at.at[axis] * sweep.tap_step[axis] * w_at.axis[axis];
        return offset;
    }
};

// y = conv(x, w) with bias and activation. A block computes a tile of TILE_ROWS outputs x TILE_COLUMNS filters of one
// group of y; a thread owns the accumulators that the warp's product gives it (products.cuh). Blocks: column tiles
// vary fastest, then groups, then row tiles.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
implicit_gemm_forward(const First* x_values, const First* x_y, const Second* w_values, const Sum* bias, Result* y,
                      Convolution conv, Images y_at, Images x_at, Weights w_at, Options options) {
    if constexpr (DIRECTION == FORWARD) {
        const Operand<First> x = {x_values, x_y, options.first_conjugated, options.first_derivative};
        const Operand<Second> w = {w_values, nullptr, options.second_conjugated, IDENTITY};
        Index block = blockIdx.x;
        const Index column_tiles = ceil_div(conv.F, TILE_COLUMNS);
        const Index column0 = block % column_tiles * TILE_COLUMNS;
        block /= column_tiles;
        const Gather gather = {x, w, bias, y, sweep_of_outputs(conv), conv.C, conv.F, conv.N, conv.input, x_at, y_at,
                               w_at, w_at.channel, w_at.filter, options};
        gather.tile(block % conv.G, block / conv.G * TILE_ROWS, column0);
    }
}

// dx = gradient of the convolution for x, with bias and activation. A block computes a tile of TILE_ROWS inputs, of
// one phase of the stride, x TILE_COLUMNS channels of one group of dx; a thread owns the accumulators that the warp's
// product gives it. Blocks: column tiles vary fastest, then groups, row tiles and phases. `row_tiles` is the number
// of row tiles of the longest phase.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
implicit_gemm_data_grad(const First* dy_values, const First* dy_y, const Second* w_values, const Sum* bias, Result* dx,
                        Convolution conv, Images dy_at, Images dx_at, Weights w_at, Index row_tiles, Options options) {
    if constexpr (DIRECTION == DATA_GRAD) {
        const Operand<First> dy = {dy_values, dy_y, options.first_conjugated, options.first_derivative};
        const Operand<Second> w = {w_values, nullptr, options.second_conjugated, IDENTITY};
        Index block = blockIdx.x;
        const Index column_tiles = ceil_div(conv.C, TILE_COLUMNS);
        const Index column0 = block % column_tiles * TILE_COLUMNS;
        block /= column_tiles;
        const Index g = block % conv.G;
        block /= conv.G;
        const Index row0 = block % row_tiles * TILE_ROWS;
        block /= row_tiles;
        Index start[3];
        for (int axis = 2; axis >= 0; --axis) {
            const Index residues = conv.stride[axis] < conv.input[axis] ? conv.stride[axis] : conv.input[axis];
            start[axis] = block % residues;
            block /= residues;
        }
        const Gather gather = {dy, w, bias, dx, sweep_of_residue(conv, start), conv.F, conv.C, conv.N, conv.output, dy_at,
                               dx_at, w_at, w_at.filter, w_at.channel, options};
        gather.tile(g, row0, column0);
    }
}

// ---------------------------------------------------------------------------------------------- weight_grad

// Computes the coordinates of the steps of weight_grad. A step is an output, from `first` on; thread i owns step i of
// each tile.
struct OutputSteps {
    Counter counter;
    Index left_offset[4], right_offset[4], left_first, stride[3], low[3];  // left_first: x offset of output 0's window
    Index remaining;

    DEVICE OutputSteps(const Convolution& conv, Index first, Index outputs, const Images& x_at, const Images& dy_at)
        : counter(first + threadIdx.x, conv.output[2], conv.output[1], conv.output[0], conv.N), left_first(0),
          remaining(outputs - threadIdx.x) {
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
    DEVICE void set(Spot<AXES>* left, Spot<0>* right) {
        if (threadIdx.x >= DEPTH) return;
        Spot<AXES> left_spot = {};
        Spot<0> right_spot = {};
        if (remaining > 0) {
            left_spot.offset = left_first;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                left_spot.offset += counter.digit[i] * left_offset[i];
                right_spot.offset += counter.digit[i] * right_offset[i];
            }
            left_spot.stand({counter.digit[2] * stride[0] - low[0], counter.digit[1] * stride[1] - low[1],
                             counter.digit[0] * stride[2] - low[2]}, 0);
            counter.advance();
            remaining -= DEPTH;
        }
        left[place_of_left_step(threadIdx.x)] = left_spot;
        right[place_of_right_step(threadIdx.x)] = right_spot;
    }
};

// First pass of weight_grad: partial[slice][g][tap][c][f] = sum over outputs [slice * length, (slice + 1) * length)
// of all N M P Q. A block computes a tile of TILE_ROWS taps and channels x TILE_COLUMNS filters of one group, for one
// split; a thread owns the accumulators that the warp's product gives it. Blocks: column tiles vary fastest, then row
// tiles, groups and splits.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
implicit_gemm_weight_grad(const First* dy_values, const First* dy_y, const Second* x_values, const Second* x_y,
                          Sum* partial, Convolution conv, Images dy_at, Images x_at, Index slices, Index length,
                          Options options) {
    if constexpr (DIRECTION == WEIGHT_GRAD) {
        Shared& shared = shared_tiles();
        __shared__ Tables tables;
        const Operand<First> dy = {dy_values, dy_y, options.first_conjugated, options.first_derivative};
        const Operand<Second> x = {x_values, x_y, options.second_conjugated, options.second_derivative};

        const Index all_rows = conv.kernel[0] * conv.kernel[1] * conv.kernel[2] * conv.C;
        const Index column_tiles = ceil_div(conv.F, TILE_COLUMNS), row_tiles = ceil_div(all_rows, TILE_ROWS);
        Index block = blockIdx.x;
        const Index column0 = block % column_tiles * TILE_COLUMNS;
        block /= column_tiles;
        const Index row0 = block % row_tiles * TILE_ROWS;
        block /= row_tiles;
        const Index g = block % conv.G, slice = block / conv.G;
        const int rows = all_rows - row0 < TILE_ROWS ? int(all_rows - row0) : TILE_ROWS;
        const int columns = conv.F - column0 < TILE_COLUMNS ? int(conv.F - column0) : TILE_COLUMNS;
        const Index outputs = conv.N * conv.output[0] * conv.output[1] * conv.output[2];
        const Index first = slice * length, last = slice == slices - 1 ? outputs : first + length;

        for (int r = threadIdx.x; r < TILE_ROWS; r += THREADS) {
            Spot<AXES> spot = {};
            if (r < rows) {
                const WeightPlace at = weight_place_of((row0 + r) * conv.F, conv);
                Place shift = {0, g, at.c, {}};
                for (int axis = 0; axis < 3; ++axis) shift.at[axis] = at.tap[axis] * conv.dilation[axis];
                spot.offset = shift.offset(x_at);
                spot.stand(shift.at, 0);
                tables.result_row[r] = ((slice * conv.G + g) * all_rows + row0 + r) * conv.F + column0;
            }
            tables.row[place_of_row(r)] = spot;
        }
        for (int c = threadIdx.x; c < TILE_COLUMNS; c += THREADS)
            tables.column[place_of_column(c)].offset = c < columns ? g * dy_at.group + (column0 + c) * dy_at.channel : 0;

        Products products = {};
        OutputSteps steps(conv, first, last - first, x_at, dy_at);
        multiply(products, shared.stages, tables, x, dy, steps, last - first, rows, columns, conv.input);
        store<RESULT_VECTOR>(products, shared, tables, rows, columns, partial, 1, nullptr, options);
    }
}

// Second pass of weight_grad: total = the sum of the splits, in order, and dw = total, rounded once. If `carried` is
// not 0, the sum starts from the total of earlier images. A block computes THREADS consecutive weights; a thread owns
// one.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
implicit_gemm_weight_grad_sum(const Sum* partial, Sum* total, Result* dw, Convolution conv, Weights dw_at, Index slices,
                              Index carried) {
    if constexpr (DIRECTION == WEIGHT_GRAD) {
        const Index weights = conv.G * conv.kernel[0] * conv.kernel[1] * conv.kernel[2] * conv.C * conv.F;
        const Index i = Index(blockIdx.x) * THREADS + threadIdx.x;
        if (i >= weights) return;
        Sum sum = carried ? total[i] : Sum{};
        for (Index slice = 0; slice < slices; ++slice) add(sum, partial[slice * weights + i]);
        total[i] = sum;
        dw[weight_place_of(i, conv).offset(dw_at)] = Converted<Result>::from(sum);
    }
}
