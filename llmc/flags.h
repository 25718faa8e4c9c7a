/*
Settings: every flag exactly once.

The struct Settings, the parser of the command line and of recipe files, --help, the table printed
at the start of a run and its line in the log are all made from FLAGS below, so they cannot
disagree.

A flag is `--name value` or `--name=value`. A recipe file (`--recipe unet`, `--recipe my/own.cfg`)
has lines `name = value` with the same names without the dashes; `#` opens a comment. What stands on
the command line wins over the recipe, wherever --recipe stands. Nothing is corrected silently: an
unknown or repeated name, a missing value, letters after a number, NaN, a value out of range each
end the program with one message.

To add a setting: one row in FLAGS, and the recipes that want another value than its default.

test        test/test_services.c: flags
*/
#pragma once
#include "common.h"

#include <dirent.h>
#include <unistd.h>

// ---- the words of the flags that choose ----------------------------------------------------

// W(constant, word): the enum and the words the parser knows come from the same list.
#define OPTIMIZER_WORDS(W)  W(FLAG_OPTIMIZER_MUON, "muon") W(FLAG_OPTIMIZER_ADAMW, "adamw")
#define BATCHING_WORDS(W) \
    W(FLAG_BATCHING_STREAM, "stream") W(FLAG_BATCHING_STRIDED, "strided") \
    W(FLAG_BATCHING_CONTIGUOUS, "contiguous") \
    W(FLAG_BATCHING_START_ALIGNED, "start-aligned") W(FLAG_BATCHING_DOCUMENTS, "documents")
#define GRAD_REDUCE_WORDS(W) W(FLAG_GRAD_REDUCE_WEIGHTS, "weights") W(FLAG_GRAD_REDUCE_FP32, "fp32")
#define HEAD_WORDS(W)       W(FLAG_HEAD_TIED, "tied") W(FLAG_HEAD_UNTIED, "untied")
#define INIT_EMBED_WORDS(W) W(FLAG_INIT_UNIFORM, "uniform") W(FLAG_INIT_NORMAL, "normal")
#define INIT_HEAD_WORDS(W)  W(FLAG_INIT_HEAD_ZERO, "zero") W(FLAG_INIT_HEAD_UNIFORM, "uniform")
#define QK_ORDER_WORDS(W) \
    W(FLAG_QK_NORM_FIRST, "norm-first") W(FLAG_QK_ROTATE_FIRST, "rotate-first")
#define SOFTCAP_WORDS(W) \
    W(FLAG_SOFTCAP_NONE, "none") W(FLAG_SOFTCAP_TANH, "tanh") W(FLAG_SOFTCAP_SIGMOID, "sigmoid")
#define MUON_SCALE_WORDS(W) \
    W(FLAG_MUON_SCALE_MAX_DIM, "max-dim") W(FLAG_MUON_SCALE_ASPECT, "aspect")
#define MUON_FORM_WORDS(W)  W(FLAG_MUON_FORM_SUM, "sum") W(FLAG_MUON_FORM_LERP, "lerp")
#define WINDOWS_WORDS(W) \
    W(FLAG_WINDOWS_NONE, "none") W(FLAG_WINDOWS_RAMP, "ramp") W(FLAG_WINDOWS_THIRDS, "thirds")
#define WINDOW_BY_WORDS(W)  W(FLAG_WINDOW_BY_BLOCK, "block") W(FLAG_WINDOW_BY_TOKEN, "token")
#define LOSS_WORDS(W)       W(FLAG_LOSS_MEAN, "mean") W(FLAG_LOSS_ROW_SUM, "row-sum")
#define ADAM_EPS_WORDS(W) \
    W(FLAG_ADAM_EPS_PYTORCH, "pytorch") W(FLAG_ADAM_EPS_UNSCALED, "unscaled")
#define SAVE_ERROR_WORDS(W) W(FLAG_SAVE_ERROR_GO, "go") W(FLAG_SAVE_ERROR_STOP, "stop")
#define NONFINITE_WORDS(W) \
    W(FLAG_NONFINITE_STOP, "stop") W(FLAG_NONFINITE_SKIP, "skip") \
    W(FLAG_NONFINITE_ROLLBACK, "rollback")

#define FLAG_CONSTANT(constant, word) constant,
#define FLAG_WORD(constant, word)     "|" word
enum { OPTIMIZER_WORDS(FLAG_CONSTANT) };
enum { BATCHING_WORDS(FLAG_CONSTANT) };
enum { GRAD_REDUCE_WORDS(FLAG_CONSTANT) };
enum { HEAD_WORDS(FLAG_CONSTANT) };
enum { INIT_EMBED_WORDS(FLAG_CONSTANT) };
enum { INIT_HEAD_WORDS(FLAG_CONSTANT) };
enum { QK_ORDER_WORDS(FLAG_CONSTANT) };
enum { SOFTCAP_WORDS(FLAG_CONSTANT) };
enum { MUON_SCALE_WORDS(FLAG_CONSTANT) };
enum { MUON_FORM_WORDS(FLAG_CONSTANT) };
enum { WINDOWS_WORDS(FLAG_CONSTANT) };
enum { WINDOW_BY_WORDS(FLAG_CONSTANT) };
enum { LOSS_WORDS(FLAG_CONSTANT) };
enum { ADAM_EPS_WORDS(FLAG_CONSTANT) };
enum { SAVE_ERROR_WORDS(FLAG_CONSTANT) };
enum { NONFINITE_WORDS(FLAG_CONSTANT) };

// ---- the list ------------------------------------------------------------------------------

