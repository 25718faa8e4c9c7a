/*
What NorMuon adds to llmc/muon.cuh: Polar Express, the second moment, the cautious decay, and
gate_update; against oracle.h and against golden files that the published code made with PyTorch.

Allowed, of the rms of what is wanted:
polar    As for NS in cases_optimizer.h the error depends on the matrix. Float against double was
         measured on random matrices, at most 2e-5: 5e-5 is allowed. bf16 against float: 1.3e-2 to
         2e-2 in the golden bf16_fused, allowed 4e-2. The fewer elements there are, the more one
         singular value is of them: 3.6e-2 measured on 16x24, allowed 6e-2; 6e-2 in the golden 6x12,
         allowed 0.12; and 0.2 for a dozen, which all take the error of the one.
update   Three steps of it are as exact as its directions, but where O W is nearly 0: there one
         rounding decides whether W decays. Such an element is off by lr scale decay lr |W|, which
         `largest` allows; they are too few to be seen in the rms.
goldens  The bf16 ones make the same roundings, all of them in the same places, and their sums are
         of 12 and 48 terms: what differs is a value here and there that falls to the other side,
         and once a norm that does. Measured 3.6e-3, allowed 1.5e-2. Square matrices on their side
         are another product, X B for B X: measured 3.7e-2, allowed 6e-2.
*/
#pragma once
#include "../llmc/muon.cuh"
#include "../llmc/safetensors.h"
#include "cases_optimizer.h"
#include "oracle.h"
#include "test.h"

static MuonRule test_normuon_rule(bool by_row, float decay) {
    MuonRule rule = test_muon_rule(MUON_FORM_LERP, 0.9f);
    rule.polar = true, rule.beta2 = 0.95f;
    rule.second_by_row = by_row, rule.cautious_decay = decay;
    return rule;
}

// ---- Polar Express --------------------------------------------------------------------------

static double test_normuon_tolerance(bool bf16, size_t n) {
    return !bf16 ? 5e-5 : n < 50 ? 0.2 : n < 200 ? 0.12 : n < 600 ? 6e-2 : 4e-2;
}

static MuonRule test_polar_rule(void) {
    MuonRule rule = test_muon_rule(MUON_FORM_NONE, 0);
    rule.polar = true;
    return rule;
}

static void test_polar_case(int count, int rows, int cols, Matmul* mm) {
    MuonRule rule = test_polar_rule();
    size_t n = (size_t)rows * cols;
    double tol = test_normuon_tolerance(FLOATX_IS_BF16, n);
    double *g = test_doubles(count * n), *want = test_doubles(count * n);
    for (int i = 0; i < count; i++) {
        // down to a norm at which eps is felt
        test_fill_normal_float(g + i * n, n, 1 + i, i == 1 ? 0 : pow(10, i % 9 - 7));
        oracle_polar_express(want + i * n, g + i * n, rows, cols);
    }
    double* o = test_ns_run(g, count, rows, cols, &rule, mm);
    char name[96];
    bool zero = true;
    for (int i = 0; i < count; i++) {
        snprintf(name, sizeof name, "polar matrix %d of %d, %dx%d", i, count, rows, cols);
        for (size_t j = 0; j < n && i == 1; j++) zero &= o[n + j] == 0;
        if (i == 1) continue;
        test_rms(name, o + i * n, want + i * n, n, tol, 10 * tol);
    }
    test_true("polar of zero is zero", zero);
    free(g), free(want), free(o);
}

// The entries of a diagonal matrix follow the polynomials each on its own; behind the fifth step
// the last one goes on. Those above 0.002 of the norm end between 0.85 and 1.15.
static void test_polar_diagonal(int rows, int cols, int steps, Matmul* mm) {
    MuonRule rule = test_polar_rule();
    rule.steps = steps;
    int k = rows < cols ? rows : cols;
    size_t n = (size_t)rows * cols;
    double *g = test_doubles(n), *want = test_doubles(n), norm = 0;
    for (int i = 0; i < k; i++) {
        double s = (float)pow(0.003, (double)i / (k - 1)) * (i % 2 ? -1 : 1);
        g[(size_t)i * cols + i] = s;
        norm += s * s;
    }
    for (int i = 0; i < k; i++) {
        double s = g[(size_t)i * cols + i] / (1.02 * sqrt(norm) + 1e-6);
        for (int step = 0; step < steps; step++) {
            const double* abc = POLAR_COEFFICIENTS[step < 5 ? step : 4];
            s = abc[0] * s + abc[1] * pow(s, 3) + abc[2] * pow(s, 5);
        }
        want[(size_t)i * cols + i] = s;
    }
    double *o = test_ns_run(g, 1, rows, cols, &rule, mm), worst = 0;
    bool range = true;
    for (size_t i = 0; i < n; i++) {
        double d = fabs(o[i] - want[i]);
        if (!(d <= worst)) worst = d;
        if (fabs(g[i]) > 0.002 * sqrt(norm)) range &= fabs(o[i]) > 0.84 && fabs(o[i]) < 1.16;
    }
    char name[96];
    snprintf(name, sizeof name, "polar diagonal %dx%d, %d steps", rows, cols, steps);
    // five roundings a step, of which each at most doubles the relative error so far
    test_check(name, worst, 5 * steps * 8 * TEST_EPS);
    if (steps >= 5) test_true("polar singular values come near 1", range);
    free(g), free(want), free(o);
}

