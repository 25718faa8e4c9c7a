/*
Checkpoints: written by several ranks in one process, read back, kept and replaced.

    test_checkpoint [part of a group's name] [--verbose]
    test_checkpoint newest OUT      the step of a run's newest checkpoint that is whole, or none

Ranks are Savers side by side: what the trainer's ranks agree on by messages, that all have written,
is here a loop over them. No GPU and no host layer; compiled as C++ by the Makefile.
*/
#include "../llmc/saver.h"
#include "faulty_files.c"
#include "test.h"

#include <glob.h>
#include <sys/resource.h>

// ---- a run of several ranks ----------------------------------------------------------------

// A model of a vector, a table, and a matrix that lies transposed in memory.
enum { TENSORS = 3, RANKS_MOST = 3, ROWS = 7, COLS = 5, WIDE = 300, TALL = 1000, LENGTH = 11 };

typedef struct TestTensor {
    const char* name;
    int dims;
    int64_t shape[2];
    bool transposed;
} TestTensor;

static const TestTensor MODEL[TENSORS] = {
    { "scalars", 1, { LENGTH, 0 }, false },
    { "wte \"odd\" \xc3\xa9", 2, { ROWS, COLS }, false },
    { "h.0.mlp.c_fc.weight", 2, { TALL, WIDE }, true },     // is turned in several pieces
};

static int64_t tensor_size(int i) {
    return MODEL[i].dims == 2 ? MODEL[i].shape[0] * MODEL[i].shape[1] : MODEL[i].shape[0];
}

// Element e, in logical order, of a tensor's kind in the checkpoint of a step.
static float value_of(int64_t step, int tensor, StateKind kind, int64_t e) {
    uint64_t seed = (uint64_t)(step * 100 + tensor * 10 + kind) << 32;
    return (float)(int32_t)(test_mix_bits(seed + (uint64_t)e) >> 32);
}

// A rank's part of a gradient: quarters, so that any order of the sum gives the same.
static float gradient_of(int64_t step, int tensor, int rank, int64_t e) {
    uint64_t seed = (uint64_t)(step * 100 + tensor * 10 + rank);
    return 0.25f * (float)(test_random(seed, (uint64_t)e) % 64);
}

static uint16_t half_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)(bits >> 16);
}

typedef struct TestRank {
    Saver saver;
    StatePart parts[TENSORS * STATE_KINDS];
    void* data[TENSORS * STATE_KINDS];
    int count;
} TestRank;

typedef struct TestRun {
    const char* out;
    int world;
    int tensors;                // of the model, the first; not all: without the matrix
    bool halves;                // weights in bf16
    bool waiting;               // gradients wait
    TestRank ranks[RANKS_MOST];
} TestRun;

// Where logical element e lies in memory.
static int64_t place_of(int i, int64_t e) {
    if (!MODEL[i].transposed) return e;
    int64_t rows = MODEL[i].shape[0], cols = MODEL[i].shape[1];
    return e % cols * rows + e / cols;
}

static void add_part(TestRun* run, int r, int64_t step, int i, StateKind kind, int64_t offset,
                     int64_t count) {
    TestRank* rank = &run->ranks[r];
    StatePart* p = &rank->parts[rank->count];
    bool half = kind == STATE_WEIGHT && run->halves, whole = count == tensor_size(i);
    memset(p, 0, sizeof *p);
    p->name = MODEL[i].name;
    p->kind = kind;
    p->type = half ? SAFE_BF16 : SAFE_F32;
    p->dims = MODEL[i].dims;
    memcpy(p->shape, MODEL[i].shape, sizeof p->shape);
    p->transposed = whole && MODEL[i].transposed;
    p->offset = offset;
    p->count = count;
    void* data = test_calloc((size_t)count, half ? 2 : 4);
    for (int64_t e = 0; e < count; e++) {
        int64_t at = p->transposed ? place_of(i, e) : e;
        float x = kind == STATE_GRAD ? gradient_of(step, i, r, offset + e)
                                     : value_of(step, i, kind, offset + e);
        if (half) ((uint16_t*)data)[at] = half_of(x);
        else ((float*)data)[at] = x;
    }
    p->data = rank->data[rank->count++] = data;
}

