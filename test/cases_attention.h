/*
attention: llmc/attention.cuh against oracle.h and golden files.

Every element has its own bound, from the errors that the kernels' roundings may cause, first
order, with u = 2^-24 and e the rounding of floatX (inputs are rounded before, and carry none):

    score         u (2 √D + 8) scale Σ|q k|: a sum of D products, taken as a random walk
    p             η = error of its score + 2 u (|score| + |lse|) + 4e-7 (exp2), relative; e more
                  where p is rounded to be multiplied
    out           Σ p (2 η + e) |v|, and (e + 16 u) |out| for the sum, its division and the store
    lse           η + 4 u |lse|
    delta         Σ|dout| error(out), and 16 u Σ|dout out|
    dp            u (2 √D + 4) Σ|dout v|
    ds            |ds| (e + 2 η) + p (error(dp) + error(delta))
    dv, dq, dk    the sums of p and ds with these errors, and (e + 4 u √T) of the sum of magnitudes
*/
#pragma once
#include "../llmc/attention.cuh"
#include "../llmc/safetensors.h"
#include "oracle.h"
#include "test.h"

typedef struct {
    int B, T, H, D;
    double scale;
} AttentionCase;

// All tensors are (B, T, H, D) here; lse is (B, H, T).
typedef struct {
    double *out, *lse, *dq, *dk, *dv;
} AttentionResult;

static AttentionResult test_attention_alloc(const AttentionCase* k) {
    size_t rows = (size_t)k->B * k->T * k->H, n = rows * k->D;
    AttentionResult r = {test_doubles(n), test_doubles(rows), test_doubles(n), test_doubles(n),
                         test_doubles(n)};
    return r;
}

static void test_attention_free(AttentionResult* r) {
    free(r->out), free(r->lse), free(r->dq), free(r->dk), free(r->dv);
}

static double test_attention_dot(const double* x, const double* y, int D, bool magnitudes) {
    double sum = 0;
    for (int d = 0; d < D; d++) sum += magnitudes ? fabs(x[d] * y[d]) : x[d] * y[d];
    return sum;
}

// What each element of the result may be off by; see the head of the file.
static AttentionResult test_attention_bounds(const AttentionCase* c, const AttentionResult* want,
                                             const double* q, const double* k, const double* v,
                                             const double* dout) {
    const double u = 0x1p-24, e = FLOATX_IS_BF16 ? TEST_EPS : 0;
    const int T = c->T, H = c->H, D = c->D;
    const double walk = u * (2 * sqrt(D) + 8), sum = TEST_EPS + 4 * u * sqrt(T);
    AttentionResult b = test_attention_alloc(c);
    double *p = test_doubles(T), *dp = test_doubles(T), *dp_error = test_doubles(T);
    for (int row = 0; row < c->B * T * H; row++) {
        int h = row % H, t = row / H % T, batch = row / H / T;
        double lse = want->lse[((size_t)batch * H + h) * T + t], eta = 0, delta = 0,
               delta_error = 0;
        size_t at = (size_t)row * D;
        for (int j = 0; j <= t; j++) {
            size_t to = ((size_t)(batch * T + j) * H + h) * D;
            double score = c->scale * test_attention_dot(q + at, k + to, D, false);
            double error = walk * c->scale * test_attention_dot(q + at, k + to, D, true) +
                           2 * u * (fabs(score) + fabs(lse)) + 4e-7;
            p[j] = exp(score - lse);
            dp[j] = test_attention_dot(dout + at, v + to, D, false);
            dp_error[j] = walk * test_attention_dot(dout + at, v + to, D, true);
            // a score that is far below the largest may be off by more: its p is nothing
            if (p[j] > 1e-9 && error > eta) eta = error;
        }
        b.lse[((size_t)batch * H + h) * T + t] = eta + 4 * u * fabs(lse);
        for (int d = 0; d < D; d++) {
            for (int j = 0; j <= t; j++) {
                size_t to = ((size_t)(batch * T + j) * H + h) * D;
                b.out[at + d] += p[j] * (2 * eta + e) * fabs(v[to + d]);
            }
            b.out[at + d] += (TEST_EPS + 16 * u) * fabs(want->out[at + d]) + 1e-9;
            delta += dout[at + d] * want->out[at + d];
            delta_error += fabs(dout[at + d]) * (b.out[at + d] + 16 * u * fabs(want->out[at + d]));
        }
        for (int j = 0; j <= t; j++) {
            size_t to = ((size_t)(batch * T + j) * H + h) * D;
            double ds = p[j] * (dp[j] - delta);
            double error = fabs(ds) * (e + 2 * eta) + p[j] * (dp_error[j] + delta_error) + 1e-9;
            for (int d = 0; d < D; d++) {
                b.dv[to + d] += p[j] * (2 * eta + e + sum) * fabs(dout[at + d]) + 1e-9;
                b.dq[at + d] += c->scale * (error + sum * fabs(ds)) * fabs(k[to + d]);
                b.dk[to + d] += c->scale * (error + sum * fabs(ds)) * fabs(q[at + d]);
            }
        }
    }
    free(p), free(dp), free(dp_error);
    return b;
}

