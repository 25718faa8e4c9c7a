/*
adamw: llmc/adamw.cuh against oracle.h and against golden files that PyTorch's AdamW and the
published DistAdam made.

Allowed, u = 2^-24:
m v p    m and v are three rounded operations on terms that may cancel: 4u of the terms' absolute
         values. p takes over m's error and has ten roundings of its own in the quotient, three
         outside. What is stored as bf16 is rounded once: 2^-8 more, and must be a bf16 value.
goldens  float: a few u of lr and of p per step. Where something is stored as bf16 the float before
         that rounding may lie on the other side of a tie: one in some hundred values is a unit off,
         and m, v or p go on from there.
*/
#pragma once
#include "../llmc/adamw.cuh"
#include "../llmc/safetensors.h"
#include "cases_optimizer.h"
#include "oracle.h"
#include "test.h"

static AdamRule test_adam_rule(double beta1, double beta2, float eps, float wd) {
    AdamRule rule = {};
    rule.beta1 = beta1, rule.beta2 = beta2, rule.eps = eps, rule.weight_decay = wd;
    return rule;
}

// ---- one step -------------------------------------------------------------------------------

// Where the guard is set no bit changes, not even by a NaN; where it is clear, all is as without
// one. Everything is as it was afterwards.
static void test_adamw_guard(floatX* p, float* master, float* g, float* m, float* v, size_t n,
                             const AdamRule* rule, int step) {
    double values[2] = {0, 1};
    float *guard = test_upload_float(values, 2), nan = NAN;
    TestBits before = {}, after = {}, gradients = {};
    void* of[4] = {p, master, m, v};
    for (int k = 0; k < 4; k++) test_bits_add(&before, of[k], n * (k ? sizeof(float) : sizeof *p));
    test_bits_add(&gradients, g, n * sizeof *g);
    for (int spoilt = 0; spoilt < 2; spoilt++) {
        if (spoilt) CUDA_CHECK(cudaMemcpy(g + n - 1, &nan, sizeof nan, cudaMemcpyHostToDevice));
        adamw_update(p, master, g, m, v, n, 0.01f, rule, step, guard + 1, 0);
        test_true("adamw where the guard is set", test_bits_same(&before));
    }
    test_bits_restore(&gradients);
    adamw_update(p, master, g, m, v, n, 0.01f, rule, step, guard, 0);
    test_true("adamw where the guard is clear", !test_bits_same(&before));
    for (int k = 0; k < 4; k++) test_bits_add(&after, of[k], n * (k ? sizeof(float) : sizeof *p));
    test_bits_restore(&before);
    adamw_update(p, master, g, m, v, n, 0.01f, rule, step, NULL, 0);
    test_true("adamw without a guard is as with a clear one", test_bits_same(&after));
    test_bits_restore(&before);
    test_bits_free(&before), test_bits_free(&after), test_bits_free(&gradients);
    cudaFree(guard);
}

