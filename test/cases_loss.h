/*
loss: llmc/loss.cuh against oracle.h.

Allowed, with u = 2^-24 and d = max c - c. Inputs are what floatX holds, so losses are judged alike
in both precisions. c is right to 4 cap u (the sigmoid to 2 u, times the cap or twice that). An
exponential of c - max carries the error of both, d u from each of two roundings of the argument and
4 u of its own; the sum of V of them as many u as its longest chain of additions: V / (8 threads) in
a thread, at most 25, 8 + 5 + 8 across lanes and warps. A softmax entry p is thus right to (64 + 16
cap + 2 d) u relative, doubled for the sum below it, and dz besides to the error of the slope, 8 u
absolute, and of p - 1 at the target. A loss is right to (64 + 16 cap + 4 |max - c_target| + 4
|loss|) u. Exponentials below 2^-126 are 0: 1e-37 absolute. Then dz is rounded to floatX.
*/
#pragma once
#include "../llmc/loss.cuh"
#include "../llmc/safetensors.h"
#include "oracle.h"
#include "test.h"

static const char* test_loss_kind(SoftcapKind kind) {
    return kind == SOFTCAP_NONE ? "none" : kind == SOFTCAP_TANH ? "tanh" : "sigmoid";
}

// R rows of z against the oracle, every row judged by its own bounds.
static void test_loss_case(const char* name, const double* z, const int* targets, int R, int V,
                           SoftcapKind kind, double cap, double scale) {
    const double u = 0x1p-24;
    size_t n = (size_t)R * V;
    char what[128];
    double *dz = test_doubles(n), *losses = test_doubles(R + 1);
    floatX* z_d = test_device(n + V);
    test_put(z_d, z, n);
    test_put(z_d + n, z, V);                   // a row behind the last, to stay as it is
    losses[R] = 7;
    float* losses_d = test_upload_float(losses, R + 1);
    int* targets_d = test_upload_int(targets, R);
    cross_entropy(z_d, losses_d, targets_d, R, V, kind, (float)cap, (float)scale, false, 0);
    float *z_after = test_download(z_d, n), *first = test_download_float(losses_d, R + 1);
    cross_entropy(z_d, losses_d, targets_d, R, V, kind, (float)cap, (float)scale, true, 0);
    float *got = test_download(z_d, n), *losses_got = test_download_float(losses_d, R + 1);
    oracle_cross_entropy(dz, losses, z, targets, R, V, kind, cap, scale);
    losses[R] = 7;

    double worst_loss = 0, worst_grad = 0, cap_error = kind == SOFTCAP_NONE ? 0 : 16 * cap;
    for (int r = 0; r < R; r++) {
        const double *zr = z + (size_t)r * V, *want = dz + (size_t)r * V;
        double max = -INFINITY, c_target = 0;
        for (int v = 0; v < V; v++) max = fmax(max, oracle_softcap(zr[v], kind, cap));
        if (targets[r] >= 0) c_target = oracle_softcap(zr[targets[r]], kind, cap);
        double allowed = (64 + cap_error + 4 * fabs(max - c_target) + 4 * fabs(losses[r])) * u;
        double fraction = fabs(losses_got[r] - losses[r]) / (targets[r] < 0 ? 1e-300 : allowed);
        if (!(fraction <= worst_loss)) worst_loss = fraction;
        for (int v = 0; v < V; v++) {
            double d = max - oracle_softcap(zr[v], kind, cap), hot = v == targets[r];
            double slope = oracle_softcap_slope(zr[v], kind, cap);
            double p = slope == 0 ? 0 : fabs(want[v] / (scale * slope) + hot);
            double error = slope * p * 2 * (64 + cap_error + 2 * d) * u + 2 * hot * u;
            if (kind != SOFTCAP_NONE) error += fabs(p - hot) * 8 * u;
            error = scale * error + TEST_EPS * fabs(want[v]) + 1e-37;
            double off = fabs((double)got[(size_t)r * V + v] - want[v]);
            fraction = targets[r] < 0 ? (off == 0 ? 0 : INFINITY) : off / error;
            if (!(fraction <= worst_grad)) worst_grad = fraction;
        }
    }
    const char* k = test_loss_kind(kind);
    snprintf(what, sizeof what, "cross_entropy loss %s %s R=%d V=%d", name, k, R, V);
    test_check(what, worst_loss, 1);
    snprintf(what, sizeof what, "cross_entropy gradient %s %s R=%d V=%d", name, k, R, V);
    test_check(what, worst_grad, 1);
    test_compare("cross_entropy without gradient leaves the logits", z_after, z, n, 0, 0);
    test_same_bits("cross_entropy without gradient: equal losses", first, losses_got,
                   (R + 1) * sizeof(float));
    test_compare("cross_entropy leaves the next loss", losses_got + R, losses + R, 1, 0, 0);
    test_compare_device("cross_entropy leaves the next row", z_d + n, z, V, 0, 0);

    test_put(z_d, z, n);
    cross_entropy(z_d, losses_d, targets_d, R, V, kind, (float)cap, (float)scale, true, 0);
    float* again = test_download(z_d, n);
    test_same_bits("cross_entropy twice", again, got, n * sizeof(float));
    free(dz), free(losses), free(z_after), free(first), free(got), free(losses_got), free(again);
    cudaFree(z_d), cudaFree(losses_d), cudaFree(targets_d);
}

