/*
The floor of a step: llmc/roofline.h against a table that was made by hand, against the published
counts of the speedrun's records, and against sums that are made in another way.

    test_roofline [part of a group's name] [--verbose]

No GPU and no host layer; compiled as C++ by the Makefile.
*/
#include "../llmc/roofline.h"
#include "test.h"

#include <sys/wait.h>
#include <unistd.h>

// |got - want| as a fraction of want.
static void check_near(const char* what, double got, double want, double tol) {
    test_check(what, fabs(got - want) / fabs(want), tol);
}

// ---- models --------------------------------------------------------------------------------

static void add_bank(RooflineModel* m, const char* name, int tensors, int rows, int cols,
                     bool muon) {
    RooflineBank* bank = &m->banks[m->bank_count++];
    memset(bank, 0, sizeof *bank);
    bank->name = name, bank->tensors = tensors, bank->rows = rows, bank->cols = cols;
    bank->owned = (int64_t)tensors * rows * cols, bank->muon = muon, bank->master = true;
}

static RooflineModel model_124m(int B, int T, int attention_layers, int mlp_layers) {
    RooflineModel m;
    memset(&m, 0, sizeof m);
    m.B = B, m.T = T, m.C = 768, m.H = 6, m.D = 128, m.F = 3072, m.V = 50304, m.table_rows = 50304;
    m.attention_layers = attention_layers, m.mlp_layers = mlp_layers;
    m.ns_steps = 5, m.micro_steps = 1, m.ranks = 1;
    add_bank(&m, "embed", 1, 50304, 768, false);
    add_bank(&m, "attn", 4 * attention_layers, 768, 768, true);
    add_bank(&m, "mlp", 2 * mlp_layers, 3072, 768, true);
    return m;
}

static RooflineModel model_modern(void) {
    RooflineModel m = model_124m(64, 1024, 12, 12);
    m.long_layers = 12;
    m.long_keys = mean_keys(NULL, 0, m.T, INT_MAX, 1);
    m.long_tile_keys = mean_tile_keys(NULL, 0, m.T, INT_MAX, 1, 128, 64);
    m.steps = 5100, m.batch_tokens = 524288;
    return m;
}

static RooflineModel model_unet(void) {
    RooflineModel m = model_modern();
    m.embed_norm = true;
    m.x0_mixes = 12, m.value_mixes = 11, m.skips = 6;
    m.steps = 3000;
    return m;
}

// Keys are for one window; test_published takes the mean over the schedules.
static RooflineModel model_sub3(void) {
    RooflineModel m = model_124m(1, 49152, 11, 12);
    m.embed_norm = m.fp8_head = true;
    m.table_rows = 50257;
    m.x0_mixes = 12, m.skips = 6, m.value_tables = 3, m.value_uses = 6;
    m.long_layers = 3;
    m.long_keys = mean_keys(NULL, 0, m.T, 8, 128);
    m.short_keys = mean_keys(NULL, 0, m.T, 4, 128);
    m.steps = 1770, m.batch_tokens = 393216;
    return m;
}

static RooflineModel model_normuon(void) {
    RooflineModel m = model_124m(1, 32768, 10, 11);
    m.embed_norm = m.fp8_head = m.smear = m.attention_gate = true;
    m.x0_mixes = 11, m.skips = 2, m.value_tables = 3, m.value_uses = 5;
    m.long_layers = 2;
    m.long_keys = mean_keys(NULL, 0, 2048, 7 * 128, 1);
    m.short_keys = mean_keys(NULL, 0, 2048, 3 * 128, 1);
    m.steps = 2225, m.batch_tokens = 262144;
    return m;
}

static const RooflineOp* find_op(const Roofline* r, RooflinePart part, const char* name) {
    for (int i = 0; i < r->count; i++)
        if (r->ops[i].part == part && strcmp(r->ops[i].name, name) == 0) return &r->ops[i];
    return NULL;
}

// ---- visible keys --------------------------------------------------------------------------

// By the rule itself: n and key are rows of B*T.
static bool visible(const int* ends, int count, int T, int window, int block, int n, int key) {
    if (key > n || key / T != n / T) return false;
    for (int i = 0; i < count && ends; i++)
        if (ends[i] > key && ends[i] <= n) return false;
    int q = n % T, k = key % T;
    if (block == 1) return window >= q || k >= q - window;
    return q / block - k / block < (window > 1 ? window : 1);
}

static uint32_t next_random(uint32_t* state) {
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;
}

