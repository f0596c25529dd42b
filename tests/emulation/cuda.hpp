// CUDA C++ for g++: included before the source of a kernel, so that a .cu file compiles for the CPU. This file has the
// keywords, built-in types, variables and functions; everything with state is in the runtime (runtime.hpp).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "parameter.hpp"

// The functions of the emulator are not part of the kernel: they are not checked and not named in reports.
#define EMULATED_UNCHECKED __attribute__((no_sanitize("thread", "undefined")))
#define EMULATED_INLINE EMULATED_UNCHECKED static inline

// Inlined, so that the return address of the functions that they call is in the line of the kernel to report.
#define EMULATED_IN_PLACE __attribute__((always_inline)) inline

// ---------------------------------------------------------------------------------------------- keywords

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static  // blocks run in sequence, so one copy suffices; the loader finds it by its symbol
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(...) __attribute__((aligned(__VA_ARGS__)))

// ---------------------------------------------------------------------------------------------- vector types

#define EMULATED_VECTOR(T, name, align2, align4)                                                            \
    struct alignas(align2) name##2 { T x, y; };                                                             \
    struct name##3 { T x, y, z; };                                                                          \
    struct alignas(align4) name##4 { T x, y, z, w; };                                                       \
    EMULATED_INLINE name##2 make_##name##2(T x, T y) { return {x, y}; }                                     \
    EMULATED_INLINE name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATED_VECTOR(float, float, 8, 16)
EMULATED_VECTOR(int, int, 8, 16)
EMULATED_VECTOR(unsigned, uint, 8, 16)
EMULATED_VECTOR(double, double, 16, 16)
struct dim3 { unsigned x = 1, y = 1, z = 1; };

// ---------------------------------------------------------------------------------------------- the runtime

namespace emulated {

struct Thread {
    uint3 thread, block;
    dim3 block_dim, grid_dim;
};

// An operation of a warp: every lane contributes a record, and the last lane to arrive runs the operation on all.
struct Lanes {
    unsigned mask;
    void* record[32];
};
using Operation = void (*)(Lanes&);

extern "C" {
extern const Thread* emulated_thread;  // the current thread
int emulated_barrier(const char* file, int line, int number, int kind, int predicate);
void emulated_sync_warp(unsigned mask);
void emulated_collective(unsigned mask, Operation operation, void* record, const char* name);
void emulated_atomic(const void* address, size_t bytes, int count, const void* pc);
void* emulated_dynamic_shared();
void emulated_complain(const char* text);
}

enum BarrierKind { PLAIN, COUNT, AND, OR };
enum ShuffleKind { INDEX, UP, DOWN, XOR };

template <class T> struct ShuffleRecord { T value, result; int operand, width; };

template <class T, int kind> EMULATED_UNCHECKED void shuffle_operation(Lanes& lanes) {
    for (int lane = 0; lane < 32; ++lane) {
        if (!(lanes.mask >> lane & 1)) continue;
        auto& r = *static_cast<ShuffleRecord<T>*>(lanes.record[lane]);
        const int base = lane & ~(r.width - 1), end = base + r.width;
        int from = lane;
        if (kind == INDEX) from = base + (r.operand & (r.width - 1));
        if (kind == UP && lane - r.operand >= base) from = lane - r.operand;
        if (kind == DOWN && lane + r.operand < end) from = lane + r.operand;
        if (kind == XOR && (lane ^ r.operand) < end) from = lane ^ r.operand;
        if (lanes.mask >> from & 1) {
            r.result = static_cast<ShuffleRecord<T>*>(lanes.record[from])->value;
        } else {  // undefined on a GPU
            std::memset(static_cast<void*>(&r.result), 0xff, sizeof(T));
            emulated_complain("a shuffle reads a lane that is not in its mask");
        }
    }
}

template <class T, int kind> EMULATED_IN_PLACE T shuffle(unsigned mask, T value, int operand, int width) {
    ShuffleRecord<T> record{value, value, operand, width};
    emulated_collective(mask, &shuffle_operation<T, kind>, &record, "a shuffle");
    return record.result;
}

struct VoteRecord { bool predicate; unsigned result; };

EMULATED_UNCHECKED inline void vote_operation(Lanes& lanes) {
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane)
        if (lanes.mask >> lane & 1) votes |= unsigned(static_cast<VoteRecord*>(lanes.record[lane])->predicate) << lane;
    for (int lane = 0; lane < 32; ++lane)
        if (lanes.mask >> lane & 1) static_cast<VoteRecord*>(lanes.record[lane])->result = votes;
}

}  // namespace emulated

#define threadIdx (emulated::emulated_thread->thread)
#define blockIdx (emulated::emulated_thread->block)
#define blockDim (emulated::emulated_thread->block_dim)
#define gridDim (emulated::emulated_thread->grid_dim)

#define __syncthreads() ((void)emulated::emulated_barrier(__FILE__, __LINE__, __COUNTER__, emulated::PLAIN, 0))
#define __syncthreads_count(p) (emulated::emulated_barrier(__FILE__, __LINE__, __COUNTER__, emulated::COUNT, !!(p)))
#define __syncthreads_and(p) (emulated::emulated_barrier(__FILE__, __LINE__, __COUNTER__, emulated::AND, !!(p)))
#define __syncthreads_or(p) (emulated::emulated_barrier(__FILE__, __LINE__, __COUNTER__, emulated::OR, !!(p)))

