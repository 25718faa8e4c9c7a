/*
rmsnorm: llmc/rmsnorm.cuh against oracle.h.

Allowed, with u = 2^-24. A sum of squares passes through at most 8 additions in a lane's chunks (C
<= 2304), 3 within a chunk, 5 across the lanes and a product: 17 u relative, of which the root keeps
half; root, addition of eps and quotients add 4: rstd is right to 13 u, y to 14 u and one rounding
to floatX. Backward, the mean m of dy y is off by at most 18 u mean|dy y|, so dx by rstd (18 u |y|
mean|dy y| + 4 u (|dy| + |y m|)) and one rounding to floatX; the largest such bound over all rows is
allowed everywhere. The golden file's values are float, made by the same number of operations, so
twice that is allowed; it is read in the fp32 build.
*/
#pragma once
#include "../llmc/rmsnorm.cuh"
#include "../llmc/safetensors.h"
#include "oracle.h"
#include "test.h"

static void test_rmsnorm_forward_case(int N, int C, double eps, double scale) {
    const double u = 0x1p-24;
    size_t n = (size_t)N * C;
    char what[128];
    double *x = test_doubles(n + C), *r = test_doubles(n), *y = test_doubles(n);
    double *sum = test_doubles(n), *rstd = test_doubles(N + 1);
    test_fill_normal(x, n, C, scale);
    test_fill_normal(r, n, C + 1, scale);
    for (int c = 0; c < C; c++) x[n + c] = 7;          // a row behind the last, to stay as it is
    floatX *x_d = test_upload(x, n), *r_d = test_upload(r, n);
    floatX *y_d = test_upload(x, n + C), *sum_d = test_upload(x, n + C);
    rstd[N] = 7;
    float* rstd_d = test_upload_float(rstd, N + 1);

    rmsnorm_forward(y_d, rstd_d, x_d, N, C, (float)eps, 0);
    oracle_rmsnorm_forward(y, rstd, x, N, C, (float)eps);
    snprintf(what, sizeof what, "rmsnorm_forward y N=%d C=%d eps=%g", N, C, eps);
    test_compare_device(what, y_d, y, n, 0, TEST_EPS + 14 * u);
    snprintf(what, sizeof what, "rmsnorm_forward rstd N=%d C=%d eps=%g", N, C, eps);
    test_compare_device_float(what, rstd_d, rstd, N + 1, 0, 13 * u);
    test_compare_device("rmsnorm_forward leaves the next row", y_d + n, x + n, C, 0, 0);
    float* first = test_download(y_d, n);
    rmsnorm_forward(y_d, rstd_d, x_d, N, C, (float)eps, 0);
    float* second = test_download(y_d, n);
    test_same_bits("rmsnorm_forward twice", first, second, n * sizeof(float));

    // y and rstd belong to the sum as it was stored
    residual_rmsnorm_forward(sum_d, y_d, rstd_d, x_d, r_d, N, C, (float)eps, 0);
    oracle_residual_add(sum, x, r, n);
    snprintf(what, sizeof what, "residual_rmsnorm_forward sum N=%d C=%d", N, C);
    test_compare_device(what, sum_d, sum, n, 0, TEST_EPS + u);
    float* stored = test_download(sum_d, n);
    for (size_t i = 0; i < n; i++) sum[i] = stored[i];
    oracle_rmsnorm_forward(y, rstd, sum, N, C, (float)eps);
    snprintf(what, sizeof what, "residual_rmsnorm_forward y N=%d C=%d", N, C);
    test_compare_device(what, y_d, y, n, 0, TEST_EPS + 14 * u);
    test_compare_device_float("residual_rmsnorm_forward rstd", rstd_d, rstd, N, 0, 13 * u);
    test_compare_device("residual_rmsnorm_forward leaves the next row", sum_d + n, x + n, C, 0, 0);

    // the sum in the place of x, then of r; y in the place of x
    float *y_stored = test_download(y_d, n), *again;
    residual_rmsnorm_forward(r_d, y_d, rstd_d, x_d, r_d, N, C, (float)eps, 0);
    again = test_download(y_d, n);
    test_same_bits("residual_rmsnorm_forward over r: y", again, y_stored, n * sizeof(float));
    free(again);
    test_put(r_d, r, n);
    residual_rmsnorm_forward(x_d, y_d, rstd_d, x_d, r_d, N, C, (float)eps, 0);
    again = test_download(x_d, n);
    test_same_bits("residual_rmsnorm_forward over x: sum", again, stored, n * sizeof(float));
    free(again);
    rmsnorm_forward(x_d, rstd_d, x_d, N, C, (float)eps, 0);
    again = test_download(x_d, n);
    test_same_bits("rmsnorm_forward over x", again, y_stored, n * sizeof(float));
    free(again), free(first), free(second), free(stored), free(y_stored);
    free(x), free(r), free(y), free(sum), free(rstd);
    cudaFree(x_d), cudaFree(r_d), cudaFree(y_d), cudaFree(sum_d), cudaFree(rstd_d);
}

