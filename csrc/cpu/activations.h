// The activations of a waist and their derivatives, 16 numbers at a time, in fp32: good to a thousandth of a rounding
// step of bf16. Their names and forms: pefast/eager/activations.py.
#pragma once

#include <immintrin.h>

#include "delta_linear.h"

namespace pefast::amx {

inline __m512 constant(float v) { return _mm512_set1_ps(v); }

// c[0] + c[1] x + c[2] x² ...
template <int COUNT>
inline __m512 polynomial(__m512 x, const float (&c)[COUNT]) {
    __m512 sum = constant(c[COUNT - 1]);
    for (int i = COUNT - 2; i >= 0; --i) sum = _mm512_fmadd_ps(sum, x, constant(c[i]));
    return sum;
}

inline __m512 exponential(__m512 x) {
    // past these it is 0 or infinity; a NaN, the second operand, stays
    x = _mm512_max_ps(constant(-104), _mm512_min_ps(constant(89), x));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, constant(1.44269504f)),
                                          _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, constant(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, constant(-2.12194440e-4f), r);
    const float C[] = {1.0f, 1.0f, 1.0f / 2, 1.0f / 6, 1.0f / 24, 1.0f / 120, 1.0f / 720};
    return _mm512_scalef_ps(polynomial(r, C), n);
}

// eˣ - 1; near zero by its series, where the subtraction would leave nothing
inline __m512 exponential_less_one(__m512 x) {
    const float C[] = {1.0f, 1.0f / 2, 1.0f / 6, 1.0f / 24, 1.0f / 120, 1.0f / 720};
    const __mmask16 near = _mm512_cmp_ps_mask(_mm512_abs_ps(x), constant(0.25f), _CMP_LT_OQ);
    const __m512 far = _mm512_sub_ps(exponential(x), constant(1));
    return _mm512_mask_mul_ps(far, near, x, polynomial(x, C));
}

// log(1 + e) for e >= 0
inline __m512 log_of_one_more(__m512 e) {
    const __m512 u = _mm512_add_ps(constant(1), e);
    // m in [0.75, 1.5)
    const __m512 m = _mm512_getmant_ps(u, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero);
    const __m512 n = _mm512_sub_ps(_mm512_getexp_ps(u), _mm512_getexp_ps(m));
    // log m = 2 atanh((m-1)/(m+1))
    const __m512 t = _mm512_div_ps(_mm512_sub_ps(m, constant(1)), _mm512_add_ps(m, constant(1)));
    const float C[] = {2.0f, 2.0f / 3, 2.0f / 5, 2.0f / 7, 2.0f / 9};
    const __m512 log_m = _mm512_mul_ps(t, polynomial(_mm512_mul_ps(t, t), C));
    const __m512 whole = _mm512_fmadd_ps(n, constant(0.69314718f), log_m);
    // what the sum 1 + e lost
    const __m512 back = _mm512_div_ps(e, _mm512_sub_ps(u, constant(1)));
    return _mm512_mask_mul_ps(e, _mm512_cmp_ps_mask(u, constant(1), _CMP_NEQ_UQ), whole, back);
}

inline __m512 logistic(__m512 z) {
    const __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), z));
    return _mm512_div_ps(constant(1), _mm512_add_ps(constant(1), e));
}

inline __m512 hyperbolic_tangent(__m512 z) {
    // beyond 10 it is 1 to the last bit
    const __m512 bound = _mm512_min_ps(constant(10), _mm512_max_ps(constant(-10), z));
    const __m512 e = exponential_less_one(_mm512_add_ps(bound, bound));
    return _mm512_div_ps(e, _mm512_add_ps(e, constant(2)));
}

// Φ(z), the share of a normal distribution below z. Abramowitz and Stegun, 7.1.26: off by 1.5e-7 at most
inline __m512 normal_share(__m512 z) {
    const __m512 x = _mm512_mul_ps(_mm512_abs_ps(z), constant(0.70710678f));
    const __m512 t = _mm512_div_ps(constant(1), _mm512_fmadd_ps(x, constant(0.3275911f), constant(1)));
    const float C[] = {0.0f, 0.254829592f, -0.284496736f, 1.421413741f, -1.453152027f, 1.061405429f};
    const __m512 e = exponential(_mm512_mul_ps(x, _mm512_sub_ps(_mm512_setzero_ps(), x)));
    const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(polynomial(t, C), e), constant(0.5f));
    const __mmask16 above = _mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_GE_OQ);
    return _mm512_mask_sub_ps(tail, above, constant(1), tail);
}

// Each has value(z) = σ(z) and slope(z) = σ'(z).

struct Relu {
    // the second operand where one is no number
    static __m512 value(__m512 z) { return _mm512_max_ps(_mm512_setzero_ps(), z); }
    static __m512 slope(__m512 z) {
        return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_NLE_UQ), constant(1));
    }
};

struct Gelu {
    static __m512 value(__m512 z) { return _mm512_mul_ps(z, normal_share(z)); }
    static __m512 slope(__m512 z) {
        const __m512 half = _mm512_mul_ps(_mm512_mul_ps(z, z), constant(-0.5f));
        const __m512 density = _mm512_mul_ps(exponential(half), constant(0.398942280f));
        return _mm512_fmadd_ps(z, density, normal_share(z));
    }
};

