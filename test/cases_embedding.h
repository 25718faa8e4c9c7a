/*
embedding: llmc/embedding.cuh against oracle.h.

Allowed: the gather copies, so nothing. Backward adds n values in fp32; it is tested with whole
numbers, whose sums are exact in any order, and once with normals, where a sum of n values is off by
at most the number of additions in the longest chain, 64 + n/64 + 1, times 2^-24 of the sum of their
magnitudes.
*/
#pragma once
#include "../llmc/embedding.cuh"
#include "oracle.h"
#include "test.h"

static void test_embedding_forward(int N, int C, int V) {
    size_t n = (size_t)N * C, table = (size_t)V * C;
    char what[96];
    double *wte = test_doubles(table), *out = test_doubles(n + C);
    int* tokens = (int*)test_calloc(N, sizeof(int));
    test_fill_normal(wte, table, 1, 1.0);
    test_fill_tokens(tokens, N, 2, V);
    tokens[0] = V - 1, tokens[N / 2] = 0;
    for (int c = 0; c < C; c++) out[n + c] = 7;            // a row behind the last, to stay
    floatX *wte_d = test_upload(wte, table), *out_d = test_upload(out, n + C);
    int* tokens_d = test_upload_int(tokens, N);
    embedding_forward(out_d, wte_d, tokens_d, N, C, 0);
    oracle_embedding_forward(out, wte, tokens, N, C);
    snprintf(what, sizeof what, "embedding_forward N=%d C=%d V=%d", N, C, V);
    test_compare_device(what, out_d, out, n + C, 0, 0);
    free(wte), free(out), free(tokens);
    cudaFree(wte_d), cudaFree(out_d), cudaFree(tokens_d);
}

// The lists say what the kernels rely on: a segment has at most EMBEDDING_SEGMENT positions, a row
// of dwte one writer, which is a segment or a long list, and a row of `partial` one writer and one
// reader.
static void test_embedding_lists(const EmbeddingIndex* index, const int* tokens, int N, int V) {
    EmbeddingLists l = embedding_lists(index->host, index->capacity);
    int *writers = (int*)test_calloc(V, sizeof(int)), wrong = 0, next_partial = 0;
    for (int s = 0; s < *l.n_segments; s++) {
        int begin = l.segment_begin[s], end = l.segment_begin[s + 1], row = l.segment_row[s];
        wrong += end <= begin || end - begin > EMBEDDING_SEGMENT;
        wrong += row < 0 ? ~row != next_partial++ : tokens[l.positions[begin]] != row;
        if (row >= 0) writers[row]++;
        for (int p = begin + 1; p < end; p++) {
            wrong += l.positions[p] <= l.positions[p - 1];
            wrong += tokens[l.positions[p]] != tokens[l.positions[begin]];
        }
    }
    for (int k = 0; k < *l.n_long; k++) {
        wrong += l.long_begin[k + 1] - l.long_begin[k] < 2;
        writers[l.long_token[k]]++;
    }
    wrong += l.segment_begin[*l.n_segments] != N || l.segment_begin[0] != 0;
    wrong += l.long_begin[*l.n_long] != next_partial || l.long_begin[0] != 0;
    for (int v = 0; v < V; v++) wrong += writers[v] > 1;
    for (int n = 0; n < N; n++) wrong += writers[tokens[n]] != 1;
    test_check("embedding_index_build: lists with a broken rule", wrong, 0);
    free(writers);
}

// One batch through a given index; dwte starts at whole numbers, which have to be added to.
static void test_embedding_batch(const char* name, EmbeddingIndex* index, const int* tokens, int N,
                                 int C, int V, bool whole) {
    size_t n = (size_t)N * C, table = (size_t)V * C;
    char what[128];
    double *dout = test_doubles(n), *dwte = test_doubles(table);
    int* count = (int*)test_calloc(V, sizeof(int));
    test_fill_whole(dout, n, 3, -9, 9);
    if (!whole) test_fill_normal(dout, n, 4, 1.0);
    test_fill_whole(dwte, table, 5, -9, 9);
    floatX* dout_d = test_upload(dout, n);
    float *dwte_d = test_upload_float(dwte, table), *again_d = test_upload_float(dwte, table);

    int most = 0;
    double largest = 9;
    for (int i = 0; i < N; i++) {
        count[tokens[i]]++;
        if (count[tokens[i]] > most) most = count[tokens[i]];
    }
    for (size_t i = 0; i < n; i++) if (fabs(dout[i]) > largest) largest = fabs(dout[i]);
    double tol = whole ? 0 : (64 + most / 64 + 1) * 0x1p-24 * (most + 1) * largest;

    embedding_index_build(index, tokens, N, V);
    test_embedding_lists(index, tokens, N, V);
    embedding_index_upload(index, 0);
    embedding_backward(dwte_d, dout_d, index, C, 0);
    embedding_backward(again_d, dout_d, index, C, 0);
    oracle_embedding_backward(dwte, dout, tokens, N, C);
    snprintf(what, sizeof what, "embedding_backward %s N=%d C=%d V=%d", name, N, C, V);
    test_compare_device_float(what, dwte_d, dwte, table, tol, 0);
    float *first = test_download_float(dwte_d, table), *again = test_download_float(again_d, table);
    test_same_bits("embedding_backward twice", first, again, table * sizeof(float));
    free(first), free(again), free(dout), free(dwte), free(count);
    cudaFree(dout_d), cudaFree(dwte_d), cudaFree(again_d);
}

