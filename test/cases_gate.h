/*
gate: llmc/gate.cuh against oracle.h.

Allowed, with u = 2^-24, e the rounding of floatX, and Z = Σ|w h| of the largest argument. A sum of
twelve products is off by at most 13 u Z; the logistic function has a slope of at most 1/4 and is
itself right to 6 u (an exponential right to 4 u + |z| u, an addition, a division). So a gate in
0..1 is off by at most G = (6 + 4 Z) u, and what is multiplied with it by as much times its size
and a rounding more.

dz = g (1 - g) p: the factor, at most 1/4, is off by G and two roundings; p, a sum of products with
the magnitude P, by a u P, where a = 8 + 4 additions for attention and 8 ceil(C/256) + 6 for the
smear. So dz is off by (G + (a + 4) u / 4) P. dw and dλ are sums of dz h over the rows, in at most
32 + blocks/256 + 13 additions, or 8 + warps/256 + 13.
*/
#pragma once
#include "../llmc/gate.cuh"
#include "oracle.h"
#include "test.h"

// The largest Σ|w h| of a gate.
static double test_gate_argument(const double* h, const double* w, int N, int G, int C) {
    double largest = 0;
    for (int n = 0; n < N; n++) {
        for (int g = 0; g < G; g++) {
            double sum = 0;
            for (int i = 0; i < 12; i++) sum += fabs(h[(size_t)n * C + i] * w[g * 12 + i]);
            largest = fmax(largest, sum);
        }
    }
    return largest;
}

// Σ|dz| |h| for each input of each gate, and the largest Σ|dz| |w| of a row and column. dz and what
// it may be off by, as a fraction of `size`, are the caller's.
typedef struct {
    double *dw, dh;
} GateSums;

static GateSums test_gate_sums(const double* size, const double* h, const double* w, int N, int G,
                               int C) {
    GateSums sums = {test_doubles((size_t)G * 12), 0};
    for (int n = 0; n < N; n++) {
        for (int i = 0; i < 12; i++) {
            double column = 0;
            for (int g = 0; g < G; g++) {
                double s = size[(size_t)n * G + g];
                sums.dw[g * 12 + i] += s * fabs(h[(size_t)n * C + i]);
                column += s * fabs(w[g * 12 + i]);
            }
            sums.dh = fmax(sums.dh, column);
        }
    }
    return sums;
}

// dw: each element has a tolerance of its own.
static void test_gate_dw(const char* what, const float* dw_d, const double* dw, const double* sums,
                         int n, double rel) {
    float* got = test_download_float(dw_d, n);
    double worst = 0;
    for (int i = 0; i < n; i++) {
        double fraction = fabs(got[i] - dw[i]) / (rel * sums[i] + 0x1p-23 * fabs(dw[i]));
        worst = fmax(worst, isnan(fraction) ? INFINITY : fraction);
    }
    test_check(what, worst, 1);
    free(got);
}

