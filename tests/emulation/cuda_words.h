// The words of CUDA C++ that kernels use, in terms of fibers. What a kernel uses beyond them does not compile: add it here.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "fibers.h"

#define __global__ static  // a kernel that is not launched is not compiled
#define __device__
#define __host__
#define __constant__ static const
#define __shared__ static thread_local  // nothing else is, so that request.h can measure it and fill it with NaN
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define PATCHREG_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(emulation::block->dynamic_shared)

#define threadIdx (emulation::block->current->thread)
#define blockIdx (emulation::block->index)
#define blockDim (emulation::block->size)
#define gridDim (emulation::block->grid)
#define warpSize 32

#define __syncthreads() ((void)emulation::barrier(__LINE__))
#define __syncthreads_or(predicate) emulation::barrier(__LINE__, predicate)

struct float2 {
    float x, y;
} __attribute__((aligned(8)));
struct float3 {
    float x, y, z;
};
struct float4 {
    float x, y, z, w;
} __attribute__((aligned(16)));
struct uint2 {
    unsigned x, y;
} __attribute__((aligned(8)));
struct uint4 {
    unsigned x, y, z, w;
} __attribute__((aligned(16)));
struct int2 {
    int x, y;
} __attribute__((aligned(8)));
struct int3 {
    int x, y, z;
};
struct ushort4 {
    unsigned short x, y, z, w;
} __attribute__((aligned(8)));
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int3 make_int3(int x, int y, int z) { return {x, y, z}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

inline unsigned emulated_lane() { return emulation::block->current->lane; }
template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    const unsigned within = unsigned(width - 1);
    return emulation::exchange(mask, value, (emulated_lane() & ~within) | (unsigned(source) & within));
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned step, int width = 32) {
    const unsigned lane = emulated_lane();
    return emulation::exchange(mask, value, (lane & unsigned(width - 1)) + step < unsigned(width) ? lane + step : lane);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned step, int width = 32) {
    const unsigned lane = emulated_lane();
    return emulation::exchange(mask, value, (lane & unsigned(width - 1)) >= step ? lane - step : lane);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int with, int = 32) {
    return emulation::exchange(mask, value, emulated_lane() ^ unsigned(with));
}
inline void __syncwarp(unsigned mask = ~0u) { emulation::meet_warp(mask, 0); }
inline unsigned __ballot_sync(unsigned mask, int predicate) { return emulation::ballot(mask, predicate); }
inline int __any_sync(unsigned mask, int predicate) { return emulation::ballot(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return emulation::ballot(mask, !predicate) == 0; }
inline unsigned __activemask() = delete;  // says nothing that a kernel may rely on

// Fibers change over only where they wait, so that these are atomic.
template <class T, class U, class Change> T emulated_atomic(T* place, U value, Change change) {
    const T old = *place;
    *place = change(old, T(value));
    return old;
}
template <class T, class U> T atomicAdd(T* place, U value) {
    if (std::is_floating_point_v<T>) emulation::block->float_atomics = true;  // their order rounds differently
    return emulated_atomic(place, value, [](T a, T b) { return T(a + b); });
}
template <class T, class U> T atomicMax(T* place, U value) {
    return emulated_atomic(place, value, [](T a, T b) { return a < b ? b : a; });
}
template <class T, class U> T atomicMin(T* place, U value) {
    return emulated_atomic(place, value, [](T a, T b) { return b < a ? b : a; });
}
template <class T, class U> T atomicOr(T* place, U value) {
    return emulated_atomic(place, value, [](T a, T b) { return T(a | b); });
}
template <class T, class U> T atomicExch(T* place, U value) {
    return emulated_atomic(place, value, [](T, T b) { return b; });
}
template <class T, class U, class V> T atomicCAS(T* place, U expected, V value) {
    return emulated_atomic(place, value, [=](T a, T b) { return a == T(expected) ? b : a; });
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T> T __ldg(const T* place) { return *place; }
template <class T> T __ldcg(const T* place) { return *place; }
template <class T> T __ldcs(const T* place) { return *place; }
template <class T> void __stcg(T* place, T value) { *place = value; }
template <class T> void __stcs(T* place, T value) { *place = value; }

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __saturatef(float x) { return x < 0 || x != x ? 0.0f : x > 1 ? 1.0f : x; }
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }
inline int __float2int_rd(float x) { return int(std::floor(x)); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
using std::max;
using std::min;
