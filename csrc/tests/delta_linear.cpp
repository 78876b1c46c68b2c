// delta_linear over random shapes against plain loops; every array ends, or begins, at a page that may not be touched.
//
//     FLAGS="-std=c++17 -O1 -g -fopenmp -fsanitize=address,undefined -DPEFAST_HAVE_AVX2 -DPEFAST_HAVE_AVX512 -DPEFAST_HAVE_AMX
//            -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mamx-tile -mamx-bf16"
//     g++ $FLAGS csrc/tests/delta_linear.cpp csrc/cpu/{isa,delta_linear*,p*_amx}.cpp -o /tmp/fuzz && /tmp/fuzz 1000
#include "../cpu/delta_linear.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "../cpu/pack.h"
#include "guarded.h"

using namespace pefast;

namespace {

// whether columns of this case, and mostly rows, fill whole tiles: those are read where they lie
bool whole_tiles = false;
int64_t whole(int64_t count) { return whole_tiles ? (count + 31) / 32 * 32 : count; }

// parameters of one segment and where its gradients go; those that are there are filled with numbers
struct SegmentCase {
    SegmentCase(int64_t M, int64_t N, int64_t K, uint32_t stream)
        : R(sized(1, 20, 70)),
          a(R * K),
          b(N * R),
          c(R),
          d(N),
          h(M * R),
          da(R * K),
          db(N * R),
          dc(R),
          dd(N),
          dh(M * R) {
        fill(a.at, R, K, K), fill(b.at, N, R, R), fill(c.at, 1, R, R), fill(d.at, 1, N, N),
            fill(h.at, M, R, R);
        s.R = R, s.scale = any(0, 1) ? 0.5f : -1.5f;
        s.b.data = b.at;
        if (any(0, 4)) {
            s.a.data = a.at;
            s.activation = static_cast<Activation>(any(0, 3) ? 0 : any(1, 11));
            if (any(0, 1)) s.c.data = c.at;
            s.dropout = any(0, 1);
        } else {
            s.h = h.at;
        }
        if (any(0, 1)) s.d.data = d.at;
        if (s.dropout) s.draw = make_draw(0.3, 12345678901, stream), s.keep_scale = 1 / 0.7f;
        s.routed = any(0, 2) == 0, s.adapter = any(0, 2);
    }

    Gradients wanted(bool all) {
        Gradients g;
        if (s.a.data && (all || any(0, 1))) g.da = da.at;
        if (s.c.data && (all || any(0, 1))) g.dc = dc.at;
        if (all || any(0, 1)) g.db = db.at;
        if (s.d.data && (all || any(0, 1))) g.dd = dd.at;
        if (s.h && (all || any(0, 1))) g.dh = dh.at;
        return g;
    }

