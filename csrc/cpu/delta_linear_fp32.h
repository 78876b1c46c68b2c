// delta_linear on a CPU for fp32 activations. Formula and names: pefast/ops/delta_linear.py.
//
// Every number is a sum of bf16 parts, which AMX multiplies: with x = x0 + x1 + x2, each 2^-8 of the one before,
//     x w = x0 w0 + (x0 w1 + x1 w0) + (x0 w2 + x1 w1 + x2 w0) + what fp32 would round away.
// Three parts hold all 24 bits of an fp32 number; one part alone is a bf16 product with an fp32 sum.
// An infinity gives a NaN, for its parts are inf - inf; numbers below 2^-110 lose bits, for AMX drops subnormals.
#pragma once

#include <cstdint>
#include <vector>

#include "philox.h"
#include "types.h"

namespace pefast {

// one LoRA beside the frozen product; R = 0: there is none
struct LowRank {
    const float* a;  // [R, K]  null: h comes from elsewhere, and dh goes there
    const float* b;  // [N, R]
    int64_t R;
    float scale;
    bool dropout;
    Draw draw;
    float keep_scale;  // 1 / (1 - p)
};

// a frozen layer that reads x, and its results: y = u ⊙ gain + bias with u = x wᵀ + s·h bᵀ, h = x̂ aᵀ
struct Fp32Layer {
    int64_t N;
    const bf16* w;  // packed: the sum runs over K, columns are N
    LowRank lora;
    const float *gain, *bias;  // [N]  null: there is none
    float *y, *u;              // [M, N]  u null: nobody asks for it
    float* h;                  // [M, R]  read where a is null
};

// layers that read the same x, which is split once for all of them
struct Fp32Forward {
    int64_t M, K;
    const float* x;  // [M, K]  rows ldx apart
    int64_t ldx;
    std::vector<Fp32Layer> layers;
};

// du = dy ⊙ gain, dh = s·du b, da = dhᵀ x̂, db = s·duᵀ h, dgain = Σ dy ⊙ u, dbias = Σ dy; a null pointer: not asked for
struct Fp32LayerBackward {
    int64_t N;
    const float* dy;  // [M, N]  rows lddy apart
    int64_t lddy;
    const float* gain;  // [N]
    const float* u;     // [M, N]
    const float* h;     // [M, R]
    const bf16* w;      // packed: the sum runs over N, columns are K
    LowRank lora;
    float* dh;             // [M, R]  where a is null
    float* da;             // [R, K]
    float* db;             // [N, R]
    float *dgain, *dbias;  // [N]
};

// dx = Σ over layers du w + mask ⊙ (dh a)/(1-p), and what is asked for of each layer
struct Fp32Backward {
    int64_t M, K;
    const float* x;  // [M, K]  rows ldx apart
    int64_t ldx;
    float* dx;  // [M, K]
    std::vector<Fp32LayerBackward> layers;
};

// whether this processor and this build have what the functions below need
bool delta_linear_fp32_here();

// how many bf16 numbers a right factor [sum, columns] takes in so many parts
int64_t fp32_packed_size(int64_t sum, int64_t columns, int parts);

// 32 numbers of w [N, K], hashed: tells that somebody wrote to it behind autograd's back, as through .data
uint64_t weight_mark(const float* w, int64_t stride_n, int64_t stride_k, int64_t N, int64_t K);

// a right factor [sum, columns] with any strides, packed in 1 or 3 parts
void delta_linear_fp32_pack(const float* src, int64_t stride_sum, int64_t stride_column, int64_t sum,
                            int64_t columns, int parts, bf16* packed, int threads);

// in 1 or 3 parts, as w is packed; the same bits for any number of threads
void delta_linear_fp32_forward(const Fp32Forward& call, int parts, int threads);
void delta_linear_fp32_backward(const Fp32Backward& call, int parts, int threads);

void fp32_pack_amx(const float* src, int64_t stride_sum, int64_t stride_column, int64_t sum, int64_t columns,
                   int parts, bf16* packed, int threads);
void fp32_forward_amx(const Fp32Forward& call, int parts, int threads);
void fp32_backward_amx(const Fp32Backward& call, int parts, int threads);

}  // namespace pefast
