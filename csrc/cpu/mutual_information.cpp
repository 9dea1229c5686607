#include "mutual_information.h"

#include "../common/information.h"
#include "../common/parzen.h"
#include "memory.h"
#include "storage.h"

namespace patchreg {
namespace PATCHREG_ISA {

// Voxels are shared out in parts that depend on the volume and the bins alone, each with a histogram of its own, and
// these are added in their order: the result is the same for any number of threads. Within a part, a chunk of voxels is
// first mapped to bins and weights, which vectorises over voxels, and then added up, which vectorises over bins.

constexpr int CHUNK = 128;              // voxels whose weights stay in the first-level cache
constexpr i64 PART_VOXELS = 1 << 16;    // at least, in a part of several
constexpr i64 MOST_PARTS = 64;
constexpr double LEAST_COUNT = 1e-300;  // whose logarithm stands for that of an empty bin

static inline i64 smaller(i64 a, i64 b) { return a < b ? a : b; }
static inline i64 larger(i64 a, i64 b) { return a > b ? a : b; }

struct Parts {
    i64 voxels, count;

    // The histograms of all parts together take an eighth of a float32 volume at most.
    Parts(i64 voxels, i64 pairs, int bins) : voxels(voxels) {
        const i64 least = larger(PART_VOXELS, i64(16) * bins * bins);
        count = larger(1, smaller(voxels / least, MOST_PARTS / pairs));
    }
    i64 begin(i64 part) const { return voxels / count * part + smaller(part, voxels % count); }
    i64 end(i64 part) const { return begin(part + 1); }
};

// Calls body(T{}) for the type that a storage code stands for.
template <class Body> static inline void with_storage(int storage, const Body& body) {
    switch (storage) {
        case STORE_HALF: return body(Half{});
        case STORE_BFLOAT16: return body(BFloat16{});
        default: return body(0.0f);
    }
}

// One number for each of TAPS neighbouring bins; in memory they need no alignment.
template <class Real, int TAPS> struct Neighbours {
    typedef Real Vector __attribute__((vector_size(sizeof(Real) * TAPS), aligned(sizeof(Real))));
};

// From intensities to places among the bins.
struct Scale {
    double low, high, bins_per_unit, last_place;

