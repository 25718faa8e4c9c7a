/*
RMSNorm without a gain, alone or together with the residual addition before it.

    rstd = 1 / √(mean_c(x²) + eps)
    y    = rstd x
    dx   = rstd (dy - y mean_c(dy y))                (+ dx where it accumulates)

residual_rmsnorm_forward first writes sum = x + r and normalises what it wrote, so that with bf16
storage sum, y and rstd belong together. Its backward is rmsnorm_backward with `accumulate`: the
gradient of sum is already in dx, from the branch that bypasses the norm, and dr is the same tensor.

x r sum y dx dy   (N, C) of floatX; C a multiple of 8, pointers aligned to 16 bytes
rstd              (N) fp32
saved             y (rounded as stored) and rstd; x may be thrown away
in place          sum may alias x or r; y may alias x, and r; dx may alias dy
NaN               a NaN in a row makes the whole row NaN, forward and backward.
cost              bf16, bytes per element: forward 4, with residual 8, backward 6 (accumulating 8);
                  bound by memory
test              test/cases_rmsnorm.h
source            Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", arXiv:1910.07467

A row belongs to W = 2, 4, .. 32 neighbouring lanes of one warp, as few as still hold it in
registers: lane l owns the chunks of 8 columns l, l + W, l + 2W, ... and keeps its first four
between the sum and the scaling, which is all of them up to C = 1024. The lanes meet once per row;
there is no shared memory and no barrier.
*/
#pragma once
#include "device.cuh"

constexpr int RMSNORM_BLOCK = 256;
constexpr int RMSNORM_KEEP = 4;    // chunks in registers; what lies beyond is read a second time

// The row of a thread and its place in it.
typedef struct {
    bool active;         // false past the last row; the thread has no columns then,
    int row, lane;       // but takes part in the warp's sums
    int first, step;     // its first column, and from there to its next
    size_t base;         // of the row
} RmsnormPlace;

static __device__ inline RmsnormPlace rmsnorm_place(int log_lanes, int N, int C) {
    RmsnormPlace at;
    at.row = blockIdx.x * (RMSNORM_BLOCK >> log_lanes) + (threadIdx.x >> log_lanes);
    at.lane = threadIdx.x & ((1 << log_lanes) - 1);
    at.active = at.row < N;
    at.first = at.active ? 8 * at.lane : C;
    at.step = 8 << log_lanes;
    at.base = (size_t)at.row * C;
    return at;
}

// The sum over the lanes of a row, of eight partial sums each.
static __device__ inline float rmsnorm_sum(float8 part, int log_lanes) {
    const float* v = part.v;
    float sum = ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
    switch (log_lanes) {               // the same for the whole grid
        case 1: return warp_sum<2>(sum);
        case 2: return warp_sum<4>(sum);
        case 3: return warp_sum<8>(sum);
        case 4: return warp_sum<16>(sum);
        default: return warp_sum<32>(sum);
    }
}

// ---- kernels -----------------------------------------------------------------------------------

// Eight columns of the tensor to normalise. In the residual form they are made here, rounded as
// they are stored: what later layers read is what gets normalised.
template <bool RESIDUAL>
static __device__ inline float8 rmsnorm_input(floatX* sum, const floatX* x, const floatX* r,
                                              size_t i) {
    float8 a = load8(x + i);
    if (RESIDUAL) {
        float8 b = load8(r + i);
        for (int j = 0; j < 8; j++) a.v[j] = to_float(from_float<floatX>(a.v[j] + b.v[j]));
        store8(sum + i, a);
    }
    return a;
}

template <bool RESIDUAL>
static __global__ void rmsnorm_forward_kernel(floatX* sum, floatX* y, float* rstd, const floatX* x,
                                              const floatX* r, int N, int C, float eps,
                                              int log_lanes) {
    RmsnormPlace at = rmsnorm_place(log_lanes, N, C);
    float8 kept[RMSNORM_KEEP], squares = {};
#pragma unroll
    for (int k = 0; k < RMSNORM_KEEP; k++) {
        int c = at.first + k * at.step;
        if (c >= C) break;
        kept[k] = rmsnorm_input<RESIDUAL>(sum, x, r, at.base + c);
        for (int j = 0; j < 8; j++) squares.v[j] += kept[k].v[j] * kept[k].v[j];
    }
    for (int c = at.first + RMSNORM_KEEP * at.step; c < C; c += at.step) {
        float8 a = rmsnorm_input<RESIDUAL>(sum, x, r, at.base + c);
        for (int j = 0; j < 8; j++) squares.v[j] += a.v[j] * a.v[j];
    }
    float scale = 1.0f / sqrtf(rmsnorm_sum(squares, log_lanes) / C + eps);
#pragma unroll
    for (int k = 0; k < RMSNORM_KEEP; k++) {
        int c = at.first + k * at.step;
        if (c >= C) break;
        for (int j = 0; j < 8; j++) kept[k].v[j] *= scale;
        store8(y + at.base + c, kept[k]);
    }
    const floatX* source = RESIDUAL ? sum : x;
    for (int c = at.first + RMSNORM_KEEP * at.step; c < C; c += at.step) {
        float8 a = load8(source + at.base + c);
        for (int j = 0; j < 8; j++) a.v[j] *= scale;
        store8(y + at.base + c, a);
    }
    if (at.active && at.lane == 0) rstd[at.row] = scale;
}

