/*
fp8: llmc/fp8.cuh against oracle.h and the golden files; in the host build also what
llmc/host/cublasLt.cpp refuses.

Codes are wanted exactly where their argument is. A sum of K products in float is off by at most
K u Σ|a||b| with u = 2^-24, as in cases_matmul.h; in the accumulators of Hopper's tensor cores,
which keep some 14 bits of every 32 products (DeepSeek-AI 2024, arXiv:2412.19437, section 3.3), by
2^-13 for each of these. alpha and beta add two roundings, then y is rounded to bf16 or not at all.
Whole numbers are multiplied without fast accumulation and must come out exactly. A gradient of
cross_entropy_fp8 is in float what cases_loss.h allows, with |log Σ exp c| u more; rounding is
monotonous, so its code must lie between those of the two ends.
*/
#pragma once
#include "../llmc/fp8.cuh"
#include "../llmc/safetensors.h"
#include "oracle.h"
#include "test.h"
#ifndef __CUDACC__
#include <sys/wait.h>
#include <unistd.h>
#endif

// ---- codes -----------------------------------------------------------------------------------

static double test_fp8_value(uint8_t code, Fp8Type type) {
    __nv_fp8_e4m3 x;
    __nv_fp8_e5m2 y;
    x.__x = y.__x = code;
    return type == FP8_E4M3 ? (double)(float)x : (double)(float)y;
}

static void test_fp8_values(double* x, const uint8_t* codes, size_t n, Fp8Type type) {
    for (size_t i = 0; i < n; i++) x[i] = test_fp8_value(codes[i], type);
}

static uint8_t* test_device_bytes(size_t n) {
    uint8_t* d;
    CUDA_CHECK(cudaMalloc((void**)&d, n));
    return d;
}

static uint8_t* test_upload_bytes(const uint8_t* x, size_t n) {
    uint8_t* d = test_device_bytes(n);
    CUDA_CHECK(cudaMemcpy(d, x, n, cudaMemcpyHostToDevice));
    return d;
}

static uint8_t* test_download_bytes(const uint8_t* d, size_t n) {
    uint8_t* x = (uint8_t*)test_calloc(n, 1);
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaMemcpy(x, d, n, cudaMemcpyDeviceToHost));
    return x;
}

template <Fp8Type TYPE>
static __global__ void test_fp8_encode_kernel(uint8_t* codes, const float* x, int n) {
    int i = 8 * (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) *(uint64_t*)(codes + i) = fp8_encode8<TYPE>(load8(x + i));
}

// The codes of n floats, made on the device; the caller frees them.
static uint8_t* test_fp8_encode(const float* x, size_t n, Fp8Type type) {
    size_t padded = (n + 7) / 8 * 8;
    double* values = test_doubles(padded);
    for (size_t i = 0; i < n; i++) values[i] = x[i];
    float* x_d = test_upload_float(values, padded);
    uint8_t* codes_d = test_device_bytes(padded);
    dim3 grid(ceil_div(padded, 8 * 64)), block(64);
    if (type == FP8_E4M3) {
        launch<test_fp8_encode_kernel<FP8_E4M3>>(grid, block, 0, (cudaStream_t)0, codes_d,
                                                 (const float*)x_d, (int)padded);
    } else {
        launch<test_fp8_encode_kernel<FP8_E5M2>>(grid, block, 0, (cudaStream_t)0, codes_d,
                                                 (const float*)x_d, (int)padded);
    }
    uint8_t* codes = test_download_bytes(codes_d, padded);
    free(values);
    cudaFree(x_d), cudaFree(codes_d);
    return codes;
}

// Every bf16 value, and the three floats around every value and every tie of the format.
static void test_fp8_rounding(Fp8Type type) {
    const int bf16_values = 1 << 16, around = 2 * 256 * 3;
    size_t n = 0, wrong = 0;
    float* x = test_floats(bf16_values + around);
    for (uint32_t i = 0; i < (uint32_t)bf16_values; i++) {
        uint32_t bits = i << 16;
        memcpy(&x[n++], &bits, 4);
    }
    for (int code = 0; code < 256; code++) {
        float value = (float)test_fp8_value((uint8_t)code, type);
        float next = (float)test_fp8_value((uint8_t)(code + 1), type);
        float points[2] = {value, 0.5f * (value + next)};
        for (int k = 0; k < 2; k++) {
            x[n++] = points[k];
            x[n++] = nextafterf(points[k], INFINITY);
            x[n++] = nextafterf(points[k], -INFINITY);
        }
    }
    uint8_t* codes = test_fp8_encode(x, n, type);
    for (size_t i = 0; i < n; i++) {
        double want = oracle_round_fp8(x[i], type == FP8_E5M2);
        double got = test_fp8_value(codes[i], type);
        wrong += isnan(want) ? codes[i] != 0x7f : got != want || signbit(got) != signbit(want);
    }
    test_check(type == FP8_E4M3 ? "e4m3 of every bf16 and around every tie"
                                : "e5m2 of every bf16 and around every tie", (double)wrong, 0);
    free(x), free(codes);
}

static void test_fp8_golden_codes(const SafeFile* file, const char* prefix, int n, Fp8Type type) {
    char name[64];
    size_t wrong = 0;
    snprintf(name, sizeof name, "%s.table", prefix);
    const float* table = (const float*)safetensors_data(file, name, SAFE_F32, 256);
    for (int code = 0; code < 256; code++) {
        float got = (float)test_fp8_value((uint8_t)code, type);
        wrong += isnan(table[code]) ? !isnan(got) : memcmp(&got, &table[code], 4) != 0;
    }
    snprintf(name, sizeof name, "fp8 golden %s: the values", prefix);
    test_check(name, (double)wrong, 0);

    snprintf(name, sizeof name, "%s.x", prefix);
    const float* x = (const float*)safetensors_data(file, name, SAFE_F32, n);
    snprintf(name, sizeof name, "%s.code", prefix);
    const uint8_t* codes = (const uint8_t*)safetensors_data(file, name, SAFE_U8, n);
    uint8_t* got = test_fp8_encode(x, n, type);
    snprintf(name, sizeof name, "fp8 golden %s: ties and neighbours", prefix);
    test_same_bits(name, got, codes, n);
    free(got);

    // What PyTorch turns into NaN or infinity is the largest number here.
    snprintf(name, sizeof name, "%s.over.x", prefix);
    x = (const float*)safetensors_data(file, name, SAFE_F32, 9);
    got = test_fp8_encode(x, 9, type);
    uint8_t largest = type == FP8_E4M3 ? 0x7e : 0x7b, want[9];
    for (int i = 0; i < 9; i++) want[i] = isnan(x[i]) ? 0x7f : x[i] < 0 ? 0x80 | largest : largest;
    snprintf(name, sizeof name, "fp8 golden %s: saturation", prefix);
    test_same_bits(name, got, want, 9);
    free(got);
}