static void test_polar_golden(const char* shape, int count, int rows, int cols, Matmul* mm) {
    MuonRule rule = test_polar_rule();
    size_t n = (size_t)count * rows * cols;
    SafeFile file;
    safetensors_open(&file, "test/golden/units/polar_express.safetensors");
    char prefix[32], name[96];
    snprintf(prefix, sizeof prefix, "%s.", shape);
    double *g = test_golden_array(&file, prefix, "G", n);
    double *want = test_golden_array(&file, prefix, "f32", n);
    double* o = test_ns_run(g, count, rows, cols, &rule, mm);
    bool zero = strstr(shape, "zero"), lowrank = strstr(shape, "lowrank");
    double tol = test_normuon_tolerance(FLOATX_IS_BF16, (size_t)rows * cols);
    snprintf(name, sizeof name, "polar golden %s", shape);
    if (zero) {
        bool right = true;
        for (size_t i = 0; i < n; i++) right &= o[i] == 0 && want[i] == 0;
        test_true(name, right);
    } else if (!FLOATX_IS_BF16) {
        test_rms(name, o, want, n, lowrank ? 2e-4 : tol, lowrank ? 2e-3 : 10 * tol);
    } else if (!lowrank) {
        test_rms(name, o, want, n, tol, 10 * tol);
        double* fused = test_golden_array(&file, prefix, "bf16_fused", n);
        snprintf(name, sizeof name, "polar golden %s bf16_fused", shape);
        test_rms(name, o, fused, n, tol, 10 * tol);
        free(fused);
    }
    free(g), free(want), free(o);
    safetensors_close(&file);
}

// ---- the update -----------------------------------------------------------------------------

// Without a second moment it is put together here.
static void test_normuon_oracle(double* p, double* m, double* second, const double* g, int rows,
                                int cols, double lr, double scale, const MuonRule* rule) {
    OracleNorMuon a = {};
    a.lr = lr, a.factor = scale, a.momentum = rule->momentum, a.beta2 = rule->beta2;
    a.decay = rule->cautious_decay, a.by_row = rule->second_by_row;
    if (rule->beta2 != 0) {
        oracle_normuon_update(p, m, second, g, rows, cols, &a);
        return;
    }
    size_t n = (size_t)rows * cols;
    double* o = test_doubles(n);
    oracle_muon_momentum(o, m, g, n, rule->momentum,
                         rule->form == MUON_FORM_SUM ? ORACLE_MOMENTUM_SUM : ORACLE_MOMENTUM_EMA);
    if (rule->polar) oracle_polar_express(o, o, rows, cols);
    else oracle_newton_schulz(o, o, rows, cols, 5, 3.4445, -4.7750, 2.0315, 1e-7);
    for (size_t i = 0; i < n; i++) {
        if (o[i] * p[i] >= 0) o[i] += a.decay * lr * p[i];
        p[i] -= lr * scale * o[i];
    }
    free(o);
}

// Updates against updates. flip: how far an element may be off whose decay was decided otherwise.
static void test_normuon_compare(const char* name, const double* got, const double* want, size_t n,
                                 double rms_tol, double flip) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += want[i] * want[i];
    test_rms(name, got, want, n, rms_tol, 10 * rms_tol + flip / sqrt(sum / n));
}

// v is a mean of squares: the error of O counts twice where few elements are in it.
static void test_normuon_seconds(const char* name, const double* got, const double* want, size_t n,
                                 double rms_tol) {
    if (n) test_rms(name, got, want, n, 2 * rms_tol, 10 * rms_tol);
}

// Gradients of a bank. Columns and rows differ in size, so that a statistic of the others is
// another one. At step 0 the first matrix has none, the last one none in column and row 1: their v
// stays 0, and the roots of it are limited.
static void test_normuon_gradients(double* g, int count, int rows, int cols, int step) {
    size_t n = (size_t)rows * cols;
    test_fill_normal_float(g, count * n, 10 + step, 1e-3);
    for (size_t i = 0; i < count * n; i++) {
        size_t row = i % n / cols, col = i % n % cols;
        g[i] = (float)(g[i] * (1 + col % 5) * (1 + row % 3));
        bool nothing = i / n == 0 || (i / n == (size_t)count - 1 && (row == 1 || col == 1));
        if (step == 0 && nothing) g[i] = 0;
    }
}

