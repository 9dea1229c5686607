// A block of neighbouring output voxels on its way through the sampler: positions, the voxels around them, their values.
#pragma once
#include "memory.h"
#include "sampling.h"
#include "storage.h"
#include "warp.h"

namespace patchreg {
namespace PATCHREG_ISA {

constexpr int LANES = 64;     // voxels of a block at most
constexpr int WHOLE = 16;     // floats of the widest vector: loops run over whole ones
constexpr i64 FAR = 1 << 30;  // from here on a product of two sizes is formed in 64 bits

// Not inlined: a loop that needs its registers for itself.
#define PATCHREG_APART __attribute__((noinline))
#define PATCHREG_ALIGNED __attribute__((aligned(64)))

static inline i64 smaller(i64 a, i64 b) { return a < b ? a : b; }
static inline i64 larger(i64 a, i64 b) { return a > b ? a : b; }

// How the output is divided: bricks are the unit of work, made of whole rows; rows are made of blocks.
struct Shape {
    i64 rows, bricks, brick_rows, blocks, volume, image_volume;  // blocks: of a row

    explicit Shape(const WarpJob& job)
        : rows(job.size[0] * job.size[1]), bricks(warp_bricks(job.size)), brick_rows(warp_rows(job.size)),
          blocks((job.size[2] + LANES - 1) / LANES), volume(rows * job.size[2]),
          image_volume(job.image_size[0] * job.image_size[1] * job.image_size[2]) {}

    // Calls body(row, block) for every block of a brick.
    template <class Body> void for_blocks(i64 brick, const Body& body) const {
        for (i64 row = brick * brick_rows; row < smaller(rows, (brick + 1) * brick_rows); ++row)
            for (i64 block = 0; block < blocks; ++block) body(row, block);
    }
};

// The maps of one batch entry.
struct Maps {
    double affine[3][4];
    float scale[3][3];
};

struct PATCHREG_ALIGNED Block {
    i64 i, j, k, voxel;  // of the first lane; voxel: its place in the volume
    int count, lanes;    // lanes: count, up to whole vectors; the lanes beyond repeat the last voxel
    float displacement[3][LANES], fraction[3][LANES], slope[3][LANES];
    int low[3][LANES];
    i64 offset[LANES];          // of the lowest of the eight voxels where all are inside the image, else negative
    bool run[LANES / WHOLE];  // whether the lanes of a vector see voxels one after the other: where u is small or smooth

