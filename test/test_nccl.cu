/*
Tests of the host's NCCL (llmc/host/nccl.cpp): every call, type and operation against loops that
add in the order that nccl.h promises, to the bit, on any number of ranks.

    test_nccl [filter] [--verbose]                 one rank without MPI; also the planted bugs
    mpirun -np N test_nccl [filter] [--verbose]    the same tests on N ranks; one result for all
    test_nccl --planted NAME                       one bug, alone or under mpirun

Rank 0 prints; a rank with failed checks prints those to stderr. MPI is started here and not by
llmc/ranks.h, so that nothing but the host layer is under test.
*/
#include "llmc/device.cuh"
#include <nccl.h>
#include <mpi.h>
#include <pthread.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "test.h"

static int rank, ranks = 1;
static bool started;            // MPI
static ncclComm_t world;

#define NCCL_CHECK(call)                                                                           \
    do {                                                                                           \
        ncclResult_t nccl_result = (call);                                                         \
        REQUIRE(nccl_result == ncclSuccess, "rank %d: %s: %s (%s)", rank, #call,                   \
                ncclGetErrorString(nccl_result), ncclGetLastError(NULL));                          \
    } while (0)

enum { TYPES = 6, PIECE_BYTES = 1 << 20 };      // of nccl.cpp
static const ncclDataType_t TYPE[TYPES] = {ncclFloat32, ncclBfloat16, ncclFloat64,
                                           ncclInt32,   ncclInt64,    ncclUint8};
static const char* const TYPE_NAMES[TYPES] = {"float32", "bfloat16", "float64",
                                              "int32",   "int64",    "uint8"};

static size_t size_of(ncclDataType_t type) {
    switch (type) {
        case ncclUint8: return 1;
        case ncclBfloat16: return 2;
        case ncclInt32:
        case ncclFloat32: return 4;
        default: return 8;
    }
}

static char* device_bytes(size_t bytes) {
    char* p;
    CUDA_CHECK(cudaMalloc(&p, bytes ? bytes : 1));
    return p;
}

static ncclUniqueId shared_id(void) {
    ncclUniqueId id;
    NCCL_CHECK(ncclGetUniqueId(&id));
    if (started) MPI_Bcast(&id, sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD);
    return id;
}

static ncclComm_t comm_new(void) {
    ncclComm_t comm;
    NCCL_CHECK(ncclCommInitRank(&comm, ranks, shared_id(), rank));
    return comm;
}

static void sleep_ms(long ms) {
    struct timespec t = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&t, NULL);
}

// ---- inputs and loops in the promised order -------------------------------------------------

// Element i of a rank. Floats of many magnitudes: another order of a sum gives other bits.
static void element_make(void* out, ncclDataType_t type, uint64_t seed, int from, size_t i) {
    uint64_t bits = test_random(seed * 1000 + (uint64_t)from, i);
    double x = (double)(int64_t)bits * 0x1p-63 * (double)(1u << bits % 16);
    float f = type == ncclBfloat16 ? test_round_bf16(x) : (float)x;
    uint16_t upper;
    memcpy(&upper, (char*)&f + 2, 2);
    if (type == ncclFloat32) memcpy(out, &f, 4);
    else if (type == ncclFloat64) memcpy(out, &x, 8);
    else if (type == ncclBfloat16) memcpy(out, &upper, 2);
    else memcpy(out, &bits, size_of(type));
}

static double real_of(const void* p, ncclDataType_t type) {
    float f = 0;
    double d;
    if (type == ncclFloat64) {
        memcpy(&d, p, 8);
        return d;
    }
    if (type == ncclFloat32) memcpy(&f, p, 4);
    else memcpy((char*)&f + 2, p, 2);
    return f;
}

static uint64_t whole_of(const void* p, ncclDataType_t type) {
    int32_t i;
    uint64_t u = 0;
    memcpy(&i, p, 4 < size_of(type) ? 4 : size_of(type));
    memcpy(&u, p, size_of(type));
    return type == ncclInt32 ? (uint64_t)(int64_t)i : u;
}

// a = a op b
static void element_combine(void* a, const void* b, ncclDataType_t type, ncclRedOp_t op) {
    if (type == ncclFloat32 || type == ncclFloat64 || type == ncclBfloat16) {
        double x = real_of(a, type), y = real_of(b, type);
        bool first = op == ncclMax ? x >= y : x <= y;
        double z = op == ncclSum ? x + y : first ? x : y;
        float f = (float)z;                 // one rounding: a double holds the sum of two floats,
        if (type == ncclFloat32) memcpy(a, &f, 4);      // or enough of it
        if (type == ncclFloat64) memcpy(a, &z, 8);
        if (type == ncclBfloat16) {
            f = test_round_bf16(f);
            memcpy(a, (char*)&f + 2, 2);
        }
        return;
    }
    uint64_t x = whole_of(a, type), y = whole_of(b, type);
    bool more = type == ncclUint8 ? x > y : (int64_t)x > (int64_t)y;
    uint64_t z = op == ncclSum ? x + y : more == (op == ncclMax) ? x : y;
    memcpy(a, &z, size_of(type));
}

// Element i summed from rank last + 1 round the ring to rank last, of n ranks.
static void element_reduce(void* out, ncclDataType_t type, ncclRedOp_t op, uint64_t seed, int last,
                           int n, size_t i) {
    element_make(out, type, seed, (last + 1) % n, i);
    for (int k = 2; k <= n; k++) {
        char next[8];
        element_make(next, type, seed, (last + k) % n, i);
        element_combine(out, next, type, op);
    }
}

static void fill_elements(char* p, ncclDataType_t type, uint64_t seed, int from, size_t begin,
                          size_t n) {
    for (size_t i = 0; i < n; i++) {
        element_make(p + i * size_of(type), type, seed, from, begin + i);
    }
}

// ---- one call against the loops -------------------------------------------------------------

typedef struct {
    int kind;
    ncclDataType_t type;
    ncclRedOp_t op;
    size_t count;
    int root;
    bool in_place;
} Case;

static ncclResult_t case_call(const Case* c, const char* send, char* recv, ncclComm_t comm,
                              cudaStream_t s) {
    switch (c->kind) {
        case HOST_NCCL_ALL_REDUCE:
            return ncclAllReduce(send, recv, c->count, c->type, c->op, comm, s);
        case HOST_NCCL_REDUCE:
            return ncclReduce(send, recv, c->count, c->type, c->op, c->root, comm, s);
        case HOST_NCCL_REDUCE_SCATTER:
            return ncclReduceScatter(send, recv, c->count, c->type, c->op, comm, s);
        case HOST_NCCL_ALL_GATHER: return ncclAllGather(send, recv, c->count, c->type, comm, s);
        default: return ncclBroadcast(send, recv, c->count, c->type, c->root, comm, s);
    }
}

// The bytes that this rank sends, by the formulas of nccl.h.
static uint64_t case_bytes(const Case* c, int me, int n) {
    uint64_t bytes = c->count * size_of(c->type), others = (uint64_t)n - 1;
    switch (c->kind) {
        case HOST_NCCL_ALL_REDUCE:
            return 2 * others * ((c->count + (size_t)n - 1) / (size_t)n) * size_of(c->type);
        case HOST_NCCL_REDUCE: return me == c->root ? 0 : bytes;
        case HOST_NCCL_BROADCAST: return me == c->root ? others * bytes : 0;
        default: return others * bytes;
    }
}

