// The dropout kernel for AVX-512: 32 columns at a time under one mask, the ragged end under a shorter one.
#include <immintrin.h>

#include "dropout.h"
#include "vector_avx512.h"

namespace pefast {
namespace {

// 32 numbers in order
struct Doubles {
    __m512d v[4];
};

inline Doubles load(const double* from, __mmask32 mask) {
    Doubles out;
    for (int i = 0; i < 4; ++i) {
        out.v[i] = _mm512_maskz_loadu_pd(static_cast<__mmask8>(mask >> 8 * i), from + 8 * i);
    }
    return out;
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
