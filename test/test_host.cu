/*
Tests of the host layer (llmc/host) and of the verbs in llmc/device.cuh: every feature, in several
schedules and with several workers; every error, by running this program again on a planted bug.

    test_host [filter] [--verbose]
    test_host --planted NAME          one bug of planted.cu
*/
#define PLANTED_NO_MAIN
#include "planted.cu"
#include <cuda_fp8.h>
#include <pthread.h>
#include <initializer_list>
#include <sys/wait.h>
#include "test.h"

#ifdef HOST_TSAN        // a hundred times slower
static const char* const SCHEDULES[] = {"depth", "reverse", "7"};
#else
static const char* const SCHEDULES[] = {"depth", "reverse", "breadth", "1", "2", "3", "12345"};
#endif
enum { SCHEDULE_COUNT = sizeof(SCHEDULES) / sizeof(SCHEDULES[0]) };

// Device memory is host memory here; a test build for a GPU would have to copy.
static float* floats(size_t n) {
    float* p;
    CUDA_CHECK(cudaMalloc(&p, n * sizeof(float)));
    return p;
}

static int* ints(size_t n) {
    int* p;
    CUDA_CHECK(cudaMalloc(&p, n * sizeof(int)));
    return p;
}

// ---- where am I ----------------------------------------------------------------------------

static __global__ void place_kernel(int* count, unsigned* bad) {
    unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    unsigned threads = blockDim.x * blockDim.y * blockDim.z;
    if (host_lane() != (int)(thread % 32)) atomicAdd(bad, 1u);
    atomicAdd(&count[block * threads + thread], 1);
}

static void test_place(void) {
    const dim3 grids[] = {dim3(1), dim3(7), dim3(3, 5, 2), dim3(1, 1, 9)};
    const dim3 blocks[] = {dim3(1), dim3(33), dim3(8, 4, 2), dim3(1024), dim3(1, 3, 64)};
    unsigned* bad = (unsigned*)ints(1);
    *bad = 0;
    int wrong = 0;
    for (int s = 0; s < SCHEDULE_COUNT; s++) {
        host_set_schedule(SCHEDULES[s]);
        for (const dim3& g : grids) {
            for (const dim3& b : blocks) {
                size_t n = (size_t)g.x * g.y * g.z * b.x * b.y * b.z;
                int* count = ints(n);
                CUDA_CHECK(cudaMemset(count, 0, n * sizeof(int)));
                launch<place_kernel>(g, b, 0, 0, count, bad);
                for (size_t i = 0; i < n; i++) wrong += count[i] != 1;
                CUDA_CHECK(cudaFree(count));
            }
        }
    }
    host_set_schedule(NULL);
    test_check("every thread runs exactly once", wrong, 0);
    test_check("lanes", *bad, 0);
    CUDA_CHECK(cudaFree(bad));
}

// ---- schedules and workers -----------------------------------------------------------------

// A bit of everything that waits. The result is a function of the indices alone.
static __global__ void mixture_kernel(float* out, int rounds) {
    DYN_SMEM(float, s);
    float* scratch = s + blockDim.x;
    float v = 1.0f / (1.0f + blockIdx.x * blockDim.x + threadIdx.x);
    for (int r = 0; r < rounds; r++) {
        s[threadIdx.x] = v;
        __syncthreads();
        v = 0.5f * v + s[(threadIdx.x * 7 + r) % blockDim.x];
        __syncthreads();
        v += 0.1f * warp_sum<32>(v) + __shfl_sync(0xffffffffu, v, (threadIdx.x + r) % 32);
        if ((threadIdx.x / 32 + r) % 2) v = 0.25f * warp_max<8>(v);
        v = v / (1.0f + block_sum(v, scratch));
    }
    out[blockIdx.x * blockDim.x + threadIdx.x] = v;
}

static void test_schedules(void) {
    const int blocks = 9, threads = 160, n = blocks * threads;
    float *want = floats(n), *got = floats(n);
    host_set_threads(1);
    launch<mixture_kernel>(blocks, threads, (threads + 32) * 4, 0, want, 5);
    bool finite = true;
    for (int i = 0; i < n; i++) finite &= isfinite(want[i]);
    test_true("finite", finite);
    for (int workers = 1; workers <= 5; workers++) {
        host_set_threads(workers);
        for (int s = 0; s < SCHEDULE_COUNT; s++) {
            host_set_schedule(SCHEDULES[s]);
            CUDA_CHECK(cudaMemset(got, 0xff, n * sizeof(float)));
            launch<mixture_kernel>(blocks, threads, (threads + 32) * 4, 0, got, 5);
            char name[80];
            snprintf(name, sizeof name, "%d workers, schedule %s", workers, SCHEDULES[s]);
            test_true(name, memcmp(want, got, n * sizeof(float)) == 0);
        }
    }
    host_set_threads(0);
    host_set_schedule(NULL);
    CUDA_CHECK(cudaFree(want));
    CUDA_CHECK(cudaFree(got));
}

// ---- barriers ------------------------------------------------------------------------------

// Thread t takes part in t % 5 barriers and leaves: those that have left are not waited for.
static __global__ void leaving_kernel(int* arrivals) {
    for (unsigned round = 0; round < 5; round++) {
        if (threadIdx.x % 5 < round) return;
        int there = __syncthreads_count(1);
        arrivals[round * blockDim.x + threadIdx.x] = there;
    }
}

static __global__ void predicate_kernel(int* out) {
    int i = threadIdx.x, n = blockDim.x;
    out[i] = __syncthreads_count(i % 3 == 0);
    out[n + i] = __syncthreads_and(i < 1000);
    out[2 * n + i] = __syncthreads_and(i != 5);
    out[3 * n + i] = __syncthreads_or(i == 77);
    out[4 * n + i] = __syncthreads_or(i > 1000);
}

#ifndef HOST_TSAN       // the flag is a race on purpose
static __global__ void polling_kernel(volatile int* flag, int* out) {
    if (threadIdx.x == blockDim.x - 1) {
        *flag = 1;
    } else {
        while (!*flag) __nanosleep(20);
    }
    out[threadIdx.x] = 1;
}
#endif

