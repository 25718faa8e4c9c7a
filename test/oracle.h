/*
Every operation of the trainer as plain loops in double: the specification that the kernels are
tested against. The formulas here are the definition; test/test_oracle.c checks each backward
function against central differences of its forward function, and the whole model against the
golden files.

    Letters as in llmc/common.h: B sequences of T tokens, N = B*T rows, C channels, H heads,
    D head dim, V vocabulary columns, L layers. All arrays are contiguous and row-major; q k v and
    their kin are (B, T, H, D). Outputs come first and never alias inputs, except where said.
    "+=" marks an output that is added to.

The first half holds the operations, in the order of the model; then come the optimizers, then what
records 20 and 45 add to both, then the whole model with all its gradients (OracleModel), which knows
the recipes modern, untied, unet, sub3 and normuon.

Plain C and C++; nothing here is fast.
*/
#pragma once
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static inline double* oracle_alloc(size_t n) {
    double* p = (double*)calloc(n ? n : 1, sizeof(double));
    if (!p) {
        fprintf(stderr, "oracle: no memory for %zu doubles\n", n);
        exit(1);
    }
    return p;
}

// Round to nearest even, 8 significant bits; NaN stays NaN.
static inline double oracle_round_bf16(double x) {
    float f = (float)x;
    uint32_t u;
    memcpy(&u, &f, 4);
    if (f == f) u = (u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u;
    memcpy(&f, &u, 4);
    return f;
}

// ---- embedding -------------------------------------------------------------------------------

// out(n, :) = wte(tokens[n], :)
static inline void oracle_embedding_forward(double* out, const double* wte, const int* tokens,
                                            int N, int C) {
    for (int n = 0; n < N; n++) {
        for (int c = 0; c < C; c++) out[(size_t)n * C + c] = wte[(size_t)tokens[n] * C + c];
    }
}

// dwte += : every row of dout goes to the row of its token
static inline void oracle_embedding_backward(double* dwte, const double* dout, const int* tokens,
                                             int N, int C) {
    for (int n = 0; n < N; n++) {
        for (int c = 0; c < C; c++) dwte[(size_t)tokens[n] * C + c] += dout[(size_t)n * C + c];
    }
}

// ---- rmsnorm ---------------------------------------------------------------------------------

// y = x rstd, rstd = (mean(x²) + eps)^-1/2 per row; rstd may be NULL
static inline void oracle_rmsnorm_forward(double* y, double* rstd, const double* x, int N, int C,
                                          double eps) {
    for (int n = 0; n < N; n++) {
        const double* xn = x + (size_t)n * C;
        double sum = 0;
        for (int c = 0; c < C; c++) sum += xn[c] * xn[c];
        double r = 1.0 / sqrt(sum / C + eps);
        for (int c = 0; c < C; c++) y[(size_t)n * C + c] = xn[c] * r;
        if (rstd) rstd[n] = r;
    }
}

// sum = x + r, y = sum rstd
static inline void oracle_residual_rmsnorm_forward(double* sum, double* y, double* rstd,
                                                   const double* x, const double* r, int N, int C,
                                                   double eps) {
    for (size_t i = 0; i < (size_t)N * C; i++) sum[i] = x[i] + r[i];
    oracle_rmsnorm_forward(y, rstd, sum, N, C, eps);
}

// dx (+)= rstd (dy - y mean(dy y)): exact for any eps, since y mean(dy y) = x rstd² mean(dy x)
static inline void oracle_rmsnorm_backward(double* dx, const double* dy, const double* y,
                                           const double* rstd, int N, int C, bool accumulate) {
    for (int n = 0; n < N; n++) {
        size_t row = (size_t)n * C;
        double mean = 0;
        for (int c = 0; c < C; c++) mean += dy[row + c] * y[row + c] / C;
        for (int c = 0; c < C; c++) {
            double d = rstd[n] * (dy[row + c] - y[row + c] * mean);
            dx[row + c] = accumulate ? dx[row + c] + d : d;
        }
    }
}

static inline void oracle_residual_add(double* sum, const double* x, const double* r, size_t n) {
    for (size_t i = 0; i < n; i++) sum[i] = x[i] + r[i];
}

// ---- mix: y = a x + b z ----------------------------------------------------------------------

// The numbers are those of MixMode in llmc/mix.cuh.
enum {
    ORACLE_MIX_PAIR = 0, ORACLE_MIX_SKIP = 1, ORACLE_MIX_LERP = 2, ORACLE_MIX_GATE = 3, ORACLE_MIX_MINUS = 4
};

static inline void oracle_mix_weights(double* a, double* b, const double* s, int mode) {
    *a = mode == ORACLE_MIX_PAIR ? s[0] : mode == ORACLE_MIX_LERP ? 1.0 - s[0] : 1.0;
    *b = mode == ORACLE_MIX_PAIR ? s[1] : mode == ORACLE_MIX_GATE ? 1.0 / (1.0 + exp(-s[0])) : s[0];
    if (mode == ORACLE_MIX_MINUS) *b = -s[0];
}

// y may alias x or z
static inline void oracle_mix_forward(double* y, const double* x, const double* z, const double* s,
                                      int mode, int N, int C) {
    double a, b;
    oracle_mix_weights(&a, &b, s, mode);
    for (size_t i = 0; i < (size_t)N * C; i++) y[i] = a * x[i] + b * z[i];
}

// dx = a dy (may alias dy), dz += b dy, ds += the derivatives for s[0] (and s[1] of a pair)
static inline void oracle_mix_backward(double* dx, double* dz, double* ds, const double* dy,
                                       const double* x, const double* z, const double* s, int mode,
                                       int N, int C) {
    double a, b, da = 0, db = 0;
    oracle_mix_weights(&a, &b, s, mode);
    for (size_t i = 0; i < (size_t)N * C; i++) {
        double d = dy[i];
        da += d * x[i];
        db += d * z[i];
        dz[i] += b * d;
        dx[i] = a * d;
    }
    if (mode == ORACLE_MIX_PAIR) {
        ds[0] += da;
        ds[1] += db;
    } else {
        ds[0] += mode == ORACLE_MIX_LERP ? db - da : mode == ORACLE_MIX_GATE ? b * (1.0 - b) * db
               : mode == ORACLE_MIX_MINUS ? -db : db;
    }
}

// ---- rotary ----------------------------------------------------------------------------------

// cos and sin of t f_j, (T, D/2). Frequency and angle are each rounded to float, because that is what
// the recipes' float tensors hold: at t = 1023 an angle in double would differ from theirs by up to
// 3e-5. The tables themselves are float, or bf16 if asked.
static inline void oracle_frequency_tables(double* cos_table, double* sin_table,
                                           const float* frequencies, int T, int D,
                                           bool round_to_bf16) {
    for (int j = 0; j < D / 2; j++) {
        for (int t = 0; t < T; t++) {
            float angle = (float)t * frequencies[j];
            double c = (float)cos((double)angle), s = (float)sin((double)angle);
            cos_table[(size_t)t * (D / 2) + j] = round_to_bf16 ? oracle_round_bf16(c) : c;
            sin_table[(size_t)t * (D / 2) + j] = round_to_bf16 ? oracle_round_bf16(s) : s;
        }
    }
}

// f_j = 1 / base^(2j/D); exponent, power and reciprocal are each rounded to float, too.
static inline void oracle_frequencies(float* frequencies, int D, float base) {
    for (int j = 0; j < D / 2; j++) {
        float exponent = (float)(2 * j) / (float)D;
        float power = (float)pow((double)base, (double)exponent);
        frequencies[j] = 1.0f / power;
    }
}

enum { ORACLE_MAX_HEAD = 256 };

static inline void oracle_rotary_tables(double* cos_table, double* sin_table, int T, int D,
                                        float base, bool round_to_bf16) {
    float frequencies[ORACLE_MAX_HEAD / 2];
    oracle_frequencies(frequencies, D, base);
    oracle_frequency_tables(cos_table, sin_table, frequencies, T, D, round_to_bf16);
}

// Pairs are (j, j + D/2): y1 = x1 c + x2 s, y2 = -x1 s + x2 c. y may alias x.
static inline void oracle_rotary_forward(double* y, const double* x, const double* cos_table,
                                         const double* sin_table, int B, int T, int H, int D) {
    for (size_t row = 0; row < (size_t)B * T * H; row++) {
        size_t t = row / H % T;
        for (int j = 0; j < D / 2; j++) {
            double c = cos_table[t * (D / 2) + j], s = sin_table[t * (D / 2) + j];
            double x1 = x[row * D + j], x2 = x[row * D + j + D / 2];
            y[row * D + j] = x1 * c + x2 * s;
            y[row * D + j + D / 2] = -x1 * s + x2 * c;
        }
    }
}

// The transpose; with rounded tables it is not the inverse. dx may alias dy.
static inline void oracle_rotary_backward(double* dx, const double* dy, const double* cos_table,
                                          const double* sin_table, int B, int T, int H, int D) {
    for (size_t row = 0; row < (size_t)B * T * H; row++) {
        size_t t = row / H % T;
        for (int j = 0; j < D / 2; j++) {
            double c = cos_table[t * (D / 2) + j], s = sin_table[t * (D / 2) + j];
            double d1 = dy[row * D + j], d2 = dy[row * D + j + D / 2];
            dx[row * D + j] = d1 * c - d2 * s;
            dx[row * D + j + D / 2] = d1 * s + d2 * c;
        }
    }
}

// Norm over each head and rotation, in the order asked for. rstd (B, T, H), may be NULL.
static inline void oracle_qknorm_rotary_forward(double* y, double* rstd, const double* x,
                                                const double* cos_table, const double* sin_table,
                                                int B, int T, int H, int D, double eps,
                                                bool norm_first) {
    int rows = B * T * H;
    double* mid = oracle_alloc((size_t)rows * D);
    if (norm_first) {
        oracle_rmsnorm_forward(mid, rstd, x, rows, D, eps);
        oracle_rotary_forward(y, mid, cos_table, sin_table, B, T, H, D);
    } else {
        oracle_rotary_forward(mid, x, cos_table, sin_table, B, T, H, D);
        oracle_rmsnorm_forward(y, rstd, mid, rows, D, eps);
    }
    free(mid);
}

// From x, the input of the forward function: nothing has to be undone.
static inline void oracle_qknorm_rotary_backward(double* dx, const double* dy, const double* x,
                                                 const double* cos_table, const double* sin_table,
                                                 int B, int T, int H, int D, double eps,
                                                 bool norm_first) {
    int rows = B * T * H;
    size_t n = (size_t)rows * D;
    double *mid = oracle_alloc(n), *normed = oracle_alloc(n), *rstd = oracle_alloc(rows);
    if (norm_first) {
        oracle_rmsnorm_forward(normed, rstd, x, rows, D, eps);
        oracle_rotary_backward(mid, dy, cos_table, sin_table, B, T, H, D);
        oracle_rmsnorm_backward(dx, mid, normed, rstd, rows, D, false);
    } else {
        oracle_rotary_forward(mid, x, cos_table, sin_table, B, T, H, D);
        oracle_rmsnorm_forward(normed, rstd, mid, rows, D, eps);
        oracle_rmsnorm_backward(mid, dy, normed, rstd, rows, D, false);
        oracle_rotary_backward(dx, mid, cos_table, sin_table, B, T, H, D);
    }
    free(mid);
    free(normed);
    free(rstd);
}

// ---- attention -------------------------------------------------------------------------------

// Causal: query t sees keys 0..t. p = softmax(scale q.k), out = p v.
// lse (B, H, T) = log of the sum of exp(scale q.k), natural logarithm; may be NULL.
static inline void oracle_attention_forward(double* out, double* lse, const double* q,
                                            const double* k, const double* v, int B, int T, int H,
                                            int D, double scale) {
    double* p = oracle_alloc(T);
    for (int b = 0; b < B; b++) for (int h = 0; h < H; h++) for (int t = 0; t < T; t++) {
        size_t here = (((size_t)b * T + t) * H + h) * D;
        double max = -INFINITY, sum = 0;
        for (int u = 0; u <= t; u++) {
            size_t there = (((size_t)b * T + u) * H + h) * D;
            double score = 0;
            for (int d = 0; d < D; d++) score += q[here + d] * k[there + d];
            p[u] = scale * score;
            if (!(p[u] <= max)) max = p[u];
        }
        for (int u = 0; u <= t; u++) sum += exp(p[u] - max);
        for (int d = 0; d < D; d++) out[here + d] = 0;
        for (int u = 0; u <= t; u++) {
            size_t there = (((size_t)b * T + u) * H + h) * D;
            double weight = exp(p[u] - max) / sum;
            for (int d = 0; d < D; d++) out[here + d] += weight * v[there + d];
        }
        if (lse) lse[((size_t)b * H + h) * T + t] = max + log(sum);
    }
    free(p);
}

// With dp = dout.v: ds = p (dp - sum of p dp), dq = scale ds k, dk = scale dsᵀ q, dv = pᵀ dout.
// Recomputes p from q and k.
static inline void oracle_attention_backward(double* dq, double* dk, double* dv, const double* dout,
                                             const double* q, const double* k, const double* v,
                                             int B, int T, int H, int D, double scale) {
    size_t n = (size_t)B * T * H * D;
    double *p = oracle_alloc(T), *dp = oracle_alloc(T);
    for (size_t i = 0; i < n; i++) dq[i] = dk[i] = dv[i] = 0;
    for (int b = 0; b < B; b++) for (int h = 0; h < H; h++) for (int t = 0; t < T; t++) {
        size_t here = (((size_t)b * T + t) * H + h) * D;
        double max = -INFINITY, sum = 0, dot = 0;
        for (int u = 0; u <= t; u++) {
            size_t there = (((size_t)b * T + u) * H + h) * D;
            p[u] = dp[u] = 0;
            for (int d = 0; d < D; d++) {
                p[u] += scale * q[here + d] * k[there + d];
                dp[u] += dout[here + d] * v[there + d];
            }
            if (!(p[u] <= max)) max = p[u];
        }
        for (int u = 0; u <= t; u++) p[u] = exp(p[u] - max), sum += p[u];
        for (int u = 0; u <= t; u++) p[u] /= sum, dot += p[u] * dp[u];
        for (int u = 0; u <= t; u++) {
            size_t there = (((size_t)b * T + u) * H + h) * D;
            double ds = p[u] * (dp[u] - dot);
            for (int d = 0; d < D; d++) {
                dq[here + d] += scale * ds * k[there + d];
                dk[there + d] += scale * ds * q[here + d];
                dv[there + d] += p[u] * dout[here + d];
            }
        }
    }
    free(p);
    free(dp);
}

// ---- relu2 -----------------------------------------------------------------------------------

// y = max(x, 0)²; a NaN stays one
static inline void oracle_relu2_forward(double* y, const double* x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        double r = x[i] < 0 ? 0 : x[i];
        y[i] = r * r;
    }
}

