/*
Tokens to text and back, for samples and prompts.

A model's tokens are one of

    bytes       ids 0 to 255 are bytes, 256 opens a document, and the rest of at most 320 columns is
                padding (the smallest multiple of 64 that holds 257): what dev/text_to_shards makes
    a tokenizer the vocabulary that --tokenizer names (llmc/vocabulary.h)
    numbers     a larger vocabulary without --tokenizer: ids are shown, and no text can be read

Weights keep the hash of their tokenizer, and are not read with another one. Columns that stand for
no text are taken out of the logits before a token is drawn.

Text is written as its tokens come: a character that is split over tokens waits until it is whole.
Control characters other than newline and tab are spelled out, so that a sample cannot steer the
terminal; what is not UTF-8 becomes U+FFFD.

test        test/test_services.c: text
*/
#pragma once
#include "tokenizer.h"

enum { BYTE_END = 256, BYTE_VOCAB = 320 };
enum { GPT2_END = 50256 };      // end of text in GPT-2's vocabulary

typedef enum TextKind { TEXT_BYTES, TEXT_TOKENS, TEXT_NUMBERS } TextKind;

typedef struct TextCodec {
    TextKind kind;
    int vocab;                  // ids from here on have no text
    int end_of_text;            // the token that opens a document
    char hash[17];              // of the tokenizer; "": none
    Tokenizer tokenizer;
    TokenizerWork work;
} TextCodec;

// ---- opening -------------------------------------------------------------------------------

// tokenizer: --tokenizer, "" for none. V: columns of the logits. end_of_text: --end-of-text, or -1
// for the vocabulary's own. wanted: the hash that `model` (a file) was saved with; NULL or "": any.
static inline void text_open(TextCodec* c, const char* tokenizer, int V, int end_of_text,
                             const char* wanted, const char* model) {
    struct stat info;
    memset(c, 0, sizeof *c);
    bool known = wanted && *wanted;
    if (*tokenizer) {
        REQUIRE(stat(tokenizer, &info) == 0, "--tokenizer %s: %s%s%s\nname the folder with "
                "vocab.bpe, or the .tiktoken file, where it lies now", tokenizer, strerror(errno),
                known ? "; its tokens are what was learned by " : "", known ? model : "");
        tokenizer_open(&c->tokenizer, tokenizer);
        c->kind = TEXT_TOKENS;
        snprintf(c->hash, sizeof c->hash, "%016" PRIx64, c->tokenizer.hash);
        REQUIRE(!known || strcmp(c->hash, wanted) == 0,
                "--tokenizer %s has hash %s, but %s learned the tokens of hash %s\n"
                "name the vocabulary of its training data", tokenizer, c->hash, model, wanted);
        REQUIRE(c->tokenizer.vocab <= V, "--tokenizer %s has %d tokens, but --vocab is %d\n"
                "name the vocabulary of the training data, or train with more columns", tokenizer,
                c->tokenizer.vocab, V);
        tokenizer_work_open(&c->work, &c->tokenizer);
        c->vocab = c->tokenizer.vocab;
        c->end_of_text = c->tokenizer.end_of_text;
    } else {
        // That a file names a tokenizer says that small ids are no bytes.
        c->kind = V <= BYTE_VOCAB && !known ? TEXT_BYTES : TEXT_NUMBERS;
        c->vocab = c->kind == TEXT_BYTES && V > BYTE_END ? BYTE_END + 1 : V;
        c->end_of_text = V > GPT2_END ? GPT2_END : V > BYTE_END ? BYTE_END : 0;
    }
    if (end_of_text >= 0) c->end_of_text = end_of_text;
    REQUIRE(c->end_of_text < c->vocab, "--end-of-text %d is not one of the %d tokens",
            c->end_of_text, c->vocab);
}

static inline void text_close(TextCodec* c) {
    if (c->kind == TEXT_TOKENS) {
        tokenizer_work_close(&c->work);
        tokenizer_close(&c->tokenizer);
    }
    memset(c, 0, sizeof *c);
}

// Takes the columns without text out of a row of V logits.
static inline void text_mask(const TextCodec* c, float* logits, int V) {
    for (int i = c->vocab; i < V; i++) logits[i] = -INFINITY;
}

