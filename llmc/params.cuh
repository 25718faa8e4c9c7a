/*
Parameters: banks of equal-shape tensors, with everything that is neither forward nor backward:
memory, owners, optimizer state, values from and to files.

A bank is a run of tensors of one shape in memory: `copies` times `slots` of them, slots being what
a layer puts side by side (its Q, K, V and O are one (3C, C) matrix to the product and four problems
of one shape to Muon). The program adds its tensors one by one, in the order of the file
(params_add), and then has them built.

values      p is what forward and backward read, on every rank. Behind it stands an fp32 master in
            the bf16 build, on the owner alone; tables may do without (bf16).
gradients   g, fp32, on every rank; the owner's is the sum over ranks after zero_reduce. Between
            steps fp32 values pass through g on their way to and from a file (params_adopt,
            params_collect): gradients that have to outlive a step are kept apart by params_stash.
optimizer   m and v of the units that this rank owns, one after another; of Muon's matrices m is the
            momentum and v NorMuon's second moment, one number per row or column.
files       safetensors: fp32, in the logical shape (a bank may hold a tensor transposed)
test        test/test_model.cu, test/test_zero.cu
*/
#pragma once
#include "cast.cuh"
#include "memory.cuh"
#include "safetensors.h"
#include "zero.cuh"

enum { MAX_BANKS = 16, MAX_TENSORS = 1024 };

// TABLE: rows by token; cut into shares. MATRIX: of a layer. GATE, SCALAR: small, on every rank.
typedef enum Kind { TABLE, MATRIX, GATE, SCALAR } Kind;

typedef struct Bank {
    const char* name;       // in labels
    Kind kind;
    bool bf16;              // the recipe keeps its values in bf16
    bool adam;              // updated by Adam, not by Muon
    bool has_master;        // on its owner: an fp32 value behind p
    int slots, copies;      // tensors of a layer, tensors in all
    int rows, cols;         // shape in memory of each
    int second;             // numbers of Muon's second moment for each; 0: it has none
    size_t stride, n;       // elements from one tensor to the next (a multiple of 8), and in all
    floatX* p;              // what forward and backward read
    float* g;               // gradient
    // Of the units that this rank owns, one after another:
    float* master;          // NULL where there is none
    float *m, *v;
    size_t owned;           // elements of each (of v: if adam)
    ZeroBank zero;          // who owns what
    float* stash;           // host: gradients kept through params_stash
} Bank;

typedef struct Tensor {
    char name[64];
    int bank, slot, unit;   // it is the unit-th tensor of its bank
    int layer;
    int rows, cols;         // y = x wᵀ: rows are outputs, cols inputs
    bool transposed;        // lies in memory as (cols, rows)
} Tensor;

// What of a tensor this rank owns: all of it, or a run of a table.
typedef struct Piece {
    int tensor;
    int place;              // of the unit it lies in, among those that this rank owns
    size_t at, own;         // its first element in p and g, and in master, m and (Adam's) v
    size_t offset, count;   // which elements of the tensor, as it lies in memory
} Piece;

typedef struct Params {
    Bank banks[MAX_BANKS];
    int bank_count;
    Tensor tensors[MAX_TENSORS];
    int count;
    ZeroBank* shards[MAX_BANKS];     // &banks[b].zero of the banks that have tensors
    int shard_count;
    Zero zero;
    cudaStream_t stream;
} Params;

// ---- what there is -----------------------------------------------------------------------------

static inline Bank* bank_of(Params* ps, int tensor) {
    return &ps->banks[ps->tensors[tensor].bank];
}

// Offset of a tensor in its bank, in elements.
static inline size_t tensor_offset(const Params* ps, int tensor) {
    const Tensor* t = &ps->tensors[tensor];
    return t->unit * ps->banks[t->bank].stride;
}

static inline size_t tensor_elements(const Params* ps, int tensor) {
    return (size_t)ps->tensors[tensor].rows * ps->tensors[tensor].cols;
}

