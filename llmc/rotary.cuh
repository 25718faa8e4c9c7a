/*
QK-norm and rotary position embedding, fused, on the query and key heads of every row.

With x = (x1, x2) the two halves of a head and c, s the tables' row of its position:

    R x   = (x1 c + x2 s, -x1 s + x2 c)
    y     = rstd R x      rstd = 1 / √(mean(x²) + eps)            norm first
                          rstd = 1 / √(mean((R x)²) + eps)        rotation first
    dx    = rstd Rᵀ (dy - y mean(dy y) / g)
                          g = c² + s²                             norm first
                          g = 1                                   rotation first

R is a rotation only as far as c² + s² = 1, which tables rounded to bf16 miss by up to 2^-7: hence
two orders, which differ, and g. (Norm first: with n = rstd x the norm's backward is
dx = rstd (Rᵀ dy - n mean(Rᵀdy n)); y = R n gives n = Rᵀ y / g and mean(Rᵀdy n) = mean(dy y).)

qk, dqk   rows of stride ld, ldd: H heads of q, then H heads of k, D columns each; changed in place
rstd      (N, 2H) fp32, written by forward, read by backward
cos, sin  (T, D/2) fp32, made by rotary_tables from a frequency f_j for each pair, and again when
          these change; row n = b T + t reads row t, where pair j has the angle t f_j
sizes     D = 32, 64 or 128; strides multiples of 8, pointers aligned to 16 bytes
saved     y, which lies where x was, and rstd
NaN       a NaN in a head makes that head NaN
cost      bf16, bytes per element: forward 4, backward 6; tables stay in the cache; bound by memory
test      test/cases_rotary.h
sources   Su et al. 2021, "RoFormer", arXiv:2104.09864; Henry et al. 2020, "Query-Key
          Normalization", arXiv:2010.04245

A head belongs to W = D/32 lanes, lane l with columns 8l.. and 8(l+W).. of both halves: pairs never
leave a lane, and the lanes of a head meet once, for the sum of squares.
*/
#pragma once
#include "device.cuh"

constexpr int ROTARY_BLOCK = 256;

// Eight pairs: columns 8l.. of the first half, and of the second.
struct Pairs8 {
    float8 a, b;
};

static __device__ inline Pairs8 pairs_load(const floatX* head, int half) {
    Pairs8 x = {load8(head), load8(head + half)};
    return x;
}

// The sum over a lane's pairs of x y.
static __device__ inline float pairs_dot(const Pairs8 (&x)[2], const Pairs8 (&y)[2]) {
    float8 sums = {};
    for (int k = 0; k < 2; k++) {
        for (int j = 0; j < 8; j++) {
            sums.v[j] += x[k].a.v[j] * y[k].a.v[j] + x[k].b.v[j] * y[k].b.v[j];
        }
    }
    for (int half = 4; half > 0; half /= 2) {
        for (int j = 0; j < half; j++) sums.v[j] += sums.v[j + half];
    }
    return sums.v[0];
}

// R x; with -sin in place of sin, Rᵀ x
static __device__ inline Pairs8 pairs_rotate(Pairs8 x, float8 c, float8 s) {
    Pairs8 y;
    for (int j = 0; j < 8; j++) {
        y.a.v[j] = x.a.v[j] * c.v[j] + x.b.v[j] * s.v[j];
        y.b.v[j] = x.b.v[j] * c.v[j] - x.a.v[j] * s.v[j];
    }
    return y;
}

template <int D>
static __global__ void qknorm_rotary_forward_kernel(floatX* qk, float* rstd, const float* cos,
                                                    const float* sin, unsigned heads, unsigned T,
                                                    unsigned H, int ld, float eps,
                                                    bool norm_first) {
    constexpr int W = D / 32, HALF = D / 2, STEP = 8 * W;
    unsigned i = blockIdx.x * ROTARY_BLOCK + threadIdx.x, head = i / W;
    if (head >= heads) return;                         // all lanes of a head or none
    unsigned n = head / (2 * H), h = head % (2 * H), column = i % W * 8;
    unsigned entry = n % T * HALF + column;
    floatX* here = qk + (size_t)n * ld + h * D + column;
    Pairs8 x[2], y[2];
    for (int k = 0; k < 2; k++) {
        float8 c = load8(cos + entry + k * STEP), s = load8(sin + entry + k * STEP);
        x[k] = pairs_load(here + k * STEP, HALF);
        y[k] = pairs_rotate(x[k], c, s);
    }
    float mean = warp_sum<W>(norm_first ? pairs_dot(x, x) : pairs_dot(y, y)) / D;
    float scale = 1.0f / sqrtf(mean + eps);
    for (int k = 0; k < 2; k++) {
        for (int j = 0; j < 8; j++) {
            y[k].a.v[j] *= scale;
            y[k].b.v[j] *= scale;
        }
        store8(here + k * STEP, y[k].a);
        store8(here + k * STEP + HALF, y[k].b);
    }
    if (column == 0) rstd[head] = scale;
}

