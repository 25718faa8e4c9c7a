/*
Runs side by side, from their logs: validation loss by step, tokens and time, who is ahead where,
what each needs to the target, and whether the mean of several runs is below it.

    compare_logs [--target 3.28] [--html PAGE.html] [--tokens-per-step NAME=N]... LOG...
                 [--group NAME LOG LOG...]...

A log is the log.txt of a run, the directory that holds it, or a published log of a speedrun record:
text with lines

    step:S/N val_loss:V train_time:Tms

(or T in seconds, `12.345s`); all other lines are passed over, but for those of ours that tell the
tokens of a step and the seed. A log before the first --group stands for itself; the logs behind
--group NAME are runs of one recipe, compared by the means of their losses and times. Where the step
goes back, the run was taken up again from an earlier one: what follows counts.

Between validations everything is on a straight line, which lies above a curve that falls ever more
slowly. Before the first validation of a trained model there is no such line: the loss of the
untrained one is too far away.

The test is a one-sided one-sample t-test, as the records' rules ask for it: that the mean of the
last validation losses is below the target. It wants runs that differ in their seed or data.

--html writes one page with the curves and the same tables. It needs no network and no script.

test        test/compare_logs.sh
*/
#include "llmc/common.h"

#include <sys/stat.h>

enum {
    MAX_GROUPS = 8,
    MAX_COLUMNS = MAX_GROUPS + 2,
    MAX_RUNS = 1 << 20,         // nobody makes more
    CELL_SIZE = 96,
    NAME_BYTES = 60
};

typedef struct Validation {
    int64_t step;
    double seconds, loss;
} Validation;

typedef struct Curve {
    Validation* points;         // steps ascend, seconds do not fall
    size_t count, room;
} Curve;

typedef struct Run {
    const char* name;           // as given
    Curve val;
    int64_t steps;              // it was to make
    int64_t tokens_per_step;    // 0: not known
    int64_t seed;               // -1: not known
    size_t again;               // validations that a later line replaced
} Run;

typedef struct Group {
    const char* name;
    Run* runs;
    int count;
    int64_t tokens_per_step;
    Curve mean;                 // over its runs, at the steps that all of them have
} Group;

typedef enum By { BY_STEP, BY_TOKENS, BY_TIME } By;

static const char* const BY_NAMES[] = { "step", "tokens", "training time" };

// ---- reading -------------------------------------------------------------------------------

static void curve_add(Curve* c, Validation v) {
    c->points = (Validation*)array_grow(c->points, &c->room, c->count + 1, sizeof v);
    c->points[c->count++] = v;
}

static Validation curve_last(const Curve* c) {
    return c->points[c->count - 1];
}

// `what` of the line at `place`: a loss, or a time, which has a unit and is returned in seconds.
static double number_read(const char* text, const char* what, bool time, const char* place) {
    char* end;
    double v = strtod(text, &end);
    bool ms = time && strcmp(end, "ms") == 0, unit = time ? ms || strcmp(end, "s") == 0 : *end == 0;
    REQUIRE(end != text && unit && v - v == 0 && v >= 0,
            "%s: %s is '%s'; a finite number%s is wanted", place, what, text,
            time ? " of ms or s" : "");
    return ms ? v / 1000 : v;
}

// True if the line is a validation. A line that sets out to be one and is not is an error: half a
// number must not pass for a loss.
static bool validation_read(Validation* v, int64_t* steps, const char* line, const char* place) {
    char step[16], last[16], loss[64], time[64];
    if (strncmp(line, "step:", 5) != 0 || line[5] < '0' || line[5] > '9') return false;
    if (!strstr(line, "val_loss:")) return false;
    int found = sscanf(line, "step:%15[0-9]/%15[0-9] val_loss:%63s train_time:%63s", step, last,
                       loss, time);
    REQUIRE(found == 4, "%s: '%.*s' is not\nstep:S/N val_loss:V train_time:Tms; was it cut off?",
            place, (int)strcspn(line, "\r\n"), line);
    v->step = strtoll(step, NULL, 10);
    *steps = strtoll(last, NULL, 10);
    v->loss = number_read(loss, "val_loss", false, place);
    v->seconds = number_read(time, "train_time", true, place);
    return true;
}

// What our own logs tell: a row of the start table, and the last line.
static void facts_read(Run* run, const char* line) {
    static const char ROW[] = "  batch-tokens ";
    int64_t n;
    if (strncmp(line, ROW, sizeof ROW - 1) == 0) {
        if (sscanf(line + sizeof ROW - 1, "%" SCNd64, &n) == 1 && n > 0) run->tokens_per_step = n;
    } else if (strncmp(line, "RESULT ", 7) == 0 && run->val.count) {
        int64_t step = curve_last(&run->val).step;
        const char *tokens = strstr(line, " tokens:"), *seed = strstr(line, " seed:");
        if (seed) sscanf(seed, " seed:%" SCNd64, &run->seed);
        bool known = tokens && sscanf(tokens, " tokens:%" SCNd64, &n) == 1 && step > 0;
        if (known && n > 0 && n % step == 0) run->tokens_per_step = n / step;
    }
}

