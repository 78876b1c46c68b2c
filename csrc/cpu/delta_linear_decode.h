// delta_linear for the few rows of a decoding step, each with adapters of its own: the packed weight and every
// row's a and b are read once, one after another. Formula and names: pefast/ops/delta_linear.py.
#pragma once

#include <cstdint>

#include "delta_linear.h"

namespace pefast {

// rows of x that one call takes
constexpr int64_t DECODE_ROWS = 32;

// one adapter on one row
struct RowDelta {
    int64_t row;
    const bf16* a;  // [R, K]
    const bf16*
        b;  // [ceil(N / 32), ceil(R / 2), 32, 2]  strips of columns, in them pairs of ranks; zeros at the edges
    int64_t R;
    float scale;
};

// y = x wᵀ + bias + Σ s·(x aᵀ) bᵀ over the deltas of each row
struct Decode {
    int64_t M, N, K;
    const bf16* x;  // [M, K]  rows ldx apart
    int64_t ldx;
    const bf16* w;  // packed: the sum runs over K, columns are N
    Master bias;    // [N]
    const RowDelta* deltas;
    int64_t count;  // of the deltas, which are ordered by row
    bf16* y;        // [M, N]
};

// the same bits for any number of threads
void delta_linear_decode(const Decode& call, int threads);

void delta_linear_decode_amx(const Decode& call, int threads);

}  // namespace pefast
