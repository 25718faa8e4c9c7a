/*
The head in 8 bits: logits and their gradient as products of 8-bit floats with static scales.

    fp8_quantize_e4m3   out(rows,cols) = e4m3(scale in), and the same transposed
    matmul_fp8          y(M,N) = alpha a(M,K) b(N,K)ᵀ + beta y
    cross_entropy_fp8   losses of the logits z, and e5m2(g_scale bf16(dz)), also transposed

    forward    z(R,V)  = x wᵀ / (sx sw)      x8(R,C) e4m3, w8(V,C) e4m3, fast: bf16 has 8 bits
    backward   dx(R,C) = g w / (sg sw)       g8(R,V) e5m2, w8t(C,V) e4m3
               dw(V,C) = gᵀ x / (sg sx)      g8t(V,R) e5m2, x8t(C,R) e4m3, in float, += with beta 1

layout      Hopper multiplies 8-bit floats only where both operands are contiguous along K, and has
            no transposed loads of them. So what is contracted in both directions is written in both
            orders, by the kernel that makes it. All sizes are multiples of 16 (the columns of
            logits: loss_stride(V)), all matrices contiguous, pointers aligned to 16 bytes.
range       e4m3 has 3 bits behind the point and ends at 448, e5m2 has 2 and ends at 57344. What is
            larger, infinity included, becomes the largest value; NaN stays NaN.
rounding    to nearest even, always: in(floatX) scale to e4m3; sums in float, times alpha, z and dx
            rounded to bf16 once, in the fp32 build too; dz in float, to bf16, times g_scale to
            e5m2. From equal x and w the fp32 build thus makes what the bf16 build makes.
scales      are constants of a recipe, so they stay on the host: a product of two of them divides
            alpha. cuBLASLt's scale pointers would do the same multiplication with numbers that a
            kernel has left on the device.
fast        cuBLASLt's fast accumulation: partial sums stay in the tensor cores' accumulators of
            some 14 bits. For the forward only. The CPU build sums in float either way.
losses      as cross_entropy of loss.cuh without gradient makes them, to the bit
targets     -1: the row's loss is 0 and its codes are 0, whatever its logits are. The columns
            between V and loss_stride(V) have no influence and the code 0.
NaN         a NaN among a row's logits, or a target outside of 0..V-1, makes its loss NaN and its
            codes NaN up to V. So does, without a softcap, a logit of -inf at the target.
device      compute capability 8.9 or more; matmul_fp8 ends the program on any other
cost        bf16, bytes per element. fp8_quantize_e4m3: 2 read, 1 written for each order.
            cross_entropy_fp8: 2 read for the losses, 2 more for the gradient (from L2 where R rows
            fit there), 1 + 1 written. With the products a logit moves 2 + 6 + 1 + 1 = 10 bytes, in
            the plain head 2 + 6 + 2 + 2 = 12. Both kernels are bound by memory.
test        test/cases_fp8.h
sources     Micikevicius et al. 2022, arXiv:2209.05433 (the two formats); cuBLAS manual, "narrow
            precisions usage" (what Hopper takes)

A block of the two kernels has 128 x 128 elements. A thread reads and encodes 8 rows of 8
neighbours: eight codes of a row are one store, 16 threads fill 128 bytes of `out`. The same codes
taken column by column are eight words of 8 rows each; these go through shared memory, where 16
threads pick up the 128 rows of a column and store 128 bytes of `out_t`. A word of column c stands
at its place XOR c / 8: so 16 threads that write columns 8 apart, and 16 that read one column, meet
16 different pairs of banks.

The gradient kernel has a row's statistics from its loss: log Σ exp(c) = loss + c_target, so that
nothing but the losses is passed from one kernel to the other. That adds |log Σ exp c| 2^-24 to the
relative error of a probability, against 2^-9 of the bf16 and 2^-3 of the e5m2 that follow.
*/
#pragma once
#include <cuda_fp8.h>
#include "cast.cuh"
#include "device.cuh"
#include "loss.cuh"
#include "matmul.cuh"

typedef enum Fp8Type { FP8_E4M3, FP8_E5M2 } Fp8Type;

constexpr int FP8_TILE = 128;                    // rows and columns of a block
constexpr int FP8_THREADS = FP8_TILE * FP8_TILE / 64;
constexpr size_t FP8_TILE_BYTES = FP8_TILE * FP8_TILE;

// ---- codes -------------------------------------------------------------------------------------

// The codes of eight values, the first in the low byte.
template <Fp8Type TYPE> static __device__ inline uint64_t fp8_encode8(float8 x) {
    constexpr __nv_fp8_interpretation_t KIND = TYPE == FP8_E4M3 ? __NV_E4M3 : __NV_E5M2;
#ifdef __CUDACC__
    uint64_t codes = 0;
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        float2 pair = make_float2(x.v[j], x.v[j + 1]);
        codes |= (uint64_t)__nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, KIND) << 8 * j;
    }
    return codes;
