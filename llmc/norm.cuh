/*
The norm of the gradients, and whether all of them are finite.

    out[0] = Σ g_i²         (add: out[0] + Σ g_i²)
    out[1] = number of g_i that are NaN or infinite  (add: added up likewise)

Called once per tensor, with add = false first, it measures all gradients without a wait: the host
reads two floats when it needs them.

out         2 floats
g           n floats, any n, aligned to 16 bytes
scratch     grad_norm_scratch_floats(n) floats
order       A block sums 65536 neighbouring elements and one more block sums the blocks: a fixed
            tree, so equal gradients have equal bits. A term passes through at most 86 + n/2^23
            roundings of 2^-24 each, and all terms are positive: that is the relative error of
            out[0] at most, 1e-5 for 2^28 elements.
overflow    A sum above 3.4e38 is infinite while out[1] stays 0; out[1] is exact up to 2^24.
cost        4 bytes per element; bound by memory
test        test/cases_optimizer.h: norm
*/
#pragma once
#include <float.h>

#include "device.cuh"

constexpr int NORM_THREADS = 128;
constexpr int NORM_PASSES = 32;   // of 16 elements per thread: a whole cache line each
constexpr size_t NORM_STEP = (size_t)NORM_THREADS * 16;
constexpr size_t NORM_BLOCK_ELEMENTS = NORM_PASSES * NORM_STEP;

static inline size_t grad_norm_scratch_floats(size_t n) {
    return 2 * ceil_div(n, NORM_BLOCK_ELEMENTS);
}

static __device__ __forceinline__ bool is_finite(float x) {
    return fabsf(x) <= FLT_MAX;
}

// partial[b] = Σ g², partial[gridDim.x + b] = non-finite elements of block b
static __global__ void grad_norm_kernel(float* partial, const float* g, size_t n) {
    DYN_SMEM(float, scratch);
    size_t begin = blockIdx.x * NORM_BLOCK_ELEMENTS + threadIdx.x * 16;
    size_t end = begin + NORM_BLOCK_ELEMENTS;
    float8 sums = {};
    float tail = 0.0f;
    for (size_t i = begin; i < end; i += NORM_STEP) {
        if (i + 16 <= n) {
            float8 x = load8(g + i), y = load8(g + i + 8);
            for (int j = 0; j < 8; j++) sums.v[j] += x.v[j] * x.v[j];
            for (int j = 0; j < 8; j++) sums.v[j] += y.v[j] * y.v[j];
        } else {
            for (size_t k = i; k < n && k < i + 16; k++) tail += g[k] * g[k];
        }
    }
    for (int half = 4; half > 0; half /= 2) {
        for (int j = 0; j < half; j++) sums.v[j] += sums.v[j + half];
    }
    float sum = block_sum(sums.v[0] + tail, scratch);
    float bad = 0.0f;
    if (!is_finite(sum)) {    // the same in all threads; a finite sum has finite terms
        for (size_t i = begin; i < end; i += NORM_STEP) {
            for (size_t k = i; k < n && k < i + 16; k++) bad += is_finite(g[k]) ? 0.0f : 1.0f;
        }
        bad = block_sum(bad, scratch);
    }
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = sum;
        partial[gridDim.x + blockIdx.x] = bad;
    }
}

static __global__ void grad_norm_finish_kernel(float* out, const float* partial, int blocks,
                                               bool add) {
    DYN_SMEM(float, scratch);
    float sum = 0.0f, bad = 0.0f;
    for (int b = threadIdx.x; b < blocks; b += NORM_THREADS) {
        sum += partial[b];
        bad += partial[blocks + b];
    }
    sum = block_sum(sum, scratch);
    bad = block_sum(bad, scratch);
    if (threadIdx.x == 0) {
        out[0] = add ? out[0] + sum : sum;
        out[1] = add ? out[1] + bad : bad;
    }
}

// ---- launcher -------------------------------------------------------------------------------

static inline void grad_norm(float* out, const float* g, size_t n, bool add, float* scratch,
                             cudaStream_t stream) {
    REQUIRE(n > 0, "grad_norm: no elements");
    int blocks = (int)ceil_div(n, NORM_BLOCK_ELEMENTS);
    size_t smem_bytes = 32 * sizeof(float);
    launch<grad_norm_kernel>(dim3(blocks), dim3(NORM_THREADS), smem_bytes, stream, scratch, g, n);
    launch<grad_norm_finish_kernel>(dim3(1), dim3(NORM_THREADS), smem_bytes, stream, out,
                                    (const float*)scratch, blocks, add);
}
