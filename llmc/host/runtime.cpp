/*
The CUDA runtime of the host build: memory, streams, events, the device.

Device memory is host memory. It begins as 0xff bytes, NaN in every float format, so that a read
before the first write is seen. Around each allocation lie red zones, which cudaFree checks; in
ASan builds the allocation has its exact size instead, and ASan's own red zones see each access.

Streams have two modes (environment HOST_STREAMS). inorder: each operation is done at once, in the
order of the calls. lazy: operations queue up, and only what a synchronisation really needs is
done, in a random order among the legal ones (a function of HOST_SCHED). So work that nothing waits
for is late, and a missing cudaStreamWaitEvent or cudaStreamSynchronize shows as wrong numbers.
The null stream waits for the blocking streams and they for it, as in CUDA.
Copies from and to pageable memory take their source at the call, or wait, as CUDA's do; those of
cudaMallocHost memory happen when the stream comes to them.
Test: test/test_host.cu
*/
#include <pthread.h>
#include <time.h>
#include <unistd.h>
#include "cuda_runtime.h"

// ---- errors --------------------------------------------------------------------------------

static cudaError_t last_error = cudaSuccess;

static cudaError_t result(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

cudaError_t cudaPeekAtLastError(void) {
    return last_error;
}

const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorInvalidResourceHandle: return "invalid resource handle";
    case cudaErrorNotReady: return "device not ready";
    }
    return "unrecognized error code";
}

const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorInvalidResourceHandle: return "cudaErrorInvalidResourceHandle";
    case cudaErrorNotReady: return "cudaErrorNotReady";
    }
    return "unrecognized error code";
}

// ---- streams -------------------------------------------------------------------------------

struct StreamOp {
    void (*fn)(void*);      // null: wait until `wait_for` has done `wait_count` operations
    void* arg;
    cudaStream_t wait_for;
    uint64_t wait_count;
};

struct HostStream {
    StreamOp* op;           // operations done .. issued - 1, from index 0 on
    size_t capacity;
    uint64_t done, issued;
    uint64_t needed;        // during a drain
    bool blocking, destroyed;
    HostStream* next;       // all streams; they stay, as events may name them
};

struct HostEvent {
    cudaStream_t stream;    // null: never recorded
    uint64_t count;         // complete when the stream has done this many operations
    double ms;
    int pending;
    bool destroyed;
};

static HostStream null_stream = {nullptr, 0, 0, 0, 0, true, false, nullptr};
static HostStream* streams = &null_stream;
static int streams_mode = -1;           // 0 in order, 1 lazy
static uint64_t streams_random = 1;

void host_set_streams(const char* mode, uint64_t seed) {
    cudaDeviceSynchronize();
    bool lazy = mode && !strcmp(mode, "lazy");
    if (mode && *mode && !lazy && strcmp(mode, "inorder")) {
        host_error("HOST_STREAMS is '%s', wanted inorder or lazy", mode);
    }
    streams_mode = lazy;
    streams_random = (seed + 1) * 0x9e3779b97f4a7c15ull;
}

bool host_streams_lazy(void) {
    if (streams_mode < 0) {
        streams_mode = 0;
        const char* seed = getenv("HOST_SCHED");
        host_set_streams(getenv("HOST_STREAMS"), seed ? strtoull(seed, nullptr, 10) : 0);
    }
    return streams_mode;
}

static unsigned random_below(unsigned n) {
    streams_random ^= streams_random << 13;
    streams_random ^= streams_random >> 7;
    streams_random ^= streams_random << 17;
    return (unsigned)((streams_random >> 32) * n >> 32);
}

static HostStream* stream_of(cudaStream_t stream) {
    return stream ? stream : &null_stream;
}

static void stream_push(HostStream* s, StreamOp op) {
    size_t n = s->issued - s->done;
    if (n == s->capacity) {
        s->capacity = 2 * n + 16;
        s->op = (StreamOp*)realloc(s->op, s->capacity * sizeof(StreamOp));
        if (!s->op) host_error("no memory for a stream's queue");
    }
    s->op[n] = op;
    s->issued++;
}

static void stream_push_wait(HostStream* s, HostStream* wait_for, uint64_t count) {
    if (count > wait_for->done) stream_push(s, StreamOp{nullptr, nullptr, wait_for, count});
}

