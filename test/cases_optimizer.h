/*
norm, newton_schulz, muon: llmc/norm.cuh and muon.cuh against oracle.h and against golden files that
the published code made with PyTorch. What NorMuon adds is in cases_normuon.h, Adam in
cases_adamw.h.

Allowed:
norm     the bound in norm.cuh
NS       A rounding error made while a singular value is small grows with it, by up to 3.4445 a
         step, so it depends on the matrix. Float against double was measured on random matrices:
         at most 3.4e-5 of the rms; ten times that is allowed. bf16 against float: rms 1.5e-2 to
         2.2e-2, allowed 3e-2; against the golden bf16_fused, whose roundings are the same but sums
         are not, 4e-2.
*/
#pragma once
#include "../llmc/muon.cuh"
#include "../llmc/norm.cuh"
#include "../llmc/safetensors.h"
#include "oracle.h"
#include "test.h"

// ---- helpers --------------------------------------------------------------------------------

static double* test_golden_array(const SafeFile* file, const char* prefix, const char* name,
                                 size_t n) {
    char full[64];
    snprintf(full, sizeof full, "%s%s", prefix, name);
    const SafeTensor* t = safetensors_find(file, full);
    if (!t || (size_t)safe_elements(t) != n || (t->type != SAFE_F32 && t->type != SAFE_BF16)) {
        die("%s: no tensor %s of %zu F32 or BF16 values", file->path, full, n);
    }
    double* x = test_doubles(n);
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        if (t->type == SAFE_F32) memcpy(&bits, (const char*)t->data + 4 * i, 4);
        else bits = (uint32_t)((const uint16_t*)t->data)[i] << 16;
        float v;
        memcpy(&v, &bits, 4);
        x[i] = v;
    }
    return x;
}

// Differences relative to the rms of what is wanted: their rms, and the largest.
static void test_rms(const char* name, const double* got, const double* want, size_t n,
                     double rms_tol, double max_tol) {
    double sum = 0, diff = 0, largest = 0;
    for (size_t i = 0; i < n; i++) {
        double d = fabs(got[i] - want[i]);
        sum += want[i] * want[i];
        diff += d * d;
        if (!(d <= largest)) largest = d;
    }
    char what[160];
    double scale = sqrt(sum / n);
    snprintf(what, sizeof what, "%s, rms", name);
    test_check(what, sqrt(diff / n) / scale, rms_tol);
    snprintf(what, sizeof what, "%s, largest", name);
    test_check(what, largest / scale, max_tol);
}

static double* test_widen(float* x, size_t n) {    // frees x
    double* wide = test_doubles(n);
    for (size_t i = 0; i < n; i++) wide[i] = x[i];
    free(x);
    return wide;
}

// ---- norm -----------------------------------------------------------------------------------

static void test_norm_case(size_t n, int bad) {
    const double u = 0x1p-24;
    double *g = test_doubles(n), sum = 0, want[2];
    test_fill_normal_float(g, n, 1, 3.0);
    for (size_t i = 0; i < n; i++) sum += g[i] * g[i];
    for (int i = 0; i < bad; i++) {    // spread out, the first and the last element among them
        size_t at = bad == 1 ? n - 1 : (n - 1) * i / (bad - 1);
        g[at] = i % 3 == 0 ? NAN : i % 3 == 1 ? INFINITY : -INFINITY;
    }
    float *g_d = test_upload_float(g, n), *scratch = test_device_float(grad_norm_scratch_floats(n));
    double before[2] = {NAN, NAN};
    float* out = test_upload_float(before, 2);
    grad_norm(out, g_d, n, false, scratch, 0);
    char name[96];
    snprintf(name, sizeof name, "grad_norm n=%zu, %d not finite", n, bad);
    float *got = test_download_float(out, 2), *again;
    want[0] = sum, want[1] = bad;
    if (bad) test_true(name, !(fabsf(got[0]) <= FLT_MAX) && got[1] == bad);
    else test_compare(name, got, want, 2, 0, (32 + n / 2097152.0) * u);
    if (!bad) {
        grad_norm(out, g_d, n, true, scratch, 0);
        again = test_download_float(out, 2);
        test_true("grad_norm adds to what it found", again[0] == 2 * got[0] && again[1] == 0);
        free(again);
    }
    free(g), free(got);
    cudaFree(g_d), cudaFree(scratch), cudaFree(out);
}

