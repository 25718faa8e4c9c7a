/*
attention: llmc/attention.cuh against oracle.h and golden files.

Every element has its own bound, from the errors that the kernels' roundings may cause, first
order, with u = 2^-24 and e the rounding of floatX (inputs are rounded before, and carry none):

    score         u (2 √D + 8) scale Σ|q k|: a sum of D products, taken as a random walk
    p             η = error of its score + 2 u (|score| + |lse|) + 4e-7 (exp2), relative; e more
                  where p is rounded to be multiplied
    out           Σ p (2 η + e) |v|, and (e + 16 u) |out| for the sum, its division and the store
    lse           η + 4 u |lse|
    delta         Σ|dout| error(out), and 16 u Σ|dout out|
    dp            u (2 √D + 4) Σ|dout v|
    ds            |ds| (e + 2 η) + p (error(dp) + error(delta))
    dv, dq, dk    the sums of p and ds with these errors, and (e + 4 u √T) of the sum of magnitudes

What a mask hides is not in these sums. Besides, every case compares what the kernels counted on the
host with the tiles that cannot be done without: hidden ones are neither loaded nor computed.
*/
#pragma once
#include <sys/mman.h>
#include "../llmc/attention.cuh"
#include "../llmc/safetensors.h"
#include "oracle.h"
#include "test.h"

// Who sees whom, made by attention_bounds and checked there against the definition.
typedef struct {
    int *first, *last;                   // (B, T)
    uint8_t* seen;                       // (B, T, T): 1 where the query of the row sees the key
} AttentionMask;

typedef struct {
    int B, T, H, D;
    double scale;
    const AttentionMask* mask;           // NULL: causal
} AttentionCase;

// Builds in which a kernel takes ten or a hundred times as long run fewer sizes of the same.
#if defined(HOST_TSAN)
static const bool test_attention_slow = true, test_attention_very_slow = true;
#elif defined(HOST_ASAN) || defined(PRECISION_BF16)
static const bool test_attention_slow = true, test_attention_very_slow = false;
#else
static const bool test_attention_slow = false, test_attention_very_slow = false;
#endif

static bool test_attention_sees(const AttentionCase* c, int batch, int query, int key) {
    if (!c->mask) return key <= query;
    return c->mask->seen[((size_t)batch * c->T + query) * c->T + key];
}

// All tensors are (B, T, H, D) here; lse is (B, H, T).
typedef struct {
    double *out, *lse, *dq, *dk, *dv;
} AttentionResult;

static AttentionResult test_attention_alloc(const AttentionCase* k) {
    size_t rows = (size_t)k->B * k->T * k->H, n = rows * k->D;
    AttentionResult r = {test_doubles(n), test_doubles(rows), test_doubles(n), test_doubles(n),
                         test_doubles(n)};
    return r;
}

static void test_attention_free(AttentionResult* r) {
    free(r->out), free(r->lse), free(r->dq), free(r->dk), free(r->dv);
}

static double test_attention_dot(const double* x, const double* y, int D, bool magnitudes) {
    double sum = 0;
    for (int d = 0; d < D; d++) sum += magnitudes ? fabs(x[d] * y[d]) : x[d] * y[d];
    return sum;
}

// What each element of the result may be off by; see the head of the file.
static AttentionResult test_attention_bounds(const AttentionCase* c, const AttentionResult* want,
                                             const double* q, const double* k, const double* v,
                                             const double* dout) {
    const double u = 0x1p-24, e = FLOATX_IS_BF16 ? TEST_EPS : 0;
    const int T = c->T, H = c->H, D = c->D;
    const double walk = u * (2 * sqrt(D) + 8), sum = TEST_EPS + 4 * u * sqrt(T);
    AttentionResult b = test_attention_alloc(c);
    double *p = test_doubles(T), *dp = test_doubles(T), *dp_error = test_doubles(T);
    for (int row = 0; row < c->B * T * H; row++) {
        int h = row % H, t = row / H % T, batch = row / H / T;
        double lse = want->lse[((size_t)batch * H + h) * T + t], eta = 0, delta = 0,
               delta_error = 0;
        size_t at = (size_t)row * D;
        for (int j = 0; j <= t; j++) {
            size_t to = ((size_t)(batch * T + j) * H + h) * D;
            p[j] = dp[j] = dp_error[j] = 0;
            if (!test_attention_sees(c, batch, t, j)) continue;
            double score = c->scale * test_attention_dot(q + at, k + to, D, false);
            double error = walk * c->scale * test_attention_dot(q + at, k + to, D, true) +
                           2 * u * (fabs(score) + fabs(lse)) + 4e-7;
            p[j] = exp(score - lse);
            dp[j] = test_attention_dot(dout + at, v + to, D, false);
            dp_error[j] = walk * test_attention_dot(dout + at, v + to, D, true);
            // a score that is far below the largest may be off by more: its p is nothing
            if (p[j] > 1e-9 && error > eta) eta = error;
        }
        b.lse[((size_t)batch * H + h) * T + t] = eta + 4 * u * fabs(lse);
        for (int d = 0; d < D; d++) {
            for (int j = 0; j <= t; j++) {
                size_t to = ((size_t)(batch * T + j) * H + h) * D;
                b.out[at + d] += p[j] * (2 * eta + e) * fabs(v[to + d]);
            }
            b.out[at + d] += (TEST_EPS + 16 * u) * fabs(want->out[at + d]) + 1e-9;
            delta += dout[at + d] * want->out[at + d];
            delta_error += fabs(dout[at + d]) * (b.out[at + d] + 16 * u * fabs(want->out[at + d]));
        }
        for (int j = 0; j <= t; j++) {
            size_t to = ((size_t)(batch * T + j) * H + h) * D;
            double ds = p[j] * (dp[j] - delta);
            double error = fabs(ds) * (e + 2 * eta) + p[j] * (dp_error[j] + delta_error) + 1e-9;
            if (!test_attention_sees(c, batch, t, j)) continue;
            for (int d = 0; d < D; d++) {
                b.dv[to + d] += p[j] * (2 * eta + e + sum) * fabs(dout[at + d]) + 1e-9;
                b.dq[at + d] += c->scale * (error + sum * fabs(ds)) * fabs(k[to + d]);
                b.dk[to + d] += c->scale * (error + sum * fabs(ds)) * fabs(q[at + d]);
            }
        }
    }
    free(p), free(dp), free(dp_error);
    return b;
}

// ---- running the kernels -------------------------------------------------------------------

enum { ATTENTION_PAD = 8 };      // columns beside the gradients, which have to stay as they are

#ifdef __CUDACC__
typedef int AttentionWork;               // counted on the host only
static AttentionWork attention_work;
#endif

typedef struct {
    float *out, *lse, *gradient;         // gradient: rows of 3C + ATTENTION_PAD
    size_t n, rows, wide;
    AttentionWork forward, backward;
} AttentionRun;

