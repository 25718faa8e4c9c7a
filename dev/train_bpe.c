/*
A byte-level BPE vocabulary of any size from text, for models that are too small for GPT-2's.

    train_bpe --vocab N --out DIR FILE...

writes DIR/vocab.bpe and DIR/encoder.json, which llmc/tokenizer.h reads: ids 0 to 255 are the bytes
in GPT-2's order, then one id per join, and the last, N - 1, is the end of text. So there are
N - 257 joins. The training is that of Hugging Face tokenizers (BPE over ByteLevel, the alphabet of
256 bytes, a file as one text), join for join:

    the pieces of all files (llmc/pretokenize.h) are counted; a piece starts as its bytes
    repeat: of all neighbours take the pair that is most frequent, pieces by their counts; of equal
            ones that with the lower left id, then the lower right id
            make of it one id in all pieces, from left to right

A piece that occurs often is kept once. All pieces lie in one array of symbols that know their
neighbours, each pair knows its places, and a heap knows the pairs by count: a join costs its own
places, not a walk over the text.

test        test/test_tokenizer.c: train_bpe
*/
#include "llmc/common.h"
#include "llmc/tokenizer.h"

#include <fcntl.h>
#include <unistd.h>

// ---- pieces --------------------------------------------------------------------------------

typedef struct Piece {
    size_t start, length;           // in the store of bytes
    uint64_t hash;
    int64_t count;
} Piece;

typedef struct Pieces {
    unsigned char* bytes;
    size_t bytes_n, bytes_room;
    Piece* piece;
    size_t count, room;
    int* table;                     // of piece numbers; -1: empty
    int table_bits;
} Pieces;

static void pieces_rehash(Pieces* p) {
    size_t size = (size_t)1 << ++p->table_bits;
    free(p->table);
    p->table = (int*)host_alloc(size, sizeof(int));
    memset(p->table, 0xff, size * sizeof(int));
    for (size_t i = 0; i < p->count; i++) {
        size_t at = p->piece[i].hash & (size - 1);
        while (p->table[at] >= 0) at = (at + 1) & (size - 1);
        p->table[at] = (int)i;
    }
}

static void pieces_add(Pieces* p, const unsigned char* s, size_t n) {
    uint64_t hash = hash_bytes(HASH_START, s, n);
    if (p->table_bits == 0) p->table_bits = 15;
    if (!p->table || 2 * p->count >= (size_t)1 << p->table_bits) pieces_rehash(p);
    size_t mask = ((size_t)1 << p->table_bits) - 1, at = hash & mask;
    for (; p->table[at] >= 0; at = (at + 1) & mask) {
        Piece* found = &p->piece[p->table[at]];
        if (found->hash != hash || found->length != n) continue;
        if (memcmp(p->bytes + found->start, s, n) != 0) continue;
        found->count++;
        return;
    }
    REQUIRE(p->count < INT32_MAX, "more than %d different pieces of text", INT32_MAX);
    p->piece = (Piece*)array_grow(p->piece, &p->room, p->count + 1, sizeof(Piece));
    p->bytes = (unsigned char*)array_grow(p->bytes, &p->bytes_room, p->bytes_n + n, 1);
    Piece* piece = &p->piece[p->count];
    piece->start = p->bytes_n;
    piece->length = n;
    piece->hash = hash;
    piece->count = 1;
    memcpy(p->bytes + p->bytes_n, s, n);
    p->bytes_n += n;
    p->table[at] = (int)p->count++;
}

// All pieces of a file, of which a block is held at a time.
static void pieces_add_file(Pieces* p, const char* path) {
    const size_t block = 4 << 20;
    unsigned char* text = NULL;
    size_t room = 0, n = 0;
    FILE* file = fopen(path, "rb");
    REQUIRE(file, "%s: %s", path, strerror(errno));
    for (bool more = true; more;) {
        text = (unsigned char*)array_grow(text, &room, n + block, 1);
        size_t got = fread(text + n, 1, block, file), at = 0;
        more = got > 0;
        n += got;
        size_t end = more ? pretoken_cut(text, n) : n;
        for (size_t length; at < end; at += length) {
            length = pretoken_length(text + at, n - at);
            pieces_add(p, text + at, length);
        }
        memmove(text, text + at, n - at);
        n -= at;
    }
    REQUIRE(!ferror(file), "%s: %s", path, strerror(errno));
    fclose(file);
    free(text);
}

// ---- pairs ---------------------------------------------------------------------------------

typedef struct Symbol {
    int id;                         // -1: joined to the one before
    int piece;                      // which says how often it counts
    int before, next;               // in its piece; -1: none
} Symbol;

typedef struct Pair {
    int left, right;
    int64_t count;
    int* place;                     // symbols where it began when they were added, in rising order
    size_t place_n, place_room;
    bool touched;                   // has more places than when the join began
} Pair;