static void run_read(Run* run, const char* name) {
    char path[4096], place[4200];
    struct stat info;
    bool directory = stat(name, &info) == 0 && S_ISDIR(info.st_mode);
    int n = snprintf(path, sizeof path, "%s%s", name, directory ? "/log.txt" : "");
    REQUIRE(n > 0 && (size_t)n < sizeof path, "%s: the path is too long", name);
    FILE* file = fopen(path, "r");
    REQUIRE(file, "%s: %s", path, strerror(errno));
    memset(run, 0, sizeof *run);
    run->name = name;
    run->seed = -1;
    char* line = NULL;
    size_t room = 0, number = 0;
    errno = 0;
    while (getline(&line, &room, file) > 0) {
        Validation v;
        snprintf(place, sizeof place, "%s:%zu", path, ++number);
        if (!validation_read(&v, &run->steps, line, place)) {
            facts_read(run, line);
            continue;
        }
        for (; run->val.count && curve_last(&run->val).step >= v.step; run->again++)
            run->val.count--;
        if (run->val.count) {
            double before = curve_last(&run->val).seconds;
            REQUIRE(v.seconds >= before,
                    "%s: train_time %g s at step %" PRId64 ", after %g s: the clock went back",
                    place, v.seconds, v.step, before);
        }
        curve_add(&run->val, v);
    }
    REQUIRE(!ferror(file), "%s: cannot be read: %s", path, strerror(errno));
    REQUIRE(run->val.count,
            "%s: no line `step:S/N val_loss:V train_time:Tms` in %zu lines\n"
            "is it the log.txt of a run, and did the run validate?",
            path, number);
    free(line);
    fclose(file);
}

// ---- groups --------------------------------------------------------------------------------

// The mean curve, and what must be equal among runs of one recipe.
static void group_finish(Group* g) {
    const Run* first = &g->runs[0];
    g->tokens_per_step = first->tokens_per_step;
    for (int r = 1; r < g->count; r++) {
        const Run* run = &g->runs[r];
        int64_t a = curve_last(&first->val).step, b = curve_last(&run->val).step;
        REQUIRE(a == b,
                "group %s: %s ends at step %" PRId64 " and %s at %" PRId64
                "\nruns of one group must end at the same step",
                g->name, first->name, a, run->name, b);
        REQUIRE(run->tokens_per_step == g->tokens_per_step,
                "group %s: %s takes %" PRId64 " tokens per step and %s %" PRId64
                " (0: its log does not say; --tokens-per-step %s=N)",
                g->name, first->name, g->tokens_per_step, run->name, run->tokens_per_step, g->name);
    }
    for (size_t i = 0; i < first->val.count; i++) {
        Validation mean = { first->val.points[i].step, 0, 0 };
        int found = 0;
        for (int r = 0; r < g->count; r++) {
            const Curve* c = &g->runs[r].val;
            for (size_t k = 0; k < c->count; k++) {
                if (c->points[k].step != mean.step) continue;
                mean.seconds += c->points[k].seconds / g->count;
                mean.loss += c->points[k].loss / g->count;
                found++;
            }
        }
        if (found == g->count) curve_add(&g->mean, mean);    // the last step is always one
    }
}

// The same run again is no second sample: equal losses under one seed, or at equal times.
static const Run* group_repeats(const Group* g, const Run** of) {
    for (int a = 0; a < g->count; a++) {
        for (int b = a + 1; b < g->count; b++) {
            const Run *p = &g->runs[a], *q = &g->runs[b];
            bool losses = p->val.count == q->val.count, times = losses;
            for (size_t i = 0; i < p->val.count && losses; i++) {
                losses = p->val.points[i].loss == q->val.points[i].loss;
                times = times && p->val.points[i].seconds == q->val.points[i].seconds;
            }
            *of = p;
            if (losses && (times || (p->seed == q->seed && p->seed >= 0))) return q;
        }
    }
    return NULL;
}

static double group_x(const Group* g, const Validation* v, By by) {
    if (by == BY_TIME) return v->seconds;
    return (double)v->step * (double)(by == BY_TOKENS ? g->tokens_per_step : 1);
}

static double group_end(const Group* g, By by) {
    Validation last = curve_last(&g->mean);
    return group_x(g, &last, by);
}

// The loss at x, NAN where there is none. *measured: by a validation right there.
static double group_loss(const Group* g, By by, double x, bool* measured) {
    const Validation* p = g->mean.points;
    *measured = true;
    for (size_t i = 0; i < g->mean.count; i++) {
        if (fabs(group_x(g, &p[i], by) - x) <= 1e-9 * x) return p[i].loss;
    }
    *measured = false;
    for (size_t i = 0; i + 1 < g->mean.count; i++) {
        double a = group_x(g, &p[i], by), b = group_x(g, &p[i + 1], by);
        if (!(a < x && x < b)) continue;
        return p[i].step == 0 ? NAN : p[i].loss + (x - a) / (b - a) * (p[i + 1].loss - p[i].loss);
    }
    return NAN;
}

typedef struct Crossing {
    double step, seconds;       // NAN: the loss is not reached
} Crossing;

// Where the mean curve first comes down to a loss.
static Crossing group_crossing(const Group* g, double loss) {
    const Validation* p = g->mean.points;
    Crossing at = { NAN, NAN };
    size_t i = 0;
    while (i < g->mean.count && p[i].loss > loss) i++;
    if (i == g->mean.count) return at;
    Validation from = p[i ? i - 1 : 0];
    double back = i ? (loss - p[i].loss) / (from.loss - p[i].loss) : 0;
    at.step = (double)p[i].step - back * (double)(p[i].step - from.step);
    at.seconds = p[i].seconds - back * (p[i].seconds - from.seconds);
    return at;
}

static double group_tokens(const Group* g) {
    return g->tokens_per_step ? (double)g->tokens_per_step : NAN;
}

// ---- the t-test ----------------------------------------------------------------------------

// The probability that Student's t with df degrees of freedom is at most t. In the angle a where
// t = sqrt(df) tan(a) its density is a power of cos(a). Simpson's rule goes over the tail alone, so
// that small probabilities keep their digits.
static double student_below(double t, double df) {
    const int parts = 20000;
    double from = atan(fabs(t) / sqrt(df)), width = (acos(0) - from) / parts, sum = 0;
    for (int i = 0; i <= parts; i++) {
        double weight = i == 0 || i == parts ? 1 : i % 2 ? 4 : 2;
        sum += weight * pow(cos(from + i * width), df - 1);
    }
    double tail = sum * width / 3 * exp(lgamma((df + 1) / 2) - lgamma(df / 2)) / sqrt(acos(-1));
    return t < 0 ? tail : 1 - tail;
}