// Tensor 0 is rank 0's, the table is cut among all, the matrix is the last rank's.
static void make_parts(TestRun* run, int r, int64_t step) {
    TestRank* rank = &run->ranks[r];
    for (int i = 0; i < rank->count; i++) free(rank->data[i]);
    rank->count = 0;
    for (int i = 0; i < run->tensors && r == 0; i++)
        add_part(run, r, step, i, STATE_WEIGHT, 0, tensor_size(i));
    for (int i = 0; i < run->tensors; i++) {
        int64_t n = tensor_size(i), from = 0, to = n;
        if (i == 0 && r != 0) continue;
        if (i == 1) from = n * r / run->world, to = n * (r + 1) / run->world;
        if (i == 2 && r != run->world - 1) continue;
        for (int kind = STATE_MASTER; kind <= STATE_V; kind++)
            add_part(run, r, step, i, (StateKind)kind, from, to - from);
    }
    if (run->waiting) add_part(run, r, step, 1, STATE_GRAD, 0, tensor_size(1));
}

static const char FLAGS[] = "{\"steps\":30,\"recipe\":\"a \\\"b\\\"\",\"lr\":0.1}";

static CheckpointInfo make_info(const TestRun* run, int64_t step) {
    CheckpointInfo info;
    memset(&info, 0, sizeof info);
    info.step = step;
    info.tokens = step * 512;
    info.train_seconds = 0.1 * (double)step;
    info.ranks = run->world;
    info.zero = 1;
    snprintf(info.commit, sizeof info.commit, "abc1234-dirty");
    snprintf(info.precision, sizeof info.precision, "fp32");
    snprintf(info.target, sizeof info.target, "cpu");
    snprintf(info.tokenizer_hash, sizeof info.tokenizer_hash, "0123456789abcdef");
    info.flags = FLAGS;
    info.recipe = "# a recipe\nsteps = 30\n\t\"x\" \\ \xe2\x82\xac\n";
    info.shards = "a.bin 100\nb.bin 200\n";
    for (int i = 0; i < 5; i++) info.position[i] = step * 10 + i;
    info.seed = 9007199254740991;
    info.lr_mult = 1.0 / 3;
    info.muon_momentum = 0.85;
    info.window_long = 128;
    info.adam_step = step / 2;
    for (int i = 0; i < 130 + (int)step; i++)
        window_push(&info.loss, 3 + 0.1 * test_uniform(5, (uint64_t)i));
    for (int i = 0; i < 3; i++) window_push(&info.grad_norm, 1e-300 * (i + 1));
    info.val_loss = NAN;
    info.train_loss = 3.2795;
    return info;
}

static void run_open(TestRun* run, const char* out, int world, int64_t keep, int64_t keep_every) {
    memset(run, 0, sizeof *run);
    run->out = out;
    run->world = world;
    run->tensors = TENSORS - 1;
    mkdir(out, 0777);
    for (int r = 0; r < world; r++)
        saver_open(&run->ranks[r].saver, out, r, world, keep, keep_every);
}

static void run_close(TestRun* run) {
    for (int r = 0; r < run->world; r++) {
        saver_close(&run->ranks[r].saver);
        for (int i = 0; i < run->ranks[r].count; i++) free(run->ranks[r].data[i]);
    }
}

// As the trainer's ranks do it. False: it was given up; `error` says why.
static bool run_save(TestRun* run, int64_t step, char* error, size_t size) {
    bool failed = false;
    CheckpointInfo info = make_info(run, step);
    for (int r = 0; r < run->world; r++) {
        make_parts(run, r, step);
        saver_begin(&run->ranks[r].saver, &info, run->ranks[r].parts, run->ranks[r].count);
    }
    error[0] = 0;
    for (int half = 0; half < 2 && !failed; half++) {
        for (int r = 0; r < run->world; r++) {
            Saver* s = &run->ranks[r].saver;
            saver_wait(s);
            if (saver_status(s) == SAVER_FAILED && !failed)
                snprintf(error, size, "%s", saver_error(s));
            failed = failed || saver_status(s) == SAVER_FAILED;
        }
        for (int r = 0; r < run->world && !failed && half == 0; r++)
            saver_commit(&run->ranks[r].saver);
    }
    for (int r = 0; r < run->world && failed; r++) saver_abandon(&run->ranks[r].saver);
    return !failed;
}

static bool save_ok(TestRun* run, int64_t step) {
    char error[2048];
    bool ok = run_save(run, step, error, sizeof error);
    if (!ok) printf("      %s\n", error);
    return ok;
}

