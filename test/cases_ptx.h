/*
ptx: llmc/ptx.cuh, instruction by instruction, against the tables of the PTX ISA written out here.

All data are whole numbers that bf16 holds (at most 256) and whose sums of products stay below 2^24:
every result is exact in both precisions and any lane or element out of place shows.
*/
#pragma once
#include "../llmc/ptx.cuh"
#include "test.h"

// ---- asynchronous copies -------------------------------------------------------------------

// Every thread copies 16 bytes in each of three groups, zero-filled in the third for odd threads, and
// a float besides in the third, zero-filled for even threads. seen holds, before any wait and after
// each of two, what a word of two of its copies looks like to the thread itself.
static __global__ void ptx_copy_kernel(uint32_t* out, uint32_t* seen, const uint32_t* in) {
    DYN_SMEM(uint32_t, s);
    int i = threadIdx.x, n = blockDim.x;
    cp_async16(s + 4 * i, in + 4 * i);
    cp_async_commit();
    cp_async16(s + 4 * (n + i), in + 4 * (n + i));
    cp_async_commit();
    cp_async16_zfill(s + 4 * (2 * n + i), in + 4 * (2 * n + i), i % 2 == 0);
    cp_async4_zfill(s + 12 * n + i, in + 12 * n + i, i % 2 == 1);
    cp_async_commit();
#ifndef __CUDACC__
    // On a GPU a copy may land early; on the host it must not.
    seen[6 * i] = s[4 * i];
    seen[6 * i + 1] = s[4 * (n + i)];
    cp_async_wait<2>();
    seen[6 * i + 2] = s[4 * i];
    seen[6 * i + 3] = s[4 * (n + i)];
    cp_async_wait<1>();
    seen[6 * i + 4] = s[4 * (n + i) + 3];
    seen[6 * i + 5] = s[4 * (2 * n + i)];
#endif
    cp_async_wait<0>();
    __syncthreads();
    for (int k = 0; k < 13; k++) out[k * n + i] = s[k * n + i];
}

static void test_ptx_copies(void) {
    enum { THREADS = 64, WORDS = 13 * THREADS };
    uint32_t in[WORDS], want[WORDS], got[WORDS], seen[6 * THREADS];
    for (int i = 0; i < WORDS; i++) in[i] = want[i] = 1000 + i;
    for (int i = 0; i < THREADS; i++) {
        for (int k = 0; k < 4 && i % 2 == 1; k++) want[4 * (2 * THREADS + i) + k] = 0;
        if (i % 2 == 0) want[12 * THREADS + i] = 0;
    }
    uint32_t *in_d, *out_d, *seen_d;
    CUDA_CHECK(cudaMalloc((void**)&in_d, sizeof in));
    CUDA_CHECK(cudaMalloc((void**)&out_d, sizeof got));
    CUDA_CHECK(cudaMalloc((void**)&seen_d, sizeof seen));
    CUDA_CHECK(cudaMemcpy(in_d, in, sizeof in, cudaMemcpyHostToDevice));
    launch<ptx_copy_kernel>(dim3(1), dim3(THREADS), sizeof in, 0, out_d, seen_d, in_d);
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaMemcpy(got, out_d, sizeof got, cudaMemcpyDeviceToHost));
    test_same_bits("cp.async, three groups, zero-fill", got, want, sizeof got);
#ifndef __CUDACC__
    uint32_t late[6 * THREADS];
    for (int i = 0; i < THREADS; i++) {
        uint32_t row[6] = {~0u, ~0u, in[4 * i], ~0u, in[4 * (THREADS + i) + 3], ~0u};
        memcpy(late + 6 * i, row, sizeof row);
    }
    CUDA_CHECK(cudaMemcpy(seen, seen_d, sizeof seen, cudaMemcpyDeviceToHost));
    test_same_bits("cp.async, NaN until the wait for its group", seen, late, sizeof seen);
#endif
    cudaFree(in_d), cudaFree(out_d), cudaFree(seen_d);
}

