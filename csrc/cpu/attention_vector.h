// What the forward and the backward pass of attention in fp32 share on AVX-512: a product, exponentials, rows of heads.
//
// As on AMX (attention_amx.h) everything is computed transposed, keys down and 32 queries across, so that what belongs
// to a query is a lane of a vector. A product's left factor is read where it lies, number by number; its right factor
// is rows of 32.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <vector>

#include "attention_sight.h"
#include "team.h"

namespace pefast {
namespace {

constexpr int64_t LANES = 16, BLOCK = 32;  // queries in a register, and in a block
// keys between two looks at the largest x: x of a block stays in the first cache beside a part of k or v
constexpr int64_t KEYS = 128;

inline int64_t parts(int64_t length, int64_t size) { return (length + size - 1) / size; }
inline int64_t padded(int64_t length, int64_t size) { return parts(length, size) * size; }

// A left factor: number k of row r is at data[r * row + k * step].
struct Left {
    const float* data;
    int64_t row, step;
    Left below(int64_t rows) const { return {data + rows * row, row, step}; }
};

// up to 12 rows of 32 sums: 24 registers; three rows of the left factor share a pointer, for addresses are registers too
template <int ROWS, bool ADD>
PEFAST_INLINE void multiply_rows(Left a, const float* b, int64_t ldb, int64_t steps, float* c, int64_t ldc) {
    constexpr int POINTERS = (ROWS + 2) / 3;
    const float* at[POINTERS];
    __m512 sums[ROWS][2];
#pragma GCC unroll 4
    for (int i = 0; i < POINTERS; ++i) at[i] = a.data + 3 * i * a.row;
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
        sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    }
    for (int64_t k = 0; k < steps; ++k, b += ldb) {
        const __m512 low = _mm512_loadu_ps(b), high = _mm512_loadu_ps(b + LANES);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) {
            const __m512 one = _mm512_set1_ps(at[r / 3][r % 3 * a.row]);
            sums[r][0] = _mm512_fmadd_ps(one, low, sums[r][0]);
            sums[r][1] = _mm512_fmadd_ps(one, high, sums[r][1]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < POINTERS; ++i) at[i] += a.step;
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r, c += ldc) {
        _mm512_storeu_ps(c, ADD ? _mm512_add_ps(_mm512_loadu_ps(c), sums[r][0]) : sums[r][0]);
        _mm512_storeu_ps(c + LANES, ADD ? _mm512_add_ps(_mm512_loadu_ps(c + LANES), sums[r][1]) : sums[r][1]);
    }
}

// c [rows, 32] = a b, or with ADD c += a b. Long sums are made of short ones, which are off by less: in one chain dq
// of 80 keys was further from fp64 than PyTorch's.
template <int ROWS, bool ADD>
inline void multiply_steps(Left a, const float* b, int64_t ldb, int64_t steps, float* c, int64_t ldc) {
    const int64_t SHORT = 32, some = std::min(steps, SHORT);
    multiply_rows<ROWS, ADD>(a, b, ldb, some, c, ldc);
    for (int64_t k = some; k < steps; k += SHORT)
        multiply_rows<ROWS, true>({a.data + k * a.step, a.row, a.step}, b + k * ldb, ldb,
                                  std::min(steps - k, SHORT), c, ldc);
}

template <bool ADD>
inline void multiply(Left a, int64_t rows, const float* b, int64_t ldb, int64_t steps, float* c,
                     int64_t ldc) {
    int64_t r = 0;
    for (; r + 12 <= rows; r += 12) multiply_steps<12, ADD>(a.below(r), b, ldb, steps, c + r * ldc, ldc);
    for (; r + 4 <= rows; r += 4) multiply_steps<4, ADD>(a.below(r), b, ldb, steps, c + r * ldc, ldc);
    for (; r < rows; ++r) multiply_steps<1, ADD>(a.below(r), b, ldb, steps, c + r * ldc, ldc);
}

// e^x, off by less than 1e-7 of its value; far below zero 0, and a NaN stays one. Powers of two of x·log2 e would be off
// by as much as that product is rounded.
PEFAST_INLINE __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-200), x);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    // ln 2 in two parts, so that n times the first is exact
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
    __m512 p = _mm512_set1_ps(1.0f / 5040);
    for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    return _mm512_scalef_ps(p, n);
}

inline __mmask16 first_16(int64_t count) {
    return static_cast<__mmask16>(first(std::min<int64_t>(count, 16)));
}

// Keys or values of one key head side by side, [P + S, D]: where heads lie between one another, rows share a few sets of
// the first cache, and the product with v took twice as long.
inline void gather(const Attention<float>& a, const Heads<const float>& prefix, const Heads<const float>& t,
                   int64_t b, int64_t g, float* to) {
    for (int64_t j = 0; j < a.keys(); ++j, to += a.D)
        std::copy_n(j < a.P ? prefix.at(b, g, j) : t.at(b, g, j - a.P), a.D, to);
}

// 32 queries of a group from row `begin`; rows past the last are null
struct QueryBlock {
    int64_t b, g, begin, rows;

    template <class T>
    void pointers(const Attention<float>& a, const Heads<T>& t, T* (&to)[BLOCK]) const {
        int64_t head = g * (a.H / a.G) + begin / a.L, i = begin % a.L;
        for (int64_t r = 0; r < BLOCK; ++r) {
            to[r] = r < rows ? t.at(b, head, i) : nullptr;
            if (++i == a.L) i = 0, ++head;
        }
    }
};

// rows [32, D] to their transpose [ceil(D / 16) * 16, 32], and where asked for also as rows [32, ld] filled with zeros
inline void transpose_queries(const float* const (&rows)[BLOCK], int64_t D, float* across, float* copy,
                              int64_t ld) {
    for (int64_t d = 0; d < D; d += LANES)
        for (int64_t half = 0; half < 2; ++half) {
            __m512i v[16];
#pragma GCC unroll 16
            for (int64_t i = 0; i < LANES; ++i) {
                const float* row = rows[half * LANES + i];
                v[i] = _mm512_maskz_loadu_epi32(row ? first_16(D - d) : 0, row + d);
            }
            if (copy)
                for (int64_t i = 0; i < LANES; ++i)
                    _mm512_storeu_si512(copy + (half * LANES + i) * ld + d, v[i]);
            transpose(v);
#pragma GCC unroll 16
            for (int64_t i = 0; i < LANES; ++i)
                _mm512_storeu_si512(across + (d + i) * BLOCK + half * LANES, v[i]);
        }
}

// the transpose [D, 32] back to rows, each query with its factor
inline void store_queries(const float* across, int64_t D, const __m512 by[2], float* const (&rows)[BLOCK]) {
    for (int64_t d = 0; d < D; d += LANES)
        for (int64_t half = 0; half < 2; ++half) {
            __m512i v[16];
            for (int64_t i = 0; i < LANES; ++i) {
                const float* from = across + std::min(d + i, D - 1) * BLOCK + half * LANES;
                v[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_loadu_ps(from), by[half]));
            }
            transpose(v);
            for (int64_t i = 0; i < LANES; ++i)
                if (float* row = rows[half * LANES + i])
                    _mm512_mask_storeu_epi32(row + d, first_16(D - d), v[i]);
        }
}

}  // namespace
}  // namespace pefast
