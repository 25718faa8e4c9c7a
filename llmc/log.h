/*
What a run leaves behind in OUT, and what it shows meanwhile.

log.txt     the commit and the flags, then
                step:S/N val_loss:V train_time:Tms step_avg:Ams
                step:S/N train_loss:L train_time:Tms step_avg:Ams
            S updates have been made: a val_loss is of the parameters after S updates; a train_loss
            is of the batch of the S-th update, before it; " skipped" behind it: that update was
            left out. T is training time alone: the clock stands still during validation, samples
            and files. A = T/S. The last line of a finished run is
                RESULT val_loss:V target:3.28 reached:yes|no train_time:Tms tokens:K seed:X commit:C
log.jsonl   the same as one JSON object per line, with everything that is known. What is not finite
            is null. Events: start, train, val, sample, checkpoint, note, warning, result, and as
            the last word of a run that was not killed: end, with its exit status.

log.rankR.txt   the same as log.txt, of rank R > 0: what it did last, if it is lost

All are flushed line by line, so a killed run has its log up to the last step. The logs of an
earlier run in OUT are kept under the next free number, log.K.txt. A resumed run keeps them, too,
and its own open with their lines up to the checkpoint: what was done after it is done again, with
the validation and the sample that are due at its very step. On a terminal one line in place shows
the progress; into a file or a pipe go the lines of log.txt.

Where a log cannot be written (a full disk) the run ends, or with --on-save-error go says so once
and keeps the lines until they can be.

test        test/test_services.c: log
*/
#pragma once
#include "flags.h"
#include "out.h"
#include "text.h"

#ifndef GIT_COMMIT
#define GIT_COMMIT "unknown"
#endif

#define TARGET_LOSS 3.28    // the speedrun's, on 10,485,760 tokens of FineWeb

// ---- clock ---------------------------------------------------------------------------------

typedef struct Clock {
    double started;             // 0: it stands still
    double total;               // seconds up to the last stop
} Clock;

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

enum { LOG_BACKLOG = 16 << 20 };    // bytes that wait for a disk with room; what is more is lost

// Lines are put together in memory and then written, so that what a full disk refuses is still
// there for the next try.
typedef struct LogFile {
    FILE* stream;               // into `lines`
    char* lines;
    size_t n, written;          // bytes of the lines; how many of them are in the file
    int fd;                     // -1: the lines are forgotten
    char path[OUT_PATH];
    size_t lost;                // bytes, of which the user has been told
    bool failing;
} LogFile;

typedef struct Log {
    FILE* text;                 // the streams of the two files
    FILE* json;
    LogFile text_file, json_file;
    char directory[TEXT_SIZE];
    int64_t steps;
    int64_t seed;
    int rank;                   // those behind the first keep a log.rankR.txt and say nothing else
    bool go_on;                 // where a log cannot be written
    bool terminal;              // stdout is one
    bool in_progress;           // the progress line is on the screen
} Log;

static inline void log_clear_progress(Log* log) {
    if (log->in_progress) fputs("\r\033[K", stdout);
    log->in_progress = false;
}

static inline FILE* log_create(LogFile* f, const char* directory, const char* name) {
    memset(f, 0, sizeof *f);
    f->stream = open_memstream(&f->lines, &f->n);
    REQUIRE(f->stream, "out of memory for the lines of a log");
    f->fd = -1;
    if (!name) return f->stream;
    snprintf(f->path, sizeof f->path, "%s/%s", directory, name);
    // To be written at its end: the watch over the ranks adds its last words by a way of its own.
    f->fd = open(f->path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    REQUIRE(f->fd >= 0, "%s: cannot be created: %s", f->path, strerror(errno));
    return f->stream;
}

// What waits is forgotten, but for the rest of a line of which the file has a part.
static inline void log_forget(LogFile* f) {
    int error = errno;
    size_t kept = f->written;
    while (kept > 0 && f->lines[kept - 1] != '\n') kept++;
    f->lost += f->n - kept;
    fseeko(f->stream, (off_t)kept, SEEK_SET);
    fflush(f->stream);
    errno = error;
}

// What waits goes into the file. False: some of it does not, errno says why.
static inline bool log_write(LogFile* f) {
    fflush(f->stream);
    while (f->fd >= 0 && f->written < f->n) {
        ssize_t n = write(f->fd, f->lines + f->written, f->n - f->written);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) {
            if (n == 0) errno = ENOSPC;
            if (f->n > LOG_BACKLOG) log_forget(f);
            return false;
        }
        f->written += (size_t)n;
    }
    f->written = 0;
    rewind(f->stream);
    fflush(f->stream);      // there are no lines now
    return true;
}

