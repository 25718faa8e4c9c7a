/*
How fast each kernel is, and how long a training step of the 124M model takes.

    bench [all|step|kernels [part of a name]]

On a CPU: a row per kernel, the best of several repetitions, on one core and on all, and beside it
what the host layer aims at on one core in fp32; then optimizer steps of the recipe `modern`, each
with its share of time by kernel, and beside them what others need for the same step on two cores.
The same source compiles under nvcc: there a row is microseconds and the share of a data sheet's
peak. Nothing has run there.

ns/element counts the elements of the tensor that is worked on, once, however many are read. GFLOP/s
counts what is executed: attention computes whole tiles, of which a part is hidden. No data is
needed: tokens and tensors are random.
*/
#define TRAIN_GPT2_NO_MAIN
#include "../train_gpt2.cu"
#include "../llmc/fp8.cuh"

// ---- tensors -------------------------------------------------------------------------------

static cudaStream_t stream;

static void* bench_alloc(size_t bytes) {
    void* p;
    CUDA_CHECK(cudaMalloc(&p, bytes));
    return p;
}

// Uniform in +-1.
static float* bench_floats(size_t n) {
    static uint32_t tensor;
    float *p = (float*)bench_alloc(n * sizeof(float)), *host = (float*)host_alloc(n, sizeof(float));
    tensor++;
    for (size_t i = 0; i < n; i++) host[i] = (float)(2 * rng_uniform(1, tensor, i) - 1);
    CUDA_CHECK(cudaMemcpy(p, host, n * sizeof(float), cudaMemcpyHostToDevice));
    free(host);
    return p;
}

static floatX* bench_tensor(size_t n) {
    float* from = bench_floats(n);
    floatX* p = (floatX*)bench_alloc(n * sizeof(floatX));
    cast_to_floatX(p, from, n, stream);
    CUDA_CHECK(cudaStreamSynchronize(stream));
    CUDA_CHECK(cudaFree(from));
    return p;
}

// Tokens of a text have a few frequent ones: the square makes small numbers likelier.
static void bench_tokens(int* tokens, int n, int V, uint32_t seed) {
    for (int i = 0; i < n; i++) {
        double u = rng_uniform(seed, 0, (uint64_t)i);
        tokens[i] = (int)(u * u * V);
    }
}

// ---- one row -------------------------------------------------------------------------------

typedef enum Unit { NS_PER_ELEMENT, GFLOPS } Unit;

// `for (Row r = row_begin(...); row_again(&r);) call;` measures the call and prints the row.
typedef struct Row {
    const char* name;
    char shape[40];
    Unit unit;
    double work;            // elements or FLOP
    double bytes;           // read and written, each tensor once
    double aim;             // in the unit, on one core in fp32; 0: none
    cudaEvent_t start, end;
    int pass, calls;        // pass 0: one core, 1: all
    double total_ms, best_ms[2];
} Row;

#ifdef __CUDACC__
enum { BENCH_PASSES = 1 };
static void bench_pass(int pass) { (void)pass; }
#else
enum { BENCH_PASSES = 2 };
static void bench_pass(int pass) { host_set_threads(pass == 0 ? 1 : 0); }
#endif

static const char* bench_only = "";

static Row row_begin(const char* name, const char* shape, Unit unit, double work, double bytes,
                     double aim) {
    Row r = {};
    r.name = name;
    snprintf(r.shape, sizeof r.shape, "%s", shape);
    r.unit = unit, r.work = work, r.bytes = bytes, r.aim = aim;
    r.calls = -1;
    if (strstr(name, bench_only)) {
        CUDA_CHECK(cudaEventCreate(&r.start));
        CUDA_CHECK(cudaEventCreate(&r.end));
    }
    return r;
}