static void test_barriers(void) {
    const int n = 100;
    int* out = ints(5 * n);
    for (int s = 0; s < SCHEDULE_COUNT; s++) {
        host_set_schedule(SCHEDULES[s]);
        CUDA_CHECK(cudaMemset(out, 0, 5 * n * sizeof(int)));
        launch<leaving_kernel>(1, n, 0, 0, out);
        int wrong = 0;
        for (int round = 0; round < 5; round++) {
            for (int i = 0; i < n; i++) {
                wrong += out[round * n + i] != (i % 5 < round ? 0 : n - n / 5 * round);
            }
        }
        test_check("__syncthreads_count counts threads that have not exited", wrong, 0);
        launch<predicate_kernel>(1, n, 0, 0, out);
        wrong = 0;
        for (int i = 0; i < n; i++) {
            wrong += out[i] != 34 || out[n + i] != 1 || out[2 * n + i] != 0;
            wrong += out[3 * n + i] != 1 || out[4 * n + i] != 0;
        }
        test_check("__syncthreads_count, _and, _or", wrong, 0);
#ifndef HOST_TSAN
        CUDA_CHECK(cudaMemset(out, 0, 5 * n * sizeof(int)));
        launch<polling_kernel>(1, n, 0, 0, out + n, out);
        wrong = 0;
        for (int i = 0; i < n; i++) wrong += out[i] != 1;
        test_check("a polling loop lets others run", wrong, 0);
#endif
    }
    host_set_schedule(NULL);
    CUDA_CHECK(cudaFree(out));
}

// ---- warp operations -----------------------------------------------------------------------

static __global__ void shuffle_kernel(int* idx, int* up, int* down, int* x, double* wide, int arg,
                                      int width) {
    int i = threadIdx.x;
    idx[i] = __shfl_sync(0xffffffffu, i, arg, width);
    up[i] = __shfl_up_sync(0xffffffffu, i, arg, width);
    down[i] = __shfl_down_sync(0xffffffffu, i, arg, width);
    x[i] = __shfl_xor_sync(0xffffffffu, i, arg, width);
    wide[i] = __shfl_sync(0xffffffffu, 1.0 / (i + 1), arg, width);
}

// As the PTX manual has it: source lane j, or the lane itself where j is out of its bounds.
static void shuffle_want(int* idx, int* up, int* down, int* x, int lane, int arg, int width) {
    int first = lane / width * width, last = first + width - 1;
    *idx = first + arg % width;
    *up = lane - arg >= first ? lane - arg : lane;
    *down = lane + arg <= last ? lane + arg : lane;
    *x = (lane ^ arg) <= last ? lane ^ arg : lane;
}

// Lanes 0-15 meet three times among themselves while 16-31 wait for the whole warp already.
static __global__ void nested_kernel(int* out) {
    int lane = threadIdx.x % 32, v = lane;
    if (lane < 16) {
        for (int k = 0; k < 3; k++) v = __shfl_sync(0xffffu, v + 1, (lane + 1) % 16);
    }
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, v, 16);
}

static __global__ void vote_kernel(unsigned* out) {
    int i = threadIdx.x;
    unsigned odd = 0xaaaaaaaau, mine = i % 2 ? odd : ~odd;
    unsigned* o = out + 12 * i;
    o[0] = __ballot_sync(0xffffffffu, i % 3 == 0);
    o[1] = __any_sync(0xffffffffu, i == 31);
    o[2] = __all_sync(0xffffffffu, i < 32);
    o[3] = __all_sync(0xffffffffu, i != 4);
    o[4] = __match_any_sync(0xffffffffu, i / 5);
    o[5] = __reduce_add_sync(mine, (unsigned)i);
    o[6] = (unsigned)__reduce_max_sync(0xffffffffu, i - 40);
    o[7] = (unsigned)__reduce_min_sync(0xffffffffu, 7 - i);
    o[8] = __ballot_sync(mine, 1);
    o[9] = (__activemask() >> i) & 1;
    o[10] = __reduce_or_sync(0xffffffffu, 1u << i);
    o[11] = __match_any_sync(0xffffffffu, (unsigned long long)i << 40);
}

static void test_warp(void) {
    int* out = ints(4 * 32);
    double* wide = (double*)floats(64);
    const int widths[] = {2, 4, 8, 16, 32};
    for (int s = 0; s < SCHEDULE_COUNT; s++) {
        host_set_schedule(SCHEDULES[s]);
        int wrong = 0;
        for (int width : widths) {
            for (int arg = 0; arg < 32; arg += 3) {
                int *idx = out, *up = out + 32, *down = out + 64, *x = out + 96;
                launch<shuffle_kernel>(1, 32, 0, 0, idx, up, down, x, wide, arg, width);
                for (int i = 0; i < 32; i++) {
                    int a, b, c, d;
                    shuffle_want(&a, &b, &c, &d, i, arg, width);
                    wrong += idx[i] != a || up[i] != b || down[i] != c || x[i] != d;
                    wrong += wide[i] != 1.0 / (a + 1);
                }
            }
        }
        test_check("shuffles of every kind, width and distance", wrong, 0);
        launch<nested_kernel>(1, 64, 0, 0, out);
        wrong = 0;
        for (int i = 0; i < 64; i++) {
            int lane = i % 32, from = lane ^ 16;
            int v = from < 16 ? (from + 3) % 16 + 3 : from;
            wrong += out[i] != v;
        }
        test_check("groups of a warp under way at the same time", wrong, 0);
    }
    CUDA_CHECK(cudaFree(out));
    CUDA_CHECK(cudaFree(wide));

    unsigned* votes = (unsigned*)ints(12 * 32);
    launch<vote_kernel>(1, 32, 0, 0, votes);
    int wrong = 0;
    for (int i = 0; i < 32; i++) {
        const unsigned* o = votes + 12 * i;
        unsigned match = 0, sum = 0;
        for (int j = 0; j < 32; j++) match |= (unsigned)(j / 5 == i / 5) << j;
        for (int j = i % 2; j < 32; j += 2) sum += j;
        wrong += o[0] != 0x49249249u || o[1] != 1 || o[2] != 1 || o[3] != 0 || o[4] != match;
        wrong += o[5] != sum || (int)o[6] != -9 || (int)o[7] != -24 || o[10] != ~0u;
        wrong += o[8] != (i % 2 ? 0xaaaaaaaau : 0x55555555u) || o[9] != 1 || o[11] != 1u << i;
    }
    test_check("votes, matches, reductions", wrong, 0);
    host_set_schedule(NULL);
    CUDA_CHECK(cudaFree(votes));
}

