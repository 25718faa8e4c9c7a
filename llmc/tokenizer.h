/*
Bytes to the ids of a GPT-2 (byte-level BPE) vocabulary, and back.

    Tokenizer t;
    TokenizerWork w;                          // one per thread
    tokenizer_open(&t, "data/gpt2");          // or "gpt2.tiktoken"
    tokenizer_work_open(&w, &t);
    n = tokenizer_encode(&w, ids, room, text, bytes);        // room >= bytes
    n = tokenizer_decode(&t, text, room, ids, n);

The text is cut into pieces (llmc/pretokenize.h). Within a piece, which starts as single bytes, the
neighbours of the lowest rank are joined, the leftmost first, until no neighbours have a rank. Any
bytes have ids, and these give the same bytes back. The text `<|endoftext|>` has none of its own:
id end_of_text stands only where the caller puts it.

A vocabulary is
    a folder     vocab.bpe, the joins in order of their ranks, in GPT-2's spelling of bytes, and
                 encoder.json, the ids. Without encoder.json the ids are GPT-2's: the 256 bytes in
                 the order of the spelling, the joins, the end of text.
    a file       of lines "base64 rank", as tiktoken has them: id = rank, neighbours may be joined
                 if the result is in the file, a piece that is in the file is one id whether joins
                 lead there or not. The end of text is one past the last rank, as in GPT-2.
Whatever is wrong in it ends the program with one message: file, place, what was found and what was
expected. hash is over the texts of all ids in order, so it is the same however GPT-2 was loaded.

Cost: per piece of up to 15 bytes a look-up in the thread's cache of a megabyte; what is not there,
or longer, is merged: O(n^2) up to 64 bytes, then O(n log n) with a heap and 32 bytes of memory per
byte of the piece. A Tokenizer does not change once it is open and may be shared by threads.

test        test/test_tokenizer.c: tokenizer, vocabulary, fuzz
*/
#pragma once
#include "common.h"
#include "pretokenize.h"

#include <sys/stat.h>

#define END_OF_TEXT "<|endoftext|>"

// ---- what stands at a place, for messages --------------------------------------------------

// At most 24 bytes of s in quotes, what is not printable as \xNN; "the end" if there are none.
static inline const char* found_text(char* out, size_t size, const unsigned char* s, size_t n) {
    size_t at = 0;
    if (n == 0) {
        snprintf(out, size, "the end");
        return out;
    }
    at += (size_t)snprintf(out, size, "'");
    for (size_t i = 0; i < n && i < 24; i++) {
        bool plain = s[i] >= 0x20 && s[i] < 0x7f;
        at += (size_t)snprintf(out + at, size - at, plain ? "%c" : "\\x%02x", s[i]);
    }
    snprintf(out + at, size - at, n > 24 ? "...'" : "'");
    return out;
}

// ---- reading JSON --------------------------------------------------------------------------

// Strict JSON (RFC 8259) in valid UTF-8. A function that returns false has filled error and left
// `at` where the trouble is; nothing dies here, because threads read lines ahead of their turn.
typedef struct JsonReader {
    unsigned char* text;
    size_t n, at;
    char error[256];
} JsonReader;

static inline bool json_fail(JsonReader* j, size_t at, const char* expected) {
    char found[160];
    j->at = at;
    found_text(found, sizeof found, j->text + at, j->n - at < 8 ? j->n - at : 8);
    snprintf(j->error, sizeof j->error, "found %s, expected %s", found, expected);
    return false;
}

static inline void json_read_space(JsonReader* j) {
    while (j->at < j->n && (j->text[j->at] == ' ' || j->text[j->at] == '\t' ||
                            j->text[j->at] == '\n' || j->text[j->at] == '\r')) j->at++;
}

static inline bool json_read_byte(JsonReader* j, char byte, const char* expected) {
    json_read_space(j);
    bool ok = j->at < j->n && j->text[j->at] == (unsigned char)byte;
    if (!ok) return json_fail(j, j->at, expected);
    j->at++;
    return true;
}

// Four hexadecimal digits at `at`, or -1.
static inline int json_hex(const JsonReader* j, size_t at) {
    int code = 0;
    if (j->n - at < 4) return -1;
    for (int i = 0; i < 4; i++) {
        int c = j->text[at + (size_t)i], lower = c | 0x20, digit;
        if (c >= '0' && c <= '9') digit = c - '0';
        else if (lower >= 'a' && lower <= 'f') digit = lower - 'a' + 10;
        else return -1;
        code = code << 4 | digit;
    }
    return code;
}

static inline size_t utf8_put(unsigned char* out, uint32_t code) {
    if (code < 0x80) {
        out[0] = (unsigned char)code;
        return 1;
    }
    size_t n = code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    for (size_t i = n; i-- > 1; code >>= 6) out[i] = (unsigned char)(0x80 | (code & 0x3f));
    out[0] = (unsigned char)(0xf00 >> n | code);
    return n;
}

