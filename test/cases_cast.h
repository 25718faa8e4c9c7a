/*
cast: llmc/cast.cuh, bit for bit, against a rounding that is done in double and itself held against
values known by hand; on those and on random bits, with and without a tail.
*/
#pragma once
#include "../llmc/cast.cuh"
#include "test.h"

enum { CAST_FLOATX, CAST_FLOAT, CAST_ROUND, CAST_PACK, CAST_UNPACK, CASTS };

// Bits of a float and of its bf16. A tie goes to the even neighbour.
static const uint32_t CAST_KNOWN[][2] = {
    {0x00000000, 0x0000}, {0x80000000, 0x8000},    // both zeros
    {0x3f800000, 0x3f80}, {0xbf810000, 0xbf81},    // bf16 values stay
    {0x3f808000, 0x3f80}, {0x3f818000, 0x3f82},    // ties
    {0xbf808000, 0xbf80}, {0xbf818000, 0xbf82},
    {0x3f807fff, 0x3f80}, {0x3f808001, 0x3f81},    // one unit beside a tie
    {0x3fffffff, 0x4000},                          // carries into the exponent
    {0x7f7f0000, 0x7f7f}, {0x7f7f7fff, 0x7f7f},    // the largest bf16, and what rounds to it
    {0x7f7f8000, 0x7f80}, {0xff7f8000, 0xff80},    // half a unit more overflows
    {0x7f7fffff, 0x7f80},
    {0x7f800000, 0x7f80}, {0xff800000, 0xff80},    // infinities
    {0x7f800001, 0x7fff}, {0xff800001, 0x7fff},    // NaN, also one without upper bits
    {0x7fc00000, 0x7fff}, {0xffffffff, 0x7fff},
    {0x00000001, 0x0000}, {0x80000001, 0x8000},    // denormals: the smallest float,
    {0x00008000, 0x0000}, {0x00008001, 0x0001},    // half of the smallest bf16, a little more,
    {0x00018000, 0x0002}, {0x007fffff, 0x0080},    // a tie, and up to the smallest normal
};

enum { CAST_KNOWN_COUNT = sizeof CAST_KNOWN / sizeof CAST_KNOWN[0] };

static uint32_t test_cast_bits(size_t i) {
    if (i < CAST_KNOWN_COUNT) return CAST_KNOWN[i][0];
    return (uint32_t)test_random(1, i);    // of all exponents; one in 256 is infinite or NaN
}

// The bits of a float, rounded to bf16: eight significant bits, but none below 2^-133.
static uint32_t test_cast_round(uint32_t bits) {
    float x, y;
    int exponent;
    memcpy(&x, &bits, 4);
    if (x != x) return 0x7fff0000;
    if (isinf(x)) return bits;
    frexp(x, &exponent);
    int shift = 8 - exponent < 133 ? 8 - exponent : 133;
    y = (float)ldexp(nearbyint(ldexp(x, shift)), -shift);    // to nearest even; 2^128 is infinite
    memcpy(&bits, &y, 4);
    return bits;
}

// Everything is read and written as bytes; the eight elements behind the last must stay.
static void test_cast_case(int cast, size_t n, bool alias) {
    const char* names[] = {"cast_to_floatX", "cast_to_float", "cast_round_bf16", "pack_bf16",
                           "unpack_bf16"};
    bool half_in = cast == CAST_UNPACK || (cast == CAST_FLOAT && FLOATX_IS_BF16);
    bool half_out = cast == CAST_PACK || (cast == CAST_FLOATX && FLOATX_IS_BF16);
    bool rounds = half_out || cast == CAST_ROUND;
    size_t in_size = half_in ? 2 : 4, out_size = half_out ? 2 : 4, behind = 8;
    char *in = (char*)test_calloc(n + behind, in_size);
    char *want = (char*)test_calloc(n + behind, out_size);
    char *got = (char*)test_calloc(n + behind, out_size);
    memset(want, 0xa5, (n + behind) * out_size);
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = test_cast_bits(i);
        if (half_in) bits &= 0xffff0000;
        memcpy(in + i * in_size, (char*)&bits + 4 - in_size, in_size);    // bf16: the upper half
        if (rounds) bits = test_cast_round(bits);
        memcpy(want + i * out_size, (char*)&bits + 4 - out_size, out_size);
    }
    void *in_d = test_device_float(n + behind), *out_d = test_device_float(n + behind);
    if (alias) cudaFree(out_d), out_d = in_d;
    CUDA_CHECK(cudaMemcpy(out_d, want, (n + behind) * out_size, cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemset(out_d, 0x5a, n * out_size));
    CUDA_CHECK(cudaMemcpy(in_d, in, n * in_size, cudaMemcpyHostToDevice));
    if (cast == CAST_FLOATX) cast_to_floatX((floatX*)out_d, (float*)in_d, n, 0);
    else if (cast == CAST_FLOAT) cast_to_float((float*)out_d, (floatX*)in_d, n, 0);
    else if (cast == CAST_ROUND) cast_round_bf16((float*)out_d, (float*)in_d, n, 0);
    else if (cast == CAST_PACK) pack_bf16((bf16*)out_d, (float*)in_d, n, 0);
    else unpack_bf16((float*)out_d, (bf16*)in_d, n, 0);
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaMemcpy(got, out_d, (n + behind) * out_size, cudaMemcpyDeviceToHost));
    char name[96];
    snprintf(name, sizeof name, "%s n=%zu%s", names[cast], n, alias ? " in place" : "");
    test_same_bits(name, got, want, (n + behind) * out_size);
    free(in), free(want), free(got);
    cudaFree(in_d);
    if (!alias) cudaFree(out_d);
}

static void test_cast(void) {
    bool known = true;
    for (size_t i = 0; i < CAST_KNOWN_COUNT; i++)
        known &= test_cast_round(CAST_KNOWN[i][0]) == CAST_KNOWN[i][1] << 16;
    test_true("the rounding in double knows ties, the limit and denormals", known);
    const size_t sizes[] = {1, 7, 8, 9, 33, 2048, 2055, 70001};    // a thread's 8, a block's 2048
    for (int cast = 0; cast < CASTS; cast++) {
        for (int i = 0; i < 8; i++) test_cast_case(cast, sizes[i], false);
    }
    for (int i = 0; i < 8; i++) test_cast_case(CAST_ROUND, sizes[i], true);
}
