/*
Muon and NorMuon: momentum, made orthogonal, for the matrices between embedding and head.

    SUM   m = μ m + g               u = g + μ m
    LERP  m = m + (1-μ)(g - m)      u = g + μ (m - g)
    O = NS(u)
    second moment (β2 > 0), on each column of O, or with second_by_row on each row:
          n = |O|_F;  r = mean of O² in it;  v = v + (1-β2)(r - v)
          O = O / √max(v, 1e-10);  O = O n / max(|O|_F, 1e-10)
    cautious decay (> 0): O = O + decay lr W where O W >= 0
    W = W - lr scale O

NS, the Newton-Schulz iteration, on X = u / (|u|_F + 1e-7), in the form for rows <= cols:

    A = X Xᵀ;  B = b A + c A²;  X = a X + B X        (a, b, c) = (3.4445, -4.7750, 2.0315)

With u = U Σ Vᵀ the result is U S Vᵀ: every step maps each singular value s to a s + b s³ + c s⁵ and
leaves U and V alone. The coefficients make small values grow fast, not converge: after five steps
all that started above 0.002 of the norm lie in (0.68, 1.21), near 1 but not at it; smaller ones
have grown by up to 3.4445^5 = 485. That is as good as U Vᵀ for training, and cheaper. A zero
gradient gives O = 0.

polar       Polar Express: other coefficients in each of five steps, the best for what the steps
            before have left, and X = u / (1.02 |u|_F + 1e-6). Values above 0.002 of the norm end
            in (0.85, 1.15), smaller ones grow by up to 970; steps behind the fifth repeat it.

X with rows > cols is worked on as its transpose without being moved: A = Xᵀ X and X = a X + X Bᵀ,
so that A is always (k,k), k = min(rows, cols). Alpha, beta and C of the products do all the adding:
a step is three matrix products, each for all matrices of a slice at once.

scale       muon_scale(): the published rules, of the logical (out, in) shape. The caller passes
            numbers because a bank may store a matrix transposed. The decay's lr is without it.
p g         a bank of matrices (rows, cols), p in floatX and g in float, rows*cols divisible by 8,
            aligned to 16 bytes. The `count` matrices to update begin at place[i] * stride elements:
            a rank has the whole bank and updates what it owns; the others are not touched.
master m    floats of the owned matrices alone, matrix i at i * stride. The update starts from
            master, or from p where master is NULL (fp32 build only).
second      v: cols floats (or rows) of each owned matrix, one behind the other; zeros at the start
            and never corrected for that, because the norm is put back anyway. NULL without β2.
scratch     muon_scratch_bytes(count, rows, cols, rule), aligned to 256 bytes; bounded, because a
            bank is worked on in slices of at most MUON_SLICE matrices
rounding    bf16 build: u, X, A, B rounded to bf16 once each, everything between in float. |u| is of
            the rounded u, in float, in a fixed order. With a second moment n, each O², r, O after
            each of its factors, |O| and the factor n/|O| are rounded too, and O with the decay; v,
            the decay's sign and W stay in float.
zero g      O = 0 and v shrinks; the decay is taken: 0 W >= 0.
same bits   Sums have a fixed order and nothing here depends on what else is in a slice. So a matrix
            gets the same update on any number of ranks, if the library's product of a matrix does
            not depend on how many are multiplied at once: the host's does not, cuBLASLt may choose
            its kernel by that number.
NaN         one NaN in g makes the whole matrix NaN
guard       while it is set p, master, m and second keep every bit (guard.cuh), and the products run
            all the same; NULL: there is none
cost        15 matrix products: 2 steps k² (2 max(rows,cols) + k) FLOP per matrix, 13.6 GFLOP at
            768x768. Besides, bytes per element (bf16 with master): momentum 14, norm 4, step 12 =
            30; the second moment reads O once more: 32. Its own state is a row of the matrix.

gate_update is the same for matrices of a few hundred elements, which all ranks have: one block for
each, in shared memory from momentum to weights, so that it costs a launch and no product of the
library. p is float in both builds. bf16_state: the whole matrix in bf16, as record 45 keeps its
gates: g, p, m, v, lr, the decay and 1/√v are rounded too; then what is rounded above is so in the
fp32 build as well.

test        test/cases_optimizer.h: newton_schulz, muon; test/cases_normuon.h: the rest
source      Jordan et al. 2024, kellerjordan.github.io/posts/muon; Amsel et al. 2025, Polar Express,
            arXiv:2505.16932; Li et al. 2025, NorMuon, arXiv:2510.05491; coefficients, forms and the
            decay as in the records of modded-nanogpt
*/
#pragma once
#include "device.cuh"
#include "guard.cuh"
#include "matmul.cuh"

