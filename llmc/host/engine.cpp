/*
The engine behind engine.h: the scheduler, barriers, warp collectives, blocks, launches. Stacks are
in fiber.h, OS threads in pool.h, error reports in report.h, times in profile.h.

A worker (one OS thread) runs one block at a time. Each CUDA thread is in one of these states:
fresh (not started), running (host_self), waiting (its stack is a parked fiber; it is counted in a
barrier or a collective), ready (parked, may continue), exited. Per warp three masks say which:
live, ready (which includes fresh) and fresh.

A block begins in the fast state: threads run one after the other on the stack that is there, and
host_next_thread only counts up. The first thread that waits ends the fast state: from then on the
masks are kept. A runner whose thread has ended parks as idle when another stack shall go on, and
is woken when a fresh thread needs a stack, so a block of n waiting threads uses n stacks, and the
next block uses the same ones.

Sanitizers: ASan is told of each switch. TSan gets one of its fibers per CUDA thread index, which
then has a stack to itself (a stack used by two would look like a race), and happens-before edges
for exactly what CUDA orders: launch and block borders, barriers, __syncwarp. Start and end are two
objects, as one would order all threads of a block. Block borders order blocks of one worker; with
HOST_INTERBLOCK=1 they do not, which shows races between blocks, for kernels without static
__shared__ arrays.
Test: test/test_host.cu, test/planted.cu
*/
#ifdef __SANITIZE_THREAD__
#error "compile engine.cpp without -fsanitize=thread but with -DHOST_TSAN: it tells TSan what is"
#endif
#include "engine.h"
#include "fiber.h"
#include "pool.h"

__thread HostThread* host_self;
__thread HostBlock host_block = {};

// ---- state ---------------------------------------------------------------------------------

enum { MAX_THREADS = 1024, MAX_WARPS = 32, MAX_BARRIERS = 16 };
static const size_t MAX_DYNAMIC_BYTES = 232448;     // 227 KB: sm_90 and sm_100

struct Group {          // lanes that have arrived at one collective
    unsigned mask, arrived;
    host_collective_fn fn;      // null: __syncwarp
    const char* what;
    unsigned generation;
    char sync[2];               // addresses for TSan, alternating
};

struct Warp {
    unsigned live, ready, fresh;
    unsigned groups;    // bit i: group[i] is in use
    Group group[32];    // more cannot be: each has a lane that waits
    void* slot[32];
};

struct Barrier {
    unsigned arrived, count;    // count 0: all live threads
    int predicates;
    const char *what, *file;
    int line;
    unsigned generation;
    char sync[2];               // addresses for TSan, alternating
    unsigned waiting[MAX_WARPS];
};

enum Order { ORDER_DEPTH, ORDER_REVERSE, ORDER_BREADTH, ORDER_RANDOM };

struct Worker {
    HostThread thread[MAX_THREADS];
    Warp warp[MAX_WARPS];
    Barrier barrier[MAX_BARRIERS];
    unsigned ready_warps;               // bit w: warp[w].ready != 0
    unsigned threads, live, warps;
    bool fast;
    dim3 shape;                         // block shape that thread[].idx was made for
    HostFiber* current;
    HostFiber own;                      // the OS thread's stack
    HostFiber fiber[MAX_THREADS];
    unsigned fibers;
    HostFiber* idle[MAX_THREADS + 1];
    unsigned idles;
    unsigned char* dynamic;
    size_t dynamic_capacity;
    uint64_t random;
    char hb_start, hb_end;              // addresses for TSan
};

static struct Job {
    bool running;
    const char* kernel;
    dim3 grid, block;
    size_t dynamic_bytes;
    host_body_fn body;
    void* args;
    void (*item)(void* ctx, int i);
    uint64_t items, next;               // next: claimed with atomic adds
    uint64_t stride, offset;            // block n of the order is n * stride + offset mod items
} job;

static __thread Worker* this_worker;
static Order order = ORDER_DEPTH;
static uint64_t order_seed;
static bool order_known, interblock;

#include "report.h"
#include "profile.h"

// ---- runners -------------------------------------------------------------------------------

HOST_NOSAN static void fiber_main(void) {
    fiber_entered();
    for (;;) {
        HostFiber* me = this_worker->current;
        TSAN_ACQUIRE(&this_worker->hb_start);
        me->in_body = true;
        job.body(job.args);
        me->in_body = false;
        this_worker->current = &this_worker->own;
        fiber_switch(me, &this_worker->own);
    }
}

