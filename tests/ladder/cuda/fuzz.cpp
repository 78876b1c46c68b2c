// Decoding steps of csrc/cuda over random shapes on a CPU, against plain loops in double: `fuzz CASES [FAULT]`.
// With FAULTS defined another file brings kernels that have one. How to build: tests/ladder/cuda_builds.py.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <random>
#include <vector>

#include "../../../csrc/cuda/delta_linear_decode.h"
#include "on_host.h"

using namespace pefast;

using Kernel = int(const DecodeCall*, const DecodeDelta*, void*);
#if defined(FAULTS)
// they have no fp16, which is bf16's code
constexpr int TYPES = 2;
Kernel* kernel(int fault);
#else
constexpr int TYPES = 3;
static Kernel* kernel(int) { return pefast_delta_linear_decode; }
#endif

namespace {

std::mt19937 generator(7);

int64_t any(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

// numbers of a type, exactly as many bytes on the heap as they need
struct Numbers {
    Numbers(int64_t rows, int64_t columns, int64_t type, bool apart)
        : type(type), ld(columns + (apart ? any(1, 3) * 8 : 0)), skip(apart && any(0, 3) == 0) {
        const int64_t many = std::max<int64_t>(rows * ld - (ld - columns), 0) + skip;
        bytes = static_cast<char*>(std::malloc(many * size()));
        std::normal_distribution<float> normal;
        for (int64_t i = 0; i < many; ++i) {
            const float value = normal(generator);
            if (type == 0) narrow(value, reinterpret_cast<float*>(bytes) + i);
            if (type == 1) narrow(value, reinterpret_cast<bf16*>(bytes) + i);
            if (type == 2) narrow(value, reinterpret_cast<fp16*>(bytes) + i);
        }
    }
    Numbers(const Numbers&) = delete;
    ~Numbers() { std::free(bytes); }

    int64_t size() const { return type == 0 ? 4 : 2; }
    // one number behind 16 bytes, sometimes
    void* at() { return bytes + skip * size(); }
    double operator()(int64_t row, int64_t column) {
        const int64_t i = row * ld + column;
        if (type == 0) return static_cast<float*>(at())[i];
        return type == 1 ? widen(static_cast<bf16*>(at())[i]) : widen(static_cast<fp16*>(at())[i]);
    }

    int64_t type, ld;
    bool skip;
    char* bytes;
};

// what a kernel may round a to before it multiplies
double rounded(double value, int64_t type) {
    bf16 b;
    narrow(static_cast<float>(value), &b);
    return type == 0 ? value : type == 1 ? widen(b) : static_cast<double>(static_cast<fp16>(value));
}

struct Case {
    Case(int64_t M, int64_t N, int64_t K, int64_t type) : M(M), N(N), K(K), type(type) {}

    int64_t M, N, K, type;
    bool apart = any(0, 1);
    Numbers x{M, K, type, apart}, w{N, K, type, apart};
    Numbers bias{1, N, any(0, 1) * type, false}, gain{1, N, any(0, 1) * type, false};
    std::deque<Numbers> a, b;
    std::vector<DecodeDelta> deltas;
    std::vector<int64_t> ids;
    bool biased = any(0, 3) > 0, gained = any(0, 3) > 0;
    int64_t slots = 0;

    void add_delta(int64_t rank, int64_t adapter) {
        a.emplace_back(rank, K, any(0, 1) * type, apart);
        b.emplace_back(N, rank, any(0, 1) * type, apart);
        slots += (rank + 31) / 32 * 32;
        deltas.push_back({a.back().at(), b.back().at(), a.back().ld, b.back().ld, rank, a.back().type == 0,
                          b.back().type == 0, adapter, 0.25 + 0.5 * any(0, 3)});
    }

    // y [m, n] and how large the terms of its sums are
    double formula(int64_t m, int64_t n, double* size) {
        double y = 0;
        *size = 1;
        for (int64_t k = 0; k < K; ++k) y += x(m, k) * w(n, k);
        for (size_t i = 0; i < deltas.size(); ++i) {
            if (deltas[i].adapter != EVERY_ROW && deltas[i].adapter != ids[m]) continue;
            for (int64_t r = 0; r < deltas[i].R; ++r) {
                double h = 0;
                for (int64_t k = 0; k < K; ++k) h += x(m, k) * rounded(a[i](r, k), type);
                y += deltas[i].scale * h * b[i](n, r);
                *size += std::abs(deltas[i].scale * h * b[i](n, r));
            }
        }
        *size += std::abs(y) + std::sqrt(K);
        if (gained) y *= gain(0, n), *size *= 1 + std::abs(gain(0, n));
        return y + (biased ? bias(0, n) : 0);
    }
};

bool right(Case& c, Kernel* run, int64_t processors) {
    const double eps[] = {1.0 / (1 << 24), 1.0 / (1 << 8), 1.0 / (1 << 11)};
    unsigned* counts = static_cast<unsigned*>(std::calloc(3, sizeof(unsigned)));
    float* h = static_cast<float*>(std::malloc(std::max<int64_t>(c.M * c.slots, 1) * sizeof(float)));
    std::vector<char> first;
    bool good = true;
    for (int round = 0; round < 2; ++round) {
        Numbers y(c.M, c.N, c.type, false);
        std::memset(h, 0xff, c.M * c.slots * sizeof(float));
        std::memset(y.bytes, 0xff, c.M * c.N * y.size());
        DecodeCall call = {};
        call.x = c.x.at(), call.w = c.w.at(), call.ids = c.ids.data(), call.y = y.at(), call.h = h;
        call.counts = counts;
        call.M = c.M, call.N = c.N, call.K = c.K, call.ldx = c.x.ld, call.ldw = c.w.ld, call.type = c.type;
        call.count = static_cast<int64_t>(c.deltas.size()), call.processors = processors;
        if (c.biased) call.bias = c.bias.at(), call.fp32_bias = c.bias.type == 0;
        if (c.gained) call.gain = c.gain.at(), call.fp32_gain = c.gain.type == 0;
        good = good && run(&call, c.deltas.data(), nullptr) == 0 && !counts[0] && !counts[1] && !counts[2];
        if (round == 0) first.assign(y.bytes, y.bytes + c.M * c.N * y.size());
        // the same bits again
        good = good && !std::memcmp(y.bytes, first.data(), first.size());
        for (int64_t i = 0; round == 0 && i < c.M * c.N; ++i) {
            double size;
            const double exact = c.formula(i / c.N, i % c.N, &size);
            good =
                good && std::abs(y(i / c.N, i % c.N) - exact) <= eps[c.type] * std::abs(exact) + 2e-6 * size;
        }
    }
    std::free(counts), std::free(h);
    return good;
}

bool one_case(int i, Kernel* run) {
    // whole packs, or anything; long enough for the loop that looks ahead, or not; the first is quick
    const int64_t K = i == 0 ? 40 : any(0, 1) ? any(1, 150) * 8 : any(1, 700);
    Case c(any(1, DECODE_ROWS), any(1, 70), K, (i + 1) % TYPES);
    const int64_t ranks[] = {1, 3, 8, 16, 40, 64};
    for (int64_t adapter = 0; adapter < (i + 3) % 5; ++adapter)
        c.add_delta(ranks[any(0, 5)], any(0, 3) ? adapter : EVERY_ROW);
    for (int64_t m = 0; m < c.M; ++m) c.ids.push_back(any(-1, 4));
    return right(c, run, any(0, 1) ? 1 : 64);
}

}  // namespace

int main(int count, char** words) {
    const int cases = count > 1 ? std::atoi(words[1]) : 12;
    for (int i = 0; i < cases; ++i)
        if (!one_case(i, kernel(count > 2 ? std::atoi(words[2]) : 0)))
            return std::printf("case %d is wrong\n", i), 1;
    std::printf("%d cases\n", cases);
}
