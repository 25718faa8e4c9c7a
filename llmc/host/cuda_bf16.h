/*
bfloat16 for the host build: the upper half of a float. Conversion rounds to nearest even; every
NaN becomes 0x7fff, as on the device. Operators compute in float and round the result, as CUDA's.
Test: test/test_host.cu (all 2^16 values, and rounding at every exponent)
*/
#pragma once
#include "cuda_runtime.h"

HOST_INLINE unsigned short host_bf16_bits(float x) {
    uint32_t u = HOST_BITS(uint32_t, x);
    uint32_t rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    return (unsigned short)((u & 0x7fffffff) > 0x7f800000 ? 0x7fff : rounded);
}
HOST_INLINE float host_bf16_float(unsigned short bits) {
    return HOST_BITS(float, (uint32_t)bits << 16);
}

struct alignas(2) __nv_bfloat16 {
    unsigned short __x;
    __nv_bfloat16() = default;
    __nv_bfloat16(float x) : __x(host_bf16_bits(x)) {}
    __nv_bfloat16(double x) : __x(host_bf16_bits((float)x)) {}
    __nv_bfloat16(int x) : __x(host_bf16_bits((float)x)) {}
    operator float() const {
        return host_bf16_float(__x);
    }
};

struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

struct __nv_bfloat16_raw {
    unsigned short x;
};

#define HOST_BF16_OPERATOR(op)                                                                     \
    HOST_INLINE __nv_bfloat16 operator op(__nv_bfloat16 a, __nv_bfloat16 b) {                      \
        return __nv_bfloat16((float)a op (float)b);                                                \
    }                                                                                              \
    HOST_INLINE __nv_bfloat16& operator op##=(__nv_bfloat16& a, __nv_bfloat16 b) {                 \
        a = a op b;                                                                                \
        return a;                                                                                  \
    }
#define HOST_BF16_COMPARE(op)                                                                      \
    HOST_INLINE bool operator op(__nv_bfloat16 a, __nv_bfloat16 b) {                               \
        return (float)a op (float)b;                                                               \
    }
HOST_BF16_OPERATOR(+)
HOST_BF16_OPERATOR(-)
HOST_BF16_OPERATOR(*)
HOST_BF16_OPERATOR(/)
HOST_BF16_COMPARE(==)
HOST_BF16_COMPARE(!=)
HOST_BF16_COMPARE(<)
HOST_BF16_COMPARE(<=)
HOST_BF16_COMPARE(>)
HOST_BF16_COMPARE(>=)
HOST_INLINE __nv_bfloat16 operator-(__nv_bfloat16 a) {
    a.__x ^= 0x8000;
    return a;
}

HOST_INLINE __nv_bfloat16 __float2bfloat16(float x) {
    return __nv_bfloat16(x);
}
HOST_INLINE __nv_bfloat16 __float2bfloat16_rn(float x) {
    return __nv_bfloat16(x);
}
HOST_INLINE float __bfloat162float(__nv_bfloat16 x) {
    return (float)x;
}
HOST_INLINE unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) {
    return x.__x;
}
HOST_INLINE __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
    __nv_bfloat16 x;
    x.__x = bits;
    return x;
}
HOST_INLINE __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) {
    return __nv_bfloat162{x, y};
}
HOST_INLINE __nv_bfloat162 make_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) {
    return __nv_bfloat162{x, y};
}
HOST_INLINE __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return __nv_bfloat162{__nv_bfloat16(x), __nv_bfloat16(y)};
}
HOST_INLINE __nv_bfloat162 __float22bfloat162_rn(float2 v) {
    return __floats2bfloat162_rn(v.x, v.y);
}
HOST_INLINE float2 __bfloat1622float2(__nv_bfloat162 v) {
    return float2{(float)v.x, (float)v.y};
}
HOST_INLINE __nv_bfloat16 __low2bfloat16(__nv_bfloat162 v) {
    return v.x;
}
HOST_INLINE __nv_bfloat16 __high2bfloat16(__nv_bfloat162 v) {
    return v.y;
}

typedef __nv_bfloat16 nv_bfloat16;
typedef __nv_bfloat162 nv_bfloat162;