// A call of `me` among the n ranks of comm: memory before and after, and what must be there.
typedef struct {
    size_t send_bytes, recv_bytes, recv_at;     // recv_at: of the result in the buffer compared
    char *send, *recv, *before, *want;
    bool in_place;
} Buffers;

static void case_want(const Case* c, char* out, uint64_t seed, int me, int n) {
    size_t size = size_of(c->type), chunk = (c->count + (size_t)n - 1) / (size_t)n;
    for (size_t i = 0; i < c->count; i++) {
        char* p = out + i * size;
        if (c->kind == HOST_NCCL_ALL_REDUCE) {
            element_reduce(p, c->type, c->op, seed, (int)(i / chunk), n, i);
        } else if (c->kind == HOST_NCCL_REDUCE && me == c->root) {
            element_reduce(p, c->type, c->op, seed, me, n, i);
        } else if (c->kind == HOST_NCCL_REDUCE_SCATTER) {
            element_reduce(p, c->type, c->op, seed, me, n, (size_t)me * c->count + i);
        } else if (c->kind == HOST_NCCL_BROADCAST) {
            element_make(p, c->type, seed, c->root, i);
        }
    }
    for (int r = 0; r < n && c->kind == HOST_NCCL_ALL_GATHER; r++) {
        fill_elements(out + (size_t)r * c->count * size, c->type, seed, r, 0, c->count);
    }
}

static Buffers buffers_make(const Case* c, uint64_t seed, int me, int n) {
    Buffers b = {};
    size_t bytes = c->count * size_of(c->type), own = (size_t)me * bytes;
    b.in_place = c->in_place;
    b.send_bytes = b.recv_bytes = bytes;
    if (c->kind == HOST_NCCL_REDUCE_SCATTER) b.send_bytes *= (size_t)n;
    if (c->kind == HOST_NCCL_ALL_GATHER) b.recv_bytes *= (size_t)n;
    size_t most = b.send_bytes > b.recv_bytes ? b.send_bytes : b.recv_bytes;
    b.send = device_bytes(b.in_place ? most : b.send_bytes);
    b.recv = b.in_place ? b.send : device_bytes(b.recv_bytes);
    if (b.in_place && c->kind == HOST_NCCL_ALL_GATHER) b.send += own;
    if (b.in_place && c->kind == HOST_NCCL_REDUCE_SCATTER) b.recv += own;
    memset(b.recv, 0x5a, b.recv_bytes);
    fill_elements(b.send, c->type, seed, me, 0, b.send_bytes / size_of(c->type));
    // want: all of the memory of recv, or of both if they are one
    char* base = b.in_place && b.send < b.recv ? b.send : b.recv;
    size_t all = b.in_place ? most : b.recv_bytes;
    b.before = (char*)test_calloc(b.send_bytes, 1);
    b.want = (char*)test_calloc(all, 1);
    memcpy(b.before, b.send, b.send_bytes);
    memcpy(b.want, base, all);
    b.recv_at = (size_t)(b.recv - base);
    case_want(c, b.want + b.recv_at, seed, me, n);
    return b;
}

static void buffers_check(const char* name, Buffers* b) {
    size_t all = b->recv_at + b->recv_bytes;
    if (b->in_place && b->send_bytes > all) all = b->send_bytes;
    test_same_bits(name, b->recv - b->recv_at, b->want, all);
    if (!b->in_place) test_same_bits("the source stays", b->send, b->before, b->send_bytes);
    char* base = b->recv - b->recv_at;
    if (!b->in_place) CUDA_CHECK(cudaFree(b->send));
    CUDA_CHECK(cudaFree(base));
    free(b->before);
    free(b->want);
}

static void case_name(char* name, size_t size, const Case* c) {
    int type = 0;
    while (TYPE[type] != c->type) type++;
    snprintf(name, size, "%s %s op %d count %zu root %d%s", host_nccl_kind_name(c->kind),
             TYPE_NAMES[type], c->op, c->count, c->root, c->in_place ? " in place" : "");
}

static void case_test(const Case* c, ncclComm_t comm, cudaStream_t s) {
    int me, n;
    uint64_t seed = c->count * 7 + (uint64_t)c->kind;   // the same on all ranks
    char name[128];
    NCCL_CHECK(ncclCommUserRank(comm, &me));
    NCCL_CHECK(ncclCommCount(comm, &n));
    case_name(name, sizeof name, c);
    Buffers b = buffers_make(c, seed, me, n);
    HostNcclTraffic before, after;
    host_nccl_traffic(&before);
    NCCL_CHECK(case_call(c, b.send, b.recv, comm, s));
    host_nccl_traffic(&after);
    CUDA_CHECK(cudaStreamSynchronize(s));
    uint64_t bytes = case_bytes(c, me, n);
    if (after.bytes - before.bytes != bytes || after.calls - before.calls != 1 ||
        after.kind_bytes[c->kind] - before.kind_bytes[c->kind] != bytes) {
        printf("FAIL  %s: sent %llu bytes, wanted %llu\n", name,
               (unsigned long long)(after.bytes - before.bytes), (unsigned long long)bytes);
        test_record(false, 0);
    } else {
        test_record(true, 0);
    }
    buffers_check(name, &b);
}

static const int COLLECTIVES[] = {HOST_NCCL_ALL_REDUCE, HOST_NCCL_REDUCE, HOST_NCCL_REDUCE_SCATTER,
                                  HOST_NCCL_ALL_GATHER, HOST_NCCL_BROADCAST};

static bool kind_sums(int kind) {
    return kind <= HOST_NCCL_REDUCE_SCATTER;
}

static void test_collectives(ncclComm_t comm, const size_t* counts, int count_n) {
    int n;
    NCCL_CHECK(ncclCommCount(comm, &n));
    for (int kind : COLLECTIVES) {
        for (int t = 0; t < TYPES; t++) {
            for (int k = 0; k < count_n; k++) {
                for (int place = 0; place < 2; place++) {
                    int root = (k + t) % n;
                    Case c = {kind, TYPE[t], ncclSum, counts[k], root, place == 1};
                    case_test(&c, comm, 0);
                    if (!kind_sums(kind) || counts[k] > 40) continue;
                    c.op = ncclMax;
                    case_test(&c, comm, 0);
                    c.op = ncclMin;
                    case_test(&c, comm, 0);
                }
            }
        }
    }
}

// Around the multiples of N, and none at all.
static void test_calls(void) {
    const size_t counts[] = {0, 1, (size_t)ranks, (size_t)ranks + 1, 37, 1003};
    test_collectives(world, counts, 6);
}

// More than a piece, by a bit and by several.
static void test_pieces(void) {
    for (int kind : COLLECTIVES) {
        size_t chunk = PIECE_BYTES / 8 + 3;
        if (kind == HOST_NCCL_ALL_REDUCE) chunk = chunk * (size_t)ranks - 2;
        Case c = {kind, ncclFloat64, ncclSum, chunk, ranks - 1, kind % 2 == 0};
        case_test(&c, world, 0);
    }
    Case exact = {HOST_NCCL_REDUCE_SCATTER, ncclUint8, ncclSum, 2 * PIECE_BYTES, 0, false};
    case_test(&exact, world, 0);
}

// ---- the order of sums ----------------------------------------------------------------------

