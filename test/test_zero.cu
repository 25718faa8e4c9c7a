/*
ZeRO-1 over ranks, run as `mpirun -np N build/fp32/test_zero`, and alone for N = 1.

    owners      every unit has one owner, the same on every rank; the update is balanced; the bytes on
                the wire are what the formula says, and 432 MB at 124M parameters on 8 ranks in bf16
    memory      device memory is what the printed table says, and the optimizer's part falls as 1/N
    training    N ranks against one, on the same global batches: losses, weights, equal bits on all
                ranks after every step, equal bits when repeated, bytes on the wire counted by the
                host's NCCL; --zero 0 and 1, bf16 and fp32 gradients on the wire
    evaluation  the mean over exactly --val-tokens predictions, for any number of ranks
    file        what N ranks save is what they hold, and one rank reads it

HOST_STREAMS=lazy makes a missing event a wrong number here. Each rank makes the same checks; rank 0
reports those of all.
*/
#define TRAIN_GPT2_NO_MAIN
#include "../train_gpt2.cu"
#include "test.h"

static Ranks ranks;
static Model model;

// ---- settings --------------------------------------------------------------------------------

static const char* const SMALL[] = {"--layers", "8", "--heads", "1", "--channels", "64", "--vocab",
                                    "320", "--seq-len", "16", "--micro-batch", "1",
                                    "--batch-tokens", "384", "--steps", "20", NULL};

// Of the recipes with twelve layers: documents of some ten tokens, windows of 4 to 16.
static const char* const RECORD[] = {"--heads", "1", "--channels", "64", "--vocab", "320",
                                     "--table-rows", "0", "--seq-len", "32", "--micro-batch", "1",
                                     "--batch-tokens", "512", "--steps", "20", "--window-block", "4",
                                     "--window-max", "16", "--end-of-text", "7", "--val-seq-len", "0",
                                     "--val-batch", "0", NULL};

static const Settings* make_settings(const char* recipe, const char* const* sizes,
                                     const char* const* flags) {
    static Settings cfg;
    const char* argv[64] = {"train_gpt2", "--recipe", recipe};
    int argc = 3;
    while (sizes && *sizes) argv[argc++] = *sizes++;
    while (flags && *flags) argv[argc++] = *flags++;
    settings_parse(&cfg, argc, (char**)argv);
    return &cfg;
}

// ---- owners ----------------------------------------------------------------------------------

// The bank tables of rank `rank` of `world`, at full size; nothing is allocated.
static void dry_model(Model* m, const char* recipe, const char* const* flags, int rank, int world) {
    static Settings cfg;
    cfg = *make_settings(recipe, NULL, flags);
    cfg.dry_run = 1;
    cfg.micro_batch = 1;
    cfg.batch_tokens = cfg.seq_len * world;
    model_build(m, &cfg, rank, world);
}

static void dry_free(Model* m) {
    for (int b = 0; b < BANKS; b++) zero_bank_free(&m->params.banks[b].zero);
    free(m->params.zero.load);
}

static void test_owners(const char* recipe, int world) {
    static Model m, first;
    char name[128];
    size_t elements = 0, sent = 0;
    bool same = true, once = true;
    dry_model(&first, recipe, NULL, 0, world);
    int units[BANKS][4 * MAX_LAYERS] = {};
    for (int rank = 0; rank < world; rank++) {
        dry_model(&m, recipe, NULL, rank, world);
        for (int b = 0; b < BANKS; b++) {
            const ZeroBank* bank = &m.params.banks[b].zero;
            if (m.params.banks[b].n == 0) continue;
            for (int i = 0; i < bank->owned; i++) units[b][bank->own[i]]++;
            for (int i = 0; i < bank->units; i++)
                same = same && bank->owner[i] == first.params.banks[b].zero.owner[i];
            if (bank->replicated) continue;
            sent += zero_reduce_bytes(&m.params.zero, bank) + zero_gather_bytes(&m.params.zero, bank);
            if (rank == 0) elements += bank->unit * bank->units;
        }
        dry_free(&m);
    }
    double heaviest = 0, sum = 0, costliest = 0;
    for (int r = 0; r < world; r++) {
        sum += first.params.zero.load[r];
        if (first.params.zero.load[r] > heaviest) heaviest = first.params.zero.load[r];
    }
    for (int b = 0; b < BANKS; b++) {
        const ZeroBank* bank = &first.params.banks[b].zero;
        for (int i = 0; i < bank->units && first.params.banks[b].n; i++)
            once = once && units[b][i] == (bank->replicated ? world : 1);
        if (bank->cost > costliest) costliest = bank->cost;
    }
    snprintf(name, sizeof name, "%s, %d ranks: one owner for each unit", recipe, world);
    test_true(name, once);
    snprintf(name, sizeof name, "%s, %d ranks: all ranks agree on the owners", recipe, world);
    test_true(name, same);
    // Who gets one unit more than another has less to do without it than the mean.
    snprintf(name, sizeof name, "%s, %d ranks: the busiest is at most one unit above the mean",
             recipe, world);
    test_check(name, heaviest - sum / world, costliest);
    snprintf(name, sizeof name, "%s, %d ranks: all ranks together send (N-1) P twice", recipe, world);
    size_t want = (size_t)(world - 1) * elements * (zero_wire_size(&first.params.zero) + sizeof(floatX));
    test_true(name, sent == want);
    dry_free(&first);
}