static AttentionWork test_attention_work(void) {
    CUDA_CHECK(cudaDeviceSynchronize());
    AttentionWork work = attention_work;
    memset(&attention_work, 0, sizeof attention_work);
    return work;
}

static void test_attention_run_free(AttentionRun* r) {
    free(r->out), free(r->lse), free(r->gradient);
}

// q, k and v interleaved in rows of 3C, as the trainer has them.
static AttentionRun test_attention_run(const AttentionCase* c, const double* q, const double* k,
                                       const double* v, const double* dout) {
    int N = c->B * c->T, C = c->H * c->D, ld = 3 * C, ldd = 3 * C + ATTENTION_PAD;
    AttentionRun r = {};
    r.n = (size_t)N * C, r.rows = (size_t)N * c->H, r.wide = (size_t)N * ldd;
    double *qkv = test_doubles((size_t)N * ld), *fill = test_doubles(r.wide);
    for (size_t i = 0; i < r.n; i++) {
        double* row = qkv + i / C * ld + i % C;
        row[0] = q[i], row[C] = k[i], row[2 * C] = v[i];
    }
    for (size_t i = 0; i < r.wide; i++) fill[i] = 77;
    floatX *qkv_d = test_upload(qkv, (size_t)N * ld), *dout_d = test_upload(dout, r.n);
    floatX *out_d = test_device(r.n), *gradient_d = test_upload(fill, r.wide);
    float *lse_d = test_device_float(r.rows), *delta_d = test_device_float(r.rows);
    int* first_d = c->mask ? test_upload_int(c->mask->first, N) : NULL;
    int* last_d = c->mask ? test_upload_int(c->mask->last, N) : NULL;
    test_attention_work();
    attention_forward(out_d, lse_d, qkv_d, qkv_d + C, qkv_d + 2 * C, first_d, c->B, c->T, c->H,
                      c->D, ld, ld, (float)c->scale, 0, 0);
    r.forward = test_attention_work();
    attention_backward(gradient_d, gradient_d + C, gradient_d + 2 * C, delta_d, dout_d, out_d,
                       lse_d, qkv_d, qkv_d + C, qkv_d + 2 * C, first_d, last_d, c->B, c->T, c->H,
                       c->D, ld, ld, ldd, ldd, (float)c->scale, 0);
    r.backward = test_attention_work();
    r.out = test_download(out_d, r.n);
    r.lse = test_download_float(lse_d, r.rows);
    r.gradient = test_download(gradient_d, r.wide);
    free(qkv), free(fill);
    cudaFree(qkv_d), cudaFree(dout_d), cudaFree(out_d), cudaFree(gradient_d), cudaFree(lse_d);
    cudaFree(delta_d), cudaFree(first_d), cudaFree(last_d);
    return r;
}

// Element i of (B, T, H, D) in the gradient's rows; part 0, 1, 2: dq, dk, dv.
static float test_attention_gradient(const AttentionRun* r, const AttentionCase* c, int part,
                                     size_t i) {
    int C = c->H * c->D;
    return r->gradient[i / C * (3 * C + ATTENTION_PAD) + part * C + i % C];
}

// The largest error as a fraction of the element's bound.
static double test_attention_worst(const double* got, const double* want, const double* bound,
                                   size_t n) {
    double worst = 0;
    for (size_t i = 0; i < n; i++) {
        double fraction = fabs(got[i] - want[i]) / bound[i];
        if (got[i] != want[i] && !(fraction <= worst)) worst = fraction;
        if (isnan(worst)) return INFINITY;
    }
    return worst;
}

static void test_attention_compare(const char* label, const AttentionCase* c, const AttentionRun* r,
                                   const AttentionResult* want, const AttentionResult* bound) {
    const char* names[5] = {"dq", "dk", "dv", "out", "lse"};
    const double* wants[5] = {want->dq, want->dk, want->dv, want->out, want->lse};
    const double* bounds[5] = {bound->dq, bound->dk, bound->dv, bound->out, bound->lse};
    double* got = test_doubles(r->n);
    for (int part = 0; part < 5; part++) {
        size_t n = part < 4 ? r->n : r->rows;
        for (size_t i = 0; i < n; i++) {
            got[i] = part < 3    ? test_attention_gradient(r, c, part, i)
                     : part == 3 ? r->out[i]
                                 : r->lse[i];
        }
        char what[128];
        snprintf(what, sizeof what, "attention %s %s B=%d T=%d H=%d D=%d", names[part], label, c->B,
                 c->T, c->H, c->D);
        test_check(what, test_attention_worst(got, wants[part], bounds[part], n), 1);
    }
    bool untouched = true;
    int width = 3 * c->H * c->D + ATTENTION_PAD;
    for (size_t i = 0; i < r->wide; i++) {
        if ((int)(i % width) >= width - ATTENTION_PAD && r->gradient[i] != 77) untouched = false;
    }
    test_true("attention_backward leaves what lies beside alone", untouched);
    free(got);
}

static void test_attention_same(const char* name, const AttentionRun* a, const AttentionRun* b) {
    char what[96];
    snprintf(what, sizeof what, "attention %s: out", name);
    test_same_bits(what, a->out, b->out, a->n * sizeof(float));
    snprintf(what, sizeof what, "attention %s: lse", name);
    test_same_bits(what, a->lse, b->lse, a->rows * sizeof(float));
    snprintf(what, sizeof what, "attention %s: gradients", name);
    test_same_bits(what, a->gradient, b->gradient, a->wide * sizeof(float));
}

// ---- masks ---------------------------------------------------------------------------------

// What `query` sees by definition: not the future, not another document, and not beyond the window,
// in tokens (block 1) or in blocks of positions, of which its own counts.
static bool test_attention_defined(const int* document, int query, int key, int window, int block) {
    if (key > query || document[key] != document[query]) return false;
    if (block == 1) return query - key <= window;
    return query / block - key / block < (window > 1 ? window : 1);
}

static void test_attention_mask_free(AttentionMask* m) {
    free(m->first), free(m->last), free(m->seen);
}

// The mask as a kernel makes it and as it is defined. cu_seqlens NULL: a row is one document.
static AttentionMask test_attention_mask(const int* cu_seqlens, int cu_count, int B, int T,
                                         int window, int block) {
    int N = B * T, wrong = 0;
    AttentionMask m = {(int*)test_calloc(N, sizeof(int)), (int*)test_calloc(N, sizeof(int)),
                       (uint8_t*)test_calloc((size_t)N * T, 1)};
    int* document = (int*)test_calloc(N, sizeof(int));
    for (int n = 0; n < N; n++) {
        document[n] = n / T * (cu_count + 1);
        for (int i = 0; i < cu_count && cu_seqlens; i++) document[n] += cu_seqlens[i] <= n;
    }
    int* cu_d = cu_seqlens ? test_upload_int(cu_seqlens, cu_count) : NULL;
    int *first_d = test_upload_int(m.first, N), *last_d = test_upload_int(m.last, N);
    attention_bounds(first_d, last_d, cu_d, cu_count, B, T, window, block, 0);
    CUDA_CHECK(cudaMemcpy(m.first, first_d, N * sizeof(int), cudaMemcpyDeviceToHost));
    CUDA_CHECK(cudaMemcpy(m.last, last_d, N * sizeof(int), cudaMemcpyDeviceToHost));
    for (int b = 0; b < B; b++) {
        const int *first = m.first + b * T, *last = m.last + b * T;
        for (int q = 0; q < T; q++) {
            for (int k = 0; k < T; k++) {
                bool sees = test_attention_defined(document + b * T, q, k, window, block);
                m.seen[((size_t)b * T + q) * T + k] = sees;
                wrong += sees != (first[q] <= k && k <= q);
                wrong += sees != (k <= q && q <= last[k]);
            }
        }
    }
    char what[128];
    snprintf(what, sizeof what, "attention_bounds B=%d T=%d window=%d block=%d, %d ends", B, T,
             window, block, cu_count);
    test_check(what, wrong, 0);
    cudaFree(cu_d), cudaFree(first_d), cudaFree(last_d);
    free(document);
    return m;
}

