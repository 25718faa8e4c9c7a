/*
Attention, causal and within documents and windows, forward and backward, in one pass over the keys
and without the (T, T) matrix.

    s    = scale q kᵀ                 query t sees the keys first[t]..t
    p    = exp(s - lse)               lse = log sum exp(s), one number per query and head
    out  = p v
    delta = sum_d(dout out)           one number per query and head
    dv   = pᵀ dout
    ds   = p (dout vᵀ - delta)
    dq   = scale ds k        dk = scale dsᵀ q

q k, dq dk    head h of row n = b T + t at q + n ldqk + h D (gradients: lddqk); v, dv likewise (ldv,
              lddv): three strides into a (N, 3C) tensor, or anything else of that form
out, dout     (B, T, H, D) contiguous
lse, delta    (B, H, T) fp32; delta is scratch of the backward pass
first, last   (B, T), from attention_bounds, both or neither: key t is seen by the queries
              t..last[t]; positions count within a row of T. NULL: 0 and T - 1 (causal).
from          forward: only the queries from here on are wanted. Their bits are those of from = 0;
              of out and lse nothing is written before the 128 rows that hold `from`.
D             32, 64 or 128; T at least 1; strides multiples of 8, pointers aligned to 16 bytes;
              T + 128 times a stride below 2^32, B T up to 2^30
saved         out, lse, q, k, v
in place      no tensor may alias another, except that delta is rewritten by every call
NaN           a NaN in key t makes the rows of out and lse NaN that see it and leaves the others
              alone. A NaN in v, and in anything backward, also reaches what it should not where
              both meet in a tile: 0 times NaN is NaN. Hidden tiles are never read.
numerics      products in bf16 with fp32 sums; statistics fp32; p and ds are rounded to bf16 before
              they are multiplied, p after it was added to the softmax's sum. Fixed order of
              summation, no atomics: equal inputs give equal bits.
cost          with w visible keys per query, on the average: forward 4 N w C FLOP (two products),
              backward 7/2 of it: two kernels recompute s and dout vᵀ, so that none has to add into
              another's output. Causal: w = (T+1)/2. Bound by the tensor cores, or by shared memory
              where a warp has few rows; see "What masks cost".
test          test/cases_attention.h
sources       Dao 2023, "FlashAttention-2", arXiv:2307.08691;
              Milakov and Gimelshein 2018, "Online normalizer calculation", arXiv:1805.02867

Masks. attention_bounds makes first and last from the ends of the documents and a window:

    cu_seqlens    device: 0, the ends of the documents in 0..B T, then B T up to cu_count entries;
                  equal neighbours are empty documents; no document crosses a row. NULL: a row is
                  one document.
    block 1       window W: the query's own key and the W before it; 0: its own alone
    block > 1     window W blocks of positions, the query's own among them: query/block - key/block
                  below W; 0 acts as 1
    no limit      ATTENTION_NO_WINDOW, or any window of at least T

One bound per query says all of it, since each of the three conditions (not the future, not another
document, not beyond the window) leaves an interval that ends at the query. Record 20 writes the
window of blocks otherwise, as two lists of key blocks per block of queries, the nearest first: full
ones (all pairs of one document), cut to min(their number, W - 1), and partial ones, cut to max(W -
number of full ones, 1). That is the same. The blocks that share a document with a block of queries
are its nearest, without a gap. If the block of queries holds several documents, no block is full
for it, and the max(W, 1) nearest partial ones stay. If it holds one, there are f full blocks at the
distances 1..f, of which those below W stay, between two partial ones, at the distance 0, which
stays, and at f + 1, where the document begins, which stays if W - f is at least 2. The test
compares with the record's own tables and with random cases of its rule.

A query sees its own key, and neither first nor last falls as t grows: so the first row of a tile
has the lowest bound, the last row the highest. Two comparisons decide whether a tile holds nothing
visible (it is neither loaded nor computed), all (no mask is applied) or a part, and the tiles that
are needed are one interval. The kernels are instantiated without bounds as well: a causal model
pays nothing.

What masks cost. Whole tiles are computed: 32 queries of a warp together see w + 31 keys, and the
tiles of 64 that these touch hold w + 94 on the average. K and V come 1 + w/128 times through L2.
Floors, per layer, with each tensor moved once in bf16: forward 4 N w C FLOP and N (8 C + 4 H)
bytes, backward 14 N w C FLOP and N (16 C + 8 H) bytes, so w/2 and 7w/8 FLOP per byte. By the data
sheet of an H100, 295 FLOP in the time of a byte, memory is the floor where w is below 590 forward
and below 340 backward. Example: N = T = 65,536, C = 768, H = 6. A window of 7 blocks of 128 and one
document (w = 832.5) has 1.68e11 FLOP and 404 MB forward, 5.87e11 FLOP and 808 MB backward; with
documents of 500 tokens (w = 250.5) it has 5.04e10 and 1.77e11 FLOP, and the same bytes.

How the work is cut. A block of four warps owns a tile of rows (queries in the forward and dQ
kernels, keys in the dK dV kernel) and walks over the tiles of the other side that it sees. A warp
owns 16 MT of the rows with all their columns: accumulators never leave registers, warps never
exchange anything, and transposed scores come from exchanging the operands, k qᵀ for q kᵀ. MT = 2
where registers allow, because each fragment of the streamed tile then feeds two products: reading
shared memory, not multiplying, is what limits a warp with 16 rows.

              forward           dK dV             dQ                shared memory, bytes (fp32: x 2)
              queries x keys    keys x queries    queries x keys    forward    dK dV      dQ
    D =  32   128 x 64          128 x 64          128 x 64           20480      36608      30720
    D =  64   128 x 64          128 x 32          128 x 64           36864      51072      55296
    D = 128   128 x 64           64 x 64          128 x 32           69632      87808      87040

The sizes are the largest that keep 255 registers without spilling (two blocks then share an SM)
and, in bf16, 99 KB of shared memory, which is what the smaller GPUs of each generation have. Rows
of a tile lie D + 8 elements apart (see ptx.cuh). In memory, in this order: forward q k v; dK dV
k v q q dout, then lse lse delta; dQ q dout k v. In fp32 D = 128 needs 171 KB in the backward pass,
which sm_90 and sm_100 have.

Pipeline. Every kernel streams two tensors per step and has two products that begin with one of
them each, so one copy is always on its way while the tile that came before is multiplied:

    forward   wait, barrier   start V_n     s = q kᵀ
              wait, barrier   start K_n-1   softmax, out += p v
    dK dV     wait, barrier   start dO_m    pᵀ from k qᵀ
              wait, barrier   start Q_m+1   dv += pᵀ dO, dpᵀ = v dOᵀ, dk += dsᵀ q
    dQ        wait, barrier   start K_n     dp = dO vᵀ
              wait, barrier   start V_n-1   p from q kᵀ, dq += ds k

Each wait is for the copy that was started one line earlier. Each barrier makes it visible to all
warps, and says that all are done with the tile which the next copy overwrites. Q_m is needed until
the end of its step: it has two buffers, by parity of m, and lse_m with it.
*/
#pragma once
#include <limits.h>
#include "ptx.cuh"

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;
constexpr int ATTENTION_NO_WINDOW = INT_MAX;       // any window that is as long as T does the same
constexpr int ATTENTION_WARPS = 4;
constexpr int ATTENTION_BLOCK = 32 * ATTENTION_WARPS;