// ---- instructions --------------------------------------------------------------------------

// Four 8x8 matrices in rows 48 bytes apart; element (row, column) of matrix j is
// 64 j + 8 row + column.
static __global__ void ptx_ldmatrix_kernel(uint32_t* out) {
    DYN_SMEM(uint16_t, s);
    int lane = threadIdx.x;
    uint32_t r[4];
    for (int c = 0; c < 8; c++) s[24 * lane + c] = (uint16_t)(8 * lane + c);
    __syncthreads();
    ldmatrix_x4(r, s + 24 * lane);
    for (int j = 0; j < 4; j++) out[8 * lane + j] = r[j];
    ldmatrix_x4_trans(r, s + 24 * lane);
    for (int j = 0; j < 4; j++) out[8 * lane + 4 + j] = r[j];
}

static void test_ptx_ldmatrix(void) {
    uint32_t want[256], got[256], *out;
    for (int L = 0; L < 32; L++) {
        for (int j = 0; j < 4; j++) {
            uint32_t straight = 64 * j + 8 * (L / 4) + L % 4 * 2;    // row L/4, columns 2(L%4), +1
            uint32_t across = 64 * j + 8 * (L % 4 * 2) + L / 4;      // rows 2(L%4), +1, column L/4
            want[8 * L + j] = straight | (straight + 1) << 16;
            want[8 * L + 4 + j] = across | (across + 8) << 16;
        }
    }
    CUDA_CHECK(cudaMalloc((void**)&out, sizeof got));
    launch<ptx_ldmatrix_kernel>(dim3(1), dim3(32), 32 * 48, 0, out);
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaMemcpy(got, out, sizeof got, cudaMemcpyDeviceToHost));
    test_same_bits("ldmatrix.x4, plain and transposed", got, want, sizeof got);
    cudaFree(out);
}

// d (16, 8) += a (16, 16) b (16, 8): every lane packs its own elements, after the table.
static __global__ void ptx_mma_kernel(float* d, const float* a, const float* b) {
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
    uint32_t af[4], bf[2];
    float c[4];
    for (int r = 0; r < 4; r++) {
        const float* x = a + (g + r % 2 * 8) * 16 + 2 * t + r / 2 * 8;
        af[r] = pack_bf16(x[0], x[1]);
    }
    for (int r = 0; r < 2; r++) {
        const float* x = b + (2 * t + 8 * r) * 8 + g;
        bf[r] = pack_bf16(x[0], x[8]);
    }
    for (int i = 0; i < 4; i++) c[i] = d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
    mma_bf16(c, af, bf[0], bf[1]);
    for (int i = 0; i < 4; i++) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i];
}

static void test_ptx_mma(void) {
    double a[256], b[128], d[128];
    for (int i = 0; i < 256; i++) a[i] = i - 100;
    for (int i = 0; i < 128; i++) b[i] = 2 * i - 120, d[i] = 1000 * i;
    float *a_d = test_upload_float(a, 256), *b_d = test_upload_float(b, 128);
    float* d_d = test_upload_float(d, 128);
    launch<ptx_mma_kernel>(dim3(1), dim3(32), 0, 0, d_d, a_d, b_d);
    for (int m = 0; m < 16; m++) {
        for (int n = 0; n < 8; n++) {
            for (int k = 0; k < 16; k++) d[m * 8 + n] += a[m * 16 + k] * b[k * 8 + n];
        }
    }
    test_compare_device_float("mma.m16n8k16", d_d, d, 128, 0, 0);
    cudaFree(a_d), cudaFree(b_d), cudaFree(d_d);
}

static __global__ void ptx_pack_kernel(uint32_t* out, const float* x) {
    out[threadIdx.x] = pack_bf16(x[2 * threadIdx.x], x[2 * threadIdx.x + 1]);
}

