// Decoding steps over random shapes against plain loops. How to build: tests/test_sanitizers.py.
#include "../cpu/delta_linear_decode.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <vector>

#include "../cpu/pack.h"
#include "guarded.h"

using namespace pefast;

namespace {

bool one_case() {
    const int64_t M = any(1, DECODE_ROWS), N = sized(1, 70, 150), K = sized(1, 100, 600),
                  ldx = K + any(0, 1) * any(0, 40);
    const int64_t strips = (N + 31) / 32;
    Guarded<bf16> x((M - 1) * ldx + K), w(N * K), packed(packed_size(K, N));
    Guarded<float> bias(N);
    fill(x.at, M, K, ldx), fill(w.at, N, K, K), fill(bias.at, 1, N, N);
    delta_linear_pack(w.at, 1, K, K, N, packed.at, 1);
    const bool biased = any(0, 1);
    // adapters a and b, b in strips; a row has none, one or two of them
    std::deque<Guarded<bf16>> a, b;
    std::vector<int64_t> ranks;
    for (int i = 0; i < 3; ++i) {
        const int64_t R = sized(1, 20, 70), pairs = (R + 1) / 2;
        ranks.push_back(R);
        fill(a.emplace_back(R * K).at, R, K, K);
        bf16* to = b.emplace_back(strips * pairs * 64).at;
        fill(to, strips * pairs, 64, 64);
        for (int64_t s = 0; s < strips; ++s)
            for (int64_t c = 0; R % 2 && c < 32; ++c) to[((s * pairs + pairs - 1) * 32 + c) * 2 + 1] = {0};
    }
    std::vector<RowDelta> deltas;
    std::vector<int64_t> which;
    for (int64_t m = 0; m < M; ++m)
        for (int64_t n = any(0, 2); n > 0; --n) {
            which.push_back(any(0, 2));
            deltas.push_back(
                {m, a[which.back()].at, b[which.back()].at, ranks[which.back()], any(0, 1) ? 0.5f : 2});
        }
    std::vector<bf16> first(M * N);
    for (int threads : {1, 2, 5}) {
        Guarded<bf16> y(M * N);
        const Master on_bias = {biased ? bias.at : nullptr, true};
        delta_linear_decode_amx({M, N, K, x.at, ldx, packed.at, on_bias, deltas.data(),
                                 static_cast<int64_t>(deltas.size()), y.at},
                                threads);
        if (threads == 1) std::copy_n(y.at, M * N, first.begin());
        if (std::memcmp(y.at, first.data(), M * N * sizeof(bf16))) return false;
    }
    for (int i = 0; i < 8; ++i) {
        const int64_t m = any(0, M - 1), n = any(0, N - 1);
        double right = biased ? bias[n] : 0, size = std::sqrt(K);
        for (int64_t k = 0; k < K; ++k)
            right += widen(x[m * ldx + k]) * static_cast<double>(widen(w[n * K + k]));
        for (const RowDelta& d : deltas)
            for (int64_t r = 0; d.row == m && r < d.R; ++r) {
                double h = 0;
                for (int64_t k = 0; k < K; ++k)
                    h += widen(x[m * ldx + k]) * static_cast<double>(widen(d.a[r * K + k]));
                const int64_t place = (n / 32 * ((d.R + 1) / 2) + r / 2) * 64 + n % 32 * 2 + r % 2;
                right += d.scale * h * widen(d.b[place]);
                size += d.scale * std::sqrt(K);
            }
        if (!(std::abs(widen(first[m * N + n]) - right) <= 0.05 * size)) return false;
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
