/*
The verbs of the kernels: launch, 8-wide loads and stores, sums over a warp and over a block.

Kernels are written once. nvcc compiles them for the GPU; g++ compiles them against llmc/host,
which runs them thread for thread. Where the two targets differ they differ here and in ptx.cuh.

launch<kernel>(grid, block, smem_bytes, stream, args...); under --trace it records itself
load8 store8    8 neighbouring elements as floats; p divisible by 16 bytes; bf16 is rounded to
                nearest even at the store
warp_sum<W>     over aligned groups of W = 1, 2, 4, .. 32 lanes, all of which must call; in the
                order of a butterfly (distance W/2, .., 1), result in all lanes, bits equal on both
                targets. The other groups of the warp need not call.
block_sum       warp sums, then their sum in the order of the warps; all threads of the block call
maxima          keep a NaN: max(NaN, 1) is NaN, so that a divergence is not hidden
Test: test/test_host.cu
*/
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>
#include "common.h"

typedef __nv_bfloat16 bf16;

#if defined(PRECISION_BF16)
typedef bf16 floatX;
static constexpr bool FLOATX_IS_BF16 = true;
#elif defined(PRECISION_FP32)
typedef float floatX;
static constexpr bool FLOATX_IS_BF16 = false;
#else
#error "define PRECISION_BF16 or PRECISION_FP32"
#endif

static constexpr int WARP = 32;

// ---- launch --------------------------------------------------------------------------------

static inline void cuda_check(cudaError_t error, const char* what, const char* file, int line) {
    if (error != cudaSuccess) {
        die("%s: %s\n            at %s:%d", what, cudaGetErrorString(error), file, line);
    }
}
#define CUDA_CHECK(expression) cuda_check((expression), #expression, __FILE__, __LINE__)

#include "trace.h"

#ifdef __CUDACC__

// One array for all kernels: the memory is the launch's, its type the kernel's.
#define DYN_SMEM(T, name)                                                                          \
    extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];                       \
    T* name = reinterpret_cast<T*>(dynamic_shared_memory)

// Above 48 KB a kernel must ask for its shared memory; once per kernel and size is enough.
template <auto K, class... A>
static inline void launch(dim3 grid, dim3 block, size_t smem_bytes, cudaStream_t stream,
                          A... args) {
    static size_t granted = 48 * 1024;
    if (smem_bytes > granted) {
        CUDA_CHECK(cudaFuncSetAttribute(K, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        (int)smem_bytes));
        granted = smem_bytes;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = smem_bytes;
    config.stream = stream;
    int op = trace_on ? trace_begin(trace_kernel_name<K>(), stream) : -1;
    CUDA_CHECK(cudaLaunchKernelEx(&config, K, args...));
    trace_end(op, stream);
}

#else

template <auto K, class... A>
static inline void launch(dim3 grid, dim3 block, size_t smem_bytes, cudaStream_t stream,
                          A... args) {
    int op = trace_on ? trace_begin(trace_kernel_name<K>(), stream) : -1;
    host_launch<K>(grid, block, smem_bytes, stream, args...);
    trace_end(op, stream);
}

#endif

// ---- elements ------------------------------------------------------------------------------

struct alignas(16) float8 {
    float v[8];
};

#ifndef __CUDACC__
#include "host/verbs.h"
#endif

static __device__ __forceinline__ float to_float(float x) {
    return x;
}
static __device__ __forceinline__ float to_float(bf16 x) {
    return __bfloat162float(x);
}

template <class T> static __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) {
    return __float2bfloat16_rn(x);
}

static __device__ __forceinline__ float round_bf16(float x) {
    return __bfloat162float(__float2bfloat16_rn(x));
}

template <class T> static __device__ __forceinline__ float load1(const T* p) {
    return to_float(*p);
}
template <class T> static __device__ __forceinline__ void store1(T* p, float x) {
    *p = from_float<T>(x);
}

