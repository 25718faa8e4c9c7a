/*
Saving a checkpoint (llmc/checkpoint.h) beside training: a thread, and what it takes so that a name
step_N is never on anything half-written or half-removed, wherever a run is killed.

    saver_begin(&saver, &info, parts, count);       // IDLE -> WRITING -> WRITTEN, on every rank
    saver_commit(&saver);                           // when all are: rank 0 -> COMMITTING -> IDLE

Each rank fills its files in .step_000750.tmp and has them on the disk before it says WRITTEN. When
all have, rank 0 reads every header back, adds the manifest, checks the whole as a reader would, and
renames the directory. What is to go is renamed .step_000500.old first; what a second checkpoint of
the same step replaces is .step_000750.aside meanwhile. saver_open tidies up the rest. A checkpoint
of a later step than the one just saved belongs to a course that the run has left, and would be
taken for the newest: it becomes step_000900.left, for the user to look at or remove.

A full disk, a directory that is gone and whatever else goes wrong end in FAILED with a message, not
in the end of the program. Saving uses system calls alone, so that a short write, a signal and an
error are each met in one place (llmc/safetensors.h), and a test can make each call fail.

costs       the thread reads what it saves twice (checksums stand before the data), and needs 1 MiB
test        test/test_checkpoint.c
*/
#pragma once
#include "checkpoint.h"

#include <pthread.h>
#include <sys/statvfs.h>
#include <time.h>

// ---- removing ------------------------------------------------------------------------------

// Takes a directory of files away. False with errno set if it, or part of it, is still there.
static inline bool directory_remove(const char* path) {
    char file[CHECKPOINT_PATH + 256];
    int error = 0;
    DIR* folder = opendir(path);
    if (!folder) return errno == ENOENT;
    struct dirent* entry;
    while (errno = 0, (entry = readdir(folder)) != NULL) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        snprintf(file, sizeof file, "%s/%s", path, entry->d_name);
        if (unlink(file) != 0 && errno != ENOENT) error = errno;
    }
    if (errno) error = errno;
    closedir(folder);
    if (rmdir(path) == 0) return true;
    if (!error) error = errno;
    errno = error;
    return false;
}

// Takes a checkpoint away: its name goes first, so that nothing half-removed has it.
static inline bool checkpoint_remove(const char* path, const char* old) {
    if (rename(path, old) == 0) return directory_remove(old);
    if (errno != ENOTEMPTY && errno != EEXIST) return errno == ENOENT;
    return directory_remove(old) && rename(path, old) == 0 && directory_remove(old);
}

// ---- saving --------------------------------------------------------------------------------

typedef enum SaverStatus {
    SAVER_IDLE, SAVER_WRITING, SAVER_WRITTEN, SAVER_COMMITTING, SAVER_FAILED
} SaverStatus;

typedef struct Saver {
    char out[CHECKPOINT_OUT];
    char folder[CHECKPOINT_PATH];       // OUT/checkpoints
    char part[CHECKPOINT_PATH];         // .step_N.tmp in it
    int rank, world;
    int64_t keep, keep_every;

    // Of the save under way or the last one:
    CheckpointInfo info;
    char* strings[3];                   // flags, recipe, shards
    StatePart* parts;
    uint32_t* crcs;
    int count;
    size_t room;
    char* names;                        // of the parts
    char* weights;                      // rank 0: the manifest's lines of the weights
    int64_t needed;                     // bytes of this rank's files
    int64_t bytes;                      // of all files, on rank 0 after the commit; before: needed
    double seconds;                     // that its thread has worked
    char error[2048];
    char note[1024];                    // what went wrong after the checkpoint was safe, or ""

    pthread_t thread;
    bool threaded;                      // it has to be joined
    int status;                         // SaverStatus; atomic
} Saver;

static inline SaverStatus saver_status(Saver* s) {
    return (SaverStatus)__atomic_load_n(&s->status, __ATOMIC_ACQUIRE);
}