// ---- quantize --------------------------------------------------------------------------------

static void test_fp8_quantize(int rows, int cols, float scale) {
    const size_t n = (size_t)rows * cols, guard = 256;
    double* x = test_doubles(n);
    uint8_t *fill = (uint8_t*)test_calloc(n + guard, 1), *want = (uint8_t*)test_calloc(n, 1);
    test_fill_normal(x, n, rows, 1.0);
    x[0] = NAN, x[1] = INFINITY, x[2] = -INFINITY, x[3] = -0.0;
    x[n - 1] = test_round(1e30), x[n - 2] = test_round(-1e30);
    memset(fill, 0xa5, n + guard);
    floatX* x_d = test_upload(x, n);
    uint8_t* out_d = test_upload_bytes(fill, n + guard);
    uint8_t* out_t_d = test_upload_bytes(fill, n + guard);
    fp8_quantize_e4m3(out_d, out_t_d, x_d, rows, cols, scale, 0);
    uint8_t* out = test_download_bytes(out_d, n + guard);
    uint8_t* out_t = test_download_bytes(out_t_d, n + guard);
    size_t wrong = 0;
    for (size_t i = 0; i < n; i++) {
        double y = oracle_round_fp8((double)((float)x[i] * scale), false);
        double got = test_fp8_value(out[i], FP8_E4M3);
        wrong += isnan(y) ? out[i] != 0x7f : got != y || signbit(got) != signbit(y);
        want[i % cols * rows + i / cols] = out[i];
    }
    char what[96];
    snprintf(what, sizeof what, "fp8_quantize_e4m3 %d x %d", rows, cols);
    test_check(what, (double)wrong, 0);
    snprintf(what, sizeof what, "fp8_quantize_e4m3 %d x %d transposed", rows, cols);
    test_same_bits(what, out_t, want, n);
    test_same_bits("fp8_quantize_e4m3 writes nothing behind", out + n, fill, guard);
    test_same_bits("fp8_quantize_e4m3 writes nothing behind, transposed", out_t + n, fill, guard);

    // one order without the other
    CUDA_CHECK(cudaMemcpy(out_d, fill, n, cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(out_t_d, fill, n, cudaMemcpyHostToDevice));
    fp8_quantize_e4m3(out_d, NULL, x_d, rows, cols, scale, 0);
    fp8_quantize_e4m3(NULL, out_t_d, x_d, rows, cols, scale, 0);
    uint8_t *alone = test_download_bytes(out_d, n), *alone_t = test_download_bytes(out_t_d, n);
    test_same_bits("fp8_quantize_e4m3, only as it lies", alone, out, n);
    test_same_bits("fp8_quantize_e4m3, only transposed", alone_t, out_t, n);
    free(x), free(fill), free(want), free(out), free(out_t), free(alone), free(alone_t);
    cudaFree(x_d), cudaFree(out_d), cudaFree(out_t_d);
}

// ---- matmul ----------------------------------------------------------------------------------

// Of a sum of K products, relative to the sum of their absolute values; and of alpha and beta.
static double test_fp8_sum_error(int K) {
#ifdef __CUDACC__
    return (1 + K / 32) * 0x1p-13;
#else
    return (K + 2) * 0x1p-24;
#endif
}

// sum (M, N) = a (M, K) b (N, K)ᵀ, and the same of absolute values
static void test_fp8_products(double* sum, double* magnitude, const uint8_t* a8, Fp8Type ta,
                              const uint8_t* b8, Fp8Type tb, int M, int N, int K) {
    double *a = test_doubles((size_t)M * K), *b = test_doubles((size_t)N * K);
    test_fp8_values(a, a8, (size_t)M * K, ta);
    test_fp8_values(b, b8, (size_t)N * K, tb);
    for (int m = 0; m < M; m++) for (int n = 0; n < N; n++) {
        const double *am = a + (size_t)m * K, *bn = b + (size_t)n * K;
        double s = 0, size = 0;
        for (int k = 0; k < K; k++) s += am[k] * bn[k], size += fabs(am[k] * bn[k]);
        sum[(size_t)m * N + n] = s, magnitude[(size_t)m * N + n] = size;
    }
    free(a), free(b);
}

// Codes of whole numbers from -3 to 3, or of any finite values of a normal distribution.
static void test_fp8_fill(uint8_t* codes, size_t n, uint64_t seed, Fp8Type type, bool whole) {
    double* x = test_doubles(n);
    float* f = test_floats(n);
    if (whole) test_fill_whole(x, n, seed, -3, 3);
    for (size_t i = 0; i < n; i++) f[i] = (float)(whole ? x[i] : 4 * test_normal(seed, i));
    uint8_t* made = test_fp8_encode(f, n, type);
    memcpy(codes, made, n);
    free(x), free(f), free(made);
}

static void test_fp8_matmul_case(Fp8Type ta, Fp8Type tb, int M, int N, int K, bool y_float,
                                 float alpha, float beta, bool whole, Matmul* mm) {
    size_t na = (size_t)M * K, nb = (size_t)N * K, ny = (size_t)M * N;
    uint8_t *a8 = (uint8_t*)test_calloc(na, 1), *b8 = (uint8_t*)test_calloc(nb, 1);
    double *y = test_doubles(ny), *sum = test_doubles(ny), *magnitude = test_doubles(ny);
    test_fp8_fill(a8, na, 1, ta, whole);
    test_fp8_fill(b8, nb, 2, tb, whole);
    test_fp8_products(sum, magnitude, a8, ta, b8, tb, M, N, K);
    test_fill_whole(y, ny, 3, -50, 50);
    if (beta == 0) {
        for (size_t i = 0; i < ny; i++) y[i] = NAN;    // must not be read
    }
    uint8_t *a_d = test_upload_bytes(a8, na), *b_d = test_upload_bytes(b8, nb);
    float* f_d = test_upload_float(y, ny);
    floatX* x_d = test_upload(y, ny);
    matmul_fp8(y_float ? (void*)f_d : (void*)x_d, y_float, a_d, ta, b_d, tb, M, N, K, alpha, beta,
               !whole, mm, 0);
    float* got = y_float ? test_download_float(f_d, ny) : test_download(x_d, ny);
    double worst = 0;
    for (size_t i = 0; i < ny; i++) {
        double old = beta == 0 ? 0 : beta * y[i], want = alpha * sum[i] + old, x = got[i];
        double allowed = test_fp8_sum_error(K) * (fabs(alpha) * magnitude[i] + fabs(old));
        if (whole) allowed = 0;
        if (!y_float) {
            if (test_round_bf16(x) != x) worst = INFINITY;
            if (whole) want = test_round_bf16(want);
            else allowed += 0x1p-8 * fabs(want);
        }
        double fraction = x == want ? 0 : fabs(x - want) / allowed;
        if (!(fraction <= worst)) worst = fraction;
    }
    char name[128];
    snprintf(name, sizeof name, "matmul_fp8 %s %s M=%d N=%d K=%d %s %s", ta ? "e5m2" : "e4m3",
             tb ? "e5m2" : "e4m3", M, N, K, y_float ? "float" : "bf16", whole ? "exact" : "normal");
    test_check(name, worst, 1);
    free(a8), free(b8), free(y), free(sum), free(magnitude), free(got);
    cudaFree(a_d), cudaFree(b_d), cudaFree(f_d), cudaFree(x_d);
}

// A NaN in row 2 of a makes row 2 of y NaN, and no other. Equal bits with any number of threads.
static void test_fp8_matmul_repeat(Matmul* mm) {
    enum { M = 320, N = 528, K = 1040 };
    uint8_t* codes = (uint8_t*)test_calloc(N * K, 1);
    test_fp8_fill(codes, N * K, 4, FP8_E4M3, false);
    uint8_t* b_d = test_upload_bytes(codes, N * K);
    codes[2 * K + 5] = 0x7f;
    uint8_t* a_d = test_upload_bytes(codes, M * K);
    float *y_d = test_device_float(M * N), *first = NULL;
    const int threads[] = {1, 2, 3};
    for (int run = 0; run < 3; run++) {
#ifndef __CUDACC__
        host_set_threads(threads[run]);
#endif
        matmul_fp8(y_d, true, a_d, FP8_E4M3, b_d, FP8_E4M3, M, N, K, 0.1f, 0, false, mm, 0);
        float* got = test_download_float(y_d, M * N);
        if (run > 0) {
            char name[64];
            snprintf(name, sizeof name, "matmul_fp8 with %d threads", threads[run]);
            test_same_bits(name, got, first, M * N * sizeof(float));
            free(got);
        } else {
            first = got;
        }
    }
#ifndef __CUDACC__
    host_set_threads(0);
#endif
    size_t wrong = 0;
    for (int i = 0; i < M * N; i++) wrong += isnan(first[i]) != (i / N == 2);
    test_check("matmul_fp8: NaN stays in its row", (double)wrong, 0);
    free(codes), free(first);
    cudaFree(a_d), cudaFree(b_d), cudaFree(y_d);
}

// ---- cross entropy ---------------------------------------------------------------------------

static double test_fp8_gradient_code(double d, double g_scale) {
    return oracle_round_fp8(g_scale * test_round_bf16(d), true);
}

// R rows of z (R, V). Between V and the stride stands what must have no influence; rows of target
// -1 hold NaN.
static void test_fp8_loss_case(const char* name, const double* z, const int* targets, int R, int V,
                               SoftcapKind kind, double cap, float grad_scale, float g_scale) {
    const int ld = loss_stride(V);
    const double u = 0x1p-24;
    const size_t n = (size_t)R * ld, guard = 256;
    double *logits = test_doubles(n), *dz = test_doubles((size_t)R * V), *losses = test_doubles(R);
    uint8_t *fill = (uint8_t*)test_calloc(n + guard, 1), *want_t = (uint8_t*)test_calloc(n, 1);
    for (size_t i = 0; i < n; i++) {
        int r = (int)(i / ld), v = (int)(i % ld);
        logits[i] = v < V ? z[(size_t)r * V + v] : v % 3 == 0 ? NAN : 1e30;
        logits[i] = targets[r] == -1 ? NAN : test_round_bf16(logits[i]);
    }
    memset(fill, 0xa5, n + guard);
    floatX* z_d = test_upload(logits, n);
    float *losses_d = test_device_float(R), *plain_d = test_device_float(R);
    int* targets_d = test_upload_int(targets, R);
    uint8_t *g_d = test_upload_bytes(fill, n + guard), *gt_d = test_upload_bytes(fill, n + guard);
    cross_entropy_fp8(g_d, gt_d, z_d, losses_d, targets_d, R, V, kind, (float)cap, grad_scale,
                      g_scale, 0);
    uint8_t *g = test_download_bytes(g_d, n + guard), *gt = test_download_bytes(gt_d, n + guard);
    float *z_after = test_download(z_d, n), *losses_got = test_download_float(losses_d, R);
    cross_entropy(z_d, plain_d, targets_d, R, V, kind, (float)cap, grad_scale, false, 0);
    float* plain = test_download_float(plain_d, R);

    double* rounded = test_doubles((size_t)R * V);
    for (size_t i = 0; i < (size_t)R * V; i++) rounded[i] = test_round_bf16(z[i]);
    oracle_cross_entropy(dz, losses, rounded, targets, R, V, kind, cap, grad_scale);
    size_t wrong = 0, inexact = 0, padding = 0;
    for (int r = 0; r < R; r++) {
        const double* zr = rounded + (size_t)r * V;
        double max = -INFINITY, sum = 0;
        for (int v = 0; v < V; v++) max = fmax(max, oracle_softcap(zr[v], kind, cap));
        for (int v = 0; v < V; v++) sum += exp(oracle_softcap(zr[v], kind, cap) - max);
        double lse = max + log(sum), c_error = kind == SOFTCAP_NONE ? 0 : 16 * cap;
        for (int v = 0; v < ld; v++) {
            uint8_t code = g[(size_t)r * ld + v];
            want_t[(size_t)v * R + r] = code;
            if (v >= V || targets[r] == -1) {
                padding += code != 0;
                continue;
            }
            double c = oracle_softcap(zr[v], kind, cap), hot = v == targets[r];
            double slope = oracle_softcap_slope(zr[v], kind, cap), p = exp(c - lse);
            double error = slope * p * (64 + c_error + 4 * fabs(c - lse) + 4 * fabs(lse)) * u +
                           fabs(p - hot) * 8 * u + 2 * hot * u;
            double d = dz[(size_t)r * V + v], e = grad_scale * error + 1e-37;
            double got = test_fp8_value(code, FP8_E5M2);
            wrong += !(test_fp8_gradient_code(d - e, g_scale) <= got &&
                       got <= test_fp8_gradient_code(d + e, g_scale));
            inexact += got != test_fp8_gradient_code(d, g_scale);
        }
    }
    char what[128];
    const char* caps[] = {"none", "tanh", "sigmoid"};
    snprintf(what, sizeof what, "cross_entropy_fp8 gradient %s %s R=%d V=%d", name, caps[kind],
             R, V);
    test_check(what, (double)wrong, 0);
    // The float error above is some 1e-5 of a value. Where a tie of the bf16 rounding, each 2^-8,
    // is within that, one bf16 in 32 decides the e5m2: 2e-4 of the codes; and two where p - 1
    // cancels.
    snprintf(what, sizeof what, "cross_entropy_fp8 codes beside the oracle's, %s R=%d V=%d",
             caps[kind], R, V);
    test_check(what, (double)inexact, 2 + 2e-4 * (double)n);
    test_check("cross_entropy_fp8: ignored rows and columns behind V are 0", (double)padding, 0);
    snprintf(what, sizeof what, "cross_entropy_fp8 transposed, R=%d V=%d", R, V);
    test_same_bits(what, gt, want_t, n);
    test_same_bits("cross_entropy_fp8 losses", losses_got, plain, R * sizeof(float));
    for (size_t i = 0; i < n; i++) logits[i] = test_round(logits[i]);
    test_compare("cross_entropy_fp8 leaves the logits", z_after, logits, n, 0, 0);
    test_same_bits("cross_entropy_fp8 writes nothing behind", g + n, fill, guard);
    test_same_bits("cross_entropy_fp8 writes nothing behind, transposed", gt + n, fill, guard);
    cross_entropy_fp8(g_d, gt_d, z_d, losses_d, targets_d, R, V, kind, (float)cap, grad_scale,
                      g_scale, 0);
    uint8_t* again = test_download_bytes(gt_d, n);
    test_same_bits("cross_entropy_fp8 twice", again, gt, n);
    free(logits), free(dz), free(losses), free(fill), free(want_t), free(g), free(gt), free(again);
    free(z_after), free(losses_got), free(plain), free(rounded);
    cudaFree(z_d), cudaFree(losses_d), cudaFree(plain_d), cudaFree(targets_d), cudaFree(g_d);
    cudaFree(gt_d);
}

// g_scale 2^17 without a mean lets targets overflow, 2^-6 lets most others vanish.
static void test_fp8_loss(int R, int V) {
    double* z = test_doubles((size_t)R * V);
    int* targets = (int*)test_calloc(R, sizeof(int));
    test_fill_normal(z, (size_t)R * V, V, 4.0);
    test_fill_tokens(targets, R, 2, V);
    targets[0] = V - 1, targets[1] = -1, targets[2] = 0, targets[R - 1] = -1;
    for (int v = 0; v < V; v++) z[3 * V + v] = v == targets[3] ? 25 : -25;    // sure, and right
    for (int v = 0; v < V; v++) z[4 * V + v] = v == targets[4] ? -25 : 25;    // and wrong
    test_fp8_loss_case("mean", z, targets, R, V, SOFTCAP_SIGMOID, 30, 1.0f / (float)R, 0x1p19f);
    test_fp8_loss_case("sum", z, targets, R, V, SOFTCAP_SIGMOID, 30, 1, 448);
    test_fp8_loss_case("overflow", z, targets, R, V, SOFTCAP_TANH, 15, 1, 0x1p17f);
    test_fp8_loss_case("small", z, targets, R, V, SOFTCAP_NONE, 0, 3, 0x1p-6f);
    free(z), free(targets);
}

// Row 0 holds a NaN, row 1 has a target outside of the vocabulary, row 2 -inf at the target, row 3
// -inf elsewhere; the rest is well.
static void test_fp8_loss_nan(SoftcapKind kind) {
    enum { R = 16, V = 75, LD = 80 };
    double z[R * LD];
    int targets[R];
    test_fill_normal(z, R * LD, 9, 1.0);
    for (int i = 0; i < R * LD; i++) z[i] = test_round_bf16(z[i]);
    test_fill_tokens(targets, R, 3, V);
    z[11] = NAN;
    targets[1] = V + 2;
    z[2 * LD + targets[2]] = -INFINITY;
    for (int v = 0; v < V; v++) z[3 * LD + v] = v == targets[3] || v == 70 ? 0.5 : -INFINITY;
    floatX* z_d = test_upload(z, R * LD);
    float* losses_d = test_device_float(R);
    int* targets_d = test_upload_int(targets, R);
    uint8_t *g_d = test_device_bytes(R * LD), *gt_d = test_device_bytes(R * LD);
    cross_entropy_fp8(g_d, gt_d, z_d, losses_d, targets_d, R, V, kind, 30.0f, 1, 64, 0);
    uint8_t* g = test_download_bytes(g_d, R * LD);
    size_t wrong = 0;
    for (int i = 0; i < R * LD; i++) {
        bool nan = i / LD < 2 || (i / LD == 2 && kind == SOFTCAP_NONE);
        wrong += ((g[i] & 0x7f) == 0x7f) != (nan && i % LD < V);
        wrong += (g[i] & 0x7f) == 0x7c;
    }
    char what[64];
    snprintf(what, sizeof what, "cross_entropy_fp8: NaN where it belongs, softcap %d", kind);
    test_check(what, (double)wrong, 0);
    double half = test_fp8_value(g[3 * LD + 70], FP8_E5M2);
    if (kind == SOFTCAP_NONE) test_check("cross_entropy_fp8 of a masked row", fabs(half - 32), 0);
    free(g);
    cudaFree(z_d), cudaFree(losses_d), cudaFree(targets_d), cudaFree(g_d), cudaFree(gt_d);
}

// ---- the head --------------------------------------------------------------------------------

// The golden y, dx and dw of an FP8 head. Sums in another order are off by twice the bound of one,
// bf16 results by one unit in the last place more; on the host in one of a thousand elements.
typedef struct {
    int R, V, C;                       // of the file; V and R are filled up with zeros
    double sx, sw, sg;                 // what the codes were divided by
} TestFp8Head;

// y (M, N) = alpha a (M, K) b (N, K)ᵀ of codes, against want (rows, cols), which M and N fill up.
static void test_fp8_golden_product(const char* what, const float* want, int rows, int cols,
                                    bool y_float, const uint8_t* a8, Fp8Type ta, const uint8_t* b8,
                                    Fp8Type tb, int M, int N, int K, double alpha, Matmul* mm) {
    size_t ny = (size_t)M * N, flips = 0;
    double *sum = test_doubles(ny), *magnitude = test_doubles(ny), worst = 0;
    uint8_t* a_d = test_upload_bytes(a8, (size_t)M * K);
    uint8_t* b_d = test_upload_bytes(b8, (size_t)N * K);
    float* f_d = test_device_float(ny);
    floatX* x_d = test_device(ny);
    matmul_fp8(y_float ? (void*)f_d : (void*)x_d, y_float, a_d, ta, b_d, tb, M, N, K, (float)alpha,
               0, false, mm, 0);
    float* got = y_float ? test_download_float(f_d, ny) : test_download(x_d, ny);
    test_fp8_products(sum, magnitude, a8, ta, b8, tb, M, N, K);
    for (int m = 0; m < rows; m++) for (int n = 0; n < cols; n++) {
        double x = got[(size_t)m * N + n], y = want[(size_t)m * cols + n];
        double allowed = 2 * test_fp8_sum_error(K) * alpha * magnitude[(size_t)m * N + n];
        if (!y_float) allowed += 0x1p-7 * fabs(y);
        double fraction = x == y ? 0 : fabs(x - y) / allowed;
        if (!(fraction <= worst)) worst = fraction;
        flips += x != y;
    }
    char name[96];
    snprintf(name, sizeof name, "fp8 golden head: %s", what);
    test_check(name, worst, 1);
#ifndef __CUDACC__
    snprintf(name, sizeof name, "fp8 golden head: share of %s off by one bf16", what);
    if (!y_float) test_check(name, (double)flips / (rows * cols), 1e-3);
#endif
    free(sum), free(magnitude), free(got);
    cudaFree(a_d), cudaFree(b_d), cudaFree(f_d), cudaFree(x_d);
}

// Zeros to (rows_to, cols_to).
static float* test_fp8_padded(const float* x, int rows, int cols, int rows_to, int cols_to) {
    float* y = test_floats((size_t)rows_to * cols_to);
    for (int r = 0; r < rows; r++) {
        memcpy(y + (size_t)r * cols_to, x + (size_t)r * cols, cols * sizeof(float));
    }
    return y;
}

static uint8_t* test_fp8_transposed(const uint8_t* x, int rows, int cols) {
    uint8_t* y = (uint8_t*)test_calloc((size_t)rows * cols, 1);
    for (int r = 0; r < rows; r++) for (int c = 0; c < cols; c++) {
        y[(size_t)c * rows + r] = x[(size_t)r * cols + c];
    }
    return y;
}

static void test_fp8_golden_head(const SafeFile* file, const char* prefix, const char* round,
                                 TestFp8Head head, Matmul* mm) {
    int R = (head.R + 15) / 16 * 16, V = loss_stride(head.V), C = head.C;
    char name[64], what[64];
#define TENSOR(group, which, rows, cols)                    \
    (snprintf(name, sizeof name, "%s%s", group, which),     \
     (const float*)safetensors_data(file, name, SAFE_F32, (rows) * (cols)))
    float* x = test_fp8_padded(TENSOR(prefix, "x", head.R, C), head.R, C, R, C);
    float* w = test_fp8_padded(TENSOR(prefix, "w", head.V, C), head.V, C, V, C);
    float* g = test_fp8_padded(TENSOR(prefix, "g", head.R, head.V), head.R, head.V, R, V);
    for (int i = 0; i < R * C; i++) x[i] *= (float)(1 / head.sx);
    for (int i = 0; i < V * C; i++) w[i] *= (float)(1 / head.sw);
    for (int i = 0; i < R * V; i++) g[i] = test_round_bf16(g[i]) * (float)(1 / head.sg);
    uint8_t* x8 = test_fp8_encode(x, R * C, FP8_E4M3);
    uint8_t* w8 = test_fp8_encode(w, V * C, FP8_E4M3);
    uint8_t* g8 = test_fp8_encode(g, R * V, FP8_E5M2);
    if (safetensors_find(file, "x_code")) {
        size_t wrong = 0;
        const uint8_t* code = (const uint8_t*)safetensors_data(file, "x_code", SAFE_U8, head.R * C);
        for (int i = 0; i < head.R * C; i++) wrong += x8[i] != code[i];
        code = (const uint8_t*)safetensors_data(file, "w_code", SAFE_U8, head.V * C);
        for (int i = 0; i < head.V * C; i++) wrong += w8[i] != code[i];
        code = (const uint8_t*)safetensors_data(file, "g_code", SAFE_U8, head.R * head.V);
        for (int r = 0; r < head.R; r++) for (int v = 0; v < head.V; v++) {
            wrong += g8[r * V + v] != code[r * head.V + v];
        }
        test_check("fp8 golden head: codes", (double)wrong, 0);
    }
    uint8_t* x8t = test_fp8_transposed(x8, R, C);
    uint8_t* w8t = test_fp8_transposed(w8, V, C);
    uint8_t* g8t = test_fp8_transposed(g8, R, V);
    snprintf(what, sizeof what, "%sy", round);
    test_fp8_golden_product(what, TENSOR(round, "y", head.R, head.V), head.R, head.V, false, x8,
                            FP8_E4M3, w8, FP8_E4M3, R, V, C, head.sx * head.sw, mm);
    snprintf(what, sizeof what, "%sdx", round);
    test_fp8_golden_product(what, TENSOR(round, "dx", head.R, C), head.R, C, false, g8, FP8_E5M2,
                            w8t, FP8_E4M3, R, C, V, head.sg * head.sw, mm);
    snprintf(what, sizeof what, "%sdw", round);
    test_fp8_golden_product(what, TENSOR(round, "dw", head.V, C), head.V, C, true, g8t, FP8_E5M2,
                            x8t, FP8_E4M3, V, C, R, head.sg * head.sx, mm);
#undef TENSOR
    free(x), free(w), free(g), free(x8), free(w8), free(g8), free(x8t), free(w8t), free(g8t);
}

// The whole head as a trainer calls it, two chunks of rows with one dw: dx and dw against products
// of the codes in their first orders, so that a wrong transposed copy is seen.
static void test_fp8_chain(Matmul* mm) {
    enum { CHUNKS = 2, R = 48, V = 200, LD = 208, C = 80 };
    const float sx = 2, sw = 32, sg = 0x1p16f, grad = 1.0f / (CHUNKS * R);
    double *x = test_doubles(CHUNKS * R * C), *w = test_doubles(LD * C), *dw = test_doubles(LD * C);
    double *dw_size = test_doubles(LD * C), *sum = test_doubles(LD * C);
    double* size = test_doubles(LD * C);
    double worst_dx = 0, worst_dw = 0, last = 0;
    int targets[R];
    test_fill_normal(x, CHUNKS * R * C, 1, 1.0);
    test_fill_normal(w, V * C, 2, 0.1);
    test_fill_tokens(targets, R, 3, V);
    floatX *x_d = test_upload(x, CHUNKS * R * C), *w_d = test_upload(w, LD * C);
    floatX *z_d = test_device(R * LD), *dx_d = test_device(R * C);
    float *losses_d = test_device_float(R), *dw_d = test_device_float(LD * C);
    int* targets_d = test_upload_int(targets, R);
    uint8_t *x8 = test_device_bytes(R * C), *x8t = test_device_bytes(R * C);
    uint8_t *w8 = test_device_bytes(LD * C), *w8t = test_device_bytes(LD * C);
    uint8_t *g8 = test_device_bytes(R * LD), *g8t = test_device_bytes(R * LD);
    fp8_quantize_e4m3(w8, w8t, w_d, LD, C, sw, 0);
    uint8_t* w_codes = test_download_bytes(w8, LD * C);
    uint8_t* w_turned = test_fp8_transposed(w_codes, LD, C);
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        fp8_quantize_e4m3(x8, x8t, x_d + chunk * R * C, R, C, sx, 0);
        matmul_fp8(z_d, false, x8, FP8_E4M3, w8, FP8_E4M3, R, LD, C, 1 / (sx * sw), 0, true, mm, 0);
        cross_entropy_fp8(g8, g8t, z_d, losses_d, targets_d, R, V, SOFTCAP_SIGMOID, 30, grad, sg,
                          0);
        matmul_fp8(dx_d, false, g8, FP8_E5M2, w8t, FP8_E4M3, R, C, LD, 1 / (sg * sw), 0, false, mm,
                   0);
        matmul_fp8(dw_d, true, g8t, FP8_E5M2, x8t, FP8_E4M3, LD, C, R, 1 / (sg * sx), chunk > 0,
                   false, mm, 0);
        uint8_t *g = test_download_bytes(g8, R * LD), *x_codes = test_download_bytes(x8, R * C);
        float* got = test_download(dx_d, R * C);
        test_fp8_products(sum, size, g, FP8_E5M2, w_turned, FP8_E4M3, R, C, LD);
        for (int i = 0; i < R * C; i++) {
            double want = sum[i] / (sg * sw), bound = test_fp8_sum_error(LD) * size[i] / (sg * sw);
            double fraction = fabs(got[i] - want) / (0x1p-8 * fabs(want) + bound);
            if (!(fraction <= worst_dx)) worst_dx = fraction;
        }
        uint8_t* g_turned = test_fp8_transposed(g, R, LD);
        uint8_t* x_turned = test_fp8_transposed(x_codes, R, C);
        test_fp8_products(sum, size, g_turned, FP8_E5M2, x_turned, FP8_E4M3, LD, C, R);
        for (int i = 0; i < LD * C; i++) {
            dw[i] += sum[i] / (sg * sx);
            dw_size[i] += size[i] / (sg * sx);
        }
        free(g), free(x_codes), free(got), free(g_turned), free(x_turned);
    }
    float* got = test_download_float(dw_d, LD * C);
    for (int i = 0; i < LD * C; i++) {
        double err = fabs(got[i] - dw[i]);
        double fraction = err == 0 ? 0 : err / (CHUNKS * test_fp8_sum_error(R) * dw_size[i]);
        if (!(fraction <= worst_dw)) worst_dw = fraction;
        if (i >= V * C) last += fabs(got[i]);
    }
    test_check("the 8-bit head's dx", worst_dx, 1);
    test_check("the 8-bit head's dw of two chunks", worst_dw, 1);
    test_check("the 8-bit head's dw behind the vocabulary", last, 0);
    free(x), free(w), free(dw), free(dw_size), free(sum), free(size);
    free(got), free(w_codes), free(w_turned);
    cudaFree(x_d), cudaFree(w_d), cudaFree(z_d), cudaFree(dx_d), cudaFree(losses_d), cudaFree(dw_d);
    cudaFree(targets_d), cudaFree(x8), cudaFree(x8t), cudaFree(w8), cudaFree(w8t), cudaFree(g8);
    cudaFree(g8t);
}

