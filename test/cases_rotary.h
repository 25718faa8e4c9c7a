/*
rotary: llmc/rotary.cuh against oracle.h and golden files.

Allowed, with u = 2^-24 and e the rounding of floatX. Forward: rstd comes from a sum of D <= 128
squares in 16 + 3 additions and a root, 13 u; each element takes 3 roundings more and the one to
floatX. Backward is measured against the oracle's gradient at x, while the kernel starts from y as
stored: each y is off by e |y|, and so is the mean of dy y by e mean|dy y|; with |c| + |s| <= 1.5
that is 3 e of the larger term.

Tables: CUDA's cosf and sinf are right to 2 units in the last place, and the oracle's are rounded
once: 5 u of the value. Rounded to bf16 a few fall to the other side.
*/
#pragma once
#include "../llmc/rotary.cuh"
#include "../llmc/safetensors.h"
#include "../llmc/schedule.h"
#include "oracle.h"
#include "test.h"

typedef struct {
    int B, T, H, D, ld;
    double eps;
    bool norm_first, bf16_tables;
} RotaryCase;

// Between rows of ld columns, of which the first 2 H D are heads, and (N, 2H, D).
static void test_rotary_heads(double* heads, const double* wide, const RotaryCase* k) {
    int N = k->B * k->T, width = 2 * k->H * k->D;
    for (int n = 0; n < N; n++) {
        memcpy(heads + (size_t)n * width, wide + (size_t)n * k->ld, width * sizeof(double));
    }
}

static void test_rotary_wide(double* wide, const double* heads, const RotaryCase* k) {
    int N = k->B * k->T, width = 2 * k->H * k->D;
    for (int n = 0; n < N; n++) {
        memcpy(wide + (size_t)n * k->ld, heads + (size_t)n * width, width * sizeof(double));
    }
}

// What rotary_tables makes of the frequencies, as host arrays.
static void test_rotary_tables(float** c, float** s, const float* f, int T, int D, bool to_bf16) {
    size_t n = (size_t)T * D / 2;
    float *c_d = test_device_float(n), *s_d = test_device_float(n);
    rotary_tables(c_d, s_d, f, T, D, to_bf16, 0);
    *c = test_download_float(c_d, n), *s = test_download_float(s_d, n);
    cudaFree(c_d), cudaFree(s_d);
}

// bf16 tables: this share of the values, and one more, may have been rounded to the other side.
static void test_rotary_values(const char* what, const float* got, const double* want, size_t n,
                               bool bf16_tables, double share) {
    size_t differ = 0;
    for (size_t i = 0; i < n; i++) differ += got[i] != want[i];
    test_compare(what, got, want, n, 0, bf16_tables ? 0x1p-7 : 5 * 0x1p-24);
    if (bf16_tables) test_check(what, (double)differ, share * (double)n + 1);
}

