/*
The specification, tested: every backward function of oracle.h against central differences of its
forward function, the whole model's gradients likewise, and the whole model with its optimizers
against the golden files.

    test_oracle [filter] [--verbose]       from the root of the repository; needs no GPU

Central differences. A scalar s(x) = sum of w y(x) with random w has the gradient backward(dy = w).
(s(x + h) - s(x - h)) / 2h is off by h² s'''/6 and by rounding, about 2^-52 |s| sqrt(n) / h. With h = 1e-5,
|s| and s''' of the order of 10 the two are 2e-10 and 1e-10; 2e-8 times the gradient's largest
element, and at least 2e-8, leaves a factor of 50. A lost factor, sign or index is off by the
order of 1.
*/
#include "test.h"
#include "oracle.h"
#include "golden.h"

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

// Moves each of the n elements of x (or about 40 of them) and compares with the gradient given.
static void check_gradient(const char* name, double (*scalar)(void), double* x, const double* gradient,
                           size_t n) {
    const double h = 1e-5;
    double largest = 1, worst = 0;
    for (size_t i = 0; i < n; i++) {
        if (fabs(gradient[i]) > largest) largest = fabs(gradient[i]);
    }
    size_t stride = n > 40 ? n / 37 : 1;
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
    static const char* names[] = {"pair", "skip", "lerp"};
    char name[64];
    N = 3, C = 8;
    for (mode = 0; mode < 3; mode++) {
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

// Every parameter of a tiny model of each recipe. ReLU² has a kink in its slope, but an activation
// within 1e-5 of zero is rare (here there is none) and costs only 1e-5 of one term.
static void test_model_gradients(void) {
    static const char* names[] = {"modern", "untied", "unet"};
    B = 2, T = 5, V = 13;
    for (int n = 0; n < B * T; n++) {
        tokens[n] = (int)(test_random(1, n) % V);
        targets[n] = n == 3 ? -1 : (int)(test_random(2, n) % V);
    }
    for (int recipe = 0; recipe < 3; recipe++) {
        oracle_model_init(&model, recipe, V, 8, 2, 4, true);
        model.eps = 1e-3;
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
        }
        oracle_model_free(&model);
    }
}

// ---- golden files ----------------------------------------------------------------------------

typedef struct {
    double *m, *v;
} Moments;

static void copy_result(GoldenResults* r, const char* name, const OracleArray* array) {
    memcpy(golden_result(r, name, array->n), array->x, array->n * sizeof(double));
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
        if (golden_kind(tensor) == GOLDEN_MATRIX) {
            snprintf(name, sizeof name, "param.%s", tensor);
            const SafeTensor* t = golden_need(&c->init, name, 0);
            bool modern = c->recipe == GOLDEN_MODERN;
            oracle_muon_update(p->x, moments[i].m, g, (int)t->shape[0], (int)t->shape[1],
                               c->lr_muon * v->lr_mult[step], v->momentum[step], ORACLE_MOMENTUM_SUM,
                               modern ? ORACLE_MUON_SCALE_MAX : ORACLE_MUON_SCALE_RATIO);
            continue;
        }
        bool head = !strcmp(tensor, "lm_head.weight"), wte = !strcmp(tensor, "wte.weight");
        double lr = wte ? c->lr_wte : head ? c->lr_head : c->lr_scalar;
        oracle_adamw_update(p->x, g, moments[i].m, moments[i].v, p->n, lr * v->lr_mult[step],
                            c->adam_beta1, c->adam_beta2, c->adam_eps, 0, step + 1,
                            v->embbf16 && !head);
    }
}

static void keep_parameters(GoldenResults* r, const OracleModel* model, int steps) {
    char name[64];
    for (int i = 0; i < model->count; i++) {
        if (strncmp(model->arrays[i].name, "param.", 6)) continue;
        snprintf(name, sizeof name, "p%d.%.40s", steps, model->arrays[i].name + 6);
        copy_result(r, name, &model->arrays[i]);
    }
}

static void run_oracle(const GoldenCase* c, const GoldenVariant* v, GoldenResults* r) {
    OracleModel model;
    oracle_model_init(&model, c->recipe, c->V, c->C, c->H, c->L, v->rope_bf16);
    for (int i = 0; i < model.count; i++) {
        if (strncmp(model.arrays[i].name, "param.", 6)) continue;
        double* start = golden_start(c, v, model.arrays[i].name + 6);
        memcpy(model.arrays[i].x, start, model.arrays[i].n * sizeof(double));
        free(start);
    }
    const int* inputs = golden_batch(c, "tokens", 0);
    double loss = oracle_model_forward_backward(&model, inputs, golden_batch(c, "targets", 0), c->B, c->T);
    golden_result(r, "loss0", 1)[0] = loss;
    for (int i = 0; i < model.count; i++) copy_result(r, model.arrays[i].name, &model.arrays[i]);
    if (!v->train) {
        oracle_model_free(&model);
        return;
    }
    double* losses = golden_result(r, "loss", GOLDEN_STEPS);
    Moments* moments = (Moments*)test_calloc(model.count, sizeof(Moments));
    for (int step = 0; step < GOLDEN_STEPS; step++) {
        losses[step] = oracle_model_forward_backward(&model, golden_batch(c, "tokens", step),
                                                     golden_batch(c, "targets", step), c->B, c->T);
        oracle_update(&model, c, v, moments, step);
        keep_parameters(r, &model, step + 1);
    }
    golden_result(r, "val_loss", 1)[0] =
        oracle_model_forward(&model, golden_batch(c, "tokens", 6), golden_batch(c, "targets", 6), c->B, c->T);
    for (int i = 0; i < model.count; i++) free(moments[i].m), free(moments[i].v);
    free(moments);
    oracle_model_free(&model);
}

int main(int argc, char** argv) {
    test_init(argc, argv);
    golden_quiet = !test_state.verbose;
    if (test_group("embedding")) test_embedding();
    if (test_group("rmsnorm")) test_rmsnorm();
    if (test_group("mix")) test_mix();
    if (test_group("rotary")) test_rotary();
    if (test_group("attention")) test_attention();
    if (test_group("relu2")) test_relu2();
    if (test_group("matmul")) test_matmul();
    if (test_group("loss")) test_loss();
    if (test_group("optimizers")) test_optimizers();
    if (test_group("model gradients")) test_model_gradients();
    static const char* cases[] = {"modern_micro64", "r8_micro64", "r11_micro64"};
    for (int i = 0; i < (int)(sizeof cases / sizeof cases[0]); i++) {
        char name[64], dir[64];
        snprintf(name, sizeof name, "golden %s", cases[i]);
        snprintf(dir, sizeof dir, "test/golden/%s", cases[i]);
        if (test_group(name)) golden_run(dir, run_oracle, false);
    }
    return test_summary();
}