template <int D>
struct AttentionTiles {
    static constexpr int LD = D + 8;
    static constexpr int FORWARD_MT = 2;
    static constexpr int FORWARD_KEYS = 64;
    static constexpr int DKV_MT = D <= 64 ? 2 : 1;
    static constexpr int DKV_QUERIES = D == 64 ? 32 : 64;
    static constexpr int DQ_MT = 2;
    static constexpr int DQ_KEYS = D <= 64 ? 64 : 32;

    static constexpr int FORWARD_QUERIES = 16 * FORWARD_MT * ATTENTION_WARPS;
    static constexpr int DKV_KEYS = 16 * DKV_MT * ATTENTION_WARPS;
    static constexpr int DQ_QUERIES = 16 * DQ_MT * ATTENTION_WARPS;
    static constexpr size_t FORWARD_SMEM =
        (FORWARD_QUERIES + 2 * FORWARD_KEYS) * LD * sizeof(floatX);
    static constexpr size_t DKV_SMEM =
        (2 * DKV_KEYS + 3 * DKV_QUERIES) * LD * sizeof(floatX) + 3 * DKV_QUERIES * sizeof(float);
    static constexpr size_t DQ_SMEM = (2 * DQ_QUERIES + 2 * DQ_KEYS) * LD * sizeof(floatX);
};

// ---- who sees whom -------------------------------------------------------------------------

#ifdef __CUDACC__
#define ATTENTION_COUNT(condition, counter)
#else
// What the kernels have done: tiles that blocks loaded, and what warps saw of the tiles at which
// they looked, by view; [1] in the kernel whose rows are keys. For tests: kernels do not read it.
struct AttentionWork {
    uint64_t tiles, views[2][3];
};
static AttentionWork attention_work;
#define ATTENTION_COUNT(condition, counter)                                                        \
    if (condition) __atomic_fetch_add(&(counter), 1, __ATOMIC_RELAXED)
#endif

// The mask in three forms, which have to agree: of one pair, of a tile, of all tiles of a row.
// Kernels rely on two properties: every query sees the key of its own position, and neither first[]
// nor last[] ever falls within a row of T. The corners of a tile then tell what is in it, and the
// tiles that a tile of rows needs lie side by side.

static __device__ inline bool attention_visible(int query, int key) {
    return key <= query;
}

// The far edge of the mask along the rows of a warp: of a query the first key that it sees, of a
// key the last query that sees it. Where only the future is hidden (!MASKED) there is none.
struct AttentionEdge {
    const int* at;               // [row] of the sequence
    int begin, end;              // of the warp's first row, of its last row before T
};

template <bool MASKED>
static __device__ inline AttentionEdge attention_edge(const int* edge, int row0, int first_row,
                                                      int rows, int T) {
    AttentionEdge e = {NULL, 0, 0};
    if (MASKED && first_row < T) {
        e.at = edge + row0;
        e.begin = e.at[first_row];
        e.end = e.at[min(first_row + rows, T) - 1];
    }
    return e;
}

enum AttentionView { VIEW_NONE, VIEW_PART, VIEW_ALL };

