/*
First values of parameters, made where they live.

    uniform   p_i = low + (high - low) u_i,   u_i in (0, 1);  low == high gives a constant
    normal    p_i = z_i,                      z_i ~ N(0, 1)
    copy      p_i = src_i

u_i and z_i come from the counter-based generator of rng.h: they depend on (seed, stream, i) alone, so the
start of a run is the same on any device, with any launch shape.

p (n) floatX; master (n) float or NULL, receives the value before it is rounded to floatX, and in the
fp32 build is p itself. With `bf16` the value is rounded to bf16 wherever it is stored.
cost        one pass of writes, once in a run
test        test/test_model.cu: init
*/
#pragma once
#include "device.cuh"
#include "rng.h"

template <int KIND>     // 0 uniform, 1 normal, 2 copy
static __global__ void init_kernel(floatX* p, float* master, const float* src, size_t n, float low, float high, bool bf16_value,
                                   uint64_t seed, uint32_t stream) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float value;
    if (KIND == 0) value = low + (high - low) * (float)rng_uniform(seed, stream, i);
    else if (KIND == 1) value = (float)rng_normal(seed, stream, i);
    else value = src[i];
    if (bf16_value) value = round_bf16(value);
    p[i] = from_float<floatX>(value);
    if (master) master[i] = value;
}

// ---- launchers -----------------------------------------------------------------------------

static inline void init_uniform(floatX* p, float* master, size_t n, float low, float high, bool bf16_value, int64_t seed,
                                uint32_t rng_stream, cudaStream_t stream) {
    launch<init_kernel<0>>(dim3(ceil_div(n, 256)), dim3(256), 0, stream, p, master, (const float*)NULL, n, low, high, bf16_value, (uint64_t)seed, rng_stream);
}

static inline void init_normal(floatX* p, float* master, size_t n, bool bf16_value, int64_t seed, uint32_t rng_stream,
                               cudaStream_t stream) {
    launch<init_kernel<1>>(dim3(ceil_div(n, 256)), dim3(256), 0, stream, p, master, (const float*)NULL, n, 0.0f, 0.0f, bf16_value, (uint64_t)seed, rng_stream);
}

static inline void init_copy(floatX* p, float* master, const float* src, size_t n, bool bf16_value, cudaStream_t stream) {
    launch<init_kernel<2>>(dim3(ceil_div(n, 256)), dim3(256), 0, stream, p, master, src, n, 0.0f, 0.0f, bf16_value, (uint64_t)0, 0u);
}
