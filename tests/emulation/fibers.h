// One block of CUDA threads as fibers.
#pragma once
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

namespace emulation {

constexpr unsigned MAX_THREADS = 1024, WARP = 32;
constexpr size_t STACK = 256 << 10, STACK_GUARD = 16 << 10;  // of address space: only touched pages cost memory

enum class State : unsigned char { ready, at_barrier, at_warp, done };

struct Fiber {
    char* stack = nullptr;
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
    uint3 thread{};
    unsigned lane = 0, warp = 0;
    State state = State::done;
};

// The exchange of values between the lanes of a warp. Two sets of slots take turns, so that a lane may post its next
// value before all others have read the last.
struct Warp {
    uint64_t slot[2][WARP];
    unsigned posted[2], arrived, mask, alive, turn;
};

struct Block {
    Fiber fibers[MAX_THREADS];
    Warp warps[MAX_THREADS / WARP];
    Fiber launcher;
    Fiber* current = nullptr;
    uint3 index{};
    dim3 size, grid;
    unsigned threads = 0, alive = 0, waiting = 0;
    int barrier_line = 0, vote = 0, vote_result = 0;
    bool descending = false, float_atomics = false;
    char* dynamic_shared = nullptr;
    void (*body)(void*) = nullptr;
    void* context = nullptr;
    char error[512] = "";
};

inline Block* const block = new Block;

#if defined(__x86_64__)
extern "C" void patchreg_switch_stack(void** save, void* to);
asm(R"(.text
.type patchreg_switch_stack,@function
patchreg_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size patchreg_switch_stack,.-patchreg_switch_stack
)");
#endif

inline void change_to(Fiber& from, Fiber& to) {
    block->current = &to;
#if defined(__x86_64__)
    patchreg_switch_stack(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.context, &to.context);
#endif
}

// Where a launch goes on that cannot be finished; the fibers are left where they are.
inline sigjmp_buf escape;
enum Escape : int { FAILED = 1, FAULT = 2 };

template <class... Values> [[noreturn]] inline void fail(const char* format, Values... values) {
    const Fiber& me = *block->current;
    int length = 0;
    if (&me != &block->launcher)
        length = snprintf(block->error, sizeof block->error, "block (%u,%u,%u) thread (%u,%u,%u): ", block->index.x,
                          block->index.y, block->index.z, me.thread.x, me.thread.y, me.thread.z);
    snprintf(block->error + length, sizeof block->error - size_t(length), format, values...);
    siglongjmp(escape, FAILED);
}

// The next fiber that can run, in the order of the threads or against it; the launcher where none can.
inline Fiber& next_fiber() {
    const unsigned n = block->threads, here = unsigned(block->current - block->fibers);
    for (unsigned step = 1; step <= n; ++step) {
        const unsigned other = block->descending ? (here + n - step) % n : (here + step) % n;
        if (block->fibers[other].state == State::ready) return block->fibers[other];
    }
    return block->launcher;
}

inline void wait_for_others() {
    Fiber& me = *block->current;
    Fiber& other = next_fiber();
    if (&other != &me) change_to(me, other);
}

inline void release_barrier() {
    if (block->waiting == 0 || block->waiting != block->alive) return;
    block->waiting = 0;
    block->vote_result = block->vote;
    block->vote = 0;
    for (unsigned i = 0; i < block->threads; ++i)
        if (block->fibers[i].state == State::at_barrier) block->fibers[i].state = State::ready;
}

// All threads that are still alive meet here; returns whether any of them voted.
inline int barrier(int line, int vote = 0) {
    Fiber& me = *block->current;
    if (block->waiting == 0) block->barrier_line = line;
    if (block->barrier_line != line)
        fail("divergent barrier: this thread is at the one of line %d, others at that of line %d", line,
             block->barrier_line);
    ++block->waiting;
    block->vote |= vote != 0;
    me.state = State::at_barrier;
    release_barrier();
    wait_for_others();
    return block->vote_result;
}

inline void release_warp(Warp& warp) {
    const unsigned needed = warp.mask & warp.alive;
    if (warp.arrived == 0 || (warp.arrived & needed) != needed) return;
    Fiber* lanes = block->fibers + (&warp - block->warps) * WARP;
    for (unsigned lane = 0; lane < WARP; ++lane)
        if (warp.arrived >> lane & 1u && lanes[lane].state == State::at_warp) lanes[lane].state = State::ready;
    warp.arrived = 0;
    warp.turn ^= 1u;
    warp.posted[warp.turn] = 0;
}

// Every lane of `mask` posts a value and waits for the others; returns which set of slots they used.
inline unsigned meet_warp(unsigned mask, uint64_t value) {
    Fiber& me = *block->current;
    Warp& warp = block->warps[me.warp];
    const unsigned turn = warp.turn, bit = 1u << me.lane;
    if (!(mask & bit)) fail("lane %u is not in its own mask %08x", me.lane, mask);
    if (warp.arrived != 0 && warp.mask != mask) fail("the lanes of a warp disagree: masks %08x and %08x", mask, warp.mask);
    warp.mask = mask;
    warp.slot[turn][me.lane] = value;
    warp.posted[turn] |= bit;
    warp.arrived |= bit;
    me.state = State::at_warp;
    release_warp(warp);
    wait_for_others();
    return turn;
}

template <class T> inline T exchange(unsigned mask, T value, unsigned source) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    uint64_t word = 0;
    memcpy(&word, &value, sizeof value);
    const unsigned turn = meet_warp(mask, word);
    const Warp& warp = block->warps[block->current->warp];
    if (!(warp.posted[turn] >> source & 1u)) fail("shuffle from lane %u, which takes no part in it", source);
    memcpy(&value, &warp.slot[turn][source], sizeof value);
    return value;
}

