/*
matmul: llmc/matmul.cuh against oracle.h; in the host build also llmc/host/cublasLt.cpp on its own.

Allowed, with u = 2^-24: a sum of K products in float, in any order and with or without fused
multiply-add, is off by at most K u Σ|a||b|; alpha and beta add two roundings; then one rounding to
the output's type. The bound is taken element by element from the products of absolute values. Whole
numbers small enough for all sums to be exact must come out exact but for that last rounding.
*/
#pragma once
#include "../llmc/matmul.cuh"
#include "oracle.h"
#include "test.h"
#ifndef __CUDACC__
#include <omp.h>
#endif

typedef enum { TEST_NT, TEST_NN, TEST_TN } TestMatmulKind;
static const char* const TEST_MATMUL_NAME[] = {"nt", "nn", "tn"};

// Worst ratio of error to bound; magnitude[i] is the sum of absolute values behind want[i].
static double test_matmul_worst(const float* got, const double* want, const double* magnitude,
                                size_t n, int K, double out_eps) {
    double worst = 0;
    for (size_t i = 0; i < n; i++) {
        double allowed = (K + 2) * 0x1p-24 * magnitude[i] + out_eps * fabs(want[i]);
        double err = fabs((double)got[i] - want[i]);
        double ratio = err == 0 ? 0 : err / allowed;
        if (!(ratio <= worst)) worst = ratio;
        if (ratio != ratio) return ratio;
    }
    return worst;
}

static void test_matmul_oracle(double* d, const double* a, const double* b, TestMatmulKind kind,
                               int M, int N, int K, double beta) {
    if (kind == TEST_NT) oracle_matmul_nt(d, a, b, M, N, K);
    if (kind == TEST_NN) oracle_matmul_nn(d, a, b, M, N, K);
    if (kind == TEST_TN) oracle_matmul_tn(d, a, b, M, N, K, beta);
}

// whole: small whole numbers, wanted exactly; else normal ones. With beta 0 the output starts NaN.
static void test_matmul_case(TestMatmulKind kind, int M, int N, int K, float beta, bool whole,
                             Matmul* mm, cudaStream_t s) {
    size_t na = (size_t)M * K, nb = (size_t)K * N, nd = (size_t)M * N;
    double *a = test_doubles(na), *b = test_doubles(nb), *d = test_doubles(nd),
           *mag = test_doubles(nd);
    if (whole) {
        test_fill_whole(a, na, 1, -3, 3);
        test_fill_whole(b, nb, 2, -3, 3);
        test_fill_whole(d, nd, 3, -50, 50);
    } else {
        test_fill_normal(a, na, 1, 1.0);
        test_fill_normal(b, nb, 2, 1.0);
        test_fill_normal_float(d, nd, 3, 10.0);
    }
    if (beta == 0) {
        for (size_t i = 0; i < nd; i++) d[i] = NAN;    // must not be read
    }
    floatX *a_d = test_upload(a, na), *b_d = test_upload(b, nb), *y_d = test_upload(d, nd);
    float *dw_d = test_upload_float(d, nd), *got;
    if (kind == TEST_NT) matmul_nt(y_d, a_d, b_d, M, N, K, mm, s);
    if (kind == TEST_NN) matmul_nn(y_d, a_d, b_d, M, N, K, mm, s);
    if (kind == TEST_TN) matmul_tn(dw_d, a_d, b_d, M, N, K, beta, mm, s);
    got = kind == TEST_TN ? test_download_float(dw_d, nd) : test_download(y_d, nd);

    for (size_t i = 0; i < nd; i++) mag[i] = fabs(d[i]);
    test_matmul_oracle(d, a, b, kind, M, N, K, beta);
    for (size_t i = 0; i < na; i++) a[i] = fabs(a[i]);
    for (size_t i = 0; i < nb; i++) b[i] = fabs(b[i]);
    test_matmul_oracle(mag, a, b, kind, M, N, K, fabs(beta));
    char name[128];
    snprintf(name, sizeof name, "matmul_%s M=%d N=%d K=%d beta=%g %s", TEST_MATMUL_NAME[kind], M, N,
             K, beta, whole ? "exact" : "normal");
    if (whole) {
        for (size_t i = 0; i < nd; i++) d[i] = kind == TEST_TN ? d[i] : test_round(d[i]);
        test_compare(name, got, d, nd, 0, 0);
    } else {
        double eps = kind == TEST_TN ? 0x1p-24 : TEST_EPS;
        test_check(name, test_matmul_worst(got, d, mag, nd, K, eps), 1);
    }
    free(a), free(b), free(d), free(mag), free(got);
    cudaFree(a_d), cudaFree(b_d), cudaFree(y_d), cudaFree(dw_d);
}

