// Gradients by scatter-add: each product of dy contributes to the element of dx or dw that it belongs to, and atomic
// additions combine the contributions of different blocks.
//
//   data_grad    dx[n, o * stride + t * dilation - low, c] += dy[n, o, f] w[t, c, f]
//   weight_grad  dw[t, c, f] += x[n, o * stride + t * dilation - low, c] dy[n, o, f]
//
// dx and dw have the type of the accumulators (at least float32) and are zero before the launch. The order of additions
// by different blocks is not fixed, so the last bits may differ from call to call. Atomic additions to global memory
// limit such a kernel. A block therefore sums in registers first, then in shared memory, and issues one atomic addition
// for each finished sum. The reference kernels at the end do not sum beforehand.
//
// Constants: THREADS, WIDTH (channels or filters of a tile), ROW, TILE_OUTPUTS and CHUNK (data_grad), TILE_ROWS and
// DEPTH (weight_grad). Arrays may have any strides.

constexpr int THREAD_CHANNELS = WIDTH < 4 ? WIDTH : 4;  // channels (or filters) that a thread owns
constexpr int CHANNEL_THREADS = WIDTH / THREAD_CHANNELS;

// Padding of the rows of tiles in shared memory. Rows are accessed as vectors; with the padding they begin four banks
// apart, which avoids bank conflicts.
constexpr int PAD = 4;

// Coordinate of an element of a tile.
struct Cell { int row, column; };

// Both functions return the e-th element to copy from global memory. cell_by_columns() is for tiles whose columns are
// contiguous in global memory: a warp copies 8 rows by 4 columns, so that it reads whole sectors of 32 bytes and stores
// to all 32 banks. cell_by_rows() is for tiles whose rows are contiguous.
DEVICE Cell cell_by_columns(int e, int columns) { return {e / (8 * columns) * 8 + e % 8, e / 8 % columns}; }
DEVICE Cell cell_by_rows(int e, int columns) { return {e / columns, e % columns}; }

// sum[i][j] += a[i] b[j]. Rows are read as vectors, because scalar accesses of threads whose rows are far apart would have
// bank conflicts.
template <int ROWS, int COLUMNS>
DEVICE void add_outer_product(Sum (&sum)[ROWS][COLUMNS], const Sum* a_row, const Sum* b_row) {
    const Numbers<Sum, ROWS> a = *reinterpret_cast<const Numbers<Sum, ROWS>*>(a_row);
    const Numbers<Sum, COLUMNS> b = *reinterpret_cast<const Numbers<Sum, COLUMNS>*>(b_row);
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) add_product(sum[i][j], a.v[i], b.v[j]);
}

// Adds COUNT values to a row of sums in shared memory. No other thread may access these sums at the same time.
template <int COUNT> DEVICE void add_to_row(Sum* row, const Sum (&values)[COUNT]) {
    Numbers<Sum, COUNT>* const to = reinterpret_cast<Numbers<Sum, COUNT>*>(row);
    Numbers<Sum, COUNT> numbers = *to;
    for (int j = 0; j < COUNT; ++j) add(numbers.v[j], values[j]);
    *to = numbers;
}

// Adds COUNT sums of a row to the result by atomic additions. Only the first `left` of them exist in the result;
// `fours` says that all COUNT exist, are contiguous and can be added by one float4 addition. Zero sums are skipped,
// because they would not change the result; elements that no product reached are among them.
template <int COUNT, class T> DEVICE void flush(T* to, const T* row, Index left, Index step, bool fours) {
    const Numbers<T, COUNT> sums = *reinterpret_cast<const Numbers<T, COUNT>*>(row);
    if constexpr (COUNT == 4 && sizeof(T) == sizeof(float)) {
        if (fours) {
            const float4 four = make_float4(sums.v[0], sums.v[1], sums.v[2], sums.v[3]);
            if (four.x != 0 || four.y != 0 || four.z != 0 || four.w != 0) atomic_add(to, four);
            return;
        }
    }
#pragma unroll
    for (int j = 0; j < COUNT; ++j)
        if (j < left && !is_zero(sums.v[j])) atomic_add(to + j * step, sums.v[j]);
}