// Adds a tensor in `slot` of the next copy of its bank; returns its number.
static inline int params_add(Params* ps, int b, int slot, int layer, const char* name, int rows,
                             int cols, bool transposed) {
    REQUIRE(ps->count < MAX_TENSORS, "more than %d tensors; try fewer --layers", MAX_TENSORS);
    Bank* bank = &ps->banks[b];
    Tensor* t = &ps->tensors[ps->count];
    snprintf(t->name, sizeof t->name, "%s", name);
    t->bank = b, t->slot = slot, t->layer = layer;
    t->rows = rows, t->cols = cols, t->transposed = transposed;
    t->unit = 0;                          // for now: how many of this slot came before
    for (int i = 0; i < ps->count; i++)
        t->unit += ps->tensors[i].bank == b && ps->tensors[i].slot == slot;
    bank->rows = transposed ? cols : rows;
    bank->cols = transposed ? rows : cols;
    if (slot >= bank->slots) bank->slots = slot + 1;
    bank->copies++;
    return ps->count++;
}

// "attn 4-7": the layers of a bucket.
static inline void params_label(const Params* ps, int b, ZeroBucket* bucket) {
    const Bank* bank = &ps->banks[b];
    int first = INT_MAX, last = 0;
    for (int i = 0; i < ps->count; i++) {
        const Tensor* t = &ps->tensors[i];
        bool inside = t->unit >= bucket->first && t->unit < bucket->first + bucket->units;
        if (t->bank != b || !inside) continue;
        if (t->layer < first) first = t->layer;
        if (t->layer > last) last = t->layer;
    }
    if (bank->kind != MATRIX) snprintf(bucket->label, sizeof bucket->label, "%s", bank->name);
    else snprintf(bucket->label, sizeof bucket->label, "%s %d-%d", bank->name, first, last);
}

// Cuts the banks into units, and the units into owners: a matrix of the layers is a unit, as is
// each rank's share of a table; gates and scalars are everybody's.
static inline void params_deal(Params* ps) {
    Zero* z = &ps->zero;
    int slots[MAX_BANKS], matrices = 0, layers = 0;
    for (int b = 0; b < ps->bank_count; b++) {
        const Bank* bank = &ps->banks[b];
        if (bank->n == 0 || bank->kind != MATRIX) continue;
        slots[matrices++] = bank->slots;
        if (bank->copies / bank->slots > layers) layers = bank->copies / bank->slots;
    }
    int bucket_layers = zero_bucket_layers(layers, slots, matrices, z->world);
    for (int b = 0; b < ps->bank_count; b++) {
        Bank* bank = &ps->banks[b];
        if (bank->n == 0) continue;
        if (bank->kind == MATRIX) {
            double small = bank->rows < bank->cols ? bank->rows : bank->cols;
            double cost = (double)bank->rows * bank->cols * (bank->adam ? 1 : small);
            zero_bank_init(z, &bank->zero, bank->stride, bank->copies, bucket_layers * bank->slots,
                           false, cost);
        } else if (bank->kind == TABLE) {
            size_t share = zero_share(z, bank->n);
            int shares = z->shard ? z->world : 1;
            bank->n = share * shares;
            zero_bank_init(z, &bank->zero, share, shares, shares, false, 0);
        } else {
            zero_bank_init(z, &bank->zero, bank->n, 1, 1, true, 0);
        }
        for (int k = 0; k < bank->zero.bucket_count; k++)
            params_label(ps, b, &bank->zero.buckets[k]);
        ps->shards[ps->shard_count++] = &bank->zero;
    }
    zero_deal(z, ps->shards, ps->shard_count);
    for (int b = 0; b < ps->bank_count; b++)
        ps->banks[b].owned = ps->banks[b].n ? ps->banks[b].zero.owned * ps->banks[b].zero.unit : 0;
}

