/*
Matrix products, by cuBLASLt on a GPU and by oneDNN on a CPU (llmc/host/cublasLt.cpp).

    matmul_nt        y(M,N)  = x(M,K) w(N,K)ᵀ             forward of a linear layer, w is (out, in)
    matmul_nn        y(M,N)  = x(M,K) w(K,N)              its input gradient: dx = dy w
    matmul_tn        dw(M,N) = a(K,M)ᵀ b(K,N) + beta dw   its weight gradient, kept in float
    matmul_batched   d_i = alpha op(a_i) op(b_i) + beta c_i, matrices one after the other

y x w a b c d   row-major, contiguous, floatX (dw float), aligned to 16 bytes; any sizes.
                Multiples of 8 are what the tensor cores read at full speed.
rounding        sums, alpha and beta in float (no TF32); y and d are rounded once.
aliases         d may be c. No other output may overlap an input.
beta = 0        the old output is not read: NaN in it does not matter. NaN in an input gives NaN.
cost            2 M N K FLOP, bound by the tensor cores for M N K large in all three
test            test/cases_matmul.h
8 bits          matmul_fp8 in fp8.cuh makes its plans here

cuBLASLt is column-major: the same memory is to it the transposed matrix. So what is asked for is

    row-major  D(M,N) = op(A)(M,K) op(B)(K,N)
    column-major      Dᵀ(N,M) = op(B)ᵀ(N,K) op(A)ᵀ(K,M)

that is, b is passed first, then a, with M and N exchanged. A row-major (R,C) matrix is a
column-major (C,R) one with leading dimension C, and it is passed with op T exactly where the
row-major formula has it transposed: the exchange and the change of order each transpose once.

Descriptors, layouts and the algorithm are made once per shape and kept in a table (a Plan): a call
is one look-up and one launch. The algorithm is the heuristic's first answer and not the fastest of
a measurement, so that equal runs use equal algorithms and have equal bits. The workspace belongs to
one stream; a second stream needs a Matmul of its own.
*/
#pragma once
#include <cublasLt.h>

#include "device.cuh"

constexpr size_t MATMUL_WORKSPACE_BYTES = 32u << 20;    // what NVIDIA recommends for Hopper
constexpr int MATMUL_PLANS = 256;                       // a power of two; a run has some 20

constexpr int MATMUL_FLOATX = FLOATX_IS_BF16 ? CUDA_R_16BF : CUDA_R_32F;

typedef struct MatmulKey {
    int M, N, K, batch;
    int trans_a, trans_b;
    int type_a, type_b, type_d;     // cudaDataType
    int fast;                       // of 8-bit products: sums of some 14 bits do
} MatmulKey;

typedef struct MatmulPlan {
    MatmulKey key;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t a, b, d;
    cublasLtMatmulAlgo_t algo;
} MatmulPlan;

typedef struct Matmul {
    cublasLtHandle_t handle;
    cudaStream_t stream;                // the one whose launches may use the workspace
    void* workspace;
    int count;
    MatmulPlan plans[MATMUL_PLANS];     // open addressing; desc NULL: free
} Matmul;

static inline const char* matmul_type_name(int type) {
    return type == CUDA_R_8F_E4M3 ? "e4m3" : type == CUDA_R_8F_E5M2 ? "e5m2"
           : type == CUDA_R_16BF  ? "bf16" : "float";
}

static inline size_t matmul_type_bytes(int type) {
    return type == CUDA_R_32F ? 4 : type == CUDA_R_16BF ? 2 : 1;
}

static inline bool matmul_is_fp8(const MatmulKey* key) {
    return matmul_type_bytes(key->type_a) == 1;
}

