/*
--trace FILE: what ran on which stream, when, and what waited for what, in Chrome's trace format
(chrome://tracing and ui.perfetto.dev open it).

    trace_open("run.json", rank, world);        // "" : off
    trace_name_stream(stream, "compute");
    for (step ...) {
        trace_step(step);                       // the first trace_steps of them are recorded
        trace_label("forward %d", l);           // what is issued from here on belongs to
        launch<kernel>(...);                    // records itself, as matmul.cuh's products do
        trace_event_record(event, a);           // cudaEventRecord, and an arrow ..
        trace_stream_wait(b, event);            // .. to cudaStreamWaitEvent
    }
    trace_close();
    trace_host("loader", "read", 3, from, to, 2);     // what a thread of the host did; any thread

An operation lies between two events of its stream; their times are read when the trace is written:
by the trace_step after the last recorded one, so that a killed run has its trace, or else by
trace_close. Either waits for the device, once.

file        One object per line in {"traceEvents":[ .. ]}. Times in microseconds from the first
            trace_step of the rank, so those of two ranks have no common zero. pid: rank, tid:
            stream, or from 16 on a thread of the host.
              X  an operation: name, ts, dur, args label and issue. Issue is the place in the order
                 in which the host made its calls, over all streams. Of a host's thread: args step
              C  "batches ready": how many there were when a thread of the host had done something
              i  "step" (args step); "record" and "wait" (args event, record): the n-th record of
                 an event since the trace began, and a wait for it (record 0: one from before then,
                 or none); "sync": the host waited for all of a stream, "sync event": for a record;
                 "cut": the trace stopped growing here
              s, f  the arrow from a record to a wait, between the operations beside them
              M  names of ranks and streams
            With several ranks, rank r writes FILE with .rankr before its last extension.
times       On a GPU both are the device's. On the host each is when the operation was reached: in
            order an operation's time is its own; under HOST_STREAMS=lazy work of other streams may
            be done between its begin and its end. Copies and fills record nothing unless their
            caller does. The host's threads have its clock, set beside the device's once.
cost        Off: one test of a bool per operation, no memory. On: two events and some 100 bytes each
            until the file is written; and a stream passes two events more per operation.
limit       trace_limit entries; then recording ends with a note, and the file has what came before.
test        test/test_trace.cu. What the order in a file proves: test/check_trace.c
*/
#pragma once
#include <cuda_runtime.h>
#include <pthread.h>
#include <time.h>
#include "common.h"

#ifndef CUDA_CHECK
#error "trace.h is included by device.cuh: include that"
#endif

enum { TRACE_STREAMS = 16, TRACE_THREADS = 2, TRACE_TEXT = 128 };

typedef enum {
    TRACE_BEGIN, TRACE_END, TRACE_RECORD, TRACE_WAIT, TRACE_SYNC, TRACE_SYNC_EVENT, TRACE_STEP,
    TRACE_CUT
} TraceKind;

typedef struct TraceEntry {
    TraceKind kind;
    int stream;
    int name, label;            // TRACE_BEGIN: in texts
    int event;                  // TRACE_RECORD, TRACE_WAIT, TRACE_SYNC_EVENT: in events
    int other;                  // TRACE_BEGIN: its end. TRACE_WAIT: the record waited for, or -1
    int beside;                 // TRACE_RECORD, TRACE_WAIT: operation before, after it, or -1
    int64_t number;             // which record of the event; which step
    cudaEvent_t stamp;          // TRACE_BEGIN, TRACE_END
    double ms;
} TraceEntry;

typedef struct TraceStream {
    cudaStream_t stream;
    char name[32];
} TraceStream;

typedef struct TraceEvent {
    cudaEvent_t event;
    int64_t records;            // since the trace began
    int entry;                  // of the last, or -1
} TraceEvent;

typedef struct TraceSpan {
    const char* name;           // lives as long as the trace
    int thread;
    int64_t step;
    double from, to;            // seconds
    int ready;
} TraceSpan;

