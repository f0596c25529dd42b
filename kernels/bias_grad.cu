// bias_grad: db[channel] = sum of dy over all images and positions, in two passes with a fixed order of additions.
//
//                  channels (LANES of a block)
//                  . . . .
//   positions      . . . .     pass 1: a thread sums every ROWS-th position of a chunk for one channel; the block adds
//   (a chunk)      . . . .             the sums of its rows in shared memory, and stores one for each channel
//                  . . . .     pass 2: the same for the partial sums of all splits
//
// dy is read once. LANES consecutive threads read consecutive channels, the others consecutive positions: which of them
// are side by side in memory decides about LANES.
//
// Constants, in addition to those of common.cuh (Sum is double precision: float32 sums of many similar terms drift):
//   LANES, ROWS    threads of a block along the channels and along the positions; ROWS is a power of two
//   CHUNK          positions of one image that a block reads before it advances: a multiple of ROWS
//   THREADS        LANES * ROWS

static_assert(LANES * ROWS == THREADS && (ROWS & (ROWS - 1)) == 0 && CHUNK % ROWS == 0, "rows are halved until one is left");

// Returns, to the threads of the first row, the sum over all rows of a block, by a tree in shared memory.
DEVICE Sum sum_of_rows(Sum sum, int row, int lane) {
    __shared__ Sum sums[ROWS][LANES];
    sums[row][lane] = sum;
    for (int half = ROWS / 2; half > 0; half /= 2) {
        __syncthreads();  // the sums of both halves of the rows are stored
        if (row < half) add(sums[row][lane], sums[row + half][lane]);
    }
    return sums[row][lane];
}

// First pass. partial[split][channel] is the sum over the chunks [split * length, (split + 1) * length) of all images. A
// block computes LANES channels of one split. A thread owns one channel and every ROWS-th position of each chunk.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
bias_grad(const First* dy_values, const First* dy_y, Sum* partial, Index images, Index positions, Index channels,
          Index group_channels, Index length, Index image_step, Index position_step, Index group_step,
          Index channel_step, Index derivative) {
    const Operand<First> dy = {dy_values, dy_y, 0, int(derivative)};
    const int lane = threadIdx.x % LANES, row = threadIdx.x / LANES;
    const Index tiles = ceil_div(channels, LANES), chunks = ceil_div(positions, CHUNK);
    const Index split = blockIdx.x / tiles, channel = blockIdx.x % tiles * LANES + lane, first = split * length;
    const Index last = first + length < images * chunks ? first + length : images * chunks;

    Sum sum = {};
    if (channel < channels) {
        const Index at = channel / group_channels * group_step + channel % group_channels * channel_step;
        for (Index chunk = first; chunk < last; ++chunk) {
            const Index image = at + chunk / chunks * image_step, begin = chunk % chunks * CHUNK + row;
#pragma unroll
            for (int i = 0; i < CHUNK; i += ROWS)
                if (begin + i < positions) add(sum, dy[image + (begin + i) * position_step]);
        }
    }
    sum = sum_of_rows(sum, row, lane);
    if (row == 0 && channel < channels) partial[split * channels + channel] = sum;
}

// Second pass. A block computes LANES channels of db. A thread owns one channel and every ROWS-th split; the order of the
// additions depends on the shapes alone.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
bias_grad_sum(const Sum* partial, Result* db, Index splits, Index channels) {
    const int lane = threadIdx.x % LANES, row = threadIdx.x / LANES;
    const Index channel = Index(blockIdx.x) * LANES + lane;
    Sum sum = {};
    if (channel < channels)
        for (Index split = row; split < splits; split += ROWS) add(sum, partial[split * channels + channel]);
    sum = sum_of_rows(sum, row, lane);
    if (row == 0 && channel < channels) db[channel] = Converted<Result>::from(sum);
}
