/*
mix: llmc/mix.cuh against oracle.h.

Allowed, with u = 2^-24: a x + b z rounds twice in float and 1 - s once, so y is right to
3 u (|a x| + |b z|) and one rounding to floatX; dx and dz likewise. A gradient of a scalar passes through at most
8 + 8 + 13 additions in a block, ceil(blocks/256) + 13 in the last one, a product and a difference: allowed is
that many u times the sum of the products' magnitudes, and one more for ds itself. Whole numbers are
exact throughout.
*/
#pragma once
#include "../llmc/mix.cuh"
#include "oracle.h"
#include "test.h"

// The slice of C columns from column `from` of rows ld apart.
static void test_mix_gather(double* slice, const double* wide, int N, int C, int ld, int from) {
    for (int n = 0; n < N; n++) {
        for (int c = 0; c < C; c++) slice[(size_t)n * C + c] = wide[(size_t)n * ld + from + c];
    }
}

static void test_mix_scatter(double* wide, const double* slice, int N, int C, int ld, int from) {
    for (int n = 0; n < N; n++) {
        for (int c = 0; c < C; c++) wide[(size_t)n * ld + from + c] = slice[(size_t)n * C + c];
    }
}

// Each tensor is the middle third of one three times as wide if strided; what lies beside a slice has to
// stay as it is. one: z is NULL.
static void test_mix_case(MixMode mode, int N, int C, bool strided, bool whole, bool one) {
    const double u = 0x1p-24;
    int ld = strided ? 3 * C : C, from = strided ? C : 0;
    size_t wide = (size_t)N * ld, n = (size_t)N * C;
    char what[128];
    double *x_w = test_doubles(wide), *z_w = test_doubles(wide), *dy_w = test_doubles(wide);
    double *y_w = test_doubles(wide), *dz_w = test_doubles(wide), *dx_w = test_doubles(wide);
    double *x = test_doubles(n), *z = test_doubles(n), *dy = test_doubles(n);
    double *y = test_doubles(n), *dz = test_doubles(n), *dx = test_doubles(n);
    double s[2] = {0.6875, -0.59375}, ds[2] = {3, 5};
    if (whole) s[0] = mode == MIX_LERP ? 3 : 2, s[1] = -1;
    double* fill[5] = {x_w, z_w, dy_w, y_w, dz_w};
    for (int k = 0; k < 5; k++) {
        test_fill_normal(fill[k], wide, 10 + k, 1.0);
        if (whole) test_fill_whole(fill[k], wide, 10 + k, -4, 4);
    }
    for (size_t i = 0; i < wide; i++) dx_w[i] = y_w[i];
    test_mix_gather(x, x_w, N, C, ld, from);
    if (!one) test_mix_gather(z, z_w, N, C, ld, from);     // z stays 0: y = s[0] x
    test_mix_gather(dy, dy_w, N, C, ld, from);
    test_mix_gather(dz, dz_w, N, C, ld, from);
    floatX *x_d = test_upload(x_w, wide), *z_d = test_upload(z_w, wide);
    floatX *dy_d = test_upload(dy_w, wide), *y_d = test_upload(y_w, wide);
    floatX *dz_d = test_upload(dz_w, wide), *dx_d = test_upload(dx_w, wide);
    float *s_d = test_upload_float(s, 2), *ds_d = test_upload_float(ds, 2);
    float* scratch = test_device_float(mix_scratch_floats(N, C));
    const floatX* z_or_null = one ? NULL : z_d + from;

    double a, b, largest = 0, products[2] = {0, 0};
    oracle_mix_weights(&a, &b, s, mode);
    for (size_t i = 0; i < n; i++) {
        double forward = fabs(a * x[i]) + fabs(b * z[i]), backward = fabs(b * dy[i]) + fabs(dz[i]);
        if (forward > largest) largest = forward;
        if (backward > largest) largest = backward;
        products[0] += fabs(dy[i]) * (mode == MIX_PAIR ? fabs(x[i]) : fabs(x[i]) + fabs(z[i]));
        products[1] += fabs(dy[i] * z[i]);
    }
    double abs_tol = whole ? 0 : 3 * u * largest, rel_tol = whole ? 0 : TEST_EPS;
    double adds = whole ? 0 : 8 + 8 + 13 + (mix_blocks(N, C) / 256 + 1) + 13 + 3;
    const char* label = mode == MIX_PAIR ? "pair" : mode == MIX_SKIP ? "skip" : "lerp";

    mix_forward(y_d + from, x_d + from, z_or_null, s_d, mode, N, C, ld, ld, ld, 0);
    oracle_mix_forward(y, x, z, s, mode, N, C);
    test_mix_scatter(y_w, y, N, C, ld, from);
    snprintf(what, sizeof what, "mix_forward %s N=%d C=%d ld=%d", label, N, C, ld);
    test_compare_device(what, y_d, y_w, wide, abs_tol, rel_tol);

    mix_backward(dx_d + from, one ? NULL : dz_d + from, ds_d, dy_d + from,
                 mode == MIX_SKIP ? NULL : x_d + from, z_or_null, s_d, mode, N, C, ld, ld, ld, ld,
                 ld, scratch, 0);
    float *ds_got = test_download_float(ds_d, 2), *dx_got = test_download(dx_d, wide);
    oracle_mix_backward(dx, dz, ds, dy, x, z, s, mode, N, C);
    test_mix_scatter(dx_w, dx, N, C, ld, from);
    if (!one) test_mix_scatter(dz_w, dz, N, C, ld, from);
    snprintf(what, sizeof what, "mix_backward dx %s N=%d C=%d ld=%d", label, N, C, ld);
    test_compare(what, dx_got, dx_w, wide, abs_tol, rel_tol);
    snprintf(what, sizeof what, "mix_backward dz %s N=%d C=%d ld=%d", label, N, C, ld);
    test_compare_device(what, dz_d, dz_w, wide, abs_tol, rel_tol);
    for (int k = 0; k < 2; k++) {
        snprintf(what, sizeof what, "mix_backward ds[%d] %s N=%d C=%d ld=%d", k, label, N, C, ld);
        test_compare(what, ds_got + k, ds + k, 1, adds * u * products[k], whole ? 0 : u);
    }

    // each output alone, dx in the place of dy, y in the place of x: equal bits
    double start[2] = {3, 5};
    test_put_float(ds_d, start, 2);
    mix_backward(NULL, NULL, ds_d, dy_d + from, x_d + from, z_or_null, s_d, mode, N, C, 0, 0, ld,
                 ld, ld, scratch, 0);
    float* ds_again = test_download_float(ds_d, 2);
    test_same_bits("mix_backward ds alone", ds_again, ds_got, 2 * sizeof(float));
    test_put(dx_d, dz_w, wide);
    mix_backward(dy_d + from, NULL, NULL, dy_d + from, NULL, NULL, s_d, mode, N, C, ld, 0, ld, 0, 0,
                 NULL, 0);
    float* dx_again = test_download(dy_d, wide);
    test_mix_scatter(dy_w, dx, N, C, ld, from);
    test_compare("mix_backward dx over dy", dx_again, dy_w, wide, abs_tol, rel_tol);
    mix_forward(x_d + from, x_d + from, z_or_null, s_d, mode, N, C, ld, ld, ld, 0);
    test_mix_scatter(x_w, y, N, C, ld, from);
    test_compare_device("mix_forward over x", x_d, x_w, wide, abs_tol, rel_tol);

    free(ds_got), free(dx_got), free(ds_again), free(dx_again);
    double* doubles[12] = {x_w, z_w, dy_w, y_w, dz_w, dx_w, x, z, dy, y, dz, dx};
    for (int k = 0; k < 12; k++) free(doubles[k]);
    cudaFree(x_d), cudaFree(z_d), cudaFree(dy_d), cudaFree(y_d), cudaFree(dz_d), cudaFree(dx_d);
    cudaFree(s_d), cudaFree(ds_d), cudaFree(scratch);
}

