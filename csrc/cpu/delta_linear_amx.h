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

// 32 rows at most, columns and rows filled up with zeros to full tiles
inline void copy_rows(const bf16* x, int64_t ldx, int64_t rows, int64_t columns, bf16* to, int64_t ld) {
    for (int64_t r = 0; r < padded(rows, SIDE); ++r, x += ldx, to += ld)
        for (int64_t c = 0; c < columns; c += 32)
            _mm512_store_si512(to + c, _mm512_maskz_loadu_epi16(r < rows ? first(columns - c) : 0, x + c));
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

// The mask of up to 32 rows of a left factor, and room [4, 32, 32] for the steps that it has been laid on.
struct Dropped {
    const uint32_t* keep;  // rows ld apart, a word for each step; null: every number lives
    int64_t ld;
    bf16* room;
};

// sums += (mask ⊙ a) times the first 16 columns of a strip, or all 32: 16 as accumulate_in_turn. A step is masked two
// before its product, for a tile is not loaded from lines that were stored a moment ago; all steps at once would push
// a out of the first cache.
template <int ROWS, int COLUMNS>
inline void accumulate_dropped(const Factors& f, const Dropped& dropped) {
    const auto lay = [&](int64_t step) {
        const bf16* a = f.a + step * STEP;
        const uint32_t* keep = dropped.keep + step;
        bf16* to = dropped.room + step % 4 * BLOCK;
        for (int64_t r = 0; r < ROWS * SIDE; ++r, a += f.lda, keep += dropped.ld, to += STEP)
            _mm512_store_si512(to, _mm512_maskz_loadu_epi16(*keep, a));
    };
    const auto multiply = [&](int64_t step, auto turn) {
        const bf16 *a = dropped.room + step % 4 * BLOCK, *b = f.strip + step * 2 * TILE;
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        if (COLUMNS == 2) _tile_loadd(7, b + TILE, 64);
        if (ROWS == 2) _tile_loadd(5, a + SIDE * STEP, 64);
        if (COLUMNS == 2 || decltype(turn)::value == 0) {
            _tile_dpbf16ps(0, 4, 6);
            if (ROWS == 2) _tile_dpbf16ps(2, 5, 6);
            if (COLUMNS == 2) _tile_dpbf16ps(1, 4, 7);
            if (COLUMNS == 2 && ROWS == 2) _tile_dpbf16ps(3, 5, 7);
        } else {
            _tile_dpbf16ps(1, 4, 6);
            if (ROWS == 2) _tile_dpbf16ps(3, 5, 6);
        }
    };
    for (int64_t step = 0; step < std::min<int64_t>(f.steps, 2); ++step) lay(step);
    for (int64_t step = 0; step < f.steps; step += 2) {
        if (step + 2 < f.steps) lay(step + 2);
        multiply(step, Count<0>());
        if (step + 1 == f.steps) break;
        if (step + 3 < f.steps) lay(step + 3);
        multiply(step + 1, Count<1>());
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
        if (dropped.keep)
            accumulate_dropped<ROWS, COLUMNS>(all, dropped);
        else
            COLUMNS == 1 ? accumulate_in_turn<ROWS>(all) : accumulate<ROWS, 2, Keep::rows>(all);
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