// That the loops of this file see the difference: with other orders and roundings, other bits.
static void test_order(void) {
    const size_t n = 1000;
    int order = 0, rounding = 0, promised = 0;
    for (size_t i = 0; i < n; i++) {
        float ring, other, x[64];
        element_reduce(&ring, ncclFloat32, ncclSum, 5, 0, ranks, i);
        element_reduce(&other, ncclFloat32, ncclSum, 5, ranks - 1, ranks, i);
        order += ring != other;
        for (int r = 0; r < ranks && r < 64; r++) element_make(&x[r], ncclFloat32, 5, r, i);
        float sum = x[1 % ranks];
        for (int r = 2; r <= ranks; r++) sum += x[r % ranks];
        promised += ring != sum;
        uint16_t hops;
        element_reduce(&hops, ncclBfloat16, ncclSum, 5, 0, ranks, i);
        float once = 0, got = 0;
        for (int k = 1; k <= ranks; k++) {
            uint16_t v;
            float f = 0;
            element_make(&v, ncclBfloat16, 5, k % ranks, i);
            memcpy((char*)&f + 2, &v, 2);
            once += f;
        }
        memcpy((char*)&got + 2, &hops, 2);
        rounding += got != test_round_bf16(once);
    }
    test_check("the loops add float32 in the order x[1] + ... + x[0]", promised, 0);
    test_true("another order has other bits", ranks < 3 || order > 0);
    test_true("rounding at every hop has other bits than once", ranks < 3 || rounding > 0);

    // 1 + 2^-8 is half way and goes down to 1 each time: in float the sum would be 1 + (N-1) 2^-8.
    char* p = device_bytes(2);
    uint16_t one = 0x3f80, small = 0x3b80;
    memcpy(p, rank == 1 % ranks ? &one : &small, 2);
    NCCL_CHECK(ncclReduce(p, p, 1, ncclBfloat16, ncclSum, 0, world, 0));
    CUDA_CHECK(cudaDeviceSynchronize());
    if (rank == 0) test_true("bf16 hops round to 1", !memcmp(p, &one, 2));

    CUDA_CHECK(cudaFree(p));

    // NaN in one rank: first, last and in the middle of the sums, as there are as many as ranks.
    size_t n_f = (size_t)ranks;
    float* f;
    int wrong = 0;
    CUDA_CHECK(cudaMalloc(&f, 3 * n_f * sizeof *f));
    for (size_t i = 0; i < 3 * n_f; i++) {
        f[i] = rank == ranks - 1 && ranks > 1 ? NAN : (float)(rank + 1);
    }
    NCCL_CHECK(ncclAllReduce(f, f, n_f, ncclFloat32, ncclMax, world, 0));
    NCCL_CHECK(ncclAllReduce(f + n_f, f + n_f, n_f, ncclFloat32, ncclMin, world, 0));
    NCCL_CHECK(ncclAllReduce(f + 2 * n_f, f + 2 * n_f, n_f, ncclFloat32, ncclSum, world, 0));
    CUDA_CHECK(cudaDeviceSynchronize());
    for (size_t i = 0; i < n_f; i++) {
        wrong += f[i] != (ranks > 1 ? (float)(ranks - 1) : 1) || f[n_f + i] != 1;
        wrong += ranks > 1 ? !isnan(f[2 * n_f + i]) : f[2 * n_f + i] != 1;
    }
    test_check("max and min pass over NaN, a sum keeps it", wrong, 0);
    CUDA_CHECK(cudaFree(f));
}

// Ranks arrive in other orders; the bits stay.
static void test_repeat(void) {
    const size_t n = 4099;
    size_t bytes = n * 4;
    float *x, *y, *first = (float*)test_calloc(n, 4);
    CUDA_CHECK(cudaMalloc(&x, bytes));
    CUDA_CHECK(cudaMalloc(&y, bytes));
    fill_elements((char*)x, ncclFloat32, 77, rank, 0, n);
    for (int run = 0; run < 4; run++) {
        sleep_ms((long)(test_random(run, (uint64_t)rank) % 20));
        NCCL_CHECK(ncclAllReduce(x, y, n, ncclFloat32, ncclSum, world, 0));
        CUDA_CHECK(cudaDeviceSynchronize());
        if (run == 0) memcpy(first, y, bytes);
        test_same_bits("an all-reduce again", first, y, bytes);
    }
    if (ranks > 1) {
        MPI_Bcast(first, (int)bytes, MPI_BYTE, 0, MPI_COMM_WORLD);
        test_same_bits("equal bits on all ranks", first, y, bytes);
    }
    CUDA_CHECK(cudaFree(x));
    CUDA_CHECK(cudaFree(y));
    free(first);
}

// ---- sends, groups --------------------------------------------------------------------------

// Round the ring, `hops` at once, and everybody to everybody, oneself included.
static void test_pairs(void) {
    const size_t most = PIECE_BYTES + 40;
    const size_t counts[] = {0, 1, 5, 1003, most};
    char *out = device_bytes(most), *in = device_bytes(most), *want = (char*)test_calloc(most, 1);
    int next = (rank + 1) % ranks, before = (rank + ranks - 1) % ranks;
    HostNcclTraffic traffic;
    host_nccl_traffic_reset();
    uint64_t bytes = 0;
    for (size_t count : counts) {
        fill_elements(out, ncclUint8, count, rank, 0, count);
        memset(in, 1, most);
        memset(want, 1, most);
        fill_elements(want, ncclUint8, count, before, 0, count);
        NCCL_CHECK(ncclGroupStart());
        // The order of a send and a receive in a group means nothing.
        if (rank % 2) NCCL_CHECK(ncclSend(out, count, ncclUint8, next, world, 0));
        NCCL_CHECK(ncclRecv(in, count, ncclUint8, before, world, 0));
        if (rank % 2 == 0) NCCL_CHECK(ncclSend(out, count, ncclUint8, next, world, 0));
        NCCL_CHECK(ncclGroupEnd());
        CUDA_CHECK(cudaDeviceSynchronize());
        test_same_bits("a ring of sends and receives", in, want, most);
        if (ranks > 1) bytes += count;
    }
    host_nccl_traffic(&traffic);
    test_true("bytes of sends, none of receives",
              traffic.bytes == bytes && traffic.kind_bytes[HOST_NCCL_SEND] == bytes &&
                  traffic.kind_calls[HOST_NCCL_SEND] == 5 && traffic.calls == 10);
    CUDA_CHECK(cudaFree(out));
    CUDA_CHECK(cudaFree(in));
    free(want);

    // Rank r sends 3r + q + 1 elements to q, twice with other numbers: they may not be confused.
    size_t room = 4 * (size_t)ranks + 4;
    double *to, *from, expected;
    CUDA_CHECK(cudaMalloc(&to, 2 * (size_t)ranks * room * 8));
    CUDA_CHECK(cudaMalloc(&from, 2 * (size_t)ranks * room * 8));
    int wrong = 0;
    NCCL_CHECK(ncclGroupStart());
    for (int k = 0; k < 2; k++) {
        for (int q = 0; q < ranks; q++) {
            size_t at = (size_t)(k * ranks + q) * room;
            size_t there = (size_t)(3 * rank + q + 1), here = (size_t)(3 * q + rank + 1);
            for (size_t i = 0; i < there; i++) to[at + i] = 1e6 * k + 1e4 * rank + 100.0 * q + i;
            NCCL_CHECK(ncclSend(to + at, there, ncclFloat64, q, world, 0));
            NCCL_CHECK(ncclRecv(from + at, here, ncclFloat64, q, world, 0));
        }
    }
    NCCL_CHECK(ncclGroupEnd());
    CUDA_CHECK(cudaDeviceSynchronize());
    for (int k = 0; k < 2; k++) {
        for (int q = 0; q < ranks; q++) {
            for (size_t i = 0; i < (size_t)(3 * q + rank + 1); i++) {
                expected = 1e6 * k + 1e4 * q + 100.0 * rank + i;
                wrong += from[(size_t)(k * ranks + q) * room + i] != expected;
            }
        }
    }
    test_check("all to all, twice in one group", wrong, 0);

    // First collective and first send of a communicator, in other orders: they may not be confused.
    ncclComm_t fresh = comm_new();
    for (int i = 0; i < 4; i++) to[i] = rank + 0.5 * i;
    NCCL_CHECK(ncclGroupStart());
    for (int k = 0; k < 2; k++) {
        if (k == rank % 2) {
            NCCL_CHECK(ncclAllReduce(to, from, 1, ncclFloat64, ncclSum, fresh, 0));
        } else {
            NCCL_CHECK(ncclSend(to + 1, 1, ncclFloat64, next, fresh, 0));
            NCCL_CHECK(ncclRecv(from + 1, 1, ncclFloat64, before, fresh, 0));
        }
    }
    NCCL_CHECK(ncclGroupEnd());
    CUDA_CHECK(cudaDeviceSynchronize());
    test_true("a collective and sends in one group",
              from[0] == ranks * (ranks - 1) / 2 && from[1] == before + 0.5);
    NCCL_CHECK(ncclCommDestroy(fresh));

    // Outside of a group, one after the other: a line of ranks.
    float* x;
    CUDA_CHECK(cudaMalloc(&x, 4));
    *x = 1;
    if (rank > 0) NCCL_CHECK(ncclRecv(x, 1, ncclFloat32, rank - 1, world, 0));
    CUDA_CHECK(cudaDeviceSynchronize());
    *x += 1;
    if (rank + 1 < ranks) NCCL_CHECK(ncclSend(x, 1, ncclFloat32, rank + 1, world, 0));
    CUDA_CHECK(cudaDeviceSynchronize());
    test_true("a line of sends", *x == (float)(rank + 2));
    CUDA_CHECK(cudaFree(x));
    CUDA_CHECK(cudaFree(to));
    CUDA_CHECK(cudaFree(from));
}

