// Philox 4x32-10 and the dropout mask made from it. The layout is written out in pefast/ops/dropout.py.
//
// One call answers for 128 consecutive columns of one row, a block: columns 128·block .. 128·block + 127.
// 16 counters (lanes) give 4 words each; word w of lane l holds columns 32·w + 2·l (low half) and 32·w + 2·l + 1
// (high half), so a register of 16 words is 32 neighbouring columns and nothing is shuffled.
//
//     const Draw draw = make_draw(p, seed, stream);
//     __mmask32 keep[4];
//     for (int64_t block = 0; block * 128 < K; ++block) {
//         keep_128(draw, row, block, keep);
//         // keep[w] says which of the columns 128·block + 32·w + 0..31 live: maskz_loadu_epi16(keep[w], x + ...)
//     }
//
// Columns beyond K get bits too: mask them. Copy a Draw that lies in memory to a local first: a store to x̂ might
// otherwise change it, and a tenth of the multiplications stays in the loop. In an anonymous namespace: each
// translation unit compiles its own copy with its own instruction set. Files named _avx512 or _amx have the
// __mmask32 form, others get 128 words of 0xffff or 0.
//
// Paper: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// inlined always: only then are the products that row, stream and key fix lifted out of a loop over blocks
#define PEFAST_INLINE __attribute__((always_inline)) inline

namespace pefast {

// what fixes a mask
struct Draw {
    uint32_t key[2];     // the seed's halves, the low one first
    uint32_t stream;     // the segment in a layer; 0 for plain dropout
    uint32_t threshold;  // 16 random bits below it drop an element
};

namespace {

inline Draw make_draw(double p, int64_t seed, uint32_t stream) {
    const uint64_t bits = static_cast<uint64_t>(seed);
    const double steps = std::nearbyint(p * 65536);
    const uint32_t threshold = steps > 65535 ? 65535 : static_cast<uint32_t>(steps);
    return {{static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)}, stream, threshold};
}

constexpr uint32_t PHILOX_M0 = 0xD2511F53, PHILOX_M1 = 0xCD9E8D57, PHILOX_W0 = 0x9E3779B9,
                   PHILOX_W1 = 0xBB67AE85;

// c is the counter before and the random words after
PEFAST_INLINE void philox(uint32_t c[4], uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = static_cast<uint64_t>(PHILOX_M0) * c[0],
                       p1 = static_cast<uint64_t>(PHILOX_M1) * c[2];
        c[0] = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ key0;
        c[1] = static_cast<uint32_t>(p1);
        c[2] = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ key1;
        c[3] = static_cast<uint32_t>(p0);
        key0 += PHILOX_W0, key1 += PHILOX_W1;
    }
}

#if defined(__AVX512BW__)

// a * m of 16 lanes, as its high and low words
inline void multiply(__m512i a, __m512i m, __m512i& high, __m512i& low) {
    const __m512i even = _mm512_mul_epu32(a, m), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), m);
    high = _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_CDAB);
    low = _mm512_mask_shuffle_epi32(even, 0xaaaa, odd, _MM_PERM_CDAB);
}

// BLOCKS counters that do not wait for one another: one alone leaves a fifth of the multipliers' time unused
template <int BLOCKS>
PEFAST_INLINE void philox(__m512i c[BLOCKS][4], uint32_t key0, uint32_t key1) {
    const __m512i m0 = _mm512_set1_epi32(PHILOX_M0), m1 = _mm512_set1_epi32(PHILOX_M1);
    const int XOR3 = 0x96;
    for (int round = 0; round < 10; ++round) {
        for (int i = 0; i < BLOCKS; ++i) {
            __m512i high0, low0, high1, low1;
            multiply(c[i][0], m0, high0, low0);
            multiply(c[i][2], m1, high1, low1);
            c[i][0] = _mm512_ternarylogic_epi32(high1, c[i][1], _mm512_set1_epi32(key0), XOR3);
            c[i][1] = low1;
            c[i][2] = _mm512_ternarylogic_epi32(high0, c[i][3], _mm512_set1_epi32(key1), XOR3);
            c[i][3] = low0;
        }
        key0 += PHILOX_W0, key1 += PHILOX_W1;
    }
}

