// The loss of rows of logits, and their gradient in their place. Formula: pefast/ops/linear_cross_entropy.py.
#pragma once

#include <cstdint>

#include "types.h"

namespace pefast {

struct CrossEntropy {
    void* z;                // [M, V]  rows V apart; logits become softmax(z) - onehot(t)
    const int64_t* target;  // [M]  from 0 to below V
    float* loss;            // [M]  log Σ exp z - z_t
    int64_t M, V;
};

// whether this processor and this build have what the function below needs
bool cross_entropy_here();

// bf16 or fp32; a row is one thread's, so the bits do not depend on their number
void cross_entropy(const CrossEntropy& call, Scalar type, int threads);

void cross_entropy_rows_avx512(const CrossEntropy& call, Scalar type, int64_t begin, int64_t end);

}  // namespace pefast
