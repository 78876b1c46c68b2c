// Dropout on a CPU. Formula and layout of the mask: pefast/ops/dropout.py.
#pragma once

#include <cstdint>

#include "philox.h"
#include "types.h"

namespace pefast {

// x_hat = mask ⊙ x · scale and y += mask ⊙ t · scale, with one mask; a half whose input is null is left out
struct Dropout {
    const void* x;  // [M, K]  rows ldx apart
    int64_t ldx;
    void* x_hat;    // [M, K]  rows K apart
    const void* t;  // [M, K]  rows ldt apart
    int64_t ldt;
    void* y;  // [M, K]  rows ldy apart
    int64_t ldy;
    int64_t M, K;
    Draw draw;
    double scale;  // 1 / (1 - p)
};

// the same bits for any number of threads and any instruction set
void dropout(const Dropout& d, Scalar type, int threads);

// a tile is TILE columns of one row, or the rest of it; [begin, end) counts tiles along rows first
constexpr int64_t TILE = 4096;
inline int64_t tiles_in_row(int64_t K) { return (K + TILE - 1) / TILE; }

void dropout_tiles_scalar(const Dropout& d, Scalar type, int64_t begin, int64_t end);
void dropout_tiles_avx2(const Dropout& d, Scalar type, int64_t begin, int64_t end);
void dropout_tiles_avx512(const Dropout& d, Scalar type, int64_t begin, int64_t end);

}  // namespace pefast