// Three steps of a bank against the oracle, then zeros, then a NaN.
static void test_normuon_case(int count, int rows, int cols, const MuonRule* rule, bool gaps,
                              bool use_master, Matmul* mm) {
    const double u = 0x1p-24;
    const float lr = 0.02f;
    size_t n = (size_t)rows * cols, all = count * n;
    double tol = test_normuon_tolerance(FLOATX_IS_BF16, n);
    double *p = test_doubles(all), *g = test_doubles(all), *m = test_doubles(all),
           *start = test_doubles(all), *update = test_doubles(all);
    float* scale = test_floats(count);
    test_fill_normal_float(p, all, 1, 0.03);
    memcpy(start, p, all * sizeof *p);
    for (int i = 0; i < count; i++) scale[i] = 1 + i % 3;
    TestMuon t;
    test_muon_layout(&t, rule, count, rows, cols, gaps);
    test_muon_start(&t, p, m, use_master);
    double* second = test_doubles((size_t)count * t.lines);
    for (int step = 0; step < 3; step++) {
        test_normuon_gradients(g, count, rows, cols, step);
        test_muon_step(&t, g, scale, lr, mm);
        for (int i = 0; i < count; i++) {
            test_normuon_oracle(p + i * n, m + i * n, second + (size_t)i * t.lines, g + i * n, rows,
                                cols, lr, scale[i], rule);
        }
    }
    char name[224], what[160];
    snprintf(what, sizeof what, "normuon %dx%d form %d polar %d beta2 %g by_row %d decay %g", rows,
             cols, rule->form, rule->polar, rule->beta2, rule->second_by_row, rule->cautious_decay);
    double *w = test_muon_values(&t), *half = test_muon_weights(&t);
    double* seconds = test_muon_seconds(&t);
    bool copied = true;
    for (size_t i = 0; i < all; i++) {
        copied &= half[i] == test_round(w[i]);
        w[i] -= start[i];
        update[i] = p[i] - start[i];
    }
    test_true("normuon p is the rounded master", copied);
    for (int i = 0; i < count; i++) {
        snprintf(name, sizeof name, "%s, matrix %d of %d", what, i, count);
        double flip = 3 * lr * scale[i] * rule->cautious_decay * lr * 0.15;    // |W| < 5 x 0.03
        test_normuon_compare(name, w + i * n, update + i * n, n, tol, flip);
    }
    snprintf(name, sizeof name, "%s, second moment", what);
    test_normuon_seconds(name, seconds, second, (size_t)count * t.lines, tol);

    // No gradient and no momentum: O is 0, what is left is the decay, and v shrinks.
    double *before = test_muon_values(&t), *zero = test_doubles(all);
    double* rest = test_muon_spread(&t, zero, false);
    test_put_float(t.m, rest, t.own);
    test_muon_step(&t, zero, scale, lr, mm);
    double *after = test_muon_values(&t), *shrunk = test_muon_seconds(&t);
    double worst = 0;
    for (size_t i = 0; i < all; i++) {
        double decay = lr * scale[i / n] * rule->cautious_decay * lr * before[i];
        double allowed = 2 * TEST_EPS * fabs(decay) + 2 * u * fabs(before[i]);
        double err = fabs(after[i] - (before[i] - decay));
        if (!(err <= worst * allowed)) worst = err / allowed;
    }
    snprintf(name, sizeof name, "%s, zero gradient", what);
    test_check(name, worst, 1);
    bool less = true;
    for (int i = 0; i < count * t.lines; i++) {
        less &= fabs(shrunk[i] - rule->beta2 * seconds[i]) <= 4 * u * seconds[i];
    }
    if (t.lines) test_true("normuon second moment of a zero gradient", less);

    // A NaN spoils its own matrix and its own v, no other's.
    double* spoilt = test_doubles(all);
    spoilt[(count - 1) * n + n / 2] = NAN;
    test_muon_step(&t, spoilt, scale, lr, mm);
    double *last = test_muon_values(&t), *v = test_muon_seconds(&t);
    bool right = true;
    for (size_t i = 0; i < all; i++) right &= (last[i] != last[i]) == (i / n == (size_t)count - 1);
    for (int i = 0; i < count * t.lines; i++) {
        right &= (v[i] != v[i]) == (i / t.lines == count - 1);
    }
    test_true("normuon NaN spoils its matrix and no other", right);
    free(p), free(g), free(m), free(start), free(update), free(scale), free(second), free(w),
        free(half), free(seconds), free(before), free(zero), free(rest), free(after), free(shrunk),
        free(spoilt), free(last), free(v);
    test_muon_free(&t);
}

static float test_normuon_round(double x, bool bf16) {
    return bf16 ? test_round_bf16(x) : (float)x;
}

// What follows the iteration, rounding by rounding, from its result o: the share of elements of w
// and v, after the first step, that differ from this by more than float's own roundings. A sum in
// another order may turn a last place; a norm that turned would be seen in a whole matrix. o is
// changed.
static double test_normuon_tail(double* o, const double* p, const double* w, const double* v,
                                int count, int rows, int cols, float lr, const MuonRule* rule,
                                bool bf16, bool bf16_state) {
    const double u = 0x1p-24;
    bool by_row = rule->second_by_row;
    size_t n = (size_t)rows * cols, lines = by_row ? rows : cols, differ = 0;
    double* sum = test_doubles(count * lines);
    float step = bf16_state ? test_round_bf16(lr) : lr, decay = rule->cautious_decay * lr;
    if (bf16_state) decay = test_round_bf16(decay);
    for (int k = 0; k < count; k++) {
        double before = 0, after = 0;
        for (size_t i = k * n; i < (k + 1) * n; i++) {
            size_t line = k * lines + (by_row ? i % n / cols : i % n % cols);
            sum[line] += test_normuon_round(o[i] * o[i], bf16);
            before += o[i] * o[i];
        }
        for (size_t i = k * n; i < (k + 1) * n; i++) {
            size_t line = k * lines + (by_row ? i % n / cols : i % n % cols);
            double second = test_normuon_round(sum[line] / (by_row ? cols : rows), bf16);
            second = test_normuon_round((1.0f - rule->beta2) * second, bf16_state);
            differ += !(fabs(second - v[line]) <= 8 * u * second);
            double factor = test_normuon_round(1 / sqrt(fmax(second, 1e-10)), bf16_state);
            o[i] = test_normuon_round(o[i] * factor, bf16);
            after += o[i] * o[i];
        }
        before = test_normuon_round(sqrt(before), bf16);
        after = test_normuon_round(sqrt(after), bf16);
        double ratio = test_normuon_round(before / after, bf16);
        for (size_t i = k * n; i < (k + 1) * n; i++) {
            double want = test_normuon_round(o[i] * ratio, bf16);
            if (want * p[i] >= 0) want = test_normuon_round(want + decay * p[i], bf16);
            want = test_normuon_round(p[i] - step * want, bf16_state);
            double allowed = 64 * u * lr * fabs(o[i] * ratio) + 2 * u * fabs(p[i]);
            differ += !(fabs(w[i] - want) <= allowed);
        }
    }
    free(sum);
    return (double)differ / (count * n);
}

// Matrices of different rank: their norms lie anywhere between two bf16 values.
static void test_normuon_ranked(double* g, int count, int rows, int cols) {
    size_t n = (size_t)rows * cols;
    test_fill_normal_float(g, count * n, 2, 1);
    int most = rows < cols ? rows : cols;
    for (size_t i = 0; i < count * n; i++) {
        int row = i % n / cols, col = i % n % cols, rank = 1 + (int)(i / n) % most;
        if (row > rank || col > 2 * rank) g[i] = 0;
    }
}