static void row_print(const Row* r) {
#ifdef __CUDACC__
    // From the data sheet of an H100 SXM: 3350 GB/s, 989 TFLOP/s in bf16 with fp32 sums.
    double s = 1e-3 * r->best_ms[0], gbs = 1e-9 * r->bytes / s, flops = r->work / s;
    if (r->unit == GFLOPS) {
        printf("%-24s %-22s %10.1f us %8.0f GFLOP/s %5.1f%%\n", r->name, r->shape, 1e6 * s,
               1e-9 * flops, 100 * flops / 989e12);
    } else {
        printf("%-24s %-22s %10.1f us %8.0f GB/s    %5.1f%%\n", r->name, r->shape, 1e6 * s, gbs,
               100 * gbs / 3350);
    }
#else
    double value[2];
    for (int pass = 0; pass < 2; pass++) {
        double s = 1e-3 * r->best_ms[pass];
        value[pass] = r->unit == GFLOPS ? 1e-9 * r->work / s : 1e9 * s / r->work;
    }
    printf("%-24s %-22s %9.2f %9.2f  %s", r->name, r->shape, value[0], value[1],
           r->unit == GFLOPS ? "GFLOP/s   " : "ns/element");
    if (r->aim > 0) {
        bool met = r->unit == GFLOPS ? value[0] >= r->aim : value[0] <= r->aim;
        printf("  %s %g%s", r->unit == GFLOPS ? ">=" : "<=", r->aim, met ? "" : "  missed");
    }
    printf("\n");
#endif
    fflush(stdout);
}

// Each pass: a call to warm up, then at least five and a fifth of a second, at most a thousand.
static bool row_again(Row* r) {
    if (!strstr(r->name, bench_only)) return false;
    if (r->calls >= 0) {
        float ms;
        CUDA_CHECK(cudaEventRecord(r->end, stream));
        CUDA_CHECK(cudaEventSynchronize(r->end));
        CUDA_CHECK(cudaEventElapsedTime(&ms, r->start, r->end));
        if (r->calls == 1 || (r->calls > 1 && ms < r->best_ms[r->pass])) r->best_ms[r->pass] = ms;
        r->total_ms += ms;
        if (r->calls >= 5 && (r->total_ms > 200 || r->calls >= 1000)) {
            r->calls = -1;
            r->total_ms = 0;
            r->pass++;
        }
    }
    if (r->pass == BENCH_PASSES) {
        row_print(r);
        CUDA_CHECK(cudaEventDestroy(r->start));
        CUDA_CHECK(cudaEventDestroy(r->end));
        bench_pass(1);
        return false;
    }
    if (r->calls < 0) bench_pass(r->pass);
    r->calls++;
    CUDA_CHECK(cudaEventRecord(r->start, stream));
    return true;
}

static const char* shape_text(const char* fmt, ...) __attribute__((format(printf, 1, 2)));
static const char* shape_text(const char* fmt, ...) {
    static char text[40];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    return text;
}

// ---- kernels -------------------------------------------------------------------------------

// Aims: what touches each element once costs at most 2 ns, what sums over rows as well at most 4.
static const double AIM_ELEMENT = 2, AIM_ROW = 4, AIM_ATTENTION = 8;
static const double X = sizeof(floatX);

