/*
The GPT-2 tokenizer: classes of characters, pieces, merges, vocabularies, and what is wrong in them.
And the two tools of dev/ that use it, tokenize and train_bpe. No GPU and no host layer; compiled as
C++ by the Makefile, with zlib and threads. Run from the repository's root.

    test_tokenizer [part of a group's name] [--verbose]
    test_tokenizer compare TOKENIZER TEXT SHARD    the ids of a text file against a token shard
    test_tokenizer text                            writes the text of the group "tokenizer: text"
    test_tokenizer fuzz SECONDS [SEED]             broken files and random bytes until the time is
                                                   over; what is broken lies in test/data/fuzz

What is expected comes from other programs: test/data/gpt2_tokenizer_cases.json and TEXT_HASH from
tiktoken 0.14 and Hugging Face tokenizers 0.23, JOINS_HASH from the latter, CLASS_HASH from Python's
unicodedata2 16.0.0. The vocabulary,
test/data/gpt2/vocab.bpe, is the one released with GPT-2.
*/
#define main tokenize_main
#include "../dev/tokenize.c"
#undef main
#define main train_bpe_main
#include "../dev/train_bpe.c"
#undef main
#include "test.h"

#include <setjmp.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const char GPT2[] = "test/data/gpt2";
static Tokenizer gpt2;
static TokenizerWork work;

// ---- files ---------------------------------------------------------------------------------

// The whole file, ended by a 0 that does not count.
static unsigned char* read_file(const char* path, size_t* n) {
    FILE* file = fopen(path, "rb");
    REQUIRE(file, "%s: %s", path, strerror(errno));
    fseek(file, 0, SEEK_END);
    *n = (size_t)ftell(file);
    rewind(file);
    unsigned char* bytes = (unsigned char*)host_alloc(*n + 1, 1);
    REQUIRE(fread(bytes, 1, *n, file) == *n, "%s: cannot be read", path);
    fclose(file);
    return bytes;
}

// ---- text ----------------------------------------------------------------------------------

enum { FUZZ_SECONDS = 20 };      // after which a child is taken to hang

static uint64_t draws;

static uint32_t draw(uint32_t below) {
    return (uint32_t)(test_random(20, draws++) % below);
}

// Characters that mean something to the pattern or to UTF-8, and bytes that are none.
static const char* const PARTS[] = {
    " ", "\n", "a", "s", "'", "1", "!", "l", "e", "r", "\t", "\xc2\xa0", "\xc3\xa9", "\xff",
    "\xe3\x80\x80", "\xd9\xa3", "\xf0\x9f\x98\x80", "\xe6\x97\xa5", "\xcc\x81", "\xc2", "\xe2\x80",
    "\xf0\x9f", "\xc2\xbd", "\r", "d", "t", "m", "v", "\xed\xa0\x80", "\xc0\x80", "Z", "_", "\x1c",
};
enum { PART_COUNT = sizeof PARTS / sizeof *PARTS };

static size_t draw_text(unsigned char* s, size_t room) {
    size_t n = 0, wanted = draw((uint32_t)room - 8);
    while (n < wanted) {
        uint32_t kind = draw(8);
        if (kind == 0) {
            s[n++] = (unsigned char)draw(256);
        } else if (kind == 1) {
            n += utf8_put(s + n, draw(2) ? draw(0x3000) : draw(0x110000));
        } else {
            const char* part = PARTS[draw(kind < 5 ? 10 : PART_COUNT)];
            memcpy(s + n, part, strlen(part));
            n += strlen(part);
        }
    }
    return n;
}

// ---- classes of characters -----------------------------------------------------------------

#define CLASS_HASH 0x48b1698009766d10ull       // of one byte for each code point, 0 to 3

static void test_unicode(void) {
    static unsigned char kinds[0x110000];
    int count[4] = {0};
    for (uint32_t c = 0; c < 0x110000; c++) count[kinds[c] = (unsigned char)unicode_class(c)]++;
    test_true("141028 letters", count[CHAR_LETTER] == 141028);
    test_true("1911 numbers", count[CHAR_NUMBER] == 1911);
    test_true("25 white spaces", count[CHAR_SPACE] == 25);
    uint64_t hash = hash_bytes(HASH_START, kinds, sizeof kinds);
    if (!test_true("the class of each code point", hash == CLASS_HASH))
        printf("      hash %#" PRIx64 ", expected %#" PRIx64 "\n", hash, (uint64_t)CLASS_HASH);
    bool same = true;
    for (uint32_t c = 0; c < 0x110000; c++) {
        unsigned char s[4];
        size_t n = utf8_put(s, c), length;
        bool surrogate = c >= 0xd800 && c < 0xe000;
        int kind = char_class(s, n, &length);
        same &= surrogate ? kind == CHAR_OTHER && length == 1 : kind == kinds[c] && length == n;
    }
    test_true("the class of each sequence", same);
}

// ---- pieces --------------------------------------------------------------------------------

typedef struct Char {
    int kind;
    size_t at;
} Char;

// The pattern word for word: each alternative in turn, the longest match of its repeats, and for
// \s+(?!\S) one character less until what follows is no character or white space.
static size_t pattern_length(const unsigned char* s, size_t n) {
    static Char c[4096];
    size_t count = 0, length;
    for (size_t at = 0; at < n; at += length, count++) {
        c[count].kind = char_class(s + at, n - at, &length);
        c[count].at = at;
    }
    c[count].kind = -1;
    c[count].at = n;
    static const char* const WORDS[] = { "'s", "'t", "'re", "'ve", "'m", "'ll", "'d" };
    for (int i = 0; i < 7; i++) {
        size_t k = strlen(WORDS[i]);
        if (k <= n && memcmp(s, WORDS[i], k) == 0) return k;
    }
    static const int KINDS[] = { CHAR_LETTER, CHAR_NUMBER, CHAR_OTHER };
    for (int i = 0; i < 3; i++) {
        for (size_t space = s[0] == ' '; space + 1 > 0; space--) {       // ` ?` prefers the space
            size_t k = space;
            while (c[k].kind == KINDS[i]) k++;
            if (k > space) return c[k].at;
        }
    }
    size_t k = 0;
    while (c[k].kind == CHAR_SPACE) k++;
    for (size_t m = k; m > 0; m--) {
        if (c[m].kind == -1 || c[m].kind == CHAR_SPACE) return c[m].at;
    }
    return c[k].at;
}

static bool pieces_agree(const unsigned char* s, size_t n) {
    for (size_t at = 0; at < n;) {
        size_t got = pretoken_length(s + at, n - at), want = pattern_length(s + at, n - at);
        if (got != want) {
            char text[160];
            printf("      at %zu of %s: %zu bytes, expected %zu\n", at, found_text(text, 160, s, n),
                   got, want);
            return false;
        }
        at += got;
    }
    return true;
}

static void test_pretokenize(void) {
    static unsigned char s[2048];
    enum { SYMBOLS = 14, LENGTH = 5 };
    bool ok = true;
    for (int length = 1; length <= LENGTH && ok; length++) {
        int index[LENGTH] = {0};
        for (bool more = true; more && ok;) {
            size_t n = 0;
            for (int i = 0; i < length; i++) {
                memcpy(s + n, PARTS[index[i]], strlen(PARTS[index[i]]));
                n += strlen(PARTS[index[i]]);
            }
            ok = pieces_agree(s, n);
            int i = 0;
            while (i < length && ++index[i] == SYMBOLS) index[i++] = 0;
            more = i < length;
        }
    }
    test_true("every text of up to 5 of 14 characters", ok);
    for (int i = 0; i < 3000 && ok; i++) ok = pieces_agree(s, draw_text(s, 400));
    test_true("random texts", ok);

    // Cut anywhere, then at the place that pretoken_cut names: the pieces stay.
    int cuts = 0;
    for (int i = 0; i < 3000 && ok; i++) {
        size_t n = draw_text(s, 200);
        if (n == 0) continue;
        size_t cut = pretoken_cut(s, 1 + draw((uint32_t)n)), at = 0;
        if (cut == 0) continue;
        cuts++;
        while (at < cut) at += pretoken_length(s + at, n - at);
        ok = at == cut;
        for (at = 0; at < cut && ok;) {
            size_t length = pretoken_length(s + at, cut - at);
            ok = length == pretoken_length(s + at, n - at);
            at += length;
        }
    }
    test_true("a cut changes no piece", ok && cuts > 1000);
    static const unsigned char CHINESE[] = "\xe6\x97\xa5\xe6\x97\xa5\xe3\x80\x82\xe6\x97\xa5";
    test_true("text without ASCII is cut too", pretoken_cut(CHINESE, 12) == 6);
    test_true("not beside a character that is cut off", pretoken_cut(CHINESE, 8) == 0);
}

// ---- the cases -----------------------------------------------------------------------------