static void test_normuon_rounding(int count, int rows, int cols, bool by_row, Matmul* mm) {
    const float lr = 0.02f;
    size_t all = (size_t)count * rows * cols;
    MuonRule rule = test_normuon_rule(by_row, 30);
    rule.form = MUON_FORM_NONE;
    double *p = test_doubles(all), *g = test_doubles(all), *zero = test_doubles(all);
    test_fill_normal_float(p, all, 1, 0.03);
    test_normuon_ranked(g, count, rows, cols);
    double* o = test_ns_run(g, count, rows, cols, &rule, mm);
    float scale[TEST_MUON_MOST];
    for (int i = 0; i < count; i++) scale[i] = 1;
    TestMuon t;
    test_muon_layout(&t, &rule, count, rows, cols, false);
    test_muon_start(&t, p, zero, true);
    test_muon_step(&t, g, scale, lr, mm);
    double *w = test_muon_values(&t), *v = test_muon_seconds(&t);
    char name[96];
    snprintf(name, sizeof name, "normuon rounding by rounding, %d of %dx%d by_row %d", count, rows,
             cols, by_row);
    test_check(name, test_normuon_tail(o, p, w, v, count, rows, cols, lr, &rule, FLOATX_IS_BF16,
                                       false), 0.01);
    free(p), free(g), free(zero), free(o), free(w), free(v);
    test_muon_free(&t);
}

// `arrays` arrays of n values, which the golden file numbers, one behind the other.
static double* test_normuon_arrays(const SafeFile* file, const char* group, const char* name,
                                   int arrays, size_t n) {
    double* x = test_doubles(arrays * n);
    for (int i = 0; i < arrays; i++) {
        char prefix[64];
        snprintf(prefix, sizeof prefix, "%s%d.", group, i);
        double* part = test_golden_array(file, prefix, name, n);
        memcpy(x + i * n, part, n * sizeof *x);
        free(part);
    }
    return x;
}

// Each of `count` matrices (rows, cols) turned into (cols, rows).
static void test_normuon_transpose(double* x, int count, int rows, int cols) {
    size_t n = (size_t)rows * cols;
    double* y = test_doubles(n);
    for (int i = 0; i < count; i++) {
        for (size_t e = 0; e < n; e++) y[e % cols * rows + e / cols] = x[i * n + e];
        memcpy(x + i * n, y, n * sizeof *y);
    }
    free(y);
}

static const float TEST_NORMUON_LR[3] = {0.03f, 0.021f, 0.003f};
static const float TEST_NORMUON_MOMENTUM[3] = {0.85f, 0.9f, 0.95f};

// Three steps of the published class on eight matrices of 12x12 (attn) or two of 12x48 (mlp), the
// first of the two with twice the step; at step 1 the first half of attn has no gradient.
// transposed: stored the other way round, and the second moment by row.
static void test_normuon_golden(const char* group, bool transposed, Matmul* mm) {
    const double u = 0x1p-24;
    bool mlp = !strcmp(group, "mlp");
    int count = mlp ? 2 : 8, rows = 12, cols = mlp ? 48 : 12;
    size_t n = (size_t)rows * cols, all = count * n;
    double tol = !FLOATX_IS_BF16 ? 5e-5 : transposed && !mlp ? 6e-2 : 1.5e-2;
    SafeFile file;
    safetensors_open(&file, "test/golden/units/normuon.safetensors");
    char name[64], prefix[64], what[160];
    double *start = test_normuon_arrays(&file, group, "p0", 2, all / 2), *zero = test_doubles(all);
    if (transposed) test_normuon_transpose(start, count, rows, cols);
    float scale[8];
    for (int i = 0; i < count; i++) scale[i] = mlp && i == 0 ? 2 : 1;
    MuonRule rule = test_normuon_rule(transposed, 1.2f);
    TestMuon t;
    test_muon_layout(&t, &rule, count, transposed ? cols : rows, transposed ? rows : cols, false);
    test_muon_start(&t, start, zero, true);
    for (int step = 0; step < 3; step++) {
        snprintf(name, sizeof name, "g%d", step);
        double* g = test_normuon_arrays(&file, group, name, 2, all / 2);
        if (transposed) test_normuon_transpose(g, count, rows, cols);
        t.rule.momentum = TEST_NORMUON_MOMENTUM[step];
        test_muon_step(&t, g, scale, TEST_NORMUON_LR[step], mm);

        snprintf(prefix, sizeof prefix, "%s.%s.step%d.", FLOATX_IS_BF16 ? "bf16" : "f32", group,
                 step);
        double* want[3] = {test_golden_array(&file, prefix, "p_new", all),
                           test_golden_array(&file, prefix, "momentum", all),
                           test_golden_array(&file, prefix, "second", (size_t)count * cols)};
        double* got[3] = {test_muon_values(&t), test_muon_momenta(&t), test_muon_seconds(&t)};
        for (int k = 0; k < 2 && transposed; k++) {
            test_normuon_transpose(got[k], count, cols, rows);
        }
        if (transposed) test_normuon_transpose(start, count, cols, rows);
        for (size_t i = 0; i < all; i++) want[0][i] -= start[i], got[0][i] -= start[i];
        if (transposed) test_normuon_transpose(start, count, rows, cols);
        for (int i = 0; i < 2; i++) {
            snprintf(what, sizeof what, "normuon golden %s%d transposed %d step %d", group, i,
                     transposed, step);
            double flip = 2 * 0.03 * 1.2 * 0.03;    // |W| < 1
            test_normuon_compare(what, got[0] + i * all / 2, want[0] + i * all / 2, all / 2, tol,
                                 flip);
        }
        double largest = 0;
        for (size_t i = 0; i < all; i++) {
            if (fabs(want[1][i]) > largest) largest = fabs(want[1][i]);
        }
        snprintf(what, sizeof what, "normuon golden %s momentum, step %d", group, step);
        test_compare_double(what, got[1], want[1], all, 16 * u * largest, 16 * u);
        snprintf(what, sizeof what, "normuon golden %s second moment, step %d", group, step);
        test_normuon_seconds(what, got[2], want[2], (size_t)count * cols, tol);
        for (int k = 0; k < 3; k++) free(want[k]), free(got[k]);
        free(g);
    }
    free(start), free(zero);
    test_muon_free(&t);
    safetensors_close(&file);
}

// ---- gates ----------------------------------------------------------------------------------