typedef struct Trace {
    FILE* file;                 // NULL: off, or done
    char path[4096 + 32];
    int rank;
    int64_t steps;              // begun
    TraceEntry* entries;
    TraceEvent* events;
    char** texts;               // names and labels, each once
    int count, capacity;
    int event_count, event_capacity;
    int text_count, text_capacity;
    int label;                  // of what is issued now
    bool cut;
    cudaEvent_t start;          // at the first trace_step, when it was ..
    double started;             // .. by the host's clock; 0: the threads are not recorded
    const char* threads[TRACE_THREADS];
    TraceSpan* spans;
    int thread_count, span_count, span_capacity;
} Trace;

static bool trace_on;           // recording
static int64_t trace_steps = 3;
static int trace_limit = 1 << 20;
static Trace trace_state;
static TraceStream trace_streams[TRACE_STREAMS];
static int trace_stream_count;
static pthread_mutex_t trace_lock = PTHREAD_MUTEX_INITIALIZER;     // of started, threads and spans

// ---- tables --------------------------------------------------------------------------------

// Room for one more; the first growth is from nothing.
static inline void* trace_grow(void* items, int count, int* capacity, size_t size) {
    if (count < *capacity) return items;
    *capacity = *capacity ? 2 * *capacity : 256;
    items = realloc(items, (size_t)*capacity * size);
    REQUIRE(items, "--trace: out of memory for %d entries of %zu bytes", *capacity, size);
    return items;
}

// Some hundred different texts: a search from the first on is short beside making two events.
static inline int trace_text(const char* text) {
    Trace* t = &trace_state;
    for (int i = 0; i < t->text_count; i++) if (strcmp(t->texts[i], text) == 0) return i;
    t->texts = (char**)trace_grow(t->texts, t->text_count, &t->text_capacity, sizeof(char*));
    t->texts[t->text_count] = (char*)host_alloc(strlen(text) + 1, 1);
    strcpy(t->texts[t->text_count], text);
    return t->text_count++;
}

static inline int trace_stream(cudaStream_t stream) {
    for (int i = 0; i < trace_stream_count; i++) if (trace_streams[i].stream == stream) return i;
    REQUIRE(trace_stream_count < TRACE_STREAMS, "--trace: more than %d streams\n"
            "raise TRACE_STREAMS", TRACE_STREAMS);
    TraceStream* s = &trace_streams[trace_stream_count];
    s->stream = stream;
    snprintf(s->name, sizeof s->name, stream ? "stream %d" : "null stream", trace_stream_count);
    return trace_stream_count++;
}

static inline int trace_event(cudaEvent_t event) {
    Trace* t = &trace_state;
    for (int i = 0; i < t->event_count; i++) if (t->events[i].event == event) return i;
    t->events = (TraceEvent*)trace_grow(t->events, t->event_count, &t->event_capacity,
                                        sizeof(TraceEvent));
    t->events[t->event_count].event = event;
    t->events[t->event_count].records = 0;
    t->events[t->event_count].entry = -1;
    return t->event_count++;
}

static inline int trace_add(TraceKind kind, int stream) {
    Trace* t = &trace_state;
    t->entries = (TraceEntry*)trace_grow(t->entries, t->count, &t->capacity, sizeof(TraceEntry));
    TraceEntry* e = &t->entries[t->count];
    memset(e, 0, sizeof *e);
    e->kind = kind;
    e->stream = stream;
    e->other = e->beside = -1;
    return t->count++;
}

// Whether there is room for what comes now. An operation that has begun still gets its end.
static inline bool trace_has_room(void) {
    Trace* t = &trace_state;
    if (t->count < trace_limit) return true;
    fprintf(stderr, "%s: --trace %s ends in its step %" PRId64 ": it has %d entries, the limit\n"
            "fewer --trace-steps make it whole\n", program_name, t->path, t->steps, t->count);
    trace_add(TRACE_CUT, 0);
    t->cut = true;
    trace_on = false;
    return false;
}

// ---- recording -----------------------------------------------------------------------------

// Between trace_open and trace_close.
static inline void trace_name_stream(cudaStream_t stream, const char* name) {
    if (!trace_state.file) return;
    int i = trace_stream(stream);
    snprintf(trace_streams[i].name, sizeof trace_streams[i].name, "%s", name);
}