// Whole numbers: the sum is exact, so a term too many or too few shows.
static void test_norm_exact(size_t n) {
    double *g = test_doubles(n), want[2] = {0, 0}, ten[2] = {10, 1};
    test_fill_whole(g, n, 1, -8, 8);
    for (size_t i = 0; i < n; i++) want[0] += g[i] * g[i];
    want[0] += 10, want[1] += 1;
    float *g_d = test_upload_float(g, n), *scratch = test_device_float(grad_norm_scratch_floats(n));
    float* out = test_upload_float(ten, 2);
    grad_norm(out, g_d, n, true, scratch, 0);
    test_compare_device_float("grad_norm exact", out, want, 2, 0, 0);
    free(g);
    cudaFree(g_d), cudaFree(scratch), cudaFree(out);
}

static void test_norm(void) {
    const size_t sizes[] = {1, 5, 16, 4095, 16384, 16385, 150001};
    for (int i = 0; i < 7; i++) {
        test_norm_case(sizes[i], 0);
        test_norm_case(sizes[i], 1);
        if (sizes[i] > 16) test_norm_case(sizes[i], 5);
        test_norm_exact(sizes[i]);
    }
}

// ---- newton_schulz --------------------------------------------------------------------------

static MuonRule test_muon_rule(MuonForm form, float momentum) {
    MuonRule rule = {};
    rule.form = form, rule.steps = 5, rule.momentum = momentum;
    return rule;
}

static double* test_ns_run(const double* g, int count, int rows, int cols, const MuonRule* rule,
                           Matmul* mm) {
    size_t n = (size_t)count * rows * cols, bytes = muon_scratch_bytes(count, rows, cols, rule);
    float *g_d = test_upload_float(g, n), *scratch = test_device_float(bytes / 4);
    floatX* o_d = test_device(n);
    newton_schulz(o_d, g_d, count, rows, cols, rule, scratch, bytes, mm, 0);
    double* o = test_widen(test_download(o_d, n), n);
    cudaFree(g_d), cudaFree(scratch), cudaFree(o_d);
    return o;
}

// A batch of random matrices of very different norms, one of them zero.
static void test_ns_case(int count, int rows, int cols, Matmul* mm) {
    size_t n = (size_t)rows * cols;
    double *g = test_doubles(count * n), *want = test_doubles(count * n);
    for (int i = 0; i < count; i++) {
        test_fill_normal_float(g + i * n, n, 1 + i, i == 1 ? 0 : pow(10, i % 9 - 4));
        oracle_newton_schulz(want + i * n, g + i * n, rows, cols, 5, 3.4445, -4.7750, 2.0315, 1e-7);
    }
    MuonRule rule = test_muon_rule(MUON_FORM_NONE, 0);
    double* o = test_ns_run(g, count, rows, cols, &rule, mm);
    char name[96];
    bool zero = true;
    for (int i = 0; i < count; i++) {
        if (i == 1) {
            for (size_t j = 0; j < n; j++) zero &= o[n + j] == 0;
            continue;
        }
        snprintf(name, sizeof name, "newton_schulz matrix %d of %d, %dx%d", i, count, rows, cols);
        if (FLOATX_IS_BF16) test_rms(name, o + i * n, want + i * n, n, 3e-2, 0.3);
        else test_rms(name, o + i * n, want + i * n, n, 5e-5, 3.4e-4);
    }
    test_true("newton_schulz of zero is zero", zero);
    free(g), free(want), free(o);
}