static void test_rotary_case(const RotaryCase* k) {
    const double u = 0x1p-24;
    int N = k->B * k->T, heads = N * 2 * k->H, D = k->D, table = k->T * D / 2;
    size_t wide = (size_t)N * k->ld, n = (size_t)heads * D;
    double *x_w = test_doubles(wide), *dy_w = test_doubles(wide), *x = test_doubles(n);
    double *dy = test_doubles(n), *y = test_doubles(n), *dx = test_doubles(n);
    double *rstd = test_doubles(heads), *c = test_doubles(table), *s = test_doubles(table);
    float f[64], oracle_f[64], *c_f, *s_f;
    test_fill_normal(x_w, wide, 1, 0.5);
    test_fill_normal(dy_w, wide, 2, 1.0);
    for (int d = 0; d < D; d++) x_w[d] = 0;               // a head of zeros, and a tiny one
    for (int d = 0; d < D; d++) x_w[D + d] *= 0x1p-20;
    test_rotary_heads(x, x_w, k);
    test_rotary_heads(dy, dy_w, k);
    oracle_frequencies(oracle_f, D, 10000.0f);
    rotary_frequencies(f, D, 10000, false);
    test_same_bits("rotary_frequencies", f, oracle_f, D / 2 * sizeof(float));
    oracle_frequency_tables(c, s, f, k->T, D, k->bf16_tables);
    test_rotary_tables(&c_f, &s_f, f, k->T, D, k->bf16_tables);
    test_rotary_values("rotary_tables cos", c_f, c, table, k->bf16_tables, 1e-3);
    test_rotary_values("rotary_tables sin", s_f, s, table, k->bf16_tables, 1e-3);
    oracle_qknorm_rotary_forward(y, rstd, x, c, s, k->B, k->T, 2 * k->H, D, k->eps, k->norm_first);
    oracle_qknorm_rotary_backward(dx, dy, x, c, s, k->B, k->T, 2 * k->H, D, k->eps, k->norm_first);

    double forward = 0, backward = 0, through_y = 0;
    for (int h = 0; h < heads; h++) {
        double largest_y = 0, largest_dy = 0, mean = 0;
        for (int d = 0; d < D; d++) {
            largest_y = fmax(largest_y, fabs(y[h * D + d]));
            largest_dy = fmax(largest_dy, fabs(dy[h * D + d]));
            mean += fabs(dy[h * D + d] * y[h * D + d]) / D;
        }
        forward = fmax(forward, 1.5 * largest_y);
        backward = fmax(backward, rstd[h] * largest_dy);
        through_y = fmax(through_y, rstd[h] * largest_y * mean);
    }
    floatX *qk_d = test_upload(x_w, wide), *dqk_d = test_upload(dy_w, wide);
    float *c_d = test_upload_float(c, table), *s_d = test_upload_float(s, table);
    float* rstd_d = test_device_float(heads);
    char what[128], label[96];
    snprintf(label, sizeof label, "B=%d T=%d H=%d D=%d ld=%d %s first, %s tables", k->B, k->T, k->H,
             D, k->ld, k->norm_first ? "norm" : "rotation", k->bf16_tables ? "bf16" : "fp32");
    qknorm_rotary_forward(qk_d, rstd_d, c_d, s_d, N, k->T, k->H, D, k->ld, (float)k->eps,
                          k->norm_first, 0);
    qknorm_rotary_backward(dqk_d, qk_d, rstd_d, c_d, s_d, N, k->T, k->H, D, k->ld, k->ld,
                           k->norm_first, 0);
    test_rotary_wide(x_w, y, k);                          // what lies beside the heads stays
    test_rotary_wide(dy_w, dx, k);
    snprintf(what, sizeof what, "qknorm_rotary_forward %s", label);
    test_compare_device(what, qk_d, x_w, wide, 16 * u * forward, TEST_EPS);
    test_compare_device_float("qknorm_rotary_forward rstd", rstd_d, rstd, heads, 0, 14 * u);
    snprintf(what, sizeof what, "qknorm_rotary_backward %s", label);
    test_compare_device(what, dqk_d, dy_w, wide,
                        (3 * TEST_EPS + 40 * u) * through_y + 40 * u * backward, TEST_EPS);
    double* doubles[9] = {x_w, dy_w, x, dy, y, dx, rstd, c, s};
    for (int i = 0; i < 9; i++) free(doubles[i]);
    free(c_f), free(s_f);
    cudaFree(qk_d), cudaFree(dqk_d), cudaFree(c_d), cudaFree(s_d), cudaFree(rstd_d);
}

// A NaN makes its own head NaN, forward and backward, and no other.
static void test_rotary_nan(void) {
    enum { T = 3, H = 2, D = 64, WIDTH = 2 * H * D, NUMBER = T * WIDTH };
    double x[NUMBER], dy[NUMBER], ones[T * D / 2], zeros[T * D / 2];
    bool is_nan = true, others = true;
    test_fill_normal(x, NUMBER, 3, 1.0);
    test_fill_normal(dy, NUMBER, 4, 1.0);
    for (int i = 0; i < T * D / 2; i++) ones[i] = 1, zeros[i] = 0;
    x[WIDTH + D + 40] = NAN;                              // row 1, head 1
    floatX *qk_d = test_upload(x, NUMBER), *dqk_d = test_upload(dy, NUMBER);
    float *c_d = test_upload_float(ones, T * D / 2), *s_d = test_upload_float(zeros, T * D / 2);
    float* rstd_d = test_device_float(T * 2 * H);
    qknorm_rotary_forward(qk_d, rstd_d, c_d, s_d, T, T, H, D, WIDTH, 1e-6f, true, 0);
    qknorm_rotary_backward(dqk_d, qk_d, rstd_d, c_d, s_d, T, T, H, D, WIDTH, WIDTH, true, 0);
    float *y = test_download(qk_d, NUMBER), *dx = test_download(dqk_d, NUMBER);
    for (int i = 0; i < NUMBER; i++) {
        bool inside = i / D == 2 * H + 1;
        if (inside) is_nan = is_nan && isnan(y[i]) && isnan(dx[i]);
        else others = others && isfinite(y[i]) && isfinite(dx[i]);
    }
    test_true("qknorm_rotary of a NaN: its head is NaN", is_nan);
    test_true("qknorm_rotary of a NaN: the others are not", others);
    free(y), free(dx);
    cudaFree(qk_d), cudaFree(dqk_d), cudaFree(c_d), cudaFree(s_d), cudaFree(rstd_d);
}

