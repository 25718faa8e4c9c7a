/*
Stacks and the switch between them; included by engine.cpp alone.

A switch saves what the System V ABI says a call preserves, and nothing else. Stack tops are offset
by 64-byte steps: equal tops would share the same few sets of the L1 cache, at half the speed. Below
each stack lies a guard page, as long as the system allows one more mapping.

The functions that kernels call often (host_*_switch) are written around their C halves
(host_*_arrive), which say from which fiber to which to go, or null to return. After a switch the
stub leaves by an indirect jump and not by ret: the address is another thread's, which the CPU's
stack of return addresses would mispredict each time; that is 10 instead of 27 ns per barrier.

Sanitizers have to be told before and after each switch, so their builds use no stubs.
-DHOST_UCONTEXT takes swapcontext in place of the assembly, as CPUs other than x86-64 do; it is 20
times slower.
*/
#pragma once
#include <pthread.h>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include "engine.h"

#if defined(__x86_64__) && !defined(HOST_UCONTEXT)
#define HOST_ASM_SWITCH
#if !defined(HOST_ASAN) && !defined(HOST_TSAN)
#define HOST_ASM_STUBS
#endif
#else
#include <ucontext.h>
#endif

#if defined(HOST_ASAN) || defined(HOST_TSAN)
static const size_t STACK_BYTES = 512 * 1024;
#else
static const size_t STACK_BYTES = 128 * 1024;
#endif
static const size_t GUARD_BYTES = 4096;

#ifdef HOST_ASAN
extern "C" void __sanitizer_start_switch_fiber(void** fake, const void* bottom, size_t size);
extern "C" void __sanitizer_finish_switch_fiber(void* fake, const void** bottom, size_t* size);
#endif

#ifdef HOST_TSAN
extern "C" void* __tsan_get_current_fiber(void);
extern "C" void* __tsan_create_fiber(unsigned flags);
extern "C" void __tsan_switch_to_fiber(void* fiber, unsigned flags);
extern "C" void __tsan_acquire(void* address);
extern "C" void __tsan_release(void* address);
static const bool TSAN = true;
#define TSAN_ACQUIRE(p) __tsan_acquire(p)
#define TSAN_RELEASE(p) __tsan_release(p)
// CUDA threads share the thread_local objects of their OS thread, and so whether those are made.
// Open MPI's TCP transport takes two of its locks in either order.
extern "C" const char* __tsan_default_suppressions(void) {
    return "race:^__tls_init$\ndeadlock:mca_btl_tcp_\n";
}
#else
static const bool TSAN = false;
#define TSAN_ACQUIRE(p) (void)(p)
#define TSAN_RELEASE(p) (void)(p)
#endif

struct HostFiber {
    void* sp;           // saved stack pointer; the assembly wants it first
    char* stack;        // lowest usable address; null: not made yet, or an OS thread's own
    size_t size;
    void* asan_fake;
    void* tsan;
    void* context;      // ucontext_t* where there is no assembly
    bool in_body;       // has a kernel's loop on it
};

struct HostSwitch {     // what an arrive function returns, in rax and rdx
    HostFiber *to, *from;
};

#ifdef HOST_ASM_SWITCH
extern "C" void host_fiber_switch(HostFiber* to, HostFiber* from);
asm(R"(
.text
.p2align 5
host_fiber_switch:
    movq %rdi,%rax
    movq %rsi,%rdx
host_switch_tail:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp,(%rdx)
    movq (%rax),%rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    popq %rcx
    jmp *%rcx
)");
#endif

#ifdef HOST_ASM_STUBS
asm(R"(
.macro HOST_STUB name
.globl host_\name\()_switch
.p2align 5
host_\name\()_switch:
    subq $8,%rsp
    call host_\name\()_arrive
    addq $8,%rsp
    testq %rax,%rax
    jnz host_switch_tail
    ret
.endm
HOST_STUB next
HOST_STUB barrier
HOST_STUB collective
)");
#endif

// The first switch to the fiber calls entry, which must not return.
static void fiber_init(HostFiber* f, unsigned index, void (*entry)(void)) {
    char* memory = (char*)mmap(NULL, GUARD_BYTES + STACK_BYTES, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == (char*)MAP_FAILED) host_error("no memory for the stack of a CUDA thread");
    mprotect(memory, GUARD_BYTES, PROT_NONE);
    f->stack = memory + GUARD_BYTES;
    f->size = STACK_BYTES;
    size_t offset = (index % 61) * 64;
#ifdef HOST_TSAN
    f->tsan = __tsan_create_fiber(0);
#endif
#ifdef HOST_ASM_SWITCH
    void** top = (void**)(f->stack + f->size - offset);
    void** sp = top - 8;        // at entry rsp is top - 8 bytes: 8 mod 16, as after a call
    sp[6] = (void*)entry;       // above six registers, which mmap left zero
    f->sp = sp;
#else
    ucontext_t* context = (ucontext_t*)calloc(1, sizeof(ucontext_t));
    getcontext(context);
    context->uc_stack.ss_sp = f->stack;
    context->uc_stack.ss_size = f->size - offset;
    makecontext(context, entry, 0);
    f->context = context;
#endif
}

// The fiber that the calling OS thread is.
static void fiber_init_own(HostFiber* f) {
#ifdef HOST_ASAN
    pthread_attr_t attr;
    void* stack;
    pthread_getattr_np(pthread_self(), &attr);
    pthread_attr_getstack(&attr, &stack, &f->size);
    pthread_attr_destroy(&attr);
    f->stack = (char*)stack;
#endif
#ifdef HOST_TSAN
    f->tsan = __tsan_get_current_fiber();
#endif
#ifndef HOST_ASM_SWITCH
    f->context = calloc(1, sizeof(ucontext_t));
#endif
    (void)f;
}

HOST_NOSAN static inline void fiber_switch(HostFiber* from, HostFiber* to) {
#ifdef HOST_ASAN
    __sanitizer_start_switch_fiber(&from->asan_fake, to->stack, to->size);
#endif
#ifdef HOST_TSAN
    __tsan_switch_to_fiber(to->tsan, 1);    // 1: no happens-before edge, the engine makes its own
#endif
#ifdef HOST_ASM_SWITCH
    host_fiber_switch(to, from);
#else
    swapcontext((ucontext_t*)from->context, (ucontext_t*)to->context);
#endif
#ifdef HOST_ASAN
    __sanitizer_finish_switch_fiber(from->asan_fake, NULL, NULL);
#endif
}

// To be called first by a fiber's entry.
HOST_NOSAN static inline void fiber_entered(void) {
#ifdef HOST_ASAN
    __sanitizer_finish_switch_fiber(NULL, NULL, NULL);
#endif
}
