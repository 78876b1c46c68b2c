// What the forward and the backward pass of attention share on AMX: rows of heads, who sees whom, powers of two.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "attention_sight.h"
#include "delta_linear_amx.h"

namespace pefast::amx {

constexpr float LOG2_E = 1.44269504f;

// two rows of 16 in bf16, as the pairs of a packed factor
PEFAST_INLINE __m512i paired(__m512 even, __m512 odd) {
    const __m512i PAIRS = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23,
                                           7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(PAIRS, rounded(even, odd));
}

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
inline void copy_queries(const Attention<bf16>& a, const Heads<T>& t, int64_t b, int64_t g, int64_t begin,
                         bf16* to, int64_t ld) {
    int64_t head = g * (a.H / a.G) + begin / a.L, i = begin % a.L;
    for (int64_t r = begin; r < begin + 32; ++r, to += ld) {
        copy_row(r < a.group_rows() ? t.at(b, head, i) : nullptr, a.D, to);
        if (++i == a.L) i = 0, ++head;
    }
}

// Rows as they lie.
struct Lines {
    const bf16* data;
    int64_t ld, count;
};

// up to 32 rows of a group, from row `begin`: in place, or copied to room [32, ld] where they end one head and begin
// the next
template <class T>
inline Lines query_lines(const Attention<bf16>& a, const Heads<T>& t, int64_t b, int64_t g, int64_t begin,
                         bf16* room, int64_t ld) {
    const int64_t l = begin % a.L, rows = std::min<int64_t>(a.group_rows() - begin, 32);
    if (l + rows <= a.L) return {t.at(b, g * (a.H / a.G) + begin / a.L, l), t.row, rows};
    copy_queries(a, t, b, g, begin, room, ld);
    return {room, ld, 32};
}

// 32 keys of [prefix ; sequence] from key `begin`; past the last one zeros
inline void copy_keys(const Attention<bf16>& a, const Heads<const bf16>& prefix, const Heads<const bf16>& t,
                      int64_t b, int64_t g, int64_t begin, bf16* to, int64_t ld) {
    for (int64_t j = begin; j < begin + 32; ++j, to += ld) {
        const bf16* row = j < a.P ? prefix.at(b, g, j) : j < a.keys() ? t.at(b, g, j - a.P) : nullptr;
        copy_row(row, a.D, to);
    }
}

// 32 columns of a result for up to 32 queries, from sums [columns, queries] of which each query has its factor [2 x 16]
inline void store_queries(const Attention<bf16>& a, const Heads<bf16>& to, int64_t b, int64_t g,
                          int64_t begin, int64_t column, const float* sums, const __m512 by[2]) {
    const __mmask32 inside = first(a.D - column);
    const int64_t rows = std::min<int64_t>(a.group_rows() - begin, 32);
    int64_t head = g * (a.H / a.G) + begin / a.L, i = begin % a.L;
    for (int64_t half = 0; half * SIDE < rows; ++half) {
        // rounded before they are transposed: half as much to move
        __m512i v[16];
#pragma GCC unroll 16
        for (int64_t pair = 0; pair < 16; ++pair) {
            const float* at = sums + 2 * pair * STRIP + half * SIDE;
            v[pair] = paired(_mm512_mul_ps(_mm512_load_ps(at), by[half]),
                             _mm512_mul_ps(_mm512_load_ps(at + STRIP), by[half]));
        }
        transpose(v);
#pragma GCC unroll 16
        for (int64_t r = 0; r < 16; ++r) {
            if (half * SIDE + r >= rows) return;
            _mm512_mask_storeu_epi16(to.at(b, head, i) + column, inside, v[r]);
            if (++i == a.L) i = 0, ++head;
        }
    }
}

// The rows that come next, brought to the second cache a few at a time beside the work on these. Rows of heads lie far
// apart, so the processor does not foresee them: without this a third of backward was spent waiting at 8 x 12 x 128 x 64.
class Ahead {
  public:
    void clear() { pieces.clear(), rows = piece = row = 0; }

    // the rows of `count` heads from head h
    template <class T>
    void add(const Heads<T>& t, int64_t b, int64_t h, int64_t count, int64_t length, int64_t D) {
        if (!t.data) return;
        for (int64_t i = h; i < h + count; ++i) {
            const bool write = !std::is_const<T>::value;
            pieces.push_back({reinterpret_cast<const char*>(t.at(b, i, 0)), t.row * 2, length, D * 2, write});
            rows += length;
        }
    }

    // one of so many calls
    void share(int64_t calls) { each = parts(rows, std::max<int64_t>(calls, 1)); }

    void operator()() {
        for (int64_t n = 0; n < each && piece < static_cast<int64_t>(pieces.size()); ++n) {
            const Piece& p = pieces[piece];
            const char* at = p.data + row * p.stride;
            for (int64_t byte = 0; byte < p.bytes; byte += 64)
                p.write ? __builtin_prefetch(at + byte, 1, 2) : __builtin_prefetch(at + byte, 0, 2);
            if (++row == p.length) row = 0, ++piece;
        }
    }

  private:
    struct Piece {
        const char* data;
        int64_t stride, length, bytes;
        bool write;
    };
    std::vector<Piece> pieces;
    int64_t rows = 0, each = 0, piece = 0, row = 0;
};

}  // namespace pefast::amx