static inline void saver_set(Saver* s, SaverStatus status) {
    __atomic_store_n(&s->status, (int)status, __ATOMIC_RELEASE);
}

// In FAILED: what happened, where, and how much room there is.
static inline const char* saver_error(const Saver* s) {
    return s->error;
}

// "PATH WHAT WHY", and what it would have taken. Always false.
static inline bool saver_refuse(Saver* s, const char* path, const char* what, const char* why) {
    struct statvfs disk;
    char room[64] = "";
    if (statvfs(s->folder, &disk) == 0 || statvfs(s->out, &disk) == 0)
        snprintf(room, sizeof room, ", its disk has %" PRIu64 " free",
                 (uint64_t)disk.f_bavail * (uint64_t)disk.f_frsize);
    char text[sizeof s->error];         // the path may be one of the saver's
    snprintf(text, sizeof text, "%s %s: %s\nit takes %" PRId64 " bytes%s", path, what, why,
             s->needed, room);
    memcpy(s->error, text, sizeof text);
    return false;
}

// The reason is errno's.
static inline bool saver_fail(Saver* s, const char* path, const char* what) {
    char why[160];
    int error = errno;
    snprintf(why, sizeof why, "%s (errno %d)", strerror(error), error);
    return saver_refuse(s, path, what, why);
}

static inline void saver_note(Saver* s, const char* path, const char* what) {
    char text[sizeof s->note];
    snprintf(text, sizeof text, "%.900s %s: %s", path, what, strerror(errno));
    memcpy(s->note, text, sizeof text);
}

// ---- saving: a rank's files ----------------------------------------------------------------

typedef bool (*PartSink)(void* to, const void* data, size_t n);

// The bytes of a part as they stand in the file; false where the sink is.
static inline bool part_stream(const StatePart* p, PartSink sink, void* to) {
    size_t width = SAFE_TYPE_BYTES[p->type];
    if (!p->transposed || p->dims < 2) return sink(to, p->data, (size_t)p->count * width);
    size_t rows = (size_t)p->shape[0], cols = (size_t)p->shape[1];
    size_t most = CHECKPOINT_CHUNK / (cols * width);
    if (most == 0) most = 1;
    if (most > rows) most = rows;
    char* turned = (char*)host_alloc(most * cols, width);
    bool ok = true;
    for (size_t from = 0; from < rows && ok; from += most) {
        size_t n = rows - from < most ? rows - from : most;
        for (size_t c = 0; c < cols; c++) {
            for (size_t r = 0; r < n; r++)
                memcpy(turned + (r * cols + c) * width,
                       (const char*)p->data + (c * rows + from + r) * width, width);
        }
        ok = sink(to, turned, n * cols * width);
    }
    free(turned);
    return ok;
}

static inline bool part_add_crc(void* to, const void* data, size_t n) {
    *(uint32_t*)to = checkpoint_crc(*(uint32_t*)to, data, n);
    return true;
}

static inline bool part_put(void* to, const void* data, size_t n) {
    return file_put(*(int*)to, data, n);
}

typedef struct SaverFile {
    char name[64];
    SafeLayout layout;
    const Saver* saver;
    int* parts;                 // the saver's, of each tensor
    char* lines;                // of the manifest
} SaverFile;

static inline bool saver_put(void* context, int fd, int tensor) {
    const SaverFile* f = (const SaverFile*)context;
    return part_stream(&f->saver->parts[f->parts[tensor]], part_put, &fd);
}

static inline FILE* saver_text(char** text, size_t* n) {
    FILE* out = open_memstream(text, n);
    REQUIRE(out, "no memory for a checkpoint's text: %s", strerror(errno));
    return out;
}

static inline void saver_text_end(FILE* out) {
    REQUIRE(fclose(out) == 0, "no memory for a checkpoint's text: %s", strerror(errno));
}