    int64_t R;
    Guarded<bf16> a, b, c, d, h;
    Guarded<float> da, db, dc, dd;
    Guarded<bf16> dh;
    Segment s;
};

double kept(const Segment& s, int64_t m, int64_t k) {
    return s.dropout ? lives(s.draw, m, k) * s.keep_scale : 1;
}

double number(const Master& m, int64_t i) { return widen(static_cast<const bf16*>(m.data)[i]); }

// σ, of those that the check of values takes; others are held to their bits alone
double activated(Activation activation, double z) {
    if (activation == Activation::relu) return z > 0 ? z : 0;
    if (activation == Activation::tanh) return std::tanh(z);
    if (activation == Activation::sigmoid) return 1 / (1 + std::exp(-z));
    if (activation == Activation::silu) return z / (1 + std::exp(-z));
    return z;
}

bool known(Activation a) {
    return a == Activation::identity || a == Activation::relu || a == Activation::tanh ||
           a == Activation::sigmoid || a == Activation::silu;
}

// the formula of y, one number; the kernel rounds at most a few times on the way
double y_of(const DeltaForward& f, const SiblingForward& one, const bf16* w, int64_t m, int64_t n) {
    double u = 0;
    for (int64_t k = 0; k < f.K; ++k)
        u += widen(f.x[m * f.ldx + k]) * static_cast<double>(widen(w[n * f.K + k]));
    for (const Segment& s : one.segments) {
        if (s.routed && f.ids[m] != s.adapter) continue;
        double delta = s.d.data ? number(s.d, n) : 0;
        for (int64_t r = 0; r < s.R; ++r) {
            double h = s.a.data ? s.c.data ? number(s.c, r) : 0 : widen(s.h[m * s.R + r]);
            for (int64_t k = 0; s.a.data && k < f.K; ++k)
                h += kept(s, m, k) * widen(f.x[m * f.ldx + k]) * number(s.a, r * f.K + k);
            delta += (s.a.data ? activated(s.activation, h) : h) * number(s.b, n * s.R + r);
        }
        u += s.scale * delta;
    }
    if (one.gain.data) u *= number(one.gain, n);
    return one.bias.data ? u + number(one.bias, n) : u;
}

// one layer of the case: its frozen part, its segments and its results
struct SiblingCase {
    SiblingCase(int64_t M, int64_t K, uint32_t& stream)
        : N(whole(sized(1, 70, 150))),
          lddy(N + any(0, 1) * whole(any(0, 40))),
          w(N * K),
          bias(N),
          gain(N),
          dy(M ? (M - 1) * lddy + N : 0),
          for_y(packed_size(K, N)),
          for_dx(packed_size(N, K)),
          y(M * N),
          u(M * N),
          dbias(N),
          dgain(N) {
        fill(w.at, N, K, K), fill(dy.at, M, N, lddy), fill(bias.at, 1, N, N), fill(gain.at, 1, N, N);
        delta_linear_pack(w.at, 1, K, K, N, for_y.at, 1);
        delta_linear_pack(w.at, K, 1, N, K, for_dx.at, 2);
        for (int64_t i = any(0, 3); i > 0; --i)
            segments.push_back(std::make_unique<SegmentCase>(M, N, K, stream++));
        has_bias = any(0, 1), has_gain = any(0, 2) == 0;
    }

    template <class One>
    void describe(One& one, const bf16* packed) {
        one.N = N, one.w = packed;
        if (has_bias) one.bias.data = bias.at;
        if (has_gain) one.gain.data = gain.at;
        for (const auto& segment : segments) one.segments.push_back(segment->s);
    }

