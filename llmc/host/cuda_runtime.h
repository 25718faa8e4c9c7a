/*
CUDA for a machine without a GPU: the part of the CUDA runtime and of the CUDA language that the
kernels here use, for g++ -std=c++17. How kernels run is engine.h's matter; memory, streams and
events are in runtime.cpp.

Differences from a GPU that can be seen:
  static __shared__ arrays begin as zero or with the block before; DYN_SMEM memory begins as 0xff
  bytes (NaN) in each block. __activemask() is the lane itself. Sums of floats by several blocks
  through atomicAdd depend on HOST_THREADS. Approximate intrinsics differ in the last bits.
Test: test/test_host.cu
*/
#pragma once
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include "engine.h"

// ---- the language --------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) alignas(n)
// One worker in sanitizer builds: then the array can be a plain static with ASan's red zones.
#if defined(HOST_ASAN) || defined(HOST_TSAN)
#define __shared__ static
#else
#define __shared__ static thread_local
#endif
#define DYN_SMEM(T, name) T* name = (T*)host_block.dynamic

#define threadIdx (host_self->idx)
#define blockIdx (host_block.idx)
#define blockDim (host_block.block)
#define gridDim (host_block.grid)
static constexpr int warpSize = 32;

#define HOST_INLINE static inline __attribute__((always_inline, unused))
#define HOST_BITS(To, from) __builtin_bit_cast(To, from)

// ---- vector types --------------------------------------------------------------------------

#define HOST_VECTOR2(T, name, align)                                                               \
    struct alignas(align) name##2 {                                                                \
        T x, y;                                                                                    \
    };                                                                                             \
    HOST_INLINE name##2 make_##name##2(T x, T y) {                                                 \
        return name##2{x, y};                                                                      \
    }
#define HOST_VECTOR4(T, name, align)                                                               \
    struct alignas(align) name##4 {                                                                \
        T x, y, z, w;                                                                              \
    };                                                                                             \
    HOST_INLINE name##4 make_##name##4(T x, T y, T z, T w) {                                       \
        return name##4{x, y, z, w};                                                                \
    }
HOST_VECTOR2(float, float, 8)
HOST_VECTOR2(int, int, 8)
HOST_VECTOR2(unsigned, uint, 8)
HOST_VECTOR2(double, double, 16)
HOST_VECTOR2(unsigned short, ushort, 4)
HOST_VECTOR2(long long, longlong, 16)
HOST_VECTOR4(float, float, 16)
HOST_VECTOR4(int, int, 16)
HOST_VECTOR4(unsigned, uint, 16)
HOST_VECTOR4(unsigned short, ushort, 8)
HOST_VECTOR4(unsigned char, uchar, 4)

struct float3 {
    float x, y, z;
};
struct int3 {
    int x, y, z;
};
HOST_INLINE float3 make_float3(float x, float y, float z) {
    return float3{x, y, z};
}
HOST_INLINE int3 make_int3(int x, int y, int z) {
    return int3{x, y, z};
}
HOST_INLINE uint3 make_uint3(unsigned x, unsigned y, unsigned z) {
    return uint3{x, y, z};
}

// ---- memory access -------------------------------------------------------------------------

HOST_INLINE void host_check_aligned(const void* p, size_t bytes) {
    if (__builtin_expect((uintptr_t)p % bytes != 0, 0)) {
        host_error("misaligned vector access: address %p, wanted a multiple of %zu", p, bytes);
    }
}

#define HOST_LOAD(name)                                                                            \
    template <class T> HOST_INLINE T name(const T* p) {                                            \
        host_check_aligned(p, alignof(T));                                                         \
        return *p;                                                                                 \
    }
#define HOST_STORE(name)                                                                           \
    template <class T> HOST_INLINE void name(T* p, T v) {                                          \
        host_check_aligned(p, alignof(T));                                                         \
        *p = v;                                                                                    \
    }
HOST_LOAD(__ldg)
HOST_LOAD(__ldcs)
HOST_LOAD(__ldca)
HOST_LOAD(__ldcg)
HOST_LOAD(__ldlu)
HOST_LOAD(__ldcv)
HOST_STORE(__stcs)
HOST_STORE(__stcg)
HOST_STORE(__stwb)
HOST_STORE(__stwt)

