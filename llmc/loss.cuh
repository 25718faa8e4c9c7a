/*
Cross entropy of soft-capped logits, and its gradient in the logits' place.

    c    = z                                SOFTCAP_NONE
           cap tanh(z / cap)                SOFTCAP_TANH
           cap sigmoid(4 z / cap)           SOFTCAP_SIGMOID    (30 sigmoid(z / 7.5) for cap 30)
    loss = log Σ_v exp(c_v) - c_target
    dz   = grad_scale (softmax(c)_v - [v = target]) dc/dz

logits    (R, V) floatX: z in, dz out if write_grad; rows lie V rounded up to a multiple of 16 apart
          (8-bit products want that), pointer aligned to 16 bytes. All V columns take part, those
          that no token uses too; the up to 15 behind them do not, and their gradient is 0.
losses    (R) fp32, one per row
targets   (R) int. -1: the row is ignored, its loss and its gradient are 0 whatever its logits are.
          Any other value outside 0..V-1 makes the loss NaN.
NaN       a NaN among a row's logits makes its loss and its whole gradient NaN.
cost      bf16: 2 bytes per element for the loss; with the gradient 2 more read (in part from L2)
          and 2 written. Two exponentials per element, four with a softcap: bound by memory.
test      test/cases_loss.h
sources   softcap by tanh: Gemma Team 2024, arXiv:2408.00118, section 2; online softmax: Milakov and
          Gimelshein 2018, arXiv:1805.02867

With t = sigmoid(2 z / cap) or sigmoid(4 z / cap) both caps are lines in t, c = cap (2t - 1) and c =
cap t, and both slopes are dc/dz = 4 t (1 - t). Adding a constant to all c of a row changes neither
loss nor gradient, so that c = 2 cap t and c = cap t will do. Computed as 1 / (1 + 2^(k z)), t is
right to about 2^-23 absolute, and there is no overflow: 2^(+inf) gives t = 0, 2^(-inf) gives 1.

A row belongs to as many threads as get 8 chunks of 8 columns each: part of a warp up to V = 2048,
then whole warps, at most 256 threads, which have a block for themselves. In the first pass each
keeps the largest value so far and the sum of exponentials relative to it; these are joined over the
lanes of a warp, then over the warps. The second pass computes the values again from z, which costs
less than keeping a row of 50,304 floats on chip. The owner of the target's column writes the loss:
it alone reads and writes that logit, so nothing has to be read before some other thread overwrites
it.
*/
#pragma once
#include <float.h>
#include "device.cuh"

enum SoftcapKind { SOFTCAP_NONE, SOFTCAP_TANH, SOFTCAP_SIGMOID };

constexpr float LOSS_LOG2E = 1.44269504f;

// c = scale t with t = 1 / (1 + 2^(k z)). Without a cap it is not used.
typedef struct {
    float k, scale;
} Softcap;

// The threads of a row, and the caller among them.
typedef struct {
    int lane, lanes;
} LossPlace;

// The row's largest value and sum of exponentials, as far as one thread or all of them know.
typedef struct {
    float max, sum;                    // sum of exp(c - max)
} SoftmaxStats;

// ---- eight values ------------------------------------------------------------------------------

// 2^x of each. g++ does not make vector code of eight calls of fast_exp2 in the middle of a loop
// (it unrolls them first), so the host's body is that function written in vector types.
static __device__ inline float8 exp2_8(float8 x) {
#ifdef __CUDACC__
    for (int j = 0; j < 8; j++) x.v[j] = fast_exp2(x.v[j]);
    return x;
#else
    typedef float Float8 __attribute__((vector_size(32)));
    typedef int Int8 __attribute__((vector_size(32)));
    Float8 v, zero = {};
    memcpy(&v, &x, sizeof v);
    Float8 clamped = v < -126.0f ? zero - 126.0f : v > 128.0f ? zero + 128.0f : v;
    Float8 shifted = clamped + 12582912.0f;          // 1.5 * 2^23: the integer ends in the low bits
    Float8 f = clamped - (shifted - 12582912.0f);
    Float8 p = f * 1.54614449e-4f + 1.34004280e-3f;    // 2^f on |f| <= 1/2 to 2e-8, exact at 0:
    p = p * f + 9.61805694e-3f;                        // interpolation at Chebyshev's nodes
    p = p * f + 5.55032715e-2f;
    p = p * f + 2.40226507e-1f;
    p = p * f + 6.93147182e-1f;
    p = p * f + 1.0f;
    Float8 y = (Float8)((Int8)p + ((Int8)shifted << 23));
    y = v < -126.0f ? zero : v != v ? v : y;
    memcpy(&x, &y, sizeof x);
    return x;
#endif
}

static __device__ inline float max8(float8 a) {
    float m[4];
    for (int j = 0; j < 4; j++) m[j] = a.v[j] > a.v[j + 4] ? a.v[j] : a.v[j + 4];
    float left = m[0] > m[2] ? m[0] : m[2], right = m[1] > m[3] ? m[1] : m[3];
    return left > right ? left : right;
}

