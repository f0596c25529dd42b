// Direct convolution: one thread computes one sum. These kernels are the reference for the faster ones, and accept
// every problem that a kernel can take.
//
//   forward      y[n, o, f]  = sum over t, c of x[n, o * stride + t * dilation - low, c] w[t, c, f]
//   data_grad    dx[n, i, c] = sum over f, and over t, o with o * stride + t * dilation - low = i,
//                              of dy[n, o, f] w[t, c, f]
//   weight_grad  dw[t, c, f] = sum over n, o of x[n, o * stride + t * dilation - low, c] dy[n, o, f]
//
// A thread owns one element of the result and gathers its products. In weight_grad it owns one element and one split
// of the outputs (split-K), and split_sum.cu adds the splits in a fixed order. Every order of summation is fixed by the shapes,
// so the same call returns the same bits. In forward and data_grad the products of one tap have an accumulator of their
// own, because two-level summation reduces the rounding error of long sums.
//
// Constants: THREADS. Arrays may have any strides.

// y = conv(x, w) with bias and activation. A block computes THREADS consecutive elements of y, in the order of
// place_of(). A thread owns one of them and iterates over its taps and channels.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
direct_forward(const First* x_values, const First* x_y, const Second* w_values, const Sum* bias,
               Result* y, Convolution conv, Images y_at, Images x_at, Weights w_at, Options options) {
    const Operand<First> x = {x_values, x_y, options.first_conjugated, options.first_derivative};
    const Operand<Second> w = {w_values, nullptr, options.second_conjugated, IDENTITY};
    const Index i = Index(blockIdx.x) * THREADS + threadIdx.x;  // [0, N G F M P Q), rounded up to whole blocks
    if (i >= conv.N * conv.G * conv.F * conv.output[0] * conv.output[1] * conv.output[2]) return;
    const Place o = place_of(i, conv.output, conv.G, conv.F, options.channels_innermost);

    Sum total = {};
    for (Index t = 0; t < conv.kernel[0]; ++t) {
        const Index d = o.at[0] * conv.stride[0] + t * conv.dilation[0] - conv.low[0];
        if (!inside(d, conv.input[0])) continue;
        for (Index r = 0; r < conv.kernel[1]; ++r) {
            const Index h = o.at[1] * conv.stride[1] + r * conv.dilation[1] - conv.low[1];
            if (!inside(h, conv.input[1])) continue;
            for (Index s = 0; s < conv.kernel[2]; ++s) {
                const Index v = o.at[2] * conv.stride[2] + s * conv.dilation[2] - conv.low[2];
                if (!inside(v, conv.input[2])) continue;
                const Index x_tap = Place{o.n, o.g, 0, {d, h, v}}.offset(x_at);
                const Index w_tap = WeightPlace{o.g, 0, o.channel, {t, r, s}}.offset(w_at);
                Sum sum = {};
                for (Index c = 0; c < conv.C; ++c)
                    add_product(sum, x[x_tap + c * x_at.channel], w[w_tap + c * w_at.channel]);
                add(total, sum);
            }
        }
    }
    finish(y, o.offset(y_at), total, bias, o.g * conv.F + o.channel, options);
}

// Iterates over the taps of one axis for an input i, and yields the output that each tap connects with it: for tap t,
// (i + low - t * dilation) / stride, if that is an integer. The division is done once; next() subtracts
// dilation / stride. quotient * stride + remainder is exact at every tap. Where it is negative and the remainder is 0,
// the quotient is negative, so exists() returns false.
struct OutputOfTap {
    Index quotient, remainder, back, back_remainder;

    DEVICE OutputOfTap(Index i, const Convolution& conv, int axis) {
        const Index shifted = i + conv.low[axis], stride = conv.stride[axis];
        quotient = shifted / stride;
        remainder = shifted % stride;
        back = conv.dilation[axis] / stride;
        back_remainder = conv.dilation[axis] % stride;
    }
    DEVICE bool exists(const Convolution& conv, int axis) const {
        return remainder == 0 && inside(quotient, conv.output[axis]);
    }
    DEVICE void next(const Convolution& conv, int axis) {
        quotient -= back;
        remainder -= back_remainder;
        if (remainder < 0) {
            remainder += conv.stride[axis];
            --quotient;
        }
    }
};