// ---------------------------------------------------------------------------------------------- data_grad
//
// A block owns a box of outputs, a box of taps and WIDTH channels of one group of one image. The windows of its outputs
// lie in one region of x. The block keeps the gradient of that region in shared memory:
//
//     dy  box of outputs         region of dx (here 3x3 taps, stride 1)
//         o o o o                  + + + + + +
//         o o o o     for each     + + + + + +      then one atomic addition for each
//         o o o o   tap: += dy w   + + + + + +      element of the region and channel
//                                  + + + + + +
//                                  + + + + + +
//
// For one tap the sum over all filters is a matrix product with the result outputs x channels, accumulated in
// registers. The sums of one tap after another are added to the region. For a fixed tap the mapping from outputs to
// inputs is injective, so no two threads write the same address.

constexpr int THREAD_OUTPUTS = TILE_OUTPUTS * WIDTH / (THREADS * THREAD_CHANNELS);
static_assert(THREAD_OUTPUTS * THREADS * THREAD_CHANNELS == TILE_OUTPUTS * WIDTH, "threads share the tile evenly");

// A block computes the contribution of its outputs and taps, over all filters, to WIDTH channels of a region of dx. A
// thread owns THREAD_OUTPUTS x THREAD_CHANNELS accumulators of the current tap. The main loop runs over CHUNK filters
// at a time, the epilogue adds the region to dx. Blocks: channel tiles vary fastest, then groups, boxes of taps,
// boxes of outputs and images.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
scatter_data_grad(const First* dy_values, const First* dy_y, const Second* w_values, Sum* dx,
                  Convolution conv, Images dy_at, Images dx_at, Weights w_at, Boxes boxes, Options options) {
    __shared__ __align__(16) Sum dy_tile[CHUNK][TILE_OUTPUTS + PAD];
    __shared__ __align__(16) Sum w_tile[CHUNK][WIDTH];
    __shared__ Index dy_offset[TILE_OUTPUTS];  // offset in dy of the first filter of each output
    __shared__ int region_row[TILE_OUTPUTS];   // row of the region that the first tap adds to; -1: no such output
    DYNAMIC_SHARED(Sum, region);               // [positions of the region][ROW], of which WIDTH columns are used

    const Operand<First> dy = {dy_values, dy_y, options.first_conjugated, options.first_derivative};
    const Operand<Second> w = {w_values, nullptr, options.second_conjugated, IDENTITY};
    const int thread = threadIdx.x;
    const int channel_of_thread = thread % CHANNEL_THREADS * THREAD_CHANNELS;  // [0, WIDTH)
    const int output_of_thread = thread / CHANNEL_THREADS * THREAD_OUTPUTS;    // [0, TILE_OUTPUTS)

    Index first_output[3], first_tap[3];
    Index block = blockIdx.x;
    const Index channel_tiles = ceil_div(conv.C, WIDTH);
    const Index c0 = block % channel_tiles * WIDTH;
    block /= channel_tiles;
    const Index g = block % conv.G;
    block /= conv.G;
    block = take_box(first_tap, block, conv.kernel, boxes.taps);
    const Index n = take_box(first_output, block, conv.output, boxes.outputs);

    const int box_outputs = boxes.outputs[0] * boxes.outputs[1] * boxes.outputs[2];
    const int positions = boxes.region[0] * boxes.region[1] * boxes.region[2];
    for (int j = thread; j < TILE_OUTPUTS; j += THREADS) {
        const int in_box[3] = {j / (boxes.outputs[1] * boxes.outputs[2]), j / boxes.outputs[2] % boxes.outputs[1],
                               j % boxes.outputs[2]};
        Place o = {n, g, 0, {}};
        bool exists = j < box_outputs;
        int row = 0;
        for (int axis = 0; axis < 3 && exists; ++axis) {
            o.at[axis] = first_output[axis] + in_box[axis];
            exists = o.at[axis] < conv.output[axis];
            row = row * boxes.region[axis] + in_box[axis] * int(conv.stride[axis]);
        }
        dy_offset[j] = o.offset(dy_at);
        region_row[j] = exists ? row : -1;
    }
    for (int e = thread; e < positions * ROW; e += THREADS) region[e] = Sum{};

    const int taps = boxes.taps[0] * boxes.taps[1] * boxes.taps[2];
    for (int k = 0; k < taps; ++k) {
        const int in_box[3] = {k / (boxes.taps[1] * boxes.taps[2]), k / boxes.taps[2] % boxes.taps[1],
                               k % boxes.taps[2]};
        WeightPlace tap = {g, 0, 0, {}};
        bool exists = true;
        int tap_row = 0;
        for (int axis = 0; axis < 3; ++axis) {
            tap.tap[axis] = first_tap[axis] + in_box[axis];
            exists = exists && tap.tap[axis] < conv.kernel[axis];
            tap_row = tap_row * boxes.region[axis] + in_box[axis] * int(conv.dilation[axis]);
        }
        if (!exists) continue;  // uniform: all threads of the block take the same branch
        const Index w_tap = tap.offset(w_at);

        Sum sum[THREAD_OUTPUTS][THREAD_CHANNELS] = {};
        for (Index f0 = 0; f0 < conv.F; f0 += CHUNK) {
            const int depth = conv.F - f0 < CHUNK ? int(conv.F - f0) : CHUNK;
            __syncthreads();  // the tables and the region are set, and the tiles of the last chunk have been read
            for (int e = thread; e < CHUNK * TILE_OUTPUTS; e += THREADS) {
                const auto [f, j] = options.channels_innermost ? cell_by_columns(e, TILE_OUTPUTS)
                                                               : cell_by_rows(e, TILE_OUTPUTS);
                if (f < depth)
                    dy_tile[f][j] = region_row[j] >= 0 ? dy[dy_offset[j] + (f0 + f) * dy_at.channel] : Sum{};
            }
            for (int e = thread; e < CHUNK * WIDTH; e += THREADS) {
                const auto [f, c] = cell_by_rows(e, WIDTH);
                if (f < depth)
                    w_tile[f][c] = c0 + c < conv.C ? w[w_tap + (c0 + c) * w_at.channel + (f0 + f) * w_at.filter] : Sum{};
            }
            __syncthreads();  // the tiles are whole
            for (int f = 0; f < depth; ++f)
                add_outer_product(sum, &dy_tile[f][output_of_thread], &w_tile[f][channel_of_thread]);
        }
        // With the next tap another thread may add to the same element. The barriers of the main loop come in between.
        for (int i = 0; i < THREAD_OUTPUTS; ++i) {
            const int row = region_row[output_of_thread + i];
            if (row >= 0) add_to_row(&region[(row + tap_row) * ROW + channel_of_thread], sum[i]);
        }
    }

    __syncthreads();  // the region is complete
    constexpr int STEP = WIDTH < 4 ? 1 : 4;
    for (int e = thread; e < positions * (WIDTH / STEP); e += THREADS) {
        const int position = options.channels_innermost ? e / (WIDTH / STEP) : e % positions;
        const int c = (options.channels_innermost ? e % (WIDTH / STEP) : e / positions) * STEP;
        const int in_region[3] = {position / (boxes.region[1] * boxes.region[2]),
                                  position / boxes.region[2] % boxes.region[1], position % boxes.region[2]};
        Place i = {n, g, c0 + c, {}};
        bool exists = i.channel < conv.C;
        for (int axis = 0; axis < 3; ++axis) {
            i.at[axis] = first_output[axis] * conv.stride[axis] + first_tap[axis] * conv.dilation[axis] - conv.low[axis]
                       + in_region[axis];
            exists = exists && inside(i.at[axis], conv.input[axis]);
        }
        if (!exists) continue;
        flush<STEP>(dx + i.offset(dx_at), &region[position * ROW + c], conv.C - i.channel, dx_at.channel, options.fours);
    }
}

