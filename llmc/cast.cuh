/*
Copies that change the type of the elements, or only round them to what bf16 can hold.

    cast_to_floatX     float to floatX                       4 + 2 bytes per element (fp32: 4 + 4)
    cast_to_float      floatX to float                       2 + 4                   (fp32: 4 + 4)
    cast_round_bf16    float to the nearest bf16, in float   4 + 4
    pack_bf16          float to bf16, in both builds         4 + 2
    unpack_bf16        bf16 to float, in both builds         2 + 4

pack and unpack are for what goes over a wire in bf16 whatever the build computes in.

rounding    to nearest, ties to even, denormals kept, as the bf16 type does it: what is nearer to
            2^128 than to the largest bf16, 3.39e38, becomes infinite; every NaN becomes 0x7fff.
            Widening is exact.
alignment   pointers to 16 bytes; any n
aliases     out may be in where both have the same type; else they must not overlap
cost        one pass of the bytes above; bound by memory
test        test/cases_cast.h
*/
#pragma once
#include "device.cuh"

constexpr int CAST_THREADS = 256;

// A thread owns eight neighbouring elements; the one at the end of an odd n goes one by one.
template <bool ROUND, class Out, class In>
static __global__ void cast_kernel(Out* out, const In* in, size_t n) {
    size_t i = 8 * ((size_t)blockIdx.x * CAST_THREADS + threadIdx.x);
    if (i + 8 <= n) {
        float8 x = load8(in + i);
        for (int j = 0; j < 8 && ROUND; j++) x.v[j] = round_bf16(x.v[j]);
        store8(out + i, x);
        return;
    }
    for (; i < n; i++) {
        float x = load1(in + i);
        store1(out + i, ROUND ? round_bf16(x) : x);
    }
}

// ---- launchers ------------------------------------------------------------------------------

template <bool ROUND, class Out, class In>
static inline void cast_run(Out* out, const In* in, size_t n, cudaStream_t stream) {
    REQUIRE(n > 0, "cast: no elements");
    launch<cast_kernel<ROUND, Out, In>>(dim3((unsigned)ceil_div(n, 8 * CAST_THREADS)),
                                        dim3(CAST_THREADS), 0, stream, out, in, n);
}

static inline void cast_to_floatX(floatX* out, const float* in, size_t n, cudaStream_t stream) {
    cast_run<false>(out, in, n, stream);
}

static inline void cast_to_float(float* out, const floatX* in, size_t n, cudaStream_t stream) {
    cast_run<false>(out, in, n, stream);
}

static inline void cast_round_bf16(float* out, const float* in, size_t n, cudaStream_t stream) {
    cast_run<true>(out, in, n, stream);
}

static inline void pack_bf16(bf16* out, const float* in, size_t n, cudaStream_t stream) {
    cast_run<false>(out, in, n, stream);
}

static inline void unpack_bf16(float* out, const bf16* in, size_t n, cudaStream_t stream) {
    cast_run<false>(out, in, n, stream);
}
