// A register of fp32 numbers, of whatever width the translation unit is compiled for, read from fp32 or bf16 and
// rounded back. In an anonymous namespace: each unit has its own copy.
#pragma once

#include <immintrin.h>

#include "philox.h"
#include "types.h"

namespace pefast {
namespace {

#if defined(__AVX512BW__)

struct Vector {
    static constexpr int64_t WIDTH = 16, REGISTERS = 32;
    // which of the numbers are there: what is not is read as zero, is not written, and need not exist
    using Mask = __mmask16;
    __m512 v;

    static Mask first(int64_t count) {
        return count >= WIDTH ? 0xffff : static_cast<Mask>((1u << (count < 0 ? 0 : count)) - 1);
    }
    static Mask kept(const uint32_t* bits, int64_t column) {
        return static_cast<Mask>(bits[column / 32] >> column % 32);
    }
    static Mask both(Mask a, Mask b) { return a & b; }

    static Vector zero() { return {_mm512_setzero_ps()}; }
    static Vector all(float x) { return {_mm512_set1_ps(x)}; }
    static Vector load(const float* from) { return {_mm512_loadu_ps(from)}; }
    static Vector load(const float* from, Mask mask) { return {_mm512_maskz_loadu_ps(mask, from)}; }
    static Vector load(const bf16* from, Mask mask) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
    }
    void store(float* to) const { _mm512_storeu_ps(to, v); }
    void store(float* to, Mask mask) const { _mm512_mask_storeu_ps(to, mask, v); }
    void store(bf16* to, Mask mask) const {
        const __m512i bits = _mm512_castps_si512(v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        // rounding could carry a NaN into another number
        const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        const __m512i right = _mm512_mask_mov_epi32(up, nan, _mm512_set1_epi32(0x7fc00000));
        _mm256_mask_storeu_epi16(to, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(right, 16)));
    }
    static Vector plus_product(Vector a, Vector b, Vector sum) { return {_mm512_fmadd_ps(a.v, b.v, sum.v)}; }
    static Vector plus(Vector a, Vector b) { return {_mm512_add_ps(a.v, b.v)}; }
    static Vector times(Vector a, Vector b) { return {_mm512_mul_ps(a.v, b.v)}; }
    static Vector masked(Vector a, Mask mask) { return {_mm512_maskz_mov_ps(mask, a.v)}; }
};

// the mask of one row: a bit for each column, filled up to 128
inline void keep_row(const Draw& draw, uint32_t row, int64_t columns, uint32_t* bits) {
    for (int64_t block = 0; block * 128 < columns; ++block)
        keep_128(draw, row, static_cast<uint32_t>(block), reinterpret_cast<__mmask32*>(bits + 4 * block));
}

#else

struct Vector {
    static constexpr int64_t WIDTH = 8, REGISTERS = 16;
    // all bits of a number that is there: what is not is read as zero, is not written, and need not exist
    struct Mask {
        __m256i bits;
    };
    __m256 v;

    static Mask of(uint32_t bits) {
        const __m256i each = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
        return {_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), each), each)};
    }
    static Mask first(int64_t count) {
        return of(count >= WIDTH ? 0xff : (1u << (count < 0 ? 0 : count)) - 1);
    }
    static Mask kept(const uint32_t* bits, int64_t column) {
        return of(bits[column / 32] >> column % 32 & 0xff);
    }
    static Mask both(Mask a, Mask b) { return {_mm256_and_si256(a.bits, b.bits)}; }

    static Vector zero() { return {_mm256_setzero_ps()}; }
    static Vector all(float x) { return {_mm256_set1_ps(x)}; }
    static Vector load(const float* from) { return {_mm256_loadu_ps(from)}; }
    static Vector load(const float* from, Mask mask) { return {_mm256_maskload_ps(from, mask.bits)}; }
    static Vector load(const bf16* from, Mask mask) {
        alignas(16) uint16_t near[WIDTH] = {};
        const int there = _mm256_movemask_ps(_mm256_castsi256_ps(mask.bits));
        const uint16_t* source = &from->bits;
        if (there != 0xff)
            for (int i = 0; i < WIDTH; ++i)
                if (there >> i & 1) near[i] = source[i];
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(there == 0xff ? source : near));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
    }
    void store(float* to) const { _mm256_storeu_ps(to, v); }
    void store(float* to, Mask mask) const { _mm256_maskstore_ps(to, mask.bits, v); }
    void store(bf16* to, Mask mask) const {
        const __m256i bits = _mm256_castps_si256(v);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        // rounding could carry a NaN into another number
        const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
        const __m256i right = _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(nan));
        const __m256i high = _mm256_srli_epi32(right, 16);
        const __m128i rounded =
            _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
        const int there = _mm256_movemask_ps(_mm256_castsi256_ps(mask.bits));
        if (there == 0xff) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to), rounded);
            return;
        }
        alignas(16) uint16_t near[WIDTH];
        _mm_store_si128(reinterpret_cast<__m128i*>(near), rounded);
        for (int i = 0; i < WIDTH; ++i)
            if (there >> i & 1) to[i].bits = near[i];
    }
    static Vector plus_product(Vector a, Vector b, Vector sum) { return {_mm256_fmadd_ps(a.v, b.v, sum.v)}; }
    static Vector plus(Vector a, Vector b) { return {_mm256_add_ps(a.v, b.v)}; }
    static Vector times(Vector a, Vector b) { return {_mm256_mul_ps(a.v, b.v)}; }
    static Vector masked(Vector a, Mask mask) { return {_mm256_and_ps(a.v, _mm256_castsi256_ps(mask.bits))}; }
};

inline void keep_row(const Draw& draw, uint32_t row, int64_t columns, uint32_t* bits) {
    for (int64_t block = 0; block * 128 < columns; ++block) {
        uint16_t keep[128];
        keep_128(draw, row, static_cast<uint32_t>(block), keep);
        for (int word = 0; word < 4; ++word) {
            const __m256i *from = reinterpret_cast<const __m256i*>(keep + 32 * word),
                          low = _mm256_loadu_si256(from), high = _mm256_loadu_si256(from + 1);
            // the halves of each register are packed one by one
            const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xd8);
            bits[4 * block + word] = static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
        }
    }
}

#endif

}  // namespace
}  // namespace pefast