typedef enum MuonForm { MUON_FORM_SUM, MUON_FORM_LERP, MUON_FORM_NONE /* u = g */ } MuonForm;
typedef enum MuonScale { MUON_SCALE_MAX_DIM, MUON_SCALE_ASPECT } MuonScale;

typedef struct MuonRule {
    MuonForm form;
    bool polar;              // Polar Express instead of constant coefficients
    int steps;               // of the iteration
    float momentum;          // μ
    float beta2;             // 0: no second moment
    bool second_by_row;      // it is one number per row of the matrix in memory, else per column
    float cautious_decay;    // times lr; 0: none
} MuonRule;

// 16 matrices of 768x768 have 16 x 36 tiles of 128x128: four for each of 132 multiprocessors.
constexpr int MUON_SLICE = 16;
constexpr int MUON_THREADS = 128;
constexpr int MUON_PASSES = 16;   // of 8 elements, to share the cost of the sum over a block
constexpr size_t MUON_BLOCK_ELEMENTS = (size_t)MUON_THREADS * MUON_PASSES * 8;
constexpr float MUON_EPS = 1e-7f;
constexpr float MUON_A = 3.4445f, MUON_B = -4.7750f, MUON_C = 2.0315f;

// The safety margin on the norm is for bf16, in which X may come out longer than it should.
constexpr float POLAR_MARGIN = 1.02f, POLAR_EPS = 1e-6f;
constexpr int MUON_SERIES = 5;
constexpr double POLAR_COEFFICIENTS[MUON_SERIES][3] = {
    {8.156554524902461, -22.48329292557795, 15.878769915207462},
    {4.042929935166739, -2.808917465908714, 0.5000178451051316},
    {3.8916678022926607, -2.772484153217685, 0.5060648178503393},
    {3.285753657755655, -2.3681294933425376, 0.46449024233003106},
    {2.3465413258596377, -1.7097828382687081, 0.42323551169305323}};

constexpr int SECOND_ROWS = 64;       // whose part of a column's sum one block makes
constexpr int SECOND_LANES = 16;      // threads side by side, each with 8 columns (or 1)
constexpr int SECOND_WARP_ROWS = 4;   // by row: rows that a warp sums, one after the other
constexpr int SECOND_THREADS = 512;   // of the one block per matrix that finishes
constexpr float SECOND_MIN = 1e-10f;  // the least v, and the least |O|
constexpr int GATE_MOST = 64;         // rows and columns of what gate_update takes

// What a kernel knows of each matrix of a slice; by value, so there is nothing to copy.
typedef struct MuonSlice {
    size_t offset[MUON_SLICE];   // its first element in the bank's p and g
    float step[MUON_SLICE];      // lr * scale
} MuonSlice;

// The iteration: X = u / (margin |u| + eps), then step i with coefficients min(i, 4).
typedef struct MuonSeries {
    float margin, eps;
    float a[MUON_SERIES], b[MUON_SERIES], c[MUON_SERIES];
} MuonSeries;

typedef struct MuonScratch {
    floatX *x, *y, *a, *b;    // (slice, rows, cols) twice, (slice, k, k) twice
    float* partial;           // (slice, blocks): sums of squares, of u and later of O
    float* inverse;           // (slice): 1 / (margin |u| + eps), later n / |O|
    float* sums;              // (slice, tiles, lines): O² summed over a tile of each column or row
    float* factor;            // (slice, lines8): 1 / √v
    int lines, lines8, tiles; // columns or rows with a v of their own; lines8 is a multiple of 8
    int slice;                // matrices at a time
    size_t bytes;             // of all
} MuonScratch;

// A factor on the update that makes one learning rate serve all shapes; rows = out, cols = in.
static inline float muon_scale(MuonScale kind, int rows, int cols) {
    if (kind == MUON_SCALE_MAX_DIM) return sqrtf((float)(rows > cols ? rows : cols));
    return rows > cols ? sqrtf((float)rows / cols) : 1.0f;
}

static inline MuonSeries muon_series(bool polar) {
    MuonSeries series;
    series.margin = polar ? POLAR_MARGIN : 1.0f;
    series.eps = polar ? POLAR_EPS : MUON_EPS;
    for (int i = 0; i < MUON_SERIES; i++) {
        series.a[i] = polar ? (float)POLAR_COEFFICIENTS[i][0] : MUON_A;
        series.b[i] = polar ? (float)POLAR_COEFFICIENTS[i][1] : MUON_B;
        series.c[i] = polar ? (float)POLAR_COEFFICIENTS[i][2] : MUON_C;
    }
    return series;
}

// ---- scratch --------------------------------------------------------------------------------

static inline void* muon_carve(void* base, size_t* bytes, size_t size) {
    uintptr_t p = (uintptr_t)base + *bytes;    // base is NULL while only the sum is wanted
    *bytes += ceil_div(size, 256) * 256;
    return (void*)p;
}