// The code point of the escape \uXXXX, or of the two that make a surrogate pair; false: neither.
static inline bool json_read_code(JsonReader* j, size_t* at, uint32_t* code) {
    const unsigned char* s = j->text + *at;
    size_t left = j->n - *at;
    int high = left >= 6 && s[1] == 'u' ? json_hex(j, *at + 2) : -1;
    if (high < 0) {
        return json_fail(j, *at, "an escape, \\uXXXX or one of \\\" \\\\ \\/ \\b \\f \\n \\r \\t");
    }
    *code = (uint32_t)high;
    size_t bytes = 6;
    if (high >= 0xd800 && high < 0xe000) {
        int low = left >= 12 && s[6] == '\\' && s[7] == 'u' ? json_hex(j, *at + 8) : -1;
        if (high >= 0xdc00 || low < 0xdc00 || low >= 0xe000) {
            return json_fail(j, *at, "a surrogate pair, \\ud800-\\udbff and \\udc00-\\udfff");
        }
        *code = 0x10000 + ((uint32_t)(high - 0xd800) << 10) + (uint32_t)(low - 0xdc00);
        bytes = 12;
    }
    *at += bytes;
    return true;
}

// A string, its text written over its own source: no escape is shorter than what it stands for.
static inline bool json_read_string(JsonReader* j, unsigned char** start, size_t* length) {
    if (!json_read_byte(j, '"', "'\"' and a string")) return false;
    unsigned char *s = j->text, *out = s + j->at;
    size_t at = j->at, n = j->n;
    *start = out;
    for (;;) {
        size_t from = at;
        while (at < n && s[at] >= 0x20 && s[at] < 0x80 && s[at] != '"' && s[at] != '\\') at++;
        if (out != s + from) memmove(out, s + from, at - from);
        out += at - from;
        if (at == n) return json_fail(j, at, "'\"' at the end of a string");
        unsigned char c = s[at];
        if (c == '"') break;
        if (c < 0x20) return json_fail(j, at, "a string, in which control characters are escaped");
        if (c >= 0x80) {
            int bytes = utf8_length(s + at, n - at);
            if (bytes == 0) return json_fail(j, at, "valid UTF-8");
            memmove(out, s + at, (size_t)bytes);
            out += bytes;
            at += (size_t)bytes;
            continue;
        }
        static const char NAMES[] = "\"\\/bfnrt", MEANT[] = "\"\\/\b\f\n\r\t";
        const char* name = at + 1 < n && s[at + 1] ? strchr(NAMES, s[at + 1]) : NULL;
        if (name) {
            *out++ = (unsigned char)MEANT[name - NAMES];
            at += 2;
            continue;
        }
        uint32_t code;
        if (!json_read_code(j, &at, &code)) return false;
        out += utf8_put(out, code);
    }
    *length = (size_t)(out - *start);
    j->at = at + 1;
    return true;
}

static inline size_t json_digits(const JsonReader* j, size_t at) {
    size_t from = at;
    while (at < j->n && j->text[at] >= '0' && j->text[at] <= '9') at++;
    return at - from;
}

static inline bool json_read_number(JsonReader* j) {
    size_t at = j->at, digits;
    if (j->text[at] == '-') at++;
    digits = json_digits(j, at);
    if (digits == 0) return json_fail(j, at, "a value");
    if (digits > 1 && j->text[at] == '0') return json_fail(j, at, "a number without leading zeros");
    at += digits;
    if (at < j->n && j->text[at] == '.') {
        digits = json_digits(j, ++at);
        if (digits == 0) return json_fail(j, at, "a digit");
        at += digits;
    }
    if (at < j->n && (j->text[at] | 0x20) == 'e') {
        at++;
        if (at < j->n && (j->text[at] == '+' || j->text[at] == '-')) at++;
        digits = json_digits(j, at);
        if (digits == 0) return json_fail(j, at, "a digit");
        at += digits;
    }
    j->at = at;
    return true;
}

// Any value, which is read and forgotten. 100 levels: a stack has an end, and text no such depth.
static inline bool json_skip_value(JsonReader* j, int depth) {
    static const char* const WORDS[] = { "true", "false", "null" };
    unsigned char* start;
    size_t length;
    json_read_space(j);
    int c = j->at < j->n ? j->text[j->at] : 0;
    if (c == '"') return json_read_string(j, &start, &length);
    for (int i = 0; i < 3; i++) {
        size_t n = strlen(WORDS[i]);
        if (j->n - j->at < n || memcmp(j->text + j->at, WORDS[i], n) != 0) continue;
        j->at += n;
        return true;
    }
    if (c != '{' && c != '[') {
        return j->at < j->n ? json_read_number(j) : json_fail(j, j->at, "a value");
    }
    if (depth == 0) return json_fail(j, j->at, "at most 100 levels of values");
    char close = c == '{' ? '}' : ']';
    j->at++;
    json_read_space(j);
    if (j->at < j->n && j->text[j->at] == (unsigned char)close) {
        j->at++;
        return true;
    }
    for (;;) {
        if (c == '{') {
            if (!json_read_string(j, &start, &length)) return false;
            if (!json_read_byte(j, ':', "':'")) return false;
        }
        if (!json_skip_value(j, depth - 1)) return false;
        json_read_space(j);
        if (j->at < j->n && j->text[j->at] == ',') {
            j->at++;
            continue;
        }
        return json_read_byte(j, close, c == '{' ? "',' or '}'" : "',' or ']'");
    }
}

// ---- the tokenizer -------------------------------------------------------------------------

enum { PAIR_NONE = -1 };