// Ties both ways, carries into the exponent, overflow, subnormals, signed zeros, random bits.
static void test_ptx_pack(void) {
    enum { N = 512 };
    double x[2 * N];
    const uint32_t hard[] = {0x3f808000, 0x3f818000, 0x3f808001, 0x3f807fff,
                             0x3fffffff, 0x7f7fffff, 0x00000001, 0x00008000,
                             0x00018000, 0x80000000, 0x7f800000, 0xff800000};
    for (int i = 0; i < 2 * N; i++) {
        uint32_t bits = i < 12 ? hard[i] : (uint32_t)test_random(7, i);
        if ((bits & 0x7fffffff) > 0x7f800000) bits &= 0x7f000000;
        float f;
        memcpy(&f, &bits, 4);
        x[i] = f;
    }
    uint32_t got[N], want[N], *out;
    float* x_d = test_upload_float(x, 2 * N);
    for (int i = 0; i < N; i++) {
        float low = test_round_bf16(x[2 * i]), high = test_round_bf16(x[2 * i + 1]);
        uint32_t l, h;
        memcpy(&l, &low, 4), memcpy(&h, &high, 4);
        want[i] = l >> 16 | h;
    }
    CUDA_CHECK(cudaMalloc((void**)&out, sizeof got));
    launch<ptx_pack_kernel>(dim3(1), dim3(N), 0, 0, out, x_d);
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaMemcpy(got, out, sizeof got, cudaMemcpyDeviceToHost));
    test_same_bits("cvt.rn.bf16x2", got, want, sizeof got);
    cudaFree(x_d), cudaFree(out);
}

// Lane L holds 3 values, 1000 r - (7 L mod 32), which differ within a quad.
static __global__ void ptx_quad_kernel(float* out) {
    float top[3], sum[3];
    for (int r = 0; r < 3; r++) top[r] = sum[r] = 1000.0f * r - 7 * threadIdx.x % 32;
    quad_max(top);
    quad_sum(sum);
    for (int r = 0; r < 3; r++) {
        out[threadIdx.x * 6 + r] = top[r];
        out[threadIdx.x * 6 + 3 + r] = sum[r];
    }
}

static void test_ptx_quads(void) {
    double want[192];
    float* out = test_device_float(192);
    for (int L = 0; L < 32; L++) {
        for (int r = 0; r < 3; r++) {
            double top = -INFINITY, sum = 0;
            for (int K = L / 4 * 4; K < L / 4 * 4 + 4; K++) {
                double x = 1000.0 * r - 7 * K % 32;
                sum += x;
                if (x > top) top = x;
            }
            want[L * 6 + r] = top;
            want[L * 6 + 3 + r] = sum;
        }
    }
    launch<ptx_quad_kernel>(dim3(1), dim3(32), 0, 0, out);
    test_compare_device_float("quad_max, quad_sum", out, want, 192, 0, 0);
    cudaFree(out);
}

// ---- products ------------------------------------------------------------------------------

