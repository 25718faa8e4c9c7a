/*
The host bodies of llmc/ptx.cuh: cp.async, ldmatrix and mma for CUDA threads on a CPU.

Asynchronous copies take effect as late as the rules allow: at issue the destination is filled with
0xFF (a NaN as float and as bf16), and the data land at the wait. So a missing wait is a wrong
result, and a copy that nobody waits for is an error when its thread ends. The source, too, is read
at the wait; HOST_ASYNC=early reads it at issue, which is as legal, and a kernel must give equal
results either way.

Warp instructions are collectives: the lanes hand over their registers, the last to arrive executes
the instruction for all 32 and writes their results. Every lane itself reads the shared memory that
the instruction reads on its behalf, so that a race detector blames the right CUDA thread.

Addresses are checked: alignment, and that they lie within the block's dynamic shared memory.

In the fp32 build whole tile products are collectives (there is no instruction to be faithful to).
They transpose A once, and hold a column of C per vector: the layouts of both products are then the
same, and B is read where it lies, one broadcast per element.
*/
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include "engine.h"

static inline void host_check_shared(const void* p, size_t bytes, size_t align, const char* what) {
    uintptr_t at = (uintptr_t)p, base = (uintptr_t)host_block.dynamic;
    if (at % align) host_error("%s: shared address %p is not a multiple of %zu", what, p, align);
    if (at < base || at + bytes > base + host_block.dynamic_bytes) {
        host_error("%s: offset %lld is outside the %zu bytes of dynamic shared memory", what,
                   (long long)(at - base), host_block.dynamic_bytes);
    }
}

// ---- asynchronous copies -------------------------------------------------------------------

struct HostCopy {
    void* dst;
    const void* src;            // null: zeros
    unsigned bytes, group;
    unsigned char early[16];
};

// The copies of one CUDA thread, oldest first. It exists only while one is on its way: groups
// without copies before it can be forgotten, they would complete before any of them.
struct HostAsync {
    HostAsync* next;            // in the pool
    unsigned first, count, capacity;
    unsigned groups;            // committed so far
    HostCopy* copies;
};

// Queues that were emptied, for the next thread that needs one. Under a race detector they are
// not reused: the threads that share one would seem to race.
struct HostAsyncPool {
    HostAsync* free;
    ~HostAsyncPool() {
        while (free) {
            HostAsync* q = free;
            free = q->next;
            ::free(q->copies);
            ::free(q);
        }
    }
};
static thread_local HostAsyncPool host_async_pool;

static inline HostAsync* host_async_open(void) {
    HostAsync* q = host_async_pool.free;
    if (q) {
        host_async_pool.free = q->next;
    } else {
        q = (HostAsync*)calloc(1, sizeof(HostAsync));
        q->capacity = 64;
        q->copies = (HostCopy*)malloc(q->capacity * sizeof(HostCopy));
    }
    q->first = q->count = q->groups = 0;
    host_thread_async() = q;
    return q;
}

static inline void host_async_close(HostAsync* q) {
    host_thread_async() = NULL;
#ifdef HOST_TSAN
    free(q->copies);
    free(q);
#else
    q->next = host_async_pool.free;
    host_async_pool.free = q;
#endif
}

static inline bool host_async_early(void) {
    static const bool early = getenv("HOST_ASYNC") && !strcmp(getenv("HOST_ASYNC"), "early");
    return early;
}

static inline void host_cp_async(void* dst, const void* src, unsigned bytes, bool valid) {
    host_check_shared(dst, bytes, bytes, "cp.async");
    if ((uintptr_t)src % bytes) {
        host_error("cp.async: global address %p is not a multiple of %u", src, bytes);
    }
    HostAsync* q = (HostAsync*)host_thread_async();
    if (!q) q = host_async_open();
    if (q->count == q->capacity) {
        q->capacity *= 2;
        q->copies = (HostCopy*)realloc(q->copies, q->capacity * sizeof(HostCopy));
    }
    HostCopy* copy = &q->copies[q->count++];
    copy->dst = dst;
    copy->src = valid ? src : NULL;
    copy->bytes = bytes;
    copy->group = q->groups;
    if (valid && host_async_early()) memcpy(copy->early, src, bytes);
    if (bytes == 16) {
        memset(dst, 0xff, 16);
    } else {
        memset(dst, 0xff, 4);
    }
}

