// Sampling an image at A x + t + S u(x), and the exact gradients to the image, to u, and to A, t and S.
#include "warp_tile.h"

namespace patchreg {

template <class Image, class Field, class Out, bool BORDER, bool MAPS>
__global__ void __launch_bounds__(THREADS, 4)
    warp_forward(const Image* image, const Field* displacement, Out* out, PATCHREG_LATTICE, float gain, i64 adds) {
    const Lattice g PATCHREG_LATTICE_VALUES;
    __shared__ Maps maps;
    Place p = find_place<1>(g);
    if constexpr (MAPS) read_maps(maps, g, p, p.batch);
    move_to_round(p, g, 0);
    if (!p.there) return;
    const Vector u = read_displacement(displacement, g, p, p.batch);
    const Around around = find_around<BORDER>(g, find_position<MAPS>(maps, g, p, u));
    image += p.batch * g.image_stride;
    out += p.batch * g.channels * voxels_of(g) + p.voxel;
#pragma unroll 1
    for (i64 c = 0; c < g.channels; ++c) {
        float value = gain * interpolate(read_corners(image + c * image_voxels_of(g), around), around.fractions);
        if (adds) value += gain * component(u, c);
        out[c * voxels_of(g)] = narrow<Out>(value);
    }
}

// Nearest sampling, or the vote of the eight neighbours, of words that are copied as they are.
template <class Word, class Field, bool BORDER, bool MAPS, bool NEAREST>
__global__ void __launch_bounds__(THREADS, NEAREST ? 6 : 3)
    warp_words(const Word* image, const Field* displacement, Word* out, PATCHREG_LATTICE, i64 infinity) {
    const Lattice g PATCHREG_LATTICE_VALUES;
    __shared__ Maps maps;
    Place p = find_place<1>(g);
    if constexpr (MAPS) read_maps(maps, g, p, p.batch);
    move_to_round(p, g, 0);
    if (!p.there) return;
    const Position position = find_position<MAPS>(maps, g, p, read_displacement(displacement, g, p, p.batch));
    image += p.batch * g.image_stride;
    out += p.batch * g.channels * voxels_of(g) + p.voxel;
    if constexpr (NEAREST) {
        const i64 at = find_nearest<BORDER>(g, position);
        for (i64 c = 0; c < g.channels; ++c)
            out[c * voxels_of(g)] = at < 0 ? Word(0) : image[c * image_voxels_of(g) + at];
    } else {
        const Around around = find_around<BORDER>(g, position);
#pragma unroll 1
        for (i64 c = 0; c < g.channels; ++c) {
            const Word* channel = image + c * image_voxels_of(g);
            const auto read = [=](i64 at, bool inside) { return inside ? channel[at] : Word(0); };
            out[c * voxels_of(g)] = elect(for_corners<Word>(around, read), around.fractions, Word(infinity));
        }
    }
}

constexpr int TO_IMAGE = 1, TO_DISPLACEMENT = 2, TO_MAPS = 4;  // gradients that are wanted
constexpr int ROUNDS = 8;  // tiles along i that a block takes one after another where it forms sums
constexpr int SUMS = 21;   // numbers that the gradient to the maps is made of: 12 for [A | t], row by row, then 9 for S

PATCHREG_FN bool is_whole(const Around& a) { return (a.step_i != 0) & (a.step_j != 0) & (a.step_k != 0); }

// Adds what the eight voxels get. Where the next lane's voxels are the next ones, the pairs that both lanes give to are
// added up first, which halves the number of atomic additions. All lanes of a warp must call it.
PATCHREG_FN void scatter(float* grad, const Around& around, Corners<float> share, bool there) {
    const i64 own = there & is_whole(around) ? around.first : -2;
    const i64 left = __shfl_up_sync(WHOLE_WARP, own, 1), right = __shfl_down_sync(WHOLE_WARP, own, 1);
    const int lane = thread_in_block() % 32;
    const bool takes = (lane > 0) & (own >= 0) & (left + 1 == own), gives = (lane < 31) & (own >= 0) & (right == own + 1);
    const float from00 = __shfl_up_sync(WHOLE_WARP, share.at001, 1), from01 = __shfl_up_sync(WHOLE_WARP, share.at011, 1);
    const float from10 = __shfl_up_sync(WHOLE_WARP, share.at101, 1), from11 = __shfl_up_sync(WHOLE_WARP, share.at111, 1);
    if (takes) share.at000 += from00, share.at010 += from01, share.at100 += from10, share.at110 += from11;
    if (!there) return;
    const i64 at00 = around.first, at01 = at00 + around.step_j, at10 = at00 + around.step_i, at11 = at01 + around.step_i;
    const i64 k = around.step_k;
    const auto put = [=](i64 at, bool inside, float value) {
        if (inside) atomicAdd(grad + at, value);
    };
    const bool in00 = around.low_i & around.low_j, in01 = around.low_i & around.high_j;
    const bool in10 = around.high_i & around.low_j, in11 = around.high_i & around.high_j;
    const bool low = around.low_k, high = around.high_k & !gives;
    put(at00, in00 & low, share.at000), put(at00 + k, in00 & high, share.at001);
    put(at01, in01 & low, share.at010), put(at01 + k, in01 & high, share.at011);
    put(at10, in10 & low, share.at100), put(at10 + k, in10 & high, share.at101);
    put(at11, in11 & low, share.at110), put(at11 + k, in11 & high, share.at111);
}

PATCHREG_FN Corners<float> multiply_all(float factor, const Corners<float>& c) {
    return {factor * c.at000, factor * c.at001, factor * c.at010, factor * c.at011,
            factor * c.at100, factor * c.at101, factor * c.at110, factor * c.at111};
}

// A gradient is stored, or added where others may add to the same place: to an image that is the displacement as well.
PATCHREG_FN void put(float* place, float value, bool adds) {
    if (adds) atomicAdd(place, value);
    else *place = value;
}
template <class T> PATCHREG_FN void put(T* place, float value, bool) { *place = narrow<T>(value); }

// A thread's part of the gradient to the maps: sums of d(loss) / d(position), times the steps along i, and times u.
struct MapSums {
    Vector force, force_i, i_by_u, j_by_u, k_by_u;
};

PATCHREG_FN void add_to_sums(MapSums& sums, const Place& p, Vector force, Vector u) {
    sums.force = add(sums.force, force);
    sums.force_i = add(sums.force_i, multiply(float(p.step_i), force));
    sums.i_by_u = add(sums.i_by_u, multiply(force.i, u));
    sums.j_by_u = add(sums.j_by_u, multiply(force.j, u));
    sums.k_by_u = add(sums.k_by_u, multiply(force.k, u));
}

// The block's part, always added in the same order. All threads must call it.
PATCHREG_FN void write_sums(const MapSums& sums, const Lattice& g, const Place& p, double* out) {
    const bool first = thread_in_block() == 0;
    const double i = double(p.i), j = double(p.j + p.step_j), k = double(p.k + p.step_k);
    for (int c = 0; c < 3; ++c) {
        const double force = component(sums.force, c);
        const double terms[4] = {i * force + component(sums.force_i, c), j * force, k * force, force};
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const double sum = block_sum<THREADS>(terms[n]);
            if (first) out[4 * c + n] = sum;
        }
    }
    if (g.scale == nullptr) return;
    for (int c = 0; c < 9; ++c) {
        const Vector by_u = c < 3 ? sums.i_by_u : c < 6 ? sums.j_by_u : sums.k_by_u;
        const double sum = block_sum<THREADS>(double(component(by_u, c % 3)));
        if (first) out[12 + c] = sum;
    }
}

