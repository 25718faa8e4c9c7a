/*
GPT-2 as the records of the speedrun have it: the model as data, forward, backward, update.

In the order of the tokens' journey:
  - token embedding, no position embedding; in some recipes normalised, in one tied to the head
  - L layers of  x += attention(rms(x)),  x += mlp(rms(x));  RMSNorm without gain
  - attention: QK-norm, rotary positions, causal, head dim 32, 64 or 128
  - MLP: ReLU² between a matrix to 4C channels and one back
  - options of a recipe, all off in the plain one: skips between layers, learned mixes with the
    embedding and of the values with layer 0's or with looked-up ones, gates, documents and windows
    that limit what attention sees, a softcap on the logits, the head in 8 bits
  - matrices are trained by Muon or NorMuon, tables and scalars by Adam

Everything numeric lives in the other headers, one operation per header; here is what they are
called with, in what order. Tables come first: which parameters there are, what a layer is made of,
which activations have memory. Then the verbs, in the order of a step:

    model_build, model_start        sizes, owners, memory; streams, libraries, first values
    model_at                        what holds in this step (llmc/schedule.h)
    micro_step                      forward, classify, backward of one micro-batch
    step_measure, step_result       loss and norms of the step, over ranks; whether all is finite
    update                          Adam, Muon; nothing where the step was not finite
    evaluate                        validation loss

A step is queued without a wait: the host may be a step ahead of the device.

Letters: B sequences of T tokens in a micro-batch, N = B*T rows, C channels, H heads of D = C/H,
F = 4C, V columns of the vocabulary (V8: filled up to a multiple of 16), L layers.

test        test/test_model.cu, test/test_golden.cu, test/test_zero.cu
*/
#pragma once
#include <math.h>

#include "adamw.cuh"
#include "attention.cuh"
#include "common.h"
#include "dataloader.h"
#include "device.cuh"
#include "embedding.cuh"
#include "flags.h"
#include "fp8.cuh"
#include "gate.cuh"
#include "guard.cuh"
#include "init.cuh"
#include "loss.cuh"
#include "matmul.cuh"
#include "mix.cuh"
#include "muon.cuh"
#include "norm.cuh"
#include "params.cuh"
#include "relu2.cuh"
#include "rmsnorm.cuh"
#include "rng.h"
#include "rotary.cuh"
#include "saving.cuh"
#include "schedule.h"

// Tests look at intermediate tensors through this hook; in the trainer it is nothing.
#ifdef TRAIN_GPT2_NO_MAIN
static void (*probe)(const char* name, int layer, const floatX* tensor, int rows, int cols, int ld);
#define PROBE(name, layer, tensor, rows, cols, ld)                                                 \
    do { if (probe) probe(name, layer, tensor, rows, cols, ld); } while (0)
#else
#define PROBE(name, layer, tensor, rows, cols, ld) do { } while (0)
#endif

// The words of the flags are the enums of the kernels.
static_assert((int)FLAG_SOFTCAP_NONE == SOFTCAP_NONE && (int)FLAG_SOFTCAP_TANH == SOFTCAP_TANH &&
              (int)FLAG_SOFTCAP_SIGMOID == SOFTCAP_SIGMOID, "--softcap and SoftcapKind differ");
static_assert((int)FLAG_BATCHING_STREAM == BATCHING_STREAM &&
              (int)FLAG_BATCHING_STRIDED == BATCHING_STRIDED &&
              (int)FLAG_BATCHING_CONTIGUOUS == BATCHING_CONTIGUOUS &&
              (int)FLAG_BATCHING_START_ALIGNED == BATCHING_START_ALIGNED &&
              (int)FLAG_BATCHING_DOCUMENTS == BATCHING_DOCUMENTS, "--batching and Batching differ");
static_assert((int)FLAG_MUON_SCALE_MAX_DIM == MUON_SCALE_MAX_DIM &&
                  (int)FLAG_MUON_FORM_LERP == MUON_FORM_LERP,
              "--muon-scale or --muon-form and the enums of muon.cuh differ");

enum { MAX_LAYERS = 63 };

// ---- the model is data: parameters -------------------------------------------------------------

// A bank is a run of equal-shape tensors (llmc/params.cuh). The four square matrices of a layer lie
// side by side, so that Q, K and V are one (3C, C) matrix to the matmul and 4L problems of one shape
// to Muon. Adam's banks come first, in the order in which the next forward wants them.
typedef enum {
    BANK_EMBED, BANK_VALUES, BANK_HEAD, BANK_ATTN, BANK_MLP, BANK_GATES, BANK_SMEAR_GATE,
    BANK_LAMBDAS, BANK_LAMB, BANK_SKIP, BANK_ATTN_LAMBDAS, BANK_SKIP_GATES, BANK_SMEAR,
    BANK_BACKOUT, BANKS
} BankId;

static const struct { const char* name; Kind kind; } BANK_TABLE[BANKS] = {
    {"embed", TABLE}, {"values", TABLE}, {"head", TABLE}, {"attn", MATRIX}, {"mlp", MATRIX},
    {"gates", GATE}, {"gates", GATE}, {"scalars", SCALAR}, {"scalars", SCALAR},
    {"scalars", SCALAR}, {"scalars", SCALAR}, {"scalars", SCALAR}, {"scalars", SCALAR},
    {"scalars", SCALAR},
};

typedef enum {
    SIZE_1, SIZE_2, SIZE_C, SIZE_F, SIZE_V, SIZE_ROWS, SIZE_HALF_L, SIZE_H, SIZE_GATE, SIZE_SKIPS
} Size;
typedef enum {
    INIT_ZERO, INIT_ONE, INIT_HALF, INIT_LAMBDA, INIT_SKIP_GATE, INIT_FAN_IN, INIT_EMBED,
    INIT_NORMAL, INIT_HEAD
} Init;
typedef enum {
    ALWAYS, UNTIED, HAS_ATTENTION, HAS_MLP, X0_MIX, VALUE_MIX, SKIPS, IS_VALUE_TABLE, ATTN_MIX,
    GATED_SKIPS, ATTN_GATED, SMEARED, BACKED_OUT
} Need;

typedef struct ParamRow {
    const char* name;       // in checkpoints; %d is the layer, or the number of the table
    BankId bank;
    int slot;               // place within a layer's share of the bank
    Size rows, cols;        // y = x wᵀ: rows are outputs, cols inputs
    int transposed;         // lies in memory as (cols, rows), so that its bank has one shape
    Init init;
    Need needs;
} ParamRow;

typedef enum {
    WTE, LM_HEAD, ATTN_Q, ATTN_K, ATTN_V, ATTN_PROJ, MLP_FC, MLP_PROJ, LAMBDAS, LAMB, SKIP_WEIGHTS,
    VALUE_EMBEDS, ATTN_LAMBDAS, SKIP_GATES, ATTN_GATE, SMEAR_GATE, SMEAR_LAMBDA, BACKOUT_LAMBDA,
    PARAMS
} ParamId;

static const ParamRow PARAM_TABLE[PARAMS] = {
    // name                        bank          slot  rows    cols  transposed init      needs
    {"wte.weight",               BANK_EMBED,        0, SIZE_ROWS, SIZE_C,    0, INIT_EMBED,     ALWAYS},
    {"lm_head.weight",           BANK_HEAD,         0, SIZE_V, SIZE_C,       0, INIT_HEAD,      UNTIED},
    {"h.%d.attn.c_q.weight",     BANK_ATTN,         0, SIZE_C, SIZE_C,       0, INIT_FAN_IN,    HAS_ATTENTION},
    {"h.%d.attn.c_k.weight",     BANK_ATTN,         1, SIZE_C, SIZE_C,       0, INIT_FAN_IN,    HAS_ATTENTION},
    {"h.%d.attn.c_v.weight",     BANK_ATTN,         2, SIZE_C, SIZE_C,       0, INIT_FAN_IN,    HAS_ATTENTION},
    {"h.%d.attn.c_proj.weight",  BANK_ATTN,         3, SIZE_C, SIZE_C,       0, INIT_ZERO,      HAS_ATTENTION},
    {"h.%d.mlp.c_fc.weight",     BANK_MLP,          0, SIZE_F, SIZE_C,       0, INIT_FAN_IN,    HAS_MLP},
    {"h.%d.mlp.c_proj.weight",   BANK_MLP,          1, SIZE_C, SIZE_F,       1, INIT_ZERO,      HAS_MLP},
    {"h.%d.lambdas",             BANK_LAMBDAS,      0, SIZE_1, SIZE_2,       0, INIT_LAMBDA,    X0_MIX},
    {"h.%d.attn.lamb",           BANK_LAMB,         0, SIZE_1, SIZE_1,       0, INIT_HALF,      VALUE_MIX},
    {"skip_weights",             BANK_SKIP,         0, SIZE_1, SIZE_HALF_L,  0, INIT_ONE,       SKIPS},
    {"value_embeds.%d.weight",   BANK_VALUES,       0, SIZE_ROWS, SIZE_C,    0, INIT_NORMAL,    IS_VALUE_TABLE},
    {"h.%d.attn.lambdas",        BANK_ATTN_LAMBDAS, 0, SIZE_1, SIZE_2,       0, INIT_HALF,      ATTN_MIX},
    {"skip_gates",               BANK_SKIP_GATES,   0, SIZE_1, SIZE_SKIPS,   0, INIT_SKIP_GATE, GATED_SKIPS},
    {"h.%d.attn.gate.weight",    BANK_GATES,        0, SIZE_H, SIZE_GATE,    0, INIT_ZERO,      ATTN_GATED},
    {"smear.gate.weight",        BANK_SMEAR_GATE,   0, SIZE_1, SIZE_GATE,    0, INIT_ZERO,      SMEARED},
    {"smear.lambda",             BANK_SMEAR,        0, SIZE_1, SIZE_1,       0, INIT_ZERO,      SMEARED},
    {"backout.lambda",           BANK_BACKOUT,      0, SIZE_1, SIZE_1,       0, INIT_HALF,      BACKED_OUT},
};

