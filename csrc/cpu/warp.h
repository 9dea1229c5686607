// Sampling an image at A x + t + S u(x), and the exact gradients to the image, to u, and to A, t and S.
#pragma once
#include "isa.h"
#include "parallel.h"

namespace patchreg {

// Numbers that the gradient to the maps is made of: 12 for [A | t], row by row, then 9 for S.
constexpr int WARP_SUMS = 21;

struct WarpJob {
    const void* image;         // (image_batch, channels, image_size)
    const void* displacement;  // (displacement_batch, 3, size), or null
    const double* affine;      // (affine_batch, 3, 4), or null for the identity
    const double* scale;       // (scale_batch, 3, 3), or null for `step` times the identity
    void* out;                 // (batch, channels, size): gain * (sample + displacement where `add`); of dtype out_storage
    const void* upstream;      // d(loss) / d(out), likewise
    float* grad_image;         // like the image, zeros or what shall be added to; null where not wanted
    void* grad_displacement;   // like the displacement; may be the memory of grad_image, which is then added to it
    double* sums;              // (batch, bricks, WARP_SUMS), see warp_bricks(); null where not wanted
    i64 batch, channels, size[3], image_size[3];
    i64 image_batch, displacement_batch, affine_batch, scale_batch;  // `batch`, or 1 for what all share
    int image_storage, displacement_storage, out_storage, grad_storage;
    float step, gain;
    bool border, add, nearest;
    // warp_words(): `out` and the image are made of words of so many bytes, which are copied as they are. Of labels that
    // are floats `infinity` has the bits of that number, of integers it is 0.
    int word_bytes;
    unsigned long long infinity;
};

// Rows of the output that are short enough to share one note of what they touch in the image; rows that make up a brick,
// the unit of work; bricks in all.
inline i64 warp_rows_together(const i64* size) { return size[2] < 64 ? 64 / size[2] : 1; }
inline i64 warp_rows(const i64* size) {
    const i64 together = warp_rows_together(size);
    return size[2] < 4096 ? 4096 / size[2] / together * together : 1;
}
inline i64 warp_bricks(const i64* size) { return (size[0] * size[1] + warp_rows(size) - 1) / warp_rows(size); }

PATCHREG_KERNEL(void, warp_forward, const WarpJob& job, const Parallel& pool)
PATCHREG_KERNEL(void, warp_backward, const WarpJob& job, const Parallel& pool)
PATCHREG_KERNEL(void, warp_words, const WarpJob& job, const Parallel& pool)  // nearest, or the vote of the neighbours

}  // namespace patchreg
