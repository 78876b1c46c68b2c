// Products of bf16 matrices on AMX: eight tile registers of 16 rows by 64 bytes, sums in fp32.
//
// The left factor lies in rows; 32 columns of it (64 bytes) are one step of the sum. The right factor is packed
// (pack.h): a strip is 32 of its columns, two tiles for each step. Up to 32 rows times a strip stay in tiles 0 to 3.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <type_traits>

#include "types.h"

namespace pefast::amx {

constexpr int64_t SIDE = 16;           // rows of a tile
constexpr int64_t STEP = 32;           // terms of the sum in one tile product
constexpr int64_t STRIP = 32;          // columns of a strip
constexpr int64_t TILE = 512;          // numbers in a tile of bf16
constexpr int64_t BLOCK = 32 * STRIP;  // numbers in four tiles of sums

inline int64_t parts(int64_t length, int64_t size) { return (length + size - 1) / size; }
inline int64_t padded(int64_t length, int64_t size) { return parts(length, size) * size; }

// rows an odd number of cache lines apart never share a set of the first cache; at 24 lines apart they do, and a
// product over K=768 ran at 2.05 instead of 2.32 TFLOP/s
inline int64_t spread(int64_t columns) { return (parts(columns, STEP) | 1) * STEP; }

// Tile registers belong to a thread: each one that multiplies holds one of these.
class Tiles {
  public:
    Tiles() {
        alignas(64) struct {
            uint8_t palette = 1, start = 0, zero[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

// Which factor the first cache keeps while the other passes by.
enum class Keep { strip, rows };

// One summand of a product: up to 32 rows of a, and a strip.
struct Factors {
    const bf16* a;  // [rows, steps * 32]  rows lda apart
    int64_t lda;
    const bf16* strip;  // [steps, 2, 512]
    int64_t steps;
};

inline Factors but_first_step(const Factors& f) {
    return {f.a + STEP, f.lda, f.strip + 2 * TILE, f.steps - 1};
}

template <int ROWS, int COLUMNS>
inline void clear_sums() {
    _tile_zero(0);
    if (COLUMNS == 2) _tile_zero(1);
    if (ROWS == 2) _tile_zero(2);
    if (ROWS == 2 && COLUMNS == 2) _tile_zero(3);
}

// every row of the sums begins as start [32]; null: as zeros
template <int ROWS, int COLUMNS>
inline void begin_sums(const float* start) {
    if (!start) return clear_sums<ROWS, COLUMNS>();
    _tile_loadd(0, start, 0);
    if (COLUMNS == 2) _tile_loadd(1, start + SIDE, 0);
    if (ROWS == 2) _tile_loadd(2, start, 0);
    if (ROWS == 2 && COLUMNS == 2) _tile_loadd(3, start + SIDE, 0);
}

// c [32, 32] fp32
template <int ROWS, int COLUMNS>
inline void load_sums(const float* c) {
    _tile_loadd(0, c, STRIP * 4);
    if (COLUMNS == 2) _tile_loadd(1, c + SIDE, STRIP * 4);
    if (ROWS == 2) _tile_loadd(2, c + SIDE * STRIP, STRIP * 4);
    if (ROWS == 2 && COLUMNS == 2) _tile_loadd(3, c + SIDE * STRIP + SIDE, STRIP * 4);
}

template <int ROWS, int COLUMNS>
inline void store_sums(float* c) {
    _tile_stored(0, c, STRIP * 4);
    if (COLUMNS == 2) _tile_stored(1, c + SIDE, STRIP * 4);
    if (ROWS == 2) _tile_stored(2, c + SIDE * STRIP, STRIP * 4);
    if (ROWS == 2 && COLUMNS == 2) _tile_stored(3, c + SIDE * STRIP + SIDE, STRIP * 4);
}

// the streaming load leaves the other factor in the first cache: with the plain one 512 x 384 x 384 took 117 us instead
// of 98. Macros, for the number of a tile has to be a literal.
#define LOAD_ROWS(tile, at, stride)           \
    if constexpr (KEEP == Keep::strip)        \
        _tile_stream_loadd(tile, at, stride); \
    else                                      \
        _tile_loadd(tile, at, stride)
#define LOAD_STRIP(tile, at)           \
    if constexpr (KEEP == Keep::strip) \
        _tile_loadd(tile, at, 64);     \
    else                               \
        _tile_stream_loadd(tile, at, 64)

// The first step of a block of 32 rows and 32 columns, while the sums of the block before leave the tiles to `leaving`
// [32, 32]. Each tile is stored just before it is needed again: four stores at once cost a tenth of 12 steps, for no
// product is ready behind them. The sums begin as rows `stride` bytes apart (0: the same row); null: as zeros.
template <bool FROM, Keep KEEP>
inline void turn_over(const bf16* a, int64_t lda, const bf16* b, float* leaving, const float* from,
                      int64_t stride) {
    const float* lower = from + (FROM ? SIDE * stride / 4 : 0);
    LOAD_ROWS(4, a, lda * 2);
    LOAD_STRIP(6, b);
    _tile_stored(0, leaving, STRIP * 4);
    if (FROM)
        _tile_loadd(0, from, stride);
    else
        _tile_zero(0);
    _tile_dpbf16ps(0, 4, 6);
    LOAD_STRIP(7, b + TILE);
    _tile_stored(1, leaving + SIDE, STRIP * 4);
    if (FROM)
        _tile_loadd(1, from + SIDE, stride);
    else
        _tile_zero(1);
    _tile_dpbf16ps(1, 4, 7);
    LOAD_ROWS(5, a + SIDE * lda, lda * 2);
    _tile_stored(2, leaving + SIDE * STRIP, STRIP * 4);
    if (FROM)
        _tile_loadd(2, lower, stride);
    else
        _tile_zero(2);
    _tile_dpbf16ps(2, 5, 6);
    _tile_stored(3, leaving + SIDE * STRIP + SIDE, STRIP * 4);
    if (FROM)
        _tile_loadd(3, lower + SIDE, stride);
    else
        _tile_zero(3);
    _tile_dpbf16ps(3, 5, 7);
}

struct Nothing {
    void operator()() const {}
};

template <int COUNT>
using Count = std::integral_constant<int, COUNT>;

// beside(part) after each of the four products of a step, or beside() after the last one
template <int PART, class Beside>
__attribute__((always_inline)) inline void do_beside(Beside&& beside) {
    if constexpr (std::is_invocable_v<Beside&, Count<PART>>)
        beside(Count<PART>());
    else if constexpr (PART == 3)
        beside();
}

// sums += a times strip, and what is done beside it: tile products leave the vector units idle
template <int ROWS, int COLUMNS, Keep KEEP = Keep::strip, class Beside = Nothing>
__attribute__((always_inline)) inline void accumulate(const Factors& f, Beside&& beside = Beside()) {
    const int64_t stride = f.lda * 2;
    const bf16 *a = f.a, *b = f.strip;
    for (int64_t step = 0; step < f.steps; ++step, a += STEP, b += 2 * TILE) {
        LOAD_ROWS(4, a, stride);
        LOAD_STRIP(6, b);
        _tile_dpbf16ps(0, 4, 6);
        do_beside<0>(beside);
        if (COLUMNS == 2) {
            LOAD_STRIP(7, b + TILE);
            _tile_dpbf16ps(1, 4, 7);
        }
        do_beside<1>(beside);
        if (ROWS == 2) {
            LOAD_ROWS(5, a + SIDE * f.lda, stride);
            _tile_dpbf16ps(2, 5, 6);
        }
        do_beside<2>(beside);
        if (ROWS == 2 && COLUMNS == 2) _tile_dpbf16ps(3, 5, 7);
        do_beside<3>(beside);
    }
}

// sums += a times the first 16 columns of a strip, the even steps in tiles 0 and 2, the odd ones in 1 and 3
template <int ROWS>
inline void accumulate_in_turn(const Factors& f) {
    const int64_t stride = f.lda * 2;
    const bf16 *a = f.a, *b = f.strip;
    for (int64_t step = 0; step < f.steps; step += 2, a += 2 * STEP, b += 4 * TILE) {
        _tile_loadd(6, b, 64);
        _tile_loadd(4, a, stride);
        _tile_dpbf16ps(0, 4, 6);
        if (ROWS == 2) {
            _tile_loadd(5, a + SIDE * f.lda, stride);
            _tile_dpbf16ps(2, 5, 6);
        }
        if (step + 1 == f.steps) return;
        _tile_loadd(7, b + 2 * TILE, 64);
        _tile_loadd(4, a + STEP, stride);
        _tile_dpbf16ps(1, 4, 7);
        if (ROWS == 2) {
            _tile_loadd(5, a + SIDE * f.lda + STEP, stride);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
}

#undef LOAD_ROWS
#undef LOAD_STRIP

// what(tiles along rows, tiles along columns), each one or two, as compile-time numbers
template <class What>
inline void sized(int64_t rows, int64_t columns, What&& what) {
    if (rows > SIDE)
        columns > SIDE ? what(Count<2>(), Count<2>()) : what(Count<2>(), Count<1>());
    else
        columns > SIDE ? what(Count<1>(), Count<2>()) : what(Count<1>(), Count<1>());
}

}  // namespace pefast::amx
