// Depthwise convolution, and groups of few channels: there are few products for each element, so memory traffic decides.
// Elements are read from global memory once, in whole sectors, and reused from shared memory and registers.
//
//   forward      y[n, o, q]  = sum over t, c of x[n, o * stride + t * dilation - low, c] w[t, c, q]
//   data_grad    the forward of dy, with other views of w and dx, for each phase of the stride
//   weight_grad  dw[t, c, q] = sum over n, o of x[n, o * stride + t * dilation - low, c] dy[n, o, q]
//
// A block owns a box of outputs, of some images and some groups. It loads the region of x that they read, then computes:
//
//       region of x in shared memory          strip of outputs in registers
//         . . . . . . . .                       STRIP rows of one column, CHANNELS channels
//         . . x . . . . .
//         . . x . . . . .      sums[o] += x[o + r] w[r]: each row of a column of taps is read once
//         . . x . . . . .      for all outputs of the strip; rows in the padding are skipped
//         . . . . . . . .
//
// q is a channel of the result, g = q / F its group, and c one of the C channels of x in this group. Positions of padding
// are not stored, and have no products: zeros times infinite weights would be NaN. Every order of summation is fixed.
//
// Constants, in addition to those of common.cuh:
//   Element        type of x (and dy) in shared memory: that of both operands if they share one and are used as they are,
//                  else Sum
//   VECTOR         elements of a load: along the channels, or along whole planes of all channels (LINEAR); or 1
//   CHANNELS       channels of a thread: more than 1 only if groups have one channel and one filter
//   STRIP          outputs of a thread along the slide axis (axis 1)
//   TAPS           taps of the slide axis that share the rows that they read: a divisor of their number; 1 unless stride
//                  and dilation of this axis are 1
//   THREADS

constexpr bool LINEAR = VECTOR > 1 && CHANNELS == 1;

// Returns an element as it is stored in shared memory.
template <class T> DEVICE Element element_of(T v) { return Converted<Element>::from(Converted<Sum>::from(v)); }
DEVICE Element element_of(Element v) { return v; }

// ---------------------------------------------------------------------------------------------- places

// Strides of an array in shared memory, in elements.
struct Steps {
    int image, channel, axis[3];
};

// A place relative to the first element of a part of an operand, or the extents of this part.
struct Local {
    int n, channel, at[3];

    DEVICE int offset(const Steps& to) const {
        return n * to.image + channel * to.channel + at[0] * to.axis[0] + at[1] * to.axis[1] + at[2] * to.axis[2];
    }
    DEVICE Index offset(const Images& in) const { return Place{n, 0, channel, {at[0], at[1], at[2]}}.offset(in); }
};

// A part of an operand: its first element, and its extents.
struct Part {
    Place first;
    Local count;
};

// An array in shared memory.
struct Stored {
    Element* values;
    Steps at;
};

// Sets `at` to the i-th position, modulo the number of positions, and returns i divided by this number.
DEVICE Index take_position(int (&at)[3], Index i, const Items& items) {
    for (int axis = 2; axis >= 0; --axis) at[axis] = int(take_digit(i, items.extent[axis]));
    return i;
}

// Returns the i-th place of a part with the extents of `items`.
DEVICE Local place_in(Index i, const Items& items, int channels_innermost) {
    Local place;
    if (channels_innermost) place.channel = int(take_digit(i, items.extent[3]));
    i = take_position(place.at, i, items);
    if (!channels_innermost) place.channel = int(take_digit(i, items.extent[3]));
    place.n = int(i);
    return place;
}

// Returns the number of places of an image and a channel.
DEVICE int count_of(const Items& items) {
    return int(items.extent[0].value * items.extent[1].value * items.extent[2].value);
}

// Returns whether a place of one of the images of a part lies in it.
DEVICE bool contains(const Local& extent, const Local& place) {
    return place.channel < extent.channel && place.at[0] < extent.at[0] && place.at[1] < extent.at[1]
        && place.at[2] < extent.at[2];
}

