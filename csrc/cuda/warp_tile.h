// What the kernels of warp.cu share: which voxel a thread has, where it samples the image, and the eight voxels there.
//
// A block is a tile of 2 x 4 x 32 output voxels, one thread each: the 32 lanes of a warp lie along the contiguous axis, so
// that u and the result are read and written in whole lines, and the image nearly so.
#pragma once
#include "block.h"
#include "sampling.h"
#include "storage.h"

namespace patchreg {

constexpr int TILE_I = 2, TILE_J = 4, TILE_K = 32, THREADS = TILE_I * TILE_J * TILE_K;

// What all kernels take: the sizes of output and image, and how far apart the batch's entries lie, 0 for what all share.
// Where both `affine` and `scale` are null the position is x + step u(x); a null `affine` is the identity, a null `scale`
// is `step` times it.
#define PATCHREG_LATTICE                                                                                            \
    const double *affine, const double *scale, i64 channels, i64 size_i, i64 size_j, i64 size_k, i64 image_i,       \
        i64 image_j, i64 image_k, i64 image_stride, i64 displacement_stride, i64 affine_stride, i64 scale_stride,   \
        float step
#define PATCHREG_LATTICE_VALUES                                                                                     \
    {affine, scale, channels, size_i, size_j, size_k, image_i, image_j, image_k, image_stride, displacement_stride, \
     affine_stride, scale_stride, step}

struct Lattice {
    const double *affine, *scale;
    i64 channels, size_i, size_j, size_k, image_i, image_j, image_k;
    i64 image_stride, displacement_stride, affine_stride, scale_stride;
    float step;
};

PATCHREG_FN i64 voxels_of(const Lattice& g) { return g.size_i * g.size_j * g.size_k; }
PATCHREG_FN i64 image_voxels_of(const Lattice& g) { return g.image_i * g.image_j * g.image_k; }

// The tile of a block, and the voxel of a thread.
struct Place {
    i64 batch, tile, i, j, k;    // i, j, k: of the tile's first voxel
    int step_i, step_j, step_k;  // from there to the thread's
    bool there;                  // whether the volume goes that far
    i64 voxel;                   // its place in the volume
};

template <int DEPTH> PATCHREG_FN Place find_place(const Lattice& g) {
    const u32 tiles_k = u32((g.size_k + TILE_K - 1) / TILE_K), tiles_j = u32((g.size_j + TILE_J - 1) / TILE_J);
    const u32 tiles_i = u32((g.size_i + TILE_I * DEPTH - 1) / (TILE_I * DEPTH)), tiles = tiles_i * tiles_j * tiles_k;
    const u32 batch = blockIdx.x / tiles, tile = blockIdx.x % tiles;
    Place p;
    p.batch = batch, p.tile = tile;
    p.k = i64(tile % tiles_k) * TILE_K, p.j = i64(tile / tiles_k % tiles_j) * TILE_J;
    p.i = i64(tile / tiles_k / tiles_j) * (TILE_I * DEPTH);
    p.step_i = int(threadIdx.z), p.step_j = int(threadIdx.y), p.step_k = int(threadIdx.x);
    return p;
}

PATCHREG_FN void move_to_round(Place& p, const Lattice& g, int round) {
    p.step_i = round * TILE_I + int(threadIdx.z);
    const i64 i = p.i + p.step_i, j = p.j + p.step_j, k = p.k + p.step_k;
    p.there = (i < g.size_i) & (j < g.size_j) & (k < g.size_k);
    p.voxel = p.there ? (i * g.size_j + j) * g.size_k + k : 0;
}

// The maps of a batch entry as a block needs them. What A x + t is at its first voxel is added up in double, so that large
// shifts cancel without loss; from there on steps are short.
struct Maps {
    Split start[3];
    int whole[9];
    float rest[9], scale[9];  // A is whole + rest
};

PATCHREG_FN void read_maps(Maps& maps, const Lattice& g, const Place& p, i64 batch) {
    const int n = thread_in_block(), row = n / 3, column = n % 3;
    const double* A = g.affine ? g.affine + batch * g.affine_stride : nullptr;
    __syncthreads();  // the maps of another entry may still be in use
    if (A && n < 3) {
        const double at = A[4 * n] * double(p.i) + A[4 * n + 1] * double(p.j) + A[4 * n + 2] * double(p.k) + A[4 * n + 3];
        maps.start[n] = split(at, int(n == 0 ? g.image_i : n == 1 ? g.image_j : g.image_k));
    }
    if (A && n < 9) {
        maps.whole[n] = whole_part(A[4 * row + column]);
        maps.rest[n] = float(A[4 * row + column] - maps.whole[n]);
    }
    if (g.scale && n < 9) maps.scale[n] = float(g.scale[batch * g.scale_stride + n]);
    __syncthreads();
}

PATCHREG_FN Vector add(Vector a, Vector b) { return {a.i + b.i, a.j + b.j, a.k + b.k}; }
PATCHREG_FN Vector multiply(float factor, Vector v) { return {factor * v.i, factor * v.j, factor * v.k}; }
PATCHREG_FN float component(Vector v, i64 c) { return c == 0 ? v.i : c == 1 ? v.j : v.k; }
PATCHREG_FN Vector multiply(const float* m, Vector v) {
    return {m[0] * v.i + m[1] * v.j + m[2] * v.k, m[3] * v.i + m[4] * v.j + m[5] * v.k,
            m[6] * v.i + m[7] * v.j + m[8] * v.k};
}
PATCHREG_FN Vector multiply_transposed(const float* m, Vector v) {
    return {m[0] * v.i + m[3] * v.j + m[6] * v.k, m[1] * v.i + m[4] * v.j + m[7] * v.k,
            m[2] * v.i + m[5] * v.j + m[8] * v.k};
}

// u at the thread's voxel; zero where there is no displacement.
template <class Field>
PATCHREG_FN Vector read_displacement(const Field* displacement, const Lattice& g, const Place& p, i64 batch) {
    if (displacement == nullptr) return {0.0f, 0.0f, 0.0f};
    const Field* u = displacement + batch * g.displacement_stride + p.voxel;
    const i64 volume = voxels_of(g);
    return {widen(u[0]), widen(u[volume]), widen(u[2 * volume])};
}

struct Position {
    Split i, j, k;
};

// A x + t + S u(x). MAPS: whether there is an A or an S.
template <bool MAPS> PATCHREG_FN Position find_position(const Maps& maps, const Lattice& g, const Place& p, Vector u) {
    Vector offset = multiply(g.step, u);
    if constexpr (MAPS) {
        if (g.scale) offset = multiply(maps.scale, u);
        if (g.affine) {
            const Split *start = maps.start;
            const int *whole = maps.whole, i = p.step_i, j = p.step_j, k = p.step_k;
            const Vector rest = multiply(maps.rest, {float(i), float(j), float(k)});
            offset = add(add({start[0].offset, start[1].offset, start[2].offset}, rest), offset);
            return {{start[0].index + whole[0] * i + whole[1] * j + whole[2] * k, offset.i},
                    {start[1].index + whole[3] * i + whole[4] * j + whole[5] * k, offset.j},
                    {start[2].index + whole[6] * i + whole[7] * j + whole[8] * k, offset.k}};
        }
    }
    const int i = int(p.i) + p.step_i, j = int(p.j) + p.step_j, k = int(p.k) + p.step_k;
    return {{i, offset.i}, {j, offset.j}, {k, offset.k}};
}

// Where the eight voxels around a position are: one of them, the way to its neighbours (0 where that is the same voxel or
// none), and which of them are there at all.
struct Around {
    i64 first, step_i, step_j, step_k;
    bool low_i, high_i, low_j, high_j, low_k, high_k;
    Vector fractions;
    Vector slope;
};

struct OnAxis {
    int first, step;
    bool low, high;
    Located at;
};

template <bool BORDER> PATCHREG_FN OnAxis find_on_axis(Split position, i64 size) {
    const int n = int(size);
    const Located at = locate<BORDER>(position.index, position.offset, n);
    const int low = neighbour<BORDER>(at.low, n), high = neighbour<BORDER>(at.low + 1, n);
    const int first = low >= 0 ? low : high >= 0 ? high : 0;
    return {first, (low >= 0) & (high >= 0) ? high - low : 0, low >= 0, high >= 0, at};
}

template <bool BORDER> PATCHREG_FN Around find_around(const Lattice& g, const Position& position) {
    const OnAxis i = find_on_axis<BORDER>(position.i, g.image_i), j = find_on_axis<BORDER>(position.j, g.image_j);
    const OnAxis k = find_on_axis<BORDER>(position.k, g.image_k);
    const i64 slice = g.image_j * g.image_k;
    return {i.first * slice + j.first * g.image_k + k.first, i.step * slice, j.step * g.image_k, k.step,
            i.low, i.high, j.low, j.high, k.low, k.high,
            {i.at.fraction, j.at.fraction, k.at.fraction}, {i.at.slope, j.at.slope, k.at.slope}};
}

// Calls body(place, inside) for the eight voxels, in the order of Corners, and collects what it returns.
template <class T, class Body> PATCHREG_FN Corners<T> for_corners(const Around& a, const Body& body) {
    const i64 at00 = a.first, at01 = at00 + a.step_j, at10 = at00 + a.step_i, at11 = at01 + a.step_i, k = a.step_k;
    const bool in00 = a.low_i & a.low_j, in01 = a.low_i & a.high_j, in10 = a.high_i & a.low_j, in11 = a.high_i & a.high_j;
    return {body(at00, in00 & a.low_k), body(at00 + k, in00 & a.high_k), body(at01, in01 & a.low_k),
            body(at01 + k, in01 & a.high_k), body(at10, in10 & a.low_k), body(at10 + k, in10 & a.high_k),
            body(at11, in11 & a.low_k), body(at11 + k, in11 & a.high_k)};
}

// Reads are unconditional, so that all eight are under way together.
template <class T> PATCHREG_FN Corners<float> read_corners(const T* image, const Around& around) {
    return for_corners<float>(around, [=](i64 at, bool inside) {
        const float value = widen(image[at]);
        return inside ? value : 0.0f;
    });
}

// The place of the nearest voxel in the image, negative where there is none.
template <bool BORDER> PATCHREG_FN i64 find_nearest(const Lattice& g, const Position& position) {
    const int size_i = int(g.image_i), size_j = int(g.image_j), size_k = int(g.image_k);
    const i64 i = neighbour<BORDER>(nearest(locate<BORDER>(position.i.index, position.i.offset, size_i)), size_i);
    const i64 j = neighbour<BORDER>(nearest(locate<BORDER>(position.j.index, position.j.offset, size_j)), size_j);
    const i64 k = neighbour<BORDER>(nearest(locate<BORDER>(position.k.index, position.k.offset, size_k)), size_k);
    return (i | j | k) < 0 ? -1 : (i * g.image_j + j) * g.image_k + k;
}

}  // namespace patchreg
