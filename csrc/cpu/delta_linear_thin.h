// The thin products of delta_linear on a CPU without tiles, fp32 and bf16: the frozen product is a library's, and one
// pass over the rows adds everything that a LoRA asks for. Formula and names: pefast/ops/delta_linear.py.
#pragma once

#include <cstdint>

#include "delta_linear_fp32.h"
#include "types.h"

namespace pefast {

// h = x̂ aᵀ, y += s·h bᵀ; T is float or bf16, sums are fp32
template <class T>
struct ThinForward {
    int64_t M, N, K;
    const T* x;  // [M, K]  rows ldx apart
    int64_t ldx;
    LowRank lora;
    T* y;  // [M, N]  x wᵀ + bias
    T* h;  // [M, R]
};

// dh = s·dy b, dx += mask ⊙ (dh a)/(1-p), da = dhᵀ x̂, db = s·dyᵀ h; a null pointer: not asked for
template <class T>
struct ThinBackward {
    int64_t M, N, K;
    const T* x;  // [M, K]  rows ldx apart
    int64_t ldx;
    const T* dy;  // [M, N]  rows lddy apart
    int64_t lddy;
    const T* h;  // [M, R]
    LowRank lora;
    T* dx;      // [M, K]  dy w
    float* da;  // [R, K]
    float* db;  // [N, R]
};

// whether this processor and this build have what the functions below need: AVX2, or AVX-512
bool delta_linear_thin_here();

// the same bits for any number of threads
template <class T>
void delta_linear_thin_forward(const ThinForward<T>& call, int threads);
template <class T>
void delta_linear_thin_backward(const ThinBackward<T>& call, int threads);

void thin_forward_avx2(const ThinForward<float>& call, int threads);
void thin_forward_avx2(const ThinForward<bf16>& call, int threads);
void thin_backward_avx2(const ThinBackward<float>& call, int threads);
void thin_backward_avx2(const ThinBackward<bf16>& call, int threads);
void thin_forward_avx512(const ThinForward<float>& call, int threads);
void thin_forward_avx512(const ThinForward<bf16>& call, int threads);
void thin_backward_avx512(const ThinBackward<float>& call, int threads);
void thin_backward_avx512(const ThinBackward<bf16>& call, int threads);

}  // namespace pefast