// Returns the strides of a dense array with channels innermost or outermost.
DEVICE Steps dense(int channels, const int (&extent)[3], int channels_innermost) {
    Steps at = {};
    at.channel = channels_innermost ? 1 : extent[0] * extent[1] * extent[2];
    at.axis[2] = channels_innermost ? channels : 1;
    at.axis[1] = at.axis[2] * extent[2];
    at.axis[0] = at.axis[1] * extent[1];
    at.image = channels * extent[0] * extent[1] * extent[2];
    return at;
}

DEVICE Index smaller(Index a, Index b) { return a < b ? a : b; }

// Returns the outputs of the i-th box of the images. `group` is the first of its groups.
DEVICE Part outputs_of(Index i, Index group, const Convolution& conv, const Block& box) {
    Part part = {};
    part.first.n = take_box(part.first.at, i, conv.output, box.outputs) * box.images;
    part.first.channel = group * conv.F;
    part.count.n = int(smaller(box.images, conv.N - part.first.n));
    part.count.channel = int(smaller(box.groups, conv.G - group) * conv.F);
    for (int axis = 0; axis < 3; ++axis)
        part.count.at[axis] = int(smaller(box.outputs[axis], conv.output[axis] - part.first.at[axis]));
    return part;
}

// Returns the inputs that these outputs read. A count is 0 if there are none.
DEVICE Part inputs_of(const Part& outputs, Index group, const Convolution& conv, const Block& box) {
    Part part = {};
    part.first.n = outputs.first.n;
    part.first.channel = group * conv.C;
    part.count.n = outputs.count.n;
    part.count.channel = int(smaller(box.groups, conv.G - group) * conv.C);
    for (int axis = 0; axis < 3; ++axis) {
        const Index first = outputs.first.at[axis] * conv.stride[axis] - conv.low[axis];
        const Index last = first + (outputs.count.at[axis] - 1) * conv.stride[axis]
                         + (conv.kernel[axis] - 1) * conv.dilation[axis];
        part.first.at[axis] = first < 0 ? 0 : first;
        const Index count = smaller(last + 1, conv.input[axis]) - part.first.at[axis];
        part.count.at[axis] = count < 0 ? 0 : int(count);
    }
    return part;
}

// ---------------------------------------------------------------------------------------------- loads

// Loads VECTOR elements of an operand into shared memory.
template <class T> DEVICE void load_vector(Element* to, const Operand<T>& from, Index at) {
    const Numbers<T, VECTOR> values = *reinterpret_cast<const Numbers<T, VECTOR>*>(from.values + at);
    Numbers<Element, VECTOR> elements;
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) {
        elements.v[k] = element_of(values.v[k]);
        if (from.conjugated) elements.v[k] = conjugate(elements.v[k]);
        if (from.derivative != IDENTITY) elements.v[k] = Converted<Element>::from(from[at + k]);
    }
    *reinterpret_cast<Numbers<Element, VECTOR>*>(to) = elements;
}

// Loads a part of an operand into shared memory. The threads of a warp load consecutive elements. `items` has the extents
// of an image of the part, with channels in units of VECTOR.
template <class T>
DEVICE void load_part(const Stored& to, const Operand<T>& from, const Images& from_at, const Part& part, const Items& items,
                      int channels_innermost) {
    const Index first = part.first.offset(from_at);
    if constexpr (LINEAR) {
        const int length = part.count.channel * to.at.channel;  // the planes of all channels are contiguous
        for (int n = 0; n < part.count.n; ++n)
#pragma unroll 2
            for (int i = threadIdx.x * VECTOR; i < length; i += THREADS * VECTOR)
                load_vector(to.values + n * to.at.image + i, from, first + n * from_at.batch + i);
    } else {
        const int length = part.count.n * count_of(items) * int(items.extent[3].value);
#pragma unroll 2
        for (int i = threadIdx.x; i < length; i += THREADS) {
            Local place = place_in(i, items, channels_innermost);
            place.channel *= VECTOR;
            if (contains(part.count, place))
                load_vector(to.values + place.offset(to.at), from, first + place.offset(from_at));
        }
    }
}