#ifndef __CUDACC__

// ---- what is refused -------------------------------------------------------------------------

// cublasLtMatmul with D(m,n) = op(A) op(B), all dense but for the leading dimensions given.
typedef struct {
    int type_a, type_b, type_d, op_a, op_b, m, n, k, lda, ldb, ldd, offset_a, offset_d;
} TestFp8Call;

static cublasStatus_t test_fp8_call(const TestFp8Call* t, uint32_t promised) {
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t a, b, d;
    cublasLtMatmulPreference_t preference;
    cublasLtCreate(&handle);
    cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, &t->op_a, sizeof t->op_a);
    cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSB, &t->op_b, sizeof t->op_b);
    bool ta = t->op_a == CUBLAS_OP_T, tb = t->op_b == CUBLAS_OP_T;
    cublasLtMatrixLayoutCreate(&a, (cudaDataType)t->type_a, ta ? t->k : t->m, ta ? t->m : t->k,
                               t->lda);
    cublasLtMatrixLayoutCreate(&b, (cudaDataType)t->type_b, tb ? t->n : t->k, tb ? t->k : t->n,
                               t->ldb);
    cublasLtMatrixLayoutCreate(&d, (cudaDataType)t->type_d, t->m, t->n, t->ldd);
    cublasLtMatmulPreferenceCreate(&preference);
    const cublasLtMatmulPreferenceAttributes_t names[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    for (int i = 0; i < 4; i++) {
        cublasLtMatmulPreferenceSetAttribute(preference, names[i], &promised, sizeof promised);
    }
    cublasLtMatmulHeuristicResult_t found;
    int count = 0;
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(handle, desc, a, b, d, d, preference, 1,
                                                           &found, &count);
    float one = 1, zero = 0;
    uint8_t *x = test_device_bytes(65536), *y = x + 16384, *z = x + 32768;
    memset(x, 0, 65536);
    if (status == CUBLAS_STATUS_SUCCESS) {
        status = cublasLtMatmul(handle, desc, &one, x + t->offset_a, a, y, b, &zero,
                                z + t->offset_d, d, z + t->offset_d, d, &found.algo, NULL, 0, 0);
        cudaDeviceSynchronize();
    }
    cudaFree(x);
    cublasLtMatmulPreferenceDestroy(preference);
    cublasLtMatrixLayoutDestroy(a);
    cublasLtMatrixLayoutDestroy(b);
    cublasLtMatrixLayoutDestroy(d);
    cublasLtMatmulDescDestroy(desc);
    cublasLtDestroy(handle);
    return status;
}