static void test_keys(void) {
    enum { CASES = 60, ROWS = 3 };
    static const int LENGTHS[] = { 1, 7, 32, 50 }, WINDOWS[] = { 0, 1, 3, 9, 64, INT_MAX };
    static const int BLOCKS[] = { 1, 4, 16 };
    uint32_t state = 1;
    double worst = 0, worst_tiles = 0;
    for (int i = 0; i < CASES; i++) {
        int T = LENGTHS[i % 4], window = WINDOWS[i % 6], block = BLOCKS[i % 3], N = ROWS * T;
        int ends[24] = { 0 }, count = 1, tile_queries = 1 + i % 9, tile_keys = 1 + i % 5;
        while (count < 20 && ends[count - 1] < N) {      // empty documents, too
            int end = ends[count - 1] + (int)(next_random(&state) % 20);
            ends[count++] = end < N ? end : N;
        }
        for (int more = 0; more < 2; more++) ends[count++] = N;      // as padding does
        const int* documents = i % 5 ? ends : NULL;
        int rows = documents ? N : T, seen = 0, computed = 0;
        for (int n = 0; n < rows; n++)
            for (int key = 0; key < rows; key++)
                seen += visible(documents, count, T, window, block, n, key);
        for (int row = 0; row < rows; row += T) {
            for (int q = 0; q < T; q += tile_queries) {
                for (int k = 0; k < T; k += tile_keys) {
                    bool any = false;
                    for (int a = q; a < q + tile_queries && a < T; a++)
                        for (int b = k; b < k + tile_keys && b < T; b++)
                            any |= visible(documents, count, T, window, block, row + a, row + b);
                    computed += any * tile_queries * tile_keys;
                }
            }
        }
        double got = mean_keys(documents, count, T, window, block);
        double tiles = mean_tile_keys(documents, count, T, window, block, tile_queries, tile_keys);
        worst = fmax(worst, fabs(got - (double)seen / rows));
        worst_tiles = fmax(worst_tiles, fabs(tiles - (double)computed / rows));
    }
    test_check("keys, against all pairs", worst, 1e-12);
    test_check("keys in tiles, against all tiles", worst_tiles, 1e-12);

    // At length: 1024 queries see 1 to 1024 keys; a window of W sees W + 1, one of w blocks whole
    // blocks but for half of its own. The first queries see less: W (W + 1) / 2 keys less in all.
    const int T = 65536, W = 896;
    check_near("causal", mean_keys(NULL, 0, 1024, INT_MAX, 1), 512.5, 1e-12);
    check_near("a window of tokens", mean_keys(NULL, 0, T, W, 1),
               W + 1 - W * (W + 1) / 2.0 / T, 1e-12);
    check_near("a window of blocks", mean_keys(NULL, 0, T, 7, 128),
               6 * 128 + 64.5 - 128.0 * 128 * (6 * 7 / 2) / T, 1e-12);
    // A tile of 128 queries takes its own 128 keys and the whole window before them.
    check_near("tiles of a window of tokens", mean_tile_keys(NULL, 0, T, W, 1, 128, 64),
               W + 128 - 128.0 * 128 * (7 * 8 / 2) / T, 1e-12);
    check_near("tiles of a window of blocks", mean_tile_keys(NULL, 0, T, 7, 128, 128, 64),
               7 * 128 - 128.0 * 128 * (6 * 7 / 2) / T, 1e-12);
    check_near("causal tiles of 128, of hopper's 36 in 64",
               mean_tile_keys(NULL, 0, 1024, INT_MAX, 1, 128, 128), 36.0 / 64 * 1024, 1e-12);
}

// The estimate is an expectation over cuts: all 2^T of them, each with its probability.
static void test_estimate(void) {
    enum { T = 10 };
    static const struct { double mean; int longest, window, block; } CASES[] = {
        { 3, 0, INT_MAX, 1 }, { 3, 4, INT_MAX, 1 }, { 5, 3, 2, 1 }, { 2.5, 0, 2, 4 },
        { 40, 6, 2, 3 }, { 7, 1, 5, 1 }, { 0, 0, 3, 1 },
    };
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        double mean = CASES[i].mean, stay = mean > 0 ? 1 - 1 / mean : 1, keys = 0, tiles = 0;
        int longest = CASES[i].longest, window = CASES[i].window, block = CASES[i].block;
        // How far into its document the first token is, as long as the cut matters.
        double starts = 0;
        for (int start = 0; start < (longest ? longest : 1); start++) starts += pow(stay, start);
        for (int start = 0; start < (longest ? longest : 1); start++) {
            for (int cuts = 0; cuts < 1 << (T - 1); cuts++) {
                double p = pow(stay, start) / starts;
                int ends[T + 1] = { 0 }, count = 1, at = start;
                for (int n = 1; n < T; n++) {
                    bool cut = cuts >> (n - 1) & 1;
                    double on = longest && at + 1 == longest ? 0 : stay;
                    p *= cut ? 1 - on : on;
                    at = cut ? 0 : at + 1;
                    if (cut) ends[count++] = n;
                }
                ends[count++] = T;
                if (p == 0) continue;
                keys += p * mean_keys(ends, count, T, window, block);
                tiles += p * mean_tile_keys(ends, count, T, window, block, 3, 2);
            }
        }
        char what[80];
        snprintf(what, sizeof what, "mean %g, longest %d, window %d of %d", mean, longest, window,
                 block);
        check_near(what, mean_keys_estimate(T, window, block, mean, longest), keys, 1e-12);
        snprintf(what, sizeof what, "tiles: mean %g, longest %d, window %d of %d", mean, longest,
                 window, block);
        check_near(what, mean_tile_keys_estimate(T, window, block, 3, 2, mean, longest), tiles,
                   1e-12);
    }
}

// ---- one H100, by hand ---------------------------------------------------------------------

// One step of `modern`, 64 x 1024 tokens, as it was worked out by hand for one H100: each operand
// read once, each result written once; for 989 TFLOP/s and 3.35 TB/s, and for the measured 798 and
// 3.0. It was rounded to the digits given here and took T/2 keys per query for (T+1)/2. It adds a
// branch in each of 25 norms, where the first forward and the last backward norm have none: 1 and
// 2 % of those rows. Hence 3 %.
typedef struct HandRow {
    RooflinePart part;
    const char* name;
    int count;
    double gflop, mb, us, us_measured;
} HandRow;

