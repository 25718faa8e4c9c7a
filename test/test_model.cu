/*
The whole trainer at small sizes: gradients of each recipe against the double-precision oracle, and the
properties that a run promises.

    gradients       loss and every gradient of each recipe equal the oracle's
    accumulation    --micro-batch changes memory, not the result
    repeat          the same step twice, and on 1 or 2 OS threads, gives the same bits
    overfit         a batch is learned by heart
    not finite      a weight or gradient that is not finite is noticed, named, and changes no bit; steps that are skipped
    state           a checkpoint of a model holds every bit of it: recipes, and both halves of Adam's every second step
    file            weights_save and weights_load keep every bit; the values and shapes are the parameters'
    evaluation      the mean over exactly --val-tokens predictions, for any micro-batch

Settings come from the recipe files themselves, so that a wrong number there shows up here.
*/
#define TRAIN_GPT2_NO_MAIN
#include "../train_gpt2.cu"
#include "oracle.h"
#include "test.h"

static Model model;

// A small model of a recipe. Overrides are further flags, NULL-terminated.
static Settings* make_settings(const char* recipe, const char* const* flags) {
    static Settings cfg;
    const char* argv[64] = {"train_gpt2", "--recipe", recipe};
    int argc = 3;
    while (flags && *flags) argv[argc++] = *flags++;
    settings_parse(&cfg, argc, (char**)argv);
    return &cfg;
}

static const TextCodec codec = {};

static void model_end(Model* m) {
    CUDA_CHECK(cudaStreamSynchronize(m->stream));
    model_free(m);
}

static void fill_batch(Model* m, int N, int real_vocab, uint64_t seed) {
    batch_wait(m);
    test_fill_tokens(m->host.inputs, N, seed, real_vocab);
    for (int i = 0; i < N; i++) m->host.targets[i] = i + 1 < N ? m->host.inputs[i + 1] : m->host.inputs[0];
}

// Values that make every gradient informative: the recipes' zero matrices would hide most of them.
static void randomize(Model* m, uint64_t seed) {
    for (int id = 0; id < PARAMS; id++) {
        for (int layer = 0; layer < MAX_LAYERS; layer++) {
            if (m->place[id][layer] < 0) continue;
            const Bank* bank = &m->params.banks[PARAM_TABLE[id].bank];
            size_t n = (size_t)bank->rows * bank->cols;
            float* value = test_floats(n);
            for (size_t i = 0; i < n; i++) {
                double z = test_normal(seed + 1000 * id + layer, i);
                double v = bank->kind == SCALAR ? 0.5 + 0.2 * z : id == WTE ? 0.5 * z :
                           id == VALUE_EMBEDS ? z : z / sqrt((double)bank->cols);
                value[i] = (float)test_round(v);
            }
            tensor_write(&m->params, value, m->place[id][layer]);
            free(value);
        }
    }
}

static void compute_gradients(Model* m, uint64_t seed, int real_vocab) {
    int N = m->B * m->T;
    for (int micro = 0; micro < m->micro_steps; micro++) {
        fill_batch(m, N, real_vocab, seed + micro);
        micro_step(m, &m->host, micro);
    }
}

static double rms(const double* x, size_t n) { return sqrt(oracle_norm(x, n) * oracle_norm(x, n) / (double)n); }

// The trainer's parameters as the oracle's.
static void copy_values(Model* m, OracleModel* oracle) {
    params_collect(&m->params);
    for (int id = 0; id < PARAMS; id++) {
        for (int layer = 0; layer < MAX_LAYERS; layer++) {
            if (m->place[id][layer] < 0) continue;
            size_t n = tensor_elements(&m->params, m->place[id][layer]);
            float* value = test_floats(n);
            tensor_read(&m->params, value, m->place[id][layer]);
            double* w = oracle_weight(oracle, PARAM_TABLE[id].name, layer);
            for (size_t i = 0; i < n; i++) w[i] = value[i];
            free(value);
        }
    }
}

// What the errors of a gradient are compared with: its rms. A scalar's is one sum of products of both signs, which
// may all but vanish in one layer or another: there it is the rms of all layers' (0 stays 0).
static double gradient_scale(Model* m, OracleModel* oracle, int id, int layer) {
    double sum = 0, count = 0;
    const char* name = PARAM_TABLE[id].name;
    double own = rms(oracle_grad(oracle, name, layer), tensor_elements(&m->params, m->place[id][layer]));
    if (BANK_TABLE[PARAM_TABLE[id].bank].kind != SCALAR || own == 0) return own;
    for (int l = 0; l < MAX_LAYERS; l++) {
        if (m->place[id][l] < 0) continue;
        size_t n = tensor_elements(&m->params, m->place[id][l]);
        double norm = oracle_norm(oracle_grad(oracle, name, l), n);
        sum += norm * norm, count += n;
    }
    return sqrt(sum / count);
}

