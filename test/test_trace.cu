/*
--trace: what llmc/trace.h writes, read back by test/check_trace.c; and that program itself, on
traces made by hand that are right, and wrong in one way each.

    test_trace [part of a group's name] [--verbose]

What must end the program is run in a child, which launches no kernel: a child has no workers.
*/
#include "../llmc/device.cuh"
#include "../llmc/matmul.cuh"
#define CHECK_TRACE_NO_MAIN
#include "check_trace.c"
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static char folder[256];        // of this run's files; removed at the end

// ---- files and children --------------------------------------------------------------------

static const char* path_of(const char* name) {
    static char paths[4][512];
    static int turn;
    char* path = paths[turn++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", folder, name);
    return path;
}

static char* file_read(const char* path) {
    FILE* file = fopen(path, "rb");
    if (!file) return NULL;
    fseek(file, 0, SEEK_END);
    size_t n = (size_t)ftell(file);
    rewind(file);
    char* text = (char*)test_calloc(n + 1, 1);
    REQUIRE(fread(text, 1, n, file) == n, "%s: cannot be read", path);
    fclose(file);
    return text;
}

// Reads a trace that must be one; the caller frees it with file_free.
static TraceFile trace_read(const char* path) {
    TraceFile t;
    memset(&t, 0, sizeof t);
    char* text = file_read(path);
    bool ok = text && file_parse(&t, path, text);
    if (!test_true("the file is a trace", ok)) printf("      %s: %s\n", path, t.problem);
    free(text);
    return t;
}

static void trace_is_sound(TraceFile* t) {
    static Verdict v;
    memset(&v, 0, sizeof v);
    check_file(&v, t);
}

// Runs f in a copy of this process; it must end with status 1 and both parts in its message.
static void expect_death(const char* what, void (*f)(void), const char* part1, const char* part2) {
    char message[4096] = "";
    FILE* err = tmpfile();
    REQUIRE(err, "no temporary file: %s", strerror(errno));
    fflush(stdout);
    pid_t pid = fork();
    REQUIRE(pid >= 0, "fork: %s", strerror(errno));
    if (pid == 0) {
        dup2(fileno(err), STDERR_FILENO);
        f();
        _exit(0);
    }
    int status = 0;
    waitpid(pid, &status, 0);
    rewind(err);
    message[fread(message, 1, sizeof message - 1, err)] = 0;
    fclose(err);
    bool ok = WIFEXITED(status) && WEXITSTATUS(status) == 1 && strstr(message, part1) &&
              strstr(message, part2);
    if (!test_true(what, ok)) printf("      status %d, message: %s", status, message);
}

// ---- recording -----------------------------------------------------------------------------

template <int A> static __global__ void add_kernel(float* x, const float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] = y[i] + A;
}

static __global__ void spin_kernel(float* x, int turns) {
    float sum = 0;
    for (int i = 0; i < turns; i++) sum += sqrtf((float)i + sum);
    x[0] = sum;
}

static float* device_floats(int n, float value) {
    float* x = test_device_float(n);
    double* host = test_doubles(n);
    for (int i = 0; i < n; i++) host[i] = value;
    test_put_float(x, host, n);
    free(host);
    return x;
}

typedef struct Wanted {
    ItemKind kind;
    const char *name, *label;   // ITEM_OP
    int stream, event, record;
} Wanted;

static void expect_items(const TraceFile* t, const Wanted* wanted, int n) {
    test_check("entries in the trace", abs(t->count - n), 0);
    for (int i = 0; i < n && i < t->count; i++) {
        const Item* e = &t->items[i];
        const Wanted* w = &wanted[i];
        bool ok = e->kind == w->kind && e->stream == w->stream;
        if (w->kind == ITEM_OP)
            ok = ok && strcmp(e->name, w->name) == 0 && strcmp(e->label, w->label) == 0;
        if (w->kind == ITEM_RECORD || w->kind == ITEM_WAIT || w->kind == ITEM_SYNC_EVENT)
            ok = ok && e->event == w->event && e->record == w->record;
        if (!test_true("an entry is what was issued", ok))
            printf("      %d: kind %d '%s' '%s' stream %d event %d record %d\n", i, e->kind,
                   e->name, e->label, e->stream, (int)e->event, (int)e->record);
    }
}

// The first and last line apart, each line is an object of its own.
static void expect_lines(const char* path) {
    char* text = file_read(path);
    REQUIRE(text, "%s is not there", path);
    int lines = 0, wrong = 0;
    char* line = strtok(text, "\n");
    wrong += strcmp(line, "{\"traceEvents\":[") != 0;
    for (line = strtok(NULL, "\n"); line && line[0] == '{'; line = strtok(NULL, "\n"), lines++) {
        TraceFile f;
        char alone[1024];
        size_t n = strlen(line);
        if (line[n - 1] == ',') line[n - 1] = 0;
        snprintf(alone, sizeof alone, "{\"traceEvents\":[%s]}", line);
        wrong += !file_parse(&f, path, alone);
        file_free(&f);
    }
    wrong += !line || strcmp(line, "]}") != 0;
    test_check("one object per line", wrong, 0);
    test_true("and there are lines", lines > 0);
    free(text);
}

// A tenth of a nanosecond early: whole nanoseconds are not whole as doubles of microseconds.
static double item_end(const Item* e) {
    return e->ts + e->dur - 1e-4;
}