// ---- sums and maxima -----------------------------------------------------------------------

template <int W> static __global__ void reduce_kernel(float* sum, float* max, float* shuffled,
                                                      const float* in, int groups) {
    int i = threadIdx.x;
    if (i / W >= groups) return;            // whole groups may be absent
    sum[i] = warp_sum<W>(in[i]);
    max[i] = warp_max<W>(in[i]);
    unsigned mask = W == 32 ? ~0u : ((1u << (W % 32)) - 1) << (i % 32 / W * W);
    float v = in[i];
    for (int distance = W / 2; distance > 0; distance /= 2) {
        v += __shfl_xor_sync(mask, v, distance);
    }
    shuffled[i] = v;
}

template <int W> static void test_reduce(void) {
    const int n = 128, groups = W == 1 ? 100 : n / W - 1;
    float *sum = floats(n), *max = floats(n), *shuffled = floats(n), *in = floats(n);
    for (int i = 0; i < n; i++) in[i] = (float)test_normal(7, i);
    in[0] = W > 1 ? NAN : in[0];            // the first group is NaN, sum and maximum
    launch<reduce_kernel<W>>(1, n, 0, 0, sum, max, shuffled, in, groups);
    double error = 0;
    int bits = 0, maxima = 0;
    for (int i = 0; i < groups * W; i++) {
        bits += memcmp(&sum[i], &shuffled[i], 4) != 0 && !(isnan(sum[i]) && isnan(shuffled[i]));
        double want = 0, largest = -INFINITY, size = 0;
        for (int j = i / W * W; j < i / W * W + W; j++) {
            want += in[j];
            size += fabs(in[j]);
            largest = in[j] > largest ? in[j] : largest;
        }
        if (W > 1 && i < W) {
            maxima += !isnan(max[i]) || !isnan(sum[i]);
        } else {
            maxima += max[i] != largest;
            error = fmax(error, fabs(sum[i] - want) / size);
        }
    }
    char name[64];
    snprintf(name, sizeof name, "warp_sum<%d>", W);
    test_check(name, error, 5 * 6e-8);      // log2(32) roundings of partial sums, each half an ulp
    test_check("warp_sum has the bits of the shuffles", bits, 0);
    test_check("warp_max, NaN kept", maxima, 0);
    CUDA_CHECK(cudaFree(sum));
    CUDA_CHECK(cudaFree(max));
    CUDA_CHECK(cudaFree(shuffled));
    CUDA_CHECK(cudaFree(in));
}

static __global__ void block_reduce_kernel(float* sums, float* maxima, const float* in) {
    DYN_SMEM(float, scratch);
    float v = in[threadIdx.x];
    float a = block_sum(v, scratch), b = block_max(v, scratch), c = block_sum(2 * v, scratch);
    sums[threadIdx.x] = a;
    maxima[threadIdx.x] = b;
    sums[blockDim.x + threadIdx.x] = c;
}

static void test_block_reduce(void) {
    for (int n = 32; n <= 1024; n *= 2) {
        float *sums = floats(2 * n), *maxima = floats(n), *in = floats(n);
        for (int i = 0; i < n; i++) in[i] = (float)(i * 37 % 101 - 50);
        float want = 0, largest = -1e9f;
        for (int i = 0; i < n; i++) {
            want += in[i];                  // integers: exact in any order
            largest = in[i] > largest ? in[i] : largest;
        }
        launch<block_reduce_kernel>(1, n, 128, 0, sums, maxima, in);
        int wrong = 0;
        for (int i = 0; i < n; i++) {
            wrong += sums[i] != want || sums[n + i] != 2 * want || maxima[i] != largest;
        }
        test_check("block_sum and block_max of integers", wrong, 0);
        wrong = 0;
        for (int at = 0; at < n; at += 31) {    // in any warp, and n - 1 where n is 32
            float kept = in[at];
            in[at] = NAN;
            launch<block_reduce_kernel>(1, n, 128, 0, sums, maxima, in);
            for (int i = 0; i < n; i++) wrong += !isnan(sums[i]) || !isnan(maxima[i]);
            in[at] = kept;
        }
        test_check("block_sum and block_max of a NaN", wrong, 0);
        CUDA_CHECK(cudaFree(sums));
        CUDA_CHECK(cudaFree(maxima));
        CUDA_CHECK(cudaFree(in));
    }
}

static void test_reductions(void) {
    for (int s = 0; s < SCHEDULE_COUNT; s++) {
        host_set_schedule(SCHEDULES[s]);
        test_reduce<1>();
        test_reduce<2>();
        test_reduce<4>();
        test_reduce<8>();
        test_reduce<16>();
        test_reduce<32>();
        test_block_reduce();
    }
    host_set_schedule(NULL);
}

// ---- atomics -------------------------------------------------------------------------------

struct Atomics {
    int add, max, min, either, sub;
    unsigned count, low, all, cycle;
    unsigned long long wide, widest;
    float sum;
    double dsum;
    unsigned locked, exchanged;
};

static __global__ void atomics_kernel(Atomics* a) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    atomicAdd(&a->add, i);
    atomicMax(&a->max, i);
    atomicMin(&a->min, -i);
    atomicOr(&a->either, 1 << (i % 31));
    atomicSub(&a->sub, 2);
    atomicAdd(&a->count, 1u);
    atomicMin(&a->low, 5000u - (unsigned)i);
    atomicAnd(&a->all, ~(1u << (i % 32 / 2)));
    atomicInc(&a->cycle, 9u);
    atomicAdd(&a->wide, 1ull << 33);
    atomicMax(&a->widest, (unsigned long long)i << 20);
    atomicAdd(&a->sum, 1.0f);               // whole numbers: exact in any order
    atomicAdd(&a->dsum, 0.5);
    atomicXor(&a->exchanged, (unsigned)i);
    unsigned seen = atomicAdd(&a->locked, 0u), old;     // for what has no atomic of its own
    do {
        old = seen;
        seen = atomicCAS(&a->locked, old, old + 3);
    } while (seen != old);
}

