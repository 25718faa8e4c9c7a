/*
modded-llm.c: trains GPT-2 124M on FineWeb tokens to a validation loss of 3.28, in plain C and CUDA.

Read it in this order: `train` (the run in one screen), `forward` (the model), `backward` (the same
lines in reverse), `update` (Muon and AdamW). Everything numeric lives in llmc/, one operation per
header, and the settings of a run live in the files of scripts/recipes.

The model, in the order of the tokens' journey:
  - token embedding, no position embedding; in some recipes normalised, in one tied to the head
  - L layers of  x += attention(rms(x)),  x += mlp(rms(x));  RMSNorm without gain
  - attention: QK-norm, rotary positions, causal, head dim 32, 64 or 128
  - MLP: ReLU² between a matrix to 4C channels and one back
  - options of a recipe: U-net skips, a learned mix with the embedding, a learned mix of the values
    with layer 0's, a softcap on the logits
  - matrices are trained by Muon, tables and scalars by AdamW
One process drives one GPU. N of them (ranks) each take an N-th of a batch; every matrix is updated
by one rank, its owner (ZeRO-1, llmc/zero.cuh).
The same file is compiled by nvcc for a GPU, and by g++ against llmc/host, which executes the very
same kernels on a CPU.

Letters: B sequences of T tokens in a micro-batch, N = B*T rows, C channels, H heads of D = C/H,
F = 4C, V columns of the vocabulary (V8: filled up to a multiple of 8), L layers.

How to run:  ./train_gpt2 --help
*/
#include <math.h>
#include <sys/resource.h>
#include <unistd.h>
#include "llmc/common.h"
#include "llmc/flags.h"
#include "llmc/schedule.h"
#include "llmc/rng.h"
#include "llmc/dataloader.h"
#include "llmc/safetensors.h"
#include "llmc/log.h"
#include "llmc/sampler.h"
#include "llmc/device.cuh"
#include "llmc/matmul.cuh"
#include "llmc/init.cuh"
#include "llmc/embedding.cuh"
#include "llmc/rmsnorm.cuh"
#include "llmc/rotary.cuh"
#include "llmc/attention.cuh"
#include "llmc/relu2.cuh"
#include "llmc/mix.cuh"
#include "llmc/loss.cuh"
#include "llmc/norm.cuh"
#include "llmc/adamw.cuh"
#include "llmc/muon.cuh"
#include "llmc/zero.cuh"

#ifndef GIT_COMMIT
#define GIT_COMMIT "unknown"
#endif

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

enum { MAX_LAYERS = 64, GPT2_END = 50256 };   // GPT2_END: end of text in GPT-2's vocabulary

// ---- parameters: the model is data ------------------------------------------------------------

// A bank is a run of equal-shape tensors in memory, and the unit of everything that is not forward
// or backward: allocation, optimizer, checkpoint. The four square matrices of a layer lie side by
// side, so that Q, K and V are one (3C, C) matrix to the matmul and 4L problems of one shape to
// Muon.
typedef enum {
    BANK_EMBED, BANK_HEAD, BANK_ATTN, BANK_MLP, BANK_LAMBDAS, BANK_LAMB, BANK_SKIP, BANKS
} BankId;
typedef enum { SIZE_1, SIZE_2, SIZE_C, SIZE_F, SIZE_V, SIZE_HALF_L } Size;
typedef enum {
    INIT_ZERO, INIT_ONE, INIT_HALF, INIT_ONE_ZERO, INIT_FAN_IN, INIT_EMBED, INIT_HEAD
} Init;
typedef enum { ALWAYS, UNTIED, X0_MIX, VALUE_MIX, SKIPS } Feature;
typedef enum { TABLE, MATRIX, SCALAR } Kind;    // TABLE, SCALAR: AdamW. MATRIX: Muon

typedef struct ParamRow {
    const char* name;       // in checkpoints; %d is the layer
    BankId bank;
    int slot;               // place within a layer's share of the bank
    Size rows, cols;        // y = x wᵀ: rows are outputs, cols inputs
    int transposed;         // lies in memory as (cols, rows), so that its bank has one shape
    Init init;
    Feature needs;
} ParamRow;

typedef enum {
    WTE, LM_HEAD, ATTN_Q, ATTN_K, ATTN_V, ATTN_PROJ, MLP_FC, MLP_PROJ, LAMBDAS, LAMB, SKIP_WEIGHTS,
    PARAMS
} ParamId;

static const ParamRow PARAM_TABLE[PARAMS] = {
    // name                     bank    slot  rows    cols   transposed init     needs
    {"wte.weight",              BANK_EMBED,   0, SIZE_V, SIZE_C,      0, INIT_EMBED,    ALWAYS},
    {"lm_head.weight",          BANK_HEAD,    0, SIZE_V, SIZE_C,      0, INIT_HEAD,     UNTIED},
    {"h.%d.attn.c_q.weight",    BANK_ATTN,    0, SIZE_C, SIZE_C,      0, INIT_FAN_IN,   ALWAYS},
    {"h.%d.attn.c_k.weight",    BANK_ATTN,    1, SIZE_C, SIZE_C,      0, INIT_FAN_IN,   ALWAYS},
    {"h.%d.attn.c_v.weight",    BANK_ATTN,    2, SIZE_C, SIZE_C,      0, INIT_FAN_IN,   ALWAYS},
    {"h.%d.attn.c_proj.weight", BANK_ATTN,    3, SIZE_C, SIZE_C,      0, INIT_ZERO,     ALWAYS},
    {"h.%d.mlp.c_fc.weight",    BANK_MLP,     0, SIZE_F, SIZE_C,      0, INIT_FAN_IN,   ALWAYS},
    {"h.%d.mlp.c_proj.weight",  BANK_MLP,     1, SIZE_C, SIZE_F,      1, INIT_ZERO,     ALWAYS},
    {"h.%d.lambdas",            BANK_LAMBDAS, 0, SIZE_1, SIZE_2,      0, INIT_ONE_ZERO, X0_MIX},
    {"h.%d.attn.lamb",          BANK_LAMB,    0, SIZE_1, SIZE_1,      0, INIT_HALF,     VALUE_MIX},
    {"skip_weights",            BANK_SKIP,    0, SIZE_1, SIZE_HALF_L, 0, INIT_ONE,      SKIPS},
};

typedef struct Bank {
    Kind kind;
    int bf16;               // the recipe keeps value and optimizer state in bf16
    int has_master;         // on its owner: an fp32 value behind the bf16 one
    int slots, copies;      // tensors per layer (or 1), tensors in all
    int rows, cols;         // shape in memory of each
    size_t stride, n;       // elements from one tensor to the next (a multiple of 8), and in all
    floatX* p;              // what forward and backward read
    float* g;               // gradient; between steps the fp32 values may pass through it
    // Of the units that this rank owns, one after another:
    float* master;          // fp32 value behind p; NULL in the fp32 build and for bf16 tables,
                            // and where this rank owns none
    float *m, *v;           // first moment (Muon: momentum), second moment (AdamW only)
    size_t owned;           // elements of each
    ZeroBank zero;          // who owns what
} Bank;

// ---- activations ------------------------------------------------------------------------------

// Every buffer of forward and backward, once. Rows marked `saved` live from forward to backward;
// the others are scratch. What backward can rebuild cheaply is not saved: the input of ReLU² (the
// root of its output), the mixed values, the residual stream unless a recipe trains its mixing
// weights.
//    type    name      copies         elements       saved
#define ACTS(A)                                                                                   \
    A(floatX, emb,      embed_norm,    N * C,         0)  /* wte[token] before its norm */        \
    A(float,  emb_rstd, embed_norm,    N,             1)                                          \
    A(floatX, x,        streams,       N * C,         1)  /* stream into layer l; x[L]: out */    \
    A(floatX, mid,      1,             N * C,         0)  /* stream inside a layer */             \
    A(floatX, skip_out, skips,         N * C,         1)  /* output of layer L/2-1 */             \
    A(floatX, ln1,      L,             N * C,         1)                                          \
    A(float,  ln1_rstd, L,             N,             1)                                          \
    A(floatX, qkv,      L,             N * 3 * C,     1)  /* q k normed, rotated; v as is */      \
    A(float,  qk_rstd,  L,             N * 2 * H,     1)                                          \
    A(floatX, v,        value_mix,     N * C,         0)  /* mixed with layer 0's */              \
    A(floatX, att,      L,             N * C,         1)                                          \
    A(float,  lse,      L,             N * H,         1)                                          \
    A(floatX, ln2,      L,             N * C,         1)                                          \
    A(float,  ln2_rstd, L,             N,             1)                                          \
    A(floatX, fc,       1,             N * F,         0)                                          \
    A(floatX, relu,     L,             N * F,         1)                                          \
    A(floatX, branch,   1,             N * C,         0)  /* what a branch adds to x */           \
    A(floatX, lnf,      1,             N * C,         1)                                          \
    A(float,  lnf_rstd, 1,             N,             1)                                          \
    A(floatX, logits,   1,             R * V8,        0)  /* R rows, then their gradient */       \
    A(float,  losses,   1,             N,             0)                                          \
    A(floatX, dx,       1,             N * C,         0)  /* of the stream */                     \
    A(floatX, dln,      1,             N * C,         0)                                          \
    A(floatX, dfc,      1,             N * F,         0)                                          \
    A(floatX, datt,     1,             N * C,         0)                                          \
    A(float,  delta,    1,             N * H,         0)                                          \
    A(floatX, dqkv,     1,             N * 3 * C,     0)                                          \
    A(floatX, dv0,      value_mix,     N * C,         0)  /* of layer 0's values, by mixes */     \
    A(floatX, dx0,      x0_mix,        N * C,         0)  /* of the embedding, by mixes */        \
    A(floatX, dskip,    skips * L / 2, N * C,         0)  /* of layer l's output, by skip */      \
    A(float,  cos,      1,             T * D / 2,     0)                                          \
    A(float,  sin,      1,             T * D / 2,     0)                                          \
    A(float,  reduce,   1,             reduce_floats, 0)  /* partial sums */