// One step from given states; every element against its own bound.
static void test_adamw_case(size_t n, bool use_master, const AdamRule* rule, int step) {
    const double u = 0x1p-24, lr = (float)0.01, b1 = rule->beta1, b2 = rule->beta2,
                 eps = rule->eps, wd = rule->weight_decay;
    bool unscaled = rule->eps_form == ADAM_EPS_UNSCALED;
    OracleAdam exact = {lr, b1, b2, eps, wd, unscaled, false, false};
    double *p = test_doubles(n), *g = test_doubles(n), *m = test_doubles(n), *v = test_doubles(n);
    test_fill_normal_float(p, n, 1, 1.0);
    test_fill_normal_float(g, n, 2, 0.1);
    test_fill_normal_float(m, n, 3, 0.1);
    test_fill_normal_float(v, n, 4, 0.1);
    for (size_t i = 0; i < n; i++) {
        v[i] = (float)(v[i] * v[i]);
        g[i] = (float)(g[i] * exp(8 * test_uniform(5, i) - 4));    // four orders of magnitude
        if (i % 7 == 3) g[i] = m[i] = v[i] = 0;
        if (!use_master) p[i] = test_round(p[i]);
        if (rule->bf16_param) p[i] = test_round_bf16(p[i]);
        if (rule->bf16_state) m[i] = test_round_bf16(m[i]), v[i] = test_round_bf16(v[i]);
    }
    floatX* p_d = test_upload(p, n);
    float *g_d = test_upload_float(g, n), *m_d = test_upload_float(m, n),
          *v_d = test_upload_float(v, n);
    float* master_d = use_master ? test_upload_float(p, n) : NULL;
    if (use_master) {    // p is only written
        double* junk = test_doubles(n);
        for (size_t i = 0; i < n; i++) junk[i] = NAN;
        test_put(p_d, junk, n);
        free(junk);
    }
    test_adamw_guard(p_d, master_d, g_d, m_d, v_d, n, rule, step);
    adamw_update(p_d, master_d, g_d, m_d, v_d, n, lr, rule, step, NULL, 0);
    float *got_p = test_download(p_d, n), *got_m = test_download_float(m_d, n);
    float *got_v = test_download_float(v_d, n),
          *got_w = use_master ? test_download_float(master_d, n) : NULL;

    double worst[3] = {0, 0, 0}, c1 = 1 - pow(b1, step), c2 = 1 - pow(b2, step);
    bool copied = true, representable = true, still = true;
    for (size_t i = 0; i < n; i++) {
        double g1 = rule->bf16_grad ? test_round_bf16(g[i]) : g[i], before = p[i];
        double m_terms = fabs(m[i]) + fabs(g1), v_terms = v[i] + g1 * g1;
        // the unrounded values: what is stored as bf16 is judged as one rounding of them
        oracle_adam_update(&p[i], &g1, &m[i], &v[i], 1, &exact, step);
        double denominator = unscaled ? (sqrt(v[i]) + eps) / sqrt(c2) : sqrt(v[i] / c2) + eps;
        double store_p = rule->bf16_param ? 0x1p-8 : 0, store = rule->bf16_state ? 0x1p-8 : 0;
        double allowed[3] = {
            3 * u * (fabs(before) + fabs(p[i])) +
                lr / c1 / denominator * u * (4 * m_terms + 10 * fabs(m[i])) + store_p * fabs(p[i]),
            4 * u * m_terms + store * fabs(m[i]), 4 * u * v_terms + store * fabs(v[i])};
        double got[3] = {use_master ? got_w[i] : got_p[i], got_m[i], got_v[i]};
        double want[3] = {p[i], m[i], v[i]};
        if (!use_master && !rule->bf16_param) allowed[0] += TEST_EPS * fabs(p[i]);
        for (int k = 0; k < 3; k++) {
            double err = fabs(got[k] - want[k]), ratio = err == 0 ? 0 : err / allowed[k];
            if (!(ratio <= worst[k])) worst[k] = ratio;
            if (k == 0 ? rule->bf16_param : rule->bf16_state)
                representable &= got[k] == test_round_bf16(got[k]);
        }
        if (use_master) copied &= got_p[i] == (float)test_round(got_w[i]);
        if (i % 7 == 3 && wd == 0) still &= got[0] == before;
    }
    char name[160];
    const char* of[3] = {"p", "m", "v"};
    for (int k = 0; k < 3; k++) {
        snprintf(name, sizeof name,
                 "adamw %s n=%zu master=%d bf16 g %d m v %d p %d unscaled=%d wd=%g step=%d", of[k],
                 n, use_master, rule->bf16_grad, rule->bf16_state, rule->bf16_param, unscaled, wd,
                 step);
        test_check(name, worst[k], 1);
    }
    if (use_master) test_true("adamw p is the rounded master", copied);
    test_true("adamw bf16_state and bf16_param store bf16 values", representable);
    test_true("adamw zero gradient leaves p", still);
    free(p), free(g), free(m), free(v), free(got_p), free(got_m), free(got_v), free(got_w);
    cudaFree(p_d), cudaFree(g_d), cudaFree(m_d), cudaFree(v_d), cudaFree(master_d);
}

