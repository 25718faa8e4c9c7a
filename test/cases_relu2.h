/*
relu2: llmc/relu2.cuh against oracle.h.

Allowed, with u = 2^-24: forward rounds the square once to float and once to floatX; backward is a
square root, two products (the factor 2 is exact) and a rounding to floatX. Measured against x
instead of the saved y there is the rounding of y besides, of which the square root keeps half. The
golden file's values are float and went through as many roundings again; it is read in the fp32
build.
*/
#pragma once
#include "../llmc/relu2.cuh"
#include "../llmc/safetensors.h"
#include "oracle.h"
#include "test.h"

// Forward from x, backward from the y that the kernel stored.
static void test_relu2_case(const char* name, const double* x, const double* dy, size_t n,
                            bool exact) {
    const double u = 0x1p-24;
    double *y = test_doubles(n), *root = test_doubles(n), *dx = test_doubles(n);
    floatX *x_d = test_upload(x, n), *dy_d = test_upload(dy, n);
    floatX *y_d = test_device(n), *dx_d = test_device(n);
    relu2_forward(y_d, x_d, n, 0);
    relu2_backward(dx_d, dy_d, y_d, n, 0);
    float *y_stored = test_download(y_d, n), *dx_stored = test_download(dx_d, n);

    char what[128];
    snprintf(what, sizeof what, "relu2_forward %s n=%zu", name, n);
    oracle_relu2_forward(y, x, n);
    test_compare(what, y_stored, y, n, 0, exact ? 0 : TEST_EPS + 2 * u);
    snprintf(what, sizeof what, "relu2_backward %s n=%zu", name, n);
    for (size_t i = 0; i < n; i++) root[i] = sqrt((double)y_stored[i]);
    oracle_relu2_backward(dx, dy, root, n);
    test_compare(what, dx_stored, dx, n, 0, exact ? 0 : TEST_EPS + 4 * u);
    snprintf(what, sizeof what, "relu2_backward from x %s n=%zu", name, n);
    oracle_relu2_backward(dx, dy, x, n);
    test_compare(what, dx_stored, dx, n, 0, exact ? 0 : 1.5 * TEST_EPS + 5 * u);

    // in place, which is also a second run
    relu2_forward(x_d, x_d, n, 0);
    relu2_backward(dy_d, dy_d, y_d, n, 0);
    float *y_again = test_download(x_d, n), *dx_again = test_download(dy_d, n);
    test_same_bits("relu2_forward in place", y_again, y_stored, n * sizeof(float));
    test_same_bits("relu2_backward in place", dx_again, dx_stored, n * sizeof(float));
    free(y), free(root), free(dx), free(y_stored), free(dx_stored), free(y_again), free(dx_again);
    cudaFree(x_d), cudaFree(dy_d), cudaFree(y_d), cudaFree(dx_d);
}

static void test_relu2_random(size_t n) {
    double *x = test_doubles(n), *dy = test_doubles(n);
    test_fill_normal(x, n, 1, 1.5);
    test_fill_normal(dy, n, 2, 1.0);
    test_relu2_case("normal", x, dy, n, false);
    test_fill_whole(x, n, 3, -11, 11);         // 2 * 11 * 8 < 256: no product needs a rounding, in
    for (size_t i = 0; i < n; i++) dy[i] = 1 << test_random(4, i) % 4;     // bf16 neither
    test_relu2_case("whole numbers", x, dy, n, true);
    free(x), free(dy);
}

static void test_relu2_edges(void) {
    const double inf = INFINITY, nan = NAN;
    double x[8] = {nan, -inf, inf, -0.0, 0.0, -3.0, 0x1p-60, 2.0}, dy[8], y[8], dx[8];
    for (int i = 0; i < 8; i++) dy[i] = 1.0, y[i] = x[i] * x[i], dx[i] = 2 * x[i];
    y[1] = y[5] = dx[1] = dx[5] = 0;
    floatX *x_d = test_upload(x, 8), *dy_d = test_upload(dy, 8);
    relu2_forward(x_d, x_d, 8, 0);
    relu2_backward(dy_d, dy_d, x_d, 8, 0);
    test_compare_device("relu2_forward of NaN, inf, -0, tiny", x_d, y, 8, 0, TEST_EPS);
    test_compare_device("relu2_backward of NaN, inf, -0, tiny", dy_d, dx, 8, 0, TEST_EPS);
    cudaFree(x_d), cudaFree(dy_d);
}

// The file has 33 x 129 values, no multiple of 8: zeros follow them.
static void test_relu2_golden(void) {
    const double u = 0x1p-24;
    const size_t n = 33 * 129, padded = n + 7;
    SafeFile file;
    safetensors_open(&file, "test/golden/units/relu2.safetensors");
    const char* names[4] = {"x", "dy", "y", "dx"};
    double* a[4];
    for (int k = 0; k < 4; k++) {
        const float* data = (const float*)safetensors_data(&file, names[k], SAFE_F32, n);
        a[k] = test_doubles(padded);
        for (size_t i = 0; i < n; i++) a[k][i] = data[i];
    }
    floatX *x_d = test_upload(a[0], padded), *dy_d = test_upload(a[1], padded);
    relu2_forward(x_d, x_d, padded, 0);
    relu2_backward(dy_d, dy_d, x_d, padded, 0);
    test_compare_device("relu2_forward golden", x_d, a[2], padded, 0, 4 * u);
    test_compare_device("relu2_backward golden", dy_d, a[3], padded, 0, 8 * u);
    for (int k = 0; k < 4; k++) free(a[k]);
    cudaFree(x_d), cudaFree(dy_d);
    safetensors_close(&file);
}

static void test_relu2(void) {
    const size_t sizes[] = {8, 24, 2040, 2048, 2056, 64 * 3072};
    for (int i = 0; i < 6; i++) test_relu2_random(sizes[i]);
    test_relu2_edges();
    if (!FLOATX_IS_BF16) test_relu2_golden();
}