static const HandRow HAND[] = {
    { ROOFLINE_FORWARD, "embedding", 1, 0, 201.6, 60.2, 67.2 },
    { ROOFLINE_FORWARD, "residual and norm", 25, 0, 402.7, 120.2, 134.2 },
    { ROOFLINE_FORWARD, "QKV", 12, 231.9, 406.2, 234.4, 290.6 },
    { ROOFLINE_FORWARD, "rotary and norm of q, k", 12, 0, 402.7, 120.2, 134.2 },
    { ROOFLINE_FORWARD, "attention", 12, 103.1, 404.2, 120.7, 134.7 },
    { ROOFLINE_FORWARD, "attention, projection", 12, 77.3, 202.5, 78.1, 96.9 },
    { ROOFLINE_FORWARD, "MLP up, ReLU²", 12, 309.2, 508.0, 312.6, 387.5 },
    { ROOFLINE_FORWARD, "MLP down", 12, 309.2, 508.0, 312.6, 387.5 },
    { ROOFLINE_FORWARD, "head", 1, 5063.8, 6771.4, 5118.0, 6345.6 },
    { ROOFLINE_FORWARD, "loss, gradient of logits", 1, 0, 13186.9, 3936.4, 4395.6 },
    { ROOFLINE_BACKWARD, "head, inputs", 1, 5063.8, 6771.4, 5118.0, 6345.6 },
    { ROOFLINE_BACKWARD, "head, weights", 1, 5063.8, 6848.6, 5118.0, 6345.6 },
    { ROOFLINE_BACKWARD, "MLP down, inputs, ReLU²", 12, 309.2, 910.7, 312.6, 387.5 },
    { ROOFLINE_BACKWARD, "MLP down, weights", 12, 309.2, 512.8, 312.6, 387.5 },
    { ROOFLINE_BACKWARD, "MLP up, inputs", 12, 309.2, 508.0, 312.6, 387.5 },
    { ROOFLINE_BACKWARD, "MLP up, weights", 12, 309.2, 512.8, 312.6, 387.5 },
    { ROOFLINE_BACKWARD, "norm and residual", 25, 0, 402.7, 120.2, 134.2 },
    { ROOFLINE_BACKWARD, "projection, inputs", 12, 77.3, 202.5, 78.1, 96.9 },
    { ROOFLINE_BACKWARD, "projection, weights", 12, 77.3, 203.7, 78.1, 96.9 },
    { ROOFLINE_BACKWARD, "attention, delta; dQ = 0", 12, 0, 405.8, 121.1, 135.3 },
    { ROOFLINE_BACKWARD, "attention", 12, 257.7, 607.1, 260.5, 322.9 },
    { ROOFLINE_BACKWARD, "attention, dQ to bf16", 12, 0, 302.0, 90.1, 100.7 },
    { ROOFLINE_BACKWARD, "rotary and norm of q, k", 12, 0, 604.0, 180.3, 201.3 },
    { ROOFLINE_BACKWARD, "QKV, inputs", 12, 231.9, 406.2, 234.4, 290.6 },
    { ROOFLINE_BACKWARD, "QKV, weights", 12, 231.9, 409.7, 234.4, 290.6 },
    { ROOFLINE_BACKWARD, "embedding", 1, 0, 255.2, 76.2, 85.1 },
    { ROOFLINE_UPDATE, "Adam", 1, 0, 1159.0, 346.0, 386.3 },
    { ROOFLINE_UPDATE, "Muon", 1, 0, 2208.3, 659.2, 736.1 },
};

static void check_totals(const Roofline* r, const char* name, double forward, double backward,
                         double update, double passes, double step, double orthogonal) {
    const RooflineGpu* gpu = roofline_gpu(name);
    const RooflinePart F = ROOFLINE_FORWARD, B = ROOFLINE_BACKWARD, U = ROOFLINE_UPDATE;
    char what[64];
    snprintf(what, sizeof what, "%s: forward", name);
    check_near(what, 1e3 * roofline_total(r, gpu, F, F).seconds, forward, 0.03);
    snprintf(what, sizeof what, "%s: backward", name);
    check_near(what, 1e3 * roofline_total(r, gpu, B, B).seconds, backward, 0.03);
    snprintf(what, sizeof what, "%s: update", name);
    check_near(what, 1e3 * roofline_total(r, gpu, U, U).seconds, update, 0.03);
    snprintf(what, sizeof what, "%s: what multiplies nothing", name);
    check_near(what, 1e3 * roofline_total(r, gpu, F, U).passes_seconds, passes, 0.03);
    snprintf(what, sizeof what, "%s: the step", name);
    check_near(what, 1e3 * roofline_total(r, gpu, F, U).seconds, step, 0.03);
    snprintf(what, sizeof what, "%s: the floor", name);      // with Newton-Schulz
    check_near(what, 1e3 * roofline_floor(r, gpu), step + orthogonal, 0.03);
}

