/*
AdamW: for embeddings, head and scalars, and for everything under --optimizer adamw.

    m = m + (1-β1) (g - m)
    v = v + (1-β2) (g² - v)
    p = p - lr wd p
    p = p - lr/(1-β1ᵗ) m / (√v / √(1-β2ᵗ) + eps)          t = step, from 1
    p = p - lr √(1-β2ᵗ)/(1-β1ᵗ) m / (√v + eps)            ADAM_EPS_UNSCALED

The two differ in eps alone: the second adds it to √v as it is, which makes it larger by 1/√(1-β2ᵗ).

p             n elements of floatX, what the forward pass reads
master        n floats, what the update starts from, p being its rounded copy; NULL: p itself is the
              only storage. In the fp32 build master may be p.
g m v         n floats
bf16_grad     g is rounded to bf16 before anything else
bf16_state    m and v are rounded once, as they are stored: floats that hold bf16 values. p is
              computed from the unrounded ones.
bf16_param    p is rounded to bf16 as it is stored, and so is master: for tables kept in bf16
              without a master. In the fp32 build p then holds bf16 values in floats.
alignment     pointers to 16 bytes; any n
guard         while it is set p, master, m and v keep every bit (guard.cuh); NULL: there is none
zero g        m = v = 0 gives 0/(0+eps): p stays (but for the decay). NaN in g is NaN in p.
cost          28 bytes per element (bf16 with master: 30; without: 24); bound by memory
test          test/cases_adamw.h
source        Kingma, Ba 2015, arXiv:1412.6980; Loshchilov, Hutter 2019, arXiv:1711.05101. Where eps
              stands and when the decay is taken is as in PyTorch's AdamW; unscaled, as in record 45
              of modded-nanogpt.
*/
#pragma once
#include "device.cuh"
#include "guard.cuh"

typedef enum AdamEps { ADAM_EPS_PYTORCH, ADAM_EPS_UNSCALED } AdamEps;

// The betas are doubles: 1 - 0.95f is off by 2.4e-7 of itself, and in the first steps, where m and
// v are little more than that factor times a gradient, bf16 states round it to another value now
// and then.
typedef struct AdamRule {
    double beta1, beta2;
    float eps, weight_decay;
    AdamEps eps_form;
    bool bf16_grad, bf16_state, bf16_param;
} AdamRule;

// What one step multiplies with, computed in double on the host.
typedef struct AdamwStep {
    float grow1, grow2;     // 1-β1, 1-β2
    float step_size;        // lr/(1-β1ᵗ), or lr √(1-β2ᵗ)/(1-β1ᵗ)
    float v_scale;          // 1/√(1-β2ᵗ), or 1
    float eps, keep;        // keep = 1 - lr wd
    bool bf16_grad, bf16_state, bf16_param;
} AdamwStep;

static __device__ __forceinline__ void adamw_element(float* p, float* m, float* v, float g,
                                                     const AdamwStep& k) {
    *m += k.grow1 * (g - *m);
    *v += k.grow2 * (g * g - *v);
    *p = *p * k.keep - k.step_size * *m / (sqrtf(*v) * k.v_scale + k.eps);
}

// Through a store and a load, which are vector instructions on both targets.
static __device__ __forceinline__ void adamw_round(float8* x) {
    alignas(16) bf16 half[8];
    store8(half, *x);
    *x = load8(half);
}

// A thread owns eight neighbouring elements; the one at the end of an odd n goes one by one. ROUND:
// something is rounded to bf16 besides the copy of a master.
template <bool ROUND, bool MASTER>
static __global__ void adamw_kernel(floatX* p, float* master, const float* g, float* m, float* v,
                                    size_t n, AdamwStep k, const float* guard) {
    size_t i = 8 * ((size_t)blockIdx.x * blockDim.x + threadIdx.x);
    bool kept = guard_is_set(guard);
    if (i + 8 <= n) {
        float8 w = MASTER ? load8(master + i) : load8(p + i);
        float8 g8 = load8(g + i), m8 = load8(m + i), v8 = load8(v + i);
        if (ROUND && k.bf16_grad) adamw_round(&g8);
        for (int j = 0; j < 8; j++) adamw_element(&w.v[j], &m8.v[j], &v8.v[j], g8.v[j], k);
        if (ROUND && k.bf16_param) adamw_round(&w);
        if (ROUND && k.bf16_state) adamw_round(&m8), adamw_round(&v8);
        if (kept) return;
        store8(m + i, m8);
        store8(v + i, v8);
        if (MASTER) store8(master + i, w);
        store8(p + i, w);
        return;
    }
    for (; i < n; i++) {
        float w = MASTER ? master[i] : to_float(p[i]), m1 = m[i], v1 = v[i];
        float g1 = ROUND && k.bf16_grad ? round_bf16(g[i]) : g[i];
        adamw_element(&w, &m1, &v1, g1, k);
        if (ROUND && k.bf16_param) w = round_bf16(w);
        if (ROUND && k.bf16_state) m1 = round_bf16(m1), v1 = round_bf16(v1);
        if (kept) return;
        m[i] = m1;
        v[i] = v1;
        if (MASTER) master[i] = w;
        p[i] = from_float<floatX>(w);
    }
}

// ---- launcher -------------------------------------------------------------------------------

static inline void adamw_update(floatX* p, float* master, const float* g, float* m, float* v,
                                size_t n, float lr, const AdamRule* rule, int step,
                                const float* guard, cudaStream_t stream) {
    REQUIRE(n > 0 && step >= 1, "adamw: n=%zu step=%d, both must be positive", n, step);
    REQUIRE(master || rule->bf16_param || !FLOATX_IS_BF16,
            "adamw: bf16 parameters without a master copy need bf16_param");
    bool has_master = master && (void*)master != (void*)p;
    bool round = rule->bf16_grad || rule->bf16_state || rule->bf16_param;
    double correction1 = 1.0 - pow(rule->beta1, step);
    double root2 = sqrt(1.0 - pow(rule->beta2, step));
    AdamwStep k;
    k.grow1 = (float)(1.0 - rule->beta1);
    k.grow2 = (float)(1.0 - rule->beta2);
    k.step_size = (float)(lr / correction1);
    k.v_scale = (float)(1.0 / root2);
    if (rule->eps_form == ADAM_EPS_UNSCALED) {
        k.step_size = (float)(lr * root2 / correction1);
        k.v_scale = 1.0f;
    }
    k.eps = rule->eps;
    k.keep = (float)(1.0 - (double)lr * rule->weight_decay);
    k.bf16_grad = rule->bf16_grad;
    k.bf16_state = rule->bf16_state;
    k.bf16_param = rule->bf16_param;
    dim3 grid((unsigned)ceil_div(n, 8 * 256)), block(256);
    if (round && has_master) {
        launch<adamw_kernel<true, true>>(grid, block, 0, stream, p, master, g, m, v, n, k, guard);
    } else if (round) {
        launch<adamw_kernel<true, false>>(grid, block, 0, stream, p, master, g, m, v, n, k, guard);
    } else if (has_master) {
        launch<adamw_kernel<false, true>>(grid, block, 0, stream, p, master, g, m, v, n, k, guard);
    } else {
        launch<adamw_kernel<false, false>>(grid, block, 0, stream, p, master, g, m, v, n, k, guard);
    }
}