    Vector fractions(int lane) const { return {fraction[0][lane], fraction[1][lane], fraction[2][lane]}; }
};

// The eight voxels around every lane, in the order of Corners, those that differ in k side by side.
template <class T> struct PATCHREG_ALIGNED Around {
    T pair[4][2 * LANES];

    Corners<T> at(int lane) const {
        const int l = 2 * lane, h = l + 1;
        return {pair[0][l], pair[0][h], pair[1][l], pair[1][h], pair[2][l], pair[2][h], pair[3][l], pair[3][h]};
    }
};

template <class T> static inline const T* image_of(const WarpJob& job, const Shape& shape, i64 batch) {
    return static_cast<const T*>(job.image) + (job.image_batch == 1 ? 0 : batch) * job.channels * shape.image_volume;
}

static inline Maps read_maps(const WarpJob& job, i64 batch) {
    const double* affine = job.affine + (job.affine_batch == 1 ? 0 : batch) * 12;
    const double* scale = job.scale + (job.scale_batch == 1 ? 0 : batch) * 9;
    Maps maps;
    for (int c = 0; c < 3; ++c) {
        for (int d = 0; d < 4; ++d) maps.affine[c][d] = job.affine ? affine[4 * c + d] : c == d;
        for (int d = 0; d < 3; ++d) maps.scale[c][d] = job.scale ? float(scale[3 * c + d]) : 0.0f;
    }
    return maps;
}

// Whole vectors at a time: what the compiler makes of a plain loop over floats is a call of memcpy, which is slow here.
template <class T> static inline void load_lanes(const T* in, const Block& b, float* out, bool repeat) {
    int start = 0;
    for (; start + WHOLE <= b.count; start += WHOLE) {
        T whole[WHOLE];
        __builtin_memcpy(whole, in + start, sizeof whole);
        PATCHREG_SIMD for (int l = 0; l < WHOLE; ++l) out[start + l] = widen(whole[l]);
    }
    for (int lane = start; lane < b.count; ++lane) out[lane] = widen(in[lane]);
    for (int lane = b.count; lane < b.lanes; ++lane) out[lane] = repeat ? out[b.count - 1] : 0.0f;
}

// The block's part of a volume that begins at element `start`; lanes beyond its end repeat the last voxel, or are zero.
static inline void load(const void* data, int storage, i64 start, const Block& b, float* out, bool repeat = false) {
    const i64 at = start + b.voxel;
    switch (storage) {
        case STORE_HALF: return load_lanes(static_cast<const Half*>(data) + at, b, out, repeat);
        case STORE_BFLOAT16: return load_lanes(static_cast<const BFloat16*>(data) + at, b, out, repeat);
        default: return load_lanes(static_cast<const float*>(data) + at, b, out, repeat);
    }
}

template <class T> static inline void store_lanes(const float* values, const Block& b, T* out) {
    int start = 0;
    for (; start + WHOLE <= b.count; start += WHOLE) {
        T whole[WHOLE];
        PATCHREG_SIMD for (int l = 0; l < WHOLE; ++l) whole[l] = narrow<T>(values[start + l]);
        __builtin_memcpy(out + start, whole, sizeof whole);
    }
    for (int lane = start; lane < b.count; ++lane) out[lane] = narrow<T>(values[lane]);
}

static inline void store(const float* values, const Block& b, void* data, int storage, i64 start) {
    const i64 at = start + b.voxel;
    switch (storage) {
        case STORE_HALF: return store_lanes(values, b, static_cast<Half*>(data) + at);
        case STORE_BFLOAT16: return store_lanes(values, b, static_cast<BFloat16*>(data) + at);
        default: return store_lanes(values, b, static_cast<float*>(data) + at);
    }
}

// The voxels around index + stride * lane + offset(lane) on one axis.
template <bool BORDER, class Offset>
static inline void locate_lanes(Block& b, int axis, i64 size, int index, int stride, const Offset& offset) {
    const int n = int(size), last = b.count - 1;
    PATCHREG_SIMD for (int lane = 0; lane < b.lanes; ++lane) {
        const Located found = locate<BORDER>(index + stride * (lane < last ? lane : last), offset(lane), n);
        b.low[axis][lane] = found.low;
        b.fraction[axis][lane] = found.fraction;
        if (BORDER) b.slope[axis][lane] = found.slope;
    }
}

// A x + t + S u(x). What is the same for all lanes is added up in double, so that large shifts cancel without loss.
template <bool BORDER> static inline void find_positions(const WarpJob& job, const Maps& maps, Block& b) {
    const int last = b.count - 1;
    const float *u = b.displacement[0], *v = b.displacement[1], *w = b.displacement[2];
    for (int axis = 0; axis < 3; ++axis) {
        const double* A = maps.affine[axis];
        const i64 size = job.image_size[axis];
        const Split start = split(A[0] * double(b.i) + A[1] * double(b.j) + A[2] * double(b.k) + A[3], int(size));
        const int stride = whole_part(A[2]);
        const float rest = float(A[2] - stride), step = job.step, *S = maps.scale[axis], *own = b.displacement[axis];
        const auto affine = [=](int lane) { return start.offset + rest * float(lane < last ? lane : last); };
        if (!job.displacement)
            locate_lanes<BORDER>(b, axis, size, start.index, stride, affine);
        else if (job.scale)
            locate_lanes<BORDER>(b, axis, size, start.index, stride, [=](int lane) {
                return affine(lane) + (S[0] * u[lane] + S[1] * v[lane] + S[2] * w[lane]);
            });
        else
            locate_lanes<BORDER>(b, axis, size, start.index, stride,
                                 [=](int lane) { return affine(lane) + step * own[lane]; });
    }
}

static inline void find_offsets(const WarpJob& job, Block& b) {
    const int *i = b.low[0], *j = b.low[1], *k = b.low[2];
    const int ni = int(job.image_size[0]) - 1, nj = int(job.image_size[1]) - 1, nk = int(job.image_size[2]) - 1;
    const i64 row = job.image_size[2], slice = job.image_size[1] * row;
    const auto inside = [=](int lane) {
        return (i[lane] >= 0) & (i[lane] < ni) & (j[lane] >= 0) & (j[lane] < nj) & (k[lane] >= 0) & (k[lane] < nk);
    };
    if (slice < FAR) {
        const int r = int(row), s = int(slice);
        PATCHREG_SIMD for (int lane = 0; lane < b.lanes; ++lane)
            b.offset[lane] = inside(lane) ? i64(i[lane]) * s + (j[lane] * r + k[lane]) : -1;
    } else {
        for (int lane = 0; lane < b.lanes; ++lane)
            b.offset[lane] = inside(lane) ? i[lane] * slice + j[lane] * row + k[lane] : -1;
    }
    for (int start = 0; start < b.lanes; start += WHOLE) {
        const i64* offset = b.offset + start;
        i64 differ = 0;
        PATCHREG_SIMD for (int l = 0; l < WHOLE; ++l) differ |= offset[l] - offset[0] - l;
        b.run[start / WHOLE] = differ == 0 && offset[0] >= 0;
    }
}

// Fills in the block that begins at column `k` of a row: everything that is not the image's values.
template <bool BORDER>
static inline void place(const WarpJob& job, const Maps& maps, i64 batch, i64 row, i64 k, Block& b) {
    const i64 volume = job.size[0] * job.size[1] * job.size[2], first = (job.displacement_batch == 1 ? 0 : batch) * 3;
    b.i = row / job.size[1], b.j = row % job.size[1], b.k = k;
    b.voxel = row * job.size[2] + k;
    b.count = int(smaller(LANES, job.size[2] - k));
    b.lanes = (b.count + WHOLE - 1) / WHOLE * WHOLE;
    if (job.displacement)
        for (int c = 0; c < 3; ++c)
            load(job.displacement, job.displacement_storage, (first + c) * volume, b, b.displacement[c], true);
    find_positions<BORDER>(job, maps, b);
    find_offsets(job, b);
}

// The place of a neighbour in the image, negative where it reads as zero. `corner`: its steps along i, j and k, as bits.
template <bool BORDER> static inline i64 find_neighbour(const WarpJob& job, const Block& b, int lane, int corner) {
    const i64* size = job.image_size;
    const i64 i = neighbour<BORDER>(b.low[0][lane] + (corner >> 2), int(size[0]));
    const i64 j = neighbour<BORDER>(b.low[1][lane] + (corner >> 1 & 1), int(size[1]));
    const i64 k = neighbour<BORDER>(b.low[2][lane] + (corner & 1), int(size[2]));
    return (i | j | k) < 0 ? -1 : (i * size[1] + j) * size[2] + k;
}

template <bool BORDER, class T>
PATCHREG_APART static void gather_edge(const WarpJob& job, const T* image, const Block& b, int lane, Around<T>& around) {
    for (int corner = 0; corner < 8; ++corner) {
        const i64 at = find_neighbour<BORDER>(job, b, lane, corner);
        around.pair[corner / 2][2 * lane + corner % 2] = at < 0 ? T{} : image[at];
    }
}

template <class T> static inline void copy_run(const T* from, T* pair) {
    PATCHREG_SIMD for (int l = 0; l < WHOLE; ++l) pair[2 * l] = from[l], pair[2 * l + 1] = from[l + 1];
}

// Whole vectors where lanes see voxels one after the other, else two neighbouring voxels at a time, in scalar code: faster
// than the gathering instructions of any processor so far.
template <bool BORDER, class T>
PATCHREG_APART static void gather(const WarpJob& job, const T* image, const Block& b, Around<T>& around) {
    const i64 row = job.image_size[2], slice = job.image_size[1] * row;
    const T *at00 = image, *at01 = image + row, *at10 = image + slice, *at11 = image + slice + row;
    auto& [pair00, pair01, pair10, pair11] = around.pair;
    for (int start = 0; start < b.lanes; start += WHOLE) {
        // The slice after next is fetched meanwhile: what misses the caches is the first touch of a slice.
        const i64 first = b.offset[start];
        if (first >= 0) __builtin_prefetch(at10 + 2 * slice + first, 0, 1);
        if (b.run[start / WHOLE]) {
            copy_run(at00 + first, pair00 + 2 * start), copy_run(at01 + first, pair01 + 2 * start);
            copy_run(at10 + first, pair10 + 2 * start), copy_run(at11 + first, pair11 + 2 * start);
            continue;
        }
        for (int lane = start; lane < start + WHOLE; ++lane) {
            const i64 offset = b.offset[lane];
            if (offset < 0) {
                gather_edge<BORDER>(job, image, b, lane, around);
                continue;
            }
            __builtin_memcpy(pair00 + 2 * lane, at00 + offset, 2 * sizeof(T));
            __builtin_memcpy(pair01 + 2 * lane, at01 + offset, 2 * sizeof(T));
            __builtin_memcpy(pair10 + 2 * lane, at10 + offset, 2 * sizeof(T));
            __builtin_memcpy(pair11 + 2 * lane, at11 + offset, 2 * sizeof(T));
        }
    }
}

}  // namespace PATCHREG_ISA
}  // namespace patchreg
