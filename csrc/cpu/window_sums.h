// Sums over a sliding window, by additions alone: a running sum that adds and subtracts loses all digits beside an empty
// background. Four neighbouring windows share the sum of what they have in common, so that a window of 9 costs less than
// four additions. K is the window where it is known at compile time (3, 5, 7, 9), else 0.
#pragma once
#include "isa.h"
#include "portable.h"
#include "simd.h"

namespace patchreg {
namespace PATCHREG_ISA {

constexpr int TOGETHER = 4;  // windows that are summed at a time

struct Window {
    int size;              // odd
    const float* weights;  // `size` numbers, or null for a box
    bool about_zero;       // most of any window lies outside, in zeros: moments are merged about zero, not about its centre
    int radius() const { return size / 2; }
    float weight(int k) const { return weights ? weights[k] : 1.0f; }
};

// out[b][x] = sum over k of weight[k] * in[b + k][x], b < TOGETHER, x < n, for `in` of size + TOGETHER - 1 lines.
static inline void general_lines(const Window& w, const float* const* in, float* const* out, i64 n) {
    for (int b = 0; b < TOGETHER; ++b)
        for_lanes(n, [&](i64 x, auto kind) {
            decltype(kind) sum{};
            for (int k = 0; k < w.size; ++k) sum += w.weight(k) * load<decltype(kind)>(in[b + k] + x);
            store(out[b] + x, sum);
        });
}

template <int K> static inline void box_lines(const float* const* in, float* const* out, i64 n) {
    const float* line[K + TOGETHER - 1];
    for (int k = 0; k < K + TOGETHER - 1; ++k) line[k] = in[k];
    float *out0 = out[0], *out1 = out[1], *out2 = out[2], *out3 = out[3];
    PATCHREG_SIMD for (i64 x = 0; x < n; ++x) {
        if constexpr (K == 3) {
            const float middle = line[2][x] + line[3][x];
            const float first = line[1][x] + line[2][x], last = line[3][x] + line[4][x];
            out0[x] = line[0][x] + first;
            out1[x] = line[1][x] + middle;
            out2[x] = middle + line[4][x];
            out3[x] = last + line[5][x];
        } else {
            float common = line[3][x];
            PATCHREG_UNROLL for (int k = 4; k < K; ++k) common += line[k][x];
            const float before2 = line[2][x], before1 = line[1][x] + before2, before0 = line[0][x] + before1;
            const float after0 = line[K][x], after1 = after0 + line[K + 1][x], after2 = after1 + line[K + 2][x];
            out0[x] = common + before0;
            out1[x] = common + before1 + after0;
            out2[x] = common + before2 + after1;
            out3[x] = common + after2;
        }
    }
}

static inline void sum_lines(const Window& w, const float* const* in, float* const* out, i64 n) {
    if (w.weights == nullptr) switch (w.size) {
            case 3: return box_lines<3>(in, out, n);
            case 5: return box_lines<5>(in, out, n);
            case 7: return box_lines<7>(in, out, n);
            case 9: return box_lines<9>(in, out, n);
        }
    general_lines(w, in, out, n);
}

// out[x] = sum over k of weight[k] * in[x + k], x < n; `spare` holds n + size numbers.
static inline void sum_along(const Window& w, const float* in, float* out, float* spare, i64 n) {
    const auto triples = [&](i64 count) {
        PATCHREG_SIMD for (i64 x = 0; x < count; ++x) spare[x] = in[x] + in[x + 1] + in[x + 2];
    };
    if (w.weights == nullptr) switch (w.size) {
            case 3:
                PATCHREG_SIMD for (i64 x = 0; x < n; ++x) out[x] = in[x] + in[x + 1] + in[x + 2];
                return;
            case 5:
                PATCHREG_SIMD for (i64 x = 0; x < n; ++x) out[x] = in[x] + in[x + 1] + in[x + 2] + in[x + 3] + in[x + 4];
                return;
            case 7:
                triples(n + 3);
                PATCHREG_SIMD for (i64 x = 0; x < n; ++x) out[x] = spare[x] + spare[x + 3] + in[x + 6];
                return;
            case 9:
                triples(n + 6);
                PATCHREG_SIMD for (i64 x = 0; x < n; ++x) out[x] = spare[x] + spare[x + 3] + spare[x + 6];
                return;
        }
    for_lanes(n, [&](i64 x, auto kind) {
        decltype(kind) sum{};
        for (int k = 0; k < w.size; ++k) sum += w.weight(k) * load<decltype(kind)>(in + x + k);
        store(out + x, sum);
    });
}

}  // namespace PATCHREG_ISA
}  // namespace patchreg