// dx = 2 max(x, 0) dy
static inline void oracle_relu2_backward(double* dx, const double* dy, const double* x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        double r = x[i] < 0 ? 0 : x[i];
        dx[i] = 2.0 * r * dy[i];
    }
}

// ---- matmul ----------------------------------------------------------------------------------

// row(N) += a[0] w(0,:) + a[stride] w(1,:) + ... of K rows, four at a time: with one the loads and stores
// of row would take most of the time.
static inline void oracle_row_add(double* __restrict row, const double* a, int stride,
                                  const double* __restrict w, int N, int K) {
    int k = 0;
    for (; k + 4 <= K; k += 4, w += 4 * N, a += 4 * stride) {
        double a0 = a[0], a1 = a[stride], a2 = a[2 * stride], a3 = a[3 * stride];
        for (int n = 0; n < N; n++) {
            row[n] = row[n] + a0 * w[n] + a1 * w[N + n] + a2 * w[2 * N + n] + a3 * w[3 * N + n];
        }
    }
    for (; k < K; k++, w += N, a += stride) {
        for (int n = 0; n < N; n++) row[n] += a[0] * w[n];
    }
}

// y(M,N) = x(M,K) w(K,N)
static inline void oracle_matmul_nn(double* y, const double* x, const double* w, int M, int N,
                                    int K) {
    for (int m = 0; m < M; m++) {
        for (int n = 0; n < N; n++) y[(size_t)m * N + n] = 0;
        oracle_row_add(y + (size_t)m * N, x + (size_t)m * K, 1, w, N, K);
    }
}

// y(M,N) = x(M,K) w(N,K)ᵀ. Through the transpose, whose inner loop a compiler can vectorise.
static inline void oracle_matmul_nt(double* y, const double* x, const double* w, int M, int N,
                                    int K) {
    double* turned = oracle_alloc((size_t)K * N);
    for (int n = 0; n < N; n++) {
        for (int k = 0; k < K; k++) turned[(size_t)k * N + n] = w[(size_t)n * K + k];
    }
    oracle_matmul_nn(y, x, turned, M, N, K);
    free(turned);
}

// dw(M,N) = a(K,M)ᵀ b(K,N) + beta dw; beta 0 does not read dw
static inline void oracle_matmul_tn(double* dw, const double* a, const double* b, int M, int N,
                                    int K, double beta) {
    for (size_t i = 0; i < (size_t)M * N; i++) dw[i] = beta == 0 ? 0 : beta * dw[i];
    for (int m = 0; m < M; m++) oracle_row_add(dw + (size_t)m * N, a + m, M, b, N, K);
}

// ---- loss ------------------------------------------------------------------------------------

// The numbers are those of SoftcapKind in llmc/loss.cuh.
enum { ORACLE_SOFTCAP_NONE = 0, ORACLE_SOFTCAP_TANH = 1, ORACLE_SOFTCAP_SIGMOID = 2 };

// none: z; tanh: cap tanh(z / cap); sigmoid: cap sigmoid(4 z / cap), with cap 30 that is
// 30 sigmoid(z / 7.5), whose slope at 0 is 1 like the others'
static inline double oracle_softcap(double z, int kind, double cap) {
    if (kind == ORACLE_SOFTCAP_TANH) return cap * tanh(z / cap);
    if (kind == ORACLE_SOFTCAP_SIGMOID) return cap / (1.0 + exp(-4.0 * z / cap));
    return z;
}

static inline double oracle_softcap_slope(double z, int kind, double cap) {
    double y = oracle_softcap(z, kind, cap) / cap;
    if (kind == ORACLE_SOFTCAP_TANH) return 1.0 - y * y;
    if (kind == ORACLE_SOFTCAP_SIGMOID) return 4.0 * y * (1.0 - y);
    return 1.0;
}

// losses (R) = log(sum exp(c)) - c[target] with c = softcap(z); dlogits = grad_scale d loss / d z,
// may be NULL and may alias logits. Target -1: loss 0, gradient 0.
static inline void oracle_cross_entropy(double* dlogits, double* losses, const double* logits,
                                        const int* targets, int R, int V, int kind, double cap,
                                        double grad_scale) {
    for (int r = 0; r < R; r++) {
        const double* z = logits + (size_t)r * V;
        double max = -INFINITY, sum = 0;
        for (int v = 0; v < V; v++) {
            double c = oracle_softcap(z[v], kind, cap);
            if (!(c <= max)) max = c;
        }
        for (int v = 0; v < V; v++) sum += exp(oracle_softcap(z[v], kind, cap) - max);
        bool ignored = targets[r] < 0;
        losses[r] = ignored ? 0 : max + log(sum) - oracle_softcap(z[targets[r]], kind, cap);
        if (!dlogits) continue;
        for (int v = 0; v < V; v++) {
            double p = exp(oracle_softcap(z[v], kind, cap) - max) / sum - (v == targets[r]);
            double slope = oracle_softcap_slope(z[v], kind, cap);
            dlogits[(size_t)r * V + v] = ignored ? 0 : grad_scale * p * slope;
        }
    }
}

