#include "isa.h"

#include <atomic>

namespace patchreg {

Isa best_isa() {
#if defined(PATCHREG_X86)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return Isa::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
    return Isa::baseline;
}

static std::atomic<Isa>& chosen() {
    static std::atomic<Isa> isa{best_isa()};
    return isa;
}

Isa active_isa() { return chosen().load(); }

void use_isa(Isa isa) { chosen().store(isa); }

}  // namespace patchreg