// ---------------------------------------------------------------------------------------------- weight_grad
//
// A block owns TILE_ROWS rows (a row is a tap and a channel) and WIDTH filters of one group, and one split of all
// outputs (split-K). The sum over the split is a matrix product with the result rows x filters, computed DEPTH outputs at a
// time:
//
//     x_tile  DEPTH x rows     dy_tile  DEPTH x filters       sum  rows x filters
//         . . . . . .              . . .                          . . .
//         . . . . . .              . . .          +=              . . .     then one atomic addition
//         . . . . . .              . . .                          . . .     for each element
//
// Where one thread per THREAD_ROWS x THREAD_CHANNELS elements leaves threads over, the block has TEAMS teams of
// threads. A team accumulates every TEAMS-th output, and the sums of the teams are added in shared memory.

constexpr int THREAD_ROWS = 4;
constexpr int ROW_THREADS = TILE_ROWS / THREAD_ROWS;
constexpr int TEAMS = THREADS / (ROW_THREADS * CHANNEL_THREADS);
static_assert(TEAMS * ROW_THREADS * CHANNEL_THREADS == THREADS, "teams of threads share the block evenly");

// A block computes the contribution of its split of the outputs to a tile of TILE_ROWS x WIDTH elements of dw. A
// thread owns THREAD_ROWS x THREAD_CHANNELS accumulators of its team. The main loop runs over DEPTH outputs at a
// time; the epilogue adds the sums of the teams and then the tile to dw. Blocks: filter tiles vary fastest, then row
// tiles, groups and splits.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
scatter_weight_grad(const First* dy_values, const First* dy_y, const Second* x_values, const Second* x_y, Sum* dw,
                    Convolution conv, Images dy_at, Images x_at, Weights dw_at, Index splits, Index length,
                    Options options) {
    __shared__ __align__(16) Sum x_tile[DEPTH][TILE_ROWS + PAD];
    __shared__ __align__(16) Sum dy_tile[DEPTH][WIDTH + (WIDTH % 32 == 0 ? PAD : 0)];
    __shared__ __align__(16) Sum total[TILE_ROWS][WIDTH];
    __shared__ Index dy_offset[DEPTH], x_offset[DEPTH];  // offset of each output in dy, of its window's origin in x
    __shared__ Index window[DEPTH][3];                   // position of the window's origin
    __shared__ Index row_offset[TILE_ROWS];              // offset of each row (tap and channel) within the window
    __shared__ Index row_shift[TILE_ROWS][3];            // position of the row's tap within the window

    const Operand<First> dy = {dy_values, dy_y, options.first_conjugated, options.first_derivative};
    const Operand<Second> x = {x_values, x_y, options.second_conjugated, options.second_derivative};
    const int thread = threadIdx.x;
    const int filter_of_thread = thread % CHANNEL_THREADS * THREAD_CHANNELS;                // [0, WIDTH)
    const int row_of_thread = thread / CHANNEL_THREADS % ROW_THREADS * THREAD_ROWS;         // [0, TILE_ROWS)
    const int own_team = thread / (CHANNEL_THREADS * ROW_THREADS);                          // [0, TEAMS)

    const Index rows = conv.kernel[0] * conv.kernel[1] * conv.kernel[2] * conv.C;
    const Index row_tiles = ceil_div(rows, TILE_ROWS), filter_tiles = ceil_div(conv.F, WIDTH);
    Index block = blockIdx.x;
    const Index f0 = block % filter_tiles * WIDTH;
    block /= filter_tiles;
    const Index row0 = block % row_tiles * TILE_ROWS;
    block /= row_tiles;
    const Index g = block % conv.G;
    const Index split = block / conv.G;  // [0, splits)
    const Index outputs = conv.N * conv.output[0] * conv.output[1] * conv.output[2];
    const Index last = split == splits - 1 ? outputs : (split + 1) * length;

    for (int j = thread; j < TILE_ROWS && row0 + j < rows; j += THREADS) {
        const WeightPlace at = weight_place_of((row0 + j) * conv.F, conv);
        Place shift = {0, 0, at.c, {}};
        for (int axis = 0; axis < 3; ++axis) {
            shift.at[axis] = at.tap[axis] * conv.dilation[axis];
            row_shift[j][axis] = shift.at[axis];
        }
        row_offset[j] = shift.offset(x_at);
    }
    for (int e = thread; e < TILE_ROWS * WIDTH; e += THREADS) total[e / WIDTH][e % WIDTH] = Sum{};

    Sum sum[THREAD_ROWS][THREAD_CHANNELS] = {};
    for (Index first = split * length; first < last; first += DEPTH) {
        const int depth = last - first < DEPTH ? int(last - first) : DEPTH;
        for (int k = thread; k < depth; k += THREADS) {
            Place o = place_of(first + k, conv.output, 1, 1, false);
            o.g = g;
            dy_offset[k] = o.offset(dy_at);
            for (int axis = 0; axis < 3; ++axis) {
                o.at[axis] = o.at[axis] * conv.stride[axis] - conv.low[axis];
                window[k][axis] = o.at[axis];
            }
            x_offset[k] = o.offset(x_at);
        }
        __syncthreads();  // the tables are complete, and the tiles of the last outputs have been read
        for (int e = thread; e < DEPTH * TILE_ROWS; e += THREADS) {
            const auto [k, j] = options.channels_innermost ? cell_by_rows(e, TILE_ROWS)
                                                           : cell_by_columns(e, TILE_ROWS);
            if (k >= depth) continue;
            bool seen = row0 + j < rows;
            for (int axis = 0; axis < 3; ++axis)
                seen = seen && inside(window[k][axis] + row_shift[j][axis], conv.input[axis]);
            x_tile[k][j] = seen ? x[x_offset[k] + row_offset[j]] : Sum{};
        }
        for (int e = thread; e < DEPTH * WIDTH; e += THREADS) {
            const auto [k, f] = options.channels_innermost ? cell_by_rows(e, WIDTH)
                                                           : cell_by_columns(e, WIDTH);
            if (k < depth) dy_tile[k][f] = f0 + f < conv.F ? dy[dy_offset[k] + (f0 + f) * dy_at.channel] : Sum{};
        }
        __syncthreads();  // the tiles are whole
        for (int k = own_team; k < depth; k += TEAMS)
            add_outer_product(sum, &x_tile[k][row_of_thread], &dy_tile[k][filter_of_thread]);
    }

    // The teams add one after the other. Within a team no two threads own the same element.
    for (int team = 0; team < TEAMS; ++team) {
        __syncthreads();  // the team before has added its sums (and total is set)
        if (team != own_team) continue;
        for (int i = 0; i < THREAD_ROWS; ++i) add_to_row(&total[row_of_thread + i][filter_of_thread], sum[i]);
    }
    __syncthreads();  // total is complete
    constexpr int STEP = WIDTH < 4 ? 1 : 4;
    for (int e = thread; e < TILE_ROWS * (WIDTH / STEP); e += THREADS) {
        const int j = e / (WIDTH / STEP), f = e % (WIDTH / STEP) * STEP;
        if (row0 + j >= rows || f0 + f >= conv.F) continue;
        WeightPlace at = weight_place_of((row0 + j) * conv.F + f0 + f, conv);
        at.g = g;
        flush<STEP>(dw + at.offset(dw_at), &total[j][f], conv.F - at.f, dw_at.filter, options.fours);
    }
}

