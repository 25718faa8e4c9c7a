/*
From a row of logits to a token.

    p_i   = exp((z_i - max z) / temperature) / sum     over the top_k largest z; ties: the lower id
    token = the first at which the running sum of p exceeds u in (0, 1)
            in falling order of z, or in the order of the ids where all may be drawn

u depends on (seed, index) alone, so a sample can be drawn again. Temperature 0 is the largest z.

test        test/test_services.c: sampler
*/
#pragma once
#include "common.h"
#include "rng.h"

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
