/*
Golden cases: what the published recipes computed, and how near we have to come.

A case is a directory with `init.safetensors` (parameters and seven batches) and result files, some
per variant of the numerics, in safetensors layout:

    u64 n, little endian | n bytes of JSON | data
    JSON: {"name": {"dtype": "F32", "shape": [..], "data_offsets": [begin, end]}, ...,
           "__metadata__": {"key": "value", ...}}, offsets counted from the end of the JSON

    init.safetensors              param.<tensor>, tokens.0..6, targets.0..6, cu_seqlens.0..6
    <variant>.acts.safetensors    logits0, loss0, act.*, dact.*, cos, sin, mask.*: step 0
    <variant>.grads.safetensors   grad.<tensor> of step 0
    <variant>.train.safetensors   loss [6], val_loss [1], p<k>.<tensor> after k steps (p6: also alone)
    <variant>.windows.safetensors sw<n>.b<i>.*: loss and gradients of the start on batch i, window n

Step i trains on batch i; batch 6 is evaluated after the sixth step. Everything is read from the
files: recipe and sizes from the names and shapes in init, hyperparameters from its metadata, the
variant from the name of the file and its metadata. Words of a variant, separated by dots:

    rope_f32 rope_bf16   cos and sin as float, or rounded to bf16 (normuon: always rounded)
    ns_f32 ns_bf16       Newton-Schulz in float, or in bf16 with every operation rounded
    pe_f32 pe_bf16       the same of normuon's Polar Express
    zeroinit             output projections (and head) zero, scalars at the recipe's start
    embbf16              tables (unet: scalars, too) stored in bf16 without a master, gradients rounded once
    tabbf16              tables, head and gates in bf16, Adam's state of everything, too
    f32_adambf16         Adam's state in bf16
    f32_adamx0.01        Adam's learning rates times 0.01
    fp8                  the head's three products in FP8
    sched                steps from the middle of the record's own schedule
    h1x128               one head of dimension 128 where the case has more; gates of the first head
    asis                 bf16 activations and the epsilon of that time: a bound of sanity only

A runner (the oracle, or the trainer) fills a table of arrays: activations under their golden names,
parameters under the trainer's, which GOLDEN_NAMES translates. golden_compare judges every tensor of
a file and lists what it has no rule for as not compared. Files that differ only in what they hold
come from one run.

How the tolerances came about. Two right evaluations of one case differ by the order of their sums.
That was measured for each kind of quantity (one thread, two threads, reversed sums, double); the
bounds here are 5 to 50 times the largest difference seen. max and rms are of the difference,
relative to the rms of the golden tensor; for parameters, of the update since the start. Adam's
first steps are nearly lr sign(g), so an element whose gradient is rounding noise may flip by 2 lr:
tables are judged by rms and by the share of elements that are off, never by the maximum. The same
holds for NorMuon, whose decay comes or goes with the sign of an element.
*/
#pragma once
#include <ctype.h>
#include <dirent.h>
#include "../llmc/safetensors.h"
#include "test.h"

// ---- tensors of a file -----------------------------------------------------------------------

static inline const SafeTensor* golden_need(const SafeFile* f, const char* format, int i) {
    char name[64];
    snprintf(name, sizeof name, format, i);
    const SafeTensor* t = safetensors_find(f, name);
    REQUIRE(t, "%s: has no tensor %s", f->path, name);
    return t;
}

static inline double golden_value(const SafeTensor* t, size_t i) {
    uint16_t half;
    uint32_t bits;
    float x;
    switch (t->type) {
        case SAFE_F32: return ((const float*)t->data)[i];
        case SAFE_I32: return ((const int32_t*)t->data)[i];
        case SAFE_U8: return ((const uint8_t*)t->data)[i];
        case SAFE_BF16:
            half = ((const uint16_t*)t->data)[i];
            bits = (uint32_t)half << 16;
            memcpy(&x, &bits, sizeof x);
            return x;
        default: die("golden tensor %s is %s, wanted F32, BF16, I32 or U8", t->name, SAFE_TYPE_NAME[t->type]);
    }
}

static inline double* golden_doubles(const SafeTensor* t) {
    size_t n = (size_t)safe_elements(t);
    double* x = test_doubles(n);
    for (size_t i = 0; i < n; i++) x[i] = golden_value(t, i);
    return x;
}

// otherwise: what to return if the key is missing; NAN: the key has to be there
static inline double golden_number(const SafeFile* f, const char* key, double otherwise) {
    const char* text = safetensors_metadata(f, key);
    REQUIRE(text || !isnan(otherwise), "%s: the metadata has no %s", f->path, key);
    return text ? atof(text) : otherwise;
}

// Every number in a text: "1,0.5", "[1.0, 0.5]". Returns how many; out holds `want` of them.
static inline int golden_list(const char* text, double* out, int want) {
    int n = 0;
    while (*text && n < want) {
        char* end;
        double x = strtod(text, &end);
        if (end != text) out[n++] = x;
        text = end != text ? end : text + 1;
    }
    return n;
}

// ---- a case ----------------------------------------------------------------------------------

enum { GOLDEN_STEPS = 6 };
enum { GOLDEN_MODERN, GOLDEN_UNTIED, GOLDEN_UNET, GOLDEN_SUB3, GOLDEN_NORMUON };   // as in oracle.h
static const char* const GOLDEN_RECIPES[] = {"modern", "untied", "unet", "sub3", "normuon"};

typedef struct {
    char dir[400];
    SafeFile init;
    int recipe, V, rows, C, H, L, B, T;       // rows: of the embedding and value tables
    int T_val;                                // length of batch 6
    int block, bos;                           // of a window; opens a document
    double lr_wte, lr_head, lr_scalar, lr_muon, adam_beta1, adam_beta2, adam_eps;
} GoldenCase;

static inline const int* golden_batch(const GoldenCase* c, const char* which, int i) {
    char name[32];
    snprintf(name, sizeof name, "%s.%%d", which);
    const SafeTensor* t = golden_need(&c->init, name, i);
    int64_t want = (int64_t)c->B * (i == GOLDEN_STEPS ? c->T_val : c->T);
    REQUIRE(t->type == SAFE_I32 && safe_elements(t) == want, "%s: %s.%d is no I32 of %lld tokens",
            c->init.path, which, i, (long long)want);
    return (const int*)t->data;
}

// Ends of the documents of batch i: 0, the running ends, padded with T. Returns how many numbers.
static inline int golden_cu_seqlens(const GoldenCase* c, const int** ends, int i) {
    const SafeTensor* t = golden_need(&c->init, "cu_seqlens.%d", i);
    REQUIRE(t->type == SAFE_I32, "%s: cu_seqlens.%d is no I32", c->init.path, i);
    *ends = (const int*)t->data;
    return (int)safe_elements(t);
}

