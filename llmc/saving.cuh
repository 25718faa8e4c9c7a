/*
Checkpoints of a run of N ranks: what the ranks agree on.

A save has two halves. In the first each rank writes what is its own (llmc/state.cuh), in the second,
when all have, rank 0 gives the checkpoint its manifest and its name (llmc/saver.h). A thread
does both beside training, which waits for the copy out of the device alone.

That all have written is found out without a wait: with each step the ranks sum a few numbers anyway,
and saving_votes adds three. All ranks see the same sums after the same step (saving_count), so all
go on together. saving_settle waits for whatever is under way: before the next save, and at the end.

If a rank fails, rank 0 removes what there is so far and says what failed, with the error, the bytes
needed and the bytes free. Checkpoints of before are as they were. The caller reads `failed`.

test        test/resume.sh, test/save_faults.sh
*/
#pragma once
#include "log.h"
#include "ranks.h"
#include "saver.h"
#include "state.cuh"

enum { VOTE_WRITTEN, VOTE_FAILED, VOTE_BUSY, SAVING_VOTES };

typedef struct Saving {
    Ranks* ranks;
    Log* log;
    Params* params;
    State state;
    Saver saver;
    // The same on all ranks:
    bool under_way;             // a save has begun and not ended
    bool failed;                // the last one to end
    int64_t step;               // of the last one to begin; -1: none
    double pause;               // seconds that training waited for its copy
} Saving;

static inline void saving_open(Saving* s, Params* params, Ranks* ranks, Log* log,
                               const Settings* cfg) {
    memset(s, 0, sizeof *s);
    s->ranks = ranks;
    s->log = log;
    s->params = params;
    s->step = -1;
    state_init(&s->state, params, cfg->adam_every > 1);
    if (cfg->checkpoint_every) state_allocate(&s->state);
    saver_open(&s->saver, cfg->out, ranks->rank, ranks->world, cfg->keep, cfg->keep_every);
}

// Bytes of pinned memory that a save of this rank takes.
static inline size_t saving_bytes(Params* params, const Settings* cfg) {
    State state;
    state_init(&state, params, cfg->adam_every > 1);
    size_t bytes = state.bytes;
    state_free(&state);
    return bytes;
}

static inline void saving_votes(Saving* s, float* votes) {
    SaverStatus status = saver_status(&s->saver);
    votes[VOTE_WRITTEN] = status == SAVER_WRITTEN;
    votes[VOTE_FAILED] = status == SAVER_FAILED;
    votes[VOTE_BUSY] = status != SAVER_IDLE;
}

static inline void saving_done(Saving* s) {
    s->under_way = false;
    log_checkpoint(s->log, s->step, s->saver.bytes, 1e3 * s->pause, 1e3 * s->saver.seconds);
    if (s->saver.note[0]) log_warn(s->log, "%s", s->saver.note);
}

// All ranks call it: the first rank that failed is heard, and what was written goes.
static inline void saving_give_up(Saving* s) {
    enum { SIZE = 2048 };
    char mine[SIZE] = "", *all = (char*)host_alloc((size_t)s->ranks->world, SIZE);
    saver_wait(&s->saver);
    if (saver_status(&s->saver) == SAVER_FAILED)
        snprintf(mine, sizeof mine, "%s", saver_error(&s->saver));
    ranks_gather(s->ranks, s->ranks->rank ? NULL : all, mine, SIZE);
    saver_abandon(&s->saver);
    for (int r = 0; r < s->ranks->world && s->ranks->rank == 0; r++) {
        if (!all[r * SIZE]) continue;
        log_warn(s->log, "no checkpoint of step %" PRId64 ": rank %d: %s\nearlier ones are as they "
                 "were", s->step, r, all + r * SIZE);
        break;
    }
    free(all);
    s->under_way = false;
    s->failed = true;
}

// What the votes of all ranks come to; all ranks call it with the same sums.
static inline void saving_count(Saving* s, const float* votes) {
    if (!s->under_way) return;
    if (votes[VOTE_FAILED] > 0) {
        saving_give_up(s);
    } else if (votes[VOTE_BUSY] == 0) {
        saving_done(s);
    } else if (votes[VOTE_WRITTEN] == (float)s->ranks->world) {
        // A vote of a step before the commit says so once more.
        if (saver_status(&s->saver) == SAVER_WRITTEN) saver_commit(&s->saver);
    }
}

// Waits until what is under way has ended, well or not. All ranks call it.
static inline void saving_settle(Saving* s) {
    for (int half = 0; half < 2 && s->under_way; half++) {
        saver_wait(&s->saver);
        int bad = saver_status(&s->saver) == SAVER_FAILED, failed = 0;
        int* all = (int*)host_alloc((size_t)s->ranks->world, sizeof(int));
        ranks_gather(s->ranks, s->ranks->rank ? NULL : all, &bad, sizeof bad);
        for (int r = 0; r < s->ranks->world; r++) failed += all[r];
        ranks_broadcast(s->ranks, &failed, sizeof failed);
        free(all);
        if (failed) saving_give_up(s);
        else if (saver_status(&s->saver) == SAVER_WRITTEN) saver_commit(&s->saver);
        else if (half == 1) saving_done(s);
    }
}

// All ranks call it between two steps. `waiting`: whether gradients wait for the next.
static inline void saving_begin(Saving* s, const CheckpointInfo* info, bool waiting) {
    saving_settle(s);
    double from = clock_now();
    int parts = state_copy(&s->state, s->params, waiting);
    s->pause = clock_now() - from;
    s->step = info->step;
    s->under_way = true;
    s->failed = false;
    saver_begin(&s->saver, info, s->state.parts, parts);
}

static inline void saving_close(Saving* s) {
    saver_close(&s->saver);
    state_free(&s->state);
}
