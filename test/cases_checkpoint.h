/*
Checkpoints under bad luck: every call on files that fails, mutated files, and files that are whole
but not what they should be. Part of test/test_checkpoint.c, for a model small enough to be saved
thousands of times; the calls fail by test/faulty_files.c.
*/
#pragma once

// Every call fails where no sanitizer slows that down. The thread sanitizer looks at few: here one
// thread works at a time, the round trip has several.
#if defined(__SANITIZE_THREAD__)
enum { CALLS_APART = 16, MUTATIONS = 120 };
#elif defined(__SANITIZE_ADDRESS__)
enum { CALLS_APART = 3, MUTATIONS = 5000 };
#else
enum { CALLS_APART = 1, MUTATIONS = 5000 };
#endif

// ---- a checkpoint of two ranks -------------------------------------------------------------

// A table that both ranks own a part of, a vector of rank 0, a matrix of rank 1.
enum { SMALL_ROWS = 6, SMALL_COLS = 5, SMALL_TABLE = SMALL_ROWS * SMALL_COLS, SMALL_CUT = 17,
       SMALL_VECTOR = 7, SMALL_MATRIX = 12, SMALL_TENSORS = 3, SMALL_RANKS = 2, SMALL_PARTS = 16 };

typedef struct SmallTensor {
    const char* name;
    int dims;
    int64_t shape[2], count;
    int64_t from[SMALL_RANKS], to[SMALL_RANKS];      // what each rank owns of it
} SmallTensor;

static const SmallTensor SMALL[SMALL_TENSORS] = {
    { "table", 2, { SMALL_ROWS, SMALL_COLS }, SMALL_TABLE, { 0, SMALL_CUT },
      { SMALL_CUT, SMALL_TABLE } },
    { "vector", 1, { SMALL_VECTOR, 0 }, SMALL_VECTOR, { 0, 0 }, { SMALL_VECTOR, 0 } },
    { "matrix", 2, { 4, 3 }, SMALL_MATRIX, { 0, 0 }, { 0, SMALL_MATRIX } },
};

typedef struct Small {
    Saver savers[SMALL_RANKS];
    float values[SMALL_RANKS][SMALL_PARTS][SMALL_TABLE];
    StatePart parts[SMALL_RANKS][SMALL_PARTS];
} Small;

// Adam's gradients wait for the table and the vector, on all ranks.
static bool small_has(int tensor, StateKind kind) {
    return kind != STATE_GRAD || tensor != 2;
}

// No two values are equal. `rank` matters to gradients alone.
static float small_value(int64_t step, int tensor, StateKind kind, int rank, int64_t i) {
    int own = kind == STATE_GRAD ? rank : 0;
    uint64_t seed = (uint64_t)(step * 1000 + tensor * 100 + kind * 10 + own);
    return (float)test_normal(seed, (uint64_t)i);
}

static int small_fill(Small* s, int64_t step, int rank) {
    int count = 0;
    for (int kind = 0; kind < STATE_KINDS; kind++) {
        for (int i = 0; i < SMALL_TENSORS; i++) {
            StateKind k = (StateKind)kind;
            const SmallTensor* t = &SMALL[i];
            bool whole = k == STATE_WEIGHT || k == STATE_GRAD;
            int64_t from = whole ? 0 : t->from[rank], to = whole ? t->count : t->to[rank];
            if (!small_has(i, k) || from == to || (k == STATE_WEIGHT && rank > 0)) continue;
            float* values = s->values[rank][count];
            for (int64_t e = from; e < to; e++) values[e - from] = small_value(step, i, k, rank, e);
            StatePart* p = &s->parts[rank][count++];
            memset(p, 0, sizeof *p);
            p->name = t->name;
            p->kind = k;
            p->type = SAFE_F32;
            p->dims = t->dims;
            memcpy(p->shape, t->shape, sizeof p->shape);
            p->offset = from;
            p->count = to - from;
            p->data = values;
        }
    }
    return count;
}

static void small_open(Small* s, const char* out, int64_t keep) {
    for (int r = 0; r < SMALL_RANKS; r++) saver_open(&s->savers[r], out, r, SMALL_RANKS, keep, 0);
}

static void small_close(Small* s) {
    for (int r = 0; r < SMALL_RANKS; r++) saver_close(&s->savers[r]);
}

// One thread at a time, so that the k-th call is always the same. `between`, if not NULL, is called
// when all have written.
static bool small_save(Small* s, int64_t step, void (*between)(void), char* error, size_t size) {
    static TestRun two;         // for its info
    two.world = SMALL_RANKS;
    CheckpointInfo info = make_info(&two, step);
    for (int i = 0; i < WINDOW; i++) info.loss.x[i] = 3.5;      // is written and read in no time
    bool ok = true;
    error[0] = 0;
    for (int r = SMALL_RANKS - 1; r >= 0; r--) {
        saver_begin(&s->savers[r], &info, s->parts[r], small_fill(s, step, r));
        saver_wait(&s->savers[r]);
        if (saver_status(&s->savers[r]) == SAVER_WRITTEN) continue;
        if (ok) snprintf(error, size, "%s", saver_error(&s->savers[r]));
        ok = false;
    }
    if (ok && between) between();
    for (int r = SMALL_RANKS - 1; r >= 0 && ok; r--) saver_commit(&s->savers[r]);
    saver_wait(&s->savers[0]);
    if (ok && saver_status(&s->savers[0]) == SAVER_FAILED) {
        snprintf(error, size, "%s", saver_error(&s->savers[0]));
        ok = false;
    }
    for (int r = SMALL_RANKS - 1; r >= 0 && !ok; r--) saver_abandon(&s->savers[r]);
    return ok;
}

// Whether everything that can be read of it is what step `step` saved; -1: something was refused,
// in words.
static int small_matches(Checkpoint* c, int64_t step, char* problem, size_t size) {
    float got[SMALL_TABLE];
    bool same = c->info.ranks == SMALL_RANKS && c->info.step == step;
    for (int i = 0; i < SMALL_TENSORS; i++) {
        const SmallTensor* t = &SMALL[i];
        for (int kind = 0; kind < STATE_KINDS; kind++) {
            StateKind k = (StateKind)kind;
            int ranks = k == STATE_GRAD ? SMALL_RANKS : 0;
            for (int rank = -1; rank < ranks && small_has(i, k); rank++) {
                memset(got, 0x7f, sizeof got);
                if (!checkpoint_read(c, t->name, k, rank, SAFE_F32, t->dims, t->shape, got, problem,
                                     size)) return -1;
                for (int64_t e = 0; e < t->count; e++) {
                    float want = small_value(step, i, k, rank > 0, e);
                    if (k == STATE_GRAD && rank < 0) want += small_value(step, i, k, 1, e);
                    same = same && memcmp(&got[e], &want, sizeof want) == 0;
                }
            }
        }
    }
    return same;
}

// ---- directories in memory -----------------------------------------------------------------