// Writes eight columns of dx from those of dy and y; mean is the row's mean of dy y.
template <bool ACCUMULATE>
static __device__ inline void rmsnorm_backward8(floatX* dx, float8 dy, float8 y, float mean,
                                                float scale) {
    float8 out;
    for (int j = 0; j < 8; j++) out.v[j] = scale * (dy.v[j] - y.v[j] * mean);
    if (ACCUMULATE) {
        float8 old = load8(dx);
        for (int j = 0; j < 8; j++) out.v[j] += old.v[j];
    }
    store8(dx, out);
}

template <bool ACCUMULATE>
static __global__ void rmsnorm_backward_kernel(floatX* dx, const floatX* dy, const floatX* y,
                                               const float* rstd, int N, int C, int log_lanes) {
    RmsnormPlace at = rmsnorm_place(log_lanes, N, C);
    float8 dy8[RMSNORM_KEEP], y8[RMSNORM_KEEP], products = {};
#pragma unroll
    for (int k = 0; k < RMSNORM_KEEP; k++) {
        int c = at.first + k * at.step;
        if (c >= C) break;
        dy8[k] = load8(dy + at.base + c);
        y8[k] = load8(y + at.base + c);
        for (int j = 0; j < 8; j++) products.v[j] += dy8[k].v[j] * y8[k].v[j];
    }
    for (int c = at.first + RMSNORM_KEEP * at.step; c < C; c += at.step) {
        float8 a = load8(dy + at.base + c), b = load8(y + at.base + c);
        for (int j = 0; j < 8; j++) products.v[j] += a.v[j] * b.v[j];
    }
    float mean = rmsnorm_sum(products, log_lanes) / C;
    float scale = at.active ? rstd[at.row] : 0.0f;
#pragma unroll
    for (int k = 0; k < RMSNORM_KEEP; k++) {
        int c = at.first + k * at.step;
        if (c >= C) break;
        rmsnorm_backward8<ACCUMULATE>(dx + at.base + c, dy8[k], y8[k], mean, scale);
    }
    for (int c = at.first + RMSNORM_KEEP * at.step; c < C; c += at.step) {
        float8 a = load8(dy + at.base + c), b = load8(y + at.base + c);
        rmsnorm_backward8<ACCUMULATE>(dx + at.base + c, a, b, mean, scale);
    }
}

static __global__ void residual_add_kernel(floatX* sum, const floatX* x, const floatX* r,
                                           size_t n) {
    size_t i = 8 * ((size_t)blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= n) return;
    float8 a = load8(x + i), b = load8(r + i);
    for (int j = 0; j < 8; j++) a.v[j] += b.v[j];
    store8(sum + i, a);
}

// ---- launchers ---------------------------------------------------------------------------------

// Lanes per row, as a power of two.
static inline int rmsnorm_log_lanes(int N, int C) {
    REQUIRE(N > 0 && C > 0 && C % 8 == 0,
            "rmsnorm needs rows, and C to be a multiple of 8; got N=%d C=%d", N, C);
    int log_lanes = 1;
    while (log_lanes < 5 && (8 * RMSNORM_KEEP << log_lanes) < C) log_lanes++;
    return log_lanes;
}

static inline dim3 rmsnorm_grid(int N, int log_lanes) {
    return dim3(ceil_div(N, RMSNORM_BLOCK >> log_lanes));
}

static inline void rmsnorm_forward(floatX* y, float* rstd, const floatX* x, int N, int C, float eps,
                                   cudaStream_t stream) {
    int log_lanes = rmsnorm_log_lanes(N, C);
    floatX* no_sum = NULL;
    const floatX* no_residual = NULL;
    launch<rmsnorm_forward_kernel<false>>(rmsnorm_grid(N, log_lanes), dim3(RMSNORM_BLOCK), 0,
                                          stream, no_sum, y, rstd, x, no_residual, N, C, eps,
                                          log_lanes);
}

static inline void residual_rmsnorm_forward(floatX* sum, floatX* y, float* rstd, const floatX* x,
                                            const floatX* r, int N, int C, float eps,
                                            cudaStream_t stream) {
    int log_lanes = rmsnorm_log_lanes(N, C);
    launch<rmsnorm_forward_kernel<true>>(rmsnorm_grid(N, log_lanes), dim3(RMSNORM_BLOCK), 0, stream,
                                         sum, y, rstd, x, r, N, C, eps, log_lanes);
}

static inline void rmsnorm_backward(floatX* dx, const floatX* dy, const floatX* y,
                                    const float* rstd, int N, int C, bool accumulate,
                                    cudaStream_t stream) {
    int log_lanes = rmsnorm_log_lanes(N, C);
    dim3 grid = rmsnorm_grid(N, log_lanes), block(RMSNORM_BLOCK);
    if (accumulate) {
        launch<rmsnorm_backward_kernel<true>>(grid, block, 0, stream, dx, dy, y, rstd, N, C,
                                              log_lanes);
    } else {
        launch<rmsnorm_backward_kernel<false>>(grid, block, 0, stream, dx, dy, y, rstd, N, C,
                                               log_lanes);
    }
}

static inline void residual_add(floatX* sum, const floatX* x, const floatX* r, size_t n,
                                cudaStream_t stream) {
    REQUIRE(n % 8 == 0 && n > 0, "residual_add works on multiples of 8 elements, got %zu", n);
    launch<residual_add_kernel>(dim3(ceil_div(n, 8 * 256)), dim3(256), 0, stream, sum, x, r, n);
}