typedef struct TokenizerPair {
    int left, right;            // ids of neighbours; left is PAIR_NONE in an empty place
    int rank, id;               // of what they become
} TokenizerPair;

typedef struct Tokenizer {
    int vocab;                  // ids 0 to vocab - 1
    int end_of_text;
    uint64_t hash;
    int byte_id[256];
    bool whole;                 // a piece that is a token is that token
    unsigned char* bytes;       // of all tokens
    size_t* start;              // (vocab) where a token's are
    size_t* length;             // (vocab)
    int* names;                 // hash table from bytes to ids; PAIR_NONE: empty
    TokenizerPair* pairs;       // hash table from neighbours to what they become
    int names_bits, pairs_bits; // log2 of their sizes, at most half full
} Tokenizer;

static inline int table_bits(size_t entries) {
    int bits = 4;
    while ((size_t)1 << bits < 2 * entries) bits++;
    return bits;
}

// The place of these bytes in names: their own, or the empty one where they would be.
static inline int* tokenizer_name(const Tokenizer* t, const unsigned char* s, size_t n) {
    size_t mask = ((size_t)1 << t->names_bits) - 1, at = hash_bytes(HASH_START, s, n) & mask;
    for (; t->names[at] != PAIR_NONE; at = (at + 1) & mask) {
        int id = t->names[at];
        if (t->length[id] == n && memcmp(t->bytes + t->start[id], s, n) == 0) break;
    }
    return &t->names[at];
}

static inline TokenizerPair* tokenizer_pair(const Tokenizer* t, int left, int right) {
    uint64_t key = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    size_t mask = ((size_t)1 << t->pairs_bits) - 1;
    size_t at = (key * 0x9e3779b97f4a7c15ull) >> (64 - t->pairs_bits);
    for (; t->pairs[at].left != PAIR_NONE; at = (at + 1) & mask) {
        if (t->pairs[at].left == left && t->pairs[at].right == right) break;
    }
    return &t->pairs[at];
}

// ---- reading a vocabulary ------------------------------------------------------------------

// One token or join as it is read: bytes from `start` on, and where in the file it stands.
typedef struct VocabEntry {
    size_t start, length;
    size_t left;                // joins: bytes of the left part
    int64_t id;
    size_t place;               // line, or in encoder.json the byte
} VocabEntry;

typedef struct VocabList {
    char path[4096];
    unsigned char* text;        // the file
    size_t n;
    unsigned char* bytes;       // of the entries; no entry has more than its source
    size_t bytes_n;
    VocabEntry* entry;
    size_t count, room;
} VocabList;

static inline void vocab_read(VocabList* v, const char* folder, const char* name) {
    memset(v, 0, sizeof *v);
    int n = snprintf(v->path, sizeof v->path, "%s%s%s", folder, *name ? "/" : "", name);
    REQUIRE(n > 0 && (size_t)n < sizeof v->path, "%s: the path is too long", folder);
    FILE* file = fopen(v->path, "rb");
    REQUIRE(file, "%s: cannot be opened: %s", v->path, strerror(errno));
    struct stat info;
    REQUIRE(fstat(fileno(file), &info) == 0 && S_ISREG(info.st_mode),
            "%s: not a file, expected a vocabulary", v->path);
    REQUIRE(info.st_size < 1 << 30,
            "%s: %" PRId64 " bytes, expected a vocabulary of less than 1 GiB", v->path,
            (int64_t)info.st_size);
    v->n = (size_t)info.st_size;
    v->text = (unsigned char*)host_alloc(v->n + 1, 1);
    v->bytes = (unsigned char*)host_alloc(v->n + 1, 1);
    size_t got = fread(v->text, 1, v->n, file);
    REQUIRE(got == v->n, "%s: reading at byte %zu: %s", v->path, got,
            ferror(file) ? strerror(errno) : "the file ends early");
    fclose(file);
}

static inline void vocab_free(VocabList* v) {
    free(v->text);
    free(v->bytes);
    free(v->entry);
    memset(v, 0, sizeof *v);
}

static inline VocabEntry* vocab_add(VocabList* v, size_t place) {
    if (v->count == v->room) {
        v->room = v->room ? 2 * v->room : 4096;
        v->entry = (VocabEntry*)realloc(v->entry, v->room * sizeof *v->entry);
        REQUIRE(v->entry, "%s: out of memory for %zu entries", v->path, v->room);
    }
    VocabEntry* e = &v->entry[v->count++];
    memset(e, 0, sizeof *e);
    e->start = v->bytes_n;
    e->place = place;
    return e;
}

// GPT-2 writes each byte as one printable character: itself where Latin-1 has such, and otherwise
// the next of U+0100 and on.
enum { SPELLING_END = 256 + 68 };

typedef struct Spelling {
    int code[256];              // of a byte
    int byte[SPELLING_END];     // of a code point; -1: none
    int order[256];             // the bytes by code point
} Spelling;

static inline void spelling_make(Spelling* s) {
    int extra = 256;
    for (int i = 0; i < SPELLING_END; i++) s->byte[i] = -1;
    for (int b = 0; b < 256; b++) {
        bool plain = (b > 0x20 && b < 0x7f) || (b > 0xa0 && b != 0xad);
        s->code[b] = plain ? b : extra++;
        s->byte[s->code[b]] = b;
    }
    for (int i = 0, n = 0; i < SPELLING_END; i++) {
        if (s->byte[i] >= 0) s->order[n++] = s->byte[i];
    }
}