static __global__ void exchange_kernel(int* next, int* got) {
    got[threadIdx.x] = atomicExch(next, (int)threadIdx.x);
}

static void test_atomics(void) {
    Atomics* a = (Atomics*)floats(64);
    *a = Atomics{};
    a->low = ~0u;
    a->all = ~0u;
    const int n = 16 * 250;
    launch<atomics_kernel>(16, 250, 0, 0, a);
    unsigned x = 0;
    for (int i = 0; i < n; i++) x ^= (unsigned)i;
    test_true("add, sub", a->add == n * (n - 1) / 2 && a->sub == -2 * n && a->count == (unsigned)n);
    test_true("max, min", a->max == n - 1 && a->min == 1 - n && a->low == 5000u - n + 1);
    test_true("or, and", a->either == 0x7fffffff && a->all == 0xffff0000u);
    test_true("xor", a->exchanged == x);
    test_true("64 bits", a->wide == (unsigned long long)n << 33 &&
                             a->widest == (unsigned long long)(n - 1) << 20);
    test_true("float, double", a->sum == (float)n && a->dsum == 0.5 * n);
    test_true("compare and swap, inc", a->locked == 3u * n && a->cycle == (unsigned)n % 10);
    CUDA_CHECK(cudaFree(a));
    int *next = ints(1), *got = ints(64);
    *next = -1;
    launch<exchange_kernel>(1, 64, 0, 0, next, got);
    long long sum = *next;
    for (int i = 0; i < 64; i++) sum += got[i];
    test_true("exchange hands each value on once", sum == 64 * 63 / 2 - 1);
    CUDA_CHECK(cudaFree(next));
    CUDA_CHECK(cudaFree(got));
}

// ---- shared memory -------------------------------------------------------------------------

static __global__ void poison_kernel(int* not_nan, int n) {
    DYN_SMEM(float, s);
    int bad = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) bad += !isnan(s[i]);
    atomicAdd(not_nan, bad);
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) s[i] = 0.0f;
}

template <class T> static __global__ void static_kernel(T* out) {
    __shared__ T a[64], b[2][64];
    a[threadIdx.x] = (T)threadIdx.x;
    b[1][threadIdx.x] = (T)(blockIdx.x * 2);
    __syncthreads();
    out[blockIdx.x * 64 + threadIdx.x] = a[63 - threadIdx.x] + b[1][threadIdx.x ^ 1];
    __syncthreads();
}

static void test_shared(void) {
    int* count = ints(1);
    for (int n : {1, 33, 1000, 232448 / 4}) {
        *count = 0;
        launch<poison_kernel>(7, 40, n * 4, 0, count, n);
        test_check("dynamic shared memory begins as NaN in every block", *count, 0);
    }
    CUDA_CHECK(cudaFree(count));
    int* out = ints(64 * 20);
    launch<static_kernel<int>>(20, 64, 0, 0, out);
    int wrong = 0;
    for (int i = 0; i < 64 * 20; i++) wrong += out[i] != 63 - i % 64 + i / 64 * 2;
    test_check("static shared arrays", wrong, 0);
    CUDA_CHECK(cudaFree(out));
}

// ---- numbers -------------------------------------------------------------------------------

static uint32_t bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}

static float float_of(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}

// Nearest even by comparing with the two neighbours in double.
static uint16_t bf16_want(float x) {
    uint32_t u = bits_of(x);
    if (isnan(x)) return 0x7fff;
    uint16_t low = (uint16_t)(u >> 16);
    if (isinf(x) || (u & 0xffff) == 0) return low;
    double below = float_of((uint32_t)low << 16);
    double above = (low & 0x7fff) == 0x7f7f ? copysign(ldexp(1, 128), x)
                                            : (double)float_of((uint32_t)(low + 1) << 16);
    double a = fabs(x - below), b = fabs(above - x);
    return a < b || (a == b && low % 2 == 0) ? low : (uint16_t)(low + 1);
}

static void test_bf16(void) {
    int wrong = 0, eight = 0, round_trip = 0, operators = 0;
    const uint32_t tails[] = {0, 1, 0x7fff, 0x8000, 0x8001, 0xffff};
    alignas(16) bf16 stored[8];
    for (uint32_t high = 0; high < 65536; high++) {
        round_trip += !isnan(host_bf16_float((uint16_t)high)) &&
                      __float2bfloat16(host_bf16_float((uint16_t)high)).__x != high;
        float8 v = {};
        for (int k = 0; k < 6; k++) {
            float x = float_of(high << 16 | tails[k]);
            wrong += __float2bfloat16_rn(x).__x != bf16_want(x);
            v.v[k] = x;
        }
        v.v[6] = NAN;
        store8(stored, v);
        for (int k = 0; k < 8; k++) eight += stored[k].__x != bf16_want(v.v[k]);
        float8 back = load8(stored);
        for (int k = 0; k < 8; k++) {
            eight += bits_of(back.v[k]) != (uint32_t)stored[k].__x << 16;
        }
        bf16 a, b = 1.0078125f;
        a.__x = (uint16_t)high;
        float x = a;
        operators += bf16_want(x * (float)b) != (a * b).__x || (a < b) != (x < (float)b);
        operators += bf16_want(x + (float)b) != (a + b).__x;
        operators += bits_of(-a) != (bits_of(x) ^ 0x80000000u);
    }
    test_check("float to bf16, at and around halfway", wrong, 0);
    test_check("bf16 to float and back", round_trip, 0);
    test_check("load8 and store8 of bf16", eight, 0);
    test_check("operators round once", operators, 0);
    __nv_bfloat162 pair = __floats2bfloat162_rn(1.0f, -2.0f);
    float2 two = __bfloat1622float2(pair);
    uint32_t word;
    memcpy(&word, &pair, 4);
    test_true("pairs: the first is the low half", two.x == 1 && two.y == -2 && word == 0xc0003f80u);
    test_true("round_bf16 down", round_bf16(1.00390625f) == 1.0f);
    test_true("round_bf16 up", round_bf16(1.01171875f) == 1.015625f);
}