static void trace_streams_case(void) {
    enum { N = 100 };
    const char* path = path_of("streams.json");
    cudaStream_t a, b;
    cudaEvent_t old, ready, done, timed;
    CUDA_CHECK(cudaStreamCreateWithFlags(&a, cudaStreamNonBlocking));
    CUDA_CHECK(cudaStreamCreateWithFlags(&b, cudaStreamNonBlocking));
    CUDA_CHECK(cudaEventCreateWithFlags(&old, cudaEventDisableTiming));
    CUDA_CHECK(cudaEventCreateWithFlags(&ready, cudaEventDisableTiming));
    CUDA_CHECK(cudaEventCreateWithFlags(&done, cudaEventDisableTiming));
    CUDA_CHECK(cudaEventCreate(&timed));
    float *x = device_floats(N, 1), *y = device_floats(N, 0), *z = device_floats(N, 0);

    trace_open(path, 0, 1);
    trace_name_stream(a, "compute");
    trace_name_stream(b, "comm");
    trace_label("lost");                          // nothing is recorded before a step
    launch<add_kernel<1>>(dim3(1), dim3(128), 0, a, y, (const float*)x, (int)N);
    CUDA_CHECK(trace_event_record(old, a));
    trace_step(7);
    launch<add_kernel<1>>(dim3(1), dim3(128), 0, a, y, (const float*)x, (int)N);          // y = 2
    trace_label("part %d", 3);
    CUDA_CHECK(trace_event_record(ready, a));
    CUDA_CHECK(trace_stream_wait(b, ready));
    launch<add_kernel<20>>(dim3(1), dim3(128), 0, b, z, (const float*)y, (int)N);         // z = 22
    CUDA_CHECK(trace_event_record(done, b));
    launch<add_kernel<1>>(dim3(1), dim3(128), 0, a, x, (const float*)x, (int)N);          // x = 2
    CUDA_CHECK(trace_stream_wait(a, old));
    CUDA_CHECK(trace_stream_wait(a, done));
    trace_label("quote \" back \\ line \n byte \xff");
    int op = trace_begin("group", a);
    launch<add_kernel<20>>(dim3(1), dim3(128), 0, a, y, (const float*)z, (int)N);         // y = 42
    trace_end(op, a);
    CUDA_CHECK(trace_event_record(ready, a));
    CUDA_CHECK(trace_stream_wait(b, ready));
    CUDA_CHECK(trace_event_sync(ready));
    CUDA_CHECK(trace_event_sync(old));                            // not of this trace: no entry
    float ms;
    CUDA_CHECK(trace_event_record(timed, a));
    CUDA_CHECK(trace_event_sync(timed));
    bool done_now = cudaEventElapsedTime(&ms, timed, timed) == cudaSuccess;
    test_true("the host waits for an event", done_now);
    CUDA_CHECK(cudaEventRecord(timed, b));
    launch<add_kernel<1>>(dim3(1), dim3(128), 0, b, z, (const float*)x, (int)N);
    CUDA_CHECK(trace_stream_sync(b));
    test_true("and for a stream", cudaEventElapsedTime(&ms, timed, timed) == cudaSuccess);
    launch<add_kernel<1>>(dim3(1), dim3(128), 0, a, x, (const float*)x, (int)N);
    trace_close();
    trace_step(8);                                                // after its end: nothing
    test_true("closed", !trace_on && !trace_state.file && !trace_state.entries);

    double want[N];
    for (int i = 0; i < N; i++) want[i] = 42;
    test_compare_device_float("the waits are waited for", y, want, N, 0, 0);

    TraceFile t = trace_read(path);
    const char* odd = "quote \" back \\ line \n byte ?";      // U+FFFD is read as '?'
    const Wanted wanted[] = {{ITEM_STEP, NULL, NULL, 0, 0, 0},
                             {ITEM_OP, "add_kernel<1>", "", 0, 0, 0},
                             {ITEM_RECORD, NULL, NULL, 0, 0, 1},
                             {ITEM_WAIT, NULL, NULL, 1, 0, 1},
                             {ITEM_OP, "add_kernel<20>", "part 3", 1, 0, 0},
                             {ITEM_RECORD, NULL, NULL, 1, 1, 1},
                             {ITEM_OP, "add_kernel<1>", "part 3", 0, 0, 0},
                             {ITEM_WAIT, NULL, NULL, 0, 2, 0},
                             {ITEM_WAIT, NULL, NULL, 0, 1, 1},
                             {ITEM_OP, "group", odd, 0, 0, 0},
                             {ITEM_OP, "add_kernel<20>", odd, 0, 0, 0},
                             {ITEM_RECORD, NULL, NULL, 0, 0, 2},
                             {ITEM_WAIT, NULL, NULL, 1, 0, 2},
                             {ITEM_SYNC_EVENT, NULL, NULL, 0, 0, 2},
                             {ITEM_RECORD, NULL, NULL, 0, 3, 1},
                             {ITEM_SYNC_EVENT, NULL, NULL, 0, 3, 1},
                             {ITEM_OP, "add_kernel<1>", odd, 1, 0, 0},
                             {ITEM_SYNC, NULL, NULL, 1, 0, 0},
                             {ITEM_OP, "add_kernel<1>", odd, 0, 0, 0}};
    expect_items(&t, wanted, sizeof wanted / sizeof wanted[0]);
    if (t.count == sizeof wanted / sizeof wanted[0]) {
        const Item* e = t.items;
        test_true("the step's number", e[0].step == 7 && t.step_count == 1);
        test_true("an arrow for each wait with work on both sides", t.arrows_begun == 3);
        test_true("an operation begins after what it waits for has ended",
                  e[4].ts >= item_end(&e[1]) && e[9].ts >= item_end(&e[4]));
        test_true("a stream's operations do not overlap", e[6].ts >= item_end(&e[1]));
        test_true("a group holds its operations",
                  e[10].ts >= e[9].ts && item_end(&e[10]) <= e[9].ts + e[9].dur);
        test_true("a record stands behind the work before it",
                  fabs(e[2].ts - item_end(&e[1])) < 2e-4);
        test_true("a wait stands where the work after it begins", e[3].ts == e[4].ts);
        test_true("what a wait orders", comes_after(&e[4], &e[1]) && comes_after(&e[9], &e[4]));
        test_true("what the host's wait orders", comes_after(&e[18], &e[16]));
        test_true("and what none does", !comes_after(&e[6], &e[4]) && !comes_after(&e[4], &e[6]));
    }
    test_true("names of the streams", strcmp(t.stream_names[0], "compute") == 0 &&
                                          strcmp(t.stream_names[1], "comm") == 0);
    trace_is_sound(&t);
    expect_lines(path);
    file_free(&t);
    CUDA_CHECK(cudaFree(x));
    CUDA_CHECK(cudaFree(y));
    CUDA_CHECK(cudaFree(z));
    CUDA_CHECK(cudaEventDestroy(old));
    CUDA_CHECK(cudaEventDestroy(ready));
    CUDA_CHECK(cudaEventDestroy(done));
    CUDA_CHECK(cudaEventDestroy(timed));
    CUDA_CHECK(cudaStreamDestroy(a));
    CUDA_CHECK(cudaStreamDestroy(b));
}

static void test_streams(void) {
    host_set_streams("inorder", 0);
    trace_streams_case();
    for (int seed = 0; seed < 5; seed++) {
        host_set_streams("lazy", seed);
        trace_streams_case();
    }
    host_set_streams("inorder", 0);
}

// A matmul says which of the products it is, and its size.
static void test_matmul_names(void) {
    enum { N = 24 * 24 * 2 };
    static Matmul mm;
    double* zero = test_doubles(N);
    floatX *x = test_upload(zero, N), *y = test_upload(zero, N), *d = test_upload(zero, N);
    float* dw = device_floats(N, 0);
    matmul_init(&mm, NULL);
    trace_open(path_of("matmul.json"), 0, 1);
    trace_step(1);
    matmul_nt(d, x, y, 8, 16, 24, &mm, NULL);
    matmul_nn(d, x, y, 8, 16, 24, &mm, NULL);
    matmul_tn(dw, x, y, 8, 16, 24, 0.0f, &mm, NULL);
    matmul_batched(d, x, y, NULL, 8, 16, 24, 2, true, true, 1.0f, 0.0f, &mm, NULL);
    trace_close();
    TraceFile t = trace_read(path_of("matmul.json"));
    const Wanted wanted[] = {{ITEM_STEP, NULL, NULL, 0, 0, 0},
                             {ITEM_OP, "matmul_nt 8x16x24", "", 0, 0, 0},
                             {ITEM_OP, "matmul_nn 8x16x24", "", 0, 0, 0},
                             {ITEM_OP, "matmul_tn 8x16x24", "", 0, 0, 0},
                             {ITEM_OP, "matmul_tt 8x16x24 x2", "", 0, 0, 0}};
    expect_items(&t, wanted, 5);
    test_true("the null stream's name", strcmp(t.stream_names[0], "null stream") == 0);
    file_free(&t);
    matmul_free(&mm);
    CUDA_CHECK(cudaFree(x));
    CUDA_CHECK(cudaFree(y));
    CUDA_CHECK(cudaFree(d));
    CUDA_CHECK(cudaFree(dw));
    free(zero);
}

