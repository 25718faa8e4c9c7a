/*
The loader: shards, every order of batches, the batches of a record's own loader, reading ahead,
positions, validation, bad input.

    test_loader [part of a group's name] [--verbose]
    test_loader fuzz SECONDS [SEED]      mutated shards until the time is over

The expected batches are written down by plain loops over the array of all tokens, from the rules at
the head of llmc/dataloader.h. What must end the program is run in a child, or comes back here from
die() by way of die_ranks. pread is replaced, so that a disk can be slow or fail. Run from the
repository's root: the shards that are mutated lie in test/data/shards.
*/
#include <errno.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>

// ---- a disk that is slow or fails ----------------------------------------------------------

static int disk_calls, disk_delay_us, disk_fails_at = -1, disk_error, disk_most = 1 << 30;

static inline void sleep_us(int us) {
    struct timespec t = { us / 1000000, us % 1000000 * 1000L };
    nanosleep(&t, NULL);
}

static ssize_t disk_pread(int fd, void* out, size_t n, off_t at) {
    int call = __atomic_fetch_add(&disk_calls, 1, __ATOMIC_RELAXED);
    int delay = __atomic_load_n(&disk_delay_us, __ATOMIC_RELAXED);
    if (delay) sleep_us(delay);
    if (call == __atomic_load_n(&disk_fails_at, __ATOMIC_RELAXED)) {
        errno = __atomic_load_n(&disk_error, __ATOMIC_RELAXED);
        return -1;
    }
    size_t most = (size_t)__atomic_load_n(&disk_most, __ATOMIC_RELAXED);
    return pread(fd, out, n < most ? n : most, at);
}

#define pread disk_pread
#include "../llmc/dataloader.h"
#undef pread
#include "../llmc/safetensors.h"
#include "test.h"

#include <setjmp.h>
#include <sys/wait.h>

enum { VOCAB = 50304, END = 50256 };


static void write_shard(const char* path, const uint16_t* tokens, int32_t n) {
    int32_t header[256] = { SHARD_MAGIC, SHARD_VERSION, n };
    FILE* file = fopen(path, "wb");
    REQUIRE(file, "%s: %s", path, strerror(errno));
    fwrite(header, sizeof header, 1, file);
    fwrite(tokens, 2, (size_t)n, file);
    fclose(file);
}

// ---- children, and a die() that comes back -------------------------------------------------

// f(argument) must end with status 1 and one message that holds both parts.
static void expect_death(const char* what, void (*f)(void*), void* argument, const char* part1,
                         const char* part2) {
    char text[8192];
    FILE* err = tmpfile();
    REQUIRE(err, "no temporary file: %s", strerror(errno));
    fflush(stdout);
    pid_t pid = fork();
    REQUIRE(pid >= 0, "fork: %s", strerror(errno));
    if (pid == 0) {
        alarm(20);
        dup2(fileno(err), STDERR_FILENO);
        f(argument);
        _exit(0);
    }
    int status = 0, messages = 0;
    waitpid(pid, &status, 0);
    rewind(err);
    text[fread(text, 1, sizeof text - 1, err)] = 0;
    fclose(err);
    for (const char* s = text; (s = strstr(s, "test_loader: ")); s++) messages++;
    bool ok = WIFEXITED(status) && WEXITSTATUS(status) == 1 && messages == 1 &&
              strstr(text, part1) && (!part2 || strstr(text, part2));
    if (!test_true(what, ok)) printf("      status %d, message: %s", status, text);
}

static jmp_buf death;
static char death_text[4096];
static pthread_t death_thread;

static void come_back(const char* text) {
    REQUIRE(pthread_equal(pthread_self(), death_thread), "die() in another thread: %s", text);
    snprintf(death_text, sizeof death_text, "%s", text);
    longjmp(death, 1);
}

// ---- sets of shards ------------------------------------------------------------------------

enum { MAX_SHARDS = 4, MAX_TOKENS = 6000 };

typedef struct Set {
    const char* name;
    int count, tokens[MAX_SHARDS];
    int shortest, longest;      // documents
    int total;
    uint16_t x[MAX_TOKENS];
} Set;

// 769: six steps of 128 and a last target; 30: less than a step; documents of 1 token: empty ones.
static Set sets[] = {
    { "mixed", 3, { 1000, 769, 1301 }, 2, 40, 0, {} },
    { "long", 3, { 2200, 1500, 30 }, 30, 90, 0, {} },
    { "short", 4, { 700, 30, 1500, 300 }, 1, 5, 0, {} },
};
enum { SETS = sizeof sets / sizeof *sets };

static const char* set_pattern(const Set* set) {
    static char pattern[600];
    snprintf(pattern, sizeof pattern, "%s/%s_*.bin", test_folder, set->name);
    return pattern;
}

// Tokens hardly ever repeat, so that a wrong place is a wrong token. A document runs on across the
// border of two shards, except that `long` has one that starts with its second shard and one that
// is the last token of it.
static void make_sets(void) {
    for (int s = 0; s < SETS; s++) {
        Set* set = &sets[s];
        int next = 0, made = 0;
        for (int i = 0; i < set->count; i++) {
            for (int k = 0; k < set->tokens[i]; k++, set->total++) {
                bool border = s == 1 && i == 1 && (k == 0 || k == set->tokens[i] - 1);
                set->x[set->total] = (uint16_t)((set->total * 16807 + 11 + s) % 50256);
                if (set->total != next && !border) continue;
                set->x[set->total] = END;
                next = set->total + set->shortest +
                       (int)(test_random(7 + s, made++) % (set->longest - set->shortest + 1));
            }
        }
        for (int i = 0, at = 0; i < set->count; at += set->tokens[i++]) {
            char name[64];
            snprintf(name, sizeof name, "%s_%06d.bin", set->name, i);
            write_shard(test_path(name), set->x + at, set->tokens[i]);
        }
    }
}

// ---- what is expected ----------------------------------------------------------------------

enum { MAX_DRAWN = 40000 };

// Steps as rows of T + 1 tokens, and for each token whether a segment starts there.
typedef struct Expected {
    int steps, steps_of_epoch;
    int row[MAX_DRAWN];
    bool starts[MAX_DRAWN];
    int used;
} Expected;

static void expect_row(Expected* e, const int* tokens, const bool* starts, int T) {
    REQUIRE(e->used + T + 1 <= MAX_DRAWN, "MAX_DRAWN is too small");
    for (int i = 0; i <= T; i++) {
        e->row[e->used] = tokens[i];
        e->starts[e->used++] = starts ? starts[i] : i == 0 || tokens[i] == END;
    }
}

// A row of tokens that follow each other in the ring of all.
static void expect_run(Expected* e, const Set* set, int at, int T) {
    static int tokens[MAX_TOKENS];
    for (int i = 0; i <= T; i++) tokens[i] = set->x[(at + i) % set->total];
    expect_row(e, tokens, NULL, T);
}

static void expect_stream(Expected* e, const Set* set, int rows, int T, int steps) {
    for (int i = 0; i < steps * rows; i++) expect_run(e, set, i * T % set->total, T);
    e->steps = steps;
    e->steps_of_epoch = set->total / (rows * T);
}

