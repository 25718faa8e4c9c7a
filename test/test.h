/*
The harness of every test program: named checks, counters, inputs that repeat.

    int main(int argc, char** argv) {
        test_init(argc, argv);                     // [filter ...] [--verbose]
        if (test_group("rmsnorm")) test_rmsnorm(); // skipped unless the name contains a filter
        return test_summary();                     // `N passed, N failed`, the exit status
    }

A check compares an error with what is allowed and passes only if the error is at most that: the
comparison is written !(err <= tol), so a NaN fails. Failures are always printed; what passes is
printed under --verbose, and otherwise counted in one line per group.

Random numbers are a pure function of (seed, index), so a case does not depend on those before it
nor on the order in which its arrays are filled. Values go through floatX first (float or bf16,
after the build's PRECISION): kernel and oracle then read equal inputs, and the difference measured
is the kernel's own rounding.

Plain C and C++; the last section needs llmc/device.cuh to be included before.
*/
#pragma once
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>


typedef struct {
    int passed, failed, skipped;         // of the program
    int group_passed, group_failed;      // since the last test_group
    double group_worst;                  // largest error of the group as a fraction of what is allowed
    char group[64];
    const char* filters[8];              // none: everything
    int filter_count;
    bool verbose;
} TestState;

static TestState test_state;

// ---- checks ----------------------------------------------------------------------------------

static inline void test_group_end(void) {
    TestState* s = &test_state;
    if (s->group[0] && s->group_failed == 0 && s->group_passed > 0) {
        printf("ok    %-18s %4d checks, largest error %.2f of allowed\n", s->group,
               s->group_passed, s->group_worst);
    } else if (s->group[0] && s->group_failed > 0) {
        printf("FAIL  %-18s %4d of %d checks failed\n", s->group, s->group_failed,
               s->group_failed + s->group_passed);
    }
    s->group[0] = 0;
    s->group_passed = s->group_failed = 0;
    s->group_worst = 0;
    fflush(stdout);
}

// Ends the group before and says whether this one is wanted.
static inline bool test_group(const char* name) {
    test_group_end();
    bool wanted = test_state.filter_count == 0;
    for (int i = 0; i < test_state.filter_count; i++)
        wanted = wanted || strstr(name, test_state.filters[i]);
    if (!wanted) return false;
    snprintf(test_state.group, sizeof test_state.group, "%s", name);
    return true;
}

static inline bool test_record(bool ok, double fraction) {
    TestState* s = &test_state;
    if (ok) {
        s->passed++, s->group_passed++;
        if (fraction > s->group_worst) s->group_worst = fraction;
    } else {
        s->failed++, s->group_failed++;
    }
    return ok;
}

// err: what was measured; tol: the largest value allowed. tol 0 asks for exactness.
static inline bool test_check(const char* what, double err, double tol) {
    bool ok = err <= tol;                  // false for a NaN
    double fraction = tol > 0 ? err / tol : 0;
    test_record(ok, fraction);
    if (!ok) {
        printf("FAIL  %s: error %.3g, allowed %.3g\n", what, err, tol);
    } else if (test_state.verbose) {
        printf("ok    %-60s max error %.2f of allowed\n", what, fraction);
    }
    return ok;
}

static inline bool test_true(const char* what, bool condition) {
    test_record(condition, 0);
    if (!condition) {
        printf("FAIL  %s\n", what);
    } else if (test_state.verbose) {
        printf("ok    %s\n", what);
    }
    return condition;
}

static inline void test_skip(const char* what, const char* why) {
    test_state.skipped++;
    printf("skip  %s: %s\n", what, why);
}