// The stack for a fresh thread: under TSan its own, else the one used last.
HOST_NOSAN static HostFiber* runner_take(Worker* w, HostThread* t) {
    unsigned index = TSAN ? t->linear : w->fibers;
    if (!TSAN && w->idles) return w->idle[--w->idles];
    HostFiber* f = &w->fiber[index];
    if (!f->stack) fiber_init(f, index, fiber_main);
    if (!TSAN) w->fibers++;
    return f;
}

// ---- the scheduler -------------------------------------------------------------------------

HOST_NOSAN static inline unsigned random_below(Worker* w, unsigned n) {
    w->random ^= w->random << 13;
    w->random ^= w->random >> 7;
    w->random ^= w->random << 17;
    return (unsigned)((w->random >> 32) * n >> 32);
}

HOST_NOSAN static unsigned random_bit(Worker* w, unsigned mask) {
    for (unsigned k = random_below(w, (unsigned)__builtin_popcount(mask)); k; k--) mask &= mask - 1;
    return (unsigned)__builtin_ctz(mask);
}

HOST_NOSAN static inline void make_ready(Worker* w, unsigned warp, unsigned mask) {
    w->warp[warp].ready |= mask;
    w->ready_warps |= (unsigned)(mask != 0) << warp;
}

HOST_NOSAN static inline HostThread* thread_take(Worker* w, unsigned warp, unsigned lane) {
    Warp* p = &w->warp[warp];
    HostThread* t = &w->thread[32 * warp + lane];
    unsigned bit = 1u << lane;
    p->ready &= ~bit;
    if (!p->ready) w->ready_warps &= ~(1u << warp);
    if (p->fresh & bit) {
        p->fresh &= ~bit;
        t->fiber = NULL;
    }
    return t;
}

// The first runnable thread after `t` in round-robin order.
HOST_NOSAN static HostThread* pick_after(Worker* w, HostThread* t) {
    if (!w->ready_warps) return NULL;
    unsigned above = w->warp[t->warp].ready & (unsigned)(~0ull << (t->lane + 1));
    if (above) return thread_take(w, t->warp, (unsigned)__builtin_ctz(above));
    unsigned warps = w->ready_warps & (unsigned)(~0ull << (t->warp + 1));
    unsigned warp = (unsigned)__builtin_ctz(warps ? warps : w->ready_warps);
    return thread_take(w, warp, (unsigned)__builtin_ctz(w->warp[warp].ready));
}

// The next thread to run after `t`, removed from its ready mask; null: none can.
HOST_NOSAN static inline HostThread* pick(Worker* w, HostThread* t) {
    if (__builtin_expect(order != ORDER_DEPTH, 0)) {
        if (!w->ready_warps) return NULL;
        if (order == ORDER_BREADTH) return pick_after(w, t);
        bool random = order == ORDER_RANDOM;
        unsigned warp = random ? random_bit(w, w->ready_warps)
                               : 31 - (unsigned)__builtin_clz(w->ready_warps);
        unsigned ready = w->warp[warp].ready;
        unsigned lane = random ? random_bit(w, ready) : 31 - (unsigned)__builtin_clz(ready);
        return thread_take(w, warp, lane);
    }
    unsigned warp = t->warp;
    if (!w->warp[warp].ready) {
        if (!w->ready_warps) return NULL;
        warp = (unsigned)__builtin_ctz(w->ready_warps);
    }
    Warp* p = &w->warp[warp];
    unsigned started = p->ready & ~p->fresh;
    return thread_take(w, warp, (unsigned)__builtin_ctz(started ? started : p->ready));
}

// Leaves the fast state, in which the masks do not exist: threads before `me` have exited.
HOST_NOSAN static void masks_begin(Worker* w, unsigned me) {
    w->fast = false;
    host_block.fast_end = NULL;
    w->live = w->threads - me;
    w->ready_warps = 0;
    for (unsigned i = 0; i < w->warps; i++) {
        Warp* p = &w->warp[i];
        unsigned lanes = w->threads - 32 * i;
        unsigned all = lanes >= 32 ? ~0u : (1u << lanes) - 1;
        unsigned gone = me <= 32 * i ? 0 : me - 32 * i >= 32 ? ~0u : (1u << (me - 32 * i)) - 1;
        p->live = p->fresh = p->ready = all & ~gone;
        p->groups = 0;
        if (p->ready) w->ready_warps |= 1u << i;
    }
}

