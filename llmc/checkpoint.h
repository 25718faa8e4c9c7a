/*
Checkpoints as they lie on the disk, and how they are read. They are written by llmc/saver.h.

OUT/checkpoints/step_000750/
    manifest.json                 what the run was doing, and what the other files must hold
    model.safetensors             weights, NAME; rank 0 writes them
    state.rankR.safetensors       NAME.master, NAME.m, NAME.v, NAME.grad of rank R

Values lie there in their logical shape: (rows, cols) or (cols). A rank that owns a part of a tensor
stores that run of the flattened tensor as a vector; offset and count are in the manifest. Of
NAME.grad each rank stores its own sum, and the gradient is the sum over files.

The reader trusts nothing: the manifest ends with a crc32 of itself, and has one of each file's
header and of each tensor's bytes; shapes, types, sizes, runs and names are checked against each
other. It never ends the program, whatever is on the disk or not: a function says false and what is
wrong.

test        test/test_checkpoint.c
*/
#pragma once
#include "manifest.h"

#include <dirent.h>

#define CHECKPOINT_STATE "modded-llm.c state"

static const size_t CHECKPOINT_CHUNK = 1 << 20;     // bytes that are turned, read or summed at once

// ---- names ---------------------------------------------------------------------------------

static inline void checkpoint_path(char* path, size_t size, const char* out, int64_t step) {
    snprintf(path, size, "%s/checkpoints/step_%06" PRId64, out, step);
}

// The step in the name step_N, as checkpoint_path writes it, that is followed by `ending`; else -1.
static inline int64_t checkpoint_step(const char* name, const char* ending) {
    char again[64];
    char* end;
    if (strncmp(name, "step_", 5) != 0 || name[5] < '0' || name[5] > '9') return -1;
    int64_t step = strtoll(name + 5, &end, 10);
    snprintf(again, sizeof again, "step_%06" PRId64 "%s", step, ending);
    return strcmp(name, again) == 0 ? step : -1;
}

// Of file 0 the weights, of file 1 + R the state of rank R.
static inline void checkpoint_file_name(char* name, size_t size, int file) {
    if (file == 0) snprintf(name, size, "model.safetensors");
    else snprintf(name, size, "state.rank%d.safetensors", file - 1);
}

static inline int checkpoint_by_step(const void* a, const void* b) {
    int64_t x = *(const int64_t*)a, y = *(const int64_t*)b;
    return (x < y) - (x > y);
}

// All that have a name; *steps is the caller's to free. -1 with errno set: it cannot be told.
static inline int checkpoint_steps(const char* out, int64_t** steps) {
    char path[CHECKPOINT_PATH];
    size_t room = 0;
    int count = 0;
    *steps = NULL;
    snprintf(path, sizeof path, "%s/checkpoints", out);
    DIR* folder = opendir(path);
    if (!folder) return errno == ENOENT ? 0 : -1;
    struct dirent* entry;
    while (errno = 0, (entry = readdir(folder)) != NULL) {
        int64_t step = checkpoint_step(entry->d_name, "");
        if (step < 0) continue;
        *steps = (int64_t*)array_grow(*steps, &room, (size_t)count + 1, sizeof **steps);
        (*steps)[count++] = step;
    }
    int error = errno;
    closedir(folder);
    if (error) {
        free(*steps);
        *steps = NULL;
        errno = error;
        return -1;
    }
    if (count) qsort(*steps, (size_t)count, sizeof **steps, checkpoint_by_step);
    return count;
}

// The newest `room` of what has a final name, newest first; how many they are, or -1 with errno set
// if that cannot be told.
static inline int checkpoint_list(const char* out, int64_t* steps, int room) {
    int64_t* all;
    int count = checkpoint_steps(out, &all);
    for (int i = 0; i < count && i < room; i++) steps[i] = all[i];
    free(all);
    return count < room ? count : room;
}

// ---- reading: whether it fits together -----------------------------------------------------

// Elements of a shape that has been checked.
static inline int64_t checkpoint_elements(const CheckpointTensor* t) {
    return t->dims == 2 ? t->shape[0] * t->shape[1] : t->shape[0];
}

