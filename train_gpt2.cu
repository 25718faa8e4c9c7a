/*
modded-llm.c: trains GPT-2 124M on FineWeb tokens to a validation loss of 3.28, in plain C and CUDA.

Read it in this order: `train` below (the run in one screen), then llmc/gpt2.cuh (the model):
`forward`, `backward` (the same lines in reverse), `update` (Muon and AdamW). Everything numeric
lives in llmc/, one operation per header, and the settings of a run live in scripts/recipes.

This file is what a run is besides its model: weights to a file, samples, what is printed at the
start, checkpoints and where to go on from, what happens after a step that is not finite, signals.

One process drives one GPU. N of them (ranks) each take an N-th of a batch; every matrix is updated
by one rank, its owner (ZeRO-1, llmc/zero.cuh).
The same file is compiled by nvcc for a GPU, and by g++ against llmc/host, which executes the very
same kernels on a CPU.

How to run:  ./train_gpt2 --help
*/
#include <sys/resource.h>
#include <unistd.h>
#include "llmc/common.h"
#include "llmc/flags.h"
#include "llmc/dataloader.h"
#include "llmc/generate.h"
#include "llmc/gpt2.cuh"
#include "llmc/log.h"
#include "llmc/roofline.h"
#include "llmc/saving.cuh"

#ifndef GIT_COMMIT
#define GIT_COMMIT "unknown"
#endif

static const char* const PRECISION_NAME = FLOATX_IS_BF16 ? "bf16" : "fp32";
#ifdef __CUDACC__
static const char* const TARGET_NAME = "gpu";
#else
static const char* const TARGET_NAME = "cpu";
#endif

// ---- weights to a file -------------------------------------------------------------------------

// The flags as a JSON object, to be freed.
static char* flags_json(const Settings* cfg) {
    char* flags = NULL;
    size_t size = 0;
    FILE* text = open_memstream(&flags, &size);
    REQUIRE(text, "out of memory for the flags");
    settings_json(text, cfg);
    fclose(text);
    return flags;
}

// All parameters, with what a reader has to know of the model. All ranks call it, rank 0 writes.
static void weights_save(Model* m, const char* path, int64_t step, const TextCodec* codec) {
    char *flags = flags_json(m->cfg), step_text[32];
    snprintf(step_text, sizeof step_text, "%" PRId64, step);
    const char* metadata[] = {"format", "pt", "flags", flags, "step", step_text,
                              "commit", GIT_COMMIT, "precision", PRECISION_NAME,
                              "tokenizer_hash", codec->hash};
    if (m->pending) params_stash(&m->params);
    params_save(&m->params, path, metadata, codec->hash[0] ? 6 : 5);
    if (m->pending) params_unstash(&m->params);
    free(flags);
}

// ---- sampling ---------------------------------------------------------------------------------

typedef struct Sampler { Model* m; float* z; floatX* logits; } Sampler;

// The logits behind `count` tokens, of which the keys and values of the first `known` are in qkv.
static float* sample_logits(void* context, const int* ids, int count, int known) {
    Sampler* sampler = (Sampler*)context;
    Model* m = sampler->m;
    const Settings* cfg = m->cfg;
    int V = m->V, C = m->C;
    const floatX* last = m->acts.lnf[0] + (size_t)(count - 1) * C;
    batch_wait(m);
    memcpy(m->host.inputs, ids, count * sizeof(int));
    memcpy(m->host.targets, ids, count * sizeof(int));       // unused
    batch_segments(&m->host, 1, count, (int)cfg->end_of_text);
    batch_upload(m, &m->host, count);
    forward(m, &m->acts, 1, count, known);
    if (head_id(m) == LM_HEAD) weights_wait(m, LM_HEAD, 0);
    matmul_nt(m->logits, last, weight(m, head_id(m), 0), 1, loss_stride(V), C, &m->matmul,
              m->stream);
    CUDA_CHECK(cudaMemcpyAsync(sampler->logits, m->logits, V * sizeof(floatX),
                               cudaMemcpyDeviceToHost, m->stream));
    CUDA_CHECK(cudaStreamSynchronize(m->stream));
    for (int i = 0; i < V; i++)
        sampler->z[i] = softcap_host((SoftcapKind)cfg->softcap, (float)cfg->softcap_value,
                                     (float)sampler->logits[i]);
    return sampler->z;
}