typedef struct Candidate {
    int64_t count;
    int pair;
} Candidate;

typedef struct Trainer {
    Symbol* symbol;
    const Piece* piece;
    Pair* pair;
    size_t pair_n, pair_room;
    int* table;                     // of pair numbers; -1: empty
    int table_bits;
    Candidate* heap;
    size_t heap_n, heap_room;
    int* touched;                   // pairs
    size_t touched_n, touched_room;
} Trainer;

static size_t pair_slot(const Trainer* t, int left, int right) {
    uint64_t key = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    size_t mask = ((size_t)1 << t->table_bits) - 1;
    size_t at = (key * 0x9e3779b97f4a7c15ull) >> (64 - t->table_bits);
    for (; t->table[at] >= 0; at = (at + 1) & mask) {
        const Pair* p = &t->pair[t->table[at]];
        if (p->left == left && p->right == right) break;
    }
    return at;
}

static int pair_find(Trainer* t, int left, int right) {
    if (!t->table || 2 * t->pair_n >= (size_t)1 << t->table_bits) {
        t->table_bits = t->table ? t->table_bits + 1 : 15;
        free(t->table);
        t->table = (int*)host_alloc((size_t)1 << t->table_bits, sizeof(int));
        memset(t->table, 0xff, sizeof(int) << t->table_bits);
        for (size_t i = 0; i < t->pair_n; i++) {
            t->table[pair_slot(t, t->pair[i].left, t->pair[i].right)] = (int)i;
        }
    }
    size_t at = pair_slot(t, left, right);
    if (t->table[at] < 0) {
        t->pair = (Pair*)array_grow(t->pair, &t->pair_room, t->pair_n + 1, sizeof(Pair));
        Pair* p = &t->pair[t->pair_n];
        memset(p, 0, sizeof *p);
        p->left = left;
        p->right = right;
        t->table[at] = (int)t->pair_n++;
    }
    return t->table[at];
}

// The pair that begins at a symbol has become one more there, or one less.
static void pair_count(Trainer* t, int at, int sign) {
    const Symbol* s = &t->symbol[at];
    int number = pair_find(t, s->id, t->symbol[s->next].id);
    Pair* p = &t->pair[number];
    p->count += sign * t->piece[s->piece].count;
    if (sign < 0) return;
    p->place = (int*)array_grow(p->place, &p->place_room, p->place_n + 1, sizeof(int));
    p->place[p->place_n++] = at;
    if (p->touched) return;
    p->touched = true;
    t->touched = (int*)array_grow(t->touched, &t->touched_room, t->touched_n + 1, sizeof(int));
    t->touched[t->touched_n++] = number;
}

static bool candidate_before(const Trainer* t, Candidate a, Candidate b) {
    if (a.count != b.count) return a.count > b.count;
    const Pair *p = &t->pair[a.pair], *q = &t->pair[b.pair];
    return p->left != q->left ? p->left < q->left : p->right < q->right;
}

static void heap_push(Trainer* t, Candidate c) {
    t->heap = (Candidate*)array_grow(t->heap, &t->heap_room, t->heap_n + 1, sizeof(Candidate));
    size_t at = t->heap_n++;
    for (; at > 0 && candidate_before(t, c, t->heap[(at - 1) / 2]); at = (at - 1) / 2) {
        t->heap[at] = t->heap[(at - 1) / 2];
    }
    t->heap[at] = c;
}

static Candidate heap_pop(Trainer* t) {
    Candidate top = t->heap[0], last = t->heap[--t->heap_n];
    size_t at = 0;
    for (size_t child; (child = 2 * at + 1) < t->heap_n; at = child) {
        bool second = child + 1 < t->heap_n;
        if (second && candidate_before(t, t->heap[child + 1], t->heap[child])) child++;
        if (!candidate_before(t, t->heap[child], last)) break;
        t->heap[at] = t->heap[child];
    }
    t->heap[at] = last;
    return top;
}

// What has gained places goes into the heap with its count; an older entry of it is passed over,
// because its count is not the pair's any more, or the pair is gone by then.
static void touched_push(Trainer* t) {
    for (size_t i = 0; i < t->touched_n; i++) {
        Pair* p = &t->pair[t->touched[i]];
        p->touched = false;
        Candidate c = { p->count, t->touched[i] };
        if (c.count > 0) heap_push(t, c);
    }
    t->touched_n = 0;
}

static int int_compare(const void* a, const void* b) {
    int x = *(const int*)a, y = *(const int*)b;
    return (x > y) - (x < y);
}

