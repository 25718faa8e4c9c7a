/*
The least time that a step can take on a GPU: a floor, computed from shapes alone.

    time of an operation = max(FLOPs / peak of the tensor cores, bytes / bandwidth of the memory)
    floor of a step      = the sum over its operations, one after another

It is not a forecast. No kernel reaches either peak, there are gaps between kernels, and none of
this program's has been timed. What the floor is good for: it says which operations can matter, and
no change that leaves the table as it is can get below it.

bytes       every operand is read from memory once and every result written once; activations are
            bf16, gradients of weights and the state of the optimizers as the bf16 build keeps them.
            One number per row of C (the root of a norm) is left out, lse and delta are not.
FLOPs       of tensor cores alone: 2 M N K for a product; attention 4 C per visible key and query in
            forward, 10 C in backward (scores made again), without the hidden part of a tile
fused       The floor assumes fusions that the program does not have:
              - ReLU² and its derivative in the products before them (the program: passes of N F)
              - the mix with the embedding, the skips, the backout and the norm of the looked-up
                rows, in the passes of the norms beside them; smear in the lookup; the gates of the
                heads and their gradients in attention
              - attention without value embedding scales its output instead of its values
              - mixed values are kept for backward, not mixed again
              - the norms of gradients and weights are taken where they are made (the program: a
                pass of 4 bytes for each, over what the rank owns)
              - the head's gradient is written once per micro-step, not once per R rows of logits
              - a head in fp8 is quantised once a step
              - Muon's passes move 26 bytes per element, NorMuon's 28 (the program: 38 and more)
              - Newton-Schulz makes the symmetric X Xᵀ and polynomial by halves, and keeps what is
                between its products in the cache
            Attention's backward is counted as one kernel of five products that adds dQ up in fp32,
            in the cache. This program's two kernels do seven, and move as many bytes.
            Other designs would lower the floor: rotary and norms in the products beside them, or
            so few rows of logits at a time that they never leave the cache.
left out    copies of tokens, zeroing, sums over ranks, casts for the wire, validation
ranks       A rank's own share of the batch and of the update. What it sends is shown apart, and
            counts only where it takes longer than what can run at the same time: reducing beside
            backward, gathering beside Newton-Schulz and the next forward.

Visible keys. mean_keys and mean_tile_keys count them exactly, with the rules of attention.cuh:
causal, within a document, within a window. Without token data the documents are a model,
mean_keys_estimate: a token ends its document with probability 1 / mean, and what is longer than
`longest` is cut. Then a query and the token d before it share a document with probability

    s(d) = (q^d - q^M) / (1 - q^M)      q = 1 - 1/mean, M = longest (without one: s(d) = q^d)

and a query that may look at k keys sees s(0) + ... + s(k-1) of them in the mean. Text has more very
short and very long documents than that: the true count is higher where windows are long.

test        test/test_roofline.c
*/
#pragma once
#include <limits.h>
#include "schedule.h"

// ---- GPUs -----------------------------------------------------------------------------------

typedef struct RooflineGpu {
    const char* name;
    double bf16, fp8;        // TFLOP/s, dense, fp32 sums; 0: not to be had
    double memory;           // TB/s
    double link;             // GB/s that a GPU can send, in one direction
    const char* source;
} RooflineGpu;

static const RooflineGpu ROOFLINE_GPUS[] = {
    { "h100", 989.4, 1978.9, 3.35, 450, "NVIDIA H100 data sheet, SXM, without sparsity; NVLink 4" },
    { "h100-measured", 798, 1596, 3.0, 450,
      "measured on an H100 SXM: bf16 product of 8192³, copy; fp8 is twice the bf16, not measured" },
    { "h200", 989.4, 1978.9, 4.8, 450, "NVIDIA H200 data sheet, SXM, without sparsity; NVLink 4" },
    { "a100", 312, 0, 2.039, 300, "NVIDIA A100 data sheet, SXM 80 GB, without sparsity; NVLink 3" },
    { "b200", 2250, 4500, 8.0, 900, "NVIDIA HGX B200 data sheet, without sparsity; NVLink 5" },
    { "rtx4090", 165.2, 330.3, 1.008, 32,
      "NVIDIA Ada architecture paper, fp32 sums, without sparsity; PCIe 4 x16" },
};
enum { ROOFLINE_GPU_COUNT = sizeof ROOFLINE_GPUS / sizeof *ROOFLINE_GPUS };

