// One launch, as Python asks for it: laid out like the ctypes structures in emulator.py.
#pragma once
#include <link.h>

#include <tuple>
#include <type_traits>
#include <utility>

#include "guarded_memory.h"

namespace emulation {

constexpr size_t MAX_STATIC_SHARED = 48 << 10;
constexpr size_t MAX_SHARED = 99 << 10;  // of a block: the least among compute capabilities 8.0 to 12.0
constexpr int MAX_REGIONS = 64;

enum Kind : int { TENSOR = 0, NONE = 1, INTEGER = 2, REAL = 3 };

struct Argument {
    int kind;
    int region;        // of a tensor: in which piece of memory it lies, and where
    long long offset;
    long long integer;
    double real;
};

struct Region {
    const void* original;
    void* result;
    long long bytes;
};

struct Request {
    unsigned grid[3], block[3];
    long long shared;
    int descending, argument_count, region_count, float_atomics;
    const Argument* arguments;
    const Region* regions;
    long long fault_offset;  // of the faulty instruction in this library, or -1
    char error[512];
};

// The thread-local segment of this library, which holds the kernel's __shared__ variables and `anchor`.
struct SharedSegment {
    char* data = nullptr;
    size_t bytes = 0;
};

inline thread_local char anchor[16];

inline SharedSegment find_shared_segment() {
    asm volatile("" : : "r"(anchor) : "memory");  // makes it exist
    SharedSegment found;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* out) {
            for (int i = 0; i < info->dlpi_phnum; ++i) {
                const auto& header = info->dlpi_phdr[i];
                char* data = static_cast<char*>(info->dlpi_tls_data);
                if (header.p_type == PT_TLS && data != nullptr && anchor >= data && anchor < data + header.p_memsz)
                    *static_cast<SharedSegment*>(out) = {data, header.p_memsz};
            }
            return 0;
        },
        &found);
    return found;
}

template <class T> T convert(const Argument& argument, int position, const Guarded* memory) {
    if constexpr (std::is_pointer_v<T>) {
        if (argument.kind == NONE) return nullptr;
        if (argument.kind == TENSOR) return reinterpret_cast<T>(memory[argument.region].data + argument.offset);
        fail("argument %d is a number where the kernel takes a pointer", position);
    } else if constexpr (std::is_same_v<T, long long>) {
        if (argument.kind == INTEGER) return argument.integer;
        fail("argument %d is no int, which the kernel takes", position);
    } else {
        static_assert(std::is_same_v<T, float>, "kernels take pointers, long long and float");
        if (argument.kind == REAL) return float(argument.real);
        fail("argument %d is no float, which the kernel takes", position);
    }
}

inline void check_limits(const Request& request, size_t static_shared) {
    const unsigned *g = request.grid, *b = request.block;
    if (g[0] == 0 || g[1] == 0 || g[2] == 0 || b[0] == 0 || b[1] == 0 || b[2] == 0)
        fail("a grid or a block is empty: grid (%u,%u,%u), block (%u,%u,%u)", g[0], g[1], g[2], b[0], b[1], b[2]);
    if (g[0] > 0x7fffffffu || g[1] > 65535u || g[2] > 65535u)
        fail("grid (%u,%u,%u) is beyond a device's limit of (2^31-1, 65535, 65535)", g[0], g[1], g[2]);
    if (b[2] > 64 || uint64_t(b[0]) * b[1] * b[2] > MAX_THREADS)
        fail("block (%u,%u,%u) is beyond a device's limit of 1024 threads, 64 along z", b[0], b[1], b[2]);
    if (static_shared > MAX_STATIC_SHARED)
        fail("%zu bytes of static shared memory, %zu at most", static_shared, MAX_STATIC_SHARED);
    if (static_shared + size_t(request.shared) > MAX_SHARED)
        fail("%zu bytes of shared memory, %zu at most", static_shared + size_t(request.shared), MAX_SHARED);
}

inline void run_grid(const Request& request, const SharedSegment& segment, Guarded& dynamic) {
    const auto [x, y, z] = std::tuple{request.grid[0], request.grid[1], request.grid[2]};
    const long long blocks = static_cast<long long>(x) * y * z;
    for (long long i = 0; i < blocks; ++i) {
        const long long b = block->descending ? blocks - 1 - i : i;
        block->index = {unsigned(b % x), unsigned(b / x % y), unsigned(b / (static_cast<long long>(x) * y))};
        memset(segment.data, 0xff, segment.bytes);
        dynamic.open(nullptr, size_t(request.shared), !block->descending);
        block->dynamic_shared = dynamic.data;
        run_block();
        if (dynamic.edges_written()) fail("out of bounds: a write beside dynamic shared memory");
        dynamic.close();
    }
}

