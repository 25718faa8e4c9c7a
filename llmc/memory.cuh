/*
Device memory of the program: every allocation comes through here and is booked under a name, so
that the table printed at the start is the truth, and --dry-run can count without taking.

test        test/test_model.cu: memory; test/full_size.sh compares the table with the process
*/
#pragma once
#include "device.cuh"

enum { MAX_MEMORY_KINDS = 32, MAX_ALLOCATIONS = 2048 };

typedef struct Memory {
    const char* name[MAX_MEMORY_KINDS];
    size_t bytes[MAX_MEMORY_KINDS];     // of each kind
    int kinds;
    bool dry;                           // count only
    void* allocation[MAX_ALLOCATIONS];
    int allocations;
} Memory;

static const double GIB = 1073741824.0;

static inline void memory_count(Memory* memory, const char* name, size_t bytes) {
    int i = 0;
    while (i < memory->kinds && strcmp(memory->name[i], name) != 0) i++;
    if (i == memory->kinds) {
        REQUIRE(i < MAX_MEMORY_KINDS, "more than %d kinds of memory", MAX_MEMORY_KINDS);
        memory->name[i] = name;
        memory->bytes[i] = 0;
        memory->kinds++;
    }
    memory->bytes[i] += bytes;
}

static inline size_t memory_total(const Memory* memory) {
    size_t total = 0;
    for (int i = 0; i < memory->kinds; i++) total += memory->bytes[i];
    return total;
}

// NULL for no bytes, and in a dry run. `name` must outlive the table.
static inline void* memory_take(Memory* memory, const char* name, size_t bytes) {
    memory_count(memory, name, bytes);
    if (bytes == 0 || memory->dry) return NULL;
    REQUIRE(memory->allocations < MAX_ALLOCATIONS, "more than %d device allocations",
            MAX_ALLOCATIONS);
    void* p = NULL;
    if (cudaMalloc(&p, bytes) != cudaSuccess) {
        size_t free_bytes = 0, total_bytes = 0;
        cudaMemGetInfo(&free_bytes, &total_bytes);
        die("out of memory: %s need %.2f GiB more, %.2f of %.2f GiB are free\n"
            "try a smaller --micro-batch; --dry-run prints the whole table",
            name, bytes / GIB, free_bytes / GIB, total_bytes / GIB);
    }
    memory->allocation[memory->allocations++] = p;
    return p;
}

static inline void memory_free(Memory* memory) {
    for (int i = 0; i < memory->allocations; i++) CUDA_CHECK(cudaFree(memory->allocation[i]));
    memory->allocations = 0;
}
