/*
The trainer against the real recipes: every activation, gradient, loss and parameter of golden case
directories (format and tolerances: golden.h), computed by the trainer's own functions.

    test_golden [--precision fp32|bf16] [--only NAMES] DIRECTORY...
    mpirun -np 2 test_golden ...        each rank takes its part of the batch; the parts are put together

--precision only states which build is meant; another one is an error. --only f32.ns:fp8 takes the files
whose names begin so, and with each those that the same run gives. One line per quantity:
`ok` or `FAIL`, name, measure, found, allowed. Tensors for which there is no rule are listed as not
compared and counted as skipped. The exit status is 1 if anything fails.

A batch that is one sequence cannot be cut: then every rank takes all of it, and the gradient, which
is the mean over ranks, is the same as one rank's.

Recipe and sizes come from the case. The recipe's file in scripts/recipes supplies what the case
does not state: the options of the model, the forms of Muon, the schedule. Windows, softmax scale,
momentum and learning rate of each step are the schedule's where the case follows the record's own
schedule, and are compared with the case's; elsewhere they are the case's.
What the fused kernels never write to memory (queries before the rotation, their norm without it,
gates before the sigmoid) is rebuilt from what they do write, so it is still their arithmetic that is
judged.
*/
#define TRAIN_GPT2_NO_MAIN
// The trainer's main is the only caller of some of its functions.
#pragma GCC diagnostic ignored "-Wunused-function"
#include "train_gpt2.cu"
#include "test.h"
#include "golden.h"

static Ranks ranks;
static bool cut;                  // each rank has its part of a batch; otherwise all of it
static GoldenResults* probed;     // where the probe puts what it sees; step 0 only
static const Model* probed_model;

// ---- seeing ----------------------------------------------------------------------------------

