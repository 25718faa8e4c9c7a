/*
Token shards (llmc/shards.h) to batches of (B, T) inputs and targets, read ahead by a thread.

A step has R rows of T tokens, n = R*T, over all P ranks; rank p has rows p*R/P to (p+1)*R/P - 1 and
gets them B at a time, in order. So the tokens of a step depend neither on B nor on P. With x the
tokens, row r has inputs x[a .. a+T-1] and targets x[a+1 .. a+T]; `batching` says what a is in step
s = 0, 1, ...

stream      The M tokens of all shards are one ring: a = (s*n + r*T) mod M. Rows cross the borders
            of shards and the end of the ring, where the first token of the first shard is the
            target of the last one (it opens a document, so it is a true successor). No token is
            left out, however small the files.
strided     Records #4 to #17. Each of K data ranks has R/K rows and a place of its own: q = k*n/K
            of the first shard, then q + n, ...; a = q + (r mod R/K)*T. Where q + n + 1 > tokens of
            the shard it goes on at k*n/K of the next. Because each asks for itself, they change
            shards at different steps and drift apart; that is part of the order. K is --data-ranks
            or the nearest that the sizes allow (loader_data_ranks), so that 1, 2, 4 and 8 GPUs draw
            the same steps. Not copied: the records up to #11 train twice on their first batch.
contiguous  Records #20 to #25, where a row is the sequence of a GPU. All share one place: q = 0, n,
            2n, ... of a shard; a = q + r*T. Where q + n + 1 >= tokens: 0 of the next shard.
start-aligned
            Records #26 to #28. a(r) is the first start of a document at or behind a(r-1) + T, and
            a(0) of a step at or behind the last a + T of the step before.
documents   Records #29 on. A row is T + 1 tokens of documents in order, each cut to its first
            max_document tokens, and the last to what the row lacks; what is cut off nobody sees,
            and the next row starts with the next document. So the last target of a cut document is
            the token that opens the next one. In all other orders documents are not looked at.

A step of the last three lies in one shard. Where less than a step is left the next shard is gone on
with, from its start, and the rest is dropped, a shard without one whole step altogether. Documents
are found by reading on to the next one, not by an index, so no shard is read before its turn.

An epoch is once through the shards. What would go beyond --epochs of them is refused at the start
where the number of steps is known by then (stream, strided, contiguous) or at least a bound of it,
and otherwise ends the data: loader_over.

Segments: cu_seqlens holds 0, then the end of each run of tokens that belong together in the B*T of
the batch: a row or a document in it (the end-of-text token opens one) starts a new one. `segments`
are used; the rest up to cu_count, a multiple of 128 that is at least B*T/300, holds B*T, so that
cu_count hardly ever changes.

Reading ahead: a thread fills slots while the caller works. A batch may be used until the call after
the next one of loader_next; a caller that copies it asynchronously waits for the copy before that.
The thread never ends the program: what it finds wrong is said by loader_next when the batch is due.

The whole state is the LoaderPosition, that of what the caller has got and not of what was read
ahead: loader_restore goes there, and what follows is the same as without the stop.

A validation set is the first val_tokens predictions of its shards as a stream, in rows of T of
which the last may be part: what is not asked for has target -1 and input 0. The mean loss is over
exactly val_tokens.

test        test/test_loader.c
*/
#pragma once
#include "flags.h"
#include "shards.h"

#include <pthread.h>
#include <signal.h>
#include <time.h>

// In the order of the words of --batching.
typedef enum Batching {
    BATCHING_STREAM, BATCHING_STRIDED, BATCHING_CONTIGUOUS, BATCHING_START_ALIGNED,
    BATCHING_DOCUMENTS
} Batching;

enum { LOADER_SLOTS = 4 };      // two for the caller, two to be filled

// ---- a batch -------------------------------------------------------------------------------

typedef struct Batch {
    int *inputs, *targets;      // (B, T)
    int* cu_seqlens;            // (cu_count)
    int segments, cu_count;
} Batch;

static inline int batch_cu_count(int entries) {
    return (entries + 127) / 128 * 128;
}

