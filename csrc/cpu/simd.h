// A vector of floats as wide as the instruction set's, by the compiler's own vector types: for loops whose trip count in
// the middle is known only at run time, which no compiler vectorises from outside. Bodies are written once, for Lanes and
// for float; the latter does what is left at the end of a line.
#pragma once
#include "portable.h"
#include "storage.h"

namespace patchreg {
namespace PATCHREG_ISA {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef u32 Words __attribute__((vector_size(4 * LANES)));
typedef u16 Shorts __attribute__((vector_size(2 * LANES)));
typedef unsigned char Bytes __attribute__((vector_size(LANES)));

template <class To, class From> PATCHREG_FN To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "same_bits keeps the size");
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

template <class V, class T> PATCHREG_FN V load_raw(const T* from) {
    V values;
    __builtin_memcpy(&values, from, sizeof values);
    return values;
}

PATCHREG_FN Lanes load_lanes(const float* from) { return load_raw<Lanes>(from); }

PATCHREG_FN Lanes load_lanes(const BFloat16* from) {
    return same_bits<Lanes>(__builtin_convertvector(load_raw<Shorts>(from), Words) << 16);
}

PATCHREG_FN Lanes load_lanes(const Half* from) {  // as widen() in storage.h
    const Words bits = __builtin_convertvector(load_raw<Shorts>(from), Words);
    const Words magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
    const Words finite = same_bits<Words>(same_bits<Lanes>(magnitude) * 0x1p112f);
    return same_bits<Lanes>((magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite) | sign);
}

// Storage widened to F: a float, or a vector of them.
template <class F, class T> PATCHREG_FN F load(const T* from) {
    if constexpr (sizeof(F) == sizeof(float))
        return widen(*from);
    else
        return load_lanes(from);
}

// Bytes that are zero or one.
template <class F> PATCHREG_FN F load_flags(const unsigned char* from) {
    if constexpr (sizeof(F) == sizeof(float))
        return float(*from);
    else
        return __builtin_convertvector(load_raw<Bytes>(from), Lanes);
}

template <class F> PATCHREG_FN void store(float* to, F values) { __builtin_memcpy(to, &values, sizeof values); }

// Calls body(x, F{}) with F = Lanes for whole vectors, then with F = float.
template <class Body> static inline void for_lanes(i64 n, const Body& body) {
    i64 x = 0;
    for (; x + LANES <= n; x += LANES) body(x, Lanes{});
    for (; x < n; ++x) body(x, float{});
}

}  // namespace PATCHREG_ISA
}  // namespace patchreg