static void test_cases(void) {
    size_t n;
    unsigned char* bytes = read_file("test/data/gpt2_tokenizer_cases.json", &n);
    JsonReader j = { bytes, n, 0, "" };
    int cases = 0;
    bool ok = json_read_byte(&j, '[', "'['");
    while (ok) {
        unsigned char *key, *text;
        size_t length, text_n;
        static int want[1024], got[1024];
        size_t count = 0;
        ok = json_read_byte(&j, '{', "'{'") && json_read_string(&j, &key, &length) &&
             json_read_byte(&j, ':', "':'") && json_read_string(&j, &text, &text_n) &&
             json_read_byte(&j, ',', "','") && json_read_string(&j, &key, &length) &&
             json_read_byte(&j, ':', "':'") && json_read_byte(&j, '[', "'['");
        while (ok && bytes[j.at] != ']') {
            want[count++] = (int)strtol((char*)bytes + j.at, NULL, 10);
            ok = json_read_number(&j);
            if (bytes[j.at] == ',') j.at++;
        }
        if (!ok) break;
        j.at++;
        REQUIRE(text_n <= 1024 && count <= 1024, "a case is too long for the test");
        char name[64], back[1024];
        snprintf(name, sizeof name, "case %d", cases++);
        size_t k = tokenizer_encode(&work, got, 1024, text, text_n);
        bool same = k == count && memcmp(got, want, count * sizeof(int)) == 0;
        test_true(name, same);
        size_t back_n = tokenizer_decode(&gpt2, back, sizeof back, want, count);
        test_true(name, back_n == text_n && memcmp(back, text, text_n) == 0);
        ok = json_read_byte(&j, '}', "'}'");
        json_read_space(&j);
        if (j.at < n && bytes[j.at] != ',') break;
        j.at++;
    }
    test_true("28 cases are read", ok && cases == 28);
    if (!ok) printf("      byte %zu: %s\n", j.at, j.error);
    free(bytes);
}

// ---- merges --------------------------------------------------------------------------------

// Merges a piece as the definition says it, one join after the other.
static size_t merge_slow(const Tokenizer* t, int* ids, size_t n) {
    for (;;) {
        const TokenizerPair* best = NULL;
        size_t at = 0;
        for (size_t i = 0; i + 1 < n; i++) {
            const TokenizerPair* p = tokenizer_pair(t, ids[i], ids[i + 1]);
            if (p->left == PAIR_NONE || (best && p->rank >= best->rank)) continue;
            best = p;
            at = i;
        }
        if (!best) return n;
        ids[at] = best->id;
        memmove(ids + at + 1, ids + at + 2, (n - at - 2) * sizeof(int));
        n--;
    }
}

static void test_merges(void) {
    static unsigned char s[600];
    static int want[600], shorter[600], longer[600];
    bool short_ok = true, long_ok = true, text_ok = true;
    for (int i = 0; i < 4000; i++) {
        size_t n = i % 4 ? 1 + draw(SHORT_PIECE) : 1 + draw(600);
        uint32_t letters = 1 + draw(26);
        for (size_t k = 0; k < n; k++) {
            s[k] = (unsigned char)(i % 8 ? 'a' + draw(letters) : draw(256));
        }
        for (size_t k = 0; k < n; k++) longer[k] = shorter[k] = want[k] = gpt2.byte_id[s[k]];
        size_t count = merge_slow(&gpt2, want, n);
        long_ok &= merge_long(&work, longer, n) == count && memcmp(longer, want, count * 4) == 0;
        if (n <= SHORT_PIECE) {
            short_ok &= merge_short(&gpt2, shorter, n) == count &&
                        memcmp(shorter, want, count * 4) == 0;
        }
        if (i % 8) {            // a piece: also by way of the cache, at first and at second sight
            for (int k = 0; k < 2; k++) {
                text_ok &= tokenizer_encode(&work, longer, n, s, n) == count &&
                           memcmp(longer, want, count * 4) == 0;
            }
        }
    }
    test_true("merge_short joins as defined", short_ok);
    test_true("merge_long joins as defined", long_ok);
    test_true("tokenizer_encode joins as defined", text_ok);

    // Quadratic time would be minutes here.
    size_t n = 1 << 20;
    unsigned char* letters = (unsigned char*)host_alloc(n, 1);
    int* ids = (int*)host_alloc(n, sizeof(int));
    char* back = (char*)host_alloc(n, 1);
    memset(letters, 'a', n);
    size_t count = tokenizer_encode(&work, ids, n, letters, n);
    bool all = count == n / 4;
    for (size_t i = 0; i < count; i++) all &= ids[i] == 24794;         // "aaaa"
    test_true("a piece of a million equal letters", all);
    for (size_t i = 0; i < n; i++) letters[i] = (unsigned char)('a' + draw(26));
    count = tokenizer_encode(&work, ids, n, letters, n);
    bool returns = tokenizer_decode(&gpt2, back, n, ids, count) == n;
    returns &= memcmp(back, letters, n) == 0;
    test_true("a piece of a million letters", count < n && returns);
    free(letters);
    free(ids);
    free(back);
}

// ---- a text --------------------------------------------------------------------------------

#define TEXT_HASH 0x1b7ad60051b8badaull // of its ids as int32
enum { TEXT_BYTES = 2000000, TEXT_IDS = 562494 };

// Tokens one after the other, code points of all kinds, and runs of letters, spaces and newlines;
// valid UTF-8 throughout, because other programs read it as text.
static unsigned char* text_make(size_t* n) {
    unsigned char* s = (unsigned char*)host_alloc(TEXT_BYTES + 4096, 1);
    size_t at = 0;
    uint64_t i = 0;
    while (at < TEXT_BYTES) {
        uint64_t r = test_random(21, i++), kind = r % 100;
        r /= 100;
        if (kind < 80) {
            size_t id = r % 50256, length = gpt2.length[id], ok = 0;
            const unsigned char* token = gpt2.bytes + gpt2.start[id];
            while (ok < length && utf8_length(token + ok, length - ok)) {
                ok += (size_t)utf8_length(token + ok, length - ok);
            }
            if (ok < length) continue;
            memcpy(s + at, token, length);
            at += length;
        } else if (kind < 90) {
            uint32_t code = (uint32_t)(r % (kind < 85 ? 0x3400 : 0x110000));
            if (code < 0xd800 || code >= 0xe000) at += utf8_put(s + at, code);
        } else {
            static const char RUNS[] = "  \n\n\t'a=";
            size_t length = r / 16 % (kind == 99 ? 200 : 6);
            memset(s + at, RUNS[r % 8], length);
            at += length;
        }
    }
    *n = at;
    return s;
}

static void test_text(void) {
    size_t n, count;
    unsigned char* s = text_make(&n);
    int* ids = (int*)host_alloc(n, sizeof(int));
    char* back = (char*)host_alloc(n, 1);
    for (int pass = 0; pass < 2; pass++) {      // with a cold cache and with a warm one
        count = tokenizer_encode(&work, ids, n, s, n);
        uint64_t hash = hash_bytes(HASH_START, ids, count * sizeof(int));
        bool ok = count == TEXT_IDS && hash == TEXT_HASH;
        if (!test_true("2 MB of all kinds of text", ok))
            printf("      %zu bytes, %zu ids, hash %#" PRIx64 "\n", n, count, hash);
    }
    size_t bytes = tokenizer_decode(&gpt2, back, n, ids, count);
    test_true("and back", bytes == n && memcmp(back, s, n) == 0);
    bytes = tokenizer_decode(&gpt2, NULL, 0, ids, count);
    test_true("decode says how much room it wants", bytes == n);
    test_true("decode writes what fits", tokenizer_decode(&gpt2, back, 5, ids, count) == n);

    int end = gpt2.end_of_text;
    count = tokenizer_encode(&work, ids, n, END_OF_TEXT, strlen(END_OF_TEXT));
    test_true("<|endoftext|> in a text is text", count > 1);
    for (size_t i = 0; i < count; i++) test_true("no id of it is the end", ids[i] != end);
    bytes = tokenizer_decode(&gpt2, back, n, &end, 1);
    test_true("the end of text has a name", bytes == 13 && memcmp(back, END_OF_TEXT, 13) == 0);
    test_true("no bytes, no ids", tokenizer_encode(&work, ids, 0, NULL, 0) == 0);
    free(s);
    free(ids);
    free(back);
}

// Any bytes come back, through each end of a buffer of their exact size.
static bool bytes_return(TokenizerWork* w, const unsigned char* s, size_t n) {
    unsigned char* exact = (unsigned char*)malloc(n ? n : 1);
    int* ids = (int*)malloc((n ? n : 1) * sizeof(int));
    char* back = (char*)malloc(n ? n : 1);
    memcpy(exact, s, n);
    size_t count = tokenizer_encode(w, ids, n, exact, n);
    bool ok = count <= n && tokenizer_decode(w->tokenizer, back, n, ids, count) == n &&
              memcmp(back, exact, n) == 0;
    free(exact);
    free(ids);
    free(back);
    return ok;
}

static void test_round_trip(void) {
    static unsigned char s[1024];
    bool text_ok = true, byte_ok = true;
    for (int i = 0; i < 5000; i++) {
        text_ok &= bytes_return(&work, s, draw_text(s, sizeof s));
        size_t n = draw(200);
        for (size_t k = 0; k < n; k++) s[k] = (unsigned char)draw(256);
        byte_ok &= bytes_return(&work, s, n);
    }
    test_true("mixed texts return", text_ok);
    test_true("random bytes return", byte_ok);
}

// ---- vocabularies --------------------------------------------------------------------------

typedef struct Text {
    char* bytes;
    size_t n;
    FILE* file;
} Text;

static void text_open(Text* text) {
    text->file = open_memstream(&text->bytes, &text->n);
    REQUIRE(text->file, "open_memstream: %s", strerror(errno));
}

