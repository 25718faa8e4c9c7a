/*
Named tensors in a file: the safetensors format, written and read.

    u64 n, little-endian | n bytes of JSON, padded with spaces to a multiple of 8 | the data

    {"__metadata__": {"key": "text"},
     "name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}

Offsets count from the end of the JSON; tensors are row-major, little-endian and cover the data
without gap or overlap. The writer puts wider types first, so that every tensor is aligned to its
items, fills a file of another name, and renames it when the disk has it: a killed run leaves the
old file or the new one, not a part. It goes to the disk by system calls alone, each of which may be
interrupted, do a part of its work, or fail.

The reader trusts nothing: lengths, nesting, strings, numbers, types, shapes, offsets and repeated
names are checked before a byte of data is looked at, and what is wrong is named. The data is mapped
and valid until safetensors_close; or, where a disk that cannot be read must be a message and no
SIGBUS, it stays in the file, to be read part by part (safetensors_scan, safetensors_read).

test        test/test_services.c: safetensors
source      https://github.com/huggingface/safetensors (format)
*/
#pragma once
#include "json.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

// S(constant, name in the file, bytes of an item)
#define SAFE_TYPES(S) \
    S(SAFE_F32, "F32", 4) S(SAFE_BF16, "BF16", 2) S(SAFE_I32, "I32", 4) S(SAFE_U16, "U16", 2) \
    S(SAFE_U8, "U8", 1) S(SAFE_I64, "I64", 8) S(SAFE_F16, "F16", 2) S(SAFE_F64, "F64", 8) \
    S(SAFE_I8, "I8", 1) S(SAFE_I16, "I16", 2) S(SAFE_U32, "U32", 4) S(SAFE_U64, "U64", 8) \
    S(SAFE_BOOL, "BOOL", 1) S(SAFE_F8_E4M3, "F8_E4M3", 1) S(SAFE_F8_E5M2, "F8_E5M2", 1)

#define SAFE_CONSTANT(constant, name, bytes) constant,
#define SAFE_NAME(constant, name, bytes)     name,
#define SAFE_BYTES(constant, name, bytes)    bytes,
typedef enum SafeType { SAFE_TYPES(SAFE_CONSTANT) SAFE_TYPE_COUNT } SafeType;

static const char* const SAFE_TYPE_NAME[] = { SAFE_TYPES(SAFE_NAME) };
static const size_t SAFE_TYPE_BYTES[] = { SAFE_TYPES(SAFE_BYTES) };

enum { SAFE_MAX_DIMS = 8 };

typedef struct SafeTensor {
    const char* name;
    SafeType type;
    int dims;
    int64_t shape[SAFE_MAX_DIMS];
    const void* data;           // NULL after safetensors_scan
    size_t bytes;               // set by the reader; the writer computes it
    size_t at;                  // set by the reader: its first byte in the file
} SafeTensor;

static inline int64_t safe_elements(const SafeTensor* t) {
    int64_t n = 1;
    for (int i = 0; i < t->dims; i++) n *= t->shape[i];
    return n;
}

// ---- system calls --------------------------------------------------------------------------

// They return false, or -1, with errno set. A signal that interrupts them is no error.

static inline int file_open(const char* path, int flags) {
    int fd;
    do fd = open(path, flags | O_CLOEXEC, 0666);
    while (fd < 0 && errno == EINTR);
    return fd;
}

static inline bool file_put(int fd, const void* data, size_t n) {
    const char* from = (const char*)data;
    while (n > 0) {
        ssize_t done = write(fd, from, n);
        if (done < 0 && errno == EINTR) continue;
        if (done == 0) errno = ENOSPC;      // no system says more than that by it
        if (done <= 0) return false;
        from += done;
        n -= (size_t)done;
    }
    return true;
}

static inline bool file_get(int fd, void* data, size_t n, size_t at) {
    char* to = (char*)data;
    while (n > 0) {
        ssize_t done = pread(fd, to, n, (off_t)at);
        if (done < 0 && errno == EINTR) continue;
        if (done == 0) errno = ENODATA;
        if (done <= 0) return false;
        to += done;
        at += (size_t)done;
        n -= (size_t)done;
    }
    return true;
}

static inline bool file_sync(int fd) {
    int result;
    do result = fsync(fd);
    while (result != 0 && errno == EINTR);
    return result == 0;
}