// ---- the model is data: layers -----------------------------------------------------------------

typedef struct Layer {
    bool mlp;               // false: the layer is empty
    bool attention;
    bool long_window;
    int value_table;        // looked up and mixed into the values, or -1
    int skip_from;          // layer whose output is added to the stream on entry, or -1
    int skip_index;         // of its weight in skip_weights or skip_gates
    MixMode skip_mode;
    int source;             // number of this layer among those whose output is read again, or -1
    int kept;               // its output needs a buffer of its own (which), or -1
} Layer;

// ---- the model is data: activations ------------------------------------------------------------

// Every buffer of forward and backward, once. `own` is a set of indices (mostly layers) that have
// memory of their own; the others use that of the index before. Buffers with one for each layer live
// from forward to backward; the others are scratch. What backward can rebuild cheaply is not saved:
// the input of ReLU² (the root of its output), the mixed values, the looked-up values, the gated
// heads, the residual stream unless a recipe trains its mixing weights. A validation of longer
// sequences has a set of its own, in which layers share theirs.
//    type    name        own                    per row
#define FORWARD_ACTS(A)                                                                           \
    A(floatX, emb,        embed_norm | smear,    C)       /* wte[token] before its norm */        \
    A(floatX, smear,      smear,                 C)       /* with some of the token before it */  \
    A(float,  smear_gate, smear,                 1)                                               \
    A(float,  emb_rstd,   embed_norm,            1)                                               \
    A(floatX, x,          streams,               C)       /* stream into layer l; x[L]: out */    \
    A(floatX, mid,        1,                     C)       /* stream inside a layer */             \
    A(floatX, out,        kept,                  C)       /* of a layer, before a skip */         \
    A(floatX, ln1,        attention,             C)                                               \
    A(float,  ln1_rstd,   attention,             1)                                               \
    A(floatX, qkv,        attention | v0,        3 * C)   /* q k normed, rotated; v as is */      \
    A(float,  qk_rstd,    attention,             2 * H)                                           \
    A(floatX, ve,         tables,                C)       /* looked-up values */                  \
    A(floatX, v,          tables | mixed,        C)       /* what attention reads as values */    \
    A(floatX, att,        attention,             C)                                               \
    A(float,  lse,        attention,             H)                                               \
    A(floatX, gated,      gate,                  C)       /* att, each head times its gate */     \
    A(float,  gate,       gate ? attention : 0,  H)                                               \
    A(floatX, ln2,        mlp,                   C)                                               \
    A(float,  ln2_rstd,   mlp,                   1)                                               \
    A(floatX, fc,         1,                     F)                                               \
    A(floatX, relu,       mlp,                   F)                                               \
    A(floatX, branch,     1,                     C)       /* what a branch adds to x */           \
    A(floatX, lnf,        1,                     C)                                               \
    A(float,  lnf_rstd,   1,                     1)                                               \
    A(float,  losses,     1,                     1)                                               \
    A(int,    first,      masks,                 1)       /* first key seen; [1]: long window */  \
    A(int,    last,       masks,                 1)       /* last query that sees the key */
#define BACKWARD_ACTS(A)                                                                          \
    A(floatX, dx,         1,                     C)       /* of the stream */                     \
    A(floatX, dln,        1,                     C)                                               \
    A(floatX, dfc,        1,                     F)                                               \
    A(floatX, datt,       1,                     C)                                               \
    A(floatX, dgated,     gate,                  C)                                               \
    A(float,  delta,      1,                     H)                                               \
    A(floatX, dqkv,       1,                     3 * C)                                           \
    A(floatX, dv0,        residual,              C)       /* of layer 0's values, by mixes */     \
    A(floatX, dve,        tables,                C)                                               \
    A(floatX, dx0,        x0_mix,                C)       /* of the embedding, by mixes */        \
    A(floatX, dskip,      sources,               C)       /* of an output, by who reads it */
// And those that do not grow with the batch.
#define OTHER_ACTS(A)                                                                             \
    A(floatX,  logits, true,          R * V8)             /* of R rows, then their gradient */    \
    A(uint8_t, x8,     cfg->fp8_head, R * C)              /* the head's operands in 8 bits; _t: */ \
    A(uint8_t, x8_t,   cfg->fp8_head, R * C)              /* rows and columns exchanged */        \
    A(uint8_t, w8,     cfg->fp8_head, V8 * C)                                                     \
    A(uint8_t, w8_t,   cfg->fp8_head, V8 * C)                                                     \
    A(uint8_t, g8,     cfg->fp8_head, R * V8)                                                     \
    A(uint8_t, g8_t,   cfg->fp8_head, R * V8)                                                     \
    A(float,   reduce, true,          m->reduce_floats)   /* partial sums */

typedef struct Acts {
#define FIELD(type, name, own, width) type* name[MAX_LAYERS + 1];
    FORWARD_ACTS(FIELD) BACKWARD_ACTS(FIELD)
#undef FIELD
} Acts;

// ---- the model ---------------------------------------------------------------------------------

// What a step comes to, on its way to the host: summed over ranks from STAT_NORMS on, which are
// Σ g², the gradients that are not finite, Σ p² and the weights that are not. The losses of the
// micro-batches stand behind.
enum { STAT_ONE, STAT_NORMS, STAT_STOP = STAT_NORMS + 4, STAT_VOTES, STATS = STAT_VOTES + SAVING_VOTES };

typedef struct StepSlot {
    int64_t step;                    // it is the step-th of the run, from 1
    Schedule now;
    LoaderPosition from, to;         // of the data: before it and behind
    float* stats;                    // pinned: STATS and losses
    float* norms;                    // pinned: of this rank's segments, (count, 2)
    cudaEvent_t there;
} StepSlot;

typedef struct Model {
    const Settings* cfg;
    int B, T, C, H, D, F, V, L, R;   // R: rows of logits that exist at a time
    int val_B, val_T;                // of a validation's forward
    int rows, skips, value_tables;   // of the tables; gated skips; tables of values
    int sources, kept;               // layers whose output is read again; outputs kept apart
    size_t reduce_floats;            // partial sums that the largest reduction needs
    Layer plan[MAX_LAYERS + 1];      // plan[L] is the way out
    Params params;
    int place[PARAMS][MAX_LAYERS];   // number of a tensor in params, or -1
    Schedule now;                    // what holds in this step
    float frequency[64];             // of the rotation: what the tables hold
    float *cos, *sin;                // (positions, D/2)
    bool pending;                    // Adam's gradients of the step before are in its banks
    Memory memory;
    bf16* wire;                      // gradients on their way
    Acts acts, val_acts;             // val_acts: may be the same
#define FIELD(type, name, on, elements) type* name;
    OTHER_ACTS(FIELD)
#undef FIELD
    EmbeddingIndex index; // positions of each distinct token, for the embedding's backward
    int *tokens, *targets;           // on the device
    int* cu_seqlens;                 // ends of the documents of the batch, if they are masked
    int cu_count;
    Batch host;                      // pinned, for validation and samples
    float* stats;                    // device: STATS numbers, then the loss sum of each micro-step
    float* guard;                    // device: 1 where the step is not to be applied
    Norms norms;                     // of the weights this rank owns, then of their gradients:
    int* segment_tensor;             // those of Muon's banks, then Adam's
    int weight_segments, muon_segments, segments;
    float* segment_norms;            // device: (segments, 2)
    StepSlot slots[2];               // of the steps that the host has not looked at
    float *val_loss, *val_loss_host; // sum of losses of a forward
    double *val_sum, *val_sum_host;  // sum of losses over ranks
    int micro_steps;                 // micro-batches of this rank in an optimizer step
    cudaEvent_t uploaded;            // the pinned tokens may be overwritten
    void* muon_scratch;
    size_t muon_scratch_bytes;
    Matmul matmul;
    cudaStream_t stream;
    size_t host_bytes;               // pinned buffers, and a tensor on its way to a file
} Model;

static void zero_fill(Model* m, void* p, size_t bytes) {
    if (p) CUDA_CHECK(cudaMemsetAsync(p, 0, bytes, m->stream));
}

// Whether attention sees less than all that came before.
static bool masked(const Settings* cfg) {
    return cfg->document_mask || cfg->windows != FLAG_WINDOWS_NONE;
}

// Whether tensor `row` is there for `layer` (or table of that number; 0 where there is but one).
static bool param_needed(const Model* m, const ParamRow* row, int layer) {
    const Settings* cfg = m->cfg;
    Layer plan = m->plan[layer];
    switch (row->needs) {
        case ALWAYS: return true;
        case UNTIED: return cfg->head == FLAG_HEAD_UNTIED;
        case HAS_ATTENTION: return plan.attention;
        case HAS_MLP: return plan.mlp;
        case X0_MIX: return cfg->x0_mix && plan.mlp;
        case VALUE_MIX: return cfg->value_residual && plan.attention;
        case SKIPS: return cfg->skips != 0;
        case IS_VALUE_TABLE: return layer < m->value_tables;
        case ATTN_MIX: return cfg->attn_lambdas && plan.attention;
        case GATED_SKIPS: return m->skips > 0;
        case ATTN_GATED: return cfg->attention_gate && plan.attention;
        case SMEARED: return cfg->smear != 0;
        case BACKED_OUT: return cfg->backout >= 0;
    }
    return false;
}