HOST_NOSAN static inline void enter_slow_state(Worker* w, HostThread* me) {
    if (__builtin_expect(w->fast, 0)) {
        masks_begin(w, me->linear);
        thread_take(w, me->warp, me->lane);
    }
}

// Makes t current in place of me, which waits, and says how to get there.
HOST_NOSAN static inline HostSwitch switch_away(Worker* w, HostThread* me, HostThread* t) {
    if (t == me) return HostSwitch{NULL, NULL};
    HostFiber* from = w->current;
    me->fiber = from;
    HostFiber* to = t->fiber ? t->fiber : runner_take(w, t);
    host_self = t;
    w->current = to;
    return HostSwitch{to, from};
}

HOST_NOSAN static inline HostSwitch wait_here(Worker* w, HostThread* me) {
    HostThread* t = pick(w, me);
    if (__builtin_expect(!t, 0)) report_deadlock(w);
    return switch_away(w, me, t);
}

// After the last arrival at a barrier or collective: that thread goes on, or takes its chance.
HOST_NOSAN static inline HostSwitch go_on(Worker* w, HostThread* me) {
    if (order == ORDER_DEPTH || order == ORDER_BREADTH) return HostSwitch{NULL, NULL};
    make_ready(w, me->warp, 1u << me->lane);
    return wait_here(w, me);
}

HOST_NOSAN static void barrier_release(Worker* w, Barrier* b) {
    b->arrived = 0;
    if (b == &w->barrier[0]) host_block.barrier_result = b->predicates;
    b->predicates = 0;
    b->generation++;
    for (unsigned i = 0; i < w->warps; i++) {
        make_ready(w, i, b->waiting[i]);
        b->waiting[i] = 0;
    }
}

HOST_NOSAN static void thread_exit(Worker* w, HostThread* me) {
    Warp* p = &w->warp[me->warp];
    unsigned bit = 1u << me->lane;
    p->live &= ~bit;
    w->live--;
    for (unsigned u = p->groups; u; u &= u - 1) {
        Group* g = &p->group[__builtin_ctz(u)];
        if (g->mask & bit) {
            host_error("thread exits while lanes of its warp (mask %08x) wait for it in %s",
                       g->arrived, g->what);
        }
    }
    Barrier* b = &w->barrier[0];
    if (b->arrived && !b->count && b->arrived == w->live) barrier_release(w, b);
}

// ---- blocks --------------------------------------------------------------------------------

// Claims the worker's next block and makes its first thread current; false: no block is left.
HOST_NOSAN static bool block_begin(Worker* w) {
    uint64_t n = __atomic_fetch_add(&job.next, 1, __ATOMIC_RELAXED);
    if (n >= job.items) return false;
    if (job.stride != 1 || job.offset != 0) {
        n = (uint64_t)(((unsigned __int128)n * job.stride + job.offset) % job.items);
    }
    uint64_t rest = n / job.grid.x;
    host_block.idx.x = (unsigned)(n % job.grid.x);
    host_block.idx.y = (unsigned)(rest % job.grid.y);
    host_block.idx.z = (unsigned)(rest / job.grid.y);
    if (interblock) {
        free(w->dynamic);       // memory that no block has touched, as TSan sees it
        w->dynamic = (unsigned char*)malloc(job.dynamic_bytes + 1024);
        host_block.dynamic = (unsigned char*)(((uintptr_t)w->dynamic + 1023) & ~(uintptr_t)1023);
    } else {
        TSAN_ACQUIRE(&w->hb_end);
    }
    memset(host_block.dynamic, 0xff, job.dynamic_bytes);
    TSAN_RELEASE(&w->hb_start);
    if (order == ORDER_DEPTH && !TSAN) {
        w->fast = true;
        host_block.fast_end = w->thread + w->threads;
        host_self = w->thread;
        return true;
    }
    w->random = (order_seed + 1) * 0x9e3779b97f4a7c15ull ^ (n + 1) * 0xbf58476d1ce4e5b9ull;
    masks_begin(w, 0);
    host_self = pick(w, &w->thread[order == ORDER_BREADTH ? w->threads - 1 : 0]);
    return true;
}

