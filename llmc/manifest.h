/*
The manifest of a checkpoint: what the run was doing, and what the other files must hold.

A JSON object, a member per line, files and tensors one per line. The last line is

    "crc32":"0123abcd"}

and holds the crc32 (zlib's) of all bytes before it. Real numbers read back as the same double; NaN
is null. The reader wants every member once and knows no others: what is to be added makes another
version. It never ends the program; what is wrong is named, with the byte at which it stands.
Whether the parts fit together, and the files are as the manifest says, llmc/checkpoint.h looks at.

test        test/test_checkpoint.c
*/
#pragma once
#include "outliers.h"
#include "safetensors.h"

#include <zlib.h>

#define CHECKPOINT_FORMAT "modded-llm.c checkpoint"

enum {
    CHECKPOINT_VERSION = 1,
    CHECKPOINT_OUT = 1024,              // bytes of the path of a run's directory
    CHECKPOINT_PATH = CHECKPOINT_OUT + 256,
};

// S(constant, its word in the manifest, what follows the tensor's name in the file)
#define STATE_KIND_LIST(S) \
    S(STATE_WEIGHT, "weight", "") S(STATE_MASTER, "master", ".master") S(STATE_M, "m", ".m") \
    S(STATE_V, "v", ".v") S(STATE_GRAD, "grad", ".grad")

#define STATE_CONSTANT(constant, word, suffix) constant,
#define STATE_WORD(constant, word, suffix)     word,
#define STATE_SUFFIX(constant, word, suffix)   suffix,
typedef enum StateKind { STATE_KIND_LIST(STATE_CONSTANT) STATE_KINDS } StateKind;

static const char* const STATE_KIND_WORD[] = { STATE_KIND_LIST(STATE_WORD) };
static const char* const STATE_KIND_SUFFIX[] = { STATE_KIND_LIST(STATE_SUFFIX) };

// What a rank saves of a tensor.
typedef struct StatePart {
    const char* name;
    StateKind kind;
    SafeType type;              // SAFE_F32 or SAFE_BF16
    int dims;
    int64_t shape[2];           // of the whole tensor, logical
    bool transposed;            // a whole of 2 dims: in `data` it lies as (shape[1], shape[0])
    int64_t offset, count;      // the run of the flattened whole that these elements are
    const void* data;           // the caller's, until the saver is done with it
} StatePart;

// What a checkpoint says besides tensors.
typedef struct CheckpointInfo {
    int64_t step, tokens;       // updates made, tokens trained on
    double train_seconds;
    int ranks, zero;
    char commit[64], precision[8], target[8], tokenizer_hash[17];
    const char* flags;          // a JSON object
    const char *recipe, *shards;    // text
    int64_t position[5];        // of the data: step, micro, epoch, shard, offset
    int64_t seed;
    double lr_mult, muon_momentum;
    int64_t window_long, window_short, adam_step;
    Window loss, grad_norm;
    double val_loss, train_loss;    // the last ones; NAN: none
} CheckpointInfo;

// ---- reading -------------------------------------------------------------------------------

typedef struct CheckpointFile {
    const char* name;
    int64_t bytes;
    uint32_t header;            // crc32 of what stands before its data
} CheckpointFile;

// A line of the manifest: a tensor, or a run of one, in a file.
typedef struct CheckpointTensor {
    const char* name;
    const char* file_name;
    StateKind kind;
    int file;
    SafeType type;
    int dims;
    int64_t shape[2], offset, count;
    uint32_t crc;
} CheckpointTensor;

typedef struct Checkpoint {
    CheckpointInfo info;
    char directory[CHECKPOINT_PATH];
    CheckpointFile* files;
    CheckpointTensor* tensors;
    int file_count, count;
    size_t file_room, room;
    char* text;                 // the manifest; its strings have been ended by 0 where they stand
    char* flags;
} Checkpoint;

// What is read of a member of an object.
typedef enum MemberKind {
    MEMBER_TEXT,                // const char*
    MEMBER_NAME,                // char[size]
    MEMBER_SAME,                // the text `to` and no other
    MEMBER_VERSION,             // CHECKPOINT_VERSION and no other
    MEMBER_WHOLE, MEMBER_COUNT, // int64_t, int that is not negative
    MEMBER_REAL,                // double
    MEMBER_CRC,                 // uint32_t
    MEMBER_SHAPE,               // SafeShape
    MEMBER_WINDOW,              // Window
    MEMBER_FLAGS, MEMBER_FILES, MEMBER_TENSORS,     // of the checkpoint
    MEMBER_OBJECT               // size members, Member[]
} MemberKind;