// encoder.json of t: what is not ASCII as an escape or, for every other id, as UTF-8.
static void make_encoder(Text* out, const Tokenizer* t) {
    Spelling spelling;
    spelling_make(&spelling);
    text_open(out);
    for (int id = 0; id < t->vocab; id++) {
        fprintf(out->file, "%s\"", id ? ", " : "{");
        for (size_t i = 0; i < t->length[id]; i++) {
            int code = spelling.code[t->bytes[t->start[id] + i]];
            unsigned char utf8[4];
            if (code == '"' || code == '\\') fprintf(out->file, "\\%c", code);
            else if (code >= 0x80 && id % 2) fprintf(out->file, "\\u%04x", code);
            else fwrite(utf8, 1, utf8_put(utf8, (uint32_t)code), out->file);
        }
        fprintf(out->file, "\": %d", id);
    }
    fprintf(out->file, "}");
    fclose(out->file);
}

static void make_ranks(Text* out, const Tokenizer* t) {
    static const char DIGITS[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    text_open(out);
    for (int id = 0; id < t->vocab; id++) {
        if (id == t->end_of_text) continue;
        const unsigned char* s = t->bytes + t->start[id];
        size_t n = t->length[id];
        for (size_t i = 0; i < n; i += 3) {
            uint32_t bits = (uint32_t)s[i] << 16;
            if (i + 1 < n) bits |= (uint32_t)s[i + 1] << 8;
            if (i + 2 < n) bits |= s[i + 2];
            fprintf(out->file, "%c%c%c%c", DIGITS[bits >> 18], DIGITS[bits >> 12 & 63],
                    i + 1 < n ? DIGITS[bits >> 6 & 63] : '=', i + 2 < n ? DIGITS[bits & 63] : '=');
        }
        fprintf(out->file, " %d\n", id);
    }
    fclose(out->file);
}

static bool same_ids(TokenizerWork* a, TokenizerWork* b) {
    static unsigned char s[2000];
    static int x[2000], y[2000];
    for (int i = 0; i < 300; i++) {
        size_t n = draw_text(s, sizeof s);
        size_t count = tokenizer_encode(a, x, 2000, s, n);
        if (tokenizer_encode(b, y, 2000, s, n) != count) return false;
        if (memcmp(x, y, count * 4) != 0) return false;
    }
    return true;
}

// Three spellings of GPT-2, and a short one that the tests of errors change.
static Text short_joins, short_encoder, short_ranks;

static void shorts_make(void) {
    size_t n;
    unsigned char* joins = read_file("test/data/gpt2/vocab.bpe", &n);
    size_t lines = 0, end = 0;
    while (lines < 61) lines += joins[end++] == '\n';
    short_joins.bytes = (char*)joins;
    short_joins.n = end;
    mkdir(test_path("short"), 0777);
    test_write_file(test_path("short/vocab.bpe"), joins, end);
    Tokenizer t;
    tokenizer_open(&t, test_path("short"));
    make_encoder(&short_encoder, &t);
    make_ranks(&short_ranks, &t);
    tokenizer_close(&t);
}

static void test_vocabulary(void) {
    test_true("50257 ids", gpt2.vocab == 50257);
    test_true("the end of text is 50256", gpt2.end_of_text == 50256);
    test_true("the hash of GPT-2's vocabulary", gpt2.hash == 0x55d7fc10df27ffbaull);
    Text encoder, ranks;
    size_t n;
    unsigned char* joins = read_file("test/data/gpt2/vocab.bpe", &n);
    make_encoder(&encoder, &gpt2);
    make_ranks(&ranks, &gpt2);
    mkdir(test_path("both"), 0777);
    test_write_file(test_path("both/vocab.bpe"), joins, n);
    test_write_file(test_path("both/encoder.json"), encoder.bytes, encoder.n);
    test_write_file(test_path("gpt2.tiktoken"), ranks.bytes, ranks.n);
    static const char* const NAMES[] = { "both", "gpt2.tiktoken" };
    for (int i = 0; i < 2; i++) {
        Tokenizer t;
        TokenizerWork w;
        tokenizer_open(&t, test_path(NAMES[i]));
        tokenizer_work_open(&w, &t);
        test_true("another spelling has the same hash", t.hash == gpt2.hash);
        test_true("and size", t.vocab == gpt2.vocab && t.end_of_text == gpt2.end_of_text);
        test_true("and the same ids", same_ids(&work, &w));
        tokenizer_work_close(&w);
        tokenizer_close(&t);
    }
    // Other ids for the same joins: the end of text first, and a token that nothing makes.
    Text other;
    text_open(&other);
    fprintf(other.file, "\t{\"<|endoftext|>\" : 0,\n\"<pad>\":1");
    Spelling spelling;
    spelling_make(&spelling);
    for (int id = 0; id < 256; id++) {
        int b = spelling.order[id];
        fprintf(other.file, ",\"\\u%04X\":%d", spelling.code[b], 2 + 255 - id);
    }
    fprintf(other.file, ", \"ab\": 258, \"bc\": 259, \"abc\": 260 }\n");
    fclose(other.file);
    mkdir(test_path("other"), 0777);
    test_write_file(test_path("other/encoder.json"), other.bytes, other.n);
    static const char JOINS[] = "#version: 0.2\nb c\na b\nab c\na bc\n";
    test_write_file(test_path("other/vocab.bpe"), JOINS, strlen(JOINS));
    Tokenizer t;
    TokenizerWork w;
    tokenizer_open(&t, test_path("other"));
    tokenizer_work_open(&w, &t);
    int ids[8];
    test_true("ids are encoder.json's", t.vocab == 261 && t.end_of_text == 0);
    size_t count = tokenizer_encode(&w, ids, 8, "abcab", 5);
    test_true("two joins may make one token", count == 2 && ids[0] == 260 && ids[1] == 258);
    count = tokenizer_encode(&w, ids, 8, "ababc", 5);
    test_true("ranks go before places", count == 2 && ids[0] == 258 && ids[1] == 260);
    tokenizer_work_close(&w);
    tokenizer_close(&t);
    // In a rank file a piece that is a token is one id, though no joins lead there.
    Text alone;
    text_open(&alone);
    fwrite(short_ranks.bytes, 1, short_ranks.n, alone.file);
    fprintf(alone.file, "eHl6eHl6 316\n");       // "xyzxyz"
    fclose(alone.file);
    test_write_file(test_path("alone.tiktoken"), alone.bytes, alone.n);
    tokenizer_open(&t, test_path("alone.tiktoken"));
    tokenizer_work_open(&w, &t);
    test_true("a whole piece", tokenizer_encode(&w, ids, 8, "xyzxyz", 6) == 1 && ids[0] == 316);
    test_true("not a part of one", tokenizer_encode(&w, ids, 8, "xyzxyza", 7) == 7);
    tokenizer_work_close(&w);
    tokenizer_close(&t);
    free(joins);
    free(encoder.bytes);
    free(ranks.bytes);
    free(other.bytes);
    free(alone.bytes);
}

// ---- what is wrong in vocabularies ---------------------------------------------------------

// die() comes back here with its message, so that thousands of broken files cost no process each.
static jmp_buf death;
static char message[4096];

static void catch_death(const char* text) {
    snprintf(message, sizeof message, "%s", text);
    longjmp(death, 1);
}

// What dies so leaves its memory behind, which is no leak of a program that would have ended.
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/lsan_interface.h>
#define LEAKS_OFF() __lsan_disable()
#define LEAKS_ON() __lsan_enable()
#else
#define LEAKS_OFF() ((void)0)
#define LEAKS_ON() ((void)0)
#endif

// False: it died, and message says of what.
static bool opens(const char* path) {
    static Tokenizer t;
    die_ranks = catch_death;
    LEAKS_OFF();
    bool ok = setjmp(death) == 0;
    if (ok) {
        tokenizer_open(&t, path);
        tokenizer_close(&t);
    }
    LEAKS_ON();
    die_ranks = NULL;
    return ok;
}

enum { JOINS_FILE, IDS_FILE, RANKS_FILE };

// The short vocabulary with the first `from` of one file turned into `to`.
static const char* broken_write(int which, const void* bytes, size_t n) {
    mkdir(test_path("broken"), 0777);
    if (which == RANKS_FILE) {
        test_write_file(test_path("broken.tiktoken"), bytes, n);
        return test_path("broken.tiktoken");
    }
    if (which == JOINS_FILE) test_write_file(test_path("broken/vocab.bpe"), bytes, n);
    else test_write_file(test_path("broken/vocab.bpe"), short_joins.bytes, short_joins.n);
    if (which == IDS_FILE) test_write_file(test_path("broken/encoder.json"), bytes, n);
    else unlink(test_path("broken/encoder.json"));
    return test_path("broken");
}

static const Text* short_file(int which) {
    return which == JOINS_FILE ? &short_joins : which == IDS_FILE ? &short_encoder : &short_ranks;
}

static void test_vocabulary_errors(void) {
    static const struct {
        int which;
        const char *from, *to;
        const char *part1, *part2;
    } CASES[] = {
        { JOINS_FILE, "#version", "version",
          "vocab.bpe: line 1: found 'version: 0.2'", "#version: 0.2" },
        { JOINS_FILE, "\nh e\n", "\nhe\n", "line 4: found the end, expected two tokens", NULL },
        { JOINS_FILE, "\nh e\n", "\n\n", "line 4: found the end, expected two tokens", NULL },
        { JOINS_FILE, "\nh e\n", "\nh e \n", "line 4: found ' ', expected two tokens", NULL },
        { JOINS_FILE, "\nh e\n", "\nh  e\n", "line 4: found ' e', expected two tokens", NULL },
        { JOINS_FILE, "\nh e\n", "\n he\n", "line 4: found ' he', expected two tokens", NULL },
        { JOINS_FILE, "\nh e\n", "\nh e\r\n", "line 4: found '\\x0d', expected", NULL },
        { JOINS_FILE, "\nh e\n", "\nh \xe2\x82\xac\n", "line 4: found '\\xe2\\x82\\xac'", NULL },
        { JOINS_FILE, "\nh e\n", "\nh \xc4\n", "line 4: found '\\xc4', expected", NULL },
        { JOINS_FILE, "\nh e\n", "\n\xc4 e\n", "line 4: found '\\xc4 e', expected", NULL },
        { JOINS_FILE, "\nh e\n", "\nh \xc2\xad\n", "line 4: found '\\xc2\\xad'", NULL },
        { JOINS_FILE, "\nh e\n", "\nhe r\n",
          "line 4: found 'he', expected a token of an earlier line", NULL },
        { JOINS_FILE, "\nh e\n", "\nr he\n",
          "line 4: found 'he', expected a token of an earlier line", NULL },
        { JOINS_FILE, "\nh e\n", "\ni n\n", "line 5: found token 'in' again", "it is at line 4" },
        { IDS_FILE, "{", "[", "encoder.json: byte 0: found '[\"!\": 0,', expected '{'", NULL },
        { IDS_FILE, "\"#\"", "#", "byte 18: found '#: 2, \"$', expected '\"' and a string", NULL },
        { IDS_FILE, "\"#\"", "\"\"", "found \"\", expected a token", NULL },
        { IDS_FILE, "\"#\"", "\" \"", "byte 18: found ' ', expected a token", NULL },
        { IDS_FILE, "\"#\"", "\"\\x\"", "byte 19: found '\\x\": 2, ', expected an escape", NULL },
        { IDS_FILE, "\"#\"", "\"\\u00g1\"", "found '\\u00g1\":', expected an escape", NULL },
        { IDS_FILE, "\"#\"", "\"\\ud83d\"", "expected a surrogate pair", NULL },
        { IDS_FILE, "\"#\"", "\"\\ud83d\\ue000\"", "expected a surrogate pair", NULL },
        { IDS_FILE, "\"#\"", "\"\\ude00\"", "expected a surrogate pair", NULL },
        { IDS_FILE, "\"#\"", "\"\\ude00\\ude00\"", "expected a surrogate pair", NULL },
        { IDS_FILE, "\"#\"", "\"\\ud83d\\ude00\"", "byte 18: found '\\xf0\\x9f\\x98\\x80'", NULL },
        { IDS_FILE, "\"#\"", "\"\t\"", "expected a string, in which control", NULL },
        { IDS_FILE, "\"#\"", "\"\xff\"",
          "byte 19: found '\\xff\": 2, \"', expected valid UTF-8", NULL },
        { IDS_FILE, "\"#\"", "\"$\"",
          "found token '$' again, expected it once; it is at byte 18", NULL },
        { IDS_FILE, "\"#\": 2", "\"#\": 3", "found id 3 again", "it is at byte 18" },
        { IDS_FILE, "\"#\": 2", "\"#\": 317", "found id 317, expected one from 0 to 316", NULL },
        { IDS_FILE, "\"#\": 2", "\"#\": -2", "found '-2, \"$\":', expected an id", NULL },
        { IDS_FILE, "\"#\": 2", "\"#\": 99999999999", "expected an id", NULL },
        { IDS_FILE, "\"#\": 2", "\"#\": 2.5", "found '.5, \"$\":', expected ',' or '}'", NULL },
        { IDS_FILE, "\"#\": 2", "\"#\" 2", "found '2, \"$\": ', expected ':'", NULL },
        { IDS_FILE, "\"#\": 2, ", "\"#\": 2 ", "expected ',' or '}'", NULL },
        { IDS_FILE, "\"#\":", "\"<#>\":", "found no token of the single byte 0x23", NULL },
        { IDS_FILE, ": 316}", ": 316} x", "found 'x', expected the end of the file", NULL },
        { IDS_FILE, "<|endoftext|>", "<|endoftext>", "found no token '<|endoftext|>'", NULL },
        { IDS_FILE, "\"he\"", "\"<he>\"",
          "vocab.bpe: line 4: found 'he', expected a token of", "encoder.json" },
        { IDS_FILE, ", \"<|end", ", \"hehe\": 317, \"<|end",
            "vocab.bpe: line 62: found the end of the file, "
          "expected the join that makes 'hehe', token 317", NULL },
        { RANKS_FILE, "Iw== 2\n", "Iw= 2\n",
          "broken.tiktoken: line 3: found '= 2', expected", NULL },
        { RANKS_FILE, "Iw== 2\n", "Ix== 2\n",
          "line 3: found '== 2', expected a token in base64", NULL },
        { RANKS_FILE, "Iw== 2\n", "I?== 2\n",
          "line 3: found '?== 2', expected a token in base64", NULL },
        { RANKS_FILE, "Iw== 2\n", "==== 2\n",
          "line 3: found '==== 2', expected a token in base64", NULL },
        { RANKS_FILE, "Iw== 2\n", " 2\n", "line 3: found ' 2', expected a token in base64", NULL },
        { RANKS_FILE, "Iw== 2\n", "\n", "line 3: found the end, expected a token in base64", NULL },
        { RANKS_FILE, "Iw== 2\n", "Iw==\n",
          "line 3: found the end, expected a space and a rank", NULL },
        { RANKS_FILE, "Iw== 2\n", "Iw== \n",
          "line 3: found ' ', expected a space and a rank", NULL },
        { RANKS_FILE, "Iw== 2\n", "Iw== 2x\n",
          "line 3: found 'x', expected a space and a rank", NULL },
        { RANKS_FILE, "Iw== 2\n", "Iw== -2\n",
          "line 3: found '-2', expected a space and a rank", NULL },
        { RANKS_FILE, "Iw== 2\n", "Iw== 3\n", "line 4: found id 3 again", "it is at line 3" },
        { RANKS_FILE, "Iw== 2\n", "Iw== 316\n",
          "line 3: found id 316, expected one from 0 to 315", NULL },
        { RANKS_FILE, "Iw== 2\n", "Ig== 2\n", "line 3: found token '\"' again", "it is at line 2" },
        { RANKS_FILE, "Iw== 2\n", "IyMj 2\n", "found no token of the single byte 0x23", NULL },
    };
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        const Text* whole = short_file(CASES[i].which);
        char* at = (char*)memmem(whole->bytes, whole->n, CASES[i].from, strlen(CASES[i].from));
        REQUIRE(at, "case %zu changes nothing", i);
        char* bytes = (char*)host_alloc(whole->n + 64, 1);
        size_t before = (size_t)(at - whole->bytes);
        size_t from = strlen(CASES[i].from), to = strlen(CASES[i].to);
        memcpy(bytes, whole->bytes, before);
        memcpy(bytes + before, CASES[i].to, to);
        memcpy(bytes + before + to, at + from, whole->n - before - from);
        message[0] = 0;
        bool died = !opens(broken_write(CASES[i].which, bytes, whole->n + to - from));
        if (!test_true(CASES[i].part1, died && strstr(message, CASES[i].part1) &&
                       (!CASES[i].part2 || strstr(message, CASES[i].part2))))
            printf("      message: %s\n", message);
        free(bytes);
    }

    // Cut anywhere: what can be seen is an error, and a list that ends with a line cannot be seen.
    for (int which = 0; which < 3; which++) {
        const Text* whole = short_file(which);
        bool ok = true;
        for (size_t n = 0; n < whole->n && ok; n += n < whole->n - 400 ? 13 : 1) {
            bool opened = opens(broken_write(which, whole->bytes, n));
            bool line = which == JOINS_FILE ? n > 20 && whole->bytes[n - 1] == '\n'
                      : which == RANKS_FILE ? n > 0 && whole->bytes[n - 1] == '\n' : false;
            ok = opened ? line : strstr(message, "broken") && strstr(message, "expected");
            if (!ok) printf("      cut at %zu: %s\n", n, opened ? "opens" : message);
        }
        test_true("a file cut anywhere", ok);
    }
    size_t last = short_joins.n - 1;
    while (short_joins.bytes[last - 1] != '\n') last--;
    broken_write(IDS_FILE, short_encoder.bytes, short_encoder.n);
    test_write_file(test_path("broken/vocab.bpe"), short_joins.bytes, last);
    bool died = !opens(test_path("broken"));
    test_true("encoder.json shows that lines are missing",
              died && strstr(message, "vocab.bpe: line 61: found the end of the file") &&
                  strstr(message, "broken/encoder.json"));
    died = !opens(test_path("nothing"));
    test_true("no such file", died && strstr(message, "nothing: No such file"));
    unlink(test_path("broken/vocab.bpe"));
    died = !opens(test_path("broken"));
    test_true("no vocab.bpe", died && strstr(message, "vocab.bpe: cannot be opened"));
    mkdir(test_path("broken/vocab.bpe"), 0777);
    died = !opens(test_path("broken"));
    test_true("a folder is no vocab.bpe", died && strstr(message, "not a file"));
    rmdir(test_path("broken/vocab.bpe"));

    die_ranks = catch_death;
    int id = gpt2.vocab;
    char text[4];
    if (setjmp(death) == 0) tokenizer_decode(&gpt2, text, 4, &id, 1), message[0] = 0;
    test_true("an id beyond the vocabulary", strstr(message, "id 50257 at 0, expected 0 to 50256"));
    if (setjmp(death) == 0) tokenizer_encode(&work, &id, 1, "ab", 2), message[0] = 0;
    test_true("no room", strstr(message, "room for 1 ids"));
    die_ranks = NULL;
}