// The current thread has ended; makes another one current, or null at the end of the launch.
extern "C" HOST_NOSAN HostSwitch host_next_arrive(void) {
    Worker* w = this_worker;
    HostThread* me = host_self;
    if (me->async) host_error("thread ended with pending cp.async: cp_async_wait is missing");
    TSAN_RELEASE(&w->hb_end);
    HostFiber* from = w->current;
    HostThread* t = NULL;
    if (!w->fast) {
        thread_exit(w, me);
        t = pick(w, me);
        if (!t && w->live) report_deadlock(w);
    }
    HostFiber* to = &w->own;
    if (t || block_begin(w)) {
        t = t ? t : host_self;
        to = !w->fast && t->fiber ? t->fiber : TSAN ? runner_take(w, t) : from;
    }
    host_self = t;
    if (to == from) return HostSwitch{NULL, NULL};
    // Parked until a fresh thread needs this stack (then host_self is that thread), or until the
    // launch ends (then it is null).
    if (!TSAN) w->idle[w->idles++] = from;
    w->current = to;
    return HostSwitch{to, from};
}

// ---- barriers and collectives --------------------------------------------------------------

extern "C" HOST_NOSAN HostSwitch host_barrier_arrive(int id, int count, int predicate,
                                                     const char* what, const char* file,
                                                     int line) {
    Worker* w = this_worker;
    HostThread* me = host_self;
    enter_slow_state(w, me);
    Barrier* b = &w->barrier[id];
    if (!b->arrived) {
        b->count = (unsigned)count;
        b->what = what;
        b->file = file;
        b->line = line;
    } else if (b->what != what || b->line != line || b->count != (unsigned)count) {
        host_error("divergent barrier: %u threads wait in %s at %s:%d, this one came to %s at "
                   "%s:%d", b->arrived, b->what, b->file, b->line, what, file, line);
    }
    b->predicates += predicate != 0;
    if (++b->arrived == (count ? (unsigned)count : w->live)) {
        barrier_release(w, b);
        return go_on(w, me);
    }
    b->waiting[me->warp] |= 1u << me->lane;
    me->what = what;
    me->file = file;
    me->line = line;
    return wait_here(w, me);
}

[[noreturn]] static void report_divergence(const Group* g, const char* what) {
    host_error("divergent warp operation: lanes %08x of mask %08x wait in %s, this one came to %s",
               g->arrived, g->mask, g->what, what);
}

extern "C" HOST_NOSAN HostSwitch host_collective_arrive(unsigned mask, host_collective_fn fn,
                                                        void* arg, const char* what) {
    Worker* w = this_worker;
    HostThread* me = host_self;
    enter_slow_state(w, me);
    Warp* p = &w->warp[me->warp];
    unsigned bit = 1u << me->lane;
    if (!(mask & bit)) host_error("%s: lane %u is not in its own mask %08x", what, me->lane, mask);
    if (mask & ~p->live) {
        host_error("%s: mask %08x names lanes %08x that have exited or do not exist", what, mask,
                   mask & ~p->live);
    }
    Group* g = NULL;
    for (unsigned u = p->groups; u; u &= u - 1) {
        Group* candidate = &p->group[__builtin_ctz(u)];
        if (candidate->mask == mask) g = candidate;
    }
    if (!g) {
        unsigned i = (unsigned)__builtin_ctz(~p->groups);
        p->groups |= 1u << i;
        g = &p->group[i];
        g->mask = mask;
        g->arrived = 0;
        g->fn = fn;
        g->what = what;
    } else if (g->fn != fn || g->what != what) {    // shuffles of all kinds share one function
        report_divergence(g, what);
    }
    p->slot[me->lane] = fn ? arg : &g->sync[g->generation & 1];
    if (!fn) TSAN_RELEASE(p->slot[me->lane]);
    g->arrived |= bit;
    if (g->arrived == mask) {
        if (fn) fn(p->slot, mask);
        p->groups &= ~(1u << (g - p->group));
        g->generation++;
        make_ready(w, me->warp, mask & ~bit);
        return go_on(w, me);
    }
    me->what = what;
    me->file = NULL;
    return wait_here(w, me);
}

#ifndef HOST_ASM_STUBS

extern "C" HOST_NOSAN void host_next_switch(void) {
    HostSwitch s = host_next_arrive();
    if (s.to) fiber_switch(s.from, s.to);
    TSAN_ACQUIRE(&this_worker->hb_start);
}

