/*
The mathematical functions and intrinsics of CUDA that glibc does not have, or has otherwise.
Included by cuda_runtime.h. Approximate ones are as close as or closer than on a GPU; the ones with
a rounding in their name are exact.
Test: test/test_host.cu
*/
#pragma once

// Macros, because <math.h> declares these names as extern "C" functions.
#define fmaxf(a, b) host_fmaxf(a, b)
#define fminf(a, b) host_fminf(a, b)
#define __expf(x) host_exp2((x) * 1.4426950408889634f)
#define __exp10f(x) host_exp2((x) * 3.3219280948873623f)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __tanf(x) tanf(x)
#define __powf(x, y) powf(x, y)

// IEEE 754 maxNum, as in CUDA: a NaN loses against a number. Inline, where libm's is a call.
HOST_INLINE float host_fmaxf(float a, float b) {
    return a >= b || b != b ? a : b;
}
HOST_INLINE float host_fminf(float a, float b) {
    return a <= b || b != b ? a : b;
}

// 2^x to 2e-7 relative, in a form that g++ turns into vector code: x = n + f with |f| <= 1/2, a
// polynomial for 2^f, n added to the exponent. Results below 2^-126 are 0, as ex2.approx.ftz has
// it; NaN stays NaN.
HOST_INLINE float host_exp2(float x) {
    float clamped = x > 128.0f ? 128.0f : x < -126.0f ? -126.0f : x;
    float shifted = clamped + 12582912.0f;      // 1.5 * 2^23: the integer ends in the low bits
    float f = clamped - (shifted - 12582912.0f);
    uint32_t n = HOST_BITS(uint32_t, shifted) << 23;
    float p = 1.54531629e-4f;                   // (2^f - 1) / f at six Chebyshev points: 5e-9
    p = p * f + 1.33908634e-3f;
    p = p * f + 9.61808256e-3f;
    p = p * f + 5.55035711e-2f;
    p = p * f + 2.40226508e-1f;
    p = p * f + 6.93147188e-1f;
    p = p * f + 1.0f;
    float y = HOST_BITS(float, HOST_BITS(uint32_t, p) + n);
    y = x < -126.0f ? 0.0f : y;
    return x != x ? x : y;
}

HOST_INLINE float rsqrtf(float x) {
    return 1.0f / sqrtf(x);
}
HOST_INLINE float __frsqrt_rn(float x) {
    return (float)(1.0 / sqrt((double)x));
}
HOST_INLINE float __fdividef(float a, float b) {
    return a / b;
}
HOST_INLINE float __saturatef(float x) {
    return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f;     // NaN gives 0
}
HOST_INLINE float __frcp_rn(float x) {
    return 1.0f / x;
}
HOST_INLINE float __fdiv_rn(float a, float b) {
    return a / b;
}
HOST_INLINE float __fsqrt_rn(float x) {
    return sqrtf(x);
}
HOST_INLINE float __fmaf_rn(float a, float b, float c) {
    return fmaf(a, b, c);
}
// noipa would be needed to keep g++ from contracting through an inline function; a volatile is
// not: the empty asm ends the expression.
HOST_INLINE float __fmul_rn(float a, float b) {
    float y = a * b;
#if defined(__x86_64__)
    asm("" : "+x"(y));
#endif
    return y;
}
HOST_INLINE float __fadd_rn(float a, float b) {
    return a + b;
}
HOST_INLINE float __fsub_rn(float a, float b) {
    return a - b;
}

// ---- bits and integers ---------------------------------------------------------------------

HOST_INLINE unsigned __float_as_uint(float x) {
    return HOST_BITS(unsigned, x);
}
HOST_INLINE int __float_as_int(float x) {
    return HOST_BITS(int, x);
}
HOST_INLINE float __uint_as_float(unsigned x) {
    return HOST_BITS(float, x);
}
HOST_INLINE float __int_as_float(int x) {
    return HOST_BITS(float, x);
}
HOST_INLINE int __float2int_rn(float x) {
    return (int)lrintf(x);
}
HOST_INLINE int __float2int_rz(float x) {
    return (int)x;
}
HOST_INLINE int __popc(unsigned x) {
    return __builtin_popcount(x);
}
HOST_INLINE int __popcll(unsigned long long x) {
    return __builtin_popcountll(x);
}
HOST_INLINE int __clz(int x) {
    return x ? __builtin_clz((unsigned)x) : 32;
}
HOST_INLINE int __clzll(long long x) {
    return x ? __builtin_clzll((unsigned long long)x) : 64;
}
HOST_INLINE int __ffs(int x) {
    return __builtin_ffs(x);
}
HOST_INLINE unsigned __umulhi(unsigned a, unsigned b) {
    return (unsigned)((unsigned long long)a * b >> 32);
}
HOST_INLINE unsigned __brev(unsigned x) {
    unsigned y = 0;
    for (int i = 0; i < 32; i++) y |= (x >> i & 1) << (31 - i);
    return y;
}
HOST_INLINE void __nanosleep(unsigned) {
    host_yield();
}
HOST_INLINE void __trap(void) {
    host_error("__trap");
}
HOST_INLINE size_t __cvta_generic_to_shared(const void* p) {
    return (size_t)((const unsigned char*)p - host_block.dynamic);
}

#define HOST_MIN_MAX(T)                                                                            \
    HOST_INLINE T min(T a, T b) {                                                                  \
        return a < b ? a : b;                                                                      \
    }                                                                                              \
    HOST_INLINE T max(T a, T b) {                                                                  \
        return a > b ? a : b;                                                                      \
    }
HOST_MIN_MAX(int)
HOST_MIN_MAX(unsigned)
HOST_MIN_MAX(long)
HOST_MIN_MAX(unsigned long)
HOST_MIN_MAX(long long)
HOST_MIN_MAX(unsigned long long)
HOST_INLINE float min(float a, float b) {
    return host_fminf(a, b);
}
HOST_INLINE float max(float a, float b) {
    return host_fmaxf(a, b);
}
