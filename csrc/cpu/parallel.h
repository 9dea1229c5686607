// Work shared out over threads. Kernels see only a function pointer, so that they need nothing of the C++ library.
#pragma once
#include "portable.h"

namespace patchreg {

struct Parallel {
    int threads;
    void (*run)(int threads, i64 items, void (*task)(void* context, i64 item, int thread), void* context);
};

Parallel parallel(int threads);  // at least one

// Calls body(item, thread) for every item in 0..items-1, thread < threads; items are taken in order as threads are free.
template <class Body> static inline void for_each(const Parallel& pool, i64 items, const Body& body) {
    pool.run(
        pool.threads, items,
        [](void* context, i64 item, int thread) { (*static_cast<const Body*>(context))(item, thread); },
        const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace patchreg