static void test_loss_kinds(const char* name, const double* z, const int* targets, int R, int V) {
    test_loss_case(name, z, targets, R, V, SOFTCAP_NONE, 0, 1.0 / R);
    test_loss_case(name, z, targets, R, V, SOFTCAP_TANH, 30, 1.0);
    test_loss_case(name, z, targets, R, V, SOFTCAP_SIGMOID, 30, 3.0);
    test_loss_case(name, z, targets, R, V, SOFTCAP_TANH, 15, 0.25);
}

static void test_loss_random(int R, int V) {
    size_t n = (size_t)R * V;
    double* z = test_doubles(n);
    int* targets = (int*)test_calloc(R, sizeof(int));
    test_fill_normal(z, n, V, 4.0);
    test_fill_tokens(targets, R, 2, V);
    if (R > 2) targets[0] = V - 1, targets[1] = -1, targets[2] = 0;
    test_loss_kinds("normal", z, targets, R, V);
    free(z), free(targets);
}

// Huge logits, a row of one value, a spike at and beside the target, a row that rises and one that
// falls, so that the running maximum changes at every step or never.
static void test_loss_edges(int V) {
    const int R = 6;
    double* z = test_doubles((size_t)R * V);
    int targets[6] = {1, V - 2, 3, 3, V / 2, V / 2};
    for (int v = 0; v < V; v++) {
        z[v] = test_round(v % 3 == 0 ? 1e4 : v % 3 == 1 ? -1e4 : v * 0.5);
        z[V + v] = -2.5;
        z[2 * V + v] = v == 3 ? 40 : 0;
        z[3 * V + v] = v == V - 1 ? 40 : 0;
        z[4 * V + v] = test_round(20.0 * v / V - 10);
        z[5 * V + v] = test_round(10 - 20.0 * v / V);
    }
    test_loss_kinds("edges", z, targets, R, V);
    free(z);
}