// Element i may be off by abs_tol + rel_tol |want[i]|. Where a NaN is wanted a NaN must be found.
// Reports the element whose error is the largest fraction of what it is allowed.
static inline bool test_compare(const char* name, const float* got, const double* want, size_t n,
                          double abs_tol, double rel_tol) {
    size_t worst = 0, wrong = 0;
    double worst_fraction = -1;
    for (size_t i = 0; i < n; i++) {
        double allowed = abs_tol + rel_tol * fabs(want[i]), err = fabs((double)got[i] - want[i]);
        if (isnan(want[i])) {
            err = isnan(got[i]) ? 0 : INFINITY, allowed = 0;
        } else if ((double)got[i] == want[i]) {
            err = 0;                         // equal infinities
        }
        bool ok = err <= allowed;
        double fraction = err == 0 ? 0 : err / allowed;
        if (isnan(fraction)) fraction = INFINITY;
        if (!ok) wrong++;
        if (fraction > worst_fraction) worst_fraction = fraction, worst = i;
    }
    bool ok = wrong == 0;
    test_record(ok, worst_fraction < 0 ? 0 : worst_fraction);
    if (!ok) {
        printf("FAIL  %s: %zu of %zu differ; worst [%zu] got %.9g want %.9g allowed %.3g\n", name,
               wrong, n, worst, got[worst], want[worst], abs_tol + rel_tol * fabs(want[worst]));
    } else if (test_state.verbose) {
        printf("ok    %-60s max error %.2f of allowed\n", name, worst_fraction < 0 ? 0 : worst_fraction);
    }
    return ok;
}

static inline bool test_compare_double(const char* name, const double* got, const double* want, size_t n,
                                 double abs_tol, double rel_tol) {
    size_t worst = 0, wrong = 0;
    double worst_fraction = 0;
    for (size_t i = 0; i < n; i++) {
        double allowed = abs_tol + rel_tol * fabs(want[i]), err = fabs(got[i] - want[i]);
        double fraction = err == 0 ? 0 : err / allowed;
        if (!(err <= allowed)) wrong++;
        if (!(fraction <= worst_fraction)) worst_fraction = fraction, worst = i;
    }
    bool ok = wrong == 0;
    test_record(ok, worst_fraction);
    if (!ok) {
        printf("FAIL  %s: %zu of %zu differ; worst [%zu] got %.12g want %.12g allowed %.3g\n", name,
               wrong, n, worst, got[worst], want[worst], abs_tol + rel_tol * fabs(want[worst]));
    } else if (test_state.verbose) {
        printf("ok    %-60s max error %.2f of allowed\n", name, worst_fraction);
    }
    return ok;
}

// Equal bits: a second run, another order of threads, an untouched neighbour.
static inline bool test_same_bits(const char* name, const void* a, const void* b, size_t bytes) {
    size_t differ = 0, first = 0;
    for (size_t i = bytes; i-- > 0;) {
        if (((const unsigned char*)a)[i] != ((const unsigned char*)b)[i]) differ++, first = i;
    }
    test_record(differ == 0, 0);
    if (differ) {
        printf("FAIL  %s: %zu of %zu bytes differ, the first at %zu\n", name, differ, bytes, first);
    } else if (test_state.verbose) {
        printf("ok    %-60s equal bits\n", name);
    }
    return differ == 0;
}

// ---- program ---------------------------------------------------------------------------------

static inline void test_init(int argc, char** argv) {
    memset(&test_state, 0, sizeof test_state);
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--verbose") || !strcmp(argv[i], "-v")) {
            test_state.verbose = true;
        } else if (argv[i][0] == '-') {
            fprintf(stderr, "usage: %s [part of a group's name] [--verbose]\n", argv[0]);
            exit(2);
        } else {
            if (test_state.filter_count == 8) exit(fprintf(stderr, "more than 8 filters\n"));
            test_state.filters[test_state.filter_count++] = argv[i];
        }
    }
}

// A filter that matches nothing is an error: zero checks prove nothing.
static inline int test_summary(void) {
    test_group_end();
    TestState* s = &test_state;
    if (s->passed + s->failed + s->skipped == 0) {
        printf("FAIL  no check was run%s%s\n", s->filter_count ? ", no group is named like " : "",
               s->filter_count ? s->filters[0] : "");
        s->failed = 1;
    }
    printf("%d passed, %d failed", s->passed, s->failed);
    if (s->skipped) printf(", %d skipped", s->skipped);
    printf("\n");
    return s->failed ? 1 : 0;
}

