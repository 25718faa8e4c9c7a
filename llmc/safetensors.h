/*
Named tensors in a file: the safetensors format, written and read.

    u64 n, little-endian | n bytes of JSON, padded with spaces to a multiple of 8 | the data

    {"__metadata__": {"key": "text"},
     "name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}

Offsets count from the end of the JSON; tensors are row-major, little-endian and cover the data
without gap or overlap. The writer puts wider types first, so that every tensor is aligned to its
items, fills a file of another name, and renames it when the disk has it: a killed run leaves the
old file or the new one, not a part.

The reader trusts nothing: lengths, nesting, strings, numbers, types, shapes, offsets and repeated
names are checked before a byte of data is looked at, and what is wrong is named. Data is mapped,
not copied: it is valid until safetensors_close.

test        test/test_services.c: safetensors
source      https://github.com/huggingface/safetensors (format)
*/
#pragma once
#include "common.h"

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
    const void* data;
    size_t bytes;               // set by the reader; the writer computes it
} SafeTensor;

static inline int64_t safe_elements(const SafeTensor* t) {
    int64_t n = 1;
    for (int i = 0; i < t->dims; i++) n *= t->shape[i];
    return n;
}

// ---- writing -------------------------------------------------------------------------------

// Bytes of tensor i, for tensors whose data is NULL. They are used before the next call: a model's
// weights need not lie in host memory all at once.
typedef const void* (*SafeFetch)(void* context, int i);

// metadata: key, value, key, value, ...; `pairs` of them.
static inline void safetensors_write_from(const char* path, const SafeTensor* tensors, int count,
                                          const char* const* metadata, int pairs, SafeFetch fetch,
                                          void* context) {
    char* json = NULL;
    size_t json_bytes = 0;
    FILE* text = open_memstream(&json, &json_bytes);
    REQUIRE(text, "%s: no memory for the header: %s", path, strerror(errno));
    const char* comma = "";
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
    int* order = (int*)host_alloc((size_t)count, sizeof(int));
    int placed = 0;
    size_t offset = 0;
    for (size_t width = 8; width >= 1; width /= 2) {
        for (int i = 0; i < count; i++) {
            const SafeTensor* t = &tensors[i];
            if (SAFE_TYPE_BYTES[t->type] != width) continue;
            order[placed++] = i;
            size_t bytes = (size_t)safe_elements(t) * width;
            fputs(comma, text);
            comma = ",";
            json_string(text, t->name, strlen(t->name));
            fprintf(text, ":{\"dtype\":\"%s\",\"shape\":[", SAFE_TYPE_NAME[t->type]);
            for (int d = 0; d < t->dims; d++)
                fprintf(text, "%s%" PRId64, d ? "," : "", t->shape[d]);
            fprintf(text, "],\"data_offsets\":[%zu,%zu]}", offset, offset + bytes);
            offset += bytes;
        }
    }
    fputc('}', text);
    fflush(text);
    while (json_bytes % 8) {
        fputc(' ', text);
        fflush(text);
    }
    REQUIRE(fclose(text) == 0, "%s: no memory for the header: %s", path, strerror(errno));

    // The process id keeps two runs that write the same path from filling each other's file.
    char part[4096];
    int length = snprintf(part, sizeof part, "%s.%ld.part", path, (long)getpid());
    REQUIRE(length > 0 && (size_t)length < sizeof part, "%s: the path is too long", path);
    FILE* file = fopen(part, "wb");
    REQUIRE(file, "%s: cannot be created: %s", part, strerror(errno));
    uint64_t n = json_bytes;
    bool ok = fwrite(&n, sizeof n, 1, file) == 1 && fwrite(json, 1, json_bytes, file) == json_bytes;
    for (int i = 0; i < count && ok; i++) {
        const SafeTensor* t = &tensors[order[i]];
        size_t bytes = (size_t)safe_elements(t) * SAFE_TYPE_BYTES[t->type];
        const void* data = t->data || bytes == 0 ? t->data : fetch(context, order[i]);
        ok = bytes == 0 || fwrite(data, 1, bytes, file) == bytes;
    }
    ok = ok && fflush(file) == 0 && fsync(fileno(file)) == 0;
    int error = errno;
    ok = fclose(file) == 0 && ok;
    if (!ok) {
        unlink(part);
        die("%s: writing %zu bytes: %s\nnothing was saved; what stood there before is untouched",
            path, 8 + json_bytes + offset, strerror(error));
    }
    if (rename(part, path) != 0) {
        error = errno;
        unlink(part);
        die("%s: cannot be renamed to %s: %s", part, path, strerror(error));
    }
    free(order);
    free(json);
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
    void* map;
    size_t map_bytes;
    char* strings;              // names, keys and values, each ended by 0
    char* strings_end;          // where the next goes; as much room as the JSON takes is enough
} SafeFile;