// ---- tiles ---------------------------------------------------------------------------------

#ifndef __CUDACC__

// The tiles that a kernel cannot do without, from the mask pair by pair. A block of four warps has
// 4 warp_rows rows, a step of it one tile of columns; where no row of the block sees any column
// there has to be no step. In a step a warp may see nothing, a part, or all: keys beyond T have to
// be hidden, queries beyond T do not matter.
static AttentionWork test_attention_least(const AttentionCase* c, bool key_rows, int warp_rows,
                                          int columns) {
    AttentionWork work = {};
    int T = c->T, block_rows = ATTENTION_WARPS * warp_rows;
    for (int batch = 0; batch < c->B; batch++) {
        for (int block = 0; block < T; block += block_rows) {
            for (int column = 0; column < T; column += columns) {
                AttentionView views[ATTENTION_WARPS];
                bool step = false;
                for (int w = 0; w < ATTENTION_WARPS; w++) {
                    int some = 0, hidden = 0;
                    for (int i = 0; i < warp_rows * columns; i++) {
                        int r = block + w * warp_rows + i / columns, s = column + i % columns;
                        int query = key_rows ? s : r, key = key_rows ? r : s;
                        if (query >= T) continue;
                        bool sees = key < T && test_attention_sees(c, batch, query, key);
                        some += sees, hidden += !sees;
                    }
                    views[w] = !some ? VIEW_NONE : hidden ? VIEW_PART : VIEW_ALL;
                    step = step || some;
                }
                for (int w = 0; w < ATTENTION_WARPS && step; w++) {
                    work.views[key_rows][views[w]] += c->H;
                }
                work.tiles += step ? 2 * c->H : 0;         // K and V, or Q and dO
            }
            work.tiles += (key_rows ? 2 : 1) * c->H;       // the block's own; dQ has dO besides
        }
    }
    return work;
}

static void test_attention_same_work(const char* what, const AttentionWork* got,
                                     const AttentionWork* least) {
    if (test_same_bits(what, got, least, sizeof *got)) return;
    const AttentionWork* both[2] = {got, least};
    for (int i = 0; i < 2; i++) {
        const AttentionWork* w = both[i];
        printf("      %s %llu tiles loaded; none, part, all seen by queries: %llu %llu %llu, of "
               "keys: %llu %llu %llu\n", i ? "least" : "got  ", (unsigned long long)w->tiles,
               (unsigned long long)w->views[0][0], (unsigned long long)w->views[0][1],
               (unsigned long long)w->views[0][2], (unsigned long long)w->views[1][0],
               (unsigned long long)w->views[1][1], (unsigned long long)w->views[1][2]);
    }
}

template <int D>
static void test_attention_tiles_dim(const char* label, const AttentionCase* c,
                                     const AttentionRun* r) {
    typedef AttentionTiles<D> Tiles;
    char what[128];
    snprintf(what, sizeof what, "attention tiles %s B=%d T=%d D=%d", label, c->B, c->T, D);
    AttentionWork forward = test_attention_least(c, false, 16 * Tiles::FORWARD_MT,
                                                 Tiles::FORWARD_KEYS);
    AttentionWork dq = test_attention_least(c, false, 16 * Tiles::DQ_MT, Tiles::DQ_KEYS);
    AttentionWork dkv = test_attention_least(c, true, 16 * Tiles::DKV_MT, Tiles::DKV_QUERIES);
    uint64_t dq_blocks = (uint64_t)(c->B * c->H * ceil_div(c->T, Tiles::DQ_QUERIES));
    test_attention_same_work(what, &r->forward, &forward);
    memcpy(dq.views[1], dkv.views[1], sizeof dq.views[1]);
    dq.tiles += dkv.tiles + dq_blocks;
    test_attention_same_work(what, &r->backward, &dq);
}

#endif

// Every kernel loaded and computed the tiles that hold something visible, and no other, and applied
// the mask where something is hidden, and nowhere else.
static void test_attention_tiles(const char* label, const AttentionCase* c,
                                 const AttentionRun* r) {
#ifndef __CUDACC__
    if (c->D == 32) test_attention_tiles_dim<32>(label, c, r);
    if (c->D == 64) test_attention_tiles_dim<64>(label, c, r);
    if (c->D == 128) test_attention_tiles_dim<128>(label, c, r);
#else
    (void)label, (void)c, (void)r;
#endif
}

// ---- cases ---------------------------------------------------------------------------------

enum AttentionData {
    DATA_NORMAL,
    DATA_EQUAL,          // all queries and keys alike: every p is 1/(t + 1)
    DATA_ZERO,           // a query and a key of zeros
    DATA_LARGE,          // scores of about ±1e4: one key takes all
};

typedef struct {
    double *q, *k, *v, *dout;
} AttentionInput;

static AttentionInput test_attention_input(const AttentionCase* c, AttentionData data) {
    size_t n = (size_t)c->B * c->T * c->H * c->D;
    int C = c->H * c->D;
    AttentionInput x = {test_doubles(n), test_doubles(n), test_doubles(n), test_doubles(n)};
    test_fill_normal(x.q, n, 11, data == DATA_LARGE ? 100 : 1);
    test_fill_normal(x.k, n, 12, data == DATA_LARGE ? 100 : 1);
    test_fill_normal(x.v, n, 13, 1);
    test_fill_normal(x.dout, n, 14, 1);
    for (size_t i = 0; i < n; i++) {
        if (data == DATA_EQUAL) x.q[i] = x.q[i % C], x.k[i] = x.k[i % C];
        if (data == DATA_ZERO && (int)(i / C) % c->T == c->T / 2) x.q[i] = x.k[i] = 0;
    }
    return x;
}

static void test_attention_input_free(AttentionInput* x) {
    free(x->q), free(x->k), free(x->v), free(x->dout);
}