// ---- text to tokens ------------------------------------------------------------------------

// The ids of a document that begins with n bytes: its end-of-text token, then theirs. The caller
// frees them.
static inline int* text_encode(TextCodec* c, const char* text, size_t n, int* count) {
    REQUIRE(n == 0 || c->kind != TEXT_NUMBERS, "--prompt needs the vocabulary of the training data "
            "to become tokens\nname it: --tokenizer FOLDER, one with vocab.bpe, or a .tiktoken "
            "file");
    REQUIRE(n < INT32_MAX, "a prompt of %zu bytes, expected less than 2 GiB", n);
    int* ids = (int*)host_alloc(n + 1, sizeof(int));
    ids[0] = c->end_of_text;
    if (c->kind == TEXT_TOKENS) n = tokenizer_encode(&c->work, ids + 1, n, text, n);
    else for (size_t i = 0; i < n; i++) ids[1 + i] = (unsigned char)text[i];
    *count = (int)n + 1;
    return ids;
}

// ---- tokens to text ------------------------------------------------------------------------

typedef struct TextWriter {
    FILE* out;
    const TextCodec* codec;
    unsigned char held[4];      // of a character that is not whole yet
    size_t count;
    bool going;                 // something was written
} TextWriter;

// Whether n bytes that are no character may begin one.
static inline bool text_unfinished(const unsigned char* s, size_t n) {
    unsigned char low[4], high[4];
    memset(low, 0x80, sizeof low);
    memset(high, 0xbf, sizeof high);
    memcpy(low, s, n);
    memcpy(high, s, n);
    return utf8_length(low, 4) > (int)n || utf8_length(high, 4) > (int)n;
}

static inline void text_put_byte(TextWriter* w, unsigned char byte, bool last) {
    if (!last) w->held[w->count++] = byte;
    while (w->count > 0) {
        const unsigned char* s = w->held;
        int n = utf8_length(s, w->count);
        if (n == 0 && !last && text_unfinished(s, w->count)) return;
        // U+0080 to U+009F steer some terminals as their 7-bit forms do.
        bool plain = n == 1 ? (s[0] >= 0x20 && s[0] != 0x7f) || s[0] == '\n' || s[0] == '\t'
                            : !(s[0] == 0xc2 && s[1] < 0xa0);
        if (n == 0) fputs("\xef\xbf\xbd", w->out);
        else if (plain) fwrite(s, 1, (size_t)n, w->out);
        else fprintf(w->out, "\\x%02x", s[n - 1]);
        size_t used = n ? (size_t)n : 1;
        w->count -= used;
        memmove(w->held, w->held + used, w->count);
    }
}

// What is held back although nothing follows it.
static inline void text_flush(TextWriter* w) {
    text_put_byte(w, 0, true);
}

static inline void text_put(TextWriter* w, int id) {
    const TextCodec* c = w->codec;
    if (c->kind == TEXT_NUMBERS) {
        fprintf(w->out, w->going ? " %d" : "%d", id);
    } else if (id >= c->vocab || (c->kind == TEXT_BYTES && id >= BYTE_END)) {
        text_flush(w);
        if (id == BYTE_END) fputs("<end>", w->out);
        else fprintf(w->out, "<%d>", id);
    } else if (c->kind == TEXT_BYTES) {
        text_put_byte(w, (unsigned char)id, false);
    } else {
        const Tokenizer* t = &c->tokenizer;
        for (size_t i = 0; i < t->length[id]; i++)
            text_put_byte(w, t->bytes[t->start[id] + i], false);
    }
    w->going = true;
}

// The text of n ids, which the caller frees.
static inline char* text_of(const TextCodec* c, const int* ids, int n) {
    char* text = NULL;
    size_t size = 0;
    TextWriter w = { open_memstream(&text, &size), c, { 0 }, 0, false };
    REQUIRE(w.out, "out of memory for the text of %d tokens", n);
    for (int i = 0; i < n; i++) text_put(&w, ids[i]);
    text_flush(&w);
    REQUIRE(fclose(w.out) == 0, "out of memory for the text of %d tokens", n);
    return text;
}