// The head in 8 bits: R rows of logits.
static void bench_fp8(int R, int C, int V, Matmul* mm) {
    size_t n = (size_t)R * V, nw = (size_t)V * C;
    floatX *logits = bench_tensor(n), *w = bench_tensor(nw);
    float* losses = bench_floats(R);
    uint8_t *g = (uint8_t*)bench_alloc(2 * n), *w8 = (uint8_t*)bench_alloc(2 * nw);
    int *targets = (int*)bench_alloc(R * sizeof(int)), *host = (int*)host_alloc(R, sizeof(int));
    bench_tokens(host, R, V, 2);
    CUDA_CHECK(cudaMemcpy(targets, host, R * sizeof(int), cudaMemcpyHostToDevice));
    for (Row r = row_begin("fp8_quantize_e4m3", shape_text("%d x %d", V, C), NS_PER_ELEMENT, nw,
                           (X + 2) * nw, 0);
         row_again(&r);)
        fp8_quantize_e4m3(w8, w8 + nw, w, V, C, 32, stream);
    for (Row r = row_begin("cross_entropy_fp8", shape_text("%d x %d", R, V), NS_PER_ELEMENT, n,
                           (2 * X + 2) * n, 0);
         row_again(&r);)
        cross_entropy_fp8(g, g + n, logits, losses, targets, R, V, SOFTCAP_SIGMOID, 30, 1, 448,
                          stream);
    for (Row r = row_begin("matmul_fp8", shape_text("%d x %d x %d", R, C, V), GFLOPS, 2.0 * n * C,
                           0, 0);
         row_again(&r);)
        matmul_fp8(logits, false, g, FP8_E5M2, w8 + nw, FP8_E4M3, R, C, V, 0x1p-14f, 0, false, mm,
                   stream);
    void* all[] = {logits, w, losses, g, w8, targets};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) CUDA_CHECK(cudaFree(all[i]));
    free(host);
}

static void bench_rows(int N, int C, int F, int V) {
    size_t n = (size_t)N * C, nf = (size_t)N * F;
    floatX *x = bench_tensor(nf), *y = bench_tensor(nf), *z = bench_tensor(nf);
    floatX* wte = bench_tensor((size_t)V * C);
    float *dwte = bench_floats((size_t)V * C), *rstd = bench_floats(2 * n), *s = bench_floats(8);
    float* scratch = bench_floats(mix_scratch_floats(N, C));
    int* tokens = (int*)bench_alloc(N * sizeof(int));
    int* tokens_host = (int*)host_alloc(N, sizeof(int));
    bench_tokens(tokens_host, N, V, 1);
    CUDA_CHECK(cudaMemcpy(tokens, tokens_host, N * sizeof(int), cudaMemcpyHostToDevice));
    EmbeddingIndex index;
    embedding_index_init(&index, N, V, C);
    embedding_index_build(&index, tokens_host, N, V);
    embedding_index_upload(&index, stream);
    char nc[40], nF[40];
    snprintf(nc, sizeof nc, "%d x %d", N, C);
    snprintf(nF, sizeof nF, "%d x %d", N, F);

    for (Row r = row_begin("embedding_forward", nc, NS_PER_ELEMENT, n, 2 * X * n, AIM_ELEMENT);
         row_again(&r);)
        embedding_forward(y, wte, tokens, N, C, stream);
    for (Row r = row_begin("embedding_backward", nc, NS_PER_ELEMENT, n, (X + 8) * n, AIM_ELEMENT);
         row_again(&r);)
        embedding_backward(dwte, y, &index, C, stream);
    for (Row r = row_begin("rmsnorm_forward", nc, NS_PER_ELEMENT, n, 2 * X * n, AIM_ROW);
         row_again(&r);)
        rmsnorm_forward(y, rstd, x, N, C, 1e-6f, stream);
    for (Row r = row_begin("residual_rmsnorm_forward", nc, NS_PER_ELEMENT, n, 4 * X * n, AIM_ROW);
         row_again(&r);)
        residual_rmsnorm_forward(z, y, rstd, x, y, N, C, 1e-6f, stream);
    for (Row r = row_begin("rmsnorm_backward", nc, NS_PER_ELEMENT, n, 4 * X * n, AIM_ROW);
         row_again(&r);)
        rmsnorm_backward(z, x, y, rstd, N, C, true, stream);
    for (Row r = row_begin("residual_add", nc, NS_PER_ELEMENT, n, 3 * X * n, AIM_ELEMENT);
         row_again(&r);)
        residual_add(z, x, y, n, stream);
    for (Row r = row_begin("mix_forward", nc, NS_PER_ELEMENT, n, 3 * X * n, AIM_ELEMENT);
         row_again(&r);)
        mix_forward(z, x, y, s, MIX_PAIR, N, C, C, C, C, stream);
    for (Row r = row_begin("mix_backward", nc, NS_PER_ELEMENT, n, 6 * X * n, AIM_ROW);
         row_again(&r);)
        mix_backward(z, z + n, s + 4, x, y, y + n, s, MIX_PAIR, N, C, C, C, C, C, C, scratch,
                     stream);
    for (Row r = row_begin("relu2_forward", nF, NS_PER_ELEMENT, nf, 2 * X * nf, AIM_ELEMENT);
         row_again(&r);)
        relu2_forward(y, x, nf, stream);
    for (Row r = row_begin("relu2_backward", nF, NS_PER_ELEMENT, nf, 3 * X * nf, AIM_ELEMENT);
         row_again(&r);)
        relu2_backward(z, x, y, nf, stream);
    embedding_index_free(&index);
    void* all[] = {x, y, z, wte, dwte, rstd, s, scratch, tokens};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) CUDA_CHECK(cudaFree(all[i]));
    free(tokens_host);
}