inline unsigned ballot(unsigned mask, int predicate) {
    const unsigned turn = meet_warp(mask, predicate != 0);
    const Warp& warp = block->warps[block->current->warp];
    unsigned votes = 0;
    for (unsigned lane = 0; lane < WARP; ++lane)
        if (warp.posted[turn] >> lane & 1u) votes |= unsigned(warp.slot[turn][lane]) << lane;
    return votes;
}

inline void run_thread() {
    block->body(block->context);
    Fiber& me = *block->current;
    me.state = State::done;
    --block->alive;
    Warp& warp = block->warps[me.warp];
    warp.alive &= ~(1u << me.lane);
    release_barrier();
    release_warp(warp);
    change_to(me, next_fiber());
    abort();
}

inline void prepare(Fiber& fiber) {
    if (fiber.stack == nullptr) {
        void* memory = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, STACK_GUARD, PROT_NONE) != 0)
            fail("no memory for the stack of a thread");
        fiber.stack = static_cast<char*>(memory);
    }
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(fiber.stack + STACK - 64);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&run_thread);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    fiber.stack_pointer = top;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_thread, 0);
#endif
}

// A stack is two entries in the system's table of a process's mappings, which holds 65530: dozens of libraries like this
// one must not each keep theirs.
inline void release_stacks() {
    for (Fiber& fiber : block->fibers) {
        if (fiber.stack != nullptr) munmap(fiber.stack, STACK);
        fiber.stack = nullptr;
    }
}

inline void run_block() {
    const dim3 size = block->size;
    block->threads = block->alive = size.x * size.y * size.z;
    block->waiting = 0;
    block->vote = 0;
    memset(block->warps, 0, sizeof block->warps);
    for (unsigned i = 0; i < block->threads; ++i) {
        Fiber& fiber = block->fibers[i];
        prepare(fiber);
        fiber.thread = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
        fiber.lane = i % WARP;
        fiber.warp = i / WARP;
        fiber.state = State::ready;
        block->warps[fiber.warp].alive |= 1u << fiber.lane;
    }
    change_to(block->launcher, block->fibers[block->descending ? block->threads - 1 : 0]);
    if (block->alive != 0)
        fail("deadlock in block (%u,%u,%u): %u threads are alive and %u of them wait at the barrier of line %d",
             block->index.x, block->index.y, block->index.z, block->alive, block->waiting, block->barrier_line);
}

}  // namespace emulation