// A line by itself.
static inline bool checkpoint_check_tensor(const Checkpoint* c, CheckpointTensor* t, char* problem,
                                           size_t size) {
    char name[64];
    const char* kind = STATE_KIND_WORD[t->kind];
    int64_t rows = t->shape[0], cols = t->dims == 2 ? t->shape[1] : 1;
    if (t->dims < 1 || rows < 1 || cols < 1 || rows > INT64_MAX / 8 / cols)
        return checkpoint_problem(problem, size, "'%.80s' (%s): its shape is none of a tensor of 1 "
                                  "or 2 dimensions", t->name, kind);
    if (t->offset < 0 || t->count < 1 || t->count > rows * cols - t->offset)
        return checkpoint_problem(problem, size, "'%.80s' (%s): %" PRId64 " elements from %" PRId64
                                  " on do not lie in its %" PRId64, t->name, kind, t->count,
                                  t->offset, rows * cols);
    for (t->file = 0; t->file < c->file_count; t->file++) {
        checkpoint_file_name(name, sizeof name, t->file);
        if (strcmp(name, t->file_name) == 0) break;
    }
    if (t->file == c->file_count || (t->file == 0) != (t->kind == STATE_WEIGHT))
        return checkpoint_problem(problem, size, "'%.80s' (%s) cannot be in '%.80s'", t->name, kind,
                                  t->file_name);
    return true;
}

static inline int checkpoint_by_run(const void* a, const void* b) {
    const CheckpointTensor* x = *(const CheckpointTensor* const*)a;
    const CheckpointTensor* y = *(const CheckpointTensor* const*)b;
    int order = strcmp(x->name, y->name);
    if (order) return order;
    if (x->kind != y->kind) return x->kind < y->kind ? -1 : 1;
    if (x->offset != y->offset) return x->offset < y->offset ? -1 : 1;
    return (x->file > y->file) - (x->file < y->file);
}

// The lines of one name and kind, by offset: one shape, every element once; gradients, of which
// there are partial sums, at least once.
static inline bool checkpoint_check_runs(CheckpointTensor* const* runs, int count, char* problem,
                                         size_t size) {
    const CheckpointTensor* t = runs[0];
    const char* kind = STATE_KIND_WORD[t->kind];
    int64_t covered = 0;
    for (int i = 0; i < count; i++) {
        const CheckpointTensor* run = runs[i];
        if (run->type != t->type || run->dims != t->dims || run->shape[0] != t->shape[0] ||
            run->shape[1] != t->shape[1])
            return checkpoint_problem(problem, size, "'%.80s' (%s) has another shape or dtype in "
                                      "%s than in %s", t->name, kind, run->file_name, t->file_name);
        for (int k = 0; k < i; k++)
            if (runs[k]->file == run->file)
                return checkpoint_problem(problem, size, "'%.80s' (%s) is in %s twice", t->name,
                                          kind, run->file_name);
        if (run->offset > covered || (run->offset < covered && t->kind != STATE_GRAD))
            return checkpoint_problem(problem, size, "'%.80s' (%s): the run in %s starts at "
                                      "element %" PRId64 ", what comes before it ends at %" PRId64,
                                      t->name, kind, run->file_name, run->offset, covered);
        if (run->offset + run->count > covered) covered = run->offset + run->count;
    }
    if (covered == checkpoint_elements(t)) return true;
    return checkpoint_problem(problem, size, "'%.80s' (%s): its files hold %" PRId64 " elements of "
                              "%" PRId64, t->name, kind, covered, checkpoint_elements(t));
}