// What stands in file `index` (0: weights) of this rank, in front of the data.
static inline void saver_plan(SaverFile* f, const Saver* s, int index) {
    const CheckpointInfo* info = &s->info;
    memset(f, 0, sizeof *f);
    f->saver = s;
    checkpoint_file_name(f->name, sizeof f->name, index);
    f->parts = (int*)host_alloc((size_t)s->count, sizeof(int));
    SafeTensor* tensors = (SafeTensor*)host_alloc((size_t)s->count, sizeof(SafeTensor));
    enum { KEY = 512 };
    char* keys = (char*)host_alloc((size_t)s->count, KEY);
    size_t size;
    int count = 0;
    FILE* lines = saver_text(&f->lines, &size);
    for (int i = 0; i < s->count; i++) {
        const StatePart* p = &s->parts[i];
        if ((p->kind == STATE_WEIGHT) != (index == 0)) continue;
        SafeTensor* t = &tensors[count];
        bool whole = p->count == (p->dims == 2 ? p->shape[0] * p->shape[1] : p->shape[0]);
        checkpoint_key(keys + count * KEY, KEY, p->name, p->kind);
        t->name = keys + count * KEY;
        t->type = p->type;
        t->dims = whole ? p->dims : 1;
        t->shape[0] = whole ? p->shape[0] : p->count;
        t->shape[1] = p->shape[1];
        if (count) fputs(",\n", lines);
        manifest_put_tensor(lines, p, f->name, s->crcs[i]);
        f->parts[count++] = i;
    }
    saver_text_end(lines);
    char step[32], rank[16], ranks[16];
    snprintf(step, sizeof step, "%" PRId64, info->step);
    snprintf(rank, sizeof rank, "%d", s->rank);
    snprintf(ranks, sizeof ranks, "%d", s->world);
    const char* weights[] = { "format", "pt", "flags", info->flags, "step", step,
                              "commit", info->commit, "precision", info->precision,
                              "tokenizer_hash", info->tokenizer_hash };
    const char* state[] = { "format", CHECKPOINT_STATE, "step", step, "rank", rank,
                            "ranks", ranks, "tensors", f->lines };
    int pairs = index > 0 || !info->tokenizer_hash[0] ? 5 : 6;
    safe_layout(&f->layout, tensors, count, index ? state : weights, pairs);
    free(tensors);
    free(keys);
}

static inline void saver_plan_free(SaverFile* f) {
    safe_layout_free(&f->layout);
    free(f->parts);
    free(f->lines);
}

static inline bool saver_folder(Saver* s) {
    if (mkdir(s->folder, 0777) == 0) {
        if (!directory_sync(s->out))
            return saver_fail(s, s->out, "cannot be brought onto the disk (fsync)");
    } else if (errno != EEXIST) {
        return saver_fail(s, s->folder, "cannot be created");
    }
    if (mkdir(s->part, 0777) != 0 && errno != EEXIST)
        return saver_fail(s, s->part, "cannot be created");
    return true;
}

static inline bool saver_write(Saver* s) {
    SaverFile files[2];
    int first = s->rank == 0 ? 0 : 1;
    for (int i = 0; i < s->count; i++) {
        s->crcs[i] = 0;
        part_stream(&s->parts[i], part_add_crc, &s->crcs[i]);
    }
    for (int i = first; i < 2; i++) {
        saver_plan(&files[i], s, i ? s->rank + 1 : 0);
        s->needed += (int64_t)(files[i].layout.header_bytes + files[i].layout.data_bytes);
    }
    bool ok = saver_folder(s);
    for (int i = first; i < 2 && ok; i++) {
        char path[CHECKPOINT_PATH + 64];
        const char* failed;
        snprintf(path, sizeof path, "%s/%s", s->part, files[i].name);
        ok = safe_fill(path, &files[i].layout, saver_put, &files[i], &failed);
        if (!ok) saver_fail(s, path, failed);
    }
    if (ok && first == 0) {
        free(s->weights);
        s->weights = files[0].lines;
        files[0].lines = NULL;
    }
    for (int i = first; i < 2; i++) saver_plan_free(&files[i]);
    s->bytes = s->needed;
    return ok;
}

