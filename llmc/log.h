/*
What a run leaves behind in OUT, and what it shows meanwhile.

log.txt     the commit and the flags, then
                step:S/N val_loss:V train_time:Tms step_avg:Ams
                step:S/N train_loss:L train_time:Tms step_avg:Ams
            S updates have been made: a val_loss is of the parameters after S updates; a train_loss
            is of the batch of the S-th update, before it. T is training time alone: the clock
            stands still during validation, samples and files. A = T/S. The last line of a finished
            run is
                RESULT val_loss:V target:3.28 reached:yes|no train_time:Tms tokens:K seed:X commit:C
log.jsonl   the same as one JSON object per line, with everything that is known. What is not finite
            is null.

log.rankR.txt   the same as log.txt, of rank R > 0: what it did last, if it is lost

All are flushed line by line, so a killed run has its log up to the last step. Logs of an earlier
run in OUT are kept under the next free number. On a terminal one line in place shows the progress;
into a file or a pipe go the lines of log.txt.

test        test/test_services.c: log
*/
#pragma once
#include "flags.h"
#include "text.h"

#include <sys/stat.h>
#include <time.h>

#ifndef GIT_COMMIT
#define GIT_COMMIT "unknown"
#endif

#define TARGET_LOSS 3.28    // the speedrun's, on 10,485,760 tokens of FineWeb

// ---- clock ---------------------------------------------------------------------------------

typedef struct Clock {
    double started;             // 0: it stands still
    double total;               // seconds up to the last stop
} Clock;

static inline double clock_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static inline double clock_seconds(const Clock* c) {
    return c->total + (c->started ? clock_now() - c->started : 0);
}

static inline void clock_start(Clock* c) {
    if (!c->started) c->started = clock_now();
}

static inline double clock_stop(Clock* c) {
    c->total = clock_seconds(c);
    c->started = 0;
    return c->total;
}

// ---- files ---------------------------------------------------------------------------------

typedef struct Log {
    FILE* text;
    FILE* json;
    char directory[TEXT_SIZE];
    int64_t steps;
    int64_t seed;
    int rank;                   // those behind the first keep a log.rankR.txt and say nothing else
    bool terminal;              // stdout is one
    bool in_progress;           // the progress line is on the screen
} Log;

static inline void make_directory(const char* path) {
    char part[TEXT_SIZE];
    snprintf(part, sizeof part, "%s", path);
    for (char* c = part + 1;; c++) {
        if (*c != '/' && *c != 0) continue;
        char kept = *c;
        *c = 0;
        REQUIRE(mkdir(part, 0777) == 0 || errno == EEXIST, "--out %s: %s cannot be created: %s",
                path, part, strerror(errno));
        if (kept == 0) break;
        *c = kept;
    }
    struct stat info;
    REQUIRE(stat(path, &info) == 0 && S_ISDIR(info.st_mode),
            "--out %s is there and not a directory", path);
}

static inline void log_path(char* path, size_t size, const Log* log, int number,
                            const char* ending) {
    if (number) snprintf(path, size, "%s/log.%d.%s", log->directory, number, ending);
    else snprintf(path, size, "%s/log.%s", log->directory, ending);
}

// A free number for log.N.txt and log.N.jsonl; the logs of an earlier run move there.
static inline void log_keep_earlier(const Log* log) {
    static const char* const ENDINGS[] = { "txt", "jsonl" };
    char path[TEXT_SIZE + 64], kept[TEXT_SIZE + 64];
    int number = 1;
    for (bool taken = true; taken; number += taken) {
        taken = false;
        for (int i = 0; i < 2; i++) {
            log_path(kept, sizeof kept, log, number, ENDINGS[i]);
            taken = taken || access(kept, F_OK) == 0;
        }
    }
    for (int i = 0; i < 2; i++) {
        log_path(path, sizeof path, log, 0, ENDINGS[i]);
        log_path(kept, sizeof kept, log, number, ENDINGS[i]);
        REQUIRE(rename(path, kept) == 0 || errno == ENOENT, "%s: cannot be moved to %s: %s", path,
                kept, strerror(errno));
    }
}