// Of the inputs (B, T); cu_seqlens has room for batch_cu_count(B*T + 1).
static inline void batch_segments(Batch* b, int B, int T, int end_of_text) {
    int N = B * T, count = 0;
    for (int i = 0; i < N; i++)
        if (i % T == 0 || b->inputs[i] == end_of_text) b->cu_seqlens[count++] = i;
    b->segments = count;
    b->cu_count = batch_cu_count(count + 1 > N / 300 + 1 ? count + 1 : N / 300 + 1);
    for (; count < b->cu_count; count++) b->cu_seqlens[count] = N;
}

// ---- the loader ----------------------------------------------------------------------------

// Told what was done from one time of CLOCK_MONOTONIC to another, in seconds, and how many batches
// lie ready then: ("loader", "read") by the thread that reads ahead, and ("host", "wait") by the
// caller, with equal times where the batch was there. step: of the batch, from 1.
typedef void (*LoaderWatch)(const char* thread, const char* name, int64_t step, double from,
                            double to, int ready);

typedef struct LoaderSpec {
    const char* pattern;
    Batching batching;
    int rows, B, T;             // rows of a step over all ranks, a multiple of world * B
    int rank, world, vocab;
    int data_ranks;             // strided
    int max_document;           // documents
    int end_of_text;            // the token that opens a document; a negative one: none does
    int64_t steps, epochs;      // epochs 0: as many as it takes
    LoaderWatch watch;          // NULL: nobody wants to know
} LoaderSpec;

// What the flags ask for.
static inline LoaderSpec loader_spec(const Settings* cfg, int rank, int world) {
    LoaderSpec spec = {};
    spec.pattern = cfg->train;
    spec.batching = (Batching)cfg->batching;
    spec.rows = (int)(cfg->batch_tokens / cfg->seq_len);
    spec.B = (int)cfg->micro_batch;
    spec.T = (int)cfg->seq_len;
    spec.rank = rank;
    spec.world = world;
    spec.vocab = (int)(cfg->table_rows ? cfg->table_rows : cfg->vocab);
    spec.data_ranks = (int)cfg->data_ranks;
    spec.max_document = (int)cfg->max_document;
    spec.end_of_text = (int)cfg->end_of_text;
    spec.steps = cfg->steps;
    spec.epochs = cfg->epochs;
    return spec;
}

// What the next batch is: of which step and micro-step, and where the step starts. In the order
// strided that is the place of the last data rank, which is the first to change shards.
typedef struct LoaderPosition {
    int64_t step, micro;
    int64_t epoch, shard, offset;
} LoaderPosition;

typedef enum LoaderEnd { LOADER_GOES_ON, LOADER_OVER, LOADER_FAILED } LoaderEnd;

typedef struct LoaderSlot {
    Batch batch;
    LoaderPosition after;       // the position once the caller has got it
} LoaderSlot;

typedef struct Loader {
    LoaderSpec spec;
    Shards shards;
    int data_ranks;             // strided: K; else 1
    int micro_steps;
    LoaderPosition position;    // of the caller
    double waited;              // seconds that loader_next has waited for a batch
    LoaderSlot slots[LOADER_SLOTS];
    int* memory;                // of the slots, if it is the loader's own

    // of the thread
    LoaderPosition ahead, next; // what it fills next, and the step after
    bool planned;               // row_at and next are those of the step of `ahead`
    int64_t* row_at;            // (rows) token of all where a row begins
    uint16_t* row;              // (T + 1)

    // under the lock
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool threaded, stop;
    int64_t filled, taken, released;    // batches
    LoaderEnd end;              // what comes behind the filled ones
} Loader;

// The number of data ranks whose order is followed: `wanted`, or else the largest divisor of it
// that divides the rows, if every rank can play the same number of them; failing that, the ranks
// there are.
static inline int loader_data_ranks(int wanted, int rows, int world) {
    int a = wanted, b = rows;
    while (b) {
        int rest = a % b;
        a = b;
        b = rest;
    }
    return a % world == 0 ? a : world;
}

static inline int64_t loader_step_tokens(const Loader* l) {
    return (int64_t)l->spec.rows * l->spec.T;
}