// lse (B, H, T) of what the mask leaves
static void test_attention_lse(double* lse, const AttentionCase* c, const AttentionInput* x) {
    for (int row = 0; row < c->B * c->T * c->H; row++) {
        int h = row % c->H, t = row / c->H % c->T, batch = row / c->H / c->T;
        double max = -INFINITY, sum = 0, *score = test_doubles(t + 1);
        for (int j = 0; j <= t; j++) {
            size_t to = ((size_t)(batch * c->T + j) * c->H + h) * c->D;
            bool sees = test_attention_sees(c, batch, t, j);
            score[j] = -INFINITY;
            if (sees) {
                score[j] = c->scale * test_attention_dot(x->q + (size_t)row * c->D, x->k + to, c->D,
                                                         false);
            }
            if (score[j] > max) max = score[j];
        }
        for (int j = 0; j <= t; j++) sum += exp(score[j] - max);
        lse[((size_t)batch * c->H + h) * c->T + t] = max + log(sum);
        free(score);
    }
}

static void test_attention_case(int B, int T, int H, int D, double scale, AttentionData data,
                                const AttentionMask* mask, const char* label) {
    AttentionCase c = {B, T, H, D, (float)scale, mask};
    AttentionInput x = test_attention_input(&c, data);
    AttentionResult want = test_attention_alloc(&c);
    const uint8_t* seen = mask ? mask->seen : NULL;
    oracle_attention_masked_forward(want.out, x.q, x.k, x.v, seen, B, T, H, D, c.scale);
    oracle_attention_masked_backward(want.dq, want.dk, want.dv, x.dout, x.q, x.k, x.v, seen, B, T,
                                     H, D, c.scale);
    test_attention_lse(want.lse, &c, &x);
    AttentionResult bound = test_attention_bounds(&c, &want, x.q, x.k, x.v, x.dout);
    AttentionRun run = test_attention_run(&c, x.q, x.k, x.v, x.dout);
    test_attention_compare(label, &c, &run, &want, &bound);
    test_attention_tiles(label, &c, &run);
    test_attention_run_free(&run);
    test_attention_free(&want);
    test_attention_free(&bound);
    test_attention_input_free(&x);
}

// Equal bits in a second run and, on the host, in every order of threads and blocks.
static void test_attention_repeat(int D, const AttentionMask* mask) {
    AttentionCase c = {1, 200, 2, D, 0.12f, mask};
    AttentionInput x = test_attention_input(&c, DATA_NORMAL);
    AttentionRun first = test_attention_run(&c, x.q, x.k, x.v, x.dout);
#ifdef __CUDACC__
    AttentionRun second = test_attention_run(&c, x.q, x.k, x.v, x.dout);
    test_attention_same("twice", &first, &second);
    test_attention_run_free(&second);
#else
    const char* orders[] = {"reverse", "breadth", "1", "2", "3"};
    for (int i = 0; i < 5; i++) {
        host_set_schedule(orders[i]);
        AttentionRun second = test_attention_run(&c, x.q, x.k, x.v, x.dout);
        test_attention_same(orders[i], &first, &second);
        test_attention_run_free(&second);
    }
    host_set_schedule(NULL);
#endif
    test_attention_run_free(&first);
    test_attention_input_free(&x);
}

// A NaN in key 70 of head 1: forward, rows 70.. of that head are NaN and all else is as without it.
// Backward, every key of the head is seen by such a row; dq of rows before 64, which no tile puts
// together with key 70, is as without it. (Rows 64..69 are not: 0 times NaN in a product is NaN.)
static void test_attention_nan(int D) {
    AttentionCase c = {1, 130, 2, D, 0.12f, NULL};
    const int bad = 70;
    AttentionInput x = test_attention_input(&c, DATA_NORMAL);
    AttentionRun clean = test_attention_run(&c, x.q, x.k, x.v, x.dout);
    x.k[((size_t)bad * c.H + 1) * D + D / 2] = NAN;
    AttentionRun run = test_attention_run(&c, x.q, x.k, x.v, x.dout);
    bool forward = true, backward = true;
    for (size_t i = 0; i < run.n; i++) {
        int h = (int)(i / D % c.H), t = (int)(i / D / c.H);
        float lse = run.lse[h * c.T + t], lse_clean = clean.lse[h * c.T + t];
        float dq = test_attention_gradient(&run, &c, 0, i),
              dk = test_attention_gradient(&run, &c, 1, i);
        float dv = test_attention_gradient(&run, &c, 2, i);
        bool sees = h == 1 && t >= bad;
        forward = forward && (sees ? isnan(run.out[i]) && isnan(lse)
                                   : run.out[i] == clean.out[i] && lse == lse_clean);
        if (h == 1) {
            backward = backward && isnan(dk) && isnan(dv);
            if (t >= bad) backward = backward && isnan(dq);
            if (t < 64) backward = backward && dq == test_attention_gradient(&clean, &c, 0, i);
        } else {
            backward = backward && dq == test_attention_gradient(&clean, &c, 0, i) &&
                       dk == test_attention_gradient(&clean, &c, 1, i) &&
                       dv == test_attention_gradient(&clean, &c, 2, i);
        }
    }
    test_true("attention_forward of a NaN in a key: NaN where it is seen and nowhere else",
              forward);
    test_true("attention_backward of a NaN in a key: NaN in its head and nowhere else", backward);
    test_attention_run_free(&clean);
    test_attention_run_free(&run);
    test_attention_input_free(&x);
}

// ---- golden files --------------------------------------------------------------------------

// The files hold (B, H, T, D) or (T, H, D). Other sums in float: equal to 1e-6 and, in gradients,
// 2e-6.
static double* test_attention_read(const SafeFile* f, const char* name, const AttentionCase* c) {
    size_t n = (size_t)c->B * c->T * c->H * c->D;
    const float* data = (const float*)safetensors_data(f, name, SAFE_F32, n);
    bool heads_first = safetensors_find(f, name)->dims == 4;
    double* x = test_doubles(n);
    for (size_t i = 0; i < n; i++) {
        size_t d = i % c->D, t = i / c->D % c->T, h = i / c->D / c->T % c->H,
               b = i / c->D / c->T / c->H;
        x[heads_first ? ((b * c->T + t) * c->H + h) * c->D + d : i] = data[i];
    }
    return x;
}