static void bench_rotary(int N, int T, int C, int D) {
    int H = C / D, ld = 3 * C;
    size_t n = (size_t)N * 2 * C;
    floatX *qkv = bench_tensor((size_t)N * ld), *dqkv = bench_tensor((size_t)N * ld);
    float *rstd = bench_floats((size_t)N * 2 * H), *cos = bench_floats((size_t)T * D / 2);
    float* sin = bench_floats((size_t)T * D / 2);
    const char* shape = shape_text("%d x %d, D=%d", N, 2 * C, D);
    for (Row r = row_begin("qknorm_rotary_forward", shape, NS_PER_ELEMENT, n, 2 * X * n, AIM_ROW);
         row_again(&r);)
        qknorm_rotary_forward(qkv, rstd, cos, sin, N, T, H, D, ld, 1e-6f, true, stream);
    for (Row r = row_begin("qknorm_rotary_backward", shape, NS_PER_ELEMENT, n, 3 * X * n, AIM_ROW);
         row_again(&r);)
        qknorm_rotary_backward(dqkv, qkv, rstd, cos, sin, N, T, H, D, ld, ld, true, stream);
    void* all[] = {qkv, dqkv, rstd, cos, sin};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) CUDA_CHECK(cudaFree(all[i]));
}

static void bench_loss(int R, int V) {
    size_t n = (size_t)R * V;
    floatX* logits = bench_tensor(n);
    float *losses = bench_floats(R), *sum = bench_floats(1);
    int *targets = (int*)bench_alloc(R * sizeof(int)), *host = (int*)host_alloc(R, sizeof(int));
    bench_tokens(host, R, V, 2);
    CUDA_CHECK(cudaMemcpy(targets, host, R * sizeof(int), cudaMemcpyHostToDevice));
    const char* shape = shape_text("%d x %d", R, V);
    for (Row r = row_begin("cross_entropy, loss", shape, NS_PER_ELEMENT, n, X * n, 0);
         row_again(&r);)
        cross_entropy(logits, losses, targets, R, V, SOFTCAP_NONE, 0, 1, false, stream);
    for (Row r = row_begin("cross_entropy", shape, NS_PER_ELEMENT, n, 3 * X * n, 0); row_again(&r);)
        cross_entropy(logits, losses, targets, R, V, SOFTCAP_NONE, 0, 1, true, stream);
    for (Row r = row_begin("cross_entropy, tanh cap", shape, NS_PER_ELEMENT, n, 3 * X * n, 0);
         row_again(&r);)
        cross_entropy(logits, losses, targets, R, V, SOFTCAP_TANH, 30, 1, true, stream);
    void* all[] = {logits, losses, sum, targets};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) CUDA_CHECK(cudaFree(all[i]));
    free(host);
}

