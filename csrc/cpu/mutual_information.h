// Mutual information from a joint Parzen histogram, and its gradient recomputed voxel by voxel.
#pragma once
#include "isa.h"
#include "parallel.h"

namespace patchreg {

struct MutualInformationJob {
    const void *fixed, *moving;  // (pairs, voxels), dtype `storage`
    const void* weight;          // (pairs / channels or 1, voxels), dtype `storage`, or null
    double* ranges;              // (pairs, 4): lowest and highest of fixed, of moving; NaN where it is to be measured
    float* values;               // (pairs)
    float* slopes;               // (pairs, bins, bins): d(value) / d(count)
    i64 pairs, channels, voxels;
    bool weight_of_batch;        // whether each of the batch has a weight of its own
    int storage, bins;
    bool gaussian, normalized;
};

struct MutualInformationBackwardJob {
    const void *fixed, *moving, *weight;  // as above
    const double* ranges;
    const float *slopes, *upstream;  // upstream: (pairs), d(loss) / d(value)
    void *grad_fixed, *grad_moving;  // (pairs, voxels), dtype `storage`; null where not wanted
    i64 pairs, channels, voxels;
    bool weight_of_batch;
    int storage, bins;
    bool gaussian;
};

PATCHREG_KERNEL(void, mutual_information, const MutualInformationJob& job, const Parallel& pool)
PATCHREG_KERNEL(void, mutual_information_backward, const MutualInformationBackwardJob& job, const Parallel& pool)

}  // namespace patchreg