// As K ranks that know nothing of each other; then the rows are put in their order.
static void expect_strided(Expected* e, const Set* set, int rows, int T, int steps, int K) {
    static int place[8][1000];
    int local = rows / K * T;
    e->steps_of_epoch = 1 << 30;
    for (int k = 0; k < K; k++) {
        int shard = 0, first = 0, position = k * local, epoch = 0;
        for (int step = 0; step < 1000; step++) {
            place[k][step] = first + position;
            position += K * local;
            if (position + K * local + 1 <= set->tokens[shard]) continue;
            position = k * local;
            first += set->tokens[shard++];
            if (shard < set->count) continue;
            shard = first = 0;
            if (epoch++ == 0 && step + 1 < e->steps_of_epoch) e->steps_of_epoch = step + 1;
        }
    }
    for (int step = 0; step < steps; step++)
        for (int r = 0; r < rows; r++)
            expect_run(e, set, place[r / (rows / K)][step] + r % (rows / K) * T, T);
    e->steps = steps;
}

static void expect_contiguous(Expected* e, const Set* set, int rows, int T, int steps) {
    for (int epoch = 0; e->steps < steps || epoch < 1; epoch++) {
        if (epoch == 1 && e->steps == 0) return;
        for (int i = 0, first = 0; i < set->count; first += set->tokens[i++]) {
            for (int p = 0; p + rows * T + 1 < set->tokens[i]; p += rows * T, e->steps++)
                for (int r = 0; r < rows; r++) expect_run(e, set, first + p + r * T, T);
        }
        if (epoch == 0) e->steps_of_epoch = e->steps;
    }
}

static void expect_aligned(Expected* e, const Set* set, int rows, int T, int steps) {
    for (int epoch = 0; e->steps < steps || epoch < 1; epoch++) {
        if (epoch == 1 && e->steps == 0) return;
        for (int i = 0, first = 0; i < set->count; first += set->tokens[i++]) {
            int at[64], found = 0, p = 0;
            while (p < set->tokens[i]) {
                if (set->x[first + p] != END) {
                    p++;
                    continue;
                }
                if (p + T + 1 > set->tokens[i]) break;
                at[found++] = p;
                p += T;
                if (found < rows) continue;
                for (int r = 0; r < rows; r++) expect_run(e, set, first + at[r], T);
                e->steps++;
                found = 0;
            }
        }
        if (epoch == 0) e->steps_of_epoch = e->steps;
    }
}

static void expect_documents(Expected* e, const Set* set, int rows, int T, int steps, int most) {
    for (int epoch = 0; e->steps < steps || epoch < 1; epoch++) {
        if (epoch == 1 && e->steps == 0) return;
        for (int i = 0, first = 0; i < set->count; first += set->tokens[i++]) {
            static int start[MAX_TOKENS], token[MAX_TOKENS];
            static bool starts[MAX_TOKENS];
            int documents = 0, have = 0, row = 0, undo = e->used;
            for (int k = 0; k < set->tokens[i]; k++)
                if (set->x[first + k] == END) start[documents++] = k;
            start[documents] = set->tokens[i];
            for (int d = 0; d < documents; d++) {
                for (int k = 0; k < start[d + 1] - start[d] && k < most && have <= T; k++) {
                    starts[have] = k == 0;
                    token[have++] = set->x[first + start[d] + k];
                }
                if (have <= T) continue;
                expect_row(e, token, starts, T);
                have = 0;
                if (++row < rows) continue;
                row = 0;
                e->steps++;
                undo = e->used;
            }
            e->used = undo;
        }
        if (epoch == 0) e->steps_of_epoch = e->steps;
    }
}

static const Expected* expect(const Set* set, const LoaderSpec* spec, int steps) {
    static Expected e;
    memset(&e, 0, sizeof e);
    int rows = spec->rows, T = spec->T;
    switch (spec->batching) {
        case BATCHING_STREAM: expect_stream(&e, set, rows, T, steps); break;
        case BATCHING_STRIDED: expect_strided(&e, set, rows, T, steps, spec->data_ranks); break;
        case BATCHING_CONTIGUOUS: expect_contiguous(&e, set, rows, T, steps); break;
        case BATCHING_START_ALIGNED: expect_aligned(&e, set, rows, T, steps); break;
        case BATCHING_DOCUMENTS:
            expect_documents(&e, set, rows, T, steps, spec->max_document);
            break;
    }
    return &e;
}

// Whether the batch is B rows from `row` on of all that are expected, segments and all.
static bool batch_is(const Batch* b, const Expected* e, int row, int B, int T) {
    bool ok = true;
    int count = 0;
    for (int r = 0; r < B; r++) {
        const int* want = e->row + (row + r) * (T + 1);
        const bool* starts = e->starts + (row + r) * (T + 1);
        for (int i = 0; i < T; i++) {
            ok = ok && b->inputs[r * T + i] == want[i] && b->targets[r * T + i] == want[i + 1];
            if (starts[i]) ok = ok && count < b->segments && b->cu_seqlens[count++] == r * T + i;
        }
    }
    ok = ok && count == b->segments && b->cu_count % 128 == 0 && b->cu_count > count &&
         b->cu_count * 300 >= B * T;
    for (; count < b->cu_count; count++) ok = ok && b->cu_seqlens[count] == B * T;
    return ok;
}

static const char* const WORDS[] = { "stream", "strided", "contiguous", "start-aligned",
                                     "documents" };

static LoaderSpec spec_of(const Set* set, Batching batching, int rows, int B, int T) {
    LoaderSpec spec = {};
    spec.pattern = set_pattern(set);
    spec.batching = batching;
    spec.rows = rows;
    spec.B = B;
    spec.T = T;
    spec.world = 1;
    spec.vocab = VOCAB;
    spec.data_ranks = 8;
    spec.max_document = 12;
    spec.end_of_text = END;
    return spec;
}

// A set with a shard below a step has no strided order.
static bool has_order(const Set* set, const LoaderSpec* spec) {
    for (int i = 0; i < set->count; i++)
        if (spec->batching == BATCHING_STRIDED && set->tokens[i] < spec->rows * spec->T + 1)
            return false;
    return true;
}

// ---- orders --------------------------------------------------------------------------------

// All ranks' batches against the reference, to the end of the epochs or for 60 steps.
static void check_order(const Set* set, LoaderSpec spec, int world) {
    const Expected* e = expect(set, &spec, spec.epochs ? 1 : 60);
    if (e->steps == 0) return;      // no shard holds a step
    int epochs = (int)spec.epochs, per_rank = spec.rows / world, calls = per_rank / spec.B;
    int steps = e->steps < 60 ? e->steps : 60;
    if (epochs) {
        steps = e->steps_of_epoch * epochs;
        if (spec.batching == BATCHING_STREAM) steps = set->total * epochs / (spec.rows * spec.T);
        e = expect(set, &spec, steps);
    }
    bool right = true, ends = true, placed = true;
    for (int rank = 0; rank < world; rank++) {
        Loader l;
        spec.rank = rank;
        spec.world = world;
        loader_open(&l, &spec, NULL);
        for (int step = 0; step < steps && ends; step++) {
            ends = !loader_over(&l);
            for (int call = 0; call < calls && ends; call++) {
                int row = step * spec.rows + rank * per_rank + call * spec.B;
                placed = placed && l.position.step == step && l.position.micro == call;
                right = batch_is(loader_next(&l), e, row, spec.B, spec.T) && right;
            }
        }
        ends = ends && loader_over(&l) == (epochs > 0);
        loader_close(&l);
    }
    char what[200];
    snprintf(what, sizeof what, "%s, %s, R %d B %d T %d, %d ranks, epochs %d", set->name,
             WORDS[spec.batching], spec.rows, spec.B, spec.T, world, epochs);
    test_true(what, right && placed);
    if (!test_true("they end where the epochs do", ends)) printf("      %s\n", what);
}

