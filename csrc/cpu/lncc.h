// Local normalised cross correlation and its exact gradients in one sweep over slabs.
#pragma once
#include "isa.h"
#include "parallel.h"

namespace patchreg {

struct LnccJob {
    const void *fixed, *moving;     // (planes, depth, height, width), dtype `storage`
    const unsigned char* mask;      // (batch, depth, height, width), or null
    const unsigned char* ones;      // `width` ones: the mask outside the volume
    const float* upstream;          // d(loss) / d(value): one number, or a map like the images; null for 1
    bool upstream_is_map;
    const float* weights;           // `window` numbers along each axis, or null for a box
    float *grad_fixed, *grad_moving;  // null where not wanted
    float* value_map;               // null where not wanted
    double* row_values;             // (planes, depth, height, tiles): sums of the value over each tile's part of a row
    i64 planes, channels, depth, height, width;
    i64 tiles, tile_width, tile_height;  // tiles along the width; their size in columns and rows, a multiple of four
    int storage, window;
    float eps;
};

PATCHREG_KERNEL(void, lncc, const LnccJob& job, const Parallel& pool)

}  // namespace patchreg