static inline void cublas_check(cublasStatus_t status, const char* call, const MatmulKey* key) {
    if (status == CUBLAS_STATUS_SUCCESS) return;
    if (!key) die("%s: %s", call, cublasLtGetStatusName(status));
    die("%s: %s\nfor M=%d N=%d K=%d batch=%d trans_a=%d trans_b=%d, %s times %s, %s out", call,
        cublasLtGetStatusName(status), key->M, key->N, key->K, key->batch, key->trans_a,
        key->trans_b, matmul_type_name(key->type_a), matmul_type_name(key->type_b),
        matmul_type_name(key->type_d));
}

// ---- plans ----------------------------------------------------------------------------------

static inline cublasLtMatrixLayout_t matmul_layout(const MatmulKey* key, int type, int rows,
                                                   int cols) {
    cublasLtMatrixLayout_t layout;
    cublas_check(cublasLtMatrixLayoutCreate(&layout, (cudaDataType)type, cols, rows, cols),
                 "cublasLtMatrixLayoutCreate", key);
    int32_t batch = key->batch;
    int64_t stride = (int64_t)rows * cols;
    cublas_check(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
                                                  &batch, sizeof batch),
                 "set BATCH_COUNT", key);
    cublas_check(cublasLtMatrixLayoutSetAttribute(
                     layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride, sizeof stride),
                 "set STRIDED_BATCH_OFFSET", key);
    return layout;
}

// What may be promised of every matrix of a batch: the first is aligned to 16 bytes, the others
// stand a matrix's size apart. (The library would assume 256.)
static inline uint32_t matmul_alignment(const MatmulKey* key, int rows, int cols, size_t size) {
    uint32_t align = 16;
    while (key->batch > 1 && (size_t)rows * cols * size % align != 0) align /= 2;
    return align;
}

// 8-bit products came with compute capability 8.9.
static inline void matmul_fp8_device(const cudaDeviceProp* device) {
    REQUIRE(10 * device->major + device->minor >= 89,
            "matmul_fp8: %s has compute capability %d.%d; products of 8-bit floats need 8.9\n"
            "run with --fp8-head 0",
            device->name, device->major, device->minor);
}

