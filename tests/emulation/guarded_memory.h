// Copies of a kernel's arguments with no accessible memory around them, so that the first access outside is caught.
#pragma once
#include <csignal>
#include <dlfcn.h>
#include <unistd.h>

#include "fibers.h"

namespace emulation {

constexpr size_t GUARD = size_t(1) << 24;  // of address space before and behind
constexpr size_t ALIGNMENT = 16;           // of the widest access

struct Guarded {
    char *mapping = nullptr, *data = nullptr;
    size_t mapped = 0, bytes = 0;
    const char* original = nullptr;

    // `original` may be null: then the memory is filled with NaN. It ends at the guard behind it, or starts at that before.
    void open(const void* from, size_t size, bool against_end) {
        const size_t page = size_t(sysconf(_SC_PAGESIZE)), inner = (size + ALIGNMENT + page - 1) / page * page;
        original = static_cast<const char*>(from);
        bytes = size;
        mapped = inner + 2 * GUARD;
        void* memory = mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED || mprotect(static_cast<char*>(memory) + GUARD, inner, PROT_READ | PROT_WRITE) != 0)
            fail("no memory for the copy of an argument");
        mapping = static_cast<char*>(memory);
        char* first = mapping + GUARD;
        memset(first, 0xff, inner);
        const size_t offset = reinterpret_cast<uintptr_t>(from) % ALIGNMENT;  // what is aligned there is aligned here
        data = first + offset;
        if (against_end) {
            const size_t room = inner - size;
            data = first + (room >= offset ? (room - offset) / ALIGNMENT * ALIGNMENT + offset : room);
        }
        if (original != nullptr) memcpy(data, original, size);
    }
    void close() {
        if (mapping != nullptr) munmap(mapping, mapped);
        mapping = nullptr;
    }
    // Whether a write went to the few bytes between the data and the guard, which alignment leaves accessible.
    bool edges_written() const {
        const char *first = mapping + GUARD, *last = mapping + mapped - GUARD;
        for (const char* p = first; p < data; ++p)
            if (*p != char(0xff)) return true;
        for (const char* p = data + bytes; p < last; ++p)
            if (*p != char(0xff)) return true;
        return false;
    }
    bool near(const void* address) const { return address >= mapping && address < mapping + mapped; }
    long long offset_of(const void* address) const { return static_cast<const char*>(address) - data; }
};

// Faults of the kernel, which become errors.
inline volatile sig_atomic_t fault_signal;
inline void* fault_address;
inline void* fault_instruction;

inline void on_fault(int signal, siginfo_t* info, void* context) {
    fault_signal = signal;
    fault_address = info->si_addr;
    fault_instruction = nullptr;
#if defined(__x86_64__)
    fault_instruction = reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
#else
    (void)context;
#endif
    siglongjmp(escape, FAULT);
}

class FaultHandlers {
  public:
    FaultHandlers() {
        static char* const alternative = new char[64 << 10];  // a fiber's own stack may be what overflowed
        stack_t stack{};
        stack.ss_sp = alternative;
        stack.ss_size = 64 << 10;
        sigaltstack(&stack, &previous_stack_);
        struct sigaction action {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (int i = 0; i < 4; ++i) sigaction(SIGNALS[i], &action, &previous_[i]);
    }
    ~FaultHandlers() {
        for (int i = 0; i < 4; ++i) sigaction(SIGNALS[i], &previous_[i], nullptr);
        sigaltstack(&previous_stack_, nullptr);
    }

  private:
    static constexpr int SIGNALS[4] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
    struct sigaction previous_[4];
    stack_t previous_stack_;
};

}  // namespace emulation