enum { IMAGE_FILES = 4 };       // manifest, weights, two states

typedef struct ImageFile {
    char name[64];
    unsigned char* bytes;
    size_t n;
} ImageFile;

typedef struct Image {
    ImageFile files[IMAGE_FILES];       // [0]: the manifest
} Image;

static unsigned char* image_bytes(const char* path, size_t* n) {
    FILE* file = fopen(path, "rb");
    REQUIRE(file, "%s: %s", path, strerror(errno));
    fseek(file, 0, SEEK_END);
    *n = (size_t)ftell(file);
    rewind(file);
    unsigned char* bytes = (unsigned char*)test_calloc(*n + 1, 1);
    REQUIRE(fread(bytes, 1, *n, file) == *n, "%s: cannot be read", path);
    fclose(file);
    return bytes;
}

static void image_read(Image* image, const char* directory) {
    static const char* const NAMES[IMAGE_FILES] = {
        "manifest.json", "model.safetensors", "state.rank0.safetensors", "state.rank1.safetensors"
    };
    for (int i = 0; i < IMAGE_FILES; i++) {
        char path[2048];
        ImageFile* f = &image->files[i];
        snprintf(f->name, sizeof f->name, "%s", NAMES[i]);
        snprintf(path, sizeof path, "%s/%s", directory, f->name);
        f->bytes = image_bytes(path, &f->n);
    }
}

static void image_write(const Image* image, const char* directory) {
    mkdir(directory, 0777);
    for (int i = 0; i < IMAGE_FILES; i++) {
        char path[2048];
        snprintf(path, sizeof path, "%s/%s", directory, image->files[i].name);
        if (image->files[i].bytes) test_write_file(path, image->files[i].bytes, image->files[i].n);
        else unlink(path);
    }
}

static void image_copy(Image* to, const Image* from) {
    *to = *from;
    for (int i = 0; i < IMAGE_FILES; i++) {
        const ImageFile* f = &from->files[i];
        to->files[i].bytes = (unsigned char*)test_calloc(f->n + 1, 1);
        memcpy(to->files[i].bytes, f->bytes, f->n);
    }
}

static void image_free(Image* image) {
    for (int i = 0; i < IMAGE_FILES; i++) free(image->files[i].bytes);
}

static void image_drop(Image* image, int file) {
    free(image->files[file].bytes);
    image->files[file].bytes = NULL;
    image->files[file].n = 0;
}

// `n` bytes at `at` make room for `m` others.
static void image_splice(ImageFile* f, size_t at, size_t n, const void* bytes, size_t m) {
    unsigned char* whole = (unsigned char*)test_calloc(f->n - n + m + 1, 1);
    memcpy(whole, f->bytes, at);
    memcpy(whole + at, bytes, m);
    memcpy(whole + at + m, f->bytes + at + n, f->n - at - n);
    free(f->bytes);
    f->bytes = whole;
    f->n = f->n - n + m;
}

// The first `from` behind the first `after` in the manifest becomes `to`.
static void image_edit(Image* image, const char* after, const char* from, const char* to) {
    ImageFile* f = &image->files[0];
    const char* text = (const char*)f->bytes;
    const char* start = strstr(text, after);
    const char* at = start ? strstr(start, from) : NULL;
    REQUIRE(at, "the test's edit finds no '%s' behind '%s'", from, after);
    image_splice(f, (size_t)(at - text), strlen(from), to, strlen(to));
}

// The manifest's crc32 is made right again, if there is a last line for it.
static void image_seal(Image* image) {
    ImageFile* f = &image->files[0];
    if (f->n < CHECKPOINT_LAST_BYTES) return;
    char line[CHECKPOINT_LAST_BYTES + 1];
    size_t n = f->n - CHECKPOINT_LAST_BYTES;
    snprintf(line, sizeof line, CHECKPOINT_LAST_LINE, (unsigned)crc32(0, f->bytes, (uInt)n));
    memcpy(f->bytes + n, line, CHECKPOINT_LAST_BYTES);
}

// The manifest says of a file's size and header what they are now.
static void image_describe(Image* image, int file) {
    const ImageFile* f = &image->files[file];
    uint64_t header = 0;
    if (f->n >= 8) memcpy(&header, f->bytes, 8);
    if (f->n < 8 || header > f->n - 8) header = f->n - 8;
    char line[160], start[100];
    snprintf(start, sizeof start, "{\"name\":\"%s\",\"bytes\":", f->name);
    snprintf(line, sizeof line, "%s%zu,\"header_crc32\":\"%08x\"}", start, f->n,
             (unsigned)crc32(0, f->bytes, (uInt)(8 + header)));
    const char* text = (const char*)image->files[0].bytes;
    const char* at = strstr(text, start);
    const char* end = at ? strchr(at, '}') : NULL;
    REQUIRE(end, "the manifest's line of %s is not as the test knows it", f->name);
    image_splice(&image->files[0], (size_t)(at - text), (size_t)(end + 1 - at), line, strlen(line));
    image_seal(image);
}

static void small_clear(const char* path) {
    char inner[2048];
    DIR* folder = opendir(path);
    if (!folder) {
        unlink(path);
        return;
    }
    for (struct dirent* entry; (entry = readdir(folder));) {
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
        snprintf(inner, sizeof inner, "%s/%s", path, entry->d_name);
        if (unlink(inner) != 0) small_clear(inner);
    }
    closedir(folder);
    rmdir(path);
}

// What in OUT/checkpoints has another name than a checkpoint's.
static int small_leftovers(const char* out) {
    char path[1024];
    int count = 0;
    snprintf(path, sizeof path, "%s/checkpoints", out);
    DIR* folder = opendir(path);
    if (!folder) return 0;
    for (struct dirent* entry; (entry = readdir(folder));)
        count += strncmp(entry->d_name, ".step_", 6) == 0;
    closedir(folder);
    return count;
}

// A run that has images[i] as its checkpoint of step 10 (i + 1).
static void small_run(const char* out, const Image* images, int count) {
    char path[1024];
    small_clear(out);
    mkdir(out, 0777);
    snprintf(path, sizeof path, "%s/checkpoints", out);
    mkdir(path, 0777);
    for (int i = 0; i < count; i++) {
        checkpoint_path(path, sizeof path, out, 10 * (i + 1));
        image_write(&images[i], path);
    }
}

static void small_images(Image* images, int count) {
    static Small s;
    char out[512], path[1024], error[2048];
    snprintf(out, sizeof out, "%s", test_path("images"));
    small_run(out, NULL, 0);
    small_open(&s, out, 9);
    for (int i = 0; i < count; i++) {
        REQUIRE(small_save(&s, 10 * (i + 1), NULL, error, sizeof error), "%s", error);
        checkpoint_path(path, sizeof path, out, 10 * (i + 1));
        image_read(&images[i], path);
    }
    small_close(&s);
    small_clear(out);
}

// ---- faults: saving ------------------------------------------------------------------------

typedef struct Fault {
    int error;
    long times;                 // 0: from there on
} Fault;