// ---- counting steps ------------------------------------------------------------------------

// Steps in shard i: of data rank k (strided), of all (contiguous), or at most (the last two).
static inline int64_t loader_shard_steps(const Loader* l, int k, int i) {
    int64_t n = loader_step_tokens(l), tokens = shards_tokens(&l->shards, i);
    int64_t rest = tokens - 1 - n - k * (n / l->data_ranks);    // behind the first step
    switch (l->spec.batching) {
        case BATCHING_STREAM: break;
        case BATCHING_STRIDED: return 1 + (rest > 0 ? rest / n : 0);
        case BATCHING_CONTIGUOUS: return (tokens - 2) / n;
        case BATCHING_START_ALIGNED: return (tokens - 1) / n;
        case BATCHING_DOCUMENTS: return tokens / (n + l->spec.rows);
    }
    return 0;
}

// Steps in an epoch of data rank k.
static inline int64_t loader_epoch_steps(const Loader* l, int k) {
    int64_t steps = 0;
    for (int i = 0; i < l->shards.count; i++) steps += loader_shard_steps(l, k, i);
    return steps;
}

// Steps that draw nothing more often than `epochs` times.
static inline int64_t loader_steps(const Loader* l, int64_t epochs) {
    if (l->spec.batching == BATCHING_STREAM)
        return epochs * shards_total(&l->shards) / loader_step_tokens(l);
    return epochs * loader_epoch_steps(l, l->data_ranks - 1);
}

// Whether where a step starts follows from its number alone.
static inline bool loader_computed(const Loader* l) {
    return l->spec.batching <= BATCHING_CONTIGUOUS;
}

// Where data rank k's part of p->step starts.
static inline void loader_place(const Loader* l, LoaderPosition* p, int k) {
    const Shards* s = &l->shards;
    int64_t n = loader_step_tokens(l), left = p->step;
    if (l->spec.batching == BATCHING_STREAM) {
        p->epoch = p->step * n / shards_total(s);
        p->offset = p->step * n % shards_total(s);
        p->shard = shards_find(s, p->offset);
        p->offset -= s->first[p->shard];
        return;
    }
    int64_t epoch_steps = loader_epoch_steps(l, k);
    p->epoch = left / epoch_steps;
    left %= epoch_steps;
    for (p->shard = 0; left >= loader_shard_steps(l, k, (int)p->shard); p->shard++)
        left -= loader_shard_steps(l, k, (int)p->shard);
    p->offset = k * (n / l->data_ranks) + left * n;
}

// ---- the rows of a step (by the thread) ------------------------------------------------------

// The T + 1 tokens of a row of documents from the one at token *at of the shard on; *at becomes the
// start of the next one. out NULL: only walks. False: the shard has too few, or see shards.error.
static inline bool loader_pack(Loader* l, uint16_t* out, int64_t* at, int shard) {
    Shards* s = &l->shards;
    for (int64_t n, next, left = l->spec.T + 1; left > 0; left -= n, *at = next) {
        if (*at == shards_tokens(s, shard)) return false;
        if (!shards_search(s, &next, shard, *at + 1, l->spec.end_of_text)) return false;
        n = next - *at < l->spec.max_document ? next - *at : l->spec.max_document;
        if (n > left) n = left;
        if (out && !shards_read_one(s, out + l->spec.T + 1 - left, shard, *at, (size_t)n))
            return false;
    }
    return true;
}

// The next row at or behind *offset of the shard that starts with a document; *offset becomes what
// is behind it. False as above.
static inline bool loader_find_row(Loader* l, int64_t* row_at, int64_t* offset, int shard) {
    Shards* s = &l->shards;
    if (!shards_search(s, offset, shard, *offset, l->spec.end_of_text)) return false;
    *row_at = s->first[shard] + *offset;
    if (l->spec.batching == BATCHING_DOCUMENTS) return loader_pack(l, NULL, offset, shard);
    bool fits = *offset + l->spec.T + 1 <= shards_tokens(s, shard);
    *offset += l->spec.T;
    return fits;
}

