/*
Text to the pieces within which a GPT-2 tokenizer merges bytes.

The pieces are the matches, one after the other, of

    's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

over the characters of the text: a contraction; or letters, or numbers, or others, with one space
in front if there is one; or white space, which leaves its last character to what follows. Every
byte is in exactly one piece. A byte that is not part of valid UTF-8 is one character of class
"other", so any bytes have pieces.

The pattern is a scanner written by hand over the tables of llmc/unicode.h, not a regular
expression: it needs no library, no stack and no limit on lengths, takes what is not UTF-8, is
decided by at most one character beyond the piece, and costs a table look-up per character.

A piece never runs from a character that is not white space into one that is, nor from a letter or
a number into another class, so a text may be cut at such a place and the parts scanned apart:
pretoken_cut.

test        test/test_tokenizer.c: unicode, pretokenize
*/
#pragma once
#include "common.h"
#include "unicode.h"

enum { CHAR_OTHER, CHAR_LETTER, CHAR_NUMBER, CHAR_SPACE, CHAR_LONG };

// Classes of the ASCII characters; CHAR_LONG: look at the whole sequence.
static const unsigned char CHAR_CLASS[256] = {
#define O16 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0
#define X16 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4
    0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 3, 3, 3, 3, 0, 0, O16,      // tab to carriage return
    3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,           // space
    2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0,           // 0 to 9
    0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,           // A to Z
    1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0,
    0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,           // a to z
    1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0,
    X16, X16, X16, X16, X16, X16, X16, X16,
#undef O16
#undef X16
};

static inline int unicode_class(uint32_t code) {
    if (code >= UNICODE_END) return CHAR_OTHER;
    int byte = UNICODE_BLOCKS[32 * UNICODE_INDEX[code / 128] + code % 128 / 4];
    return byte >> 2 * (code % 4) & 3;
}

// Class of the character at s that starts with a byte from 0x80 on, and its length in bytes.
static inline int char_class_long(const unsigned char* s, size_t left, size_t* length) {
    int n = utf8_length(s, left);
    *length = n ? (size_t)n : 1;
    if (n == 0) return CHAR_OTHER;
    uint32_t code = s[0] & (0x7fu >> n);
    for (int i = 1; i < n; i++) code = code << 6 | (s[i] & 0x3f);
    return unicode_class(code);
}

static inline int char_class(const unsigned char* s, size_t left, size_t* length) {
    int c = CHAR_CLASS[*s];
    *length = 1;
    return c == CHAR_LONG ? char_class_long(s, left, length) : c;
}

// Bytes (at least 1) of the piece at text; n >= 1 bytes are left.
static inline size_t pretoken_length(const unsigned char* text, size_t n) {
    size_t at = 0, length;
    if (text[0] == '\'' && n > 1) {
        unsigned char a = text[1], b = n > 2 ? text[2] : 0;
        if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
        if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return 3;
    }
    if (text[0] == ' ' && n > 1) at = 1;
    int kind = char_class(text + at, n - at, &length);
    if (kind != CHAR_SPACE) {
        for (at += length; at < n; at += length) {
            int c = CHAR_CLASS[text[at]];
            length = 1;
            if (c == CHAR_LONG) c = char_class_long(text + at, n - at, &length);
            if (c != kind) break;
        }
        return at;
    }
    size_t last = 0;            // where the last character of the white space begins
    if (at == 0) at = length;
    for (; at < n; at += length) {
        if (char_class(text + at, n - at, &length) != CHAR_SPACE) return last ? last : at;
        last = at;
    }
    return n;
}

// Class of the character that ends in front of text + at, at >= 1.
static inline int char_class_before(const unsigned char* text, size_t at) {
    for (size_t k = 1; k <= 4 && k <= at; k++) {
        size_t length;
        int kind = char_class(text + at - k, k, &length);
        if (length == k && (k > 1 || text[at - 1] < 0x80)) return kind;
    }
    return CHAR_OTHER;          // a byte that is not part of valid UTF-8
}

// The last place at which text may be cut and its parts scanned apart, whatever follows; 0: none.
static inline size_t pretoken_cut(const unsigned char* text, size_t n) {
    for (size_t at = n; at-- > 1;) {
        // What is not a character here may be the first bytes of one that is cut off.
        if (text[at] >= 0x80 && utf8_length(text + at, n - at) == 0) continue;
        size_t length;
        int before = char_class_before(text, at), after = char_class(text + at, n - at, &length);
        if (before == after) continue;
        if (after == CHAR_SPACE || before == CHAR_LETTER || before == CHAR_NUMBER) return at;
    }
    return 0;
}