// A diagonal matrix stays diagonal and its entries follow the polynomial, each on its own: what NS
// does to singular values, without a decomposition. Those above 0.002 of the norm end between 0.68
// and 1.21.
static void test_ns_diagonal(int rows, int cols, Matmul* mm) {
    int k = rows < cols ? rows : cols;
    size_t n = (size_t)rows * cols;
    double *g = test_doubles(n), *want = test_doubles(n), norm = 0;
    for (int i = 0; i < k; i++) {
        double s = (float)pow(0.003, (double)i / (k - 1)) * (i % 2 ? -1 : 1);
        g[(size_t)i * cols + i] = s;
        norm += s * s;
    }
    for (int i = 0; i < k; i++) {
        double s = g[(size_t)i * cols + i] / (sqrt(norm) + 1e-7);
        for (int step = 0; step < 5; step++) {
            s = 3.4445 * s - 4.7750 * pow(s, 3) + 2.0315 * pow(s, 5);
        }
        want[(size_t)i * cols + i] = s;
    }
    MuonRule rule = test_muon_rule(MUON_FORM_NONE, 0);
    double *o = test_ns_run(g, 1, rows, cols, &rule, mm), worst = 0, off = 0;
    bool range = true;
    for (size_t i = 0; i < n; i++) {
        double d = fabs(o[i] - want[i]);
        if (i / cols == i % cols) {
            if (!(d <= worst)) worst = d;
            // 0.001 of the norm is about the smallest of these: it ends near 0.5
            if (fabs(g[i]) > 0.002 * sqrt(norm)) range &= fabs(o[i]) > 0.66 && fabs(o[i]) < 1.23;
        } else if (!(fabs(o[i]) <= off)) {
            off = fabs(o[i]);
        }
    }
    char name[96];
    snprintf(name, sizeof name, "newton_schulz diagonal %dx%d", rows, cols);
    // 25 roundings, of which each step at most doubles the relative error so far
    test_check(name, worst, 25 * 8 * TEST_EPS);
    test_check("newton_schulz off the diagonal", off, 0);
    test_true("newton_schulz singular values come near 1", range);
    free(g), free(want), free(o);
}

static void test_ns_golden(const char* file_name, int rows, int cols, Matmul* mm) {
    size_t n = (size_t)rows * cols;
    char path[96];
    snprintf(path, sizeof path, "test/golden/units/%s.safetensors", file_name);
    SafeFile file;
    safetensors_open(&file, path);
    MuonRule rule = test_muon_rule(MUON_FORM_NONE, 0);
    double *g = test_golden_array(&file, "", "G", n), *o = test_ns_run(g, 1, rows, cols, &rule, mm);
    bool lowrank = strstr(file_name, "lowrank"), zero = strstr(file_name, "zero");
    const char* of[2] = {"modern.f32", "sub3.f32"};    // two ways to write down the same iteration
    char name[96];
    for (int i = 0; i < (lowrank ? 1 : 2); i++) {
        double* want = test_golden_array(&file, "", of[i], n);
        snprintf(name, sizeof name, "newton_schulz golden %s %s", file_name, of[i]);
        if (zero) {
            bool right = true;
            for (size_t j = 0; j < n; j++) right &= o[j] == 0 && want[j] == 0;
            test_true(name, right);
        } else if (FLOATX_IS_BF16 && !lowrank) {
            test_rms(name, o, want, n, 3e-2, 0.3);
        } else if (!FLOATX_IS_BF16) {
            // rank 8 and noise of 1e-6, which grows by 485: the goldens are 2.6e-4 from double
            test_rms(name, o, want, n, lowrank ? 2e-4 : 5e-5, lowrank ? 1.5e-3 : 3.4e-4);
        }
        free(want);
    }
    if (FLOATX_IS_BF16 && !lowrank && !zero) {
        double* want = test_golden_array(&file, "", "sub3.bf16_fused", n);
        snprintf(name, sizeof name, "newton_schulz golden %s bf16_fused", file_name);
        test_rms(name, o, want, n, 4e-2, 0.4);
        free(want);
    }
    free(g), free(o);
    safetensors_close(&file);
}

