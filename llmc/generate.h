/*
Text from a model: the loop that draws token after token.

    settings_load(&cfg, &saved, argc, argv);        // llmc/saved.h: what --load says of its model
    text_open(&codec, cfg.tokenizer, cfg.vocab, cfg.end_of_text, saved.tokenizer_hash, cfg.load);
    int* prompt = text_encode(&codec, cfg.prompt, strlen(cfg.prompt), &spec.prompt_count);
    generate(NULL, &spec, &codec, logits_of, &model, stdout);

A sample is a document: it begins with the end-of-text token, then the prompt. Where the model ends
a document, another begins that sees nothing of the one before.

test        test/test_services.c: generate; test/generate.sh
*/
#pragma once
#include "sampler.h"
#include "saved.h"
#include "text.h"

// ---- drawing -------------------------------------------------------------------------------

typedef struct GenerateSpec {
    const int* prompt;          // as text_encode makes it
    int prompt_count;
    int tokens;                 // to be drawn
    int T, V;                   // tokens the model sees at most, columns of its logits
    float temperature;
    int top_k;
    uint64_t seed;
} GenerateSpec;

// The logits behind the last of `count` ids, V of them, which may be written over. The model has
// been shown the first `known` of the same ids before: their keys and values are in its cache.
typedef float* (*LogitsOf)(void* context, const int* ids, int count, int known);

// Draws spec->tokens ids into `drawn` (NULL: they are not wanted); the text of prompt and ids, and
// a newline, goes to `out` (NULL: nowhere) as they come. Each token costs the model one position,
// except where T are full: then the second half of them is read once more.
static inline void generate(int* drawn, const GenerateSpec* spec, const TextCodec* codec,
                            LogitsOf logits_of, void* context, FILE* out) {
    TextWriter writer = { out, codec, { 0 }, 0, false };
    int T = spec->T, skipped = spec->prompt_count > T ? spec->prompt_count - T : 0;
    int count = spec->prompt_count - skipped, known = 0;
    int* ids = (int*)host_alloc((size_t)T, sizeof(int));
    memcpy(ids, spec->prompt + skipped, (size_t)count * sizeof(int));
    if (skipped)
        fprintf(stderr, "%s: the prompt has %d tokens, the model sees %d: it does not see the "
                "first %d\n", program_name, spec->prompt_count, T, skipped);
    for (int i = 1; i < spec->prompt_count && out; i++) text_put(&writer, spec->prompt[i]);
    for (int i = 0; i < spec->tokens; i++) {
        float* z = logits_of(context, ids, count, known);
        text_mask(codec, z, spec->V);
        // Of the token's place in the sample, so that it depends on nothing else.
        int id = sampler_pick(z, spec->V, spec->temperature, spec->top_k, spec->seed,
                              (uint64_t)i + 1);
        known = count;
        if (id == codec->end_of_text) {
            count = known = 0;
        } else if (count == T) {
            count = T / 2;
            known = 0;
            memmove(ids, ids + T - count, (size_t)count * sizeof(int));
        }
        ids[count++] = id;
        if (drawn) drawn[i] = id;
        if (!out) continue;
        text_put(&writer, id);
        fflush(out);
    }
    if (out) text_flush(&writer), fputc('\n', out);
    free(ids);
}