// What the warp's rows first_row .. + rows - 1 see of a tile of columns; rows are keys (KEY_ROWS)
// or queries, columns the other. A tile that begins beyond T holds nothing: its warp has no work.
template <bool MASKED, bool KEY_ROWS>
static __device__ inline AttentionView attention_view(int first_row, int rows, int first_column,
                                                      int columns, const AttentionEdge& edge,
                                                      int T) {
    int first_query = KEY_ROWS ? first_column : first_row, queries = KEY_ROWS ? columns : rows;
    int first_key = KEY_ROWS ? first_row : first_column, keys = KEY_ROWS ? rows : columns;
    bool none = first_key > first_query + queries - 1 || first_query >= T || first_key >= T;
    bool all = first_key + keys - 1 <= first_query;
    if (MASKED) {
        int last_column = min(first_column + columns, T) - 1;
        none = none || (KEY_ROWS ? first_column > edge.end : last_column < edge.begin);
        all = all && (KEY_ROWS ? last_column <= edge.begin : first_column >= edge.end);
    }
    AttentionView view = none ? VIEW_NONE : all ? VIEW_ALL : VIEW_PART;
    ATTENTION_COUNT(threadIdx.x % 32 == 0, attention_work.views[KEY_ROWS][view]);
    return view;
}

struct AttentionRange {
    int first, end;
};

// The tiles of `keys` keys that some query of first_query .. + queries - 1 sees; `low` is the first
// key that the first of them sees.
static __device__ inline AttentionRange attention_key_tiles(int first_query, int queries, int keys,
                                                            int low, int T) {
    int last = min(first_query + queries, T) - 1;
    AttentionRange range = {low / keys, last / keys + 1};
    return range;
}

// The tiles of `queries` queries of which some sees a key from first_key on; `high` is the last
// query that sees the last of these keys. (As a rounding up this is shorter code in nvcc's hands.)
static __device__ inline AttentionRange attention_query_tiles(int first_key, int queries,
                                                              int high) {
    AttentionRange range = {first_key / queries, (high + queries) / queries};
    return range;
}

// Sets what is hidden in a warp's tile of scores. KEY_ROWS: rows are keys and columns queries.
template <bool MASKED, bool KEY_ROWS, int MT, int NT>
static __device__ inline void attention_mask(float (&s)[MT][NT][4], int first_row, int first_column,
                                             float value, const AttentionEdge& edge, int T) {
    first_row += threadIdx.x % 32 / 4;
    first_column += threadIdx.x % 4 * 2;
    int far[2 * MT];
#pragma unroll
    for (int r = 0; r < 2 * MT && MASKED; r++) far[r] = edge.at[min(first_row + 8 * r, T - 1)];
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int row = first_row + 16 * m + i / 2 * 8, column = first_column + 8 * n + i % 2;
                bool visible = KEY_ROWS ? attention_visible(column, row)
                                        : attention_visible(row, column);
                int end = MASKED ? far[2 * m + i / 2] : 0;
                if (MASKED) visible = visible && (KEY_ROWS ? column <= end : column >= end);
                if (!visible) s[m][n][i] = value;
            }
        }
    }
}

// ---- tiles ---------------------------------------------------------------------------------

// Starts copying the rows first .. + ROWS - 1 of a sequence, D columns of each; rows from T on
// become zeros. The sequence begins at row0 of src, the head at column0.
template <int ROWS, int D>
static __device__ inline void attention_load(floatX* tile, const floatX* src, int ld, int row0,
                                             int column0, int first, int T) {
    constexpr int WIDTH = 16 / sizeof(floatX), CHUNKS = D / WIDTH;
    constexpr int STEP = ATTENTION_BLOCK / CHUNKS;     // rows that the block copies at a time
    int row = threadIdx.x / CHUNKS, column = threadIdx.x % CHUNKS * WIDTH;
    ATTENTION_COUNT(threadIdx.x == 0, attention_work.tiles);
    tile += row * (D + 8) + column;
    src += (size_t)row0 * ld + column0;
    unsigned offset = (unsigned)(first + row) * ld + column;       // 32 bits: registers are scarce
#pragma unroll
    for (int i = 0; i < ROWS; i += STEP) {
        cp_async16_zfill(tile + i * (D + 8), src + offset, first + row + i < T);
        offset += STEP * ld;
    }
}

// The same for one float per row; src is the sequence's.
template <int ROWS>
static __device__ inline void attention_load_column(float* column, const float* src, int first,
                                                    int T) {
    int row = threadIdx.x;
    if (row < ROWS) cp_async4_zfill(column + row, src + first + row, first + row < T);
}

// Writes a warp's accumulators, row r times factor[2m + half], to the rows below `valid` of dst.
// They go through the warp's own rows of a tile that it alone has read: whole rows leave as
// 16-byte stores.
template <int MT, int NT>
static __device__ inline void attention_store(floatX* dst, int ld, int valid, floatX* tile,
                                              const float (&c)[MT][NT][4],
                                              const float (&factor)[2 * MT]) {
    constexpr int D = 8 * NT, LD = D + 8;
    int lane = threadIdx.x % 32;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < MT; m++) {
        floatX* to = tile + (16 * m + lane / 4) * LD + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const float* x = c[m][n];
            store2(to + 8 * n, x[0] * factor[2 * m], x[1] * factor[2 * m]);
            store2(to + 8 * n + 8 * LD, x[2] * factor[2 * m + 1], x[3] * factor[2 * m + 1]);
        }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16 * MT * NT / 32; i++) {
        int row = (32 * i + lane) / NT, column = (32 * i + lane) % NT * 8;
        if (row < valid) store8(dst + (size_t)row * ld + column, load8(tile + row * LD + column));
    }
}