// keep[4·i + w] for block + i, i < BLOCKS
template <int BLOCKS>
PEFAST_INLINE void keep_blocks(const Draw& draw, uint32_t row, uint32_t block, __mmask32 keep[4 * BLOCKS]) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512i c[BLOCKS][4];
    for (int i = 0; i < BLOCKS; ++i) {
        c[i][0] = _mm512_add_epi32(_mm512_set1_epi32((block + i) * 16), lanes);
        c[i][1] = _mm512_set1_epi32(row);
        c[i][2] = _mm512_set1_epi32(draw.stream);
        c[i][3] = _mm512_setzero_si512();
    }
    philox<BLOCKS>(c, draw.key[0], draw.key[1]);
    const __m512i threshold = _mm512_set1_epi16(draw.threshold);
    for (int w = 0; w < 4 * BLOCKS; ++w) keep[w] = _mm512_cmpge_epu16_mask(c[w / 4][w % 4], threshold);
}

PEFAST_INLINE void keep_128(const Draw& draw, uint32_t row, uint32_t block, __mmask32 keep[4]) {
    keep_blocks<1>(draw, row, block, keep);
}

// two blocks at once, 128·block .. 128·block + 255, in about 1.7 times the time of one
PEFAST_INLINE void keep_256(const Draw& draw, uint32_t row, uint32_t block, __mmask32 keep[8]) {
    keep_blocks<2>(draw, row, block, keep);
}

#elif defined(__AVX2__)

inline void multiply(__m256i a, __m256i m, __m256i& high, __m256i& low) {
    const __m256i even = _mm256_mul_epu32(a, m), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), m);
    high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}

PEFAST_INLINE void philox(__m256i c[4], uint32_t key0, uint32_t key1) {
    const __m256i m0 = _mm256_set1_epi32(PHILOX_M0), m1 = _mm256_set1_epi32(PHILOX_M1);
    for (int round = 0; round < 10; ++round) {
        __m256i high0, low0, high1, low1;
        multiply(c[0], m0, high0, low0);
        multiply(c[2], m1, high1, low1);
        c[0] = _mm256_xor_si256(_mm256_xor_si256(high1, c[1]), _mm256_set1_epi32(key0));
        c[1] = low1;
        c[2] = _mm256_xor_si256(_mm256_xor_si256(high0, c[3]), _mm256_set1_epi32(key1));
        c[3] = low0;
        key0 += PHILOX_W0, key1 += PHILOX_W1;
    }
}

// keep[i] is 0xffff or 0 for column 128·block + i
PEFAST_INLINE void keep_128(const Draw& draw, uint32_t row, uint32_t block, uint16_t keep[128]) {
    const __m256i lanes = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0),
                  threshold = _mm256_set1_epi16(draw.threshold);
    for (int half = 0; half < 2; ++half) {
        __m256i c[4] = {_mm256_add_epi32(_mm256_set1_epi32(block * 16 + half * 8), lanes),
                        _mm256_set1_epi32(row), _mm256_set1_epi32(draw.stream), _mm256_setzero_si256()};
        philox(c, draw.key[0], draw.key[1]);
        for (int w = 0; w < 4; ++w) {
            // unsigned >= there is none; the larger of the two is the bits themselves where they reach the threshold
            const __m256i lives = _mm256_cmpeq_epi16(_mm256_max_epu16(c[w], threshold), c[w]);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(keep + w * 32 + half * 16), lives);
        }
    }
}

#else

// keep[i] is 0xffff or 0 for column 128·block + i
PEFAST_INLINE void keep_128(const Draw& draw, uint32_t row, uint32_t block, uint16_t keep[128]) {
    for (uint32_t lane = 0; lane < 16; ++lane) {
        uint32_t c[4] = {block * 16 + lane, row, draw.stream, 0};
        philox(c, draw.key[0], draw.key[1]);
        for (int w = 0; w < 4; ++w) {
            keep[w * 32 + lane * 2] = (c[w] & 0xffff) >= draw.threshold ? 0xffff : 0;
            keep[w * 32 + lane * 2 + 1] = (c[w] >> 16) >= draw.threshold ? 0xffff : 0;
        }
    }
}

#endif

}  // namespace
}  // namespace pefast