template <int D>
static __global__ void qknorm_rotary_backward_kernel(floatX* dqk, const floatX* qk,
                                                     const float* rstd, const float* cos,
                                                     const float* sin, unsigned heads, unsigned T,
                                                     unsigned H, int ldd, int ld, bool norm_first) {
    constexpr int W = D / 32, HALF = D / 2, STEP = 8 * W;
    unsigned i = blockIdx.x * ROTARY_BLOCK + threadIdx.x, head = i / W;
    if (head >= heads) return;
    unsigned n = head / (2 * H), h = head % (2 * H), column = i % W * 8;
    unsigned entry = n % T * HALF + column;
    floatX* here = dqk + (size_t)n * ldd + h * D + column;
    const floatX* saved = qk + (size_t)n * ld + h * D + column;
    Pairs8 dy[2], y[2];
    for (int k = 0; k < 2; k++) {
        dy[k] = pairs_load(here + k * STEP, HALF);
        y[k] = pairs_load(saved + k * STEP, HALF);
    }
    float mean = warp_sum<W>(pairs_dot(dy, y)) / D, scale = rstd[head];
    for (int k = 0; k < 2; k++) {
        float8 c = load8(cos + entry + k * STEP), s = load8(sin + entry + k * STEP);
        float8 part;                                   // mean / g; one loop each, so that g++ makes
        for (int j = 0; j < 8; j++) {                  // vector code of them
            part.v[j] = norm_first ? c.v[j] * c.v[j] + s.v[j] * s.v[j] : 1.0f;
        }
        for (int j = 0; j < 8; j++) part.v[j] = mean / part.v[j];
        for (int j = 0; j < 8; j++) {
            dy[k].a.v[j] = scale * (dy[k].a.v[j] - y[k].a.v[j] * part.v[j]);
        }
        for (int j = 0; j < 8; j++) {
            dy[k].b.v[j] = scale * (dy[k].b.v[j] - y[k].b.v[j] * part.v[j]);
        }
        for (int j = 0; j < 8; j++) {
            s.v[j] = -s.v[j];
        }
        Pairs8 dx = pairs_rotate(dy[k], c, s);
        store8(here + k * STEP, dx.a);
        store8(here + k * STEP + HALF, dx.b);
    }
}

// By value: half a head's frequencies.
struct RotaryFrequencies {
    float f[64];
};

// Eight pairs of one position a thread. The angle is rounded to float once, as in the recipes'
// tensors: at t = 262143 one in double would be up to 0.008 from theirs. cosf and sinf, because such
// angles need their reduction.
static __global__ void rotary_tables_kernel(float* cos, float* sin, RotaryFrequencies frequencies,
                                            unsigned entries, unsigned half, bool to_bf16) {
    unsigned i = 8 * (blockIdx.x * ROTARY_BLOCK + threadIdx.x);
    if (i >= entries) return;
    float t = (float)(i / half);
    const float* f = frequencies.f + i % half;
    float8 c, s;
    for (int j = 0; j < 8; j++) {
        float angle = t * f[j];
        c.v[j] = cosf(angle);
        s.v[j] = sinf(angle);
        if (to_bf16) c.v[j] = round_bf16(c.v[j]), s.v[j] = round_bf16(s.v[j]);
    }
    store8(cos + i, c);
    store8(sin + i, s);
}

// ---- tables and launchers ----------------------------------------------------------------------

