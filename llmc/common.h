/*
What every file uses: how to stop, how to demand, and what the letters mean.

    B  sequences             C  channels            V  vocabulary columns, padded
    T  tokens of a sequence  H  heads               L  layers
    N  = B*T rows            D  = C/H, head dim     R  rows of logits held at one time
    F  = 4*C, MLP channels   P  ranks

A tensor called y of shape (N, C) is row-major and contiguous unless its header says otherwise; dy
is the gradient of the loss with respect to y. Sizes are int; a product of two sizes is size_t or
int64_t.

test        test/test_services.c: common
*/
#pragma once
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

// The name that opens every error message; the tools in dev/ and the tests set their own.
static const char* program_name = "train_gpt2";

// ---- stopping ------------------------------------------------------------------------------

// Of the trainer. 75 asks to be started again: a signal came, and a checkpoint is there.
enum { STATUS_DONE = 0, STATUS_ERROR = 1, STATUS_NOT_FINITE = 2, STATUS_AGAIN = 75,
       STATUS_AT_ONCE = 130 };

// Where several ranks run llmc/ranks.h puts a function here: it sees to it that the message is
// printed once, that every rank ends, and does not return.
static void (*die_ranks)(const char* text);

// "prefix: text" as it is printed. After a newline the text goes on below its own first letter: the
// first line states the fact, the second says what to do.
static inline void message_text(char* out, size_t size, const char* prefix, const char* text) {
    size_t indent = strlen(prefix) + 2;
    size_t n = (size_t)snprintf(out, size, "%s: ", prefix);
    for (const char* line = text; *line && n < size;) {
        size_t length = strcspn(line, "\n");
        n += (size_t)snprintf(out + n, size - n, "%*s%.*s\n", line == text ? 0 : (int)indent, "",
                              (int)length, line);
        line += length + (line[length] == '\n');
    }
}

// Prints "name: message" to stderr and exits with status 1.
static inline void die(const char* fmt, ...) __attribute__((noreturn, format(printf, 1, 2)));

static inline void die(const char* fmt, ...) {
    char text[4096], message[8192];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    fflush(stdout);    // so that the message stands below what led to it
    if (die_ranks) die_ranks(text);
    message_text(message, sizeof message, program_name, text);
    fputs(message, stderr);
    exit(1);
}

// A condition on what the caller or the user gave; never compiled out. The message names the thing,
// the value found and the value wanted.
#define REQUIRE(condition, ...) \
    do { \
        if (!(condition)) die(__VA_ARGS__); \
    } while (0)

// Handlers run on the alternate stack where there is one: in the CPU build a signal may come while a
// library keeps the stack pointer in memory of its own.
static inline void on_signal(int number, void (*handler)(int)) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = handler;
    action.sa_flags = SA_RESTART | SA_ONSTACK;
    sigaction(number, &action, NULL);
}

// ---- arithmetic, memory, text --------------------------------------------------------------

static inline size_t ceil_div(size_t a, size_t b) {
    return (a + b - 1) / b;
}

// Seconds, from some time on; for differences.
static inline double clock_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// Host memory that exists or the program ends. Zeroed, because a count times a size is checked by
// calloc.
static inline void* host_alloc(size_t count, size_t size) {
    void* p = calloc(count ? count : 1, size);
    REQUIRE(p, "out of memory: %zu x %zu bytes of host memory are not to be had", count, size);
    return p;
}

// Room for `wanted` elements of `size` bytes, and half as many again, or the program ends. *room is
// what there was, and then what there is; what is added is not zeroed.
static inline void* array_grow(void* p, size_t* room, size_t wanted, size_t size) {
    if (wanted <= *room) return p;
    *room = wanted + wanted / 2;
    p = realloc(p, *room * size);
    REQUIRE(p, "out of memory: %zu x %zu bytes of host memory are not to be had", *room, size);
    return p;
}

// A 64-bit FNV-1a hash, to tell differences; no protection against intent.
#define HASH_START 14695981039346656037ull
static inline uint64_t hash_bytes(uint64_t hash, const void* data, size_t n) {
    const unsigned char* byte = (const unsigned char*)data;
    for (size_t i = 0; i < n; i++) hash = (hash ^ byte[i]) * 1099511628211ull;
    return hash;
}

static inline void file_write(const char* path, const void* data, size_t bytes) {
    FILE* out = fopen(path, "w");
    REQUIRE(out, "%s: cannot be created: %s", path, strerror(errno));
    bool ok = fwrite(data, 1, bytes, out) == bytes;
    ok = fclose(out) == 0 && ok;
    REQUIRE(ok, "%s: cannot be written: %s", path, strerror(errno));
}

static inline uint64_t file_hash(const char* path) {
    unsigned char part[65536];
    uint64_t hash = HASH_START;
    FILE* file = fopen(path, "rb");
    REQUIRE(file, "%s cannot be opened: %s", path, strerror(errno));
    for (size_t n; (n = fread(part, 1, sizeof part, file)) > 0;) hash = hash_bytes(hash, part, n);
    REQUIRE(!ferror(file), "%s cannot be read: %s", path, strerror(errno));
    fclose(file);
    return hash;
}

// Bytes of the UTF-8 sequence that starts at s, or 0 if none does: overlong forms, surrogates,
// stray and missing continuation bytes are none.
static inline int utf8_length(const unsigned char* s, size_t left) {
    int n = s[0] < 0x80 ? 1 : s[0] < 0xe0 ? 2 : s[0] < 0xf0 ? 3 : 4;
    if (s[0] >= 0x80 && (s[0] < 0xc2 || s[0] > 0xf4)) return 0;
    if ((size_t)n > left) return 0;
    for (int i = 1; i < n; i++) {
        if ((s[i] & 0xc0) != 0x80) return 0;
    }
    if (s[0] == 0xe0 && s[1] < 0xa0) return 0;
    if (s[0] == 0xed && s[1] > 0x9f) return 0;
    if (s[0] == 0xf0 && s[1] < 0x90) return 0;
    if (s[0] == 0xf4 && s[1] > 0x8f) return 0;
    return n;
}

// Writes n bytes as a JSON string. What is not UTF-8 (a sampled byte, a file name) becomes U+FFFD,
// so that the line stays readable to every JSON parser.
static inline void json_string(FILE* out, const char* text, size_t n) {
    const unsigned char* s = (const unsigned char*)text;
    fputc('"', out);
    for (size_t i = 0; i < n;) {
        int length = utf8_length(s + i, n - i);
        if (length == 0) fputs("\\ufffd", out);
        else if (s[i] == '"' || s[i] == '\\') fprintf(out, "\\%c", s[i]);
        else if (s[i] < 0x20 || s[i] == 0x7f) fprintf(out, "\\u%04x", s[i]);
        else fwrite(s + i, 1, (size_t)length, out);
        i += length ? (size_t)length : 1;
    }
    fputc('"', out);
}

// The shortest decimal that reads back as the same double; whole numbers without an exponent.
static inline const char* real_text(char* text, size_t size, double v) {
    if (v == floor(v) && fabs(v) < 1e15) {
        snprintf(text, size, "%.0f", v);
        return text;
    }
    for (int digits = 1; digits <= 17; digits++) {
        snprintf(text, size, "%.*g", digits, v);
        if (strtod(text, NULL) == v) break;
    }
    return text;
}

// JSON has no word for NaN and infinity: they are written as null.
static inline void json_real(FILE* out, double v) {
    char text[40];
    fputs(v - v == 0 ? real_text(text, sizeof text, v) : "null", out);
}