// ---- tokenize and train_bpe ----------------------------------------------------------------

typedef struct Child {
    int status;                 // of exit; -1: killed
    char out[65536], err[16384];
} Child;

static void child_read(char* text, size_t size, FILE* file) {
    rewind(file);
    text[fread(text, 1, size - 1, file)] = 0;
    fclose(file);
}

// The words of a command line; a word that starts with @ is a path in this run's folder.
static int words_split(char** argv, char* store, size_t size, const char* words) {
    int argc = 0;
    size_t at = 0;
    for (const char* w = words; *w && argc < 63;) {
        size_t n = strcspn(w, " ");
        argv[argc++] = store + at;
        bool ours = w[0] == '@';
        if (ours) at += (size_t)snprintf(store + at, size - at, "%s/", test_folder);
        at += (size_t)snprintf(store + at, size - at, "%.*s", (int)n - ours, w + ours);
        store[at++] = 0;
        w += n + (w[n] == ' ');
    }
    argv[argc] = NULL;
    return argc;
}

typedef int (*Main)(int argc, char** argv);

// Runs a tool in a copy of this process; input (a path, or NULL) is its standard input.
static const Child* tool_run(Main tool, const char* input, const char* words) {
    static Child child;
    FILE *out = tmpfile(), *err = tmpfile();
    REQUIRE(out && err, "no temporary file: %s", strerror(errno));
    fflush(stdout);
    pid_t pid = fork();
    REQUIRE(pid >= 0, "fork: %s", strerror(errno));
    if (pid == 0) {
        static char store[8192];
        static char* argv[64];
        alarm(FUZZ_SECONDS);
        int argc = words_split(argv, store, sizeof store, words);
        if (!freopen(input ? input : "/dev/null", "rb", stdin)) _exit(100);
        dup2(fileno(out), STDOUT_FILENO);
        dup2(fileno(err), STDERR_FILENO);
        int status = tool(argc, argv);
        fflush(stdout);
        _exit(status);
    }
    int status = 0;
    waitpid(pid, &status, 0);
    child.status = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    child_read(child.out, sizeof child.out, out);
    child_read(child.err, sizeof child.err, err);
    return &child;
}