// A close that is interrupted has closed; nothing is lost by it, because fsync came before.
static inline bool file_close(int fd) {
    return close(fd) == 0 || errno == EINTR;
}

// So that a name outlives a power failure. File systems that cannot do it say EINVAL.
static inline bool directory_sync(const char* path) {
    int fd = file_open(path, O_RDONLY | O_DIRECTORY);
    if (fd < 0) return false;
    bool ok = file_sync(fd) || errno == EINVAL;
    int error = errno;
    bool closed = file_close(fd);
    if (!ok) errno = error;
    return ok && closed;
}

// ---- writing -------------------------------------------------------------------------------

// What stands before the data, and the order of the data.
typedef struct SafeLayout {
    char* header;               // u64 n and the JSON
    size_t header_bytes, data_bytes;
    int count;
    int* order;                 // the tensor that comes as the i-th
} SafeLayout;

// metadata: key, value, key, value, ...; `pairs` of them.
static inline void safe_layout(SafeLayout* l, const SafeTensor* tensors, int count,
                               const char* const* metadata, int pairs) {
    memset(l, 0, sizeof *l);
    uint64_t n = 0;
    FILE* text = open_memstream(&l->header, &l->header_bytes);
    REQUIRE(text, "no memory for the header of %d tensors: %s", count, strerror(errno));
    const char* comma = "";
    fwrite(&n, sizeof n, 1, text);
    fputc('{', text);
    if (pairs > 0) {
        fputs("\"__metadata__\":{", text);
        for (int i = 0; i < pairs; i++) {
            fputs(i ? "," : "", text);
            json_string(text, metadata[2 * i], strlen(metadata[2 * i]));
            fputc(':', text);
            json_string(text, metadata[2 * i + 1], strlen(metadata[2 * i + 1]));
        }
        fputc('}', text);
        comma = ",";
    }
    l->order = (int*)host_alloc((size_t)count, sizeof(int));
    for (size_t width = 8; width >= 1; width /= 2) {
        for (int i = 0; i < count; i++) {
            const SafeTensor* t = &tensors[i];
            if (SAFE_TYPE_BYTES[t->type] != width) continue;
            l->order[l->count++] = i;
            size_t bytes = (size_t)safe_elements(t) * width;
            fputs(comma, text);
            comma = ",";
            json_string(text, t->name, strlen(t->name));
            fprintf(text, ":{\"dtype\":\"%s\",\"shape\":[", SAFE_TYPE_NAME[t->type]);
            for (int d = 0; d < t->dims; d++)
                fprintf(text, "%s%" PRId64, d ? "," : "", t->shape[d]);
            fprintf(text, "],\"data_offsets\":[%zu,%zu]}", l->data_bytes, l->data_bytes + bytes);
            l->data_bytes += bytes;
        }
    }
    fputc('}', text);
    while (fflush(text) == 0 && l->header_bytes % 8) fputc(' ', text);
    REQUIRE(fclose(text) == 0, "no memory for the header of %d tensors: %s", count,
            strerror(errno));
    n = l->header_bytes - sizeof n;
    memcpy(l->header, &n, sizeof n);
}

static inline void safe_layout_free(SafeLayout* l) {
    free(l->header);
    free(l->order);
    memset(l, 0, sizeof *l);
}

// Puts all bytes of tensor i into the file, by file_put; false with errno set.
typedef bool (*SafePut)(void* context, int fd, int i);

// Fills a file and sees it onto the disk. False with errno set: *failed says at what, and the file
// is gone.
static inline bool safe_fill(const char* path, const SafeLayout* l, SafePut put, void* context,
                             const char** failed) {
    *failed = "cannot be created";
    int fd = file_open(path, O_WRONLY | O_CREAT | O_TRUNC);
    if (fd < 0) return false;
    *failed = "cannot be written";
    bool ok = file_put(fd, l->header, l->header_bytes);
    for (int i = 0; i < l->count && ok; i++) ok = put(context, fd, l->order[i]);
    if (ok) {
        *failed = "cannot be brought onto the disk (fsync)";
        ok = file_sync(fd);
    }
    int error = errno;
    bool closed = file_close(fd);
    if (ok && !closed) {
        *failed = "cannot be closed";
        error = errno;
        ok = false;
    }
    if (!ok) unlink(path);
    errno = error;
    return ok;
}