typedef struct Member {
    const char* name;
    MemberKind kind;
    const void* to;
    size_t size;
} Member;

typedef struct SafeShape {
    int64_t n[2];
    int dims;
} SafeShape;

static inline bool manifest_object(Checkpoint* c, JsonReader* j, const Member* members, int count);

static inline bool manifest_crc(JsonReader* j, uint32_t* crc) {
    char *word, *end;
    if (!safe_string(j, &word)) return false;
    *crc = (uint32_t)strtoul(word, &end, 16);
    if (strlen(word) != 8 || *end || strspn(word, "0123456789abcdef") != 8)
        return safe_fail(j, "'%.20s' is no crc32: eight hexadecimal digits", word);
    return true;
}

static inline bool manifest_window(JsonReader* j, Window* w) {
    int more;
    memset(w, 0, sizeof *w);
    if (!json_read_byte(j, '[', "'['")) return false;
    while ((more = json_more(j, ']', w->count)) > 0) {
        double x;
        if (w->count == WINDOW) return safe_fail(j, "more than %d numbers in a window", WINDOW);
        if (!json_read_real(j, &x)) return false;
        if (x - x != 0) return safe_fail(j, "a window holds null");
        w->x[w->count++] = x;
    }
    w->next = w->count % WINDOW;
    return more == 0;
}

static inline bool manifest_files(Checkpoint* c, JsonReader* j) {
    int more;
    if (!json_read_byte(j, '[', "'['")) return false;
    while ((more = json_more(j, ']', c->file_count)) > 0) {
        CheckpointFile file;
        const Member MEMBERS[] = {
            { "name", MEMBER_TEXT, &file.name, 0 },
            { "bytes", MEMBER_WHOLE, &file.bytes, 0 },
            { "header_crc32", MEMBER_CRC, &file.header, 0 },
        };
        if (!manifest_object(c, j, MEMBERS, 3)) return false;
        c->files = (CheckpointFile*)array_grow(c->files, &c->file_room, (size_t)c->file_count + 1,
                                               sizeof file);
        c->files[c->file_count++] = file;
    }
    return more == 0;
}

static inline bool manifest_tensors(Checkpoint* c, JsonReader* j) {
    int more;
    if (!json_read_byte(j, '[', "'['")) return false;
    while ((more = json_more(j, ']', c->count)) > 0) {
        CheckpointTensor t;
        SafeShape shape;
        const char *kind, *type;
        memset(&t, 0, sizeof t);
        const Member MEMBERS[] = {
            { "name", MEMBER_TEXT, &t.name, 0 },     { "kind", MEMBER_TEXT, &kind, 0 },
            { "file", MEMBER_TEXT, &t.file_name, 0 }, { "dtype", MEMBER_TEXT, &type, 0 },
            { "shape", MEMBER_SHAPE, &shape, 0 },    { "offset", MEMBER_WHOLE, &t.offset, 0 },
            { "count", MEMBER_WHOLE, &t.count, 0 },  { "crc32", MEMBER_CRC, &t.crc, 0 },
        };
        if (!manifest_object(c, j, MEMBERS, 8)) return false;
        int k = 0;
        while (k < STATE_KINDS && strcmp(kind, STATE_KIND_WORD[k]) != 0) k++;
        if (k == STATE_KINDS) return safe_fail(j, "'%.80s': unknown kind '%.40s'", t.name, kind);
        t.kind = (StateKind)k;
        t.type = strcmp(type, SAFE_TYPE_NAME[SAFE_BF16]) == 0 ? SAFE_BF16 : SAFE_F32;
        if (strcmp(type, SAFE_TYPE_NAME[t.type]) != 0)
            return safe_fail(j, "'%.80s': dtype '%.40s', expected F32 or BF16", t.name, type);
        t.dims = shape.dims;
        memcpy(t.shape, shape.n, sizeof t.shape);
        c->tensors = (CheckpointTensor*)array_grow(c->tensors, &c->room, (size_t)c->count + 1,
                                                   sizeof t);
        c->tensors[c->count++] = t;
    }
    return more == 0;
}

