/*
The trainer against the real recipes: every activation, gradient, loss and parameter of golden case
directories (format and tolerances: golden.h), computed by the trainer's own functions.

    test_golden [--precision fp32|bf16] DIRECTORY...
    mpirun -np 2 test_golden ...        each rank takes its part of the batch; the parts are put together

--precision only states which build is meant; another one is an error. One line per quantity:
`ok` or `FAIL`, name, measure, found, allowed. Tensors for which there is no rule are listed as not
compared and counted as skipped. The exit status is 1 if anything fails.

Recipe and sizes come from the case. The recipe's file in scripts/recipes supplies what the case
does not state: the options of the model, the forms of Muon, the schedule of its momentum.
What the fused kernels never write to memory (queries before the rotation, their norm without it)
is rebuilt from what they do write, so it is still their arithmetic that is judged.
*/
#define TRAIN_GPT2_NO_MAIN
// The trainer's main is the only caller of some of its functions.
#pragma GCC diagnostic ignored "-Wunused-function"
#include "train_gpt2.cu"
#include "test.h"
#include "golden.h"

static Ranks ranks;
static GoldenResults* probed;     // where the probe puts what it sees; step 0 only
static const Model* probed_model;

// ---- seeing ----------------------------------------------------------------------------------

// Room for n elements of this rank's rows, among those of all ranks.
static double* result_rows(GoldenResults* r, const char* name, size_t n) {
    return golden_result(r, name, n * ranks.world) + n * ranks.rank;
}

static double* result_of_layer(GoldenResults* r, const char* format, int layer, size_t n) {
    char name[64];
    snprintf(name, sizeof name, format, layer);
    return result_rows(r, name, n);
}

// Rank 0 gets what all have seen: what a rank has not is zero, and what is the same on all ranks is
// rank 0's.
static void results_unite(GoldenResults* r) {
    for (int i = 0; i < r->count && ranks.world > 1; i++) {
        GoldenResult* result = &r->results[i];
        double* all = test_doubles(result->count * ranks.world);
        ranks_gather(&ranks, all, result->x, result->count * sizeof(double));
        for (size_t k = 0; k < result->count * (ranks.world - 1) && ranks.rank == 0; k++)
            result->x[k % result->count] += all[result->count + k];
        free(all);
    }
    if (ranks.rank != 0) golden_results_free(r);      // it has nothing whole to compare
}

// A (rows, cols) tensor with row stride ld, after all work queued before.
static void read_rows(double* out, const floatX* tensor, int rows, int cols, int ld) {
    size_t n = (size_t)(rows - 1) * ld + cols;
    floatX* copy = (floatX*)host_alloc(n, sizeof(floatX));
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaMemcpy(copy, tensor, n * sizeof(floatX), cudaMemcpyDeviceToHost));
    for (int r = 0; r < rows; r++) {
        const floatX* row = copy + (size_t)r * ld;
        for (int c = 0; c < cols; c++) out[(size_t)r * cols + c] = test_from_floatX(&row[c]);
    }
    free(copy);
}

static void read_floats(double* out, const float* device, size_t n) {
    float* copy = test_floats(n);
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaMemcpy(copy, device, n * sizeof(float), cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < n; i++) out[i] = copy[i];
    free(copy);
}