static void test_full_size_bytes(void) {
    static Model m;
    dry_model(&m, "modern", NULL, 3, 8);
    size_t bytes = 0, per = FLOATX_IS_BF16 ? 2 : 4;
    for (int i = 0; i < m.params.shard_count; i++)
        bytes += zero_reduce_bytes(&m.params.zero, m.params.shards[i]) + zero_gather_bytes(&m.params.zero, m.params.shards[i]);
    // 12 layers of 12 C² and a table of 50304 C: 123,568,128 parameters, 7/8 of them twice.
    test_true("124M on 8 ranks: 432,488,448 bytes in bf16", bytes == 2 * per * 7 * (123568128 / 8));
    test_true("6 attn matrices for each of 8 ranks", m.params.banks[BANK_ATTN].zero.owned == 6);
    test_true("3 mlp matrices for each of 8 ranks", m.params.banks[BANK_MLP].zero.owned == 3);
    dry_free(&m);
}

static size_t memory_of(const Model* m, const char* kind) {
    for (int i = 0; i < m->memory.kinds; i++)
        if (!strcmp(m->memory.name[i], kind)) return m->memory.bytes[i];
    return 0;
}

static void test_memory_shrinks(void) {
    static Model one, all, m;
    const char* const replicated[] = {"--zero", "0", NULL};
    const char* const STATE[] = {"Adam m", "Adam v", "Muon momentum", "master weights"};
    char name[128];
    dry_model(&one, "modern", NULL, 0, 1);
    for (int world = 2; world <= 8; world *= 2) {
        dry_model(&m, "modern", NULL, 1, world);
        dry_model(&all, "modern", replicated, 1, world);
        for (size_t i = 0; i < sizeof STATE / sizeof STATE[0]; i++) {
            snprintf(name, sizeof name, "124M on %d ranks: %s is 1/%d", world, STATE[i], world);
            test_true(name, memory_of(&m, STATE[i]) * world == memory_of(&one, STATE[i]));
            snprintf(name, sizeof name, "124M on %d ranks, --zero 0: %s is all", world, STATE[i]);
            test_true(name, memory_of(&all, STATE[i]) == memory_of(&one, STATE[i]));
        }
        dry_free(&m);
        dry_free(&all);
    }
    dry_free(&one);
}

// ---- training --------------------------------------------------------------------------------

enum { STEPS = 20, RECORD_STEPS = 6 };

typedef struct Course {
    int steps;
    double loss[STEPS], norm[STEPS];
    uint64_t hash[STEPS];       // of the weights after each step
    float* value;               // fp32 values at the end
    size_t n;
} Course;

static uint64_t weights_hash(Model* m) {
    uint64_t hash = HASH_START;
    CUDA_CHECK(cudaDeviceSynchronize());
    for (int b = 0; b < BANKS; b++) {
        size_t bytes = (size_t)m->params.banks[b].copies * m->params.banks[b].stride * sizeof(floatX);
        if (m->params.banks[b].n == 0) continue;
        void* copy = host_alloc(bytes, 1);
        CUDA_CHECK(cudaMemcpy(copy, m->params.banks[b].p, bytes, cudaMemcpyDeviceToHost));
        hash = hash_bytes(hash, copy, bytes);
        free(copy);
    }
    return hash;
}