typedef struct Acts {
#define FIELD(type, name, copies, elements, saved) type* name[MAX_LAYERS + 1];
    ACTS(FIELD)
#undef FIELD
} Acts;

// ---- the model ---------------------------------------------------------------------------------

typedef struct Layer {
    int skip_from;          // layer whose output is added to the stream on entry, or -1
    int skip_index;         // its place in skip_weights
    int is_skip_source;
} Layer;

typedef struct Memory { const char* name; size_t bytes; } Memory;
enum { MAX_MEMORY = 24, MAX_ALLOCATIONS = 32 * MAX_LAYERS };

typedef struct Model {
    const Settings* cfg;
    int B, T, C, H, D, F, V, L, R;   // R: rows of logits that exist at a time
    size_t reduce_floats;            // partial sums that the largest reduction needs
    Layer plan[MAX_LAYERS + 1];      // plan[L] is the way out: no skip
    Bank banks[BANKS];
    ZeroBank* shards[BANKS];         // &banks[b].zero of the banks that this recipe has
    int shard_count;
    Zero zero;
    bf16* wire;                      // gradients on their way
    Acts acts;
    EmbeddingIndex index; // positions of each distinct token, for the embedding's backward
    int *tokens, *targets;           // (N) on the device
    int *tokens_host, *targets_host; // (N) pinned
    float* stats;                    // device: STATS numbers, then the loss sum of each micro-step
    float* stats_host;               // pinned: the same
    double *val_sum, *val_sum_host;  // sum of losses over ranks
    int micro_steps;                 // micro-batches of this rank in an optimizer step
    cudaEvent_t uploaded;            // the pinned tokens may be overwritten
    void* muon_scratch;
    size_t muon_scratch_bytes;
    Matmul matmul;
    cudaStream_t stream;
    Memory memory[MAX_MEMORY];       // what was allocated for what
    int memories;
    size_t host_bytes;               // pinned buffers, and a tensor on its way to a file
    void* allocation[MAX_ALLOCATIONS];
    int allocations;
} Model;

static const double GIB = 1073741824.0;

// From STAT_NORM2 on they are summed over ranks, the losses behind them too.
enum { STAT_ONE, STAT_LOSS, STAT_NORM2, STAT_NONFINITE, STAT_STOP, STATS };

static void device_count(Model* m, const char* name, size_t bytes) {
    int i = 0;
    while (i < m->memories && strcmp(m->memory[i].name, name) != 0) i++;
    if (i == m->memories) {
        REQUIRE(m->memories < MAX_MEMORY, "more than %d kinds of memory", MAX_MEMORY);
        m->memory[m->memories++] = {name, 0};
    }
    m->memory[i].bytes += bytes;
}

// All device memory of the trainer comes through here, so that the printed table is the truth.
static void* device_alloc(Model* m, const char* name, size_t bytes) {
    device_count(m, name, bytes);
    if (bytes == 0 || m->cfg->dry_run) return NULL;
    REQUIRE(m->allocations < MAX_ALLOCATIONS, "more than %d device allocations", MAX_ALLOCATIONS);
    void* p = NULL;
    if (cudaMalloc(&p, bytes) != cudaSuccess) {
        size_t free_bytes = 0, total_bytes = 0;
        cudaMemGetInfo(&free_bytes, &total_bytes);
        die("out of memory: %s need %.2f GiB more, %.2f of %.2f GiB are free\n"
            "try a smaller --micro-batch (now %d); --dry-run prints the whole table",
            name, bytes / GIB, free_bytes / GIB, total_bytes / GIB, m->B);
    }
    m->allocation[m->allocations++] = p;
    return p;
}

static int feature_on(const Settings* cfg, Feature feature) {
    switch (feature) {
        case ALWAYS: return 1;
        case UNTIED: return cfg->head == FLAG_HEAD_UNTIED;
        case X0_MIX: return cfg->x0_mix != 0;
        case VALUE_MIX: return cfg->value_residual != 0;
        case SKIPS: return cfg->skips != 0;
    }
    return 0;
}

static int size_of(const Model* m, Size size) {
    switch (size) {
        case SIZE_1: return 1;
        case SIZE_2: return 2;
        case SIZE_C: return m->C;
        case SIZE_F: return m->F;
        case SIZE_V: return m->V;
        case SIZE_HALF_L: return m->L / 2;
    }
    return 0;
}

static int param_copies(const Model* m, ParamId id) {
    const ParamRow* row = &PARAM_TABLE[id];
    if (!feature_on(m->cfg, row->needs)) return 0;
    return strstr(row->name, "%d") ? m->L : 1;
}

// Offset of a tensor in its bank, in elements.
static size_t param_offset(const Model* m, ParamId id, int layer) {
    const Bank* bank = &m->banks[PARAM_TABLE[id].bank];
    return ((size_t)layer * bank->slots + PARAM_TABLE[id].slot) * bank->stride;
}
static const floatX* weight(const Model* m, ParamId id, int layer) {
    return m->banks[PARAM_TABLE[id].bank].p + param_offset(m, id, layer);
}
static const float* scalar(const Model* m, ParamId id, int layer) {   // scalars are read in fp32
    const Bank* bank = &m->banks[PARAM_TABLE[id].bank];      // and every rank has all of them
    return (bank->master ? bank->master : (const float*)bank->p) + param_offset(m, id, layer);
}
static float* grad(const Model* m, ParamId id, int layer) {
    return m->banks[PARAM_TABLE[id].bank].g + param_offset(m, id, layer);
}
// The output head: its own matrix, or the embedding's.
static ParamId head_id(const Model* m) { return m->cfg->head == FLAG_HEAD_TIED ? WTE : LM_HEAD; }

// Cuts the banks into units, and the units into owners: a matrix of the layers is a unit, as is
// each rank's share of a table; scalars are everybody's.
static void banks_deal(Model* m) {
    static const char* const NAMES[BANKS] = {"embed", "head", "attn", "mlp", "scalars", "scalars",
                                             "scalars"};
    Zero* z = &m->zero;
    int slots[BANKS], matrices = 0, muon = m->cfg->optimizer == FLAG_OPTIMIZER_MUON;
    for (int b = 0; b < BANKS; b++)
        if (m->banks[b].n && m->banks[b].kind == MATRIX) slots[matrices++] = m->banks[b].slots;
    int layers = zero_bucket_layers(m->L, slots, matrices, z->world);
    m->shard_count = 0;
    for (int b = 0; b < BANKS; b++) {
        Bank* bank = &m->banks[b];
        if (bank->n == 0) continue;
        double small = bank->rows < bank->cols ? bank->rows : bank->cols;
        double cost = (double)bank->rows * bank->cols * (muon ? small : 1);
        if (bank->kind == MATRIX) {
            zero_bank_init(z, &bank->zero, bank->stride, bank->copies, layers * bank->slots, false,
                           cost);
        } else if (bank->kind == TABLE) {
            size_t share = zero_share(z, bank->n);
            int shares = z->shard ? z->world : 1;
            bank->n = share * shares;
            zero_bank_init(z, &bank->zero, share, shares, shares, false, 0);
        } else {
            zero_bank_init(z, &bank->zero, bank->n, 1, 1, true, 0);
        }
        for (int k = 0; k < bank->zero.bucket_count; k++) {
            ZeroBucket* bucket = &bank->zero.buckets[k];
            int first = bucket->first / bank->slots;
            int last = (bucket->first + bucket->units) / bank->slots - 1;
            if (bank->kind != MATRIX) snprintf(bucket->label, sizeof bucket->label, "%s", NAMES[b]);
            else snprintf(bucket->label, sizeof bucket->label, "%s %d-%d", NAMES[b], first, last);
        }
        m->shards[m->shard_count++] = &bank->zero;
    }
    zero_deal(z, m->shards, m->shard_count);
    for (int b = 0; b < BANKS; b++)
        m->banks[b].owned = m->banks[b].n ? m->banks[b].zero.owned * m->banks[b].zero.unit : 0;
}

static void banks_build(Model* m) {
    for (int id = 0; id < PARAMS; id++) {
        const ParamRow* row = &PARAM_TABLE[id];
        int copies = param_copies(m, (ParamId)id);
        if (copies == 0) continue;
        Bank* bank = &m->banks[row->bank];
        bank->rows = size_of(m, row->transposed ? row->cols : row->rows);
        bank->cols = size_of(m, row->transposed ? row->rows : row->cols);
        bank->kind = bank->rows == 1 ? SCALAR : row->rows == SIZE_V ? TABLE : MATRIX;
        bank->bf16 = m->cfg->bf16_tables && (bank->kind == SCALAR || row->bank == BANK_EMBED);
        bank->slots = row->slot + 1;
        bank->copies += copies;
        // The logits of a table are made 8 columns at a time: rows of zeros fill it up.
        size_t rows = bank->kind == TABLE ? loss_stride(bank->rows) : bank->rows;
        bank->stride = ceil_div(rows * bank->cols, 8) * 8;
        bank->n = bank->stride * bank->copies;
    }
    banks_deal(m);
    for (int b = 0; b < BANKS; b++) {
        Bank* bank = &m->banks[b];
        if (bank->n == 0) continue;
        int adam = bank->kind != MATRIX || m->cfg->optimizer == FLAG_OPTIMIZER_ADAMW;
        size_t state = bank->owned * sizeof(float);
        bank->p = (floatX*)device_alloc(m, "weights", bank->n * sizeof(floatX));
        bank->g = (float*)device_alloc(m, "gradients", bank->n * sizeof(float));
        bank->m = (float*)device_alloc(m, adam ? "Adam m" : "Muon momentum", state);
        if (adam) bank->v = (float*)device_alloc(m, "Adam v", state);
        bank->has_master = FLOATX_IS_BF16 && !(bank->bf16 && bank->kind == TABLE);
        if (bank->has_master) bank->master = (float*)device_alloc(m, "master weights", state);
    }
}