static void test_names(void) {
    static const char* const CASES[][2] = {
        {"void launch(dim3, A...) [with auto K = relu2_kernel; A = {float}]", "relu2_kernel"},
        {"f() [with auto K = mix<64, false>]", "mix<64, false>"},
        {"const char* g()", "const char* g()"}};
    char name[64], few[8];
    for (int i = 0; i < 3; i++) {
        trace_shorten(name, sizeof name, CASES[i][0]);
        test_true("the name out of the compiler's text", strcmp(name, CASES[i][1]) == 0);
    }
    trace_shorten(few, sizeof few, CASES[0][0]);
    test_true("cut to size", strcmp(few, "relu2_k") == 0);
}

// The trace's time of a kernel against the clock around its launch, which holds it. The best of
// some: somebody else's work may come between the two on any one of them.
static void test_times(void) {
    float* x = device_floats(1, 0);
    double best = 0;
    host_set_streams("inorder", 0);
    bool inside = true;
    for (int i = 0; i < 5; i++) {
        trace_open(path_of("times.json"), 0, 1);
        trace_step(1);
        struct timespec begin, end;
        clock_gettime(CLOCK_MONOTONIC, &begin);
        launch<spin_kernel>(dim3(1), dim3(1), 0, NULL, x, 2000000);
        CUDA_CHECK(cudaDeviceSynchronize());
        clock_gettime(CLOCK_MONOTONIC, &end);
        trace_close();
        TraceFile t = trace_read(path_of("times.json"));
        double us = 1e6 * (double)(end.tv_sec - begin.tv_sec) +
                    1e-3 * (double)(end.tv_nsec - begin.tv_nsec);
        double share = t.count == 2 ? t.items[1].dur / us : 0;
        if (share > best) best = share;
        inside = inside && share <= 1;
        file_free(&t);
    }
    test_true("a kernel takes no longer than its launch and a wait", inside);
    test_true("and most of that time", best > 0.5);
    CUDA_CHECK(cudaFree(x));
}

static void mark(const char* name) {
    trace_end(trace_begin(name, NULL), NULL);
}

// A thread that does what the loader's does.
static void* reads_one(void* argument) {
    (void)argument;
    double from = trace_clock();
    usleep(3000);
    trace_host("loader", "read", 7, from, trace_clock(), 2);
    return NULL;
}

static void test_threads(void) {
    float* x = device_floats(1, 0);
    pthread_t thread;
    trace_host("loader", "read", 1, trace_clock(), trace_clock(), 1);       // no trace is open
    trace_open(path_of("threads.json"), 0, 1);
    double before = trace_clock();
    trace_host("loader", "read", 1, before, before + 1, 1);                 // it has not begun
    usleep(2000);
    trace_step(7);
    trace_host("loader", "read", 6, before, trace_clock(), 1);              // begun before it
    REQUIRE(pthread_create(&thread, NULL, reads_one, NULL) == 0, "no thread");
    launch<spin_kernel>(dim3(1), dim3(1), 0, NULL, x, 2000000);
    CUDA_CHECK(cudaDeviceSynchronize());
    pthread_join(thread, NULL);
    double from = trace_clock();
    usleep(2000);
    double to = trace_clock();
    trace_host("host", "wait", 7, from, to, 0);
    trace_host("host", "wait", 7, to, to, 1);
    usleep(1000);
    mark("behind");
    trace_close();
    trace_host("host", "wait", 8, trace_clock(), trace_clock() + 1, 0);
    TraceFile t = trace_read(path_of("threads.json"));
    expect_lines(path_of("threads.json"));
    bool there = t.span_count == 2 && t.count == 3 && t.looks == 3;
    test_true("what threads did while it was on", there && t.spans[0].step == 7 &&
              span_is(&t, &t.spans[0], "loader", "read") &&
              span_is(&t, &t.spans[1], "host", "wait"));
    // Begin and end of the kernel are the device's times, those around it the host's.
    const Item *spin = &t.items[1], *behind = &t.items[2];
    test_true("two clocks, one time", there && t.spans[0].dur >= 3000 &&
              fabs(t.spans[1].dur - 1e6 * (to - from)) < 1 &&
              spin->ts + spin->dur <= t.spans[1].ts + 50 &&
              t.spans[1].ts + t.spans[1].dur + 950 <= behind->ts);
    trace_is_sound(&t);
    file_free(&t);
    CUDA_CHECK(cudaFree(x));
}

// ---- which steps, which file, how much -----------------------------------------------------

static void test_off(void) {
    trace_open("", 0, 1);
    trace_step(1);
    trace_name_stream(NULL, "compute");
    trace_label("forward %d", 1);
    float* x = device_floats(1, 0);
    launch<add_kernel<1>>(dim3(1), dim3(1), 0, NULL, x, (const float*)x, 1);
    double one = 1;
    test_compare_device_float("work is done without a trace", x, &one, 1, 0, 0);
    CUDA_CHECK(cudaFree(x));
    cudaEvent_t e;
    CUDA_CHECK(cudaEventCreate(&e));
    CUDA_CHECK(trace_event_record(e, NULL));
    CUDA_CHECK(trace_stream_wait(NULL, e));
    CUDA_CHECK(trace_event_sync(e));
    CUDA_CHECK(trace_stream_sync(NULL));
    CUDA_CHECK(cudaEventDestroy(e));
    test_true("off: no operation has a number", trace_begin("a", NULL) == -1);
    trace_close();
    const Trace* t = &trace_state;
    test_true("off: nothing is kept", !trace_on && !t->file && !t->entries && !t->events &&
                                          !t->texts && trace_stream_count == 0);
}

static void test_steps(void) {
    const char* path = path_of("steps.json");
    trace_steps = 2;
    trace_open(path, 0, 1);
    for (int step = 10; step < 14; step++) {
        trace_step(step);
        test_true("two of four steps are recorded", trace_on == (step < 12));
        trace_label("step %d", step);
        mark("work");
        if (step != 12) continue;
        TraceFile t = trace_read(path);      // no close yet: a killed run has this
        const Wanted wanted[] = {{ITEM_STEP, NULL, NULL, 0, 0, 0},
                                 {ITEM_OP, "work", "step 10", 0, 0, 0},
                                 {ITEM_STEP, NULL, NULL, 0, 0, 0},
                                 {ITEM_OP, "work", "step 11", 0, 0, 0}};
        expect_items(&t, wanted, 4);
        test_true("their numbers", t.step_count == 2 && t.items[t.steps[1]].step == 11);
        trace_is_sound(&t);
        file_free(&t);
        test_true("and all memory is given back", !trace_state.entries && !trace_state.texts);
    }
    REQUIRE(unlink(path) == 0, "%s: %s", path, strerror(errno));
    trace_close();
    test_true("written once", access(path, F_OK) != 0);

    trace_open(path, 0, 1);      // a label does not go over into the next step
    trace_step(1);
    trace_label("update");
    trace_step(2);
    mark("load");
    trace_close();
    TraceFile t = trace_read(path);
    test_true("a run that ends early has its steps so far",
              t.count == 3 && strcmp(t.items[2].label, "") == 0);
    file_free(&t);
    trace_steps = 3;
}

