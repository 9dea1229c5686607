// Run-time choice of the instruction set.
//
// Each kernel file is compiled once for every instruction set, in a namespace of that name, and includes nothing of the
// C++ library: an inline function of the library compiled for AVX-512 could be the copy that the linker keeps for all.
#pragma once

namespace patchreg {

enum class Isa { baseline, avx2, avx512 };

Isa best_isa();          // that this processor runs
Isa active_isa();        // best_isa(), unless use_isa() chose another
void use_isa(Isa isa);   // for tests; one beyond best_isa() would crash

}  // namespace patchreg

#if defined(PATCHREG_X86)
#define PATCHREG_KERNEL(Result, name, ...)                \
    namespace baseline { Result name(__VA_ARGS__); }      \
    namespace avx2 { Result name(__VA_ARGS__); }          \
    namespace avx512 { Result name(__VA_ARGS__); }        \
    using name##_kernel = Result (*)(__VA_ARGS__);        \
    inline name##_kernel name##_for(Isa isa) {            \
        return isa == Isa::avx512 ? avx512::name : isa == Isa::avx2 ? avx2::name : baseline::name; \
    }
#else
#define PATCHREG_KERNEL(Result, name, ...)                \
    namespace baseline { Result name(__VA_ARGS__); }      \
    using name##_kernel = Result (*)(__VA_ARGS__);        \
    inline name##_kernel name##_for(Isa) { return baseline::name; }
#endif

// PATCHREG_SIMD: the loop's iterations are independent. PATCHREG_UNROLL: its count is known, and is to vanish.
#if defined(__clang__)
#define PATCHREG_UNROLL _Pragma("unroll")
#define PATCHREG_SIMD _Pragma("clang loop vectorize(assume_safety)")
#else
#define PATCHREG_UNROLL _Pragma("GCC unroll 32")
#define PATCHREG_SIMD _Pragma("GCC ivdep")
#endif
