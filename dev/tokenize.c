/*
Text to token shards with a GPT-2 vocabulary, on all cores.

    tokenize --tokenizer DIR --out PREFIX [--shard-tokens N] [--val-tokens N] [--threads N] FILE...
    tokenize --tokenizer DIR --ids

The first form writes PREFIX_val_000000.bin with the first --val-tokens (default 0: no such file)
and PREFIX_train_000001.bin, ... with the rest, --shard-tokens (default 100000000) to a shard, in
the format of llmc/dataloader.h. Each document is opened by the end of text. The end of a name says
what is in the file; "-" is standard input and "-.jsonl" is standard input with JSON lines:

    .txt, -             one document, all bytes as they are
    .jsonl              a document per line: the string "text" of an object
    .jsonl.gz           the same, compressed

The second form prints the ids of the bytes of standard input on one line. DIR is a folder with
vocab.bpe (and encoder.json), or a .tiktoken file. Parquet: dev/parquet_to_jsonl.py FILE... |
tokenize ... -.jsonl

A reader cuts the files into blocks of about 2 MiB, at the ends of lines or where no piece of
text runs across; workers tokenize blocks, each the next one there is; main writes them in the order
of the text. So the shards are the same for any number of threads, and the memory is that of a few
blocks per thread, or of a few times the longest line.

A shard has its name once it is whole: it is written as NAME.partial, synchronised, then renamed.
Trouble ends the program with one message, in the order of the text, and without a partial file; the
shards before it stay. Shards of an earlier run under the same PREFIX are an error at the start, as
what was left of them could not be told from what is new.

test        test/test_tokenizer.c: tokenize
*/
#include "llmc/common.h"
#include "llmc/dataloader.h"
#include "llmc/tokenizer.h"

#include <fcntl.h>
#include <glob.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <zlib.h>

enum { MAX_THREADS = 1024 };

// The tests set less.
static size_t block_bytes = 2 << 20;        // text of one block, and what is read at a time
static size_t block_longest = 1 << 30;      // of a line, or of text with no place to cut

// ---- blocks --------------------------------------------------------------------------------

enum { BLOCK_FREE, BLOCK_READ, BLOCK_TAKEN, BLOCK_DONE };

typedef struct Block {
    int state;
    const char* path;
    bool lines;                     // JSON lines; otherwise a part of a document
    bool opens;                     // a part: the first of its document
    bool last;                      // there is no block after this one
    int64_t line, offset;           // of its first byte in the uncompressed file; lines from 1
    unsigned char* text;
    size_t n, room;
    uint16_t* ids;
    size_t ids_n, ids_room;
    int64_t documents;
    char error[4096 + 1024];        // "": none; what is in front of it is good
} Block;

typedef struct Pipeline {
    const Tokenizer* tokenizer;
    char** paths;
    int path_count;
    Block* ring;
    uint64_t ring_n, read, taken;   // blocks read and taken since the start; the ring's places turn
    bool ended;                     // the reader has read its last block
    pthread_mutex_t mutex;
    pthread_cond_t is_free, is_read, is_done;
} Pipeline;

// ---- reading -------------------------------------------------------------------------------

typedef struct Source {
    const char* path;
    int fd;
    bool zipped;
    z_stream z;
    unsigned char* in;              // compressed
    int64_t in_offset;              // in the file, of what comes after `in`
    bool member;                    // inside a gzip member
    bool ended;
    char error[4096 + 512];
} Source;

static bool ends_with(const char* s, const char* end) {
    size_t n = strlen(s), k = strlen(end);
    return n >= k && strcmp(s + n - k, end) == 0;
}

