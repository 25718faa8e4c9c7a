/*
Token embedding: a gather forward, a scatter-add backward that is deterministic.

    out(n, :)  = wte(tokens[n], :)
    dwte(v, :) += Σ_{n: tokens[n] = v} dout(n, :)            fp32, in a fixed order

tokens    (N) int, each in 0..V-1. The gather does not check them: an id outside the table is a
          wild read. embedding_index_build does check, and the data loader before it.
wte       (V, C) floatX; out dout (N, C) floatX; dwte (V, C) fp32
          C a multiple of 8, pointers aligned to 16 bytes
saved     nothing; the backward pass wants the batch's EmbeddingIndex
cost      forward 4 bytes per element of out in bf16; backward 2 per element of dout and 8 per
          element of the rows of dwte that occur; bound by memory
test      test/cases_embedding.h

The backward pass without atomics. A counting sort on the host lists the positions of each token
that occurs, ascending. A list is cut into segments of SEGMENT positions, and a thread sums one
segment's rows in 8 channels, in fp32, first position to last. A token with one segment (nearly all
of a GPT-2 vocabulary: at N = 65,536 its most frequent tokens hold a few per cent of the positions)
is then added to dwte at once. The segments of a longer list go to rows of `partial`, and a second
kernel adds these up, again in order. The longest chain of dependent additions is thus
SEGMENT + n / SEGMENT for a token that occurs n times: 64 + 41 for n = 2,600, 64 + 469 for the
30,000 that a text's spaces may reach with a vocabulary of bytes. No kernel has a barrier or shared
memory. Fewer than 2N / SEGMENT segments have a row in `partial`: ceil(n/S) < 2n/S for n > S. Every
row of dwte and of `partial` has one writer, so the sums do not depend on the order of the blocks.

The grids depend on N and C alone, not on the batch: the counts of segments are read on the device.
*/
#pragma once
#include <limits.h>
#include <string.h>
#include "device.cuh"

constexpr int EMBEDDING_SEGMENT = 64;

typedef struct {
    int capacity;           // most positions per batch
    int V, C;
    int N;                  // positions of the batch that was built last
    int* counts;            // host, (V + 1): where each token's list begins
    int* host;              // pinned; what build writes and upload copies
    int* device;
    float* partial;         // device, (2 capacity / SEGMENT, C)
    cudaEvent_t copied;     // the last upload has read `host`
} EmbeddingIndex;

// The parts of the one array of ints that goes to the device.
typedef struct {
    int* n_segments;        // 1, and the number of long lists behind it
    int* n_long;
    int* positions;         // N: the positions by token, ascending within a token
    int* segment_begin;     // N + 1: first of the segment's positions; the next entry ends it
    int* segment_row;       // N: row of dwte it is added to, or ~row of `partial` it is written to
    int* long_token;        // N / SEGMENT: tokens with more than one segment
    int* long_begin;        // N / SEGMENT + 1: first of the token's rows in `partial`
} EmbeddingLists;

static __host__ __device__ inline EmbeddingLists embedding_lists(int* base, int capacity) {
    EmbeddingLists l;
    l.n_segments = base;
    l.n_long = base + 1;
    l.positions = base + 2;
    l.segment_begin = l.positions + capacity;
    l.segment_row = l.segment_begin + capacity + 1;
    l.long_token = l.segment_row + capacity;
    l.long_begin = l.long_token + capacity / EMBEDDING_SEGMENT;
    return l;
}

static inline size_t embedding_lists_bytes(int capacity) {
    return ((size_t)3 * capacity + 2 * (capacity / EMBEDDING_SEGMENT) + 4) * sizeof(int);
}

// ---- kernels -----------------------------------------------------------------------------------

// A thread owns 8 channels of one row.
static __global__ void embedding_forward_kernel(floatX* out, const floatX* wte, const int* tokens,
                                                int N, int C) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    unsigned chunks = C / 8, n = i / chunks, c = 8 * (i % chunks);
    if (n >= (unsigned)N) return;
    store8(out + (size_t)n * C + c, load8(wte + (size_t)tokens[n] * C + c));
}