// --sample-tokens tokens that go on from --prompt: to the log, or as they come to stdout.
static void sample(Model* m, TextCodec* codec, Log* log, int64_t step) {
    const Settings* cfg = m->cfg;
    Sampler sampler = {m, (float*)host_alloc(m->V, sizeof(float)),
                       (floatX*)host_alloc(m->V, sizeof(floatX))};
    GenerateSpec spec = {};
    int* drawn = (int*)host_alloc(cfg->sample_tokens, sizeof(int));
    int* prompt = text_encode(codec, cfg->prompt, strlen(cfg->prompt), &spec.prompt_count);
    spec.prompt = prompt;
    spec.tokens = (int)cfg->sample_tokens;
    spec.T = m->T, spec.V = m->V;
    spec.temperature = (float)cfg->sample_temperature;
    spec.top_k = (int)cfg->sample_top_k;
    spec.seed = cfg->seed;
    generate(drawn, &spec, codec, sample_logits, &sampler, log ? NULL : stdout);
    if (log) log_sample(log, step, drawn, spec.tokens, codec);
    free(prompt);
    free(drawn);
    free(sampler.z);
    free(sampler.logits);
}

// ---- report -----------------------------------------------------------------------------------

static void print_model(FILE* out, const Model* m) {
    const Memory* memory = &m->memory;
    fprintf(out, "parameters %" PRId64 ", %d tokens in a micro-batch, %s\n",
            params_elements(&m->params), m->B * m->T, PRECISION_NAME);
    for (int i = 0; i < memory->kinds; i++)
        fprintf(out, "  %-18s %10.1f MiB\n", memory->name[i], memory->bytes[i] / 1048576.0);
    fprintf(out, "  %-18s %10.1f MiB\n", "memory in all", memory_total(memory) / 1048576.0);
    fprintf(out, "  %-18s %10.1f MiB\n", "and on the host", m->host_bytes / 1048576.0);
    params_print_ranks(out, &m->params, m->micro_steps, STATS - STAT_NORMS + m->micro_steps,
                       (int)m->cfg->adam_every);
}

static void print_roofline(FILE* out, const Model* m) {
    static RooflineModel model;
    static Roofline roofline;
    const Settings* cfg = m->cfg;
    const Params* ps = &m->params;
    RooflineModel* r = &model;
    r->B = m->B, r->T = m->T, r->C = m->C, r->H = m->H, r->D = m->D, r->F = m->F;
    r->V = loss_stride(m->V);
    r->table_rows = m->rows;
    for (int l = 0; l < m->L; l++) {
        Layer plan = m->plan[l];
        r->attention_layers += plan.attention;
        r->mlp_layers += plan.mlp;
        r->long_layers += plan.attention && (plan.long_window || cfg->windows == FLAG_WINDOWS_NONE);
        r->x0_mixes += plan.mlp && cfg->x0_mix;
        r->value_mixes += plan.attention && l > 0 && cfg->value_residual;
        r->value_uses += plan.value_table >= 0;
        r->skips += plan.skip_from >= 0;
    }
    roofline_keys(cfg, true, &r->long_keys, &r->long_tile_keys);
    roofline_keys(cfg, false, &r->short_keys, &r->short_tile_keys);
    r->keys_from = cfg->document_mask ? ROOFLINE_DOCUMENTS : NULL;
    r->embed_norm = cfg->embed_norm, r->attention_gate = cfg->attention_gate;
    r->smear = cfg->smear, r->fp8_head = cfg->fp8_head;
    r->value_tables = m->value_tables;
    r->skips += cfg->backout >= 0;
    r->ns_steps = (int)cfg->ns_steps;
    r->micro_steps = m->micro_steps, r->ranks = ps->zero.world;
    r->steps = cfg->steps, r->batch_tokens = cfg->batch_tokens;
    for (int b = 0; b < BANKS; b++) {
        const Bank* bank = &ps->banks[b];
        if (bank->n == 0) continue;
        bool state = bank->adam && (bank->bf16 || cfg->bf16_state);
        int every = bank->adam ? (int)cfg->adam_every : 1;
        r->reduce_bytes += (double)zero_reduce_bytes(&ps->zero, &bank->zero) / every;
        r->gather_bytes += (double)zero_gather_bytes(&ps->zero, &bank->zero) / every;
        r->banks[r->bank_count++] = {bank->name, bank->copies, bank->rows, bank->cols,
                                     (int64_t)bank->owned, !bank->adam, bank->second > 0,
                                     !(bank->bf16 && bank->kind == TABLE), state, every};
    }
    roofline_build(&roofline, r);
    roofline_print(out, &roofline, cfg->gpu);
}