static void test_hand(void) {
    static Roofline r;
    RooflineModel m = model_modern();
    roofline_build(&r, &m);
    const RooflineGpu *ideal = roofline_gpu("h100"), *measured = roofline_gpu("h100-measured");
    int rows = sizeof HAND / sizeof *HAND, ops = 0;
    for (int i = 0; i < rows; i++) {
        const HandRow* hand = &HAND[i];
        const RooflineOp* op = find_op(&r, hand->part, hand->name);
        if (!test_true(hand->name, op && op->count == hand->count)) continue;
        char what[100];
        if (hand->gflop > 0) {
            snprintf(what, sizeof what, "%s: GFLOP", hand->name);
            check_near(what, op->flops / op->count / 1e9, hand->gflop, 0.03);
        } else {
            test_true("multiplies nothing", op->flops == 0);
        }
        snprintf(what, sizeof what, "%s: MB", hand->name);
        check_near(what, op->bytes / op->count / 1e6, hand->mb, 0.03);
        snprintf(what, sizeof what, "%s: us", hand->name);
        check_near(what, 1e6 * roofline_seconds(op, ideal) / op->count, hand->us, 0.03);
        snprintf(what, sizeof what, "%s: us, measured roofs", hand->name);
        check_near(what, 1e6 * roofline_seconds(op, measured) / op->count, hand->us_measured, 0.03);
    }
    for (int i = 0; i < r.count; i++) ops += r.ops[i].part != ROOFLINE_ORTHOGONAL;
    test_true("and no other operation", ops == rows);

    const RooflinePart F = ROOFLINE_FORWARD, B = ROOFLINE_BACKWARD, U = ROOFLINE_UPDATE;
    check_near("forward, TFLOP", roofline_total(&r, ideal, F, F).flops / 1e12, 17.43, 0.03);
    check_near("forward, GB", roofline_total(&r, ideal, F, F).bytes / 1e9, 59.4, 0.03);
    check_near("backward, TFLOP", roofline_total(&r, ideal, B, B).flops / 1e12, 35.49, 0.03);
    check_near("backward, GB", roofline_total(&r, ideal, B, B).bytes / 1e9, 91.0, 0.03);
    check_near("update, GB", roofline_total(&r, ideal, U, U).bytes / 1e9, 3.4, 0.03);
    check_near("passes, GB", roofline_total(&r, ideal, F, U).passes_bytes / 1e9, 57.7, 0.03);
    check_totals(&r, "h100", 26.3, 43.7, 1.005, 17.2, 71, 1.154);
    check_totals(&r, "h100-measured", 31.3, 53.2, 1.122, 19.2, 85.6, 1.431);

    // All 72 matrices on one GPU, in GFLOP.
    const RooflineOp* op = find_op(&r, ROOFLINE_ORTHOGONAL, "Newton-Schulz, by halves");
    test_true("72 matrices", op && op->count == 72);
    if (op) check_near("Newton-Schulz by halves", op->flops / 1e9, 1141.5, 1e-4);
    check_near("Newton-Schulz in whole",
               (48 * newton_schulz_flops(768, 768, 5, false) +
                24 * newton_schulz_flops(3072, 768, 5, false)) / 1e9, 1630.7, 1e-4);
    // With fp8 three products of the head take half; quantising and the loss are passes as before.
    RooflineModel fp8 = m;
    static Roofline r8;
    fp8.fp8_head = true;
    roofline_build(&r8, &fp8);
    double saved = 0;
    for (int i = 0; i < 3; i++) {
        static const char* const NAMES[3] = { "head", "head, inputs", "head, weights" };
        RooflinePart part = i ? B : F;
        saved += roofline_seconds(find_op(&r, part, NAMES[i]), measured) -
                 roofline_seconds(find_op(&r8, part, NAMES[i]), measured);
    }
    check_near("a head in fp8 saves", 1e3 * saved, 9.5, 0.03);
}

// ---- the published counts of the records ---------------------------------------------------

typedef struct Published {
    const char* record;
    double products, attention;      // MFLOP per token
    double step, all;                // TFLOP, EFLOP
} Published;

static void check_published(const Published* want, const RooflineModel* m, double edges) {
    static Roofline r;
    roofline_build(&r, m);
    double token = r.matmul_flops + r.attention_flops;
    char what[64];
    snprintf(what, sizeof what, "%s: products", want->record);
    test_check(what, fabs(r.matmul_flops / 1e6 - want->products), 0.05);
    snprintf(what, sizeof what, "%s: attention", want->record);
    test_check(what, fabs(r.attention_flops / 1e6 - want->attention),
               0.055 + edges * want->attention);
    snprintf(what, sizeof what, "%s: TFLOP of a step", want->record);
    test_check(what, fabs(token * m->batch_tokens / 1e12 - want->step),
               0.05 + edges * want->step);
    snprintf(what, sizeof what, "%s: EFLOP to the target", want->record);
    test_check(what, fabs(token * m->batch_tokens * m->steps / 1e18 - want->all),
               0.0005 + edges * want->all);
}

static int sub3_window(int64_t step, int64_t steps) {      // in blocks of 128
    int window = 1;
    while (128.0 * window < 1728.0 * (double)step / (double)steps) window++;
    return window;
}

// Counts that others took from the records' scripts: 6 per weight in a product, 12 C per key that
// a query sees, documents not minded. To a digit behind the point: half a digit is allowed, and a
// tenth of that because record 45's 37.548 became 37.6 by being rounded twice.
static void test_published(void) {
    Published modern = { "records 5, 6", 741.4, 56.7, 418.4, 2.134 };
    Published unet = { "record 11", 741.4, 56.7, 418.4, 1.255 };
    Published sub3_20 = { "record 20", 727.3, 51.7, 408.4, 0.569 };
    Published sub3 = { "record 21", 727.3, 51.7, 306.3, 0.542 };
    Published normuon = { "record 45", 684.8, 37.6, 189.4, 0.421 };
    RooflineModel m = model_modern();
    check_published(&modern, &m, 0);
    m = model_unet();
    check_published(&unet, &m, 0);

    // The count leaves out that the first queries of a row see less: w (w - 1) / 2 blocks of 128 x
    // 128 keys, of T queries. With at most 14 of T / 128 blocks: 1.8 % at the end, less before.
    m = model_sub3();
    Published first = { "record 21, first step", 727.3, 6.5, 0, 0 }, last = first;
    last.record = "record 21, last step", last.attention = 109.2;
    for (int k = 0; k < 2; k++) {
        if (k) m.T = 65536, m.steps = 1393, m.batch_tokens = 524288;
        double sum[2] = { 0, 0 };
        for (int64_t step = 0; step < m.steps; step++) {
            int w = sub3_window(step, m.steps);
            for (int is_short = 0; is_short < 2; is_short++) {
                int window = is_short ? w / 2 : w;
                double blocks = window > 1 ? window : 1, queries = m.T / 128;
                sum[is_short] += 128 * (blocks - 1) + 64.5 -
                                 128 * blocks * (blocks - 1) / 2 / queries;
            }
            if (k == 0 && (step == 0 || step == m.steps - 1)) {
                static Roofline r;
                RooflineModel now = m;
                now.long_keys = mean_keys(NULL, 0, m.T, w, 128);
                now.short_keys = mean_keys(NULL, 0, m.T, w / 2, 128);
                roofline_build(&r, &now);
                const Published* want = step ? &last : &first;
                test_check(want->record, fabs(r.attention_flops / 1e6 - want->attention),
                           0.05 + (step ? 0.018 * want->attention : 0));
            }
        }
        m.long_keys = sum[0] / (double)m.steps, m.short_keys = sum[1] / (double)m.steps;
        check_published(k ? &sub3_20 : &sub3, &m, 0.018);
    }

    // Documents of 2048 tokens.
    m = model_normuon();
    double sum[2] = { 0, 0 };
    for (int64_t step = 0; step < m.steps; step++) {
        int w = step < 2185 ? 3 + 4 * (int)(3 * step / 2185) : 13;
        sum[0] += mean_keys(NULL, 0, 2048, 128 * w, 1);
        sum[1] += mean_keys(NULL, 0, 2048, 128 * (w / 2), 1);
    }
    m.long_keys = sum[0] / (double)m.steps, m.short_keys = sum[1] / (double)m.steps;
    check_published(&normuon, &m, 0);

    // TFLOP of Newton-Schulz in a step of all ranks.
    test_check("record 21: Newton-Schulz",
               fabs((44 * newton_schulz_flops(768, 768, 5, false) +
                     24 * newton_schulz_flops(768, 3072, 5, false)) / 1e12 - 1.58), 0.005);
    test_check("record 45: Newton-Schulz",
               fabs((40 * newton_schulz_flops(768, 768, 5, false) +
                     22 * newton_schulz_flops(768, 3072, 5, false)) / 1e12 - 1.44), 0.005);
    static Roofline r;
    m = model_sub3();
    roofline_build(&r, &m);
    test_true("weights that sub3 multiplies by", r.matmul_params == 121208832);
    m = model_normuon();
    roofline_build(&r, &m);
    test_true("weights that normuon multiplies by", r.matmul_params == 114130944);
}

