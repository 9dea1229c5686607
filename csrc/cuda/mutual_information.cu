// Mutual information: ranges, joint histogram, value and slopes, and the gradient recomputed voxel by voxel.
//
// Counts are integers, in units of 2^-24 of the largest weight (2^-26 for the Gaussian window, whose tails matter): shared
// memory adds integers in hardware but floats only in a loop, and the sum is the same in any order. What a voxel adds to
// a bin is half a unit off at most, no more than the float product of its weights may be.
#include "block.h"
#include "information.h"
#include "parzen.h"
#include "storage.h"

namespace patchreg {

using u64 = unsigned long long;

constexpr int MEASURE_THREADS = 256, ADD_THREADS = 512, EVALUATE_THREADS = 512, GATHER_THREADS = 256;

// What is kept of each pair of images before its bins * bins counts: keys of the largest -x and the largest x of either
// image and of the largest weight, and how many voxels are not a number.
constexpr int WEIGHT_KEY = 4, NOT_NUMBERS = 5, HEAD = 8;

// Unsigned integers in the order of the floats that they stand for; 0 comes before all of them.
PATCHREG_FN u32 key_of(float x) {
    const u32 bits = float_to_bits(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
PATCHREG_FN float value_of(u64 key) {
    const u32 bits = u32(key);
    return bits_to_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

// A range that was given, as the bits of a double, or else what was measured.
PATCHREG_FN double end_of_range(i64 given, const u64* key, bool low) {
    const double end = __longlong_as_double(given);
    return end == end ? end : double(low ? -value_of(*key) : value_of(*key));
}

PATCHREG_FN float units_per_count(int taps) { return taps == GAUSSIAN ? 67108864.0f : 16777216.0f; }

// Intensities to places among the bins. The two parts of `low` and `step` are those of a double, so that a place among
// 128 bins has no larger error than one among 8.
struct Axis {
    float low, low_rest, step, step_rest, lowest, highest;  // `lowest` and `highest` of the floats within the range
    int bins;
};

PATCHREG_FN Axis axis_of(double low, double high, int bins) {
    const double step = high == low ? 0.0 : (bins - 3) / (high - low);  // one intensity only: one place, and no slope
    Axis axis;
    axis.low = float(low), axis.low_rest = float(low - axis.low);
    axis.step = float(step), axis.step_rest = float(step - axis.step);
    axis.lowest = axis.low < low ? nextafterf(axis.low, float(high)) : axis.low;
    axis.highest = float(high) > high ? nextafterf(float(high), axis.low) : float(high);
    axis.bins = bins;
    return axis;
}

struct Place {
    int first;
    float offset;
};

template <int TAPS> PATCHREG_FN Place place_of(float x, const Axis& axis) {
    const float last = float(axis.bins - 3);
    const float d = x - axis.low, there = d - x, rest = (x - (d - there)) - (axis.low + there) - axis.low_rest;
    float place = d * axis.step;
    place = place > 0.0f ? place : 0.0f;
    place = place < last ? place : last;
    if (x < axis.lowest) place = 0.0f;
    if (x > axis.highest) place = last;
    const int first = first_bin<TAPS>(place, axis.bins);
    if (x < axis.lowest || x > axis.highest) return {first, place - float(first)};
    return {first, fmaf(d, axis.step, -float(first)) + fmaf(rest, axis.step, d * axis.step_rest)};
}

template <class T> PATCHREG_FN float weight_at(const T* weight, i64 voxel) {
    const float w = widen(weight[voxel]);
    return w > 0.0f ? w : 0.0f;
}

// grid: `blocks` blocks for each pair, as in all kernels of voxels below.
template <class T>
__global__ void __launch_bounds__(MEASURE_THREADS)
    measure(const T* fixed, const T* moving, const T* weight, u64* counts, i64 blocks, i64 voxels, i64 channels,
            i64 weight_of_batch, i64 bins, i64 of_fixed, i64 of_moving) {
    const i64 pair = blockIdx.x / blocks, step = blocks * MEASURE_THREADS;
    const i64 first = blockIdx.x % blocks * MEASURE_THREADS + threadIdx.x;
    __shared__ u32 keys[WEIGHT_KEY + 1];
    if (threadIdx.x <= WEIGHT_KEY) keys[threadIdx.x] = 0;
    __syncthreads();
    const auto image = [&](const T* x, int slot) {
        u32 low = 0, high = 0;
        for (i64 v = first; v < voxels; v += step) {
            const float value = widen(x[v]);
            low = max(low, key_of(-value)), high = max(high, key_of(value));
        }
        for (int k = 16; k > 0; k /= 2) {
            low = max(low, __shfl_xor_sync(WHOLE_WARP, low, k));
            high = max(high, __shfl_xor_sync(WHOLE_WARP, high, k));
        }
        if (threadIdx.x % 32 == 0) atomicMax(&keys[slot], low), atomicMax(&keys[slot + 1], high);
    };
    if (of_fixed) image(fixed + pair * voxels, 0);
    if (of_moving) image(moving + pair * voxels, 2);
    if (weight) {
        const T* w = weight + (weight_of_batch ? pair / channels * voxels : 0);
        u32 high = 0;
        for (i64 v = first; v < voxels; v += step) high = max(high, key_of(weight_at(w, v)));
        for (int k = 16; k > 0; k /= 2) high = max(high, __shfl_xor_sync(WHOLE_WARP, high, k));
        if (threadIdx.x % 32 == 0) atomicMax(&keys[WEIGHT_KEY], high);
    }
    __syncthreads();
    if (threadIdx.x <= WEIGHT_KEY && keys[threadIdx.x] != 0)
        atomicMax(counts + pair * (HEAD + bins * bins) + threadIdx.x, u64(keys[threadIdx.x]));
}

// A product of weights in units. Those of B-splines stay below 2^23, from where on the unit of floats is 1.
template <int TAPS> PATCHREG_FN u32 rounded_product(float a, float b) {
    if constexpr (TAPS == BSPLINE) return float_to_bits(fmaf(a, b, 8388608.0f)) - 0x4b000000u;
    return u32(fmaf(a, b, 0.5f));
}

// 16 sums over the warp: lane l gets that of number l / 2. Half of what is left goes to the other half of the lanes.
PATCHREG_FN u32 sum_numbers(u32* number, int lane) {
    for (int half = 8, distance = 16; half > 0; half /= 2, distance /= 2)
        for (int k = 0; k < half; ++k) {
            const bool upper = lane & distance;
            const u32 sent = upper ? number[k] : number[k + half];
            number[k] = (upper ? number[k + half] : number[k]) + __shfl_xor_sync(WHOLE_WARP, sent, distance);
        }
    return number[0] + __shfl_xor_sync(WHOLE_WARP, number[0], 1);
}

// The joint histogram of a block in shared memory, in `copies` (a power of two) copies that the lanes of a warp share out
// among them, as neighbouring voxels often fall into the same bins; or, where it is too large for that, no copy at all.
template <bool SHARED> struct Counts {
    u32* shared;
    u64* total;  // of all blocks
    int bins, copies, row_step;

    // Adds 16 numbers from a bin on, in rows of TAPS. An overflow of 32 bits is carried on to the total.
    template <int TAPS> __device__ __forceinline__ void add(int row, int column, const u32* number, int copy) const {
        u64* const sum = total + (i64(row) * bins + column);
        if constexpr (SHARED) {
            u32* const place = shared + row * row_step + column * copies + copy;
            u32 before[16], carries = 0;
            for (int k = 0; k < 16; ++k) before[k] = atomicAdd(place + k / TAPS * row_step + k % TAPS * copies, number[k]);
            for (int k = 0; k < 16; ++k) carries |= u32(before[k] + number[k] < before[k]) << k;
            if (carries == 0) return;
            for (int k = 0; k < 16; ++k)
                if (carries >> k & 1) atomicAdd(sum + k / TAPS * bins + k % TAPS, u64(1) << 32);
        } else {
            for (int k = 0; k < 16; ++k)
                if (number[k] != 0) atomicAdd(sum + k / TAPS * bins + k % TAPS, u64(number[k]));
        }
    }

    // One number to bin k of those 16.
    template <int TAPS> __device__ __forceinline__ void add_one(int row, int column, int k, u32 number, int copy) const {
        u64* const sum = total + (i64(row + k / TAPS) * bins + column + k % TAPS);
        if constexpr (SHARED) {
            const u32 before = atomicAdd(shared + (row + k / TAPS) * row_step + (column + k % TAPS) * copies + copy, number);
            if (before + number < before) atomicAdd(sum, u64(1) << 32);
        } else {
            atomicAdd(sum, u64(number));
        }
    }

    __device__ __forceinline__ void clear() const {
        for (int k = threadIdx.x; k < bins * row_step; k += ADD_THREADS) shared[k] = 0;
    }

    __device__ __forceinline__ void flush() const {
        for (int bin = threadIdx.x; bin < bins * bins; bin += ADD_THREADS) {
            u64 sum = 0;
            for (int copy = 0; copy < copies; ++copy)
                sum += shared[bin / bins * row_step + bin % bins * copies + copy];
            if (sum != 0) atomicAdd(total + bin, sum);
        }
    }
};

template <int TAPS, bool SHARED>
__device__ __forceinline__ void add_voxel(const Counts<SHARED>& counts, Place row, Place column, float unit, bool valid) {
    constexpr int ROWS = 16 / TAPS;  // whose products are formed at a time
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int bin = valid ? row.first * counts.bins + column.first : -1, of_first = __shfl_sync(WHOLE_WARP, bin, 0);
    const bool together = __all_sync(WHOLE_WARP, bin == of_first) && of_first >= 0;  // as in an empty background
    float of_row[TAPS], of_column[TAPS];
    parzen_weights<TAPS>(row.offset, of_row);
    parzen_weights<TAPS>(column.offset, of_column);
#pragma unroll
    for (int a = 0; a < TAPS; a += ROWS) {
        u32 product[16];
        for (int k = 0; k < 16; ++k) product[k] = rounded_product<TAPS>(of_row[a + k / TAPS] * unit, of_column[k % TAPS]);
        if (together) {
            const u32 sum = sum_numbers(product, lane);
            if (lane % 2 == 0)
                counts.template add_one<TAPS>(row.first + a, column.first, lane / 2, sum, warp & (counts.copies - 1));
        } else if (valid) {
            counts.template add<TAPS>(row.first + a, column.first, product, lane & (counts.copies - 1));
        }
    }
}

template <class T, int TAPS, bool SHARED>
__global__ void __launch_bounds__(ADD_THREADS, 2)
    add_voxels(const T* fixed, const T* moving, const T* weight, u64* counts, i64 blocks, i64 voxels, i64 channels,
               i64 weight_of_batch, i64 bins, i64 copies, i64 fixed_low, i64 fixed_high, i64 moving_low,
               i64 moving_high) {
    PATCHREG_DYNAMIC_SHARED(u32, shared);
    __shared__ Axis axes[2];
    const i64 pair = blockIdx.x / blocks;
    u64* const head = counts + pair * (HEAD + bins * bins);
    if (threadIdx.x == 0)
        axes[0] = axis_of(end_of_range(fixed_low, head, true), end_of_range(fixed_high, head + 1, false), int(bins));
    if (threadIdx.x == 32)
        axes[1] = axis_of(end_of_range(moving_low, head + 2, true), end_of_range(moving_high, head + 3, false), int(bins));
    const Counts<SHARED> sums{shared, head + HEAD, int(bins), int(copies), int((bins + 1) * copies)};
    if (SHARED) sums.clear();
    __syncthreads();
    const float largest = weight ? value_of(head[WEIGHT_KEY]) : 1.0f;
    const float unit = largest > 0.0f ? units_per_count(TAPS) / largest : 0.0f;
    const T *I = fixed + pair * voxels, *J = moving + pair * voxels;
    const T* w = weight ? weight + (weight_of_batch ? pair / channels * voxels : 0) : nullptr;
    for (i64 start = blockIdx.x % blocks * ADD_THREADS; start < voxels; start += blocks * ADD_THREADS) {
        const i64 v = start + threadIdx.x;
        bool valid = v < voxels;  // the others of a warp take part in its sums
        const Place row = place_of<TAPS>(valid ? widen(I[v]) : 0.0f, axes[0]);
        const Place column = place_of<TAPS>(valid ? widen(J[v]) : 0.0f, axes[1]);
        if (valid && !(row.offset < TAPS && column.offset < TAPS)) {
            atomicAdd(head + NOT_NUMBERS, u64(1));
            valid = false;
        }
        add_voxel<TAPS>(sums, row, column, valid && w ? weight_at(w, v) * unit : unit, valid);
    }
    if (!SHARED) return;
    __syncthreads();
    sums.flush();
}

// One block for each pair: the value, d(value) / d(count) of every bin, and the ranges for the backward pass.
__global__ void __launch_bounds__(EVALUATE_THREADS)
    evaluate(const u64* counts, double* ranges, float* values, float* slopes, i64 bins, i64 gaussian, i64 weighted,
             i64 normalized, i64 fixed_low, i64 fixed_high, i64 moving_low, i64 moving_high) {
    PATCHREG_DYNAMIC_SHARED(double, logs);  // of the sums of rows, then of columns
    __shared__ double shared_total, shared_joint, shared_separate;
    const u64* const head = counts + i64(blockIdx.x) * (HEAD + bins * bins);
    const u64* const of_bin = head + HEAD;
    const double unit = (weighted ? double(value_of(head[WEIGHT_KEY])) : 1.0) / units_per_count(gaussian ? GAUSSIAN : BSPLINE);
    const double least = 0.5 * unit;  // stands for what is rounded to nothing
    const int thread = threadIdx.x, lane = thread % 32;
    u64 sum = 0;
    for (int line = thread / 32; line < 2 * bins; line += EVALUATE_THREADS / 32) {
        u64 of_line = 0;
        for (int k = lane; k < bins; k += 32) of_line += of_bin[line < bins ? line * bins + k : k * bins + line - bins];
        of_line = warp_sum(of_line);
        if (lane == 0) logs[line] = log_count(double(of_line) * unit, least);
        if (lane == 0 && line < bins) sum += of_line;
    }
    sum = block_sum<EVALUATE_THREADS>(sum);
    if (thread == 0) shared_total = double(sum) * unit;
    __syncthreads();
    const double total = shared_total, log_total = log_count(total, least);
    Entropies part{0, 0};
    for (int bin = thread; bin < bins * bins; bin += EVALUATE_THREADS) {
        const double count = double(of_bin[bin]) * unit;
        const Entropies each = entropies_of(count, total, log_count(count, least), logs[bin / bins],
                                            logs[bins + bin % bins], log_total);
        part.joint += each.joint, part.separate += each.separate;
    }
    part = {block_sum<EVALUATE_THREADS>(part.joint), block_sum<EVALUATE_THREADS>(part.separate)};
    if (thread == 0) shared_joint = part.joint, shared_separate = part.separate;
    __syncthreads();
    const Entropies entropies{shared_joint, shared_separate};
    const double nothing = head[NOT_NUMBERS] != 0 ? bits_to_float(0x7fc00000u) : 0.0f;
    const double value = information_of(entropies, total, normalized) + nothing;
    for (int bin = thread; bin < bins * bins; bin += EVALUATE_THREADS)
        slopes[blockIdx.x * bins * bins + bin] =
            float(information_slope(entropies, value, total, normalized, log_count(double(of_bin[bin]) * unit, least),
                                    logs[bin / bins], logs[bins + bin % bins], log_total));
    if (thread != 0) return;
    values[blockIdx.x] = float(value);
    double* const range = ranges + 4 * i64(blockIdx.x);
    range[0] = end_of_range(fixed_low, head, true), range[1] = end_of_range(fixed_high, head + 1, false);
    range[2] = end_of_range(moving_low, head + 2, true), range[3] = end_of_range(moving_high, head + 3, false);
}

// The derivative with the place of either intensity.
struct PlaceGradient {
    float fixed, moving;
};

template <int TAPS> __device__ __forceinline__ PlaceGradient gather(const float* slopes, int pitch, Place row, Place column) {
    float row_weight[TAPS], row_slope[TAPS], column_weight[TAPS], column_slope[TAPS];
    parzen_weights<TAPS>(row.offset, row_weight);
    parzen_slopes<TAPS>(row.offset, row_weight, row_slope);
    parzen_weights<TAPS>(column.offset, column_weight);
    parzen_slopes<TAPS>(column.offset, column_weight, column_slope);
    const float* corner = slopes + row.first * pitch + column.first;
    PlaceGradient gradient{0.0f, 0.0f};
    for (int a = 0; a < TAPS; ++a) {
        float weighted = 0.0f, sloped = 0.0f;
        for (int b = 0; b < TAPS; ++b) {
            const float slope = corner[a * pitch + b];
            weighted += column_weight[b] * slope, sloped += column_slope[b] * slope;
        }
        gradient.fixed += row_slope[a] * weighted, gradient.moving += row_weight[a] * sloped;
    }
    return gradient;
}

// Outside its range an image has no gradient; at the ends it has.
PATCHREG_FN float gradient_at(float x, const Axis& axis, float factor, float of_place) {
    return x < axis.lowest || x > axis.highest ? 0.0f : factor * axis.step * of_place;
}

template <class T, int TAPS, bool SHARED>
__global__ void __launch_bounds__(GATHER_THREADS)
    gather_voxels(const T* fixed, const T* moving, const T* weight, const double* ranges, const float* slopes,
                  const float* upstream, T* grad_fixed, T* grad_moving, i64 blocks, i64 voxels, i64 channels,
                  i64 weight_of_batch, i64 bins) {
    PATCHREG_DYNAMIC_SHARED(float, shared);
    __shared__ Axis axes[2];
    const i64 pair = blockIdx.x / blocks;
    const float *table = slopes + pair * bins * bins, *place = SHARED ? shared : table;
    const int pitch = int(SHARED ? bins + 1 : bins);
    if (threadIdx.x % 32 == 0 && threadIdx.x < 64) {
        const double* range = ranges + 4 * pair + threadIdx.x / 16;
        axes[threadIdx.x / 32] = axis_of(range[0], range[1], int(bins));
    }
    if (SHARED)
        for (int bin = threadIdx.x; bin < bins * bins; bin += GATHER_THREADS)
            shared[bin / int(bins) * pitch + bin % int(bins)] = table[bin];
    __syncthreads();
    const T *I = fixed + pair * voxels, *J = moving + pair * voxels;
    const T* w = weight ? weight + (weight_of_batch ? pair / channels * voxels : 0) : nullptr;
    T *to_fixed = grad_fixed + pair * voxels, *to_moving = grad_moving + pair * voxels;
    const i64 first = blockIdx.x % blocks * GATHER_THREADS + threadIdx.x;
    for (i64 v = first; v < voxels; v += blocks * GATHER_THREADS) {
        const float x = widen(I[v]), y = widen(J[v]), factor = w ? weight_at(w, v) * upstream[pair] : upstream[pair];
        const PlaceGradient of_place =
            gather<TAPS>(place, pitch, place_of<TAPS>(x, axes[0]), place_of<TAPS>(y, axes[1]));
        if (grad_fixed) to_fixed[v] = narrow<T>(gradient_at(x, axes[0], factor, of_place.fixed));
        if (grad_moving) to_moving[v] = narrow<T>(gradient_at(y, axes[1], factor, of_place.moving));
    }
}

}  // namespace patchreg
