/*
The guard: one float on the device that keeps a step's update from happening.

It is set when the step's loss, gradients or weights are not finite, by a kernel that stands between
their sums and the update; the update's kernels look at it. So nothing waits for the host, which
reads of it a step later, and what was there before a step that went wrong is there after it.

guard           a float: 0, or 1 where something is not finite
guard_check     sets it from the sums over all ranks, so that all ranks decide alike
                norms   4 floats: Σ g², gradients that are not finite, Σ p², weights that are not;
                        as norms_total makes them
                losses  n_losses floats, any number
                sticky  a guard that is set stays set
guard_clear_if  x = 0 where the guard is set, else x keeps its bits; n floats, any n
guard_is_set    for the kernels of an update, which then do not store; never of NULL
cost            a launch each; bounded by it
test            test/cases_optimizer.h: norm
*/
#pragma once
#include <float.h>

#include "device.cuh"

constexpr int GUARD_THREADS = 128;
constexpr int GUARD_MOST_BLOCKS = 1024;

static __device__ __forceinline__ bool is_finite(float x) {
    return fabsf(x) <= FLT_MAX;
}

// To be asked before the loads of a kernel and obeyed before its stores: then nothing waits for it.
static __device__ __forceinline__ bool guard_is_set(const float* guard) {
    return guard && *guard != 0.0f;
}

static __global__ void guard_check_kernel(float* guard, const float* norms, const float* losses,
                                          int n_losses, bool sticky) {
    int t = threadIdx.x;
    bool bad = t < 4 && (!is_finite(norms[t]) || (t % 2 == 1 && norms[t] > 0.0f));
    bad = bad || (t == 0 && sticky && *guard != 0.0f);
    for (int i = t; i < n_losses; i += GUARD_THREADS) bad = bad || !is_finite(losses[i]);
    int any = __syncthreads_or(bad);
    if (t == 0) *guard = any ? 1.0f : 0.0f;
}

static __global__ void guard_clear_kernel(float* x, size_t n, const float* guard) {
    if (!guard_is_set(guard)) return;
    size_t step = (size_t)gridDim.x * GUARD_THREADS;
    for (size_t i = (size_t)blockIdx.x * GUARD_THREADS + threadIdx.x; i < n; i += step) x[i] = 0.0f;
}

// ---- launchers ------------------------------------------------------------------------------

static inline void guard_check(float* guard, const float* norms, const float* losses, int n_losses,
                               bool sticky, cudaStream_t stream) {
    REQUIRE(n_losses >= 0, "guard_check: %d losses", n_losses);
    launch<guard_check_kernel>(dim3(1), dim3(GUARD_THREADS), 0, stream, guard, norms, losses,
                               n_losses, sticky);
}

static inline void guard_clear_if(float* x, size_t n, const float* guard, cudaStream_t stream) {
    if (n == 0) return;
    size_t blocks = ceil_div(n, GUARD_THREADS);
    if (blocks > GUARD_MOST_BLOCKS) blocks = GUARD_MOST_BLOCKS;
    launch<guard_clear_kernel>(dim3((unsigned)blocks), dim3(GUARD_THREADS), 0, stream, x, n, guard);
}
