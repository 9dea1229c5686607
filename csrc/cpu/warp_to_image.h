// The image's gradient. Its voxels get something from many output voxels, so the image is cut into regions, and whoever
// owns one goes over the output in its order and adds what falls on the region. Nothing is added twice at once, no copies
// of the image are made, and the sums do not depend on how the image is cut. A first pass over the output notes which
// part of the image each block touches, so that owners pass by most of what does not concern them.
#pragma once
#include "warp_block.h"

namespace patchreg {
namespace PATCHREG_ISA {

// Slices and rows of the image, first and last included; nothing where last < first.
struct Region {
    int first_slice, last_slice, first_row, last_row;

    bool has_slice(int i) const { return i >= first_slice && i <= last_slice; }
    bool has_row(int j) const { return j >= first_row && j <= last_row; }
    bool holds(const Region& other) const {
        return has_slice(other.first_slice) && has_slice(other.last_slice) && has_row(other.first_row) &&
               has_row(other.last_row);
    }
    bool meets(const Region& other) const {
        return first_slice <= other.last_slice && other.first_slice <= last_slice && first_row <= other.last_row &&
               other.first_row <= last_row;
    }
};

static inline void find_touched(const WarpJob& job, const Block& b, int axis, int& first, int& last) {
    int least = b.low[axis][0], most = least;
    for (int lane = 0; lane < b.lanes; ++lane) {
        const int low = b.low[axis][lane];
        least = low < least ? low : least, most = low > most ? low : most;
    }
    first = int(larger(least, 0)), last = int(smaller(i64(most) + 1, job.image_size[axis] - 1));
}

// What the blocks touch; one entry for every block or, of short rows, for some of them together.
struct Notes {
    i64 rows_each, blocks, each_batch;
    Scratch<Region> regions;

    Notes(const WarpJob& job, const Shape& shape)
        : rows_each(warp_rows_together(job.size)), blocks(shape.blocks),
          each_batch((shape.rows + rows_each - 1) / rows_each * blocks),
          regions(job.grad_image ? job.batch * each_batch : 0, false) {}

    Region& of(i64 batch, i64 row, i64 block) const {
        return regions[batch * each_batch + row / rows_each * blocks + block];
    }