// NaN in one gradient reaches its own parameter and nothing else; v's NaN too.
static void test_adamw_nan(void) {
    enum { n = 19 };
    double p[n], g[n], state[n] = {0};
    test_fill_normal(p, n, 1, 1.0);
    test_fill_normal(g, n, 2, 1.0);
    g[4] = NAN, g[17] = NAN;    // one in the part of eight, one in the rest
    floatX* p_d = test_upload(p, n);
    float *w_d = test_upload_float(p, n), *g_d = test_upload_float(g, n);
    float *m_d = test_upload_float(state, n), *v_d = test_upload_float(state, n);
    AdamRule rule = test_adam_rule(0.9f, 0.95f, 1e-8f, 0);
    adamw_update(p_d, w_d, g_d, m_d, v_d, n, 0.01f, &rule, 1, NULL, 0);
    float* got = test_download(p_d, n);
    bool right = true;
    for (int i = 0; i < n; i++) right &= (got[i] != got[i]) == (i == 4 || i == 17);
    test_true("adamw NaN in g is NaN in that p alone", right);
    free(got);
    cudaFree(p_d), cudaFree(w_d), cudaFree(g_d), cudaFree(m_d), cudaFree(v_d);
}

// Five steps of torch.optim.AdamW: p0 and five gradients in, p1..p5, m and v out. Betas are floats
// here and were doubles there: 1 - beta differs by 2.4e-7 relative, which p does not see (it
// cancels in the bias correction) but m and v do; five steps of rounding on top.
static void test_adamw_golden(const char* group, float lr, float b1, float b2, float eps,
                              float wd) {
    const size_t n = 20 * 30;
    const double u = 0x1p-24;
    AdamRule rule = test_adam_rule(b1, b2, eps, wd);
    SafeFile file;
    safetensors_open(&file, "test/golden/units/adam.safetensors");
    char name[64];
    double *zero = test_doubles(n), *p = test_golden_array(&file, group, ".p0", n);
    floatX* p_d = test_upload(p, n);
    float *w_d = test_upload_float(p, n), *m_d = test_upload_float(zero, n),
          *v_d = test_upload_float(zero, n);
    free(p);
    for (int s = 0; s < 5; s++) {
        snprintf(name, sizeof name, ".g%d", s);
        double* g = test_golden_array(&file, group, name, n);
        float* g_d = test_upload_float(g, n);
        adamw_update(p_d, w_d, g_d, m_d, v_d, n, lr, &rule, s + 1, NULL, 0);
        snprintf(name, sizeof name, ".p%d", s + 1);
        double* want = test_golden_array(&file, group, name, n);
        char what[128];
        snprintf(what, sizeof what, "adamw golden %s step %d", group, s + 1);
        test_compare_device_float(what, w_d, want, n, 40 * u * lr * (s + 1), 2 * u * (s + 1));
        free(g), free(want);
        cudaFree(g_d);
    }
    float *m = test_download_float(m_d, n), *v = test_download_float(v_d, n);
    double *want_m = test_golden_array(&file, group, ".m", n),
           *want_v = test_golden_array(&file, group, ".v", n);
    // m may cancel: judged against the largest gradient so far, for which √v/√(1-β2) stands
    double worst = 0;
    for (size_t i = 0; i < n; i++) {
        double ratio = fabs(m[i] - want_m[i]) / (32 * u * sqrt(want_v[i] / (1 - b2)) + 1e-30);
        if (!(ratio <= worst)) worst = ratio;
    }
    test_check("adamw golden m", worst, 1);
    test_compare("adamw golden v", v, want_v, n, 1e-37, 32 * u);
    free(m), free(v), free(want_m), free(want_v), free(zero);
    cudaFree(p_d), cudaFree(w_d), cudaFree(m_d), cudaFree(v_d);
    safetensors_close(&file);
}

