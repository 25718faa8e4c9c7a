/*
NCCL on MPI: see nccl.h for what it promises.

A call becomes an Op; the ops of a group, or one alone, are a Work that goes through
host_stream_submit. When the stream comes to it, every op of the work is a small state machine:

    headers     each rank sends one to every rank that the call involves, and checks theirs
    pieces      of at most PIECE_BYTES of each chunk: receives are posted, then sends, and when all
                have completed the sums are made and the next piece begins
    done

and one loop moves all of them until all are done. It never spins: ranks may be many on few cores.
Sends go straight from the caller's memory, as do receives that are no part of a sum; what is summed
is received into (N-1) pieces of memory of the op's own.
Test: test/test_nccl.cu
*/
#ifdef WITH_NCCL

#include "nccl.h"

#ifndef OMPI_SKIP_MPICXX
#define OMPI_SKIP_MPICXX
#endif
#include <mpi.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "cuda_bf16.h"
#include "engine.h"

static const size_t PIECE_BYTES = 1 << 20;      // from here on larger ones are not faster
static const uint64_t COMM_MAGIC = 0x6e63636c636f6d6dull;
static const uint32_t HEADER_MAGIC = 0x68656164;
static const double PROBE_SECONDS = 1;          // before a missing header is looked into
static const int REPORT_DELAY_MS = 2000;        // mpirun ends the others after 1000

// ---- types ----------------------------------------------------------------------------------

enum { KIND_SPLIT = HOST_NCCL_KINDS, KIND_DESTROY, KINDS };

// Headers of collectives, of senders and of receivers are matched apart: the order of a send and a
// receive within a group means nothing. Data has the tags above.
enum { TAG_COLLECTIVE, TAG_SEND, TAG_RECV, TAG_DATA };

struct Header {
    uint32_t magic;         // 0 while it has not arrived
    int32_t kind, type, op, root;
    uint64_t count, number;
};

struct ncclComm {
    uint64_t magic;
    int rank, size, device;
    MPI_Comm mpi;           // MPI_COMM_NULL where there is one rank
    uint64_t tags;          // how many data tags there are of each parity
    uint64_t collectives;   // calls so far
    uint64_t *sent, *received;      // calls so far, by peer
    int aborted, error;     // written by one thread, read by others
};

enum Step { STEP_HEADERS, STEP_SCATTER, STEP_GATHER, STEP_DONE };

struct Op {
    int kind, type, op, root;       // root: also the peer of a send or receive
    const char* send;
    char* recv;
    size_t count;
    ncclComm_t comm;
    cudaStream_t stream;
    bool hangs;             // by HOST_NCCL_FAIL
    uint64_t number;        // of the collective, or of the send or receive with this peer

    Step step;
    size_t at, piece;       // elements of the chunk that are done, and under way
    size_t chunk;
    int pending;            // requests
    MPI_Request* request;
    Header mine, *theirs;   // by rank
    char *staging, *pad;    // a piece for each rank: what is summed, what lies beyond the last one
};

struct Work {
    int ops;
    Op* op;
};

struct Range {
    const char* p;
    size_t bytes;
};

static const char* const KIND_NAMES[KINDS] = {
    "ncclAllReduce", "ncclReduce", "ncclReduceScatter", "ncclAllGather", "ncclBroadcast",
    "ncclSend",      "ncclRecv",   "ncclCommSplit",     "ncclCommDestroy"};

static bool kind_is_pair(int kind) {
    return kind == HOST_NCCL_SEND || kind == HOST_NCCL_RECV;
}

static bool kind_has_data(int kind) {
    return kind < HOST_NCCL_KINDS;
}

static bool kind_has_op(int kind) {
    return kind == HOST_NCCL_ALL_REDUCE || kind == HOST_NCCL_REDUCE ||
           kind == HOST_NCCL_REDUCE_SCATTER;
}

static bool kind_has_root(int kind) {
    return kind == HOST_NCCL_REDUCE || kind == HOST_NCCL_BROADCAST;
}

static size_t type_size(int type) {
    switch (type) {
        case ncclUint8: return 1;
        case ncclBfloat16: return 2;
        case ncclInt32:
        case ncclFloat32: return 4;
        case ncclInt64:
        case ncclFloat64: return 8;
    }
    return 0;
}

static const char* type_name(int type) {
    switch (type) {
        case ncclUint8: return "uint8";
        case ncclBfloat16: return "bfloat16";
        case ncclInt32: return "int32";
        case ncclFloat32: return "float32";
        case ncclInt64: return "int64";
        case ncclFloat64: return "float64";
    }
    return "a type that is none";
}

static bool op_valid(int op) {
    return op == ncclSum || op == ncclMax || op == ncclMin;
}

static const char* op_name(int op) {
    return op == ncclSum ? "sum" : op == ncclMax ? "max" : op == ncclMin ? "min" : "no operation";
}

// ---- errors ---------------------------------------------------------------------------------

#ifdef HOST_TSAN        // this file is compiled without -fsanitize, but texts go through libc
extern "C" void __tsan_acquire(void* address);
extern "C" void __tsan_release(void* address);
#define TSAN_ACQUIRE(p) __tsan_acquire(p)
#define TSAN_RELEASE(p) __tsan_release(p)
#else
#define TSAN_ACQUIRE(p) (void)(p)
#define TSAN_RELEASE(p) (void)(p)
#endif

// A reader in another thread finds a whole text, unless eight errors happen while it reads.
static char texts[8][512];
static unsigned texts_written;
static const char* text_last = "";

static __thread struct {
    int depth, ops, capacity;
    Op* op;
    ncclResult_t error;     // the first one of the group
} group;

static ncclResult_t fail(ncclResult_t error, const char* fmt, ...)
    __attribute__((format(printf, 2, 3)));

static ncclResult_t fail(ncclResult_t error, const char* fmt, ...) {
    char* text = texts[__atomic_fetch_add(&texts_written, 1, __ATOMIC_RELAXED) % 8];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof texts[0], fmt, args);
    va_end(args);
    TSAN_RELEASE(&text_last);
    __atomic_store_n(&text_last, text, __ATOMIC_RELEASE);
    if (group.depth && group.error == ncclSuccess) group.error = error;
    return error;
}

const char* ncclGetLastError(ncclComm_t) {
    const char* text = __atomic_load_n(&text_last, __ATOMIC_ACQUIRE);
    TSAN_ACQUIRE(&text_last);
    return text;
}

