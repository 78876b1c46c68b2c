#include "attention.h"

#include "../check.h"
#include "isa.h"

namespace pefast {

bool attention_here(Scalar type) {
#if defined(PEFAST_HAVE_AMX)
    if (type == Scalar::bf16) return isa() == Isa::amx;
#endif
#if defined(PEFAST_HAVE_AVX512)
    if (type == Scalar::fp32) return isa() >= Isa::avx512;
#endif
    return false;
}

namespace {

void check_here(Scalar type) {
    check(attention_here(type), "prefix_attention: needs ", type == Scalar::bf16 ? "AMX" : "AVX-512",
          ", this process uses ", isa_name(isa()));
}

}  // namespace

void attention_forward(const AttentionForward<bf16>& call, int threads) {
    check_here(Scalar::bf16);
#if defined(PEFAST_HAVE_AMX)
    attention_forward_amx(call, threads);
#endif
    (void)call, (void)threads;
}

void attention_backward(const AttentionBackward<bf16>& call, int threads) {
    check_here(Scalar::bf16);
#if defined(PEFAST_HAVE_AMX)
    attention_backward_amx(call, threads);
#endif
    (void)call, (void)threads;
}

void attention_forward(const AttentionForward<float>& call, int threads) {
    check_here(Scalar::fp32);
#if defined(PEFAST_HAVE_AVX512)
    attention_forward_avx512(call, threads);
#endif
    (void)call, (void)threads;
}

void attention_backward(const AttentionBackward<float>& call, int threads) {
    check_here(Scalar::fp32);
#if defined(PEFAST_HAVE_AVX512)
    attention_backward_avx512(call, threads);
#endif
    (void)call, (void)threads;
}

}  // namespace pefast