// Sets the tap with a number. Taps that differ in the last axis have neighbouring numbers.
DEVICE void set_tap(Index (&tap)[3], Index number, const Convolution& conv) {
    tap[2] = number % conv.kernel[2];
    tap[1] = number / conv.kernel[2] % conv.kernel[1];
    tap[0] = number / conv.kernel[2] / conv.kernel[1];
}

// Loads the weights of some filters: weights[(tap * C + c) * filters + q], where `filters` are those of a full block. They
// are read in the order of memory: taps vary faster than filters or more slowly.
DEVICE void load_weights(Sum* weights, const Operand<Second>& w, const Weights& w_at, const Convolution& conv,
                         const Part& outputs, const Block& box) {
    const int filters = int(box.groups * conv.F), count = outputs.count.channel, channels = int(conv.C);
    const int taps = int(conv.kernel[0] * conv.kernel[1] * conv.kernel[2]);
    for (int i = threadIdx.x; i < taps * channels * count; i += THREADS) {
        const int q = box.taps_innermost ? i / (taps * channels) : i % count;
        const int c = box.taps_innermost ? i / taps % channels : i / count % channels;
        const int tap = box.taps_innermost ? i % taps : i / (count * channels);
        const Index filter = outputs.first.channel + q;
        WeightPlace place = {filter / conv.F, c, filter % conv.F, {}};
        set_tap(place.tap, tap, conv);
        weights[(tap * channels + c) * filters + q] = w[place.offset(w_at)];
    }
}

// Reads and writes the numbers of CHANNELS neighbouring channels in shared memory.
template <class T> DEVICE void read_channels(Sum (&to)[CHANNELS], const T* from) {
    const Numbers<T, CHANNELS> values = *reinterpret_cast<const Numbers<T, CHANNELS>*>(from);
#pragma unroll
    for (int k = 0; k < CHANNELS; ++k) to[k] = Converted<Sum>::from(values.v[k]);
}

DEVICE void write_channels(Sum* to, const Sum (&from)[CHANNELS]) {
    Numbers<Sum, CHANNELS> values;
#pragma unroll
    for (int k = 0; k < CHANNELS; ++k) values.v[k] = from[k];
    *reinterpret_cast<Numbers<Sum, CHANNELS>*>(to) = values;
}

// ---------------------------------------------------------------------------------------------- forward

// The elements of x in shared memory that have the same place on all axes except the slide axis, from a row on. The row may
// lie in the padding.
struct Column {
    const Element* values;
    Index row;
    int rows, pitch;

    DEVICE Column(const Element* values, Index row, const Local& count, const Steps& at)
        : values(values), row(row), rows(count.at[1]), pitch(at.axis[1]) {}

    // Reads the channels of a later row. Returns false if it lies in the padding.
    DEVICE bool read(Sum (&x)[CHANNELS], Index offset) const {
        if (!inside(row + offset, rows)) return false;
        read_channels(x, values + int(row + offset) * pitch);
        return true;
    }
};

// sums[o] += x[o * step + r] w[r] for TAPS taps r of a column. If there are several, step is 1.
DEVICE void add_column(Sum (&sums)[STRIP][CHANNELS], const Column& x, Index step, const Sum (&w)[TAPS][CHANNELS]) {
#pragma unroll
    for (int j = 0; j < STRIP + TAPS - 1; ++j) {
        Sum values[CHANNELS];
        if (!x.read(values, TAPS > 1 ? j : j * step)) continue;
#pragma unroll
        for (int r = 0; r < TAPS; ++r)
            if (j - r >= 0 && j - r < STRIP)
#pragma unroll
                for (int k = 0; k < CHANNELS; ++k) add_product(sums[j - r][k], values[k], w[r][k]);
    }
}

