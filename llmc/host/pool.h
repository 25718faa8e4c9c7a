/*
The persistent OS threads; included by engine.cpp alone.

The caller is worker 0 and starts at once; the others join while the job is open, so a short job
never waits for a sleeping worker. What they do is one function that claims pieces until none is
left; the job ends when worker 0 finds no more and those that joined have come back.

HOST_THREADS sets the number of workers; the default is the number of CPUs the process may use.
Sanitizer builds have one, so that __shared__ arrays can be plain statics, which ASan can watch.
*/
#pragma once
#include <pthread.h>
#include <signal.h>
#include <sched.h>
#include <cstdlib>
#include "engine.h"

#if defined(HOST_ASAN) || defined(HOST_TSAN)
static const bool ONE_WORKER = true;
#else
static const bool ONE_WORKER = false;
#endif
static const int MAX_WORKERS = 1024;

static struct {
    pthread_mutex_t mutex;
    pthread_cond_t wake, done;
    unsigned newest, closed;        // number of the newest job, and of the newest closed one
    void (*work)(void);
    int active;                     // workers other than 0 in the job
    int cpu;                        // where worker 0 was at its start
    int threads, wanted;            // OS threads that exist, and that may work, worker 0 included
} pool = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, PTHREAD_COND_INITIALIZER,
          0, 0, NULL, 0, 0, 1, 0};

// A worker that was woken on the caller's CPU would only take turns with it: some schedulers pack
// tasks so, and move them apart late. It goes to another CPU of its set.
static void pool_leave_cpu(int cpu) {
    cpu_set_t all, others;
    if (sched_getcpu() != cpu || sched_getaffinity(0, sizeof(all), &all)) return;
    others = all;
    CPU_CLR(cpu, &others);
    if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof(others), &others)) return;
    sched_setaffinity(0, sizeof(all), &all);
}

static void* pool_main(void* arg) {
    int index = (int)(intptr_t)arg;
    unsigned seen = 0;
    for (;;) {
        // A step has many short kernels in a row: looking for a moment is cheaper than sleeping.
        for (int i = 0; i < 2000 && __atomic_load_n(&pool.newest, __ATOMIC_RELAXED) == seen; i++) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
        pthread_mutex_lock(&pool.mutex);
        while (pool.newest == seen) pthread_cond_wait(&pool.wake, &pool.mutex);
        seen = pool.newest;
        bool join = pool.closed != pool.newest && index < pool.wanted;
        if (join) pool.active++;
        int cpu = pool.cpu;
        pthread_mutex_unlock(&pool.mutex);
        if (!join) continue;
        pool_leave_cpu(cpu);
        pool.work();
        pthread_mutex_lock(&pool.mutex);
        if (--pool.active == 0) pthread_cond_signal(&pool.done);
        pthread_mutex_unlock(&pool.mutex);
    }
    return NULL;
}

void host_set_threads(int n) {
    const char* text = getenv("HOST_THREADS");
    cpu_set_t cpus;
    if (n <= 0) n = sched_getaffinity(0, sizeof(cpus), &cpus) ? 1 : CPU_COUNT(&cpus);
    else text = NULL;
    if (text && *text) {
        char* end;
        long value = strtol(text, &end, 10);
        if (*end || value < 1 || value > MAX_WORKERS) {
            host_error("HOST_THREADS is '%s', wanted a number from 1 to %d", text, MAX_WORKERS);
        }
        n = (int)value;
    }
    pool.wanted = ONE_WORKER ? 1 : n < MAX_WORKERS ? n : MAX_WORKERS;
}

int host_threads(void) {
    if (!pool.wanted) host_set_threads(0);
    return pool.wanted;
}

static void pool_grow(void) {
    // Ctrl-C and the like are for the thread that started the program: it has a stack for handlers.
    sigset_t others, before;
    sigfillset(&others);
    sigdelset(&others, SIGSEGV);
    sigdelset(&others, SIGBUS);
    sigdelset(&others, SIGFPE);
    sigdelset(&others, SIGILL);
    pthread_sigmask(SIG_BLOCK, &others, &before);
    for (; pool.threads < pool.wanted; pool.threads++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, pool_main, (void*)(intptr_t)pool.threads)) {
            host_error("cannot start worker %d of %d: lower HOST_THREADS", pool.threads,
                       pool.wanted);
        }
        pthread_detach(thread);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

// Runs work() on the caller and, if shared, on the workers that come in time.
static void pool_run(void (*work)(void), bool shared) {
    if (!shared || host_threads() == 1) {
        work();
        return;
    }
    if (pool.threads < pool.wanted) pool_grow();
    pthread_mutex_lock(&pool.mutex);
    pool.work = work;
    pool.cpu = sched_getcpu();
    __atomic_store_n(&pool.newest, pool.newest + 1, __ATOMIC_RELAXED);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.mutex);
    work();
    pthread_mutex_lock(&pool.mutex);
    pool.closed = pool.newest;
    while (pool.active) pthread_cond_wait(&pool.done, &pool.mutex);
    pthread_mutex_unlock(&pool.mutex);
}
