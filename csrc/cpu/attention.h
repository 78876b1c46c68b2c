// Attention over [prefix ; sequence] on a CPU, bf16. Formula and names: pefast/ops/prefix_attention.py.
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

struct Attention {
    int64_t B, H, G, L, S, P, D;
    Heads<const bf16> q;                   // [B, H, L, D]
    Heads<const bf16> k, v;                // [B, G, S, D]
    Heads<const bf16> prefix_k, prefix_v;  // [B, G, P, D]  a batch stride of 0: one for all
    const uint8_t* mask;                   // [B, L, S]  1: a row sees the key; null: all do
    int64_t mask_batch, mask_row;          // strides
    bool causal;
    float scale;  // above 0
    bool dropout;
    Draw draw;
    float keep_scale;  // 1 / (1 - p)

    int64_t keys() const { return P + S; }
    int64_t group_rows() const { return H / G * L; }
};

struct AttentionForward : Attention {
    Heads<bf16> o;  // [B, H, L, D]
    float* lse;     // [B, H, L]  log2 of the sum of 2^(x·log2 e), 0 in a row that sees nothing
};

// a gradient whose data is null is not asked for
struct AttentionBackward : Attention {
    Heads<const bf16> o, d_o;          // [B, H, L, D]
    const float* lse;                  // [B, H, L]
    Heads<bf16> dq;                    // [B, H, L, D]
    Heads<bf16> dk, dv;                // [B, G, S, D]
    Heads<bf16> dprefix_k, dprefix_v;  // as the prefix
};

// whether this processor and this build have what the functions below need
bool attention_here();

// the same bits for any number of threads
void attention_forward(const AttentionForward& call, int threads);
void attention_backward(const AttentionBackward& call, int threads);

void attention_forward_amx(const AttentionForward& call, int threads);
void attention_backward_amx(const AttentionBackward& call, int threads);

}  // namespace pefast