// How far the rows of logits that exist at a time may reach: 256 MiB keeps the matmul large and the
// buffer small beside the activations.
static int logit_rows(int N, int V) {
    size_t rows = ((size_t)256 << 20) / ((size_t)V * sizeof(floatX));
    return rows < 1 ? 1 : rows < (size_t)N ? (int)rows : N;
}

static void acts_build(Model* m) {
    const Settings* cfg = m->cfg;
    size_t T = m->T, N = (size_t)m->B * m->T, C = m->C, H = m->H, D = m->D, F = m->F, L = m->L,
           R = m->R, V8 = loss_stride(m->V);
    int embed_norm = cfg->embed_norm != 0, x0_mix = cfg->x0_mix != 0, skips = cfg->skips != 0,
        value_mix = cfg->value_residual != 0;
    // Backward wants the stream only in recipes that train a weight on it; and the embedding, if it
    // was normed.
    size_t streams = x0_mix || skips ? L + 1 : embed_norm ? 2 : 1;
    size_t reduce_floats = m->reduce_floats;
    Acts* a = &m->acts;
#define PLACE(type, name, copies, elements, saved)                                                 \
    for (size_t i = 0; i < (size_t)(copies); i++)                                                  \
        a->name[i] = (type*)device_alloc(m, saved ? "activations" : "scratch",                     \
                                         (size_t)(elements) * sizeof(type));
    ACTS(PLACE)
#undef PLACE
    for (size_t l = streams; l <= L; l++) a->x[l] = a->x[streams - 1];
    m->tokens = (int*)device_alloc(m, "scratch", N * sizeof(int));
    m->targets = (int*)device_alloc(m, "scratch", N * sizeof(int));
    m->stats = (float*)device_alloc(m, "scratch", (STATS + m->micro_steps) * sizeof(float));
    m->val_sum = (double*)device_alloc(m, "scratch", sizeof(double));
}

// U-net: the outputs of the first half of the layers are added, last first, on entry to the second.
static void plan_build(Model* m) {
    for (int l = 0; l <= m->L; l++) m->plan[l] = {-1, 0, 0};
    if (!m->cfg->skips) return;
    for (int l = m->L / 2; l < m->L; l++) {
        int from = m->L - 1 - l;
        m->plan[l].skip_from = from;
        m->plan[l].skip_index = l - m->L / 2;
        m->plan[from].is_skip_source = 1;
    }
}

// The fp32 values of a bank from `offset` on pass from g into the weights, and into the masters
// this rank owns. So new values, from a file or from the random numbers, are made in g.
static void weights_adopt(Model* m, Bank* bank, size_t offset, size_t n) {
    const ZeroBank* zero = &bank->zero;
    float* value = bank->g + offset;
    if (bank->bf16) cast_round_bf16(value, value, n, m->stream);
    cast_to_floatX(bank->p + offset, value, n, m->stream);
    for (int i = 0; i < zero->owned && bank->master; i++) {
        size_t begin = zero->own[i] * zero->unit, end = begin + zero->unit;
        size_t from = begin > offset ? begin : offset, to = end < offset + n ? end : offset + n;
        if (from >= to) continue;
        CUDA_CHECK(cudaMemcpyAsync(bank->master + i * zero->unit + (from - begin), bank->g + from,
                                   (to - from) * sizeof(float), cudaMemcpyDeviceToDevice,
                                   m->stream));
    }
}

// The other way: g of every rank holds the fp32 values of all weights, until the next step. All
// ranks call it together.
static void weights_collect(Model* m) {
    for (int b = 0; b < BANKS; b++) {
        Bank* bank = &m->banks[b];
        ZeroBank* zero = &bank->zero;
        if (bank->n == 0) continue;
        if (!bank->has_master) {      // then p is the value, on every rank
            for (int k = 0; k < zero->bucket_count; k++)
                zero_wait_gathered(&m->zero, zero, zero->buckets[k].first, m->stream);
            cast_to_float(bank->g, bank->p, bank->n, m->stream);
            continue;
        }
        for (int i = 0, run; i < zero->owned; i += run) {
            run = zero_run(zero, i);
            CUDA_CHECK(cudaMemcpyAsync(bank->g + zero->own[i] * zero->unit,
                                       bank->master + i * zero->unit,
                                       run * zero->unit * sizeof(float), cudaMemcpyDeviceToDevice,
                                       m->stream));
        }
        for (int k = 0; k < zero->bucket_count; k++) {
            zero_gather(&m->zero, zero, k, bank->g, true, m->stream);
            zero_wait_gathered(&m->zero, zero, zero->buckets[k].first, m->stream);
        }
    }
    CUDA_CHECK(cudaStreamSynchronize(m->stream));
}