static inline void log_flush_file(Log* log, LogFile* f) {
    bool ok = log_write(f);
    int error = errno;
    REQUIRE(ok || log->go_on, "%s: the log cannot be written: %s\nmake room and start again with "
            "--resume auto; --on-save-error go would have gone on", f->path, strerror(error));
    if (ok == !f->failing) return;
    f->failing = !ok;
    char text[OUT_PATH + 256], message[OUT_PATH + 512];
    log_clear_progress(log);
    if (ok) snprintf(text, sizeof text, "%s: is written again; %zu bytes of it are lost", f->path,
                     f->lost);
    else snprintf(text, sizeof text, "%s: cannot be written: %s\ntraining goes on; its lines are "
                  "kept until they can be", f->path, strerror(error));
    if (ok) f->lost = 0;
    fflush(stdout);
    message_text(message, sizeof message, program_name, text);
    fputs(message, stderr);
}

// An hour later a run without a log would be worth less.
static inline void log_flush(Log* log) {
    log_flush_file(log, &log->text_file);
    log_flush_file(log, &log->json_file);
}

static inline void log_free_file(LogFile* f) {
    if (f->failing)
        fprintf(stderr, "%s: %s: %zu bytes of it could not be written\n", program_name, f->path,
                f->lost + f->n - f->written);
    fclose(f->stream);
    free(f->lines);
    if (f->fd >= 0) close(f->fd);
}

static inline void log_close(Log* log) {
    log_flush(log);
    log_free_file(&log->text_file);
    log_free_file(&log->json_file);
    memset(log, 0, sizeof *log);
}

// ---- logs of before ------------------------------------------------------------------------

// "log.txt", "log.jsonl", "log.rankR.txt": a log that is not yet kept under a number. Returns what
// is behind "log.", or NULL.
static inline const char* log_ending(const char* name) {
    int rank, end = 0;
    if (strcmp(name, "log.txt") == 0 || strcmp(name, "log.jsonl") == 0) return name + 4;
    if (sscanf(name, "log.rank%d.txt%n", &rank, &end) == 1 && end && !name[end]) return name + 4;
    return NULL;
}

// Whether a line of log.txt or log.jsonl tells of what comes after a checkpoint of `step` updates.
// *sample: it stands in the text of a sample, of which log.txt has several lines.
static inline bool log_line_is_later(const char* line, int64_t step, bool* sample) {
    int64_t s, steps;
    char kind[16];
    if (*sample) {
        *sample = strcmp(line, "----\n") != 0;
        return false;
    }
    if (sscanf(line, "step:%" SCNd64 "/%" SCNd64 " %15[a-z_]", &s, &steps, kind) == 3 ||
        sscanf(line, "{\"event\":\"%15[a-z]\",\"step\":%" SCNd64, kind, &s) == 2) {
        if (strncmp(kind, "train", 5) == 0) return s > step;
        if (strncmp(kind, "val", 3) == 0 || strcmp(kind, "sample") == 0) return s >= step;
        return false;
    }
    if (sscanf(line, "---- sample after %" SCNd64 " steps", &s) == 1) {
        *sample = true;
        return s >= step;
    }
    return false;
}

// The lines of a log up to a checkpoint, into a new file; a last line without its end is left out.
static inline bool log_copy(const char* to, const char* from, int64_t step) {
    FILE *in = fopen(from, "re"), *out = in ? fopen(to, "we") : NULL;
    char* line = NULL;
    size_t room = 0;
    bool sample = false, ok = in && out;
    for (ssize_t n; ok && (n = getline(&line, &room, in)) > 0 && line[n - 1] == '\n';) {
        if (log_line_is_later(line, step, &sample)) break;
        ok = fwrite(line, 1, (size_t)n, out) == (size_t)n;
    }
    ok = ok && !ferror(in) && fflush(out) == 0 && fsync(fileno(out)) == 0;
    int error = errno;
    if (in) fclose(in);
    if (out && fclose(out) != 0 && ok) {
        error = errno;
        ok = false;
    }
    free(line);
    errno = error;
    return ok;
}

