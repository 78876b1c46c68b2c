#include "delta_linear.h"

#include "../check.h"
#include "isa.h"
#include "pack.h"

namespace pefast {

Activation activation_of(const std::string& name) {
    const char* NAMES[] = {"identity", "relu",    "gelu",       "gelu_new", "quick_gelu", "silu",
                           "tanh",     "sigmoid", "leaky_relu", "elu",      "softplus",   "mish"};
    int at = 0;
    for (const char* known : NAMES) {
        if (name == known) return static_cast<Activation>(at);
        ++at;
    }
    check(false, "delta_linear: no activation '", name,
          "' here; identity, relu, gelu, silu … would be right");
    return Activation::identity;
}

uint64_t weight_mark(const bf16* w, int64_t stride_n, int64_t stride_k, int64_t N, int64_t K) {
    const int64_t SAMPLES = 32;
    uint64_t mark = 0xcbf29ce484222325;
    for (int64_t i = 0; i < SAMPLES; ++i) {
        const int64_t n = i * N / SAMPLES, k = i * 13 % SAMPLES * K / SAMPLES;
        mark = (mark ^ w[n * stride_n + k * stride_k].bits) * 0x100000001b3;
    }
    return mark;
}

#if defined(PEFAST_HAVE_AMX)

bool delta_linear_here() { return isa() == Isa::amx; }

void delta_linear_pack(const bf16* src, int64_t stride_sum, int64_t stride_column, int64_t sum,
                       int64_t columns, bf16* packed, int threads) {
    check(delta_linear_here(), "delta_linear: packing a weight needs AMX, this process uses ",
          isa_name(isa()));
    pack_amx(src, stride_sum, stride_column, sum, columns, packed, threads);
}

void delta_linear_forward(const DeltaForward& call, int threads) {
    check(delta_linear_here(), "delta_linear: needs AMX, this process uses ", isa_name(isa()));
    delta_linear_forward_amx(call, threads);
}

void delta_linear_backward(const DeltaBackward& call, int threads) {
    check(delta_linear_here(), "delta_linear: needs AMX, this process uses ", isa_name(isa()));
    delta_linear_backward_amx(call, threads);
}

#else

bool delta_linear_here() { return false; }

void delta_linear_pack(const bf16*, int64_t, int64_t, int64_t, int64_t, bf16*, int) {
    check(false, "delta_linear: needs AMX, and the compiler of this build did not know it");
}

void delta_linear_forward(const DeltaForward&, int) { delta_linear_pack(nullptr, 0, 0, 0, 0, nullptr, 0); }
void delta_linear_backward(const DeltaBackward&, int) { delta_linear_pack(nullptr, 0, 0, 0, 0, nullptr, 0); }

#endif

}  // namespace pefast