extern "C" HOST_NOSAN void host_barrier_switch(int id, int count, int predicate, const char* what,
                                               const char* file, int line) {
    Barrier* b = &this_worker->barrier[id];
    char* sync = &b->sync[b->generation & 1];
    TSAN_RELEASE(sync);
    HostSwitch s = host_barrier_arrive(id, count, predicate, what, file, line);
    if (s.to) fiber_switch(s.from, s.to);
    TSAN_ACQUIRE(sync);
}

extern "C" HOST_NOSAN void host_collective_switch(unsigned mask, host_collective_fn fn, void* arg,
                                                  const char* what) {
    HostSwitch s = host_collective_arrive(mask, fn, arg, what);
    if (s.to) fiber_switch(s.from, s.to);
}

#endif

HOST_NOSAN void host_syncwarp(unsigned mask) {
    host_collective_switch(mask, NULL, NULL, "__syncwarp");
    TSAN_ACQUIRE(*host_self->slot);
}

HOST_NOSAN void host_yield(void) {
    Worker* w = this_worker;
    HostThread* me = host_self;
    enter_slow_state(w, me);
    me->what = "a polling loop";
    me->file = NULL;
    HostThread* t = pick_after(w, me);
    if (!t) return;
    make_ready(w, me->warp, 1u << me->lane);
    HostSwitch s = switch_away(w, me, t);
    fiber_switch(s.from, s.to);
}

unsigned host_active_mask(void) {
    return 1u << host_self->lane;
}

// ---- workers -------------------------------------------------------------------------------

