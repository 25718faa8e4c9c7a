/*
Token shards: files of tokens, read as one long row of them.

A shard is 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros), then that
many uint16 tokens; a document is opened by its end-of-text token and may run across shard borders.
Read with pread and 64-bit offsets, so that a shard may be larger than 2 GiB and no other handle's
position matters.

shards_open checks every header against the size of its file and ends the program if one is wrong.
What goes wrong later (a file vanished, became shorter, holds a token beyond the vocabulary) is left
as text in `error`, because the reader may be a thread that must not end the program: the caller
does. A token is checked whenever it is read.

test        test/test_loader.c
*/
#pragma once
#include "common.h"

#include <fcntl.h>
#include <glob.h>
#include <sys/stat.h>
#include <unistd.h>

enum { SHARD_MAGIC = 20240520, SHARD_VERSION = 1, SHARD_HEADER_BYTES = 1024 };
enum { SHARD_WINDOW = 1 << 15 };    // tokens that a search reads at a time

typedef struct Shards {
    int count;
    char** paths;               // sorted by name
    int64_t* first;             // (count + 1) tokens before each shard; the last entry is the total
    int vocab;
    int open_index, fd;         // the one that is open; -1: none
    uint16_t* window;           // where the last search has been
    int64_t window_at, window_tokens;
    char error[2 * 4096];       // "": none
} Shards;

static inline int64_t shards_total(const Shards* s) {
    return s->first[s->count];
}

static inline int64_t shards_tokens(const Shards* s, int i) {
    return s->first[i + 1] - s->first[i];
}

// ---- opening -------------------------------------------------------------------------------

// Bytes read: n, or fewer where the file ends, or -1.
static inline ssize_t read_at(int fd, void* out, size_t n, int64_t at) {
    size_t done = 0;
    while (done < n) {
        ssize_t got = pread(fd, (char*)out + done, n - done, at + (int64_t)done);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return -1;
        if (got == 0) break;
        done += (size_t)got;
    }
    return (ssize_t)done;
}

// Number of tokens the header promises, after checks that the file keeps the promise.
static inline int64_t shard_tokens(const char* path) {
    static const char HOW[] = "token shards are made by dev/text_to_shards or downloaded";
    struct stat info;
    int32_t header[3];
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);    // a pipe would wait for its writer
    REQUIRE(fd >= 0, "%s: cannot be opened: %s", path, strerror(errno));
    int error = fstat(fd, &info) == 0 ? 0 : errno;
    ssize_t n = error ? 0 : read_at(fd, header, sizeof header, 0);
    int read_error = n < 0 ? errno : 0;
    close(fd);    // before a message, which need not end the process
    REQUIRE(!error, "%s: cannot be examined: %s", path, strerror(error));
    REQUIRE(S_ISREG(info.st_mode),
            "%s: not a file\ngive a pattern that names files, such as '%s/*.bin'", path, path);
    REQUIRE(info.st_size >= SHARD_HEADER_BYTES,
            "%s: %" PRId64 " bytes, but the header alone has %d\n%s", path, (int64_t)info.st_size,
            SHARD_HEADER_BYTES, HOW);
    REQUIRE(n == (ssize_t)sizeof header, "%s: the header at byte 0 cannot be read: %s", path,
            n < 0 ? strerror(read_error) : "it ends early");
    REQUIRE(header[0] == SHARD_MAGIC,
            "%s: magic %d at byte 0, expected %d; is this a token shard?\n%s", path, header[0],
            SHARD_MAGIC, HOW);
    REQUIRE(header[1] == SHARD_VERSION, "%s: version %d at byte 4, expected %d\n%s", path,
            header[1], SHARD_VERSION, HOW);
    int64_t tokens = header[2], wanted = SHARD_HEADER_BYTES + 2 * tokens;
    REQUIRE(tokens > 0,
            "%s: the header promises %" PRId64 " tokens at byte 8, expected at least 1\n%s", path,
            tokens, HOW);
    REQUIRE(info.st_size == wanted,
            "%s: %" PRId64 " bytes, but the %" PRId64 " tokens promised at byte 8 need %" PRId64
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
    s->window = (uint16_t*)host_alloc(SHARD_WINDOW, sizeof(uint16_t));
    for (int i = 0; i < s->count; i++) {
        size_t size = strlen(found.gl_pathv[i]) + 1;
        s->paths[i] = (char*)host_alloc(size, 1);
        memcpy(s->paths[i], found.gl_pathv[i], size);
    }
    globfree(&found);
    for (int i = 0; i < s->count; i++) s->first[i + 1] = s->first[i] + shard_tokens(s->paths[i]);
}

