// Definitions that all kernels share: arithmetic on element types, activations, operand loads, the epilogue of one
// element, and coordinates.
//
// gpuconv/gpu/kernel.py puts these definitions in front of this file:
//   First, Second  element types of the two operands: x and w (forward), dy and w (data_grad), dy and x (weight_grad)
//   Result, Sum    element type of the result, and the type of the accumulators
//   Index          int, or long long where a tensor needs 64-bit indices
//   Convolution    extents, strides, dilation and padding of the convolution
//   Images         strides, in elements, of x or y and their gradients
//   Weights        strides, in elements, of w or dw
//   Boxes          extents of the boxes of outputs and taps that a block of scatter_data_grad owns, and of their region
//   Options        the choices that a kernel is launched with (conjugation, bias, activation and others)
//   Divisor        a number by which a kernel divides, and the numbers that replace the division
//   Windows        windows, for each axis and phase of the stride, and counts of tiles, for implicit_gemm.cu; its parts
//                  are Axis and Phase
//   WeightTiles    counts of tiles of its weight_grad, and extents
//   Elements       the elements that a launch of split_sum.cu computes
//   Block          what a block of depthwise.cu owns, and where its arrays are in shared memory
//   Items          extents by which depthwise.cu numbers the elements of a region or the strips of a block

// ---------------------------------------------------------------------------------------------- numbers

// Returns a real element as a built-in floating-point number. half and bfloat16 are storage types and become float.
DEVICE float real_of(float v) { return v; }
DEVICE double real_of(double v) { return v; }
DEVICE float real_of(half v) { return to_float(v); }
DEVICE float real_of(bfloat16 v) { return to_float(v); }

// Converts an element to type To. half and bfloat16 are made from float, with one rounding to nearest, ties to even.
template <class To> struct Converted {
    template <class From> static DEVICE To from(From v) { return To(real_of(v)); }
};
template <> struct Converted<half> {
    static DEVICE half from(float v) { return to_half(v); }
};
template <> struct Converted<bfloat16> {
    static DEVICE bfloat16 from(float v) { return to_bfloat16(v); }
};
template <class T> struct Converted<Complex<T>> {
    template <class From> static DEVICE Complex<T> from(From v) { return {T(real_of(v)), T(0)}; }
    template <class From> static DEVICE Complex<T> from(Complex<From> v) { return {T(v.real), T(v.imag)}; }
};

// COUNT elements that are loaded or stored at once.
template <class T, int COUNT> struct __align__(COUNT * sizeof(T) % 16 == 0 ? 16 : COUNT * sizeof(T)) Numbers {
    T v[COUNT];
};

// to += v
DEVICE void add(float& to, float v) { to += v; }
DEVICE void add(double& to, double v) { to += v; }
template <class T> DEVICE void add(Complex<T>& to, Complex<T> v) {
    to.real += v.real;
    to.imag += v.imag;
}

// to += a * b
template <class T> DEVICE void add_product(T& to, T a, T b) { to += a * b; }
template <class T> DEVICE void add_product(Complex<T>& to, Complex<T> a, Complex<T> b) {
    to.real += a.real * b.real;
    to.real -= a.imag * b.imag;
    to.imag += a.real * b.imag;
    to.imag += a.imag * b.real;
}

template <class T> DEVICE bool is_zero(T v) { return v == 0; }
template <class T> DEVICE bool is_zero(Complex<T> v) { return v.real == 0 && v.imag == 0; }

template <class T> DEVICE T conjugate(T v) { return v; }
template <class T> DEVICE Complex<T> conjugate(Complex<T> v) { return {v.real, -v.imag}; }

// Real and imaginary part are two separate additions; for Complex<float> they are one vector instruction on sm_90.
DEVICE void atomic_add(Complex<float>* to, Complex<float> v) {
    atomic_add(&to->real, make_float2(v.real, v.imag));
}
template <class T> DEVICE void atomic_add(Complex<T>* to, Complex<T> v) {
    atomic_add(&to->real, v.real);
    atomic_add(&to->imag, v.imag);
}

// ---------------------------------------------------------------------------------------------- activations
// The numbers are those of gpuconv/activations.py; 0 is no activation. Complex results have no activation.

enum { IDENTITY, RELU, LEAKY_RELU, SIGMOID, TANH };

// Returns activation(z). Comparisons with NaN are false, so RELU and LEAKY_RELU return NaN unchanged.
template <class T> DEVICE T activated(T z, int activation) {
    switch (activation) {
        case RELU: return z < 0 ? T(0) : z;
        case LEAKY_RELU: return z < 0 ? T(LEAKY_SLOPE) * z : z;
        case SIGMOID: return T(1) / (T(1) + exp(-z));
        case TANH: return tanh(z);
    }
    return z;
}
template <class T> DEVICE Complex<T> activated(Complex<T> z, int) { return z; }

// Returns dy * activation'(z), computed from y = activation(z).
template <class T> DEVICE T times_derivative(T dy, T y, int activation) {
    switch (activation) {
        case RELU: return y <= 0 ? T(0) : dy;
        case LEAKY_RELU: return y <= 0 ? T(LEAKY_SLOPE) * dy : dy;
        case SIGMOID: return dy * (y * (T(1) - y));
        case TANH: return dy * (T(1) - y * y);
    }
    return dy;
}
template <class T> DEVICE Complex<T> times_derivative(Complex<T> dy, Complex<T>, int) { return dy; }

