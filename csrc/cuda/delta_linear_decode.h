// delta_linear for the few rows of a decoding step on a GPU, each row with adapters of its own, in one launch.
// Formula and names: pefast/ops/delta_linear.py; the deltas here are LoRAs.
//
//     h = s·(x aᵀ)                    [M, R]  fp32; every delta has slots of its own, side by side
//     y = (x wᵀ + h bᵀ) ⊙ g + bias    [M, N]  a row adds the deltas whose adapter is its id
//
// A step is as fast as memory: w is read once. With e bytes a number, W columns a block and R all ranks together,
//
//     from memory   e·(N·K + R·K + N·R + M·K + M·N) + 8·M·R
//     from L2       besides, every block reads x again: N/W · e·M·K, half of w's bytes at M = 16 and W = 32
//
// The waist is the hard part. A block that made its own h would read every a again, R/W of w's bytes: 0.5 for one
// rank 16 at W = 32, 8 for sixteen of them. So some blocks make h, W slots each, and the others take it from memory.
// No barrier spans the grid: a block draws its number, and the first numbers are the waists'. Whoever needs h has
// drawn later than all who make it, so they run already, whatever order the GPU starts blocks in; it looks for h only
// after it has walked w, when h is long there. Clusters could share h as well, on sm_90 alone and by 8 blocks.
//
// Sums run in a fixed order: the same bits from run to run, for every W and for every other row in the batch. The
// only atomics count blocks. Proved without a GPU by tests/ladder/test_cuda_*.py; not yet run or timed on one.
#pragma once

#include <cstdint>

namespace pefast {

// rows of x, and deltas, that one call takes
constexpr int64_t DECODE_ROWS = 16, DECODE_DELTAS = 32;
// an adapter that every row uses
constexpr int64_t EVERY_ROW = -2;

// every field has eight bytes, so that a caller in any language can lay them side by side

struct DecodeDelta {
    const void* a;  // [R, K]  rows lda apart
    const void* b;  // [N, R]  rows ldb apart
    int64_t lda, ldb, R;
    int64_t fp32_a, fp32_b;  // 1: fp32; 0: as x
    int64_t adapter;         // the id of its rows, or EVERY_ROW
    double scale;
};

struct DecodeCall {
    const void* x;  // [M, K]  rows ldx apart
    const void* w;  // [N, K]  rows ldw apart
    const void* bias;
    const void* gain;    // [N] both; nullptr: none
    const int64_t* ids;  // [M]  nullptr: only deltas of every row
    void* y;             // [M, N]
    float* h;            // room for M times the slots of all deltas: each has its rank, rounded up to 32
    unsigned* counts;    // 3 zeros, and zeros again afterwards; launches that may overlap need their own
    int64_t M, N, K, ldx, ldw;
    int64_t type;  // of x, w and y: 0 fp32, 1 bf16, 2 fp16
    int64_t fp32_bias, fp32_gain;
    int64_t count;       // of the deltas
    int64_t processors;  // of the GPU: how many blocks keep it busy
};

}  // namespace pefast

// launches on a stream. Every pointer but the first two is the GPU's. Returns the cudaError: 0 where it was launched,
// cudaErrorInvalidValue for sizes that do not fit
extern "C" int pefast_delta_linear_decode(const pefast::DecodeCall* call, const pefast::DecodeDelta* deltas,
                                          void* stream);

// bytes of both structs together, for callers that lay them out themselves
extern "C" int64_t pefast_delta_linear_decode_layout();