// ---- running the kernels -------------------------------------------------------------------

enum { ATTENTION_PAD = 8 };      // columns beside the gradients, which have to stay as they are

typedef struct {
    float *out, *lse, *gradient;         // gradient: rows of 3C + ATTENTION_PAD
    size_t n, rows, wide;
} AttentionRun;

static void test_attention_run_free(AttentionRun* r) {
    free(r->out), free(r->lse), free(r->gradient);
}

// q, k and v interleaved in rows of 3C, as the trainer has them.
static AttentionRun test_attention_run(const AttentionCase* c, const double* q, const double* k,
                                       const double* v, const double* dout) {
    int N = c->B * c->T, C = c->H * c->D, ld = 3 * C, ldd = 3 * C + ATTENTION_PAD;
    AttentionRun r = {NULL, NULL, NULL, (size_t)N * C, (size_t)N * c->H, (size_t)N * ldd};
    double *qkv = test_doubles((size_t)N * ld), *fill = test_doubles(r.wide);
    for (size_t i = 0; i < r.n; i++) {
        double* row = qkv + i / C * ld + i % C;
        row[0] = q[i], row[C] = k[i], row[2 * C] = v[i];
    }
    for (size_t i = 0; i < r.wide; i++) fill[i] = 77;
    floatX *qkv_d = test_upload(qkv, (size_t)N * ld), *dout_d = test_upload(dout, r.n);
    floatX *out_d = test_device(r.n), *gradient_d = test_upload(fill, r.wide);
    float *lse_d = test_device_float(r.rows), *delta_d = test_device_float(r.rows);
    attention_forward(out_d, lse_d, qkv_d, qkv_d + C, qkv_d + 2 * C, c->B, c->T, c->H, c->D, ld, ld,
                      (float)c->scale, 0);
    attention_backward(gradient_d, gradient_d + C, gradient_d + 2 * C, delta_d, dout_d, out_d,
                       lse_d, qkv_d, qkv_d + C, qkv_d + 2 * C, c->B, c->T, c->H, c->D, ld, ld, ldd,
                       ldd, (float)c->scale, 0);
    r.out = test_download(out_d, r.n);
    r.lse = test_download_float(lse_d, r.rows);
    r.gradient = test_download(gradient_d, r.wide);
    free(qkv), free(fill);
    cudaFree(qkv_d), cudaFree(dout_d), cudaFree(out_d), cudaFree(gradient_d), cudaFree(lse_d);
    cudaFree(delta_d);
    return r;
}

// Element i of (B, T, H, D) in the gradient's rows; part 0, 1, 2: dq, dk, dv.
static float test_attention_gradient(const AttentionRun* r, const AttentionCase* c, int part,
                                     size_t i) {
    int C = c->H * c->D;
    return r->gradient[i / C * (3 * C + ATTENTION_PAD) + part * C + i % C];
}

// The largest error as a fraction of the element's bound.
static double test_attention_worst(const double* got, const double* want, const double* bound,
                                   size_t n) {
    double worst = 0;
    for (size_t i = 0; i < n; i++) {
        double fraction = fabs(got[i] - want[i]) / bound[i];
        if (got[i] != want[i] && !(fraction <= worst)) worst = fraction;
        if (isnan(worst)) return INFINITY;
    }
    return worst;
}

static void test_attention_compare(const char* label, const AttentionCase* c, const AttentionRun* r,
                                   const AttentionResult* want, const AttentionResult* bound) {
    const char* names[5] = {"dq", "dk", "dv", "out", "lse"};
    const double* wants[5] = {want->dq, want->dk, want->dv, want->out, want->lse};
    const double* bounds[5] = {bound->dq, bound->dk, bound->dv, bound->out, bound->lse};
    double* got = test_doubles(r->n);
    for (int part = 0; part < 5; part++) {
        size_t n = part < 4 ? r->n : r->rows;
        for (size_t i = 0; i < n; i++) {
            got[i] = part < 3    ? test_attention_gradient(r, c, part, i)
                     : part == 3 ? r->out[i]
                                 : r->lse[i];
        }
        char what[128];
        snprintf(what, sizeof what, "attention %s %s B=%d T=%d H=%d D=%d", names[part], label, c->B,
                 c->T, c->H, c->D);
        test_check(what, test_attention_worst(got, wants[part], bounds[part], n), 1);
    }
    bool untouched = true;
    int width = 3 * c->H * c->D + ATTENTION_PAD;
    for (size_t i = 0; i < r->wide; i++) {
        if ((int)(i % width) >= width - ATTENTION_PAD && r->gradient[i] != 77) untouched = false;
    }
    test_true("attention_backward leaves what lies beside alone", untouched);
    free(got);
}