// F(kind, name, default, lowest, highest, unit, what it is). The defaults are the recipe `modern`,
// except for --batching; lowest and highest are allowed. A CHOICE has its words in place of lowest.
#define FLAGS(F) \
    F(GROUP, run, 0, 0, 0, "", "the run") \
    F(TEXT, recipe, "", 0, 0, "", \
      "modern, untied, unet, sub3, sub3_20, normuon, or a file of `flag = value` lines") \
    F(INT, steps, 5100, 1, 1e9, "steps", "optimizer steps") \
    F(INT, extension_steps, 0, 0, 1e9, "steps", \
      "how many of them, the last, stand behind the schedules of windows and learning rate") \
    F(INT, batch_tokens, 524288, 1, 1e9, "tokens", \
      "tokens of an optimizer step, over all ranks and micro-steps") \
    F(INT, seq_len, 1024, 1, 1e6, "tokens", "tokens of a sequence (T)") \
    F(INT, micro_batch, 64, 1, 1e6, "seqs", \
      "sequences per rank and micro-step (B); memory, not the result, depends on it") \
    F(INT, seed, 1, 0, 9007199254740991, "", "of the initial parameters and the samples") \
    F(TEXT, load, "", 0, 0, "", \
      "parameters to start from: a safetensors file or a checkpoint; without --train: sample") \
    F(TEXT, out, "run", 0, 0, "", "directory of the run: logs, checkpoints, parameters at the end") \
    F(CHOICE, on_nonfinite, FLAG_NONFINITE_STOP, NONFINITE_WORDS, 0, "", \
      "after a loss, gradient or weight that is not finite, none of which is ever applied: end, " \
      "leave out the step, or go back to the last checkpoint and on behind the step's data") \
    F(SWITCH, dry_run, 0, 0, 1, "", "say what would be done, then stop") \
    F(TEXT, gpu, "", 0, 0, "", \
      "with --dry-run: also the least time of a step on this GPU (h100)") \
    F(TEXT, trace, "", 0, 0, "", \
      "file for what ran when on which stream (Chrome's trace format)") \
    F(INT, trace_steps, 3, 1, 1e6, "steps", "steps in it, from the first on") \
    F(SWITCH, help, 0, 0, 1, "", "show this list") \
    \
    F(GROUP, saving, 0, 0, 0, "", "checkpoints") \
    F(INT, checkpoint_every, 500, 0, 1e9, "steps", \
      "steps between checkpoints; 0: only where a signal stops the run") \
    F(INT, keep, 2, 1, 1e6, "", "how many are kept, the newest") \
    F(INT, keep_every, 0, 0, 1e9, "steps", "those of every so many steps are kept as well; 0: none") \
    F(TEXT, resume, "", 0, 0, "", \
      "auto: go on from the newest valid one in --out, if there is one; or the directory of one") \
    F(CHOICE, on_save_error, FLAG_SAVE_ERROR_GO, SAVE_ERROR_WORDS, 0, "", \
      "where a checkpoint or the log cannot be written training goes on, or stops") \
    \
    F(GROUP, between, 0, 0, 0, "", "ranks") \
    F(INT, ranks, 0, 0, 65536, "ranks", \
      "how many must take part; 0: as many as are started. With --dry-run: to count for") \
    F(INT, zero, 1, 0, 1, "", \
      "1: optimizer state and fp32 master of a matrix live on one rank; 0: on every rank") \
    F(CHOICE, grad_reduce, FLAG_GRAD_REDUCE_WEIGHTS, GRAD_REDUCE_WORDS, 0, "", \
      "gradients are summed over ranks in the precision of the weights, or in fp32") \
    \
    F(GROUP, data, 0, 0, 0, "", "data") \
    F(TEXT, train, "", 0, 0, "", "token shards to train on: a file or a quoted pattern") \
    F(TEXT, val, "", 0, 0, "", "token shards of the validation loss") \
    F(CHOICE, batching, FLAG_BATCHING_STREAM, BATCHING_WORDS, 0, "", \
      "stream: all tokens in order; the others: as the records drew (llmc/dataloader.h)") \
    F(INT, data_ranks, 8, 1, 65536, "ranks", \
      "strided: ranks of the run whose order is followed, on any number of ranks") \
    F(INT, max_document, 2048, 1, 1e6, "tokens", "documents: what is longer is cut") \
    F(INT, end_of_text, -1, -1, 65535, "", \
      "token that opens a document; -1: 50256, or 256 in a vocabulary without it") \
    F(INT, epochs, 1, 0, 1e6, "", \
      "times that training data may be used; 0: as often as the steps need") \
    F(INT, val_every, 125, 1, 1e9, "steps", \
      "steps between validation losses; one is taken before the first step and at the end") \
    F(INT, val_tokens, 10485760, 0, 1e12, "tokens", \
      "predictions in the validation loss; 0: all there are") \
    F(INT, val_seq_len, 0, 0, 1e6, "tokens", \
      "tokens of a sequence in the validation; 0: --seq-len") \
    F(INT, val_batch, 0, 0, 1e6, "seqs", \
      "sequences per rank and forward pass in the validation; 0: --micro-batch") \
    F(INT, sample_every, 0, 0, 1e9, "steps", "steps between samples of text; 0: at the end alone") \
    F(INT, sample_tokens, 0, 0, 1e6, "tokens", \
      "length of a sample; 0: none, not even at the end") \
    F(REAL, sample_temperature, 0.8, 0, 100, "", "of a sample; 0: the likeliest token") \
    F(INT, sample_top_k, 50, 0, 65536, "tokens", \
      "draw a sample from the k likeliest; 0: from all") \
    F(TEXT, prompt, "", 0, 0, "", "text that a sample goes on from") \
    F(TEXT, tokenizer, "", 0, 0, "", "directory of the tokenizer's files") \
    \
    F(GROUP, model, 0, 0, 0, "", "model") \
    F(INT, layers, 12, 1, 1000, "", "layers (L)") \
    F(INT, heads, 6, 1, 1000, "", "attention heads (H)") \
    F(INT, channels, 768, 1, 1e5, "", "channels of the residual stream (C)") \
    F(INT, vocab, 50304, 2, 65536, "", "columns of the logits (V), padding that no token uses included") \
    F(INT, table_rows, 0, 0, 65536, "", \
      "rows of the embedding and value tables: tokens there are; 0: --vocab") \
    F(CHOICE, head, FLAG_HEAD_TIED, HEAD_WORDS, 0, "", "tied: the head is the embedding table") \
    F(CHOICE, init_embed, FLAG_INIT_UNIFORM, INIT_EMBED_WORDS, 0, "", \
      "table: uniform in +-1/sqrt(C), or normal with variance 1") \
    F(CHOICE, init_head, FLAG_INIT_HEAD_ZERO, INIT_HEAD_WORDS, 0, "", \
      "an untied head: zero, or uniform in +-1/sqrt(C)") \
    F(REAL, init_scale, 1, 0, 100, "", \
      "the layers' matrices: uniform in +- this / sqrt(columns)") \
    F(INT, smear, 0, 0, 1, "", \
      "1: each looked-up row takes up part of the one before, learned and gated") \
    F(INT, embed_norm, 0, 0, 1, "", "1: rmsnorm of the looked-up rows") \
    F(INT, x0_mix, 0, 0, 1, "", "1: each layer starts from a x + b x0, learned") \
    F(REAL, init_x0_mix, 1, -100, 100, "", "its first a; b starts at 0") \
    F(INT, value_residual, 0, 0, 1, "", "1: each layer mixes in the values of the first, learned") \
    F(TEXT, value_embeds, "", 0, 0, "", \
      "tables looked up for values, as `layer:table ..`; needs --attn-lambdas") \
    F(INT, attn_lambdas, 0, 0, 1, "", \
      "1: values are a v + b (the value table's row), learned; a v in layers without a table") \
    F(INT, attention_gate, 0, 0, 1, "", "1: each head's output is times a learned gate") \
    F(TEXT, no_layers, "", 0, 0, "", "layers that are left out, as `0 ..`") \
    F(TEXT, no_attention, "", 0, 0, "", "layers that have only an MLP") \
    F(INT, skips, 0, 0, 1, "", \
      "1: the second half of the layers adds outputs of the first, learned") \
    F(TEXT, gated_skips, "", 0, 0, "", \
      "`4>7 ..`: before layer 7 the output of 4 is added, times a learned gate") \
    F(INT, backout, -1, -1, 999, "", \
      "layer of whose output a learned part is taken off before the head; -1: none") \
    F(CHOICE, qk_order, FLAG_QK_ROTATE_FIRST, QK_ORDER_WORDS, 0, "", \
      "of norm and rotation of queries and keys") \
    F(REAL, rotary_base, 10000, 1, 1e12, "", "base of the rotation's frequencies") \
    F(INT, rotary_half, 0, 0, 1, "", \
      "1: frequencies from 1 to 1/base in one half of the pairs, none in the other") \
    F(INT, rotary_round_bf16, 1, 0, 1, "", "1: cosines and sines rounded to bf16") \
    F(REAL, norm_eps, 1.1920929e-07, 0, 1, "", \
      "added to the mean square in every rmsnorm of the stream") \
    F(REAL, qk_norm_eps, 0.0078125, 0, 1, "", "the same for queries and keys") \
    F(REAL, attn_scale, 0, 0, 1000, "", "factor of the scores; 0: 1/sqrt(D)") \
    F(CHOICE, softcap, FLAG_SOFTCAP_NONE, SOFTCAP_WORDS, 0, "", \
      "of logits z: c tanh(z/c), or c sigmoid(4z/c)") \
    F(REAL, softcap_value, 30, 1e-3, 1e6, "", "its c") \
    F(INT, bf16_tables, 0, 0, 1, "", \
      "1: embedding, value tables and gates live in bf16, without an fp32 copy") \
    F(INT, bf16_scalars, 0, 0, 1, "", "1: the learned scalars, too") \
    F(INT, bf16_head, 0, 0, 1, "", "1: an untied head, too") \
    F(INT, fp8_head, 0, 0, 1, "", "1: in training the head's products are of 8-bit numbers") \
    F(REAL, fp8_x_scale, 2, 0, 1e9, "", \
      "factor of the stream on its way to 8 bits; 0: 448/sqrt(C), the largest it can need") \
    F(REAL, fp8_w_scale, 32, 1e-9, 1e9, "", "of the head") \
    F(REAL, fp8_grad_scale, 8192, 1e-9, 1e9, "", \
      "of the gradient of one token's loss with respect to its logits") \
    \
    F(GROUP, masks, 0, 0, 0, "", "what attention sees") \
    F(INT, document_mask, 0, 0, 1, "", "1: nothing before the start of a token's document") \
    F(CHOICE, windows, FLAG_WINDOWS_NONE, WINDOWS_WORDS, 0, "", \
      "limits that grow: evenly with the steps (ramp), or in equal parts of the run (thirds)") \
    F(INT, window_block, 128, 1, 65536, "tokens", "a window is a number of these blocks") \
    F(CHOICE, window_by, FLAG_WINDOW_BY_BLOCK, WINDOW_BY_WORDS, 0, "", \
      "W blocks: the W nearest blocks, one's own included; or the W * window-block tokens before") \
    F(TEXT, long_layers, "", 0, 0, "", "layers with the whole window; the others have half of it") \
    F(INT, window_max, 1728, 1, 1e6, "tokens", "ramp: the window at the end, before rounding up") \
    F(TEXT, window_steps, "3 7 11", 0, 0, "blocks", "thirds: the windows one after another") \
    F(INT, window_extension, 13, 1, 65536, "blocks", "thirds: in the extension steps") \
    F(INT, window_final, 0, 0, 65536, "blocks", \
      "thirds: of the long layers in the last validation; 0: as it is then") \
    F(INT, yarn, 0, 0, 1, "", \
      "1: frequencies and --attn-scale follow the long window as in YaRN") \
    \
    F(GROUP, optimizer, 0, 0, 0, "", "optimizer") \
    F(CHOICE, optimizer, FLAG_OPTIMIZER_MUON, OPTIMIZER_WORDS, 0, "", \
      "muon: the layers' matrices by Muon, the rest by Adam; adamw: all by Adam") \
    F(CHOICE, loss, FLAG_LOSS_MEAN, LOSS_WORDS, 0, "", \
      "what is differentiated: the mean over tokens, or the mean over sequences of their sum") \
    F(REAL, muon_lr, 0.00036, 0, 100, "", "peak learning rate of the layers' matrices") \
    F(CHOICE, muon_scale, FLAG_MUON_SCALE_MAX_DIM, MUON_SCALE_WORDS, 0, "", \
      "times sqrt(max(rows, cols)), or sqrt(max(1, rows/cols))") \
    F(CHOICE, muon_form, FLAG_MUON_FORM_SUM, MUON_FORM_WORDS, 0, "", \
      "momentum m: m = mu m + g, or m = mu m + (1-mu) g") \
    F(REAL, muon_momentum, 0.95, 0, 0.999999, "", "Muon's momentum (mu)") \
    F(REAL, muon_momentum_start, 0.95, 0, 0.999999, "", "momentum of the first step") \
    F(INT, muon_momentum_warmup, 0, 0, 1e9, "steps", "steps from there to the full momentum") \
    F(INT, muon_momentum_cooldown, 0, 0, 1e9, "steps", \
      "last steps, in which it falls back to that of the first") \
    F(INT, ns_steps, 5, 1, 100, "", "Newton-Schulz iterations") \
    F(INT, muon_polar, 0, 0, 1, "", "1: with the coefficients of Polar Express") \
    F(REAL, muon_beta2, 0, 0, 0.999999, "", \
      "NorMuon's decay of each neuron's mean square; 0: plain Muon") \
    F(REAL, cautious_decay, 0, 0, 100, "", \
      "Muon's weight decay where it goes with the step, times its learning rate") \
    F(REAL, embed_lr, 0.0036, 0, 100, "", \
      "peak learning rate of the table (of the tied one, too)") \
    F(REAL, value_lr, 0.6, 0, 100, "", "of the value tables") \
    F(REAL, head_lr, 0.0036, 0, 100, "", "of an untied head") \
    F(REAL, scalar_lr, 0.04, 0, 100, "", "of the learned scalars") \
    F(REAL, adamw_lr, 0.0018, 0, 100, "", "with --optimizer adamw: of everything") \
    F(REAL, adam_beta1, 0.9, 0, 0.999999, "", "Adam's decay of the mean") \
    F(REAL, adam_beta2, 0.95, 0, 0.999999, "", "Adam's decay of the mean square") \
    F(REAL, adam_eps, 1e-08, 0, 1, "", "Adam's eps") \
    F(CHOICE, adam_eps_form, FLAG_ADAM_EPS_PYTORCH, ADAM_EPS_WORDS, 0, "", \
      "it is added to the root of the mean square corrected for its start, or as it stands") \
    F(INT, adam_every, 1, 1, 1e6, "steps", \
      "Adam takes every so many steps one, by the sum of their gradients") \
    F(INT, bf16_state, 0, 0, 1, "", "1: Adam's two means live in bf16") \
    F(REAL, weight_decay, 0, 0, 100, "", "of what Adam updates, times its learning rate") \
    F(REAL, cooldown_frac, 0.28431372549, 0, 1, "", \
      "last part of the run, in which the learning rate falls linearly") \
    F(REAL, final_lr_frac, 0, 0, 1, "", "the learning rate it falls to, as a part of the peak")