static inline void golden_case_open(GoldenCase* c, const char* dir) {
    char path[512];
    memset(c, 0, sizeof *c);
    snprintf(c->dir, sizeof c->dir, "%s", dir);
    snprintf(path, sizeof path, "%s/init.safetensors", c->dir);
    safetensors_open(&c->init, path);
    const SafeFile* f = &c->init;
    const SafeTensor *wte = safetensors_find(f, "param.wte.weight"),
                     *embed = safetensors_find(f, "param.embed.weight"),
                     *head = safetensors_find(f, "param.lm_head.weight"),
                     *skips = safetensors_find(f, "param.skip_weights");
    REQUIRE(wte || embed, "%s: has neither wte.weight nor embed.weight: no recipe known here", path);
    c->recipe = embed ? (skips ? GOLDEN_SUB3 : GOLDEN_NORMUON)
              : !head ? GOLDEN_MODERN : !skips ? GOLDEN_UNTIED : GOLDEN_UNET;
    const SafeTensor* table = wte ? wte : embed;
    c->rows = (int)table->shape[0], c->C = (int)table->shape[1];
    c->V = head ? (int)head->shape[0] : c->rows;
    for (int l = 0; l < 1000; l++) {
        char name[64];
        snprintf(name, sizeof name, "param.h.%d.attn.c_q.weight", l);
        if (!safetensors_find(f, name)) break;
        c->L = l + 1;
    }
    if (embed) c->L = (int)golden_number(f, "layers", 12);
    const SafeTensor *tokens = golden_need(f, "tokens.%d", 0), *last = golden_need(f, "tokens.%d", GOLDEN_STEPS);
    c->B = tokens->dims == 2 ? (int)tokens->shape[0] : 1;
    c->T = (int)tokens->shape[tokens->dims - 1];
    c->T_val = (int)last->shape[last->dims - 1];
    c->H = (int)golden_number(f, "n_head", c->C / golden_number(f, "head_dim", 0x1p-20));
    REQUIRE(c->H >= 1 && c->C % c->H == 0, "%s: %d heads do not divide the width %d", path, c->H, c->C);
    bool modern = c->recipe == GOLDEN_MODERN;
    c->adam_beta1 = golden_number(f, modern ? "adamw_b1" : "adam_b1", NAN);
    c->adam_beta2 = golden_number(f, modern ? "adamw_b2" : "adam_b2", NAN);
    c->adam_eps = golden_number(f, modern ? "adamw_eps" : "adam_eps", NAN);
    if (embed) {
        c->block = (int)golden_number(f, "block", NAN);
        c->bos = (int)golden_number(f, "bos", NAN);
    }
    if (c->recipe == GOLDEN_NORMUON) {
        double lr = golden_number(f, "adam_lr", NAN);
        c->lr_wte = lr * golden_number(f, "lr_mul_embed", NAN);
        c->lr_head = lr * golden_number(f, "lr_mul_head", NAN);
        c->lr_scalar = lr * golden_number(f, "lr_mul_scalars", NAN);
        c->lr_muon = golden_number(f, "normuon_lr", NAN);
        return;
    }
    c->lr_wte = golden_number(f, modern ? "adamw_lr" : embed ? "lr_embed" : "lr_wte", NAN);
    c->lr_head = golden_number(f, "lr_head", modern ? 0 : NAN);
    c->lr_scalar = golden_number(f, "lr_scalar", c->recipe >= GOLDEN_UNET ? NAN : 0);
    c->lr_muon = golden_number(f, "muon_lr", NAN);
}

static inline void golden_case_close(GoldenCase* c) {
    safetensors_close(&c->init);
}

// ---- names -----------------------------------------------------------------------------------

// What a tensor of ours is in a golden file; the files of modern, untied and unet have our names. %d is
// the layer, or the number of a value table. A tensor that is not here has the same name in both.
typedef struct {
    int recipe;
    const char *golden, *ours;
    int part, parts;        // ours is one of equal parts of the golden tensor,
    int count, per_layer;   // or, with count, that many numbers from part + per_layer * layer on
    bool transposed;        // the golden one is (in, out)
} GoldenName;

static const GoldenName GOLDEN_NAMES[] = {
    {GOLDEN_SUB3, "embed.weight", "wte.weight", 0, 1, 0, 0, false},
    {GOLDEN_SUB3, "value_embeds.embed.%d.weight", "value_embeds.%d.weight", 0, 1, 0, 0, false},
    {GOLDEN_SUB3, "blocks.%d.attn.qkv_w", "h.%d.attn.c_q.weight", 0, 3, 0, 0, false},
    {GOLDEN_SUB3, "blocks.%d.attn.qkv_w", "h.%d.attn.c_k.weight", 1, 3, 0, 0, false},
    {GOLDEN_SUB3, "blocks.%d.attn.qkv_w", "h.%d.attn.c_v.weight", 2, 3, 0, 0, false},
    {GOLDEN_SUB3, "blocks.%d.attn.c_proj.weight", "h.%d.attn.c_proj.weight", 0, 1, 0, 0, false},
    {GOLDEN_SUB3, "blocks.%d.mlp.c_fc.weight", "h.%d.mlp.c_fc.weight", 0, 1, 0, 0, false},
    {GOLDEN_SUB3, "blocks.%d.mlp.c_proj.weight", "h.%d.mlp.c_proj.weight", 0, 1, 0, 0, false},
    {GOLDEN_SUB3, "blocks.%d.lambdas", "h.%d.lambdas", 0, 1, 0, 0, false},
    {GOLDEN_SUB3, "blocks.%d.attn.lambdas", "h.%d.attn.lambdas", 0, 1, 0, 0, false},
    {GOLDEN_NORMUON, "embed.weight", "wte.weight", 0, 1, 0, 0, false},
    {GOLDEN_NORMUON, "smear_gate.weight", "smear.gate.weight", 0, 1, 0, 0, false},
    {GOLDEN_NORMUON, "blocks.%d.attn.qkvo_w", "h.%d.attn.c_q.weight", 0, 4, 0, 0, false},
    {GOLDEN_NORMUON, "blocks.%d.attn.qkvo_w", "h.%d.attn.c_k.weight", 1, 4, 0, 0, false},
    {GOLDEN_NORMUON, "blocks.%d.attn.qkvo_w", "h.%d.attn.c_v.weight", 2, 4, 0, 0, false},
    {GOLDEN_NORMUON, "blocks.%d.attn.qkvo_w", "h.%d.attn.c_proj.weight", 3, 4, 0, 0, false},
    {GOLDEN_NORMUON, "blocks.%d.attn.attn_gate.weight", "h.%d.attn.gate.weight", 0, 1, 0, 0, false},
    {GOLDEN_NORMUON, "blocks.%d.mlp.c_fc", "h.%d.mlp.c_fc.weight", 0, 1, 0, 0, true},
    {GOLDEN_NORMUON, "blocks.%d.mlp.c_proj", "h.%d.mlp.c_proj.weight", 0, 1, 0, 0, false},
    {GOLDEN_NORMUON, "scalars", "skip_gates", 1, 0, 1, 0, false},
    {GOLDEN_NORMUON, "scalars", "h.%d.lambdas", 12, 0, 2, 2, false},
    {GOLDEN_NORMUON, "scalars", "h.%d.attn.lambdas", 36, 0, 2, 2, false},
    {GOLDEN_NORMUON, "scalars", "smear.lambda", 60, 0, 1, 0, false},
    {GOLDEN_NORMUON, "scalars", "backout.lambda", 61, 0, 1, 0, false},
};
enum { GOLDEN_NAME_COUNT = sizeof GOLDEN_NAMES / sizeof GOLDEN_NAMES[0] };