typedef struct {
    MuonRule rule;
    float *p, *m, *second, *g;
    int count, rows, cols, lines;
    size_t n, stride, bank;
    bool bf16_state;
    const float* guard;
} TestGate;

static float* test_gate_spread(const TestGate* t, const double* x) {
    double* y = test_doubles(t->bank);
    for (size_t i = 0; i < t->bank; i++) y[i] = NAN;
    for (int i = 0; i < t->count; i++) memcpy(y + i * t->stride, x + i * t->n, t->n * sizeof *y);
    float* d = test_upload_float(y, t->bank);
    free(y);
    return d;
}

static void test_gate_start(TestGate* t, const MuonRule* rule, const double* p, int count, int rows,
                            int cols, bool gaps, bool bf16_state) {
    memset(t, 0, sizeof *t);
    t->rule = *rule;
    t->count = count, t->rows = rows, t->cols = cols, t->bf16_state = bf16_state;
    t->lines = rule->beta2 == 0 ? 0 : rule->second_by_row ? rows : cols;
    t->n = (size_t)rows * cols;
    t->stride = gaps ? t->n + 3 : t->n;
    t->bank = count * t->stride;
    double* zero = test_doubles(t->bank);
    t->p = test_gate_spread(t, p);
    t->m = test_gate_spread(t, zero);
    if (t->lines) t->second = test_upload_float(zero, (size_t)count * t->lines);
    free(zero);
}

static void test_gate_step(TestGate* t, const double* g, float lr) {
    float* g_d = test_gate_spread(t, g);
    gate_update(t->p, t->m, t->second, g_d, t->count, t->rows, t->cols, t->stride, lr, &t->rule,
                t->bf16_state, t->guard, 0);
    CUDA_CHECK(cudaDeviceSynchronize());
    cudaFree(g_d);
}

// The matrices of p or m; what lies between them must be NaN still.
static double* test_gate_get(const TestGate* t, const float* d) {
    float* x = test_download_float(d, t->bank);
    double* y = test_doubles(t->count * t->n);
    bool untouched = true;
    for (size_t i = 0; i < t->bank; i++) {
        if (i % t->stride < t->n) y[i / t->stride * t->n + i % t->stride] = x[i];
        else untouched &= x[i] != x[i];
    }
    test_true("gate_update leaves the gaps", untouched);
    free(x);
    return y;
}

static double* test_gate_seconds(const TestGate* t) {
    size_t n = (size_t)t->count * t->lines;
    return t->lines ? test_widen(test_download_float(t->second, n), n) : test_doubles(0);
}

static void test_gate_free(TestGate* t) {
    cudaFree(t->p), cudaFree(t->m), cudaFree(t->second), cudaFree(t->g);
}

// Three steps against the oracle, and the same with zeros and a NaN behind them.
static void test_gate_case(int count, int rows, int cols, const MuonRule* rule, bool bf16_state) {
    const float lr = 0.1f;    // large, so that in bf16 the rounding of p is small beside an update
    size_t n = (size_t)rows * cols, all = count * n;
    double tol = test_normuon_tolerance(FLOATX_IS_BF16 || bf16_state, n);
    double *p = test_doubles(all), *g = test_doubles(all), *m = test_doubles(all),
           *start = test_doubles(all);
    test_fill_normal_float(p, all, 1, 0.02);
    for (size_t i = 0; i < all && bf16_state; i++) p[i] = test_round_bf16(p[i]);
    memcpy(start, p, all * sizeof *p);
    TestGate t;
    test_gate_start(&t, rule, p, count, rows, cols, true, bf16_state);
    double* second = test_doubles((size_t)count * t.lines);
    for (int step = 0; step < 3; step++) {
        test_normuon_gradients(g, count, rows, cols, step);
        test_gate_step(&t, g, lr);
        for (int i = 0; i < count; i++) {
            test_normuon_oracle(p + i * n, m + i * n, second + (size_t)i * t.lines, g + i * n, rows,
                                cols, lr, 1, rule);
        }
    }
    char what[160], name[224];
    snprintf(what, sizeof what, "gate %dx%d form %d polar %d beta2 %g by_row %d decay %g bf16 %d",
             rows, cols, rule->form, rule->polar, rule->beta2, rule->second_by_row,
             rule->cautious_decay, bf16_state);
    double *w = test_gate_get(&t, t.p), *momenta = test_gate_get(&t, t.m);
    double* seconds = test_gate_seconds(&t);
    bool representable = true;
    for (size_t i = 0; i < all && bf16_state; i++) {
        representable &= w[i] == test_round_bf16(w[i]) && momenta[i] == test_round_bf16(momenta[i]);
    }
    for (int i = 0; i < count * t.lines && bf16_state; i++) {
        representable &= seconds[i] == test_round_bf16(seconds[i]);
    }
    test_true("gate_update bf16_state stores bf16 values", representable);
    double* update = test_doubles(all);
    for (size_t i = 0; i < all; i++) update[i] = p[i] - start[i], w[i] -= start[i];
    for (int i = 0; i < count; i++) {
        snprintf(name, sizeof name, "%s, matrix %d of %d", what, i, count);
        double flip = 3 * lr * rule->cautious_decay * lr * 0.1;    // |W| < 5 x 0.02
        test_normuon_compare(name, w + i * n, update + i * n, n, tol, flip);
    }
    snprintf(name, sizeof name, "%s, momentum", what);
    test_rms(name, momenta, m, all, bf16_state ? 1e-2 : 1e-6, bf16_state ? 0.1 : 1e-5);
    snprintf(name, sizeof name, "%s, second moment", what);
    test_normuon_seconds(name, seconds, second, (size_t)count * t.lines, tol);
    free(p), free(g), free(m), free(start), free(second), free(w), free(momenta), free(seconds),
        free(update);
    test_gate_free(&t);
}