static inline bool checkpoint_check_tables(Checkpoint* c, char* problem, size_t size) {
    char name[64];
    if (c->info.step < 0 || c->info.ranks < 1 || c->file_count != c->info.ranks + 1)
        return checkpoint_problem(problem, size, "step %" PRId64 ", %d ranks and %d files do not "
                                  "go together", c->info.step, c->info.ranks, c->file_count);
    for (int i = 0; i < c->file_count; i++) {
        checkpoint_file_name(name, sizeof name, i);
        if (strcmp(c->files[i].name, name) != 0)
            return checkpoint_problem(problem, size, "the list of files has '%.80s', expected %s",
                                      c->files[i].name, name);
    }
    for (int i = 0; i < c->count; i++)
        if (!checkpoint_check_tensor(c, &c->tensors[i], problem, size)) return false;
    CheckpointTensor** sorted = (CheckpointTensor**)host_alloc((size_t)c->count, sizeof *sorted);
    for (int i = 0; i < c->count; i++) sorted[i] = &c->tensors[i];
    qsort(sorted, (size_t)c->count, sizeof *sorted, checkpoint_by_run);
    bool ok = true;
    for (int i = 0, end; i < c->count && ok; i = end) {
        for (end = i + 1; end < c->count && sorted[end]->kind == sorted[i]->kind &&
                          strcmp(sorted[end]->name, sorted[i]->name) == 0;) end++;
        ok = checkpoint_check_runs(sorted + i, end - i, problem, size);
    }
    free(sorted);
    return ok;
}

static inline void checkpoint_key(char* key, size_t size, const char* name, StateKind kind) {
    snprintf(key, size, "%s%s", name, STATE_KIND_SUFFIX[kind]);
}

// The crc32 of n bytes of a file; false with errno set.
static inline bool checkpoint_crc_of(int fd, size_t at, size_t n, uint32_t* crc) {
    size_t room = n < CHECKPOINT_CHUNK ? n : CHECKPOINT_CHUNK;
    unsigned char* part = (unsigned char*)host_alloc(room, 1);
    bool ok = true;
    *crc = 0;
    for (size_t done = 0; done < n && ok;) {
        size_t bytes = n - done < room ? n - done : room;
        ok = file_get(fd, part, bytes, at + done);
        if (ok) *crc = checkpoint_crc(*crc, part, bytes);
        done += bytes;
    }
    free(part);
    return ok;
}

static inline bool checkpoint_damaged(char* problem, size_t size, const char* file,
                                      const CheckpointTensor* t, uint32_t found) {
    return checkpoint_problem(problem, size, "%s: '%.80s' (%s) has crc32 %08x, the manifest says "
                              "%08x: it was changed or damaged", file, t->name,
                              STATE_KIND_WORD[t->kind], found, t->crc);
}

static inline bool checkpoint_unreadable(char* problem, size_t size, const char* file, int error) {
    return checkpoint_problem(problem, size, "%s cannot be read: %s (errno %d)", file,
                              strerror(error), error);
}

// The tensor in the file that a line speaks of; NULL: there is none, or another one.
static inline const SafeTensor* checkpoint_find(const SafeFile* f, const CheckpointTensor* t) {
    char key[512];
    checkpoint_key(key, sizeof key, t->name, t->kind);
    const SafeTensor* s = safetensors_find(f, key);
    bool whole = t->count == checkpoint_elements(t);
    int dims = whole ? t->dims : 1;
    if (!s || s->type != t->type || s->dims != dims) return NULL;
    if (s->shape[0] != (whole ? t->shape[0] : t->count)) return NULL;
    return dims == 1 || s->shape[1] == t->shape[1] ? s : NULL;
}

static inline bool checkpoint_check_file(const Checkpoint* c, int index, bool every_byte,
                                         char* problem, size_t size) {
    const CheckpointFile* file = &c->files[index];
    char path[CHECKPOINT_PATH + 64], why[400];
    SafeFile f;
    snprintf(path, sizeof path, "%s/%s", c->directory, file->name);
    if (!safetensors_scan(&f, path, why, sizeof why))
        return checkpoint_problem(problem, size, "%s: %s", file->name, why);
    bool ok = (int64_t)f.bytes == file->bytes;
    if (!ok)
        checkpoint_problem(problem, size, "%s has %zu bytes, the manifest says %" PRId64,
                           file->name, f.bytes, file->bytes);
    uint32_t crc = 0;
    if (ok && !checkpoint_crc_of(f.fd, 0, f.header_bytes, &crc))
        ok = checkpoint_unreadable(problem, size, file->name, errno);
    if (ok && crc != file->header)
        ok = checkpoint_problem(problem, size, "%s: its header has crc32 %08x, the manifest says "
                                "%08x: it was changed or damaged", file->name, crc, file->header);
    int count = 0;
    for (int i = 0; i < c->count && ok; i++) {
        const CheckpointTensor* t = &c->tensors[i];
        if (t->file != index) continue;
        count++;
        const SafeTensor* s = checkpoint_find(&f, t);
        if (!s) {
            ok = checkpoint_problem(problem, size, "%s has no '%.80s' (%s) as the manifest "
                                    "describes it", file->name, t->name, STATE_KIND_WORD[t->kind]);
        } else if (every_byte && !checkpoint_crc_of(f.fd, s->at, s->bytes, &crc)) {
            ok = checkpoint_unreadable(problem, size, file->name, errno);
        } else if (every_byte && crc != t->crc) {
            ok = checkpoint_damaged(problem, size, file->name, t, crc);
        }
    }
    if (ok && count != f.count)
        ok = checkpoint_problem(problem, size, "%s holds %d tensors, the manifest has %d of it",
                                file->name, f.count, count);
    safetensors_close(&f);
    return ok;
}