typedef struct Sample {
    double mean, sd;            // sd NAN: one run
} Sample;

// The last losses of a group.
static Sample group_sample(const Group* g) {
    Sample s = { curve_last(&g->mean).loss, NAN };
    double squares = 0;
    bool equal = true;    // then rounding of the mean is no spread
    for (int r = 0; r < g->count; r++) {
        double loss = curve_last(&g->runs[r].val).loss;
        equal = equal && loss == curve_last(&g->runs[0].val).loss;
        squares += (loss - s.mean) * (loss - s.mean);
    }
    if (g->count > 1) s.sd = equal ? 0 : sqrt(squares / (g->count - 1));
    return s;
}

static double test_p(const Sample* s, double target, int64_t runs) {
    return student_below((s->mean - target) / (s->sd / sqrt((double)runs)), (double)(runs - 1));
}

// The fewest runs with p < 0.01 if mean and sd stay as they are, above MAX_RUNS where that is not
// enough. p falls with every run that is added.
static int64_t runs_needed(const Sample* s, double target) {
    int64_t low = 1, high = 2;
    while (high <= MAX_RUNS && !(test_p(s, target, high) < 0.01)) {
        low = high;
        high *= 2;
    }
    while (high <= MAX_RUNS && high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (test_p(s, target, middle) < 0.01) high = middle;
        else low = middle;
    }
    return high;
}

// ---- tables --------------------------------------------------------------------------------

typedef struct Table {
    char title[160], note[4096];
    int columns;
    bool name_last;             // the last column holds words
    char (*cells)[CELL_SIZE];   // row after row; the first is the head
    size_t count, room;
} Table;

// A file's name may hold anything; a terminal and an HTML page may not.
static void text_clean(char* text) {
    for (int n; *text; text += n ? n : 1) {
        n = utf8_length((const unsigned char*)text, strlen(text));
        if (n == 0 || ((unsigned char)*text < 0x20 && *text != '\n') || *text == 0x7f) *text = '?';
    }
}

static void table_cell(Table* t, const char* fmt, ...) __attribute__((format(printf, 2, 3)));

static void table_cell(Table* t, const char* fmt, ...) {
    t->cells = (char(*)[CELL_SIZE])array_grow(t->cells, &t->room, t->count + 1, CELL_SIZE);
    va_list args;
    va_start(args, fmt);
    vsnprintf(t->cells[t->count], CELL_SIZE, fmt, args);
    va_end(args);
    text_clean(t->cells[t->count++]);
}

// A number, or a dash where there is none.
static void table_real(Table* t, const char* fmt, double v) {
    if (v - v == 0) table_cell(t, fmt, v);
    else table_cell(t, "-");
}

// heads: those of the columns, with a | between them.
static void table_start(Table* t, bool name_last, const char* heads) {
    t->name_last = name_last;
    for (const char* head = heads; head; t->columns++) {
        size_t length = strcspn(head, "|");
        table_cell(t, "%.*s", (int)length, head);
        head = head[length] ? head + length + 1 : NULL;
    }
}

static void table_note(Table* t, const char* fmt, ...) __attribute__((format(printf, 2, 3)));

static void table_note(Table* t, const char* fmt, ...) {
    size_t used = strlen(t->note);
    va_list args;
    va_start(args, fmt);
    vsnprintf(t->note + used, sizeof t->note - used, fmt, args);
    va_end(args);
    text_clean(t->note + used);
}

// Four digits and a unit.
static const char* count_text(char* text, size_t size, double v) {
    double scale = v >= 1e9 ? 1e9 : v >= 1e6 ? 1e6 : v >= 1e4 ? 1e3 : 1, shown = v / scale;
    const char* unit = v >= 1e9 ? " B" : v >= 1e6 ? " M" : v >= 1e4 ? " K" : "";
    int digits = scale == 1 ? 0 : shown < 10 ? 3 : shown < 100 ? 2 : 1;
    snprintf(text, size, "%.*f%s", digits, shown, unit);
    return text;
}

static void table_logs(Table* t, const Group* groups, int count) {
    snprintf(t->title, sizeof t->title, "logs");
    table_start(t, true, "|runs|steps|tokens/step|last val loss|time|ms/step|name");
    for (int i = 0; i < count; i++) {
        const Group* g = &groups[i];
        Validation last = curve_last(&g->mean);
        size_t again = 0, length = strlen(g->name);
        size_t cut = length > NAME_BYTES ? length - NAME_BYTES : 0;
        for (int r = 0; r < g->count; r++) again += g->runs[r].again;
        table_cell(t, "%c", 'A' + i);
        table_cell(t, "%d", g->count);
        if (g->runs[0].steps > last.step)
            table_cell(t, "%" PRId64 " of %" PRId64, last.step, g->runs[0].steps);
        else
            table_cell(t, "%" PRId64, last.step);
        table_real(t, "%.0f", group_tokens(g));
        table_cell(t, "%.4f", last.loss);
        table_cell(t, "%.1f s", last.seconds);
        table_real(t, "%.2f", 1e3 * last.seconds / (double)last.step);
        // The end of a long name: paths differ there. Not from inside of a letter of UTF-8.
        while (cut && (g->name[cut] & 0xc0) == 0x80) cut++;
        table_cell(t, "%s%s", cut ? "..." : "", g->name + cut);
        if (again)
            table_note(t, "%c: validations made again: %zu; the later count.\n", 'A' + i, again);
    }
}