// d = alpha op(a) op(b) + beta c over a batch. c_mode 0: c is NULL, 1: c is d, 2: another array.
static void test_matmul_batched_case(int M, int N, int K, int batch, bool ta, bool tb, float alpha,
                                     float beta, int c_mode, bool whole, Matmul* mm,
                                     cudaStream_t s) {
    size_t ma = (size_t)M * K, mb = (size_t)K * N, md = (size_t)M * N;
    size_t na = ma * batch, nb = mb * batch, nd = md * batch;
    double *a = test_doubles(na), *b = test_doubles(nb), *c = test_doubles(nd),
           *d = test_doubles(nd);
    double* mag = test_doubles(nd);
    if (whole) {
        test_fill_whole(a, na, 1, -3, 3);
        test_fill_whole(b, nb, 2, -3, 3);
        test_fill_whole(c, nd, 3, -50, 50);
    } else {
        test_fill_normal(a, na, 1, 1.0);
        test_fill_normal(b, nb, 2, 1.0);
        test_fill_normal(c, nd, 3, 10.0);
    }
    for (size_t i = 0; i < nd; i++) d[i] = NAN;
    floatX *a_d = test_upload(a, na), *b_d = test_upload(b, nb), *c_d = test_upload(c, nd);
    floatX* d_d = c_mode == 1 ? c_d : test_upload(d, nd);
    matmul_batched(d_d, a_d, b_d, c_mode == 0 ? NULL : c_d, M, N, K, batch, ta, tb, alpha, beta, mm,
                   s);
    float* got = test_download(d_d, nd);

    for (int q = 0; q < batch; q++) {
        for (int i = 0; i < M; i++) for (int j = 0; j < N; j++) {
            double sum = 0, sum_mag = 0;
            for (int k = 0; k < K; k++) {
                double x = a[q * ma + (ta ? (size_t)k * M + i : (size_t)i * K + k)];
                double y = b[q * mb + (tb ? (size_t)j * K + k : (size_t)k * N + j)];
                sum += x * y;
                sum_mag += fabs(x * y);
            }
            size_t at = q * md + (size_t)i * N + j;
            d[at] = alpha * sum + (beta == 0 ? 0 : beta * c[at]);
            mag[at] = fabs(alpha) * sum_mag + (beta == 0 ? 0 : fabs(beta * c[at]));
        }
    }
    char name[160];
    snprintf(name, sizeof name, "matmul_batched %dx(%d,%d,%d) %c%c alpha=%g beta=%g c_mode=%d %s",
             batch, M, N, K, ta ? 'T' : 'N', tb ? 'T' : 'N', alpha, beta, c_mode,
             whole ? "exact" : "normal");
    if (whole) {    // one rounding: a product rounded before C is added would show
        for (size_t i = 0; i < nd; i++) d[i] = test_round(d[i]);
        test_compare(name, got, d, nd, 0, 0);
    } else {
        test_check(name, test_matmul_worst(got, d, mag, nd, K, TEST_EPS), 1);
    }
    free(a), free(b), free(c), free(d), free(mag), free(got);
    cudaFree(a_d), cudaFree(b_d), cudaFree(c_d);
    if (c_mode != 1) cudaFree(d_d);
}

