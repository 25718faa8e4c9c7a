/*
ZeRO-1 with whole matrices: who owns what, and the two collectives that go with it.

Every rank holds all weights p and its own gradients g. A bank (a run of equal tensors) is cut into
units: a matrix of the layers is a unit, and so is each rank's share of a table. A unit has one
owner, who alone keeps its fp32 master and optimizer state and updates it. No matrix is ever cut, so
Muon costs no communication beyond what AdamW would:

    reduce      g of the owner = sum of g over ranks            (reduce-scatter)
    update      p of the owner, from g, master and state        (no communication)
    gather      p of all = p of the owner                       (all-gather)

Units travel in buckets of several layers. A bucket is reduced as soon as the backward of its layers
is queued, beside the backward of the layers before it, and gathered beside the update of other
banks and the next forward; an event per bucket says when. All communication is on one stream and
one communicator, in one order on every rank.

Where the units of the buckets of the same layers divide by the ranks, rank r owns the r-th part:
one ncclReduceScatter, one ncclAllGather, both in place. The units of other buckets go, the costly
ones first, to whoever has least to do, and travel in a group of ncclReduce or ncclBroadcast, one
per unit. Either way a rank sends (N-1)/N of the buffer's bytes, on the mean over ranks exactly:

    bytes per step and rank = (N-1)/N P (bytes of a gradient + bytes of a weight) + small terms

with P the elements of the banks, tables filled up to N equal shares. Replicated banks (the few
learned scalars; all banks under --zero 0) are all-reduced: 2 (N-1) ceil(n/N) elements.

wire        What gradients travel in: bf16 or fp32. In bf16 a bucket is rounded into a buffer of its
            own on the way, and NCCL may round every partial sum: a sum of N terms is off by up to
            N 2^-9 of the largest partial sum. In fp32 it is reduced where it lies.
order       NCCL fixes the order of a sum for a given N, algorithm and protocol; the host's NCCL is
            a ring. Other N: the same terms in another order.
errors      A failed call ends the rank with NCCL's text; asynchronous errors are zero_failed's.
test        test/test_zero.cu, under mpirun with 1, 2, 3, 4 and 8 ranks
source      Rajbhandari et al. 2020, arXiv:1910.02054; banks of whole matrices: modded-nanogpt and
            Megatron's layer-wise optimizer, found independently
*/
#pragma once
#include "cast.cuh"
#include "ranks.h"
#include "trace.h"
#ifdef WITH_NCCL
#include <nccl.h>
#endif

typedef struct ZeroBucket {
    int first, units;           // neighbouring units of the bank
    bool even;                  // rank r owns the r-th of N equal parts
    char label[48];             // "attn 4-7"
    cudaEvent_t ready;          // compute stream: what is to be sent is there
    cudaEvent_t gathered;       // communication stream: the weights are there
} ZeroBucket;

typedef struct ZeroBank {
    size_t unit;                // elements
    int units;
    bool replicated;            // every rank owns all of it
    double cost;                // of updating a unit, for the balance between ranks
    int* owner;                 // (units)
    int* own;                   // (owned) the units of this rank, ascending
    int owned;
    ZeroBucket* buckets;
    int bucket_count;
} ZeroBank;

typedef struct Zero {
    int rank, world;
    bool shard;                 // --zero 1
    bool wire_bf16;
    cudaStream_t stream;        // of all communication
    cudaEvent_t sent;           // the small sums and the reductions so far are done
    bf16* wire;                 // gradients of one bucket, rounded
    double* load;               // (world) cost of the update, by rank
#ifdef WITH_NCCL
    ncclComm_t comm;
#endif
} Zero;

// ---- who owns what ---------------------------------------------------------------------------

// Layers in a bucket, so that banks of `slots[i]` units per layer divide by the ranks: the smallest
// multiple of what divides that has at least three layers (tens of megabytes at 124M parameters, as
// a collective needs for its full bandwidth), if that leaves two buckets to overlap; else a third
// of the layers, divided or not.
static inline int zero_bucket_layers(int layers, const int* slots, int banks, int world) {
    int least = 1;
    for (bool fits = false; !fits; least += !fits) {
        fits = true;
        for (int i = 0; i < banks; i++) fits = fits && least * slots[i] % world == 0;
    }
    int size = (int)ceil_div(3, least) * least;
    return 2 * size <= layers ? size : (int)ceil_div(layers, 3);
}

