/*
Planted bugs: kernels and host code with one mistake each, to prove that the host layer sees it.

    planted NAME        runs one; exit status 0 right numbers, 1 wrong numbers, 70 reported by the
                        host layer, or whatever the sanitizer of the build ends with
    planted none        runs the same code without the mistakes and must be silent

test_host.cu includes this file and calls itself once per bug; it knows which build sees what.
*/
#include "llmc/ptx.cuh"

enum { PLANTED_BLOCK = 128, PLANTED_BLOCKS = 4 };

// ---- memory --------------------------------------------------------------------------------

// Reverses the elements of each block through a static array.
static __global__ void planted_static_kernel(float* out, const float* in, int shift) {
    __shared__ float s[PLANTED_BLOCK];
    int i = blockIdx.x * PLANTED_BLOCK + threadIdx.x;
    s[threadIdx.x + shift] = in[i];
    __syncthreads();
    out[i] = s[PLANTED_BLOCK - 1 - threadIdx.x];
    __syncthreads();
}

static __global__ void planted_dynamic_kernel(float* out, const float* in, int shift) {
    DYN_SMEM(float, s);
    int i = blockIdx.x * PLANTED_BLOCK + threadIdx.x;
    s[threadIdx.x + shift] = in[i];
    __syncthreads();
    out[i] = s[PLANTED_BLOCK - 1 - threadIdx.x];
}

static __global__ void planted_global_kernel(float* out, const float* in, int shift) {
    int i = blockIdx.x * PLANTED_BLOCK + threadIdx.x;
    out[i + shift] = in[i];
}

static __global__ void planted_misaligned_kernel(float* out, const float* in, int shift) {
    if (threadIdx.x == 5) store8(out + 8, load8(in + shift));
}

// ---- races ---------------------------------------------------------------------------------

static __global__ void planted_barrier_kernel(float* out, const float* in, bool bug) {
    DYN_SMEM(float, s);
    int i = blockIdx.x * PLANTED_BLOCK + threadIdx.x;
    s[threadIdx.x] = in[i];
    if (!bug) __syncthreads();
    out[i] = s[PLANTED_BLOCK - 1 - threadIdx.x];
}

// Three rounds through the same array: the second barrier keeps a fast thread from overwriting
// what a slow one has still to read.
static __global__ void planted_reuse_kernel(float* out, const float* in, bool bug) {
    DYN_SMEM(float, s);
    int i = blockIdx.x * PLANTED_BLOCK + threadIdx.x;
    float v = in[i];
    for (int round = 0; round < 3; round++) {
        s[threadIdx.x] = v;
        __syncthreads();
        v = s[PLANTED_BLOCK - 1 - threadIdx.x];
        if (!bug) __syncthreads();
        v += 1.0f;
    }
    out[i] = v - 3.0f;
}

// A shuffle brings the lanes together, but does not order their memory accesses.
static __global__ void planted_syncwarp_kernel(float* out, const float* in, bool bug) {
    DYN_SMEM(float, s);
    int i = blockIdx.x * PLANTED_BLOCK + threadIdx.x;
    s[threadIdx.x] = in[i];
    if (bug) {
        (void)__shfl_xor_sync(0xffffffffu, 1.0f, 1);
    } else {
        __syncwarp();
    }
    out[i] = s[threadIdx.x ^ 31];
}

static __global__ void planted_blocks_kernel(int* count, bool bug) {
    if (threadIdx.x != (bug ? blockIdx.x : 0)) return;
    if (bug) {
        *count += 1;
    } else {
        atomicAdd(count, 1);
    }
}

// ---- asynchronous copies -------------------------------------------------------------------

// waits: 2 for both groups, 1 for the older one only, 0 for none.
static __global__ void planted_async_kernel(float* out, const float* in, int waits) {
    DYN_SMEM(float, s);
    int block = blockIdx.x * PLANTED_BLOCK;
    for (int half = 0; half < 2; half++) {
        int i = 4 * threadIdx.x;
        if (i / (PLANTED_BLOCK / 2) == half) cp_async16(s + i, in + block + i);
        cp_async_commit();
    }
    if (waits == 2) cp_async_wait<0>();
    if (waits == 1) cp_async_wait<1>();
    __syncthreads();
    out[block + threadIdx.x] = s[PLANTED_BLOCK - 1 - threadIdx.x];
    __syncthreads();
    if (waits == 1) cp_async_wait<0>();
}

// ---- divergence ----------------------------------------------------------------------------

static __global__ void planted_two_barriers_kernel(float* out) {
    if (threadIdx.x < 64) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    out[threadIdx.x] = 1.0f;
}

static __global__ void planted_deadlock_kernel(float* out) {
    if (threadIdx.x >= 40 && threadIdx.x < 64) {
        out[threadIdx.x] = (float)__ballot_sync(0xffffffffu, 1);
    } else {
        __syncthreads();
    }
}

