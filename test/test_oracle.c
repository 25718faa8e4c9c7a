/*
The specification, tested: every backward function of oracle.h against central differences of its
forward function, the whole model's gradients likewise, and the whole model with its optimizers
against the golden files.

    test_oracle [filter] [--verbose]       from the root of the repository; needs no GPU
    test_oracle DIRECTORY [--verbose]      one directory of golden files, wherever it is

Central differences. A scalar s(x) = sum of w y(x) with random w has the gradient backward(dy = w).
(s(x + h) - s(x - h)) / 2h is off by h² s'''/6 and by rounding, about 2^-52 |s| sqrt(n) / h. With h = 1e-5,
|s| and s''' of the order of 10 the two are 2e-10 and 1e-10; 2e-8 times the gradient's largest
element, and at least 2e-8, leaves a factor of 50. A lost factor, sign or index is off by the
order of 1.
*/
#include "golden.h"
#include "oracle.h"
#include "test.h"

enum { MAX = 4096 };

static double dot(const double* a, const double* b, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

// Not rounded to floatX: the oracle is in double.
static void fill(double* x, size_t n, uint64_t seed) {
    for (size_t i = 0; i < n; i++) x[i] = test_normal(seed, i);
}

static double difference = 1e-5;
static size_t probes = 37;

// Moves each of the n elements of x (or about 40 of them) and compares with the gradient given.
static void check_gradient(const char* name, double (*scalar)(void), double* x, const double* gradient,
                           size_t n) {
    const double h = difference;
    double largest = 1, worst = 0;
    for (size_t i = 0; i < n; i++) {
        if (fabs(gradient[i]) > largest) largest = fabs(gradient[i]);
    }
    size_t stride = n > 40 ? n / probes : 1;
    for (size_t i = 0; i < n; i += stride) {
        double kept = x[i];
        x[i] = kept + h;
        double up = scalar();
        x[i] = kept - h;
        double down = scalar();
        x[i] = kept;
        double err = fabs((up - down) / (2 * h) - gradient[i]);
        if (!(err <= worst)) worst = err;
    }
    test_check(name, worst, 2e-8 * largest);
}

// ---- single operations -----------------------------------------------------------------------

// What the scalar functions below read: inputs a b c, weights w of the output y, sizes.
static double a[MAX], b[MAX], c[MAX], s[2], w[MAX], y[MAX], da[MAX], db[MAX], dc[MAX], ds[2];
static double rstd[MAX], cos_table[MAX], sin_table[MAX];
static int targets[64], tokens[64];
static int N, C, B, T, H, D, mode, V, kind;
static bool norm_first;

static void fill_all(void) {
    fill(a, MAX, 1), fill(b, MAX, 2), fill(c, MAX, 3), fill(w, MAX, 4), fill(s, 2, 5);
}

static double embedding_scalar(void) {
    oracle_embedding_forward(y, a, tokens, N, C);
    return dot(w, y, N * C);
}

static void test_embedding(void) {
    N = 9, C = 5, V = 7;
    fill_all();
    for (int n = 0; n < N; n++) tokens[n] = n % 3 == 0 ? 4 : n % V;    // one token three times
    memset(da, 0, sizeof da);
    oracle_embedding_backward(da, w, tokens, N, C);
    check_gradient("embedding dwte", embedding_scalar, a, da, V * C);
}

static double rmsnorm_scalar(void) {
    oracle_rmsnorm_forward(y, rstd, a, N, C, 0.3);      // an epsilon that counts
    return dot(w, y, N * C);
}

static void test_rmsnorm(void) {
    N = 4, C = 9;
    fill_all();
    rmsnorm_scalar();
    oracle_rmsnorm_backward(da, w, y, rstd, N, C, false);
    check_gradient("rmsnorm dx", rmsnorm_scalar, a, da, N * C);
    rmsnorm_scalar();
    memcpy(db, b, sizeof db);
    oracle_rmsnorm_backward(db, w, y, rstd, N, C, true);
    for (int i = 0; i < N * C; i++) dc[i] = db[i] - b[i];
    test_compare_double("rmsnorm dx, accumulated", dc, da, N * C, 1e-14, 1e-14);
    double mean = 0;
    oracle_rmsnorm_forward(y, rstd, a, 1, C, 0x1p-23);
    for (int i = 0; i < C; i++) mean += y[i] * y[i] / C;
    test_check("rmsnorm mean square is 1", fabs(mean - 1), 1e-6);
}

static double mix_scalar(void) {
    oracle_mix_forward(y, a, b, s, mode, N, C);
    return dot(w, y, N * C);
}

static void test_mix(void) {
    static const char* names[] = {"pair", "skip", "lerp", "gate", "minus"};
    char name[64];
    N = 3, C = 8;
    for (mode = 0; mode < 5; mode++) {
        fill_all();
        memset(db, 0, sizeof db);
        ds[0] = ds[1] = 0;
        oracle_mix_backward(da, db, ds, w, a, b, s, mode, N, C);
        snprintf(name, sizeof name, "mix %s dx", names[mode]);
        check_gradient(name, mix_scalar, a, da, N * C);
        snprintf(name, sizeof name, "mix %s dz", names[mode]);
        check_gradient(name, mix_scalar, b, db, N * C);
        snprintf(name, sizeof name, "mix %s ds", names[mode]);
        check_gradient(name, mix_scalar, s, ds, mode == ORACLE_MIX_PAIR ? 2 : 1);
    }
}

static double rotary_scalar(void) {
    oracle_rotary_forward(y, a, cos_table, sin_table, B, T, H, D);
    return dot(w, y, B * T * H * D);
}

static double qknorm_scalar(void) {
    oracle_qknorm_rotary_forward(y, rstd, a, cos_table, sin_table, B, T, H, D, 0.2, norm_first);
    return dot(w, y, B * T * H * D);
}

static void test_rotary(void) {
    B = 2, T = 5, H = 3, D = 8;
    fill_all();
    oracle_rotary_tables(cos_table, sin_table, T, D, 10000.0f, true);
    oracle_rotary_backward(da, w, cos_table, sin_table, B, T, H, D);
    check_gradient("rotary dx", rotary_scalar, a, da, B * T * H * D);
    for (int order = 0; order < 2; order++) {
        norm_first = order == 0;
        oracle_qknorm_rotary_backward(da, w, a, cos_table, sin_table, B, T, H, D, 0.2, norm_first);
        check_gradient(norm_first ? "qknorm, then rotary dx" : "rotary, then qknorm dx", qknorm_scalar, a,
                       da, B * T * H * D);
    }
    // a known corner: pair 0 turns by one radian per token, clockwise
    oracle_rotary_tables(cos_table, sin_table, T, D, 10000.0f, false);
    memset(a, 0, sizeof a);
    a[(size_t)H * D] = 1;                      // b 0, t 1, h 0, x1 of pair 0
    rotary_scalar();
    test_check("rotary y1 = cos 1", fabs(y[H * D] - cos(1.0)), 1e-7);
    test_check("rotary y2 = -sin 1", fabs(y[H * D + D / 2] + sin(1.0)), 1e-7);
    test_check("rotary frequency of pair 1", fabs(cos_table[D / 2 + 1] - cos(0.1)), 1e-7);
}

static double attention_scalar(void) {
    oracle_attention_forward(y, rstd, a, b, c, B, T, H, D, 0.4);
    return dot(w, y, B * T * H * D);
}

static void test_attention(void) {
    B = 2, T = 6, H = 2, D = 4;
    int n = B * T * H * D;
    fill_all();
    oracle_attention_backward(da, db, dc, w, a, b, c, B, T, H, D, 0.4);
    check_gradient("attention dq", attention_scalar, a, da, n);
    check_gradient("attention dk", attention_scalar, b, db, n);
    check_gradient("attention dv", attention_scalar, c, dc, n);
    attention_scalar();
    test_compare_double("attention of the first token is its value", y, c, H * D, 1e-14, 0);
    double score = 0.4 * dot(a, b, D);
    test_check("attention lse of the first token", fabs(rstd[0] - score), 1e-14);
    static double later[MAX];
    memcpy(later, y, sizeof later);
    for (int i = 0; i < H * D; i++) b[(T - 1) * H * D + i] += 1, c[(T - 1) * H * D + i] += 1;
    attention_scalar();
    test_compare_double("attention does not look ahead", y, later, (T - 1) * H * D, 0, 0);
}

// ---- of records 20 and 45 --------------------------------------------------------------------

static uint8_t mask[64];

static double masked_scalar(void) {
    oracle_attention_masked_forward(y, a, b, c, mask, 1, T, H, D, 0.4);
    return dot(w, y, T * H * D);
}

static void test_masks(void) {
    // Documents 0..1, 2..6 and an empty one between: a window of 2 is the query and two keys.
    const int ends[] = {0, 2, 2, 7, 8, 8};
    static const char* const SEEN[] = {"1.......", "11......", "..1.....", "..11....",
                                       "..111...", "...111..", "....111.", ".......1"};
    T = 8, H = 2, D = 4;
    int wrong = 0, n = T * H * D;
    oracle_window_mask(mask, ends, 6, T, 2);
    for (int i = 0; i < T * T; i++) wrong += mask[i] != (SEEN[i / T][i % T] == '1');
    test_true("window mask", wrong == 0);
    fill_all();
    oracle_attention_masked_backward(da, db, dc, w, a, b, c, mask, 1, T, H, D, 0.4);
    check_gradient("masked attention dq", masked_scalar, a, da, n);
    check_gradient("masked attention dk", masked_scalar, b, db, n);
    check_gradient("masked attention dv", masked_scalar, c, dc, n);
    for (int i = 0; i < T * T; i++) mask[i] = i % T <= i / T;
    masked_scalar();
    oracle_attention_forward(da, NULL, a, b, c, 1, T, H, D, 0.4);
    test_compare_double("attention under a causal mask is causal attention", y, da, n, 1e-14, 0);
    // Blocks of two: tokens 0 open documents at 0 and 5. Block 3 sees itself, and of block 2 the part
    // behind the border; block 1 sees block 0 whole. A window of one block is the diagonal, as is none.
    const int text[] = {0, 7, 7, 7, 7, 0, 7, 7};
    uint8_t codes[16];
    static const uint8_t ALL[] = {1, 0, 0, 0, 2, 1, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1};
    static const uint8_t TWO[] = {1, 0, 0, 0, 2, 1, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1};
    static const uint8_t ONE[] = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1};
    oracle_block_mask(mask, codes, text, 0, T, 2, 4);
    test_true("block mask, wide", !memcmp(codes, ALL, 16));
    test_true("block mask, across a border", mask[6 * 8 + 4] == 0 && mask[6 * 8 + 5] == 1);
    oracle_block_mask(mask, codes, text, 0, T, 2, 2);
    test_true("block mask, two blocks", !memcmp(codes, TWO, 16));
    for (int window = 0; window < 2; window++) {
        oracle_block_mask(mask, codes, text, 0, T, 2, window);
        test_true("block mask, the diagonal", !memcmp(codes, ONE, 16));
    }
}

