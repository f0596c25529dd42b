// libcufft: the plans that CuPy makes, computed in float64.
#include "device.hpp"

#include <cmath>
#include <complex>
#include <cstring>
#include <map>
#include <vector>

namespace {

using Number = std::complex<double>;
enum Type { R2C = 0x2a, C2R = 0x2c, C2C = 0x29, D2Z = 0x6a, Z2D = 0x6c, Z2Z = 0x69 };
enum Kind { TO_COMPLEX, TO_REAL, COMPLEX };
constexpr int SUCCESS = 0, INVALID_PLAN = 1, NOT_SUPPORTED = 16, MOST_AXES = 3;

// The memory layout of the input or the output: cuFFT's embed, stride and dist.
struct Side {
    int embed[MOST_AXES];
    long step, apart;
};
struct Plan {
    int rank, extent[MOST_AXES], batch;
    Side input, output;
    cudaStream_t stream;

    long total() const {
        long product = 1;
        for (int axis = 0; axis < rank; ++axis) product *= extent[axis];
        return product;
    }
    void index_of(long element, int (&index)[MOST_AXES]) const {
        for (int axis = rank - 1; axis >= 0; --axis) {
            index[axis] = int(element % extent[axis]);
            element /= extent[axis];
        }
    }
    long place(const Side& side, const int (&index)[MOST_AXES], int image) const {
        long offset = index[0];
        for (int axis = 1; axis < rank; ++axis) offset = offset * side.embed[axis] + index[axis];
        return offset * side.step + image * side.apart;
    }
};
std::map<int, Plan> plans;
int last_plan;

int smallest_factor(int length) {
    for (int factor = 2; factor * factor <= length; ++factor)
        if (length % factor == 0) return factor;
    return length;
}

// Mixed-radix transform (Cooley and Tukey 1965): splits the length by one of its factors.
void transform_line(const Number* from, Number* to, int length, long step, int sign) {
    if (length == 1) {
        *to = *from;
        return;
    }
    const int factor = smallest_factor(length), part = length / factor;
    const double turn = sign * 2 * M_PI / length;
    for (int f = 0; f < factor; ++f) transform_line(from + f * step, to + f * part, part, factor * step, sign);
    std::vector<Number> terms(factor);
    for (int k = 0; k < part; ++k) {
        for (int f = 0; f < factor; ++f) terms[f] = to[f * part + k] * std::polar(1.0, turn * f * k);
        for (int q = 0; q < factor; ++q) {
            Number sum = 0;
            for (int f = 0; f < factor; ++f) sum += terms[f] * std::polar(1.0, sign * 2 * M_PI * (f * q % factor) / factor);
            to[q * part + k] = sum;
        }
    }
}

void transform_axis(const Plan& plan, std::vector<Number>& image, int axis, long step, int sign) {
    const int length = plan.extent[axis];
    std::vector<Number> line(length);
    for (long first = 0; first < long(image.size()); ++first) {
        if (first / step % length) continue;
        transform_line(&image[first], line.data(), length, step, sign);
        for (int k = 0; k < length; ++k) image[first + k * step] = line[k];
    }
}

// Returns an element of the input. Half of the spectrum of a real result is not stored; it follows by symmetry.
template <class Real> Number read(const Plan& plan, const void* from, int (&index)[MOST_AXES], int image, Kind kind) {
    const int last = plan.rank - 1;
    const bool is_mirrored = kind == TO_REAL && index[last] > plan.extent[last] / 2;
    if (is_mirrored)
        for (int axis = 0; axis < plan.rank; ++axis) index[axis] = (plan.extent[axis] - index[axis]) % plan.extent[axis];
    const long place = plan.place(plan.input, index, image);
    if (kind == TO_COMPLEX) return static_cast<const Real*>(from)[place];
    const Number value = static_cast<const std::complex<Real>*>(from)[place];
    return is_mirrored ? std::conj(value) : value;
}

template <class Real> void run(const Plan& plan, const void* from, void* to, int sign, Kind kind) {
    int index[MOST_AXES];
    const int last = plan.rank - 1;
    std::vector<Number> work(plan.total());
    for (int image = 0; image < plan.batch; ++image) {
        for (size_t e = 0; e < work.size(); ++e) {
            plan.index_of(long(e), index);
            work[e] = read<Real>(plan, from, index, image, kind);
        }
        long step = 1;
        for (int axis = last; axis >= 0; --axis) {
            transform_axis(plan, work, axis, step, sign);
            step *= plan.extent[axis];
        }
        for (size_t e = 0; e < work.size(); ++e) {
            plan.index_of(long(e), index);
            if (kind == TO_COMPLEX && index[last] > plan.extent[last] / 2) continue;
            const long place = plan.place(plan.output, index, image);
            if (kind == TO_REAL) static_cast<Real*>(to)[place] = Real(work[e].real());
            else static_cast<std::complex<Real>*>(to)[place] = std::complex<Real>(work[e]);
        }
    }
}

template <class Real> int later(int handle, const void* from, void* to, int sign, Kind kind) {
    std::lock_guard<std::recursive_mutex> guard(device::lock());
    const auto found = plans.find(handle);
    if (found == plans.end()) return INVALID_PLAN;
    return device::enqueue(found->second.stream, [=, plan = found->second] {
        run<Real>(plan, from, to, sign, kind);
        return cudaSuccess;
    });
}

Side side_of(const Plan& plan, const int* embed, int step, int apart, bool is_half) {
    Side side{{}, embed ? step : 1, apart};
    long covered = 1;
    for (int axis = 0; axis < plan.rank; ++axis) {
        const int whole = plan.extent[axis], half = whole / 2 + 1;
        side.embed[axis] = embed ? embed[axis] : axis == plan.rank - 1 && is_half ? half : whole;
        covered *= side.embed[axis];
    }
    if (!embed) side.apart = covered;
    return side;
}

}  // namespace