const char* ncclGetErrorString(ncclResult_t result) {
    switch (result) {
        case ncclSuccess: return "no error";
        case ncclUnhandledCudaError: return "a CUDA call failed";
        case ncclSystemError: return "a system call or MPI failed";
        case ncclInternalError: return "internal error";
        case ncclInvalidArgument: return "invalid argument";
        case ncclInvalidUsage: return "invalid usage";
        case ncclRemoteError: return "another rank failed";
        case ncclInProgress: return "in progress";
        case ncclNumResults: break;
    }
    return "unknown result code";
}

static ncclResult_t fail_mpi(const char* what, int code) {
    char text[MPI_MAX_ERROR_STRING] = "";
    int length = 0;
    MPI_Error_string(code, text, &length);
    return fail(ncclSystemError, "%s: MPI: %s", what, text);
}

static void* allocate(size_t count, size_t size) {
    void* p = calloc(count ? count : 1, size);
    if (!p) host_error("nccl: no memory for %zu x %zu bytes", count, size);
    return p;
}

static double now_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void sleep_us(long us) {
    struct timespec t = {us / 1000000, us % 1000000 * 1000};
    nanosleep(&t, NULL);
}

// HOST_NCCL_TIMEOUT
static double timeout_seconds(void) {
    static double seconds;
    if (seconds == 0) {
        const char* text = getenv("HOST_NCCL_TIMEOUT");
        char* end = NULL;
        seconds = text && *text ? strtod(text, &end) : 600;
        if (!(seconds > 0) || (end && *end)) {
            host_error("HOST_NCCL_TIMEOUT is '%s', wanted a number of seconds above 0", text);
        }
    }
    return seconds;
}

enum Injected { INJECT_NOTHING, INJECT_ERROR, INJECT_ASYNC };

// HOST_NCCL_FAIL, asked once for each call.
static Injected injected_failure(void) {
    static uint64_t calls;
    calls++;
    const char* text = getenv("HOST_NCCL_FAIL");
    if (!text || !*text) return INJECT_NOTHING;
    int rank = -1, started = 0, ended = 0, used = 0, mine = 0;
    unsigned long long call = 0;
    bool async = false;
    bool valid = sscanf(text, "%d:%llu%n", &rank, &call, &used) == 2 && rank >= 0 && call > 0;
    if (valid && text[used]) {
        async = true;
        valid = !strcmp(text + used, ":async");
    }
    if (!valid) host_error("HOST_NCCL_FAIL is '%s', wanted rank:call or rank:call:async", text);
    MPI_Initialized(&started);
    MPI_Finalized(&ended);
    if (started && !ended) MPI_Comm_rank(MPI_COMM_WORLD, &mine);
    if (rank != mine || call != calls) return INJECT_NOTHING;
    return async ? INJECT_ASYNC : INJECT_ERROR;
}

#ifdef HOST_ASAN
// MPI leaves thousands of blocks behind, of libraries that it has unloaded: no suppression can name
// them. So LeakSanitizer, which asks here, only looks at processes without MPI.
extern "C" int __lsan_is_turned_off(void) {
    int started = 0;
    MPI_Initialized(&started);
    return started;
}
#endif

// ---- sums -----------------------------------------------------------------------------------
// out may be a or b. Rounding to bf16 is that of each __hadd2.

static inline float add(float a, float b) { return a + b; }
static inline double add(double a, double b) { return a + b; }
static inline uint8_t add(uint8_t a, uint8_t b) { return (uint8_t)(a + b); }
static inline int32_t add(int32_t a, int32_t b) { return (int32_t)((uint32_t)a + (uint32_t)b); }
static inline int64_t add(int64_t a, int64_t b) { return (int64_t)((uint64_t)a + (uint64_t)b); }
static inline __nv_bfloat16 add(__nv_bfloat16 a, __nv_bfloat16 b) { return a + b; }

// The other one where one is NaN.
template <class T> static inline T larger(T a, T b) {
    return a != a || b > a ? b : a;
}
template <class T> static inline T smaller(T a, T b) {
    return a != a || b < a ? b : a;
}

template <class T> static void combine_as(T* out, const T* a, const T* b, size_t n, int op) {
    if (op == ncclSum) {
        for (size_t i = 0; i < n; i++) out[i] = add(a[i], b[i]);
    } else if (op == ncclMax) {
        for (size_t i = 0; i < n; i++) out[i] = larger(a[i], b[i]);
    } else {
        for (size_t i = 0; i < n; i++) out[i] = smaller(a[i], b[i]);
    }
}

#define COMBINE(T) combine_as((T*)out, (const T*)a, (const T*)b, n, op)
static void combine(void* out, const void* a, const void* b, size_t n, int type, int op) {
    switch (type) {
        case ncclUint8: COMBINE(uint8_t); break;
        case ncclInt32: COMBINE(int32_t); break;
        case ncclInt64: COMBINE(int64_t); break;
        case ncclFloat32: COMBINE(float); break;
        case ncclFloat64: COMBINE(double); break;
        case ncclBfloat16: COMBINE(__nv_bfloat16); break;
    }
}
#undef COMBINE

// ---- traffic --------------------------------------------------------------------------------

static uint64_t kind_bytes[HOST_NCCL_KINDS], kind_calls[HOST_NCCL_KINDS];

static void work_finish_all(void);

const char* host_nccl_kind_name(int kind) {
    return kind >= 0 && kind < HOST_NCCL_KINDS ? KIND_NAMES[kind] : "no kind";
}

void host_nccl_traffic(HostNcclTraffic* out) {
    work_finish_all();
    memset(out, 0, sizeof *out);
    for (int k = 0; k < HOST_NCCL_KINDS; k++) {
        out->kind_bytes[k] = kind_bytes[k];
        out->kind_calls[k] = kind_calls[k];
        out->bytes += kind_bytes[k];
        out->calls += kind_calls[k];
    }
}

void host_nccl_traffic_reset(void) {
    work_finish_all();
    memset(kind_bytes, 0, sizeof kind_bytes);
    memset(kind_calls, 0, sizeof kind_calls);
}

// ---- what an op reads and writes ------------------------------------------------------------

static Range op_source(const Op* o) {
    size_t bytes = o->count * type_size(o->type);
    if (o->kind == HOST_NCCL_RECV) bytes = 0;
    if (o->kind == HOST_NCCL_BROADCAST && o->comm->rank != o->root) bytes = 0;
    if (o->kind == HOST_NCCL_REDUCE_SCATTER) bytes *= (size_t)o->comm->size;
    return Range{o->send, bytes};
}