static double raw_scalar(void) {
    oracle_gate_raw(y, a, b, N, H, C);
    return dot(w, y, N * H);
}

static double gate_scalar(void) {
    oracle_gate_forward(y, a, b, N * H, D);
    return dot(w, y, N * H * D);
}

static double smear_scalar(void) {
    oracle_smear_forward(y, a, b, s[0], N, T, C);
    return dot(w, y, N * C);
}

static void test_gates(void) {
    N = 6, T = 3, C = 15, H = 2, D = 4;
    fill_all();
    memset(da, 0, sizeof da), memset(db, 0, sizeof db);
    oracle_gate_raw_backward(da, db, w, a, b, N, H, C);
    check_gradient("gate raw dh", raw_scalar, a, da, N * C);
    check_gradient("gate raw dw", raw_scalar, b, db, H * ORACLE_GATE_INPUTS);
    oracle_gate_backward(da, db, w, a, b, N * H, D);
    check_gradient("gate dx", gate_scalar, a, da, N * H * D);
    check_gradient("gate draw", gate_scalar, b, db, N * H);
    ds[0] = 0;
    oracle_smear_backward(da, db, ds, w, a, b, s[0], N, T, C);
    check_gradient("smear dx", smear_scalar, a, da, N * C);
    check_gradient("smear draw", smear_scalar, b, db, N);
    check_gradient("smear dlambda", smear_scalar, s, ds, 1);
    smear_scalar();
    test_compare_double("smear leaves the first token of a sequence", y + T * C, a + T * C, C, 0, 0);
}

