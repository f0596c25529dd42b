// Second pass of split-K: adds the partial sums of all splits, in a fixed order, and applies the epilogue.
//
//   partial[split][element]        result[element] = activation(bias + partial[0][element] + partial[1][element] + ...)
//       . . . . .   split 0
//       . . . . .   split 1        A warp reads neighbours. It writes neighbours if partial sums are in the memory order of
//       . . . . .   ...            the result, as those of forward and data_grad are.
//
// Constants: HAS_BIAS, ACTIVATION (by its number in common.cuh), ROWS (threads of an element), THREADS.

constexpr int LANES = THREADS / ROWS;  // elements of a block

// A block computes LANES consecutive elements. ROWS threads share an element: each adds every ROWS-th split, and their sums
// are added in shared memory. With one, the splits are added one after another, as a single block of the first pass does.
// `extent` holds the extents of the elements' axes from the fastest one on, `step` and `bias_step` the strides of result
// and bias along them. The sums are stored in `total`, which may be the partial sums of the first split. If `accumulate`
// is not 0, they start from those that are there, of earlier images.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
split_sum(const Sum* partial, Sum* total, const Sum* bias, Result* result, Elements elements) {
    __shared__ Sum sums[ROWS][LANES];
    const int lane = threadIdx.x % LANES, row = threadIdx.x / LANES;
    const Index i = Index(blockIdx.x) * LANES + lane;
    Sum sum = {};
    if (i < elements.count) {
        if (row == 0 && elements.accumulate) sum = total[i];
        for (Index split = row; split < elements.splits; split += ROWS) add(sum, partial[split * elements.count + i]);
    }
    if constexpr (ROWS > 1) {
        sums[row][lane] = sum;
        __syncthreads();  // the sums of all rows are stored
    }
    if (row > 0 || i >= elements.count) return;
    for (int other = 1; other < ROWS; ++other) add(sum, sums[other][lane]);
    total[i] = sum;

    Index number = i, at = 0, bias_at = 0;
#pragma unroll
    for (int axis = 0; axis < 6; ++axis) {
        const Index digit = axis < 5 ? take_digit(number, elements.extent[axis]) : number;
        at += digit * elements.step[axis];
        bias_at += digit * elements.bias_step[axis];
    }
    if (HAS_BIAS) add(sum, bias[bias_at]);
    result[at] = Converted<Result>::from(activated(sum, ACTIVATION));
}