// The GPU of that name, or the end of the program.
static inline const RooflineGpu* roofline_gpu(const char* name) {
    char known[256] = "";
    for (int i = 0; i < ROOFLINE_GPU_COUNT; i++) {
        if (strcmp(name, ROOFLINE_GPUS[i].name) == 0) return &ROOFLINE_GPUS[i];
        size_t end = strlen(known);
        snprintf(known + end, sizeof known - end, "%s%s", i ? ", " : "", ROOFLINE_GPUS[i].name);
    }
    die("--gpu '%s' is not known\nknown are: %s", name, known);
}

// ---- visible keys ---------------------------------------------------------------------------

// The first key that a query sees; both are positions in a row, as is the document's first token.
// block 1: the window is as many tokens before the query. Else it is blocks, the query's own and at
// least that among them. INT_MAX: no limit.
static inline int64_t visible_first(int64_t query, int64_t document, int window, int block) {
    int64_t others = window > 1 ? window - 1 : 0;
    int64_t edge = block > 1 ? (query / block - others) * block : query - window;
    return edge > document ? edge : document;
}

// Where rows and documents lie: cu_seqlens is 0 and the ends of documents, the last of them B*T;
// NULL is one row that is one document.
typedef struct Packed {
    const int* ends;
    int count, at;
    int64_t rows;
} Packed;

static inline Packed packed_open(const int* cu_seqlens, int count, int T) {
    static const int none[2] = { 0, 0 };
    Packed p = { cu_seqlens ? cu_seqlens : none, cu_seqlens ? count : 1, 0, 0 };
    p.rows = cu_seqlens ? cu_seqlens[count - 1] : T;
    REQUIRE(T > 0 && p.rows > 0 && p.rows % T == 0 && p.ends[0] == 0,
            "documents begin at %d and end at %" PRId64 ", not at 0 and at a multiple of T=%d",
            p.ends[0], p.rows, T);
    return p;
}

// Position in its row at which the document of token n begins; n must not fall from call to call.
// Documents do not cross rows.
static inline int64_t packed_start(Packed* p, int64_t n, int T) {
    while (p->at + 1 < p->count && p->ends[p->at + 1] <= n) p->at++;
    int64_t start = p->ends[p->at] - n / T * T;
    return start > 0 ? start : 0;
}

// Keys that a query sees, the mean over all queries.
static inline double mean_keys(const int* cu_seqlens, int count, int T, int window, int block) {
    Packed p = packed_open(cu_seqlens, count, T);
    int64_t sum = 0;
    for (int64_t n = 0; n < p.rows; n++)
        sum += n % T - visible_first(n % T, packed_start(&p, n, T), window, block) + 1;
    return (double)sum / (double)p.rows;
}

// Keys that are computed for a query, seen or hidden, if tiles of (tile_queries, tile_keys) are
// made whole or not at all. The keys of successive queries leave no gap: their tiles are one run.
static inline double mean_tile_keys(const int* cu_seqlens, int count, int T, int window, int block,
                                    int tile_queries, int tile_keys) {
    Packed p = packed_open(cu_seqlens, count, T);
    int64_t sum = 0;
    for (int64_t row = 0; row < p.rows; row += T) {
        for (int64_t q = 0; q < T; q += tile_queries) {
            int64_t last = q + tile_queries < T ? q + tile_queries - 1 : T - 1;
            int64_t first = visible_first(q, packed_start(&p, row + q, T), window, block);
            sum += (last / tile_keys - first / tile_keys + 1) * tile_keys * tile_queries;
        }
    }
    return (double)sum / (double)p.rows;
}

// s(d) of the comment above. mean 0: rows are not cut into documents; longest 0: none is cut.
static inline double document_reach(double distance, double mean, double longest) {
    if (mean <= 0) return 1;
    if (longest > 0 && distance >= longest) return 0;
    double rate = log1p(-1 / mean), cut = longest > 0 ? exp(rate * longest) : 0;
    return (exp(rate * distance) - cut) / (1 - cut);
}

static inline double mean_keys_estimate(int T, int window, int block, double mean_document,
                                        double longest) {
    double* sum = (double*)host_alloc((size_t)T + 1, sizeof(double));
    double total = 0;
    for (int k = 0; k < T; k++) sum[k + 1] = sum[k] + document_reach(k, mean_document, longest);
    for (int q = 0; q < T; q++) total += sum[q - visible_first(q, 0, window, block) + 1];
    free(sum);
    return total / T;
}

