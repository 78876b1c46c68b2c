// The frozen product of delta_linear in bf16 on CPUs that multiply fp32 faster than bf16: y = x wᵀ + bias, or dx = dy w.
// Formula and names: pefast/ops/delta_linear.py.
//
// A library's bf16 product without AMX takes 2 to 15 times as long as its fp32 product (LOG.md). Here numbers are widened
// on their way into the first cache and multiplied as fp32; sums are fp32, and rounded once.
#pragma once

#include <cstdint>

#include "types.h"

namespace pefast {

// columns of a strip of packed w: three registers of AVX-512, twice three of AVX2
constexpr int64_t PRODUCT_STRIP = 48;

struct Product {
    int64_t M, N, K;
    const bf16* x;  // [M, K]  rows ldx apart
    int64_t ldx;
    const bf16* w;      // [N / 48][K, 48]  packed: the sum runs over K, columns are N
    const float* bias;  // [N]  null: there is none
    bf16* y;            // [M, N]
};

// whether this processor has no faster bf16 product: AVX2 and AVX-512 without bf16, and Intel's with it, whose
// vdpbf16ps does half of what its fp32 multiplications do
bool product_here();

// how many numbers a right factor [sum, columns] takes packed
int64_t product_packed_size(int64_t sum, int64_t columns);

// a right factor [sum, columns] with any strides, packed
void product_pack(const bf16* src, int64_t stride_sum, int64_t stride_column, int64_t sum, int64_t columns,
                  bf16* packed, int threads);

// the same bits for any number of threads
void product(const Product& call, int threads);

void product_avx2(const Product& call, int threads);
void product_avx512(const Product& call, int threads);

}  // namespace pefast