// ---- saving: the manifest ------------------------------------------------------------------

static inline bool saver_metadata_is(const SafeFile* f, const char* key, const char* wanted) {
    const char* value = safetensors_metadata(f, key);
    return value && strcmp(value, wanted) == 0;
}

// A rank's file as it came to the disk: its line among the files, and its tensors' lines.
static inline bool saver_collect(Saver* s, int index, FILE* files, FILE* tensors, bool* first) {
    char name[64], path[CHECKPOINT_PATH + 64], problem[400], step[32], rank[16], ranks[16];
    SafeFile f;
    checkpoint_file_name(name, sizeof name, index);
    snprintf(path, sizeof path, "%s/%s", s->part, name);
    if (!safetensors_scan(&f, path, problem, sizeof problem)) {
        size_t n = strlen(problem);
        if (index > 1)      // another rank's
            snprintf(problem + n, sizeof problem - n, "; --out must be on a disk that all ranks share");
        return saver_refuse(s, path, "was written, but", problem);
    }
    const char* lines = s->weights;
    snprintf(step, sizeof step, "%" PRId64, s->info.step);
    snprintf(rank, sizeof rank, "%d", index - 1);
    snprintf(ranks, sizeof ranks, "%d", s->world);
    bool ok = saver_metadata_is(&f, "step", step);
    if (index > 0) {
        ok = ok && saver_metadata_is(&f, "format", CHECKPOINT_STATE) &&
             saver_metadata_is(&f, "rank", rank) && saver_metadata_is(&f, "ranks", ranks);
        lines = safetensors_metadata(&f, "tensors");
    }
    ok = ok && lines;
    if (!ok) {
        snprintf(problem, sizeof problem, "of another one: rank %d of %d has to save step %s",
                 index ? index - 1 : 0, s->world, step);
        saver_refuse(s, path, "was written, but", problem);
    }
    uint32_t crc;
    if (ok && !checkpoint_crc_of(f.fd, 0, f.header_bytes, &crc))
        ok = saver_fail(s, path, "cannot be read");
    if (ok) {
        fprintf(files, "%s{\"name\":\"%s\",\"bytes\":%zu,\"header_crc32\":\"%08x\"}",
                index ? ",\n" : "", name, f.bytes, crc);
        if (*lines) fprintf(tensors, "%s%s", *first ? "" : ",\n", lines);
        if (*lines) *first = false;
        s->bytes += (int64_t)f.bytes;
    }
    safetensors_close(&f);
    return ok;
}

// The text of the manifest, or NULL.
static inline char* saver_manifest(Saver* s, size_t* n) {
    char *text, *tensor_text;
    size_t tensor_bytes;
    bool ok = true, first = true;
    FILE *out = saver_text(&text, n), *tensors = saver_text(&tensor_text, &tensor_bytes);
    manifest_put_info(out, &s->info);
    fputs(",\n\"files\":[\n", out);
    s->bytes = 0;
    for (int i = 0; i <= s->world && ok; i++) ok = saver_collect(s, i, out, tensors, &first);
    saver_text_end(tensors);
    fprintf(out, "],\n\"tensors\":[\n%s],\n", tensor_text);
    fflush(out);
    uint32_t crc = checkpoint_crc(0, text, *n);
    fprintf(out, CHECKPOINT_LAST_LINE, crc);
    saver_text_end(out);
    free(tensor_text);
    if (ok) return text;
    free(text);
    return NULL;
}

static inline bool saver_put_text(const char* path, const char* text, size_t n,
                                  const char** failed) {
    SafeLayout plain;
    memset(&plain, 0, sizeof plain);
    plain.header = (char*)text;
    plain.header_bytes = n;
    return safe_fill(path, &plain, NULL, NULL, failed);
}

// ---- saving: its name, and what has to go --------------------------------------------------