static inline double oracle_sum(const double* x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += x[i];
    return sum;
}

// sqrt of the sum of squares: gradient norm, Frobenius norm
static inline double oracle_norm(const double* x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += x[i] * x[i];
    return sqrt(sum);
}

// ---- adamw -----------------------------------------------------------------------------------

// m = b1 m + (1-b1) g, v = b2 v + (1-b2) g², p -= lr wd p, and then, step counting from 1,
//   p -= lr/(1-b1^step) m / (sqrt(v)/sqrt(1-b2^step) + eps), or
//   p -= lr sqrt(1-b2^step)/(1-b1^step) m / (sqrt(v) + eps)        unscaled_eps: DistAdam of record 45
// bf16_value: a table kept in bf16 without a master: g is rounded to bf16 first, p as it is stored.
// bf16_state: p is computed from the unrounded m and v, which are rounded to bf16 as they are stored.
typedef struct {
    double lr, beta1, beta2, eps, wd;
    bool unscaled_eps, bf16_value, bf16_state;
} OracleAdam;

static inline void oracle_adam_update(double* p, const double* g, double* m, double* v, size_t n,
                                      const OracleAdam* a, int step) {
    double c1 = 1.0 - pow(a->beta1, step), c2 = sqrt(1.0 - pow(a->beta2, step));
    for (size_t i = 0; i < n; i++) {
        double gi = a->bf16_value ? oracle_round_bf16(g[i]) : g[i];
        m[i] = a->beta1 * m[i] + (1.0 - a->beta1) * gi;
        v[i] = a->beta2 * v[i] + (1.0 - a->beta2) * gi * gi;
        p[i] -= a->lr * a->wd * p[i];
        p[i] -= a->lr / c1 * m[i] * (a->unscaled_eps ? c2 / (sqrt(v[i]) + a->eps)
                                                     : 1.0 / (sqrt(v[i]) / c2 + a->eps));
        if (a->bf16_value) p[i] = oracle_round_bf16(p[i]);
        if (a->bf16_state) m[i] = oracle_round_bf16(m[i]), v[i] = oracle_round_bf16(v[i]);
    }
}

// PyTorch's, all in bf16 or nothing.
static inline void oracle_adamw_update(double* p, const double* g, double* m, double* v, size_t n,
                                       double lr, double beta1, double beta2, double eps, double wd,
                                       int step, bool bf16_state) {
    OracleAdam a = {lr, beta1, beta2, eps, wd, false, bf16_state, bf16_state};
    oracle_adam_update(p, g, m, v, n, &a, step);
}

// ---- muon ------------------------------------------------------------------------------------

// X = G / norm, then for each (a, b, c): X = a X + (b A + c A²) X with A = X Xᵀ. A matrix with more rows
// than columns is worked on as its transpose. Drives all singular values towards 1; a zero matrix
// stays zero. O may alias G.
static inline void oracle_orthogonalize(double* O, const double* G, int rows, int cols, double norm,
                                        const double (*abc)[3], int steps) {
    bool flip = rows > cols;
    int m = flip ? cols : rows, n = flip ? rows : cols;
    size_t count = (size_t)m * n, square = (size_t)m * m;
    double *X = oracle_alloc(count), *Y = oracle_alloc(count);
    double *A = oracle_alloc(square), *A2 = oracle_alloc(square);
    for (int i = 0; i < m; i++) for (int j = 0; j < n; j++) {
        X[(size_t)i * n + j] = (flip ? G[(size_t)j * m + i] : G[(size_t)i * n + j]) / norm;
    }
    for (int s = 0; s < steps; s++) {
        oracle_matmul_nt(A, X, X, m, m, n);
        oracle_matmul_nn(A2, A, A, m, m, m);
        for (size_t i = 0; i < square; i++) A[i] = abc[s][1] * A[i] + abc[s][2] * A2[i];
        oracle_matmul_nn(Y, A, X, m, n, m);
        for (size_t i = 0; i < count; i++) X[i] = abc[s][0] * X[i] + Y[i];
    }
    for (int i = 0; i < m; i++) for (int j = 0; j < n; j++) {
        *(flip ? &O[(size_t)j * m + i] : &O[(size_t)i * n + j]) = X[(size_t)i * n + j];
    }
    free(X);
    free(Y);
    free(A);
    free(A2);
}

enum { ORACLE_MAX_NS_STEPS = 16 };

// Newton-Schulz: the same polynomial every time, after X = G / (|G| + eps). With the records' numbers
// the singular values end between about 0.7 and 1.2.
static inline void oracle_newton_schulz(double* O, const double* G, int rows, int cols, int steps,
                                        double a, double b, double c, double eps) {
    double abc[ORACLE_MAX_NS_STEPS][3];
    for (int i = 0; i < steps; i++) abc[i][0] = a, abc[i][1] = b, abc[i][2] = c;
    oracle_orthogonalize(O, G, rows, cols, oracle_norm(G, (size_t)rows * cols) + eps, abc, steps);
}

// sum: buf = mu buf + g, u = g + mu buf (the records up to 11);
// ema: buf += (1-mu)(g - buf), u = g + mu (buf - g) (the later ones). Both Nesterov.
enum { ORACLE_MOMENTUM_SUM = 0, ORACLE_MOMENTUM_EMA = 1 };

static inline void oracle_muon_momentum(double* u, double* buf, const double* g, size_t n,
                                        double mu, int form) {
    for (size_t i = 0; i < n; i++) {
        if (form == ORACLE_MOMENTUM_SUM) {
            buf[i] = mu * buf[i] + g[i];
            u[i] = g[i] + mu * buf[i];
        } else {
            buf[i] += (1.0 - mu) * (g[i] - buf[i]);
            u[i] = g[i] + mu * (buf[i] - g[i]);
        }
    }
}

// max: sqrt(max(rows, cols)) (record 5); ratio: sqrt(max(1, rows/cols)) (records 8 and later)
enum { ORACLE_MUON_SCALE_MAX = 0, ORACLE_MUON_SCALE_RATIO = 1 };

static inline double oracle_muon_scale(int rows, int cols, int kind) {
    if (kind == ORACLE_MUON_SCALE_MAX) return sqrt((double)(rows > cols ? rows : cols));
    return rows > cols ? sqrt((double)rows / cols) : 1.0;
}

// p -= lr scale O, O = Newton-Schulz of the Nesterov momentum
static inline void oracle_muon_update(double* p, double* buf, const double* g, int rows, int cols,
                                      double lr, double mu, int form, int scale_kind) {
    size_t n = (size_t)rows * cols;
    double* u = oracle_alloc(n);
    oracle_muon_momentum(u, buf, g, n, mu, form);
    oracle_newton_schulz(u, u, rows, cols, 5, 3.4445, -4.7750, 2.0315, 1e-7);
    double step = lr * oracle_muon_scale(rows, cols, scale_kind);
    for (size_t i = 0; i < n; i++) p[i] -= step * u[i];
    free(u);
}

// ---- records 20 and 45: masks ----------------------------------------------------------------

// mask(T, T): 1 where query row sees key column. Attention over what a mask leaves, which is at least
// the query itself; mask (B, T, T), or NULL: causal.
static inline void oracle_attention_masked_forward(double* out, const double* q, const double* k,
                                                   const double* v, const uint8_t* mask, int B,
                                                   int T, int H, int D, double scale) {
    if (!mask) {
        oracle_attention_forward(out, NULL, q, k, v, B, T, H, D, scale);
        return;
    }
    double* p = oracle_alloc(T);
    for (int b = 0; b < B; b++) for (int h = 0; h < H; h++) for (int t = 0; t < T; t++) {
        const uint8_t* seen = mask + ((size_t)b * T + t) * T;
        size_t here = (((size_t)b * T + t) * H + h) * D;
        double max = -INFINITY, sum = 0;
        for (int u = 0; u < T; u++) {
            size_t there = (((size_t)b * T + u) * H + h) * D;
            if (!seen[u]) continue;
            p[u] = 0;
            for (int d = 0; d < D; d++) p[u] += scale * q[here + d] * k[there + d];
            if (!(p[u] <= max)) max = p[u];
        }
        for (int u = 0; u < T; u++) sum += seen[u] ? exp(p[u] - max) : 0;
        for (int d = 0; d < D; d++) out[here + d] = 0;
        for (int u = 0; u < T; u++) {
            size_t there = (((size_t)b * T + u) * H + h) * D;
            double weight = seen[u] ? exp(p[u] - max) / sum : 0;
            for (int d = 0; seen[u] && d < D; d++) out[here + d] += weight * v[there + d];
        }
    }
    free(p);
}