// ---- golden files --------------------------------------------------------------------------

static double* test_rotary_read(const SafeFile* f, int n, const char* format, const char* set,
                                int D) {
    char name[64];
    snprintf(name, sizeof name, format, set, D);
    double* x = test_doubles(n);
    const SafeTensor* t = safetensors_find(f, name);
    bool is_bf16 = t && t->type == SAFE_BF16;
    const void* data = safetensors_data(f, name, is_bf16 ? SAFE_BF16 : SAFE_F32, n);
    for (int i = 0; i < n; i++) {
        uint32_t bits =
            is_bf16 ? (uint32_t)((const uint16_t*)data)[i] << 16 : ((const uint32_t*)data)[i];
        float value;
        memcpy(&value, &bits, 4);
        x[i] = value;
    }
    return x;
}

// The rotation alone: forward divided by rstd, and backward with y = 0 and rstd = 1. The file's
// (B, T, H, D) = (1, 40, 1, D) are taken as q, and again as k.
static void test_rotary_golden_set(const SafeFile* f, const char* set, int D) {
    enum { B = 1, T = 40, H = 1 };
    const double u = 0x1p-24;
    int n = B * T * H * D, table = T * D / 2, heads = B * T * H;
    double *c = test_rotary_read(f, table, "rot.%s.D%d.cos", set, D);
    double *s = test_rotary_read(f, table, "rot.%s.D%d.sin", set, D);
    double *x = test_rotary_read(f, n, "rot.%sD%d.x", "", D);
    double *dy = test_rotary_read(f, n, "rot.%sD%d.dy", "", D);
    double *y = test_rotary_read(f, n, "rot.%s.D%d.y", set, D);
    double *dx = test_rotary_read(f, n, "rot.%s.D%d.dx", set, D);
    double largest = 0;
    for (int i = 0; i < n; i++) largest = fmax(largest, 1.5 * fmax(fabs(x[i]), fabs(dy[i])));
    double *qk = test_doubles(2 * n), *dqk = test_doubles(2 * n), *ones = test_doubles(2 * heads);
    for (int row = 0; row < B * T; row++) {
        for (int i = 0; i < 2 * H * D; i++) {
            qk[row * 2 * H * D + i] = x[row * H * D + i % (H * D)];
            dqk[row * 2 * H * D + i] = dy[row * H * D + i % (H * D)];
        }
    }
    for (int i = 0; i < 2 * heads; i++) ones[i] = 1;
    floatX *qk_d = test_upload(qk, 2 * n), *dqk_d = test_upload(dqk, 2 * n), *zero_d;
    float *c_d = test_upload_float(c, table), *s_d = test_upload_float(s, table);
    float *rstd_d = test_device_float(2 * heads), *ones_d = test_upload_float(ones, 2 * heads);
    double* zero = test_doubles(2 * n);
    zero_d = test_upload(zero, 2 * n);
    qknorm_rotary_forward(qk_d, rstd_d, c_d, s_d, B * T, T, H, D, 2 * H * D, 1e-6f, true, 0);
    qknorm_rotary_backward(dqk_d, zero_d, ones_d, c_d, s_d, B * T, T, H, D, 2 * H * D, 2 * H * D,
                           true, 0);
    float *got = test_download(qk_d, 2 * n), *rstd = test_download_float(rstd_d, 2 * heads);
    for (int i = 0; i < 2 * n; i++) got[i] /= rstd[i / D];
    for (int row = 0; row < B * T; row++) {
        for (int i = 0; i < 2 * H * D; i++) {
            qk[row * 2 * H * D + i] = y[row * H * D + i % (H * D)];
            dqk[row * 2 * H * D + i] = dx[row * H * D + i % (H * D)];
        }
    }
    char what[96];
    snprintf(what, sizeof what, "rotation golden %s D=%d y", set, D);
    test_compare(what, got, qk, 2 * n, 6 * u * largest, 0);
    snprintf(what, sizeof what, "rotation golden %s D=%d dx", set, D);
    test_compare_device(what, dqk_d, dqk, 2 * n, 6 * u * largest, 0);
    double* doubles[10] = {c, s, x, dy, y, dx, qk, dqk, ones, zero};
    for (int i = 0; i < 10; i++) free(doubles[i]);
    free(got), free(rstd);
    cudaFree(qk_d), cudaFree(dqk_d), cudaFree(zero_d), cudaFree(c_d), cudaFree(s_d);
    cudaFree(rstd_d), cudaFree(ones_d);
}

