// fp32 numbers as sums of P bf16 parts: split, packed for tiles, multiplied. Why: delta_linear_fp32.h.
//
// A left factor lies in P planes of rows. A right factor is packed as in pack.h, each step of a strip with its parts
// one after the other: [strips, steps, P, 2, 512].
#pragma once

#include <algorithm>

#include "delta_linear_amx.h"
#include "philox.h"

namespace pefast::amx {

// each part as the high half of 32 bits; the low half is zero
template <int P>
PEFAST_INLINE void split(__m512 v, __m512i (&part)[P]) {
    if (P == 1) {
        part[0] = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(v)), 16);
        return;
    }
    const __m512i top = _mm512_set1_epi32(0xffff0000);
    // the first part is cut off, so that it never becomes an infinity; the second is rounded, so that what is left
    // has no sign of its own: the products that are left out then add up to nothing
    part[0] = _mm512_and_si512(_mm512_castps_si512(v), top);
    const __m512 rest = _mm512_sub_ps(v, _mm512_castsi512_ps(part[0]));
    const __m512i up = _mm512_add_epi32(_mm512_castps_si512(rest), _mm512_set1_epi32(0x8000));
    part[1 % P] = _mm512_and_si512(up, top);
    part[2 % P] = _mm512_castps_si512(_mm512_sub_ps(rest, _mm512_castsi512_ps(part[1 % P])));
    part[2 % P] = _mm512_and_si512(part[2 % P], top);
}

inline __mmask16 half(__mmask32 mask, int which) { return static_cast<__mmask16>(mask >> 16 * which); }

// 32 numbers of a row, times a gain where there is one, their parts in order
template <int P>
PEFAST_INLINE void split_row(const float* x, __mmask32 inside, const float* gain, __m512i (&row)[P]) {
    const __m512i HIGH = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31,
                                          29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    __m512i left[P], right[P];
    __m512 low = _mm512_maskz_loadu_ps(half(inside, 0), x),
           high = _mm512_maskz_loadu_ps(half(inside, 1), x + 16);
    if (gain) {
        low = _mm512_mul_ps(low, _mm512_maskz_loadu_ps(half(inside, 0), gain));
        high = _mm512_mul_ps(high, _mm512_maskz_loadu_ps(half(inside, 1), gain + 16));
    }
    split<P>(low, left);
    split<P>(high, right);
    for (int p = 0; p < P; ++p) row[p] = _mm512_permutex2var_epi16(left[p], HIGH, right[p]);
}

// Planes of bf16 rows.
struct Planes {
    bf16* at;
    int64_t ld, plane;
    Planes row(int64_t r) const { return {at + r * ld, ld, plane}; }
};

// up to 32 rows, times gain [columns]; columns and rows filled up with zeros to full tiles
template <int P>
inline void split_rows(const float* x, int64_t ldx, int64_t rows, int64_t columns, Planes to,
                       const float* gain = nullptr) {
    for (int64_t r = 0; r < padded(rows, SIDE); ++r, x += ldx, to.at += to.ld)
        for (int64_t c = 0; c < columns; c += 32) {
            __m512i row[P];
            split_row<P>(x + c, r < rows ? first(columns - c) : 0, gain ? gain + c : nullptr, row);
            for (int p = 0; p < P; ++p) _mm512_store_si512(to.at + p * to.plane + c, row[p]);
        }
}

// two rows of 32 columns as pairs: one step of a strip, pair number `pair` of each of its tiles
template <int P>
PEFAST_INLINE void pair_parts(const float* even, __mmask32 even_mask, const float* odd, __mmask32 odd_mask,
                              bf16* tiles) {
    for (int side = 0; side < 2; ++side) {
        __m512i low[P], high[P];
        split<P>(_mm512_maskz_loadu_ps(half(even_mask, side), even + 16 * side), low);
        split<P>(_mm512_maskz_loadu_ps(half(odd_mask, side), odd + 16 * side), high);
        for (int p = 0; p < P; ++p)
            _mm512_storeu_si512(tiles + (2 * p + side) * TILE,
                                _mm512_or_si512(high[p], _mm512_srli_epi32(low[p], 16)));
    }
}