static double test_rmsnorm_backward_bound(const double* dy, const double* y, const double* rstd,
                                          int N, int C) {
    double worst = 0;
    for (int n = 0; n < N; n++) {
        double mean = 0, mean_abs = 0;
        for (int c = 0; c < C; c++) {
            double p = dy[(size_t)n * C + c] * y[(size_t)n * C + c];
            mean += p / C;
            mean_abs += fabs(p) / C;
        }
        for (int c = 0; c < C; c++) {
            double a = fabs(dy[(size_t)n * C + c]), b = fabs(y[(size_t)n * C + c]);
            double bound = rstd[n] * (18 * b * mean_abs + 4 * (a + b * fabs(mean)));
            if (bound > worst) worst = bound;
        }
    }
    return 0x1p-24 * worst;
}

static void test_rmsnorm_backward_case(int N, int C, double scale) {
    const double u = 0x1p-24, eps = 0x1p-23;
    size_t n = (size_t)N * C;
    char what[128];
    double *x = test_doubles(n), *y = test_doubles(n), *rstd = test_doubles(N);
    double *dy = test_doubles(n + C), *dx = test_doubles(n), *old = test_doubles(n);
    test_fill_normal(x, n, C, scale);
    test_fill_normal(dy, n, C + 1, 1.0);
    test_fill_normal(old, n, C + 2, 0.5 / scale);
    for (int c = 0; c < C; c++) dy[n + c] = 7;
    oracle_rmsnorm_forward(y, rstd, x, N, C, eps);
    for (size_t i = 0; i < n; i++) y[i] = test_round(y[i]);
    for (int i = 0; i < N; i++) rstd[i] = (float)rstd[i];
    floatX *dy_d = test_upload(dy, n + C), *y_d = test_upload(y, n);
    floatX *dx_d = test_upload(dy, n + C), *old_d = test_upload(old, n);
    float* rstd_d = test_upload_float(rstd, N);
    double bound = test_rmsnorm_backward_bound(dy, y, rstd, N, C);

    rmsnorm_backward(dx_d, dy_d, y_d, rstd_d, N, C, false, 0);
    oracle_rmsnorm_backward(dx, dy, y, rstd, N, C, false);
    snprintf(what, sizeof what, "rmsnorm_backward N=%d C=%d", N, C);
    test_compare_device(what, dx_d, dx, n, bound, TEST_EPS);
    test_compare_device("rmsnorm_backward leaves the next row", dx_d + n, dy + n, C, 0, 0);
    float* first = test_download(dx_d, n);

    rmsnorm_backward(old_d, dy_d, y_d, rstd_d, N, C, true, 0);
    for (size_t i = 0; i < n; i++) dx[i] = old[i];
    oracle_rmsnorm_backward(dx, dy, y, rstd, N, C, true);
    snprintf(what, sizeof what, "rmsnorm_backward accumulating N=%d C=%d", N, C);
    test_compare_device(what, old_d, dx, n, bound, TEST_EPS + u);

    rmsnorm_backward(dy_d, dy_d, y_d, rstd_d, N, C, false, 0);
    float* again = test_download(dy_d, n);
    test_same_bits("rmsnorm_backward over dy", again, first, n * sizeof(float));
    free(first), free(again), free(x), free(y), free(rstd), free(dy), free(dx), free(old);
    cudaFree(dy_d), cudaFree(y_d), cudaFree(dx_d), cudaFree(old_d), cudaFree(rstd_d);
}