static __global__ void embedding_segments_kernel(float* dwte, float* partial, const floatX* dout,
                                                 int* base, int capacity, int C) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    unsigned chunks = C / 8, segment = i / chunks, c = 8 * (i % chunks);
    EmbeddingLists lists = embedding_lists(base, capacity);
    if (segment >= (unsigned)*lists.n_segments) return;
    int end = lists.segment_begin[segment + 1];
    float8 total = {};
#pragma unroll 4
    for (int p = lists.segment_begin[segment]; p < end; p++) {
        float8 a = load8(dout + (size_t)lists.positions[p] * C + c);
        for (int j = 0; j < 8; j++) total.v[j] += a.v[j];
    }
    int row = lists.segment_row[segment];
    if (row < 0) {
        store8(partial + (size_t)~row * C + c, total);
        return;
    }
    float8 old = load8(dwte + (size_t)row * C + c);
    for (int j = 0; j < 8; j++) total.v[j] += old.v[j];
    store8(dwte + (size_t)row * C + c, total);
}

static __global__ void embedding_long_kernel(float* dwte, const float* partial, int* base,
                                             int capacity, int C) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    unsigned chunks = C / 8, list = i / chunks, c = 8 * (i % chunks);
    EmbeddingLists lists = embedding_lists(base, capacity);
    if (list >= (unsigned)*lists.n_long) return;
    int end = lists.long_begin[list + 1];
    float8 total = {};
#pragma unroll 4
    for (int p = lists.long_begin[list]; p < end; p++) {
        float8 a = load8(partial + (size_t)p * C + c);
        for (int j = 0; j < 8; j++) total.v[j] += a.v[j];
    }
    float* row = dwte + (size_t)lists.long_token[list] * C + c;
    float8 old = load8(row);
    for (int j = 0; j < 8; j++) total.v[j] += old.v[j];
    store8(row, total);
}

// ---- the index ---------------------------------------------------------------------------------

// For batches of up to `capacity` positions.
static inline void embedding_index_init(EmbeddingIndex* index, int capacity, int V, int C) {
    REQUIRE(capacity > 0 && V > 0 && C > 0 && C % 8 == 0,
            "embedding index needs positions and a vocabulary, and C to be a multiple of 8; got "
            "N=%d V=%d C=%d", capacity, V, C);
    memset(index, 0, sizeof *index);
    index->capacity = capacity;
    index->V = V;
    index->C = C;
    index->counts = (int*)host_alloc((size_t)V + 1, sizeof(int));
    size_t rows = 2 * ((size_t)capacity / EMBEDDING_SEGMENT) + 2;
    CUDA_CHECK(cudaMallocHost((void**)&index->host, embedding_lists_bytes(capacity)));
    CUDA_CHECK(cudaMalloc((void**)&index->device, embedding_lists_bytes(capacity)));
    CUDA_CHECK(cudaMalloc((void**)&index->partial, rows * C * sizeof(float)));
    CUDA_CHECK(cudaEventCreateWithFlags(&index->copied, cudaEventDisableTiming));
}

// Device memory that it takes.
static inline size_t embedding_index_bytes(int capacity, int C) {
    size_t rows = 2 * ((size_t)capacity / EMBEDDING_SEGMENT) + 2;
    return embedding_lists_bytes(capacity) + rows * C * sizeof(float);
}

static inline void embedding_index_free(EmbeddingIndex* index) {
    free(index->counts);
    CUDA_CHECK(cudaFreeHost(index->host));
    CUDA_CHECK(cudaFree(index->device));
    CUDA_CHECK(cudaFree(index->partial));
    CUDA_CHECK(cudaEventDestroy(index->copied));
    memset(index, 0, sizeof *index);
}

