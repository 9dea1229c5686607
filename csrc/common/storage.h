// Half precision is how volumes are stored, never how they are computed with: load() widens to float, narrow() rounds.
#pragma once
#include "portable.h"

namespace patchreg {

struct Half {
    u16 bits;
};
struct BFloat16 {
    u16 bits;
};

// The codes that Python passes for a dtype.
enum Storage : int { STORE_FLOAT = 0, STORE_HALF = 1, STORE_BFLOAT16 = 2 };

#if defined(__CUDACC__)
PATCHREG_FN float bits_to_float(u32 bits) { return __uint_as_float(bits); }
PATCHREG_FN u32 float_to_bits(float value) { return __float_as_uint(value); }
#else
PATCHREG_FN float bits_to_float(u32 bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}
PATCHREG_FN u32 float_to_bits(float value) {
    u32 bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}
#endif

PATCHREG_FN float widen(float value) { return value; }

PATCHREG_FN float widen(BFloat16 value) { return bits_to_float(u32(value.bits) << 16); }

PATCHREG_FN float widen(Half value) {
#if defined(__CUDA_ARCH__)
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
#else
    // The exponent is rebased by a multiplication, which also normalises subnormals; infinities and NaN are put back.
    const u32 magnitude = u32(value.bits & 0x7fffu) << 13, sign = u32(value.bits & 0x8000u) << 16;
    const u32 finite = float_to_bits(bits_to_float(magnitude) * 0x1p112f);
    return bits_to_float((magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite) | sign);
#endif
}

PATCHREG_FN float round_to(float, float value) { return value; }

PATCHREG_FN BFloat16 round_to(BFloat16, float value) {
    const u32 bits = float_to_bits(value);
    if (value != value) return {u16(0x7fc0u)};
    return {u16((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};  // to nearest, ties to even
}

PATCHREG_FN Half round_to(Half, float value) {
#if defined(__CUDA_ARCH__)
    Half small;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(small.bits) : "f"(value));
    return small;
#else
    const u32 bits = float_to_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {u16(sign | 0x7e00u)};
    if (magnitude >= 0x477ff000u) return {u16(sign | 0x7c00u)};  // beyond the largest half, rounded
    if (magnitude < 0x38800000u) {                               // a subnormal half: let the adder round
        const float shifted = bits_to_float(magnitude) + 0.5f;
        return {u16(sign | (float_to_bits(shifted) - 0x3f000000u))};
    }
    return {u16(sign | ((magnitude - 0x38000000u + 0x0fffu + (magnitude >> 13 & 1u)) >> 13))};
#endif
}

template <class T> PATCHREG_FN T narrow(float value) { return round_to(T{}, value); }

}  // namespace patchreg
