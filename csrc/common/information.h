// Mutual information of a joint histogram, and its derivative with every count.
//
// With counts n of a total T, p = n / T, and the marginals p_i, p_j:
//     joint entropy     H(I, J)     = -sum p log p
//     separate entropy  H(I) + H(J) = -sum p log(p_i p_j)
//     mutual information H(I) + H(J) - H(I, J), or normalised (Studholme et al. 1999, eq. (12)) their ratio.
#pragma once
#include "portable.h"

namespace patchreg {

#if defined(__CUDACC__)
PATCHREG_FN double logarithm(double x) { return log(x); }
#else
PATCHREG_FN double logarithm(double x) { return __builtin_log(x); }
#endif

struct Entropies {
    double joint, separate;
};

// Logarithm of a count, or of `least` where it is smaller: an empty bin has no slope that could be told apart.
PATCHREG_FN double log_count(double count, double least) { return logarithm(count < least ? least : count); }

// What one bin adds to the entropies. The logarithms are those of counts: of the bin, of its row and its column.
PATCHREG_FN Entropies entropies_of(double count, double total, double log_bin, double log_row, double log_column,
                                   double log_total) {
    const double p = count / total;
    return {p * (log_total - log_bin), p * (2 * log_total - log_row - log_column)};
}

// Nothing selected says nothing: 0, or 1 where the value is normalised.
PATCHREG_FN double information_of(Entropies sum, double total, bool normalized) {
    if (total == 0) return normalized ? 1 : 0;
    return normalized ? sum.separate / sum.joint : sum.separate - sum.joint;
}

// d(value) / d(count) of a bin.
PATCHREG_FN double information_slope(Entropies sum, double value, double total, bool normalized, double log_bin,
                                     double log_row, double log_column, double log_total) {
    if (total == 0) return 0;
    const double joint = log_bin - log_total, separate = log_row + log_column - 2 * log_total;
    return normalized ? (value * joint - separate) / (sum.joint * total) : (joint - separate - value) / total;
}

}  // namespace patchreg
