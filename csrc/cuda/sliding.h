// Windows that slide over threads' own data: sums, and moments (csrc/common/lncc.h). Nothing is ever subtracted from a sum:
// running sums that add and subtract lose every digit next to an empty background. R is the radius of a window.
//
// Along a row, neighbouring windows share the sum of what they have in common. Along the march through the slices, sums of
// 2, 4 and 8 slices are made by doubling and kept for as long as they are needed: 2 R numbers, 2 to 4 additions a slice.
#pragma once
#include "lncc.h"
#include "portable.h"

namespace patchreg {

// sum[i] = x[i] + ... + x[i + 2 R].
template <int N, int R> static __device__ __forceinline__ void sum_run(const float* x, float* sum) {
    if constexpr (N > 2 * R) {
        sum_run<N / 2, R>(x, sum);
        sum_run<N - N / 2, R>(x + N / 2, sum + N / 2);
    } else {
        float common = x[N - 1];
#pragma unroll
        for (int k = N; k <= 2 * R; ++k) common += x[k];
        sum[N - 1] = common;
#pragma unroll
        for (int i = N - 2; i >= 0; --i) sum[i] = sum[i + 1] + x[i];
        float after = 0.0f;
#pragma unroll
        for (int i = 1; i < N; ++i) {
            after = i == 1 ? x[2 * R + 1] : after + x[2 * R + i];
            sum[i] += after;
        }
    }
}

// Sums over the last 2 R + 1 values that were pushed, of F series at a time. The sums of four, of which the widest windows
// need the last four, are kept in shared memory, in slots of this thread's own (series apart by `stride`, slots by F
// strides): in registers they would be what no longer fits.
template <int R, int F> struct MarchingSums {
    float one[F] = {}, two[F][2] = {}, eight[F] = {};  // sums of so many values, the last first

    static constexpr int SLOTS = R > 1 ? 4 : 0;

    __device__ __forceinline__ void clear(float* fours, int stride) const {
        for (int i = 0; i < SLOTS * F; ++i) fours[i * stride] = 0.0f;
    }

    // `turn` counts the values, from 0.
    __device__ __forceinline__ float push(int f, float value, int turn, float* fours, int stride) {
        const float pair = value + one[f], quad = pair + two[f][1];
        float sum = value + two[f][0];
        if constexpr (R > 1) {
            float* const slot = fours + (turn % 4 * F + f) * stride;
            if constexpr (R == 2) sum = value + fours[((turn + 3) % 4 * F + f) * stride];
            if constexpr (R == 3) sum += fours[((turn + 1) % 4 * F + f) * stride];
            if constexpr (R == 4) {
                sum = value + eight[f];
                eight[f] = quad + *slot;
            }
            *slot = quad;
        }
        one[f] = value;
        two[f][1] = two[f][0], two[f][0] = pair;
        return sum;
    }
};

// The moments of a part of a window and, with a mask, the number of its voxels that the mask leaves.
struct Part {
    LnccMoments moments;
    float n;
};

// A part under way: moments about a shift.
struct ShiftedPart {
    LnccShifted sum;
    float n;
};

static __device__ __forceinline__ ShiftedPart join(ShiftedPart a, ShiftedPart b) {
    return {lncc_add(a.sum, b.sum), a.n + b.n};
}

// With MASK the weight of the whole is counted; else it is `weight`.
template <bool MASK>
static __device__ __forceinline__ Part centered(ShiftedPart part, float weight, float shift_I, float shift_J) {
    const float inverse_n = !MASK ? 1.0f / weight : part.n > 0.0f ? __fdividef(1.0f, part.n) : 0.0f;
    return {lncc_merged(part.sum, inverse_n, shift_I, shift_J), part.n};
}

template <bool MASK>
static __device__ __forceinline__ ShiftedPart shifted_voxel(float I, float J, float selected, float shift_I,
                                                            float shift_J) {
    const float from_I = I - shift_I, from_J = J - shift_J;
    const float a = MASK ? selected * from_I : from_I, b = MASK ? selected * from_J : from_J;
    return {{a, b, a * from_I, b * from_J, a * from_J}, selected};
}

// part[i]: of the voxels i to i + 2 R of a row.
template <int N, int R, bool MASK>
static __device__ __forceinline__ void moments_of_run(const float* I, const float* J, const float* selected, Part* part) {
    if constexpr (N > 2 * R) {
        moments_of_run<N / 2, R, MASK>(I, J, selected, part);
        moments_of_run<N - N / 2, R, MASK>(I + N / 2, J + N / 2, selected + N / 2, part + N / 2);
    } else {
        const float shift_I = I[(N - 1 + 2 * R) / 2], shift_J = J[(N - 1 + 2 * R) / 2];  // every window has this voxel
        const auto voxel = [&](int k) {
            return shifted_voxel<MASK>(I[k], J[k], MASK ? selected[k] : 1.0f, shift_I, shift_J);
        };
        ShiftedPart sum[N];
        sum[N - 1] = voxel(N - 1);
#pragma unroll
        for (int k = N; k <= 2 * R; ++k) sum[N - 1] = join(sum[N - 1], voxel(k));
#pragma unroll
        for (int i = N - 2; i >= 0; --i) sum[i] = join(sum[i + 1], voxel(i));
        ShiftedPart after;
#pragma unroll
        for (int i = 1; i < N; ++i) {
            after = i == 1 ? voxel(2 * R + 1) : join(after, voxel(2 * R + i));
            sum[i] = join(sum[i], after);
        }
#pragma unroll
        for (int i = 0; i < N; ++i) part[i] = centered<MASK>(sum[i], 2 * R + 1, shift_I, shift_J);
    }
}

// Two parts as one (Chan, Golub & LeVeque 1979, eq. (2.1)). Without a mask their weights are `weight_a` and `weight_b`.
template <bool MASK>
static __device__ __forceinline__ Part merge(const Part& a, float weight_a, const Part& b, float weight_b) {
    const float n_a = MASK ? a.n : weight_a, n_b = MASK ? b.n : weight_b, n = n_a + n_b;
    const float share = !MASK ? n_b / n : n > 0.0f ? __fdividef(n_b, n) : 0.0f, between = n_a * share;
    const LnccMoments &p = a.moments, &q = b.moments;
    const float from_I = q.mean_I - p.mean_I, from_J = q.mean_J - p.mean_J;
    const float by_I = between * from_I, by_J = between * from_J;
    return {{p.mean_I + share * from_I, p.mean_J + share * from_J, p.var_I + q.var_I + by_I * from_I,
             p.var_J + q.var_J + by_J * from_J, p.cross + q.cross + by_I * from_J},
            n};
}

// Moments of the last 2 R + 1 slices' parts, each of weight (2 R + 1)^2 without a mask.
template <int R, bool MASK> struct MarchingMoments {
    Part one, two[2], four[4], eight;

    // Before the first slice there are only zeros. They count, unless what is pushed counts them otherwise.
    __device__ __forceinline__ void clear() {
        constexpr float n = (2 * R + 1) * (2 * R + 1);
        one = {{}, n};
        two[0] = two[1] = {{}, 2 * n};
        four[0] = four[1] = four[2] = four[3] = {{}, 4 * n};
        eight = {{}, 8 * n};
    }

    __device__ __forceinline__ Part push(const Part& part) {
        constexpr float n = (2 * R + 1) * (2 * R + 1);
        const Part pair = merge<MASK>(part, n, one, n);
        const Part quad = merge<MASK>(pair, 2 * n, two[1], 2 * n), octet = merge<MASK>(quad, 4 * n, four[3], 4 * n);
        Part whole;
        if constexpr (R == 1) whole = merge<MASK>(two[0], 2 * n, part, n);
        if constexpr (R == 2) whole = merge<MASK>(four[0], 4 * n, part, n);
        if constexpr (R == 3) whole = merge<MASK>(four[2], 4 * n, merge<MASK>(two[0], 2 * n, part, n), 3 * n);
        if constexpr (R == 4) whole = merge<MASK>(eight, 8 * n, part, n);
        one = part;
        two[1] = two[0], two[0] = pair;
        four[3] = four[2], four[2] = four[1], four[1] = four[0], four[0] = quad;
        eight = octet;
        return whole;
    }
};

}  // namespace patchreg