template <class T> static void test_fp8_of(const char* name, int finite, float largest) {
    int wrong = 0;
    for (int code = 0; code < finite; code++) {
        T low, high;
        low.__x = (unsigned char)code;
        float x = (float)low;
        wrong += T(x).__x != code || T(-x).__x != (code | 0x80);
        if (code + 1 == finite) {
            wrong += x != largest || T(largest * 1.01f).__x != code || T(INFINITY).__x != code;
            wrong += T(-1e30f).__x != (code | 0x80);
            continue;
        }
        high.__x = (unsigned char)(code + 1);
        float middle = 0.5f * (x + (float)high);            // exact: few bits
        int even = code % 2 ? code + 1 : code;
        wrong += !((float)high > x) || T(middle).__x != even;
        wrong += T(nextafterf(middle, 0)).__x != code;
        wrong += T(nextafterf(middle, 1e9f)).__x != code + 1;
    }
    wrong += !isnan((float)T(NAN)) || T(NAN).__x != 0x7f;
    test_check(name, wrong, 0);
}

static __global__ void math_kernel(float* out, float above, float below) {
    out[0] = fmaxf(NAN, 2.0f);
    out[1] = fminf(3.0f, NAN);
    out[2] = rsqrtf(16.0f);
    out[3] = __fdividef(1.0f, 8.0f);
    out[4] = __frcp_rn(3.0f);
    out[5] = __fmaf_rn(above, below, -1.0f);        // -2^-46: rounded only once
    out[6] = __fmul_rn(above, below) - 1.0f;        // 0: rounded before the subtraction
    out[7] = __saturatef(NAN);
    out[8] = __uint_as_float(__float_as_uint(-1.5f) & 0x7fffffffu);
    out[9] = (float)(__popc(0xf0f0u) + __clz(1) + __ffs(8) + (int)__umulhi(1u << 31, 6));
    out[10] = (float)(min(3, -2) + max(4u, 9u)) + max(2.0f, NAN);
    out[11] = (float)__float2int_rn(2.5f) + (float)__brev(1u);
}

static void test_numbers(void) {
    test_bf16();
    test_fp8_of<__nv_fp8_e4m3>("fp8 e4m3: every value and midpoint", 0x7f, 448);
    test_fp8_of<__nv_fp8_e5m2>("fp8 e5m2: every value and midpoint", 0x7c, 57344);
    __nv_fp8_e5m2 inf;
    inf.__x = 0xfc;
    test_true("e5m2 infinity", (float)inf == -INFINITY);

    double worst = 0, worst_e = 0;
    for (int i = -1260000; i < 1280000; i++) {
        float x = 1e-4f * (float)i;
        worst = fmax(worst, fabs(fast_exp2(x) / exp2((double)x) - 1));
        if (fabsf(x) < 16) worst_e = fmax(worst_e, fabs(fast_exp(x) / exp((double)x) - 1));
    }
    test_check("fast_exp2, relative error", worst, 2e-7);
    // x log2(e) < 24: half an ulp is 2^-20 absolute, times ln 2; the constant adds 1e-8 * 16
    test_check("fast_exp below 16, relative error", worst_e, 2e-7 + 0.6931 * 0x1p-20 + 2e-7);
    test_true("fast_exp2 at the ends", fast_exp2(-INFINITY) == 0 && fast_exp2(-127.0f) == 0 &&
                                           fast_exp2(INFINITY) == INFINITY && fast_exp2(0) == 1 &&
                                           fast_exp2(-126.0f) == 0x1p-126f &&
                                           isfinite(fast_exp2(127.99f)) &&
                                           fast_exp2(128.0f) == INFINITY && isnan(fast_exp2(NAN)) &&
                                           isnan(fast_exp2(float_of(0xffffffffu))));
    float* out = floats(12);
    launch<math_kernel>(1, 1, 0, 0, out, 1.0f + 0x1p-23f, 1.0f - 0x1p-23f);
    const float want[] = {2, 3, 0.25f, 0.125f, 1.0f / 3.0f, -0x1p-46f, 0, 0, 1.5f,
                          8 + 31 + 4 + 3, 9, 2147483648.0f};
    int wrong = 0;
    for (int i = 0; i < 12; i++) wrong += out[i] != want[i];
    test_check("intrinsics", wrong, 0);
    CUDA_CHECK(cudaFree(out));
}

// ---- streams -------------------------------------------------------------------------------

static void test_query(void) {
    cudaStream_t s;
    cudaEvent_t start, end;
    float *x = floats(32), ms = -1;
    CUDA_CHECK(cudaStreamCreate(&s));
    CUDA_CHECK(cudaEventCreate(&start));
    CUDA_CHECK(cudaEventCreate(&end));
    test_true("an event that was never recorded is complete", cudaEventQuery(end) == cudaSuccess);
    CUDA_CHECK(cudaMemsetAsync(x, 0, 128, s));
    CUDA_CHECK(cudaEventRecord(start, s));
    for (int i = 0; i < 5; i++) launch<planted_add_kernel>(1, 32, 0, s, x, 1.0f);
    CUDA_CHECK(cudaEventRecord(end, s));
    bool late = host_streams_lazy() ? isnan(x[3]) : x[3] == 5;
    test_true("lazy streams do nothing before they must, others at once", late);
    int polls = 0;
    while (cudaEventQuery(end) == cudaErrorNotReady && polls < 1000) polls++;
    test_true("polling an event ends", polls < 1000 && x[3] == 5);
    test_true("a stream without work is complete", cudaStreamQuery(s) == cudaSuccess);
    CUDA_CHECK(cudaEventElapsedTime(&ms, start, end));
    test_true("elapsed time", ms >= 0 && ms < 1e5);
    launch<planted_add_kernel>(1, 32, 0, s, x, 1.0f);
    CUDA_CHECK(cudaEventRecord(end, s));
    CUDA_CHECK(cudaEventSynchronize(end));
    test_true("cudaEventSynchronize", x[0] == 6);
    CUDA_CHECK(cudaEventRecord(end, s));
    CUDA_CHECK(cudaEventDestroy(end));          // while it is on its way
    CUDA_CHECK(cudaDeviceSynchronize());
    cudaGetLastError();
    const cudaError_t bad = cudaErrorInvalidResourceHandle;
    test_true("a bad handle is an error", cudaStreamDestroy(NULL) == bad);
    test_true("which is kept once", cudaGetLastError() == bad && cudaGetLastError() == cudaSuccess);
    CUDA_CHECK(cudaEventDestroy(start));
    CUDA_CHECK(cudaStreamDestroy(s));
    CUDA_CHECK(cudaFree(x));
}