// V that is no multiple of 16: the columns behind it are neither read nor given a gradient.
static void test_loss_ragged(SoftcapKind kind, int V) {
    const int R = 4, ld = loss_stride(V);
    double *z = test_doubles((size_t)R * V), *dz = test_doubles((size_t)R * V), losses[4];
    double* padded = test_doubles((size_t)R * ld);
    int targets[4] = {0, V - 1, V / 2, -1};
    test_fill_normal(z, (size_t)R * V, 8, 3.0);
    oracle_cross_entropy(dz, losses, z, targets, R, V, kind, 30, 1.0);
    double* want = test_doubles((size_t)R * ld);
    for (int r = 0; r < R; r++) {
        for (int v = 0; v < ld; v++) {
            padded[r * ld + v] = v < V ? z[r * V + v] : 100;
            want[r * ld + v] = v < V ? dz[r * V + v] : 0;
        }
    }
    floatX* z_d = test_upload(padded, (size_t)R * ld);
    float* losses_d = test_device_float(R);
    int* targets_d = test_upload_int(targets, R);
    cross_entropy(z_d, losses_d, targets_d, R, V, kind, 30.0f, 1.0f, true, 0);
    char what[64];
    snprintf(what, sizeof what, "cross_entropy V=%d: loss", V);
    // a sum of V exponentials of arguments up to 20: 64 units in the last place and the cap's own 30 u
    test_compare_device_float(what, losses_d, losses, R, 30 * 0x1p-23, 64 * 0x1p-24);
    snprintf(what, sizeof what, "cross_entropy V=%d: gradient", V);
    test_compare_device(what, z_d, want, (size_t)R * ld, 64 * 0x1p-24, TEST_EPS + 256 * 0x1p-24);
    free(z), free(dz), free(padded), free(want);
    cudaFree(z_d), cudaFree(losses_d), cudaFree(targets_d);
}

// Row 0 holds a NaN, row 1 is ignored though it does, row 2 has a target outside the vocabulary,
// row 3 one below it, row 4 is well, row 5 is masked out (-inf) except at two columns.
static void test_loss_nan(SoftcapKind kind, int V) {
    const int R = 6;
    size_t n = (size_t)R * V;
    int targets[6] = {0, -1, V, -2, 5, 9};
    double *z = test_doubles(n), *dz = test_doubles(n), losses[6];
    test_fill_normal(z, n, 3, 1.0);
    const uint64_t all_ones = 0x7fffffffffffffff;          // the NaN furthest from the usual one
    memcpy(&z[V - 1], &all_ones, sizeof(double));
    z[V + 1] = NAN;
    for (int v = 0; v < V; v++) z[5 * V + v] = v == 9 || v == V - 1 ? 0 : -INFINITY;
    oracle_cross_entropy(dz + V, losses + 1, z + V, targets + 1, 1, V, kind, 30, 1.0);
    oracle_cross_entropy(dz + 4 * V, losses + 4, z + 4 * V, targets + 4, 2, V, kind, 30, 1.0);
    for (int v = 0; v < V; v++) dz[v] = NAN;
    losses[0] = losses[2] = losses[3] = NAN;
    floatX* z_d = test_upload(z, n);
    float* losses_d = test_device_float(R);
    int* targets_d = test_upload_int(targets, R);
    cross_entropy(z_d, losses_d, targets_d, R, V, kind, 30.0f, 1.0f, true, 0);
    char what[96];
    snprintf(what, sizeof what, "cross_entropy losses of NaN and stray targets, %s V=%d",
             test_loss_kind(kind), V);
    test_compare_device_float(what, losses_d, losses, R, 1e-4, 0);
    test_compare_device("cross_entropy gradient of a NaN and of an ignored row", z_d, dz, 2 * V, 0,
                        0);
    test_compare_device("cross_entropy gradient of a well and a masked row", z_d + 4 * V,
                        dz + 4 * V, 2 * V, 1e-5, TEST_EPS);
    free(z), free(dz);
    cudaFree(z_d), cudaFree(losses_d), cudaFree(targets_d);
}

// V equal logits: every exponential is 1, their sum V, p = 1/V: with V a power of two no operation
// rounds, and the gradient of any number of rows is exact.
static void test_loss_exact(int V) {
    const int R = 3;
    double *z = test_doubles(R * V), *dz = test_doubles(R * V);
    int targets[3] = {0, V / 2 + 1, V - 1};
    for (int i = 0; i < R * V; i++) {
        z[i] = i / V - 1.5;
        dz[i] = 0.5 * (1.0 / V - (i % V == targets[i / V]));
    }
    floatX* z_d = test_upload(z, R * V);
    float* losses_d = test_device_float(R);
    int* targets_d = test_upload_int(targets, R);
    cross_entropy(z_d, losses_d, targets_d, R, V, SOFTCAP_NONE, 0.0f, 0.5f, true, 0);
    for (int i = 0; i < R * V; i++) dz[i] = test_round(dz[i]);     // (1/V - 1) / 2 in bf16
    test_compare_device("cross_entropy gradient of equal logits", z_d, dz, R * V, 0, 0);
    free(z), free(dz);
    cudaFree(z_d), cudaFree(losses_d), cudaFree(targets_d);
}