// Loss, gradients and their norm, against the oracle's; its gradients count `factor` times.
//
// fp32: products of K <= 512 terms and a depth of ten operations leave about 2^-24 sqrt(512) 10 = 1e-5 of the rms.
// bf16: every stored tensor rounds by up to 2^-9 of its value; ten of them in a row, uncorrelated, give 1e-2 of
// error relative to the gradient's rms, several times that where terms cancel (a scalar's gradient is one sum of
// products of both signs), and six times more at the worst element. That is for four layers; the roundings of
// more add in squares. The loss moves with the logits, which reach 10 here (the tied head sees its own row): 2^-9 x 10.
static void check_gradients(const char* title, Model* m, OracleModel* oracle, double loss, double factor) {
    StepStats stats = step_result(m, step_measure(m, &m->slots[0]));
    char name[128];
    double deep = m->L > 4 ? sqrt(m->L / 4.0) : 1, loss_tolerance = FLOATX_IS_BF16 ? 2e-2 : 2e-6,
           max_tolerance = FLOATX_IS_BF16 ? 0.25 * deep : 5e-4, rms_tolerance = FLOATX_IS_BF16 ? 4e-2 * deep : 2e-5;
    snprintf(name, sizeof name, "%s loss", title);
    test_check(name, fabs(stats.loss - loss), loss_tolerance);
    double norm2 = 0;
    for (int id = 0; id < PARAMS; id++) {
        for (int layer = 0; layer < MAX_LAYERS; layer++) {
            int tensor = m->place[id][layer];
            if (tensor < 0) continue;
            const Bank* bank = bank_of(&m->params, tensor);
            bool used = !bank->adam || m->now.adam_now;       // in this step: the norm is of those alone
            size_t n = tensor_elements(&m->params, tensor);
            float* got = test_floats(n);
            tensor_read(&m->params, got, tensor);
            const double* want = oracle_grad(oracle, PARAM_TABLE[id].name, layer);
            double worst = 0, sum = 0, scale = factor * gradient_scale(m, oracle, id, layer);
            for (size_t i = 0; i < n; i++) {
                double e = fabs(got[i] - factor * want[i]);
                if (!(e <= worst)) worst = e;
                sum += e * e;
                norm2 += used ? factor * factor * want[i] * want[i] : 0;
            }
            const char* label = m->params.tensors[tensor].name;
            snprintf(name, sizeof name, "%s d %s, largest", title, label);
            // layer 0 mixes its values with themselves: that gradient is exactly zero
            if (scale == 0) test_true(name, worst == 0);
            else test_check(name, worst / scale, max_tolerance);
            snprintf(name, sizeof name, "%s d %s, rms", title, label);
            double allowed = FLOATX_IS_BF16 && bank->kind == SCALAR ? 0.15 : rms_tolerance;
            if (scale != 0) test_check(name, sqrt(sum / n) / scale, allowed);
            free(got);
        }
    }
    snprintf(name, sizeof name, "%s gradient norm", title);
    test_check(name, fabs(stats.grad_norm / sqrt(norm2) - 1), rms_tolerance);
}

static void test_gradients(const char* recipe, int oracle_recipe, const char* const* flags) {
    model_build(&model, make_settings(recipe, flags), 0, 1);
    model_start(&model, NULL);
    randomize(&model, 11);
    // The oracle has one eps; the recipes' 2^-7 against 2^-23 is a setting, tested in the kernels.
    OracleModel oracle;
    oracle_model_init(&oracle, oracle_recipe, model.V, model.C, model.H, model.L, true);
    copy_values(&model, &oracle);
    compute_gradients(&model, 5, model.V);
    double loss = oracle_model_forward_backward(&oracle, model.host.inputs, model.host.targets, model.B, model.T);
    check_gradients(recipe, &model, &oracle, loss, 1);
    oracle_model_free(&oracle);
    model_end(&model);
}

static const char* const TINY[] = {"--layers", "4", "--heads", "2", "--channels", "64", "--vocab", "96", "--seq-len", "37",
                                   "--micro-batch", "2", "--batch-tokens", "74", "--norm-eps", "1.1920929e-7",
                                   "--qk-norm-eps", "1.1920929e-7", "--bf16-tables", "0", NULL};
static const char* const WIDE[] = {"--layers", "2", "--heads", "1", "--channels", "128", "--vocab", "64", "--seq-len", "70",
                                   "--micro-batch", "1", "--batch-tokens", "70", "--norm-eps", "1.1920929e-7",
                                   "--qk-norm-eps", "1.1920929e-7", "--bf16-tables", "0", NULL};
static const char* const ODD[] = {"--layers", "2", "--heads", "3", "--channels", "96", "--vocab", "75", "--seq-len", "29",
                                  "--micro-batch", "3", "--batch-tokens", "87", "--norm-eps", "1.1920929e-7",
                                  "--qk-norm-eps", "1.1920929e-7", "--bf16-tables", "0", NULL};

// ---- gradients behind masks ------------------------------------------------------------------

// sub3 and normuon: twelve layers, which their lists of layers want. B rows of T tokens in documents, seen
// through windows at step `step`: windows are the long ones up to then, in blocks, one for each change; none:
// no limit. They stand here as numbers, and are the schedule's to find.
typedef struct LateCase {
    int oracle_recipe, B, T, C, H, step;
    bool documents;
    int windows[4];
    const char* flags[8];
} LateCase;

// The windows: sub3 sees the last 7 step tokens in whole blocks, normuon 3, 7 and 11 blocks in thirds of nine
// steps. Fewer rows of the tables than columns of the head, and neither a multiple of a tile. What is in 8 bits
// or bf16 elsewhere is in floatX, as the oracle's: test_golden has the rounding.
enum { LATE_BLOCK = 8, LATE_END = 7, LATE_ROWS = 67 };
static const char* const LATE[] = {"--vocab", "72", "--table-rows", "67", "--end-of-text", "7", "--window-block", "8",
                                   "--window-max", "63", "--steps", "10", "--extension-steps", "1", "--fp8-head", "0",
                                   "--bf16-tables", "0", "--bf16-head", "0", "--bf16-state", "0"};