static bool source_open(Source* s, const char* path) {
    bool input = path[0] == '-' && (path[1] == 0 || path[1] == '.');
    memset(s, 0, sizeof *s);
    s->path = input ? "standard input" : path;
    s->zipped = ends_with(path, ".gz");
    s->fd = input ? dup(STDIN_FILENO) : open(path, O_RDONLY | O_CLOEXEC);
    if (s->fd < 0) {
        snprintf(s->error, sizeof s->error, "%s: cannot be opened: %s", path, strerror(errno));
        return false;
    }
    if (s->zipped) {
        s->in = (unsigned char*)host_alloc(block_bytes, 1);
        int window = 15 + 16;       // zlib: the largest window, and the header of gzip
        REQUIRE(inflateInit2(&s->z, window) == Z_OK, "%s: zlib does not start", path);
    }
    return true;
}

static void source_close(Source* s) {
    if (s->fd >= 0) close(s->fd);
    if (s->zipped && s->in) inflateEnd(&s->z);
    free(s->in);
}

// Up to n bytes of the file as it is; 0 at its end, -1 after an error.
static ssize_t source_read_raw(Source* s, unsigned char* out, size_t n) {
    ssize_t got;
    do got = read(s->fd, out, n);
    while (got < 0 && errno == EINTR);
    if (got < 0) {
        snprintf(s->error, sizeof s->error, "%s: byte %" PRId64 ": %s", s->path, s->in_offset,
                 strerror(errno));
        return -1;
    }
    s->in_offset += got;
    return got;
}

// Up to n bytes of text; 0 at the end, -1 after an error, which is in s->error.
static ssize_t source_read(Source* s, unsigned char* out, size_t n) {
    if (!s->zipped) return source_read_raw(s, out, n);
    z_stream* z = &s->z;
    z->next_out = out;
    z->avail_out = (uInt)n;
    while (z->avail_out == n && !s->ended) {
        if (z->avail_in == 0) {
            ssize_t got = source_read_raw(s, s->in, block_bytes);
            if (got < 0) return -1;
            z->next_in = s->in;
            z->avail_in = (uInt)got;
            s->ended = got == 0;
        }
        int64_t at = s->in_offset - z->avail_in;
        if (s->ended) {
            if (!s->member && at > 0) break;
            snprintf(s->error, sizeof s->error, "%s: byte %" PRId64 ": found the end of the file, "
                     "expected more of a gzip stream\nthe file was cut: make or download it again",
                     s->path, at);
            return -1;
        }
        s->member = true;
        int result = inflate(z, Z_NO_FLUSH);
        if (result == Z_STREAM_END) {           // another member may follow
            s->member = false;
            inflateReset(z);
        } else if (result != Z_OK && result != Z_BUF_ERROR) {
            snprintf(s->error, sizeof s->error, "%s: byte %" PRId64 ": found %s, expected a gzip "
                     "stream", s->path, s->in_offset - z->avail_in, z->msg ? z->msg : "bad data");
            return -1;
        }
    }
    return (ssize_t)(n - z->avail_out);
}

static Block* block_next(Pipeline* p) {
    pthread_mutex_lock(&p->mutex);
    Block* b = &p->ring[p->read % p->ring_n];
    while (b->state != BLOCK_FREE) pthread_cond_wait(&p->is_free, &p->mutex);
    pthread_mutex_unlock(&p->mutex);
    b->n = b->ids_n = 0;
    b->documents = 0;
    b->lines = b->opens = b->last = false;
    b->error[0] = 0;
    return b;
}

static void block_put(Pipeline* p, Block* b) {
    pthread_mutex_lock(&p->mutex);
    b->state = BLOCK_READ;
    p->read++;
    p->ended = b->last;
    if (b->last) pthread_cond_broadcast(&p->is_read);
    else pthread_cond_signal(&p->is_read);
    pthread_mutex_unlock(&p->mutex);
}

// Where a block that is read so far may end: behind its last line, or at a place between pieces.
static size_t block_cut(const Block* b) {
    if (!b->lines) return pretoken_cut(b->text, b->n);
    unsigned char* newline = (unsigned char*)memrchr(b->text, '\n', b->n);
    return newline ? (size_t)(newline - b->text) + 1 : 0;
}