template <int MT, int NT>
static __device__ inline void attention_zero(float (&c)[MT][NT][4]) {
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int n = 0; n < NT; n++) c[m][n][0] = c[m][n][1] = c[m][n][2] = c[m][n][3] = 0;
    }
}

// ---- forward -------------------------------------------------------------------------------

// One step of the online softmax over a warp's tile of scores, in base 2: with c = scale log2(e)
// and shift = max(c s) over what the row has seen, s becomes p = exp2(c s - shift), and the sums
// so far, total (this lane's share) and out, are brought to the new shift.
template <int MT, int NT, int OT>
static __device__ inline void attention_softmax(float (&s)[MT][NT][4], float (&out)[MT][OT][4],
                                                float (&shift)[2 * MT], float (&total)[2 * MT],
                                                float c) {
    float top[2 * MT], keep[2 * MT];
#pragma unroll
    for (int m = 0; m < MT; m++) {
        top[2 * m] = max_fast(s[m][0][0], s[m][0][1]);
        top[2 * m + 1] = max_fast(s[m][0][2], s[m][0][3]);
#pragma unroll
        for (int n = 1; n < NT; n++) {
            top[2 * m] = max_fast(top[2 * m], max_fast(s[m][n][0], s[m][n][1]));
            top[2 * m + 1] = max_fast(top[2 * m + 1], max_fast(s[m][n][2], s[m][n][3]));
        }
    }
    quad_max(top);
#pragma unroll
    for (int r = 0; r < 2 * MT; r++) {
        float next = max_fast(shift[r], c * top[r]);
        keep[r] = fast_exp2(shift[r] - next);          // 0 at the first tile, where shift is -inf
        shift[r] = next;
        total[r] *= keep[r];
    }
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int n = 0; n < OT; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) out[m][n][i] *= keep[2 * m + i / 2];
        }
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[m][n][i] = fast_exp2(c * s[m][n][i] - shift[2 * m + i / 2]);
                total[2 * m + i / 2] += s[m][n][i];
            }
        }
    }
}

template <int D, bool MASKED>
static __global__ void __launch_bounds__(ATTENTION_BLOCK)
attention_forward_kernel(floatX* out, float* lse, const floatX* q, const floatX* k, const floatX* v,
                         const int* first, int last_tile, int T, int ldqk, int ldv, float scale) {
    typedef AttentionTiles<D> Tiles;
    constexpr int MT = Tiles::FORWARD_MT, QUERIES = Tiles::FORWARD_QUERIES;
    constexpr int KEYS = Tiles::FORWARD_KEYS, LD = Tiles::LD, ROWS = 16 * MT;
    DYN_SMEM(floatX, smem);
    floatX *q_tile = smem, *k_tile = q_tile + QUERIES * LD, *v_tile = k_tile + KEYS * LD;
    // The last queries of a head see the most keys: they start first, the short ones fill the end.
    int first_query = (last_tile - (int)blockIdx.x) * QUERIES;
    int h = blockIdx.y, H = gridDim.y, b = blockIdx.z;
    int warp_row = warp_index() * ROWS, warp_query = first_query + warp_row;
    int row0 = b * T, column0 = h * D;
    AttentionEdge edge = attention_edge<MASKED>(first, row0, warp_query, ROWS, T);

    // From the last tile down: a row's first tile holds its own key, so its maximum is finite from
    // the start. This holds for every mask in which a query sees itself.
    static_assert(KEYS % ROWS == 0, "a warp's own keys lie in one tile");
    int low = MASKED ? first[row0 + first_query] : 0;
    AttentionRange range = attention_key_tiles(first_query, QUERIES, KEYS, low, T);
    int first_key = (range.end - 1) * KEYS;
    attention_load<QUERIES, D>(q_tile, q, ldqk, row0, column0, first_query, T);
    attention_load<KEYS, D>(k_tile, k, ldqk, row0, column0, first_key, T);
    cp_async_commit();
    float acc[MT][D / 8][4], shift[2 * MT], total[2 * MT];
    attention_zero(acc);
#pragma unroll
    for (int r = 0; r < 2 * MT; r++) {
        shift[r] = -INFINITY;
        total[r] = 0;
    }
    for (; first_key >= range.first * KEYS; first_key -= KEYS) {
        float s[MT][KEYS / 8][4];
        AttentionView view =
            attention_view<MASKED, false>(warp_query, ROWS, first_key, KEYS, edge, T);
        cp_async_wait<0>();
        __syncthreads();
        attention_load<KEYS, D>(v_tile, v, ldv, row0, column0, first_key, T);
        cp_async_commit();
        if (view != VIEW_NONE) {
            mma_abt<MT, KEYS / 8, D / 16, LD>(s, q_tile + warp_row * LD, k_tile);
        }
        cp_async_wait<0>();
        __syncthreads();
        if (first_key > range.first * KEYS) {
            attention_load<KEYS, D>(k_tile, k, ldqk, row0, column0, first_key - KEYS, T);
        }
        cp_async_commit();
        if (view == VIEW_NONE) continue;
        // Masks by selection: a NaN in a hidden key must not get through.
        if (view == VIEW_PART) {
            attention_mask<MASKED, false>(s, warp_query, first_key, -INFINITY, edge, T);
        }
        attention_softmax(s, acc, shift, total, scale * LOG2_E);
        mma_ab<MT, D / 8, KEYS / 16, LD>(acc, s, v_tile);
    }

    quad_sum(total);
    float factor[2 * MT];
#pragma unroll
    for (int r = 0; r < 2 * MT; r++) {
        int t = warp_query + threadIdx.x % 32 / 4 + 8 * r;
        factor[r] = 1 / total[r];
        if (t < T && threadIdx.x % 4 == 0) {
            lse[((size_t)b * H + h) * T + t] = shift[r] * LN_2 + logf(total[r]);
        }
    }
    attention_store(out + (((size_t)b * T + warp_query) * H + h) * D, H * D, T - warp_query,
                    q_tile + warp_row * LD, acc, factor);
}