// frequency: D/2 of them, on the host (schedule_frequencies in llmc/schedule.h)
static inline void rotary_tables(float* cos, float* sin, const float* frequency, int T, int D,
                                 bool round_to_bf16, cudaStream_t stream) {
    REQUIRE(T > 0 && (D == 32 || D == 64 || D == 128),
            "rotary_tables needs positions and a head dim of 32, 64 or 128, got T=%d D=%d", T, D);
    REQUIRE((size_t)T * D < UINT32_MAX, "rotary takes tables of fewer than 2^32 entries, got T=%d",
            T);
    RotaryFrequencies frequencies = {};
    memcpy(frequencies.f, frequency, D / 2 * sizeof(float));
    unsigned half = (unsigned)D / 2, entries = (unsigned)T * half;
    launch<rotary_tables_kernel>(dim3(ceil_div(entries, 8 * ROTARY_BLOCK)), dim3(ROTARY_BLOCK), 0,
                                 stream, cos, sin, frequencies, entries, half, round_to_bf16);
}

static inline unsigned qknorm_rotary_blocks(const void* p, int N, int T, int H, int D, int ld) {
    REQUIRE(T > 0 && N % T == 0, "rotary needs rows in whole sequences of T, got N=%d T=%d", N, T);
    REQUIRE((uintptr_t)p % 16 == 0 && ld % 8 == 0 && ld >= 2 * H * D,
            "rotary needs q and k aligned to 16 bytes, got %p, in rows of a multiple of 8 and at "
            "least 2 H D = %d columns, got %d", p, 2 * H * D, ld);
    size_t threads = (size_t)N * 2 * H * (D / 32);
    REQUIRE(threads < UINT32_MAX - ROTARY_BLOCK && (size_t)T * D < UINT32_MAX,
            "rotary takes fewer than 2^32 threads and tables of 2^32 entries, got N=%d T=%d", N, T);
    return (unsigned)ceil_div(threads, ROTARY_BLOCK);
}

static inline void qknorm_rotary_forward(floatX* qk, float* rstd, const float* cos,
                                         const float* sin, int N, int T, int H, int D, int ld,
                                         float eps, bool norm_first, cudaStream_t stream) {
    dim3 grid(qknorm_rotary_blocks(qk, N, T, H, D, ld)), block(ROTARY_BLOCK);
    unsigned heads = (unsigned)N * 2 * H;
    if (D == 32) {
        launch<qknorm_rotary_forward_kernel<32>>(grid, block, 0, stream, qk, rstd, cos, sin, heads,
                                                 T, H, ld, eps, norm_first);
    } else if (D == 64) {
        launch<qknorm_rotary_forward_kernel<64>>(grid, block, 0, stream, qk, rstd, cos, sin, heads,
                                                 T, H, ld, eps, norm_first);
    } else if (D == 128) {
        launch<qknorm_rotary_forward_kernel<128>>(grid, block, 0, stream, qk, rstd, cos, sin,
                                                  heads, T, H, ld, eps, norm_first);
    } else {
        die("rotary needs a head dim of 32, 64 or 128, got %d", D);
    }
}

static inline void qknorm_rotary_backward(floatX* dqk, const floatX* qk, const float* rstd,
                                          const float* cos, const float* sin, int N, int T, int H,
                                          int D, int ldd, int ld, bool norm_first,
                                          cudaStream_t stream) {
    dim3 grid(qknorm_rotary_blocks(dqk, N, T, H, D, ldd)), block(ROTARY_BLOCK);
    unsigned heads = (unsigned)N * 2 * H;
    if (D == 32) {
        launch<qknorm_rotary_backward_kernel<32>>(grid, block, 0, stream, dqk, qk, rstd, cos, sin,
                                                  heads, T, H, ldd, ld, norm_first);
    } else if (D == 64) {
        launch<qknorm_rotary_backward_kernel<64>>(grid, block, 0, stream, dqk, qk, rstd, cos, sin,
                                                  heads, T, H, ldd, ld, norm_first);
    } else if (D == 128) {
        launch<qknorm_rotary_backward_kernel<128>>(grid, block, 0, stream, dqk, qk, rstd, cos, sin,
                                                   heads, T, H, ldd, ld, norm_first);
    } else {
        die("rotary needs a head dim of 32, 64 or 128, got %d", D);
    }
}