// Makes one symbol of every occurrence of a pair, from left to right.
static void pair_join(Trainer* t, int number, int id) {
    Pair p = t->pair[number];
    // Its places are its own from here on: what is added to the pair meanwhile is another list.
    t->pair[number].place = NULL;
    t->pair[number].place_n = t->pair[number].place_room = 0;
    t->pair[number].count = 0;
    bool sorted = true;
    for (size_t i = 1; i < p.place_n; i++) sorted &= p.place[i - 1] <= p.place[i];
    if (!sorted) qsort(p.place, p.place_n, sizeof *p.place, int_compare);
    for (size_t i = 0; i < p.place_n; i++) {
        int at = p.place[i];
        Symbol* a = &t->symbol[at];
        if (a->id != p.left || a->next < 0 || t->symbol[a->next].id != p.right) continue;
        Symbol* b = &t->symbol[a->next];
        if (a->before >= 0) pair_count(t, a->before, -1);
        if (b->next >= 0) pair_count(t, a->next, -1);
        a->id = id;
        b->id = -1;
        a->next = b->next;
        if (a->next >= 0) t->symbol[a->next].before = at;
        if (a->before >= 0) pair_count(t, a->before, 1);
        if (a->next >= 0) pair_count(t, at, 1);
    }
    free(p.place);
    t->pair[number].count = 0;      // neighbours that overlapped, as in "aaa", were counted with it
    touched_push(t);
}

// ---- writing -------------------------------------------------------------------------------

// Adds a token of which the bytes are at the end of v->bytes already; *n counts those.
static int token_add(Tokenizer* v, size_t* n, size_t length) {
    int id = v->vocab++;
    v->start[id] = *n;
    v->length[id] = length;
    *n += length;
    return id;
}

static void spell(FILE* file, const Spelling* spelling, const Tokenizer* v, int id, bool json) {
    for (size_t i = 0; i < v->length[id]; i++) {
        int code = spelling->code[v->bytes[v->start[id] + i]];
        unsigned char utf8[4];
        if (json && (code == '"' || code == '\\')) fputc('\\', file);
        fwrite(utf8, 1, utf8_put(utf8, (uint32_t)code), file);
    }
}

// A file under a temporary name, which finish_file makes its own.
static FILE* start_file(char* path, size_t size, const char* folder, const char* name) {
    int n = snprintf(path, size, "%s/%s.partial", folder, name);
    REQUIRE(n > 0 && (size_t)n < size, "--out is too long");
    FILE* file = fopen(path, "wb");
    REQUIRE(file, "%s: cannot be created: %s", path, strerror(errno));
    return file;
}

static void finish_file(FILE* file, const char* path) {
    char name[4096];
    bool ok = !ferror(file) && fflush(file) == 0 && fsync(fileno(file)) == 0;
    int error = errno;
    ok = fclose(file) == 0 && ok;
    if (!ok) unlink(path);
    REQUIRE(ok, "%s: cannot be written: %s", path, strerror(error));
    snprintf(name, sizeof name, "%.*s", (int)(strlen(path) - strlen(".partial")), path);
    REQUIRE(rename(path, name) == 0, "%s: cannot be renamed to %s: %s", path, name,
            strerror(errno));
}

// ---- main ----------------------------------------------------------------------------------

// The pieces as symbols, and the pairs of these.
static void trainer_start(Trainer* t, const Pieces* pieces, const Tokenizer* v) {
    memset(t, 0, sizeof *t);
    REQUIRE(pieces->bytes_n < INT32_MAX, "%zu bytes of different pieces, expected less than 2 GiB",
            pieces->bytes_n);
    t->piece = pieces->piece;
    t->symbol = (Symbol*)host_alloc(pieces->bytes_n, sizeof(Symbol));
    for (size_t i = 0; i < pieces->count; i++) {
        const Piece* p = &pieces->piece[i];
        for (size_t k = p->start; k < p->start + p->length; k++) {
            Symbol* s = &t->symbol[k];
            s->id = v->byte_id[pieces->bytes[k]];
            s->piece = (int)i;
            s->before = k > p->start ? (int)k - 1 : -1;
            s->next = k + 1 < p->start + p->length ? (int)k + 1 : -1;
        }
    }
    for (size_t k = 0; k < pieces->bytes_n; k++) {
        if (t->symbol[k].next >= 0) pair_count(t, (int)k, 1);
    }
    touched_push(t);
}

static void trainer_end(Trainer* t) {
    for (size_t i = 0; i < t->pair_n; i++) free(t->pair[i].place);
    free(t->pair);
    free(t->symbol);
    free(t->table);
    free(t->heap);
    free(t->touched);
}