// The null stream and blocking streams wait for each other; pageable sources are read at once.
static void test_null_stream(void) {
    cudaStream_t s;
    float *x = floats(32), *y = floats(32), *pinned, pageable[32], back[32];
    CUDA_CHECK(cudaStreamCreate(&s));
    CUDA_CHECK(cudaMallocHost(&pinned, 128));
    for (int i = 0; i < 32; i++) pinned[i] = pageable[i] = (float)i;
    CUDA_CHECK(cudaMemcpyAsync(x, pageable, 128, cudaMemcpyHostToDevice, s));
    CUDA_CHECK(cudaMemcpyAsync(y, pinned, 128, cudaMemcpyHostToDevice, s));
    for (int i = 0; i < 32; i++) pinned[i] = pageable[i] = -1;
    launch<planted_add_kernel>(1, 32, 0, 0, x, 1.0f);
    launch<planted_double_kernel>(1, 32, 0, s, x);
    CUDA_CHECK(cudaMemcpy(back, x, 128, cudaMemcpyDeviceToHost));
    int wrong = 0;
    for (int i = 0; i < 32; i++) wrong += back[i] != 2 * (i + 1.0f);
    test_check("null stream order, pageable copy", wrong, 0);
    test_true("a pinned source is read when the stream comes to it",
              y[7] == (host_streams_lazy() ? -1 : 7));
    float grid[4] = {1, 2, 3, 4};
    CUDA_CHECK(cudaMemcpy2DAsync(x, 32, grid, 8, 8, 2, cudaMemcpyHostToDevice, s));
    CUDA_CHECK(cudaStreamSynchronize(s));
    test_true("cudaMemcpy2DAsync", x[0] == 1 && x[1] == 2 && x[2] == 6 && x[8] == 3 && x[9] == 4);
    CUDA_CHECK(cudaStreamDestroy(s));
    CUDA_CHECK(cudaFreeHost(pinned));
    CUDA_CHECK(cudaFree(x));
    CUDA_CHECK(cudaFree(y));
}

struct Append {
    int *list, *length, value;
};

static void append(void* arg) {
    Append* a = (Append*)arg;
    a->list[(*a->length)++] = a->value;
}

// Two streams of six operations, the last three of b after the first three of a.
static void test_submit(void) {
    cudaStream_t s[2];
    cudaEvent_t e;
    CUDA_CHECK(cudaStreamCreateWithFlags(&s[0], cudaStreamNonBlocking));
    CUDA_CHECK(cudaStreamCreateWithFlags(&s[1], cudaStreamNonBlocking));
    CUDA_CHECK(cudaEventCreate(&e));
    unsigned orders = 0;
    int wrong = 0;
    for (int seed = 0; seed < 20; seed++) {
        if (host_streams_lazy()) host_set_streams("lazy", seed);
        int list[12], length = 0;
        for (int i = 0; i < 6; i++) {
            for (int k = 0; k < 2; k++) {
                if (k == 1 && i == 3) CUDA_CHECK(cudaStreamWaitEvent(s[1], e, 0));
                Append a = {list, &length, 10 * k + i};
                host_stream_submit(s[k], append, &a, sizeof(a));
                a.value = -1;                               // it must have its own copy
                if (k == 0 && i == 2) CUDA_CHECK(cudaEventRecord(e, s[0]));
            }
        }
        CUDA_CHECK(cudaStreamSynchronize(s[1]));
        CUDA_CHECK(cudaStreamSynchronize(s[0]));
        int at[20];
        for (int i = 0; i < length; i++) at[list[i]] = i;
        for (int i = 1; i < 6; i++) wrong += at[i] < at[i - 1] || at[10 + i] < at[9 + i];
        wrong += length != 12 || at[13] < at[2];
        orders |= 1u << at[10];
    }
    test_check("host_stream_submit keeps every legal order", wrong, 0);
    test_true("and finds several", !host_streams_lazy() || (orders & (orders - 1)) != 0);
    CUDA_CHECK(cudaEventDestroy(e));
    for (cudaStream_t stream : s) CUDA_CHECK(cudaStreamDestroy(stream));
}

static void test_streams(void) {
    for (const char* mode : {"inorder", "lazy"}) {
        host_set_streams(mode, 1);
        test_query();
        test_null_stream();
        test_submit();
    }
    int clean = 0, caught = 0;
    for (int seed = 0; seed < 20; seed++) {
        host_set_streams("lazy", seed);
        clean += planted_streams(false);
        caught += planted_streams(true);
    }
    test_check("lazy streams with their event", clean, 0);
    test_true("a missing event shows in some of 20 orders", caught > 0);
    host_set_streams("inorder", 0);
    test_check("and never in order", planted_streams(true), 0);
}

// ---- memory and the pool -------------------------------------------------------------------

static void test_memory(void) {
    size_t before = host_report_leaks(), peak = host_peak_bytes();
    test_check("bytes still allocated by the tests before", (double)before, 0);
    char *p, *q;
    CUDA_CHECK(cudaMalloc(&p, 100 + peak));
    int wrong = 0;
    for (size_t i = 0; i < 100 + peak; i++) wrong += p[i] != (char)0xff;
    test_check("device memory begins as NaN", wrong, 0);
    test_check("aligned to 256 bytes", (double)((uintptr_t)p % 256), 0);
    test_true("peak", host_peak_bytes() == 100 + peak);
    CUDA_CHECK(cudaMalloc(&q, 0));
    test_true("nothing", q == NULL && cudaFree(NULL) == cudaSuccess);
    test_true("more than there is", cudaMalloc(&q, (size_t)1 << 60) == cudaErrorMemoryAllocation);
    test_true("not an allocation", cudaFree(p + 256) == cudaErrorInvalidValue);
    cudaGetLastError();
    CUDA_CHECK(cudaFree(p));
    CUDA_CHECK(cudaMalloc(&p, 1));
    CUDA_CHECK(cudaFree(p));
    test_true("the peak stays", host_peak_bytes() == 100 + peak);
    size_t free_bytes, total_bytes;
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
    test_true("cudaMemGetInfo", free_bytes > 0 && free_bytes <= total_bytes);
    cudaDeviceProp prop;
    CUDA_CHECK(cudaGetDeviceProperties(&prop, 0));
    test_true("device", !strcmp(prop.name, "host") && prop.multiProcessorCount == host_threads());
}

