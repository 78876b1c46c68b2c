// Stands for csrc/cuda/device.h where a C++ compiler makes the kernels for a CPU.
//
// A thread of a block is a fiber; a barrier is a meeting of fibers, and one that only some reach ends the process. A
// block runs in a thread of the operating system, several at once and in an order that EMULATED_ORDER turns around.
// For the thread sanitizer only barriers, exchanges inside a warp and the counts of device.h order what fibers do, so
// that a forgotten one is a race; for the address sanitizer shared memory is a piece of the heap, exactly as large as
// it says. Inline PTX is not run here: `multiply` does what PTX's manual says of mma.m16n8k16.
#pragma once

#include <sched.h>
#include <ucontext.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <thread>
#include <vector>

#if defined(__SANITIZE_THREAD__)
extern "C" {
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void* __tsan_get_current_fiber();
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#define UNWATCHED __attribute__((no_sanitize("thread"), noinline))
#else
#define UNWATCHED
inline void* __tsan_create_fiber(unsigned) { return nullptr; }
inline void __tsan_destroy_fiber(void*) {}
inline void __tsan_switch_to_fiber(void*, unsigned) {}
inline void* __tsan_get_current_fiber() { return nullptr; }
inline void __tsan_acquire(void*) {}
inline void __tsan_release(void*) {}
#endif

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define SHARED(type, name, extent)   \
    using name##_type = type extent; \
    auto& name = *static_cast<name##_type*>(emulated::shared(#name, sizeof(name##_type)))
#define threadIdx (emulated::thread_index())
#define blockIdx (emulated::block_index())
#define gridDim (emulated::grid())

enum { cudaSuccess = 0, cudaErrorInvalidValue = 1 };

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct Index {
    unsigned x;
};

inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

namespace emulated {

enum State { READY, AT_BLOCK, AT_WARP, OVER };

// where a fiber, or what runs outside of them, has stopped
struct Place {
    ucontext_t context;
    void* stack;
};

#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
// as swapcontext does without its two calls into the system, which took most of the time
extern "C" void emulated_swap(void** from, void* to);
asm(".text\n.weak emulated_swap\n.type emulated_swap,@function\nemulated_swap:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\nmov %rsp,(%rdi)\nmov %rsi,%rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");
UNWATCHED inline void swap(Place& from, Place& to) { emulated_swap(&from.stack, to.stack); }
UNWATCHED inline void set(Place& place, char* stack, size_t bytes, void (*enter)()) {
    void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15});
    // where `enter` would return to, itself, and six registers
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(enter);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    place.stack = top;
}
#else
inline void swap(Place& from, Place& to) { swapcontext(&from.context, &to.context); }
inline void set(Place& place, char* stack, size_t bytes, void (*enter)()) {
    getcontext(&place.context);
    place.context.uc_stack.ss_sp = stack;
    place.context.uc_stack.ss_size = bytes;
    place.context.uc_link = nullptr;
    makecontext(&place.context, enter, 0);
}
#endif

struct Fiber {
    Place place;
    char* stack;
    void* watched;  // the sanitizer's
    State state;
    unsigned meetings[2];  // of the block and of the warp, so far
};

// one block, in a thread of the operating system
struct Block {
    std::vector<Fiber> fibers;
    Place outside;
    void* outside_watched;
    unsigned now, index;
    std::map<const char*, void*> shared;
    std::vector<uint64_t> desk;  // where lanes of a warp exchange words
    // two for each meeting place, a warp's or the block's: who runs ahead to the next must not order this one
    char order[2][33], last;
};

struct Grid {
    std::function<void()> kernel;
    unsigned blocks;
    std::atomic<unsigned> taken{0}, running{0}, waiting{0};
    bool backwards;
};

constexpr size_t STACK = 128 << 10, WORDS = 12;
inline thread_local Block* block;
inline Grid* launched;

// a launch that is not run here, but told to whoever asked: the PTX of the kernel runs with it
struct Recorded {
    int64_t wanted, blocks, threads, bytes;
    char step[4096];
};

[[noreturn]] inline void die(const char* why) {
    std::fprintf(stderr, "emulated block %u: %s\n", block ? block->index : 0, why);
    std::_Exit(3);
}

UNWATCHED inline Index thread_index() { return {block->now}; }
UNWATCHED inline Index block_index() { return {block->index}; }
UNWATCHED inline Index grid() { return {launched->blocks}; }
UNWATCHED inline unsigned lane() { return block->now % 32; }

// a piece of shared memory, full of NaN
UNWATCHED inline void* shared(const char* name, size_t bytes) {
    void*& piece = block->shared[name];
    if (!piece) std::memset(piece = std::malloc(bytes), 0xff, bytes);
    return piece;
}

