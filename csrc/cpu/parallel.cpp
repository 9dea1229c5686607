#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace patchreg {

static void run(int threads, i64 items, void (*task)(void*, i64, int), void* context) {
    std::atomic<i64> next{0};
    std::exception_ptr error;
    std::mutex guard;
    const auto work = [&](int thread) {
        try {
            for (i64 item; (item = next.fetch_add(1)) < items;) task(context, item, thread);
        } catch (...) {
            next.store(items);
            const std::lock_guard<std::mutex> lock(guard);
            if (!error) error = std::current_exception();
        }
    };
    std::vector<std::thread> others;
    for (int thread = 1; thread < std::min<i64>(threads, items); ++thread) others.emplace_back(work, thread);
    work(0);
    for (auto& other : others) other.join();
    if (error) std::rethrow_exception(error);
}

Parallel parallel(int threads) { return {std::max(1, threads), run}; }

}  // namespace patchreg
