// cross_entropy over random shapes against plain loops. How to build: tests/test_sanitizers.py.
#include "../cpu/cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "guarded.h"

using namespace pefast;

namespace {

template <class T>
bool one_case(Scalar type, double step) {
    const int64_t M = any(0, 9), V = sized(1, 200, 3000);
    // logits of usual size, and such that e^z overflows
    const float size = any(0, 3) ? 1 : 200;
    std::vector<T> logits(M * V);
    fill(logits.data(), M, V, V);
    for (T& z : logits) narrow(widen(z) * size, &z);
    Guarded<int64_t> target(M);
    for (int64_t m = 0; m < M; ++m) target[m] = any(0, V - 1);
    for (int threads : {1, 3}) {
        Guarded<T> z(M * V);
        Guarded<float> loss(M);
        std::copy(logits.begin(), logits.end(), z.at);
        cross_entropy({z.at, target.at, loss.at, M, V}, type, threads);
        for (int64_t m = 0; m < M; ++m) {
            const T* row = logits.data() + m * V;
            double top = -INFINITY, sum = 0;
            for (int64_t v = 0; v < V; ++v) top = std::max<double>(top, widen(row[v]));
            for (int64_t v = 0; v < V; ++v) sum += std::exp(widen(row[v]) - top);
            const double right = std::log(sum) + top - widen(row[target[m]]);
            if (!(std::abs(loss[m] - right) <= 1e-5 * (1 + std::abs(right)))) return false;
            for (int64_t v = 0; v < V; ++v) {
                const double part = std::exp(widen(row[v]) - top) / sum - (v == target[m]);
                if (!(std::abs(widen(z[m * V + v]) - part) <= step * std::abs(part) + 1e-6)) return false;
            }
        }
    }
    return true;
}

}  // namespace

int main(int count, char** words) {
    if (!cross_entropy_here()) return std::puts("no AVX-512 here: nothing was run"), 0;
    const int cases = count > 1 ? std::atoi(words[1]) : 100;
    for (int i = 0; i < cases; ++i)
        if (!(i % 2 ? one_case<float>(Scalar::fp32, 1e-4) : one_case<bf16>(Scalar::bf16, 0.005)))
            return std::printf("case %d is wrong\n", i), 1;
    std::printf("%d cases\n", cases);
}