static void test_frequencies(void) {
    float f[32], slower[32];
    oracle_half_frequencies(f, 64, 1024);
    test_check("half of the pairs turn: the first", fabs(f[0] - 1), 0);
    test_check("half of the pairs turn: the last", fabs(f[15] * 1024 - 1), 1e-6);
    test_true("half of the pairs turn: the others do not", f[16] == 0 && f[31] == 0);
    // From 128 tokens to 512: f = 1 turns 20 times in 128 and is slowed a little; 1/1024 fully.
    memcpy(slower, f, sizeof f);
    oracle_yarn(slower, 64, 128, 512);
    double weight = (128 / (2 * M_PI) - 1) / 31;
    test_check("YaRN, a fast pair", fabs(slower[0] - (0.25 + 0.75 * weight)), 1e-6);
    test_check("YaRN, a slow pair", fabs(slower[15] / f[15] - 0.25), 1e-6);
    memcpy(slower, f, sizeof f);
    oracle_yarn(slower, 64, 1024, 2048);
    test_check("YaRN, a pair with 163 turns", fabs(slower[0] - f[0]), 0);
    test_check("YaRN scale", fabs(oracle_yarn_scale(0.1, 3, 7) - 0.116946), 1e-6);
}

static void test_fp8(void) {
    test_check("e4m3 ties to even", fabs(oracle_e4m3(17) - 16) + fabs(oracle_e4m3(19) - 20), 0);
    test_check("e4m3 saturates", fabs(oracle_e4m3(1e9) - 448) + fabs(oracle_e4m3(-465) + 448), 0);
    test_check("e4m3 below the smallest normal", fabs(oracle_e4m3(0x1.8p-9) - 0x1p-8), 0);
    test_check("e5m2 ties to even", fabs(oracle_e5m2(9) - 8) + fabs(oracle_e5m2(11) - 12), 0);
    test_check("e5m2 of nearly nothing", fabs(oracle_e5m2(0x1p-17)) + fabs(oracle_e5m2(-0x1p-16) + 0x1p-16), 0);
    test_true("e4m3 keeps a NaN", isnan(oracle_e4m3(NAN)));
}

