/*
A byte-level BPE vocabulary in memory, and the files it is read from.

    a folder     vocab.bpe, the joins in order of their ranks, in GPT-2's spelling of bytes, and
                 encoder.json, the ids. Without encoder.json the ids are GPT-2's: the 256 bytes in
                 the order of the spelling, the joins, the end of text.
    a file       of lines "base64 rank", as tiktoken has them: id = rank, neighbours may be joined
                 if the result is in the file, a piece that is in the file is one id whether joins
                 lead there or not. The end of text is one past the last rank, as in GPT-2.

Whatever is wrong in it ends the program with one message: file, place, what was found and what was
expected. hash is over the texts of all ids in order, so it is the same however GPT-2 was loaded.
What becomes of text: llmc/tokenizer.h.

test        test/test_tokenizer.c: vocabulary, fuzz
*/
#pragma once
#include "json.h"

#include <sys/stat.h>

#define END_OF_TEXT "<|endoftext|>"

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
