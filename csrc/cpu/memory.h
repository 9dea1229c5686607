// Scratch memory for kernels: aligned to a cache line, freed at the end of its scope.
#pragma once
#include <stdlib.h>
#include <string.h>

#include "portable.h"

namespace patchreg {

[[noreturn]] void throw_out_of_memory(i64 bytes);

#if defined(PATCHREG_ISA)
namespace PATCHREG_ISA {  // or the linker might keep the AVX-512 copy of a member for all

template <class T> struct Scratch {
    T* data;
    i64 size;

    // `size` elements, zero unless `zero` is false.
    explicit Scratch(i64 size, bool zero = true) : size(size) {
        const size_t bytes = (size_t(size) * sizeof(T) + 127) / 64 * 64;
        data = static_cast<T*>(aligned_alloc(64, bytes));
        if (data == nullptr) throw_out_of_memory(i64(bytes));
        if (zero) memset(static_cast<void*>(data), 0, bytes);
    }
    ~Scratch() { free(data); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    T& operator[](i64 index) const { return data[index]; }
    operator T*() const { return data; }
};

}  // namespace PATCHREG_ISA
#endif

}  // namespace patchreg
