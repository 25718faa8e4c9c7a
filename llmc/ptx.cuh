/*
The PTX of the trainer: one instruction, one function; and the tile products made of them.

Each function has two bodies: inline PTX under nvcc, and under g++ an emulation with the same lane
layouts (host/tensorcore.h). Kernels that are built from these run thread for thread on both.

    cp_async16          cp.async.cg.shared.global 16         to shared memory, while we compute
    cp_async16_zfill    the same, zeros where !valid         rows beyond the end
    cp_async4_zfill     cp.async.ca.shared.global 4          single floats
    cp_async_commit     cp.async.commit_group                closes a group of copies
    cp_async_wait<N>    cp.async.wait_group N                all but the last N groups have landed
    ldmatrix_x4         ldmatrix.m8n8.x4.shared.b16          four 8x8 matrices of 16-bit elements
    ldmatrix_x4_trans   ldmatrix.m8n8.x4.trans.shared.b16    the same, each transposed
    mma_bf16            mma.m16n8k16.row.col.f32.bf16.bf16   d += a b
    pack_bf16           cvt.rn.bf16x2.f32                    two floats to one register
    max_fast            max.f32                              drops NaN: see there

A copy is visible to its own thread after the wait and to the block after the barrier that follows.
A thread must not end with copies on their way.

Fragments. Lane L holds, with g = L/4 and t = L%4 (PTX ISA, "Matrix fragments for mma.m16n8k16"):
    A 16x16   a[r], low half first   row g + 8 (r%2)      columns 2t, 2t+1 (+ 8 for r >= 2)
    B 16x8    b[r], low half first   rows 2t, 2t+1 (+8r)  column g
    C 16x8    c[i]                   row g + 8 (i/2)      column 2t + i%2
A row of C thus belongs to the four lanes of a quad, and the accumulators of two neighbouring C
tiles hold what an A fragment holds: that is how a product feeds the next one without moving.

Products work on a warp's accumulators c[MT][NT][4], MT x NT tiles of 16x8, and on tiles of floatX
in shared memory with LD elements from row to row. LD times the size of floatX must be an odd
multiple of 16 bytes, so that the eight rows of an ldmatrix fall on eight different bank groups.
    mma_abt   C  = A Bᵀ   A (16 MT, 16 KT) and B (8 NT, 16 KT) in shared memory
    mma_ab    C += P B    P (16 MT, 16 KT) in accumulators, rounded to floatX; B (16 KT, 8 NT) in
                          shared memory
In the fp32 build there is no such tensor-core instruction: the same products are made of float
multiplications in the same layout, to prove the maths of a kernel to 1e-5, not to be fast on a GPU.

test    test/cases_ptx.h
source  PTX ISA 9.0: cp.async, ldmatrix, mma, cvt
*/
#pragma once
#include <stdint.h>
#include "device.cuh"
#ifndef __CUDACC__
#include "host/tensorcore.h"
#endif

// ---- asynchronous copies -------------------------------------------------------------------

static __device__ inline void cp_async16_zfill(void* dst, const void* src, bool valid) {
#ifdef __CUDACC__
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                     (uint32_t)__cvta_generic_to_shared(dst)),
                 "l"(src), "r"(valid ? 16 : 0)
                 : "memory");
#else
    host_cp_async(dst, src, 16, valid);
#endif
}

static __device__ inline void cp_async16(void* dst, const void* src) {
#ifdef __CUDACC__
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                     (uint32_t)__cvta_generic_to_shared(dst)),
                 "l"(src)
                 : "memory");
#else
    host_cp_async(dst, src, 16, true);
#endif
}

static __device__ inline void cp_async4_zfill(void* dst, const void* src, bool valid) {
#ifdef __CUDACC__
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(
                     (uint32_t)__cvta_generic_to_shared(dst)),
                 "l"(src), "r"(valid ? 4 : 0)
                 : "memory");
#else
    host_cp_async(dst, src, 4, valid);
#endif
}

static __device__ inline void cp_async_commit(void) {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    host_cp_async_commit();
#endif
}

template <int N>
static __device__ inline void cp_async_wait(void) {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#else
    host_cp_async_wait(N);
#endif
}