// The file has V = 301 and 100: columns of -1e30 follow. Without a cap they weigh nothing; capped
// at -15 or 0 they add less than 1e-7 of the row's sum.
static void test_loss_golden(const char* path, const char* prefix, int R, int V, SoftcapKind kind,
                             float cap, const char* targets_name, bool mean) {
    int padded = loss_stride(V), counted = 0;
    char name[64], what[96];
    SafeFile file;
    safetensors_open(&file, path);
    const float* logits = (const float*)safetensors_data(&file, "logits", SAFE_F32, R * V);
    const int* targets = (const int*)safetensors_data(&file, targets_name, SAFE_I32, R);
    snprintf(name, sizeof name, "%s.dlogits", prefix);
    const float* dlogits = (const float*)safetensors_data(&file, name, SAFE_F32, R * V);
    snprintf(name, sizeof name, "%s.loss", prefix);
    double want_loss = *(const float*)safetensors_data(&file, name, SAFE_F32, 1);
    double *z = test_doubles((size_t)R * padded), *want = test_doubles((size_t)R * V);
    for (int r = 0; r < R; r++) {
        counted += targets[r] >= 0;
        for (int v = 0; v < padded; v++) z[r * padded + v] = v < V ? logits[r * V + v] : -1e30;
    }
    for (int i = 0; i < R * V; i++) want[i] = dlogits[i];

    floatX* z_d = test_upload(z, (size_t)R * padded);
    float *losses_d = test_device_float(R), *sum_d = test_device_float(1);
    int* targets_d = test_upload_int(targets, R);
    float scale = mean ? 1.0f / counted : 1.0f;
    cross_entropy(z_d, losses_d, targets_d, R, padded, kind, cap, scale, true, 0);
    loss_sum(sum_d, losses_d, R, 0);
    float *sum = test_download_float(sum_d, 1), *got = test_download(z_d, (size_t)R * padded);
    snprintf(what, sizeof what, "cross_entropy golden %s loss", prefix);
    test_check(what, fabs(*sum * scale - want_loss), mean ? 1e-5 : 1e-5 * R);
    double rms = 0, off = 0, worst = 0;
    for (int r = 0; r < R; r++) for (int v = 0; v < V; v++) {
        double d = fabs(got[r * padded + v] - want[r * V + v]);
        rms += want[r * V + v] * want[r * V + v], off += d * d;
        if (!(d <= worst)) worst = d;
    }
    rms = sqrt(rms), off = sqrt(off);
    snprintf(what, sizeof what, "cross_entropy golden %s gradient, max/rms", prefix);
    test_check(what, worst / (rms / sqrt((double)R * V)), 5e-4);
    snprintf(what, sizeof what, "cross_entropy golden %s gradient, rms/rms", prefix);
    test_check(what, off / rms, 2e-5);
    free(z), free(want), free(sum), free(got);
    cudaFree(z_d), cudaFree(losses_d), cudaFree(sum_d), cudaFree(targets_d);
    safetensors_close(&file);
}

// n whole numbers sum exactly; n normals to the additions of the longest chain.
static void test_loss_sum(size_t n) {
    double *x = test_doubles(n), magnitude = 0;
    char what[64];
    float *out_d = test_device_float(1), *x_d = test_device_float(n);
    for (int whole = 0; whole < 2; whole++) {
        test_fill_normal_float(x, n, 4, 3.0);
        if (whole) test_fill_whole(x, n, 5, 0, 99);
        for (size_t i = 0; i < n; i++) magnitude += fabs(x[i]);
        test_put_float(x_d, x, n);
        loss_sum(out_d, x_d, n, 0);
        double sum = oracle_sum(x, n), tol = (n / 1024 + 16 + 5 + 32) * 0x1p-24 * magnitude;
        snprintf(what, sizeof what, "loss_sum n=%zu%s", n, whole ? " whole" : "");
        test_compare_device_float(what, out_d, &sum, 1, whole ? 0 : tol, 0);
        magnitude = 0;
    }
    x[n / 2] = NAN;
    test_put_float(x_d, x, n);
    loss_sum(out_d, x_d, n, 0);
    test_compare_device_float("loss_sum of a NaN", out_d, x + n / 2, 1, 0, 0);
    free(x);
    cudaFree(out_d), cudaFree(x_d);
}