UNWATCHED inline void leave() {
    Fiber& own = block->fibers[block->now];
    __tsan_switch_to_fiber(block->outside_watched, 1);
    swap(own.place, block->outside);
}

UNWATCHED inline void meet(State where) {
    Fiber& own = block->fibers[block->now];
    const unsigned place = where == AT_BLOCK ? 32 : block->now / 32;
    char* order = &block->order[own.meetings[where == AT_WARP]++ % 2][place];
    __tsan_release(order);
    own.state = where;
    leave();
    __tsan_acquire(order);
}

UNWATCHED inline void enter() {
    launched->kernel();
    __tsan_release(&block->last);
    block->fibers[block->now].state = OVER;
    leave();
}

UNWATCHED inline void resume(unsigned thread) {
    Fiber& fiber = block->fibers[thread];
    block->now = thread;
    // 1: to switch orders nothing
    __tsan_switch_to_fiber(fiber.watched, 1);
    swap(block->outside, fiber.place);
}

UNWATCHED inline unsigned count(unsigned first, unsigned end, State state) {
    unsigned found = 0;
    for (unsigned i = first; i < end; ++i) found += block->fibers[i].state == state;
    return found;
}

UNWATCHED inline void wake(unsigned first, unsigned end) {
    for (unsigned i = first; i < end; ++i) block->fibers[i].state = READY;
}

// each warp as far as it comes, until the whole block meets or is over
UNWATCHED inline void run_block(unsigned threads) {
    while (count(0, threads, OVER) < threads) {
        for (unsigned warp = 0; warp < threads; warp += 32)
            while (count(warp, warp + 32, READY)) {
                for (unsigned i = warp; i < warp + 32; ++i)
                    if (block->fibers[i].state == READY) resume(i);
                const unsigned met = count(warp, warp + 32, AT_WARP);
                if (met && met < 32) die("an exchange that only a part of the warp reaches");
                if (met) wake(warp, warp + 32);
            }
        const unsigned met = count(0, threads, AT_BLOCK);
        if (met && met < threads) die("a barrier that only a part of the block reaches");
        if (met) wake(0, threads);
    }
}

UNWATCHED inline void begin(Fiber& fiber) {
    set(fiber.place, fiber.stack, STACK, enter);
    fiber.watched = __tsan_create_fiber(0);
    fiber.state = READY;
    fiber.meetings[0] = fiber.meetings[1] = 0;
}

// blocks one after another, until none is left
UNWATCHED inline void work(unsigned threads) {
    Block own = {};
    block = &own;
    own.fibers.resize(threads);
    own.desk.resize(threads * WORDS);
    own.outside_watched = __tsan_get_current_fiber();
    for (Fiber& fiber : own.fibers) fiber.stack = static_cast<char*>(std::malloc(STACK));
    for (unsigned taken;
         (taken = launched->taken.fetch_add(1, std::memory_order_relaxed)) < launched->blocks;) {
        own.index = launched->backwards ? launched->blocks - 1 - taken : taken;
        for (Fiber& fiber : own.fibers) begin(fiber);
        run_block(threads);
        __tsan_acquire(&own.last);
        for (Fiber& fiber : own.fibers) __tsan_destroy_fiber(fiber.watched);
        for (auto& piece : own.shared) std::free(piece.second);
        own.shared.clear();
    }
    for (Fiber& fiber : own.fibers) std::free(fiber.stack);
    launched->running.fetch_sub(1, std::memory_order_relaxed);
    block = nullptr;
}

inline unsigned setting(const char* name, unsigned otherwise) {
    const char* text = std::getenv(name);
    return text ? static_cast<unsigned>(std::atoi(text)) : otherwise;
}

// the words that every lane of the warp has brought; reading ends before anybody brings others
template <class Use>
UNWATCHED void exchange(const uint32_t* words, unsigned many, Use use) {
    uint64_t* desk = block->desk.data() + block->now / 32 * 32 * WORDS;
    for (unsigned i = 0; i < many; ++i) desk[lane() * WORDS + i] = words[i];
    meet(AT_WARP);
    use(desk);
    meet(AT_WARP);
}

}  // namespace emulated

inline emulated::Recorded emulated_launch;

inline void __syncthreads() { emulated::meet(emulated::AT_BLOCK); }

