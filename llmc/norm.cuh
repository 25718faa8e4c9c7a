/*
The sums of squares of many arrays at once, and how many of their elements are not finite: of the
gradients before an update, and of the weights.

    out[2 s]     = Σ x_i² over segment s
    out[2 s + 1] = number of its elements that are NaN or infinite

A table of the segments is made once and stays on the device. A measurement is two launches however
many segments there are, and no wait: the host reads the floats when it needs them.

x           n elements of float or floatX, any n from 0, anywhere. An array aligned to 16 bytes is
            read by vectors, another one element by element: so large ones had better be aligned.
out         (count, 2) floats of the first `count` segments
total       2 floats: the segments from `from` on and before `to`, added up; none: 0
memory      norms_bytes() of them, aligned to 16 bytes: 24 bytes per 65536 elements, 4 per segment
order       A block sums 65536 neighbouring elements, one more block the blocks of a segment, one
            the segments of a total: fixed trees, the same wherever an array lies, so equal elements
            have equal bits. A term passes through at most 86 + n/2^23 roundings of 2^-24 each, in a
            total through 9 + (to - from)/128 more, and all terms are positive: that is the relative
            error of a sum at most, 1e-5 for 2^28 elements.
overflow    A sum above 3.4e38 is infinite while the count stays 0; a count is exact up to 2^24.
cost        4 bytes per element of float, 2 of bf16; bound by memory
test        test/cases_optimizer.h: norm
*/
#pragma once
#include "device.cuh"
#include "guard.cuh"

constexpr int NORM_THREADS = 128;
constexpr int NORM_PASSES = 32;   // of 16 elements per thread: a whole cache line each
constexpr int NORM_STEP = NORM_THREADS * 16;
constexpr int NORM_BLOCK_ELEMENTS = NORM_PASSES * NORM_STEP;

typedef struct NormSegment {
    const void* x;
    size_t n;
    bool floats;    // x is float*, else floatX*
} NormSegment;

// What one block of threads sums.
typedef struct NormBlock {
    const void* x;
    int n;
    bool floats;
} NormBlock;

typedef struct Norms {
    int count;              // segments
    int* first;             // (count + 1), on the host: the first block of each, and of none
    int* first_device;      // the same
    NormBlock* blocks;      // (first[count]), on the device
    float* partial;         // (2, blocks in use)
} Norms;

// ---- kernels --------------------------------------------------------------------------------

template <class T> static __device__ __forceinline__ float8 norm_load8(const T* x, bool aligned) {
    if (aligned) return load8(x);
    float8 v;
    for (int j = 0; j < 8; j++) v.v[j] = load1(x + j);
    return v;
}

// This thread's part of the sum of squares of n elements.
template <class T> static __device__ __forceinline__ float norm_squares(const T* x, int n) {
    bool aligned = ((uintptr_t)x & 15) == 0;
    float8 sums = {};
    float tail = 0.0f;
    for (int i = threadIdx.x * 16; i < n; i += NORM_STEP) {
        if (i + 16 <= n) {
            float8 a = norm_load8(x + i, aligned), b = norm_load8(x + i + 8, aligned);
            for (int j = 0; j < 8; j++) sums.v[j] += a.v[j] * a.v[j];
            for (int j = 0; j < 8; j++) sums.v[j] += b.v[j] * b.v[j];
        } else {
            for (int k = i; k < n; k++) tail += load1(x + k) * load1(x + k);
        }
    }
    for (int half = 4; half > 0; half /= 2) {
        for (int j = 0; j < half; j++) sums.v[j] += sums.v[j + half];
    }
    return sums.v[0] + tail;
}

// This thread's part of the number of those that are not finite.
template <class T> static __device__ __forceinline__ float norm_count(const T* x, int n) {
    float bad = 0.0f;
    for (int i = threadIdx.x; i < n; i += NORM_THREADS)
        bad += is_finite(load1(x + i)) ? 0.0f : 1.0f;
    return bad;
}

// partial[b] = Σ x², partial[gridDim.x + b] = non-finite elements of block b
static __global__ void norms_kernel(float* partial, const NormBlock* blocks) {
    DYN_SMEM(float, scratch);
    NormBlock b = blocks[blockIdx.x];
    bool floats = b.floats || !FLOATX_IS_BF16;
    float sum = floats ? norm_squares((const float*)b.x, b.n)
                       : norm_squares((const floatX*)b.x, b.n);
    sum = block_sum(sum, scratch);
    float bad = 0.0f;
    if (!is_finite(sum)) {    // the same in all threads; a finite sum has finite terms
        bad = floats ? norm_count((const float*)b.x, b.n) : norm_count((const floatX*)b.x, b.n);
        bad = block_sum(bad, scratch);
    }
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = sum;
        partial[gridDim.x + blockIdx.x] = bad;
    }
}

