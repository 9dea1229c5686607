// Parzen windows: how much an intensity counts in each bin of a histogram, and the slope of that with the intensity.
//
// An intensity is first mapped to a place t in 0..bins-3, which lies t + 1 bins from the first, so that every window of
// cubic B-splines fits. It falls into TAPS neighbouring bins:
//     BSPLINE   the cubic B-spline (Mattes et al. 2003, eq. (7)), which is zero beyond them;
//     GAUSSIAN  exp(-2 distance^2), half a bin wide, scaled to sum to one; 1e-14 at most lies beyond them, and is left out.
#pragma once
#include "portable.h"

namespace patchreg {

constexpr int BSPLINE = 4, GAUSSIAN = 8;

// The first of the bins that place t falls into. t is finite and in range.
template <int TAPS, class Real> PATCHREG_FN int first_bin(Real t, int bins) {
    const int first = int(t) - (TAPS == GAUSSIAN ? 2 : 0), last = bins - TAPS;
    return first < 0 ? 0 : first > last ? last : first;
}

#if defined(__CUDACC__)
PATCHREG_FN float exponential(float x) { return expf(x); }
#else
// exp(x / 16) by its series, to the power of 16; to 1e-14 for |x| <= 5. Without branches or calls, so that it vectorises.
PATCHREG_FN double exponential(double x) {
    const double y = x * (1.0 / 16);
    double power = 1;
    for (int k = 11; k > 0; --k) power = 1 + power * y * (1.0 / k);
    for (int k = 0; k < 4; ++k) power *= power;
    return power;
}
PATCHREG_FN float exponential(float x) { return float(exponential(double(x))); }
#endif

// Weights of the bins, for offset = t - first_bin(t).
template <int TAPS, class Real> PATCHREG_FN void parzen_weights(Real offset, Real* weight) {
    if constexpr (TAPS == BSPLINE) {
        const Real f = offset, r = 1 - f;
        weight[0] = r * r * r * Real(1.0 / 6);
        weight[1] = Real(2.0 / 3) - f * f * (1 - f * Real(0.5));
        weight[2] = Real(2.0 / 3) - r * r * (1 - r * Real(0.5));
        weight[3] = f * f * f * Real(1.0 / 6);
    } else {
        // exp(-2 (g - h)^2) for h = k - 7/2 is exp(4 g h) exp(-2 h^2) but for a factor that the sum takes out.
        constexpr double fixed[8] = {2.289734845645553e-11, 3.726653172078671e-06, 0.011108996538242306,
                                     0.6065306597126334,    0.6065306597126334,    0.011108996538242306,
                                     3.726653172078671e-06, 2.289734845645553e-11};
        const Real root = exponential(2 * (offset - Real(2.5))), step = root * root;
        Real power = 1 / (step * step * step * root), sum = 0;
        for (int k = 0; k < TAPS; ++k) {
            weight[k] = power * Real(fixed[k]);
            sum += weight[k];
            power *= step;
        }
        const Real inverse = 1 / sum;
        for (int k = 0; k < TAPS; ++k) weight[k] *= inverse;
    }
}

// d(weight) / dt, for the weights at that offset.
template <int TAPS, class Real> PATCHREG_FN void parzen_slopes(Real offset, const Real* weight, Real* slope) {
    if constexpr (TAPS == BSPLINE) {
        const Real f = offset, r = 1 - f;
        slope[0] = r * r * Real(-0.5);
        slope[1] = f * (f * Real(1.5) - 2);
        slope[2] = r * (2 - r * Real(1.5));
        slope[3] = f * f * Real(0.5);
    } else {
        Real mean = 0;
        for (int k = 0; k < TAPS; ++k) mean += weight[k] * k;
        for (int k = 0; k < TAPS; ++k) slope[k] = 4 * weight[k] * (k - mean);
    }
}

}  // namespace patchreg
