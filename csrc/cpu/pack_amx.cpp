#include "pack.h"
#include "pack_tiles.h"

namespace pefast {

using namespace amx;

namespace {

// neither direction is contiguous: number by number
void pack_strip_strided(const bf16* src, int64_t stride_sum, int64_t stride_column, int64_t sum,
                        int64_t columns, int64_t strip, bf16* packed) {
    const int64_t terms = padded(sum, STEP);
    bf16* tiles = packed + strip * terms * STRIP;
    for (int64_t term = 0; term < terms; ++term)
        for (int64_t i = 0; i < STRIP; ++i) {
            const int64_t column = strip * STRIP + i, place = term / STEP * 2 + i / SIDE;
            tiles[place * TILE + term % STEP / 2 * 32 + i % SIDE * 2 + term % 2] =
                term < sum && column < columns ? src[term * stride_sum + column * stride_column] : bf16{0};
        }
}

}  // namespace

void pack_amx(const bf16* src, int64_t stride_sum, int64_t stride_column, int64_t sum, int64_t columns,
              bf16* packed, int threads) {
    const int64_t strips = parts(columns, STRIP);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t strip = 0; strip < strips; ++strip) {
        if (stride_sum == 1)
            pack_strip<Terms::across>(src, stride_column, sum, columns, strip, packed);
        else if (stride_column == 1)
            pack_strip<Terms::along>(src, stride_sum, sum, columns, strip, packed);
        else
            pack_strip_strided(src, stride_sum, stride_column, sum, columns, strip, packed);
    }
}

}  // namespace pefast
