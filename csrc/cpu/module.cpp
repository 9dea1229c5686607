// The extension patchreg._cpu: raw addresses in, no torch headers, so that one build serves every torch.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "bind.h"
#include "isa.h"

namespace nb = nanobind;
using namespace nb::literals;

static const char* name_of(patchreg::Isa isa) {
    switch (isa) {
        case patchreg::Isa::avx512: return "avx512";
        case patchreg::Isa::avx2: return "avx2";
        default: return "baseline";
    }
}

NB_MODULE(_cpu, module) {
    module.def("instruction_set", [] { return name_of(patchreg::active_isa()); });
    module.def("use_instruction_set", [](const std::string& name) {
        for (patchreg::Isa isa : {patchreg::Isa::baseline, patchreg::Isa::avx2, patchreg::Isa::avx512})
            if (name == name_of(isa) && isa <= patchreg::best_isa()) return patchreg::use_isa(isa);
        throw nb::value_error(("this processor, or this build, does not run " + name).c_str());
    }, "name"_a);
    patchreg::bind_lncc(module);
    patchreg::bind_mutual_information(module);
    patchreg::bind_warp(module);
}
