#include "bind.h"
#include "mutual_information.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace patchreg {

static void forward(std::uintptr_t fixed, std::uintptr_t moving, std::uintptr_t weight, std::uintptr_t ranges,
                    std::uintptr_t values, std::uintptr_t slopes, i64 pairs, i64 channels, i64 voxels,
                    bool weight_of_batch, int storage, int bins, bool gaussian, bool normalized, int threads) {
    MutualInformationJob job{};
    job.fixed = at<const void>(fixed);
    job.moving = at<const void>(moving);
    job.weight = at<const void>(weight);
    job.ranges = at<double>(ranges);
    job.values = at<float>(values);
    job.slopes = at<float>(slopes);
    job.pairs = pairs;
    job.channels = channels;
    job.voxels = voxels;
    job.weight_of_batch = weight_of_batch;
    job.storage = storage;
    job.bins = bins;
    job.gaussian = gaussian;
    job.normalized = normalized;
    mutual_information_for(active_isa())(job, parallel(threads));
}

static void backward(std::uintptr_t fixed, std::uintptr_t moving, std::uintptr_t weight, std::uintptr_t ranges,
                     std::uintptr_t slopes, std::uintptr_t upstream, std::uintptr_t grad_fixed,
                     std::uintptr_t grad_moving, i64 pairs, i64 channels, i64 voxels, bool weight_of_batch, int storage,
                     int bins, bool gaussian, int threads) {
    MutualInformationBackwardJob job{};
    job.fixed = at<const void>(fixed);
    job.moving = at<const void>(moving);
    job.weight = at<const void>(weight);
    job.ranges = at<const double>(ranges);
    job.slopes = at<const float>(slopes);
    job.upstream = at<const float>(upstream);
    job.grad_fixed = at<void>(grad_fixed);
    job.grad_moving = at<void>(grad_moving);
    job.pairs = pairs;
    job.channels = channels;
    job.voxels = voxels;
    job.weight_of_batch = weight_of_batch;
    job.storage = storage;
    job.bins = bins;
    job.gaussian = gaussian;
    mutual_information_backward_for(active_isa())(job, parallel(threads));
}

void bind_mutual_information(nb::module_& module) {
    module.def("mutual_information", &forward, "fixed"_a, "moving"_a, "weight"_a, "ranges"_a, "values"_a, "slopes"_a,
               "pairs"_a, "channels"_a, "voxels"_a, "weight_of_batch"_a, "storage"_a, "bins"_a, "gaussian"_a,
               "normalized"_a, "threads"_a, nb::call_guard<nb::gil_scoped_release>());
    module.def("mutual_information_backward", &backward, "fixed"_a, "moving"_a, "weight"_a, "ranges"_a, "slopes"_a,
               "upstream"_a, "grad_fixed"_a, "grad_moving"_a, "pairs"_a, "channels"_a, "voxels"_a, "weight_of_batch"_a,
               "storage"_a, "bins"_a, "gaussian"_a, "threads"_a, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace patchreg