// Adds the products of all taps of one channel of x. `x` and `w` are those of the channel, `count` the extents of x, and
// `start` is where the first tap of the first output reads, relative to them. In w, `pitch` is the step between taps.
DEVICE void add_taps(Sum (&sums)[STRIP][CHANNELS], const Stored& x, const Local& count, const Place& start, const Sum* w,
                     int pitch, const Convolution& conv) {
    for (Index t = 0; t < conv.kernel[0]; ++t) {
        const Index depth = start.at[0] + t * conv.dilation[0];
        if (!inside(depth, count.at[0])) continue;
        for (Index s = 0; s < conv.kernel[2]; ++s) {
            const Index across = start.at[2] + s * conv.dilation[2];
            if (!inside(across, count.at[2])) continue;
            const Element* const column = x.values + int(depth) * x.at.axis[0] + int(across) * x.at.axis[2];
            for (Index r = 0; r < conv.kernel[1]; r += TAPS) {
                Sum taps[TAPS][CHANNELS];
#pragma unroll
                for (int i = 0; i < TAPS; ++i)
                    read_channels(taps[i], w + int((t * conv.kernel[1] + r + i) * conv.kernel[2] + s) * pitch);
                add_column(sums, Column(column, start.at[1] + r * conv.dilation[1], count, x.at), conv.stride[1], taps);
            }
        }
    }
}

// Returns where the first tap of an output reads, relative to the inputs of the block.
DEVICE Place start_of(const Local& o, const Part& outputs, const Part& inputs, const Convolution& conv) {
    Place start = {};
    for (int axis = 0; axis < 3; ++axis)
        start.at[axis] = (outputs.first.at[axis] + o.at[axis]) * conv.stride[axis] - conv.low[axis] - inputs.first.at[axis];
    return start;
}

// Finishes the `rows` first outputs of a strip. `channel` is the flat index of the first of their channels.
DEVICE void store_strip(Result* to, Index step, int rows, const Sum (&sums)[STRIP][CHANNELS], const Sum* bias,
                        Index channel, const Options& options) {
#pragma unroll
    for (int o = 0; o < STRIP; ++o) {
        if (o >= rows) continue;
        Numbers<Result, CHANNELS> results;
#pragma unroll
        for (int k = 0; k < CHANNELS; ++k) finish(results.v, k, sums[o][k], bias, channel + k, options);
        *reinterpret_cast<Numbers<Result, CHANNELS>*>(to + o * step) = results;
    }
}

// Stores the outputs of a block from shared memory: the planes of all channels are contiguous.
DEVICE void store_planes(Result* to, Index step, const Result* from, const Steps& from_at, const Local& count) {
    constexpr int WIDTH = 16 / sizeof(Result);
    const int length = count.channel * from_at.channel;
    for (int n = 0; n < count.n; ++n)
#pragma unroll 2
        for (int i = threadIdx.x * WIDTH; i < length; i += THREADS * WIDTH)
            *reinterpret_cast<Numbers<Result, WIDTH>*>(to + n * step + i) =
                *reinterpret_cast<const Numbers<Result, WIDTH>*>(from + n * from_at.image + i);
}