static void test_normuon(void) {
    // One column of one row: O is a sign, so that p steps by lr factor (1 + decay lr p) or stays put in
    // the decay, and the second moment is (1 - beta2) O².
    OracleNorMuon rule = {0.1, 2, 0, 0.95, 1.2, false, false};
    double p = 0.5, buf = 0, second = 0, g = 3, O;
    oracle_polar_express(&O, &g, 1, 1);
    oracle_normuon_update(&p, &buf, &second, &g, 1, 1, &rule);
    test_check("normuon against the sign of p", fabs(p - (0.5 - 0.2 * (O + 0.12 * 0.5))), 1e-14);
    test_check("normuon second moment", fabs(second - 0.05 * O * O), 1e-15);
    p = -0.5, buf = second = 0;
    oracle_normuon_update(&p, &buf, &second, &g, 1, 1, &rule);
    test_check("normuon along the sign of p", fabs(p - (-0.5 - 0.2 * O)), 1e-14);
    p = 0.5, buf = second = g = 0;
    oracle_normuon_update(&p, &buf, &second, &g, 1, 1, &rule);
    test_check("normuon without a gradient decays", fabs(p - (0.5 - 0.2 * 0.12 * 0.5)), 1e-14);
    // By row of a matrix and by column of its transpose are the same, and rows do not matter to others.
    double P[6], Q[6], G[6], F[6], bufs[12] = {0}, v[3] = {0}, u[3] = {0};
    fill(P, 6, 3), fill(G, 6, 4);
    for (int i = 0; i < 6; i++) Q[i % 3 * 2 + i / 3] = P[i], F[i % 3 * 2 + i / 3] = G[i];
    oracle_normuon_update(P, bufs, v, G, 2, 3, &rule);
    rule.by_row = true;
    oracle_normuon_update(Q, bufs + 6, u, F, 3, 2, &rule);
    for (int i = 0; i < 6; i++) P[i] -= Q[i % 3 * 2 + i / 3];
    test_check("normuon by row is by column of the transpose", oracle_norm(P, 6), 1e-13);
    test_compare_double("normuon second moments of the transpose", v, u, 3, 1e-14, 0);
}

static double relu2_scalar(void) {
    oracle_relu2_forward(y, a, N);
    return dot(w, y, N);
}

static void test_relu2(void) {
    N = 60;
    fill_all();
    a[0] = NAN;
    relu2_scalar();
    test_true("relu2 keeps a NaN", isnan(y[0]));
    a[0] = -3;
    relu2_scalar();
    test_check("relu2 of -3", fabs(y[0]), 0);
    oracle_relu2_backward(da, w, a, N);
    check_gradient("relu2 dx", relu2_scalar, a, da, N);
}

static double matmul_scalar(void) {
    oracle_matmul_nt(y, a, b, N, C, D);
    return dot(w, y, N * C);
}

static void test_matmul(void) {
    N = 4, C = 5, D = 6;
    fill_all();
    oracle_matmul_nn(da, w, b, N, D, C);
    memcpy(db, c, sizeof db);
    oracle_matmul_tn(db, w, a, C, D, N, 2.0);
    for (int i = 0; i < C * D; i++) db[i] -= 2.0 * c[i];
    check_gradient("matmul nt, nn: dx", matmul_scalar, a, da, N * D);
    check_gradient("matmul nt, tn: dw", matmul_scalar, b, db, C * D);
    db[0] = NAN;
    oracle_matmul_tn(db, w, a, C, D, N, 0.0);
    check_gradient("matmul tn, beta 0", matmul_scalar, b, db, C * D);
}

static double loss_scalar(void) {
    oracle_cross_entropy(NULL, rstd, a, targets, N, V, kind, 3.0, 1.0);
    return 0.5 * oracle_sum(rstd, N);
}

static void test_loss(void) {
    static const char* names[] = {"loss dlogits, no softcap", "loss dlogits, tanh", "loss dlogits, sigmoid"};
    N = 5, V = 11;
    for (kind = 0; kind < 3; kind++) {
        fill_all();
        for (int n = 0; n < N; n++) targets[n] = n == 2 ? -1 : 2 * n;
        oracle_cross_entropy(da, rstd, a, targets, N, V, kind, 3.0, 0.5);
        check_gradient(names[kind], loss_scalar, a, da, N * V);
        test_check("loss of an ignored row", rstd[2], 0);
    }
    memset(a, 0, sizeof a);
    kind = ORACLE_SOFTCAP_NONE;
    loss_scalar();
    test_check("loss of equal logits is log V", fabs(rstd[0] - log((double)V)), 1e-14);
    test_check("softcap 30 tanh(z/30)",
               fabs(oracle_softcap(15, ORACLE_SOFTCAP_TANH, 30) - 30 * tanh(0.5)), 1e-13);
    test_check("softcap 30 sigmoid(z/7.5)",
               fabs(oracle_softcap(15, ORACLE_SOFTCAP_SIGMOID, 30) - 30 / (1 + exp(-2.0))), 1e-13);
}

// ---- optimizers ------------------------------------------------------------------------------

