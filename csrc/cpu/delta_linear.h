// delta_linear on a CPU: a frozen bf16 weight and one LoRA in one pass. Formula and names: pefast/ops/delta_linear.py.
#pragma once

#include <cstdint>

#include "philox.h"
#include "types.h"

namespace pefast {

// a [R, K], b [N, R] or bias [N] as the caller has it: contiguous, bf16, or fp32 beside a bf16 weight
struct Master {
    const void* data;  // null: there is none
    bool fp32;
};

struct Waist {
    Master a;  // [R, K]
    Master b;  // [N, R]
    int64_t R;
    float scale;
    bool dropout;
    Draw draw;
    float keep_scale;  // 1 / (1 - p)
};

// y = x wᵀ + bias + s·h bᵀ with h = x̂ aᵀ
struct DeltaForward {
    int64_t M, N, K;
    const bf16* x;  // [M, K]  rows ldx apart
    int64_t ldx;
    const bf16* w;  // packed: the sum runs over K, columns are N
    Waist waist;
    Master bias;  // [N]
    bf16* y;      // [M, N]
    bf16* h;      // [M, R]
};

// dh = s·dy b, dx = dy w + mask ⊙ (dh a)/(1-p), da = dhᵀ x̂, db = s·dyᵀ h; a null pointer: not asked for
struct DeltaBackward {
    int64_t M, N, K;
    const bf16* x;  // [M, K]  rows ldx apart
    int64_t ldx;
    const bf16* dy;  // [M, N]  rows lddy apart
    int64_t lddy;
    const bf16* h;  // [M, R]
    const bf16* w;  // packed: the sum runs over N, columns are K
    Waist waist;
    bf16* dx;   // [M, K]
    float* da;  // [R, K]
    float* db;  // [N, R]
};

// whether this processor and this build have what the functions below need
bool delta_linear_here();

// 32 numbers of w [N, K], hashed: tells that somebody wrote to it behind autograd's back, as through .data
uint64_t weight_mark(const bf16* w, int64_t stride_n, int64_t stride_k, int64_t N, int64_t K);

// a right factor [sum, columns] with any strides, packed (pack.h)
void delta_linear_pack(const bf16* src, int64_t stride_sum, int64_t stride_column, int64_t sum,
                       int64_t columns, bf16* packed, int threads);

// the same bits for any number of threads
void delta_linear_forward(const DeltaForward& call, int threads);
void delta_linear_backward(const DeltaBackward& call, int threads);

void delta_linear_forward_amx(const DeltaForward& call, int threads);
void delta_linear_backward_amx(const DeltaBackward& call, int threads);

}  // namespace pefast