static void test_orders(void) {
    static const struct { int rows, B, T, world; } CUTS[] = {
        { 16, 16, 8, 1 }, { 16, 4, 8, 1 }, { 16, 1, 8, 1 }, { 16, 8, 8, 2 }, { 16, 2, 8, 2 },
        { 16, 2, 8, 8 },  { 16, 1, 8, 8 }, { 8, 4, 31, 2 }, { 8, 1, 31, 8 }, { 8, 2, 33, 1 },
    };
    for (int s = 0; s < SETS; s++) {
        for (size_t c = 0; c < sizeof CUTS / sizeof *CUTS; c++) {
            for (int b = 0; b <= BATCHING_DOCUMENTS; b++) {
                int rows = CUTS[c].rows;
                LoaderSpec spec = spec_of(&sets[s], (Batching)b, rows, CUTS[c].B, CUTS[c].T);
                if (!has_order(&sets[s], &spec)) continue;
                for (spec.epochs = 0; spec.epochs < 3; spec.epochs++)
                    check_order(&sets[s], spec, CUTS[c].world);
                if (b != BATCHING_STRIDED) continue;
                spec.epochs = 0;
                spec.data_ranks = CUTS[c].world;
                check_order(&sets[s], spec, CUTS[c].world);
            }
        }
        // a step per epoch and shard, a maximum of one token, and one that nothing reaches
        for (int b = 0; b <= BATCHING_DOCUMENTS; b++) {
            LoaderSpec spec = spec_of(&sets[s], (Batching)b, 8, 8, 60);
            if (has_order(&sets[s], &spec)) check_order(&sets[s], spec, 1);
        }
        LoaderSpec spec = spec_of(&sets[s], BATCHING_DOCUMENTS, 2, 1, 5);
        spec.max_document = s ? 3 : 1;
        check_order(&sets[s], spec, 1);
        spec.max_document = 1000;
        check_order(&sets[s], spec, 2);
    }
    test_true("data ranks: those asked for, fewer, or the ranks",
              loader_data_ranks(8, 512, 1) == 8 && loader_data_ranks(8, 4, 1) == 4 &&
                  loader_data_ranks(8, 3, 1) == 1 && loader_data_ranks(8, 512, 2) == 8 &&
                  loader_data_ranks(8, 512, 16) == 16 && loader_data_ranks(8, 12, 3) == 3);
}

// What the cases of test_orders have to contain to prove something.
static void test_cases(void) {
    LoaderSpec spec = spec_of(&sets[0], BATCHING_STRIDED, 16, 2, 8);
    const Expected* e = expect(&sets[0], &spec, 60);
    int apart = 0;
    for (int step = 0; step < 60; step++) {
        int at[2] = { -1, -1 };
        for (int r = 0; r < 2; r++)
            for (int k = 0; k < sets[0].total; k++) {
                const int* row = e->row + (step * 16 + r * 14) * 9;
                if (sets[0].x[k] == row[0] && sets[0].x[k + 1] == row[1]) at[r] = k;
            }
        apart += at[1] - at[0] != 14 * 8;
    }
    test_true("strided: data ranks that drift apart", apart > 0);
    spec.batching = BATCHING_DOCUMENTS;
    for (int s = 0; s < SETS; s++) {
        e = expect(&sets[s], &spec, 1);
        test_true("documents: several steps to an epoch", e->steps_of_epoch > 1);
    }
    test_true("a document starts a shard, another is its last token",
              sets[1].x[2200] == END && sets[1].x[3699] == END && sets[0].x[1000] != END);
    // One tiny file, many times around.
    uint16_t tiny[5] = { 1, 2, 3, 4, 5 };
    write_shard(test_path("tiny.bin"), tiny, 5);
    spec = spec_of(&sets[0], BATCHING_STREAM, 3, 3, 4);
    spec.pattern = test_path("tiny.bin");
    Loader l;
    loader_open(&l, &spec, NULL);
    bool ok = true;
    for (int step = 0; step < 5; step++) {
        const Batch* b = loader_next(&l);
        for (int i = 0; i < 12; i++)
            ok = ok && b->inputs[i] == 1 + (12 * step + i) % 5 &&
                 b->targets[i] == 1 + (12 * step + i + 1) % 5;
    }
    test_true("a step larger than the data", ok && l.position.epoch == 12);
    loader_close(&l);
    // More segments than B*T/300 rounded up holds.
    static int inputs[300], cu[384];
    Batch b = { inputs, NULL, cu, 0, 0 };
    batch_segments(&b, 2, 150, 0);
    bool all = b.segments == 300 && b.cu_count == 384;
    for (int i = 0; i < 384; i++) all = all && cu[i] == (i < 300 ? i : 300);
    test_true("a segment per token", all);
    batch_segments(&b, 2, 150, -1);
    test_true("a segment per row", b.segments == 2 && b.cu_count == 128 && cu[1] == 150 &&
                                       cu[2] == 300 && cu[127] == 300);
    test_true("the records' count: 128 for 32,768 tokens", batch_cu_count(32768 / 300 + 1) == 128);
}

// ---- the record's own batches ----------------------------------------------------------------

// test/golden/units/loader.safetensors holds what the record's loader gave for the shards beside
// it: per call a batch for each of `world` ranks. A call is a step of `world` rows to us.
static const struct { const char* name; int world, T; } RECORDED[] = {
    { "w1.a1", 1, 1024 }, { "w2.a4", 2, 128 }, { "w8.a1", 8, 128 },
};

static const uint16_t* recorded(const SafeFile* f, const char* set, int c, int rank, int call,
                                const char* what, int64_t n) {
    char name[64];
    snprintf(name, sizeof name, "%s%s.r%d.b%d.%s", set, RECORDED[c].name, rank, call, what);
    return (const uint16_t*)safetensors_data(f, name, SAFE_U16, n);
}

static bool is_recorded(const int* got, const uint16_t* want, int n) {
    bool same = true;
    for (int i = 0; i < n; i++) same = same && got[i] == want[i];
    return same;
}

// The same on the record's ranks and on one, whose rows they are.
static void check_recorded(const SafeFile* f, int c, int world, int B) {
    LoaderSpec spec = spec_of(&sets[0], BATCHING_DOCUMENTS, RECORDED[c].world, B, RECORDED[c].T);
    char name[64], what[100];
    int T = spec.T, given = 0;
    spec.pattern = "test/golden/units/loader/*.bin";
    spec.max_document = 96;
    spec.epochs = 1;
    snprintf(name, sizeof name, "%s.r0.batches", RECORDED[c].name);
    int calls = *(const uint16_t*)safetensors_data(f, name, SAFE_U16, 1);
    bool tokens = true, segments = true, ends = true;
    for (int rank = 0; rank < world; rank++) {
        Loader l;
        spec.rank = rank;
        spec.world = world;
        loader_open(&l, &spec, NULL);
        int step = 0;
        for (; !loader_over(&l) && step < calls; step++) {
            for (int micro = 0; micro < l.micro_steps; micro++) {
                const Batch* b = loader_next(&l);
                for (int row = 0; row < B; row++, given++) {
                    int of = (rank * l.micro_steps + micro) * B + row;
                    const uint16_t* cu = recorded(f, "", c, of, step, "cu_seqlens", 128);
                    tokens = is_recorded(b->inputs + row * T,
                                         recorded(f, "", c, of, step, "inputs", T), T) &&
                             is_recorded(b->targets + row * T,
                                         recorded(f, "", c, of, step, "targets", T), T) && tokens;
                    segments = (B > 1 || is_recorded(b->cu_seqlens, cu, 128)) &&
                               b->cu_count == 128 && segments;
                }
            }
        }
        ends = ends && loader_over(&l) && step == calls;
        loader_close(&l);
    }
    snprintf(what, sizeof what, "the record's %s on %d ranks: ", RECORDED[c].name, world);
    size_t n = strlen(what);
    snprintf(what + n, sizeof what - n, "%d batches, token for token", given);
    test_true(what, tokens && given == RECORDED[c].world * calls);
    snprintf(what + n, sizeof what - n, "cu_seqlens");
    if (B == 1) test_true(what, segments);
    snprintf(what + n, sizeof what - n, "the shards end after %d calls", calls);
    test_true(what, ends);
}