static inline void host_cp_async_commit(void) {
    HostAsync* q = (HostAsync*)host_thread_async();
    if (q) q->groups++;
}

static inline void host_cp_async_wait(unsigned pending) {
    HostAsync* q = (HostAsync*)host_thread_async();
    if (!q) return;
    bool early = host_async_early();
    static const unsigned char zeros[16] = {};
    for (; q->first < q->count && q->copies[q->first].group + pending < q->groups; q->first++) {
        HostCopy* copy = &q->copies[q->first];
        const void* src = !copy->src ? zeros : early ? copy->early : copy->src;
        if (copy->bytes == 16) {
            memcpy(copy->dst, src, 16);
        } else {
            memcpy(copy->dst, src, 4);
        }
    }
    if (q->first == q->count) host_async_close(q);
}

// ---- tensor-core instructions --------------------------------------------------------------

static inline uint32_t host_pack_bf16(float low, float high) {
    uint16_t h[2];
    __nv_bfloat16 x[2] = {__float2bfloat16_rn(low), __float2bfloat16_rn(high)};
    memcpy(h, x, 4);
    return h[0] | (uint32_t)h[1] << 16;
}

struct HostLdmatrix {
    uint32_t* r;
    uint16_t row[8];
};

template <bool TRANS>
HOST_NOSAN static void host_ldmatrix(void** slots, unsigned) {
    HostLdmatrix** lane = (HostLdmatrix**)slots;
    for (int L = 0; L < 32; L++) {
        for (int j = 0; j < 4; j++) {
            int g = L / 4, t = L % 4;
            uint16_t low = TRANS ? lane[8 * j + 2 * t]->row[g] : lane[8 * j + g]->row[2 * t];
            uint16_t high =
                TRANS ? lane[8 * j + 2 * t + 1]->row[g] : lane[8 * j + g]->row[2 * t + 1];
            lane[L]->r[j] = low | (uint32_t)high << 16;
        }
    }
}

static inline void host_ldmatrix_x4(uint32_t (&r)[4], const void* row, bool trans) {
    HostLdmatrix x;
    host_check_shared(row, 16, 16, "ldmatrix");
    x.r = r;
    memcpy(x.row, row, 16);
    host_warp_collective(0xffffffffu, trans ? host_ldmatrix<true> : host_ldmatrix<false>, &x,
                         trans ? "ldmatrix.x4.trans" : "ldmatrix.x4");
}

struct HostMma {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
};

typedef uint32_t host_v8u __attribute__((vector_size(32), may_alias));
typedef float host_v8 __attribute__((vector_size(32), may_alias));

// A and B as words of two elements that follow each other in k.
HOST_NOSAN static inline void host_mma(void** slots, unsigned) {
    HostMma** lane = (HostMma**)slots;
    alignas(32) uint32_t A[16][8], B[8][8];
    alignas(32) float C[16][8];
    for (int L = 0; L < 32; L++) {
        const HostMma* x = lane[L];
        int g = L / 4, t = L % 4;
        A[g][t] = x->a[0];
        A[g + 8][t] = x->a[1];
        A[g][t + 4] = x->a[2];
        A[g + 8][t + 4] = x->a[3];
        B[t][g] = x->b[0];
        B[t + 4][g] = x->b[1];
        memcpy(&C[g][2 * t], x->d, 8);
        memcpy(&C[g + 8][2 * t], x->d + 2, 8);
    }
    host_v8 even[8], odd[8];                   // rows 2w and 2w + 1 of B
    for (int w = 0; w < 8; w++) {
        host_v8u word = *(host_v8u*)B[w];
        even[w] = (host_v8)(word << 16);
        odd[w] = (host_v8)(word & 0xffff0000u);
    }
    for (int m = 0; m < 16; m++) {
        host_v8u word = *(host_v8u*)A[m];
        host_v8 low = (host_v8)(word << 16), high = (host_v8)(word & 0xffff0000u);
        host_v8 sum = *(host_v8*)C[m];
        for (int w = 0; w < 8; w++) {
            sum += even[w] * low[w];
            sum += odd[w] * high[w];
        }
        *(host_v8*)C[m] = sum;
    }
    for (int L = 0; L < 32; L++) {
        int g = L / 4, t = L % 4;
        memcpy(lane[L]->d, &C[g][2 * t], 8);
        memcpy(lane[L]->d + 2, &C[g + 8][2 * t], 8);
    }
}

