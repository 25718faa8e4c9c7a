/*
ReLU²: the activation of the MLP.

    y  = max(x, 0)²
    dx = 2 max(x, 0) dy = 2 √y dy

x y dx dy   n elements of floatX, n = N*F divisible by 8, pointers aligned to 16 bytes
saved       y, which the next matmul's backward needs anyway; x may be thrown away. √y is max(x, 0)
            to half the relative rounding of y. Where x² underflows (x < 1e-19) the gradient is 0.
in place    y may alias x, dx may alias dy or y.
NaN         a NaN in x is a NaN in y, and from there in dx.
cost        bf16: 4 bytes per element forward, 6 backward; bound by memory
test        test/cases_relu2.h
source      So et al. 2021, "Primer", arXiv:2109.08668
*/
#pragma once
#include "device.cuh"

// A thread owns eight neighbouring elements: one 16-byte access per tensor in bf16.
static __global__ void relu2_forward_kernel(floatX* y, const floatX* x, size_t n) {
    size_t i = 8 * ((size_t)blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= n) return;
    float8 v = load8(x + i);
    for (int j = 0; j < 8; j++) {
        float r = v.v[j] < 0.0f ? 0.0f : v.v[j];     // not fmaxf: fmaxf(NaN, 0) is 0
        v.v[j] = r * r;
    }
    store8(y + i, v);
}

static __global__ void relu2_backward_kernel(floatX* dx, const floatX* dy, const floatX* y,
                                             size_t n) {
    size_t i = 8 * ((size_t)blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= n) return;
    float8 g = load8(dy + i), v = load8(y + i);
    for (int j = 0; j < 8; j++) g.v[j] *= 2.0f * sqrtf(v.v[j]);
    store8(dx + i, g);
}

// ---- launchers ---------------------------------------------------------------------------------

static inline void relu2_forward(floatX* y, const floatX* x, size_t n, cudaStream_t stream) {
    REQUIRE(n % 8 == 0 && n > 0, "relu2 works on multiples of 8 elements, got %zu", n);
    launch<relu2_forward_kernel>(dim3(ceil_div(n, 8 * 256)), dim3(256), 0, stream, y, x, n);
}

static inline void relu2_backward(floatX* dx, const floatX* dy, const floatX* y, size_t n,
                                  cudaStream_t stream) {
    REQUIRE(n % 8 == 0 && n > 0, "relu2 works on multiples of 8 elements, got %zu", n);
    launch<relu2_backward_kernel>(dim3(ceil_div(n, 8 * 256)), dim3(256), 0, stream, dx, dy, y, n);
}