static void table_target(Table* t, const Group* groups, int count, double target) {
    Crossing first = group_crossing(&groups[0], target);
    snprintf(t->title, sizeof t->title, "to val loss %g", target);
    table_start(t, false, "|step|tokens|time|tokens / A|time / A|runs at it");
    for (int i = 0; i < count; i++) {
        const Group* g = &groups[i];
        Crossing at = group_crossing(g, target);
        double tokens = at.step * group_tokens(g);
        char text[40];
        int at_it = 0;
        for (int r = 0; r < g->count; r++) at_it += curve_last(&g->runs[r].val).loss <= target;
        table_cell(t, "%c", 'A' + i);
        table_real(t, "%.0f", at.step);
        table_cell(t, "%s", tokens >= 0 ? count_text(text, sizeof text, tokens) : "-");
        table_real(t, "%.1f s", at.seconds);
        table_real(t, "%.3f", tokens / (first.step * group_tokens(&groups[0])));
        table_real(t, "%.3f", at.seconds / first.seconds);
        table_cell(t, "%d of %d", at_it, g->count);
    }
    table_note(t, "On a straight line between two validations; - where it is not reached or not "
                  "known.\nRuns at it: those whose last validation is at the target or below.\n");
}

static void table_test(Table* t, const Group* groups, int count, double target) {
    snprintf(t->title, sizeof t->title, "t-test: is the mean of the last val losses below %g?",
             target);
    table_start(t, false, "|runs|mean|sd|t|p|runs for p < 0.01");
    for (int i = 0; i < count; i++) {
        const Group* g = &groups[i];
        const Run *of, *repeat = group_repeats(g, &of);
        Sample loss = group_sample(g);
        double t_value = NAN, p = NAN, needed = NAN;
        if (g->count > 1 && loss.sd > 0 && !repeat) {
            t_value = (loss.mean - target) / (loss.sd / sqrt(g->count));
            p = test_p(&loss, target, g->count);
            if (loss.mean < target) needed = (double)runs_needed(&loss, target);
        }
        table_cell(t, "%c", 'A' + i);
        table_cell(t, "%d", g->count);
        table_cell(t, "%.5f", loss.mean);
        table_real(t, "%.5f", loss.sd);
        table_real(t, "%.3f", t_value);
        table_real(t, "%.4g", p);
        if (needed > MAX_RUNS) table_cell(t, "> %d", MAX_RUNS);
        else table_real(t, "%.0f", needed);
        if (repeat)
            table_note(t, "%c: no test: %s repeats %s; vary seed or data.\n",
                       'A' + i, repeat->name, of->name);
        else if (loss.sd == 0)
            table_note(t, "%c: no test: all last losses are equal.\n", 'A' + i);
        else if (g->count > 1 && loss.mean >= target)
            table_note(t, "%c: its mean is not below the target.\n", 'A' + i);
    }
    table_note(t, "One-sided, one sample, runs - 1 degrees of freedom. Runs for p < 0.01: if mean "
                  "and sd stay as they are.\n");
}

// The next of 1, 2, 5, 10, 20, ... times a power of ten.
static double round_up(double v) {
    double power = pow(10, floor(log10(v))), lead = v / power * (1 - 1e-12);
    return power * (lead <= 1 ? 1 : lead <= 2 ? 2 : lead <= 5 ? 5 : 10);
}

static int compare_doubles(const void* a, const void* b) {
    double x = *(const double*)a, y = *(const double*)b;
    return (x > y) - (x < y);
}

// Where to look: so many places up to the end of the shortest group, and on to the next end in
// steps that suit that one. By step these are validations, else round numbers; ends always.
static double* rows_choose(size_t* count, const Group* groups, int n, By by) {
    double ends[MAX_GROUPS], at = 0;
    size_t steps_count = 0, next = 0, kept = 0;
    for (int i = 0; i < n; i++) steps_count += groups[i].mean.count;
    double* steps = (double*)host_alloc(steps_count, sizeof(double));
    double* rows = (double*)host_alloc(steps_count + 64 * MAX_GROUPS, sizeof(double));
    steps_count = 0;
    for (int i = 0; i < n; i++) {
        ends[i] = group_end(&groups[i], by);
        for (size_t k = 0; k < groups[i].mean.count; k++)
            steps[steps_count++] = (double)groups[i].mean.points[k].step;
    }
    qsort(ends, (size_t)n, sizeof *ends, compare_doubles);
    qsort(steps, steps_count, sizeof *steps, compare_doubles);
    for (int i = 0; i < n; i++) {
        if (by == BY_STEP) {
            for (; next < steps_count && steps[next] < ends[i]; next++) {
                if (kept == 0 || steps[next] >= at + ends[i] / 24) rows[kept++] = at = steps[next];
            }
        } else if (ends[i] > at) {
            double step = round_up(ends[i] / 15);
            for (double k = floor(at / step) + 1; k * step < ends[i] - step / 4; k++)
                rows[kept++] = k * step;
        }
        if (kept == 0 || rows[kept - 1] < ends[i]) rows[kept++] = at = ends[i];
    }
    free(steps);
    *count = kept;
    return rows;
}

static const char* x_text(char* text, size_t size, double x, By by) {
    if (by == BY_TOKENS) return count_text(text, size, x);
    snprintf(text, size, by == BY_STEP || x >= 9999 ? "%.0f" : "%.4g", x);
    return text;
}