// Joins pairs, each a line of the file, until there are `wanted` tokens or no more pairs. No two
// joins make the same text: where bytes end up as one token no join has crossed their ends, so they
// have gone through the same joins as wherever else they did.
static void trainer_run(Trainer* t, Tokenizer* v, size_t bytes_n, int wanted, FILE* joins) {
    Spelling spelling;
    size_t bytes_room = bytes_n;
    spelling_make(&spelling);
    while (v->vocab < wanted && t->heap_n > 0) {
        Candidate c = heap_pop(t);
        const Pair* p = &t->pair[c.pair];
        if (c.count != p->count) {      // it has lost places since
            c.count = p->count;
            if (c.count > 0) heap_push(t, c);
            continue;
        }
        size_t left = v->length[p->left], right = v->length[p->right], n = left + right;
        v->bytes = (unsigned char*)array_grow(v->bytes, &bytes_room, bytes_n + n, 1);
        memcpy(v->bytes + bytes_n, v->bytes + v->start[p->left], left);
        memcpy(v->bytes + bytes_n + left, v->bytes + v->start[p->right], right);
        int id = token_add(v, &bytes_n, n);
        spell(joins, &spelling, v, p->left, false);
        fputc(' ', joins);
        spell(joins, &spelling, v, p->right, false);
        fputc('\n', joins);
        pair_join(t, c.pair, id);
    }
}

static void train(const Pieces* pieces, const char* out, int vocab) {
    static Trainer t;
    static Tokenizer v;
    Spelling spelling;
    char joins_path[4096], ids_path[4096];
    size_t bytes_n = 0;
    memset(&v, 0, sizeof v);
    spelling_make(&spelling);
    v.start = (size_t*)host_alloc((size_t)vocab, sizeof(size_t));
    v.length = (size_t*)host_alloc((size_t)vocab, sizeof(size_t));
    v.bytes = (unsigned char*)host_alloc(256, 1);
    for (int i = 0; i < 256; i++) {
        v.bytes[i] = (unsigned char)spelling.order[i];
        v.byte_id[spelling.order[i]] = token_add(&v, &bytes_n, 1);
    }
    FILE* joins = start_file(joins_path, sizeof joins_path, out, "vocab.bpe");
    fprintf(joins, "#version: 0.2\n");
    trainer_start(&t, pieces, &v);
    trainer_run(&t, &v, bytes_n, vocab - 1, joins);
    trainer_end(&t);
    if (v.vocab < vocab - 1) {
        fclose(joins);
        unlink(joins_path);
        die("the text has pairs for %d tokens, expected %d for --vocab %d\n"
            "give more text, or --vocab %d at most", v.vocab - 256, vocab - 257, vocab,
            v.vocab + 1);
    }
    FILE* ids = start_file(ids_path, sizeof ids_path, out, "encoder.json");
    for (int id = 0; id < v.vocab; id++) {
        fputs(id ? ", \"" : "{\"", ids);
        spell(ids, &spelling, &v, id, true);
        fprintf(ids, "\": %d", id);
    }
    fprintf(ids, ", \"" END_OF_TEXT "\": %d}\n", v.vocab);
    finish_file(joins, joins_path);
    finish_file(ids, ids_path);
    tokenizer_close(&v);
}

int main(int argc, char** argv) {
    static const char USAGE[] = "usage: train_bpe --vocab N --out DIR FILE...";
    static Pieces pieces;
    const char* out = NULL;
    long vocab = 0;
    int files = 0;
    program_name = "train_bpe";
    for (int i = 1; i < argc; i++) {
        const char *flag = argv[i], *value = argv[i + 1];
        if (strncmp(flag, "--", 2) != 0) {
            argv[files++] = argv[i];    // the files stay behind, in order
            continue;
        }
        if (strcmp(flag, "--help") == 0) {
            printf("%s\n", USAGE);
            return 0;
        }
        bool is_vocab = strcmp(flag, "--vocab") == 0;
        REQUIRE(is_vocab || strcmp(flag, "--out") == 0, "no flag %s\n%s", flag, USAGE);
        REQUIRE(value, "%s wants a value\n%s", flag, USAGE);
        i++;
        if (!is_vocab) {
            out = value;
            continue;
        }
        char* end;
        vocab = strtol(value, &end, 10);
        REQUIRE(end != value && *end == 0 && vocab >= 258 && vocab <= 1 << 24,
                "--vocab must be a whole number from 258 (256 bytes, a join, the end of text) to "
                "%d, got '%s'", 1 << 24, value);
    }
    REQUIRE(vocab && out && files, "nothing to do\n%s", USAGE);
    REQUIRE(mkdir(out, 0777) == 0 || errno == EEXIST, "%s: cannot be made: %s", out,
            strerror(errno));
    memset(&pieces, 0, sizeof pieces);
    for (int i = 0; i < files; i++) pieces_add_file(&pieces, argv[i]);
    train(&pieces, out, (int)vocab);
    printf("%s: %ld tokens, of %zu different pieces of text\n", out, vocab, pieces.count);
    free(pieces.bytes);
    free(pieces.piece);
    free(pieces.table);
    return 0;
}