// What the table said against what the system counted: on the CPU the device's memory is the
// process's own.
static void note_memory(const Model* m, Log* log) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    log_note(log, "memory: %.1f MiB by the table, process peak %.1f MiB",
             (memory_total(&m->memory) + m->host_bytes) / 1048576.0, usage.ru_maxrss / 1024.0);
}

// ---- a run ------------------------------------------------------------------------------------

enum {
    SKIPS_IN_A_ROW = 10,        // that --on-nonfinite skip puts up with
    ROLLBACKS_IN_A_ROW = 3      // of rollback, without a step behind the one that went wrong
};

typedef struct Run {
    const Settings* cfg;
    Model* m;
    Loader* data;
    ValLoader* val;
    TextCodec* codec;
    Log* log;
    Ranks* ranks;
    Saving saving;
    char *flags, *recipe;       // as text
    char shards[512];           // what there is to train on
    Clock clock;                // runs for training only, not for validation, samples and files
    Window losses, norms;       // of the last steps
    int64_t step;               // steps that the device has been given
    int64_t looked;             // of them, those whose result is known here: all, or all but one
    int64_t epoch;
    bool stop;                  // a rank has had a signal; like all below the same on every rank
    int status;                 // of the exit; -1: the run goes on
    int skips, rollbacks;       // in a row
    int64_t farthest;           // step that was gone back from
    double loss, val_loss;      // the last ones
} Run;

static volatile sig_atomic_t interrupted;    // by this signal
static void on_interrupt(int number) {
    if (interrupted && number == SIGINT) _exit(STATUS_AT_ONCE);     // asked twice
    interrupted = number;
}

// What the checkpoint of step r->step says besides tensors.
static CheckpointInfo run_info(const Run* r) {
    const Model* m = r->m;
    CheckpointInfo info = {};
    info.step = r->step;
    info.tokens = r->step * r->cfg->batch_tokens;
    info.train_seconds = clock_seconds(&r->clock);
    info.ranks = r->ranks->world;
    info.zero = (int)r->cfg->zero;
    snprintf(info.commit, sizeof info.commit, "%s", GIT_COMMIT);
    snprintf(info.precision, sizeof info.precision, "%s", PRECISION_NAME);
    snprintf(info.target, sizeof info.target, "%s", TARGET_NAME);
    snprintf(info.tokenizer_hash, sizeof info.tokenizer_hash, "%s", r->codec->hash);
    info.flags = r->flags;
    info.recipe = r->recipe;
    info.shards = r->shards;
    LoaderPosition at = loader_position(r->data);
    int64_t position[] = {at.step, at.micro, at.epoch, at.shard, at.offset};
    memcpy(info.position, position, sizeof position);
    info.seed = r->cfg->seed;
    info.lr_mult = m->now.lr_mult;
    info.muon_momentum = m->now.muon_momentum;
    info.window_long = m->now.window_long;
    info.window_short = m->now.window_short;
    info.adam_step = m->now.adam_step;
    info.loss = r->losses;
    info.grad_norm = r->norms;
    info.val_loss = r->val_loss;
    info.train_loss = r->loss;
    return info;
}

// Rank 0 first: it moves the logs of all ranks out of the way. `step`: of the checkpoint whose run
// is gone on with, or -1.
static void run_open_log(Log* log, const Settings* cfg, Ranks* ranks, int64_t step) {
    if (ranks->rank == 0) log_open(log, cfg, ranks->rank, ranks->world, step);
    ranks_barrier(ranks);
    if (ranks->rank > 0) log_open(log, cfg, ranks->rank, ranks->world, step);
}

// The model, the step and what was measured are those of the checkpoint; not the data.
static void run_restore(Run* r, Checkpoint* from) {
    Model* m = r->m;
    r->step = r->looked = r->saving.step = from->info.step;
    r->saving.failed = false;
    r->losses = from->info.loss;
    r->norms = from->info.grad_norm;
    r->val_loss = from->info.val_loss;
    r->loss = from->info.train_loss;
    model_at(m, r->step);
    state_load(&m->params, from, m->pending);
    CUDA_CHECK(cudaMemset(m->guard, 0, sizeof(float)));
}

static LoaderPosition run_position(const Checkpoint* from) {
    const int64_t* at = from->info.position;
    return {at[0], at[1], at[2], at[3], at[4]};
}

