// Local normalised cross correlation at one voxel: from the moments of its window to the value, and to the five fields
// whose sums over the windows that contain a voxel are the exact gradient there.
//
// A window's variances must not come from raw sums: sum(II) - sum(I)^2 / n in float32 loses (mean / deviation)^2 times the
// rounding, which on smooth brain images leaves three digits of the gradient. So a window is put together from parts (a
// row, rows, slices), each with its means and its moments ABOUT those means, and parts are merged about a shift near
// them (Chan, Golub & LeVeque 1979, STAN-CS-79-773, eq. (2.1)); then only (mean / deviation) times the rounding is lost.
//
// Of the merged moments (Avants et al. 2008, eq. (6)):  value = cross^2 / (var_I var_J + eps).  With
// alpha = cross / (var_I var_J + eps) and g = d(loss) / d(value), the gradients at a voxel are sums over windows,
//     dI = sum(i_linear) + 2 (I - i0) sum(i_square) + (J - j0) sum(cross)
//     dJ = sum(j_linear) + 2 (J - j0) sum(j_square) + (I - i0) sum(cross)
// with any intensities i0, j0 of the plane: the closer to most voxels, the fewer digits cancel. The central voxel is taken.
#pragma once
#include "portable.h"

namespace patchreg {

// A deviation no larger than the rounding of the mean is that of a constant window: 16 float32 epsilons, squared.
constexpr float LNCC_ROUNDING = (16.0f * 1.1920929e-07f) * (16.0f * 1.1920929e-07f);

// F is float, or a vector of floats. Of a window, or a part of one: the means, and the sums of squares and products about them.
template <class F> struct LnccMomentsOf {
    F mean_I, mean_J, var_I, var_J, cross;
};
using LnccMoments = LnccMomentsOf<float>;

// The same of several parts together, about a shift instead of their common mean.
template <class F> struct LnccShiftedOf {
    F I, J, II, JJ, IJ;
};
using LnccShifted = LnccShiftedOf<float>;

struct LnccFields {
    float cross, i_linear, i_square, j_linear, j_square;
};

// What a part of weight n (its number of voxels; 1 for a voxel itself, whose variances are zero) adds.
template <class F> PATCHREG_FN LnccShiftedOf<F> lncc_shifted(LnccMomentsOf<F> part, F n, F shift_I, F shift_J) {
    const F I = part.mean_I - shift_I, J = part.mean_J - shift_J, nI = n * I, nJ = n * J;
    return {nI, nJ, part.var_I + nI * I, part.var_J + nJ * J, part.cross + nI * J};
}

template <class F> PATCHREG_FN LnccShiftedOf<F> lncc_add(LnccShiftedOf<F> a, LnccShiftedOf<F> b) {
    return {a.I + b.I, a.J + b.J, a.II + b.II, a.JJ + b.JJ, a.IJ + b.IJ};
}

// `inverse_n` is one over the weight of all parts together.
template <class F> PATCHREG_FN LnccMomentsOf<F> lncc_merged(LnccShiftedOf<F> sum, F inverse_n, F shift_I, F shift_J) {
    const F I = sum.I * inverse_n, J = sum.J * inverse_n;
    return {shift_I + I, shift_J + J, sum.II - sum.I * I, sum.JJ - sum.J * J, sum.IJ - sum.I * J};
}

// cross / (var_I var_J + eps), zero where the window is constant, or its voxel not selected. The value is cross * alpha.
PATCHREG_FN float lncc_alpha(LnccMoments m, float n, float eps, bool selected) {
    const bool varies = selected & (m.var_I > LNCC_ROUNDING * n * m.mean_I * m.mean_I) &
                        (m.var_J > LNCC_ROUNDING * n * m.mean_J * m.mean_J);
    const float denominator = m.var_I * m.var_J + eps;
    return varies & (denominator > 0.0f) ? m.cross / denominator : 0.0f;
}

PATCHREG_FN LnccFields lncc_fields(LnccMoments m, float alpha, float upstream, float i0, float j0) {
    const float once = upstream * alpha, twice = once * alpha, mean_I = m.mean_I - i0, mean_J = m.mean_J - j0;
    const float cross = 2.0f * once, i_square = -twice * m.var_J, j_square = -twice * m.var_I;
    return {cross, -(cross * mean_J + 2.0f * i_square * mean_I), i_square,
            -(cross * mean_I + 2.0f * j_square * mean_J), j_square};
}

// The gradient to an image from the sums over windows: `own` is the image's intensity less i0, `other` the other's less j0.
PATCHREG_FN float lncc_gradient(float linear, float square, float cross, float own, float other) {
    return linear + 2.0f * own * square + other * cross;
}

}  // namespace patchreg