static void test_ranks(void) {
    static const struct { const char* file; int rank, world; const char* path; } CASES[] = {
        {"trace.json", 0, 1, "trace.json"}, {"trace.json", 0, 2, "trace.rank0.json"},
        {"out/a.b.json", 13, 16, "out/a.b.rank13.json"}, {"out.d/trace", 1, 2, "out.d/trace.rank1"},
        {"../trace", 1, 2, "../trace.rank1"}, {".trace", 1, 2, ".trace.rank1"},
        {"a/.t", 1, 2, "a/.t.rank1"}};
    for (size_t i = 0; i < sizeof CASES / sizeof CASES[0]; i++) {
        char path[64];
        trace_path(path, sizeof path, CASES[i].file, CASES[i].rank, CASES[i].world);
        if (!test_true("a rank's file", strcmp(path, CASES[i].path) == 0))
            printf("      %s\n", path);
    }
    for (int rank = 0; rank < 2; rank++) {
        trace_open(path_of("r.json"), rank, 2);
        trace_step(1);
        mark("work");
        trace_close();
    }
    TraceFile a = trace_read(path_of("r.rank0.json")), b = trace_read(path_of("r.rank1.json"));
    test_true("and its number in it", a.rank == 0 && b.rank == 1);
    test_true("none without a number", access(path_of("r.json"), F_OK) != 0);
    static Verdict v;
    v.quiet = true;
    check_ranks(&v, &a, &b);
    test_true("two ranks that did the same", v.failed[CHECK_RANKS] == 0);
    file_free(&a);
    file_free(&b);
}

// Entries, texts, streams and events grow; the limit is told, in the file too.
static void test_limit(void) {
    enum { MANY = 1000 };
    cudaEvent_t events[MANY];
    trace_open(path_of("many.json"), 0, 1);
    trace_step(1);
    for (int i = 0; i < MANY; i++) {
        CUDA_CHECK(cudaEventCreate(&events[i]));
        trace_label("forward %d", i);
        mark("work");
        CUDA_CHECK(trace_event_record(events[i], NULL));
    }
    trace_close();
    TraceFile t = trace_read(path_of("many.json"));
    int wrong = t.count != 1 + 2 * MANY;
    for (int i = 0; i < MANY && !wrong; i++) {
        char label[32];
        snprintf(label, sizeof label, "forward %d", i);
        wrong += strcmp(t.items[1 + 2 * i].label, label) != 0 || t.items[2 + 2 * i].event != i;
    }
    test_check("a thousand labels and events", wrong, 0);
    file_free(&t);
    for (int i = 0; i < MANY; i++) CUDA_CHECK(cudaEventDestroy(events[i]));

    int limit = trace_limit;
    trace_limit = 10;
    fflush(stderr);
    int kept = dup(STDERR_FILENO);
    FILE* err = tmpfile();
    REQUIRE(kept >= 0 && err, "no temporary file: %s", strerror(errno));
    dup2(fileno(err), STDERR_FILENO);
    trace_open(path_of("cut.json"), 0, 1);
    for (int step = 1; step <= 2; step++) {
        trace_step(step);
        int op = trace_begin("outer", NULL);
        for (int i = 0; i < 10; i++) mark("work");
        trace_end(op, NULL);
    }
    trace_close();
    fflush(stderr);
    dup2(kept, STDERR_FILENO);
    close(kept);
    char note[1024] = "";
    rewind(err);
    note[fread(note, 1, sizeof note - 1, err)] = 0;
    fclose(err);
    const char* said = strstr(note, "ends in its step 1: it has 10 entries, the limit\n");
    test_true("the limit is told, once", said && !strstr(strchr(said, '\n'), "limit"));
    t = trace_read(path_of("cut.json"));
    test_true("and stands at the end of the file", t.count == 7 &&
              t.items[6].kind == ITEM_CUT && t.items[1].dur >= t.items[5].dur && t.step_count == 1);
    static Verdict v;
    v.quiet = true;
    check_file(&v, &t);
    test_true("check_trace refuses it", v.failed[CHECK_FILE] == 1);
    file_free(&t);
    trace_limit = limit;
}

static void open_in_no_folder(void) {
    trace_open("/nowhere/at/all.json", 2, 4);
}
static void write_to_full_disk(void) {
    trace_open("/dev/full", 0, 1);
    trace_step(1);
    mark("work");
    trace_close();
}
static void never_end(void) {
    trace_open(path_of("never.json"), 0, 1);
    trace_step(1);
    trace_begin("endless", NULL);
    trace_close();
}
static void end_elsewhere(void) {
    cudaStream_t s;
    CUDA_CHECK(cudaStreamCreate(&s));
    trace_open(path_of("elsewhere.json"), 0, 1);
    trace_step(1);
    trace_end(trace_begin("work", NULL), s);
}
static void many_streams(void) {
    trace_open(path_of("many_streams.json"), 0, 1);
    for (int i = 0; i <= TRACE_STREAMS; i++) {
        cudaStream_t s;
        CUDA_CHECK(cudaStreamCreate(&s));
        trace_name_stream(s, "one of many");
    }
}
static void open_twice(void) {
    trace_open(path_of("twice.json"), 0, 1);
    trace_open(path_of("twice.json"), 0, 1);
}

static void test_errors(void) {
    expect_death("no folder", open_in_no_folder, "--trace /nowhere/at/all.rank2.json",
                 "No such file");
    expect_death("no space", write_to_full_disk, "--trace /dev/full", "No space left");
    expect_death("an operation without an end", never_end, "endless", "never ended");
    expect_death("an end on another stream", end_elsewhere, "trace_end", "not begun on this");
    expect_death("too many streams", many_streams, "more than 16 streams", "TRACE_STREAMS");
    expect_death("two at a time", open_twice, "is open already", "twice.json");
}

// ---- check_trace: a step of the trainer, by hand -------------------------------------------

enum { LAYERS = 6, GROUP = 2, GROUPS = LAYERS / GROUP, MICRO_STEPS = 2, STEPS = 2 };
enum { COMPUTE, COMM };
enum { BANK_ATTN, BANK_MLP, BANK_EMBED, BANK_HEAD, EVENT_SENT, EVENT_READY };    // events of a bank

