// The dropout kernel for AVX-512: 32 columns at a time under one mask, the ragged end under a shorter one.
#include <immintrin.h>

#include "dropout.h"

namespace pefast {
namespace {

// 32 numbers of a type, widened. bf16: the even columns, then the odd ones, for that needs no shuffle; others in order
struct Floats {
    __m512 a, b;
};
struct Doubles {
    __m512d v[4];
};

inline __mmask16 low(__mmask32 mask) { return static_cast<__mmask16>(mask); }
inline __mmask16 high(__mmask32 mask) { return static_cast<__mmask16>(mask >> 16); }

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

inline Doubles load(const double* from, __mmask32 mask) {
    Doubles out;
    for (int i = 0; i < 4; ++i) {
        out.v[i] = _mm512_maskz_loadu_pd(static_cast<__mmask8>(mask >> 8 * i), from + 8 * i);
    }
    return out;
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

inline void store(double* to, __mmask32 mask, const Doubles& v) {
    for (int i = 0; i < 4; ++i)
        _mm512_mask_storeu_pd(to + 8 * i, static_cast<__mmask8>(mask >> 8 * i), v.v[i]);
}

inline Floats times(Floats v, double s) {
    const __m512 scale = _mm512_set1_ps(static_cast<float>(s));
    return {_mm512_mul_ps(v.a, scale), _mm512_mul_ps(v.b, scale)};
}

inline Doubles times(const Doubles& v, double s) {
    Doubles out;
    for (int i = 0; i < 4; ++i) out.v[i] = _mm512_mul_pd(v.v[i], _mm512_set1_pd(s));
    return out;
}

inline Floats plus(Floats v, Floats u) { return {_mm512_add_ps(v.a, u.a), _mm512_add_ps(v.b, u.b)}; }

inline Doubles plus(const Doubles& v, const Doubles& u) {
    Doubles out;
    for (int i = 0; i < 4; ++i) out.v[i] = _mm512_add_pd(v.v[i], u.v[i]);
    return out;
}

// which of the columns 32·w .. 32·w + 31 are among the first n
inline __mmask32 inside(int w, int64_t n) {
    const int64_t left = n - 32 * w;
    return left >= 32 ? ~0u : (1u << left) - 1;
}

// a dropped element is read as zero, so the product is +0 whatever x holds
template <class T>
inline void scale_kept(const T* x, T* x_hat, const __mmask32* keep, int64_t n, double scale) {
    for (int w = 0; 32 * w < n; ++w) {
        const __mmask32 in = inside(w, n);
        store(x_hat + 32 * w, in, times(load(x + 32 * w, keep[w] & in), scale));
    }
}

template <class T>
inline void add_kept(const T* t, T* y, const __mmask32* keep, int64_t n, double scale) {
    for (int w = 0; 32 * w < n; ++w) {
        const __mmask32 kept = keep[w] & inside(w, n);
        store(y + 32 * w, kept, plus(load(y + 32 * w, kept), times(load(t + 32 * w, kept), scale)));
    }
}

template <class T>
void tiles_of(const Dropout& d, int64_t begin, int64_t end) {
    const T *x = static_cast<const T*>(d.x), *t = static_cast<const T*>(d.t);
    T *x_hat = static_cast<T*>(d.x_hat), *y = static_cast<T*>(d.y);
    const Draw draw = d.draw;
    const int64_t in_row = tiles_in_row(d.K);
    for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t row = tile / in_row, first = tile % in_row * TILE;
        const int64_t last = first + TILE < d.K ? first + TILE : d.K;
        for (int64_t col = first; col < last; col += 256) {
            const int64_t n = last - col < 256 ? last - col : 256;
            const uint32_t block = static_cast<uint32_t>(col / 128);
            __mmask32 keep[8];
            if (n > 128) {
                keep_256(draw, static_cast<uint32_t>(row), block, keep);
            } else {
                keep_128(draw, static_cast<uint32_t>(row), block, keep);
            }
            if (x) scale_kept(x + row * d.ldx + col, x_hat + row * d.K + col, keep, n, d.scale);
            if (t) add_kept(t + row * d.ldt + col, y + row * d.ldy + col, keep, n, d.scale);
        }
    }
}

}  // namespace

void dropout_tiles_avx512(const Dropout& d, Scalar type, int64_t begin, int64_t end) {
    switch (type) {
        case Scalar::fp32:
            return tiles_of<float>(d, begin, end);
        case Scalar::bf16:
            return tiles_of<bf16>(d, begin, end);
        case Scalar::fp16:
            return tiles_of<fp16>(d, begin, end);
        case Scalar::fp64:
            return tiles_of<double>(d, begin, end);
    }
}

}  // namespace pefast