// ---- another way: a walk through the layers ------------------------------------------------

// The model as a list of layers, and a step as a list of what each pass reads and writes.
typedef struct WalkLayer {
    bool attention, is_long, skip, value_table;
} WalkLayer;

typedef struct Walk {
    const RooflineModel* m;
    WalkLayer layers[16];
    int count, at;            // layers; the one that the walk is at
    double N, flops, bytes;
} Walk;

// What a pass touches, by names: each is a tensor (N, C) in bf16, `>` stands before the results.
static void walk_pass(Walk* w, const char* tensors) {
    for (const char* c = tensors; *c; c++) {
        bool begins = *c != ' ' && *c != '>' && (c == tensors || c[-1] == ' ');
        if (begins) w->bytes += 2 * w->N * w->m->C;
    }
}

// A product of matrices that have so many bytes per element.
static void walk_product(Walk* w, double M, double N, double K, double a, double b, double y) {
    w->flops += 2 * M * N * K;
    w->bytes += a * M * K + b * N * K + y * M * N;
}

static void walk_forward(Walk* w) {
    const RooflineModel* m = w->m;
    double N = w->N, C = m->C, F = m->F, V = m->V, head = m->fp8_head ? 1 : 2;
    walk_pass(w, "row > x0");
    w->bytes += 4 * N;      // tokens
    for (int l = 0; l < w->count; l++) {
        const WalkLayer* layer = &w->layers[l];
        if (l == 0) walk_pass(w, m->x0_mixes ? "x0 > mixed normed" : "x0 > normed");
        else walk_pass(w, m->x0_mixes ? "x branch x0 > sum mixed normed" : "x branch > sum normed");
        if (layer->skip) walk_pass(w, "source");
        if (layer->attention) {
            walk_product(w, N, 3 * C, C, 2, 2, 2);
            walk_pass(w, "q k > q k");
            if (m->value_mixes && l > 0) walk_pass(w, "v v0 > v");
            if (layer->value_table) walk_pass(w, "v row > v");
            w->flops += 4 * N * C * (layer->is_long ? m->long_keys : m->short_keys);
            walk_pass(w, "q k v > out");
            w->bytes += 4 * N * m->H;                                    // lse
            if (m->attention_gate) w->bytes += 2 * 12 * N + 4 * N * m->H; // input, gate
            walk_product(w, N, C, C, 2, 2, 2);
            walk_pass(w, "x branch > sum normed");
        }
        walk_product(w, N, F, C, 2, 2, 2);
        walk_product(w, N, C, F, 2, 2, 2);
    }
    walk_pass(w, "x branch > sum normed");
    if (w->layers[w->count].skip) walk_pass(w, "source");
    if (m->fp8_head) {
        walk_pass(w, "x > x8-and-x8-transposed");
        w->bytes += 2 * V * C + V * C + V * C;
    }
    walk_product(w, N, V, C, head, head, 2);
    w->bytes += 2 * N * V + (m->fp8_head ? 1 + 1 : 2) * N * V;
}