static void test_attention_same(const char* name, const AttentionRun* a, const AttentionRun* b) {
    char what[96];
    snprintf(what, sizeof what, "attention %s: out", name);
    test_same_bits(what, a->out, b->out, a->n * sizeof(float));
    snprintf(what, sizeof what, "attention %s: lse", name);
    test_same_bits(what, a->lse, b->lse, a->rows * sizeof(float));
    snprintf(what, sizeof what, "attention %s: gradients", name);
    test_same_bits(what, a->gradient, b->gradient, a->wide * sizeof(float));
}

// ---- cases ---------------------------------------------------------------------------------

enum AttentionData {
    DATA_NORMAL,
    DATA_EQUAL,          // all queries and keys alike: every p is 1/(t + 1)
    DATA_ZERO,           // a query and a key of zeros
    DATA_LARGE,          // scores of about ±1e4: one key takes all
};

typedef struct {
    double *q, *k, *v, *dout;
} AttentionInput;

static AttentionInput test_attention_input(const AttentionCase* c, AttentionData data) {
    size_t n = (size_t)c->B * c->T * c->H * c->D;
    int C = c->H * c->D;
    AttentionInput x = {test_doubles(n), test_doubles(n), test_doubles(n), test_doubles(n)};
    test_fill_normal(x.q, n, 11, data == DATA_LARGE ? 100 : 1);
    test_fill_normal(x.k, n, 12, data == DATA_LARGE ? 100 : 1);
    test_fill_normal(x.v, n, 13, 1);
    test_fill_normal(x.dout, n, 14, 1);
    for (size_t i = 0; i < n; i++) {
        if (data == DATA_EQUAL) x.q[i] = x.q[i % C], x.k[i] = x.k[i % C];
        if (data == DATA_ZERO && (int)(i / C) % c->T == c->T / 2) x.q[i] = x.k[i] = 0;
    }
    return x;
}

static void test_attention_input_free(AttentionInput* x) {
    free(x->q), free(x->k), free(x->v), free(x->dout);
}

static void test_attention_case(int B, int T, int H, int D, double scale, AttentionData data,
                                const char* label) {
    AttentionCase c = {B, T, H, D, (float)scale};
    AttentionInput x = test_attention_input(&c, data);
    AttentionResult want = test_attention_alloc(&c);
    oracle_attention_forward(want.out, want.lse, x.q, x.k, x.v, B, T, H, D, c.scale);
    oracle_attention_backward(want.dq, want.dk, want.dv, x.dout, x.q, x.k, x.v, B, T, H, D,
                              c.scale);
    AttentionResult bound = test_attention_bounds(&c, &want, x.q, x.k, x.v, x.dout);
    AttentionRun run = test_attention_run(&c, x.q, x.k, x.v, x.dout);
    test_attention_compare(label, &c, &run, &want, &bound);
    test_attention_run_free(&run);
    test_attention_free(&want);
    test_attention_free(&bound);
    test_attention_input_free(&x);
}

// Equal bits in a second run and, on the host, in every order of threads and blocks.
static void test_attention_repeat(int D) {
    AttentionCase c = {1, 200, 2, D, 0.12f};
    AttentionInput x = test_attention_input(&c, DATA_NORMAL);
    AttentionRun first = test_attention_run(&c, x.q, x.k, x.v, x.dout);
#ifdef __CUDACC__
    AttentionRun second = test_attention_run(&c, x.q, x.k, x.v, x.dout);
    test_attention_same("twice", &first, &second);
    test_attention_run_free(&second);
#else
    const char* orders[] = {"reverse", "breadth", "1", "2", "3"};
    for (int i = 0; i < 5; i++) {
        host_set_schedule(orders[i]);
        AttentionRun second = test_attention_run(&c, x.q, x.k, x.v, x.dout);
        test_attention_same(orders[i], &first, &second);
        test_attention_run_free(&second);
    }
    host_set_schedule(NULL);
#endif
    test_attention_run_free(&first);
    test_attention_input_free(&x);
}