// What is wrong with a story. The comment says why it is wrong, or why it is not.
typedef enum {
    RIGHT,
    TIED,                   // right: the head is the embedding
    NO_GATHERS,             // right: --zero 0
    IMPLIED_WAIT,           // right: forward 2 does not wait for attn 2-3, but forward 0 has waited
                            // for mlp 0-1, which is behind it on its stream
    EVALUATED,              // right: an evaluation behind each step, when the host has waited
    SYNC_FOR_WAIT,          // forward 0 does not wait but the host has: in order, but not hidden
    SYNC_EVENT_FOR_WAIT,    // the same, by the event of the last gather
    SYNC_TOO_EARLY,         // the host has waited for another stream
    REDUCE_LATE,            // all reduces behind the whole backward
    REDUCE_LATE_BY_ONE,     // the first of attn, behind the backward of the next group
    REDUCE_HOLDS,           // the compute stream waits for each reduce
    REDUCE_UNGATED,         // the communication stream does not wait for the gradients
    REDUCE_EARLY,           // .. waits for a point before the last product
    REDUCE_RECORD_EARLY,    // .. before the last operation, which is no product
    REDUCE_HEAD_EARLY,      // the same of the head
    REDUCE_EMBED_EARLY,     // and of the embedding
    REDUCE_STALE,           // it waits for the event's record before
    REDUCE_MISSING,         // a group is not reduced
    MEASURE_UNGATED,        // the norm of the gradients does not wait for the reduces
    UPDATE_UNGATED,         // update does not wait for the reduces
    GUARD_LATE,             // an update before the guard
    GUARD_EARLY,            // the guard before the norms
    GUARD_MISSING,
    GATHER_UNGATED,         // the gather does not wait for the update
    GATHER_MISSING,         // the last group of attn
    GATHER_HOLE,            // a group in the middle
    EMBED_MISSING,          // the embedding's gather
    EMBED_UNGATED,          // embed does not wait for it
    ATTN_UNGATED,           // forward 0 does not wait for attn 0-1
    MLP_UNGATED,            // forward 4 does not wait for mlp 4-5
    HEAD_UNGATED,           // classify does not wait for the head, which is gathered last
    TIED_UNGATED,           // .. for the embedding, tied and gathered last (nor does embed)
    GATHER_BACKWARDS,       // the groups in the order of backward
    GATHER_AWAITED,         // embed waits for the last gather
    FILE_ISSUE, FILE_DURATION, FILE_START, FILE_RECORD, FILE_STEP, FILE_PRODUCTS, FILE_ARROW,
    FAULTS
} Fault;

typedef struct Story {
    FILE* out;
    Fault fault;
    int issue, rank;
    double ts[2];
    int records[16];
} Story;

static void story_line(Story* s, const char* phase, const char* name, int stream, double ts) {
    fprintf(s->out, ",\n{\"ph\":\"%s\",\"name\":\"%s\",\"pid\":%d,\"tid\":%d,\"ts\":%.3f", phase,
            name, s->rank, stream, ts);
}

static void story_op(Story* s, int stream, const char* label, const char* name) {
    bool odd = s->issue == 40;
    double ts = s->fault == FILE_START && odd ? 0 : s->ts[stream];
    story_line(s, "X", name, stream, ts);
    fprintf(s->out, ",\"dur\":%d,\"args\":{\"label\":\"%s\",\"issue\":%d}}",
            s->fault == FILE_DURATION && odd ? -1 : 5, label,
            s->fault == FILE_ISSUE && odd ? 39 : s->issue);
    s->issue++;
    s->ts[stream] += 6;
}

static void story_mark(Story* s, int stream, const char* name, int event, int record) {
    story_line(s, "i", name, stream, s->ts[stream]);
    fprintf(s->out, ",\"s\":\"t\",\"args\":{\"event\":%d,\"record\":%d,\"issue\":%d}}", event,
            record, s->issue++);
}
static void story_record(Story* s, int stream, int event) {
    story_mark(s, stream, "record", event, ++s->records[event]);
}
static void story_wait(Story* s, int stream, int event) {
    bool odd = s->fault == FILE_RECORD && event == EVENT_SENT;
    story_mark(s, stream, "wait", event, s->records[event] + odd);
}

// The event of a bank's group: after the gather, 8 and above for layers.
static int gathered(int bank, int group) {
    return bank >= BANK_EMBED ? bank : 8 + bank * GROUPS + group;
}

static void story_label(char* label, size_t size, const char* verb, int bank, int group) {
    static const char* const BANKS[] = {"attn", "mlp", "embed", "head"};
    int n = snprintf(label, size, "%s %s", verb, BANKS[bank]);
    if (bank < BANK_EMBED)
        snprintf(label + n, size - n, " %d-%d", group * GROUP, group * GROUP + GROUP - 1);
}

static void story_reduce(Story* s, int bank, int group) {
    char label[32];
    if (s->fault == REDUCE_MISSING && bank == BANK_MLP && group == 1) return;
    story_label(label, sizeof label, "reduce", bank, group);
    if (s->fault != REDUCE_STALE || s->records[EVENT_READY] == 0)
        story_record(s, COMPUTE, EVENT_READY);
    if (s->fault == REDUCE_RECORD_EARLY && bank == BANK_ATTN && group == 1)
        story_op(s, COMPUTE, "backward 2", "rmsnorm_backward_kernel");
    if (s->fault != REDUCE_UNGATED) story_wait(s, COMM, EVENT_READY);
    story_op(s, COMM, label, "reduce");
    if (s->fault != REDUCE_HOLDS) return;
    story_record(s, COMM, EVENT_SENT);
    story_wait(s, COMPUTE, EVENT_SENT);
}

static void story_gather(Story* s, int bank, int group) {
    char label[32];
    Fault f = s->fault;
    if (f == NO_GATHERS || (f == EMBED_MISSING && bank == BANK_EMBED)) return;
    if (f == GATHER_MISSING && bank == BANK_ATTN && group == GROUPS - 1) return;
    if (f == GATHER_HOLE && bank == BANK_ATTN && group == 1) return;
    story_label(label, sizeof label, "gather", bank, group);
    story_record(s, COMPUTE, EVENT_READY);
    if (f != GATHER_UNGATED) story_wait(s, COMM, EVENT_READY);
    story_op(s, COMM, label, "gather");
    story_record(s, COMM, gathered(bank, group));
}

static void story_forward(Story* s, bool tied) {
    Fault f = s->fault;
    char label[32];
    bool synced = f == SYNC_FOR_WAIT || f == SYNC_EVENT_FOR_WAIT || f == SYNC_TOO_EARLY;
    if (f == GATHER_AWAITED) story_wait(s, COMPUTE, gathered(BANK_MLP, GROUPS - 1));
    if (f != EMBED_UNGATED && f != TIED_UNGATED && !synced) story_wait(s, COMPUTE, BANK_EMBED);
    story_op(s, COMPUTE, "embed", "embedding_forward_kernel");
    for (int l = 0; l < LAYERS; l++) {
        int group = l / GROUP;
        bool first = l % GROUP == 0 && !synced;
        bool no_attn = (f == ATTN_UNGATED && l == 0) || (f == IMPLIED_WAIT && l == 2);
        snprintf(label, sizeof label, "forward %d", l);
        story_op(s, COMPUTE, label, "rmsnorm_forward_kernel");
        if (first && !no_attn) story_wait(s, COMPUTE, gathered(BANK_ATTN, group));
        story_op(s, COMPUTE, label, "matmul_nt 64x96x32");
        story_op(s, COMPUTE, label, "attention_forward_kernel");
        if (f != FILE_PRODUCTS || l != 3) story_op(s, COMPUTE, label, "matmul_nt 64x32x32");
        if (first && !(f == MLP_UNGATED && l == 4))
            story_wait(s, COMPUTE, gathered(BANK_MLP, group));
        story_op(s, COMPUTE, label, "matmul_nt 64x128x32");
        story_op(s, COMPUTE, label, "matmul_nn 64x32x128");
    }
    if (f != HEAD_UNGATED && !tied) story_wait(s, COMPUTE, BANK_HEAD);
    story_op(s, COMPUTE, "classify", "matmul_nt 64x512x32");
}