static int size_of(const Model* m, Size size) {
    switch (size) {
        case SIZE_1: return 1;
        case SIZE_2: return 2;
        case SIZE_C: return m->C;
        case SIZE_F: return m->F;
        case SIZE_V: return m->V;
        case SIZE_ROWS: return m->rows;
        case SIZE_HALF_L: return m->L / 2;
        case SIZE_H: return m->H;
        case SIZE_GATE: return GATE_INPUTS;
        case SIZE_SKIPS: return m->skips;
    }
    return 0;
}

static Bank* bank(Model* m, BankId b) { return &m->params.banks[b]; }

// Where a tensor lies in the p, g, ... of its bank.
static size_t offset_of(const Model* m, ParamId id, int layer) {
    return tensor_offset(&m->params, m->place[id][layer]);
}
static const floatX* weight(const Model* m, ParamId id, int layer) {
    return m->params.banks[PARAM_TABLE[id].bank].p + offset_of(m, id, layer);
}
static const float* scalar(const Model* m, ParamId id, int layer) {   // scalars and gates are read
    const Bank* bank = &m->params.banks[PARAM_TABLE[id].bank];        // in fp32, and every rank has
    return (bank->master ? bank->master : (const float*)bank->p) + offset_of(m, id, layer);  // all
}
static float* grad(const Model* m, ParamId id, int layer) {
    return m->params.banks[PARAM_TABLE[id].bank].g + offset_of(m, id, layer);
}
// What the output of an earlier layer is times, where layer l adds it.
static const float* skip_weight(const Model* m, int l) {
    Layer plan = m->plan[l];
    return scalar(m, plan.skip_mode == MIX_GATE ? SKIP_GATES : SKIP_WEIGHTS, 0) + plan.skip_index;
}
// The output head: its own matrix, or the embedding's.
static ParamId head_id(const Model* m) { return m->cfg->head == FLAG_HEAD_TIED ? WTE : LM_HEAD; }

// ---- the model: built ---------------------------------------------------------------------------

// The output of layer l is read again, by a layer further up or by the way out.
static void plan_source(Model* m, int l) {
    if (m->plan[l].source < 0) m->plan[l].source = m->sources++;
}

static void plan_skip(Model* m, int from, int to, int index, MixMode mode) {
    m->plan[to].skip_from = from;
    m->plan[to].skip_index = index;
    m->plan[to].skip_mode = mode;
    plan_source(m, from);
}

// What each layer is and what it reads, from the lists among the flags.
static void plan_build(Model* m) {
    const Settings* cfg = m->cfg;
    int a[MAX_LAYERS + 1], b[MAX_LAYERS + 1], n;
    for (int l = 0; l <= m->L; l++) {
        bool inside = l < m->L;
        m->plan[l] = {inside, inside, false, -1, -1, 0, MIX_SKIP, -1, -1};
    }
    n = list_numbers("no-layers", cfg->no_layers, a, MAX_LAYERS);
    for (int i = 0; i < n; i++) m->plan[a[i]].mlp = m->plan[a[i]].attention = false;
    n = list_numbers("no-attention", cfg->no_attention, a, MAX_LAYERS);
    for (int i = 0; i < n; i++) m->plan[a[i]].attention = false;
    n = list_numbers("long-layers", cfg->long_layers, a, MAX_LAYERS);
    for (int i = 0; i < n; i++) m->plan[a[i]].long_window = true;
    n = list_pairs("value-embeds", cfg->value_embeds, ':', a, b, MAX_LAYERS);
    for (int i = 0; i < n; i++) {
        m->plan[a[i]].value_table = b[i];
        if (b[i] >= m->value_tables) m->value_tables = b[i] + 1;
    }
    // U-net: the outputs of the first half of the layers are added, last first, to the second's.
    for (int l = m->L / 2; l < m->L && cfg->skips; l++)
        plan_skip(m, m->L - 1 - l, l, l - m->L / 2, MIX_SKIP);
    m->skips = list_pairs("gated-skips", cfg->gated_skips, '>', a, b, MAX_LAYERS);
    for (int i = 0; i < m->skips; i++) plan_skip(m, a[i], b[i], i, MIX_GATE);
    if (cfg->backout >= 0) plan_source(m, (int)cfg->backout);
    // Where the layer above starts with a skip, its stream is not what this one left.
    for (int l = 0; l < m->L; l++)
        if (m->plan[l].source >= 0 && m->plan[l + 1].skip_from >= 0) m->plan[l].kept = m->kept++;
}

static MuonRule muon_rule(const Model* m, const Bank* bank) {
    const Settings* cfg = m->cfg;
    MuonRule rule = {};
    rule.form = (MuonForm)cfg->muon_form;
    rule.polar = cfg->muon_polar != 0;
    rule.steps = (int)cfg->ns_steps;
    rule.momentum = m->now.muon_momentum;
    rule.beta2 = (float)cfg->muon_beta2;
    rule.second_by_row = bank == &m->params.banks[BANK_MLP];      // a row is a hidden unit
    rule.cautious_decay = (float)cfg->cautious_decay;
    return rule;
}

static void params_plan(Model* m) {
    const Settings* cfg = m->cfg;
    Params* ps = &m->params;
    bool muon = cfg->optimizer == FLAG_OPTIMIZER_MUON;
    ps->bank_count = BANKS;
    for (int id = 0; id < PARAMS; id++) {
        const ParamRow* row = &PARAM_TABLE[id];
        int copies = strstr(row->name, "%d") ? m->L : 1;
        for (int l = 0; l < MAX_LAYERS; l++) {
            m->place[id][l] = -1;
            if (l >= copies || !param_needed(m, row, l)) continue;
            char name[64];
            snprintf(name, sizeof name, row->name, l);
            m->place[id][l] = params_add(ps, row->bank, row->slot, l, name, size_of(m, row->rows),
                                         size_of(m, row->cols), row->transposed);
        }
    }
    for (int b = 0; b < BANKS; b++) {
        Bank* bank = &ps->banks[b];
        bank->name = BANK_TABLE[b].name;
        bank->kind = BANK_TABLE[b].kind;
        bank->bf16 = bank->kind == SCALAR ? cfg->bf16_scalars : b == BANK_HEAD ? cfg->bf16_head
                   : bank->kind != MATRIX && cfg->bf16_tables;
        bank->adam = !muon || bank->kind == TABLE || bank->kind == SCALAR;
        if (!bank->adam && cfg->muon_beta2 > 0)
            bank->second = muon_rule(m, bank).second_by_row ? bank->rows : bank->cols;
    }
    params_build(ps, &m->memory, loss_stride(1));
}

// How far the rows of logits that exist at a time may reach: 256 MiB keeps the matmul large and the
// buffer small beside the activations.
static int logit_rows(int N, int V) {
    size_t rows = ((size_t)256 << 20) / ((size_t)V * sizeof(floatX)) / 16 * 16;
    return rows < 16 ? 16 : rows < (size_t)N ? (int)rows : N;
}

// Memory for N rows; `share`: layers share theirs, and there is none for backward.
static void acts_build(Model* m, Acts* a, size_t N, bool share) {
    const Settings* cfg = m->cfg;
    size_t C = m->C, H = m->H, F = m->F;
    typedef uint64_t Set;
    Set embed_norm = cfg->embed_norm != 0, smear = cfg->smear != 0, x0_mix = cfg->x0_mix != 0,
        mixed = cfg->value_residual || cfg->attn_lambdas, tables = m->value_tables > 0,
        gate = cfg->attention_gate != 0, residual = cfg->value_residual != 0, v0 = 0,
        masks = masked(cfg) ? 3 : 0, sources = ((Set)1 << m->sources) - 1,
        kept = ((Set)1 << m->kept) - 1, attention = 0, mlp = 0, streams = 1;
    // Backward wants the stream only in recipes that train a weight on it; and the embedding, if it
    // was normed.
    bool weights = cfg->x0_mix || m->sources;
    for (int l = 0; l <= m->L; l++) {
        Set here = (Set)1 << l;
        Layer plan = m->plan[l];
        if (plan.attention && !(share && attention)) attention |= here;
        if (plan.mlp && !(share && mlp)) mlp |= here;
        if (l == 0 || !m->plan[l - 1].mlp) continue;
        bool source = m->plan[l - 1].source >= 0 && m->plan[l - 1].kept < 0;
        bool above_source = streams == 1 || m->plan[l - 2].source >= 0;      // the first is one, too
        if (share ? source || above_source : weights || (l == 1 && embed_norm)) streams |= here;
    }
    if (share && cfg->value_residual) v0 = 2;      // layer 0's values are read by all
#define PLACE(type, name, own, width)                                                              \
    for (int i = 0; i <= m->L; i++) {                                                              \
        Set set = own;                                                                             \
        a->name[i] = i ? a->name[i - 1] : NULL;                                                    \
        if (!(set >> i & 1)) continue;                                                             \
        a->name[i] = (type*)memory_take(&m->memory, share ? "validation"                           \
                                                    : set & (set - 1) ? "activations" : "scratch", \
                                        N * (width) * sizeof(type));                               \
    }
    FORWARD_ACTS(PLACE)
    if (!share) { BACKWARD_ACTS(PLACE) }
#undef PLACE
}

