/*
Mixing two tensors with learned scalars: value embeddings, residual lambdas, skips, backout.

    y  = a x + b z
    dx = a dy           dz += b dy

    mode        a         b       ds
    MIX_PAIR    s[0]      s[1]    ds[0] += Σ dy x,  ds[1] += Σ dy z
    MIX_SKIP    1         s[0]    ds[0] += Σ dy z
    MIX_LERP    1 - s[0]  s[0]    ds[0] += Σ dy (z - x)
    MIX_GATE    1         σ(s[0]) ds[0] += σ(s[0]) (1 - σ(s[0])) Σ dy z
    MIX_MINUS   1         -s[0]   ds[0] -= Σ dy z

x y z dx dy dz  N rows of C columns of floatX; rows lie ld.. elements apart, so that a tensor may be
                a slice of a wider one (q k v). C and every ld a multiple of 8, pointers aligned to
                16 bytes. One rounding: a x + b z is made in fp32.
s ds            1 or 2 fp32 scalars on the device. ds accumulates over layers and micro-steps.
saved           x and z. Backward takes NULL for dx, dz or ds that is not wanted; without ds it
                reads neither x nor z, and where a is 1 it never reads x.
one tensor      MIX_PAIR with z NULL: y = s[0] x; ds[1] stays as it is, dz has to be NULL
in place        y may alias x or z, dx may alias dy (with equal row strides)
cost            bf16, bytes per element: forward 6; backward 12 with everything; bound by memory
test            test/cases_mix.h

The scalars' gradients are sums over N*C products: each warp writes its part to `scratch`, and one
more block adds the parts, each thread in index order and then block_sum. No atomics: the bits
depend on N and C alone. A thread takes MIX_CHUNKS chunks of 8 columns, so that the warp's reduction
is cheap beside the loads and the parts are few: one per 2,048 products.
*/
#pragma once
#include <limits.h>
#include "device.cuh"

enum MixMode { MIX_PAIR, MIX_SKIP, MIX_LERP, MIX_GATE, MIX_MINUS };

constexpr int MIX_BLOCK = 256;
constexpr int MIX_CHUNKS = 8;      // per thread, in the backward kernel

template <MixMode MODE>
static __device__ inline float mix_a(const float* s) {
    return MODE == MIX_PAIR ? s[0] : MODE == MIX_LERP ? 1.0f - s[0] : 1.0f;
}

template <MixMode MODE>
static __device__ inline float mix_b(const float* s) {
    if (MODE == MIX_PAIR) return s[1];
    if (MODE == MIX_GATE) return 1.0f / (1.0f + fast_exp(-s[0]));
    return MODE == MIX_MINUS ? -s[0] : s[0];
}

// What Σ dy z is to be multiplied with in ds[0].
template <MixMode MODE>
static __device__ inline float mix_slope(const float* s) {
    if (MODE == MIX_GATE) {
        float gate = mix_b<MODE>(s);
        return gate * (1.0f - gate);
    }
    return MODE == MIX_MINUS ? -1.0f : 1.0f;
}

// ---- kernels -----------------------------------------------------------------------------------

template <MixMode MODE>
static __global__ void mix_forward_kernel(floatX* y, const floatX* x, const floatX* z,
                                          const float* s, int N, int C, int ldy, int ldx,
                                          int ldz) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    unsigned chunks = C / 8, n = i / chunks, c = 8 * (i % chunks);
    if (n >= (unsigned)N) return;
    float a = mix_a<MODE>(s);
    float8 v = load8(x + (size_t)n * ldx + c);
    if (z) {
        float b = mix_b<MODE>(s);
        float8 w = load8(z + (size_t)n * ldz + c);
        for (int j = 0; j < 8; j++) v.v[j] = a * v.v[j] + b * w.v[j];
    } else {
        for (int j = 0; j < 8; j++) v.v[j] *= a;
    }
    store8(y + (size_t)n * ldy + c, v);
}

