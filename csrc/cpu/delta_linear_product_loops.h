// The product of delta_linear_product.h in registers, for the vectors of each file that includes it.
#pragma once

#include <omp.h>

#include <algorithm>

#include "delta_linear_product.h"
#include "team.h"
#include "vector_fp32.h"

namespace pefast {
namespace {

constexpr int64_t W = Vector::WIDTH;
// registers of sums: rows of x by registers of columns
constexpr int64_t TALL = W == 16 ? 8 : 4, WIDE = 3;
// rows of a block, whose fp32 copy stays in the second cache, and which share one widening of w
constexpr int64_t ROWS = 64;
// terms of a sum whose 48 columns of w, widened, fill half of the first cache
constexpr int64_t STRETCH = 128;

// sums [TALL, WIDE registers] += x [TALL, count] times w [count, 48]
inline void multiply(const float* x, int64_t ldx, int64_t count, const float* w, float* sums, bool first) {
    Vector sum[TALL][WIDE];
    for (int m = 0; m < TALL; ++m)
        for (int i = 0; i < WIDE; ++i)
            sum[m][i] = first ? Vector::zero() : Vector::load(sums + m * PRODUCT_STRIP + i * W);
    for (int64_t k = 0; k < count; ++k, w += PRODUCT_STRIP) {
        Vector right[WIDE];
        for (int i = 0; i < WIDE; ++i) right[i] = Vector::load(w + i * W);
#pragma GCC unroll 8
        for (int m = 0; m < TALL; ++m) {
            const Vector left = Vector::all(x[m * ldx + k]);
            for (int i = 0; i < WIDE; ++i) sum[m][i] = Vector::plus_product(left, right[i], sum[m][i]);
        }
    }
    for (int m = 0; m < TALL; ++m)
        for (int i = 0; i < WIDE; ++i) sum[m][i].store(sums + m * PRODUCT_STRIP + i * W);
}

// What one thread needs for a block of rows.
class Block {
  public:
    // the stride of rows is an odd number of cache lines: an even one would put them into the same sets
    Block(const Product& call, Scratch& scratch)
        : f(call),
          ld((f.K + 15) / 32 * 32 + 16),
          x(scratch.take<float>(ROWS * ld)),
          w(scratch.take<float>(STRETCH * PRODUCT_STRIP)),
          sums(scratch.take<float>(ROWS * PRODUCT_STRIP)) {}

    // columns of y from the strip `begin` to the strip `end`, for up to ROWS rows
    void run(int64_t row, int64_t begin, int64_t end) {
        rows = std::min(ROWS, f.M - row);
        // rows beyond the last repeat it, and what comes of them is not looked at
        tall = (rows + TALL - 1) / TALL * TALL;
        for (int64_t m = 0; m < tall; ++m)
            for (int64_t k = 0; k < f.K; k += W)
                Vector::load(f.x + (row + std::min(m, rows - 1)) * f.ldx + k, Vector::first(f.K - k))
                    .store(x + m * ld + k);
        for (int64_t strip = begin; strip < end; ++strip) {
            for (int64_t k = 0; k < f.K; k += STRETCH)
                stretch(f.w + (strip * f.K + k) * PRODUCT_STRIP, k, std::min(STRETCH, f.K - k));
            finish(row, strip * PRODUCT_STRIP);
        }
    }

  private:
    void stretch(const bf16* from, int64_t k, int64_t count) {
        for (int64_t i = 0; i < count * PRODUCT_STRIP; i += W)
            Vector::load(from + i, Vector::first(W)).store(w + i);
        for (int64_t m = 0; m < tall; m += TALL)
            for (int64_t c = 0; c < PRODUCT_STRIP; c += WIDE * W)
                multiply(x + m * ld + k, ld, count, w + c, sums + m * PRODUCT_STRIP + c, k == 0);
    }

    void finish(int64_t row, int64_t column) const {
        for (int64_t c = 0; c < PRODUCT_STRIP && column + c < f.N; c += W) {
            const Vector::Mask inside = Vector::first(f.N - column - c);
            const Vector bias = f.bias ? Vector::load(f.bias + column + c, inside) : Vector::zero();
            for (int64_t m = 0; m < rows; ++m)
                Vector::plus(Vector::load(sums + m * PRODUCT_STRIP + c), bias)
                    .store(f.y + (row + m) * f.N + column + c, inside);
        }
    }

    const Product& f;
    const int64_t ld;
    float *const x, *const w, *const sums;  // [ROWS, ld], [STRETCH, 48], [ROWS, 48]
    int64_t rows = 0, tall = 0;
};

inline void all_rows(const Product& call, int threads) {
    const int64_t blocks = (call.M + ROWS - 1) / ROWS, strips = (call.N + PRODUCT_STRIP - 1) / PRODUCT_STRIP;
    // few rows are shared out by columns
    const int64_t shares = blocks < 2 * threads ? std::min<int64_t>(strips, threads) : 1;
    const int team = static_cast<int>(std::min<int64_t>(threads, blocks * shares));
#pragma omp parallel num_threads(team) if (team > 1)
    {
        Block block(call, Scratch::of_this_thread());
#pragma omp for schedule(static)
        for (int64_t i = 0; i < blocks * shares; ++i) {
            const int64_t share = i % shares;
            block.run(i / shares * ROWS, strips * share / shares, strips * (share + 1) / shares);
        }
    }
}

}  // namespace
}  // namespace pefast