// Columns that a block of the second moment sums: 8 per thread where a row is whole chunks of 8.
static inline int second_block_columns(int cols) {
    return SECOND_LANES * (cols % 8 == 0 ? 8 : 1);
}

static inline size_t second_blocks(int rows, int cols, bool by_row) {
    if (by_row) return ceil_div(rows, SECOND_WARP_ROWS * (MUON_THREADS / WARP));
    return ceil_div(rows, SECOND_ROWS) * ceil_div(cols, second_block_columns(cols));
}

static inline MuonScratch muon_scratch(void* scratch, int count, int rows, int cols,
                                       const MuonRule* rule) {
    MuonScratch s;
    int slices = (int)ceil_div(count, MUON_SLICE);
    int k = rows < cols ? rows : cols;
    size_t n = (size_t)rows * cols, square = (size_t)k * k;
    size_t blocks = ceil_div(n, MUON_BLOCK_ELEMENTS);
    s.slice = (int)ceil_div(count, slices);    // near-equal: no small rest that leaves a GPU idle
    s.bytes = 0;
    s.lines = rule->beta2 == 0.0f ? 0 : rule->second_by_row ? rows : cols;
    s.lines8 = (int)ceil_div(s.lines, 8) * 8;
    s.tiles = rule->second_by_row ? 1 : (int)ceil_div(rows, SECOND_ROWS);
    if (s.lines && second_blocks(rows, cols, rule->second_by_row) > blocks)
        blocks = second_blocks(rows, cols, rule->second_by_row);
    s.x = (floatX*)muon_carve(scratch, &s.bytes, s.slice * n * sizeof(floatX));
    s.y = (floatX*)muon_carve(scratch, &s.bytes, s.slice * n * sizeof(floatX));
    s.a = (floatX*)muon_carve(scratch, &s.bytes, s.slice * square * sizeof(floatX));
    s.b = (floatX*)muon_carve(scratch, &s.bytes, s.slice * square * sizeof(floatX));
    s.partial = (float*)muon_carve(scratch, &s.bytes, s.slice * blocks * sizeof(float));
    s.inverse = (float*)muon_carve(scratch, &s.bytes, s.slice * sizeof(float));
    s.sums = (float*)muon_carve(scratch, &s.bytes,
                                (size_t)s.slice * s.tiles * s.lines * sizeof(float));
    s.factor = (float*)muon_carve(scratch, &s.bytes, (size_t)s.slice * s.lines8 * sizeof(float));
    return s;
}

static inline size_t muon_scratch_bytes(int count, int rows, int cols, const MuonRule* rule) {
    return muon_scratch(NULL, count, rows, cols, rule).bytes;
}

// ---- elements -------------------------------------------------------------------------------

// What the library's products and their inputs hold.
static __device__ __forceinline__ float muon_round(float x) {
    return FLOATX_IS_BF16 ? round_bf16(x) : x;
}

static __device__ __forceinline__ float momentum_next(MuonForm form, float m, float g, float mu) {
    return form == MUON_FORM_SUM ? mu * m + g : m + (1.0f - mu) * (g - m);
}
static __device__ __forceinline__ float momentum_ahead(MuonForm form, float m, float g, float mu) {
    return form == MUON_FORM_SUM ? g + mu * m : g + mu * (m - g);
}

// ---- kernels: blockIdx.y is the matrix ------------------------------------------------------

// m and u, the latter into x, and the block's share of |u|².
template <MuonForm FORM>
static __global__ void muon_momentum_kernel(floatX* x, float* m, float* partial, const float* g,
                                            size_t n, size_t stride, float mu, MuonSlice slice,
                                            const float* guard) {
    DYN_SMEM(float, scratch);
    bool kept = guard_is_set(guard);
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
                m8.v[j] = momentum_next(FORM, m8.v[j], u.v[j], mu);
                u.v[j] = momentum_ahead(FORM, m8.v[j], u.v[j], mu);
            }
            if (!kept) store8(m + i, m8);
        }
        for (int j = 0; j < 8; j++) u.v[j] = muon_round(u.v[j]);
        for (int j = 0; j < 8; j++) squares.v[j] += u.v[j] * u.v[j];
        store8(x + i, u);
    }
    for (int half = 4; half > 0; half /= 2) {
        for (int j = 0; j < half; j++) squares.v[j] += squares.v[j + half];
    }
    float sum = block_sum(squares.v[0], scratch);
    if (threadIdx.x == 0) partial[blockIdx.y * gridDim.x + blockIdx.x] = sum;
}