// Validation: rows one after the other, documents not cut. Where a row begins with a document the
// record lists an empty one before it.
static void check_recorded_val(const SafeFile* f, int c) {
    int T = RECORDED[c].T, world = RECORDED[c].world, inputs[1024], targets[1024], cu[1152];
    bool tokens = true, segments = true;
    for (int rank = 0; rank < world; rank++) {
        ValLoader l;
        val_open(&l, "test/golden/units/loader/*.bin", 0, 1, T, rank, world, VOCAB);
        for (int call = 0; call < 2; call++) {
            Batch b = { inputs, targets, cu, 0, 0 };
            val_batch(&l, call, inputs, targets);
            batch_segments(&b, 1, T, END);
            const uint16_t* want = recorded(f, "val.", c, rank, call, "cu_seqlens", 128);
            tokens = is_recorded(inputs, recorded(f, "val.", c, rank, call, "inputs", T), T) &&
                     is_recorded(targets, recorded(f, "val.", c, rank, call, "targets", T), T) &&
                     tokens;
            int extra = want[1] == 0;
            segments = segments && want[0] == 0 && cu[0] == 0 && b.cu_count == 128 &&
                       is_recorded(cu + 1, want + 1 + extra, 127 - extra);
        }
        val_close(&l);
    }
    char what[100];
    snprintf(what, sizeof what, "the record's validation, %s: tokens, segments", RECORDED[c].name);
    test_true(what, tokens && segments);
}

static void test_recorded(void) {
    SafeFile f;
    safetensors_open(&f, "test/golden/units/loader.safetensors");
    for (int c = 0; c < 3; c++) {
        check_recorded(&f, c, RECORDED[c].world, 1);
        if (RECORDED[c].world > 1) {
            check_recorded(&f, c, 1, 1);
            check_recorded(&f, c, 1, 2);
        }
        if (RECORDED[c].world == 8) check_recorded(&f, c, 2, 4);
        check_recorded_val(&f, c);
    }
    safetensors_close(&f);
}

// ---- large files ---------------------------------------------------------------------------

// A shard of n zero tokens that takes no room on the disk, with one token set.
static void write_sparse_shard(const char* path, int64_t n, int64_t where, uint16_t token) {
    int32_t header[256] = { SHARD_MAGIC, SHARD_VERSION, (int32_t)n };
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0666);
    bool ok = fd >= 0 && ftruncate(fd, SHARD_HEADER_BYTES + 2 * n) == 0 &&
              pwrite(fd, header, sizeof header, 0) == (ssize_t)sizeof header &&
              pwrite(fd, &token, 2, SHARD_HEADER_BYTES + 2 * where) == 2;
    REQUIRE(ok, "%s: a sparse file cannot be made: %s", path, strerror(errno));
    close(fd);
}

static void test_large(void) {
    write_sparse_shard(test_path("web_000001.bin"), 100000000, 0, 7);
    write_sparse_shard(test_path("web_000002.bin"), 100000000, 0, 7);
    // The records' batches. 190 in a shard of FineWeb for data ranks 0 to 5, 189 for 6 and 7.
    LoaderSpec spec = spec_of(&sets[0], BATCHING_STRIDED, 512, 64, 1024);
    spec.pattern = test_path("web_*.bin");
    Loader l;
    loader_open(&l, &spec, NULL);
    for (int k = 0; k < 8; k++) {
        LoaderPosition p = {};
        int in_first = 0;
        for (; p.step < 192; p.step++) {
            loader_place(&l, &p, k);
            in_first += p.shard == 0;
        }
        test_true("strided steps in a shard of FineWeb", in_first == (k < 6 ? 190 : 189));
    }
    test_true("strided steps in an epoch", loader_steps(&l, 1) == 2 * 189);
    loader_close(&l);
    static const struct { int T, steps; } RECORDS[] = { { 65536, 190 }, { 49152, 254 } };
    for (int i = 0; i < 2; i++) {
        spec = spec_of(&sets[0], BATCHING_CONTIGUOUS, 8, 1, RECORDS[i].T);
        spec.pattern = test_path("web_*.bin");
        loader_open(&l, &spec, NULL);
        test_true("contiguous steps in a shard of FineWeb",
                  loader_steps(&l, 1) == 2 * RECORDS[i].steps);
        loader_close(&l);
    }
    unlink(test_path("web_000001.bin"));
    unlink(test_path("web_000002.bin"));

    int64_t n = 1200000000, found;
    uint16_t t[5];
    write_sparse_shard(test_path("large.bin"), n, n - 2, 77);
    Shards s;
    shards_open(&s, test_path("large.bin"), VOCAB);
    test_true("tokens beyond 2 GiB", shards_read(&s, t, n - 4, 5) && t[0] == 0 && t[1] == 0 &&
                                         t[2] == 77 && t[3] == 0 && t[4] == 0);
    test_true("a search beyond 2 GiB",
              shards_search(&s, &found, 0, n - 100000, 77) && found == n - 2 &&
                  shards_search(&s, &found, 0, n - 50000, 77) && found == n - 2 &&
                  shards_search(&s, &found, 0, n - 1, 77) && found == n);
    shards_close(&s);
    unlink(test_path("large.bin"));
}

// ---- positions -----------------------------------------------------------------------------

static void test_positions(void) {
    enum { ROWS = 8, B = 2, T = 12, CALLS = 4, BATCHES = 4 * 40 };
    for (int s = 0; s < SETS; s++) {
        for (int b = 0; b <= BATCHING_DOCUMENTS; b++) {
            static LoaderPosition at[BATCHES + 1];
            LoaderSpec spec = spec_of(&sets[s], (Batching)b, ROWS, B, T);
            spec.data_ranks = 4;
            if (!has_order(&sets[s], &spec)) continue;
            const Expected* e = expect(&sets[s], &spec, BATCHES / CALLS);
            Loader l;
            loader_open(&l, &spec, NULL);
            bool same = true, still = true, in_order = true;
            for (int i = 0; i < BATCHES; i++) {
                at[i] = loader_position(&l);
                if (i % 16 == 0) {
                    sleep_us(2000);     // the thread reads on
                    LoaderPosition later = loader_position(&l);
                    still = still && memcmp(&later, &at[i], sizeof later) == 0;
                }
                in_order = in_order && at[i].step == i / CALLS && at[i].micro == i % CALLS;
                loader_next(&l);
            }
            at[BATCHES] = loader_position(&l);
            for (int i = 0; i < BATCHES; i++) {
                // The whole rest every seventh time, else a step and a batch of it.
                int last = i % 7 == 0 || i + CALLS + 1 > BATCHES ? BATCHES : i + CALLS + 1;
                loader_restore(&l, &at[i]);
                for (int k = i; k < last; k++) {
                    same = batch_is(loader_next(&l), e, k * B, B, T) && same;
                    LoaderPosition p = loader_position(&l);
                    same = same && memcmp(&p, &at[k + 1], sizeof p) == 0;
                }
            }
            loader_close(&l);
            char what[100];
            snprintf(what, sizeof what, "%s, %s", sets[s].name, WORDS[b]);
            test_true(what, same);
            test_true("a position counts what was got, not what was read", still && in_order);
            if (!test_true("several epochs", at[BATCHES].epoch >= 1)) printf("      %s\n", what);
        }
    }
}

