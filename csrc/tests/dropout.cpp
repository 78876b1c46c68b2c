// dropout over random shapes: each number against the counter, the same bits for every instruction set and number of
// threads. How to build: tests/test_sanitizers.py.
#include "../cpu/dropout.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../cpu/isa.h"
#include "guarded.h"

using namespace pefast;

namespace {

bool kept(const Draw& draw, int64_t row, int64_t column) {
    uint32_t c[4] = {static_cast<uint32_t>(column / 128 * 16 + column % 32 / 2), static_cast<uint32_t>(row),
                     draw.stream, 0};
    philox(c, draw.key[0], draw.key[1]);
    return (c[column % 128 / 32] >> (16 * (column % 2)) & 0xffff) >= draw.threshold;
}

template <class T>
bool one_case(Scalar type) {
    const int64_t M = any(0, 12), K = sized(0, 300, 9000), ldx = K + any(0, 20);
    const int64_t room = M && K ? (M - 1) * ldx + K : 0;
    const bool first = any(0, 2), second = !first || any(0, 1);
    const double p = any(0, 9) * 0.1, scale = 1 / (1 - p);
    Guarded<T> x(room), t(room);
    fill(x.at, room ? M : 0, K, ldx), fill(t.at, room ? M : 0, K, ldx);
    const Draw draw = make_draw(p, any(0, int64_t{1} << 62), static_cast<uint32_t>(any(0, 9)));
    std::vector<T> before(M * K), x_first, y_first;
    fill(before.data(), M, K, K);
    for (Isa level : isa_levels())
        for (int threads : {1, 3}) {
            use_isa(isa_name(level));
            Guarded<T> x_hat(M * K), y(M * K);
            std::copy(before.begin(), before.end(), y.at);
            dropout({first ? x.at : nullptr, ldx, x_hat.at, second ? t.at : nullptr, ldx, y.at, K, M, K, draw,
                     scale},
                    type, threads);
            for (int64_t m = 0; m < M; ++m)
                for (int64_t k = 0; k < K; ++k) {
                    const bool live = kept(draw, m, k);
                    T wanted{}, sum = before[m * K + k];
                    if (live)
                        narrow(widen(x[m * ldx + k]) * static_cast<decltype(widen(T{}))>(scale), &wanted);
                    if (first && std::memcmp(&wanted, &x_hat[m * K + k], sizeof(T))) return false;
                    if (live)
                        narrow(widen(sum) + widen(t[m * ldx + k]) * static_cast<decltype(widen(T{}))>(scale),
                               &sum);
                    if (second && std::memcmp(&sum, &y[m * K + k], sizeof(T))) return false;
                }
        }
    use_isa("");
    return true;
}

}  // namespace

int main(int count, char** words) {
    const int cases = count > 1 ? std::atoi(words[1]) : 100;
    for (int i = 0; i < cases; ++i) {
        const bool right = i % 4 == 0   ? one_case<float>(Scalar::fp32)
                           : i % 4 == 1 ? one_case<bf16>(Scalar::bf16)
                           : i % 4 == 2 ? one_case<fp16>(Scalar::fp16)
                                        : one_case<double>(Scalar::fp64);
        if (!right) return std::printf("case %d is wrong\n", i), 1;
    }
    std::printf("%d cases\n", cases);
}