// Inputs are named with one prefix, results with another. Results may be there for some rows only,
// which <inputs>rows names; such a file has one sequence and one head.
static void test_attention_golden_run(const SafeFile* f, const char* inputs, const char* results,
                                      const AttentionCase* c) {
    const char *in[4] = {"q", "k", "v", "dy"}, *out[4] = {"dq", "dk", "dv", "y"};
    char name[64], what[128];
    double* x[4];
    for (int i = 0; i < 4; i++) {
        snprintf(name, sizeof name, "%s%s", inputs, in[i]);
        x[i] = test_attention_read(f, name, c);
    }
    snprintf(name, sizeof name, "%srows", inputs);
    const SafeTensor* rows = safetensors_find(f, name);
    AttentionRun run = test_attention_run(c, x[0], x[1], x[2], x[3]);
    AttentionCase kept = *c;
    if (rows) kept.T = (int)safe_elements(rows);
    size_t n = (size_t)kept.B * kept.T * kept.H * kept.D;
    float* got = test_floats(n);
    for (int part = 0; part < 4; part++) {
        snprintf(name, sizeof name, "%s%s", results, out[part]);
        double* want = test_attention_read(f, name, &kept);
        for (size_t i = 0; i < n; i++) {
            size_t at = i;
            if (rows) at = (size_t)((const int*)rows->data)[i / c->D] * c->D + i % c->D;
            got[i] = part < 3 ? test_attention_gradient(&run, c, part, at) : run.out[at];
        }
        snprintf(what, sizeof what, "attention golden %s B=%d H=%d T=%d D=%d", name, c->B, c->H,
                 c->T, c->D);
        test_compare(what, got, want, n, 1e-5, 1e-5);
        free(want);
    }
    for (int i = 0; i < 4; i++) free(x[i]);
    free(got);
    test_attention_run_free(&run);
}

static double test_attention_scale(const SafeFile* f) {
    const char* scale = safetensors_metadata(f, "scale");
    REQUIRE(scale, "%s: no scale in its metadata", f->path);
    return atof(scale);
}

static void test_attention_golden(int B, int H, int T, int D) {
    char path[96];
    snprintf(path, sizeof path, "test/golden/units/attn_causal_B%dH%dT%dD%d.safetensors", B, H, T,
             D);
    SafeFile f;
    safetensors_open(&f, path);
    AttentionCase c = {B, T, H, D, test_attention_scale(&f), NULL};
    test_attention_golden_run(&f, "", "", &c);
    safetensors_close(&f);
}

// Record 20: documents and a window of blocks of 128; its short layers have half of the window.
static void test_attention_golden_blocks(const char* path) {
    SafeFile f;
    safetensors_open(&f, path);
    const SafeTensor* q = safetensors_find(&f, "q");
    int H = (int)q->shape[1], T = (int)q->shape[2], D = (int)q->shape[3], ends = 0;
    int bos = atoi(safetensors_metadata(&f, "bos"));
    const int* tokens = (const int*)safetensors_data(&f, "tokens", SAFE_I32, T);
    int* cu_seqlens = (int*)test_calloc(T + 2, sizeof(int));
    for (int t = 0; t < T; t++) {
        if (t == 0 || tokens[t] == bos) cu_seqlens[ends++] = t;
    }
    cu_seqlens[ends++] = T;
    int window = atoi(safetensors_metadata(&f, "sw_num_blocks"));
    for (int i = 0; i < 2; i++) {
        AttentionMask mask = test_attention_mask(cu_seqlens, ends, 1, T, window >> i, 128);
        AttentionCase c = {1, T, H, D, test_attention_scale(&f), &mask};
        test_attention_golden_run(&f, "", i ? "short." : "long.", &c);
        test_attention_mask_free(&mask);
    }
    free(cu_seqlens);
    safetensors_close(&f);
}

// Record 45: documents from cu_seqlens, empty ones and ones of a single token among them, and a
// window of tokens, none and longer than all among them.
static void test_attention_golden_varlen(const char* path) {
    SafeFile f;
    safetensors_open(&f, path);
    for (int i = 0; i < 2; i++) {
        char inputs[16], results[32], name[32];
        snprintf(inputs, sizeof inputs, "c%d.", i);
        snprintf(name, sizeof name, "c%d.q", i);
        const int64_t* shape = safetensors_find(&f, name)->shape;
        snprintf(name, sizeof name, "c%d.windows", i);
        const SafeTensor* windows = safetensors_find(&f, name);
        snprintf(name, sizeof name, "c%d.cu_seqlens", i);
        const SafeTensor* ends = safetensors_find(&f, name);
        snprintf(name, sizeof name, "c%d.scale", i);
        double scale = *(const float*)safetensors_data(&f, name, SAFE_F32, 1);
        for (int k = 0; k < (int)safe_elements(windows); k++) {
            int window = ((const int*)windows->data)[k], T = (int)shape[0];
            AttentionMask mask = test_attention_mask((const int*)ends->data,
                                                     (int)safe_elements(ends), 1, T, window, 1);
            AttentionCase c = {1, T, (int)shape[1], (int)shape[2], scale, &mask};
            snprintf(results, sizeof results, "c%d.W%d.", i, window);
            test_attention_golden_run(&f, inputs, results, &c);
            test_attention_mask_free(&mask);
        }
    }
    safetensors_close(&f);
}

// Record 20's own tables: what each block of 128 queries may see of each block of keys is nothing,
// the causal part of its documents (1), or all (2). Every query sees of every block exactly the
// keys from its first on, no later than itself.
static void test_attention_golden_tables(const char* path) {
    SafeFile f;
    safetensors_open(&f, path);
    int tables = 0, cases = 0;
    char name[48];
    for (; snprintf(name, sizeof name, "c%d.bos_pos", cases), safetensors_find(&f, name); cases++) {
        const SafeTensor* starts = safetensors_find(&f, name);
        snprintf(name, sizeof name, "c%d.nblocks", cases);
        int blocks = *(const int*)safetensors_data(&f, name, SAFE_I32, 1), T = 128 * blocks;
        int ends = (int)safe_elements(starts) + 2;
        int* cu_seqlens = (int*)test_calloc(ends, sizeof(int));
        for (int i = 0; i < ends - 2; i++) cu_seqlens[i + 1] = ((const int*)starts->data)[i];
        cu_seqlens[ends - 1] = T;
        int *first = (int*)test_calloc(T, sizeof(int)), *begin = (int*)test_calloc(T, sizeof(int));
        for (int i = 0; i + 1 < ends; i++) {
            for (int t = cu_seqlens[i]; t < cu_seqlens[i + 1]; t++) begin[t] = cu_seqlens[i];
        }
        int *cu_d = test_upload_int(cu_seqlens, ends), *first_d = test_upload_int(first, T),
            *last_d = test_upload_int(first, T);
        for (int window = 1; window <= 20; window++) {
            for (int half = 0; half < 2; half++) {
                snprintf(name, sizeof name, "c%d.sw%d.%s", cases, window, half ? "short" : "long");
                if (!safetensors_find(&f, name)) continue;
                const uint8_t* codes = (const uint8_t*)safetensors_data(&f, name, SAFE_U8,
                                                                        blocks * blocks);
                attention_bounds(first_d, last_d, cu_d, ends, 1, T, window >> half, 128, 0);
                CUDA_CHECK(cudaMemcpy(first, first_d, T * sizeof(int), cudaMemcpyDeviceToHost));
                int wrong = 0;
                for (int t = 0; t < T; t++) {
                    for (int k = 0; k < blocks; k++) {
                        int low = 128 * k, high = low + 127, code = codes[t / 128 * blocks + k];
                        int from = code == 1 && begin[t] > low ? begin[t] : low;
                        int to = code == 1 && t < high ? t : high;
                        bool want = code && from <= to;
                        int our_from = first[t] > low ? first[t] : low;
                        int our_to = t < high ? t : high;
                        bool got = our_from <= our_to;
                        wrong += want != got || (want && (from != our_from || to != our_to));
                    }
                }
                test_check(name, wrong, 0);
                tables++;
            }
        }
        cudaFree(cu_d), cudaFree(first_d), cudaFree(last_d);
        free(cu_seqlens), free(first), free(begin);
    }
    const char* all = safetensors_metadata(&f, "n");
    test_true("attention: every table of the file was compared", all && tables == atoi(all));
    safetensors_close(&f);
}