// Every tensor has its own random stream, so that a value depends on the seed, the tensor and the
// place in it, and on nothing else.
static void param_init(Model* m, ParamId id, int layer) {
    const Settings* cfg = m->cfg;
    const ParamRow* row = &PARAM_TABLE[id];
    const Bank* bank = &m->banks[row->bank];
    size_t n = (size_t)bank->rows * bank->cols;
    float* value = grad(m, id, layer);
    uint32_t rng = RNG_INIT_STREAM + (uint32_t)(id * MAX_LAYERS + layer);
    float fan_in = 1.0f / sqrtf((float)size_of(m, row->cols));
    float low = 0, high = 0;             // uniform between them; equal: a constant
    bool normal = false;
    switch (row->init) {
        case INIT_ZERO: break;
        case INIT_ONE: low = high = 1; break;
        case INIT_HALF: low = high = 0.5f; break;
        case INIT_ONE_ZERO: low = high = 1, n = 1; break;
        case INIT_FAN_IN: low = -fan_in, high = fan_in; break;
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

// Sizes, plan, owners and memory, of one rank. Under --dry-run the memory is counted and not taken.
static void model_build(Model* m, const Settings* cfg, int rank, int world) {
    memset(m, 0, sizeof *m);
    m->cfg = cfg;
    m->B = (int)cfg->micro_batch, m->T = (int)cfg->seq_len, m->L = (int)cfg->layers;
    m->C = (int)cfg->channels, m->H = (int)cfg->heads, m->V = (int)cfg->vocab;
    m->D = m->C / m->H, m->F = 4 * m->C;
    m->R = logit_rows(m->B * m->T, m->V);
    m->micro_steps = (int)(cfg->batch_tokens / ((int64_t)m->B * m->T * world));
    zero_init(&m->zero, rank, world, cfg->zero != 0,
              FLOATX_IS_BF16 && cfg->grad_reduce == FLAG_GRAD_REDUCE_WEIGHTS);
    REQUIRE(m->L <= MAX_LAYERS, "--layers %d is more than the %d this program has tables for", m->L,
            MAX_LAYERS);
    plan_build(m);
    banks_build(m);
    size_t largest = 0, wire = 0;
    for (int b = 0; b < BANKS; b++) {
        if (m->banks[b].owned > largest) largest = m->banks[b].owned;
        size_t bucket = zero_wire_elements(&m->zero, &m->banks[b].zero);
        if (bucket > wire) wire = bucket;
    }
    m->wire = (bf16*)device_alloc(m, "gradients to send", wire * sizeof(bf16));
    size_t norm = grad_norm_scratch_floats(largest), mix = mix_scratch_floats(m->B * m->T, m->C);
    m->reduce_floats = norm > mix ? norm : mix;
    acts_build(m);
    for (int b = 0; b < BANKS; b++) {
        Bank* bank = &m->banks[b];
        if (bank->owned == 0 || bank->kind != MATRIX || cfg->optimizer == FLAG_OPTIMIZER_ADAMW)
            continue;
        size_t bytes = muon_scratch_bytes(bank->zero.owned, bank->rows, bank->cols);
        if (bytes > m->muon_scratch_bytes) m->muon_scratch_bytes = bytes;
    }
    m->muon_scratch = device_alloc(m, "Newton-Schulz", m->muon_scratch_bytes);
    device_count(m, "matmul workspace", MATMUL_WORKSPACE_BYTES);
    device_count(m, "scratch", embedding_index_bytes(m->B * m->T, m->C));

    // A file is written by rank 0 and read by all.
    size_t tensor = 0;
    for (int b = 0; b < BANKS && (rank == 0 || cfg->load[0]); b++) {
        size_t elements = (size_t)m->banks[b].rows * m->banks[b].cols;
        if (elements > tensor) tensor = elements;
    }
    m->host_bytes = (2 * (size_t)m->B * m->T + loader_memory(m->B, m->T)) * sizeof(int) +
                    tensor * sizeof(float);
}

static void zero_fill(Model* m, void* p, size_t bytes) {
    if (p) CUDA_CHECK(cudaMemsetAsync(p, 0, bytes, m->stream));
}

// Streams, libraries, host buffers, and the first values of everything. `ranks`: NULL for one.
static void model_start(Model* m, Ranks* ranks) {
    const Settings* cfg = m->cfg;
    size_t T = m->T, D = m->D, N = (size_t)m->B * m->T;
    CUDA_CHECK(cudaStreamCreate(&m->stream));
    trace_name_stream(m->stream, "compute");
    zero_start(&m->zero, m->shards, m->shard_count, m->wire);
    zero_connect(&m->zero, ranks);
    CUDA_CHECK(cudaEventCreateWithFlags(&m->uploaded, cudaEventDisableTiming));
    matmul_init(&m->matmul, m->stream);
    embedding_index_init(&m->index, (int)N, m->V, m->C);
    CUDA_CHECK(cudaMallocHost((void**)&m->tokens_host, N * sizeof(int)));
    CUDA_CHECK(cudaMallocHost((void**)&m->targets_host, N * sizeof(int)));
    CUDA_CHECK(
        cudaMallocHost((void**)&m->stats_host, (STATS + (size_t)m->micro_steps) * sizeof(float)));
    CUDA_CHECK(cudaMallocHost((void**)&m->val_sum_host, sizeof(double)));
    float one = 1.0f;
    CUDA_CHECK(cudaMemcpy(m->stats + STAT_ONE, &one, sizeof one, cudaMemcpyHostToDevice));

    float* cosines = (float*)host_alloc(T * D, sizeof(float));
    float* sines = cosines + T * D / 2;
    rotary_tables(cosines, sines, (int)T, (int)D, (float)cfg->rotary_base, cfg->rotary_round_bf16);
    CUDA_CHECK(
        cudaMemcpy(m->acts.cos[0], cosines, T * D / 2 * sizeof(float), cudaMemcpyHostToDevice));
    CUDA_CHECK(
        cudaMemcpy(m->acts.sin[0], sines, T * D / 2 * sizeof(float), cudaMemcpyHostToDevice));
    free(cosines);

    for (int b = 0; b < BANKS; b++) {
        Bank* bank = &m->banks[b];
        zero_fill(m, bank->g, bank->n * sizeof(float));
        zero_fill(m, bank->m, bank->owned * sizeof(float));
        zero_fill(m, bank->v, bank->owned * sizeof(float));
    }
    for (int id = 0; id < PARAMS; id++)
        for (int layer = 0; layer < param_copies(m, (ParamId)id); layer++)
            param_init(m, (ParamId)id, layer);
    for (int b = 0; b < BANKS; b++)
        if (m->banks[b].n) weights_adopt(m, &m->banks[b], 0, m->banks[b].n);
    CUDA_CHECK(cudaStreamSynchronize(m->stream));
}

static void model_free(Model* m) {
    CUDA_CHECK(cudaStreamSynchronize(m->stream));
    zero_free(&m->zero, m->shards, m->shard_count);
    for (int b = 0; b < BANKS; b++) zero_bank_free(&m->banks[b].zero);
    for (int i = 0; i < m->allocations; i++) CUDA_CHECK(cudaFree(m->allocation[i]));
    embedding_index_free(&m->index);
    matmul_free(&m->matmul);
    CUDA_CHECK(cudaFreeHost(m->tokens_host));
    CUDA_CHECK(cudaFreeHost(m->targets_host));
    CUDA_CHECK(cudaFreeHost(m->stats_host));
    CUDA_CHECK(cudaFreeHost(m->val_sum_host));
    CUDA_CHECK(cudaEventDestroy(m->uploaded));
    CUDA_CHECK(cudaStreamDestroy(m->stream));
}

static float attention_scale(const Model* m) {
    return m->cfg->attn_scale > 0 ? (float)m->cfg->attn_scale : 1.0f / sqrtf((float)m->D);
}

// ---- forward -----------------------------------------------------------------------------------

// Forward goes on when the layer's weights of this bank have come from their owners.
static void weights_wait(Model* m, BankId b, int layer) {
    Bank* bank = &m->banks[b];
    zero_wait_gathered(&m->zero, &bank->zero, layer * bank->slots, m->stream);
}

// What layer l left in the stream; only for layers whose output a skip reads.
static floatX* skip_source(Model* m, int l) {
    return m->plan[l + 1].skip_from == l ? m->acts.skip_out[0] : m->acts.x[l + 1];
}

// Enters layer l (l = L: the way out) with the stream x + r, r being what the MLP before adds (NULL
// at the first layer, where x is already in place): adds the skip, mixes in the embedding,
// normalises. Returns the stream inside the layer.
static const floatX* layer_enter(Model* m, int l, const floatX* x, const floatX* r, int N) {
    Acts* a = &m->acts;
    Layer plan = m->plan[l];
    int C = m->C, mixes = m->cfg->x0_mix && l < m->L;
    float eps = (float)m->cfg->norm_eps;
    cudaStream_t s = m->stream;
    floatX* y = l < m->L ? a->ln1[l] : a->lnf[0];
    float* rstd = l < m->L ? a->ln1_rstd[l] : a->lnf_rstd[0];

    if (r && plan.skip_from < 0 && !mixes) { // the plain case is one pass
        residual_rmsnorm_forward(a->x[l], y, rstd, x, r, N, C, eps, s);
        PROBE("out", l - 1, a->x[l], N, C, C);
        return a->x[l];
    }
    if (r) {
        floatX* out = plan.skip_from == l - 1 ? a->skip_out[0] : a->x[l];
        residual_add(out, x, r, (size_t)N * C, s);
        PROBE("out", l - 1, out, N, C, C);
        if (plan.skip_from >= 0)
            mix_forward(a->x[l], out, skip_source(m, plan.skip_from),
                        scalar(m, SKIP_WEIGHTS, 0) + plan.skip_index, MIX_SKIP, N, C, C, C, C, s);
    }
    const floatX* inside = a->x[l];
    PROBE("in", l, inside, N, C, C);
    if (mixes) {
        mix_forward(a->mid[0], inside, a->x[0], scalar(m, LAMBDAS, l), MIX_PAIR, N, C, C, C, C, s);
        inside = a->mid[0];
        PROBE("mix", l, inside, N, C, C);
    }
    rmsnorm_forward(y, rstd, inside, N, C, eps, s);
    return inside;
}

// The values of layer l as attention reads them, and their row stride: as projected, or mixed with
// layer 0's.
static const floatX* layer_values(Model* m, int l, int N, int* ld) {
    Acts* a = &m->acts;
    int C = m->C;
    const floatX* v = a->qkv[l] + 2 * C;
    *ld = 3 * C;
    if (!m->cfg->value_residual || l == 0) return v;
    mix_forward(a->v[0], v, a->qkv[0] + 2 * C, scalar(m, LAMB, l), MIX_LERP, N, C, C, 3 * C, 3 * C,
                m->stream);
    *ld = C;
    return a->v[0];
}

// acts.lnf = the normed stream after the last layer, for B sequences of T tokens in m->tokens.
static void forward(Model* m, int B, int T) {
    const Settings* cfg = m->cfg;
    Acts* a = &m->acts;
    int N = B * T, C = m->C, H = m->H, D = m->D, F = m->F, ldv;
    float attn_scale = attention_scale(m), eps = (float)cfg->norm_eps;
    bool norm_first = cfg->qk_order == FLAG_QK_NORM_FIRST;
    cudaStream_t s = m->stream;
    Matmul* mm = &m->matmul;
    floatX *x0 = a->x[0], *branch = a->branch[0], *fc = a->fc[0], *mid = a->mid[0];

    trace_label("embed");
    weights_wait(m, BANK_EMBED, 0);
    embedding_forward(cfg->embed_norm ? a->emb[0] : x0, weight(m, WTE, 0), m->tokens, N, C, s);
    if (cfg->embed_norm) rmsnorm_forward(x0, a->emb_rstd[0], a->emb[0], N, C, eps, s);    // (N, C)
    PROBE("x0", 0, x0, N, C, C);
    const floatX* x = x0;
    for (int l = 0; l < m->L; l++) {
        floatX *qkv = a->qkv[l], *att = a->att[l];
        trace_label("forward %d", l);
        x = layer_enter(m, l, x, l ? branch : NULL, N);                              // ln1 (N, C)
        weights_wait(m, BANK_ATTN, l);
        matmul_nt(qkv, a->ln1[l], weight(m, ATTN_Q, l), N, 3 * C, C, mm, s);         // (N, 3C)
        PROBE("qkv", l, qkv, N, 3 * C, 3 * C);
        qknorm_rotary_forward(qkv, a->qk_rstd[l], a->cos[0], a->sin[0], N, T, H, D, 3 * C,
                              (float)cfg->qk_norm_eps, norm_first, s);
        const floatX* v = layer_values(m, l, N, &ldv);                               // (N, C)
        PROBE("v_mix", l, v, N, C, ldv);
        attention_forward(att, a->lse[l], qkv, qkv + C, v, B, T, H, D, 3 * C, ldv, attn_scale, s);
        matmul_nt(branch, att, weight(m, ATTN_PROJ, l), N, C, C, mm, s);             // (N, C)
        PROBE("attn_out", l, branch, N, C, C);
        residual_rmsnorm_forward(mid, a->ln2[l], a->ln2_rstd[l], x, branch, N, C, eps, s);
        PROBE("after_attn", l, mid, N, C, C);
        x = mid;
        weights_wait(m, BANK_MLP, l);
        matmul_nt(fc, a->ln2[l], weight(m, MLP_FC, l), N, F, C, mm, s);              // (N, F)
        PROBE("fc", l, fc, N, F, F);
        relu2_forward(a->relu[l], fc, (size_t)N * F, s);                             // (N, F)
        matmul_nn(branch, a->relu[l], weight(m, MLP_PROJ, l), N, C, F, mm, s);       // (N, C)
        PROBE("mlp_out", l, branch, N, C, C);
    }
    layer_enter(m, m->L, x, branch, N);                                              // lnf (N, C)
}

// Loss of the N rows in acts.lnf, added up in *loss. With `train`, also the gradients of the head
// and of lnf (into acts.dln), scaled by grad_scale. The logits of R rows exist at a time.
static void classify(Model* m, float* loss, int N, bool train, float grad_scale, bool first) {
    const Settings* cfg = m->cfg;
    Acts* a = &m->acts;
    int C = m->C, V = m->V, V8 = loss_stride(V);
    cudaStream_t s = m->stream;
    Matmul* mm = &m->matmul;
    floatX* logits = a->logits[0];
    const floatX* head = weight(m, head_id(m), 0);
    trace_label("classify");
    if (head_id(m) == LM_HEAD) weights_wait(m, BANK_HEAD, 0);
    for (int row = 0; row < N; row += m->R) {
        int rows = N - row < m->R ? N - row : m->R;
        const floatX* x = a->lnf[0] + (size_t)row * C;
        floatX* dx = a->dln[0] + (size_t)row * C;
        matmul_nt(logits, x, head, rows, V8, C, mm, s);                              // (rows, V8)
        PROBE("logits", row, logits, rows, V, V8);
        cross_entropy(logits, a->losses[0] + row, m->targets + row, rows, V,
                      (SoftcapKind)cfg->softcap, (float)cfg->softcap_value, grad_scale, train, s);
        if (!train) continue;
        PROBE("dlogits", row, logits, rows, V, V8);
        float beta = first && row == 0 ? 0.0f : 1.0f;
        matmul_nn(dx, logits, head, rows, C, V8, mm, s);                             // (rows, C)
        matmul_tn(grad(m, head_id(m), 0), logits, x, V8, C, rows, beta, mm, s);      // (V8, C)
    }
    loss_sum(loss, a->losses[0], N, s);
}

// ---- backward ----------------------------------------------------------------------------------

// Undoes layer_values for dv (N, C) of row stride 3C; layer 0 collects what the mixes sent to it.
static void layer_values_backward(Model* m, int l, floatX* dv, int N) {
    Acts* a = &m->acts;
    int C = m->C, ld = 3 * C;
    cudaStream_t s = m->stream;
    if (!m->cfg->value_residual) return;
    if (l == 0) {      // dv + dv0
        mix_forward(dv, dv, a->dv0[0], m->stats + STAT_ONE, MIX_SKIP, N, C, ld, ld, C, s);
    } else {
        mix_backward(dv, a->dv0[0], grad(m, LAMB, l), dv, a->qkv[l] + 2 * C, a->qkv[0] + 2 * C,
                     scalar(m, LAMB, l), MIX_LERP, N, C, ld, C, ld, ld, ld, a->reduce[0], s);
    }
    PROBE("dv", l, dv, N, C, ld);
}

// Undoes layer_enter but for its norm: dx turns from the gradient inside the layer to that of x[l].
static void layer_enter_backward(Model* m, int l, floatX* dx, int N) {
    Acts* a = &m->acts;
    Layer plan = m->plan[l];
    int C = m->C;
    cudaStream_t s = m->stream;
    if (m->cfg->x0_mix) {
        mix_backward(dx, a->dx0[0], grad(m, LAMBDAS, l), dx, a->x[l], a->x[0],
                     scalar(m, LAMBDAS, l), MIX_PAIR, N, C, C, C, C, C, C, a->reduce[0], s);
    }
    if (plan.skip_from >= 0) {
        floatX* dskip = a->dskip[plan.skip_from];
        CUDA_CHECK(cudaMemsetAsync(dskip, 0, (size_t)N * C * sizeof(floatX), s));
        mix_backward(NULL, dskip, grad(m, SKIP_WEIGHTS, 0) + plan.skip_index, dx, NULL,
                     skip_source(m, plan.skip_from), scalar(m, SKIP_WEIGHTS, 0) + plan.skip_index,
                     MIX_SKIP, N, C, C, C, C, C, C, a->reduce[0], s);
    }
}

// The last gradient of `layer` in this bank is queued, and those of the layers above it were before:
// sends the bucket that begins here, if one does.
static void reduce_from(Model* m, BankId b, int layer) {
    Bank* bank = &m->banks[b];
    for (int k = 0; k < bank->zero.bucket_count && bank->n; k++)
        if (bank->zero.buckets[k].first == layer * bank->slots)
            zero_reduce(&m->zero, &bank->zero, k, bank->g, m->stream);
}

// Adds the gradients of this micro-batch to the banks' g (or sets them, if it is the step's first).
// In the step's last micro-batch they are on their way to their owners as soon as they are whole.
static void backward(Model* m, int B, int T, bool first, bool last) {
    const Settings* cfg = m->cfg;
    Acts* a = &m->acts;
    int N = B * T, C = m->C, H = m->H, D = m->D, F = m->F, ldv;
    float attn_scale = attention_scale(m), beta = first ? 0.0f : 1.0f;
    bool norm_first = cfg->qk_order == FLAG_QK_NORM_FIRST;
    size_t stream_bytes = (size_t)N * C * sizeof(floatX);
    cudaStream_t s = m->stream;
    Matmul* mm = &m->matmul;
    floatX *dx = a->dx[0], *dln = a->dln[0], *dfc = a->dfc[0];
    floatX *datt = a->datt[0], *dqkv = a->dqkv[0];

    if (last && head_id(m) == LM_HEAD) reduce_from(m, BANK_HEAD, 0);
    trace_label("backward %d", m->L - 1);
    if (cfg->x0_mix) CUDA_CHECK(cudaMemsetAsync(a->dx0[0], 0, stream_bytes, s));
    if (cfg->value_residual) CUDA_CHECK(cudaMemsetAsync(a->dv0[0], 0, stream_bytes, s));

    rmsnorm_backward(dx, dln, a->lnf[0], a->lnf_rstd[0], N, C, false, s);            // (N, C)
    for (int l = m->L - 1; l >= 0; l--) {
        floatX *qkv = a->qkv[l], *att = a->att[l];
        trace_label("backward %d", l);
        if (m->plan[l].is_skip_source) residual_add(dx, dx, a->dskip[l], (size_t)N * C, s);
        PROBE("dout", l, dx, N, C, C);
        matmul_tn(grad(m, MLP_PROJ, l), a->relu[l], dx, F, C, N, beta, mm, s);       // (F, C)
        matmul_nt(dfc, dx, weight(m, MLP_PROJ, l), N, F, C, mm, s);                  // (N, F)
        relu2_backward(dfc, dfc, a->relu[l], (size_t)N * F, s);                      // (N, F)
        matmul_tn(grad(m, MLP_FC, l), dfc, a->ln2[l], F, C, N, beta, mm, s);         // (F, C)
        matmul_nn(dln, dfc, weight(m, MLP_FC, l), N, C, F, mm, s);                   // (N, C)
        rmsnorm_backward(dx, dln, a->ln2[l], a->ln2_rstd[l], N, C, true, s);         // (N, C)

        matmul_tn(grad(m, ATTN_PROJ, l), dx, att, C, C, N, beta, mm, s);             // (C, C)
        matmul_nn(datt, dx, weight(m, ATTN_PROJ, l), N, C, C, mm, s);                // (N, C)
        const floatX* v = layer_values(m, l, N, &ldv);                               // (N, C)
        attention_backward(dqkv, dqkv + C, dqkv + 2 * C, a->delta[0], datt, att, a->lse[l], qkv,
                           qkv + C, v, B, T, H, D, 3 * C, ldv, 3 * C, 3 * C, attn_scale, s);
        layer_values_backward(m, l, dqkv + 2 * C, N);
        qknorm_rotary_backward(dqkv, qkv, a->qk_rstd[l], a->cos[0], a->sin[0], N, T, H, D, 3 * C,
                               3 * C, norm_first, s);                                // (N, 3C)
        matmul_tn(grad(m, ATTN_Q, l), dqkv, a->ln1[l], 3 * C, C, N, beta, mm, s);    // (3C, C)
        matmul_nn(dln, dqkv, weight(m, ATTN_Q, l), N, C, 3 * C, mm, s);              // (N, C)
        rmsnorm_backward(dx, dln, a->ln1[l], a->ln1_rstd[l], N, C, true, s);         // (N, C)
        layer_enter_backward(m, l, dx, N);
        if (last) reduce_from(m, BANK_MLP, l);
        if (last) reduce_from(m, BANK_ATTN, l);
    }
    trace_label("embed backward");
    if (cfg->x0_mix) residual_add(dx, dx, a->dx0[0], (size_t)N * C, s);
    if (cfg->embed_norm) rmsnorm_backward(dx, dx, a->x[0], a->emb_rstd[0], N, C, false, s);
    PROBE("demb", 0, dx, N, C, C);
    embedding_backward(grad(m, WTE, 0), dx, &m->index, C, s);                        // (V, C)
    if (!last) return;
    for (int b = BANK_MLP + 1; b < BANKS; b++) reduce_from(m, (BankId)b, 0);         // scalars
    reduce_from(m, BANK_EMBED, 0);
}

// Gradients that are added to, not written, by the kernels that make them start a step at zero.
static void zero_gradients(Model* m) {
    for (int b = 0; b < BANKS; b++) {
        Bank* bank = &m->banks[b];
        int added = bank->kind == SCALAR || (b == BANK_EMBED && m->cfg->head != FLAG_HEAD_TIED);
        if (bank->n && added)
            CUDA_CHECK(cudaMemsetAsync(bank->g, 0, bank->n * sizeof(float), m->stream));
    }
}

// ---- update ------------------------------------------------------------------------------------

static float bank_lr(const Settings* cfg, BankId b) {
    if (cfg->optimizer == FLAG_OPTIMIZER_ADAMW) return (float)cfg->adamw_lr;
    switch (b) {
        case BANK_EMBED: return (float)cfg->embed_lr;
        case BANK_HEAD: return (float)cfg->head_lr;
        case BANK_ATTN: case BANK_MLP: return (float)cfg->muon_lr;
        default: return (float)cfg->scalar_lr;
    }
}

static void update_adamw(Model* m, Bank* bank, int64_t step, float lr) {
    const Settings* cfg = m->cfg;
    const ZeroBank* zero = &bank->zero;
    for (int i = 0, run; i < zero->owned; i += run) {
        run = zero_run(zero, i);
        size_t at = zero->own[i] * zero->unit, own = i * zero->unit;
        adamw_update(bank->p + at, bank->master ? bank->master + own : NULL, bank->g + at,
                     bank->m + own, bank->v + own, run * zero->unit, lr, cfg->adam_beta1,
                     cfg->adam_beta2, (float)cfg->adam_eps, (float)cfg->weight_decay, (int)step,
                     bank->bf16, m->stream);
    }
}

static void update_muon(Model* m, BankId b, Schedule now, float lr) {
    const Settings* cfg = m->cfg;
    Bank* bank = &m->banks[b];
    float scale[4 * MAX_LAYERS];      // the logical shape decides, not the one in memory
    for (int i = 0; i < bank->zero.owned; i++) {
        for (int id = 0; id < PARAMS; id++) {
            const ParamRow* row = &PARAM_TABLE[id];
            if (row->bank == b && row->slot == bank->zero.own[i] % bank->slots)
                scale[i] = muon_scale((MuonScale)cfg->muon_scale, size_of(m, row->rows),
                                      size_of(m, row->cols));
        }
    }
    muon_update(bank->p, bank->master, bank->g, bank->m, bank->zero.own, bank->zero.owned,
                bank->rows, bank->cols, bank->stride, scale, lr, now.muon_momentum,
                (MuonForm)cfg->muon_form, (int)cfg->ns_steps, m->muon_scratch,
                m->muon_scratch_bytes, &m->matmul, m->stream);
}

// step counts from 1. Reads g, changes p, master and the optimizer's state. What AdamW does is
// short and comes first: its weights are then on their way to the other ranks under Newton-Schulz,
// and the table is what the next forward needs first.
static void update(Model* m, int64_t step, Schedule now) {
    const Settings* cfg = m->cfg;
    for (int pass = 0; pass < 2; pass++) {
        for (int b = 0; b < BANKS; b++) {
            Bank* bank = &m->banks[b];
            int muon = bank->kind == MATRIX && cfg->optimizer == FLAG_OPTIMIZER_MUON;
            if (bank->n == 0 || muon != pass) continue;
            float lr = bank_lr(cfg, (BankId)b) * now.lr_mult;
            trace_label("update");
            if (!muon) update_adamw(m, bank, step, lr);
            else if (bank->owned) update_muon(m, (BankId)b, now, lr);
            for (int k = 0; k < bank->zero.bucket_count; k++)
                zero_gather(&m->zero, &bank->zero, k, bank->p, false, m->stream);
        }
    }
}

// stats[STAT_NORM2], stats[STAT_NONFINITE]: this rank's part of the sums over all gradients. What
// every rank has is rank 0's part.
static void measure_gradients(Model* m) {
    trace_label("measure");
    zero_wait_reduced(&m->zero, m->stream);
    zero_fill(m, m->stats + STAT_NORM2, 2 * sizeof(float));
    for (int b = 0; b < BANKS; b++) {
        const Bank* bank = &m->banks[b];
        const ZeroBank* zero = &bank->zero;
        if (bank->n == 0 || (zero->replicated && m->zero.rank != 0)) continue;
        for (int i = 0, run; i < zero->owned; i += run) {
            run = zero_run(zero, i);
            grad_norm(m->stats + STAT_NORM2, bank->g + zero->own[i] * zero->unit, run * zero->unit,
                      true, m->acts.reduce[0], m->stream);
        }
    }
}

// ---- a batch, a step, an evaluation -------------------------------------------------------------

// Sends a batch in pinned memory to the device. The stream owns it until batch_wait.
static void batch_upload(Model* m, const int* tokens, const int* targets, int N) {
    CUDA_CHECK(cudaMemcpyAsync(m->tokens, tokens, N * sizeof(int), cudaMemcpyHostToDevice,
                               m->stream));
    CUDA_CHECK(cudaMemcpyAsync(m->targets, targets, N * sizeof(int), cudaMemcpyHostToDevice,
                               m->stream));
    CUDA_CHECK(cudaEventRecord(m->uploaded, m->stream));
}
static void batch_wait(Model* m) { CUDA_CHECK(cudaEventSynchronize(m->uploaded)); }

// Gradients and loss of one micro-batch in pinned memory. grad_scale is 1 / tokens of the optimizer
// step over all micro-steps and ranks: so the sum of the gradients is the true global mean.
static void micro_step(Model* m, const int* tokens, const int* targets, int micro,
                       float grad_scale) {
    int N = m->B * m->T;
    bool first = micro == 0;
    if (first) zero_gradients(m);
    embedding_index_build(&m->index, tokens, N, m->V);
    embedding_index_upload(&m->index, m->stream);
    batch_upload(m, tokens, targets, N);
    forward(m, m->B, m->T);
    classify(m, m->stats + STATS + micro, N, true, grad_scale, first);
    backward(m, m->B, m->T, first, micro == m->micro_steps - 1);
}

typedef struct StepStats { double loss, grad_norm; bool finite, stop; } StepStats;

// Over all ranks, and equal on all of them. Waits for the step's gradients: nothing is updated from
// a loss or a gradient that is not finite. `stop`: whether this rank was asked to.
static StepStats step_stats(Model* m, bool stop) {
    size_t summed = STATS - STAT_NORM2 + m->micro_steps;
    measure_gradients(m);
    m->stats_host[STAT_STOP] = stop;
    CUDA_CHECK(cudaMemcpyAsync(m->stats + STAT_STOP, m->stats_host + STAT_STOP, sizeof(float),
                               cudaMemcpyHostToDevice, m->stream));
    zero_sum(&m->zero, m->stats + STAT_NORM2, summed, false, m->stream);
    CUDA_CHECK(cudaMemcpyAsync(m->stats_host + STAT_NORM2, m->stats + STAT_NORM2,
                               summed * sizeof(float), cudaMemcpyDeviceToHost, m->stream));
    CUDA_CHECK(cudaStreamSynchronize(m->stream));
    double loss = 0;
    for (int micro = 0; micro < m->micro_steps; micro++) loss += m->stats_host[STATS + micro];
    StepStats stats;
    stats.loss = loss / (double)m->cfg->batch_tokens;
    stats.grad_norm = sqrt((double)m->stats_host[STAT_NORM2]);
    stats.finite = isfinite(loss) && m->stats_host[STAT_NONFINITE] == 0.0f;
    stats.stop = m->stats_host[STAT_STOP] != 0.0f;
    return stats;
}

// Mean loss over exactly the predictions that val_open was asked for.
static double evaluate(Model* m, ValLoader* val) {
    int N = m->B * m->T;
    *m->val_sum_host = 0;
    for (int64_t k = 0; k < val->batches; k++) {
        batch_wait(m);
        val_batch(val, k, m->tokens_host, m->targets_host);
        batch_upload(m, m->tokens_host, m->targets_host, N);
        forward(m, m->B, m->T);
        classify(m, m->stats + STAT_LOSS, N, false, 0.0f, false);
        CUDA_CHECK(cudaMemcpyAsync(m->stats_host + STAT_LOSS, m->stats + STAT_LOSS, sizeof(float),
                                   cudaMemcpyDeviceToHost, m->stream));
        CUDA_CHECK(cudaStreamSynchronize(m->stream));
        *m->val_sum_host += m->stats_host[STAT_LOSS];
    }
    CUDA_CHECK(cudaMemcpyAsync(m->val_sum, m->val_sum_host, sizeof(double), cudaMemcpyHostToDevice,
                               m->stream));
    zero_sum(&m->zero, m->val_sum, 1, true, m->stream);
    CUDA_CHECK(cudaMemcpyAsync(m->val_sum_host, m->val_sum, sizeof(double), cudaMemcpyDeviceToHost,
                               m->stream));
    CUDA_CHECK(cudaStreamSynchronize(m->stream));
    return *m->val_sum_host / (double)val->predictions;
}

// ---- weights to a file and back ---------------------------------------------------------------

// Copies a tensor between memory, where it may be transposed, and its logical (rows, cols) form.
static void tensor_transpose(float* out, const float* in, int rows, int cols) {
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < cols; c++) out[(size_t)c * rows + r] = in[(size_t)r * cols + c];
}

// The fp32 value of a tensor in its logical shape, for the file and for tests.
static void tensor_read(Model* m, float* out, const float* device, ParamId id) {
    const ParamRow* row = &PARAM_TABLE[id];
    const Bank* bank = &m->banks[row->bank];
    size_t n = (size_t)bank->rows * bank->cols;
    float* copy = row->transposed ? (float*)host_alloc(n, sizeof(float)) : out;
    CUDA_CHECK(cudaMemcpy(copy, device, n * sizeof(float), cudaMemcpyDeviceToHost));
    if (!row->transposed) return;
    tensor_transpose(out, copy, bank->rows, bank->cols);
    free(copy);
}

static void param_name(char* name, size_t size, ParamId id, int layer) {
    snprintf(name, size, PARAM_TABLE[id].name, layer);
}

// Value of a parameter in fp32, whatever it is kept in; after weights_collect.
static void param_read(Model* m, float* out, ParamId id, int layer) {
    tensor_read(m, out, grad(m, id, layer), id);
}

static void param_write(Model* m, const float* in, ParamId id, int layer) {
    const ParamRow* row = &PARAM_TABLE[id];
    Bank* bank = &m->banks[row->bank];
    size_t n = (size_t)bank->rows * bank->cols;
    float* copy = (float*)host_alloc(n, sizeof(float));
    if (row->transposed) tensor_transpose(copy, in, bank->cols, bank->rows);
    else memcpy(copy, in, n * sizeof(float));
    CUDA_CHECK(cudaMemcpy(grad(m, id, layer), copy, n * sizeof(float), cudaMemcpyHostToDevice));
    weights_adopt(m, bank, param_offset(m, id, layer), n);
    CUDA_CHECK(cudaStreamSynchronize(m->stream));
    free(copy);
}

static void tensor_shape(const Model* m, ParamId id, int64_t* shape, int* dims) {
    const ParamRow* row = &PARAM_TABLE[id];
    int64_t rows = size_of(m, row->rows), cols = size_of(m, row->cols);
    *dims = rows == 1 ? 1 : 2;
    shape[0] = rows == 1 ? cols : rows;
    shape[1] = cols;
}

// A file's tensors in order, and where the bytes of each come from.
typedef struct WeightFile {
    Model* m;
    SafeTensor tensors[PARAMS * MAX_LAYERS];
    char names[PARAMS * MAX_LAYERS][64];
    int ids[PARAMS * MAX_LAYERS], layers[PARAMS * MAX_LAYERS];
    float* data;            // one tensor at a time
} WeightFile;

static const void* weight_fetch(void* context, int i) {
    WeightFile* file = (WeightFile*)context;
    param_read(file->m, file->data, (ParamId)file->ids[i], file->layers[i]);
    return file->data;
}

// All parameters, in fp32 and in their logical shapes, under the names of PARAM_TABLE. All ranks
// call it, rank 0 writes.
static void weights_save(Model* m, const char* path, int64_t step) {
    weights_collect(m);
    if (m->zero.rank != 0) return;
    WeightFile* file = (WeightFile*)host_alloc(1, sizeof(WeightFile));
    size_t largest = 0;
    int count = 0;
    file->m = m;
    for (int id = 0; id < PARAMS; id++) {
        int copies = param_copies(m, (ParamId)id);
        const Bank* bank = &m->banks[PARAM_TABLE[id].bank];
        if (copies && (size_t)bank->rows * bank->cols > largest)
            largest = (size_t)bank->rows * bank->cols;
        for (int layer = 0; layer < copies; layer++, count++) {
            SafeTensor* t = &file->tensors[count];
            param_name(file->names[count], sizeof file->names[count], (ParamId)id, layer);
            t->name = file->names[count];
            t->type = SAFE_F32;
            tensor_shape(m, (ParamId)id, t->shape, &t->dims);
            file->ids[count] = id;
            file->layers[count] = layer;
        }
    }
    file->data = (float*)host_alloc(largest, sizeof(float));
    char *flags = NULL, step_text[32];
    size_t flags_size = 0;
    FILE* text = open_memstream(&flags, &flags_size);
    REQUIRE(text, "out of memory for the flags in %s", path);
    settings_json(text, m->cfg);
    fclose(text);
    snprintf(step_text, sizeof step_text, "%" PRId64, step);
    const char* metadata[] = {"format", "pt",      "flags",  flags,
                              "step",   step_text, "commit", GIT_COMMIT};
    safetensors_write_from(path, file->tensors, count, metadata, 4, weight_fetch, file);
    free(flags);
    free(file->data);
    free(file);
}

static void weights_load(Model* m, const char* path) {
    SafeFile file;
    safetensors_open(&file, path);
    for (int id = 0; id < PARAMS; id++) {
        int copies = param_copies(m, (ParamId)id);
        const Bank* bank = &m->banks[PARAM_TABLE[id].bank];
        for (int layer = 0; layer < copies; layer++) {
            char name[64];
            int64_t shape[8];
            int dims;
            param_name(name, sizeof name, (ParamId)id, layer);
            tensor_shape(m, (ParamId)id, shape, &dims);
            const SafeTensor* t = safetensors_find(&file, name);
            REQUIRE(t, "%s: no tensor %s; is it a model of other --layers or another recipe?", path,
                    name);
            bool fits = t->dims == dims && t->shape[0] == shape[0] &&
                        (dims == 1 || t->shape[1] == shape[1]);
            REQUIRE(fits,
                    "%s: %s has shape (%" PRId64 ", %" PRId64 "), the flags ask for (%" PRId64
                    ", %" PRId64 ")",
                    path, name, t->shape[0], t->dims > 1 ? t->shape[1] : 1, shape[0],
                    dims > 1 ? shape[1] : 1);
            const void* data =
                safetensors_data(&file, name, SAFE_F32, (int64_t)bank->rows * bank->cols);
            param_write(m, (const float*)data, (ParamId)id, layer);
        }
    }
    safetensors_close(&file);
}

// ---- sampling ---------------------------------------------------------------------------------

static float softcap_host(SoftcapKind kind, float c, float z) {
    switch (kind) {
        case SOFTCAP_NONE: return z;
        case SOFTCAP_TANH: return c * tanhf(z / c);
        case SOFTCAP_SIGMOID: return c / (1.0f + expf(-4.0f * z / c));
    }
    return z;
}

// The token that opens a document.
static int end_of_text(const Settings* cfg) {
    if (cfg->end_of_text >= 0) return (int)cfg->end_of_text;
    return cfg->vocab > GPT2_END ? (int)GPT2_END : (int)BYTE_END;
}

// Continues from the end-of-text token. Each token costs a forward pass over T of them: what lies
// behind the last known one is padding, which a causal model does not see.
static void sample(Model* m, Log* log, int64_t step, int count) {
    const Settings* cfg = m->cfg;
    int V = m->V, C = m->C, T = m->T;
    int* text = (int*)host_alloc((size_t)count + 1, sizeof(int));
    float* z = (float*)host_alloc(V, sizeof(float));
    floatX* logits = (floatX*)host_alloc(V, sizeof(floatX));
    text[0] = end_of_text(cfg) < V ? end_of_text(cfg) : 0;
    for (int length = 1; length <= count; length++) {
        int known = length < T ? length : T;
        batch_wait(m);
        memset(m->tokens_host, 0, T * sizeof(int));
        memcpy(m->tokens_host, text + length - known, known * sizeof(int));
        batch_upload(m, m->tokens_host, m->targets_host, T);
        forward(m, 1, T);
        matmul_nt(m->acts.logits[0], m->acts.lnf[0] + (size_t)(known - 1) * C,
                  weight(m, head_id(m), 0), 1, loss_stride(V), C, &m->matmul, m->stream);
        CUDA_CHECK(cudaMemcpyAsync(logits, m->acts.logits[0], V * sizeof(floatX),
                                   cudaMemcpyDeviceToHost, m->stream));
        CUDA_CHECK(cudaStreamSynchronize(m->stream));
        for (int i = 0; i < V; i++)
            z[i] = softcap_host((SoftcapKind)cfg->softcap, (float)cfg->softcap_value,
                                (float)logits[i]);
        text[length] = sampler_pick(z, V, (float)cfg->sample_temperature, (int)cfg->sample_top_k,
                                    cfg->seed, length);
    }
    log_sample(log, step, text + 1, count, V);
    free(text);
    free(z);
    free(logits);
}

// ---- report -----------------------------------------------------------------------------------

static int64_t param_count(const Model* m) {
    int64_t count = 0;
    for (int b = 0; b < BANKS; b++)
        count += (int64_t)m->banks[b].copies * m->banks[b].rows * m->banks[b].cols;
    return count;
}

static size_t memory_total(const Model* m) {
    size_t total = 0;
    for (int i = 0; i < m->memories; i++) total += m->memory[i].bytes;
    return total;
}

// "3.q": the matrix that is unit `unit` of its bank.
static void print_unit(FILE* out, const Bank* bank, BankId b, int unit) {
    for (int id = 0; id < PARAMS; id++) {
        const ParamRow* row = &PARAM_TABLE[id];
        const char* name = strstr(row->name, ".c_");
        if (row->bank != b || row->slot != unit % bank->slots || !name) continue;
        fprintf(out, " %d.%.*s", unit / bank->slots, (int)strcspn(name + 3, "."), name + 3);
    }
}

// Who owns what, and what a step costs on the wire.
static void print_ranks(FILE* out, const Model* m) {
    const Zero* z = &m->zero;
    if (z->world == 1) return;
    size_t reduce = 0, gather = 0, sums, all = 0;
    double heaviest = 0, sum = 0;
    for (int i = 0; i < m->shard_count; i++) {
        const ZeroBank* bank = m->shards[i];
        reduce += zero_reduce_bytes(z, bank);
        gather += zero_gather_bytes(z, bank);
        all += bank->unit * bank->units;
    }
    sums = zero_sum_bytes(z, STATS - STAT_NORM2 + m->micro_steps, sizeof(float));
    fprintf(out, "ranks %d, gradients travel in %s, %d micro-steps of each rank in a step\n",
            z->world, z->wire_bf16 ? "bf16" : "fp32", m->micro_steps);
    fprintf(out, "  on the wire per step and rank: %zu bytes to reduce %zu gradients, %zu to "
            "gather weights, %zu for sums: %.1f MB\n", reduce, all, gather, sums,
            (reduce + gather + sums) / 1e6);
    if (!z->shard) return;
    for (int r = 0; r < z->world; r++) {
        sum += z->load[r];
        if (z->load[r] > heaviest) heaviest = z->load[r];
    }
    fprintf(out, "  the busiest rank's update costs %.3f of the mean\n",
            sum > 0 ? heaviest * z->world / sum : 1.0);
    for (int r = 0; r < z->world; r++) {
        fprintf(out, "  rank %d owns", r);
        for (int b = 0; b < BANKS; b++) {
            const Bank* bank = &m->banks[b];
            if (bank->n == 0 || bank->kind != MATRIX) continue;
            fprintf(out, "%s", b == BANK_ATTN ? " attn" : ", mlp");
            for (int i = 0; i < bank->zero.units; i++)
                if (bank->zero.owner[i] == r) print_unit(out, bank, (BankId)b, i);
        }
        fputc('\n', out);
    }
}

static void print_model(FILE* out, const Model* m) {
    fprintf(out, "parameters %" PRId64 ", %d tokens in a micro-batch, %s\n", param_count(m),
            m->B * m->T, FLOATX_IS_BF16 ? "bf16" : "fp32");
    for (int i = 0; i < m->memories; i++)
        fprintf(out, "  %-18s %10.1f MiB\n", m->memory[i].name, m->memory[i].bytes / 1048576.0);
    fprintf(out, "  %-18s %10.1f MiB\n", "memory in all", memory_total(m) / 1048576.0);
    fprintf(out, "  %-18s %10.1f MiB\n", "and on the host", m->host_bytes / 1048576.0);
    print_ranks(out, m);
}

// What the table said against what the system counted: on the CPU the device's memory is the
// process's own.
static void note_memory(const Model* m, Log* log) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    log_note(log, "memory: %.1f MiB by the table, process peak %.1f MiB",
             (memory_total(m) + m->host_bytes) / 1048576.0, usage.ru_maxrss / 1024.0);
}