static __global__ void muon_norm_kernel(float* inverse, const float* partial, int blocks,
                                        float margin, float eps) {
    DYN_SMEM(float, scratch);
    float sum = 0.0f;
    for (int b = threadIdx.x; b < blocks; b += MUON_THREADS)
        sum += partial[blockIdx.y * blocks + b];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) inverse[blockIdx.y] = 1.0f / (margin * sqrtf(sum) + eps);
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

// Column sums of O² over SECOND_ROWS rows into sums (matrix, tile, column), and |O|² of what the
// block saw into partial. W neighbouring columns per thread: 8, or 1 where a row is no multiple.
template <int W>
static __global__ void second_columns_kernel(float* sums, float* partial, const floatX* o, int rows,
                                             int cols) {
    DYN_SMEM(float, smem);      // (SECOND_HEIGHT, COLUMNS), then 32 floats
    constexpr int COLUMNS = SECOND_LANES * W, SECOND_HEIGHT = MUON_THREADS / SECOND_LANES;
    int groups = (cols + COLUMNS - 1) / COLUMNS;
    int first = blockIdx.x % groups * COLUMNS, tile = blockIdx.x / groups;
    int lane = threadIdx.x % SECOND_LANES, height = threadIdx.x / SECOND_LANES;
    int begin = tile * SECOND_ROWS, end = begin + SECOND_ROWS < rows ? begin + SECOND_ROWS : rows;
    o += (size_t)blockIdx.y * rows * cols;
    float sum[W] = {}, squares = 0.0f;
    for (int row = begin + height; row < end && first + lane * W < cols; row += SECOND_HEIGHT) {
        const floatX* at = o + (size_t)row * cols + first + lane * W;
        float8 v = {};
        if (W == 8) v = load8(at);
        else v.v[0] = load1(at);
        for (int j = 0; j < W; j++) {
            float square = v.v[j] * v.v[j];
            squares += square;
            sum[j] += muon_round(square);
        }
    }
    for (int j = 0; j < W; j++) smem[height * COLUMNS + lane * W + j] = sum[j];
    __syncthreads();
    int column = threadIdx.x;
    if (column < COLUMNS && first + column < cols) {
        float total = 0.0f;
        for (int h = 0; h < SECOND_HEIGHT; h++) total += smem[h * COLUMNS + column];
        int tiles = gridDim.x / groups;
        sums[((size_t)blockIdx.y * tiles + tile) * cols + first + column] = total;
    }
    squares = block_sum(squares, smem + SECOND_HEIGHT * COLUMNS);
    if (threadIdx.x == 0) partial[blockIdx.y * gridDim.x + blockIdx.x] = squares;
}

// The same by row, a warp for each: sums (matrix, row).
template <int W>
static __global__ void second_rows_kernel(float* sums, float* partial, const floatX* o, int rows,
                                          int cols) {
    DYN_SMEM(float, scratch);
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    o += (size_t)blockIdx.y * rows * cols;
    float squares = 0.0f;
    for (int k = 0; k < SECOND_WARP_ROWS; k++) {
        int row = (blockIdx.x * SECOND_WARP_ROWS + k) * (MUON_THREADS / WARP) + warp;
        if (row >= rows) break;
        float sum = 0.0f;
        for (int col = lane * W; col < cols; col += WARP * W) {
            const floatX* at = o + (size_t)row * cols + col;
            float8 v = {};
            if (W == 8) v = load8(at);
            else v.v[0] = load1(at);
            for (int j = 0; j < W; j++) {
                float square = v.v[j] * v.v[j];
                squares += square;
                sum += muon_round(square);
            }
        }
        sum = warp_sum<WARP>(sum);
        if (lane == 0) sums[(size_t)blockIdx.y * rows + row] = sum;
    }
    squares = block_sum(squares, scratch);
    if (threadIdx.x == 0) partial[blockIdx.y * gridDim.x + blockIdx.x] = squares;
}

// v of each line, 1/√v, and the number that gives O its norm back. |O / √v|² is the sum of the
// lines' sums over v: no pass over O. (In bf16 this leaves out the last rounding of its elements,
// which moves it by far less than its own rounding.) length: elements of a line.
static __global__ void second_moment_kernel(float* factor, float* ratio, float* second,
                                            const float* sums, const float* partial, int lines,
                                            int lines8, int tiles, int blocks, int length,
                                            float grow, const float* guard) {
    DYN_SMEM(float, scratch);
    bool kept = guard_is_set(guard);
    int matrix = blockIdx.y;
    second += (size_t)matrix * lines;
    sums += (size_t)matrix * tiles * lines;
    float before = 0.0f, after = 0.0f;
    for (int line = threadIdx.x; line < lines; line += SECOND_THREADS) {
        float sum = 0.0f;
        for (int t = 0; t < tiles; t++) sum += sums[(size_t)t * lines + line];
        float v = second[line];
        v += grow * (muon_round(sum / length) - v);
        if (!kept) second[line] = v;
        float f = 1.0f / sqrtf(max_nan(v, SECOND_MIN));
        factor[matrix * lines8 + line] = f;
        after += f * f * sum;
    }
    for (int b = threadIdx.x; b < blocks; b += SECOND_THREADS)
        before += partial[matrix * blocks + b];
    before = muon_round(sqrtf(block_sum(before, scratch)));
    after = muon_round(sqrtf(block_sum(after, scratch)));
    if (threadIdx.x == 0) ratio[matrix] = muon_round(before / max_nan(after, SECOND_MIN));
}