static inline LoaderEnd loader_plan_documents(Loader* l) {
    Shards* s = &l->shards;
    LoaderPosition at = l->ahead;
    for (int tried = 0; tried <= s->count; tried++, at.shard++, at.offset = 0) {
        int r = 0;
        if (at.shard == s->count) at.shard = 0, at.epoch++;
        if (l->spec.epochs && at.epoch >= l->spec.epochs && at.step) return LOADER_OVER;
        l->next = at;
        while (r < l->spec.rows &&
               loader_find_row(l, &l->row_at[r], &l->next.offset, (int)at.shard))
            r++;
        if (s->error[0]) return LOADER_FAILED;
        if (r == l->spec.rows) return LOADER_GOES_ON;
    }
    shards_fail(s, "none of the %d shards of '%s' holds a step: %d rows of %d tokens that start "
                "with a document (token %d)\nuse --batching stream, a smaller --batch-tokens, or "
                "the --end-of-text of these shards", s->count, l->spec.pattern, l->spec.rows,
                l->spec.T, l->spec.end_of_text);
    return LOADER_FAILED;
}

// Sets row_at for the step of `ahead`, and `next`.
static inline LoaderEnd loader_plan(Loader* l) {
    Shards* s = &l->shards;
    int slice = l->spec.rows / l->data_ranks, T = l->spec.T;
    if (!loader_computed(l)) {
        LoaderEnd end = loader_plan_documents(l);
        if (end != LOADER_GOES_ON) return end;
    } else {
        if (l->spec.epochs && l->ahead.step >= loader_steps(l, l->spec.epochs)) return LOADER_OVER;
        l->next = l->ahead;
        for (int k = 0; k < l->data_ranks; k++) {
            loader_place(l, &l->next, k);
            int64_t from = s->first[l->next.shard] + l->next.offset;
            for (int r = 0; r < slice; r++) l->row_at[k * slice + r] = from + (int64_t)r * T;
        }
    }
    l->next.step = l->ahead.step + 1;
    l->next.micro = 0;
    if (loader_computed(l)) loader_place(l, &l->next, l->data_ranks - 1);
    return LOADER_GOES_ON;
}

static inline LoaderEnd loader_fill(Loader* l, LoaderSlot* slot) {
    Shards* s = &l->shards;
    int B = l->spec.B, T = l->spec.T;
    LoaderEnd end = l->planned ? LOADER_GOES_ON : loader_plan(l);
    if (end != LOADER_GOES_ON) return end;
    l->planned = true;
    int first = l->spec.rank * (l->spec.rows / l->spec.world) + (int)l->ahead.micro * B;
    for (int b = 0; b < B; b++) {
        int64_t at = l->row_at[first + b];
        if (l->spec.batching == BATCHING_DOCUMENTS) {
            int shard = shards_find(s, at);
            at -= s->first[shard];
            if (!loader_pack(l, l->row, &at, shard)) return LOADER_FAILED;
        } else if (!shards_read(s, l->row, at, (size_t)T + 1)) {
            return LOADER_FAILED;
        }
        for (int i = 0; i < T; i++) {
            slot->batch.inputs[b * T + i] = l->row[i];
            slot->batch.targets[b * T + i] = l->row[i + 1];
        }
    }
    batch_segments(&slot->batch, B, T, l->spec.end_of_text);
    if (++l->ahead.micro == l->micro_steps) {
        l->ahead = l->next;
        l->planned = false;
    }
    slot->after = l->ahead;
    return LOADER_GOES_ON;
}

// ---- the thread ----------------------------------------------------------------------------

static inline void* loader_thread(void* argument) {
    Loader* l = (Loader*)argument;
    for (;;) {
        pthread_mutex_lock(&l->lock);
        while (!l->stop && l->filled - l->released == LOADER_SLOTS)
            pthread_cond_wait(&l->changed, &l->lock);
        bool stop = l->stop;
        pthread_mutex_unlock(&l->lock);
        if (stop) return NULL;
        int64_t step = l->ahead.step + 1;
        double from = l->spec.watch ? clock_now() : 0;
        LoaderEnd end = loader_fill(l, &l->slots[l->filled % LOADER_SLOTS]);
        pthread_mutex_lock(&l->lock);
        l->filled += end == LOADER_GOES_ON;
        l->end = end;
        int ready = (int)(l->filled - l->taken);
        pthread_cond_signal(&l->changed);
        pthread_mutex_unlock(&l->lock);
        if (end != LOADER_GOES_ON) return NULL;
        if (l->spec.watch) l->spec.watch("loader", "read", step, from, clock_now(), ready);
    }
}