static void test_optimizers(void) {
    fill_all();
    // Adam's first step is lr sign(g) whatever the size of g; the decay is lr wd p.
    double p[2] = {1, 1}, g[2] = {1e-3, -50}, m[2] = {0, 0}, v[2] = {0, 0};
    oracle_adamw_update(p, g, m, v, 2, 0.1, 0.9, 0.95, 1e-12, 0, 1, false);
    test_check("adamw first step, g > 0", fabs(p[0] - 0.9), 1e-9);
    test_check("adamw first step, g < 0", fabs(p[1] - 1.1), 1e-9);
    test_check("adamw m", fabs(m[1] + 5), 1e-12);
    test_check("adamw v", fabs(v[1] - 125), 1e-10);
    // With a constant gradient the corrected averages stay g and g²: every step is lr sign(g).
    for (int step = 2; step <= 4; step++) {
        oracle_adamw_update(p, g, m, v, 2, 0.1, 0.9, 0.95, 1e-12, 0, step, false);
    }
    test_check("adamw four equal steps", fabs(p[0] - 0.6), 1e-8);
    p[0] = 1, m[0] = v[0] = g[0] = 0;
    oracle_adamw_update(p, g, m, v, 1, 0.1, 0.9, 0.95, 1e-8, 0.5, 1, false);
    test_check("adamw decay", fabs(p[0] - 0.95), 1e-15);
    p[0] = 1, g[0] = 1.003, m[0] = v[0] = 0;
    oracle_adamw_update(p, g, m, v, 1, 0.001, 0.9, 0.95, 1e-8, 0, 1, true);
    test_check("adamw bf16: 1 - 0.001 rounds to 1", fabs(p[0] - 1), 0);
    test_check("adamw bf16: m is rounded", fabs(m[0] - oracle_round_bf16(0.1)), 0);

    double u[1], buf[1] = {2}, grad[1] = {1};
    oracle_muon_momentum(u, buf, grad, 1, 0.9, ORACLE_MOMENTUM_SUM);
    test_check("muon momentum, sum", fabs(buf[0] - 2.8) + fabs(u[0] - (1 + 0.9 * 2.8)), 1e-15);
    buf[0] = 2;
    oracle_muon_momentum(u, buf, grad, 1, 0.9, ORACLE_MOMENTUM_EMA);
    test_check("muon momentum, ema", fabs(buf[0] - 1.9) + fabs(u[0] - (1 + 0.9 * 0.9)), 1e-15);
    test_check("muon scale, max", oracle_muon_scale(16, 64, ORACLE_MUON_SCALE_MAX) - 8, 0);
    test_check("muon scale, ratio, tall", oracle_muon_scale(64, 16, ORACLE_MUON_SCALE_RATIO) - 2, 0);
    test_check("muon scale, ratio, wide", oracle_muon_scale(16, 64, ORACLE_MUON_SCALE_RATIO) - 1, 0);

    // A rank-one matrix has one singular value, which one step of the polynomial maps from 1 to
    // 3.4445 - 4.7750 + 2.0315 = 0.701; the direction stays. Tall and wide are each other's transpose.
    double G[6], O[6], tall[6], flipped[6];
    for (int i = 0; i < 6; i++) G[i] = (1 + i / 3) * (2 - i % 3 + 0.5);
    oracle_newton_schulz(O, G, 2, 3, 1, 3.4445, -4.7750, 2.0315, 0);
    for (int i = 0; i < 6; i++) O[i] -= 0.701 * G[i] / oracle_norm(G, 6);
    test_check("newton-schulz of rank one", oracle_norm(O, 6), 1e-14);
    fill(G, 6, 9);
    oracle_newton_schulz(O, G, 2, 3, 5, 3.4445, -4.7750, 2.0315, 1e-7);
    for (int i = 0; i < 6; i++) tall[i % 3 * 2 + i / 3] = G[i];
    oracle_newton_schulz(flipped, tall, 3, 2, 5, 3.4445, -4.7750, 2.0315, 1e-7);
    for (int i = 0; i < 6; i++) tall[i] = flipped[i % 3 * 2 + i / 3] - O[i];
    test_check("newton-schulz of the transpose", oracle_norm(tall, 6), 1e-13);
    double gram[4], trace;
    oracle_matmul_nt(gram, O, O, 2, 2, 3);
    trace = gram[0] + gram[3];
    test_true("newton-schulz: singular values near 1", trace > 2 * 0.4 && trace < 2 * 1.6);
    memset(G, 0, sizeof G);
    oracle_newton_schulz(O, G, 2, 3, 5, 3.4445, -4.7750, 2.0315, 1e-7);
    test_check("newton-schulz of zero", oracle_norm(O, 6), 0);
}

// ---- the model -------------------------------------------------------------------------------

static OracleModel model;

static double model_scalar(void) {
    return oracle_model_forward(&model, tokens, targets, B, T);
}