// A NaN anywhere reaches its own element and the scalar's gradient.
static void test_mix_nan(void) {
    const int N = 3, C = 64;
    double x[N * C], dx[N * C], s = 0.5, ds = 0;
    test_fill_normal(x, N * C, 20, 1.0);
    x[70] = NAN;
    for (int i = 0; i < N * C; i++) dx[i] = 0.5 * x[i];
    floatX *x_d = test_upload(x, N * C), *dx_d = test_upload(x, N * C);
    float *s_d = test_upload_float(&s, 1), *ds_d = test_upload_float(&ds, 1);
    float* scratch = test_device_float(mix_scratch_floats(N, C));
    mix_backward(dx_d, NULL, ds_d, x_d, x_d, x_d, s_d, MIX_LERP, N, C, C, 0, C, C, C, scratch, 0);
    ds = NAN;
    test_compare_device("mix_backward of a NaN: dx", dx_d, dx, N * C, 0, TEST_EPS);
    test_compare_device_float("mix_backward of a NaN: ds", ds_d, &ds, 1, 0, 0);
    cudaFree(x_d), cudaFree(dx_d), cudaFree(s_d), cudaFree(ds_d), cudaFree(scratch);
}

static void test_mix(void) {
    // one chunk; less than a block; the blocks' parts in one warp, and in more than one
    const int sizes[][2] = {{1, 8}, {5, 64}, {33, 96}, {171, 768}, {6200, 96}};
    for (int i = 0; i < 5; i++) {
        for (int m = 0; m < 3; m++) {
            test_mix_case((MixMode)m, sizes[i][0], sizes[i][1], i == 1 || i == 2, false, false);
            if (i < 4) test_mix_case((MixMode)m, sizes[i][0], sizes[i][1], i == 2, true, false);
        }
    }
    test_mix_case(MIX_PAIR, 33, 96, true, false, true);
    test_mix_nan();
}