API int cufftGetVersion(int* version) { *version = 11400; return SUCCESS; }
API int cufftCreate(int* handle) {
    std::lock_guard<std::recursive_mutex> guard(device::lock());
    plans[*handle = ++last_plan] = {};
    return SUCCESS;
}
API int cufftDestroy(int handle) {
    std::lock_guard<std::recursive_mutex> guard(device::lock());
    return plans.erase(handle) ? SUCCESS : INVALID_PLAN;
}
API int cufftSetAutoAllocation(int, int) { return SUCCESS; }
API int cufftSetWorkArea(int, void*) { return SUCCESS; }
API int cufftSetStream(int handle, cudaStream_t stream) {
    std::lock_guard<std::recursive_mutex> guard(device::lock());
    plans[handle].stream = stream;
    return SUCCESS;
}
API int cufftMakePlanMany(int handle, int rank, const int* extent, const int* in_embed, int in_step, int in_apart,
                          const int* out_embed, int out_step, int out_apart, int type, int batch, size_t* bytes) {
    if (rank > MOST_AXES) return NOT_SUPPORTED;
    std::lock_guard<std::recursive_mutex> guard(device::lock());
    Plan& plan = plans[handle];
    plan.rank = rank;
    plan.batch = batch;
    std::copy(extent, extent + rank, plan.extent);
    plan.input = side_of(plan, in_embed, in_step, in_apart, type == C2R || type == Z2D);
    plan.output = side_of(plan, out_embed, out_step, out_apart, type == R2C || type == D2Z);
    if (bytes) *bytes = 0;
    return SUCCESS;
}
API int cufftMakePlan1d(int handle, int extent, int type, int batch, size_t* bytes) {
    return cufftMakePlanMany(handle, 1, &extent, nullptr, 1, 0, nullptr, 1, 0, type, batch, bytes);
}
API int cufftExecC2C(int plan, void* from, void* to, int sign) { return later<float>(plan, from, to, sign, COMPLEX); }
API int cufftExecZ2Z(int plan, void* from, void* to, int sign) { return later<double>(plan, from, to, sign, COMPLEX); }
API int cufftExecR2C(int plan, void* from, void* to) { return later<float>(plan, from, to, -1, TO_COMPLEX); }
API int cufftExecD2Z(int plan, void* from, void* to) { return later<double>(plan, from, to, -1, TO_COMPLEX); }
API int cufftExecC2R(int plan, void* from, void* to) { return later<float>(plan, from, to, 1, TO_REAL); }
API int cufftExecZ2D(int plan, void* from, void* to) { return later<double>(plan, from, to, 1, TO_REAL); }
