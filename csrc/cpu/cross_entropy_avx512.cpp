// Softmax and loss of rows of logits with AVX-512: three walks along a row, which stays in L2.
#include <immintrin.h>

#include <cmath>
#include <initializer_list>

#include "cross_entropy.h"
#include "vector_avx512.h"

namespace pefast {
namespace {

// e^x for x <= 0, to 1e-7 of its value; below e^-87 it is a subnormal or zero, a NaN stays one
inline __m512 exponential(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    // ln 2 in two parts, so that n times the first is exact
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
    __m512 p = _mm512_set1_ps(1.0f / 5040);
    for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    return _mm512_scalef_ps(p, n);
}

inline __mmask32 inside(int64_t left) { return left >= 32 ? ~0u : (1u << left) - 1; }

template <class T>
void row(T* z, int64_t target, float* loss, int64_t V) {
    const __m512 lowest = _mm512_set1_ps(-INFINITY);
    const float z_t = widen(z[target]);

    __m512 top = lowest;
    for (int64_t c = 0; c < V; c += 32) {
        const __mmask32 in = inside(V - c);
        const Floats v = load(z + c, in);
        // what is not there is read as zero and must not be the largest
        const bool whole = in == ~0u;
        top = _mm512_max_ps(top, whole ? v.a : _mm512_mask_mov_ps(lowest, first_half(T{}, in), v.a));
        top = _mm512_max_ps(top, whole ? v.b : _mm512_mask_mov_ps(lowest, second_half(T{}, in), v.b));
    }
    const float largest = _mm512_reduce_max_ps(top);
    const __m512 shift = _mm512_set1_ps(largest);

    __m512 sum_a = _mm512_setzero_ps(), sum_b = _mm512_setzero_ps();
    for (int64_t c = 0; c < V; c += 32) {
        const __mmask32 in = inside(V - c);
        const Floats v = load(z + c, in);
        const __m512 a = exponential(_mm512_sub_ps(v.a, shift)), b = exponential(_mm512_sub_ps(v.b, shift));
        sum_a = _mm512_mask_add_ps(sum_a, first_half(T{}, in), sum_a, a);
        sum_b = _mm512_mask_add_ps(sum_b, second_half(T{}, in), sum_b, b);
    }
    const float sum = _mm512_reduce_add_ps(_mm512_add_ps(sum_a, sum_b));
    *loss = std::log(sum) - (z_t - largest);

    const __m512 part = _mm512_set1_ps(1 / sum);
    for (int64_t c = 0; c < V; c += 32) {
        const __mmask32 in = inside(V - c);
        const Floats v = load(z + c, in);
        store(z + c, in,
              {_mm512_mul_ps(exponential(_mm512_sub_ps(v.a, shift)), part),
               _mm512_mul_ps(exponential(_mm512_sub_ps(v.b, shift)), part)});
    }
    // from the logit again: 1 is taken from a weight that has not been rounded yet
    narrow(std::expm1(z_t - largest - std::log(sum)), &z[target]);
}

}  // namespace

void cross_entropy_rows_avx512(const CrossEntropy& call, Scalar type, int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
        if (type == Scalar::bf16)
            row(static_cast<bf16*>(call.z) + m * call.V, call.target[m], call.loss + m, call.V);
        else
            row(static_cast<float*>(call.z) + m * call.V, call.target[m], call.loss + m, call.V);
    }
}

}  // namespace pefast