// Of Muon's second moment: one row of numbers for each tensor that this rank updates.
static inline size_t bank_second_bytes(const Bank* bank) {
    return (size_t)(bank->kind == GATE ? bank->copies : bank->zero.owned) * bank->second *
           sizeof(float);
}

// After the last params_add; `table_rows`: to what multiple the rows of tables are filled up.
static inline void params_build(Params* ps, Memory* memory, int table_rows) {
    for (int i = 0; i < ps->count; i++)
        ps->tensors[i].unit = ps->tensors[i].unit * bank_of(ps, i)->slots + ps->tensors[i].slot;
    for (int b = 0; b < ps->bank_count; b++) {
        Bank* bank = &ps->banks[b];
        size_t rows = bank->rows;
        if (bank->kind == TABLE) rows = ceil_div(rows, table_rows) * table_rows;
        bank->stride = ceil_div(rows * bank->cols, 8) * 8;
        bank->n = bank->stride * bank->copies;
        bank->has_master = FLOATX_IS_BF16 && !(bank->bf16 && bank->kind == TABLE);
    }
    params_deal(ps);
    for (int b = 0; b < ps->bank_count; b++) {
        Bank* bank = &ps->banks[b];
        if (bank->n == 0) continue;
        size_t state = bank->owned * sizeof(float);
        bank->p = (floatX*)memory_take(memory, "weights", bank->n * sizeof(floatX));
        bank->g = (float*)memory_take(memory, "gradients", bank->n * sizeof(float));
        bank->m = (float*)memory_take(memory, bank->adam ? "Adam m" : "Muon momentum", state);
        if (bank->adam) bank->v = (float*)memory_take(memory, "Adam v", state);
        else bank->v = (float*)memory_take(memory, "second moment", bank_second_bytes(bank));
        if (bank->has_master) bank->master = (float*)memory_take(memory, "master weights", state);
    }
}

// Gradient and state start at zero.
static inline void params_clear(Params* ps) {
    for (int b = 0; b < ps->bank_count; b++) {
        Bank* bank = &ps->banks[b];
        if (bank->n == 0) continue;
        size_t state = bank->owned * sizeof(float);
        CUDA_CHECK(cudaMemsetAsync(bank->g, 0, bank->n * sizeof(float), ps->stream));
        if (state) CUDA_CHECK(cudaMemsetAsync(bank->m, 0, state, ps->stream));
        if (!bank->adam) state = bank_second_bytes(bank);
        if (state) CUDA_CHECK(cudaMemsetAsync(bank->v, 0, state, ps->stream));
    }
}

// pieces: room for MAX_TENSORS. A share of a table is one run, so no tensor has two pieces.
static inline int params_pieces(Params* ps, Piece* pieces) {
    int n = 0;
    for (int i = 0; i < ps->count; i++) {
        const ZeroBank* zero = &bank_of(ps, i)->zero;
        size_t first = tensor_offset(ps, i), last = first + tensor_elements(ps, i);
        for (int k = 0; k < zero->owned; k++) {
            size_t begin = zero->own[k] * zero->unit, end = begin + zero->unit;
            size_t from = begin > first ? begin : first, to = end < last ? end : last;
            if (from >= to) continue;
            pieces[n++] = {i, k, from, k * zero->unit + (from - begin), from - first, to - from};
        }
    }
    return n;
}

static inline void params_free(Params* ps) {
    for (int b = 0; b < ps->bank_count; b++) zero_bank_free(&ps->banks[b].zero);
}

static inline int64_t bank_elements(const Bank* bank) {
    return (int64_t)bank->copies * bank->rows * bank->cols;
}

static inline int64_t params_elements(const Params* ps) {
    int64_t count = 0;
    for (int b = 0; b < ps->bank_count; b++) count += bank_elements(&ps->banks[b]);
    return count;
}

// ---- values through g --------------------------------------------------------------------------