// Values that make every gradient informative; the recipes' zero matrices would hide most of them.
static void randomize(Model* m) {
    for (int id = 0; id < PARAMS; id++) {
        for (int layer = 0; layer < MAX_LAYERS; layer++) {
            if (m->place[id][layer] < 0) continue;
            const Bank* bank = &m->params.banks[PARAM_TABLE[id].bank];
            size_t n = (size_t)bank->rows * bank->cols;
            float* value = test_floats(n);
            for (size_t i = 0; i < n; i++) {
                double z = test_normal(7000 + 100 * id + layer, i);
                double v = bank->kind == SCALAR ? 0.5 + 0.2 * z
                         : id == WTE            ? 0.5 * z
                                                : z / sqrt((double)bank->cols);
                value[i] = (float)test_round(v);
            }
            tensor_write(&m->params, value, m->place[id][layer]);
            free(value);
        }
    }
}

static const TextCodec codec = {};

static void keep_values(Model* m, Course* run) {
    params_collect(&m->params);
    run->n = 0;
    for (int id = 0; id < PARAMS; id++)
        run->n += m->params.banks[PARAM_TABLE[id].bank].n;
    run->value = test_floats(run->n);
    size_t at = 0;
    for (int id = 0; id < PARAMS; id++) {
        for (int layer = 0; layer < MAX_LAYERS; layer++) {
            if (m->place[id][layer] < 0) continue;
            const Bank* bank = &m->params.banks[PARAM_TABLE[id].bank];
            tensor_read(&m->params, run->value + at, m->place[id][layer]);
            at += (size_t)bank->rows * bank->cols;
        }
    }
    run->n = at;
}

// Bytes that a step should send, by the formula.
static size_t step_bytes(const Model* m) {
    size_t bytes = 0;
    for (int b = 0; b < BANKS; b++) {
        const Bank* bank = &m->params.banks[b];
        if (bank->n == 0 || (bank->adam && !m->now.adam_now)) continue;
        bytes += zero_reduce_bytes(&m->params.zero, &bank->zero);
        bytes += zero_gather_bytes(&m->params.zero, &bank->zero);
    }
    return bytes + zero_sum_bytes(&m->params.zero, STATS - STAT_NORMS + m->micro_steps, sizeof(float));
}

// STEPS steps on global batches that do not depend on the number of ranks. In fp32 a new one each: a
// batch that is learned by heart has a loss near zero, of which 1e-5 is nothing. In bf16 always the
// same, so that the loss falls with each step, as the bound wants it.
static Course train_steps(const char* recipe, const char* const* sizes, const char* const* flags,
                       int world, bool check) {
    Course run = {};
    run.steps = sizes == RECORD ? RECORD_STEPS : STEPS;      // of Adam's in normuon: three
    const Settings* cfg = make_settings(recipe, sizes, flags);
    int rank = world == 1 ? 0 : ranks.rank;
    char name[128];
    model_build(&model, cfg, rank, world);
    model_start(&model, &ranks);
    randomize(&model);
    int rows = (int)(cfg->batch_tokens / model.T), T = model.T, own = rows / world;
    bool agree = true, counted = true;
    for (int step = 0; step < run.steps; step++) {
        model_at(&model, step);
        int* tokens = (int*)host_alloc((size_t)rows * T + 1, sizeof(int));
        // Every second token repeats the one before, which can be learned.
        test_fill_tokens(tokens, (size_t)rows * T + 1, FLOATX_IS_BF16 ? 500 : 500 + step, 257);
        for (int i = 1; i <= rows * T; i += 2) tokens[i] = tokens[i - 1];
#ifndef __CUDACC__
        if (check) host_nccl_traffic_reset();      // waits for what is under way
#endif
        for (int micro = 0; micro < model.micro_steps; micro++) {
            int first = (rank * own + micro * model.B) * T, n = model.B * T;
            batch_wait(&model);
            memcpy(model.host.inputs, tokens + first, n * sizeof(int));
            memcpy(model.host.targets, tokens + first + 1, n * sizeof(int));
            batch_segments(&model.host, model.B, T, (int)cfg->end_of_text);
            micro_step(&model, &model.host, micro);
        }
        StepStats stats = step_result(&model, step_measure(&model, &model.slots[0]));
        run.loss[step] = stats.loss;
        run.norm[step] = stats.grad_norm;
        update(&model);
        if (check || step + 1 == run.steps) run.hash[step] = weights_hash(&model);
        free(tokens);
        if (!check) continue;
#ifndef __CUDACC__
        HostNcclTraffic traffic;
        host_nccl_traffic(&traffic);
        counted = counted && traffic.bytes == step_bytes(&model);
#endif
        uint64_t* hashes = (uint64_t*)host_alloc(world, sizeof(uint64_t));
        ranks_gather(&ranks, hashes, &run.hash[step], sizeof(uint64_t));
        for (int r = 0; r < world && rank == 0; r++) agree = agree && hashes[r] == hashes[0];
        free(hashes);
    }
    if (check) {
        snprintf(name, sizeof name, "%s: all ranks hold the same bits after every step", recipe);
        test_true(name, agree);
        snprintf(name, sizeof name, "%s: bytes on the wire are the formula's, %zu in the last step", recipe,
                 step_bytes(&model));
        test_true(name, counted);
    }
    keep_values(&model, &run);
    model_free(&model);
    return run;
}

