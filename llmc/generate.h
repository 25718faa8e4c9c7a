/*
Text from a model: its own settings out of its file, and the loop that draws token after token.

    settings_parse(&cfg, argc, argv);
    settings_load(&cfg, &saved, argc, argv);            // what --load says about its model
    text_open(&codec, cfg.tokenizer, cfg.vocab, cfg.end_of_text, saved.tokenizer_hash, cfg.load);
    int* prompt = text_encode(&codec, cfg.prompt, strlen(cfg.prompt), &spec.prompt_count);
    generate(NULL, &spec, &codec, logits_of, &model, stdout);

A file of weights holds the flags of its run (metadata "flags"), so that --load FILE needs no
others. Those that describe the model and what its tokens mean are taken from there; a recipe and
the command line win over them. Flags of the run (data, files, optimizer, ranks) are never taken.

A sample is a document: it begins with the end-of-text token, then the prompt. Where the model ends
a document, another begins that sees nothing of the one before.

test        test/test_services.c: generate; test/generate.sh
*/
#pragma once
#include "flags.h"
#include "safetensors.h"
#include "sampler.h"
#include "text.h"

#ifndef GIT_COMMIT
#define GIT_COMMIT "unknown"
#endif

// ---- what a file says about its model ------------------------------------------------------

typedef struct ModelFile {
    int64_t step;               // updates that were made
    char commit[64];            // of the program that saved it
    char tokenizer_hash[17];    // "": it knows of no tokenizer
} ModelFile;

// Whether a flag belongs to the model: its groups, and what a token and a step are to it.
static inline bool flag_of_model(const Flag* f) {
    static const char* const GROUPS[] = { "model", "masks" };
    static const char* const MORE[] = { "seq_len", "steps", "extension_steps", "end_of_text",
                                        "tokenizer" };
    const Flag* group = f;
    while (group->kind != FLAG_GROUP) group--;
    for (size_t i = 0; i < sizeof GROUPS / sizeof *GROUPS; i++)
        if (strcmp(group->name, GROUPS[i]) == 0) return true;
    for (size_t i = 0; i < sizeof MORE / sizeof *MORE; i++)
        if (strcmp(f->name, MORE[i]) == 0) return true;
    return false;
}

// One member of the object "flags". False: the reader's error says what is wrong.
static inline bool settings_read_flag(Settings* s, bool* seen, JsonReader* j, const char* path,
                                      const char* commit) {
    char where[TEXT_SIZE + 160], value[TEXT_SIZE + 1], spelling[64];
    unsigned char *name, *text;
    size_t name_n, n, at;
    if (!json_read_string(j, &name, &name_n)) return false;
    const Flag* f = NULL;
    for (int i = 0; i < FLAG_COUNT && !f; i++)
        if (FLAG_TABLE[i].kind != FLAG_GROUP && strlen(FLAG_TABLE[i].name) == name_n &&
            memcmp(FLAG_TABLE[i].name, name, name_n) == 0) f = &FLAG_TABLE[i];
    REQUIRE(f, "%s: there is no flag '%.*s', with which it was saved\nit is of another version of "
            "this program: commit %s, here %s", path, (int)(name_n < 64 ? name_n : 64), name,
            commit, GIT_COMMIT);
    REQUIRE(!seen[f - FLAG_TABLE], "%s: the flag '%s' is in it twice", path, f->name);
    seen[f - FLAG_TABLE] = true;
    if (!json_read_byte(j, ':', "':'")) return false;
    json_read_space(j);
    at = j->at;
    bool wants_text = f->kind == FLAG_TEXT || f->kind == FLAG_CHOICE;
    if (wants_text) {
        if (!json_read_string(j, &text, &n)) return false;
    } else {
        if (at == j->n || !json_read_number(j)) return json_fail(j, at, "a number");
        text = j->text + at;
        n = j->at - at;
    }
    if (n >= sizeof value || memchr(text, 0, n)) return json_fail(j, at, "a shorter value");
    memcpy(value, text, n);
    value[n] = 0;
    snprintf(where, sizeof where, "%s: %s", path, flag_spelling(spelling, sizeof spelling, f));
    if (flag_of_model(f)) flag_set(s, f, where, value);
    return true;
}

// Sets in s what the text of the metadata "flags" says of the model.
static inline void settings_read_json(Settings* s, const char* flags, const char* path,
                                      const char* commit) {
    bool seen[FLAG_COUNT] = { false };
    JsonReader j = { NULL, strlen(flags), 0, "" };
    j.text = (unsigned char*)host_alloc(j.n + 1, 1);
    memcpy(j.text, flags, j.n);
    bool ok = json_read_byte(&j, '{', "'{' and flags");
    json_read_space(&j);
    for (bool more = ok && !(j.at < j.n && j.text[j.at] == '}'); more;) {
        ok = settings_read_flag(s, seen, &j, path, commit);
        json_read_space(&j);
        more = ok && j.at < j.n && j.text[j.at] == ',';
        j.at += more;
    }
    ok = ok && json_read_byte(&j, '}', "',' or '}'");
    json_read_space(&j);
    if (ok && j.at < j.n) ok = json_fail(&j, j.at, "the end");
    REQUIRE(ok, "%s: its flags, byte %zu: %s", path, j.at, j.error);
    free(j.text);
}

// After settings_parse. With --load the model's flags are those of the file, where neither recipe
// nor command line has them. A file without flags will do for training, where they are all given.
static inline void settings_load(Settings* s, ModelFile* saved, int argc, char** argv) {
    memset(saved, 0, sizeof *saved);
    if (!*s->load) return;
    bool sample_only = !*s->train;
    char path[TEXT_SIZE];
    snprintf(path, sizeof path, "%s", s->load);
    SafeFile file;
    safetensors_open(&file, path);
    const char* flags = safetensors_metadata(&file, "flags");
    const char* step = safetensors_metadata(&file, "step");
    const char* commit = safetensors_metadata(&file, "commit");
    const char* hash = safetensors_metadata(&file, "tokenizer_hash");
    snprintf(saved->commit, sizeof saved->commit, "%s", commit ? commit : "unknown");
    snprintf(saved->tokenizer_hash, sizeof saved->tokenizer_hash, "%s", hash ? hash : "");
    REQUIRE(flags || !sample_only, "%s: it does not say what its model is: no \"flags\" among its "
            "%d metadata\nname a file that this program has saved", path, file.pairs);
    if (step) {
        char* end;
        saved->step = strtoll(step, &end, 10);
        REQUIRE(*step >= '0' && *step <= '9' && *end == 0,
                "%s: its \"step\" is '%.40s', expected a number", path, step);
    }
    if (flags) {
        settings_read_json(s, flags, path, saved->commit);
        settings_parse_over(s, argc, argv);
    }
    if (sample_only) {      // one sequence at a time is all that it takes
        s->micro_batch = 1;
        s->batch_tokens = s->seq_len;
    }
    safetensors_close(&file);
}

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