// Whether name is what format makes of a number, and which.
static inline bool golden_matches(const char* format, const char* name, int* number) {
    char text[64];
    *number = 0;
    if (strstr(format, "%d") && sscanf(name, format, number) != 1) return false;
    snprintf(text, sizeof text, format, *number);
    return !strcmp(text, name);
}

// Where a golden tensor of n elements holds ours of this layer.
static inline void golden_place(const GoldenName* name, int layer, size_t n, size_t* first, size_t* count) {
    *count = name->count ? (size_t)name->count : n / name->parts;
    *first = name->count ? (size_t)(name->part + name->per_layer * layer) : name->part * *count;
}

// Our tensor out of the golden one, or the golden one's place filled with ours (into). width: of the
// golden rows, for what is transposed.
static inline void golden_copy(double* golden, double* ours, size_t count, size_t width, bool transposed,
                               bool into) {
    size_t height = count / width;
    for (size_t i = 0; i < count; i++) {
        double* mine = &ours[transposed ? i % width * height + i / width : i];
        if (into) golden[i] = *mine;
        else *mine = golden[i];
    }
}

// The matrices that Muon updates; tables and scalars, which Adam does; normuon's small gates.
enum { GOLDEN_MATRIX, GOLDEN_TABLE, GOLDEN_SCALARS, GOLDEN_GATE };

// tensor: a name of ours or a golden one
static inline int golden_kind(const char* tensor) {
    if (strstr(tensor, "gate.weight")) return GOLDEN_GATE;
    bool matrix = strstr(tensor, ".attn.c_") || strstr(tensor, ".mlp.c_") || strstr(tensor, ".attn.qkv");
    bool table = strstr(tensor, "wte.weight") || strstr(tensor, "lm_head.weight") || strstr(tensor, "embed");
    return matrix ? GOLDEN_MATRIX : table ? GOLDEN_TABLE : GOLDEN_SCALARS;
}

// ---- a variant -------------------------------------------------------------------------------

enum { GOLDEN_MAX_WINDOWS = 32 };

typedef struct {
    char name[512];                  // file name without .safetensors
    bool rope_bf16, ns_bf16, zeroinit, embbf16, tabbf16, adambf16, fp8, asis, train;
    int H;                           // heads: of the case, if the variant has no other
    double adam_scale;               // times every learning rate of Adam
    double fp8_x, fp8_w, fp8_grad;   // FP8's scales; fp8_grad: of the gradient as the recipe sums it
    // Per step, [6]: the evaluation
    int64_t steps[GOLDEN_STEPS + 1];
    double lr_mult[GOLDEN_STEPS], momentum[GOLDEN_STEPS], attn_scale[GOLDEN_STEPS + 1];
    int window_short[GOLDEN_STEPS + 1], window_long[GOLDEN_STEPS + 1];      // blocks
    bool steps_given;                // lr_mult or momentum are not those of the first steps of a run
    int64_t scheduled, extension;    // normuon: steps of its whole run
    struct { int window, batch; } windows[GOLDEN_MAX_WINDOWS];
    int window_count;                // what sw<window>.b<batch>.* wants
} GoldenVariant;

static inline bool golden_word(const char* name, const char* word) {
    size_t n = strlen(word);
    for (const char* p = strstr(name, word); p; p = strstr(p + 1, word)) {
        if ((p == name || p[-1] == '.') && (p[n] == '.' || p[n] == 0)) return true;
    }
    return false;
}

// normuon's schedule as its description says: thirds of the scheduled steps, then an extension.
static inline int golden_window(const GoldenVariant* v, int64_t step) {
    static const int THIRDS[] = {3, 7, 11};
    return step < v->scheduled ? THIRDS[3 * step / v->scheduled] : 13;
}

static inline void golden_schedule_normuon(GoldenVariant* v) {
    for (int i = 0; i <= GOLDEN_STEPS; i++) {
        int64_t step = v->steps[i], cooling = step - (v->scheduled + v->extension - 50);
        double scale = 0.1;
        int window = golden_window(v, 0);
        for (int64_t s = 1; s <= step; s++) {
            int next = golden_window(v, s);
            scale *= 1 + 0.2 * log((double)next / window);
            window = next;
        }
        v->attn_scale[i] = scale;
        v->window_long[i] = i == GOLDEN_STEPS ? 20 : window;
        v->window_short[i] = window / 2;
        if (i == GOLDEN_STEPS) break;
        double part = (double)step / (double)v->scheduled;
        double rest = 2 * (1 - (part < 0.9999 ? part : 0.9999));
        v->lr_mult[i] = rest > 1 ? 1 : rest + 0.1 * (1 - rest);
        v->momentum[i] = step < 300 ? 0.85 + 0.1 * (double)step / 300
                       : cooling > 0 ? 0.95 - 0.1 * (double)cooling / 50 : 0.95;
    }
}

// What the steps are where the file has no arrays for it.
static inline void golden_schedule(GoldenVariant* v, const GoldenCase* c, const SafeFile* f) {
    const char *steps = safetensors_metadata(f, "steps"), *sched = safetensors_metadata(f, "sched");
    const char* windows = safetensors_metadata(f, "sw");
    double list[GOLDEN_STEPS + 1];
    for (int i = 0; i <= GOLDEN_STEPS; i++) v->steps[i] = i;
    for (int i = 0; i < GOLDEN_STEPS; i++) {
        // 0.85 + 0.10 min(step / warm-up, 1); written as that formula in the metadata
        double warm_up = c->recipe == GOLDEN_UNET ? 500 : 300;
        v->lr_mult[i] = 1;
        v->momentum[i] = c->recipe >= GOLDEN_UNET ? 0.85 + 0.10 * i / warm_up
                                                  : golden_number(&c->init, "muon_momentum", NAN);
    }
    if (c->recipe == GOLDEN_SUB3) {
        REQUIRE(windows && golden_list(windows, list, GOLDEN_STEPS) == GOLDEN_STEPS,
                "%s: the metadata's sw is no list of %d windows", f->path, GOLDEN_STEPS);
        for (int i = 0; i <= GOLDEN_STEPS; i++) {
            v->window_long[i] = (int)list[i % GOLDEN_STEPS], v->window_short[i] = v->window_long[i] / 2;
            v->attn_scale[i] = golden_number(f, "attn_scale", NAN);
        }
    }
    if (c->recipe == GOLDEN_NORMUON) {
        REQUIRE(sched && golden_list(sched, list, 2) == 2, "%s: the metadata's sched is not two numbers", f->path);
        v->scheduled = (int64_t)list[0], v->extension = (int64_t)list[1];
        if (safetensors_metadata(f, "real_sched")) v->scheduled = 2185, v->extension = 40;
        if (steps) {
            REQUIRE(golden_list(steps, list, GOLDEN_STEPS) == GOLDEN_STEPS, "%s: the metadata's steps '%s' are not %d",
                    f->path, steps, GOLDEN_STEPS);
            for (int i = 0; i < GOLDEN_STEPS; i++) v->steps[i] = (int64_t)list[i];
        }
        v->steps[GOLDEN_STEPS] = v->scheduled + v->extension;
        v->steps_given = v->steps[0] != 0;
        golden_schedule_normuon(v);
    }
}