static void test_fp8_refused(void) {
    const TestFp8Call good = {CUDA_R_8F_E4M3, CUDA_R_8F_E5M2, CUDA_R_32F, CUBLAS_OP_T, CUBLAS_OP_N,
                              32, 48, 64, 64, 64, 32, 0, 0};
    test_true("cublasLt fp8: a right call", test_fp8_call(&good, 16) == CUBLAS_STATUS_SUCCESS);
    TestFp8Call t;
    bool swapped = true, bf16_out = true;
    t = good, t.type_a = CUDA_R_8F_E5M2, t.type_b = CUDA_R_8F_E4M3;
    swapped = test_fp8_call(&t, 16) == CUBLAS_STATUS_SUCCESS;
    t = good, t.type_d = CUDA_R_16BF;
    bf16_out = test_fp8_call(&t, 16) == CUBLAS_STATUS_SUCCESS;
    test_true("cublasLt fp8: either operand may be e5m2, D bf16", swapped && bf16_out);
#define REFUSED(what, ...)                                            \
    t = good, __VA_ARGS__;                                            \
    test_true("cublasLt fp8 refuses " what, test_fp8_call(&t, 16) == CUBLAS_STATUS_NOT_SUPPORTED)
    REFUSED("two e5m2", t.type_a = CUDA_R_8F_E5M2);
    REFUSED("A not transposed", t.op_a = CUBLAS_OP_N, t.lda = 32);
    REFUSED("B transposed", t.op_b = CUBLAS_OP_T, t.ldb = 48);
    REFUSED("m", t.m = 24);
    REFUSED("n", t.n = 40);
    REFUSED("k", t.k = 56);
    REFUSED("lda", t.lda = 72);
    REFUSED("ldb", t.ldb = 72);
    REFUSED("ldd", t.ldd = 34);
    REFUSED("a misaligned A", t.offset_a = 8);
    REFUSED("a misaligned D", t.offset_d = 8);
    REFUSED("fp8 times bf16", t.type_b = CUDA_R_16BF);
    REFUSED("bf16 times fp8", t.type_a = CUDA_R_16BF);
    REFUSED("fp8 times float", t.type_b = CUDA_R_32F);
#undef REFUSED
    test_true("cublasLt fp8 refuses a promise of 8 bytes",
              test_fp8_call(&good, 8) == CUBLAS_STATUS_NOT_SUPPORTED);
}

