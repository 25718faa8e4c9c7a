/*
The part of cuBLASLt that the trainer uses, for a machine without a GPU.

Names, argument orders and enum values are those of the real header, so that llmc/matmul.cuh is the
same source on both targets. cublasLt.cpp computes the products with oneDNN.

    D = alpha op(A) op(B) + beta C      column-major, op = identity or transpose, strided batches

types       A B both float or both bf16; C D of one type: float, or bf16 if A and B are.
            Sums are kept in float. D is rounded once, after alpha and beta.
8 bits      A B e4m3, or one of them e5m2; C D float or bf16. The values are exact and so are the
            products; their sums are kept in float, more than Hopper's 14 or so bits, with or
            without FAST_ACCUM. What Hopper refuses is refused: op(A) other than T and op(B) other
            than N, two e5m2, sizes and strides that are no multiples of 16 bytes, less aligned
            pointers. Scale pointers, bf16 C with float D, 8-bit D and batches are not emulated.
beta = 0    C is not read, so NaN in it cannot leak; C may be NULL.
C and D     have equal layouts; D may be C, else they may not overlap.
determinism D is cut into pieces by its shape alone and each piece is computed by one thread:
            the bits do not depend on the number of OS threads.
strictness  What the real library merely assumes is checked: pointers are aligned as promised in the
            preferences, an algorithm is used for the problem it was found for, the workspace has
            the size that the heuristic asked for (its first and last bytes are overwritten).
test        test/cases_matmul.h, test/cases_fp8.h
*/
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <cuda_runtime.h>

// ---- constants: values of the real header ---------------------------------------------------

typedef enum {
    CUBLAS_STATUS_SUCCESS = 0,
    CUBLAS_STATUS_NOT_INITIALIZED = 1,
    CUBLAS_STATUS_ALLOC_FAILED = 3,
    CUBLAS_STATUS_INVALID_VALUE = 7,
    CUBLAS_STATUS_ARCH_MISMATCH = 8,
    CUBLAS_STATUS_MAPPING_ERROR = 11,
    CUBLAS_STATUS_EXECUTION_FAILED = 13,
    CUBLAS_STATUS_INTERNAL_ERROR = 14,
    CUBLAS_STATUS_NOT_SUPPORTED = 15,
    CUBLAS_STATUS_LICENSE_ERROR = 16,
} cublasStatus_t;

typedef enum { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1, CUBLAS_OP_C = 2 } cublasOperation_t;
typedef enum { CUBLAS_COMPUTE_32F = 68 } cublasComputeType_t;
typedef enum {
    CUDA_R_32F = 0,
    CUDA_R_16BF = 14,
    CUDA_R_8F_E4M3 = 28,
    CUDA_R_8F_E5M2 = 29,
} cudaDataType_t;
typedef cudaDataType_t cudaDataType;

typedef enum { CUBLASLT_ORDER_COL = 0, CUBLASLT_ORDER_ROW = 1 } cublasLtOrder_t;
typedef enum { CUBLASLT_EPILOGUE_DEFAULT = 1 } cublasLtEpilogue_t;
typedef enum {
    CUBLASLT_POINTER_MODE_HOST = 0,
    CUBLASLT_POINTER_MODE_DEVICE = 1,
} cublasLtPointerMode_t;

typedef enum {
    CUBLASLT_MATMUL_DESC_COMPUTE_TYPE = 0,    // int32_t
    CUBLASLT_MATMUL_DESC_SCALE_TYPE = 1,      // int32_t
    CUBLASLT_MATMUL_DESC_POINTER_MODE = 2,    // int32_t
    CUBLASLT_MATMUL_DESC_TRANSA = 3,          // int32_t
    CUBLASLT_MATMUL_DESC_TRANSB = 4,          // int32_t
    CUBLASLT_MATMUL_DESC_EPILOGUE = 7,        // uint32_t
    CUBLASLT_MATMUL_DESC_FAST_ACCUM = 25,     // int8_t
} cublasLtMatmulDescAttributes_t;

typedef enum {
    CUBLASLT_MATRIX_LAYOUT_TYPE = 0,                    // uint32_t
    CUBLASLT_MATRIX_LAYOUT_ORDER = 1,                   // int32_t
    CUBLASLT_MATRIX_LAYOUT_ROWS = 2,                    // uint64_t
    CUBLASLT_MATRIX_LAYOUT_COLS = 3,                    // uint64_t
    CUBLASLT_MATRIX_LAYOUT_LD = 4,                      // int64_t
    CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT = 5,             // int32_t
    CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET = 6,    // int64_t, in elements
} cublasLtMatrixLayoutAttribute_t;

typedef enum {
    CUBLASLT_MATMUL_PREF_SEARCH_MODE = 0,              // uint32_t
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1,      // uint64_t
    CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3,    // uint32_t
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5,    // uint32_t, these four
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES = 6,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES = 7,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES = 8,
} cublasLtMatmulPreferenceAttributes_t;

// ---- handles --------------------------------------------------------------------------------

typedef struct cublasLtContext* cublasLtHandle_t;
typedef struct cublasLtMatmulDescOpaque_t* cublasLtMatmulDesc_t;
typedef struct cublasLtMatrixLayoutOpaque_t* cublasLtMatrixLayout_t;
typedef struct cublasLtMatmulPreferenceOpaque_t* cublasLtMatmulPreference_t;

typedef struct {
    uint64_t data[8];
} cublasLtMatmulAlgo_t;

typedef struct {
    cublasLtMatmulAlgo_t algo;
    size_t workspaceSize;
    cublasStatus_t state;
    float wavesCount;
    int reserved[4];
} cublasLtMatmulHeuristicResult_t;

// ---- functions ------------------------------------------------------------------------------

extern "C" {

const char* cublasLtGetStatusName(cublasStatus_t status);
const char* cublasLtGetStatusString(cublasStatus_t status);
size_t cublasLtGetVersion(void);

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle);
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle);

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* desc,
                                        cublasComputeType_t compute_type,
                                        cudaDataType_t scale_type);
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc);
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc,
                                              cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, size_t bytes);

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type,
                                          uint64_t rows, uint64_t cols, int64_t ld);
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout);
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t attribute,
                                                const void* value, size_t bytes);

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference);
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference);
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void* value, size_t bytes);

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a_layout,
    cublasLtMatrixLayout_t b_layout, cublasLtMatrixLayout_t c_layout,
    cublasLtMatrixLayout_t d_layout, cublasLtMatmulPreference_t preference, int wanted,
    cublasLtMatmulHeuristicResult_t results[], int* found);

// algo NULL: the default preferences (pointers aligned to 256 bytes, no workspace).
cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void* alpha,
                              const void* a, cublasLtMatrixLayout_t a_layout, const void* b,
                              cublasLtMatrixLayout_t b_layout, const void* beta, const void* c,
                              cublasLtMatrixLayout_t c_layout, void* d,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t* algo,
                              void* workspace, size_t workspace_bytes, cudaStream_t stream);
}
