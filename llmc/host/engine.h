/*
The host engine: runs CUDA kernels on CPU threads, CUDA thread for CUDA thread.

A launch is a loop over blocks; the blocks are shared out over a persistent pool of OS threads
(workers). Inside a block a runner executes `do kernel(args); while (host_next_thread());` with
the kernel inlined, so CUDA threads that never wait cost a few instructions each. When a CUDA
thread has to wait (barrier, shuffle, mma) its stack is set aside as a fiber and the engine
continues a thread that can run, or starts the next one with a runner on another stack.

Warp-wide operations are collectives: every lane of a mask arrives with one argument, the last
arriver executes the operation once for all lanes, then all continue. The engine knows at each
moment who waits for whom; what would hang or be undefined on a GPU ends the program with exit
code 70 and a message that names the kernel, the block and the thread.

Order of execution (environment HOST_SCHED):
    unset, 0, depth   in order, one warp as far as it goes before the next one
    reverse           last thread and last block first
    breadth           round robin over all threads that can run
    <seed>            random, a function of the seed and the block alone
Other environment variables: HOST_THREADS=n workers (default: all CPUs; results do not depend on it,
blocks are independent), HOST_STREAMS=lazy, HOST_LEAKS=1 and HOST_DEVICES=n (runtime.cpp),
HOST_INTERBLOCK=1 (engine.cpp), HOST_NCCL_FAIL and HOST_NCCL_TIMEOUT (nccl.h), HOST_PROFILE=1 (wall
time by kernel, printed to stderr at exit).

Sanitizers: define HOST_ASAN or HOST_TSAN (or let -fsanitize do it) in every file alike. engine.cpp
is best compiled without -fsanitize, runtime.cpp either way. Sanitizer builds use one worker.
*/
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdio>

#if defined(__SANITIZE_ADDRESS__) && !defined(HOST_ASAN)
#define HOST_ASAN
#endif
#if defined(__SANITIZE_THREAD__) && !defined(HOST_TSAN)
#define HOST_TSAN
#endif
#define HOST_NOSAN __attribute__((no_sanitize("thread")))

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ---- what a kernel sees of itself ----------------------------------------------------------

struct HostFiber;

struct HostThread {
    uint3 idx;              // threadIdx
    unsigned linear, lane, warp;
    void* async;            // pending cp.async of this thread, owned by ptx.cuh
    void** slot;            // of its lane, for collectives
    HostFiber* fiber;       // the stack it waits on
    const char* what;       // the operation it waits in, for reports
    const char* file;
    int line;
};

struct HostBlock {
    HostThread* fast_end;   // end of the threads while none of the block has waited, else null
    dim3 grid, block;
    uint3 idx;              // blockIdx
    unsigned char* dynamic; // the block's dynamic shared memory
    size_t dynamic_bytes;
    int barrier_result;
};

extern __thread HostThread* host_self;      // null outside kernels
extern __thread HostBlock host_block;

static inline int host_lane(void) {
    return (int)host_self->lane;
}

static inline void*& host_thread_async(void) {
    return host_self->async;
}

// ---- execution -----------------------------------------------------------------------------

typedef void (*host_body_fn)(void* args);   // do kernel(args...); while (host_next_thread());

void host_run_grid(const char* kernel, dim3 grid, dim3 block, size_t dynamic_bytes,
                   host_body_fn body, void* args);
// HOST_NAN=kernel:n: the n-th launch of that kernel leaves a NaN at the start of its first argument;
// n+: each from the n-th on.
void host_break_output(const char* kernel, void* output);
extern "C" void host_next_switch(void);

// Ends the current CUDA thread and makes another one current on the same stack; false: all done.
HOST_NOSAN static inline bool host_next_thread(void) {
    HostThread* next = host_self + 1;
    if (__builtin_expect(next < host_block.fast_end && !host_self->async, 1)) {
        host_self = next;
        return true;
    }
    host_next_switch();
    return host_self != nullptr;
}

void host_set_threads(int n);               // workers; 0: the default
int host_threads(void);
void host_set_schedule(const char* order);  // as HOST_SCHED; null: in order

// Runs fn(ctx, 0..n-1) on the same pool and waits. For libraries, never from inside a kernel.
void host_parallel_for(int n, void (*fn)(void* ctx, int i), void* ctx);

[[noreturn]] void host_error(const char* fmt, ...) __attribute__((format(printf, 1, 2)));

// ---- profile: wall time by kernel ------------------------------------------------------------

struct HostProfileRow {
    char name[112];
    long calls;
    double seconds;
};
void host_profile(bool on);                 // on: from zero
int host_profile_rows(const HostProfileRow** rows);     // the longest first
void host_profile_print(FILE* out);
// A library's own work: end(name, begin()). begin returns 0 while off, and end does nothing then.
double host_profile_begin(void);
void host_profile_end(const char* name, double begin);

// ---- barriers and collectives --------------------------------------------------------------

// The functions called *_switch may run other threads before they return, see engine.cpp.
extern "C" {
void host_barrier_switch(int id, int count, int predicate, const char* what, const char* file,
                         int line);
void host_collective_switch(unsigned mask, void (*fn)(void** slots, unsigned mask), void* arg,
                            const char* what);
}

// Block barrier `id` (0..15) of `count` threads (0: all that have not exited). Barrier 0 returns
// how many threads came with predicate != 0. All threads of one barrier must come from one line.
HOST_NOSAN static inline int host_barrier(int id, int count, int predicate, const char* what,
                                          const char* file, int line) {
    host_barrier_switch(id, count, predicate, what, file, line);
    return host_block.barrier_result;   // stays until this thread has arrived again
}
void host_syncwarp(unsigned mask);
void host_yield(void);                      // for polling loops: lets every other thread run

// One slot per lane; slots of lanes outside the mask must not be touched. A result may be left
// in the slot, which is what host_warp_collective returns to its lane.
typedef void (*host_collective_fn)(void** slots, unsigned mask);
HOST_NOSAN static inline void* host_warp_collective(unsigned mask, host_collective_fn fn, void* arg,
                                                    const char* what) {
    host_collective_switch(mask, fn, arg, what);
    return *host_self->slot;
}
unsigned host_active_mask(void);            // the lane itself: the only lanes sure to be converged

// ---- memory and streams (runtime.cpp) ------------------------------------------------------

typedef struct HostStream* cudaStream_t;
bool host_streams_lazy(void);
// Calls fn(a copy of arg) in stream order: at once, or (HOST_STREAMS=lazy) when something waits.
void host_stream_submit(cudaStream_t stream, void (*fn)(void*), const void* arg, size_t bytes);
void host_set_streams(const char* mode, uint64_t seed);    // "inorder" or "lazy"
// Bytes from p to the end of its cudaMalloc or cudaMallocHost; 0: p is in none.
size_t host_device_bytes(const void* p);
size_t host_peak_bytes(void);               // most device memory in use at any time
size_t host_report_leaks(void);             // prints each block still allocated, returns bytes