// The data ends at the same step with a stop in between, also at the last moment.
static void test_positions_over(void) {
    for (int b = 0; b <= BATCHING_DOCUMENTS; b++) {
        LoaderSpec spec = spec_of(&sets[0], (Batching)b, 8, 4, 12);
        spec.epochs = 1;
        int steps = expect(&sets[0], &spec, 1)->steps_of_epoch;
        Loader l;
        loader_open(&l, &spec, NULL);
        for (int i = 0; i < 2 * steps; i++) {
            LoaderPosition p = loader_position(&l);
            loader_restore(&l, &p);
            loader_next(&l);
        }
        bool over = loader_over(&l) && loader_over(&l);
        LoaderPosition p = loader_position(&l);
        loader_restore(&l, &p);
        over = over && loader_over(&l) && p.step == steps;
        loader_close(&l);
        // Another epoch goes on from there.
        spec.epochs = 2;
        const Expected* e = expect(&sets[0], &spec, steps + 1);
        loader_open(&l, &spec, NULL);
        loader_restore(&l, &p);
        over = over && !loader_over(&l) && batch_is(loader_next(&l), e, steps * 8, 4, 12);
        loader_close(&l);
        char what[100];
        snprintf(what, sizeof what, "%s: the end after %d steps", WORDS[b], steps);
        test_true(what, over);
    }
}

// ---- reading ahead -------------------------------------------------------------------------

static void disk(int delay_us, int most) {
    __atomic_store_n(&disk_delay_us, delay_us, __ATOMIC_RELAXED);
    __atomic_store_n(&disk_most, most, __ATOMIC_RELAXED);
}

static void test_ahead(void) {
    enum { B = 4, T = 12 };
    LoaderSpec spec = spec_of(&sets[0], BATCHING_DOCUMENTS, 8, B, T);
    const Expected* e = expect(&sets[0], &spec, 40);
    int* memory = (int*)test_calloc(loader_memory(B, T), sizeof(int));
    Loader l;
    loader_open(&l, &spec, memory);
    const Batch *before = NULL, *two = NULL;
    bool valid = true, mine = true, ready = true;
    for (int i = 0; i < 40; i++) {
        const Batch* b = loader_next(&l);
        sleep_us(1000);     // time to do harm
        valid = valid && batch_is(b, e, i * B, B, T);
        if (before) valid = valid && batch_is(before, e, (i - 1) * B, B, T);
        mine = mine && b->inputs >= memory && b->targets < memory + loader_memory(B, T) &&
               b->cu_seqlens + b->cu_count <= memory + loader_memory(B, T);
        pthread_mutex_lock(&l.lock);
        ready = ready && (l.filled - l.taken >= 1 || i == 39);
        pthread_mutex_unlock(&l.lock);
        test_true("three batches in a row lie apart", b != before && b != two);
        two = before;
        before = b;
    }
    test_true("a batch lasts until the call after the next", valid);
    test_true("in the caller's memory", mine);
    test_true("while the caller works the next ones are read", ready);
    loader_close(&l);
    free(memory);

    // A caller that works longer than a batch is read waits for none; one that does nothing, for
    // about all of the reading: 20 batches of at least four reads of 1 ms.
    for (int busy = 0; busy < 2; busy++) {
        spec.batching = BATCHING_STREAM;
        disk(1000, 1 << 30);
        loader_open(&l, &spec, NULL);
        double start = clock_now();
        for (int i = 0; i < 20; i++) {
            loader_next(&l);
            if (busy) sleep_us(60000);
        }
        double waited = l.waited, passed = clock_now() - start;
        loader_close(&l);
        disk(0, 1 << 30);
        // A busy machine may keep the thread from running; then the wait is still a small part.
        if (busy) test_check("a slow caller waits for no batch", waited, 0.1 * passed);
        else test_true("a fast one's is counted", waited > 0.9 * 17 * 4e-3 && waited <= passed);
    }
    // A read that comes in pieces of three bytes.
    disk(0, 3);
    spec.T = 8;
    spec.B = 2;
    spec.rows = 16;
    spec.epochs = 1;
    check_order(&sets[0], spec, 1);
    disk(0, 1 << 30);
    // Closed and restored at any moment.
    bool right = true;
    for (int i = 0; i < 60; i++) {
        spec.batching = (Batching)(i % 5);
        e = expect(&sets[0], &spec, 4);
        disk(i % 3 * 100, 1 << 30);
        loader_open(&l, &spec, NULL);
        sleep_us((int)(test_random(3, i) % 1500));
        if (i % 2) {
            LoaderPosition p = loader_position(&l);
            right = batch_is(loader_next(&l), e, 0, 2, 8) && right;
            sleep_us((int)(test_random(4, i) % 500));
            loader_restore(&l, &p);
            right = batch_is(loader_next(&l), e, 0, 2, 8) && right;
        }
        loader_close(&l);
    }
    disk(0, 1 << 30);
    test_true("stopped while it reads", right);
}

// ---- who is told ---------------------------------------------------------------------------

static pthread_mutex_t told_lock = PTHREAD_MUTEX_INITIALIZER;
static int told_reads, told_waits, told_looks;
static double told_waited;
static bool told_right;

static void tell(const char* thread, const char* name, int64_t step, double from, double to,
                 int ready) {
    pthread_mutex_lock(&told_lock);
    bool read = strcmp(thread, "loader") == 0 && strcmp(name, "read") == 0;
    bool wait = strcmp(thread, "host") == 0 && strcmp(name, "wait") == 0;
    told_right = told_right && read != wait && from <= to && ready >= 0 && ready <= LOADER_SLOTS;
    // Four micro-steps are a step.
    told_right = told_right && step == 1 + (read ? told_reads : told_looks) / 4;
    told_right = told_right && read != pthread_equal(pthread_self(), death_thread);
    told_reads += read;
    told_waits += wait && to > from;
    told_looks += wait && to == from;
    if (wait) told_waited += to - from;
    pthread_mutex_unlock(&told_lock);
}

// A disk of 2 ms per read and a caller that is slower, and one that is faster.
static void test_watch(void) {
    LoaderSpec spec = spec_of(&sets[0], BATCHING_STREAM, 8, 2, 12);
    death_thread = pthread_self();
    for (int busy = 0; busy < 2; busy++) {
        Loader l;
        told_reads = told_waits = told_looks = 0;
        told_waited = 0;
        told_right = true;
        spec.watch = tell;
        disk(2000, 1 << 30);
        loader_open(&l, &spec, NULL);
        pthread_mutex_lock(&told_lock);     // the wait for the first one does not count
        told_waits = 0;
        told_waited = 0;
        pthread_mutex_unlock(&told_lock);
        for (int i = 0; i < 20; i++) {
            if (busy) sleep_us(40000);
            loader_next(&l);
        }
        double waited = l.waited;
        loader_close(&l);
        disk(0, 1 << 30);
        test_true("reads and looks, each with its step",
                  told_right && told_looks == 20 && told_reads >= 20);
        // A busy machine may keep the thread from running; then the wait is still a small part.
        if (busy) test_check("a slow caller does not wait", told_waited, 0.1 * 20 * 40e-3);
        else test_true("a fast one waits", told_waits >= 4 && told_waits <= 20);
        test_check("as long as the loader counts", fabs(told_waited - waited), 1e-9);
    }
}

// ---- errors --------------------------------------------------------------------------------