// From here on calls below `out` fail by the plan; k 0: none does. None of them waits for the disk.
static void fault_from(const char* out, long k, Fault fault) {
    FaultPlan plan = { out, FAULT_ALL, k, fault.times, fault.error, 0, true };
    fault_start(plan);
}

static const char* fault_text(char* text, size_t size, const char* out, long k, Fault fault) {
    const char* path = fault_hit_path + (strstr(fault_hit_path, out) ? strlen(out) : 0);
    snprintf(text, size, "%s%s at call %ld (%s of %s)", fault_error_text(fault.error),
             fault.times ? "" : " for good", k, FAULT_CALL_NAME[fault_hit], path);
    return text;
}

// The step of the newest. Everything that has a checkpoint's name must be whole and be what was
// saved; else -1, in words.
static int64_t small_newest(const char* out, char* problem, size_t size) {
    Checkpoint c;
    int64_t steps[8];
    char path[1024];
    int count = checkpoint_list(out, steps, 8);
    bool good = checkpoint_newest(&c, out, problem, size) && !problem[0] && c.info.step == steps[0];
    for (int i = 0; i < count && good; i++) {
        checkpoint_close(&c);
        checkpoint_path(path, sizeof path, out, steps[i]);
        good = checkpoint_open(&c, path, problem, size) &&
               small_matches(&c, steps[i], problem, size) == 1;
    }
    checkpoint_close(&c);
    return good && count > 0 ? steps[0] : -1;
}

// Calls that are made again when they are interrupted, or have done a part.
static bool fault_is_nothing(Fault fault) {
    bool again = fault_hit == FAULT_OPEN || fault_hit == FAULT_WRITE || fault_hit == FAULT_READ ||
                 fault_hit == FAULT_FSYNC || fault_hit == FAULT_CLOSE;
    return fault_hits == 0 || fault.error == FAULT_SHORT || (fault.error == EINTR && again);
}

// Calls without which nothing is saved: those on what is being written, until it has its name and
// that is on the disk too. What is done to the checkpoint of step 10 afterwards is none of these.
static bool fault_is_fatal(const char* out, Fault fault) {
    char folder[600];
    snprintf(folder, sizeof folder, "%s/checkpoints", out);
    bool part = strstr(fault_hit_path, ".tmp") || strcmp(fault_hit_path, folder) == 0;
    return part && fault.error > 0 && fault.error != EINTR &&
           (fault_hit == FAULT_OPEN || fault_hit == FAULT_WRITE || fault_hit == FAULT_READ ||
            fault_hit == FAULT_FSYNC || fault_hit == FAULT_MKDIR || fault_hit == FAULT_RENAME);
}

static bool fault_is_removal(void) {
    return fault_hit == FAULT_UNLINK || fault_hit == FAULT_RMDIR || fault_hit == FAULT_OPENDIR ||
           fault_hit == FAULT_READDIR;
}

// A save of step 20, whose k-th call fails, over a checkpoint of step 10.
static void fault_trial(const char* out, const Image* base, int64_t keep, long k, Fault fault) {
    static Small s;
    char error[2048], problem[2048], what[700];
    small_run(out, base, 1);
    small_open(&s, out, keep);
    fault_from(out, k, fault);
    bool saved = small_save(&s, 20, NULL, error, sizeof error);
    bool nothing = fault_is_nothing(fault), fatal = fault_is_fatal(out, fault);
    bool cleared = fault.times == 1 && !fault_is_removal();
    bool zero = fault.error == FAULT_ZERO && fault_hit == FAULT_WRITE;
    fault_text(what, sizeof what, out, k, fault);
    fault_from(out, 0, fault);
    if (!test_true(what, !fatal || !saved)) printf("      it was saved all the same\n");
    if (!test_true(what, !cleared || small_leftovers(out) == 0))
        printf("      something is left behind\n");

    int64_t newest = small_newest(out, problem, sizeof problem);
    bool ok = newest == 20 || (!saved && newest == 10);
    if (!test_true(what, ok)) printf("      newest %" PRId64 ": %s\n", newest, problem);
    if (nothing) {
        ok = saved;
    } else if (!saved) {
        const char* reason = strerror(fault.error > 0 ? fault.error : ENOSPC);
        ok = strstr(error, out) && (strstr(error, reason) || (fault.error == FAULT_ZERO && !zero));
        ok = ok && (strstr(error, " was written, but: ") ||
                    (strstr(error, "it takes ") && strstr(error, " bytes, its disk has ")));
    }
    if (!test_true(what, ok)) printf("      saved %d: %s\n", saved, error);

    // The disk is well again: the same step, or the next. And nothing stays behind.
    int64_t next = k % 2 ? 20 : 30;
    ok = small_save(&s, next, NULL, error, sizeof error) &&
         small_newest(out, problem, sizeof problem) == next;
    if (!test_true(what, ok)) printf("      next save: %s %s\n", error, problem);
    small_close(&s);
    small_open(&s, out, keep);
    small_close(&s);
    if (!test_true(what, small_leftovers(out) == 0)) printf("      something is left behind\n");
    fault_stop();
}

// Each call fails by each error, with one or the other --keep; 1: the checkpoint of step 10 goes.
static void test_save_faults(void) {
    static const struct { Fault fault; int64_t keep; } CASES[] = {
        { { ENOSPC, 1 }, 1 }, { { EINTR, 1 }, 1 }, { { EIO, 0 }, 1 }, { { FAULT_SHORT, 1 }, 1 },
        { { EIO, 1 }, 2 }, { { EDQUOT, 1 }, 2 }, { { EROFS, 1 }, 2 }, { { EROFS, 0 }, 2 },
        { { FAULT_ZERO, 1 }, 2 }, { { FAULT_FULL, 0 }, 2 },
    };
    enum { MOST = 400 };
    static Small s;
    static FaultCall kinds[MOST];
    Image base;
    char out[512], error[2048], what[80];
    snprintf(out, sizeof out, "%s", test_path("faults"));
    small_images(&base, 1);
    for (int64_t keep = 1; keep <= 2; keep++) {
        small_run(out, &base, 1);
        small_open(&s, out, keep);
        fault_kinds = kinds;
        fault_kinds_room = MOST;
        fault_from(out, 0, CASES[0].fault);
        bool saved = small_save(&s, 20, NULL, error, sizeof error);
        long calls = fault_calls;
        fault_stop();
        fault_kinds = NULL;
        small_close(&s);
        snprintf(what, sizeof what, "a save makes many calls (%ld)", calls);
        test_true(what, saved && calls > 60 && calls < MOST);
        for (long k = 1; k <= calls; k += CALLS_APART) {
            bool moves = kinds[k - 1] == FAULT_WRITE || kinds[k - 1] == FAULT_READ;
            for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
                if (CASES[i].keep == keep && (CASES[i].fault.error > 0 || moves))
                    fault_trial(out, &base, keep, k, CASES[i].fault);
            }
        }
    }
    image_free(&base);
    small_clear(out);
}