typedef struct SafeCursor {
    const char* at;
    const char* end;
    const char* begin;
    char* problem;
    size_t problem_size;
} SafeCursor;

static inline bool safe_fail(SafeCursor* c, const char* fmt, ...)
    __attribute__((format(printf, 2, 3)));

// Always false, so that `return safe_fail(...)` reads as what it is.
static inline bool safe_fail(SafeCursor* c, const char* fmt, ...) {
    va_list args;
    va_start(args, fmt);
    int n = snprintf(c->problem, c->problem_size, "header, byte %td: ", c->at - c->begin);
    if (n > 0 && (size_t)n < c->problem_size)
        vsnprintf(c->problem + n, c->problem_size - (size_t)n, fmt, args);
    va_end(args);
    return false;
}

static inline char safe_peek(SafeCursor* c) {
    while (c->at < c->end && (*c->at == ' ' || *c->at == '\t' || *c->at == '\n' || *c->at == '\r'))
        c->at++;
    return c->at < c->end ? *c->at : 0;
}

static inline bool safe_expect(SafeCursor* c, char wanted) {
    char found = safe_peek(c);
    if (found == wanted) {
        c->at++;
        return true;
    }
    if (c->at == c->end) return safe_fail(c, "expected '%c', the header ends", wanted);
    return safe_fail(c, "expected '%c', found byte 0x%02x", wanted, (unsigned char)found);
}

static inline bool safe_hex4(SafeCursor* c, unsigned* code) {
    *code = 0;
    for (int i = 0; i < 4; i++, c->at++) {
        if (c->at == c->end) return safe_fail(c, "a \\u escape is cut short");
        char h = *c->at;
        static const char DIGITS[] = "0123456789abcdefABCDEF";
        const char* digit = h ? strchr(DIGITS, h) : NULL;
        if (!digit) return safe_fail(c, "a \\u escape has byte 0x%02x", (unsigned char)h);
        int value = (int)(digit - DIGITS);
        *code = 16 * *code + (unsigned)(value < 16 ? value : value - 6);
    }
    return true;
}