// Room for n elements of this rank's rows, among those of all ranks. NULL: these rows are rank 0's, too.
static double* result_rows(GoldenResults* r, const char* name, size_t n) {
    if (cut) return golden_result(r, name, n * ranks.world) + n * ranks.rank;
    double* rows = golden_result(r, name, n);
    return ranks.rank == 0 ? rows : NULL;
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

// A (rows, cols) tensor with row stride ld, after all work queued before. out may be NULL.
static void read_rows(double* out, const floatX* tensor, int rows, int cols, int ld) {
    if (!out) return;
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
    if (!out) return;
    float* copy = test_floats(n);
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaMemcpy(copy, device, n * sizeof(float), cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < n; i++) out[i] = copy[i];
    free(copy);
}

// Gradients of activations: the mean over ranks that have the same rows makes each one's smaller.
static void read_gradient(double* out, const floatX* tensor, int rows, int cols, int ld) {
    read_rows(out, tensor, rows, cols, ld);
    for (size_t i = 0; i < (size_t)rows * cols && out && !cut; i++) out[i] *= ranks.world;
}

// The trainer's names for what it passes by, and the golden ones.
static void probe_keep(const char* name, int layer, const floatX* tensor, int rows, int cols, int ld) {
    static const struct { const char *probe, *golden; } NAMES[] = {
        {"in", "act.h%d.in"}, {"mix", "act.h%d.mix"}, {"v_mix", "act.h%d.v_mix"}, {"gated", "act.h%d.attn_y_gated"},
        {"attn_out", "act.h%d.attn_out"}, {"after_attn", "act.h%d.after_attn"}, {"fc", "act.h%d.fc"},
        {"mlp_out", "act.h%d.mlp_out"}, {"out", "act.h%d.out"}, {"qkv", "act.h%d.qkv"}, {"dout", "dact.h%d.out"},
        {"dv", "dact.h%d.v_lin"}, {"backout", "act.backout"}, {"smear", "act.smear"},
    };
    const Model* m = probed_model;
    bool modern = m->cfg->head == FLAG_HEAD_TIED, gradient = name[0] == 'd';
    size_t n = (size_t)rows * cols, N = (size_t)m->B * m->T;
    if (!strcmp(name, "logits") || !strcmp(name, "dlogits")) {       // layer is the first row of these
        double* all = result_rows(probed, gradient ? "dact.logits_raw" : "logits0", N * cols);
        (gradient ? read_gradient : read_rows)(all ? all + (size_t)layer * cols : NULL, tensor, rows, cols, ld);
        return;
    }
    if (!strcmp(name, "qkv")) {
        static const char* const PARTS[] = {"act.h%d.q_lin", "act.h%d.k_lin", "act.h%d.v_lin"};
        int C = cols / 3;
        for (int i = 0; i < 3; i++) {
            read_rows(result_of_layer(probed, PARTS[i], layer, n / 3), tensor + i * C, rows, C, ld);
        }
    }
    if (!strcmp(name, "dv") && m->plan[layer].value_table >= 0) {    // d loss / d looked-up rows, by now in dve
        double *sum = result_of_layer(probed, "dact.ve%d", m->plan[layer].value_table, n), *part = test_doubles(n);
        read_gradient(part, m->acts.dve[0], rows, cols, cols);
        for (size_t i = 0; i < n && sum; i++) sum[i] += part[i];
        free(part);
    }
    if (!strcmp(name, "x0")) read_rows(result_rows(probed, modern ? "act.emb" : "act.x0", n), tensor, rows, cols, ld);
    if (!strcmp(name, "demb")) {
        read_gradient(result_rows(probed, modern ? "dact.emb" : "dact.embed_raw", n), tensor, rows, cols, ld);
    }
    for (size_t i = 0; i < sizeof NAMES / sizeof NAMES[0]; i++) {
        if (strcmp(name, NAMES[i].probe)) continue;
        (gradient ? read_gradient : read_rows)(result_of_layer(probed, NAMES[i].golden, layer, n), tensor, rows, cols,
                                               ld);
    }
}

// q or k of a layer: what attention read, and the value between norm and rotation.
//   norm first:   q_norm = q_lin rstd, q_rot is what attention read
//   rotate first: q_norm is what attention read, q_rot = q_norm / rstd
static void keep_qk(const Model* m, GoldenResults* r, int layer, bool key) {
    int N = m->B * m->T, C = m->C, H = m->H, D = m->D;
    size_t n = (size_t)N * C;
    bool norm_first = m->cfg->qk_order == FLAG_QK_NORM_FIRST;
    double* lin = result_of_layer(r, key ? "act.h%d.k_lin" : "act.h%d.q_lin", layer, n);
    double* norm = result_of_layer(r, key ? "act.h%d.k_norm" : "act.h%d.q_norm", layer, n);
    double* rot = result_of_layer(r, key ? "act.h%d.k_rot" : "act.h%d.q_rot", layer, n);
    if (!lin) return;
    double* rstd = test_doubles((size_t)N * 2 * H);
    read_floats(rstd, m->acts.qk_rstd[layer], (size_t)N * 2 * H);
    read_rows(norm_first ? rot : norm, m->acts.qkv[layer] + (key ? C : 0), N, C, 3 * C);
    for (size_t i = 0; i < n; i++) {
        double factor = rstd[i / C * 2 * H + (key ? H : 0) + i % C / D];
        if (norm_first) norm[i] = lin[i] * factor;
        else rot[i] = norm[i] / factor;
    }
    free(rstd);
}

// The n arguments of the sigmoids that these gates were; `skip` gates before them are not wanted.
static void keep_gate(double* raw, const float* gate, size_t n, size_t skip) {
    read_floats(raw, gate + skip, n);
    for (size_t i = 0; i < n && raw; i++) raw[i] = log(raw[i] / (1 - raw[i]));
}

// (T, T): which keys a query's bounds leave it.
static void keep_mask(const Model* m, GoldenResults* r, int window) {
    size_t T = m->T;
    double* mask = golden_result(r, window ? "mask.long" : "mask.short", T * T);
    int* first = (int*)test_calloc(T, sizeof(int));
    CUDA_CHECK(cudaMemcpy(first, m->acts.first[window], T * sizeof(int), cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < T * T && ranks.rank == 0; i++) {
        mask[i] = (int)(i % T) >= first[i / T] && i % T <= i / T;
    }
    free(first);
}

// What lies in the trainer's buffers after forward and backward of step 0.
static void keep_saved(const Model* m, GoldenResults* r) {
    const Acts* a = &m->acts;
    int N = m->B * m->T, C = m->C, F = m->F;
    size_t n = (size_t)N * C, half = (size_t)m->T * m->D / 2;
    for (int l = 0; l < m->L; l++) {
        if (!m->plan[l].mlp) continue;
        read_rows(result_of_layer(r, "act.h%d.mlp_in", l, n), a->ln2[l], N, C, C);
        read_rows(result_of_layer(r, "act.h%d.relu2", l, 4 * n), a->relu[l], N, F, F);
        if (!m->plan[l].attention) continue;
        read_rows(result_of_layer(r, "act.h%d.attn_in", l, n), a->ln1[l], N, C, C);
        read_rows(result_of_layer(r, "act.h%d.attn_y", l, n), a->att[l], N, C, C);
        keep_qk(m, r, l, false);
        keep_qk(m, r, l, true);
        if (!m->cfg->attention_gate) continue;
        keep_gate(result_of_layer(r, "act.h%d.gate_raw", l, (size_t)N * m->H), a->gate[l], (size_t)N * m->H, 0);
    }
    read_rows(result_rows(r, "act.final_norm", n), a->lnf[0], N, C, C);
    if (a->emb[0]) read_rows(result_rows(r, "act.embed_raw", n), a->emb[0], N, C, C);
    if (m->cfg->smear) keep_gate(result_rows(r, "act.smear_gate_raw", N - 1), a->smear_gate[0], N - 1, 1);
    // layer 0 is the last that backward visits: its looked-up values are still there
    if (m->plan[0].value_table >= 0) read_rows(result_rows(r, "act.h0.ve", n), a->ve[0], N, C, C);
    for (int i = 0; i < 2 && masked(m->cfg) && m->B == 1; i++) keep_mask(m, r, i);
    double *cosines = golden_result(r, "cos", half), *sines = golden_result(r, "sin", half);
    if (ranks.rank == 0) read_floats(cosines, m->cos, half);
    if (ranks.rank == 0) read_floats(sines, m->sin, half);
}

static void keep_tensors(Model* m, GoldenResults* r, const char* prefix, bool gradients) {
    for (int i = 0; i < m->params.count; i++) {
        const Bank* bank = bank_of(&m->params, i);
        size_t n = tensor_elements(&m->params, i);
        char name[96];
        snprintf(name, sizeof name, "%s%.64s", prefix, m->params.tensors[i].name);
        float* value = test_floats(n);
        tensor_read(&m->params, value, i);
        double* kept = golden_result(r, name, n);
        // What Adam goes on adding to has not been summed over ranks yet: results_unite does that.
        bool parts = gradients && bank->adam && !m->now.adam_now;
        for (size_t k = 0; k < n && (parts || ranks.rank == 0); k++) kept[k] = value[k];
        free(value);
    }
}

static void keep_gradients(Model* m, GoldenResults* r, const char* prefix) {
    for (int b = 0; b < BANKS; b++) {      // each gradient is with its owner alone
        Bank* bank = &m->params.banks[b];
        if (bank->n == 0 || (bank->adam && !m->now.adam_now)) continue;
        for (int k = 0; k < bank->zero.bucket_count; k++) {
            zero_gather(&m->params.zero, &bank->zero, k, bank->g, true, m->stream);
            zero_wait_gathered(&m->params.zero, &bank->zero, bank->zero.buckets[k].first, m->stream);
        }
    }
    CUDA_CHECK(cudaStreamSynchronize(m->stream));
    keep_tensors(m, r, prefix, true);
}

// p<steps>.<tensor>. Values pass through the gradients' memory, in which Adam's may have to wait.
static void keep_parameters(Model* m, GoldenResults* r, int steps) {
    char prefix[16];
    snprintf(prefix, sizeof prefix, "p%d.", steps);
    bool waiting = !m->now.adam_now;
    if (waiting) params_stash(&m->params);
    params_collect(&m->params);
    keep_tensors(m, r, prefix, false);
    if (waiting) params_unstash(&m->params);
}

// ---- running ---------------------------------------------------------------------------------

// The recipe's settings at the sizes and with the numerics of the case.
static void settings_of(Settings* cfg, const GoldenCase* c, const GoldenVariant* v) {
    static const char* const RECIPES[] = {"modern", "untied", "unet", "sub3_20", "normuon"};
    static char program[] = "test_golden", flag[] = "--recipe", name[16];
    bool sub3 = c->recipe == GOLDEN_SUB3, normuon = c->recipe == GOLDEN_NORMUON, late = sub3 || normuon;
    snprintf(name, sizeof name, "%s", RECIPES[c->recipe]);
    char* argv[] = {program, flag, name, NULL};
    settings_parse(cfg, 3, argv);
    cut = c->B % ranks.world == 0;
    int B = cut ? c->B / ranks.world : c->B;
    cfg->layers = c->L, cfg->heads = v->H, cfg->channels = c->C, cfg->vocab = c->V, cfg->table_rows = c->rows;
    cfg->seq_len = c->T, cfg->val_seq_len = c->T_val, cfg->micro_batch = cfg->val_batch = B;
    cfg->batch_tokens = (int64_t)B * ranks.world * c->T;
    cfg->norm_eps = cfg->qk_norm_eps = 0x1p-23;
    if (v->asis && !normuon) cfg->qk_norm_eps = 0x1p-7;              // of bf16 queries, in these records
    if (v->asis && (sub3 || c->recipe == GOLDEN_UNET)) cfg->norm_eps = 0x1p-7;   // the stream is bf16, too
    cfg->rotary_round_bf16 = v->rope_bf16;
    cfg->bf16_tables = v->embbf16 || v->tabbf16 || (v->asis && c->recipe >= GOLDEN_UNET);
    cfg->bf16_scalars = c->recipe == GOLDEN_UNET && cfg->bf16_tables;
    cfg->bf16_head = v->tabbf16 || (v->asis && normuon);
    cfg->bf16_state = v->adambf16;
    cfg->fp8_head = v->fp8 || (v->asis && late);
    if (sub3) cfg->fp8_grad_scale = v->fp8_grad / (c->B * c->T);    // of one token's loss
    cfg->embed_lr = cfg->value_lr = c->lr_wte * v->adam_scale;
    cfg->muon_lr = c->lr_muon;
    if (c->recipe != GOLDEN_MODERN) cfg->head_lr = c->lr_head * v->adam_scale;
    if (c->recipe >= GOLDEN_UNET) cfg->scalar_lr = c->lr_scalar * v->adam_scale;
    cfg->adam_beta1 = c->adam_beta1, cfg->adam_beta2 = c->adam_beta2, cfg->adam_eps = c->adam_eps;
    if (late) cfg->window_block = c->block, cfg->end_of_text = c->bos;
    if (normuon) cfg->steps = v->scheduled + v->extension, cfg->extension_steps = v->extension;
    cfg->dry_run = 1;                                               // no data files are wanted
    settings_check(cfg, ranks.world);
    cfg->dry_run = 0;
}

static void start_parameters(Model* m, const GoldenCase* c, const GoldenVariant* v) {
    for (int i = 0; i < m->params.count; i++) {
        size_t n = tensor_elements(&m->params, i);
        double* start = golden_start(c, v, m->params.tensors[i].name, n);
        float* value = test_floats(n);
        for (size_t k = 0; k < n; k++) value[k] = (float)start[k];
        tensor_write(&m->params, value, i);
        free(start);
        free(value);
    }
}

// This rank's part of batch i into pinned memory. Returns how many tokens.
static int load_batch(Model* m, const GoldenCase* c, int i) {
    int T = i == GOLDEN_STEPS ? c->T_val : c->T, n = m->B * T;
    size_t first = cut ? (size_t)n * ranks.rank : 0;
    batch_wait(m);
    memcpy(m->host.inputs, golden_batch(c, "tokens", i) + first, n * sizeof(int));
    memcpy(m->host.targets, golden_batch(c, "targets", i) + first, n * sizeof(int));
    batch_segments(&m->host, m->B, T, c->bos);
    if (c->recipe == GOLDEN_NORMUON) {
        const int* ends;
        m->host.cu_count = golden_cu_seqlens(c, &ends, i);
        memcpy(m->host.cu_seqlens, ends, m->host.cu_count * sizeof(int));
    }
    return n;
}

// Step i of the case, or its evaluation.
static void schedule_step(Model* m, const GoldenCase* c, const GoldenVariant* v, int i) {
    bool normuon = c->recipe == GOLDEN_NORMUON, evaluation = i == GOLDEN_STEPS;
    model_at(m, normuon ? v->steps[i] : i);
    Schedule* now = &m->now;
    if (!evaluation && (normuon || !v->steps_given)) {
        golden_row("the schedule's momentum", "abs", fabs(now->muon_momentum - v->momentum[i]), 1e-7);
    }
    if (normuon) {       // the record's own schedule
        int windows = (now->window_short != v->window_short[i]) + (now->window_long != v->window_long[i]);
        golden_row("the schedule's windows", "wrong", windows, 0);
        golden_row("the schedule's softmax scale", "abs", fabs(now->attn_scale - v->attn_scale[i]), 1e-7);
        if (!evaluation) golden_row("the schedule's lr", "abs", fabs(now->lr_mult - v->lr_mult[i]), 1e-6);
    } else if (c->recipe == GOLDEN_SUB3) {
        now->window_long = v->window_long[i];
        now->window_short = v->window_short[i] ? v->window_short[i] : 1;     // 0 acts as 1
        golden_row("the schedule's softmax scale", "abs", fabs(now->attn_scale - v->attn_scale[i]), 1e-7);
    }
    if (evaluation) return;
    now->lr_mult = (float)v->lr_mult[i], now->muon_momentum = (float)v->momentum[i];
    // The case starts with a fresh optimizer and may leave out steps, whatever numbers they have.
    int64_t adam_step = 0;
    m->pending = false;
    for (int k = 0; k <= i; k++) {
        bool adam = !normuon || (v->steps[k] + 1) % m->cfg->adam_every == 0;
        adam_step += adam;
        if (k < i) m->pending = !adam;
    }
    if (!v->steps_given) golden_row("the schedule's steps of Adam", "wrong", now->adam_step != adam_step, 0);
    now->adam_step = adam_step;
}

static double batch_loss(Model* m, const GoldenCase* c, int i) {
    load_batch(m, c, i);
    micro_step(m, &m->host, 0);
    StepStats stats = step_result(m, step_measure(m, &m->slots[0]));
    test_true("every gradient is finite", stats.finite);
    return stats.loss;
}

// Losses and gradients of the start, seen through other windows.
static void run_windows(Model* m, const GoldenCase* c, const GoldenVariant* v, GoldenResults* r) {
    for (int w = 0; w < v->window_count; w++) {
        char prefix[32], name[64];
        int window = v->windows[w].window, N = m->B * m->T;
        model_at(m, 0);
        m->now.window_long = window, m->now.window_short = window > 1 ? window / 2 : 1;
        double loss = batch_loss(m, c, v->windows[w].batch);
        snprintf(name, sizeof name, "sw%d.b%d.loss", window, v->windows[w].batch);
        golden_result(r, name, 1)[0] = ranks.rank == 0 ? loss : 0;
        snprintf(name, sizeof name, "sw%d.b%d.final_norm", window, v->windows[w].batch);
        read_rows(result_rows(r, name, (size_t)N * m->C), m->acts.lnf[0], N, m->C, m->C);
        snprintf(prefix, sizeof prefix, "sw%d.b%d.grad.", window, v->windows[w].batch);
        keep_gradients(m, r, prefix);
    }
}

static void run_trainer(const GoldenCase* c, const GoldenVariant* v, GoldenResults* r) {
    static Settings cfg;
    static Model model;
    Model* m = &model;
    settings_of(&cfg, c, v);
    model_build(m, &cfg, ranks.rank, ranks.world);
    model_start(m, &ranks);
    start_parameters(m, c, v);
    run_windows(m, c, v, r);
    double* losses = golden_result(r, "loss", GOLDEN_STEPS);
    probed = r, probed_model = m;
    for (int step = 0; step < (v->train ? GOLDEN_STEPS : 1); step++) {
        schedule_step(m, c, v, step);
        probe = step == 0 ? probe_keep : NULL;
        double loss = batch_loss(m, c, step);
        if (ranks.rank == 0) losses[step] = loss;
        if (step == 0) {
            golden_result(r, "loss0", 1)[0] = losses[0];
            keep_saved(m, r);
            keep_gradients(m, r, "grad.");
        }
        if (!v->train) break;
        update(m);
        if (step + 1 <= 2 || step + 1 == GOLDEN_STEPS) keep_parameters(m, r, step + 1);
    }
    if (v->train) {
        schedule_step(m, c, v, GOLDEN_STEPS);
        int n = load_batch(m, c, GOLDEN_STEPS);
        batch_upload(m, &m->host, n);
        forward(m, &m->val_acts, m->B, c->T_val, 0);
        classify(m, &m->val_acts, m->val_loss, n, false, 0.0f, false);
        float sum;
        CUDA_CHECK(cudaStreamSynchronize(m->stream));
        CUDA_CHECK(cudaMemcpy(&sum, m->val_loss, sizeof sum, cudaMemcpyDeviceToHost));
        bool counts = cut || ranks.rank == 0;
        golden_result(r, "val_loss", 1)[0] = counts ? sum / ((double)c->B * c->T_val) : 0;   // this rank's part
        size_t half = (size_t)c->T_val * m->D / 2;
        double *cosines = golden_result(r, "val_cos", half), *sines = golden_result(r, "val_sin", half);
        if (ranks.rank == 0) read_floats(cosines, m->cos, half);
        if (ranks.rank == 0) read_floats(sines, m->sin, half);
    }
    model_free(m);
    results_unite(r);
}

int main(int argc, char** argv) {
    program_name = "test_golden";
    ranks_start(&ranks, &argc, &argv);
    if (ranks.rank != 0 && !freopen("/dev/null", "w", stdout)) return 1;
    int first = 1;
    for (; first + 1 < argc && argv[first][0] == '-'; first += 2) {
        const char* value = argv[first + 1];
        if (!strcmp(argv[first], "--only")) {
            golden_only = value;
        } else {
            REQUIRE(!strcmp(argv[first], "--precision"), "%s: no such flag", argv[first]);
            REQUIRE(!strcmp(value, TEST_PRECISION), "--precision %s, but this build computes in %s", value,
                    TEST_PRECISION);
        }
    }
    REQUIRE(first < argc, "usage: test_golden [--precision fp32|bf16] [--only NAMES] DIRECTORY...");
    char* none[] = {argv[0], NULL};
    test_init(1, none);
    if (!test_has_device()) return test_summary();
    for (int i = first; i < argc; i++) golden_run(argv[i], run_trainer, FLOATX_IS_BF16);
    int status = test_summary();
    ranks_stop(&ranks);
    return status;
}