// Four steps of DistAdam. mode: f32, st_bf16 (m and v in bf16), tab_bf16 (p and g too, but for the
// scalars).
static void test_adamw_dist(const char* mode, const char* tensor, size_t n, double multiplier) {
    const double u = 0x1p-24, schedule[4] = {1, 1, 0.7, 0.4};
    AdamRule rule = test_adam_rule(0.65, 0.95, 1e-8f, 0);
    rule.eps_form = ADAM_EPS_UNSCALED;
    rule.bf16_state = strcmp(mode, "f32") != 0;
    rule.bf16_grad = rule.bf16_param = !strcmp(mode, "tab_bf16") && strcmp(tensor, "scalars") != 0;
    SafeFile file;
    safetensors_open(&file, "test/golden/units/dist_adam.safetensors");
    char name[64], what[128], prefix[64];
    snprintf(name, sizeof name, "%s.p0", tensor);
    snprintf(prefix, sizeof prefix, "%s.%s.", mode, tensor);
    double *zero = test_doubles(n), *p = test_golden_array(&file, "", name, n);
    floatX* p_d = test_upload(p, n);
    float* w_d = rule.bf16_param ? NULL : test_upload_float(p, n);
    float *m_d = test_upload_float(zero, n), *v_d = test_upload_float(zero, n);
    free(p);
    size_t flips = 0, stored = 0;
    for (int s = 0; s < 4; s++) {
        double lr = 0.008 * multiplier * schedule[s];
        snprintf(name, sizeof name, "%s.g%d", tensor, s);
        double* g = test_golden_array(&file, "", name, n);
        float* g_d = test_upload_float(g, n);
        adamw_update(p_d, w_d, g_d, m_d, v_d, n, (float)lr, &rule, s + 1, NULL, 0);
        snprintf(name, sizeof name, "p%d", s + 1);
        double* want = test_golden_array(&file, prefix, name, n);
        float* got = rule.bf16_param ? test_download(p_d, n) : test_download_float(w_d, n);
        snprintf(what, sizeof what, "adamw DistAdam %sp%d", prefix, s + 1);
        // a unit in the last place of a bf16 m or v is 2^-7 of it, and m / √v is at most about 1
        double abs_tol = rule.bf16_state ? 0x1p-7 * lr : 40 * u * lr * (s + 1);
        test_compare(what, got, want, n, abs_tol, rule.bf16_param ? 0x1p-7 : 2 * u * (s + 1));
        for (size_t i = 0; i < n; i++) {
            flips += rule.bf16_state &&
                     !(fabs(got[i] - want[i]) <= 40 * u * lr * (s + 1) + 8 * u * fabs(want[i]));
        }
        stored += n;
        free(g), free(want), free(got);
        cudaFree(g_d);
    }
    snprintf(what, sizeof what, "adamw DistAdam %s values behind a flip", prefix);
    if (rule.bf16_state) test_check(what, (double)flips / stored, 0.01);
    float* state[2] = {test_download_float(m_d, n), test_download_float(v_d, n)};
    for (int k = 0; k < 2; k++) {
        double *want = test_golden_array(&file, prefix, k ? "v" : "m", n), largest = 0;
        for (size_t i = 0; i < n; i++) largest = fabs(want[i]) > largest ? fabs(want[i]) : largest;
        snprintf(what, sizeof what, "adamw DistAdam %s%s", prefix, k ? "v" : "m");
        // m may cancel: judged against the largest
        test_compare(what, state[k], want, n, 16 * u * largest, rule.bf16_state ? 0x1p-7 : 16 * u);
        free(want), free(state[k]);
    }
    free(zero);
    cudaFree(p_d), cudaFree(w_d), cudaFree(m_d), cudaFree(v_d);
    safetensors_close(&file);
}

static void test_adamw(void) {
    const size_t sizes[] = {1, 7, 8, 2048, 4099};
    for (int i = 0; i < 5; i++) {
        for (int master = 0; master < 2; master++) {
            for (int k = 0; k < 10; k++) {
                // two without rounding, then each of the eight choices of what is rounded
                AdamRule rule = test_adam_rule(0.9f, 0.95f, 1e-8f, k % 2 ? 0.1f : 0);
                int which = k < 2 ? 0 : k - 2;
                rule.bf16_grad = which & 1, rule.bf16_state = which & 2;
                rule.bf16_param = which & 4;
                // an eps that matters, and an early step, where the forms differ
                if (k % 3 == 1) rule.eps_form = ADAM_EPS_UNSCALED, rule.eps = 1e-2f;
                if (!master && FLOATX_IS_BF16 && !rule.bf16_param) continue;
                test_adamw_case(sizes[i], master, &rule, k % 4 == 3 ? 1000 : 1 + k);
            }
        }
    }
    test_adamw_nan();
    test_adamw_golden("adamw", 0.0036f, 0.9f, 0.95f, 1e-8f, 0);
    test_adamw_golden("adamw_wd", 0.0036f, 0.9f, 0.95f, 1e-8f, 0.1f);
    test_adamw_golden("adam_sub3", 0.6f, 0.8f, 0.95f, 1e-10f, 0);
    const char* modes[] = {"f32", "st_bf16", "tab_bf16"};
    for (int i = 0; i < 3; i++) {
        test_adamw_dist(modes[i], "embed", 24 * 16, 75);
        test_adamw_dist(modes[i], "head", 20 * 16, 1);
        test_adamw_dist(modes[i], "scalars", 62, 5);
    }
}