// Reads a file into blocks; false after an error, which is in its last block.
static bool file_read(Pipeline* p, const char* path) {
    Source source;
    unsigned char* rest = NULL;     // what came after the cut
    size_t rest_n = 0, rest_room = 0;
    int64_t line = 1, offset = 0;
    bool opens = true, ended = false, ok = source_open(&source, path);
    while (!ended) {
        Block* b = block_next(p);
        b->path = source.path;
        b->lines = ends_with(path, ".jsonl") || ends_with(path, ".jsonl.gz");
        b->opens = opens;
        b->line = line;
        b->offset = offset;
        size_t cut = 0;
        b->text = (unsigned char*)array_grow(b->text, &b->room, rest_n + block_bytes, 1);
        if (rest_n > 0) memcpy(b->text, rest, rest_n);
        b->n = rest_n;
        for (size_t goal = block_bytes; ok && !ended && cut == 0; goal *= 2) {
            while (b->n < goal && ok && !ended) {
                size_t part = goal - b->n;
                if (part > block_bytes) part = block_bytes;
                b->text = (unsigned char*)array_grow(b->text, &b->room, b->n + part, 1);
                ssize_t got = source_read(&source, b->text + b->n, part);
                ok = got >= 0;
                ended = got == 0;
                if (got > 0) b->n += (size_t)got;
            }
            if (ended || !ok) break;
            cut = block_cut(b);
            if (cut == 0 && b->n >= block_longest) {
                snprintf(source.error, sizeof source.error, "%s: byte %" PRId64 " (line %" PRId64
                         "): found %zu bytes %s, expected at most %zu", path, offset, line, b->n,
                         b->lines ? "without a newline" : "of one class of characters",
                         block_longest);
                ok = false;
            }
        }
        // Up to an error only what is surely whole is worth a look: it may have an earlier error.
        if (!ok) {
            cut = block_cut(b);
            b->n = cut;
            snprintf(b->error, sizeof b->error, "%s", source.error);
            ended = true;
        }
        if (!ended) {
            rest_n = b->n - cut;
            rest = (unsigned char*)array_grow(rest, &rest_room, rest_n + 1, 1);
            memcpy(rest, b->text + cut, rest_n);
            b->n = cut;
        }
        for (size_t at = 0; b->lines && at < b->n; line++) {
            unsigned char* newline = (unsigned char*)memchr(b->text + at, '\n', b->n - at);
            if (!newline) break;
            at = (size_t)(newline - b->text) + 1;
        }
        offset += (int64_t)b->n;
        opens = false;
        b->last = !ok;
        block_put(p, b);
    }
    source_close(&source);
    free(rest);
    return ok;
}

static void* reader_main(void* pipeline) {
    Pipeline* p = (Pipeline*)pipeline;
    bool ok = true;
    for (int i = 0; i < p->path_count && ok; i++) ok = file_read(p, p->paths[i]);
    if (ok) {
        Block* b = block_next(p);
        b->path = "";
        b->last = true;
        block_put(p, b);
    }
    return NULL;
}

// ---- tokenizing ----------------------------------------------------------------------------

typedef struct Worker {
    Pipeline* pipeline;
    pthread_t thread;
    TokenizerWork work;
    int* ids;                       // of one document
    size_t ids_room;
} Worker;

static void block_encode(Worker* w, Block* b, bool opens, const unsigned char* text, size_t n) {
    const Tokenizer* t = w->pipeline->tokenizer;
    w->ids = (int*)array_grow(w->ids, &w->ids_room, n, sizeof(int));
    size_t count = tokenizer_encode(&w->work, w->ids, n, text, n);
    b->ids = (uint16_t*)array_grow(b->ids, &b->ids_room, b->ids_n + count + 1, sizeof(uint16_t));
    if (opens) b->ids[b->ids_n++] = (uint16_t)t->end_of_text;
    b->documents += opens;
    for (size_t i = 0; i < count; i++) b->ids[b->ids_n + i] = (uint16_t)w->ids[i];
    b->ids_n += count;
}