static void test_newton_schulz(Matmul* mm) {
    test_ns_case(3, 64, 64, mm);
    test_ns_case(3, 40, 136, mm);
    test_ns_case(3, 136, 40, mm);
    test_ns_case(35, 16, 24, mm);    // three slices of 12, 12 and 11
    test_ns_case(2, 8, 1, mm);       // a vector: NS of it is a multiple of u/|u|
    test_ns_case(2, 96, 264, mm);    // four blocks, the last one not full
    test_ns_diagonal(16, 24, mm);
    test_ns_diagonal(72, 48, mm);
    test_ns_golden("ns_64x64", 64, 64, mm);
    test_ns_golden("ns_lowrank_96x256", 96, 256, mm);
    test_ns_golden("ns_zero", 16, 48, mm);
}

// ---- muon -----------------------------------------------------------------------------------

enum { TEST_MUON_MOST = 18 };

// What a rank holds: its `count` matrices in a bank in which all else is NaN, and compact masters,
// momenta and second moments. The arrays of the tests hold the rank's own matrices, one after the
// other.
typedef struct {
    MuonRule rule;
    floatX* p;
    float *master, *g, *m;    // master NULL: p is the value
    float* second;            // NULL unless the rule has one; `lines` numbers per matrix
    int lines;
    int place[TEST_MUON_MOST];
    int count, rows, cols;
    size_t n, stride;         // elements of a matrix, and from one to the next
    size_t bank, own;         // elements of p and g, and of master and m
    void* scratch;
    size_t scratch_bytes;
} TestMuon;

// A whole bank without gaps, or every third matrix of it not the rank's, and gaps everywhere.
static void test_muon_layout(TestMuon* t, const MuonRule* rule, int count, int rows, int cols,
                             bool gaps) {
    memset(t, 0, sizeof *t);
    t->rule = *rule;
    t->lines = rule->beta2 == 0 ? 0 : rule->second_by_row ? rows : cols;
    t->count = count, t->rows = rows, t->cols = cols;
    t->n = (size_t)rows * cols;
    t->stride = gaps ? t->n + 16 : t->n;
    for (int i = 0; i < count; i++) t->place[i] = gaps ? i + i / 2 + 1 : i;
}

static double* test_muon_spread(const TestMuon* t, const double* x, bool bank) {
    size_t size = bank ? t->bank : t->own;
    double* y = test_doubles(size);
    for (size_t i = 0; i < size; i++) y[i] = NAN;
    for (int i = 0; i < t->count; i++) {
        memcpy(y + (bank ? t->place[i] : i) * t->stride, x + i * t->n, t->n * sizeof *y);
    }
    return y;
}

// The rank's own matrices of a downloaded bank (or of master or m); what lies between them must be
// NaN still. Frees x.
static double* test_muon_own(const TestMuon* t, float* x, bool bank) {
    double* wide = test_widen(x, bank ? t->bank : t->own);
    double* y = test_doubles(t->count * t->n);
    bool untouched = true;
    size_t at = 0;
    for (int i = 0; i <= t->count; i++) {
        size_t end = i < t->count ? (bank ? t->place[i] : i) * t->stride : bank ? t->bank : t->own;
        for (; at < end; at++) untouched &= wide[at] != wide[at];
        if (i < t->count) memcpy(y + i * t->n, wide + at, t->n * sizeof *y);
        at += t->n;
    }
    test_true("muon leaves what is not its own", untouched);
    free(wide);
    return y;
}