enum { LATE_FLAGS = sizeof LATE / sizeof *LATE };

static const LateCase LATE_CASES[] = {
    {ORACLE_SUB3, 1, 150, 96, 3, 8, true, {7}, {}},
    {ORACLE_SUB3, 2, 37, 128, 1, 4, true, {4}, {}},
    {ORACLE_SUB3, 1, 45, 128, 2, 4, false, {4}, {"--document-mask", "0"}},
    {ORACLE_NORMUON, 1, 150, 96, 3, 4, true, {3, 7}, {"--adam-every", "1"}},
    {ORACLE_NORMUON, 2, 37, 128, 1, 0, true, {3}, {}},
    {ORACLE_NORMUON, 1, 45, 128, 2, 0, true, {}, {"--windows", "none", "--yarn", "0", "--long-layers", ""}},
};

// Documents: the first row has four, one of a single token, and begins with one; the others have two, and begin
// in the middle of one.
static void fill_documents(Model* m) {
    int N = m->B * m->T, T = m->T;
    fill_batch(m, N, LATE_ROWS, 5);
    for (int i = 0; i < N; i++) {
        int t = i % T, *token = &m->host.inputs[i];
        bool first = i < T ? t == 0 || t == T / 5 || t == T / 5 + 1 || t == 2 * T / 5 : t == T / 2;
        if (first) *token = LATE_END;
        else if (*token == LATE_END) *token = LATE_END + 1;
    }
    batch_segments(&m->host, m->B, T, LATE_END);
}

// mask(T, T) of one row, by the definitions of the records, which test_oracle holds against theirs.
static void fill_mask(uint8_t* mask, const LateCase* c, const int* tokens, int window) {
    int T = c->T, blocks = (T + LATE_BLOCK - 1) / LATE_BLOCK, room = blocks * LATE_BLOCK, count = 0;
    if (window == 0) window = blocks;
    // sub3: the tokens, filled up with zeros, which open no document; normuon: where documents begin
    int* row = (int*)test_calloc(room, sizeof(int));
    if (c->oracle_recipe == ORACLE_SUB3) {
        uint8_t* whole = (uint8_t*)test_calloc(room, room);
        memcpy(row, tokens, T * sizeof(int));
        oracle_block_mask(whole, NULL, row, c->documents ? LATE_END : -1, room, LATE_BLOCK, window);
        for (int t = 0; t < T; t++) memcpy(mask + (size_t)t * T, whole + (size_t)t * room, T);
        free(whole);
    } else {
        for (int t = 0; t < T; t++) if (t == 0 || (c->documents && tokens[t] == LATE_END)) row[count++] = t;
        oracle_window_mask(mask, row, count, T, window * LATE_BLOCK);
    }
    free(row);
}

static void test_late_gradients(const LateCase* c) {
    bool normuon = c->oracle_recipe == ORACLE_NORMUON;
    const char *recipe = normuon ? "normuon" : "sub3", *flags[LATE_FLAGS + 9] = {};
    int n = 0, B = c->B, T = c->T;
    for (; n < LATE_FLAGS; n++) flags[n] = LATE[n];
    for (int i = 0; i < 8; i++) flags[n++] = c->flags[i];
    Settings* cfg = make_settings(recipe, flags);
    cfg->channels = c->C, cfg->heads = c->H, cfg->seq_len = cfg->val_seq_len = T;
    cfg->micro_batch = cfg->val_batch = B, cfg->batch_tokens = B * T;
    model_build(&model, cfg, 0, 1);
    model_start(&model, NULL);
    randomize(&model, 11);

    OracleModel oracle;
    oracle_model_init_rows(&oracle, c->oracle_recipe, LATE_ROWS, model.V, c->C, c->H, model.L, normuon);
    copy_values(&model, &oracle);
    int changes = 0;
    for (; c->windows[changes + 1]; changes++) {
        double before = LATE_BLOCK * c->windows[changes], now = LATE_BLOCK * c->windows[changes + 1];
        oracle_yarn(oracle.frequencies, c->C / c->H, before, now);
        oracle.attn_scale = oracle_yarn_scale(oracle.attn_scale, before, now);
    }
    fill_documents(&model);
    uint8_t* masks[2];
    for (int wide = 0; wide < 2; wide++) {
        int window = c->windows[changes] / (wide ? 1 : 2);
        masks[wide] = (uint8_t*)test_calloc((size_t)B * T, T);
        for (int b = 0; b < B; b++) fill_mask(masks[wide] + (size_t)b * T * T, c, model.host.inputs + b * T, window);
        oracle.mask[wide] = masks[wide];
    }
    double loss = oracle_model_forward_backward(&oracle, model.host.inputs, model.host.targets, B, T);

    char title[64];
    snprintf(title, sizeof title, "%s %dx%d, %d heads of %d", recipe, B, T, c->H, c->C / c->H);
    model_at(&model, c->step);
    micro_step(&model, &model.host, 0);
    // normuon's loss is a row's sum, and the mean over rows
    check_gradients(title, &model, &oracle, loss, oracle.loss_sum ? 1.0 / B : 1);
    for (int wide = 0; wide < 2; wide++) free(masks[wide]);
    oracle_model_free(&oracle);
    model_end(&model);
}

