#include <nanobind/stl/array.h>

#include <array>
#include <stdexcept>
#include <vector>

#include "bind.h"
#include "pages.h"
#include "storage.h"
#include "warp.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace patchreg {

using Size = std::array<i64, 3>;

// Batch sizes of image, displacement, affine and scale; 1 for what all share.
using Batches = std::array<i64, 4>;

static WarpJob describe(std::uintptr_t image, std::uintptr_t displacement, std::uintptr_t affine, std::uintptr_t scale,
                        i64 batch, i64 channels, Size size, Size image_size, Batches batches, bool border) {
    WarpJob job{};
    job.image = at<const void>(image);
    job.displacement = at<const void>(displacement);
    job.affine = at<const double>(affine);
    job.scale = at<const double>(scale);
    job.batch = batch;
    job.channels = channels;
    for (int axis = 0; axis < 3; ++axis) {
        if (size[axis] >= 1 << 23 || image_size[axis] >= 1 << 23)
            throw std::runtime_error("patchreg: an axis of 2^23 voxels or more cannot be sampled");
        job.size[axis] = size[axis];
        job.image_size[axis] = image_size[axis];
    }
    job.image_batch = batches[0];
    job.displacement_batch = batches[1];
    job.affine_batch = batches[2];
    job.scale_batch = batches[3];
    job.border = border;
    job.step = job.gain = 1.0f;
    return job;
}

static i64 voxels_of(const i64* size) { return size[0] * size[1] * size[2]; }

static std::size_t bytes_of(i64 elements, int storage) { return std::size_t(elements) * (storage == STORE_FLOAT ? 4 : 2); }

// A thread must have some work to be worth starting.
static Parallel threads_for(const WarpJob& job, int threads) {
    const i64 voxels = job.batch * voxels_of(job.size) * job.channels;
    return parallel(int(voxels / 16384 + 1 < threads ? voxels / 16384 + 1 : threads));
}

static void sample_linear(std::uintptr_t image, std::uintptr_t displacement, std::uintptr_t affine, std::uintptr_t scale,
                          i64 batch, i64 channels, Size size, Size image_size, Batches batches, bool border,
                          std::uintptr_t out, int image_storage, int displacement_storage, int out_storage, float step,
                          float gain, bool add, int threads) {
    WarpJob job = describe(image, displacement, affine, scale, batch, channels, size, image_size, batches, border);
    job.out = at<void>(out);
    job.image_storage = image_storage;
    job.displacement_storage = displacement_storage;
    job.out_storage = out_storage;
    job.step = step;
    job.gain = gain;
    job.add = add;
    ask_for_large_pages(job.out, bytes_of(batch * channels * voxels_of(job.size), out_storage));
    warp_forward_for(active_isa())(job, threads_for(job, threads));
}

static void sample_words(std::uintptr_t image, std::uintptr_t displacement, std::uintptr_t affine, std::uintptr_t scale,
                         i64 batch, i64 channels, Size size, Size image_size, Batches batches, bool border,
                         std::uintptr_t out, int displacement_storage, int word_bytes, unsigned long long infinity,
                         bool nearest, float step, int threads) {
    WarpJob job = describe(image, displacement, affine, scale, batch, channels, size, image_size, batches, border);
    job.out = at<void>(out);
    job.displacement_storage = displacement_storage;
    job.word_bytes = word_bytes;
    job.infinity = infinity;
    job.nearest = nearest;
    job.step = step;
    ask_for_large_pages(job.out, std::size_t(batch * channels * voxels_of(job.size) * word_bytes));
    warp_words_for(active_isa())(job, threads_for(job, threads));
}

// Bricks are added in their order, whatever the threads did; a map that the batch shares gets the sum over the batch.
static void add_up(const WarpJob& job, const std::vector<double>& sums, double* grad_affine, double* grad_scale) {
    const i64 bricks = warp_bricks(job.size);
    for (i64 batch = 0; batch < job.batch; ++batch)
        for (i64 brick = 0; brick < bricks; ++brick)
            for (int n = 0; n < WARP_SUMS; ++n) {
                const double sum = sums[size_t((batch * bricks + brick) * WARP_SUMS + n)];
                if (n < 12 && grad_affine) grad_affine[(job.affine_batch == 1 ? 0 : batch) * 12 + n] += sum;
                if (n >= 12 && grad_scale) grad_scale[(job.scale_batch == 1 ? 0 : batch) * 9 + n - 12] += sum;
            }
}

// grad_affine and grad_scale come as zeros.
static void differentiate(std::uintptr_t image, std::uintptr_t displacement, std::uintptr_t affine, std::uintptr_t scale,
                          i64 batch, i64 channels, Size size, Size image_size, Batches batches, bool border,
                          std::uintptr_t upstream, std::uintptr_t grad_image, std::uintptr_t grad_displacement,
                          std::uintptr_t grad_affine, std::uintptr_t grad_scale, int image_storage,
                          int displacement_storage, int out_storage, int grad_storage, bool nearest, float step, float gain,
                          bool add, int threads) {
    WarpJob job = describe(image, displacement, affine, scale, batch, channels, size, image_size, batches, border);
    std::vector<double> sums(grad_affine || grad_scale ? size_t(batch * warp_bricks(job.size) * WARP_SUMS) : 0);
    job.upstream = at<const void>(upstream);
    job.grad_image = at<float>(grad_image);
    job.grad_displacement = at<void>(grad_displacement);
    job.sums = sums.empty() ? nullptr : sums.data();
    job.image_storage = image_storage;
    job.displacement_storage = displacement_storage;
    job.out_storage = out_storage;
    job.grad_storage = grad_storage;
    job.nearest = nearest;
    job.step = step;
    job.gain = gain;
    job.add = add;
    ask_for_large_pages(job.grad_image, bytes_of(job.image_batch * channels * voxels_of(job.image_size), STORE_FLOAT));
    ask_for_large_pages(job.grad_displacement, bytes_of(job.displacement_batch * 3 * voxels_of(job.size), grad_storage));
    warp_backward_for(active_isa())(job, threads_for(job, threads));
    if (job.sums) add_up(job, sums, at<double>(grad_affine), at<double>(grad_scale));
}

void bind_warp(nb::module_& module) {
    const auto free = nb::call_guard<nb::gil_scoped_release>();
    module.def("warp", &sample_linear, "image"_a, "displacement"_a, "affine"_a, "scale"_a, "batch"_a, "channels"_a, "size"_a,
               "image_size"_a, "batches"_a, "border"_a, "out"_a, "image_storage"_a, "displacement_storage"_a,
               "out_storage"_a, "step"_a, "gain"_a, "add"_a, "threads"_a, free);
    module.def("warp_words", &sample_words, "image"_a, "displacement"_a, "affine"_a, "scale"_a, "batch"_a, "channels"_a,
               "size"_a, "image_size"_a, "batches"_a, "border"_a, "out"_a, "displacement_storage"_a, "word_bytes"_a,
               "infinity"_a, "nearest"_a, "step"_a, "threads"_a, free);
    module.def("warp_backward", &differentiate, "image"_a, "displacement"_a, "affine"_a, "scale"_a, "batch"_a, "channels"_a,
               "size"_a, "image_size"_a, "batches"_a, "border"_a, "upstream"_a, "grad_image"_a, "grad_displacement"_a,
               "grad_affine"_a, "grad_scale"_a, "image_storage"_a, "displacement_storage"_a, "out_storage"_a,
               "grad_storage"_a, "nearest"_a, "step"_a, "gain"_a, "add"_a, "threads"_a, free);
}

}  // namespace patchreg