static void test_muon_start(TestMuon* t, const double* p, const double* m, bool use_master) {
    t->bank = (t->place[t->count - 1] + 2) * t->stride;
    t->own = t->count * t->stride;
    double *p_bank = test_muon_spread(t, p, true), *p_own = test_muon_spread(t, p, false);
    double* m_own = test_muon_spread(t, m, false);
    t->p = test_upload(p_bank, t->bank);
    t->master = use_master ? test_upload_float(p_own, t->own) : NULL;
    t->m = test_upload_float(m_own, t->own);
    t->g = test_device_float(t->bank);
    t->scratch_bytes = muon_scratch_bytes(t->count, t->rows, t->cols, &t->rule);
    t->scratch = test_device_float(t->scratch_bytes / 4);
    if (t->lines) {
        double* zero = test_doubles((size_t)t->count * t->lines);
        t->second = test_upload_float(zero, (size_t)t->count * t->lines);
        free(zero);
    }
    free(p_bank), free(p_own), free(m_own);
}

static void test_muon_free(TestMuon* t) {
    cudaFree(t->p), cudaFree(t->master), cudaFree(t->g), cudaFree(t->m), cudaFree(t->scratch);
    cudaFree(t->second);
}

static void test_muon_step(TestMuon* t, const double* g, const float* scale, float lr, Matmul* mm) {
    double* g_bank = test_muon_spread(t, g, true);
    test_put_float(t->g, g_bank, t->bank);
    free(g_bank);
    muon_update(t->p, t->master, t->g, t->m, t->second, t->place, t->count, t->rows, t->cols,
                t->stride, scale, lr, &t->rule, t->scratch, t->scratch_bytes, mm, 0);
}

static double* test_muon_weights(const TestMuon* t) {
    return test_muon_own(t, test_download(t->p, t->bank), true);
}

static double* test_muon_momenta(const TestMuon* t) {
    return test_muon_own(t, test_download_float(t->m, t->own), false);
}

static double* test_muon_seconds(const TestMuon* t) {
    size_t n = (size_t)t->count * t->lines;
    return t->lines ? test_widen(test_download_float(t->second, n), n) : test_doubles(0);
}

// What the update started from and went to, unrounded.
static double* test_muon_values(const TestMuon* t) {
    if (!t->master) return test_muon_weights(t);
    return test_muon_own(t, test_download_float(t->master, t->own), false);
}