// The sigmoid t of the caps.
static __device__ inline float8 softcap_sigmoid8(float8 z, Softcap cap) {
    for (int j = 0; j < 8; j++) z.v[j] *= cap.k;
    z = exp2_8(z);
    for (int j = 0; j < 8; j++) z.v[j] = 1.0f / (1.0f + z.v[j]);
    return z;
}

// exp(c - max) of each
static __device__ inline float8 loss_exp8(float8 c, float max) {
    for (int j = 0; j < 8; j++) c.v[j] = (c.v[j] - max) * LOSS_LOG2E;
    return exp2_8(c);
}

// Elements from one row of logits to the next.
static __host__ __device__ inline int loss_stride(int V) {
    return (V + 15) / 16 * 16;
}

// ---- one thread's part of a row ----------------------------------------------------------------

// Columns past the last of a row get no probability.
static __device__ inline void loss_mask8(float8* v, int c, int V) {
    if (c + 8 <= V) return;
    for (int j = 0; j < 8; j++) {
        if (c + j >= V) v->v[j] = -FLT_MAX;
    }
}

// `max` starts at the least finite number instead of -inf, so that the difference of two of them is
// 0 and not NaN. A NaN never becomes the maximum for good (a comparison with it is false), but it
// enters the sum and stays there.
template <bool CAPPED>
static __device__ inline SoftmaxStats loss_scan(const floatX* z, int V, Softcap cap, LossPlace at) {
    float max = -FLT_MAX;
    float8 sums = {};
    for (int c = 8 * at.lane; c < V; c += 8 * at.lanes) {
        float8 v = load8(z + c);
        if (CAPPED) {
            v = softcap_sigmoid8(v, cap);
            for (int j = 0; j < 8; j++) v.v[j] *= cap.scale;
        }
        loss_mask8(&v, c, V);
        float top = max8(v);
        if (top > max) {
            float shrink = fast_exp2((max - top) * LOSS_LOG2E);
            for (int j = 0; j < 8; j++) sums.v[j] *= shrink;
            max = top;
        }
        v = loss_exp8(v, max);
        for (int j = 0; j < 8; j++) sums.v[j] += v.v[j];
    }
    SoftmaxStats stats = {max, 0.0f};
    for (int j = 0; j < 8; j++) stats.sum += sums.v[j];
    return stats;
}

// Overwrites the logits with weight exp(c - max) dc/dz: the gradient everywhere but at the target,
// and 0 behind the last column.
template <bool CAPPED>
static __device__ inline void loss_gradient(floatX* z, int V, float max, float weight, Softcap cap,
                                            LossPlace at) {
    for (int c = 8 * at.lane; c < loss_stride(V); c += 8 * at.lanes) {
        float8 v = load8(z + c), t = {};
        if (CAPPED) {
            t = softcap_sigmoid8(v, cap);
            for (int j = 0; j < 8; j++) v.v[j] = cap.scale * t.v[j];
        }
        loss_mask8(&v, c, V);
        v = loss_exp8(v, max);
        for (int j = 0; j < 8; j++) {
            v.v[j] *= CAPPED ? weight * (4.0f * t.v[j] * (1.0f - t.v[j])) : weight;
        }
        store8(z + c, v);
    }
}

// ---- the row -----------------------------------------------------------------------------------

template <int W>
static __device__ inline SoftmaxStats loss_join_lanes(SoftmaxStats part) {
    SoftmaxStats all;
    all.max = warp_max<W>(part.max);
    all.sum = warp_sum<W>(part.sum * fast_exp2((part.max - all.max) * LOSS_LOG2E));
    return all;
}

// The whole row from its threads' parts, in an order that depends on `lanes` alone.
static __device__ inline SoftmaxStats loss_join(SoftmaxStats part, int lanes, float2* scratch) {
    switch (lanes) {                           // the same for the whole grid
        case 1: return part;
        case 2: return loss_join_lanes<2>(part);
        case 4: return loss_join_lanes<4>(part);
        case 8: return loss_join_lanes<8>(part);
        case 16: return loss_join_lanes<16>(part);
    }
    SoftmaxStats row = loss_join_lanes<32>(part);
    if (lanes == WARP) return row;
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = make_float2(row.max, row.sum);
    __syncthreads();
    row.max = scratch[0].x;
    for (int w = 1; w < lanes / WARP; w++) {
        if (scratch[w].x > row.max) row.max = scratch[w].x;
    }
    row.sum = 0.0f;
    for (int w = 0; w < lanes / WARP; w++) {
        row.sum += scratch[w].y * fast_exp2((scratch[w].x - row.max) * LOSS_LOG2E);
    }
    return row;
}