static LoaderSpec error_spec(const char* pattern, Batching batching) {
    LoaderSpec spec = {};
    spec.pattern = pattern;
    spec.batching = batching;
    spec.rows = spec.B = 4;
    spec.T = 16;
    spec.world = spec.data_ranks = 1;
    spec.vocab = 100;
    spec.max_document = 20;
    spec.end_of_text = 0;
    return spec;
}

static void open_bad(void* path) {
    Loader l;
    LoaderSpec spec = error_spec((const char*)path, BATCHING_STREAM);
    loader_open(&l, &spec, NULL);
}

static void open_bad_strided(void* path) {
    Loader l;
    LoaderSpec spec = error_spec((const char*)path, BATCHING_STRIDED);
    loader_open(&l, &spec, NULL);
}

static void open_bad_contiguous(void* path) {
    Loader l;
    LoaderSpec spec = error_spec((const char*)path, BATCHING_CONTIGUOUS);
    loader_open(&l, &spec, NULL);
}

static void open_bad_documents(void* path) {
    Loader l;
    LoaderSpec spec = error_spec((const char*)path, BATCHING_DOCUMENTS);
    loader_open(&l, &spec, NULL);
}

static void open_bad_rows(void* path) {
    Loader l;
    LoaderSpec spec = error_spec((const char*)path, BATCHING_STRIDED);
    spec.rows = 5;
    spec.B = 2;
    loader_open(&l, &spec, NULL);
}

static void open_short_val(void* path) {
    ValLoader l;
    val_open(&l, (const char*)path, 64, 4, 16, 0, 1, 100);
}

static void open_val_one_short(void* path) {
    ValLoader l;
    val_open(&l, (const char*)path, 50, 4, 16, 0, 1, 100);
}

static void expect_shard_error(const char* what, int32_t magic, int32_t version, int32_t count,
                               int tokens, int bytes, const char* part1, const char* part2) {
    static int32_t header[256];
    static uint16_t body[256];
    const char* path = test_path("bad.bin");
    header[0] = magic;
    header[1] = version;
    header[2] = count;
    FILE* file = fopen(path, "wb");
    fwrite(header, 1, (size_t)(bytes < SHARD_HEADER_BYTES ? bytes : SHARD_HEADER_BYTES), file);
    fwrite(body, 2, (size_t)tokens, file);
    fclose(file);
    char wanted[700];
    snprintf(wanted, sizeof wanted, "%s: %s", path, part1);
    expect_death(what, open_bad, (void*)path, wanted, part2);
}

static void test_errors(void) {
    expect_shard_error("wrong magic", 5, 1, 100, 100, 1024,
                       "magic 5 at byte 0, expected 20240520; is this a token shard?", "made by");
    expect_shard_error("wrong version", 20240520, 2, 100, 100, 1024,
                       "version 2 at byte 4, expected 1", NULL);
    expect_shard_error("count too large", 20240520, 1, 100, 99, 1024,
                       "1222 bytes, but the 100 tokens promised at byte 8 need 1224", "again");
    expect_shard_error("count too small", 20240520, 1, 99, 100, 1024,
                       "1224 bytes, but the 99 tokens promised at byte 8 need 1222", NULL);
    expect_shard_error("no token", 20240520, 1, 0, 0, 1024, "the header promises 0 tokens", NULL);
    expect_shard_error("a negative count", 20240520, 1, -8, 8, 1024,
                       "the header promises -8 tokens at byte 8", NULL);
    expect_shard_error("one token", 20240520, 1, 1, 1, 1024, "one token has no successor", NULL);
    expect_shard_error("half a header", 20240520, 1, 0, 0, 500,
                       "500 bytes, but the header alone has 1024", NULL);
    expect_shard_error("an empty file", 0, 0, 0, 0, 0, "0 bytes, but the header alone has 1024",
                       NULL);
    expect_death("no file", open_bad, (void*)test_path("none_*.bin"), "no file matches",
                 "text_to_shards");
    expect_death("a directory", open_bad, test_folder, "not a file", "pattern");
    REQUIRE(mkfifo(test_path("pipe.bin"), 0600) == 0, "mkfifo: %s", strerror(errno));
    expect_death("a pipe without a writer", open_bad, (void*)test_path("pipe.bin"), "not a file",
                 NULL);

    uint16_t tokens[100];
    for (int i = 0; i < 100; i++) tokens[i] = (uint16_t)i;
    tokens[40] = 100;
    write_shard(test_path("high_2.bin"), tokens, 100);
    expect_death("a token beyond the vocabulary", open_bad, (void*)test_path("high_2.bin"),
                 "high_2.bin: token 40 (byte 1104) is 100, but --vocab is 100 (ids 0 to 99)",
                 "another vocabulary");
    expect_death("the same in a search", open_bad_documents, (void*)test_path("high_2.bin"),
                 "high_2.bin: token 40 (byte 1104) is 100", NULL);
    tokens[40] = 99;
    write_shard(test_path("high_1.bin"), tokens, 50);
    tokens[3] = 101;
    write_shard(test_path("high_2.bin"), tokens, 100);
    expect_death("the same in the second shard", open_bad, (void*)test_path("high_*.bin"),
                 "high_2.bin: token 3 (byte 1030) is 101", NULL);
    expect_death("a shard below a step", open_bad_strided, (void*)test_path("high_1.bin"),
                 "high_1.bin: 50 tokens, but --batching strided takes a step of 65 from one shard",
                 "--batching stream");
    expect_death("no shard with a step", open_bad_contiguous, (void*)test_path("high_1.bin"),
                 "the largest of the 1 shards of", "has 50 tokens, too few for a step of 64");
    expect_death("rows that cannot be cut", open_bad_rows, (void*)test_path("high_1.bin"),
                 "a step of 5 sequences", NULL);
    tokens[3] = 3;
    tokens[0] = 1;
    write_shard(test_path("whole.bin"), tokens, 100);
    expect_death("no document", open_bad_documents, (void*)test_path("whole.bin"),
                 "none of the 1 shards of", "4 rows of 16 tokens that start with a document "
                 "(token 0)");
    expect_death("a validation set that is too short", open_short_val, (void*)test_path("high_1.bin"),
                 "--val-tokens 64", "holds 49 predictions");
    expect_death("one that is too short by one", open_val_one_short, (void*)test_path("high_1.bin"),
                 "--val-tokens 50", NULL);
}

// ---- errors of the thread ------------------------------------------------------------------

// Two shards of 160 tokens, four steps of stream. What happens to them is seen when its turn comes.
static void (*harm)(void);
static int harm_batching;

static void disk_breaks(void) {
    disk_error = EIO;
    __atomic_store_n(&disk_fails_at, __atomic_load_n(&disk_calls, __ATOMIC_RELAXED) + 2,
                     __ATOMIC_RELAXED);
}
static void disk_hesitates(void) {
    disk_breaks();
    disk_error = EINTR;
}
static void second_vanishes(void) { unlink(test_path("two_2.bin")); }
static void second_shrinks(void) {
    REQUIRE(truncate(test_path("two_2.bin"), 1024 + 2 * 77) == 0, "truncate: %s", strerror(errno));
}

static void draw_harmed(void* batches) {
    Loader l;
    LoaderSpec spec = error_spec(test_path("two_*.bin"), (Batching)harm_batching);
    spec.rows = spec.B = 2;
    loader_open(&l, &spec, NULL);
    for (int i = 0; i < 4; i++) loader_next(&l);    // the thread has stopped at full slots, or will
    sleep_us(30000);
    harm();
    for (int i = 0; i < *(int*)batches; i++) loader_next(&l);
    loader_close(&l);
    die("all was drawn");
}

