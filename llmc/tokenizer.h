/*
Bytes to the ids of a GPT-2 (byte-level BPE) vocabulary, and back.

    Tokenizer t;
    TokenizerWork w;                          // one per thread
    tokenizer_open(&t, "data/gpt2");          // or "gpt2.tiktoken": see llmc/vocabulary.h
    tokenizer_work_open(&w, &t);
    n = tokenizer_encode(&w, ids, room, text, bytes);        // room >= bytes
    n = tokenizer_decode(&t, text, room, ids, n);

The text is cut into pieces (llmc/pretokenize.h). Within a piece, which starts as single bytes, the
neighbours of the lowest rank are joined, the leftmost first, until no neighbours have a rank. Any
bytes have ids, and these give the same bytes back. The text `<|endoftext|>` has none of its own:
id end_of_text stands only where the caller puts it.

Cost: per piece of up to 15 bytes a look-up in the thread's cache of a megabyte; what is not there,
or longer, is merged: O(n^2) up to 64 bytes, then O(n log n) with a heap and 32 bytes of memory per
byte of the piece. A Tokenizer does not change once it is open and may be shared by threads.

test        test/test_tokenizer.c: tokenizer, fuzz
*/
#pragma once
#include "pretokenize.h"
#include "vocabulary.h"

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