// Every tensor has its own random stream, so that a value depends on the seed, the tensor and the
// place in it, and on nothing else.
static void param_init(Model* m, ParamId id, int layer) {
    const Settings* cfg = m->cfg;
    const ParamRow* row = &PARAM_TABLE[id];
    size_t n = tensor_elements(&m->params, m->place[id][layer]);
    float* value = grad(m, id, layer);
    uint32_t rng = RNG_INIT_STREAM + (uint32_t)(id * (MAX_LAYERS + 1) + layer);
    float fan_in = 1.0f / sqrtf((float)size_of(m, row->cols));
    float low = 0, high = 0;             // uniform between them; equal: a constant
    bool normal = false;
    switch (row->init) {
        case INIT_ZERO: break;
        case INIT_ONE: low = high = 1; break;
        case INIT_HALF: low = high = 0.5f; break;
        case INIT_LAMBDA: low = high = (float)cfg->init_x0_mix, n = 1; break;     // the second: 0
        case INIT_SKIP_GATE: low = high = -1.5f; break;
        case INIT_NORMAL: normal = true; break;
        case INIT_FAN_IN: high = fan_in * (float)cfg->init_scale, low = -high; break;
        case INIT_EMBED:
            normal = cfg->init_embed == FLAG_INIT_NORMAL;
            low = -fan_in, high = fan_in;
            break;
        case INIT_HEAD:
            if (cfg->init_head == FLAG_INIT_HEAD_UNIFORM) low = -fan_in, high = fan_in;
            break;
    }
    if (normal) init_normal(value, n, cfg->seed, rng, m->stream);
    else init_uniform(value, n, low, high, cfg->seed, rng, m->stream);
}

// What is measured before an update: each tensor's part that this rank owns. What every rank has
// counts on rank 0.
static void segments_build(Model* m) {
    static Piece pieces[MAX_TENSORS];
    static NormSegment segment[2 * MAX_TENSORS];
    Params* ps = &m->params;
    int count = params_pieces(ps, pieces), n = 0;
    m->segment_tensor = (int*)host_alloc(2 * (size_t)count, sizeof(int));
    for (int pass = 0; pass < 3; pass++) {      // weights, Muon's gradients, Adam's
        for (int i = 0; i < count; i++) {
            const Piece* piece = &pieces[i];
            const Bank* bank = bank_of(ps, piece->tensor);
            if ((pass && bank->adam != (pass == 2)) || (bank->zero.replicated && ps->zero.rank))
                continue;
            const void* x = pass ? bank->g + piece->at : bank->master ? bank->master + piece->own
                          : (const void*)(bank->p + piece->at);
            m->segment_tensor[n] = piece->tensor;
            segment[n++] = {x, piece->count, pass || bank->master || !FLOATX_IS_BF16};
        }
        if (pass == 0) m->weight_segments = n;
        if (pass == 1) m->muon_segments = n;
    }
    m->segments = n;
    m->segment_norms = (float*)memory_take(&m->memory, "scratch", 2 * (size_t)n * sizeof(float));
    void* table = memory_take(&m->memory, "scratch", norms_bytes(segment, n));
    if (!m->memory.dry) norms_init(&m->norms, segment, n, table, 0);
}

// Sizes, plan, owners and memory, of one rank. Under --dry-run the memory is counted and not taken.
static void model_build(Model* m, const Settings* cfg, int rank, int world) {
    memset(m, 0, sizeof *m);
    m->cfg = cfg;
    m->memory.dry = cfg->dry_run != 0;
    m->B = (int)cfg->micro_batch, m->T = (int)cfg->seq_len, m->L = (int)cfg->layers;
    m->C = (int)cfg->channels, m->H = (int)cfg->heads, m->V = (int)cfg->vocab;
    m->D = m->C / m->H, m->F = 4 * m->C;
    m->rows = cfg->table_rows ? (int)cfg->table_rows : m->V;
    m->val_B = cfg->val_batch ? (int)cfg->val_batch : m->B;
    m->val_T = cfg->val_seq_len ? (int)cfg->val_seq_len : m->T;
    int N = m->B * m->T, val_N = m->val_B * m->val_T, most = N > val_N ? N : val_N;
    int positions = m->T > m->val_T ? m->T : m->val_T;
    m->R = logit_rows(N, m->V);
    m->micro_steps = (int)(cfg->batch_tokens / ((int64_t)N * world));
    zero_init(&m->params.zero, rank, world, cfg->zero != 0,
              FLOATX_IS_BF16 && cfg->grad_reduce == FLAG_GRAD_REDUCE_WEIGHTS);
    REQUIRE(m->L <= MAX_LAYERS, "--layers %d is more than the %d this program has tables for", m->L,
            MAX_LAYERS);
    plan_build(m);
    params_plan(m);
    size_t wire = 0;
    for (int b = 0; b < BANKS; b++) {
        const Bank* bank = &m->params.banks[b];
        size_t bucket = zero_wire_elements(&m->params.zero, &bank->zero);
        if (bucket > wire) wire = bucket;
        if (bank->owned == 0 || bank->kind != MATRIX || bank->adam) continue;
        MuonRule rule = muon_rule(m, bank);
        size_t bytes = muon_scratch_bytes(bank->zero.owned, bank->rows, bank->cols, &rule);
        if (bytes > m->muon_scratch_bytes) m->muon_scratch_bytes = bytes;
    }
    m->wire = (bf16*)memory_take(&m->memory, "gradients to send", wire * sizeof(bf16));
    m->reduce_floats = 0;
    size_t sums[] = {mix_scratch_floats(N, m->C), attention_gate_scratch_floats(N, m->H),
                     smear_scratch_floats(N)};
    for (int i = 0; i < 3; i++) if (sums[i] > m->reduce_floats) m->reduce_floats = sums[i];
    acts_build(m, &m->acts, N, false);
    if (val_N <= N) m->val_acts = m->acts;
    else acts_build(m, &m->val_acts, val_N, true);
    size_t C = m->C, R = m->R, V8 = loss_stride(m->V);
#define TAKE(type, name, on, elements)                                                             \
    if (on) m->name = (type*)memory_take(&m->memory, "scratch", (elements) * sizeof(type));
    OTHER_ACTS(TAKE)
#undef TAKE
    m->tokens = (int*)memory_take(&m->memory, "scratch", most * sizeof(int));
    m->targets = (int*)memory_take(&m->memory, "scratch", most * sizeof(int));
    size_t ends = batch_cu_count(most + 1) * sizeof(int);
    if (cfg->document_mask) m->cu_seqlens = (int*)memory_take(&m->memory, "scratch", ends);
    m->cos = (float*)memory_take(&m->memory, "scratch", (size_t)positions * m->D / 2 * sizeof(float));
    m->sin = (float*)memory_take(&m->memory, "scratch", (size_t)positions * m->D / 2 * sizeof(float));
    m->stats = (float*)memory_take(&m->memory, "scratch", (STATS + m->micro_steps) * sizeof(float));
    m->guard = (float*)memory_take(&m->memory, "scratch", sizeof(float));
    m->val_loss = (float*)memory_take(&m->memory, "scratch", sizeof(float));
    segments_build(m);
    m->val_sum = (double*)memory_take(&m->memory, "scratch", sizeof(double));
    m->muon_scratch = memory_take(&m->memory, "Newton-Schulz", m->muon_scratch_bytes);
    memory_count(&m->memory, "matmul workspace", MATMUL_WORKSPACE_BYTES);
    memory_count(&m->memory, "scratch", embedding_index_bytes(N, m->C));

    // A file is written by rank 0 and read by all.
    size_t tensor = rank == 0 || cfg->load[0] ? params_largest(&m->params) : 0;
    m->host_bytes = (2 * (size_t)most + loader_memory(m->B, m->T)) * sizeof(int) + ends +
                    tensor * sizeof(float);
    if (cfg->checkpoint_every) m->host_bytes += saving_bytes(&m->params, cfg);
}

// What holds in step `step`, from 0; at the number of steps that there are: in the last validation.
static void model_at(Model* m, int64_t step) {
    const Settings* cfg = m->cfg;
    float frequency[64];
    m->now = step == cfg->steps ? schedule_final(cfg) : schedule_at(cfg, step);
    m->pending = step % cfg->adam_every != 0;
    schedule_frequencies(frequency, cfg, m->D, step);
    size_t bytes = m->D / 2 * sizeof(float);
    if (memcmp(frequency, m->frequency, bytes) == 0) return;      // at the start it holds zeros
    memcpy(m->frequency, frequency, bytes);
    rotary_tables(m->cos, m->sin, frequency, m->T > m->val_T ? m->T : m->val_T, m->D,
                  cfg->rotary_round_bf16 != 0, m->stream);
}

// Streams, libraries, host buffers, and the first values of everything. `ranks`: NULL for one.
static void model_start(Model* m, Ranks* ranks) {
    Params* ps = &m->params;
    size_t N = (size_t)m->B * m->T, val_N = (size_t)m->val_B * m->val_T, most = N > val_N ? N : val_N;
    CUDA_CHECK(cudaStreamCreate(&m->stream));
    trace_name_stream(m->stream, "compute");
    ps->stream = m->stream;
    zero_start(&ps->zero, ps->shards, ps->shard_count, m->wire);
    zero_connect(&ps->zero, ranks);
    CUDA_CHECK(cudaEventCreateWithFlags(&m->uploaded, cudaEventDisableTiming));
    matmul_init(&m->matmul, m->stream);
    embedding_index_init(&m->index, (int)N, m->rows, m->C);
    CUDA_CHECK(cudaMallocHost((void**)&m->host.inputs, most * sizeof(int)));
    CUDA_CHECK(cudaMallocHost((void**)&m->host.targets, most * sizeof(int)));
    CUDA_CHECK(cudaMallocHost((void**)&m->host.cu_seqlens,
                              batch_cu_count((int)most + 1) * sizeof(int)));
    for (int i = 0; i < 2; i++) {
        StepSlot* slot = &m->slots[i];
        size_t stats = STATS + (size_t)m->micro_steps, norms = 2 * (size_t)m->segments;
        CUDA_CHECK(cudaMallocHost((void**)&slot->stats, (stats + norms) * sizeof(float)));
        slot->norms = slot->stats + stats;
        CUDA_CHECK(cudaEventCreateWithFlags(&slot->there, cudaEventDisableTiming));
    }
    CUDA_CHECK(cudaMemset(m->guard, 0, sizeof(float)));
    CUDA_CHECK(cudaMallocHost((void**)&m->val_loss_host, sizeof(float)));
    CUDA_CHECK(cudaMallocHost((void**)&m->val_sum_host, sizeof(double)));
    float one = 1.0f;
    CUDA_CHECK(cudaMemcpy(m->stats + STAT_ONE, &one, sizeof one, cudaMemcpyHostToDevice));
    params_clear(ps);
    for (int id = 0; id < PARAMS; id++)
        for (int layer = 0; layer < MAX_LAYERS; layer++)
            if (m->place[id][layer] >= 0) param_init(m, (ParamId)id, layer);
    for (int b = 0; b < BANKS; b++)
        if (ps->banks[b].n) params_adopt(ps, &ps->banks[b], 0, ps->banks[b].n);
    CUDA_CHECK(cudaStreamSynchronize(m->stream));
    model_at(m, 0);
}