static inline void host_mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    HostMma x = {d, a, {b0, b1}};
    host_warp_collective(0xffffffffu, host_mma, &x, "mma");
}

// ---- quads ---------------------------------------------------------------------------------

template <int R>
HOST_NOSAN static void host_quad_max(void** slots, unsigned) {
    float** v = (float**)slots;
    for (int L = 0; L < 32; L += 4) {
        for (int i = 0; i < R; i++) {
            float a = v[L][i] > v[L + 2][i] ? v[L][i] : v[L + 2][i];
            float b = v[L + 1][i] > v[L + 3][i] ? v[L + 1][i] : v[L + 3][i];
            v[L][i] = v[L + 1][i] = v[L + 2][i] = v[L + 3][i] = a > b ? a : b;
        }
    }
}

template <int R>
HOST_NOSAN static void host_quad_sum(void** slots, unsigned) {
    float** v = (float**)slots;
    for (int L = 0; L < 32; L += 4) {
        for (int i = 0; i < R; i++) {
            float sum = (v[L][i] + v[L + 2][i]) + (v[L + 1][i] + v[L + 3][i]);
            v[L][i] = v[L + 1][i] = v[L + 2][i] = v[L + 3][i] = sum;
        }
    }
}

// ---- products of the fp32 build ------------------------------------------------------------

struct HostProduct {
    float* c;
    const float *p, *a, *b;
};

typedef float host_v16 __attribute__((vector_size(64)));
typedef int host_v16i __attribute__((vector_size(64)));

// Accumulators a product keeps in registers, of 16 floats each: 32 registers of 512 bits hold them
// with room for operands; 16 of 256 bits hold a quarter.
#ifdef __AVX512F__
constexpr int HOST_ACCUMULATORS = 16;
#else
constexpr int HOST_ACCUMULATORS = 4;
#endif

// Under a race detector each lane reads its share of a tile itself: the rows lane, lane + 32, ...
static inline void host_tile_touch(const float* tile, int rows, int cols, int ld) {
    host_check_shared(tile, ((size_t)(rows - 1) * ld + cols) * sizeof(float), 16, "tile product");
#ifdef HOST_TSAN
    for (int r = host_lane(); r < rows; r += 32) {
        for (int c = 0; c < cols; c += 2) (void)*(volatile const float*)(tile + r * ld + c);
    }
#endif
}

// Column by column, xt[8 NT][16 MT], of what the lanes hold as x[MT][NT][4] in the layout of C.
template <int MT, int NT>
HOST_NOSAN static inline void host_gather(host_v16 (*xt)[MT], const float* const* x) {
    const host_v16i even = {0, 4, 8, 12, 16, 20, 24, 28, 2, 6, 10, 14, 18, 22, 26, 30};
    for (int m = 0; m < MT; m++) {
        for (int n = 0; n < NT; n++) {
            for (int t = 0; t < 4; t++) {
                host_v16 low, high;            // lanes g = 0..3 and 4..7 of this t, four floats of 
                for (int g = 0; g < 4; g++) {
                    memcpy((float*)&low + 4 * g, x[4 * g + t] + (m * NT + n) * 4, 16);
                    memcpy((float*)&high + 4 * g, x[4 * g + 16 + t] + (m * NT + n) * 4, 16);
                }
                xt[8 * n + 2 * t][m] = __builtin_shuffle(low, high, even);
                xt[8 * n + 2 * t + 1][m] = __builtin_shuffle(low, high, even + 1);
            }
        }
    }
}