static Worker* worker_new(void) {
    Worker* w = (Worker*)mmap(NULL, sizeof(Worker), PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if ((void*)w == MAP_FAILED) host_error("no memory for a worker");
    fiber_init_own(&w->own);
    report_faults();
    w->current = &w->own;
    for (unsigned i = 0; i < MAX_THREADS; i++) {
        w->thread[i].linear = i;
        w->thread[i].lane = i & 31;
        w->thread[i].warp = i >> 5;
        w->thread[i].slot = &w->warp[i >> 5].slot[i & 31];
    }
    return w;
}

static void dynamic_allocate(Worker* w, size_t bytes) {
    bool exact = ONE_WORKER;       // so that the sanitizer sees the first byte too far
    if (w->dynamic && !exact && bytes <= w->dynamic_capacity) return;
    free(w->dynamic);
    void* memory = NULL;
    if (posix_memalign(&memory, 1024, bytes ? bytes : 1)) host_error("no memory for shared memory");
    w->dynamic = (unsigned char*)memory;
    w->dynamic_capacity = bytes;
}

static void work_grid(void) {
    if (!this_worker) this_worker = worker_new();
    Worker* w = this_worker;
    dim3 b = job.block;
    w->threads = b.x * b.y * b.z;
    w->warps = (w->threads + 31) / 32;
    if (w->shape.x != b.x || w->shape.y != b.y || w->shape.z != b.z) {
        for (unsigned i = 0; i < w->threads; i++) {
            w->thread[i].idx = uint3{i % b.x, i / b.x % b.y, i / (b.x * b.y)};
        }
        w->shape = b;
    }
    dynamic_allocate(w, job.dynamic_bytes);
    host_block.grid = job.grid;
    host_block.block = b;
    host_block.dynamic = w->dynamic;
    host_block.dynamic_bytes = job.dynamic_bytes;
    TSAN_RELEASE(&w->hb_end);           // what the host wrote before is seen by the first block
    if (!block_begin(w)) return;
    if (TSAN) {
        w->current = runner_take(w, host_self);
        fiber_switch(&w->own, w->current);
    } else {
        job.body(job.args);
    }
    // Let each parked runner return from its body, so that it can begin another kernel's.
    for (unsigned i = 0; i < (TSAN ? w->threads : w->idles); i++) {
        HostFiber* f = TSAN ? &w->fiber[i] : w->idle[i];
        host_self = NULL;
        if (!f->in_body) continue;
        w->current = f;
        fiber_switch(&w->own, f);
    }
    w->idles = 0;
    for (unsigned i = 0; i < w->fibers; i++) w->idle[w->idles++] = &w->fiber[i];
    host_self = NULL;
    TSAN_ACQUIRE(&w->hb_end);
}

static void work_items(void) {
    for (;;) {
        uint64_t i = __atomic_fetch_add(&job.next, 1, __ATOMIC_RELAXED);
        if (i >= job.items) return;
        job.item(job.args, (int)i);
    }
}

// ---- launches ------------------------------------------------------------------------------

void host_set_schedule(const char* text) {
    order_known = true;
    order_seed = 0;
    order = ORDER_DEPTH;
    if (!text || !*text || !strcmp(text, "depth")) return;
    if (!strcmp(text, "reverse")) {
        order = ORDER_REVERSE;
    } else if (!strcmp(text, "breadth")) {
        order = ORDER_BREADTH;
    } else {
        char* end;
        order_seed = strtoull(text, &end, 10);
        if (*end) host_error("HOST_SCHED is '%s', wanted depth, reverse, breadth or a seed", text);
        if (order_seed) order = ORDER_RANDOM;
    }
}

static uint64_t greatest_common_divisor(uint64_t a, uint64_t b) {
    while (b) {
        uint64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

static void order_blocks(void) {
    job.stride = 1;
    job.offset = 0;
    if (order == ORDER_REVERSE) {
        job.stride = job.items - 1;         // -1 modulo items
        job.offset = job.items - 1;
        if (job.items == 1) job.stride = 1;
    } else if (order == ORDER_RANDOM) {
        uint64_t mixed = (order_seed + 1) * 0x9e3779b97f4a7c15ull;
        job.offset = (mixed >> 32) % job.items;
        job.stride = mixed % job.items + 1;
        while (greatest_common_divisor(job.stride, job.items) != 1) job.stride++;
    }
}

void host_run_grid(const char* kernel, dim3 grid, dim3 block, size_t dynamic_bytes,
                   host_body_fn body, void* args) {
    if (!order_known) {
        host_set_schedule(getenv("HOST_SCHED"));
        interblock = TSAN && getenv("HOST_INTERBLOCK");
    }
    if (job.running) host_error("kernel %s is launched from inside a kernel or a job", kernel);
    uint64_t threads = (uint64_t)block.x * block.y * block.z;
    if (threads == 0 || threads > 1024 || block.x > 1024 || block.y > 1024 || block.z > 64) {
        host_error("kernel %s: block of (%u,%u,%u) threads, wanted 1 to 1024 in all, z at most 64",
                   kernel, block.x, block.y, block.z);
    }
    if (!grid.x || !grid.y || !grid.z || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535) {
        host_error("kernel %s: grid of (%u,%u,%u) blocks, wanted at least 1 each, at most "
                   "(2147483647,65535,65535)", kernel, grid.x, grid.y, grid.z);
    }
    if (dynamic_bytes > MAX_DYNAMIC_BYTES) {
        host_error("kernel %s: %zu bytes of shared memory, a block has %zu", kernel, dynamic_bytes,
                   MAX_DYNAMIC_BYTES);
    }
    job = Job{};
    job.running = true;
    job.kernel = kernel;
    job.grid = grid;
    job.block = block;
    job.dynamic_bytes = dynamic_bytes;
    job.body = body;
    job.args = args;
    job.items = (uint64_t)grid.x * grid.y * grid.z;
    order_blocks();
    double begin = host_profile_begin();
    pool_run(work_grid, job.items > 1);
    host_profile_end(kernel, begin);
    job.running = false;
}

void host_break_output(const char* kernel, void* output) {
    static const char* const plan = getenv("HOST_NAN");
    static long left = plan && strchr(plan, ':') ? atol(strchr(plan, ':') + 1) : 0;
    if (left <= 0 || strncmp(kernel, plan, strcspn(plan, ":")) != 0) return;
    if (left > 1) {
        left--;
        return;
    }
    const uint32_t nan = 0x7fc07fc0;        // as one float and as two bf16
    memcpy(output, &nan, sizeof nan);
    if (plan[strlen(plan) - 1] != '+') left = 0;
}

void host_parallel_for(int n, void (*fn)(void* ctx, int i), void* ctx) {
    if (n <= 0) return;
    if (job.running) host_error("host_parallel_for is called from inside a kernel or a job");
    job = Job{};
    job.running = true;
    job.item = fn;
    job.args = ctx;
    job.items = (uint64_t)n;
    pool_run(work_items, n > 1);
    job.running = false;
}