// ---- properties of a step ------------------------------------------------------------------

typedef struct Snapshot { float* x; size_t n; double loss; } Snapshot;

static const char* const SMALL[] = {"--layers", "2", "--heads", "2", "--channels", "64", "--vocab", "320", "--seq-len", "24",
                                    "--batch-tokens", "192", "--steps", "40", NULL};

// Parameters after `steps` steps from the recipe's own start, on batches that do not depend on the micro-batch.
static Snapshot run_steps(const char* recipe, int micro_batch, int steps, bool gradients) {
    char text[16];
    snprintf(text, sizeof text, "%d", micro_batch);
    const char* flags[32];
    int n = 0;
    for (; SMALL[n]; n++) flags[n] = SMALL[n];
    flags[n++] = "--micro-batch", flags[n++] = text, flags[n] = NULL;
    model_build(&model, make_settings(recipe, flags), 0, 1);
    model_start(&model, NULL);
    randomize(&model, 3);
    Snapshot s = {NULL, 0, 0};
    int rows = (int)(model.cfg->batch_tokens / model.T), N = model.B * model.T;
    for (int step = 0; step < steps; step++) {
        model_at(&model, step);
        int* tokens = (int*)host_alloc((size_t)rows * model.T + 1, sizeof(int));
        test_fill_tokens(tokens, (size_t)rows * model.T + 1, 77 + step, 257);
        for (int micro = 0; micro < model.micro_steps; micro++) {
            batch_wait(&model);
            memcpy(model.host.inputs, tokens + micro * N, N * sizeof(int));
            memcpy(model.host.targets, tokens + micro * N + 1, N * sizeof(int));
            micro_step(&model, &model.host, micro);
        }
        s.loss = step_result(&model, step_measure(&model, &model.slots[0])).loss;
        if (!gradients) update(&model);
        free(tokens);
    }
    if (!gradients) params_collect(&model.params);       // g holds the gradients, or now the values
    for (int b = 0; b < BANKS; b++) s.n += model.params.banks[b].n;
    s.x = test_floats(s.n);
    size_t at = 0;
    for (int b = 0; b < BANKS; b++) {
        Bank* bank = &model.params.banks[b];
        if (bank->n == 0) continue;
        CUDA_CHECK(cudaMemcpy(s.x + at, bank->g, bank->n * sizeof(float), cudaMemcpyDeviceToHost));
        at += bank->n;
    }
    model_end(&model);
    return s;
}

static double snapshot_distance(const Snapshot* a, const Snapshot* b) {
    double error = 0, scale = 0;
    for (size_t i = 0; i < a->n; i++) {
        error += (double)(a->x[i] - b->x[i]) * (a->x[i] - b->x[i]);
        scale += (double)b->x[i] * b->x[i];
    }
    return sqrt(error / scale);
}

static void test_accumulation(const char* recipe) {
    char name[64];
    Snapshot whole = run_steps(recipe, 8, 1, true);
    for (int micro_batch = 4; micro_batch >= 1; micro_batch /= 2) {
        Snapshot part = run_steps(recipe, micro_batch, 1, true);
        // Only the order of fp32 sums differs: over 8 sequences, about 2^-24 sqrt(192). In bf16 nothing else is
        // rounded differently either, but the loss weights of a row are equal, so the same bound holds.
        snprintf(name, sizeof name, "%s micro-batch %d against 8: gradients", recipe, micro_batch);
        test_check(name, snapshot_distance(&part, &whole), 2e-6);
        snprintf(name, sizeof name, "%s micro-batch %d against 8: loss", recipe, micro_batch);
        test_check(name, fabs(part.loss - whole.loss), 1e-6);
        free(part.x);
    }
    free(whole.x);
}

static void test_repeat(const char* recipe) {
    char name[64];
    Snapshot a = run_steps(recipe, 4, 3, false), b = run_steps(recipe, 4, 3, false);
    snprintf(name, sizeof name, "%s: three steps twice", recipe);
    test_same_bits(name, a.x, b.x, a.n * sizeof(float));
    free(b.x);
#ifndef __CUDACC__
    for (int threads = 1; threads <= 2; threads++) {
        host_set_threads(threads);
        b = run_steps(recipe, 4, 3, false);
        snprintf(name, sizeof name, "%s: three steps on %d threads", recipe, threads);
        test_same_bits(name, a.x, b.x, a.n * sizeof(float));
        free(b.x);
    }
#endif
    free(a.x);
}

static void test_overfit(const char* recipe, const char* optimizer) {
    const char* flags[] = {"--layers", "2", "--heads", "2", "--channels", "64", "--vocab", "320", "--seq-len", "32", "--micro-batch",
                           "2", "--batch-tokens", "64", "--steps", "60", "--optimizer", optimizer, "--adamw-lr", "0.003", NULL};
    model_build(&model, make_settings(recipe, flags), 0, 1);
    model_start(&model, NULL);
    double loss = INFINITY;
    for (int step = 0; step < 60; step++) {
        model_at(&model, step);
        fill_batch(&model, 64, 257, 9);
        micro_step(&model, &model.host, 0);
        loss = step_result(&model, step_measure(&model, &model.slots[0])).loss;
        update(&model);
    }
    char name[64];
    snprintf(name, sizeof name, "%s, %s: loss on one batch after 60 steps", recipe, optimizer);
    test_check(name, loss, 0.5);                   // it starts at ln 320 = 5.77 or above
    model_end(&model);
}