static void test_groups(void) {
    enum { CALLS = 10 };
    Buffers b[CALLS];
    Case c[CALLS];
    char name[128];
    for (int form = 0; form < 3; form++) {
        // 0: one group on all ranks; 1: one on odd ranks, single calls on even ones; 2: nested
        bool grouped = form != 1 || rank % 2;
        if (grouped) NCCL_CHECK(ncclGroupStart());
        for (int i = 0; i < CALLS; i++) {
            c[i] = Case{COLLECTIVES[i % 5], TYPE[i % TYPES], ncclSum, (size_t)(100 * i + 3),
                        i % ranks, i % 3 == 0};
            b[i] = buffers_make(&c[i], (uint64_t)(1000 * form + i), rank, ranks);
            if (form == 2) NCCL_CHECK(ncclGroupStart());
            NCCL_CHECK(case_call(&c[i], b[i].send, b[i].recv, world, 0));
            if (form == 2) NCCL_CHECK(ncclGroupEnd());
        }
        if (grouped) {
            char* p = b[1].recv;        // a Reduce's: its root is rank 1
            test_true("nothing happens before ncclGroupEnd",
                      rank != 1 % ranks || p[0] == 0x5a);
            NCCL_CHECK(ncclGroupEnd());
        }
        CUDA_CHECK(cudaDeviceSynchronize());
        for (int i = 0; i < CALLS; i++) {
            case_name(name, sizeof name, &c[i]);
            buffers_check(name, &b[i]);
        }
    }
    test_true("an empty group", ncclGroupStart() == ncclSuccess && ncclGroupEnd() == ncclSuccess);
    test_true("ncclGroupEnd alone", ncclGroupEnd() == ncclInvalidUsage);
}

// ---- communicators --------------------------------------------------------------------------

static void test_split(void) {
    ncclComm_t half = NULL, some = NULL, self = NULL, again = NULL;
    int n = -1, me = -1;
    const size_t counts[] = {37};
    // Odd and even ranks, in reverse order.
    NCCL_CHECK(ncclCommSplit(world, rank % 2, -rank, &half, NULL));
    int members = rank % 2 ? ranks / 2 : (ranks + 1) / 2;
    NCCL_CHECK(ncclCommCount(half, &n));
    NCCL_CHECK(ncclCommUserRank(half, &me));
    test_true("size and rank of a half", n == members && me == members - 1 - rank / 2);
    test_collectives(half, counts, 1);
    // All but the last rank, and what is split from that.
    bool in = rank < ranks - 1 || ranks == 1;
    NCCL_CHECK(ncclCommSplit(world, in ? 7 : NCCL_SPLIT_NOCOLOR, 0, &some, NULL));
    test_true("no color, no communicator", (some != NULL) == in);
    if (in) {
        NCCL_CHECK(ncclCommUserRank(some, &me));
        test_true("equal keys keep the order", me == rank);
        test_collectives(some, counts, 1);
        NCCL_CHECK(ncclCommSplit(some, rank, 0, &self, NULL));
        NCCL_CHECK(ncclCommCount(self, &n));
        test_true("alone", n == 1);
        test_collectives(self, counts, 1);
    }
    // Both at once, and the whole world between.
    again = comm_new();
    float *x;
    CUDA_CHECK(cudaMalloc(&x, 3 * 4));
    for (int k = 0; k < 3; k++) x[k] = (float)(rank + 1);
    NCCL_CHECK(ncclGroupStart());
    NCCL_CHECK(ncclAllReduce(x, x, 1, ncclFloat32, ncclSum, half, 0));
    NCCL_CHECK(ncclAllReduce(x + 1, x + 1, 1, ncclFloat32, ncclSum, world, 0));
    NCCL_CHECK(ncclAllReduce(x + 2, x + 2, 1, ncclFloat32, ncclMax, again, 0));
    NCCL_CHECK(ncclGroupEnd());
    CUDA_CHECK(cudaDeviceSynchronize());
    int sum = 0;
    for (int r = rank % 2; r < ranks; r += 2) sum += r + 1;
    test_true("three communicators in a group",
              x[0] == (float)sum && x[1] == (float)(ranks * (ranks + 1) / 2) &&
                  x[2] == (float)ranks);
    CUDA_CHECK(cudaFree(x));
    NCCL_CHECK(ncclCommFinalize(half));
    NCCL_CHECK(ncclCommDestroy(half));
    NCCL_CHECK(ncclCommDestroy(again));
    if (in) NCCL_CHECK(ncclCommDestroy(self));
    if (in) NCCL_CHECK(ncclCommDestroy(some));
    NCCL_CHECK(ncclCommDestroy(NULL));
}

// ---- errors ---------------------------------------------------------------------------------

static void error_is(ncclResult_t got, ncclResult_t want, const char* text) {
    const char* found = ncclGetLastError(NULL);
    if (got == want && strstr(found, text)) {
        test_record(true, 0);
        return;
    }
    printf("FAIL  wanted %s and \"%s\", got %s and \"%s\"\n", ncclGetErrorString(want), text,
           ncclGetErrorString(got), found);
    test_record(false, 0);
}