// Adds the bytes that s spells; returns how much of s it read: less than n is an error there.
static inline size_t vocab_spelled(VocabList* v, const Spelling* spelling, const unsigned char* s,
                                   size_t n) {
    size_t at = 0;
    while (at < n) {
        int length = utf8_length(s + at, n - at), code = s[at];
        if (length == 2) code = (s[at] & 0x1f) << 6 | (s[at + 1] & 0x3f);
        if (length < 1 || length > 2 || code >= SPELLING_END || spelling->byte[code] < 0) break;
        v->bytes[v->bytes_n++] = (unsigned char)spelling->byte[code];
        at += (size_t)length;
    }
    return at;
}

// The next line, without its newline; false at the end of the file.
static inline bool vocab_line(const VocabList* v, size_t* at, size_t line, unsigned char** s,
                              size_t* n) {
    if (*at == v->n) return false;
    *s = v->text + *at;
    unsigned char* end = (unsigned char*)memchr(*s, '\n', v->n - *at);
    REQUIRE(end, "%s: line %zu (byte %zu): found the end of the file, expected a newline\n"
            "the file was cut: make or download it again", v->path, line, v->n);
    *n = (size_t)(end - *s);
    *at += *n + 1;
    return true;
}

static inline void vocab_read_joins(VocabList* v, const Spelling* spelling) {
    static const char HEAD[] = "#version";
    unsigned char* s;
    size_t at = 0, line = 1, n = 0;
    char found[160];
    bool any = vocab_line(v, &at, line, &s, &n);
    REQUIRE(any && n >= strlen(HEAD) && memcmp(s, HEAD, strlen(HEAD)) == 0,
            "%s: line 1: found %s, expected '#version: 0.2'", v->path,
            found_text(found, sizeof found, v->text, any ? n : 0));
    for (line = 2; vocab_line(v, &at, line, &s, &n); line++) {
        VocabEntry* e = vocab_add(v, line);
        unsigned char* space = (unsigned char*)memchr(s, ' ', n);
        size_t left = space ? (size_t)(space - s) : n;
        size_t bad = vocab_spelled(v, spelling, s, left);
        e->left = v->bytes_n - e->start;
        if (bad == left && space && left > 0) {
            bad = left + 1 + vocab_spelled(v, spelling, space + 1, n - left - 1);
        }
        e->length = v->bytes_n - e->start;
        if (bad < n || e->left == 0 || e->left == e->length) {
            die("%s: line %zu: found %s, expected two tokens with a space between", v->path, line,
                found_text(found, sizeof found, s + bad, n - bad));
        }
    }
    REQUIRE(v->count > 0, "%s: line 2: found the end of the file, expected a join", v->path);
}

static inline void vocab_read_ids(VocabList* v, const Spelling* spelling) {
    JsonReader j = { v->text, v->n, 0, "" };
    bool ok = json_read_byte(&j, '{', "'{' and a list of tokens");
    while (ok) {
        unsigned char* s;
        size_t n, bad;
        json_read_space(&j);
        VocabEntry* e = vocab_add(v, j.at);
        if (!(ok = json_read_string(&j, &s, &n))) break;
        bad = vocab_spelled(v, spelling, s, n);
        e->length = v->bytes_n - e->start;
        char found[160];
        REQUIRE(n > 0 && bad == n,
                "%s: byte %zu: found %s, expected a token in GPT-2's spelling of bytes", v->path,
                e->place, n ? found_text(found, sizeof found, s + bad, n - bad) : "\"\"");
        if (!(ok = json_read_byte(&j, ':', "':'"))) break;
        json_read_space(&j);
        size_t digits = json_digits(&j, j.at);
        if (digits == 0 || digits > 9) {
            ok = json_fail(&j, j.at, "an id");
            break;
        }
        for (; digits > 0; digits--) e->id = 10 * e->id + j.text[j.at++] - '0';
        json_read_space(&j);
        if (j.at < j.n && j.text[j.at] == ',') j.at++;
        else break;
    }
    ok = ok && json_read_byte(&j, '}', "',' or '}'");
    json_read_space(&j);
    if (ok && j.at < j.n) ok = json_fail(&j, j.at, "the end of the file");
    REQUIRE(ok, "%s: byte %zu: %s", v->path, j.at, j.error);
}

static inline int base64_value(int c) {
    if (c >= 'A' && c <= 'Z') return c - 'A';
    if (c >= 'a' && c <= 'z') return c - 'a' + 26;
    if (c >= '0' && c <= '9') return c - '0' + 52;
    return c == '+' ? 62 : c == '/' ? 63 : -1;
}

// Adds the bytes of n characters of base64, padded; returns how many of them are right.
static inline size_t vocab_base64(VocabList* v, const unsigned char* s, size_t n) {
    size_t at = 0, pad = n > 0 && s[n - 1] == '=' ? n > 1 && s[n - 2] == '=' ? 2 : 1 : 0;
    uint32_t bits = 0;
    for (; at < n - pad; at++) {
        int value = base64_value(s[at]);
        if (value < 0) return at;
        bits = bits << 6 | (uint32_t)value;
        if (at % 4 > 0) v->bytes[v->bytes_n++] = (unsigned char)(bits >> (6 - 2 * (at % 4)));
    }
    // The bits that no byte takes must be 0, or two spellings would be one token.
    if (n % 4 != 0 || (pad > 0 && (bits & (pad == 1 ? 3u : 15u)) != 0)) return at;
    return n;
}