// Bytes of tensor i, for tensors whose data is NULL. They are used before the next call: a model's
// weights need not lie in host memory all at once.
typedef const void* (*SafeFetch)(void* context, int i);

typedef struct SafeSource {
    const SafeTensor* tensors;
    SafeFetch fetch;
    void* context;
} SafeSource;

static inline bool safe_put_tensor(void* context, int fd, int i) {
    const SafeSource* s = (const SafeSource*)context;
    const SafeTensor* t = &s->tensors[i];
    size_t bytes = (size_t)safe_elements(t) * SAFE_TYPE_BYTES[t->type];
    if (bytes == 0) return true;
    return file_put(fd, t->data ? t->data : s->fetch(s->context, i), bytes);
}

// False with the problem in words if the file cannot be written; then what stood there before is
// untouched.
static inline bool safetensors_try_write_from(const char* path, const SafeTensor* tensors,
                                              int count, const char* const* metadata, int pairs,
                                              SafeFetch fetch, void* context, char* problem,
                                              size_t problem_size) {
    // The process id keeps two runs that write the same path from filling each other's file.
    char part[4096], folder[4096];
    int length = snprintf(part, sizeof part, "%s.%ld.part", path, (long)getpid());
    if (length < 0 || (size_t)length >= sizeof part) {
        snprintf(problem, problem_size, "the path is too long");
        return false;
    }
    const char* slash = strrchr(path, '/');
    snprintf(folder, sizeof folder, "%.*s", slash ? (int)(slash - path + 1) : 1,
             slash ? path : ".");
    SafeSource source = { tensors, fetch, context };
    SafeLayout layout;
    safe_layout(&layout, tensors, count, metadata, pairs);
    const char* failed;
    bool ok = safe_fill(part, &layout, safe_put_tensor, &source, &failed);
    if (ok && rename(part, path) != 0) {
        failed = "cannot be given its name (rename)";
        ok = false;
        int error = errno;
        unlink(part);
        errno = error;
    }
    if (!ok) {
        snprintf(problem, problem_size, "%s: %s (errno %d)\nit takes %zu bytes; nothing was saved, "
                 "what stood there before is untouched", failed, strerror(errno), errno,
                 layout.header_bytes + layout.data_bytes);
    } else if (!directory_sync(folder)) {
        snprintf(problem, problem_size, "its directory cannot be brought onto the disk (fsync): %s "
                 "(errno %d)", strerror(errno), errno);
        ok = false;
    }
    safe_layout_free(&layout);
    return ok;
}

static inline void safetensors_write_from(const char* path, const SafeTensor* tensors, int count,
                                          const char* const* metadata, int pairs, SafeFetch fetch,
                                          void* context) {
    char problem[512];
    if (!safetensors_try_write_from(path, tensors, count, metadata, pairs, fetch, context, problem,
                                    sizeof problem)) die("%s: %s", path, problem);
}

static inline void safetensors_write(const char* path, const SafeTensor* tensors, int count,
                                     const char* const* metadata, int pairs) {
    safetensors_write_from(path, tensors, count, metadata, pairs, NULL, NULL);
}

// ---- reading: JSON of exactly this form ----------------------------------------------------

typedef struct SafeFile {
    const char* path;           // own copy
    int count;
    SafeTensor* tensors;        // in the file's order
    int pairs;
    char** metadata;            // key, value, key, value, ...
    char* strings;              // the JSON; its strings have been ended by 0 where they stand
    size_t tensor_room, pair_room;
    size_t header_bytes, bytes; // 8 + n; of the whole file
    void* map;
    int fd;                     // of a file that is not mapped, or -1
} SafeFile;

static inline bool safe_fail(JsonReader* j, const char* fmt, ...)
    __attribute__((format(printf, 2, 3)));

// Always false, so that `return safe_fail(...)` reads as what it is.
static inline bool safe_fail(JsonReader* j, const char* fmt, ...) {
    va_list args;
    va_start(args, fmt);
    vsnprintf(j->error, sizeof j->error, fmt, args);
    va_end(args);
    return false;
}

// A string that can be used as text: where its closing quote stood, there is a 0.
static inline bool safe_string(JsonReader* j, char** out) {
    unsigned char* start;
    size_t length;
    if (!json_read_string(j, &start, &length)) return false;
    if (memchr(start, 0, length)) return safe_fail(j, "a zero byte inside a string");
    start[length] = 0;
    *out = (char*)start;
    return true;
}