// Every parameter of a tiny model of each recipe; sub3 and normuon have twelve layers and see through
// windows, of which the short one hides keys. ReLU² has a kink in its slope, but an activation
// within 1e-5 of zero is rare (here there is none) and costs only 1e-5 of one term.
static void test_model_gradients(void) {
    static const char* names[] = {"modern", "untied", "unet", "sub3", "normuon"};
    static uint8_t windows[2][2 * 5 * 5];
    B = 2, T = 5, V = 13;
    for (int i = 0; i < 2 * B * T * T; i++) {
        int back = i / T % T - i % T;
        windows[i / (B * T * T)][i % (B * T * T)] = back >= 0 && back <= (i < B * T * T ? 1 : 3);
    }
    for (int n = 0; n < B * T; n++) {
        tokens[n] = (int)(test_random(1, n) % V);
        targets[n] = n == 3 ? -1 : (int)(test_random(2, n) % V);
    }
    for (int recipe = 0; recipe < 5; recipe++) {
        bool late = recipe >= ORACLE_SUB3;
        difference = late ? 1e-6 : 1e-5;         // twelve layers have more kinks, and steeper ones,
        probes = late ? 7 : 37;                  // and take more time
        oracle_model_init(&model, recipe, V, late ? 16 : 8, 2, late ? 12 : 4, true);
        model.eps = 1e-3, model.loss_sum = false;
        for (int k = 0; k < 2 && late; k++) model.mask[k] = windows[k];
        for (int i = 0; i < model.count; i++) {
            OracleArray* array = &model.arrays[i];
            if (strncmp(array->name, "param.", 6)) continue;
            fill(array->x, array->n, 100 + i);
            for (size_t k = 0; k < array->n; k++) array->x[k] *= 0.5;
        }
        oracle_model_forward_backward(&model, tokens, targets, B, T);
        for (int i = 0; i < model.count; i++) {
            char name[128];
            OracleArray* array = &model.arrays[i];
            if (strncmp(array->name, "param.", 6)) continue;
            OracleArray* gradient = oracle_find(&model, (snprintf(name, sizeof name, "grad.%s",
                                                                  array->name + 6), name));
            snprintf(name, sizeof name, "%s %s", names[recipe], array->name + 6);
            check_gradient(name, model_scalar, array->x, gradient->x, array->n);
            bool unused = !strcmp(array->name, "param.h.0.attn.lamb");
            test_true(name, (oracle_norm(gradient->x, gradient->n) > 0) != unused);
            // Where no values are looked up the second weight has nothing to weigh.
            int layer = -1;
            bool pair = late && strstr(name, ".attn.lambdas") && sscanf(array->name, "param.h.%d", &layer) == 1;
            if (pair) test_true(name, (gradient->x[1] != 0) == (model.plan[layer].values >= 0));
        }
        oracle_model_free(&model);
    }
}

// ---- golden files ----------------------------------------------------------------------------

typedef struct {
    double *m, *v;
    double* g;               // normuon: gradients of two steps, which Adam takes together
    int steps;
} Moments;

static void copy_result(GoldenResults* r, const char* prefix, const char* name, const OracleArray* array) {
    char full[128];
    snprintf(full, sizeof full, "%s%s", prefix, name);
    memcpy(golden_result(r, full, array->n), array->x, array->n * sizeof(double));
}

static void adam_update(OracleArray* p, const char* tensor, const GoldenCase* c, const GoldenVariant* v,
                        Moments* state, const double* g, int step) {
    bool normuon = c->recipe == GOLDEN_NORMUON, table = golden_kind(tensor) == GOLDEN_TABLE;
    bool head = !strcmp(tensor, "lm_head.weight");
    OracleAdam a = {0, c->adam_beta1, c->adam_beta2, c->adam_eps, 0, normuon, false, v->adambf16};
    a.lr = (head ? c->lr_head : table ? c->lr_wte : c->lr_scalar) * v->adam_scale * v->lr_mult[step];
    // embbf16 keeps the lm_head in float, and sub3 its scalars, too.
    a.bf16_value = table ? v->tabbf16 || (v->embbf16 && !head) : v->embbf16 && c->recipe == GOLDEN_UNET;
    a.bf16_state |= a.bf16_value;
    if (normuon) {
        if (!state->g) state->g = test_doubles(p->n);
        for (size_t i = 0; i < p->n; i++) {
            state->g[i] += a.bf16_value ? oracle_round_bf16(g[i]) : g[i];
            if (a.bf16_value) state->g[i] = oracle_round_bf16(state->g[i]);
        }
        if (v->steps[step] % 2 == 0) return;
        g = state->g;
    }
    oracle_adam_update(p->x, g, state->m, state->v, p->n, &a, ++state->steps);
    if (normuon) memset(state->g, 0, p->n * sizeof(double));
}

static void muon_update(OracleArray* p, const char* tensor, int C, const GoldenCase* c,
                        const GoldenVariant* v, Moments* state, const double* g, int step) {
    bool gate = golden_kind(tensor) == GOLDEN_GATE, fc = strstr(tensor, "c_fc") != NULL;
    int cols = gate ? ORACLE_GATE_INPUTS : strstr(tensor, "mlp.c_proj") ? 4 * C : C, rows = (int)(p->n / cols);
    double lr = c->lr_muon * v->lr_mult[step];
    if (c->recipe == GOLDEN_NORMUON) {
        // The record's c_fc is (in, out): its columns are our rows.
        OracleNorMuon a = {lr, fc ? 2.0 : 1.0, v->momentum[step], 0.95, 1.2, fc, v->tabbf16 && gate};
        oracle_normuon_update(p->x, state->m, state->v, g, rows, cols, &a);
        return;
    }
    oracle_muon_update(p->x, state->m, g, rows, cols, lr, v->momentum[step],
                       c->recipe == GOLDEN_SUB3 ? ORACLE_MOMENTUM_EMA : ORACLE_MOMENTUM_SUM,
                       c->recipe == GOLDEN_MODERN ? ORACLE_MUON_SCALE_MAX : ORACLE_MUON_SCALE_RATIO);
}