// All ways to cut a token into two are looked at, so its length counts squared.
enum { TOKEN_BYTES = 4096 };

static inline void vocab_read_ranks(VocabList* v) {
    unsigned char* s;
    size_t at = 0, n, line = 1;
    char found[160];
    for (; vocab_line(v, &at, line, &s, &n); line++) {
        VocabEntry* e = vocab_add(v, line);
        unsigned char* space = (unsigned char*)memchr(s, ' ', n);
        size_t token = space ? (size_t)(space - s) : n, bad = vocab_base64(v, s, token);
        REQUIRE(token > 0 && bad == token, "%s: line %zu: found %s, expected a token in base64",
                v->path, line, found_text(found, sizeof found, s + bad, n - bad));
        e->length = v->bytes_n - e->start;
        REQUIRE(e->length <= TOKEN_BYTES, "%s: line %zu: found a token of %zu bytes, expected at "
                "most %d", v->path, line, e->length, TOKEN_BYTES);
        size_t digit = token < n ? token + 1 : n;
        for (; digit < n && s[digit] >= '0' && s[digit] <= '9' && e->id < 1 << 30; digit++) {
            e->id = 10 * e->id + s[digit] - '0';
        }
        if (digit < n || n <= token + 1) {
            digit = digit < n ? digit : token;
            die("%s: line %zu: found %s, expected a space and a rank", v->path, line,
                found_text(found, sizeof found, s + digit, n - digit));
        }
    }
    REQUIRE(v->count > 0, "%s: line 1: found the end of the file, expected a token in base64 and "
            "its rank", v->path);
}

// ---- opening -------------------------------------------------------------------------------

// Gives each entry its id's place; every id from 0 on must be there once, every text once.
static inline void tokenizer_set_tokens(Tokenizer* t, VocabList* v, const char* place) {
    char found[160];
    size_t count = v->count;
    REQUIRE(count < 1 << 28, "%s: %zu tokens, expected fewer than %d", v->path, count, 1 << 28);
    t->vocab = (int)count;
    t->bytes = v->bytes;
    v->bytes = NULL;            // kept by t
    t->start = (size_t*)host_alloc(count + 1, sizeof(size_t));
    t->length = (size_t*)host_alloc(count + 1, sizeof(size_t));
    size_t* where = (size_t*)host_alloc(count + 1, sizeof(size_t));
    t->names_bits = table_bits(count + 1);
    t->names = (int*)host_alloc((size_t)1 << t->names_bits, sizeof(int));
    memset(t->names, 0xff, sizeof(int) << t->names_bits);
    for (size_t i = 0; i < count; i++) {
        const VocabEntry* e = &v->entry[i];
        REQUIRE(e->id < (int64_t)count, "%s: %s %zu: found id %" PRId64 ", expected one from 0 to "
                "%zu: there are %zu tokens", v->path, place, e->place, e->id, count - 1, count);
        size_t id = (size_t)e->id;
        REQUIRE(t->length[id] == 0, "%s: %s %zu: found id %zu again, expected it once; it is at "
                "%s %zu", v->path, place, e->place, id, place, where[id]);
        t->start[id] = e->start;
        t->length[id] = e->length;
        where[id] = e->place;
        int* name = tokenizer_name(t, t->bytes + e->start, e->length);
        REQUIRE(*name == PAIR_NONE, "%s: %s %zu: found token %s again, expected it once; it is at "
                "%s %zu", v->path, place, e->place,
                found_text(found, sizeof found, t->bytes + e->start, e->length), place,
                where[*name]);
        *name = (int)id;
    }
    free(where);
    for (int b = 0; b < 256; b++) {
        unsigned char byte = (unsigned char)b;
        t->byte_id[b] = *tokenizer_name(t, &byte, 1);
        REQUIRE(t->byte_id[b] != PAIR_NONE,
                "%s: found no token of the single byte 0x%02x, expected all 256", v->path, b);
    }
}

static inline void tokenizer_pairs_make(Tokenizer* t, size_t count) {
    t->pairs_bits = table_bits(count + 1);
    size_t size = (size_t)1 << t->pairs_bits;
    t->pairs = (TokenizerPair*)host_alloc(size, sizeof(TokenizerPair));
    for (size_t i = 0; i < size; i++) t->pairs[i].left = PAIR_NONE;
}