static inline void trace_label(const char* fmt, ...) __attribute__((format(printf, 1, 2)));

static inline void trace_label(const char* fmt, ...) {
    if (!trace_on) return;
    char text[TRACE_TEXT];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    trace_state.label = trace_text(text);
}

static inline cudaEvent_t trace_stamp(cudaStream_t stream) {
    cudaEvent_t stamp;
    CUDA_CHECK(cudaEventCreate(&stamp));
    CUDA_CHECK(cudaEventRecord(stamp, stream));
    return stamp;
}

// Around one operation, or around a group of NCCL's calls: what a group holds is issued at its end.
// Returns what trace_end wants; -1: off.
static inline int trace_begin(const char* name, cudaStream_t stream) {
    if (!trace_on || !trace_has_room()) return -1;
    int op = trace_add(TRACE_BEGIN, trace_stream(stream));
    trace_state.entries[op].name = trace_text(name);
    trace_state.entries[op].label = trace_state.label;
    trace_state.entries[op].stamp = trace_stamp(stream);
    return op;
}

static inline void trace_end(int op, cudaStream_t stream) {
    if (op < 0) return;
    int number = trace_stream(stream);
    REQUIRE(op < trace_state.count && trace_state.entries[op].stream == number,
            "trace_end: operation %d was not begun on this stream, or not in this trace", op);
    int end = trace_add(TRACE_END, number);
    trace_state.entries[op].other = end;
    trace_state.entries[end].stamp = trace_stamp(stream);
}

static inline void trace_add_record(TraceKind kind, cudaStream_t stream, cudaEvent_t event) {
    if (!trace_on || !trace_has_room()) return;
    Trace* t = &trace_state;
    int i = trace_event(event), entry = trace_add(kind, trace_stream(stream));
    if (kind == TRACE_RECORD) {
        t->events[i].records++;
        t->events[i].entry = entry;
    }
    t->entries[entry].event = i;
    t->entries[entry].number = t->events[i].records;
    t->entries[entry].other = t->events[i].entry;
}

static inline cudaError_t trace_event_record(cudaEvent_t event, cudaStream_t stream) {
    trace_add_record(TRACE_RECORD, stream, event);
    return cudaEventRecord(event, stream);
}

static inline cudaError_t trace_stream_wait(cudaStream_t stream, cudaEvent_t event) {
    trace_add_record(TRACE_WAIT, stream, event);
    return cudaStreamWaitEvent(stream, event, 0);
}

// The host's own waits: they too order what is issued after them.
static inline cudaError_t trace_stream_sync(cudaStream_t stream) {
    if (trace_on && trace_has_room()) trace_add(TRACE_SYNC, trace_stream(stream));
    return cudaStreamSynchronize(stream);
}

static inline cudaError_t trace_event_sync(cudaEvent_t event) {
    if (trace_on) {
        int i = trace_event(event), record = trace_state.events[i].entry;
        int stream = record < 0 ? 0 : trace_state.entries[record].stream;
        if (record >= 0) trace_add_record(TRACE_SYNC_EVENT, trace_streams[stream].stream, event);
    }
    return cudaEventSynchronize(event);
}

