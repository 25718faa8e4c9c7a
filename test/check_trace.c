/*
Reads what --trace wrote and proves from it that a step of the trainer is in order and overlaps.

    check_trace [--zero 0|1] [--data] [--verbose] FILE...      one file, or one of each rank

Order is happens-before, by vector clocks, and not by times: one run that went well proves nothing.
The operations of a stream follow one another; a wait puts what comes after it behind all that its
record follows; what the host issues after it has waited comes after that. So what is found holds
for every run that issues the same calls. Streams are taken to be independent otherwise (nothing is
issued on the null stream).

Labels that are known, on any stream: "forward L", "backward L", "embed ..", "classify", "measure"
(reads the reduced gradients), "update"; and on the stream whose name begins with "comm": "reduce
BANK A-B", "gather BANK A-B" (layers A to B of attn or mlp; embed and others have none). What reads
and writes which weights is known by name and place: of a layer's four forward products matmul_* the
first two read attn, the last two mlp; of its four matmul_tn in backward the first two write
gradients of mlp, the last two of attn. Which update changes what is not known: that a gather has
the newest weights is for a comparison of the ranks to show.

    file        what the format promises: order of issue, times, every wait's record
  a reduce      the reduce of a group is issued before the backward of the next one is complete, and
                that backward does not begin after it
  b gradients   a reduce comes after all that writes what it sums; measure and update after all
                reduces; every update after the guard, which comes after all norms
  c weights     a gather comes after the updates before it; what reads a weight after its gather
  d hiding      gathers go out in forward order, and forward 0 does not wait for the last
    ranks       all ranks issue the same collectives in the same order
    data        with --data: what was read ahead is in the trace, and a step never waits for it.
                That alone is a matter of times: true of this run, on this machine

--zero 1 demands that there are reduces and gathers, --zero 0 reduces and no gathers. Without it
what is not there is skipped, and said.

test        test/test_trace.cu
*/
#include <ctype.h>
#include <stdarg.h>
#include "../llmc/common.h"
#include "test.h"

// ---- a trace -------------------------------------------------------------------------------

enum { CHECK_STREAMS = 16, CHECK_THREADS = 2, CHECK_FILES = 1024 };

typedef enum { ITEM_OP, ITEM_RECORD, ITEM_WAIT, ITEM_SYNC, ITEM_SYNC_EVENT, ITEM_STEP,
               ITEM_CUT } ItemKind;
typedef enum { OTHER, FORWARD, BACKWARD, EMBED, CLASSIFY, MEASURE, UPDATE, REDUCE,
               GATHER } Work;

typedef struct Item {
    ItemKind kind;
    char name[96], label[96];
    int stream;
    double ts, dur;
    int64_t issue, event, record, step;
    Work work;
    char bank[32];              // REDUCE, GATHER
    int first, last;            // layers; -1: none
    int place;                  // on its stream, from 1
    int clock[CHECK_STREAMS];   // place of the last item of each stream that comes before, or it
    bool reads_attn, reads_mlp, writes_attn, writes_mlp;
} Item;

// What a thread of the host did.
typedef struct Span {
    int thread;
    char name[32];
    double ts, dur;
    int64_t step;
} Span;

typedef struct TraceFile {
    const char* path;
    Item* items;
    int count, capacity;
    int rank;
    char stream_names[CHECK_STREAMS + CHECK_THREADS][32];
    Span* spans;
    int span_count, span_capacity;
    int looks;                  // at how many batches are ready
    int arrows_begun, arrows_ended;
    int* steps;                 // item each begins at; steps[step_count]: the end
    int step_count;
    char problem[256];          // why it is no trace; "": it is one
} TraceFile;

static bool is_comm(const TraceFile* t, int stream) {
    return strncmp(t->stream_names[stream], "comm", 4) == 0;
}

// ---- reading: strict JSON ------------------------------------------------------------------

typedef struct Reader {
    const char* at;
    TraceFile* file;
    int line;
} Reader;

static bool reader_fails(Reader* r, const char* what) {
    TraceFile* f = r->file;
    if (!f->problem[0])
        snprintf(f->problem, sizeof f->problem, "line %d: %s at: %.40s", r->line, what, r->at);
    return false;
}

static char reader_next(Reader* r) {
    for (; *r->at == ' ' || *r->at == '\n' || *r->at == '\t' || *r->at == '\r'; r->at++)
        r->line += *r->at == '\n';
    return *r->at;
}

static bool reader_takes(Reader* r, char c) {
    if (reader_next(r) != c) return false;
    r->at++;
    return true;
}