static void test_errors(void) {
    const ncclResult_t argument = ncclInvalidArgument, usage = ncclInvalidUsage;
    const ncclDataType_t f32 = ncclFloat32, half = (ncclDataType_t)6, none = (ncclDataType_t)99;
    const ncclRedOp_t product = (ncclRedOp_t)1;
    float* x;
    int n;
    ncclComm_t comm;
    ncclUniqueId id = shared_id(), other;
    CUDA_CHECK(cudaMalloc(&x, 400));
    error_is(ncclAllReduce(NULL, x, 1, f32, ncclSum, world, 0), argument, "source is NULL");
    error_is(ncclAllReduce(x, NULL, 1, f32, ncclSum, world, 0), argument, "destination is NULL");
    error_is(ncclAllReduce(x, x, 1, half, ncclSum, world, 0), argument, "data type 6");
    error_is(ncclBroadcast(x, x, 1, none, 0, world, 0), argument, "data type 99");
    error_is(ncclReduce(x, x, 1, f32, product, 0, world, 0), argument, "operation 1");
    error_is(ncclReduce(x, x, 1, f32, ncclSum, ranks, world, 0), argument, "ncclReduce: root");
    error_is(ncclBroadcast(x, x, 1, f32, -1, world, 0), argument, "root -1");
    error_is(ncclSend(x, 1, f32, ranks, world, 0), argument, "ncclSend: peer");
    error_is(ncclRecv(x, 1, f32, -1, world, 0), argument, "peer -1");
    error_is(ncclAllGather(x, x, 1, f32, NULL, 0), argument, "ncclAllGather: the communicator");
    error_is(ncclAllReduce((char*)x + 2, (char*)x + 2, 1, f32, ncclSum, world, 0), argument,
             "not aligned to the 4 bytes of float32");
    error_is(ncclAllReduce(x, x, SIZE_MAX / 4, f32, ncclSum, world, 0), argument, "count 4611");
    error_is(ncclCommInitRank(&comm, ranks, id, ranks), argument, "ranks");
    error_is(ncclCommInitRank(&comm, 0, id, 0), argument, "rank 0 of 0 ranks");
    error_is(ncclCommInitRank(&comm, ranks + 1, id, rank), usage,
             started ? "MPI started this process" : "MPI was not started");
    error_is(ncclCommInitRank(NULL, ranks, id, rank), argument, "comm is NULL");
    error_is(ncclCommSplit(world, -5, 0, &comm, NULL), argument, "color -5");
    error_is(ncclCommSplit(world, 0, 0, NULL, NULL), argument, "new communicator is NULL");
    error_is(ncclCommCount(NULL, &n), argument, "ncclCommCount");
    error_is(ncclCommCount(world, NULL), argument, "result is NULL");
    error_is(ncclGetUniqueId(NULL), argument, "ncclGetUniqueId");
    error_is(ncclGetVersion(NULL), argument, "ncclGetVersion");
    if (ranks > 1) {
        error_is(ncclCommInitRank(&comm, ranks, id, (rank + 1) % ranks), usage, "as rank");
        NCCL_CHECK(ncclGetUniqueId(&other));
        if (rank != ranks - 1) other = id;
        error_is(ncclCommInitRank(&comm, ranks, other, rank), argument, "different ids");
    }
    // An error within a group drops all of it.
    *x = (float)rank;
    NCCL_CHECK(ncclGroupStart());
    NCCL_CHECK(ncclAllReduce(x, x, 1, f32, ncclSum, world, 0));
    error_is(ncclAllReduce(x, x, 1, half, ncclSum, world, 0), argument, "data type 6");
    test_true("ncclGroupEnd returns it", ncclGroupEnd() == argument);
    CUDA_CHECK(cudaDeviceSynchronize());
    test_true("and nothing was done", *x == (float)rank);
    NCCL_CHECK(ncclAllReduce(x, x, 1, f32, ncclSum, world, 0));
    CUDA_CHECK(cudaDeviceSynchronize());
    test_true("the next call works", *x == (float)(ranks * (ranks - 1) / 2));
    // What is not used may be NULL.
    NCCL_CHECK(ncclReduce(x, rank == 0 ? x : NULL, 1, f32, ncclMax, 0, world, 0));
    NCCL_CHECK(ncclBroadcast(rank == 0 ? x : NULL, x, 1, f32, 0, world, 0));
    NCCL_CHECK(ncclAllReduce(NULL, NULL, 0, f32, ncclSum, world, 0));
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaFree(x));

    int version = 0, device = -1;
    ncclResult_t async = ncclInternalError;
    NCCL_CHECK(ncclGetVersion(&version));
    NCCL_CHECK(ncclCommCuDevice(world, &device));
    NCCL_CHECK(ncclCommGetAsyncError(world, &async));
    test_true("version", version == NCCL_VERSION_CODE && version == NCCL_VERSION(2, 28, 9));
    test_true("device of the communicator", device == rank);
    test_true("no error", async == ncclSuccess);
    NCCL_CHECK(ncclGetUniqueId(&id));
    NCCL_CHECK(ncclGetUniqueId(&other));
    test_true("ids differ", memcmp(&id, &other, sizeof id) != 0 && sizeof id == 128);
    for (int r = 0; r < ncclNumResults; r++) {
        const char* text = ncclGetErrorString((ncclResult_t)r);
        test_true("every result has a text", strcmp(text, "unknown result code") != 0);
    }
}

// ---- streams --------------------------------------------------------------------------------

static __global__ void set_kernel(float* x, float v) {
    x[blockIdx.x * blockDim.x + threadIdx.x] = v;
}

static __global__ void double_kernel(float* out, const float* in) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = 2 * in[i];
}

enum Wait { WAIT_ALL, WAIT_NOT_BEFORE, WAIT_NOT_AFTER };

/* Compute sets x, the communication stream reduces it to y, compute doubles it to z. Returns how
many of z are wrong when the consumer of z has waited, for one of the events left out. */
static int pipeline(Wait wait) {
    const int n = 64;
    cudaStream_t compute, comm_stream;
    cudaEvent_t ready, done;
    float *x, *y, *z;
    CUDA_CHECK(cudaMalloc(&x, n * 4));
    CUDA_CHECK(cudaMalloc(&y, n * 4));
    CUDA_CHECK(cudaMalloc(&z, n * 4));
    for (int i = 0; i < n; i++) x[i] = y[i] = -100;
    CUDA_CHECK(cudaStreamCreateWithFlags(&compute, cudaStreamNonBlocking));
    CUDA_CHECK(cudaStreamCreateWithFlags(&comm_stream, cudaStreamNonBlocking));
    CUDA_CHECK(cudaEventCreate(&ready));
    CUDA_CHECK(cudaEventCreate(&done));
    launch<set_kernel>(1, n, 0, compute, x, (float)(rank + 1));
    CUDA_CHECK(cudaEventRecord(ready, compute));
    if (wait != WAIT_NOT_BEFORE) CUDA_CHECK(cudaStreamWaitEvent(comm_stream, ready, 0));
    NCCL_CHECK(ncclAllReduce(x, y, n, ncclFloat32, ncclSum, world, comm_stream));
    CUDA_CHECK(cudaEventRecord(done, comm_stream));
    if (wait != WAIT_NOT_AFTER) CUDA_CHECK(cudaStreamWaitEvent(compute, done, 0));
    launch<double_kernel>(1, n, 0, compute, z, y);
    CUDA_CHECK(cudaStreamSynchronize(compute));
    int wrong = 0;
    for (int i = 0; i < n; i++) wrong += z[i] != (float)(ranks * (ranks + 1));
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaEventDestroy(ready));
    CUDA_CHECK(cudaEventDestroy(done));
    CUDA_CHECK(cudaStreamDestroy(compute));
    CUDA_CHECK(cudaStreamDestroy(comm_stream));
    CUDA_CHECK(cudaFree(x));
    CUDA_CHECK(cudaFree(y));
    CUDA_CHECK(cudaFree(z));
    return wrong;
}