// A NaN in key 70 of head 1: forward, rows 70.. of that head are NaN and all else is as without it.
// Backward, every key of the head is seen by such a row; dq of rows before 64, which no tile puts
// together with key 70, is as without it. (Rows 64..69 are not: 0 times NaN in a product is NaN.)
static void test_attention_nan(int D) {
    AttentionCase c = {1, 130, 2, D, 0.12f};
    const int bad = 70;
    AttentionInput x = test_attention_input(&c, DATA_NORMAL);
    AttentionRun clean = test_attention_run(&c, x.q, x.k, x.v, x.dout);
    x.k[((size_t)bad * c.H + 1) * D + D / 2] = NAN;
    AttentionRun run = test_attention_run(&c, x.q, x.k, x.v, x.dout);
    bool forward = true, backward = true;
    for (size_t i = 0; i < run.n; i++) {
        int h = (int)(i / D % c.H), t = (int)(i / D / c.H);
        float lse = run.lse[h * c.T + t], lse_clean = clean.lse[h * c.T + t];
        float dq = test_attention_gradient(&run, &c, 0, i),
              dk = test_attention_gradient(&run, &c, 1, i);
        float dv = test_attention_gradient(&run, &c, 2, i);
        bool sees = h == 1 && t >= bad;
        forward = forward && (sees ? isnan(run.out[i]) && isnan(lse)
                                   : run.out[i] == clean.out[i] && lse == lse_clean);
        if (h == 1) {
            backward = backward && isnan(dk) && isnan(dv);
            if (t >= bad) backward = backward && isnan(dq);
            if (t < 64) backward = backward && dq == test_attention_gradient(&clean, &c, 0, i);
        } else {
            backward = backward && dq == test_attention_gradient(&clean, &c, 0, i) &&
                       dk == test_attention_gradient(&clean, &c, 1, i) &&
                       dv == test_attention_gradient(&clean, &c, 2, i);
        }
    }
    test_true("attention_forward of a NaN in a key: NaN where it is seen and nowhere else",
              forward);
    test_true("attention_backward of a NaN in a key: NaN in its head and nowhere else", backward);
    test_attention_run_free(&clean);
    test_attention_run_free(&run);
    test_attention_input_free(&x);
}

// The files hold (B, H, T, D). Other sums in float: equal to 1e-6 and, in gradients, 2e-6.
static double* test_attention_read(const SafeFile* f, const char* name, const AttentionCase* c) {
    size_t n = (size_t)c->B * c->T * c->H * c->D;
    const float* data = (const float*)safetensors_data(f, name, SAFE_F32, n);
    double* x = test_doubles(n);
    for (size_t i = 0; i < n; i++) {
        size_t d = i % c->D, t = i / c->D % c->T, h = i / c->D / c->T % c->H,
               b = i / c->D / c->T / c->H;
        x[((b * c->T + t) * c->H + h) * c->D + d] = data[i];
    }
    return x;
}

static void test_attention_golden(int B, int H, int T, int D) {
    char path[96];
    snprintf(path, sizeof path, "test/golden/units/attn_causal_B%dH%dT%dD%d.safetensors", B, H, T,
             D);
    SafeFile f;
    safetensors_open(&f, path);
    const char* scale = safetensors_metadata(&f, "scale");
    REQUIRE(scale, "%s: no scale in its metadata", path);
    AttentionCase c = {B, T, H, D, atof(scale)};
    const char* names[8] = {"q", "k", "v", "dy", "dq", "dk", "dv", "y"};
    double* x[8];
    for (int i = 0; i < 8; i++) x[i] = test_attention_read(&f, names[i], &c);
    AttentionRun run = test_attention_run(&c, x[0], x[1], x[2], x[3]);
    float* got = test_floats(run.n);
    for (int part = 0; part < 4; part++) {
        for (size_t i = 0; i < run.n; i++) {
            got[i] = part < 3 ? test_attention_gradient(&run, &c, part, i) : run.out[i];
        }
        char what[96];
        snprintf(what, sizeof what, "attention golden %s B=%d H=%d T=%d D=%d", names[4 + part], B,
                 H, T, D);
        test_compare(what, got, x[4 + part], run.n, 1e-5, 1e-5);
    }
    for (int i = 0; i < 8; i++) free(x[i]);
    free(got);
    test_attention_run_free(&run);
    safetensors_close(&f);
}

static void test_attention(void) {
    // one row; inside, at and beyond the edges of tiles of 32, 64 and 128; several tiles of each
    const int lengths[] = {1, 5, 37, 64, 65, 130, 200};
    for (int D = 32; D <= 128; D *= 2) {
        for (int i = 0; i < 7; i++) {
            int B = i % 2 ? 2 : 1, H = i % 3 ? 3 : 1;
            test_attention_case(B, lengths[i], H, D, 1 / sqrt(D), DATA_NORMAL, "normal");
        }
        test_attention_case(1, 130, 1, D, 0.12, DATA_EQUAL, "all rows equal");
        test_attention_case(2, 70, 1, D, 0.12, DATA_ZERO, "zero rows");
        test_attention_case(1, 130, 1, D, 1 / sqrt(D), DATA_LARGE, "large scores");
        test_attention_nan(D);
        test_attention_repeat(D);
    }
    if (!FLOATX_IS_BF16) {
        test_attention_golden(1, 2, 37, 128);
        test_attention_golden(1, 2, 130, 64);
    }
}