// Every value of the checkpoint, as a rank of another run would ask for it.
static bool holds(Checkpoint* c, const TestRun* run, int64_t step) {
    bool same = true;
    char problem[512] = "";
    for (int i = 0; i < run->tensors; i++) {
        int64_t n = tensor_size(i);
        float *got = test_floats((size_t)n), *want = test_floats((size_t)n);
        for (int kind = 0; kind < STATE_KINDS; kind++) {
            if (kind == STATE_GRAD && (!run->waiting || i != 1)) continue;
            bool half = kind == STATE_WEIGHT && run->halves;
            for (int r = -1; r < (kind == STATE_GRAD ? run->world : 0); r++) {
                memset(got, 0xff, (size_t)n * sizeof(float));
                memset(want, 0xff, (size_t)n * sizeof(float));
                for (int64_t e = 0; e < n; e++) {
                    float x = kind == STATE_GRAD ? 0 : value_of(step, i, (StateKind)kind, e);
                    for (int q = 0; q < run->world && kind == STATE_GRAD; q++)
                        if (r < 0 || r == q) x += gradient_of(step, i, q, e);
                    if (half) ((uint16_t*)want)[e] = half_of(x);
                    else want[e] = x;
                }
                same = same &&
                       checkpoint_read(c, MODEL[i].name, (StateKind)kind, r,
                                       half ? SAFE_BF16 : SAFE_F32, MODEL[i].dims, MODEL[i].shape,
                                       got, problem, sizeof problem) &&
                       memcmp(got, want, (size_t)n * sizeof(float)) == 0;
                if (!same)
                    printf("      step %" PRId64 " tensor %d (%s) rank %d: %s\n", step, i,
                           STATE_KIND_WORD[kind], r, problem);
                if (!same) kind = STATE_KINDS, i = TENSORS;
            }
        }
        free(got);
        free(want);
    }
    return same;
}

// The newest one of the run is of this step, valid, and holds what was saved.
static bool newest_is(const TestRun* run, int64_t step) {
    Checkpoint c;
    char report[1024];
    if (!checkpoint_newest(&c, run->out, report, sizeof report)) {
        printf("      no checkpoint: %s\n", report);
        return false;
    }
    bool same = c.info.step == step && !report[0] && holds(&c, run, step);
    if (!same) printf("      newest: step %" PRId64 " %s\n", c.info.step, report);
    checkpoint_close(&c);
    return same;
}

// What is in OUT/checkpoints, without "step_": the names, then the hidden ones.
static const char* names_in(const char* out) {
    static char text[1024];
    char path[600];
    glob_t found;
    size_t n = 0;
    text[0] = 0;
    snprintf(path, sizeof path, "%s/checkpoints/{step_*,.step_*}", out);
    if (glob(path, GLOB_BRACE, NULL, &found)) return text;
    for (size_t i = 0; i < found.gl_pathc; i++) {
        const char* name = strstr(strrchr(found.gl_pathv[i], '/'), "step_") + 5;
        n += (size_t)snprintf(text + n, sizeof text - n, "%s%g%s", n ? " " : "", atof(name),
                              name + strcspn(name, "."));
    }
    globfree(&found);
    return text;
}

static bool names_are(const char* what, const char* out, const char* wanted) {
    bool ok = test_true(what, strcmp(names_in(out), wanted) == 0);
    if (!ok) printf("      there is \"%s\", expected \"%s\"\n", names_in(out), wanted);
    return ok;
}

static void path_of(char* path, size_t size, const char* out, int64_t step, const char* file) {
    checkpoint_path(path, size, out, step);
    size_t n = strlen(path);
    if (file) snprintf(path + n, size - n, "/%s", file);
}

// ---- round trip ----------------------------------------------------------------------------

static const char* out_path(const char* name) {
    static char out[512];
    snprintf(out, sizeof out, "%s", test_path(name));
    return out;
}

