/*
Muon: momentum, made orthogonal, for the matrices between embedding and head.

    SUM   m = μ m + g               u = g + μ m
    LERP  m = m + (1-μ)(g - m)      u = g + μ (m - g)
    O = NS(u)
    W = W - lr scale O

NS, the Newton-Schulz iteration, on X = u / (|u|_F + 1e-7), in the form for rows <= cols:

    A = X Xᵀ;  B = b A + c A²;  X = a X + B X        (a, b, c) = (3.4445, -4.7750, 2.0315)

With u = U Σ Vᵀ the result is U S Vᵀ: every step maps each singular value s to a s + b s³ + c s⁵ and
leaves U and V alone. The coefficients make small values grow fast, not converge: after five steps
all that started above 0.002 of the norm lie in (0.68, 1.21), near 1 but not at it; smaller ones
have grown by up to 3.4445^5 = 485. That is as good as U Vᵀ for training, and cheaper. A zero
gradient gives O = 0.

X with rows > cols is worked on as its transpose without being moved: A = Xᵀ X and X = a X + X Bᵀ,
so that A is always (k,k), k = min(rows, cols). Alpha, beta and C of the products do all the adding:
a step is three matrix products, each for all matrices of a slice at once.

scale       muon_scale(): the published rules, of the logical (out, in) shape. The caller passes
            numbers because a bank may store a matrix transposed.
p g         a bank of matrices (rows, cols), p in floatX and g in float, rows*cols divisible by 8,
            aligned to 16 bytes. The `count` matrices to update begin at place[i] * stride elements:
            a rank has the whole bank and updates what it owns; the others are not touched.
master m    floats of the owned matrices alone, matrix i at i * stride. The update starts from
            master, or from p where master is NULL (fp32 build only); m is the only state.
scratch     muon_scratch_bytes(count, rows, cols), aligned to 256 bytes; bounded, because a bank is
            worked on in slices of at most MUON_SLICE matrices
rounding    bf16 build: u, X, A, B rounded to bf16 once each, everything between in float. |u| is of
            the rounded u, in float, in a fixed order.
same bits   Nothing here depends on what else is in a slice. So a matrix gets the same update on any
            number of ranks, if the library's product of a matrix does not depend on how many are
            multiplied at once: the host's does not, cuBLASLt may choose its kernel by that number.
NaN         one NaN in g makes the whole matrix NaN
cost        15 matrix products: 2 steps k² (2 max(rows,cols) + k) FLOP per matrix, 13.6 GFLOP at
            768x768; and 38 bytes per element (bf16 with master)
test        test/cases_optimizer.h: newton_schulz, muon
source      Jordan et al. 2024, kellerjordan.github.io/posts/muon; coefficients and both forms as
            in the records of modded-nanogpt
*/
#pragma once
#include "device.cuh"
#include "matmul.cuh"

typedef enum MuonForm { MUON_FORM_SUM, MUON_FORM_LERP, MUON_FORM_NONE /* u = g */ } MuonForm;
typedef enum MuonScale { MUON_SCALE_MAX_DIM, MUON_SCALE_ASPECT } MuonScale;

// 16 matrices of 768x768 have 16 x 36 tiles of 128x128: four for each of 132 multiprocessors.
constexpr int MUON_SLICE = 16;
constexpr int MUON_THREADS = 128;
constexpr int MUON_PASSES = 16;   // of 8 elements, to share the cost of the sum over a block
constexpr size_t MUON_BLOCK_ELEMENTS = (size_t)MUON_THREADS * MUON_PASSES * 8;
constexpr float MUON_EPS = 1e-7f;
constexpr float MUON_A = 3.4445f, MUON_B = -4.7750f, MUON_C = 2.0315f;

// What a kernel knows of each matrix of a slice; by value, so there is nothing to copy.
typedef struct MuonSlice {
    size_t offset[MUON_SLICE];   // its first element in the bank's p and g
    float step[MUON_SLICE];      // lr * scale
} MuonSlice;