// ---- train ------------------------------------------------------------------------------------

static volatile sig_atomic_t interrupted;
static void on_interrupt(int signal_number) {
    (void)signal_number;
    if (interrupted) _exit(130);     // asked twice: at once
    interrupted = 1;
}

static void save_step(Model* m, int64_t step, const char* suffix) {
    char path[2048];
    snprintf(path, sizeof path, "%s/model%s.safetensors", m->cfg->out, suffix);
    weights_save(m, path, step);
}

// Returns the last validation loss, of all ranks. The clock runs for training only, not for
// validation, samples and files.
static double train(Model* m, Loader* data, ValLoader* val, Log* log) {
    const Settings* cfg = m->cfg;
    float grad_scale = 1.0f / (float)cfg->batch_tokens;
    double val_loss = NAN, last_loss = NAN;
    int64_t epoch = data->position.epoch;
    Clock clock = {};
    int64_t step = 0;
    bool stop = false;      // agreed on by all ranks: they leave after the same step
    for (;; step++) {
        bool over = step < cfg->steps && !stop && loader_over(data);
        if (over)
            log_note(log, "the data of --epochs %" PRId64 " ends after step %" PRId64 " of %" PRId64
                     ": --epochs 0 repeats it as often as the steps need", cfg->epochs, step,
                     cfg->steps);
        bool last = step == cfg->steps || stop || over;
        if (last) save_step(m, step, "");      // first: a second Ctrl-C must not cost the weights
        if (last || step % cfg->val_every == 0) {
            val_loss = evaluate(m, val);
            log_val(log, step, val_loss, clock_seconds(&clock));
        }
        bool every = cfg->sample_every && step && step % cfg->sample_every == 0;
        if (every && cfg->sample_tokens && !last && m->zero.rank == 0)
            sample(m, log, step, (int)cfg->sample_tokens);
        if (cfg->save_every && step && step % cfg->save_every == 0 && !last) {
            char suffix[32];
            snprintf(suffix, sizeof suffix, "_%06" PRId64, step);
            save_step(m, step, suffix);
        }
        if (last) break;

        clock_start(&clock);
        trace_step(step + 1);
        Schedule now = schedule_at(cfg, step);
        for (int micro = 0; micro < m->micro_steps; micro++) {
            batch_wait(m);
            const Batch* batch = loader_next(data);
            micro_step(m, batch->inputs, batch->targets, micro, grad_scale);
        }
        StepStats stats = step_stats(m, interrupted);
        stop = stats.stop;
        if (stop) interrupted = 1;      // by any rank
        if (!stats.finite) {
            die("step %" PRId64
                ": loss %g, gradient norm %g, %g gradients not finite (last finite loss %g)\n"
                "stopped before the update; nothing was saved over",
                step + 1, stats.loss, stats.grad_norm, (double)m->stats_host[STAT_NONFINITE],
                last_loss);
        }
        update(m, step + 1, now);
        if (stop || step + 1 == cfg->steps) CUDA_CHECK(cudaStreamSynchronize(m->stream));
        double train_s = clock_stop(&clock);
        last_loss = stats.loss;
        if (data->position.epoch != epoch)
            log_note(log, "step %" PRId64 ": epoch %" PRId64 " of the data begins", step + 1,
                     data->position.epoch + 1);
        epoch = data->position.epoch;
        LogStep line = {step + 1,
                        stats.loss,
                        train_s,
                        now.lr_mult,
                        now.muon_momentum,
                        stats.grad_norm,
                        (step + 1) * cfg->batch_tokens};
        log_train(log, &line);
    }
    if (cfg->sample_tokens && m->zero.rank == 0) sample(m, log, step, (int)cfg->sample_tokens);
    note_memory(m, log);
    log_note(log, "data: waited %.3f s for batches, of %.1f s of training", data->waited,
             clock_seconds(&clock));
    log_result(log, val_loss, clock_seconds(&clock), step * cfg->batch_tokens);
    return val_loss;
}