// Element count of a rank's share of a table of n elements.
static inline size_t zero_share(const Zero* z, size_t n) {
    return z->shard ? ceil_div(ceil_div(n, z->world), 8) * 8 : n;
}

static inline void zero_bank_init(const Zero* z, ZeroBank* bank, size_t unit, int units,
                                  int units_per_bucket, bool replicated, double cost) {
    bank->unit = unit;
    bank->units = units;
    bank->replicated = replicated || !z->shard;
    bank->cost = cost;
    bank->owner = (int*)host_alloc(units, sizeof(int));
    bank->own = (int*)host_alloc(units, sizeof(int));
    bank->bucket_count = (int)ceil_div(units, units_per_bucket);
    bank->buckets = (ZeroBucket*)host_alloc(bank->bucket_count, sizeof(ZeroBucket));
    for (int k = 0; k < bank->bucket_count; k++) {
        ZeroBucket* bucket = &bank->buckets[k];
        bucket->first = k * units_per_bucket;
        int left = units - bucket->first;
        bucket->units = left < units_per_bucket ? left : units_per_bucket;
        bucket->even = bucket->units % z->world == 0;
    }
}

static inline void zero_bank_free(ZeroBank* bank) {
    free(bank->owner);
    free(bank->own);
    free(bank->buckets);
    memset(bank, 0, sizeof *bank);
}

// The rank with least to do, the lowest of them.
static inline int zero_idlest(const Zero* z) {
    int rank = 0;
    for (int r = 1; r < z->world; r++) if (z->load[r] < z->load[rank]) rank = r;
    return rank;
}

// A bank that divides beside one that does not would leave nothing to even out the load with.
static inline void zero_match(const Zero* z, ZeroBank* const* banks, int count) {
    for (int a = 0; a < count; a++) {
        for (int k = 0; k < banks[a]->bucket_count && banks[a]->cost > 0; k++) {
            for (int b = 0; b < count; b++) {
                bool beside = banks[b]->cost > 0 && k < banks[b]->bucket_count;
                if (beside && banks[b]->buckets[k].units % z->world != 0)
                    banks[a]->buckets[k].even = false;
            }
        }
    }
}

// Gives every unit an owner; the same on every rank, as nothing but sizes enters.
static inline void zero_deal(Zero* z, ZeroBank* const* banks, int count) {
    zero_match(z, banks, count);
    memset(z->load, 0, z->world * sizeof(double));
    for (int b = 0; b < count; b++) {
        ZeroBank* bank = banks[b];
        for (int k = 0; k < bank->bucket_count; k++) {
            ZeroBucket* bucket = &bank->buckets[k];
            for (int i = 0; i < bucket->units; i++) {
                int part = bucket->units / z->world;
                bool dealt = bucket->even && !bank->replicated;
                bank->owner[bucket->first + i] = dealt ? i / part : -1;
                if (dealt) z->load[i / part] += bank->cost;
            }
        }
    }
    for (;;) {      // the costliest unit that has no owner yet; the first of equals
        ZeroBank* next = NULL;
        int unit = 0;
        for (int b = 0; b < count; b++) {
            if (banks[b]->replicated || (next && banks[b]->cost <= next->cost)) continue;
            int i = 0;
            while (i < banks[b]->units && banks[b]->owner[i] >= 0) i++;
            if (i < banks[b]->units) next = banks[b], unit = i;
        }
        if (!next) break;
        next->owner[unit] = zero_idlest(z);
        z->load[next->owner[unit]] += next->cost;
    }
    for (int b = 0; b < count; b++) {
        ZeroBank* bank = banks[b];
        bank->owned = 0;
        for (int i = 0; i < bank->units; i++)
            if (bank->replicated || bank->owner[i] == z->rank) bank->own[bank->owned++] = i;
    }
}

// Number of neighbouring units of this rank from own[i] on: they are one run in p and g, and one in
// the compact master and state.
static inline int zero_run(const ZeroBank* bank, int i) {
    int n = 1;
    while (i + n < bank->owned && bank->own[i + n] == bank->own[i] + n) n++;
    return n;
}

// ---- bytes -----------------------------------------------------------------------------------

static inline size_t zero_sum_bytes(const Zero* z, size_t n, size_t size) {
    return 2 * (size_t)(z->world - 1) * ceil_div(n, z->world) * size;
}

static inline size_t zero_wire_size(const Zero* z) {
    return z->wire_bf16 ? sizeof(bf16) : sizeof(float);
}