static void oracle_update(OracleModel* model, const GoldenCase* c, const GoldenVariant* v,
                          Moments* moments, int step) {
    for (int i = 0; i < model->count; i++) {
        OracleArray* p = &model->arrays[i];
        if (strncmp(p->name, "param.", 6)) continue;
        char name[128];
        const char* tensor = p->name + 6;
        snprintf(name, sizeof name, "grad.%s", tensor);
        const double* g = oracle_find(model, name)->x;
        if (!moments[i].m) moments[i].m = test_doubles(p->n), moments[i].v = test_doubles(p->n);
        int kind = golden_kind(tensor);
        if (kind == GOLDEN_MATRIX || kind == GOLDEN_GATE) muon_update(p, tensor, model->C, c, v, &moments[i], g, step);
        else adam_update(p, tensor, c, v, &moments[i], g, step);
    }
}

static void keep_parameters(GoldenResults* r, const OracleModel* model, int steps) {
    char prefix[16];
    snprintf(prefix, sizeof prefix, "p%d.", steps);
    for (int i = 0; i < model->count; i++) {
        if (!strncmp(model->arrays[i].name, "param.", 6)) {
            copy_result(r, prefix, model->arrays[i].name + 6, &model->arrays[i]);
        }
    }
}

// Masks, rotation and softmax scale of batch i seen through windows of so many blocks. mask[0], mask[1]:
// room for the short and the long one.
static void prepare(OracleModel* model, const GoldenCase* c, const GoldenVariant* v, uint8_t** mask, int i, int step,
                    int window_short, int window_long) {
    int T = i == GOLDEN_STEPS ? c->T_val : c->T, windows[2] = {window_short, window_long};
    if (c->recipe < GOLDEN_SUB3) return;
    for (int k = 0; k < 2; k++) {
        const int* ends;
        mask[k] = (uint8_t*)realloc(mask[k], (size_t)T * T);
        model->mask[k] = mask[k];
        if (c->recipe == GOLDEN_SUB3) {
            oracle_block_mask(mask[k], NULL, golden_batch(c, "tokens", i), c->bos, T, c->block, windows[k]);
        } else {
            int count = golden_cu_seqlens(c, &ends, i);
            oracle_window_mask(mask[k], ends, count, T, windows[k] * c->block);
        }
    }
    model->attn_scale = v->attn_scale[step];
    if (c->recipe != GOLDEN_NORMUON) return;
    int D = model->C / model->H, before = golden_window(v, 0);
    oracle_half_frequencies(model->frequencies, D, 1024.0);
    for (int64_t s = 1; s <= v->steps[step]; s++) {
        int now = golden_window(v, s);
        if (now != before) oracle_yarn(model->frequencies, D, (double)c->block * before, (double)c->block * now);
        before = now;
    }
}

static double train_batch(OracleModel* model, const GoldenCase* c, const GoldenVariant* v, uint8_t** mask, int i) {
    prepare(model, c, v, mask, i, i, v->window_short[i], v->window_long[i]);
    return oracle_model_forward_backward(model, golden_batch(c, "tokens", i), golden_batch(c, "targets", i), c->B,
                                         c->T);
}

// What the files call otherwise, or keep only a part of.
static void keep_renamed(GoldenResults* r, OracleModel* model, const GoldenCase* c) {
    int N = c->B * c->T, C = model->C;
    for (int k = 0; k < 2 && model->mask[k]; k++) {
        double* mask = golden_result(r, k ? "mask.long" : "mask.short", (size_t)N * N);
        for (size_t i = 0; i < (size_t)N * N; i++) mask[i] = model->mask[k][i];
    }
    for (int l = 0; l < model->L && c->recipe >= GOLDEN_SUB3; l++) {
        static const char* const PARTS[] = {"act.h%d.q_lin", "act.h%d.k_lin", "act.h%d.v_lin"};
        char name[64];
        if (!model->plan[l].attention) continue;
        snprintf(name, sizeof name, "act.h%d.qkv", l);
        double* qkv = golden_result(r, name, (size_t)N * 3 * C);
        for (int part = 0; part < 3; part++) {
            const double* x = oracle_array(model, PARTS[part], l, 0);
            for (int i = 0; i < N * C; i++) qkv[i / C * 3 * C + part * C + i % C] = x[i];
        }
        snprintf(name, sizeof name, "act.h%d.ve", l);
        if (model->plan[l].values >= 0) {
            memcpy(golden_result(r, name, (size_t)N * C), oracle_array(model, "ve%d", model->plan[l].values, 0),
                   (size_t)N * C * sizeof(double));
        }
    }
    if (c->recipe == GOLDEN_NORMUON) {
        memcpy(golden_result(r, "act.smear_gate_raw", N - 1), oracle_array(model, "smear.raw", 0, 0) + 1,
               (N - 1) * sizeof(double));
    }
}