// A tile before the queries' own is computed if its last key shares a document with the first of
// them.
static inline double mean_tile_keys_estimate(int T, int window, int block, int tile_queries,
                                             int tile_keys, double mean_document, double longest) {
    double tiles = 0;
    for (int64_t q = 0; q < T; q += tile_queries) {
        int64_t last = q + tile_queries < T ? q + tile_queries - 1 : T - 1, own = q / tile_keys;
        int64_t first = visible_first(q, 0, window, block) / tile_keys;
        tiles += last / tile_keys - own + 1;
        for (int64_t tile = own - 1; tile >= first; tile--)
            tiles += document_reach((double)(q - (tile + 1) * tile_keys + 1), mean_document,
                                    longest);
    }
    return tiles * tile_keys * tile_queries / T;
}

constexpr double ROOFLINE_DOCUMENT = 700;      // tokens in the mean: about what FineWeb's have
#define ROOFLINE_DOCUMENTS "documents of 700 tokens in the mean, a model"

// The mean over the run of the keys that a query sees, and of those that its tile computes, in layers
// of one kind; the documents are those of the model above.
static inline void roofline_keys(const Settings* cfg, bool long_window, double* keys,
                                 double* tile_keys) {
    int T = (int)cfg->seq_len;
    bool token = cfg->window_by == FLAG_WINDOW_BY_TOKEN;
    double mean = cfg->document_mask ? ROOFLINE_DOCUMENT : 0, seen = 0, computed = 0;
    double longest = cfg->batching == FLAG_BATCHING_DOCUMENTS ? (double)cfg->max_document : 0;
    int before = -1;
    *keys = *tile_keys = 0;
    for (int64_t step = 0; step < cfg->steps; step++) {
        Schedule now = schedule_at(cfg, step);
        int blocks = long_window ? now.window_long : now.window_short;
        if (blocks != before) {
            int block = token || blocks == 0 ? 1 : (int)cfg->window_block;
            int window = blocks == 0 ? INT_MAX : token ? blocks * (int)cfg->window_block : blocks;
            seen = mean_keys_estimate(T, window, block, mean, longest);
            computed = mean_tile_keys_estimate(T, window, block, 128, 64, mean, longest);
            before = blocks;
        }
        *keys += seen / (double)cfg->steps, *tile_keys += computed / (double)cfg->steps;
    }
}

// ---- what the floor is computed from --------------------------------------------------------

enum { ROOFLINE_BANKS = 24, ROOFLINE_OPS = 64 };

typedef struct RooflineBank {
    const char* name;
    int tensors, rows, cols;      // of the whole model; the shape of each
    int64_t owned;                // elements that this rank updates
    bool muon;                    // else Adam
    bool second;                  // Muon: with NorMuon's second moment
    bool master;                  // an fp32 value stands behind the bf16 one
    bool bf16_state;              // Adam: m and v
    int every;                    // updated in every so many steps; 0 is 1
} RooflineBank;

typedef struct RooflineModel {
    int B, T, C, H, D, F;         // B sequences in a micro-step of this rank
    int V;                        // columns of logits that are computed
    int table_rows;               // of the embedding and of each value table
    int attention_layers, mlp_layers;
    int long_layers;              // of those with attention
    double long_keys, short_keys; // seen by a query, the mean over the run
    double long_tile_keys, short_tile_keys;   // computed, hidden ones too; 0: not known
    const char* keys_from;        // where these numbers come from; NULL: not said
    bool embed_norm, attention_gate, smear, fp8_head;
    int x0_mixes;                 // layers that mix the embedding in
    int value_mixes;              // layers that mix the first one's values in
    int value_tables, value_uses; // and how many layers add one to their values
    int skips;                    // of all kinds, the backout among them
    int ns_steps;
    int micro_steps, ranks;
    double reduce_bytes, gather_bytes;        // sent by this rank in a step
    int64_t steps, batch_tokens;              // of the run; of a step over all ranks
    RooflineBank banks[ROOFLINE_BANKS];
    int bank_count;
} RooflineModel;

typedef enum RooflinePart {
    ROOFLINE_FORWARD, ROOFLINE_BACKWARD, ROOFLINE_UPDATE, ROOFLINE_ORTHOGONAL, ROOFLINE_PARTS
} RooflinePart;

typedef struct RooflineOp {
    const char* name;
    RooflinePart part;
    double count;                 // in a step
    double flops, bytes;          // of all of them
    bool fp8;
} RooflineOp;

typedef struct Roofline {
    RooflineModel model;
    RooflineOp ops[ROOFLINE_OPS];
    int count;
    double matmul_params;         // weights that a token is multiplied by
    double matmul_flops, attention_flops;     // of a token, forward and backward, nothing twice
} Roofline;

// ---- operations -----------------------------------------------------------------------------

