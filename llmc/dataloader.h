/*
Token shards to batches of (B, T) inputs and targets.

A shard is 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros), then that
many uint16 tokens; a document is opened by its end-of-text token and may run across shard borders.
Read with pread and 64-bit offsets, so that a shard may be larger than 2 GiB and no other handle's
position matters.

A step has `rows` sequences over all P ranks, in one of two orders:

stream      All shards are one ring of tokens: step s takes the rows*T tokens from s*rows*T on, rank
            r the r-th of P equal parts. Sequences cross shard borders and the end of the ring,
            where the first token of the first shard is the target of the last one (it opens a
            document, so it is a true successor). No token is left out, however small the files.
strided     The order of the speedrun records up to #11. Each of K data ranks has a place of its
            own: it starts at k*b*T of the first shard, b = rows/K, takes b*T tokens (and one more
            as a target), and advances by K*b*T. When that would end past the shard (position +
            K*b*T + 1 > tokens) it goes on at k*b*T of the next shard, after the last at the first.
            Because each asks for itself, the data ranks change shards at different steps, and drift
            apart; that is part of the order. K is --data-ranks, or the nearest that these sizes
            allow (loader_data_ranks), so that 1, 2, 4 and 8 GPUs draw the same steps. Not copied:
            the records train twice on their first batch.

The rows of a rank are handed out B at a time, in order, so the tokens of a step do not depend on B.
The whole state of a loader is the number of steps drawn: loader_seek computes the rest.

A validation set is the first val_tokens predictions of its shards as a stream, in rows of T of
which the last may be part: what is not asked for has target -1 and input 0. The mean loss is over
exactly val_tokens.

test        test/test_services.c: loader
*/
#pragma once
#include "common.h"

#include <fcntl.h>
#include <glob.h>
#include <sys/stat.h>
#include <unistd.h>

enum { SHARD_MAGIC = 20240520, SHARD_VERSION = 1, SHARD_HEADER_BYTES = 1024 };

// ---- shards --------------------------------------------------------------------------------

typedef struct Shards {
    int count;
    char** paths;               // sorted by name
    int64_t* first;             // (count + 1) tokens before each shard; the last entry is the total
    int vocab;
    int open_index, fd;         // the one that is open; -1: none
    uint16_t* buffer;           // tokens of one read
    size_t buffer_tokens;
} Shards;

static inline int64_t shards_total(const Shards* s) {
    return s->first[s->count];
}

// Number of tokens the header promises, after checks that the file keeps the promise.
static inline int64_t shard_tokens(const char* path) {
    static const char HOW[] = "token shards are made by dev/text_to_shards or downloaded";
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    REQUIRE(fd >= 0, "%s: cannot be opened: %s", path, strerror(errno));
    struct stat info;
    REQUIRE(fstat(fd, &info) == 0, "%s: cannot be examined: %s", path, strerror(errno));
    REQUIRE(S_ISREG(info.st_mode),
            "%s: not a file\ngive a pattern that names files, such as '%s/*.bin'", path, path);
    REQUIRE(info.st_size >= SHARD_HEADER_BYTES,
            "%s: %" PRId64 " bytes, but the header alone has %d\n%s", path, (int64_t)info.st_size,
            SHARD_HEADER_BYTES, HOW);
    int32_t header[3];
    ssize_t n = pread(fd, header, sizeof header, 0);
    REQUIRE(n == (ssize_t)sizeof header, "%s: the header cannot be read: %s", path,
            n < 0 ? strerror(errno) : "it ends early");
    close(fd);
    REQUIRE(header[0] == SHARD_MAGIC, "%s: magic %d, expected %d; is this a token shard?\n%s", path,
            header[0], SHARD_MAGIC, HOW);
    REQUIRE(header[1] == SHARD_VERSION, "%s: version %d, expected %d\n%s", path, header[1],
            SHARD_VERSION, HOW);
    int64_t tokens = header[2], wanted = SHARD_HEADER_BYTES + 2 * tokens;
    REQUIRE(tokens > 0, "%s: the header promises %" PRId64 " tokens, expected at least 1\n%s", path,
            tokens, HOW);
    REQUIRE(info.st_size == wanted,
            "%s: %" PRId64 " bytes, but its %" PRId64 " tokens need %" PRId64
            "\nthe file was cut or not written to the end: make or download it again",
            path, (int64_t)info.st_size, tokens, wanted);
    return tokens;
}

static inline void shards_open(Shards* s, const char* pattern, int vocab) {
    memset(s, 0, sizeof *s);
    s->open_index = s->fd = -1;
    s->vocab = vocab;
    glob_t found;
    int error = glob(pattern, 0, NULL, &found);    // sorts by name
    REQUIRE(error == 0 && found.gl_pathc > 0,
            "no file matches '%s'%s\n"
            "make shards with dev/text_to_shards, or give another pattern (quoted, so that the "
            "shell leaves it alone)",
            pattern, error == GLOB_NOMATCH || error == 0 ? "" : ": it cannot be searched");
    s->count = (int)found.gl_pathc;
    s->paths = (char**)host_alloc((size_t)s->count, sizeof(char*));
    s->first = (int64_t*)host_alloc((size_t)s->count + 1, sizeof(int64_t));
    for (int i = 0; i < s->count; i++) {
        size_t size = strlen(found.gl_pathv[i]) + 1;
        s->paths[i] = (char*)host_alloc(size, 1);
        memcpy(s->paths[i], found.gl_pathv[i], size);
        s->first[i + 1] = s->first[i] + shard_tokens(s->paths[i]);
    }
    globfree(&found);
}