static int files_like(const char* pattern) {
    glob_t found;
    int n = glob(test_path(pattern), 0, NULL, &found) == 0 ? (int)found.gl_pathc : 0;
    globfree(&found);
    return n;
}

static void files_remove(const char* pattern) {
    glob_t found;
    if (glob(test_path(pattern), 0, NULL, &found) == 0) {
        for (size_t i = 0; i < found.gl_pathc; i++) unlink(found.gl_pathv[i]);
    }
    globfree(&found);
}

// What the shards must hold: the end of text and the ids of each document.
typedef struct Ids {
    uint16_t* id;
    size_t n, room;
} Ids;

static void ids_add(Ids* ids, const unsigned char* s, size_t n) {
    int* made = (int*)host_alloc(n, sizeof(int));
    size_t count = tokenizer_encode(&work, made, n, s, n);
    ids->id = (uint16_t*)array_grow(ids->id, &ids->room, ids->n + count + 1, sizeof(uint16_t));
    ids->id[ids->n++] = (uint16_t)gpt2.end_of_text;
    for (size_t i = 0; i < count; i++) ids->id[ids->n++] = (uint16_t)made[i];
    free(made);
}

// The shards out_val_000000, then out_train_000001 and on, each of `each` tokens but the last.
static bool shards_hold(const Ids* want, int64_t val, int64_t each) {
    size_t at = 0;
    for (int number = val ? 0 : 1; at < want->n; number++) {
        char name[64];
        snprintf(name, sizeof name, "out_%s_%06d.bin", number ? "train" : "val", number);
        if (access(test_path(name), R_OK) != 0) return false;
        int64_t tokens = shard_tokens(test_path(name)), room = number ? each : val;
        int64_t left = (int64_t)(want->n - at);
        if (tokens != (left < room ? left : room)) return false;
        size_t n;
        unsigned char* bytes = read_file(test_path(name), &n);
        bool same = memcmp(bytes + SHARD_HEADER_BYTES, want->id + at, 2 * (size_t)tokens) == 0;
        free(bytes);
        if (!same) return false;
        at += (size_t)tokens;
    }
    int shards = (val ? 1 : 0) + (int)ceil_div(want->n - (size_t)val, (size_t)each);
    return files_like("out_*.bin*") == shards;
}

// Appends a JSON line with the text, which is UTF-8, in one of several spellings.
static void write_line(FILE* file, const unsigned char* s, size_t n, int spelling) {
    if (spelling % 4 == 0) fprintf(file, "{\"id\": [%d, -1.5e+3, {}, []], \"text\": \"", spelling);
    else fprintf(file, " { \"text\"\t:\"");
    for (size_t i = 0; i < n;) {
        size_t length = (size_t)utf8_length(s + i, n - i);
        uint32_t code = length == 1 ? s[i] : s[i] & (0x7fu >> length);
        for (size_t k = 1; k < length; k++) code = code << 6 | (s[i + k] & 0x3f);
        if (code == '\n' && spelling % 2) fputs("\\n", file);
        else if (code == '"' || code == '\\') fprintf(file, "\\%c", code);
        else if (code < 0x20 || (code >= 0x80 && code < 0x10000 && spelling % 3)) {
            fprintf(file, spelling % 5 ? "\\u%04x" : "\\u%04X", code);
        } else if (code >= 0x10000 && spelling % 3) {
            uint32_t high = 0xd800 + ((code - 0x10000) >> 10), low = 0xdc00 + (code & 0x3ff);
            fprintf(file, "\\u%04x\\u%04x", high, low);
        } else {
            fwrite(s + i, 1, length, file);
        }
        i += length;
    }
    if (spelling % 4 == 1) fprintf(file, "\", \"text2\": null , \"more\":{\"text\":true}}\r\n");
    else fprintf(file, "\"}\n");
}

static void write_gzip(const char* path, const void* bytes, size_t n, bool two) {
    size_t half = two ? n / 2 : n;
    gzFile file = gzopen(path, "wb1");
    gzwrite(file, bytes, (unsigned)half);
    gzclose(file);
    if (!two) return;
    file = gzopen(path, "ab9");
    gzwrite(file, (const char*)bytes + half, (unsigned)(n - half));
    gzclose(file);
}

static const unsigned char LONG_LINE[] = "\xe6\x97\xa5\xe6\x9c\xac";

static void test_tokenize(void) {
    // Documents of a text of all kinds, cut at characters, one of them long.
    size_t n, lines_n;
    unsigned char* s = text_make(&n);
    Text lines;
    Ids want_lines = { NULL, 0, 0 }, want_all = { NULL, 0, 0 };
    text_open(&lines);
    n = 300000;
    while ((s[n] & 0xc0) == 0x80) n--;
    for (size_t at = 0, i = 0; at < n; i++) {
        size_t length = i == 5 ? 100000 : test_random(22, i) % (i % 10 ? 3000 : 30);
        if (length > n - at) length = n - at;
        while (at + length < n && (s[at + length] & 0xc0) == 0x80) length++;
        write_line(lines.file, s + at, length, (int)i);
        ids_add(&want_lines, s + at, length);
        if (i == 7) fputs(" \n\n", lines.file);              // lines without anything
        at += length;
    }
    fprintf(lines.file, "{\"text\":\"no newline\"}");
    ids_add(&want_lines, (const unsigned char*)"no newline", 10);
    fclose(lines.file);
    lines_n = lines.n;
    test_write_file(test_path("lines.jsonl"), lines.bytes, lines_n);
    write_gzip(test_path("lines.jsonl.gz"), lines.bytes, lines_n, true);

    // A text in which some blocks have no place to be cut, and bytes that are no characters.
    unsigned char* text = (unsigned char*)host_alloc(n + 40000, 1);
    memcpy(text, s, n);
    memset(text + n / 2, 'x', 20000);
    for (size_t i = 0; i < 20000; i++) text[n + i] = LONG_LINE[i % 6];
    for (size_t i = 0; i < 5000; i++) text[n + 20000 + i] = (unsigned char)draw(256);
    memset(text + n + 25000, ' ', 15000);
    test_write_file(test_path("text.txt"), text, n + 40000);
    test_write_file(test_path("empty.txt"), "", 0);
    ids_add(&want_all, text, n + 40000);
    ids_add(&want_all, NULL, 0);
    want_all.id = (uint16_t*)array_grow(want_all.id, &want_all.room, want_all.n + want_lines.n, 2);
    memcpy(want_all.id + want_all.n, want_lines.id, 2 * want_lines.n);
    want_all.n += want_lines.n;
    ids_add(&want_all, (const unsigned char*)"Hello world", 11);
    test_write_file(test_path("hello"), "Hello world", 11);

    static const size_t BLOCKS[] = { 100, 1000, 50000, 2 << 20 };
    for (int threads = 1; threads <= 4; threads++) {
        char words[400], name[64];
        int64_t val = threads % 2 ? 0 : 5000, each = threads == 3 ? 1 << 20 : 40000;
        block_bytes = BLOCKS[threads - 1];
        static const char FORMAT[] = "tokenize --tokenizer test/data/gpt2 --out @out --threads %d "
                                     "--shard-tokens %d --val-tokens %d %s";
        snprintf(words, sizeof words, FORMAT, threads, (int)each, (int)val,
                 "@text.txt @empty.txt @lines.jsonl -");
        snprintf(name, sizeof name, "%d threads, blocks of %zu bytes", threads, block_bytes);
        const Child* c = tool_run(tokenize_main, test_path("hello"), words);
        if (!test_true(name, c->status == 0 && c->err[0] == 0 && shards_hold(&want_all, val, each)))
            printf("      status %d: %s\n%s\n", c->status, c->out, c->err);
        files_remove("out_*");
        snprintf(words, sizeof words, FORMAT, threads, (int)each, (int)val,
                 threads % 2 ? "@lines.jsonl.gz" : "-.jsonl.gz");
        c = tool_run(tokenize_main, test_path("lines.jsonl.gz"), words);
        bool ok = c->status == 0 && c->err[0] == 0 && shards_hold(&want_lines, val, each);
        if (!test_true("compressed", ok))
            printf("      status %d: %s\n%s\n", c->status, c->out, c->err);
        files_remove("out_*");
    }
    block_bytes = 1000;

    const Child* c = tool_run(tokenize_main, test_path("hello"),
        "tokenize --tokenizer test/data/gpt2 --ids");
    test_true("--ids", c->status == 0 && strcmp(c->out, "15496 995\n") == 0);
    c = tool_run(tokenize_main, NULL, "tokenize --tokenizer test/data/gpt2 --ids");
    test_true("--ids of nothing", c->status == 0 && strcmp(c->out, "\n") == 0);
    free(s);
    free(text);
    free(lines.bytes);
    free(want_all.id);
    free(want_lines.id);
}