// flops, bytes: of a whole step.
static inline RooflineOp* roofline_add(Roofline* r, RooflinePart part, const char* name,
                                       double count, double flops, double bytes) {
    static RooflineOp unused;
    if (count <= 0) return &unused;
    REQUIRE(r->count < ROOFLINE_OPS, "more than %d operations", ROOFLINE_OPS);
    RooflineOp* op = &r->ops[r->count++];
    op->name = name, op->part = part, op->count = count;
    op->flops = flops, op->bytes = bytes, op->fp8 = false;
    return op;
}

// flops, bytes: of all layers in a micro-step.
static inline RooflineOp* roofline_micro(Roofline* r, RooflinePart part, const char* name,
                                         int layers, double flops, double bytes) {
    double micro = r->model.micro_steps;
    return roofline_add(r, part, name, layers * micro, micro * flops, micro * bytes);
}

// y(M,N) = x(M,K) w(N,K)ᵀ in bf16; `more` bytes beside the operands.
static inline void roofline_matmul(Roofline* r, RooflinePart part, const char* name, int layers,
                                   double M, double N, double K, double more) {
    roofline_micro(r, part, name, layers, layers * 2 * M * N * K,
                   layers * (2 * (M * K + N * K + M * N) + more));
}

// Bytes of an fp32 gradient of n elements in the mean micro-step: written by the first, read and
// written by the others.
static inline double roofline_gradient(const Roofline* r, double n) {
    return 4 * n * (2 - 1.0 / r->model.micro_steps);
}

// dw(M,N) += a(K,M)ᵀ b(K,N)
static inline void roofline_weights(Roofline* r, const char* name, int layers, double M, double N,
                                    double K) {
    roofline_micro(r, ROOFLINE_BACKWARD, name, layers, layers * 2 * M * N * K,
                   layers * (2 * (K * M + K * N) + roofline_gradient(r, M * N)));
}

static inline void roofline_head_forward(Roofline* r) {
    const RooflineModel* m = &r->model;
    const RooflinePart part = ROOFLINE_FORWARD;
    double N = (double)m->B * m->T, C = m->C, V = m->V;
    double one = m->fp8_head ? 1 : 2;        // bytes of an operand
    if (m->fp8_head) {                       // in both orders: fp8 products do not transpose
        roofline_add(r, part, "head to fp8", 1, 0, (2 + 2) * V * C);
        roofline_micro(r, part, "last stream to fp8", 1, 0, (2 + 2) * N * C);
    }
    roofline_micro(r, part, "head", 1, 2 * N * C * V, one * (N * C + V * C) + 2 * N * V)->fp8 =
        m->fp8_head;
    // The gradient leaves in place as bf16, or as fp8 in both orders.
    roofline_micro(r, part, "loss, gradient of logits", 1, 0, (2 + 2) * N * V);
}

static inline void roofline_head_backward(Roofline* r) {
    const RooflineModel* m = &r->model;
    const RooflinePart part = ROOFLINE_BACKWARD;
    double N = (double)m->B * m->T, C = m->C, V = m->V, one = m->fp8_head ? 1 : 2;
    roofline_micro(r, part, "head, inputs", 1, 2 * N * C * V,
                   one * (N * V + V * C) + 2 * N * C)->fp8 = m->fp8_head;
    roofline_micro(r, part, "head, weights", 1, 2 * N * C * V,
                   one * (N * V + N * C) + roofline_gradient(r, V * C))->fp8 = m->fp8_head;
}

// Layers of one kind of window: products of N queries with the keys they see.
static inline void roofline_attention(Roofline* r, RooflinePart part, double flops, double bytes) {
    const RooflineModel* m = &r->model;
    int long_layers = m->long_layers, short_layers = m->attention_layers - m->long_layers;
    roofline_micro(r, part, short_layers ? "attention, long" : "attention", long_layers,
                   long_layers * flops * m->long_keys, long_layers * bytes);
    roofline_micro(r, part, long_layers ? "attention, short" : "attention", short_layers,
                   short_layers * flops * m->short_keys, short_layers * bytes);
}