// Three steps of a bank against the oracle, each matrix with a scale of its own; then zeros, NaN.
static void test_muon_case(int count, int rows, int cols, MuonForm form, bool gaps,
                           bool use_master, Matmul* mm) {
    const double u = 0x1p-24;
    const float lr = 0.02f, mu = 0.95f;
    size_t n = (size_t)rows * cols, all = count * n;
    double *p = test_doubles(all), *g = test_doubles(all), *m = test_doubles(all),
           *start = test_doubles(all);
    double* update = test_doubles(all);
    float* scale = test_floats(count);
    test_fill_normal_float(p, all, 1, 0.03);
    for (int i = 0; i < count; i++) {
        scale[i] = muon_scale(i % 2 ? MUON_SCALE_ASPECT : MUON_SCALE_MAX_DIM, rows + 8 * i, cols);
    }
    memcpy(start, p, all * sizeof *p);
    TestMuon t;
    MuonRule rule = test_muon_rule(form, mu);
    test_muon_layout(&t, &rule, count, rows, cols, gaps);
    test_muon_start(&t, p, m, use_master);
    char name[128];
    for (int step = 0; step < 3; step++) {
        test_fill_normal_float(g, all, 10 + step, 1e-3);
        test_muon_step(&t, g, scale, lr, mm);
        for (int i = 0; i < count; i++) {
            double* direction = test_doubles(n);
            oracle_muon_momentum(direction, m + i * n, g + i * n, n, mu,
                                 form == MUON_FORM_SUM ? ORACLE_MOMENTUM_SUM : ORACLE_MOMENTUM_EMA);
            oracle_newton_schulz(direction, direction, rows, cols, 5, 3.4445, -4.7750, 2.0315,
                                 1e-7);
            for (size_t j = 0; j < n; j++) p[i * n + j] -= (double)lr * scale[i] * direction[j];
            free(direction);
        }
    }
    double *w = test_muon_values(&t), *half = test_muon_weights(&t);
    bool copied = true;
    for (size_t i = 0; i < all; i++) {
        copied &= half[i] == test_round(w[i]);
        w[i] -= start[i];
        update[i] = p[i] - start[i];
    }
    // p is about 0.03 and an update lr scale, 0.02 or more: the rounding of p is nothing
    for (int i = 0; i < count; i++) {
        snprintf(name, sizeof name, "muon matrix %d of %d, %dx%d form %d", i, count, rows, cols,
                 form);
        if (FLOATX_IS_BF16) test_rms(name, w + i * n, update + i * n, n, 3e-2, 0.3);
        else test_rms(name, w + i * n, update + i * n, n, 5e-5, 3.4e-4);
    }
    test_true("muon p is the rounded master", copied);
    snprintf(name, sizeof name, "muon momentum %dx%d form %d", rows, cols, form);
    // |g| < 5e-3, three steps of four roundings
    double* momenta = test_muon_momenta(&t);
    test_compare_double(name, momenta, m, all, 5e-3 * 12 * u, 12 * u);

    // no gradient and no momentum: nothing moves. A NaN spoils its own matrix, no other.
    double* still = test_muon_values(&t);
    test_fill_normal_float(g, all, 20, 0);
    double* rest = test_muon_spread(&t, g, false);
    test_put_float(t.m, rest, t.own);
    test_muon_step(&t, g, scale, lr, mm);
    double* after = test_muon_values(&t);
    test_same_bits("muon zero gradient and momentum", after, still, all * sizeof *after);
    free(after);
    g[(count - 1) * n + n / 2] = NAN;
    test_muon_step(&t, g, scale, lr, mm);
    after = test_muon_values(&t);
    bool spoilt = true, spared = true;
    for (size_t i = 0; i < all; i++) {
        if (i / n == (size_t)count - 1) spoilt &= after[i] != after[i];
        else spared &= after[i] == still[i];
    }
    test_true("muon NaN spoils its matrix", spoilt);
    test_true("muon NaN spares the others", spared);
    free(p), free(g), free(m), free(start), free(update), free(scale), free(w), free(half),
        free(momenta), free(still), free(rest), free(after);
    test_muon_free(&t);
}

// Four steps of the published optimizers, or as many as the file has; the momentum is that after the
// fourth. fp32: NS of the records is float there.
static void test_muon_golden(const char* matrix, int count, int rows, int cols, bool modern,
                             Matmul* mm) {
    const double u = 0x1p-24;
    size_t n = (size_t)count * rows * cols;
    SafeFile file;
    safetensors_open(&file, "test/golden/units/muon.safetensors");
    char prefix[32], name[64], what[128];
    snprintf(prefix, sizeof prefix, "%s.", matrix);
    double *start = test_golden_array(&file, prefix, "p0", n), *zero = test_doubles(n);
    TestMuon t;
    MuonRule rule = test_muon_rule(modern ? MUON_FORM_SUM : MUON_FORM_LERP, 0);
    test_muon_layout(&t, &rule, count, rows, cols, false);
    test_muon_start(&t, start, zero, true);
    float scale[3];
    for (int i = 0; i < count; i++) {
        scale[i] = muon_scale(modern ? MUON_SCALE_MAX_DIM : MUON_SCALE_ASPECT, rows, cols);
    }
    int steps = !strcmp(matrix, "tall") ? 2 : 4;
    for (int step = 0; step < steps; step++) {
        snprintf(name, sizeof name, "g%d", step);
        double* g = test_golden_array(&file, prefix, name, n);
        t.rule.momentum = modern ? 0.95f : (float)(0.85 + 0.1 * step / 300);
        test_muon_step(&t, g, scale, modern ? 0.00036f : 0.05f, mm);
        snprintf(name, sizeof name, "%s.p%d", modern ? "modern" : "sub3", step + 1);
        double *want = test_golden_array(&file, prefix, name, n);
        double* got = test_muon_values(&t);
        for (size_t i = 0; i < n; i++) want[i] -= start[i], got[i] -= start[i];
        // ten times what two right evaluations of a first update differ by; p's own rounding is
        // 6e-8 of |p|, on an update of 1e-3
        snprintf(what, sizeof what, "muon golden %s %s", matrix, name);
        test_rms(what, got, want, n, 2e-4, 2e-3);
        free(g), free(want), free(got);
    }
    if (steps == 4) {
        snprintf(name, sizeof name, "%s.buf", modern ? "modern" : "sub3");
        double *want = test_golden_array(&file, prefix, name, n), largest = 0;
        for (size_t i = 0; i < n; i++) largest = fabs(want[i]) > largest ? fabs(want[i]) : largest;
        snprintf(what, sizeof what, "muon golden %s %s", matrix, name);
        double* momenta = test_muon_momenta(&t);
        test_compare_double(what, momenta, want, n, 16 * u * largest, 16 * u);
        free(want), free(momenta);
    }
    free(start), free(zero);
    test_muon_free(&t);
    safetensors_close(&file);
}