static void count_item(void* ctx, int i) {
    __atomic_fetch_add((int*)ctx + i, 1, __ATOMIC_RELAXED);
}

struct Seen {
    pthread_t thread[16];
    int threads;
    pthread_mutex_t mutex;
};

static void see_thread(void* ctx, int i) {
    Seen* seen = (Seen*)ctx;
    volatile int work = i;
    for (int k = 0; k < 5000; k++) work = work + 1;     // long enough for others to join
    pthread_mutex_lock(&seen->mutex);
    bool known = false;
    for (int k = 0; k < seen->threads; k++) known |= seen->thread[k] == pthread_self();
    if (!known) seen->thread[seen->threads++] = pthread_self();
    pthread_mutex_unlock(&seen->mutex);
}

static void test_pool(void) {
    for (int workers = 5; workers >= 1; workers--) {
        Seen seen = {};
        pthread_mutex_init(&seen.mutex, NULL);
        host_set_threads(workers);
        for (int i = 0; i < 5; i++) host_parallel_for(300, see_thread, &seen);
        test_true("not more OS threads than asked", 1 <= seen.threads && seen.threads <= workers);
    }
    static int count[1000];
    for (int workers = 1; workers <= 4; workers++) {
        host_set_threads(workers);
        for (int n : {0, 1, 2, 1000}) {
            memset(count, 0, sizeof(count));
            host_parallel_for(n, count_item, count);
            int wrong = 0;
            for (int i = 0; i < 1000; i++) wrong += count[i] != (i < n);
            test_check("host_parallel_for does each item once", wrong, 0);
        }
    }
    host_set_threads(0);
    int *runs = ints(64), *bad = ints(1), wrong = 0;
    memset(runs, 0, 64 * sizeof(int));
    *bad = 0;
    for (int i = 0; i < 3000; i++) launch<place_kernel>(2, 32, 0, 0, runs, (unsigned*)bad);
    for (int i = 0; i < 64; i++) wrong += runs[i] != 3000;
    test_check("many small launches", wrong + *bad, 0);
    CUDA_CHECK(cudaFree(runs));
    CUDA_CHECK(cudaFree(bad));
}

// ---- planted bugs --------------------------------------------------------------------------

static const char* own_path;

