// Second pass of split-K: adds the partial sums of all splits, in their order, and applies the epilogue.
//
//   partial[split][element]        result[element] = activation(bias + partial[0][element] + partial[1][element] + ...)
//       . . . . .   split 0
//       . . . . .   split 1        A thread owns an element. Partial sums are in the memory order of the result, so that
//       . . . . .   ...            a warp reads neighbours and writes neighbours.
//
// Constants: THREADS, HAS_BIAS, ACTIVATION (by its number in common.cuh).

// A block computes THREADS consecutive elements. `extent` holds the extents of the elements' axes from the fastest one
// on, `step` and `bias_step` the strides of result and bias along them. The sums are stored in `total`, which may be the
// partial sums of the first split. If `accumulate` is not 0, they start from those that are there, of earlier images.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
split_sum(const Sum* partial, Sum* total, const Sum* bias, Result* result, Elements elements) {
    const Index i = Index(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= elements.count) return;
    Sum sum = elements.accumulate ? total[i] : Sum{};
    for (Index split = 0; split < elements.splits; ++split) add(sum, partial[split * elements.count + i]);
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
