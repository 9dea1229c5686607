// Local normalised cross correlation over box windows of radius R = 1 to 4, with its exact gradients, in one kernel that
// keeps nothing of the volumes' size. csrc/cuda/lncc_any.cu takes every other window.
//
// A block marches through the slices of a tile of OUT_J x OUT_K columns, and for each slice takes four steps:
//   1. moments of windows along K, four neighbours a thread, of the voxels in shared memory, while the next slice loads;
//   2. of these along J, two neighbours a thread, and along the march, in registers: the value of the slice R back, and
//      the fields whose window sums are the gradient (csrc/common/lncc.h);
//   3. sums of the fields along K;
//   4. of these along J and along the march, in registers: the gradient of the slice 2 R back.
// For a gradient the tile's windows reach R further on all sides; these margins are computed by two blocks, which costs
// less than to pass the fields through memory.
#include "block.h"
#include "lncc.h"
#include "sliding.h"
#include "storage.h"

namespace patchreg {

enum LnccMode : int { LNCC_VALUE = 0, LNCC_GRADIENT = 1, LNCC_GRADIENTS = 2 };  // of `fixed`, or of both images

constexpr int LNCC_TOGETHER = 4;  // slices a turn, so that what the march keeps is never moved between registers

// patchreg/ops/lncc/tiles.py has the same numbers.
template <int R, int MODE, bool MASK> struct LnccTile {
    static constexpr int HALO = MODE == LNCC_VALUE ? 0 : R;
    static constexpr int OUT_K = MODE == LNCC_VALUE ? 32 : 24, OUT_J = MODE == LNCC_VALUE ? 24 : 16;
    static constexpr int THREADS = 384;
    static constexpr int FIELD_K = OUT_K + 2 * HALO, FIELD_J = OUT_J + 2 * HALO;
    static constexpr int RAW_K = FIELD_K + 2 * R, RAW_J = FIELD_J + 2 * R;
    static constexpr int SEGMENTS = (FIELD_K + 3) / 4, READ = (4 + 2 * R + 3) / 4 * 4;  // four windows read so much
    static constexpr int RAW_PITCH = 4 * (SEGMENTS - 1) + READ, ROW_PITCH = 4 * SEGMENTS, FIELD_PITCH = OUT_K - 4 + READ;
    static constexpr int RAWS = MASK ? 3 : 2, PARTS = MASK ? 6 : 5;
    static constexpr int FIELDS = MODE == LNCC_VALUE ? 0 : MODE == LNCC_GRADIENT ? 3 : 5;
    // Where each begins in shared memory.
    static constexpr int RAW = 0, ROWS = RAW + RAWS * RAW_J * RAW_PITCH, FIELD = ROWS + PARTS * RAW_J * ROW_PITCH;
    static constexpr int FIELD_ROWS = FIELD + FIELDS * FIELD_J * FIELD_PITCH, FOURS = FIELD_ROWS + FIELDS * FIELD_J * OUT_K;
    static_assert(FIELD_K * FIELD_J / 2 <= THREADS && RAW_K <= THREADS, "every pair of columns has its thread");
    static_assert(MODE == LNCC_VALUE || OUT_K * OUT_J == THREADS, "every column of the gradient has its thread");
};

// Which part of the volumes a block computes. A slice has fewer than 2^31 voxels: the host sees to it.
struct LnccPlace {
    i64 plane_offset, mask_offset, slice;  // where its plane begins, and the size of a slice
    int j0, k0, z0, z1;
    int depth, height, width;