// A number that differs where names (without their folders) or sizes do.
static inline uint64_t shards_hash(const Shards* s) {
    uint64_t hash = HASH_START;
    for (int i = 0; i < s->count; i++) {
        const char* slash = strrchr(s->paths[i], '/');
        const char* name = slash ? slash + 1 : s->paths[i];
        hash = hash_bytes(hash, name, strlen(name) + 1);
        hash = hash_bytes(hash, &s->first[i + 1], sizeof s->first[i + 1]);
    }
    return hash;
}

static inline void shards_close(Shards* s) {
    if (s->fd >= 0) close(s->fd);
    for (int i = 0; i < s->count; i++) free(s->paths[i]);
    free(s->paths);
    free(s->first);
    free(s->buffer);
    memset(s, 0, sizeof *s);
    s->fd = -1;
}

// The shard that holds token `position` of all.
static inline int shards_find(const Shards* s, int64_t position) {
    int low = 0, high = s->count - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (s->first[middle] <= position) low = middle;
        else high = middle - 1;
    }
    return low;
}

// n tokens from `position` on, across shard borders and around the ring's end, into the buffer.
static inline const uint16_t* shards_read(Shards* s, int64_t position, size_t n) {
    if (n > s->buffer_tokens) {
        free(s->buffer);
        s->buffer = (uint16_t*)host_alloc(n, sizeof(uint16_t));
        s->buffer_tokens = n;
    }
    for (size_t done = 0; done < n;) {
        int64_t at = (position + (int64_t)done) % shards_total(s);
        int i = shards_find(s, at);
        const char* path = s->paths[i];
        if (i != s->open_index) {
            if (s->fd >= 0) close(s->fd);
            s->fd = open(path, O_RDONLY | O_CLOEXEC);
            REQUIRE(s->fd >= 0, "%s: cannot be opened again: %s", path, strerror(errno));
            s->open_index = i;
        }
        int64_t inside = at - s->first[i], left = s->first[i + 1] - at;
        size_t part = (int64_t)(n - done) < left ? n - done : (size_t)left;
        for (size_t bytes = 0; bytes < 2 * part;) {
            int64_t offset = SHARD_HEADER_BYTES + 2 * inside + (int64_t)bytes;
            ssize_t got = pread(s->fd, (char*)(s->buffer + done) + bytes, 2 * part - bytes, offset);
            if (got < 0 && errno == EINTR) continue;
            REQUIRE(got > 0, "%s: reading at byte %" PRId64 ": %s", path, offset,
                    got < 0 ? strerror(errno)
                            : "the file has become shorter since the start of the run");
            bytes += (size_t)got;
        }
        for (size_t k = 0; k < part; k++) {
            int id = s->buffer[done + k];
            REQUIRE(id < s->vocab, "%s: token %" PRId64 " is %d, but --vocab is %d (ids 0 to %d)\n"
                    "the shards were made with another vocabulary, or --vocab is too small", path,
                    inside + (int64_t)k, id, s->vocab, s->vocab - 1);
        }
        done += part;
    }
    return s->buffer;
}

// ---- training batches ----------------------------------------------------------------------

// A data rank's place: the shard and the token in it where its next step begins.
typedef struct LoaderPlace {
    int shard;
    int64_t position;
    int64_t epoch;
} LoaderPlace;

