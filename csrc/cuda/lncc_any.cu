// Local normalised cross correlation over any window: box or Gaussian, any odd size, also one larger than the volume.
//
// One pass an axis and a thread a voxel, over one box of slices and rows (of whole rows of voxels) of one plane at a time,
// so that what lies between the passes is bounded: the host chooses the boxes. Moments and fields are stored as (numbers,
// slices, rows, width) of a box: moments are five numbers, with a mask six, the last being the weight of the voxels that it
// leaves. What lies outside the volume is zero, and counts.
#include "block.h"
#include "lncc.h"
#include "storage.h"

namespace patchreg {

constexpr int ANY_THREADS = 256;

struct Box {
    i64 z, j, slices, rows, width;

    __device__ __forceinline__ i64 size() const { return slices * rows * width; }
    __device__ __forceinline__ i64 index(i64 slice, i64 row, i64 k) const {
        return ((slice - z) * rows + row - j) * width + k;
    }
};

struct BoxVoxel {
    i64 index, z, j, k;
    bool exists;  // the last block has threads to spare
};

PATCHREG_FN BoxVoxel voxel_of(const Box& box) {
    const i64 index = i64(blockIdx.x) * ANY_THREADS + threadIdx.x, row = index / box.width;
    return {index, box.z + row / box.rows, box.j + row % box.rows, index % box.width, index < box.size()};
}

// A window along an axis of `length` voxels.
struct Window {
    i64 radius, length;
    const float* weights;  // 2 radius + 1 numbers that sum to as much, or null for a box

