/*
First values of parameters, in float, made on the device.

    uniform   x_i = low + (high - low) u_i,   u_i in (0, 1);  low == high gives a constant
    normal    x_i = z_i,                      z_i ~ N(0, 1)

u_i and z_i come from the counter-based generator of rng.h: they depend on (seed, rng_stream, i)
alone, so the start of a run is the same on any device, with any launch shape and number of ranks.

out         n floats, any n
cost        4 bytes per element and the generator's arithmetic; once in a run
test        test/test_model.cu: init
*/
#pragma once
#include "device.cuh"
#include "rng.h"

constexpr int INIT_THREADS = 256;

template <bool NORMAL>
static __global__ void init_kernel(float* out, size_t n, float low, float high, uint64_t seed,
                                   uint32_t rng_stream) {
    size_t i = (size_t)blockIdx.x * INIT_THREADS + threadIdx.x;
    if (i >= n) return;
    if (NORMAL) out[i] = (float)rng_normal(seed, rng_stream, i);
    else out[i] = low + (high - low) * (float)rng_uniform(seed, rng_stream, i);
}

// ---- launchers ------------------------------------------------------------------------------

static inline void init_uniform(float* out, size_t n, float low, float high, int64_t seed,
                                uint32_t rng_stream, cudaStream_t stream) {
    launch<init_kernel<false>>(dim3((unsigned)ceil_div(n, INIT_THREADS)), dim3(INIT_THREADS), 0,
                               stream, out, n, low, high, (uint64_t)seed, rng_stream);
}

static inline void init_normal(float* out, size_t n, int64_t seed, uint32_t rng_stream,
                               cudaStream_t stream) {
    launch<init_kernel<true>>(dim3((unsigned)ceil_div(n, INIT_THREADS)), dim3(INIT_THREADS), 0,
                              stream, out, n, 0.0f, 0.0f, (uint64_t)seed, rng_stream);
}