static inline void tokenizer_set_joins(Tokenizer* t, const VocabList* joins, const char* ids_path) {
    char found[160];
    bool* made = (bool*)host_alloc((size_t)t->vocab, sizeof(bool));
    for (int b = 0; b < 256; b++) made[t->byte_id[b]] = true;
    made[t->end_of_text] = true;
    tokenizer_pairs_make(t, joins->count);
    for (size_t i = 0; i < joins->count; i++) {
        const VocabEntry* e = &joins->entry[i];
        const unsigned char* s = joins->bytes + e->start;
        int left = *tokenizer_name(t, s, e->left);
        int right = *tokenizer_name(t, s + e->left, e->length - e->left);
        int id = *tokenizer_name(t, s, e->length);
        if (left == PAIR_NONE || right == PAIR_NONE || id == PAIR_NONE) {
            bool second = left != PAIR_NONE && right == PAIR_NONE;
            size_t from = second ? e->left : 0, to = left == PAIR_NONE ? e->left : e->length;
            die("%s: line %zu: found %s, expected a token of %s", joins->path, e->place,
                found_text(found, sizeof found, s + from, to - from), ids_path);
        }
        TokenizerPair* p = tokenizer_pair(t, left, right);
        REQUIRE(p->left == PAIR_NONE, "%s: line %zu: found the join of line %d again, expected it "
                "once", joins->path, e->place, p->rank + 2);
        p->left = left, p->right = right, p->rank = (int)i, p->id = id;
        made[id] = true;
    }
    // Names in brackets are special tokens, which nothing makes; other words come from somewhere.
    for (int id = 0; id < t->vocab; id++) {
        const unsigned char* s = t->bytes + t->start[id];
        int first = s[0], last = s[t->length[id] - 1];
        bool special = (first == '<' && last == '>') || (first == '[' && last == ']');
        REQUIRE(made[id] || special, "%s: line %zu: found the end of the file, expected the join "
                "that makes %s, token %d of %s\nthe file was cut, or belongs to another vocabulary",
                joins->path, joins->count + 2, found_text(found, sizeof found, s, t->length[id]),
                id, ids_path);
    }
    free(made);
}

// Neighbours may be joined if the result is a token: all ways to cut a token into two.
static inline void tokenizer_set_ranks(Tokenizer* t, int tokens) {
    size_t count = 0;
    for (int pass = 0; pass < 2; pass++) {
        if (pass == 1) tokenizer_pairs_make(t, count);
        for (int id = 0; id < tokens; id++) {
            const unsigned char* s = t->bytes + t->start[id];
            for (size_t left = 1; left < t->length[id]; left++) {
                int a = *tokenizer_name(t, s, left);
                int b = a == PAIR_NONE ? a : *tokenizer_name(t, s + left, t->length[id] - left);
                if (b == PAIR_NONE) continue;
                count++;
                if (pass == 0) continue;
                TokenizerPair* p = tokenizer_pair(t, a, b);
                p->left = a, p->right = b, p->rank = p->id = id;
            }
        }
    }
}

// One more id, behind all others, that no text leads to.
static inline void tokenizer_add_end(Tokenizer* t, size_t bytes) {
    size_t n = strlen(END_OF_TEXT);
    t->bytes = (unsigned char*)realloc(t->bytes, bytes + n);
    REQUIRE(t->bytes, "out of memory: %zu bytes for a vocabulary", bytes + n);
    memcpy(t->bytes + bytes, END_OF_TEXT, n);
    t->end_of_text = t->vocab++;
    t->start[t->end_of_text] = bytes;
    t->length[t->end_of_text] = n;
}

static inline void tokenizer_open_folder(Tokenizer* t, const char* path) {
    VocabList joins, ids;
    Spelling spelling;
    char test[4096];
    spelling_make(&spelling);
    vocab_read(&joins, path, "vocab.bpe");
    vocab_read_joins(&joins, &spelling);
    int n = snprintf(test, sizeof test, "%s/encoder.json", path);
    struct stat info;
    if (n > 0 && (size_t)n < sizeof test && stat(test, &info) == 0) {
        vocab_read(&ids, path, "encoder.json");
        vocab_read_ids(&ids, &spelling);
        tokenizer_set_tokens(t, &ids, "byte");
        t->end_of_text = *tokenizer_name(t, (const unsigned char*)END_OF_TEXT, strlen(END_OF_TEXT));
        REQUIRE(t->end_of_text != PAIR_NONE, "%s: found no token '%s', expected one", ids.path,
                END_OF_TEXT);
        tokenizer_set_joins(t, &joins, ids.path);
    } else {
        memset(&ids, 0, sizeof ids);
        snprintf(ids.path, sizeof ids.path, "%s", joins.path);
        ids.bytes = (unsigned char*)host_alloc(256 + joins.bytes_n, 1);
        for (int i = 0; i < 256; i++) {
            VocabEntry* e = vocab_add(&ids, 0);
            ids.bytes[ids.bytes_n++] = (unsigned char)spelling.order[i];
            e->length = 1;
            e->id = i;
        }
        for (size_t i = 0; i < joins.count; i++) {
            VocabEntry* e = vocab_add(&ids, joins.entry[i].place);
            e->length = joins.entry[i].length;
            e->id = (int64_t)(256 + i);
            memcpy(ids.bytes + ids.bytes_n, joins.bytes + joins.entry[i].start, e->length);
            ids.bytes_n += e->length;
        }
        tokenizer_set_tokens(t, &ids, "line");
        tokenizer_add_end(t, ids.bytes_n);
        tokenizer_set_joins(t, &joins, "an earlier line");
    }
    vocab_free(&joins);
    vocab_free(&ids);
}