// "[" numbers "]", at most `most` of them, none negative.
static inline bool safe_numbers(JsonReader* j, int64_t* v, int most, int* count) {
    int more;
    *count = 0;
    if (!json_read_byte(j, '[', "'['")) return false;
    while ((more = json_more(j, ']', *count)) > 0) {
        if (*count == most) return safe_fail(j, "more than %d numbers in a list", most);
        json_read_space(j);
        size_t from = j->at;
        if (!json_read_whole(j, &v[*count])) return false;
        if (v[*count] < 0) return json_fail(j, from, "a whole number that is not negative");
        ++*count;
    }
    return more == 0;
}

static inline bool safe_type(JsonReader* j, SafeType* type) {
    char* word;
    int i = 0;
    if (!safe_string(j, &word)) return false;
    while (i < SAFE_TYPE_COUNT && strcmp(SAFE_TYPE_NAME[i], word) != 0) i++;
    if (i == SAFE_TYPE_COUNT) return safe_fail(j, "unknown dtype '%.40s'", word);
    *type = (SafeType)i;
    return true;
}

static inline bool safe_metadata(JsonReader* j, SafeFile* f) {
    int more;
    if (!json_read_byte(j, '{', "'{'")) return false;
    while ((more = json_more(j, '}', f->pairs)) > 0) {
        f->metadata = (char**)array_grow(f->metadata, &f->pair_room, 2 * (size_t)f->pairs + 2,
                                         sizeof(char*));
        if (!safe_string(j, &f->metadata[2 * f->pairs]) || !json_read_byte(j, ':', "':'") ||
            !safe_string(j, &f->metadata[2 * f->pairs + 1])) return false;
        f->pairs++;
    }
    return more == 0;
}

// {"dtype": .., "shape": .., "data_offsets": ..} in any order, each once, nothing else.
static inline bool safe_entry(JsonReader* j, SafeTensor* t, size_t header_bytes,
                              int64_t data_bytes) {
    bool have_type = false, have_shape = false, have_offsets = false;
    int64_t offsets[2];
    int count, more;
    if (!json_read_byte(j, '{', "'{'")) return false;
    for (int i = 0; (more = json_more(j, '}', i)) > 0; i++) {
        char* key;
        if (!safe_string(j, &key) || !json_read_byte(j, ':', "':'")) return false;
        if (strcmp(key, "dtype") == 0 && !have_type) {
            have_type = true;
            if (!safe_type(j, &t->type)) return false;
        } else if (strcmp(key, "shape") == 0 && !have_shape) {
            have_shape = true;
            if (!safe_numbers(j, t->shape, SAFE_MAX_DIMS, &t->dims)) return false;
        } else if (strcmp(key, "data_offsets") == 0 && !have_offsets) {
            have_offsets = true;
            if (!safe_numbers(j, offsets, 2, &count)) return false;
            if (count != 2)
                return safe_fail(j, "tensor '%.80s': data_offsets has %d numbers, expected 2",
                                 t->name, count);
        } else {
            return safe_fail(j, "tensor '%.80s': key '%.40s' is unknown or repeated", t->name, key);
        }
    }
    if (more < 0) return false;
    if (!have_type || !have_shape || !have_offsets)
        return safe_fail(j, "tensor '%.80s' lacks dtype, shape or data_offsets", t->name);
    if (offsets[0] > offsets[1] || offsets[1] > data_bytes) {
        return safe_fail(j,
                         "tensor '%.80s': data_offsets [%" PRId64 ", %" PRId64
                         "] do not lie in the %" PRId64 " bytes of data",
                         t->name, offsets[0], offsets[1], data_bytes);
    }
    int64_t left = offsets[1] - offsets[0], width = (int64_t)SAFE_TYPE_BYTES[t->type], n = width;
    for (int i = 0; i < t->dims; i++) {
        if (t->shape[i] && n > INT64_MAX / t->shape[i])
            return safe_fail(j, "tensor '%.80s': its shape overflows", t->name);
        n *= t->shape[i];
    }
    if (n != left) {
        return safe_fail(
            j, "tensor '%.80s': shape and dtype make %" PRId64 " bytes, data_offsets %" PRId64,
            t->name, n, left);
    }
    if (offsets[0] % width) {
        return safe_fail(
            j, "tensor '%.80s' starts at byte %" PRId64 ", not a multiple of its item's %" PRId64,
            t->name, offsets[0], width);
    }
    t->at = header_bytes + (size_t)offsets[0];
    t->bytes = (size_t)left;
    return true;
}

