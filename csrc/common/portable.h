// What the CPU's and the GPU's code share: function qualifiers and integer names. No standard headers: NVRTC has none.
#pragma once

#if defined(__CUDACC__) || defined(PATCHREG_EMULATION)
#define PATCHREG_FN static __device__ __forceinline__
#else
#define PATCHREG_FN static inline __attribute__((always_inline))
#endif

namespace patchreg {

using i64 = long long;
using u16 = unsigned short;
using u32 = unsigned int;

}  // namespace patchreg