// The text of a string; other letters than ASCII that are escaped become '?'.
static bool read_string(Reader* r, char* text, size_t size) {
    size_t n = 0;
    if (!reader_takes(r, '"')) return reader_fails(r, "no string");
    while (*r->at != '"') {
        char c = *r->at;
        if ((unsigned char)c < 0x20) return reader_fails(r, "a string does not end");
        r->at++;
        if (c == '\\') {
            static const char FROM[] = "\"\\/bfnrt", TO[] = "\"\\/\b\f\n\r\t";
            const char* known = *r->at ? strchr(FROM, *r->at) : NULL;
            if (known) {
                c = TO[known - FROM];
            } else {
                if (*r->at != 'u') return reader_fails(r, "no such escape");
                for (int i = 1; i <= 4; i++)
                    if (!isxdigit((unsigned char)r->at[i])) return reader_fails(r, "no escape");
                char digits[5] = {r->at[1], r->at[2], r->at[3], r->at[4], 0};
                long code = strtol(digits, NULL, 16);
                c = code < 0x80 ? (char)code : '?';
                r->at += 4;
            }
            r->at++;
        }
        if (n + 1 < size) text[n++] = c;
    }
    r->at++;
    text[n] = 0;
    return true;
}

static bool read_number(Reader* r, double* x) {
    reader_next(r);
    const char* s = r->at;
    if (*s == '-') s++;
    if (!isdigit((unsigned char)*s) || (*s == '0' && isdigit((unsigned char)s[1])))
        return reader_fails(r, "no number");
    while (isdigit((unsigned char)*s)) s++;
    if (*s == '.') {
        if (!isdigit((unsigned char)*++s)) return reader_fails(r, "no number");
        while (isdigit((unsigned char)*s)) s++;
    }
    if (*s == 'e' || *s == 'E') {
        s++;
        if (*s == '+' || *s == '-') s++;
        if (!isdigit((unsigned char)*s)) return reader_fails(r, "no number");
        while (isdigit((unsigned char)*s)) s++;
    }
    *x = strtod(r->at, NULL);
    r->at = s;
    return true;
}

// An event as it stands in the file. Keys that are not known are errors: the two programs belong
// together.
typedef struct Fields {
    char ph[8], name[96], label[96], s[8], cat[16], bp[8], arg_name[96];
    double pid, tid, ts, dur, id, issue, event, record, step, ready;
} Fields;

static bool read_fields(Reader* r, Fields* f, bool args) {
    if (!reader_takes(r, '{')) return reader_fails(r, "no object");
    while (true) {
        char key[32];
        if (!read_string(r, key, sizeof key)) return false;
        if (!reader_takes(r, ':')) return reader_fails(r, "no colon");
        struct { const char* key; bool args; char* text; size_t size; double* number; } known[] = {
            {"ph", false, f->ph, sizeof f->ph, NULL}, {"s", false, f->s, sizeof f->s, NULL},
            {"name", false, f->name, sizeof f->name, NULL},
            {"name", true, f->arg_name, sizeof f->arg_name, NULL},
            {"cat", false, f->cat, sizeof f->cat, NULL}, {"bp", false, f->bp, sizeof f->bp, NULL},
            {"label", true, f->label, sizeof f->label, NULL},
            {"pid", false, NULL, 0, &f->pid}, {"tid", false, NULL, 0, &f->tid},
            {"ts", false, NULL, 0, &f->ts}, {"dur", false, NULL, 0, &f->dur},
            {"id", false, NULL, 0, &f->id}, {"issue", true, NULL, 0, &f->issue},
            {"event", true, NULL, 0, &f->event}, {"record", true, NULL, 0, &f->record},
            {"step", true, NULL, 0, &f->step}, {"ready", true, NULL, 0, &f->ready}};
        int i = 0, n = (int)(sizeof known / sizeof known[0]);
        while (i < n && !(strcmp(known[i].key, key) == 0 && known[i].args == args)) i++;
        bool ok = i < n ? known[i].text ? read_string(r, known[i].text, known[i].size)
                                        : read_number(r, known[i].number)
                : !args && strcmp(key, "args") == 0 ? read_fields(r, f, true)
                                                    : reader_fails(r, "an unknown key");
        if (!ok) return false;
        if (reader_takes(r, '}')) return true;
        if (!reader_takes(r, ',')) return reader_fails(r, "no comma");
    }
}

// "reduce attn 0-2", "gather embed" on the communication stream.
static void item_label_comm(Item* e) {
    char verb[16] = "";
    int fields = sscanf(e->label, "%15s %31s %d-%d", verb, e->bank, &e->first, &e->last);
    if (fields >= 2 && strcmp(verb, "reduce") == 0) e->work = REDUCE;
    if (fields >= 2 && strcmp(verb, "gather") == 0) e->work = GATHER;
    if (fields != 4) e->first = e->last = -1;
}

// "forward 3" on any other.
static void item_label(Item* e) {
    int end = 0;
    bool layer = sscanf(e->label, "%*s %d%n", &e->first, &end) == 1 && !e->label[end];
    e->last = e->first;
    if (strncmp(e->label, "embed", 5) == 0) e->work = EMBED;
    else if (strcmp(e->label, "classify") == 0) e->work = CLASSIFY;
    else if (strcmp(e->label, "measure") == 0) e->work = MEASURE;
    else if (strcmp(e->label, "update") == 0) e->work = UPDATE;
    else if (layer && strncmp(e->label, "forward ", 8) == 0) e->work = FORWARD;
    else if (layer && strncmp(e->label, "backward ", 9) == 0) e->work = BACKWARD;
    if (e->work != FORWARD && e->work != BACKWARD) e->first = e->last = -1;
}