static void walk_backward(Walk* w) {
    const RooflineModel* m = w->m;
    double N = w->N, C = m->C, F = m->F, V = m->V, head = m->fp8_head ? 1 : 2;
    bool have_dx0 = false, have_dv0 = false;
    walk_product(w, N, C, V, head, head, 2);
    walk_product(w, V, C, N, head, head, 4);
    walk_pass(w, "normed dnormed > dx");
    if (w->layers[w->count].skip) walk_pass(w, "source > dskip");
    for (int l = w->count - 1; l >= 0; l--) {
        const WalkLayer* layer = &w->layers[l];
        walk_product(w, C, F, N, 2, 2, 4);
        walk_product(w, N, F, C, 2, 2, 2);
        w->bytes += 2 * N * F;                          // the output of ReLU²
        walk_product(w, F, C, N, 2, 2, 4);
        walk_product(w, N, C, F, 2, 2, 2);
        walk_pass(w, "normed dnormed dx > dx");
        if (layer->attention) {
            walk_product(w, C, C, N, 2, 2, 4);
            walk_product(w, N, C, C, 2, 2, 2);
            walk_pass(w, "out dout");
            w->bytes += 4 * N * C + 2 * 4 * N * m->H;   // dQ in fp32, lse, delta
            w->flops += 10 * N * C * (layer->is_long ? m->long_keys : m->short_keys);
            walk_pass(w, "q k v dout > dk dv");
            w->bytes += 2 * 4 * N * m->H;
            w->bytes += 4 * N * C;                      // dQ in fp32
            walk_pass(w, "> dq");
            // Gates: 12 inputs, their gradient before and after; the gate.
            if (m->attention_gate) w->bytes += 3 * 2 * 12 * N + 4 * N * m->H;
            if (m->value_mixes && l > 0) {
                walk_pass(w, have_dv0 ? "v v0 dv dv0 > dv dv0" : "v v0 dv > dv dv0");
                have_dv0 = true;
            } else if (m->value_mixes) {
                walk_pass(w, "dv dv0 > dv");
            }
            if (layer->value_table) walk_pass(w, "dv v row > dv drow");
            walk_pass(w, "q k dq dk > dq dk");
            walk_product(w, N, C, 3 * C, 2, 2, 2);
            walk_product(w, 3 * C, C, N, 2, 2, 4);
            walk_pass(w, "normed dnormed dx > dx");
        }
        if (m->x0_mixes) {
            walk_pass(w, l ? "x x0" : "x0");
            walk_pass(w, have_dx0 ? "dx0 > dx0" : "> dx0");
            have_dx0 = true;
        }
        if (layer->skip) walk_pass(w, "source > dskip");
    }
    for (int l = 0; l <= w->count; l++)
        if (w->layers[l].skip) walk_pass(w, "dskip");   // when the layer it came from is reached
    walk_pass(w, m->x0_mixes ? "dx dx0" : "dx");
    if (m->embed_norm) walk_pass(w, "x0");
    if (m->smear) walk_pass(w, "row");
    w->bytes += 4 * C * m->table_rows;
    for (int l = 0; l < w->count; l++)
        if (w->layers[l].value_table) walk_pass(w, "drow");
    w->bytes += m->value_tables * 4 * C * m->table_rows;
}

// long, short, none: one letter per layer, from the first that is there; then where skips end
// (the last: on the way out) and which layers have a value table.
static void check_walk(const char* name, const RooflineModel* m, const char* layers,
                       const char* skips, const char* tables) {
    static Roofline r;
    const RooflineGpu* gpu = roofline_gpu("h100");
    char what[64];
    roofline_build(&r, m);
    for (int backward = 0; backward < 2; backward++) {
        Walk w;
        memset(&w, 0, sizeof w);
        w.m = m, w.N = (double)m->B * m->T, w.count = (int)strlen(layers);
        for (int l = 0; l <= w.count; l++) {
            w.layers[l].attention = l < w.count && layers[l] != '-';
            w.layers[l].is_long = l < w.count && layers[l] == 'L';
            w.layers[l].skip = skips[l] == 'x';
            w.layers[l].value_table = l < w.count && tables[l] == 'x';
        }
        if (backward) walk_backward(&w);
        else walk_forward(&w);
        RooflinePart part = backward ? ROOFLINE_BACKWARD : ROOFLINE_FORWARD;
        RooflineTotal total = roofline_total(&r, gpu, part, part);
        snprintf(what, sizeof what, "%s: %s FLOPs", name, backward ? "backward" : "forward");
        check_near(what, total.flops, w.flops, 1e-12);
        snprintf(what, sizeof what, "%s: %s bytes", name, backward ? "backward" : "forward");
        check_near(what, total.bytes, w.bytes, 1e-12);
    }
}

static void test_walk(void) {
    RooflineModel m = model_modern();
    check_walk("modern", &m, "LLLLLLLLLLLL", ".............", "............");
    m = model_unet();
    check_walk("unet", &m, "LLLLLLLLLLLL", "......xxxxxx.", "............");
    m = model_sub3();
    check_walk("sub3", &m, "LSSSLSS-SSSL", "......xxxxxx.", "xxx......xxx");
    m = model_normuon();      // layers 1 to 11
    check_walk("normuon", &m, "SSSLSS-SSSL", "......x....x", "xx......xxx");

    // The sum of all FLOPs of a token: 6 per weight, 14 C per key: attention makes scores twice.
    static Roofline r;
    roofline_build(&r, &m);
    RooflineTotal all = roofline_total(&r, roofline_gpu("h100"), ROOFLINE_FORWARD,
                                       ROOFLINE_BACKWARD);
    check_near("normuon: FLOPs of a token", all.flops / 32768,
               6.0 * 114130944 + 14 * 768 * (2 * m.long_keys + 8 * m.short_keys), 1e-12);
}

// ---- micro-steps, update, wire -------------------------------------------------------------

static void test_micro_steps(void) {
    static Roofline one, eight;
    const RooflineGpu* gpu = roofline_gpu("h100");
    RooflineModel m = model_unet();
    roofline_build(&one, &m);
    m.B /= 8, m.micro_steps = 8;
    roofline_build(&eight, &m);
    RooflineTotal a[2], b[2];
    for (int p = 0; p < 2; p++) {
        a[p] = roofline_total(&one, gpu, (RooflinePart)p, (RooflinePart)p);
        b[p] = roofline_total(&eight, gpu, (RooflinePart)p, (RooflinePart)p);
        check_near(p ? "FLOPs of backward" : "FLOPs of forward", b[p].flops, a[p].flops, 1e-12);
    }
    // Weights are read seven times more often in forward and for the inputs; their gradients are
    // written eight times and read seven times instead of written once; the table's each time.
    double weights = one.matmul_params, table = 50304 * 768;
    check_near("bytes of forward", b[0].bytes - a[0].bytes, 7 * 2 * weights, 1e-9);
    check_near("bytes of backward", b[1].bytes - a[1].bytes,
               7 * 2 * weights + 4 * (15 - 1) * weights + 7 * 4 * table, 1e-9);

    RooflineModel fp8 = model_sub3();
    roofline_build(&one, &fp8);
    fp8.micro_steps = 2;
    roofline_build(&eight, &fp8);
    test_true("the head is quantised once a step",
              find_op(&eight, ROOFLINE_FORWARD, "head to fp8")->bytes ==
                  find_op(&one, ROOFLINE_FORWARD, "head to fp8")->bytes);
    test_true("what comes before it, in each micro-step",
              find_op(&eight, ROOFLINE_FORWARD, "last stream to fp8")->bytes ==
                  2 * find_op(&one, ROOFLINE_FORWARD, "last stream to fp8")->bytes);
}