// A group on two streams is one piece of work, before which both are waited for and for which both
// wait; single calls of one communicator keep their order on any streams.
static int two_streams(void) {
    cudaStream_t s[2];
    float* x;
    float sum = (float)(ranks * (ranks - 1) / 2), n = (float)ranks;
    CUDA_CHECK(cudaMalloc(&x, 4 * 4));
    for (int i = 0; i < 4; i++) x[i] = -100;
    for (int k = 0; k < 2; k++) {
        CUDA_CHECK(cudaStreamCreateWithFlags(&s[k], cudaStreamNonBlocking));
        launch<set_kernel>(1, 1, 0, s[k], x + k, (float)(rank + k));
    }
    NCCL_CHECK(ncclGroupStart());
    NCCL_CHECK(ncclAllReduce(x, x, 1, ncclFloat32, ncclSum, world, s[0]));
    NCCL_CHECK(ncclAllReduce(x + 1, x + 1, 1, ncclFloat32, ncclSum, world, s[1]));
    NCCL_CHECK(ncclGroupEnd());
    launch<double_kernel>(1, 2, 0, s[1], x + 2, x);
    CUDA_CHECK(cudaStreamSynchronize(s[1]));
    int wrong = (x[2] != 2 * sum) + (x[3] != 2 * (sum + n));
    NCCL_CHECK(ncclReduce(x + 2, x + 2, 1, ncclFloat32, ncclSum, 0, world, s[0]));
    NCCL_CHECK(ncclBroadcast(x + 2, x + 3, 1, ncclFloat32, 0, world, s[1]));
    CUDA_CHECK(cudaStreamSynchronize(s[1]));
    wrong += x[3] != 2 * sum * n;
    CUDA_CHECK(cudaDeviceSynchronize());
    for (int k = 0; k < 2; k++) CUDA_CHECK(cudaStreamDestroy(s[k]));
    CUDA_CHECK(cudaFree(x));
    return wrong;
}

static void test_streams(void) {
    for (int lazy = 0; lazy < 2; lazy++) {
        int clean = 0, before = 0, after = 0, both = 0;
        for (int seed = 0; seed < 8; seed++) {
            // Orders differ between the ranks.
            host_set_streams(lazy ? "lazy" : "inorder", (uint64_t)(seed * 100 + rank));
            clean += pipeline(WAIT_ALL);
            both += two_streams();
            before += pipeline(WAIT_NOT_BEFORE) != 0;
            after += pipeline(WAIT_NOT_AFTER) != 0;
        }
        test_check("with both events", clean, 0);
        test_check("a group on two streams", both, 0);
        test_true("a missing wait before the call", lazy ? before > 0 : before == 0);
        test_true("a missing wait after the call", lazy ? after == 8 : after == 0);
    }
    // Nothing is done before something waits.
    host_set_streams("lazy", 3);
    float* x;
    CUDA_CHECK(cudaMalloc(&x, 8));
    x[0] = 1, x[1] = 0;
    NCCL_CHECK(ncclAllReduce(x, x + 1, 1, ncclFloat32, ncclSum, world, 0));
    test_true("lazy: not yet", x[1] == 0);
    x[0] = 2;
    CUDA_CHECK(cudaStreamSynchronize(0));
    test_true("lazy: the source is read late", x[1] == 2.0f * (float)ranks);
    CUDA_CHECK(cudaFree(x));
    const size_t counts[] = {37};
    test_collectives(world, counts, 1);
    test_pairs();
    test_groups();
    test_split();
    const char* mode = getenv("HOST_STREAMS");
    host_set_streams(mode, 0);
}

// ---- abort ----------------------------------------------------------------------------------

static void* abort_later(void* arg) {
    ncclResult_t error = ncclInternalError;
    sleep_ms(100);
    ncclCommGetAsyncError((ncclComm_t)arg, &error);
    ncclCommAbort((ncclComm_t)arg);
    return (void*)(intptr_t)error;
}

// Rank 0 waits in a call that nobody else makes, until another of its threads aborts it.
static void test_abort(void) {
    ncclComm_t comm = comm_new();
    if (rank == 0 && ranks > 1) {
        float* x;
        pthread_t thread;
        void* seen;
        CUDA_CHECK(cudaMalloc(&x, 4));
        pthread_create(&thread, NULL, abort_later, comm);
        ncclResult_t result = ncclAllReduce(x, x, 1, ncclFloat32, ncclSum, comm, 0);
        CUDA_CHECK(cudaDeviceSynchronize());
        pthread_join(thread, &seen);
        if (!host_streams_lazy()) {
            error_is(result, ncclSystemError, "when ncclCommAbort was called");
        }
        test_true("no error before", (intptr_t)seen == ncclSuccess);
        ncclResult_t async = ncclSuccess;
        NCCL_CHECK(ncclCommGetAsyncError(comm, &async));
        test_true("an error after", async == ncclSystemError);
        error_is(ncclAllReduce(x, x, 1, ncclFloat32, ncclSum, comm, 0), ncclSystemError,
                 "of no more use");
        CUDA_CHECK(cudaFree(x));
    } else {
        NCCL_CHECK(ncclCommAbort(comm));
        test_true("aborted", ncclCommFinalize(comm) == ncclSystemError);
    }
    NCCL_CHECK(ncclCommDestroy(comm));
    float* y;
    CUDA_CHECK(cudaMalloc(&y, 4));
    *y = 1;
    NCCL_CHECK(ncclAllReduce(y, y, 1, ncclFloat32, ncclSum, world, 0));
    CUDA_CHECK(cudaDeviceSynchronize());
    test_true("other communicators go on", *y == (float)ranks);
    CUDA_CHECK(cudaFree(y));
}

// ---- devices --------------------------------------------------------------------------------

static void test_devices(void) {
    int count = 0, device = -1;
    char name[64], other[64];
    struct cudaDeviceProp prop;
    CUDA_CHECK(cudaGetDeviceCount(&count));
    CUDA_CHECK(cudaGetDevice(&device));
    test_true("64 devices", count == 64);
    test_true("the one that main took", device == rank);
    test_true("the last one", cudaSetDevice(63) == cudaSuccess);
    CUDA_CHECK(cudaGetDevice(&device));
    test_true("is taken", device == 63);
    test_true("none behind it", cudaSetDevice(64) == cudaErrorInvalidDevice &&
                                    cudaGetDeviceProperties(&prop, 64) == cudaErrorInvalidDevice &&
                                    cudaDeviceGetPCIBusId(name, 64, 64) == cudaErrorInvalidDevice);
    test_true("none before the first", cudaSetDevice(-1) == cudaErrorInvalidDevice);
    CUDA_CHECK(cudaGetDevice(&device));
    test_true("an error changes nothing", device == 63);
    CUDA_CHECK(cudaSetDevice(rank));
    int equal = 0;
    for (int i = 0; i < 64; i++) {
        CUDA_CHECK(cudaDeviceGetPCIBusId(name, sizeof name, i));
        CUDA_CHECK(cudaDeviceGetPCIBusId(other, sizeof other, (i + 1) % 64));
        CUDA_CHECK(cudaGetDeviceProperties(&prop, i));
        equal += !strcmp(name, other) || prop.pciDeviceID != i || strncmp(name, "host:00:", 8);
    }
    test_check("names of devices", equal, 0);
    test_true("a short buffer", cudaDeviceGetPCIBusId(name, 5, 0) == cudaErrorInvalidValue);
    cudaGetLastError();
}