// The trainer's names for what it passes by, and the golden ones.
static void probe_keep(const char* name, int layer, const floatX* tensor, int rows, int cols, int ld) {
    static const struct { const char *probe, *golden; } NAMES[] = {
        {"in", "act.h%d.in"}, {"mix", "act.h%d.mix"}, {"v_mix", "act.h%d.v_mix"},
        {"attn_out", "act.h%d.attn_out"}, {"after_attn", "act.h%d.after_attn"}, {"fc", "act.h%d.fc"},
        {"mlp_out", "act.h%d.mlp_out"}, {"out", "act.h%d.out"}, {"dout", "dact.h%d.out"},
        {"dv", "dact.h%d.v_lin"},
    };
    const Model* m = probed_model;
    bool modern = m->cfg->head == FLAG_HEAD_TIED;
    size_t n = (size_t)rows * cols, N = (size_t)m->B * m->T;
    if (!strcmp(name, "logits") || !strcmp(name, "dlogits")) {       // layer is the first row of these
        double* all = result_rows(probed, name[0] == 'l' ? "logits0" : "dact.logits_raw", N * cols);
        read_rows(all + (size_t)layer * cols, tensor, rows, cols, ld);
        return;
    }
    if (!strcmp(name, "qkv")) {
        static const char* const PARTS[] = {"act.h%d.q_lin", "act.h%d.k_lin", "act.h%d.v_lin"};
        int C = cols / 3;
        for (int i = 0; i < 3; i++) {
            read_rows(result_of_layer(probed, PARTS[i], layer, n / 3), tensor + i * C, rows, C, ld);
        }
        return;
    }
    if (!strcmp(name, "x0")) {
        read_rows(result_rows(probed, modern ? "act.emb" : "act.x0", n), tensor, rows, cols, ld);
        return;
    }
    if (!strcmp(name, "demb")) {
        read_rows(result_rows(probed, modern ? "dact.emb" : "dact.embed_raw", n), tensor, rows, cols, ld);
        return;
    }
    for (size_t i = 0; i < sizeof NAMES / sizeof NAMES[0]; i++) {
        if (strcmp(name, NAMES[i].probe)) continue;
        read_rows(result_of_layer(probed, NAMES[i].golden, layer, n), tensor, rows, cols, ld);
    }
}

// q or k of a layer: what attention read, and the value between norm and rotation.
//   norm first:   q_norm = q_lin rstd, q_rot is what attention read
//   rotate first: q_norm is what attention read, q_rot = q_norm / rstd
static void keep_qk(const Model* m, GoldenResults* r, int layer, bool key) {
    int N = m->B * m->T, C = m->C, H = m->H, D = m->D;
    size_t n = (size_t)N * C;
    bool norm_first = m->cfg->qk_order == FLAG_QK_NORM_FIRST;
    double* rstd = test_doubles((size_t)N * 2 * H);
    read_floats(rstd, m->acts.qk_rstd[layer], (size_t)N * 2 * H);
    double* lin = result_of_layer(r, key ? "act.h%d.k_lin" : "act.h%d.q_lin", layer, n);
    double* norm = result_of_layer(r, key ? "act.h%d.k_norm" : "act.h%d.q_norm", layer, n);
    double* rot = result_of_layer(r, key ? "act.h%d.k_rot" : "act.h%d.q_rot", layer, n);
    read_rows(norm_first ? rot : norm, m->acts.qkv[layer] + (key ? C : 0), N, C, 3 * C);
    for (size_t i = 0; i < n; i++) {
        double factor = rstd[i / C * 2 * H + (key ? H : 0) + i % C / D];
        if (norm_first) norm[i] = lin[i] * factor;
        else rot[i] = norm[i] / factor;
    }
    free(rstd);
}

// What lies in the trainer's buffers after forward and backward of step 0.
static void keep_saved(const Model* m, GoldenResults* r) {
    const Acts* a = &m->acts;
    int N = m->B * m->T, C = m->C, F = m->F;
    size_t n = (size_t)N * C, half = (size_t)m->T * m->D / 2;
    for (int l = 0; l < m->L; l++) {
        read_rows(result_of_layer(r, "act.h%d.attn_in", l, n), a->ln1[l], N, C, C);
        read_rows(result_of_layer(r, "act.h%d.attn_y", l, n), a->att[l], N, C, C);
        read_rows(result_of_layer(r, "act.h%d.mlp_in", l, n), a->ln2[l], N, C, C);
        read_rows(result_of_layer(r, "act.h%d.relu2", l, 4 * n), a->relu[l], N, F, F);
        keep_qk(m, r, l, false);
        keep_qk(m, r, l, true);
    }
    read_rows(result_rows(r, "act.final_norm", n), a->lnf[0], N, C, C);
    double *cosines = golden_result(r, "cos", half), *sines = golden_result(r, "sin", half);
    if (ranks.rank == 0) read_floats(cosines, a->cos[0], half);
    if (ranks.rank == 0) read_floats(sines, a->sin[0], half);
    // layer 0 is the last that backward visits, so its values' gradient is still there
    read_rows(result_rows(r, "dact.h0.v_lin", n), a->dqkv[0] + 2 * C, N, C, 3 * C);
}

