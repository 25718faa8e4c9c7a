/*
Gates that read twelve channels of their row: one per attention head, and one that smears each token
into the next. σ is the logistic function.

attention_gate   g = σ(w h[0:12])  for each row and head
                 y = g att                            datt = g dy
                 dw += dz h[0:12],  dh[0:12] += dz w  with dz = g (1 - g) Σ_d dy att
smear            g_i = σ(w e_i[0:12]), but 0 for the first row of a sequence of T
                 y_i = e_i + λ g_i e_{i-1}
                 dw += dz_i e_i[0:12],  dλ += g_i p_i
                 de_i = dy_i + λ g_{i+1} dy_{i+1},  de_i[0:12] += dz_i w
                 with p_i = Σ_c dy_i e_{i-1},  dz_i = λ g_i (1 - g_i) p_i

att y dy datt    (N, H D) of floatX; D = 32, 64 or 128
h dh e de        (N, C) of floatX, as the smear's y and dy; C a multiple of 8, at least 16
w dw             (H, 12) fp32, the smear's (12); λ one fp32 on the device. dw, dλ accumulate over
                 micro-steps, dh over what else reads h
gate             (N, H) fp32, the smear's (N); written by forward, read by backward
saved            att and h, or e, and gate
in place         attention's y may alias att, datt may alias dy; y and de of the smear alias nothing
cost             bf16, bytes per element: attention's forward 4, backward 6; the smear's 4 and 6, or
                 6 and 10 where the neighbour has left the cache; bound by memory
test             test/cases_gate.h

The smear looks across the borders of documents, as its record does. Sums over rows go the way of
mix.cuh: every block (smear: every warp) writes its part, mix_scalars adds the parts. No atomics:
the bits depend on the sizes alone.
*/
#pragma once
#include "mix.cuh"

constexpr int GATE_INPUTS = 12;
constexpr int GATE_BLOCK = 256;
constexpr int GATE_ROWS = 32;      // of a block of attention_gate's backward
constexpr int SMEAR_ROWS = 8;      // of a warp of smear's backward

static __device__ inline float gate_sigmoid(const floatX* row, const float* w) {
    float8 a = load8(row), b = load8(row + 8);
    float sum = 0.0f;
    for (int j = 0; j < 8; j++) sum += a.v[j] * w[j];
    for (int j = 0; j < GATE_INPUTS - 8; j++) sum += b.v[j] * w[8 + j];
    return 1.0f / (1.0f + fast_exp(-sum));
}

// ---- attention gates ---------------------------------------------------------------------------

static __global__ void attention_gate_forward_kernel(floatX* y, float* gate, const floatX* att,
                                                     const floatX* h, const float* w,
                                                     unsigned chunks, int D, int H, int C) {
    unsigned i = blockIdx.x * GATE_BLOCK + threadIdx.x;
    if (i >= chunks) return;
    unsigned lanes = D / 8, pair = i / lanes, n = pair / H, head = pair % H;
    float g = gate_sigmoid(h + (size_t)n * C, w + head * GATE_INPUTS);
    float8 v = load8(att + (size_t)i * 8);
    for (int j = 0; j < 8; j++) v.v[j] *= g;
    store8(y + (size_t)i * 8, v);
    if (i % lanes == 0) gate[pair] = g;
}

// A block has GATE_ROWS rows. W = D/8 lanes share a head and leave its dz in shared memory; then
// come the rows of dh, and the block's parts of dw.
template <int W>
static __global__ void attention_gate_backward_kernel(floatX* datt, floatX* dh, float* parts,
                                                      const floatX* dy, const floatX* att,
                                                      const float* gate, const floatX* h,
                                                      const float* w, int N, int H, int C) {
    DYN_SMEM(float, dz);                                   // (GATE_ROWS, H)
    int first = blockIdx.x * GATE_ROWS, rows = N - first < GATE_ROWS ? N - first : GATE_ROWS;
    for (int k = threadIdx.x; k < rows * H * W; k += GATE_BLOCK) {
        size_t pair = (size_t)first * H + k / W, i = (pair * W + k % W) * 8;
        float g = gate[pair], sum = 0.0f;
        float8 d = load8(dy + i), a = load8(att + i);
        for (int j = 0; j < 8; j++) sum += d.v[j] * a.v[j];
        for (int j = 0; j < 8; j++) d.v[j] *= g;
        store8(datt + i, d);
        sum = warp_sum<W>(sum);
        if (k % W == 0) dz[k / W] = g * (1.0f - g) * sum;
    }
    __syncthreads();
    for (int k = threadIdx.x; k < 2 * rows; k += GATE_BLOCK) {
        int row = k / 2, column = k % 2 * 8;
        floatX* here = dh + (size_t)(first + row) * C + column;
        float8 sum = load8(here);
        for (int head = 0; head < H; head++) {
            float d = dz[row * H + head];
            for (int j = 0; j < 8; j++) {
                if (column + j < GATE_INPUTS)
                    sum.v[j] += d * w[head * GATE_INPUTS + column + j];
            }
        }
        store8(here, sum);
    }
    for (int k = threadIdx.x; k < H * GATE_INPUTS; k += GATE_BLOCK) {
        int head = k / GATE_INPUTS, column = k % GATE_INPUTS;
        float sum = 0.0f;
        for (int row = 0; row < rows; row++)
            sum += dz[row * H + head] * load1(h + (size_t)(first + row) * C + column);
        parts[(size_t)k * gridDim.x + blockIdx.x] = sum;
    }
}