// Rows of ±2^k: mean square 4^k, rstd 2^-k, y ±1; with dy whole and C a power of two the mean of dy
// y is 1: dx = rstd (dy - y) is C/8 - 1 or 1 times a power of two, and nothing rounds up to C =
// 1024.
static void test_rmsnorm_exact(int N, int C) {
    size_t n = (size_t)N * C;
    double *x = test_doubles(n), *y = test_doubles(n), *rstd = test_doubles(N);
    double *dy = test_doubles(n), *dx = test_doubles(n);
    for (size_t i = 0; i < n; i++) {
        x[i] = ldexp(test_random(5, i) % 2 ? 1 : -1, (int)(i / C) % 9 - 4);
        dy[i] = i % C < 8 ? C / 8.0 : 0;               // the mean of dy y is a whole number
        dy[i] *= x[i] < 0 ? -1 : 1;
    }
    floatX *x_d = test_upload(x, n), *dy_d = test_upload(dy, n);
    float* rstd_d = test_upload_float(rstd, N);
    rmsnorm_forward(x_d, rstd_d, x_d, N, C, 0.0f, 0);
    rmsnorm_backward(dy_d, dy_d, x_d, rstd_d, N, C, false, 0);
    oracle_rmsnorm_forward(y, rstd, x, N, C, 0);
    oracle_rmsnorm_backward(dx, dy, y, rstd, N, C, false);
    test_compare_device("rmsnorm_forward exact y", x_d, y, n, 0, 0);
    test_compare_device_float("rmsnorm_forward exact rstd", rstd_d, rstd, N, 0, 0);
    test_compare_device("rmsnorm_backward exact", dy_d, dx, n, 0, 0);
    free(x), free(y), free(rstd), free(dy), free(dx);
    cudaFree(x_d), cudaFree(dy_d), cudaFree(rstd_d);
}

// Row 0 zero, row 1 with a NaN, row 2 with a NaN gradient, row 3 tiny, row 4 ordinary. Row 1 has to
// be NaN everywhere forward and backward, row 2 everywhere backward, and no other row anywhere.
static void test_rmsnorm_edges(int C) {
    const int N = 5;
    const double eps = 0x1p-23, u = 0x1p-24;
    size_t n = (size_t)N * C;
    double *x = test_doubles(n), *y = test_doubles(n), *rstd = test_doubles(N);
    double *dy = test_doubles(n), *dx = test_doubles(n);
    test_fill_normal(x, n, 6, 1.0);
    test_fill_normal(dy, n, 7, 1.0);
    for (int c = 0; c < C; c++) x[c] = 0, x[3 * C + c] *= 0x1p-80;
    x[C + C - 1] = NAN;
    dy[2 * C + 5] = NAN;
    floatX *x_d = test_upload(x, n), *dy_d = test_upload(dy, n), *y_d = test_device(n);
    float* rstd_d = test_upload_float(rstd, N);
    rmsnorm_forward(y_d, rstd_d, x_d, N, C, (float)eps, 0);
    rmsnorm_backward(dy_d, dy_d, y_d, rstd_d, N, C, false, 0);
    float *y_stored = test_download(y_d, n), *rstd_stored = test_download_float(rstd_d, N);
    oracle_rmsnorm_forward(y, rstd, x, N, C, eps);
    test_compare("rmsnorm_forward y of zero, NaN and tiny rows", y_stored, y, n, 0,
                 TEST_EPS + 14 * u);
    test_compare("rmsnorm_forward rstd of zero, NaN and tiny rows", rstd_stored, rstd, N, 0,
                 13 * u);
    for (size_t i = 0; i < n; i++) y[i] = y_stored[i];
    for (int i = 0; i < N; i++) rstd[i] = rstd_stored[i];
    oracle_rmsnorm_backward(dx, dy, y, rstd, N, C, false);
    double bound = test_rmsnorm_backward_bound(dy, y, rstd, 1, C);      // row 0, the largest rstd
    test_compare_device("rmsnorm_backward of zero, NaN and tiny rows", dy_d, dx, n, bound,
                        TEST_EPS);
    free(y_stored), free(rstd_stored);
    free(x), free(y), free(rstd), free(dy), free(dx);
    cudaFree(x_d), cudaFree(dy_d), cudaFree(y_d), cudaFree(rstd_d);
}