// As oracle_attention_backward.
static inline void oracle_attention_masked_backward(double* dq, double* dk, double* dv,
                                                    const double* dout, const double* q,
                                                    const double* k, const double* v,
                                                    const uint8_t* mask, int B, int T, int H, int D,
                                                    double scale) {
    if (!mask) {
        oracle_attention_backward(dq, dk, dv, dout, q, k, v, B, T, H, D, scale);
        return;
    }
    size_t n = (size_t)B * T * H * D;
    double *p = oracle_alloc(T), *dp = oracle_alloc(T);
    for (size_t i = 0; i < n; i++) dq[i] = dk[i] = dv[i] = 0;
    for (int b = 0; b < B; b++) for (int h = 0; h < H; h++) for (int t = 0; t < T; t++) {
        const uint8_t* seen = mask + ((size_t)b * T + t) * T;
        size_t here = (((size_t)b * T + t) * H + h) * D;
        double max = -INFINITY, sum = 0, dot = 0;
        for (int u = 0; u < T; u++) {
            size_t there = (((size_t)b * T + u) * H + h) * D;
            if (!seen[u]) continue;
            p[u] = dp[u] = 0;
            for (int d = 0; d < D; d++) {
                p[u] += scale * q[here + d] * k[there + d];
                dp[u] += dout[here + d] * v[there + d];
            }
            if (!(p[u] <= max)) max = p[u];
        }
        for (int u = 0; u < T; u++) if (seen[u]) p[u] = exp(p[u] - max), sum += p[u];
        for (int u = 0; u < T; u++) if (seen[u]) p[u] /= sum, dot += p[u] * dp[u];
        for (int u = 0; u < T; u++) {
            size_t there = (((size_t)b * T + u) * H + h) * D;
            if (!seen[u]) continue;
            double ds = p[u] * (dp[u] - dot);
            for (int d = 0; d < D; d++) {
                dq[here + d] += scale * ds * k[there + d];
                dk[there + d] += scale * ds * q[here + d];
                dv[there + d] += p[u] * dout[here + d];
            }
        }
    }
    free(p);
    free(dp);
}

// Record 20, word for word: lists of whole blocks of keys, the nearest first, of which a window keeps
// the first few. A token bos opens a document. T is a multiple of block; window counts blocks.
//   full list      every pair of the two blocks is of one document, and the key block lies before
//   partial list   some pair is: the pairs seen are the causal ones of one document
// codes (T/block, T/block), may be NULL: 0 unseen, 1 partial, 2 full
static inline void oracle_block_mask(uint8_t* mask, uint8_t* codes, const int* tokens, int bos,
                                     int T, int block, int window) {
    int blocks = T / block;
    if (T % block != 0) {
        fprintf(stderr, "oracle: %d tokens are no whole number of blocks of %d\n", T, block);
        exit(1);
    }
    int* document = (int*)calloc(T, sizeof(int));
    for (int t = 0, count = 0; t < T; t++) document[t] = count += tokens[t] == bos;
    memset(mask, 0, (size_t)T * T);
    if (codes) memset(codes, 0, (size_t)blocks * blocks);
    for (int q = 0; q < blocks; q++) {
        int q_low = document[q * block], q_high = document[q * block + block - 1];
        int full = 0, partial = 0;
        for (int pass = 0; pass < 2; pass++) {          // count, then take
            int fulls = 0, partials = 0;
            int full_room = full < window - 1 ? full : window - 1;
            int partial_room = window - full > 1 ? window - full : 1;
            for (int k = blocks - 1; k >= 0; k--) {
                int k_low = document[k * block], k_high = document[k * block + block - 1];
                bool is_full = q > k && q_low == k_high && k_low == q_high;
                bool is_partial = q >= k && q_low <= k_high && k_low <= q_high && !is_full;
                bool taken = is_full ? fulls++ < full_room : is_partial && partials++ < partial_room;
                if (pass == 0 || !taken) continue;
                if (codes) codes[q * blocks + k] = is_full ? 2 : 1;
                for (int i = q * block; i < (q + 1) * block; i++) {
                    for (int j = k * block; j < (k + 1) * block; j++) {
                        mask[(size_t)i * T + j] = is_full || (j <= i && document[i] == document[j]);
                    }
                }
            }
            if (pass == 0) full = fulls, partial = partials;
        }
        (void)partial;
    }
    free(document);
}

// Record 45: keys of the same segment of cu_seqlens (0, the running ends, padded with T) that lie at
// most `window` tokens back.
static inline void oracle_window_mask(uint8_t* mask, const int* cu_seqlens, int count, int T,
                                      int window) {
    for (int i = 0; i < T; i++) {
        int start = 0;
        for (int s = 0; s < count; s++) if (cu_seqlens[s] <= i) start = cu_seqlens[s];
        for (int j = 0; j < T; j++) {
            mask[(size_t)i * T + j] = j >= start && j <= i && i - j <= window;
        }
    }
}

// ---- records 20 and 45: rotary frequencies ---------------------------------------------------

// base^(-j/(D/4-1)) for j < D/4, then zeros: half of the pairs do not turn. In float, as the records'
// tensors; torch.linspace counts from both ends.
static inline void oracle_half_frequencies(float* frequencies, int D, double base) {
    int n = D / 4;
    float step = 1.0f / (float)(n - 1);
    for (int j = 0; j < D / 2; j++) {
        volatile float back = step * (float)(n - 1 - j);      // rounded, not fused with the difference
        float exponent = j < n / 2 ? step * (float)j : 1.0f - back;
        frequencies[j] = j < n ? (float)pow(1.0 / base, (double)exponent) : 0.0f;
    }
}

// YaRN, on a change of the window from `before` to `now` tokens: what turns less than once within the
// window is slowed down in proportion, what turns more than 32 times stays.
static inline void oracle_yarn(float* frequencies, int D, double before, double now) {
    float ratio = (float)(before / now);
    for (int j = 0; j < D / 2; j++) {
        float turns = (float)before * frequencies[j] / (float)(2 * 3.141592653589793);
        float weight = (turns - 1.0f) / 31.0f;
        weight = weight < 0 ? 0 : weight > 1 ? 1 : weight;
        volatile float kept = weight * (1.0f - ratio);
        frequencies[j] *= ratio + kept;
    }
}

// The softmax scale on the same change.
static inline double oracle_yarn_scale(double scale, double before, double now) {
    return scale * (1.0 + 0.2 * log(now / before));
}

// ---- record 45: gates ------------------------------------------------------------------------

enum { ORACLE_GATE_INPUTS = 12 };       // channels that a gate reads

static inline double oracle_sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

// raw(N,G) = h(N, 0:12) w(G,12)ᵀ
static inline void oracle_gate_raw(double* raw, const double* h, const double* w, int N, int G,
                                   int C) {
    for (int n = 0; n < N; n++) for (int g = 0; g < G; g++) {
        double sum = 0;
        for (int i = 0; i < ORACLE_GATE_INPUTS; i++) {
            sum += h[(size_t)n * C + i] * w[g * ORACLE_GATE_INPUTS + i];
        }
        raw[(size_t)n * G + g] = sum;
    }
}

// dh(N, 0:12) += draw w, dw += drawᵀ h
static inline void oracle_gate_raw_backward(double* dh, double* dw, const double* draw,
                                            const double* h, const double* w, int N, int G, int C) {
    for (int n = 0; n < N; n++) for (int g = 0; g < G; g++) {
        double d = draw[(size_t)n * G + g];
        for (int i = 0; i < ORACLE_GATE_INPUTS; i++) {
            dh[(size_t)n * C + i] += d * w[g * ORACLE_GATE_INPUTS + i];
            dw[g * ORACLE_GATE_INPUTS + i] += d * h[(size_t)n * C + i];
        }
    }
}

// y = x sigmoid(raw), one raw value for each run of D elements; y may alias x
static inline void oracle_gate_forward(double* y, const double* x, const double* raw, int runs,
                                       int D) {
    for (size_t i = 0; i < (size_t)runs * D; i++) y[i] = x[i] * oracle_sigmoid(raw[i / D]);
}

// dx may alias dy
static inline void oracle_gate_backward(double* dx, double* draw, const double* dy, const double* x,
                                        const double* raw, int runs, int D) {
    for (int r = 0; r < runs; r++) {
        double gate = oracle_sigmoid(raw[r]), sum = 0;
        for (int d = 0; d < D; d++) {
            size_t i = (size_t)r * D + d;
            sum += dy[i] * x[i];
            dx[i] = dy[i] * gate;
        }
        draw[r] = sum * gate * (1.0 - gate);
    }
}

// y_t = x_t + lambda sigmoid(raw_t) x_(t-1); the first of each T tokens stays as it is
static inline void oracle_smear_forward(double* y, const double* x, const double* raw, double lambda,
                                        int N, int T, int C) {
    for (int n = 0; n < N; n++) for (int c = 0; c < C; c++) {
        size_t i = (size_t)n * C + c;
        y[i] = x[i] + (n % T == 0 ? 0 : lambda * oracle_sigmoid(raw[n]) * x[i - C]);
    }
}

// dx without what comes through raw; draw is zero for the first tokens. dx does not alias dy.
static inline void oracle_smear_backward(double* dx, double* draw, double* dlambda, const double* dy,
                                         const double* x, const double* raw, double lambda, int N,
                                         int T, int C) {
    memcpy(dx, dy, (size_t)N * C * sizeof(double));
    for (int n = 0; n < N; n++) {
        double gate = oracle_sigmoid(raw[n]), sum = 0;
        draw[n] = 0;
        if (n % T == 0) continue;
        for (int c = 0; c < C; c++) {
            size_t i = (size_t)n * C + c;
            sum += dy[i] * x[i - C];
            dx[i - C] += lambda * gate * dy[i];
        }
        draw[n] = lambda * sum * gate * (1.0 - gate);
        *dlambda += gate * sum;
    }
}

// ---- records 20 and 45: FP8 ------------------------------------------------------------------

// To the nearest number with `bits` bits behind the leading one, ties to even; below 2^min_exponent the
// spacing stays; beyond max it is max. e4m3: 3, -6, 448; e5m2: 2, -14, 57344.
static inline double oracle_round_small(double x, int bits, int min_exponent, double max) {
    if (x == 0 || isnan(x)) return x;
    int exponent = ilogb(x) > min_exponent ? ilogb(x) : min_exponent;
    double unit = ldexp(1.0, exponent - bits), y = nearbyint(x / unit) * unit;
    return y > max ? max : y < -max ? -max : y;
}

static inline double oracle_e4m3(double x) { return oracle_round_small((float)x, 3, -6, 448); }
static inline double oracle_e5m2(double x) { return oracle_round_small((float)x, 2, -14, 57344); }

// ---- record 45: NorMuon ----------------------------------------------------------------------