static inline int checkpoint_by_file(const void* a, const void* b) {
    const CheckpointTensor *x = (const CheckpointTensor*)a, *y = (const CheckpointTensor*)b;
    return (x->file > y->file) - (x->file < y->file);
}

static inline void checkpoint_close(Checkpoint* c) {
    free(c->files);
    free(c->tensors);
    free(c->text);
    free(c->flags);
    memset(c, 0, sizeof *c);
}

// False with the problem in words, and nothing held, if it is not whole. Unless every_byte, the
// tensors' bytes are left to checkpoint_read, which checks what it reads.
static inline bool checkpoint_try_open(Checkpoint* c, const char* directory, bool every_byte,
                                       char* problem, size_t size) {
    memset(c, 0, sizeof *c);
    size_t n = strlen(directory);
    while (n > 1 && directory[n - 1] == '/') n--;
    if (n >= sizeof c->directory)
        return checkpoint_problem(problem, size, "the path is too long");
    memcpy(c->directory, directory, n);
    bool ok = manifest_read(c, problem, size) && checkpoint_check_tables(c, problem, size);
    for (int i = 0; i < c->file_count && ok; i++)
        ok = checkpoint_check_file(c, i, every_byte, problem, size);
    if (c->count) qsort(c->tensors, (size_t)c->count, sizeof *c->tensors, checkpoint_by_file);
    if (!ok) checkpoint_close(c);
    return ok;
}

// Everything is checked, every byte by its crc32.
static inline bool checkpoint_open(Checkpoint* c, const char* directory, char* problem,
                                   size_t size) {
    return checkpoint_try_open(c, directory, true, problem, size);
}

// The newest valid one of a run; `report` gets a line for each that was refused: its path, and why.
static inline bool checkpoint_newest(Checkpoint* c, const char* out, char* report, size_t size) {
    char path[CHECKPOINT_PATH], problem[600];
    int64_t* steps;
    size_t used = 0;
    int count = checkpoint_steps(out, &steps);
    memset(c, 0, sizeof *c);
    report[0] = 0;
    if (count < 0) {
        snprintf(report, size, "%s/checkpoints cannot be listed: %s", out, strerror(errno));
        return false;
    }
    bool found = false;
    for (int i = 0; i < count && !found; i++) {
        checkpoint_path(path, sizeof path, out, steps[i]);
        found = checkpoint_open(c, path, problem, sizeof problem);
        if (found && c->info.step != steps[i]) {
            found = checkpoint_problem(problem, sizeof problem, "its manifest is of step %" PRId64,
                                       c->info.step);
            checkpoint_close(c);
        }
        if (found || used >= size) continue;
        used += (size_t)snprintf(report + used, size - used, "%s%s: %s", used ? "\n" : "", path,
                                 problem);
    }
    free(steps);
    return found;
}

// ---- reading: tensors ----------------------------------------------------------------------