static void table_by(Table* t, const Group* groups, int count, By by) {
    size_t n;
    double* rows = rows_choose(&n, groups, count, by);
    char heads[64] = "", text[40], since[40] = "", until[40] = "", leader = 0;
    snprintf(t->title, sizeof t->title, "val loss by %s", BY_NAMES[by]);
    for (int i = 0; i < count; i++)
        snprintf(heads + strlen(heads), sizeof heads - strlen(heads), "|%c", 'A' + i);
    table_cell(t, "%s", by == BY_TIME ? "s" : BY_NAMES[by]);
    t->columns = 1;
    table_start(t, count > 1, strcat(heads, count > 1 ? "|ahead" : "") + 1);
    for (size_t r = 0; r < n; r++) {
        double loss[MAX_GROUPS], best = INFINITY, second = INFINITY;
        bool measured[MAX_GROUPS];
        int ahead = 0;
        for (int i = 0; i < count; i++) {
            loss[i] = group_loss(&groups[i], by, rows[r], &measured[i]);
            if (!(loss[i] < second)) continue;
            second = loss[i] < best ? best : loss[i];
            if (loss[i] < best) best = loss[i], ahead = 'A' + i;
        }
        if (best == INFINITY) continue;    // all before their second validation
        table_cell(t, "%s", x_text(text, sizeof text, rows[r], by));
        for (int i = 0; i < count; i++) {
            if (loss[i] != loss[i]) table_cell(t, "%s", "");
            else table_cell(t, "%s%.4f", measured[i] || by != BY_STEP ? "" : "~", loss[i]);
        }
        if (count == 1) continue;
        if (rows[r] == 0 || second == INFINITY) {    // before training, or alone: nobody is ahead
            table_cell(t, "%s", "");
            continue;
        }
        if (second - best < 0.00005) ahead = '=';
        if (ahead == '=') table_cell(t, "even");
        else table_cell(t, "%c by %.4f", ahead, second - best);
        if (ahead != leader) {
            if (leader && strcmp(since, until) != 0) table_note(t, " to %s", until);
            table_note(t, "%s", leader ? ", " : "Ahead: ");
            if (ahead == '=') table_note(t, "even at %s", text);
            else table_note(t, "%c at %s", ahead, text);
            snprintf(since, sizeof since, "%s", text);
            leader = (char)ahead;
        }
        snprintf(until, sizeof until, "%s", text);
    }
    if (leader && strcmp(since, until) != 0) table_note(t, " to %s", until);
    if (leader) table_note(t, ".\n");
    table_note(t, "%s lie on a straight line between two validations.\n",
               by == BY_STEP ? "Losses marked ~" : "Losses inside of a log");
    free(rows);
}

static void table_print(const Table* t) {
    size_t width[MAX_COLUMNS] = { 0 };
    for (size_t i = 0; i < t->count; i++) {
        size_t n = strlen(t->cells[i]), *w = &width[i % (size_t)t->columns];
        if (n > *w) *w = n;    // bytes: what is not ASCII stands in the last column
    }
    printf("%s\n", t->title);
    for (size_t i = 0; i < t->count; i += (size_t)t->columns) {
        size_t pending = 0;    // spaces, so that no line ends in them
        for (int c = 0; c < t->columns; c++) {
            const char* cell = t->cells[i + (size_t)c];
            bool words = t->name_last && c == t->columns - 1;
            pending += 2 + (words ? 0 : width[c] - strlen(cell));
            if (!*cell) continue;
            printf("%*s%s", (int)pending, "", cell);
            pending = 0;
        }
        putchar('\n');
    }
    for (const char* line = t->note; *line;) {
        int length = (int)strcspn(line, "\n");
        printf("  %.*s\n", length, line);
        line += length + (line[length] == '\n');
    }
    putchar('\n');
}

// ---- the page: curves ----------------------------------------------------------------------

enum { WIDTH = 600, HEIGHT = 380, LEFT = 58, RIGHT = 28, TOP = 12, BOTTOM = 48 };

typedef struct Axis {
    double low, high, tick;     // in the unit of the labels
    double from, to;            // where low and high are in the picture
} Axis;

typedef struct Panel {
    By by;
    bool zoom;
    const char* unit_name;
    double unit;                // of the x axis, in steps, tokens or seconds
    Axis x, y;
} Panel;

static void axis_fit(Axis* a, double low, double high, int ticks, double from, double to) {
    if (!(high - low > 1e-9 * fabs(high))) {
        low -= 0.5;
        high = low + 1;
    }
    Axis fitted = { low, high, round_up((high - low) / ticks), from, to };
    *a = fitted;
}

static double axis_at(const Axis* a, double v) {
    return a->from + (a->to - a->from) * (v - a->low) / (a->high - a->low);
}

static void text_escaped(FILE* out, const char* text, size_t length) {
    for (const char* end = text + length; text < end; text++) {
        if (*text == '<') fputs("&lt;", out);
        else if (*text == '>') fputs("&gt;", out);
        else if (*text == '&') fputs("&amp;", out);
        else if (*text == '"') fputs("&quot;", out);
        else fputc(*text, out);
    }
}

// The zoom begins at the loss that is reached after four fifths of a log, the highest of them; logs
// that end early only count if all do.
static double zoom_loss(const Group* groups, int count) {
    double highest = -1;
    for (int finished = 1; finished >= 0 && highest < 0; finished--) {
        for (int i = 0; i < count; i++) {
            const Group* g = &groups[i];
            bool measured;
            if (finished && curve_last(&g->mean).step < g->runs[0].steps) continue;
            highest = fmax(highest, group_loss(g, BY_STEP, 0.8 * group_end(g, BY_STEP), &measured));
        }
    }
    return highest;
}

// False: there is nothing to see.
static bool panel_fit(Panel* p, const Group* groups, int count, By by, bool zoom, double target) {
    double x_low = 0, x_high = 0, y_low = INFINITY, y_high = -INFINITY;
    for (int i = 0; i < count; i++) {
        const Curve* c = &groups[i].mean;
        x_high = fmax(x_high, group_end(&groups[i], by));
        for (size_t k = 0; k < c->count; k++) {
            y_low = fmin(y_low, c->points[k].loss);
            // The untrained model's loss would make the rest flat.
            if (c->points[k].step > 0 || c->count == 1) y_high = fmax(y_high, c->points[k].loss);
        }
    }
    if (zoom) {
        y_high = zoom_loss(groups, count);
        x_low = x_high;
        for (int i = 0; i < count; i++) {
            Crossing at = group_crossing(&groups[i], y_high);
            x_low = fmin(x_low, by == BY_TIME     ? at.seconds
                                : by == BY_TOKENS ? at.step * group_tokens(&groups[i])
                                                  : at.step);
        }
        if (!(y_high > y_low && x_low < x_high)) return false;
    }
    double range = y_high - y_low;    // the target is in the picture if it is near
    if (target < y_low && target > y_low - range) y_low = target;
    if (target > y_high && target < y_high + range) y_high = target;
    p->by = by;
    p->zoom = zoom;
    p->unit = 1;
    p->unit_name = by == BY_TIME ? "training time (s)" : BY_NAMES[by];
    if (by == BY_TOKENS && x_high >= 1e9) p->unit = 1e9, p->unit_name = "tokens (billions)";
    else if (by == BY_TOKENS && x_high >= 1e6) p->unit = 1e6, p->unit_name = "tokens (millions)";
    if (by == BY_TIME && x_high >= 7200) p->unit = 3600, p->unit_name = "training time (hours)";
    double pad = 0.04 * (y_high - y_low);
    axis_fit(&p->x, x_low / p->unit, x_high / p->unit, 8, LEFT, WIDTH - RIGHT);
    axis_fit(&p->y, y_low - pad, y_high + pad, 7, HEIGHT - BOTTOM, TOP);
    return true;
}