static inline int safe_by_name(const void* a, const void* b) {
    return strcmp((*(const SafeTensor* const*)a)->name, (*(const SafeTensor* const*)b)->name);
}

static inline int safe_by_place(const void* a, const void* b) {
    const SafeTensor* x = *(const SafeTensor* const*)a;
    const SafeTensor* y = *(const SafeTensor* const*)b;
    if (x->at != y->at) return x->at < y->at ? -1 : 1;
    return (x->bytes > y->bytes) - (x->bytes < y->bytes);
}

// No name twice, no gap, no overlap.
static inline bool safe_check_cover(JsonReader* j, SafeFile* f) {
    const SafeTensor** sorted = (const SafeTensor**)host_alloc((size_t)f->count,
                                                               sizeof(SafeTensor*));
    for (int i = 0; i < f->count; i++) sorted[i] = &f->tensors[i];
    bool ok = true;
    qsort(sorted, (size_t)f->count, sizeof *sorted, safe_by_name);
    for (int i = 1; i < f->count && ok; i++) {
        if (strcmp(sorted[i - 1]->name, sorted[i]->name) == 0)
            ok = safe_fail(j, "tensor '%.80s' is there twice", sorted[i]->name);
    }
    qsort(sorted, (size_t)f->count, sizeof *sorted, safe_by_place);
    size_t covered = 0;
    for (int i = 0; i < f->count && ok; i++) {
        size_t begin = sorted[i]->at - f->header_bytes;
        if (begin != covered) {
            ok = safe_fail(j,
                           "tensor '%.80s' starts at byte %zu of the data, the one before ends "
                           "at %zu",
                           sorted[i]->name, begin, covered);
        }
        covered = begin + sorted[i]->bytes;
    }
    if (ok && covered != f->bytes - f->header_bytes) {
        ok = safe_fail(j, "the tensors make %zu bytes, the file has %zu", covered,
                       f->bytes - f->header_bytes);
    }
    free(sorted);
    return ok;
}

static inline bool safe_parse(SafeFile* f, JsonReader* j) {
    bool have_metadata = false;
    int more;
    if (!json_read_byte(j, '{', "'{'")) return false;
    for (int i = 0; (more = json_more(j, '}', i)) > 0; i++) {
        char* name;
        if (!safe_string(j, &name) || !json_read_byte(j, ':', "':'")) return false;
        if (strcmp(name, "__metadata__") == 0) {
            if (have_metadata) return safe_fail(j, "__metadata__ is there twice");
            have_metadata = true;
            if (!safe_metadata(j, f)) return false;
            continue;
        }
        f->tensors = (SafeTensor*)array_grow(f->tensors, &f->tensor_room, (size_t)f->count + 1,
                                             sizeof(SafeTensor));
        SafeTensor* t = &f->tensors[f->count];
        memset(t, 0, sizeof *t);
        t->name = name;
        if (!safe_entry(j, t, f->header_bytes, (int64_t)(f->bytes - f->header_bytes))) return false;
        f->count++;
    }
    if (more < 0) return false;
    json_read_space(j);
    if (j->at != j->n) return json_fail(j, j->at, "the end of the header");
    return safe_check_cover(j, f);
}

// ---- reading: the file ---------------------------------------------------------------------

static inline void safetensors_close(SafeFile* f) {
    if (f->map) munmap(f->map, f->bytes);
    if (f->path && f->fd >= 0) close(f->fd);
    free(f->tensors);
    free(f->metadata);
    free(f->strings);
    free((void*)f->path);
    memset(f, 0, sizeof *f);
    f->fd = -1;
}