// The string "text" of the object that is this line; false with j->error.
static bool line_text(JsonReader* j, unsigned char** text, size_t* n) {
    bool found = false;
    if (!json_read_byte(j, '{', "'{' and an object with \"text\"")) return false;
    for (bool first = true;; first = false) {
        unsigned char* key;
        size_t key_n;
        json_read_space(j);
        if (first && j->at < j->n && j->text[j->at] == '}') break;
        size_t at = j->at;
        if (!json_read_string(j, &key, &key_n)) return false;
        bool wanted = key_n == 4 && memcmp(key, "text", 4) == 0;
        if (!json_read_byte(j, ':', "':'")) return false;
        if (wanted && found) return json_fail(j, at, "\"text\" once");
        if (wanted ? !json_read_string(j, text, n) : !json_skip_value(j, 100)) return false;
        found |= wanted;
        json_read_space(j);
        if (j->at == j->n || j->text[j->at] != ',') break;
        j->at++;
    }
    size_t end = j->at;
    if (!json_read_byte(j, '}', "',' or '}'")) return false;
    json_read_space(j);
    if (j->at < j->n) return json_fail(j, j->at, "the end of the line");
    return found || json_fail(j, end, "\"text\": \"...\"");
}

static void block_lines(Worker* w, Block* b) {
    int64_t line = b->line;
    for (size_t at = 0; at < b->n; line++) {
        unsigned char* newline = (unsigned char*)memchr(b->text + at, '\n', b->n - at);
        size_t n = newline ? (size_t)(newline - b->text) - at : b->n - at;
        JsonReader j = { b->text + at, n, 0, "" };
        unsigned char* text;
        size_t text_n;
        json_read_space(&j);
        if (j.at < n) {                         // a line without anything is no document
            if (!line_text(&j, &text, &text_n)) {
                snprintf(b->error, sizeof b->error,
                         "%s: line %" PRId64 ", column %zu (byte %" PRId64 "): %s", b->path, line,
                         j.at + 1, b->offset + (int64_t)(at + j.at), j.error);
                return;
            }
            block_encode(w, b, true, text, text_n);
        }
        at += n + 1;
    }
}

static void* worker_main(void* worker) {
    Worker* w = (Worker*)worker;
    Pipeline* p = w->pipeline;
    tokenizer_work_open(&w->work, p->tokenizer);
    for (;;) {
        pthread_mutex_lock(&p->mutex);
        while (p->taken == p->read && !p->ended) pthread_cond_wait(&p->is_read, &p->mutex);
        Block* b = p->taken < p->read ? &p->ring[p->taken++ % p->ring_n] : NULL;
        if (b) b->state = BLOCK_TAKEN;
        pthread_mutex_unlock(&p->mutex);
        if (!b) break;
        if (b->lines) block_lines(w, b);
        else if (b->n > 0 || b->opens) block_encode(w, b, b->opens, b->text, b->n);
        pthread_mutex_lock(&p->mutex);
        b->state = BLOCK_DONE;
        pthread_cond_signal(&p->is_done);
        pthread_mutex_unlock(&p->mutex);
    }
    tokenizer_work_close(&w->work);
    free(w->ids);
    return NULL;
}

// ---- writing -------------------------------------------------------------------------------

static char partial_path[4096 + 16];            // the file that is not whole yet; "": none

static void partial_remove(void) {
    if (partial_path[0]) unlink(partial_path);
}

static void partial_interrupted(int signal) {
    partial_remove();
    _exit(128 + signal);
}

typedef struct Writer {
    const char* prefix;
    int64_t val_tokens, shard_tokens;
    int number;                     // of the shard under way; 0: validation
    char path[4096];
    FILE* file;                     // NULL: none under way
    int64_t tokens;                 // in the shard under way
    int64_t total;
} Writer;