template <bool CAPPED>
static __global__ void cross_entropy_kernel(floatX* logits, float* losses, const int* targets,
                                            int R, int V, Softcap cap, float grad_scale,
                                            bool write_grad, int lanes) {
    DYN_SMEM(float2, scratch);
    LossPlace at = {(int)threadIdx.x % lanes, lanes};
    int r = blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes;
    if (r >= R) return;                        // never part of a block that has a barrier
    floatX* z = logits + (size_t)r * loss_stride(V);
    int target = targets[r];
    if (target == -1) {                        // the same for all threads of the row
        float8 zero = {};
        if (at.lane == 0) losses[r] = 0.0f;
        int end = write_grad ? loss_stride(V) : 0;
        for (int c = 8 * at.lane; c < end; c += 8 * lanes) store8(z + c, zero);
        return;
    }
    bool owner = (unsigned)target / 8 % lanes == (unsigned)at.lane;
    bool inside = (unsigned)target < (unsigned)V;
    float c_target = NAN, slope = 1.0f;
    if (owner && inside) {
        c_target = to_float(z[target]);
        if (CAPPED) {
            float t = 1.0f / (1.0f + fast_exp2(cap.k * c_target));
            c_target = cap.scale * t;
            slope = 4.0f * t * (1.0f - t);
        }
    }
    SoftmaxStats row = loss_join(loss_scan<CAPPED>(z, V, cap, at), lanes, scratch);
    if (owner) losses[r] = logf(row.sum) + (row.max - c_target);
    if (!write_grad) return;
    loss_gradient<CAPPED>(z, V, row.max, grad_scale / row.sum, cap, at);
    if (owner && inside) {
        float p = fast_exp2((c_target - row.max) * LOSS_LOG2E) / row.sum;
        store1(z + target, grad_scale * (p - 1.0f) * slope);
    }
}

// One block: each thread adds every blockDim-th loss, then block_sum.
static __global__ void loss_sum_kernel(float* out, const float* losses, size_t n) {
    DYN_SMEM(float, scratch);
    float total = 0.0f;
    for (size_t i = threadIdx.x; i < n; i += blockDim.x) total += losses[i];
    total = block_sum(total, scratch);
    if (threadIdx.x == 0) *out = total;
}

// The cap of one logit, on the host.
static inline float softcap_host(SoftcapKind kind, float c, float z) {
    switch (kind) {
        case SOFTCAP_NONE: return z;
        case SOFTCAP_TANH: return c * tanhf(z / c);
        case SOFTCAP_SIGMOID: return c / (1.0f + expf(-4.0f * z / c));
    }
    return z;
}

// ---- launchers ---------------------------------------------------------------------------------

// Threads for a row: a power of two up to 32, then a multiple of it.
static inline int cross_entropy_lanes(int V) {
    int lanes = 1;
    while (lanes < WARP && 64 * lanes < V) lanes *= 2;
    if (lanes == WARP) lanes = WARP * (int)ceil_div(V, 64 * WARP);
    return lanes < 256 ? lanes : 256;
}

static inline Softcap softcap_of(SoftcapKind kind, float cap) {
    REQUIRE(kind == SOFTCAP_NONE || cap > 0.0f, "cross_entropy: the cap has to be positive, got %g",
            cap);
    if (kind == SOFTCAP_NONE) return {0.0f, 0.0f};
    if (kind == SOFTCAP_TANH) return {-2.0f * LOSS_LOG2E / cap, 2.0f * cap};
    return {-4.0f * LOSS_LOG2E / cap, cap};
}

static inline void cross_entropy(floatX* logits, float* losses, const int* targets, int R, int V,
                                 SoftcapKind kind, float cap, float grad_scale, bool write_grad,
                                 cudaStream_t stream) {
    REQUIRE(R > 0 && V > 0, "cross_entropy needs rows and columns; got R=%d V=%d", R, V);
    Softcap line = softcap_of(kind, cap);
    int lanes = cross_entropy_lanes(V), threads = lanes < WARP ? WARP : lanes;
    dim3 grid(ceil_div(R, threads / lanes)), block(threads);
    size_t smem = threads / WARP * sizeof(float2);
    if (kind == SOFTCAP_NONE) {
        launch<cross_entropy_kernel<false>>(grid, block, smem, stream, logits, losses, targets, R,
                                            V, line, grad_scale, write_grad, lanes);
        return;
    }
    launch<cross_entropy_kernel<true>>(grid, block, smem, stream, logits, losses, targets, R, V,
                                       line, grad_scale, write_grad, lanes);
}

// out: 1 float, the sum of n losses; the bits depend on n alone
static inline void loss_sum(float* out, const float* losses, size_t n, cudaStream_t stream) {
    REQUIRE(n > 0, "loss_sum: no losses to add");
    size_t threads = 32 * ceil_div(n, 16 * 32);
    launch<loss_sum_kernel>(dim3(1), dim3(threads < 1024 ? threads : 1024), 32 * sizeof(float),
                            stream, out, losses, n);
}