    // One thread notes all rows of an entry, in their order.
    void note(const WarpJob& job, i64 batch, i64 row, i64 block, const Block& b) const {
        Region now, &all = of(batch, row, block);
        find_touched(job, b, 0, now.first_slice, now.last_slice);
        find_touched(job, b, 1, now.first_row, now.last_row);
        const bool first = row % rows_each == 0;
        all.first_slice = first || now.first_slice < all.first_slice ? now.first_slice : all.first_slice;
        all.last_slice = first || now.last_slice > all.last_slice ? now.last_slice : all.last_slice;
        all.first_row = first || now.first_row < all.first_row ? now.first_row : all.first_row;
        all.last_row = first || now.last_row > all.last_row ? now.last_row : all.last_row;
    }
};

// What every lane gives to each of its eight voxels.
struct PATCHREG_ALIGNED Shares {
    float pair[4][2 * LANES];
};

static inline void find_shares(const WarpJob& job, const Block& b, const float* g, Shares& shares) {
    PATCHREG_SIMD for (int lane = 0; lane < b.lanes; ++lane) {
        const Corners<float> weight = weigh(b.fractions(lane));
        const float by = job.gain * g[lane];
        const int l = 2 * lane, h = l + 1;
        shares.pair[0][l] = by * weight.at000, shares.pair[0][h] = by * weight.at001;
        shares.pair[1][l] = by * weight.at010, shares.pair[1][h] = by * weight.at011;
        shares.pair[2][l] = by * weight.at100, shares.pair[2][h] = by * weight.at101;
        shares.pair[3][l] = by * weight.at110, shares.pair[3][h] = by * weight.at111;
    }
}

template <bool BORDER>
PATCHREG_APART static void scatter_edge(const WarpJob& job, const Block& b, int lane, const Shares& shares,
                                        const Region& region, float* grad) {
    const i64* size = job.image_size;
    for (int corner = 0; corner < 8; ++corner) {
        const int i = neighbour<BORDER>(b.low[0][lane] + (corner >> 2), int(size[0]));
        const int j = neighbour<BORDER>(b.low[1][lane] + (corner >> 1 & 1), int(size[1]));
        const int k = neighbour<BORDER>(b.low[2][lane] + (corner & 1), int(size[2]));
        if (k >= 0 && region.has_slice(i) && region.has_row(j))
            grad[(i * size[1] + j) * size[2] + k] += shares.pair[corner / 2][2 * lane + corner % 2];
    }
}

typedef float Pair __attribute__((vector_size(8)));

static inline void add_pair(const float* pair, float* grad) {
    Pair sum, share;
    __builtin_memcpy(&sum, grad, sizeof sum);
    __builtin_memcpy(&share, pair, sizeof share);
    sum += share;
    __builtin_memcpy(grad, &sum, sizeof sum);
}

// The shares of lanes that see voxels one after the other: what two lanes give to a voxel is added up first.
static inline void add_run(const float* pair, float* grad) {
    grad[0] += pair[0];
    PATCHREG_SIMD for (int l = 1; l < WHOLE; ++l) grad[l] += pair[2 * l - 1] + pair[2 * l];
    grad[WHOLE] += pair[2 * WHOLE - 1];
}

// Which of the four lines of voxels around a lane are in a region.
struct Lines {
    bool at00, at01, at10, at11;
};

static inline Lines find_lines(const Region& region, const Block& b, int lane) {
    const int i = b.low[0][lane], j = b.low[1][lane];
    const bool slice0 = region.has_slice(i), slice1 = region.has_slice(i + 1);
    const bool row0 = region.has_row(j), row1 = region.has_row(j + 1);
    return {slice0 && row0, slice0 && row1, slice1 && row0, slice1 && row1};
}

// WHOLE_BLOCK: all that the block touches is in the region. Every other lane goes first: neighbouring lanes mostly meet in
// a voxel, and would wait for each other's stores.
template <bool BORDER, bool WHOLE_BLOCK>
PATCHREG_APART static void scatter(const WarpJob& job, const Block& b, const Shares& shares, const Region& region,
                                   float* grad) {
    const i64 row = job.image_size[2], slice = job.image_size[1] * row;
    const auto add = [&](int lane, const auto& add_line) {
        const Lines lines = WHOLE_BLOCK ? Lines{true, true, true, true} : find_lines(region, b, lane);
        float* at = grad + b.offset[lane];
        if (lines.at00) add_line(shares.pair[0] + 2 * lane, at);
        if (lines.at01) add_line(shares.pair[1] + 2 * lane, at + row);
        if (lines.at10) add_line(shares.pair[2] + 2 * lane, at + slice);
        if (lines.at11) add_line(shares.pair[3] + 2 * lane, at + slice + row);
    };
    for (int start = 0; start < b.count; start += WHOLE) {
        if (b.offset[start] >= 0) __builtin_prefetch(grad + b.offset[start] + 3 * slice, 1, 1);  // as gather() does
        if (b.run[start / WHOLE]) {
            add(start, add_run);
            continue;
        }
        for (int odd = 0; odd < 2; ++odd)
            for (int lane = start + odd; lane < smaller(b.count, start + WHOLE); lane += 2) {
                if (b.offset[lane] < 0) scatter_edge<BORDER>(job, b, lane, shares, region, grad);
                else add(lane, add_pair);
            }
    }
}

// The gradient of nearest sampling: all of it goes to one voxel.
template <bool BORDER>
static inline void scatter_nearest(const WarpJob& job, const Block& b, const float* g, const Region& region, float* grad) {
    const i64* size = job.image_size;
    for (int lane = 0; lane < b.count; ++lane) {
        int at[3];
        for (int axis = 0; axis < 3; ++axis)
            at[axis] = neighbour<BORDER>(nearest({b.low[axis][lane], b.fraction[axis][lane], 1.0f}), int(size[axis]));
        if (at[2] >= 0 && region.has_slice(at[0]) && region.has_row(at[1]))
            grad[(at[0] * size[1] + at[1]) * size[2] + at[2]] += job.gain * g[lane];
    }
}

template <bool BORDER>
static void add_to_region(const WarpJob& job, const Shape& shape, i64 batch, const Region& region, const Notes& notes) {
    Block b;
    Shares shares;
    PATCHREG_ALIGNED float g[LANES];
    const Maps maps = read_maps(job, batch);
    const i64 first = (job.image_batch == 1 ? 0 : batch) * job.channels;
    for (i64 brick = 0; brick < shape.bricks; ++brick)
        shape.for_blocks(brick, [&](i64 row, i64 block) {
            const Region& touched = notes.of(batch, row, block);
            if (!touched.meets(region)) return;
            const bool whole = region.holds(touched);
            place<BORDER>(job, maps, batch, row, block * LANES, b);
            for (i64 c = 0; c < job.channels; ++c) {
                float* grad = job.grad_image + (first + c) * shape.image_volume;
                load(job.upstream, job.out_storage, (batch * job.channels + c) * shape.volume, b, g);
                if (job.nearest) {
                    scatter_nearest<BORDER>(job, b, g, region, grad);
                } else {
                    find_shares(job, b, g, shares);
                    whole ? scatter<BORDER, true>(job, b, shares, region, grad)
                          : scatter<BORDER, false>(job, b, shares, region, grad);
                }
            }
        });
}

// Some regions for every thread; slices are divided first, and rows too where the slabs would become thin.
template <bool BORDER>
static void to_image(const WarpJob& job, const Shape& shape, const Parallel& pool, const Notes& notes) {
    const i64 slices = job.image_size[0], rows = job.image_size[1];
    const i64 wanted = larger(1, 4 * pool.threads / job.image_batch), slabs = larger(1, smaller(wanted, slices / 8));
    const i64 bands = larger(1, smaller((wanted + slabs - 1) / slabs, rows / 16));
    for_each(pool, job.image_batch * slabs * bands, [&](i64 item, int) {
        const i64 slab = item / bands % slabs, band = item % bands, image = item / bands / slabs;
        const Region region{int(slab * slices / slabs), int((slab + 1) * slices / slabs - 1), int(band * rows / bands),
                            int((band + 1) * rows / bands - 1)};
        const i64 first = job.image_batch == 1 ? 0 : image, end = job.image_batch == 1 ? job.batch : image + 1;
        for (i64 batch = first; batch < end; ++batch) add_to_region<BORDER>(job, shape, batch, region, notes);
    });
}

}  // namespace PATCHREG_ISA
}  // namespace patchreg