    __device__ __forceinline__ bool holds(int j, int k) const { return j >= 0 && j < height && k >= 0 && k < width; }
    // The place in a slice; of a voxel outside it is not to be used.
    __device__ __forceinline__ u32 at(int j, int k) const { return u32(j) * u32(width) + u32(k); }
    template <class T> __device__ __forceinline__ T* image_slice(T* image, int z) const {
        return image + plane_offset + z * slice;
    }
    __device__ __forceinline__ const unsigned char* mask_slice(const unsigned char* mask, int z) const {
        return mask + mask_offset + z * slice;
    }
};

template <int OUT_J, int OUT_K>
PATCHREG_FN LnccPlace lncc_place(i64 channels, i64 depth, i64 height, i64 width, i64 chunks, i64 chunk) {
    const i64 tiles_k = (width + OUT_K - 1) / OUT_K, tiles_j = (height + OUT_J - 1) / OUT_J;
    const i64 volume = depth * height * width;
    i64 index = blockIdx.x;
    const i64 tile_k = index % tiles_k;
    index /= tiles_k;
    const i64 tile_j = index % tiles_j;
    index /= tiles_j;
    const i64 z0 = index % chunks * chunk, z1 = z0 + chunk < depth ? z0 + chunk : depth, plane = index / chunks;
    return {plane * volume, plane / channels * volume, height * width, int(tile_j * OUT_J), int(tile_k * OUT_K),
            int(z0),        int(z1),                   int(depth),     int(height),         int(width)};
}

// The intensity in the middle of the tile, that the gradient is formed about.
template <class T, int OUT_J, int OUT_K>
PATCHREG_FN float lncc_central(const LnccPlace& place, const T* image, const unsigned char* mask) {
    const int j = place.j0 + OUT_J / 2, k = place.k0 + OUT_K / 2, z = (place.z0 + place.z1) / 2;
    const u32 at = place.at(j < place.height ? j : place.height - 1, k < place.width ? k : place.width - 1);
    return mask == nullptr || place.mask_slice(mask, z)[at] != 0 ? widen(place.image_slice(image, z)[at]) : 0.0f;
}

// Brings the voxels of one slice after another to shared memory; what lies outside the volume is zero, and counts.
template <class T, class Tile, bool MASK> struct LnccLoader {
    static constexpr int LINES = Tile::THREADS / Tile::RAW_K, PASSES = (Tile::RAW_J + LINES - 1) / LINES;
    const int place_in_raw;  // of the first voxel that this thread brings
    const u32 at, step;      // where it is in a slice, and how far from there the next is
    u32 inside = 0, stored = 0;  // a bit a pass
    float I[PASSES], J[PASSES];
    unsigned char selected[PASSES];

    __device__ __forceinline__ LnccLoader(const LnccPlace& place, int thread, int margin)
        : place_in_raw(thread / Tile::RAW_K * Tile::RAW_PITCH + thread % Tile::RAW_K),
          at(place.at(place.j0 - margin + thread / Tile::RAW_K, place.k0 - margin + thread % Tile::RAW_K)),
          step(u32(LINES) * u32(place.width)) {
        const int line = thread / Tile::RAW_K, k = place.k0 - margin + thread % Tile::RAW_K;
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            const int row = line + pass * LINES;
            if (line < LINES && row < Tile::RAW_J) stored |= 1u << pass;
            if (line < LINES && place.holds(place.j0 - margin + row, k)) inside |= 1u << pass;
        }
    }

    __device__ __forceinline__ void fetch(const LnccPlace& place, const T* fixed, const T* moving,
                                          const unsigned char* mask, int z) {
        const T *slice_I = place.image_slice(fixed, z), *slice_J = place.image_slice(moving, z);
        const unsigned char* slice_mask = MASK ? place.mask_slice(mask, z) : nullptr;
        const u32 wanted = z < place.depth ? inside : 0;
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            const bool is_inside = (wanted >> pass & 1u) != 0;
            I[pass] = is_inside ? widen(slice_I[at + pass * step]) : 0.0f;
            J[pass] = is_inside ? widen(slice_J[at + pass * step]) : 0.0f;
            if (MASK) selected[pass] = is_inside ? slice_mask[at + pass * step] : 1;
        }
    }

    __device__ __forceinline__ void store(float* raw) const {
        constexpr int SIZE = Tile::RAW_J * Tile::RAW_PITCH;
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            if ((stored >> pass & 1u) == 0) continue;
            float* to = raw + place_in_raw + pass * LINES * Tile::RAW_PITCH;
            to[0] = I[pass], to[SIZE] = J[pass];
            if (MASK) to[2 * SIZE] = selected[pass] != 0 ? 1.0f : 0.0f;
        }
    }
};

template <int COUNT> PATCHREG_FN void load_vectors(const float* from, float* to) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(from + i);
        to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
    }
}

PATCHREG_FN void store_vector(float* to, float a, float b, float c, float d) {
    *reinterpret_cast<float4*>(to) = make_float4(a, b, c, d);
}