static double distance(const Course* a, const Course* b) {
    double error = 0, scale = 0;
    for (size_t i = 0; i < b->n; i++) {
        error += (double)(a->value[i] - b->value[i]) * (a->value[i] - b->value[i]);
        scale += (double)b->value[i] * b->value[i];
    }
    return a->n == b->n ? sqrt(error / scale) : INFINITY;
}

// fp32: N ranks add the same terms in another order, 2^-24 sqrt(384) of the gradient; 20 steps of
// Adam and Newton-Schulz make of it what they make of any rounding. The bound is the promise.
// bf16: a gradient is rounded once to be sent and at every hop, the weights that come of it are, and
// so is what is computed with them: together (N+3) 2^-9 of a step. To first order the descent of a
// step is off by that part of itself, and the loss after k steps by that part of what has been
// descended so far; 2e-4 is for the rounding of a loss itself. Of single weights nothing is promised:
// Newton-Schulz makes steps of full size out of rounding errors, in directions that the loss does not
// see.
static void test_training(const char* recipe, const char* title, const char* const* sizes,
                          const char* const* flags) {
    int world = ranks.world;
    char name[128];
    Course all = train_steps(recipe, sizes, flags, world, true), one = all;
    if (ranks.rank == 0) one = train_steps(recipe, sizes, flags, 1, false);
    else one.value = test_floats(one.n);
    ranks_broadcast(&ranks, one.loss, sizeof one.loss);
    ranks_broadcast(&ranks, one.norm, sizeof one.norm);
    ranks_broadcast(&ranks, one.value, one.n * sizeof(float));
    bool exact = !FLOATX_IS_BF16;
    double worst = 0, descent = 0, lowest = one.loss[0];
    for (int step = 0; step < one.steps; step++) {
        if (one.loss[step] < lowest) lowest = one.loss[step];
        descent = one.loss[0] - lowest;
        double allowed = exact ? 1e-5 * one.loss[step] : (world + 3) * 0x1p-9 * descent + 2e-4;
        double off = fabs(all.loss[step] - one.loss[step]) / allowed;
        if (!(off <= worst)) worst = off;
    }
    snprintf(name, sizeof name, "%s%s, %d ranks against 1: %d losses", recipe, title, world, one.steps);
    test_check(name, worst, 1);
    snprintf(name, sizeof name, "%s%s: the loss has fallen", recipe, title);
    test_true(name, one.loss[one.steps - 1] < one.loss[0] - 0.3);
    snprintf(name, sizeof name, "%s%s, %d ranks against 1: gradient norm", recipe, title, world);
    test_check(name, fabs(all.norm[0] / one.norm[0] - 1), exact ? 1e-5 : (world + 1) * 0x1p-9);
    snprintf(name, sizeof name, "%s%s, %d ranks against 1: weights", recipe, title, world);
    // Adam makes a step of full size of a gradient that is rounding noise above its eps: 1e-10 in sub3. In
    // normuon an element decays or does not by the sign of its step times its weight: where the step is next
    // to nothing that sign is rounding noise, and the decay is 0.036 of the weight.
    const Settings* cfg = make_settings(recipe, sizes, flags);
    double weights = cfg->adam_eps < 1e-9 || cfg->cautious_decay > 0 ? 1e-3 : 1e-4;
    if (exact) test_check(name, distance(&all, &one), weights);
    free(one.value), free(all.value);
    if (flags) return;
    // Without the look at the weights after each step, which waits for the device and so would hide
    // that forward does not wait for its weights.
    Course again = train_steps(recipe, sizes, flags, world, false);
    snprintf(name, sizeof name, "%s%s, %d ranks twice: weights", recipe, title, world);
    test_same_bits(name, &all.hash[all.steps - 1], &again.hash[all.steps - 1], sizeof all.hash[0]);
    snprintf(name, sizeof name, "%s%s, %d ranks twice: losses", recipe, title, world);
    test_same_bits(name, all.loss, again.loss, sizeof all.loss);
    free(again.value);
}

