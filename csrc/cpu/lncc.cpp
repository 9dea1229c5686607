#include "lncc.h"

#include "memory.h"
#include "storage.h"
#include "window_moments.h"

namespace patchreg {
namespace PATCHREG_ISA {

// A tile of the output: rows y0..y1-1 and columns x0..x1-1, of slices z0..z1-1 of one plane. The sweep goes over its
// slices, and for each takes four steps, every one of them within the second-level cache:
//   1. the moments of windows over z, straight from the images;
//   2. of these over y and x: the value, and the fields whose window sums are the gradient (csrc/common/lncc.h);
//   3. window sums of the fields over y and x, kept for as many slices as a window has;
//   4. of these over z, and the gradient, for four slices at a time.
// Blocks of four begin at multiples of four, so that the result does not depend on the tiling.

static inline i64 smaller(i64 a, i64 b) { return a < b ? a : b; }
static inline i64 larger(i64 a, i64 b) { return a > b ? a : b; }
static inline i64 block_start(i64 i) { return i / TOGETHER * TOGETHER; }
static inline i64 padded(i64 n) { return (n + 31) / 16 * 16; }

struct Span {
    i64 begin, end;
    i64 size() const { return end - begin; }
    Span grown(i64 by, i64 limit) const { return {larger(0, begin - by), smaller(limit, end + by)}; }
};

// Rows of `fields` lines each; a row outside the ones that are filled in reads as zeros.
struct Slab {
    i64 first, rows, pitch, fields;  // `first`: the row that is stored first; `pitch`: floats a line
    Scratch<float> data;