// ---- tensor-core instructions --------------------------------------------------------------

// Lane 8j + r gives the address of row r of matrix j. Lane L receives in r[j] the elements 2t and
// 2t+1 of row g of matrix j.
static __device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row))
                 : "memory");
#else
    host_ldmatrix_x4(r, row, false);
#endif
}

// The same with rows and columns of each matrix exchanged: elements (2t, g) and (2t+1, g).
static __device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row))
                 : "memory");
#else
    host_ldmatrix_x4(r, row, true);
#endif
}

static __device__ inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                       uint32_t b1) {
#ifdef __CUDACC__
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    host_mma_bf16(d, a, b0, b1);
#endif
}

static __device__ inline uint32_t pack_bf16(float low, float high) {
#ifdef __CUDACC__
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
#else
    return host_pack_bf16(low, high);
#endif
}

// One instruction, but max_fast(x, NaN) is x: only for a shift that cancels, as in a softmax, where
// the NaN comes through the exponentials. Elsewhere use warp_max and block_max, which keep it.
static __device__ inline float max_fast(float a, float b) {
#ifdef __CUDACC__
    float m;
    asm("max.f32 %0, %1, %2;" : "=f"(m) : "f"(a), "f"(b));
    return m;
#else
    return a > b ? a : b;
#endif
}

// The number of the warp in its block, which the compiler then knows to be equal in all lanes: what
// depends on it alone is computed once per warp, and branches on it do not diverge.
static __device__ inline int warp_index(void) {
#ifdef __CUDACC__
    return __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0);
#else
    return (int)threadIdx.x / 32;
#endif
}

// ---- quads ---------------------------------------------------------------------------------

// Each v[i] becomes its maximum (NaN dropped) or sum over the four lanes that share a row of C.
template <int R>
static __device__ inline void quad_max(float (&v)[R]) {
#ifdef __CUDACC__
#pragma unroll
    for (int i = 0; i < R; i++) {
        v[i] = max_fast(v[i], __shfl_xor_sync(0xffffffffu, v[i], 2));
        v[i] = max_fast(v[i], __shfl_xor_sync(0xffffffffu, v[i], 1));
    }
#else
    host_warp_collective(0xffffffffu, host_quad_max<R>, v, "quad_max");
#endif
}

template <int R>
static __device__ inline void quad_sum(float (&v)[R]) {
#ifdef __CUDACC__
#pragma unroll
    for (int i = 0; i < R; i++) {
        v[i] += __shfl_xor_sync(0xffffffffu, v[i], 2);
        v[i] += __shfl_xor_sync(0xffffffffu, v[i], 1);
    }
#else
    host_warp_collective(0xffffffffu, host_quad_sum<R>, v, "quad_sum");
#endif
}

// ---- products ------------------------------------------------------------------------------

// Two neighbouring elements; p is aligned to both together.
static __device__ inline void store2(floatX* p, float a, float b) {
#ifdef PRECISION_BF16
    *(uint32_t*)p = pack_bf16(a, b);
#else
    p[0] = a;
    p[1] = b;
#endif
}

#ifdef PRECISION_BF16

template <int MT, int NT, int KT, int LD>
static __device__ inline void mma_abt(float (&c)[MT][NT][4], const bf16* a, const bf16* b) {
    static_assert(NT % 2 == 0 && LD % 16 == 8, "pairs of B tiles, odd pitch in 16-byte units");
    int lane = threadIdx.x % 32;
    a += (lane % 16) * LD + lane / 16 * 8;
    b += (lane % 8 + lane / 16 * 8) * LD + lane / 8 % 2 * 8;
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int n = 0; n < NT; n++) c[m][n][0] = c[m][n][1] = c[m][n][2] = c[m][n][3] = 0;
    }
#pragma unroll 2
    for (int k = 0; k < KT; k++) {
        uint32_t af[MT][4], bf[4];
#pragma unroll
        for (int m = 0; m < MT; m++) ldmatrix_x4(af[m], a + m * 16 * LD + k * 16);
#pragma unroll
        for (int n = 0; n < NT; n += 2) {
            ldmatrix_x4(bf, b + n * 8 * LD + k * 16);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma_bf16(c[m][n], af[m], bf[0], bf[1]);
                mma_bf16(c[m][n + 1], af[m], bf[2], bf[3]);
            }
        }
    }
}

