/*
What a run has to remember, between the banks (llmc/params.cuh) and a checkpoint (llmc/checkpoint.h).

Saved by rank 0    p of every tensor, as the forward pass reads it
Saved by its owner the fp32 master, where there is one, and m and v: of a tensor, or of the run of a
                   table that the rank owns. What every rank has (gates, scalars, everything under
                   --zero 0) is rank 0's.
Saved by each rank g of Adam's banks, while Adam waits for the gradients of another step: sums that
                   have not been reduced yet. The gradient is the sum over ranks.

state_copy is all that training waits for: device to pinned memory, in one queue. The parts stay as
they are until the next one, so the saver may take its time.

state_load reads by name and logical shape, so it does not matter how many ranks saved and how many
load; as many, and every bit is back where it was. Gradients that wait go to the ranks that had them,
or, of another number of ranks, all to rank 0. What fills rows up is zero and stays so.

costs       16 bytes per parameter to copy in all (bf16: 14), of which rank 0 has 4 (2) and each
            rank a share of the rest; as much pinned memory
test        test/test_model.cu: state; test/resume.sh
*/
#pragma once
#include "checkpoint.h"
#include "params.cuh"

typedef struct State {
    StatePart* parts;
    const void** source;        // on the device, of each part
    int count, lasting;         // the parts behind `lasting` are gradients that wait
    size_t bytes;
    char* pinned;               // where they are copied to; NULL until state_allocate
} State;

// ---- what there is -----------------------------------------------------------------------------

static inline size_t part_bytes(const StatePart* part) {
    return (size_t)part->count * SAFE_TYPE_BYTES[part->type];
}

static inline void state_add(State* s, const Params* ps, int tensor, StateKind kind, SafeType type,
                             size_t offset, size_t count, const void* source) {
    const Tensor* t = &ps->tensors[tensor];
    StatePart* part = &s->parts[s->count];
    memset(part, 0, sizeof *part);
    part->name = t->name;
    part->kind = kind;
    part->type = type;
    tensor_shape(t, part->shape, &part->dims);
    part->transposed = t->transposed;
    part->offset = (int64_t)offset;
    part->count = (int64_t)count;
    s->source[s->count++] = source;
    s->bytes += ceil_div(part_bytes(part), 16) * 16;
}

// Of Muon's second moment there is a number for each row or column, in the order of memory.
static inline void state_add_second(State* s, const Params* ps, const Piece* piece) {
    const Bank* bank = &ps->banks[ps->tensors[piece->tensor].bank];
    int at = bank->kind == GATE ? ps->tensors[piece->tensor].unit : piece->place;
    state_add(s, ps, piece->tensor, STATE_V, SAFE_F32, 0, bank->second,
              bank->v + (size_t)at * bank->second);
    StatePart* part = &s->parts[s->count - 1];
    part->dims = 1;
    part->shape[0] = bank->second;
    part->transposed = false;
}

// What this rank saves. `waiting`: whether there may be gradients that wait.
static inline void state_init(State* s, Params* ps, bool waiting) {
    static Piece pieces[MAX_TENSORS];
    memset(s, 0, sizeof *s);
    size_t room = 5 * (size_t)ps->count;
    s->parts = (StatePart*)host_alloc(room, sizeof(StatePart));
    s->source = (const void**)host_alloc(room, sizeof(void*));
    for (int i = 0; i < ps->count && ps->zero.rank == 0; i++)
        state_add(s, ps, i, STATE_WEIGHT, FLOATX_IS_BF16 ? SAFE_BF16 : SAFE_F32, 0,
                  tensor_elements(ps, i), bank_of(ps, i)->p + tensor_offset(ps, i));
    int n = params_pieces(ps, pieces);
    for (int i = 0; i < n; i++) {
        const Piece* piece = &pieces[i];
        const Bank* bank = bank_of(ps, piece->tensor);
        if (bank->zero.replicated && ps->zero.rank != 0) continue;
        if (bank->has_master)
            state_add(s, ps, piece->tensor, STATE_MASTER, SAFE_F32, piece->offset, piece->count,
                      bank->master + piece->own);
        state_add(s, ps, piece->tensor, STATE_M, SAFE_F32, piece->offset, piece->count,
                  bank->m + piece->own);
        if (bank->adam)
            state_add(s, ps, piece->tensor, STATE_V, SAFE_F32, piece->offset, piece->count,
                      bank->v + piece->own);
        else if (bank->second) state_add_second(s, ps, piece);
    }
    s->lasting = s->count;
    for (int i = 0; i < ps->count && waiting; i++)
        if (bank_of(ps, i)->adam)
            state_add(s, ps, i, STATE_GRAD, SAFE_F32, 0, tensor_elements(ps, i),
                      bank_of(ps, i)->g + tensor_offset(ps, i));
}

// Pinning memory takes its time, which a run had better spend at its start.
static inline void state_allocate(State* s) {
    if (!s->pinned) CUDA_CHECK(cudaMallocHost((void**)&s->pinned, s->bytes));
}