// A string, with its escapes undone, appended to the store. No escape makes text longer than it
// stood in the JSON.
static inline bool safe_string(SafeCursor* c, SafeFile* f, char** out) {
    if (!safe_expect(c, '"')) return false;
    char* to = f->strings_end;
    *out = to;
    for (;;) {
        if (c->at == c->end) return safe_fail(c, "a string does not end");
        unsigned char ch = (unsigned char)*c->at;
        if (ch == '"') break;
        if (ch < 0x20) return safe_fail(c, "byte 0x%02x inside a string", ch);
        if (ch != '\\') {
            int n = utf8_length((const unsigned char*)c->at, (size_t)(c->end - c->at));
            if (n == 0) return safe_fail(c, "byte 0x%02x is not UTF-8", ch);
            memcpy(to, c->at, (size_t)n);
            to += n;
            c->at += n;
            continue;
        }
        c->at++;
        char escape = c->at < c->end ? *c->at++ : 0;
        static const char FROM[] = "\"\\/bfnrt", TO[] = "\"\\/\b\f\n\r\t";
        const char* simple = escape ? strchr(FROM, escape) : NULL;
        if (simple) {
            *to++ = TO[simple - FROM];
            continue;
        }
        unsigned code, low;
        if (escape != 'u') return safe_fail(c, "unknown escape in a string");
        if (!safe_hex4(c, &code)) return false;
        if (code >= 0xd800 && code < 0xdc00) {
            if (c->end - c->at < 2 || c->at[0] != '\\' || c->at[1] != 'u')
                return safe_fail(c, "half a surrogate pair");
            c->at += 2;
            if (!safe_hex4(c, &low)) return false;
            if (low < 0xdc00 || low > 0xdfff) return safe_fail(c, "half a surrogate pair");
            code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
        } else if (code >= 0xdc00 && code < 0xe000) {
            return safe_fail(c, "half a surrogate pair");
        }
        if (code == 0) return safe_fail(c, "a zero byte inside a string");
        if (code < 0x80) {
            *to++ = (char)code;
        } else if (code < 0x800) {
            *to++ = (char)(0xc0 | code >> 6);
            *to++ = (char)(0x80 | (code & 63));
        } else if (code < 0x10000) {
            *to++ = (char)(0xe0 | code >> 12);
            *to++ = (char)(0x80 | (code >> 6 & 63));
            *to++ = (char)(0x80 | (code & 63));
        } else {
            *to++ = (char)(0xf0 | code >> 18);
            *to++ = (char)(0x80 | (code >> 12 & 63));
            *to++ = (char)(0x80 | (code >> 6 & 63));
            *to++ = (char)(0x80 | (code & 63));
        }
    }
    c->at++;
    *to++ = 0;
    f->strings_end = to;
    return true;
}

// A number without sign, point or exponent.
static inline bool safe_number(SafeCursor* c, int64_t* v) {
    char first = safe_peek(c);
    if (first < '0' || first > '9') return safe_fail(c, "expected a whole number");
    for (*v = 0; c->at < c->end && *c->at >= '0' && *c->at <= '9'; c->at++) {
        int digit = *c->at - '0';
        if (*v > (INT64_MAX - digit) / 10) return safe_fail(c, "the number is too large");
        *v = 10 * *v + digit;
    }
    return true;
}

// "[" numbers "]", at most `most` of them.
static inline bool safe_numbers(SafeCursor* c, int64_t* v, int most, int* count) {
    *count = 0;
    if (!safe_expect(c, '[')) return false;
    if (safe_peek(c) == ']') return safe_expect(c, ']');
    for (;;) {
        if (*count == most) return safe_fail(c, "more than %d numbers in a list", most);
        if (!safe_number(c, &v[(*count)++])) return false;
        if (safe_peek(c) == ']') return safe_expect(c, ']');
        if (!safe_expect(c, ',')) return false;
    }
}

// The store grows by doubling; `used` items of `size` bytes are in it.
static inline void* safe_grow(void* store, int used, size_t size) {
    if (used & (used - 1)) return store;
    size_t room = used ? 2 * (size_t)used : 1;
    void* larger = realloc(store, room * size);
    REQUIRE(larger, "out of memory: a header of %zu entries", room);
    return larger;
}

static inline bool safe_metadata(SafeCursor* c, SafeFile* f) {
    if (!safe_expect(c, '{')) return false;
    if (safe_peek(c) == '}') return safe_expect(c, '}');
    for (;;) {
        f->metadata = (char**)safe_grow(f->metadata, f->pairs, 2 * sizeof(char*));
        if (!safe_string(c, f, &f->metadata[2 * f->pairs]) || !safe_expect(c, ':') ||
            !safe_string(c, f, &f->metadata[2 * f->pairs + 1])) return false;
        f->pairs++;
        if (safe_peek(c) == '}') return safe_expect(c, '}');
        if (!safe_expect(c, ',')) return false;
    }
}