// Two batches one after the other through one index, with no wait between them: the second build
// must not change the lists that the first upload has still to read.
static void test_embedding_reuse(void) {
    const int N = 200, C = 8, V = 10;
    double *dout = test_doubles(N * C), *dwte = test_doubles(V * C);
    int tokens[2][200];
    test_fill_whole(dout, N * C, 9, -9, 9);
    for (int b = 0; b < 2; b++) {
        for (int n = 0; n < N; n++) tokens[b][n] = b ? n % 7 : 9 - n % 3;
        oracle_embedding_backward(dwte, dout, tokens[b], N, C);
    }
    floatX* dout_d = test_upload(dout, N * C);
    float* dwte_d = test_device_float(V * C);
    CUDA_CHECK(cudaMemset(dwte_d, 0, V * C * sizeof(float)));
    EmbeddingIndex index;
    embedding_index_init(&index, N, V, C);
    for (int b = 0; b < 2; b++) {
        embedding_index_build(&index, tokens[b], N, V);
        embedding_index_upload(&index, 0);
        embedding_backward(dwte_d, dout_d, &index, C, 0);
    }
    test_compare_device_float("embedding_backward of two batches", dwte_d, dwte, V * C, 0, 0);
    embedding_index_free(&index);
    free(dout), free(dwte);
    cudaFree(dout_d), cudaFree(dwte_d);
}

// Counts on both sides of a segment's end, tokens at both ends of the table, gaps between them.
static void test_embedding_segments(void) {
    const int V = 40, C = 24;
    const int counts[6] = {1, 64, 65, 128, 129, 700}, which[6] = {39, 0, 7, 8, 20, 38};
    int N = 0, tokens[1087];
    for (int k = 0; k < 6; k++) for (int i = 0; i < counts[k]; i++) tokens[N++] = which[k];
    for (int i = N - 1; i > 0; i--) {                      // shuffled
        int j = (int)(test_random(6, i) % (uint64_t)(i + 1)), t = tokens[i];
        tokens[i] = tokens[j], tokens[j] = t;
    }
    EmbeddingIndex index;
    embedding_index_init(&index, N, V, C);
    test_embedding_batch("segments", &index, tokens, N, C, V, true);
    test_embedding_batch("segments", &index, tokens, N, C, V, false);
    for (int i = 0; i < N; i++) tokens[i] = 13;
    test_embedding_batch("one token", &index, tokens, N, C, V, true);
    test_embedding_batch("a shorter batch", &index, tokens, 5, C, V, true);
    for (int i = 0; i < N; i++) tokens[i] = i % 2 ? 0 : V - 1;
    test_embedding_batch("two tokens", &index, tokens, N, C, V, true);
    embedding_index_free(&index);
}

static void test_embedding_random(int N, int C, int V) {
    int* tokens = (int*)test_calloc(N, sizeof(int));
    EmbeddingIndex index;
    embedding_index_init(&index, N, V, C);
    test_fill_tokens(tokens, N, 7, V);
    test_embedding_batch("random", &index, tokens, N, C, V, true);
    test_fill_tokens(tokens, N, 8, V);
    test_embedding_batch("the next batch", &index, tokens, N, C, V, false);
    embedding_index_free(&index);
    free(tokens);
}

static void test_embedding(void) {
    test_embedding_forward(1, 8, 1);
    test_embedding_forward(100, 96, 50);
    test_embedding_forward(300, 768, 1000);
    test_embedding_segments();
    test_embedding_reuse();
    test_embedding_random(1, 8, 1);
    test_embedding_random(63, 64, 50304);
    test_embedding_random(2048, 96, 128);
    test_embedding_random(200, 768, 500);
}
