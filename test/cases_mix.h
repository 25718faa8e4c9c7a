/*
mix: llmc/mix.cuh against oracle.h.

Allowed, with u = 2^-24: a x + b z rounds twice in float and 1 - s once, so y is right to 3 u (|a x|
+ |b z|) and one rounding to floatX; dx and dz likewise. A gradient of a scalar passes through at
most 8 + 8 + 5 additions in a warp, ceil(warps/256) + 13 in the last block, a product and a
difference: allowed is that many u times the sum of the products' magnitudes, and one more for ds
itself. Whole numbers are exact throughout.

The gate's sigmoid passes through an exponential right to 4 u, one addition and one division: its
weight is right to 6 u, so that all of MIX_GATE gets 6 u more, and its slope to 12 u.
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

// A tensor under test: N rows of C values inside rows of ld, from column `from`.
typedef struct {
    int ld, from;
    size_t n;            // of the whole
    double *wide, *slice;
    floatX* device;
} MixTensor;

static MixTensor test_mix_tensor(int N, int C, int ld, int from, uint64_t seed, bool whole) {
    MixTensor t = {ld, from, (size_t)N * ld, NULL, NULL, NULL};
    t.wide = test_doubles(t.n), t.slice = test_doubles((size_t)N * C);
    test_fill_normal(t.wide, t.n, seed, 1.0);
    if (whole) test_fill_whole(t.wide, t.n, seed, -4, 4);
    test_mix_gather(t.slice, t.wide, N, C, ld, from);
    t.device = test_upload(t.wide, t.n);
    return t;
}

// The device's tensor holds the slice, and beside it what it held before.
static void test_mix_compare(const char* what, MixTensor* t, int N, int C, double abs_tol,
                             double rel_tol) {
    test_mix_scatter(t->wide, t->slice, N, C, t->ld, t->from);
    test_compare_device(what, t->device, t->wide, t->n, abs_tol, rel_tol);
}

static void test_mix_free(MixTensor* t) {
    free(t->wide), free(t->slice);
    cudaFree(t->device);
}

static const char* const MIX_LABELS[] = {"pair", "skip", "lerp", "gate", "minus"};

// strided: every tensor is a slice of a wider one, each with its own row stride. one: z is NULL.
static void test_mix_case(MixMode mode, int N, int C, bool strided, bool whole, bool one) {
    const double u = 0x1p-24;
    const int wider = strided ? C : 0, from = strided ? 8 : 0;
    size_t n = (size_t)N * C;
    char what[128];
    MixTensor x = test_mix_tensor(N, C, C + wider, from, 10, whole);
    MixTensor z = test_mix_tensor(N, C, C + 2 * wider, from, 11, whole);
    MixTensor dy = test_mix_tensor(N, C, C + 3 * wider, from, 12, whole);
    MixTensor y = test_mix_tensor(N, C, C + 4 * wider, from, 13, whole);
    MixTensor dz = test_mix_tensor(N, C, C + 5 * wider, from, 14, whole);
    MixTensor dx = test_mix_tensor(N, C, C + 6 * wider, from, 15, whole);
    double s[2] = {0.6875, -0.59375}, ds[2] = {3, 5};
    bool gate = mode == MIX_GATE, keeps_x = mode != MIX_PAIR && mode != MIX_LERP;
    if (whole) s[0] = mode == MIX_LERP ? 3 : 2, s[1] = -1;
    for (size_t i = 0; one && i < n; i++) z.slice[i] = 0;          // y = s[0] x
    float *s_d = test_upload_float(s, 2), *ds_d = test_upload_float(ds, 2);
    float* scratch = test_device_float(mix_scratch_floats(N, C));
    const floatX *x_d = x.device + from, *z_d = one ? NULL : z.device + from;
    const floatX* dy_d = dy.device + from;

    double a, b, largest = 0, products[2] = {0, 0};
    oracle_mix_weights(&a, &b, s, mode);
    for (size_t i = 0; i < n; i++) {
        double d = dy.slice[i], xi = x.slice[i], zi = z.slice[i];
        double forward = fabs(a * xi) + fabs(b * zi), backward = fabs(b * d) + fabs(dz.slice[i]);
        if (forward > largest) largest = forward;
        if (backward > largest) largest = backward;
        products[0] += fabs(d) * (mode == MIX_PAIR ? fabs(xi) : fabs(xi) + fabs(zi)) *
                       (gate ? b * (1 - b) : 1);
        products[1] += fabs(d * zi);
    }
    double abs_tol = whole ? 0 : (gate ? 9 : 3) * u * largest, rel_tol = whole ? 0 : TEST_EPS;
    double adds = 8 + 8 + 5 + (8 * mix_blocks(N, C) / 256 + 1) + 13 + 3 + (gate ? 12 : 0);
    if (whole) adds = 0;
    const char* label = MIX_LABELS[mode];

    mix_forward(y.device + from, x_d, z_d, s_d, mode, N, C, y.ld, x.ld, z.ld, 0);
    oracle_mix_forward(y.slice, x.slice, z.slice, s, mode, N, C);
    snprintf(what, sizeof what, "mix_forward %s N=%d C=%d ld=%d", label, N, C, y.ld);
    test_mix_compare(what, &y, N, C, abs_tol, rel_tol);

    mix_backward(dx.device + from, one ? NULL : dz.device + from, ds_d, dy_d,
                 keeps_x ? NULL : x_d, z_d, s_d, mode, N, C, dx.ld, dz.ld, dy.ld, x.ld,
                 z.ld, scratch, 0);
    float* ds_got = test_download_float(ds_d, 2);
    double* dz_slice = test_doubles(n);                     // stays what it is if dz is NULL
    oracle_mix_backward(dx.slice, one ? dz_slice : dz.slice, ds, dy.slice, x.slice, z.slice, s,
                        mode, N, C);
    snprintf(what, sizeof what, "mix_backward dx %s N=%d C=%d ld=%d", label, N, C, dx.ld);
    test_mix_compare(what, &dx, N, C, abs_tol, rel_tol);
    snprintf(what, sizeof what, "mix_backward dz %s N=%d C=%d ld=%d", label, N, C, dz.ld);
    test_mix_compare(what, &dz, N, C, abs_tol, rel_tol);
    for (int k = 0; k < 2; k++) {
        snprintf(what, sizeof what, "mix_backward ds[%d] %s N=%d C=%d", k, label, N, C);
        test_compare(what, ds_got + k, ds + k, 1, adds * u * products[k], whole ? 0 : u);
    }

    // ds alone: equal bits. dx in the place of dy; y in the place of x.
    double start[2] = {3, 5};
    test_put_float(ds_d, start, 2);
    mix_backward(NULL, NULL, ds_d, dy_d, x_d, z_d, s_d, mode, N, C, 0, 0, dy.ld, x.ld, z.ld,
                 scratch, 0);
    float* ds_again = test_download_float(ds_d, 2);
    test_same_bits("mix_backward ds alone", ds_again, ds_got, 2 * sizeof(float));
    mix_backward(dy.device + from, NULL, NULL, dy_d, NULL, NULL, s_d, mode, N, C, dy.ld, 0, dy.ld,
                 0, 0, NULL, 0);
    memcpy(dy.slice, dx.slice, n * sizeof(double));
    test_mix_compare("mix_backward dx over dy", &dy, N, C, abs_tol, rel_tol);
    mix_forward(x.device + from, x_d, z_d, s_d, mode, N, C, x.ld, x.ld, z.ld, 0);
    memcpy(x.slice, y.slice, n * sizeof(double));
    test_mix_compare("mix_forward over x", &x, N, C, abs_tol, rel_tol);

    free(ds_got), free(ds_again), free(dz_slice);
    MixTensor* tensors[6] = {&x, &z, &dy, &y, &dz, &dx};
    for (int k = 0; k < 6; k++) test_mix_free(tensors[k]);
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
        for (int m = 0; m < 5; m++) {
            test_mix_case((MixMode)m, sizes[i][0], sizes[i][1], i == 1 || i == 2, false, false);
            if (i == 4 || m == MIX_GATE) continue;               // a gate is no whole number
            test_mix_case((MixMode)m, sizes[i][0], sizes[i][1], i == 2, true, false);
        }
    }
    test_mix_case(MIX_PAIR, 33, 96, true, false, true);
    test_mix_nan();
}