// y = conv(x, w) with bias and activation. A block computes a box of outputs of some images and some groups. A thread
// computes strips: STRIP outputs along the slide axis, of CHANNELS channels. Where planes are contiguous, results pass
// through shared memory, because rows that are no multiples of a sector would be written in parts.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
depthwise_forward(const First* x_values, const First* x_y, const Second* w_values, const Sum* bias, Result* y,
                  Convolution conv, Images y_at, Images x_at, Weights w_at, Block box, Items loads, Items strips,
                  Options options) {
    DYNAMIC_SHARED(unsigned char, shared);
    Sum* const weights = reinterpret_cast<Sum*>(shared + box.second);
    Result* const stage = reinterpret_cast<Result*>(shared + box.third);
    const Operand<First> x = {x_values, x_y, options.first_conjugated, options.first_derivative};
    const Operand<Second> w = {w_values, nullptr, options.second_conjugated, IDENTITY};
    const int last = options.channels_innermost;

    const Index blocks = ceil_div(conv.G, box.groups), group = Index(blockIdx.x) % blocks * box.groups;
    const Part outputs = outputs_of(Index(blockIdx.x) / blocks, group, conv, box);
    const Part inputs = inputs_of(outputs, group, conv, box);
    const int filters = int(box.groups * conv.F);
    const Stored region = {reinterpret_cast<Element*>(shared), dense(int(box.groups * conv.C), box.region, last)};
    const Steps stage_at = dense(filters, box.outputs, last);
    load_part(region, x, x_at, inputs, loads, last);
    load_weights(weights, w, w_at, conv, outputs, box);
    __syncthreads();  // x and w are in shared memory

    const Index first = outputs.first.offset(y_at);
    const int length = outputs.count.n * count_of(strips) * int(strips.extent[3].value);
    for (int i = threadIdx.x; i < length; i += THREADS) {
        Local o = place_in(i, strips, last);
        o.channel *= CHANNELS;
        o.at[1] *= STRIP;
        if (!contains(outputs.count, o)) continue;
        const Place start = start_of(o, outputs, inputs, conv);
        const int channels = int(conv.C), source = CHANNELS > 1 ? o.channel : o.channel / int(conv.F) * channels;
        Stored plane = {region.values + o.n * region.at.image + source * region.at.channel, region.at};
        Sum sums[STRIP][CHANNELS] = {};
        for (int c = 0; c < channels; ++c, plane.values += region.at.channel)
            add_taps(sums, plane, inputs.count, start, weights + c * filters + o.channel, channels * filters, conv);
        const int rows = outputs.count.at[1] - o.at[1];
        const Index channel = outputs.first.channel + o.channel;
        if constexpr (LINEAR)
            store_strip(stage + o.offset(stage_at), stage_at.axis[1], rows, sums, bias, channel, options);
        else
            store_strip(y + first + o.offset(y_at), y_at.axis[1], rows, sums, bias, channel, options);
    }
    if constexpr (LINEAR) {
        __syncthreads();  // all results of the block are in shared memory
        store_planes(y + first, y_at.batch, stage, stage_at, outputs.count);
    }
}

// ---------------------------------------------------------------------------------------------- weight_grad

// sums[r] += x[o * step + r] dy[o] for COUNT outputs o of a strip and TAPS taps r of a column.
template <int COUNT>
DEVICE void add_strip(Sum (&sums)[TAPS][CHANNELS], const Column& x, Index step, const Element* dy, int pitch) {
    Sum gradients[COUNT][CHANNELS];
#pragma unroll
    for (int o = 0; o < COUNT; ++o) read_channels(gradients[o], dy + o * pitch);
#pragma unroll
    for (int j = 0; j < COUNT + TAPS - 1; ++j) {
        Sum values[CHANNELS];
        if (!x.read(values, TAPS > 1 ? j : j * step)) continue;
#pragma unroll
        for (int r = 0; r < TAPS; ++r)
            if (j - r >= 0 && j - r < COUNT)
#pragma unroll
                for (int k = 0; k < CHANNELS; ++k) add_product(sums[r][k], values[k], gradients[j - r][k]);
    }
}

// What a thread owns in weight_grad: the sums of TAPS taps of one column of taps, of CHANNELS pairs of a channel of x and
// one of dy, over every `shares`-th strip of a box, from the strip `share` on. A pair is numbered as (group, channel,
// filter); `tap` is the first tap of the column.
struct Owned {
    int pair, column, share, shares;
    Index tap[3];

    DEVICE Owned(int pair, int column, int share, int shares, const Convolution& conv)
        : pair(pair), column(column), share(share), shares(shares) {
        const Index chunks = conv.kernel[1] / TAPS;
        tap[1] = column % chunks * TAPS;
        tap[2] = column / chunks % conv.kernel[2];
        tap[0] = column / chunks / conv.kernel[2];
    }
};

