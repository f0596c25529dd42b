// The part of NVIDIA's float16 class that CuPy's headers use.
#pragma once

struct __half_raw {
    unsigned short x;
};
struct __half {
    unsigned short bits;
    __half() = default;
    __half(float value) : bits(__float2half_rn(value)) {}
    template <class T, class = std::enable_if_t<std::is_arithmetic_v<T>>>
    explicit __half(T value) : bits(emulated_bits<unsigned short>(_Float16(value))) {}
    __half(const __half_raw& raw) : bits(raw.x) {}
    operator float() const { return __half2float(bits); }
    operator __half_raw() const { return {bits}; }
};
typedef __half half;
struct alignas(4) __half2 {
    __half x, y;
};
typedef __half2 half2;
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline __half __ushort_as_half(unsigned short bits) { return __half(__half_raw{bits}); }
inline __half __float2half(float value) { return __half(value); }
inline float __half2float(__half value) { return float(value); }
