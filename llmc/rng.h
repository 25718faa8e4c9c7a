/*
Random numbers as a pure function of (seed, stream, index).

Philox4x32 with 10 rounds: the counter is (index, stream), the key the seed. Chosen over a generator
with a state because element i of a tensor is then the same whichever thread, rank or order makes
it, and a run that resumes has nothing to restore; chosen over a plain 64-bit hash because it has
published test vectors and passes BigCrush. Twenty multiplications per number, once in a run.

    rng_uniform   (u + 1/2) / 2^32, u the first word: in (0, 1), never 0 or 1, mean exactly 1/2
    rng_normal    sqrt(-2 ln a) cos(2 pi b), a and b from the first two words (Box and Muller)

rng_uniform is exact on every machine. rng_normal goes through log and cos, which may differ in the
last bit of a double from library to library; rounded to float that shows in about one of 10^8
numbers.

test        test/test_services.c: rng
source      Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"
*/
#pragma once
#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define RNG_FUNCTION static inline __host__ __device__
#else
#define RNG_FUNCTION static inline
#endif

// Users of random numbers draw from streams of their own. A tensor's stream is RNG_INIT_STREAM +
// its number.
enum { RNG_SAMPLE_STREAM = 1, RNG_INIT_STREAM = 0x1000 };

RNG_FUNCTION void rng_philox(uint32_t out[4], const uint32_t counter[4], const uint32_t key[2]) {
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xd2511f53u * c0, b = (uint64_t)0xcd9e8d57u * c2;
        c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)b;
        c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)a;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

RNG_FUNCTION void rng_words(uint32_t out[4], uint64_t seed, uint32_t stream, uint64_t index) {
    uint32_t counter[4] = { (uint32_t)index, (uint32_t)(index >> 32), stream, 0 };
    uint32_t key[2] = { (uint32_t)seed, (uint32_t)(seed >> 32) };
    rng_philox(out, counter, key);
}

RNG_FUNCTION double rng_uniform(uint64_t seed, uint32_t stream, uint64_t index) {
    uint32_t w[4];
    rng_words(w, seed, stream, index);
    return ((double)w[0] + 0.5) / 4294967296.0;
}

RNG_FUNCTION double rng_normal(uint64_t seed, uint32_t stream, uint64_t index) {
    uint32_t w[4];
    rng_words(w, seed, stream, index);
    double a = ((double)w[0] + 0.5) / 4294967296.0, b = ((double)w[1] + 0.5) / 4294967296.0;
    return sqrt(-2.0 * log(a)) * cos(6.283185307179586 * b);
}