static inline bool path_is_there(const char* path) {
    struct stat info;
    return lstat(path, &info) == 0;
}

// A path in OUT/checkpoints.
static inline void saver_path(const Saver* s, char* path, const char* before, int64_t step,
                              const char* behind) {
    snprintf(path, CHECKPOINT_PATH, "%.*s/%sstep_%06" PRId64 "%s", CHECKPOINT_PATH - 100, s->folder,
             before, step, behind);
}

// Gives the directory its name. What had it before is put aside, and back if that fails.
static inline bool saver_rename(Saver* s) {
    char path[CHECKPOINT_PATH], aside[CHECKPOINT_PATH];
    int64_t step = s->info.step;
    saver_path(s, path, "", step, "");
    saver_path(s, aside, ".", step, ".aside");
    bool moved = path_is_there(path);
    if (moved && !directory_remove(aside))
        return saver_fail(s, aside, "cannot be removed");
    if (moved && rename(path, aside) != 0)
        return saver_fail(s, path, "cannot be put aside (rename)");
    if (rename(s->part, path) != 0) {
        saver_fail(s, path, "cannot be given its name (rename)");
        if (moved && rename(aside, path) != 0) {
            size_t n = strlen(s->error);
            snprintf(s->error + n, sizeof s->error - n, "\nwhat had that name is now %s; the next "
                     "run gives it back", aside);
        }
        return false;
    }
    if (!directory_sync(s->folder))
        return saver_fail(s, s->folder, "cannot be brought onto the disk (fsync)");
    if (!directory_remove(aside)) saver_note(s, aside, "cannot be removed");
    return true;
}

static inline void saver_remove(Saver* s, int64_t step) {
    char path[CHECKPOINT_PATH], old[CHECKPOINT_PATH];
    saver_path(s, path, "", step, "");
    saver_path(s, old, ".", step, ".old");
    if (!checkpoint_remove(path, old)) saver_note(s, path, "cannot be removed");
}

// Of a course that was left: it keeps its files, and loses its name.
static inline void saver_leave(Saver* s, int64_t step) {
    char path[CHECKPOINT_PATH], left[CHECKPOINT_PATH], old[CHECKPOINT_PATH];
    saver_path(s, path, "", step, "");
    saver_path(s, left, "", step, ".left");
    saver_path(s, old, ".", step, ".old");
    if (path_is_there(left)) checkpoint_remove(left, old);
    if (rename(path, left) != 0) saver_note(s, path, "cannot be renamed");
}

// The newest `keep` stay, and those of every keep_every steps.
static inline void saver_prune(Saver* s) {
    int64_t* steps;
    int count = checkpoint_steps(s->out, &steps), kept = 0;
    if (count < 0) saver_note(s, s->folder, "cannot be listed");
    for (int i = 0; i < count; i++) {
        if (steps[i] > s->info.step) saver_leave(s, steps[i]);
        else if (kept++ < s->keep || (s->keep_every > 0 && steps[i] % s->keep_every == 0)) continue;
        else saver_remove(s, steps[i]);
    }
    free(steps);
}

static inline bool saver_finish(Saver* s) {
    char path[CHECKPOINT_PATH + 16], problem[600];
    const char* failed;
    size_t n;
    char* text = saver_manifest(s, &n);
    if (!text) return false;
    s->needed = s->bytes += (int64_t)n;
    snprintf(path, sizeof path, "%s/manifest.json", s->part);
    bool ok = saver_put_text(path, text, n, &failed);
    free(text);
    if (!ok) return saver_fail(s, path, failed);
    Checkpoint check;
    if (!checkpoint_try_open(&check, s->part, false, problem, sizeof problem))
        return saver_refuse(s, s->part, "was written, but", problem);
    checkpoint_close(&check);
    if (!directory_sync(s->part))
        return saver_fail(s, s->part, "cannot be brought onto the disk (fsync)");
    if (!saver_rename(s)) return false;
    saver_prune(s);
    return true;
}

// ---- saving: the thread --------------------------------------------------------------------