// Adds the products of a thread's strips of a box. x and dy are in shared memory.
DEVICE void add_box(Sum (&sums)[TAPS][CHANNELS], const Owned& owned, const Stored& x, const Part& inputs, const Stored& dy,
                    const Part& outputs, const Items& strips, const Convolution& conv) {
    const int channels = int(conv.C), filters = int(conv.F), group = owned.pair / (channels * filters);
    const Element* const plane = x.values + owned.pair / filters * x.at.channel;
    const int filter = group * filters + owned.pair % filters;
    const int length = outputs.count.n * count_of(strips);
    Place first = start_of({}, outputs, inputs, conv);  // what the first output of the box multiplies for the first tap
    for (int axis = 0; axis < 3; ++axis) first.at[axis] += owned.tap[axis] * conv.dilation[axis];
    for (int i = owned.share; i < length; i += owned.shares) {
        Local o;
        o.n = int(take_position(o.at, i, strips));
        o.channel = filter;
        o.at[1] *= STRIP;
        const Index depth = first.at[0] + o.at[0] * conv.stride[0], across = first.at[2] + o.at[2] * conv.stride[2];
        Index row = first.at[1] + o.at[1] * conv.stride[1];
        if (o.at[0] >= outputs.count.at[0] || o.at[2] >= outputs.count.at[2]) continue;  // beyond the last box
        if (!inside(depth, inputs.count.at[0]) || !inside(across, inputs.count.at[2])) continue;
        const Element* const column = plane + o.n * x.at.image + int(depth) * x.at.axis[0] + int(across) * x.at.axis[2];
        const Element* gradients = dy.values + o.offset(dy.at);
        if (o.at[1] + STRIP <= outputs.count.at[1]) {
            add_strip<STRIP>(sums, Column(column, row, inputs.count, x.at), conv.stride[1], gradients, dy.at.axis[1]);
        } else {
#pragma unroll 1
            for (; o.at[1] < outputs.count.at[1]; ++o.at[1], row += conv.stride[1], gradients += dy.at.axis[1])
                add_strip<1>(sums, Column(column, row, inputs.count, x.at), conv.stride[1], gradients, dy.at.axis[1]);
        }
    }
}

// Index of a weight in the partial sums of a split. Taps vary fastest if they do in dw, so that the threads which read the
// sums of neighbours store neighbouring elements.
DEVICE Index weight_index(Index pair, Index tap, const Convolution& conv, const Block& box) {
    const Index taps = conv.kernel[0] * conv.kernel[1] * conv.kernel[2], pairs = conv.G * conv.C * conv.F;
    return box.taps_innermost ? pair * taps + tap : tap * pairs + pair;
}

// Rounds a sum and stores it in dw.
DEVICE void store_weight(Result* dw, Index pair, Index tap, Sum sum, const Weights& dw_at, const Convolution& conv) {
    WeightPlace place = {pair / (conv.C * conv.F), pair / conv.F % conv.C, pair % conv.F, {}};
    set_tap(place.tap, tap, conv);
    dw[place.offset(dw_at)] = Converted<Result>::from(sum);
}