static inline void attention_gate_check(int N, int H, int D, int C) {
    REQUIRE(N > 0 && H > 0 && C >= 16 && C % 8 == 0 && (D == 32 || D == 64 || D == 128),
            "attention_gate needs rows, heads of 32, 64 or 128, and C a multiple of 8 from 16 on; "
            "got N=%d H=%d D=%d C=%d", N, H, D, C);
    REQUIRE((size_t)N * H * (D / 8) < (size_t)UINT_MAX - GATE_BLOCK && H <= 256,
            "attention_gate takes at most 256 heads and fewer than 2^35 values, got N=%d H=%d D=%d",
            N, H, D);
}

static inline void attention_gate_forward(floatX* y, float* gate, const floatX* att,
                                          const floatX* h, const float* w, int N, int H, int D,
                                          int C, cudaStream_t stream) {
    attention_gate_check(N, H, D, C);
    unsigned chunks = (unsigned)((size_t)N * H * (D / 8));
    launch<attention_gate_forward_kernel>(dim3(ceil_div(chunks, GATE_BLOCK)), dim3(GATE_BLOCK), 0,
                                          stream, y, gate, att, h, w, chunks, D, H, C);
}

static inline size_t attention_gate_scratch_floats(int N, int H) {
    return ceil_div(N, GATE_ROWS) * H * GATE_INPUTS;
}

// scratch: attention_gate_scratch_floats(N, H) floats on the device
static inline void attention_gate_backward(floatX* datt, floatX* dh, float* dw, const floatX* dy,
                                           const floatX* att, const float* gate, const floatX* h,
                                           const float* w, int N, int H, int D, int C,
                                           float* scratch, cudaStream_t stream) {
    attention_gate_check(N, H, D, C);
    int blocks = (int)ceil_div(N, GATE_ROWS);
    dim3 grid(blocks), block(GATE_BLOCK);
    size_t shared = (size_t)GATE_ROWS * H * sizeof(float);
    if (D == 32) {
        launch<attention_gate_backward_kernel<4>>(grid, block, shared, stream, datt, dh, scratch,
                                                  dy, att, gate, h, w, N, H, C);
    } else if (D == 64) {
        launch<attention_gate_backward_kernel<8>>(grid, block, shared, stream, datt, dh, scratch,
                                                  dy, att, gate, h, w, N, H, C);
    } else {
        launch<attention_gate_backward_kernel<16>>(grid, block, shared, stream, datt, dh, scratch,
                                                   dy, att, gate, h, w, N, H, C);
    }
    mix_scalars(dw, scratch, H * GATE_INPUTS, blocks, stream);
}

// ---- smear -------------------------------------------------------------------------------------

static __global__ void smear_forward_kernel(floatX* y, float* gate, const floatX* e, const float* w,
                                            const float* lambda, int N, int T, int C) {
    unsigned i = blockIdx.x * GATE_BLOCK + threadIdx.x;
    unsigned chunks = C / 8, n = i / chunks, c = 8 * (i % chunks);
    if (n >= (unsigned)N) return;
    const floatX* row = e + (size_t)n * C;
    float8 v = load8(row + c);
    float g = 0.0f;
    if (n % T != 0) {
        g = gate_sigmoid(row, w);
        float8 before = load8(row + c - C);
        float factor = *lambda * g;
        for (int j = 0; j < 8; j++) v.v[j] += factor * before.v[j];
    }
    store8(y + (size_t)n * C + c, v);
    if (c == 0) gate[n] = g;
}