static void test_gate_attention(int N, int H, int D, int C, bool in_place) {
    const double u = 0x1p-24;
    size_t n = (size_t)N * H * D, rows = (size_t)N * C, pairs = (size_t)N * H;
    double *att = test_doubles(n), *y = test_doubles(n), *dy = test_doubles(n);
    double *datt = test_doubles(n), *h = test_doubles(rows), *dh = test_doubles(rows);
    double *w = test_doubles((size_t)H * 12), *dw = test_doubles((size_t)H * 12);
    double *raw = test_doubles(pairs), *draw = test_doubles(pairs), *gate = test_doubles(pairs);
    double* size = test_doubles(pairs);
    char what[128], label[96];
    snprintf(label, sizeof label, "N=%d H=%d D=%d C=%d", N, H, D, C);
    test_fill_normal(att, n, 1, 1.0);
    test_fill_normal(dy, n, 2, 1.0);
    test_fill_normal(h, rows, 3, 1.0);
    test_fill_normal(dh, rows, 4, 1.0);
    test_fill_normal_float(w, (size_t)H * 12, 5, 0.5);
    test_fill_normal_float(dw, (size_t)H * 12, 6, 1.0);
    floatX *att_d = test_upload(att, n), *dy_d = test_upload(dy, n), *h_d = test_upload(h, rows);
    floatX *dh_d = test_upload(dh, rows), *y_d = in_place ? test_upload(att, n) : test_device(n);
    floatX* datt_d = in_place ? dy_d : test_device(n);
    float *w_d = test_upload_float(w, H * 12), *dw_d = test_upload_float(dw, H * 12);
    float* again_d = test_upload_float(dw, H * 12);
    float *gate_d = test_device_float(pairs), *scratch =
        test_device_float(attention_gate_scratch_floats(N, H));

    oracle_gate_raw(raw, h, w, N, H, C);
    oracle_gate_forward(y, att, raw, (int)pairs, D);
    oracle_gate_backward(datt, draw, dy, att, raw, (int)pairs, D);
    double largest = 0, dh_largest = 0, argument = test_gate_argument(h, w, N, H, C);
    double off = (6 + 4 * argument) * u;                     // of a gate
    for (size_t i = 0; i < n; i++) largest = fmax(largest, fmax(fabs(att[i]), fabs(dy[i])));
    for (size_t p = 0; p < pairs; p++) {
        gate[p] = oracle_sigmoid(raw[p]);
        for (int d = 0; d < D; d++) size[p] += fabs(dy[p * D + d] * att[p * D + d]);
    }
    GateSums sums = test_gate_sums(size, h, w, N, H, C);
    for (size_t i = 0; i < rows; i++) dh_largest = fmax(dh_largest, fabs(dh[i]));
    oracle_gate_raw_backward(dh, dw, draw, h, w, N, H, C);

    attention_gate_forward(y_d, gate_d, in_place ? y_d : att_d, h_d, w_d, N, H, D, C, 0);
    snprintf(what, sizeof what, "attention_gate_forward gate %s", label);
    test_compare_device_float(what, gate_d, gate, pairs, off, 0);
    snprintf(what, sizeof what, "attention_gate_forward y %s", label);
    test_compare_device(what, y_d, y, n, (off + u) * largest, TEST_EPS);

    attention_gate_backward(datt_d, dh_d, dw_d, dy_d, att_d, gate_d, h_d, w_d, N, H, D, C, scratch,
                            0);
    snprintf(what, sizeof what, "attention_gate_backward datt %s", label);
    test_compare_device(what, datt_d, datt, n, (off + u) * largest, TEST_EPS);
    double dz_off = off + (8 + 4 + 4) * u / 4;
    snprintf(what, sizeof what, "attention_gate_backward dh %s", label);
    test_compare_device(what, dh_d, dh, rows,
                        (dz_off + (H + 1) * u / 4) * sums.dh + (H + 1) * u * dh_largest, TEST_EPS);
    double adds = 32 + ceil_div(N, 32) / 256 + 13 + 2;
    snprintf(what, sizeof what, "attention_gate_backward dw %s", label);
    test_gate_dw(what, dw_d, dw, sums.dw, H * 12, dz_off + adds * u / 4);
    if (!in_place) {
        attention_gate_backward(datt_d, dh_d, again_d, dy_d, att_d, gate_d, h_d, w_d, N, H, D, C,
                                scratch, 0);
        float *a = test_download_float(dw_d, H * 12), *b = test_download_float(again_d, H * 12);
        test_same_bits("attention_gate_backward dw again", a, b, H * 12 * sizeof(float));
        free(a), free(b);
    }
    double* doubles[13] = {att, y, dy, datt, h, dh, w, dw, raw, draw, gate, size, sums.dw};
    for (int i = 0; i < 13; i++) free(doubles[i]);
    cudaFree(att_d), cudaFree(dy_d), cudaFree(h_d), cudaFree(dh_d), cudaFree(y_d);
    if (!in_place) cudaFree(datt_d);
    cudaFree(w_d), cudaFree(dw_d), cudaFree(again_d), cudaFree(gate_d), cudaFree(scratch);
}