// ---- backward ------------------------------------------------------------------------------

// delta = sum_d(dout out), one row per query and head. D/32 lanes per row, each with four times
// eight elements.
template <int D>
static __global__ void attention_delta_kernel(float* delta, const floatX* dout, const floatX* out,
                                              unsigned rows, unsigned T, unsigned H) {
    constexpr int W = D / 32;
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x, row = i / W;
    float8 sums = {};
    for (int k = 0; k < 4 && row < rows; k++) {        // lanes beyond the end still join the sum
        size_t here = (size_t)row * D + 8 * (i % W + W * k);
        float8 x = load8(dout + here), y = load8(out + here);
        for (int j = 0; j < 8; j++) sums.v[j] += x.v[j] * y.v[j];
    }
    for (int half = 4; half > 0; half /= 2) {
        for (int j = 0; j < half; j++) sums.v[j] += sums.v[j + half];
    }
    float sum = warp_sum<W>(sums.v[0]);
    if (row < rows && i % W == 0) {
        unsigned n = row / H, h = row % H;
        delta[((size_t)(n / T) * H + h) * T + n % T] = sum;
    }
}

template <int D, bool MASKED>
static __global__ void __launch_bounds__(ATTENTION_BLOCK)
attention_dkv_kernel(floatX* dk, floatX* dv, const floatX* dout, const float* lse,
                     const float* delta, const floatX* q, const floatX* k, const floatX* v,
                     const int* last, int T, int ldqk, int ldv, int lddqk, int lddv, float scale) {
    typedef AttentionTiles<D> Tiles;
    constexpr int MT = Tiles::DKV_MT, KEYS = Tiles::DKV_KEYS, QUERIES = Tiles::DKV_QUERIES;
    constexpr int LD = Tiles::LD, ROWS = 16 * MT, NT = QUERIES / 8;
    DYN_SMEM(floatX, smem);
    floatX *k_tile = smem, *v_tile = k_tile + KEYS * LD, *q_tiles = v_tile + KEYS * LD;
    floatX* dout_tile = q_tiles + 2 * QUERIES * LD;
    float *lse_tiles = (float*)(dout_tile + QUERIES * LD), *delta_tile = lse_tiles + 2 * QUERIES;
    int first_key = blockIdx.x * KEYS;                 // the first keys are seen by most queries
    int h = blockIdx.y, H = gridDim.y, b = blockIdx.z, ldout = H * D;
    int warp_row = warp_index() * ROWS, warp_key = first_key + warp_row, lane = threadIdx.x % 32;
    int row0 = b * T, column0 = h * D;
    lse += ((size_t)b * H + h) * T;
    delta += ((size_t)b * H + h) * T;
    AttentionEdge edge = attention_edge<MASKED>(last, row0, warp_key, ROWS, T);

    // Queries beyond T are zeros in q, dout, lse and delta: p = 1, ds = 0, nothing is added.
    int high = MASKED ? last[row0 + min(first_key + KEYS, T) - 1] : T - 1;
    AttentionRange range = attention_query_tiles(first_key, QUERIES, high);
    int first_query = range.first * QUERIES;
    attention_load<KEYS, D>(k_tile, k, ldqk, row0, column0, first_key, T);
    attention_load<KEYS, D>(v_tile, v, ldv, row0, column0, first_key, T);
    attention_load<QUERIES, D>(q_tiles, q, ldqk, row0, column0, first_query, T);
    attention_load_column<QUERIES>(lse_tiles, lse, first_query, T);
    cp_async_commit();
    float dk_acc[MT][D / 8][4], dv_acc[MT][D / 8][4];
    attention_zero(dk_acc);
    attention_zero(dv_acc);
    for (int m = range.first; m < range.end; m++) {
        first_query = m * QUERIES;
        int parity = (m - range.first) & 1;
        floatX* q_tile = q_tiles + parity * QUERIES * LD;
        const float* lse_tile = lse_tiles + parity * QUERIES;
        AttentionView view =
            attention_view<MASKED, true>(warp_key, ROWS, first_query, QUERIES, edge, T);
        float s[MT][NT][4], ds[MT][NT][4];
        cp_async_wait<0>();
        __syncthreads();
        attention_load<QUERIES, D>(dout_tile, dout, ldout, row0, column0, first_query, T);
        attention_load_column<QUERIES>(delta_tile, delta, first_query, T);
        cp_async_commit();
        if (view != VIEW_NONE) {
            mma_abt<MT, NT, D / 16, LD>(s, k_tile + warp_row * LD, q_tile);
#pragma unroll
            for (int n = 0; n < NT; n++) {
                const float* l = lse_tile + 8 * n + lane % 4 * 2;
                float shift[2] = {l[0] * LOG2_E, l[1] * LOG2_E};
#pragma unroll
                for (int i = 0; i < 4 * MT; i++) {
                    float* x = &s[i / 4][n][i % 4];
                    *x = fast_exp2(scale * LOG2_E * *x - shift[i % 2]);
                }
            }
            if (view == VIEW_PART) {
                attention_mask<MASKED, true>(s, warp_key, first_query, 0.0f, edge, T);
            }
        }
        cp_async_wait<0>();
        __syncthreads();
        if (m + 1 < range.end) {
            int next = first_query + QUERIES, other = parity ^ 1;
            attention_load<QUERIES, D>(q_tiles + other * QUERIES * LD, q, ldqk, row0, column0, next,
                                       T);
            attention_load_column<QUERIES>(lse_tiles + other * QUERIES, lse, next, T);
        }
        cp_async_commit();
        if (view == VIEW_NONE) continue;
        mma_ab<MT, D / 8, QUERIES / 16, LD>(dv_acc, s, dout_tile);
        mma_abt<MT, NT, D / 16, LD>(ds, v_tile + warp_row * LD, dout_tile);
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const float* d = delta_tile + 8 * n + lane % 4 * 2;
            float minus[2] = {d[0], d[1]};
#pragma unroll
            for (int i = 0; i < 4 * MT; i++) {
                float* x = &ds[i / 4][n][i % 4];
                *x = s[i / 4][n][i % 4] * (*x - minus[i % 2]);
            }
        }
        mma_ab<MT, D / 8, QUERIES / 16, LD>(dk_acc, ds, q_tile);
    }

    float one[2 * MT], scales[2 * MT];