// The same for gates: a step of 1 from zero weights without a second moment is -O.
static void test_gate_rounding(int count, int rows, int cols, bool by_row, bool bf16_state) {
    const float lr = 0.3f;
    size_t all = (size_t)count * rows * cols;
    bool bf16 = FLOATX_IS_BF16 || bf16_state;
    MuonRule rule = test_normuon_rule(by_row, 1.2f), direction = test_polar_rule();
    rule.form = MUON_FORM_NONE;
    double *p = test_doubles(all), *g = test_doubles(all), *zero = test_doubles(all);
    test_fill_normal_float(p, all, 1, 0.2);
    for (size_t i = 0; i < all && bf16_state; i++) p[i] = test_round_bf16(p[i]);
    test_normuon_ranked(g, count, rows, cols);
    TestGate t;
    test_gate_start(&t, &direction, zero, count, rows, cols, false, bf16_state);
    test_gate_step(&t, g, 1);
    double* o = test_gate_get(&t, t.p);
    for (size_t i = 0; i < all; i++) o[i] = -o[i];
    test_gate_free(&t);
    test_gate_start(&t, &rule, p, count, rows, cols, false, bf16_state);
    test_gate_step(&t, g, lr);
    double *w = test_gate_get(&t, t.p), *v = test_gate_seconds(&t);
    char name[96];
    snprintf(name, sizeof name, "gate_update rounding by rounding, %dx%d by_row %d bf16 %d", rows,
             cols, by_row, bf16_state);
    test_check(name, test_normuon_tail(o, p, w, v, count, rows, cols, lr, &rule, bf16, bf16_state),
               0.01);
    free(p), free(g), free(zero), free(o), free(w), free(v);
    test_gate_free(&t);
}

// Without momentum a zero gradient leaves the decay. A NaN spoils its own matrix and no other.
static void test_gate_zero(bool bf16_state) {
    enum { COUNT = 3, ROWS = 6, COLS = 12, N = ROWS * COLS };
    // lr 1.5 lr is nearly 1: so little is left of a weight that the rounding of both shows
    const float lr = 0.818f;
    MuonRule rule = test_normuon_rule(false, 1.5f);
    double p[COUNT * N], g[COUNT * N] = {0};
    test_fill_normal_float(p, COUNT * N, 1, 0.5);
    for (int i = 0; i < COUNT * N; i++) p[i] = test_round_bf16(p[i]);
    TestGate t;
    test_gate_start(&t, &rule, p, COUNT, ROWS, COLS, true, bf16_state);
    test_gate_step(&t, g, lr);
    double *w = test_gate_get(&t, t.p), worst = 0;
    for (int i = 0; i < COUNT * N; i++) {
        double step = bf16_state ? test_round_bf16(lr) : lr;
        double decay = bf16_state ? test_round_bf16(1.5f * lr) : 1.5f * lr, o = decay * p[i];
        if (FLOATX_IS_BF16 || bf16_state) o = test_round_bf16(o);
        double want = p[i] - step * o, err = fabs(w[i] - want);
        double allowed = 0x1p-22 * fabs(p[i]) + (bf16_state ? 0x1p-8 * fabs(want) : 0);
        if (!(err <= worst * allowed)) worst = err / allowed;
    }
    test_check("gate_update zero gradient", worst, 1);
    g[N + 5] = NAN;
    test_gate_step(&t, g, lr);
    double *last = test_gate_get(&t, t.p), *v = test_gate_seconds(&t);
    bool right = true;
    for (int i = 0; i < COUNT * N; i++) right &= (last[i] != last[i]) == (i / N == 1);
    for (int i = 0; i < COUNT * COLS; i++) right &= (v[i] != v[i]) == (i / COLS == 1);
    test_true("gate_update NaN spoils its matrix and no other", right);
    free(w), free(last), free(v);
    test_gate_free(&t);
}

// A step of 1 from zero weights is -O.
static void test_gate_polar_golden(const char* shape, int rows, int cols, bool bf16_state) {
    size_t n = (size_t)rows * cols;
    bool bf16 = FLOATX_IS_BF16 || bf16_state;
    SafeFile file;
    safetensors_open(&file, "test/golden/units/polar_express.safetensors");
    char prefix[32], name[96];
    snprintf(prefix, sizeof prefix, "%s.", shape);
    double *g = test_golden_array(&file, prefix, "G", n), *zero = test_doubles(n);
    double* want = test_golden_array(&file, prefix, bf16 ? "bf16_fused" : "f32", n);
    MuonRule rule = test_polar_rule();
    TestGate t;
    test_gate_start(&t, &rule, zero, 1, rows, cols, false, false);
    t.bf16_state = bf16_state;
    test_gate_step(&t, g, 1);
    double* o = test_gate_get(&t, t.p);
    for (size_t i = 0; i < n; i++) o[i] = -o[i];
    snprintf(name, sizeof name, "gate_update polar golden %s bf16 %d", shape, bf16_state);
    test_rms(name, o, want, n, bf16 ? 1.5e-2 : 5e-5, bf16 ? 0.15 : 5e-4);
    free(g), free(zero), free(want), free(o);
    test_gate_free(&t);
    safetensors_close(&file);
}