// A NaN in row 2 of x makes row 2 of y NaN, and no other.
static void test_matmul_nan(Matmul* mm, cudaStream_t s) {
    enum { M = 40, N = 48, K = 64 };
    double x[M * K], w[N * K], y[M * N];
    test_fill_normal(x, M * K, 1, 1.0);
    test_fill_normal(w, N * K, 2, 1.0);
    x[2 * K + 5] = NAN;
    floatX *x_d = test_upload(x, M * K), *w_d = test_upload(w, N * K), *y_d = test_device(M * N);
    matmul_nt(y_d, x_d, w_d, M, N, K, mm, s);
    float* got = test_download(y_d, M * N);
    for (int i = 0; i < M * N; i++) y[i] = i / N == 2 ? NAN : got[i] == got[i] ? got[i] : INFINITY;
    test_compare("matmul_nt NaN stays in its row", got, y, M * N, 0, 0);
    free(got);
    cudaFree(x_d), cudaFree(w_d), cudaFree(y_d);
}

// Equal bits in a second run and, on the host, with any number of threads; and no new plan for it.
static void test_matmul_repeat(Matmul* mm, cudaStream_t s) {
    const int M = 600, N = 1100, K = 700, batch = 21, n = 64;
    size_t nb = (size_t)N * K, nd = (size_t)M * N, ns = (size_t)batch * n * n;
    double *a = test_doubles(nb), *b = test_doubles(nb);
    test_fill_normal(a, nb, 1, 1.0);
    test_fill_normal(b, nb, 2, 1.0);
    floatX *a_d = test_upload(a, nb), *b_d = test_upload(b, nb), *y_d = test_device(nd);
    floatX* z_d = test_device(ns);
    float *dw_d = test_device_float(nd), *first[3];
    int plans = 0;
    const int threads[] = {1, 2, 2, 3, 5};
    for (int run = 0; run < 5; run++) {
#ifndef __CUDACC__
        host_set_threads(threads[run]);
#endif
        matmul_nt(y_d, a_d, b_d, M, N, K, mm, s);
        matmul_tn(dw_d, a_d, b_d, M, N, K, 0.0f, mm, s);    // the same memory as (K,M) and (K,N)
        matmul_batched(z_d, b_d, b_d, a_d, n, n, n, batch, false, true, 2.0f, -0.5f, mm, s);
        float* got[3] = {test_download(y_d, nd), test_download_float(dw_d, nd),
                         test_download(z_d, ns)};
        const size_t counts[3] = {nd, nd, ns};
        const char* names[3] = {"matmul_nt", "matmul_tn", "matmul_batched"};
        for (int i = 0; i < 3; i++) {
            char name[64];
            snprintf(name, sizeof name, "%s run %d with %d threads", names[i], run, threads[run]);
            if (run > 0) test_same_bits(name, got[i], first[i], counts[i] * sizeof(float));
            if (run > 0) free(got[i]);
            else first[i] = got[i];
        }
        if (run == 0) plans = mm->count;
    }
    test_true("matmul makes one plan per shape", mm->count == plans);
#ifndef __CUDACC__
    host_set_threads(0);
#endif
    for (int i = 0; i < 3; i++) free(first[i]);
    free(a), free(b);
    cudaFree(a_d), cudaFree(b_d), cudaFree(y_d), cudaFree(z_d), cudaFree(dw_d);
}

#ifndef __CUDACC__

// ---- the host's cuBLASLt on its own ---------------------------------------------------------

typedef struct {
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t a, b, d;
    cublasLtMatmulPreference_t preference;
} TestLt;