static inline FILE* log_create(const Log* log, const char* ending) {
    char path[TEXT_SIZE + 64];
    log_path(path, sizeof path, log, 0, ending);
    // To be written at its end: the watch over the ranks adds its last words by a way of its own.
    FILE* file = unlink(path) == 0 || errno == ENOENT ? fopen(path, "a") : NULL;
    REQUIRE(file, "%s: cannot be created: %s", path, strerror(errno));
    return file;
}

// A log that cannot be written is an error: an hour later its run would be worth nothing.
static inline void log_flush(Log* log) {
    REQUIRE(fflush(log->text) == 0 && fflush(log->json) == 0, "%s: the log cannot be written: %s",
            log->directory, strerror(errno));
}

static inline void log_open(Log* log, const Settings* s, int rank, int world) {
    memset(log, 0, sizeof *log);
    log->rank = rank;
    snprintf(log->directory, sizeof log->directory, "%s", s->out);
    log->steps = s->steps;
    log->seed = s->seed;
    // mpirun gives its ranks a terminal of its own, whatever it writes to itself.
    log->terminal = world == 1 && isatty(STDOUT_FILENO);
    make_directory(s->out);
    if (rank == 0) {
        log_keep_earlier(log);
        log->text = log_create(log, "txt");
        log->json = log_create(log, "jsonl");
    } else {
        char ending[32];
        snprintf(ending, sizeof ending, "rank%d.txt", rank);
        log->text = log_create(log, ending);
        log->json = fopen("/dev/null", "w");
        REQUIRE(log->json, "/dev/null cannot be opened: %s", strerror(errno));
    }
    char date[32];
    time_t now = time(NULL);
    struct tm utc;
    strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &utc));
    fprintf(log->text, "%s commit %s, %s\n", program_name, GIT_COMMIT, date);
    settings_print(log->text, s);
    fprintf(log->json, "{\"event\":\"start\",\"time\":\"%s\",\"commit\":\"%s\",\"settings\":", date,
            GIT_COMMIT);
    settings_json(log->json, s);
    fputs("}\n", log->json);
    log_flush(log);
}

static inline void log_close(Log* log) {
    log_flush(log);
    fclose(log->text);
    fclose(log->json);
    memset(log, 0, sizeof *log);
}

// ---- lines ---------------------------------------------------------------------------------

static inline void log_clear_progress(Log* log) {
    if (log->in_progress) fputs("\r\033[K", stdout);
    log->in_progress = false;
}

// One line into log.txt and, where it belongs there, onto the screen.
static inline void log_line(Log* log, bool screen, const char* fmt, ...)
    __attribute__((format(printf, 3, 4)));

static inline void log_line(Log* log, bool screen, const char* fmt, ...) {
    char line[1024];
    va_list args;
    va_start(args, fmt);
    vsnprintf(line, sizeof line, fmt, args);
    va_end(args);
    fprintf(log->text, "%s\n", line);
    if (screen && log->rank == 0) {
        log_clear_progress(log);
        puts(line);
        fflush(stdout);
    }
}

static inline void log_field(Log* log, const char* name, double v) {
    fprintf(log->json, ",\"%s\":", name);
    json_real(log->json, v);
}

static inline double log_step_avg(double train_s, int64_t step) {
    return 1e3 * train_s / (double)(step > 0 ? step : 1);
}

typedef struct LogStep {
    int64_t step;               // updates made
    double loss, train_s;
    float lr_mult, muon_momentum;
    double grad_norm;           // NAN: not measured
    int64_t tokens;             // trained on so far
} LogStep;

static inline void log_progress(Log* log, const LogStep* s) {
    double left = s->train_s / (double)s->step * (double)(log->steps - s->step);
    double rate = s->train_s > 0 ? (double)s->tokens / s->train_s : 0;
    printf("\rstep %" PRId64 "/%" PRId64 "  loss %.4f  %.0f tokens/s  %" PRId64 ":%02d left\033[K",
           s->step, log->steps, s->loss, rate, (int64_t)left / 60, (int)((int64_t)left % 60));
    fflush(stdout);
    log->in_progress = true;
}