typedef struct MuonScratch {
    floatX *x, *y, *a, *b;    // (slice, rows, cols) twice, (slice, k, k) twice
    float* partial;           // (slice, blocks): sums of squares
    float* inverse;           // (slice): 1 / (|u| + eps)
    int slice;                // matrices at a time
    size_t bytes;             // of all
} MuonScratch;

// A factor on the update that makes one learning rate serve all shapes; rows = out, cols = in.
static inline float muon_scale(MuonScale kind, int rows, int cols) {
    if (kind == MUON_SCALE_MAX_DIM) return sqrtf((float)(rows > cols ? rows : cols));
    return rows > cols ? sqrtf((float)rows / cols) : 1.0f;
}

static inline void* muon_carve(void* base, size_t* bytes, size_t size) {
    uintptr_t p = (uintptr_t)base + *bytes;    // base is NULL while only the sum is wanted
    *bytes += ceil_div(size, 256) * 256;
    return (void*)p;
}

static inline MuonScratch muon_scratch(void* scratch, int count, int rows, int cols) {
    MuonScratch s;
    int slices = (int)ceil_div(count, MUON_SLICE);
    int k = rows < cols ? rows : cols;
    size_t n = (size_t)rows * cols, square = (size_t)k * k;
    s.slice = (int)ceil_div(count, slices);    // near-equal: no small rest that leaves a GPU idle
    s.bytes = 0;
    s.x = (floatX*)muon_carve(scratch, &s.bytes, s.slice * n * sizeof(floatX));
    s.y = (floatX*)muon_carve(scratch, &s.bytes, s.slice * n * sizeof(floatX));
    s.a = (floatX*)muon_carve(scratch, &s.bytes, s.slice * square * sizeof(floatX));
    s.b = (floatX*)muon_carve(scratch, &s.bytes, s.slice * square * sizeof(floatX));
    s.partial = (float*)muon_carve(scratch, &s.bytes,
                                   s.slice * ceil_div(n, MUON_BLOCK_ELEMENTS) * sizeof(float));
    s.inverse = (float*)muon_carve(scratch, &s.bytes, s.slice * sizeof(float));
    return s;
}

static inline size_t muon_scratch_bytes(int count, int rows, int cols) {
    return muon_scratch(NULL, count, rows, cols).bytes;
}

// ---- kernels: blockIdx.y is the matrix ------------------------------------------------------

// m and u, the latter into x, and the block's share of |u|².
template <MuonForm FORM>
static __global__ void muon_momentum_kernel(floatX* x, float* m, float* partial, const float* g,
                                            size_t n, size_t stride, float mu, MuonSlice slice) {
    DYN_SMEM(float, scratch);
    x += blockIdx.y * n;
    if (FORM != MUON_FORM_NONE) m += blockIdx.y * stride;
    g += slice.offset[blockIdx.y];
    size_t begin = blockIdx.x * MUON_BLOCK_ELEMENTS + threadIdx.x * 8;
    float8 squares = {};
    for (int pass = 0; pass < MUON_PASSES; pass++) {
        size_t i = begin + (size_t)pass * MUON_THREADS * 8;
        if (i >= n) break;
        float8 u = load8(g + i);
        if (FORM != MUON_FORM_NONE) {
            float8 m8 = load8(m + i);
            for (int j = 0; j < 8; j++) {
                float g1 = u.v[j], m1 = m8.v[j];
                m1 = FORM == MUON_FORM_SUM ? mu * m1 + g1 : m1 + (1.0f - mu) * (g1 - m1);
                u.v[j] = FORM == MUON_FORM_SUM ? g1 + mu * m1 : g1 + mu * (m1 - g1);
                m8.v[j] = m1;
            }
            store8(m + i, m8);
        }
        for (int j = 0; j < 8 && FLOATX_IS_BF16; j++) u.v[j] = round_bf16(u.v[j]);
        for (int j = 0; j < 8; j++) squares.v[j] += u.v[j] * u.v[j];
        store8(x + i, u);
    }
    for (int half = 4; half > 0; half /= 2) {
        for (int j = 0; j < half; j++) squares.v[j] += squares.v[j + half];
    }
    float sum = block_sum(squares.v[0], scratch);
    if (threadIdx.x == 0) partial[blockIdx.y * gridDim.x + blockIdx.x] = sum;
}