// ---- masks at work -------------------------------------------------------------------------

// Record 20's rule through its lists of blocks, clamps included, at random.
static void test_attention_lists(void) {
    for (int i = 0; i < 400; i++) {
        int block = 2 + (int)(test_random(21, 4 * i) % 7);
        int T = block * (1 + (int)(test_random(21, 4 * i + 1) % 12));
        int window = (int)(test_random(21, 4 * i + 2) % 9), ends = 0;
        int rarity = 1 + (int)(test_random(21, 4 * i + 3) % 40);
        int* tokens = (int*)test_calloc(T, sizeof(int));
        int* cu_seqlens = (int*)test_calloc(T + 2, sizeof(int));
        for (int t = 0; t < T; t++) {
            tokens[t] = test_random(22 + i, t) % rarity == 0;
            if (t == 0 || tokens[t]) cu_seqlens[ends++] = t;
        }
        cu_seqlens[ends++] = T;
        uint8_t* seen = (uint8_t*)test_calloc((size_t)T * T, 1);
        oracle_block_mask(seen, NULL, tokens, 1, T, block, window);
        AttentionMask mask = test_attention_mask(cu_seqlens, ends, 1, T, window, block);
        test_same_bits("attention_bounds is the rule of the lists of blocks", mask.seen, seen,
                       (size_t)T * T);
        test_attention_mask_free(&mask);
        free(tokens), free(cu_seqlens), free(seen);
    }
}

// Documents of up to `most` tokens, a quarter of them empty or of one token; rows begin with a new
// document. Fills `room` entries, the last ones with B T, and returns `room`.
static int test_attention_documents(int* cu_seqlens, int room, int B, int T, int most,
                                    uint64_t seed) {
    int at = 0;
    for (int i = 0; i < room; i++) {
        cu_seqlens[i] = at;
        int length = (int)(test_random(seed, 2 * i) % (uint64_t)most);
        if (test_random(seed, 2 * i + 1) % 4 == 0) length = length % 2;
        int row_end = (at / T + 1) * T;
        at = at + length < row_end ? at + length : row_end;
        if (at > B * T || i >= room - 2 - B) at = cu_seqlens[i] / T * T + T;
        if (at > B * T) at = B * T;
    }
    REQUIRE(cu_seqlens[room - 1] == B * T, "%d documents do not fill %d rows", room, B);
    return room;
}

static void test_attention_masks(int D) {
    int cu_seqlens[64];
    const struct {
        const char* name;
        int B, T, most, window, block;           // most 0: one document a row
    } cases[] = {
        {"documents", 1, 201, 60, ATTENTION_NO_WINDOW, 1},
        {"documents", 2, 210, 200, ATTENTION_NO_WINDOW, 128},
        {"single tokens", 1, 37, 1, 5, 1},
        {"no window", 1, 70, 0, 70, 1},
        {"own key only", 2, 65, 0, 0, 1},
        {"tokens", 2, 200, 0, 37, 1},
        {"tokens and documents", 1, 333, 150, 64, 1},
        {"blocks", 1, 150, 0, 3, 16},
        {"blocks and documents", 2, 165, 100, 2, 32},
        {"own block only", 1, 300, 250, 0, 128},
        {"blocks of 128", 1, 390, 0, 2, 128},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        int B = cases[i].B, T = cases[i].T, ends = 0;
        if (T > 250 && D != 64) continue;
        if (cases[i].most) ends = test_attention_documents(cu_seqlens, 64, B, T, cases[i].most, 31);
        AttentionMask mask = test_attention_mask(ends ? cu_seqlens : NULL, ends, B, T,
                                                 cases[i].window, cases[i].block);
        test_attention_case(B, T, i % 3 == 1 ? 2 : 1, D, 1 / sqrt(D), DATA_NORMAL, &mask,
                            cases[i].name);
        test_attention_mask_free(&mask);
    }
}

// Bounds that hide the future only give the bits of no bounds.
static void test_attention_mask_causal(int D) {
    AttentionMask mask = test_attention_mask(NULL, 0, 1, 200, ATTENTION_NO_WINDOW, 1);
    AttentionCase c = {1, 200, 2, D, 0.12f, NULL};
    AttentionInput x = test_attention_input(&c, DATA_NORMAL);
    AttentionRun bare = test_attention_run(&c, x.q, x.k, x.v, x.dout);
    c.mask = &mask;
    AttentionRun bounded = test_attention_run(&c, x.q, x.k, x.v, x.dout);
    test_attention_same("with bounds that hide the future only", &bare, &bounded);
    test_attention_run_free(&bare);
    test_attention_run_free(&bounded);
    test_attention_input_free(&x);
    test_attention_mask_free(&mask);
}

// NaN in a key, a value and a gradient of the output of the second of three documents. The first
// two touch at the edge of a tile of every kernel, so that the first, and what lies behind the
// window, share no tile with a NaN: their bits are those without it. The third begins in the midst
// of a tile. Forward, it does not notice the key, whose hidden scores are replaced, but in a
// product p = 0 times a NaN in v is NaN; and so in every product of the backward pass.
static void test_attention_mask_nan(int D) {
    const int T = 720, bad = 400, window = 100;
    const int cu_seqlens[] = {0, 256, 500, T};
    AttentionMask mask = test_attention_mask(cu_seqlens, 4, 1, T, window, 1);
    AttentionCase c = {1, T, 1, D, 0.12f, &mask};
    AttentionInput x = test_attention_input(&c, DATA_NORMAL);
    AttentionRun clean = test_attention_run(&c, x.q, x.k, x.v, x.dout);
    double* tensors[3] = {x.k, x.v, x.dout};
    const char* names[3] = {"a key", "a value", "a gradient"};
    for (int i = 0; i < 3; i++) {
        double* element = &tensors[i][(size_t)bad * D + D / 2];
        double kept = *element;
        *element = NAN;
        AttentionRun run = test_attention_run(&c, x.q, x.k, x.v, x.dout);
        *element = kept;
        bool forward = true, backward = true;
        for (int t = 0; t < T; t++) {
            bool sees = i < 2 && test_attention_sees(&c, 0, t, bad);
            bool shares = i == 1 && t >= 384 && t < 640;     // tiles of queries that look at `bad`
            for (int d = 0; d < D; d++) {
                size_t at = (size_t)t * D + d;
                if (sees && (i == 0 || d == D / 2)) {
                    forward = forward && isnan(run.out[at]);
                } else if (!shares) {
                    forward = forward && run.out[at] == clean.out[at];
                }
                for (int part = 0; part < 3; part++) {
                    float got = test_attention_gradient(&run, &c, part, at);
                    if (t < 256 || t >= 640) {
                        backward = backward && got == test_attention_gradient(&clean, &c, part, at);
                    }
                }
            }
            forward = forward && (i == 0 && sees ? isnan(run.lse[t]) : run.lse[t] == clean.lse[t]);
        }
        char what[128];
        snprintf(what, sizeof what, "attention_forward with a mask and a NaN in %s", names[i]);
        test_true(what, forward);
        snprintf(what, sizeof what, "attention_backward with a mask and a NaN in %s", names[i]);
        test_true(what, backward);
        test_attention_run_free(&run);
    }
    test_attention_run_free(&clean);
    test_attention_input_free(&x);
    test_attention_mask_free(&mask);
}