// ---- files, evaluation, divergence ---------------------------------------------------------

static void test_file(const char* recipe) {
    const char* flags[] = {"--layers", "2", "--heads", "2", "--channels", "64", "--vocab", "320", "--seq-len", "16",
                           "--micro-batch", "2", "--batch-tokens", "32", NULL};
    char path[] = "/tmp/test_model_XXXXXX", name[128];
    int fd = mkstemp(path);
    REQUIRE(fd >= 0, "cannot make a file in /tmp: %s", strerror(errno));
    close(fd);
    model_build(&model, make_settings(recipe, flags), 0, 1);
    model_start(&model, NULL);
    randomize(&model, 21);
    weights_save(&model, path, 7, &codec);
    Snapshot before = {NULL, 0, 0};
    float* q = test_floats(64 * 256);
    tensor_read(&model.params, q, model.place[MLP_PROJ][1]);
    SafeFile file;
    safetensors_open(&file, path);
    const float* stored = (const float*)safetensors_data(&file, "h.1.mlp.c_proj.weight", SAFE_F32, 64 * 256);
    snprintf(name, sizeof name, "%s: the stored tensor is the parameter", recipe);
    test_same_bits(name, stored, q, 64 * 256 * sizeof(float));
    const SafeTensor* t = safetensors_find(&file, "h.1.mlp.c_proj.weight");
    test_true("stored as (out, in)", t->dims == 2 && t->shape[0] == 64 && t->shape[1] == 256);
    test_true("metadata has the step", !strcmp(safetensors_metadata(&file, "step"), "7"));
    test_true("metadata has the flags", strstr(safetensors_metadata(&file, "flags"), "\"channels\":64") != NULL);
    safetensors_close(&file);
    for (int id = 0; id < PARAMS; id++) {
        for (int layer = 0; layer < MAX_LAYERS; layer++) {
            if (model.place[id][layer] < 0) continue;
            const Bank* bank = &model.params.banks[PARAM_TABLE[id].bank];
            before.n += (size_t)bank->rows * bank->cols;
        }
    }
    before.x = test_floats(before.n);
    float* after = test_floats(before.n);
    for (int pass = 0; pass < 2; pass++) {
        if (pass == 1) {
            randomize(&model, 99);
            params_load(&model.params, path);
        }
        size_t at = 0;
        params_collect(&model.params);
        for (int id = 0; id < PARAMS; id++) {
            for (int layer = 0; layer < MAX_LAYERS; layer++) {
                if (model.place[id][layer] < 0) continue;
                const Bank* bank = &model.params.banks[PARAM_TABLE[id].bank];
                tensor_read(&model.params, (pass ? after : before.x) + at, model.place[id][layer]);
                at += (size_t)bank->rows * bank->cols;
            }
        }
    }
    snprintf(name, sizeof name, "%s: saved and loaded", recipe);
    test_same_bits(name, before.x, after, before.n * sizeof(float));
    free(q), free(before.x), free(after);
    unlink(path);
    model_end(&model);
}

static void write_shard(const char* path, int tokens, uint64_t seed) {
    FILE* f = fopen(path, "wb");
    int32_t header[256] = {20240520, 1, tokens};
    fwrite(header, sizeof header, 1, f);
    for (int i = 0; i < tokens; i++) {
        uint16_t token = (uint16_t)(test_random(seed, i) % 257);
        fwrite(&token, sizeof token, 1, f);
    }
    fclose(f);
}

static void test_evaluation(void) {
    char path[64];
    snprintf(path, sizeof path, "/tmp/test_model_%d_val.bin", (int)getpid());
    write_shard(path, 1000, 4);
    double loss[3];
    const char* micro[] = {"1", "3", "8"};
    for (int i = 0; i < 3; i++) {
        const char* flags[] = {"--layers", "2", "--heads", "2", "--channels", "64", "--vocab", "320", "--seq-len", "24",
                               "--micro-batch", micro[i], "--batch-tokens", "576", NULL};
        model_build(&model, make_settings("modern", flags), 0, 1);
        model_start(&model, NULL);
        randomize(&model, 3);
        ValLoader val;
        val_open(&val, path, 777, model.B, model.T, 0, 1, model.V);      // 777 is no multiple of 24
        test_true("as many predictions as asked for", val.predictions == 777);
        loss[i] = evaluate(&model, &val);
        val_close(&val);
        model_end(&model);
    }
    test_check("micro-batch 3 against 1", fabs(loss[1] - loss[0]), 1e-6);
    test_check("micro-batch 8 against 1", fabs(loss[2] - loss[0]), 1e-6);
    unlink(path);
}

// ---- steps that are not finite, state that is saved -----------------------------------------

static const char* const STATE[] = {"--layers", "4", "--heads", "2", "--channels", "64", "--vocab", "96", "--seq-len", "32",
                                    "--micro-batch", "1", "--batch-tokens", "64", "--end-of-text", "7", NULL};
static const char* const STATE_12[] = {"--layers", "12", "--heads", "2", "--channels", "64", "--vocab", "96", "--table-rows", "96",
                                       "--seq-len", "32", "--micro-batch", "1", "--batch-tokens", "64", "--val-seq-len", "32",
                                       "--val-batch", "1", "--window-block", "16", "--end-of-text", "7", NULL};
