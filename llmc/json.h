/*
Reading JSON, strictly (RFC 8259) and in valid UTF-8: a cursor over a text in memory.

    JsonReader j = { text, n, 0, "" };
    ok = json_read_byte(&j, '{', "'{'") && json_read_string(&j, &s, &length) && ...

A function that returns false has filled `error` with what was found and what was expected, and left
`at` where that is: the caller names the file, and dies or goes on. Strings are written over their
own source, without escapes, so that nothing is allocated. Writing JSON: llmc/common.h.

test        test/test_tokenizer.c: vocabulary, tokenize, fuzz; test/test_services.c: safetensors
*/
#pragma once
#include "common.h"

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

// Nothing dies here, because threads read lines ahead of their turn.
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

// A whole number that an int64_t holds: no point, no exponent.
static inline bool json_read_whole(JsonReader* j, int64_t* v) {
    json_read_space(j);
    size_t from = j->at, at = from;
    bool negative = at < j->n && j->text[at] == '-';
    at += negative;
    size_t digits = json_digits(j, at);
    int next = at + digits < j->n ? j->text[at + digits] : 0;
    if (digits == 0 || (digits > 1 && j->text[at] == '0') || next == '.' || (next | 0x20) == 'e')
        return json_fail(j, from, "a whole number");
    *v = 0;
    for (size_t i = 0; i < digits; i++) {
        int digit = j->text[at + i] - '0';
        if (*v > (INT64_MAX - digit) / 10) return json_fail(j, from, "a number below 2^63");
        *v = 10 * *v + digit;
    }
    if (negative) *v = -*v;
    j->at = at + digits;
    return true;
}

// A number, or null: json_real writes what is not finite so.
static inline bool json_read_real(JsonReader* j, double* v) {
    char number[64];
    json_read_space(j);
    size_t from = j->at;
    if (j->n - from >= 4 && memcmp(j->text + from, "null", 4) == 0) {
        *v = NAN;
        j->at += 4;
        return true;
    }
    if (from == j->n || !json_read_number(j)) return json_fail(j, from, "a number or null");
    if (j->at - from >= sizeof number) return json_fail(j, from, "a number of fewer digits");
    memcpy(number, j->text + from, j->at - from);
    number[j->at - from] = 0;
    *v = strtod(number, NULL);
    if (*v - *v != 0) return json_fail(j, from, "a number that a double holds");
    return true;
}

// After the opening bracket of an object or a list, `count` of whose members have been read: 1:
// another one follows, 0: it has been closed, -1: neither.
static inline int json_more(JsonReader* j, char close, int count) {
    json_read_space(j);
    int c = j->at < j->n ? j->text[j->at] : 0;
    if (c == close) {
        j->at++;
        return 0;
    }
    if (count == 0) return 1;
    if (!json_read_byte(j, ',', close == '}' ? "',' or '}'" : "',' or ']'")) return -1;
    return 1;
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
