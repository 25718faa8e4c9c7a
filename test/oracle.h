/*
Every operation of the trainer as plain loops in double: the specification that the kernels are
tested against. The formulas here are the definition; test/test_oracle.c checks each backward
function against central differences of its forward function, and the whole model against the
golden files.

    Letters as in llmc/common.h: B sequences of T tokens, N = B*T rows, C channels, H heads,
    D head dim, V vocabulary columns, L layers. All arrays are contiguous and row-major; q k v and
    their kin are (B, T, H, D). Outputs come first and never alias inputs, except where said.
    "+=" marks an output that is added to.

The first half holds the operations, in the order of the model; then come the optimizers, then the
whole model with all its gradients (OracleModel), which knows the recipes modern, untied and unet.

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
enum { ORACLE_MIX_PAIR = 0, ORACLE_MIX_SKIP = 1, ORACLE_MIX_LERP = 2 };

static inline void oracle_mix_weights(double* a, double* b, const double* s, int mode) {
    *a = mode == ORACLE_MIX_PAIR ? s[0] : mode == ORACLE_MIX_SKIP ? 1.0 : 1.0 - s[0];
    *b = mode == ORACLE_MIX_PAIR ? s[1] : s[0];
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
        ds[0] += mode == ORACLE_MIX_SKIP ? db : db - da;
    }
}

// ---- rotary ----------------------------------------------------------------------------------

// cos and sin of t f_j, (T, D/2), with f_j = 1 / base^(2j/D). Exponent, power, reciprocal and angle
// are each rounded to float, because that is what the recipes' float tensors hold: at t = 1023 an
// angle in double would differ from theirs by up to 3e-5. The tables themselves are float, or
// bf16 if asked.
static inline void oracle_rotary_tables(double* cos_table, double* sin_table, int T, int D,
                                        float base, bool round_to_bf16) {
    for (int j = 0; j < D / 2; j++) {
        float exponent = (float)(2 * j) / (float)D;
        float power = (float)pow((double)base, (double)exponent);
        float frequency = 1.0f / power;
        for (int t = 0; t < T; t++) {
            float angle = (float)t * frequency;
            double c = (float)cos((double)angle), s = (float)sin((double)angle);
            cos_table[(size_t)t * (D / 2) + j] = round_to_bf16 ? oracle_round_bf16(c) : c;
            sin_table[(size_t)t * (D / 2) + j] = round_to_bf16 ? oracle_round_bf16(s) : s;
        }
    }
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

// y(M,N) = x(M,K) w(N,K)ᵀ
static inline void oracle_matmul_nt(double* y, const double* x, const double* w, int M, int N,
                                    int K) {
    for (int m = 0; m < M; m++) for (int n = 0; n < N; n++) {
        double sum = 0;
        for (int k = 0; k < K; k++) sum += x[(size_t)m * K + k] * w[(size_t)n * K + k];
        y[(size_t)m * N + n] = sum;
    }
}

// y(M,N) = x(M,K) w(K,N)
static inline void oracle_matmul_nn(double* y, const double* x, const double* w, int M, int N,
                                    int K) {
    for (int m = 0; m < M; m++) {
        double* row = y + (size_t)m * N;
        for (int n = 0; n < N; n++) row[n] = 0;
        for (int k = 0; k < K; k++) {
            double a = x[(size_t)m * K + k];
            for (int n = 0; n < N; n++) row[n] += a * w[(size_t)k * N + n];
        }
    }
}

// dw(M,N) = a(K,M)ᵀ b(K,N) + beta dw; beta 0 does not read dw
static inline void oracle_matmul_tn(double* dw, const double* a, const double* b, int M, int N,
                                    int K, double beta) {
    for (size_t i = 0; i < (size_t)M * N; i++) dw[i] = beta == 0 ? 0 : beta * dw[i];
    for (int k = 0; k < K; k++) for (int m = 0; m < M; m++) {
        double x = a[(size_t)k * M + m];
        for (int n = 0; n < N; n++) dw[(size_t)m * N + n] += x * b[(size_t)k * N + n];
    }
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

// m = b1 m + (1-b1) g, v = b2 v + (1-b2) g², p -= lr wd p,
// p -= lr/(1-b1^step) m / (sqrt(v)/sqrt(1-b2^step) + eps); step counts from 1.
// bf16_state: a table kept in bf16 without a master: g is rounded to bf16 first; p is computed from
// the unrounded m and v; p, m and v are rounded to bf16 as they are stored.
static inline void oracle_adamw_update(double* p, const double* g, double* m, double* v, size_t n,
                                       double lr, double beta1, double beta2, double eps, double wd,
                                       int step, bool bf16_state) {
    double c1 = 1.0 - pow(beta1, step), c2 = 1.0 - pow(beta2, step);
    for (size_t i = 0; i < n; i++) {
        double gi = bf16_state ? oracle_round_bf16(g[i]) : g[i];
        m[i] = beta1 * m[i] + (1.0 - beta1) * gi;
        v[i] = beta2 * v[i] + (1.0 - beta2) * gi * gi;
        p[i] -= lr * wd * p[i];
        p[i] -= lr / c1 * m[i] / (sqrt(v[i]) / sqrt(c2) + eps);
        if (bf16_state) {
            p[i] = oracle_round_bf16(p[i]);
            m[i] = oracle_round_bf16(m[i]);
            v[i] = oracle_round_bf16(v[i]);
        }
    }
}

// ---- muon ------------------------------------------------------------------------------------

// Newton-Schulz: X = G / (|G| + eps), then steps times X = a X + (b A + c A²) X with A = X Xᵀ. A matrix
// with more rows than columns is worked on as its transpose. Drives all singular values towards 1
// (to between about 0.7 and 1.2); a zero matrix stays zero. O may alias G.
static inline void oracle_newton_schulz(double* O, const double* G, int rows, int cols, int steps,
                                        double a, double b, double c, double eps) {
    bool flip = rows > cols;
    int m = flip ? cols : rows, n = flip ? rows : cols;
    size_t count = (size_t)m * n, square = (size_t)m * m;
    double *X = oracle_alloc(count), *Y = oracle_alloc(count);
    double *A = oracle_alloc(square), *A2 = oracle_alloc(square);
    double norm = oracle_norm(G, count) + eps;
    for (int i = 0; i < m; i++) for (int j = 0; j < n; j++) {
        X[(size_t)i * n + j] = (flip ? G[(size_t)j * m + i] : G[(size_t)i * n + j]) / norm;
    }
    for (int s = 0; s < steps; s++) {
        oracle_matmul_nt(A, X, X, m, m, n);
        oracle_matmul_nn(A2, A, A, m, m, m);
        for (size_t i = 0; i < square; i++) A[i] = b * A[i] + c * A2[i];
        oracle_matmul_nn(Y, A, X, m, n, m);
        for (size_t i = 0; i < count; i++) X[i] = a * X[i] + Y[i];
    }
    for (int i = 0; i < m; i++) for (int j = 0; j < n; j++) {
        *(flip ? &O[(size_t)j * m + i] : &O[(size_t)i * n + j]) = X[(size_t)i * n + j];
    }
    free(X);
    free(Y);
    free(A);
    free(A2);
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

// ---- the whole model -------------------------------------------------------------------------

/*
    x = wte[token]; untied, unet: x = rms(x); x0 = x
    layer l:  unet, l >= L/2: x += skip[l - L/2] out[L-1-l]
              unet: x = lambdas[0] x + lambdas[1] x0
              h = rms(x); q k v = h Wqᵀ, h Wkᵀ, h Wvᵀ; q, k = norm and rotary per head
              unet, l > 0: v = (1 - lamb) v + lamb v of layer 0
              x += attention(q, k, v) Woᵀ
              x += relu2(rms(x) Wfcᵀ) Wprojᵀ; out[l] = x
    z = rms(x) headᵀ; tied: head = wte; unet: softcap 30 tanh(z / 30); loss = mean over N rows
    scale 1/sqrt(D), rotary base 10000. modern rotates and then norms q and k, the others norm first.

Every parameter, gradient, activation and activation gradient is an array under its golden name:
param.h.0.attn.c_q.weight, grad.h.0.attn.c_q.weight, act.h0.q_lin, dact.h0.out, logits0.
*/
enum { ORACLE_MODERN, ORACLE_UNTIED, ORACLE_UNET };