typedef struct Loader {
    Shards shards;
    int rows, B, T, rank, world;
    bool strided;
    int data_ranks;             // strided: K; stream: one ring, 1
    LoaderPlace* places;        // (K)
    int64_t step;               // steps drawn in full
    int micro;                  // micro-steps drawn of the one under way
    int64_t total_tokens;       // of all shards
    int64_t epoch;              // times through the data, of the place that is furthest
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

static inline void loader_reset(Loader* l) {
    int64_t slice = (int64_t)(l->rows / l->data_ranks) * l->T;
    for (int k = 0; k < l->data_ranks; k++) {
        l->places[k].shard = 0;
        l->places[k].position = l->strided ? k * slice : 0;
        l->places[k].epoch = 0;
    }
    l->step = l->epoch = 0;
    l->micro = 0;
}

// rows: sequences of a step over all ranks, a multiple of world * B. B: of one call of loader_next.
static inline void loader_open(Loader* l, const char* pattern, int rows, int B, int T, int rank,
                               int world, int vocab, bool strided, int data_ranks) {
    memset(l, 0, sizeof *l);
    REQUIRE(rows > 0 && rows % (world * B) == 0,
            "a step of %d sequences cannot be cut into micro-batches of %d on %d ranks",
            rows, B, world);
    shards_open(&l->shards, pattern, vocab);
    l->rows = rows;
    l->B = B;
    l->T = T;
    l->rank = rank;
    l->world = world;
    l->strided = strided;
    l->data_ranks = strided ? loader_data_ranks(data_ranks, rows, world) : 1;
    l->places = (LoaderPlace*)host_alloc((size_t)l->data_ranks, sizeof(LoaderPlace));
    l->total_tokens = shards_total(&l->shards);
    int64_t needed = (int64_t)rows * T + 1;
    for (int i = 0; i < l->shards.count && strided; i++) {
        int64_t tokens = l->shards.first[i + 1] - l->shards.first[i];
        REQUIRE(tokens >= needed,
                "%s: %" PRId64 " tokens, but --batching strided takes a step of %" PRId64
                " from one shard\nuse --batching stream, or a smaller --batch-tokens",
                l->shards.paths[i], tokens, needed);
    }
    REQUIRE(l->total_tokens > 1, "%s: one token has no successor to predict", l->shards.paths[0]);
    loader_reset(l);
}

static inline void loader_close(Loader* l) {
    shards_close(&l->shards);
    free(l->places);
    memset(l, 0, sizeof *l);
}

// Moves every place to the step after this one. All K are moved on every rank: it costs nothing and
// keeps `epoch` the same everywhere.
static inline void loader_advance(Loader* l) {
    int64_t step_tokens = (int64_t)l->rows * l->T;
    l->micro = 0;
    l->step++;
    for (int k = 0; k < l->data_ranks; k++) {
        LoaderPlace* p = &l->places[k];
        p->position += step_tokens;
        if (l->strided) {
            int64_t tokens = l->shards.first[p->shard + 1] - l->shards.first[p->shard];
            if (p->position + step_tokens + 1 > tokens) {
                p->position = k * (step_tokens / l->data_ranks);
                p->epoch += p->shard + 1 == l->shards.count;
                p->shard = (p->shard + 1) % l->shards.count;
            }
        } else {
            p->epoch += p->position / l->total_tokens;
            p->position %= l->total_tokens;
        }
        if (p->epoch > l->epoch) l->epoch = p->epoch;
    }
}

// Goes to the beginning of a step, from anywhere, without reading.
static inline void loader_seek(Loader* l, int64_t step) {
    loader_reset(l);
    while (l->step < step) loader_advance(l);
}

// The next micro-batch of this rank: inputs and targets (B, T).
static inline void loader_next(Loader* l, int* inputs, int* targets) {
    int slice_rows = l->rows / l->data_ranks, T = l->T;
    int row = l->rank * (l->rows / l->world) + l->micro * l->B;    // of the step, over all ranks
    for (int done = 0; done < l->B;) {
        int k = (row + done) / slice_rows, inside = (row + done) % slice_rows;
        int n = slice_rows - inside < l->B - done ? slice_rows - inside : l->B - done;
        const LoaderPlace* p = &l->places[k];
        int64_t from = l->shards.first[p->shard] + p->position + (int64_t)inside * T;
        const uint16_t* tokens = shards_read(&l->shards, from, (size_t)n * T + 1);
        for (size_t i = 0; i < (size_t)n * T; i++) {
            inputs[(size_t)done * T + i] = tokens[i];
            targets[(size_t)done * T + i] = tokens[i + 1];
        }
        done += n;
    }
    if (++l->micro == l->rows / l->world / l->B) loader_advance(l);
}

static inline void loader_describe(FILE* out, const Loader* l) {
    fprintf(out, "train: %d shard%s, %" PRId64 " tokens, ", l->shards.count,
            l->shards.count == 1 ? "" : "s", l->total_tokens);
    if (!l->strided) fprintf(out, "drawn as one stream\n");
    else fprintf(out, "drawn strided, in the order of %d rank(s)\n", l->data_ranks);
}

// ---- validation batches --------------------------------------------------------------------

typedef struct ValLoader {
    Shards shards;
    int B, T, rank, world;
    int64_t predictions;        // what the mean loss is over
    int64_t batches;            // calls of val_batch per rank, the same on every rank
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
}

static inline void val_close(ValLoader* l) {
    shards_close(&l->shards);
    memset(l, 0, sizeof *l);
}

// The k-th batch of this rank, k < batches. Returns the number of targets that are not -1: none on
// a rank for which nothing is left.
static inline int64_t val_batch(ValLoader* l, int64_t k, int* inputs, int* targets) {
    int64_t n = (int64_t)l->B * l->T, from = (k * l->world + l->rank) * n;
    int64_t asked = l->predictions - from < n ? l->predictions - from : n;
    if (asked < 0) asked = 0;
    const uint16_t* tokens = asked ? shards_read(&l->shards, from, (size_t)asked + 1) : NULL;
    for (int64_t i = 0; i < n; i++) {
        inputs[i] = i < asked ? tokens[i] : 0;
        targets[i] = i < asked ? tokens[i + 1] : -1;
    }
    return asked;
}