static void check_info(const TestRun* run, int64_t step) {
    Checkpoint c;
    char path[600], problem[512] = "";
    path_of(path, sizeof path, run->out, step, "");
    if (!test_true("opens", checkpoint_open(&c, path, problem, sizeof problem))) {
        printf("      %s\n", problem);
        return;
    }
    CheckpointInfo want = make_info(run, step), *got = &c.info;
    test_true("the directory, without a slash", strlen(c.directory) == strlen(path) - 1);
    test_true("step, tokens, ranks", got->step == step && got->tokens == want.tokens &&
                                         got->ranks == run->world && got->zero == 1);
    test_true("flags are the same bytes", strcmp(got->flags, FLAGS) == 0);
    test_true("texts", strcmp(got->recipe, want.recipe) == 0 &&
                           strcmp(got->shards, want.shards) == 0);
    test_true("names", strcmp(got->commit, want.commit) == 0 &&
                           strcmp(got->precision, want.precision) == 0 &&
                           strcmp(got->target, want.target) == 0 &&
                           strcmp(got->tokenizer_hash, want.tokenizer_hash) == 0);
    test_same_bits("position", got->position, want.position, sizeof want.position);
    test_true("seed", got->seed == want.seed);
    double numbers[] = { got->train_seconds, got->lr_mult, got->muon_momentum, got->train_loss };
    double wanted[] = { want.train_seconds, want.lr_mult, want.muon_momentum, want.train_loss };
    test_same_bits("numbers", numbers, wanted, sizeof wanted);
    test_true("NaN is null and NaN again", isnan(got->val_loss));
    test_true("schedule", got->window_long == 128 && got->window_short == 0 &&
                              got->adam_step == want.adam_step);
    bool same = got->loss.count == WINDOW && got->grad_norm.count == 3 && got->grad_norm.next == 3;
    for (int i = 0; i < WINDOW && same; i++)
        same = window_at(&got->loss, i) == window_at(&want.loss, i);
    for (int i = 0; i < 3 && same; i++)
        same = window_at(&got->grad_norm, i) == window_at(&want.grad_norm, i);
    test_true("windows, from the oldest on", same);
    double z = window_z(&want.loss, 4), again = window_z(&got->loss, 4);
    test_same_bits("z-scores go on", &again, &z, sizeof z);
    test_true("a tensor that is not there",
              !checkpoint_read(&c, "none", STATE_M, -1, SAFE_F32, 1, MODEL[0].shape, NULL, problem,
                               sizeof problem) && strstr(problem, "no 'none' (m)"));
    static const int64_t SHAPES[2][2] = { { ROWS, COLS + 1 }, { ROWS + 1, COLS } };
    for (int i = 0; i < 2; i++)
        test_true("another shape",
                  !checkpoint_read(&c, MODEL[1].name, STATE_M, -1, SAFE_F32, 2, SHAPES[i], NULL,
                                   problem, sizeof problem) &&
                      strstr(problem, "has shape (7, 5), the flags ask for ("));
    test_true("another type",
              !checkpoint_read(&c, MODEL[1].name, STATE_M, -1, SAFE_BF16, 2, MODEL[1].shape, NULL,
                               problem, sizeof problem) &&
                  strstr(problem, "is F32, expected BF16"));
    checkpoint_close(&c);
}

// The weights are a file by itself, for --load and for other programs.
static void check_weights_file(const TestRun* run, int64_t step) {
    SafeFile f;
    char path[600];
    path_of(path, sizeof path, run->out, step, "model.safetensors");
    safetensors_open(&f, path);
    test_true("weights: names alone", f.count == TENSORS && safetensors_find(&f, MODEL[1].name));
    const SafeTensor* t = safetensors_find(&f, MODEL[2].name);
    test_true("weights: logical shapes",
              t && t->dims == 2 && t->shape[0] == TALL && t->shape[1] == WIDE);
    test_true("weights: metadata", strcmp(safetensors_metadata(&f, "flags"), FLAGS) == 0 &&
                                       atoi(safetensors_metadata(&f, "step")) == step &&
                                       safetensors_metadata(&f, "tokenizer_hash"));
    safetensors_close(&f);
}