static void axis_label(FILE* out, const Axis* a, double v) {
    int digits = a->tick >= 1 ? 0 : (int)ceil(-log10(a->tick) - 1e-9);
    fprintf(out, "%.*f</text>\n", digits, fabs(v) < a->tick / 2 ? 0 : v);
}

static void draw_axes(FILE* out, const Panel* p) {
    const Axis *x = &p->x, *y = &p->y;
    for (double k = ceil(y->low / y->tick); k * y->tick <= y->high; k++) {
        double at = axis_at(y, k * y->tick);
        fprintf(out, "<path class=\"grid\" d=\"M%g %.1fH%g\"/><text x=\"%g\" y=\"%.1f\" "
                "text-anchor=\"end\">", x->from, at, x->to, x->from - 7, at + 4);
        axis_label(out, y, k * y->tick);
    }
    for (double k = ceil(x->low / x->tick); k * x->tick <= x->high * (1 + 1e-12); k++) {
        double at = axis_at(x, k * x->tick);
        fprintf(out, "<path class=\"axis\" d=\"M%.1f %gv5\"/><text x=\"%.1f\" y=\"%g\" "
                "text-anchor=\"middle\">", at, y->from, at, y->from + 18);
        axis_label(out, x, k * x->tick);
    }
    fprintf(out, "<path class=\"axis\" d=\"M%g %gV%gH%g\"/>\n<text x=\"%g\" y=\"%d\" "
            "text-anchor=\"middle\">%s</text>\n<text transform=\"translate(13 %g) rotate(-90)\" "
            "text-anchor=\"middle\">validation loss (nats per token)</text>\n", x->from, y->to,
            y->from, x->to, (x->from + x->to) / 2, HEIGHT - 8, p->unit_name,
            (y->from + y->to) / 2);
}

// Where a validation is in the picture.
static double panel_x(const Panel* p, const Group* g, const Validation* v) {
    return axis_at(&p->x, group_x(g, v, p->by) / p->unit);
}

static void draw_curve(FILE* out, const Panel* p, const Group* g, const Curve* c, int colour,
                       bool thin) {
    const Validation* v = c->points;
    fprintf(out, "<path class=\"%s c%d\" d=\"", thin ? "run" : "mean", colour);
    for (size_t i = 0; i < c->count; i++) {
        fprintf(out, "%c%.1f %.1f", i ? 'L' : 'M', panel_x(p, g, &v[i]),
                axis_at(&p->y, v[i].loss));
    }
    fputs("\"/>\n", out);
    for (size_t i = 0; i < c->count && !thin && c->count <= 80; i++) {
        fprintf(out, "<circle class=\"f%d\" cx=\"%.1f\" cy=\"%.1f\" r=\"2.2\"/>\n", colour,
                panel_x(p, g, &v[i]), axis_at(&p->y, v[i].loss));
    }
}

// Each curve's letter stands behind its end, above the letters that are already there.
static void draw_letters(FILE* out, const Panel* p, const Group* groups, int count) {
    double x[MAX_GROUPS], y[MAX_GROUPS];
    int n = 0;
    for (int i = 0; i < count; i++) {
        Validation last = curve_last(&groups[i].mean);
        x[n] = panel_x(p, &groups[i], &last) + 6;
        y[n] = axis_at(&p->y, last.loss) + 4;
        if (x[n] < p->x.from || y[n] < p->y.to) continue;    // it ends outside
        for (int k = 0; k < n; k++) {
            if (fabs(x[n] - x[k]) >= 12 || fabs(y[n] - y[k]) >= 15) continue;
            y[n] = y[k] - 15;
            k = -1;    // it may be over another one now
        }
        fprintf(out, "<text class=\"letter f%d\" x=\"%.1f\" y=\"%.1f\">%c</text>\n", i, x[n], y[n],
                'A' + i);
        n++;
    }
}

static void draw_panel(FILE* out, const Panel* p, const Group* groups, int count, double target) {
    double at = axis_at(&p->y, target);
    bool near = at >= p->y.to && at <= p->y.from;
    fprintf(out, "<figure><figcaption>Validation loss by %s", BY_NAMES[p->by]);
    if (p->zoom) fputs(", the last stretch", out);
    if (near) fprintf(out, " (dashed: %g)", target);
    fprintf(out, "</figcaption>\n<svg viewBox=\"0 0 %d %d\" role=\"img\" aria-label=\"Curves of "
            "the validation loss by %s\">\n", WIDTH, HEIGHT, BY_NAMES[p->by]);
    draw_axes(out, p);
    fprintf(out, "<clipPath id=\"inside%d%d\"><rect x=\"%g\" y=\"%g\" width=\"%g\" "
            "height=\"%g\"/></clipPath>\n<g clip-path=\"url(#inside%d%d)\">\n", p->by, p->zoom,
            p->x.from - 3, p->y.to, p->x.to - p->x.from + 6, p->y.from - p->y.to, p->by, p->zoom);
    if (near)
        fprintf(out, "<path class=\"target\" d=\"M%g %.1fH%g\"/>\n", p->x.from, at, p->x.to);
    for (int i = 0; i < count; i++) {
        for (int r = 0; r < groups[i].count && groups[i].count > 1; r++)
            draw_curve(out, p, &groups[i], &groups[i].runs[r].val, i, true);
    }
    for (int i = 0; i < count; i++) draw_curve(out, p, &groups[i], &groups[i].mean, i, false);
    fputs("</g>\n", out);
    draw_letters(out, p, groups, count);
    fputs("</svg></figure>\n", out);
}