    int64_t N, lddy;
    Guarded<bf16> w, bias, gain, dy, for_y, for_dx, y, u;
    Guarded<float> dbias, dgain;
    std::vector<std::unique_ptr<SegmentCase>> segments;
    bool has_bias, has_gain;
};

// every result as it lies in memory, in one row: a number that was not written is a NaN, and no NaN may be there
class Bits {
  public:
    template <class T>
    bool add(const T* from, int64_t count) {
        if (!from) return true;
        bool numbers = true;
        for (int64_t i = 0; i < count; ++i) numbers = numbers && widen(from[i]) == widen(from[i]);
        const char* begin = reinterpret_cast<const char*>(from);
        bits.insert(bits.end(), begin, begin + count * sizeof(T));
        return numbers;
    }
    std::vector<char> bits;
};

bool collect(Bits& all, const DeltaForward& f, const DeltaBackward& g, int64_t W) {
    bool there = all.add(f.waist, f.M * W) && all.add(g.dx, g.M * g.K);
    for (size_t i = 0; i < f.siblings.size(); ++i) {
        const SiblingForward& one = f.siblings[i];
        const SiblingBackward& back = g.siblings[i];
        there = there && all.add(one.y, f.M * one.N) && all.add(one.u, f.M * one.N) &&
                all.add(back.dbias, one.N) && all.add(back.dgain, one.N);
        for (size_t j = 0; j < one.segments.size(); ++j) {
            const int64_t R = one.segments[j].R;
            const Gradients& to = back.gradients[j];
            there = there && all.add(to.da, R * f.K) && all.add(to.db, one.N * R) && all.add(to.dc, R) &&
                    all.add(to.dd, one.N) && all.add(to.dh, f.M * R);
        }
    }
    return there;
}

bool right_values(const DeltaForward& f, const std::vector<std::unique_ptr<SiblingCase>>& cases) {
    for (int i = 0; f.M && i < 4; ++i) {
        const size_t at = any(0, cases.size() - 1);
        const SiblingForward& one = f.siblings[at];
        double ranks = 0;
        bool check = true;
        for (const Segment& s : one.segments) ranks += s.R, check = check && known(s.activation);
        const int64_t m = any(0, f.M - 1), n = any(0, one.N - 1);
        const double right = y_of(f, one, cases[at]->w.at, m, n),
                     size = std::sqrt(f.K) * (1 + 4 * std::sqrt(ranks));
        if (check && !(std::abs(widen(one.y[m * one.N + n]) - right) <= 0.05 * size)) return false;
    }
    return true;
}

// a and b kept packed from one call to the next leave every bit as it is, and are not written to once they are there
template <class Run>
bool kept_bits(DeltaForward& f, DeltaBackward& g, const Run& run) {
    const Segment& s = f.siblings[0].segments[0];
    const int64_t size = KeptFactors::size(s.R, f.siblings[0].N, f.K);
    Guarded<bf16> for_y(size), for_dx(size);
    std::vector<bf16> y, dx;
    bool right = true;
    for (const bool ready : {false, true, true}) {
        f.kept = {for_y.at, ready}, g.kept = {for_dx.at, ready};
        right = right && run() && same_bits(for_y, size, y, !ready) && same_bits(for_dx, size, dx, !ready);
    }
    f.kept = {}, g.kept = {};
    return right;
}

bool one_case() {
    whole_tiles = any(0, 2) == 0;
    const int64_t m = sized(0, 40, 1200), M = any(0, 2) ? whole(m) : m, K = whole(sized(1, 100, 600));
    const int64_t ldx = K + any(0, 1) * whole(any(0, 40));
    Guarded<bf16> x(M ? (M - 1) * ldx + K : 0), dx(M * K);
    Guarded<int64_t> ids(M);
    fill(x.at, M, K, ldx);
    for (int64_t m = 0; m < M; ++m) ids[m] = any(-1, 2);
    uint32_t stream = 0;
    std::vector<std::unique_ptr<SiblingCase>> cases;
    for (int64_t i = any(0, 1) ? 1 : any(1, 3); i > 0; --i)
        cases.push_back(std::make_unique<SiblingCase>(M, K, stream));
    DeltaForward f;
    DeltaBackward g;
    const bool all = any(0, 1);
    int64_t W = 0;
    for (const auto& one : cases) {
        SiblingForward forward;
        SiblingBackward backward;
        one->describe(forward, one->for_y.at), one->describe(backward, one->for_dx.at);
        forward.y = one->y.at, backward.dy = one->dy.at, backward.lddy = one->lddy;
        if (one->has_gain) forward.u = one->u.at, backward.u = one->u.at, backward.dgain = one->dgain.at;
        if (one->has_bias) backward.dbias = one->dbias.at;
        for (const auto& segment : one->segments) {
            backward.gradients.push_back(segment->wanted(all));
            W += segment->s.a.data ? segment->R : 0;
        }
        f.siblings.push_back(forward), g.siblings.push_back(backward);
    }
    Guarded<bf16> waist(M * W);
    f.M = M, f.K = K, f.x = x.at, f.ldx = ldx, f.ids = ids.at, f.waist = waist.at;
    g.M = M, g.K = K, g.x = x.at, g.ldx = ldx, g.ids = ids.at, g.waist = waist.at;
    if (all || any(0, 1)) g.dx = dx.at;
    const std::vector<Segment>& segments = f.siblings[0].segments;
    const bool keeps = cases.size() == 1 && segments.size() == 1 && segments[0].a.data && !segments[0].d.data;
    Bits first;
    for (int threads : {1, 2, 3, 5}) {
        const auto run = [&] {
            delta_linear_forward(f, threads);
            delta_linear_backward(g, threads);
            Bits now;
            if (!collect(now, f, g, W)) return false;
            if (first.bits.empty()) first = now;
            return now.bits == first.bits;
        };
        if (!run() || !right_values(f, cases) || (keeps && !kept_bits(f, g, run))) return false;
    }
    return true;
}

}  // namespace

int main(int count, char** words) {
    if (!delta_linear_here()) return std::puts("no AMX here: nothing was run"), 0;
    const int cases = count > 1 ? std::atoi(words[1]) : 100;
    for (int i = 0; i < cases; ++i)
        if (!one_case()) return std::printf("case %d is wrong\n", i), 1;
    std::printf("%d cases\n", cases);
}