// Reads on from `position`.
static inline void loader_start(Loader* l) {
    sigset_t all, before;
    l->ahead = l->position;
    l->planned = l->stop = false;
    l->filled = l->taken = l->released = 0;
    l->end = LOADER_GOES_ON;
    sigfillset(&all);           // signals are for the thread that trains
    pthread_sigmask(SIG_BLOCK, &all, &before);
    int error = pthread_create(&l->thread, NULL, loader_thread, l);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    REQUIRE(error == 0, "no thread to read the data ahead: %s", strerror(error));
    l->threaded = true;
}

static inline void loader_stop(Loader* l) {
    if (!l->threaded) return;
    pthread_mutex_lock(&l->lock);
    l->stop = true;
    pthread_cond_signal(&l->changed);
    pthread_mutex_unlock(&l->lock);
    pthread_join(l->thread, NULL);
    l->threaded = false;
}

// Waits until the next batch is there or known not to come.
static inline LoaderEnd loader_await(Loader* l) {
    pthread_mutex_lock(&l->lock);
    bool waits = l->filled == l->taken && l->end == LOADER_GOES_ON;
    double from = waits ? clock_now() : 0;
    while (l->filled == l->taken && l->end == LOADER_GOES_ON)
        pthread_cond_wait(&l->changed, &l->lock);
    double to = waits ? clock_now() : 0;
    int ready = (int)(l->filled - l->taken);
    LoaderEnd end = ready > 0 ? LOADER_GOES_ON : l->end;
    pthread_mutex_unlock(&l->lock);
    l->waited += to - from;
    if (waits && l->spec.watch)
        l->spec.watch("host", "wait", l->position.step + 1, from, to, ready);
    if (end == LOADER_FAILED) {
        loader_stop(l);
        die("%s", l->shards.error);
    }
    return end;
}

// ---- what a caller uses --------------------------------------------------------------------

// ints of the memory that loader_open may be given.
static inline size_t loader_memory(int B, int T) {
    size_t N = (size_t)B * T;
    return LOADER_SLOTS * (2 * N + (N + 1 + 127) / 128 * 128);
}

static inline void loader_check_steps(const Loader* l) {
    const LoaderSpec* spec = &l->spec;
    int64_t n = loader_step_tokens(l), total = shards_total(&l->shards), most = 0;
    int64_t in_epoch = loader_epoch_steps(l, l->data_ranks - 1);
    for (int i = 0; i < l->shards.count; i++) {
        int64_t tokens = shards_tokens(&l->shards, i);
        if (tokens > most) most = tokens;
        REQUIRE(spec->batching != BATCHING_STRIDED || tokens >= n + 1,
                "%s: %" PRId64 " tokens, but --batching strided takes a step of %" PRId64
                " from one shard\nuse --batching stream, or a smaller --batch-tokens",
                l->shards.paths[i], tokens, n + 1);
    }
    REQUIRE(total > 1, "%s: one token has no successor to predict", l->shards.paths[0]);
    REQUIRE(spec->batching == BATCHING_STREAM || in_epoch > 0,
            "the largest of the %d shards of '%s' has %" PRId64 " tokens, too few for a step of "
            "%" PRId64 " from one shard\nuse --batching stream, or a smaller --batch-tokens",
            l->shards.count, spec->pattern, most, n);
    int64_t steps = loader_steps(l, spec->epochs);
    if (spec->epochs == 0 || steps >= spec->steps) return;
    bool stream = spec->batching == BATCHING_STREAM;
    int64_t wanted = (int64_t)(stream ? ceil_div((size_t)(spec->steps * n), (size_t)total)
                                      : ceil_div((size_t)spec->steps, (size_t)in_epoch));
    die("--steps %" PRId64 ", but --epochs %" PRId64 " of the %" PRId64 " tokens of '%s' give%s %s"
        "%" PRId64 " steps of %" PRId64 " tokens\nadd shards, take fewer steps, or repeat them: "
        "--epochs %" PRId64 "%s; 0: as often as the steps need",
        spec->steps, spec->epochs, total, spec->pattern, spec->epochs == 1 ? "s" : "",
        loader_computed(l) ? "" : "at most ", steps, n, wanted,
        loader_computed(l) ? "" : " or more");
}