void host_stream_submit(cudaStream_t stream, void (*fn)(void*), const void* arg, size_t bytes) {
    HostStream* s = stream_of(stream);
    if (s->destroyed) host_error("work for a stream that was destroyed");
    if (!host_streams_lazy()) {
        fn((void*)arg);
        return;
    }
    for (HostStream* t = streams; t; t = t->next) {
        bool ordered = t != s && t->blocking && s->blocking;
        if (ordered && (t == &null_stream || s == &null_stream)) stream_push_wait(s, t, t->issued);
    }
    void* copy = malloc(bytes ? bytes : 1);
    memcpy(copy, arg, bytes);
    stream_push(s, StreamOp{fn, copy, nullptr, 0});
}

// Whether the next needed operation of the stream may be done now.
static bool stream_ready(const HostStream* s) {
    if (s->done >= s->needed) return false;
    const StreamOp* op = &s->op[0];
    return op->fn || op->wait_for->done >= op->wait_count;
}

// Does what must be done before the stream has done `count` operations, and no more.
static void stream_drain(HostStream* target, uint64_t count) {
    for (HostStream* s = streams; s; s = s->next) s->needed = s == target ? count : 0;
    for (bool grown = true; grown;) {
        grown = false;
        for (HostStream* s = streams; s; s = s->next) {
            for (uint64_t i = s->done; i < s->needed; i++) {
                const StreamOp* op = &s->op[i - s->done];
                if (op->fn || op->wait_for->needed >= op->wait_count) continue;
                op->wait_for->needed = op->wait_count;
                grown = true;
            }
        }
    }
    for (;;) {
        unsigned ready = 0;
        for (HostStream* s = streams; s; s = s->next) ready += stream_ready(s);
        if (!ready) break;
        unsigned chosen = random_below(ready);
        HostStream* s = streams;
        while (!stream_ready(s) || chosen--) s = s->next;
        StreamOp op = s->op[0];
        memmove(s->op, s->op + 1, (s->issued - s->done - 1) * sizeof(StreamOp));
        s->done++;
        if (op.fn) op.fn(op.arg);
        free(op.arg);
    }
    if (target->done < count) host_error("streams wait for each other in a circle");
}

static void stream_drain_all(void) {
    for (HostStream* s = streams; s; s = s->next) stream_drain(s, s->issued);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
    HostStream* s = (HostStream*)calloc(1, sizeof(HostStream));
    s->blocking = !(flags & cudaStreamNonBlocking);
    s->next = streams;
    streams = s;
    *stream = s;
    return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
    return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
    return cudaStreamCreateWithFlags(stream, flags);
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    if (!stream || stream->destroyed) return result(cudaErrorInvalidResourceHandle);
    stream->destroyed = true;       // work already given to it is still done when it is needed
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    HostStream* s = stream_of(stream);
    stream_drain(s, s->issued);
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void) {
    stream_drain_all();
    return cudaSuccess;
}

// A query may find work unfinished; as often it finishes, so that polling ends.
static cudaError_t query(HostStream* s, uint64_t count) {
    if (s->done >= count) return cudaSuccess;
    if (random_below(2)) return cudaErrorNotReady;
    stream_drain(s, count);
    return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
    HostStream* s = stream_of(stream);
    return query(s, s->issued);
}

// ---- events --------------------------------------------------------------------------------

static double now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e3 * (double)t.tv_sec + 1e-6 * (double)t.tv_nsec;
}

static void event_reached(void* arg) {
    HostEvent* e = *(HostEvent**)arg;
    e->ms = now_ms();
    if (--e->pending == 0 && e->destroyed) free(e);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    *event = (HostEvent*)calloc(1, sizeof(HostEvent));
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) {
    return cudaEventCreateWithFlags(event, cudaEventDefault);
}

cudaError_t cudaEventDestroy(cudaEvent_t e) {
    if (!e || e->destroyed) return result(cudaErrorInvalidResourceHandle);
    e->destroyed = true;
    if (!e->pending) free(e);
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t stream) {
    if (!e || e->destroyed) return result(cudaErrorInvalidResourceHandle);
    e->pending++;
    host_stream_submit(stream, event_reached, &e, sizeof(e));
    e->stream = stream_of(stream);
    e->count = e->stream->issued;
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t e, unsigned) {
    if (!e || e->destroyed) return result(cudaErrorInvalidResourceHandle);
    if (e->stream) stream_push_wait(stream_of(stream), e->stream, e->count);
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t e) {
    if (!e || e->destroyed) return result(cudaErrorInvalidResourceHandle);
    if (e->stream) stream_drain(e->stream, e->count);
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t e) {
    if (!e || e->destroyed) return result(cudaErrorInvalidResourceHandle);
    return e->stream ? query(e->stream, e->count) : cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
    if (!start || !end || !start->stream || !end->stream) {
        return result(cudaErrorInvalidResourceHandle);
    }
    if (start->stream->done < start->count || end->stream->done < end->count) {
        return result(cudaErrorNotReady);
    }
    *ms = (float)(end->ms - start->ms);
    return cudaSuccess;
}

