// The mask of dropout for a block of rows, one row of 128 columns at a time, so that it can be made beside tile products.
//
// The counter of an element is (column, row, stream, 0), so the first rounds of Philox see columns and rows apart:
// round 0 multiplies the columns once for all rows, rounds 1 and 2 multiply one word that only the columns know.
// That leaves 7½ of 10 rounds for each row: 18 ns instead of 24 for 128 columns. The bits are those of philox.h.
#pragma once

#include <algorithm>

#include "philox.h"

namespace pefast::amx {

// 16 lanes as those with an even number and those with an odd one, each in the low half of 64 bits, which is where
// a product reads them; what stands in the high halves is never looked at
struct Lanes {
    __m512i even, odd;
    Lanes() = default;
    Lanes(__m512i e, __m512i o) : even(e), odd(o) {}
    explicit Lanes(__m512i all) : even(all), odd(_mm512_srli_epi64(all, 32)) {}
    Lanes operator^(__m512i b) const { return {_mm512_xor_si512(even, b), _mm512_xor_si512(odd, b)}; }
    Lanes operator^(const Lanes& b) const {
        return {_mm512_xor_si512(even, b.even), _mm512_xor_si512(odd, b.odd)};
    }
    Lanes operator*(__m512i m) const { return {_mm512_mul_epu32(even, m), _mm512_mul_epu32(odd, m)}; }
    Lanes high() const { return {swapped(even), swapped(odd)}; }
    __m512i together() const { return _mm512_mask_shuffle_epi32(even, 0xaaaa, odd, _MM_PERM_CDAB); }
    static __m512i swapped(__m512i a) { return _mm512_shuffle_epi32(a, _MM_PERM_CDAB); }
};

class KeepRows {
  public:
    KeepRows() = default;
    KeepRows(const KeepRows&) = delete;

    // rows begin .. begin + rows - 1 of x [.., columns] for several masks; a row of one has 4 words for each 128
    // columns, and the masks lie `apart` words from each other
    void start(const Draw* draws, int64_t masks, int64_t begin, int64_t rows, int64_t columns, uint32_t* to,
               int64_t ld_to, int64_t apart_by) {
        all = draws, first = static_cast<uint32_t>(begin), count = masks ? rows : 0;
        blocks = (columns + 127) / 128, last = masks - 1;
        base = to, ld = ld_to, apart = apart_by, block = -1, mask = last, row = count;
    }

    // one mask
    void start(const Draw& d, int64_t begin, int64_t rows, int64_t columns, uint32_t* to, int64_t ld_to) {
        only = d;
        start(&only, 1, begin, rows, columns, to, ld_to, 0);
    }

    // A row of 128 columns on its way, so that tile products can stand between its rounds: each of them waits for the one
    // before it, and many that wait keep what comes behind them from being looked at.
    struct Row {
        Lanes c[4];
        uint32_t* to = nullptr;  // null: none is left
    };

    // the next row of 128 columns up to round 3
    PEFAST_INLINE Row begin() {
        Row made;
        if (row == count) {
            if (done()) return made;
            next_block();
        }
        const uint32_t number = first + static_cast<uint32_t>(row);
        const uint64_t product = static_cast<uint64_t>(PHILOX_M0) * (stream_high ^ number ^ key00);
        const Lanes r1 = (one ^ all16(static_cast<uint32_t>(product >> 32))) * all16(PHILOX_M1);
        made.c[0] = r1.high() ^ two[0], made.c[1] = r1;
        made.c[2] = two[1] ^ all16(static_cast<uint32_t>(product)), made.c[3] = two[2];
        made.to = keep + row++ * ld;
        return made;
    }

    template <int FROM, int TO>
    PEFAST_INLINE void rounds(Row& made) const {
        const __m512i m0 = all16(PHILOX_M0), m1 = all16(PHILOX_M1);
        Lanes* c = made.c;
#pragma GCC unroll 7
        for (int round = FROM; round < TO; ++round) {
            const Lanes r0 = c[0] * m0, r1 = c[2] * m1;
            c[0] = xor3(r1.high(), c[1], keys[0][round]), c[1] = r1;
            c[2] = xor3(r0.high(), c[3], keys[1][round]), c[3] = r0;
        }
    }

    PEFAST_INLINE void store(const Row& made) const {
        const __m512i limit = _mm512_set1_epi16(static_cast<int16_t>(threshold));
        for (int w = 0; w < 4; ++w) made.to[w] = _mm512_cmpge_epu16_mask(made.c[w].together(), limit);
    }

    // the next row of 128 columns, if any is left
    void step() {
        Row made = begin();
        if (!made.to) return;
        rounds<3, 10>(made);
        store(made);
    }

    // what is left of the first so many blocks of 128 columns
    void finish(int64_t wanted) {
        if (count == 0) return;
        while (block + 1 < std::min(wanted, blocks) || ((mask < last || row < count) && block < wanted))
            step();
    }

    // whether no row is left
    bool done() const { return count == 0 || (row == count && mask == last && block + 1 >= blocks); }

  private:
    static __m512i all16(uint32_t b) { return _mm512_set1_epi32(static_cast<int>(b)); }
    static Lanes xor3(const Lanes& a, const Lanes& b, __m512i c) {
        return {_mm512_ternarylogic_epi32(a.even, b.even, c, 0x96),
                _mm512_ternarylogic_epi32(a.odd, b.odd, c, 0x96)};
    }

    // the parts of rounds 0, 1 and 2 that no row changes
    __attribute__((noinline)) void next_block() {
        mask == last ? (++block, mask = 0) : ++mask;
        row = 0;
        const Draw& draw = all[mask];
        keep = base + mask * apart + block * 4, threshold = draw.threshold, key00 = draw.key[0];
        for (uint32_t round = 0; round < 10; ++round) {
            keys[0][round] = all16(draw.key[0] + round * PHILOX_W0);
            keys[1][round] = all16(draw.key[1] + round * PHILOX_W1);
        }
        const uint64_t product = static_cast<uint64_t>(PHILOX_M1) * draw.stream;
        stream_high = static_cast<uint32_t>(product >> 32);
        const __m512i m0 = all16(PHILOX_M0), m1 = all16(PHILOX_M1);
        const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const Lanes r0 = Lanes(_mm512_add_epi32(all16(static_cast<uint32_t>(block * 16)), lanes)) * m0;
        one = r0 ^ keys[1][1];
        const Lanes r1 = (r0.high() ^ keys[1][0]) * m1;
        two[0] = r1 ^ keys[0][2];
        const Lanes r2 =
            (r1.high() ^ _mm512_xor_si512(all16(static_cast<uint32_t>(product)), keys[0][1])) * m0;
        two[1] = r2.high() ^ keys[1][2], two[2] = r2;
    }

    const Draw* all = nullptr;
    Draw only = {};
    uint32_t first = 0, stream_high = 0, threshold = 0, key00 = 0;
    __m512i keys[2][10] =
        {};  // of each round in all lanes: spread again each time they cost a fifth of a row
    int64_t count = 0, blocks = 0, block = -1, mask = 0, last = 0, row = 0;
    uint32_t *base = nullptr, *keep = nullptr;
    int64_t ld = 0, apart = 0;
    Lanes one = {}, two[3] = {};  // words of the counter before rounds 1 and 3, short of the row's part
};

}  // namespace pefast::amx