// parts NULL: no gradient of the scalars. Else each warp's sum goes to parts[warp of the grid], and
// the second of a pair behind all of these.
template <MixMode MODE>
static __global__ void mix_backward_kernel(floatX* dx, floatX* dz, float* parts, const floatX* dy,
                                           const floatX* x, const floatX* z, const float* s, int N,
                                           int C, int lddx, int lddz, int lddy, int ldx, int ldz) {
    unsigned chunks = C / 8;
    constexpr bool KEEPS_X = MODE != MIX_PAIR && MODE != MIX_LERP;
    float a = mix_a<MODE>(s), b = dz ? mix_b<MODE>(s) : 0.0f;
    float8 sum0 = {}, sum1 = {};
    for (int k = 0; k < MIX_CHUNKS; k++) {
        unsigned i = (blockIdx.x * MIX_CHUNKS + k) * MIX_BLOCK + threadIdx.x;
        unsigned n = i / chunks, c = 8 * (i % chunks);
        if (n >= (unsigned)N) break;
        float8 g = load8(dy + (size_t)n * lddy + c);
        if (parts) {
            float8 u = {}, w = {};
            if (!KEEPS_X) u = load8(x + (size_t)n * ldx + c);
            if (z) w = load8(z + (size_t)n * ldz + c);
            for (int j = 0; j < 8; j++) {
                if (MODE == MIX_PAIR) {
                    sum0.v[j] += g.v[j] * u.v[j];
                    sum1.v[j] += g.v[j] * w.v[j];
                } else {
                    sum0.v[j] += g.v[j] * (KEEPS_X ? w.v[j] : w.v[j] - u.v[j]);
                }
            }
        }
        if (dz) {
            float8 d = load8(dz + (size_t)n * lddz + c);
            for (int j = 0; j < 8; j++) d.v[j] += b * g.v[j];
            store8(dz + (size_t)n * lddz + c, d);
        }
        if (dx) {
            for (int j = 0; j < 8; j++) g.v[j] *= a;
            store8(dx + (size_t)n * lddx + c, g);
        }
    }
    if (!parts) return;
    float total0 = 0.0f, total1 = 0.0f;
    for (int j = 0; j < 8; j++) {
        total0 += sum0.v[j];
        total1 += sum1.v[j];
    }
    int warps = MIX_BLOCK / WARP, warp = blockIdx.x * warps + threadIdx.x / WARP;
    total0 = mix_slope<MODE>(s) * warp_sum<WARP>(total0);
    if (threadIdx.x % WARP == 0) parts[warp] = total0;
    if (MODE != MIX_PAIR) return;
    total1 = warp_sum<WARP>(total1);
    if (threadIdx.x % WARP == 0) parts[gridDim.x * warps + warp] = total1;
}

// Block k: ds[k] += the sum of its n parts.
static __global__ void mix_scalars_kernel(float* ds, const float* parts, int n) {
    DYN_SMEM(float, scratch);
    float total = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) total += parts[(size_t)blockIdx.x * n + i];
    total = block_sum(total, scratch);
    if (threadIdx.x == 0) ds[blockIdx.x] += total;
}

// ---- launchers ---------------------------------------------------------------------------------

// Blocks of the backward kernel, a function of the sizes alone.
static inline size_t mix_blocks(int N, int C) {
    return ceil_div((size_t)N * (C / 8), MIX_BLOCK * MIX_CHUNKS);
}

static inline size_t mix_scratch_floats(int N, int C) {
    return 2 * mix_blocks(N, C) * (MIX_BLOCK / WARP);
}

// ds[k] += the sum of parts[k n ..], n of them, for k < count.
static inline void mix_scalars(float* ds, const float* parts, int count, int n,
                               cudaStream_t stream) {
    int threads = n < MIX_BLOCK ? WARP * (int)ceil_div(n, WARP) : MIX_BLOCK;
    launch<mix_scalars_kernel>(dim3(count), dim3(threads), 32 * sizeof(float), stream, ds, parts,
                               n);
}

static inline void mix_check(int N, int C, int ld_or) {
    REQUIRE(N > 0 && C > 0 && C % 8 == 0 && ld_or % 8 == 0,
            "mix needs rows, and C and every row stride to be multiples of 8; got N=%d C=%d", N, C);
    REQUIRE((size_t)N * (C / 8) < (size_t)UINT_MAX - MIX_BLOCK * MIX_CHUNKS,
            "mix takes fewer than 2^35 values, got %d x %d", N, C);
}

