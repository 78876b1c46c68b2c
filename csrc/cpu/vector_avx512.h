// 32 numbers at a time with AVX-512: read and widened to fp32, rounded and written, the ragged end under a mask.
// For translation units compiled with AVX-512 alone; in an anonymous namespace, each has its own copy.
#pragma once

#include <immintrin.h>

#include "types.h"

namespace pefast {
namespace {

// 32 numbers, widened. bf16: the even columns, then the odd ones, for that needs no shuffle; others in order
struct Floats {
    __m512 a, b;
};

inline __mmask16 low(__mmask32 mask) { return static_cast<__mmask16>(mask); }
inline __mmask16 high(__mmask32 mask) { return static_cast<__mmask16>(mask >> 16); }

// which of the 16 numbers of each register are there, in the order that load gives a type
inline __mmask16 first_half(bf16, __mmask32 mask) {
    return static_cast<__mmask16>(_pext_u32(mask, 0x55555555));
}
inline __mmask16 second_half(bf16, __mmask32 mask) {
    return static_cast<__mmask16>(_pext_u32(mask, 0xaaaaaaaa));
}
inline __mmask16 first_half(float, __mmask32 mask) { return low(mask); }
inline __mmask16 second_half(float, __mmask32 mask) { return high(mask); }

// what the mask leaves out is read as zero and need not exist
inline Floats load(const float* from, __mmask32 mask) {
    return {_mm512_maskz_loadu_ps(low(mask), from), _mm512_maskz_loadu_ps(high(mask), from + 16)};
}

inline Floats load(const bf16* from, __mmask32 mask) {
    const __m512i bits = _mm512_maskz_loadu_epi16(mask, from);
    const __m512i odd = _mm512_and_si512(bits, _mm512_set1_epi32(0xffff0000));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)), _mm512_castsi512_ps(odd)};
}

inline Floats load(const fp16* from, __mmask32 mask) {
    const __m512i bits = _mm512_maskz_loadu_epi16(mask, from);
    return {_mm512_cvtph_ps(_mm512_castsi512_si256(bits)),
            _mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1))};
}

inline void store(float* to, __mmask32 mask, Floats v) {
    _mm512_mask_storeu_ps(to, low(mask), v.a);
    _mm512_mask_storeu_ps(to + 16, high(mask), v.b);
}

// to nearest, ties to even; by integers, for vcvtneps2bf16 makes subnormals zero. A NaN stays one: those that
// come of bf16 inputs have no low bits, so nothing carries
inline __m512i rounded_bf16(__m512 v) {
    const __m512i bits = _mm512_castps_si512(v), up = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    return _mm512_mask_add_epi32(up, odd, up, _mm512_set1_epi32(1));
}

inline void store(bf16* to, __mmask32 mask, Floats v) {
    const __m512i even = _mm512_srli_epi32(rounded_bf16(v.a), 16);
    _mm512_mask_storeu_epi16(to, mask, _mm512_mask_mov_epi16(even, 0xaaaaaaaa, rounded_bf16(v.b)));
}

inline void store(fp16* to, __mmask32 mask, Floats v) {
    const __m256i a = _mm512_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT);
    const __m256i b = _mm512_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT);
    _mm512_mask_storeu_epi16(to, mask, _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1));
}

}  // namespace
}  // namespace pefast
