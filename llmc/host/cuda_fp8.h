/*
The two 8-bit floats, for the host build.

    e4m3    4 exponent bits, bias 7,  largest 448,    no infinity, NaN is 0x7f
    e5m2    5 exponent bits, bias 15, largest 57344,  infinities; NaN here is 0x7f

Conversion rounds to nearest even and saturates: what is larger than the largest number, infinity
included, becomes that number (__NV_SATFINITE). NaN stays NaN.
Test: test/test_host.cu (every value, and every halfway point between two)
*/
#pragma once
#include "cuda_runtime.h"

typedef unsigned char __nv_fp8_storage_t;
enum __nv_saturation_t { __NV_NOSAT, __NV_SATFINITE };
enum __nv_fp8_interpretation_t { __NV_E4M3, __NV_E5M2 };

// MANTISSA bits and bias; `largest` is the encoding of the largest finite number.
template <int MANTISSA, int BIAS> HOST_INLINE unsigned char host_fp8_encode(float x,
                                                                            unsigned largest) {
    uint32_t u = HOST_BITS(uint32_t, x), sign = u >> 24 & 0x80;
    u &= 0x7fffffff;
    if (u > 0x7f800000) return 0x7f;
    float magnitude = HOST_BITS(float, u);
    uint32_t code;
    if (magnitude < ldexpf(1.0f, 1 - BIAS)) {       // subnormal: a multiple of the least step
        code = (uint32_t)rintf(ldexpf(magnitude, BIAS - 1 + MANTISSA));
    } else {
        const int shift = 23 - MANTISSA;
        code = (u + (1u << (shift - 1)) - 1 + (u >> shift & 1)) >> shift;
        code -= (uint32_t)(127 - BIAS) << MANTISSA;
    }
    return (unsigned char)(sign | (code < largest ? code : largest));
}

template <int MANTISSA, int BIAS> HOST_INLINE float host_fp8_decode(unsigned char code) {
    int exponent = (code & 0x7f) >> MANTISSA, mantissa = code & ((1 << MANTISSA) - 1);
    float m = (float)mantissa / (float)(1 << MANTISSA);
    float x = exponent ? ldexpf(1.0f + m, exponent - BIAS) : ldexpf(m, 1 - BIAS);
    return code & 0x80 ? -x : x;
}

struct __nv_fp8_e4m3 {
    __nv_fp8_storage_t __x;
    __nv_fp8_e4m3() = default;
    explicit __nv_fp8_e4m3(float x) : __x(host_fp8_encode<3, 7>(x, 0x7e)) {}
    explicit operator float() const {
        return (__x & 0x7f) == 0x7f ? NAN : host_fp8_decode<3, 7>(__x);
    }
};

struct __nv_fp8_e5m2 {
    __nv_fp8_storage_t __x;
    __nv_fp8_e5m2() = default;
    explicit __nv_fp8_e5m2(float x) : __x(host_fp8_encode<2, 15>(x, 0x7b)) {}
    explicit operator float() const {
        if ((__x & 0x7f) > 0x7c) return NAN;
        if ((__x & 0x7f) == 0x7c) return __x & 0x80 ? -INFINITY : INFINITY;
        return host_fp8_decode<2, 15>(__x);
    }
};

HOST_INLINE __nv_fp8_storage_t __nv_cvt_float_to_fp8(float x, __nv_saturation_t saturate,
                                                     __nv_fp8_interpretation_t kind) {
    if (saturate != __NV_SATFINITE) host_error("__nv_cvt_float_to_fp8: only __NV_SATFINITE");
    return kind == __NV_E4M3 ? __nv_fp8_e4m3(x).__x : __nv_fp8_e5m2(x).__x;
}
