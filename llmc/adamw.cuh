/*
AdamW: for embeddings, head and scalars, and for everything under --optimizer adamw.

    m = m + (1-β1) (g - m)
    v = v + (1-β2) (g² - v)
    p = p - lr wd p
    p = p - lr/(1-β1ᵗ) m / (√v / √(1-β2ᵗ) + eps)          t = step, from 1

p             n elements of floatX, what the forward pass reads
master        n floats, what the update starts from, p being its rounded copy; NULL: p itself is the
              only storage. In the fp32 build master may be p.
g m v         n floats
bf16_state    for tables kept in bf16 without a master: g is rounded to bf16; p is computed from the
              unrounded m and v; p, m and v are rounded once, as they are stored (m and v in floats
              that hold bf16 values).
alignment     pointers to 16 bytes; any n
zero g        m = v = 0 gives 0/(0+eps): p stays (but for the decay). NaN in g is NaN in p.
cost          28 bytes per element (bf16 with master: 30); bound by memory
test          test/cases_optimizer.h: adamw
source        Kingma, Ba 2015, arXiv:1412.6980; Loshchilov, Hutter 2019, arXiv:1711.05101. Where eps
              stands and when the decay is taken is as in PyTorch's AdamW.
*/
#pragma once
#include "device.cuh"

// What one step multiplies with, computed in double on the host.
typedef struct AdamwStep {
    float grow1, grow2;     // 1-β1, 1-β2
    float step_size;        // lr/(1-β1ᵗ)
    float v_scale;          // 1/√(1-β2ᵗ)
    float eps, keep;        // keep = 1 - lr wd
} AdamwStep;

template <bool BF16_STATE>
static __device__ __forceinline__ void adamw_element(float* p, float* m, float* v, float g,
                                                     const AdamwStep& k) {
    if (BF16_STATE) g = round_bf16(g);
    *m += k.grow1 * (g - *m);
    *v += k.grow2 * (g * g - *v);
    *p = *p * k.keep - k.step_size * *m / (sqrtf(*v) * k.v_scale + k.eps);
    if (BF16_STATE) *p = round_bf16(*p), *m = round_bf16(*m), *v = round_bf16(*v);
}

// A thread owns eight neighbouring elements; the one at the end of an odd n goes one by one.
template <bool BF16_STATE, bool MASTER>
static __global__ void adamw_kernel(floatX* p, float* master, const float* g, float* m, float* v,
                                    size_t n, AdamwStep k) {
    size_t i = 8 * ((size_t)blockIdx.x * blockDim.x + threadIdx.x);
    if (i + 8 <= n) {
        float8 w = MASTER ? load8(master + i) : load8(p + i);
        float8 g8 = load8(g + i), m8 = load8(m + i), v8 = load8(v + i);
        for (int j = 0; j < 8; j++) {
            adamw_element<BF16_STATE>(&w.v[j], &m8.v[j], &v8.v[j], g8.v[j], k);
        }
        store8(m + i, m8);
        store8(v + i, v8);
        if (MASTER) store8(master + i, w);
        store8(p + i, w);
        return;
    }
    for (; i < n; i++) {
        float w = MASTER ? master[i] : to_float(p[i]);
        adamw_element<BF16_STATE>(&w, &m[i], &v[i], g[i], k);
        if (MASTER) master[i] = w;
        p[i] = from_float<floatX>(w);
    }
}

// ---- launcher -------------------------------------------------------------------------------

// The betas are doubles: 1 - 0.95f is off by 2.4e-7 of itself, and in the first steps, where m and v are
// little more than that factor times a gradient, bf16 states round it to another value now and then.
static inline void adamw_update(floatX* p, float* master, const float* g, float* m, float* v,
                                size_t n, float lr, double beta1, double beta2, float eps, float wd,
                                int step, bool bf16_state, cudaStream_t stream) {
    REQUIRE(n > 0 && step >= 1, "adamw: n=%zu step=%d, both must be positive", n, step);
    REQUIRE(master || bf16_state || !FLOATX_IS_BF16,
            "adamw: bf16 parameters without a master copy need bf16_state");
    bool has_master = master && (void*)master != (void*)p;
    AdamwStep k;
    k.grow1 = (float)(1.0 - beta1);
    k.grow2 = (float)(1.0 - beta2);
    k.step_size = (float)(lr / (1.0 - pow(beta1, step)));
    k.v_scale = (float)(1.0 / sqrt(1.0 - pow(beta2, step)));
    k.eps = eps;
    k.keep = (float)(1.0 - (double)lr * wd);
    dim3 grid((unsigned)ceil_div(n, 8 * 256)), block(256);
    if (bf16_state && has_master) {
        launch<adamw_kernel<true, true>>(grid, block, 0, stream, p, master, g, m, v, n, k);
    } else if (bf16_state) {
        launch<adamw_kernel<true, false>>(grid, block, 0, stream, p, master, g, m, v, n, k);
    } else if (has_master) {
        launch<adamw_kernel<false, true>>(grid, block, 0, stream, p, master, g, m, v, n, k);
    } else {
        launch<adamw_kernel<false, false>>(grid, block, 0, stream, p, master, g, m, v, n, k);
    }
}