// grad.<tensor> (steps 0) or p<steps>.<tensor>
static void keep_parameters(Model* m, GoldenResults* r, int steps) {
    if (steps > 0) weights_collect(m);
    for (int b = 0; b < BANKS && steps == 0; b++) {      // each gradient is with its owner alone
        Bank* bank = &m->banks[b];
        for (int k = 0; k < bank->zero.bucket_count && bank->n; k++) {
            zero_gather(&m->zero, &bank->zero, k, bank->g, true, m->stream);
            zero_wait_gathered(&m->zero, &bank->zero, bank->zero.buckets[k].first, m->stream);
        }
    }
    CUDA_CHECK(cudaStreamSynchronize(m->stream));
    for (int id = 0; id < PARAMS; id++) {
        const Bank* bank = &m->banks[PARAM_TABLE[id].bank];
        size_t n = (size_t)bank->rows * bank->cols;
        for (int layer = 0; layer < param_copies(m, (ParamId)id); layer++) {
            char tensor[56], name[64];
            float* value = test_floats(n);
            param_name(tensor, sizeof tensor, (ParamId)id, layer);
            if (steps == 0) {
                snprintf(name, sizeof name, "grad.%s", tensor);
                tensor_read(m, value, grad(m, (ParamId)id, layer), (ParamId)id);
            } else {
                snprintf(name, sizeof name, "p%d.%s", steps, tensor);
                param_read(m, value, (ParamId)id, layer);
            }
            double* kept = golden_result(r, name, n);
            for (size_t i = 0; i < n && ranks.rank == 0; i++) kept[i] = value[i];
            free(value);
        }
    }
}

// ---- running ---------------------------------------------------------------------------------

// The recipe's settings at the sizes and with the numerics of the case.
static void settings_of(Settings* cfg, const GoldenCase* c, const GoldenVariant* v) {
    static const char* RECIPES[] = {"modern", "untied", "unet"};
    static char program[] = "test_golden", flag[] = "--recipe", name[16];
    snprintf(name, sizeof name, "%s", RECIPES[c->recipe]);
    char* argv[] = {program, flag, name, NULL};
    settings_parse(cfg, 3, argv);
    cfg->layers = c->L, cfg->heads = c->H, cfg->channels = c->C, cfg->vocab = c->V;
    REQUIRE(c->B % ranks.world == 0, "a batch of %d sequences on %d ranks", c->B, ranks.world);
    cfg->seq_len = c->T, cfg->micro_batch = c->B / ranks.world;
    cfg->batch_tokens = (int64_t)c->B * c->T;
    cfg->norm_eps = cfg->qk_norm_eps = 0x1p-23;
    if (v->asis) cfg->qk_norm_eps = 0x1p-7;                         // of bf16 queries, both records
    if (v->asis && c->recipe == GOLDEN_UNET) cfg->norm_eps = 0x1p-7; // its stream is bf16, too
    cfg->rotary_round_bf16 = v->rope_bf16;
    cfg->bf16_tables = v->embbf16 || (v->asis && c->recipe == GOLDEN_UNET);
    cfg->embed_lr = c->lr_wte, cfg->muon_lr = c->lr_muon;
    if (c->recipe != GOLDEN_MODERN) cfg->head_lr = c->lr_head;
    if (c->recipe == GOLDEN_UNET) cfg->scalar_lr = c->lr_scalar;
    cfg->adam_beta1 = c->adam_beta1, cfg->adam_beta2 = c->adam_beta2, cfg->adam_eps = c->adam_eps;
    cfg->dry_run = 1;                                               // no data files are wanted
    settings_check(cfg, ranks.world);
    cfg->dry_run = 0;
}