#else
    return host_fp8_encode8(x.v, KIND);
#endif
}

// ---- a block's tile ----------------------------------------------------------------------------

// Row r of the eight that a thread encodes goes into byte r of its eight columns.
static __device__ __forceinline__ void fp8_collect(uint64_t (&columns)[8], uint64_t codes, int r) {
#pragma unroll
    for (int j = 0; j < 8; j++) columns[j] |= (codes >> 8 * j & 0xff) << 8 * r;
}

// Writes the block's tile of out_t (cols, rows), of which each thread has 8 x 8 codes. All threads
// call. tile: FP8_TILE_BYTES of shared memory.
static __device__ inline void fp8_store_transposed(uint8_t* out_t, const uint64_t (&columns)[8],
                                                   uint64_t* tile, int rows, int cols) {
    const int units = FP8_TILE / 8;              // words of a column; threads of a row
    int lane = threadIdx.x % units, group = threadIdx.x / units;
#pragma unroll
    for (int j = 0; j < 8; j++) tile[(8 * lane + j) * units + (group ^ lane)] = columns[j];
    __syncthreads();
    int row = blockIdx.y * FP8_TILE + 8 * lane;
    for (int c = group; c < FP8_TILE; c += units) {
        int col = blockIdx.x * FP8_TILE + c;
        if (row < rows && col < cols) {
            *(uint64_t*)(out_t + (size_t)col * rows + row) = tile[c * units + (lane ^ c / 8)];
        }
    }
}

// ---- kernels -----------------------------------------------------------------------------------

static __global__ void fp8_quantize_kernel(uint8_t* out, uint8_t* out_t, const floatX* in,
                                           int rows, int cols, float scale) {
    DYN_SMEM(uint64_t, tile);
    int row = blockIdx.y * FP8_TILE + threadIdx.x / (FP8_TILE / 8) * 8;
    int col = blockIdx.x * FP8_TILE + threadIdx.x % (FP8_TILE / 8) * 8;
    uint64_t columns[8] = {};
    if (row < rows && col < cols) {
#pragma unroll 4
        for (int r = 0; r < 8; r++) {
            size_t at = (size_t)(row + r) * cols + col;
            float8 x = load8(in + at);
            for (int j = 0; j < 8; j++) x.v[j] *= scale;
            uint64_t codes = fp8_encode8<FP8_E4M3>(x);
            if (out) *(uint64_t*)(out + at) = codes;
            fp8_collect(columns, codes, r);
        }
    }
    if (out_t) fp8_store_transposed(out_t, columns, tile, rows, cols);
}

static __device__ inline float8 fp8_round_bf16(float8 x) {
    alignas(16) bf16 rounded[8];                 // registers on a GPU, a vector on a CPU
    store8(rounded, x);
    return load8(rounded);
}

// What a row's gradient needs beside its logits.
typedef struct Fp8Row {
    float lse;                         // log Σ exp(c)
    int target;
} Fp8Row;

// grad_scale (softmax(c) - [target]) dc/dz of eight columns, rounded to bf16.
template <bool CAPPED>
static __device__ inline float8 fp8_gradient8(float8 z, int col, Fp8Row row, Softcap cap,
                                              float grad_scale) {
    float8 t = {};
    if (CAPPED) {
        t = softcap_sigmoid8(z, cap);
        for (int j = 0; j < 8; j++) z.v[j] = cap.scale * t.v[j];
    }
    z = loss_exp8(z, row.lse);
    for (int j = 0; j < 8; j++) {
        float d = col + j == row.target ? z.v[j] - 1.0f : z.v[j];
        if (CAPPED) d *= 4.0f * t.v[j] * (1.0f - t.v[j]);
        z.v[j] = grad_scale * d;
    }
    return fp8_round_bf16(z);
}

template <bool CAPPED>
static __global__ void cross_entropy_fp8_kernel(uint8_t* g, uint8_t* g_t, const floatX* logits,
                                                const float* losses, const int* targets, int R,
                                                int V, Softcap cap, float grad_scale,
                                                float g_scale) {
    DYN_SMEM(uint64_t, tile);
    Fp8Row* tile_rows = (Fp8Row*)(tile + FP8_TILE_BYTES / sizeof(uint64_t));
    int ld = loss_stride(V), first = blockIdx.y * FP8_TILE;
    if (threadIdx.x < FP8_TILE && first + (int)threadIdx.x < R) {
        int r = first + threadIdx.x, target = targets[r];
        float c = 0.0f;
        if ((unsigned)target < (unsigned)V) {
            c = to_float(logits[(size_t)r * ld + target]);
            if (CAPPED) c = cap.scale / (1.0f + fast_exp2(cap.k * c));
        }
        tile_rows[threadIdx.x] = {losses[r] + c, target};
    }
    __syncthreads();
    int group = threadIdx.x / (FP8_TILE / 8) * 8, row = first + group;
    int col = blockIdx.x * FP8_TILE + threadIdx.x % (FP8_TILE / 8) * 8;
    uint64_t columns[8] = {};
    if (row < R && col < ld) {
        // 0xff for each of the eight columns that are columns of the vocabulary
        uint64_t used = col + 8 <= V ? ~0ull : col >= V ? 0 : (1ull << 8 * (V - col)) - 1;
#pragma unroll 2
        for (int r = 0; r < 8; r++) {
            Fp8Row stats = tile_rows[group + r];
            size_t at = (size_t)(row + r) * ld + col;
            float8 d = fp8_gradient8<CAPPED>(load8(logits + at), col, stats, cap, grad_scale);
            for (int j = 0; j < 8; j++) d.v[j] *= g_scale;
            uint64_t codes = stats.target == -1 ? 0 : fp8_encode8<FP8_E5M2>(d) & used;
            *(uint64_t*)(g + at) = codes;
            fp8_collect(columns, codes, r);
        }
    }
    fp8_store_transposed(g_t, columns, tile, R, ld);
}