static inline void golden_variant_read(GoldenVariant* v, const GoldenCase* c, const SafeFile* f) {
    memset(v, 0, sizeof *v);
    const char* slash = strrchr(f->path, '/');
    snprintf(v->name, sizeof v->name, "%s", slash ? slash + 1 : f->path);
    char* end = strstr(v->name, ".safetensors");
    if (end) *end = 0;
    const char *rope = safetensors_metadata(f, "rope"), *ns = safetensors_metadata(f, "ns");
    const char *list = safetensors_metadata(f, "lr_mult"), *adam = safetensors_metadata(f, "adam");
    bool late = c->recipe >= GOLDEN_SUB3;
    if (!ns) ns = safetensors_metadata(f, "nsp");
    if (!ns) ns = safetensors_metadata(f, "pe");
    REQUIRE(rope || late, "%s: the metadata has no rope", f->path);
    v->rope_bf16 = late ? c->recipe == GOLDEN_NORMUON : !strcmp(rope, "bf16");
    v->ns_bf16 = ns && !strcmp(ns, "bf16");
    v->zeroinit = golden_word(v->name, "zeroinit");
    v->embbf16 = golden_word(v->name, "embbf16");
    v->tabbf16 = golden_word(v->name, "tabbf16");
    v->adambf16 = v->tabbf16 || (adam && !strcmp(adam, "bf16"));
    v->fp8 = golden_word(v->name, "fp8");
    v->asis = golden_word(v->name, "asis");
    v->H = c->C / (int)golden_number(f, "head_dim", c->C / c->H);
    v->adam_scale = golden_number(f, "adam_scale", 1);
    bool contradicts = (rope && golden_word(v->name, v->rope_bf16 ? "rope_f32" : "rope_bf16")) ||
                       golden_word(v->name, v->ns_bf16 ? "ns_f32" : "ns_bf16") ||
                       golden_word(v->name, v->ns_bf16 ? "pe_f32" : "pe_bf16");
    REQUIRE(!contradicts, "%s: the name and the metadata's rope or ns contradict each other", f->path);
    // The record's numbers: for sub3, of the mean of 65,536 losses; for normuon, of their sum.
    bool sub3 = c->recipe == GOLDEN_SUB3;
    v->fp8_x = sub3 ? 2 : 448 / sqrt(c->C), v->fp8_w = sub3 ? 32 : 512;
    v->fp8_grad = sub3 ? golden_number(f, "grad_s", 0x1p29 * c->T / 65536) : 448;

    golden_schedule(v, c, f);
    const SafeTensor* lr_mult = safetensors_find(f, "lr_mult");
    struct { const char* name; double* numbers; int* integers; int count; } arrays[] = {
        {"momentum", v->momentum, NULL, GOLDEN_STEPS}, {"lr_mult", v->lr_mult, NULL, GOLDEN_STEPS},
        {"attn_scale", v->attn_scale, NULL, GOLDEN_STEPS + 1},
        {"ws_short", NULL, v->window_short, GOLDEN_STEPS + 1},
        {"ws_long", NULL, v->window_long, GOLDEN_STEPS + 1},
    };
    for (size_t a = 0; a < sizeof arrays / sizeof arrays[0]; a++) {
        const SafeTensor* t = safetensors_find(f, arrays[a].name);
        REQUIRE(!t || safe_elements(t) == arrays[a].count, "%s: %s has not %d numbers", f->path, arrays[a].name,
                arrays[a].count);
        for (int i = 0; t && i < arrays[a].count; i++) {
            if (arrays[a].numbers) arrays[a].numbers[i] = golden_value(t, i);
            else arrays[a].integers[i] = (int)golden_value(t, i);
        }
    }
    if (!late && (list || lr_mult)) v->steps_given = true;
    int numbers = list ? golden_list(list, v->lr_mult, GOLDEN_STEPS) : GOLDEN_STEPS;
    REQUIRE(numbers == GOLDEN_STEPS, "%s: lr_mult '%s' is not a list of %d numbers", f->path, list,
            GOLDEN_STEPS);
}

// What a file wants of the run that it shares with others.
static inline void golden_variant_add(GoldenVariant* v, const SafeFile* f) {
    for (int i = 0; i < f->count; i++) {
        const char* name = f->tensors[i].name;
        int window, batch;
        v->train |= !strcmp(name, "loss") || (name[0] == 'p' && isdigit((unsigned char)name[1]));
        if (sscanf(name, "sw%d.b%d.loss", &window, &batch) != 2 || !strstr(name, ".loss")) continue;
        REQUIRE(v->window_count < GOLDEN_MAX_WINDOWS, "%s: more than %d windows", f->path, GOLDEN_MAX_WINDOWS);
        v->windows[v->window_count].window = window;
        v->windows[v->window_count++].batch = batch;
    }
}