// src holds a term of all columns in a row: [terms, columns], rows ld apart
template <int P>
inline void pack_parts_along(const float* src, int64_t ld, int64_t terms, int64_t columns, bf16* tiles) {
    const __mmask32 inside = first(columns);
    for (int64_t row = 0; row < STEP; row += 2, src += 2 * ld, tiles += 32)
        pair_parts<P>(src, row < terms ? inside : 0, src + ld, row + 1 < terms ? inside : 0, tiles);
}

// src holds the terms of a column in a row: [columns, terms], rows ld apart
template <int P>
inline void pack_parts_across(const float* src, int64_t ld, int64_t terms, int64_t columns, bf16* tiles) {
    const __mmask32 inside = first(terms);
    for (int64_t side = 0; side < 2; ++side, tiles += TILE) {
        __m512i v[P][16];
        for (int64_t i = 0; i < 16; ++i) {
            const int64_t column = side * SIDE + i;
            __m512i row[P];
            split_row<P>(src + column * ld, column < columns ? inside : 0, nullptr, row);
            for (int p = 0; p < P; ++p) v[p][i] = row[p];
        }
        for (int p = 0; p < P; ++p) {
            transpose(v[p]);
            for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(tiles + 2 * p * TILE + i * 32, v[p][i]);
        }
    }
}

// strip number `strip` of a right factor [sum, columns]
template <int P, Terms TERMS>
inline void pack_parts(const float* src, int64_t ld, int64_t sum, int64_t columns, int64_t strip,
                       bf16* packed) {
    const int64_t steps = parts(sum, STEP), column = strip * STRIP;
    bf16* tiles = packed + strip * steps * 2 * TILE * P;
    for (int64_t step = 0; step < steps; ++step, tiles += 2 * TILE * P) {
        const int64_t term = step * STEP;
        if (TERMS == Terms::across)
            pack_parts_across<P>(src + column * ld + term, ld, sum - term, columns - column, tiles);
        else
            pack_parts_along<P>(src + term * ld + column, ld, sum - term, columns - column, tiles);
    }
}

// One summand of a product: up to 32 rows of a, and a strip.
struct PartFactors {
    Planes a;           // [P][rows, steps * 32]
    const bf16* strip;  // [steps, P, 2, 512]
    int64_t steps;
};

template <int ROWS>
PEFAST_INLINE void load_left(const bf16* a, int64_t lda) {
    _tile_stream_loadd(4, a, lda * 2);
    if (ROWS == 2) _tile_stream_loadd(5, a + SIDE * lda, lda * 2);
}

template <int COLUMNS>
PEFAST_INLINE void load_right(const bf16* b) {
    _tile_loadd(6, b, 64);
    if (COLUMNS == 2) _tile_loadd(7, b + TILE, 64);
}

template <int ROWS, int COLUMNS>
PEFAST_INLINE void multiply_loaded() {
    _tile_dpbf16ps(0, 4, 6);
    if (COLUMNS == 2) _tile_dpbf16ps(1, 4, 7);
    if (ROWS == 2) _tile_dpbf16ps(2, 5, 6);
    if (ROWS == 2 && COLUMNS == 2) _tile_dpbf16ps(3, 5, 7);
}