static Range op_destination(const Op* o) {
    size_t bytes = o->count * type_size(o->type);
    if (o->kind == HOST_NCCL_SEND) bytes = 0;
    if (o->kind == HOST_NCCL_REDUCE && o->comm->rank != o->root) bytes = 0;
    if (o->kind == HOST_NCCL_ALL_GATHER) bytes *= (size_t)o->comm->size;
    return Range{o->recv, bytes};
}

static bool ranges_overlap(Range a, Range b) {
    uintptr_t p = (uintptr_t)a.p, q = (uintptr_t)b.p;
    return a.bytes && b.bytes && p < q + b.bytes && q < p + a.bytes;
}

static bool op_in_place(const Op* o) {
    size_t own = (size_t)o->comm->rank * o->count * type_size(o->type);
    if (o->kind == HOST_NCCL_REDUCE_SCATTER) return o->recv == o->send + own;
    if (o->kind == HOST_NCCL_ALL_GATHER) return o->send == o->recv + own;
    return o->send == o->recv;
}

static void op_text(char* text, size_t size, const Header* h) {
    int n = snprintf(text, size, "%s", KIND_NAMES[h->kind]);
    if (!kind_has_data(h->kind) || n < 0) return;
    n += snprintf(text + n, size - (size_t)n, "(count %llu, %s", (unsigned long long)h->count,
                  type_name(h->type));
    if (kind_has_op(h->kind)) n += snprintf(text + n, size - (size_t)n, ", %s", op_name(h->op));
    if (kind_has_root(h->kind)) n += snprintf(text + n, size - (size_t)n, ", root %d", h->root);
    if (kind_is_pair(h->kind)) n += snprintf(text + n, size - (size_t)n, ", peer %d", h->root);
    snprintf(text + n, size - (size_t)n, ")");
}

static void group_check_overlap(const Op* a, const Op* b) {
    Range from_a = op_source(a), to_a = op_destination(a);
    Range from_b = op_source(b), to_b = op_destination(b);
    if (!ranges_overlap(to_a, from_b) && !ranges_overlap(to_a, to_b) &&
        !ranges_overlap(to_b, from_a)) {
        return;
    }
    host_error("%s and %s of one group use the same memory, and one of them writes it: the calls "
               "of a group run in no order", KIND_NAMES[a->kind], KIND_NAMES[b->kind]);
}

static ncclResult_t op_check_buffer(const Op* o, const char* name, Range r) {
    const char* call = KIND_NAMES[o->kind];
    if (!r.bytes) return ncclSuccess;
    if (!r.p) return fail(ncclInvalidArgument, "%s: %s is NULL", call, name);
    if ((uintptr_t)r.p % type_size(o->type)) {
        return fail(ncclInvalidArgument, "%s: %s is not aligned to the %zu bytes of %s", call, name,
                    type_size(o->type), type_name(o->type));
    }
    size_t found = host_device_bytes(r.p);
    if (found >= r.bytes) return ncclSuccess;
    if (!found) {
        host_error("%s: %s (%p) is not memory of cudaMalloc or cudaMallocHost", call, name,
                   (const void*)r.p);
    }
    host_error("%s: %s has %zu bytes up to the end of its allocation, the call uses %zu", call,
               name, found, r.bytes);
}

static ncclResult_t comm_check(ncclComm_t comm, const char* call) {
    if (!comm) return fail(ncclInvalidArgument, "%s: the communicator is NULL", call);
    if (comm->magic != COMM_MAGIC) {
        return fail(ncclInvalidArgument, "%s: no communicator, or one that was destroyed", call);
    }
    return ncclSuccess;
}

// MPI is started with MPI_THREAD_FUNNELED: only the main thread may come here.
static ncclResult_t mpi_check(const char* call) {
    int started = 0, ended = 0, is_main = 0, level = 0;
    MPI_Initialized(&started);
    if (!started) return fail(ncclInvalidUsage, "%s: MPI was not started (MPI_Init)", call);
    MPI_Finalized(&ended);
    if (ended) return fail(ncclInvalidUsage, "%s: MPI has ended (MPI_Finalize)", call);
    MPI_Query_thread(&level);
    MPI_Is_thread_main(&is_main);
    if (!is_main && level < MPI_THREAD_MULTIPLE) {
        return fail(ncclInvalidUsage, "%s: not called by the main thread, which calls MPI", call);
    }
    return ncclSuccess;
}

static ncclResult_t op_check(const Op* o) {
    const char* call = KIND_NAMES[o->kind];
    ncclResult_t result = comm_check(o->comm, call);
    if (result != ncclSuccess) return result;
    result = (ncclResult_t)__atomic_load_n(&o->comm->error, __ATOMIC_ACQUIRE);
    if (result != ncclSuccess) {
        return fail(result, "%s: the communicator is of no more use: %s", call,
                    ncclGetErrorString(result));
    }
    if (o->comm->size > 1) {
        result = mpi_check(call);
        if (result != ncclSuccess) return result;
    }
    if (!type_size(o->type)) {
        return fail(ncclInvalidArgument, "%s: data type %d, wanted ncclUint8, Int32, Int64, "
                    "Float32, Float64 or Bfloat16", call, o->type);
    }
    if (kind_has_op(o->kind) && !op_valid(o->op)) {
        return fail(ncclInvalidArgument, "%s: operation %d, wanted ncclSum, ncclMax or ncclMin",
                    call, o->op);
    }
    if ((kind_has_root(o->kind) || kind_is_pair(o->kind)) &&
        (o->root < 0 || o->root >= o->comm->size)) {
        return fail(ncclInvalidArgument, "%s: %s %d of %d ranks", call,
                    kind_has_root(o->kind) ? "root" : "peer", o->root, o->comm->size);
    }
    if (o->count > SIZE_MAX / 2 / type_size(o->type) / (size_t)o->comm->size) {
        return fail(ncclInvalidArgument, "%s: count %zu", call, o->count);
    }
    result = op_check_buffer(o, "the source", op_source(o));
    if (result == ncclSuccess) result = op_check_buffer(o, "the destination", op_destination(o));
    if (result == ncclSuccess && ranges_overlap(op_source(o), op_destination(o)) &&
        !op_in_place(o)) {
        host_error("%s: source and destination overlap, and not as in place calls do%s", call,
                   o->kind == HOST_NCCL_REDUCE_SCATTER ? " (recv == send + rank * recvcount)" :
                   o->kind == HOST_NCCL_ALL_GATHER     ? " (send == recv + rank * sendcount)" :
                                                         " (send == recv)");
    }
    return result;
}