#pragma unroll
    for (int r = 0; r < 2 * MT; r++) {
        one[r] = 1;
        scales[r] = scale;
    }
    size_t row = (size_t)b * T + warp_key;
    attention_store(dk + row * lddqk + h * D, lddqk, T - warp_key, k_tile + warp_row * LD, dk_acc,
                    scales);
    attention_store(dv + row * lddv + h * D, lddv, T - warp_key, v_tile + warp_row * LD, dv_acc,
                    one);
}

template <int D, bool MASKED>
static __global__ void __launch_bounds__(ATTENTION_BLOCK)
attention_dq_kernel(floatX* dq, const floatX* dout, const float* lse, const float* delta,
                    const floatX* q, const floatX* k, const floatX* v, const int* first, int T,
                    int ldqk, int ldv, int lddqk, float scale) {
    typedef AttentionTiles<D> Tiles;
    constexpr int MT = Tiles::DQ_MT, QUERIES = Tiles::DQ_QUERIES, KEYS = Tiles::DQ_KEYS;
    constexpr int LD = Tiles::LD, ROWS = 16 * MT, NT = KEYS / 8;
    DYN_SMEM(floatX, smem);
    floatX *q_tile = smem, *dout_tile = q_tile + QUERIES * LD, *k_tile = dout_tile + QUERIES * LD;
    floatX* v_tile = k_tile + KEYS * LD;
    int first_query = (gridDim.x - 1 - blockIdx.x) * QUERIES;
    int h = blockIdx.y, H = gridDim.y, b = blockIdx.z, ldout = H * D;
    int warp_row = warp_index() * ROWS, warp_query = first_query + warp_row;
    int row0 = b * T, column0 = h * D;
    AttentionEdge edge = attention_edge<MASKED>(first, row0, warp_query, ROWS, T);

    int low = MASKED ? first[row0 + first_query] : 0;
    AttentionRange range = attention_key_tiles(first_query, QUERIES, KEYS, low, T);
    int first_key = (range.end - 1) * KEYS;
    attention_load<QUERIES, D>(q_tile, q, ldqk, row0, column0, first_query, T);
    attention_load<QUERIES, D>(dout_tile, dout, ldout, row0, column0, first_query, T);
    attention_load<KEYS, D>(v_tile, v, ldv, row0, column0, first_key, T);
    cp_async_commit();
    float acc[MT][D / 8][4], shift[2 * MT], minus[2 * MT];
    attention_zero(acc);
#pragma unroll
    for (int r = 0; r < 2 * MT; r++) {
        int t = warp_query + threadIdx.x % 32 / 4 + 8 * r;
        size_t i = ((size_t)b * H + h) * T + t;
        shift[r] = t < T ? lse[i] * LOG2_E : 0;
        minus[r] = t < T ? delta[i] : 0;
    }
    for (; first_key >= range.first * KEYS; first_key -= KEYS) {
        float s[MT][NT][4], ds[MT][NT][4];
        AttentionView view =
            attention_view<MASKED, false>(warp_query, ROWS, first_key, KEYS, edge, T);
        cp_async_wait<0>();
        __syncthreads();
        attention_load<KEYS, D>(k_tile, k, ldqk, row0, column0, first_key, T);
        cp_async_commit();
        if (view != VIEW_NONE) {
            mma_abt<MT, NT, D / 16, LD>(ds, dout_tile + warp_row * LD, v_tile);
        }
        cp_async_wait<0>();
        __syncthreads();
        if (first_key > range.first * KEYS) {
            attention_load<KEYS, D>(v_tile, v, ldv, row0, column0, first_key - KEYS, T);
        }
        cp_async_commit();
        if (view == VIEW_NONE) continue;
        mma_abt<MT, NT, D / 16, LD>(s, q_tile + warp_row * LD, k_tile);
#pragma unroll
        for (int m = 0; m < MT; m++) {
#pragma unroll
            for (int n = 0; n < NT; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int r = 2 * m + i / 2;
                    float p = fast_exp2(scale * LOG2_E * s[m][n][i] - shift[r]);
                    ds[m][n][i] = p * (ds[m][n][i] - minus[r]);
                }
            }
        }
        if (view == VIEW_PART) {
            attention_mask<MASKED, false>(ds, warp_query, first_key, 0.0f, edge, T);
        }
        mma_ab<MT, D / 8, KEYS / 16, LD>(acc, ds, k_tile);
    }

    float scales[2 * MT];