static void test_update(void) {
    static Roofline r;
    RooflineModel m = model_124m(1, 128, 1, 1);
    RooflineBank adam = m.banks[0], muon = m.banks[1];
    // value, master and its copy; m and v; the gradient. Adam in bf16: the same without a master.
    test_true("Adam", roofline_update_bytes(&adam) == 2 * 4 + 2 + 2 * (4 + 4) + 4);
    adam.master = false;
    test_true("Adam on bf16 alone", roofline_update_bytes(&adam) == 2 * 2 + 2 * (4 + 4) + 4);
    adam.bf16_state = true;
    test_true("Adam, state in bf16", roofline_update_bytes(&adam) == 2 * 2 + 2 * (2 + 2) + 4);
    test_true("Muon", roofline_update_bytes(&muon) == 2 * 4 + 2 + 2 * 4 + 4 + 2 + 2);
    muon.second = true;
    test_true("NorMuon", roofline_update_bytes(&muon) == 2 * 4 + 2 + 2 * 4 + 4 + 2 + 2 + 2);

    // A rank that owns an eighth of the table, in every second step, and two of four matrices.
    m.bank_count = 2;
    m.banks[0] = adam, m.banks[1] = muon;
    m.banks[0].owned /= 8, m.banks[0].every = 2, m.banks[1].owned /= 2;
    roofline_build(&r, &m);
    const RooflineOp *a = find_op(&r, ROOFLINE_UPDATE, "Adam");
    const RooflineOp *b = find_op(&r, ROOFLINE_UPDATE, "Muon");
    const RooflineOp *c = find_op(&r, ROOFLINE_ORTHOGONAL, "Newton-Schulz, by halves");
    if (!test_true("three rows", a && b && c)) return;
    test_true("a share of Adam's", a->bytes == 50304.0 * 768 / 8 / 2 * 16);
    test_true("a share of Muon's", b->bytes == 2 * 768.0 * 768 * 28);
    // X Xᵀ and A² by halves, B X whole: 2 x 2 k³.
    test_true("and of the products", c->count == 2 && c->flops == 2 * 5 * 4 * 768.0 * 768 * 768);
    m.banks[0].owned = m.banks[1].owned = 0;
    roofline_build(&r, &m);
    test_true("a rank that owns nothing", !find_op(&r, ROOFLINE_UPDATE, "Adam") &&
                                              !find_op(&r, ROOFLINE_UPDATE, "Muon"));
}

static void test_wire(void) {
    static Roofline r;
    const RooflineGpu* gpu = roofline_gpu("h100");
    RooflineModel m = model_modern();
    roofline_build(&r, &m);
    double alone = roofline_floor(&r, gpu);
    m.ranks = 8;
    m.reduce_bytes = m.gather_bytes = 2 * 123568128.0 * 7 / 8;      // bf16
    roofline_build(&r, &m);
    RooflineWire w = roofline_wire(&r, gpu);
    check_near("reduce", 1e3 * w.reduce, 216.244 / 450, 1e-5);
    check_near("gather", 1e3 * w.gather, 216.244 / 450, 1e-5);
    test_true("all is hidden", w.exposed == 0 && roofline_floor(&r, gpu) == alone);

    r.model.reduce_bytes = 450e9 * (w.reduce_under + 0.002);
    check_near("reducing takes longer than backward", roofline_floor(&r, gpu) - alone, 0.002, 1e-9);
    r.model.gather_bytes = 450e9 * (w.gather_under + 0.001);
    check_near("gathering, too", roofline_floor(&r, gpu) - alone, 0.003, 1e-9);
    double forward = roofline_total(&r, gpu, ROOFLINE_FORWARD, ROOFLINE_FORWARD).seconds;
    check_near("hides under forward and Newton-Schulz", w.gather_under,
               forward + 1141.5e9 / 989.4e12, 1e-5);
}

// ---- what is printed -----------------------------------------------------------------------

static const char* printed(const Roofline* r, const char* gpu) {
    static char text[32768];
    FILE* file = tmpfile();
    REQUIRE(file, "no temporary file: %s", strerror(errno));
    roofline_print(file, r, gpu);
    rewind(file);
    text[fread(text, 1, sizeof text - 1, file)] = 0;
    fclose(file);
    return text;
}

// The message that a child ends with which prints r for this GPU; "" if it does not end so.
static const char* dying_words(const Roofline* r, const char* gpu) {
    static char text[4096];
    FILE* file = tmpfile();
    REQUIRE(file, "no temporary file: %s", strerror(errno));
    fflush(stdout);
    pid_t pid = fork();
    REQUIRE(pid >= 0, "fork: %s", strerror(errno));
    if (pid == 0) {
        dup2(fileno(file), STDERR_FILENO);
        printed(r, gpu);
        _exit(0);
    }
    int status = 0;
    waitpid(pid, &status, 0);
    rewind(file);
    text[fread(text, 1, sizeof text - 1, file)] = 0;
    fclose(file);
    return WIFEXITED(status) && WEXITSTATUS(status) == 1 ? text : "";
}