// ---------------------------------------------------------------------------------------------- reference kernels
// They issue one atomic addition for each product: to read first, and to compare the kernels above with.

// dx += the products of dy and w. A block handles THREADS consecutive elements of dy. A thread owns one of them and
// adds each of its products to an element of dx.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
scatter_data_grad_plain(const First* dy_values, const First* dy_y, const Second* w_values, Sum* dx,
                        Convolution conv, Images dy_at, Images dx_at, Weights w_at, Options options) {
    const Operand<First> dy = {dy_values, dy_y, options.first_conjugated, options.first_derivative};
    const Operand<Second> w = {w_values, nullptr, options.second_conjugated, IDENTITY};
    const Index e = Index(blockIdx.x) * THREADS + threadIdx.x;
    if (e >= conv.N * conv.G * conv.F * conv.output[0] * conv.output[1] * conv.output[2]) return;
    const Place o = place_of(e, conv.output, conv.G, conv.F, options.channels_innermost);
    const Sum gradient = dy[o.offset(dy_at)];
    const Index weights = conv.kernel[0] * conv.kernel[1] * conv.kernel[2] * conv.C;
    for (Index k = 0; k < weights; ++k) {
        WeightPlace at = weight_place_of(k * conv.F, conv);
        at.g = o.g;
        at.f = o.channel;
        Place i = {o.n, o.g, at.c, {}};
        if (!input_of(i, o, at.tap, conv)) continue;
        Sum product = {};
        add_product(product, gradient, w[at.offset(w_at)]);
        atomic_add(dx + i.offset(dx_at), product);
    }
}