// c (16 MT, 8 NT) = a (16 MT, 16 KT) bᵀ, then d += p e with e (8 NT, 8 OT) and a p made from the
// layout of the accumulators. Two warps each have their own copy of the tiles.
template <int MT, int NT, int KT, int OT, int LD>
static __global__ void ptx_product_kernel(float* c, float* d, const floatX* a, const floatX* b,
                                          const floatX* e) {
    DYN_SMEM(floatX, smem);
    constexpr int ROWS = 16 * MT + 8 * NT + 8 * NT;
    int lane = threadIdx.x % 32, warp = warp_index(), g = lane / 4, t = lane % 4;
    floatX *a_s = smem + warp * ROWS * LD, *b_s = a_s + 16 * MT * LD, *e_s = b_s + 8 * NT * LD;
    constexpr int K = 16 * KT, O = 8 * OT;
    for (int i = lane; i < 16 * MT * K; i += 32) a_s[i / K * LD + i % K] = a[i];
    for (int i = lane; i < 8 * NT * K; i += 32) b_s[i / K * LD + i % K] = b[i];
    for (int i = lane; i < 8 * NT * O; i += 32) e_s[i / O * LD + i % O] = e[i];
    __syncthreads();
    float x[MT][NT][4], y[MT][OT][4];
    mma_abt<MT, NT, KT, LD>(x, a_s, b_s);
    for (int m = 0; m < MT; m++) {
        for (int n = 0; n < NT; n++) {
            for (int i = 0; i < 4; i++) {
                int row = 16 * m + g + i / 2 * 8, column = 8 * n + 2 * t + i % 2;
                c[(warp * 16 * MT + row) * 8 * NT + column] = x[m][n][i];
                x[m][n][i] = (row * 5 + column) % 64 - 20;
            }
        }
        for (int n = 0; n < OT; n++) {
            for (int i = 0; i < 4; i++)
                y[m][n][i] = 1000 * (16 * m + g + i / 2 * 8) + 8 * n + 2 * t + i % 2;
        }
    }
    mma_ab<MT, OT, NT / 2, LD>(y, x, e_s);
    for (int m = 0; m < MT; m++) {
        for (int n = 0; n < OT; n++) {
            for (int i = 0; i < 4; i++) {
                int row = 16 * m + g + i / 2 * 8, column = 8 * n + 2 * t + i % 2;
                d[(warp * 16 * MT + row) * 8 * OT + column] = y[m][n][i];
            }
        }
    }
}

template <int MT, int NT, int KT, int OT, int LD>
static void test_ptx_product(void) {
    enum { M = 16 * MT, N = 8 * NT, K = 16 * KT, O = 8 * OT };
    double *a = test_doubles(M * K), *b = test_doubles(N * K), *e = test_doubles(N * O);
    double *c = test_doubles(2 * M * N), *d = test_doubles(2 * M * O);
    test_fill_whole(a, M * K, 1, -128, 128);
    test_fill_whole(b, N * K, 2, -128, 128);
    test_fill_whole(e, N * O, 3, -128, 128);
    for (int m = 0; m < 2 * M; m++) {
        for (int n = 0; n < N; n++) {
            for (int k = 0; k < K; k++) c[m * N + n] += a[m % M * K + k] * b[n * K + k];
        }
        for (int o = 0; o < O; o++) {
            d[m * O + o] = 1000 * (m % M) + o;
            for (int n = 0; n < N; n++) d[m * O + o] += ((m % M * 5 + n) % 64 - 20) * e[n * O + o];
        }
    }
    floatX *a_d = test_upload(a, M * K), *b_d = test_upload(b, N * K), *e_d = test_upload(e, N * O);
    float *c_d = test_device_float(2 * M * N), *d_d = test_device_float(2 * M * O);
    launch<ptx_product_kernel<MT, NT, KT, OT, LD>>(
        dim3(1), dim3(64), 2 * (M + 2 * N) * LD * sizeof(floatX), 0, c_d, d_d, a_d, b_d, e_d);
    char what[96];
    snprintf(what, sizeof what, "mma_abt %dx%dx%d in rows of %d", M, N, K, LD);
    test_compare_device_float(what, c_d, c, 2 * M * N, 0, 0);
    snprintf(what, sizeof what, "mma_ab %dx%dx%d in rows of %d", M, O, N, LD);
    test_compare_device_float(what, d_d, d, 2 * M * O, 0, 0);
    free(a), free(b), free(c), free(d), free(e);
    cudaFree(a_d), cudaFree(b_d), cudaFree(c_d), cudaFree(d_d), cudaFree(e_d);
}

static void test_ptx(void) {
    test_ptx_copies();
    test_ptx_ldmatrix();
    test_ptx_mma();
    test_ptx_pack();
    test_ptx_quads();
    test_ptx_product<1, 2, 1, 2, 24>();
    test_ptx_product<2, 8, 4, 8, 72>();
    test_ptx_product<2, 4, 8, 16, 136>();
    test_ptx_product<1, 8, 8, 16, 136>();
    test_ptx_product<2, 8, 2, 4, 72>();
}