static inline void* saver_write_thread(void* argument) {
    Saver* s = (Saver*)argument;
    double from = clock_now();
    bool ok = saver_write(s);
    s->seconds += clock_now() - from;
    saver_set(s, ok ? SAVER_WRITTEN : SAVER_FAILED);
    return NULL;
}

static inline void* saver_finish_thread(void* argument) {
    Saver* s = (Saver*)argument;
    double from = clock_now();
    bool ok = saver_finish(s);
    s->seconds += clock_now() - from;
    saver_set(s, ok ? SAVER_IDLE : SAVER_FAILED);
    return NULL;
}

// Until the thread is not working.
static inline void saver_wait(Saver* s) {
    if (s->threaded) pthread_join(s->thread, NULL);
    s->threaded = false;
}

static inline void saver_start(Saver* s, SaverStatus status, void* (*work)(void*)) {
    sigset_t all, before;
    saver_wait(s);
    saver_set(s, status);
    sigfillset(&all);           // signals are for the thread that trains
    pthread_sigmask(SIG_BLOCK, &all, &before);
    int error = pthread_create(&s->thread, NULL, work, s);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    s->threaded = error == 0;
    if (error == 0) return;
    snprintf(s->error, sizeof s->error, "no thread to save with: %s (errno %d)", strerror(error),
             error);
    saver_set(s, SAVER_FAILED);
}

// ---- saving: what a caller uses ------------------------------------------------------------

// What a killed run has left behind: parts go, and what was put aside gets its name back.
static inline void saver_sweep(Saver* s) {
    static const char* const ENDINGS[] = { ".tmp", ".old", ".aside" };
    DIR* folder = opendir(s->folder);
    if (!folder) return;
    typedef struct Leftover { int64_t step; int ending; } Leftover;
    Leftover* found = NULL;
    size_t room = 0;
    int count = 0;
    for (struct dirent* entry; (entry = readdir(folder)) != NULL;) {
        for (int e = 0; e < 3 && entry->d_name[0] == '.'; e++) {
            int64_t step = checkpoint_step(entry->d_name + 1, ENDINGS[e]);
            if (step < 0) continue;
            found = (Leftover*)array_grow(found, &room, (size_t)count + 1, sizeof *found);
            found[count].step = step;
            found[count++].ending = e;
        }
    }
    closedir(folder);
    for (int i = 0; i < count; i++) {
        char path[CHECKPOINT_PATH], name[CHECKPOINT_PATH];
        saver_path(s, path, ".", found[i].step, ENDINGS[found[i].ending]);
        saver_path(s, name, "", found[i].step, "");
        bool back = found[i].ending == 2 && !path_is_there(name);
        bool ok = back ? rename(path, name) == 0 : directory_remove(path);
        if (!ok) saver_note(s, path, "cannot be removed");
    }
    free(found);
}

// Rank 0 sweeps: no other run may be writing there.
static inline void saver_open(Saver* s, const char* out, int rank, int world, int64_t keep,
                              int64_t keep_every) {
    memset(s, 0, sizeof *s);
    REQUIRE(strlen(out) < sizeof s->out, "--out %s: the path is too long", out);
    snprintf(s->out, sizeof s->out, "%s", out);
    snprintf(s->folder, sizeof s->folder, "%s/checkpoints", out);
    s->rank = rank;
    s->world = world;
    s->keep = keep;
    s->keep_every = keep_every;
    if (rank == 0) saver_sweep(s);
}

static inline void saver_free(Saver* s) {
    for (int i = 0; i < 3; i++) free(s->strings[i]);
    free(s->parts);
    free(s->crcs);
    free(s->names);
    memset(s->strings, 0, sizeof s->strings);
    s->parts = NULL;
    s->crcs = NULL;
    s->names = NULL;
    s->count = 0;
}

static inline char* saver_copy(const char* text, const char* none) {
    char* copy = strdup(text ? text : none);
    REQUIRE(copy, "no memory for a checkpoint's text: %s", strerror(errno));
    return copy;
}