// Step 1.
template <class Tile, int R, bool MASK> PATCHREG_FN void lncc_rows(const float* raw, float* rows, int thread) {
    constexpr int RAW_SIZE = Tile::RAW_J * Tile::RAW_PITCH, SIZE = Tile::RAW_J * Tile::ROW_PITCH;
    for (int task = thread; task < Tile::RAW_J * Tile::SEGMENTS; task += Tile::THREADS) {
        const int row = task / Tile::SEGMENTS, first = task % Tile::SEGMENTS * 4;
        const float* from = raw + row * Tile::RAW_PITCH + first;
        float I[Tile::READ], J[Tile::READ], selected[Tile::READ];
        load_vectors<Tile::READ>(from, I);
        load_vectors<Tile::READ>(from + RAW_SIZE, J);
        if constexpr (MASK) load_vectors<Tile::READ>(from + 2 * RAW_SIZE, selected);
        Part p[4];
        moments_of_run<4, R, MASK>(I, J, selected, p);
        float* to = rows + row * Tile::ROW_PITCH + first;
        store_vector(to, p[0].moments.mean_I, p[1].moments.mean_I, p[2].moments.mean_I, p[3].moments.mean_I);
        store_vector(to + SIZE, p[0].moments.mean_J, p[1].moments.mean_J, p[2].moments.mean_J, p[3].moments.mean_J);
        store_vector(to + 2 * SIZE, p[0].moments.var_I, p[1].moments.var_I, p[2].moments.var_I, p[3].moments.var_I);
        store_vector(to + 3 * SIZE, p[0].moments.var_J, p[1].moments.var_J, p[2].moments.var_J, p[3].moments.var_J);
        store_vector(to + 4 * SIZE, p[0].moments.cross, p[1].moments.cross, p[2].moments.cross, p[3].moments.cross);
        if constexpr (MASK) store_vector(to + 5 * SIZE, p[0].n, p[1].n, p[2].n, p[3].n);
    }
}

// Step 2, along J: of the windows at rows 2 p and 2 p + 1 of one column.
template <class Tile, int R, bool MASK> PATCHREG_FN void lncc_columns(const float* column, Part* first, Part* second) {
    constexpr int PITCH = Tile::ROW_PITCH, SIZE = Tile::RAW_J * PITCH;
    constexpr float N = 2 * R + 1;
    const float shift_I = column[R * PITCH], shift_J = column[R * PITCH + SIZE];
    const auto row = [&](int j) -> ShiftedPart {
        const float* at = column + j * PITCH;
        const float n = MASK ? at[5 * SIZE] : N;
        return {lncc_shifted({at[0], at[SIZE], at[2 * SIZE], at[3 * SIZE], at[4 * SIZE]}, n, shift_I, shift_J), n};
    };
    ShiftedPart common = row(1);
#pragma unroll
    for (int j = 2; j <= 2 * R; ++j) common = join(common, row(j));
    *first = centered<MASK>(join(common, row(0)), N * N, shift_I, shift_J);
    *second = centered<MASK>(join(common, row(2 * R + 1)), N * N, shift_I, shift_J);
}

// Step 3.
template <class Tile, int R> PATCHREG_FN void lncc_field_rows(const float* field, float* field_rows, int thread) {
    constexpr int SEGMENTS = Tile::OUT_K / 4;
    for (int task = thread; task < Tile::FIELDS * Tile::FIELD_J * SEGMENTS; task += Tile::THREADS) {
        const int row = task / SEGMENTS, first = task % SEGMENTS * 4;  // the fields' rows follow each other
        float x[Tile::READ], sum[4];
        load_vectors<Tile::READ>(field + row * Tile::FIELD_PITCH + first, x);
        sum_run<4, R>(x, sum);
        store_vector(field_rows + row * Tile::OUT_K + first, sum[0], sum[1], sum[2], sum[3]);
    }
}

// What a kernel is given; see lncc().
template <class T> struct LnccArguments {
    const T *fixed, *moving;
    const unsigned char* mask;
    const float* upstream;
    bool upstream_is_map;
    float *value_map, *grad_fixed, *grad_moving;
    float eps, i0, j0;  // the intensities that the gradient is formed about
};