HOST_INLINE void __threadfence(void) {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
HOST_INLINE void __threadfence_block(void) {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
HOST_INLINE void __threadfence_system(void) {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

// ---- atomics -------------------------------------------------------------------------------

template <class T> HOST_INLINE T atomicExch(T* p, T v) {
    T old;
    __atomic_exchange(p, &v, &old, __ATOMIC_RELAXED);
    return old;
}
template <class T> HOST_INLINE T atomicCAS(T* p, T expected, T v) {
    __atomic_compare_exchange(p, &expected, &v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
}

#define HOST_ATOMIC(name, T, expression)                                                           \
    HOST_INLINE T name(T* p, T v) {                                                                \
        T old, next;                                                                               \
        __atomic_load(p, &old, __ATOMIC_RELAXED);                                                  \
        do {                                                                                       \
            next = (expression);                                                                   \
        } while (!__atomic_compare_exchange(p, &old, &next, false, __ATOMIC_RELAXED,               \
                                            __ATOMIC_RELAXED));                                    \
        return old;                                                                                \
    }
#define HOST_ATOMIC_INTEGERS(T)                                                                    \
    HOST_ATOMIC(atomicAdd, T, (T)(old + v))                                                        \
    HOST_ATOMIC(atomicMax, T, old > v ? old : v)                                                   \
    HOST_ATOMIC(atomicMin, T, old < v ? old : v)                                                   \
    HOST_ATOMIC(atomicOr, T, old | v)                                                              \
    HOST_ATOMIC(atomicAnd, T, old & v)                                                             \
    HOST_ATOMIC(atomicXor, T, old ^ v)
HOST_ATOMIC_INTEGERS(unsigned)
HOST_ATOMIC_INTEGERS(unsigned long long)
HOST_ATOMIC(atomicAdd, int, (int)((unsigned)old + (unsigned)v))
HOST_ATOMIC(atomicSub, int, (int)((unsigned)old - (unsigned)v))
HOST_ATOMIC(atomicSub, unsigned, old - v)
HOST_ATOMIC(atomicMax, int, old > v ? old : v)
HOST_ATOMIC(atomicMin, int, old < v ? old : v)
HOST_ATOMIC(atomicOr, int, old | v)
HOST_ATOMIC(atomicAnd, int, old & v)
HOST_ATOMIC(atomicXor, int, old ^ v)
HOST_ATOMIC(atomicInc, unsigned, old >= v ? 0 : old + 1)
HOST_ATOMIC(atomicAdd, float, old + v)
HOST_ATOMIC(atomicAdd, double, old + v)

// ---- barriers ------------------------------------------------------------------------------
// The call site comes along as default arguments, for the deadlock and divergence reports.

HOST_INLINE void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    host_barrier(0, 0, 0, "__syncthreads", file, line);
}
HOST_INLINE int __syncthreads_count(int predicate, const char* file = __builtin_FILE(),
                                    int line = __builtin_LINE()) {
    return host_barrier(0, 0, predicate, "__syncthreads_count", file, line);
}
HOST_INLINE int __syncthreads_or(int predicate, const char* file = __builtin_FILE(),
                                 int line = __builtin_LINE()) {
    return host_barrier(0, 0, predicate, "__syncthreads_or", file, line) != 0;
}
HOST_INLINE int __syncthreads_and(int predicate, const char* file = __builtin_FILE(),
                                  int line = __builtin_LINE()) {
    return host_barrier(0, 0, !predicate, "__syncthreads_and", file, line) == 0;
}
HOST_INLINE void __syncwarp(unsigned mask = 0xffffffffu) {
    host_syncwarp(mask);
}
HOST_INLINE unsigned __activemask(void) {
    return host_active_mask();
}

// ---- warp operations -----------------------------------------------------------------------
// A slot carries the value in its low half and, for shuffles, the source lane in its high half.

HOST_INLINE void* host_slot(uint32_t value, uint32_t source) {
    return (void*)((uintptr_t)source << 32 | value);
}
HOST_INLINE uint32_t host_slot_value(void* slot) {
    return (uint32_t)(uintptr_t)slot;
}

// A source outside the mask gives the lane its own value: on a GPU it is undefined.
HOST_NOSAN static inline void host_shuffle(void** slots, unsigned mask) {
    uint32_t value[32];
    for (int i = 0; i < 32; i++) value[i] = mask >> i & 1 ? host_slot_value(slots[i]) : 0;
    for (unsigned m = mask; m; m &= m - 1) {
        int i = __builtin_ctz(m);
        unsigned source = (unsigned)((uintptr_t)slots[i] >> 32);
        slots[i] = host_slot(value[mask >> source & 1 ? source : (unsigned)i], 0);
    }
}

template <class T>
HOST_INLINE T host_shuffle_from(unsigned mask, T v, unsigned source, const char* what) {
    static_assert(sizeof(T) <= 8, "shuffles move 1 to 8 bytes");
    uint32_t word[2] = {0, 0};
    memcpy(word, &v, sizeof(T));
    for (unsigned i = 0; i < (sizeof(T) + 3) / 4; i++) {
        void* slot = host_slot(word[i], source);
        word[i] = host_slot_value(host_warp_collective(mask, host_shuffle, slot, what));
    }
    memcpy(&v, word, sizeof(T));
    return v;
}

template <class T> HOST_INLINE T __shfl_sync(unsigned mask, T v, int source, int width = 32) {
    unsigned lane = host_self->lane, w = (unsigned)width - 1;
    return host_shuffle_from(mask, v, (lane & ~w) | ((unsigned)source & w), "__shfl_sync");
}
template <class T>
HOST_INLINE T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32) {
    unsigned lane = host_self->lane, first = lane & ~((unsigned)width - 1);
    return host_shuffle_from(mask, v, lane - first >= delta ? lane - delta : lane,
                             "__shfl_up_sync");
}
template <class T>
HOST_INLINE T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32) {
    unsigned lane = host_self->lane, end = (lane & ~((unsigned)width - 1)) + (unsigned)width;
    return host_shuffle_from(mask, v, lane + delta < end ? lane + delta : lane,
                             "__shfl_down_sync");
}
template <class T> HOST_INLINE T __shfl_xor_sync(unsigned mask, T v, int x, int width = 32) {
    unsigned lane = host_self->lane, source = lane ^ (unsigned)x;
    unsigned end = (lane & ~((unsigned)width - 1)) + (unsigned)width;
    return host_shuffle_from(mask, v, source < end ? source : lane, "__shfl_xor_sync");
}

HOST_NOSAN static inline void host_ballot(void** slots, unsigned mask) {
    uint32_t votes = 0;
    for (unsigned m = mask; m; m &= m - 1) {
        int i = __builtin_ctz(m);
        votes |= (uint32_t)(host_slot_value(slots[i]) != 0) << i;
    }
    for (unsigned m = mask; m; m &= m - 1) slots[__builtin_ctz(m)] = host_slot(votes, 0);
}
HOST_NOSAN static inline void host_match(void** slots, unsigned mask) {
    uint32_t result[32];
    for (unsigned m = mask; m; m &= m - 1) {
        int i = __builtin_ctz(m);
        result[i] = 0;
        for (unsigned k = mask; k; k &= k - 1) {
            int j = __builtin_ctz(k);
            result[i] |= (uint32_t)(slots[i] == slots[j]) << j;
        }
    }
    for (unsigned m = mask; m; m &= m - 1) {
        int i = __builtin_ctz(m);
        slots[i] = host_slot(result[i], 0);
    }
}

HOST_INLINE unsigned __ballot_sync(unsigned mask, int predicate) {
    void* slot = host_slot(predicate != 0, 0);
    return host_slot_value(host_warp_collective(mask, host_ballot, slot, "a warp vote"));
}
HOST_INLINE int __any_sync(unsigned mask, int predicate) {
    return __ballot_sync(mask, predicate) != 0;
}
HOST_INLINE int __all_sync(unsigned mask, int predicate) {
    return __ballot_sync(mask, !predicate) == 0;
}
template <class T> HOST_INLINE unsigned __match_any_sync(unsigned mask, T v) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "4 or 8 bytes");
    uintptr_t bits = 0;
    memcpy(&bits, &v, sizeof(T));
    return host_slot_value(host_warp_collective(mask, host_match, (void*)bits, "__match_any_sync"));
}