// ---- numbers ---------------------------------------------------------------------------------

static inline void* test_calloc(size_t n, size_t size) {
    void* p = calloc(n ? n : 1, size);
    if (!p) {
        fprintf(stderr, "test: no memory for %zu items of %zu bytes\n", n, size);
        exit(1);
    }
    return p;
}

static inline double* test_doubles(size_t n) {
    return (double*)test_calloc(n, sizeof(double));
}

static inline float* test_floats(size_t n) {
    return (float*)test_calloc(n, sizeof(float));
}

// splitmix64 (Steele, Lea, Flood 2014) of a counter that starts at a hash of the seed.
static inline uint64_t test_mix_bits(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

static inline uint64_t test_random(uint64_t seed, uint64_t i) {
    return test_mix_bits(test_mix_bits(seed + 0x9e3779b97f4a7c15ull) + i * 0x9e3779b97f4a7c15ull);
}

// [0, 1)
static inline double test_uniform(uint64_t seed, uint64_t i) {
    return (double)(test_random(seed, i) >> 11) * 0x1p-53;
}

// N(0, 1), Box and Muller
static inline double test_normal(uint64_t seed, uint64_t i) {
    double u = 1.0 - test_uniform(seed, 2 * i), w = test_uniform(seed, 2 * i + 1);
    return sqrt(-2.0 * log(u)) * cos(6.283185307179586 * w);
}

static inline float test_round_bf16(double x) {
    float f = (float)x;
    uint32_t u;
    memcpy(&u, &f, 4);
    if (f == f) u = (u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u;
    memcpy(&f, &u, 4);
    return f;
}

#if defined(PRECISION_BF16)
#define TEST_EPS 0x1p-8     // half a unit in the last place of floatX, relative
#define TEST_PRECISION "bf16"
#else
#define TEST_EPS 0x1p-24
#define TEST_PRECISION "fp32"
#endif

// The nearest value that floatX holds.
static inline double test_round(double x) {
#if defined(PRECISION_BF16)
    return test_round_bf16(x);
#else
    return (float)x;
#endif
}

// scale N(0, 1), rounded to floatX
static inline void test_fill_normal(double* x, size_t n, uint64_t seed, double scale) {
    for (size_t i = 0; i < n; i++) x[i] = test_round(scale * test_normal(seed, i));
}

// scale N(0, 1), rounded to float: what is float in both precisions
static inline void test_fill_normal_float(double* x, size_t n, uint64_t seed, double scale) {
    for (size_t i = 0; i < n; i++) x[i] = (float)(scale * test_normal(seed, i));
}

// uniform in [low, high), rounded to floatX
static inline void test_fill_uniform(double* x, size_t n, uint64_t seed, double low, double high) {
    for (size_t i = 0; i < n; i++) x[i] = test_round(low + (high - low) * test_uniform(seed, i));
}

// whole numbers in [low, high]: sums and products of small ones are exact in every precision
static inline void test_fill_whole(double* x, size_t n, uint64_t seed, int low, int high) {
    for (size_t i = 0; i < n; i++) {
        x[i] = low + (int)(test_random(seed, i) % (uint64_t)(high - low + 1));
    }
}

static inline void test_fill_tokens(int* x, size_t n, uint64_t seed, int V) {
    for (size_t i = 0; i < n; i++) x[i] = (int)(test_random(seed, i) % (uint64_t)V);
}

// ---- files of a test -------------------------------------------------------------------------

static char test_folder[256];        // where test_path puts them; the program makes and removes it

// Good until the eighth call after it.
static inline const char* test_path(const char* name) {
    static char paths[8][512];
    static int turn;
    char* path = paths[turn++ % 8];
    snprintf(path, sizeof paths[0], "%s/%s", test_folder, name);
    return path;
}

static inline void test_write_file(const char* path, const void* bytes, size_t n) {
    FILE* file = fopen(path, "wb");
    if (file && fwrite(bytes, 1, n, file) == n && fclose(file) == 0) return;
    fprintf(stderr, "%s cannot be written\n", path);
    exit(1);
}

// ---- device arrays ---------------------------------------------------------------------------

#ifdef CUDA_CHECK

// Where there is no GPU the tests of kernels are skipped, and counted as skipped, never as passed.
static inline bool test_has_device(void) {
    int count = 0;
    if (cudaGetDeviceCount(&count) == cudaSuccess && count > 0) return true;
    test_skip("all", "there is no CUDA device");
    return false;
}

// Between float and what the host sees of floatX; device.cuh's own conversions run on the device only.
static inline float test_from_floatX(const floatX* p) {
    uint32_t bits = 0;
    memcpy((char*)&bits + 4 - sizeof(floatX), p, sizeof(floatX));     // bf16: the upper half
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline void test_to_floatX(floatX* p, double x) {
    float rounded = (float)test_round(x);
    memcpy((void*)p, (char*)&rounded + 4 - sizeof(floatX), sizeof(floatX));
}

static inline floatX* test_device(size_t n) {
    floatX* d;
    CUDA_CHECK(cudaMalloc((void**)&d, n * sizeof(floatX)));
    return d;
}

static inline float* test_device_float(size_t n) {
    float* d;
    CUDA_CHECK(cudaMalloc((void**)&d, n * sizeof(float)));
    return d;
}

static inline void test_put(floatX* d, const double* x, size_t n) {
    floatX* h = (floatX*)test_calloc(n, sizeof(floatX));
    for (size_t i = 0; i < n; i++) test_to_floatX(&h[i], x[i]);
    CUDA_CHECK(cudaMemcpy(d, h, n * sizeof(floatX), cudaMemcpyHostToDevice));
    free(h);
}

static inline void test_put_float(float* d, const double* x, size_t n) {
    float* h = test_floats(n);
    for (size_t i = 0; i < n; i++) h[i] = (float)x[i];
    CUDA_CHECK(cudaMemcpy(d, h, n * sizeof(float), cudaMemcpyHostToDevice));
    free(h);
}

// A device copy of x; the caller frees it with cudaFree.
static inline floatX* test_upload(const double* x, size_t n) {
    floatX* d = test_device(n);
    test_put(d, x, n);
    return d;
}

static inline float* test_upload_float(const double* x, size_t n) {
    float* d = test_device_float(n);
    test_put_float(d, x, n);
    return d;
}

static inline int* test_upload_int(const int* x, size_t n) {
    int* d;
    CUDA_CHECK(cudaMalloc((void**)&d, n * sizeof(int)));
    CUDA_CHECK(cudaMemcpy(d, x, n * sizeof(int), cudaMemcpyHostToDevice));
    return d;
}

// A host copy as float; the caller frees it. Waits for the whole device.
static inline float* test_download(const floatX* d, size_t n) {
    CUDA_CHECK(cudaDeviceSynchronize());
    floatX* h = (floatX*)test_calloc(n, sizeof(floatX));
    float* x = test_floats(n);
    CUDA_CHECK(cudaMemcpy(h, d, n * sizeof(floatX), cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < n; i++) x[i] = test_from_floatX(&h[i]);
    free(h);
    return x;
}

static inline float* test_download_float(const float* d, size_t n) {
    CUDA_CHECK(cudaDeviceSynchronize());
    float* x = test_floats(n);
    CUDA_CHECK(cudaMemcpy(x, d, n * sizeof(float), cudaMemcpyDeviceToHost));
    return x;
}

// Downloads, compares, frees the copy.
static inline bool test_compare_device(const char* name, const floatX* d, const double* want, size_t n,
                                 double abs_tol, double rel_tol) {
    float* got = test_download(d, n);
    bool ok = test_compare(name, got, want, n, abs_tol, rel_tol);
    free(got);
    return ok;
}

static inline bool test_compare_device_float(const char* name, const float* d, const double* want,
                                       size_t n, double abs_tol, double rel_tol) {
    float* got = test_download_float(d, n);
    bool ok = test_compare(name, got, want, n, abs_tol, rel_tol);
    free(got);
    return ok;
}

#endif