// One log of before is kept as log.K; resumed >= 0: and begins the new one. At any moment a kill
// leaves a log with all of its lines under its name.
static inline void log_keep(const char* directory, const char* ending, int number,
                            int64_t resumed) {
    char path[OUT_PATH], kept[OUT_PATH], fresh[OUT_PATH];
    snprintf(path, sizeof path, "%s/log.%s", directory, ending);
    snprintf(kept, sizeof kept, "%s/log.%d.%s", directory, number, ending);
    snprintf(fresh, sizeof fresh, "%s/.log.%s", directory, ending);
    REQUIRE(resumed < 0 || log_copy(fresh, path, resumed), "%s: cannot be copied to %s: %s", path,
            fresh, strerror(errno));
    // A second name, where the file system has such; without it there is a moment with none.
    bool ok = (resumed >= 0 && link(path, kept) == 0) || rename(path, kept) == 0;
    REQUIRE(ok, "%s: cannot be moved to %s: %s", path, kept, strerror(errno));
    REQUIRE(resumed < 0 || rename(fresh, path) == 0, "%s: cannot be moved to %s: %s", fresh, path,
            strerror(errno));
}

// The logs of before, of all ranks, under one number that none of them has. Returns it; 0: there
// are none.
static inline int log_keep_earlier(const char* directory, int64_t resumed) {
    enum { ROOM = 64 };
    char (*endings)[ROOM] = NULL;
    size_t room = 0, count = 0;
    int number = 1, taken, end;
    DIR* folder = opendir(directory);
    REQUIRE(folder, "%s: cannot be read: %s", directory, strerror(errno));
    for (struct dirent* e; (e = readdir(folder));) {
        const char* ending = log_ending(e->d_name);
        end = 0;
        if (sscanf(e->d_name, "log.%d.%n", &taken, &end) == 1 && end && taken >= number)
            number = taken + 1;
        if (!ending || strlen(ending) >= ROOM) continue;
        endings = (char (*)[ROOM])array_grow(endings, &room, count + 1, ROOM);
        snprintf(endings[count++], ROOM, "%s", ending);
    }
    closedir(folder);
    for (size_t i = 0; i < count; i++) log_keep(directory, endings[i], number, resumed);
    free(endings);
    return count ? number : 0;
}

// resumed: the step of the checkpoint that the run goes on from; -1: it is a fresh one. Rank 0 has
// to have returned from here before the others call it: it moves their logs, too.
static inline void log_open(Log* log, const Settings* s, int rank, int world, int64_t resumed) {
    memset(log, 0, sizeof *log);
    log->rank = rank;
    snprintf(log->directory, sizeof log->directory, "%s", s->out);
    log->steps = s->steps;
    log->seed = s->seed;
    log->go_on = s->on_save_error == FLAG_SAVE_ERROR_GO;
    // mpirun gives its ranks a terminal of its own, whatever it writes to itself.
    log->terminal = world == 1 && isatty(STDOUT_FILENO);
    make_directory(s->out);
    int kept = rank == 0 ? log_keep_earlier(s->out, resumed) : 0;
    char name[32] = "log.txt", date[32], host[256] = "unknown";
    if (rank) snprintf(name, sizeof name, "log.rank%d.txt", rank);
    log->text = log_create(&log->text_file, s->out, name);
    log->json = log_create(&log->json_file, s->out, rank ? NULL : "log.jsonl");
    time_t now = time(NULL);
    struct tm utc;
    strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &utc));
    gethostname(host, sizeof host - 1);
    fprintf(log->text, "%s commit %s, %s", program_name, GIT_COMMIT, date);
    if (resumed >= 0) fprintf(log->text, ", resumed after step %" PRId64, resumed);
    if (resumed >= 0 && kept) fprintf(log->text, ", the log of before is log.%d.txt", kept);
    fputc('\n', log->text);
    if (resumed < 0) settings_print(log->text, s);
    fprintf(log->json, "{\"event\":\"start\",\"time\":\"%s\",\"commit\":\"%s\",\"pid\":%d", date,
            GIT_COMMIT, (int)getpid());
    fputs(",\"host\":", log->json);
    json_string(log->json, host, strlen(host));
    fprintf(log->json, ",\"ranks\":%d", world);
    if (resumed >= 0) fprintf(log->json, ",\"resumed\":%" PRId64, resumed);
    fputs(",\"settings\":", log->json);
    settings_json(log->json, s);
    fputs("}\n", log->json);
    log_flush(log);
}