// ---- headers --------------------------------------------------------------------------------

static int header_tag(int kind) {
    return kind == HOST_NCCL_SEND ? TAG_SEND : kind == HOST_NCCL_RECV ? TAG_RECV : TAG_COLLECTIVE;
}

// The tag of the header that the peer of this kind of call sends.
static int header_tag_wanted(int kind) {
    return kind == HOST_NCCL_SEND ? TAG_RECV : kind == HOST_NCCL_RECV ? TAG_SEND : TAG_COLLECTIVE;
}

static int data_tag(const Op* o) {
    return TAG_DATA + (int)(2 * (o->number % o->comm->tags)) + kind_is_pair(o->kind);
}

static bool op_involves(const Op* o, int rank) {
    return rank != o->comm->rank && (!kind_is_pair(o->kind) || rank == o->root);
}

static bool headers_match(const Header* a, const Header* b) {
    if (a->count != b->count || a->type != b->type || a->number != b->number) return false;
    if (kind_is_pair(a->kind)) return header_tag_wanted(a->kind) == header_tag(b->kind);
    return a->kind == b->kind && a->op == b->op && a->root == b->root;
}

// Both ranks come here. The lower one has the word, and its end is that of the others if a launcher
// looks after them.
[[noreturn]] static void report_mismatch(const Op* o, int rank, const Header* theirs) {
    char mine_text[160], theirs_text[160];
    op_text(mine_text, sizeof mine_text, &o->mine);
    op_text(theirs_text, sizeof theirs_text, theirs);
    if (o->comm->rank > 0) sleep_us(1000L * (REPORT_DELAY_MS + 300 * o->comm->rank));
    host_error("nccl: ranks of one communicator (of %d) do not make the same calls: rank %d is in "
               "%s, call %llu, and rank %d in %s, call %llu", o->comm->size, o->comm->rank,
               mine_text, (unsigned long long)o->mine.number, rank, theirs_text,
               (unsigned long long)theirs->number);
}

// A rank that has sent another header than the one this op waits for is in another call, and waits
// in it for this rank: neither can go on.
static void headers_probe(Op* o) {
    for (int r = 0; r < o->comm->size; r++) {
        if (!op_involves(o, r) || o->theirs[r].magic) continue;
        for (int tag = TAG_COLLECTIVE; tag < TAG_DATA; tag++) {
            int found = 0;
            if (tag == header_tag_wanted(o->mine.kind)) continue;
            MPI_Iprobe(r, tag, o->comm->mpi, &found, MPI_STATUS_IGNORE);
            if (!found) continue;
            Header theirs;
            MPI_Recv(&theirs, sizeof theirs, MPI_BYTE, r, tag, o->comm->mpi, MPI_STATUS_IGNORE);
            report_mismatch(o, r, &theirs);
        }
    }
}

[[noreturn]] static void report_timeout(const Op* o, double seconds) {
    char text[160], missing[200] = "";
    size_t n = 0;
    op_text(text, sizeof text, &o->mine);
    for (int r = 0; r < o->comm->size && n + 20 < sizeof missing; r++) {
        if (!op_involves(o, r) || o->theirs[r].magic) continue;
        n += (size_t)snprintf(missing + n, sizeof missing - n, "%s%d", n ? ", " : "", r);
    }
    host_error("nccl: rank %d of %d has waited %.0f s in %s, call %llu%s%s (HOST_NCCL_TIMEOUT)",
               o->comm->rank, o->comm->size, seconds, text, (unsigned long long)o->mine.number,
               n ? ", for ranks that did not come: " : o->hangs ? ": nobody called ncclCommAbort" :
               ", for data", missing);
}

// ---- the state machine of an op -------------------------------------------------------------

static void post_send(Op* o, int to, const void* data, size_t bytes) {
    MPI_Isend(data, (int)bytes, MPI_BYTE, to, data_tag(o), o->comm->mpi, &o->request[o->pending++]);
    kind_bytes[o->kind] += bytes;
}

static void post_recv(Op* o, int from, void* data, size_t bytes) {
    MPI_Irecv(data, (int)bytes, MPI_BYTE, from, data_tag(o), o->comm->mpi,
              &o->request[o->pending++]);
}

static size_t piece_of(const Op* o) {
    size_t most = PIECE_BYTES / type_size(o->type), left = o->chunk - o->at;
    return left < most ? left : most;
}

// Elements of this piece of chunk r that exist: the last chunks of an all-reduce may be short.
static size_t piece_existing(const Op* o, int r) {
    if (o->kind != HOST_NCCL_ALL_REDUCE) return o->piece;
    size_t begin = (size_t)r * o->chunk + o->at;
    size_t left = begin < o->count ? o->count - begin : 0;
    return left < o->piece ? left : o->piece;
}

// Where this piece of chunk r lies in an array of one chunk for each rank.
static size_t piece_at(const Op* o, int r) {
    return ((size_t)r * o->chunk + o->at) * type_size(o->type);
}

static char* slot_of(char* slots, const Op* o, int r) {
    return slots + (size_t)r * (PIECE_BYTES < o->chunk * type_size(o->type)
                                    ? PIECE_BYTES
                                    : o->chunk * type_size(o->type));
}

// This piece of chunk r, filled up with zeros to its whole length where it is short.
static const char* piece_filled(Op* o, const char* chunks, int r) {
    size_t size = type_size(o->type), existing = piece_existing(o, r);
    if (existing == o->piece) return chunks + piece_at(o, r);
    char* slot = slot_of(o->pad, o, r);
    if (existing) memcpy(slot, chunks + piece_at(o, r), existing * size);
    memset(slot + existing * size, 0, (o->piece - existing) * size);
    return slot;
}

static void post_scatter(Op* o) {
    int me = o->comm->rank, n = o->comm->size;
    size_t bytes = o->piece * type_size(o->type), at = o->at * type_size(o->type);
    bool all = o->kind != HOST_NCCL_REDUCE;      // else there is one chunk, the root's
    for (int i = 1; i < n; i++) {
        int from = (me + i) % n;
        if (all || me == o->root) post_recv(o, from, slot_of(o->staging, o, from), bytes);
    }
    for (int i = 1; i < n; i++) {
        int to = (me + n - i) % n;
        if (all) {
            post_send(o, to, piece_filled(o, o->send, to), bytes);
        } else if (to == o->root) {
            post_send(o, to, o->send + at, bytes);
        }
    }
}