static inline bool safe_read_header(SafeFile* f, char* problem, size_t problem_size) {
    uint64_t json_bytes = 0;
    struct stat info;
    f->fd = file_open(f->path, O_RDONLY);
    if (f->fd < 0 || fstat(f->fd, &info) != 0) {
        snprintf(problem, problem_size, "cannot be opened: %s", strerror(errno));
        return false;
    }
    f->bytes = (size_t)info.st_size;
    if (!S_ISREG(info.st_mode) || f->bytes < sizeof json_bytes) {
        snprintf(problem, problem_size, "%zu bytes: too short for a safetensors file", f->bytes);
        return false;
    }
    bool read = file_get(f->fd, &json_bytes, sizeof json_bytes, 0);
    // An odd header length would leave every tensor misaligned in memory; the format pads it to 8.
    if (read && (json_bytes > f->bytes - sizeof json_bytes || json_bytes > (100u << 20) ||
                 json_bytes % 8 != 0)) {
        snprintf(problem, problem_size, "the header length is %" PRIu64 " in a file of %zu bytes; "
                 "is this a safetensors file?", json_bytes, f->bytes);
        return false;
    }
    f->header_bytes = sizeof json_bytes + (size_t)json_bytes;
    f->strings = (char*)host_alloc((size_t)json_bytes + 1, 1);
    if (!read || !file_get(f->fd, f->strings, (size_t)json_bytes, sizeof json_bytes)) {
        snprintf(problem, problem_size, "cannot be read: %s", strerror(errno));
        return false;
    }
    JsonReader j = { (unsigned char*)f->strings, (size_t)json_bytes, 0, "" };
    if (safe_parse(f, &j)) return true;
    snprintf(problem, problem_size, "header, byte %zu: %s", j.at, j.error);
    return false;
}

// Like safetensors_try_open, but the data is left where it is: safetensors_read gets it.
static inline bool safetensors_scan(SafeFile* f, const char* path, char* problem,
                                    size_t problem_size) {
    memset(f, 0, sizeof *f);
    f->fd = -1;
    f->path = strdup(path);
    REQUIRE(f->path, "%s: no memory for its path", path);
    if (safe_read_header(f, problem, problem_size)) return true;
    safetensors_close(f);
    return false;
}

// n bytes of a tensor, from byte `from` of it on; false with errno set.
static inline bool safetensors_read(const SafeFile* f, const SafeTensor* t, void* out, size_t from,
                                    size_t n) {
    return file_get(f->fd, out, n, t->at + from);
}

// False with the problem in words if the file cannot be read or is not well-formed; then nothing is
// held.
static inline bool safetensors_try_open(SafeFile* f, const char* path, char* problem,
                                        size_t problem_size) {
    if (!safetensors_scan(f, path, problem, problem_size)) return false;
    f->map = mmap(NULL, f->bytes, PROT_READ, MAP_PRIVATE, f->fd, 0);
    if (f->map == MAP_FAILED) {
        f->map = NULL;
        snprintf(problem, problem_size, "cannot be mapped: %s", strerror(errno));
        safetensors_close(f);
        return false;
    }
    close(f->fd);
    f->fd = -1;
    for (int i = 0; i < f->count; i++)
        f->tensors[i].data = (const char*)f->map + f->tensors[i].at;
    return true;
}

static inline void safetensors_open(SafeFile* f, const char* path) {
    char problem[512];
    if (!safetensors_try_open(f, path, problem, sizeof problem)) die("%s: %s", path, problem);
}

static inline const SafeTensor* safetensors_find(const SafeFile* f, const char* name) {
    for (int i = 0; i < f->count; i++) {
        if (strcmp(f->tensors[i].name, name) == 0) return &f->tensors[i];
    }
    return NULL;
}

// The data of a tensor that must be there with this type and number of elements.
static inline const void* safetensors_data(const SafeFile* f, const char* name, SafeType type,
                                           int64_t elements) {
    const SafeTensor* t = safetensors_find(f, name);
    REQUIRE(t, "%s: no tensor '%s' among its %d", f->path, name, f->count);
    REQUIRE(t->type == type, "%s: tensor '%s' is %s, expected %s", f->path, name,
            SAFE_TYPE_NAME[t->type], SAFE_TYPE_NAME[type]);
    REQUIRE(safe_elements(t) == elements,
            "%s: tensor '%s' has %" PRId64 " elements, expected %" PRId64, f->path, name,
            safe_elements(t), elements);
    return t->data;
}

// NULL if the file has no such key.
static inline const char* safetensors_metadata(const SafeFile* f, const char* key) {
    for (int i = 0; i < f->pairs; i++) {
        if (strcmp(f->metadata[2 * i], key) == 0) return f->metadata[2 * i + 1];
    }
    return NULL;
}
