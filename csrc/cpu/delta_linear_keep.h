// The mask of dropout for a block of rows, one row of 128 columns at a time, so that it can be made beside tile products.
//
// The counter of an element is (column, row, stream, 0), so the first rounds of Philox see columns and rows apart:
// round 0 multiplies the columns once for all rows, rounds 1 and 2 multiply one word that only the columns know.
// That leaves 7½ of 10 rounds for each row: 18 ns instead of 24 for 128 columns. The bits are those of philox.h.
#pragma once

#include <algorithm>

#include "philox.h"

namespace pefast::amx {

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

    // the next row of 128 columns, if any is left
    void step() {
        if (row == count) {
            if (done() || count == 0) return;
            if (mask == last)
                ++block, mask = 0;
            else
                ++mask;
            row = 0;
            columns_once();
        }
        store_row();
        ++row;
    }

    // what is left of the first so many blocks of 128 columns
    void finish(int64_t wanted) {
        if (count == 0) return;
        while (block + 1 < std::min(wanted, blocks) || ((mask < last || row < count) && block < wanted))
            step();
    }

    // whether no row is left
    bool done() const { return row == count && mask == last && block + 1 >= blocks; }

  private:
    uint32_t key(int word, uint32_t round) const {
        return draw.key[word] + round * (word ? PHILOX_W1 : PHILOX_W0);
    }

    static __m512i both(__m512i a, uint32_t b) { return _mm512_xor_si512(a, _mm512_set1_epi32(b)); }

    // the parts of rounds 0, 1 and 2 that no row changes
    void columns_once() {
        draw = all[mask], keep = base + mask * apart;
        const uint64_t product = static_cast<uint64_t>(PHILOX_M1) * draw.stream;
        stream_high = static_cast<uint32_t>(product >> 32), stream_low = static_cast<uint32_t>(product);
        const __m512i m0 = _mm512_set1_epi32(PHILOX_M0), m1 = _mm512_set1_epi32(PHILOX_M1);
        const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        __m512i high, low;
        multiply(_mm512_add_epi32(_mm512_set1_epi32(static_cast<uint32_t>(block * 16)), lanes), m0, high,
                 low);
        one = both(low, key(1, 1));
        multiply(both(high, key(1, 0)), m1, high, low);
        const __m512i word = both(high, stream_low ^ key(0, 1));
        two[0] = both(low, key(0, 2));
        multiply(word, m0, high, low);
        two[1] = both(high, key(1, 2)), two[2] = low;
    }

    void store_row() {
        const int XOR3 = 0x96;
        const __m512i m0 = _mm512_set1_epi32(PHILOX_M0), m1 = _mm512_set1_epi32(PHILOX_M1);
        const uint32_t number = first + static_cast<uint32_t>(row);
        const uint64_t product = static_cast<uint64_t>(PHILOX_M0) * (stream_high ^ number ^ key(0, 0));
        __m512i c[4], high0, low0, high1, low1;
        multiply(both(one, static_cast<uint32_t>(product >> 32)), m1, high1, low1);
        c[0] = _mm512_xor_si512(high1, two[0]), c[1] = low1;
        c[2] = both(two[1], static_cast<uint32_t>(product)), c[3] = two[2];
#pragma GCC unroll 7
        for (uint32_t round = 3; round < 10; ++round) {
            multiply(c[0], m0, high0, low0);
            multiply(c[2], m1, high1, low1);
            c[0] = _mm512_ternarylogic_epi32(high1, c[1], _mm512_set1_epi32(key(0, round)), XOR3);
            c[1] = low1;
            c[2] = _mm512_ternarylogic_epi32(high0, c[3], _mm512_set1_epi32(key(1, round)), XOR3);
            c[3] = low0;
        }
        const __m512i threshold = _mm512_set1_epi16(static_cast<int16_t>(draw.threshold));
        uint32_t* to = keep + row * ld + block * 4;
        for (int w = 0; w < 4; ++w) to[w] = _mm512_cmpge_epu16_mask(c[w], threshold);
    }

    const Draw* all = nullptr;
    Draw draw = {}, only = {};
    uint32_t first = 0, stream_high = 0, stream_low = 0;
    int64_t count = 0, blocks = 0, block = -1, mask = 0, last = 0, row = 0;
    uint32_t *base = nullptr, *keep = nullptr;
    int64_t ld = 0, apart = 0;
    __m512i one = {}, two[3] = {};  // words of the counter before rounds 1 and 3, short of the row's part
};

}  // namespace pefast::amx