static void start_parameters(Model* m, const GoldenCase* c, const GoldenVariant* v) {
    for (int id = 0; id < PARAMS; id++) {
        const Bank* bank = &m->banks[PARAM_TABLE[id].bank];
        size_t n = (size_t)bank->rows * bank->cols;
        for (int layer = 0; layer < param_copies(m, (ParamId)id); layer++) {
            char tensor[56];
            param_name(tensor, sizeof tensor, (ParamId)id, layer);
            double* start = golden_start(c, v, tensor);
            float* value = test_floats(n);
            for (size_t i = 0; i < n; i++) value[i] = (float)start[i];
            param_write(m, value, (ParamId)id, layer);
            free(start);
            free(value);
        }
    }
}

static void load_batch(Model* m, const GoldenCase* c, int i) {
    size_t n = (size_t)m->B * m->T, first = n * ranks.rank;
    batch_wait(m);
    memcpy(m->tokens_host, golden_batch(c, "tokens", i) + first, n * sizeof(int));
    memcpy(m->targets_host, golden_batch(c, "targets", i) + first, n * sizeof(int));
}

static void run_trainer(const GoldenCase* c, const GoldenVariant* v, GoldenResults* r) {
    static Settings cfg;
    static Model model;
    Model* m = &model;
    int N = c->B * c->T;
    settings_of(&cfg, c, v);
    model_build(m, &cfg, ranks.rank, ranks.world);
    model_start(m, &ranks);
    start_parameters(m, c, v);
    double* losses = golden_result(r, "loss", GOLDEN_STEPS);
    probed = r, probed_model = m;
    for (int step = 0; step < (v->train ? GOLDEN_STEPS : 1); step++) {
        load_batch(m, c, step);
        probe = step == 0 ? probe_keep : NULL;
        micro_step(m, m->tokens_host, m->targets_host, 0, 1.0f / (float)N);
        StepStats stats = step_stats(m, false);
        if (ranks.rank == 0) losses[step] = stats.loss;
        test_true("every gradient is finite", stats.finite);
        if (step == 0) {
            golden_result(r, "loss0", 1)[0] = ranks.rank == 0 ? stats.loss : 0;
            keep_saved(m, r);
            keep_parameters(m, r, 0);
        }
        if (!v->train) break;
        Schedule now = schedule_at(&cfg, step);
        now.lr_mult = (float)v->lr_mult[step];
        update(m, step + 1, now);
        keep_parameters(m, r, step + 1);
        if (!v->lr_mult_given) {
            golden_row("the schedule's momentum", "abs", fabs(now.muon_momentum - v->momentum[step]), 1e-7);
        }
    }
    if (v->train) {
        load_batch(m, c, GOLDEN_STEPS);
        batch_upload(m, m->tokens_host, m->targets_host, N / ranks.world);
        forward(m, m->B, m->T);
        classify(m, m->stats + STAT_LOSS, N / ranks.world, false, 0.0f, false);
        float sum;
        CUDA_CHECK(cudaStreamSynchronize(m->stream));
        CUDA_CHECK(cudaMemcpy(&sum, m->stats + STAT_LOSS, sizeof sum, cudaMemcpyDeviceToHost));
        golden_result(r, "val_loss", 1)[0] = sum / (double)N;      // this rank's part of it
    }
    model_free(m);
    results_unite(r);
}

int main(int argc, char** argv) {
    program_name = "test_golden";
    ranks_start(&ranks, &argc, &argv);
    if (ranks.rank != 0 && !freopen("/dev/null", "w", stdout)) return 1;
    int first = 1;
    if (argc > 2 && !strcmp(argv[1], "--precision")) {
        REQUIRE(!strcmp(argv[2], TEST_PRECISION), "--precision %s, but this build computes in %s", argv[2],
                TEST_PRECISION);
        first = 3;
    }
    REQUIRE(first < argc && argv[first][0] != '-', "usage: test_golden [--precision fp32|bf16] DIRECTORY...");
    char* none[] = {argv[0], NULL};
    test_init(1, none);
    if (!test_has_device()) return test_summary();
    for (int i = first; i < argc; i++) golden_run(argv[i], run_trainer, FLOATX_IS_BF16);
    int status = test_summary();
    ranks_stop(&ranks);
    return status;
}