static inline bool manifest_value(Checkpoint* c, JsonReader* j, const Member* m) {
    char* word;
    int64_t v;
    json_read_space(j);
    size_t from = j->at;
    switch (m->kind) {
    case MEMBER_TEXT:
        return safe_string(j, (char**)m->to);
    case MEMBER_NAME:
        if (!safe_string(j, &word)) return false;
        if (strlen(word) >= m->size)
            return safe_fail(j, "\"%s\" has %zu bytes, expected fewer than %zu", m->name,
                             strlen(word), m->size);
        strcpy((char*)m->to, word);
        return true;
    case MEMBER_SAME:
        if (!safe_string(j, &word)) return false;
        if (strcmp(word, (const char*)m->to) != 0)
            return safe_fail(j, "\"%s\" is '%.60s', expected '%s'", m->name, word,
                             (const char*)m->to);
        return true;
    case MEMBER_VERSION:
        if (!json_read_whole(j, &v)) return false;
        if (v == CHECKPOINT_VERSION) return true;
        return safe_fail(j, "version %" PRId64 " of the format, this program knows version %d%s", v,
                         CHECKPOINT_VERSION,
                         v > CHECKPOINT_VERSION ? ": a newer one saved it" : "");
    case MEMBER_WHOLE:
        return json_read_whole(j, (int64_t*)m->to);
    case MEMBER_COUNT:
        if (!json_read_whole(j, &v)) return false;
        if (v < 0 || v > INT32_MAX)
            return safe_fail(j, "\"%s\" is %" PRId64 ", expected 0 to %d", m->name, v, INT32_MAX);
        *(int*)m->to = (int)v;
        return true;
    case MEMBER_REAL:
        return json_read_real(j, (double*)m->to);
    case MEMBER_CRC:
        return manifest_crc(j, (uint32_t*)m->to);
    case MEMBER_SHAPE: {
        SafeShape* shape = (SafeShape*)m->to;
        shape->n[0] = shape->n[1] = 0;
        return safe_numbers(j, shape->n, 2, &shape->dims);
    }
    case MEMBER_WINDOW:
        return manifest_window(j, (Window*)m->to);
    case MEMBER_FLAGS: {
        if (from == j->n || j->text[from] != '{') return json_fail(j, from, "'{'");
        // Reading undoes escapes in place, so the copy comes first.
        char* copy = (char*)host_alloc(j->n - from + 1, 1);
        memcpy(copy, j->text + from, j->n - from);
        c->flags = copy;
        if (!json_skip_value(j, 100)) return false;
        copy[j->at - from] = 0;
        return true;
    }
    case MEMBER_FILES:
        return manifest_files(c, j);
    case MEMBER_TENSORS:
        return manifest_tensors(c, j);
    case MEMBER_OBJECT:
        return manifest_object(c, j, (const Member*)m->to, (int)m->size);
    }
    return false;
}

// An object with these members in any order, each once, and no other.
static inline bool manifest_object(Checkpoint* c, JsonReader* j, const Member* members, int count) {
    uint32_t seen = 0;
    int more;
    if (!json_read_byte(j, '{', "'{'")) return false;
    for (int i = 0; (more = json_more(j, '}', i)) > 0; i++) {
        char* key;
        int k = 0;
        if (!safe_string(j, &key) || !json_read_byte(j, ':', "':'")) return false;
        while (k < count && strcmp(members[k].name, key) != 0) k++;
        if (k == count || (seen >> k & 1))
            return safe_fail(j, "\"%.60s\" is %s", key, k == count ? "unknown" : "there twice");
        seen |= 1u << k;
        if (!manifest_value(c, j, &members[k])) return false;
    }
    for (int k = 0; k < count && more == 0; k++)
        if (!(seen >> k & 1)) return safe_fail(j, "\"%s\" is missing", members[k].name);
    return more == 0;
}