// ---- launchers ---------------------------------------------------------------------------------

static inline dim3 fp8_grid(const char* what, int rows, int cols, uintptr_t pointers_or) {
    REQUIRE(rows > 0 && cols > 0 && rows % 16 == 0 && cols % 16 == 0,
            "%s: %d rows of %d columns, both must be multiples of 16", what, rows, cols);
    REQUIRE((pointers_or & 15) == 0, "%s: all pointers must be aligned to 16 bytes", what);
    return dim3((unsigned)ceil_div(cols, FP8_TILE), (unsigned)ceil_div(rows, FP8_TILE));
}

// out (rows, cols), out_t (cols, rows); one of them may be NULL
static inline void fp8_quantize_e4m3(uint8_t* out, uint8_t* out_t, const floatX* in, int rows,
                                     int cols, float scale, cudaStream_t stream) {
    dim3 grid = fp8_grid("fp8_quantize_e4m3", rows, cols,
                         (uintptr_t)out | (uintptr_t)out_t | (uintptr_t)in);
    launch<fp8_quantize_kernel>(grid, dim3(FP8_THREADS), FP8_TILE_BYTES, stream, out, out_t, in,
                                rows, cols, scale);
}

// y (M, N): float, or floatX that holds bf16 values in both builds
static inline void matmul_fp8(void* y, bool y_float, const uint8_t* a, Fp8Type type_a,
                              const uint8_t* b, Fp8Type type_b, int M, int N, int K, float alpha,
                              float beta, bool fast, Matmul* mm, cudaStream_t stream) {
    REQUIRE(M % 16 == 0 && N % 16 == 0 && K % 16 == 0,
            "matmul_fp8: M=%d N=%d K=%d, all must be multiples of 16", M, N, K);
    REQUIRE(type_a == FP8_E4M3 || type_b == FP8_E4M3,
            "matmul_fp8: both operands are e5m2; there is no product of two of these");
    MatmulKey key = {M, N, K, 1, false, true,
                     type_a == FP8_E4M3 ? CUDA_R_8F_E4M3 : CUDA_R_8F_E5M2,
                     type_b == FP8_E4M3 ? CUDA_R_8F_E4M3 : CUDA_R_8F_E5M2,
                     y_float ? (int)CUDA_R_32F : MATMUL_FLOATX, fast};
    matmul_run(y, a, b, y, &key, alpha, beta, mm, stream);
    if (!y_float && !FLOATX_IS_BF16) cast_round_bf16((float*)y, (float*)y, (size_t)M * N, stream);
}

// g (R, V16), g_t (V16, R) with V16 = loss_stride(V), both always written; logits are only read
static inline void cross_entropy_fp8(uint8_t* g, uint8_t* g_t, const floatX* logits, float* losses,
                                     const int* targets, int R, int V, SoftcapKind kind, float cap,
                                     float grad_scale, float g_scale, cudaStream_t stream) {
    dim3 grid = fp8_grid("cross_entropy_fp8", R, loss_stride(V),
                         (uintptr_t)g | (uintptr_t)g_t | (uintptr_t)logits);
    Softcap line = softcap_of(kind, cap);
    cross_entropy((floatX*)logits, losses, targets, R, V, kind, cap, grad_scale, false, stream);
    size_t smem = FP8_TILE_BYTES + FP8_TILE * sizeof(Fp8Row);
    if (kind == SOFTCAP_NONE) {
        launch<cross_entropy_fp8_kernel<false>>(grid, dim3(FP8_THREADS), smem, stream, g, g_t,
                                                logits, (const float*)losses, targets, R, V, line,
                                                grad_scale, g_scale);
        return;
    }
    launch<cross_entropy_fp8_kernel<true>>(grid, dim3(FP8_THREADS), smem, stream, g, g_t, logits,
                                           (const float*)losses, targets, R, V, line, grad_scale,
                                           g_scale);
}