static void bench_optimizers(size_t n, Matmul* mm) {
    float *g = bench_floats(n), *m = bench_floats(n), *v = bench_floats(n);
    float* master = bench_floats(n);
    float *norm = bench_floats(2), *guard = bench_floats(1);    // the guard is not set
    floatX* p = bench_tensor(n);
    float* second = bench_floats(4 * 3072);
    CUDA_CHECK(cudaMemset(v, 0, n * sizeof(float)));
    CUDA_CHECK(cudaMemset(second, 0, 4 * 3072 * sizeof(float)));
    CUDA_CHECK(cudaMemset(guard, 0, sizeof(float)));
    const char* shape = shape_text("%zu", n);
    AdamRule adam = {};
    adam.beta1 = 0.9, adam.beta2 = 0.95, adam.eps = 1e-8f;
    NormSegment segment = {g, n, true};
    Norms norms;
    void* tables = bench_alloc(norms_bytes(&segment, 1));
    norms_init(&norms, &segment, 1, tables, stream);
    for (Row r = row_begin("norms_measure", shape, NS_PER_ELEMENT, n, 4.0 * n, AIM_ELEMENT);
         row_again(&r);)
        norms_measure(norm, &norms, 1, stream);
    norms_free(&norms);
    for (Row r = row_begin("adamw_update", shape, NS_PER_ELEMENT, n, (24 + 2 * X) * n, AIM_ELEMENT);
         row_again(&r);)
        adamw_update(p, FLOATX_IS_BF16 ? master : (float*)p, g, m, v, n, 1e-4f, &adam, 1, guard,
                     stream);
    adam.bf16_grad = adam.bf16_state = adam.bf16_param = true;
    for (Row r = row_begin("adamw_update, bf16", shape, NS_PER_ELEMENT, n, (20 + 2 * X) * n, 0);
         row_again(&r);)
        adamw_update(p, NULL, g, m, v, n, 1e-4f, &adam, 1, guard, stream);
    int shapes[2][3] = {{4, 768, 768}, {2, 3072, 768}};
    for (int i = 0; i < 2; i++) {
        int count = shapes[i][0], rows = shapes[i][1], cols = shapes[i][2];
        double k = rows < cols ? rows : cols, longer = rows < cols ? cols : rows;
        double flop = count * 5 * 2 * k * k * (2 * longer + k);
        MuonRule muon = {}, normuon = {};
        muon.steps = normuon.steps = 5, muon.momentum = normuon.momentum = 0.95f;
        normuon.form = MUON_FORM_LERP, normuon.polar = true, normuon.beta2 = 0.95f;
        normuon.second_by_row = i == 1, normuon.cautious_decay = 1.2f;
        size_t bytes = muon_scratch_bytes(count, rows, cols, &normuon);
        void* scratch = bench_alloc(bytes);
        shape = shape_text("%d x %d x %d", count, rows, cols);
        for (Row r = row_begin("newton_schulz", shape, GFLOPS, flop, 0, 0); row_again(&r);)
            newton_schulz(p, g, count, rows, cols, &muon, scratch, bytes, mm, stream);
        float scale[4] = {1, 1, 1, 1};
        int place[4] = {0, 1, 2, 3};
        for (Row r = row_begin("muon_update", shape, GFLOPS, flop, 0, 0); row_again(&r);)
            muon_update(p, FLOATX_IS_BF16 ? master : NULL, g, m, NULL, place, count, rows, cols,
                        (size_t)rows * cols, scale, 1e-3f, &muon, scratch, bytes, mm, guard,
                        stream);
        for (Row r = row_begin("muon_update, normuon", shape, GFLOPS, flop, 0, 0); row_again(&r);)
            muon_update(p, FLOATX_IS_BF16 ? master : NULL, g, m, second, place, count, rows, cols,
                        (size_t)rows * cols, scale, 1e-3f, &normuon, scratch, bytes, mm, guard,
                        stream);
        CUDA_CHECK(cudaFree(scratch));
    }
    MuonRule gates = {};
    gates.form = MUON_FORM_LERP, gates.polar = true, gates.steps = 5, gates.momentum = 0.95f;
    gates.beta2 = 0.95f, gates.cautious_decay = 1.2f;
    for (Row r = row_begin("gate_update", "10 x 6 x 12", NS_PER_ELEMENT, 720, 20 * 720, 0);
         row_again(&r);)
        gate_update(master, m, second, g, 10, 6, 12, 72, 1e-3f, &gates, false, guard, stream);
    void* all[] = {g, m, v, master, norm, guard, tables, p, second};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) CUDA_CHECK(cudaFree(all[i]));
}