// The fp32 values of a bank from `offset` on pass from g into p, and into the masters this rank
// owns. So new values, from a file or from the random numbers, are made in g.
static inline void params_adopt(Params* ps, Bank* bank, size_t offset, size_t n) {
    const ZeroBank* zero = &bank->zero;
    float* value = bank->g + offset;
    if (bank->bf16) cast_round_bf16(value, value, n, ps->stream);
    cast_to_floatX(bank->p + offset, value, n, ps->stream);
    for (int i = 0; i < zero->owned && bank->master; i++) {
        size_t begin = zero->own[i] * zero->unit, end = begin + zero->unit;
        size_t from = begin > offset ? begin : offset, to = end < offset + n ? end : offset + n;
        if (from >= to) continue;
        CUDA_CHECK(cudaMemcpyAsync(bank->master + i * zero->unit + (from - begin), bank->g + from,
                                   (to - from) * sizeof(float), cudaMemcpyDeviceToDevice,
                                   ps->stream));
    }
}

// Until the weights of all ranks have come, and everything before is done.
static inline void params_wait(Params* ps) {
    for (int b = 0; b < ps->bank_count; b++) {
        ZeroBank* zero = &ps->banks[b].zero;
        for (int k = 0; k < zero->bucket_count; k++)
            zero_wait_gathered(&ps->zero, zero, zero->buckets[k].first, ps->stream);
    }
    CUDA_CHECK(cudaStreamSynchronize(ps->stream));
}

// The other way: g of every rank holds the fp32 values of all weights, until the next step. All
// ranks call it together.
static inline void params_collect(Params* ps) {
    for (int b = 0; b < ps->bank_count; b++) {
        Bank* bank = &ps->banks[b];
        ZeroBank* zero = &bank->zero;
        if (bank->n == 0) continue;
        if (!bank->has_master) {      // then p is the value, on every rank
            for (int k = 0; k < zero->bucket_count; k++)
                zero_wait_gathered(&ps->zero, zero, zero->buckets[k].first, ps->stream);
            cast_to_float(bank->g, bank->p, bank->n, ps->stream);
            continue;
        }
        for (int i = 0, run; i < zero->owned; i += run) {
            run = zero_run(zero, i);
            CUDA_CHECK(cudaMemcpyAsync(bank->g + zero->own[i] * zero->unit,
                                       bank->master + i * zero->unit,
                                       run * zero->unit * sizeof(float), cudaMemcpyDeviceToDevice,
                                       ps->stream));
        }
        for (int k = 0; k < zero->bucket_count; k++) {
            zero_gather(&ps->zero, zero, k, bank->g, true, ps->stream);
            zero_wait_gathered(&ps->zero, zero, zero->buckets[k].first, ps->stream);
        }
    }
    CUDA_CHECK(cudaStreamSynchronize(ps->stream));
}

// Keeps the gradients of Adam's banks on the host while values pass through g, and brings them back.
static inline void params_stash(Params* ps) {
    for (int b = 0; b < ps->bank_count; b++) {
        Bank* bank = &ps->banks[b];
        if (bank->n == 0 || !bank->adam) continue;
        bank->stash = (float*)host_alloc(bank->n, sizeof(float));
        CUDA_CHECK(cudaMemcpyAsync(bank->stash, bank->g, bank->n * sizeof(float),
                                   cudaMemcpyDeviceToHost, ps->stream));
    }
    CUDA_CHECK(cudaStreamSynchronize(ps->stream));
}
static inline void params_unstash(Params* ps) {
    for (int b = 0; b < ps->bank_count; b++) {
        Bank* bank = &ps->banks[b];
        if (!bank->stash) continue;
        CUDA_CHECK(cudaMemcpy(bank->g, bank->stash, bank->n * sizeof(float),
                              cudaMemcpyHostToDevice));
        free(bank->stash);
        bank->stash = NULL;
    }
}

// ---- one tensor --------------------------------------------------------------------------------