static void model_free(Model* m) {
    CUDA_CHECK(cudaStreamSynchronize(m->stream));
    zero_free(&m->params.zero, m->params.shards, m->params.shard_count);
    params_free(&m->params);
    memory_free(&m->memory);
    embedding_index_free(&m->index);
    matmul_free(&m->matmul);
    CUDA_CHECK(cudaFreeHost(m->host.inputs));
    CUDA_CHECK(cudaFreeHost(m->host.targets));
    CUDA_CHECK(cudaFreeHost(m->host.cu_seqlens));
    for (int i = 0; i < 2; i++) {
        CUDA_CHECK(cudaFreeHost(m->slots[i].stats));
        CUDA_CHECK(cudaEventDestroy(m->slots[i].there));
    }
    norms_free(&m->norms);
    free(m->segment_tensor);
    CUDA_CHECK(cudaFreeHost(m->val_loss_host));
    CUDA_CHECK(cudaFreeHost(m->val_sum_host));
    CUDA_CHECK(cudaEventDestroy(m->uploaded));
    CUDA_CHECK(cudaStreamDestroy(m->stream));
}

// ---- forward -----------------------------------------------------------------------------------

// Forward goes on when the layer's weights of this bank have come from their owners.
static void weights_wait(Model* m, ParamId id, int layer) {
    const Tensor* t = &m->params.tensors[m->place[id][layer]];
    Bank* bank = &m->params.banks[t->bank];
    zero_wait_gathered(&m->params.zero, &bank->zero, bank->kind == TABLE ? 0 : t->unit, m->stream);
}

// The buffers from row `row` on.
static Acts acts_from(const Model* m, const Acts* acts, size_t row) {
    size_t C = m->C, H = m->H, F = m->F;
    Acts a = *acts;
#define SHIFT(type, name, own, width)                                                              \
    for (int i = 0; i <= m->L; i++) if (a.name[i]) a.name[i] += row * (width);
    FORWARD_ACTS(SHIFT)
#undef SHIFT
    return a;
}

// What layer l left in the stream; only of layers whose output is read again.
static const floatX* layer_output(const Model* m, const Acts* a, int l) {
    return m->plan[l].kept >= 0 ? a->out[m->plan[l].kept] : a->x[l + 1];
}

// The stream at the start: looked-up rows, each with some of the one before, normed.
static void embed(Model* m, const Acts* a, int N, int T, int from) {
    const Settings* cfg = m->cfg;
    int C = m->C;
    cudaStream_t s = m->stream;
    floatX *x0 = a->x[0], *rows = cfg->embed_norm ? a->emb[0] : x0, *e = cfg->smear ? a->emb[0] : rows;
    trace_label("embed");
    weights_wait(m, WTE, 0);
    embedding_forward(e, weight(m, WTE, 0), m->tokens + from, N, C, s);
    if (cfg->smear) {
        rows = cfg->embed_norm ? a->smear[0] : x0;
        if (from) {       // the row before is there from an earlier call; it counts as a first one
            smear_forward(rows - C, a->smear_gate[0] - 1, e - C, scalar(m, SMEAR_GATE, 0),
                          scalar(m, SMEAR_LAMBDA, 0), N + 1, N + 1, C, s);
        } else {
            smear_forward(rows, a->smear_gate[0], e, scalar(m, SMEAR_GATE, 0),
                          scalar(m, SMEAR_LAMBDA, 0), N, T, C, s);
        }
        PROBE("smear", 0, rows, N, C, C);
    }
    if (cfg->embed_norm)
        rmsnorm_forward(x0, a->emb_rstd[0], rows, N, C, (float)cfg->norm_eps, s);    // (N, C)
    PROBE("x0", 0, x0, N, C, C);
}

// Enters layer l (l = L: the way out) with the stream x + r, r being what the MLP before adds (NULL
// at the first layer, where x is already in place): adds the skip, mixes in the embedding (on the
// way out: takes off part of an earlier output), normalises. Returns the stream inside the layer.
static const floatX* layer_enter(Model* m, const Acts* a, int l, const floatX* x, const floatX* r,
                                 int N) {
    Layer plan = m->plan[l];
    int C = m->C, below = l - 1;
    bool out = l == m->L, mixes = m->cfg->x0_mix && !out, back = m->cfg->backout >= 0 && out;
    float eps = (float)m->cfg->norm_eps;
    cudaStream_t s = m->stream;
    floatX* y = out ? a->lnf[0] : plan.attention ? a->ln1[l] : a->ln2[l];
    float* rstd = out ? a->lnf_rstd[0] : plan.attention ? a->ln1_rstd[l] : a->ln2_rstd[l];

    if (r && plan.skip_from < 0 && !mixes && !back) { // the plain case is one pass
        residual_rmsnorm_forward(a->x[l], y, rstd, x, r, N, C, eps, s);
        PROBE("out", below, a->x[l], N, C, C);
        return a->x[l];
    }
    if (r) {
        floatX* left = m->plan[below].kept >= 0 ? a->out[m->plan[below].kept] : a->x[l];
        residual_add(left, x, r, (size_t)N * C, s);
        PROBE("out", below, left, N, C, C);
        if (plan.skip_from >= 0)
            mix_forward(a->x[l], left, layer_output(m, a, plan.skip_from), skip_weight(m, l),
                        plan.skip_mode, N, C, C, C, C, s);
    }
    const floatX* inside = r ? a->x[l] : x;
    PROBE("in", l, inside, N, C, C);
    if (mixes || back) {
        if (mixes)
            mix_forward(a->mid[0], inside, a->x[0], scalar(m, LAMBDAS, l), MIX_PAIR, N, C, C, C, C, s);
        else
            mix_forward(a->mid[0], inside, layer_output(m, a, (int)m->cfg->backout),
                        scalar(m, BACKOUT_LAMBDA, 0), MIX_MINUS, N, C, C, C, C, s);
        inside = a->mid[0];
        PROBE(mixes ? "mix" : "backout", l, inside, N, C, C);
    }
    rmsnorm_forward(y, rstd, inside, N, C, eps, s);
    return inside;
}

// The values of layer l as attention reads them, and their row stride: as projected, or mixed with
// layer 0's or with looked-up ones.
static const floatX* layer_values(Model* m, const Acts* a, int l, int N, int* ld) {
    int C = m->C, table = m->plan[l].value_table;
    const floatX* v = a->qkv[l] + 2 * C;
    *ld = 3 * C;
    if (m->cfg->attn_lambdas) {
        if (table >= 0) {
            weights_wait(m, VALUE_EMBEDS, table);
            embedding_forward(a->ve[0], weight(m, VALUE_EMBEDS, table), m->tokens, N, C, m->stream);
        }
        mix_forward(a->v[0], v, table >= 0 ? a->ve[0] : NULL, scalar(m, ATTN_LAMBDAS, l), MIX_PAIR,
                    N, C, C, 3 * C, C, m->stream);
    } else if (m->cfg->value_residual && l > 0) {
        mix_forward(a->v[0], v, a->qkv[0] + 2 * C, scalar(m, LAMB, l), MIX_LERP, N, C, C, 3 * C,
                    3 * C, m->stream);
    } else {
        return v;
    }
    *ld = C;
    return a->v[0];
}

// branch = what attention adds to the stream, from ln1. `a` are the buffers of the new rows, those
// from `from` on; `all` those of all rows: the keys and values before are in their qkv, which is the
// cache of generation.
static void layer_attend(Model* m, const Acts* a, const Acts* all, int l, int B, int T, int from) {
    const Settings* cfg = m->cfg;
    int N = B * T - from, C = m->C, H = m->H, D = m->D, ldv, window = m->plan[l].long_window;
    cudaStream_t s = m->stream;
    Matmul* mm = &m->matmul;
    floatX *qkv = a->qkv[l], *att = a->att[l], *every = all->qkv[l];
    weights_wait(m, ATTN_Q, l);
    matmul_nt(qkv, a->ln1[l], weight(m, ATTN_Q, l), N, 3 * C, C, mm, s);             // (N, 3C)
    PROBE("qkv", l, qkv, N, 3 * C, 3 * C);
    size_t angle = (size_t)from * D / 2;
    qknorm_rotary_forward(qkv, a->qk_rstd[l], m->cos + angle, m->sin + angle, N, from ? N : T, H, D,
                          3 * C, (float)cfg->qk_norm_eps, cfg->qk_order == FLAG_QK_NORM_FIRST, s);
    const floatX* v = layer_values(m, all, l, B * T, &ldv);                          // (B*T, C)
    PROBE("v_mix", l, v, N, C, ldv);
    attention_forward(all->att[l], all->lse[l], every, every + C, v, all->first[window], B, T, H, D,
                      3 * C, ldv, m->now.attn_scale, from, s);
    if (cfg->attention_gate) {
        attention_gate_forward(a->gated[0], a->gate[l], att, a->ln1[l], scalar(m, ATTN_GATE, l), N,
                               H, D, C, s);
        att = a->gated[0];
        PROBE("gated", l, att, N, C, C);
    }
    matmul_nt(a->branch[0], att, weight(m, ATTN_PROJ, l), N, C, C, mm, s);           // (N, C)
    PROBE("attn_out", l, a->branch[0], N, C, C);
}

