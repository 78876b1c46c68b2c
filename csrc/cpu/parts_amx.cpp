#include "parts_amx.h"

#include "delta_linear_fp32.h"

namespace pefast {

using namespace amx;

namespace {

// neither direction is contiguous: one block of 32 x 32 at a time is brought together
template <int P>
void pack_parts_strided(const float* src, int64_t stride_sum, int64_t stride_column, int64_t sum,
                        int64_t columns, int64_t strip, bf16* packed) {
    alignas(64) float block[STEP * STRIP];
    const int64_t steps = parts(sum, STEP), column = strip * STRIP, wide = std::min(columns - column, STRIP);
    for (int64_t step = 0; step < steps; ++step) {
        const int64_t term = step * STEP, tall = std::min(sum - term, STEP);
        for (int64_t i = 0; i < tall; ++i)
            for (int64_t j = 0; j < wide; ++j)
                block[i * STRIP + j] = src[(term + i) * stride_sum + (column + j) * stride_column];
        pack_parts_along<P>(block, STRIP, tall, wide, packed + (strip * steps + step) * 2 * TILE * P);
    }
}

template <int P>
void pack_all(const float* src, int64_t stride_sum, int64_t stride_column, int64_t sum, int64_t columns,
              bf16* packed, int threads) {
    const int64_t strips = parts(columns, STRIP);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t strip = 0; strip < strips; ++strip) {
        if (stride_sum == 1)
            pack_parts<P, Terms::across>(src, stride_column, sum, columns, strip, packed);
        else if (stride_column == 1)
            pack_parts<P, Terms::along>(src, stride_sum, sum, columns, strip, packed);
        else
            pack_parts_strided<P>(src, stride_sum, stride_column, sum, columns, strip, packed);
    }
}

}  // namespace

void fp32_pack_amx(const float* src, int64_t stride_sum, int64_t stride_column, int64_t sum, int64_t columns,
                   int parts, bf16* packed, int threads) {
    (parts == 1 ? pack_all<1> : pack_all<3>)(src, stride_sum, stride_column, sum, columns, packed, threads);
}

}  // namespace pefast