// Pairs of a row and a column of scores that are computed: a warp skips a tile that is all hidden.
// Query t sees `window` keys before it.
static double tile_pairs(int T, int window, int block_rows, int warp_rows, int columns,
                         bool key_rows) {
    double pairs = 0;
    for (int r = 0; r < (int)ceil_div(T, block_rows) * block_rows; r += warp_rows) {
        for (int c = 0; c < T; c += columns) {
            int query = key_rows ? c : r, queries = key_rows ? columns : warp_rows;
            int key = key_rows ? r : c, keys = key_rows ? warp_rows : columns;
            bool hidden = key > query + queries - 1 || query - (key + keys - 1) > window;
            if (!hidden) pairs += (double)warp_rows * columns;
        }
    }
    return pairs;
}

// window ATTENTION_NO_WINDOW: no bounds. Rows that differ in the window alone and agree in GFLOP/s
// take time in proportion to the tiles in sight.
template <int D> static void bench_attention(int B, int T, int C, int window) {
    typedef AttentionTiles<D> Tiles;
    int H = C / D, N = B * T;
    size_t n = (size_t)N * C;
    floatX *qkv = bench_tensor(3 * n), *dqkv = bench_tensor(3 * n), *out = bench_tensor(n);
    floatX* dout = bench_tensor(n);
    float *lse = bench_floats((size_t)N * H), *delta = bench_floats((size_t)N * H);
    float scale = 1 / sqrtf((float)D);
    int *first = NULL, *last = NULL;
    if (window < T) {
        first = (int*)bench_alloc(N * sizeof(int)), last = (int*)bench_alloc(N * sizeof(int));
        attention_bounds(first, last, NULL, 0, B, T, window, 1, stream);
    }
    double flop = 4.0 * D * tile_pairs(T, window, Tiles::FORWARD_QUERIES, 16 * Tiles::FORWARD_MT,
                                       Tiles::FORWARD_KEYS, false);
    double back = 8.0 * D * tile_pairs(T, window, Tiles::DKV_KEYS, 16 * Tiles::DKV_MT,
                                       Tiles::DKV_QUERIES, true) +
                  6.0 * D * tile_pairs(T, window, Tiles::DQ_QUERIES, 16 * Tiles::DQ_MT,
                                       Tiles::DQ_KEYS, false);
    double heads = (double)B * H;
    const char* shape = first ? shape_text("T=%d, W=%d, D=%d", T, window, D)
                              : shape_text("%d x T=%d, D=%d", B * H, T, D);
    double aim = FLOATX_IS_BF16 ? 0 : AIM_ATTENTION;
    for (Row r = row_begin("attention_forward", shape, GFLOPS, heads * flop, 0, aim);
         row_again(&r);)
        attention_forward(out, lse, qkv, qkv + C, qkv + 2 * C, first, B, T, H, D, 3 * C, 3 * C,
                          scale, 0, stream);
    for (Row r = row_begin("attention_backward", shape, GFLOPS, heads * back, 0, aim);
         row_again(&r);)
        attention_backward(dqkv, dqkv + C, dqkv + 2 * C, delta, dout, out, lse, qkv, qkv + C,
                           qkv + 2 * C, first, last, B, T, H, D, 3 * C, 3 * C, 3 * C, 3 * C, scale,
                           stream);
    void* all[] = {qkv, dqkv, out, dout, lse, delta, first, last};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) CUDA_CHECK(cudaFree(all[i]));
}