// ---- planted bugs ---------------------------------------------------------------------------

static void* watch(void* arg) {
    for (;;) {
        ncclResult_t error = ncclSuccess;
        ncclCommGetAsyncError((ncclComm_t)arg, &error);
        if (error != ncclSuccess) {
            fprintf(stderr, "watch: %s\n", ncclGetLastError(NULL));
            ncclCommAbort((ncclComm_t)arg);
            return NULL;
        }
        sleep_ms(5);
    }
}

// Every one of these has the other rank in a call that does not fit.
static void planted_two(const char* bug, float* x) {
    const ncclDataType_t f32 = ncclFloat32, i32 = ncclInt32;
    bool odd = rank == 1;
    cudaStream_t s = 0;
#define PLANTED(name, on_rank_0, on_rank_1)                                                        \
    if (!strcmp(bug, name)) {                                                                      \
        if (odd) NCCL_CHECK(on_rank_1);                                                            \
        else NCCL_CHECK(on_rank_0);                                                                \
    }
    PLANTED("kinds", ncclAllReduce(x, x, 9, f32, ncclSum, world, s),
            ncclBroadcast(x, x, 9, f32, 0, world, s));
    PLANTED("counts", ncclAllReduce(x, x, 9, f32, ncclSum, world, s),
            ncclAllReduce(x, x, 8, f32, ncclSum, world, s));
    PLANTED("none_here", ncclAllReduce(x, x, 9, f32, ncclSum, world, s),
            ncclAllReduce(x, x, 0, f32, ncclSum, world, s));
    PLANTED("types", ncclAllReduce(x, x, 9, f32, ncclSum, world, s),
            ncclAllReduce(x, x, 9, i32, ncclSum, world, s));
    PLANTED("operations", ncclAllReduce(x, x, 9, f32, ncclSum, world, s),
            ncclAllReduce(x, x, 9, f32, ncclMax, world, s));
    PLANTED("roots", ncclReduce(x, x, 9, f32, ncclSum, 0, world, s),
            ncclReduce(x, x, 9, f32, ncclSum, 1, world, s));
    PLANTED("send_collective", ncclAllReduce(x, x, 9, f32, ncclSum, world, s),
            ncclSend(x, 9, f32, 0, world, s));
    PLANTED("two_sends", ncclSend(x, 9, f32, 1, world, s), ncclSend(x, 9, f32, 0, world, s));
    PLANTED("two_receives", ncclRecv(x, 9, f32, 1, world, s), ncclRecv(x, 9, f32, 0, world, s));
    PLANTED("pair_counts", ncclSend(x, 9, f32, 1, world, s), ncclRecv(x, 8, f32, 0, world, s));
    PLANTED("one_more", ncclAllReduce(x, x, 9, f32, ncclSum, world, s), ncclCommDestroy(world));
#undef PLANTED
    if (!strcmp(bug, "late")) {
        if (odd) sleep_ms(20000);
        NCCL_CHECK(ncclAllReduce(x, x, 9, f32, ncclSum, world, s));
    }
}

static int planted_main(const char* bug) {
    float *x, on_stack[4] = {};
    const ncclDataType_t f32 = ncclFloat32;
    CUDA_CHECK(cudaMalloc(&x, 400));
    CUDA_CHECK(cudaMemset(x, 0, 400));
    if (!strncmp(bug, "fail", 4)) {
        // For HOST_NCCL_FAIL: five calls, whose results are printed by number.
        pthread_t thread;
        pthread_create(&thread, NULL, watch, world);
        pthread_detach(thread);
        for (int i = 1; i <= 5; i++) {
            ncclResult_t r = ncclAllReduce(x, x, 9, f32, ncclSum, world, 0);
            CUDA_CHECK(cudaDeviceSynchronize());
            REQUIRE(r == ncclSuccess, "rank %d, call %d: %s: %s", rank, i, ncclGetErrorString(r),
                    ncclGetLastError(world));
            ncclCommGetAsyncError(world, &r);
            REQUIRE(r == ncclSuccess, "rank %d, after call %d: %s: %s", rank, i,
                    ncclGetErrorString(r), ncclGetLastError(world));
        }
        fprintf(stderr, "five calls\n");
        exit(0);
    }
    NCCL_CHECK(ncclGroupStart());
    if (!strcmp(bug, "group")) {
        NCCL_CHECK(ncclReduceScatter(x, x + 64, 8, f32, ncclSum, world, 0));
        NCCL_CHECK(ncclAllGather(x + 64, x + 80, 8, f32, world, 0));
    }
    NCCL_CHECK(ncclGroupEnd());
    if (!strcmp(bug, "overlap")) NCCL_CHECK(ncclAllReduce(x, x + 1, 9, f32, ncclSum, world, 0));
    if (!strcmp(bug, "gather")) NCCL_CHECK(ncclAllGather(x + 1, x, 2, f32, world, 0));
    if (!strcmp(bug, "scatter")) NCCL_CHECK(ncclReduceScatter(x, x + 1, 2, f32, ncclSum, world, 0));
    if (!strcmp(bug, "stack")) {
        NCCL_CHECK(ncclAllReduce(on_stack, on_stack, 4, f32, ncclSum, world, 0));
    }
    if (!strcmp(bug, "long")) NCCL_CHECK(ncclAllReduce(x, x, 101, f32, ncclSum, world, 0));
    if (!strcmp(bug, "self_send")) NCCL_CHECK(ncclSend(x, 1, f32, rank, world, 0));
    if (!strcmp(bug, "self_recv")) NCCL_CHECK(ncclRecv(x, 1, f32, rank, world, 0));
    if (ranks > 1) planted_two(bug, x);
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaFree(x));
    return 0;
}

static const char* program;

// Runs this program again, alone or as two ranks, with one more environment variable.
static void planted_run(const char* bug, int n, const char* variable, int want_status,
                        const char* want_text) {
    char command[1000], launcher[200] = "";
    if (n > 1) {        // the setting: the others are killed at once, not a second later
        snprintf(launcher, sizeof launcher, "timeout 60 mpirun --oversubscribe -mca "
                 "odls_base_sigkill_timeout 0 -np %d -x %.*s ", n, (int)strcspn(variable, "="),
                 variable);
    }
    snprintf(command, sizeof command, "%s %s'%s' --planted %s 2>&1", variable, launcher, program,
             bug);
    FILE* f = popen(command, "r");
    REQUIRE(f, "popen: %s", strerror(errno));
    static char text[65536];
    size_t length = fread(text, 1, sizeof text - 1, f);
    text[length] = 0;
    int status = pclose(f), code = WIFEXITED(status) ? WEXITSTATUS(status) : -1, said = 0;
    for (char* p = text; (p = strstr(p, "host: ")); p++) said++;
    if (code == want_status && strstr(text, want_text) && (want_status != 70 || said == 1)) {
        test_record(true, 0);
        return;
    }
    printf("FAIL  planted %s: status %d, wanted %d and once \"%s\"; it said:\n%s\n", bug, code,
           want_status, want_text, text);
    test_record(false, 0);
}