static void test_thread_errors(void) {
    uint16_t tokens[160];
    int many = 40, two = 2;
    for (int i = 0; i < 160; i++) tokens[i] = (uint16_t)(i % 13);
    for (harm_batching = 0; harm_batching <= BATCHING_DOCUMENTS; harm_batching++) {
        for (int i = 1; i < 3; i++)
            write_shard(test_path(i == 1 ? "two_1.bin" : "two_2.bin"), tokens, 160);
        harm = disk_breaks;
        expect_death("a disk error", draw_harmed, &many, "two_", "Input/output error");
        expect_death("that is not there yet", draw_harmed, &two, "all was drawn", NULL);
        harm = disk_hesitates;
        expect_death("an interrupted read", draw_harmed, &many, "all was drawn", NULL);
        harm = second_shrinks;
        expect_death("a file that shrinks", draw_harmed, &many,
                     "two_2.bin: ends at byte 1178, expected 1344", "shorter");
        write_shard(test_path("two_2.bin"), tokens, 160);
        harm = second_vanishes;
        expect_death("a file that vanishes", draw_harmed, &many,
                     "two_2.bin: cannot be opened again: No such file", NULL);
    }
}

// ---- epochs --------------------------------------------------------------------------------

static Batching epochs_batching;

static void open_for_steps(void* steps) {
    Loader l;
    LoaderSpec spec = spec_of(&sets[0], epochs_batching, 16, 16, 8);
    spec.steps = *(int64_t*)steps;
    spec.epochs = 2;
    loader_open(&l, &spec, NULL);
    loader_close(&l);
    die("enough");
}

static void draw_past_the_end(void* unused) {
    (void)unused;
    Loader l;
    LoaderSpec spec = spec_of(&sets[0], BATCHING_DOCUMENTS, 16, 16, 8);
    spec.epochs = 1;
    loader_open(&l, &spec, NULL);
    while (!loader_over(&l)) loader_next(&l);
    loader_stop(&l);
    loader_next(&l);
}

static void restore_elsewhere(void* batching) {
    Loader l;
    LoaderSpec spec = spec_of(&sets[0], *(Batching*)batching, 16, 16, 8);
    loader_open(&l, &spec, NULL);
    LoaderPosition p = loader_position(&l);
    p.shard = *(Batching*)batching == BATCHING_DOCUMENTS ? 3 : 1;
    loader_stop(&l);
    loader_restore(&l, &p);
}

static void test_epochs(void) {
    for (int b = 0; b <= BATCHING_DOCUMENTS; b++) {
        char part[100], flag[60];
        epochs_batching = (Batching)b;
        LoaderSpec spec = spec_of(&sets[0], (Batching)b, 16, 16, 8);
        bool known = b <= BATCHING_CONTIGUOUS;
        int64_t epoch = expect(&sets[0], &spec, 1)->steps_of_epoch;
        int64_t steps = b == BATCHING_STREAM ? 2 * sets[0].total / 128 : 2 * epoch;
        expect_death("as many steps as there are", open_for_steps, &steps, "enough", NULL);
        steps += 1;
        snprintf(part, sizeof part, "--steps %d, but --epochs 2 of the 3070 tokens", (int)steps);
        snprintf(flag, sizeof flag, "steps of 128 tokens\n%*sadd shards", 13, "");
        if (known) expect_death("one too many", open_for_steps, &steps, part, flag);
        steps = 10000;
        snprintf(flag, sizeof flag, "give %s", known ? "" : "at most ");
        expect_death("far too many", open_for_steps, &steps, flag, "--epochs ");
    }
    int64_t steps = 49;     // 49 * 128 = 2 * 3070 + 132
    epochs_batching = BATCHING_STREAM;
    expect_death("the epochs it takes", open_for_steps, &steps, "give 47 steps of 128 tokens",
                 "--epochs 3; 0:");
    expect_death("drawing on", draw_past_the_end, NULL, "the data ended after", NULL);
    static Batching other[2] = { BATCHING_CONTIGUOUS, BATCHING_DOCUMENTS };
    expect_death("a position of other data", restore_elsewhere, &other[0],
                 "is not at token 0 of shard 1", "these are not the shards");
    expect_death("a shard that is not there", restore_elsewhere, &other[1], "of shard 3", NULL);
}

// ---- validation ----------------------------------------------------------------------------

static void test_val(void) {
    // whole rows, part of a row, one prediction, everything; more ranks than batches
    static const int64_t ASKED[] = { 960, 1000, 1111, 1, 47, 48, 49, 3069, 0 };
    static const int WORLDS[] = { 1, 2, 3, 8 };
    static const struct { int B, T; } CUTS[] = { { 3, 16 }, { 1, 16 }, { 4, 16 }, { 2, 7 },
                                                 { 1, 100 } };
    const Set* set = &sets[0];
    for (size_t i = 0; i < sizeof ASKED / sizeof *ASKED * 4 * 5; i++) {
        static int inputs[128], targets[128];
        static bool hit[MAX_TOKENS];
        int64_t asked = ASKED[i / 20], wanted = asked ? asked : set->total - 1, seen = 0;
        int world = WORLDS[i % 4], B = CUTS[i / 4 % 5].B, T = CUTS[i / 4 % 5].T;
        bool right = true, calls = true;
        memset(hit, 0, sizeof hit);
        for (int rank = 0; rank < world; rank++) {
            ValLoader l;
            val_open(&l, set_pattern(set), asked, B, T, rank, world, VOCAB);
            calls = calls && l.predictions == wanted &&
                    l.batches == (wanted + world * B * T - 1) / (world * B * T);
            for (int64_t k = 0; k < l.batches; k++) {
                int64_t there = 0, first = (k * world + rank) * B * T;
                int64_t said = val_batch(&l, k, inputs, targets);
                for (int j = 0; j < B * T; j++) {
                    if (targets[j] < 0) {
                        right = right && targets[j] == -1 && inputs[j] == 0 && first + j >= wanted;
                        continue;
                    }
                    right = right && inputs[j] == set->x[first + j] &&
                            targets[j] == set->x[first + j + 1] && !hit[first + j];
                    hit[first + j] = true;
                    there++;
                }
                right = right && there == said;
                seen += there;
            }
            val_close(&l);
        }
        char what[96];
        snprintf(what, sizeof what, "%" PRId64 " predictions on %d ranks in (%d, %d), each once",
                 wanted, world, B, T);
        test_true(what, right && seen == wanted);
        test_true("calls per rank", calls);
    }
}

// ---- mutated shards ------------------------------------------------------------------------

enum { MUTANT_BYTES = 8192 };

typedef struct Corpus {
    int count;
    size_t size[16];
    unsigned char bytes[16][MUTANT_BYTES / 2];
} Corpus;

static void corpus_read(Corpus* c) {
    glob_t found;
    REQUIRE(glob("test/data/shards/*.bin", 0, NULL, &found) == 0, "test/data/shards is empty");
    for (size_t i = 0; i < found.gl_pathc && i < 16; i++) {
        FILE* file = fopen(found.gl_pathv[i], "rb");
        REQUIRE(file, "%s: %s", found.gl_pathv[i], strerror(errno));
        c->size[i] = fread(c->bytes[i], 1, sizeof c->bytes[i], file);
        fclose(file);
        c->count++;
    }
    globfree(&found);
}

typedef struct Dice { uint64_t seed, i; } Dice;

static uint32_t roll(Dice* d, uint32_t sides) {
    return (uint32_t)(test_random(d->seed, d->i++) % sides);
}