// In words, what the signal was about.
inline void describe_fault(Request& request, const Guarded* memory) {
    const Fiber& me = *block->current;
    Dl_info library{};
    if (fault_instruction != nullptr && dladdr(fault_instruction, &library) != 0)
        request.fault_offset = static_cast<char*>(fault_instruction) - static_cast<char*>(library.dli_fbase);
    char what[256] = "access to memory that is no argument's";
    if (fault_signal == SIGILL) snprintf(what, sizeof what, "undefined behaviour (index of an array, overflow, alignment)");
    if (fault_signal == SIGFPE) snprintf(what, sizeof what, "division by zero");
    if (fault_address >= me.stack && fault_address < me.stack + STACK) snprintf(what, sizeof what, "stack overflow");
    const Guarded& dynamic = memory[request.region_count];
    if (fault_signal == SIGSEGV && dynamic.near(fault_address))
        snprintf(what, sizeof what, "out of bounds: byte %lld of %lld bytes of dynamic shared memory",
                 dynamic.offset_of(fault_address), request.shared);
    for (int position = 0; position < request.argument_count && fault_signal == SIGSEGV; ++position) {
        const Argument& argument = request.arguments[position];
        if (argument.kind != TENSOR || !memory[argument.region].near(fault_address)) continue;
        snprintf(what, sizeof what, "out of bounds: byte %lld of argument %d, which lies in %lld bytes",
                 memory[argument.region].offset_of(fault_address) - argument.offset, position,
                 request.regions[argument.region].bytes);
        break;
    }
    snprintf(block->error, sizeof block->error, "block (%u,%u,%u) thread (%u,%u,%u): %s", block->index.x, block->index.y,
             block->index.z, me.thread.x, me.thread.y, me.thread.z, what);
}

template <class... Parameters>
void call(void (*kernel)(Parameters...), const Request& request, Guarded* memory) {
    if (sizeof...(Parameters) != size_t(request.argument_count))
        fail("%d arguments for a kernel of %d", request.argument_count, int(sizeof...(Parameters)));
    const SharedSegment segment = find_shared_segment();
    check_limits(request, segment.bytes - sizeof anchor);
    for (int i = 0; i < request.region_count; ++i)
        memory[i].open(request.regions[i].original, size_t(request.regions[i].bytes), !block->descending);
    auto values = [&]<size_t... Is>(std::index_sequence<Is...>) {
        return std::tuple<Parameters...>{convert<Parameters>(request.arguments[Is], int(Is), memory)...};
    }(std::index_sequence_for<Parameters...>{});
    auto thread = [&] { std::apply(kernel, values); };
    block->body = [](void* body) { (*static_cast<decltype(thread)*>(body))(); };
    block->context = &thread;
    run_grid(request, segment, memory[request.region_count]);
    for (int i = 0; i < request.region_count; ++i) {
        if (memory[i].edges_written()) fail("out of bounds: a write beside an argument");
        memcpy(request.regions[i].result, memory[i].data, memory[i].bytes);
    }
}

// Runs a launch; request.error is empty where it went well, and then the results are in place.
template <class... Parameters> void emulate(void (*kernel)(Parameters...), Request& request) {
    static Guarded memory[MAX_REGIONS + 1];  // the last is dynamic shared memory
    FaultHandlers handlers;
    block->size = {request.block[0], request.block[1], request.block[2]};
    block->grid = {request.grid[0], request.grid[1], request.grid[2]};
    block->descending = request.descending != 0;
    block->float_atomics = false;
    block->error[0] = 0;
    block->current = &block->launcher;
    request.fault_offset = -1;
    const int escaped = sigsetjmp(escape, 1);
    if (escaped == 0)
        call(kernel, request, memory);
    else if (escaped == FAULT)
        describe_fault(request, memory);
    for (Guarded& each : memory) each.close();
    release_stacks();
    request.float_atomics = block->float_atomics;
    memcpy(request.error, block->error, sizeof request.error);
}

}  // namespace emulation
