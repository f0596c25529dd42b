// What CuPy's kernels need in addition to tests/emulation/cuda.hpp; included before every source except gpuconv's.
#pragma once

#include <cassert>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <limits>
#include <tuple>

#include "cuda.hpp"

using std::exp;
using std::tanh;

#define __CUDA_ARCH__ 900
#define __CUDACC_VER_MAJOR__ 12
#define __CUDACC_VER_MINOR__ 9
#define __noinline__ __attribute__((noinline))
constexpr int warpSize = 32;
typedef struct CUstream_st* cudaStream_t;

// ---------------------------------------------------------------------------------------------- vector types

#define CUPY_VECTOR(T, name, align2, align4)                                                                \
    struct alignas(align2) name##2 { T x, y; };                                                             \
    struct name##3 { T x, y, z; };                                                                          \
    struct alignas(align4) name##4 { T x, y, z, w; };                                                       \
    EMULATED_INLINE name##2 make_##name##2(T x, T y) { return {x, y}; }                                     \
    EMULATED_INLINE name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUPY_VECTOR(signed char, char, 2, 4)
CUPY_VECTOR(unsigned char, uchar, 2, 4)
CUPY_VECTOR(short, short, 4, 8)
CUPY_VECTOR(unsigned short, ushort, 4, 8)
CUPY_VECTOR(long long, longlong, 16, 16)
CUPY_VECTOR(unsigned long long, ulonglong, 16, 16)

// ---------------------------------------------------------------------------------------------- memory

EMULATED_INLINE void __threadfence() {}
EMULATED_INLINE void __threadfence_block() {}
EMULATED_INLINE void __threadfence_system() {}
template <class T> EMULATED_INLINE T __ldg(const T* from) { return *from; }

EMULATED_ATOMIC(atomicSub, T(old - value))
EMULATED_ATOMIC(atomicAnd, T(old & value))
EMULATED_ATOMIC(atomicOr, T(old | value))
EMULATED_ATOMIC(atomicXor, T(old ^ value))

// ---------------------------------------------------------------------------------------------- integers and bits

EMULATED_INLINE int __popcll(unsigned long long u) { return __builtin_popcountll(u); }
EMULATED_INLINE int __clz(int i) { return i ? __builtin_clz(unsigned(i)) : 32; }
EMULATED_INLINE int __clzll(long long i) { return i ? __builtin_clzll((unsigned long long)i) : 64; }
EMULATED_INLINE int __ffs(int i) { return __builtin_ffs(i); }
EMULATED_INLINE int __ffsll(long long i) { return __builtin_ffsll(i); }
EMULATED_INLINE unsigned __brev(unsigned u) {
    unsigned reversed = 0;
    for (int bit = 0; bit < 32; ++bit) reversed |= (u >> bit & 1u) << (31 - bit);
    return reversed;
}
EMULATED_INLINE unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)a * b >> 32); }
EMULATED_INLINE unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
EMULATED_INLINE int __mulhi(int a, int b) { return int((long long)a * b >> 32); }
EMULATED_INLINE int __float_as_int(float f) { return emulated_bits<int>(f); }
EMULATED_INLINE float __int_as_float(int i) { return emulated_bits<float>(i); }
EMULATED_INLINE long long __double_as_longlong(double d) { return emulated_bits<long long>(d); }
EMULATED_INLINE double __longlong_as_double(long long i) { return emulated_bits<double>(i); }
EMULATED_INLINE int __double2hiint(double d) { return int(__double_as_longlong(d) >> 32); }
EMULATED_INLINE int __double2loint(double d) { return int(__double_as_longlong(d)); }
EMULATED_INLINE double __hiloint2double(int high, int low) {
    return __longlong_as_double((long long)((unsigned long long)(unsigned)high << 32 | (unsigned)low));
}

// float16 represented by its bits, as CuPy's class in float16.cuh needs it.
EMULATED_INLINE unsigned short __float2half_rn(float f) { return emulated_bits<unsigned short>(_Float16(f)); }
EMULATED_INLINE float __half2float(unsigned short bits) { return float(emulated_bits<_Float16>(bits)); }