// Of a thread of the host: what took time, or the number of batches that were ready then.
static bool file_add_span(Reader* r, const Fields* f) {
    TraceFile* t = r->file;
    if (strcmp(f->ph, "C") == 0) {
        t->looks++;
        return f->ready >= 0 || reader_fails(r, "a counter without a number");
    }
    if (strcmp(f->ph, "X") != 0) return reader_fails(r, "an unknown event of a thread");
    if (!(f->ts >= 0 && f->dur >= 0 && f->step >= 0)) return reader_fails(r, "no time or step");
    if (t->span_count == t->span_capacity) {
        t->span_capacity = 2 * t->span_capacity + 64;
        t->spans = (Span*)realloc(t->spans, (size_t)t->span_capacity * sizeof(Span));
        REQUIRE(t->spans, "out of memory for %d entries of %s", t->span_capacity, t->path);
    }
    Span* span = &t->spans[t->span_count++];
    memset(span, 0, sizeof *span);
    span->thread = (int)f->tid;
    snprintf(span->name, sizeof span->name, "%.31s", f->name);
    span->ts = f->ts;
    span->dur = f->dur;
    span->step = (int64_t)f->step;
    return true;
}

static bool file_add(Reader* r, const Fields* f) {
    static const struct { const char* name; ItemKind kind; } MARKS[] = {
        {"record", ITEM_RECORD}, {"wait", ITEM_WAIT}, {"sync", ITEM_SYNC},
        {"sync event", ITEM_SYNC_EVENT}, {"step", ITEM_STEP}, {"cut", ITEM_CUT}};
    TraceFile* t = r->file;
    bool of_thread = f->tid >= CHECK_STREAMS;
    if (!(f->tid >= 0 && f->tid < CHECK_STREAMS + CHECK_THREADS))
        return reader_fails(r, "a tid out of range");
    int stream = (int)f->tid;
    t->rank = (int)f->pid;
    if (strcmp(f->ph, "M") == 0) {
        if (strcmp(f->name, "thread_name") == 0)
            snprintf(t->stream_names[stream], sizeof t->stream_names[0], "%.31s", f->arg_name);
        return true;
    }
    if (of_thread) return file_add_span(r, f);
    if (strcmp(f->ph, "s") == 0 || strcmp(f->ph, "f") == 0) {
        t->arrows_begun += f->ph[0] == 's';
        t->arrows_ended += f->ph[0] == 'f';
        return true;
    }
    int mark = 0;
    while (mark < 6 && strcmp(MARKS[mark].name, f->name) != 0) mark++;
    bool op = strcmp(f->ph, "X") == 0;
    if (!op && (strcmp(f->ph, "i") != 0 || mark == 6)) return reader_fails(r, "an unknown event");
    if (t->count == t->capacity) {
        t->capacity = 2 * t->capacity + 64;
        t->items = (Item*)realloc(t->items, (size_t)t->capacity * sizeof(Item));
        REQUIRE(t->items, "out of memory for %d entries of %s", t->capacity, t->path);
    }
    Item* e = &t->items[t->count++];
    memset(e, 0, sizeof *e);
    e->kind = op ? ITEM_OP : MARKS[mark].kind;
    memcpy(e->name, f->name, sizeof e->name);
    memcpy(e->label, f->label, sizeof e->label);
    e->stream = stream;
    e->ts = f->ts;
    e->dur = op ? f->dur : 0;
    e->issue = (int64_t)f->issue;
    e->event = (int64_t)f->event;
    e->record = (int64_t)f->record;
    e->step = (int64_t)f->step;
    if (op && is_comm(t, stream)) item_label_comm(e);
    else if (op) item_label(e);
    return true;
}

static bool file_read_events(Reader* r) {
    char key[32];
    if (!reader_takes(r, '{') || !read_string(r, key, sizeof key) ||
        strcmp(key, "traceEvents") != 0 || !reader_takes(r, ':') || !reader_takes(r, '['))
        return reader_fails(r, "not {\"traceEvents\":[");
    while (true) {
        Fields f;
        memset(&f, 0, sizeof f);
        f.pid = f.tid = f.ts = f.dur = f.issue = f.event = f.record = f.step = f.ready = NAN;
        if (!read_fields(r, &f, false) || !file_add(r, &f)) return false;
        if (reader_takes(r, ']')) break;
        if (!reader_takes(r, ',')) return reader_fails(r, "no comma between events");
    }
    if (!reader_takes(r, '}') || reader_next(r)) return reader_fails(r, "no end");
    return true;
}

static void file_free(TraceFile* t) {
    free(t->items);
    free(t->spans);
    free(t->steps);
    memset(t, 0, sizeof *t);
}

// ---- happens before ------------------------------------------------------------------------

static void clock_join(int* clock, const int* other) {
    for (int s = 0; s < CHECK_STREAMS; s++) if (other[s] > clock[s]) clock[s] = other[s];
}

static const Item* file_record(const TraceFile* t, int before, int64_t event, int64_t record) {
    for (int i = before - 1; i >= 0; i--) {
        const Item* e = &t->items[i];
        if (e->kind == ITEM_RECORD && e->event == event) return e->record == record ? e : NULL;
    }
    return NULL;
}