template <int MT, int NT, int KT, int LD>
static __device__ inline void mma_ab(float (&c)[MT][NT][4], const float (&p)[MT][2 * KT][4],
                                     const bf16* b) {
    static_assert(NT % 2 == 0 && LD % 16 == 8, "pairs of B tiles, odd pitch in 16-byte units");
    int lane = threadIdx.x % 32;
    b += (lane % 16) * LD + lane / 16 * 8;
    uint32_t af[KT][MT][4], bf[4];
#pragma unroll
    for (int k = 0; k < KT; k++) {
#pragma unroll
        for (int m = 0; m < MT; m++) {
            const float *left = p[m][2 * k], *right = p[m][2 * k + 1];
            af[k][m][0] = pack_bf16(left[0], left[1]);
            af[k][m][1] = pack_bf16(left[2], left[3]);
            af[k][m][2] = pack_bf16(right[0], right[1]);
            af[k][m][3] = pack_bf16(right[2], right[3]);
        }
    }
#pragma unroll
    for (int k = 0; k < KT; k++) {
#pragma unroll
        for (int n = 0; n < NT; n += 2) {
            ldmatrix_x4_trans(bf, b + k * 16 * LD + n * 8);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma_bf16(c[m][n], af[k][m], bf[0], bf[1]);
                mma_bf16(c[m][n + 1], af[k][m], bf[2], bf[3]);
            }
        }
    }
}

#elif defined(__CUDACC__)

template <int MT, int NT, int KT, int LD>
static __device__ inline void mma_abt(float (&c)[MT][NT][4], const float* a, const float* b) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float* x = a + (m * 16 + g + i / 2 * 8) * LD;
                const float* y = b + (n * 8 + 2 * t + i % 2) * LD;
                float sum = 0;
#pragma unroll 4
                for (int k = 0; k < 16 * KT; k++) sum += x[k] * y[k];
                c[m][n][i] = sum;
            }
        }
    }
}

template <int MT, int NT, int KT, int LD>
static __device__ inline void mma_ab(float (&c)[MT][NT][4], const float (&p)[MT][2 * KT][4],
                                     const float* b) {
    int lane = threadIdx.x % 32, quad = lane & ~3;
    b += lane % 4 * 2;
#pragma unroll
    for (int k = 0; k < 16 * KT; k++) {
#pragma unroll
        for (int m = 0; m < MT; m++) {
            float upper = __shfl_sync(0xffffffffu, p[m][k / 8][k % 2], quad + k % 8 / 2);
            float lower = __shfl_sync(0xffffffffu, p[m][k / 8][k % 2 + 2], quad + k % 8 / 2);
#pragma unroll
            for (int n = 0; n < NT; n++) {
                c[m][n][0] += upper * b[k * LD + n * 8];
                c[m][n][1] += upper * b[k * LD + n * 8 + 1];
                c[m][n][2] += lower * b[k * LD + n * 8];
                c[m][n][3] += lower * b[k * LD + n * 8 + 1];
            }
        }
    }
}

#else

template <int MT, int NT, int KT, int LD>
static inline void mma_abt(float (&c)[MT][NT][4], const float* a, const float* b) {
    HostProduct product = {&c[0][0][0], NULL, a, b};
    host_tile_touch(a, 16 * MT, 16 * KT, LD);
    host_tile_touch(b, 8 * NT, 16 * KT, LD);
    host_warp_collective(0xffffffffu, host_mma_abt<MT, NT, KT, LD>, &product, "mma_abt");
}

template <int MT, int NT, int KT, int LD>
static inline void mma_ab(float (&c)[MT][NT][4], const float (&p)[MT][2 * KT][4], const float* b) {
    HostProduct product = {&c[0][0][0], &p[0][0][0], NULL, b};
    host_tile_touch(b, 16 * KT, 8 * NT, LD);
    host_warp_collective(0xffffffffu, host_mma_ab<MT, NT, KT, LD>, &product, "mma_ab");
}

#endif