// ---- main -------------------------------------------------------------------------------------

#ifndef TRAIN_GPT2_NO_MAIN
static Model model;

static bool model_failed(char* what, size_t size) { return zero_failed(&model.zero, what, size); }

// Ranks of different flags, programs or data would train on without a sign of it.
static void compare_settings(Ranks* ranks, const Settings* cfg) {
    char text[FLAG_COUNT * (TEXT_SIZE + 64)];
    settings_text(text, sizeof text - 64, cfg);
    snprintf(text + strlen(text), 64, "program = %016" PRIx64 "\n", file_hash("/proc/self/exe"));
    ranks_compare(ranks, text);
}
static void compare_data(Ranks* ranks, const Shards* train, const Shards* val) {
    char text[512];
    snprintf(text, sizeof text,
             "number of training shards = %d\nnumber of training tokens = %" PRId64
             "\nnames and sizes of the training shards = %016" PRIx64
             "\nnumber of validation tokens = %" PRId64
             "\nnames and sizes of the validation shards = %016" PRIx64 "\n",
             train->count, shards_total(train), shards_hash(train), shards_total(val),
             shards_hash(val));
    ranks_compare(ranks, text);
}

static LoaderSpec loader_spec(const Settings* cfg, int rank, int world) {
    LoaderSpec spec = {};
    spec.pattern = cfg->train;
    spec.batching = (Batching)cfg->batching;
    spec.rows = (int)(cfg->batch_tokens / cfg->seq_len);
    spec.B = (int)cfg->micro_batch;
    spec.T = (int)cfg->seq_len;
    spec.rank = rank;
    spec.world = world;
    spec.vocab = (int)cfg->vocab;
    spec.data_ranks = (int)cfg->data_ranks;
    spec.max_document = (int)cfg->max_document;
    spec.end_of_text = end_of_text(cfg);
    spec.steps = cfg->steps;
    spec.epochs = cfg->epochs;
    return spec;
}