static void file_order(TraceFile* t) {
    int now[CHECK_STREAMS][CHECK_STREAMS], host[CHECK_STREAMS];
    memset(now, 0, sizeof now);
    memset(host, 0, sizeof host);
    for (int i = 0; i < t->count; i++) {
        Item* e = &t->items[i];
        int* clock = now[e->stream];
        const Item* record = e->kind == ITEM_WAIT || e->kind == ITEM_SYNC_EVENT
                                 ? file_record(t, i, e->event, e->record) : NULL;
        if (e->kind == ITEM_SYNC) clock_join(host, clock);
        if (e->kind == ITEM_SYNC_EVENT && record) clock_join(host, record->clock);
        if (e->kind == ITEM_OP || e->kind == ITEM_RECORD || e->kind == ITEM_WAIT) {
            clock_join(clock, host);
            if (record) clock_join(clock, record->clock);
            e->place = ++clock[e->stream];
        }
        memcpy(e->clock, clock, sizeof e->clock);
    }
}

static bool comes_after(const Item* later, const Item* earlier) {
    return later != earlier && later->clock[earlier->stream] >= earlier->place;
}

// Which products of a layer read weights and write gradients, by their place among its four. `ops`
// are the items of a run of one label on one stream. Returns whether there are four.
static bool run_mark(TraceFile* t, const int* ops, int n) {
    Work work = n ? t->items[ops[0]].work : OTHER;
    if (work != FORWARD && work != BACKWARD) return true;
    const char* product = work == FORWARD ? "matmul_" : "matmul_tn";
    int products = 0;
    for (int k = 0; k < n; k++) {
        Item* e = &t->items[ops[k]];
        bool is_product = strncmp(e->name, product, strlen(product)) == 0;
        products += is_product;
        e->reads_attn = work == FORWARD && products >= 1;      // and all that follows from it
        e->reads_mlp = work == FORWARD && products >= 3;
        e->writes_mlp = work == BACKWARD && is_product && products <= 2;
        e->writes_attn = work == BACKWARD && is_product && products > 2;
    }
    return products == 4;
}

// Returns the first item of a layer that has not four products, or NULL.
static const Item* file_mark_products(TraceFile* t) {
    int* ops = (int*)test_calloc(t->count, sizeof(int));
    const Item* odd = NULL;
    for (int s = 0; s < CHECK_STREAMS; s++) {
        int n = 0;
        for (int i = 0; i <= t->count; i++) {
            const Item* e = i < t->count ? &t->items[i] : NULL;
            if (e && (e->kind != ITEM_OP || e->stream != s)) continue;
            if (n && (!e || strcmp(e->label, t->items[ops[0]].label) != 0)) {
                if (!run_mark(t, ops, n) && !odd) odd = &t->items[ops[0]];
                n = 0;
            }
            if (e) ops[n++] = i;
        }
    }
    free(ops);
    return odd;
}

static void file_find_steps(TraceFile* t) {
    t->steps = (int*)test_calloc((size_t)t->count + 1, sizeof(int));
    for (int i = 0; i < t->count; i++)
        if (t->items[i].kind == ITEM_STEP) t->steps[t->step_count++] = i;
    t->steps[t->step_count] = t->count;
}

// Reads a trace out of `text`. What is wrong with it stands in t->problem.
static bool file_parse(TraceFile* t, const char* path, const char* text) {
    memset(t, 0, sizeof *t);
    t->path = path;
    Reader r = {text, t, 1};
    if (!file_read_events(&r)) return false;
    file_order(t);
    file_find_steps(t);
    return true;
}

// ---- verdicts ------------------------------------------------------------------------------

typedef enum { CHECK_FILE, CHECK_REDUCE, CHECK_GRADIENTS, CHECK_WEIGHTS, CHECK_HIDING, CHECK_RANKS,
               CHECK_DATA, CHECKS } Check;

typedef struct Verdict {
    bool quiet;                 // count only; for the test of this program
    int passed[CHECKS], failed[CHECKS];
    int reduces, gathers, updates;
    bool groups;                // a bank is gathered in several
    int hidden;                 // operations of forward 0 that were looked at for waits
} Verdict;

enum { PRINT_MOST = 10 };       // failures of a kind; the others are counted

static bool judge(Verdict* v, Check check, bool ok, const char* fmt, ...)
    __attribute__((format(printf, 4, 5)));

static bool judge(Verdict* v, Check check, bool ok, const char* fmt, ...) {
    char text[512];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    if (ok) v->passed[check]++;
    else v->failed[check]++;
    if (v->quiet) return ok;
    if (ok || v->failed[check] <= PRINT_MOST) return test_true(text, ok);
    return test_record(false, 0);
}

// "matmul_nt 64x768x768 (forward 3, issue 17)"
static const char* item_text(const Item* e) {
    static char texts[4][256];
    static int turn;
    char* text = texts[turn++ % 4];
    snprintf(text, sizeof texts[0], "%s (%s, issue %" PRId64 ")", e->name, e->label, e->issue);
    return text;
}

static bool item_is(const Item* e, Work work) {
    return e->kind == ITEM_OP && e->work == work;
}
static bool item_is_bank(const Item* e, const char* bank) {
    return strcmp(e->bank, bank) == 0;
}