// branch = what the MLP adds to the stream, from ln2.
static void layer_mlp(Model* m, const Acts* a, int l, int N) {
    int C = m->C, F = m->F;
    cudaStream_t s = m->stream;
    Matmul* mm = &m->matmul;
    weights_wait(m, MLP_FC, l);
    matmul_nt(a->fc[0], a->ln2[l], weight(m, MLP_FC, l), N, F, C, mm, s);            // (N, F)
    PROBE("fc", l, a->fc[0], N, F, F);
    relu2_forward(a->relu[l], a->fc[0], (size_t)N * F, s);                           // (N, F)
    matmul_nn(a->branch[0], a->relu[l], weight(m, MLP_PROJ, l), N, C, F, mm, s);     // (N, C)
    PROBE("mlp_out", l, a->branch[0], N, C, C);
}

// Who sees whom in the batch, for short and long windows.
static void masks_build(Model* m, const Acts* a, int B, int T) {
    const Settings* cfg = m->cfg;
    if (!masked(cfg)) return;
    bool token = cfg->window_by == FLAG_WINDOW_BY_TOKEN;
    int windows[] = {m->now.window_short, m->now.window_long}, block = (int)cfg->window_block;
    trace_label("masks");
    for (int i = 0; i < 2; i++) {
        int window = windows[i] == 0 ? ATTENTION_NO_WINDOW : windows[i] * (token ? block : 1);
        attention_bounds(a->first[i], a->last[i], cfg->document_mask ? m->cu_seqlens : NULL,
                         m->cu_count, B, T, window, token ? 1 : block, m->stream);
    }
}

// acts.lnf = the normed stream after the last layer, for B sequences of T tokens in m->tokens; of
// the one sequence of a generation, from row `from` on, the earlier ones being there from before.
static void forward(Model* m, const Acts* acts, int B, int T, int from) {
    int N = B * T - from, C = m->C;
    Acts shifted;
    const Acts* a = acts;
    masks_build(m, acts, B, T);
    if (from) {
        shifted = acts_from(m, acts, from);
        a = &shifted;
    }
    embed(m, a, N, T, from);
    const floatX *x = a->x[0], *added = NULL;
    for (int l = 0; l < m->L; l++) {
        if (!m->plan[l].mlp) continue;
        trace_label("forward %d", l);
        x = layer_enter(m, a, l, x, added, N);                              // ln1 or ln2 (N, C)
        if (m->plan[l].attention) {
            layer_attend(m, a, acts, l, B, T, from);
            residual_rmsnorm_forward(a->mid[0], a->ln2[l], a->ln2_rstd[l], x, a->branch[0], N, C,
                                     (float)m->cfg->norm_eps, m->stream);            // ln2 (N, C)
            PROBE("after_attn", l, a->mid[0], N, C, C);
            x = a->mid[0];
        }
        layer_mlp(m, a, l, N);
        added = a->branch[0];
    }
    layer_enter(m, a, m->L, x, added, N);                                            // lnf (N, C)
}

// The head in 8 bits, in both orders; it stays as it is for all micro-batches of a step.
static void head_quantize(Model* m) {
    weights_wait(m, LM_HEAD, 0);
    trace_label("classify");
    fp8_quantize_e4m3(m->w8, m->w8_t, weight(m, LM_HEAD, 0), loss_stride(m->V), m->C,
                      (float)m->cfg->fp8_w_scale, m->stream);
}

// Loss and gradients of the rows row .. + rows - 1 with products of 8-bit numbers: the logits are
// written once and never overwritten, their gradient leaves in 8 bits.
static void classify_fp8(Model* m, floatX* dx, const floatX* x, int row, int rows, float grad_scale,
                         float beta) {
    const Settings* cfg = m->cfg;
    const Acts* a = &m->acts;
    int C = m->C, V = m->V, V8 = loss_stride(V);
    cudaStream_t s = m->stream;
    Matmul* mm = &m->matmul;
    float sx = cfg->fp8_x_scale > 0 ? (float)cfg->fp8_x_scale : 448.0f / sqrtf((float)C);
    float sw = (float)cfg->fp8_w_scale, sg = (float)cfg->fp8_grad_scale / grad_scale;
    fp8_quantize_e4m3(m->x8, m->x8_t, x, rows, C, sx, s);                       // (rows, C)
    matmul_fp8(m->logits, false, m->x8, FP8_E4M3, m->w8, FP8_E4M3, rows, V8, C,
               1.0f / (sx * sw), 0.0f, true, mm, s);                                 // (rows, V8)
    PROBE("logits", row, m->logits, rows, V, V8);
    cross_entropy_fp8(m->g8, m->g8_t, m->logits, a->losses[0] + row, m->targets + row, rows,
                      V, (SoftcapKind)cfg->softcap, (float)cfg->softcap_value, grad_scale, sg, s);
    matmul_fp8(dx, false, m->g8, FP8_E5M2, m->w8_t, FP8_E4M3, rows, C, V8, 1.0f / (sg * sw),
               0.0f, false, mm, s);                                                  // (rows, C)
    matmul_fp8(grad(m, LM_HEAD, 0), true, m->g8_t, FP8_E5M2, m->x8_t, FP8_E4M3, V8, C, rows,
               1.0f / (sg * sx), beta, false, mm, s);                                // (V8, C)
}

// Loss of the N rows in a->lnf, added up in *loss. With `train`, also the gradients of the head and
// of lnf (into a->dln), scaled by grad_scale: the head's are added to those that are there, or if
// `fresh` replace them. The logits of R rows exist at a time.
static void classify(Model* m, const Acts* a, float* loss, int N, bool train, float grad_scale,
                     bool fresh) {
    const Settings* cfg = m->cfg;
    int C = m->C, V = m->V, V8 = loss_stride(V);
    cudaStream_t s = m->stream;
    Matmul* mm = &m->matmul;
    floatX* logits = m->logits;
    const floatX* head = weight(m, head_id(m), 0);
    trace_label("classify");
    if (head_id(m) == LM_HEAD) weights_wait(m, LM_HEAD, 0);
    for (int row = 0; row < N; row += m->R) {
        int rows = N - row < m->R ? N - row : m->R;
        const floatX* x = a->lnf[0] + (size_t)row * C;
        floatX* dx = a->dln[0] + (size_t)row * C;
        float beta = fresh && row == 0 ? 0.0f : 1.0f;
        if (train && cfg->fp8_head) {
            classify_fp8(m, dx, x, row, rows, grad_scale, beta);
            continue;
        }
        matmul_nt(logits, x, head, rows, V8, C, mm, s);                              // (rows, V8)
        PROBE("logits", row, logits, rows, V, V8);
        cross_entropy(logits, a->losses[0] + row, m->targets + row, rows, V,
                      (SoftcapKind)cfg->softcap, (float)cfg->softcap_value, grad_scale, train, s);
        if (!train) continue;
        PROBE("dlogits", row, logits, rows, V, V8);
        matmul_nn(dx, logits, head, rows, C, V8, mm, s);                             // (rows, C)
        matmul_tn(grad(m, head_id(m), 0), logits, x, V8, C, rows, beta, mm, s);      // (V8, C)
    }
    loss_sum(loss, a->losses[0], N, s);
}

// ---- backward ----------------------------------------------------------------------------------

// The gradients of a bank that AdamW updates go on being added to while its steps are fewer.
static bool starts_at_zero(const Model* m, const Bank* bank, int micro) {
    return micro == 0 && !(bank->adam && m->pending);
}

// Undoes layer_values for dv (N, C) of row stride 3C: layer 0 collects what the mixes sent to it,
// and the tables what was looked up.
static void layer_values_backward(Model* m, int l, floatX* dv, int N) {
    const Acts* a = &m->acts;
    int C = m->C, ld = 3 * C, table = m->plan[l].value_table;
    const floatX* v = a->qkv[l] + 2 * C;
    cudaStream_t s = m->stream;
    if (m->cfg->attn_lambdas) {        // the looked-up rows are still in ve
        bool looked_up = table >= 0;
        if (looked_up) zero_fill(m, a->dve[0], (size_t)N * C * sizeof(floatX));
        mix_backward(dv, looked_up ? a->dve[0] : NULL, grad(m, ATTN_LAMBDAS, l), dv, v,
                     looked_up ? a->ve[0] : NULL, scalar(m, ATTN_LAMBDAS, l), MIX_PAIR, N, C, ld, C,
                     ld, ld, C, m->reduce, s);
        if (looked_up) embedding_backward(grad(m, VALUE_EMBEDS, table), a->dve[0], &m->index, C, s);
    } else if (m->cfg->value_residual && l == 0) {      // dv + dv0
        mix_forward(dv, dv, a->dv0[0], m->stats + STAT_ONE, MIX_SKIP, N, C, ld, ld, C, s);
    } else if (m->cfg->value_residual) {
        mix_backward(dv, a->dv0[0], grad(m, LAMB, l), dv, v, a->qkv[0] + 2 * C, scalar(m, LAMB, l),
                     MIX_LERP, N, C, ld, C, ld, ld, ld, m->reduce, s);
    }
    PROBE("dv", l, dv, N, C, ld);
}

