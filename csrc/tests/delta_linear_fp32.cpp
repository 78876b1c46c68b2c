// delta_linear in fp32 by parts, one to three layers that read the same x, over random shapes against plain loops.
// How to build: tests/test_sanitizers.py.
#include "../cpu/delta_linear_fp32.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <list>
#include <vector>

#include "guarded.h"

using namespace pefast;

namespace {

// What all layers of a case share.
struct Shared {
    int64_t M = sized(0, 40, 700), K = sized(1, 100, 1200);
    int64_t ldx = K + any(0, 1) * any(0, 40);
    bool wild = !any(0, 4), has_dx = any(0, 7);
    int parts = any(0, 1) ? 1 : 3;
    Guarded<float> x{M ? (M - 1) * ldx + K : 0};

    Shared() {
        fill(x.at, M, K, ldx);
        const float worst[] = {NAN, INFINITY, -INFINITY, 3.4e38f, 1e-42f, -0.0f};
        for (int i = 0; wild && M && i < 3; ++i) x[any(0, M - 1) * ldx + any(0, K - 1)] = worst[any(0, 5)];
    }
};

// One layer: its factors, and what is asked for.
struct Layer {
    const Shared& s;
    int64_t N = sized(1, 70, 600), R = any(0, 9) ? sized(1, 20, 63) : 0;
    int64_t lddy = N + any(0, 1) * any(0, 40), seed = any(0, 1 << 30);
    bool given = !any(0, 3) || !R, has_gain = any(0, 1), has_bias = any(0, 1);
    // da or dh, db, dgain, dbias
    bool asked[4] = {R && any(0, 3), R && any(0, 3), has_gain && any(0, 1), !any(0, 1)};
    double p = any(0, 1) ? 0.3 : 0;
    Guarded<float> dy{s.M ? (s.M - 1) * lddy + N : 0}, w{N * s.K}, a{R * s.K}, b{N * R}, bias{N}, gain{N},
        waist{s.M * R};
    Guarded<bf16> for_y{fp32_packed_size(s.K, N, s.parts)}, for_dx{fp32_packed_size(N, s.K, s.parts)};

    explicit Layer(const Shared& shared) : s(shared) {
        fill(dy.at, s.M, N, lddy), fill(w.at, N, s.K, s.K), fill(a.at, R, s.K, s.K), fill(b.at, N, R, R);
        fill(bias.at, 1, N, N), fill(gain.at, 1, N, N), fill(waist.at, s.M, R, R);
        delta_linear_fp32_pack(w.at, 1, s.K, s.K, N, s.parts, for_y.at, static_cast<int>(any(1, 3)));
        delta_linear_fp32_pack(w.at, s.K, 1, N, s.K, s.parts, for_dx.at, static_cast<int>(any(1, 3)));
    }

    LowRank lora() const {
        return {given ? nullptr : a.at,         b.at, R, 0.5f, p > 0, make_draw(p, seed, 0),
                static_cast<float>(1 / (1 - p))};
    }

    double kept(int64_t m, int64_t k) const { return p ? lives(lora().draw, m, k) / (1 - p) : 1; }

    // the formula of u and of one number's part in dx; h as the kernel stored it
    double u_of(int64_t m, int64_t n, const float* h) const {
        double u = 0;
        for (int64_t k = 0; k < s.K; ++k) u += s.x.at[m * s.ldx + k] * static_cast<double>(w.at[n * s.K + k]);
        for (int64_t r = 0; r < R; ++r) u += 0.5 * h[m * R + r] * static_cast<double>(b.at[n * R + r]);
        return u;
    }

    double dh_of(int64_t m, int64_t r) const {
        double dh = 0;
        for (int64_t n = 0; n < N; ++n)
            dh += 0.5 * dy.at[m * lddy + n] * (has_gain ? gain.at[n] : 1.0) * b.at[n * R + r];
        return dh;
    }