static void bench_matmul(const char* kind, int M, int N, int K, Matmul* mm) {
    floatX *a = bench_tensor((size_t)M * K), *b = bench_tensor((size_t)N * K);
    float* d = bench_floats((size_t)M * N);
    const char* shape = shape_text("%d x %d x %d", M, N, K);
    double flop = 2.0 * M * N * K;
    if (!strcmp(kind, "matmul_nt")) {
        for (Row r = row_begin(kind, shape, GFLOPS, flop, 0, 0); row_again(&r);)
            matmul_nt((floatX*)d, a, b, M, N, K, mm, stream);
    } else if (!strcmp(kind, "matmul_nn")) {
        for (Row r = row_begin(kind, shape, GFLOPS, flop, 0, 0); row_again(&r);)
            matmul_nn((floatX*)d, a, b, M, N, K, mm, stream);
    } else {
        for (Row r = row_begin(kind, shape, GFLOPS, flop, 0, 0); row_again(&r);)
            matmul_tn(d, a, b, M, N, K, 0, mm, stream);
    }
    void* all[] = {a, b, d};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) CUDA_CHECK(cudaFree(all[i]));
}

// A long sequence, for windows: as the trainer has it, or as one core has the patience for.
#ifdef __CUDACC__
enum { LONG_T = 65536, LONG_C = 768 };
#else
enum { LONG_T = 4096, LONG_C = 128 };
#endif

static void bench_kernels(void) {
    int N = 1024, C = 768, F = 4 * C, V = 50304, R = 256;
    static Matmul mm;
    CUDA_CHECK(cudaStreamCreate(&stream));
    matmul_init(&mm, stream);
#ifdef __CUDACC__
    printf("%s\n%-24s %-22s %13s %16s %6s\n", FLOATX_IS_BF16 ? "bf16" : "fp32", "kernel", "shape",
           "best", "", "peak");
#else
    printf("%s, best of several\n%-24s %-22s %9s %6d of them         aim (one core, fp32)\n",
           FLOATX_IS_BF16 ? "bf16" : "fp32", "kernel", "shape", "1 core", host_threads());
#endif
    bench_rows(N, C, F, V);
    bench_rotary(N, 256, C, 64);
    bench_rotary(N, 256, C, 128);
    bench_loss(R, V);
    bench_fp8(R, C, V, &mm);
    bench_optimizers((size_t)6144 * 768, &mm);
    bench_attention<64>(1, 512, C, ATTENTION_NO_WINDOW);
    bench_attention<128>(1, 512, C, ATTENTION_NO_WINDOW);
    bench_attention<128>(1, LONG_T, LONG_C, ATTENTION_NO_WINDOW);
    for (int window = 1024; window >= 256; window /= 2) {
        bench_attention<128>(1, LONG_T, LONG_C, window);
    }
    bench_matmul("matmul_nt", N, 3 * C, C, &mm);
    bench_matmul("matmul_nt", N, C, C, &mm);
    bench_matmul("matmul_nt", N, F, C, &mm);
    bench_matmul("matmul_nn", N, C, F, &mm);
    bench_matmul("matmul_tn", F, C, N, &mm);
    bench_matmul("matmul_nt", R, V, C, &mm);
    bench_matmul("matmul_nn", R, C, V, &mm);
    bench_matmul("matmul_tn", V, C, R, &mm);
    matmul_free(&mm);
    CUDA_CHECK(cudaStreamDestroy(stream));
}

// ---- a step --------------------------------------------------------------------------------

// Profile of a step, kept while it is the best.
#ifndef __CUDACC__
static HostProfileRow kept_rows[512];
static int kept_count;

static void profile_start(void) { host_profile(true); }
static void profile_keep(bool best) {
    const HostProfileRow* rows;
    int count = host_profile_rows(&rows);
    host_profile(false);
    if (!best) return;
    kept_count = count;
    memcpy(kept_rows, rows, count * sizeof *rows);
}