// ---- memory --------------------------------------------------------------------------------

#ifdef HOST_ASAN
static const size_t RED_ZONE = 0;
#else
static const size_t RED_ZONE = 256;
#endif
static const size_t ALIGNMENT = 256;    // what cudaMalloc promises
static const unsigned char RED_BYTE = 0xfd;

struct Allocation {
    unsigned char* p;
    size_t bytes;
    uint64_t number;        // of the cudaMalloc, counted from 1
    bool pinned;            // host memory of cudaMallocHost
    Allocation* next;
};

static Allocation* allocations;
static uint64_t allocation_count;
static size_t bytes_now, bytes_peak;

static size_t physical_bytes(int pages_name) {
    return (size_t)sysconf(pages_name) * (size_t)sysconf(_SC_PAGESIZE);
}

size_t host_peak_bytes(void) {
    return bytes_peak;
}

size_t host_report_leaks(void) {
    size_t total = 0;
    for (Allocation* a = allocations; a; a = a->next) {
        fprintf(stderr, "host: leak: %zu bytes from %s call %llu\n", a->bytes,
                a->pinned ? "cudaMallocHost" : "cudaMalloc", (unsigned long long)a->number);
        total += a->bytes;
    }
    return total;
}

static void leaks_at_exit(void) {
    if (!host_report_leaks()) return;
    fflush(nullptr);
    _exit(70);
}

static void check_red_zones(const Allocation* a) {
    for (size_t i = 0; i < RED_ZONE; i++) {
        const unsigned char* before = a->p - 1 - i;
        const unsigned char* after = a->p + a->bytes + i;
        if (*before == RED_BYTE && *after == RED_BYTE) continue;
        host_error("something wrote %zu bytes %s an allocation of %zu bytes (call %llu): found by "
                   "its red zone", i + 1, *before != RED_BYTE ? "before" : "past the end of",
                   a->bytes, (unsigned long long)a->number);
    }
}

static cudaError_t allocate(void** p, size_t bytes, bool pinned) {
    if (!allocation_count++) {
        const char* leaks = getenv("HOST_LEAKS");
        if (leaks && *leaks && strcmp(leaks, "0")) atexit(leaks_at_exit);
    }
    *p = nullptr;
    if (bytes == 0) return cudaSuccess;
    if (bytes > physical_bytes(_SC_PHYS_PAGES)) return result(cudaErrorMemoryAllocation);
    void* memory = nullptr;
    Allocation* a = (Allocation*)calloc(1, sizeof(Allocation));
    if (!a || posix_memalign(&memory, ALIGNMENT, bytes + 2 * RED_ZONE)) {
        free(a);
        return result(cudaErrorMemoryAllocation);
    }
    a->p = (unsigned char*)memory + RED_ZONE;
    a->bytes = bytes;
    a->number = allocation_count;
    a->pinned = pinned;
    a->next = allocations;
    allocations = a;
    memset(memory, RED_BYTE, RED_ZONE);
    memset(a->p, 0xff, bytes);
    memset(a->p + bytes, RED_BYTE, RED_ZONE);
    if (!pinned) bytes_now += bytes;
    if (bytes_now > bytes_peak) bytes_peak = bytes_now;
    *p = a->p;
    return cudaSuccess;
}

static cudaError_t release(void* p, bool pinned) {
    if (!p) return cudaSuccess;
    stream_drain_all();             // as in CUDA, freeing waits for the device
    Allocation** link = &allocations;
    while (*link && (*link)->p != p) link = &(*link)->next;
    Allocation* a = *link;
    if (!a || a->pinned != pinned) return result(cudaErrorInvalidValue);
    check_red_zones(a);
    *link = a->next;
    if (!pinned) bytes_now -= a->bytes;
    free(a->p - RED_ZONE);
    free(a);
    return cudaSuccess;
}

cudaError_t host_malloc(void** p, size_t bytes) {
    return allocate(p, bytes, false);
}

cudaError_t cudaFree(void* p) {
    return release(p, false);
}

cudaError_t host_malloc_pinned(void** p, size_t bytes) {
    return allocate(p, bytes, true);
}

cudaError_t cudaFreeHost(void* p) {
    return release(p, true);
}