// ---- struct Settings -----------------------------------------------------------------------

#define TEXT_SIZE 1024

#define FLAG_MEMBER_GROUP(name)
#define FLAG_MEMBER_INT(name)    int64_t name;
#define FLAG_MEMBER_REAL(name)   double name;
#define FLAG_MEMBER_TEXT(name)   char name[TEXT_SIZE];    // "" means none
#define FLAG_MEMBER_CHOICE(name) int name;
#define FLAG_MEMBER_SWITCH(name) int name;
#define FLAG_MEMBER(kind, name, initial, low, high, unit, what) FLAG_MEMBER_##kind(name)

typedef struct Settings {
    FLAGS(FLAG_MEMBER)
} Settings;

// ---- the list as data ----------------------------------------------------------------------

typedef enum FlagKind {
    FLAG_GROUP, FLAG_INT, FLAG_REAL, FLAG_TEXT, FLAG_CHOICE, FLAG_SWITCH
} FlagKind;

typedef struct Flag {
    FlagKind kind;
    const char* name;       // of the member; the flag is the same with - for _
    size_t offset;          // of the member
    double initial;         // the default; of a TEXT it is `text`
    const char* text;       // TEXT: the default; CHOICE: "|word|word"
    double low, high;
    const char* unit;
    const char* what;
} Flag;