// ---------------------------------------------------------------------------------------------- operands and results

// An operand whose elements are loaded one at a time and converted to Sum. Where `derivative` is an activation, an
// element is multiplied by its derivative; y is the output of that activation and has the strides of `values`.
template <class T> struct Operand {
    const T* values;
    const T* y;
    int conjugated;
    int derivative;  // the activation, or IDENTITY

    DEVICE Sum operator[](Index at) const {
        Sum v = Converted<Sum>::from(values[at]);
        if (conjugated) v = conjugate(v);
        if (derivative != IDENTITY) v = times_derivative(v, Converted<Sum>::from(y[at]), derivative);
        return v;
    }
};

// Epilogue of one element: adds the bias, applies the activation, rounds once and stores. The bias has the shape
// (G, channels of a group) and the type Sum; `channel` is its flat index.
DEVICE void finish(Result* result, Index at, Sum sum, const Sum* bias, Index channel, const Options& options) {
    if (options.has_bias) add(sum, bias[channel]);
    result[at] = Converted<Result>::from(activated(sum, options.activation));
}

// ---------------------------------------------------------------------------------------------- axes

DEVICE Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }

// The unsigned type of the size of Index. A negative position becomes larger than every extent in it, so that one
// comparison tests both bounds.
template <int BYTES> struct UnsignedOf { using Type = unsigned; };
template <> struct UnsignedOf<8> { using Type = unsigned long long; };
using Unsigned = UnsignedOf<sizeof(Index)>::Type;

DEVICE bool inside(Index i, Index extent) { return Unsigned(i) < Unsigned(extent); }

// Returns n / divisor, for n of at least 0, by a multiplication with a number that the host has computed
// (structs.py), because an integer division takes about 20 instructions. The quotient by 0 is 0.
DEVICE Index quotient(Index n, const Divisor& divisor) {
    if constexpr (sizeof(Index) > 4) return divisor.value == 0 ? 0 : n / divisor.value;
    return Index((unsigned long long)(unsigned(n)) * divisor.multiplier >> divisor.shift);
}

// Returns n % divisor and divides n by it: takes the last digit of a number in a mixed radix.
DEVICE Index take_digit(Index& n, const Divisor& divisor) {
    const Index rest = quotient(n, divisor), digit = n - rest * divisor.value;
    n = rest;
    return digit;
}

// Coordinate of an element of x or y: image, group, channel within the group, and position.
struct Place {
    Index n, g, channel, at[3];

    DEVICE Index offset(const Images& strides) const {
        return n * strides.batch + at[0] * strides.axis[0] + at[1] * strides.axis[1] + at[2] * strides.axis[2]
             + g * strides.group + channel * strides.channel;
    }
};

// Returns the coordinate of the i-th element of x or y. Channels vary fastest where they are innermost in memory,
// otherwise positions do, so that the accesses of a warp are coalesced.
DEVICE Place place_of(Index i, const Index (&extent)[3], Index G, Index channels, int channels_innermost) {
    Place place;
    if (channels_innermost) {
        place.channel = i % channels;  // [0, channels)
        i /= channels;
        place.g = i % G;               // [0, G)
        i /= G;
    }
    for (int axis = 2; axis >= 0; --axis) {
        place.at[axis] = i % extent[axis];  // [0, extent)
        i /= extent[axis];
    }
    if (!channels_innermost) {
        place.channel = i % channels;
        i /= channels;
        place.g = i % G;
        i /= G;
    }
    place.n = i;  // [0, N)
    return place;
}

// Sets the position of the input that a tap multiplies for output o. Returns false if it lies in the padding.
DEVICE bool input_of(Place& input, const Place& o, const Index (&tap)[3], const Convolution& conv) {
    bool exists = true;
    for (int axis = 0; axis < 3; ++axis) {
        input.at[axis] = o.at[axis] * conv.stride[axis] + tap[axis] * conv.dilation[axis] - conv.low[axis];
        exists = exists && inside(input.at[axis], conv.input[axis]);
    }
    return exists;
}

// Coordinate of an element of w: group, channel and filter within the group, and tap.
struct WeightPlace {
    Index g, c, f, tap[3];

    DEVICE Index offset(const Weights& strides) const {
        return tap[0] * strides.axis[0] + tap[1] * strides.axis[1] + tap[2] * strides.axis[2]
             + g * strides.group + c * strides.channel + f * strides.filter;
    }
};

// Returns the coordinate of the i-th element of w. Filters vary fastest, then channels, taps and groups.
DEVICE WeightPlace weight_place_of(Index i, const Convolution& conv) {
    WeightPlace place;
    place.f = i % conv.F;  // [0, F/G)
    i /= conv.F;
    place.c = i % conv.C;  // [0, C/G)
    i /= conv.C;
    for (int axis = 2; axis >= 0; --axis) {
        place.tap[axis] = i % conv.kernel[axis];  // [0, kernel)
        i /= conv.kernel[axis];
    }
    place.g = i;  // [0, G)
    return place;
}

// `extent` is covered by a grid of boxes with the extents `box`. Sets `first` to the first position of box i modulo
// their number, and returns i divided by their number.
DEVICE Index take_box(Index (&first)[3], Index i, const Index (&extent)[3], const int (&box)[3]) {
    for (int axis = 2; axis >= 0; --axis) {
        const Index count = ceil_div(extent[axis], box[axis]);
        first[axis] = i % count * box[axis];
        i /= count;
    }
    return i;
}