// The directory of the checkpoint to go on from; "": --resume auto finds none. All ranks call it.
static void run_find(Ranks* ranks, const char* out, const char* resume, char* path, size_t size) {
    static char report[8192];
    static Checkpoint found;
    memset(path, 0, size);
    if (ranks->rank == 0 && strcmp(resume, "auto") != 0) snprintf(path, size, "%s", resume);
    if (ranks->rank == 0 && strcmp(resume, "auto") == 0) {
        bool valid = checkpoint_newest(&found, out, report, sizeof report);
        REQUIRE(valid || !report[0], "--resume auto: none of the checkpoints in %s is valid:\n%s\n"
                "begin anew with another --out, or take these away", out, report);
        if (report[0]) fprintf(stderr, "%s: --resume auto passes over\n%s\n", program_name, report);
        if (valid) snprintf(path, size, "%s", found.directory);
        if (valid) checkpoint_close(&found);
    }
    ranks_broadcast(ranks, path, size);
}

// What of a checkpoint forbids to go on from it with these flags, and what is only worth a note.
static void run_compare(const Settings* cfg, const Checkpoint* from, const TextCodec* codec,
                        const char* shards, char* taken, size_t size) {
    char refused[3000];
    const CheckpointInfo* info = &from->info;
    const char* path = from->directory;
    REQUIRE(size >= sizeof refused, "run_compare: %zu bytes", size);
    int count = settings_differences(refused, taken, sizeof refused, cfg, info->flags, path);
    REQUIRE(count >= 0, "--resume: %s", refused);
    REQUIRE(count == 0, "--resume: %s was made with other flags, and another value makes another "
            "run:\n%sgive the checkpoint's values; or --load %s --out ANOTHER begins a new run "
            "from its weights", path, refused, path);
    REQUIRE(strcmp(info->precision, PRECISION_NAME) == 0,
            "%s: saved in %s, this program computes in %s\nbuild it with PRECISION=%s", path,
            info->precision, PRECISION_NAME, info->precision);
    REQUIRE(strcmp(info->shards, shards) == 0,
            "%s: it was trained on other shards; it had\n%s--train finds\n%s", path, info->shards,
            shards);
    REQUIRE(!info->tokenizer_hash[0] || !codec->hash[0] ||
                strcmp(info->tokenizer_hash, codec->hash) == 0,
            "%s: its tokenizer has hash %s, that of --tokenizer %s", path, info->tokenizer_hash,
            codec->hash);
}

// Goes on where the checkpoint ended.
static void run_resume(Run* r, Checkpoint* from, char* taken) {
    const CheckpointInfo* info = &from->info;
    LoaderPosition at = run_position(from);
    run_restore(r, from);
    loader_restore(r->data, &at);
    r->epoch = r->data->position.epoch;
    r->clock.total = info->train_seconds;
    log_note(r->log, "resumed from %s: step %" PRId64 ", saved by %d rank%s, commit %s, %s",
             from->directory, info->step, info->ranks, info->ranks == 1 ? "" : "s", info->commit,
             info->target);
    char* end = strrchr(taken, '\n');
    if (end) *end = 0;
    if (taken[0]) log_note(r->log, "flags that differ from the checkpoint's:\n%s", taken);
}

// ---- a step of a run ---------------------------------------------------------------------------

static void run_step(Run* r) {
    Model* m = r->m;
    StepSlot* slot = &m->slots[r->step % 2];
    model_at(m, r->step);
    clock_start(&r->clock);
    trace_step(r->step + 1);
    slot->step = r->step + 1;
    slot->now = m->now;
    slot->from = loader_position(r->data);
    for (int micro = 0; micro < m->micro_steps; micro++) {
        batch_wait(m);
        const Batch* batch = loader_next(r->data);
        micro_step(m, batch, micro);
    }
    slot->to = loader_position(r->data);
    slot->stats[STAT_STOP] = interrupted != 0;
    saving_votes(&r->saving, slot->stats + STAT_VOTES);
    step_measure(m, slot);
    update(m);
    r->step++;
}

// "3 in h.5.mlp.c_fc.weight, ..": what this rank owns and is not finite, of segments from..to-1.
// The last layers first: backward comes from there, so what went wrong is at the top of the list.
static size_t segments_text(char* text, size_t size, const Model* m, const StepSlot* slot, int from,
                            int to, const char* what) {
    size_t at = 0;
    int named = 0, tensors = 0;
    for (int layer = MAX_LAYERS; layer >= 0; layer--) {
        for (int i = from; i < to; i++) {
            const Tensor* tensor = &m->params.tensors[m->segment_tensor[i]];
            float sum = slot->norms[2 * i], bad = slot->norms[2 * i + 1];
            if (tensor->layer != layer || (isfinite(sum) && bad == 0.0f)) continue;
            tensors++;
            if (named == 4 || at + 160 > size) continue;
            at += snprintf(text + at, size - at, "%s%.0f in %s", named++ ? ", " : what, bad,
                           tensor->name);
        }
    }
    if (tensors > named) at += snprintf(text + at, size - at, " and in %d more", tensors - named);
    if (tensors) at += snprintf(text + at, size - at, "\n");
    return at;
}

