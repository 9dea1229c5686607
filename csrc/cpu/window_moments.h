// Moments of a sliding window put together from its parts: slices of voxels, then rows, then columns (csrc/common/lncc.h).
// A line of moments is five lines of floats, `pitch` apart, in the order of LnccMoments; with a mask a sixth holds the
// weight, the number of voxels that the mask leaves. K is a window that is known at compile time.
#pragma once
#include "../common/lncc.h"
#include "simd.h"
#include "window_sums.h"

namespace patchreg {
namespace PATCHREG_ISA {

PATCHREG_FN bool is_plain(const Window& w) { return w.weights == nullptr && !w.about_zero; }

PATCHREG_FN LnccMoments moments_at(const float* line, i64 pitch, i64 x) {
    return {line[x], line[x + pitch], line[x + 2 * pitch], line[x + 3 * pitch], line[x + 4 * pitch]};
}

PATCHREG_FN void store_moments(float* line, i64 pitch, i64 x, LnccMoments m) {
    line[x] = m.mean_I, line[x + pitch] = m.mean_J, line[x + 2 * pitch] = m.var_I, line[x + 3 * pitch] = m.var_J;
    line[x + 4 * pitch] = m.cross;
}

template <class F> PATCHREG_FN LnccMomentsOf<F> load_moments(const float* line, i64 pitch) {
    return {load<F>(line), load<F>(line + pitch), load<F>(line + 2 * pitch), load<F>(line + 3 * pitch), load<F>(line + 4 * pitch)};
}

// Parts, each with its weight, about a shift.
template <class F> struct Merging {
    const F shift_I, shift_J;
    LnccShiftedOf<F> sum{};
    F n{};

    void add(LnccMomentsOf<F> part, F voxels, float weight) {
        part.var_I *= weight, part.var_J *= weight, part.cross *= weight, voxels *= weight;
        sum = lncc_add(sum, lncc_shifted(part, voxels, shift_I, shift_J));
        n += voxels;
    }
    void store_to(float* line, i64 pitch, bool masked) const {
        const LnccMomentsOf<F> m = lncc_merged(sum, n > 0.0f ? 1.0f / n : F{}, shift_I, shift_J);
        store(line, m.mean_I), store(line + pitch, m.mean_J), store(line + 2 * pitch, m.var_I);
        store(line + 3 * pitch, m.var_J), store(line + 4 * pitch, m.cross);
        if (masked) store(line + 5 * pitch, n);
    }
};

// Windows of voxels: I[k], J[k] are the rows of slice k; mask[k] theirs, or `mask` is null.
template <class T>
static inline void voxel_moments(const Window& w, const T* const* I, const T* const* J, const unsigned char* const* mask,
                                 float* out, i64 pitch, i64 n) {
    const float near = w.about_zero ? 0.0f : 1.0f;
    for_lanes(n, [&](i64 x, auto kind) {
        using F = decltype(kind);
        Merging<F> window{near * load<F>(I[w.radius()] + x), near * load<F>(J[w.radius()] + x)};
        for (int k = 0; k < w.size; ++k) {
            const F there = mask ? load_flags<F>(mask[k] + x) : F{} + 1.0f;
            window.add({load<F>(I[k] + x), load<F>(J[k] + x), F{}, F{}, F{}}, there, w.weight(k));
        }
        window.store_to(out + x, pitch, mask != nullptr);
    });
}

template <int K>
static inline void box_voxel_moments(const float* const* I, const float* const* J, float* out, i64 pitch, i64 n) {
    const float *p[K], *q[K];
    for (int k = 0; k < K; ++k) p[k] = I[k], q[k] = J[k];
    PATCHREG_SIMD for (i64 x = 0; x < n; ++x) {
        const float shift_I = p[K / 2][x], shift_J = q[K / 2][x];
        LnccShifted sum{};
        PATCHREG_UNROLL for (int k = 0; k < K; ++k)
            if (k != K / 2) sum = lncc_add(sum, lncc_shifted({p[k][x], q[k][x], 0, 0, 0}, 1.0f, shift_I, shift_J));
        store_moments(out, pitch, x, lncc_merged(sum, 1.0f / K, shift_I, shift_J));
    }
}

// The window whose parts begin at line(0), line(1), ...; `weight` is that of a part without a mask.
template <class Line>
static inline void merge_general(const Window& w, const Line& line, i64 in_pitch, float* out, i64 pitch, i64 n, float weight,
                                 bool masked) {
    const float near = w.about_zero ? 0.0f : 1.0f;
    for_lanes(n, [&](i64 x, auto kind) {
        using F = decltype(kind);
        const float* center = line(w.radius()) + x;
        Merging<F> window{near * load<F>(center), near * load<F>(center + in_pitch)};
        for (int k = 0; k < w.size; ++k) {
            const float* part = line(k) + x;
            window.add(load_moments<F>(part, in_pitch), masked ? load<F>(part + 5 * in_pitch) : F{} + weight, w.weight(k));
        }
        window.store_to(out + x, pitch, masked);
    });
}

template <int K>
static inline void merge_box_lines(const float* const* in, float* const* out, i64 pitch, i64 n, float weight) {
    constexpr int LINES = K + TOGETHER - 1;
    const float* line[LINES];
    for (int k = 0; k < LINES; ++k) line[k] = in[k];
    float *out0 = out[0], *out1 = out[1], *out2 = out[2], *out3 = out[3];
    const float inverse_n = 1.0f / (K * weight);
    PATCHREG_SIMD for (i64 x = 0; x < n; ++x) {
        const float shift_I = line[LINES / 2][x], shift_J = line[LINES / 2][x + pitch];
        LnccShifted common{}, sum[TOGETHER] = {};
        PATCHREG_UNROLL for (int k = 0; k < LINES; ++k) {
            const LnccShifted part = lncc_shifted(moments_at(line[k], pitch, x), weight, shift_I, shift_J);
            if (k >= TOGETHER - 1 && k < K)
                common = lncc_add(common, part);
            else
                PATCHREG_UNROLL for (int b = 0; b < TOGETHER; ++b)
                    if (b <= k && k < b + K) sum[b] = lncc_add(sum[b], part);
        }
        store_moments(out0, pitch, x, lncc_merged(lncc_add(common, sum[0]), inverse_n, shift_I, shift_J));
        store_moments(out1, pitch, x, lncc_merged(lncc_add(common, sum[1]), inverse_n, shift_I, shift_J));
        store_moments(out2, pitch, x, lncc_merged(lncc_add(common, sum[2]), inverse_n, shift_I, shift_J));
        store_moments(out3, pitch, x, lncc_merged(lncc_add(common, sum[3]), inverse_n, shift_I, shift_J));
    }
}

// Windows of lines, TOGETHER at a time: out[b] from in[b] to in[b + size - 1].
static inline void merge_lines(const Window& w, const float* const* in, float* const* out, i64 pitch, i64 n, float weight,
                               bool masked) {
    if (is_plain(w) && !masked) switch (w.size) {
            case 3: return merge_box_lines<3>(in, out, pitch, n, weight);
            case 5: return merge_box_lines<5>(in, out, pitch, n, weight);
            case 7: return merge_box_lines<7>(in, out, pitch, n, weight);
            case 9: return merge_box_lines<9>(in, out, pitch, n, weight);
        }
    for (int b = 0; b < TOGETHER; ++b)
        merge_general(w, [&](int k) { return in[b + k]; }, pitch, out[b], pitch, n, weight, masked);
}

// Windows along a line: out[x] from in[x] to in[x + size - 1].
template <int K> static inline void merge_box_along(const float* in, i64 in_pitch, float* out, i64 pitch, i64 n, float weight) {
    const float inverse_n = 1.0f / (K * weight);
    PATCHREG_SIMD for (i64 x = 0; x < n; ++x) {
        const LnccMoments center = moments_at(in, in_pitch, x + K / 2);
        LnccShifted sum{0, 0, center.var_I, center.var_J, center.cross};
        PATCHREG_UNROLL for (int k = 0; k < K; ++k)
            if (k != K / 2)
                sum = lncc_add(sum, lncc_shifted(moments_at(in, in_pitch, x + k), weight, center.mean_I, center.mean_J));
        store_moments(out, pitch, x, lncc_merged(sum, inverse_n, center.mean_I, center.mean_J));
    }
}

static inline void merge_along(const Window& w, const float* in, i64 in_pitch, float* out, i64 pitch, i64 n, float weight,
                               bool masked) {
    if (is_plain(w) && !masked) switch (w.size) {
            case 3: return merge_box_along<3>(in, in_pitch, out, pitch, n, weight);
            case 5: return merge_box_along<5>(in, in_pitch, out, pitch, n, weight);
            case 7: return merge_box_along<7>(in, in_pitch, out, pitch, n, weight);
            case 9: return merge_box_along<9>(in, in_pitch, out, pitch, n, weight);
        }
    const float near = w.about_zero ? 0.0f : 1.0f;
    merge_general(w, [&](int k) { return in + k; }, in_pitch, out, pitch, n, weight, masked);
}

}  // namespace PATCHREG_ISA
}  // namespace patchreg