namespace pefast {

struct bf16 {
    uint16_t bits;
};
using fp16 = _Float16;

inline float widen(float value) { return value; }
inline float widen(bf16 value) { return __uint_as_float(static_cast<unsigned>(value.bits) << 16); }
inline float widen(fp16 value) { return value; }

inline void narrow(float value, float* to) { *to = value; }
inline void narrow(float value, fp16* to) { *to = static_cast<fp16>(value); }
inline void narrow(float value, bf16* to) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    // to the nearest, of two as near to the even one
    to->bits = value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline uint4 unchanging(const void* at) { return *static_cast<const uint4*>(at); }

inline float4 fresh(const float* at) { return *reinterpret_cast<const float4*>(at); }

template <class T>
float half_of(uint64_t pair, int which) {
    const uint16_t bits = static_cast<uint16_t>(pair >> 16 * which);
    T value;
    std::memcpy(&value, &bits, 2);
    return widen(value);
}

// lane 4g + t has x at [g, 2t], [g + 8, 2t], [g, 2t + 8], [g + 8, 2t + 8], and w at [g, 2t], [g, 2t + 8]; every place
// and its right neighbour
template <class T>
void multiply(float (&sums)[4], const unsigned (&x)[4], unsigned w0, unsigned w1, T) {
    const uint32_t words[6] = {x[0], x[1], x[2], x[3], w0, w1};
    emulated::exchange(words, 6, [&](const uint64_t* desk) {
        const int g = emulated::lane() / 4, t = emulated::lane() % 4;
        for (int i = 0; i < 4; ++i) {
            const int n = 2 * t + i % 2, lower = i / 2;
            float sum = 0;
            for (int k = 0; k < 16; ++k) {
                const uint64_t* row = desk + (g * 4 + k % 8 / 2) * emulated::WORDS;
                const uint64_t* column = desk + (n * 4 + k % 8 / 2) * emulated::WORDS;
                sum += half_of<T>(row[lower + k / 8 * 2], k % 2) * half_of<T>(column[4 + k / 8], k % 2);
            }
            sums[i] += sum;
        }
    });
}

inline float4 of_lane(const uint4& own, int lane) {
    uint4 found;
    emulated::exchange(&own.x, 4, [&](const uint64_t* desk) {
        desk += lane * emulated::WORDS;
        for (unsigned* word : {&found.x, &found.y, &found.z, &found.w})
            *word = static_cast<unsigned>(*desk++);
    });
    return {__uint_as_float(found.x), __uint_as_float(found.y), __uint_as_float(found.z),
            __uint_as_float(found.w)};
}

inline float of_four(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    emulated::exchange(&word, 1, [&](const uint64_t* desk) {
        desk += emulated::lane() / 4 * 4 * emulated::WORDS;
        const auto from = [&](unsigned lane) {
            return __uint_as_float(static_cast<unsigned>(desk[lane * emulated::WORDS]));
        };
        // the pairs that shuffles by 1 and then by 2 make
        const unsigned t = emulated::lane() % 4;
        value = (from(t) + from(t ^ 1)) + (from(t ^ 2) + from(t ^ 3));
    });
    return value;
}

inline unsigned add_one(unsigned* count) { return __atomic_fetch_add(count, 1, __ATOMIC_ACQ_REL); }

inline void await(const unsigned* count, unsigned far) {
    using emulated::launched;
    if (__atomic_load_n(count, __ATOMIC_ACQUIRE) >= far) return;
    launched->waiting.fetch_add(1, std::memory_order_relaxed);
    unsigned alone = 0;
    while (__atomic_load_n(count, __ATOMIC_ACQUIRE) < far) {
        sched_yield();
        alone = launched->waiting.load() == launched->running.load() ? alone + 1 : 0;
        if (alone > 1000) emulated::die("every block that runs waits for one that does not");
    }
    launched->waiting.fetch_sub(1, std::memory_order_relaxed);
}

template <class Step>
int launch(void (*kernel)(Step), int64_t blocks, int threads, const Step& step, void*) {
    static_assert(sizeof(Step) <= sizeof emulated_launch.step);
    if (emulated_launch.wanted) {
        emulated_launch.blocks = blocks, emulated_launch.threads = threads,
        emulated_launch.bytes = sizeof(Step);
        std::memcpy(emulated_launch.step, &step, sizeof(Step));
        return cudaSuccess;
    }
    emulated::Grid grid;
    grid.kernel = [&] { kernel(step); };
    grid.blocks = static_cast<unsigned>(blocks);
    grid.backwards = emulated::setting("EMULATED_ORDER", 0);
    emulated::launched = &grid;
    grid.running = emulated::setting("EMULATED_BLOCKS", 2);
    std::vector<std::thread> team;
    for (unsigned i = grid.running; i > 0; --i) team.emplace_back(emulated::work, threads);
    for (std::thread& thread : team) thread.join();
    return cudaSuccess;
}

}  // namespace pefast
