#include "delta_linear_product.h"

#include <omp.h>

#include <algorithm>
#include <cstring>

#include "../check.h"
#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace pefast {
namespace {

// Intel's vdpbf16ps multiplies half as many numbers as its fp32 multiplications, AMD's twice as many
[[maybe_unused]] bool made_by_intel() {
#if defined(__x86_64__)
    uint32_t most, name[3];
    return __get_cpuid(0, &most, &name[0], &name[2], &name[1]) && !std::memcmp(name, "GenuineIntel", 12);
#else
    return false;
#endif
}

}  // namespace

bool product_here() {
#if defined(PEFAST_HAVE_AVX2)
    static const bool intel = made_by_intel();
    return isa() == Isa::avx2 || isa() == Isa::avx512 || (isa() == Isa::avx512_bf16 && intel);
#else
    return false;
#endif
}

int64_t product_packed_size(int64_t sum, int64_t columns) {
    return (columns + PRODUCT_STRIP - 1) / PRODUCT_STRIP * PRODUCT_STRIP * sum;
}

void product_pack(const bf16* src, int64_t stride_sum, int64_t stride_column, int64_t sum, int64_t columns,
                  bf16* packed, int threads) {
    const int64_t strips = (columns + PRODUCT_STRIP - 1) / PRODUCT_STRIP;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t strip = 0; strip < strips; ++strip) {
        const int64_t begin = strip * PRODUCT_STRIP, inside = std::min(PRODUCT_STRIP, columns - begin);
        bf16* to = packed + begin * sum;
        for (int64_t i = 0; i < sum; ++i)
            for (int64_t c = 0; c < PRODUCT_STRIP; ++c)
                *to++ = c < inside ? src[i * stride_sum + (begin + c) * stride_column] : bf16{0};
    }
}

void product(const Product& call, int threads) {
#if defined(PEFAST_HAVE_AVX512)
    if (isa() >= Isa::avx512) return product_avx512(call, threads);
#endif
#if defined(PEFAST_HAVE_AVX2)
    if (isa() >= Isa::avx2) return product_avx2(call, threads);
#endif
    check(false, "delta_linear: needs AVX2, this process uses ", isa_name(isa()), "; ", call.M, " rows on ",
          threads, " threads were left alone");
}

}  // namespace pefast