static inline void tokenizer_open(Tokenizer* t, const char* path) {
    struct stat info;
    memset(t, 0, sizeof *t);
    REQUIRE(stat(path, &info) == 0,
            "%s: %s\nexpected a folder with vocab.bpe, or a .tiktoken file", path, strerror(errno));
    if (S_ISDIR(info.st_mode)) {
        tokenizer_open_folder(t, path);
    } else {
        VocabList ranks;
        vocab_read(&ranks, path, "");
        vocab_read_ranks(&ranks);
        tokenizer_set_tokens(t, &ranks, "line");
        tokenizer_set_ranks(t, t->vocab);
        tokenizer_add_end(t, ranks.bytes_n);
        t->whole = true;
        vocab_free(&ranks);
    }
    t->hash = HASH_START;
    for (int id = 0; id < t->vocab; id++) {
        uint64_t length = t->length[id];
        t->hash = hash_bytes(t->hash, &length, sizeof length);
        t->hash = hash_bytes(t->hash, t->bytes + t->start[id], t->length[id]);
    }
}

static inline void tokenizer_close(Tokenizer* t) {
    free(t->bytes);
    free(t->start);
    free(t->length);
    free(t->names);
    free(t->pairs);
    memset(t, 0, sizeof *t);
}

// ---- encoding ------------------------------------------------------------------------------

enum { CACHE_BITS = 15, CACHE_IDS = 4, SHORT_PIECE = 64 };

// A piece of 1 to 15 bytes as two words: the upper byte of the second is its length and, in the
// upper two bits, the number of ids less one. An empty place has length 0.
typedef struct CacheSlot {
    uint64_t word[2];
    int id[CACHE_IDS];
} CacheSlot;

typedef struct HeapNode {
    int id;                     // PAIR_NONE: joined to the one before
    int rank;                   // of this one with the next; INT32_MAX: none
    int before, next;
} HeapNode;

typedef struct TokenizerWork {
    const Tokenizer* tokenizer;
    CacheSlot* cache;
    HeapNode* node;             // of a long piece
    uint64_t* heap;             // rank << 32 | position
    size_t room;                // bytes of a piece that these hold
} TokenizerWork;

static inline void tokenizer_work_open(TokenizerWork* w, const Tokenizer* t) {
    memset(w, 0, sizeof *w);
    w->tokenizer = t;
    w->cache = (CacheSlot*)host_alloc((size_t)1 << CACHE_BITS, sizeof(CacheSlot));
}

static inline void tokenizer_work_close(TokenizerWork* w) {
    free(w->cache);
    free(w->node);
    free(w->heap);
    memset(w, 0, sizeof *w);
}

// Merges in place: ids holds n of them and is left with as many as are returned.
static inline size_t merge_short(const Tokenizer* t, int* ids, size_t n) {
    int rank[SHORT_PIECE];
    for (size_t i = 0; i + 1 < n; i++) {
        const TokenizerPair* p = tokenizer_pair(t, ids[i], ids[i + 1]);
        rank[i] = p->left == PAIR_NONE ? INT32_MAX : p->rank;
    }
    while (n > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < n; i++) {
            if (rank[i] < rank[best]) best = i;
        }
        if (rank[best] == INT32_MAX) break;
        ids[best] = tokenizer_pair(t, ids[best], ids[best + 1])->id;
        n--;
        for (size_t i = best + 1; i < n; i++) {
            ids[i] = ids[i + 1];
            rank[i - 1] = rank[i];
        }
        // Both neighbours of what was joined have another one now.
        for (size_t i = best > 0 ? best - 1 : 0; i <= best && i + 1 < n; i++) {
            const TokenizerPair* p = tokenizer_pair(t, ids[i], ids[i + 1]);
            rank[i] = p->left == PAIR_NONE ? INT32_MAX : p->rank;
        }
    }
    return n;
}

static inline void heap_down(uint64_t* heap, size_t n, size_t at) {
    uint64_t value = heap[at];
    for (size_t child; (child = 2 * at + 1) < n; at = child) {
        if (child + 1 < n && heap[child + 1] < heap[child]) child++;
        if (value <= heap[child]) break;
        heap[at] = heap[child];
    }
    heap[at] = value;
}

static inline void heap_up(uint64_t* heap, size_t at) {
    uint64_t value = heap[at];
    for (; at > 0 && value < heap[(at - 1) / 2]; at = (at - 1) / 2) heap[at] = heap[(at - 1) / 2];
    heap[at] = value;
}

static inline bool node_rank(const Tokenizer* t, HeapNode* node, int at) {
    HeapNode* a = &node[at];
    a->rank = INT32_MAX;
    if (a->next < 0) return false;
    const TokenizerPair* p = tokenizer_pair(t, a->id, node[a->next].id);
    if (p->left != PAIR_NONE) a->rank = p->rank;
    return a->rank != INT32_MAX;
}