static __global__ void planted_exited_lane_kernel(float* out) {
    if (threadIdx.x % 32 == 0) return;
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

static __global__ void planted_absent_lanes_kernel(float* out) {
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

static __global__ void planted_late_exit_kernel(float* out) {
    if (threadIdx.x % 32 == 31) return;
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

static __global__ void planted_two_operations_kernel(float* out) {
    if (threadIdx.x < 16) {
        out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
    } else {
        out[threadIdx.x] = (float)__ballot_sync(0xffffffffu, 1);
    }
}

static __global__ void planted_two_shuffles_kernel(float* out) {
    if (threadIdx.x < 16) {
        out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
    } else {
        out[threadIdx.x] = __shfl_down_sync(0xffffffffu, 1.0f, 1);
    }
}

static __global__ void planted_foreign_mask_kernel(float* out) {
    out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, 1);
}

static __global__ void planted_plain_kernel(float* out) {
    unsigned thread = threadIdx.x + threadIdx.y + threadIdx.z;
    unsigned block = blockIdx.x + blockIdx.y + blockIdx.z;
    if (thread + block == 0) *out = 1.0f;
}

static __global__ void planted_wild_kernel(float* out) {
    volatile uintptr_t wild = 4096;
    if (threadIdx.x == 37) *(float*)wild = out[0];
}

static __device__ float planted_descend(volatile float* x, int depth) {
    volatile float frame[256];
    frame[depth % 256] = x[0];
    return depth == 0 ? frame[0] : planted_descend(frame, depth - 1) + frame[depth % 256];
}

static __global__ void planted_stack_kernel(float* out) {
    __syncthreads();
    volatile float x[1] = {1.0f};
    out[threadIdx.x] = planted_descend(x, 1 << 20);
}

// ---- streams -------------------------------------------------------------------------------

static __global__ void planted_add_kernel(float* out, float add) {
    out[threadIdx.x] += add;
}

static __global__ void planted_double_kernel(float* out) {
    out[threadIdx.x] *= 2.0f;
}

// (0 + 3) * 2 by two streams. Without the event the product may come first.
static int planted_streams(bool bug) {
    cudaStream_t a, b;
    cudaEvent_t added, doubled;
    float *x, *host;
    CUDA_CHECK(cudaStreamCreateWithFlags(&a, cudaStreamNonBlocking));
    CUDA_CHECK(cudaStreamCreateWithFlags(&b, cudaStreamNonBlocking));
    CUDA_CHECK(cudaEventCreateWithFlags(&added, cudaEventDisableTiming));
    CUDA_CHECK(cudaEventCreateWithFlags(&doubled, cudaEventDisableTiming));
    CUDA_CHECK(cudaMalloc(&x, 32 * sizeof(float)));
    CUDA_CHECK(cudaMallocHost(&host, 32 * sizeof(float)));
    CUDA_CHECK(cudaMemset(x, 0, 32 * sizeof(float)));
    CUDA_CHECK(cudaDeviceSynchronize());
    launch<planted_add_kernel>(1, 32, 0, a, x, 3.0f);
    CUDA_CHECK(cudaEventRecord(added, a));
    if (!bug) CUDA_CHECK(cudaStreamWaitEvent(b, added, 0));
    launch<planted_double_kernel>(1, 32, 0, b, x);
    CUDA_CHECK(cudaEventRecord(doubled, b));
    CUDA_CHECK(cudaStreamWaitEvent(a, doubled, 0));
    CUDA_CHECK(cudaMemcpyAsync(host, x, 32 * sizeof(float), cudaMemcpyDeviceToHost, a));
    CUDA_CHECK(cudaStreamSynchronize(a));
    int wrong = 0;
    for (int i = 0; i < 32; i++) wrong += host[i] != 6.0f;
    CUDA_CHECK(cudaFree(x));
    CUDA_CHECK(cudaFreeHost(host));
    CUDA_CHECK(cudaEventDestroy(added));
    CUDA_CHECK(cudaEventDestroy(doubled));
    CUDA_CHECK(cudaStreamDestroy(a));
    CUDA_CHECK(cudaStreamDestroy(b));
    return wrong != 0;
}

// ---- the list ------------------------------------------------------------------------------

// Element i shall be element i ^ flip of the input; a flip of PLANTED_BLOCK - 1 reverses blocks.
static int planted_wrong(const float* out, const float* in, int n, int flip) {
    CUDA_CHECK(cudaDeviceSynchronize());
    for (int i = 0; i < n; i++) {
        if (!(out[i] == in[i ^ flip])) return 1;
    }
    return 0;
}

static int planted_main(const char* name) {
    const int n = PLANTED_BLOCK * PLANTED_BLOCKS;
    const size_t bytes = n * sizeof(float), shared = PLANTED_BLOCK * sizeof(float);
    bool none = !strcmp(name, "none");
    int wrong = 0;
    float *in, *out;
    CUDA_CHECK(cudaMalloc(&in, bytes));
    CUDA_CHECK(cudaMalloc(&out, bytes));
    for (int i = 0; i < n; i++) in[i] = (float)i;

#define PLANTED(bug) (none || !strcmp(name, bug))
    if (PLANTED("static_shared")) {
        launch<planted_static_kernel>(PLANTED_BLOCKS, PLANTED_BLOCK, 0, 0, out, in, none ? 0 : 1);
        wrong |= planted_wrong(out, in, n, PLANTED_BLOCK - 1);
    }
    if (PLANTED("dynamic_shared")) {
        launch<planted_dynamic_kernel>(PLANTED_BLOCKS, PLANTED_BLOCK, shared, 0, out, in,
                                       none ? 0 : 1);
        wrong |= planted_wrong(out, in, n, PLANTED_BLOCK - 1);
    }
    if (PLANTED("global_after") || PLANTED("global_before")) {
        int shift = none ? 0 : !strcmp(name, "global_after") ? 1 : -1;
        launch<planted_global_kernel>(PLANTED_BLOCKS, PLANTED_BLOCK, 0, 0, out, in, shift);
    }
    if (PLANTED("misaligned")) {
        launch<planted_misaligned_kernel>(PLANTED_BLOCKS, PLANTED_BLOCK, 0, 0, out, in,
                                          none ? 4 : 1);
    }
    if (PLANTED("barrier")) {
        launch<planted_barrier_kernel>(PLANTED_BLOCKS, PLANTED_BLOCK, shared, 0, out, in, !none);
        wrong |= planted_wrong(out, in, n, PLANTED_BLOCK - 1);
    }
    if (PLANTED("reuse")) {
        launch<planted_reuse_kernel>(PLANTED_BLOCKS, PLANTED_BLOCK, shared, 0, out, in, !none);
        wrong |= planted_wrong(out, in, n, PLANTED_BLOCK - 1);
    }
    if (PLANTED("syncwarp")) {
        launch<planted_syncwarp_kernel>(PLANTED_BLOCKS, PLANTED_BLOCK, shared, 0, out, in, !none);
        wrong |= planted_wrong(out, in, n, 31);
    }
    if (PLANTED("blocks")) {
        int* count;
        CUDA_CHECK(cudaMalloc(&count, sizeof(int)));
        *count = 0;
        launch<planted_blocks_kernel>(PLANTED_BLOCKS, PLANTED_BLOCK, 0, 0, count, !none);
        CUDA_CHECK(cudaDeviceSynchronize());
        wrong |= *count != PLANTED_BLOCKS;
        CUDA_CHECK(cudaFree(count));
    }
    if (PLANTED("async_none") || PLANTED("async_weak")) {
        int waits = none ? 2 : !strcmp(name, "async_weak") ? 1 : 0;
        launch<planted_async_kernel>(PLANTED_BLOCKS, PLANTED_BLOCK, shared, 0, out, in, waits);
        wrong |= planted_wrong(out, in, n, PLANTED_BLOCK - 1);
    }
    if (!strcmp(name, "leak")) {
        float* lost;
        CUDA_CHECK(cudaMalloc(&lost, bytes));
    }
    if (PLANTED("streams")) wrong |= planted_streams(!none);
    if (none) {
        launch<planted_plain_kernel>(dim3(2, 3, 4), dim3(8, 4, 2), 232448, 0, out);
    }
#undef PLANTED
#define PLANTED(bug, kernel, grid, block, shared_bytes)                                            \
    if (!strcmp(name, bug)) launch<kernel>(grid, block, shared_bytes, 0, out)
    PLANTED("two_barriers", planted_two_barriers_kernel, 1, PLANTED_BLOCK, 0);
    PLANTED("deadlock", planted_deadlock_kernel, 1, PLANTED_BLOCK, 0);
    PLANTED("exited_lane", planted_exited_lane_kernel, 1, PLANTED_BLOCK, 0);
    PLANTED("late_exit", planted_late_exit_kernel, 1, PLANTED_BLOCK, 0);
    PLANTED("two_operations", planted_two_operations_kernel, 1, PLANTED_BLOCK, 0);
    PLANTED("two_shuffles", planted_two_shuffles_kernel, 1, PLANTED_BLOCK, 0);
    PLANTED("foreign_mask", planted_foreign_mask_kernel, 1, PLANTED_BLOCK, 0);
    PLANTED("absent_lanes", planted_absent_lanes_kernel, 1, 40, 0);
    PLANTED("wild", planted_wild_kernel, 1, PLANTED_BLOCK, 0);
    PLANTED("stack", planted_stack_kernel, 1, PLANTED_BLOCK, 0);
    PLANTED("no_threads", planted_plain_kernel, 1, 0, 0);
    PLANTED("many_threads", planted_plain_kernel, 1, dim3(32, 32, 2), 0);
    PLANTED("deep_block", planted_plain_kernel, 1, dim3(1, 1, 65), 0);
    PLANTED("no_blocks", planted_plain_kernel, 0, 32, 0);
    PLANTED("many_blocks", planted_plain_kernel, dim3(1, 65536, 1), 32, 0);
    PLANTED("much_shared", planted_plain_kernel, 1, 32, 232449);
#undef PLANTED
    CUDA_CHECK(cudaFree(in));
    CUDA_CHECK(cudaFree(out));
    if (wrong) printf("wrong numbers\n");
    return wrong;
}

#ifndef PLANTED_NO_MAIN
int main(int argc, char** argv) {
    REQUIRE(argc == 2, "planted wants the name of one bug, or none");
    return planted_main(argv[1]);
}
#endif