static __global__ void test_exp2_8_kernel(float* y, const float* x, int n) {
    int i = 8 * (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) store8(y + i, exp2_8(load8(x + i)));
}

// To 4 u, the 2 ulp that ex2.approx promises; 1 at 0; 0 below 2^-126, inf from 2^128.
static void test_exp2_8(void) {
    const int n = 1 << 16;
    double *x = test_doubles(n), *y = test_doubles(n);
    for (int i = 0; i < n; i++) {
        x[i] = (float)(260.0 * test_uniform(11, i) - 130);
        if (i % 4 == 0) x[i] = (float)(2.0 * test_uniform(12, i) - 1);
        if (i % 8 == 1) x[i] = i % 16 == 1 ? 0 : i / 8 % 300 - 150;
        if (i % 8 == 3 && i / 8 < 3) x[i] = i / 8 == 0 ? NAN : i / 8 == 1 ? INFINITY : -INFINITY;
        y[i] = x[i] < -126 ? 0 : x[i] >= 128 ? INFINITY : exp2(x[i]);
    }
    float *x_d = test_upload_float(x, n), *y_d = test_device_float(n);
    launch<test_exp2_8_kernel>(dim3(n / 2048), dim3(256), 0, (cudaStream_t)0, y_d,
                               (const float*)x_d, n);
    float* got = test_download_float(y_d, n);
    test_compare("exp2_8", got, y, n, 0, 4 * 0x1p-24);
    test_check("exp2_8 of 0", fabs(got[1] - 1.0), 0);
    free(x), free(y), free(got);
    cudaFree(x_d), cudaFree(y_d);
}

static void test_loss(void) {
    test_exp2_8();
    const int sizes[][2] = {{1, 16},   {5, 64},   {3, 128},  {70, 256},
                            {7, 1008}, {3, 2064}, {4, 4096}, {3, 50304}};
    for (int i = 0; i < 8; i++) test_loss_random(sizes[i][0], sizes[i][1]);
    test_loss_edges(128);
    test_loss_edges(5008);
    for (int k = 0; k < 3; k++) {
        test_loss_nan((SoftcapKind)k, 256);
        test_loss_nan((SoftcapKind)k, 5008);
        test_loss_ragged((SoftcapKind)k, 3);
        test_loss_ragged((SoftcapKind)k, 8);
        test_loss_ragged((SoftcapKind)k, 1000);
        test_loss_ragged((SoftcapKind)k, 77);
        test_loss_ragged((SoftcapKind)k, 2501);
    }
    test_loss_exact(16);
    test_loss_exact(512);
    test_loss_exact(32768);
    if (!FLOATX_IS_BF16) {
        const char *a = "test/golden/units/cross_entropy.safetensors";
        const char *b = "test/golden/units/softcap_ce.safetensors";
        test_loss_golden(a, "none", 37, 301, SOFTCAP_NONE, 0, "targets", true);
        test_loss_golden(a, "sigmoid30", 37, 301, SOFTCAP_SIGMOID, 30, "targets", true);
        test_loss_golden(a, "tanh15", 37, 301, SOFTCAP_TANH, 15, "targets", true);
        test_loss_golden(a, "ignore", 37, 301, SOFTCAP_NONE, 0, "ignore.targets", true);
        test_loss_golden(b, "tanh30", 24, 100, SOFTCAP_TANH, 30, "targets", true);
        test_loss_golden(b, "sigmoid30_sum", 24, 100, SOFTCAP_SIGMOID, 30, "targets", false);
    }
    const size_t counts[] = {1, 31, 512, 5000, 65536};
    for (int i = 0; i < 5; i++) test_loss_sum(counts[i]);
}