static inline void shards_close(Shards* s) {
    if (s->fd >= 0) close(s->fd);
    for (int i = 0; i < s->count; i++) free(s->paths[i]);
    free(s->paths);
    free(s->first);
    free(s->window);
    memset(s, 0, sizeof *s);
    s->fd = -1;
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

// ---- reading -------------------------------------------------------------------------------

// Keeps the message and returns false, for the caller to return.
static inline bool shards_fail(Shards* s, const char* fmt, ...)
    __attribute__((format(printf, 2, 3)));

static inline bool shards_fail(Shards* s, const char* fmt, ...) {
    va_list args;
    va_start(args, fmt);
    vsnprintf(s->error, sizeof s->error, fmt, args);
    va_end(args);
    return false;
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

// n tokens of shard i from its token `from` on, all of them in it.
static inline bool shards_read_one(Shards* s, uint16_t* out, int i, int64_t from, size_t n) {
    const char* path = s->paths[i];
    if (i != s->open_index) {
        if (s->fd >= 0) close(s->fd);
        s->open_index = -1;
        s->fd = open(path, O_RDONLY | O_CLOEXEC);
        if (s->fd < 0)
            return shards_fail(s, "%s: cannot be opened again: %s", path, strerror(errno));
        s->open_index = i;
    }
    int64_t at = SHARD_HEADER_BYTES + 2 * from;
    ssize_t got = read_at(s->fd, out, 2 * n, at);
    if (got < 0)
        return shards_fail(s, "%s: reading %zu bytes at byte %" PRId64 ": %s", path, 2 * n, at,
                           strerror(errno));
    if (got < (ssize_t)(2 * n))
        return shards_fail(s, "%s: ends at byte %" PRId64 ", expected %" PRId64
                           "\nthe file has become shorter since the start of the run", path,
                           at + got, SHARD_HEADER_BYTES + 2 * shards_tokens(s, i));
    for (size_t k = 0; k < n; k++) {
        if (out[k] < s->vocab) continue;
        int64_t token = from + (int64_t)k;
        return shards_fail(s, "%s: token %" PRId64 " (byte %" PRId64 ") is %d, but --vocab is %d "
                           "(ids 0 to %d)\nthe shards were made with another vocabulary, or "
                           "--vocab is too small", path, token, SHARD_HEADER_BYTES + 2 * token,
                           out[k], s->vocab, s->vocab - 1);
    }
    return true;
}

// n tokens from `position` of all on, across shard borders and around the end; false: see `error`.
static inline bool shards_read(Shards* s, uint16_t* out, int64_t position, size_t n) {
    for (size_t done = 0; done < n;) {
        int64_t at = (position + (int64_t)done) % shards_total(s);
        int i = shards_find(s, at);
        int64_t left = s->first[i + 1] - at;
        size_t part = (int64_t)(n - done) < left ? n - done : (size_t)left;
        if (!shards_read_one(s, out + done, i, at - s->first[i], part)) return false;
        done += part;
    }
    return true;
}

// *found: the first place at or behind token `from` of shard i that holds `token`, or the shard's
// number of tokens if none does. Nothing is indexed: a search that goes on from the last place
// reads each token once.
static inline bool shards_search(Shards* s, int64_t* found, int i, int64_t from, int token) {
    int64_t tokens = shards_tokens(s, i);
    for (*found = from; *found < tokens; ++*found) {
        int64_t inside = s->first[i] + *found - s->window_at;
        if (inside < 0 || inside >= s->window_tokens) {
            int64_t n = tokens - *found;
            if (n > SHARD_WINDOW) n = SHARD_WINDOW;
            s->window_tokens = 0;
            if (!shards_read_one(s, s->window, i, *found, (size_t)n)) return false;
            s->window_at = s->first[i] + *found;
            s->window_tokens = n;
            inside = 0;
        }
        if (s->window[inside] == token) return true;
    }
    *found = tokens;
    return true;
}

// What ranks that train together must agree on, and a run with its checkpoint, as "name = value"
// lines; `what` they are for.
static inline void shards_text(char* text, size_t size, const char* what, const Shards* s) {
    snprintf(text, size,
             "number of %s shards = %d\nnumber of %s tokens = %" PRId64
             "\nnames and sizes of the %s shards = %016" PRIx64 "\n",
             what, s->count, what, shards_total(s), what, shards_hash(s));
}