// Changes up to five things; sometimes the header is made to fit the size again, so that the damage
// lies deeper.
static size_t mutate(unsigned char* bytes, size_t n, Dice* d) {
    static const int32_t ODD[] = { 0, 1, -1, 2, 255, 256, 65536, INT32_MAX, INT32_MIN, 1 << 30 };
    for (int count = (int)roll(d, 6); count > 0 && n > 0; count--) {
        uint32_t at = roll(d, (uint32_t)n), length = 1 + roll(d, 40);
        int32_t odd = roll(d, 2) ? ODD[roll(d, 10)] : (int32_t)((n - 1024) / 2 + roll(d, 5)) - 2;
        if (at + length > n) length = (uint32_t)n - at;
        switch (roll(d, 9)) {
            case 0: bytes[at] ^= (unsigned char)(1 << roll(d, 8)); break;
            case 1: bytes[at] = (unsigned char)roll(d, 256); break;
            case 2: bytes[roll(d, 12) % n] ^= (unsigned char)(1 << roll(d, 8)); break;
            case 3: if (n >= 12) memcpy(bytes + 4 * roll(d, 3), &odd, 4); break;
            case 4: n = at; break;
            case 5: n -= roll(d, 3) < n ? roll(d, 3) % n : 0; break;
            case 6: memset(bytes + at, roll(d, 2) ? 0 : 255, length); break;
            case 7:     // a part twice
                if (n + length > MUTANT_BYTES) break;
                memmove(bytes + at + length, bytes + at, n - at);
                n += length;
                break;
            case 8:     // a part less
                memmove(bytes + at, bytes + at + length, n - at - length);
                n -= length;
                break;
        }
    }
    if (n >= 1024 && roll(d, 2)) {
        int32_t header[3] = { SHARD_MAGIC, SHARD_VERSION, (int32_t)((n - 1024) / 2) };
        memcpy(bytes, header, sizeof header);
        n -= n % 2;
    }
    return n;
}

// Opens and draws; returns the message, or NULL if there was none.
static const char* use_mutants(Dice* d) {
    static Loader l;
    static ValLoader v;
    static const int VOCABS[] = { 320, 257, 50304, 65536 };
    static const char* message;     // what setjmp comes back to is not in a register
    LoaderSpec spec = {};
    int world = 1 << roll(d, 3), batches = (int)roll(d, 24), inputs[64], targets[64];
    spec.pattern = test_path("mutant_*.bin");
    spec.batching = (Batching)roll(d, 5);
    spec.world = world;
    spec.rank = (int)roll(d, (uint32_t)world);
    spec.B = 1 + (int)roll(d, 3);
    spec.T = 1 + (int)roll(d, 20);
    spec.rows = spec.B * world * (1 + (int)roll(d, 2));
    spec.vocab = VOCABS[roll(d, 4)];
    spec.data_ranks = 1 + (int)roll(d, 8);
    spec.max_document = 1 + (int)roll(d, 30);
    spec.end_of_text = 256;
    spec.epochs = roll(d, 3);
    memset(&l, 0, sizeof l);
    memset(&v, 0, sizeof v);
    message = NULL;
    die_ranks = come_back;
    if (setjmp(death) == 0) {
        loader_open(&l, &spec, NULL);
        while (batches-- > 0 && !loader_over(&l)) loader_next(&l);
        val_open(&v, spec.pattern, 0, spec.B, spec.T, spec.rank, spec.world, spec.vocab);
        for (int64_t k = 0; k < v.batches && k < 20; k++) val_batch(&v, k, inputs, targets);
    } else {
        message = death_text;
    }
    die_ranks = NULL;
    loader_close(&l);
    val_close(&v);
    return message;
}

// Whether a message names a file (or the pattern) and what is wrong in numbers.
static bool message_is_good(const char* text) {
    if (!strstr(text, "mutant_") || !strpbrk(text, "0123456789")) return false;
    bool place = strstr(text, "byte") != NULL, whole = strstr(text, "tokens") != NULL;
    return place || whole || strstr(text, "one token has no successor");
}

// Until `count` sets of mutants were used or the seconds are over. Returns how many had no good
// message; *refused: how many had one.
static int64_t fuzz(uint64_t seed, int64_t count, double seconds, int64_t* refused) {
    static Corpus corpus;
    static unsigned char bytes[MUTANT_BYTES];
    int64_t bad = 0, i = 0;
    double start = clock_now();
    corpus.count = 0;
    corpus_read(&corpus);
    death_thread = pthread_self();
    *refused = 0;
    for (; i < count && clock_now() - start < seconds; i++) {
        Dice d = { seed + (uint64_t)i, 0 };
        int files = 1 + (int)roll(&d, 2);
        for (int f = 0; f < 2; f++) {
            const char* path = test_path(f ? "mutant_2.bin" : "mutant_1.bin");
            int from = (int)roll(&d, (uint32_t)corpus.count);
            size_t n = corpus.size[from];
            unlink(path);
            if (f == files) break;
            memcpy(bytes, corpus.bytes[from], n);
            if (f + 1 == files) n = mutate(bytes, n, &d);
            test_write_file(path, bytes, n);
        }
        alarm(20);      // a hang ends the program
        const char* message = use_mutants(&d);
        alarm(0);
        *refused += message != NULL;
        if (!message || message_is_good(message)) continue;
        printf("FAIL  seed %" PRIu64 ": %s\n", seed + (uint64_t)i, message);
        bad++;
    }
    printf("      %" PRId64 " sets of shards, %" PRId64 " refused, %.1f s\n", i, *refused,
           clock_now() - start);
    return bad;
}

static void test_mutants(void) {
    int64_t refused;
    test_true("a message that names file and place", fuzz(1, 10000, 1e9, &refused) == 0);
    test_true("some are refused, some are not", refused > 3000 && refused < 9500);
}

// ---- main ----------------------------------------------------------------------------------

int main(int argc, char** argv) {
    program_name = "test_loader";
    const char* temporary = getenv("TMPDIR");
    snprintf(test_folder, sizeof test_folder, "%.200s/loader.XXXXXX",
             temporary ? temporary : "/tmp");
    REQUIRE(mkdtemp(test_folder), "%s: cannot be made: %s", test_folder, strerror(errno));
    bool fuzzing = argc >= 3 && strcmp(argv[1], "fuzz") == 0;
    test_init(fuzzing ? 1 : argc, argv);
    if (fuzzing) {
        int64_t refused;
        uint64_t seed = argc > 3 ? strtoull(argv[3], NULL, 10) : (uint64_t)time(NULL) << 24;
        printf("test_loader fuzz: seed %" PRIu64 "\n", seed);
        if (test_group("fuzz"))
            test_true("a message that names file and place",
                      fuzz(seed, INT64_MAX, atof(argv[2]), &refused) == 0);
    } else {
        make_sets();
        if (test_group("orders")) test_orders();
        if (test_group("cases")) test_cases();
        if (test_group("recorded")) test_recorded();
        if (test_group("large")) test_large();
        if (test_group("positions")) test_positions();
        if (test_group("positions: end")) test_positions_over();
        if (test_group("read-ahead")) test_ahead();
        if (test_group("watch")) test_watch();
        if (test_group("errors")) test_errors();
        if (test_group("errors: thread")) test_thread_errors();
        if (test_group("epochs")) test_epochs();
        if (test_group("val")) test_val();
        if (test_group("mutants")) test_mutants();
    }
    char command[300];
    snprintf(command, sizeof command, "rm -r '%s'", test_folder);
    if (system(command) != 0) fprintf(stderr, "test_loader: %s is left over\n", test_folder);
    return test_summary();
}