// ---- faults: a file by itself --------------------------------------------------------------

// safetensors_try_write_from over a file of before: it is the one or the other, and what went wrong
// is said.
static void test_file_faults(void) {
    static const Fault FAULTS[] = { { ENOSPC, 1 }, { EINTR, 1 }, { FAULT_SHORT, 1 },
                                    { FAULT_ZERO, 1 }, { FAULT_FULL, 0 }, { EIO, 0 } };
    static float before[300], after[300];
    SafeTensor tensor = { "x", SAFE_F32, 1, { 300 }, before, 0, 0 };
    char out[512], path[600], problem[1024], what[700];
    snprintf(out, sizeof out, "%s", test_path("file"));
    snprintf(path, sizeof path, "%s/model.safetensors", out);
    for (int i = 0; i < 300; i++) after[i] = before[i] + 1;
    long calls = 1;
    for (long k = 0; k <= calls; k++) {
        for (size_t i = 0; i < sizeof FAULTS / sizeof *FAULTS; i++) {
            small_clear(out);
            mkdir(out, 0777);
            tensor.data = before;
            safetensors_write(path, &tensor, 1, NULL, 0);
            tensor.data = after;
            fault_from(out, k, FAULTS[i]);
            bool saved = safetensors_try_write_from(path, &tensor, 1, NULL, 0, NULL, NULL, problem,
                                                    sizeof problem);
            if (k == 0) calls = fault_calls;
            bool nothing = fault_is_nothing(FAULTS[i]), named = fault_hit == FAULT_FSYNC ||
                           fault_hit == FAULT_CLOSE || fault_hit == FAULT_OPEN;
            fault_stop();
            fault_text(what, sizeof what, out, k, FAULTS[i]);
            SafeFile f;
            safetensors_open(&f, path);
            const float* x = (const float*)safetensors_data(&f, "x", SAFE_F32, 300);
            bool is_after = memcmp(x, after, sizeof after) == 0;
            bool is_before = memcmp(x, before, sizeof before) == 0;
            safetensors_close(&f);
            // Its name may be there and the directory not on the disk.
            test_true(what, saved ? is_after : is_before || (is_after && named));
            int number = FAULTS[i].error > 0 ? FAULTS[i].error : ENOSPC;
            bool ok = nothing ? saved : saved || strstr(problem, strerror(number));
            if (!test_true(what, ok)) printf("      saved %d: %s\n", saved, problem);
            glob_t left;
            char pattern[700];
            snprintf(pattern, sizeof pattern, "%s/*.part", out);
            bool none = glob(pattern, 0, NULL, &left) == GLOB_NOMATCH;
            if (!none) globfree(&left);
            test_true(what, none || FAULTS[i].times == 0);
        }
    }
    test_true("a file makes some calls", calls >= 9);
    small_clear(out);
}

// ---- faults: what is there goes away -------------------------------------------------------

static char vanish_out[512];

static const char* vanish_path(const char* name) {
    static char path[1024];
    snprintf(path, sizeof path, "%s/checkpoints/%s", vanish_out, name);
    return path;
}

static void vanish_part(void) {
    small_clear(vanish_path(".step_000020.tmp"));
}

static void vanish_folder(void) {
    small_clear(vanish_path(""));
}

static void vanish_out_itself(void) {
    small_clear(vanish_out);
}

static void vanish_rank(void) {
    unlink(vanish_path(".step_000020.tmp/state.rank1.safetensors"));
}

static void vanish_half_of_rank(void) {
    int cut = truncate(vanish_path(".step_000020.tmp/state.rank1.safetensors"), 600);
    (void)cut;
}

static void vanish_into_file(void) {
    small_clear(vanish_path(""));
    char path[1024];
    snprintf(path, sizeof path, "%s/checkpoints", vanish_out);
    test_write_file(path, "x", 1);
}

// Rank 1 has written something else: what it saved of step 10.
static void vanish_to_other(void) {
    size_t n;
    unsigned char* bytes = image_bytes(vanish_path("step_000010/state.rank1.safetensors"), &n);
    test_write_file(vanish_path(".step_000020.tmp/state.rank1.safetensors"), bytes, n);
    free(bytes);
}

static void vanish_to_garbage(void) {
    test_write_file(vanish_path(".step_000020.tmp/state.rank1.safetensors"), "not a tensor", 12);
}

static void test_vanished(void) {
    static const struct {
        const char* what;
        void (*happens)(void);
        const char* words[2];
        int64_t newest;             // -1: none is left
    } CASES[] = {
        { "the part that is being written goes away", vanish_part, { ".tmp", "No such file" }, 10 },
        { "OUT/checkpoints goes away", vanish_folder, { "checkpoints", "No such file" }, -1 },
        { "OUT goes away", vanish_out_itself, { "checkpoints", "No such file" }, -1 },
        { "OUT/checkpoints becomes a file", vanish_into_file, { "checkpoints", "Not a directory" },
          -1 },
        { "the file of rank 1 goes away", vanish_rank, { "state.rank1", "No such file" }, 10 },
        { "half of the file of rank 1", vanish_half_of_rank, { "state.rank1", "bytes" }, 10 },
        { "rank 1 has written another step", vanish_to_other,
          { "state.rank1", "rank 1 of 2 has to save step 20" }, 10 },
        { "rank 1 has written something else", vanish_to_garbage,
          { "state.rank1", "was written, but" }, 10 },
    };
    static Small s;
    Image base;
    char error[2048], problem[2048];
    snprintf(vanish_out, sizeof vanish_out, "%s", test_path("vanish"));
    small_images(&base, 1);
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        small_run(vanish_out, &base, 1);
        small_open(&s, vanish_out, 2);
        bool saved = small_save(&s, 20, CASES[i].happens, error, sizeof error);
        bool ok = !saved && strstr(error, CASES[i].words[0]) && strstr(error, CASES[i].words[1]);
        if (!test_true(CASES[i].what, ok)) printf("      %s\n", error);
        int64_t newest = small_newest(vanish_out, problem, sizeof problem);
        if (!test_true(CASES[i].what, newest == CASES[i].newest)) printf("      %s\n", problem);
        // And where the next save begins with that.
        if (CASES[i].newest < 0) {
            saved = small_save(&s, 30, NULL, error, sizeof error);
            ok = saved ? small_newest(vanish_out, problem, sizeof problem) == 30
                       : strstr(error, vanish_out) && strstr(error, "errno ");
            if (!test_true(CASES[i].what, ok)) printf("      %s\n", error);
        } else {
            test_true(CASES[i].what, small_save(&s, 20, NULL, error, sizeof error) &&
                      small_newest(vanish_out, problem, sizeof problem) == 20);
        }
        small_close(&s);
    }
    image_free(&base);
    small_clear(vanish_out);
}

// ---- faults: reading -----------------------------------------------------------------------