// ---- the page ------------------------------------------------------------------------------

// Distinguishable with every common colour vision (after Okabe and Ito 2008).
static const char* const ON_LIGHT[MAX_GROUPS] = { "#0072b2", "#d55e00", "#00805c", "#b8508f",
                                                  "#2a94d6", "#b37700", "#000000", "#7d7300" };
static const char* const ON_DARK[MAX_GROUPS] = { "#5ab4f0", "#ff8a47", "#2fd0a0", "#eb9fcd",
                                                 "#a8dcff", "#f2b632", "#ffffff", "#d9cd45" };

static const char STYLE[] =
    "body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.45 system-ui,sans-serif}\n"
    "main{max-width:1240px;margin:0 auto;padding:12px 16px 40px}\n"
    "h1{font-size:22px;margin:8px 0}h2{font-size:16px;margin:26px 0 6px}\n"
    ".legend{list-style:none;margin:0 0 8px;padding:0;display:flex;flex-wrap:wrap;gap:2px 28px}\n"
    ".legend li{overflow-wrap:anywhere}\n"
    ".key{display:inline-block;min-width:1.35em;margin-right:.35em;border-radius:3px;text-align:"
    "center;font-weight:700;color:var(--paper)}\n"
    ".panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));"
    "gap:10px 24px}\n"
    "figure{margin:0}figcaption{font-weight:600;margin:10px 0 2px}svg{display:block;width:100%;"
    "height:auto}\n"
    "svg text{font:12px system-ui,sans-serif;fill:var(--ink)}svg path{fill:none}\n"
    ".grid{stroke:var(--grid)}.axis{stroke:var(--ink)}"
    ".target{stroke:var(--ink);stroke-dasharray:6 4}\n"
    ".mean{stroke-width:2}.run{stroke-width:1;stroke-opacity:.4}"
    "svg .letter{font-weight:700;paint-order:stroke;stroke:var(--paper);stroke-width:3px}\n"
    ".tables{display:flex;flex-wrap:wrap;gap:0 48px}section{max-width:100%}\n"
    ".wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}\n"
    "th,td{padding:2px 10px;text-align:right;white-space:nowrap;border-bottom:1px solid "
    "var(--grid)}\n"
    "th{font-weight:600}.words{text-align:left}p{margin:4px 0;color:var(--soft);max-width:70ch}\n";

static void page_colours(FILE* out, const char* const* colours, const char* theme) {
    fprintf(out, ":root{%s", theme);
    for (int i = 0; i < MAX_GROUPS; i++) fprintf(out, ";--c%d:%s", i, colours[i]);
    fputs("}", out);
}

static void page_table(FILE* out, const Table* t, int groups) {
    fputs("<section><h2>", out);
    text_escaped(out, t->title, strlen(t->title));
    fputs("</h2>\n<div class=\"wide\"><table>\n", out);
    for (size_t i = 0; i < t->count; i++) {
        int column = (int)(i % (size_t)t->columns);
        const char *cell = t->cells[i], *tag = i < (size_t)t->columns ? "th" : "td";
        bool words = t->name_last && column == t->columns - 1;
        int letter = cell[0] - 'A';
        fprintf(out, "%s<%s%s>", column ? "" : "<tr>", tag, words ? " class=\"words\"" : "");
        if (cell[0] && !cell[1] && letter >= 0 && letter < groups && !words)
            fprintf(out, "<span class=\"key b%d\">%s</span>", letter, cell);
        else text_escaped(out, cell, strlen(cell));
        fprintf(out, "</%s>%s", tag, column == t->columns - 1 ? "</tr>\n" : "");
    }
    fputs("</table></div>\n", out);
    for (const char* line = t->note; *line;) {
        size_t length = strcspn(line, "\n");
        fputs("<p>", out);
        text_escaped(out, line, length);
        fputs("</p>\n", out);
        line += length + (line[length] == '\n');
    }
    fputs("</section>\n", out);
}

static void page_draw(FILE* out, const Group* groups, int count, const Table* tables, int n,
                      double target) {
    bool tokens = true;
    for (int i = 0; i < count; i++) tokens = tokens && groups[i].tokens_per_step;
    fputs("<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/>\n"
          "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n"
          "<title>Validation loss, compared</title>\n<style>\n", out);
    page_colours(out, ON_LIGHT, "color-scheme:light dark;--paper:#fff;--ink:#1b1b1b;--soft:#555;"
                 "--grid:#e2e2e2");
    fputs("\n@media(prefers-color-scheme:dark){", out);
    page_colours(out, ON_DARK, "--paper:#16181b;--ink:#e8e8e8;--soft:#a9adb3;--grid:#34383e");
    fputs("}\n", out);
    for (int i = 0; i < count; i++)
        fprintf(out, ".c%d{stroke:var(--c%d)}svg .f%d{fill:var(--c%d)}"
                ".b%d{background:var(--c%d)}\n", i, i, i, i, i, i);
    fprintf(out, "%s</style></head>\n<body><main>\n<h1>Validation loss, compared</h1>\n"
            "<ul class=\"legend\">\n", STYLE);
    for (int i = 0; i < count; i++) {
        const char* name = tables[0].cells[(i + 2) * tables[0].columns - 1];
        fprintf(out, "<li><span class=\"key b%d\">%c</span>", i, 'A' + i);
        text_escaped(out, name, strlen(name));
        fprintf(out, ": %.4f", curve_last(&groups[i].mean).loss);
        if (groups[i].count > 1) fprintf(out, ", mean of %d runs", groups[i].count);
        fputs("</li>\n", out);
    }
    fputs("</ul>\n<div class=\"panels\">\n", out);
    for (int i = 0; i < 4; i++) {
        Panel p;
        By by = i >= 2 ? BY_TIME : tokens ? BY_TOKENS : BY_STEP;
        if (panel_fit(&p, groups, count, by, i % 2 == 1, target))
            draw_panel(out, &p, groups, count, target);
    }
    fputs("</div>\n<div class=\"tables\">\n", out);
    for (int i = 0; i < n; i++) page_table(out, &tables[i], count);
    fputs("</div></main></body></html>\n", out);
}