// Newton-Schulz with another polynomial at every step ("Polar Express") and a norm enlarged by 2 %.
static inline void oracle_polar_express(double* O, const double* G, int rows, int cols) {
    static const double ABC[5][3] = {
        {8.156554524902461, -22.48329292557795, 15.878769915207462},
        {4.042929935166739, -2.808917465908714, 0.5000178451051316},
        {3.8916678022926607, -2.772484153217685, 0.5060648178503393},
        {3.285753657755655, -2.3681294933425376, 0.46449024233003106},
        {2.3465413258596377, -1.7097828382687081, 0.42323551169305323},
    };
    double norm = 1.02 * oracle_norm(G, (size_t)rows * cols) + 1e-6;
    oracle_orthogonalize(O, G, rows, cols, norm, ABC, 5);
}

typedef struct {
    double lr, factor;      // the step is lr factor; the decay inside knows lr alone
    double momentum, beta2, decay;
    bool by_row;            // one second moment for each row instead of each column
    bool bf16_value;        // p, momentum and second moment are kept in bf16
} OracleNorMuon;

// O = Polar Express of the lerp momentum; divided by the root of the running mean of its squares in
// each column (or row) and brought back to its norm; + decay lr p where that does not turn the sign;
// p -= lr factor O. second: cols (or rows) numbers, from 0.
static inline void oracle_normuon_update(double* p, double* buf, double* second, const double* g,
                                         int rows, int cols, const OracleNorMuon* a) {
    size_t n = (size_t)rows * cols;
    double* O = oracle_alloc(n);
    oracle_muon_momentum(O, buf, g, n, a->momentum, ORACLE_MOMENTUM_EMA);
    oracle_polar_express(O, O, rows, cols);
    double before = oracle_norm(O, n);
    int lines = a->by_row ? rows : cols, length = a->by_row ? cols : rows;
    for (int i = 0; i < lines; i++) {
        double mean = 0;
        for (int k = 0; k < length; k++) {
            double x = a->by_row ? O[(size_t)i * cols + k] : O[(size_t)k * cols + i];
            mean += x * x / length;
        }
        second[i] += (1.0 - a->beta2) * (mean - second[i]);
    }
    for (size_t i = 0; i < n; i++) {
        double v = second[a->by_row ? i / cols : i % cols];
        O[i] /= sqrt(v > 1e-10 ? v : 1e-10);
    }
    double after = oracle_norm(O, n);
    for (size_t i = 0; i < n; i++) {
        O[i] *= before / (after > 1e-10 ? after : 1e-10);
        if (O[i] * p[i] >= 0) O[i] += a->decay * a->lr * p[i];
        p[i] -= a->lr * a->factor * O[i];
        if (a->bf16_value) p[i] = oracle_round_bf16(p[i]), buf[i] = oracle_round_bf16(buf[i]);
    }
    for (int i = 0; i < lines && a->bf16_value; i++) second[i] = oracle_round_bf16(second[i]);
    free(O);
}

// ---- the whole model -------------------------------------------------------------------------

/*
    e = wte[token]; normuon: e = smear(e); all but modern: x0 = rms(e); x = x0
    layer l:  unet, sub3, l >= L/2: x += skip_weights[l - L/2] out[L-1-l]
              normuon, l = 7: x += sigmoid(skip_gates[0]) out[4]
              unet, sub3, normuon: x = lambdas[0] x + lambdas[1] x0
              h = rms(x); q k v = h Wqᵀ, h Wkᵀ, h Wvᵀ; q, k = norm and rotary per head
              unet, l > 0: v = (1 - lamb) v + lamb v of layer 0
              sub3, normuon: v = a[0] v + a[1] value_embeds[token], a = attn.lambdas; without a table a[0] v
              y = attention(q, k, v); normuon: y *= sigmoid(attn.gate h[0:12]) per head
              x += y Woᵀ
              x += relu2(rms(x) Wfcᵀ) Wprojᵀ; out[l] = x
    normuon: x -= backout.lambda out[8]
    z = rms(x) headᵀ; tied: head = wte; softcap: unet 30 tanh(z / 30), sub3, normuon 30 sigmoid(z / 7.5)
modern rotates and then norms q and k, the others norm first. sub3 has no attention in layer 7, normuon
neither that nor a layer 0. Attention: causal with 1/sqrt(D), unless mask and attn_scale are set;
layers 0, 4 and 11 (sub3), 4 and 11 (normuon) see the long window, mask[1].

Every parameter, gradient, activation and activation gradient is an array under its golden name:
param.h.0.attn.c_q.weight, grad.h.0.attn.c_q.weight, act.h0.q_lin, dact.h0.out, logits0. Parameters
carry the trainer's names, which golden.h translates.
*/
enum { ORACLE_MODERN, ORACLE_UNTIED, ORACLE_UNET, ORACLE_SUB3, ORACLE_NORMUON };
enum { ORACLE_MAX_LAYERS = 64, ORACLE_VALUE_TABLES = 3 };

typedef struct {
    char name[64];
    double* x;
    size_t n;
} OracleArray;

typedef struct {
    bool exists, attention, wide;   // wide: sees the long window
    int values;                     // value table mixed into v, -1: none
    int skip, skip_weight;          // layer whose output is added on entry, -1: none; place of its weight
} OracleLayer;

typedef struct {
    int recipe, V, C, H, L, rows;   // rows: of the embedding and value tables
    double eps, attn_scale;         // 0: 1/sqrt(D)
    bool norm_first, rope_bf16;
    bool loss_sum;                  // gradients are of the summed loss, not of the mean
    OracleLayer plan[ORACLE_MAX_LAYERS];
    int skips, backout;             // backout: layer whose output is subtracted at the end, -1: none
    float frequencies[ORACLE_MAX_HEAD / 2];
    const uint8_t* mask[2];         // (B, T, T) of the short and the long window, NULL: causal
    struct {
        bool on;
        double x, w, grad;          // scales before the cast
    } fp8;
    OracleArray* arrays;
    int count, capacity;
} OracleModel;

// The array of that name, NULL if there is none.
static inline OracleArray* oracle_find(const OracleModel* m, const char* name) {
    for (int i = 0; i < m->count; i++) {
        if (!strcmp(m->arrays[i].name, name)) return &m->arrays[i];
    }
    return NULL;
}

// The array named by format and layer, made or resized to n elements. n = 0: it has to exist.
static inline double* oracle_array(OracleModel* m, const char* format, int l, size_t n) {
    char name[64];
    snprintf(name, sizeof name, format, l);
    OracleArray* a = oracle_find(m, name);
    if (!a && n == 0) {
        fprintf(stderr, "oracle: no array is named %s\n", name);
        exit(1);
    }
    if (!a) {
        if (m->count == m->capacity) {
            m->capacity = m->capacity ? 2 * m->capacity : 64;
            m->arrays = (OracleArray*)realloc(m->arrays, m->capacity * sizeof(OracleArray));
        }
        a = &m->arrays[m->count++];
        memset(a, 0, sizeof *a);
        memcpy(a->name, name, sizeof name);
    }
    if (n != 0 && a->n != n) {
        free(a->x);
        a->x = oracle_alloc(n);
        a->n = n;
    }
    return a->x;
}

static inline double* oracle_weight(OracleModel* m, const char* format, int l) {
    char name[64];
    snprintf(name, sizeof name, "param.%s", format);
    return oracle_array(m, name, l, 0);
}

static inline double* oracle_grad(OracleModel* m, const char* format, int l) {
    char name[64];
    snprintf(name, sizeof name, "grad.%s", format);
    return oracle_array(m, name, l, 0);
}

static inline void oracle_model_tensor(OracleModel* m, const char* format, int l, size_t n) {
    char name[64];
    snprintf(name, sizeof name, "param.%s", format);
    oracle_array(m, name, l, n);
    snprintf(name, sizeof name, "grad.%s", format);
    oracle_array(m, name, l, n);
}

// What each layer of a recipe is. The layer numbers of sub3 and normuon belong to 12 layers.
static inline void oracle_model_plan(OracleModel* m) {
    bool sub3 = m->recipe == ORACLE_SUB3, normuon = m->recipe == ORACLE_NORMUON;
    m->backout = normuon ? 8 : -1;
    for (int l = 0; l < m->L; l++) {
        OracleLayer* layer = &m->plan[l];
        layer->exists = !(normuon && l == 0);
        layer->attention = layer->exists && !((sub3 || normuon) && l == 7);
        layer->wide = (sub3 && l == 0) || l == 4 || l == 11;
        layer->values = layer->skip = layer->skip_weight = -1;
        if ((sub3 && l <= 2) || (normuon && (l == 1 || l == 2))) layer->values = l;
        if ((sub3 || normuon) && l >= 9) layer->values = l - 9;
        if ((sub3 || m->recipe == ORACLE_UNET) && l >= m->L / 2) layer->skip = m->L - 1 - l;
        if (normuon && l == 7) layer->skip = 4;
        if (layer->skip >= 0) layer->skip_weight = m->skips++;
    }
}

static inline bool oracle_has_lambdas(const OracleModel* m) { return m->recipe >= ORACLE_UNET; }
static inline bool oracle_has_values(const OracleModel* m) { return m->recipe >= ORACLE_SUB3; }