// sums += a times strip; beside() once a product of parts. All small products go before the first of the large ones,
// so that they are not rounded to steps of a large sum; sums had better begin as zeros for the same reason.
template <int P, int ROWS, int COLUMNS, class Beside = Nothing>
inline void accumulate_parts(const PartFactors& f, Beside&& beside = Beside()) {
    const bf16 *a = f.a.at, *b = f.strip;
    const int64_t lda = f.a.ld, plane = f.a.plane;
    if (P == 3) {
        for (int64_t step = 0; step < f.steps; ++step, a += STEP, b += 2 * TILE * P) {
            // each product but the first needs one new factor
            load_left<ROWS>(a + 2 * plane, lda), load_right<COLUMNS>(b);
            multiply_loaded<ROWS, COLUMNS>(), beside();
            load_left<ROWS>(a + plane, lda);
            multiply_loaded<ROWS, COLUMNS>(), beside();
            load_right<COLUMNS>(b + 2 * TILE);
            multiply_loaded<ROWS, COLUMNS>(), beside();
            load_left<ROWS>(a, lda);
            multiply_loaded<ROWS, COLUMNS>(), beside();
            load_right<COLUMNS>(b + 4 * TILE);
            multiply_loaded<ROWS, COLUMNS>(), beside();
        }
        a = f.a.at, b = f.strip;
    }
    for (int64_t step = 0; step < f.steps; ++step, a += STEP, b += 2 * TILE * P) {
        load_left<ROWS>(a, lda), load_right<COLUMNS>(b);
        multiply_loaded<ROWS, COLUMNS>(), beside();
    }
}

// products of parts in one step, and how many of them come in the first walk
template <int P>
constexpr int64_t PRODUCTS = P == 3 ? 6 : 1;
template <int P>
constexpr int64_t EARLY_PRODUCTS = P == 3 ? 5 : 1;

// sums [count], of which a block was stored, += block
inline void add_block(const float* block, int64_t count, float* sums) {
    for (int64_t i = 0; i < count; i += SIDE)
        _mm512_store_ps(sums + i, _mm512_add_ps(_mm512_load_ps(sums + i), _mm512_load_ps(block + i)));
}

// sums of up to 32 rows [columns / 32][32, 32] = or += a times a right factor [steps * 32, columns], of which a strip
// has so many numbers
template <int P>
inline void multiply_narrow_parts(const PartFactors& all, int64_t strip, int64_t rows, int64_t columns,
                                  bool first, float* sums) {
    alignas(64) float block[BLOCK];
    for (int64_t c = 0; c < columns; c += STRIP, sums += BLOCK)
        sized(rows, columns - c, [&](auto tall, auto wide) {
            constexpr int ROWS = decltype(tall)::value, COLUMNS = decltype(wide)::value;
            clear_sums<ROWS, COLUMNS>();
            accumulate_parts<P, ROWS, COLUMNS>({all.a, all.strip + c / STRIP * strip, all.steps});
            store_sums<ROWS, COLUMNS>(first ? sums : block);
            if (!first) add_block(block, ROWS * SIDE * STRIP, sums);
        });
}

// sums of up to 32 rows [columns / 32][32, 32] times a scale, in fp32 and in parts; no fp32 where to is null
template <int P>
inline void finish_narrow_parts(float* sums, int64_t rows, int64_t columns, float scale, float* to,
                                int64_t ld, Planes planes) {
    const __m512 s = _mm512_set1_ps(scale);
    for (int64_t c = 0; c < columns; c += STRIP, sums += BLOCK) {
        const __mmask32 inside = first(columns - c);
        for (int64_t r = 0; r < rows; ++r)
            for (int side = 0; side < 2; ++side) {
                float* at = sums + r * STRIP + side * SIDE;
                const __m512 v = _mm512_maskz_mul_ps(half(inside, side), _mm512_load_ps(at), s);
                _mm512_store_ps(at, v);
                if (to) _mm512_mask_storeu_ps(to + r * ld + c + side * SIDE, half(inside, side), v);
            }
        split_rows<P>(sums, STRIP, rows, STRIP, {planes.at + c, planes.ld, planes.plane});
    }
}

// up to 32 rows of planes [rows, columns] as 32 columns of their transposes [columns, ..]
template <int P>
inline void transpose_planes(Planes from, int64_t rows, int64_t columns, Planes to) {
    for (int p = 0; p < P; ++p)
        transpose_rows(from.at + p * from.plane, from.ld, rows, columns, to.at + p * to.plane, to.ld);
}

}  // namespace pefast::amx
