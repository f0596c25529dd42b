// Asynchronous copies and the instructions on registers of a whole warp: matrix loads and matrix products.
#include "runtime.hpp"

#include <cmath>

namespace emulated {

static Runtime& g = runtime;

// ---------------------------------------------------------------------------------------------- cp.async
// Late copies take place at the last legal moment, when they are waited for; early copies take place immediately. A GPU
// may do either, so a program that is right only under one of them is wrong.

static void perform(const Copy& copy) {
    memcpy(copy.to, copy.from, copy.present);
    memset(copy.to + copy.present, 0, copy.bytes - copy.present);
}

extern "C" void emulated_copy_async(void* to, const void* from, int bytes, int present) {
    Fiber& fiber = *g.current;
    const Copy copy{static_cast<char*>(to), static_cast<const char*>(from), bytes, present, __builtin_return_address(0)};
    if ((uintptr_t(to) | uintptr_t(from)) % bytes)
        give_up(copy.pc, "misaligned: asynchronous copy of " + std::to_string(bytes) + " bytes");
    if (present < 0 || present > bytes) give_up(copy.pc, "an asynchronous copy that reads more than it writes");
    if (g.checked) check_copy_started(copy, fiber.index);
    if (!g.late_copies) perform(copy);
    fiber.open.push_back(copy);
}

extern "C" void emulated_copy_async_commit() {
    Fiber& fiber = *g.current;
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
}

extern "C" void emulated_copy_async_wait(int pending) {
    Fiber& fiber = *g.current;
    while (int(fiber.groups.size()) > pending) {
        for (const Copy& copy : fiber.groups.front()) {
            if (g.late_copies) perform(copy);
            if (g.checked) check_copy_done(copy, fiber.index);
        }
        fiber.groups.erase(fiber.groups.begin());
    }
}

// ---------------------------------------------------------------------------------------------- ldmatrix

struct MatrixRecord {
    const void* row;
    unsigned* result;
    bool transposed;
    const void* pc;
};

static void load_matrices(Lanes& lanes) {
    for (int m = 0; m < 4; ++m) {
        uint16_t tile[8][8];
        for (int r = 0; r < 8; ++r) {
            const auto& record = *static_cast<MatrixRecord*>(lanes.record[m * 8 + r]);
            if (uintptr_t(record.row) % 16) give_up(record.pc, "misaligned: row of a matrix load");
            const int thread = g.current->warp * 32 + m * 8 + r;
            if (g.checked) {
                const Region* const region = check_access(record.row, 16, READ, record.pc, thread);
                if (region && g.profiled) profile_access(record.row, 16, READ, region->shared, record.pc, thread);
            }
            memcpy(tile[r], record.row, 16);
        }
        for (int lane = 0; lane < 32; ++lane) {
            auto& record = *static_cast<MatrixRecord*>(lanes.record[lane]);
            const int a = lane / 4, b = lane % 4 * 2;
            const unsigned low = record.transposed ? tile[b][a] : tile[a][b];
            const unsigned high = record.transposed ? tile[b + 1][a] : tile[a][b + 1];
            record.result[m] = low | high << 16;
        }
    }
}

extern "C" void emulated_load_matrices(unsigned* result, const void* row, bool transposed) {
    MatrixRecord record{row, result, transposed, __builtin_return_address(0)};
    meet_in_warp(~0u, load_matrices, &record, "ldmatrix", __builtin_return_address(0));
}

// ---------------------------------------------------------------------------------------------- mma.sync
// Lane = 4 g + t. The fragments of primitives.cuh are assembled to matrices, multiplied, and split again.

struct ProductRecord {
    float* d;
    const unsigned* a;
    const unsigned* b;
};

static float half_value(unsigned bits) { return float(emulated_bits<_Float16>(uint16_t(bits))); }
static float bfloat16_value(unsigned bits) { return emulated_bits<float>(bits << 16); }
static float tf32_value(unsigned bits) { return emulated_bits<float>(bits & 0xffffe000u); }  // other bits are ignored

// Tensor cores compute an exact sum of products and truncate it, rather than round it, to float32.
static float cut_off(double sum) {
    const float nearest = float(sum);
    return std::fabs(double(nearest)) > std::fabs(sum) ? std::nextafter(nearest, 0.0f) : nearest;
}

// A register holds PACKED elements; a row of a has K elements, in halves of PACKED * 4 columns.
template <int K, int PACKED, float (*value)(unsigned)> void multiply_16x8(Lanes& lanes) {
    constexpr int HALF = 4 * PACKED, HALVES = K / HALF;
    float a[16][K], b[K][8];
    double d[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const auto& r = *static_cast<ProductRecord*>(lanes.record[lane]);
        const int row = lane / 4, t = lane % 4;
        for (int half = 0; half < HALVES; ++half)
            for (int e = 0; e < PACKED; ++e) {
                const int k = half * HALF + t * PACKED + e, shift = PACKED == 2 ? 16 * e : 0;
                const unsigned mask = PACKED == 2 ? 0xffff : ~0u;
                a[row][k] = value(r.a[2 * half] >> shift & mask);
                a[row + 8][k] = value(r.a[2 * half + 1] >> shift & mask);
                b[k][row] = value(r.b[half] >> shift & mask);
            }
        for (int e = 0; e < 4; ++e) d[row + e / 2 * 8][2 * t + e % 2] = r.d[e];
    }
    for (int i = 0; i < 16; ++i)
        for (int k = 0; k < K; ++k)
            for (int j = 0; j < 8; ++j) d[i][j] += double(a[i][k]) * double(b[k][j]);
    for (int lane = 0; lane < 32; ++lane) {
        const auto& r = *static_cast<ProductRecord*>(lanes.record[lane]);
        for (int e = 0; e < 4; ++e) r.d[e] = cut_off(d[lane / 4 + e / 2 * 8][2 * (lane % 4) + e % 2]);
    }
}

extern "C" void emulated_multiply_16x8(float* d, const unsigned* a, const unsigned* b, int kind) {
    static const struct { Operation run; const char* name; } products[] = {
        {multiply_16x8<16, 2, half_value>, "mma.m16n8k16.f16"},
        {multiply_16x8<16, 2, bfloat16_value>, "mma.m16n8k16.bf16"},
        {multiply_16x8<8, 1, tf32_value>, "mma.m16n8k8.tf32"},
    };
    ProductRecord record{d, a, b};
    meet_in_warp(~0u, products[kind].run, &record, products[kind].name, __builtin_return_address(0));
}

struct DoubleRecord {
    double* d;
    double a, b;
};

static void multiply_8x8x4(Lanes& lanes) {
    double a[8][4], b[4][8], d[8][8];
    for (int lane = 0; lane < 32; ++lane) {
        const auto& r = *static_cast<DoubleRecord*>(lanes.record[lane]);
        const int row = lane / 4, t = lane % 4;
        a[row][t] = r.a;
        b[t][row] = r.b;
        for (int e = 0; e < 2; ++e) d[row][2 * t + e] = r.d[e];
    }
    for (int i = 0; i < 8; ++i)
        for (int k = 0; k < 4; ++k)
            for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
    for (int lane = 0; lane < 32; ++lane) {
        const auto& r = *static_cast<DoubleRecord*>(lanes.record[lane]);
        for (int e = 0; e < 2; ++e) r.d[e] = d[lane / 4][2 * (lane % 4) + e];
    }
}

extern "C" void emulated_multiply_8x8x4(double* d, double a, double b) {
    DoubleRecord record{d, a, b};
    meet_in_warp(~0u, multiply_8x8x4, &record, "mma.m8n8k4.f64", __builtin_return_address(0));
}

}  // namespace emulated