// Undoes layer_enter but for its norm: dx turns from the gradient inside the layer to that of what
// the layer below left.
static void layer_enter_backward(Model* m, int l, floatX* dx, int N) {
    const Acts* a = &m->acts;
    Layer plan = m->plan[l];
    int C = m->C, back = (int)m->cfg->backout;
    cudaStream_t s = m->stream;
    if (l == m->L) {
        if (back < 0) return;
        mix_backward(NULL, a->dskip[m->plan[back].source], grad(m, BACKOUT_LAMBDA, 0), dx, NULL,
                     layer_output(m, a, back), scalar(m, BACKOUT_LAMBDA, 0), MIX_MINUS, N, C, C, C,
                     C, C, C, m->reduce, s);
        return;
    }
    if (m->cfg->x0_mix) {
        mix_backward(dx, a->dx0[0], grad(m, LAMBDAS, l), dx, a->x[l], a->x[0],
                     scalar(m, LAMBDAS, l), MIX_PAIR, N, C, C, C, C, C, C, m->reduce, s);
    }
    if (plan.skip_from >= 0) {
        ParamId id = plan.skip_mode == MIX_GATE ? SKIP_GATES : SKIP_WEIGHTS;
        mix_backward(NULL, a->dskip[m->plan[plan.skip_from].source],
                     grad(m, id, 0) + plan.skip_index, dx, NULL,
                     layer_output(m, a, plan.skip_from), skip_weight(m, l), plan.skip_mode, N, C, C,
                     C, C, C, C, m->reduce, s);
    }
}

// Sends the bucket of gradients that begins with `unit`, if one does. What Adam goes on adding to
// stays.
static void bank_reduce(Model* m, Bank* bank, int unit) {
    if (bank->adam && !m->now.adam_now) return;
    for (int k = 0; k < bank->zero.bucket_count; k++)
        if (bank->zero.buckets[k].first == unit)
            zero_reduce(&m->params.zero, &bank->zero, k, bank->g, m->stream);
}
// The last gradient of `layer` in this tensor's bank is queued; those of the layers above it were
// before.
static void reduce_from(Model* m, ParamId id, int layer) {
    int tensor = m->place[id][layer];
    if (tensor >= 0) bank_reduce(m, bank_of(&m->params, tensor), m->params.tensors[tensor].unit);
}

// Undoes layer_attend: dx is the gradient of the stream behind it, dln becomes that of ln1.
static void layer_attend_backward(Model* m, int l, int B, int T, const floatX* dx, float beta) {
    const Settings* cfg = m->cfg;
    const Acts* a = &m->acts;
    int N = B * T, C = m->C, H = m->H, D = m->D, ldv, window = m->plan[l].long_window;
    cudaStream_t s = m->stream;
    Matmul* mm = &m->matmul;
    floatX *qkv = a->qkv[l], *att = a->att[l], *y = att, *datt = a->datt[0], *dqkv = a->dqkv[0];
    floatX* dln = a->dln[0];
    if (cfg->attention_gate) {
        y = a->gated[0];
        attention_gate_forward(y, a->gate[l], att, a->ln1[l], scalar(m, ATTN_GATE, l), N, H, D, C,
                               s);
    }
    matmul_tn(grad(m, ATTN_PROJ, l), dx, y, C, C, N, beta, mm, s);                   // (C, C)
    floatX* dy = cfg->attention_gate ? a->dgated[0] : datt;
    matmul_nn(dy, dx, weight(m, ATTN_PROJ, l), N, C, C, mm, s);                      // (N, C)
    if (cfg->attention_gate) // datt is the gradient times the gates, as y is att times the gates
        attention_gate_forward(datt, a->gate[l], dy, a->ln1[l], scalar(m, ATTN_GATE, l), N, H, D, C,
                               s);
    const floatX* v = layer_values(m, a, l, N, &ldv);                                // (N, C)
    attention_backward(dqkv, dqkv + C, dqkv + 2 * C, a->delta[0], datt, att, a->lse[l], qkv,
                       qkv + C, v, a->first[window], a->last[window], B, T, H, D, 3 * C, ldv, 3 * C,
                       3 * C, m->now.attn_scale, s);
    layer_values_backward(m, l, dqkv + 2 * C, N);
    qknorm_rotary_backward(dqkv, qkv, a->qk_rstd[l], m->cos, m->sin, N, T, H, D, 3 * C, 3 * C,
                           cfg->qk_order == FLAG_QK_NORM_FIRST, s);                  // (N, 3C)
    matmul_tn(grad(m, ATTN_Q, l), dqkv, a->ln1[l], 3 * C, C, N, beta, mm, s);        // (3C, C)
    matmul_nn(dln, dqkv, weight(m, ATTN_Q, l), N, C, 3 * C, mm, s);                  // (N, C)
    if (cfg->attention_gate) // what the gates add to dln, which the product has just written
        attention_gate_backward(dy, dln, grad(m, ATTN_GATE, l), dy, att, a->gate[l], a->ln1[l],
                                scalar(m, ATTN_GATE, l), N, H, D, C, m->reduce, s);
}

// Undoes embed.
static void embed_backward(Model* m, int N, int T) {
    const Settings* cfg = m->cfg;
    const Acts* a = &m->acts;
    int C = m->C;
    floatX *dx = a->dx[0], *de = dx;
    cudaStream_t s = m->stream;
    trace_label("embed backward");
    if (cfg->x0_mix) residual_add(dx, dx, a->dx0[0], (size_t)N * C, s);
    if (cfg->embed_norm) rmsnorm_backward(dx, dx, a->x[0], a->emb_rstd[0], N, C, false, s);
    if (cfg->smear) {
        de = a->dln[0];
        smear_backward(de, grad(m, SMEAR_GATE, 0), grad(m, SMEAR_LAMBDA, 0), dx, a->emb[0],
                       a->smear_gate[0], scalar(m, SMEAR_GATE, 0), scalar(m, SMEAR_LAMBDA, 0), N, T,
                       C, m->reduce, s);
    }
    PROBE("demb", 0, de, N, C, C);
    embedding_backward(grad(m, WTE, 0), de, &m->index, C, s);                        // (V, C)
}

// Adds the gradients of micro-batch `micro` to the banks' g (or sets them, if it is the first since
// they were used). In the step's last they are on their way to their owners as soon as they are whole.
static void backward(Model* m, int B, int T, int micro) {
    const Acts* a = &m->acts;
    bool last = micro == m->micro_steps - 1;
    int N = B * T, C = m->C, F = m->F;
    float beta = starts_at_zero(m, bank(m, BANK_MLP), micro) ? 0.0f : 1.0f;
    size_t stream_bytes = (size_t)N * C * sizeof(floatX);
    cudaStream_t s = m->stream;
    Matmul* mm = &m->matmul;
    floatX *dx = a->dx[0], *dln = a->dln[0], *dfc = a->dfc[0];

    if (last) bank_reduce(m, bank(m, BANK_HEAD), 0);
    trace_label("backward %d", m->L - 1);
    zero_fill(m, a->dx0[0], stream_bytes);
    zero_fill(m, a->dv0[0], stream_bytes);
    for (int i = 0; i < m->sources; i++) zero_fill(m, a->dskip[i], stream_bytes);

    rmsnorm_backward(dx, dln, a->lnf[0], a->lnf_rstd[0], N, C, false, s);            // (N, C)
    layer_enter_backward(m, m->L, dx, N);
    for (int l = m->L - 1; l >= 0; l--) {
        Layer plan = m->plan[l];
        if (!plan.mlp) continue;
        trace_label("backward %d", l);
        if (plan.source >= 0) residual_add(dx, dx, a->dskip[plan.source], (size_t)N * C, s);
        PROBE("dout", l, dx, N, C, C);
        matmul_tn(grad(m, MLP_PROJ, l), a->relu[l], dx, F, C, N, beta, mm, s);       // (F, C)
        matmul_nt(dfc, dx, weight(m, MLP_PROJ, l), N, F, C, mm, s);                  // (N, F)
        relu2_backward(dfc, dfc, a->relu[l], (size_t)N * F, s);                      // (N, F)
        matmul_tn(grad(m, MLP_FC, l), dfc, a->ln2[l], F, C, N, beta, mm, s);         // (F, C)
        matmul_nn(dln, dfc, weight(m, MLP_FC, l), N, C, F, mm, s);                   // (N, C)
        rmsnorm_backward(dx, dln, a->ln2[l], a->ln2_rstd[l], N, C, true, s);         // (N, C)
        if (plan.attention) {
            layer_attend_backward(m, l, B, T, dx, beta);
            rmsnorm_backward(dx, dln, a->ln1[l], a->ln1_rstd[l], N, C, true, s);     // (N, C)
        }
        layer_enter_backward(m, l, dx, N);
        if (last) reduce_from(m, MLP_FC, l);
        if (last) reduce_from(m, ATTN_Q, l);
    }
    embed_backward(m, N, T);
    if (!last) return;
    for (int b = BANK_MLP + 1; b < BANKS; b++) bank_reduce(m, bank(m, (BankId)b), 0);     // small ones
    bank_reduce(m, bank(m, BANK_VALUES), 0);
    bank_reduce(m, bank(m, BANK_EMBED), 0);
}

// Gradients that are added to, not written, by the kernels that make them start a step at zero.
static void zero_gradients(Model* m) {
    for (int b = 0; b < BANKS; b++) {
        Bank* bank = &m->params.banks[b];
        bool table = b == BANK_VALUES || (b == BANK_EMBED && m->cfg->head != FLAG_HEAD_TIED);
        if (starts_at_zero(m, bank, 0) && (table || bank->kind >= GATE))
            zero_fill(m, bank->g, bank->n * sizeof(float));
    }
}

// ---- update ------------------------------------------------------------------------------------

static float bank_lr(const Settings* cfg, BankId b) {
    if (cfg->optimizer == FLAG_OPTIMIZER_ADAMW) return (float)cfg->adamw_lr;
    switch (b) {
        case BANK_EMBED: return (float)cfg->embed_lr;
        case BANK_VALUES: return (float)cfg->value_lr;
        case BANK_HEAD: return (float)cfg->head_lr;
        case BANK_ATTN: case BANK_MLP: case BANK_GATES: case BANK_SMEAR_GATE:
            return (float)cfg->muon_lr;
        default: return (float)cfg->scalar_lr;
    }
}