// ---------------------------------------------------------------------------------------------- functions

// CUDA has overloads of the mathematical functions in the global namespace for every type of number. C has one type
// there, and abs for int.
using namespace std;
using std::abs, std::fabs, std::fmod, std::fma, std::hypot, std::copysign, std::nextafter, std::pow, std::sqrt, std::cbrt;
using std::acos, std::asin, std::atan, std::atan2, std::cos, std::cosh, std::exp, std::exp2, std::expm1, std::log;
using std::acosh, std::asinh, std::atanh, std::log10, std::log1p, std::log2, std::sin, std::sinh, std::tan, std::tanh;
using std::ceil, std::floor, std::frexp, std::ldexp, std::modf, std::rint, std::round, std::trunc, std::erf, std::erfc;
using std::isfinite, std::isinf, std::isnan, std::lgamma, std::signbit, std::tgamma, std::fmax, std::fmin;

template <class A, class B> constexpr auto max(A a, B b) -> std::common_type_t<A, B> {
    using C = std::common_type_t<A, B>;
    return C(a) < C(b) ? C(b) : C(a);
}
template <class A, class B> constexpr auto min(A a, B b) -> std::common_type_t<A, B> {
    using C = std::common_type_t<A, B>;
    return C(b) < C(a) ? C(b) : C(a);
}

#define CUPY_FUNCTION(name, value)                                                                          \
    EMULATED_INLINE double name(double x) { return value; }                                                 \
    EMULATED_INLINE float name##f(float x) { return float(name(double(x))); }
CUPY_FUNCTION(rsqrt, 1 / std::sqrt(x))
CUPY_FUNCTION(rcbrt, 1 / std::cbrt(x))
CUPY_FUNCTION(sinpi, std::sin(M_PI * x))
CUPY_FUNCTION(cospi, std::cos(M_PI * x))
CUPY_FUNCTION(normcdf, 0.5 * std::erfc(-x * M_SQRT1_2))
CUPY_FUNCTION(cyl_bessel_i0, std::cyl_bessel_i(0, std::fabs(x)))
EMULATED_INLINE float rsqrt(float x) { return 1 / std::sqrt(x); }
EMULATED_INLINE float __expf(float x) { return std::exp(x); }
EMULATED_INLINE float __logf(float x) { return std::log(x); }
EMULATED_INLINE float __powf(float x, float y) { return std::pow(x, y); }
EMULATED_INLINE float __fdividef(float x, float y) { return x / y; }
EMULATED_INLINE float __fmul_rn(float x, float y) { return x * y; }
EMULATED_INLINE float __fadd_rn(float x, float y) { return x + y; }
EMULATED_INLINE double __dmul_rn(double x, double y) { return x * y; }
EMULATED_INLINE double __dadd_rn(double x, double y) { return x + y; }

// ---------------------------------------------------------------------------------------------- entry points

// CuPy's arrays are structs that begin with the pointer to their data.
template <class T, int NDIM, bool CONTIGUOUS, bool NARROW> class CArray;
namespace emulated {
template <class T, int NDIM, bool CONTIGUOUS, bool NARROW> struct ParameterOf<CArray<T, NDIM, CONTIGUOUS, NARROW>> {
    static constexpr Parameter value = {sizeof(CArray<T, NDIM, CONTIGUOUS, NARROW>), true, false, 0};
};
}  // namespace emulated

// The entry point expression_N of the kernel that a name expression denotes.
#define EXPRESSION_ENTRY(number)                                                                            \
    extern "C" __attribute__((visibility("default"))) EMULATED_UNCHECKED                                    \
    void emulated_call_expression_##number(void** arguments) {                                              \
        emulated::call(expression_##number, arguments);                                                     \
    }                                                                                                       \
    extern "C" __attribute__((visibility("default"))) EMULATED_UNCHECKED                                    \
    const emulated::Parameter* emulated_parameters_expression_##number() {                                  \
        return emulated::parameters(expression_##number);                                                   \
    }