// A run of a file to its place in `out`, or added to what is there. It is checked by its crc32.
static inline bool checkpoint_read_run(const Checkpoint* c, const CheckpointTensor* t, bool add,
                                       void* out, char* problem, size_t size) {
    const char* name = c->files[t->file].name;
    char path[CHECKPOINT_PATH + 64], why[400];
    SafeFile f;
    snprintf(path, sizeof path, "%s/%s", c->directory, name);
    if (!safetensors_scan(&f, path, why, sizeof why))
        return checkpoint_problem(problem, size, "%s: %s", name, why);
    const SafeTensor* s = checkpoint_find(&f, t);
    bool ok = s != NULL;
    if (!ok)
        checkpoint_problem(problem, size, "%s has no '%.80s' (%s) any more", name, t->name,
                           STATE_KIND_WORD[t->kind]);
    char* to = (char*)out + (size_t)t->offset * SAFE_TYPE_BYTES[t->type];
    size_t room = ok && s->bytes < CHECKPOINT_CHUNK ? s->bytes : CHECKPOINT_CHUNK;
    char* part = add ? (char*)host_alloc(room, 1) : NULL;
    uint32_t crc = 0;
    for (size_t done = 0; ok && done < s->bytes;) {
        size_t n = s->bytes - done < room ? s->bytes - done : room;
        char* place = add ? part : to + done;
        ok = safetensors_read(&f, s, place, done, n);
        if (!ok) {
            checkpoint_unreadable(problem, size, name, errno);
            break;
        }
        crc = checkpoint_crc(crc, place, n);
        float* sum = (float*)(to + done);
        for (size_t i = 0; add && i < n / sizeof(float); i++) sum[i] += ((const float*)part)[i];
        done += n;
    }
    if (ok && crc != t->crc) ok = checkpoint_damaged(problem, size, name, t, crc);
    free(part);
    safetensors_close(&f);
    return ok;
}

// A whole tensor in its logical shape. rank -1: from all files, a gradient as their sum in the
// order of ranks; else a gradient as that rank has it. False with the problem in words.
static inline bool checkpoint_read(Checkpoint* c, const char* name, StateKind kind, int rank,
                                   SafeType type, int dims, const int64_t* shape, void* out,
                                   char* problem, size_t size) {
    const char* word = STATE_KIND_WORD[kind];
    int64_t n = dims == 2 ? shape[0] * shape[1] : shape[0], read = 0;
    int runs = 0;
    bool parts = false;
    for (int i = 0; i < c->count; i++) {
        const CheckpointTensor* t = &c->tensors[i];
        if (t->kind != kind || (rank >= 0 && t->file != rank + 1) || strcmp(t->name, name) != 0)
            continue;
        if (t->type != type)
            return checkpoint_problem(problem, size, "'%s' (%s) is %s, expected %s", name, word,
                                      SAFE_TYPE_NAME[t->type], SAFE_TYPE_NAME[type]);
        if (t->dims != dims || t->shape[0] != shape[0] || (dims == 2 && t->shape[1] != shape[1]))
            return checkpoint_problem(problem, size, "'%s' (%s) has shape (%" PRId64 ", %" PRId64
                                      "), the flags ask for (%" PRId64 ", %" PRId64 ")", name, word,
                                      t->shape[0], t->dims == 2 ? t->shape[1] : 1, shape[0],
                                      dims == 2 ? shape[1] : 1);
        parts = parts || t->count != n;
        read += t->count;
        runs++;
    }
    if (runs == 0)
        return checkpoint_problem(problem, size, "no '%s' (%s)%s; is it of another --layers or "
                                  "recipe?", name, word, rank >= 0 ? " of this rank" : "");
    if (rank >= 0 && parts)
        return checkpoint_problem(problem, size, "'%s' (%s): rank %d has %" PRId64 " elements of "
                                  "%" PRId64, name, word, rank, read, n);
    bool sum = kind == STATE_GRAD && runs > 1;
    if (sum && type != SAFE_F32)
        return checkpoint_problem(problem, size, "'%s' (%s) is %s; sums are of F32", name, word,
                                  SAFE_TYPE_NAME[type]);
    if (sum && parts) memset(out, 0, (size_t)n * SAFE_TYPE_BYTES[type]);
    bool add = sum && parts;
    for (int i = 0; i < c->count; i++) {        // they are sorted by file
        const CheckpointTensor* t = &c->tensors[i];
        if (t->kind != kind || (rank >= 0 && t->file != rank + 1) || strcmp(t->name, name) != 0)
            continue;
        if (!checkpoint_read_run(c, t, add, out, problem, size)) return false;
        add = sum;
    }
    return true;
}
