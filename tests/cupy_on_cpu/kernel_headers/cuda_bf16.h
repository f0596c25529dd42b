// The part of NVIDIA's bfloat16 class that CuPy's headers use.
#pragma once

struct __nv_bfloat16 {
    unsigned short x;
    __nv_bfloat16() = default;
    __nv_bfloat16(float value) {
        const unsigned wide = __float_as_uint(value), cut = wide & 0xffffu, odd = wide >> 16 & 1u;
        const bool up = cut > 0x8000u || (cut == 0x8000u && odd);  // to the nearest, ties to even
        x = value != value ? 0x7fff : static_cast<unsigned short>((wide >> 16) + up);
    }
    operator float() const { return __uint_as_float(unsigned(x) << 16); }
};
typedef __nv_bfloat16 nv_bfloat16;
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.x; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
    __nv_bfloat16 value;
    value.x = bits;
    return value;
}
inline __nv_bfloat16 __float2bfloat16(float value) { return __nv_bfloat16(value); }
inline float __bfloat162float(__nv_bfloat16 value) { return float(value); }
inline int __hisnan(__nv_bfloat16 value) { return std::isnan(float(value)); }
inline int __hisinf(__nv_bfloat16 value) { return std::isinf(float(value)) ? (float(value) > 0 ? 1 : -1) : 0; }