// Where the step's numbers are not finite: all ranks call it, rank 0 gets the text.
static void run_report(const Run* r, const StepSlot* slot, const StepStats* stats, char* text,
                       size_t size) {
    enum { SIZE = 1024 };
    const Model* m = r->m;
    char mine[SIZE] = "", *all = (char*)host_alloc((size_t)r->ranks->world, SIZE);
    int measured = slot->now.adam_now ? m->segments : m->muon_segments;
    int weights = m->weight_segments;
    size_t n = segments_text(mine, SIZE / 2, m, slot, 0, weights, "weights not finite: ");
    segments_text(mine + n, SIZE - n, m, slot, weights, measured, "gradients not finite: ");
    ranks_gather(r->ranks, r->ranks->rank ? NULL : all, mine, SIZE);
    const Shards* shards = &r->data->shards;
    n = snprintf(text, size, "step %" PRId64 " is not finite: loss %g, gradient norm %g, weight "
                 "norm %g (last loss %g)\n", slot->step, stats->loss, stats->grad_norm,
                 stats->weight_norm, r->loss);
    for (int micro = 0; micro < m->micro_steps && n < size; micro++)
        if (!isfinite(slot->stats[STATS + micro]))
            n += snprintf(text + n, size - n, "the loss of micro-step %d of %d is %g\n", micro + 1,
                          m->micro_steps, slot->stats[STATS + micro]);
    for (int p = 0; p < r->ranks->world && r->ranks->rank == 0 && n < size; p++)
        if (all[p * SIZE]) n += snprintf(text + n, size - n, "rank %d: %s", p, all + p * SIZE);
    if (n < size)
        snprintf(text + n, size - n, "its data begins at token %" PRId64 " of %s, epoch %" PRId64
                 "\n", slot->from.offset, shards->paths[slot->from.shard], slot->from.epoch);
    free(all);
}

// Back to the newest checkpoint, and on with the data behind the step. False: it cannot be.
static bool run_back(Run* r, const StepSlot* slot, char* why, size_t size) {
    static Checkpoint from;
    char path[CHECKPOINT_PATH], problem[512];
    LoaderPosition behind = slot->to;
    saving_settle(&r->saving);
    CUDA_CHECK(cudaStreamSynchronize(r->m->stream));
    if (slot->step > r->farthest) r->rollbacks = 0;
    if (slot->step > r->farthest) r->farthest = slot->step;
    run_find(r->ranks, r->cfg->out, "auto", path, sizeof path);
    snprintf(why, size, "there is no checkpoint to go back to");
    if (!path[0]) return false;
    snprintf(why, size, "went back %d times and came no farther", ROLLBACKS_IN_A_ROW);
    if (++r->rollbacks > ROLLBACKS_IN_A_ROW) return false;
    if (!checkpoint_try_open(&from, path, false, problem, sizeof problem))
        die("%s: %s", path, problem);
    run_restore(r, &from);
    loader_restore(r->data, &behind);
    r->epoch = behind.epoch;
    log_close(r->log);      // what is now done again is not to stand there twice
    run_open_log(r->log, r->cfg, r->ranks, r->step);
    snprintf(why, size, "back at step %" PRId64 " (%s), on with the data behind", r->step, path);
    checkpoint_close(&from);
    return true;
}

// Nothing has been updated from the step. Either the run ends, or what it does instead is said.
static void run_not_finite(Run* r, const StepSlot* slot, const StepStats* stats) {
    char text[4096], why[2200] = "";
    const float* norms = slot->stats + STAT_NORMS;
    bool weights = !isfinite(norms[2]) || norms[3] != 0.0f, goes_on = false;
    run_report(r, slot, stats, text, sizeof text);
    switch (r->cfg->on_nonfinite) {
        case FLAG_NONFINITE_STOP:
            snprintf(why, sizeof why, "stopped before the update; nothing was saved over");
            break;
        case FLAG_NONFINITE_SKIP:
            goes_on = !weights && ++r->skips <= SKIPS_IN_A_ROW;
            snprintf(why, sizeof why, "%s", goes_on ? "left out" : weights
                     ? "stopped: weights do not become finite again"
                     : "stopped: too many steps in a row were left out");
            break;
        case FLAG_NONFINITE_ROLLBACK: goes_on = run_back(r, slot, why, sizeof why); break;
    }
    bool asked = r->cfg->on_nonfinite == FLAG_NONFINITE_STOP;
    log_warn(r->log, "%s%s%s%s", text, why,
             goes_on ? "" : "\ntry a lower learning rate, or look at that data",
             asked ? "; --on-nonfinite skip or rollback goes on by itself" : "");
    if (!goes_on) r->status = STATUS_NOT_FINITE;
}