// SECOND: o is first multiplied with the factor of its column or row, then with the ratio.
template <bool MASTER, bool SECOND>
static __global__ void muon_step_kernel(floatX* p, float* master, const floatX* o,
                                        const float* factor, const float* ratio, size_t n, int cols,
                                        int lines8, bool by_row, float decay, size_t stride,
                                        MuonSlice slice, const float* guard) {
    size_t i = 8 * ((size_t)blockIdx.x * MUON_THREADS + threadIdx.x);
    if (i >= n) return;
    bool kept = guard_is_set(guard);
    p += slice.offset[blockIdx.y];
    if (MASTER) master += blockIdx.y * stride;
    float step = slice.step[blockIdx.y];
    float8 w = MASTER ? load8(master + i) : load8(p + i), d = load8(o + blockIdx.y * n + i);
    if (SECOND) {
        factor += blockIdx.y * lines8;
        float whole = ratio[blockIdx.y];
        unsigned row = (unsigned)i / (unsigned)cols, col = (unsigned)i % (unsigned)cols;
        float8 f;
        if (cols % 8 == 0 && by_row) {
            for (int j = 0; j < 8; j++) f.v[j] = factor[row];
        } else if (cols % 8 == 0) {
            f = load8(factor + col);
        } else {
            for (int j = 0; j < 8; j++) {
                f.v[j] = factor[by_row ? row : col];
                if (++col == (unsigned)cols) col = 0, row++;
            }
        }
        for (int j = 0; j < 8; j++) d.v[j] = muon_round(muon_round(d.v[j] * f.v[j]) * whole);
    }
    for (int j = 0; j < 8 && decay != 0.0f; j++) {
        if (d.v[j] * w.v[j] >= 0.0f) d.v[j] = muon_round(d.v[j] + decay * w.v[j]);
    }
    for (int j = 0; j < 8; j++) w.v[j] -= step * d.v[j];
    if (kept) return;
    if (MASTER) store8(master + i, w);
    store8(p + i, w);
}

// ---- one slice ------------------------------------------------------------------------------

// x = (momentum of g) / norm, for `count` matrices; m is not touched by MUON_FORM_NONE.
static inline void muon_direction(const MuonScratch* s, float* m, const float* g,
                                  const MuonSlice* slice, int count, size_t n, size_t stride,
                                  float mu, MuonForm form, const MuonSeries* series,
                                  const float* guard, cudaStream_t stream) {
    int blocks = (int)ceil_div(n, MUON_BLOCK_ELEMENTS);
    dim3 grid(blocks, count), block(MUON_THREADS);
    size_t smem_bytes = 32 * sizeof(float);
    if (form == MUON_FORM_SUM) {
        launch<muon_momentum_kernel<MUON_FORM_SUM>>(grid, block, smem_bytes, stream, s->x, m,
                                                    s->partial, g, n, stride, mu, *slice,
                                                    guard);
    } else if (form == MUON_FORM_LERP) {
        launch<muon_momentum_kernel<MUON_FORM_LERP>>(grid, block, smem_bytes, stream, s->x, m,
                                                     s->partial, g, n, stride, mu, *slice,
                                                     guard);
    } else {
        launch<muon_momentum_kernel<MUON_FORM_NONE>>(grid, block, smem_bytes, stream, s->x, m,
                                                     s->partial, g, n, stride, mu, *slice,
                                                     guard);
    }
    launch<muon_norm_kernel>(dim3(1, count), block, smem_bytes, stream, s->inverse,
                             (const float*)s->partial, blocks, series->margin, series->eps);
    launch<muon_normalize_kernel>(dim3((unsigned)ceil_div(n, 8 * MUON_THREADS), count), block, 0,
                                  stream, s->x, (const float*)s->inverse, n);
}

