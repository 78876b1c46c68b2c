// Packing in registers: 32 terms of the sum by 32 columns become the two tiles of one step of a strip (pack.h).
#pragma once

#include "amx.h"
#include "registers_avx512.h"

namespace pefast::amx {

// two rows [32] become 32 pairs: columns 0 to 15, then 16 to 31
inline void pair_rows(__m512i even, __m512i odd, __m512i& low, __m512i& high) {
    const __m512i LOW = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7,
                                         38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i HIGH = _mm512_or_si512(LOW, _mm512_set1_epi16(16));
    low = _mm512_permutex2var_epi16(even, LOW, odd);
    high = _mm512_permutex2var_epi16(even, HIGH, odd);
}

// column(i), i < 32: the terms of a column, 32 numbers; one tile of 16 columns, or two
template <class Column>
inline void pack_columns(const Column& column, bf16* tiles, int64_t halves) {
    for (int64_t half = 0; half < halves; ++half, tiles += TILE) {
        __m512i v[16];
#pragma GCC unroll 16
        for (int64_t i = 0; i < 16; ++i) v[i] = column(half * SIDE + i);
        transpose(v);
#pragma GCC unroll 16
        for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(tiles + i * 32, v[i]);
    }
}

// term(i), i < 32: a term of all columns, 32 numbers; one tile of 16 columns, or two
template <class Term>
inline void pack_terms(const Term& term, bf16* tiles, int64_t halves) {
    for (int64_t pair = 0; pair < 16; ++pair) {
        __m512i low, high;
        pair_rows(term(2 * pair), term(2 * pair + 1), low, high);
        _mm512_storeu_si512(tiles + pair * 32, low);
        if (halves == 2) _mm512_storeu_si512(tiles + TILE + pair * 32, high);
    }
}

// src holds the terms of a column in a row: [columns, terms], rows ld apart
inline void pack_step_across(const bf16* src, int64_t ld, int64_t terms, int64_t columns, bf16* tiles) {
    const __mmask32 inside = first(terms);
    const auto column = [&](int64_t i) {
        return _mm512_maskz_loadu_epi16(i < columns ? inside : 0, src + i * ld);
    };
    pack_columns(column, tiles, 2);
}

// src holds a term of all columns in a row: [terms, columns], rows ld apart
inline void pack_step_along(const bf16* src, int64_t ld, int64_t terms, int64_t columns, bf16* tiles) {
    const __mmask32 inside = first(columns);
    const auto term = [&](int64_t i) {
        return _mm512_maskz_loadu_epi16(i < terms ? inside : 0, src + i * ld);
    };
    pack_terms(term, tiles, 2);
}

// Which way the terms of the sum run in the source.
enum class Terms { across, along };  // [columns, sum] and [sum, columns]

// strip number `strip` of a right factor [sum, columns]
template <Terms TERMS>
inline void pack_strip(const bf16* src, int64_t ld, int64_t sum, int64_t columns, int64_t strip,
                       bf16* packed) {
    const int64_t steps = parts(sum, STEP), column = strip * STRIP;
    bf16* tiles = packed + strip * steps * 2 * TILE;
    for (int64_t step = 0; step < steps; ++step, tiles += 2 * TILE) {
        const int64_t term = step * STEP;
        if (TERMS == Terms::across)
            pack_step_across(src + column * ld + term, ld, sum - term, columns - column, tiles);
        else
            pack_step_along(src + term * ld + column, ld, sum - term, columns - column, tiles);
    }
}

}  // namespace pefast::amx