// The start value of a tensor of ours, n elements; the caller frees it.
static inline double* golden_start(const GoldenCase* c, const GoldenVariant* v, const char* tensor, size_t n) {
    char name[80];
    const GoldenName* row = NULL;
    int layer = 0;
    for (int i = 0; i < GOLDEN_NAME_COUNT && !row; i++) {
        if (GOLDEN_NAMES[i].recipe == c->recipe && golden_matches(GOLDEN_NAMES[i].ours, tensor, &layer)) {
            row = &GOLDEN_NAMES[i];
        }
    }
    int length = snprintf(name, sizeof name, "param.");
    snprintf(name + length, sizeof name - length, row ? row->golden : tensor, layer);
    const SafeTensor* t = golden_need(&c->init, name, 0);
    size_t first = 0, count = (size_t)safe_elements(t), width = (size_t)t->shape[t->dims - 1];
    if (row) golden_place(row, layer, count, &first, &count);
    // Fewer heads than the file has gates for: the first ones.
    bool enough = count == n || (count > n && golden_kind(tensor) == GOLDEN_GATE);
    REQUIRE(enough, "%s: %s has %zu elements for %s, wanted %zu", c->init.path, name, count, tensor, n);
    double *x = test_doubles(n), *golden = golden_doubles(t);
    golden_copy(golden + first, x, n, width, row && row->transposed, false);
    free(golden);
    if (!v->zeroinit) return x;
    bool normuon = c->recipe == GOLDEN_NORMUON;
    for (size_t i = 0; i < n; i++) {
        if (strstr(tensor, "c_proj.weight") || !strcmp(tensor, "lm_head.weight")) x[i] = 0;
        if (golden_kind(tensor) == GOLDEN_GATE || !strcmp(tensor, "smear.lambda")) x[i] = 0;
        if (strstr(tensor, ".lambdas")) x[i] = i > 0 ? 0 : normuon ? 1.1 : 1;
        if (strstr(tensor, ".attn.lamb") || !strcmp(tensor, "backout.lambda")) x[i] = 0.5;
        if (!strcmp(tensor, "skip_weights")) x[i] = 1;
        if (!strcmp(tensor, "skip_gates")) x[i] = -1.5;
    }
    return x;
}

// ---- results ---------------------------------------------------------------------------------

typedef struct {
    char name[128];
    double* x;
    size_t count;
} GoldenResult;

typedef struct {
    GoldenResult* results;
    int count, capacity;
} GoldenResults;

static inline const GoldenResult* golden_result_find(const GoldenResults* r, const char* name) {
    for (int i = 0; i < r->count; i++) {
        if (!strcmp(r->results[i].name, name)) return &r->results[i];
    }
    return NULL;
}

// Room for a result, zeroed; the same name again returns the same room.
static inline double* golden_result(GoldenResults* r, const char* name, size_t count) {
    const GoldenResult* known = golden_result_find(r, name);
    if (known) return known->x;
    if (r->count == r->capacity) {
        r->capacity = r->capacity ? 2 * r->capacity : 128;
        r->results = (GoldenResult*)realloc(r->results, r->capacity * sizeof(GoldenResult));
    }
    GoldenResult* result = &r->results[r->count++];
    memset(result, 0, sizeof *result);
    snprintf(result->name, sizeof result->name, "%s", name);
    result->x = test_doubles(count);
    result->count = count;
    return result->x;
}

static inline void golden_results_free(GoldenResults* r) {
    for (int i = 0; i < r->count; i++) free(r->results[i].x);
    free(r->results);
    memset(r, 0, sizeof *r);
}

// Length of what stands before the tensor's name: "grad.", "p6.", "sw1.b0.grad."; 0: it is no tensor's.
static inline size_t golden_prefix(const char* name) {
    int n = 0, number;
    if (sscanf(name, "sw%d.b%d.grad.%n", &number, &number, &n) == 2 && n > 0) return (size_t)n;
    if (!strncmp(name, "grad.", 5)) return 5;
    if (name[0] == 'p' && isdigit((unsigned char)name[1])) return strcspn(name, ".") + 1;
    return 0;
}

// The golden tensor t made of our results, n elements; start: of our start values. What we have no
// counterpart of (scalars that no layer uses) is the golden value itself. false: we have none of it.
static inline bool golden_gather(const GoldenCase* c, const GoldenVariant* v, const SafeTensor* t,
                                 const GoldenResults* r, double* got, double* start) {
    size_t n = (size_t)safe_elements(t), prefix = golden_prefix(t->name);
    size_t width = t->dims ? (size_t)t->shape[t->dims - 1] : 1;
    const char* tensor = t->name + prefix;
    bool named = false, found = false;
    for (size_t i = 0; i < n; i++) got[i] = start[i] = golden_value(t, i);
    for (int i = 0; i < GOLDEN_NAME_COUNT; i++) {
        const GoldenName* row = &GOLDEN_NAMES[i];
        int layer, layers = row->per_layer ? c->L : 1;
        if (row->recipe != c->recipe || !golden_matches(row->golden, tensor, &layer)) continue;
        named = true;
        for (int l = row->per_layer ? 0 : layer, end = l + layers; l < end; l++) {
            char name[80];
            size_t first, count;
            int length = snprintf(name, sizeof name, "%.*s", (int)prefix, t->name);
            snprintf(name + length, sizeof name - length, row->ours, l);
            const GoldenResult* result = golden_result_find(r, name);
            golden_place(row, l, n, &first, &count);
            if (!result && row->count) continue;
            if (!result) return false;
            REQUIRE(result->count == count, "%s has %zu elements, its part of the golden %s %zu", name, result->count,
                    t->name, count);
            double* begin = golden_start(c, v, name + prefix, count);
            golden_copy(got + first, result->x, count, width, row->transposed, true);
            golden_copy(start + first, begin, count, width, row->transposed, true);
            free(begin);
            found = true;
        }
    }
    if (named) return found;
    const GoldenResult* result = golden_result_find(r, t->name);
    if (!result || result->count != n) return false;
    memcpy(got, result->x, n * sizeof(double));
    if (prefix) {
        double* begin = golden_start(c, v, tensor, n);
        memcpy(start, begin, n * sizeof(double));
        free(begin);
    }
    return true;
}

// ---- what is allowed -------------------------------------------------------------------------

// A bound of 0 is not applied, except `exact`. Relative bounds are multiples of the golden rms.
typedef struct {
    double abs, max, rms;        // largest difference; the same over rms; rms over rms
    double share, share_over;    // at most this share of the elements off by more than share_over rms
    const char* why;             // not NULL: nothing to judge, and the reason
} GoldenBound;

static inline GoldenBound golden_bound(double abs, double max, double rms, double share,
                                       double share_over) {
    GoldenBound b = {abs, max, rms, share, share_over, NULL};
    return b;
}

static inline GoldenBound golden_not_judged(const char* why) {
    GoldenBound b = {0, 0, 0, 0, 0, why};
    return b;
}