// The iteration on s->x. Returns s->x or s->y, whichever holds the result; the other is junk.
static inline floatX* muon_iterate(const MuonScratch* s, int count, int rows, int cols, int steps,
                                   const MuonSeries* series, Matmul* mm, cudaStream_t stream) {
    bool tall = rows > cols;
    int k = tall ? cols : rows, depth = tall ? rows : cols;
    floatX *x = s->x, *y = s->y;
    for (int i = 0; i < steps; i++) {
        int at = i < MUON_SERIES ? i : MUON_SERIES - 1;
        matmul_batched(s->a, x, x, NULL, k, k, depth, count, tall, !tall, 1.0f, 0.0f, mm, stream);
        matmul_batched(s->b, s->a, s->a, s->a, k, k, k, count, false, false, series->c[at],
                       series->b[at], mm, stream);
        if (tall) {
            matmul_batched(y, x, s->b, x, rows, cols, k, count, false, true, 1.0f, series->a[at],
                           mm, stream);
        } else {
            matmul_batched(y, s->b, x, x, rows, cols, k, count, false, false, 1.0f, series->a[at],
                           mm, stream);
        }
        floatX* swap = x;
        x = y;
        y = swap;
    }
    return x;
}

// v of `count` matrices, and s->factor and s->inverse by which the step multiplies their o.
static inline void muon_second(const MuonScratch* s, float* second, const floatX* o, int count,
                               int rows, int cols, const MuonRule* rule, const float* guard,
                               cudaStream_t stream) {
    bool chunks = cols % 8 == 0, by_row = rule->second_by_row;
    int blocks = (int)second_blocks(rows, cols, by_row);
    dim3 grid(blocks, count), block(MUON_THREADS);
    size_t sum_bytes = 32 * sizeof(float);
    size_t tile_bytes = sum_bytes + MUON_THREADS * (chunks ? 8 : 1) * sizeof(float);
    if (by_row && chunks) {
        launch<second_rows_kernel<8>>(grid, block, sum_bytes, stream, s->sums, s->partial, o, rows,
                                      cols);
    } else if (by_row) {
        launch<second_rows_kernel<1>>(grid, block, sum_bytes, stream, s->sums, s->partial, o, rows,
                                      cols);
    } else if (chunks) {
        launch<second_columns_kernel<8>>(grid, block, tile_bytes, stream, s->sums, s->partial, o,
                                         rows, cols);
    } else {
        launch<second_columns_kernel<1>>(grid, block, tile_bytes, stream, s->sums, s->partial, o,
                                         rows, cols);
    }
    launch<second_moment_kernel>(dim3(1, count), dim3(SECOND_THREADS), sum_bytes, stream, s->factor,
                                 s->inverse, second, (const float*)s->sums,
                                 (const float*)s->partial, s->lines, s->lines8, s->tiles, blocks,
                                 by_row ? cols : rows, 1.0f - rule->beta2, guard);
}

static inline MuonScratch muon_begin(void* scratch, size_t scratch_bytes, int count, int rows,
                                     int cols, const MuonRule* rule) {
    REQUIRE(count > 0 && rows > 0 && cols > 0 && (size_t)rows * cols % 8 == 0,
            "muon: %d matrices of %d x %d, rows*cols must be a positive multiple of 8", count, rows,
            cols);
    MuonScratch s = muon_scratch(scratch, count, rows, cols, rule);
    REQUIRE(scratch_bytes >= s.bytes && ((uintptr_t)scratch & 255) == 0,
            "muon: scratch of %zu bytes at %p for %d matrices of %d x %d\n"
            "%zu bytes aligned to 256 are needed, see muon_scratch_bytes", scratch_bytes, scratch,
            count, rows, cols, s.bytes);
    return s;
}

// ---- launchers ------------------------------------------------------------------------------

// o = NS(g), both (count, rows, cols); of the rule it takes polar and steps.
static inline void newton_schulz(floatX* o, const float* g, int count, int rows, int cols,
                                 const MuonRule* rule, void* scratch, size_t scratch_bytes,
                                 Matmul* mm, cudaStream_t stream) {
    MuonScratch s = muon_begin(scratch, scratch_bytes, count, rows, cols, rule);
    MuonSeries series = muon_series(rule->polar);
    size_t n = (size_t)rows * cols;
    for (int first = 0; first < count; first += s.slice) {
        int matrices = count - first < s.slice ? count - first : s.slice;
        MuonSlice slice = {};
        for (int i = 0; i < matrices; i++) slice.offset[i] = (first + i) * n;
        muon_direction(&s, NULL, g, &slice, matrices, n, n, 0.0f, MUON_FORM_NONE, &series, NULL,
                       stream);
        const floatX* result = muon_iterate(&s, matrices, rows, cols, rule->steps, &series, mm,
                                            stream);
        CUDA_CHECK(cudaMemcpyAsync(o + first * n, result, matrices * n * sizeof(floatX),
                                   cudaMemcpyDeviceToDevice, stream));
    }
}