// ---- file ----------------------------------------------------------------------------------

static void check_file(Verdict* v, TraceFile* t) {
    const Item* last[CHECK_STREAMS] = {};
    int64_t step = -1, records = 0, found = 0;
    int wrong_issue = 0, wrong_times = 0, unordered = 0, wrong_steps = 0, cuts = 0;
    for (int i = 0; i < t->count; i++) {
        const Item* e = &t->items[i];
        if (i && !(e->issue > t->items[i - 1].issue)) wrong_issue++;
        if (!(e->ts >= 0 && e->dur >= 0)) wrong_times++;
        if (e->kind == ITEM_OP) {
            if (last[e->stream] && !(e->ts >= last[e->stream]->ts)) unordered++;
            last[e->stream] = e;
        }
        if (e->kind == ITEM_WAIT && e->record > 0) {
            records++;
            found += file_record(t, i, e->event, e->record) != NULL;
        }
        if (e->kind == ITEM_STEP) wrong_steps += !(e->step > step), step = e->step;
        cuts += e->kind == ITEM_CUT;
    }
    judge(v, CHECK_FILE, t->count > 0, "%s: there are entries", t->path);
    judge(v, CHECK_FILE, wrong_issue == 0, "the order of issue ascends: %d do not", wrong_issue);
    judge(v, CHECK_FILE, wrong_times == 0, "times and durations are >= 0: %d are not", wrong_times);
    judge(v, CHECK_FILE, unordered == 0, "the operations of a stream start in order: %d do not",
          unordered);
    judge(v, CHECK_FILE, found == records,
          "a wait names the last record before it: %" PRId64 " of %" PRId64 " do", found, records);
    judge(v, CHECK_FILE, t->arrows_begun == t->arrows_ended, "arrows: %d begin, %d end",
          t->arrows_begun, t->arrows_ended);
    judge(v, CHECK_FILE, t->step_count > 0 && wrong_steps == 0, "there are steps, ascending: %d, "
          "%d of them not", t->step_count, wrong_steps);
    judge(v, CHECK_FILE, cuts == 0, "the trace is whole: it reached the limit of entries");
    const Item* odd = file_mark_products(t);
    judge(v, CHECK_FILE, !odd, "a layer has four products: not around %s",
          odd ? item_text(odd) : "");
}

// ---- reduces -------------------------------------------------------------------------------

// The lowest layer of the group whose backward follows that of `reduce`.
static int group_next(const TraceFile* t, int begin, int end, const Item* reduce) {
    int first = 0;
    for (int i = begin; i < end; i++) {
        const Item* e = &t->items[i];
        if (item_is(e, REDUCE) && item_is_bank(e, reduce->bank) && e->last == reduce->first - 1)
            first = e->first;
    }
    return first;
}

static void check_reduce(Verdict* v, const TraceFile* t, int begin, int end, const Item* reduce) {
    if (reduce->first <= 0) return;
    int low = group_next(t, begin, end, reduce);
    const Item *last = NULL, *next = NULL;
    for (int i = begin; i < end; i++) {
        const Item* e = &t->items[i];
        if (!item_is(e, BACKWARD) || e->first < low || e->first >= reduce->first) continue;
        last = e;
        if (!next && e->issue > reduce->issue) next = e;
    }
    judge(v, CHECK_REDUCE, last && last->issue > reduce->issue,
          "%s is issued before the backward of layers %d-%d is complete: %s", item_text(reduce),
          low, reduce->first - 1, last ? item_text(last) : "there is none");
    judge(v, CHECK_REDUCE, !next || !comes_after(next, reduce), "%s does not wait for %s",
          next ? item_text(next) : "", item_text(reduce));
}

// Whether `e` makes what `reduce` sums. A tied head's gradient is the embedding's; one of its own
// is made before the embedding's in any case.
static bool makes_gradient(const Item* e, const Item* reduce) {
    bool product = strncmp(e->name, "matmul_tn", 9) == 0;
    bool layer = e->first >= reduce->first && e->first <= reduce->last;
    if (item_is_bank(reduce, "attn")) return e->writes_attn && layer;
    if (item_is_bank(reduce, "mlp")) return e->writes_mlp && layer;
    if (item_is_bank(reduce, "head")) return item_is(e, CLASSIFY) && product;
    if (item_is_bank(reduce, "embed"))
        return item_is(e, EMBED) || (item_is(e, CLASSIFY) && product);
    return false;
}