static inline bool manifest_parse(Checkpoint* c, JsonReader* j) {
    CheckpointInfo* info = &c->info;
    uint32_t crc;               // has been looked at
    int64_t* at = info->position;
    const Member POSITION[] = {
        { "step", MEMBER_WHOLE, &at[0], 0 },   { "micro", MEMBER_WHOLE, &at[1], 0 },
        { "epoch", MEMBER_WHOLE, &at[2], 0 },  { "shard", MEMBER_WHOLE, &at[3], 0 },
        { "offset", MEMBER_WHOLE, &at[4], 0 },
    };
    const Member DATA[] = {
        { "shards", MEMBER_TEXT, &info->shards, 0 },
        { "position", MEMBER_OBJECT, POSITION, 5 },
    };
    const Member RNG[] = {
        { "kind", MEMBER_SAME, "counter-based", 0 },
        { "seed", MEMBER_WHOLE, &info->seed, 0 },
    };
    const Member SCHEDULE[] = {
        { "lr_mult", MEMBER_REAL, &info->lr_mult, 0 },
        { "muon_momentum", MEMBER_REAL, &info->muon_momentum, 0 },
        { "window_long", MEMBER_WHOLE, &info->window_long, 0 },
        { "window_short", MEMBER_WHOLE, &info->window_short, 0 },
        { "adam_step", MEMBER_WHOLE, &info->adam_step, 0 },
    };
    const Member OUTLIERS[] = {
        { "loss", MEMBER_WINDOW, &info->loss, 0 },
        { "grad_norm", MEMBER_WINDOW, &info->grad_norm, 0 },
    };
    const Member MEMBERS[] = {
        { "format", MEMBER_SAME, CHECKPOINT_FORMAT, 0 },
        { "version", MEMBER_VERSION, NULL, 0 },
        { "step", MEMBER_WHOLE, &info->step, 0 },
        { "tokens", MEMBER_WHOLE, &info->tokens, 0 },
        { "train_seconds", MEMBER_REAL, &info->train_seconds, 0 },
        { "ranks", MEMBER_COUNT, &info->ranks, 0 },
        { "zero", MEMBER_COUNT, &info->zero, 0 },
        { "commit", MEMBER_NAME, info->commit, sizeof info->commit },
        { "precision", MEMBER_NAME, info->precision, sizeof info->precision },
        { "target", MEMBER_NAME, info->target, sizeof info->target },
        { "recipe", MEMBER_TEXT, &info->recipe, 0 },
        { "flags", MEMBER_FLAGS, NULL, 0 },
        { "data", MEMBER_OBJECT, DATA, 2 },
        { "rng", MEMBER_OBJECT, RNG, 2 },
        { "schedule", MEMBER_OBJECT, SCHEDULE, 5 },
        { "outliers", MEMBER_OBJECT, OUTLIERS, 2 },
        { "val_loss", MEMBER_REAL, &info->val_loss, 0 },
        { "train_loss", MEMBER_REAL, &info->train_loss, 0 },
        { "tokenizer_hash", MEMBER_NAME, info->tokenizer_hash, sizeof info->tokenizer_hash },
        { "files", MEMBER_FILES, NULL, 0 },
        { "tensors", MEMBER_TENSORS, NULL, 0 },
        { "crc32", MEMBER_CRC, &crc, 0 },
    };
    if (!manifest_object(c, j, MEMBERS, sizeof MEMBERS / sizeof *MEMBERS)) return false;
    json_read_space(j);
    if (j->at != j->n) return json_fail(j, j->at, "the end");
    info->flags = c->flags;
    return true;
}

static inline bool checkpoint_problem(char* problem, size_t size, const char* fmt, ...)
    __attribute__((format(printf, 3, 4)));

// Always false, like safe_fail.
static inline bool checkpoint_problem(char* problem, size_t size, const char* fmt, ...) {
    va_list args;
    va_start(args, fmt);
    vsnprintf(problem, size, fmt, args);
    va_end(args);
    return false;
}

static inline uint32_t checkpoint_crc(uint32_t crc, const void* data, size_t n) {
    return (uint32_t)crc32_z(crc, (const unsigned char*)data, n);
}

#define CHECKPOINT_LAST_LINE "\"crc32\":\"%08x\"}\n"
enum { CHECKPOINT_LAST_BYTES = 20 };

static inline bool manifest_read(Checkpoint* c, char* problem, size_t size) {
    char path[CHECKPOINT_PATH + 16];
    struct stat info;
    snprintf(path, sizeof path, "%s/manifest.json", c->directory);
    int fd = file_open(path, O_RDONLY);
    if (fd < 0 || fstat(fd, &info) != 0) {
        checkpoint_problem(problem, size, "manifest.json cannot be opened: %s", strerror(errno));
        if (fd >= 0) close(fd);
        return false;
    }
    size_t n = (size_t)info.st_size;
    bool fits = S_ISREG(info.st_mode) && n > CHECKPOINT_LAST_BYTES && n < 1u << 30;
    c->text = (char*)host_alloc(fits ? n + 1 : 1, 1);
    bool ok = fits && file_get(fd, c->text, n, 0);
    int error = errno;
    close(fd);
    if (!fits)
        return checkpoint_problem(problem, size, "manifest.json has %zu bytes; is it one?", n);
    if (!ok)
        return checkpoint_problem(problem, size, "manifest.json cannot be read: %s",
                                  strerror(error));
    const char* last = c->text + n - CHECKPOINT_LAST_BYTES;
    char line[CHECKPOINT_LAST_BYTES + 1];
    unsigned said = (unsigned)strtoul(last + 9, NULL, 16);
    snprintf(line, sizeof line, CHECKPOINT_LAST_LINE, said);
    if (memcmp(last, line, CHECKPOINT_LAST_BYTES) != 0 || last[-1] != '\n')
        return checkpoint_problem(problem, size, "manifest.json does not end with its crc32: it "
                                  "was cut short, or is none");
    uint32_t crc = checkpoint_crc(0, c->text, n - CHECKPOINT_LAST_BYTES);
    if (crc != said)
        return checkpoint_problem(problem, size, "manifest.json has crc32 %08x, its last line says "
                                  "%08x: it was changed or damaged", crc, said);
    JsonReader j = { (unsigned char*)c->text, n, 0, "" };
    if (manifest_parse(c, &j)) return true;
    return checkpoint_problem(problem, size, "manifest.json, byte %zu: %s", j.at, j.error);
}