// A save that failed is the end, if so asked.
static void run_judge_save(Run* r) {
    if (r->saving.failed && r->cfg->on_save_error == FLAG_SAVE_ERROR_STOP) r->status = STATUS_ERROR;
}

// Looks at the oldest step that has not been looked at.
static void run_look(Run* r) {
    StepSlot* slot = &r->m->slots[r->looked % 2];
    StepStats stats = step_result(r->m, slot);
    LogStep line = {};
    r->looked++;
    r->stop = r->stop || stats.stop;
    saving_count(&r->saving, slot->stats + STAT_VOTES);
    run_judge_save(r);
    line.step = slot->step;
    line.train_s = clock_seconds(&r->clock);
    if (!stats.finite) run_not_finite(r, slot, &stats);
    if (!stats.finite && r->cfg->on_nonfinite != FLAG_NONFINITE_SKIP) return;
    line.loss = stats.loss;
    line.lr_mult = slot->now.lr_mult;
    line.muon_momentum = slot->now.muon_momentum;
    line.grad_norm = stats.grad_norm;
    line.weight_norm = stats.weight_norm;
    line.tokens = slot->step * r->cfg->batch_tokens;
    line.skipped = !stats.finite;
    line.loss_z = window_z(&r->losses, stats.loss);
    line.grad_norm_z = window_z(&r->norms, stats.grad_norm);
    if (stats.finite) {
        window_push(&r->losses, stats.loss);
        window_push(&r->norms, stats.grad_norm);
        r->loss = stats.loss;
        r->skips = 0;
    }
    if (slot->to.epoch != r->epoch)
        log_note(r->log, "step %" PRId64 ": epoch %" PRId64 " of the data begins", slot->step,
                 slot->to.epoch + 1);
    r->epoch = slot->to.epoch;
    log_train(r->log, &line);
}

// Until nothing is under way; the clock stands still afterwards.
static void run_drain(Run* r) {
    while (r->looked < r->step && r->status < 0) run_look(r);
    CUDA_CHECK(cudaStreamSynchronize(r->m->stream));
    clock_stop(&r->clock);
}

// ---- train ------------------------------------------------------------------------------------

static bool every(int64_t steps, int64_t step) { return steps && step && step % steps == 0; }

// What is due between two steps, with nothing under way.
static void run_pause(Run* r, bool end) {
    const Settings* cfg = r->cfg;
    Model* m = r->m;
    bool stop = r->stop && !end, saved = r->saving.step == r->step && !r->saving.failed;
    bool save = stop || every(cfg->checkpoint_every, r->step) || (end && cfg->checkpoint_every);
    model_at(m, r->step);
    if (end) {      // first: a second Ctrl-C must not cost the weights
        char path[TEXT_SIZE + 32];
        snprintf(path, sizeof path, "%s/model.safetensors", cfg->out);
        weights_save(m, path, r->step, r->codec);
    }
    if (!stop && (end || r->step % cfg->val_every == 0)) {
        r->val_loss = evaluate(m, r->val);
        log_val(r->log, r->step, r->val_loss, clock_seconds(&r->clock));
    }
    if (save && !saved) {
        saving_settle(&r->saving);
        run_judge_save(r);      // the one before may have failed
        if (r->status >= 0) return;
        CheckpointInfo info = run_info(r);
        saving_begin(&r->saving, &info, m->pending);
    }
    if (stop) return;
    bool due = end || every(cfg->sample_every, r->step);
    if (due && cfg->sample_tokens && m->params.zero.rank == 0) sample(m, r->codec, r->log, r->step);
}

static void run_finish(Run* r) {
    const Settings* cfg = r->cfg;
    saving_settle(&r->saving);
    note_memory(r->m, r->log);
    log_note(r->log, "data: waited %.3f s for batches, of %.1f s of training", r->data->waited,
             clock_seconds(&r->clock));
    log_result(r->log, r->val_loss, clock_seconds(&r->clock), r->step * cfg->batch_tokens);
    r->status = STATUS_DONE;
    run_judge_save(r);
}