static void check_gradients(Verdict* v, const TraceFile* t, int begin, int end,
                            const Item* reduce) {
    const Item* last = NULL;        // "backward" of its layers, issued before it
    int made = 0, late = 0;
    const Item* latest = NULL;
    for (int i = begin; i < end && !item_is(&t->items[i], UPDATE); i++) {
        const Item* e = &t->items[i];
        bool layer = e->first >= reduce->first && e->first <= reduce->last && reduce->first >= 0;
        if (item_is(e, BACKWARD) && layer && e->issue < reduce->issue) last = e;
        if (e->kind != ITEM_OP || !makes_gradient(e, reduce)) continue;
        made++;
        if (!comes_after(reduce, e)) late++, latest = e;
    }
    bool known = item_is_bank(reduce, "attn") || item_is_bank(reduce, "mlp") ||
                 item_is_bank(reduce, "head") || item_is_bank(reduce, "embed");
    if (reduce->first >= 0)
        judge(v, CHECK_GRADIENTS, last && comes_after(reduce, last), "%s comes after %s",
              item_text(reduce), last ? item_text(last) : "a backward that is not there");
    if (known)
        judge(v, CHECK_GRADIENTS, made > 0 && late == 0,
              "%s comes after all %d operations that make its gradients; not after %s",
              item_text(reduce), made, latest ? item_text(latest) : made ? "" : "any");
}

// Layers of the step's backward that no reduce (or of the forward that no gather) covers.
static int uncovered(const TraceFile* t, int begin, int end, Work layers, Work move,
                     const char* bank) {
    int missing = 0, highest = -1;
    for (int i = 0; i < t->count; i++)
        if (item_is(&t->items[i], layers) && t->items[i].first > highest)
            highest = t->items[i].first;
    for (int l = 0; l <= highest; l++) {
        bool found = false;
        for (int i = begin; i < end && !found; i++) {
            const Item* e = &t->items[i];
            found = item_is(e, move) && item_is_bank(e, bank) && e->first <= l && e->last >= l;
        }
        missing += !found;
    }
    return missing;
}

// The host does not look before an update: that the guard stands there is what keeps a step that is
// not finite from being applied.
static void check_guard(Verdict* v, const TraceFile* t, int begin, int end) {
    const Item* guard = NULL;
    int updates = 0, norms = 0, wrong = 0;
    for (int i = begin; i < end; i++)
        if (item_is(&t->items[i], MEASURE) && strcmp(t->items[i].name, "guard_check_kernel") == 0)
            guard = &t->items[i];
    for (int i = begin; i < end; i++) {
        const Item* e = &t->items[i];
        bool norm = item_is(e, MEASURE) && strncmp(e->name, "norms_", 6) == 0;
        norms += norm;
        updates += item_is(e, UPDATE);
        if (norm) wrong += !guard || !comes_after(guard, e);
        if (item_is(e, UPDATE)) wrong += !guard || !comes_after(e, guard);
    }
    if (!updates) return;
    judge(v, CHECK_GRADIENTS, wrong == 0 && norms > 0,
          "a guard comes after %d norms and before %d updates: %s, %d are on the wrong side", norms,
          updates, guard ? item_text(guard) : "there is none", wrong);
}

static void check_step_reduces(Verdict* v, const TraceFile* t, int begin, int end) {
    int reduces = 0;
    for (int i = begin; i < end; i++) {
        const Item* e = &t->items[i];
        if (!item_is(e, REDUCE)) continue;
        reduces++;
        check_reduce(v, t, begin, end, e);
        check_gradients(v, t, begin, end, e);
        for (int k = begin; k < end; k++) {
            if (!item_is(&t->items[k], UPDATE) && !item_is(&t->items[k], MEASURE)) continue;
            judge(v, CHECK_GRADIENTS, comes_after(&t->items[k], e), "%s comes after %s",
                  item_text(&t->items[k]), item_text(e));
        }
    }
    v->reduces += reduces;
    check_guard(v, t, begin, end);
    if (!reduces) return;
    int attn = uncovered(t, begin, end, BACKWARD, REDUCE, "attn");
    int mlp = uncovered(t, begin, end, BACKWARD, REDUCE, "mlp");
    judge(v, CHECK_GRADIENTS, attn == 0 && mlp == 0,
          "every layer is reduced: attn of %d and mlp of %d are not", attn, mlp);
}

// ---- gathers -------------------------------------------------------------------------------

static bool reads_weight(const Item* e, const Item* gather, bool tied) {
    bool layer = e->first >= gather->first && e->first <= gather->last;
    if (item_is_bank(gather, "attn")) return e->reads_attn && layer;
    if (item_is_bank(gather, "mlp")) return e->reads_mlp && layer;
    if (item_is_bank(gather, "head")) return item_is(e, CLASSIFY);
    if (item_is_bank(gather, "embed"))
        return item_is(e, EMBED) || (tied && item_is(e, CLASSIFY));
    return false;
}

static void check_weights(Verdict* v, const TraceFile* t, int begin, int gather, bool tied) {
    const Item* g = &t->items[gather];
    for (int i = begin; i < gather; i++) {
        if (!item_is(&t->items[i], UPDATE)) continue;
        judge(v, CHECK_WEIGHTS, comes_after(g, &t->items[i]), "%s comes after %s", item_text(g),
              item_text(&t->items[i]));
    }
    for (int i = gather + 1; i < t->count; i++) {
        const Item* e = &t->items[i];
        if (e->kind != ITEM_OP || !reads_weight(e, g, tied)) continue;
        judge(v, CHECK_WEIGHTS, comes_after(e, g), "%s comes after %s", item_text(e), item_text(g));
    }
}