// The reduces of layer l's group, after all of the layer.
static void story_reduce_layer(Story* s, int l) {
    int group = l / GROUP;
    if (s->fault == REDUCE_LATE_BY_ONE && group == GROUPS - 1) return;
    if (s->fault == REDUCE_LATE_BY_ONE && group == GROUPS - 2)
        story_reduce(s, BANK_ATTN, GROUPS - 1);
    story_reduce(s, BANK_ATTN, group);
}

static void story_backward(Story* s, bool last, bool tied) {
    Fault f = s->fault;
    char label[32];
    if (f == REDUCE_HEAD_EARLY && last) story_reduce(s, BANK_HEAD, 0);
    story_op(s, COMPUTE, "classify", "matmul_tn 512x32x64");
    if (f != REDUCE_HEAD_EARLY && last && !tied) story_reduce(s, BANK_HEAD, 0);
    for (int l = LAYERS - 1; l >= 0; l--) {
        bool reduce = last && l % GROUP == 0 && f != REDUCE_LATE;
        snprintf(label, sizeof label, "backward %d", l);
        story_op(s, COMPUTE, label, "matmul_tn 128x32x64");
        story_op(s, COMPUTE, label, "matmul_nt 64x128x32");
        story_op(s, COMPUTE, label, "matmul_tn 128x32x64");
        if (reduce) story_reduce(s, BANK_MLP, l / GROUP);      // its gradients are complete
        story_op(s, COMPUTE, label, "matmul_tn 32x32x64");
        if (reduce && f == REDUCE_EARLY) story_reduce(s, BANK_ATTN, l / GROUP);
        story_op(s, COMPUTE, label, "matmul_tn 96x32x64");
        if (reduce && f != REDUCE_EARLY) story_reduce_layer(s, l);
    }
    for (int group = GROUPS - 1; group >= 0 && last && f == REDUCE_LATE; group--) {
        story_reduce(s, BANK_MLP, group);
        story_reduce(s, BANK_ATTN, group);
    }
    if (last && f == REDUCE_EMBED_EARLY) story_reduce(s, BANK_EMBED, 0);
    story_op(s, COMPUTE, "embed backward", "embedding_backward_kernel");
    if (last && f != REDUCE_EMBED_EARLY) story_reduce(s, BANK_EMBED, 0);
}

static void story_update(Story* s, bool tied) {
    Fault f = s->fault;
    story_record(s, COMM, EVENT_SENT);
    if (f == GUARD_EARLY) story_op(s, COMM, "measure", "guard_check_kernel");
    if (f == MEASURE_UNGATED) story_op(s, COMPUTE, "measure", "norms_kernel");
    if (f != UPDATE_UNGATED) story_wait(s, COMPUTE, EVENT_SENT);
    if (f != MEASURE_UNGATED) story_op(s, COMPUTE, "measure", "norms_kernel");
    bool guard = f != GUARD_LATE && f != GUARD_EARLY && f != GUARD_MISSING;
    if (guard) story_op(s, COMPUTE, "measure", "guard_check_kernel");
    story_op(s, COMPUTE, "update", "adamw_kernel");
    if (f == GUARD_LATE) story_op(s, COMPUTE, "measure", "guard_check_kernel");
    if (f != TIED_UNGATED) story_gather(s, BANK_EMBED, 0);
    if (!tied && f != HEAD_UNGATED) story_gather(s, BANK_HEAD, 0);
    for (int bank = BANK_ATTN; bank <= BANK_MLP; bank++) {
        story_op(s, COMPUTE, "update", "muon_step_kernel");
        for (int k = 0; k < GROUPS; k++)
            story_gather(s, bank, f == GATHER_BACKWARDS ? GROUPS - 1 - k : k);
    }
    if (f == TIED_UNGATED) story_gather(s, BANK_EMBED, 0);
    if (f == HEAD_UNGATED) story_gather(s, BANK_HEAD, 0);
}

// Two steps of two micro-batches, then the forward of an evaluation. The caller frees the text.
static char* story_text(Fault fault, int rank) {
    Story s = {};
    char* text = NULL;
    size_t size = 0;
    bool tied = fault == TIED || fault == TIED_UNGATED;
    s.fault = fault;
    s.rank = rank;
    s.out = open_memstream(&text, &size);
    REQUIRE(s.out, "no memory for a story");
    fprintf(s.out, "{\"traceEvents\":[\n"
            "{\"ph\":\"M\",\"pid\":%d,\"tid\":0,\"name\":\"thread_name\",\"args\":{\"name\":"
            "\"compute\"}},\n{\"ph\":\"M\",\"pid\":%d,\"tid\":1,\"name\":\"thread_name\","
            "\"args\":{\"name\":\"comm\"}}", rank, rank);
    for (int step = 0; step < STEPS; step++) {
        story_line(&s, "i", "step", 0, s.ts[0]);
        fprintf(s.out, ",\"s\":\"p\",\"args\":{\"step\":%d,\"issue\":%d}}",
                fault == FILE_STEP ? 1 : step, s.issue++);
        for (int micro = 0; micro < MICRO_STEPS; micro++) {
            story_forward(&s, tied);
            story_backward(&s, micro == MICRO_STEPS - 1, tied);
        }
        story_update(&s, tied);
        if (fault == SYNC_FOR_WAIT) story_mark(&s, COMM, "sync", 0, 0);
        if (fault == EVALUATED) {
            story_mark(&s, COMM, "sync", 0, 0);
            story_forward(&s, tied);
        }
        if (fault == SYNC_TOO_EARLY) story_mark(&s, COMPUTE, "sync", 0, 0);
        int last = gathered(BANK_MLP, GROUPS - 1);
        if (fault == SYNC_EVENT_FOR_WAIT) story_mark(&s, COMM, "sync event", last, s.records[last]);
    }
    story_forward(&s, tied);
    if (fault == FILE_ARROW) {
        story_line(&s, "s", "wait", 0, 1);
        fprintf(s.out, ",\"cat\":\"wait\",\"id\":1}");
    }
    fputs("\n]}\n", s.out);
    fclose(s.out);
    return text;
}