// Only the queries from `from` on: their bits are those of all queries, the tiles of 128 before are
// neither computed nor written.
static void test_attention_from(int D, const AttentionMask* mask, int T) {
    AttentionCase c = {1, T, 2, D, 0.12f, mask};
    AttentionInput x = test_attention_input(&c, DATA_NORMAL);
    size_t rows = (size_t)T * c.H, n = rows * D;
    int C = c.H * D, froms[] = {0, 1, 127, 128, T - 64, T - 1};
    floatX *q = test_upload(x.q, n), *k = test_upload(x.k, n), *v = test_upload(x.v, n);
    floatX* out_d = test_device(n);
    float* lse_d = test_device_float(rows);
    int* first_d = mask ? test_upload_int(mask->first, T) : NULL;
    double* fill = test_doubles(n);
    for (size_t i = 0; i < n; i++) fill[i] = 77;
    float *whole = NULL, *whole_lse = NULL;
    for (size_t i = 0; i < sizeof froms / sizeof froms[0]; i++) {
        int from = froms[i], written = from / 128 * 128;
        test_put(out_d, fill, n);
        test_put_float(lse_d, fill, rows);
        attention_forward(out_d, lse_d, q, k, v, first_d, 1, T, c.H, D, C, C, (float)c.scale, from,
                          0);
        float *out = test_download(out_d, n), *lse = test_download_float(lse_d, rows);
        bool equal = true, kept = true;
        for (int t = 0; t < T && i > 0; t++) {
            for (int j = 0; j < C; j++) {
                float got = out[(size_t)t * C + j];
                if (t >= from) equal = equal && got == whole[(size_t)t * C + j];
                if (t < written) kept = kept && got == 77;
            }
            for (int h = 0; h < c.H; h++) {
                float got = lse[h * T + t];
                if (t >= from) equal = equal && got == whole_lse[h * T + t];
                if (t < written) kept = kept && got == 77;
            }
        }
        char what[96];
        snprintf(what, sizeof what, "attention_forward from %d of %d D=%d%s", from, T, D,
                 mask ? " with a mask" : "");
        test_true(what, equal && kept);
        if (i > 0) {
            free(out), free(lse);
        } else {
            whole = out, whole_lse = lse;
        }
    }
    free(whole), free(whole_lse), free(fill);
    cudaFree(q), cudaFree(k), cudaFree(v), cudaFree(out_d), cudaFree(lse_d), cudaFree(first_d);
    test_attention_input_free(&x);
}

// ---- long sequences ------------------------------------------------------------------------

// The scores that are computed per query are the window and the edges of tiles, whatever T is.
static void test_attention_work_of_windows(void) {
#ifndef __CUDACC__
    const int T = 2048, D = 32;
    for (int window = 256; window >= 128; window /= 2) {
        AttentionMask mask = {(int*)test_calloc(T, sizeof(int)), (int*)test_calloc(T, sizeof(int)),
                              NULL};
        for (int t = 0; t < T; t++) {
            mask.first[t] = t > window ? t - window : 0;
            mask.last[t] = t + window < T ? t + window : T - 1;
        }
        AttentionCase c = {1, T, 1, D, 0.12f, &mask};
        AttentionInput x = test_attention_input(&c, DATA_ZERO);
        AttentionRun r = test_attention_run(&c, x.q, x.k, x.v, x.dout);
        uint64_t tiles[3] = {r.forward.views[0][VIEW_PART] + r.forward.views[0][VIEW_ALL],
                             r.backward.views[0][VIEW_PART] + r.backward.views[0][VIEW_ALL],
                             r.backward.views[1][VIEW_PART] + r.backward.views[1][VIEW_ALL]};
        for (int i = 0; i < 3; i++) {
            // 32 rows of a warp see window + 32 columns, which touch one tile of 64 more at most
            double most = (double)T / 32 * ((window + 32) / 64 + 1);
            char what[96];
            snprintf(what, sizeof what, "attention tiles of a window of %d in %d, kernel %d",
                     window, T, i);
            test_check(what, (double)tiles[i], most);
        }
        test_attention_run_free(&r);
        test_attention_input_free(&x);
        free(mask.first), free(mask.last);
    }
#endif
}

// A document at the end of a long sequence of others, against the document alone: equal bits.
// Documents of 128 tokens before it, so that it begins at the edge of a tile.
static void test_attention_far(int D, int T) {
    const int tail = 3 * 128 - 17, alone_ends[] = {0, 299, tail};
    int N = (T / 128 - 3) * 128 + tail, ends = 0;
    int* cu_seqlens = (int*)test_calloc(T / 128 + 3, sizeof(int));
    for (int t = 0; t <= N - tail; t += 128) cu_seqlens[ends++] = t;
    cu_seqlens[ends++] = N - tail + 299, cu_seqlens[ends++] = N;
    AttentionMask mask = {(int*)test_calloc(N, sizeof(int)), (int*)test_calloc(N, sizeof(int)),
                          NULL};
    int *cu_d = test_upload_int(cu_seqlens, ends), *first_d = test_upload_int(mask.first, N),
        *last_d = test_upload_int(mask.last, N);
    attention_bounds(first_d, last_d, cu_d, ends, 1, N, 170, 1, 0);
    CUDA_CHECK(cudaMemcpy(mask.first, first_d, N * sizeof(int), cudaMemcpyDeviceToHost));
    CUDA_CHECK(cudaMemcpy(mask.last, last_d, N * sizeof(int), cudaMemcpyDeviceToHost));
    AttentionCase c = {1, N, 1, D, 0.12f, &mask};
    AttentionInput x = test_attention_input(&c, DATA_NORMAL);
    AttentionRun run = test_attention_run(&c, x.q, x.k, x.v, x.dout);
    AttentionMask alone_mask = test_attention_mask(alone_ends, 3, 1, tail, 170, 1);
    AttentionCase alone = {1, tail, 1, D, 0.12f, &alone_mask};
    size_t at = (size_t)(N - tail) * D, wide = 3 * D + ATTENTION_PAD;
    AttentionRun want = test_attention_run(&alone, x.q + at, x.k + at, x.v + at, x.dout + at);
    char what[96];
    snprintf(what, sizeof what, "attention at the end of %d tokens", N);
    test_same_bits(what, run.out + at, want.out, want.n * sizeof(float));
    test_same_bits(what, run.lse + N - tail, want.lse, want.rows * sizeof(float));
    test_same_bits(what, run.gradient + (N - tail) * wide, want.gradient,
                   want.wide * sizeof(float));
    test_attention_run_free(&run);
    test_attention_run_free(&want);
    test_attention_input_free(&x);
    test_attention_mask_free(&alone_mask);
    free(mask.first), free(mask.last), free(cu_seqlens);
    cudaFree(cu_d), cudaFree(first_d), cudaFree(last_d);
}
// Memory of which only the last part is used: on the host the rest never exists.
static floatX* test_attention_reserve(size_t n) {
    size_t bytes = n * sizeof(floatX);
#ifdef __CUDACC__
    floatX* p;
    CUDA_CHECK(cudaMalloc((void**)&p, bytes));
    return p;
#else
    void* p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                   -1, 0);
    REQUIRE(p != MAP_FAILED, "%zu bytes of addresses are not to be had", bytes);
    return (floatX*)p;