// Equal bits in a second run and with any number of threads.
static void test_muon_repeat(const MuonRule* rule, Matmul* mm) {
    const int count = 18, rows = 96, cols = 104;
    const size_t n = (size_t)count * rows * cols;
    double *p = test_doubles(n), *g = test_doubles(n), *zero = test_doubles(n);
    float scale[TEST_MUON_MOST];
    double* first = NULL;
    for (int i = 0; i < count; i++) scale[i] = 1;
    test_fill_normal_float(p, n, 1, 0.03);
    test_fill_normal_float(g, n, 2, 1.0);
    for (int run = 0; run < 3; run++) {
#ifndef __CUDACC__
        host_set_threads(run + 1);
#endif
        TestMuon t;
        test_muon_layout(&t, rule, count, rows, cols, false);
        test_muon_start(&t, p, zero, true);
        test_muon_step(&t, g, scale, 0.02f, mm);
        double* got = test_muon_values(&t);
        if (run > 0) test_same_bits("muon run again, other threads", got, first, n * sizeof *got);
        if (run > 0) free(got);
        else first = got;
        test_muon_free(&t);
    }
#ifndef __CUDACC__
    host_set_threads(0);
#endif
    free(p), free(g), free(zero), free(first);
}

// One bank, dealt to ranks in four ways: all to one, two runs, every other one, one each. An update
// has the same bits whoever makes it and with whatever others.
static void test_muon_ranks(const MuonRule* rule, int count, int rows, int cols, bool use_master,
                            Matmul* mm) {
    size_t n = (size_t)rows * cols, all = count * n;
    double *p = test_doubles(all), *g = test_doubles(all), *m = test_doubles(all);
    double* first[4] = {NULL, NULL, NULL, NULL};
    test_fill_normal(p, all, 1, 0.03);
    test_fill_normal_float(m, all, 2, 1e-2);
    for (int i = 0; i < count; i++) test_fill_normal_float(g + i * n, n, 3 + i, pow(10, i % 5 - 4));
    for (int way = 0; way < 4; way++) {
        double* got[4] = {test_doubles(all), test_doubles(all), test_doubles(all),
                          test_doubles(all)};
        int ranks = way == 0 ? 1 : way == 3 ? count : 2;
        for (int rank = 0; rank < ranks; rank++) {
            TestMuon t;
            double *p_own = test_doubles(all), *g_own = test_doubles(all),
                   *m_own = test_doubles(all);
            float scale[TEST_MUON_MOST];
            int owned = 0;
            test_muon_layout(&t, rule, count, rows, cols, false);
            for (int i = 0; i < count; i++) {
                int owner = way == 1 ? 7 * i / count >= 3 : way == 2 ? i % 2 : way == 3 ? i : 0;
                if (owner != rank) continue;
                memcpy(p_own + owned * n, p + i * n, n * sizeof *p);
                memcpy(g_own + owned * n, g + i * n, n * sizeof *g);
                memcpy(m_own + owned * n, m + i * n, n * sizeof *m);
                scale[owned] = (float)(1 + i);
                t.place[owned++] = i;
            }
            t.count = owned;
            test_muon_start(&t, p_own, m_own, use_master);
            test_muon_step(&t, g_own, scale, 0.02f, mm);
            double* own[4] = {test_muon_weights(&t), test_muon_values(&t), test_muon_momenta(&t),
                              test_muon_seconds(&t)};
            for (int k = 0; k < 4; k++) {
                size_t size = k < 3 ? n : t.lines;
                for (int i = 0; i < owned; i++) {
                    memcpy(got[k] + t.place[i] * n, own[k] + i * size, size * sizeof(double));
                }
                free(own[k]);
            }
            free(p_own), free(g_own), free(m_own);
            test_muon_free(&t);
        }
        const char* of[4] = {"weights", "values", "momenta", "second moments"};
        for (int k = 0; k < 4; k++) {
            char name[96];
            snprintf(name, sizeof name, "muon %s of %d of %dx%d on %d ranks, way %d", of[k], count,
                     rows, cols, ranks, way);
            if (way > 0 && (k < 3 || rule->beta2 != 0))
                test_same_bits(name, got[k], first[k], all * sizeof(double));
            if (way > 0) free(got[k]);
            else first[k] = got[k];
        }
    }
    free(p), free(g), free(m), free(first[0]), free(first[1]), free(first[2]), free(first[3]);
}

