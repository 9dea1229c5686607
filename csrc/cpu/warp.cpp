#include "warp.h"

#include "warp_labels.h"
#include "warp_to_image.h"

namespace patchreg {
namespace PATCHREG_ISA {

template <class T> static inline const Around<float>& widened(const Around<T>& around, Around<float>& wide) {
    for (int line = 0; line < 4; ++line)
        PATCHREG_SIMD for (int l = 0; l < 2 * LANES; ++l) wide.pair[line][l] = widen(around.pair[line][l]);
    return wide;
}
static inline const Around<float>& widened(const Around<float>& around, Around<float>&) { return around; }

template <bool BORDER, class T> static void forward(const WarpJob& job, const Parallel& pool) {
    const Shape shape(job);
    for_each(pool, job.batch * shape.bricks, [&](i64 item, int) {
        const i64 batch = item / shape.bricks;
        const Maps maps = read_maps(job, batch);
        const T* image = image_of<T>(job, shape, batch);
        Block b;
        Around<T> around;
        Around<float> wide;
        PATCHREG_ALIGNED float values[LANES];
        shape.for_blocks(item % shape.bricks, [&](i64 row, i64 block) {
            place<BORDER>(job, maps, batch, row, block * LANES, b);
            for (i64 c = 0; c < job.channels; ++c) {
                gather<BORDER>(job, image + c * shape.image_volume, b, around);
                const Around<float>& corners = widened(around, wide);
                PATCHREG_SIMD for (int lane = 0; lane < b.lanes; ++lane)
                    values[lane] = job.gain * interpolate(corners.at(lane), b.fractions(lane));
                if (job.add)
                    PATCHREG_SIMD for (int lane = 0; lane < b.lanes; ++lane)
                        values[lane] += job.gain * b.displacement[c][lane];
                store(values, b, job.out, job.out_storage, (batch * job.channels + c) * shape.volume);
            }
        });
    });
}

template <class Body> static inline void for_storage(int storage, const Body& body) {
    switch (storage) {
        case STORE_HALF: return body(Half{});
        case STORE_BFLOAT16: return body(BFloat16{});
        default: return body(0.0f);
    }
}

void warp_forward(const WarpJob& job, const Parallel& pool) {
    for_storage(job.image_storage, [&](auto zero) {
        using T = decltype(zero);
        job.border ? forward<true, T>(job, pool) : forward<false, T>(job, pool);
    });
}

// d(loss) / d(position), added up over the channels.
struct PATCHREG_ALIGNED Forces {
    float axis[3][LANES];
};

template <bool BORDER, class T>
static inline void find_forces(const WarpJob& job, const Shape& shape, i64 batch, const Block& b, Forces& force,
                               float (*upstream)[LANES]) {
    Around<T> around;
    Around<float> wide;
    PATCHREG_ALIGNED float g[LANES];
    memset(&force, 0, sizeof force);
    for (i64 c = 0; c < job.channels; ++c) {
        load(job.upstream, job.out_storage, (batch * job.channels + c) * shape.volume, b, g);
        gather<BORDER>(job, image_of<T>(job, shape, batch) + c * shape.image_volume, b, around);
        const Around<float>& corners = widened(around, wide);
        PATCHREG_SIMD for (int lane = 0; lane < b.lanes; ++lane) {
            const Vector slope = derive(corners.at(lane), b.fractions(lane));
            const float by = job.gain * g[lane];
            force.axis[0][lane] += by * slope.i, force.axis[1][lane] += by * slope.j, force.axis[2][lane] += by * slope.k;
        }
        if (job.add)
            PATCHREG_SIMD for (int lane = 0; lane < b.lanes; ++lane) upstream[c][lane] = job.gain * g[lane];
    }
    if (BORDER)
        for (int axis = 0; axis < 3; ++axis)
            PATCHREG_SIMD for (int lane = 0; lane < b.lanes; ++lane) force.axis[axis][lane] *= b.slope[axis][lane];
}

// total += S^T force, and the displacement's own part of the result.
static inline void add_to_displacement(const WarpJob& job, const Maps& maps, const Block& b, const Forces& force,
                                       const float (*upstream)[LANES], float (*total)[LANES]) {
    for (int c = 0; c < 3; ++c) {
        const float *f = force.axis[0], *g = force.axis[1], *h = force.axis[2], *own = force.axis[c];
        const float s0 = maps.scale[0][c], s1 = maps.scale[1][c], s2 = maps.scale[2][c], step = job.step;
        if (job.scale)
            PATCHREG_SIMD for (int lane = 0; lane < b.lanes; ++lane)
                total[c][lane] += s0 * f[lane] + s1 * g[lane] + s2 * h[lane];
        else
            PATCHREG_SIMD for (int lane = 0; lane < b.lanes; ++lane) total[c][lane] += step * own[lane];
        if (job.add)
            PATCHREG_SIMD for (int lane = 0; lane < b.lanes; ++lane) total[c][lane] += upstream[c][lane];
    }
}

// The sum of a[lane] * b(lane), always in the same order.
template <class Factor> static inline double sum_lanes(const Block& b, const float* a, const Factor& factor) {
    float partial[WHOLE] = {};
    for (int start = 0; start < b.lanes; start += WHOLE)
        PATCHREG_SIMD for (int l = 0; l < WHOLE; ++l)
            partial[l] += start + l < b.count ? a[start + l] * factor(start + l) : 0.0f;
    double sum = 0;
    for (float part : partial) sum += part;
    return sum;
}

// The gradient to A and t is that to the position times (x, 1), to S times u.
static inline void add_to_sums(const WarpJob& job, const Block& b, const Forces& force, double* sums) {
    for (int axis = 0; axis < 3; ++axis) {
        const float* f = force.axis[axis];
        const double total = sum_lanes(b, f, [](int) { return 1.0f; });
        double* affine = sums + 4 * axis;
        affine[0] += double(b.i) * total;
        affine[1] += double(b.j) * total;
        affine[2] += double(b.k) * total + sum_lanes(b, f, [](int lane) { return float(lane); });
        affine[3] += total;
        if (job.scale)
            for (int c = 0; c < 3; ++c) {
                const float* u = b.displacement[c];
                sums[12 + 3 * axis + c] += sum_lanes(b, f, [=](int lane) { return u[lane]; });
            }
    }
}

// The gradient to the positions, and from there to u, A, t and S: every output voxel on its own. A displacement that the
// batch shares gets the sum over the batch, formed voxel by voxel.
template <bool BORDER, class T>
static void to_positions(const WarpJob& job, const Shape& shape, const Parallel& pool, const Notes& notes) {
    const bool shared = job.displacement_batch == 1, forces = job.grad_displacement || job.sums;
    for_each(pool, (shared ? 1 : job.batch) * shape.bricks, [&](i64 item, int) {
        const i64 brick = item % shape.bricks, first = item / shape.bricks, end = shared ? job.batch : first + 1;
        Block b;
        Forces force;
        PATCHREG_ALIGNED float upstream[3][LANES], total[3][LANES];
        for (i64 batch = first; job.sums && batch < end; ++batch)
            memset(job.sums + (batch * shape.bricks + brick) * WARP_SUMS, 0, WARP_SUMS * sizeof(double));
        shape.for_blocks(brick, [&](i64 row, i64 block) {
            memset(total, 0, sizeof total);
            for (i64 batch = first; batch < end; ++batch) {
                const Maps maps = read_maps(job, batch);
                place<BORDER>(job, maps, batch, row, block * LANES, b);
                if (job.grad_image) notes.note(job, batch, row, block, b);
                if (!forces) continue;
                find_forces<BORDER, T>(job, shape, batch, b, force, upstream);
                if (job.sums) add_to_sums(job, b, force, job.sums + (batch * shape.bricks + brick) * WARP_SUMS);
                if (job.grad_displacement) add_to_displacement(job, maps, b, force, upstream, total);
            }
            for (int c = 0; job.grad_displacement && c < 3; ++c)
                store(total[c], b, job.grad_displacement, job.grad_storage, (first * 3 + c) * shape.volume);
        });
    });
}

void warp_words(const WarpJob& job, const Parallel& pool) {
    const auto run = [&](auto zero) {
        using Word = decltype(zero);
        job.border ? sample_words<true, Word>(job, pool) : sample_words<false, Word>(job, pool);
    };
    switch (job.word_bytes) {
        case 1: return run((unsigned char)0);
        case 2: return run(u16(0));
        case 4: return run(u32(0));
        default: return run(0ull);
    }
}

void warp_backward(const WarpJob& job, const Parallel& pool) {
    const Shape shape(job);
    const Notes notes(job, shape);
    for_storage(job.image_storage, [&](auto zero) {
        using T = decltype(zero);
        job.border ? to_positions<true, T>(job, shape, pool, notes) : to_positions<false, T>(job, shape, pool, notes);
    });
    if (job.grad_image) job.border ? to_image<true>(job, shape, pool, notes) : to_image<false>(job, shape, pool, notes);
}

}  // namespace PATCHREG_ISA
}  // namespace patchreg
