// delta_linear over random shapes against plain loops; every array ends, or begins, at a page that may not be touched.
//
//     FLAGS="-std=c++17 -O1 -g -fopenmp -fsanitize=address,undefined -DPEFAST_HAVE_AVX2 -DPEFAST_HAVE_AVX512 -DPEFAST_HAVE_AMX
//            -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mamx-tile -mamx-bf16"
//     g++ $FLAGS csrc/tests/delta_linear.cpp csrc/cpu/{isa,delta_linear*,pack_amx}.cpp -o /tmp/fuzz && /tmp/fuzz 1000
#include "../cpu/delta_linear.h"

#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../cpu/pack.h"

using namespace pefast;

namespace {

std::mt19937 generator(1);

int64_t any(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

// numbers between two forbidden pages, against the one or the other
template <class T>
class Guarded {
  public:
    explicit Guarded(int64_t count) : count(count) {
        const size_t PAGE = 4096, bytes = count * sizeof(T), room = (bytes + PAGE - 1) / PAGE * PAGE;
        size = room + 2 * PAGE;
        base = static_cast<char*>(mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        mprotect(base + PAGE, room, PROT_READ | PROT_WRITE);
        at = reinterpret_cast<T*>(base + PAGE + (any(0, 1) ? room - bytes : 0));
        std::memset(base + PAGE, 0xff, room);  // a NaN in every type
    }
    ~Guarded() { munmap(base, size); }
    Guarded(const Guarded&) = delete;
    Guarded& operator=(const Guarded&) = delete;
    T& operator[](int64_t i) { return at[i]; }
    std::vector<T> copy() const { return std::vector<T>(at, at + count); }

    T* at;

  private:
    int64_t count;
    char* base;
    size_t size;
};

void fill(bf16* to, int64_t rows, int64_t columns, int64_t ld) {
    std::normal_distribution<float> normal;
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) narrow(normal(generator), to + r * ld + c);
}

// the formula of y, one number; the kernel rounds at most four times on the way
double y_of(const DeltaForward& f, const bf16* w, int64_t m, int64_t n) {
    const bf16 *a = static_cast<const bf16*>(f.waist.a.data), *b = static_cast<const bf16*>(f.waist.b.data);
    double y = 0;
    for (int64_t k = 0; k < f.K; ++k)
        y += widen(f.x[m * f.ldx + k]) * static_cast<double>(widen(w[n * f.K + k]));
    for (int64_t r = 0; r < f.waist.R; ++r) {
        double h = 0;
        for (int64_t k = 0; k < f.K; ++k) {
            uint32_t c[4] = {static_cast<uint32_t>(k / 128 * 16 + k % 32 / 2), static_cast<uint32_t>(m), 0,
                             0};
            philox(c, f.waist.draw.key[0], f.waist.draw.key[1]);
            const uint32_t bits = c[k % 128 / 32] >> (16 * (k % 2)) & 0xffff;
            const double kept = !f.waist.dropout || bits >= f.waist.draw.threshold ? f.waist.keep_scale : 0;
            h += kept * widen(f.x[m * f.ldx + k]) * widen(a[r * f.K + k]);
        }
        y += f.waist.scale * h * widen(b[n * f.waist.R + r]);
    }
    return y;
}

bool one_case() {
    const int64_t M = any(0, 9) ? any(0, 80) : any(0, 1200), N = any(1, 150), K = any(1, 300), R = any(1, 40);
    const int64_t ldx = K + any(0, 1) * any(0, 40), lddy = N + any(0, 1) * any(0, 40);
    const double p = any(0, 1) ? 0.3 : 0;
    Guarded<bf16> x(M ? (M - 1) * ldx + K : 0), dy(M ? (M - 1) * lddy + N : 0), w(N * K), a(R * K), b(N * R);
    fill(x.at, M, K, ldx), fill(dy.at, M, N, lddy), fill(w.at, N, K, K), fill(a.at, R, K, K),
        fill(b.at, N, R, R);
    Guarded<bf16> for_y(packed_size(K, N)), for_dx(packed_size(N, K));
    delta_linear_pack(w.at, 1, K, K, N, for_y.at, 1);
    delta_linear_pack(w.at, K, 1, N, K, for_dx.at, 2);
    const Waist waist = {{a.at, false},
                         {b.at, false},
                         R,
                         0.5f,
                         p > 0,
                         make_draw(p, 12345678901, 0),
                         static_cast<float>(1 / (1 - p))};
    std::vector<bf16> first[3];
    std::vector<float> first_a, first_b;
    for (int threads : {1, 2, 3, 5}) {
        Guarded<bf16> y(M * N), h(M * R), dx(M * K);
        Guarded<float> da(R * K), db(N * R);
        const DeltaForward f = {M, N, K, x.at, ldx, for_y.at, waist, {nullptr, false}, y.at, h.at};
        delta_linear_forward(f, threads);
        delta_linear_backward({M, N, K, x.at, ldx, dy.at, lddy, h.at, for_dx.at, waist, dx.at, da.at, db.at},
                              threads);
        for (int i = 0; M && i < 4; ++i) {
            const int64_t m = any(0, M - 1), n = any(0, N - 1);
            const double right = y_of(f, w.at, m, n), size = std::sqrt(K) * (1 + std::sqrt(R));
            if (!(std::abs(widen(y[m * N + n]) - right) <= 0.05 * size)) return false;
        }
        const std::vector<bf16> now[3] = {y.copy(), h.copy(), dx.copy()};
        for (int i = 0; i < 3; ++i) {
            if (threads == 1) first[i] = now[i];
            for (size_t j = 0; j < now[i].size(); ++j)
                if (now[i][j].bits != first[i][j].bits) return false;
        }
        if (threads == 1) first_a = da.copy(), first_b = db.copy();
        for (int64_t i = 0; i < R * K; ++i)
            if (!(da[i] == first_a[i])) return false;  // a NaN, a number not written, is not itself
        for (int64_t i = 0; i < N * R; ++i)
            if (!(db[i] == first_b[i])) return false;
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