static inline void matmul_plan_make(MatmulPlan* plan, const MatmulKey* key, Matmul* mm) {
    plan->key = *key;
    if (matmul_is_fp8(key)) {
        int id;
        cudaDeviceProp device;
        CUDA_CHECK(cudaGetDevice(&id));
        CUDA_CHECK(cudaGetDeviceProperties(&device, id));
        matmul_fp8_device(&device);
    }
    cublas_check(cublasLtMatmulDescCreate(&plan->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F),
                 "cublasLtMatmulDescCreate", key);
    int32_t op_first = key->trans_b ? CUBLAS_OP_T : CUBLAS_OP_N;    // b comes first, see above
    int32_t op_second = key->trans_a ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublas_check(cublasLtMatmulDescSetAttribute(plan->desc, CUBLASLT_MATMUL_DESC_TRANSA, &op_first,
                                                sizeof op_first),
                 "set TRANSA", key);
    cublas_check(cublasLtMatmulDescSetAttribute(plan->desc, CUBLASLT_MATMUL_DESC_TRANSB, &op_second,
                                                sizeof op_second),
                 "set TRANSB", key);
    if (matmul_is_fp8(key)) {
        int8_t fast = key->fast != 0;
        cublas_check(cublasLtMatmulDescSetAttribute(plan->desc, CUBLASLT_MATMUL_DESC_FAST_ACCUM,
                                                    &fast, sizeof fast),
                     "set FAST_ACCUM", key);
    }
    plan->a = key->trans_a ? matmul_layout(key, key->type_a, key->K, key->M)
                           : matmul_layout(key, key->type_a, key->M, key->K);
    plan->b = key->trans_b ? matmul_layout(key, key->type_b, key->N, key->K)
                           : matmul_layout(key, key->type_b, key->K, key->N);
    plan->d = matmul_layout(key, key->type_d, key->M, key->N);

    cublasLtMatmulPreference_t preference;
    uint64_t workspace_bytes = MATMUL_WORKSPACE_BYTES;
    cublas_check(cublasLtMatmulPreferenceCreate(&preference), "cublasLtMatmulPreferenceCreate",
                 key);
    cublas_check(cublasLtMatmulPreferenceSetAttribute(preference,
                                                      CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                      &workspace_bytes, sizeof workspace_bytes),
                 "set MAX_WORKSPACE_BYTES", key);
    const cublasLtMatmulPreferenceAttributes_t names[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    size_t a_bytes = matmul_type_bytes(key->type_a), b_bytes = matmul_type_bytes(key->type_b);
    size_t d_bytes = matmul_type_bytes(key->type_d);
    const uint32_t aligns[] = {matmul_alignment(key, key->K, key->N, b_bytes),
                               matmul_alignment(key, key->M, key->K, a_bytes),
                               matmul_alignment(key, key->M, key->N, d_bytes),
                               matmul_alignment(key, key->M, key->N, d_bytes)};
    for (int i = 0; i < 4; i++) {
        cublas_check(cublasLtMatmulPreferenceSetAttribute(preference, names[i], &aligns[i],
                                                          sizeof aligns[i]),
                     "set MIN_ALIGNMENT", key);
    }
    cublasLtMatmulHeuristicResult_t result;
    int found = 0;
    cublas_check(cublasLtMatmulAlgoGetHeuristic(mm->handle, plan->desc, plan->b, plan->a, plan->d,
                                                plan->d, preference, 1, &result, &found),
                 "cublasLtMatmulAlgoGetHeuristic", key);
    if (found == 0) cublas_check(CUBLAS_STATUS_NOT_SUPPORTED, "cuBLASLt has no algorithm", key);
    plan->algo = result.algo;
    cublas_check(cublasLtMatmulPreferenceDestroy(preference), "cublasLtMatmulPreferenceDestroy",
                 key);
}

static inline MatmulPlan* matmul_plan(const MatmulKey* key, Matmul* mm) {
    const int* words = (const int*)key;
    uint32_t slot = 0;
    for (size_t i = 0; i < sizeof *key / sizeof(int); i++) slot = (slot ^ words[i]) * 0x9e3779b1u;
    for (slot = slot >> 16 & (MATMUL_PLANS - 1);; slot = (slot + 1) & (MATMUL_PLANS - 1)) {
        MatmulPlan* plan = &mm->plans[slot];
        if (plan->desc && memcmp(&plan->key, key, sizeof *key) == 0) return plan;
        if (plan->desc) continue;
        REQUIRE(mm->count < MATMUL_PLANS / 2,
                "matmul: more than %d different shapes (M=%d N=%d K=%d)\n"
                "raise MATMUL_PLANS or pad the sizes",
                MATMUL_PLANS / 2, key->M, key->N, key->K);
        matmul_plan_make(plan, key, mm);
        mm->count++;
        return plan;
    }
}

// ---- calls ----------------------------------------------------------------------------------

static inline void matmul_init(Matmul* mm, cudaStream_t stream) {
    memset(mm, 0, sizeof *mm);
    cublas_check(cublasLtCreate(&mm->handle), "cublasLtCreate", NULL);
    CUDA_CHECK(cudaMalloc(&mm->workspace, MATMUL_WORKSPACE_BYTES));
    mm->stream = stream;
}

static inline void matmul_free(Matmul* mm) {
    for (int i = 0; i < MATMUL_PLANS; i++) {
        MatmulPlan* plan = &mm->plans[i];
        if (!plan->desc) continue;
        cublasLtMatrixLayoutDestroy(plan->a);
        cublasLtMatrixLayoutDestroy(plan->b);
        cublasLtMatrixLayoutDestroy(plan->d);
        cublasLtMatmulDescDestroy(plan->desc);
    }
    CUDA_CHECK(cudaFree(mm->workspace));
    cublas_check(cublasLtDestroy(mm->handle), "cublasLtDestroy", NULL);
    memset(mm, 0, sizeof *mm);
}

// "matmul_nt 64x768x768": M x N x K, and the count of a batch. "matmul_fp8_nt" of 8-bit floats.
static inline int matmul_trace(const MatmulKey* key, cudaStream_t stream) {
    char name[96];
    int n = snprintf(name, sizeof name, "matmul_%s%c%c %dx%dx%d", matmul_is_fp8(key) ? "fp8_" : "",
                     key->trans_a ? 't' : 'n', key->trans_b ? 't' : 'n', key->M, key->N, key->K);
    if (key->batch > 1) snprintf(name + n, sizeof name - n, " x%d", key->batch);
    return trace_begin(name, stream);
}

static inline void matmul_run(void* d, const void* a, const void* b, const void* c,
                              const MatmulKey* key, float alpha, float beta, Matmul* mm,
                              cudaStream_t stream) {
    REQUIRE(key->M > 0 && key->N > 0 && key->K > 0 && key->batch > 0,
            "matmul: M=%d N=%d K=%d batch=%d, all must be positive", key->M, key->N, key->K,
            key->batch);
    REQUIRE((((uintptr_t)d | (uintptr_t)a | (uintptr_t)b | (uintptr_t)c) & 15) == 0,
            "matmul: d=%p a=%p b=%p c=%p, all must be aligned to 16 bytes", d, a, b, c);
    REQUIRE(stream == mm->stream, "matmul: called on another stream than matmul_init\n"
            "the workspace serves one stream; make a Matmul for each");
    MatmulPlan* plan = matmul_plan(key, mm);
    int op = trace_on ? matmul_trace(key, stream) : -1;
    cublas_check(cublasLtMatmul(mm->handle, plan->desc, &alpha, b, plan->b, a, plan->a, &beta, c,
                                plan->d, d, plan->d, &plan->algo, mm->workspace,
                                MATMUL_WORKSPACE_BYTES, stream),
                 "cublasLtMatmul", key);
    trace_end(op, stream);
}

static inline void matmul_nt(floatX* y, const floatX* x, const floatX* w, int M, int N, int K,
                             Matmul* mm, cudaStream_t stream) {
    MatmulKey key = {M, N, K, 1, false, true, MATMUL_FLOATX, MATMUL_FLOATX, MATMUL_FLOATX, false};
    matmul_run(y, x, w, y, &key, 1.0f, 0.0f, mm, stream);
}

static inline void matmul_nn(floatX* y, const floatX* x, const floatX* w, int M, int N, int K,
                             Matmul* mm, cudaStream_t stream) {
    MatmulKey key = {M, N, K, 1, false, false, MATMUL_FLOATX, MATMUL_FLOATX, MATMUL_FLOATX, false};
    matmul_run(y, x, w, y, &key, 1.0f, 0.0f, mm, stream);
}

static inline void matmul_tn(float* dw, const floatX* a, const floatX* b, int M, int N, int K,
                             float beta, Matmul* mm, cudaStream_t stream) {
    MatmulKey key = {M, N, K, 1, true, false, MATMUL_FLOATX, MATMUL_FLOATX, CUDA_R_32F, false};
    matmul_run(dw, a, b, dw, &key, 1.0f, beta, mm, stream);
}

// d, c (batch, M, N); op(a_i) (M, K); op(b_i) (K, N). c may be d, and NULL if beta is 0.
static inline void matmul_batched(floatX* d, const floatX* a, const floatX* b, const floatX* c,
                                  int M, int N, int K, int batch, bool trans_a, bool trans_b,
                                  float alpha, float beta, Matmul* mm, cudaStream_t stream) {
    MatmulKey key = {M, N, K, batch, trans_a, trans_b,
                     MATMUL_FLOATX, MATMUL_FLOATX, MATMUL_FLOATX, false};
    matmul_run(d, a, b, c ? c : d, &key, alpha, beta, mm, stream);
}