// {"dtype": .., "shape": .., "data_offsets": ..} in any order, each once, nothing else.
static inline bool safe_entry(SafeCursor* c, SafeFile* f, SafeTensor* t, const char* data,
                              int64_t data_bytes) {
    bool have_type = false, have_shape = false, have_offsets = false;
    int64_t offsets[2];
    int count;
    if (!safe_expect(c, '{')) return false;
    for (;;) {
        char* key;
        char* word;
        if (!safe_string(c, f, &key) || !safe_expect(c, ':')) return false;
        if (strcmp(key, "dtype") == 0 && !have_type) {
            have_type = true;
            if (!safe_string(c, f, &word)) return false;
            int type = 0;
            while (type < SAFE_TYPE_COUNT && strcmp(SAFE_TYPE_NAME[type], word) != 0) type++;
            if (type == SAFE_TYPE_COUNT)
                return safe_fail(c, "tensor '%s' has unknown dtype '%s'", t->name, word);
            t->type = (SafeType)type;
        } else if (strcmp(key, "shape") == 0 && !have_shape) {
            have_shape = true;
            if (!safe_numbers(c, t->shape, SAFE_MAX_DIMS, &t->dims)) return false;
        } else if (strcmp(key, "data_offsets") == 0 && !have_offsets) {
            have_offsets = true;
            if (!safe_numbers(c, offsets, 2, &count)) return false;
            if (count != 2)
                return safe_fail(c, "tensor '%s': data_offsets has %d numbers, expected 2", t->name,
                                 count);
        } else {
            return safe_fail(c, "tensor '%s': key '%s' is unknown or repeated", t->name, key);
        }
        if (safe_peek(c) == '}') break;
        if (!safe_expect(c, ',')) return false;
    }
    if (!safe_expect(c, '}')) return false;
    if (!have_type || !have_shape || !have_offsets) {
        return safe_fail(c, "tensor '%s' lacks dtype, shape or data_offsets", t->name);
    }
    if (offsets[0] > offsets[1] || offsets[1] > data_bytes) {
        return safe_fail(c,
                         "tensor '%s': data_offsets [%" PRId64 ", %" PRId64
                         "] do not lie in the %" PRId64 " bytes of data",
                         t->name, offsets[0], offsets[1], data_bytes);
    }
    int64_t left = offsets[1] - offsets[0], width = (int64_t)SAFE_TYPE_BYTES[t->type], n = width;
    for (int i = 0; i < t->dims; i++) {
        if (t->shape[i] && n > INT64_MAX / t->shape[i])
            return safe_fail(c, "tensor '%s': its shape overflows", t->name);
        n *= t->shape[i];
    }
    if (n != left) {
        return safe_fail(
            c, "tensor '%s': shape and dtype make %" PRId64 " bytes, data_offsets %" PRId64,
            t->name, n, left);
    }
    if (offsets[0] % width) {
        return safe_fail(
            c, "tensor '%s' starts at byte %" PRId64 ", not a multiple of its item's %" PRId64,
            t->name, offsets[0], width);
    }
    t->data = data + offsets[0];
    t->bytes = (size_t)left;
    return true;
}

static inline int safe_by_name(const void* a, const void* b) {
    return strcmp((*(const SafeTensor* const*)a)->name, (*(const SafeTensor* const*)b)->name);
}

static inline int safe_by_place(const void* a, const void* b) {
    const SafeTensor* x = *(const SafeTensor* const*)a;
    const SafeTensor* y = *(const SafeTensor* const*)b;
    if (x->data != y->data) return (const char*)x->data < (const char*)y->data ? -1 : 1;
    return (x->bytes > y->bytes) - (x->bytes < y->bytes);
}

// No name twice, no gap, no overlap.
static inline bool safe_check_cover(SafeCursor* c, SafeFile* f, const char* data,
                                    int64_t data_bytes) {
    const SafeTensor** sorted = (const SafeTensor**)host_alloc((size_t)f->count,
                                                               sizeof(SafeTensor*));
    for (int i = 0; i < f->count; i++) sorted[i] = &f->tensors[i];
    bool ok = true;
    qsort(sorted, (size_t)f->count, sizeof *sorted, safe_by_name);
    for (int i = 1; i < f->count && ok; i++) {
        if (strcmp(sorted[i - 1]->name, sorted[i]->name) == 0)
            ok = safe_fail(c, "tensor '%s' is there twice", sorted[i]->name);
    }
    qsort(sorted, (size_t)f->count, sizeof *sorted, safe_by_place);
    int64_t covered = 0;
    for (int i = 0; i < f->count && ok; i++) {
        int64_t begin = (const char*)sorted[i]->data - data;
        if (begin != covered) {
            ok = safe_fail(c,
                           "tensor '%s' starts at byte %" PRId64
                           " of the data, the one before ends at %" PRId64,
                           sorted[i]->name, begin, covered);
        }
        covered = begin + (int64_t)sorted[i]->bytes;
    }
    if (ok && covered != data_bytes) {
        ok = safe_fail(c, "the tensors make %" PRId64 " bytes, the file has %" PRId64, covered,
                       data_bytes);
    }
    free(sorted);
    return ok;
}