// Step k of losses: k = 0..5, and 6 for val_loss. Before the first update nothing depends on Newton-Schulz.
static inline double golden_loss_bound(const GoldenCase* c, const GoldenVariant* v, int k, bool bf16) {
    bool modern = c->recipe == GOLDEN_MODERN;
    if (v->asis) return k == 6 ? 6e-2 : 3e-2;
    double bf16_ns = v->zeroinit ? 5e-3 : modern ? 2e-3 : 3e-3;
    // From zero output projections the first gradients have so low a rank that Newton-Schulz in bf16
    // and in float really go different ways: in one case 6.8353 and 6.8195 after a step.
    if (v->zeroinit && v->ns_bf16 != bf16 && k > 0) bf16_ns = 5e-2;
    // bf16 weights and activations besides: measured 1.8e-3 before the first update, 3.8e-3 (modern)
    // and 5.1e-3 behind it.
    if (bf16) return k == 0 ? 5e-3 : 4 * bf16_ns;
    if (v->ns_bf16 && k > 0) return bf16_ns;
    // A bf16 element of a table that rounds the other way is off by 2^-8, and the loss by some 1e-5; a
    // code of FP8 by up to 2^-3, and the loss of its token by 1e-2 (measured 1.3e-4 after six steps
    // between evaluations that differ in order alone).
    if ((v->embbf16 || v->adambf16) && k > 2) return 1e-4;
    if (v->fp8) return k > 0 ? 1e-3 : 5e-5;
    // unet from its own start: lambda and lamb gradients are rounding noise, which Adam's sign
    // amplifies from the second step on (measured 1e-4 at step 2, 8e-4 at step 5, 2.2e-3 val).
    if (v->zeroinit && c->recipe == GOLDEN_UNET && k > 1) return k == 6 ? 1e-2 : 5e-3;
    return 1e-5;
}

// How much more bf16 activations change than in the recipes of a few layers: sub3 and normuon have
// twelve, and their FP8 makes other codes of other activations.
static inline double golden_bf16_noise(const GoldenCase* c, const GoldenVariant* v) {
    return v->fp8 ? 3 : c->recipe >= GOLDEN_SUB3 ? 1.5 : 1;
}

// logits0, cos, sin, act.*, dact.*
static inline GoldenBound golden_activation_bound(const GoldenCase* c, const GoldenVariant* v,
                                                  const char* name, double rms, bool bf16) {
    bool logits = !strcmp(name, "logits0");
    const char* table = !strncmp(name, "val_", 4) ? name + 4 : name;
    // A cell of a bf16 table may round the other way with another library's cosine.
    if (!strcmp(table, "cos") || !strcmp(table, "sin")) {
        return v->rope_bf16 ? golden_bound(0x1p-8, 0, 0, 1e-3, 1e-6) : golden_bound(1e-5, 0, 0, 0, 0);
    }
    if (v->asis) return logits ? golden_bound(0, 0.3, 0.1, 0, 0) : golden_bound(0, 1.0, 0.1, 0, 0);
    double noise = golden_bf16_noise(c, v);
    if (bf16) return golden_bound(0, noise * (logits ? 0.1 : 0.2), noise * 0.02, 0, 0);
    // Logits are bf16 numbers there, of which a few round the other way, by 2^-8 of an element that is
    // up to ten times the rms. What a code of FP8 that rounds the other way changes: one of x, a row
    // of logits by some 1e-2 of their rms; one of the gradient, the gradient of one token.
    if (v->fp8 && logits) return golden_bound(0, 0.1, 3e-3, 1e-2, 1e-3);
    if (v->fp8 && name[0] == 'd') return golden_bound(0, 0.1, 1e-3, 0, 0);
    double typical = c->recipe == GOLDEN_MODERN ? 0.58 : 0.2, suggested = c->recipe == GOLDEN_MODERN ? 5e-5 : 1e-5;
    return logits ? golden_bound(suggested * (rms > typical ? rms / typical : 1), 0, 0, 0, 0)
                  : golden_bound(0, 2e-4, 0, 0, 0);
}

static inline GoldenBound golden_gradient_bound(const GoldenCase* c, const GoldenVariant* v, int kind, size_t n,
                                                bool bf16) {
    if (v->asis) return golden_bound(0, 0.5, 0, 0, 0);
    // sub3, normuon: the gradient of a lambda is a sum that cancels to a hundredth of its terms, because
    // the loss hardly changes when the whole stream is scaled, and what bf16 rounds is as large. Measured
    // 0.66 of one lambda and 0.7 of one of normuon's scalars; an evaluation in double that rounds every
    // stored tensor to bf16 comes to 0.56 and 0.55.
    if (bf16 && kind == GOLDEN_SCALARS && c->recipe >= GOLDEN_SUB3) {
        return n < 16 ? golden_bound(0, 0, 1.5, 0, 0) : golden_bound(0, 1.5, 0.35, 0, 0);
    }
    if (bf16 && n < 16) return golden_bound(0, 0, 0.25, 0, 0);
    if (bf16) return golden_bound(0, golden_bf16_noise(c, v) * 0.3, golden_bf16_noise(c, v) * 0.05, 0, 0);
    // One code in 10^5 rounds the other way: a row of the head's gradient moves by 1e-2 of its rms.
    if (v->fp8) return golden_bound(0, 0.1, n < 16 ? 0 : 2e-3, 0, 0);
    return golden_bound(0, 5e-4, n < 16 ? 0 : 2e-5, 0, 0);
}

// p<k>.<tensor>: of the update since the start
static inline GoldenBound golden_update_bound(const GoldenCase* c, const GoldenVariant* v, int k, int kind,
                                              bool bf16) {
    bool modern = c->recipe == GOLDEN_MODERN, sub3 = c->recipe == GOLDEN_SUB3;
    bool noise = v->ns_bf16 || bf16;
    bool drifts = v->zeroinit && c->recipe == GOLDEN_UNET && k > 1;
    if (drifts && kind == GOLDEN_SCALARS) return golden_not_judged("its gradients are rounding noise");
    if (v->asis) return golden_bound(0, 0, 1.0, 0, 0);
    // The few codes that round the other way change every gradient by 1e-4 of its rms; where Adam and
    // NorMuon go by its sign, as many elements turn. Measured 9e-3 (tables 1.4e-2, scalars 2.4e-2).
    if (v->fp8 && !bf16) return golden_bound(0, 0, kind == GOLDEN_MATRIX ? 2e-2 : 5e-2, 0, 0);
    if (kind == GOLDEN_MATRIX) {
        // Newton-Schulz in bf16 on one side at least: few singular values of these gradients are
        // large, and bf16 turns the small ones into noise, which the iteration blows up. Measured
        // 0.24, and 0.41 for gradients of less than full rank; an evaluation with the very same
        // roundings, but other sums, differs by 0.05 and 0.12. sub3 and normuon: measured 0.08.
        if (noise && !bf16 && c->recipe >= GOLDEN_SUB3) return golden_bound(0, 0, 0.15, 0, 0);
        if (noise) return golden_bound(0, 0, v->zeroinit ? 0.8 : c->B * c->T < c->C ? 0.6 : 0.35, 0, 0);
        if (drifts) return golden_bound(0, 0, 6e-2, 0, 0);
        if (!modern && !sub3) return golden_bound(0, 0, 2e-3, 1e-3, 1e-2);
        return k == 1 ? golden_bound(0, 2e-3, 2e-4, 0, 0) : golden_bound(0, 5e-3, 5e-4, 0, 0);
    }
    // Of normuon: matrices with few rows, in which the same noise is a large share. Measured 0.2; with bf16
    // activations 0.74 (0.64 by the evaluation in double that rounds what is stored).
    if (kind == GOLDEN_GATE) return golden_bound(0, 0, bf16 ? 1.2 : noise ? 0.4 : 2e-3, 0, 0);
    bool turned = bf16 && sub3 && kind == GOLDEN_SCALARS;
    if (turned && k == 1) return golden_not_judged("its step is the sign of a gradient that bf16 turns");
    if (turned) return golden_bound(0, 0, 1.0, 0, 0);
    if (bf16 && c->recipe >= GOLDEN_SUB3) return golden_bound(0, 0, 0.25, 0, 0);
    if (bf16 || (noise && k > 1)) return golden_bound(0, 0, v->zeroinit ? 0.25 : 0.15, 0, 0);
    if (drifts) return golden_bound(0, 0, 3e-2, 0, 0);
    if (kind == GOLDEN_SCALARS) return golden_bound(0, 0, 1e-3, 0, 0);
    if (v->embbf16 || v->adambf16) return golden_bound(0, 0, 2e-3, 1e-2, 1e-3);
    // One element of 50,000 that turns at its first step is 9e-3 of the rms.
    if (c->recipe == GOLDEN_NORMUON) return golden_bound(0, 0, 1e-2, 2e-3, 1e-3);
    return modern || sub3 ? golden_bound(0, 0, 1e-3, 1e-3, 1e-3) : golden_bound(0, 0, 2e-3, 2e-3, 1e-3);
}

