// prefix_attention in pefast._C: checked here, computed in cpu/attention*.
#include <pybind11/stl.h>

#include <array>

#include "bindings.h"
#include "check.h"
#include "cpu/attention.h"

namespace py = pybind11;

namespace pefast {
namespace {

// a tensor [batch, heads, rows, D]: its address, and its strides but the last, which is 1
using Place = std::array<int64_t, 4>;

template <class T>
Heads<T> heads(const Place& p) {
    return {at<T>(p[0]), p[1], p[2], p[3]};
}

// B, H, G, L, S, P, D; the addresses of q, k, v and the prefix; the mask's address and strides
template <class T>
Attention<T> attention(const std::array<int64_t, 7>& sizes, const std::array<Place, 5>& tensors,
                       const std::array<int64_t, 3>& mask, bool causal, float scale, double p, uintptr_t seed,
                       int threads) {
    const char* name = "prefix_attention";
    const auto [B, H, G, L, S, P, D] = sizes;
    check(B > 0 && G > 0 && H > 0 && H % G == 0 && L > 0 && D > 0 && S >= 0 && P >= 0 && P + S > 0, name,
          ": B, H, G, L, S, P and D are ", B, ", ", H, ", ", G, ", ", L, ", ", S, ", ", P, " and ", D,
          "; 1 or more of each and of keys, and H a multiple of G, would be right");
    check(B * H * L < int64_t{1} << 32, name, ": there are ", B * H * L,
          " rows; fewer than 2^32 would be right");
    check(
        tensors[0][0] && (!S || (tensors[1][0] && tensors[2][0])) && (!P || (tensors[3][0] && tensors[4][0])),
        name, ": a tensor has no storage");
    check(!causal || S >= L, name, ": causal with ", L, " queries and ", S,
          " keys; as many keys would be right");
    check(scale > 0 && p >= 0 && p < 1, name, ": scale is ", scale, " and p is ", p,
          "; above 0, and from 0 to below 1, would be right");
    check_threads(name, threads);
    const int64_t number = p > 0 ? *at<const int64_t>(seed) : 0;
    const AttentionForm form = {B,          H,
                                G,          L,
                                S,          P,
                                D,          at<const uint8_t>(mask[0]),
                                mask[1],    mask[2],
                                causal,     scale,
                                p > 0,      make_draw(p, number, 0),
                                1 / (1 - p)};
    return {form,
            heads<const T>(tensors[0]),
            heads<const T>(tensors[1]),
            heads<const T>(tensors[2]),
            heads<const T>(tensors[3]),
            heads<const T>(tensors[4])};
}

template <class T>
void attention_forward_door(const std::array<int64_t, 7>& sizes, const std::array<Place, 5>& tensors,
                            const std::array<int64_t, 3>& mask, bool causal, float scale, double p,
                            uintptr_t seed, const Place& o, uintptr_t lse, int threads) {
    const auto call = attention<T>(sizes, tensors, mask, causal, scale, p, seed, threads);
    attention_forward(AttentionForward<T>{call, heads<T>(o), at<float>(lse)}, threads);
}

// results: dq, dk, dv and those of the prefix; an address of 0 leaves one out
template <class T>
void attention_backward_door(const std::array<int64_t, 7>& sizes, const std::array<Place, 5>& tensors,
                             const std::array<int64_t, 3>& mask, bool causal, float scale, double p,
                             uintptr_t seed, const Place& o, const Place& d_o, uintptr_t lse,
                             const std::array<Place, 5>& results, int threads) {
    const auto call = attention<T>(sizes, tensors, mask, causal, scale, p, seed, threads);
    attention_backward(AttentionBackward<T>{call, heads<const T>(o), heads<const T>(d_o),
                                            at<const float>(lse), heads<T>(results[0]), heads<T>(results[1]),
                                            heads<T>(results[2]), heads<T>(results[3]), heads<T>(results[4])},
                       threads);
}

}  // namespace

void bind_attention(py::module_& m) {
    m.def(
        "attention_here", [](bool fp32) { return attention_here(fp32 ? Scalar::fp32 : Scalar::bf16); },
        "Whether attention's kernels for bf16, or fp32, run on this processor.");
    m.def("attention_forward", &attention_forward_door<bf16>, "o, and what backward needs of each row's sum.",
          py::call_guard<py::gil_scoped_release>());
    m.def("attention_forward_fp32", &attention_forward_door<float>, "The same for fp32.",
          py::call_guard<py::gil_scoped_release>());
    m.def("attention_backward", &attention_backward_door<bf16>, "Gradients; those of address 0 are left out.",
          py::call_guard<py::gil_scoped_release>());
    m.def("attention_backward_fp32", &attention_backward_door<float>, "The same for fp32.",
          py::call_guard<py::gil_scoped_release>());
}

}  // namespace pefast