// Block s adds up the blocks of segment s.
static __global__ void norms_finish_kernel(float* out, const float* partial, const int* first,
                                           int blocks) {
    DYN_SMEM(float, scratch);
    float sum = 0.0f, bad = 0.0f;
    for (int b = first[blockIdx.x] + threadIdx.x; b < first[blockIdx.x + 1]; b += NORM_THREADS) {
        sum += partial[b];
        bad += partial[blocks + b];
    }
    sum = block_sum(sum, scratch);
    bad = block_sum(bad, scratch);
    if (threadIdx.x == 0) {
        out[2 * blockIdx.x] = sum;
        out[2 * blockIdx.x + 1] = bad;
    }
}

static __global__ void norms_total_kernel(float* total, const float* segments, int from, int to) {
    DYN_SMEM(float, scratch);
    float sum = 0.0f, bad = 0.0f;
    for (int s = from + threadIdx.x; s < to; s += NORM_THREADS) {
        sum += segments[2 * s];
        bad += segments[2 * s + 1];
    }
    sum = block_sum(sum, scratch);
    bad = block_sum(bad, scratch);
    if (threadIdx.x == 0) {
        total[0] = sum;
        total[1] = bad;
    }
}

// ---- the table ------------------------------------------------------------------------------

static inline size_t norms_blocks(const NormSegment* segments, int count) {
    size_t blocks = 0;
    for (int s = 0; s < count; s++) blocks += ceil_div(segments[s].n, NORM_BLOCK_ELEMENTS);
    return blocks;
}

// Of `segments` only the sizes matter.
static inline size_t norms_bytes(const NormSegment* segments, int count) {
    return norms_blocks(segments, count) * (sizeof(NormBlock) + 2 * sizeof(float)) +
           ((size_t)count + 1) * sizeof(int);
}

// memory: on the device. `segments` is not needed afterwards.
static inline void norms_init(Norms* norms, const NormSegment* segments, int count, void* memory,
                              cudaStream_t stream) {
    size_t blocks = norms_blocks(segments, count), at = 0;
    REQUIRE(count >= 0 && blocks <= INT32_MAX, "norms: %d segments of %zu blocks", count, blocks);
    norms->count = count;
    norms->first = (int*)host_alloc((size_t)count + 1, sizeof(int));
    norms->blocks = (NormBlock*)memory;
    norms->partial = (float*)(norms->blocks + blocks);
    norms->first_device = (int*)(norms->partial + 2 * blocks);
    NormBlock* table = (NormBlock*)host_alloc(blocks, sizeof *table);
    for (int s = 0; s < count; s++) {
        const NormSegment* segment = &segments[s];
        bool floats = segment->floats || !FLOATX_IS_BF16;
        size_t element = floats ? sizeof(float) : sizeof(floatX);
        REQUIRE((uintptr_t)segment->x % element == 0, "norms: segment %d begins within an element",
                s);
        norms->first[s] = (int)at;
        for (size_t i = 0; i < segment->n; i += NORM_BLOCK_ELEMENTS, at++) {
            size_t rest = segment->n - i;
            table[at].x = (const char*)segment->x + i * element;
            table[at].n = (int)(rest < NORM_BLOCK_ELEMENTS ? rest : NORM_BLOCK_ELEMENTS);
            table[at].floats = floats;
        }
    }
    norms->first[count] = (int)at;
    CUDA_CHECK(cudaMemcpyAsync(norms->blocks, table, blocks * sizeof *table, cudaMemcpyHostToDevice,
                               stream));
    CUDA_CHECK(cudaMemcpyAsync(norms->first_device, norms->first, ((size_t)count + 1) * sizeof(int),
                               cudaMemcpyHostToDevice, stream));
    CUDA_CHECK(cudaStreamSynchronize(stream));
    free(table);
}

static inline void norms_free(Norms* norms) {
    free(norms->first);
    norms->first = NULL;
}

// ---- launchers ------------------------------------------------------------------------------

static inline void norms_measure(float* out, const Norms* norms, int count, cudaStream_t stream) {
    REQUIRE(count >= 0 && count <= norms->count, "norms_measure: %d of %d segments", count,
            norms->count);
    if (count == 0) return;
    int blocks = norms->first[count];
    size_t smem_bytes = 32 * sizeof(float);
    if (blocks > 0) {
        launch<norms_kernel>(dim3(blocks), dim3(NORM_THREADS), smem_bytes, stream, norms->partial,
                             (const NormBlock*)norms->blocks);
    }
    launch<norms_finish_kernel>(dim3(count), dim3(NORM_THREADS), smem_bytes, stream, out,
                                (const float*)norms->partial, (const int*)norms->first_device,
                                blocks);
}

static inline void norms_total(float* total, const float* segments, int from, int to,
                               cudaStream_t stream) {
    REQUIRE(from >= 0 && from <= to, "norms_total: segments from %d to %d", from, to);
    launch<norms_total_kernel>(dim3(1), dim3(NORM_THREADS), 32 * sizeof(float), stream, total,
                               segments, from, to);
}