// What a voxel gets back: d(loss) / d(position), and what comes straight through to u.
struct Returned {
    Vector force, direct;
};

// For one voxel of one batch entry: adds to the image's gradient, and returns the rest.
template <int WANTED, class Image, class Up>
PATCHREG_FN Returned differentiate(const Image* image, const Up* upstream, float* grad_image, const Lattice& g,
                                   const Place& p, i64 batch, const Around& around, float gain, bool adds) {
    Returned back{{0.0f, 0.0f, 0.0f}, {0.0f, 0.0f, 0.0f}};
    const Corners<float> weight = weigh(around.fractions);
#pragma unroll 1
    for (i64 c = 0; c < g.channels; ++c) {
        const i64 channel = batch * g.image_stride + c * image_voxels_of(g);
        const float up = p.there ? gain * widen(upstream[(batch * g.channels + c) * voxels_of(g) + p.voxel]) : 0.0f;
        if constexpr ((WANTED & (TO_DISPLACEMENT | TO_MAPS)) != 0) {
            const Vector slope = derive(read_corners(image + channel, around), around.fractions);
            back.force = add(back.force, multiply(up, slope));
            if (adds) back.direct = add(back.direct, {c == 0 ? up : 0.0f, c == 1 ? up : 0.0f, c == 2 ? up : 0.0f});
        }
        if constexpr ((WANTED & TO_IMAGE) != 0) scatter(grad_image + channel, around, multiply_all(up, weight), p.there);
    }
    const Vector slope = around.slope;
    back.force = {back.force.i * slope.i, back.force.j * slope.j, back.force.k * slope.k};
    if (!p.there) back.force = {0.0f, 0.0f, 0.0f};  // and no NaN of the voxel that was read instead
    return back;
}