static __global__ void muon_norm_kernel(float* inverse, const float* partial, int blocks) {
    DYN_SMEM(float, scratch);
    float sum = 0.0f;
    for (int b = threadIdx.x; b < blocks; b += MUON_THREADS)
        sum += partial[blockIdx.y * blocks + b];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) inverse[blockIdx.y] = 1.0f / (sqrtf(sum) + MUON_EPS);
}

static __global__ void muon_normalize_kernel(floatX* x, const float* inverse, size_t n) {
    size_t i = 8 * ((size_t)blockIdx.x * MUON_THREADS + threadIdx.x);
    if (i >= n) return;
    i += blockIdx.y * n;
    float factor = inverse[blockIdx.y];
    float8 v = load8(x + i);
    for (int j = 0; j < 8; j++) v.v[j] *= factor;
    store8(x + i, v);
}

template <bool MASTER>
static __global__ void muon_step_kernel(floatX* p, float* master, const floatX* o, size_t n,
                                        size_t stride, MuonSlice slice) {
    size_t i = 8 * ((size_t)blockIdx.x * MUON_THREADS + threadIdx.x);
    if (i >= n) return;
    p += slice.offset[blockIdx.y];
    if (MASTER) master += blockIdx.y * stride;
    float factor = slice.step[blockIdx.y];
    float8 w = MASTER ? load8(master + i) : load8(p + i), d = load8(o + blockIdx.y * n + i);
    for (int j = 0; j < 8; j++) w.v[j] -= factor * d.v[j];
    if (MASTER) store8(master + i, w);
    store8(p + i, w);
}

// ---- one slice ------------------------------------------------------------------------------

// x = (momentum of g) / norm, for `count` matrices; m is not touched by MUON_FORM_NONE.
static inline void muon_direction(const MuonScratch* s, float* m, const float* g,
                                  const MuonSlice* slice, int count, size_t n, size_t stride,
                                  float mu, MuonForm form, cudaStream_t stream) {
    int blocks = (int)ceil_div(n, MUON_BLOCK_ELEMENTS);
    dim3 grid(blocks, count), block(MUON_THREADS);
    size_t smem_bytes = 32 * sizeof(float);
    if (form == MUON_FORM_SUM) {
        launch<muon_momentum_kernel<MUON_FORM_SUM>>(grid, block, smem_bytes, stream, s->x, m,
                                                    s->partial, g, n, stride, mu, *slice);
    } else if (form == MUON_FORM_LERP) {
        launch<muon_momentum_kernel<MUON_FORM_LERP>>(grid, block, smem_bytes, stream, s->x, m,
                                                     s->partial, g, n, stride, mu, *slice);
    } else {
        launch<muon_momentum_kernel<MUON_FORM_NONE>>(grid, block, smem_bytes, stream, s->x, m,
                                                     s->partial, g, n, stride, mu, *slice);
    }
    launch<muon_norm_kernel>(dim3(1, count), block, smem_bytes, stream, s->inverse,
                             (const float*)s->partial, blocks);
    launch<muon_normalize_kernel>(dim3((unsigned)ceil_div(n, 8 * MUON_THREADS), count), block, 0,
                                  stream, s->x, (const float*)s->inverse, n);
}

// The iteration on s->x. Returns s->x or s->y, whichever holds the result; the other is junk.
static inline floatX* muon_iterate(const MuonScratch* s, int count, int rows, int cols, int steps,
                                   Matmul* mm, cudaStream_t stream) {
    bool tall = rows > cols;
    int k = tall ? cols : rows, depth = tall ? rows : cols;
    floatX *x = s->x, *y = s->y;
    for (int i = 0; i < steps; i++) {
        matmul_batched(s->a, x, x, NULL, k, k, depth, count, tall, !tall, 1.0f, 0.0f, mm, stream);
        matmul_batched(s->b, s->a, s->a, s->a, k, k, k, count, false, false, MUON_C, MUON_B, mm,
                       stream);
        if (tall) {
            matmul_batched(y, x, s->b, x, rows, cols, k, count, false, true, 1.0f, MUON_A, mm,
                           stream);
        } else {
            matmul_batched(y, s->b, x, x, rows, cols, k, count, false, false, 1.0f, MUON_A, mm,
                           stream);
        }
        floatX* swap = x;
        x = y;
        y = swap;
    }
    return x;
}