static void writer_open(Writer* w) {
    static const char HEADER[SHARD_HEADER_BYTES] = {0};
    int n = snprintf(w->path, sizeof w->path, "%s_%s_%06d.bin", w->prefix,
                     w->number ? "train" : "val", w->number);
    REQUIRE(n > 0 && (size_t)n < sizeof w->path, "--out is too long");
    // Known before it is there: a signal may come at once.
    snprintf(partial_path, sizeof partial_path, "%s.partial", w->path);
    w->file = fopen(partial_path, "wb");
    REQUIRE(w->file, "%s: cannot be created: %s", partial_path, strerror(errno));
    REQUIRE(fwrite(HEADER, sizeof HEADER, 1, w->file) == 1, "%s: cannot be written: %s",
            partial_path, strerror(errno));
    w->tokens = 0;
}

// The folder holds the name: without its own fsync a power failure may take the name back.
static void folder_sync(const char* path) {
    char folder[4096];
    const char* slash = strrchr(path, '/');
    int n = slash ? (int)(slash - path) + 1 : 1;
    snprintf(folder, sizeof folder, "%.*s", n, slash ? path : ".");
    int fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return;
    fsync(fd);                      // not every file system can; the shard itself is safe
    close(fd);
}

// The header counts tokens, so it is written when they are known.
static void writer_finish(Writer* w) {
    if (!w->file) return;
    int32_t header[SHARD_HEADER_BYTES / 4] = { SHARD_MAGIC, SHARD_VERSION, (int32_t)w->tokens };
    bool ok = fseek(w->file, 0, SEEK_SET) == 0 && fwrite(header, sizeof header, 1, w->file) == 1 &&
              fflush(w->file) == 0 && fsync(fileno(w->file)) == 0;
    int error = errno;
    ok = fclose(w->file) == 0 && ok;
    w->file = NULL;
    REQUIRE(ok, "%s: cannot be written: %s", partial_path, strerror(error));
    REQUIRE(rename(partial_path, w->path) == 0, "%s: cannot be renamed to %s: %s", partial_path,
            w->path, strerror(errno));
    partial_path[0] = 0;
    folder_sync(w->path);
    printf("%s: %" PRId64 " tokens\n", w->path, w->tokens);
    fflush(stdout);
    w->number++;
}

static void writer_put(Writer* w, const uint16_t* ids, size_t n) {
    for (size_t at = 0; at < n;) {
        if (!w->file) writer_open(w);
        int64_t room = (w->number ? w->shard_tokens : w->val_tokens) - w->tokens;
        size_t part = (int64_t)(n - at) < room ? n - at : (size_t)room;
        REQUIRE(fwrite(ids + at, sizeof *ids, part, w->file) == part, "%s: cannot be written: %s",
                partial_path, strerror(errno));
        w->tokens += (int64_t)part;
        w->total += (int64_t)part;
        at += part;
        if ((int64_t)part == room) writer_finish(w);
    }
}

static void writer_check_leftover(const char* prefix) {
    static const char* const SETS[] = { "val", "train" };
    for (int i = 0; i < 2; i++) {
        char pattern[2 * 4096];
        size_t n = 0;
        for (const char* c = prefix; *c && n + 2 < 4096; c++) {     // --out itself is no pattern
            if (strchr("*?[\\", *c)) pattern[n++] = '\\';
            pattern[n++] = *c;
        }
        snprintf(pattern + n, sizeof pattern - n, "_%s_*.bin", SETS[i]);
        glob_t found;
        if (glob(pattern, 0, NULL, &found) == 0) {
            die("%s is there from before, with %zu of its set; expected none under this --out\n"
                "remove them, or give another --out", found.gl_pathv[0], found.gl_pathc);
        }
        globfree(&found);
    }
}

// ---- progress ------------------------------------------------------------------------------

static double seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

typedef struct Progress {
    bool shown;                     // standard error is a terminal
    double start, printed;
    int64_t bytes, documents;
} Progress;

static void progress_show(Progress* p, int64_t tokens) {
    double now = seconds_now();
    if (!p->shown || now - p->printed < 0.5) return;
    p->printed = now;
    fprintf(stderr, "\r%.1f MB, %" PRId64 " documents, %.1fM tokens, %.1f MB/s  ",
            1e-6 * (double)p->bytes, p->documents, 1e-6 * (double)tokens,
            1e-6 * (double)p->bytes / (now - p->start));
}