// The same for a piece of any length. The smallest entry of the heap is the lowest rank and, of
// equal ranks, the leftmost place; one that a later join has made wrong is passed over.
static inline size_t merge_long(TokenizerWork* w, int* ids, size_t n) {
    const Tokenizer* t = w->tokenizer;
    REQUIRE(n < INT32_MAX, "a piece of %zu bytes without a place to cut it, expected less than "
            "2 GiB", n);
    if (n > w->room) {
        free(w->node);
        free(w->heap);
        w->node = (HeapNode*)host_alloc(n, sizeof(HeapNode));
        w->heap = (uint64_t*)host_alloc(n, 2 * sizeof(uint64_t));     // a join takes one, adds two
        w->room = n;
    }
    HeapNode* node = w->node;
    uint64_t* heap = w->heap;
    size_t waiting = 0, count = 0;
    for (int i = 0; i < (int)n; i++) {
        node[i].id = ids[i];
        node[i].before = i - 1;
        node[i].next = i + 1 < (int)n ? i + 1 : -1;
    }
    for (int i = 0; i < (int)n; i++) {
        if (node_rank(t, node, i)) heap[waiting++] = (uint64_t)node[i].rank << 32 | (uint32_t)i;
    }
    for (size_t i = waiting / 2; i-- > 0;) heap_down(heap, waiting, i);
    while (waiting > 0) {
        int rank = (int)(heap[0] >> 32), at = (int)(uint32_t)heap[0];
        heap[0] = heap[--waiting];
        if (waiting > 0) heap_down(heap, waiting, 0);
        HeapNode* a = &node[at];
        if (a->id == PAIR_NONE || a->rank != rank) continue;
        HeapNode* b = &node[a->next];
        a->id = tokenizer_pair(t, a->id, b->id)->id;
        b->id = PAIR_NONE;
        a->next = b->next;
        if (a->next >= 0) node[a->next].before = at;
        int changed[2] = { at, a->before };
        for (int k = 0; k < 2; k++) {
            if (changed[k] < 0 || !node_rank(t, node, changed[k])) continue;
            heap[waiting] = (uint64_t)node[changed[k]].rank << 32 | (uint32_t)changed[k];
            heap_up(heap, waiting++);
        }
    }
    for (int i = 0; i >= 0; i = node[i].next) ids[count++] = node[i].id;
    return count;
}

// Ids of one piece of n bytes, for which ids has room; returns their number.
static inline size_t tokenizer_piece(TokenizerWork* w, int* ids, const unsigned char* s, size_t n) {
    const Tokenizer* t = w->tokenizer;
    if (t->whole && n > 1) {
        ids[0] = *tokenizer_name(t, s, n);
        if (ids[0] != PAIR_NONE) return 1;
    }
    for (size_t i = 0; i < n; i++) ids[i] = t->byte_id[s[i]];
    return n <= SHORT_PIECE ? merge_short(t, ids, n) : merge_long(w, ids, n);
}

// Writes the ids of n bytes and returns their number; room must be at least n.
static inline size_t tokenizer_encode(TokenizerWork* w, int* ids, size_t room, const void* text,
                                      size_t n) {
    const unsigned char* s = (const unsigned char*)text;
    size_t count = 0;
    REQUIRE(room >= n, "tokenizer_encode: room for %zu ids, expected one for each of %zu bytes",
            room, n);
    for (size_t at = 0, length; at < n; at += length) {
        length = pretoken_length(s + at, n - at);
        if (length > 15) {
            count += tokenizer_piece(w, ids + count, s + at, length);
            continue;
        }
        uint64_t word[2] = { 0, 0 };
        bool wide = n - at >= 16;              // then there are 16 bytes to read and 4 ids to write
        if (wide) {
            memcpy(word, s + at, 16);
            if (length < 8) word[0] &= ~0ull >> (64 - 8 * length), word[1] = 0;
            else word[1] = length == 8 ? 0 : word[1] & ~0ull >> (128 - 8 * length);
        } else {
            memcpy(word, s + at, length);
        }
        word[1] |= (uint64_t)length << 56;
        uint64_t mix = (word[0] ^ word[1] * 0x9e3779b97f4a7c15ull) * 0xd6e8feb86659fd93ull;
        CacheSlot* slot = &w->cache[(mix ^ mix >> 32) * 0x9e3779b97f4a7c15ull >> (64 - CACHE_BITS)];
        if (slot->word[0] == word[0] && (slot->word[1] ^ word[1]) << 2 == 0) {
            size_t k = 1 + (slot->word[1] >> 62);
            if (wide) memcpy(ids + count, slot->id, sizeof slot->id);
            else memcpy(ids + count, slot->id, k * sizeof(int));
            count += k;
            continue;
        }
        size_t k = tokenizer_piece(w, ids + count, s + at, length);
        if (k <= CACHE_IDS) {
            slot->word[0] = word[0];
            slot->word[1] = word[1] | (uint64_t)(k - 1) << 62;
            memcpy(slot->id, ids + count, k * sizeof(int));
        }
        count += k;
    }
    return count;
}

// ---- decoding ------------------------------------------------------------------------------

// The bytes of n ids, as many as there is room for; returns how many there are in all.
static inline size_t tokenizer_decode(const Tokenizer* t, char* text, size_t room, const int* ids,
                                      size_t n) {
    size_t bytes = 0;
    for (size_t i = 0; i < n; i++) {
        REQUIRE(ids[i] >= 0 && ids[i] < t->vocab,
                "tokenizer_decode: id %d at %zu, expected 0 to %d", ids[i], i, t->vocab - 1);
        size_t length = t->length[ids[i]];
        if (bytes < room) {
            memcpy(text + bytes, t->bytes + t->start[ids[i]],
                   length < room - bytes ? length : room - bytes);
        }
        bytes += length;
    }
    return bytes;
}
