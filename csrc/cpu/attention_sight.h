// Who sees whom in attention, and what dropout keeps. For translation units compiled with AVX-512.
#pragma once

#include <algorithm>

#include "attention.h"
#include "registers_avx512.h"

namespace pefast {
namespace {

enum class Seen { none, some, all };

// Which of 32 keys a row sees.
class Sight {
  public:
    explicit Sight(const AttentionForm& a) : a(a) {}

    // keys past this one no query before `end` of a head sees
    int64_t limit(int64_t end) const { return a.causal ? a.P + a.S - a.L + end : a.keys(); }

    // bit i: query l of batch row b sees key j + i
    uint32_t operator()(int64_t b, int64_t l, int64_t j) const {
        const uint32_t there = first(limit(l + 1) - j);
        if (!a.mask) return there;
        const uint32_t prefix = first(a.P - j);
        const __mmask32 asked = there & ~prefix;
        const uint8_t* at = a.mask + b * a.mask_batch + l * a.mask_row + j - a.P;
        const __m256i bytes = _mm256_maskz_loadu_epi8(asked, at);
        return (there & prefix) | _mm256_test_epi8_mask(bytes, bytes);
    }

    // what each of 32 rows of a group sees of 32 keys from key j; the words are written for Seen::some alone, but for
    // Seen::none they are 0 as well
    Seen look(int64_t b, int64_t begin, int64_t j, uint32_t* see) const {
        const int64_t rows = std::min<int64_t>(a.group_rows() - begin, 32);
        int64_t l = begin % a.L;
        // rows that end one head and begin the next hold the first query and the last
        const bool wraps = l + rows > a.L;
        if (!a.mask && j + 32 <= limit(wraps ? 1 : l + 1)) return Seen::all;
        std::fill_n(see, 32, 0u);
        if (j >= limit(wraps ? a.L : l + rows)) return Seen::none;
        uint32_t any = 0, every = ~0u;
        for (int64_t i = 0; i < rows; ++i) {
            see[i] = (*this)(b, l, j);
            any |= see[i], every &= see[i];
            if (++l == a.L) l = 0;
        }
        if (every == ~0u) return Seen::all;
        return any ? Seen::some : Seen::none;
    }

  private:
    const AttentionForm& a;
};

// the mask of dropout for one row of a group and 128 keys: 4 words
inline void keep_keys(const AttentionForm& a, int64_t b, int64_t g, int64_t r, int64_t block,
                      uint32_t* keep) {
    const int64_t row = (b * a.H + g * (a.H / a.G)) * a.L + r;
    keep_128(a.draw, static_cast<uint32_t>(row), static_cast<uint32_t>(block), keep);
}

}  // namespace
}  // namespace pefast
