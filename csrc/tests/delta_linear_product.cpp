// delta_linear's frozen product without tiles, over random shapes against plain loops. How to build:
// tests/test_sanitizers.py.
#include "../cpu/delta_linear_product.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../cpu/isa.h"
#include "guarded.h"

using namespace pefast;

namespace {

bool one_case() {
    const int64_t M = sized(1, 20, 200), N = sized(1, 100, 400), K = sized(1, 100, 700),
                  ldx = K + any(0, 1) * any(0, 40);
    // w as it lies, or transposed
    const bool upright = any(0, 1), biased = any(0, 1);
    Guarded<bf16> x((M - 1) * ldx + K), w(N * K), packed(product_packed_size(K, N));
    Guarded<float> bias(N);
    fill(x.at, M, K, ldx), fill(w.at, N * K, 1, 1), fill(bias.at, N, 1, 1);
    const int64_t stride_n = upright ? K : 1, stride_k = upright ? 1 : N;
    product_pack(w.at, stride_k, stride_n, K, N, packed.at, static_cast<int>(any(1, 3)));
    const bool wild = !any(0, 9);
    if (wild) narrow(any(0, 1) ? NAN : INFINITY, &x[any(0, M - 1) * ldx + any(0, K - 1)]);
    std::vector<bf16> first(M * N);
    for (int threads : {1, 2, 5}) {
        Guarded<bf16> y(M * N);
        product({M, N, K, x.at, ldx, packed.at, biased ? bias.at : nullptr, y.at}, threads);
        if (threads == 1) std::copy_n(y.at, M * N, first.begin());
        if (std::memcmp(y.at, first.data(), M * N * sizeof(bf16))) return false;
    }
    for (int i = 0; i < 8 && !wild; ++i) {
        const int64_t m = any(0, M - 1), n = any(0, N - 1);
        double right = biased ? bias[n] : 0, size = std::abs(right);
        for (int64_t k = 0; k < K; ++k) {
            const double term =
                widen(x[m * ldx + k]) * static_cast<double>(widen(w[n * stride_n + k * stride_k]));
            right += term, size += std::abs(term);
        }
        // half a step of bf16, and the rounding of K sums in fp32
        const double allowed = std::abs(right) / 256 + 1e-6 * size;
        if (!(std::abs(widen(first[m * N + n]) - right) <= allowed)) return false;
    }
    return true;
}

}  // namespace

int main(int count, char** words) { return on_both_levels(count, words, one_case); }