// From the rank after this one, round the ring, to this one.
static void finish_scatter(Op* o) {
    int me = o->comm->rank, n = o->comm->size;
    size_t at = o->at * type_size(o->type), existing = piece_existing(o, me);
    const char* own = o->send + at;
    char* out = o->recv + at;
    if (o->kind == HOST_NCCL_REDUCE && me != o->root) return;
    if (o->kind != HOST_NCCL_REDUCE) own = o->send + piece_at(o, me);
    if (o->kind == HOST_NCCL_ALL_REDUCE) out = o->recv + piece_at(o, me);
    char* sum = slot_of(o->staging, o, (me + 1) % n);
    for (int i = 2; i < n; i++) {
        combine(sum, sum, slot_of(o->staging, o, (me + i) % n), existing, o->type, o->op);
    }
    combine(out, sum, own, existing, o->type, o->op);
}

static void post_gather(Op* o) {
    int me = o->comm->rank, n = o->comm->size;
    size_t bytes = o->piece * type_size(o->type), at = o->at * type_size(o->type);
    if (o->kind == HOST_NCCL_SEND) {
        post_send(o, o->root, o->send + at, bytes);
    } else if (o->kind == HOST_NCCL_RECV) {
        post_recv(o, o->root, o->recv + at, bytes);
    } else if (o->kind == HOST_NCCL_BROADCAST) {
        if (me != o->root) post_recv(o, o->root, o->recv + at, bytes);
        for (int i = 1; me == o->root && i < n; i++) {
            post_send(o, (me + i) % n, o->send + at, bytes);
        }
    } else {
        bool sums = o->kind == HOST_NCCL_ALL_REDUCE;
        for (int i = 1; i < n; i++) {
            int from = (me + i) % n;
            bool whole = piece_existing(o, from) == o->piece;
            post_recv(o, from, whole ? o->recv + piece_at(o, from) : slot_of(o->pad, o, from),
                      bytes);
        }
        const char* own = sums ? piece_filled(o, o->recv, me) : o->send + at;
        for (int i = 1; i < n; i++) post_send(o, (me + n - i) % n, own, bytes);
    }
}

static void finish_gather(Op* o) {
    if (o->kind != HOST_NCCL_ALL_REDUCE) return;
    for (int r = 0; r < o->comm->size; r++) {
        size_t existing = piece_existing(o, r);
        if (r == o->comm->rank || existing == o->piece || !existing) continue;
        memcpy(o->recv + piece_at(o, r), slot_of(o->pad, o, r), existing * type_size(o->type));
    }
}

static void op_post_piece(Op* o) {
    o->piece = piece_of(o);
    if (o->step == STEP_SCATTER) {
        post_scatter(o);
    } else {
        post_gather(o);
    }
}

// What stays on this rank, to where it belongs.
static void op_copy_own(Op* o) {
    size_t bytes = o->count * type_size(o->type);
    size_t own = (size_t)o->comm->rank * bytes;
    bool alone = o->comm->size == 1;
    if (!bytes || op_in_place(o)) return;
    if (o->kind == HOST_NCCL_ALL_GATHER) {
        memcpy(o->recv + own, o->send, bytes);
    } else if (alone || (o->kind == HOST_NCCL_BROADCAST && o->comm->rank == o->root)) {
        memcpy(o->recv, o->send, bytes);
    }
}

static void op_begin(Op* o) {
    ncclComm_t comm = o->comm;
    size_t n = (size_t)comm->size, size = type_size(o->type);
    if (n == 1) {
        if (kind_has_data(o->kind)) op_copy_own(o);
        o->step = STEP_DONE;
        return;
    }
    o->request = (MPI_Request*)allocate(2 * n, sizeof(MPI_Request));
    o->theirs = (Header*)allocate(n, sizeof(Header));
    o->mine = Header{HEADER_MAGIC, o->kind, o->type, o->op, o->root, o->count, o->number};
    o->step = STEP_HEADERS;
    for (int r = 0; r < comm->size; r++) {
        if (!op_involves(o, r)) continue;
        MPI_Irecv(&o->theirs[r], sizeof(Header), MPI_BYTE, r, header_tag_wanted(o->kind), comm->mpi,
                  &o->request[o->pending++]);
    }
    for (int r = 0; r < comm->size; r++) {
        if (!op_involves(o, r)) continue;
        MPI_Isend(&o->mine, sizeof(Header), MPI_BYTE, r, header_tag(o->kind), comm->mpi,
                  &o->request[o->pending++]);
    }
    if (!kind_has_data(o->kind)) return;
    op_copy_own(o);
    o->chunk = o->kind == HOST_NCCL_ALL_REDUCE ? (o->count + n - 1) / n : o->count;
    o->piece = piece_of(o);
    bool sums = kind_has_op(o->kind) && (o->kind != HOST_NCCL_REDUCE || comm->rank == o->root);
    if (sums) o->staging = (char*)allocate(n, o->piece * size);
    if (o->kind == HOST_NCCL_ALL_REDUCE && o->count % n) {
        o->pad = (char*)allocate(n, o->piece * size);
    }
}

static void op_free(Op* o) {
    free(o->request);
    free(o->theirs);
    free(o->staging);
    free(o->pad);
}

// Moves the op as far as it goes; *moved: at all.
static ncclResult_t op_progress(Op* o, bool* moved) {
    while (o->step != STEP_DONE) {
        int all = 0;
        int code = MPI_Testall(o->pending, o->request, &all, MPI_STATUSES_IGNORE);
        if (code != MPI_SUCCESS) return fail_mpi(KIND_NAMES[o->kind], code);
        if (!all) return ncclSuccess;
        o->pending = 0;
        *moved = true;
        if (o->step == STEP_HEADERS) {
            for (int r = 0; r < o->comm->size; r++) {
                if (op_involves(o, r) && !headers_match(&o->mine, &o->theirs[r])) {
                    report_mismatch(o, r, &o->theirs[r]);
                }
            }
            o->step = !o->chunk ? STEP_DONE : kind_has_op(o->kind) ? STEP_SCATTER : STEP_GATHER;
        } else {
            if (o->step == STEP_SCATTER) {
                finish_scatter(o);
            } else {
                finish_gather(o);
            }
            o->at += o->piece;
            if (o->at == o->chunk) {
                bool more = o->kind == HOST_NCCL_ALL_REDUCE && o->step == STEP_SCATTER;
                o->at = 0;
                o->step = more ? STEP_GATHER : STEP_DONE;
            }
        }
        if (o->step != STEP_DONE) op_post_piece(o);
    }
    return ncclSuccess;
}

// ---- work -----------------------------------------------------------------------------------

