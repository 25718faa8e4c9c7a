/*
cuBLASLt on oneDNN.

    column-major D(m,n) = op(A)(m,k) op(B)(k,n)  is  row-major Dᵀ(n,m) = op(B)ᵀ(n,k) op(A)ᵀ(k,m)

oneDNN computes row-major products, so B is its source, A its weights, and below this line `rows`
is n and `cols` is m.

Given several threads, oneDNN may split the sum over k between them, and the bits of the result
would depend on their number. So every product is cut here, by its shape alone, into pieces that one
thread computes: tiles of at most 256 x 512 of one matrix, or several whole small matrices. The tile
is large enough for oneDNN to reach the speed of the undivided product on one core (measured: from
about 128 x 128 on) and leaves 24 pieces of a (1024, 3072) output to share out.

A oneDNN primitive takes 0.1 to 0.7 ms to make and is kept for ever, by the piece's shape; a program
has few shapes, and at most eight kinds of piece in each. Scratch memory belongs to the calling
thread (user mode): the library's own would be the creating thread's.

oneDNN 2.x has no 8-bit floats. Their values are floats, so that a piece of such a product turns its
rows and columns into floats, FP8_DEPTH of the sum at a time, and lets oneDNN add the products of
these; the sums of the parts are added in float too, alpha, beta and the rounding come at the end.

Runs with oneDNN 2.x (2.6.3 tried) and, by DNNL_VERSION_MAJOR, with 3.x (3.2 tried).
*/
#include "cublasLt.h"

#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <map>
#include <mutex>
#include <oneapi/dnnl/dnnl.hpp>

#include "cuda_bf16.h"
#include "cuda_fp8.h"
#include "engine.h"

// ---- descriptors ----------------------------------------------------------------------------

struct cublasLtContext {
    uint64_t magic;
};

struct cublasLtMatmulDescOpaque_t {
    int32_t compute_type, scale_type, pointer_mode, trans_a, trans_b;
    uint32_t epilogue;
    int8_t fast_accum;
};

struct cublasLtMatrixLayoutOpaque_t {
    uint32_t type;
    int32_t order, batch;
    uint64_t rows, cols;
    int64_t ld, stride;
};

struct cublasLtMatmulPreferenceOpaque_t {
    uint64_t workspace_bytes;
    uint32_t search_mode, reduction_mask, align[4];    // of A B C D
};

static const uint64_t CONTEXT_MAGIC = 0x746c78657468616dull;
static const uint64_t ALGO_MAGIC = 0x6f676c61746c6275ull;
static const uint32_t DEFAULT_ALIGN = 256;    // what the real library assumes of every pointer
static const uintptr_t WORKSPACE_ALIGN = 256;