// ---- lines ---------------------------------------------------------------------------------

// One line into log.txt and, where it belongs there, onto the screen.
static inline void log_line(Log* log, bool screen, const char* fmt, ...)
    __attribute__((format(printf, 3, 4)));

static inline void log_line(Log* log, bool screen, const char* fmt, ...) {
    char line[4096];
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
    double loss_z, grad_norm_z; // llmc/outliers.h; NAN: there is no measure yet
    double weight_norm;         // NAN: not measured
    bool skipped;               // it was not finite, and no update was made
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
             "step:%" PRId64 "/%" PRId64 " train_loss:%.6f train_time:%.0fms step_avg:%.2fms%s",
             s->step, log->steps, s->loss, 1e3 * s->train_s, log_step_avg(s->train_s, s->step),
             s->skipped ? " skipped" : "");
    fprintf(log->json, "{\"event\":\"train\",\"step\":%" PRId64 ",\"tokens\":%" PRId64, s->step,
            s->tokens);
    log_field(log, "train_loss", s->loss);
    log_field(log, "grad_norm", s->grad_norm);
    log_field(log, "lr_mult", s->lr_mult);
    log_field(log, "muon_momentum", s->muon_momentum);
    log_field(log, "train_ms", 1e3 * s->train_s);
    log_field(log, "step_avg_ms", log_step_avg(s->train_s, s->step));
    log_field(log, "loss_z", s->loss_z);
    log_field(log, "grad_norm_z", s->grad_norm_z);
    log_field(log, "weight_norm", s->weight_norm);
    fprintf(log->json, ",\"skipped\":%s}\n", s->skipped ? "true" : "false");
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

// A checkpoint that is complete: how long training waited for it, and how long it took beside it.
static inline void log_checkpoint(Log* log, int64_t step, int64_t bytes, double pause_ms,
                                  double write_ms) {
    log_line(log, true,
             "checkpoint of step %" PRId64 ": %.1f MiB, training waited %.1f ms, written in %.f ms",
             step, (double)bytes / 1048576, pause_ms, write_ms);
    fprintf(log->json, "{\"event\":\"checkpoint\",\"step\":%" PRId64 ",\"bytes\":%" PRId64, step,
            bytes);
    log_field(log, "pause_ms", pause_ms);
    log_field(log, "write_ms", write_ms);
    fputs("}\n", log->json);
    log_flush(log);
}

static inline void log_text_event(Log* log, const char* event, const char* text) {
    fprintf(log->json, "{\"event\":\"%s\",\"text\":", event);
    json_string(log->json, text, strlen(text));
    fputs("}\n", log->json);
    log_flush(log);
}

// Anything else worth a line: an epoch that ends, flags that a resumed run has taken.
static inline void log_note(Log* log, const char* fmt, ...) __attribute__((format(printf, 2, 3)));

static inline void log_note(Log* log, const char* fmt, ...) {
    char note[4096];
    va_list args;
    va_start(args, fmt);
    vsnprintf(note, sizeof note, fmt, args);
    va_end(args);
    log_line(log, true, "%s", note);
    log_text_event(log, "note", note);
}

// What went wrong, and the run goes on: on rank 0 to stderr, as the message of an error would be.
static inline void log_warn(Log* log, const char* fmt, ...) __attribute__((format(printf, 2, 3)));

static inline void log_warn(Log* log, const char* fmt, ...) {
    char text[3072], message[4096];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    message_text(message, sizeof message, "warning", text);
    fputs(message, log->text);
    if (log->rank == 0) {
        log_clear_progress(log);
        fflush(stdout);
        message_text(message, sizeof message, program_name, text);
        fputs(message, stderr);
    }
    log_text_event(log, "warning", text);
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

// The last word: the exit status (common.h). A killed run has none.
static inline void log_end(Log* log, int status) {
    fprintf(log->json, "{\"event\":\"end\",\"status\":%d}\n", status);
    log_flush(log);
}