    Slab(i64 first, i64 last, i64 pitch, i64 fields)
        : first(first), rows(last - first), pitch(pitch), fields(fields), data(rows * pitch * fields) {}
    float* row(i64 y) const { return data + (y - first) * pitch * fields; }
};

// Which gradients are wanted fixes the order of the fields: cross, then linear and square of each wanted image.
template <bool TO_FIXED, bool TO_MOVING> struct Sweep {
    static constexpr bool GRADIENT = TO_FIXED || TO_MOVING;
    static constexpr int FIELDS = GRADIENT ? 1 + 2 * TO_FIXED + 2 * TO_MOVING : 1, MOVING = 2 * TO_FIXED + 1;

    const LnccJob& job;
    const i64 plane, radius;
    const Window over_depth, over_height, over_width;
    const Span x, y, z, field_x, field_y, field_z, part_x, part_y;  // of the outputs, the fields, the parts of windows
    const bool masked;
    const i64 lines, part_pitch, field_pitch, ring_pitch, slots;  // lines of floats a line of moments has
    const float weight;                                          // of a window along one axis
    Slab part_slab, field_slab;
    Scratch<float> ring, over_y, over_x, spare, zeros;
    Scratch<const float*> rows;
    Scratch<const void*> images;  // the rows of I, then those of J, then those of the mask, of one window over z
    const i64 volume, plane_offset, mask_offset;
    const float i0, j0;  // intensities that the gradient is formed about

    Sweep(const LnccJob& job, i64 plane, Span x, Span y, Span z)
        : job(job), plane(plane), radius(job.window / 2), over_depth(window_over(job, job.depth)),
          over_height(window_over(job, job.height)), over_width(window_over(job, job.width)), x(x), y(y), z(z),
          field_x(GRADIENT ? x.grown(radius, job.width) : x), field_y(GRADIENT ? y.grown(radius, job.height) : y),
          field_z(GRADIENT ? z.grown(radius, job.depth) : z), part_x(field_x.grown(radius, job.width)),
          part_y(field_y.grown(radius, job.height)), masked(job.mask != nullptr), lines(masked ? 6 : 5),
          part_pitch(padded(field_x.size() + 2 * radius)), field_pitch(padded(x.size() + 2 * radius)),
          ring_pitch(padded(x.size())), slots(job.window + TOGETHER - 1), weight(window_weight(job)),
          part_slab(block_start(field_y.begin) - radius, field_y.end + radius + TOGETHER, part_pitch, lines),
          field_slab(block_start(y.begin) - radius, y.end + radius + TOGETHER, GRADIENT ? field_pitch : 0, FIELDS),
          ring(GRADIENT ? slots * y.size() * FIELDS * ring_pitch : 0, false),
          over_y(TOGETHER * larger(lines * part_pitch, FIELDS * field_pitch), false), over_x(lines * part_pitch, false),
          spare(larger(part_pitch, field_pitch) + job.window, false), zeros(larger(FIELDS * ring_pitch, job.width)),
          rows(slots), images(3 * job.window), volume(job.depth * job.height * job.width),
          plane_offset(plane * volume), mask_offset(plane / job.channels * volume), i0(central(job.fixed)),
          j0(central(job.moving)) {
        if (masked) count_outside();
    }

    static Window window_over(const LnccJob& job, i64 size) { return {job.window, job.weights, job.window > 2 * size}; }

    static float window_weight(const LnccJob& job) {
        if (job.weights == nullptr) return float(job.window);
        double sum = 0;
        for (int k = 0; k < job.window; ++k) sum += job.weights[k];
        return float(sum);
    }

    float central(const void* image) const {
        const i64 at = plane_offset + (job.depth / 2 * job.height + job.height / 2) * job.width + job.width / 2;
        switch (job.storage) {
            case STORE_HALF: return widen(static_cast<const Half*>(image)[at]);
            case STORE_BFLOAT16: return widen(static_cast<const BFloat16*>(image)[at]);
            default: return static_cast<const float*>(image)[at];
        }
    }

    // What lies outside the volume is zero, and counts.
    void count_outside() {
        for (i64 row = part_slab.first; row < part_slab.first + part_slab.rows; ++row) {
            float* count = part_slab.row(row) + 5 * part_pitch;
            for (i64 i = 0; i < part_pitch; ++i) count[i] = weight;
        }
    }

    const unsigned char* mask() const { return masked ? job.mask + mask_offset : nullptr; }
    float* ring_row(i64 slice, i64 row) const {
        return ring + ((slice % slots) * y.size() + (row - y.begin)) * FIELDS * ring_pitch;
    }

    void run() {
        if constexpr (!GRADIENT) {
            for (i64 slice = z.begin; slice < z.end; ++slice) part_slice(slice), derive_slice(slice);
            return;
        }
        i64 written = z.begin;  // slices of the gradient that are done
        for (i64 slice = field_z.begin; slice < field_z.end; ++slice) {
            part_slice(slice);
            derive_slice(slice);
            gather_slice(slice);
            while (written < z.end && smaller(block_start(written) + TOGETHER - 1 + radius, field_z.end - 1) <= slice)
                written = write_gradients(written);
        }
    }

    // Step 1.
    void part_slice(i64 slice) {
        for (i64 row = part_y.begin; row < part_y.end; ++row) {
            float* out = part_slab.row(row) + (part_x.begin - (field_x.begin - radius));
            const i64 offset = row * job.width + part_x.begin;
            switch (job.storage) {
                case STORE_HALF: part_row<Half>(slice, offset, out); break;
                case STORE_BFLOAT16: part_row<BFloat16>(slice, offset, out); break;
                default: part_row<float>(slice, offset, out);
            }
        }
    }

    template <class T> void part_row(i64 slice, i64 offset, float* out) {
        const T **I = reinterpret_cast<const T**>(images.data), **J = I + job.window;
        const unsigned char** m = reinterpret_cast<const unsigned char**>(images.data + 2 * job.window);
        for (int k = 0; k < job.window; ++k) {
            const i64 z = slice - radius + k, at = z * job.height * job.width + offset;
            const bool inside = z >= 0 && z < job.depth;
            I[k] = inside ? static_cast<const T*>(job.fixed) + plane_offset + at : reinterpret_cast<const T*>(zeros.data);
            J[k] = inside ? static_cast<const T*>(job.moving) + plane_offset + at : reinterpret_cast<const T*>(zeros.data);
            m[k] = inside && masked ? mask() + at : job.ones;
        }
        if constexpr (sizeof(T) == sizeof(float)) {
            if (!masked && is_plain(over_depth)) switch (job.window) {
                    case 3: return box_voxel_moments<3>(I, J, out, part_pitch, part_x.size());
                    case 5: return box_voxel_moments<5>(I, J, out, part_pitch, part_x.size());
                    case 7: return box_voxel_moments<7>(I, J, out, part_pitch, part_x.size());
                    case 9: return box_voxel_moments<9>(I, J, out, part_pitch, part_x.size());
                }
        }
        voxel_moments<T>(over_depth, I, J, masked ? m : nullptr, out, part_pitch, part_x.size());
    }

    // Step 2.
    void derive_slice(i64 slice) {
        float* out[TOGETHER];
        for (int b = 0; b < TOGETHER; ++b) out[b] = over_y + b * lines * part_pitch;
        for (i64 block = block_start(field_y.begin); block < field_y.end; block += TOGETHER) {
            for (i64 k = 0; k < slots; ++k) rows[k] = part_slab.row(block - radius + k);
            merge_lines(over_height, rows, out, part_pitch, part_pitch, weight, masked);
            for (i64 row = larger(block, field_y.begin); row < smaller(block + TOGETHER, field_y.end); ++row) {
                merge_along(over_width, out[row - block], part_pitch, over_x, part_pitch, field_x.size(), weight * weight, masked);
                derive_row(slice, row);
            }
        }
    }

    void derive_row(i64 slice, i64 row) {
        const i64 n = field_x.size(), at = (slice * job.height + row) * job.width + field_x.begin;
        const float* counts = over_x + 5 * part_pitch;
        const unsigned char* m = masked ? mask() + at : nullptr;
        const float* map = job.upstream_is_map ? job.upstream + plane_offset + at : nullptr;
        const float all = weight * weight * weight, once = job.upstream && !map ? *job.upstream : 1.0f;
        float* field = GRADIENT ? field_slab.row(row) + (field_x.begin - (x.begin - radius)) : nullptr;
        float* values = spare;
        const auto derive = [&](i64 i, float count, bool selected, float upstream) {
            const LnccMoments moments = moments_at(over_x, part_pitch, i);
            const float alpha = lncc_alpha(moments, count, job.eps, selected);
            values[i] = moments.cross * alpha;
            if constexpr (GRADIENT) {
                const LnccFields f = lncc_fields(moments, alpha, upstream, i0, j0);
                field[i] = f.cross;
                if constexpr (TO_FIXED) field[i + field_pitch] = f.i_linear, field[i + 2 * field_pitch] = f.i_square;
                if constexpr (TO_MOVING)
                    field[i + MOVING * field_pitch] = f.j_linear, field[i + (MOVING + 1) * field_pitch] = f.j_square;
            }
        };
        if (m) {
            PATCHREG_SIMD for (i64 i = 0; i < n; ++i) derive(i, counts[i], m[i] != 0, map ? map[i] : once);
        } else if (map) {
            PATCHREG_SIMD for (i64 i = 0; i < n; ++i) derive(i, all, true, map[i]);
        } else {
            PATCHREG_SIMD for (i64 i = 0; i < n; ++i) derive(i, all, true, once);
        }
        keep_values(slice, row, values);
    }

    // The value's sum over the tile's part of a row, and the map where it is wanted.
    void keep_values(i64 slice, i64 row, const float* values) {
        if (slice < z.begin || slice >= z.end || row < y.begin || row >= y.end) return;
        const float* own = values + (x.begin - field_x.begin);
        float lanes[16] = {};
        i64 i = 0;
        for (; i + 16 <= x.size(); i += 16)
            for (int lane = 0; lane < 16; ++lane) lanes[lane] += own[i + lane];
        double total = 0;
        for (; i < x.size(); ++i) total += own[i];
        for (float lane : lanes) total += lane;
        job.row_values[((plane * job.depth + slice) * job.height + row) * job.tiles + x.begin / job.tile_width] = total;
        if (job.value_map) {
            float* out = job.value_map + plane_offset + (slice * job.height + row) * job.width + x.begin;
            for (i64 k = 0; k < x.size(); ++k) out[k] = own[k];
        }
    }

    // Step 3.
    void gather_slice(i64 slice) {
        float* out[TOGETHER];
        for (int b = 0; b < TOGETHER; ++b) out[b] = over_y + b * FIELDS * field_pitch;
        for (i64 block = block_start(y.begin); block < y.end; block += TOGETHER) {
            for (i64 k = 0; k < slots; ++k) rows[k] = field_slab.row(block - radius + k);
            sum_lines(over_height, rows, out, FIELDS * field_pitch);
            for (i64 row = larger(block, y.begin); row < smaller(block + TOGETHER, y.end); ++row)
                for (int f = 0; f < FIELDS; ++f)
                    sum_along(over_width, out[row - block] + f * field_pitch, ring_row(slice, row) + f * ring_pitch, spare,
                              x.size());
        }
    }

    // Step 4: the gradient of slices `first` to the end of its block of four. Returns the slice after them.
    i64 write_gradients(i64 first) {
        const i64 block = block_start(first), end = smaller(block + TOGETHER, z.end);
        float* out[TOGETHER];
        for (int b = 0; b < TOGETHER; ++b) out[b] = over_y + b * FIELDS * ring_pitch;
        for (i64 row = y.begin; row < y.end; ++row) {
            for (i64 k = 0; k < slots; ++k) {
                const i64 slice = block - radius + k;
                const bool there = slice >= field_z.begin && slice < field_z.end;
                rows[k] = there ? ring_row(slice, row) : zeros.data;
            }
            sum_lines(over_depth, rows, out, FIELDS * ring_pitch);
            for (i64 slice = first; slice < end; ++slice) {
                const i64 at = (slice * job.height + row) * job.width + x.begin;
                switch (job.storage) {
                    case STORE_HALF: write_row<Half>(out[slice - block], at); break;
                    case STORE_BFLOAT16: write_row<BFloat16>(out[slice - block], at); break;
                    default: write_row<float>(out[slice - block], at);
                }
            }
        }
        return end;
    }

    template <class T> void write_row(const float* sums, i64 at) {
        const i64 pitch = ring_pitch, n = x.size();
        const T *I = static_cast<const T*>(job.fixed) + plane_offset + at;
        const T *J = static_cast<const T*>(job.moving) + plane_offset + at;
        const unsigned char* m = job.mask ? mask() + at : nullptr;
        const auto write = [&](float* out, const T* own, const T* other, float own0, float other0, const float* linear) {
            const float *cross = sums, *square = linear + pitch;
            PATCHREG_SIMD for (i64 i = 0; i < n; ++i)
                out[i] = lncc_gradient(linear[i], square[i], cross[i], widen(own[i]) - own0, widen(other[i]) - other0);
            if (m) PATCHREG_SIMD for (i64 i = 0; i < n; ++i) out[i] = m[i] ? out[i] : 0.0f;
        };
        if constexpr (TO_FIXED) write(job.grad_fixed + plane_offset + at, I, J, i0, j0, sums + pitch);
        if constexpr (TO_MOVING) write(job.grad_moving + plane_offset + at, J, I, j0, i0, sums + MOVING * pitch);
    }
};

template <bool TO_FIXED, bool TO_MOVING> static void sweep(const LnccJob& job, const Parallel& pool) {
    const i64 rows = (job.height + job.tile_height - 1) / job.tile_height;
    const i64 tiles = job.planes * rows * job.tiles;
    // Few tiles for many threads: the slices are shared out too, at the price of a window's depth of fields each time.
    i64 parts = 1;
    while (tiles * parts < 2 * pool.threads && job.depth / (parts + 1) >= 2 * job.window + TOGETHER) ++parts;
    const i64 depth = block_start((job.depth + parts - 1) / parts + TOGETHER - 1);
    parts = (job.depth + depth - 1) / depth;
    for_each(pool, tiles * parts, [&](i64 item, int) {
        const i64 part = item % parts, column = item / parts % job.tiles, row = item / parts / job.tiles % rows;
        const auto span = [](i64 index, i64 size, i64 limit) { return Span{index * size, smaller(limit, (index + 1) * size)}; };
        Sweep<TO_FIXED, TO_MOVING>(job, item / parts / job.tiles / rows, span(column, job.tile_width, job.width),
                                   span(row, job.tile_height, job.height), span(part, depth, job.depth))
            .run();
    });
}

void lncc(const LnccJob& job, const Parallel& pool) {
    if (job.grad_fixed && job.grad_moving) return sweep<true, true>(job, pool);
    if (job.grad_fixed) return sweep<true, false>(job, pool);
    if (job.grad_moving) return sweep<false, true>(job, pool);
    sweep<false, false>(job, pool);
}

}  // namespace PATCHREG_ISA
}  // namespace patchreg