// dx = gradient of the convolution for x, with bias and activation. A block computes THREADS consecutive elements of
// dx, in the order of place_of(). A thread owns one of them and iterates over the taps that reach it, and over the
// filters.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
direct_data_grad(const First* dy_values, const First* dy_y, const Second* w_values, const Sum* bias,
                 Result* dx, Convolution conv, Images dy_at, Images dx_at, Weights w_at, Options options) {
    const Operand<First> dy = {dy_values, dy_y, options.first_conjugated, options.first_derivative};
    const Operand<Second> w = {w_values, nullptr, options.second_conjugated, IDENTITY};
    const Index i = Index(blockIdx.x) * THREADS + threadIdx.x;  // [0, N G C D H W), rounded up to whole blocks
    if (i >= conv.N * conv.G * conv.C * conv.input[0] * conv.input[1] * conv.input[2]) return;
    const Place in = place_of(i, conv.input, conv.G, conv.C, options.channels_innermost);

    Sum total = {};
    OutputOfTap m(in.at[0], conv, 0);
    for (Index t = 0; t < conv.kernel[0]; ++t, m.next(conv, 0)) {
        if (!m.exists(conv, 0)) continue;
        OutputOfTap p(in.at[1], conv, 1);
        for (Index r = 0; r < conv.kernel[1]; ++r, p.next(conv, 1)) {
            if (!p.exists(conv, 1)) continue;
            OutputOfTap q(in.at[2], conv, 2);
            for (Index s = 0; s < conv.kernel[2]; ++s, q.next(conv, 2)) {
                if (!q.exists(conv, 2)) continue;
                const Index dy_tap = Place{in.n, in.g, 0, {m.quotient, p.quotient, q.quotient}}.offset(dy_at);
                const Index w_tap = WeightPlace{in.g, in.channel, 0, {t, r, s}}.offset(w_at);
                Sum sum = {};
                for (Index f = 0; f < conv.F; ++f)
                    add_product(sum, dy[dy_tap + f * dy_at.channel], w[w_tap + f * w_at.filter]);
                add(total, sum);
            }
        }
    }
    finish(dx, in.offset(dx_at), total, bias, in.g * conv.C + in.channel, options);
}

// First pass of weight_grad. partial[split][element of dw] is the sum over the outputs
// [split * length, (split + 1) * length) of all N M P Q. A block computes THREADS consecutive elements of `partial`.
// A thread owns one of them: one weight and one split of the outputs.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
direct_weight_grad(const First* dy_values, const First* dy_y, const Second* x_values, const Second* x_y, Sum* partial,
                   Convolution conv, Images dy_at, Images x_at, Index splits, Index length, Options options) {
    const Operand<First> dy = {dy_values, dy_y, options.first_conjugated, options.first_derivative};
    const Operand<Second> x = {x_values, x_y, options.second_conjugated, options.second_derivative};
    const Index weights = conv.G * conv.kernel[0] * conv.kernel[1] * conv.kernel[2] * conv.C * conv.F;
    const Index i = Index(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= splits * weights) return;
    const WeightPlace at = weight_place_of(i % weights, conv);
    const Index first = i / weights * length;
    const Index outputs = conv.N * conv.output[0] * conv.output[1] * conv.output[2];
    const Index last = first + length < outputs ? first + length : outputs;

    Sum sum = {};
    Place o = place_of(first, conv.output, 1, 1, false);
    o.g = at.g;
    o.channel = at.f;
    for (Index output = first; output < last; ++output) {
        Place in = {o.n, at.g, at.c, {}};
        if (input_of(in, o, at.tap, conv)) add_product(sum, x[in.offset(x_at)], dy[o.offset(dy_at)]);
        // Advances to the next output: the last axis varies fastest and carries into those before it, then into n.
        ++o.at[2];
        for (int axis = 2; axis > 0 && o.at[axis] == conv.output[axis]; --axis) {
            o.at[axis] = 0;
            ++o.at[axis - 1];
        }
        if (o.at[0] == conv.output[0]) {
            o.at[0] = 0;
            ++o.n;
        }
    }
    partial[i] = sum;
}