// ---- memory ----------------------------------------------------------------------------------

#ifndef __CUDACC__
// First of all in the process: the peak is the process's.
static void test_memory(void) {
    const char* const sizes[] = {"--layers", "8", "--heads", "2", "--channels", "256", "--vocab",
                                 "4096", "--seq-len", "32", "--micro-batch", "1", "--batch-tokens",
                                 "768", NULL};
    model_build(&model, make_settings("modern", sizes, NULL), ranks.rank, ranks.world);
    model_start(&model, &ranks);
    for (int i = 0; i < model.B * model.T; i++) model.host.inputs[i] = model.host.targets[i] = i;
    for (int micro = 0; micro < model.micro_steps; micro++)
        micro_step(&model, &model.host, micro);
    step_result(&model, step_measure(&model, &model.slots[0]));
    update(&model);
    params_collect(&model.params);
    double table = (double)memory_total(&model.memory), peak = (double)host_peak_bytes();
    test_check("device memory against the printed table", fabs(peak / table - 1), 0.02);
    model_free(&model);
}
#endif

// ---- evaluation and files --------------------------------------------------------------------

static const char* scratch_path(const char* name) {
    static char path[256];
    snprintf(path, sizeof path, "/tmp/test_zero_%d_%s", ranks.world > 1 ? (int)getppid() : (int)getpid(),
             name);
    return path;
}

static void test_evaluation(void) {
    const char* path = scratch_path("val.bin");
    if (ranks.rank == 0) {
        int32_t header[256] = {SHARD_MAGIC, SHARD_VERSION, 1000};
        uint16_t tokens[1000];
        for (int i = 0; i < 1000; i++) tokens[i] = (uint16_t)(test_random(3, i) % 257);
        FILE* file = fopen(path, "wb");
        REQUIRE(file, "%s cannot be created", path);
        fwrite(header, sizeof header, 1, file);
        fwrite(tokens, sizeof tokens, 1, file);
        fclose(file);
    }
    ranks_barrier(&ranks);
    // One rank alone, then all of them with three micro-batches: 777 is a multiple of none.
    double loss[4], worst = 0;
    for (int pass = 0; pass < 4; pass++) {
        int world = pass ? ranks.world : 1, rank = pass ? ranks.rank : 0, B = pass ? pass : 1;
        char micro[16], tokens[16];
        snprintf(micro, sizeof micro, "%d", B);
        snprintf(tokens, sizeof tokens, "%d", 16 * B * world);
        const char* sizes[] = {"--layers", "8", "--heads", "1", "--channels", "64", "--vocab", "320", "--seq-len", "16",
                               "--micro-batch", micro, "--batch-tokens", tokens, NULL};
        ValLoader val;
        model_build(&model, make_settings("modern", sizes, NULL), rank, world);
        model_start(&model, &ranks);
        randomize(&model);
        val_open(&val, path, 777, model.B, model.T, rank, world, model.V);
        loss[pass] = evaluate(&model, &val);
        val_close(&val);
        model_free(&model);
        double off = fabs(loss[pass] / loss[0] - 1);
        if (!(off <= worst)) worst = off;
    }
    // Sums of at most 75 row losses in fp32 on a rank, then in double.
    test_check("777 predictions on N ranks, 1, 2 and 3 sequences at a time, and on one", worst, 1e-6);
    test_true("a loss near that of random tokens", loss[0] > 3 && loss[0] < 20);
    ranks_barrier(&ranks);
    if (ranks.rank == 0) unlink(path);
}