template <int MT, int NT>
HOST_NOSAN static inline void host_scatter(float* const* x, const host_v16 (*xt)[MT]) {
    const host_v16i first = {0, 16, 8, 24, 1, 17, 9, 25, 2, 18, 10, 26, 3, 19, 11, 27};
    for (int m = 0; m < MT; m++) {
        for (int n = 0; n < NT; n++) {
            for (int t = 0; t < 4; t++) {
                host_v16 c0 = xt[8 * n + 2 * t][m], c1 = xt[8 * n + 2 * t + 1][m];
                host_v16 low = __builtin_shuffle(c0, c1, first);
                host_v16 high = __builtin_shuffle(c0, c1, first + 4);
                for (int g = 0; g < 4; g++) {
                    memcpy(x[4 * g + t] + (m * NT + n) * 4, (float*)&low + 4 * g, 16);
                    memcpy(x[4 * g + 16 + t] + (m * NT + n) * 4, (float*)&high + 4 * g, 16);
                }
            }
        }
    }
}

// ct[N][16 MT] (+)= sum over k of at[k][16 MT] b[k KSTEP + n NSTEP]
template <bool ADD, int MT, int N, int K, int KSTEP, int NSTEP>
HOST_NOSAN static inline void host_product(host_v16 (*ct)[MT], const host_v16 (*at)[MT],
                                           const float* b) {
    constexpr int NB = HOST_ACCUMULATORS / MT;
    static_assert(N % NB == 0, "whole groups of columns");
    for (int n = 0; n < N; n += NB) {
        host_v16 sum[NB][MT];
#pragma GCC unroll 16
        for (int j = 0; j < NB; j++) {
#pragma GCC unroll 2
            for (int m = 0; m < MT; m++) sum[j][m] = ADD ? ct[n + j][m] : host_v16{};
        }
        const float* bn = b + n * NSTEP;
        for (int k = 0; k < K; k++) {
#pragma GCC unroll 16
            for (int j = 0; j < NB; j++) {
                float x = bn[k * KSTEP + j * NSTEP];
#pragma GCC unroll 2
                for (int m = 0; m < MT; m++) sum[j][m] += at[k][m] * x;
            }
        }
#pragma GCC unroll 16
        for (int j = 0; j < NB; j++) {
#pragma GCC unroll 2
            for (int m = 0; m < MT; m++) ct[n + j][m] = sum[j][m];
        }
    }
}

template <int MT, int NT, int KT, int LD>
HOST_NOSAN static void host_mma_abt(void** slots, unsigned) {
    HostProduct** lane = (HostProduct**)slots;
    host_v16 at[16 * KT][MT], ct[8 * NT][MT];
    float* c[32];
    for (int L = 0; L < 32; L++) {
        c[L] = lane[L]->c;
        if (lane[L]->a != lane[0]->a || lane[L]->b != lane[0]->b) {
            host_error("mma_abt: lanes 0 and %d disagree on the tiles", L);
        }
    }
    const float* a = lane[0]->a;
    for (int m = 0; m < MT; m++) {
        for (int k = 0; k < 16 * KT; k++) {
            for (int i = 0; i < 16; i++) at[k][m][i] = a[(m * 16 + i) * LD + k];
        }
    }
    host_product<false, MT, 8 * NT, 16 * KT, 1, LD>(ct, at, lane[0]->b);
    host_scatter<MT, NT>(c, ct);
}

template <int MT, int NT, int KT, int LD>
HOST_NOSAN static void host_mma_ab(void** slots, unsigned) {
    HostProduct** lane = (HostProduct**)slots;
    host_v16 at[16 * KT][MT], ct[8 * NT][MT];
    float* c[32];
    const float* p[32];
    for (int L = 0; L < 32; L++) {
        c[L] = lane[L]->c;
        p[L] = lane[L]->p;
        if (lane[L]->b != lane[0]->b) host_error("mma_ab: lanes 0 and %d disagree on the tile", L);
    }
    host_gather<MT, 2 * KT>(at, p);
    host_gather<MT, NT>(ct, c);
    host_product<true, MT, 8 * NT, 16 * KT, LD, 1>(ct, at, lane[0]->b);
    host_scatter<MT, NT>(c, ct);
}