// name: of a tensor in a result file. rms: of the golden tensor. n: its elements.
static inline GoldenBound golden_bound_of(const GoldenCase* c, const GoldenVariant* v,
                                          const char* name, double rms, size_t n, bool bf16) {
    int kind = golden_kind(name + golden_prefix(name));
    if (!strncmp(name, "grad.", 5)) return golden_gradient_bound(c, v, kind, n, bf16);
    if (!golden_prefix(name)) return golden_activation_bound(c, v, name, rms, bf16);
    return golden_update_bound(c, v, atoi(name + 1), kind, bf16);
}

// ---- comparison ------------------------------------------------------------------------------

// Set by programs in which these comparisons are a group among others: what passes is not printed.
static bool golden_quiet;

static inline bool golden_row(const char* name, const char* measure, double err, double allowed) {
    bool ok = err <= allowed;                    // false for a NaN
    test_record(ok, allowed > 0 ? err / allowed : 0);
    if (!ok || !golden_quiet) {
        printf("%s  %-32s %-9s %9.2e of %9.2e\n", ok ? "ok  " : "FAIL", name, measure, err, allowed);
    }
    return ok;
}

// One tensor of a file; p<k>.<tensor> is judged as an update of the tensor's start value.
static inline void golden_judge(const GoldenCase* c, const GoldenVariant* v, const SafeTensor* t,
                                const double* got, const double* start, bool bf16) {
    size_t n = (size_t)safe_elements(t);
    double* want = golden_doubles(t);
    double sum = 0, sum_err = 0, max = 0;
    int window, batch, skip = 0;
    sscanf(t->name, "sw%d.b%d.%n", &window, &batch, &skip);
    const char* name = t->name + skip;
    bool update = name[0] == 'p';
    for (size_t i = 0; i < n; i++) {
        double reference = want[i] - (update ? start[i] : 0), err = fabs(got[i] - want[i]);
        // A golden gradient in bf16 is rounded; ours is not.
        if (t->type == SAFE_BF16 && !strncmp(name, "grad.", 5) && err > 0) {
            double slack = 0x1p-8 * fabs(want[i]);
            err = err > slack ? err - slack : 0;
        }
        sum += reference * reference;
        sum_err += err * err;
        if (!(err <= max)) max = err;
    }
    double rms = sqrt(sum / n), rms_err = sqrt(sum_err / n);
    GoldenBound b = golden_bound_of(c, v, name, rms, n, bf16);
    if (b.why) {
        if (!golden_quiet) printf("--    %-32s not judged: %s\n", t->name, b.why);
    } else if (rms == 0 && b.abs == 0) {
        golden_row(t->name, "exact", max, 0);    // what is zero there has to be zero here
    } else {
        if (b.abs > 0) golden_row(t->name, "abs", max, b.abs);
        if (b.max > 0) golden_row(t->name, "max/rms", max / rms, b.max);
        if (b.rms > 0) golden_row(t->name, "rms/rms", rms_err / rms, b.rms);
        if (b.share > 0) {
            size_t off = 0;
            for (size_t i = 0; i < n; i++) {
                if (!(fabs(got[i] - want[i]) <= b.share_over * rms)) off++;
            }
            golden_row(t->name, "outliers", (double)off / n, b.share);
        }
    }
    free(want);
}

// loss, loss0, val_loss, sw<n>.b<i>.loss; normuon's losses of a training batch are sums over its tokens.
static inline void golden_judge_losses(const GoldenCase* c, const GoldenVariant* v, const SafeTensor* t,
                                       const GoldenResult* found, bool bf16) {
    bool many = !strcmp(t->name, "loss"), val = !strcmp(t->name, "val_loss");
    double unit = c->recipe == GOLDEN_NORMUON && !val ? c->B * c->T : 1;
    for (size_t k = 0; k < found->count; k++) {
        char row[80];
        if (many) snprintf(row, sizeof row, "loss[%zu]", k);
        else snprintf(row, sizeof row, "%s", t->name);
        golden_row(row, "abs", fabs(found->x[k] - golden_value(t, k) / unit),
                   golden_loss_bound(c, v, val ? 6 : (int)k, bf16));
    }
}

// mask.<window>[.dense] (T, T), or mask.<window>.blocks: 0 unseen, 1 seen in part, 2 wholly
static inline bool golden_judge_mask(const SafeTensor* t, const GoldenResults* r) {
    char name[16];
    snprintf(name, sizeof name, "mask.%.5s", t->name + 5);
    name[strcspn(name + 5, ".") + 5] = 0;
    const GoldenResult* mask = golden_result_find(r, name);
    if (!mask) return false;
    size_t T = (size_t)(sqrt((double)mask->count) + 0.5), cells = (size_t)t->shape[0], block = T / cells, wrong = 0;
    for (size_t i = 0; i < cells * cells; i++) {
        size_t seen = 0;
        for (size_t k = 0; k < block * block; k++) {
            seen += mask->x[(i / cells * block + k / block) * T + i % cells * block + k % block] != 0;
        }
        int code = block == 1 ? seen != 0 : seen == block * block ? 2 : seen != 0;
        wrong += code != (int)golden_value(t, i);
    }
    golden_row(t->name, "wrong", (double)wrong, 0);
    return true;
}

static inline bool golden_is_input(const char* name) {
    static const char* const INPUTS[] = {"momentum", "lr_mult", "attn_scale", "ws_short", "ws_long"};
    for (size_t i = 0; i < sizeof INPUTS / sizeof INPUTS[0]; i++) if (!strcmp(name, INPUTS[i])) return true;
    return false;
}

