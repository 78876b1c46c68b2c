// Attention over random shapes against plain loops, in bf16 and fp32. How to build: tests/test_sanitizers.py.
#include "../cpu/attention.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "guarded.h"

using namespace pefast;

namespace {

// [batch, heads, rows, D] as it lies, or with heads between one another
template <class T>
Heads<T> laid(T* data, int64_t heads, int64_t rows, int64_t D, bool apart) {
    return {data, heads * rows * D, apart ? rows * D : D, apart ? D : heads * D};
}

bool sees(const AttentionForm& f, int64_t b, int64_t l, int64_t j) {
    if (f.causal && j > f.P + f.S - f.L + l) return false;
    return j < f.P || !f.mask || f.mask[b * f.mask_batch + l * f.mask_row + j - f.P];
}

bool kept(const AttentionForm& f, int64_t row, int64_t j) {
    uint32_t c[4] = {static_cast<uint32_t>(j / 128 * 16 + j % 32 / 2), static_cast<uint32_t>(row),
                     f.draw.stream, 0};
    philox(c, f.draw.key[0], f.draw.key[1]);
    return !f.dropout || (c[j % 128 / 32] >> (16 * (j % 2)) & 0xffff) >= f.draw.threshold;
}

// the formula of o, one number
template <class T>
double o_of(const Attention<T>& f, int64_t b, int64_t h, int64_t l, int64_t d) {
    const int64_t g = h / (f.H / f.G);
    double sum = 0, o = 0;
    for (int64_t j = 0; j < f.keys(); ++j) {
        if (!sees(f, b, l, j)) continue;
        const T *k = j < f.P ? f.prefix_k.at(b, g, j) : f.k.at(b, g, j - f.P), *q = f.q.at(b, h, l);
        double x = 0;
        for (int64_t i = 0; i < f.D; ++i) x += widen(q[i]) * static_cast<double>(widen(k[i]));
        const double w = std::exp(x * f.scale);
        sum += w;
        const T* v = j < f.P ? f.prefix_v.at(b, g, j) : f.v.at(b, g, j - f.P);
        if (kept(f, (b * f.H + h) * f.L + l, j)) o += w * f.keep_scale * widen(v[d]);
    }
    return sum == 0 ? 0 : o / sum;
}

template <class T>
bool one_case(double step) {
    AttentionForm form = {};
    form.B = any(1, 3), form.G = any(1, 2), form.H = form.G * any(1, 3), form.L = sized(1, 40, 200);
    form.S = form.L + (any(0, 1) ? sized(0, 20, 80) : 0), form.P = any(0, 1) ? any(1, 40) : 0,
    form.D = sized(1, 40, 100);
    const auto [B, H, G, L, S, P, D] =
        std::array<int64_t, 7>{form.B, form.H, form.G, form.L, form.S, form.P, form.D};
    const bool shared = any(0, 1), apart = any(0, 1);
    Guarded<T> q(B * H * L * D), k(B * G * S * D), v(B * G * S * D), d_o(B * H * L * D);
    Guarded<T> prefix_k((shared ? 1 : B) * G * P * D), prefix_v((shared ? 1 : B) * G * P * D);
    Guarded<uint8_t> mask(B * L * S);
    fill(q.at, B * H * L, D, D), fill(d_o.at, B * H * L, D, D);
    for (Guarded<T>* t : {&k, &v}) fill(t->at, B * G * S, D, D);
    for (Guarded<T>* t : {&prefix_k, &prefix_v}) fill(t->at, (shared ? 1 : B) * G * P, D, D);
    for (int64_t i = 0; i < B * L * S; ++i) mask[i] = any(0, 3) > 0;
    if (any(0, 1)) form.mask = mask.at, form.mask_batch = L * S, form.mask_row = S;
    form.causal = any(0, 1), form.scale = 1 / std::sqrt(static_cast<float>(D)), form.dropout = any(0, 1);
    const double p = form.dropout ? 0.3 : 0;
    form.draw = make_draw(p, any(0, 1 << 30), 0), form.keep_scale = 1 / (1 - p);
    const auto prefix = [&, G = G, P = P, D = D](T* at) {
        Heads<T> t = laid(P ? at : nullptr, G, P, D, true);
        if (shared) t.batch = 0;
        return t;
    };
    const auto read = [](const Heads<T>& t) { return Heads<const T>{t.data, t.batch, t.head, t.row}; };
    const Attention<T> call = {form,
                               read(laid(q.at, H, L, D, apart)),
                               read(laid(k.at, G, S, D, apart)),
                               read(laid(v.at, G, S, D, apart)),
                               read(prefix(prefix_k.at)),
                               read(prefix(prefix_v.at))};
    std::vector<std::vector<T>> first;
    for (int threads : {1, 2, 3}) {
        Guarded<T> o(B * H * L * D), dq(B * H * L * D), dk(B * G * S * D), dv(B * G * S * D);
        Guarded<T> dpk((shared ? 1 : B) * G * P * D), dpv((shared ? 1 : B) * G * P * D);
        Guarded<float> lse((sizeof(T) == 4 ? 2 : 1) * B * H * L);
        attention_forward(AttentionForward<T>{call, laid(o.at, H, L, D, apart), lse.at}, threads);
        attention_backward(
            AttentionBackward<T>{call, read(laid(o.at, H, L, D, apart)), read(laid(d_o.at, H, L, D, apart)),
                                 lse.at, laid(dq.at, H, L, D, apart), laid(dk.at, G, S, D, apart),
                                 laid(dv.at, G, S, D, apart), prefix(dpk.at), prefix(dpv.at)},
            threads);
        std::vector<std::vector<T>> now;
        for (const auto& [t, size] : {std::pair{&o, B * H * L * D},
                                      {&dq, B * H * L * D},
                                      {&dk, B * G * S * D},
                                      {&dv, B * G * S * D},
                                      {&dpk, (shared ? 1 : B) * G * P * D},
                                      {&dpv, (shared ? 1 : B) * G * P * D}})
            now.emplace_back(t->at, t->at + size);
        if (threads == 1) first = now;
        for (size_t i = 0; i < now.size(); ++i)
            for (size_t j = 0; j < now[i].size(); ++j)
                // a NaN, a number not written, is not itself
                if (!(widen(now[i][j]) == widen(first[i][j]))) return false;
    }
    const auto o = laid(first[0].data(), H, L, D, apart);
    for (int i = 0; i < 4; ++i) {
        const int64_t b = any(0, B - 1), h = any(0, H - 1), l = any(0, L - 1), d = any(0, D - 1);
        if (!(std::abs(widen(o.at(b, h, l)[d]) - o_of(call, b, h, l, d)) <= step)) return false;
    }
    return true;
}

}  // namespace

int main(int count, char** words) {
    const bool bf16_here = attention_here(Scalar::bf16), fp32_here = attention_here(Scalar::fp32);
    if (!fp32_here) return std::puts("no AVX-512 here: nothing was run"), 0;
    const int cases = count > 1 ? std::atoi(words[1]) : 100;
    for (int i = 0; i < cases; ++i)
        if (!(i % 2 && bf16_here ? one_case<bf16>(0.08) : one_case<float>(1e-4)))
            return std::printf("case %d is wrong\n", i), 1;
    std::printf("%d cases\n", cases);
}