// All parameters zero; set them through oracle_weight or by name. rows: of the tables, if they have
// fewer than the head has columns.
static inline void oracle_model_init_rows(OracleModel* m, int recipe, int rows, int V, int C, int H,
                                          int L, bool rope_bf16) {
    memset(m, 0, sizeof *m);
    m->recipe = recipe, m->V = V, m->C = C, m->H = H, m->L = L, m->rows = rows;
    m->eps = 0x1p-23;
    m->norm_first = recipe != ORACLE_MODERN;
    m->rope_bf16 = rope_bf16;
    m->loss_sum = recipe == ORACLE_NORMUON;
    bool late = recipe == ORACLE_SUB3 || recipe == ORACLE_NORMUON;
    if (late ? L != 12 : recipe == ORACLE_UNET && L % 2 != 0) {
        fprintf(stderr, "oracle: unet needs an even number of layers, sub3 and normuon 12; got %d\n", L);
        exit(1);
    }
    if (late) oracle_half_frequencies(m->frequencies, C / H, 1024.0);
    else oracle_frequencies(m->frequencies, C / H, 10000.0f);
    if (recipe == ORACLE_SUB3) m->attn_scale = 0.12;
    if (recipe == ORACLE_NORMUON) m->attn_scale = 0.1;
    oracle_model_plan(m);
    size_t square = (size_t)C * C;
    oracle_model_tensor(m, "wte.weight", 0, (size_t)rows * C);
    for (int i = 0; i < ORACLE_VALUE_TABLES && late; i++) {
        oracle_model_tensor(m, "value_embeds.%d.weight", i, (size_t)rows * C);
    }
    for (int l = 0; l < L; l++) {
        if (!m->plan[l].exists) continue;
        if (m->plan[l].attention) {
            oracle_model_tensor(m, "h.%d.attn.c_q.weight", l, square);
            oracle_model_tensor(m, "h.%d.attn.c_k.weight", l, square);
            oracle_model_tensor(m, "h.%d.attn.c_v.weight", l, square);
            oracle_model_tensor(m, "h.%d.attn.c_proj.weight", l, square);
            if (recipe == ORACLE_UNET) oracle_model_tensor(m, "h.%d.attn.lamb", l, 1);
            if (late) oracle_model_tensor(m, "h.%d.attn.lambdas", l, 2);
            if (recipe == ORACLE_NORMUON) {
                oracle_model_tensor(m, "h.%d.attn.gate.weight", l, (size_t)H * ORACLE_GATE_INPUTS);
            }
        }
        oracle_model_tensor(m, "h.%d.mlp.c_fc.weight", l, 4 * square);
        oracle_model_tensor(m, "h.%d.mlp.c_proj.weight", l, 4 * square);
        if (oracle_has_lambdas(m)) oracle_model_tensor(m, "h.%d.lambdas", l, 2);
    }
    bool gated = recipe == ORACLE_NORMUON;
    if (m->skips) oracle_model_tensor(m, gated ? "skip_gates" : "skip_weights", 0, m->skips);
    if (recipe == ORACLE_NORMUON) {
        oracle_model_tensor(m, "smear.gate.weight", 0, ORACLE_GATE_INPUTS);
        oracle_model_tensor(m, "smear.lambda", 0, 1);
        oracle_model_tensor(m, "backout.lambda", 0, 1);
    }
    if (recipe != ORACLE_MODERN) oracle_model_tensor(m, "lm_head.weight", 0, (size_t)V * C);
}

static inline void oracle_model_init(OracleModel* m, int recipe, int V, int C, int H, int L,
                                     bool rope_bf16) {
    oracle_model_init_rows(m, recipe, V, V, C, H, L, rope_bf16);
}

static inline void oracle_model_free(OracleModel* m) {
    for (int i = 0; i < m->count; i++) free(m->arrays[i].x);
    free(m->arrays);
    memset(m, 0, sizeof *m);
}

static inline double oracle_attn_scale(const OracleModel* m) {
    return m->attn_scale != 0 ? m->attn_scale : 1.0 / sqrt((double)(m->C / m->H));
}

// The last layer before l that exists, -1 if there is none.
static inline int oracle_layer_before(const OracleModel* m, int l) {
    do l--; while (l >= 0 && !m->plan[l].exists);
    return l;
}

// The stream on its way out of layer l; -1: into the first.
static inline double* oracle_stream(OracleModel* m, int l) {
    return l < 0 ? oracle_array(m, "act.x0", 0, 0) : oracle_array(m, "act.h%d.out", l, 0);
}

// The looked-up rows of wte, before a norm; or their gradient.
static inline double* oracle_embedded(OracleModel* m, bool gradient, size_t n) {
    bool modern = m->recipe == ORACLE_MODERN;
    return oracle_array(m, gradient ? (modern ? "dact.emb" : "dact.embed_raw")
                                    : (modern ? "act.emb" : "act.embed_raw"), 0, n);
}

// The weight of the skip into layer l: as it stands, or the sigmoid of a gate.
static inline double oracle_skip_weight(OracleModel* m, int l) {
    bool gated = m->recipe == ORACLE_NORMUON;
    double s = oracle_weight(m, gated ? "skip_gates" : "skip_weights", 0)[m->plan[l].skip_weight];
    return gated ? oracle_sigmoid(s) : s;
}

// One of q and k: act.h<l>.{q,k}_{lin,norm,rot}; returns the last of them, what attention reads.
static inline double* oracle_model_qk(OracleModel* m, char which, int l, const double* h, int B,
                                      int T) {
    int N = B * T, C = m->C, D = C / m->H;
    size_t n = (size_t)N * C;
    const double *cos_table = oracle_array(m, "cos", 0, 0), *sin_table = oracle_array(m, "sin", 0, 0);
    bool q = which == 'q';
    double* lin = oracle_array(m, q ? "act.h%d.q_lin" : "act.h%d.k_lin", l, n);
    double* norm = oracle_array(m, q ? "act.h%d.q_norm" : "act.h%d.k_norm", l, n);
    double* rot = oracle_array(m, q ? "act.h%d.q_rot" : "act.h%d.k_rot", l, n);
    const double* w = oracle_weight(m, q ? "h.%d.attn.c_q.weight" : "h.%d.attn.c_k.weight", l);
    oracle_matmul_nt(lin, h, w, N, C, C);
    if (m->norm_first) {
        oracle_rmsnorm_forward(norm, NULL, lin, N * m->H, D, m->eps);
        oracle_rotary_forward(rot, norm, cos_table, sin_table, B, T, m->H, D);
        return rot;
    }
    oracle_rotary_forward(rot, lin, cos_table, sin_table, B, T, m->H, D);
    oracle_rmsnorm_forward(norm, NULL, rot, N * m->H, D, m->eps);
    return norm;
}

// What is mixed into the values of layer l and with which weights: NULL if nothing is.
static inline double* oracle_mixed_values(OracleModel* m, int l, size_t n) {
    if (m->recipe == ORACLE_UNET && l > 0) return oracle_array(m, "act.h%d.v_lin", 0, 0);
    if (!oracle_has_values(m)) return NULL;
    if (m->plan[l].values >= 0) return oracle_array(m, "ve%d", m->plan[l].values, 0);
    return oracle_array(m, "ve.none", 0, n);        // zeros
}

static inline void oracle_attention_layer_forward(OracleModel* m, double* out, int l,
                                                  const double* h, int B, int T) {
    int N = B * T, C = m->C, D = C / m->H;
    size_t n = (size_t)N * C;
    const double* q = oracle_model_qk(m, 'q', l, h, B, T);
    const double* k = oracle_model_qk(m, 'k', l, h, B, T);
    double* v_lin = oracle_array(m, "act.h%d.v_lin", l, n);
    double* v = oracle_array(m, "act.h%d.v_mix", l, n);
    oracle_matmul_nt(v_lin, h, oracle_weight(m, "h.%d.attn.c_v.weight", l), N, C, C);
    memcpy(v, v_lin, n * sizeof(double));
    const double* other = oracle_mixed_values(m, l, n);
    if (other && oracle_has_values(m)) {
        oracle_mix_forward(v, v_lin, other, oracle_weight(m, "h.%d.attn.lambdas", l),
                           ORACLE_MIX_PAIR, N, C);
    } else if (other) {
        oracle_mix_forward(v, v_lin, other, oracle_weight(m, "h.%d.attn.lamb", l), ORACLE_MIX_LERP, N,
                           C);
    }
    double* y = oracle_array(m, "act.h%d.attn_y", l, n);
    oracle_attention_masked_forward(y, q, k, v, m->mask[m->plan[l].wide], B, T, m->H, D,
                                    oracle_attn_scale(m));
    if (m->recipe == ORACLE_NORMUON) {
        double* raw = oracle_array(m, "act.h%d.gate_raw", l, (size_t)N * m->H);
        oracle_gate_raw(raw, h, oracle_weight(m, "h.%d.attn.gate.weight", l), N, m->H, C);
        double* gated = oracle_array(m, "act.h%d.attn_y_gated", l, n);
        oracle_gate_forward(gated, y, raw, N * m->H, D);
        y = gated;
    }
    oracle_matmul_nt(out, y, oracle_weight(m, "h.%d.attn.c_proj.weight", l), N, C, C);
}

static inline void oracle_layer_forward(OracleModel* m, int l, int B, int T) {
    int N = B * T, C = m->C;
    size_t n = (size_t)N * C;
    const OracleLayer* layer = &m->plan[l];
    double* in = oracle_array(m, "act.h%d.in", l, n);
    memcpy(in, oracle_stream(m, oracle_layer_before(m, l)), n * sizeof(double));
    if (layer->skip >= 0) {
        double weight = oracle_skip_weight(m, l);
        oracle_mix_forward(in, in, oracle_stream(m, layer->skip), &weight, ORACLE_MIX_SKIP, N, C);
    }
    double* x = oracle_array(m, "act.h%d.mix", l, n);
    memcpy(x, in, n * sizeof(double));
    if (oracle_has_lambdas(m)) {
        oracle_mix_forward(x, in, oracle_array(m, "act.x0", 0, 0),
                           oracle_weight(m, "h.%d.lambdas", l), ORACLE_MIX_PAIR, N, C);
    }

    double* after = oracle_array(m, "act.h%d.after_attn", l, n);
    memcpy(after, x, n * sizeof(double));
    if (layer->attention) {
        double* h = oracle_array(m, "act.h%d.attn_in", l, n);
        double* attn_out = oracle_array(m, "act.h%d.attn_out", l, n);
        oracle_rmsnorm_forward(h, oracle_array(m, "rstd.h%d.attn_in", l, N), x, N, C, m->eps);
        oracle_attention_layer_forward(m, attn_out, l, h, B, T);
        oracle_residual_add(after, x, attn_out, n);
    }

    double* mlp_in = oracle_array(m, "act.h%d.mlp_in", l, n);
    oracle_rmsnorm_forward(mlp_in, oracle_array(m, "rstd.h%d.mlp_in", l, N), after, N, C, m->eps);
    double* fc = oracle_array(m, "act.h%d.fc", l, 4 * n);
    oracle_matmul_nt(fc, mlp_in, oracle_weight(m, "h.%d.mlp.c_fc.weight", l), N, 4 * C, C);
    double* relu2 = oracle_array(m, "act.h%d.relu2", l, 4 * n);
    oracle_relu2_forward(relu2, fc, 4 * n);
    double* mlp_out = oracle_array(m, "act.h%d.mlp_out", l, n);
    oracle_matmul_nt(mlp_out, relu2, oracle_weight(m, "h.%d.mlp.c_proj.weight", l), N, C, 4 * C);
    oracle_residual_add(oracle_array(m, "act.h%d.out", l, n), after, mlp_out, n);
}