static void test_round_trip(void) {
    static TestRun run;
    for (int world = 1; world <= RANKS_MOST; world++) {
        char name[32];
        snprintf(name, sizeof name, "trip%d", world);
        run_open(&run, out_path(name), world, 2, 0);
        run.tensors = TENSORS;
        run.halves = world == 2;
        run.waiting = world != 1;
        Checkpoint none;
        char report[64] = "?";
        test_true("nothing to go on from, and nothing to report",
                  !checkpoint_newest(&none, run.out, report, sizeof report) && !report[0]);
        test_true("saves", save_ok(&run, 20));
        test_true("reads back", newest_is(&run, 20));
        test_true("bytes and seconds", run.ranks[0].saver.bytes > 2 * TALL * WIDE * 4 &&
                                           run.ranks[0].saver.seconds > 0);
        check_info(&run, 20);
        check_weights_file(&run, 20);
        names_are("no part is left", run.out, "20");
        test_true("saves once more", save_ok(&run, 21) && newest_is(&run, 21));
        run_close(&run);
    }
}

// Gradients that two ranks hold in part: what lies in both is added, what lies in one is copied.
static void test_partial_gradients(void) {
    static TestRun run;
    char problem[512] = "", error[2048];
    run_open(&run, out_path("partial"), 2, 1, 0);
    CheckpointInfo info = make_info(&run, 5);
    float first[4] = { 1, 2, 3, 4 }, second[4] = { 10, 20, 30, 40 }, got[6];
    float want[6] = { 1, 2, 13, 24, 30, 40 };
    for (int r = 0; r < 2; r++) {
        const float* data = r ? second : first;
        StatePart p = { "g", STATE_GRAD, SAFE_F32, 1, { 6, 0 }, false, 2 * r, 4, data };
        saver_begin(&run.ranks[r].saver, &info, &p, 1);
    }
    for (int r = 0; r < 2; r++) saver_wait(&run.ranks[r].saver);
    for (int r = 0; r < 2; r++) saver_commit(&run.ranks[r].saver);
    saver_wait(&run.ranks[0].saver);
    snprintf(error, sizeof error, "%s", saver_error(&run.ranks[0].saver));
    if (!test_true("saved", saver_status(&run.ranks[0].saver) == SAVER_IDLE))
        printf("      %s\n", error);
    Checkpoint c;
    char path[600];
    int64_t shape[2] = { 6, 0 };
    path_of(path, sizeof path, run.out, 5, NULL);
    if (test_true("opens without every byte",
                  checkpoint_try_open(&c, path, false, problem, sizeof problem))) {
        memset(got, 0xff, sizeof got);
        test_true("reads", checkpoint_read(&c, "g", STATE_GRAD, -1, SAFE_F32, 1, shape, got,
                                           problem, sizeof problem));
        test_same_bits("the sum of runs", got, want, sizeof want);
        test_true("a rank has but a part",
                  !checkpoint_read(&c, "g", STATE_GRAD, 1, SAFE_F32, 1, shape, got, problem,
                                   sizeof problem) &&
                      strstr(problem, "rank 1 has 4 elements of 6"));
        test_true("no such rank", !checkpoint_read(&c, "g", STATE_GRAD, 2, SAFE_F32, 1, shape, got,
                                                   problem, sizeof problem));
        checkpoint_close(&c);
    } else {
        printf("      %s\n", problem);
    }
    // What the light form leaves to the reading is looked at there.
    FILE* file = NULL;
    path_of(path, sizeof path, run.out, 5, "state.rank1.safetensors");
    file = fopen(path, "r+b");
    fseek(file, -1, SEEK_END);
    int last = fgetc(file);
    fseek(file, -1, SEEK_END);
    fputc(last ^ 1, file);
    fclose(file);
    path_of(path, sizeof path, run.out, 5, NULL);
    test_true("a flipped bit: refused",
              !checkpoint_open(&c, path, problem, sizeof problem) &&
                  strstr(problem, "state.rank1.safetensors: 'g' (grad) has crc32"));
    if (test_true("a flipped bit: headers are fine",
                  checkpoint_try_open(&c, path, false, problem, sizeof problem))) {
        test_true("a flipped bit: not read",
                  !checkpoint_read(&c, "g", STATE_GRAD, -1, SAFE_F32, 1, shape, got, problem,
                                   sizeof problem) && strstr(problem, "damaged"));
        checkpoint_close(&c);
    }
    run_close(&run);
}