// From IDLE to WRITING, then WRITTEN or FAILED. Copies what it is given but for the parts' data,
// which must stay as they are until then. A part of no elements is left out.
static inline void saver_begin(Saver* s, const CheckpointInfo* info, const StatePart* parts,
                               int count) {
    REQUIRE(saver_status(s) == SAVER_IDLE, "step %" PRId64 " is to be saved, and the save of step %"
            PRId64 " has not ended", info->step, s->info.step);
    saver_wait(s);
    saver_free(s);
    s->info = *info;
    s->info.flags = s->strings[0] = saver_copy(info->flags, "{}");
    s->info.recipe = s->strings[1] = saver_copy(info->recipe, "");
    s->info.shards = s->strings[2] = saver_copy(info->shards, "");
    s->info.ranks = s->world;
    s->parts = (StatePart*)host_alloc((size_t)count, sizeof(StatePart));
    s->crcs = (uint32_t*)host_alloc((size_t)count, sizeof(uint32_t));
    size_t bytes = 0;
    for (int i = 0; i < count; i++) bytes += strlen(parts[i].name) + 1;
    char* name = s->names = (char*)host_alloc(bytes, 1);
    for (int i = 0; i < count; i++) {
        const StatePart* p = &parts[i];
        int64_t n = p->dims == 2 ? p->shape[0] * p->shape[1] : p->shape[0];
        bool whole = p->offset == 0 && p->count == n;
        REQUIRE((p->dims == 1 || p->dims == 2) && (p->type == SAFE_F32 || p->type == SAFE_BF16) &&
                    p->offset >= 0 && p->count >= 0 && p->count <= n - p->offset &&
                    (whole || (!p->transposed && p->kind != STATE_WEIGHT)) &&
                    (s->rank == 0 || p->kind != STATE_WEIGHT) && strlen(p->name) < 500,
                "'%.80s' (%s) cannot be saved as rank %d gives it", p->name,
                STATE_KIND_WORD[p->kind], s->rank);
        if (p->count == 0) continue;
        s->parts[s->count] = *p;
        s->parts[s->count++].name = strcpy(name, p->name);
        name += strlen(p->name) + 1;
    }
    saver_path(s, s->part, ".", info->step, ".tmp");
    s->needed = s->bytes = 0;
    s->seconds = 0;
    s->error[0] = s->note[0] = 0;
    saver_start(s, SAVER_WRITING, saver_write_thread);
}

// When all ranks are WRITTEN. Rank 0: COMMITTING, then IDLE (it is saved) or FAILED; others: IDLE.
static inline void saver_commit(Saver* s) {
    REQUIRE(saver_status(s) == SAVER_WRITTEN, "the checkpoint of step %" PRId64 " is to be "
            "committed, and rank %d has not written it", s->info.step, s->rank);
    if (s->rank == 0) {
        saver_start(s, SAVER_COMMITTING, saver_finish_thread);
        return;
    }
    saver_wait(s);
    saver_set(s, SAVER_IDLE);
}

// After saver_wait, when a rank has failed: rank 0 removes what there is, and the others their own, in
// case it is on another disk.
static inline void saver_abandon(Saver* s) {
    char path[CHECKPOINT_PATH + 64], name[64];
    saver_wait(s);
    checkpoint_file_name(name, sizeof name, s->rank + 1);
    snprintf(path, sizeof path, "%s/%s", s->part, name);
    if (s->rank != 0 && s->part[0]) unlink(path);
    if (s->rank == 0 && s->part[0] && !directory_remove(s->part))
        saver_note(s, s->part, "cannot be removed");
    saver_set(s, SAVER_IDLE);
}

static inline void saver_close(Saver* s) {
    saver_wait(s);
    if (saver_status(s) != SAVER_IDLE) saver_abandon(s);
    saver_free(s);
    free(s->weights);
    memset(s, 0, sizeof *s);
}