// A warp has SMEAR_ROWS rows, one after another: a lane holds the first of its chunks of de back
// until the warp knows p_i, because the first twelve columns need it. Lane k < 12 sums up dw[k],
// lane 12 dλ.
static __global__ void smear_backward_kernel(floatX* de, float* parts, const floatX* dy,
                                             const floatX* e, const float* gate, const float* w,
                                             const float* lambda, int N, int T, int C) {
    int lane = threadIdx.x % WARP, warps = gridDim.x * (GATE_BLOCK / WARP);
    int warp = blockIdx.x * (GATE_BLOCK / WARP) + threadIdx.x / WARP;
    float weight = *lambda, total = 0.0f;
    for (int n = warp * SMEAR_ROWS; n < (warp + 1) * SMEAR_ROWS && n < N; n++) {
        size_t row = (size_t)n * C;
        bool opens = n % T == 0, closes = n % T == T - 1;
        float after = closes ? 0.0f : weight * gate[n + 1], sum = 0.0f;
        float8 held = {};
        for (int c = 8 * lane; c < C; c += 8 * WARP) {
            float8 d = load8(dy + row + c);
            if (!opens) {
                float8 before = load8(e + row - C + c);
                for (int j = 0; j < 8; j++) sum += d.v[j] * before.v[j];
            }
            if (!closes) {
                float8 next = load8(dy + row + C + c);
                for (int j = 0; j < 8; j++) d.v[j] += after * next.v[j];
            }
            if (c < 8 * WARP) held = d;
            else store8(de + row + c, d);
        }
        float g = gate[n], p = warp_sum<WARP>(sum), dz = weight * g * (1.0f - g) * p;
        if (lane < GATE_INPUTS) total += dz * load1(e + row + lane);
        if (lane == GATE_INPUTS) total += g * p;
        for (int j = 0; j < 8; j++) {
            if (8 * lane + j < GATE_INPUTS) held.v[j] += dz * w[8 * lane + j];
        }
        if (8 * lane < C) store8(de + row + 8 * lane, held);
    }
    if (lane <= GATE_INPUTS) parts[(size_t)lane * warps + warp] = total;
}

static inline void smear_check(int N, int T, int C) {
    REQUIRE(N > 0 && T > 0 && N % T == 0 && C >= 16 && C % 8 == 0,
            "smear needs rows in whole sequences of T, and C a multiple of 8 from 16 on; "
            "got N=%d T=%d C=%d", N, T, C);
    REQUIRE((size_t)N * (C / 8) < (size_t)UINT_MAX - GATE_BLOCK,
            "smear takes fewer than 2^35 values, got %d x %d", N, C);
}

static inline void smear_forward(floatX* y, float* gate, const floatX* e, const float* w,
                                 const float* lambda, int N, int T, int C, cudaStream_t stream) {
    smear_check(N, T, C);
    launch<smear_forward_kernel>(dim3(ceil_div((size_t)N * (C / 8), GATE_BLOCK)), dim3(GATE_BLOCK),
                                 0, stream, y, gate, e, w, lambda, N, T, C);
}

static inline int smear_blocks(int N) {
    return (int)ceil_div(N, SMEAR_ROWS * (GATE_BLOCK / WARP));
}

static inline size_t smear_scratch_floats(int N) {
    return (size_t)smear_blocks(N) * (GATE_BLOCK / WARP) * (GATE_INPUTS + 1);
}

// scratch: smear_scratch_floats(N) floats on the device
static inline void smear_backward(floatX* de, float* dw, float* dlambda, const floatX* dy,
                                  const floatX* e, const float* gate, const float* w,
                                  const float* lambda, int N, int T, int C, float* scratch,
                                  cudaStream_t stream) {
    smear_check(N, T, C);
    int blocks = smear_blocks(N), warps = blocks * (GATE_BLOCK / WARP);
    launch<smear_backward_kernel>(dim3(blocks), dim3(GATE_BLOCK), 0, stream, de, scratch, dy, e,
                                  gate, w, lambda, N, T, C);
    mix_scalars(dw, scratch, GATE_INPUTS, warps, stream);
    mix_scalars(dlambda, scratch + (size_t)GATE_INPUTS * warps, 1, warps, stream);
}