static void update_adamw(Model* m, Bank* bank, float lr) {
    const Settings* cfg = m->cfg;
    const ZeroBank* zero = &bank->zero;
    AdamRule rule = {cfg->adam_beta1, cfg->adam_beta2, (float)cfg->adam_eps,
                     (float)cfg->weight_decay, (AdamEps)cfg->adam_eps_form, bank->bf16,
                     bank->bf16 || cfg->bf16_state, bank->bf16};
    for (int i = 0, run; i < zero->owned; i += run) {
        run = zero_run(zero, i);
        size_t at = zero->own[i] * zero->unit, own = i * zero->unit;
        adamw_update(bank->p + at, bank->master ? bank->master + own : NULL, bank->g + at,
                     bank->m + own, bank->v + own, run * zero->unit, lr, &rule,
                     (int)m->now.adam_step, m->guard, m->stream);
    }
}

// Matrices and gates.
static void update_muon(Model* m, Bank* bank, float lr) {
    const Settings* cfg = m->cfg;
    MuonRule rule = muon_rule(m, bank);
    if (bank->kind == GATE) {
        float* value = bank->master ? bank->master : (float*)bank->p;
        gate_update(value, bank->m, bank->v, bank->g, bank->copies, bank->rows, bank->cols,
                    bank->stride, lr, &rule, bank->bf16, m->guard, m->stream);
        return;
    }
    float scale[4 * MAX_LAYERS];      // the logical shape decides, not the one in memory
    for (int i = 0; i < bank->zero.owned; i++) {
        for (int k = 0; k < m->params.count; k++) {
            const Tensor* t = &m->params.tensors[k];
            if (bank_of(&m->params, k) == bank && t->unit == bank->zero.own[i])
                scale[i] = muon_scale((MuonScale)cfg->muon_scale, t->rows, t->cols);
        }
    }
    muon_update(bank->p, bank->master, bank->g, bank->m, bank->v, bank->zero.own, bank->zero.owned,
                bank->rows, bank->cols, bank->stride, scale, lr, &rule, m->muon_scratch,
                m->muon_scratch_bytes, &m->matmul, m->guard, m->stream);
}

// Reads g, changes p, master and the optimizer's state, or none of them if the guard is set. What
// AdamW does is short and comes first: its weights are then on their way to the other ranks under
// Newton-Schulz, and the tables are what the next forward needs first.
static void update(Model* m) {
    for (int pass = 0; pass < 2; pass++) {
        for (int b = 0; b < BANKS; b++) {
            Bank* bank = &m->params.banks[b];
            if (bank->n == 0 || bank->adam != (pass == 0)) continue;
            if (bank->adam && !m->now.adam_now) continue;
            float lr = bank_lr(m->cfg, (BankId)b) * m->now.lr_mult;
            trace_label("update");
            if (bank->adam) update_adamw(m, bank, lr);
            else if (bank->owned) update_muon(m, bank, lr);
            for (int k = 0; k < bank->zero.bucket_count; k++)
                zero_gather(&m->params.zero, &bank->zero, k, bank->p, false, m->stream);
        }
    }
}

// ---- a batch, a step, an evaluation -------------------------------------------------------------

// Sends a batch of N tokens in pinned memory to the device. The stream owns it until batch_wait.
static void batch_upload(Model* m, const Batch* batch, int N) {
    CUDA_CHECK(cudaMemcpyAsync(m->tokens, batch->inputs, N * sizeof(int), cudaMemcpyHostToDevice,
                               m->stream));
    CUDA_CHECK(cudaMemcpyAsync(m->targets, batch->targets, N * sizeof(int), cudaMemcpyHostToDevice,
                               m->stream));
    m->cu_count = batch->cu_count;
    if (m->cu_seqlens)
        CUDA_CHECK(cudaMemcpyAsync(m->cu_seqlens, batch->cu_seqlens, m->cu_count * sizeof(int),
                                   cudaMemcpyHostToDevice, m->stream));
    CUDA_CHECK(cudaEventRecord(m->uploaded, m->stream));
}
static void batch_wait(Model* m) { CUDA_CHECK(cudaEventSynchronize(m->uploaded)); }

// The gradient of a token's loss times this, summed over all tokens of the step, is the gradient.
static float grad_scale(const Settings* cfg) {
    return (cfg->loss == FLAG_LOSS_MEAN ? 1.0f : (float)cfg->seq_len) / (float)cfg->batch_tokens;
}

// Gradients and loss of one micro-batch in pinned memory.
static void micro_step(Model* m, const Batch* batch, int micro) {
    int N = m->B * m->T;
    if (micro == 0) zero_gradients(m);
    embedding_index_build(&m->index, batch->inputs, N, m->rows);
    embedding_index_upload(&m->index, m->stream);
    batch_upload(m, batch, N);
    forward(m, &m->acts, m->B, m->T, 0);
    if (micro == 0 && m->cfg->fp8_head) head_quantize(m);
    classify(m, &m->acts, m->stats + STATS + micro, N, true, grad_scale(m->cfg),
             starts_at_zero(m, bank(m, PARAM_TABLE[head_id(m)].bank), micro));
    backward(m, m->B, m->T, micro);
}

// Queues what a step comes to, over all ranks and equal on all of them, and sets the guard by it.
// slot->stats[STAT_STOP .. STATS - 1]: what this rank has to say, to be summed with the others'.
static StepSlot* step_measure(Model* m, StepSlot* slot) {
    size_t said = (STATS - STAT_STOP) * sizeof(float), summed = STATS - STAT_NORMS + m->micro_steps;
    int segments = m->now.adam_now ? m->segments : m->muon_segments;
    bool skip = m->cfg->on_nonfinite == FLAG_NONFINITE_SKIP;
    float* norms = m->stats + STAT_NORMS;
    cudaStream_t s = m->stream;
    trace_label("measure");
    zero_wait_reduced(&m->params.zero, s);
    norms_measure(m->segment_norms, &m->norms, segments, s);
    norms_total(norms, m->segment_norms, m->weight_segments, segments, s);
    norms_total(norms + 2, m->segment_norms, 0, m->weight_segments, s);
    CUDA_CHECK(cudaMemcpyAsync(m->stats + STAT_STOP, slot->stats + STAT_STOP, said,
                               cudaMemcpyHostToDevice, s));
    zero_sum(&m->params.zero, m->stats + STAT_NORMS, summed, false, s);
    guard_check(m->guard, norms, m->stats + STATS, m->micro_steps, !skip, s);
    // What Adam keeps for the next step is part of this one.
    for (int b = 0; b < BANKS && skip && !m->now.adam_now; b++) {
        Bank* bank = &m->params.banks[b];
        if (bank->adam) guard_clear_if(bank->g, bank->n, m->guard, s);
    }
    CUDA_CHECK(cudaMemcpyAsync(slot->stats + STAT_NORMS, m->stats + STAT_NORMS,
                               summed * sizeof(float), cudaMemcpyDeviceToHost, s));
    if (segments)
        CUDA_CHECK(cudaMemcpyAsync(slot->norms, m->segment_norms,
                                   2 * (size_t)segments * sizeof(float), cudaMemcpyDeviceToHost, s));
    CUDA_CHECK(cudaEventRecord(slot->there, s));
    return slot;
}

typedef struct StepStats { double loss, grad_norm, weight_norm; bool finite, stop; } StepStats;

// Waits for it; what the update does with it goes on meanwhile.
static StepStats step_result(const Model* m, const StepSlot* slot) {
    CUDA_CHECK(cudaEventSynchronize(slot->there));
    const float* norms = slot->stats + STAT_NORMS;
    double loss = 0;
    for (int micro = 0; micro < m->micro_steps; micro++) loss += slot->stats[STATS + micro];
    StepStats stats;
    stats.loss = loss / (double)m->cfg->batch_tokens;
    stats.grad_norm = sqrt((double)norms[0]);
    stats.weight_norm = sqrt((double)norms[2]);
    stats.finite = isfinite(loss) && isfinite(norms[0]) && norms[1] == 0.0f && isfinite(norms[2]) &&
                   norms[3] == 0.0f;
    stats.stop = slot->stats[STAT_STOP] != 0.0f;
    return stats;
}

// Mean loss over exactly the predictions that val_open was asked for.
static double evaluate(Model* m, ValLoader* val) {
    int B = m->val_B, T = m->val_T, N = B * T;
    *m->val_sum_host = 0;
    for (int64_t k = 0; k < val->batches; k++) {
        batch_wait(m);
        val_batch(val, k, m->host.inputs, m->host.targets);
        batch_segments(&m->host, B, T, (int)m->cfg->end_of_text);
        batch_upload(m, &m->host, N);
        forward(m, &m->val_acts, B, T, 0);
        classify(m, &m->val_acts, m->val_loss, N, false, 0.0f, false);
        CUDA_CHECK(cudaMemcpyAsync(m->val_loss_host, m->val_loss, sizeof(float),
                                   cudaMemcpyDeviceToHost, m->stream));
        CUDA_CHECK(cudaStreamSynchronize(m->stream));
        *m->val_sum_host += *m->val_loss_host;
    }
    CUDA_CHECK(cudaMemcpyAsync(m->val_sum, m->val_sum_host, sizeof(double), cudaMemcpyHostToDevice,
                               m->stream));
    zero_sum(&m->params.zero, m->val_sum, 1, true, m->stream);
    CUDA_CHECK(cudaMemcpyAsync(m->val_sum_host, m->val_sum, sizeof(double), cudaMemcpyDeviceToHost,
                               m->stream));
    CUDA_CHECK(cudaStreamSynchronize(m->stream));
    return *m->val_sum_host / (double)val->predictions;
}