// Judges a story; `failed`: for each check whether it found something.
static void story_judge(Fault fault, Verdict* v) {
    TraceFile t;
    char* text = story_text(fault, 0);
    memset(v, 0, sizeof *v);
    v->quiet = true;
    if (!test_true("a story is a trace", file_parse(&t, "story", text)))
        printf("      %s\n", t.problem);
    check_trace(v, &t);
    file_free(&t);
    free(text);
}

static void test_stories(void) {
    // Which checks must find something; letters of the list in check_trace.c, f: file.
    static const struct { Fault fault; const char *name, *found; } CASES[] = {
        {RIGHT, "right", ""}, {TIED, "tied", ""}, {NO_GATHERS, "no gathers", ""},
        {IMPLIED_WAIT, "a wait that another implies", ""}, {EVALUATED, "evaluations between", ""},
        {SYNC_FOR_WAIT, "the host waits for the stream", "d"},
        {SYNC_EVENT_FOR_WAIT, "the host waits for the event", "d"},
        {SYNC_TOO_EARLY, "the host waits for the other stream", "c"},
        {REDUCE_LATE, "reduces behind backward", "a"}, {REDUCE_HOLDS, "backward waits", "a"},
        {REDUCE_LATE_BY_ONE, "a reduce behind the next group", "a"},
        {REDUCE_RECORD_EARLY, "a record before the last operation", "b"},
        {REDUCE_UNGATED, "reduces without a wait", "b"}, {REDUCE_EARLY, "reduces too early", "b"},
        {REDUCE_HEAD_EARLY, "the head's reduce too early", "b"},
        {REDUCE_EMBED_EARLY, "the embedding's reduce too early", "b"},
        {REDUCE_STALE, "a wait for an old record", "b"},
        {REDUCE_MISSING, "a group is not reduced", "b"},
        {MEASURE_UNGATED, "measure without a wait", "b"},
        {UPDATE_UNGATED, "update without a wait", "b"},
        {GUARD_LATE, "an update before the guard", "b"},
        {GUARD_EARLY, "a guard before the norms", "b"}, {GUARD_MISSING, "no guard", "b"},
        {GATHER_UNGATED, "gather without a wait", "c"},
        {GATHER_MISSING, "the last group is not gathered", "c"},
        {GATHER_HOLE, "a middle group is not gathered", "cd"},
        {EMBED_MISSING, "the embedding is not gathered", "c"},
        {EMBED_UNGATED, "embed without a wait", "c"}, {ATTN_UNGATED, "attn without a wait", "c"},
        {MLP_UNGATED, "mlp without a wait", "c"}, {HEAD_UNGATED, "head without a wait", "c"},
        {TIED_UNGATED, "a tied head without a wait", "c"},
        {GATHER_BACKWARDS, "gathers in backward order", "d"},
        {GATHER_AWAITED, "embed waits for the last gather", "d"},
        {FILE_ISSUE, "order of issue", "f"}, {FILE_DURATION, "negative duration", "f"},
        {FILE_START, "starts out of order", "f"}, {FILE_STEP, "steps of one number", "f"},
        {FILE_ARROW, "half an arrow", "f"}};
    static const char LETTERS[] = "fabcd";
    for (size_t i = 0; i < sizeof CASES / sizeof CASES[0]; i++) {
        Verdict v;
        story_judge(CASES[i].fault, &v);
        char found[8] = "";
        for (int c = 0, n = 0; c < 5; c++) if (v.failed[c]) found[n++] = LETTERS[c];
        if (!test_true(CASES[i].name, strcmp(found, CASES[i].found) == 0))
            printf("      found '%s', wanted '%s'\n", found, CASES[i].found);
    }
    Verdict v;
    story_judge(FILE_RECORD, &v);      // the wait orders nothing any more: other checks fail too
    test_true("a wait for a record that is not there", v.failed[CHECK_FILE] == 1);
    story_judge(FILE_PRODUCTS, &v);
    test_true("a layer of three products", v.failed[CHECK_FILE] == 1);
}

// Exactly what is checked in the right story, so that no check is about nothing.
static void test_counts(void) {
    Verdict v;
    story_judge(RIGHT, &v);
    test_true("reduces", v.reduces == STEPS * (2 * GROUPS + 2));
    test_true("gathers", v.gathers == STEPS * (2 * GROUPS + 2));
    test_true("updates", v.updates == STEPS * 3);
    // Two for each reduce of a group but the lowest.
    test_check("a", abs(v.passed[CHECK_REDUCE] - STEPS * 2 * (GROUPS - 1) * 2), 0);
    // Of a step: all groups twice, head and embed once, norms, guard and three updates after each
    // reduce, one for all, one for the guard.
    int b = STEPS * (2 * 2 * GROUPS + 2 + (2 + 3) * (2 * GROUPS + 2) + 1 + 1);
    test_check("b", abs(v.passed[CHECK_GRADIENTS] - b), 0);
    // Of a step: updates before the gathers (embed, head: 1; attn 2; mlp 3), one for all; and what
    // reads later: of each layer 5 operations behind the first product, 2 behind the third, in each
    // forward, and embed twice (forward and backward), classify twice.
    int before = 2 * 1 + GROUPS * 2 + GROUPS * 3 + 1;
    int forwards[STEPS] = {MICRO_STEPS + 1, 1}, later = 0;
    for (int i = 0; i < STEPS; i++) {
        int backwards = forwards[i] - 1;      // the last forward has none
        later += before + forwards[i] * (LAYERS * (5 + 2) + 1 + 1) + backwards * (1 + 1);
    }
    test_check("c", abs(v.passed[CHECK_WEIGHTS] - later), 0);
    // Of a step: each group's place, and the six operations of the next step's forward 0.
    int d = STEPS * 2 * GROUPS + (STEPS - 1) * 6;
    test_check("d", abs(v.passed[CHECK_HIDING] - d), 0);

    v.quiet = true;
    check_found(&v, 1);
    test_check("--zero 1 finds what it wants", v.failed[CHECK_GRADIENTS] + v.failed[CHECK_WEIGHTS],
               0);
    check_found(&v, 0);
    test_true("--zero 0 wants no gathers", v.failed[CHECK_WEIGHTS] == 1);
    test_true("and a forward at once behind them", v.failed[CHECK_HIDING] == 0 && v.hidden == 6);
    story_judge(EVALUATED, &v);
    check_found(&v, 1);
    test_true("or says that there is none", v.failed[CHECK_HIDING] == 1 && v.hidden == 0);
    story_judge(NO_GATHERS, &v);
    check_found(&v, 0);
    test_true("and finds none", v.failed[CHECK_WEIGHTS] == 0 && v.passed[CHECK_WEIGHTS] == 1);
    check_found(&v, 1);
    test_true("--zero 1 wants gathers", v.failed[CHECK_WEIGHTS] == 1);
    story_judge(TIED, &v);      // classify reads the embedding; one gather less behind an update
    test_check("c, tied", abs(v.passed[CHECK_WEIGHTS] - (later - STEPS)), 0);
}