// memory: NULL, or loader_memory(B, T) ints that live as long as the loader, such as pinned ones.
// Returns when the first batch is there.
static inline void loader_open(Loader* l, const LoaderSpec* spec, int* memory) {
    memset(l, 0, sizeof *l);
    l->spec = *spec;
    REQUIRE(spec->rows > 0 && spec->rows % (spec->world * spec->B) == 0,
            "a step of %d sequences cannot be cut into micro-batches of %d on %d ranks",
            spec->rows, spec->B, spec->world);
    shards_open(&l->shards, spec->pattern, spec->vocab);
    l->micro_steps = spec->rows / spec->world / spec->B;
    l->data_ranks = 1;
    if (spec->batching == BATCHING_STRIDED)
        l->data_ranks = loader_data_ranks(spec->data_ranks, spec->rows, spec->world);
    loader_check_steps(l);
    l->row_at = (int64_t*)host_alloc((size_t)spec->rows, sizeof(int64_t));
    l->row = (uint16_t*)host_alloc((size_t)spec->T + 1, sizeof(uint16_t));
    size_t N = (size_t)spec->B * spec->T, ints = loader_memory(spec->B, spec->T);
    if (!memory) memory = l->memory = (int*)host_alloc(ints, sizeof(int));
    for (int i = 0; i < LOADER_SLOTS; i++) {
        Batch* b = &l->slots[i].batch;
        b->inputs = memory + ints / LOADER_SLOTS * i;
        b->targets = b->inputs + N;
        b->cu_seqlens = b->targets + N;
    }
    if (loader_computed(l)) loader_place(l, &l->position, l->data_ranks - 1);
    pthread_mutex_init(&l->lock, NULL);
    pthread_cond_init(&l->changed, NULL);
    loader_start(l);
    loader_await(l);
    l->waited = 0;
}

// Also for one whose opening was cut short.
static inline void loader_close(Loader* l) {
    loader_stop(l);
    shards_close(&l->shards);
    free(l->row_at);
    free(l->row);
    free(l->memory);
    memset(l, 0, sizeof *l);
}

// Whether the data of --epochs ends before the next step: the same on every rank. Never within one.
static inline bool loader_over(Loader* l) {
    return loader_await(l) == LOADER_OVER;
}

// The next micro-batch of this rank. It may be used until the call after the next one.
static inline const Batch* loader_next(Loader* l) {
    pthread_mutex_lock(&l->lock);
    if (l->taken > 0) l->released = l->taken - 1;
    pthread_cond_signal(&l->changed);
    pthread_mutex_unlock(&l->lock);
    REQUIRE(!loader_over(l), "the data ended after %" PRId64 " steps", l->position.step);
    const LoaderSlot* slot = &l->slots[l->taken % LOADER_SLOTS];
    pthread_mutex_lock(&l->lock);
    int ready = (int)(l->filled - ++l->taken);
    pthread_mutex_unlock(&l->lock);
    if (l->spec.watch) {
        double now = clock_now();
        l->spec.watch("host", "wait", l->position.step + 1, now, now, ready);
    }
    l->position = slot->after;
    return &slot->batch;
}

static inline LoaderPosition loader_position(const Loader* l) {
    return l->position;
}