#define FLAG_ROW_GROUP(n, i, l, h)  0, 0, "", 0, 0
#define FLAG_ROW_INT(n, i, l, h)    offsetof(Settings, n), (double)(i), "", l, h
#define FLAG_ROW_REAL(n, i, l, h)   offsetof(Settings, n), i, "", l, h
#define FLAG_ROW_TEXT(n, i, l, h)   offsetof(Settings, n), 0, i, 0, 0
#define FLAG_ROW_CHOICE(n, i, l, h) offsetof(Settings, n), i, l(FLAG_WORD), 0, 0
#define FLAG_ROW_SWITCH(n, i, l, h) offsetof(Settings, n), i, "", l, h
#define FLAG_ROW(kind, n, i, l, h, unit, what) \
    { FLAG_##kind, #n, FLAG_ROW_##kind(n, i, l, h), unit, what },

static const Flag FLAG_TABLE[] = { FLAGS(FLAG_ROW) };
enum { FLAG_COUNT = sizeof FLAG_TABLE / sizeof FLAG_TABLE[0] };

static inline int64_t* flag_int(const Flag* f, const Settings* s) {
    return (int64_t*)((char*)s + f->offset);
}

static inline double* flag_real(const Flag* f, const Settings* s) {
    return (double*)((char*)s + f->offset);
}

static inline char* flag_text(const Flag* f, const Settings* s) {
    return (char*)s + f->offset;
}

static inline int* flag_choice(const Flag* f, const Settings* s) {
    return (int*)((char*)s + f->offset);
}

static inline void settings_defaults(Settings* s) {
    memset(s, 0, sizeof *s);
    for (int i = 0; i < FLAG_COUNT; i++) {
        const Flag* f = &FLAG_TABLE[i];
        if (f->kind == FLAG_INT) *flag_int(f, s) = (int64_t)f->initial;
        if (f->kind == FLAG_REAL) *flag_real(f, s) = f->initial;
        if (f->kind == FLAG_TEXT) snprintf(flag_text(f, s), TEXT_SIZE, "%s", f->text);
        if (f->kind == FLAG_CHOICE || f->kind == FLAG_SWITCH) *flag_choice(f, s) = (int)f->initial;
    }
}

// ---- names and words -----------------------------------------------------------------------

// The flag as it is typed: batch_tokens is --batch-tokens.
static inline const char* flag_spelling(char* text, size_t size, const Flag* f) {
    snprintf(text, size, "%s", f->name);
    for (char* c = text; *c; c++) {
        if (*c == '_') *c = '-';
    }
    return text;
}

// A name given with its length, because `--steps=10` and `steps = 10` go on after it.
static inline const Flag* flag_find(const char* name, size_t length) {
    char text[64];
    for (int i = 0; i < FLAG_COUNT; i++) {
        const Flag* f = &FLAG_TABLE[i];
        if (f->kind == FLAG_GROUP) continue;
        flag_spelling(text, sizeof text, f);
        if (strlen(text) == length && memcmp(text, name, length) == 0) return f;
    }
    return NULL;
}

// Number of letters to insert, delete or replace to make b of a.
static inline int edit_distance(const char* a, size_t n, const char* b) {
    int row[65];
    size_t m = strlen(b);
    if (m > 64) m = 64;
    for (size_t j = 0; j <= m; j++) row[j] = (int)j;
    for (size_t i = 1; i <= n; i++) {
        int diagonal = row[0];
        row[0] = (int)i;
        for (size_t j = 1; j <= m; j++) {
            int best = diagonal + (a[i - 1] != b[j - 1]);
            if (row[j] + 1 < best) best = row[j] + 1;
            if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
            diagonal = row[j];
            row[j] = best;
        }
    }
    return row[m];
}

// The flag whose name is nearest to a mistyped one, or NULL when none is near.
static inline const Flag* flag_nearest(const char* name, size_t length) {
    const Flag* nearest = NULL;
    int best = length < 6 ? 3 : 1 + (int)(length / 2);
    for (int i = 0; i < FLAG_COUNT; i++) {
        const Flag* f = &FLAG_TABLE[i];
        if (f->kind == FLAG_GROUP) continue;
        char text[64];
        int distance = edit_distance(name, length, flag_spelling(text, sizeof text, f));
        if (distance < best) {
            best = distance;
            nearest = f;
        }
    }
    return nearest;
}

// The n-th word of "|word|word", or its length 0 when there is none.
static inline const char* flag_word(const char* words, int n, size_t* length) {
    for (; *words; n--) {
        words++;
        *length = strcspn(words, "|");
        if (n == 0) return words;
        words += *length;
    }
    *length = 0;
    return words;
}

// The value as it would be typed.
static inline const char* flag_value(char* text, size_t size, const Flag* f, const Settings* s) {
    if (f->kind == FLAG_INT) snprintf(text, size, "%" PRId64, *flag_int(f, s));
    if (f->kind == FLAG_REAL) real_text(text, size, *flag_real(f, s));
    if (f->kind == FLAG_TEXT) snprintf(text, size, "%s", flag_text(f, s));
    if (f->kind == FLAG_SWITCH) snprintf(text, size, "%d", *flag_choice(f, s));
    if (f->kind == FLAG_CHOICE) {
        size_t length;
        const char* word = flag_word(f->text, *flag_choice(f, s), &length);
        snprintf(text, size, "%.*s", (int)length, word);
    }
    return text;
}

// ---- one value -----------------------------------------------------------------------------

static inline void flag_check_range(const Flag* f, const char* where, const char* value, double v) {
    char low[40], high[40];
    // Written so that NaN is out of range.
    if (v >= f->low && v <= f->high) return;
    die("%s must be from %s to %s%s%s, got %s", where, real_text(low, sizeof low, f->low),
        real_text(high, sizeof high, f->high), *f->unit ? " " : "", f->unit, value);
}

// `where` names the place in messages: "--steps" or "unet.cfg:12: steps".
static inline void flag_set(Settings* s, const Flag* f, const char* where, const char* value) {
    char* end;
    if (f->kind == FLAG_INT || f->kind == FLAG_SWITCH) {
        long long v = strtoll(value, &end, 10);
        REQUIRE(end != value && *end == 0 && *value > ' ', "%s wants an integer, got '%s'", where,
                value);
        flag_check_range(f, where, value, (double)v);    // what does not fit is LLONG_MAX here
        if (f->kind == FLAG_INT) *flag_int(f, s) = v;
        else *flag_choice(f, s) = (int)v;
    } else if (f->kind == FLAG_REAL) {
        double v = strtod(value, &end);
        REQUIRE(end != value && *end == 0 && *value > ' ', "%s wants a number, got '%s'", where,
                value);
        flag_check_range(f, where, value, v);
        *flag_real(f, s) = v;
    } else if (f->kind == FLAG_TEXT) {
        size_t length = strlen(value);
        REQUIRE(length < TEXT_SIZE, "%s takes at most %d bytes, got %zu", where, TEXT_SIZE - 1,
                length);
        memcpy(flag_text(f, s), value, length + 1);
    } else {
        size_t length;
        for (int i = 0;; i++) {
            const char* word = flag_word(f->text, i, &length);
            if (length == 0) break;
            if (strlen(value) == length && memcmp(word, value, length) == 0) {
                *flag_choice(f, s) = i;
                return;
            }
        }
        die("%s must be one of %s, got '%s'", where, f->text + 1, value);
    }
}

static inline void flag_unknown(const char* place, const char* dashes, const char* name,
                                size_t length) {
    const Flag* nearest = flag_nearest(name, length < 64 ? length : 64);
    char spelling[64];
    if (!nearest) die("%sno flag %s%.*s\n--help lists them", place, dashes, (int)length, name);
    die("%sno flag %s%.*s; the nearest is %s%s\n--help lists them", place, dashes, (int)length,
        name, dashes, flag_spelling(spelling, sizeof spelling, nearest));
}

// ---- recipe files --------------------------------------------------------------------------

// The file that `--recipe name` means: a name with a slash or a dot is a path as it stands; any
// other is scripts/recipes/NAME.cfg beside the program, then under the working directory.
static inline void recipe_path(char* path, size_t size, const char* name) {
    if (strpbrk(name, "/.")) {
        snprintf(path, size, "%s", name);
        return;
    }
    char program[TEXT_SIZE];
    ssize_t n = readlink("/proc/self/exe", program, sizeof program - 1);
    program[n > 0 ? n : 0] = 0;
    char* slash = strrchr(program, '/');
    if (slash) {
        *slash = 0;
        snprintf(path, size, "%s/scripts/recipes/%s.cfg", program, name);
        if (access(path, R_OK) == 0) return;
    }
    snprintf(path, size, "scripts/recipes/%s.cfg", name);
    if (access(path, R_OK) == 0) return;
    die("no recipe '%s': neither %s nor %s/%s is there\n"
        "give one of modern, untied, unet, sub3, sub3_20, normuon, or the path of a file",
        name, path, program, path);
}

// The text of that file, to be freed; "" without a recipe.
static inline char* recipe_text(const char* name) {
    char path[2 * TEXT_SIZE], *text = NULL;
    size_t room = 0;
    if (!*name) return (char*)host_alloc(1, 1);
    recipe_path(path, sizeof path, name);
    FILE* file = fopen(path, "r");
    REQUIRE(file, "--recipe: cannot open %s: %s", path, strerror(errno));
    if (getdelim(&text, &room, 0, file) < 0) {
        free(text);
        text = (char*)host_alloc(1, 1);
    }
    fclose(file);
    return text;
}

// Sets in s what the file says, and marks it in given[].
static inline void recipe_read(Settings* s, bool* given, const char* path) {
    FILE* file = fopen(path, "r");
    REQUIRE(file, "--recipe: cannot open %s: %s", path, strerror(errno));
    int line_of[FLAG_COUNT] = {0};
    char line[2 * TEXT_SIZE], place[2 * TEXT_SIZE + 64], where[2 * TEXT_SIZE + 192];
    for (int number = 1; fgets(line, sizeof line, file); number++) {
        snprintf(place, sizeof place, "%s:%d: ", path, number);
        size_t length = strlen(line);
        REQUIRE(length + 1 < sizeof line || line[length - 1] == '\n',
                "%sthe line is longer than %zu bytes", place, sizeof line - 2);
        // A comment starts at a # that opens the line or follows a space, so that a path may hold
        // one.
        for (char* c = line; *c; c++) {
            if (*c == '#' && (c == line || c[-1] == ' ' || c[-1] == '\t')) *c = 0;
        }
        char* name = line + strspn(line, " \t\r\n");
        if (!*name) continue;
        size_t name_length = strcspn(name, " \t\r\n=");
        char* value = name + name_length + strspn(name + name_length, " \t\r\n");
        REQUIRE(*value == '=' && name_length > 0, "%sexpected `flag = value`, found '%.*s'", place,
                (int)strcspn(name, "\r\n"), name);
        value++;
        value += strspn(value, " \t\r\n");
        for (char* end = value + strlen(value); end > value && strchr(" \t\r\n", end[-1]);)
            *--end = 0;
        const Flag* f = flag_find(name, name_length);
        if (!f) flag_unknown(place, "", name, name_length);
        int i = (int)(f - FLAG_TABLE);
        char spelling[64];
        snprintf(where, sizeof where, "%s%s", place, flag_spelling(spelling, sizeof spelling, f));
        REQUIRE(strcmp(f->name, "recipe") != 0 && strcmp(f->name, "help") != 0,
                "%s belongs on the command line, not in a recipe", where);
        REQUIRE(*value, "%s has no value", where);
        REQUIRE(!line_of[i], "%s is given twice, first in line %d", where, line_of[i]);
        line_of[i] = number;
        given[i] = true;
        flag_set(s, f, where, value);
    }
    REQUIRE(!ferror(file), "--recipe: cannot read %s: %s", path, strerror(errno));
    fclose(file);
}

// ---- what a flag has a say in --------------------------------------------------------------

static inline bool flag_among(const Flag* f, const char* const* groups, size_t group_count,
                              const char* const* more, size_t more_count) {
    const Flag* group = f;
    while (group->kind != FLAG_GROUP) group--;
    for (size_t i = 0; i < group_count; i++)
        if (strcmp(group->name, groups[i]) == 0) return true;
    for (size_t i = 0; i < more_count; i++)
        if (strcmp(f->name, more[i]) == 0) return true;
    return false;
}

// Whether a flag belongs to the model: its groups, and what a token and a step are to it.
static inline bool flag_of_model(const Flag* f) {
    static const char* const GROUPS[] = { "model", "masks" };
    static const char* const MORE[] = { "seq_len", "steps", "extension_steps", "end_of_text",
                                        "tokenizer" };
    return flag_among(f, GROUPS, 2, MORE, 5);
}

// Whether another value makes another run of it: what is learned, from which tokens, in what order
// and precision. A run is not resumed under another one. Not among them is what only divides the
// same sums (--micro-batch, --zero, ranks), looks on (validation, samples) or names files.
static inline bool flag_alters_maths(const Flag* f) {
    static const char* const GROUPS[] = { "model", "masks", "optimizer" };
    static const char* const MORE[] = { "seq_len", "steps", "extension_steps", "batch_tokens",
                                        "seed", "grad_reduce", "batching", "data_ranks",
                                        "max_document", "end_of_text" };
    return flag_among(f, GROUPS, 3, MORE, 10);
}

// ---- the command line ----------------------------------------------------------------------

static inline void settings_help(FILE* out) {
    fprintf(out, "usage: %s --train PATTERN --val PATTERN [--recipe NAME] [flags]\n", program_name);
    for (int i = 0; i < FLAG_COUNT; i++) {
        const Flag* f = &FLAG_TABLE[i];
        char left[128], spelling[64], value[TEXT_SIZE];
        if (f->kind == FLAG_GROUP) {
            fprintf(out, "\n%s\n", f->what);
            continue;
        }
        static const char* const WANTS[] = { "", "N", "X", "TEXT", "", "" };
        snprintf(left, sizeof left, "--%s %s", flag_spelling(spelling, sizeof spelling, f),
                 f->kind == FLAG_CHOICE ? f->text + 1 : WANTS[f->kind]);
        fprintf(out, "  %-40s %s", left, f->what);
        Settings initial;
        settings_defaults(&initial);
        flag_value(value, sizeof value, f, &initial);
        if (f->kind != FLAG_SWITCH && *value) {
            fprintf(out, " [%s%s%s]", value, *f->unit ? " " : "", f->unit);
        }
        fputc('\n', out);
    }
    fprintf(out, "\nIn brackets the defaults, which are those of the recipe `modern`. "
            "A flag given here wins over the recipe's.\n");
}

static inline bool settings_want_help(int argc, char** argv) {
    for (int i = 1; i < argc; i++) if (strcmp(argv[i], "--help") == 0) return true;
    return false;
}

// Over what s holds.
static inline void settings_parse_over(Settings* s, int argc, char** argv) {
    bool given[FLAG_COUNT] = {false};
    const char* value_of[FLAG_COUNT] = {NULL};
    const Flag* recipe = flag_find("recipe", 6);
    // First every word is understood and nothing set, so that the recipe can be read before.
    for (int i = 1; i < argc; i++) {
        const char* word = argv[i];
        REQUIRE(strncmp(word, "--", 2) == 0 && word[2],
                "expected a flag, found '%s'\n--help lists them", word);
        size_t length = strcspn(word + 2, "=");
        const char* value = word[2 + length] == '=' ? word + 2 + length + 1 : NULL;
        const Flag* f = flag_find(word + 2, length);
        if (!f) flag_unknown("", "--", word + 2, length);
        int k = (int)(f - FLAG_TABLE);
        REQUIRE(!given[k], "--%.*s is given twice", (int)length, word + 2);
        given[k] = true;
        if (!value && f->kind == FLAG_SWITCH) value = "1";
        if (!value) {
            REQUIRE(i + 1 < argc && strncmp(argv[i + 1], "--", 2) != 0, "--%.*s wants a value%s%s",
                    (int)length, word + 2, i + 1 < argc ? ", found the flag " : "",
                    i + 1 < argc ? argv[i + 1] : "");
            value = argv[++i];
        }
        value_of[k] = value;
    }
    if (value_of[recipe - FLAG_TABLE]) {
        char path[2 * TEXT_SIZE];
        recipe_path(path, sizeof path, value_of[recipe - FLAG_TABLE]);
        recipe_read(s, given, path);
    }
    for (int i = 0; i < FLAG_COUNT; i++) {
        char where[80], spelling[64];
        snprintf(where, sizeof where, "--%s",
                 flag_spelling(spelling, sizeof spelling, &FLAG_TABLE[i]));
        if (value_of[i]) flag_set(s, &FLAG_TABLE[i], where, value_of[i]);
    }
}

static inline void settings_parse(Settings* s, int argc, char** argv) {
    settings_defaults(s);
    settings_parse_over(s, argc, argv);
}

// ---- flags that are lists ------------------------------------------------------------------

enum { LIST_ROOM = 64 };

// "0 4 11": numbers with spaces between. Returns how many; `flag` names the list in messages.
static inline int list_numbers(const char* flag, const char* text, int* x, int room) {
    int n = 0;
    for (const char* c = text + strspn(text, " "); *c; c += strspn(c, " ")) {
        size_t digits = strspn(c, "0123456789");
        REQUIRE(digits > 0 && digits < 7 && strchr(" ", c[digits]),
                "--%s wants numbers with spaces between, as in '0 4 11', got '%s'", flag, text);
        REQUIRE(n < room, "--%s takes at most %d numbers, got '%s'", flag, room, text);
        x[n++] = atoi(c);
        c += digits;
    }
    return n;
}

// "1:0 9:2" with the separator ':': a = 1 9, b = 0 2.
static inline int list_pairs(const char* flag, const char* text, char separator, int* a, int* b,
                             int room) {
    int n = 0;
    for (const char* c = text + strspn(text, " "); *c; c += strspn(c, " ")) {
        size_t first = strspn(c, "0123456789");
        size_t second = c[first] == separator ? strspn(c + first + 1, "0123456789") : 0;
        const char* end = c + first + 1 + second;
        REQUIRE(first > 0 && first < 7 && second > 0 && second < 7 && strchr(" ", *end),
                "--%s wants pairs with spaces between, as in '1%c0 9%c2', got '%s'", flag,
                separator, separator, text);
        REQUIRE(n < room, "--%s takes at most %d pairs, got '%s'", flag, room, text);
        a[n] = atoi(c);
        b[n++] = atoi(c + first + 1);
        c = end;
    }
    return n;
}

// ---- checks that join two flags ------------------------------------------------------------

// Multiples of `unit` on both sides of `found`, in words.
static inline const char* nearest_multiples(char* text, size_t size, int64_t found, int64_t unit) {
    int64_t below = found / unit * unit;
    if (below > 0) snprintf(text, size, "%" PRId64 " and %" PRId64, below, below + unit);
    else snprintf(text, size, "%" PRId64, unit);
    return text;
}

// A list names layers that there are (present: one flag per layer, NULL for all), each once.
static inline void layers_check(const Settings* s, const char* flag, const int* layers, int n,
                                const bool* present, const char* lacking) {
    for (int i = 0; i < n; i++) {
        REQUIRE(layers[i] < s->layers,
                "--%s names layer %d, but with --layers %" PRId64 " the last is %" PRId64, flag,
                layers[i], s->layers, s->layers - 1);
        REQUIRE(!present || present[layers[i]], "--%s names layer %d, which %s", flag, layers[i],
                lacking);
        for (int j = 0; j < i; j++)
            REQUIRE(layers[i] != layers[j], "--%s names layer %d twice", flag, layers[i]);
    }
}

// What the layers are made of.
static inline void settings_check_layers(const Settings* s) {
    bool present[1000] = {false}, attends[1000];                // --layers is at most 1000
    int a[LIST_ROOM], b[LIST_ROOM], attending = 0;
    for (int l = 0; l < s->layers; l++) present[l] = true;
    int n = list_numbers("no-layers", s->no_layers, a, LIST_ROOM);
    layers_check(s, "no-layers", a, n, NULL, "");
    for (int i = 0; i < n; i++) present[a[i]] = false;
    memcpy(attends, present, sizeof attends);
    REQUIRE(!s->skips || n == 0,
            "--skips 1 pairs all layers, and --no-layers leaves some out\ndrop one of the two");
    n = list_numbers("no-attention", s->no_attention, a, LIST_ROOM);
    layers_check(s, "no-attention", a, n, present, "--no-layers leaves out");
    for (int i = 0; i < n; i++) attends[a[i]] = false;
    for (int l = 0; l < s->layers; l++) attending += attends[l];
    REQUIRE(attending > 0, "--no-layers and --no-attention leave no layer with attention");

    n = list_numbers("long-layers", s->long_layers, a, LIST_ROOM);
    layers_check(s, "long-layers", a, n, attends, "has no attention");
    REQUIRE(n == 0 || s->windows != FLAG_WINDOWS_NONE,
            "--long-layers says which windows are long, but --windows is none");

    n = list_pairs("value-embeds", s->value_embeds, ':', a, b, LIST_ROOM);
    layers_check(s, "value-embeds", a, n, attends, "has no attention");
    int tables = 0;
    for (int i = 0; i < n; i++) {
        if (b[i] >= tables) tables = b[i] + 1;
    }
    for (int t = 0; t < tables; t++) {
        int used = 0;
        for (int i = 0; i < n; i++) used += b[i] == t;
        REQUIRE(used, "--value-embeds names table %d, but no layer uses table %d\n"
                "number them from 0 without a gap", tables - 1, t);
    }
    REQUIRE(n == 0 || s->attn_lambdas,
            "--value-embeds needs --attn-lambdas 1, the weights of values and table");
    REQUIRE(!s->value_residual || !s->attn_lambdas,
            "--value-residual 1 and --attn-lambdas 1 both mix the values; drop one of the two");
    REQUIRE(!s->value_residual || attends[0],
            "--value-residual 1 mixes in the values of layer 0, which has no attention");

    n = list_pairs("gated-skips", s->gated_skips, '>', a, b, LIST_ROOM);
    layers_check(s, "gated-skips", b, n, present, "--no-layers leaves out");
    for (int i = 0; i < n; i++) {
        layers_check(s, "gated-skips", a + i, 1, present, "--no-layers leaves out");
        REQUIRE(a[i] < b[i], "--gated-skips %d>%d must go from an earlier layer to a later one",
                a[i], b[i]);
    }
    REQUIRE(n == 0 || !s->skips, "--skips 1 and --gated-skips exclude each other");
    REQUIRE(s->backout < s->layers - 1,
            "--backout %" PRId64 " must be a layer before the last, %" PRId64, s->backout,
            s->layers - 1);
    REQUIRE(s->backout < 0 || present[s->backout],
            "--backout names layer %" PRId64 ", which --no-layers leaves out", s->backout);
}

static inline void settings_check_schedule(const Settings* s) {
    REQUIRE(s->extension_steps < s->steps,
            "--extension-steps %" PRId64 " must be fewer than --steps %" PRId64
            ", which count them", s->extension_steps, s->steps);
    REQUIRE(s->windows == FLAG_WINDOWS_NONE || s->window_block <= s->seq_len,
            "--window-block %" PRId64 " is more than --seq-len %" PRId64
            ": no window limits anything", s->window_block, s->seq_len);
    int windows[LIST_ROOM], n = list_numbers("window-steps", s->window_steps, windows, LIST_ROOM);
    REQUIRE(s->windows != FLAG_WINDOWS_THIRDS || n > 0,
            "--windows thirds needs --window-steps, one window for each part of the run");
    for (int i = 0; i < n; i++)
        REQUIRE(windows[i] >= 1 && windows[i] <= 65536,
                "--window-steps must be from 1 to 65536 blocks, got %d", windows[i]);
    REQUIRE(!s->yarn || s->windows == FLAG_WINDOWS_THIRDS,
            "--yarn 1 follows the windows of --windows thirds");
    REQUIRE(s->adam_every == 1 || s->optimizer == FLAG_OPTIMIZER_MUON,
            "--adam-every %" PRId64 " is for --optimizer muon; adamw is Adam alone",
            s->adam_every);
    REQUIRE(!s->muon_polar || s->ns_steps <= 5,
            "--muon-polar 1 has coefficients for 5 iterations, --ns-steps is %" PRId64,
            s->ns_steps);
}

static inline void settings_check_head(const Settings* s) {
    char near[80];
    bool tied = s->head == FLAG_HEAD_TIED;
    REQUIRE(s->table_rows <= s->vocab,
            "--table-rows %" PRId64 " is more than --vocab %" PRId64 ", the columns of the logits",
            s->table_rows, s->vocab);
    REQUIRE(!tied || s->table_rows == 0 || s->table_rows == s->vocab,
            "--table-rows %" PRId64 " is not --vocab %" PRId64
            ", but with --head tied they are the same table", s->table_rows, s->vocab);
    REQUIRE(!tied || !s->fp8_head, "--fp8-head 1 needs --head untied");
    REQUIRE(!tied || !s->bf16_head,
            "--bf16-head 1 needs --head untied; a tied one is the table of --bf16-tables");
    if (!s->fp8_head) return;
    REQUIRE(s->vocab % 16 == 0,
            "--fp8-head 1 needs --vocab in multiples of 16, got %" PRId64 "\nnearest that fit: %s",
            s->vocab, nearest_multiples(near, sizeof near, s->vocab, 16));
    REQUIRE(s->micro_batch * s->seq_len % 16 == 0,
            "--fp8-head 1 needs --micro-batch x --seq-len in multiples of 16 tokens, got %" PRId64,
            s->micro_batch * s->seq_len);
}

static inline void settings_check(const Settings* s, int world) {
    char near[80];
    REQUIRE(s->ranks == 0 || s->ranks == world,
            "--ranks %" PRId64 ", but %d take%s part\nstart them with mpirun -np %" PRId64
            " or srun, or leave --ranks out",
            s->ranks, world, world == 1 ? "s" : "", s->ranks);
    int64_t micro_tokens = world * s->micro_batch * s->seq_len;
    REQUIRE(s->micro_batch * s->seq_len <= INT32_MAX,
            "--micro-batch %" PRId64 " x --seq-len %" PRId64
            " tokens is more than a micro-step can hold (%d)",
            s->micro_batch, s->seq_len, INT32_MAX);
    REQUIRE(s->batch_tokens % micro_tokens == 0,
            "--batch-tokens %" PRId64 " is not a multiple of %d rank%s x --micro-batch %" PRId64
            " x --seq-len %" PRId64 " = %" PRId64
            " tokens\nnearest that fit: %s; or change --micro-batch",
            s->batch_tokens, world, world == 1 ? "" : "s", s->micro_batch, s->seq_len, micro_tokens,
            nearest_multiples(near, sizeof near, s->batch_tokens, micro_tokens));
    REQUIRE(s->channels % s->heads == 0,
            "--channels %" PRId64 " is not a multiple of --heads %" PRId64 "\nnearest that fit: %s",
            s->channels, s->heads, nearest_multiples(near, sizeof near, s->channels, s->heads));
    int64_t val_tokens = (s->val_batch ? s->val_batch : s->micro_batch) *
                         (s->val_seq_len ? s->val_seq_len : s->seq_len);
    REQUIRE(val_tokens <= INT32_MAX,
            "--val-batch x --val-seq-len, %" PRId64
            " tokens, is more than a forward pass can hold (%d)", val_tokens, INT32_MAX);
    int64_t head_dim = s->channels / s->heads;
    int fit = s->channels % 128 == 0 ? 128 : s->channels % 64 == 0 ? 64 : 32;
    if (s->channels % 32 == 0) {
        snprintf(near, sizeof near, "--heads %" PRId64 " (heads of %d)", s->channels / fit, fit);
    } else {
        snprintf(near, sizeof near, "none; take --channels in multiples of 32");
    }
    REQUIRE(head_dim == 32 || head_dim == 64 || head_dim == 128,
            "--channels %" PRId64 " / --heads %" PRId64 " is a head of %" PRId64
            " channels; it must be 32, 64 or 128\nwith these channels: %s",
            s->channels, s->heads, head_dim, near);
    REQUIRE(!s->skips || s->layers % 2 == 0,
            "--skips 1 pairs the layers, but --layers %" PRId64 " is odd\nnearest that fit: %s",
            s->layers, nearest_multiples(near, sizeof near, s->layers, 2));
    settings_check_layers(s);
    settings_check_schedule(s);
    settings_check_head(s);
    REQUIRE(!*s->gpu || s->dry_run, "--gpu %s is for --dry-run, which says what a step costs there",
            s->gpu);
    REQUIRE(!*s->prompt || s->sample_tokens > 0,
            "--prompt is what a sample goes on from, and --sample-tokens is 0\n"
            "say how long it should be");
    REQUIRE(s->on_nonfinite != FLAG_NONFINITE_ROLLBACK || s->checkpoint_every > 0,
            "--on-nonfinite rollback goes back to a checkpoint, and --checkpoint-every is 0\n"
            "say every how many steps there should be one");
    bool sample_only = *s->load && !*s->train;
    REQUIRE(s->dry_run || !sample_only || s->sample_tokens > 0,
            "--load without --train prints a sample, and --sample-tokens is 0\n"
            "say how long it should be, or give --train and --val");
    REQUIRE(s->dry_run || sample_only || *s->train,
            "--train is missing: the token shards to train on\n"
            "dev/text_to_shards makes them from text files");
    REQUIRE(s->dry_run || sample_only || *s->val,
            "--val is missing: the token shards of the validation loss\n"
            "dev/text_to_shards makes them from text files");
}

// ---- showing them --------------------------------------------------------------------------

// A star marks what differs from the default: that is what a reader of a log looks for.
static inline void settings_print(FILE* out, const Settings* s) {
    Settings initial;
    settings_defaults(&initial);
    for (int i = 0; i < FLAG_COUNT; i++) {
        const Flag* f = &FLAG_TABLE[i];
        char spelling[64], value[TEXT_SIZE], usual[TEXT_SIZE];
        if (f->kind == FLAG_GROUP) {
            fprintf(out, "%s\n", f->what);
            continue;
        }
        if (f->kind == FLAG_SWITCH) continue;
        flag_value(value, sizeof value, f, s);
        flag_value(usual, sizeof usual, f, &initial);
        bool changed = strcmp(value, usual) != 0;
        fprintf(out, "  %-22s %16s", flag_spelling(spelling, sizeof spelling, f),
                *value ? value : "-");
        if (changed) fprintf(out, " %-7s *", f->unit);
        else if (*f->unit) fprintf(out, " %s", f->unit);
        fputc('\n', out);
    }
}

// All settings as the lines of a recipe file: what a saved model says about its making.
static inline void settings_text(char* text, size_t size, const Settings* s) {
    size_t at = 0;
    *text = 0;
    for (int i = 0; i < FLAG_COUNT; i++) {
        const Flag* f = &FLAG_TABLE[i];
        char spelling[64], value[TEXT_SIZE];
        if (f->kind == FLAG_GROUP || f->kind == FLAG_SWITCH) continue;
        flag_value(value, sizeof value, f, s);
        if (!*value || strcmp(f->name, "recipe") == 0)
            continue;    // what the recipe said is in the others
        int n = snprintf(text + at, size - at, "%s = %s\n",
                         flag_spelling(spelling, sizeof spelling, f), value);
        REQUIRE(n >= 0 && (size_t)n < size - at,
                "settings_text: %zu bytes are too few for the settings", size);
        at += (size_t)n;
    }
}

static inline void settings_json(FILE* out, const Settings* s) {
    const char* comma = "{";
    for (int i = 0; i < FLAG_COUNT; i++) {
        const Flag* f = &FLAG_TABLE[i];
        char value[TEXT_SIZE];
        if (f->kind == FLAG_GROUP || f->kind == FLAG_SWITCH) continue;
        fprintf(out, "%s\"%s\":", comma, f->name);
        comma = ",";
        flag_value(value, sizeof value, f, s);
        if (f->kind == FLAG_TEXT || f->kind == FLAG_CHOICE) json_string(out, value, strlen(value));
        else fputs(value, out);
    }
    fputc('}', out);
}
