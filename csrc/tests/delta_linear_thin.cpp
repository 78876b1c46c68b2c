// delta_linear's thin products beside a library's, over random shapes against plain loops. How to build:
// tests/test_sanitizers.py.
#include "../cpu/delta_linear_thin.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

#include "../cpu/isa.h"
#include "guarded.h"

using namespace pefast;

namespace {

// Sizes of one case, and its factors.
template <class T>
struct Case {
    int64_t M = sized(0, 40, 700), N = sized(1, 70, 600), K = sized(1, 100, 1200), R = sized(1, 20, 63);
    int64_t ldx = K + any(0, 1) * any(0, 40), lddy = N + any(0, 1) * any(0, 40);
    bool wild = !any(0, 4);
    double p = any(0, 1) ? 0.3 : 0;
    Guarded<T> x, dy, w;
    Guarded<float> a, b, bias;

    Case()
        : x(M ? (M - 1) * ldx + K : 0),
          dy(M ? (M - 1) * lddy + N : 0),
          w(N * K),
          a(R * K),
          b(N * R),
          bias(N) {
        fill(x.at, M, K, ldx), fill(dy.at, M, N, lddy), fill(w.at, N, K, K);
        fill(a.at, R, K, K), fill(b.at, N, R, R), fill(bias.at, 1, N, N);
        const float worst[] = {NAN, INFINITY, -INFINITY, 3.4e38f, 1e-42f, -0.0f};
        for (int i = 0; wild && M && i < 3; ++i)
            narrow(worst[any(0, 5)], &x[any(0, M - 1) * ldx + any(0, K - 1)]);
    }

    LowRank lora() const {
        return {a.at, b.at, R, 0.5f, p > 0, make_draw(p, 12345678901, 0), static_cast<float>(1 / (1 - p))};
    }

    double kept(int64_t m, int64_t k) const { return p ? lives(lora().draw, m, k) / (1 - p) : 1; }

    // the formula of y and of dx, one number each; h as the kernel stored it
    double y_of(int64_t m, int64_t n, const T* h) const {
        double y = 0;
        for (int64_t k = 0; k < K; ++k)
            y += widen(x.at[m * ldx + k]) * static_cast<double>(widen(w.at[n * K + k]));
        for (int64_t r = 0; r < R; ++r) y += 0.5 * widen(h[m * R + r]) * b.at[n * R + r];
        return y;
    }

    double dx_of(int64_t m, int64_t k) const {
        double dx = 0;
        for (int64_t n = 0; n < N; ++n) {
            double through = widen(w.at[n * K + k]);
            for (int64_t r = 0; r < R; ++r)
                through += kept(m, k) * 0.5 * b.at[n * R + r] * static_cast<double>(a.at[r * K + k]);
            dx += widen(dy.at[m * lddy + n]) * through;
        }
        return dx;
    }
};

// what was computed, close to the formula at some places and, where numbers are tame, nowhere left out
template <class T>
bool close(const Case<T>& c, Guarded<T>& y, Guarded<T>& h, Guarded<T>& dx, double bound) {
    for (int i = 0; c.M && !c.wild && i < 4; ++i) {
        const int64_t m = any(0, c.M - 1), n = any(0, c.N - 1), k = any(0, c.K - 1);
        const double size = 1 + std::sqrt(c.K) * (1 + std::sqrt(c.R)) * std::sqrt(c.N);
        if (!(std::abs(widen(y[m * c.N + n]) - c.y_of(m, n, h.at)) <= bound * size)) return false;
        if (!(std::abs(widen(dx[m * c.K + k]) - c.dx_of(m, k)) <= bound * size)) return false;
    }
    return true;
}

// left [M, count] times right [count, columns], its strides as given, in plain loops
template <class T>
std::vector<T> product(const T* left, int64_t ld, int64_t M, const T* right, int64_t stride_column,
                       int64_t stride_sum, int64_t columns, int64_t count) {
    std::vector<T> made(M * columns);
    std::vector<float> near(count);
    for (int64_t column = 0; column < columns; ++column) {
        for (int64_t i = 0; i < count; ++i) near[i] = widen(right[column * stride_column + i * stride_sum]);
        for (int64_t m = 0; m < M; ++m) {
            double sum = 0;
            for (int64_t i = 0; i < count; ++i) sum += widen(left[m * ld + i]) * static_cast<double>(near[i]);
            narrow(static_cast<float>(sum), &made[m * columns + column]);
        }
    }
    return made;
}

template <class T>
bool thin_case() {
    Case<T> c;
    std::vector<T> first[3];
    std::vector<float> first_a, first_b;
    // the library's products
    const std::vector<T> product_y = product(c.x.at, c.ldx, c.M, c.w.at, c.K, 1, c.N, c.K),
                         product_dx = product(c.dy.at, c.lddy, c.M, c.w.at, 1, c.K, c.K, c.N);
    for (int threads : {1, 2, 3, 5}) {
        Guarded<T> y(c.M * c.N), h(c.M * c.R), dx(c.M * c.K);
        Guarded<float> da(c.R * c.K), db(c.N * c.R);
        std::copy(product_y.begin(), product_y.end(), y.at),
            std::copy(product_dx.begin(), product_dx.end(), dx.at);
        const LowRank lora = c.lora();
        delta_linear_thin_forward<T>({c.M, c.N, c.K, c.x.at, c.ldx, lora, y.at, h.at}, threads);
        delta_linear_thin_backward<T>(
            {c.M, c.N, c.K, c.x.at, c.ldx, c.dy.at, c.lddy, h.at, lora, dx.at, da.at, db.at}, threads);
        if (threads == 1 && !close(c, y, h, dx, sizeof(T) == 2 ? 0.05 : 1e-5)) return false;
        const bool begins = threads == 1;
        if (!(same_bits(y, c.M * c.N, first[0], begins) && same_bits(h, c.M * c.R, first[1], begins) &&
              same_bits(dx, c.M * c.K, first[2], begins) && same_bits(da, c.R * c.K, first_a, begins) &&
              same_bits(db, c.N * c.R, first_b, begins)))
            return false;
        for (int64_t i = 0; !c.wild && i < c.N * c.R; ++i)
            if (!(db[i] == db[i])) return false;
    }
    return true;
}

}  // namespace

int main(int count, char** words) {
    return on_both_levels(count, words, [] { return any(0, 1) ? thin_case<float>() : thin_case<bf16>(); });
}