// A pass is one reading or writing of (N, C) in bf16.
static inline void roofline_forward(Roofline* r) {
    const RooflineModel* m = &r->model;
    const RooflinePart part = ROOFLINE_FORWARD;
    double N = (double)m->B * m->T, C = m->C, F = m->F, pass = 2 * N * C;
    double heads = 4 * N * m->H;        // bytes of a number per row and head
    int attention = m->attention_layers, mlp = m->mlp_layers, adds = attention + mlp;
    int x0 = m->x0_mixes;

    roofline_micro(r, part, "embedding", 1, 0, 2 * pass + 4 * N);
    // In: the stream, what a branch adds to it. Out: the sum, the normed sum. The first has no sum.
    roofline_micro(r, part, "residual and norm", adds + 1, 0, (4 * adds + 2) * pass);
    // Beside the norm: reads the embedding, which the first layer's stream is already, and writes
    // the mix; the stream before it is kept for the weight's gradient.
    roofline_micro(r, part, "  mix with the embedding", x0, 0, (2 * x0 - 1) * pass);
    roofline_micro(r, part, "  skips", m->skips, 0, m->skips * pass);
    roofline_matmul(r, part, "QKV", attention, N, 3 * C, C, 0);
    roofline_micro(r, part, "rotary and norm of q, k", attention, 0, attention * 4 * pass);
    roofline_micro(r, part, "mix with first values", m->value_mixes, 0, m->value_mixes * 3 * pass);
    roofline_micro(r, part, "value embeddings", m->value_uses, 0, m->value_uses * 3 * pass);
    roofline_attention(r, part, 4 * N * C, 4 * pass + heads);
    if (m->attention_gate)
        roofline_micro(r, part, "  gates of heads", attention, 0, attention * (24 * N + heads));
    roofline_matmul(r, part, "attention, projection", attention, N, C, C, 0);
    roofline_matmul(r, part, "MLP up, ReLU²", mlp, N, F, C, 0);
    roofline_matmul(r, part, "MLP down", mlp, N, C, F, 0);
    roofline_head_forward(r);
}

static inline void roofline_backward(Roofline* r) {
    const RooflineModel* m = &r->model;
    const RooflinePart part = ROOFLINE_BACKWARD;
    double N = (double)m->B * m->T, C = m->C, F = m->F, pass = 2 * N * C, heads = 4 * N * m->H;
    double table = 4 * C * m->table_rows;      // bytes of a table's gradient
    int attention = m->attention_layers, mlp = m->mlp_layers, adds = attention + mlp;
    int x0 = m->x0_mixes, values = m->value_mixes;

    roofline_head_backward(r);
    roofline_matmul(r, part, "MLP down, inputs, ReLU²", mlp, N, F, C, 2 * N * F);
    roofline_weights(r, "MLP down, weights", mlp, C, F, N);
    roofline_matmul(r, part, "MLP up, inputs", mlp, N, C, F, 0);
    roofline_weights(r, "MLP up, weights", mlp, F, C, N);
    // In: the normed row, its gradient, the gradient of the stream. Out: that, added up. At the
    // last norm there is no gradient of the stream yet.
    roofline_micro(r, part, "norm and residual", adds + 1, 0, (4 * adds + 3) * pass);
    // Beside it: reads both streams, which are one in the first layer, and adds to the gradient of
    // the embedding, in the last layer to nothing. At the end that is read once.
    roofline_micro(r, part, "  mix with the embedding", x0, 0, (4 * x0 - 1) * pass);
    // The skipped stream for the weight, and a gradient that waits for the layer it came from.
    roofline_micro(r, part, "  skips", m->skips, 0, m->skips * 3 * pass);
    roofline_matmul(r, part, "projection, inputs", attention, N, C, C, 0);
    roofline_weights(r, "projection, weights", attention, C, C, N);
    roofline_micro(r, part, "attention, delta; dQ = 0", attention, 0,
                   attention * (4 * pass + 2 * heads));
    roofline_attention(r, part, 10 * N * C, 6 * pass + 2 * heads);
    roofline_micro(r, part, "attention, dQ to bf16", attention, 0, attention * 3 * pass);
    if (m->attention_gate)
        roofline_micro(r, part, "  gates of heads", attention, 0, attention * (72 * N + heads));
    // A layer reads its values and the first layer's, changes the gradient in place and adds to
    // that of the first layer's, which at first is nothing. The first layer adds both up.
    roofline_micro(r, part, "mix with first values", values, 0, (6 * values + 2) * pass);
    // Reads the gradient, the values, the table's rows; writes the gradients of the last two.
    roofline_micro(r, part, "value embeddings", m->value_uses, 0, m->value_uses * 5 * pass);
    roofline_micro(r, part, "rotary and norm of q, k", attention, 0, attention * 6 * pass);
    roofline_matmul(r, part, "QKV, inputs", attention, N, C, 3 * C, 0);
    roofline_weights(r, "QKV, weights", attention, 3 * C, C, N);
    // Rows are added up in the order of tokens: a table's gradient is written once. Norm and smear
    // each want the rows they were computed from.
    roofline_micro(r, part, "embedding", 1, 0, (1 + m->embed_norm + m->smear) * pass + table);
    roofline_micro(r, part, "value tables", m->value_tables, 0,
                   m->value_uses * pass + m->value_tables * table);
}