// Groups of a bank go out in the order in which the next forward wants them, and it begins before
// the last one is there. That is asked of the next step, and not where an evaluation lies between.
// (A checkpoint's copy waits for all: where --checkpoint-every falls into the trace, this finds it.)
static void check_hiding(Verdict* v, const TraceFile* t, int begin, int end) {
    const Item* last = NULL;
    bool several = false;
    int last_index = 0;
    for (int i = begin; i < end; i++) {
        const Item *g = &t->items[i], *before = NULL;
        if (!item_is(g, GATHER) || g->first < 0) continue;
        for (int k = begin; k < i; k++)
            if (item_is(&t->items[k], GATHER) && item_is_bank(&t->items[k], g->bank))
                before = &t->items[k];
        bool next = before ? g->first == before->first || g->first == before->last + 1
                           : g->first == 0;
        judge(v, CHECK_HIDING, next, "%s is the next in forward order after %s", item_text(g),
              before ? item_text(before) : "none");
        several = several || g->first > 0;
        last = g;
        last_index = i;
    }
    if (!several) return;
    v->groups = true;
    for (int i = last_index + 1; i < end; i++) if (item_is(&t->items[i], FORWARD)) return;
    bool begun = false;
    for (int i = end; i < t->count; i++) {
        const Item* e = &t->items[i];
        if (e->kind != ITEM_OP || e->stream == last->stream) continue;
        bool wanted = e->work == FORWARD && e->first == 0;
        if (begun && !wanted) break;
        begun = wanted;
        v->hidden += wanted;
        if (wanted)
            judge(v, CHECK_HIDING, !comes_after(e, last), "%s does not wait for %s", item_text(e),
                  item_text(last));
    }
}

static void check_step_gathers(Verdict* v, const TraceFile* t, int begin, int end) {
    int gathers = 0, embeds = 0;
    bool tied = true;
    for (int i = begin; i < end; i++) {
        const Item* e = &t->items[i];
        v->updates += item_is(e, UPDATE);
        if (!item_is(e, GATHER)) continue;
        gathers++;
        embeds += item_is_bank(e, "embed");
        if (item_is_bank(e, "head")) tied = false;
    }
    v->gathers += gathers;
    if (!gathers) return;
    for (int i = begin; i < end; i++)
        if (item_is(&t->items[i], GATHER)) check_weights(v, t, begin, i, tied);
    int attn = uncovered(t, begin, end, FORWARD, GATHER, "attn");
    int mlp = uncovered(t, begin, end, FORWARD, GATHER, "mlp");
    judge(v, CHECK_WEIGHTS, attn == 0 && mlp == 0 && embeds > 0,
          "all weights are gathered: not attn of %d layers, mlp of %d, the embedding %d times",
          attn, mlp, embeds);
    check_hiding(v, t, begin, end);
}

// ---- ranks ---------------------------------------------------------------------------------

// The next collective after item i; the kernels beside them depend on what a rank owns.
static int next_collective(const TraceFile* t, int i) {
    for (i++; i < t->count; i++) {
        const Item* e = &t->items[i];
        if (e->kind == ITEM_OP && is_comm(t, e->stream) && !strstr(e->name, "kernel")) break;
    }
    return i;
}

static void check_ranks(Verdict* v, const TraceFile* a, const TraceFile* b) {
    int i = next_collective(a, -1), k = next_collective(b, -1), n = 0;
    while (i < a->count && k < b->count && strcmp(a->items[i].name, b->items[k].name) == 0 &&
           strcmp(a->items[i].label, b->items[k].label) == 0) {
        i = next_collective(a, i), k = next_collective(b, k), n++;
    }
    judge(v, CHECK_RANKS, i == a->count && k == b->count,
          "%s and %s issue the same collectives; after %d: %s, %s", a->path, b->path, n,
          i < a->count ? item_text(&a->items[i]) : "the end",
          k < b->count ? item_text(&b->items[k]) : "the end");
    judge(v, CHECK_RANKS, a->rank != b->rank, "%s and %s are of two ranks: both say %d", a->path,
          b->path, a->rank);
    judge(v, CHECK_RANKS, a->step_count == b->step_count, "%s has %d steps, %s %d", a->path,
          a->step_count, b->path, b->step_count);
}

// ---- data ----------------------------------------------------------------------------------

static bool span_is(const TraceFile* t, const Span* s, const char* thread, const char* name) {
    return strcmp(t->stream_names[s->thread], thread) == 0 && strcmp(s->name, name) == 0;
}

// The thread that reads was seen in each step but two (it is two ahead: those of the first steps may
// have been read before them, and those of the last the data may not have), and the steps found their
// batches.
static void check_data(Verdict* v, const TraceFile* t) {
    int reads = 0;
    for (int i = 0; i < t->span_count; i++) reads += span_is(t, &t->spans[i], "loader", "read");
    judge(v, CHECK_DATA, reads >= t->step_count - 2 && reads > 0 && t->looks > reads,
          "%d batches were read during %d steps, %d times somebody looked how many are ready",
          reads, t->step_count, t->looks);
    for (int s = 0; s < t->step_count; s++) {
        int64_t step = t->items[t->steps[s]].step;
        double waited = 0;
        int waits = 0;
        for (int i = 0; i < t->span_count; i++) {
            if (!span_is(t, &t->spans[i], "host", "wait") || t->spans[i].step != step) continue;
            waited += t->spans[i].dur;
            waits++;
        }
        judge(v, CHECK_DATA, waits == 0, "step %" PRId64 " never waits for data: %d times, %.0f us",
              step, waits, waited);
    }
}

