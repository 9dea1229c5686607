// Sampling that never makes a new value: the nearest voxel, or the label that most of the neighbourhood has. Voxels are
// words of 1, 2, 4 or 8 bytes, copied bit by bit, so that every dtype is served.
#pragma once
#include "warp_block.h"

namespace patchreg {
namespace PATCHREG_ISA {

template <class Word>
static inline void copy_nearest(const WarpJob& job, const Word* image, const Block& b, const int (*nearest)[LANES],
                                Word* out) {
    const i64* size = job.image_size;
    for (int lane = 0; lane < b.count; ++lane) {
        const i64 i = nearest[0][lane], j = nearest[1][lane], k = nearest[2][lane];
        out[lane] = (i | j | k) < 0 ? Word(0) : image[(i * size[1] + j) * size[2] + k];
    }
}

template <bool BORDER> static inline void find_nearest(const WarpJob& job, const Block& b, int (*found)[LANES]) {
    for (int axis = 0; axis < 3; ++axis) {
        const int size = int(job.image_size[axis]);
        const int* low = b.low[axis];
        const float* fraction = b.fraction[axis];
        PATCHREG_SIMD for (int lane = 0; lane < b.lanes; ++lane)
            found[axis][lane] = neighbour<BORDER>(nearest({low[lane], fraction[lane], 1.0f}), size);
    }
}

template <class Word> static inline bool all_alike(const Around<Word>& around, const Block& b) {
    Word differ = 0;
    for (int line = 0; line < 4; ++line)
        PATCHREG_SIMD for (int l = 0; l < 2 * b.lanes; ++l) differ |= Word(around.pair[line][l] ^ around.pair[0][0]);
    return differ == 0;
}

// The winner of every lane. Most blocks lie within one label.
template <class Word> static inline void vote(const Around<Word>& around, const Block& b, Word infinity, Word* out) {
    if (all_alike(around, b)) {
        for (int lane = 0; lane < b.count; ++lane) out[lane] = canonical(around.pair[0][0], infinity);
        return;
    }
    PATCHREG_ALIGNED Word winner[LANES];
    PATCHREG_SIMD for (int lane = 0; lane < b.lanes; ++lane)
        winner[lane] = elect(around.at(lane), b.fractions(lane), infinity);
    for (int lane = 0; lane < b.count; ++lane) out[lane] = winner[lane];
}

template <bool BORDER, class Word> static void sample_words(const WarpJob& job, const Parallel& pool) {
    const Shape shape(job);
    for_each(pool, job.batch * shape.bricks, [&](i64 item, int) {
        const i64 batch = item / shape.bricks;
        const Word* first = image_of<Word>(job, shape, batch);
        const Maps maps = read_maps(job, batch);
        Block b;
        Around<Word> around;
        int nearest[3][LANES];
        shape.for_blocks(item % shape.bricks, [&](i64 row, i64 block) {
            place<BORDER>(job, maps, batch, row, block * LANES, b);
            if (job.nearest) find_nearest<BORDER>(job, b, nearest);
            for (i64 c = 0; c < job.channels; ++c) {
                const Word* image = first + c * shape.image_volume;
                Word* out = static_cast<Word*>(job.out) + (batch * job.channels + c) * shape.volume + b.voxel;
                if (job.nearest) {
                    copy_nearest(job, image, b, nearest, out);
                } else {
                    gather<BORDER>(job, image, b, around);
                    vote(around, b, Word(job.infinity), out);
                }
            }
        });
    });
}

}  // namespace PATCHREG_ISA
}  // namespace patchreg
