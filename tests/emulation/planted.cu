// Kernels with one planted fault each, and right ones beside them: see tests/ops/test_emulation.py.
#include "block.h"

namespace planted {

using namespace patchreg;

// out[t] = in[t + 1], through shared memory.
template <bool BARRIER> __global__ void shift(const float* in, float* out) {
    __shared__ float held[64];
    const int t = int(threadIdx.x);
    held[t] = in[t];
    if (BARRIER) __syncthreads();
    out[t] = held[(t + 1) % 64];
}

// Sums of neighbours, twice over: without the second barrier a fast thread overwrites what a slow one has yet to read.
template <bool BARRIER> __global__ void smooth_twice(float* data) {
    __shared__ float held[64];
    const int t = int(threadIdx.x);
    float value = data[t];
    for (int pass = 0; pass < 2; ++pass) {
        held[t] = value;
        __syncthreads();
        value = held[(t + 63) % 64] + held[(t + 1) % 64];
        if (BARRIER) __syncthreads();
    }
    data[t] = value;
}

__global__ void two_barriers(float* out) {
    const int t = int(threadIdx.x);
    if (t < 40) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    out[t] = 1.0f;
}

__global__ void warp_against_block(float* out) {
    const int t = int(threadIdx.x);
    if (t < 40) {
        __syncthreads();
    } else {
        __syncwarp(WHOLE_WARP);
    }
    out[t] = 1.0f;
}

__global__ void shuffle_from_absent(float* out) {
    const int t = int(threadIdx.x);
    if (t < 16) out[t] = __shfl_sync(0xffffu, float(t), 20);
}

__global__ void shared_index(float* out, i64 past) {
    __shared__ float held[8][32];
    const int t = int(threadIdx.x);
    held[t / 32][t % 32 + past] = 1.0f;
    __syncthreads();
    out[t] = held[t / 32][t % 32];
}

__global__ void dynamic_index(float* out, i64 past) {
    PATCHREG_DYNAMIC_SHARED(float, held);
    const int t = int(threadIdx.x);
    held[t + past] = 1.0f;
    __syncthreads();
    out[t] = held[t];
}

// A plain copy, with an offset to leave the arguments by.
__global__ void copy(const float* in, float* out, i64 read_past, i64 write_past) {
    const int t = int(threadIdx.x);
    out[t + write_past] = in[t + read_past];
}

__global__ void reads_unwritten_shared(float* out) {
    __shared__ float held[64];
    if (threadIdx.x < 60) held[threadIdx.x] = 1.0f;
    __syncthreads();
    out[threadIdx.x] = held[threadIdx.x];
}

__global__ void misaligned(const float* in, float* out) {
    const float4 four = *reinterpret_cast<const float4*>(in + 1);
    out[threadIdx.x] = four.x;
}

__global__ void int_overflow(float* out, i64 large) { out[threadIdx.x] = float(int(large) * int(large)); }

template <int SIZE> __global__ void static_shared(float* out) {
    __shared__ float held[SIZE];
    held[threadIdx.x] = 1.0f;
    out[threadIdx.x] = held[threadIdx.x];
}

// Right: every thread adds to one sum by atomics, whose order rounds differently; and the block's sum in fixed order.
__global__ void sums(const float* in, float* by_atomics, float* by_block) {
    const int t = thread_in_block();
    atomicAdd(by_atomics, in[t]);
    const float sum = block_sum<64>(in[t]);
    if (t == 0) *by_block = sum;
}

__global__ void last_writer_wins(float* out) { *out = float(threadIdx.x); }

}  // namespace planted