static inline bool safe_parse(SafeFile* f, SafeCursor* c, const char* data, int64_t data_bytes) {
    if (!safe_expect(c, '{')) return false;
    bool first = true, have_metadata = false;
    while (safe_peek(c) != '}') {
        if (!first && !safe_expect(c, ',')) return false;
        first = false;
        char* name;
        if (!safe_string(c, f, &name) || !safe_expect(c, ':')) return false;
        if (strcmp(name, "__metadata__") == 0) {
            if (have_metadata) return safe_fail(c, "__metadata__ is there twice");
            have_metadata = true;
            if (!safe_metadata(c, f)) return false;
            continue;
        }
        f->tensors = (SafeTensor*)safe_grow(f->tensors, f->count, sizeof(SafeTensor));
        SafeTensor* t = &f->tensors[f->count];
        memset(t, 0, sizeof *t);
        t->name = name;
        if (!safe_entry(c, f, t, data, data_bytes)) return false;
        f->count++;
    }
    c->at++;
    if (safe_peek(c) != 0 || c->at != c->end) return safe_fail(c, "text after the closing brace");
    return safe_check_cover(c, f, data, data_bytes);
}

// ---- reading: the file ---------------------------------------------------------------------

static inline void safetensors_close(SafeFile* f) {
    if (f->map) munmap(f->map, f->map_bytes);
    free(f->tensors);
    free(f->metadata);
    free(f->strings);
    free((void*)f->path);
    memset(f, 0, sizeof *f);
}

// False with the problem in words if the file cannot be read or is not well-formed; then nothing is
// held.
static inline bool safetensors_try_open(SafeFile* f, const char* path, char* problem,
                                        size_t problem_size) {
    memset(f, 0, sizeof *f);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat info;
    if (fd < 0 || fstat(fd, &info) != 0) {
        snprintf(problem, problem_size, "cannot be opened: %s", strerror(errno));
        if (fd >= 0) close(fd);
        return false;
    }
    uint64_t file_bytes = (uint64_t)info.st_size, json_bytes = 0;
    if (!S_ISREG(info.st_mode) || file_bytes < sizeof json_bytes) {
        snprintf(problem, problem_size, "%" PRIu64 " bytes: too short for a safetensors file",
                 file_bytes);
        close(fd);
        return false;
    }
    f->map_bytes = (size_t)file_bytes;
    f->map = mmap(NULL, f->map_bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    int error = errno;
    close(fd);
    if (f->map == MAP_FAILED) {
        f->map = NULL;
        snprintf(problem, problem_size, "cannot be mapped: %s", strerror(error));
        return false;
    }
    memcpy(&json_bytes, f->map, sizeof json_bytes);
    const char* json = (const char*)f->map + sizeof json_bytes;
    // An odd header length would leave every tensor misaligned in memory; the format pads it to 8.
    if (json_bytes > file_bytes - sizeof json_bytes || json_bytes > (100u << 20) ||
        json_bytes % 8 != 0) {
        snprintf(problem, problem_size, "the header length is %" PRIu64 " in a file of %" PRIu64
                 " bytes; is this a safetensors file?", json_bytes, file_bytes);
        safetensors_close(f);
        return false;
    }
    f->path = strdup(path);
    f->strings = f->strings_end = (char*)host_alloc((size_t)json_bytes + 1, 1);
    SafeCursor cursor = { json, json + json_bytes, json, problem, problem_size };
    if (!safe_parse(f, &cursor, json + json_bytes,
                    (int64_t)(file_bytes - sizeof json_bytes - json_bytes))) {
        safetensors_close(f);
        return false;
    }
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
