// delta_linear on a CPU: frozen bf16 weights that read the same x, and every segment of the waist, in one pass.
// Formula and names: pefast/ops/delta_linear.py.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "philox.h"
#include "types.h"

namespace pefast {

// a parameter as the caller has it: contiguous, bf16, or fp32 beside a bf16 weight
struct Master {
    const void* data = nullptr;  // null: there is none
    bool fp32 = false;
};

// in the order of pefast/eager/activations.py
enum class Activation {
    identity,
    relu,
    gelu,
    gelu_new,
    quick_gelu,
    silu,
    tanh,
    sigmoid,
    leaky_relu,
    elu,
    softplus,
    mish
};

// one delta's part of the waist: s·(σ(x̂ aᵀ + c) bᵀ + d), or s·(h bᵀ + d) with a waist h from elsewhere
struct Segment {
    Master a, b, c, d;  // [R, K]  [N, R]  [R]  [N]
    int64_t R = 0;
    float scale = 1;
    Activation activation = Activation::identity;
    bool dropout = false;
    Draw draw = {};
    float keep_scale = 1;  // 1 / (1 - p)
    bool routed = false;   // whether only rows with this id take part
    int64_t adapter = 0;
    const bf16* h = nullptr;  // [M, R]  given where there is no a
};

// one of the frozen layers that read x
struct Sibling {
    int64_t N = 0;
    const bf16* w = nullptr;  // packed: for y the sum runs over K, for dx over N
    Master bias, gain;        // [N]
    std::vector<Segment> segments;
};

struct SiblingForward : Sibling {
    bf16* y = nullptr;  // [M, N]
    bf16* u = nullptr;  // [M, N]  y before gain and bias; null: nobody asks for the gain's gradient
};

// what is asked for of a segment; da, db, dc and dd in fp32, null: not asked for
struct Gradients {
    float *da = nullptr, *db = nullptr, *dc = nullptr, *dd = nullptr;
    bf16* dh = nullptr;  // [M, R]  of a waist that was given
};

struct SiblingBackward : Sibling {
    const bf16* dy = nullptr;  // [M, N]  rows lddy apart
    int64_t lddy = 0;
    const bf16* u = nullptr;
    float *dbias = nullptr, *dgain = nullptr;  // [N]
    std::vector<Gradients> gradients;          // of each segment
};

// a and b of one segment beside one layer, packed as one direction reads them: size() numbers, 64 bytes aligned, that
// the caller keeps from call to call as long as nobody writes to a, b or s. Not ready: this call packs all of both.
struct KeptFactors {
    bf16* at = nullptr;  // null: every call packs what it needs, and keeps nothing
    bool ready = false;

    static int64_t size(int64_t R, int64_t N, int64_t K) {
        const auto whole = [](int64_t length) { return (length + 31) / 32 * 32; };
        return whole(R) * (whole(K) + whole(N));
    }
};

template <class One>
struct DeltaCall {
    int64_t M = 0, K = 0;
    const bf16* x = nullptr;  // [M, K]  rows ldx apart; null in a backward that does not look at it
    int64_t ldx = 0;
    const int64_t* ids = nullptr;  // [M]  the adapter of each row
    std::vector<One> siblings;
    KeptFactors kept;
};

// waist [M, W]: z of each segment that computes it, in order and side by side, W their ranks together; for σ =
// identity that is h. Written by forward, read by backward
struct DeltaForward : DeltaCall<SiblingForward> {
    bf16* waist = nullptr;
};

struct DeltaBackward : DeltaCall<SiblingBackward> {
    const bf16* waist = nullptr;
    bf16* dx = nullptr;  // [M, K]  of all siblings together
};

// throws where there is no activation of that name
Activation activation_of(const std::string& name);

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