static Matmul* test_fp8_matmul_in_child;
static void test_fp8_on_ampere(void) {
    cudaDeviceProp device;
    memset(&device, 0, sizeof device);
    strcpy(device.name, "NVIDIA A100");
    device.major = 8;
    matmul_fp8_device(&device);
}
static void test_fp8_odd_size(void) {
    matmul_fp8(NULL, true, NULL, FP8_E4M3, NULL, FP8_E4M3, 16, 24, 16, 1, 0, false,
               test_fp8_matmul_in_child, 0);
}
static void test_fp8_two_e5m2(void) {
    matmul_fp8(NULL, true, NULL, FP8_E5M2, NULL, FP8_E5M2, 16, 16, 16, 1, 0, false,
               test_fp8_matmul_in_child, 0);
}
static void test_fp8_odd_rows(void) {
    cross_entropy_fp8(NULL, NULL, NULL, NULL, NULL, 8, 64, SOFTCAP_NONE, 0, 1, 1, 0);
}
static void test_fp8_misaligned(void) {
    fp8_quantize_e4m3((uint8_t*)8, NULL, NULL, 16, 16, 1, 0);
}

// f in a copy of this process must end with status 1 and both parts in its message.
static void test_fp8_death(const char* what, void (*f)(void), const char* part1,
                           const char* part2) {
    char message[4096] = "";
    int ends[2], status = 0;
    fflush(stdout);
    if (pipe(ends) != 0) die("pipe: %s", strerror(errno));
    pid_t pid = fork();
    if (pid == 0) {
        dup2(ends[1], STDERR_FILENO);
        f();
        _exit(0);
    }
    close(ends[1]);
    waitpid(pid, &status, 0);
    ssize_t n = read(ends[0], message, sizeof message - 1);
    close(ends[0]);
    bool ok = n > 0 && WIFEXITED(status) && WEXITSTATUS(status) == 1 && strstr(message, part1) &&
              strstr(message, part2);
    if (!test_true(what, ok)) printf("      status %d, message: %s", status, message);
}