// ---------------------------------------------------------------------------------------------- warps

EMULATED_IN_PLACE void __syncwarp(unsigned mask = ~0u) { emulated::emulated_sync_warp(mask); }

#define EMULATED_SHUFFLE(name, kind)                                                                        \
    template <class T> EMULATED_IN_PLACE T name(unsigned mask, T value, int operand, int width = 32) {      \
        return emulated::shuffle<T, kind>(mask, value, operand, width);                                     \
    }
EMULATED_SHUFFLE(__shfl_sync, emulated::INDEX)
EMULATED_SHUFFLE(__shfl_up_sync, emulated::UP)
EMULATED_SHUFFLE(__shfl_down_sync, emulated::DOWN)
EMULATED_SHUFFLE(__shfl_xor_sync, emulated::XOR)

EMULATED_IN_PLACE unsigned __ballot_sync(unsigned mask, int predicate) {
    emulated::VoteRecord record{predicate != 0, 0};
    emulated::emulated_collective(mask, &emulated::vote_operation, &record, "a vote");
    return record.result;
}
EMULATED_IN_PLACE int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
EMULATED_IN_PLACE int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

// ---------------------------------------------------------------------------------------------- atomic operations
// One thread of the CPU runs all threads of the GPU, so an ordinary update is atomic. These functions are not inlined;
// their return address is in the line to report.

#define EMULATED_ATOMIC(name, updated)                                                                      \
    template <class T> __attribute__((no_sanitize("thread", "undefined"), noinline)) static                 \
    T name(T* to, typename std::common_type<T>::type value) {                                               \
        emulated::emulated_atomic(to, sizeof(T), 1, __builtin_return_address(0));                           \
        const T old = *to;                                                                                  \
        *to = updated;                                                                                      \
        return old;                                                                                         \
    }
EMULATED_ATOMIC(atomicAdd, T(old + value))
EMULATED_ATOMIC(atomicMax, old > value ? old : value)
EMULATED_ATOMIC(atomicMin, old < value ? old : value)
EMULATED_ATOMIC(atomicExch, value)

template <class T> __attribute__((no_sanitize("thread", "undefined"), noinline)) static
T atomicCAS(T* to, typename std::common_type<T>::type expected, typename std::common_type<T>::type value) {
    emulated::emulated_atomic(to, sizeof(T), 1, __builtin_return_address(0));
    const T old = *to;
    if (old == expected) *to = value;
    return old;
}

// ---------------------------------------------------------------------------------------------- arithmetic

#define EMULATED_MIN_MAX(T)                                                                                 \
    EMULATED_INLINE T min(T a, T b) { return b < a ? b : a; }                                               \
    EMULATED_INLINE T max(T a, T b) { return a < b ? b : a; }
EMULATED_MIN_MAX(int)
EMULATED_MIN_MAX(unsigned)
EMULATED_MIN_MAX(long long)

template <class To, class From> EMULATED_INLINE To emulated_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}
EMULATED_INLINE unsigned __float_as_uint(float f) { return emulated_bits<unsigned>(f); }
EMULATED_INLINE float __uint_as_float(unsigned u) { return emulated_bits<float>(u); }
EMULATED_INLINE int __popc(unsigned u) { return __builtin_popcount(u); }

// ---------------------------------------------------------------------------------------------- entry points

namespace emulated {
template <class... A, size_t... I>
EMULATED_INLINE void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::decay_t<A>*>(arguments[I])...);
}
template <class... A> EMULATED_INLINE void call(void (*kernel)(A...), void** arguments) {
    call(kernel, arguments, std::index_sequence_for<A...>{});
}
template <class T> constexpr unsigned element_bytes = std::is_floating_point_v<T> ? sizeof(T) : 0;

template <class A> struct ParameterOf { static constexpr Parameter value = {sizeof(A), false, false, 0}; };
template <class T> struct ParameterOf<T*> {
    static constexpr Parameter value = {sizeof(T*), true, std::is_const_v<T>, element_bytes<std::remove_cv_t<T>>};
};
template <class... A> struct Parameters {
    static constexpr Parameter value[] = {ParameterOf<A>::value..., {}};
};
template <class... A> EMULATED_INLINE const Parameter* parameters(void (*)(A...)) { return Parameters<A...>::value; }
}  // namespace emulated

// Functions for the loader: a call of the kernel with pointers to its arguments, and its parameters, terminated by one
// of 0 bytes.
#define EMULATED_ENTRY(kernel)                                                                              \
    extern "C" __attribute__((visibility("default"))) EMULATED_UNCHECKED                                    \
    void emulated_call_##kernel(void** arguments) { emulated::call(&kernel, arguments); }                   \
    extern "C" __attribute__((visibility("default"))) EMULATED_UNCHECKED                                    \
    const emulated::Parameter* emulated_parameters_##kernel() { return emulated::parameters(&kernel); }