// Sorts the positions of a batch by token. Waits until the upload before it has read the lists: to
// prepare a batch while the one before is still queued, alternate between two indices.
static inline void embedding_index_build(EmbeddingIndex* index, const int* tokens, int N, int V) {
    REQUIRE(N > 0 && N <= index->capacity, "embedding index holds 1 to %d positions, got %d",
            index->capacity, N);
    REQUIRE(V == index->V, "embedding index was made for V=%d, got V=%d", index->V, V);
    CUDA_CHECK(cudaEventSynchronize(index->copied));
    EmbeddingLists lists = embedding_lists(index->host, index->capacity);
    int* begin = index->counts;            // counts, one place up; then where each list begins
    memset(begin, 0, ((size_t)V + 1) * sizeof(int));
    for (int n = 0; n < N; n++) {
        REQUIRE((unsigned)tokens[n] < (unsigned)V, "token %d at position %d is not in 0..%d",
                tokens[n], n, V - 1);
        begin[tokens[n] + 1]++;
    }
    int n_segments = 0, n_long = 0, n_partial = 0;
    for (int v = 0; v < V; v++) {
        int count = begin[v + 1];
        begin[v + 1] += begin[v];
        bool is_long = count > EMBEDDING_SEGMENT;
        if (is_long) {
            lists.long_token[n_long] = v;
            lists.long_begin[n_long++] = n_partial;
        }
        for (int done = 0; done < count; done += EMBEDDING_SEGMENT) {
            lists.segment_begin[n_segments] = begin[v] + done;
            lists.segment_row[n_segments++] = is_long ? ~n_partial++ : v;
        }
    }
    lists.segment_begin[n_segments] = N;
    lists.long_begin[n_long] = n_partial;
    *lists.n_segments = n_segments;
    *lists.n_long = n_long;
    for (int n = 0; n < N; n++) lists.positions[begin[tokens[n]]++] = n;
    index->N = N;
}

static inline void embedding_index_upload(EmbeddingIndex* index, cudaStream_t stream) {
    CUDA_CHECK(cudaMemcpyAsync(index->device, index->host, embedding_lists_bytes(index->capacity),
                               cudaMemcpyHostToDevice, stream));
    CUDA_CHECK(cudaEventRecord(index->copied, stream));
}

// ---- launchers ---------------------------------------------------------------------------------

// One thread per 8 channels of a row; their number has to fit in the kernels' 32 bits.
static inline dim3 embedding_grid(size_t rows, int C) {
    size_t threads = rows * (C / 8);
    REQUIRE(threads < (size_t)UINT_MAX - 256,
            "embedding takes fewer than 2^35 values, got %zu x %d", rows, C);
    return dim3(ceil_div(threads, 256));
}

static inline void embedding_forward(floatX* out, const floatX* wte, const int* tokens, int N,
                                     int C, cudaStream_t stream) {
    REQUIRE(N > 0 && C > 0 && C % 8 == 0,
            "embedding needs rows, and C to be a multiple of 8; got N=%d C=%d", N, C);
    launch<embedding_forward_kernel>(embedding_grid(N, C), dim3(256), 0, stream, out, wte, tokens,
                                     N, C);
}

// After embedding_index_upload on the same stream.
static inline void embedding_backward(float* dwte, const floatX* dout, const EmbeddingIndex* index,
                                      int C, cudaStream_t stream) {
    REQUIRE(C == index->C && index->N > 0,
            "embedding_backward wants an index that was built, with C=%d; its C is %d and N is %d",
            C, index->C, index->N);
    int segments = index->N, lists = index->N / EMBEDDING_SEGMENT;      // at most so many
    launch<embedding_segments_kernel>(embedding_grid(segments, C), dim3(256), 0, stream, dwte,
                                      index->partial, dout, index->device, index->capacity, C);
    if (lists == 0) return;
    launch<embedding_long_kernel>(embedding_grid(lists, C), dim3(256), 0, stream, dwte,
                                  index->partial, index->device, index->capacity, C);
}