static __device__ __forceinline__ float8 load8(const float* p) {
#ifdef __CUDACC__
    float4 a = *reinterpret_cast<const float4*>(p);
    float4 b = *reinterpret_cast<const float4*>(p + 4);
    return float8{{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
#else
    return host_load8(p);
#endif
}

static __device__ __forceinline__ float8 load8(const bf16* p) {
#ifdef __CUDACC__
    uint4 u = *reinterpret_cast<const uint4*>(p);
    uint32_t word[4] = {u.x, u.y, u.z, u.w};
    float8 x;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        x.v[2 * k] = __uint_as_float(word[k] << 16);
        x.v[2 * k + 1] = __uint_as_float(word[k] & 0xffff0000u);
    }
    return x;
#else
    return host_load8(p);
#endif
}

static __device__ __forceinline__ void store8(float* p, float8 x) {
#ifdef __CUDACC__
    *reinterpret_cast<float4*>(p) = make_float4(x.v[0], x.v[1], x.v[2], x.v[3]);
    *reinterpret_cast<float4*>(p + 4) = make_float4(x.v[4], x.v[5], x.v[6], x.v[7]);
#else
    host_store8(p, x);
#endif
}

static __device__ __forceinline__ void store8(bf16* p, float8 x) {
#ifdef __CUDACC__
    union {
        __nv_bfloat162 pair[4];
        uint4 u;
    } out;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        out.pair[k] = __floats2bfloat162_rn(x.v[2 * k], x.v[2 * k + 1]);
    }
    *reinterpret_cast<uint4*>(p) = out.u;
#else
    host_store8(p, x);
#endif
}

// ---- exponential ---------------------------------------------------------------------------

// 2^x to about 2e-7 relative; results below 2^-126 are 0; -inf gives 0, NaN gives NaN.
static __device__ __forceinline__ float fast_exp2(float x) {
#ifdef __CUDACC__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return host_exp2(x);
#endif
}

// e^x; the rounding of x log2(e) adds |x| 6e-8 relative.
static __device__ __forceinline__ float fast_exp(float x) {
    return fast_exp2(x * 1.4426950408889634f);
}

// ---- sums and maxima -----------------------------------------------------------------------

static __device__ __forceinline__ float max_nan(float a, float b) {
    return a > b || a != a ? a : b;
}

// The mask of the lane's own group, so that other groups of the warp may have left.
template <int W> static __device__ __forceinline__ unsigned warp_group(void) {
    static_assert(W >= 1 && W <= 32 && (W & (W - 1)) == 0, "groups of 1, 2, 4, 8, 16 or 32");
    if (W == 32) return 0xffffffffu;
    unsigned lane = (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) & 31u;
    return ((1u << (W & 31)) - 1) << (lane & ~(unsigned)(W - 1));
}

template <int W, bool MAX> static __device__ __forceinline__ float warp_reduce(float v) {
    unsigned group = warp_group<W>();
#ifdef __CUDACC__
#pragma unroll
    for (int distance = W / 2; distance > 0; distance /= 2) {
        float other = __shfl_xor_sync(group, v, distance);
        v = MAX ? max_nan(v, other) : v + other;
    }
    return v;
#else
    return host_warp_reduce<W, MAX>(group, v);
#endif
}

template <int W> static __device__ __forceinline__ float warp_sum(float v) {
    return warp_reduce<W, false>(v);
}
template <int W> static __device__ __forceinline__ float warp_max(float v) {
    return warp_reduce<W, true>(v);
}

template <bool MAX> static __device__ __forceinline__ float block_reduce(float v, float* scratch) {
    int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    int warps = (blockDim.x * blockDim.y * blockDim.z + WARP - 1) / WARP;
    v = warp_reduce<WARP, MAX>(v);
    if (thread % WARP == 0) scratch[thread / WARP] = v;
    __syncthreads();
    float total = scratch[0];
    for (int w = 1; w < warps; w++) {
        total = MAX ? max_nan(total, scratch[w]) : total + scratch[w];
    }
    __syncthreads();
    return total;
}

// scratch: 32 floats of shared memory, free again on return. The block is a multiple of 32 threads.
static __device__ __forceinline__ float block_sum(float v, float* scratch) {
    return block_reduce<false>(v, scratch);
}
static __device__ __forceinline__ float block_max(float v, float* scratch) {
    return block_reduce<true>(v, scratch);
}