    Scale(const double* range, int bins) : low(range[0]), high(range[1]), last_place(bins - 3) {
        const double span = high - low;
        bins_per_unit = span == 0 ? 0 : last_place / span;  // one intensity only: one place, and no slope
    }
};

// The first bin of each voxel, and its offset from it; NaN stays NaN.
template <int TAPS, class T, class Real>
static inline void locate(const T* x, i64 n, const Scale& scale, int bins, int* first, Real* offset) {
    PATCHREG_SIMD for (i64 v = 0; v < n; ++v) {
        const double place = (double(widen(x[v])) - scale.low) * scale.bins_per_unit;
        const double above = place > 0 ? place : 0, inside = above < scale.last_place ? above : scale.last_place;
        first[v] = first_bin<TAPS>(inside, bins);
        offset[v] = Real((place == place ? inside : place) - first[v]);
    }
}

template <class T> static inline void read_weights(const T* weight, i64 n, float* out) {
    PATCHREG_SIMD for (i64 v = 0; v < n; ++v) {
        const float w = widen(weight[v]);
        out[v] = w > 0 ? w : 0;
    }
}

// Adds chunk after chunk of voxels to a joint histogram.
template <int TAPS> struct Adder {
    using Vector = typename Neighbours<double, TAPS>::Vector;

    int bins;
    Scale fixed, moving;
    // Two histograms take turns: a voxel need not wait for what its neighbour has just written to the same bins.
    Scratch<double> histograms;
    int row[CHUNK], column[CHUNK];
    double row_offset[CHUNK], column_offset[CHUNK];
    double of_row[TAPS][CHUNK];
    double of_column[CHUNK][TAPS];

    Adder(const double* ranges, int bins)
        : bins(bins), fixed(ranges, bins), moving(ranges + 2, bins), histograms(2 * i64(bins) * bins) {}

    template <class T> void add(const T* I, const T* J, const T* weight, i64 n) {
        locate<TAPS>(I, n, fixed, bins, row, row_offset);
        locate<TAPS>(J, n, moving, bins, column, column_offset);
        PATCHREG_SIMD for (i64 v = 0; v < n; ++v) {
            double each[TAPS];
            parzen_weights<TAPS>(row_offset[v], each);
            for (int a = 0; a < TAPS; ++a) of_row[a][v] = each[a];
        }
        PATCHREG_SIMD for (i64 v = 0; v < n; ++v) parzen_weights<TAPS>(column_offset[v], of_column[v]);
        if (weight != nullptr) {
            float factor[CHUNK];
            read_weights(weight, n, factor);
            for (int a = 0; a < TAPS; ++a)
                PATCHREG_SIMD for (i64 v = 0; v < n; ++v) of_row[a][v] *= factor[v];
        }
        double *even = histograms, *odd = even + i64(bins) * bins;
        for (i64 v = 0; v + 1 < n; v += 2) {
            add_voxel(v, even);
            add_voxel(v + 1, odd);
        }
        if (n % 2 != 0) add_voxel(n - 1, even);
    }

    inline __attribute__((always_inline)) void add_voxel(i64 v, double* histogram) {
        const Vector columns = *reinterpret_cast<const Vector*>(of_column[v]);
        double* corner = histogram + row[v] * bins + column[v];
        for (int a = 0; a < TAPS; ++a) *reinterpret_cast<Vector*>(corner + a * bins) += of_row[a][v] * columns;
    }

    void store(double* out) const {
        const i64 size = i64(bins) * bins;
        PATCHREG_SIMD for (i64 b = 0; b < size; ++b) out[b] = histograms[b] + histograms[size + b];
    }
};

template <class T> static const T* weight_of(const void* weight, bool of_batch, i64 batch, i64 voxels) {
    if (weight == nullptr) return nullptr;
    return static_cast<const T*>(weight) + (of_batch ? batch * voxels : 0);
}

template <int TAPS, class T>
static void add_part(const MutualInformationJob& job, i64 pair, i64 begin, i64 end, double* histogram) {
    const T *I = static_cast<const T*>(job.fixed) + pair * job.voxels;
    const T *J = static_cast<const T*>(job.moving) + pair * job.voxels;
    const T* weight = weight_of<T>(job.weight, job.weight_of_batch, pair / job.channels, job.voxels);
    Adder<TAPS> adder(job.ranges + 4 * pair, job.bins);
    for (i64 start = begin; start < end; start += CHUNK)
        adder.add(I + start, J + start, weight ? weight + start : nullptr, smaller(CHUNK, end - start));
    adder.store(histogram);
}

template <class T> static void find_range(const T* x, i64 n, double* range) {
    constexpr int WIDTH = 64;  // partial results, so that the loop vectorises
    float low[WIDTH], high[WIDTH];
    for (int k = 0; k < WIDTH; ++k) low[k] = high[k] = widen(x[0]);
    for (i64 start = 0; start < n; start += WIDTH) {
        const i64 count = smaller(WIDTH, n - start);
        PATCHREG_SIMD for (i64 k = 0; k < count; ++k) {
            const float value = widen(x[start + k]);
            low[k] = value < low[k] ? value : low[k];
            high[k] = value > high[k] ? value : high[k];
        }
    }
    range[0] = low[0], range[1] = high[0];
    for (int k = 1; k < WIDTH; ++k) {
        if (low[k] < range[0]) range[0] = low[k];
        if (high[k] > range[1]) range[1] = high[k];
    }
}

// Fills in the ranges that were not given.
static void measure_ranges(const MutualInformationJob& job, const Parts& parts, const Parallel& pool) {
    Scratch<double> found(job.pairs * 2 * parts.count * 2, false);
    const auto wanted = [&](i64 image) { return job.ranges[2 * image] != job.ranges[2 * image]; };
    for_each(pool, job.pairs * 2 * parts.count, [&](i64 item, int) {
        const i64 image = item / parts.count, begin = parts.begin(item % parts.count);
        if (!wanted(image)) return;
        with_storage(job.storage, [&](auto zero) {
            using T = decltype(zero);
            const T* x = static_cast<const T*>(image % 2 == 0 ? job.fixed : job.moving) + image / 2 * job.voxels;
            find_range(x + begin, parts.end(item % parts.count) - begin, found + 2 * item);
        });
    });
    for (i64 image = 0; image < 2 * job.pairs; ++image) {
        if (!wanted(image)) continue;
        double *range = job.ranges + 2 * image, *of_part = found + 2 * parts.count * image;
        range[0] = of_part[0], range[1] = of_part[1];
        for (i64 part = 1; part < parts.count; ++part) {
            if (of_part[2 * part] < range[0]) range[0] = of_part[2 * part];
            if (of_part[2 * part + 1] > range[1]) range[1] = of_part[2 * part + 1];
        }
    }
}

// The value and its slopes from a histogram.
static float evaluate(const double* histogram, int bins, bool normalized, float* slopes) {
    Scratch<double> logs(2 * bins);  // of the sums of rows, then of columns
    double total = 0;
    for (int i = 0; i < bins; ++i)
        for (int j = 0; j < bins; ++j) {
            const double count = histogram[i64(i) * bins + j];
            logs[i] += count, logs[bins + j] += count, total += count;
        }
    for (int k = 0; k < 2 * bins; ++k) logs[k] = log_count(logs[k], LEAST_COUNT);
    const double log_total = log_count(total, LEAST_COUNT);
    Entropies sum{0, 0};
    for (int i = 0; i < bins; ++i)
        for (int j = 0; j < bins; ++j) {
            const double count = histogram[i64(i) * bins + j];
            const Entropies each =
                entropies_of(count, total, log_count(count, LEAST_COUNT), logs[i], logs[bins + j], log_total);
            sum.joint += each.joint, sum.separate += each.separate;
        }
    const double value = information_of(sum, total, normalized);
    for (int i = 0; i < bins; ++i)
        for (int j = 0; j < bins; ++j) {
            const i64 bin = i64(i) * bins + j;
            slopes[bin] = float(information_slope(sum, value, total, normalized, log_count(histogram[bin], LEAST_COUNT),
                                                  logs[i], logs[bins + j], log_total));
        }
    return float(value);
}

void mutual_information(const MutualInformationJob& job, const Parallel& pool) {
    const Parts parts(job.voxels, job.pairs, job.bins);
    const i64 size = i64(job.bins) * job.bins;
    measure_ranges(job, parts, pool);
    Scratch<double> histograms(job.pairs * parts.count * size, false);
    for_each(pool, job.pairs * parts.count, [&](i64 item, int) {
        const i64 pair = item / parts.count, begin = parts.begin(item % parts.count);
        const i64 end = parts.end(item % parts.count);
        with_storage(job.storage, [&](auto zero) {
            using T = decltype(zero);
            const auto add = job.gaussian ? add_part<GAUSSIAN, T> : add_part<BSPLINE, T>;
            add(job, pair, begin, end, histograms + item * size);
        });
    });
    for_each(pool, job.pairs, [&](i64 pair, int) {
        double* sum = histograms + pair * parts.count * size;
        for (i64 part = 1; part < parts.count; ++part)
            PATCHREG_SIMD for (i64 bin = 0; bin < size; ++bin) sum[bin] += sum[part * size + bin];
        job.values[pair] = evaluate(sum, job.bins, job.normalized, job.slopes + pair * size);
    });
}

// Gathers the gradient of chunk after chunk of voxels from the slopes of the histogram.
template <int TAPS> struct Gatherer {
    using Vector = typename Neighbours<float, TAPS>::Vector;

    struct Image {
        int first[CHUNK];
        float offset[CHUNK];
        float weight[CHUNK][TAPS], slope[CHUNK][TAPS];
    };
    const float* slopes;
    int bins;
    Scale fixed, moving;
    Image of_fixed, of_moving;
    float to_fixed[CHUNK], to_moving[CHUNK];

    Gatherer(const double* ranges, const float* slopes, int bins)
        : slopes(slopes), bins(bins), fixed(ranges, bins), moving(ranges + 2, bins) {}

    template <class T> void prepare(const T* x, i64 n, const Scale& scale, Image& image) {
        locate<TAPS>(x, n, scale, bins, image.first, image.offset);
        PATCHREG_SIMD for (i64 v = 0; v < n; ++v) {
            parzen_weights<TAPS>(image.offset[v], image.weight[v]);
            parzen_slopes<TAPS>(image.offset[v], image.weight[v], image.slope[v]);
        }
    }

    template <class T> void gather(const T* I, const T* J, i64 n) {
        prepare(I, n, fixed, of_fixed);
        prepare(J, n, moving, of_moving);
        for (i64 v = 0; v < n; ++v) {
            const float *weight = of_fixed.weight[v], *slope = of_fixed.slope[v];
            const float* corner = slopes + of_fixed.first[v] * bins + of_moving.first[v];
            Vector weighted = {}, sloped = {};
            for (int a = 0; a < TAPS; ++a) {
                const Vector row = *reinterpret_cast<const Vector*>(corner + a * bins);
                weighted += weight[a] * row;
                sloped += slope[a] * row;
            }
            sloped *= *reinterpret_cast<const Vector*>(of_moving.weight[v]);
            weighted *= *reinterpret_cast<const Vector*>(of_moving.slope[v]);
            to_fixed[v] = sum(sloped), to_moving[v] = sum(weighted);
        }
    }

    static inline __attribute__((always_inline)) float sum(const Vector& x) {
        float total = (x[0] + x[1]) + (x[2] + x[3]);
        if constexpr (TAPS == 8) total += (x[4] + x[5]) + (x[6] + x[7]);
        return total;
    }
};

// Outside its range an image has no gradient; at the ends it has.
template <class T>
static void write_gradient(const float* of_place, const T* x, const T* weight, i64 n, const Scale& scale, float upstream,
                           T* out) {
    const float factor = float(upstream * scale.bins_per_unit);
    float weights[CHUNK];
    if (weight != nullptr)
        read_weights(weight, n, weights);
    else
        for (i64 v = 0; v < n; ++v) weights[v] = 1;
    PATCHREG_SIMD for (i64 v = 0; v < n; ++v) {
        const double value = widen(x[v]);
        const bool outside = (value < scale.low) | (value > scale.high);
        out[v] = narrow<T>(outside ? 0.0f : factor * weights[v] * of_place[v]);
    }
}

template <int TAPS, class T>
static void gather_part(const MutualInformationBackwardJob& job, i64 pair, i64 begin, i64 end) {
    const i64 at = pair * job.voxels;
    const T *I = static_cast<const T*>(job.fixed) + at, *J = static_cast<const T*>(job.moving) + at;
    const T* weight = weight_of<T>(job.weight, job.weight_of_batch, pair / job.channels, job.voxels);
    T *grad_fixed = static_cast<T*>(job.grad_fixed), *grad_moving = static_cast<T*>(job.grad_moving);
    Gatherer<TAPS> chunk(job.ranges + 4 * pair, job.slopes + pair * job.bins * job.bins, job.bins);
    for (i64 v = begin; v < end; v += CHUNK) {
        const i64 n = smaller(CHUNK, end - v);
        const T* w = weight ? weight + v : nullptr;
        chunk.gather(I + v, J + v, n);
        if (grad_fixed)
            write_gradient(chunk.to_fixed, I + v, w, n, chunk.fixed, job.upstream[pair], grad_fixed + at + v);
        if (grad_moving)
            write_gradient(chunk.to_moving, J + v, w, n, chunk.moving, job.upstream[pair], grad_moving + at + v);
    }
}

void mutual_information_backward(const MutualInformationBackwardJob& job, const Parallel& pool) {
    const i64 parts = larger(1, job.voxels / PART_VOXELS);
    for_each(pool, job.pairs * parts, [&](i64 item, int) {
        const i64 part = item % parts, begin = part * PART_VOXELS;
        const i64 end = part + 1 == parts ? job.voxels : begin + PART_VOXELS;
        with_storage(job.storage, [&](auto zero) {
            using T = decltype(zero);
            const auto gather = job.gaussian ? gather_part<GAUSSIAN, T> : gather_part<BSPLINE, T>;
            gather(job, item / parts, begin, end);
        });
    });
}

}  // namespace PATCHREG_ISA
}  // namespace patchreg