// Every tensor of the file: judged, or listed as not compared.
static inline void golden_compare(const GoldenCase* c, const GoldenVariant* v, const SafeFile* f,
                                  const GoldenResults* r, bool bf16) {
    for (int i = 0; i < f->count; i++) {
        const SafeTensor* t = &f->tensors[i];
        if (golden_is_input(t->name)) continue;
        size_t n = (size_t)safe_elements(t);
        const char* last = strrchr(t->name, '.');
        const GoldenResult* found = golden_result_find(r, t->name);
        if (!strncmp(last ? last + 1 : t->name, "loss", 4) || !strcmp(t->name, "val_loss")) {
            if (found && found->count == n) {
                golden_judge_losses(c, v, t, found, bf16);
                continue;
            }
        } else if (!strncmp(t->name, "mask.", 5)) {
            if (golden_judge_mask(t, r)) continue;
        } else {
            double *got = test_doubles(n), *start = test_doubles(n);
            bool have = golden_gather(c, v, t, r, got, start);
            if (have) golden_judge(c, v, t, got, start, bf16);
            free(got);
            free(start);
            if (have) continue;
        }
        if (found) {
            printf("FAIL  %-32s has %zu elements, the golden one %zu\n", t->name, found->count, n);
            test_record(false, 0);
        } else {
            printf("--    %-32s not compared\n", t->name);
            test_state.skipped++;
        }
    }
}

// ---- a directory -----------------------------------------------------------------------------

// Fills r with everything it can of: loss0, logits0, act.*, dact.*, grad.*, cos, sin, mask.*; if
// v->train also loss, val_loss, p1.*, p2.*, p6.*; and what v->windows ask for.
typedef void (*GoldenRunner)(const GoldenCase* c, const GoldenVariant* v, GoldenResults* r);

enum { GOLDEN_MAX_FILES = 64 };

// "f32.pe_f32.train.safetensors" is of the numerics "f32", and says how Polar Express is computed;
// "f32.acts.safetensors" does not, because nothing in it depends on that.
static inline void golden_numerics(const char* file, char* numerics, char* ns, size_t size) {
    static const char* const CONTENTS[] = {"acts", "grads", "train", "p6", "windows", "safetensors"};
    char copy[256];
    snprintf(copy, sizeof copy, "%s", file);
    numerics[0] = ns[0] = 0;
    for (char* word = strtok(copy, "."); word; word = strtok(NULL, ".")) {
        bool content = false;
        for (size_t i = 0; i < sizeof CONTENTS / sizeof CONTENTS[0]; i++) content |= !strcmp(word, CONTENTS[i]);
        if (content) continue;
        bool is_ns = !strncmp(word, "ns_", 3) || !strncmp(word, "pe_", 3);
        char* to = is_ns ? ns : numerics;
        size_t length = strlen(to);
        snprintf(to + length, size - length, "%s.", word);
    }
}

static inline bool golden_same_run(const char* a, const char* b) {
    char numerics[2][256], ns[2][256];
    golden_numerics(a, numerics[0], ns[0], sizeof ns[0]);
    golden_numerics(b, numerics[1], ns[1], sizeof ns[1]);
    return !strcmp(numerics[0], numerics[1]) && (!ns[0][0] || !ns[1][0] || !strcmp(ns[0], ns[1]));
}

// Files that say most of the run first: those of training, and of these the ones in float.
static inline int golden_file_order(const void* a, const void* b) {
    const char *x = (const char*)a, *y = (const char*)b;
    bool x_train = strstr(x, ".train."), y_train = strstr(y, ".train.");
    if (x_train != y_train) return x_train ? -1 : 1;
    bool x_bf16 = strstr(x, "s_bf16.") || strstr(x, "e_bf16."), y_bf16 = strstr(y, "s_bf16.") || strstr(y, "e_bf16.");
    if (x_bf16 != y_bf16) return x_bf16 ? 1 : -1;
    return strcmp(x, y);
}

// Beginnings of the names of the files to take, between colons, and with each the others of its run;
// NULL: all. To save time.
static const char* golden_only;

static inline bool golden_wanted(const char* file) {
    if (!golden_only) return true;
    for (const char* name = golden_only; name; name = strchr(name, ':')) {
        if (*name == ':') name++;
        if (!strncmp(file, name, strcspn(name, ":"))) return true;
    }
    return false;
}

static inline void golden_run(const char* dir, GoldenRunner run, bool bf16) {
    GoldenCase c;
    golden_case_open(&c, dir);
    static char names[GOLDEN_MAX_FILES][256];
    SafeFile files[GOLDEN_MAX_FILES];
    bool done[GOLDEN_MAX_FILES] = {false};
    int count = 0, runs = 0;
    DIR* d = opendir(dir);
    if (!d) die("%s: cannot be opened: %s", dir, strerror(errno));
    for (struct dirent* e = readdir(d); e && count < GOLDEN_MAX_FILES; e = readdir(d)) {
        if (strstr(e->d_name, ".safetensors") && strcmp(e->d_name, "init.safetensors")) {
            snprintf(names[count++], sizeof names[0], "%s", e->d_name);
        }
    }
    closedir(d);
    if (count == 0) die("%s: has no result file beside init.safetensors", dir);
    qsort(names, count, sizeof names[0], golden_file_order);
    for (int i = 0; i < count; i++) {
        GoldenVariant v;
        GoldenResults r;
        int members[GOLDEN_MAX_FILES], member_count = 0;
        if (done[i] || !golden_wanted(names[i])) continue;
        runs++;
        for (int k = i; k < count; k++) {
            char path[1024];
            if (done[k] || !golden_same_run(names[i], names[k])) continue;
            done[k] = true;
            members[member_count++] = k;
            snprintf(path, sizeof path, "%s/%.255s", dir, names[k]);
            safetensors_open(&files[k], path);
            if (k == i) golden_variant_read(&v, &c, &files[k]);
            golden_variant_add(&v, &files[k]);
        }
        memset(&r, 0, sizeof r);
        run(&c, &v, &r);
        for (int k = 0; k < member_count; k++) {
            SafeFile* f = &files[members[k]];
            if (!golden_quiet) {
                printf("%s  %s V=%d C=%d H=%d L=%d T=%d B=%d, computed in %s\n", f->path, GOLDEN_RECIPES[c.recipe],
                       c.V, c.C, v.H, c.L, c.T, c.B, bf16 ? "bf16" : "fp32");
            }
            golden_compare(&c, &v, f, &r, bf16);
            safetensors_close(f);
        }
        golden_results_free(&r);
        fflush(stdout);
    }
    REQUIRE(runs > 0, "%s: no file's name begins with one of %s", dir, golden_only);
    golden_case_close(&c);
}