// Whatever call fails: the newest, or the one before and why, or none and why.
static void test_read_faults(void) {
    static const Fault FAULTS[] = { { EIO, 1 }, { EINTR, 1 }, { FAULT_SHORT, 1 }, { FAULT_ZERO, 1 },
                                    { EACCES, 1 }, { EIO, 0 } };
    Image images[2];
    Checkpoint c;
    char out[512], report[4096], problem[1024], what[700];
    snprintf(out, sizeof out, "%s", test_path("reading"));
    small_images(images, 2);
    small_run(out, images, 2);
    long calls = 1;
    for (long k = 0; k <= calls; k += CALLS_APART) {
        for (size_t i = 0; i < sizeof FAULTS / sizeof *FAULTS; i++) {
            problem[0] = 0;
            fault_from(out, k, FAULTS[i]);
            bool found = checkpoint_newest(&c, out, report, sizeof report);
            int64_t step = found ? c.info.step : -1;
            int same = found ? small_matches(&c, step, problem, sizeof problem) : -1;
            if (found) checkpoint_close(&c);
            if (k == 0) calls = fault_calls;
            bool nothing = fault_is_nothing(FAULTS[i]);
            fault_stop();
            fault_text(what, sizeof what, out, k, FAULTS[i]);
            bool ok;
            if (nothing) ok = step == 20 && same == 1 && !report[0];
            else if (!found) ok = strstr(report, out) && strlen(report) > strlen(out) + 20;
            else if (step == 10) ok = strstr(report, "step_000020: ") != NULL;
            else ok = !report[0];
            // What was not refused at first may be refused by the word for it when it is read.
            ok = ok && (!found || same == 1 || (same == -1 && problem[0]));
            if (!test_true(what, ok)) {
                printf("      step %" PRId64 ", same %d, report '%s', '%s'\n", step, same, report,
                       problem);
            }
        }
    }
    snprintf(what, sizeof what, "reading makes many calls (%ld)", calls);
    test_true(what, calls > 50);
    for (int i = 0; i < 2; i++) image_free(&images[i]);
    small_clear(out);
}

// ---- versions ------------------------------------------------------------------------------

static void version_no_rank(Image* image) { image_drop(image, 3); }
static void version_no_weights(Image* image) { image_drop(image, 1); }
static void version_no_manifest(Image* image) { image_drop(image, 0); }
static void version_half_manifest(Image* image) { image->files[0].n /= 2; }
static void version_empty_manifest(Image* image) { image->files[0].n = 0; }
static void version_half_rank(Image* image) { image->files[2].n /= 2; }
static void version_empty_rank(Image* image) { image->files[2].n = 0; }
static void version_one_byte_less(Image* image) { image->files[3].n--; }
static void version_one_byte_more(Image* image) {
    image_splice(&image->files[3], image->files[3].n, 0, "x", 1);
}
static void version_flipped_data(Image* image) {
    image->files[2].bytes[image->files[2].n - 5] ^= 4;
}
static void version_flipped_weight(Image* image) {
    image->files[1].bytes[image->files[1].n - 9] ^= 64;
}
static void version_flipped_manifest(Image* image) { image->files[0].bytes[200] ^= 1; }
static void version_text_behind(Image* image) {
    image_splice(&image->files[0], image->files[0].n, 0, "\n", 1);
}
static void version_swapped_ranks(Image* image) {
    ImageFile f = image->files[2];
    image->files[2] = image->files[3];
    image->files[3] = f;
    char name[64];
    memcpy(name, image->files[2].name, sizeof name);
    memcpy(image->files[2].name, image->files[3].name, sizeof name);
    memcpy(image->files[3].name, name, sizeof name);
}
// The line of the manifest that has `key`, again behind itself or not at all.
static void version_line(Image* image, const char* key, bool twice) {
    const char* text = (const char*)image->files[0].bytes;
    const char* at = strstr(text, key);
    REQUIRE(at, "the manifest has no '%s'", key);
    while (at > text && at[-1] != '\n') at--;
    size_t n = strcspn(at, "\n") + 1;
    char* line = (char*)test_calloc(n + 1, 1);
    memcpy(line, at, n);
    image_splice(&image->files[0], (size_t)(at - text), twice ? 0 : n, line, twice ? n : 0);
    free(line);
    image_seal(image);
}
static const char TABLE_M[] = "\"name\":\"table\",\"kind\":\"m\"";
static void version_twice(Image* image) { version_line(image, TABLE_M, true); }
static void version_without(Image* image) { version_line(image, TABLE_M, false); }
static void version_less(Image* image) {
    version_line(image, "\"name\":\"table\",\"kind\":\"grad\",\"file\":\"state.rank1", false);
}
static void version_member_twice(Image* image) { version_line(image, "\"tokens\":", true); }
static void version_no_member(Image* image) { version_line(image, "\"rng\":", false); }
static void version_deep(Image* image) {
    char deep[600];
    memset(deep, '[', 300);
    memset(deep + 300, ']', 299);
    deep[599] = 0;
    image_edit(image, "\"flags\":", "30", deep);
    image_seal(image);
}
static void version_header(Image* image) {      // and what the manifest says of the file fits
    ImageFile* f = &image->files[2];
    char* at = strstr((char*)f->bytes + 8, "\"table.v\":{\"dtype\":\"F32\"");
    REQUIRE(at, "the header of %s is not as the test knows it", f->name);
    memcpy(at + strlen("\"table.v\":{\"dtype\":\""), "I32", 3);
    image_describe(image, 2);
}

typedef struct Version {
    const char* what;
    const char *after, *from, *to;      // an edit of the manifest, which is then sealed again
    void (*change)(Image*);             // or this
    const char* words;
} Version;

