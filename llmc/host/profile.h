/*
Wall time by kernel; included by engine.cpp alone. HOST_PROFILE=1 prints it when the program ends.
What is measured is the launching thread's wait for the kernel, all workers' work included.
*/
#pragma once
#include <time.h>
#include <cstdio>

static const int MAX_PROFILE_ROWS = 512;
static HostProfileRow profile_table[MAX_PROFILE_ROWS];
static int profile_count;
static bool profile_known, profiling;
static double profile_start;

static double profile_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

void host_profile(bool on) {
    profile_known = true;
    profiling = on;
    if (on) {
        profile_count = 0;
        profile_start = profile_now();
    }
}

double host_profile_begin(void) {
    if (!profile_known) {
        const char* text = getenv("HOST_PROFILE");
        host_profile(text && *text && strcmp(text, "0"));
        if (profiling) atexit([] { host_profile_print(stderr); });
    }
    return profiling ? profile_now() : 0;
}

void host_profile_end(const char* name, double begin) {
    if (begin == 0) return;
    int i = 0;
    while (i < profile_count && strcmp(profile_table[i].name, name)) i++;
    if (i == MAX_PROFILE_ROWS) host_error("profile: more than %d kernels", MAX_PROFILE_ROWS);
    HostProfileRow* row = &profile_table[i];
    if (i == profile_count) {
        *row = HostProfileRow{};
        snprintf(row->name, sizeof(row->name), "%s", name);
        profile_count++;
    }
    row->calls++;
    row->seconds += profile_now() - begin;
}

int host_profile_rows(const HostProfileRow** rows) {
    qsort(profile_table, (size_t)profile_count, sizeof(HostProfileRow),
          [](const void* a, const void* b) {
              const HostProfileRow *x = (const HostProfileRow*)a, *y = (const HostProfileRow*)b;
              return (x->seconds < y->seconds) - (x->seconds > y->seconds);
          });
    *rows = profile_table;
    return profile_count;
}

void host_profile_print(FILE* out) {
    const HostProfileRow* rows;
    int count = host_profile_rows(&rows);
    double wall = profile_now() - profile_start, inside = 0;
    for (int i = 0; i < count; i++) inside += rows[i].seconds;
    fprintf(out, "%10s %6s %9s %10s  %s\n", "seconds", "share", "calls", "us/call", "kernel");
    for (int i = 0; i < count; i++) {
        const HostProfileRow* r = &rows[i];
        fprintf(out, "%10.3f %5.1f%% %9ld %10.1f  %s\n", r->seconds, 100 * r->seconds / wall,
                r->calls, 1e6 * r->seconds / (double)r->calls, r->name);
    }
    fprintf(out, "%10.3f %5.1f%% %9s %10s  outside kernels\n%10.3f\n", wall - inside,
            100 * (wall - inside) / wall, "", "", wall);
}