#define HOST_REDUCE(operation, T, expression)                                                      \
    HOST_NOSAN static inline void host_reduce_##operation##_##T(void** slots, unsigned mask) {     \
        T a = (T)host_slot_value(slots[__builtin_ctz(mask)]);                                      \
        for (unsigned m = mask & (mask - 1); m; m &= m - 1) {                                      \
            T b = (T)host_slot_value(slots[__builtin_ctz(m)]);                                     \
            a = (expression);                                                                      \
        }                                                                                          \
        for (unsigned m = mask; m; m &= m - 1) {                                                   \
            slots[__builtin_ctz(m)] = host_slot((uint32_t)a, 0);                                   \
        }                                                                                          \
    }                                                                                              \
    HOST_INLINE T __reduce_##operation##_sync(unsigned mask, T v) {                                \
        return (T)host_slot_value(host_warp_collective(mask, host_reduce_##operation##_##T,        \
            host_slot((uint32_t)v, 0), "__reduce_" #operation "_sync"));                           \
    }
HOST_REDUCE(add, unsigned, a + b)
HOST_REDUCE(min, unsigned, a < b ? a : b)
HOST_REDUCE(max, unsigned, a > b ? a : b)
HOST_REDUCE(and, unsigned, a & b)
HOST_REDUCE(or, unsigned, a | b)
HOST_REDUCE(add, int, (int)((unsigned)a + (unsigned)b))
HOST_REDUCE(min, int, a < b ? a : b)
HOST_REDUCE(max, int, a > b ? a : b)

// ---- launches ------------------------------------------------------------------------------

template <class... P> struct HostLaunch {
    dim3 grid, block;
    size_t dynamic_bytes;
    std::tuple<P...> args;
};

// The kernel's name is taken from the text "... [with auto K = name; ...]".
template <auto K> static inline const char* host_kernel_name(void) {
    static char name[128];
    if (name[0]) return name;
    const char* s = strstr(__PRETTY_FUNCTION__, "K = ");
    s = s ? s + 4 : __PRETTY_FUNCTION__;
    size_t n = 0;
    for (; s[n] && s[n] != ';' && s[n] != ']' && n < sizeof(name) - 1; n++) name[n] = s[n];
    name[n] = 0;
    return name;
}

// The loop around the kernel, with the kernel inlined in it. Each thread gets its own copies.
template <auto K, class... P> static void host_body(void* args) {
    std::tuple<P...>* tuple = (std::tuple<P...>*)args;
    do {
        std::apply(K, *tuple);
    } while (host_next_thread());
}

template <auto K, class... P> static void host_launch_now(void* arg) {
    HostLaunch<P...>* l = (HostLaunch<P...>*)arg;
    host_run_grid(host_kernel_name<K>(), l->grid, l->block, l->dynamic_bytes, host_body<K, P...>,
                  &l->args);
    if constexpr (std::is_pointer_v<std::tuple_element_t<0, std::tuple<P..., int>>>)
        host_break_output(host_kernel_name<K>(), (void*)std::get<0>(l->args));
}

template <auto K, class... P, class... A>
static inline void host_launch_as(void (*)(P...), dim3 grid, dim3 block, size_t dynamic_bytes,
                                  cudaStream_t stream, A... args) {
    static_assert(sizeof...(P) == sizeof...(A), "the kernel wants another number of arguments");
    HostLaunch<P...> l = {grid, block, dynamic_bytes, std::tuple<P...>(static_cast<P>(args)...)};
    if (host_streams_lazy()) {
        host_stream_submit(stream, host_launch_now<K, P...>, &l, sizeof(l));
    } else {
        host_launch_now<K, P...>(&l);
    }
}

template <auto K, class... A>
static inline void host_launch(dim3 grid, dim3 block, size_t dynamic_bytes, cudaStream_t stream,
                               A... args) {
    host_launch_as<K>(K, grid, block, dynamic_bytes, stream, args...);
}

#include "cuda_math.h"
#include "cuda_api.h"