#endif
}

static void test_attention_unreserve(floatX* p, size_t n) {
#ifdef __CUDACC__
    (void)n;
    CUDA_CHECK(cudaFree(p));
#else
    munmap(p, n * sizeof(floatX));
#endif
}

// The last 256 queries of the longest sequence, q k v in rows of 3C, against the same as queries
// 384.. of a sequence of 640 tokens: equal bits.
static void test_attention_long(int C, int T) {
    const int D = 128, H = C / D, ld = 3 * C, tail = 640, from = tail - 256, window = 300;
    size_t n = (size_t)T * ld, kept = (size_t)tail * ld, before = T - tail;
    floatX *qkv = test_attention_reserve(n), *out = test_attention_reserve((size_t)T * C);
    floatX *tail_qkv = qkv + before * ld, *tail_out = test_device((size_t)tail * C);
    float *lse = test_device_float((size_t)T * H), *tail_lse = test_device_float(tail * H);
    double* x = test_doubles(kept);
    test_fill_uniform(x, kept, 51, -2, 2);
    test_put(tail_qkv, x, kept);
    int ends = 0, *cu_seqlens = (int*)test_calloc(T / 1000 + 2, sizeof(int));
    for (int t = 0; t < T; t += 1000) cu_seqlens[ends++] = t;
    int tail_ends[] = {0, cu_seqlens[ends - 1] - (T - tail), tail};
    cu_seqlens[ends++] = T;
    int *cu_d = test_upload_int(cu_seqlens, ends), *tail_cu_d = test_upload_int(tail_ends, 3);
    int* bounds[4];
    for (int i = 0; i < 4; i++) {
        CUDA_CHECK(cudaMalloc((void**)&bounds[i], (i < 2 ? T : tail) * sizeof(int)));
    }
    attention_bounds(bounds[0], bounds[1], cu_d, ends, 1, T, window, 1, 0);
    attention_bounds(bounds[2], bounds[3], tail_cu_d, 3, 1, tail, window, 1, 0);
    attention_forward(out, lse, qkv, qkv + C, qkv + 2 * C, bounds[0], 1, T, H, D, ld, ld, 0.12f,
                      T - 256, 0);
    attention_forward(tail_out, tail_lse, tail_qkv, tail_qkv + C, tail_qkv + 2 * C, bounds[2], 1,
                      tail, H, D, ld, ld, 0.12f, 0, 0);
    float* got = test_download(out + (before + from) * C, (size_t)(tail - from) * C);
    float* want = test_download(tail_out + (size_t)from * C, (size_t)(tail - from) * C);
    char what[96];
    snprintf(what, sizeof what, "attention_forward of the end of %d tokens, C=%d", T, C);
    test_same_bits(what, got, want, (size_t)(tail - from) * C * sizeof(float));
    free(got), free(want);
    got = test_download_float(lse, (size_t)T * H);
    want = test_download_float(tail_lse, (size_t)tail * H);
    bool equal = true;
    for (int h = 0; h < H; h++) {
        equal = equal && !memcmp(got + (size_t)(h + 1) * T - 256, want + (h + 1) * tail - 256,
                                 256 * sizeof(float));
    }
    test_true(what, equal);
    free(got), free(want), free(x), free(cu_seqlens);
    for (int i = 0; i < 4; i++) cudaFree(bounds[i]);
    cudaFree(cu_d), cudaFree(tail_cu_d), cudaFree(tail_out), cudaFree(lse), cudaFree(tail_lse);
    test_attention_unreserve(qkv, n);
    test_attention_unreserve(out, (size_t)T * C);
}

static void test_attention(void) {
    // one row; inside, at and beyond the edges of tiles of 32, 64 and 128; several tiles of each
    const int lengths[] = {1, 5, 37, 64, 65, 130, 200};
    for (int D = 32; D <= 128; D *= 2) {
        for (int i = 0; i < 7; i++) {
            int B = i % 2 ? 2 : 1, H = i % 3 ? 3 : 1;
            test_attention_case(B, lengths[i], H, D, 1 / sqrt(D), DATA_NORMAL, NULL, "normal");
        }
        test_attention_case(1, 130, 1, D, 0.12, DATA_EQUAL, NULL, "all rows equal");
        test_attention_case(2, 70, 1, D, 0.12, DATA_ZERO, NULL, "zero rows");
        test_attention_case(1, 130, 1, D, 1 / sqrt(D), DATA_LARGE, NULL, "large scores");
        test_attention_nan(D);
        test_attention_repeat(D, NULL);
    }
    for (int D = 32; D <= 128; D *= 2) {
        if (test_attention_very_slow && D != 64) continue;
        const int cu_seqlens[] = {0, 0, 90, 91, 200};
        AttentionMask mask = test_attention_mask(cu_seqlens, 5, 1, 200, 50, 1);
        test_attention_masks(D);
        test_attention_mask_causal(D);
        if (D == 64) test_attention_mask_nan(D);
        if (D == 64) test_attention_repeat(D, &mask);
        test_attention_from(D, &mask, 200);
        test_attention_from(D, NULL, 300);
        test_attention_mask_free(&mask);
    }
    test_attention_lists();
    test_attention_far(32, test_attention_slow ? 2048 : 65536);
    if (!test_attention_very_slow) test_attention_work_of_windows();
    if (!test_attention_slow) test_attention_long(768, 262144);
    if (!test_attention_slow) test_attention_long(1024, 262144);
    test_attention_golden_tables("test/golden/units/block_masks.safetensors");
    if (!FLOATX_IS_BF16) {
        test_attention_golden(1, 2, 37, 128);
        test_attention_golden(1, 1, 130, 64);
        test_attention_golden_blocks("test/golden/units/attn_docswa_T384D64.safetensors");
        test_attention_golden_varlen("test/golden/units/attn_varlen.safetensors");
    }
}