static void run_stopped(Run* r) {
    char path[TEXT_SIZE + 64];
    saving_settle(&r->saving);
    r->status = r->saving.failed ? STATUS_ERROR : STATUS_AGAIN;
    checkpoint_path(path, sizeof path, r->cfg->out, r->step);
    if (!r->saving.failed)
        log_note(r->log, "stopped by a signal after step %" PRId64 " of %" PRId64 ": %s is saved; "
                 "the same command with --resume auto goes on", r->step, r->cfg->steps, path);
}

// Trains to the end, or as far as it goes. Returns the exit status.
static int train(Run* r) {
    const Settings* cfg = r->cfg;
    while (r->status < 0) {
        bool over = r->step < cfg->steps && !r->stop && loader_over(r->data);
        bool end = r->step == cfg->steps || over;
        int64_t step = r->step;
        if (end || r->stop || step % cfg->val_every == 0 || every(cfg->sample_every, step) ||
            every(cfg->checkpoint_every, step)) {
            run_drain(r);
            if (r->status >= 0) break;
            if (r->step != step) continue;      // gone back
            if (over)
                log_note(r->log, "the data of --epochs %" PRId64 " ends after step %" PRId64 " of %"
                         PRId64 ": --epochs 0 repeats it as often as the steps need", cfg->epochs,
                         step, cfg->steps);
            run_pause(r, end);
            if (r->status >= 0) break;
            if (end) run_finish(r);
            else if (r->stop) run_stopped(r);
            if (r->status >= 0) break;
        }
        run_step(r);
        if (r->step - r->looked > 1) run_look(r);
    }
    saving_settle(&r->saving);
    return r->status;
}

// ---- main -------------------------------------------------------------------------------------

#ifndef TRAIN_GPT2_NO_MAIN
static Model model;

static bool model_failed(char* what, size_t size) {
    return zero_failed(&model.params.zero, what, size);
}

// Ranks of different flags, programs or data would train on without a sign of it.
static void compare_settings(Ranks* ranks, const Settings* cfg) {
    char text[FLAG_COUNT * (TEXT_SIZE + 64)];
    settings_text(text, sizeof text - 64, cfg);
    snprintf(text + strlen(text), 64, "program = %016" PRIx64 "\n", file_hash("/proc/self/exe"));
    ranks_compare(ranks, text);
}
// Takes the directory of the run, and finds what to go on from. Returns the step whose log the run
// goes on with, or -1; from->info is of step 0 and no flags where it starts from the beginning.
static int64_t run_open(Ranks* ranks, const Settings* cfg, OutLock* lock, Checkpoint* from) {
    bool automatic = strcmp(cfg->resume, "auto") == 0;
    char path[CHECKPOINT_PATH] = "", problem[512];
    int64_t own = -1;
    if (ranks->rank == 0) out_claim(lock, cfg->out);
    if (cfg->resume[0]) run_find(ranks, cfg->out, cfg->resume, path, sizeof path);
    // One rank looks at every byte, if it has not just done so; all check what they read.
    bool every_byte = ranks->rank == 0 && !automatic;
    if (path[0] && !checkpoint_try_open(from, path, every_byte, problem, sizeof problem))
        die("--resume: %s: %s\n--resume auto takes the newest valid one in --out", path, problem);
    if (ranks->rank == 0 && path[0] && out_owns(cfg->out, path)) {
        own = from->info.step;
        int64_t newest = out_contents(cfg->out).checkpoint;
        REQUIRE(automatic || newest <= own, "--resume %s: --out %s has later checkpoints, the last "
                "of step %" PRId64 "\n--resume auto goes on from it; or give another --out, to "
                "branch off here", path, cfg->out, newest);
    } else if (ranks->rank == 0) {
        out_require_fresh(cfg->out, automatic);
    }
    ranks_broadcast(ranks, &own, sizeof own);
    return own;
}

