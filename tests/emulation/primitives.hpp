// The types and functions of kernels/primitives.cuh for the CPU, without PTX.

#define __CUDA_ARCH__ 900  // the emulated architecture
#define DEVICE EMULATED_IN_PLACE
#define DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(emulated::emulated_dynamic_shared())

struct half { unsigned short bits; };
struct bfloat16 { unsigned short bits; };

template <class T> struct __align__(8) Complex { T real, imag; };


namespace emulated {
template <> constexpr unsigned element_bytes<half> = 2;
template <> constexpr unsigned element_bytes<bfloat16> = 2;
template <class T> constexpr unsigned element_bytes<Complex<T>> = sizeof(T);

extern "C" {
void emulated_copy_async(void* to, const void* from, int bytes, int present);
void emulated_copy_async_commit();
void emulated_copy_async_wait(int pending);
void emulated_load_matrices(unsigned* result, const void* row, bool transposed);
void emulated_multiply_16x8(float* d, const unsigned* a, const unsigned* b, int kind);
void emulated_multiply_8x8x4(double* d, double a, double b);
}
enum ProductKind { F16_K16, BF16_K16, TF32_K8 };
}  // namespace emulated

// ---------------------------------------------------------------------------------------------- functions
// The built-in names are used because g++ takes about as long to read <cmath> as to compile a small kernel.

EMULATED_INLINE float fabsf(float v) { return __builtin_fabsf(v); }
EMULATED_INLINE float exp(float v) { return __builtin_expf(v); }
EMULATED_INLINE float tanh(float v) { return __builtin_tanhf(v); }
EMULATED_INLINE double exp(double v) { return __builtin_exp(v); }
EMULATED_INLINE double tanh(double v) { return __builtin_tanh(v); }

DEVICE void keep(int&) {}
DEVICE void keep(long long&) {}

// ---------------------------------------------------------------------------------------------- conversion

EMULATED_INLINE float to_float(half h) { return float(emulated_bits<_Float16>(h.bits)); }
EMULATED_INLINE half to_half(float f) { return {emulated_bits<unsigned short>(_Float16(f))}; }

EMULATED_INLINE float to_float(bfloat16 b) { return __uint_as_float(unsigned(b.bits) << 16); }
EMULATED_INLINE bfloat16 to_bfloat16(float f) {
    const unsigned u = __float_as_uint(f);
    if (__builtin_isnan(f)) return {0x7fff};
    const unsigned cut = u & 0xffffu, odd = u >> 16 & 1u;  // to the nearest, ties to even
    const bool up = cut > 0x8000u || (cut == 0x8000u && odd);
    return {static_cast<unsigned short>((u >> 16) + up)};
}
EMULATED_INLINE unsigned to_tf32(float f) {
    const unsigned u = __float_as_uint(f), rounded = u + 0x1000u;  // to the nearest, ties away from zero
    return (__builtin_isfinite(f) && __builtin_isfinite(__uint_as_float(rounded)) ? rounded : u) & 0xffffe000u;
}

// ---------------------------------------------------------------------------------------------- atomic addition

DEVICE void atomic_add(float* to, float value) { atomicAdd(to, value); }
DEVICE void atomic_add(double* to, double value) { atomicAdd(to, value); }

#define EMULATED_NOINLINE __attribute__((no_sanitize("thread", "undefined"), noinline)) static

EMULATED_NOINLINE void atomic_add(float* to, float2 value) {
    emulated::emulated_atomic(to, sizeof value, 2, __builtin_return_address(0));
    to[0] += value.x;
    to[1] += value.y;
}
EMULATED_NOINLINE void atomic_add(float* to, float4 value) {
    emulated::emulated_atomic(to, sizeof value, 4, __builtin_return_address(0));
    to[0] += value.x;
    to[1] += value.y;
    to[2] += value.z;
    to[3] += value.w;
}

// ---------------------------------------------------------------------------------------------- copies into shared memory

template <int BYTES> DEVICE void copy_async(void* to, const void* from, int present = BYTES) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
    emulated::emulated_copy_async(to, from, BYTES, present);
}
DEVICE void copy_async_commit() { emulated::emulated_copy_async_commit(); }
template <int PENDING> DEVICE void copy_async_wait() { emulated::emulated_copy_async_wait(PENDING); }

// ---------------------------------------------------------------------------------------------- matrix products of a warp

DEVICE void load_matrices(unsigned (&result)[4], const void* row) { emulated::emulated_load_matrices(result, row, false); }
DEVICE void load_matrices_transposed(unsigned (&result)[4], const void* row) {
    emulated::emulated_load_matrices(result, row, true);
}
DEVICE void multiply_16x8x16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], half) {
    emulated::emulated_multiply_16x8(d, a, b, emulated::F16_K16);
}
DEVICE void multiply_16x8x16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], bfloat16) {
    emulated::emulated_multiply_16x8(d, a, b, emulated::BF16_K16);
}
DEVICE void multiply_16x8x8_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    emulated::emulated_multiply_16x8(d, a, b, emulated::TF32_K8);
}
DEVICE void multiply_8x8x4(double (&d)[2], double a, double b) { emulated::emulated_multiply_8x8x4(d, a, b); }