// FLOPs to make one matrix orthogonal; `halves`: of what is symmetric, half is computed.
static inline double newton_schulz_flops(int rows, int cols, int steps, bool halves) {
    double k = rows < cols ? rows : cols, n = rows < cols ? cols : rows, part = halves ? 0.5 : 1;
    return steps * 2 * k * k * (part * n + part * k + n);
}

// Bytes that an update moves per element: the gradient; the state; the value, its fp32 master too;
// and in Muon the bf16 matrix that goes into Newton-Schulz and the one that comes back, which
// NorMuon reads twice.
static inline double roofline_update_bytes(const RooflineBank* bank) {
    double value = bank->master ? 4 + 4 + 2 : 2 + 2;
    if (bank->muon) return 4 + (4 + 4) + (2 + 2 + 2 * bank->second) + value;
    return 4 + 2 * (bank->bf16_state ? 2 + 2 : 4 + 4) + value;
}

static inline void roofline_update(Roofline* r) {
    const RooflineModel* m = &r->model;
    double bytes[2] = {0, 0}, matrices = 0, flops = 0;
    for (int b = 0; b < m->bank_count; b++) {
        const RooflineBank* bank = &m->banks[b];
        double share = 1.0 / (bank->every > 1 ? bank->every : 1);
        if (bank->owned == 0) continue;
        bytes[bank->muon] += share * bank->owned * roofline_update_bytes(bank);
        if (!bank->muon) continue;
        double count = (double)bank->owned / ((double)bank->rows * bank->cols);
        matrices += count;
        flops += count * newton_schulz_flops(bank->rows, bank->cols, m->ns_steps, true);
    }
    roofline_add(r, ROOFLINE_UPDATE, "Adam", bytes[0] > 0, 0, bytes[0]);
    roofline_add(r, ROOFLINE_UPDATE, "Muon", bytes[1] > 0, 0, bytes[1]);
    roofline_add(r, ROOFLINE_ORTHOGONAL, "Newton-Schulz, by halves", matrices, flops, 0);
}

static inline void roofline_build(Roofline* r, const RooflineModel* model) {
    const RooflineModel* m = model;
    REQUIRE(m->B > 0 && m->T > 0 && m->C > 0 && m->F > 0 && m->V > 0 && m->micro_steps > 0 &&
                m->H * m->D == m->C && m->bank_count <= ROOFLINE_BANKS &&
                m->long_layers <= m->attention_layers,
            "a floor of B=%d T=%d C=%d = %d heads of %d, F=%d V=%d, %d micro-steps, %d of %d layers"
            " long, %d banks", m->B, m->T, m->C, m->H, m->D, m->F, m->V, m->micro_steps,
            m->long_layers, m->attention_layers, m->bank_count);
    memset(r, 0, sizeof *r);
    r->model = *model;
    roofline_forward(r);
    roofline_backward(r);
    roofline_update(r);
    double C = m->C, short_layers = m->attention_layers - m->long_layers;
    r->matmul_params = m->attention_layers * 4 * C * C + m->mlp_layers * 2 * C * m->F + C * m->V;
    r->matmul_flops = 6 * r->matmul_params;
    r->attention_flops = 12 * C * (m->long_layers * m->long_keys + short_layers * m->short_keys);
}

// ---- times ----------------------------------------------------------------------------------

static inline double roofline_compute_seconds(const RooflineOp* op, const RooflineGpu* gpu) {
    return op->flops / (1e12 * (op->fp8 ? gpu->fp8 : gpu->bf16));
}
static inline double roofline_memory_seconds(const RooflineOp* op, const RooflineGpu* gpu) {
    return op->bytes / (1e12 * gpu->memory);
}
static inline double roofline_seconds(const RooflineOp* op, const RooflineGpu* gpu) {
    return fmax(roofline_compute_seconds(op, gpu), roofline_memory_seconds(op, gpu));
}

typedef struct RooflineTotal {
    double flops, bytes, seconds;
    double passes_bytes, passes_seconds;    // of what multiplies nothing
} RooflineTotal;

// Of one part of the step, or of a run of parts.
static inline RooflineTotal roofline_total(const Roofline* r, const RooflineGpu* gpu,
                                           RooflinePart first, RooflinePart last) {
    RooflineTotal total = {0, 0, 0, 0, 0};
    for (int i = 0; i < r->count; i++) {
        const RooflineOp* op = &r->ops[i];
        if (op->part < first || op->part > last) continue;
        double seconds = roofline_seconds(op, gpu);
        total.flops += op->flops, total.bytes += op->bytes, total.seconds += seconds;
        if (op->flops == 0) total.passes_bytes += op->bytes, total.passes_seconds += seconds;
    }
    return total;
}