template <MixMode MODE>
static inline void mix_forward_mode(floatX* y, const floatX* x, const floatX* z, const float* s,
                                    int N, int C, int ldy, int ldx, int ldz, cudaStream_t stream) {
    dim3 block(MIX_BLOCK), grid(ceil_div((size_t)N * (C / 8), MIX_BLOCK));
    launch<mix_forward_kernel<MODE>>(grid, block, 0, stream, y, x, z, s, N, C, ldy, ldx, ldz);
}

static inline void mix_forward(floatX* y, const floatX* x, const floatX* z, const float* s,
                               MixMode mode, int N, int C, int ldy, int ldx, int ldz,
                               cudaStream_t stream) {
    mix_check(N, C, ldy | ldx | (z ? ldz : 0));
    REQUIRE(z || mode == MIX_PAIR, "mix_forward: only MIX_PAIR works without a second tensor");
    switch (mode) {
        case MIX_PAIR: mix_forward_mode<MIX_PAIR>(y, x, z, s, N, C, ldy, ldx, ldz, stream); break;
        case MIX_SKIP: mix_forward_mode<MIX_SKIP>(y, x, z, s, N, C, ldy, ldx, ldz, stream); break;
        case MIX_LERP: mix_forward_mode<MIX_LERP>(y, x, z, s, N, C, ldy, ldx, ldz, stream); break;
        case MIX_GATE: mix_forward_mode<MIX_GATE>(y, x, z, s, N, C, ldy, ldx, ldz, stream); break;
        case MIX_MINUS: mix_forward_mode<MIX_MINUS>(y, x, z, s, N, C, ldy, ldx, ldz, stream); break;
    }
}

template <MixMode MODE>
static inline void mix_backward_mode(floatX* dx, floatX* dz, float* parts, const floatX* dy,
                                     const floatX* x, const floatX* z, const float* s, int N, int C,
                                     int lddx, int lddz, int lddy, int ldx, int ldz,
                                     cudaStream_t stream) {
    launch<mix_backward_kernel<MODE>>(dim3(mix_blocks(N, C)), dim3(MIX_BLOCK), 0, stream, dx, dz,
                                      parts, dy, x, z, s, N, C, lddx, lddz, lddy, ldx, ldz);
}

// scratch: mix_scratch_floats(N, C) floats on the device; may be NULL without ds
static inline void mix_backward(floatX* dx, floatX* dz, float* ds, const floatX* dy,
                                const floatX* x, const floatX* z, const float* s, MixMode mode,
                                int N, int C, int lddx, int lddz, int lddy, int ldx, int ldz,
                                float* scratch, cudaStream_t stream) {
    mix_check(N, C, lddy | (dx ? lddx : 0) | (dz ? lddz : 0) | (ds ? ldx | ldz : 0));
    REQUIRE(!ds || z || mode == MIX_PAIR,
            "mix_backward: only MIX_PAIR has a gradient without a second tensor");
    REQUIRE(!ds || x || (mode != MIX_PAIR && mode != MIX_LERP),
            "mix_backward: the gradient of the scalars needs x");
    REQUIRE(!ds || scratch, "mix_backward: the gradient of the scalars needs scratch");
    float* parts = ds ? scratch : NULL;
    switch (mode) {
        case MIX_PAIR:
            mix_backward_mode<MIX_PAIR>(dx, dz, parts, dy, x, z, s, N, C, lddx, lddz, lddy, ldx,
                                        ldz, stream);
            break;
        case MIX_SKIP:
            mix_backward_mode<MIX_SKIP>(dx, dz, parts, dy, x, z, s, N, C, lddx, lddz, lddy, ldx,
                                        ldz, stream);
            break;
        case MIX_LERP:
            mix_backward_mode<MIX_LERP>(dx, dz, parts, dy, x, z, s, N, C, lddx, lddz, lddy, ldx,
                                        ldz, stream);
            break;
        case MIX_GATE:
            mix_backward_mode<MIX_GATE>(dx, dz, parts, dy, x, z, s, N, C, lddx, lddz, lddy, ldx,
                                        ldz, stream);
            break;
        case MIX_MINUS:
            mix_backward_mode<MIX_MINUS>(dx, dz, parts, dy, x, z, s, N, C, lddx, lddz, lddy, ldx,
                                         ldz, stream);
            break;
    }
    if (!ds) return;
    mix_scalars(ds, parts, mode == MIX_PAIR ? 2 : 1, (int)mix_blocks(N, C) * (MIX_BLOCK / WARP),
                stream);
}
