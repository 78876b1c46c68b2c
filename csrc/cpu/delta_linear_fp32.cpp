#include "delta_linear_fp32.h"

#include "../check.h"
#include "isa.h"
#include "pack.h"

namespace pefast {

uint64_t weight_mark(const float* w, int64_t stride_n, int64_t stride_k, int64_t N, int64_t K) {
    const int64_t SAMPLES = 32;
    uint64_t mark = 0xcbf29ce484222325;
    for (int64_t i = 0; i < SAMPLES; ++i) {
        const int64_t n = i * N / SAMPLES, k = i * 13 % SAMPLES * K / SAMPLES;
        mark = (mark ^ to_bits(w[n * stride_n + k * stride_k])) * 0x100000001b3;
    }
    return mark;
}

int64_t fp32_packed_size(int64_t sum, int64_t columns, int parts) {
    return packed_size(sum, columns) * parts;
}

#if defined(PEFAST_HAVE_AMX)

bool delta_linear_fp32_here() { return isa() == Isa::amx; }

namespace {

void check_here(int parts) {
    check(delta_linear_fp32_here(), "delta_linear: needs AMX, this process uses ", isa_name(isa()));
    check(parts == 1 || parts == 3, "delta_linear: a number has ", parts, " parts; 1 or 3 would be right");
}

}  // namespace

void delta_linear_fp32_pack(const float* src, int64_t stride_sum, int64_t stride_column, int64_t sum,
                            int64_t columns, int parts, bf16* packed, int threads) {
    check_here(parts);
    fp32_pack_amx(src, stride_sum, stride_column, sum, columns, parts, packed, threads);
}

void delta_linear_fp32_forward(const Fp32Forward& call, int parts, int threads) {
    check_here(parts);
    fp32_forward_amx(call, parts, threads);
}

void delta_linear_fp32_backward(const Fp32Backward& call, int parts, int threads) {
    check_here(parts);
    fp32_backward_amx(call, parts, threads);
}

#else

bool delta_linear_fp32_here() { return false; }

void delta_linear_fp32_pack(const float*, int64_t, int64_t, int64_t, int64_t, int, bf16*, int) {
    check(false, "delta_linear: needs AMX, and the compiler of this build did not know it");
}

void delta_linear_fp32_forward(const Fp32Forward&, int, int) {
    delta_linear_fp32_pack(nullptr, 0, 0, 0, 0, 0, nullptr, 0);
}

void delta_linear_fp32_backward(const Fp32Backward&, int, int) {
    delta_linear_fp32_pack(nullptr, 0, 0, 0, 0, 0, nullptr, 0);
}

#endif

}  // namespace pefast