static void test_planted_alone(void) {
    planted_run("none", 1, "A=0", 0, "");
    planted_run("group", 1, "A=0", 70, "ncclReduceScatter and ncclAllGather of one group");
    planted_run("overlap", 1, "A=0", 70, "ncclAllReduce: source and destination overlap");
    planted_run("gather", 1, "A=0", 70, "send == recv + rank * sendcount");
    planted_run("scatter", 1, "A=0", 70, "recv == send + rank * recvcount");
    planted_run("stack", 1, "A=0", 70, "not memory of cudaMalloc");
    planted_run("long", 1, "A=0", 70, "400 bytes up to the end of its allocation, the call uses "
                "404");
    planted_run("self_send", 1, "A=0", 70, "sends 1 float32 to itself");
    planted_run("self_recv", 1, "A=0", 70, "receives 1 float32 from itself");
    planted_run("none", 1, "HOST_DEVICES=x", 70, "HOST_DEVICES is 'x'");
    planted_run("none", 1, "HOST_DEVICES=4x", 70, "HOST_DEVICES is '4x'");
    planted_run("none", 1, "HOST_DEVICES=1", 0, "");
    planted_run("fail", 1, "HOST_NCCL_FAIL=0:3", 1,
                "call 3: a system call or MPI failed: ncclAllReduce: failure injected by "
                "HOST_NCCL_FAIL=0:3");
    planted_run("fail", 1, "HOST_NCCL_FAIL=0:6", 0, "five calls");
    planted_run("fail", 1, "HOST_NCCL_FAIL=1:3", 0, "five calls");
    planted_run("fail", 1, "HOST_NCCL_FAIL=0:0", 70, "HOST_NCCL_FAIL is '0:0'");
    planted_run("fail", 1, "HOST_NCCL_FAIL=0:2:later", 70, "wanted rank:call or rank:call:async");
    planted_run("fail", 1, "HOST_NCCL_FAIL=0:4:async", 1,
                "watch: ncclAllReduce: failure injected by HOST_NCCL_FAIL=0:4:async");
    planted_run("fail", 1, "HOST_STREAMS=lazy HOST_NCCL_FAIL=0:4:async", 1, "after call 4");
}

static void test_planted_two(void) {
    const char *all = "ncclAllReduce(count 9, float32, sum)", *none = "A=0";
    char text[300];
    if (system("mpirun --version > /dev/null 2>&1")) {
        test_skip("planted on two ranks", "there is no mpirun");
        return;
    }
    setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 1);
    setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 1);
    planted_run("none", 2, none, 0, "");
    snprintf(text, sizeof text, "rank 0 is in %s, call 1, and rank 1 in ncclBroadcast(count 9, "
             "float32, root 0), call 1", all);
    planted_run("kinds", 2, none, 70, text);
    snprintf(text, sizeof text, "rank 0 is in %s, call 1, and rank 1 in ncclAllReduce(count 8, "
             "float32, sum), call 1", all);
    planted_run("counts", 2, none, 70, text);
    planted_run("counts", 2, "HOST_STREAMS=lazy", 70, text);
    planted_run("none_here", 2, none, 70, "ncclAllReduce(count 0, float32, sum)");
    planted_run("types", 2, none, 70, "rank 1 in ncclAllReduce(count 9, int32, sum)");
    planted_run("operations", 2, none, 70, "rank 1 in ncclAllReduce(count 9, float32, max)");
    planted_run("roots", 2, none, 70, "rank 1 in ncclReduce(count 9, float32, sum, root 1)");
    planted_run("send_collective", 2, none, 70, "rank 1 in ncclSend(count 9, float32, peer 0)");
    planted_run("two_sends", 2, none, 70, "rank 1 in ncclSend(count 9, float32, peer 0)");
    planted_run("two_receives", 2, none, 70, "rank 1 in ncclRecv(count 9, float32, peer 0)");
    planted_run("pair_counts", 2, none, 70, "rank 1 in ncclRecv(count 8, float32, peer 0)");
    planted_run("one_more", 2, none, 70, "rank 1 in ncclCommDestroy, call 1");
    planted_run("late", 2, "HOST_NCCL_TIMEOUT=1", 70,
                "rank 0 of 2 has waited 1 s in ncclAllReduce(count 9, float32, sum), call 1, for "
                "ranks that did not come: 1");
    planted_run("fail", 2, "HOST_NCCL_FAIL=1:3", 1, "rank 1, call 3: a system call or MPI failed");
    planted_run("fail", 2, "HOST_NCCL_FAIL=1:4:async", 1,
                "watch: ncclAllReduce: failure injected by HOST_NCCL_FAIL=1:4:async");
}

// ---- program --------------------------------------------------------------------------------

// The output of this rank goes to a file of no name; what failed is printed at the end.
static int output_hide(FILE** hidden) {
    fflush(stdout);
    *hidden = tmpfile();
    REQUIRE(*hidden, "rank %d: tmpfile: %s", rank, strerror(errno));
    return dup2(fileno(*hidden), 1);
}

static void output_show_failures(FILE* hidden) {
    char line[400];
    fflush(stdout);
    rewind(hidden);
    while (fgets(line, sizeof line, hidden)) {
        if (!strncmp(line, "FAIL", 4)) fprintf(stderr, "rank %d: %s", rank, line);
    }
}

int main(int argc, char** argv) {
    program_name = "test_nccl";
    program = argv[0];
    const char* bug = argc == 3 && !strcmp(argv[1], "--planted") ? argv[2] : NULL;
    FILE* hidden = NULL;
    started = getenv("OMPI_COMM_WORLD_SIZE") || getenv("PMI_SIZE");
    if (started) {
        int level;
        MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &level);
        MPI_Comm_rank(MPI_COMM_WORLD, &rank);
        MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    }
    if (!bug) {
        test_init(argc, argv);
        if (rank > 0) output_hide(&hidden);
    }
    CUDA_CHECK(cudaSetDevice(rank % 64));
    world = comm_new();
    if (bug) {
        int status = planted_main(bug);
        if (strcmp(bug, "one_more")) NCCL_CHECK(ncclCommDestroy(world));
        if (started) MPI_Finalize();
        return status;
    }

    if (test_group("calls")) test_calls();
    if (test_group("pieces")) test_pieces();
    if (test_group("order")) test_order();
    if (test_group("repeat")) test_repeat();
    if (test_group("pairs")) test_pairs();
    if (test_group("groups")) test_groups();
    if (test_group("split")) test_split();
    if (test_group("errors")) test_errors();
    if (test_group("streams")) test_streams();
    if (test_group("abort")) test_abort();
    if (test_group("devices")) test_devices();
    if (!started && test_group("planted")) test_planted_alone();
    if (!started && test_group("planted_two")) test_planted_two();
    test_group_end();

    NCCL_CHECK(ncclCommDestroy(world));
    test_check("bytes still allocated", (double)host_report_leaks(), 0);
    if (hidden && test_state.failed) output_show_failures(hidden);
    int mine[3] = {test_state.passed, test_state.failed, test_state.skipped}, all[3];
    memcpy(all, mine, sizeof all);
    if (started) {
        MPI_Reduce(mine, all, 3, MPI_INT, MPI_SUM, 0, MPI_COMM_WORLD);
        MPI_Finalize();
    }
    if (rank > 0) return 0;         // rank 0 has counted the failures of all
    test_state.passed = all[0];
    test_state.failed = all[1];
    test_state.skipped = all[2];
    return test_summary();
}