// Sends of a rank to itself meet their receives here.
static void work_match_self(Work* w) {
    for (int i = 0; i < w->ops; i++) {
        Op* s = &w->op[i];
        if (s->kind != HOST_NCCL_SEND || s->root != s->comm->rank) continue;
        Op* r = NULL;
        for (int k = 0; k < w->ops && !r; k++) {
            Op* o = &w->op[k];
            bool fits = o->kind == HOST_NCCL_RECV && o->comm == s->comm && o->root == s->root;
            if (fits && o->step != STEP_DONE) r = o;
        }
        if (!r || r->count != s->count || r->type != s->type) {
            host_error("ncclSend: rank %d sends %zu %s to itself, and its group has no such "
                       "receive", s->root, s->count, type_name(s->type));
        }
        if (s->count) memcpy(r->recv, s->send, s->count * type_size(s->type));
        s->step = r->step = STEP_DONE;
    }
    for (int i = 0; i < w->ops; i++) {
        Op* o = &w->op[i];
        if (o->kind == HOST_NCCL_RECV && o->root == o->comm->rank && o->step != STEP_DONE) {
            host_error("ncclRecv: rank %d receives %zu %s from itself, and its group has no such "
                       "send", o->root, o->count, type_name(o->type));
        }
    }
}

// The first error that another thread or an injected failure has left for an op of the work.
static ncclResult_t work_interrupted(const Work* w) {
    for (int i = 0; i < w->ops; i++) {
        const Op* o = &w->op[i];
        if (o->step == STEP_DONE || !__atomic_load_n(&o->comm->aborted, __ATOMIC_ACQUIRE)) continue;
        return fail(ncclSystemError, "%s: rank %d waited in it when ncclCommAbort was called",
                    KIND_NAMES[o->kind], o->comm->rank);
    }
    return ncclSuccess;
}

static ncclResult_t work_wait(Work* w) {
    double began = 0;
    for (unsigned idle = 0;;) {
        bool moved = false, open = false;
        Op* waits = NULL;
        ncclResult_t result = work_interrupted(w);
        for (int i = 0; i < w->ops && result == ncclSuccess; i++) {
            Op* o = &w->op[i];
            if (!o->hangs) result = op_progress(o, &moved);
            open |= o->step != STEP_DONE;
            if (o->step != STEP_DONE && !waits) waits = o;
        }
        if (result != ncclSuccess || !open) return result;
        if (moved) {
            idle = 0;
            began = 0;
            continue;
        }
        // Others need the core that this rank would poll on.
        if (idle++ < 20) {
            sched_yield();
            continue;
        }
        sleep_us(idle < 200 ? 20 : 200);
        if (idle % 64) continue;
        double now = now_seconds();
        if (began == 0) began = now;
        if (now - began > timeout_seconds()) report_timeout(waits, now - began);
        for (int i = 0; now - began > PROBE_SECONDS && i < w->ops; i++) {
            Op* o = &w->op[i];
            if (o->step == STEP_HEADERS && !o->hangs) headers_probe(o);
        }
    }
}

static ncclResult_t run_result;     // of the work that ran last

static void work_run(void* arg) {
    Work* w = *(Work**)arg;
    run_result = ncclSuccess;
    for (int i = 0; i < w->ops && run_result == ncclSuccess; i++) {
        ncclComm_t comm = w->op[i].comm;
        run_result = (ncclResult_t)__atomic_load_n(&comm->error, __ATOMIC_ACQUIRE);
    }
    if (run_result != ncclSuccess) return;      // what failed before has said why
    work_match_self(w);
    for (int i = 0; i < w->ops; i++) {
        Op* o = &w->op[i];
        if (o->hangs) {
            fail(ncclSystemError, "%s: failure injected by HOST_NCCL_FAIL=%s", KIND_NAMES[o->kind],
                 getenv("HOST_NCCL_FAIL"));
            o->mine = Header{HEADER_MAGIC, o->kind, o->type, o->op, o->root, o->count, o->number};
            o->theirs = (Header*)allocate((size_t)o->comm->size, sizeof(Header));
            for (int r = 0; r < o->comm->size; r++) o->theirs[r].magic = HEADER_MAGIC;
            __atomic_store_n(&o->comm->error, ncclSystemError, __ATOMIC_RELEASE);
        } else if (o->step != STEP_DONE) {
            op_begin(o);
        }
    }
    double began = host_profile_begin();
    run_result = work_wait(w);
    host_profile_end(KIND_NAMES[w->op[0].kind], began);
    if (run_result != ncclSuccess) {
        // MPI may still write to what these ops own: it is left to it.
        for (int i = 0; i < w->ops; i++) {
            __atomic_store_n(&w->op[i].comm->error, run_result, __ATOMIC_RELEASE);
        }
        return;
    }
    for (int i = 0; i < w->ops; i++) op_free(&w->op[i]);
    free(w->op);
    free(w);
}

static cudaEvent_t chain, join;     // the last work; the other streams of a group

static void work_finish_all(void) {
    if (chain) cudaEventSynchronize(chain);
}

static bool stream_is_new(const Op* op, int i) {
    for (int k = 0; k < i; k++) {
        if (op[k].stream == op[i].stream) return false;
    }
    return true;
}

// A group's work is done on the stream of its first call; the others wait before and after.
static ncclResult_t work_submit(const Op* op, int ops) {
    Work* w = (Work*)allocate(1, sizeof(Work));
    cudaStream_t stream = op[0].stream;
    w->ops = ops;
    w->op = (Op*)allocate((size_t)ops, sizeof(Op));
    memcpy(w->op, op, (size_t)ops * sizeof(Op));
    if (!chain) {
        cudaEventCreateWithFlags(&chain, cudaEventDisableTiming);
        cudaEventCreateWithFlags(&join, cudaEventDisableTiming);
    }
    for (int i = 1; i < ops; i++) {
        if (!stream_is_new(op, i)) continue;
        cudaEventRecord(join, op[i].stream);
        cudaStreamWaitEvent(stream, join, 0);
    }
    cudaStreamWaitEvent(stream, chain, 0);
    run_result = ncclSuccess;
    host_stream_submit(stream, work_run, &w, sizeof w);
    cudaEventRecord(chain, stream);
    for (int i = 1; i < ops; i++) {
        if (stream_is_new(op, i)) cudaStreamWaitEvent(op[i].stream, chain, 0);
    }
    return host_streams_lazy() ? ncclSuccess : run_result;
}