// Drawn in memory first, so that a page of before outlives an error.
static void page_write(const char* path, const Group* groups, int count, const Table* tables, int n,
                       double target) {
    char* page;
    size_t bytes;
    FILE* memory = open_memstream(&page, &bytes);
    REQUIRE(memory, "out of memory: %s", strerror(errno));
    page_draw(memory, groups, count, tables, n, target);
    fclose(memory);
    file_write(path, page, bytes);
    free(page);
    printf("%s\n", path);
}

// ---- main ----------------------------------------------------------------------------------

// NAME=N: for the log or group NAME, whatever the log says.
static void tokens_set(Group* groups, int count, const char* value) {
    const char* equals = strrchr(value, '=');
    int64_t tokens;
    char rest;
    REQUIRE(equals && sscanf(equals + 1, "%" SCNd64 "%c", &tokens, &rest) == 1 && tokens > 0,
            "--tokens-per-step wants NAME=N, got '%s'", value);
    size_t length = (size_t)(equals - value);
    bool found = false;
    for (int i = 0; i < count; i++) {
        const char* group = groups[i].name;
        for (int r = 0; r < groups[i].count; r++) {
            Run* run = &groups[i].runs[r];
            if (!(strncmp(run->name, value, length) == 0 && run->name[length] == 0) &&
                !(strncmp(group, value, length) == 0 && group[length] == 0))
                continue;
            run->tokens_per_step = tokens;
            found = true;
        }
    }
    REQUIRE(found, "--tokens-per-step %s: no log or group has this name", value);
}

int main(int argc, char** argv) {
    static Group groups[MAX_GROUPS];
    static Table tables[6];
    Run* runs = (Run*)host_alloc((size_t)argc, sizeof(Run));
    const char *page = NULL, *group = NULL;
    double target = 3.28;
    int count = 0, total = 0, tokens_count = 0, n = 0;
    program_name = "compare_logs";
    for (int i = 1; i < argc; i++) {
        const char *word = argv[i], *value = argv[i + 1];
        bool flag = strncmp(word, "--", 2) == 0, is_group = strcmp(word, "--group") == 0;
        bool is_target = strcmp(word, "--target") == 0, is_page = strcmp(word, "--html") == 0;
        REQUIRE(!flag || is_group || is_target || is_page || strcmp(word, "--tokens-per-step") == 0,
                "no flag %s; there are --target, --html, --tokens-per-step and --group", word);
        REQUIRE(!flag || value, "%s wants a value", word);
        i += flag;
        if (is_group) {
            REQUIRE(!group || groups[count - 1].count, "--group %s has no log", group);
            group = value;
        }
        if (is_group || (!flag && !group)) {
            REQUIRE(count < MAX_GROUPS, "more than %d logs and groups cannot be told apart",
                    MAX_GROUPS);
            groups[count].name = is_group ? group : word;
            groups[count++].runs = &runs[total];
        }
        if (!flag) {
            run_read(&runs[total++], word);
            groups[count - 1].count++;
        } else if (is_target) {
            char* end;
            target = strtod(value, &end);
            REQUIRE(end != value && *end == 0 && target > 0 && target < 1e9,
                    "--target wants a number above 0, got '%s'", value);
        } else if (is_page) {
            // Where the value was forgotten, a log stands behind the flag. It shall outlive that.
            size_t length = strlen(value);
            REQUIRE(length > 5 && strcmp(value + length - 5, ".html") == 0,
                    "--html wants the name of the page to write, NAME.html, got '%s'", value);
            page = value;
        } else if (!is_group) {
            argv[tokens_count++] = argv[i];    // they stay behind, in order
        }
    }
    REQUIRE(count, "no log to compare\nusage: compare_logs [--target 3.28] [--html PAGE.html] "
            "[--tokens-per-step NAME=N]... LOG... [--group NAME LOG...]...");
    REQUIRE(groups[count - 1].count, "--group %s has no log", group);
    for (int i = 0; i < tokens_count; i++) tokens_set(groups, count, argv[i]);
    bool several = false, by_tokens = false;    // by tokens is by step where all take as many
    for (int i = 0; i < count; i++) {
        group_finish(&groups[i]);
        several = several || groups[i].count > 1;
        by_tokens = by_tokens || groups[i].tokens_per_step != groups[0].tokens_per_step;
    }
    for (int i = 0; i < count; i++) by_tokens = by_tokens && groups[i].tokens_per_step;
    table_logs(&tables[n++], groups, count);
    table_target(&tables[n++], groups, count, target);
    if (several) table_test(&tables[n++], groups, count, target);
    table_by(&tables[n++], groups, count, BY_STEP);
    if (by_tokens) table_by(&tables[n++], groups, count, BY_TOKENS);
    table_by(&tables[n++], groups, count, BY_TIME);
    for (int i = 0; i < n; i++) table_print(&tables[i]);
    if (page) page_write(page, groups, count, tables, n, target);
    for (int i = 0; i < n; i++) free(tables[i].cells);
    for (int i = 0; i < count; i++) free(groups[i].mean.points);
    for (int i = 0; i < total; i++) free(runs[i].val.points);
    free(runs);
    return 0;
}