// What this rank sends to reduce the bank's gradients.
static inline size_t zero_reduce_bytes(const Zero* z, const ZeroBank* bank) {
    size_t bytes = 0, element = zero_wire_size(z);
    for (int k = 0; k < bank->bucket_count; k++) {
        const ZeroBucket* bucket = &bank->buckets[k];
        if (bank->replicated) {
            bytes += zero_sum_bytes(z, bucket->units * bank->unit, element);
            continue;
        }
        for (int i = 0; i < bucket->units; i++)      // a unit that is not its own leaves this rank
            if (bank->owner[bucket->first + i] != z->rank) bytes += bank->unit * element;
    }
    return bytes;
}

// What it sends to gather the weights: each unit of its own to all others.
static inline size_t zero_gather_bytes(const Zero* z, const ZeroBank* bank) {
    if (bank->replicated) return 0;
    return (size_t)(z->world - 1) * bank->owned * bank->unit * sizeof(floatX);
}

// The buffer that a bank's gradients are rounded into.
static inline size_t zero_wire_elements(const Zero* z, const ZeroBank* bank) {
    size_t most = 0;
    for (int k = 0; k < bank->bucket_count && z->wire_bf16 && z->world > 1; k++) {
        size_t n = bank->buckets[k].units * bank->unit;
        if (n > most) most = n;
    }
    return most;
}

// ---- start and end -----------------------------------------------------------------------------

static inline void zero_init(Zero* z, int rank, int world, bool shard, bool wire_bf16) {
    memset(z, 0, sizeof *z);
    z->rank = rank;
    z->world = world;
    z->shard = shard && world > 1;
    z->wire_bf16 = wire_bf16;
    z->load = (double*)host_alloc(world, sizeof(double));
}

#ifdef WITH_NCCL

static inline void nccl_check(ncclResult_t result, const char* what, const char* file, int line) {
    if (result == ncclSuccess) return;
    die("%s: %s: %s\n            at %s:%d; NCCL_DEBUG=INFO says more", what,
        ncclGetErrorString(result), ncclGetLastError(NULL), file, line);
}
#define NCCL_CHECK(expression) nccl_check((expression), #expression, __FILE__, __LINE__)

static inline void zero_connect(Zero* z, Ranks* ranks) {
    if (z->world == 1) return;
    ncclUniqueId id;
    memset(&id, 0, sizeof id);
    if (z->rank == 0) NCCL_CHECK(ncclGetUniqueId(&id));
    ranks_broadcast(ranks, &id, sizeof id);
    ncclComm_t comm;
    NCCL_CHECK(ncclCommInitRank(&comm, z->world, id, z->rank));
    __atomic_store_n(&z->comm, comm, __ATOMIC_RELEASE);      // from here on the watch asks it, too
}

// Whether NCCL has noticed, by itself, that something broke; asked by the watch.
static inline bool zero_failed(const Zero* z, char* what, size_t size) {
    ncclComm_t comm = __atomic_load_n(&z->comm, __ATOMIC_ACQUIRE);
    if (!comm) return false;
    ncclResult_t result = ncclSuccess, asked = ncclCommGetAsyncError(comm, &result);
    if (asked != ncclSuccess) result = asked;
    if (result == ncclSuccess || result == ncclInProgress) return false;
    snprintf(what, size, "NCCL: %s: %s", ncclGetErrorString(result), ncclGetLastError(comm));
    return true;
}

static inline void zero_disconnect(Zero* z) {
    ncclComm_t comm = __atomic_exchange_n(&z->comm, (ncclComm_t)NULL, __ATOMIC_ACQ_REL);
    if (comm) NCCL_CHECK(ncclCommDestroy(comm));
}

#else

static inline void zero_connect(Zero* z, Ranks* ranks) {
    (void)ranks;
    REQUIRE(z->world == 1, "%d ranks, but this program was built with NCCL=0\n"
            "build it with `make`, or start one process", z->world);
}
static inline bool zero_failed(const Zero* z, char* what, size_t size) {
    (void)z, (void)what, (void)size;
    return false;
}
static inline void zero_disconnect(Zero* z) { (void)z; }

#endif