    __device__ __forceinline__ float weight(i64 offset) const {
        return weights == nullptr ? 1.0f : weights[radius + offset];
    }
    __device__ __forceinline__ float total() const { return float(2 * radius + 1); }
    // Where most of any window lies outside, moments are merged about zero, not about the window's centre.
    __device__ __forceinline__ float near() const { return 2 * radius + 1 > 2 * length ? 0.0f : 1.0f; }
};

// Moments, and the weight of the voxels that they are of.
struct Weighted {
    LnccMoments moments;
    float n;
};

// Merges the moments of a window's parts; part(i) gives that at i, within the axis. Others are zeros of weight outside_n.
template <class PartAt>
static __device__ __forceinline__ Weighted merge_window(const Window& window, i64 center, float outside_n,
                                                        const PartAt& part) {
    const Weighted middle = part(center);
    const float shift_I = window.near() * middle.moments.mean_I, shift_J = window.near() * middle.moments.mean_J;
    LnccShifted sum{};
    float n = 0.0f;
    for (i64 d = -window.radius; d <= window.radius; ++d) {
        const i64 i = center + d;
        const Weighted p = i >= 0 && i < window.length ? part(i) : Weighted{{}, outside_n};
        const LnccShifted s = lncc_shifted(p.moments, p.n, shift_I, shift_J);
        const float weight = window.weight(d);
        sum = lncc_add(sum, {weight * s.I, weight * s.J, weight * s.II, weight * s.JJ, weight * s.IJ});
        n += weight * p.n;
    }
    return {lncc_merged(sum, n > 0.0f ? 1.0f / n : 0.0f, shift_I, shift_J), n};
}

PATCHREG_FN void store_moments(float* out, i64 index, i64 pitch, const Weighted& whole, bool masked) {
    const LnccMoments& m = whole.moments;
    out[index] = m.mean_I, out[index + pitch] = m.mean_J, out[index + 2 * pitch] = m.var_I;
    out[index + 3 * pitch] = m.var_J, out[index + 4 * pitch] = m.cross;
    if (masked) out[index + 5 * pitch] = whole.n;
}

PATCHREG_FN Weighted load_moments(const float* in, i64 index, i64 pitch, float n, bool masked) {
    return {{in[index], in[index + pitch], in[index + 2 * pitch], in[index + 3 * pitch], in[index + 4 * pitch]},
            masked ? in[index + 5 * pitch] : n};
}

// Moments of windows along K. fixed, moving, mask: (depth, height, width), mask may be null; out: moments of the box.
template <class T>
__global__ void __launch_bounds__(ANY_THREADS)
    lncc_any_rows(const T* fixed, const T* moving, const unsigned char* mask, const float* weights, float* out, i64 radius,
                  i64 height, i64 width, i64 z, i64 slices, i64 j, i64 rows) {
    const Box box{z, j, slices, rows, width};
    const BoxVoxel v = voxel_of(box);
    if (!v.exists) return;
    const i64 row = (v.z * height + v.j) * width;
    const auto voxel = [&](i64 k) -> Weighted {
        const bool selected = mask == nullptr || mask[row + k] != 0;
        return {{widen(fixed[row + k]), widen(moving[row + k]), 0, 0, 0}, selected ? 1.0f : 0.0f};
    };
    const Window window{radius, width, weights};
    store_moments(out, v.index, box.size(), merge_window(window, v.k, 1.0f, voxel), mask != nullptr);
}

// Moments of windows along J, of moments `in` of rows in_j to in_j + in_rows - 1 of the same slices.
__global__ void __launch_bounds__(ANY_THREADS)
    lncc_any_columns(const float* in, const float* weights, float* out, i64 radius, i64 masked, i64 height, i64 width,
                     i64 slices, i64 in_j, i64 in_rows, i64 j, i64 rows) {
    const Box from{0, in_j, slices, in_rows, width}, box{0, j, slices, rows, width};
    const BoxVoxel v = voxel_of(box);
    if (!v.exists) return;
    const Window window{radius, height, weights};
    const auto part = [&](i64 i) {
        return load_moments(in, from.index(v.z, i, v.k), from.size(), window.total(), masked != 0);
    };
    store_moments(out, v.index, box.size(), merge_window(window, v.j, window.total(), part), masked != 0);
}

// The value, and the fields, of slices z to z + slices - 1, from moments `in` of slices in_z to in_z + in_slices - 1 of the
// same rows. What lies in slices and rows own_* is counted, a partial sum a block, and put in value_map unless that is null.
// fields: cross, i_linear, i_square, j_linear, j_square of the box, or null. upstream: one number, a map, or null for 1.
template <class T>
__global__ void __launch_bounds__(ANY_THREADS)
    lncc_any_derive(const float* in, const T* fixed, const T* moving, const unsigned char* mask, const float* weights,
                    const float* upstream, i64 upstream_is_map, double* partial_sums, float* value_map, float* fields,
                    i64 radius, i64 depth, i64 height, i64 width, i64 in_z, i64 in_slices, i64 z, i64 slices, i64 j,
                    i64 rows, i64 own_z, i64 own_slices, i64 own_j, i64 own_rows, i64 center, float eps) {
    const Box from{in_z, j, in_slices, rows, width}, box{z, j, slices, rows, width};
    const BoxVoxel v = voxel_of(box);
    float value = 0.0f;
    if (v.exists) {
        const Window window{radius, depth, weights};
        const float total = window.total();
        const auto part = [&](i64 i) {
            return load_moments(in, from.index(i, v.j, v.k), from.size(), total * total, mask != nullptr);
        };
        const Weighted whole = merge_window(window, v.z, total * total, part);
        const i64 at = (v.z * height + v.j) * width + v.k, pitch = box.size();
        const float alpha = lncc_alpha(whole.moments, whole.n, eps, mask == nullptr || mask[at] != 0);
        const bool own = v.z >= own_z && v.z < own_z + own_slices && v.j >= own_j && v.j < own_j + own_rows;
        value = own ? whole.moments.cross * alpha : 0.0f;
        if (own && value_map != nullptr) value_map[at] = value;
        if (fields != nullptr) {
            const float g = upstream == nullptr ? 1.0f : upstream[upstream_is_map != 0 ? at : 0];
            const LnccFields f = lncc_fields(whole.moments, alpha, g, widen(fixed[center]), widen(moving[center]));
            fields[v.index] = f.cross, fields[v.index + pitch] = f.i_linear, fields[v.index + 2 * pitch] = f.i_square;
            fields[v.index + 3 * pitch] = f.j_linear, fields[v.index + 4 * pitch] = f.j_square;
        }
    }
    const double sum = block_sum<ANY_THREADS>(double(value));
    if (threadIdx.x == 0) partial_sums[blockIdx.x] = sum;
}

// Weighted sums over windows along one axis: in is (outer, in_length, inner) and begins at in_first of that axis, out is
// (outer, length, inner) and begins at first.
__global__ void __launch_bounds__(ANY_THREADS)
    lncc_any_sum(const float* in, const float* weights, float* out, i64 radius, i64 outer, i64 in_first, i64 in_length,
                 i64 first, i64 length, i64 inner) {
    const Box from{0, in_first, outer, in_length, inner}, box{0, first, outer, length, inner};
    const BoxVoxel v = voxel_of(box);
    if (!v.exists) return;
    const Window window{radius, 0, weights};
    float sum = 0.0f;
    for (i64 d = -radius; d <= radius; ++d) {
        const i64 i = v.j + d;
        if (i >= in_first && i < in_first + in_length) sum += window.weight(d) * in[from.index(v.z, i, v.k)];
    }
    out[v.index] = sum;
}

// The gradients of slices z to z + slices - 1, from sums of the fields over rows and columns in slices in_z to
// in_z + in_slices - 1 of the same rows. grad_fixed and grad_moving, of the whole plane, may be null.
template <class T>
__global__ void __launch_bounds__(ANY_THREADS)
    lncc_any_gradients(const float* in, const T* fixed, const T* moving, const unsigned char* mask, const float* weights,
                       float* grad_fixed, float* grad_moving, i64 radius, i64 height, i64 width, i64 in_z, i64 in_slices,
                       i64 z, i64 slices, i64 j, i64 rows, i64 center) {
    const Box from{in_z, j, in_slices, rows, width}, box{z, j, slices, rows, width};
    const BoxVoxel v = voxel_of(box);
    if (!v.exists) return;
    const Window window{radius, 0, weights};
    float sum[5] = {};
    for (i64 d = -radius; d <= radius; ++d) {
        const i64 i = v.z + d;
        if (i < in_z || i >= in_z + in_slices) continue;
#pragma unroll
        for (int f = 0; f < 5; ++f) sum[f] += window.weight(d) * in[from.index(i, v.j, v.k) + f * from.size()];
    }
    const i64 at = (v.z * height + v.j) * width + v.k;
    const float I = widen(fixed[at]) - widen(fixed[center]), J = widen(moving[at]) - widen(moving[center]);
    const bool selected = mask == nullptr || mask[at] != 0;
    if (grad_fixed != nullptr) grad_fixed[at] = selected ? lncc_gradient(sum[1], sum[2], sum[0], I, J) : 0.0f;
    if (grad_moving != nullptr) grad_moving[at] = selected ? lncc_gradient(sum[3], sum[4], sum[0], J, I) : 0.0f;
}

}  // namespace patchreg
