/*
The host bodies of llmc/device.cuh: 8-wide loads and stores, and the reduction over a warp.
Included there, after float8 and bf16.
Test: test/test_host.cu
*/
#pragma once
#include <string.h>
#include "cuda_bf16.h"

// Vector types of g++, so that these are vector instructions whatever surrounds them.
typedef uint16_t HostU16x8 __attribute__((vector_size(16)));
typedef uint32_t HostU32x8 __attribute__((vector_size(32)));

HOST_INLINE float8 host_load8(const float* p) {
    host_check_aligned(p, 16);
    return *(const float8*)p;
}

HOST_INLINE float8 host_load8(const __nv_bfloat16* p) {
    host_check_aligned(p, 16);
    HostU16x8 half = *(const HostU16x8*)p;
    float8 x;
    HostU32x8 word = __builtin_convertvector(half, HostU32x8) << 16;
    memcpy(&x, &word, sizeof(x));
    return x;
}

HOST_INLINE void host_store8(float* p, float8 x) {
    host_check_aligned(p, 16);
    *(float8*)p = x;
}

// host_bf16_bits, eight at a time.
HOST_INLINE void host_store8(__nv_bfloat16* p, float8 x) {
    host_check_aligned(p, 16);
    HostU32x8 u;
    memcpy(&u, &x, sizeof(u));
    HostU32x8 rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    HostU32x8 nan = (HostU32x8)((u & 0x7fffffff) > 0x7f800000);
    *(HostU16x8*)p = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fff), HostU16x8);
}

// All shuffles of the butterfly in one meeting of the lanes: the same additions, in fewer switches.
template <int W, bool MAX> HOST_NOSAN static void host_butterfly(void** slots, unsigned mask) {
    int first = __builtin_ctz(mask);
    float v[W], next[W];
    for (int i = 0; i < W; i++) v[i] = HOST_BITS(float, host_slot_value(slots[first + i]));
    for (int distance = W / 2; distance > 0; distance /= 2) {
        for (int i = 0; i < W; i++) {
            float a = v[i], b = v[i ^ distance];
            next[i] = !MAX ? a + b : a > b || a != a ? a : b;
        }
        for (int i = 0; i < W; i++) v[i] = next[i];
    }
    for (int i = 0; i < W; i++) slots[first + i] = host_slot(HOST_BITS(uint32_t, v[i]), 0);
}

template <int W, bool MAX> HOST_INLINE float host_warp_reduce(unsigned group, float v) {
    if (W == 1) return v;
    void* slot = host_slot(HOST_BITS(uint32_t, v), 0);
    slot = host_warp_collective(group, host_butterfly<W, MAX>, slot, MAX ? "warp_max" : "warp_sum");
    return HOST_BITS(float, host_slot_value(slot));
}