static inline void state_free(State* s) {
    if (s->pinned) CUDA_CHECK(cudaFreeHost(s->pinned));
    free(s->parts);
    free(s->source);
    memset(s, 0, sizeof *s);
}

// ---- to a checkpoint ---------------------------------------------------------------------------

// Copies everything, and waits until it is there. Returns the number of parts to be saved. All ranks
// call it between two steps; `waiting`: whether gradients wait.
static inline int state_copy(State* s, Params* ps, bool waiting) {
    size_t at = 0;
    int count = waiting ? s->count : s->lasting;
    state_allocate(s);
    params_wait(ps);
    for (int i = 0; i < s->count; i++) {
        s->parts[i].data = s->pinned + at;
        size_t bytes = part_bytes(&s->parts[i]);
        if (i < count)
            CUDA_CHECK(cudaMemcpyAsync(s->pinned + at, s->source[i], bytes, cudaMemcpyDeviceToHost,
                                       ps->stream));
        at += ceil_div(bytes, 16) * 16;
    }
    CUDA_CHECK(cudaStreamSynchronize(ps->stream));
    return count;
}

// ---- from a checkpoint -------------------------------------------------------------------------

typedef struct StateReader {
    Checkpoint* from;
    Params* ps;
    void *value, *turned;       // room for a tensor each
} StateReader;

// A whole tensor, as it lies in memory; rank: whose gradient, or -1.
static inline const void* state_read(StateReader* r, int tensor, StateKind kind, int rank,
                                     SafeType type, int64_t second) {
    const Tensor* t = &r->ps->tensors[tensor];
    char problem[512];
    int64_t shape[2] = {second, 0};
    int dims = 1;
    if (!second) tensor_shape(t, shape, &dims);
    if (!checkpoint_read(r->from, t->name, kind, rank, type, dims, shape, r->value, problem,
                         sizeof problem)) die("%s: %s", r->from->directory, problem);
    if (!t->transposed || second) return r->value;
    if (type == SAFE_BF16)
        tensor_transpose((uint16_t*)r->turned, (const uint16_t*)r->value, t->rows, t->cols);
    else tensor_transpose((float*)r->turned, (const float*)r->value, t->rows, t->cols);
    return r->turned;
}

static inline void state_upload(void* to, const void* from, size_t bytes) {
    CUDA_CHECK(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice));
}

static inline void state_load_piece(StateReader* r, const Piece* piece) {
    const Bank* bank = bank_of(r->ps, piece->tensor);
    const Tensor* t = &r->ps->tensors[piece->tensor];
    size_t bytes = piece->count * sizeof(float);
    const struct { StateKind kind; float* to; } STATES[] = {
        {STATE_MASTER, bank->master}, {STATE_M, bank->m}, {STATE_V, bank->adam ? bank->v : NULL},
    };
    for (int i = 0; i < 3; i++) {
        if (!STATES[i].to) continue;
        const float* value =
            (const float*)state_read(r, piece->tensor, STATES[i].kind, -1, SAFE_F32, 0);
        state_upload(STATES[i].to + piece->own, value + piece->offset, bytes);
    }
    if (bank->adam || !bank->second) return;
    size_t at = bank->kind == GATE ? t->unit : piece->place;
    state_upload(bank->v + at * bank->second,
                 state_read(r, piece->tensor, STATE_V, -1, SAFE_F32, bank->second),
                 bank->second * sizeof(float));
}

// Everything that state_init lists, on all ranks, from one that was opened and found whole.
static inline void state_load(Params* ps, Checkpoint* from, bool waiting) {
    static Piece pieces[MAX_TENSORS];
    size_t largest = params_largest(ps);
    StateReader r = {from, ps, host_alloc(largest, sizeof(float)), host_alloc(largest, sizeof(float))};
    SafeType type = FLOATX_IS_BF16 ? SAFE_BF16 : SAFE_F32;
    bool same_ranks = from->info.ranks == ps->zero.world;
    params_wait(ps);
    for (int i = 0; i < ps->count; i++) {
        const Bank* bank = bank_of(ps, i);
        size_t n = tensor_elements(ps, i), at = tensor_offset(ps, i);
        state_upload(bank->p + at, state_read(&r, i, STATE_WEIGHT, -1, type, 0), n * sizeof(floatX));
        if (!waiting || !bank->adam) continue;
        if (same_ranks || ps->zero.rank == 0) {
            int rank = same_ranks ? ps->zero.rank : -1;
            state_upload(bank->g + at, state_read(&r, i, STATE_GRAD, rank, SAFE_F32, 0),
                         n * sizeof(float));
        } else {
            CUDA_CHECK(cudaMemset(bank->g + at, 0, n * sizeof(float)));
        }
    }
    int n = params_pieces(ps, pieces);
    for (int i = 0; i < n; i++) state_load_piece(&r, &pieces[i]);
    free(r.value);
    free(r.turned);
}