size_t host_device_bytes(const void* p) {
    for (Allocation* a = allocations; a; a = a->next) {
        uintptr_t at = (uintptr_t)p - (uintptr_t)a->p;      // huge where p lies before it
        if (at < a->bytes) return a->bytes - at;
    }
    return 0;
}

static bool is_pageable(const void* p) {
    return !host_device_bytes(p);
}

struct Fill {
    void* p;
    int value;
    size_t bytes;
};

static void fill(void* arg) {
    Fill* f = (Fill*)arg;
    memset(f->p, f->value, f->bytes);
}

struct Copy {
    void* to;
    const void* from;
    size_t to_pitch, from_pitch, width, height;
    void* staged;           // a copy of the source, to be freed
};

static void copy(void* arg) {
    Copy* c = (Copy*)arg;
    for (size_t i = 0; i < c->height; i++) {
        memmove((char*)c->to + i * c->to_pitch, (const char*)c->from + i * c->from_pitch, c->width);
    }
    free(c->staged);
}

static cudaError_t submit_copy(Copy c, cudaStream_t stream) {
    bool lazy = host_streams_lazy() && c.width && c.height;
    if (lazy && is_pageable(c.from)) {
        size_t bytes = (c.height - 1) * c.from_pitch + c.width;
        c.staged = malloc(bytes);
        if (!c.staged) return result(cudaErrorMemoryAllocation);
        memcpy(c.staged, c.from, bytes);
        c.from = c.staged;
    }
    host_stream_submit(stream, copy, &c, sizeof(c));
    return lazy && is_pageable(c.to) ? cudaStreamSynchronize(stream) : cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream) {
    Fill f = {p, value, bytes};
    host_stream_submit(stream, fill, &f, sizeof(f));
    return cudaSuccess;
}

cudaError_t cudaMemset(void* p, int value, size_t bytes) {
    return cudaMemsetAsync(p, value, bytes, nullptr);
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
    return submit_copy(Copy{to, from, bytes, bytes, bytes, 1, nullptr}, stream);
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    cudaError_t error = cudaMemcpyAsync(to, from, bytes, kind, nullptr);
    return error != cudaSuccess ? error : cudaStreamSynchronize(nullptr);
}

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind, cudaStream_t stream) {
    if (width > to_pitch || width > from_pitch) return result(cudaErrorInvalidValue);
    return submit_copy(Copy{to, from, to_pitch, from_pitch, width, height, nullptr}, stream);
}

// ---- the device ----------------------------------------------------------------------------

static __thread int device_now;         // of this thread, as in CUDA

// As many devices as HOST_DEVICES says, so that each of several processes may take its own; they
// are all this machine. 64 is more than a test starts.
static int device_count(void) {
    static int count;
    if (!count) {
        const char* text = getenv("HOST_DEVICES");
        char* end = nullptr;
        long n = text && *text ? strtol(text, &end, 10) : 64;
        if (n < 1 || n > 256 || (end && *end)) {
            host_error("HOST_DEVICES is '%s', wanted a number from 1 to 256", text);
        }
        count = (int)n;
    }
    return count;
}

static bool device_valid(int device) {
    return device >= 0 && device < device_count();
}

cudaError_t cudaGetDeviceCount(int* count) {
    *count = device_count();
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    if (!device_valid(device)) return result(cudaErrorInvalidDevice);
    device_now = device;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
    *device = device_now;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char* name, int size, int device) {
    if (!device_valid(device)) return result(cudaErrorInvalidDevice);
    if (!name || size < (int)sizeof("host:00:03.0")) return result(cudaErrorInvalidValue);
    snprintf(name, (size_t)size, "host:00:%02x.0", device);
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
    if (!device_valid(device)) return result(cudaErrorInvalidDevice);
    memset(p, 0, sizeof(*p));
    strcpy(p->name, "host");
    p->totalGlobalMem = physical_bytes(_SC_PHYS_PAGES);
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = 232448;
    p->sharedMemPerMultiprocessor = 233472;
    p->regsPerBlock = 65536;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->major = 9;           // the limits above are those of sm_90
    p->pciDeviceID = device;
    p->multiProcessorCount = host_threads();
    p->maxThreadsPerMultiProcessor = 1024;
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
    *free_bytes = physical_bytes(_SC_AVPHYS_PAGES);
    *total_bytes = physical_bytes(_SC_PHYS_PAGES);
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = 0;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
    return cudaRuntimeGetVersion(version);
}

cudaError_t cudaDeviceReset(void) {
    stream_drain_all();
    return cudaSuccess;
}