#define SECOND_RUN "\"name\":\"table\",\"kind\":\"v\",\"file\":\"state.rank1"
static const Version VERSIONS[] = {
    { "a newer version", "", "\"version\":1", "\"version\":2", NULL,
      "version 2 of the format, this program knows version 1: a newer one saved it" },
    { "an older version", "", "\"version\":1", "\"version\":0", NULL, "version 0 of the format" },
    { "another format", "", "modded-llm.c checkpoint", "another checkpoint", NULL,
      "\"format\" is 'another checkpoint', expected 'modded-llm.c checkpoint'" },
    { "random numbers of another kind", "", "counter-based", "mersenne", NULL,
      "\"kind\" is 'mersenne'" },
    { "the file of a rank is missing", NULL, NULL, NULL, version_no_rank,
      "state.rank1.safetensors: cannot be opened: No such file" },
    { "the weights are missing", NULL, NULL, NULL, version_no_weights,
      "model.safetensors: cannot be opened: No such file" },
    { "no manifest", NULL, NULL, NULL, version_no_manifest,
      "manifest.json cannot be opened: No such file" },
    { "half a manifest", NULL, NULL, NULL, version_half_manifest,
      "manifest.json does not end with its crc32: it was cut short" },
    { "an empty manifest", NULL, NULL, NULL, version_empty_manifest, "manifest.json has 0 bytes" },
    { "text behind the manifest", NULL, NULL, NULL, version_text_behind,
      "does not end with its crc32" },
    { "a changed manifest", NULL, NULL, NULL, version_flipped_manifest, "manifest.json has crc32" },
    { "half of a file", NULL, NULL, NULL, version_half_rank, "state.rank0.safetensors: " },
    { "an empty file", NULL, NULL, NULL, version_empty_rank, "state.rank0.safetensors: " },
    { "a byte is missing", NULL, NULL, NULL, version_one_byte_less, "state.rank1.safetensors: " },
    { "a byte too many", NULL, NULL, NULL, version_one_byte_more, "state.rank1.safetensors: " },
    { "a bit of the state", NULL, NULL, NULL, version_flipped_data, "it was changed or damaged" },
    { "a bit of a weight", NULL, NULL, NULL, version_flipped_weight,
      "model.safetensors: 'matrix' (weight) has crc32" },
    { "the files of two ranks are swapped", NULL, NULL, NULL, version_swapped_ranks,
      "state.rank0.safetensors" },
    { "another size of a file", "", "\"bytes\":", "\"bytes\":1", NULL, "bytes, the manifest says" },
    { "more ranks", "", "\"ranks\":2", "\"ranks\":3", NULL,
      "3 ranks and 3 files do not go together" },
    { "no ranks", "", "\"ranks\":2", "\"ranks\":-2", NULL, "\"ranks\" is -2, expected 0 to" },
    { "a negative step", "", "\"step\":20", "\"step\":-20", NULL, "step -20" },
    { "a tensor twice", NULL, NULL, NULL, version_twice,
      "'table' (m) is in state.rank0.safetensors twice" },
    { "a tensor less", NULL, NULL, NULL, version_without,
      "'table' (m): the run in state.rank1.safetensors starts at element 17, what comes before "
      "it ends at 0" },
    { "a partial sum less", NULL, NULL, NULL, version_less,
      "state.rank1.safetensors holds 8 tensors, the manifest has 7 of it" },
    { "a gap", SECOND_RUN, "\"offset\":17,\"count\":13", "\"offset\":18,\"count\":12", NULL,
      "starts at element 18, what comes before it ends at 17" },
    { "an overlap", SECOND_RUN, "\"offset\":17,\"count\":13", "\"offset\":16,\"count\":14", NULL,
      "starts at element 16, what comes before it ends at 17" },
    { "an end that is missing", SECOND_RUN, "\"count\":13", "\"count\":12", NULL,
      "its files hold 29 elements of 30" },
    { "a run beyond the end", SECOND_RUN, "\"count\":13", "\"count\":14", NULL,
      "14 elements from 17 on do not lie in its 30" },
    { "a run of nothing", SECOND_RUN, "\"count\":13", "\"count\":0", NULL,
      "0 elements from 17 on do not lie in its 30" },
    { "a run before the start", SECOND_RUN, "\"offset\":17", "\"offset\":-1", NULL,
      "13 elements from -1 on" },
    { "a run whose end overflows", SECOND_RUN, "\"offset\":17", "\"offset\":9223372036854775807",
      NULL, "do not lie in its 30" },
    { "two shapes of a tensor", SECOND_RUN, "[6,5]", "[5,6]", NULL,
      "'table' (v) has another shape or dtype in state.rank1.safetensors than in state.rank0" },
    { "two dtypes of a tensor", SECOND_RUN, "F32", "BF16", NULL,
      "'table' (v) has another shape or dtype" },
    { "a shape without an end", SECOND_RUN, "[6,5]", "[4611686018427387904,4]", NULL,
      "its shape is none" },
    { "an empty shape", SECOND_RUN, "[6,5]", "[]", NULL, "its shape is none" },
    { "a shape of three", SECOND_RUN, "[6,5]", "[6,5,1]", NULL, "more than 2 numbers" },
    { "an unknown kind", SECOND_RUN, "\"kind\":\"v\"", "\"kind\":\"w\"", NULL,
      "'table': unknown kind 'w'" },
    { "a dtype that is none of these", SECOND_RUN, "F32", "F64", NULL,
      "'table': dtype 'F64', expected F32 or BF16" },
    { "a file elsewhere", SECOND_RUN, "state.rank1.safetensors", "../step_000010/x", NULL,
      "'table' (v) cannot be in '../step_000010/x'" },
    { "state among the weights", SECOND_RUN, "state.rank1.safetensors", "model.safetensors", NULL,
      "'table' (v) cannot be in 'model.safetensors'" },
    { "a file of another name", "", "{\"name\":\"state.rank1", "{\"name\":\"state.rankX", NULL,
      "the list of files has 'state.rankX.safetensors', expected state.rank1" },
    { "another name of a tensor", SECOND_RUN, "table", "sofas", NULL, "'sofas' (v): the run" },
    { "another name everywhere", "\"kind\":\"weight\"", "vector", "scalar", NULL,
      "model.safetensors has no 'scalar' (weight) as the manifest describes it" },
    { "a member twice", NULL, NULL, NULL, version_member_twice, "\"tokens\" is there twice" },
    { "a member that is missing", NULL, NULL, NULL, version_no_member, "\"rng\" is missing" },
    { "a member that is unknown", "", "\"tokens\":", "\"tokans\":", NULL, "\"tokans\" is unknown" },
    { "a number too large for a double", "", "\"train_seconds\":2", "\"train_seconds\":1e999", NULL,
      "a number that a double holds" },
    { "a number of 2^63", "", "\"tokens\":10240", "\"tokens\":9223372036854775808", NULL,
      "a number below 2^63" },
    { "a fraction of a step", "", "\"step\":20", "\"step\":20.5", NULL, "a whole number" },
    { "null in a window", "\"outliers\":{\"loss\":[", "[", "[null,", NULL, "a window holds null" },
    { "a window of 129", "\"outliers\":{\"loss\":[", "[", "[1,", NULL,
      "more than 128 numbers in a window" },
    { "flags that are none", "\"flags\":", "{", "[{", NULL, "expected '{'" },
    { "flags without an end", NULL, NULL, NULL, version_deep, "at most 100 levels of values" },
    { "a crc32 that is none", "\"kind\":\"weight\"", "\"crc32\":\"", "\"crc32\":\"x", NULL,
      "is no crc32" },
    { "a commit that is too long", "\"commit\":\"", "abc1234",
      "abc1234567890123456789012345678901234567890123456789012345678901234567890", NULL,
      "\"commit\" has " },
    { "another type in a file's header", NULL, NULL, NULL, version_header,
      "state.rank0.safetensors has no 'table' (v) as the manifest describes it" },
};