static void test_keep(void) {
    static TestRun run;
    int64_t steps[3];
    char path[600], report[1024];
    run_open(&run, out_path("keep"), 2, 2, 30);
    for (int64_t step = 10; step <= 70; step += 10) test_true("saves", save_ok(&run, step));
    names_are("two of the newest, and every 30", run.out, "30 60 70");
    test_true("list: newest first", checkpoint_list(run.out, steps, 3) == 3 && steps[0] == 70 &&
                                        steps[1] == 60 && steps[2] == 30);
    test_true("list: as many as asked for",
              checkpoint_list(run.out, steps, 1) == 1 && steps[0] == 70);
    test_true("list: no run there", checkpoint_list(test_path("none"), steps, 3) == 0);
    // The same step again, with other values: the old one is replaced.
    run.halves = true;
    test_true("saves the same step", save_ok(&run, 70) && newest_is(&run, 70));
    names_are("replaced", run.out, "30 60 70");
    // Back to 60 and on: what was ahead is no part of this course.
    test_true("saves an earlier step", save_ok(&run, 65) && newest_is(&run, 65));
    names_are("a later step loses its name", run.out, "30 60 65 70.left");
    path_of(path, sizeof path, run.out, 60, NULL);
    char other[600];
    path_of(other, sizeof other, run.out, 900, NULL);
    rename(path, other);
    Checkpoint c;
    test_true("under another step's name: refused",
              checkpoint_newest(&c, run.out, report, sizeof report) && c.info.step == 65 &&
                  strstr(report, "step_000900: its manifest is of step 60"));
    checkpoint_close(&c);
    test_true("a directory that is no checkpoint: refused",
              !checkpoint_open(&c, run.out, report, sizeof report) &&
                  strstr(report, "manifest.json cannot be opened: No such file"));
    run_close(&run);
}

// What a killed run may leave behind, one of each kind.
static void test_sweep(void) {
    static TestRun run;
    const char* out = out_path("sweep");
    char from[600], to[600];
    run_open(&run, out, 1, 9, 0);
    for (int64_t step = 10; step <= 40; step += 10) test_true("saves", save_ok(&run, step));
    run_close(&run);
    static const struct { int64_t step; const char* name; } KILLED[] = {
        { 10, ".step_000010.aside" }, { 20, ".step_000050.aside" }, { 30, ".step_000030.old" }
    };
    for (int i = 0; i < 3; i++) {
        path_of(from, sizeof from, out, KILLED[i].step, NULL);
        snprintf(to, sizeof to, "%s/checkpoints/%s", out, KILLED[i].name);
        rename(from, to);
    }
    // 50 was replaced and 20 was what stood there; 10 was put aside and nothing came in its place.
    path_of(from, sizeof from, out, 50, NULL);
    mkdir(from, 0777);
    snprintf(to, sizeof to, "%s/checkpoints/.step_000060.tmp", out);
    mkdir(to, 0777);
    snprintf(to, sizeof to, "%s/checkpoints/.step_000060.tmp/state.rank0.safetensors", out);
    test_write_file(to, "half", 4);
    snprintf(to, sizeof to, "%s/checkpoints/step_7", out);
    mkdir(to, 0777);
    Saver other;
    saver_open(&other, out, 1, 2, 9, 0);
    names_are("other ranks touch nothing", out, "40 50 7 10.aside 30.old 50.aside 60.tmp");
    saver_close(&other);
    run_open(&run, out, 1, 9, 0);
    names_are("swept; one has its name back", out, "10 40 50 7");
    rmdir(from);
    test_true("the newest", newest_is(&run, 40));
    int64_t steps[4];
    test_true("a name of another form is none", checkpoint_list(out, steps, 4) == 2);
    // A part of an attempt that nobody removed is written over.
    path_of(from, sizeof from, out, 40, NULL);
    snprintf(to, sizeof to, "%s/checkpoints/.step_000041.tmp", out);
    rename(from, to);
    test_true("saves over a part", save_ok(&run, 41) && newest_is(&run, 41));
    run_close(&run);
}