    double dx_of(int64_t m, int64_t k) const {
        double dx = 0;
        for (int64_t n = 0; n < N; ++n) {
            double through = w.at[n * s.K + k];
            for (int64_t r = 0; !given && r < R; ++r)
                through += kept(m, k) * 0.5 * b.at[n * R + r] * static_cast<double>(a.at[r * s.K + k]);
            dx += dy.at[m * lddy + n] * (has_gain ? gain.at[n] : 1.0) * through;
        }
        return dx;
    }
};

// What a layer's pass gave.
struct Results {
    const Layer& l;
    int64_t M = l.s.M;
    Guarded<float> y{M * l.N}, u{M * l.N}, h{M * l.R}, dh{M * l.R}, da{l.R * l.s.K}, db{l.N * l.R},
        dgain{l.N}, dbias{l.N};

    explicit Results(const Layer& layer) : l(layer) {
        if (l.given) std::copy_n(l.waist.at, M * l.R, h.at);
    }

    Fp32Layer forward() {
        return {l.N,
                l.for_y.at,
                l.lora(),
                l.has_gain ? l.gain.at : nullptr,
                l.has_bias ? l.bias.at : nullptr,
                y.at,
                l.asked[2] ? u.at : nullptr,
                h.at};
    }

    Fp32LayerBackward backward() {
        return {l.N,
                l.dy.at,
                l.lddy,
                l.has_gain ? l.gain.at : nullptr,
                u.at,
                h.at,
                l.for_dx.at,
                l.lora(),
                l.given && l.asked[0] ? dh.at : nullptr,
                !l.given && l.asked[0] ? da.at : nullptr,
                l.asked[1] ? db.at : nullptr,
                l.asked[2] ? dgain.at : nullptr,
                l.asked[3] ? dbias.at : nullptr};
    }

    // all that was asked for, what was not is as it was made
    bool same(std::vector<float> (&first)[8], bool begins) const {
        return same_bits(y, M * l.N, first[0], begins) && same_bits(u, M * l.N, first[1], begins) &&
               same_bits(h, M * l.R, first[2], begins) && same_bits(dh, M * l.R, first[3], begins) &&
               same_bits(da, l.R * l.s.K, first[4], begins) && same_bits(db, l.N * l.R, first[5], begins) &&
               same_bits(dgain, l.N, first[6], begins) && same_bits(dbias, l.N, first[7], begins);
    }

    // a number that was not written is a NaN, and one that nobody asked for stays one
    bool whole() const {
        const auto all = [](const Guarded<float>& t, int64_t count, bool written) {
            for (int64_t i = 0; i < count; ++i)
                if (std::isnan(t.at[i]) == written) return false;
            return true;
        };
        return all(y, M * l.N, true) && all(u, M * l.N, l.asked[2]) && all(h, M * l.R, true) &&
               all(dh, M * l.R, l.given && l.asked[0]) && all(da, l.R * l.s.K, !l.given && l.asked[0]) &&
               all(db, l.N * l.R, l.asked[1]) && all(dgain, l.N, l.asked[2]) && all(dbias, l.N, l.asked[3]);
    }

    bool close(double bound) const {
        const double size = 1 + std::sqrt(l.s.K) * (1 + std::sqrt(l.R)) * std::sqrt(l.N);
        for (int i = 0; M && i < 4; ++i) {
            const int64_t m = any(0, M - 1), n = any(0, l.N - 1);
            const double u_right = l.u_of(m, n, h.at);
            const double right =
                u_right * (l.has_gain ? l.gain.at[n] : 1) + (l.has_bias ? l.bias.at[n] : 0.0);
            if (!(std::abs(y.at[m * l.N + n] - right) <= bound * size)) return false;
            if (l.asked[2] && !(std::abs(u.at[m * l.N + n] - u_right) <= bound * size)) return false;
        }
        return sums_close(bound);
    }