// Each is refused by its own words, and the one before it is found instead.
static void test_versions(void) {
    Image images[2], changed;
    Checkpoint c;
    char out[512], path[1024], problem[1024], report[4096];
    snprintf(out, sizeof out, "%s", test_path("versions"));
    small_images(images, 2);
    for (size_t i = 0; i < sizeof VERSIONS / sizeof *VERSIONS; i++) {
        const Version* v = &VERSIONS[i];
        image_copy(&changed, &images[1]);
        if (v->after) {
            image_edit(&changed, v->after, v->from, v->to);
            image_seal(&changed);
        } else {
            v->change(&changed);
        }
        small_run(out, images, 1);
        checkpoint_path(path, sizeof path, out, 20);
        image_write(&changed, path);
        problem[0] = 0;
        bool opened = checkpoint_open(&c, path, problem, sizeof problem);
        if (opened) checkpoint_close(&c);
        if (!test_true(v->what, !opened && strstr(problem, v->words)))
            printf("      %s\n", opened ? "it was taken" : problem);
        bool found = checkpoint_newest(&c, out, report, sizeof report);
        bool ok = found && c.info.step == 10 && strstr(report, path) && strstr(report, problem) &&
                  small_matches(&c, 10, problem, sizeof problem) == 1;
        if (found) checkpoint_close(&c);
        if (!test_true(v->what, ok)) printf("      report: %s\n", report);
        image_free(&changed);
    }

    // A good one under the name of another step.
    small_run(out, images, 1);
    checkpoint_path(path, sizeof path, out, 30);
    image_write(&images[1], path);
    bool found = checkpoint_newest(&c, out, report, sizeof report);
    test_true("the name of another step", found && c.info.step == 10 &&
              strstr(report, "step_000030: its manifest is of step 20"));
    if (found) checkpoint_close(&c);

    // What is not there, or not so, when it is read.
    static const struct {
        const char *what, *name;
        StateKind kind;
        int rank;
        SafeType type;
        int dims;
        int64_t shape[2];
        const char* words;
    } READS[] = {
        { "no such tensor", "tables", STATE_M, -1, SAFE_F32, 2, { 6, 5 }, "no 'tables' (m)" },
        { "no such gradient", "matrix", STATE_GRAD, -1, SAFE_F32, 2, { 4, 3 },
          "no 'matrix' (grad)" },
        { "no such rank", "table", STATE_GRAD, 2, SAFE_F32, 2, { 6, 5 },
          "no 'table' (grad) of this rank" },
        { "another dtype", "table", STATE_V, -1, SAFE_BF16, 2, { 6, 5 },
          "'table' (v) is F32, expected BF16" },
        { "another shape", "table", STATE_V, -1, SAFE_F32, 2, { 5, 6 },
          "'table' (v) has shape (6, 5), the flags ask for (5, 6)" },
        { "other dimensions", "table", STATE_V, -1, SAFE_F32, 1, { 30, 0 },
          "'table' (v) has shape (6, 5)" },
    };
    checkpoint_path(path, sizeof path, out, 10);
    REQUIRE(checkpoint_open(&c, path, problem, sizeof problem), "%s", problem);
    test_true("all of it", small_matches(&c, 10, problem, sizeof problem) == 1);
    image_copy(&changed, &images[0]);
    version_flipped_weight(&changed);
    image_write(&changed, path);
    bool same = small_matches(&c, 10, problem, sizeof problem) != -1;
    test_true("a bit that turns after it was opened", !same &&
              strstr(problem, "model.safetensors: 'matrix' (weight) has crc32"));
    image_write(&images[0], path);
    image_free(&changed);
    for (size_t i = 0; i < sizeof READS / sizeof *READS; i++) {
        float got[SMALL_TABLE];
        problem[0] = 0;
        bool ok = checkpoint_read(&c, READS[i].name, READS[i].kind, READS[i].rank, READS[i].type,
                                  READS[i].dims, READS[i].shape, got, problem, sizeof problem);
        if (!test_true(READS[i].what, !ok && strstr(problem, READS[i].words)))
            printf("      %s\n", ok ? "it was read" : problem);
    }
    checkpoint_close(&c);
    for (int i = 0; i < 2; i++) image_free(&images[i]);
    small_clear(out);
}

// ---- mutations -----------------------------------------------------------------------------

static uint64_t small_draws;

static uint64_t small_draw(uint64_t below) {
    return below ? test_random(60, small_draws++) % below : 0;
}

// A place in the text behind which a character of the set stands, from a random one on.
static size_t small_find(const ImageFile* f, const char* set) {
    size_t at = small_draw(f->n);
    for (size_t i = 0; i < f->n; i++) {
        size_t k = (at + i) % f->n;
        if (f->bytes[k] && strchr(set, f->bytes[k])) return k;
    }
    return at;
}

static void mutate_number(ImageFile* f) {
    static const char* const NUMBERS[] = {
        "0", "1", "2", "-1", "3", "17", "18", "29", "30", "31", "255", "65536", "2147483647",
        "2147483648", "4294967296", "9223372036854775807", "9223372036854775808",
        "18446744073709551616", "1e5", "1e999", "0.5", "null", "true", "\"7\"", "[]", "{}", "01",
        "",
    };
    size_t at = small_find(f, "0123456789"), end = at;
    while (at > 0 && strchr("0123456789.-", f->bytes[at - 1])) at--;
    while (end < f->n && f->bytes[end] && strchr("0123456789.-", f->bytes[end])) end++;
    const char* to = NUMBERS[small_draw(sizeof NUMBERS / sizeof *NUMBERS)];
    image_splice(f, at, end - at, to, strlen(to));
}

static void mutate_byte(ImageFile* f) {
    static const char BYTES[] = "{}[],:\"\\0123456789-.eE tfn\n";
    size_t at = small_draw(f->n);
    unsigned char byte = small_draw(4) ? (unsigned char)BYTES[small_draw(sizeof BYTES)]
                                       : (unsigned char)small_draw(256);
    switch (small_draw(3)) {
    case 0: f->bytes[at] = byte; break;
    case 1: image_splice(f, at, 0, &byte, 1); break;
    case 2: image_splice(f, at, 1, "", 0); break;
    }
}

// A line of the text: taken away, repeated, or put elsewhere.
static void mutate_line(ImageFile* f) {
    size_t at = small_find(f, "\n"), start = at;
    while (start > 0 && f->bytes[start - 1] != '\n') start--;
    size_t n = at + 1 - start;
    unsigned char* line = (unsigned char*)test_calloc(n, 1);
    memcpy(line, f->bytes + start, n);
    uint64_t way = small_draw(3);
    if (way != 1) image_splice(f, start, n, "", 0);
    if (way != 0) {
        size_t to = small_find(f, "\n") + 1;
        image_splice(f, to, 0, line, n);
    }
    free(line);
}

static void mutate_word(ImageFile* f) {
    static const char* const WORDS[] = {
        "table", "vector", "matrix", "weight", "master", "m", "v", "grad", "F32", "BF16", "F64",
        "model.safetensors", "state.rank0.safetensors", "state.rank1.safetensors", "manifest.json",
        "", "\\u0000", "\\ud800", "\xff", "..", "/", "00000000", "step", "kind",
    };
    size_t at = small_find(f, "\""), end = at + 1;
    while (end < f->n && f->bytes[end] != '"') end++;
    const char* to = WORDS[small_draw(sizeof WORDS / sizeof *WORDS)];
    if (end < f->n) image_splice(f, at + 1, end - at - 1, to, strlen(to));
}