// Three steps of the published class. bf16_state: gates that are bf16 parameters, each step from
// the golden state. All roundings are the same but one: the files round √v and then its inverse. A
// last place of it turns the last place of a weight here and there. A u that lies half way between
// two values, as with momenta like 0.85 some do, falls to either side with or without a fused
// multiplication; that grows in the iteration, in the worst matrix here to 7 % of v.
static void test_gate_golden(const char* group, int count, int rows, bool bf16_state) {
    const int cols = 12;
    size_t n = (size_t)rows * cols, all = count * n, lines = (size_t)count * cols, differ = 0;
    SafeFile file;
    safetensors_open(&file, "test/golden/units/normuon.safetensors");
    char name[64], prefix[64], what[160];
    double* start = test_normuon_arrays(&file, group, "p0", count, n);
    for (size_t i = 0; i < all && bf16_state; i++) start[i] = test_round_bf16(start[i]);
    MuonRule rule = test_normuon_rule(false, 1.2f);
    TestGate t;
    test_gate_start(&t, &rule, start, count, rows, cols, false, bf16_state);
    for (int step = 0; step < 3; step++) {
        snprintf(name, sizeof name, "g%d", step);
        double* g = test_normuon_arrays(&file, group, name, count, n);
        t.rule.momentum = TEST_NORMUON_MOMENTUM[step];
        test_gate_step(&t, g, TEST_NORMUON_LR[step]);
        snprintf(prefix, sizeof prefix, "%s.%s.step%d.", bf16_state ? "bf16" : "f32", group, step);
        double* want[3] = {test_golden_array(&file, prefix, "p_new", all),
                           test_golden_array(&file, prefix, "momentum", all),
                           test_golden_array(&file, prefix, "second", lines)};
        double* got[3] = {test_gate_get(&t, t.p), test_gate_get(&t, t.m), test_gate_seconds(&t)};
        snprintf(what, sizeof what, "gate_update golden %s bf16 %d step %d", group, bf16_state,
                 step);
        if (bf16_state) {
            double worst = 0, update = 0;
            for (size_t i = 0; i < all; i++) update += pow(want[0][i] - start[i], 2) / all;
            for (size_t i = 0; i < all; i++) {
                double err = fabs(got[0][i] - want[0][i]);
                double allowed = 0x1p-7 * fabs(want[0][i]) + 0.2 * sqrt(update);
                if (!(err <= worst * allowed)) worst = err / allowed;
                differ += got[0][i] != want[0][i];
            }
            test_check(what, worst, 1);
        } else {
            for (size_t i = 0; i < all; i++) got[0][i] -= start[i], want[0][i] -= start[i];
            test_normuon_compare(what, got[0], want[0], all, 5e-5, 2 * 0.03 * 1.2 * 0.03);
            for (size_t i = 0; i < all; i++) want[0][i] += start[i];
        }
        snprintf(what, sizeof what, "gate_update golden %s bf16 %d momentum, step %d", group,
                 bf16_state, step);
        test_rms(what, got[1], want[1], all, bf16_state ? 1e-3 : 1e-6, bf16_state ? 0x1p-6 : 1e-5);
        snprintf(what, sizeof what, "gate_update golden %s bf16 %d second moment, step %d", group,
                 bf16_state, step);
        test_normuon_seconds(what, got[2], want[2], lines, bf16_state ? 5e-2 : 5e-5);
        if (bf16_state) {
            memcpy(start, want[0], all * sizeof *start);
            test_put_float(t.p, want[0], all);
            test_put_float(t.m, want[1], all);
            test_put_float(t.second, want[2], lines);
        }
        for (int k = 0; k < 3; k++) free(want[k]), free(got[k]);
        free(g);
    }
    snprintf(what, sizeof what, "gate_update golden %s, weights that differ", group);
    if (bf16_state) test_check(what, (double)differ / (3 * all), 0.25);
    free(start);
    test_gate_free(&t);
    safetensors_close(&file);
}

// As test_muon_guard, for gates.
static void test_gate_guard(int count, int rows, int cols, const MuonRule* rule, bool bf16_state) {
    size_t n = (size_t)rows * cols, all = count * n;
    double *p = test_doubles(all), *g = test_doubles(all), values[2] = {0, 1};
    for (size_t i = 0; i < all; i++) {
        p[i] = test_round_bf16(0.03 * test_normal(1, i));
        g[i] = test_round_bf16(1e-3 * test_normal(2, i));
    }
    float* guard = test_upload_float(values, 2);
    TestGate t;
    test_gate_start(&t, rule, p, count, rows, cols, true, bf16_state);
    test_gate_step(&t, g, 0.02f);    // a second moment that is not 0
    TestBits before = {}, after = {};
    void* of[3] = {t.p, t.m, t.second};
    size_t bytes[3] = {t.bank * sizeof(float), t.bank * sizeof(float),
                       (size_t)count * t.lines * sizeof(float)};
    for (int k = 0; k < 3; k++) test_bits_add(&before, of[k], bytes[k]);
    char name[128];
    snprintf(name, sizeof name, "gate_update guard %dx%d form %d beta2 %g by_row %d bf16 %d", rows,
             cols, rule->form, rule->beta2, rule->second_by_row, bf16_state);
    t.guard = guard + 1;
    test_gate_step(&t, g, 0.02f);
    test_true(name, test_bits_same(&before));
    double was = g[n - 1];
    g[n - 1] = NAN;
    test_gate_step(&t, g, 0.02f);
    test_true(name, test_bits_same(&before));
    g[n - 1] = was;
    t.guard = guard;
    test_gate_step(&t, g, 0.02f);
    test_true("gate_update where the guard is clear", !test_bits_same(&before));
    for (int k = 0; k < 3; k++) test_bits_add(&after, of[k], bytes[k]);
    test_bits_restore(&before);
    t.guard = NULL;
    test_gate_step(&t, g, 0.02f);
    test_true("gate_update without a guard is as with a clear one", test_bits_same(&after));
    test_bits_free(&before), test_bits_free(&after);
    free(p), free(g);
    cudaFree(guard);
    test_gate_free(&t);
}

static void test_guards(Matmul* mm) {
    const MuonForm forms[3] = {MUON_FORM_SUM, MUON_FORM_LERP, MUON_FORM_NONE};
    for (int k = 0; k < 9; k++) {    // each form, without and with a second moment of each kind
        bool master = FLOATX_IS_BF16 || k % 2;
        MuonRule rule = test_normuon_rule(k / 3 == 2, k % 2 ? 60 : 0);
        rule.form = forms[k % 3], rule.polar = k % 2;
        if (k < 3) rule.beta2 = 0;
        test_muon_guard(&rule, 3, 16, 24, master, mm);
        if (k == 4) test_muon_guard(&rule, 17, 12, 10, master, mm);    // two slices
        test_gate_guard(2, 6, 12, &rule, false);
        test_gate_guard(2, 6, 12, &rule, true);
    }
    MuonRule tall = test_normuon_rule(true, 60);
    test_gate_guard(2, 16, 12, &tall, false);
}