// What is sent in a step, and what of it no computation hides.
typedef struct RooflineWire {
    double reduce, gather, reduce_under, gather_under, exposed;    // seconds
} RooflineWire;

static inline RooflineWire roofline_wire(const Roofline* r, const RooflineGpu* gpu) {
    RooflineWire w;
    w.reduce = r->model.reduce_bytes / (1e9 * gpu->link);
    w.gather = r->model.gather_bytes / (1e9 * gpu->link);
    w.reduce_under = roofline_total(r, gpu, ROOFLINE_BACKWARD, ROOFLINE_BACKWARD).seconds;
    w.gather_under = roofline_total(r, gpu, ROOFLINE_ORTHOGONAL, ROOFLINE_ORTHOGONAL).seconds +
                     roofline_total(r, gpu, ROOFLINE_FORWARD, ROOFLINE_FORWARD).seconds;
    w.exposed = fmax(0, w.reduce - w.reduce_under) + fmax(0, w.gather - w.gather_under);
    return w;
}

static inline double roofline_floor(const Roofline* r, const RooflineGpu* gpu) {
    return roofline_total(r, gpu, ROOFLINE_FORWARD, ROOFLINE_ORTHOGONAL).seconds +
           roofline_wire(r, gpu).exposed;
}

// ---- print ----------------------------------------------------------------------------------

static inline void roofline_print_banks(FILE* out, const RooflineModel* m) {
    int64_t all = 0;
    fprintf(out, "parameters by bank\n");
    for (int b = 0; b < m->bank_count; b++) {
        const RooflineBank* bank = &m->banks[b];
        int64_t n = (int64_t)bank->tensors * bank->rows * bank->cols;
        char shape[64], every[32] = "";
        snprintf(shape, sizeof shape, "%d x (%d, %d)", bank->tensors, bank->rows, bank->cols);
        if (bank->every > 1) snprintf(every, sizeof every, ", every %d steps", bank->every);
        fprintf(out, "  %-16s %-22s %11" PRId64 "  %s%s%s%s\n", bank->name, shape, n,
                bank->muon && bank->second ? "NorMuon" : bank->muon ? "Muon" : "Adam",
                bank->master ? "" : ", no fp32 value", bank->bf16_state ? ", state in bf16" : "",
                every);
        all += n;
    }
    fprintf(out, "  %-16s %-22s %11" PRId64 "\n", "in all", "", all);
}

static inline void roofline_print_keys(FILE* out, const char* name, int layers, double keys,
                                       double tile_keys) {
    if (layers == 0) return;
    fprintf(out, "  %d layers %s: a query sees %.1f keys in the mean", layers, name, keys);
    if (tile_keys > 0)
        fprintf(out, "; with the hidden ones of its tiles %.1f, %.0f %% more", tile_keys,
                100 * (tile_keys / keys - 1));
    fputc('\n', out);
}

static inline void roofline_print_flops(FILE* out, const Roofline* r) {
    const RooflineModel* m = &r->model;
    double token = r->matmul_flops + r->attention_flops;
    int short_layers = m->attention_layers - m->long_layers;
    fprintf(out, "%" PRId64 " steps of %" PRId64 " tokens: %" PRId64 " tokens\n", m->steps,
            m->batch_tokens, m->steps * m->batch_tokens);
    fprintf(out, "FLOPs per token %.1f M: products %.1f M (6 x %.0f weights), attention %.1f M\n",
            token / 1e6, r->matmul_flops / 1e6, r->matmul_params, r->attention_flops / 1e6);
    roofline_print_keys(out, short_layers ? "with the long window" : "with attention",
                        m->long_layers, m->long_keys, m->long_tile_keys);
    roofline_print_keys(out, "with the short window", short_layers, m->short_keys,
                        m->short_tile_keys);
    if (m->keys_from) fprintf(out, "  keys: %s\n", m->keys_from);
    fprintf(out, "  %.1f TFLOP in a step of all ranks, %.3f EFLOP in all; nothing counted twice\n",
            token * m->batch_tokens / 1e12, token * m->batch_tokens * m->steps / 1e18);
}