// One GPU for each rank of this host. Where the launcher shows each process only its own GPU, all
// choose number 0, so what counts is that no two got the same one.
static inline void zero_choose_device(Ranks* ranks) {
    typedef struct Place { char host[256], bus[64]; int devices; } Place;
    Place mine;
    memset(&mine, 0, sizeof mine);
    CUDA_CHECK(cudaGetDeviceCount(&mine.devices));
    REQUIRE(mine.devices > 0, "no GPU on %s\nnvidia-smi should list some", ranks->host);
    int device = ranks->local_rank % mine.devices;
    CUDA_CHECK(cudaSetDevice(device));
    CUDA_CHECK(cudaDeviceGetPCIBusId(mine.bus, sizeof mine.bus, device));
    snprintf(mine.host, sizeof mine.host, "%s", ranks->host);
    Place* all = (Place*)host_alloc(ranks->world, sizeof(Place));
    ranks_gather(ranks, all, &mine, sizeof mine);
    for (int a = 0; a < ranks->world && ranks->rank == 0; a++) {
        for (int b = 0; b < a; b++) {
            bool same = !strcmp(all[a].host, all[b].host) && !strcmp(all[a].bus, all[b].bus);
            REQUIRE(!same, "ranks %d and %d are both on GPU %s of %s, which has %d\n"
                    "start one rank per GPU: a smaller -np, or more hosts", b, a, all[a].bus,
                    all[a].host, all[a].devices);
        }
    }
    free(all);
}

// Streams and events of the buckets; `wire` is zero_wire_elements of the largest bank.
static inline void zero_start(Zero* z, ZeroBank* const* banks, int count, bf16* wire) {
    int least, greatest;
    z->wire = wire;
    CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    // A collective is small work that others wait for: its blocks go before those of the backward.
    CUDA_CHECK(cudaStreamCreateWithPriority(&z->stream, cudaStreamNonBlocking, greatest));
    trace_name_stream(z->stream, "communication");
    CUDA_CHECK(cudaEventCreateWithFlags(&z->sent, cudaEventDisableTiming));
    for (int b = 0; b < count; b++) {
        for (int k = 0; k < banks[b]->bucket_count; k++) {
            ZeroBucket* bucket = &banks[b]->buckets[k];
            CUDA_CHECK(cudaEventCreateWithFlags(&bucket->ready, cudaEventDisableTiming));
            CUDA_CHECK(cudaEventCreateWithFlags(&bucket->gathered, cudaEventDisableTiming));
        }
    }
}

static inline void zero_free(Zero* z, ZeroBank* const* banks, int count) {
    CUDA_CHECK(cudaStreamSynchronize(z->stream));
    zero_disconnect(z);
    for (int b = 0; b < count; b++) {
        for (int k = 0; k < banks[b]->bucket_count; k++) {
            CUDA_CHECK(cudaEventDestroy(banks[b]->buckets[k].ready));
            CUDA_CHECK(cudaEventDestroy(banks[b]->buckets[k].gathered));
        }
    }
    CUDA_CHECK(cudaEventDestroy(z->sent));
    CUDA_CHECK(cudaStreamDestroy(z->stream));
    free(z->load);
}

// ---- collectives -------------------------------------------------------------------------------

// The communication stream goes on when the compute stream has come to this point.
static inline void zero_after(Zero* z, cudaEvent_t event, cudaStream_t compute) {
    CUDA_CHECK(trace_event_record(event, compute));
    CUDA_CHECK(trace_stream_wait(z->stream, event));
}

#ifdef WITH_NCCL

typedef enum { ZERO_REDUCE, ZERO_GATHER } ZeroMove;

// Sums a bucket to the owners of its units, or copies it from them, in place.
static inline void zero_move(Zero* z, const ZeroBank* bank, const ZeroBucket* bucket,
                             ZeroMove move, void* buffer, ncclDataType_t type, size_t size) {
    size_t n = bucket->units * bank->unit;
    char* data = (char*)buffer;
    int op = trace_begin(move == ZERO_REDUCE ? "reduce" : "gather", z->stream);
    if (bank->replicated) {
        NCCL_CHECK(ncclAllReduce(data, data, n, type, ncclSum, z->comm, z->stream));
    } else if (bucket->even) {
        size_t part = n / z->world;
        char* mine = data + z->rank * part * size;
        if (move == ZERO_REDUCE)
            NCCL_CHECK(ncclReduceScatter(data, mine, part, type, ncclSum, z->comm, z->stream));
        else NCCL_CHECK(ncclAllGather(mine, data, part, type, z->comm, z->stream));
    } else {
        NCCL_CHECK(ncclGroupStart());
        for (int i = 0; i < bucket->units; i++) {
            char* unit = data + i * bank->unit * size;
            int owner = bank->owner[bucket->first + i];
            if (move == ZERO_REDUCE)
                NCCL_CHECK(ncclReduce(unit, unit, bank->unit, type, ncclSum, owner, z->comm,
                                      z->stream));
            else NCCL_CHECK(ncclBroadcast(unit, unit, bank->unit, type, owner, z->comm, z->stream));
        }
        NCCL_CHECK(ncclGroupEnd());
    }
    trace_end(op, z->stream);
}