// From tokens to x0, and the value tables' rows.
static inline void oracle_embeddings_forward(OracleModel* m, const int* tokens, int N, int T) {
    int C = m->C;
    size_t n = (size_t)N * C;
    double* emb = oracle_embedded(m, false, n);
    double* x0 = oracle_array(m, "act.x0", 0, n);
    oracle_embedding_forward(emb, oracle_weight(m, "wte.weight", 0), tokens, N, C);
    if (m->recipe == ORACLE_NORMUON) {
        double* raw = oracle_array(m, "smear.raw", 0, N);
        double* smeared = oracle_array(m, "act.smear", 0, n);
        oracle_gate_raw(raw, emb, oracle_weight(m, "smear.gate.weight", 0), N, 1, C);
        oracle_smear_forward(smeared, emb, raw, *oracle_weight(m, "smear.lambda", 0), N, T, C);
        emb = smeared;
    }
    memcpy(x0, emb, n * sizeof(double));
    if (m->recipe != ORACLE_MODERN) {
        oracle_rmsnorm_forward(x0, oracle_array(m, "rstd.x0", 0, N), emb, N, C, m->eps);
    }
    for (int i = 0; i < ORACLE_VALUE_TABLES && oracle_has_values(m); i++) {
        oracle_embedding_forward(oracle_array(m, "ve%d", i, n),
                                 oracle_weight(m, "value_embeds.%d.weight", i), tokens, N, C);
    }
}

// The head's two factors as FP8 sees them, still times their scales.
static inline void oracle_fp8_factors(OracleModel* m, const double* x, int N) {
    size_t n = (size_t)N * m->C, weights = (size_t)m->V * m->C;
    const double* w = oracle_weight(m, "lm_head.weight", 0);
    double *x8 = oracle_array(m, "fp8.x", 0, n), *w8 = oracle_array(m, "fp8.w", 0, weights);
    for (size_t i = 0; i < n; i++) x8[i] = oracle_e4m3(x[i] * m->fp8.x);
    for (size_t i = 0; i < weights; i++) w8[i] = oracle_e4m3(w[i] * m->fp8.w);
}

// Returns the mean loss; dact.logits_raw holds its gradient afterwards (of the sum, if loss_sum).
static inline double oracle_model_forward(OracleModel* m, const int* tokens, const int* targets,
                                          int B, int T) {
    int N = B * T, C = m->C, V = m->V, D = C / m->H;
    size_t n = (size_t)N * C, logits_count = (size_t)N * V;
    double* cos_table = oracle_array(m, "cos", 0, (size_t)T * D / 2);
    double* sin_table = oracle_array(m, "sin", 0, (size_t)T * D / 2);
    oracle_frequency_tables(cos_table, sin_table, m->frequencies, T, D, m->rope_bf16);
    oracle_embeddings_forward(m, tokens, N, T);
    for (int l = 0; l < m->L; l++) {
        if (m->plan[l].exists) oracle_layer_forward(m, l, B, T);
    }

    double* x = oracle_stream(m, m->L - 1);
    if (m->backout >= 0) {
        double minus = -*oracle_weight(m, "backout.lambda", 0);
        double* back = oracle_array(m, "act.backout", 0, n);
        oracle_mix_forward(back, x, oracle_stream(m, m->backout), &minus, ORACLE_MIX_SKIP, N, C);
        x = back;
    }
    double* last = oracle_array(m, "act.final_norm", 0, n);
    oracle_rmsnorm_forward(last, oracle_array(m, "rstd.final_norm", 0, N), x, N, C, m->eps);
    double* logits = oracle_array(m, "logits0", 0, logits_count);
    bool tied = m->recipe == ORACLE_MODERN;
    if (m->fp8.on) {
        oracle_fp8_factors(m, last, N);
        oracle_matmul_nt(logits, oracle_array(m, "fp8.x", 0, 0), oracle_array(m, "fp8.w", 0, 0), N, V, C);
        double scale = m->fp8.x * m->fp8.w;
        for (size_t i = 0; i < logits_count; i++) logits[i] = oracle_round_bf16(logits[i] / scale);
    } else {
        oracle_matmul_nt(logits, last, oracle_weight(m, tied ? "wte.weight" : "lm_head.weight", 0), N,
                         V, C);
    }
    int cap = m->recipe == ORACLE_UNET ? ORACLE_SOFTCAP_TANH
            : m->recipe > ORACLE_UNET ? ORACLE_SOFTCAP_SIGMOID : ORACLE_SOFTCAP_NONE;
    double* losses = oracle_array(m, "losses", 0, N);
    oracle_cross_entropy(oracle_array(m, "dact.logits_raw", 0, logits_count), losses, logits, targets, N,
                         V, cap, 30.0, m->loss_sum ? 1.0 : 1.0 / N);
    return oracle_sum(losses, N) / N;
}

// dx(N,K) = dy(N,M) w(M,K), dw(M,K) += dyᵀ x
static inline void oracle_linear_backward(OracleModel* m, double* dx, const char* weight, int l,
                                          const double* dy, const double* x, int N, int M, int K) {
    oracle_matmul_nn(dx, dy, oracle_weight(m, weight, l), N, K, M);
    oracle_matmul_tn(oracle_grad(m, weight, l), dy, x, M, K, N, 1.0);
}

// dh = d loss / d act.h<l>.attn_in of dx = d loss / d act.h<l>.attn_out. Adds to dact.h0.v_lin or
// dact.ve<i>, where values are mixed in.
static inline void oracle_attention_layer_backward(OracleModel* m, double* dh, const double* dx,
                                                   int l, int B, int T) {
    int N = B * T, C = m->C, D = C / m->H;
    size_t n = (size_t)N * C;
    bool normuon = m->recipe == ORACLE_NORMUON;
    double *dq = oracle_alloc(n), *dk = oracle_alloc(n), *dv = oracle_alloc(n);
    double *dy = oracle_alloc(n), *d = oracle_alloc(n);
    const double* h = oracle_array(m, "act.h%d.attn_in", l, 0);
    const char* qk = m->norm_first ? "act.h%d.q_rot" : "act.h%d.q_norm";
    const double* q = oracle_array(m, qk, l, 0);
    qk = m->norm_first ? "act.h%d.k_rot" : "act.h%d.k_norm";
    const double* k = oracle_array(m, qk, l, 0);
    const double *cos_table = oracle_array(m, "cos", 0, 0), *sin_table = oracle_array(m, "sin", 0, 0);
    const double* y = oracle_array(m, "act.h%d.attn_y", l, 0);
    memset(dh, 0, n * sizeof(double));

    oracle_linear_backward(m, dy, "h.%d.attn.c_proj.weight", l, dx,
                           normuon ? oracle_array(m, "act.h%d.attn_y_gated", l, 0) : y, N, C, C);
    if (normuon) {
        double* draw = oracle_alloc((size_t)N * m->H);
        oracle_gate_backward(dy, draw, dy, y, oracle_array(m, "act.h%d.gate_raw", l, 0), N * m->H, D);
        oracle_gate_raw_backward(dh, oracle_grad(m, "h.%d.attn.gate.weight", l), draw, h,
                                 oracle_weight(m, "h.%d.attn.gate.weight", l), N, m->H, C);
        free(draw);
    }
    oracle_attention_masked_backward(dq, dk, dv, dy, q, k, oracle_array(m, "act.h%d.v_mix", l, 0),
                                     m->mask[m->plan[l].wide], B, T, m->H, D, oracle_attn_scale(m));
    double* dv_lin = oracle_array(m, "dact.h%d.v_lin", l, 0);
    const double *v_lin = oracle_array(m, "act.h%d.v_lin", l, 0), *other = oracle_mixed_values(m, l, n);
    if (other && oracle_has_values(m)) {
        int table = m->plan[l].values;
        double* dother = table >= 0 ? oracle_array(m, "dact.ve%d", table, 0)
                                    : oracle_array(m, "dve.none", 0, n);
        oracle_mix_backward(dv_lin, dother, oracle_grad(m, "h.%d.attn.lambdas", l), dv, v_lin, other,
                            oracle_weight(m, "h.%d.attn.lambdas", l), ORACLE_MIX_PAIR, N, C);
    } else if (other) {
        oracle_mix_backward(dv_lin, oracle_array(m, "dact.h%d.v_lin", 0, 0),
                            oracle_grad(m, "h.%d.attn.lamb", l), dv, v_lin, other,
                            oracle_weight(m, "h.%d.attn.lamb", l), ORACLE_MIX_LERP, N, C);
    } else {
        oracle_residual_add(dv_lin, dv_lin, dv, n);
    }
    oracle_linear_backward(m, dy, "h.%d.attn.c_v.weight", l, dv_lin, h, N, C, C);
    oracle_residual_add(dh, dh, dy, n);
    oracle_qknorm_rotary_backward(d, dq, oracle_array(m, "act.h%d.q_lin", l, 0), cos_table,
                                  sin_table, B, T, m->H, D, m->eps, m->norm_first);
    oracle_linear_backward(m, dy, "h.%d.attn.c_q.weight", l, d, h, N, C, C);
    oracle_residual_add(dh, dh, dy, n);
    oracle_qknorm_rotary_backward(d, dk, oracle_array(m, "act.h%d.k_lin", l, 0), cos_table,
                                  sin_table, B, T, m->H, D, m->eps, m->norm_first);
    oracle_linear_backward(m, dy, "h.%d.attn.c_k.weight", l, d, h, N, C, C);
    oracle_residual_add(dh, dh, dy, n);
    free(dq);
    free(dk);
    free(dv);
    free(dy);
    free(d);
}