#pragma unroll
    for (int r = 0; r < 2 * MT; r++) scales[r] = scale;
    attention_store(dq + ((size_t)b * T + warp_query) * lddqk + h * D, lddqk, T - warp_query,
                    q_tile + warp_row * LD, acc, scales);
}

// ---- bounds --------------------------------------------------------------------------------

// One thread per row n of N = B T: position t of its sequence.
static __global__ void attention_bounds_kernel(int* first, int* last, const int* cu_seqlens,
                                               int cu_count, int N, int T, int window, int block) {
    int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N) return;
    int t = n % T, row = n - t, begin = 0, end = T;        // of the document, within the row
    if (cu_seqlens) {
        int low = 0, high = cu_count;                      // the first entry beyond n
        while (low < high) {
            int middle = (low + high) / 2;
            if (cu_seqlens[middle] > n) {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        if (low > 0) begin = max(cu_seqlens[low - 1] - row, 0);
        if (low < cu_count) end = min(cu_seqlens[low] - row, T);
    }
    // No sum may pass 2^31, whatever the window.
    int before, behind;                                    // the window alone
    if (block == 1) {
        before = t - window;
        behind = window < T - 1 - t ? t + window : T - 1;
    } else {
        int reach = max(window, 1) - 1, here = t / block;  // in blocks, beside the query's own
        before = (here - min(reach, here)) * block;
        behind = reach < (T - 1) / block - here ? (here + reach) * block + block - 1 : T - 1;
    }
    first[n] = max(begin, before);
    last[n] = min(end - 1, behind);
}

static inline void attention_check_sizes(int B, int T, int H) {
    REQUIRE(B > 0 && T > 0 && H > 0, "attention needs B, T, H > 0, got %d, %d, %d", B, T, H);
    REQUIRE(B <= (1 << 30) / T, "attention needs B times T up to 2^30, got %d and %d", B, T);
}

static inline void attention_bounds(int* first, int* last, const int* cu_seqlens, int cu_count,
                                    int B, int T, int window, int block, cudaStream_t stream) {
    attention_check_sizes(B, T, 1);
    REQUIRE(window >= 0 && block > 0,
            "attention needs a window of at least 0 and a block of at least 1, got %d and %d",
            window, block);
    REQUIRE(!cu_seqlens || cu_count > 0, "attention needs ends of documents, got %d", cu_count);
    int N = B * T;
    launch<attention_bounds_kernel>(dim3((unsigned)ceil_div(N, 256)), dim3(256), 0, stream, first,
                                    last, cu_seqlens, cu_count, N, T, window, block);
}

// ---- launchers -----------------------------------------------------------------------------

static inline void attention_check(const void* p, const char* name, int ld, int T) {
    REQUIRE((uintptr_t)p % 16 == 0 && ld % 8 == 0,
            "attention needs %s aligned to 16 bytes with a stride divisible by 8, got %p and %d",
            name, p, ld);
    REQUIRE(((size_t)T + 128) * ld <= UINT32_MAX,
            "attention needs T times the stride of %s below 2^32, got %d and %d", name, T, ld);
}

template <int D>
static inline void attention_forward_dim(floatX* out, float* lse, const floatX* q, const floatX* k,
                                         const floatX* v, const int* first, int B, int T, int H,
                                         int ldqk, int ldv, float scale, int from,
                                         cudaStream_t stream) {
    typedef AttentionTiles<D> Tiles;
    int last_tile = (T - 1) / Tiles::FORWARD_QUERIES, first_tile = from / Tiles::FORWARD_QUERIES;
    dim3 grid(last_tile - first_tile + 1, H, B);
    if (first) {
        launch<attention_forward_kernel<D, true>>(grid, dim3(ATTENTION_BLOCK), Tiles::FORWARD_SMEM,
                                                  stream, out, lse, q, k, v, first, last_tile, T,
                                                  ldqk, ldv, scale);
    } else {
        launch<attention_forward_kernel<D, false>>(grid, dim3(ATTENTION_BLOCK), Tiles::FORWARD_SMEM,
                                                   stream, out, lse, q, k, v, first, last_tile, T,
                                                   ldqk, ldv, scale);
    }
}

static inline void attention_forward(floatX* out, float* lse, const floatX* q, const floatX* k,
                                     const floatX* v, const int* first, int B, int T, int H, int D,
                                     int ldqk, int ldv, float scale, int from,
                                     cudaStream_t stream) {
    attention_check_sizes(B, T, H);
    REQUIRE(scale > 0, "attention needs a scale > 0, got %g", scale);
    REQUIRE(from >= 0 && from < T, "attention needs a first query in 0..%d, got %d", T - 1, from);
    attention_check(out, "out", H * D, T);
    attention_check(q, "q", ldqk, T);
    attention_check(k, "k", ldqk, T);
    attention_check(v, "v", ldv, T);
    if (D == 32) {
        attention_forward_dim<32>(out, lse, q, k, v, first, B, T, H, ldqk, ldv, scale, from,
                                  stream);
    } else if (D == 64) {
        attention_forward_dim<64>(out, lse, q, k, v, first, B, T, H, ldqk, ldv, scale, from,
                                  stream);
    } else if (D == 128) {
        attention_forward_dim<128>(out, lse, q, k, v, first, B, T, H, ldqk, ldv, scale, from,
                                   stream);
    } else {
        die("attention needs a head dim of 32, 64 or 128, got %d", D);
    }
}

template <int D>
static inline void attention_backward_dim(floatX* dq, floatX* dk, floatX* dv, float* delta,
                                          const floatX* dout, const floatX* out, const float* lse,
                                          const floatX* q, const floatX* k, const floatX* v,
                                          const int* first, const int* last, int B, int T, int H,
                                          int ldqk, int ldv, int lddqk, int lddv, float scale,
                                          cudaStream_t stream) {
    typedef AttentionTiles<D> Tiles;
    size_t rows = (size_t)B * T * H;
    REQUIRE(rows <= UINT32_MAX / 8, "attention takes up to 2^29 queries times heads, got %zu",
            rows);
    launch<attention_delta_kernel<D>>(dim3((unsigned)ceil_div(rows * (D / 32), 256)), dim3(256), 0,
                                      stream, delta, dout, out, (unsigned)rows, (unsigned)T,
                                      (unsigned)H);
    dim3 key_grid((unsigned)ceil_div(T, Tiles::DKV_KEYS), H, B);
    dim3 query_grid((unsigned)ceil_div(T, Tiles::DQ_QUERIES), H, B);
    if (first) {
        launch<attention_dkv_kernel<D, true>>(key_grid, dim3(ATTENTION_BLOCK), Tiles::DKV_SMEM,
                                              stream, dk, dv, dout, lse, delta, q, k, v, last, T,
                                              ldqk, ldv, lddqk, lddv, scale);
        launch<attention_dq_kernel<D, true>>(query_grid, dim3(ATTENTION_BLOCK), Tiles::DQ_SMEM,
                                             stream, dq, dout, lse, delta, q, k, v, first, T, ldqk,
                                             ldv, lddqk, scale);
    } else {
        launch<attention_dkv_kernel<D, false>>(key_grid, dim3(ATTENTION_BLOCK), Tiles::DKV_SMEM,
                                               stream, dk, dv, dout, lse, delta, q, k, v, last, T,
                                               ldqk, ldv, lddqk, lddv, scale);
        launch<attention_dq_kernel<D, false>>(query_grid, dim3(ATTENTION_BLOCK), Tiles::DQ_SMEM,
                                              stream, dq, dout, lse, delta, q, k, v, first, T, ldqk,
                                              ldv, lddqk, scale);
    }
}

static inline void attention_backward(floatX* dq, floatX* dk, floatX* dv, float* delta,
                                      const floatX* dout, const floatX* out, const float* lse,
                                      const floatX* q, const floatX* k, const floatX* v,
                                      const int* first, const int* last, int B, int T, int H, int D,
                                      int ldqk, int ldv, int lddqk, int lddv, float scale,
                                      cudaStream_t stream) {
    attention_check_sizes(B, T, H);
    REQUIRE(scale > 0, "attention needs a scale > 0, got %g", scale);
    REQUIRE((first == NULL) == (last == NULL),
            "attention needs both bounds or none, got first %p and last %p", (const void*)first,
            (const void*)last);
    attention_check(dout, "dout", H * D, T);
    attention_check(out, "out", H * D, T);
    attention_check(q, "q", ldqk, T);
    attention_check(k, "k", ldqk, T);
    attention_check(v, "v", ldv, T);
    attention_check(dq, "dq", lddqk, T);
    attention_check(dk, "dk", lddqk, T);
    attention_check(dv, "dv", lddv, T);
    if (D == 32) {
        attention_backward_dim<32>(dq, dk, dv, delta, dout, out, lse, q, k, v, first, last, B, T,
                                   H, ldqk, ldv, lddqk, lddv, scale, stream);
    } else if (D == 64) {
        attention_backward_dim<64>(dq, dk, dv, delta, dout, out, lse, q, k, v, first, last, B, T,
                                   H, ldqk, ldv, lddqk, lddv, scale, stream);
    } else if (D == 128) {
        attention_backward_dim<128>(dq, dk, dv, delta, dout, out, lse, q, k, v, first, last, B, T,
                                    H, ldqk, ldv, lddqk, lddv, scale, stream);
    } else {
        die("attention needs a head dim of 32, 64 or 128, got %d", D);
    }
}