int main(int argc, char** argv) {
    static Settings cfg;
    static Ranks ranks;
    static Log log;
    ranks_start(&ranks, &argc, &argv);
    int rank = ranks.rank, world = ranks.world;
    if (settings_want_help(argc, argv)) {
        if (rank == 0) settings_help(stdout);
        ranks_stop(&ranks);
        return 0;
    }
    settings_parse(&cfg, argc, argv);
    bool sample_only = cfg.load[0] && !cfg.train[0];
    if (cfg.dry_run && cfg.ranks) world = (int)cfg.ranks;
    settings_check(&cfg, world);
    REQUIRE(!sample_only || world == 1, "--load without --train samples on one rank, found %d\n"
            "start one process", world);
    compare_settings(&ranks, &cfg);
    if (!cfg.dry_run) {
        log_open(&log, &cfg, rank, world);
        ranks_watch(&ranks, cfg.out, model_failed);
        zero_choose_device(&ranks);
    }
    static Loader data;
    ValLoader val;
    int* batches = NULL;    // the loader's slots, pinned
    if (!cfg.dry_run && !sample_only) {  // what is wrong with the data shows before the long part
        LoaderSpec spec = loader_spec(&cfg, rank, world);
        CUDA_CHECK(cudaMallocHost((void**)&batches,
                                  loader_memory(spec.B, spec.T) * sizeof(int)));
        loader_open(&data, &spec, batches);
        val_open(&val, cfg.val, cfg.val_tokens, (int)cfg.micro_batch, (int)cfg.seq_len, rank, world,
                 (int)cfg.vocab);
        compare_data(&ranks, &data.shards, &val.shards);
    }
    trace_steps = cfg.trace_steps;
    trace_open(cfg.trace, rank, world);
    model_build(&model, &cfg, rank, world);
    if (rank == 0) {
        settings_print(stdout, &cfg);
        print_model(stdout, &model);
    }
    if (cfg.dry_run) {
        ranks_stop(&ranks);
        return 0;
    }
    model_start(&model, &ranks);
    if (cfg.load[0]) weights_load(&model, cfg.load);
    if (sample_only) {
        sample(&model, &log, 0, (int)cfg.sample_tokens);
    } else {
        if (rank == 0) loader_describe(stdout, &data);
        on_signal(SIGINT, on_interrupt);
        on_signal(SIGTERM, on_interrupt);
        train(&model, &data, &val, &log);
        loader_close(&data);
        val_close(&val);
        CUDA_CHECK(cudaFreeHost(batches));
    }
    trace_close();
    log_close(&log);
    ranks_watch(&ranks, cfg.out, NULL);      // there is soon no model to ask
    model_free(&model);
    ranks_stop(&ranks);
    return interrupted ? 130 : 0;
}
#endif
