/*
The two 8-bit floats, for the host build.

    e4m3    4 exponent bits, bias 7,  largest 448,    no infinity, NaN is 0x7f
    e5m2    5 exponent bits, bias 15, largest 57344,  infinities; NaN here is 0x7f

Conversion rounds to nearest even and saturates: what is larger than the largest number, infinity
included, becomes that number (__NV_SATFINITE). NaN stays NaN.
Test: test/test_host.cu (every value, and every halfway point between two), test/cases_fp8.h
*/
#pragma once
#include "cuda_runtime.h"

typedef unsigned char __nv_fp8_storage_t;
enum __nv_saturation_t { __NV_NOSAT, __NV_SATFINITE };
enum __nv_fp8_interpretation_t { __NV_E4M3, __NV_E5M2 };

// The codes of x; U and F are uint32_t and float, or vectors of as many, which only a pointer can
// hand over in every build. MANTISSA bits and bias; `largest` is the code of the largest number.
template <int MANTISSA, int BIAS, class U, class F>
HOST_INLINE void host_fp8_encode(U* codes, const F* x, uint32_t largest) {
    const int shift = 23 - MANTISSA;
    const uint32_t least_normal = (uint32_t)(128 - BIAS) << 23;
    const uint32_t rebias = (uint32_t)(127 - BIAS) << MANTISSA;
    // Below the normal numbers the steps are equal: those of a float as large as this one, so that
    // the sum has the count of steps in its last bits, rounded to even.
    const uint32_t steps = (uint32_t)(151 - BIAS - MANTISSA) << 23;
    U u = HOST_BITS(U, *x), sign = u >> 24 & 0x80u;
    u &= 0x7fffffffu;
    U normal = ((u + ((1u << (shift - 1)) - 1u) + (u >> shift & 1u)) >> shift) - rebias;
    U small = HOST_BITS(U, HOST_BITS(F, u) + HOST_BITS(float, steps)) - steps;
    U code = u < least_normal ? small : normal;
    code = code < largest ? code : U{} + largest;
    *codes = u > 0x7f800000u ? U{} + 0x7fu : sign | code;
}

// e4m3 with MANTISSA 3, e5m2 with 2
template <int MANTISSA> HOST_INLINE __nv_fp8_storage_t host_fp8_code(float x) {
    uint32_t code;
    host_fp8_encode<MANTISSA, MANTISSA == 3 ? 7 : 15>(&code, &x, MANTISSA == 3 ? 0x7e : 0x7b);
    return (__nv_fp8_storage_t)code;
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
    explicit __nv_fp8_e4m3(float x) : __x(host_fp8_code<3>(x)) {}
    explicit operator float() const {
        return (__x & 0x7f) == 0x7f ? NAN : host_fp8_decode<3, 7>(__x);
    }
};

struct __nv_fp8_e5m2 {
    __nv_fp8_storage_t __x;
    __nv_fp8_e5m2() = default;
    explicit __nv_fp8_e5m2(float x) : __x(host_fp8_code<2>(x)) {}
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

// Eight codes, the first in the low byte: the host's body of fp8_encode8 in llmc/fp8.cuh.
HOST_INLINE uint64_t host_fp8_encode8(const float* x, __nv_fp8_interpretation_t kind) {
    typedef float Float8 __attribute__((vector_size(32)));
    typedef uint32_t Uint8 __attribute__((vector_size(32)));
    typedef uint8_t Byte8 __attribute__((vector_size(8)));
    Float8 v;
    memcpy(&v, x, sizeof v);
    Uint8 codes;
    if (kind == __NV_E4M3) host_fp8_encode<3, 7>(&codes, &v, 0x7e);
    else host_fp8_encode<2, 15>(&codes, &v, 0x7b);
    return HOST_BITS(uint64_t, __builtin_convertvector(codes, Byte8));
}