// Trains from the start, or from a checkpoint; returns the exit status.
static int run(const Settings* cfg, TextCodec* codec, Ranks* ranks) {
    static Run run;
    static Loader data;
    static ValLoader val;
    static Checkpoint from;
    static OutLock lock;
    static Log log;
    static char taken[4096];
    int rank = ranks->rank, world = ranks->world, *batches = NULL;    // the loader's slots, pinned
    on_signal(SIGINT, on_interrupt);      // heard at the latest after the first step
    on_signal(SIGTERM, on_interrupt);
    on_signal(SIGUSR1, on_interrupt);
    int64_t own = run_open(ranks, cfg, &lock, &from);
    bool resumed = from.info.flags != NULL;
    run.cfg = cfg, run.m = &model, run.data = &data, run.val = &val, run.codec = codec;
    run.log = &log, run.ranks = ranks;
    run.status = -1;
    run.loss = run.val_loss = NAN;
    run.flags = flags_json(cfg);
    run.recipe = recipe_text(cfg->recipe);

    // What is wrong with the data shows before the long part.
    zero_choose_device(ranks);
    LoaderSpec spec = loader_spec(cfg, rank, world);
    spec.watch = trace_host;
    CUDA_CHECK(cudaMallocHost((void**)&batches, loader_memory(spec.B, spec.T) * sizeof(int)));
    loader_open(&data, &spec, batches);
    int val_B = (int)(cfg->val_batch ? cfg->val_batch : cfg->micro_batch);
    int val_T = (int)(cfg->val_seq_len ? cfg->val_seq_len : cfg->seq_len);
    val_open(&val, cfg->val, cfg->val_tokens, val_B, val_T, rank, world, spec.vocab);
    char val_shards[sizeof run.shards];
    shards_text(run.shards, sizeof run.shards, "training", &data.shards);
    shards_text(val_shards, sizeof val_shards, "validation", &val.shards);
    ranks_compare(ranks, run.shards);
    ranks_compare(ranks, val_shards);
    if (resumed) run_compare(cfg, &from, codec, run.shards, taken, sizeof taken);

    run_open_log(&log, cfg, ranks, own);
    ranks_watch(ranks, cfg->out, NULL);
    trace_steps = cfg->trace_steps;
    trace_open(cfg->trace, rank, world);
    model_build(&model, cfg, rank, world);
    if (rank == 0) settings_print(stdout, cfg);
    if (rank == 0) print_model(stdout, &model);
    model_start(&model, ranks);
    ranks_watch(ranks, cfg->out, model_failed);      // from now on there is something to ask
    saving_open(&run.saving, &model.params, ranks, &log, cfg);
    if (rank == 0) loader_describe(stdout, &data);
    if (resumed) run_resume(&run, &from, taken);
    else if (cfg->load[0]) params_load(&model.params, cfg->load);
    if (resumed) checkpoint_close(&from);
    int status = train(&run);

    trace_close();
    log_end(&log, status);
    log_close(&log);
    ranks_watch(ranks, cfg->out, NULL);      // there is soon no model to ask
    saving_close(&run.saving);
    loader_close(&data);
    val_close(&val);
    CUDA_CHECK(cudaFreeHost(batches));
    model_free(&model);
    free(run.flags);
    free(run.recipe);
    if (rank == 0) out_release(&lock);
    return status;
}

int main(int argc, char** argv) {
    static Settings cfg;
    static ModelFile saved;
    static TextCodec codec;
    static Ranks ranks;
    int status = STATUS_DONE;
    ranks_start(&ranks, &argc, &argv);
    int rank = ranks.rank, world = ranks.world;
    if (settings_want_help(argc, argv)) {
        if (rank == 0) settings_help(stdout);
        ranks_stop(&ranks);
        return STATUS_DONE;
    }
    settings_parse(&cfg, argc, argv);
    settings_load(&cfg, &saved, argc, argv);
    text_open(&codec, cfg.tokenizer, (int)(cfg.table_rows ? cfg.table_rows : cfg.vocab),
              (int)cfg.end_of_text, saved.tokenizer_hash, cfg.load);
    cfg.end_of_text = codec.end_of_text;
    bool sample_only = cfg.load[0] && !cfg.train[0];
    if (cfg.dry_run && cfg.ranks) world = (int)cfg.ranks;
    REQUIRE(!sample_only || world == 1, "--load without --train samples on one rank, found %d\n"
            "start one process", world);
    settings_check(&cfg, world);
    if (cfg.gpu[0]) roofline_gpu(cfg.gpu);     // an unknown one ends here
    compare_settings(&ranks, &cfg);
    if (cfg.dry_run) {
        model_build(&model, &cfg, rank, world);
        if (rank == 0 && !sample_only) settings_print(stdout, &cfg);
        if (rank == 0 && !sample_only) print_model(stdout, &model);
        if (rank == 0 && cfg.gpu[0]) print_roofline(stdout, &model);
    } else if (sample_only) {
        zero_choose_device(&ranks);
        model_build(&model, &cfg, rank, world);
        model_start(&model, &ranks);
        params_load(&model.params, cfg.load);
        model_at(&model, saved.step);
        sample(&model, &codec, NULL, 0);
        model_free(&model);
    } else {
        status = run(&cfg, &codec, &ranks);
    }
    text_close(&codec);
    ranks_stop(&ranks);
    return status;
}
#endif