// A child that has not ended is told to: nothing stays under a shard's name.
static void interrupt(int signal, int partials) {
    int ends[2];
    REQUIRE(pipe(ends) == 0, "pipe: %s", strerror(errno));
    fflush(stdout);
    pid_t pid = fork();
    REQUIRE(pid >= 0, "fork: %s", strerror(errno));
    if (pid == 0) {
        static char store[8192];
        static char* argv[64];
        alarm(FUZZ_SECONDS);
        dup2(ends[0], STDIN_FILENO);
        close(ends[0]);
        close(ends[1]);
        int argc = words_split(argv, store, sizeof store,
            "tokenize --tokenizer @short --out @out -");
        _exit(tokenize_main(argc, argv));
    }
    close(ends[0]);
    char text[4096];
    for (size_t i = 0; i < sizeof text; i++) text[i] = i % 7 ? 'a' : ' ';
    for (int i = 0; i < 1000 && files_like("out_*.partial") == 0; i++) {
        if (write(ends[1], text, sizeof text) < 0) break;
        usleep(10000);
    }
    bool began = files_like("out_*.partial") == 1;
    kill(pid, signal);
    int status = 0;
    waitpid(pid, &status, 0);
    close(ends[1]);
    test_true("an interrupted run has begun a shard", began);
    test_true("and leaves none under its name", files_like("out_*.bin") == 0);
    test_true("nor a part of one, if it can", files_like("out_*.partial") == partials);
}

static void test_tokenize_errors(void) {
    block_bytes = 1000;
    static const char GOOD[] = "{\"text\": \"a good line that comes before\"}\n";
    static const struct { const char *line, *part; } LINES[] = {
        { "x", "bad.jsonl: line 101, column 1 (byte 4200): found 'x', expected '{' and an object" },
        { "{}", "column 2 (byte 4201): found '}', expected \"text\": \"...\"" },
        { "[]", "found '[]', expected '{'" },
        { "{\"txt\": \"a\"}", "column 12 (byte 4211): found '}', expected \"text\"" },
        { "{\"text\": 1}", "found '1}', expected '\"' and a string" },
        { "{\"text\": null}", "found 'null}', expected '\"' and a string" },
        { "{\"text\": \"a}", "column 13 (byte 4212): found the end, expected '\"'" },
        { "{\"text\": \"a\"", "found the end, expected ',' or '}'" },
        { "{\"text\": \"a\"} {}", "found '{}', expected the end of the line" },
        { "{\"text\": \"a\", \"text\": \"b\"}", "expected \"text\" once" },
        { "{\"text\": \"a\",}", "expected '\"' and a string" },
        { "{\"text\" \"a\"}", "expected ':'" },
        { "{text: \"a\"}", "expected '\"' and a string" },
        { "{\"a\": tru, \"text\": \"a\"}", "found 'tru, \"te', expected a value" },
        { "{\"a\": 01, \"text\": \"a\"}", "expected a number without leading zeros" },
        { "{\"a\": 1., \"text\": \"a\"}", "expected a digit" },
        { "{\"a\": 1e+, \"text\": \"a\"}", "expected a digit" },
        { "{\"a\": NaN, \"text\": \"a\"}", "expected a value" },
        { "{\"a\": [1 2], \"text\": \"a\"}", "found '2], \"tex', expected ',' or ']'" },
        { "{\"a\": [1,], \"text\": \"a\"}", "expected a value" },
        { "{\"text\": \"\\ud800\"}", "expected a surrogate pair" },
        { "{\"text\": \"\\ude00\\ud83d\"}", "expected a surrogate pair" },
        { "{\"text\": \"\\u12\"}", "expected an escape" },
        { "{\"text\": \"\\a\"}", "expected an escape" },
        { "{\"text\": \"\t\"}", "control characters are escaped" },
        { "{\"text\": \"\xff\"}", "found '\\xff\"}', expected valid UTF-8" },
        { "{\"text\": \"\xed\xa0\x80\"}", "expected valid UTF-8" },
    };
    static const char RUN[] = "tokenize --tokenizer @short --out @out --threads 3 @bad.jsonl "
                              "@bad2.jsonl";
    for (size_t i = 0; i < sizeof LINES / sizeof *LINES; i++) {
        for (int file = 0; file < 2; file++) {
            FILE* out = fopen(test_path(file ? "bad2.jsonl" : "bad.jsonl"), "wb");
            for (int k = 0; k < 200; k++) fprintf(out, "%s", k == 100 - file ? "" : GOOD);
            rewind(out);
            for (int k = 0; k < 100; k++) fprintf(out, "%s", GOOD);
            fprintf(out, "%s\n", file ? "second" : LINES[i].line);
            for (int k = 0; k < 100; k++) fprintf(out, "%s", GOOD);
            fclose(out);
        }
        const Child* c = tool_run(tokenize_main, NULL, RUN);
        bool one = strstr(c->err, "line 101") && !strstr(c->err, "second");
        if (!test_true(LINES[i].part, c->status == 1 && one && strstr(c->err, LINES[i].part)))
            printf("      status %d: %s\n", c->status, c->err);
        test_true("nothing is left of it", files_like("out_*") == 0);
        files_remove("out_*");
    }
    Text deep;
    text_open(&deep);
    fprintf(deep.file, "{\"a\": ");
    for (int i = 0; i < 100000; i++) fputc('[', deep.file);
    fclose(deep.file);
    test_write_file(test_path("deep.jsonl"), deep.bytes, deep.n);
    free(deep.bytes);
    char* gzip_bytes;
    size_t gzip_n;
    Text lines;
    text_open(&lines);
    for (uint64_t i = 0; i < 300; i++) {
        fprintf(lines.file, "{\"text\": \"%" PRIx64 "\"}\n", test_random(23, i));
    }
    fclose(lines.file);
    write_gzip(test_path("whole.jsonl.gz"), lines.bytes, lines.n, false);
    gzip_bytes = (char*)read_file(test_path("whole.jsonl.gz"), &gzip_n);
    bool ok = true;
    for (size_t n = 0; n < gzip_n && ok; n += n < 20 ? 1 : gzip_n / 10) {
        test_write_file(test_path("cut.jsonl.gz"), gzip_bytes, n);
        const Child* c = tool_run(tokenize_main, NULL,
            "tokenize --tokenizer @short --out @out @cut.jsonl.gz");
        char place[100];
        snprintf(place, sizeof place, "cut.jsonl.gz: byte %zu: found the end of the file", n);
        ok = c->status == 1 && strstr(c->err, place) && files_like("out_*") == 0;
        if (!ok) printf("      cut at %zu: status %d: %s\n", n, c->status, c->err);
    }
    test_true("a gzip file cut anywhere", ok);
    gzip_bytes[gzip_n / 4] ^= 0x55;
    test_write_file(test_path("cut.jsonl.gz"), gzip_bytes, gzip_n);
    test_write_file(test_path("none.jsonl"), "\n \n", 3);
    test_write_file(test_path("tail.jsonl.gz"), gzip_bytes, gzip_n);
    write_gzip(test_path("tail.jsonl.gz"), lines.bytes, lines.n, false);
    FILE* tail = fopen(test_path("tail.jsonl.gz"), "ab");
    fputs("what is this", tail);
    fclose(tail);
    test_write_file(test_path("plain.jsonl.gz"), lines.bytes, lines.n);
    test_write_file(test_path("there_val_000000.bin"), "x", 1);
    free(lines.bytes);
    free(gzip_bytes);

    static const struct { const char *words, *part; } RUNS[] = {
        { "--out @out @deep.jsonl", "expected at most 100 levels of values" },
        { "--out @out @cut.jsonl.gz", "cut.jsonl.gz: byte " },
        { "--out @out @tail.jsonl.gz", "tail.jsonl.gz: byte " },
        { "--out @out @plain.jsonl.gz",
          "plain.jsonl.gz: byte 2: found incorrect header check, expected a gzip" },
        { "--out @out @none.jsonl", "none.jsonl: no documents" },
        { "--out @out @nothing.txt", "nothing.txt: cannot be opened: No such file" },
        { "--out @out @text.parquet",
          "text.parquet: found no known kind of file, expected .txt, .jsonl or" },
        { "--out @out @hello", "expected .txt" },
        { "--out @no/folder @lines.jsonl",
          "no/folder_train_000001.bin.partial: cannot be created: No such" },
        { "--out @there @lines.jsonl", "there_val_000000.bin is there from before" },
        { "--out @out --val-tokens 1000000 @text.txt",
          "tokens in all, but --val-tokens is 1000000" },
        { "--out @out --val-tokens -1 @text.txt", "--val-tokens must be a whole number from 0 to" },
        { "--out @out --shard-tokens 0 @text.txt",
          "--shard-tokens must be a whole number from 1 to" },
        { "--out @out --shard-tokens 1x @text.txt", "got '1x'" },
        { "--out @out --threads 0 @text.txt", "--threads must be a whole number from 1 to 1024" },
        { "--out @out --shards 5 @text.txt", "no flag --shards" },
        { "--out @out", "nothing to do" },
        { "@text.txt", "nothing to do" },
        { "--ids @text.txt", "nothing to do" },
        { "--ids --out @out", "nothing to do" },
        { "@text.txt --out", "--out wants a value" },
    };
    for (size_t i = 0; i < sizeof RUNS / sizeof *RUNS; i++) {
        char words[400];
        snprintf(words, sizeof words, "tokenize --tokenizer @short %s", RUNS[i].words);
        const Child* c = tool_run(tokenize_main, NULL, words);
        if (!test_true(RUNS[i].part, c->status == 1 && strstr(c->err, RUNS[i].part) &&
                files_like("out_*") == 0))
            printf("      status %d: %s\n", c->status, c->err);
    }
    block_longest = 15000;
    const Child* c = tool_run(tokenize_main, NULL,
        "tokenize --tokenizer @short --out @out @text.txt");
    bool ended = c->status == 1 && strstr(c->err, "of one class of characters");
    test_true("text without a place to cut", ended);
    c = tool_run(tokenize_main, NULL, "tokenize --tokenizer @short --out @out @deep.jsonl");
    ended = c->status == 1 && strstr(c->err, "deep.jsonl: byte 0 (line 1): found");
    test_true("a line without an end", ended && strstr(c->err, "without a newline"));
    block_longest = 1 << 30;
    interrupt(SIGTERM, 0);
    interrupt(SIGINT, 0);
    interrupt(SIGKILL, 1);
    c = tool_run(tokenize_main, NULL, "tokenize --tokenizer @short --out @out @text.txt");
    bool whole = c->status == 0 && files_like("out_*.partial") == 0;
    test_true("what was left in parts is no obstacle", whole);
    c = tool_run(tokenize_main, NULL, "tokenize --tokenizer @short --out @out @text.txt");
    ended = c->status == 1 && strstr(c->err, "out_train_000001.bin is there");
    test_true("whole shards of before are", ended);
    files_remove("out_*");
}