#endif

// ---- all -------------------------------------------------------------------------------------

static void test_fp8(void) {
    static Matmul mm;
    matmul_init(&mm, 0);
    test_fp8_rounding(FP8_E4M3);
    test_fp8_rounding(FP8_E5M2);
    SafeFile file;
    safetensors_open(&file, "test/golden/units/fp8.safetensors");
    test_fp8_golden_codes(&file, "e4m3", 2758, FP8_E4M3);
    test_fp8_golden_codes(&file, "e5m2", 2740, FP8_E5M2);
    TestFp8Head record20 = {96, 200, 64, 0.5, 0x1p-5, 0x1p-29};
    test_fp8_golden_head(&file, "head.", "head.round1.", record20, &mm);
    safetensors_close(&file);
    safetensors_open(&file, "test/golden/units/fp8_head45.safetensors");
    TestFp8Head record45 = {40, 128, 64, 8.0 / 448, 0x1p-9, 1.0 / 448};
    test_fp8_golden_head(&file, "", "", record45, &mm);
    safetensors_close(&file);

    // one micro tile, part of a tile, a whole one, more than one each way
    const int sizes[][2] = {{16, 16}, {16, 144}, {144, 16}, {48, 272}, {128, 128}, {400, 64},
                            {272, 400}};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        test_fp8_quantize(sizes[i][0], sizes[i][1], 2.0f);
        test_fp8_quantize(sizes[i][0], sizes[i][1], 16.1658f);
    }
    // the smallest, more than one tile of 256 x 512, a sum longer than the host takes at a time
    const int shapes[][3] = {{16, 16, 16}, {48, 80, 64}, {272, 528, 32}, {32, 48, 2064}};
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        for (int types = 0; types < 3; types++) {
            Fp8Type a = types == 1 ? FP8_E5M2 : FP8_E4M3, b = types == 2 ? FP8_E5M2 : FP8_E4M3;
            for (int whole = 0; whole < 2; whole++) {
                int M = shapes[i][0], N = shapes[i][1], K = shapes[i][2];
                test_fp8_matmul_case(a, b, M, N, K, true, whole ? 0.5f : 0.0301f, 0, whole, &mm);
                test_fp8_matmul_case(a, b, M, N, K, true, 1, whole ? 1 : 0.7f, whole, &mm);
                test_fp8_matmul_case(a, b, M, N, K, false, whole ? 4 : 0.0301f, 0, whole, &mm);
            }
        }
    }
    test_fp8_matmul_case(FP8_E4M3, FP8_E5M2, 48, 80, 64, false, 1, 2, true, &mm);
    test_fp8_matmul_repeat(&mm);
    // columns: within one chunk of 8, a whole chunk behind V, ragged, more than one tile each way
    const int logits[][2] = {{16, 5}, {16, 8}, {32, 77}, {144, 128}, {48, 1000}, {160, 301}};
    for (size_t i = 0; i < sizeof logits / sizeof logits[0]; i++) {
        test_fp8_loss(logits[i][0], logits[i][1]);
    }
    for (int kind = 0; kind < 3; kind++) test_fp8_loss_nan((SoftcapKind)kind);
    test_fp8_chain(&mm);
#ifndef __CUDACC__
    test_fp8_refused();
    test_fp8_matmul_in_child = &mm;
    test_fp8_death("a device without 8-bit products", test_fp8_on_ampere, "A100", "--fp8-head 0");
    test_fp8_death("matmul_fp8 with N=24", test_fp8_odd_size, "N=24", "multiples of 16");
    test_fp8_death("matmul_fp8 of two e5m2", test_fp8_two_e5m2, "e5m2", "");
    test_fp8_death("cross_entropy_fp8 of 8 rows", test_fp8_odd_rows, "8 rows", "multiples of 16");
    test_fp8_death("fp8_quantize_e4m3 misaligned", test_fp8_misaligned, "aligned", "16 bytes");
#endif
    matmul_free(&mm);
}