static void test_muon(Matmul* mm) {
    MuonRule rule = test_muon_rule(MUON_FORM_SUM, 0.95f);
    test_true("muon_scale max-dim 768x3072",
              muon_scale(MUON_SCALE_MAX_DIM, 768, 3072) == sqrtf(3072.0f));
    test_true("muon_scale max-dim 3072x768",
              muon_scale(MUON_SCALE_MAX_DIM, 3072, 768) == sqrtf(3072.0f));
    test_true("muon_scale aspect 3072x768", muon_scale(MUON_SCALE_ASPECT, 3072, 768) == 2.0f);
    test_true("muon_scale aspect 768x3072", muon_scale(MUON_SCALE_ASPECT, 768, 3072) == 1.0f);
    for (int master = FLOATX_IS_BF16 ? 1 : 0; master < 2; master++) {
        test_muon_case(2, 48, 64, MUON_FORM_SUM, false, master, mm);
        test_muon_case(2, 64, 48, MUON_FORM_LERP, true, master, mm);
        test_muon_case(17, 16, 24, MUON_FORM_SUM, true, master, mm);    // two slices
        test_muon_ranks(&rule, 7, 48, 64, master, mm);
    }
    // Shapes that a product for a batch may cut differently from a product of one.
    test_muon_ranks(&rule, 18, 16, 24, true, mm);    // slices of 9, 8 and 10
    test_muon_ranks(&rule, 7, 104, 96, true, mm);
    test_muon_ranks(&rule, 4, 256, 1024, true, mm);
    test_muon_repeat(&rule, mm);
    size_t small = muon_scratch_bytes(MUON_SLICE, 64, 48, &rule);
    size_t large = muon_scratch_bytes(1000, 64, 48, &rule);
    test_true("muon scratch does not grow with the bank", large <= small);
    if (FLOATX_IS_BF16) return;    // the golden NS is float
    test_muon_golden("sq", 1, 64, 64, true, mm);
    test_muon_golden("sq", 1, 64, 64, false, mm);
    test_muon_golden("tall", 1, 192, 48, true, mm);
    test_muon_golden("tall", 1, 192, 48, false, mm);
}

static void test_optimizer(void) {
    static Matmul mm;
    matmul_init(&mm, 0);
    test_norm();
    test_newton_schulz(&mm);
    test_muon(&mm);
    matmul_free(&mm);
}