template <typename T>
static inline void tensor_transpose(T* out, const T* in, int rows, int cols) {
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < cols; c++) out[(size_t)c * rows + r] = in[(size_t)r * cols + c];
}

// The part of g that belongs to a tensor, in its logical shape: its gradient, or after
// params_collect its value.
static inline void tensor_read(Params* ps, float* out, int tensor) {
    const Tensor* t = &ps->tensors[tensor];
    size_t n = tensor_elements(ps, tensor);
    float* copy = t->transposed ? (float*)host_alloc(n, sizeof(float)) : out;
    CUDA_CHECK(cudaMemcpy(copy, ps->banks[t->bank].g + tensor_offset(ps, tensor),
                          n * sizeof(float), cudaMemcpyDeviceToHost));
    if (!t->transposed) return;
    tensor_transpose(out, copy, t->cols, t->rows);
    free(copy);
}

static inline void tensor_write(Params* ps, const float* in, int tensor) {
    const Tensor* t = &ps->tensors[tensor];
    Bank* bank = &ps->banks[t->bank];
    size_t n = tensor_elements(ps, tensor), offset = tensor_offset(ps, tensor);
    float* copy = (float*)host_alloc(n, sizeof(float));
    if (t->transposed) tensor_transpose(copy, in, t->rows, t->cols);
    else memcpy(copy, in, n * sizeof(float));
    CUDA_CHECK(cudaMemcpy(bank->g + offset, copy, n * sizeof(float), cudaMemcpyHostToDevice));
    params_adopt(ps, bank, offset, n);
    CUDA_CHECK(cudaStreamSynchronize(ps->stream));
    free(copy);
}

static inline void tensor_shape(const Tensor* t, int64_t* shape, int* dims) {
    *dims = t->rows == 1 ? 1 : 2;
    shape[0] = t->rows == 1 ? t->cols : t->rows;
    shape[1] = t->cols;
}

static inline size_t params_largest(const Params* ps) {
    size_t largest = 0;
    for (int i = 0; i < ps->count; i++)
        if (tensor_elements(ps, i) > largest) largest = tensor_elements(ps, i);
    return largest;
}

// ---- files -------------------------------------------------------------------------------------

typedef struct ParamsFile {
    Params* ps;
    float* data;            // one tensor at a time
} ParamsFile;

static inline const void* params_fetch(void* context, int tensor) {
    ParamsFile* file = (ParamsFile*)context;
    tensor_read(file->ps, file->data, tensor);
    return file->data;
}

// All tensors, in fp32 and in their logical shapes. All ranks call it, rank 0 writes.
static inline void params_save(Params* ps, const char* path, const char** metadata, int entries) {
    params_collect(ps);
    if (ps->zero.rank != 0) return;
    SafeTensor* tensors = (SafeTensor*)host_alloc(ps->count, sizeof(SafeTensor));
    for (int i = 0; i < ps->count; i++) {
        tensors[i].name = ps->tensors[i].name;
        tensors[i].type = SAFE_F32;
        tensor_shape(&ps->tensors[i], tensors[i].shape, &tensors[i].dims);
    }
    ParamsFile file = {ps, (float*)host_alloc(params_largest(ps), sizeof(float))};
    safetensors_write_from(path, tensors, ps->count, metadata, entries, params_fetch, &file);
    free(file.data);
    free(tensors);
}

