// Attention over [prefix ; sequence] on a CPU, bf16 and fp32. Formula and names: pefast/ops/prefix_attention.py.
//
// The H/G query heads of one key head are taken as one matrix of R = L·H/G rows: row r is query r % L of head r / L.
#pragma once

#include <cstdint>

#include "philox.h"
#include "types.h"

namespace pefast {

// [batch, heads, rows, D] by its strides; the D numbers of a row are neighbours
template <class T>
struct Heads {
    T* data;  // null: there is none
    int64_t batch, head, row;
    T* at(int64_t b, int64_t h, int64_t i) const { return data + b * batch + h * head + i * row; }
};

// what does not depend on the type of the numbers
struct AttentionForm {
    int64_t B, H, G, L, S, P, D;
    const uint8_t* mask;           // [B, L, S]  1: a row sees the key; null: all do
    int64_t mask_batch, mask_row;  // strides
    bool causal;
    float scale;  // above 0
    bool dropout;
    Draw draw;
    double keep_scale;  // 1 / (1 - p)

    int64_t keys() const { return P + S; }
    int64_t group_rows() const { return H / G * L; }
};

template <class T>
struct Attention : AttentionForm {
    Heads<const T> q;                   // [B, H, L, D]
    Heads<const T> k, v;                // [B, G, S, D]
    Heads<const T> prefix_k, prefix_v;  // [B, G, P, D]  a batch stride of 0: one for all
};

// What forward keeps of the sums for backward. bf16: lse [B, H, L], log2 of the sum of 2^(x·log2 e), 0 in a row that
// sees nothing. fp32: lse [2, B, H, L], the largest x and the sum of e^(x - largest), 0 in such a row.
template <class T>
struct AttentionForward : Attention<T> {
    Heads<T> o;  // [B, H, L, D]
    float* lse;
};

// a gradient whose data is null is not asked for
template <class T>
struct AttentionBackward : Attention<T> {
    Heads<const T> o, d_o;  // [B, H, L, D]
    const float* lse;
    Heads<T> dq;                    // [B, H, L, D]
    Heads<T> dk, dv;                // [B, G, S, D]
    Heads<T> dprefix_k, dprefix_v;  // as the prefix
};

// whether this processor and this build have what the functions below need, for bf16 and for fp32
bool attention_here(Scalar type);

// the same bits for any number of threads
void attention_forward(const AttentionForward<bf16>& call, int threads);
void attention_backward(const AttentionBackward<bf16>& call, int threads);
void attention_forward(const AttentionForward<float>& call, int threads);
void attention_backward(const AttentionBackward<float>& call, int threads);

void attention_forward_amx(const AttentionForward<bf16>& call, int threads);
void attention_backward_amx(const AttentionBackward<bf16>& call, int threads);
void attention_forward_avx512(const AttentionForward<float>& call, int threads);
void attention_backward_avx512(const AttentionBackward<float>& call, int threads);

}  // namespace pefast