// place and scale: one per matrix, on the host, read before the call returns.
static inline void muon_update(floatX* p, float* master, const float* g, float* m, float* second,
                               const int* place, int count, int rows, int cols, size_t stride,
                               const float* scale, float lr, const MuonRule* rule, void* scratch,
                               size_t scratch_bytes, Matmul* mm, const float* guard,
                               cudaStream_t stream) {
    MuonScratch s = muon_begin(scratch, scratch_bytes, count, rows, cols, rule);
    MuonSeries series = muon_series(rule->polar);
    size_t n = (size_t)rows * cols;
    REQUIRE(stride >= n && stride % 8 == 0,
            "muon: %zu elements from matrix to matrix of %d x %d\n"
            "at least %zu and a multiple of 8 are needed", stride, rows, cols, n);
    REQUIRE(master || !FLOATX_IS_BF16, "muon: bf16 weights need a master copy in float");
    REQUIRE((second != NULL) == (s.lines > 0),
            "muon: beta2 = %g %s memory for the second moment", rule->beta2,
            s.lines ? "without" : "and");
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
        muon_direction(&s, m + first * stride, g, &slice, matrices, n, stride, rule->momentum,
                       rule->form, &series, guard, stream);
        const floatX* o = muon_iterate(&s, matrices, rows, cols, rule->steps, &series, mm, stream);
        if (second) {
            muon_second(&s, second + (size_t)first * s.lines, o, matrices, rows, cols, rule,
                        guard, stream);
        }
        dim3 grid((unsigned)ceil_div(n, 8 * MUON_THREADS), matrices), block(MUON_THREADS);
        float* own = master ? master + first * stride : NULL;
        const float *factor = s.factor, *ratio = s.inverse;
        float decay = rule->cautious_decay * lr;
        if (master && second) {
            launch<muon_step_kernel<true, true>>(grid, block, 0, stream, p, own, o, factor, ratio,
                                                 n, cols, s.lines8, rule->second_by_row, decay,
                                                 stride, slice, guard);
        } else if (master) {
            launch<muon_step_kernel<true, false>>(grid, block, 0, stream, p, own, o, factor, ratio,
                                                  n, cols, s.lines8, rule->second_by_row, decay,
                                                  stride, slice, guard);
        } else if (second) {
            launch<muon_step_kernel<false, true>>(grid, block, 0, stream, p, own, o, factor, ratio,
                                                  n, cols, s.lines8, rule->second_by_row, decay,
                                                  stride, slice, guard);
        } else {
            launch<muon_step_kernel<false, false>>(grid, block, 0, stream, p, own, o, factor, ratio,
                                                   n, cols, s.lines8, rule->second_by_row, decay,
                                                   stride, slice, guard);
        }
    }
}

// ---- gates ----------------------------------------------------------------------------------

