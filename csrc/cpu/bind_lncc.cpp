#include "bind.h"
#include "lncc.h"
#include "pages.h"

#include <vector>

namespace nb = nanobind;
using namespace nb::literals;

namespace patchreg {

// High tiles have little margin; but what the threads hold together is to stay below 0.4 of a volume.
static void choose_tiles(LnccJob& job, int threads) {
    constexpr i64 widest = 256;
    job.tiles = (job.width + widest - 1) / widest;
    job.tile_width = (job.width + job.tiles - 1) / job.tiles;
    job.tile_height = 48;
    const double volume = double(job.planes) * double(job.depth * job.height * job.width);
    const auto scratch = [&] {
        return double(threads) * 5.0 * double((job.window + 7) * job.tile_height * (job.tile_width + 24));
    };
    while (job.tile_height > 16 && scratch() > 0.4 * volume) job.tile_height -= 8;
}

// Returns the sum of the value over all voxels; rows are added in their order, whatever the threads did.
static double lncc_on_cpu(std::uintptr_t fixed, std::uintptr_t moving, std::uintptr_t mask, std::uintptr_t upstream,
                          bool upstream_is_map, std::uintptr_t weights, std::uintptr_t grad_fixed,
                          std::uintptr_t grad_moving, std::uintptr_t value_map, i64 batch, i64 channels, i64 depth,
                          i64 height, i64 width, int storage, int window, float eps, int threads) {
    LnccJob job{};
    job.fixed = at<const void>(fixed);
    job.moving = at<const void>(moving);
    job.mask = at<const unsigned char>(mask);
    job.upstream = at<const float>(upstream);
    job.upstream_is_map = upstream_is_map;
    job.weights = at<const float>(weights);
    job.grad_fixed = at<float>(grad_fixed);
    job.grad_moving = at<float>(grad_moving);
    job.value_map = at<float>(value_map);
    job.planes = batch * channels;
    job.channels = channels;
    job.depth = depth;
    job.height = height;
    job.width = width;
    job.storage = storage;
    job.window = window;
    job.eps = eps;
    choose_tiles(job, threads);
    std::vector<double> rows(size_t(job.planes * depth * height * job.tiles));
    job.row_values = rows.data();
    const std::vector<unsigned char> ones(size_t(width), 1);
    job.ones = ones.data();
    const std::size_t bytes = sizeof(float) * std::size_t(job.planes * depth * height * width);
    for (float* made : {job.grad_fixed, job.grad_moving, job.value_map}) ask_for_large_pages(made, bytes);
    lncc_for(active_isa())(job, parallel(threads));
    double total = 0;
    for (double row : rows) total += row;
    return total;
}

void bind_lncc(nb::module_& module) {
    module.def("lncc", &lncc_on_cpu, "fixed"_a, "moving"_a, "mask"_a, "upstream"_a, "upstream_is_map"_a, "weights"_a,
               "grad_fixed"_a, "grad_moving"_a, "value_map"_a, "batch"_a, "channels"_a, "depth"_a, "height"_a, "width"_a,
               "storage"_a, "window"_a, "eps"_a, "threads"_a, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace patchreg