    // one number of each gradient of a parameter, against sums whose terms are in size up to `most` together
    bool sums_close(double bound) const {
        const int64_t n = any(0, l.N - 1), r = any(0, std::max<int64_t>(l.R, 1) - 1), k = any(0, l.s.K - 1);
        double right[5] = {}, most[5] = {1, 1, 1, 1, 1};
        const auto add = [&](int i, double term) { right[i] += term, most[i] += std::abs(term); };
        for (int64_t m = 0; m < M; ++m) {
            const double dy = l.dy.at[m * l.lddy + n], du = dy * (l.has_gain ? l.gain.at[n] : 1);
            if (l.asked[0] && !l.given) add(0, l.dh_of(m, r) * l.kept(m, k) * l.s.x.at[m * l.s.ldx + k]);
            if (l.asked[1]) add(1, 0.5 * du * h.at[m * l.R + r]);
            if (l.asked[2]) add(2, dy * u.at[m * l.N + n]);
            if (l.asked[3]) add(3, dy);
        }
        const int64_t m = M ? any(0, M - 1) : 0;
        if (M && l.asked[0] && l.given) add(4, l.dh_of(m, r));
        const auto near = [&](int i, double got, double allowed) {
            return std::abs(got - right[i]) <= allowed * most[i] * (1 + std::sqrt(l.N));
        };
        return (!l.asked[0] || l.given || near(0, da.at[r * l.s.K + k], bound)) &&
               (!l.asked[1] || near(1, db.at[n * l.R + r], bound)) &&
               (!l.asked[2] || near(2, dgain.at[n], 1e-5)) && (!l.asked[3] || near(3, dbias.at[n], 1e-5)) &&
               (!l.asked[0] || !l.given || !M || near(4, dh.at[m * l.R + r], bound));
    }
};

bool one_case() {
    const Shared s;
    std::list<Layer> layers;
    for (int64_t i = any(1, 3); i > 0; --i) layers.emplace_back(s);
    const double bound = s.parts == 1 ? 0.02 : 3e-6;
    std::vector<float> first[3][8], first_dx;
    for (int threads : {1, 2, 3, 5}) {
        std::list<Results> results;
        Guarded<float> dx(s.M * s.K);
        Fp32Forward forward = {s.M, s.K, s.x.at, s.ldx, {}};
        Fp32Backward backward = {s.M, s.K, s.x.at, s.ldx, s.has_dx ? dx.at : nullptr, {}};
        for (const Layer& layer : layers) {
            results.emplace_back(layer);
            forward.layers.push_back(results.back().forward());
            backward.layers.push_back(results.back().backward());
        }
        delta_linear_fp32_forward(forward, s.parts, threads);
        delta_linear_fp32_backward(backward, s.parts, threads);
        const bool begins = threads == 1;
        if (!same_bits(dx, s.M * s.K, first_dx, begins)) return false;
        int i = 0;
        for (const Results& one : results) {
            if (!one.same(first[i++], begins)) return false;
            if (begins && !s.wild && !(one.whole() && one.close(bound))) return false;
        }
        for (int j = 0; s.has_dx && s.M && begins && !s.wild && j < 4; ++j) {
            const int64_t m = any(0, s.M - 1), k = any(0, s.K - 1);
            double right = 0, size = 1;
            for (const Layer& l : layers) {
                right += l.dx_of(m, k);
                size += std::sqrt(s.K) * (1 + std::sqrt(l.R)) * std::sqrt(l.N);
            }
            if (!(std::abs(dx[m * s.K + k] - right) <= bound * size)) return false;
        }
    }
    return true;
}

}  // namespace

int main(int count, char** words) {
    const int cases = count > 1 ? std::atoi(words[1]) : 100;
    if (!delta_linear_fp32_here()) return std::puts("no AMX here"), 0;
    for (int i = 0; i < cases; ++i)
        if (!one_case()) return std::printf("case %d is wrong\n", i), 1;
    std::printf("%d cases\n", cases);
}
