// What the forward and the backward pass of delta_linear share on AMX: threads, scratch memory, panels of rows.
#pragma once

#include <algorithm>
#include <vector>

#include "delta_linear.h"
#include "pack_tiles.h"
#include "team.h"

namespace pefast::amx {

// what(team) on every thread, each with its tiles
template <class What>
inline void together(int threads, const What& what) {
    on_threads(threads, [&](Team team) {
        const Tiles tiles;
        what(team);
    });
}

// Rows of a left factor.
struct Left {
    const bf16* at;
    int64_t ld;
    Left from(int64_t row) const { return {at + row * ld, ld}; }
};

// whether tiles can be read from rows as they lie: full steps, lines that start with a row
inline bool lies_right(const bf16* at, int64_t ld, int64_t columns) {
    return columns % STEP == 0 && ld % STEP == 0 && reinterpret_cast<uintptr_t>(at) % 64 == 0;
}

// 32 rows at most, columns and rows filled up with zeros to full tiles; four rows at a time, which are in four pages
inline void copy_rows(const bf16* x, int64_t ldx, int64_t rows, int64_t columns, bf16* to, int64_t ld) {
    for (int64_t r = 0; r < padded(rows, SIDE); r += 4, x += 4 * ldx, to += 4 * ld)
        for (int64_t c = 0; c < columns; c += 32)
            for (int64_t i = 0; i < 4; ++i) {
                const __mmask32 inside = r + i < rows ? first(columns - c) : 0;
                _mm512_store_si512(to + i * ld + c, _mm512_maskz_loadu_epi16(inside, x + i * ldx + c));
            }
}

// 32 sums in fp32, rounded
inline __m512i rounded(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// the first and the last 16 of 32 numbers, as fp32
inline __m512 widen_low(__m512i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(v)), 16));
}
inline __m512 widen_high(__m512i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(v, 1)), 16));
}

// h or dh of 32 rows, [rows, columns] with rows ld apart, as 32 columns of its transpose
inline void transpose_rows(const bf16* src, int64_t ld, int64_t rows, int64_t columns, bf16* to,
                           int64_t ld_to) {
    for (int64_t c = 0; c < columns; c += 32) {
        const __mmask32 inside = first(columns - c);
        __m512i low[16], high[16];
#pragma GCC unroll 16
        for (int64_t pair = 0; pair < 16; ++pair) {
            const bf16* row = src + 2 * pair * ld + c;
            const __m512i even = _mm512_maskz_loadu_epi16(2 * pair < rows ? inside : 0, row);
            const __m512i odd = _mm512_maskz_loadu_epi16(2 * pair + 1 < rows ? inside : 0, row + ld);
            pair_rows(even, odd, low[pair], high[pair]);
        }
        transpose(low);
#pragma GCC unroll 16
        for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + (c + i) * ld_to, low[i]);
        if (columns - c <= SIDE) continue;
        transpose(high);
#pragma GCC unroll 16
        for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + (c + SIDE + i) * ld_to, high[i]);
    }
}

// The mask of up to 32 rows of a left factor, and room [2, 32, 64] for the steps that it has been laid on.
struct Dropped {
    const uint32_t* keep;  // rows ld apart, a word for each step; null: every number lives
    int64_t ld;
    bf16* room;
};

// sums += a times the first 16 columns of a strip, or all 32: 16 as accumulate_in_turn
template <int ROWS, int COLUMNS>
inline void accumulate_narrow(const Factors& f) {
    COLUMNS == 1 ? accumulate_in_turn<ROWS>(f) : accumulate<ROWS, 2, Keep::rows>(f);
}

// the same with mask ⊙ a. Two steps are masked before the product of the two before them, for a tile is not loaded from
// lines that were stored a moment ago; all steps at once would push a out of the first cache.
template <int ROWS, int COLUMNS>
inline void accumulate_dropped(const Factors& f, const Dropped& dropped) {
    const auto room = [&](int64_t step) { return dropped.room + step / 2 % 2 * 2 * BLOCK; };
    const auto lay = [&](int64_t begin) {
        for (int64_t step = begin; step < std::min(begin + 2, f.steps); ++step) {
            const bf16* a = f.a + step * STEP;
            const uint32_t* keep = dropped.keep + step;
            bf16* to = room(step) + step % 2 * STEP;
            for (int64_t r = 0; r < ROWS * SIDE; ++r, a += f.lda, keep += dropped.ld, to += 2 * STEP)
                _mm512_store_si512(to, _mm512_maskz_loadu_epi16(*keep, a));
        }
    };
    lay(0);
    for (int64_t step = 0; step < f.steps; step += 2) {
        lay(step + 2);
        accumulate_narrow<ROWS, COLUMNS>(
            {room(step), 2 * STEP, f.strip + step * 2 * TILE, std::min<int64_t>(f.steps - step, 2)});
    }
}

// scale times up to 32 rows times a strip, plus c [32], rounded: a chunk of the waist. Columns past `columns` become zero.
inline void multiply_narrow(const Factors& all, const Dropped& dropped, int64_t rows, int64_t columns,
                            float scale, const float* c, float* sums, bf16* to, int64_t ld_to) {
    const __m512 s = _mm512_set1_ps(scale);
    const __m512 c_low = c ? _mm512_loadu_ps(c) : _mm512_setzero_ps(),
                 c_high = c ? _mm512_loadu_ps(c + SIDE) : _mm512_setzero_ps();
    // with 16 columns the even steps and the odd ones have sums of their own: a tile product waits for the one before it
    // on the same sums as long as three others take
    const bool split = columns <= SIDE;
    sized(rows, columns, [&](auto tall, auto wide) {
        constexpr int ROWS = decltype(tall)::value, COLUMNS = decltype(wide)::value;
        clear_sums<ROWS, 2>();
        dropped.keep ? accumulate_dropped<ROWS, COLUMNS>(all, dropped)
                     : accumulate_narrow<ROWS, COLUMNS>(all);
        store_sums<ROWS, 2>(sums);
    });
    const __mmask32 inside = first(columns);
    for (int64_t r = 0; r < padded(rows, SIDE); ++r) {
        __m512 low = _mm512_load_ps(sums + r * STRIP), high = _mm512_load_ps(sums + r * STRIP + SIDE);
        if (split) low = _mm512_add_ps(low, high);
        const __m512i both = rounded(_mm512_fmadd_ps(low, s, c_low), _mm512_fmadd_ps(high, s, c_high));
        _mm512_store_si512(to + r * ld_to, _mm512_maskz_mov_epi16(inside, both));
    }
}

}  // namespace pefast::amx