static const struct { const char* recipe; const char* const* flags; const char* more[4]; } STATE_CASES[] = {
    {"modern", STATE, {}}, {"untied", STATE, {}}, {"unet", STATE, {}}, {"modern", STATE, {"--optimizer", "adamw"}},
    {"sub3", STATE_12, {}}, {"normuon", STATE_12, {}}, {"normuon", STATE_12, {"--on-nonfinite", "skip"}},
};
enum { STATE_CASE_COUNT = sizeof STATE_CASES / sizeof STATE_CASES[0] };

static void state_model(int k, const char* seed) {
    const char* flags[64] = {"--seed", seed};
    int n = 2;
    for (int i = 0; STATE_CASES[k].flags[i]; i++) flags[n++] = STATE_CASES[k].flags[i];
    for (int i = 0; STATE_CASES[k].more[i]; i++) flags[n++] = STATE_CASES[k].more[i];
    model_build(&model, make_settings(STATE_CASES[k].recipe, flags), 0, 1);
    model_start(&model, NULL);
}

typedef struct Bits { unsigned char* x; size_t n; } Bits;

static void bits_add(Bits* bits, const void* device, size_t n) {
    if (!device || n == 0) return;
    bits->x = (unsigned char*)realloc(bits->x, bits->n + n);
    CUDA_CHECK(cudaMemcpy(bits->x + bits->n, device, n, cudaMemcpyDeviceToHost));
    bits->n += n;
}

// What a step may change, and what has to be there for the next one.
static Bits keep_state(Model* m) {
    Bits bits = {NULL, 0};
    CUDA_CHECK(cudaStreamSynchronize(m->stream));
    for (int b = 0; b < BANKS; b++) {
        const Bank* bank = &m->params.banks[b];
        if (bank->n == 0) continue;
        size_t state = bank->owned * sizeof(float);
        bits_add(&bits, bank->p, bank->n * sizeof(floatX));
        bits_add(&bits, bank->master, bank->master ? state : 0);
        bits_add(&bits, bank->m, state);
        bits_add(&bits, bank->v, bank->adam ? state : bank_second_bytes(bank));
        if (bank->adam && m->pending) bits_add(&bits, bank->g, bank->n * sizeof(float));
    }
    return bits;
}

static void same_state(const char* name, Bits a, Bits b) {
    test_true(name, a.n == b.n && a.n > 0);
    test_same_bits(name, a.x, b.x, a.n < b.n ? a.n : b.n);
    free(a.x);
    free(b.x);
}

// Step `step` of a run; `broken`: one element of a gradient, of what Muon or Adam updates in it, is infinite.
static bool state_step(Model* m, int64_t step, int broken) {
    model_at(m, step);
    for (int micro = 0; micro < m->micro_steps; micro++) {
        fill_batch(m, m->B * m->T, m->V, 100 + 10 * step + micro);
        batch_segments(&m->host, m->B, m->T, (int)m->cfg->end_of_text);
        micro_step(m, &m->host, micro);
    }
    int bank = broken == 2 ? BANK_EMBED : BANK_ATTN;
    float infinite = INFINITY;
    if (broken)
        CUDA_CHECK(cudaMemcpy(m->params.banks[bank].g + 70, &infinite, sizeof infinite, cudaMemcpyHostToDevice));
    bool finite = step_result(m, step_measure(m, &m->slots[step % 2])).finite;
    update(m);
    m->pending = (step + 1) % m->cfg->adam_every != 0;
    return finite;
}

static void test_guard(int k) {
    char name[128];
    state_model(k, "1");
    bool skip = model.cfg->on_nonfinite == FLAG_NONFINITE_SKIP, waits = model.cfg->adam_every > 1;
    for (int step = 0; step < 4; step++) test_true("a finite step", state_step(&model, step, 0));
    for (int broken = 1; broken <= 2; broken++) {
        int64_t step = 4 + waits;       // Adam's turn
        snprintf(name, sizeof name, "%s: an infinite gradient of %s", STATE_CASES[k].recipe, broken == 2 ? "Adam's" : "Muon's");
        if (waits && skip) {            // one of Muon's while Adam waits takes Adam's along
            test_true(name, !state_step(&model, 4, 1));
            Bits g = {NULL, 0};
            bits_add(&g, bank(&model, BANK_EMBED)->g, bank(&model, BANK_EMBED)->n * sizeof(float));
            bool clear = true;
            for (size_t i = 0; i < g.n / sizeof(float); i++) clear = clear && ((float*)g.x)[i] == 0;
            test_true("what waits for Adam is cleared", clear);
            free(g.x);
        } else if (waits) {
            state_step(&model, 4, 0);
        }
        model.pending = false;          // g of Adam's banks is no state once it has been used
        Bits before = keep_state(&model);
        test_true(name, !state_step(&model, step, broken));
        model.pending = false;
        same_state(name, before, keep_state(&model));
        before = keep_state(&model);
        bool finite = state_step(&model, 6, 0);
        model.pending = false;
        Bits after = keep_state(&model);
        bool moved = after.n != before.n || memcmp(after.x, before.x, after.n) != 0;
        test_true("the step behind it is finite", finite);
        test_true("and is taken if steps are skipped, else not", moved == skip);
        free(before.x), free(after.x);
    }
    model_end(&model);
}