// ---- all -----------------------------------------------------------------------------------

static void check_trace(Verdict* v, TraceFile* t) {
    check_file(v, t);
    for (int s = 0; s < t->step_count; s++) {
        check_step_reduces(v, t, t->steps[s], t->steps[s + 1]);
        check_step_gathers(v, t, t->steps[s], t->steps[s + 1]);
    }
}

// zero 0: reduces and no gathers; 1: both; -1: whatever there is. `count` files were judged.
static void check_found(Verdict* v, int zero) {
    if (zero >= 0) {
        judge(v, CHECK_GRADIENTS, v->reduces > 0, "there are reduces");
        judge(v, CHECK_GRADIENTS, v->updates > 0, "there are updates");
        judge(v, CHECK_WEIGHTS, (v->gathers > 0) == (zero == 1), "--zero %d: %d gathers", zero,
              v->gathers);
        judge(v, CHECK_HIDING, !v->groups || v->hidden > 0,
              "a forward follows at once on the gathers of a step: trace two steps that do");
    }
}

#ifndef CHECK_TRACE_NO_MAIN

static char* file_text(const char* path) {
    FILE* file = fopen(path, "rb");
    REQUIRE(file, "%s: cannot be opened: %s", path, strerror(errno));
    size_t n = 0, capacity = 1 << 20;
    char* text = (char*)malloc(capacity);
    while (text) {
        n += fread(text + n, 1, capacity - n - 1, file);
        if (n < capacity - 1) break;
        text = (char*)realloc(text, capacity *= 2);
    }
    REQUIRE(text && !ferror(file), "%s: cannot be read", path);
    fclose(file);
    text[n] = 0;
    return text;
}

static void print_steps(const TraceFile* t) {
    for (int s = 0; s < t->step_count; s++) {
        int ops[CHECK_STREAMS] = {}, waits = 0;
        for (int i = t->steps[s]; i < t->steps[s + 1]; i++) {
            ops[t->items[i].stream] += t->items[i].kind == ITEM_OP;
            waits += t->items[i].kind == ITEM_WAIT;
        }
        printf("      rank %d, step %" PRId64 ":", t->rank, t->items[t->steps[s]].step);
        for (int i = 0; i < CHECK_STREAMS; i++)
            if (ops[i]) printf(" %d operations on %s,", ops[i], t->stream_names[i]);
        printf(" %d waits\n", waits);
    }
}

int main(int argc, char** argv) {
    static TraceFile files[CHECK_FILES];
    static Verdict verdict;
    int count = 0, zero = -1;
    bool data = false;
    program_name = "check_trace";
    test_init(1, argv);
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--verbose") == 0) {
            test_state.verbose = true;
        } else if (strcmp(argv[i], "--data") == 0) {
            data = true;
        } else if (strcmp(argv[i], "--zero") == 0 && i + 1 < argc && strchr("01", argv[i + 1][0])) {
            zero = argv[++i][0] - '0';
        } else {
            REQUIRE(argv[i][0] != '-', "%s?\ncheck_trace [--zero 0|1] [--data] [--verbose] FILE...",
                    argv[i]);
            REQUIRE(count < CHECK_FILES, "more than %d files", CHECK_FILES);
            files[count++].path = argv[i];
        }
    }
    REQUIRE(count, "which file?\ncheck_trace [--zero 0|1] [--data] [--verbose] FILE...");
    for (int i = 0; i < count; i++) {
        char* text = file_text(files[i].path);
        char name[64];
        bool parsed = file_parse(&files[i], files[i].path, text);
        snprintf(name, sizeof name, "rank %d", files[i].rank);
        test_group(name);
        if (!parsed) {
            printf("FAIL  %s is no trace: %s\n", files[i].path, files[i].problem);
            test_record(false, 0);
            files[i].step_count = 0;
        } else {
            check_trace(&verdict, &files[i]);
            if (data) check_data(&verdict, &files[i]);
            print_steps(&files[i]);
        }
        free(text);
    }
    test_group("all");
    for (int i = 1; i < count; i++) check_ranks(&verdict, &files[0], &files[i]);
    check_found(&verdict, zero);
    static const char* const NAMES[] = {"file", "a reduce", "b gradients", "c weights", "d hiding",
                                        "ranks", "data"};
    for (int c = 0; c < CHECKS; c++)
        printf("      %-12s %6d hold, %d do not\n", NAMES[c], verdict.passed[c], verdict.failed[c]);
    printf("      %d reduces, %d updates, %d gathers\n", verdict.reduces, verdict.updates,
           verdict.gathers);
    if (zero < 0 && !verdict.reduces) test_skip("reduces", "there are none");
    if (zero < 0 && !verdict.gathers) test_skip("gathers", "there are none");
    for (int i = 0; i < count; i++) file_free(&files[i]);
    return test_summary();
}

#endif
