/*
norm, guard, newton_schulz, muon: llmc/norm.cuh, guard.cuh and muon.cuh against oracle.h and against
golden files that the published code made with PyTorch. What NorMuon adds is in cases_normuon.h,
Adam in cases_adamw.h.

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

// ---- bits -----------------------------------------------------------------------------------

// What lies in some device arrays, to be compared with later or put back.
typedef struct {
    int count;
    void *d[4], *copy[4];
    size_t bytes[4];
} TestBits;

static void test_bits_add(TestBits* b, void* d, size_t bytes) {
    if (!d || bytes == 0) return;
    CUDA_CHECK(cudaDeviceSynchronize());
    b->d[b->count] = d, b->bytes[b->count] = bytes;
    b->copy[b->count] = test_calloc(bytes, 1);
    CUDA_CHECK(cudaMemcpy(b->copy[b->count++], d, bytes, cudaMemcpyDeviceToHost));
}

static bool test_bits_same(const TestBits* b) {
    bool same = true;
    CUDA_CHECK(cudaDeviceSynchronize());
    for (int i = 0; i < b->count; i++) {
        void* now = test_calloc(b->bytes[i], 1);
        CUDA_CHECK(cudaMemcpy(now, b->d[i], b->bytes[i], cudaMemcpyDeviceToHost));
        same &= memcmp(now, b->copy[i], b->bytes[i]) == 0;
        free(now);
    }
    return same;
}

static void test_bits_restore(const TestBits* b) {
    CUDA_CHECK(cudaDeviceSynchronize());
    for (int i = 0; i < b->count; i++)
        CUDA_CHECK(cudaMemcpy(b->d[i], b->copy[i], b->bytes[i], cudaMemcpyHostToDevice));
}

static void test_bits_free(TestBits* b) {
    for (int i = 0; i < b->count; i++) free(b->copy[i]);
    b->count = 0;
}

// ---- norm -----------------------------------------------------------------------------------

// Segments of both types, of sizes up to three blocks and all eight alignments, in two pools where
// all else is NaN.
enum { TEST_NORMS = 2 * (11 * 8 + 3) };
typedef struct {
    NormSegment segment[TEST_NORMS];
    size_t at[TEST_NORMS];          // first element in its pool
    size_t n[2];                    // elements of the pools: of floatX, of floats
    floatX* halves;
    float* floats;
} TestNorms;

static void test_norms_layout(TestNorms* t) {
    const size_t sizes[11] = {0, 1, 2, 7, 8, 15, 16, 17, 2047, 2049, 4160};
    const size_t large[3] = {65536, 65537, 150001};
    memset(t, 0, sizeof *t);
    for (int s = 0; s < TEST_NORMS; s++) {
        int floats = s % 2, i = s / 2;
        size_t n = i < 88 ? sizes[i / 8] : large[i - 88], offset = i < 88 ? i % 8 : i % 2;
        size_t begin = ceil_div(t->n[floats] + 1, 8) * 8 + offset;
        t->segment[s].n = n, t->segment[s].floats = floats;
        t->at[s] = begin;
        t->n[floats] = begin + n + 1;
    }
    t->halves = test_device(t->n[0]);
    t->floats = test_device_float(t->n[1]);
    for (int s = 0; s < TEST_NORMS; s++)
        t->segment[s].x = s % 2 ? (void*)(t->floats + t->at[s]) : (void*)(t->halves + t->at[s]);
}

// Elements of a segment depend on its size alone. bad: some are NaN or infinite, the first or the
// last of them, or both and one between, or all. want (2, segments).
static void test_norms_fill(TestNorms* t, bool whole, bool bad, double* want) {
    double* pool[2] = {test_doubles(t->n[0]), test_doubles(t->n[1])};
    for (int k = 0; k < 2; k++)
        for (size_t i = 0; i < t->n[k]; i++) pool[k][i] = NAN;
    for (int s = 0; s < TEST_NORMS; s++) {
        size_t n = t->segment[s].n;
        double *x = pool[s % 2] + t->at[s], spoilt[3] = {NAN, INFINITY, -INFINITY};
        if (whole) test_fill_whole(x, n, n, -8, 8);
        else test_fill_normal(x, n, n, 3.0);
        int which = bad ? s / 2 % 5 : 0;    // 0: none
        for (size_t i = 0; i < n; i++) {
            bool first = i == 0 && which % 2, last = i == n - 1 && (which == 2 || which == 3);
            bool more = which == 4 || (which == 3 && i == n / 2);
            if (first || last || more) x[i] = spoilt[(s + i) % 3];
        }
        want[2 * s] = want[2 * s + 1] = 0;
        for (size_t i = 0; i < n; i++) {
            if (isfinite(x[i])) want[2 * s] += x[i] * x[i];
            else want[2 * s + 1]++;
        }
    }
    test_put(t->halves, pool[0], t->n[0]);
    test_put_float(t->floats, pool[1], t->n[1]);
    free(pool[0]), free(pool[1]);
}

static void test_norms(void) {
    const double u = 0x1p-24;
    TestNorms t;
    Norms norms;
    void* memory;
    double *want = test_doubles(2 * TEST_NORMS), *nan = test_doubles(2 * TEST_NORMS + 2);
    for (int i = 0; i < 2 * TEST_NORMS + 2; i++) nan[i] = NAN;
    test_norms_layout(&t);
    CUDA_CHECK(cudaMalloc(&memory, norms_bytes(t.segment, TEST_NORMS)));
    norms_init(&norms, t.segment, TEST_NORMS, memory, 0);
    float *out = test_upload_float(nan, 2 * TEST_NORMS), *total = test_upload_float(nan, 2), *got;

    // Whole numbers: sums are exact, so a term too many or too few shows. Those of `some` segments
    // alone leave the others' places as they are.
    test_norms_fill(&t, true, false, want);
    for (int some = 0; some <= TEST_NORMS; some += TEST_NORMS / 2) {
        test_put_float(out, nan, 2 * TEST_NORMS);
        norms_measure(out, &norms, some, 0);
        got = test_download_float(out, 2 * TEST_NORMS);
        bool right = true;
        for (int i = 0; i < 2 * TEST_NORMS; i++)
            right &= i < 2 * some ? got[i] == want[i] : got[i] != got[i];
        test_true("norms_measure exact, and no further than asked", right);
        free(got);
    }
    const int all = TEST_NORMS;
    const int ranges[5][2] = {{0, all}, {0, 1}, {7, 140}, {31, 31}, {all - 1, all}};
    for (int r = 0; r < 5; r++) {
        double sum[2] = {0, 0};
        for (int s = ranges[r][0]; s < ranges[r][1]; s++) sum[0] += want[2 * s];
        norms_total(total, out, ranges[r][0], ranges[r][1], 0);
        test_compare_device_float("norms_total exact", total, sum, 2, 0, 0);
    }

    // Against double, twice the same bits, and the same bits at any alignment.
    test_norms_fill(&t, false, false, want);
    TestBits bits = {};
    norms_measure(out, &norms, TEST_NORMS, 0);
    test_bits_add(&bits, out, 2 * TEST_NORMS * sizeof *out);
    got = test_download_float(out, 2 * TEST_NORMS);
    test_compare("norms_measure", got, want, 2 * TEST_NORMS, 0, 87 * u);
    bool same = true;
    for (int s = 0; s < 2 * 88; s++) {
        int first = s / 16 * 16 + s % 2;
        same &= got[2 * s] == got[2 * first];
    }
    test_true("norms_measure: the same bits at any alignment", same);
    free(got);
    norms_measure(out, &norms, TEST_NORMS, 0);
    test_true("norms_measure: the same bits twice", test_bits_same(&bits));
    test_bits_free(&bits);

    // Not finite: counted, in their own segment alone.
    test_norms_fill(&t, true, true, want);
    norms_measure(out, &norms, TEST_NORMS, 0);
    got = test_download_float(out, 2 * TEST_NORMS);
    bool counted = true;
    double sum = 0;
    for (int s = 0; s < TEST_NORMS; s++) {
        bool finite = fabsf(got[2 * s]) <= FLT_MAX;
        sum += want[2 * s + 1];
        counted &= got[2 * s + 1] == want[2 * s + 1];
        counted &= want[2 * s + 1] == 0 ? got[2 * s] == want[2 * s] : !finite;
    }
    test_true("norms_measure counts what is not finite", counted && sum > 100000);
    free(got);
    norms_total(total, out, 0, TEST_NORMS, 0);
    got = test_download_float(total, 2);
    test_true("norms_total of what is not finite", !(fabsf(got[0]) <= FLT_MAX) && got[1] == sum);
    free(got);

    // Large and finite: the sum is infinite, the count is not.
    double most[3] = {1, 1e30, 1};
    test_put_float(t.floats, most, 3);
    NormSegment one = {t.floats, 3, true};
    norms_free(&norms);
    norms_init(&norms, &one, 1, memory, 0);
    norms_measure(out, &norms, 1, 0);
    got = test_download_float(out, 2);
    test_true("norms_measure of 1e30", got[0] == INFINITY && got[1] == 0);
    free(got), free(want), free(nan);
    norms_free(&norms);
    cudaFree(t.halves), cudaFree(t.floats), cudaFree(memory), cudaFree(out), cudaFree(total);
}

// ---- guard ----------------------------------------------------------------------------------

static bool test_guard_run(float before, const double* norms, const double* losses, int n_losses,
                           bool sticky) {
    double start = before;
    float *guard = test_upload_float(&start, 1), *norms_d = test_upload_float(norms, 4);
    float* losses_d = n_losses ? test_upload_float(losses, n_losses) : NULL;
    guard_check(guard, norms_d, losses_d, n_losses, sticky, 0);
    float* got = test_download_float(guard, 1);
    bool set = got[0] == 1;
    test_true("guard is 0 or 1", set || got[0] == 0);
    free(got);
    cudaFree(guard), cudaFree(norms_d), cudaFree(losses_d);
    return set;
}

static void test_guard_check(void) {
    const double spoilt[3] = {NAN, INFINITY, -INFINITY}, fine[4] = {FLT_MAX, 0, 1e-30, 0};
    const int sizes[5] = {0, 1, 5, 128, 300};
    for (int k = 0; k < 5; k++) {
        int n = sizes[k];
        double* losses = test_doubles(n);
        for (int i = 0; i < n; i++) losses[i] = i % 2 ? 1e30 : 0;
        bool clear = true, sets = true;
        clear &= !test_guard_run(0, fine, losses, n, true);
        clear &= !test_guard_run(1, fine, losses, n, false);
        clear &= !test_guard_run(NAN, fine, losses, n, false);    // memory as it is found
        sets &= test_guard_run(1, fine, losses, n, true);
        test_true("guard is clear where all is finite", clear);
        for (int i = 0; i < 4; i++) {
            double norms[4] = {4, 0, 9, 0};
            for (int s = 0; s < 3; s++) {
                norms[i] = spoilt[s];
                sets &= test_guard_run(0, norms, losses, n, s);
            }
            norms[i] = 1;
            bool count = i % 2;    // one element that is not finite; a sum of squares of 1 is none
            sets &= test_guard_run(0, norms, losses, n, false) == count;
        }
        test_true("guard is set by norms", sets);
        for (int i = 0; i < n; i += n > 1 ? n - 1 : 1) {
            for (int s = 0; s < 3; s++) {
                double was = losses[i];
                losses[i] = spoilt[s];
                test_true("guard is set by a loss", test_guard_run(0, fine, losses, n, false));
                losses[i] = was;
            }
        }
        free(losses);
    }
}

static void test_guard_clear(void) {
    const size_t sizes[5] = {0, 1, 127, 129, 200001};
    for (int k = 0; k < 5; k++) {
        size_t n = sizes[k], all = n + 3;
        double *x = test_doubles(all), values[2] = {0, 1};
        test_fill_normal_float(x, all, 1, 1.0);
        x[n / 2] = NAN, x[0] = INFINITY;
        float *x_d = test_upload_float(x, all), *guard = test_upload_float(values, 2);
        TestBits bits = {};
        test_bits_add(&bits, x_d, all * sizeof *x_d);
        guard_clear_if(x_d, n, guard, 0);
        guard_clear_if(x_d, n, NULL, 0);
        test_true("guard_clear_if keeps where the guard is clear", test_bits_same(&bits));
        guard_clear_if(x_d, n, guard + 1, 0);
        float* got = test_download_float(x_d, all);
        bool right = true;
        for (size_t i = 0; i < n; i++) right &= got[i] == 0 && !signbit(got[i]);
        for (size_t i = n; i < all; i++) right &= got[i] == (float)x[i] || x[i] != x[i];
        test_true("guard_clear_if", right);
        test_bits_free(&bits);
        free(x), free(got);
        cudaFree(x_d), cudaFree(guard);
    }
}

static void test_norm(void) {
    test_norms();
    test_guard_check();
    test_guard_clear();
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
    const float* guard;
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
                t->stride, scale, lr, &t->rule, t->scratch, t->scratch_bytes, mm, t->guard, 0);
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

// Where the guard is set nothing that lasts changes, and nothing of such a step is left in the
// scratch; where it is clear, everything is as without one.
static void test_muon_guard(const MuonRule* rule, int count, int rows, int cols, bool use_master,
                            Matmul* mm) {
    size_t n = (size_t)rows * cols, all = count * n;
    double *p = test_doubles(all), *g = test_doubles(all), values[2] = {0, 1};
    float* scale = test_floats(count);
    for (int i = 0; i < count; i++) scale[i] = 1;
    test_fill_normal_float(p, all, 1, 0.03);
    test_fill_normal_float(g, all, 2, 1e-3);
    float* guard = test_upload_float(values, 2);
    TestMuon t;
    test_muon_layout(&t, rule, count, rows, cols, true);
    test_muon_start(&t, p, p, use_master);
    test_muon_step(&t, g, scale, 0.02f, mm);    // a second moment that is not 0
    TestBits before = {}, after = {};
    void* of[4] = {t.p, t.master, t.m, t.second};
    size_t bytes[4] = {t.bank * sizeof(floatX), t.own * sizeof(float), t.own * sizeof(float),
                       (size_t)count * t.lines * sizeof(float)};
    for (int k = 0; k < 4; k++) test_bits_add(&before, of[k], bytes[k]);
    char name[160];
    snprintf(name, sizeof name, "muon guard %dx%d form %d beta2 %g by_row %d decay %g master %d",
             rows, cols, rule->form, rule->beta2, rule->second_by_row, rule->cautious_decay,
             use_master);
    t.guard = guard + 1;
    test_muon_step(&t, g, scale, 0.02f, mm);
    test_true(name, test_bits_same(&before));
    double was = g[n / 2];
    g[n / 2] = NAN;
    test_muon_step(&t, g, scale, 0.02f, mm);
    test_true(name, test_bits_same(&before));
    g[n / 2] = was;
    t.guard = guard;
    test_muon_step(&t, g, scale, 0.02f, mm);
    test_true("muon where the guard is clear", !test_bits_same(&before));
    for (int k = 0; k < 4; k++) test_bits_add(&after, of[k], bytes[k]);
    test_bits_restore(&before);
    t.guard = NULL;
    test_muon_step(&t, g, scale, 0.02f, mm);
    test_true("muon without a guard is as with a clear one", test_bits_same(&after));
    test_bits_free(&before), test_bits_free(&after);
    free(p), free(g), free(scale);
    cudaFree(guard);
    test_muon_free(&t);
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