static inline MuonScratch muon_begin(void* scratch, size_t scratch_bytes, int count, int rows,
                                     int cols) {
    REQUIRE(count > 0 && rows > 0 && cols > 0 && (size_t)rows * cols % 8 == 0,
            "muon: %d matrices of %d x %d, rows*cols must be a positive multiple of 8", count, rows,
            cols);
    MuonScratch s = muon_scratch(scratch, count, rows, cols);
    REQUIRE(scratch_bytes >= s.bytes && ((uintptr_t)scratch & 255) == 0,
            "muon: scratch of %zu bytes at %p for %d matrices of %d x %d\n"
            "%zu bytes aligned to 256 are needed, see muon_scratch_bytes", scratch_bytes, scratch,
            count, rows, cols, s.bytes);
    return s;
}

// ---- launchers ------------------------------------------------------------------------------

// o = NS(g), both (count, rows, cols)
static inline void newton_schulz(floatX* o, const float* g, int count, int rows, int cols,
                                 int steps, void* scratch, size_t scratch_bytes, Matmul* mm,
                                 cudaStream_t stream) {
    MuonScratch s = muon_begin(scratch, scratch_bytes, count, rows, cols);
    size_t n = (size_t)rows * cols;
    for (int first = 0; first < count; first += s.slice) {
        int matrices = count - first < s.slice ? count - first : s.slice;
        MuonSlice slice = {};
        for (int i = 0; i < matrices; i++) slice.offset[i] = (first + i) * n;
        muon_direction(&s, NULL, g, &slice, matrices, n, n, 0.0f, MUON_FORM_NONE, stream);
        const floatX* result = muon_iterate(&s, matrices, rows, cols, steps, mm, stream);
        CUDA_CHECK(cudaMemcpyAsync(o + first * n, result, matrices * n * sizeof(floatX),
                                   cudaMemcpyDeviceToDevice, stream));
    }
}

// place and scale: one per matrix, on the host, read before the call returns.
static inline void muon_update(floatX* p, float* master, const float* g, float* m, const int* place,
                               int count, int rows, int cols, size_t stride, const float* scale,
                               float lr, float mu, MuonForm form, int ns_steps, void* scratch,
                               size_t scratch_bytes, Matmul* mm, cudaStream_t stream) {
    MuonScratch s = muon_begin(scratch, scratch_bytes, count, rows, cols);
    size_t n = (size_t)rows * cols;
    REQUIRE(stride >= n && stride % 8 == 0,
            "muon: %zu elements from matrix to matrix of %d x %d\n"
            "at least %zu and a multiple of 8 are needed", stride, rows, cols, n);
    REQUIRE(master || !FLOATX_IS_BF16, "muon: bf16 weights need a master copy in float");
    for (int i = 0; i < count; i++) {
        REQUIRE(place[i] > (i > 0 ? place[i - 1] : -1),
                "muon: matrix %d has place %d in the bank, places must ascend from 0", i, place[i]);
    }
    for (int first = 0; first < count; first += s.slice) {
        int matrices = count - first < s.slice ? count - first : s.slice;
        MuonSlice slice = {};
        for (int i = 0; i < matrices; i++) {
            slice.offset[i] = place[first + i] * stride;
            slice.step[i] = lr * scale[first + i];
        }
        muon_direction(&s, m + first * stride, g, &slice, matrices, n, stride, mu, form, stream);
        const floatX* o = muon_iterate(&s, matrices, rows, cols, ns_steps, mm, stream);
        dim3 grid((unsigned)ceil_div(n, 8 * MUON_THREADS), matrices), block(MUON_THREADS);
        if (master) {
            launch<muon_step_kernel<true>>(grid, block, 0, stream, p, master + first * stride, o, n,
                                           stride, slice);
        } else {
            launch<muon_step_kernel<false>>(grid, block, 0, stream, p, (float*)NULL, o, n, stride,
                                            slice);
        }
    }
}