// layers 2: some ranks own no matrix of a bank.
static void test_file(const char* layers) {
    const char* path = scratch_path("model.safetensors");
    const char* sizes[] = {"--layers", layers, "--heads", "2", "--channels", "64", "--vocab", "320",
                           "--seq-len", "16", "--micro-batch", "1", "--batch-tokens", "384", NULL};
    Course saved = {}, loaded = {};
    model_build(&model, make_settings("unet", sizes, NULL), ranks.rank, ranks.world);
    model_start(&model, &ranks);
    randomize(&model);
    for (int i = 0; i < model.B * model.T; i++) model.host.inputs[i] = model.host.targets[i] = i;
    for (int micro = 0; micro < model.micro_steps; micro++)
        micro_step(&model, &model.host, micro);
    step_result(&model, step_measure(&model, &model.slots[0]));
    update(&model);      // the file is read while gathers are queued
    weights_save(&model, path, 1, &codec);
    keep_values(&model, &saved);
    model_free(&model);
    ranks_barrier(&ranks);
    model_build(&model, make_settings("unet", sizes, NULL), 0, 1);
    model_start(&model, &ranks);
    params_load(&model.params, path);
    keep_values(&model, &loaded);
    model_free(&model);
    test_true("the file has as many values", saved.n == loaded.n);
    test_same_bits("saved by N ranks, loaded by one", saved.value, loaded.value,
                   saved.n * sizeof(float));
    free(saved.value), free(loaded.value);
    ranks_barrier(&ranks);
    if (ranks.rank == 0) unlink(path);
}

// ---- main ------------------------------------------------------------------------------------

int main(int argc, char** argv) {
    program_name = "test_zero";
    ranks_start(&ranks, &argc, &argv);
    test_init(argc, argv);
    if (!test_has_device()) return test_summary();
    if (ranks.rank != 0 && !freopen("/dev/null", "w", stdout)) return 1;
    zero_choose_device(&ranks);
#ifndef __CUDACC__
    if (test_group("memory")) test_memory();
#endif
    if (test_group("owners")) {
        static const int WORLDS[] = {1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 64};
        for (size_t i = 0; i < sizeof WORLDS / sizeof WORLDS[0]; i++) {
            test_owners("modern", WORLDS[i]);
            test_owners("unet", WORLDS[i]);
        }
        test_full_size_bytes();
        test_memory_shrinks();
    }
    static const char* const REPLICATED[] = {"--zero", "0", NULL};
    static const char* const WIDE[] = {"--grad-reduce", "fp32", NULL};
    // In fp32 the promise is 1e-5, which tables that are rounded to bf16 in every step cannot keep.
    static const char* const TABLES[] = {"--bf16-tables", "0", NULL};
    static const char* const ADAMW[] = {"--optimizer", "adamw", NULL};
    if (test_group("modern")) test_training("modern", "", SMALL, NULL);
    bool alone = ranks.world == 1;      // then the rest would compare one rank with itself
    if (!alone && test_group("unet")) test_training("unet", "", SMALL, FLOATX_IS_BF16 ? NULL : TABLES);
    // Their heads in 8 bits, too, in bf16; in fp32 a code that flips is more than 1e-5.
    static const char* const PLAIN[] = {"--bf16-tables", "0", "--fp8-head", "0", NULL};
    static const char* const PLAIN45[] = {"--bf16-tables", "0", "--bf16-head", "0", "--bf16-state",
                                          "0", "--fp8-head", "0", "--extension-steps", "4", NULL};
    static const char* const SHORT45[] = {"--extension-steps", "4", NULL};
    bool record = ranks.world == 2 || ranks.world == 8;
    if (record && test_group("sub3")) test_training("sub3", "", RECORD, FLOATX_IS_BF16 ? NULL : PLAIN);
    if (record && test_group("normuon"))
        test_training("normuon", "", RECORD, FLOATX_IS_BF16 ? SHORT45 : PLAIN45);
    if (alone) {
        test_group_end();
    } else if (FLOATX_IS_BF16) {
        if (test_group("fp32 wire")) test_training("modern", " fp32 wire", SMALL, WIDE);
    } else {
        if (test_group("zero 0")) test_training("modern", " --zero 0", SMALL, REPLICATED);
        if (test_group("adamw")) test_training("modern", " adamw", SMALL, ADAMW);
    }
    if (test_group("evaluation")) test_evaluation();
    if (test_group("file")) test_file("8"), test_file("2");
    test_group_end();
    // Rank 0 speaks for all.
    int mine[3] = {test_state.passed, test_state.failed, test_state.skipped};
    int* all = (int*)host_alloc(ranks.world, sizeof mine);
    ranks_gather(&ranks, all, mine, sizeof mine);
    for (int r = 1; r < ranks.world && ranks.rank == 0; r++) {
        if (all[3 * r + 1]) printf("FAIL  rank %d: %d checks failed\n", r, all[3 * r + 1]);
        test_state.passed += all[3 * r];
        test_state.failed += all[3 * r + 1];
        test_state.skipped += all[3 * r + 2];
    }
    free(all);
    int status = test_summary();
    ranks_stop(&ranks);
    return status;
}
