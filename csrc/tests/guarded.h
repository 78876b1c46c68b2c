// For the fuzzers: seeded random numbers, and arrays that end, or begin, at a page that may not be touched.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../cpu/isa.h"
#include "../cpu/philox.h"
#include "../cpu/types.h"

namespace pefast {
namespace {

// a long run in several: PEFAST_SEED=2 draws other cases
std::mt19937 generator(std::getenv("PEFAST_SEED") ? std::atoi(std::getenv("PEFAST_SEED")) : 1);

inline int64_t any(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

// a size: small, so that a case takes little time and edges are met often, and one time in sixteen up to the most
inline int64_t sized(int64_t low, int64_t small, int64_t most) { return any(low, any(0, 15) ? small : most); }

// numbers between two forbidden pages, against the one or the other
template <class T>
class Guarded {
  public:
    explicit Guarded(int64_t count) {
        const size_t PAGE = 4096, bytes = count * sizeof(T), room = (bytes + PAGE - 1) / PAGE * PAGE;
        size = room + 2 * PAGE;
        base = static_cast<char*>(mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        mprotect(base + PAGE, room, PROT_READ | PROT_WRITE);
        at = reinterpret_cast<T*>(base + PAGE + (any(0, 1) ? room - bytes : 0));
        std::memset(base + PAGE, 0xff, room);  // a NaN in every type
    }
    ~Guarded() { munmap(base, size); }
    Guarded(const Guarded&) = delete;
    Guarded& operator=(const Guarded&) = delete;
    T& operator[](int64_t i) { return at[i]; }

    T* at;

  private:
    char* base;
    size_t size;
};

// whether the numbers have the bits that they had the first time
template <class T>
bool same_bits(const Guarded<T>& got, int64_t count, std::vector<T>& first, bool begins) {
    if (begins) first.assign(got.at, got.at + count);
    return !count || !std::memcmp(got.at, first.data(), count * sizeof(T));
}

// normal numbers, drawn once: a case that draws its own spends half of its time there
inline const std::vector<float>& normal_numbers() {
    static const std::vector<float> numbers = [] {
        std::normal_distribution<float> normal;
        // a prime: rows of no usual length repeat one another
        std::vector<float> made(65521);
        for (float& number : made) number = normal(generator);
        return made;
    }();
    return numbers;
}

template <class T>
void fill(T* to, int64_t rows, int64_t columns, int64_t ld) {
    const std::vector<float>& numbers = normal_numbers();
    size_t next = any(0, numbers.size() - 1);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) {
            narrow(numbers[next], to + r * ld + c);
            if (++next == numbers.size()) next = 0;
        }
}

// whether dropout keeps an element: the formula, one number at a time
inline bool lives(const Draw& draw, int64_t m, int64_t k) {
    uint32_t c[4] = {static_cast<uint32_t>(k / 128 * 16 + k % 32 / 2), static_cast<uint32_t>(m), draw.stream,
                     0};
    philox(c, draw.key[0], draw.key[1]);
    return (c[k % 128 / 32] >> (16 * (k % 2)) & 0xffff) >= draw.threshold;
}

// main of kernels for AVX2 and AVX-512: so many cases on each that is there
template <class Case>
int on_both_levels(int count, char** words, const Case& one_case) {
    const int cases = count > 1 ? std::atoi(words[1]) : 100;
    for (int i = 0; i < cases; ++i)
        for (const char* level : {"avx2", "avx512"}) {
            bool there = false;
            for (Isa each : isa_levels()) there = there || !std::strcmp(isa_name(each), level);
            if (!there) continue;
            use_isa(level);
            if (!one_case()) return std::printf("case %d on %s is wrong\n", i, level), 1;
        }
    return std::printf("%d cases\n", cases), 0;
}

}  // namespace
}  // namespace pefast
