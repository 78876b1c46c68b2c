#include "cross_entropy.h"

#include <omp.h>

#include <algorithm>

#include "isa.h"

namespace pefast {

bool cross_entropy_here() {
#if defined(PEFAST_HAVE_AVX512)
    return isa() >= Isa::avx512;
#else
    return false;
#endif
}

void cross_entropy(const CrossEntropy& call, Scalar type, int threads) {
#if defined(PEFAST_HAVE_AVX512)
    const int team = static_cast<int>(std::min<int64_t>(threads, call.M));
    if (team <= 1) {
        cross_entropy_rows_avx512(call, type, 0, call.M);
        return;
    }
#pragma omp parallel num_threads(team)
    {
        // the team may be smaller than asked for
        const int64_t i = omp_get_thread_num(), n = omp_get_num_threads();
        cross_entropy_rows_avx512(call, type, call.M * i / n, call.M * (i + 1) / n);
    }
#else
    (void)call, (void)type, (void)threads;
#endif
}

}  // namespace pefast