// What did not reach the disk is not saved: the fsync and close of each file that was filled
// (weights, two states, manifest), of its directory and of the one around it. Each fails in turn.
static void test_not_on_disk(void) {
    static TestRun run;
    static const FaultCall CALLS[2] = { FAULT_FSYNC, FAULT_CLOSE };
    char error[2048];
    run_open(&run, out_path("unsynced"), 2, 9, 0);
    test_true("saves", save_ok(&run, 10));
    for (int c = 0; c < 2; c++) {
        int saved = 0, refused = 0, unexplained = 0;
        for (long at = 1;; at++) {
            FaultPlan plan;
            memset(&plan, 0, sizeof plan);
            plan.under = "unsynced/checkpoints";
            plan.kinds = 1 << CALLS[c];
            plan.at = at;
            plan.times = 1;
            plan.error = EIO;
            fault_start(plan);
            bool ok = run_save(&run, 20, error, sizeof error);
            bool hit = fault_hits > 0;
            fault_stop();
            if (!hit) break;
            saved += ok;
            refused += !ok;
            unexplained += !ok && !strstr(error, "Input/output error (errno 5)");
        }
        // What is only read is closed as well, and that may fail.
        test_true(c ? "close: six refused" : "fsync: six refused", refused == 6);
        test_true("each with the reason", unexplained == 0);
        test_true("no more than that is synchronized", c || saved == 0);
    }
    test_true("saves in the end", save_ok(&run, 30) && newest_is(&run, 30));
    run_close(&run);
}

// Ranks fail one at a time; all give up, and the next save is none the worse.
static void test_given_up(void) {
    static TestRun run;
    const char* out = out_path("given_up");
    char error[2048], path[600];
    run_open(&run, out, 2, 2, 0);
    test_true("saves", save_ok(&run, 10));
    snprintf(path, sizeof path, "%s/checkpoints/.step_000020.tmp", out);
    test_write_file(path, "a file", 6);
    test_true("a file where the directory should be", !run_save(&run, 20, error, sizeof error));
    test_true("the message has path, reason, number and sizes",
              strstr(error, ".step_000020.tmp/") && strstr(error, "Not a directory (errno 20)") &&
                  strstr(error, "\nit takes ") && strstr(error, " bytes, its disk has ") &&
                  error[strlen(error) - 1] != '\n');
    unlink(path);
    names_are("nothing is left of it", out, "10");
    test_true("the earlier one is untouched", newest_is(&run, 10));
    test_true("the next save works", save_ok(&run, 20) && newest_is(&run, 20));
    // A limit stops the larger file of the two ranks'.
    struct rlimit unlimited, limit;
    getrlimit(RLIMIT_FSIZE, &unlimited);
    limit = unlimited;
    limit.rlim_cur = 3000;
    setrlimit(RLIMIT_FSIZE, &limit);
    bool saved = run_save(&run, 30, error, sizeof error);
    setrlimit(RLIMIT_FSIZE, &unlimited);
    test_true("a file that may not be so large",
              !saved && strstr(error, "cannot be written: File too large"));
    names_are("nothing is left of it", out, "10 20");
    // A run whose directory has gone.
    rename(out, test_path("moved"));
    test_true("a directory that has gone", !run_save(&run, 30, error, sizeof error));
    test_true("says so", strstr(error, "given_up/checkpoints cannot be created: No such file"));
    rename(test_path("moved"), out);
    test_true("and is there again", save_ok(&run, 30) && newest_is(&run, 30));
    run_close(&run);
}

#include "cases_checkpoint.h"

int main(int argc, char** argv) {
    program_name = "test_checkpoint";
    if (argc == 3 && strcmp(argv[1], "newest") == 0) return checkpoint_newest_main(argv[2]);
    test_init(argc, argv);
    // Thousands of small files: in memory, if there is a place for them.
    const char* base = getenv("TMPDIR");
    if (!base) base = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
    snprintf(test_folder, sizeof test_folder, "%s/test_checkpoint.XXXXXX", base);
    REQUIRE(mkdtemp(test_folder), "%s cannot be created: %s", test_folder, strerror(errno));
    if (test_group("round trip")) test_round_trip();
    if (test_group("round trip: parts")) test_partial_gradients();
    if (test_group("round trip: keep")) test_keep();
    if (test_group("round trip: sweep")) test_sweep();
    if (test_group("round trip: not on the disk")) test_not_on_disk();
    if (test_group("round trip: given up")) test_given_up();
    if (test_group("faults: saving")) test_save_faults();
    if (test_group("faults: a file")) test_file_faults();
    if (test_group("faults: vanished")) test_vanished();
    if (test_group("faults: reading")) test_read_faults();
    if (test_group("versions")) test_versions();
    if (test_group("mutations")) test_mutations();
    char command[600];
    snprintf(command, sizeof command, "rm -rf '%s'", test_folder);
    if (system(command) != 0) fprintf(stderr, "%s is left behind\n", test_folder);
    return test_summary();
}