static inline void roofline_print_op(FILE* out, const RooflineOp* op, const RooflineGpu* gpu) {
    double compute = roofline_compute_seconds(op, gpu), memory = roofline_memory_seconds(op, gpu);
    int width = 28;      // "²" is two bytes and one column
    for (const char* c = op->name; *c; c++) width += (*c & 0xc0) == 0x80;
    fprintf(out, "  %-*s %5.0f %9.1f %9.1f ", width, op->name, op->count,
            op->flops / op->count / 1e9, op->bytes / op->count / 1e6);
    if (op->bytes > 0) fprintf(out, "%7.0f", op->flops / op->bytes);
    else fprintf(out, "%7s", "-");
    fprintf(out, "  %-8s %8.1f %8.3f\n",
            compute <= memory ? "memory" : op->fp8 ? "fp8" : "compute",
            1e6 * fmax(compute, memory) / op->count, 1e3 * fmax(compute, memory));
}

static inline void roofline_print_total(FILE* out, const char* name, RooflineTotal total) {
    fprintf(out, "  %-28s %5s %9.1f %9.1f %7s  %-8s %8s %8.3f\n", name, "", total.flops / 1e9,
            total.bytes / 1e6, "", "", "", 1e3 * total.seconds);
}

static inline void roofline_print_wire(FILE* out, const Roofline* r, const RooflineGpu* gpu) {
    RooflineWire w = roofline_wire(r, gpu);
    fprintf(out, "on the wire, at %.0f GB/s out of a GPU: apart from the floor where it can hide\n",
            gpu->link);
    fprintf(out, "  gradients, reduced %9.1f MB %8.3f ms, backward takes %.3f\n",
            r->model.reduce_bytes / 1e6, 1e3 * w.reduce, 1e3 * w.reduce_under);
    fprintf(out, "  weights, gathered  %9.1f MB %8.3f ms, Newton-Schulz and forward %.3f\n",
            r->model.gather_bytes / 1e6, 1e3 * w.gather, 1e3 * w.gather_under);
    if (w.exposed > 0) fprintf(out, "  nothing hides     %23.3f ms\n", 1e3 * w.exposed);
}

static inline void roofline_print_floor(FILE* out, const Roofline* r, const RooflineGpu* gpu) {
    static const char* const NAMES[ROOFLINE_PARTS] = {"forward", "backward", "update",
                                                      "orthogonal"};
    const RooflineModel* m = &r->model;
    double floor = roofline_floor(r, gpu);
    fprintf(out, "floor of a step on %s: %.1f TFLOP/s bf16, ", gpu->name, gpu->bf16);
    if (gpu->fp8 > 0) fprintf(out, "%.1f fp8, ", gpu->fp8);
    fprintf(out, "%.3g TB/s\n  (%s)\n", gpu->memory, gpu->source);
    fprintf(out, "  a floor, not a forecast: not yet run on a GPU. One rank of %d, %d tokens x %d;"
            " bf16\n", m->ranks, m->B * m->T, m->micro_steps);
    fprintf(out, "  %-28s %5s %9s %9s %7s  %-8s %8s %8s\n", "", "count", "GFLOP", "MB", "FLOP/B",
            "bound by", "us each", "ms");
    for (int part = 0; part < ROOFLINE_PARTS; part++) {
        RooflinePart p = (RooflinePart)part;
        for (int i = 0; i < r->count; i++)
            if (r->ops[i].part == p) roofline_print_op(out, &r->ops[i], gpu);
        if (p == ROOFLINE_ORTHOGONAL) continue;
        roofline_print_total(out, NAMES[part], roofline_total(r, gpu, p, p));
    }
    roofline_print_total(out, "without Newton-Schulz",
                         roofline_total(r, gpu, ROOFLINE_FORWARD, ROOFLINE_UPDATE));
    roofline_print_total(out, "the step, computing",
                         roofline_total(r, gpu, ROOFLINE_FORWARD, ROOFLINE_ORTHOGONAL));
    if (m->ranks > 1) roofline_print_wire(out, r, gpu);
    fprintf(out, "floor of a step %.3f ms; of %" PRId64 " steps %.1f s, without validation\n",
            1e3 * floor, m->steps, floor * m->steps);
}

// What --dry-run says; gpu "": without the floor.
static inline void roofline_print(FILE* out, const Roofline* r, const char* gpu) {
    const RooflineGpu* known = gpu[0] ? roofline_gpu(gpu) : NULL;
    REQUIRE(!known || !r->model.fp8_head || known->fp8 > 0,
            "--gpu %s has no fp8, and the head is in fp8\nturn that off: --fp8-head 0", gpu);
    roofline_print_banks(out, &r->model);
    roofline_print_flops(out, r);
    if (known) roofline_print_floor(out, r, known);
}