static uint64_t op_number(Op* o) {
    if (o->kind == HOST_NCCL_SEND) return ++o->comm->sent[o->root];
    if (o->kind == HOST_NCCL_RECV) return ++o->comm->received[o->root];
    return ++o->comm->collectives;
}

static ncclResult_t call(int kind, const void* send, void* recv, size_t count, int type, int op,
                         int root, ncclComm_t comm, cudaStream_t stream) {
    Op o = {};
    o.kind = kind;
    o.type = type;
    o.op = op;
    o.root = root;
    o.send = (const char*)send;
    o.recv = (char*)recv;
    o.count = count;
    o.comm = comm;
    o.stream = stream;
    ncclResult_t result = op_check(&o);
    if (result != ncclSuccess) return result;
    Injected injected = injected_failure();
    if (injected == INJECT_ERROR) {
        return fail(ncclSystemError, "%s: failure injected by HOST_NCCL_FAIL=%s", KIND_NAMES[kind],
                    getenv("HOST_NCCL_FAIL"));
    }
    o.hangs = injected == INJECT_ASYNC;
    o.number = op_number(&o);
    kind_calls[kind]++;
    if (!group.depth) return work_submit(&o, 1);
    for (int i = 0; i < group.ops; i++) group_check_overlap(&group.op[i], &o);
    if (group.ops == group.capacity) {
        group.capacity = 2 * group.capacity + 16;
        group.op = (Op*)realloc(group.op, (size_t)group.capacity * sizeof(Op));
        if (!group.op) host_error("nccl: no memory for a group of %d calls", group.capacity);
    }
    group.op[group.ops++] = o;
    return ncclSuccess;
}

ncclResult_t ncclAllReduce(const void* send, void* recv, size_t count, ncclDataType_t type,
                           ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
    return call(HOST_NCCL_ALL_REDUCE, send, recv, count, type, op, 0, comm, stream);
}

ncclResult_t ncclReduce(const void* send, void* recv, size_t count, ncclDataType_t type,
                        ncclRedOp_t op, int root, ncclComm_t comm, cudaStream_t stream) {
    return call(HOST_NCCL_REDUCE, send, recv, count, type, op, root, comm, stream);
}

ncclResult_t ncclReduceScatter(const void* send, void* recv, size_t recvcount, ncclDataType_t type,
                               ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
    return call(HOST_NCCL_REDUCE_SCATTER, send, recv, recvcount, type, op, 0, comm, stream);
}

ncclResult_t ncclAllGather(const void* send, void* recv, size_t sendcount, ncclDataType_t type,
                           ncclComm_t comm, cudaStream_t stream) {
    return call(HOST_NCCL_ALL_GATHER, send, recv, sendcount, type, 0, 0, comm, stream);
}

ncclResult_t ncclBroadcast(const void* send, void* recv, size_t count, ncclDataType_t type,
                           int root, ncclComm_t comm, cudaStream_t stream) {
    return call(HOST_NCCL_BROADCAST, send, recv, count, type, 0, root, comm, stream);
}

ncclResult_t ncclSend(const void* send, size_t count, ncclDataType_t type, int peer,
                      ncclComm_t comm, cudaStream_t stream) {
    return call(HOST_NCCL_SEND, send, NULL, count, type, 0, peer, comm, stream);
}

ncclResult_t ncclRecv(void* recv, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
    return call(HOST_NCCL_RECV, NULL, recv, count, type, 0, peer, comm, stream);
}

ncclResult_t ncclGroupStart(void) {
    group.depth++;
    return ncclSuccess;
}

// An error of any call drops the group, and is returned again here.
ncclResult_t ncclGroupEnd(void) {
    if (!group.depth) {
        return fail(ncclInvalidUsage, "ncclGroupEnd: there was no ncclGroupStart before");
    }
    if (--group.depth) return ncclSuccess;
    ncclResult_t result = group.error;
    int ops = group.ops;
    group.error = ncclSuccess;
    group.ops = 0;
    return result == ncclSuccess && ops ? work_submit(group.op, ops) : result;
}

// ---- communicators --------------------------------------------------------------------------

static ncclComm_t comm_make(MPI_Comm mpi, int rank, int size) {
    ncclComm_t comm = (ncclComm_t)allocate(1, sizeof(struct ncclComm));
    comm->magic = COMM_MAGIC;
    comm->rank = rank;
    comm->size = size;
    comm->mpi = mpi;
    comm->sent = (uint64_t*)allocate((size_t)size, sizeof(uint64_t));
    comm->received = (uint64_t*)allocate((size_t)size, sizeof(uint64_t));
    cudaGetDevice(&comm->device);
    if (mpi == MPI_COMM_NULL) return comm;
    int *largest = NULL, found = 0;
    MPI_Comm_get_attr(MPI_COMM_WORLD, MPI_TAG_UB, &largest, &found);
    comm->tags = ((uint64_t)(found ? *largest : 32767) - TAG_DATA - 1) / 2;
    MPI_Comm_set_errhandler(mpi, MPI_ERRORS_RETURN);
    return comm;
}

static bool comm_usable(ncclComm_t comm) {
    return !__atomic_load_n(&comm->error, __ATOMIC_ACQUIRE) &&
           !__atomic_load_n(&comm->aborted, __ATOMIC_ACQUIRE);
}

// A call without data, for which the ranks only meet.
static ncclResult_t comm_meet(ncclComm_t comm, int kind) {
    Work* w = (Work*)allocate(1, sizeof(Work));
    w->ops = 1;
    w->op = (Op*)allocate(1, sizeof(Op));
    w->op->kind = kind;
    w->op->comm = comm;
    w->op->number = op_number(w->op);
    work_run(&w);
    return run_result;
}

ncclResult_t ncclGetVersion(int* version) {
    if (!version) return fail(ncclInvalidArgument, "ncclGetVersion: version is NULL");
    *version = NCCL_VERSION_CODE;
    return ncclSuccess;
}

