// Where a position lies between voxels, and what an image is there: linear, nearest and label interpolation of one
// voxel, and the derivative of the linear one. Axes are (i, j, k), of which k is contiguous; voxel centres lie at whole
// numbers.
#pragma once
#include "portable.h"

namespace patchreg {

// The voxel at or below a position on one axis, and how far above it the position is.
struct Located {
    int low;         // BORDER: 0..size-1, else -2..size+1: neighbours outside the axis read as zero
    float fraction;  // NaN where the position is
    float slope;     // d(position that is used) / d(position): 0 where BORDER has clamped it, else 1
};

// The position is index + offset: a float that held both would spend its digits on the voxels' numbers. Sizes are below
// 2^23, and indices not much larger, so that floats hold their differences exactly.
// Any offset is safe: NaN lies at the lower end, and what is far outside is drawn near before it becomes an integer.
template <bool BORDER> PATCHREG_FN Located locate(int index, float offset, int size) {
    const float least = float((BORDER ? 0 : -2) - index), most = float((BORDER ? size - 1 : size + 1) - index);
    float used = offset > least ? offset : least;
    used = used < most ? used : most;
    int low = int(used);
    low -= float(low) > used ? 1 : 0;
    const float fraction = offset == offset ? used - float(low) : offset;
    const bool moves = !BORDER || ((offset > least) & (offset < most));
    return {index + low, fraction, moves ? 1.0f : 0.0f};
}

// A position as index + offset, the index inside the axis.
struct Split {
    int index;
    float offset;
};

PATCHREG_FN Split split(double position, int size) {
    const int index = position >= size - 1 ? size - 1 : position >= 0 ? int(position) : 0;
    return {index, float(position - double(index))};
}

// The whole part of a step, by which the index grows; the rest is left to the offset.
PATCHREG_FN int whole_part(double step) {
    if (!(step > -8 && step < 8)) return 0;
    return int(step < 0 ? step - 0.5 : step + 0.5);
}

// The voxel nearest to a position; of two the even one, as IEEE 754 rounds.
PATCHREG_FN int nearest(Located at) {
    const bool up = (at.fraction > 0.5f) | ((at.fraction == 0.5f) & ((at.low & 1) != 0));
    return at.low + (up ? 1 : 0);
}

// The voxel to read for `index`: itself or, with BORDER, the last one; negative where there is none.
template <bool BORDER> PATCHREG_FN int neighbour(int index, int size) {
    if (BORDER) return index < size ? index : size - 1;
    return (index >= 0) & (index < size) ? index : -1;
}

// Something of the eight voxels around a position; the name of a member is its step along (i, j, k).
template <class T> struct Corners {
    T at000, at001, at010, at011, at100, at101, at110, at111;
};

// Along (i, j, k).
struct Vector {
    float i, j, k;
};

PATCHREG_FN float blend(float low, float high, float fraction) { return low + fraction * (high - low); }

PATCHREG_FN float interpolate(const Corners<float>& image, Vector f) {
    return blend(blend(blend(image.at000, image.at001, f.k), blend(image.at010, image.at011, f.k), f.j),
                 blend(blend(image.at100, image.at101, f.k), blend(image.at110, image.at111, f.k), f.j), f.i);
}

// The derivative of interpolate() to the position.
PATCHREG_FN Vector derive(const Corners<float>& image, Vector f) {
    const float line00 = blend(image.at000, image.at001, f.k), line01 = blend(image.at010, image.at011, f.k);
    const float line10 = blend(image.at100, image.at101, f.k), line11 = blend(image.at110, image.at111, f.k);
    const float step00 = image.at001 - image.at000, step01 = image.at011 - image.at010;
    const float step10 = image.at101 - image.at100, step11 = image.at111 - image.at110;
    return {blend(line10, line11, f.j) - blend(line00, line01, f.j), blend(line01 - line00, line11 - line10, f.i),
            blend(blend(step00, step01, f.j), blend(step10, step11, f.j), f.i)};
}

// The linear weights of the eight voxels: the derivative of interpolate() to each of them.
PATCHREG_FN Corners<float> weigh(Vector f) {
    const float i0 = 1.0f - f.i, j0 = 1.0f - f.j, k0 = 1.0f - f.k;
    const float at00 = i0 * j0, at01 = i0 * f.j, at10 = f.i * j0, at11 = f.i * f.j;
    return {at00 * k0, at00 * f.k, at01 * k0, at01 * f.k, at10 * k0, at10 * f.k, at11 * k0, at11 * f.k};
}

// Labels may be floats, `infinity` being the bits of that number (0 for integers): then both zeros are one label, and a
// NaN, which equals nothing, has no weight.
template <class Word> PATCHREG_FN Word magnitude(Word label) { return label & Word(Word(~Word(0)) >> 1); }

template <class Word> PATCHREG_FN Word canonical(Word label, Word infinity) {
    return (infinity != 0) & (magnitude(label) == 0) ? Word(0) : label;
}

template <class Word> PATCHREG_FN float entitled(Word label, float weight, Word infinity) {
    return (infinity != 0) & (magnitude(label) > infinity) ? 0.0f : weight;
}

template <class Word> PATCHREG_FN Corners<Word> canonical(const Corners<Word>& c, Word infinity) {
    return {canonical(c.at000, infinity), canonical(c.at001, infinity), canonical(c.at010, infinity),
            canonical(c.at011, infinity), canonical(c.at100, infinity), canonical(c.at101, infinity),
            canonical(c.at110, infinity), canonical(c.at111, infinity)};
}

template <class Word>
PATCHREG_FN Corners<float> entitled(const Corners<Word>& c, const Corners<float>& w, Word infinity) {
    return {entitled(c.at000, w.at000, infinity), entitled(c.at001, w.at001, infinity),
            entitled(c.at010, w.at010, infinity), entitled(c.at011, w.at011, infinity),
            entitled(c.at100, w.at100, infinity), entitled(c.at101, w.at101, infinity),
            entitled(c.at110, w.at110, infinity), entitled(c.at111, w.at111, infinity)};
}

template <class Word>
PATCHREG_FN float count_votes(const Corners<Word>& label, const Corners<float>& weight, Word wanted) {
    float votes = label.at000 == wanted ? weight.at000 : 0.0f;
    votes += label.at001 == wanted ? weight.at001 : 0.0f;
    votes += label.at010 == wanted ? weight.at010 : 0.0f;
    votes += label.at011 == wanted ? weight.at011 : 0.0f;
    votes += label.at100 == wanted ? weight.at100 : 0.0f;
    votes += label.at101 == wanted ? weight.at101 : 0.0f;
    votes += label.at110 == wanted ? weight.at110 : 0.0f;
    votes += label.at111 == wanted ? weight.at111 : 0.0f;
    return votes;
}

template <class Word> struct Leader {
    Word label;
    float votes;
};

template <class Word>
PATCHREG_FN Leader<Word> challenge(Leader<Word> leader, const Corners<Word>& label, const Corners<float>& weight,
                                   Word by) {
    const float votes = count_votes(label, weight, by);
    return {votes > leader.votes ? by : leader.label, votes > leader.votes ? votes : leader.votes};
}

PATCHREG_FN float zero_for_nan(float x) { return x == x ? x : 0.0f; }

// The label with the largest sum of linear weights; of several the first.
template <class Word> PATCHREG_FN Word elect(const Corners<Word>& found, Vector f, Word infinity) {
    const Corners<Word> label = canonical(found, infinity);
    const Corners<float> linear = weigh({zero_for_nan(f.i), zero_for_nan(f.j), zero_for_nan(f.k)});
    const Corners<float> weight = entitled(found, linear, infinity);
    Leader<Word> leader{label.at000, 0.0f};
    leader = challenge(leader, label, weight, label.at000);
    leader = challenge(leader, label, weight, label.at001);
    leader = challenge(leader, label, weight, label.at010);
    leader = challenge(leader, label, weight, label.at011);
    leader = challenge(leader, label, weight, label.at100);
    leader = challenge(leader, label, weight, label.at101);
    leader = challenge(leader, label, weight, label.at110);
    leader = challenge(leader, label, weight, label.at111);
    return leader.label;
}

}  // namespace patchreg
