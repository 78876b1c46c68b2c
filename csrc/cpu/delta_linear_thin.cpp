#include "delta_linear_thin.h"

#include "../check.h"
#include "isa.h"

namespace pefast {

bool delta_linear_thin_here() {
#if defined(PEFAST_HAVE_AVX2)
    return isa() >= Isa::avx2;
#else
    return false;
#endif
}

template <class T>
void delta_linear_thin_forward(const ThinForward<T>& call, int threads) {
#if defined(PEFAST_HAVE_AVX512)
    if (isa() >= Isa::avx512) return thin_forward_avx512(call, threads);
#endif
#if defined(PEFAST_HAVE_AVX2)
    if (isa() >= Isa::avx2) return thin_forward_avx2(call, threads);
#endif
    check(false, "delta_linear: needs AVX2, this process uses ", isa_name(isa()), "; ", call.M, " rows on ",
          threads, " threads were left alone");
}

template <class T>
void delta_linear_thin_backward(const ThinBackward<T>& call, int threads) {
#if defined(PEFAST_HAVE_AVX512)
    if (isa() >= Isa::avx512) return thin_backward_avx512(call, threads);
#endif
#if defined(PEFAST_HAVE_AVX2)
    if (isa() >= Isa::avx2) return thin_backward_avx2(call, threads);
#endif
    check(false, "delta_linear: needs AVX2, this process uses ", isa_name(isa()), "; ", call.M, " rows on ",
          threads, " threads were left alone");
}

template void delta_linear_thin_forward(const ThinForward<float>&, int);
template void delta_linear_thin_forward(const ThinForward<bf16>&, int);
template void delta_linear_thin_backward(const ThinBackward<float>&, int);
template void delta_linear_thin_backward(const ThinBackward<bf16>&, int);

}  // namespace pefast