static void test_gpus(void) {
    for (int i = 0; i < ROOFLINE_GPU_COUNT; i++) {
        const RooflineGpu* gpu = roofline_gpu(ROOFLINE_GPUS[i].name);
        test_true(gpu->name, gpu == &ROOFLINE_GPUS[i] && gpu->bf16 > 0 && gpu->memory > 0 &&
                                 gpu->link > 0 && gpu->source[0]);
        if (gpu->fp8 > 0) check_near("fp8 is twice as fast", gpu->fp8, 2 * gpu->bf16, 1e-3);
    }
    static Roofline r;
    RooflineModel m = model_modern();
    roofline_build(&r, &m);
    const char* words = dying_words(&r, "v100");
    test_true("an unknown GPU", strstr(words, "--gpu 'v100' is not known") != NULL);
    for (int i = 0; i < ROOFLINE_GPU_COUNT; i++)
        test_true("the known are listed", strstr(words, ROOFLINE_GPUS[i].name) != NULL);
    test_true("a100 without fp8", strstr(printed(&r, "a100"), "312.0 TFLOP/s bf16, 2.04 TB/s"));
    m.fp8_head = true;
    roofline_build(&r, &m);
    words = dying_words(&r, "a100");
    test_true("a100 with fp8", strstr(words, "--gpu a100 has no fp8") &&
                                   strstr(words, "--fp8-head 0"));
}

static void test_print(void) {
    static Roofline r;
    RooflineModel m = model_modern();
    roofline_build(&r, &m);
    const char* text = printed(&r, "");
    test_true("no floor without --gpu", !strstr(text, "floor"));
    test_true("parameters",
              strstr(text, "attn             48 x (768, 768)           28311552  Muon\n") &&
                  strstr(text, "123568128\n"));
    test_true("tokens", strstr(text, "5100 steps of 524288 tokens: 2673868800 tokens\n"));
    test_true("FLOPs", strstr(text, "FLOPs per token 798.1 M: products 741.4 M (6 x 123568128 "
                                    "weights), attention 56.7 M\n"));
    test_true("keys", strstr(text, "12 layers with attention: a query sees 512.5 keys in the mean; "
                                   "with the hidden ones of its tiles 576.0, 12 % more\n"));

    text = printed(&r, "h100");
    test_true("the label", strstr(text, "a floor, not a forecast: not yet run on a GPU."));
    test_true("the roofs and their source",
              strstr(text, "floor of a step on h100: 989.4 TFLOP/s bf16, 1978.9 fp8, 3.35 TB/s\n"
                           "  (NVIDIA H100 data sheet"));
    test_true("no wire on one rank", !strstr(text, "on the wire"));
    test_true("a row bound by products",
              strstr(text, "  QKV                             12     231.9     406.2     571  "
                           "compute     234.4    2.813\n"));
    test_true("a row bound by memory",
              strstr(text, "  rotary and norm of q, k         12       0.0     402.7       0  "
                           "memory      120.2    1.442\n"));
    test_true("a name with a letter of two bytes",
              strstr(text, "  MLP up, ReLU²                   12     309.2 "));
    // Rows add up to the sums below them: each is rounded to half a microsecond.
    double sum = 0, all = 0, floor = 0;
    int rows = 0, sums = 0;
    static char lines[32768];
    strcpy(lines, strstr(text, "us each       ms\n") + 17);
    for (char* line = strtok(lines, "\n"); line; line = strtok(NULL, "\n")) {
        double ms = atof(strrchr(line, ' '));
        if (strstr(line, "floor of a step")) floor = atof(line + 16);
        else if (strstr(line, " compute ") || strstr(line, " memory ")) sum += ms, rows++;
        else if (!strncmp(line, "  forward", 9) || !strncmp(line, "  backward", 10) ||
                 !strncmp(line, "  update", 8)) {
            test_check("a part is the sum of its rows", fabs(ms - sum), 0.0005 * (rows + 1));
            all += sum, sum = 0, rows = 0, sums++;
        }
    }
    test_true("three parts", sums == 3 && rows == 1);      // Newton-Schulz is left
    test_check("the floor is the sum of all", fabs(floor - (all + sum)), 0.0005 * (r.count + 1));

    m = model_sub3();
    m.ranks = 8, m.reduce_bytes = m.gather_bytes = 4.5e6;
    m.keys_from = "one window";
    m.banks[0].every = 2, m.banks[0].bf16_state = true, m.banks[0].master = false;
    m.banks[1].second = true;
    roofline_build(&r, &m);
    text = printed(&r, "h100");
    test_true("what a bank's optimizer does",
              strstr(text, "Adam, no fp32 value, state in bf16, every 2 steps\n") &&
                  strstr(text, "NorMuon\n"));
    test_true("long and short",
              strstr(text, "  3 layers with the long window: a query sees ") &&
                  strstr(text, "  8 layers with the short window: a query sees ") &&
                  strstr(text, "\n  attention, short                 8 "));
    test_true("where the keys come from", strstr(text, "\n  keys: one window\n"));
    test_true("a row in fp8", strstr(text, "  fp8 "));
    test_true("the wire", strstr(text, "on the wire, at 450 GB/s out of a GPU") &&
                              strstr(text, "  gradients, reduced       4.5 MB    0.010 ms"));
    test_true("one rank of eight", strstr(text, "One rank of 8, 49152 tokens x 1"));
    test_true("all is hidden", !strstr(text, "nothing hides"));
    r.model.gather_bytes = 450e9;
    test_true("not all is hidden", strstr(printed(&r, "h100"), "nothing hides"));
}

int main(int argc, char** argv) {
    program_name = "test_roofline";
    test_init(argc, argv);
    if (test_group("keys")) test_keys();
    if (test_group("keys: estimate")) test_estimate();
    if (test_group("one H100, by hand")) test_hand();
    if (test_group("published counts")) test_published();
    if (test_group("a walk")) test_walk();
    if (test_group("micro-steps")) test_micro_steps();
    if (test_group("update")) test_update();
    if (test_group("wire")) test_wire();
    if (test_group("gpus")) test_gpus();
    if (test_group("print")) test_print();
    return test_summary();
}