// What a thread of step 2 does for its two columns, and keeps between slices. Where there are more threads than pairs of
// columns, the last pair is done several times: a branch would cost every thread a move of all that it keeps.
template <class T, class Tile, int R, int MODE, bool MASK> struct LnccColumns {
    static constexpr int PAIRS = Tile::FIELD_J / 2;
    const int pair, column;
    const u32 at;             // where in a slice the first of the two is
    u32 inside = 0, own = 0;  // a bit a column: in the volume, and not one of the block's margins
    MarchingMoments<R, MASK> march[2];
    float sum = 0.0f;  // of the values that belong to the block, since it was last taken

    __device__ __forceinline__ LnccColumns(const LnccPlace& place, int thread)
        : pair(thread / Tile::FIELD_K < PAIRS ? thread / Tile::FIELD_K : PAIRS - 1), column(thread % Tile::FIELD_K),
          at(place.at(place.j0 - Tile::HALO + 2 * pair, place.k0 - Tile::HALO + column)) {
#pragma unroll
        for (int second = 0; second < 2; ++second) {
            march[second].clear();
            const int row = 2 * pair + second - Tile::HALO, own_column = column - Tile::HALO;
            const bool is_inside = place.holds(place.j0 + row, place.k0 + own_column);
            if (is_inside) inside |= 1u << second;
            if (is_inside && thread / Tile::FIELD_K < PAIRS && row >= 0 && row < Tile::OUT_J && own_column >= 0 &&
                own_column < Tile::OUT_K)
                own |= 1u << second;
        }
    }

    // The slice of voxels z + R is in, so that the windows around slice z are complete.
    __device__ __forceinline__ void step(const LnccPlace& place, const LnccArguments<T>& given, int z, const float* rows,
                                         float* field) {
        Part part[2];
        lncc_columns<Tile, R, MASK>(rows + 2 * pair * Tile::ROW_PITCH + column, &part[0], &part[1]);
        const u32 here = z >= 0 && z < place.depth ? inside : 0, counted = z >= place.z0 && z < place.z1 ? own : 0;
#pragma unroll
        for (int second = 0; second < 2; ++second) {
            const Part whole = march[second].push(part[second]);
            const u32 voxel = at + second * u32(place.width);
            bool selected = (here >> second & 1u) != 0;
            if (MASK && selected) selected = place.mask_slice(given.mask, z)[voxel] != 0;
            constexpr float N = (2 * R + 1) * (2 * R + 1) * (2 * R + 1);
            const float alpha = lncc_alpha(whole.moments, MASK ? whole.n : N, given.eps, selected);
            const float value = whole.moments.cross * alpha;
            if ((counted >> second & 1u) != 0) {
                sum += value;
                if (MODE == LNCC_VALUE && given.value_map != nullptr) place.image_slice(given.value_map, z)[voxel] = value;
            }
            if constexpr (MODE != LNCC_VALUE) {
                float g = 1.0f;
                if (given.upstream != nullptr && selected)
                    g = given.upstream_is_map ? place.image_slice(given.upstream, z)[voxel] : *given.upstream;
                put(field + (2 * pair + second) * Tile::FIELD_PITCH + column,
                    lncc_fields(whole.moments, alpha, g, given.i0, given.j0));
            }
        }
    }

    __device__ __forceinline__ static void put(float* field, LnccFields f) {
        constexpr int SIZE = Tile::FIELD_J * Tile::FIELD_PITCH;
        field[0] = f.cross, field[SIZE] = f.i_linear, field[2 * SIZE] = f.i_square;
        if constexpr (MODE == LNCC_GRADIENTS) field[3 * SIZE] = f.j_linear, field[4 * SIZE] = f.j_square;
    }
};

// Step 4: what a thread does for its column of the gradient.
template <class T, class Tile, int R, int MODE, bool MASK> struct LnccGradients {
    const int thread;
    const u32 at;
    const bool inside;
    MarchingSums<R, Tile::FIELDS> march;

    __device__ __forceinline__ LnccGradients(const LnccPlace& place, int thread)
        : thread(thread), at(place.at(place.j0 + thread / Tile::OUT_K, place.k0 + thread % Tile::OUT_K)),
          inside(place.holds(place.j0 + thread / Tile::OUT_K, place.k0 + thread % Tile::OUT_K)) {}

    __device__ __forceinline__ void clear(float* field_rows, float* fours) const {
        for (int i = thread; i < Tile::FIELDS * Tile::FIELD_J * Tile::OUT_K; i += Tile::THREADS) field_rows[i] = 0.0f;
        march.clear(fours + thread, Tile::THREADS);
    }

    // `turn` counts the slices, from 0; only its last two bits matter.
    __device__ __forceinline__ void step(const LnccPlace& place, const LnccArguments<T>& given, int z, int turn,
                                         const float* field_rows, float* fours) {
        float sum[Tile::FIELDS];
#pragma unroll
        for (int f = 0; f < Tile::FIELDS; ++f) {
            const float* column = field_rows + f * Tile::FIELD_J * Tile::OUT_K + thread;
            float over_j = column[0];
#pragma unroll
            for (int d = 1; d <= 2 * R; ++d) over_j += column[d * Tile::OUT_K];
            sum[f] = march.push(f, over_j, turn, fours + thread, Tile::THREADS);
        }
        if (z < place.z0 || z >= place.z1 || !inside) return;
        const float I = widen(place.image_slice(given.fixed, z)[at]) - given.i0;
        const float J = widen(place.image_slice(given.moving, z)[at]) - given.j0;
        const bool selected = !MASK || place.mask_slice(given.mask, z)[at] != 0;
        place.image_slice(given.grad_fixed, z)[at] = selected ? lncc_gradient(sum[1], sum[2], sum[0], I, J) : 0.0f;
        if constexpr (MODE == LNCC_GRADIENTS)
            place.image_slice(given.grad_moving, z)[at] = selected ? lncc_gradient(sum[3], sum[4], sum[0], J, I) : 0.0f;
    }
};