// dx: d loss / d act.h<l>.out on entry, d loss / d act.h<l>.in on return. Adds to dact.x0 and, through
// a skip, to dact.h<from>.out.
static inline void oracle_layer_backward(OracleModel* m, double* dx, int l, int B, int T) {
    int N = B * T, C = m->C;
    size_t n = (size_t)N * C;
    const OracleLayer* layer = &m->plan[l];
    double *big = oracle_alloc(4 * n), *dh = oracle_alloc(n);

    oracle_linear_backward(m, big, "h.%d.mlp.c_proj.weight", l, dx,
                           oracle_array(m, "act.h%d.relu2", l, 0), N, C, 4 * C);
    oracle_relu2_backward(big, big, oracle_array(m, "act.h%d.fc", l, 0), 4 * n);
    oracle_linear_backward(m, dh, "h.%d.mlp.c_fc.weight", l, big,
                           oracle_array(m, "act.h%d.mlp_in", l, 0), N, 4 * C, C);
    oracle_rmsnorm_backward(dx, dh, oracle_array(m, "act.h%d.mlp_in", l, 0),
                            oracle_array(m, "rstd.h%d.mlp_in", l, 0), N, C, true);
    if (layer->attention) {
        oracle_attention_layer_backward(m, dh, dx, l, B, T);
        oracle_rmsnorm_backward(dx, dh, oracle_array(m, "act.h%d.attn_in", l, 0),
                                oracle_array(m, "rstd.h%d.attn_in", l, 0), N, C, true);
    }
    if (oracle_has_lambdas(m)) {
        oracle_mix_backward(dx, oracle_array(m, "dact.x0", 0, 0), oracle_grad(m, "h.%d.lambdas", l),
                            dx, oracle_array(m, "act.h%d.in", l, 0), oracle_array(m, "act.x0", 0, 0),
                            oracle_weight(m, "h.%d.lambdas", l), ORACLE_MIX_PAIR, N, C);
    }
    if (layer->skip >= 0) {
        // The stream before the skip is not used by this mode's derivatives.
        bool gated = m->recipe == ORACLE_NORMUON;
        double weight = oracle_skip_weight(m, l), dweight = 0;
        const double* from = oracle_stream(m, layer->skip);
        oracle_mix_backward(dx, oracle_array(m, "dact.h%d.out", layer->skip, 0), &dweight, dx, from,
                            from, &weight, ORACLE_MIX_SKIP, N, C);
        oracle_grad(m, gated ? "skip_gates" : "skip_weights", 0)[layer->skip_weight] +=
            dweight * (gated ? weight * (1.0 - weight) : 1.0);
    }
    free(big);
    free(dh);
}

// From the gradient of the logits to that of the last stream, and the head's.
static inline void oracle_head_backward(OracleModel* m, double* dx, int N) {
    int C = m->C, V = m->V;
    size_t n = (size_t)N * C, logits = (size_t)N * V;
    const double *dlogits = oracle_array(m, "dact.logits_raw", 0, 0),
                 *last = oracle_array(m, "act.final_norm", 0, 0);
    double* dlast = oracle_alloc(n);
    if (m->fp8.on) {
        double* g8 = oracle_array(m, "fp8.g", 0, logits);
        double* dw = oracle_grad(m, "lm_head.weight", 0);
        for (size_t i = 0; i < logits; i++) {
            g8[i] = oracle_e5m2(oracle_round_bf16(dlogits[i]) * m->fp8.grad);
        }
        oracle_matmul_nn(dlast, g8, oracle_array(m, "fp8.w", 0, 0), N, C, V);
        oracle_matmul_tn(dw, g8, oracle_array(m, "fp8.x", 0, 0), V, C, N, 0.0);
        for (size_t i = 0; i < n; i++) dlast[i] = oracle_round_bf16(dlast[i] / (m->fp8.grad * m->fp8.w));
        for (size_t i = 0; i < (size_t)V * C; i++) dw[i] /= m->fp8.grad * m->fp8.x;
    } else {
        bool tied = m->recipe == ORACLE_MODERN;
        oracle_linear_backward(m, dlast, tied ? "wte.weight" : "lm_head.weight", 0, dlogits, last, N, V,
                               C);
    }
    oracle_rmsnorm_backward(dx, dlast, last, oracle_array(m, "rstd.final_norm", 0, 0), N, C, false);
    free(dlast);
}

static inline void oracle_embeddings_backward(OracleModel* m, const int* tokens, int N, int T) {
    int C = m->C;
    size_t n = (size_t)N * C;
    const double* dx0 = oracle_array(m, "dact.x0", 0, 0);
    double* demb = oracle_embedded(m, true, n);
    memcpy(demb, dx0, n * sizeof(double));
    if (m->recipe != ORACLE_MODERN) {
        oracle_rmsnorm_backward(demb, dx0, oracle_array(m, "act.x0", 0, 0),
                                oracle_array(m, "rstd.x0", 0, 0), N, C, false);
    }
    if (m->recipe == ORACLE_NORMUON) {
        const double *emb = oracle_embedded(m, false, 0), *raw = oracle_array(m, "smear.raw", 0, 0);
        double *dsmear = oracle_alloc(n), *draw = oracle_alloc(N);
        memcpy(dsmear, demb, n * sizeof(double));
        oracle_smear_backward(demb, draw, oracle_grad(m, "smear.lambda", 0), dsmear, emb, raw,
                              *oracle_weight(m, "smear.lambda", 0), N, T, C);
        oracle_gate_raw_backward(demb, oracle_grad(m, "smear.gate.weight", 0), draw, emb,
                                 oracle_weight(m, "smear.gate.weight", 0), N, 1, C);
        free(dsmear);
        free(draw);
    }
    oracle_embedding_backward(oracle_grad(m, "wte.weight", 0), demb, tokens, N, C);
    for (int i = 0; i < ORACLE_VALUE_TABLES && oracle_has_values(m); i++) {
        oracle_embedding_backward(oracle_grad(m, "value_embeds.%d.weight", i),
                                  oracle_array(m, "dact.ve%d", i, 0), tokens, N, C);
    }
}

// Returns the mean loss and sets every gradient.
static inline double oracle_model_forward_backward(OracleModel* m, const int* tokens,
                                                   const int* targets, int B, int T) {
    int N = B * T, C = m->C;
    size_t n = (size_t)N * C;
    double loss = oracle_model_forward(m, tokens, targets, B, T);
    for (int i = 0; i < m->count; i++) {
        OracleArray* a = &m->arrays[i];
        if (!strncmp(a->name, "grad.", 5)) memset(a->x, 0, a->n * sizeof(double));
    }
    double* dx0 = oracle_array(m, "dact.x0", 0, n);
    memset(dx0, 0, n * sizeof(double));
    for (int l = 0; l < m->L; l++) {
        if (!m->plan[l].exists) continue;
        memset(oracle_array(m, "dact.h%d.out", l, n), 0, n * sizeof(double));
        memset(oracle_array(m, "dact.h%d.v_lin", l, n), 0, n * sizeof(double));
    }
    for (int i = 0; i < ORACLE_VALUE_TABLES && oracle_has_values(m); i++) {
        memset(oracle_array(m, "dact.ve%d", i, n), 0, n * sizeof(double));
    }

    double* dx = oracle_alloc(n);
    oracle_head_backward(m, dx, N);
    if (m->backout >= 0) {
        double minus = -*oracle_weight(m, "backout.lambda", 0), dminus = 0;
        const double* from = oracle_stream(m, m->backout);
        oracle_mix_backward(dx, oracle_array(m, "dact.h%d.out", m->backout, 0), &dminus, dx, from, from,
                            &minus, ORACLE_MIX_SKIP, N, C);
        *oracle_grad(m, "backout.lambda", 0) -= dminus;
    }
    for (int l = m->L - 1; l >= 0; l--) {
        if (!m->plan[l].exists) continue;
        double* dout = oracle_array(m, "dact.h%d.out", l, 0);
        oracle_residual_add(dout, dout, dx, n);
        memcpy(dx, dout, n * sizeof(double));
        oracle_layer_backward(m, dx, l, B, T);
    }
    oracle_residual_add(dx0, dx0, dx, n);
    oracle_embeddings_backward(m, tokens, N, T);
    free(dx);
    return loss;
}

// ---- 8-bit floats ----------------------------------------------------------------------------

// The nearest e5m2 or e4m3, ties to even, at most the largest; NaN stays NaN.
static inline double oracle_round_fp8(double x, bool e5m2) {
    int mantissa = e5m2 ? 2 : 3, least = e5m2 ? -14 : -6;
    double largest = e5m2 ? 57344 : 448, magnitude = fabs(x);
    if (isnan(x) || magnitude == 0) return x;
    if (magnitude > largest) return copysign(largest, x);
    int exponent = ilogb(magnitude);
    double step = ldexp(1.0, (exponent > least ? exponent : least) - mantissa);
    return copysign(fmin(rint(magnitude / step) * step, largest), x);
}
