/*
From a row of logits to a token, and from tokens to text.

    p_i   = exp((z_i - max z) / temperature) / sum     over the top_k largest z; ties: the lower id
    token = the first at which the running sum of p exceeds u in (0, 1)
            in falling order of z, or in the order of the ids where all may be drawn

u depends on (seed, index) alone, so a sample can be drawn again. Temperature 0 is the largest z.

Text is known for the byte-level vocabulary: ids 0 to 255 are bytes, 256 is the end of text that
opens each document, and the rest of the 320 columns is padding (the smallest multiple of 64 that
holds 257). Tokens of other vocabularies are shown as their ids.

test        test/test_services.c: sampler
*/
#pragma once
#include "common.h"
#include "rng.h"

enum { BYTE_END = 256, BYTE_VOCAB = 320 };

// ---- logits to a token ---------------------------------------------------------------------

static inline int sampler_pick(const float* logits, int V, float temperature, int top_k,
                               uint64_t seed, uint64_t index) {
    for (int i = 0; i < V; i++) {
        REQUIRE(logits[i] < INFINITY, "sample: logit %d is %f; nothing can be drawn from that", i,
                logits[i]);
    }
    int k = temperature == 0 ? 1 : top_k > 0 && top_k < V ? top_k : V;
    // best[] holds ids with falling logits; an equal logit of a later id goes behind.
    int* best = (int*)host_alloc((size_t)k + 1, sizeof(int));
    int count = 0;
    for (int i = 0; i < V && k < V; i++) {
        if (count == k && !(logits[i] > logits[best[k - 1]])) continue;
        int at = count;
        for (; at > 0 && logits[i] > logits[best[at - 1]]; at--) best[at] = best[at - 1];
        best[at] = i;
        if (count < k) count++;
    }
    // All may be drawn: their order does not matter, so the row is not sorted.
    for (; count < k; count++) best[count] = count;
    double top = -INFINITY, sum = 0;
    for (int i = 0; i < k; i++) top = logits[best[i]] > top ? logits[best[i]] : top;
    double* p = (double*)host_alloc((size_t)k, sizeof(double));
    for (int i = 0; i < k; i++) {
        p[i] = k == 1 ? 1 : exp((logits[best[i]] - top) / temperature);
        sum += p[i];
    }
    REQUIRE(sum > 0, "sample: all %d logits are -inf; nothing can be drawn from that", V);
    double u = rng_uniform(seed, RNG_SAMPLE_STREAM, index) * sum, running = 0;
    int chosen = -1;
    for (int i = 0; i < k && !(running > u); i++) {
        running += p[i];
        if (p[i] > 0) chosen = best[i];
    }
    free(best);
    free(p);
    return chosen;
}

// ---- tokens to text ------------------------------------------------------------------------

static inline size_t sampler_append(char* out, size_t size, size_t at, const char* piece,
                                    size_t n) {
    if (at + n >= size) n = size > at + 1 ? size - at - 1 : 0;
    memcpy(out + at, piece, n);
    return at + n;
}

// Text of the tokens, ended by 0; returns its length. Control characters other than newline and tab
// are spelled out, so that a sample cannot steer the terminal; what is not UTF-8 becomes U+FFFD.
static inline size_t sampler_text(char* out, size_t size, const int* tokens, int n, int vocab) {
    size_t at = 0;
    char piece[32];
    for (int i = 0; i < n;) {
        if (vocab > BYTE_VOCAB || tokens[i] >= BYTE_END) {
            if (vocab > BYTE_VOCAB) snprintf(piece, sizeof piece, i ? " %d" : "%d", tokens[i]);
            else if (tokens[i] == BYTE_END) snprintf(piece, sizeof piece, "<end>");
            else snprintf(piece, sizeof piece, "<%d>", tokens[i]);
            at = sampler_append(out, size, at, piece, strlen(piece));
            i++;
            continue;
        }
        unsigned char bytes[4];
        int run = 0;
        while (run < 4 && i + run < n && tokens[i + run] < 256) {
            bytes[run] = (unsigned char)tokens[i + run];
            run++;
        }
        int length = utf8_length(bytes, (size_t)run);
        if (length == 0) at = sampler_append(out, size, at, "\xef\xbf\xbd", 3);
        else if ((bytes[0] < 0x20 && bytes[0] != '\n' && bytes[0] != '\t') || bytes[0] == 0x7f) {
            snprintf(piece, sizeof piece, "\\x%02x", bytes[0]);
            at = sampler_append(out, size, at, piece, 4);
        } else at = sampler_append(out, size, at, (const char*)bytes, (size_t)length);
        i += length ? length : 1;
    }
    out[at] = 0;
    return at;
}