// Goes to a position of a loader with the same shards, rows, B, T, ranks and batching.
static inline void loader_restore(Loader* l, const LoaderPosition* p) {
    LoaderPosition here = *p;
    bool fits = p->step >= 0 && p->micro >= 0 && p->micro < l->micro_steps && p->shard >= 0 &&
                p->shard < l->shards.count && p->offset >= 0 && p->epoch >= 0 &&
                p->offset <= shards_tokens(&l->shards, (int)p->shard);
    if (fits && loader_computed(l)) {
        loader_place(l, &here, l->data_ranks - 1);
        fits = here.epoch == p->epoch && here.shard == p->shard && here.offset == p->offset;
    }
    REQUIRE(fits, "step %" PRId64 " (micro-step %" PRId64 ") is not at token %" PRId64 " of shard %"
            PRId64 " in epoch %" PRId64 " of '%s'\nthese are not the shards, the --batching or the "
            "sizes with which the run was stopped",
            p->step, p->micro, p->offset, p->shard, p->epoch, l->spec.pattern);
    loader_stop(l);
    l->position = *p;
    loader_start(l);
}

static inline void loader_describe(FILE* out, const Loader* l) {
    static const char* const DRAWN[] = { "as one stream", "strided, in the order of %d rank(s)",
                                         "in contiguous steps", "in rows that open with a document",
                                         "as documents of at most %d tokens" };
    fprintf(out, "train: %d shard%s, %" PRId64 " tokens, drawn ", l->shards.count,
            l->shards.count == 1 ? "" : "s", shards_total(&l->shards));
    bool documents = l->spec.batching == BATCHING_DOCUMENTS;
    fprintf(out, DRAWN[l->spec.batching], documents ? l->spec.max_document : l->data_ranks);
    fprintf(out, "; an epoch is %s%" PRId64 " steps\n", loader_computed(l) ? "" : "at most ",
            loader_steps(l, 1));
}

// ---- validation batches --------------------------------------------------------------------

typedef struct ValLoader {
    Shards shards;
    int B, T, rank, world;
    int64_t predictions;        // what the mean loss is over
    int64_t batches;            // calls of val_batch per rank, the same on every rank
    uint16_t* tokens;           // (B*T + 1)
} ValLoader;

// val_tokens 0 means every prediction the shards hold.
static inline void val_open(ValLoader* l, const char* pattern, int64_t val_tokens, int B, int T,
                            int rank, int world, int vocab) {
    memset(l, 0, sizeof *l);
    shards_open(&l->shards, pattern, vocab);
    int64_t there = shards_total(&l->shards) - 1;
    REQUIRE(there > 0, "%s: one token has no successor to predict", l->shards.paths[0]);
    REQUIRE(val_tokens <= there,
            "--val-tokens %" PRId64 ", but the %d shard%s of '%s' hold%s %" PRId64
            " predictions\ngive --val-tokens %" PRId64 ", or 0 for all there are",
            val_tokens, l->shards.count, l->shards.count == 1 ? "" : "s", pattern,
            l->shards.count == 1 ? "s" : "", there, there);
    l->predictions = val_tokens ? val_tokens : there;
    l->B = B;
    l->T = T;
    l->rank = rank;
    l->world = world;
    l->batches = (int64_t)ceil_div(ceil_div((size_t)l->predictions, (size_t)T), (size_t)B * world);
    l->tokens = (uint16_t*)host_alloc((size_t)B * T + 1, sizeof(uint16_t));
}

static inline void val_close(ValLoader* l) {
    shards_close(&l->shards);
    free(l->tokens);
    memset(l, 0, sizeof *l);
}

// The k-th batch of this rank, k < batches. Returns the number of targets that are not -1: none on
// a rank for which nothing is left.
static inline int64_t val_batch(ValLoader* l, int64_t k, int* inputs, int* targets) {
    int64_t n = (int64_t)l->B * l->T, from = (k * l->world + l->rank) * n;
    int64_t asked = l->predictions - from < n ? l->predictions - from : n;
    if (asked < 0) asked = 0;
    if (asked && !shards_read(&l->shards, l->tokens, from, (size_t)asked + 1))
        die("%s", l->shards.error);
    for (int64_t i = 0; i < n; i++) {
        inputs[i] = i < asked ? l->tokens[i] : 0;
        targets[i] = i < asked ? l->tokens[i + 1] : -1;
    }
    return asked;
}