static inline void params_load(Params* ps, const char* path) {
    SafeFile file;
    safetensors_open(&file, path);
    for (int i = 0; i < ps->count; i++) {
        const char* name = ps->tensors[i].name;
        int64_t shape[8];
        int dims;
        tensor_shape(&ps->tensors[i], shape, &dims);
        const SafeTensor* t = safetensors_find(&file, name);
        REQUIRE(t, "%s: no tensor %s; is it a model of other --layers or another recipe?", path,
                name);
        bool fits = t->dims == dims && t->shape[0] == shape[0] &&
                    (dims == 1 || t->shape[1] == shape[1]);
        REQUIRE(fits,
                "%s: %s has shape (%" PRId64 ", %" PRId64 "), the flags ask for (%" PRId64
                ", %" PRId64 ")",
                path, name, t->shape[0], t->dims > 1 ? t->shape[1] : 1, shape[0],
                dims > 1 ? shape[1] : 1);
        int64_t n = (int64_t)tensor_elements(ps, i);
        if (t->type != SAFE_BF16) {
            tensor_write(ps, (const float*)safetensors_data(&file, name, SAFE_F32, n), i);
            continue;
        }
        const uint16_t* half = (const uint16_t*)t->data;      // of a checkpoint
        uint32_t* whole = (uint32_t*)host_alloc((size_t)n, sizeof(float));
        for (int64_t k = 0; k < n; k++) whole[k] = (uint32_t)half[k] << 16;
        tensor_write(ps, (const float*)whole, i);
        free(whole);
    }
    safetensors_close(&file);
}

// ---- report ------------------------------------------------------------------------------------

// Who owns what.
static inline void params_print_owners(FILE* out, const Params* ps) {
    const Zero* z = &ps->zero;
    for (int r = 0; r < z->world; r++) {
        fprintf(out, "  rank %d owns", r);
        const char* comma = "";
        for (int b = 0; b < ps->bank_count; b++) {
            const Bank* bank = &ps->banks[b];
            if (bank->n == 0 || bank->kind != MATRIX) continue;
            fprintf(out, "%s %s", comma, bank->name);
            comma = ",";
            for (int i = 0; i < ps->count; i++) {      // "3.q": layer 3's c_q
                const Tensor* t = &ps->tensors[i];
                const char* name = strstr(t->name, ".c_");
                if (t->bank != b || bank->zero.owner[t->unit] != r || !name) continue;
                fprintf(out, " %d.%.*s", t->layer, (int)strcspn(name + 3, "."), name + 3);
            }
        }
        fputc('\n', out);
    }
}

// What a step costs on the wire; `summed`: floats summed over ranks besides gradients; Adam updates
// every `every` steps.
static inline void params_print_ranks(FILE* out, const Params* ps, int micro_steps, int summed,
                                      int every) {
    const Zero* z = &ps->zero;
    if (z->world == 1) return;
    size_t reduce = 0, gather = 0, sums, all = 0, muon = 0;
    double heaviest = 0, sum = 0;
    for (int b = 0; b < ps->bank_count; b++) {
        const ZeroBank* bank = &ps->banks[b].zero;
        if (ps->banks[b].n == 0) continue;
        reduce += zero_reduce_bytes(z, bank);
        gather += zero_gather_bytes(z, bank);
        if (!ps->banks[b].adam) muon += zero_reduce_bytes(z, bank) + zero_gather_bytes(z, bank);
        all += bank->unit * bank->units;
    }
    sums = zero_sum_bytes(z, summed, sizeof(float));
    fprintf(out, "ranks %d, gradients travel in %s, %d micro-steps of each rank in a step\n",
            z->world, z->wire_bf16 ? "bf16" : "fp32", micro_steps);
    fprintf(out, "  on the wire per step and rank: %zu bytes to reduce %zu gradients, %zu to "
            "gather weights, %zu for sums: %.1f MB\n", reduce, all, gather, sums,
            (reduce + gather + sums) / 1e6);
    if (every > 1)
        fprintf(out, "  and in the steps in which Adam waits, all but every %d: %.1f MB\n", every,
                (muon + sums) / 1e6);
    if (!z->shard) return;
    for (int r = 0; r < z->world; r++) {
        sum += z->load[r];
        if (z->load[r] > heaviest) heaviest = z->load[r];
    }
    fprintf(out, "  the busiest rank's update costs %.3f of the mean\n",
            sum > 0 ? heaviest * z->world / sum : 1.0);
    params_print_owners(out, ps);
}