static void test_gate_smear(int B, int T, int C, double lambda) {
    const double u = 0x1p-24;
    int N = B * T;
    size_t n = (size_t)N * C;
    double *e = test_doubles(n), *y = test_doubles(n), *dy = test_doubles(n), *de = test_doubles(n);
    double w[12], dw[12], dlambda = 3, *raw = test_doubles(N), *draw = test_doubles(N);
    double *gate = test_doubles(N), *size = test_doubles(N);
    char what[128], label[96];
    snprintf(label, sizeof label, "B=%d T=%d C=%d lambda=%g", B, T, C, lambda);
    test_fill_normal(e, n, 11, 1.0);
    test_fill_normal(dy, n, 12, 1.0);
    test_fill_normal_float(w, 12, 13, 0.5);
    test_fill_normal_float(dw, 12, 14, 1.0);
    floatX *e_d = test_upload(e, n), *dy_d = test_upload(dy, n);
    floatX *y_d = test_device(n), *de_d = test_device(n);
    float *w_d = test_upload_float(w, 12), *dw_d = test_upload_float(dw, 12);
    float *again_d = test_upload_float(dw, 12), *lambda_d = test_upload_float(&lambda, 1);
    float *dlambda_d = test_upload_float(&dlambda, 1), *gate_d = test_device_float(N);
    float* scratch = test_device_float(smear_scratch_floats(N));

    oracle_gate_raw(raw, e, w, N, 1, C);
    oracle_smear_forward(y, e, raw, lambda, N, T, C);
    oracle_smear_backward(de, draw, &dlambda, dy, e, raw, lambda, N, T, C);
    double largest = 0, products = 0, argument = test_gate_argument(e, w, N, 1, C);
    double off = (6 + 4 * argument) * u, l = fabs(lambda);
    for (size_t i = 0; i < n; i++) largest = fmax(largest, fmax(fabs(e[i]), fabs(dy[i])));
    for (int i = 0; i < N; i++) {
        gate[i] = i % T == 0 ? 0 : oracle_sigmoid(raw[i]);
        for (int c = 0; c < C && i % T > 0; c++)
            size[i] += fabs(dy[(size_t)i * C + c] * e[(size_t)(i - 1) * C + c]);
        products += size[i];
    }
    GateSums sums = test_gate_sums(size, e, w, N, 1, C);
    oracle_gate_raw_backward(de, dw, draw, e, w, N, 1, C);

    smear_forward(y_d, gate_d, e_d, w_d, lambda_d, N, T, C, 0);
    snprintf(what, sizeof what, "smear_forward gate %s", label);
    test_compare_device_float(what, gate_d, gate, N, off, 0);
    snprintf(what, sizeof what, "smear_forward y %s", label);
    test_compare_device(what, y_d, y, n, (l * (off + 2 * u) + 2 * u) * largest, TEST_EPS);

    smear_backward(de_d, dw_d, dlambda_d, dy_d, e_d, gate_d, w_d, lambda_d, N, T, C, scratch, 0);
    double p_adds = 8 * ceil_div(C, 256) + 5 + 1, adds = 8 + ceil_div(N, 64) * 8 / 256 + 13 + 2;
    double dz_off = l * (off + (p_adds + 5) * u / 4);          // and one rounding for lambda
    snprintf(what, sizeof what, "smear_backward de %s", label);
    test_compare_device(what, de_d, de, n,
                        (l * (off + 2 * u) + 3 * u) * largest + (dz_off + l * u / 2) * sums.dh,
                        TEST_EPS);
    snprintf(what, sizeof what, "smear_backward dw %s", label);
    test_gate_dw(what, dw_d, dw, sums.dw, 12, dz_off + l * adds * u / 4 + 1e-30);
    snprintf(what, sizeof what, "smear_backward dlambda %s", label);
    test_gate_dw(what, dlambda_d, &dlambda, &products, 1, off + (p_adds + adds) * u);

    smear_backward(de_d, again_d, dlambda_d, dy_d, e_d, gate_d, w_d, lambda_d, N, T, C, scratch, 0);
    float *a = test_download_float(dw_d, 12), *b = test_download_float(again_d, 12);
    test_same_bits("smear_backward dw again", a, b, 12 * sizeof(float));
    double* doubles[9] = {e, y, dy, de, raw, draw, gate, size, sums.dw};
    for (int i = 0; i < 9; i++) free(doubles[i]);
    free(a), free(b);
    cudaFree(e_d), cudaFree(dy_d), cudaFree(y_d), cudaFree(de_d), cudaFree(w_d), cudaFree(dw_d);
    cudaFree(again_d), cudaFree(lambda_d), cudaFree(dlambda_d), cudaFree(gate_d), cudaFree(scratch);
}

