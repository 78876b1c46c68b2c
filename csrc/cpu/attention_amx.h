// What the forward and the backward pass of attention share on AMX: rows of heads, who sees whom, powers of two.
#pragma once

#include <algorithm>
#include <vector>

#include "attention.h"
#include "delta_linear_amx.h"

namespace pefast::amx {

constexpr float LOG2_E = 1.44269504f;

// 2^x. The polynomial is off by 3e-6 of its value, a thousandth of a rounding step of bf16; a NaN stays one.
PEFAST_INLINE __m512 power_of_two(__m512 x) {
    const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 p = _mm512_set1_ps(0.0135341678f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.0520114601f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.241442755f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693003833f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.00000262f));
    // by 2^floor(x)
    return _mm512_scalef_ps(p, x);
}

// one row of D numbers, filled up with zeros to full steps; null: zeros alone
inline void copy_row(const bf16* from, int64_t D, bf16* to) {
    for (int64_t c = 0; c < D; c += STEP)
        _mm512_store_si512(to + c, _mm512_maskz_loadu_epi16(from ? first(D - c) : 0, from + c));
}

// 32 rows of a group, from row `begin`, each row of D numbers; past the last row zeros
template <class T>
inline void copy_queries(const Attention& a, const Heads<T>& t, int64_t b, int64_t g, int64_t begin, bf16* to,
                         int64_t ld) {
    int64_t head = g * (a.H / a.G) + begin / a.L, i = begin % a.L;
    for (int64_t r = begin; r < begin + 32; ++r, to += ld) {
        copy_row(r < a.group_rows() ? t.at(b, head, i) : nullptr, a.D, to);
        if (++i == a.L) i = 0, ++head;
    }
}

// 32 keys of [prefix ; sequence] from key `begin`; past the last one zeros
inline void copy_keys(const Attention& a, const Heads<const bf16>& prefix, const Heads<const bf16>& t,
                      int64_t b, int64_t g, int64_t begin, bf16* to, int64_t ld) {
    for (int64_t j = begin; j < begin + 32; ++j, to += ld) {
        const bf16* row = j < a.P ? prefix.at(b, g, j) : j < a.keys() ? t.at(b, g, j - a.P) : nullptr;
        copy_row(row, a.D, to);
    }
}

// Which of 32 keys a row sees.
class Sight {
  public:
    explicit Sight(const Attention& a) : a(a) {}

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

    // whether rows from query l on see all of 32 keys, by the sizes alone
    bool plain(int64_t l, int64_t j) const { return !a.mask && j + 32 <= limit(l + 1); }

  private:
    const Attention& a;
};

// the mask of dropout for one row of a group and 128 keys: 4 words
inline void keep_keys(const Attention& a, int64_t b, int64_t g, int64_t r, int64_t block, uint32_t* keep) {
    const int64_t row = (b * a.H + g * (a.H / a.G)) * a.L + r;
    keep_128(a.draw, static_cast<uint32_t>(row), static_cast<uint32_t>(block), keep);
}

}  // namespace pefast::amx
