// New memory of volume size is cheaper in large pages: the first write to each page stops for the kernel, and that takes
// several times as long as the sampling that fills it. Linux gives them to those who ask (transparent_hugepage=madvise).
#pragma once
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstddef>
#include <cstdint>

namespace patchreg {

// A wish, which costs little where it is not heard. Nothing changes for memory that was written before.
inline void ask_for_large_pages(const void* data, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr std::uintptr_t page = std::uintptr_t(1) << 21;
    const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(data);
    const std::uintptr_t first = (address + page - 1) / page * page, end = (address + bytes) / page * page;
    if (data && end >= first + page) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

}  // namespace patchreg