static inline double trace_clock(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// What a thread of the host did from one time of CLOCK_MONOTONIC to another (the same: nothing, but
// it looked), and how many batches were ready then. As a LoaderWatch it shows when a step waited
// for its data. Names live as long as the trace.
static inline void trace_host(const char* thread, const char* name, int64_t step, double from,
                              double to, int ready) {
    Trace* t = &trace_state;
    pthread_mutex_lock(&trace_lock);
    if (t->started > 0 && from >= t->started && t->span_count < trace_limit) {
        int i = 0;
        while (i < t->thread_count && strcmp(t->threads[i], thread) != 0) i++;
        REQUIRE(i < TRACE_THREADS, "--trace: more than %d threads of the host", TRACE_THREADS);
        if (i == t->thread_count) t->threads[t->thread_count++] = thread;
        t->spans = (TraceSpan*)trace_grow(t->spans, t->span_count, &t->span_capacity,
                                          sizeof(TraceSpan));
        TraceSpan span = { name, i, step, from, to, ready };
        t->spans[t->span_count++] = span;
    }
    pthread_mutex_unlock(&trace_lock);
}

// From here on the host's threads are recorded (on), or no more. An event lies between two readings
// of the host's clock: of eight, the one between the nearest sets the clocks beside each other.
static inline void trace_threads(bool on) {
    Trace* t = &trace_state;
    double started = 0, nearest = INFINITY;
    for (int i = 0; on && i < 8; i++) {
        double from = trace_clock();
        cudaEvent_t stamp = trace_stamp(trace_stream_count ? trace_streams[0].stream : NULL);
        CUDA_CHECK(cudaEventSynchronize(stamp));
        double apart = trace_clock() - from;
        bool best = apart < nearest;
        cudaEvent_t other = best ? t->start : stamp;
        if (other) CUDA_CHECK(cudaEventDestroy(other));
        if (!best) continue;
        t->start = stamp;
        nearest = apart;
        started = from + apart / 2;
    }
    pthread_mutex_lock(&trace_lock);
    t->started = started;
    pthread_mutex_unlock(&trace_lock);
}

// The name that the compiler gives to template parameter K: "... [with auto K = name; ...]".
static inline void trace_shorten(char* name, size_t size, const char* function) {
    const char* s = strstr(function, "K = ");
    s = s ? s + 4 : function;
    size_t n = 0;
    for (; s[n] && s[n] != ';' && s[n] != ']' && n < size - 1; n++) name[n] = s[n];
    name[n] = 0;
}

template <auto K> static inline const char* trace_kernel_name(void) {
    static char name[TRACE_TEXT];
    if (!name[0]) trace_shorten(name, sizeof name, __PRETTY_FUNCTION__);
    return name;
}

// ---- times ---------------------------------------------------------------------------------

// A float holds milliseconds to 1e-7 of them: so times are added up along each stream, from one
// stamp to the next, which also keeps them in order.
static inline void trace_read_stamps(void) {
    Trace* t = &trace_state;
    cudaEvent_t last[TRACE_STREAMS] = {};
    double last_ms[TRACE_STREAMS] = {};
    for (int i = 0; i < t->count; i++) {
        TraceEntry* e = &t->entries[i];
        if (!e->stamp) continue;
        float ms = 0;
        cudaEvent_t from = last[e->stream] ? last[e->stream] : t->start;
        CUDA_CHECK(cudaEventElapsedTime(&ms, from, e->stamp));
        e->ms = last_ms[e->stream] + ms;
        last[e->stream] = e->stamp;
        last_ms[e->stream] = e->ms;
    }
}

// What has no stamp: a record and a sync stand where the work before them ended, a wait where the
// work after it began, a step at the next operation of any stream.
static inline void trace_place_marks(void) {
    Trace* t = &trace_state;
    int stamp[TRACE_STREAMS], op[TRACE_STREAMS], any = -1;
    memset(stamp, -1, sizeof stamp);
    memset(op, -1, sizeof op);
    for (int i = 0; i < t->count; i++) {
        TraceEntry* e = &t->entries[i];
        int s = e->stream;
        if (e->kind == TRACE_BEGIN) op[s] = i;
        if (e->stamp) {
            stamp[s] = any = i;
            continue;
        }
        int before = e->kind == TRACE_STEP || e->kind == TRACE_CUT ? any : stamp[s];
        if (before >= 0) e->ms = t->entries[before].ms;
        if (e->kind == TRACE_RECORD) e->beside = op[s];
    }
    memset(op, -1, sizeof op);
    any = -1;
    for (int i = t->count - 1; i >= 0; i--) {
        TraceEntry* e = &t->entries[i];
        int s = e->stream;
        if (e->kind == TRACE_BEGIN) op[s] = any = i;
        int after = e->kind == TRACE_STEP ? any : e->kind == TRACE_WAIT ? op[s] : -1;
        if (after >= 0) e->ms = t->entries[after].ms;
        if (e->kind == TRACE_WAIT) e->beside = op[s];
    }
}

// ---- the file ------------------------------------------------------------------------------

// Nanoseconds as whole numbers: ts + dur of one operation is never past the ts of the next.
static inline int64_t trace_ns(const TraceEntry* e) {
    return llround(e->ms * 1e6);
}

static inline void trace_put(const char* phase, const char* name, int stream, int64_t ns) {
    Trace* t = &trace_state;
    fprintf(t->file, ",\n{\"ph\":\"%s\",\"pid\":%d,\"tid\":%d,\"ts\":%" PRId64 ".%03d,\"name\":",
            phase, t->rank, stream, ns / 1000, (int)(ns % 1000));
    json_string(t->file, name, strlen(name));
}

static inline void trace_put_name(const char* what, int stream, const char* name) {
    Trace* t = &trace_state;
    fprintf(t->file, "{\"ph\":\"M\",\"pid\":%d,\"tid\":%d,\"name\":\"%s\",\"args\":{\"name\":",
            t->rank, stream, what);
    json_string(t->file, name, strlen(name));
    fputs("}}", t->file);
}

// Of a thread: what took time, and the counter behind it.
static inline void trace_put_span(const TraceSpan* span, double started) {
    Trace* t = &trace_state;
    int64_t from = llround((span->from - started) * 1e9), to = llround((span->to - started) * 1e9);
    if (to > from) {
        trace_put("X", span->name, TRACE_STREAMS + span->thread, from);
        fprintf(t->file, ",\"dur\":%" PRId64 ".%03d,\"args\":{\"step\":%" PRId64 "}}",
                (to - from) / 1000, (int)((to - from) % 1000), span->step);
    }
    trace_put("C", "batches ready", TRACE_STREAMS + span->thread, to);
    fprintf(t->file, ",\"args\":{\"ready\":%d}}", span->ready);
}

static inline void trace_put_mark(const char* name, const TraceEntry* e, int issue) {
    trace_put("i", name, e->stream, trace_ns(e));
    fputs(",\"s\":\"t\",\"args\":{", trace_state.file);
    if (e->kind == TRACE_STEP) fprintf(trace_state.file, "\"step\":%" PRId64 ",", e->number);
    if (e->kind == TRACE_RECORD || e->kind == TRACE_WAIT || e->kind == TRACE_SYNC_EVENT)
        fprintf(trace_state.file, "\"event\":%d,\"record\":%" PRId64 ",", e->event, e->number);
    fprintf(trace_state.file, "\"issue\":%d}}", issue);
}

// Arrows end at the operation around their time; so a nanosecond inside of it, where it has one.
static inline void trace_put_arrow(const TraceEntry* wait, int id) {
    Trace* t = &trace_state;
    if (wait->other < 0 || wait->beside < 0 || t->entries[wait->other].beside < 0) return;
    const TraceEntry* to = &t->entries[wait->beside];
    const TraceEntry* from = &t->entries[t->entries[wait->other].beside];
    int64_t end = trace_ns(&t->entries[from->other]), begin = trace_ns(to);
    trace_put("s", "wait", from->stream, end > trace_ns(from) ? end - 1 : end);
    fprintf(t->file, ",\"cat\":\"wait\",\"id\":%d}", id);
    trace_put("f", "wait", to->stream,
              trace_ns(&t->entries[to->other]) > begin ? begin + 1 : begin);
    fprintf(t->file, ",\"cat\":\"wait\",\"id\":%d,\"bp\":\"e\"}", id);
}

static inline void trace_write(double started) {
    static const char* const MARKS[] = { "", "", "record", "wait", "sync", "sync event", "step",
                                         "cut" };
    Trace* t = &trace_state;
    char name[32];
    snprintf(name, sizeof name, "rank %d", t->rank);
    fputs("{\"traceEvents\":[\n", t->file);
    trace_put_name("process_name", 0, name);
    for (int i = 0; i < trace_stream_count; i++) {
        fputs(",\n", t->file);
        trace_put_name("thread_name", i, trace_streams[i].name);
    }
    for (int i = 0; i < t->thread_count; i++) {
        fputs(",\n", t->file);
        trace_put_name("thread_name", TRACE_STREAMS + i, t->threads[i]);
    }
    for (int i = 0; i < t->count; i++) {
        const TraceEntry* e = &t->entries[i];
        if (e->kind == TRACE_END) continue;
        if (e->kind != TRACE_BEGIN) {
            trace_put_mark(MARKS[e->kind], e, i);
            if (e->kind == TRACE_WAIT) trace_put_arrow(e, i);
            continue;
        }
        int64_t begin = trace_ns(e), ns = trace_ns(&t->entries[e->other]) - begin;
        trace_put("X", t->texts[e->name], e->stream, begin);
        fprintf(t->file, ",\"dur\":%" PRId64 ".%03d,\"args\":{\"label\":", ns / 1000,
                (int)(ns % 1000));
        json_string(t->file, t->texts[e->label], strlen(t->texts[e->label]));
        fprintf(t->file, ",\"issue\":%d}}", i);
    }
    for (int i = 0; i < t->span_count; i++) trace_put_span(&t->spans[i], started);
    fputs("\n]}\n", t->file);
}

// ---- begin and end -------------------------------------------------------------------------

// FILE, or for one of several ranks FILE with .rankN before its last extension.
static inline void trace_path(char* path, size_t size, const char* file, int rank, int world) {
    const char *slash = strrchr(file, '/'), *base = slash ? slash + 1 : file;
    const char* dot = strrchr(base, '.');
    if (!dot || dot == base) dot = file + strlen(file);
    int n = world > 1 ? snprintf(path, size, "%.*s.rank%d%s", (int)(dot - file), file, rank, dot)
                      : snprintf(path, size, "%s", file);
    REQUIRE(n >= 0 && (size_t)n < size, "--trace: a name of %zu letters is too long", strlen(file));
}

static inline void trace_clear(void) {
    pthread_mutex_lock(&trace_lock);
    memset(&trace_state, 0, sizeof trace_state);
    pthread_mutex_unlock(&trace_lock);
}

// Opens the file at once: a path that cannot be written is told before the first step, not after.
static inline void trace_open(const char* path, int rank, int world) {
    Trace* t = &trace_state;
    if (!path[0]) return;
    REQUIRE(!t->file, "trace_open: a trace is open already, %s", t->path);
    trace_clear();
    t->rank = rank;
    trace_path(t->path, sizeof t->path, path, rank, world);
    t->file = fopen(t->path, "w");
    REQUIRE(t->file, "--trace %s: cannot be created: %s", t->path, strerror(errno));
}

static inline void trace_close(void) {
    Trace* t = &trace_state;
    if (!t->file) return;
    double started = t->started;
    trace_on = false;
    trace_threads(false);
    CUDA_CHECK(cudaDeviceSynchronize());
    for (int i = 0; i < t->count; i++)
        REQUIRE(t->entries[i].kind != TRACE_BEGIN || t->entries[i].other >= 0,
                "--trace: %s was begun and never ended", t->texts[t->entries[i].name]);
    trace_read_stamps();
    trace_place_marks();
    trace_write(started);
    REQUIRE(fflush(t->file) == 0 && !ferror(t->file), "--trace %s: cannot be written: %s", t->path,
            strerror(errno));
    fclose(t->file);
    for (int i = 0; i < t->count; i++)
        if (t->entries[i].stamp) CUDA_CHECK(cudaEventDestroy(t->entries[i].stamp));
    if (t->start) CUDA_CHECK(cudaEventDestroy(t->start));
    for (int i = 0; i < t->text_count; i++) free(t->texts[i]);
    free(t->texts);
    free(t->spans);
    free(t->events);
    free(t->entries);
    trace_clear();
    trace_stream_count = 0;
}

// At the beginning of each step. After the first trace_steps of them the file is written and the
// trace is off for good.
static inline void trace_step(int64_t step) {
    Trace* t = &trace_state;
    if (!t->file) return;
    if (t->steps == trace_steps) {
        trace_close();
        return;
    }
    if (t->steps++ == 0) trace_threads(true);
    if (t->cut) return;
    trace_on = true;
    t->label = trace_text("");
    if (!trace_has_room()) return;
    int entry = trace_add(TRACE_STEP, 0);
    t->entries[entry].number = step;
}