static void test_normuon_scratch(void) {
    MuonRule plain = test_muon_rule(MUON_FORM_LERP, 0.9f), full = test_normuon_rule(false, 1.2f);
    size_t small = muon_scratch_bytes(MUON_SLICE, 768, 768, &full);
    size_t large = muon_scratch_bytes(1000, 768, 768, &full);
    size_t without = muon_scratch_bytes(MUON_SLICE, 768, 768, &plain);
    test_true("normuon scratch does not grow with the bank", large <= small);
    test_true("normuon scratch is 2 % more at most", without < small && small < 1.02 * without);
    plain.cautious_decay = 1.2f, plain.polar = true;
    test_true("no scratch for polar and decay",
              muon_scratch_bytes(MUON_SLICE, 768, 768, &plain) == without);
}

static void test_normuon(void) {
    static Matmul mm;
    matmul_init(&mm, 0);
    test_polar_case(3, 64, 64, &mm);
    test_polar_case(3, 40, 136, &mm);
    test_polar_case(3, 136, 40, &mm);
    test_polar_case(19, 16, 24, &mm);    // two slices of 10 and 9
    test_polar_diagonal(16, 24, 5, &mm);
    test_polar_diagonal(72, 48, 5, &mm);
    test_polar_diagonal(16, 24, 3, &mm);
    test_polar_diagonal(16, 24, 7, &mm);
    test_polar_golden("6x12", 1, 6, 12, &mm);
    test_polar_golden("64x64", 1, 64, 64, &mm);
    test_polar_golden("48x192", 1, 48, 192, &mm);
    test_polar_golden("192x48", 1, 192, 48, &mm);
    test_polar_golden("4x32x32", 4, 32, 32, &mm);
    test_polar_golden("lowrank40x96", 1, 40, 96, &mm);
    test_polar_golden("zero8x16", 1, 8, 16, &mm);

    for (int by_row = 0; by_row < 2; by_row++) {
        // with a decay that is a fifth of the update
        MuonRule rule = test_normuon_rule(by_row, 60);
        for (int master = FLOATX_IS_BF16 ? 1 : 0; master < 2; master++) {
            test_normuon_case(2, 48, 64, &rule, false, master, &mm);
            test_normuon_case(2, 64, 48, &rule, true, master, &mm);
            test_normuon_case(17, 16, 24, &rule, true, master, &mm);    // two slices
        }
        test_normuon_case(3, 12, 12, &rule, true, true, &mm);     // rows that are no chunks of 8
        test_normuon_case(2, 200, 36, &rule, true, true, &mm);    // nor blocks of columns
        test_normuon_case(2, 200, 24, &rule, true, true, &mm);    // four tiles, the last not full
        test_normuon_case(2, 40, 264, &rule, true, true, &mm);    // three blocks of columns
    }
    // each of them alone
    MuonRule polar = test_muon_rule(MUON_FORM_SUM, 0.9f);
    MuonRule decay = test_muon_rule(MUON_FORM_LERP, 0.9f);
    polar.polar = true, decay.cautious_decay = 60;
    test_normuon_case(2, 48, 64, &polar, true, true, &mm);
    test_normuon_case(2, 64, 48, &decay, true, true, &mm);
    if (!FLOATX_IS_BF16) test_normuon_case(2, 64, 48, &decay, true, false, &mm);
    for (int by_row = 0; by_row < 2; by_row++) {
        MuonRule rule = test_normuon_rule(by_row, 60);
        test_muon_ranks(&rule, 18, 16, 24, true, &mm);    // slices of 9, 8 and 10
        test_muon_ranks(&rule, 5, 200, 72, true, &mm);
        if (!FLOATX_IS_BF16) test_muon_ranks(&rule, 5, 48, 64, false, &mm);
        test_muon_repeat(&rule, &mm);
        test_normuon_rounding(16, 24, 32, by_row, &mm);
        test_normuon_rounding(16, 44, 14, by_row, &mm);
    }
    test_guards(&mm);
    test_normuon_scratch();
    test_normuon_golden("attn", false, &mm);
    test_normuon_golden("attn", true, &mm);
    test_normuon_golden("mlp", false, &mm);
    test_normuon_golden("mlp", true, &mm);
    for (int by_row = 0; by_row < 2; by_row++) {
        MuonRule rule = test_normuon_rule(by_row, 60);
        rule.cautious_decay = 12;
        for (int bf16_state = 0; bf16_state < 2; bf16_state++) {
            test_gate_case(3, 6, 12, &rule, bf16_state);
            test_gate_case(3, 1, 12, &rule, bf16_state);
            test_gate_case(3, 16, 12, &rule, bf16_state);
            test_gate_case(3, 64, 12, &rule, bf16_state);
            test_gate_case(2, 64, 64, &rule, bf16_state);
            test_gate_case(2, 5, 3, &rule, bf16_state);
            test_gate_rounding(16, 6, 12, by_row, bf16_state);
            test_gate_rounding(16, 20, 12, by_row, bf16_state);
        }
    }
    test_gate_case(2, 6, 12, &polar, false);
    test_gate_case(2, 12, 6, &decay, false);
    test_gate_zero(false);
    test_gate_zero(true);
    test_gate_polar_golden("1x12", 1, 12, true);
    test_gate_polar_golden("6x12", 6, 12, true);
    if (!FLOATX_IS_BF16) {
        test_gate_polar_golden("1x12", 1, 12, false);
        test_gate_polar_golden("6x12", 6, 12, false);
        test_gate_golden("attn_gate", 2, 3, false);
        test_gate_golden("smear_gate", 1, 1, false);
    }
    test_gate_golden("attn_gate", 2, 3, true);
    test_gate_golden("smear_gate", 1, 1, true);
    matmul_free(&mm);
}