// The file's tables come from a power and cosines in float: its frequencies may be 1 ulp, 2^-23, away
// from ours and its cosines another. Rounded to bf16 almost all are equal.
static void test_rotary_golden_tables(const SafeFile* f, int D) {
    int T = 1024, half = D / 2;
    float frequencies[64], *c, *s, *c_bf16, *s_bf16;
    double *first = test_rotary_read(f, 40 * half, "rot.%s.D%d.cos", "modern.f32", D);
    double *c_last = test_rotary_read(f, half, "rot.%s.D%d.cos_1023", "modern.f32", D);
    double *s_last = test_rotary_read(f, half, "rot.%s.D%d.sin_1023", "modern.f32", D);
    rotary_frequencies(frequencies, D, 10000, false);
    test_rotary_tables(&c, &s, frequencies, T, D, false);
    test_compare("rotary_tables golden cos, t < 40", c, first, 40 * half, 41 * 0x1p-23, 0);
    double worst = 0;
    for (int j = 0; j < half; j++) {
        double allowed = (1023 * pow(10000.0, -2.0 * j / D) + 1) * 0x1p-23;
        worst = fmax(worst, fabs(c[1023 * half + j] - c_last[j]) / allowed);
        worst = fmax(worst, fabs(s[1023 * half + j] - s_last[j]) / allowed);
    }
    test_check("rotary_tables golden, t = 1023, in units of what is allowed", worst, 1);
    double* rounded = test_rotary_read(f, 40 * half, "rot.%s.D%d.cos", "modern.bf16", D);
    test_rotary_tables(&c_bf16, &s_bf16, frequencies, 40, D, true);
    test_rotary_values("rotary_tables golden bf16", c_bf16, rounded, 40 * half, true, 1e-3);
    free(c), free(s), free(c_bf16), free(s_bf16), free(first), free(c_last), free(s_last);
    free(rounded);
}

// Tables of the file's own frequencies, after none to three changes of the window, at its 18
// positions: those up to 4095, and once all, with the frequencies that are not 0. The file's
// cosines are of another libm, whose last bit decides the rounding to bf16 in one cell of a few
// thousand.
static void test_rotary_golden_yarn(const SafeFile* f, int D, int change) {
    const int* positions = (const int*)safetensors_data(f, "positions", SAFE_I32, 18);
    char name[96], set[3][16];
    for (int far = 0; far <= (D == 64 && change == 3); far++) {
        int T = far ? 262144 : 4096, used = far ? D / 4 : D / 2, rows = 0;
        snprintf(name, sizeof name, "D%d.%d.freq", D, change);
        const float* frequencies = (const float*)safetensors_data(f, name, SAFE_F32, D / 2);
        float *c, *s, *exact, *unused, got[3][18 * 64];
        double want[3][18 * 64];
        test_rotary_tables(&c, &s, frequencies, T, 2 * used, true);
        test_rotary_tables(&exact, &unused, frequencies, T, 2 * used, false);
        const char* const kinds[3] = {"cos", "sin", "cos_f32"};
        const float* made[3] = {c, s, exact};
        double* file[3];
        for (int k = 0; k < 3; k++) {
            snprintf(set[k], sizeof set[k], "%d.%s", change, kinds[k]);
            file[k] = test_rotary_read(f, 9 * D, "D%2$d.%1$s", set[k], D);
        }
        for (int i = 0; i < 18; i++) {
            if (positions[i] >= T) continue;
            for (int k = 0; k < 3; k++) {
                for (int j = 0; j < used; j++) {
                    got[k][rows * used + j] = made[k][(size_t)positions[i] * used + j];
                    want[k][rows * used + j] = file[k][i * D / 2 + j];
                }
            }
            rows++;
        }
        test_true("yarn positions", rows == (far ? 18 : 14));
        for (int k = 0; k < 3; k++) {
            snprintf(name, sizeof name, "yarn golden D=%d %s T=%d", D, set[k], T);
            test_rotary_values(name, got[k], want[k], (size_t)rows * used, k < 2, 2e-3);
            free(file[k]);
        }
        free(c), free(s), free(exact), free(unused);
    }
}