// Changes an image in one of 12 ways; true: the manifest was made to agree, as far as it goes.
static bool mutate(Image* image, uint64_t way) {
    int file = (int)small_draw(IMAGE_FILES);
    ImageFile* f = &image->files[file];
    size_t at = small_draw(f->n), n;
    switch (way) {
    case 0:                     // bits
        for (uint64_t k = small_draw(8) + 1; k > 0; k--)
            f->bytes[small_draw(f->n)] ^= (unsigned char)(1 << small_draw(8));
        return false;
    case 1:                     // the end is missing
        f->n = small_draw(8) ? at : small_draw(16) < f->n ? small_draw(16) : at;
        return false;
    case 2:                     // more behind it, or within
        n = 1 + small_draw(12);
        image_splice(f, small_draw(2) ? f->n : at, 0, "\0\0\0\0{}\"\xff garbage", n);
        return false;
    case 3:                     // a piece of another file, or of another place
    {
        const ImageFile* g = &image->files[small_draw(IMAGE_FILES)];
        size_t from = small_draw(g->n);
        n = 1 + small_draw(64);
        if (n > g->n - from) n = g->n - from;
        if (n > f->n - at) n = f->n - at;
        memmove(f->bytes + at, g->bytes + from, n);
        return false;
    }
    case 4:                     // zeros, as after a power failure
        n = 1 + small_draw(f->n - at);
        memset(f->bytes + at, 0, n);
        return false;
    case 5:                     // the length of a header
    {
        uint64_t length = small_draw(3) ? small_draw(f->n + 16) : test_random(61, small_draws++);
        f = &image->files[1 + small_draw(IMAGE_FILES - 1)];
        memcpy(f->bytes, &length, 8);
        image_describe(image, (int)(f - image->files));
        return true;
    }
    case 6: mutate_number(&image->files[0]); break;
    case 7: mutate_byte(&image->files[0]); break;
    case 8: mutate_line(&image->files[0]); break;
    case 9: mutate_word(&image->files[0]); break;
    default:                    // a header, whose length and crc32 then fit
        f = &image->files[file = 1 + (int)small_draw(IMAGE_FILES - 1)];
        uint64_t length;
        memcpy(&length, f->bytes, 8);
        ImageFile header = { "", (unsigned char*)test_calloc(length + 1, 1), (size_t)length };
        memcpy(header.bytes, f->bytes + 8, (size_t)length);
        if (way == 10) mutate_number(&header);
        else if (small_draw(2)) mutate_word(&header);
        else mutate_byte(&header);
        while (header.n % 8) image_splice(&header, header.n, 0, " ", 1);
        image_splice(f, 8, (size_t)length, header.bytes, header.n);
        length = header.n;
        memcpy(f->bytes, &length, 8);
        free(header.bytes);
        image_describe(image, file);
        return true;
    }
    image_seal(image);
    return true;
}

static bool image_same(const Image* a, const Image* b) {
    bool same = true;
    for (int i = 0; i < IMAGE_FILES; i++) {
        const ImageFile *f = &a->files[i], *g = &b->files[i];
        same = same && f->n == g->n && memcmp(f->bytes, g->bytes, f->n) == 0;
    }
    return same;
}

// Whether what the trainer goes on from has values that it can bear.
static bool info_is_sane(const CheckpointInfo* info) {
    bool sane = info->ranks >= 1 && info->step >= 0 && info->flags && info->recipe && info->shards;
    const Window* windows[] = { &info->loss, &info->grad_norm };
    for (int i = 0; i < 2 && sane; i++) {
        const Window* w = windows[i];
        sane = w->count >= 0 && w->count <= WINDOW && w->next >= 0 && w->next < WINDOW;
    }
    return sane && strlen(info->flags) + strlen(info->recipe) + strlen(info->shards) > 0;
}

// Refused, in words; or, where the manifest was made to agree, read as it was saved. What a changed
// manifest says besides tensors may be taken, if it is no nonsense.
static void test_mutations(void) {
    Image whole, changed;
    Checkpoint c;
    char out[512], path[1024], problem[1024], what[80];
    int refused = 0, deep = 0, taken = 0, same = 0;
    snprintf(out, sizeof out, "%s", test_path("mutations"));
    small_images(&whole, 1);
    small_run(out, NULL, 0);
    checkpoint_path(path, sizeof path, out, 10);
    for (int i = 0; i < MUTATIONS; i++) {
        uint64_t way = (uint64_t)i % 12;
        image_copy(&changed, &whole);
        bool agrees = mutate(&changed, way);
        for (uint64_t more = small_draw(4); agrees && way >= 6 && way < 10 && more == 0; more++) {
            mutate(&changed, 6 + small_draw(4));
        }
        image_write(&changed, path);
        snprintf(what, sizeof what, "mutation %d, way %d", i, (int)way);
        problem[0] = 0;
        bool opened = checkpoint_open(&c, path, problem, sizeof problem);
        bool ok;
        if (image_same(&changed, &whole)) {
            same++;
            ok = opened && small_matches(&c, 10, problem, sizeof problem) == 1;
        } else if (!opened) {
            refused++;
            deep += !strstr(problem, "crc32");
            ok = strlen(problem) > 10 && strlen(problem) < sizeof problem - 1;
        } else {
            taken++;
            int64_t step = c.info.step;
            c.info.step = 10;       // may have been changed; the name of the directory tells
            c.info.ranks = c.info.ranks >= 1 ? SMALL_RANKS : 0;
            ok = agrees && info_is_sane(&c.info) && step >= 0;
            ok = ok && small_matches(&c, 10, problem, sizeof problem) != 0;
        }
        if (!test_true(what, ok)) printf("      %s\n", opened ? "it was taken" : problem);
        if (opened) checkpoint_close(&c);
        image_free(&changed);
    }
    printf("note  of %d mutations %d refused (%d behind the checksums), %d taken for what they say,"
           " %d changed nothing\n", MUTATIONS, refused, deep, taken, same);
    test_true("most are refused", refused > MUTATIONS * 3 / 4);
    test_true("many get behind the checksums", deep > MUTATIONS / 3);
    image_free(&whole);
    small_clear(out);
}

// ---- for scripts ---------------------------------------------------------------------------

// The step of the newest whole checkpoint, or "none"; above it what was refused.
static int checkpoint_newest_main(const char* out) {
    char report[16384];
    Checkpoint c;
    bool found = checkpoint_newest(&c, out, report, sizeof report);
    if (report[0]) printf("%s\n", report);
    if (found) printf("%" PRId64 "\n", c.info.step);
    else printf("none\n");
    if (found) checkpoint_close(&c);
    return report[0] ? 1 : 0;
}