static void test_rank_stories(void) {
    static const struct { Fault fault; int rank; bool same; } CASES[] = {
        {RIGHT, 1, true}, {REDUCE_LATE, 1, true}, {RIGHT, 0, false}, {GATHER_BACKWARDS, 1, false},
        {GATHER_MISSING, 1, false}, {NO_GATHERS, 1, false}};
    char* first = story_text(RIGHT, 0);
    for (size_t i = 0; i < sizeof CASES / sizeof CASES[0]; i++) {
        static Verdict v;
        memset(&v, 0, sizeof v);
        v.quiet = true;
        TraceFile a, b;
        char* second = story_text(CASES[i].fault, CASES[i].rank);
        test_true("two stories", file_parse(&a, "a", first) && file_parse(&b, "b", second));
        check_ranks(&v, &a, &b);
        test_true("ranks that do the same, and others",
                  (v.failed[CHECK_RANKS] == 0) == CASES[i].same);
        file_free(&a);
        file_free(&b);
        free(second);
    }
    free(first);
}

// Steps 3 and 4, and what the host's threads did.
#define THREAD(tid, name) \
    "{\"ph\":\"M\",\"pid\":0,\"tid\":" tid ",\"name\":\"thread_name\",\"args\":{" \
    "\"name\":\"" name "\"}},"
#define STEP(step) \
    "{\"ph\":\"i\",\"pid\":0,\"tid\":0,\"ts\":" step ",\"name\":\"step\",\"args\":{" \
    "\"step\":" step ",\"issue\":" step "}}"
#define SPAN(tid, name, step) \
    ",{\"ph\":\"X\",\"pid\":0,\"tid\":" tid ",\"ts\":5,\"dur\":6.5,\"name\":\"" name "\"," \
    "\"args\":{\"step\":" step "}}"
#define LOOK(ready) \
    ",{\"ph\":\"C\",\"pid\":0,\"tid\":16,\"ts\":5,\"name\":\"batches ready\",\"args\":{" \
    "\"ready\":" ready "}}"
#define STORY \
    "{\"traceEvents\":[" THREAD("16", "loader") THREAD("17", "host") STEP("3") "," STEP("4")
#define AHEAD STORY SPAN("16", "read", "5") LOOK("2") LOOK("1")

static void test_data_stories(void) {
    static const struct { const char *name, *text; int failed; } CASES[] = {
        {"two batches were ready", AHEAD "]}", 0},
        {"a wait of another step", AHEAD SPAN("17", "wait", "2") "]}", 0},
        {"a wait", AHEAD SPAN("17", "wait", "4") "]}", 1},
        {"two steps wait", AHEAD SPAN("17", "wait", "4") SPAN("17", "wait", "3")
         SPAN("17", "wait", "3") "]}", 2},
        {"nothing was read", STORY LOOK("2") LOOK("1") "]}", 1},
        {"nobody looked", STORY SPAN("16", "read", "5") LOOK("2") "]}", 1},
        {"no threads", STORY "]}", 1}};
    for (size_t i = 0; i < sizeof CASES / sizeof CASES[0]; i++) {
        static Verdict v;
        memset(&v, 0, sizeof v);
        v.quiet = true;
        TraceFile t;
        bool ok = file_parse(&t, "text", CASES[i].text);
        check_data(&v, &t);
        test_true(CASES[i].name, ok && v.failed[CHECK_DATA] == CASES[i].failed &&
                                     v.passed[CHECK_DATA] + v.failed[CHECK_DATA] == 3);
        file_free(&t);
    }
    static const char* const WRONG[] = {STORY SPAN("18", "read", "5") "]}", STORY LOOK("-1") "]}",
                                        STORY ",{\"ph\":\"X\",\"tid\":16,\"name\":\"read\"}]}",
                                        STORY ",{\"ph\":\"i\",\"tid\":16,\"name\":\"step\"}]}"};
    for (size_t i = 0; i < sizeof WRONG / sizeof WRONG[0]; i++) {
        TraceFile t;
        test_true("not of a thread", !file_parse(&t, "text", WRONG[i]) && t.problem[0]);
        file_free(&t);
    }
}

static void test_json(void) {
#define HEAD "{\"traceEvents\":["
#define MARK "{\"ph\":\"i\",\"name\":\"step\",\"tid\":0"
#define WORK "{\"ph\":\"X\",\"tid\":0,\"name\":"
    static const struct { const char* text; bool ok; } CASES[] = {
        {HEAD MARK "}]}", true}, {HEAD MARK "} , \n" MARK "}]}\n", true},
        {HEAD MARK ",\"pid\":0,\"s\":\"t\",\"args\":{\"step\":1,\"issue\":0}}]}", true},
        {"", false}, {"{}", false}, {HEAD "]}", false}, {HEAD MARK "},]}", false},
        {HEAD MARK "}]", false}, {HEAD MARK "}]}x", false}, {HEAD MARK "}" MARK "}]}", false},
        {HEAD "{\"ph\":\"i\"}]}", false}, {HEAD MARK ",\"ts\":01}]}", false},
        {HEAD MARK ",\"ts\":nan}]}", false}, {HEAD MARK ",\"ts\":1.}]}", false},
        {HEAD MARK ",\"ts\":-1.5e-3}]}", true}, {HEAD MARK ",\"ts\":1e}]}", false},
        {HEAD "{\"ph\":\"i\",\"name\":\"step\",\"tid\":99}]}", false},
        {HEAD "{\"ph\":\"i\",\"name\":\"other\",\"tid\":0}]}", false},
        {HEAD MARK ",\"zz\":0}]}", false}, {HEAD WORK "\"a\\\"\\u00e9\\n\"}]}", true},
        {HEAD WORK "\"a\\x\"}]}", false}, {HEAD WORK "\"a\\u00g0\"}]}", false},
        {HEAD WORK "\"a\n\"}]}", false}, {HEAD WORK "\"a", false}};
    for (size_t i = 0; i < sizeof CASES / sizeof CASES[0]; i++) {
        TraceFile t;
        bool ok = file_parse(&t, "text", CASES[i].text);
        test_true(CASES[i].text, ok == CASES[i].ok && ok == !t.problem[0]);
        file_free(&t);
    }
}

int main(int argc, char** argv) {
    test_init(argc, argv);
    snprintf(folder, sizeof folder, "/tmp/test_trace.XXXXXX");
    REQUIRE(mkdtemp(folder), "%s: %s", folder, strerror(errno));
    if (test_group("off")) test_off();
    if (test_group("names")) test_names();
    if (test_group("streams")) test_streams();
    if (test_group("matmul")) test_matmul_names();
    if (test_group("times")) test_times();
    if (test_group("threads")) test_threads();
    if (test_group("steps")) test_steps();
    if (test_group("ranks")) test_ranks();
    if (test_group("limit")) test_limit();
    if (test_group("errors")) test_errors();
    if (test_group("json")) test_json();
    if (test_group("stories")) test_stories();
    if (test_group("data stories")) test_data_stories();
    if (test_group("counts")) test_counts();
    if (test_group("rank stories")) test_rank_stories();
    char command[300];
    snprintf(command, sizeof command, "rm -r '%s'", folder);
    if (system(command) != 0) printf("%s stays\n", folder);
    return test_summary();
}