static void test_not_finite(void) {
    const char* flags[] = {"--layers", "2", "--heads", "2", "--channels", "64", "--vocab", "320", "--seq-len", "16",
                           "--micro-batch", "2", "--batch-tokens", "32", NULL};
    model_build(&model, make_settings("unet", flags), 0, 1);
    model_start(&model, NULL);
    randomize(&model, 3);
    fill_batch(&model, 32, 257, 1);
    micro_step(&model, &model.host, 0);
    StepStats stats = step_result(&model, step_measure(&model, &model.slots[0]));
    test_true("finite weights, finite step", stats.finite);
    float* w = test_floats(64 * 64);
    params_collect(&model.params);
    tensor_read(&model.params, w, model.place[ATTN_K][1]);
    w[17] = NAN;
    tensor_write(&model.params, w, model.place[ATTN_K][1]);
    fill_batch(&model, 32, 257, 1);
    micro_step(&model, &model.host, 0);
    stats = step_result(&model, step_measure(&model, &model.slots[0]));
    test_true("one NaN weight is noticed", !stats.finite);
    test_true("and counted once", model.slots[0].stats[STAT_NORMS + 3] == 1);
    int named = 0;
    for (int i = 0; i < model.weight_segments; i++)
        if (model.slots[0].norms[2 * i + 1] != 0) named += model.segment_tensor[i] == model.place[ATTN_K][1] ? 1 : 100;
    test_true("in the tensor where it is", named == 1);
    free(w);
    model_end(&model);
    for (int k = 0; k < STATE_CASE_COUNT; k++) test_guard(k);
}

// `steps` steps, a checkpoint, and a model of other values that reads it: the same bits, and so after two more steps.
static void test_saved_state(int k, int steps) {
    char folder[] = "/tmp/test_model_XXXXXX", path[256], problem[512], name[128];
    REQUIRE(mkdtemp(folder), "cannot make a folder in /tmp: %s", strerror(errno));
    snprintf(name, sizeof name, "%s %s: saved after %d steps", STATE_CASES[k].recipe,
             STATE_CASES[k].more[1] ? STATE_CASES[k].more[1] : "", steps);
    static Saver saver;
    static Checkpoint from;
    State state;
    CheckpointInfo info = {};
    info.step = steps, info.ranks = 1, info.flags = "{}", info.recipe = info.shards = "";
    state_model(k, "1");
    for (int step = 0; step < steps; step++) state_step(&model, step, 0);
    model_at(&model, steps);
    state_init(&state, &model.params, model.cfg->adam_every > 1);
    saver_open(&saver, folder, 0, 1, 2, 0);
    saver_begin(&saver, &info, state.parts, state_copy(&state, &model.params, model.pending));
    Bits before = keep_state(&model);
    saver_wait(&saver);
    test_true(name, saver_status(&saver) == SAVER_WRITTEN);
    saver_commit(&saver);
    saver_wait(&saver);
    test_true(name, saver_status(&saver) == SAVER_IDLE);
    saver_close(&saver);
    state_free(&state);
    for (int step = steps; step < steps + 2; step++) state_step(&model, step, 0);
    Bits after = keep_state(&model);
    model_end(&model);

    state_model(k, "2");
    for (int step = 0; step < 2; step++) state_step(&model, step, 0);
    model_at(&model, steps);
    checkpoint_path(path, sizeof path, folder, steps);
    bool opened = checkpoint_open(&from, path, problem, sizeof problem);
    test_true(opened ? name : problem, opened);
    state_load(&model.params, &from, model.pending);
    checkpoint_close(&from);
    same_state(name, before, keep_state(&model));
    for (int step = steps; step < steps + 2; step++) state_step(&model, step, 0);
    snprintf(name, sizeof name, "%s: gone on with after %d steps", STATE_CASES[k].recipe, steps);
    same_state(name, after, keep_state(&model));
    model_end(&model);
    char command[300];
    snprintf(command, sizeof command, "rm -r %s", folder);
    test_true("the folder is taken away", system(command) == 0);
}

// The start: the distributions that the recipes ask for, and zero where they ask for zero.
static void test_start(void) {
    const char* flags[] = {"--layers", "2", "--heads", "2", "--channels", "128", "--vocab", "512", "--seq-len", "16",
                           "--micro-batch", "2", "--batch-tokens", "32", NULL};
    const char* recipes[] = {"modern", "unet"};
    for (int r = 0; r < 2; r++) {
        model_build(&model, make_settings(recipes[r], flags), 0, 1);
        model_start(&model, NULL);
        float* x = test_floats(512 * 128);
        double sum = 0, squares = 0, bound = 1 / sqrt(128.0), largest = 0;
        params_collect(&model.params);
        tensor_read(&model.params, x, model.place[ATTN_Q][1]);
        for (int i = 0; i < 128 * 128; i++) {
            sum += x[i], squares += (double)x[i] * x[i];
            if (fabs(x[i]) > largest) largest = fabs(x[i]);
        }
        // 16384 draws: the mean's own spread is bound / sqrt(3 * 16384), five of them allowed
        test_check("uniform: mean", fabs(sum / 16384), 5 * bound / sqrt(3 * 16384.0));
        test_check("uniform: variance", fabs(squares / 16384 / (bound * bound / 3) - 1), 5 * sqrt(0.8 / 16384));
        test_true("uniform: bound", largest <= bound && largest > 0.99 * bound);
        tensor_read(&model.params, x, model.place[MLP_PROJ][0]);
        double zero = 0;
        for (int i = 0; i < 128 * 512; i++) zero += fabs(x[i]);
        test_true("down projection starts at zero", zero == 0);
        tensor_read(&model.params, x, model.place[WTE][0]);
        squares = 0;
        for (int i = 0; i < 512 * 128; i++) squares += (double)x[i] * x[i];
        double want = r == 0 ? bound * bound / 3 : 1;
        test_check("table: variance", fabs(squares / 65536 / want - 1), 5 * sqrt(2.0 / 65536));
        bool representable = true;
        for (int i = 0; i < 512 * 128; i++) representable &= (double)x[i] == oracle_round_bf16(x[i]);
        test_true("table in bf16 where the recipe says so", representable == (r == 1));
        free(x);
        model_end(&model);
    }
}