// dw += the products of x and dy. A block handles THREADS consecutive elements of dy. A thread owns one of them and
// adds each of its products to an element of dw.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
scatter_weight_grad_plain(const First* dy_values, const First* dy_y, const Second* x_values, const Second* x_y, Sum* dw,
                          Convolution conv, Images dy_at, Images x_at, Weights dw_at, Options options) {
    const Operand<First> dy = {dy_values, dy_y, options.first_conjugated, options.first_derivative};
    const Operand<Second> x = {x_values, x_y, options.second_conjugated, options.second_derivative};
    const Index e = Index(blockIdx.x) * THREADS + threadIdx.x;
    if (e >= conv.N * conv.G * conv.F * conv.output[0] * conv.output[1] * conv.output[2]) return;
    const Place o = place_of(e, conv.output, conv.G, conv.F, options.channels_innermost);
    const Sum gradient = dy[o.offset(dy_at)];
    const Index weights = conv.kernel[0] * conv.kernel[1] * conv.kernel[2] * conv.C;
    for (Index k = 0; k < weights; ++k) {
        WeightPlace at = weight_place_of(k * conv.F, conv);
        at.g = o.g;
        at.f = o.channel;
        Place i = {o.n, o.g, at.c, {}};
        if (!input_of(i, o, at.tap, conv)) continue;
        Sum product = {};
        add_product(product, x[i.offset(x_at)], gradient);
        atomic_add(dw + at.offset(dw_at), product);
    }
}