// Column-major float D(m,n) = A(k,m)ᵀ B(k,n), with rows longer than the matrices.
static TestLt test_lt_make(int m, int n, int k, int lda, int ldb, int ldd) {
    TestLt t;
    int32_t op = CUBLAS_OP_T;
    cublasLtCreate(&t.handle);
    cublasLtMatmulDescCreate(&t.desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    cublasLtMatmulDescSetAttribute(t.desc, CUBLASLT_MATMUL_DESC_TRANSA, &op, sizeof op);
    cublasLtMatrixLayoutCreate(&t.a, CUDA_R_32F, k, m, lda);
    cublasLtMatrixLayoutCreate(&t.b, CUDA_R_32F, k, n, ldb);
    cublasLtMatrixLayoutCreate(&t.d, CUDA_R_32F, m, n, ldd);
    cublasLtMatmulPreferenceCreate(&t.preference);
    return t;
}

static void test_lt_free(TestLt* t) {
    cublasLtMatmulPreferenceDestroy(t->preference);
    cublasLtMatrixLayoutDestroy(t->a);
    cublasLtMatrixLayoutDestroy(t->b);
    cublasLtMatrixLayoutDestroy(t->d);
    cublasLtMatmulDescDestroy(t->desc);
    cublasLtDestroy(t->handle);
}

// Leading dimensions larger than the rows: what lies between columns is neither used nor written.
static void test_lt_leading_dimension(void) {
    enum { m = 300, n = 70, k = 50, lda = 56, ldb = 64, ldd = 308 };
    size_t na = lda * m, nb = ldb * n, nd = ldd * n;
    double *a = test_doubles(na), *b = test_doubles(nb), *d = test_doubles(nd),
           *want = test_doubles(nd);
    test_fill_whole(a, na, 1, -3, 3);
    test_fill_whole(b, nb, 2, -3, 3);
    test_fill_whole(d, nd, 3, -3, 3);
    for (int j = 0; j < n; j++) for (int i = 0; i < ldd; i++) {
        double sum = 0;
        for (int l = 0; l < k; l++) sum += i < m ? a[i * lda + l] * b[j * ldb + l] : 0;
        want[j * ldd + i] = i < m ? 2 * sum + 3 * d[j * ldd + i] : d[j * ldd + i];
    }
    for (size_t i = 0; i < na; i++) a[i] = i % lda < k ? a[i] : NAN;
    for (size_t i = 0; i < nb; i++) b[i] = i % ldb < k ? b[i] : NAN;
    float *a_d = test_upload_float(a, na), *b_d = test_upload_float(b, nb);
    float *d_d = test_upload_float(d, nd), alpha = 2, beta = 3;
    TestLt t = test_lt_make(m, n, k, lda, ldb, ldd);
    cublasStatus_t status = cublasLtMatmul(t.handle, t.desc, &alpha, a_d, t.a, b_d, t.b, &beta, d_d,
                                           t.d, d_d, t.d, NULL, NULL, 0, 0);
    test_true("cublasLt: leading dimensions are accepted", status == CUBLAS_STATUS_SUCCESS);
    test_compare_device_float("cublasLt: leading dimensions", d_d, want, nd, 0, 0);
    test_lt_free(&t);
    free(a), free(b), free(d), free(want);
    cudaFree(a_d), cudaFree(b_d), cudaFree(d_d);
}

// oneDNN left to itself splits a long sum of bf16 products over the threads of OpenMP, when the
// primitive is made and when it runs. Another leading dimension of D is another primitive.
static void test_lt_threads(void) {
    enum { m = 48, n = 48, k = 40000, runs = 3 };
    bf16* h = (bf16*)test_calloc((size_t)m * k, sizeof(bf16));
    for (size_t i = 0; i < (size_t)m * k; i++) h[i] = from_float<bf16>((float)test_normal(1, i));
    bf16* a_d;
    CUDA_CHECK(cudaMalloc((void**)&a_d, (size_t)m * k * sizeof(bf16)));
    CUDA_CHECK(cudaMemcpy(a_d, h, (size_t)m * k * sizeof(bf16), cudaMemcpyHostToDevice));
    float *first = test_floats(m * n), *d = test_floats(m * n), alpha = 1, beta = 0;
    int32_t op = CUBLAS_OP_T, threads_before = omp_get_max_threads();
    for (int run = 0; run < runs; run++) {
        int ldd = m + 8 * (run + 1);
        omp_set_num_threads(1 << run);
        float* d_d = test_device_float(ldd * n);
        TestLt t = test_lt_make(m, n, k, k, k, ldd);
        cublasLtMatrixLayout_t a;
        cublasLtMatrixLayoutCreate(&a, CUDA_R_16BF, k, m, k);
        cublasLtMatmulDescSetAttribute(t.desc, CUBLASLT_MATMUL_DESC_TRANSA, &op, sizeof op);
        test_true("cublasLt: bf16 in, float out",
                  cublasLtMatmul(t.handle, t.desc, &alpha, a_d, a, a_d, a, &beta, d_d, t.d, d_d,
                                 t.d, NULL, NULL, 0, 0) == CUBLAS_STATUS_SUCCESS);
        float* got = test_download_float(d_d, ldd * n);
        for (int j = 0; j < n; j++)
            memcpy((run ? d : first) + j * m, got + j * ldd, m * sizeof(float));
        if (run)
            test_same_bits("cublasLt: bits do not depend on OpenMP's threads", d, first, m * n * 4);
        free(got);
        cublasLtMatrixLayoutDestroy(a);
        test_lt_free(&t);
        cudaFree(d_d);
    }
    omp_set_num_threads(threads_before);
    free(h), free(first), free(d);
    cudaFree(a_d);
}

static void test_lt_errors(void) {
    enum { n = 32 };
    double x[4 * n * n] = {0};
    float *p = test_upload_float(x, 4 * n * n), one = 1, zero = 0;
    float *a = p, *b = p + n * n, *d = p + 2 * n * n;
    TestLt t = test_lt_make(n, n, n, n, n, n), u = test_lt_make(n, n / 2, n, n, n, n);
    cublasLtMatmulHeuristicResult_t found, other;
    int count = 0;
    uint64_t workspace_bytes = 4096;
    cublasLtMatmulPreferenceSetAttribute(t.preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                         &workspace_bytes, sizeof workspace_bytes);
    float* workspace = test_device_float(4096);
#define LT(DESC, A, LA, B, LB, D, LD, ALGO, WORKSPACE, BYTES)                                \
    cublasLtMatmul(t.handle, DESC, &one, A, LA, B, LB, &zero, D, LD, D, LD, ALGO, WORKSPACE, \
                   BYTES, 0)
    test_true("cublasLt: heuristic finds one",
              cublasLtMatmulAlgoGetHeuristic(t.handle, t.desc, t.a, t.b, t.d, t.d, t.preference, 1,
                                             &found, &count) == CUBLAS_STATUS_SUCCESS &&
                  count == 1);
    cublasLtMatmulAlgoGetHeuristic(t.handle, t.desc, t.a, u.b, u.d, u.d, t.preference, 1, &other,
                                   &count);
    test_true("cublasLt: a right call", LT(t.desc, a, t.a, b, t.b, d, t.d, &found.algo, workspace,
                                           4096) == CUBLAS_STATUS_SUCCESS);
    test_true("cublasLt: workspace too small", LT(t.desc, a, t.a, b, t.b, d, t.d, &found.algo,
                                                  workspace, 4095) == CUBLAS_STATUS_INVALID_VALUE);
    test_true("cublasLt: no workspace", LT(t.desc, a, t.a, b, t.b, d, t.d, &found.algo, NULL,
                                           4096) == CUBLAS_STATUS_INVALID_VALUE);
    test_true("cublasLt: misaligned workspace", LT(t.desc, a, t.a, b, t.b, d, t.d, &found.algo,
              workspace + 4, 4096) == CUBLAS_STATUS_INVALID_VALUE);
    test_true("cublasLt: algorithm of another shape",
              LT(t.desc, a, t.a, b, t.b, d, t.d, &other.algo, workspace, 4096) ==
                  CUBLAS_STATUS_INVALID_VALUE);
    test_true("cublasLt: misaligned A", LT(t.desc, a + 1, t.a, b, t.b, d, t.d, NULL, NULL, 0) ==
              CUBLAS_STATUS_NOT_SUPPORTED);
    test_true("cublasLt: misaligned D", LT(t.desc, a, t.a, b, t.b, d + 2, t.d, NULL, NULL, 0) ==
              CUBLAS_STATUS_NOT_SUPPORTED);
    test_true("cublasLt: shapes that do not match",
              LT(t.desc, a, t.a, b, u.b, d, t.d, NULL, NULL, 0) == CUBLAS_STATUS_INVALID_VALUE);
    test_true("cublasLt: D overlaps A", LT(t.desc, a, t.a, b, t.b, a, t.d, NULL, NULL, 0) ==
              CUBLAS_STATUS_INVALID_VALUE);
    test_true("cublasLt: A is NULL", LT(t.desc, NULL, t.a, b, t.b, d, t.d, NULL, NULL, 0) ==
              CUBLAS_STATUS_INVALID_VALUE);
    uint32_t epilogue = 4;
    cublasLtMatmulDescSetAttribute(u.desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue,
                                   sizeof epilogue);
    test_true("cublasLt: an epilogue", LT(u.desc, a, t.a, b, t.b, d, t.d, NULL, NULL, 0) ==
              CUBLAS_STATUS_NOT_SUPPORTED);
    test_true("cublasLt: attribute of a wrong size", cublasLtMatmulDescSetAttribute(u.desc,
              CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, 2) == CUBLAS_STATUS_INVALID_VALUE);
    int32_t batch = 2;
    cublasLtMatrixLayoutSetAttribute(u.a, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch, sizeof batch);
    test_true("cublasLt: batches that do not match",
              LT(t.desc, a, u.a, b, t.b, d, t.d, NULL, NULL, 0) == CUBLAS_STATUS_INVALID_VALUE);
#undef LT
    test_lt_free(&t), test_lt_free(&u);
    cudaFree(p), cudaFree(workspace);
}

#endif

// ---- all ------------------------------------------------------------------------------------

static void test_matmul(void) {
    static Matmul mm;
    cudaStream_t s = 0;
    matmul_init(&mm, s);
    // one element; odd sizes; the real proportions; more than one tile each way; a long sum
    const int shapes[][3] = {{1, 1, 1},     {1, 8, 8},       {3, 5, 7},      {8, 1, 40},
                             {16, 24, 40},  {64, 192, 64},   {130, 72, 136}, {257, 33, 65},
                             {40, 520, 96}, {300, 1050, 64}, {16, 24, 5000}};
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        int M = shapes[i][0], N = shapes[i][1], K = shapes[i][2];
        for (int kind = TEST_NT; kind <= TEST_TN; kind++) {
            test_matmul_case((TestMatmulKind)kind, M, N, K, 0.0f, false, &mm, s);
            test_matmul_case((TestMatmulKind)kind, M, N, K, 0.0f, true, &mm, s);
        }
        test_matmul_case(TEST_TN, M, N, K, 1.0f, false, &mm, s);
        test_matmul_case(TEST_TN, M, N, K, 1.0f, true, &mm, s);
        test_matmul_case(TEST_TN, M, N, K, 0.5f, true, &mm, s);
    }
    const int batched[][4] = {{24, 40, 16, 1}, {24, 40, 16, 5}, {3, 12, 12, 3}, {280, 24, 40, 3},
                              {16, 16, 64, 37}, {48, 48, 136, 60}};
    for (size_t i = 0; i < sizeof batched / sizeof batched[0]; i++) {
        int M = batched[i][0], N = batched[i][1], K = batched[i][2], batch = batched[i][3];
        for (int ops = 0; ops < 4; ops++) {
            bool ta = ops & 1, tb = ops & 2;
            for (int whole = 0; whole < 2; whole++) {
                test_matmul_batched_case(M, N, K, batch, ta, tb, 1.0f, 0.0f, 0, whole, &mm, s);
                test_matmul_batched_case(M, N, K, batch, ta, tb, 2.0f, -4.0f, 2, whole, &mm, s);
                test_matmul_batched_case(M, N, K, batch, ta, tb, 1.0f, 3.0f, 1, whole, &mm, s);
            }
        }
    }
    test_matmul_batched_case(72, 136, 72, 4, false, false, 2.0315f, -4.7750f, 2, false, &mm, s);
    test_matmul_nan(&mm, s);
    test_matmul_repeat(&mm, s);
#ifndef __CUDACC__
    test_lt_leading_dimension();
    test_lt_threads();
    test_lt_errors();
#endif
    matmul_free(&mm);
}
