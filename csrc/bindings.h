// What the files of pefast._C share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace pefast {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void bind_attention(pybind11::module_& m);
void bind_delta_linear(pybind11::module_& m);
void bind_low_rank(pybind11::module_& m);
void bind_one_lora(pybind11::module_& m);
void bind_product(pybind11::module_& m);

// one plain LoRA by addresses, as bindings_one_lora.cpp calls it by tensors
bool delta_linear_forward_door(uintptr_t x, int64_t ldx, uintptr_t w, int64_t stride_n, int64_t stride_k,
                               uint64_t mark, uintptr_t packed, uintptr_t bias, bool bias_fp32, uintptr_t a,
                               bool a_fp32, uintptr_t b, bool b_fp32, float scale, double p, uintptr_t seed,
                               uintptr_t y, uintptr_t h, uintptr_t kept, bool kept_ready, int64_t M,
                               int64_t N, int64_t K, int64_t R, int threads);
void delta_linear_backward_door(uintptr_t x, int64_t ldx, uintptr_t dy, int64_t lddy, uintptr_t h,
                                uintptr_t packed, uintptr_t a, bool a_fp32, uintptr_t b, bool b_fp32,
                                float scale, double p, uintptr_t seed, uintptr_t dx, uintptr_t da,
                                uintptr_t db, uintptr_t kept, bool kept_ready, int64_t M, int64_t N,
                                int64_t K, int64_t R, int threads);

// numbers of a contiguous parameter, hashed: as weight_mark
uint64_t parameter_mark(uintptr_t address, int64_t bytes, int64_t samples = 16);

}  // namespace pefast