static const char* const CACHE[] = {"--layers", "4", "--heads", "2", "--channels", "64", "--vocab", "96", "--seq-len", "100",
                                    "--micro-batch", "1", "--batch-tokens", "100", "--end-of-text", "7", NULL};
static const char* const CACHE_12[] = {"--layers", "12", "--heads", "2", "--channels", "64", "--vocab", "96", "--table-rows", "96",
                                       "--seq-len", "100", "--micro-batch", "1", "--batch-tokens", "100", "--val-seq-len", "100",
                                       "--val-batch", "1", "--window-block", "16", "--end-of-text", "7", NULL};


// ---- the cache of generation -----------------------------------------------------------------

// Rows one by one, with keys and values from the calls before, against all at once. More than a tile
// of attention holds, and a document that ends within. The products sum in another order where they
// have other sizes: 2^-24 sqrt(512) and some ten of them in a row; bf16 as for gradients.
static void test_cache(const char* recipe, const char* const* flags) {
    model_build(&model, make_settings(recipe, flags), 0, 1);
    model_start(&model, NULL);
    randomize(&model, 31);
    model_at(&model, 0);
    int T = model.T, C = model.C, end = (int)model.cfg->end_of_text;
    float* rows = test_floats((size_t)T * C);
    for (int n = 5; n <= T + 1; n++) {      // the last time: all at once
        int count = n <= T ? n : T, from = n == 5 || n > T ? 0 : n - 1;
        fill_batch(&model, T, model.V, 3);
        model.host.inputs[0] = model.host.inputs[T / 3] = end;
        batch_segments(&model.host, 1, count, end);
        batch_upload(&model, &model.host, count);
        forward(&model, &model.acts, 1, count, from);
        if (n > T) break;
        float* got = test_download(model.acts.lnf[0] + (size_t)from * C, (size_t)(count - from) * C);
        memcpy(rows + (size_t)from * C, got, (size_t)(count - from) * C * sizeof(float));
        free(got);
    }
    float* want = test_download(model.acts.lnf[0], (size_t)T * C);
    double worst = 0, sum = 0;
    for (int i = 0; i < T * C; i++) {
        double e = fabs(rows[i] - want[i]);
        if (!(e <= worst)) worst = e;
        sum += want[i] * want[i];
    }
    char name[128];
    snprintf(name, sizeof name, "%s, %d tokens one by one", recipe, T);
    test_check(name, worst, FLOATX_IS_BF16 ? 0.25 : 1e-4);
    test_true("rows of rms 1", fabs(sum / T / C - 1) < 0.1);
    free(rows);
    free(want);
    model_end(&model);
}

int main(int argc, char** argv) {
    program_name = "test_model";
    test_init(argc, argv);
    if (test_group("init")) test_start();
    if (test_group("gradients tiny")) {
        test_gradients("modern", ORACLE_MODERN, TINY);
        test_gradients("untied", ORACLE_UNTIED, TINY);
        test_gradients("unet", ORACLE_UNET, TINY);
    }
    if (test_group("gradients wide")) {
        test_gradients("modern", ORACLE_MODERN, WIDE);
        test_gradients("untied", ORACLE_UNTIED, WIDE);
        test_gradients("unet", ORACLE_UNET, WIDE);
    }
    if (test_group("gradients odd")) {
        test_gradients("modern", ORACLE_MODERN, ODD);
        test_gradients("unet", ORACLE_UNET, ODD);
    }
    for (int late = 0; late < 2; late++) {
        if (!test_group(late ? "gradients normuon" : "gradients sub3")) continue;
        for (int i = 0; i < 6; i++) {
            const LateCase* c = &LATE_CASES[i];
            if (c->oracle_recipe == (late ? ORACLE_NORMUON : ORACLE_SUB3)) test_late_gradients(c);
        }
    }
    if (test_group("accumulation")) {
        test_accumulation("modern");
        test_accumulation("unet");
    }
    if (test_group("repeat")) {
        test_repeat("modern");
        test_repeat("unet");
    }
    if (test_group("overfit")) {
        test_overfit("modern", "muon");
        test_overfit("untied", "muon");
        test_overfit("unet", "muon");
        test_overfit("modern", "adamw");
    }
    if (test_group("file")) {
        test_file("modern");
        test_file("unet");
    }
    if (test_group("evaluation")) test_evaluation();
    if (test_group("cache")) {
        test_cache("modern", CACHE), test_cache("untied", CACHE), test_cache("unet", CACHE);
        test_cache("sub3", CACHE_12), test_cache("normuon", CACHE_12);
    }
    if (test_group("not finite")) test_not_finite();
    for (int k = 0; test_group("state") && k < STATE_CASE_COUNT; k++) test_saved_state(k, 3), test_saved_state(k, 4);
    return test_summary();
}
