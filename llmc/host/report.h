/*
What the engine says when it stops the program; included by engine.cpp alone, after its state. Each
message names kernel, block and thread, and the exit code is 70.
*/
#pragma once
#include <signal.h>
#include <unistd.h>
#include <cstdarg>
#include <cstdio>

static void print_place(void) {
    if (!host_self || !job.running) {
        fprintf(stderr, "host: ");
        return;
    }
    uint3 b = host_block.idx, t = host_self->idx;
    fprintf(stderr, "host: kernel %s, block (%u,%u,%u), thread (%u,%u,%u): ", job.kernel, b.x, b.y,
            b.z, t.x, t.y, t.z);
}

void host_error(const char* fmt, ...) {
    fflush(stdout);
    print_place();
    va_list args;
    va_start(args, fmt);
    vfprintf(stderr, fmt, args);
    va_end(args);
    fputc('\n', stderr);
    fflush(stderr);
    _exit(70);
}

// Threads that wait in the same place are one line: "threads 0-99 wait in __syncthreads at f:12".
[[noreturn]] static void report_deadlock(Worker* w) {
    fflush(stdout);
    print_place();
    fprintf(stderr, "deadlock: no thread of the block can go on; %u of %u have exited\n",
            w->threads - w->live, w->threads);
    int lines = 0;
    for (unsigned i = 0; i < w->threads && lines < 20; lines++) {
        HostThread* t = &w->thread[i];
        bool live = w->warp[t->warp].live >> t->lane & 1;
        unsigned j = i + 1;
        for (; j < w->threads; j++) {
            HostThread* u = &w->thread[j];
            if ((w->warp[u->warp].live >> u->lane & 1) != live) break;
            if (live && (u->what != t->what || u->line != t->line)) break;
        }
        if (live && t->file) {
            fprintf(stderr, "    threads %u-%u wait in %s at %s:%d\n", i, j - 1, t->what, t->file,
                    t->line);
        } else {
            fprintf(stderr, "    threads %u-%u %s %s\n", i, j - 1, live ? "wait in" : "have exited",
                    live ? t->what : "");
        }
        i = j;
    }
    fflush(stderr);
    _exit(70);
}

// A null pointer or the guard page of a stack, under a kernel's name. Sanitizers report their own.
static void report_fault(int signal_number, siginfo_t* info, void*) {
    signal(signal_number, SIG_DFL);
    if (!host_self || !job.running) return;     // back to the instruction, to end as usual
    const char* p = (const char*)info->si_addr;
    const HostFiber* f = this_worker->current;
    if (f->stack && p < f->stack && p >= f->stack - GUARD_BYTES) {
        host_error("stack overflow: a CUDA thread has %zu KB of stack here", f->size / 1024);
    }
    host_error("%s at address %p", signal_number == SIGSEGV ? "memory fault" : "bus error", p);
}

// To be called on each worker: the handler needs a stack of its own there.
static void report_faults(void) {
#if !defined(HOST_ASAN) && !defined(HOST_TSAN)
    static const size_t bytes = 64 * 1024;
    stack_t stack = {};
    stack.ss_sp = malloc(bytes);
    stack.ss_size = bytes;
    if (!stack.ss_sp || sigaltstack(&stack, NULL)) return;
    struct sigaction action = {};
    action.sa_sigaction = report_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, NULL);
    sigaction(SIGBUS, &action, NULL);
#else
    (void)report_fault;
#endif
}