// z · logistic(g(z)), which tanh's form of gelu is too: ½(1 + tanh t) = logistic(2t)
template <class Gate>
struct Gated {
    static __m512 value(__m512 z) { return _mm512_mul_ps(z, logistic(Gate::value(z))); }
    static __m512 slope(__m512 z) {
        const __m512 gate = logistic(Gate::value(z)), rest = _mm512_sub_ps(constant(1), gate);
        const __m512 inner = _mm512_mul_ps(_mm512_mul_ps(z, Gate::slope(z)), rest);
        return _mm512_fmadd_ps(gate, inner, gate);
    }
};

struct Line {
    static __m512 value(__m512 z) { return z; }
    static __m512 slope(__m512) { return constant(1); }
};

struct SteepLine {
    static __m512 value(__m512 z) { return _mm512_mul_ps(z, constant(1.702f)); }
    static __m512 slope(__m512) { return constant(1.702f); }
};

// 2 √(2/π) (z + 0.044715 z³)
struct Cubic {
    static constexpr float BY = 1.59576912f;
    static __m512 value(__m512 z) {
        const __m512 square = _mm512_mul_ps(z, z);
        return _mm512_mul_ps(z, _mm512_fmadd_ps(square, constant(BY * 0.044715f), constant(BY)));
    }
    static __m512 slope(__m512 z) {
        return _mm512_fmadd_ps(_mm512_mul_ps(z, z), constant(BY * 3 * 0.044715f), constant(BY));
    }
};

struct Tanh {
    static __m512 value(__m512 z) { return hyperbolic_tangent(z); }
    static __m512 slope(__m512 z) {
        const __m512 t = hyperbolic_tangent(z);
        return _mm512_fnmadd_ps(t, t, constant(1));
    }
};

struct Sigmoid {
    static __m512 value(__m512 z) { return logistic(z); }
    static __m512 slope(__m512 z) {
        const __m512 s = logistic(z);
        return _mm512_fnmadd_ps(s, s, s);
    }
};

struct LeakyRelu {
    static __mmask16 below(__m512 z) { return _mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_LE_OQ); }
    static __m512 value(__m512 z) { return _mm512_mask_mul_ps(z, below(z), z, constant(0.01f)); }
    static __m512 slope(__m512 z) { return _mm512_mask_mov_ps(constant(1), below(z), constant(0.01f)); }
};

struct Elu {
    static __m512 value(__m512 z) {
        return _mm512_mask_mov_ps(z, LeakyRelu::below(z), exponential_less_one(z));
    }
    static __m512 slope(__m512 z) {
        return _mm512_mask_mov_ps(constant(1), LeakyRelu::below(z), exponential(z));
    }
};

struct Softplus {
    // past 20 it is z
    static __mmask16 far(__m512 z) { return _mm512_cmp_ps_mask(z, constant(20), _CMP_GT_OQ); }
    static __m512 value(__m512 z) {
        return _mm512_mask_mov_ps(log_of_one_more(exponential(_mm512_min_ps(constant(20), z))), far(z), z);
    }
    static __m512 slope(__m512 z) { return _mm512_mask_mov_ps(logistic(z), far(z), constant(1)); }
};

// z tanh(log(1 + eᶻ)), and tanh(log u) = (u² - 1) / (u² + 1)
struct Mish {
    static __m512 share(__m512 e) {
        const __m512 more = _mm512_mul_ps(e, _mm512_add_ps(e, constant(2)));
        return _mm512_div_ps(more, _mm512_add_ps(more, constant(2)));
    }
    static __m512 value(__m512 z) {
        return _mm512_mul_ps(z, share(exponential(_mm512_min_ps(constant(20), z))));
    }
    static __m512 slope(__m512 z) {
        const __m512 s = share(exponential(_mm512_min_ps(constant(20), z)));
        const __m512 rest = _mm512_fnmadd_ps(s, s, constant(1));
        return _mm512_fmadd_ps(_mm512_mul_ps(z, logistic(z)), rest, s);
    }
};

// what(Relu()) for Activation::relu, and so on; nothing for the identity
template <class What>
inline void with_activation(Activation activation, const What& what) {
    switch (activation) {
        case Activation::identity:
            return;
        case Activation::relu:
            return what(Relu());
        case Activation::gelu:
            return what(Gelu());
        case Activation::gelu_new:
            return what(Gated<Cubic>());
        case Activation::quick_gelu:
            return what(Gated<SteepLine>());
        case Activation::silu:
            return what(Gated<Line>());
        case Activation::tanh:
            return what(Tanh());
        case Activation::sigmoid:
            return what(Sigmoid());
        case Activation::leaky_relu:
            return what(LeakyRelu());
        case Activation::elu:
            return what(Elu());
        case Activation::softplus:
            return what(Softplus());
        case Activation::mish:
            return what(Mish());
    }
}

}  // namespace pefast::amx