// 24 rows (8 of 768 columns), of which row 3 is tiny and row 4 zero: the gradients of these two are thousands of times
// the others', so each row is judged by its own bound.
static void test_rmsnorm_golden(int C, const char* eps_name, double eps) {
    const double u = 0x1p-24;
    const int N = C == 768 ? 8 : 24;
    size_t n = (size_t)N * C;
    SafeFile file;
    safetensors_open(&file, "test/golden/units/rms_norm.safetensors");
    double *a[4], *rstd = test_doubles(N), *y = test_doubles(n);
    const char* parts[4] = {"x", "dy", "y", "dx"};
    for (int k = 0; k < 4; k++) {
        char name[64];
        snprintf(name, sizeof name, "rms.D%d.%s%s%s", C, k < 2 ? "" : eps_name, k < 2 ? "" : ".",
                 parts[k]);
        const float* data = (const float*)safetensors_data(&file, name, SAFE_F32, (int64_t)n);
        a[k] = test_doubles(n);
        for (size_t i = 0; i < n; i++) a[k][i] = data[i];
    }
    floatX *x_d = test_upload(a[0], n), *dy_d = test_upload(a[1], n);
    float* rstd_d = test_upload_float(rstd, N);
    rmsnorm_forward(x_d, rstd_d, x_d, N, C, (float)eps, 0);
    rmsnorm_backward(dy_d, dy_d, x_d, rstd_d, N, C, false, 0);
    char what[96];
    snprintf(what, sizeof what, "rmsnorm_forward golden C=%d %s", C, eps_name);
    test_compare_device(what, x_d, a[2], n, 0, 30 * u);
    snprintf(what, sizeof what, "rmsnorm_backward golden C=%d %s", C, eps_name);
    oracle_rmsnorm_forward(y, rstd, a[0], N, C, (float)eps);
    for (int r = 0; r < N; r++) {
        size_t row = (size_t)r * C;
        double bound = test_rmsnorm_backward_bound(a[1] + row, y + row, rstd + r, 1, C);
        test_compare_device(what, dy_d + row, a[3] + row, C, 2 * bound, 32 * u);
    }
    for (int k = 0; k < 4; k++) free(a[k]);
    free(rstd), free(y);
    cudaFree(x_d), cudaFree(dy_d), cudaFree(rstd_d);
    safetensors_close(&file);
}

static void test_residual_add(size_t n) {
    double *x = test_doubles(n), *r = test_doubles(n), *sum = test_doubles(n);
    test_fill_normal(x, n, 8, 1.0);
    test_fill_normal(r, n, 9, 1.0);
    floatX *x_d = test_upload(x, n), *r_d = test_upload(r, n), *sum_d = test_device(n);
    residual_add(sum_d, x_d, r_d, n, 0);
    oracle_residual_add(sum, x, r, n);
    test_compare_device("residual_add", sum_d, sum, n, 0, TEST_EPS + 0x1p-24);
    float* first = test_download(sum_d, n);
    residual_add(r_d, x_d, r_d, n, 0);
    float* again = test_download(r_d, n);
    test_same_bits("residual_add over r", first, again, n * sizeof(float));
    test_fill_whole(x, n, 10, -100, 100);
    test_fill_whole(r, n, 11, -100, 100);
    test_put(x_d, x, n);
    test_put(r_d, r, n);
    residual_add(x_d, x_d, r_d, n, 0);
    oracle_residual_add(sum, x, r, n);
    test_compare_device("residual_add of whole numbers over x", x_d, sum, n, 0, 0);
    free(first), free(again), free(x), free(r), free(sum);
    cudaFree(x_d), cudaFree(r_d), cudaFree(sum_d);
}

static void test_rmsnorm(void) {
    // lanes per row 2, 4, .. 32; C/8 a multiple of them and not; rows that do not fill a block;
    // C beyond what a lane keeps in registers (1032, 2240)
    const int sizes[][2] = {{1, 64}, {33, 64}, {5, 96}, {3, 120}, {17, 128}, {7, 192}, {1, 256},
                            {37, 384}, {9, 768}, {21, 768}, {4, 1024}, {3, 1032}, {2, 2240}};
    for (int i = 0; i < 13; i++) {
        test_rmsnorm_forward_case(sizes[i][0], sizes[i][1], i % 2 ? 0x1p-7 : 0x1p-23, 1.0);
        test_rmsnorm_backward_case(sizes[i][0], sizes[i][1], i % 2 ? 1.0 : 0.25);
    }
    test_rmsnorm_exact(11, 64);
    test_rmsnorm_exact(3, 256);
    test_rmsnorm_exact(2, 1024);
    test_rmsnorm_edges(64);
    test_rmsnorm_edges(768);
    for (int i = 0; !FLOATX_IS_BF16 && i < 3; i++) {
        const int C[3] = {64, 128, 768};
        test_rmsnorm_golden(C[i], "eps32", 0x1p-23);
        test_rmsnorm_golden(C[i], "eps_bf16", 0x1p-7);
    }
    test_residual_add(8);
    test_residual_add(2056);
}