#define JOINS_HASH 0x5670f33cd0ca8002ull        // of the file with 1500 joins of the text

static void test_train_bpe(void) {
    size_t n;
    unsigned char* s = text_make(&n);
    test_write_file(test_path("train.txt"), s, n);
    const Child* c = tool_run(train_bpe_main, NULL, "train_bpe --vocab 1757 --out @bpe @train.txt");
    test_true("it runs", c->status == 0 && strstr(c->out, "1757 tokens"));
    uint64_t hash = file_hash(test_path("bpe/vocab.bpe"));
    test_true("the joins are those of Hugging Face tokenizers", hash == JOINS_HASH);
    Tokenizer t;
    TokenizerWork w;
    tokenizer_open(&t, test_path("bpe"));
    tokenizer_work_open(&w, &t);
    test_true("the vocabulary opens", t.vocab == 1757 && t.end_of_text == 1756);
    test_true("text returns", bytes_return(&w, s, 100000));
    tokenizer_work_close(&w);
    tokenizer_close(&t);

    // Neighbours that overlap; the joins are again those of Hugging Face tokenizers.
    static const char RUN[] = "aaaaaaa aaaaa aaaa aaaa baab";
    static const char JOINS[] = "#version: 0.2\na a\naa aa\n\xc4\xa0 aaaa\nb aa\n\xc4\xa0 baa\n"
                                "aa a\naaaa aaa\n";
    test_write_file(test_path("run.txt"), RUN, strlen(RUN));
    c = tool_run(train_bpe_main, NULL, "train_bpe --vocab 264 --out @run @run.txt");
    unsigned char* joins = read_file(test_path("run/vocab.bpe"), &n);
    test_true("runs of a letter", c->status == 0 && strcmp((char*)joins, JOINS) == 0);
    tokenizer_open(&t, test_path("run"));
    tokenizer_close(&t);
    free(joins);

    static const struct { const char *words, *part; } RUNS[] = {
        { "--vocab 3000 --out @bpe @run.txt", "expected 2743 for --vocab 3000\n" },
        { "--vocab 257 --out @bpe @run.txt", "--vocab must be a whole number from 258" },
        { "--vocab x --out @bpe @run.txt", "got 'x'" },
        { "--vocab 300 --out @bpe", "nothing to do" },
        { "--vocab 300 --out @bpe @nothing", "nothing: No such file" },
        { "--vocab 300 --out @no/folder @run.txt", "no/folder: cannot be made" },
        { "--vocab 300 --merges 5", "no flag --merges" },
        { "--vocab", "--vocab wants a value" },
    };
    for (size_t i = 0; i < sizeof RUNS / sizeof *RUNS; i++) {
        char words[400];
        snprintf(words, sizeof words, "train_bpe %s", RUNS[i].words);
        c = tool_run(train_bpe_main, NULL, words);
        if (!test_true(RUNS[i].part, c->status == 1 && strstr(c->err, RUNS[i].part)))
            printf("      status %d: %s\n", c->status, c->err);
    }
    test_true("an error changes nothing", file_hash(test_path("bpe/vocab.bpe")) == JOINS_HASH &&
              files_like("bpe/*") == 2);
    free(s);
}

// ---- fuzz ----------------------------------------------------------------------------------

// Whole files, which mutate changes: a short vocabulary in its three spellings, and JSON lines of
// all spellings with texts of all kinds, plain and compressed.
enum { LINES_FILE = RANKS_FILE + 1, LINES_GZIP_FILE, CORPUS_FILES };
static Text corpus[CORPUS_FILES];

static void corpus_read(void) {
    static const char* const NAMES[] = { "vocab.bpe", "encoder.json", "ranks.tiktoken",
                                         "lines.jsonl", "lines.jsonl.gz" };
    for (int i = 0; i < CORPUS_FILES; i++) {
        char path[100];
        snprintf(path, sizeof path, "test/data/fuzz/%s", NAMES[i]);
        corpus[i].bytes = (char*)read_file(path, &corpus[i].n);
    }
}

static void corpus_free(void) {
    for (int i = 0; i < CORPUS_FILES; i++) free(corpus[i].bytes);
}

// A copy of a file with one to four changes of a kind that such a file suffers.
static size_t mutate(unsigned char* out, const Text* whole, size_t room) {
    size_t n = whole->n;
    memcpy(out, whole->bytes, n);
    for (uint32_t changes = 1 + draw(4); changes > 0 && n > 0; changes--) {
        size_t at = draw((uint32_t)n), length = 1 + draw(draw(4) ? 8 : 400);
        if (length > n - at) length = n - at;
        switch (draw(7)) {
        case 0: out[at] = (unsigned char)draw(256); break;
        case 1: out[at] ^= (unsigned char)(1 << draw(8)); break;
        case 2: n = at; break;
        case 3:
            memmove(out + at, out + at + length, n - at - length);
            n -= length;
            break;
        case 4:
            if (n + length > room) break;
            memmove(out + at + length, out + at, n - at);
            n += length;
            break;
        case 5:
            memmove(out + at, out + draw((uint32_t)(n - length + 1)), length);
            break;
        default: {
            static const char* const WORDS[] = {
                "\n", "\"", "\\u", "\\ud800", " ", "0", "99999999999", "{", "}", ",", "=", "\xff",
                "\xc4\xa0", "\\", ":",
            };
            const char* word = WORDS[draw(sizeof WORDS / sizeof *WORDS)];
            size_t k = strlen(word);
            if (k <= n - at) memcpy(out + at, word, k);
        }
        }
    }
    return n;
}