// fixed, moving, value_map, grad_fixed, grad_moving: (planes, depth, height, width); mask: (planes / channels, ...).
// upstream: d(loss) / d(value), one number or a map, or null for 1. partial_sums: of the value, one for each block.
template <class T, int R, int MODE, bool MASK>
__global__ void __launch_bounds__(LnccTile<R, MODE, MASK>::THREADS)
    lncc(const T* fixed, const T* moving, const unsigned char* mask, const float* upstream, i64 upstream_is_map,
         double* partial_sums, float* value_map, float* grad_fixed, float* grad_moving, i64 channels, i64 depth, i64 height,
         i64 width, i64 chunks, i64 chunk, float eps) {
    using Tile = LnccTile<R, MODE, MASK>;
    constexpr bool GRADIENT = MODE != LNCC_VALUE;
    PATCHREG_DYNAMIC_SHARED(float, shared);
    float *raw = shared + Tile::RAW, *rows = shared + Tile::ROWS, *field = shared + Tile::FIELD;
    float *field_rows = shared + Tile::FIELD_ROWS, *fours = shared + Tile::FOURS;
    const int thread = int(threadIdx.x);
    const LnccPlace place = lncc_place<Tile::OUT_J, Tile::OUT_K>(channels, depth, height, width, chunks, chunk);
    const int first = place.z0 - R - Tile::HALO, start = first > 0 ? first : 0;
    const int turns = (place.z1 + R + Tile::HALO - start + LNCC_TOGETHER - 1) / LNCC_TOGETHER;  // the last may give nothing
    LnccArguments<T> given{fixed,     moving,     mask,        upstream, upstream_is_map != 0,
                           value_map, grad_fixed, grad_moving, eps,      0.0f, 0.0f};
    if constexpr (GRADIENT) {
        given.i0 = lncc_central<T, Tile::OUT_J, Tile::OUT_K>(place, fixed, mask);
        given.j0 = lncc_central<T, Tile::OUT_J, Tile::OUT_K>(place, moving, mask);
    }
    LnccLoader<T, Tile, MASK> loader(place, thread, R + Tile::HALO);
    LnccColumns<T, Tile, R, MODE, MASK> columns(place, thread);
    LnccGradients<T, LnccTile<R, GRADIENT ? MODE : LNCC_GRADIENT, MASK>, R, MODE, MASK> gradients(place, thread);
    if constexpr (GRADIENT) gradients.clear(field_rows, fours);  // before the first slice there are only zeros
    double total = 0.0;
    loader.fetch(place, fixed, moving, mask, start);
    loader.store(raw);
    __syncthreads();
    int t = start;
    for (int turn = 0; turn < turns; ++turn) {
#pragma unroll
        for (int step = 0; step < LNCC_TOGETHER; ++step, ++t) {
            loader.fetch(place, fixed, moving, mask, t + 1);
            lncc_rows<Tile, R, MASK>(raw, rows, thread);
            if constexpr (GRADIENT) gradients.step(place, given, t - 1 - 2 * R, step, field_rows, fours);
            __syncthreads();
            columns.step(place, given, t - R, rows, field);
            if constexpr (GRADIENT) {
                __syncthreads();
                lncc_field_rows<Tile, R>(field, field_rows, thread);
            }
            loader.store(raw);
            __syncthreads();
        }
        total += double(columns.sum);
        columns.sum = 0.0f;
    }
    if constexpr (GRADIENT) gradients.step(place, given, t - 1 - 2 * R, 0, field_rows, fours);
    total = block_sum<Tile::THREADS>(total);
    if (thread == 0) partial_sums[blockIdx.x] = total;
}

}  // namespace patchreg