static void run_windows(OracleModel* model, const GoldenCase* c, const GoldenVariant* v, uint8_t** mask,
                        GoldenResults* r) {
    for (int w = 0; w < v->window_count; w++) {
        char prefix[32], name[64];
        int window = v->windows[w].window, batch = v->windows[w].batch;
        prepare(model, c, v, mask, batch, 0, window / 2, window);
        double loss = oracle_model_forward_backward(model, golden_batch(c, "tokens", batch),
                                                    golden_batch(c, "targets", batch), c->B, c->T);
        snprintf(prefix, sizeof prefix, "sw%d.b%d.", window, batch);
        snprintf(name, sizeof name, "%sloss", prefix);
        golden_result(r, name, 1)[0] = loss;
        for (int i = 0; i < model->count; i++) {
            const OracleArray* array = &model->arrays[i];
            if (!strncmp(array->name, "grad.", 5)) copy_result(r, prefix, array->name, array);
            if (!strcmp(array->name, "act.final_norm")) copy_result(r, prefix, "final_norm", array);
        }
    }
}

static void run_oracle(const GoldenCase* c, const GoldenVariant* v, GoldenResults* r) {
    OracleModel model;
    uint8_t* mask[2] = {NULL, NULL};
    oracle_model_init_rows(&model, c->recipe, c->rows, c->V, c->C, v->H, c->L, v->rope_bf16);
    model.fp8.on = v->fp8, model.fp8.x = v->fp8_x, model.fp8.w = v->fp8_w, model.fp8.grad = v->fp8_grad;
    for (int i = 0; i < model.count; i++) {
        if (strncmp(model.arrays[i].name, "param.", 6)) continue;
        double* start = golden_start(c, v, model.arrays[i].name + 6, model.arrays[i].n);
        memcpy(model.arrays[i].x, start, model.arrays[i].n * sizeof(double));
        free(start);
    }
    run_windows(&model, c, v, mask, r);
    golden_result(r, "loss0", 1)[0] = train_batch(&model, c, v, mask, 0);
    for (int i = 0; i < model.count; i++) copy_result(r, "", model.arrays[i].name, &model.arrays[i]);
    keep_renamed(r, &model, c);
    double* losses = golden_result(r, "loss", GOLDEN_STEPS);
    Moments* moments = (Moments*)test_calloc(model.count, sizeof(Moments));
    for (int step = 0; step < GOLDEN_STEPS && v->train; step++) {
        losses[step] = step == 0 ? golden_result(r, "loss0", 1)[0] : train_batch(&model, c, v, mask, step);
        oracle_update(&model, c, v, moments, step);
        keep_parameters(r, &model, step + 1);
    }
    if (v->train) {
        int last = GOLDEN_STEPS;
        model.fp8.on = false;                    // the records evaluate with the plain head
        prepare(&model, c, v, mask, last, last, v->window_short[last], v->window_long[last]);
        golden_result(r, "val_loss", 1)[0] = oracle_model_forward(&model, golden_batch(c, "tokens", last),
                                                                  golden_batch(c, "targets", last), c->B, c->T_val);
        if (c->recipe == GOLDEN_NORMUON) {
            copy_result(r, "val_", "cos", oracle_find(&model, "cos"));
            copy_result(r, "val_", "sin", oracle_find(&model, "sin"));
        }
    }
    for (int i = 0; i < model.count; i++) free(moments[i].m), free(moments[i].v), free(moments[i].g);
    free(moments);
    free(mask[0]), free(mask[1]);
    oracle_model_free(&model);
}

int main(int argc, char** argv) {
    test_init(argc, argv);
    golden_quiet = !test_state.verbose;
    if (test_state.filter_count && strchr(test_state.filters[0], '/')) {
        golden_run(test_state.filters[0], run_oracle, false);
        return test_summary();
    }
    if (test_group("embedding")) test_embedding();
    if (test_group("rmsnorm")) test_rmsnorm();
    if (test_group("mix")) test_mix();
    if (test_group("rotary")) test_rotary();
    if (test_group("attention")) test_attention();
    if (test_group("masks")) test_masks();
    if (test_group("gates")) test_gates();
    if (test_group("frequencies")) test_frequencies();
    if (test_group("fp8")) test_fp8();
    if (test_group("relu2")) test_relu2();
    if (test_group("matmul")) test_matmul();
    if (test_group("loss")) test_loss();
    if (test_group("optimizers")) test_optimizers();
    if (test_group("normuon")) test_normuon();
    if (test_group("model gradients")) test_model_gradients();
    static const char* cases[] = {"modern_micro64", "r8_micro64", "r11_micro64", "sub3_micro", "r45_micro64"};
    golden_only = "rope:zeroinit:embbf16:f32.ns_f32:fp8:f32.pe_f32:tabbf16";
    for (int i = 0; i < (int)(sizeof cases / sizeof cases[0]); i++) {
        char name[64], dir[64];
        snprintf(name, sizeof name, "golden %s", cases[i]);
        snprintf(dir, sizeof dir, "test/golden/%s", cases[i]);
        if (test_group(name)) golden_run(dir, run_oracle, false);
    }
    return test_summary();
}