// ---- writing -------------------------------------------------------------------------------

static inline void manifest_real(FILE* out, const char* before, double v) {
    fputs(before, out);
    json_real(out, v);
}

static inline void manifest_text(FILE* out, const char* before, const char* text) {
    fputs(before, out);
    json_string(out, text, strlen(text));
}

static inline void manifest_put_window(FILE* out, const char* before, const Window* w) {
    fputs(before, out);
    for (int i = 0; i < w->count; i++) manifest_real(out, i ? "," : "", window_at(w, i));
    fputc(']', out);
}

// Up to the list of files.
static inline void manifest_put_info(FILE* out, const CheckpointInfo* info) {
    const int64_t* at = info->position;
    fprintf(out, "{\"format\":\"%s\",\n\"version\":%d,\n\"step\":%" PRId64 ",\n\"tokens\":%" PRId64,
            CHECKPOINT_FORMAT, CHECKPOINT_VERSION, info->step, info->tokens);
    manifest_real(out, ",\n\"train_seconds\":", info->train_seconds);
    fprintf(out, ",\n\"ranks\":%d,\n\"zero\":%d", info->ranks, info->zero);
    manifest_text(out, ",\n\"commit\":", info->commit);
    manifest_text(out, ",\n\"precision\":", info->precision);
    manifest_text(out, ",\n\"target\":", info->target);
    manifest_text(out, ",\n\"recipe\":", info->recipe);
    fprintf(out, ",\n\"flags\":%s", info->flags);
    manifest_text(out, ",\n\"data\":{\"shards\":", info->shards);
    fprintf(out, ",\"position\":{\"step\":%" PRId64 ",\"micro\":%" PRId64 ",\"epoch\":%" PRId64
            ",\"shard\":%" PRId64 ",\"offset\":%" PRId64 "}}", at[0], at[1], at[2], at[3], at[4]);
    fprintf(out, ",\n\"rng\":{\"kind\":\"counter-based\",\"seed\":%" PRId64 "}", info->seed);
    manifest_real(out, ",\n\"schedule\":{\"lr_mult\":", info->lr_mult);
    manifest_real(out, ",\"muon_momentum\":", info->muon_momentum);
    fprintf(out, ",\"window_long\":%" PRId64 ",\"window_short\":%" PRId64 ",\"adam_step\":%" PRId64
            "}", info->window_long, info->window_short, info->adam_step);
    manifest_put_window(out, ",\n\"outliers\":{\"loss\":[", &info->loss);
    manifest_put_window(out, ",\"grad_norm\":[", &info->grad_norm);
    manifest_real(out, "},\n\"val_loss\":", info->val_loss);
    manifest_real(out, ",\n\"train_loss\":", info->train_loss);
    manifest_text(out, ",\n\"tokenizer_hash\":", info->tokenizer_hash);
}

static inline void manifest_put_tensor(FILE* out, const StatePart* p, const char* file,
                                       uint32_t crc) {
    fputs("{\"name\":", out);
    json_string(out, p->name, strlen(p->name));
    fprintf(out, ",\"kind\":\"%s\",\"file\":\"%s\",\"dtype\":\"%s\",\"shape\":[%" PRId64,
            STATE_KIND_WORD[p->kind], file, SAFE_TYPE_NAME[p->type], p->shape[0]);
    if (p->dims == 2) fprintf(out, ",%" PRId64, p->shape[1]);
    fprintf(out, "],\"offset\":%" PRId64 ",\"count\":%" PRId64 ",\"crc32\":\"%08x\"}", p->offset,
            p->count, crc);
}