// One file: it opens and then encodes, or it dies with a message that names it and what was wanted.
static bool fuzz_vocabulary(void) {
    static unsigned char bytes[65536], s[300];
    int which = (int)draw(3);
    size_t n = mutate(bytes, &corpus[which], sizeof bytes);
    const char* path = broken_write(which, bytes, n);
    static Tokenizer t;
    static TokenizerWork w;
    die_ranks = catch_death;
    message[0] = 0;
    bool ok = true;
    if (setjmp(death) == 0) {
        tokenizer_open(&t, path);
        die_ranks = NULL;
        tokenizer_work_open(&w, &t);
        ok = bytes_return(&w, s, draw_text(s, sizeof s));
        tokenizer_work_close(&w);
        tokenizer_close(&t);
    } else {
        ok = strstr(message, "broken") && strstr(message, "expected");
        if (!ok) printf("      message: %s\n", message);
    }
    die_ranks = NULL;
    return ok;
}

static bool fuzz_bytes(void) {
    static unsigned char s[4096];
    size_t n = draw_text(s, sizeof s);
    for (uint32_t k = draw(8); k > 0 && n > 0; k--) s[draw((uint32_t)n)] = (unsigned char)draw(256);
    return bytes_return(&work, s, n);
}

// One line: its text is valid UTF-8, or the error says where and what was expected.
static bool fuzz_line(void) {
    static unsigned char bytes[65536];
    size_t n = mutate(bytes, &corpus[LINES_FILE], sizeof bytes), length;
    size_t start = draw((uint32_t)n + 1);
    unsigned char* newline = (unsigned char*)memchr(bytes + start, '\n', n - start);
    size_t end = newline ? (size_t)(newline - bytes) : n;
    while (start > 0 && bytes[start - 1] != '\n') start--;
    unsigned char *exact = (unsigned char*)malloc(end - start + 1), *text;
    memcpy(exact, bytes + start, end - start);
    JsonReader j = { exact, end - start, 0, "" };
    bool ok = true;
    if (line_text(&j, &text, &length)) {
        for (size_t at = 0; at < length && ok;) {
            int k = utf8_length(text + at, length - at);
            ok = k > 0;
            at += (size_t)k;
        }
    } else {
        ok = strstr(j.error, "found") && strstr(j.error, "expected") && j.at <= j.n;
    }
    free(exact);
    return ok;
}

// One file through the whole tool: whole shards, or one message and no shards.
static bool fuzz_file(void) {
    static unsigned char bytes[65536];
    bool zipped = draw(2);
    const Text* whole = &corpus[zipped ? LINES_GZIP_FILE : LINES_FILE];
    const char* name = zipped ? "fuzz.jsonl.gz" : "fuzz.jsonl";
    size_t n = mutate(bytes, whole, sizeof bytes);
    test_write_file(test_path(name), bytes, n);
    char words[200];
    snprintf(words, sizeof words, "tokenize --tokenizer @short --out @out --threads 2 @%s", name);
    block_bytes = 100 + draw(2000);
    const Child* c = tool_run(tokenize_main, NULL, words);
    bool ok;
    if (c->status == 0) {
        ok = c->err[0] == 0 && files_like("out_*") == 1 &&
            shard_tokens(test_path("out_train_000001.bin"));
    } else {
        const char* first = strstr(c->err, "tokenize: ");
        bool empty = strstr(c->err, "no documents");
        ok = c->status == 1 && files_like("out_*") == 0 && first == c->err && strstr(first, name) &&
             (empty || strstr(first, "expected")) && !strstr(first + 1, "tokenize: ");
    }
    if (!ok) printf("      status %d: %s\n", c->status, c->err);
    files_remove("out_*");
    return ok;
}

static const struct { const char* name; bool (*one)(void); int batch; } FUZZ[] = {
    { "vocabularies", fuzz_vocabulary, 100 },
    { "bytes", fuzz_bytes, 100 },
    { "JSON lines", fuzz_line, 1000 },
    { "files", fuzz_file, 10 },
};
enum { FUZZ_COUNT = sizeof FUZZ / sizeof *FUZZ };

// A batch in a process of its own: what crashes, hangs or leaves messages out fails the batch.
static bool fuzz_batch(int kind, uint64_t seed) {
    fflush(stdout);
    pid_t pid = fork();
    REQUIRE(pid >= 0, "fork: %s", strerror(errno));
    if (pid == 0) {
        alarm(2 * FUZZ_SECONDS);
        for (int i = 0; i < FUZZ[kind].batch; i++) {
            draws = (seed * 1000 + (uint64_t)i) << 20;
            if (FUZZ[kind].one()) continue;
            printf("      %s, seed %" PRIu64 ", case %d\n", FUZZ[kind].name, seed, i);
            fflush(stdout);
            _exit(1);
        }
        _exit(0);
    }
    int status = 0;
    waitpid(pid, &status, 0);
    if (status != 0)
        printf("      %s, seed %" PRIu64 ": status %d, signal %d\n", FUZZ[kind].name, seed,
               WEXITSTATUS(status), WIFSIGNALED(status) ? WTERMSIG(status) : 0);
    return status == 0;
}

static void test_fuzz(void) {
    corpus_read();
    for (int i = 0; i < FUZZ_COUNT; i++) {
        for (uint64_t seed = 0; seed < 5; seed++) test_true(FUZZ[i].name, fuzz_batch(i, seed));
    }
    corpus_free();
}

static int fuzz(int seconds, uint64_t seed) {
    uint64_t count[FUZZ_COUNT] = {0};
    corpus_read();
    printf("test_tokenizer fuzz: seed %" PRIu64 "\n", seed);
    for (time_t end = time(NULL) + seconds; time(NULL) < end; seed++) {
        for (int i = 0; i < FUZZ_COUNT; i++) {
            test_true(FUZZ[i].name, fuzz_batch(i, seed));
            count[i] += (uint64_t)FUZZ[i].batch;
        }
    }
    for (int i = 0; i < FUZZ_COUNT; i++) printf("      %" PRIu64 " %s\n", count[i], FUZZ[i].name);
    corpus_free();
    return test_summary();
}

// ---- main ----------------------------------------------------------------------------------

static int compare(const char* tokenizer, const char* text, const char* shard) {
    Tokenizer t;
    TokenizerWork w;
    size_t n, shard_n;
    tokenizer_open(&t, tokenizer);
    tokenizer_work_open(&w, &t);
    unsigned char *s = read_file(text, &n), *want = read_file(shard, &shard_n);
    int* ids = (int*)host_alloc(n, sizeof(int));
    size_t count = tokenizer_encode(&w, ids, n, s, n), wrong = 0;
    size_t tokens = shard_n < 1024 ? 0 : (shard_n - 1024) / 2;
    for (size_t i = 0; i < count && i < tokens; i++) {
        uint16_t id;
        memcpy(&id, want + 1024 + 2 * i, 2);
        wrong += id != ids[i];
    }
    printf("%zu bytes, %zu ids, %zu in the shard, %zu differ\n", n, count, tokens, wrong);
    char* back = (char*)host_alloc(n, 1);
    bool same = tokenizer_decode(&t, back, n, ids, count) == n && memcmp(back, s, n) == 0;
    test_true("the ids are the shard's", count == tokens && wrong == 0);
    test_true("the ids give the text", same);
    free(s);
    free(want);
    free(ids);
    free(back);
    tokenizer_work_close(&w);
    tokenizer_close(&t);
    return test_summary();
}

int main(int argc, char** argv) {
    program_name = "test_tokenizer";
    const char* mode = argc > 1 ? argv[1] : "";
    if (strcmp(mode, "compare") == 0 && argc == 5) return compare(argv[2], argv[3], argv[4]);
    tokenizer_open(&gpt2, GPT2);
    tokenizer_work_open(&work, &gpt2);
    if (strcmp(mode, "text") == 0) {
        size_t n;
        unsigned char* s = text_make(&n);
        return fwrite(s, 1, n, stdout) == n ? 0 : 1;
    }
    const char* temporary = getenv("TMPDIR");
    snprintf(test_folder, sizeof test_folder, "%.200s/tokenizer.XXXXXX",
             temporary ? temporary : "/tmp");
    REQUIRE(mkdtemp(test_folder), "%s: cannot be made: %s", test_folder, strerror(errno));
    shorts_make();
    int status;
    if (strcmp(mode, "fuzz") == 0) {
        uint64_t seed = argc > 3 ? strtoull(argv[3], NULL, 10) : (uint64_t)time(NULL) << 8;
        status = fuzz(argc > 2 ? atoi(argv[2]) : 60, seed);
    } else {
        test_init(argc, argv);
        if (test_group("unicode")) test_unicode();
        if (test_group("pretokenize")) test_pretokenize();
        if (test_group("tokenizer: cases")) test_cases();
        if (test_group("tokenizer: merges")) test_merges();
        if (test_group("tokenizer: text")) test_text();
        if (test_group("tokenizer: bytes")) test_round_trip();
        if (test_group("vocabulary")) test_vocabulary();
        if (test_group("vocabulary: errors")) test_vocabulary_errors();
        if (test_group("tokenize")) test_tokenize();
        if (test_group("tokenize: errors")) test_tokenize_errors();
        if (test_group("train_bpe")) test_train_bpe();
        if (test_group("fuzz")) test_fuzz();
        status = test_summary();
    }
    char command[300];
    snprintf(command, sizeof command, "rm -r '%s'", test_folder);
    if (system(command) != 0) fprintf(stderr, "test_tokenizer: %s is left over\n", test_folder);
    free(short_joins.bytes);
    free(short_encoder.bytes);
    free(short_ranks.bytes);
    tokenizer_work_close(&work);
    tokenizer_close(&gpt2);
    return status;
}
