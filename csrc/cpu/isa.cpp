#include "isa.h"

#include <atomic>
#include <cstdint>
#include <cstring>
#include <string>

#include "../check.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pefast {
namespace {

const char* const NAMES[] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__)

struct Registers {
    uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
    Registers r;
    __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
    return r;
}

bool has(uint32_t word, int bit) { return word >> bit & 1; }

// the register files that the operating system saves for us; inline, for the intrinsic needs -mxsave
uint64_t saved_state() {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return static_cast<uint64_t>(high) << 32 | low;
}

// Linux gives the tile registers only to a process that asked for them
bool tiles_granted() {
    const long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

Isa detect() {
    const uint64_t YMM = 0x6, ZMM = 0xe6, TILES = 0x60000;
    const Registers one = cpuid(1, 0), seven = cpuid(7, 0), more = cpuid(7, 1);
    const bool xsave = has(one.ecx, 27);
    const uint64_t state = xsave ? saved_state() : 0;
    Isa level = Isa::scalar;
#if defined(PEFAST_HAVE_AVX2)
    const bool fma = has(one.ecx, 12), f16c = has(one.ecx, 29), avx2 = has(seven.ebx, 5);
    if (!(fma && f16c && avx2 && (state & YMM) == YMM)) return level;
    level = Isa::avx2;
#if defined(PEFAST_HAVE_AVX512)
    const bool f = has(seven.ebx, 16), dq = has(seven.ebx, 17), bw = has(seven.ebx, 30),
               vl = has(seven.ebx, 31);
    if (!(f && dq && bw && vl && (state & ZMM) == ZMM)) return level;
    level = Isa::avx512;
#if defined(PEFAST_HAVE_AMX)
    if (!has(more.eax, 5)) return level;
    level = Isa::avx512_bf16;
    const bool bf16 = has(seven.edx, 22), tile = has(seven.edx, 24);
    if (bf16 && tile && (state & TILES) == TILES && tiles_granted()) level = Isa::amx;
#endif
#endif
#endif
    return level;
}

#else

Isa detect() { return Isa::scalar; }

#endif

std::atomic<Isa>& chosen() {
    static std::atomic<Isa> level{isa_levels().back()};
    return level;
}

}  // namespace

const char* isa_name(Isa level) { return NAMES[static_cast<int>(level)]; }

const std::vector<Isa>& isa_levels() {
    static const std::vector<Isa> levels = [] {
        std::vector<Isa> found;
        const int highest = static_cast<int>(detect());
        for (int level = 0; level <= highest; ++level) found.push_back(static_cast<Isa>(level));
        return found;
    }();
    return levels;
}

Isa isa() { return chosen().load(std::memory_order_relaxed); }

void use_isa(const char* name) {
    Isa wanted = isa_levels().back();
    bool found = !*name;
    std::string can;
    for (Isa level : isa_levels()) {
        can += std::string(can.empty() ? "" : ", ") + isa_name(level);
        if (!std::strcmp(name, isa_name(level))) wanted = level, found = true;
    }
    check(found, "PEFAST_ISA: '", name, "' does not run here; ", can, " would");
    chosen().store(wanted, std::memory_order_relaxed);
}

}  // namespace pefast