// ---- main ----------------------------------------------------------------------------------

static void tokenize_files(const Tokenizer* t, Writer* writer, char** paths, int count,
                           int threads) {
    static Pipeline p;
    Progress progress = { isatty(STDERR_FILENO) == 1, seconds_now(), 0, 0, 0 };
    p.tokenizer = t;
    p.paths = paths;
    p.path_count = count;
    p.ring_n = 2 * (uint64_t)threads + 2;
    p.ring = (Block*)host_alloc(p.ring_n, sizeof(Block));
    p.read = p.taken = 0;
    p.ended = false;
    pthread_mutex_init(&p.mutex, NULL);
    pthread_cond_init(&p.is_free, NULL);
    pthread_cond_init(&p.is_read, NULL);
    pthread_cond_init(&p.is_done, NULL);
    pthread_t reader;
    Worker* worker = (Worker*)host_alloc((size_t)threads, sizeof(Worker));
    int error = pthread_create(&reader, NULL, reader_main, &p);
    for (int i = 0; i < threads && !error; i++) {
        worker[i].pipeline = &p;
        error = pthread_create(&worker[i].thread, NULL, worker_main, &worker[i]);
    }
    REQUIRE(!error, "%d threads cannot be started: %s\ntry --threads 1", threads + 1,
            strerror(error));

    bool last = false;
    for (uint64_t i = 0; !last; i++) {
        Block* b = &p.ring[i % p.ring_n];
        pthread_mutex_lock(&p.mutex);
        while (b->state != BLOCK_DONE) pthread_cond_wait(&p.is_done, &p.mutex);
        pthread_mutex_unlock(&p.mutex);
        if (b->error[0]) {
            // The threads end with the process: the reader may be waiting for standard input.
            pthread_detach(reader);
            for (int k = 0; k < threads; k++) pthread_detach(worker[k].thread);
            if (progress.shown) fputc('\n', stderr);
            die("%s", b->error);
        }
        writer_put(writer, b->ids, b->ids_n);
        progress.bytes += (int64_t)b->n;
        progress.documents += b->documents;
        last = b->last;
        pthread_mutex_lock(&p.mutex);
        b->state = BLOCK_FREE;
        pthread_cond_signal(&p.is_free);
        pthread_mutex_unlock(&p.mutex);
        progress_show(&progress, writer->total);
    }
    pthread_join(reader, NULL);
    for (int i = 0; i < threads; i++) pthread_join(worker[i].thread, NULL);
    for (uint64_t i = 0; i < p.ring_n; i++) {
        free(p.ring[i].text);
        free(p.ring[i].ids);
    }
    free(p.ring);
    free(worker);
    if (progress.shown) fputc('\n', stderr);
    REQUIRE(writer->total > 0, "%s%s: no documents to make tokens of", paths[0],
            count > 1 ? ", ..." : "");
    REQUIRE(writer->total >= writer->val_tokens, "%" PRId64 " tokens in all, but --val-tokens is %"
            PRId64 "\ngive more text or ask for fewer", writer->total, writer->val_tokens);
    writer_finish(writer);
    double seconds = seconds_now() - progress.start;
    printf("%" PRId64 " documents, %" PRId64 " bytes, %" PRId64 " tokens in %.2f s: %.1f MB/s with "
           "%d threads\n", progress.documents, progress.bytes, writer->total, seconds,
           1e-6 * (double)progress.bytes / seconds, threads);
}

static void print_ids(const Tokenizer* t) {
    unsigned char* text = NULL;
    size_t n = 0, room = 0;
    for (size_t got = 1; got > 0; n += got) {
        text = (unsigned char*)array_grow(text, &room, n + block_bytes, 1);
        got = fread(text + n, 1, block_bytes, stdin);
    }
    REQUIRE(!ferror(stdin), "standard input: byte %zu: %s", n, strerror(errno));
    TokenizerWork work;
    tokenizer_work_open(&work, t);
    int* ids = (int*)host_alloc(n, sizeof(int));
    size_t count = tokenizer_encode(&work, ids, n, text, n);
    for (size_t i = 0; i < count; i++) printf(i ? " %d" : "%d", ids[i]);
    printf("\n");
    REQUIRE(fflush(stdout) == 0, "standard output: %s", strerror(errno));
    tokenizer_work_close(&work);
    free(ids);
    free(text);
}