// Blocks on a multiprocessor at a time, as many as have registers enough for everything.
constexpr int resident_blocks(int wanted) { return (wanted & TO_MAPS) != 0 ? 2 : 3; }

// `entries`: batch entries that a block takes one after another, where the batch shares a displacement whose gradient is
// wanted; else 1, as it must be with TO_MAPS.
template <class Image, class Field, class Up, class Grad, bool BORDER, bool MAPS, int WANTED>
__global__ void __launch_bounds__(THREADS, resident_blocks(WANTED))
    warp_backward(const Image* image, const Field* displacement, const Up* upstream, float* grad_image,
                  Grad* grad_displacement, double* sums, PATCHREG_LATTICE, float gain, i64 adds, i64 entries) {
    const Lattice g PATCHREG_LATTICE_VALUES;
    constexpr int rounds = (WANTED & TO_MAPS) != 0 ? ROUNDS : 1;
    const bool shared = static_cast<const void*>(grad_image) == static_cast<const void*>(grad_displacement);
    __shared__ Maps maps;
    Place p = find_place<rounds>(g);
    MapSums part{};
    for (int round = 0; round < rounds; ++round) {
        move_to_round(p, g, round);
        Vector total{0.0f, 0.0f, 0.0f};
        for (i64 batch = p.batch; batch < p.batch + entries; ++batch) {
            if constexpr (MAPS)
                if (round == 0 || entries > 1) read_maps(maps, g, p, batch);
            const Vector u = read_displacement(displacement, g, p, batch);
            const Around around = find_around<BORDER>(g, find_position<MAPS>(maps, g, p, u));
            const Returned back =
                differentiate<WANTED>(image, upstream, grad_image, g, p, batch, around, gain, adds != 0);
            const bool mixes = MAPS && g.scale;
            const Vector pulled = mixes ? multiply_transposed(maps.scale, back.force) : multiply(g.step, back.force);
            total = add(total, add(pulled, back.direct));
            if constexpr ((WANTED & TO_MAPS) != 0) add_to_sums(part, p, back.force, u);
        }
        if constexpr ((WANTED & TO_DISPLACEMENT) != 0) {
            Grad* out = grad_displacement + p.batch * g.displacement_stride + p.voxel;
            if (p.there)
                for (int c = 0; c < 3; ++c) put(out + c * voxels_of(g), component(total, c), shared);
        }
    }
    if constexpr ((WANTED & TO_MAPS) != 0) write_sums(part, g, p, sums + i64(blockIdx.x) * SUMS);
}

// Nearest sampling gives all of the gradient to one voxel.
template <class Field, class Up, bool BORDER, bool MAPS>
__global__ void __launch_bounds__(THREADS)
    warp_nearest_backward(const Field* displacement, const Up* upstream, float* grad_image, PATCHREG_LATTICE) {
    const Lattice g PATCHREG_LATTICE_VALUES;
    __shared__ Maps maps;
    Place p = find_place<1>(g);
    if constexpr (MAPS) read_maps(maps, g, p, p.batch);
    move_to_round(p, g, 0);
    if (!p.there) return;
    const Vector u = read_displacement(displacement, g, p, p.batch);
    const i64 at = find_nearest<BORDER>(g, find_position<MAPS>(maps, g, p, u));
    if (at < 0) return;
    upstream += p.batch * g.channels * voxels_of(g) + p.voxel;
    grad_image += p.batch * g.image_stride + at;
    for (i64 c = 0; c < g.channels; ++c)
        atomicAdd(grad_image + c * image_voxels_of(g), widen(upstream[c * voxels_of(g)]));
}

}  // namespace patchreg
