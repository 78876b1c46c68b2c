#include "dropout.h"

#include <omp.h>

#include <algorithm>

#include "isa.h"

namespace pefast {
namespace {

using Kernel = void (*)(const Dropout&, Scalar, int64_t, int64_t);

Kernel kernel_for(Isa level) {
#if defined(PEFAST_HAVE_AVX512)
    if (level >= Isa::avx512) return dropout_tiles_avx512;
#endif
#if defined(PEFAST_HAVE_AVX2)
    if (level >= Isa::avx2) return dropout_tiles_avx2;
#endif
    (void)level;
    return dropout_tiles_scalar;
}

}  // namespace

void dropout(const Dropout& d, Scalar type, int threads) {
    // 16,384 elements take about 5 µs, what it costs to wake a thread
    const int64_t WORTH_A_THREAD = 16384;
    const int64_t tiles = d.M * tiles_in_row(d.K);
    const int64_t useful = std::min(tiles, d.M * d.K / WORTH_A_THREAD);
    const Kernel kernel = kernel_for(isa());
    const int team = static_cast<int>(std::min<int64_t>(threads, useful));
    if (team <= 1) {
        kernel(d, type, 0, tiles);
        return;
    }
#pragma omp parallel num_threads(team)
    {
        // the team may be smaller than asked for
        const int64_t i = omp_get_thread_num(), n = omp_get_num_threads();
        kernel(d, type, tiles * i / n, tiles * (i + 1) / n);
    }
}

}  // namespace pefast
