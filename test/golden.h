/*
Golden cases: what the published recipes computed, and how near we have to come.

A case is a directory with `init.safetensors` (parameters and seven batches) and result files, one
per variant of the numerics, in safetensors layout:

    u64 n, little endian | n bytes of JSON | data
    JSON: {"name": {"dtype": "F32", "shape": [..], "data_offsets": [begin, end]}, ...,
           "__metadata__": {"key": "value", ...}}, offsets counted from the end of the JSON

    init.safetensors              param.<tensor>, tokens.0..6, targets.0..6
    <variant>.acts.safetensors    logits0, loss0, act.*, dact.*, cos, sin: step 0
    <variant>.grads.safetensors   grad.<tensor> of step 0
    <variant>.train.safetensors   loss [6], val_loss [1], p<k>.<tensor> after k steps

Step i trains on batch i; batch 6 is evaluated after the sixth step. Everything is read from the
files: recipe and sizes from the names and shapes in init, hyperparameters from its metadata, the
variant from the name of the file. Words of a variant, separated by dots:

    rope_f32 rope_bf16   cos and sin as float, or rounded to bf16
    ns_f32 ns_bf16       Newton-Schulz in float, or in bf16 with every operation rounded
    zeroinit             output projections (and head) zero, scalars at the recipe's start
    embbf16              wte and scalars stored in bf16 without a master, gradients rounded once
    asis                 bf16 activations and the epsilon of that time: a bound of sanity only

A runner (the oracle, or the trainer) fills a table of arrays under the same names; golden_compare
judges every tensor of the file and lists what it has no rule for as not compared.

How the tolerances came about. Two right evaluations of one case differ by the order of their sums.
That was measured for each kind of quantity (one thread, two threads, reversed sums, double); the
bounds here are 5 to 50 times the largest difference seen. max and rms are of the difference,
relative to the rms of the golden tensor; for parameters, of the update since the start. Adam's
first steps are nearly lr sign(g), so an element whose gradient is rounding noise may flip by 2 lr:
tables are judged by rms and by the share of elements that are off, never by the maximum.
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
        case SAFE_BF16:
            half = ((const uint16_t*)t->data)[i];
            bits = (uint32_t)half << 16;
            memcpy(&x, &bits, sizeof x);
            return x;
        default: die("golden tensor %s is %s, wanted F32, BF16 or I32", t->name, SAFE_TYPE_NAME[t->type]);
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

// ---- a case ----------------------------------------------------------------------------------

enum { GOLDEN_STEPS = 6 };
enum { GOLDEN_MODERN, GOLDEN_UNTIED, GOLDEN_UNET };   // the numbers of the oracle's recipes

typedef struct {
    char dir[400];
    SafeFile init;
    int recipe, V, C, H, L, B, T;
    double lr_wte, lr_head, lr_scalar, lr_muon, adam_beta1, adam_beta2, adam_eps;
    double lr_mult[GOLDEN_STEPS], momentum[GOLDEN_STEPS];
} GoldenCase;

// Whether the tensor is a matrix that Muon updates, a table or a small tensor (both Adam).
enum { GOLDEN_MATRIX, GOLDEN_TABLE, GOLDEN_SCALARS };

static inline int golden_kind(const char* tensor) {
    if (strstr(tensor, ".attn.c_") || strstr(tensor, ".mlp.c_")) return GOLDEN_MATRIX;
    if (!strcmp(tensor, "wte.weight") || !strcmp(tensor, "lm_head.weight")) return GOLDEN_TABLE;
    return GOLDEN_SCALARS;
}

static inline const int* golden_batch(const GoldenCase* c, const char* which, int i) {
    char name[32];
    snprintf(name, sizeof name, "%s.%%d", which);
    const SafeTensor* t = golden_need(&c->init, name, i);
    REQUIRE(t->type == SAFE_I32 && safe_elements(t) == (int64_t)c->B * c->T,
            "%s: %s.%d is no I32 of the size of batch 0", c->init.path, which, i);
    return (const int*)t->data;
}

static inline void golden_case_open(GoldenCase* c, const char* dir) {
    char path[512];
    memset(c, 0, sizeof *c);
    snprintf(c->dir, sizeof c->dir, "%s", dir);
    snprintf(path, sizeof path, "%s/init.safetensors", c->dir);
    safetensors_open(&c->init, path);
    const SafeFile* f = &c->init;
    const SafeTensor* wte = safetensors_find(f, "param.wte.weight");
    REQUIRE(wte && safetensors_find(f, "param.h.0.attn.c_q.weight"),
            "%s: is of a recipe that is not modern, untied or unet", path);
    c->recipe = !safetensors_find(f, "param.lm_head.weight") ? GOLDEN_MODERN
              : !safetensors_find(f, "param.skip_weights") ? GOLDEN_UNTIED : GOLDEN_UNET;
    c->V = (int)wte->shape[0], c->C = (int)wte->shape[1];
    for (int l = 0; l < 1000; l++) {
        char name[64];
        snprintf(name, sizeof name, "param.h.%d.attn.c_q.weight", l);
        if (!safetensors_find(f, name)) break;
        c->L = l + 1;
    }
    const SafeTensor* tokens = golden_need(f, "tokens.%d", 0);
    c->B = tokens->dims == 2 ? (int)tokens->shape[0] : 1;
    c->T = (int)tokens->shape[tokens->dims - 1];
    c->H = (int)golden_number(f, "n_head", c->C / golden_number(f, "head_dim", 0x1p-20));
    REQUIRE(c->H >= 1 && c->C % c->H == 0, "%s: %d heads do not divide the width %d", path, c->H, c->C);
    bool modern = c->recipe == GOLDEN_MODERN;
    c->lr_wte = golden_number(f, modern ? "adamw_lr" : "lr_wte", NAN);
    c->lr_head = golden_number(f, "lr_head", modern ? 0 : NAN);
    c->lr_scalar = golden_number(f, "lr_scalar", c->recipe == GOLDEN_UNET ? NAN : 0);
    c->lr_muon = golden_number(f, "muon_lr", NAN);
    c->adam_beta1 = golden_number(f, modern ? "adamw_b1" : "adam_b1", NAN);
    c->adam_beta2 = golden_number(f, modern ? "adamw_b2" : "adam_b2", NAN);
    c->adam_eps = golden_number(f, modern ? "adamw_eps" : "adam_eps", NAN);
    // unet: 0.85 + 0.10 min(step / 500, 1); written as that formula in the metadata
    for (int i = 0; i < GOLDEN_STEPS; i++) {
        bool warm_up = c->recipe == GOLDEN_UNET;
        c->momentum[i] = warm_up ? 0.85 + 0.10 * i / 500.0 : golden_number(f, "muon_momentum", NAN);
        c->lr_mult[i] = 1.0;
    }
}

static inline void golden_case_close(GoldenCase* c) {
    safetensors_close(&c->init);
}

// ---- a variant -------------------------------------------------------------------------------

typedef struct {
    char name[512];                  // file name without .safetensors
    bool rope_bf16, ns_bf16, zeroinit, embbf16, asis, train;
    double lr_mult[GOLDEN_STEPS], momentum[GOLDEN_STEPS];
    bool lr_mult_given;              // the steps are not the first ones of a run
} GoldenVariant;

static inline bool golden_word(const char* name, const char* word) {
    size_t n = strlen(word);
    for (const char* p = strstr(name, word); p; p = strstr(p + 1, word)) {
        if ((p == name || p[-1] == '.') && (p[n] == '.' || p[n] == 0)) return true;
    }
    return false;
}

// Every number in a text: "1,0.5", "[1.0, 0.5]". Returns how many.
static inline int golden_list(const char* text, double* out, int max) {
    int n = 0;
    while (*text && n < max) {
        char* end;
        double x = strtod(text, &end);
        if (end != text) out[n++] = x;
        text = end != text ? end : text + 1;
    }
    return n;
}

static inline void golden_variant_read(GoldenVariant* v, const GoldenCase* c, const SafeFile* f) {
    memset(v, 0, sizeof *v);
    const char* slash = strrchr(f->path, '/');
    snprintf(v->name, sizeof v->name, "%s", slash ? slash + 1 : f->path);
    char* end = strstr(v->name, ".safetensors");
    if (end) *end = 0;
    const char *rope = safetensors_metadata(f, "rope"), *ns = safetensors_metadata(f, "ns");
    const char* list = safetensors_metadata(f, "lr_mult");
    if (!ns) ns = safetensors_metadata(f, "nsp");
    REQUIRE(rope, "%s: the metadata has no rope", f->path);
    v->rope_bf16 = !strcmp(rope, "bf16");
    v->ns_bf16 = ns && !strcmp(ns, "bf16");
    v->zeroinit = golden_word(v->name, "zeroinit");
    v->embbf16 = golden_word(v->name, "embbf16");
    v->asis = golden_word(v->name, "asis");
    v->train = safetensors_find(f, "loss") != NULL;
    bool contradicts = golden_word(v->name, v->rope_bf16 ? "rope_f32" : "rope_bf16") ||
                       golden_word(v->name, v->ns_bf16 ? "ns_f32" : "ns_bf16");
    REQUIRE(!contradicts, "%s: the name and the metadata's rope or ns contradict each other", f->path);
    memcpy(v->momentum, c->momentum, sizeof v->momentum);
    memcpy(v->lr_mult, c->lr_mult, sizeof v->lr_mult);
    const SafeTensor* momentum = safetensors_find(f, "momentum");
    for (int i = 0; momentum && i < GOLDEN_STEPS; i++) v->momentum[i] = golden_value(momentum, i);
    const SafeTensor* lr_mult = safetensors_find(f, "lr_mult");
    for (int i = 0; lr_mult && i < GOLDEN_STEPS; i++) v->lr_mult[i] = golden_value(lr_mult, i);
    v->lr_mult_given = list || lr_mult;
    int numbers = list ? golden_list(list, v->lr_mult, GOLDEN_STEPS) : GOLDEN_STEPS;
    REQUIRE(numbers == GOLDEN_STEPS, "%s: lr_mult '%s' is not a list of %d numbers", f->path, list,
            GOLDEN_STEPS);
}

// The start value of a tensor in a variant; the caller frees it.
static inline double* golden_start(const GoldenCase* c, const GoldenVariant* v, const char* tensor) {
    char name[64];
    snprintf(name, sizeof name, "param.%s", tensor);
    const SafeTensor* t = golden_need(&c->init, name, 0);
    double* x = golden_doubles(t);
    if (!v->zeroinit) return x;
    for (int64_t i = 0; i < safe_elements(t); i++) {
        if (strstr(tensor, "c_proj.weight") || !strcmp(tensor, "lm_head.weight")) x[i] = 0;
        if (strstr(tensor, ".lambdas")) x[i] = i == 0 ? 1 : 0;
        if (strstr(tensor, ".lamb") && !strstr(tensor, ".lambdas")) x[i] = 0.5;
        if (!strcmp(tensor, "skip_weights")) x[i] = 1;
    }
    return x;
}

// ---- results ---------------------------------------------------------------------------------

typedef struct {
    char name[64];
    double* x;
    size_t count;
} GoldenResult;

typedef struct {
    GoldenResult* results;
    int count, capacity;
} GoldenResults;

// Room for a result, zeroed; the same name again returns the same room.
static inline double* golden_result(GoldenResults* r, const char* name, size_t count) {
    for (int i = 0; i < r->count; i++) {
        if (!strcmp(r->results[i].name, name)) return r->results[i].x;
    }
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

static inline const GoldenResult* golden_result_find(const GoldenResults* r, const char* name) {
    for (int i = 0; i < r->count; i++) {
        if (!strcmp(r->results[i].name, name)) return &r->results[i];
    }
    return NULL;
}

static inline void golden_results_free(GoldenResults* r) {
    for (int i = 0; i < r->count; i++) free(r->results[i].x);
    free(r->results);
    memset(r, 0, sizeof *r);
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
    // A bf16 element of a table that rounds the other way is off by 2^-8, and the loss by some 1e-5.
    if (v->embbf16 && k > 2) return 1e-4;
    // unet from its own start: lambda and lamb gradients are rounding noise, which Adam's sign
    // amplifies from the second step on (measured 1e-4 at step 2, 8e-4 at step 5, 2.2e-3 val).
    if (v->zeroinit && c->recipe == GOLDEN_UNET && k > 1) return k == 6 ? 1e-2 : 5e-3;
    return 1e-5;
}

// name: of a tensor in a result file. rms: of the golden tensor. n: its elements.
static inline GoldenBound golden_bound_of(const GoldenCase* c, const GoldenVariant* v,
                                          const char* name, double rms, size_t n, bool bf16) {
    bool modern = c->recipe == GOLDEN_MODERN;
    const char* dot = strchr(name, '.');
    if (!strcmp(name, "logits0")) {
        if (v->asis) return golden_bound(0, 0.3, 0.05, 0, 0);
        if (bf16) return golden_bound(0, 0.1, 0.02, 0, 0);
        double typical = modern ? 0.58 : 0.2, suggested = modern ? 5e-5 : 1e-5;
        return golden_bound(suggested * (rms > typical ? rms / typical : 1), 0, 0, 0, 0);
    }
    if (!strcmp(name, "cos") || !strcmp(name, "sin")) {
        return golden_bound(v->rope_bf16 ? 0x1p-8 : 1e-5, 0, 0, 0, 0);
    }
    if (!strncmp(name, "act.", 4) || !strncmp(name, "dact.", 5)) {
        if (bf16) return golden_bound(0, 0.2, 0.02, 0, 0);
        return golden_bound(0, 2e-4, 0, 0, 0);
    }
    bool scalars = golden_kind(dot + 1) == GOLDEN_SCALARS;
    if (!strncmp(name, "grad.", 5)) {
        if (v->asis) return golden_bound(0, 0.5, 0, 0, 0);
        if (bf16) return n < 16 ? golden_bound(0, 0, 0.25, 0, 0) : golden_bound(0, 0.3, 0.05, 0, 0);
        return golden_bound(0, 5e-4, n < 16 ? 0 : 2e-5, 0, 0);
    }
    // p<k>.<tensor>: of the update since the start
    int k = atoi(name + 1);
    bool noise = v->ns_bf16 || bf16;
    bool drifts = v->zeroinit && c->recipe == GOLDEN_UNET && k > 1;
    if (drifts && scalars) {
        GoldenBound b = golden_bound(0, 0, 0, 0, 0);
        b.why = "its gradients are rounding noise";
        return b;
    }
    if (v->asis) return golden_bound(0, 0, 1.0, 0, 0);
    if (golden_kind(dot + 1) == GOLDEN_MATRIX) {
        // Newton-Schulz in bf16 on one side at least: few singular values of these gradients are
        // large, and bf16 turns the small ones into noise, which the iteration blows up. Measured
        // 0.24, and 0.41 for gradients of less than full rank; an evaluation with the very same
        // roundings, but other sums, differs by 0.05 and 0.12.
        if (noise) return golden_bound(0, 0, v->zeroinit ? 0.8 : c->B * c->T < c->C ? 0.6 : 0.35, 0, 0);
        if (drifts) return golden_bound(0, 0, 6e-2, 0, 0);
        if (!modern) return golden_bound(0, 0, 2e-3, 1e-3, 1e-2);
        return k == 1 ? golden_bound(0, 2e-3, 2e-4, 0, 0) : golden_bound(0, 5e-3, 5e-4, 0, 0);
    }
    if (bf16 || (noise && k > 1)) return golden_bound(0, 0, v->zeroinit ? 0.25 : 0.15, 0, 0);
    if (drifts) return golden_bound(0, 0, 3e-2, 0, 0);
    if (scalars) return golden_bound(0, 0, 1e-3, 0, 0);
    if (v->embbf16) return golden_bound(0, 0, 2e-3, 1e-2, 1e-3);
    return modern ? golden_bound(0, 0, 1e-3, 1e-3, 1e-3) : golden_bound(0, 0, 2e-3, 2e-3, 1e-3);
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
                                const double* got, bool bf16) {
    size_t n = (size_t)safe_elements(t);
    double* want = golden_doubles(t);
    double* start = NULL;
    if (t->name[0] == 'p' && isdigit((unsigned char)t->name[1])) {
        start = golden_start(c, v, strchr(t->name, '.') + 1);
    }
    double sum = 0, sum_err = 0, max = 0;
    for (size_t i = 0; i < n; i++) {
        double reference = want[i] - (start ? start[i] : 0), err = fabs(got[i] - want[i]);
        // A golden gradient in bf16 is rounded; ours is not.
        if (t->type == SAFE_BF16 && !start && err > 0) {
            double slack = 0x1p-8 * fabs(want[i]);
            err = err > slack ? err - slack : 0;
        }
        sum += reference * reference;
        sum_err += err * err;
        if (!(err <= max)) max = err;
    }
    double rms = sqrt(sum / n), rms_err = sqrt(sum_err / n);
    GoldenBound b = golden_bound_of(c, v, t->name, rms, n, bf16);
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
    free(start);
}

// Every tensor of the file: judged, or listed as not compared.
static inline void golden_compare(const GoldenCase* c, const GoldenVariant* v, const SafeFile* f,
                                  const GoldenResults* r, bool bf16) {
    for (int i = 0; i < f->count; i++) {
        const SafeTensor* t = &f->tensors[i];
        if (!strcmp(t->name, "momentum") || !strcmp(t->name, "lr_mult")) continue;   // read as input
        const GoldenResult* found = golden_result_find(r, t->name);
        if (!found) {
            printf("--    %-32s not compared\n", t->name);
            test_state.skipped++;
            continue;
        }
        size_t n = (size_t)safe_elements(t);
        if (found->count != n) {
            printf("FAIL  %-32s has %zu elements, the golden one %zu\n", t->name, found->count, n);
            test_record(false, 0);
            continue;
        }
        bool loss = !strcmp(t->name, "loss"), val = !strcmp(t->name, "val_loss");
        if (loss || val || !strcmp(t->name, "loss0")) {
            for (size_t k = 0; k < n; k++) {
                char row[48];
                snprintf(row, sizeof row, loss ? "loss[%zu]" : val ? "val_loss" : "loss0", k);
                golden_row(row, "abs", fabs(found->x[k] - golden_value(t, k)),
                           golden_loss_bound(c, v, val ? 6 : (int)k, bf16));
            }
            continue;
        }
        golden_judge(c, v, t, found->x, bf16);
    }
}

// ---- a directory -----------------------------------------------------------------------------

// Fills r with everything it can of: loss0, logits0, act.*, dact.*, grad.*, cos, sin; and if
// v->train also loss, val_loss, p1.*, p2.*, p6.*.
typedef void (*GoldenRunner)(const GoldenCase* c, const GoldenVariant* v, GoldenResults* r);

static inline int golden_file_order(const void* a, const void* b) {
    return strcmp((const char*)a, (const char*)b);
}

static inline void golden_run(const char* dir, GoldenRunner run, bool bf16) {
    GoldenCase c;
    golden_case_open(&c, dir);
    static char files[64][256];
    int count = 0;
    DIR* d = opendir(dir);
    if (!d) die("%s: cannot be opened: %s", dir, strerror(errno));
    for (struct dirent* e = readdir(d); e && count < 64; e = readdir(d)) {
        if (strstr(e->d_name, ".safetensors") && strcmp(e->d_name, "init.safetensors")) {
            snprintf(files[count++], sizeof files[0], "%s", e->d_name);
        }
    }
    closedir(d);
    if (count == 0) die("%s: has no result file beside init.safetensors", dir);
    qsort(files, count, sizeof files[0], golden_file_order);
    static const char* recipes[] = {"modern", "untied", "unet"};
    for (int i = 0; i < count; i++) {
        char path[1024];
        SafeFile f;
        GoldenVariant v;
        GoldenResults r;
        memset(&r, 0, sizeof r);
        snprintf(path, sizeof path, "%s/%.255s", dir, files[i]);
        safetensors_open(&f, path);
        golden_variant_read(&v, &c, &f);
        if (!golden_quiet) {
            printf("%s  %s V=%d C=%d H=%d L=%d T=%d B=%d, computed in %s\n", path, recipes[c.recipe],
                   c.V, c.C, c.H, c.L, c.T, c.B, bf16 ? "bf16" : "fp32");
        }
        run(&c, &v, &r);
        golden_compare(&c, &v, &f, &r, bf16);
        golden_results_free(&r);
        safetensors_close(&f);
        fflush(stdout);
    }
    golden_case_close(&c);
}