// Runs this program on one planted bug; returns its exit status, and what it printed.
static int run_planted(const char* environment, const char* name, char* output, size_t size) {
    char command[1024];
    // TSan would sleep a second before each exit
    snprintf(command, sizeof command, "TSAN_OPTIONS=atexit_sleep_ms=0 %s '%s' --planted %s 2>&1",
             environment, own_path, name);
    fflush(stdout);
    FILE* pipe = popen(command, "r");
    REQUIRE(pipe, "cannot run %s", command);
    size_t n = fread(output, 1, size - 1, pipe);
    output[n] = 0;
    char rest[4096];
    while (fread(rest, 1, sizeof rest, pipe) > 0) continue;
    int status = pclose(pipe);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

// status -1: any but 0.
static void expect_bug(const char* environment, const char* name, int status, const char* message,
                       const char* kernel) {
    static char output[65536];
    int found = run_planted(environment, name, output, sizeof output);
    bool ok = (status < 0 ? found != 0 : found == status) && strstr(output, message) &&
              strstr(output, kernel);
    char what[256];
    snprintf(what, sizeof what, "planted %s: %s", name, message);
    if (!test_true(what, ok)) printf("exit status %d, wanted %d\n%.2000s", found, status, output);
}

static void test_planted(void) {
    static char output[65536];
    for (const char* environment : {"", "HOST_SCHED=reverse", "HOST_SCHED=7", "HOST_STREAMS=lazy",
                                    "HOST_LEAKS=1", "HOST_THREADS=2", "HOST_ASYNC=early"}) {
        int status = run_planted(environment, "none", output, sizeof output);
        char what[80];
        snprintf(what, sizeof what, "nothing planted, silence (%s)", environment);
        if (!test_true(what, status == 0 && !output[0])) printf("%d: %.2000s", status, output);
    }
    const char* e = "";
    expect_bug(e, "two_barriers", 70, "divergent barrier", "kernel planted_two_barriers_kernel");
    expect_bug(e, "two_barriers", 70, "planted.cu:", "thread (64,0,0)");
    expect_bug(e, "deadlock", 70, "deadlock", "threads 0-39 wait in __syncthreads at");
    expect_bug(e, "deadlock", 70, "threads 40-63 wait in a warp vote", "planted_deadlock_kernel");
    expect_bug(e, "exited_lane", 70, "names lanes 00000001 that have exited",
               "kernel planted_exited_lane_kernel, block (0,0,0), thread (1,0,0)");
    expect_bug(e, "late_exit", 70, "thread exits while lanes", "planted_late_exit_kernel");
    expect_bug(e, "absent_lanes", 70, "names lanes ffffff00", "planted_absent_lanes_kernel");
    expect_bug(e, "two_operations", 70, "wait in __shfl_xor_sync, this one came to a warp vote",
               "planted_two_operations_kernel");
    expect_bug(e, "two_shuffles", 70, "wait in __shfl_xor_sync, this one came to __shfl_down_sync",
               "planted_two_shuffles_kernel");
    expect_bug(e, "foreign_mask", 70, "lane 16 is not in its own mask", "foreign_mask_kernel");
    expect_bug(e, "no_threads", 70, "block of (0,1,1)", "kernel planted_plain_kernel");
    expect_bug(e, "many_threads", 70, "block of (32,32,2)", "kernel planted_plain_kernel");
    expect_bug(e, "deep_block", 70, "block of (1,1,65)", "kernel planted_plain_kernel");
    expect_bug(e, "no_blocks", 70, "grid of (0,1,1)", "kernel planted_plain_kernel");
    expect_bug(e, "many_blocks", 70, "grid of (1,65536,1)", "kernel planted_plain_kernel");
    expect_bug(e, "much_shared", 70, "232449 bytes of shared memory", "planted_plain_kernel");
    expect_bug(e, "misaligned", 70, "misaligned vector access", "planted_misaligned_kernel");
    expect_bug(e, "async_none", 70, "pending cp.async", "planted_async_kernel");
    expect_bug(e, "async_weak", 1, "wrong numbers", "");
    expect_bug("HOST_LEAKS=1", "leak", 70, "leak: 2048 bytes from cudaMalloc call 3", "");
    expect_bug("HOST_SCHED=x7", "blocks", 70, "HOST_SCHED is 'x7'", "");
    expect_bug("HOST_PROFILE=1", "none", 0, " outside kernels", "planted_reuse_kernel");
    expect_bug("HOST_THREADS=0", "none", 70, "HOST_THREADS is '0'", "");
    expect_bug("HOST_STREAMS=later", "none", 70, "HOST_STREAMS is 'later'", "");
#if defined(HOST_ASAN)
    expect_bug(e, "static_shared", -1, "global-buffer-overflow", "planted_static_kernel");
    expect_bug(e, "dynamic_shared", -1, "heap-buffer-overflow", "planted_dynamic_kernel");
    expect_bug(e, "global_after", -1, "heap-buffer-overflow", "planted_global_kernel");
    expect_bug(e, "global_before", -1, "heap-buffer-overflow", "planted_global_kernel");
#else
#if !defined(HOST_TSAN)
    expect_bug(e, "wild", 70, "memory fault at address 0x1000",
               "planted_wild_kernel, block (0,0,0), thread (37");
    expect_bug(e, "stack", 70, "stack overflow", "planted_stack_kernel");
#endif
    expect_bug(e, "global_after", 70, "1 bytes past the end of an allocation of 2048 bytes", "");
    expect_bug(e, "global_before", 70, "1 bytes before an allocation of 2048 bytes", "");
#endif
#if defined(HOST_TSAN)
    for (const char* schedule : {"", "HOST_SCHED=reverse", "HOST_SCHED=1"}) {
        expect_bug(schedule, "barrier", -1, "data race", "planted_barrier_kernel");
        expect_bug(schedule, "reuse", -1, "data race", "planted_reuse_kernel");
        expect_bug(schedule, "syncwarp", -1, "data race", "planted_syncwarp_kernel");
    }
    expect_bug("HOST_INTERBLOCK=1", "blocks", -1, "data race", "planted_blocks_kernel");
#else
    expect_bug(e, "barrier", 1, "wrong numbers", "");
    expect_bug(e, "reuse", 1, "wrong numbers", "");
#endif
    int caught = 0;
    for (int seed = 1; seed <= 8; seed++) {
        char environment[64];
        snprintf(environment, sizeof environment, "HOST_STREAMS=lazy HOST_SCHED=%d", seed);
        caught += run_planted(environment, "streams", output, sizeof output) == 1;
    }
    test_true("planted streams: wrong numbers in some of 8 lazy orders", caught > 0);
    test_true("planted streams: right numbers in order",
              run_planted("", "streams", output, sizeof output) == 0);
}

// ---- profile -------------------------------------------------------------------------------

static void test_profile(void) {
    const HostProfileRow* rows;
    int* count = ints(64);
    unsigned* bad = (unsigned*)ints(1);
    host_set_schedule(NULL);
    launch<place_kernel>(dim3(1), dim3(64), 0, 0, count, bad);     // makes its stacks
    host_profile(true);
    for (int i = 0; i < 3; i++) launch<place_kernel>(dim3(1), dim3(64), 0, 0, count, bad);
    double begin = host_profile_begin();
    while (host_profile_begin() < begin + 2e-2) {
    }
    host_profile_end("a library", begin);
    int n = host_profile_rows(&rows);
    test_true("a row per name, the longest first",
              n == 2 && !strcmp(rows[0].name, "a library") && !strcmp(rows[1].name, "place_kernel"));
    test_true("calls", rows[0].calls == 1 && rows[1].calls == 3);
    test_true("seconds", rows[0].seconds >= 2e-2 && rows[1].seconds > 0 && rows[1].seconds < 1);
    char* text;
    size_t size;
    FILE* out = open_memstream(&text, &size);
    host_profile_print(out);
    fclose(out);
    test_true("the table", strstr(text, "3 ") && strstr(text, "place_kernel\n") &&
                               strstr(text, "outside kernels\n"));
    free(text);
    host_profile(false);
    launch<place_kernel>(dim3(1), dim3(64), 0, 0, count, bad);
    host_profile_end("another", host_profile_begin());
    test_true("off", host_profile_begin() == 0 && host_profile_rows(&rows) == 2);
    host_profile(true);
    test_true("on again: from zero", host_profile_rows(&rows) == 0);
    host_profile(false);
    cudaFree(count), cudaFree(bad);
}

int main(int argc, char** argv) {
    if (argc == 3 && !strcmp(argv[1], "--planted")) return planted_main(argv[2]);
    own_path = argv[0];
    program_name = "test_host";
    test_init(argc, argv);
    if (test_group("place")) test_place();
    if (test_group("schedules")) test_schedules();
    if (test_group("barriers")) test_barriers();
    if (test_group("warp")) test_warp();
    if (test_group("reductions")) test_reductions();
    if (test_group("atomics")) test_atomics();
    if (test_group("shared")) test_shared();
    if (test_group("numbers")) test_numbers();
    if (test_group("streams")) test_streams();
    if (test_group("pool")) test_pool();
    if (test_group("memory")) test_memory();
    if (test_group("profile")) test_profile();
    if (test_group("planted")) test_planted();
    return test_summary();
}