// The record's start: gates of zero weights are 1/2, and a smear of weight 0 changes no bit.
static void test_gate_start(void) {
    enum { N = 6, H = 2, D = 32, C = H * D };
    double att[N * C], half[N * C], w[H * 12] = {0}, lambda = 0;
    test_fill_normal(att, N * C, 21, 1.0);
    for (int i = 0; i < N * C; i++) half[i] = att[i] / 2;
    floatX *att_d = test_upload(att, N * C), *y_d = test_device(N * C);
    float *w_d = test_upload_float(w, H * 12), *lambda_d = test_upload_float(&lambda, 1);
    float* gate_d = test_device_float(N * H);
    attention_gate_forward(y_d, gate_d, att_d, att_d, w_d, N, H, D, C, 0);
    test_compare_device("attention_gate of zeros halves", y_d, half, N * C, 0, 0);
    smear_forward(y_d, gate_d, att_d, w_d, lambda_d, N, N, C, 0);
    test_compare_device("smear of weight 0", y_d, att, N * C, 0, 0);
    cudaFree(att_d), cudaFree(y_d), cudaFree(w_d), cudaFree(lambda_d), cudaFree(gate_d);
}

// A NaN in a gate's input reaches all that the gate touches.
static void test_gate_nan(void) {
    enum { N = 4, H = 1, D = 32, C = 32 };
    double x[N * C], w[12], y[N * C];
    test_fill_normal(x, N * C, 31, 1.0);
    test_fill_normal_float(w, 12, 32, 1.0);
    x[2 * C + 11] = NAN;                                          // row 2, the last input
    double lambda = 1;
    floatX *x_d = test_upload(x, N * C), *y_d = test_device(N * C);
    float *w_d = test_upload_float(w, 12), *gate_d = test_device_float(N);
    float* lambda_d = test_upload_float(&lambda, 1);
    attention_gate_forward(y_d, gate_d, x_d, x_d, w_d, N, H, D, C, 0);
    float* got = test_download(y_d, N * C);
    bool ok = true;
    for (int i = 0; i < N * C; i++) ok = ok && isnan(got[i]) == (i / C == 2);
    test_true("attention_gate of a NaN: its row and no other", ok);
    free(got);
    smear_forward(y_d, gate_d, x_d, w_d, lambda_d, N, N, C, 0);
    for (int i = 0; i < N * C; i++) y[i] = i / C == 2 || i == 3 * C + 11 ? NAN : 0;
    got = test_download(y_d, N * C);
    ok = true;
    for (int i = 0; i < N * C; i++) ok = ok && isnan(got[i]) == isnan(y[i]);
    test_true("smear of a NaN: its row, and its column in the next", ok);
    free(got);

    // Two sequences of two rows, and a NaN in what belongs to the first and to the second: neither
    // e_1 nor dy_2 is looked at across the border.
    double dy[N * C], sums[13] = {0};
    test_fill_normal(x, N * C, 33, 1.0);
    test_fill_normal(dy, N * C, 34, 1.0);
    x[C + 20] = dy[2 * C + 20] = NAN;
    test_put(x_d, x, N * C);
    floatX *dy_d = test_upload(dy, N * C), *de_d = test_device(N * C);
    float* sums_d = test_upload_float(sums, 13);
    float* scratch = test_device_float(smear_scratch_floats(N));
    smear_forward(y_d, gate_d, x_d, w_d, lambda_d, N, N / 2, C, 0);
    smear_backward(de_d, sums_d, sums_d + 12, dy_d, x_d, gate_d, w_d, lambda_d, N, N / 2, C,
                   scratch, 0);
    got = test_download(de_d, N * C);
    ok = true;
    for (int i = 0; i < N * C; i++) ok = ok && isnan(got[i]) == (i == 2 * C + 20);
    free(got), got = test_download_float(sums_d, 13);
    for (int i = 0; i < 13; i++) ok = ok && isfinite(got[i]);
    test_true("smear_backward of a NaN: not beyond its sequence", ok);
    free(got);
    cudaFree(dy_d), cudaFree(de_d), cudaFree(sums_d), cudaFree(scratch);
    cudaFree(x_d), cudaFree(y_d), cudaFree(w_d), cudaFree(gate_d), cudaFree(lambda_d);
}

static void test_gate(void) {
    // one row; a block of rows and a ragged one; a wide model; more parts than a block has threads
    test_gate_attention(1, 1, 32, 32, false);
    test_gate_attention(37, 3, 64, 192, false);
    test_gate_attention(64, 2, 128, 256, true);
    test_gate_attention(130, 6, 128, 768, false);
    test_gate_attention(8300, 1, 32, 32, false);
    test_gate_smear(1, 1, 16, 0.5);
    test_gate_smear(3, 7, 64, -0.75);
    test_gate_smear(1, 70, 768, 0.125);
    test_gate_smear(2, 1100, 24, 1.5);
    test_gate_start();
    test_gate_nan();
}