// Different in every call of every process, as the real one is.
ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    static unsigned calls;
    if (!id) return fail(ncclInvalidArgument, "ncclGetUniqueId: id is NULL");
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "host %ld %u %.9f", (long)getpid(), calls++,
             now_seconds());
    return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t* comm, int nranks, ncclUniqueId id, int rank) {
    const char* name = "ncclCommInitRank";
    if (!comm) return fail(ncclInvalidArgument, "%s: comm is NULL", name);
    *comm = NULL;
    if (nranks < 1 || rank < 0 || rank >= nranks) {
        return fail(ncclInvalidArgument, "%s: rank %d of %d ranks", name, rank, nranks);
    }
    if (nranks == 1) {
        *comm = comm_make(MPI_COMM_NULL, 0, 1);
        return ncclSuccess;
    }
    ncclResult_t result = mpi_check(name);
    if (result != ncclSuccess) return result;
    int world_rank = 0, world_size = 0;
    MPI_Comm_rank(MPI_COMM_WORLD, &world_rank);
    MPI_Comm_size(MPI_COMM_WORLD, &world_size);
    if (nranks != world_size || rank != world_rank) {
        return fail(ncclInvalidUsage, "%s: rank %d of %d, but MPI started this process as rank %d "
                    "of %d", name, rank, nranks, world_rank, world_size);
    }
    work_finish_all();
    MPI_Comm mpi = MPI_COMM_NULL;
    int code = MPI_Comm_dup(MPI_COMM_WORLD, &mpi);
    if (code != MPI_SUCCESS) return fail_mpi(name, code);
    ncclUniqueId first = id;
    MPI_Bcast(&first, sizeof first, MPI_BYTE, 0, mpi);
    int same = !memcmp(&first, &id, sizeof id), least = 0;
    MPI_Allreduce(&same, &least, 1, MPI_INT, MPI_MIN, mpi);
    if (!least) {
        MPI_Comm_free(&mpi);
        return fail(ncclInvalidArgument, "%s: the ranks have different ids; rank %d has %s", name,
                    rank, same ? "the one of rank 0" : "another one than rank 0");
    }
    *comm = comm_make(mpi, rank, nranks);
    return ncclSuccess;
}

ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t* split,
                           ncclConfig_t* config) {
    const char* name = KIND_NAMES[KIND_SPLIT];
    ncclResult_t result = comm_check(comm, name);
    if (result != ncclSuccess) return result;
    if (!split || config) {
        return fail(ncclInvalidArgument, split ? "%s: only a NULL config is known here"
                                               : "%s: the new communicator is NULL", name);
    }
    *split = NULL;
    if (color < 0 && color != NCCL_SPLIT_NOCOLOR) {
        return fail(ncclInvalidArgument, "%s: color %d, wanted one from 0 on or NCCL_SPLIT_NOCOLOR",
                    name, color);
    }
    if (group.depth) return fail(ncclInvalidUsage, "%s: not here within a group", name);
    if (!comm_usable(comm)) return fail(ncclInvalidUsage, "%s: the communicator failed", name);
    if (comm->size == 1) {
        if (color >= 0) *split = comm_make(MPI_COMM_NULL, 0, 1);
        return ncclSuccess;
    }
    result = mpi_check(name);
    if (result != ncclSuccess) return result;
    work_finish_all();
    result = comm_meet(comm, KIND_SPLIT);
    if (result != ncclSuccess) return result;
    MPI_Comm mpi = MPI_COMM_NULL;
    int code = MPI_Comm_split(comm->mpi, color < 0 ? MPI_UNDEFINED : color, key, &mpi);
    if (code != MPI_SUCCESS) return fail_mpi(name, code);
    if (mpi == MPI_COMM_NULL) return ncclSuccess;
    int rank = 0, size = 0;
    MPI_Comm_rank(mpi, &rank);
    MPI_Comm_size(mpi, &size);
    if (size == 1) MPI_Comm_free(&mpi);
    *split = comm_make(mpi, rank, size);
    return ncclSuccess;
}

ncclResult_t ncclCommFinalize(ncclComm_t comm) {
    ncclResult_t result = comm_check(comm, "ncclCommFinalize");
    if (result != ncclSuccess) return result;
    work_finish_all();
    return (ncclResult_t)__atomic_load_n(&comm->error, __ATOMIC_ACQUIRE);
}

// The ranks meet once more, so that one that still waits in a call learns that it waits in vain.
ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    const char* name = KIND_NAMES[KIND_DESTROY];
    if (!comm) return ncclSuccess;
    ncclResult_t result = comm_check(comm, name);
    if (result != ncclSuccess) return result;
    if (group.depth) return fail(ncclInvalidUsage, "%s: not within a group", name);
    work_finish_all();
    if (comm->size > 1 && comm_usable(comm)) {
        result = mpi_check(name);
        if (result == ncclSuccess) result = comm_meet(comm, KIND_DESTROY);
        if (result == ncclSuccess) MPI_Comm_free(&comm->mpi);
    }
    comm->magic = 0;
    free(comm->sent);
    free(comm->received);
    free(comm);
    return result;
}

// No MPI call and no free: the main thread may be inside a call of this communicator.
ncclResult_t ncclCommAbort(ncclComm_t comm) {
    if (!comm) return ncclSuccess;
    ncclResult_t result = comm_check(comm, "ncclCommAbort");
    if (result != ncclSuccess) return result;
    int none = ncclSuccess;
    __atomic_compare_exchange_n(&comm->error, &none, (int)ncclSystemError, false, __ATOMIC_ACQ_REL,
                                __ATOMIC_ACQUIRE);
    __atomic_store_n(&comm->aborted, 1, __ATOMIC_RELEASE);
    return ncclSuccess;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
    ncclResult_t result = comm_check(comm, "ncclCommGetAsyncError");
    if (result != ncclSuccess) return result;
    if (!error) return fail(ncclInvalidArgument, "ncclCommGetAsyncError: error is NULL");
    *error = (ncclResult_t)__atomic_load_n(&comm->error, __ATOMIC_ACQUIRE);
    return ncclSuccess;
}

static ncclResult_t comm_check_out(ncclResult_t result, const int* out, const char* name) {
    if (result == ncclSuccess && !out) {
        return fail(ncclInvalidArgument, "%s: the result is NULL", name);
    }
    return result;
}

ncclResult_t ncclCommCount(const ncclComm_t comm, int* count) {
    const char* name = "ncclCommCount";
    ncclResult_t result = comm_check_out(comm_check(comm, name), count, name);
    if (result == ncclSuccess) *count = comm->size;
    return result;
}

ncclResult_t ncclCommUserRank(const ncclComm_t comm, int* rank) {
    const char* name = "ncclCommUserRank";
    ncclResult_t result = comm_check_out(comm_check(comm, name), rank, name);
    if (result == ncclSuccess) *rank = comm->rank;
    return result;
}

ncclResult_t ncclCommCuDevice(const ncclComm_t comm, int* device) {
    const char* name = "ncclCommCuDevice";
    ncclResult_t result = comm_check_out(comm_check(comm, name), device, name);
    if (result == ncclSuccess) *device = comm->device;
    return result;
}

#endif