// What takes at least 1 % of the step. Products of matrices also as one.
static void profile_print(double seconds) {
    double matmuls = 0, inside = 0, rest = 0;
    int small = 0;
    for (int i = 0; i < kept_count; i++) {
        inside += kept_rows[i].seconds;
        if (!strncmp(kept_rows[i].name, "matmul", 6)) matmuls += kept_rows[i].seconds;
    }
    printf("    %6.1f%% matrix products, %.1f%% other kernels, %.1f%% outside\n",
           100 * matmuls / seconds, 100 * (inside - matmuls) / seconds,
           100 * (seconds - inside) / seconds);
    for (int i = 0; i < kept_count; i++) {
        const HostProfileRow* r = &kept_rows[i];
        if (r->seconds < 0.01 * seconds) {
            rest += r->seconds;
            small++;
        } else {
            printf("    %6.1f%% %8.1f ms %6ld x %s\n", 100 * r->seconds / seconds,
                   1e3 * r->seconds, r->calls, r->name);
        }
    }
    printf("    %6.1f%% %8.1f ms %6d others\n", 100 * rest / seconds, 1e3 * rest, small);
}
#else
static void profile_start(void) {}
static void profile_keep(bool) {}
static void profile_print(double) {}
#endif

static void bench_step(const char* optimizer, int B, int T, int steps, const char* peers) {
    static Settings cfg;
    static Model model;
    char batch[16], seq[16], micro[16];
    snprintf(batch, sizeof batch, "%d", B * T);
    snprintf(seq, sizeof seq, "%d", T);
    snprintf(micro, sizeof micro, "%d", B);
    const char* argv[] = {"bench", "--recipe", "modern", "--optimizer", optimizer, "--batch-tokens",
                          batch, "--seq-len", seq, "--micro-batch", micro};
    settings_parse(&cfg, sizeof argv / sizeof argv[0], (char**)argv);
    model_build(&model, &cfg, 0, 1);
    model_start(&model, NULL);
    double best = 0;
    for (int step = 0; step < steps; step++) {
        int N = B * T;
        model_at(&model, step);
        batch_wait(&model);
        bench_tokens(model.host.inputs, N, model.V, 2 * step);
        bench_tokens(model.host.targets, N, model.V, 2 * step + 1);
        profile_start();
        double begin = clock_now();
        micro_step(&model, &model.host, 0);
        StepStats stats = step_result(&model, step_measure(&model, &model.slots[0]));
        REQUIRE(stats.finite, "the loss of step %d is not finite", step + 1);
        update(&model);
        CUDA_CHECK(cudaStreamSynchronize(model.stream));
        double seconds = clock_now() - begin;
        bool better = step == 0 || seconds < best;
        if (better) best = seconds;
        profile_keep(better);
    }
    printf("\n%s %s, B=%d T=%d: %.3f s per step, %.0f tokens/s%s\n", optimizer,
           FLOATX_IS_BF16 ? "bf16" : "fp32", B, T, best, B * T / best, peers);
    profile_print(best);
    fflush(stdout);
    model_free(&model);
}

static void bench_steps(void) {
    bench_step("adamw", 4, 64, 3,
               "\n    others on two cores: PyTorch fp32 2.07 s, llm.c's train_gpt2.c 5.0 s; "
               "the matrix products alone 1.0 s");
    bench_step("adamw", 4, 256, 3,
               "\n    others on two cores: PyTorch fp32 6.79 s, llm.c's train_gpt2.c 26 s; "
               "the matrix products alone 4.0 s");
    bench_step("muon", 4, 64, 2, "");
}

int main(int argc, char** argv) {
    program_name = "bench";
    const char* what = argc > 1 ? argv[1] : "all";
    bool kernels = !strcmp(what, "kernels"), step = !strcmp(what, "step");
    bool all = !strcmp(what, "all");
    REQUIRE(argc <= 2 + kernels && (kernels || step || all),
            "usage: bench [all|step|kernels [part of a name]]");
    if (argc > 2) bench_only = argv[2];
    if (kernels || all) bench_kernels();
    if (step || all) bench_steps();
    return 0;
}