static cublasStatus_t attribute_set(void* member, size_t member_bytes, const void* value,
                                    size_t bytes) {
    if (!value || bytes != member_bytes) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(member, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}

const char* cublasLtGetStatusName(cublasStatus_t status) {
    switch (status) {
        case CUBLAS_STATUS_SUCCESS: return "CUBLAS_STATUS_SUCCESS";
        case CUBLAS_STATUS_NOT_INITIALIZED: return "CUBLAS_STATUS_NOT_INITIALIZED";
        case CUBLAS_STATUS_ALLOC_FAILED: return "CUBLAS_STATUS_ALLOC_FAILED";
        case CUBLAS_STATUS_INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
        case CUBLAS_STATUS_ARCH_MISMATCH: return "CUBLAS_STATUS_ARCH_MISMATCH";
        case CUBLAS_STATUS_MAPPING_ERROR: return "CUBLAS_STATUS_MAPPING_ERROR";
        case CUBLAS_STATUS_EXECUTION_FAILED: return "CUBLAS_STATUS_EXECUTION_FAILED";
        case CUBLAS_STATUS_INTERNAL_ERROR: return "CUBLAS_STATUS_INTERNAL_ERROR";
        case CUBLAS_STATUS_NOT_SUPPORTED: return "CUBLAS_STATUS_NOT_SUPPORTED";
        case CUBLAS_STATUS_LICENSE_ERROR: return "CUBLAS_STATUS_LICENSE_ERROR";
    }
    return "unknown cublasStatus_t";
}

const char* cublasLtGetStatusString(cublasStatus_t status) {
    return cublasLtGetStatusName(status);
}

size_t cublasLtGetVersion(void) {
    return 130000;
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
    if (!handle) return CUBLAS_STATUS_INVALID_VALUE;
    *handle = new cublasLtContext{CONTEXT_MAGIC};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
    if (!handle || handle->magic != CONTEXT_MAGIC) return CUBLAS_STATUS_NOT_INITIALIZED;
    handle->magic = 0;
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* desc,
                                        cublasComputeType_t compute_type,
                                        cudaDataType_t scale_type) {
    if (!desc) return CUBLAS_STATUS_INVALID_VALUE;
    *desc = new cublasLtMatmulDescOpaque_t{
        compute_type, scale_type, CUBLASLT_POINTER_MODE_HOST, CUBLAS_OP_N, CUBLAS_OP_N,
        CUBLASLT_EPILOGUE_DEFAULT, 0};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) {
    delete desc;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc,
                                              cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, size_t bytes) {
    if (!desc) return CUBLAS_STATUS_INVALID_VALUE;
    switch (attribute) {
        case CUBLASLT_MATMUL_DESC_COMPUTE_TYPE:
            return attribute_set(&desc->compute_type, sizeof desc->compute_type, value, bytes);
        case CUBLASLT_MATMUL_DESC_SCALE_TYPE:
            return attribute_set(&desc->scale_type, sizeof desc->scale_type, value, bytes);
        case CUBLASLT_MATMUL_DESC_POINTER_MODE:
            return attribute_set(&desc->pointer_mode, sizeof desc->pointer_mode, value, bytes);
        case CUBLASLT_MATMUL_DESC_TRANSA:
            return attribute_set(&desc->trans_a, sizeof desc->trans_a, value, bytes);
        case CUBLASLT_MATMUL_DESC_TRANSB:
            return attribute_set(&desc->trans_b, sizeof desc->trans_b, value, bytes);
        case CUBLASLT_MATMUL_DESC_EPILOGUE:
            return attribute_set(&desc->epilogue, sizeof desc->epilogue, value, bytes);
        case CUBLASLT_MATMUL_DESC_FAST_ACCUM:
            return attribute_set(&desc->fast_accum, sizeof desc->fast_accum, value, bytes);
    }
    return CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type,
                                          uint64_t rows, uint64_t cols, int64_t ld) {
    if (!layout) return CUBLAS_STATUS_INVALID_VALUE;
    *layout = new cublasLtMatrixLayoutOpaque_t{(uint32_t)type, CUBLASLT_ORDER_COL, 1, rows, cols,
                                               ld, 0};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
    delete layout;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t attribute,
                                                const void* value, size_t bytes) {
    if (!layout) return CUBLAS_STATUS_INVALID_VALUE;
    switch (attribute) {
        case CUBLASLT_MATRIX_LAYOUT_TYPE:
            return attribute_set(&layout->type, sizeof layout->type, value, bytes);
        case CUBLASLT_MATRIX_LAYOUT_ORDER:
            return attribute_set(&layout->order, sizeof layout->order, value, bytes);
        case CUBLASLT_MATRIX_LAYOUT_ROWS:
            return attribute_set(&layout->rows, sizeof layout->rows, value, bytes);
        case CUBLASLT_MATRIX_LAYOUT_COLS:
            return attribute_set(&layout->cols, sizeof layout->cols, value, bytes);
        case CUBLASLT_MATRIX_LAYOUT_LD:
            return attribute_set(&layout->ld, sizeof layout->ld, value, bytes);
        case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT:
            return attribute_set(&layout->batch, sizeof layout->batch, value, bytes);
        case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET:
            return attribute_set(&layout->stride, sizeof layout->stride, value, bytes);
    }
    return CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
    if (!preference) return CUBLAS_STATUS_INVALID_VALUE;
    *preference = new cublasLtMatmulPreferenceOpaque_t{
        0, 0, ~0u, {DEFAULT_ALIGN, DEFAULT_ALIGN, DEFAULT_ALIGN, DEFAULT_ALIGN}};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
    delete preference;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void* value, size_t bytes) {
    if (!preference) return CUBLAS_STATUS_INVALID_VALUE;
    switch (attribute) {
        case CUBLASLT_MATMUL_PREF_SEARCH_MODE:
            return attribute_set(&preference->search_mode, sizeof(uint32_t), value, bytes);
        case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES:
            return attribute_set(&preference->workspace_bytes, sizeof(uint64_t), value, bytes);
        case CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK:
            return attribute_set(&preference->reduction_mask, sizeof(uint32_t), value, bytes);
        case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES:
        case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES:
        case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES:
        case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES:
            return attribute_set(
                &preference->align[attribute - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES],
                sizeof(uint32_t), value, bytes);
    }
    return CUBLAS_STATUS_INVALID_VALUE;
}

// ---- the problem, checked -------------------------------------------------------------------

// One operand of the row-major product: element (batch b, i, j) at b*stride + i*row + j*col.
typedef struct {
    int64_t stride, row, col;
} Strides;

typedef struct {
    int64_t rows, cols, depth, batch;    // D is (rows, cols), the sums have depth terms
    Strides src, weights, dst;
    uint32_t src_type, weights_type, dst_type;
    bool fast_accum;
} Problem;

static bool is_fp8(uint32_t type) {
    return type == CUDA_R_8F_E4M3 || type == CUDA_R_8F_E5M2;
}

static size_t element_bytes(uint32_t type) {
    return is_fp8(type) ? 1 : type == CUDA_R_16BF ? 2 : 4;
}

static bool layout_valid(cublasLtMatrixLayout_t layout) {
    return layout->rows > 0 && layout->cols > 0 && layout->rows <= INT32_MAX &&
           layout->cols <= INT32_MAX && layout->ld >= (int64_t)layout->rows && layout->batch > 0;
}

static bool layout_equal(cublasLtMatrixLayout_t x, cublasLtMatrixLayout_t y) {
    return x->type == y->type && x->order == y->order && x->rows == y->rows && x->cols == y->cols &&
           x->ld == y->ld && x->batch == y->batch && x->stride == y->stride;
}

// What Hopper's tensor cores take of 8-bit floats, with D = Aᵀ B of (m,n), sums of k terms: k is
// the contiguous direction of both, not both are e5m2, all sizes and strides are multiples of 16
// bytes (n too, as the manual has it). Batches are not emulated.
static bool fp8_valid(cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a,
                      cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t d) {
    bool sizes = a->rows % 16 == 0 && a->cols % 16 == 0 && b->cols % 16 == 0;
    bool strides = a->ld % 16 == 0 && b->ld % 16 == 0 &&
                   d->ld * (int64_t)element_bytes(d->type) % 16 == 0;
    return is_fp8(a->type) && is_fp8(b->type) &&
           (a->type == CUDA_R_8F_E4M3 || b->type == CUDA_R_8F_E4M3) &&
           (d->type == CUDA_R_16BF || d->type == CUDA_R_32F) && desc->trans_a == CUBLAS_OP_T &&
           desc->trans_b == CUBLAS_OP_N && d->batch == 1 && sizes && strides;
}

static cublasStatus_t problem_make(Problem* problem, cublasLtMatmulDesc_t desc,
                                   cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                   cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d) {
    if (!desc || !a || !b || !c || !d) return CUBLAS_STATUS_INVALID_VALUE;
    if (!layout_valid(a) || !layout_valid(b) || !layout_valid(c) || !layout_valid(d)) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    bool ta = desc->trans_a == CUBLAS_OP_T, tb = desc->trans_b == CUBLAS_OP_T;
    uint64_t m = ta ? a->cols : a->rows, k = ta ? a->rows : a->cols;
    uint64_t k_of_b = tb ? b->cols : b->rows, n = tb ? b->rows : b->cols;
    if (k != k_of_b || d->rows != m || d->cols != n || c->rows != m || c->cols != n) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    if (a->batch != d->batch || b->batch != d->batch || c->batch != d->batch) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    if (d->batch > 1 && d->stride < d->ld * (int64_t)(d->cols - 1) + (int64_t)d->rows) {
        return CUBLAS_STATUS_INVALID_VALUE;    // the matrices of D would overlap
    }

    bool orders = a->order == CUBLASLT_ORDER_COL && b->order == CUBLASLT_ORDER_COL &&
                  c->order == CUBLASLT_ORDER_COL && d->order == CUBLASLT_ORDER_COL;
    bool ops = (ta || desc->trans_a == CUBLAS_OP_N) && (tb || desc->trans_b == CUBLAS_OP_N);
    bool fp8 = is_fp8(a->type) || is_fp8(b->type);
    bool types = a->type == b->type &&
                 ((a->type == CUDA_R_32F && d->type == CUDA_R_32F) ||
                  (a->type == CUDA_R_16BF && (d->type == CUDA_R_32F || d->type == CUDA_R_16BF)));
    if (fp8) types = fp8_valid(desc, a, b, d);
    if (!orders || !ops || !types || c->type != d->type ||
        desc->compute_type != CUBLAS_COMPUTE_32F || desc->scale_type != CUDA_R_32F ||
        desc->pointer_mode != CUBLASLT_POINTER_MODE_HOST ||
        desc->epilogue != CUBLASLT_EPILOGUE_DEFAULT || !layout_equal(c, d)) {
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }

    *problem = Problem{(int64_t)n,
                       (int64_t)m,
                       (int64_t)k,
                       d->batch,
                       tb ? Strides{b->stride, 1, b->ld} : Strides{b->stride, b->ld, 1},
                       ta ? Strides{a->stride, 1, a->ld} : Strides{a->stride, a->ld, 1},
                       Strides{d->stride, d->ld, 1},
                       b->type,
                       a->type,
                       d->type,
                       desc->fast_accum != 0};
    return CUBLAS_STATUS_SUCCESS;
}

// Bytes from an operand's first element to one past its last.
static size_t operand_bytes(Strides s, int64_t rows, int64_t cols, int64_t batch, uint32_t type) {
    return ((batch - 1) * s.stride + (rows - 1) * s.row + (cols - 1) * s.col + 1) *
           element_bytes(type);
}

static uint64_t hash_bytes(const void* data, size_t bytes) {
    uint64_t hash = 0xcbf29ce484222325ull;    // FNV-1a
    for (size_t i = 0; i < bytes; i++) hash = (hash ^ ((const uint8_t*)data)[i]) * 0x100000001b3ull;
    return hash;
}

static uint64_t problem_hash(const Problem* p) {
    int64_t members[] = {p->rows,        p->cols,        p->depth,       p->batch,
                         p->src.stride,  p->src.row,     p->src.col,     p->weights.stride,
                         p->weights.row, p->weights.col, p->dst.stride,  p->dst.row,
                         p->src_type,    p->weights_type, p->dst_type,   p->fast_accum};
    return hash_bytes(members, sizeof members);
}

// data: magic, problem, workspace bytes, alignments of A B C D in log2, each in a byte
static void algo_make(cublasLtMatmulAlgo_t* algo, const Problem* problem, size_t workspace_bytes,
                      const uint32_t align[4]) {
    memset(algo, 0, sizeof *algo);
    algo->data[0] = ALGO_MAGIC;
    algo->data[1] = problem_hash(problem);
    algo->data[2] = workspace_bytes;
    for (int i = 0; i < 4; i++) {
        // No kernel of the real library wants more than 16 bytes; below that it has others.
        uint32_t needed = align[i] > 16 ? 16 : align[i];
        for (uint64_t log = 0; 2u << log <= needed; log++) algo->data[3 + i] = log + 1;
    }
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a_layout,
    cublasLtMatrixLayout_t b_layout, cublasLtMatrixLayout_t c_layout,
    cublasLtMatrixLayout_t d_layout, cublasLtMatmulPreference_t preference, int wanted,
    cublasLtMatmulHeuristicResult_t results[], int* found) {
    if (!handle || handle->magic != CONTEXT_MAGIC) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (!preference || !results || !found || wanted <= 0) return CUBLAS_STATUS_INVALID_VALUE;
    *found = 0;
    Problem problem;
    cublasStatus_t status = problem_make(&problem, desc, a_layout, b_layout, c_layout, d_layout);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    for (int i = 0; i < 4; i++) {    // 8-bit floats have no kernel for less aligned pointers
        if (is_fp8(problem.src_type) && preference->align[i] % 16 != 0) {
            return CUBLAS_STATUS_NOT_SUPPORTED;
        }
    }
    memset(results, 0, sizeof *results);
    // All of the permitted workspace is asked for, so that a caller who passes less is found out.
    algo_make(&results->algo, &problem, preference->workspace_bytes, preference->align);
    results->workspaceSize = preference->workspace_bytes;
    results->state = CUBLAS_STATUS_SUCCESS;
    results->wavesCount = 1;
    *found = 1;
    return CUBLAS_STATUS_SUCCESS;
}

// ---- cutting D into pieces ------------------------------------------------------------------

typedef struct {
    int64_t tile_rows, tile_cols;    // of a piece; the last of each direction may be smaller
    int64_t row_tiles, col_tiles;    // per matrix
    int64_t group, groups;           // whole matrices per piece (only if a matrix is one tile)
} Partition;

// Near-equal parts of at most `most`, a multiple of `quantum` (which divides `most`).
static int64_t part_size(int64_t n, int64_t parts, int64_t quantum) {
    int64_t size = (n + parts - 1) / parts;
    return (size + quantum - 1) / quantum * quantum;
}

static int64_t div_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// By the shape of one matrix alone: neither the number of threads, nor a pointer, nor how many other
// matrices there are may matter here, as oneDNN sums in another order in a tile of another shape.
static Partition partition_make(const Problem* p) {
    const int64_t MOST_ROWS = 256, MOST_COLS = 512, QUANTUM = 32;
    const double SMALL = 16e6;    // FLOPs: some 50 µs; a smaller piece is not worth handing over
    const int64_t ENOUGH = 8;     // pieces to share out evenly between a few threads
    Partition c = {0, 0, div_up(p->rows, MOST_ROWS), div_up(p->cols, MOST_COLS), 1, p->batch};
    for (;;) {
        c.tile_rows = part_size(p->rows, c.row_tiles, QUANTUM);
        c.tile_cols = part_size(p->cols, c.col_tiles, QUANTUM);
        double piece_flops = 2.0 * c.tile_rows * c.tile_cols * p->depth;
        if (c.row_tiles * c.col_tiles >= ENOUGH || piece_flops < 2 * SMALL) break;
        if (c.tile_rows >= c.tile_cols && c.tile_rows > QUANTUM) {
            c.row_tiles *= 2;
        } else if (c.tile_cols > QUANTUM) {
            c.col_tiles *= 2;
        } else {
            break;
        }
    }
    c.row_tiles = div_up(p->rows, c.tile_rows);    // rounding up to the quantum may empty the last
    c.col_tiles = div_up(p->cols, c.tile_cols);
    if (c.row_tiles * c.col_tiles == 1 && p->batch > 1) {
        double flops = 2.0 * p->rows * p->cols * p->depth;
        c.group = flops >= SMALL ? 1 : (int64_t)(SMALL / flops);
        if (c.group > p->batch) c.group = p->batch;
        c.groups = div_up(p->batch, c.group);
    }
    return c;
}

// ---- oneDNN primitives ----------------------------------------------------------------------

// Makes oneDNN work in the calling thread alone, for the time of a scope.
struct OneThread {
    int before;
    OneThread() : before(omp_get_max_threads()) { omp_set_num_threads(1); }
    ~OneThread() { omp_set_num_threads(before); }
};

typedef struct {
    int64_t rows, cols, depth, batch;
    Strides src, weights, dst;
    int64_t bf16_in, bf16_out;
    float alpha, beta;
} PieceKey;    // no padding: compared as bytes

struct PieceKeyLess {
    bool operator()(const PieceKey& x, const PieceKey& y) const {
        return memcmp(&x, &y, sizeof x) < 0;
    }
};

struct Piece {
    dnnl::memory::desc src, weights, dst, scratch;
    dnnl::matmul primitive;
};

static dnnl::engine& cpu_engine(void) {
    static dnnl::engine* engine = new dnnl::engine(dnnl::engine::kind::cpu, 0);
    return *engine;
}

static dnnl::memory::desc piece_desc(int64_t batch, int64_t rows, int64_t cols, Strides s,
                                     bool is_bf16) {
    dnnl::memory::data_type type =
        is_bf16 ? dnnl::memory::data_type::bf16 : dnnl::memory::data_type::f32;
    if (batch == 1) return dnnl::memory::desc({rows, cols}, type, {s.row, s.col});
    return dnnl::memory::desc({batch, rows, cols}, type, {s.stride, s.row, s.col});
}

static Piece* piece_make(const PieceKey& key) {
    OneThread one_thread;    // the number of threads is fixed when the primitive is made
    Piece* piece = new Piece;
    piece->src = piece_desc(key.batch, key.rows, key.depth, key.src, key.bf16_in);
    piece->weights = piece_desc(key.batch, key.depth, key.cols, key.weights, key.bf16_in);
    piece->dst = piece_desc(key.batch, key.rows, key.cols, key.dst, key.bf16_out);

    dnnl::post_ops post;
    dnnl::primitive_attr attr;
    // Not a post-operation: a linear one and a sum together have no fast kernel for a tile.
#if DNNL_VERSION_MAJOR >= 3
    if (key.alpha != 1) attr.set_scales_mask(DNNL_ARG_SRC, 0);
#else
    if (key.alpha != 1) attr.set_output_scales(0, {key.alpha});
#endif
    if (key.beta != 0) post.append_sum(key.beta);
    attr.set_post_ops(post);
    attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    attr.set_fpmath_mode(dnnl::fpmath_mode::strict);    // an environment variable could say bf16
#if DNNL_VERSION_MAJOR >= 3
    dnnl::matmul::primitive_desc pd(cpu_engine(), piece->src, piece->weights, piece->dst, attr);
#else
    dnnl::matmul::primitive_desc pd(dnnl::matmul::desc(piece->src, piece->weights, piece->dst),
                                    attr, cpu_engine());
#endif
    // The reference kernel is right but some thousand times slower, which looks like a hang.
    double flops = 2.0 * key.batch * key.rows * key.cols * key.depth;
    if (strncmp(pd.impl_info_str(), "ref", 3) == 0 && flops > 1e6) {
        fprintf(stderr,
                "cublasLt: oneDNN has only its reference kernel (%s) for %lld x (%lld, %lld, "
                "%lld), bf16 in %d out %d; choose another layout\n",
                pd.impl_info_str(), (long long)key.batch, (long long)key.rows, (long long)key.cols,
                (long long)key.depth, (int)key.bf16_in, (int)key.bf16_out);
        exit(70);
    }
    piece->scratch = pd.scratchpad_desc();
    piece->primitive = dnnl::matmul(pd);
    return piece;
}

static Piece* piece_find(const PieceKey& key) {
    static std::mutex* mutex = new std::mutex;
    static std::map<PieceKey, Piece*, PieceKeyLess>* cache =
        new std::map<PieceKey, Piece*, PieceKeyLess>;
    std::lock_guard<std::mutex> lock(*mutex);
    Piece*& slot = (*cache)[key];
    if (!slot) slot = piece_make(key);
    return slot;
}

// Memory that grows on demand; each thread has its own.
struct Scratch {
    void* data = nullptr;
    size_t bytes = 0;
    ~Scratch() { free(data); }
};

static void* scratch_reserve(Scratch* scratch, size_t bytes) {
    if (bytes > scratch->bytes) {
        free(scratch->data);
        scratch->bytes = (bytes + 4095) / 4096 * 4096;
        scratch->data = aligned_alloc(4096, scratch->bytes);
        if (!scratch->data) {
            fprintf(stderr, "cublasLt: out of memory for %zu bytes of scratch\n", bytes);
            exit(70);
        }
    }
    return scratch->data;
}

// ---- execution ------------------------------------------------------------------------------

typedef struct {
    Problem problem;
    Partition cut;
    Piece* kinds[8];    // by (last row tile) + 2 (last column tile) + 4 (last group); not for fp8
    float alpha, beta;
    const char *src, *weights, *c;
    char *dst, *workspace;
    size_t workspace_bytes;
} MatmulCall;

static int64_t shorter(int64_t n, int64_t part, int64_t index) {
    return n - index * part < part ? n - index * part : part;
}

static void piece_run(const Piece* piece, const void* src, const void* weights, void* dst,
                      float alpha) {
    OneThread one_thread;
    static thread_local Scratch scratch;
    static thread_local dnnl::stream stream(cpu_engine());
    dnnl::memory src_memory(piece->src, cpu_engine(), (void*)src);
    dnnl::memory weights_memory(piece->weights, cpu_engine(), (void*)weights);
    dnnl::memory dst_memory(piece->dst, cpu_engine(), dst);
    dnnl::memory scratch_memory(piece->scratch, cpu_engine(),
                                scratch_reserve(&scratch, piece->scratch.get_size()));
    dnnl_exec_arg_t args[5] = {{DNNL_ARG_SRC, src_memory.get()},
                               {DNNL_ARG_WEIGHTS, weights_memory.get()},
                               {DNNL_ARG_DST, dst_memory.get()},
                               {DNNL_ARG_SCRATCHPAD, scratch_memory.get()}};
    int arg_count = 4;
    (void)alpha;
#if DNNL_VERSION_MAJOR >= 3
    // given when it runs, where 2.x has it in the primitive
    dnnl::memory::desc alpha_desc({1}, dnnl::memory::data_type::f32, {1});
    dnnl::memory alpha_memory(alpha_desc, cpu_engine(), &alpha);
    if (alpha != 1) {
        args[arg_count++] = {DNNL_ARG_ATTR_SCALES | DNNL_ARG_SRC, alpha_memory.get()};
    }
#endif
    dnnl_status_t status =
        dnnl_primitive_execute(piece->primitive.get(), stream.get(), arg_count, args);
    if (status != dnnl_success) {
        fprintf(stderr, "cublasLt: oneDNN failed with status %d\n", (int)status);
        exit(70);
    }
}

static void matmul_piece(void* arg, int index) {
    const MatmulCall* call = (const MatmulCall*)arg;
    const Problem* p = &call->problem;
    const Partition* cut = &call->cut;
    int64_t row_tile = index % cut->row_tiles;
    int64_t col_tile = index / cut->row_tiles % cut->col_tiles;
    int64_t group = index / (cut->row_tiles * cut->col_tiles);
    const Piece* piece = call->kinds[(row_tile == cut->row_tiles - 1) +
                                     2 * (col_tile == cut->col_tiles - 1) +
                                     4 * (group == cut->groups - 1)];
    int64_t i = row_tile * cut->tile_rows, j = col_tile * cut->tile_cols, b = group * cut->group;
    size_t in = element_bytes(p->src_type), out = element_bytes(p->dst_type);
    const char* src = call->src + (b * p->src.stride + i * p->src.row) * in;
    const char* weights = call->weights + (b * p->weights.stride + j * p->weights.col) * in;
    int64_t dst_offset = (b * p->dst.stride + i * p->dst.row + j) * out;
    char* dst = call->dst + dst_offset;

    if (call->beta != 0 && call->c != call->dst) {    // oneDNN adds what stands in its destination
        int64_t rows = shorter(p->rows, cut->tile_rows, row_tile);
        int64_t cols = shorter(p->cols, cut->tile_cols, col_tile);
        int64_t matrices = shorter(p->batch, cut->group, group);
        for (int64_t q = 0; q < matrices; q++) {
            for (int64_t r = 0; r < rows; r++) {
                int64_t offset = (q * p->dst.stride + r * p->dst.row) * out;
                memcpy(dst + offset, call->c + dst_offset + offset, cols * out);
            }
        }
    }
    piece_run(piece, src, weights, dst, call->alpha);
}

// ---- execution, 8-bit floats ----------------------------------------------------------------

// Terms of a sum that are floats at a time: 3 MB for a tile of 256 x 512, and the conversion of an
// element is shared by hundreds of products.
static const int64_t FP8_DEPTH = 1024;

struct Fp8Values {
    float e4m3[256], e5m2[256];
    Fp8Values() {
        for (int code = 0; code < 256; code++) {
            __nv_fp8_e4m3 x;
            __nv_fp8_e5m2 y;
            x.__x = y.__x = (__nv_fp8_storage_t)code;
            e4m3[code] = (float)x;
            e5m2[code] = (float)y;
        }
    }
};

// out (rows, depth) from rows of codes that lie `stride` apart.
static void fp8_decode(float* out, const char* codes, uint32_t type, int64_t rows, int64_t depth,
                       int64_t stride) {
    static const Fp8Values values;
    const float* value = type == CUDA_R_8F_E4M3 ? values.e4m3 : values.e5m2;
    for (int64_t i = 0; i < rows; i++) {
        const uint8_t* row = (const uint8_t*)codes + i * stride;
        for (int64_t k = 0; k < depth; k++) out[i * depth + k] = value[row[k]];
    }
}

static void matmul_piece_fp8(void* arg, int index) {
    const MatmulCall* call = (const MatmulCall*)arg;
    const Problem* p = &call->problem;
    const Partition* cut = &call->cut;
    int64_t row_tile = index % cut->row_tiles, col_tile = index / cut->row_tiles;
    int64_t i = row_tile * cut->tile_rows, j = col_tile * cut->tile_cols;
    int64_t rows = shorter(p->rows, cut->tile_rows, row_tile);
    int64_t cols = shorter(p->cols, cut->tile_cols, col_tile);
    int64_t most = p->depth < FP8_DEPTH ? p->depth : FP8_DEPTH;
    static thread_local Scratch scratch;
    float* sums = (float*)scratch_reserve(
        &scratch, (rows * cols + (rows + cols) * most) * sizeof(float));
    float *src = sums + rows * cols, *weights = src + rows * most;
    for (int64_t k = 0; k < p->depth; k += most) {
        int64_t depth = p->depth - k < most ? p->depth - k : most;
        fp8_decode(src, call->src + i * p->src.row + k, p->src_type, rows, depth, p->src.row);
        fp8_decode(weights, call->weights + j * p->weights.col + k, p->weights_type, cols, depth,
                   p->weights.col);
        PieceKey key;
        memset(&key, 0, sizeof key);
        key.rows = rows, key.cols = cols, key.depth = depth, key.batch = 1;
        key.src = Strides{0, depth, 1}, key.weights = Strides{0, 1, depth};
        key.dst = Strides{0, cols, 1};
        key.alpha = 1, key.beta = k > 0;
        piece_run(piece_find(key), src, weights, sums, 1);
    }
    float alpha = call->alpha, beta = call->beta;
    for (int64_t r = 0; r < rows; r++) {
        int64_t first = (i + r) * p->dst.row + j;
        float* sum = sums + r * cols;
        for (int64_t k = 0; k < cols; k++) sum[k] *= alpha;
        if (p->dst_type == CUDA_R_32F) {
            const float* c = beta != 0 ? (const float*)call->c + first : NULL;
            for (int64_t k = 0; k < cols && c; k++) sum[k] += beta * c[k];
            memcpy((float*)call->dst + first, sum, cols * sizeof(float));
        } else {
            const unsigned short* c = beta != 0 ? (const unsigned short*)call->c + first : NULL;
            unsigned short* d = (unsigned short*)call->dst + first;
            for (int64_t k = 0; k < cols && c; k++) sum[k] += beta * host_bf16_float(c[k]);
            for (int64_t k = 0; k < cols; k++) d[k] = host_bf16_bits(sum[k]);
        }
    }
}

// ---- the call -------------------------------------------------------------------------------

// oneDNN's code is not instrumented, so under AddressSanitizer the operands are looked at here.
extern "C" void* __asan_region_is_poisoned(void* begin, size_t bytes) __attribute__((weak));

static void check_range(const char* what, const void* data, size_t bytes) {
    if (!__asan_region_is_poisoned) return;
    void* bad = __asan_region_is_poisoned((void*)data, bytes);
    if (!bad) return;
    fprintf(stderr, "cublasLt: operand %s at %p is not %zu bytes long: byte %zu is out of bounds\n",
            what, data, bytes, (size_t)((char*)bad - (char*)data));
    abort();
}

static void matmul_run(void* arg) {
    MatmulCall* call = (MatmulCall*)arg;
    const Problem* p = &call->problem;
    const Partition* cut = &call->cut;
    check_range("B", call->src, operand_bytes(p->src, p->rows, p->depth, p->batch, p->src_type));
    check_range("A", call->weights,
                operand_bytes(p->weights, p->depth, p->cols, p->batch, p->weights_type));
    check_range("D", call->dst, operand_bytes(p->dst, p->rows, p->cols, p->batch, p->dst_type));
    if (call->beta != 0) {
        check_range("C", call->c, operand_bytes(p->dst, p->rows, p->cols, p->batch, p->dst_type));
    }
    if (call->workspace_bytes > 0) {    // whoever keeps something there shall notice
        size_t edge = call->workspace_bytes < 256 ? call->workspace_bytes : 256;
        memset(call->workspace, 0xff, edge);
        memset(call->workspace + call->workspace_bytes - edge, 0xff, edge);
    }
    double begin = host_profile_begin();
    bool fp8 = is_fp8(p->src_type);
    host_parallel_for((int)(cut->row_tiles * cut->col_tiles * cut->groups),
                      fp8 ? matmul_piece_fp8 : matmul_piece, call);
    if (begin == 0) return;
    char name[96];    // in the letters of matmul.cuh: n and t for the two operands, then M x N x K
    snprintf(name, sizeof name, "matmul_%s%c%c%s %lldx%lldx%lld, %lld", fp8 ? "fp8_" : "",
             p->src.col == 1 ? 'n' : 't', p->weights.col == 1 ? 'n' : 't',
             call->beta != 0 ? "+" : "", (long long)p->rows,
             (long long)p->cols, (long long)p->depth, (long long)p->batch);
    host_profile_end(name, begin);
}

static bool aligned(const void* pointer, uint64_t log) {
    return ((uintptr_t)pointer & ((1u << log) - 1)) == 0;
}

static bool overlap(const void* x, size_t x_bytes, const void* y, size_t y_bytes) {
    return (uintptr_t)x < (uintptr_t)y + y_bytes && (uintptr_t)y < (uintptr_t)x + x_bytes;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void* alpha,
                              const void* a, cublasLtMatrixLayout_t a_layout, const void* b,
                              cublasLtMatrixLayout_t b_layout, const void* beta, const void* c,
                              cublasLtMatrixLayout_t c_layout, void* d,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t* algo,
                              void* workspace, size_t workspace_bytes, cudaStream_t stream) {
    if (!handle || handle->magic != CONTEXT_MAGIC) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (!alpha || !beta || !a || !b || !d) return CUBLAS_STATUS_INVALID_VALUE;
    MatmulCall call;
    memset(&call, 0, sizeof call);
    Problem* p = &call.problem;
    cublasStatus_t status = problem_make(p, desc, a_layout, b_layout, c_layout, d_layout);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    // read at the call, not when the stream gets there
    memcpy(&call.alpha, alpha, sizeof(float));
    memcpy(&call.beta, beta, sizeof(float));
    if (call.beta != 0 && !c) return CUBLAS_STATUS_INVALID_VALUE;

    cublasLtMatmulAlgo_t default_algo;
    if (!algo) {
        const uint32_t align[4] = {DEFAULT_ALIGN, DEFAULT_ALIGN, DEFAULT_ALIGN, DEFAULT_ALIGN};
        algo_make(&default_algo, p, 0, align);
        algo = &default_algo;
    }
    if (algo->data[0] != ALGO_MAGIC || algo->data[1] != problem_hash(p)) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    if (algo->data[2] > workspace_bytes || (algo->data[2] > 0 && !workspace) ||
        ((uintptr_t)workspace & (WORKSPACE_ALIGN - 1))) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    if (!aligned(a, algo->data[3]) || !aligned(b, algo->data[4]) ||
        (call.beta != 0 && !aligned(c, algo->data[5])) || !aligned(d, algo->data[6])) {
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    // Strided operands may interleave with D without touching it; dense ones may not.
    size_t d_bytes = operand_bytes(p->dst, p->rows, p->cols, p->batch, p->dst_type);
    size_t a_bytes = operand_bytes(p->weights, p->depth, p->cols, p->batch, p->weights_type);
    size_t b_bytes = operand_bytes(p->src, p->rows, p->depth, p->batch, p->src_type);
    bool dense = d_layout->ld == (int64_t)d_layout->rows &&
                 a_layout->ld == (int64_t)a_layout->rows && b_layout->ld == (int64_t)b_layout->rows;
    if (dense && (overlap(d, d_bytes, a, a_bytes) || overlap(d, d_bytes, b, b_bytes))) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    if (dense && call.beta != 0 && c != d && overlap(d, d_bytes, c, d_bytes)) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }

    call.cut = partition_make(p);
    call.src = (const char*)b;
    call.weights = (const char*)a;
    call.c = (const char*)c;
    call.dst = (char*)d;
    call.workspace = (char*)workspace;
    call.workspace_bytes = algo->data[2];
    for (int kind = 0; kind < 8 && !is_fp8(p->src_type); kind++) {
        bool last_row = kind & 1, last_col = kind & 2, last_group = kind & 4;
        const Partition* cut = &call.cut;
        if ((!last_row && cut->row_tiles == 1) || (!last_col && cut->col_tiles == 1) ||
            (!last_group && cut->groups == 1)) {
            continue;    // no such piece
        }
        PieceKey key;
        memset(&key, 0, sizeof key);
        key.rows = shorter(p->rows, cut->tile_rows, last_row ? cut->row_tiles - 1 : 0);
        key.cols = shorter(p->cols, cut->tile_cols, last_col ? cut->col_tiles - 1 : 0);
        key.depth = p->depth;
        key.batch = shorter(p->batch, cut->group, last_group ? cut->groups - 1 : 0);
        key.src = p->src, key.weights = p->weights, key.dst = p->dst;
        if (key.batch == 1) key.src.stride = key.weights.stride = key.dst.stride = 0;
        key.bf16_in = p->src_type == CUDA_R_16BF, key.bf16_out = p->dst_type == CUDA_R_16BF;
        key.alpha = call.alpha, key.beta = call.beta;
        call.kinds[kind] = piece_find(key);
    }
    host_stream_submit(stream, matmul_run, &call, sizeof call);
    return CUBLAS_STATUS_SUCCESS;
}