// Sums n small numbers over ranks, in place; the compute stream goes on with the sums.
static inline void zero_sum(Zero* z, void* values, size_t n, bool doubles, cudaStream_t compute) {
    if (z->world == 1) return;
    zero_after(z, z->sent, compute);
    int op = trace_begin("sum", z->stream);
    NCCL_CHECK(ncclAllReduce(values, values, n, doubles ? ncclFloat64 : ncclFloat32, ncclSum,
                             z->comm, z->stream));
    trace_end(op, z->stream);
    CUDA_CHECK(trace_event_record(z->sent, z->stream));
    CUDA_CHECK(trace_stream_wait(compute, z->sent));
}

// Queues the sum of a bucket's gradients, of which the compute stream has just queued the last.
// Afterwards g holds it in the units of this rank, and nothing of use in the others.
static inline void zero_reduce(Zero* z, ZeroBank* bank, int k, float* g, cudaStream_t compute) {
    if (z->world == 1) return;
    ZeroBucket* bucket = &bank->buckets[k];
    size_t n = bucket->units * bank->unit;
    float* data = g + bucket->first * bank->unit;
    zero_after(z, bucket->ready, compute);
    trace_label("reduce %s", bucket->label);
    if (!z->wire_bf16) {
        zero_move(z, bank, bucket, ZERO_REDUCE, data, ncclFloat32, sizeof(float));
        return;
    }
    pack_bf16(z->wire, data, n, z->stream);
    zero_move(z, bank, bucket, ZERO_REDUCE, z->wire, ncclBfloat16, sizeof(bf16));
    for (int i = 0, run; i < bank->owned; i += run) {
        run = zero_run(bank, i);
        int from = bank->own[i] - bucket->first, to = from + run;
        if (from < 0) from = 0;
        if (to > bucket->units) to = bucket->units;
        if (from >= to) continue;
        unpack_bf16(data + from * bank->unit, z->wire + from * bank->unit,
                    (to - from) * bank->unit, z->stream);
    }
}

// Queues the copy of a bucket from its owners to all; `buffer` is the whole bank, in floats or in
// floatX. Nobody may read it before zero_wait.
static inline void zero_gather(Zero* z, ZeroBank* bank, int k, void* buffer, bool floats,
                               cudaStream_t compute) {
    if (z->world == 1 || bank->replicated) return;
    ZeroBucket* bucket = &bank->buckets[k];
    bool fp32 = floats || !FLOATX_IS_BF16;
    size_t size = fp32 ? sizeof(float) : sizeof(bf16);
    zero_after(z, bucket->ready, compute);
    trace_label("gather %s", bucket->label);
    zero_move(z, bank, bucket, ZERO_GATHER, (char*)buffer + bucket->first * bank->unit * size,
              fp32 ? ncclFloat32 : ncclBfloat16, size);
    CUDA_CHECK(trace_event_record(bucket->gathered, z->stream));
}

#else    // one rank: there is nobody to send to, see zero_connect

static inline void zero_sum(Zero*, void*, size_t, bool, cudaStream_t) {}
static inline void zero_reduce(Zero*, ZeroBank*, int, float*, cudaStream_t) {}
static inline void zero_gather(Zero*, ZeroBank*, int, void*, bool, cudaStream_t) {}

#endif

// The compute stream goes on when all sums queued so far are there.
static inline void zero_wait_reduced(Zero* z, cudaStream_t compute) {
    if (z->world == 1) return;
    CUDA_CHECK(trace_event_record(z->sent, z->stream));
    CUDA_CHECK(trace_stream_wait(compute, z->sent));
}

// The compute stream goes on when the bucket that begins with unit `first`, if one does, is there.
static inline void zero_wait_gathered(Zero* z, ZeroBank* bank, int first, cudaStream_t compute) {
    if (z->world == 1 || bank->replicated) return;
    for (int k = 0; k < bank->bucket_count; k++) {
        if (bank->buckets[k].first != first) continue;
        CUDA_CHECK(trace_stream_wait(compute, bank->buckets[k].gathered));
    }
}
