// Sums over the threads of a warp and of a block, and the name of dynamic shared memory.
#pragma once
#include "portable.h"

// Declares `type* name`, the dynamic shared memory of the block, aligned for any vector type; once in a kernel.
#if !defined(PATCHREG_EMULATION)
#define PATCHREG_DYNAMIC_SHARED(type, name)                       \
    extern __shared__ __align__(16) char patchreg_dynamic_shared[]; \
    type* const name = reinterpret_cast<type*>(patchreg_dynamic_shared)
#endif

namespace patchreg {

constexpr u32 WHOLE_WARP = 0xffffffffu;

// The index of a thread in its block, x fastest.
PATCHREG_FN int thread_in_block() {
    return int((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x);
}

// The sum over the 32 lanes, in lane 0 (others get partial sums). All lanes must call it.
template <class T> PATCHREG_FN T warp_sum(T value) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value += __shfl_down_sync(WHOLE_WARP, value, step);
    return value;
}

// The sum over the block, in its first thread (others get something else), always added in the same order. All threads
// must call it; THREADS is the size of the block, a multiple of 32.
template <int THREADS, class T> PATCHREG_FN T block_sum(T value) {
    static_assert(THREADS % 32 == 0 && THREADS <= 1024, "blocks are whole warps");
    __shared__ T of_warp[THREADS / 32];
    const int thread = thread_in_block(), lane = thread % 32, warp = thread / 32;
    value = warp_sum(value);
    if (lane == 0) of_warp[warp] = value;
    __syncthreads();
    if (warp == 0) value = warp_sum(lane < THREADS / 32 ? of_warp[lane] : T(0));
    __syncthreads();  // so that it may be called again at once
    return value;
}

}  // namespace patchreg