// A block computes all taps, or `box.columns` columns of taps, of some groups, and sums over a
// split: the boxes [split * length, (split + 1) * length) of all images. Several threads share the boxes of each weight;
// their sums are added in shared memory. If there is one split, its sums are stored in dw, otherwise in partial[split].
extern "C" __global__ void __launch_bounds__(THREADS, 1)
depthwise_weight_grad(const First* dy_values, const First* dy_y, const Second* x_values, const Second* x_y, Sum* partial,
                      Result* dw, Convolution conv, Images dy_at, Images x_at, Weights dw_at, Block box, Items dy_loads,
                      Items x_loads, Items strips, Index length, Index stores_result, Options options) {
    DYNAMIC_SHARED(unsigned char, shared);
    Sum* const table = reinterpret_cast<Sum*>(shared);  // in the place of x and dy, when the boxes have been read
    const Operand<First> dy = {dy_values, dy_y, options.first_conjugated, options.first_derivative};
    const Operand<Second> x = {x_values, x_y, options.second_conjugated, options.second_derivative};
    const int last = options.channels_innermost;

    const int all_columns = int(conv.kernel[0] * conv.kernel[2] * (conv.kernel[1] / TAPS));
    const int parts = int(ceil_div(all_columns, box.columns)), pairs = int(box.groups * conv.C * conv.F);
    const Index blocks = ceil_div(conv.G, box.groups), group = Index(blockIdx.x) % blocks * box.groups;
    const int first_column = int(Index(blockIdx.x) / blocks % parts) * box.columns;
    const Index split = Index(blockIdx.x) / blocks / parts;
    const int vectors = pairs / CHANNELS, owners = vectors * box.columns, shares = THREADS / owners;
    const int owner = last ? threadIdx.x % owners : threadIdx.x / shares;
    const int share = last ? threadIdx.x / owners : threadIdx.x % shares;
    const Owned owned(owner % vectors * CHANNELS, first_column + owner / vectors, share, shares, conv);
    const bool is_owner = owner < owners && share < shares && owned.column < all_columns
                       && group + owned.pair / (conv.C * conv.F) < conv.G;
    const Stored region = {reinterpret_cast<Element*>(shared), dense(int(box.groups * conv.C), box.region, last)};
    const Stored gradients = {reinterpret_cast<Element*>(shared + box.second),
                              dense(int(box.groups * conv.F), box.outputs, last)};
    Index boxes = ceil_div(conv.N, box.images);
    for (int axis = 0; axis < 3; ++axis) boxes *= ceil_div(conv.output[axis], box.outputs[axis]);

    Sum sums[TAPS][CHANNELS] = {};
    for (Index i = split * length; i < smaller(split * length + length, boxes); ++i) {
        const Part outputs = outputs_of(i, group, conv, box), inputs = inputs_of(outputs, group, conv, box);
        load_part(region, x, x_at, inputs, x_loads, last);
        load_part(gradients, dy, dy_at, outputs, dy_loads, last);
        __syncthreads();  // the box is in shared memory
        if (is_owner) add_box(sums, owned, region, inputs, gradients, outputs, strips, conv);
        __syncthreads();  // the box has been read and may be overwritten
    }

    const int taps = box.columns * TAPS;
    if (is_owner)
#pragma unroll
        for (int r = 0; r < TAPS; ++r)
            write_channels(table + (share * taps + (owned.column - first_column) * TAPS + r) * pairs + owned.pair, sums[r]);
    __syncthreads();  // the sums of all shares are in the table
    const int chunks = int(conv.kernel[1] / TAPS), all_taps = all_columns * TAPS;
    for (int i = threadIdx.x; i < pairs * all_taps; i += THREADS) {
        const int pair = box.taps_innermost ? i / all_taps : i % pairs, tap = box.taps_innermost ? i % all_taps : i / pairs;
        Index at[3];
        set_tap(at, tap, conv);
        const int row = int(at[1]), column = int(at[0] * conv.kernel[2] + at[2]) * chunks + row / TAPS - first_column;
        const Index whole_pair = group * conv.C * conv.F + pair;
        if (column < 0 || column >= box.columns || whole_pair >= conv.G * conv.C * conv.F) continue;
        Sum sum = {};
        for (int other = 0; other < shares; ++other)
            add(sum, table[(other * taps + column * TAPS + row % TAPS) * pairs + pair]);
        if (stores_result)
            store_weight(dw, whole_pair, tap, sum, dw_at, conv);
        else
            partial[split * (conv.G * conv.C * conv.F * all_taps) + weight_index(whole_pair, tap, conv, box)] = sum;
    }
}