static int64_t number_of(const char* flag, const char* text, int64_t low, int64_t high) {
    char* end;
    errno = 0;
    long long value = strtoll(text, &end, 10);
    REQUIRE(end != text && *end == 0 && errno == 0 && value >= low && value <= high,
            "%s must be a whole number from %" PRId64 " to %" PRId64 ", got '%s'", flag, low, high,
            text);
    return value;
}

int main(int argc, char** argv) {
    static const char USAGE[] =
        "usage: tokenize --tokenizer DIR --out PREFIX [--shard-tokens N] [--val-tokens N] "
        "[--threads N] FILE...\n"
        "       tokenize --tokenizer DIR --ids";
    static Tokenizer t;
    static Writer writer;
    const char* vocabulary = NULL;
    bool ids = false;
    int files = 0;
    cpu_set_t cores;
    int threads = sched_getaffinity(0, sizeof cores, &cores) == 0 ? CPU_COUNT(&cores) : 1;
    program_name = "tokenize";
    writer.shard_tokens = 100000000;
    for (int i = 1; i < argc; i++) {
        const char *flag = argv[i], *value = argv[i + 1];
        if (strcmp(flag, "--ids") == 0) {
            ids = true;
            continue;
        }
        if (strncmp(flag, "--", 2) != 0) {
            argv[files++] = argv[i];            // the files stay behind, in order
            continue;
        }
        if (strcmp(flag, "--help") == 0) {
            printf("%s\n", USAGE);
            return 0;
        }
        static const char* const FLAGS[] = { "--tokenizer", "--out", "--shard-tokens",
                                             "--val-tokens", "--threads" };
        int which = 0;
        while (which < 5 && strcmp(flag, FLAGS[which]) != 0) which++;
        REQUIRE(which < 5, "no flag %s\n%s", flag, USAGE);
        REQUIRE(value, "%s wants a value\n%s", flag, USAGE);
        i++;
        if (which == 0) vocabulary = value;
        if (which == 1) writer.prefix = value;
        if (which == 2) writer.shard_tokens = number_of(flag, value, 1, INT32_MAX);
        if (which == 3) writer.val_tokens = number_of(flag, value, 0, INT32_MAX);
        if (which == 4) threads = (int)number_of(flag, value, 1, MAX_THREADS);
    }
    bool shards = writer.prefix && files > 0;
    REQUIRE(vocabulary && ids != shards && (!ids || (files == 0 && !writer.prefix)),
            "nothing to do\n%s", USAGE);
    for (int i = 0; i < files; i++) {
        bool known = strcmp(argv[i], "-") == 0 || ends_with(argv[i], ".txt") ||
                     ends_with(argv[i], ".jsonl") || ends_with(argv[i], ".jsonl.gz");
        REQUIRE(known, "%s: found no known kind of file, expected .txt, .jsonl or .jsonl.gz\n"
                "'-' is standard input as text, '-.jsonl' as JSON lines; parquet: "
                "dev/parquet_to_jsonl.py FILE... | tokenize ... -.jsonl", argv[i]);
    }
    tokenizer_open(&t, vocabulary);
    if (ids) {
        print_ids(&t);
    } else {
        REQUIRE(t.vocab <= 65536, "%s: %d ids, but a shard holds at most 65536", vocabulary,
                t.vocab);
        writer_check_leftover(writer.prefix);
        writer.number = writer.val_tokens > 0 ? 0 : 1;
        atexit(partial_remove);
        signal(SIGINT, partial_interrupted);
        signal(SIGTERM, partial_interrupted);
        signal(SIGHUP, partial_interrupted);
        tokenize_files(&t, &writer, argv, files, threads);
    }
    tokenizer_close(&t);
    return 0;
}