typedef struct {
    char name[64];
    double* x;
    size_t n;
} OracleArray;

typedef struct {
    int recipe, V, C, H, L;
    double eps;
    bool norm_first, rope_bf16;
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

// All parameters zero; set them through oracle_weight or by name.
static inline void oracle_model_init(OracleModel* m, int recipe, int V, int C, int H, int L,
                                     bool rope_bf16) {
    memset(m, 0, sizeof *m);
    m->recipe = recipe, m->V = V, m->C = C, m->H = H, m->L = L;
    m->eps = 0x1p-23;
    m->norm_first = recipe != ORACLE_MODERN;
    m->rope_bf16 = rope_bf16;
    if (recipe == ORACLE_UNET && L % 2 != 0) {
        fprintf(stderr, "oracle: unet needs an even number of layers, got %d\n", L);
        exit(1);
    }
    size_t square = (size_t)C * C;
    oracle_model_tensor(m, "wte.weight", 0, (size_t)V * C);
    for (int l = 0; l < L; l++) {
        oracle_model_tensor(m, "h.%d.attn.c_q.weight", l, square);
        oracle_model_tensor(m, "h.%d.attn.c_k.weight", l, square);
        oracle_model_tensor(m, "h.%d.attn.c_v.weight", l, square);
        oracle_model_tensor(m, "h.%d.attn.c_proj.weight", l, square);
        oracle_model_tensor(m, "h.%d.mlp.c_fc.weight", l, 4 * square);
        oracle_model_tensor(m, "h.%d.mlp.c_proj.weight", l, 4 * square);
        if (recipe != ORACLE_UNET) continue;
        oracle_model_tensor(m, "h.%d.lambdas", l, 2);
        oracle_model_tensor(m, "h.%d.attn.lamb", l, 1);
    }
    if (recipe == ORACLE_UNET) oracle_model_tensor(m, "skip_weights", 0, L / 2);
    if (recipe != ORACLE_MODERN) oracle_model_tensor(m, "lm_head.weight", 0, (size_t)V * C);
}

static inline void oracle_model_free(OracleModel* m) {
    for (int i = 0; i < m->count; i++) free(m->arrays[i].x);
    free(m->arrays);
    memset(m, 0, sizeof *m);
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

static inline void oracle_layer_forward(OracleModel* m, int l, int B, int T) {
    int N = B * T, C = m->C, L = m->L, D = C / m->H;
    size_t n = (size_t)N * C;
    bool unet = m->recipe == ORACLE_UNET;
    double* in = oracle_array(m, "act.h%d.in", l, n);
    memcpy(in, l == 0 ? oracle_array(m, "act.x0", 0, 0) : oracle_array(m, "act.h%d.out", l - 1, 0),
           n * sizeof(double));
    if (unet && l >= L / 2) {
        oracle_mix_forward(in, in, oracle_array(m, "act.h%d.out", L - 1 - l, 0),
                           oracle_weight(m, "skip_weights", 0) + l - L / 2, ORACLE_MIX_SKIP, N, C);
    }
    double* x = oracle_array(m, "act.h%d.mix", l, n);
    memcpy(x, in, n * sizeof(double));
    if (unet) {
        oracle_mix_forward(x, in, oracle_array(m, "act.x0", 0, 0),
                           oracle_weight(m, "h.%d.lambdas", l), ORACLE_MIX_PAIR, N, C);
    }

    double* h = oracle_array(m, "act.h%d.attn_in", l, n);
    oracle_rmsnorm_forward(h, oracle_array(m, "rstd.h%d.attn_in", l, N), x, N, C, m->eps);
    const double* q = oracle_model_qk(m, 'q', l, h, B, T);
    const double* k = oracle_model_qk(m, 'k', l, h, B, T);
    double* v_lin = oracle_array(m, "act.h%d.v_lin", l, n);
    double* v = oracle_array(m, "act.h%d.v_mix", l, n);
    oracle_matmul_nt(v_lin, h, oracle_weight(m, "h.%d.attn.c_v.weight", l), N, C, C);
    memcpy(v, v_lin, n * sizeof(double));
    if (unet && l > 0) {
        oracle_mix_forward(v, v_lin, oracle_array(m, "act.h%d.v_lin", 0, 0),
                           oracle_weight(m, "h.%d.attn.lamb", l), ORACLE_MIX_LERP, N, C);
    }
    double* y = oracle_array(m, "act.h%d.attn_y", l, n);
    oracle_attention_forward(y, NULL, q, k, v, B, T, m->H, D, 1.0 / sqrt((double)D));
    double* attn_out = oracle_array(m, "act.h%d.attn_out", l, n);
    oracle_matmul_nt(attn_out, y, oracle_weight(m, "h.%d.attn.c_proj.weight", l), N, C, C);
    double* after = oracle_array(m, "act.h%d.after_attn", l, n);
    oracle_residual_add(after, x, attn_out, n);

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

// Returns the mean loss; dact.logits_raw holds its gradient afterwards.
static inline double oracle_model_forward(OracleModel* m, const int* tokens, const int* targets,
                                          int B, int T) {
    int N = B * T, C = m->C, V = m->V, D = C / m->H;
    size_t n = (size_t)N * C;
    double* cos_table = oracle_array(m, "cos", 0, (size_t)T * D / 2);
    double* sin_table = oracle_array(m, "sin", 0, (size_t)T * D / 2);
    oracle_rotary_tables(cos_table, sin_table, T, D, 10000.0f, m->rope_bf16);

    double* emb = oracle_array(m, "act.emb", 0, n);
    double* x0 = oracle_array(m, "act.x0", 0, n);
    oracle_embedding_forward(emb, oracle_weight(m, "wte.weight", 0), tokens, N, C);
    memcpy(x0, emb, n * sizeof(double));
    if (m->recipe != ORACLE_MODERN) {
        oracle_rmsnorm_forward(x0, oracle_array(m, "rstd.x0", 0, N), emb, N, C, m->eps);
    }
    for (int l = 0; l < m->L; l++) oracle_layer_forward(m, l, B, T);

    double* last = oracle_array(m, "act.final_norm", 0, n);
    oracle_rmsnorm_forward(last, oracle_array(m, "rstd.final_norm", 0, N),
                           oracle_array(m, "act.h%d.out", m->L - 1, 0), N, C, m->eps);
    double* logits = oracle_array(m, "logits0", 0, (size_t)N * V);
    bool tied = m->recipe == ORACLE_MODERN;
    oracle_matmul_nt(logits, last, oracle_weight(m, tied ? "wte.weight" : "lm_head.weight", 0), N,
                     V, C);
    double* losses = oracle_array(m, "losses", 0, N);
    oracle_cross_entropy(oracle_array(m, "dact.logits_raw", 0, (size_t)N * V), losses, logits,
                         targets, N, V,
                         m->recipe == ORACLE_UNET ? ORACLE_SOFTCAP_TANH : ORACLE_SOFTCAP_NONE, 30.0,
                         1.0 / N);
    return oracle_sum(losses, N) / N;
}

// dx(N,K) = dy(N,M) w(M,K), dw(M,K) += dyᵀ x
static inline void oracle_linear_backward(OracleModel* m, double* dx, const char* weight, int l,
                                          const double* dy, const double* x, int N, int M, int K) {
    oracle_matmul_nn(dx, dy, oracle_weight(m, weight, l), N, K, M);
    oracle_matmul_tn(oracle_grad(m, weight, l), dy, x, M, K, N, 1.0);
}

// dx: d loss / d act.h<l>.out on entry, d loss / d act.h<l>.in on return. Adds to dact.x0, to
// dact.h0.v_lin and, through a skip, to dact.h<L-1-l>.out.
static inline void oracle_layer_backward(OracleModel* m, double* dx, int l, int B, int T) {
    int N = B * T, C = m->C, L = m->L, D = C / m->H;
    size_t n = (size_t)N * C;
    bool unet = m->recipe == ORACLE_UNET;
    double *big = oracle_alloc(4 * n), *dh = oracle_alloc(n), *dy = oracle_alloc(n);
    double *dq = oracle_alloc(n), *dk = oracle_alloc(n), *dv = oracle_alloc(n);
    double* d = oracle_alloc(n);

    oracle_linear_backward(m, big, "h.%d.mlp.c_proj.weight", l, dx,
                           oracle_array(m, "act.h%d.relu2", l, 0), N, C, 4 * C);
    oracle_relu2_backward(big, big, oracle_array(m, "act.h%d.fc", l, 0), 4 * n);
    oracle_linear_backward(m, dh, "h.%d.mlp.c_fc.weight", l, big,
                           oracle_array(m, "act.h%d.mlp_in", l, 0), N, 4 * C, C);
    oracle_rmsnorm_backward(dx, dh, oracle_array(m, "act.h%d.mlp_in", l, 0),
                            oracle_array(m, "rstd.h%d.mlp_in", l, 0), N, C, true);

    const char* qk = m->norm_first ? "act.h%d.q_rot" : "act.h%d.q_norm";
    const double* q = oracle_array(m, qk, l, 0);
    qk = m->norm_first ? "act.h%d.k_rot" : "act.h%d.k_norm";
    const double* k = oracle_array(m, qk, l, 0);
    const double *cos_table = oracle_array(m, "cos", 0, 0), *sin_table = oracle_array(m, "sin", 0, 0);
    oracle_linear_backward(m, dy, "h.%d.attn.c_proj.weight", l, dx,
                           oracle_array(m, "act.h%d.attn_y", l, 0), N, C, C);
    oracle_attention_backward(dq, dk, dv, dy, q, k, oracle_array(m, "act.h%d.v_mix", l, 0), B, T,
                              m->H, D, 1.0 / sqrt((double)D));
    double* dv_lin = oracle_array(m, "dact.h%d.v_lin", l, 0);
    if (unet && l > 0) {
        oracle_mix_backward(dv_lin, oracle_array(m, "dact.h%d.v_lin", 0, 0),
                            oracle_grad(m, "h.%d.attn.lamb", l), dv,
                            oracle_array(m, "act.h%d.v_lin", l, 0),
                            oracle_array(m, "act.h%d.v_lin", 0, 0),
                            oracle_weight(m, "h.%d.attn.lamb", l), ORACLE_MIX_LERP, N, C);
    } else {
        oracle_residual_add(dv_lin, dv_lin, dv, n);
    }
    const double* h = oracle_array(m, "act.h%d.attn_in", l, 0);
    oracle_linear_backward(m, dh, "h.%d.attn.c_v.weight", l, dv_lin, h, N, C, C);
    oracle_qknorm_rotary_backward(d, dq, oracle_array(m, "act.h%d.q_lin", l, 0), cos_table,
                                  sin_table, B, T, m->H, D, m->eps, m->norm_first);
    oracle_linear_backward(m, dy, "h.%d.attn.c_q.weight", l, d, h, N, C, C);
    oracle_residual_add(dh, dh, dy, n);
    oracle_qknorm_rotary_backward(d, dk, oracle_array(m, "act.h%d.k_lin", l, 0), cos_table,
                                  sin_table, B, T, m->H, D, m->eps, m->norm_first);
    oracle_linear_backward(m, dy, "h.%d.attn.c_k.weight", l, d, h, N, C, C);
    oracle_residual_add(dh, dh, dy, n);
    oracle_rmsnorm_backward(dx, dh, h, oracle_array(m, "rstd.h%d.attn_in", l, 0), N, C, true);

    if (unet) {
        oracle_mix_backward(dx, oracle_array(m, "dact.x0", 0, 0), oracle_grad(m, "h.%d.lambdas", l),
                            dx, oracle_array(m, "act.h%d.in", l, 0), oracle_array(m, "act.x0", 0, 0),
                            oracle_weight(m, "h.%d.lambdas", l), ORACLE_MIX_PAIR, N, C);
    }
    if (unet && l >= L / 2) {
        // The stream before the skip is out[l-1]; it is not used by this mode's derivatives.
        oracle_mix_backward(dx, oracle_array(m, "dact.h%d.out", L - 1 - l, 0),
                            oracle_grad(m, "skip_weights", 0) + l - L / 2, dx,
                            oracle_array(m, "act.h%d.out", l - 1, 0),
                            oracle_array(m, "act.h%d.out", L - 1 - l, 0),
                            oracle_weight(m, "skip_weights", 0) + l - L / 2, ORACLE_MIX_SKIP, N, C);
    }
    free(big);
    free(dh);
    free(dy);
    free(dq);
    free(dk);
    free(dv);
    free(d);
}

// Returns the mean loss and sets every gradient.
static inline double oracle_model_forward_backward(OracleModel* m, const int* tokens,
                                                   const int* targets, int B, int T) {
    int N = B * T, C = m->C;
    size_t n = (size_t)N * C;
    bool tied = m->recipe == ORACLE_MODERN;
    double loss = oracle_model_forward(m, tokens, targets, B, T);
    for (int i = 0; i < m->count; i++) {
        OracleArray* a = &m->arrays[i];
        if (!strncmp(a->name, "grad.", 5)) memset(a->x, 0, a->n * sizeof(double));
    }
    double* dx0 = oracle_array(m, "dact.x0", 0, n);
    memset(dx0, 0, n * sizeof(double));
    for (int l = 0; l < m->L; l++) {
        memset(oracle_array(m, "dact.h%d.out", l, n), 0, n * sizeof(double));
        memset(oracle_array(m, "dact.h%d.v_lin", l, n), 0, n * sizeof(double));
    }

    double *dh = oracle_alloc(n), *dx = oracle_alloc(n);
    oracle_linear_backward(m, dh, tied ? "wte.weight" : "lm_head.weight", 0,
                           oracle_array(m, "dact.logits_raw", 0, 0),
                           oracle_array(m, "act.final_norm", 0, 0), N, m->V, C);
    oracle_rmsnorm_backward(dx, dh, oracle_array(m, "act.final_norm", 0, 0),
                            oracle_array(m, "rstd.final_norm", 0, 0), N, C, false);
    for (int l = m->L - 1; l >= 0; l--) {
        double* dout = oracle_array(m, "dact.h%d.out", l, 0);
        oracle_residual_add(dout, dout, dx, n);
        memcpy(dx, dout, n * sizeof(double));
        oracle_layer_backward(m, dx, l, B, T);
    }
    oracle_residual_add(dx0, dx0, dx, n);

    double* demb = oracle_array(m, tied ? "dact.emb" : "dact.embed_raw", 0, n);
    memcpy(demb, dx0, n * sizeof(double));
    if (!tied) {
        oracle_rmsnorm_backward(demb, dx0, oracle_array(m, "act.x0", 0, 0),
                                oracle_array(m, "rstd.x0", 0, 0), N, C, false);
    }
    oracle_embedding_backward(oracle_grad(m, "wte.weight", 0), demb, tokens, N, C);
    free(dh);
    free(dx);
    return loss;
}