static inline void log_train(Log* log, const LogStep* s) {
    log_line(log, !log->terminal,
             "step:%" PRId64 "/%" PRId64 " train_loss:%.6f train_time:%.0fms step_avg:%.2fms",
             s->step, log->steps, s->loss, 1e3 * s->train_s, log_step_avg(s->train_s, s->step));
    fprintf(log->json, "{\"event\":\"train\",\"step\":%" PRId64 ",\"tokens\":%" PRId64, s->step,
            s->tokens);
    log_field(log, "train_loss", s->loss);
    log_field(log, "grad_norm", s->grad_norm);
    log_field(log, "lr_mult", s->lr_mult);
    log_field(log, "muon_momentum", s->muon_momentum);
    log_field(log, "train_ms", 1e3 * s->train_s);
    log_field(log, "step_avg_ms", log_step_avg(s->train_s, s->step));
    fputs("}\n", log->json);
    log_flush(log);
    if (log->terminal) log_progress(log, s);
}

static inline void log_val(Log* log, int64_t step, double val_loss, double train_s) {
    log_line(log, true,
             "step:%" PRId64 "/%" PRId64 " val_loss:%.6f train_time:%.0fms step_avg:%.2fms", step,
             log->steps, val_loss, 1e3 * train_s, log_step_avg(train_s, step));
    fprintf(log->json, "{\"event\":\"val\",\"step\":%" PRId64, step);
    log_field(log, "val_loss", val_loss);
    log_field(log, "train_ms", 1e3 * train_s);
    log_field(log, "step_avg_ms", log_step_avg(train_s, step));
    fputs("}\n", log->json);
    log_flush(log);
}

// Anything else worth a line: an epoch that ends, a file that was saved.
static inline void log_note(Log* log, const char* fmt, ...) __attribute__((format(printf, 2, 3)));

static inline void log_note(Log* log, const char* fmt, ...) {
    char note[900];
    va_list args;
    va_start(args, fmt);
    vsnprintf(note, sizeof note, fmt, args);
    va_end(args);
    log_line(log, true, "%s", note);
    fputs("{\"event\":\"note\",\"text\":", log->json);
    json_string(log->json, note, strlen(note));
    fputs("}\n", log->json);
    log_flush(log);
}

static inline void log_sample(Log* log, int64_t step, const int* tokens, int n,
                              const TextCodec* codec) {
    char* text = text_of(codec, tokens, n);
    log_clear_progress(log);
    printf("---- sample after %" PRId64 " steps ----\n%s\n----\n", step, text);
    fflush(stdout);
    fprintf(log->text, "---- sample after %" PRId64 " steps ----\n%s\n----\n", step, text);
    fprintf(log->json, "{\"event\":\"sample\",\"step\":%" PRId64 ",\"text\":", step);
    json_string(log->json, text, strlen(text));
    fputs(",\"tokens\":[", log->json);
    for (int i = 0; i < n; i++) fprintf(log->json, "%s%d", i ? "," : "", tokens[i]);
    fputs("]}\n", log->json);
    log_flush(log);
    free(text);
}

static inline void log_result(Log* log, double val_loss, double train_s, int64_t tokens) {
    const char* reached = val_loss <= TARGET_LOSS ? "yes" : "no";    // NaN has not reached it
    log_line(log, true,
             "RESULT val_loss:%.6f target:%g reached:%s train_time:%.0fms tokens:%" PRId64
             " seed:%" PRId64 " commit:%s",
             val_loss, TARGET_LOSS, reached, 1e3 * train_s, tokens, log->seed, GIT_COMMIT);
    fputs("{\"event\":\"result\"", log->json);
    log_field(log, "val_loss", val_loss);
    log_field(log, "target", TARGET_LOSS);
    fprintf(log->json, ",\"reached\":%s", val_loss <= TARGET_LOSS ? "true" : "false");
    log_field(log, "train_ms", 1e3 * train_s);
    fprintf(log->json, ",\"tokens\":%" PRId64 ",\"seed\":%" PRId64 ",\"commit\":\"%s\"}\n", tokens,
            log->seed, GIT_COMMIT);
    log_flush(log);
}