// One matrix per block, in shared memory. bf16: what the matrices round in the bf16 build;
// bf16_state: everything that is stored.
static __global__ void gate_update_kernel(float* p, float* m, float* second, const float* g,
                                          int rows, int cols, size_t stride, float lr, float decay,
                                          bool bf16_state, MuonRule rule, MuonSeries series,
                                          const float* guard) {
    DYN_SMEM(float, x);
    bool kept = guard_is_set(guard);
    bool tall = rows > cols, by_row = rule.second_by_row, bf16 = FLOATX_IS_BF16 || bf16_state;
    int n = rows * cols, k = tall ? cols : rows, depth = tall ? rows : cols;
    float *y = x + n, *a = y + n, *b = a + k * k, *scratch = b + k * k;
    p += blockIdx.x * stride, m += blockIdx.x * stride, g += blockIdx.x * stride;
    if (bf16_state) lr = round_bf16(lr), decay = round_bf16(decay);

    float sum = 0.0f;
    for (int i = threadIdx.x; i < n; i += MUON_THREADS) {
        float u = bf16_state ? round_bf16(g[i]) : g[i];
        if (rule.form != MUON_FORM_NONE) {
            float m1 = momentum_next(rule.form, m[i], u, rule.momentum);
            if (bf16_state) m1 = round_bf16(m1);
            if (!kept) m[i] = m1;
            u = momentum_ahead(rule.form, m1, u, rule.momentum);
        }
        if (bf16) u = round_bf16(u);
        x[i] = u;
        sum += u * u;
    }
    float norm = series.margin * sqrtf(block_sum(sum, scratch)) + series.eps;
    for (int i = threadIdx.x; i < n; i += MUON_THREADS)
        x[i] = bf16 ? round_bf16(x[i] / norm) : x[i] / norm;
    __syncthreads();

    int next = tall ? 1 : cols, along = tall ? cols : 1;    // X(i,d) is x[i*next + d*along]
    for (int step = 0; step < rule.steps; step++) {
        int at = step < MUON_SERIES ? step : MUON_SERIES - 1;
        for (int e = threadIdx.x; e < k * k; e += MUON_THREADS) {
            const float *xi = x + e / k * next, *xj = x + e % k * next;
            float dot = 0.0f;
            for (int d = 0; d < depth; d++) dot += xi[d * along] * xj[d * along];
            a[e] = bf16 ? round_bf16(dot) : dot;
        }
        __syncthreads();
        for (int e = threadIdx.x; e < k * k; e += MUON_THREADS) {
            const float *ai = a + e / k * k, *aj = a + e % k;
            float dot = 0.0f;
            for (int l = 0; l < k; l++) dot += ai[l] * aj[l * k];
            dot = series.c[at] * dot + series.b[at] * a[e];
            b[e] = bf16 ? round_bf16(dot) : dot;
        }
        __syncthreads();
        for (int e = threadIdx.x; e < n; e += MUON_THREADS) {
            int row = e / cols, col = e % cols;
            const float *bi = b + (tall ? col : row) * k, *xj = tall ? x + row * cols : x + col;
            float dot = 0.0f;
            for (int l = 0; l < k; l++) dot += bi[l] * xj[l * next];
            dot += series.a[at] * x[e];
            y[e] = bf16 ? round_bf16(dot) : dot;
        }
        __syncthreads();
        float* swap = x;
        x = y;
        y = swap;
    }

    if (rule.beta2 != 0.0f) {
        int lines = by_row ? rows : cols, length = by_row ? cols : rows;
        int line_step = by_row ? cols : 1, step = by_row ? 1 : cols;
        second += (size_t)blockIdx.x * lines;
        float before = 0.0f, after = 0.0f;
        for (int line = threadIdx.x; line < lines; line += MUON_THREADS) {
            float mean = 0.0f;
            for (int e = 0; e < length; e++) {
                float o = x[line * line_step + e * step], square = o * o;
                before += square;
                mean += bf16 ? round_bf16(square) : square;
            }
            mean /= length;
            if (bf16) mean = round_bf16(mean);
            float v = second[line];
            v += (1.0f - rule.beta2) * (mean - v);
            if (bf16_state) v = round_bf16(v);
            if (!kept) second[line] = v;
            float f = 1.0f / sqrtf(max_nan(v, SECOND_MIN));
            if (bf16_state) f = round_bf16(f);
            for (int e = 0; e < length; e++) {
                float o = x[line * line_step + e * step] * f;
                if (bf16) o = round_bf16(o);
                x[line * line_step + e * step] = o;
                after += o * o;
            }
        }
        before = sqrtf(block_sum(before, scratch));
        after = sqrtf(block_sum(after, scratch));
        if (bf16) before = round_bf16(before), after = round_bf16(after);
        float ratio = before / max_nan(after, SECOND_MIN);
        if (bf16) ratio = round_bf16(ratio);
        for (int i = threadIdx.x; i < n; i += MUON_THREADS)
            x[i] = bf16 ? round_bf16(x[i] * ratio) : x[i] * ratio;
    }
    for (int i = threadIdx.x; i < n && !kept; i += MUON_THREADS) {
        float w = p[i], o = x[i];
        if (decay != 0.0f && o * w >= 0.0f) {
            o += decay * w;
            if (bf16) o = round_bf16(o);
        }
        w -= lr * o;
        p[i] = bf16_state ? round_bf16(w) : w;
    }
}

// p and m: matrix i at i * stride; second: (count, rows or cols), NULL without β2.
static inline void gate_update(float* p, float* m, float* second, const float* g, int count,
                               int rows, int cols, size_t stride, float lr, const MuonRule* rule,
                               bool bf16_state, const float* guard, cudaStream_t stream) {
    REQUIRE(count > 0 && rows > 0 && rows <= GATE_MOST && cols > 0 && cols <= GATE_MOST,
            "gate_update: %d matrices of %d x %d, at most %d rows and columns fit", count, rows,
            cols, GATE_MOST);
    REQUIRE(stride >= (size_t)rows * cols, "gate_update: matrices of %d x %d stand %zu apart", rows,
            cols, stride);
    REQUIRE((second != NULL) == (rule->beta2 != 0.0f),
            "gate_update: beta2 = %g %s memory for the second moment", rule->beta2,
            second ? "and" : "without");
    MuonSeries series = muon_series(rule->polar);
    int k = rows < cols ? rows : cols;
    size_t smem_bytes = (2 * (size_t)rows * cols + 2 * (size_t)k * k + 32) * sizeof(float);
    float decay = rule->cautious_decay * lr;
    launch<gate_update_kernel>(dim3(count), dim3(MUON_THREADS), smem_bytes, stream, p, m, second, g,
                               rows, cols, stride, lr, decay, bf16_state, *rule, series, guard);
}