// The norm alone: cos 1, sin 0. 24 rows of the file are 12 rows of a head of q and one of k; row 3 is
// tiny, row 4 zero.
static void test_rotary_golden_norm(const SafeFile* f, const char* set, int D, float eps) {
    const double u = 0x1p-24;
    int n = 24 * D;
    double *x = test_rotary_read(f, n, "rms.%sD%d.x", "", D);
    double *dy = test_rotary_read(f, n, "rms.%sD%d.dy", "", D);
    double *y = test_doubles(n), *dx = test_doubles(n), *ones = test_doubles(12 * D / 2);
    double* zeros = test_doubles(12 * D / 2);
    char name[64];
    snprintf(name, sizeof name, "rms.D%d.%s.y", D, set);
    const float* y_f = (const float*)safetensors_data(f, name, SAFE_F32, n);
    snprintf(name, sizeof name, "rms.D%d.%s.dx", D, set);
    const float* dx_f = (const float*)safetensors_data(f, name, SAFE_F32, n);
    for (int i = 0; i < 12 * D / 2; i++) ones[i] = 1;
    double largest = 0;
    for (int i = 0; i < n; i++) {
        y[i] = y_f[i], dx[i] = dx_f[i];
        largest = fmax(largest, fabs(dx[i]));
    }
    for (int norm_first = 0; norm_first < 2; norm_first++) {
        floatX *qk_d = test_upload(x, n), *dqk_d = test_upload(dy, n);
        float *c_d = test_upload_float(ones, 12 * D / 2),
              *s_d = test_upload_float(zeros, 12 * D / 2);
        float* rstd_d = test_device_float(24);
        qknorm_rotary_forward(qk_d, rstd_d, c_d, s_d, 12, 12, 1, D, 2 * D, eps, norm_first, 0);
        qknorm_rotary_backward(dqk_d, qk_d, rstd_d, c_d, s_d, 12, 12, 1, D, 2 * D, 2 * D,
                               norm_first, 0);
        snprintf(name, sizeof name, "norm golden D=%d %s y", D, set);
        test_compare_device(name, qk_d, y, n, 0, 32 * u);
        snprintf(name, sizeof name, "norm golden D=%d %s dx", D, set);
        test_compare_device(name, dqk_d, dx, n, 0x1p-20 * largest, 64 * u);
        cudaFree(qk_d), cudaFree(dqk_d), cudaFree(c_d), cudaFree(s_d), cudaFree(rstd_d);
    }
    free(x), free(dy), free(y), free(dx), free(ones), free(zeros);
}

static void test_rotary_golden(void) {
    SafeFile f;
    safetensors_open(&f, "test/golden/units/rotary.safetensors");
    for (int D = 64; D <= 128; D *= 2) {
        test_rotary_golden_tables(&f, D);
        test_rotary_golden_set(&f, "modern.f32", D);
        test_rotary_golden_set(&f, "modern.bf16", D);
        test_rotary_golden_set(&f, "sub3", D);
    }
    safetensors_close(&f);
    safetensors_open(&f, "test/golden/units/yarn.safetensors");
    for (int D = 64; D <= 128; D *= 2) {
        for (int change = 0; change < 4; change++) test_rotary_golden_yarn(&f, D, change);
    }
    safetensors_close(&f);
    safetensors_open(&f, "test/golden/units/rms_norm.safetensors");
    for (int D = 64; D <= 128; D *= 2) {
        test_rotary_golden_norm(&f, "eps32", D, 0x1p-23f);
        test_rotary_golden_norm(&f, "eps_bf16", D, 0x1p-7f);
    }
    safetensors_close(&f);
}

static void test_rotary(void) {
    // one row; less than a block and a ragged last one; a value tensor beside q and k
    const int sizes[][4] = {{1, 1, 1, 2}, {2, 5, 1, 3}, {1, 40, 3, 3}, {3, 17, 6, 2}};
    for (int i = 0; i < 4; i++) {
        for (int D = 32; D <= 128; D *= 2) {
            for (int mode = 0; mode < 4; mode++) {
                RotaryCase k = {sizes[i][0],
                                sizes[i][1],
                                sizes[i][2],
                                D,
                                sizes[i][3] * sizes[i][2] * D,
                                mode % 2 ? 0x1p-7 : 0x1p-23,
                                mode < 2,
                                i % 2 == 0};
                test_rotary_case(&k);
            }
        }
    }
    test_rotary_nan();
    if (!FLOATX_IS_BF16) test_rotary_golden();
}
